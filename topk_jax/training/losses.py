"""Losses, one value an example: cross-entropy, class-balanced cross-entropy and focal loss.

Data contract: logits [n, classes] of any floating dtype and int32 labels [n] in; losses [n] out, in
float32 (float64 for float64 logits). The caller sums them, leaves out rows that do not count and
divides by the number of examples, as Cui et al. do; PyTorch's weighted cross-entropy divides by the
sum of the weights instead, which is another learning rate.

The focal loss is a function of the margin m = log sum_{c != y} exp(z_c) - z_y: its cross-entropy is
softplus(m), and 1 - p is sigmoid(m). Neither loses digits, nor a derivative, where p rounds to 1;
written with p, the derivative of (1 - p)^gamma is NaN there for gamma < 1.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float64, Int

Loss = Callable[[Float[Array, "n classes"], Int[Array, " n"]], Float[Array, " n"]]
"""From logits and labels to one loss an example."""

Form = Literal["outside", "inside", "sigmoid"]

LossName = Literal["cross_entropy", "class_balanced", "class_balanced_focal"]

# Below it a weighted cross-entropy counts as this in the focal factor of the form "inside": the
# square of its inverse is still a float32.
_LEAST = 1e-12


def softmax_cross_entropy(
    logits: Float[Array, "n classes"], labels: Int[Array, " n"], *, label_smoothing: float = 0.0
) -> Float[Array, " n"]:
    """Cross-entropy -log p of each example.

    Args:
        logits: Unnormalised log-probabilities, of at least two classes.
        labels: True classes.
        label_smoothing: Part of the target, in [0, 1), that is spread evenly over all classes
            (Szegedy et al. 2016, section 7; as in PyTorch).
    """
    logits = _floats(logits)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if label_smoothing:
        own = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
        loss += label_smoothing * (own - jnp.mean(logits, axis=-1))
    return loss


def class_balanced_weights(counts: Sequence[int], beta: float) -> Float64[np.ndarray, " classes"]:
    """Weights of the classes: inverse to their effective numbers of images.

    Cui, Jia, Lin, Song, Belongie, "Class-Balanced Loss Based on Effective Number of Samples", CVPR
    2019: proportional to (1 - beta) / (1 - beta^n).

    Args:
        counts: Training images of each class, each at least 1.
        beta: In [0, 1]: 0 gives every class the weight 1, 1 is the limit of inverse frequencies. Up
            to .75 and more, with more than 50 images a class, all weights are 1 to six digits.

    Returns:
        float64, their sum the number of classes.

    Raises:
        ValueError: A class without images, or beta outside [0, 1].
    """
    numbers = np.asarray(counts, np.float64)
    if numbers.ndim != 1 or not numbers.size or not np.all(numbers >= 1):
        raise ValueError(f"images of each class {list(counts)}: expected at least 1 of each")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}: expected a number in [0, 1], such as 0.9999")
    if beta == 1:
        effective = numbers
    else:
        with np.errstate(divide="ignore"):  # log(0) = -inf is right for beta = 0
            effective = -np.expm1(numbers * np.log1p(-(1 - beta)))
    return len(numbers) / effective / np.sum(1 / effective)


def class_balanced_cross_entropy(
    logits: Float[Array, "n classes"],
    labels: Int[Array, " n"],
    *,
    weights: Float[Any, " classes"],
    label_smoothing: float = 0.0,
) -> Float[Array, " n"]:
    """Cross-entropy of each example times the weight of its class.

    Args:
        logits: As for `softmax_cross_entropy`.
        labels: True classes.
        weights: Of each class, such as `class_balanced_weights`.
        label_smoothing: As for `softmax_cross_entropy`.
    """
    loss = softmax_cross_entropy(logits, labels, label_smoothing=label_smoothing)
    return _weight(weights, labels, loss.dtype) * loss


def focal(
    logits: Float[Array, "n classes"],
    labels: Int[Array, " n"],
    *,
    weights: Float[Any, " classes"],
    gamma: float,
    form: Form = "outside",
) -> Float[Array, " n"]:
    """Class-balanced focal loss of each example: examples with a high p count less.

    With w the weight of the true class y and CE the cross-entropy:

    * "outside": w CE (1 - p)^gamma, where p = exp(-CE) is the probability of y (Lin et al. 2017
      with the weights of Cui et al. 2019).
    * "inside": the same function of the weighted cross-entropy, w CE (1 - exp(-w CE))^gamma, as the
      code of Cao et al. (2019) computes it.
    * "sigmoid": the sum over all classes, each a two-class problem of its own, of
      w (1 - p_c)^gamma (-log p_c), where p_c is the probability of the right answer for class c
      (Cui et al. 2019, equation 11). Initialise the last layer with `with_sigmoid_prior`.

    With gamma 0 the first two are `class_balanced_cross_entropy`. All derivatives are finite.

    Args:
        logits: As for `softmax_cross_entropy`.
        labels: True classes.
        weights: Of each class, such as `class_balanced_weights`; ones for the plain focal loss.
        gamma: At least 0.
        form: Which of the three.

    Raises:
        ValueError: Another form, or a negative gamma.
    """
    _check_focal(gamma, form)
    if form == "sigmoid":
        logits = _floats(logits)
        true = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.bool_)
        margin = jnp.where(true, -logits, logits)
        answers = jax.nn.softplus(margin) * _focus(margin, gamma)
        return _weight(weights, labels, logits.dtype) * jnp.sum(answers, axis=-1)
    margin = _margin(logits, labels)[2]
    loss = _weight(weights, labels, margin.dtype) * jax.nn.softplus(margin)
    if form == "outside" or not gamma:
        return loss * _focus(margin, gamma)
    return loss * jnp.exp(gamma * _log1mexp(jnp.maximum(loss, _LEAST)))


def with_sigmoid_prior(params: dict[str, Any], module: str) -> dict[str, Any]:
    """Parameters whose last layer gives every class the probability 1 / classes at first.

    For the form "sigmoid" of `focal` (Cui et al. 2019, section 5): otherwise the many wrong classes
    outweigh the right one in the first steps. Cui et al. also leave this bias out of weight decay.

    Args:
        params: Of a network.
        module: Its last layer, `network.output_module`.

    Returns:
        The same tree, with the bias of `module` set to -log(classes - 1).
    """
    bias = params[module]["bias"]
    filled = np.full(bias.shape, -math.log(bias.shape[0] - 1), bias.dtype)
    return {**params, module: {**params[module], "bias": filled}}


def make_loss(
    name: LossName,
    *,
    class_counts: Sequence[int] | None = None,
    beta: float = 0.0,
    gamma: float = 0.0,
    form: Form = "outside",
    label_smoothing: float = 0.0,
) -> Loss:
    """Loss by name.

    Args:
        name: "cross_entropy", "class_balanced" or "class_balanced_focal".
        class_counts: Training images of each class; for the class-balanced ones.
        beta: As for `class_balanced_weights`.
        gamma: As for `focal`.
        form: As for `focal`.
        label_smoothing: As for `softmax_cross_entropy`; not with the focal loss.

    Returns:
        A function of logits and labels; its settings are constants, so that it can be used inside a
        compiled step.

    Raises:
        ValueError: An unknown name, a setting out of range, missing, or without a meaning for this
            loss.
    """
    if name not in get_args(LossName):
        raise ValueError(f"unknown loss {name!r}: expected {', '.join(get_args(LossName))}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}: expected a number in [0, 1)")
    given = {"beta": beta, "gamma": gamma, "label_smoothing": label_smoothing}
    meaningless = {
        "cross_entropy": ("beta", "gamma"),
        "class_balanced": ("gamma",),
        "class_balanced_focal": ("label_smoothing",),
    }
    for setting in meaningless[name]:
        if given[setting]:
            raise ValueError(f"{setting}={given[setting]} says nothing to {name}: leave it out")
    if name == "cross_entropy":
        return functools.partial(softmax_cross_entropy, label_smoothing=label_smoothing)
    if class_counts is None:
        raise ValueError(f"{name} needs class_counts, the number of training images of each class")
    weights = class_balanced_weights(class_counts, beta)
    if name == "class_balanced":
        return functools.partial(
            class_balanced_cross_entropy, weights=weights, label_smoothing=label_smoothing
        )
    _check_focal(gamma, form)
    return functools.partial(focal, weights=weights, gamma=gamma, form=form)


def _check_focal(gamma: float, form: str) -> None:
    if form not in get_args(Form):
        raise ValueError(f"form={form!r}: expected one of {', '.join(get_args(Form))}")
    if not gamma >= 0:
        raise ValueError(f"gamma is {gamma}: expected a number of at least 0, such as 0.5")


def _floats(logits: Array) -> Array:
    """The logits in float32 at least."""
    return logits.astype(np.promote_types(logits.dtype, np.float32))


def _margin(logits: Array, labels: Array) -> tuple[Array, Array, Array]:
    """Logits in float32 at least, those of the true classes, and the margin of the others."""
    logits = _floats(logits)
    true = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.bool_)
    own = jnp.sum(jnp.where(true, logits, 0), axis=-1)
    others = jax.nn.logsumexp(logits, axis=-1, where=~true)
    return logits, own, others - own


def _weight(weights: Any, labels: Array, dtype: Any) -> Array:
    return jnp.asarray(weights, dtype)[labels]


def _focus(margin: Array, gamma: float) -> Array:
    """(1 - p)^gamma, where 1 - p is the sigmoid of the margin."""
    return jnp.exp(-gamma * jax.nn.softplus(-margin))


def _log1mexp(x: Array) -> Array:
    """log(1 - exp(-x)) for x > 0, to the last digits at either end (Maechler 2012)."""
    small = x < math.log(2)
    return jnp.where(
        small,
        jnp.log(-jnp.expm1(-jnp.where(small, x, 1))),
        jnp.log1p(-jnp.exp(-jnp.where(small, 1, x))),
    )
