"""Ways of choosing and of keeping entries other than the paper's, and calibrated thresholds.

Controls ask whether *which* entries Top-K keeps matters: as many at random, at random among the
non-zero ones, the weakest ones, or all above a fixed threshold. Variants ask what of the kept
entries matters: their values, their mean, or only where they are.

Data contract: float arrays as in `topk_jax.topk`, axis 0 being the batch. A control is an order of
the entries: a float32 array to be given to `topk_mask(..., rank_by="value")`, so that exact counts
and ties are settled in one place. `TopK` has all of them as fields; these functions are for
networks without Linen.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from topk_jax.kernels import keys as keys_lib
from topk_jax.kernels.keys import RankBy

Select = Literal["top", "random", "random_nonzero", "bottom_nonzero", "threshold"]
Replace = Literal["mean", "binary"]

COLLECTION = "topk"
"""Name of the collection that holds thresholds, and of the random stream."""

THRESHOLD = "threshold"
"""Name of a site's variable in the collection."""


def random_ranks(
    key: PRNGKeyArray, x: Float[Array, "*shape"], *, nonzero: bool = False
) -> Float[Array, "*shape"]:
    """Random order of the entries of `x`, drawn independently for every entry.

    Args:
        key: Random key; the same key gives the same order.
        x: Activations. Only their shape matters, unless `nonzero`.
        nonzero: Put every zero below all other entries.

    Returns:
        float32 of the shape of `x`, to be ranked by value.
    """
    order = (jax.random.bits(key, x.shape, jnp.uint32) >> 2).astype(jnp.int32)
    if nonzero:
        order = jnp.where(is_nonzero(x), order, -1)
    return _floats_in_order(order)


def bottom_nonzero_ranks(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Order of the entries of `x` from the weakest non-zero one to the strongest, then the zeros.

    Returns:
        float32 of the shape of `x`, to be ranked by value: the smaller the magnitude, the larger.
    """
    magnitude = keys_lib.keys(x, "magnitude")
    _, largest = keys_lib.bounds(x.dtype, "magnitude")
    # Strictly above -largest: the strongest entry is a NaN and becomes 0.
    return _floats_in_order(jnp.where(magnitude == 0, -1, largest - magnitude))


def is_nonzero(x: Float[Array, "*shape"]) -> Bool[Array, "*shape"]:
    """Where `x` is not +-0; NaN and subnormal numbers are non-zero on every device."""
    return keys_lib.keys(x, "magnitude") != 0


def _floats_in_order(order: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """float32 numbers whose order is that of `order`, integers from -2^30 up to infinity's bits."""
    sign = jnp.int32(-(2**31))
    bits = jnp.where(order < 0, sign | -order, order)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def threshold_mask(
    x: Float[Array, "*shape"],
    threshold: Float[Array, "*rows"],
    *,
    axes: Sequence[int],
    rank_by: RankBy = "magnitude",
) -> Bool[Array, "*shape"]:
    """Mask of the entries at or above a threshold; how many depends on the image.

    Args:
        x: Activations, float32, bfloat16 or float16.
        threshold: As many as there are indices of the axes other than `axes` and the first: [c]
            for spatial axes of NHWC. A threshold of 0 keeps every entry by magnitude.
        axes: Axes that share a threshold, besides the first.
        rank_by: What is compared with the threshold: "magnitude", `|x|`, or "value", `x`.

    Raises:
        ValueError: Thresholds of another shape.
    """
    pooled = _pooled_axes(x.ndim, axes)
    expected = tuple(size for axis, size in enumerate(x.shape) if axis not in pooled)
    if threshold.shape != expected:
        raise ValueError(
            f"thresholds of shape {threshold.shape} for activations of shape {x.shape}: "
            f"expected {expected}; calibrate them again for this network"
        )
    shape = [1 if axis in pooled else size for axis, size in enumerate(x.shape)]
    least = threshold.astype(jnp.float32).reshape(shape)
    key = keys_lib.keys(x.astype(jnp.float32), rank_by)
    return key >= keys_lib.keys(least, "value")


def _pooled_axes(ndim: int, axes: Sequence[int]) -> tuple[int, ...]:
    """The axes that share a threshold, ascending: those ranked jointly and the batch."""
    return tuple(sorted({0} | {axis % ndim for axis in axes}))


def keep_masked(
    x: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"],
    *,
    axes: Sequence[int],
    replace: Replace | None = None,
    rescale: bool = False,
    blend: float = 1.0,
) -> Float[Array, "*shape"]:
    """`x` where `mask` is True, else 0, and what a variant makes of the kept entries.

    The steps are taken in the order of the arguments. Sums and means are taken in float32, and
    gradients flow through them; through the choice of the entries there is no gradient.

    Args:
        x: Activations.
        mask: Which entries are kept.
        axes: Axes ranked jointly; a row is all entries that differ only in them.
        replace: "mean" puts the mean of the kept entries of its row in the place of each; where
            they are and how strong their row is remains. "binary" puts one number into every kept
            entry that is not zero: the mean of all of these in the image (over all axes but the
            first, or over all if the first is ranked too); only where they are remains.
        rescale: Multiply each row by the sum of its magnitudes before over the one after, so that
            it loses no energy. A row with nothing left, or with entries that are not finite, is not
            scaled.
        blend: `blend * result + (1 - blend) * x`; 1 is the paper.
    """
    zero = jnp.zeros((), x.dtype)
    if replace is None:
        # Not a product: inf * 0 is NaN, and -1 * 0 is -0.
        y = jnp.where(mask, x, zero)
    else:
        if replace == "binary":
            mask = mask & is_nonzero(x)
            positive = {axis % x.ndim for axis in axes}
            axes = range(x.ndim) if 0 in positive else range(1, x.ndim)
        y = jnp.where(mask, _mean_of_kept(x, mask, axes).astype(x.dtype), zero)
    if rescale:
        y = (y.astype(jnp.float32) * _lost_energy(x, y, axes)).astype(x.dtype)
    return y if blend == 1 else blend * y + (1 - blend) * x


def _mean_of_kept(
    x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], axes: Sequence[int]
) -> Float[Array, "*rows"]:
    kept = jnp.where(mask, x.astype(jnp.float32), jnp.float32(0))
    count = jnp.sum(mask, axis=tuple(axes), keepdims=True).astype(jnp.float32)
    return jnp.sum(kept, axis=tuple(axes), keepdims=True) / jnp.maximum(count, 1)


