"""A set of stimuli: names and true categories at hand, the images themselves on demand.

An image is uint8 [height, width, 3], RGB, 0 to 255. `load` may be called from several threads.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt8
from numpy.typing import ArrayLike


@dataclasses.dataclass(frozen=True)
class Stimuli:
    """What a network is shown, in order.

    Attributes:
        name: the dataset, as in the benchmark ("cue-conflict").
        categories: all names that an answer can have.
        image_names: one a stimulus, no two alike, since trials are told apart by them; file names
            as the dataset gives them, with the class's folder where they repeat among classes.
        category: the true category of each; of a cue conflict that of its shape.
        condition: level of distortion of each, "NaN" where the dataset has none.
        load: gives the image of an index from 0 on, uint8 [height, width, 3]; thread-safe; raises
            OSError or ValueError that names the file.
        origin: where the images come from, for the summary of a run: a folder, or
            "builtin seed=0".

    Raises:
        ValueError: columns of different length, an unknown category, or a name given twice.
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
