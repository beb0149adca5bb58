"""Rows of pictures under one another, each row with its title."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure

from topk_jax.figures.style import new_figure

_CELL = 1.6  # inches, width of a picture


def picture_rows(rows: Mapping[str, Sequence[UInt8[np.ndarray, "h w 3"]]]) -> Figure:
    """Draws rows of pictures; the title of a row stands above it, to the left.

    Args:
        rows: Pictures of each row by its title, uint8 [h, w, 3], RGB; as many in every row. Those
            in a column may differ in size: each keeps its aspect.

    Raises:
        ValueError: No pictures, or rows of different lengths.
    """
    lengths = {len(pictures) for pictures in rows.values()}
    if len(lengths) != 1 or not lengths - {0}:
        raise ValueError(f"rows of {sorted(lengths)} pictures: expected as many in each, and some")
    columns = lengths.pop()
    heights = [
        max(picture.shape[0] / picture.shape[1] for picture in pictures)
        for pictures in rows.values()
    ]
    figure = new_figure(_CELL * columns, _CELL * sum(heights) + 0.25 * len(rows))
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for axes_of_row, (title, pictures) in zip(grid, rows.items(), strict=True):
        for axes, picture in zip(axes_of_row, pictures, strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
        axes_of_row[0].set_title(title, loc="left", fontsize=9)
    return figure
