"""The threshold search in plain XLA: no sort, no gather, no scatter, no transpose.

Every row (the `n` positions of one `(b, c)`) keeps a bracket of keys `low <= threshold < high`
with `count(key >= low) >= k > count(key >= high)`. One pass over the data counts several thresholds
of every row at once, placed where interpolation expects the k-th key; the search ends when every
row has met a threshold with a count of exactly `k`, has closed its bracket on the k-th key itself,
or has the k-th key next to one end of the bracket. A last pass takes those keys from the data.
Where ties straddle the cut, the positions of the ties are packed into bits, which are walked once.

Counting is where the time goes. XLA:CPU emits a reduction over a major axis as one strided scalar
loop per output, so the counts are built from slices added elementwise (channels stay the vector
lanes), several counts packed into the bits of one integer, and a loop over the remaining rows.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri
from jaxtyping import Array, Bool, Float, Int

from topk_jax.kernels import keys as keys_lib
from topk_jax.kernels.keys import RankBy

# Slices added elementwise in one kernel; more than this stops vectorising, and 15 would be the
# most that four bits can count.
_SLICES = 14
# Entries that one round of the loop adds up.
_ENTRIES = 4
# Thresholds counted in one pass share an integer of the keys' width.
_THRESHOLDS = 4
# Positions that the first guess is made from.
_SAMPLE = 32
# Where thresholds are put, in standard deviations around the expected place.
_DEVIATIONS = (-1.4, -0.47, 0.47, 1.4)
# Steps, in doublings of the number, towards an end that nothing is known of. Where it says 0 the
# bracket is halved; for magnitudes the downward one is the key 1 instead, above which lies all that
# is not zero.
_UPWARDS = (0.12, 0.4, 1.2, 0.0)
_DOWNWARDS = (0.0, 1.2, 0.4, 0.12)
# Below this many channels the positions of many rows are laid side by side as vector lanes.
_MIN_LANES = 8

_Row = Int[Array, "b c"]
_Thresholds = Int[Array, "thresholds b c"]


class _Bracket(NamedTuple):
    """What is known of the threshold of each row; counts are of keys >= the bound."""

    low: _Row
    high: _Row
    count_low: _Row
    count_high: _Row


class _Carry(NamedTuple):
    bracket: _Bracket
    thresholds: _Thresholds
    zero: Int[Array, ""]


class _Ranked(NamedTuple):
    """What is searched: the keys of a range of positions, and their bounds.

    Attributes:
        keys: `keys(start, count, exact)` of as many positions; `start` may be traced. Unless
            `exact`, keys from the largest on may differ where they should be equal.
        shape: [b, n, c].
        dtype: Of the keys, int16 or int32.
        smallest: Least key there can be.
        largest: Greatest key there can be.
        doubling: How much greater the key of a number twice as large is.
    """

    keys: Callable[..., Int[Array, "b rows c"]]
    shape: tuple[int, int, int]
    dtype: jnp.dtype
    smallest: int
    largest: int
    doubling: int


def search(
    x: Float[Array, "b n c"], k: Int[Array, ""], rank_by: RankBy
) -> tuple[Int[Array, "b c"], Int[Array, "b c"]]:
    """Threshold and cut of every `(b, c)`, as `topk_jax.kernels` defines them."""
    b, n, c = x.shape
    if c < _MIN_LANES and b > 1:
        rows_last = jnp.moveaxis(x, 1, 0).reshape(1, n, b * c)
        threshold, cut = search(rows_last, k, rank_by)
        return threshold.reshape(b, c), cut.reshape(b, c)
    smallest, largest = keys_lib.bounds(x.dtype, rank_by)
    if x.dtype.itemsize == 2:
        # Made once: XLA:CPU widens slices of 16-bit floats, and would do so in every pass.
        stored = keys_lib.keys(x, rank_by).astype(jnp.int16)

        def keys(start: Array | int, count: int, exact: bool = True) -> Int[Array, "b rows c"]:
            return jax.lax.dynamic_slice_in_dim(stored, start, count, axis=1)
    else:

        def keys(start: Array | int, count: int, exact: bool = True) -> Int[Array, "b rows c"]:
            rows = jax.lax.dynamic_slice_in_dim(x, start, count, axis=1)
            return keys_lib.keys(rows, rank_by, equal_nans=exact)

    dtype = jnp.int16 if x.dtype.itemsize == 2 else jnp.int32
    doubling = 1 << jnp.finfo(x.dtype).nmant
    ranked = _Ranked(keys, (b, n, c), dtype, smallest, largest, doubling)
    found = _search(ranked, k, _first_thresholds(x, k, rank_by))
    whole = jnp.full((b, c), n, jnp.int32)
    cut = jax.lax.cond(jnp.any(found.count_low != k), lambda: _cut(ranked, found, k), lambda: whole)
    return found.low, cut


def _cut(ranked: _Ranked, found: _Bracket, k: Int[Array, ""]) -> _Row:
    """Position from which on keys equal to the threshold are one too many.

    One pass packs the tie flags of `_SLICES` neighbouring positions into an integer; a loop over
    these finds the one in which the first tie lies that is not kept, and its bits are searched.
    """
    b, n, c = ranked.shape
    whole = n // _SLICES
    bound = found.low.astype(ranked.dtype)[:, None, :]

    def pack(key: Int[Array, "b blocks r c"]) -> Int[Array, "b blocks c"]:
        flags = jnp.zeros((), ranked.dtype)
        for r in range(key.shape[2]):
            bit = jnp.asarray(1 << r, ranked.dtype)
            flags = flags + jnp.where(key[:, :, r] == bound, bit, jnp.zeros((), ranked.dtype))
        return flags

    # Where only the count from the threshold on is known, it is k + 1: all ties are kept but one.
    but_last = found.count_low == k + 1
    kept = k - found.count_high
    none = jnp.zeros((b, c), jnp.int32)
    state = (none, none, none, jnp.full((b, c), n, jnp.int32))

    def walk(flags: Int[Array, "b c"], position: Array, state: tuple[_Row, ...]):
        before, bits, rank, block = state
        count = jax.lax.population_count(flags).astype(jnp.int32)
        here = jnp.where(but_last, count > 0, (before <= kept) & (kept < before + count))
        bits = jnp.where(here, flags.astype(jnp.int32), bits)
        rank = jnp.where(here, jnp.where(but_last, count - 1, kept - before), rank)
        return before + count, bits, rank, jnp.where(here, position, block)

    if whole:
        blocks = ranked.keys(0, whole * _SLICES).reshape(b, whole, _SLICES, c)
        packed = pack(blocks)

        def body(i: Array, state: tuple[_Row, ...]) -> tuple[_Row, ...]:
            flags = jax.lax.dynamic_index_in_dim(packed, i, axis=1, keepdims=False)
            return walk(flags, i * _SLICES, state)

        state = jax.lax.fori_loop(0, whole, body, state)
    if n % _SLICES:
        rest = ranked.keys(whole * _SLICES, n % _SLICES)[:, None]
        state = walk(pack(rest)[:, 0], jnp.int32(whole * _SLICES), state)
    _, bits, rank, block = state
    for step in (8, 4, 2, 1):
        count = jax.lax.population_count(bits & ((1 << step) - 1))
        beyond = rank >= count
        rank = jnp.where(beyond, rank - count, rank)
        bits = jnp.where(beyond, bits >> step, bits)
        block = jnp.where(beyond, block + step, block)
    return jnp.where(found.count_low == k, n, block)


def _search(ranked: _Ranked, k: Int[Array, ""], first: _Thresholds) -> _Bracket:
    """Brackets closed on the k-th largest key, or opened at a bound that has exactly `k` above it.

    `first` are the thresholds of the first pass, ascending. In the result `low` is the threshold,
    and `count_low` is `k` unless more keys than that are equal to it or above.
    """
    b, n, c = ranked.shape

    def full(value: int) -> _Row:
        return jnp.full((b, c), value, jnp.int32)

    def any_open(carry: _Carry) -> Bool[Array, ""]:
        beside = _last_above(carry.bracket, k) | _first_below(carry.bracket, k)
        return jnp.any(_open(carry.bracket, k) & ~beside)

    def narrow(carry: _Carry) -> _Carry:
        (low, high, count_low, count_high), thresholds, zero = carry
        before = _width(low, high)
        counts = _count(ranked, thresholds, zero)
        for threshold, count in zip(thresholds, counts, strict=True):
            enough = count >= k
            raises = enough & (threshold > low)
            low, count_low = jnp.where(raises, threshold, low), jnp.where(raises, count, count_low)
            lowers = ~enough & (threshold < high)
            high = jnp.where(lowers, threshold, high)
            count_high = jnp.where(lowers, count, count_high)
        bracket = _Bracket(low, high, count_low, count_high)
        stalled = _width(low, high) > 0.5 * before
        # Always zero, which the compiler cannot know. The data are sliced from there on: it would
        # otherwise take slices and keys out of the loop, as copies that every pass then reads.
        zero = jnp.minimum(count_low[0, 0], 0)
        return _Carry(bracket, _next_thresholds(ranked, bracket, k, stalled), zero)

    first = jnp.clip(first, ranked.smallest + 1, ranked.largest)
    start = _Bracket(full(ranked.smallest), full(ranked.largest + 1), full(n), full(0))
    carry = _Carry(start, first, jnp.int32(0))
    bracket = jax.lax.while_loop(any_open, narrow, carry).bracket
    finish = functools.partial(_finish, ranked, k)
    return jax.lax.cond(jnp.any(_open(bracket, k)), finish, lambda bracket: bracket, bracket)


def _finish(ranked: _Ranked, k: Int[Array, ""], bracket: _Bracket) -> _Bracket:
    """Closes the open rows, in which one of the two keys around the cut ends the bracket.

    Two keys close together would take many passes to part. Here the two greatest below `high`, or
    the two least from `low` on, are taken from the data: the threshold is the k-th key, and whether
    the next one equals it says if a tie is to be cut.
    """
    low, high, count_low, count_high = bracket
    below = _first_below(bracket, k)
    # The complement reverses the order: the least keys become the greatest.
    flip = jnp.where(below, -1, 0)
    bound = jnp.where(below, -low, high)
    zero = jnp.minimum(count_low[0, 0], 0)
    first, second = _two_greatest(ranked, flip, bound, zero)
    threshold = jnp.where(below, second, first) ^ flip
    # Of a tie one count is known: k + 1 from it on, or k - 1 beyond it. The other is a guess.
    tied = jnp.where(below, k + 1, k + 2)
    beyond = jnp.where(count_high == k - 1, k - 1, k - 2)
    closed = _Bracket(threshold, threshold + 1, jnp.where(first == second, tied, k), beyond)
    open_rows = _open(bracket, k)
    return jax.tree.map(lambda new, old: jnp.where(open_rows, new, old), closed, bracket)


def _two_greatest(
    ranked: _Ranked, flip: _Row, bound: _Row, zero: Int[Array, ""]
) -> tuple[_Row, _Row]:
    """The two greatest of `key ^ flip` below `bound`, row by row."""
    b, n, c = ranked.shape
    flip, bound = (row.astype(ranked.dtype)[:, None, :] for row in (flip, bound))
    least = jnp.asarray(jnp.iinfo(ranked.dtype).min, ranked.dtype)
    block = _block(n)
    first = second = least
    for i in range(-(-n // block)):
        start = min(i * block, n - block)
        value = ranked.keys(start + zero, block) ^ flip
        value = jnp.where(value < bound, value, least)
        if start != i * block:
            new = jnp.arange(start, start + block)[None, :, None] >= i * block
            value = jnp.where(new, value, least)
        second = jnp.maximum(second, jnp.minimum(first, value))
        first = jnp.maximum(first, value)

    def add(i: Array, greatest: tuple[Array, Array]) -> tuple[Array, Array]:
        a, b = greatest
        p, q = (jax.lax.dynamic_index_in_dim(v, i, 1, keepdims=False) for v in (first, second))
        return jnp.maximum(a, p), jnp.maximum(jnp.minimum(a, p), jnp.maximum(b, q))

    none = jnp.full((b, c), least, ranked.dtype)
    first, second = jax.lax.fori_loop(0, block, add, (none, none))
    return first.astype(jnp.int32), second.astype(jnp.int32)


def _block(n: int) -> int:
    """Length of the slices that a row is cut into, a multiple of what a round of a loop takes."""
    return min(n, _ENTRIES * -(-n // (_SLICES * _ENTRIES)))


def _width(low: _Row, high: _Row) -> Float[Array, "b c"]:
    """`high - low` as float32, also where the difference needs 32 bits."""
    return jax.lax.bitcast_convert_type(high - low, jnp.uint32).astype(jnp.float32)


def _open(bracket: _Bracket, k: Int[Array, ""]) -> Bool[Array, "b c"]:
    """Rows whose threshold is not known yet."""
    return (bracket.count_low != k) & (bracket.low + 1 < bracket.high)


def _last_above(bracket: _Bracket, k: Int[Array, ""]) -> Bool[Array, "b c"]:
    """Rows whose k-th key is the greatest in the bracket."""
    return bracket.count_high == k - 1


def _first_below(bracket: _Bracket, k: Int[Array, ""]) -> Bool[Array, "b c"]:
    """Rows whose (k+1)-th key is the least in the bracket."""
    return bracket.count_low == k + 1


def _next_thresholds(
    ranked: _Ranked, bracket: _Bracket, k: Int[Array, ""], stalled: Bool[Array, "b c"]
) -> _Thresholds:
    """Ascending thresholds inside every bracket, around where the k-th key is expected.

    Keys of `m` entries spread evenly over the bracket put the one wanted at a beta-distributed
    place; the thresholds are placed in units of its standard deviation. A bracket that the last
    pass did not halve is cut evenly, which bounds the number of passes for any data. Where no
    threshold was beyond the k-th key yet, steps of doubling length lead towards the open end.
    """
    low, high, count_low, count_high = bracket
    inside = (count_low - count_high).astype(jnp.float32) + 1
    centre = ((count_low - k).astype(jnp.float32) + 0.5) / inside
    spread = jnp.sqrt(jnp.maximum(centre * (1 - centre), 0) / inside)
    width = _width(low, high)
    few = width <= _THRESHOLDS + 1
    no_upper = high == ranked.largest + 1
    no_lower = low == ranked.smallest
    half = (width * 0.5).astype(jnp.int32)
    thresholds = []
    for j, deviations in enumerate(_DEVIATIONS):
        place = jnp.clip(centre + deviations * spread, 0, 1)
        place = jnp.where(stalled, (j + 1) / (_THRESHOLDS + 1), place)
        half_step = (width * place * 0.5).astype(jnp.int32)
        step = jnp.where(few, j + 1, 2 * half_step)
        threshold = low + step
        up, down = (int(steps[j] * ranked.doubling) for steps in (_UPWARDS, _DOWNWARDS))
        lowest = low + half if ranked.smallest < 0 else 1
        threshold = jnp.where(no_lower, high - down if down else lowest, threshold)
        threshold = jnp.where(no_upper, low + (up or half), threshold)
        thresholds.append(jnp.clip(threshold, low + 1, high - 1))
    return jnp.stack(thresholds)


def _first_thresholds(x: Float[Array, "b n c"], k: Int[Array, ""], rank_by: RankBy) -> _Thresholds:
    """Guesses from the mean magnitude of a sample, as if the data were normal, and the key 1.

    Behind a ReLU many rows have fewer than `k` positive entries: counting the keys >= 1 ends their
    search in the first pass.
    """
    b, n, c = x.shape
    sample = [x[:, i].astype(jnp.float32) for i in range(0, n, -(-n // _SAMPLE))]
    finite = [jnp.abs(jnp.where(jnp.isfinite(value), value, 0)) for value in sample]
    scale = sum(finite[1:], finite[0]) / len(sample)
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
    ranked: _Ranked, thresholds: _Thresholds, zero: Int[Array, ""]
) -> Int[Array, "thresholds b c"]:
    """Number of keys >= each threshold, row by row."""
    _, n, _ = ranked.shape
    bits = 8 * jnp.dtype(ranked.dtype).itemsize // _THRESHOLDS
    block = _block(n)
    bounds = thresholds.astype(ranked.dtype)[:, :, None, :]
    none = jnp.zeros((), ranked.dtype)
    counted = none
    for i in range(-(-n // block)):
        # The last slice is moved back to end with the row; what it repeats is not counted.
        start = min(i * block, n - block)
        key = ranked.keys(start + zero, block, exact=False)
        new = jnp.arange(start, start + block)[None, :, None] >= i * block
        for j in range(_THRESHOLDS):
            above = key >= bounds[j]
            above = above & new if start != i * block else above
            counted = counted + jnp.where(above, jnp.asarray(1 << (bits * j), ranked.dtype), none)
    return _sum_fields(counted, bits)


def _sum_fields(packed: Int[Array, "b block c"], bits: int) -> Int[Array, "fields b c"]:
    """Sum of each field of `bits` bits of the entries over the middle axis.

    A loop, because XLA fuses what makes `packed` into a reduction, once for every field. A round
    takes several entries, because it is the rounds that cost.
    """
    b, block, c = packed.shape
    entries = min(_ENTRIES, block)
    shifts = jnp.arange(_THRESHOLDS, dtype=jnp.int32)[:, None, None] * bits

    def add(i: Array, sums: Int[Array, "fields b c"]) -> Int[Array, "fields b c"]:
        for r in range(entries):
            entry = jax.lax.dynamic_index_in_dim(packed, entries * i + r, axis=1, keepdims=False)
            sums += (entry.astype(jnp.int32)[None] >> shifts) & ((1 << bits) - 1)
        return sums

    zeros = jnp.zeros((_THRESHOLDS, b, c), jnp.int32)
    return jax.lax.fori_loop(0, block // entries, add, zeros)
