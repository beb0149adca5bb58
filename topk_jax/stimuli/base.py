"""A set of stimuli: names and true categories at hand, the images themselves on demand.

An image is uint8 [height, width, 3], RGB, 0 to 255. `load` may be called from several threads.
"""

import dataclasses
import difflib
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int32, UInt8
from numpy.typing import ArrayLike


@dataclasses.dataclass(frozen=True)
class Stimuli:
    """What a network is shown, in order.

    Attributes:
        name: the dataset, as in the benchmark ("cue-conflict").
        categories: all names that an answer can have, no two alike; the place of a name among
            them is its label.
        image_names: one a stimulus, no two alike, since trials are told apart by them; file names
            as the dataset gives them, with the class's folder where they repeat among classes.
        category: the true category of each; of a cue conflict that of its shape.
        condition: level of distortion of each, "NaN" where the dataset has none.
        load: gives the image of an index from 0 on, uint8 [height, width, 3]; thread-safe; raises
            OSError or ValueError that names the file.
        origin: where the images come from, for the summary of a run: a folder, or
            "builtin seed=0".

    Raises:
        ValueError: columns of different length, an unknown category, or a category or an image's
            name given twice.
    """

    name: str
    categories: tuple[str, ...]
    image_names: tuple[str, ...]
    category: tuple[str, ...]
    condition: tuple[str, ...]
    load: Callable[[int], UInt8[np.ndarray, "h w 3"]]
    origin: str

    def __post_init__(self) -> None:
        count = len(self.image_names)
        if len(self.category) != count or len(self.condition) != count:
            raise ValueError(
                f"{self.name}: {count} images, {len(self.category)} categories and "
                f"{len(self.condition)} conditions; expected one of each for every image"
            )
        known, seen = set(self.categories), set()
        if len(known) != len(self.categories):
            twice = sorted({name for name in known if self.categories.count(name) > 1})
            raise ValueError(
                f"{self.name}: category {twice[0]!r} is there twice; categories must differ"
            )
        for name, category in zip(self.image_names, self.category, strict=True):
            if category not in known:
                raise ValueError(
                    f"{self.name}: image {name} is of category {category!r}; "
                    f"known are {', '.join(self.categories)}"
                )
            if name in seen:
                raise ValueError(f"{self.name}: image {name} is there twice; names must differ")
            seen.add(name)

    def __len__(self) -> int:
        return len(self.image_names)

    @property
    def labels(self) -> Int32[np.ndarray, " n"]:
        """The true category of each as its place in `categories`; computed at every call."""
        place = {category: label for label, category in enumerate(self.categories)}
        return np.array([place[category] for category in self.category], np.int32)

    def select(self, indices: Sequence[int] | ArrayLike) -> "Stimuli":
        """Returns some of the stimuli, in the order given.

        Args:
            indices: numbers from 0 (or from the end, below 0), each at most once; or one truth
                value for each stimulus.

        Raises:
            ValueError: indices of another kind, or one twice.
            IndexError: there is no stimulus of that number.
        """
        chosen = np.asarray(indices)
        if chosen.size == 0:
            chosen = chosen.astype(np.int64)
        if chosen.ndim != 1 or chosen.dtype.kind not in "biu":
            raise ValueError(
                f"indices of {chosen.dtype} {list(chosen.shape)}; "
                "expected a list of whole numbers or of truth values"
            )
        rows = np.arange(len(self))[chosen].tolist()
        whole = rows == list(range(len(self)))
        return dataclasses.replace(
            self,
            image_names=tuple(self.image_names[row] for row in rows),
            category=tuple(self.category[row] for row in rows),
            condition=tuple(self.condition[row] for row in rows),
            load=lambda index: self.load(rows[index]),
            origin=self.origin if whole else f"{self.origin} ({len(rows)} of {len(self)})",
        )


def check_same_classes(*stimuli: Stimuli) -> None:
    """Checks that sets agree in their categories and in their order, that is, in their labels.

    Args:
        *stimuli: any number of sets; each is compared with the first.

    Raises:
        ValueError: a category that only one of two has, or another order; the message names both
            sets and what they differ in.
    """
    for other in stimuli[1:]:
        first = stimuli[0]
        if first.categories == other.categories:
            continue
        between = f"{first.name} ({first.origin}) and {other.name} ({other.origin})"
        lacks = [
            f"{listed(sorted(missing))} only in {each.name}"
            for each, missing in (
                (first, set(first.categories) - set(other.categories)),
                (other, set(other.categories) - set(first.categories)),
            )
            if missing
        ]
        if lacks:
            raise ValueError(f"{between} have different classes: {'; '.join(lacks)}")
        place = next(
            i
            for i, (ours, theirs) in enumerate(zip(first.categories, other.categories, strict=True))
            if ours != theirs
        )
        raise ValueError(
            f"{between} have the same classes in another order (class {place} is "
            f"{first.categories[place]} and {other.categories[place]}); "
            "read both with one list of classes"
        )


def listed(names: Sequence[str], *, most: int = 10) -> str:
    """Names with commas between them, those beyond the first `most` as a number; for messages."""
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


def chosen_classes(
    classes: Sequence[str] | None, found: Sequence[str], *, place: str
) -> tuple[str, ...]:
    """The classes to use, in the order of the labels: those asked for, or all that were found.

    Args:
        classes: asked for; None is all.
        found: what there is.
        place: where, for the errors.

    Raises:
        ValueError: no list of names, or a class that was not found.
    """
    if classes is None:
        return tuple(found)
    if isinstance(classes, str) or not classes:
        raise ValueError(f"classes={classes!r}: expected a list of folder names, as ['cat', 'dog']")
    known = set(found)
    missing = [each for each in classes if each not in known]
    if missing:
        near = difflib.get_close_matches(missing[0], found, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"{place}: no class {listed(missing)}{hint}; it has {listed(found)}")
    return tuple(classes)
