"""Top-K activation: keep the strongest responses of every feature map, set the others to zero.

Data contract: float arrays (float32, bfloat16, float16) of any rank; by default NHWC, ranked over
the two spatial axes, separately for every channel of every image. `fraction` is always what is
kept. Source: Li, Wen, Li, Lee, "Emergence of Shape Bias in Convolutional Neural Networks through
Activation Sparsity", NeurIPS 2023, section 3.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from topk_jax import kernels, selection
from topk_jax.kernels import Implementation, Keep
from topk_jax.kernels import keys as keys_lib
from topk_jax.kernels.keys import RankBy
from topk_jax.selection import Replace, Select

SPATIAL = (-3, -2)

SITE_PREFIX = "topk."
"""Networks name the module of a site so, followed by the site's name."""


def kept_count(fraction: float, sizes: Sequence[int]) -> int:
    """Number of entries kept of a row of n1 * n2 positions: `int(max(1, fraction * n1 * n2))`.

    The product runs in float64 from left to right over the axes in ascending order, as the authors'
    code does; another order can differ by one (fraction .29 of 10x10 is 29, not 28).

    Raises:
        ValueError: `fraction` is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(
            f"fraction must be in (0, 1], the part of each feature map that is kept; got {fraction}"
        )
    product = float(fraction)
    for size in sizes:
        product *= size
    return int(max(1, product))


def topk_mask(
    x: Float[Array, "*shape"],
    fraction: float,
    *,
    axes: Sequence[int] = SPATIAL,
    rank_by: RankBy = "magnitude",
    keep: Keep = "top",
) -> Bool[Array, "*shape"]:
    """Mask of the `k` largest entries over `axes`, separately for every other index.

    Exactly `kept_count(fraction, sizes)` entries are True (`keep="top"`), or exactly the others
    (`keep="rest"`). Ties go to the lowest flat index over the axes; every NaN ranks above infinity;
    +0 and -0 rank alike.

    Args:
        x: Activations, float32, bfloat16 or float16.
        fraction: Part kept, in (0, 1]; a Python number, since it fixes `k`.
        axes: Axes ranked jointly; (-3, -2) are the spatial axes of NHWC.
        rank_by: "magnitude" ranks by `|x|` (the paper), "value" by `x`.
        keep: "top", or "rest" for the complement.

    Returns:
        Boolean mask of the shape of `x`.

    Raises:
        ValueError: A fraction outside (0, 1], a wrong axis, or an unknown `rank_by` or `keep`.
        TypeError: `x` has another dtype.
    """
    axes, k = _check(x, fraction, axes, rank_by, keep)
    if k is None:
        return jnp.full(x.shape, keep == "top")
    mask = _topk(x, k, axes, rank_by, "top", "mask", _choose(x, axes))
    return mask if keep == "top" else ~mask


def topk_activation(
    x: Float[Array, "*shape"],
    fraction: float,
    *,
    axes: Sequence[int] = SPATIAL,
    rank_by: RankBy = "magnitude",
    keep: Keep = "top",
) -> Float[Array, "*shape"]:
    """`x` where `topk_mask` is True, else +0. Kept entries keep their value and sign.

    The gradient is the mask. Each entry of `x` appears, bit for bit, in exactly one of the results
    for `keep="top"` and `keep="rest"`; `fraction=1` with `keep="top"` is the identity. Arguments
    and errors are those of `topk_mask`.
    """
    axes, k = _check(x, fraction, axes, rank_by, keep)
    if k is None:
        return jnp.asarray(x) if keep == "top" else jnp.zeros_like(x)
    return _topk(x, k, axes, rank_by, keep, "activation", _choose(x, axes))


def random_mask(
    key: PRNGKeyArray,
    x: Float[Array, "*shape"],
    fraction: float,
    *,
    axes: Sequence[int] = SPATIAL,
    nonzero: bool = False,
    keep: Keep = "top",
) -> Bool[Array, "*shape"]:
    """Mask of `k` entries over `axes` drawn uniformly, independently for every other index.

    The control of Top-K: as many entries, but not the strongest.

    Args:
        key: Random key. Images at the same place of two batches get the same positions from the
            same key; for positions that belong to an image, map over a key for each:
            `jax.vmap(lambda key, x: random_mask(key, x, 0.1))(keys, images)`.
        x: Activations; only their shape matters, unless `nonzero`.
        fraction: Part kept, in (0, 1].
        axes: Axes drawn from jointly.
        nonzero: Draw among the non-zero entries; all of them where there are fewer than `k`.
        keep: "top" for the entries drawn, "rest" for the complement.

    Raises:
        ValueError: As `topk_mask`.
        TypeError: As `topk_mask`.
    """
    axes, _ = _check(x, fraction, axes, "value", keep)
    ranks = selection.random_ranks(key, x, nonzero=nonzero)
    mask = topk_mask(ranks, fraction, axes=axes, rank_by="value")
    mask = mask & selection.is_nonzero(x) if nonzero else mask
    return mask if keep == "top" else ~mask


def bottom_nonzero_mask(
    x: Float[Array, "*shape"],
    fraction: float,
    *,
    axes: Sequence[int] = SPATIAL,
    keep: Keep = "top",
) -> Bool[Array, "*shape"]:
    """Mask of the `k` smallest magnitudes among the non-zero entries over `axes`.

    Of all of them where there are fewer than `k`; ties go to the lowest flat index. Arguments and
    errors are those of `topk_mask`; `keep="rest"` is the complement.
    """
    axes, _ = _check(x, fraction, axes, "magnitude", keep)
    ranks = selection.bottom_nonzero_ranks(x)
    mask = topk_mask(ranks, fraction, axes=axes, rank_by="value") & selection.is_nonzero(x)
    return mask if keep == "top" else ~mask


class TopK(nn.Module):
    """`topk_activation` as a Linen module, to be put into a network or named as a site's setting.

    With `fraction` alone it is the paper's layer. The other fields are variants and controls; they
    go together (`selection.keep_masked` has the order of the steps) unless an error says otherwise.

        TopK(0.1, select="random")            # network.apply(..., rngs={"topk": key})
        TopK(0.1, select="threshold")         # after variables = calibrate_thresholds(...)
        TopK(0.1, rank_by="value", replace="mean")   # the mean-replace of the paper's GAN
        TopK(0.1, axes=(0, -3, -2))           # BatchTopK: k entries of a channel of the batch

    Attributes:
        fraction: Part of each feature map that is kept, in (0, 1].
        axes: Axes ranked jointly: (-3, -2) over space (the paper), (-1,) over channels,
            (-3, -2, -1) over both; with 0 in front, over the batch (of one device) as well.
        rank_by: "magnitude" or "value".
        keep: "top" for what `select` names, "rest" for the others.
        select: Which entries: the "top" ones; as many at "random", or "random_nonzero" among those
            that are not zero; "bottom_nonzero", the weakest that are not zero; "threshold", those
            at or above a threshold, one a channel, for which `fraction` is the mean density on
            calibration images.
        replace: None keeps their values; "mean" and "binary" are in `selection.keep_masked`.
        rescale: Give each row back the sum of magnitudes that it had.
        blend: Weight of the result beside the input; 1 is the paper.
    """

    fraction: float
    axes: Sequence[int] = SPATIAL
    rank_by: RankBy = "magnitude"
    keep: Keep = "top"
    select: Select = "top"
    replace: Replace | None = None
    rescale: bool = False
    blend: float = 1.0

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: A field out of range or unknown, or fields that contradict one another.
        """
        object.__setattr__(self, "axes", tuple(self.axes))
        kept_count(self.fraction, ())
        if self.select not in get_args(Select):
            raise ValueError(f"select {self.select!r}: expected {', '.join(get_args(Select))}")
        if self.replace not in (None, *get_args(Replace)):
            raise ValueError(f'replace {self.replace!r}: expected None, "mean" or "binary"')
        if not 0 <= self.blend <= 1:
            raise ValueError(f"blend must be in [0, 1], 1 being the paper's; got {self.blend}")
        if self.rank_by != "magnitude" and self.select not in ("top", "threshold"):
            raise ValueError(
                f'rank_by={self.rank_by!r} says nothing to select="{self.select}": leave it out'
            )
        if self.rescale and self.replace == "binary":
            raise ValueError(
                'rescale would undo replace="binary", which takes the strength of the rows away: '
                'leave it out, or write replace="mean"'
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Applies the activation to `x` of any shape that has `axes`."""
        if self.select == "top" and self.replace is None and not self.rescale and self.blend == 1:
            return topk_activation(
                x, self.fraction, axes=self.axes, rank_by=self.rank_by, keep=self.keep
            )
        mask = self._mask(x)
        return selection.keep_masked(
            x,
            mask,
            axes=self.axes,
            replace=self.replace,
            rescale=self.rescale,
            blend=self.blend,
        )

    def _mask(self, x: Float[Array, "*shape"]) -> Bool[Array, "*shape"]:
        """The entries that `select` names, or the others."""
        _check(x, self.fraction, self.axes, self.rank_by, self.keep)
        x = jax.lax.stop_gradient(x)
        options: dict[str, Any] = {"axes": self.axes, "keep": self.keep}
        # Networks are initialised with a key for their parameters alone, and without thresholds:
        # then, where only shapes matter, the strongest entries stand in.
        ready = not self.is_initializing()
        if self.select == "bottom_nonzero":
            return bottom_nonzero_mask(x, self.fraction, **options)
        if self.select == "threshold" and ready:
            mask = selection.threshold_mask(
                x, self._threshold(), axes=self.axes, rank_by=self.rank_by
            )
            return mask if self.keep == "top" else ~mask
        if self.select in ("random", "random_nonzero") and ready:
            if not self.has_rng(selection.COLLECTION):
                raise ValueError(
                    f'{self._label()} draws positions: pass rngs={{"topk": jax.random.key(0)}} '
                    "to apply"
                )
            key = self.make_rng(selection.COLLECTION)
            nonzero = self.select == "random_nonzero"
            return random_mask(key, x, self.fraction, nonzero=nonzero, **options)
        return topk_mask(x, self.fraction, rank_by=self.rank_by, **options)

    def _threshold(self) -> Float[Array, "*rows"]:
        if not self.has_variable(selection.COLLECTION, selection.THRESHOLD):
            raise ValueError(
                f"{self._label()} has no thresholds: variables = calibrate_thresholds(network, "
                "variables, batches, train=False) finds them"
            )
        return self.get_variable(selection.COLLECTION, selection.THRESHOLD)

    def _label(self) -> str:
        """How errors call the site."""
        place = f" at {'/'.join(self.path)}" if self.path else ""
        return f'TopK(select="{self.select}"){place}'


def _check(
    x: Array, fraction: float, axes: Sequence[int], rank_by: str, keep: str
) -> tuple[tuple[int, ...], Int[Array, ""] | None]:
    """The axes as ascending non-negative numbers, and `k`: None where it is every position."""
    if not keys_lib.supported(x.dtype):
        raise TypeError(
            f"Top-K takes float32, bfloat16 or float16, got {x.dtype}; convert with x.astype"
        )
    if rank_by not in ("magnitude", "value"):
        raise ValueError(f'rank_by must be "magnitude" or "value", got {rank_by!r}')
    if keep not in ("top", "rest"):
        raise ValueError(f'keep must be "top" or "rest", got {keep!r}')
    if not axes or any(not -x.ndim <= axis < x.ndim for axis in axes):
        raise ValueError(f"axes {tuple(axes)} do not fit an array of shape {x.shape}")
    positive = sorted(axis % x.ndim for axis in axes)
    if len(set(positive)) != len(positive):
        raise ValueError(f"axes {tuple(axes)} name one axis of an array of shape {x.shape} twice")
    sizes = [x.shape[axis] for axis in positive]
    k = kept_count(fraction, sizes)
    whole = x.size == 0 or k == math.prod(sizes)
    return tuple(positive), None if whole else jnp.int32(k)


def _as_rows(shape: Sequence[int], axes: tuple[int, ...]) -> tuple[list[int], tuple[int, int, int]]:
    """Order of the axes that puts the ranked ones side by side, and the sizes [b, n, c] then.

    Where they lie side by side already nothing moves: what precedes them is `b`, what follows `c`.
    """
    first, last = axes[0], axes[-1]
    order = list(range(len(shape)))
    if last - first != len(axes) - 1:
        others = [axis for axis in order if axis not in axes]
        order = others + list(axes)
        first, last = len(others), len(shape) - 1
    moved = [shape[axis] for axis in order]
    b, n, c = (math.prod(s) for s in (moved[:first], moved[first : last + 1], moved[last + 1 :]))
    return order, (b, n, c)


def _choose(x: Array, axes: tuple[int, ...]) -> Implementation:
    return kernels.choose(_as_rows(x.shape, axes)[1], x.dtype)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _topk(
    x: Float[Array, "*shape"],
    k: Int[Array, ""],
    axes: tuple[int, ...],
    rank_by: RankBy,
    keep: Keep,
    result: Literal["activation", "mask"],
    implementation: Implementation,
) -> Array:
    """Activation or mask; `k` is traced, so that one program serves every fraction."""
    order, rows = _as_rows(x.shape, axes)
    moved = x if order == sorted(order) else jnp.transpose(x, order)
    flat = moved.reshape(rows)
    if result == "mask":
        flat = jax.lax.stop_gradient(flat)
    selected = kernels.select(flat, k, rank_by, keep, implementation)
    y = selected.y
    if result == "mask":
        y = kernels.kept(flat, selected.threshold, selected.cut, rank_by)
    y = y.reshape(moved.shape)
    return (
        y if order == sorted(order) else jnp.transpose(y, [order.index(i) for i in range(x.ndim)])
    )
