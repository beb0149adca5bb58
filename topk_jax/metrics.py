"""Numbers from tables of trials: shape bias, accuracy, intervals, and what to be warned of.

Data contract: anything with the columns of `topk_jax.decisions.Trials`, one row for each image
shown to one observer; trials of several observers are pooled. Fractions are in [0, 1], NaN where
there is nothing to divide by. NumPy only.

A cue-conflict image has the shape of one category and the texture of another. The shape bias of an
observer is S / (S + X): of the answers that name either cue, the part that names the shape (Geirhos
et al., ICLR 2019). The ratio says nothing about how often either is named: an observer who guesses
has a shape bias of one half. It is therefore never given here without its counts, the part of the
images on which either cue was named ("decided"), intervals, and warnings.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

Interval = tuple[float, float]

NO_ANSWER = "na"
"""What the tables hold where a person did not answer in time."""

DOMINANT = 0.25
"""Part of the answers above which a single response is warned of (of few categories: 2 / C)."""


class TrialsColumns(Protocol):
    """The columns that are read here, each [n] text, as `topk_jax.decisions.Trials` has them."""

    def __len__(self) -> int: ...
    @property
    def object_response(self) -> np.ndarray:
        """Category answered, or "na"."""
        ...

    @property
    def category(self) -> np.ndarray:
        """True category, of a cue-conflict image that of its shape."""
        ...


class CueConflictColumns(TrialsColumns, Protocol):
    """What tables of cue-conflict images have besides, read off the images' names."""

    @property
    def texture(self) -> np.ndarray:
        """Category of the texture."""
        ...

    @property
    def shape_exemplar(self) -> np.ndarray:
        """The picture that gave the shape; images that share it are not independent."""
        ...

    @property
    def image_key(self) -> np.ndarray:
        """Name of the image, alike for all observers."""
        ...


@dataclasses.dataclass(frozen=True)
class CategoryShapeBias:
    """Answers to the conflict images of one shape category; fields as in `ShapeBias`."""

    n_conflict: int
    n_shape: int
    n_texture: int
    n_other: int
    decided_fraction: float
    shape_bias: float


@dataclasses.dataclass(frozen=True)
class ShapeBias:
    """Shape bias of one observer, or of several pooled.

    The benchmark's own fractions of shape and texture decisions divide by all images: they are
    `n_shape / n_images` and `n_texture / n_images`.

    Attributes:
        n_images: number of trials; of people pooled, images times people.
        n_conflict: those whose shape and texture are of different categories.
        n_excluded: the others, left out of all numbers but the accuracies and the histogram.
        n_shape: S, conflict images answered with the category of the shape.
        n_texture: X, those answered with the category of the texture.
        n_other: those answered with any other category, or not at all.
        shape_fraction: S / n_conflict.
        texture_fraction: X / n_conflict.
        decided_fraction: (S + X) / n_conflict.
        decided_fraction_ci95: its Wilson interval.
        shape_bias: S / (S + X).
        shape_bias_ci95: its Wilson interval, which takes the trials for independent.
        shape_bias_ci95_bootstrap: interval of a bootstrap over the pictures that gave the shapes,
            since several images share each of them; NaN with fewer than two pictures.
        shape_bias_category_mean: mean over shape categories of their shape bias, without those in
            which nothing was decided.
        n_categories_decided: number of categories in that mean.
        accuracy: part of all images answered with the category of the shape.
        congruent_accuracy: the same of the excluded images.
        response_histogram: number of trials for each category in order, then "na", then answers
            that are no category.
        per_category: the counts for each shape category.
        warnings: reasons not to read the shape bias at face value, each one line.
    """

    n_images: int
    n_conflict: int
    n_excluded: int
    n_shape: int
    n_texture: int
    n_other: int
    shape_fraction: float
    texture_fraction: float
    decided_fraction: float
    decided_fraction_ci95: Interval
    shape_bias: float
    shape_bias_ci95: Interval
    shape_bias_ci95_bootstrap: Interval
    shape_bias_category_mean: float
    n_categories_decided: int
    accuracy: float
    congruent_accuracy: float
    response_histogram: dict[str, int]
    per_category: dict[str, CategoryShapeBias]
    warnings: tuple[str, ...]

    @property
    def chance_decided(self) -> float:
        """Decided fraction of guessing among the C categories: 2 / C."""
        return 2 / len(self.per_category)

    @property
    def at_chance(self) -> bool:
        """Whether the decided fraction is not above that of guessing: its interval reaches it."""
        return not self.decided_fraction_ci95[0] > self.chance_decided

    def as_dict(self) -> dict[str, Any]:
        """All fields as dicts, lists, numbers and text; NaN stays NaN."""
        fields = dataclasses.asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in fields.items()}