def _lost_energy(
    x: Float[Array, "*shape"], y: Float[Array, "*shape"], axes: Sequence[int]
) -> Float[Array, "*rows"]:
    """Sum of `|x|` over sum of `|y|`, row by row, or 1 where that is no number to scale by."""
    before, after = (
        jnp.sum(jnp.abs(a.astype(jnp.float32)), axis=tuple(axes), keepdims=True) for a in (x, y)
    )
    largest = jnp.finfo(jnp.float32).max
    usable = (after > 0) & jnp.isfinite(before) & (before <= after * largest)
    # Where it is not used the quotient is 1 / 1: its gradient would be NaN otherwise.
    one = jnp.float32(1)
    return jnp.where(usable, before, one) / jnp.where(usable, after, one)


class _Site(NamedTuple):
    """A `TopK(select="threshold")` met in a forward pass, and its input."""

    path: tuple[str, ...]
    fraction: float
    axes: Sequence[int]
    rank_by: RankBy
    x: Float[Array, "*shape"]


def calibrate_thresholds(
    network: nn.Module,
    variables: Mapping[str, Any],
    batches: Iterable[Array | np.ndarray],
    **options: Any,
) -> dict[str, Any]:
    """Finds the thresholds of every `TopK(select="threshold")` in a network.

    A threshold is the largest one that keeps `int(max(1, fraction * m))` of the `m` entries that
    share it (of one channel: all positions of all images), so that the mean density of the
    calibration images is `fraction`; entries that tie with it are kept too, and a channel with
    fewer non-zero entries keeps them all. The sites are calibrated one after another in order of
    computation, each with those before it already in force. Exact; a site's part of the entries,
    `fraction` of them, is held in memory while it is calibrated.

    Args:
        network: Any Linen module that is called with a batch.
        variables: Its variables; thresholds already among them are found anew.
        batches: Inputs of the network, [n, ...] each. Gone through once to count the images and
            once for every site, so it has to be a list or another collection, not an iterator.
        **options: Further arguments of `network.apply`, for networks of this package `train=False`.

    Returns:
        The variables with the collection "topk", in which every site has its `threshold`, float32.

    Raises:
        ValueError: No such site, one that is called several times, no images, or an iterator.
    """
    if iter(batches) is batches:
        raise ValueError("batches is an iterator, which runs out: pass a list of batches instead")
    images = sum(len(batch) for batch in batches)
    if not images:
        raise ValueError("no images to calibrate thresholds with")
    first = next(iter(batches))
    found: dict[str, Any] = {name: tree for name, tree in variables.items() if name != COLLECTION}
    found[COLLECTION] = {}
    while site := _first_uncalibrated(network, found, first, options):
        entries = images * math.prod(site.x.shape) // site.x.shape[0]
        threshold = _calibrate(network, found, batches, options, site, entries)
        tree = found[COLLECTION]
        for name in site.path:
            tree = tree.setdefault(name, {})
        if THRESHOLD in tree:
            raise ValueError(
                f"{'/'.join(site.path)} does not see the threshold found for it: a lifted "
                f'transformation around it must let the collection "{COLLECTION}" through'
            )
        tree[THRESHOLD] = threshold
    if not found[COLLECTION]:
        raise ValueError(
            'no site to calibrate: give the network one such as topk={"pool1": '
            'TopK(0.1, select="threshold")}'
        )
    return found


