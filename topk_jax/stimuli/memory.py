"""Labelled images that are arrays: given as such, or decoded once and kept."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Int, UInt8

from topk_jax import images
from topk_jax.stimuli.base import Stimuli

Loaded = UInt8[np.ndarray, "h w 3"] | OSError | ValueError
"""An image, or what loading it raised."""


def from_arrays(
    pixels: UInt8[np.ndarray, "n h w 3"],
    labels: Int[np.ndarray, " n"],
    categories: Sequence[str],
    *,
    name: str,
) -> Stimuli:
    """Labelled images that are in memory; the array is not copied and must not change.

    Args:
        pixels: RGB, uint8 [n, height, width, 3].
        labels: place of each image's category in `categories`, integers [n].
        categories: names of the classes, no two alike.
        name: of the set.

    Returns:
        Stimuli in the order of the array, called "<category>/<number>" after their row. Each load
        gives a copy.

    Raises:
        ValueError: arrays of another kind or length, or a label without a category.
    """
    pixels, labels = np.asarray(pixels), np.asarray(labels)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise ValueError(
            f"{name}: pixels of {pixels.dtype} {list(pixels.shape)}; "
            "expected uint8 [n, height, width, 3]"
        )
    if labels.dtype.kind not in "iu" or labels.shape != pixels.shape[:1]:
        raise ValueError(
            f"{name}: labels of {labels.dtype} {list(labels.shape)} for {len(pixels)} images; "
            "expected one whole number for each"
        )
    if isinstance(categories, str):
        raise ValueError(f"categories={categories!r}: expected a list of names, as ['cat', 'dog']")
    known: tuple[str, ...] = tuple(categories)
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(known):
        raise ValueError(
            f"{name}: labels from {labels.min()} to {labels.max()} for {len(known)} "
            f"categories; expected 0 to {len(known) - 1}"
        )
    category = tuple(known[label] for label in labels.tolist())
    width = len(str(max(0, len(labels) - 1)))
    return Stimuli(
        name=name,
        categories=known,
        image_names=tuple(f"{each}/{i:0{width}}" for i, each in enumerate(category)),
        category=category,
        condition=("NaN",) * len(category),
        load=lambda index: pixels[index].copy(),
        origin=f"{len(pixels)} images in memory",
    )


def in_memory(
    stimuli: Stimuli, *, progress: Callable[[Iterable[Loaded]], Iterable[Loaded]] = iter
) -> Stimuli:
    """Loads every image now, in parallel, so that later loads decode nothing.

    An image of 224 x 224 pixels takes 150 kB.

    Args:
        stimuli: any set that fits into memory.
        progress: wraps the iterator of what was loaded, for a progress bar.

    Returns:
        The same stimuli; each load gives a copy, or raises anew what loading raised now.
    """

    def attempt(index: int) -> Loaded:
        try:
            return stimuli.load(index)
        except (OSError, ValueError) as error:
            return _without_traceback(error)

    loaded = list(progress(images.map_parallel(attempt, range(len(stimuli)))))

    def load(index: int) -> UInt8[np.ndarray, "h w 3"]:
        item = loaded[index]
        if isinstance(item, np.ndarray):
            return item.copy()
        raise _without_traceback(item)

    return dataclasses.replace(stimuli, load=load)


def _without_traceback(error: OSError | ValueError) -> OSError | ValueError:
    """A copy: a traceback would keep what the failed load had in memory, and grow at each raise."""
    return copy.copy(error)