def shape_bias(
    trials: CueConflictColumns,
    *,
    categories: Sequence[str] | None = None,
    bootstrap: int = 2000,
    seed: int = 0,
) -> ShapeBias:
    """Shape bias of a table of cue-conflict trials.

    Args:
        trials: the table; trials of several observers are pooled.
        categories: what could be answered, in the order of the results; chance is reckoned from
            their number. None takes all shapes and textures of the table, in alphabetical order.
        bootstrap: number of resamples for `shape_bias_ci95_bootstrap`; 0 leaves it NaN.
        seed: of the resamples; the same seed gives the same interval.

    Returns:
        The counts, fractions, intervals and warnings.

    Raises:
        ValueError: no trials, or a shape or texture that is not among `categories`.
    """
    names = _categories(categories, trials.category, trials.texture)
    answer, shape, texture = trials.object_response, trials.category, trials.texture
    conflict = shape != texture
    by_shape = conflict & (answer == shape)
    by_texture = conflict & (answer == texture)

    per_category = {}
    for name in names:
        own = shape == name
        per_category[name] = _category_counts(own & conflict, own & by_shape, own & by_texture)
    biases = [row.shape_bias for row in per_category.values() if row.n_shape + row.n_texture]
    total = _category_counts(conflict, by_shape, by_texture)
    decided = total.n_shape + total.n_texture

    result = ShapeBias(
        n_images=len(answer),
        n_conflict=total.n_conflict,
        n_excluded=len(answer) - total.n_conflict,
        n_shape=total.n_shape,
        n_texture=total.n_texture,
        n_other=total.n_other,
        shape_fraction=_ratio(total.n_shape, total.n_conflict),
        texture_fraction=_ratio(total.n_texture, total.n_conflict),
        decided_fraction=total.decided_fraction,
        decided_fraction_ci95=wilson_interval(decided, total.n_conflict),
        shape_bias=total.shape_bias,
        shape_bias_ci95=wilson_interval(total.n_shape, decided),
        shape_bias_ci95_bootstrap=_clustered_interval(
            trials.shape_exemplar, by_shape, by_texture, bootstrap, seed
        ),
        shape_bias_category_mean=_ratio(math.fsum(biases), len(biases)),
        n_categories_decided=len(biases),
        accuracy=accuracy(trials),
        congruent_accuracy=_ratio(
            np.count_nonzero(~conflict & (answer == shape)), np.count_nonzero(~conflict)
        ),
        response_histogram=response_histogram(trials, categories=names),
        per_category=per_category,
        warnings=(),
    )
    return dataclasses.replace(result, warnings=tuple(_warnings(result)))


def accuracy(trials: TrialsColumns) -> float:
    """Part of the trials answered with the true category; "na" is wrong. NaN without trials."""
    return _ratio(np.count_nonzero(trials.object_response == trials.category), len(trials))


def response_histogram(
    trials: TrialsColumns, *, categories: Sequence[str] | None = None
) -> dict[str, int]:
    """How often each answer was given.

    Args:
        trials: the table.
        categories: what could be answered; None takes the true categories, in alphabetical order.

    Returns:
        A count for each category, in order and zero included, then for "na", then for answers that
        are neither. The counts sum to the number of trials.

    Raises:
        ValueError: no trials, or a true category that is not among `categories`.
    """
    names = _categories(categories, trials.category)
    answers, numbers = np.unique(trials.object_response, return_counts=True)
    counts = dict(zip(answers.tolist(), numbers.tolist(), strict=True))
    return {name: counts.get(name, 0) for name in (*names, NO_ANSWER)} | counts


def confusion(
    trials: TrialsColumns, *, categories: Sequence[str] | None = None
) -> Int[np.ndarray, "answers categories"]:
    """Counts of answers (rows) to images of each true category (columns).

    Arguments and errors are those of `response_histogram`.

    Returns:
        [1 + C, C]: the first row holds "na" and answers that are no category, then the categories
        in order. Divide by the sum over rows for the benchmark's percentages.
    """
    names = _categories(categories, trials.category)
    number = {name: column for column, name in enumerate(names)}
    counts = np.zeros((1 + len(names), len(names)), np.int64)
    rows = [1 + number.get(answer, -1) for answer in trials.object_response.tolist()]
    columns = [number[name] for name in trials.category.tolist()]
    np.add.at(counts, (rows, columns), 1)
    return counts


