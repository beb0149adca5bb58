"""Long-tailed subsets: the first class keeps all its images, the last one only a part.

Cui et al., "Class-Balanced Loss Based on Effective Number of Samples" (CVPR 2019), section 5.1; the
draw is that of Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss"
(NeurIPS 2019): one legacy NumPy stream shuffles the images of each class in turn.
"""

import dataclasses
import math
from typing import Literal

import numpy as np

from topk_jax.stimuli.base import Stimuli

Kind = Literal["exponential", "step"]
KINDS: tuple[Kind, ...] = ("exponential", "step")


def long_tailed_counts(
    largest: int, classes: int, factor: float, *, kind: Kind = "exponential"
) -> tuple[int, ...]:
    """Images of each class, the largest class first.

    Args:
        largest: images of the first class.
        classes: number of classes.
        factor: how many times smaller the smallest class is, at least 1.
        kind: "exponential" falls by one ratio from class to class; "step" keeps the first half of
            the classes (rounded down) whole and gives the others `largest / factor`.

    Returns:
        Each count cut down to a whole number.

    Raises:
        ValueError: a number out of range, another kind, or a class left without an image.
    """
    if largest < 1 or classes < 1:
        raise ValueError(f"largest={largest}, classes={classes}: expected at least 1 of each")
    if not 1 <= factor < math.inf:
        raise ValueError(f"factor={factor}: expected a number of at least 1, for example 100")
    share = 1 / factor
    if kind == "exponential":
        counts = [int(largest * share ** (i / max(1, classes - 1))) for i in range(classes)]
    elif kind == "step":
        half = classes // 2
        counts = [largest] * half + [int(largest * share)] * (classes - half)
    else:
        raise ValueError(f"kind={kind!r}: expected {' or '.join(KINDS)}")
    if not counts[-1]:
        raise ValueError(
            f"factor={factor:g} leaves the smallest class none of {largest} images; "
            f"expected a factor below {largest}"
        )
    return tuple(counts)


def long_tailed(
    stimuli: Stimuli, factor: float, *, kind: Kind = "exponential", seed: int = 0
) -> Stimuli:
    """A long-tailed part of a set, its classes in the order of the labels.

    Args:
        stimuli: as many images of each class, or nearly: the smallest class sets the largest count.
        factor: as `long_tailed_counts`.
        kind: as `long_tailed_counts`.
        seed: of the draw, 0 to 2**32 - 1.

    Returns:
        Stimuli sorted by class, each class in the order of its draw; a larger factor draws a part
        of what a smaller one does.

    Raises:
        ValueError: as `long_tailed_counts`, or a category without images.
    """
    labels = stimuli.labels
    sizes = np.bincount(labels, minlength=len(stimuli.categories))
    if not sizes.all():
        empty = stimuli.categories[int(sizes.argmin())]
        raise ValueError(f"{stimuli.origin}: no images of {empty}; a long tail needs some of each")
    counts = long_tailed_counts(int(sizes.min()), len(sizes), factor, kind=kind)
    rng = np.random.RandomState(seed)
    drawn = []
    for label, count in enumerate(counts):
        rows = np.flatnonzero(labels == label)
        rng.shuffle(rows)
        drawn.append(rows[:count])
    return dataclasses.replace(
        stimuli.select(np.concatenate(drawn)),
        name=f"{stimuli.name}-{kind}{factor:g}",
        origin=f"{stimuli.origin} ({kind} long tail, factor={factor:g} seed={seed}: "
        f"{sum(counts)} of {len(stimuli)})",
    )
