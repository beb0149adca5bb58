"""The threshold search as one Pallas kernel for GPUs, lowered through Triton.

A program reads some rows once, keeps them in registers for the whole search, and writes the result
once. There are two layouts: contiguous rows (`c == 1`), one or a few a program; and blocks of
channels of one image, in which threads lie along channels first, so that memory is read in pieces
as long as the block is wide.

In registers an entry is one int32 from which its bits can be had back, in an order in which one
comparison with a bound tells whether an entry ranks at or above a threshold. For 32-bit numbers
these are their keys with the sign below; ties at the threshold are cut by a second search, over
positions. For 16-bit numbers the position stands below the key, so that there are no ties.

The search is that of `topk_jax.kernels.xla` with two thresholds a round: the first are guessed from
the mean of the positive entries, later ones placed where interpolation expects the k-th key. It
ends as soon as no row of the program is open. On a chip a round costs little beside reading memory.

jax 0.12 warns that Pallas's Triton back end will be removed; the XLA form needs no Pallas.

Run so far: in interpret mode, equal bit for bit to the XLA form; lowered for CUDA with jax 0.10 and
0.12, and that code compiled for compute capability 9.0 by Triton and ptxas. Not run, and not
timed, on any GPU.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int

from topk_jax.kernels import keys as keys_lib
from topk_jax.kernels.keys import RankBy

# Entries that a program may hold: three quarters of the registers of a multiprocessor, and half as
# many, so that one program computes while another waits for memory.
_MOST_ENTRIES = 51_200
_ENTRIES = 26_624
# Channels in a block: as many bytes as memory is read in, and at least a quarter of that.
_MOST_CHANNELS = 64
_LEAST_CHANNELS = 8
# Entries that one thread reads at once.
_VECTOR = 4
_WARP = 32
# A row of more positions has a program of its own.
_SHORT = 1024

# Thresholds of a round, in standard deviations around the expected place.
_DEVIATIONS = (-0.6, 0.6)
# The same where one end of the bracket is open, and what the distance to the expected place is
# multiplied by, since how the entries are distributed is only guessed.
_OPEN_DEVIATIONS = (-0.5, 1.0)
_OPEN_FACTORS = (0.8, 1.5)
# After this many rounds an end that is still open is approached by cutting the bracket evenly.
_PATIENCE = 6
_POSITION_BITS = 15
_SIGN = np.int32(-(2**31))

_Row = Int[Array, " rows"]
_Tile = Int[Array, "_ _"]


class _Order(NamedTuple):
    """Ordinals: integers in the order that entries are searched in.

    Attributes:
        dtype: Of the entries.
        rank_by: What their keys are.
        cell: How many ordinals share a key: the positions, for 16-bit numbers.
    """

    dtype: jnp.dtype
    rank_by: RankBy
    cell: int

    @property
    def smallest(self) -> int:
        return keys_lib.bounds(self.dtype, self.rank_by)[0] * self.cell

    @property
    def largest(self) -> int:
        return (keys_lib.bounds(self.dtype, self.rank_by)[1] + 1) * self.cell - 1

    @property
    def nan(self) -> int:
        """Least ordinal of a NaN."""
        return keys_lib.bounds(self.dtype, self.rank_by)[1] * self.cell

    @property
    def doubling(self) -> int:
        """How much greater the ordinal of a number twice as large is."""
        return (1 << jnp.finfo(self.dtype).nmant) * self.cell

    def of(self, value: Float[Array, " rows"]) -> _Row:
        """Least ordinal of a number."""
        return keys_lib.keys(value.astype(self.dtype), self.rank_by) * self.cell

    def encode(self, x: Float[Array, "_ _"], position: _Tile) -> _Tile:
        """What is kept in registers of every entry: its ordinal, and its sign below."""
        if self.cell > 1:
            ordinal = self.cell - 1 - position + keys_lib.keys(x, self.rank_by) * self.cell
            bits = jax.lax.bitcast_convert_type(x, jnp.int16)
            return (ordinal << 1) | (bits < 0).astype(jnp.int32)
        bits = jax.lax.bitcast_convert_type(x, jnp.int32)
        if self.rank_by == "magnitude":
            return ((bits << 1) | jax.lax.shift_right_logical(bits, 31)) ^ _SIGN
        return (bits ^ ((bits >> 31) & ~_SIGN)) - self._shift

    def bound(self, ordinal: _Row) -> _Row:
        """Entries whose code is at least this have at least this ordinal."""
        if self.cell > 1:
            return ordinal << 1
        if self.rank_by == "magnitude":
            return (ordinal << 1) ^ _SIGN
        # -0 lies below +0 and ranks with it.
        return ordinal - (ordinal <= 0).astype(jnp.int32) - self._shift

    def decode(self, code: _Tile) -> Float[Array, "_ _"]:
        """The entries, bit for bit. NaNs of 16 bits have lost their payload."""
        if self.cell > 1:
            magnitude = code >> (_POSITION_BITS + 1)
            if self.rank_by == "value":
                magnitude = jnp.abs(magnitude)
            bits = (magnitude | ((code & 1) << 15)).astype(jnp.int16)
        elif self.rank_by == "magnitude":
            code = code ^ _SIGN
            bits = jax.lax.shift_right_logical(code, 1) | (code << 31)
        else:
            code = code + self._shift
            bits = code ^ ((code >> 31) & ~_SIGN)
        return jax.lax.bitcast_convert_type(bits, self.dtype)

    @property
    def _shift(self) -> int:
        """Moves the negative NaNs, the least of all, round the end, to the positive ones."""
        largest = keys_lib.bounds(self.dtype, self.rank_by)[1]
        return 2**31 - largest


class _Bracket(NamedTuple):
    """What is known of the threshold of each row; counts are of ordinals >= the bound."""

    low: _Row
    high: _Row
    count_low: _Row
    count_high: _Row


def _open(bracket: _Bracket, k: Array) -> Bool[Array, " rows"]:
    """Rows whose threshold is not known yet."""
    return (bracket.count_low != k) & (bracket.low + 1 < bracket.high)


def _narrow(bracket: _Bracket, thresholds: Sequence[_Row], counts: Sequence[_Row], k: Array):
    """The bracket between those thresholds that have `k` entries at or above, and the others."""
    low, high, count_low, count_high = bracket
    for threshold, count in zip(thresholds, counts, strict=True):
        enough = count >= k
        raises = enough & (threshold > low)
        low, count_low = jnp.where(raises, threshold, low), jnp.where(raises, count, count_low)
        lowers = ~enough & (threshold < high)
        high, count_high = jnp.where(lowers, threshold, high), jnp.where(lowers, count, count_high)
    return _Bracket(low, high, count_low, count_high)


def _width(bracket: _Bracket) -> Float[Array, " rows"]:
    """`high - low` as float32, also where the difference needs 32 bits."""
    difference = bracket.high - bracket.low
    return jax.lax.convert_element_type(difference.astype(jnp.uint32), jnp.float32)


def _inside(bracket: _Bracket, k: Array, stalled: Bool[Array, " rows"]) -> list[_Row]:
    """Ascending thresholds inside every bracket, around where the k-th entry is expected.

    Entries spread evenly over the bracket put the one wanted at a beta-distributed place. A bracket
    that the last round did not halve is cut evenly, which bounds the rounds for any data.
    """
    low, _, count_low, count_high = bracket
    inside = (count_low - count_high).astype(jnp.float32) + 1
    centre = ((count_low - k).astype(jnp.float32) + 0.5) / inside
    spread = jnp.sqrt(jnp.maximum(centre * (1 - centre), 0) / inside)
    width = _width(bracket)
    thresholds = []
    for j, deviations in enumerate(_DEVIATIONS):
        place = jnp.minimum(jnp.maximum(centre + deviations * spread, 0), 1)
        place = jnp.where(stalled, (j + 1) / (len(_DEVIATIONS) + 1), place)
        half_step = (width * place * 0.5).astype(jnp.int32)
        few = width <= len(_DEVIATIONS) + 1
        thresholds.append(low + jnp.where(few, j + 1, 2 * half_step))
    return thresholds


class _Guess(NamedTuple):
    """What is expected of a row, as if it were normal numbers.

    Attributes:
        thresholds: Of the first round.
        step: By how many ordinals a threshold rises where one part in e of the entries above it is
            to remain.
    """

    thresholds: tuple[_Row, _Row]
    step: Float[Array, " rows"]


def _guess(
    order: _Order,
    total: Float[Array, " rows"],
    positive: Float[Array, " rows"],
    above: _Row,
    k: Int[Array, ""],
    n: int,
) -> _Guess:
    """First thresholds from the sums of `|x|` and of `max(x, 0)` and the number of keys above 0.

    Where the k-th entry is positive, the positive ones are taken for the positive half of normal
    numbers; the tail that a ReLU leaves is between a normal and an exponential one.
    """
    mean, among, wanted = total, above, jnp.zeros_like(above) + k
    negative = above < k
    if order.rank_by == "value":
        mean = jnp.where(negative, total - positive, positive)
        among, wanted = jnp.where(negative, n - above, above), jnp.where(negative, n - k, k)
    among = jnp.maximum(among, 1).astype(jnp.float32)
    wanted = jnp.maximum(wanted, 1).astype(jnp.float32)
    part = jnp.minimum(wanted / among, 1 - 0.5 / among)
    # Upper quantile of |z|, z normal: approximation 26.2.22 of Abramowitz and Stegun, and its
    # tangent at 0.
    log = -jnp.log(part)
    t = jnp.sqrt(2 * (log + math.log(2)))
    quantile = t - (2.30753 + 0.27061 * t) / (1 + (0.99229 + 0.04481 * t) * t)
    tangent = math.sqrt(math.pi / 2) * (1 - part)
    guess = math.sqrt(math.pi / 2) * mean / among * jnp.maximum(quantile, tangent)
    # By how much the logarithm of that tail falls with the logarithm of the number; fitted.
    slope = jnp.where(part > 0.55, (1 - part) / part, 1.69 * log - 0.45)
    deviation = 1 / (jnp.sqrt(wanted) * slope)
    thresholds = tuple(order.of(guess * (1 + sign * deviation)) for sign in (-1, 1))
    if order.rank_by == "value":
        below = (order.of(-guess), jnp.zeros_like(above))
        thresholds = tuple(map(functools.partial(jnp.where, negative), below, thresholds))
    lower, upper = thresholds
    return _Guess((lower, upper), order.doubling / math.log(2) / slope)


def _outside(
    order: _Order, bracket: _Bracket, k: Int[Array, ""], n: int, step: Float[Array, " rows"]
) -> tuple[list[_Row], Bool[Array, " rows"]]:
    """Ascending thresholds for brackets with an open end, and which rows have one.

    An end is open while no threshold was beyond the k-th entry on its side: it is too far off to
    interpolate. The thresholds are at the distance from the other end that the tail makes likely.
    """
    low, high, count_low, count_high = bracket
    upward = high >= order.nan
    downward = (low == order.smallest) | (low == order.cell)
    count, wanted = jnp.where(upward, count_low, count_high), k
    if order.rank_by == "value":
        negative = high <= 0
        upward = upward | (high == 0)
        count = jnp.where(upward, count_low, count_high)
        count, wanted = jnp.where(negative, n - count, count), jnp.where(negative, n - k, k)
    count, wanted = count.astype(jnp.float32), jnp.zeros_like(step) + wanted.astype(jnp.float32)
    distance = jnp.abs(count - wanted)
    # Nearly the difference of the logarithms.
    expected = 2 * distance / (count + wanted)
    deviation = jnp.sqrt(distance + 1) / jnp.maximum(wanted, 1)
    steps = []
    for factor, deviations in zip(_OPEN_FACTORS, _OPEN_DEVIATIONS, strict=True):
        size = step * (factor * expected + deviations * deviation)
        size = jnp.minimum(jnp.maximum(size, order.cell), 0.5 * _width(bracket))
        steps.append(size.astype(jnp.int32))
    near, far = steps
    thresholds = [
        jnp.where(upward, low + near, high - far),
        jnp.where(upward, low + far, high - near),
    ]
    return thresholds, upward | downward


def _whole_keys(order: _Order, bracket: _Bracket, thresholds: Sequence[_Row]) -> list[_Row]:
    """Thresholds strictly inside the bracket, at the least ordinal of a key where there is one.

    So positions are searched only within a key of which some entries are kept and others are not.
    """
    low, high = bracket.low, bracket.high
    result = []
    for threshold in thresholds:
        threshold = jnp.minimum(jnp.maximum(threshold, low + 1), high - 1)
        if order.cell > 1:
            whole = (threshold + order.cell // 2) & -order.cell
            whole = jnp.where(whole <= low, whole + order.cell, whole)
            whole = jnp.where(whole >= high, whole - order.cell, whole)
            if result:
                whole = jnp.where(whole == result[0], whole + order.cell, whole)
            threshold = jnp.where((whole > low) & (whole < high), whole, threshold)
        result.append(threshold)
    return result


def _find(
    order: _Order,
    count: Callable[[Sequence[_Row]], list[_Row]],
    total: Float[Array, " rows"],
    positive: Float[Array, " rows"],
    k: Int[Array, ""],
    n: int,
) -> tuple[_Bracket, _Row]:
    """Brackets of ordinals closed on the k-th entry, or opened at a bound with `k` above it.

    `count` gives the number of ordinals >= each of some thresholds. In the result `low` is the
    threshold, and `count_low` is `k` unless more keys than that are equal to it or above. The
    second result is the number of NaNs.
    """
    none = jnp.zeros(total.shape, jnp.int32)
    start = _Bracket(none + order.smallest, none + (order.largest + 1), none + n, none)
    landmarks = [none + order.cell, none + order.nan]
    counts = count(landmarks)
    bracket = _narrow(start, landmarks, counts, k)
    guess = _guess(order, total, positive, counts[0], k, n)
    first = _whole_keys(order, bracket, guess.thresholds)

    def any_open(carry: tuple[_Bracket, list[_Row], Array]) -> Bool[Array, ""]:
        return jnp.max(_open(carry[0], k).astype(jnp.int32)) > 0

    def round_(carry: tuple[_Bracket, list[_Row], Array]) -> tuple[_Bracket, list[_Row], Array]:
        before, thresholds, rounds = carry
        bracket = _narrow(before, thresholds, count(thresholds), k)
        outside, is_open = _outside(order, bracket, k, n, guess.step)
        is_open = is_open & (rounds < _PATIENCE)
        inside = _inside(bracket, k, 2 * _width(bracket) > _width(before))
        thresholds = [jnp.where(is_open, *pair) for pair in zip(outside, inside, strict=True)]
        return bracket, _whole_keys(order, bracket, thresholds), rounds + 1

    found, _, _ = jax.lax.while_loop(any_open, round_, (bracket, first, jnp.int32(0)))
    return found, counts[1]


def _find_cut(
    count: Callable[[Sequence[_Row]], list[_Row]], ties: _Row, wanted: _Row, n: int
) -> _Row:
    """Positions below which `wanted` of the `ties` of every row lie.

    `count` gives the number of ties below each of some positions. The search is in `n - position`,
    so that it is the same as that of thresholds.
    """
    none = jnp.zeros_like(ties)
    bracket = _Bracket(none, none + n, ties, none)

    def any_open(carry: tuple[_Bracket, Float[Array, " rows"]]) -> Bool[Array, ""]:
        return jnp.max(_open(carry[0], wanted).astype(jnp.int32)) > 0

    def round_(carry: tuple[_Bracket, Float[Array, " rows"]]):
        before, width = carry
        thresholds = _inside(before, wanted, 2 * _width(before) > width)
        low, high = before.low + 1, before.high - 1
        thresholds = [jnp.minimum(jnp.maximum(t, low), high) for t in thresholds]
        counts = count([n - threshold for threshold in thresholds])
        return _narrow(before, thresholds, counts, wanted), _width(before)

    found, _ = jax.lax.while_loop(any_open, round_, (bracket, _width(bracket) * 4))
    return n - found.low


class _Layout(NamedTuple):
    """How a tensor [batch, ., .] is cut into programs, and a program's entries into tiles.

    Attributes:
        axis: Of a tile, along which the positions lie; rows lie along the other one.
        rows: Rows of a program, a power of two.
        block: Positions of a tile, a power of two.
        tiles: Tiles of a program.
        warps: Of a program, which share its rows.
    """

    axis: Literal[0, 1]
    rows: int
    block: int
    tiles: int
    warps: int

    def across(self, row: Array) -> Array:
        """One value a row, to be combined with tiles."""
        return jnp.expand_dims(row, self.axis)

    def positions(self, tile: int) -> _Tile:
        shape = (self.block, self.rows) if self.axis == 0 else (self.rows, self.block)
        return tile * self.block + jax.lax.broadcasted_iota(jnp.int32, shape, self.axis)

    def part(self, ref: Any, tile: int) -> Any:
        """The part of a reference that is a tile."""
        positions, rows = pl.ds(tile * self.block, self.block), slice(None)
        return ref.at[(positions, rows) if self.axis == 0 else (rows, positions)]

    def sum(self, tiles: Sequence[Array]) -> Array:
        """Sums over the positions. Tiles are added first: only what is left crosses threads."""
        return jnp.sum(functools.reduce(jnp.add, tiles), axis=self.axis)


def _layout(shape: tuple[int, ...], dtype: jnp.dtype) -> _Layout | None:
    """The layout for `x` of shape [b, n, c], or None where a row does not fit on the chip."""
    b, n, c = shape
    if n < 2 or not b * c or not keys_lib.supported(dtype):
        return None
    if dtype.itemsize == 2 and n > 1 << _POSITION_BITS:
        return None
    if c == 1 and n <= _SHORT:
        # A warp has no need to wait for others.
        block = min(_power(n), _WARP * _VECTOR)
        tiles = -(-n // block)
        rows = max(1, _SHORT // (_power(tiles) * block))
        return _Layout(1, min(rows, _power(b)), block, tiles, 1)
    if c == 1:
        rows = 1
    else:
        rows = _power(c)
        most = _ENTRIES if n * _LEAST_CHANNELS <= _ENTRIES else _MOST_ENTRIES
        rows = min(rows, max(_LEAST_CHANNELS, min(_MOST_CHANNELS, _floor_power(most // n))))
    if rows * n > _MOST_ENTRIES:
        return None
    warps = min(16, max(2 if c == 1 else 4, _power(rows * n) // (64 * _WARP)))
    block = min(_power(n), max(1, warps * _WARP * _VECTOR // rows))
    return _Layout(1 if c == 1 else 0, rows, block, -(-n // block), warps)


def _power(number: int) -> int:
    """Least power of two not below."""
    return 1 << (number - 1).bit_length()


def _floor_power(number: int) -> int:
    """Greatest power of two not above; 1 for 0."""
    return 1 << max(number.bit_length() - 1, 0)


def supports(shape: tuple[int, ...], dtype: jnp.dtype) -> bool:
    """Whether rows of `x` of this shape [b, n, c] and dtype fit on the chip."""
    return _layout(shape, jnp.dtype(dtype)) is not None


def _kernel(
    layout: _Layout,
    order: _Order,
    shape: tuple[int, int],
    keep: Literal["top", "rest"],
    k_ref: Any,
    x_ref: Any,
    y_ref: Any,
    threshold_ref: Any,
    cut_ref: Any,
) -> None:
    """One program; `shape` is how many positions a row has, and how many rows there are."""
    n, total_rows = shape
    k = k_ref[0]
    row = pl.program_id(0) * layout.rows + jnp.arange(layout.rows, dtype=jnp.int32)
    exists = None if total_rows % layout.rows == 0 else row < total_rows
    across = layout.across

    def mask(tile: int) -> Bool[Array, "_ _"] | None:
        within = None if (tile + 1) * layout.block <= n else layout.positions(tile) < n
        if exists is None or within is None:
            return within if exists is None else across(exists)
        return within & across(exists)

    def read(tile: int) -> Float[Array, "_ _"]:
        inside = mask(tile)
        if inside is None:
            return plt.load(layout.part(x_ref, tile))
        zeros = jnp.zeros(layout.positions(tile).shape, order.dtype)
        inside = jnp.broadcast_to(inside, zeros.shape)
        return plt.load(layout.part(x_ref, tile), mask=inside, other=zeros)

    tiles = range(layout.tiles)
    entries = [read(tile) for tile in tiles]
    total = layout.sum([jnp.abs(x.astype(jnp.float32)) for x in entries])
    positive = total
    if order.rank_by == "value":
        positive = layout.sum([jnp.maximum(x.astype(jnp.float32), 0) for x in entries])
    codes = []
    for tile, x in enumerate(entries):
        code = order.encode(x, layout.positions(tile))
        # What is no position ranks below all thresholds that are ever counted.
        beyond = (tile + 1) * layout.block > n
        codes.append(jnp.where(layout.positions(tile) < n, code, _SIGN) if beyond else code)

    def count(thresholds: Sequence[_Row]) -> list[_Row]:
        low, high = (across(order.bound(threshold)) for threshold in thresholds)
        return _unpack(layout.sum([_pack(code >= low, code >= high) for code in codes]))

    found, nans = _find(order, count, total, positive, k, n)
    if order.cell > 1:
        threshold = found.low >> _POSITION_BITS
        cut = jnp.minimum(order.cell - (found.low & (order.cell - 1)), n)
    else:
        threshold = found.low
        cut = _cut(layout, order, codes, found, k, n)
    plt.store(threshold_ref.at[:], threshold, mask=exists)
    plt.store(cut_ref.at[:], cut, mask=exists)

    # Always 0, which the compiler does not know: else it would see that decoding gives what was
    # read, and hold that in registers too.
    zero = jnp.minimum(found.count_high, 0)
    low, above = across(order.bound(found.low) + zero), across(_last_equal(order, found.low))

    def write(entry: Callable[[int, _Tile], Float[Array, "_ _"]]) -> None:
        for tile, code in enumerate(codes):
            code = code + across(zero)
            kept = code >= low
            if order.cell == 1:
                kept = (code > above) | (kept & (layout.positions(tile) < across(cut)))
            x, nothing = entry(tile, code), jnp.zeros(code.shape, order.dtype)
            y = jnp.where(kept, x, nothing) if keep == "top" else jnp.where(kept, nothing, x)
            inside = mask(tile)
            inside = None if inside is None else jnp.broadcast_to(inside, code.shape)
            plt.store(layout.part(y_ref, tile), y, mask=inside)

    if order.cell == 1:
        write(lambda tile, code: order.decode(code))
        return
    any_nan = jnp.max(nans) > 0

    @pl.when(any_nan)
    def _() -> None:
        write(lambda tile, code: read(tile))

    @pl.when(~any_nan)
    def _() -> None:
        write(lambda tile, code: order.decode(code))


def _last_equal(order: _Order, threshold: _Row) -> _Row:
    """The greatest code of entries whose ordinal is the threshold."""
    last = order.bound(jnp.minimum(threshold, order.largest - 1) + 1) - 1
    return jnp.where(threshold == order.largest, ~_SIGN, last)


def _cut(
    layout: _Layout,
    order: _Order,
    codes: Sequence[_Tile],
    found: _Bracket,
    k: Int[Array, ""],
    n: int,
) -> _Row:
    """Position from which on keys equal to the threshold are one too many, or `n`."""
    tied = found.count_low != k
    first = order.bound(found.low)
    last = _last_equal(order, found.low)

    def count(cuts: Sequence[_Row]) -> list[_Row]:
        # Always 0, which the compiler does not know: else it would find the ties once and for all,
        # and hold them in registers beside the entries.
        zero = jnp.minimum(cuts[0], 0)
        low, high = layout.across(first + zero), layout.across(last + zero)
        packed = []
        for tile, code in enumerate(codes):
            equal = (code >= low) & (code <= high)
            position = layout.positions(tile)
            packed.append(_pack(*(equal & (position < layout.across(cut)) for cut in cuts)))
        return _unpack(layout.sum(packed))

    whole = jnp.zeros_like(found.low) + n

    def search() -> _Row:
        ties = jnp.where(tied, found.count_low - found.count_high, 0)
        cut = _find_cut(count, ties, jnp.where(tied, k - found.count_high, 0), n)
        return jnp.where(tied, cut, whole)

    return jax.lax.cond(jnp.max(tied.astype(jnp.int32)) > 0, search, lambda: whole)


def _pack(first: Bool[Array, "_ _"], second: Bool[Array, "_ _"]) -> _Tile:
    """Two flags in one integer, so that one sum counts both. Rows have less than 2^16 entries."""
    return jnp.where(first, jnp.int32(1), jnp.int32(0)) + jnp.where(
        second, jnp.int32(1 << 16), jnp.int32(0)
    )


def _unpack(counts: _Row) -> list[_Row]:
    return [counts & 0xFFFF, jax.lax.shift_right_logical(counts, jnp.zeros_like(counts) + 16)]


@functools.partial(jax.jit, static_argnames=("rank_by", "keep", "interpret"))
def select(
    x: Float[Array, "b n c"],
    k: Int[Array, ""] | int,
    rank_by: RankBy,
    keep: Literal["top", "rest"] = "top",
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "b n c"], Int[Array, "b c"], Int[Array, "b c"]]:
    """`x` where kept (or where not kept, for "rest") and +0 elsewhere, the thresholds and the cuts.

    As `topk_jax.kernels` defines them; the cut is `n` where all entries at the threshold are kept.

    Args:
        x: float32, bfloat16 or float16, of a shape that `supports` accepts.
        k: 1 <= k < n.
        rank_by: What entries are ranked by.
        keep: Whether the `k` entries of largest rank are kept, or the others.
        interpret: Runs without a GPU, slowly.

    Raises:
        ValueError: `supports` is False.
    """
    b, n, c = x.shape
    layout = _layout(x.shape, x.dtype)
    if layout is None:
        raise ValueError(f"x of shape {x.shape}, {x.dtype}: rows do not fit on a GPU's chip")
    contiguous = layout.axis == 1
    batch, rows = (1, b) if contiguous else (b, c)
    length = layout.tiles * layout.block
    tensor = pl.BlockSpec(
        (None, layout.rows, length) if contiguous else (None, length, layout.rows),
        (lambda j, i: (i, j, 0)) if contiguous else (lambda j, i: (i, 0, j)),
    )
    per_row = pl.BlockSpec((None, layout.rows), lambda j, i: (i, j))
    whole = x.reshape(1, b, n) if contiguous else x
    order = _Order(x.dtype, rank_by, 1 if x.dtype.itemsize == 4 else 1 << _POSITION_BITS)
    y, threshold, cut = pl.pallas_call(
        functools.partial(_kernel, layout, order, (n, rows), keep),
        grid=(-(-rows // layout.rows), batch),
        in_specs=[pl.BlockSpec((1,), lambda j, i: (0,)), tensor],
        out_specs=[tensor, per_row, per_row],
        out_shape=[
            jax.ShapeDtypeStruct(whole.shape, x.dtype),
            jax.ShapeDtypeStruct((batch, rows), jnp.int32),
            jax.ShapeDtypeStruct((batch, rows), jnp.int32),
        ],
        compiler_params=plt.CompilerParams(num_warps=layout.warps, num_stages=1),
        interpret=interpret,
        name=f"topk_{rank_by}_{keep}",
    )(jnp.asarray(k, jnp.int32).reshape(1), whole)
    return y.reshape(x.shape), threshold.reshape(b, c), cut.reshape(b, c)
