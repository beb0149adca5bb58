"""What Top-K does to a network's activations, measured as a stream over batches.

    total = None
    for images in batches:
        _, features = apply(variables, images)
        total = telemetry.merge(total, telemetry.measure_features(features))
    telemetry.summarize(total)["pool1"].density

Data contract: arrays as in `topk_jax.topk`, axis 0 being the batch and the last one the channels.
`measure` is JAX and can be part of the compiled program, so that features need not leave the
device; `merge` and `summarize` are NumPy. Features of a site are taken after Top-K: density and
dead units are measured there, margins on what enters the site (`site_inputs`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from topk_jax.kernels.keys import RankBy
from topk_jax.topk import SITE_PREFIX, SPATIAL, TopK, topk_mask

_Any = Array | np.ndarray


class Measures(NamedTuple):
    """Sums of a batch, or of several; to be merged, not to be read.

    Arrays are [c], or [1] for margins of rows that go over the channels.

    Attributes:
        images: Number of images.
        entries: Number of entries of a channel, over all images.
        nonzero: Number of entries of each channel that are not zero.
        rows: Number of rows of each channel.
        cut_rows: Those that have a margin.
        tied_rows: Those whose margin is 0.
        margin_sum: Sum of the margins.
        margin_min: Smallest margin, infinity without any.
        relative_sum: Sum of the margins relative to the k-th value.
        relative_min: Smallest of these.
    """

    images: Int[_Any, ""]
    entries: Int[_Any, ""]
    nonzero: Int[_Any, " c"]
    rows: Int[_Any, " c"]
    cut_rows: Int[_Any, " c"]
    tied_rows: Int[_Any, " c"]
    margin_sum: Float[_Any, " c"]
    margin_min: Float[_Any, " c"]
    relative_sum: Float[_Any, " c"]
    relative_min: Float[_Any, " c"]


@dataclasses.dataclass(frozen=True)
class Telemetry:
    """What `summarize` makes of measures; NumPy arrays with an entry a channel, or one for all.

    Attributes:
        images: Number of images.
        density: Fraction of all entries that are not zero; below the kept fraction where ReLU
            leaves fewer than `k` of a map.
        channel_density: The same for each channel.
        dead: Channels that are zero in every image.
        cut_fraction: Fraction of the rows that have a margin: `k` non-zero entries or more, and
            finite numbers at the cut.
        tied_fraction: Fraction of those whose k-th and next value are equal.
        margin_mean: Mean difference between the k-th and the next value; NaN without any.
        margin_min: Smallest one; NaN without any.
        relative_margin_mean: Mean difference in units of the k-th value's magnitude.
        relative_margin_min: Smallest one.
    """

    images: int
    density: float
    channel_density: Float[np.ndarray, " c"]
    dead: Bool[np.ndarray, " c"]
    cut_fraction: Float[np.ndarray, " c"]
    tied_fraction: Float[np.ndarray, " c"]
    margin_mean: Float[np.ndarray, " c"]
    margin_min: Float[np.ndarray, " c"]
    relative_margin_mean: Float[np.ndarray, " c"]
    relative_margin_min: Float[np.ndarray, " c"]


def measure(
    x: Float[Array, "n *shape c"],
    *,
    fraction: float | None = None,
    axes: Sequence[int] = SPATIAL,
    rank_by: RankBy = "magnitude",
    valid: Bool[Array, " n"] | None = None,
) -> Measures:
    """Measures one batch of activations.

    Args:
        x: Activations, float32, bfloat16 or float16.
        fraction: Measure margins for this kept fraction too. Give what enters the site then.
        axes: Axes ranked jointly, for margins.
        rank_by: What is ranked, for margins.
        valid: Which images count; all by default. With `axes` over the batch all have to.

    Returns:
        Arrays of JAX, also within `jit`, `vmap` and `pmap`. Margins are taken in float32.

    Raises:
        ValueError: A fraction or axes that `topk_mask` does not take, or `valid` with axes over the
            batch.
    """
    x = jax.lax.stop_gradient(jnp.asarray(x))
    counts = jnp.ones(x.shape[0], bool) if valid is None else valid
    if valid is not None and fraction is not None and 0 in {axis % x.ndim for axis in axes}:
        raise ValueError("axes over the batch rank every image: leave out valid")
    images = jnp.sum(counts, dtype=jnp.int32)
    positions = x.size // max(1, x.shape[0] * x.shape[-1])
    shape = (-1,) + (1,) * (x.ndim - 1)
    # NaN is not zero.
    nonzero = (x != 0) & counts.reshape(shape)
    return Measures(
        images,
        images * positions,
        _over_all_but_channels(nonzero, jnp.sum).astype(jnp.int32),
        *_margins(x, fraction, axes, rank_by, counts.reshape(shape)),
    )


def measure_features(
    features: Mapping[str, Array],
    *,
    fraction: float | None = None,
    axes: Sequence[int] = SPATIAL,
    rank_by: RankBy = "magnitude",
    valid: Bool[Array, " n"] | None = None,
) -> dict[str, Measures]:
    """`measure` of every feature, such as a network's; arguments and errors are the same."""
    options: dict[str, Any] = {"fraction": fraction, "axes": axes, "rank_by": rank_by}
    return {name: measure(x, **options, valid=valid) for name, x in features.items()}


def _over_all_but_channels(x: Array, reduce: Any, **options: Any) -> Array:
    return reduce(x, axis=tuple(range(x.ndim - 1)), **options)


