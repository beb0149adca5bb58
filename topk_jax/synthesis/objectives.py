"""What an image is asked to share with a target: Gram matrices, or activations, of some features.

Data contract: an objective is a function of images [1, h, w, 3], normalised for the network, that
gives a float32 scalar, and a pytree whose leaves are weights and targets: passed to a compiled
function, it brings them along as arguments. Features come from any callable images -> {name:
activation [n, h, w, c]}.

Sources: Gatys, Ecker, Bethge 2015 (arXiv:1505.07376); Li, Wen, Li, Lee 2023, section 4 and
supplement; the authors' code where the text leaves it open.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from topk_jax.topk import topk_activation, topk_mask

Mode = Literal["all", "top", "rest"]
Reduction = Literal["sum", "mean"]
MaskOfImage = Literal["none", "target"]

Features = Callable[[Float[Array, "n h w 3"]], Mapping[str, Float[Array, "n fh fw c"]]]
Objective = Callable[[Float[Array, "1 h w 3"]], Float[Array, ""]]


def gram_matrix(x: Float[Array, "n h w c"]) -> Float[Array, "n c c"]:
    """Products of channels, summed over positions and divided by h * w * c, for each image.

    With A = [c, h * w] the activations of an image, it is A A^T / (c h w) (Li et al., code).
    """
    n, h, w, c = x.shape
    return _channel_products(x.reshape(n, h * w, c)) / (h * w * c)


@jax.custom_jvp
def _channel_products(rows: Float[Array, "n positions c"]) -> Float[Array, "n c c"]:
    return jnp.einsum("npi,npj->nij", rows, rows, precision="highest")


@_channel_products.defjvp
def _channel_products_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    # A product and its transpose, where differentiating the einsum gives two products each way.
    (rows,), (change,) = primals, tangents
    half = jnp.einsum("npi,npj->nij", change, rows, precision="highest")
    return _channel_products(rows), half + jnp.swapaxes(half, 1, 2)


def masked(x: Float[Array, "n h w c"], mode: Mode, sparsity: float) -> Float[Array, "n h w c"]:
    """All of `x`, its Top-K over the positions of each channel, or the rest."""
    return x if mode == "all" else topk_activation(x, sparsity, keep=mode)


def check_mask(mode: Mode, sparsity: float) -> None:
    """Raises ValueError for an unknown mode, a sparsity outside (0, 1], or a rest of nothing."""
    if mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r}: expected {' or '.join(get_args(Mode))}")
    if not 0 < sparsity <= 1:
        raise ValueError(f"sparsity={sparsity}: expected a fraction in (0, 1]")
    if mode == "rest" and sparsity == 1:
        raise ValueError("mode='rest' with sparsity=1 leaves nothing")


def texture_objective(
    features: Features,
    target: Float[Any, "1 h w 3"],
    *,
    layers: Mapping[str, float],
    mode: Mode = "all",
    sparsity: float = 0.05,
    reduction: Reduction = "sum",
) -> "Scaled":
    """Squared differences of Gram matrices of masked activations, summed over layers.

        sum over l of layers[l] * reduce((gram(mask(f_l(image))) - gram(mask(f_l(target))))^2)

    Image and target are masked each by its own Top-K, anew at every evaluation. Activations go on
    unmasked to the next layer: `features` is the network without Top-K.

    Args:
        features: Function from images to named activations; see `networks.FeatureExtractor`. As a
            `jax.tree_util.Partial` its weights are arguments of what is compiled.
        target: The image, normalised for the network.
        layers: Weight of each feature.
        mode: "all" for the method of Gatys et al., "top", or "rest".
        sparsity: Part of each feature map that counts as its top, in (0, 1].
        reduction: "sum" over the entries of the Gram matrix, or "mean".

    Raises:
        ValueError: A bad setting, a feature that is not there, or a target that is not finite.
    """
    loss = _Loss(_layers(layers), mode, sparsity, reduction, "gram", "none")
    return _scaled(loss, features, target)


def reconstruction_objective(
    features: Features,
    target: Float[Any, "1 h w 3"],
    *,
    layers: Mapping[str, float],
    mode: Mode = "all",
    sparsity: float = 0.05,
    reduction: Reduction = "sum",
    mask_image: MaskOfImage = "none",
) -> "Scaled":
    """Squared differences between an image's activations and the masked ones of a target.

        sum over l of layers[l] * reduce((f_l(image) - mask(f_l(target)))^2)

    The image has the target's size.

    Args:
        features: As in `texture_objective`, and so the next five.
        target: The image.
        layers: Weight of each feature.
        mode: Which of the target's activations are wanted; zero is wanted of the others.
        sparsity: Part of each feature map that counts as its top.
        reduction: "sum" over the activations, or "mean".
        mask_image: "none" compares all activations of the image (the authors' code), so that those
            outside the target's mask are driven to zero; "target" compares those within it alone.

    Raises:
        ValueError: As in `texture_objective`.
    """
    loss = _Loss(_layers(layers), mode, sparsity, reduction, "activation", mask_image)
    return _scaled(loss, features, target)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """An objective, in units of its value for an image without any activation.

    Losses of the published scale reach 1e15. In these units the start of a search is near 1, and
    neither the loss nor products of gradients come near the limits of float32.

    Attributes:
        objective: The loss in the published scale, divided by `unit`.
        unit: float32 scalar.
    """

    objective: jax.tree_util.Partial
    unit: Float[Array, ""]

    def __call__(self, image: Float[Array, "1 h w 3"]) -> Float[Array, ""]:
        """The loss divided by `unit`."""
        return self.objective(image)


@dataclasses.dataclass(frozen=True)
class _Loss:
    """The settings of an objective; hashable, so that one program serves all targets."""

    layers: tuple[tuple[str, float], ...]
    mode: Mode
    sparsity: float
    reduction: Reduction
    statistic: Literal["gram", "activation"]
    mask_image: MaskOfImage

    def __post_init__(self):
        for name, kinds in (("reduction", Reduction), ("mask_image", MaskOfImage)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: expected {' or '.join(get_args(kinds))}"
                )
        check_mask(self.mode, self.sparsity)

    def targets(self, features: Features, image: Array) -> dict[str, tuple[Array, ...]]:
        """What is wanted of each layer, and where it counts (no entry where that is everywhere)."""
        found = features(image)
        wanted = {}
        for name, _ in self.layers:
            if name not in found:
                raise ValueError(f"no feature {name!r}: there are {', '.join(found)}")
            x = masked(found[name], self.mode, self.sparsity)
            if self.statistic == "gram":
                wanted[name] = (gram_matrix(x),)
            elif self.mask_image == "target" and self.mode != "all":
                wanted[name] = (x, topk_mask(found[name], self.sparsity, keep=self.mode))
            else:
                wanted[name] = (x,)
        return wanted

    def __call__(
        self,
        features: Features,
        targets: Mapping[str, tuple[Array, ...]],
        unit: Array,
        image: Array,
    ) -> Array:
        found = features(image)
        terms = []
        for name, weight in self.layers:
            target, *where = targets[name]
            x = found[name]
            if self.statistic == "gram":
                x = gram_matrix(masked(x, self.mode, self.sparsity))
            if x.shape != target.shape:
                raise ValueError(
                    f"{name} is {x.shape[1:3]} here and {target.shape[1:3]} in the target: "
                    "reconstruction needs an image of the target's size"
                )
            for mask in where:
                x = jnp.where(mask, x, 0)
            terms.append(self._reduced(weight, unit, x - target))
        return jnp.sum(jnp.stack(terms))

    def unit(self, targets: Mapping[str, tuple[Array, ...]]) -> Array:
        """The loss of an image whose activations are all zero."""
        one = jnp.ones((), jnp.float32)
        return jnp.sum(
            jnp.stack([self._reduced(w, one, targets[name][0]) for name, w in self.layers])
        )

    def _reduced(self, weight: float, unit: Array, difference: Array) -> Array:
        # Divided before it is squared.
        if self.reduction == "mean":
            weight /= difference.size
        scaled = difference * (jnp.float32(weight**0.5) / jnp.sqrt(unit))
        return jnp.sum(scaled * scaled)


def _layers(layers: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    if not layers or not all(weight > 0 for weight in layers.values()):
        raise ValueError(f"layers={dict(layers)}: expected features with positive weights")
    return tuple((name, float(weight)) for name, weight in layers.items())


@jax.jit
def _prepared(loss_and_features: Any, image: Array) -> Any:
    loss, features = loss_and_features.func, loss_and_features.args[0]
    targets = loss.targets(features, image)
    return targets, loss.unit(targets)


def _scaled(loss: _Loss, features: Features, target: Any) -> Scaled:
    if not isinstance(features, jax.tree_util.Partial):
        features = jax.tree_util.Partial(features)
    target = jnp.asarray(target, jnp.float32)
    if target.ndim != 4 or target.shape[0] != 1:
        raise ValueError(f"target of shape {target.shape}: expected one image, [1, h, w, channels]")
    if not np.all(np.isfinite(target)):  # the rest may leave it out
        raise ValueError("the target has values that are not finite")
    with jax.default_matmul_precision("highest"):
        targets, unit = _prepared(jax.tree_util.Partial(loss, features), target)
    value = float(unit)
    if not np.isfinite(value):
        raise ValueError(f"the target's features are not finite (sum of squares {value})")
    if value == 0:
        raise ValueError("all features of the target are zero: nothing to synthesise")
    return Scaled(jax.tree_util.Partial(loss, features, targets, unit), unit)
