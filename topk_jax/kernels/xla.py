"""The mask by a threshold search in plain XLA: no sort, no gather, no scatter, no transpose.

Every row (the `n` positions of one `(b, c)`) keeps a bracket of keys `low <= threshold < high`
with `count(key >= low) >= k > count(key >= high)`. One pass over the data counts four thresholds
of every row at once, placed where interpolation expects the k-th key; the search ends when every
row has met a threshold with a count of exactly `k`, or has closed its bracket on the k-th key
itself. In the second case ties straddle the cut, and the same search over positions finds where
to cut them.

Counting is where the time goes. XLA:CPU emits a reduction over a major axis as one strided scalar
loop per output, so the counts are built from slices added elementwise (channels stay the vector
lanes), four counts packed into the bytes of an int32, and a loop over the remaining rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri
from jaxtyping import Array, Bool, Float, Int

from topk_jax.kernels import keys as keys_lib
from topk_jax.kernels.keys import RankBy

# Slices added elementwise in one kernel; more than this stops vectorising.
_SLICES = 14
# The search among ties is the rarer one; fewer slices compile faster.
_TIE_SLICES = 4
# Thresholds counted in one pass: their counts share an int32, eight bits each.
_THRESHOLDS = 4
# Below this many channels the positions of many rows are laid side by side as vector lanes.
_MIN_LANES = 8
# Rows up to this length have a 16-bit key and the position together in 31 bits.
_MAX_COMPOSITE = 1 << 16

_Key = Int[Array, "b n c"]
_Row = Int[Array, "b c"]
_Thresholds = Int[Array, "thresholds b c"]
# Keys of the positions `start <= position < stop` of every row.
_KeysOf = Callable[[int, int], _Key]


class _Bracket(NamedTuple):
    """What is known of the threshold of each row; counts are of keys >= the bound."""

    low: _Row
    high: _Row
    count_low: _Row
    count_high: _Row


def mask(x: Float[Array, "b n c"], k: Int[Array, ""], rank_by: RankBy) -> Bool[Array, "b n c"]:
    """True at the `k` positions of largest rank of every `(b, c)`; ties to the lowest position."""
    b, n, c = x.shape
    if c < _MIN_LANES and b > 1:
        rows_last = jnp.moveaxis(x, 1, 0).reshape(1, n, b * c)
        return jnp.moveaxis(mask(rows_last, k, rank_by).reshape(n, b, c), 0, 1)
    if x.dtype.itemsize == 2 and n <= _MAX_COMPOSITE:
        return _mask_composite(x, k, rank_by)
    return _mask_plain(x, k, rank_by)


def _mask_composite(
    x: Float[Array, "b n c"], k: Int[Array, ""], rank_by: RankBy
) -> Bool[Array, "b n c"]:
    """16-bit keys with the position below them: no two are equal, so there is no tie to cut."""
    b, n, c = x.shape

    def keys_of(start: int, stop: int) -> _Key:
        position = jnp.arange(start, stop, dtype=jnp.int32)[None, :, None]
        high_bits = keys_lib.keys(x[:, start:stop], rank_by) << 16
        return high_bits | (_MAX_COMPOSITE - 1 - position)

    smallest, largest = keys_lib.bounds(x.dtype, rank_by)
    found = _search(
        keys_of,
        (b, n, c),
        k,
        smallest << 16,
        (largest << 16) | (_MAX_COMPOSITE - 1),
        _first_thresholds(x, k, rank_by) << 16,
    )
    return keys_of(0, n) >= found.low[:, None, :]


def _mask_plain(
    x: Float[Array, "b n c"], k: Int[Array, ""], rank_by: RankBy
) -> Bool[Array, "b n c"]:
    """Keys of any width; ties at the threshold are cut by a second search over positions."""
    b, n, c = x.shape

    def keys_of(start: int, stop: int) -> _Key:
        return keys_lib.keys(x[:, start:stop], rank_by)

    smallest, largest = keys_lib.bounds(x.dtype, rank_by)
    first = _first_thresholds(x, k, rank_by)
    found = _search(keys_of, (b, n, c), k, smallest, largest, first)
    threshold = found.low[:, None, :]

    def cut_ties() -> Bool[Array, "b n c"]:
        # Among keys equal to the threshold the first ones stay: rank them by -position. Keys above
        # it rank above every tie, so the same k applies.
        def order_of(start: int, stop: int) -> _Key:
            key = keys_of(start, stop)
            position = jnp.arange(start, stop, dtype=jnp.int32)[None, :, None]
            tied = jnp.where(key == threshold, n - position, 0)
            return jnp.where(key > threshold, n + 1, tied)

        first = jnp.broadcast_to(
            jnp.asarray([n * (j + 1) // (_THRESHOLDS + 1) for j in range(_THRESHOLDS)], jnp.int32)[
                :, None, None
            ],
            (_THRESHOLDS, b, c),
        )
        cut = _search(order_of, (b, n, c), k, 0, n + 1, first, _TIE_SLICES)
        return order_of(0, n) >= cut.low[:, None, :]

    return jax.lax.cond(jnp.any(found.count_low != k), cut_ties, lambda: keys_of(0, n) >= threshold)


def _search(
    keys_of: _KeysOf,
    shape: tuple[int, int, int],
    k: Int[Array, ""],
    smallest: int,
    largest: int,
    first: _Thresholds,
    slices: int = _SLICES,
) -> _Bracket:
    """Brackets closed on the k-th largest key, or opened at a bound that has exactly `k` above it.

    `first` are the thresholds of the first pass, ascending. In the result `low` is the threshold.
    """
    b, n, c = shape

    def full(value: int) -> _Row:
        return jnp.full((b, c), value, jnp.int32)

    def any_open(carry: tuple[_Bracket, _Thresholds]) -> Bool[Array, ""]:
        bracket, _ = carry
        return jnp.any((bracket.count_low != k) & (bracket.low + 1 < bracket.high))

    def narrow(carry: tuple[_Bracket, _Thresholds]) -> tuple[_Bracket, _Thresholds]:
        (low, high, count_low, count_high), thresholds = carry
        before = _width(low, high)
        counts = _count(keys_of, n, thresholds, slices)
        for threshold, count in zip(thresholds, counts, strict=True):
            enough = count >= k
            raises = enough & (threshold > low)
            low, count_low = jnp.where(raises, threshold, low), jnp.where(raises, count, count_low)
            lowers = ~enough & (threshold < high)
            high = jnp.where(lowers, threshold, high)
            count_high = jnp.where(lowers, count, count_high)
        bracket = _Bracket(low, high, count_low, count_high)
        stalled = _width(low, high) > 0.5 * before
        return bracket, _next_thresholds(bracket, k, stalled)

    start = _Bracket(full(smallest), full(largest + 1), full(n), full(0))
    first = jnp.clip(first, smallest + 1, largest)
    bracket, _ = jax.lax.while_loop(any_open, narrow, (start, first))
    return bracket


def _width(low: _Row, high: _Row) -> Float[Array, "b c"]:
    """`high - low` as float32, also where the difference needs 32 bits."""
    return jax.lax.bitcast_convert_type(high - low, jnp.uint32).astype(jnp.float32)


def _next_thresholds(
    bracket: _Bracket, k: Int[Array, ""], stalled: Bool[Array, "b c"]
) -> _Thresholds:
    """Four ascending thresholds inside every bracket, around where the k-th key is expected.

    Keys of `m` entries spread evenly over the bracket put the one wanted at a beta-distributed
    place; the thresholds are placed in units of its standard deviation. A bracket that the last
    pass did not halve is cut evenly, which bounds the number of passes for any data.
    """
    low, high, count_low, count_high = bracket
    inside = (count_low - count_high).astype(jnp.float32) + 1
    centre = ((count_low - k).astype(jnp.float32) + 0.5) / inside
    spread = jnp.sqrt(jnp.maximum(centre * (1 - centre), 0) / inside)
    width = _width(low, high)
    few = width <= _THRESHOLDS + 1
    thresholds = []
    for j, deviations in enumerate((-1.4, -0.47, 0.47, 1.4)):
        place = jnp.clip(centre + deviations * spread, 0, 1)
        place = jnp.where(stalled, (j + 1) / (_THRESHOLDS + 1), place)
        half_step = (width * place * 0.5).astype(jnp.int32)
        step = jnp.where(few, j + 1, 2 * half_step)
        thresholds.append(jnp.clip(low + step, low + 1, high - 1))
    return jnp.stack(thresholds)


def _first_thresholds(x: Float[Array, "b n c"], k: Int[Array, ""], rank_by: RankBy) -> _Thresholds:
    """Guesses from the mean magnitude of a sample, as if the data were normal, and the key 1.

    Behind a ReLU many rows have fewer than `k` positive entries: counting the keys >= 1 ends their
    search in the first pass.
    """
    b, n, c = x.shape
    sample = x[:, :: max(1, n // 64)].astype(jnp.float32)
    scale = jnp.mean(jnp.abs(jnp.where(jnp.isfinite(sample), sample, 0)), axis=1)
    fraction = k.astype(jnp.float32) * ((1 if rank_by == "magnitude" else 2) / n)
    # Quantiles of |z|, z normal, relative to its mean sqrt(2 / pi).
    guesses = [
        scale * ndtri(1 - jnp.minimum(fraction * factor, 0.98) / 2) * (jnp.pi / 2) ** 0.5
        for factor in (1.6, 1.0, 0.6)
    ]
    return jnp.stack(
        [
            jnp.ones((b, c), jnp.int32),
            *(keys_lib.keys(guess.astype(x.dtype), rank_by) for guess in guesses),
        ]
    )


def _count(
    keys_of: _KeysOf, n: int, thresholds: _Thresholds, slices: int
) -> Int[Array, "thresholds b c"]:
    """Number of keys >= each threshold, row by row."""
    block = -(-n // min(slices, -(-n // 8)))
    counted = None
    for i in range(-(-n // block)):
        # The last slice is moved back to end with the row; what it repeats is not counted.
        start = min(i * block, n - block)
        key = keys_of(start, start + block)
        new = jnp.arange(start, start + block, dtype=jnp.int32)[None, :, None] >= i * block
        flags = jnp.zeros((), jnp.int32)
        for j, threshold in enumerate(thresholds):
            above = key >= threshold[:, None, :]
            above = above & new if start != i * block else above
            flags = flags + jnp.where(above, 1 << (8 * j), 0)
        counted = flags if counted is None else counted + flags
    assert counted is not None
    return _sum_bytes(counted, n)


def _sum_bytes(packed: Int[Array, "b block c"], most: int) -> Int[Array, "4 b c"]:
    """Sum of each of the four bytes of int32 entries over the middle axis; sums are <= `most`.

    A loop, because XLA fuses what makes `packed` into a reduction, once for every byte.
    """
    b, block, c = packed.shape
    pair = 0x00FF00FF
    zero = jnp.zeros((b, c), jnp.int32)

    def take(i: Array) -> Int[Array, "b c"]:
        return jax.lax.dynamic_index_in_dim(packed, i, axis=1, keepdims=False)

    if most <= 0xFFFF:

        def add_pairs(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            entry = take(i)
            return sums[0] + (entry & pair), sums[1] + ((entry >> 8) & pair)

        even, odd = jax.lax.fori_loop(0, block, add_pairs, (zero, zero))
        halves = (even & 0xFFFF, odd & 0xFFFF, (even >> 16) & 0xFFFF, (odd >> 16) & 0xFFFF)
        return jnp.stack(halves)

    def add(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        entry = take(i)
        return tuple(sums[j] + ((entry >> (8 * j)) & 0xFF) for j in range(_THRESHOLDS))

    return jnp.stack(jax.lax.fori_loop(0, block, add, (zero,) * _THRESHOLDS))
