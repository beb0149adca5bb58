"""From the classes of a network to decisions, and the table that holds them.

Data contract: logits are [n, classes], anything NumPy takes for a float array; a decision is the
name of a category. `Trials` is a table of NumPy columns, one row for each image shown to one
observer, named and spelled as in the CSVs of the model-vs-human benchmark (Geirhos et al., NeurIPS
2021): files of the benchmark are read, and files written here are read by the benchmark. NumPy
only, so decisions and published data can be looked at without JAX.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float32
from numpy.typing import ArrayLike

from topk_jax.trials import CueConflictName as CueConflictName
from topk_jax.trials import Trials as Trials
from topk_jax.trials import parse_cue_conflict_name as parse_cue_conflict_name
from topk_jax.trials import read_trials as read_trials
from topk_jax.trials import trials_filename as trials_filename
from topk_jax.trials import write_trials as write_trials

Aggregation = Literal["mean", "sum", "max"]


@dataclasses.dataclass(frozen=True)
class CategoryMapping:
    """Which of a network's classes make up each category.

    Attributes:
        names: the categories, in the order in which ties are broken.
        indices: for each category its classes, counted from 0; no class is in two categories.
        num_classes: how many classes the network must have; None takes any network that has all
            the classes named here.

    Raises:
        ValueError: names that repeat, are empty or are "na" (the word for no answer), a category
            without classes, a class that is negative, too large or named twice.
    """

    names: tuple[str, ...]
    indices: tuple[tuple[int, ...], ...]
    num_classes: int | None = None

    def __post_init__(self) -> None:
        if not self.names or len(self.names) != len(self.indices):
            raise ValueError(
                f"{len(self.names)} names and {len(self.indices)} lists of classes: "
                "expected one list for each name, and at least one"
            )
        owner: dict[int, str] = {}
        for position, (name, classes) in enumerate(zip(self.names, self.indices, strict=True)):
            if name in ("", "na") or name in self.names[:position]:
                raise ValueError(f'category {name!r}: expected a new name, not empty and not "na"')
            if not classes:
                raise ValueError(f"category {name!r} has no classes")
            for index in classes:
                if index < 0 or (self.num_classes is not None and index >= self.num_classes):
                    limit = "" if self.num_classes is None else f" and below {self.num_classes}"
                    raise ValueError(
                        f"category {name!r}: class {index}, expected a number from 0{limit}"
                    )
                if index in owner:
                    raise ValueError(f"class {index} is in both {owner[index]!r} and {name!r}")
                owner[index] = name


def identity_mapping(names: Sequence[str]) -> CategoryMapping:
    """Mapping of a network whose class `i` is the category `names[i]`."""
    indices = tuple((index,) for index in range(len(names)))
    return CategoryMapping(tuple(names), indices, len(names))


def _numbers(ranges: str) -> tuple[int, ...]:
    """Returns the numbers of "8 10-16": 8 and 10 to 16."""
    bounds = [[int(bound) for bound in part.split("-")] for part in ranges.split()]
    return tuple(number for pair in bounds for number in range(pair[0], pair[-1] + 1))


_IMAGENET16 = {
    "airplane": "404",
    "bear": "294-297",
    "bicycle": "444 671",
    "bird": "8 10-16 18-20 22-24 80-83 87-96 98-100 127-133 135-145",
    "boat": "472 554 625 814 914",
    "bottle": "440 720 737 898 899 901 907",
    "car": "436 511 817",
    "cat": "281-286",
    "chair": "423 559 765 857",
    "clock": "409 530 892",
    "dog": "152-191 193-203 205-226 228-241 243-250 252-257 259 261-263 265-268",
    "elephant": "385 386",
    "keyboard": "508 878",
    "knife": "499",
    "oven": "766",
    "truck": "555 569 656 675 717 734 864 867",
}

IMAGENET16 = CategoryMapping(
    names=tuple(_IMAGENET16),
    indices=tuple(_numbers(ranges) for ranges in _IMAGENET16.values()),
    num_classes=1000,
)
"""The 16 categories of Geirhos et al. (NeurIPS 2018): 207 of the 1000 classes of ILSVRC-2012, in
the usual order (sorted WordNet ids)."""


def decide(
    logits: ArrayLike, mapping: CategoryMapping, *, aggregation: Aggregation = "mean"
) -> np.ndarray:
    """Decides on a category for each row of logits.

    A category's score is the mean (or the sum, or the maximum) of the softmax probabilities of its
    classes; the largest score wins, of equal ones the first in the order of `mapping.names`. (The
    benchmark's code lets the last one win; with real logits ties do not occur.) "mean" is what the
    benchmark and the Top-K paper use, since categories have 1 to 109 classes; the decisions
    published with Geirhos et al. (ICLR 2019) were made with "max".

    Args:
        logits: [n, classes], float; computed on in float32.
        mapping: which classes make up which category.
        aggregation: "mean", "sum" or "max".

    Returns:
        [n] names of categories, text.

    Raises:
        ValueError: `logits` is not [n, classes], has too few classes, or has a row without a
            softmax: a NaN, +inf, or -inf for every class of the mapping. The row is named.
    """
    x = _checked_logits(logits, mapping, aggregation)
    # The softmax's denominator is common to all categories, so it is left out, and the largest
    # exponent is that of a class of the mapping: however unlikely all categories are, the scores
    # do not all underflow to a tie at zero.
    classes = [index for members in mapping.indices for index in members]
    top = x[:, classes].max(axis=1, keepdims=True) if len(x) else np.zeros((0, 1), np.float32)
    hopeless = np.flatnonzero(np.isneginf(top[:, 0]))
    if hopeless.size:
        raise ValueError(
            f"logits: row {hopeless[0]} is -inf for every class of the mapping, so there is "
            "nothing to decide on"
        )
    return np.array(mapping.names)[_aggregate(x, top, mapping, aggregation).argmax(axis=1)]


def category_probabilities(
    logits: ArrayLike, mapping: CategoryMapping, *, aggregation: Aggregation = "mean"
) -> Float32[np.ndarray, "n categories"]:
    """Aggregated softmax probabilities, in [0, 1], of each category for each row of logits.

    These are the scores that `decide` compares, with the softmax's denominator. They sum to one
    only where `aggregation` is "sum" and every class belongs to a category. Arguments and errors
    are those of `decide`, but a row may be -inf for every class of the mapping.
    """
    x = _checked_logits(logits, mapping, aggregation)
    if not len(x):
        return np.zeros((0, len(mapping.names)), np.float32)
    top = x.max(axis=1, keepdims=True)
    with np.errstate(over="ignore"):
        total = np.exp(x - top).sum(axis=1, keepdims=True)
    return _aggregate(x, top, mapping, aggregation) / total


def _checked_logits(
    logits: ArrayLike, mapping: CategoryMapping, aggregation: str
) -> Float32[np.ndarray, "n classes"]:
    if aggregation not in get_args(Aggregation):
        raise ValueError(f'aggregation must be "mean", "sum" or "max", got {aggregation!r}')
    given = np.asarray(logits)
    if given.ndim != 2 or given.dtype.kind not in "fiuV":  # V: bfloat16 and its like
        raise ValueError(
            f"logits: expected numbers [n, classes], got {given.dtype} of shape {given.shape}"
        )
    with np.errstate(over="ignore"):
        x = given.astype(np.float32)
    needed = 1 + max(max(members) for members in mapping.indices)
    if x.shape[1] < needed or mapping.num_classes not in (None, x.shape[1]):
        expected = mapping.num_classes or f"at least {needed}"
        raise ValueError(
            f"logits have {x.shape[1]} classes, the mapping expects {expected}; "
            "choose the mapping that belongs to the network"
        )
    wrong = np.argwhere(np.isnan(x) | np.isposinf(x))
    if wrong.size:
        row, column = wrong[0]
        raise ValueError(
            f"logits: row {row} has {x[row, column]} for class {column}, so it has no softmax"
        )
    if x.shape[0]:
        hopeless = np.flatnonzero(np.isneginf(x).all(axis=1))
        if hopeless.size:
            raise ValueError(f"logits: row {hopeless[0]} is -inf for every class")
    return x


def _aggregate(
    x: Float32[np.ndarray, "n classes"],
    top: Float32[np.ndarray, "n 1"],
    mapping: CategoryMapping,
    aggregation: str,
) -> Float32[np.ndarray, "n categories"]:
    """Aggregates `exp(x - top)` over the classes of each category."""
    reduce = {"mean": np.mean, "sum": np.sum, "max": np.max}[aggregation]
    with np.errstate(over="ignore"):  # -3e38 - 3e38 is -inf, which is meant
        columns = [reduce(np.exp(x[:, list(own)] - top), axis=1) for own in mapping.indices]
    return np.stack(columns, axis=1)