def _first_uncalibrated(
    network: nn.Module, variables: Mapping[str, Any], batch: Any, options: Mapping[str, Any]
) -> _Site | None:
    """The first site without a threshold, from shapes alone."""
    sites: list[_Site] = []

    def forward(variables: Any, batch: Any) -> None:
        sites.extend(_uncalibrated(network, variables, batch, options))

    jax.eval_shape(forward, variables, batch)
    if not sites:
        return None
    if sum(site.path == sites[0].path for site in sites) > 1:
        raise ValueError(
            f"{'/'.join(sites[0].path)} is called several times: give each call its own TopK"
        )
    return sites[0]


def _uncalibrated(
    network: nn.Module, variables: Any, batch: Any, options: Mapping[str, Any]
) -> list[_Site]:
    """Sites without a threshold, in order of computation; they let everything through."""
    sites: list[_Site] = []

    def intercept(
        function: Any, arguments: Any, keywords: Any, context: nn.module.InterceptorContext
    ) -> Any:
        site: Any = context.module
        wanted = (
            context.method_name == "__call__"
            and getattr(site, "select", None) == "threshold"
            and not site.has_variable(COLLECTION, THRESHOLD)
        )
        if not wanted:
            return function(*arguments, **keywords)
        (x,) = arguments
        sites.append(_Site(site.path, site.fraction, site.axes, site.rank_by, x))
        return x

    with nn.intercept_methods(intercept):
        network.apply(variables, batch, **options)
    return sites


def _calibrate(
    network: nn.Module,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    options: Mapping[str, Any],
    site: _Site,
    entries: int,
) -> Float[np.ndarray, "*rows"]:
    """The threshold of each channel of `site`, of which there are `entries` numbers in all."""
    pooled = _pooled_axes(site.x.ndim, site.axes)
    rows = tuple(size for axis, size in enumerate(site.x.shape) if axis not in pooled)
    keep = int(max(1, site.fraction * (entries // math.prod(rows))))

    @jax.jit
    def forward(variables: Any, batch: Any) -> Float[Array, "rows entries"]:
        # What follows the site is dropped by the compiler, since nobody reads it.
        x = _uncalibrated(network, variables, batch, options)[0].x
        ranked = jnp.abs(x) if site.rank_by == "magnitude" else x
        last = jnp.moveaxis(ranked, pooled, range(-len(pooled), 0))
        return last.reshape(math.prod(rows), -1).astype(jnp.float32)

    strongest = np.zeros((math.prod(rows), 0), np.float32)
    for batch in batches:
        strongest = np.concatenate([strongest, np.asarray(forward(variables, batch))], axis=1)
        if strongest.shape[1] > keep:
            # NaN comes last, as the largest.
            strongest = np.partition(strongest, -keep, axis=1)[:, -keep:]
    return strongest.min(axis=1, initial=np.inf).reshape(rows)