def rank_correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks.

    Args:
        a: Numbers [n].
        b: Numbers [n].

    Returns:
        From -1 to 1; NaN where all values of one side are equal, or one is NaN.

    Raises:
        ValueError: Different lengths, or fewer than two values.
    """
    ranks = []
    for values in (np.asarray(a, np.float64), np.asarray(b, np.float64)):
        if values.ndim != 1 or len(values) != np.size(a) or len(values) < 2:
            raise ValueError("expected two lists of the same length, of at least two numbers")
        if np.any(np.isnan(values)):
            return float("nan")
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        rank = (np.cumsum(count) - (count - 1) / 2)[place]
        ranks.append(rank - rank.mean())
    x, y = ranks
    return _ratio(float(x @ y), float(np.sqrt((x @ x) * (y @ y))))


def wilson_interval(k: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Interval of a probability after `k` successes in `n` independent trials.

    Source: Wilson, Journal of the American Statistical Association 22 (1927), 209-212; without
    correction for continuity.

    Args:
        k: number of successes.
        n: number of trials.
        confidence: in (0, 1).

    Returns:
        Both ends, in [0, 1]; NaN for `n = 0`.

    Raises:
        ValueError: not 0 <= k <= n, or a confidence outside (0, 1).
    """
    if not 0 <= k <= n or not 0 < confidence < 1:
        raise ValueError(
            f"{k} successes of {n} trials at confidence {confidence}: expected 0 <= k <= n and a "
            "confidence in (0, 1)"
        )
    if n == 0:
        return math.nan, math.nan
    k, n = int(k), int(n)
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    middle = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    # Both ends are exact where all trials agree; rounding would leave them just inside.
    return (0.0 if k == 0 else middle - half), (1.0 if k == n else middle + half)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two observers on the same conflict images; differences are first minus second.

    Attributes:
        n_conflict: number of images.
        n_both: images on which both answered with the shape.
        n_only_first: images on which only the first did.
        n_only_second: images on which only the second did.
        mcnemar_p: exact two-sided p value of McNemar's test that either is as likely as the other
            to be the only one to answer with the shape.
        shape_fraction_difference: (n_only_first - n_only_second) / n_conflict.
        shape_fraction_difference_ci95: its interval, by a paired bootstrap over images.
        shape_bias_difference: difference of the shape biases.
        shape_bias_difference_ci95: its interval, by the same resamples.
    """

    n_conflict: int
    n_both: int
    n_only_first: int
    n_only_second: int
    mcnemar_p: float
    shape_fraction_difference: float
    shape_fraction_difference_ci95: Interval
    shape_bias_difference: float
    shape_bias_difference_ci95: Interval


def compare(
    first: CueConflictColumns, second: CueConflictColumns, *, bootstrap: int = 2000, seed: int = 0
) -> Comparison:
    """Compares two observers who saw the same cue-conflict images.

    Args:
        first: table of one observer.
        second: table of another; rows are matched by `image_key`, in any order.
        bootstrap: number of resamples; 0 leaves the intervals NaN.
        seed: of the resamples.

    Returns:
        Whether, and by how much, the first names the shape more often than the second.

    Raises:
        ValueError: an image twice in a table, different images, or no conflict image.
    """
    a, b = _aligned(first), _aligned(second)
    if not np.array_equal(first.image_key[a], second.image_key[b]):
        odd = sorted(set(first.image_key.tolist()) ^ set(second.image_key.tolist()))
        raise ValueError(
            f"the tables are not about the same images: {len(odd)} are in one only, such as "
            f"{odd[0]!r}"
        )
    conflict = first.category[a] != first.texture[a]
    a, b = a[conflict], b[conflict]
    if not len(a):
        raise ValueError("no conflict image to compare on: shape and texture agree in all")
    shapes = [t.object_response[i] == t.category[i] for t, i in ((first, a), (second, b))]
    textures = [t.object_response[i] == t.texture[i] for t, i in ((first, a), (second, b))]
    only = [int(np.count_nonzero(shapes[i] & ~shapes[1 - i])) for i in (0, 1)]

    weights = np.concatenate([np.ones((1, len(a)), np.int64), _weights(len(a), bootstrap, seed)])
    s = [weights @ hits for hits in shapes]
    bias = [_ratios(s[i], s[i] + weights @ textures[i]) for i in (0, 1)]
    fraction_difference = (s[0] - s[1]) / len(a)
    bias_difference = bias[0] - bias[1]
    return Comparison(
        n_conflict=len(a),
        n_both=int(np.count_nonzero(shapes[0] & shapes[1])),
        n_only_first=only[0],
        n_only_second=only[1],
        mcnemar_p=_mcnemar_p(*only),
        shape_fraction_difference=float(fraction_difference[0]),
        shape_fraction_difference_ci95=_percentiles(fraction_difference[1:]),
        shape_bias_difference=float(bias_difference[0]),
        shape_bias_difference_ci95=_percentiles(bias_difference[1:]),
    )


def _categories(given: Sequence[str] | None, *columns: np.ndarray) -> tuple[str, ...]:
    """The categories in order; refuses tables without trials, or with other categories."""
    if not len(columns[0]):
        raise ValueError("no trials: expected a table with at least one row")
    found = sorted({str(name) for column in columns for name in column.tolist()})
    names = tuple(found if given is None else given)
    foreign = [name for name in found if name not in names]
    if foreign:
        raise ValueError(
            f"category {foreign[0]!r} is in the trials but not among the categories "
            f"{', '.join(names)}"
        )
    return names


def _category_counts(
    conflict: Bool[np.ndarray, " n"],
    by_shape: Bool[np.ndarray, " n"],
    by_texture: Bool[np.ndarray, " n"],
) -> CategoryShapeBias:
    n, s, x = (int(np.count_nonzero(mask)) for mask in (conflict, by_shape, by_texture))
    return CategoryShapeBias(
        n_conflict=n,
        n_shape=s,
        n_texture=x,
        n_other=n - s - x,
        decided_fraction=_ratio(s + x, n),
        shape_bias=_ratio(s, s + x),
    )


def _ratio(part: float | np.integer, whole: float | np.integer) -> float:
    return float(part / whole) if whole else math.nan


def _ratios(part: np.ndarray, whole: np.ndarray) -> Float[np.ndarray, " n"]:
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)


def _weights(n: int, resamples: int, seed: int) -> Int[np.ndarray, "resamples n"]:
    """How often each of `n` things is drawn in each resample of `n` draws with replacement."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)