def _margins(
    x: Float[Array, "n *shape c"],
    fraction: float | None,
    axes: Sequence[int],
    rank_by: RankBy,
    counts: Bool[Array, "*ones"],
) -> tuple[Array, ...]:
    """The fields of `Measures` from `rows` on."""
    infinity = jnp.float32(jnp.inf)
    if fraction is None:
        none = jnp.zeros(x.shape[-1], jnp.int32)
        zero = none.astype(jnp.float32)
        return none, none, none, zero, zero + infinity, zero, zero + infinity
    mask = topk_mask(x, fraction, axes=axes, rank_by=rank_by)
    ranked = (jnp.abs(x) if rank_by == "magnitude" else x).astype(jnp.float32)
    over: dict[str, Any] = {"axis": tuple(axes), "keepdims": True}
    # NaN ranks above infinity, and like it has no margin.
    ranked = jnp.where(jnp.isnan(ranked), infinity, ranked)
    kth = jnp.min(jnp.where(mask, ranked, infinity), **over)
    following = jnp.max(jnp.where(mask, -infinity, ranked), **over)
    row_counts = jnp.broadcast_to(counts, kth.shape)
    cut = row_counts & (kth != 0) & jnp.isfinite(kth) & jnp.isfinite(following)
    margin = jnp.where(cut, kth - following, infinity)
    relative = jnp.where(cut, margin / jnp.where(cut, jnp.abs(kth), jnp.float32(1)), infinity)

    def count(flags: Array) -> Array:
        return _over_all_but_channels(flags, jnp.sum).astype(jnp.int32)

    def total(values: Array) -> Array:
        return _over_all_but_channels(jnp.where(cut, values, jnp.float32(0)), jnp.sum)

    def least(values: Array) -> Array:
        return _over_all_but_channels(values, jnp.min, initial=np.inf)

    return (
        *(count(row_counts), count(cut), count(cut & (margin == 0))),
        *(total(margin), least(margin), total(relative), least(relative)),
    )


@overload
def merge(total: Measures | None, new: Measures) -> Measures: ...


@overload
def merge(
    total: Mapping[str, Measures] | None, new: Mapping[str, Measures]
) -> dict[str, Measures]: ...


def merge(total: Any, new: Any) -> Any:
    """Adds the measures of a batch to those so far; None is the beginning.

    Args:
        total: What `merge` gave before.
        new: What `measure` or `measure_features` gave. Results of `pmap`, `vmap` or a scan, with a
            leading axis in every leaf, are merged over it.

    Returns:
        NumPy arrays, int64 and float64; a dict of them if `new` is one.

    Raises:
        ValueError: Measures of another feature.
    """
    if isinstance(new, Mapping):
        return {
            **(total or {}),
            **{name: merge((total or {}).get(name), part) for name, part in new.items()},
        }
    leading = np.ndim(new.images)
    fields = {}
    for name, leaf in new._asdict().items():
        part = np.asarray(leaf)
        part = part.astype(np.float64 if part.dtype.kind == "f" else np.int64)
        add = np.minimum if name.endswith("_min") else np.add
        for _ in range(leading):
            part = add.reduce(part, axis=0)
        before = part if total is None else np.asarray(getattr(total, name))
        if before.shape != part.shape:
            raise ValueError(
                f"measures of {part.size} channels cannot be merged with those of {before.size}: "
                "keep a total for each feature"
            )
        fields[name] = part if total is None else add(before, part)
    return Measures(**fields)


@overload
def summarize(measures: Measures) -> Telemetry: ...


@overload
def summarize(measures: Mapping[str, Measures]) -> dict[str, Telemetry]: ...


def summarize(measures: Any) -> Any:
    """Densities, dead units and margins of all images merged, or of a single batch.

    Args:
        measures: What `merge` or `measure` gave, or a dict of such.

    Raises:
        ValueError: No images.
    """
    if isinstance(measures, Mapping):
        return {name: summarize(part) for name, part in measures.items()}
    m = merge(None, measures)
    if not m.images:
        raise ValueError("no images were measured")

    def mean(total: Any, count: Any) -> Float[np.ndarray, " c"]:
        return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)

    def least(values: Any) -> Float[np.ndarray, " c"]:
        return np.where(np.isposinf(values), np.nan, values)

    density = np.asarray(m.nonzero) / np.asarray(m.entries)
    return Telemetry(
        images=int(m.images),
        density=float(density.mean()),
        channel_density=density,
        dead=np.asarray(m.nonzero) == 0,
        cut_fraction=mean(m.cut_rows, m.rows),
        tied_fraction=mean(m.tied_rows, m.cut_rows),
        margin_mean=mean(m.margin_sum, m.cut_rows),
        margin_min=least(m.margin_min),
        relative_margin_mean=mean(m.relative_sum, m.cut_rows),
        relative_margin_min=least(m.relative_min),
    )


def site_inputs(
    network: nn.Module, variables: Mapping[str, Any], *arguments: Any, **options: Any
) -> dict[str, Array]:
    """What enters each `TopK` of a network in one forward pass: the features before Top-K.

    To be called within the compiled program; what it does not need is then not computed.

    Args:
        network: Any Linen module.
        variables: Its variables.
        *arguments: What the network is called with, such as a batch of images.
        **options: Further arguments of `network.apply`, such as `train=False` and `rngs`.

    Returns:
        Name of the site (the path of its module, where the network is not of this package) to its
        input, with earlier sites in force.
    """
    inputs: dict[str, Array] = {}

    def intercept(
        function: Any, arguments: Any, keywords: Any, context: nn.module.InterceptorContext
    ) -> Any:
        if isinstance(context.module, TopK) and context.method_name == "__call__":
            name = "/".join(context.module.path).removeprefix(SITE_PREFIX)
            inputs[name] = arguments[0]
        return function(*arguments, **keywords)

    with nn.intercept_methods(intercept):
        network.apply(variables, *arguments, **options)
    return inputs