def _percentiles(values: Float[np.ndarray, " n"]) -> Interval:
    """The middle 95 % of what is not NaN."""
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def _clustered_interval(
    cluster: np.ndarray,
    by_shape: Bool[np.ndarray, " n"],
    by_texture: Bool[np.ndarray, " n"],
    resamples: int,
    seed: int,
) -> Interval:
    """Percentile interval of the shape bias over resamples of whole clusters."""
    clusters, member = np.unique(cluster, return_inverse=True)
    if len(clusters) < 2:
        return math.nan, math.nan
    weights = _weights(len(clusters), resamples, seed)
    s = weights @ np.bincount(member[by_shape], minlength=len(clusters))
    x = weights @ np.bincount(member[by_texture], minlength=len(clusters))
    return _percentiles(_ratios(s, s + x))


def _warnings(result: ShapeBias) -> list[str]:
    if not result.n_conflict:
        return ["no conflict image: shape and texture agree in all, so there is no shape bias"]
    warnings = []
    low, high = result.decided_fraction_ci95
    chance = result.chance_decided
    shown = f"decided fraction {result.decided_fraction:.3f} [{low:.3f}, {high:.3f}]"
    if not result.n_shape + result.n_texture:
        warnings.append("no decision: neither shape nor texture was ever named; no shape bias")
    elif low <= chance <= high:
        warnings.append(
            f"at chance: {shown} includes {chance:.3f}, that of guessing among "
            f"{len(result.per_category)} categories, whose shape bias is 0.5; the shape bias "
            f"{result.shape_bias:.3f} means nothing"
        )
    elif high < chance:
        warnings.append(
            f"below chance: {shown} is less than {chance:.3f}, that of guessing: both cues are "
            f"avoided, and the shape bias {result.shape_bias:.3f} rests on what is left"
        )
    counts = {name: n for name, n in result.response_histogram.items() if name != NO_ANSWER}
    answers = sum(counts.values())
    for name, count in counts.items():
        if count > max(DOMINANT, chance) * answers:
            warnings.append(
                f"one response dominates: {name!r} is {count / answers:.0%} of the answers "
                f"({count} of {answers})"
            )
    foreign = [name for name in counts if name not in result.per_category]
    if foreign:
        total = sum(counts[name] for name in foreign)
        warnings.append(
            f"answers that are no category: {total}, such as {foreign[0]!r}; they count as other"
        )
    return warnings


def _aligned(trials: CueConflictColumns) -> Int[np.ndarray, " n"]:
    """The order of rows in which image keys ascend."""
    keys, counts = np.unique(trials.image_key, return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"image {str(keys[counts.argmax()])!r} occurs {counts.max()} times in a table; "
            "compare one observer with one other"
        )
    return np.argsort(trials.image_key)


def _mcnemar_p(only_first: int, only_second: int) -> float:
    """Two-sided binomial test of one half, in exact integers."""
    n, fewer = only_first + only_second, min(only_first, only_second)
    ways, tail = 1, 0
    for k in range(fewer + 1):
        tail += ways
        ways = ways * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)
