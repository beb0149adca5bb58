"""Many small images on one page."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure

from topk_jax.figures.style import new_figure

_CELL = 1.1  # inches
_GAP = 0.06  # of an image's width


def contact_sheet(
    images: UInt8[np.ndarray, "n h w 3"],
    *,
    labels: Sequence[str] | None = None,
    columns: int | None = None,
    title: str = "",
) -> Figure:
    """Draws images in rows, from left to right, each with its label below.

    Args:
        images: uint8 [n, h, w, 3], RGB.
        labels: one text for each image; None draws none.
        columns: images in a row; None makes the page about as wide as high.
        title: above the images.

    Returns:
        The figure, about 1.1 inches a column.

    Raises:
        ValueError: no images, images of another kind, or another number of labels.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not len(images):
        raise ValueError(
            f"images: expected uint8 [n, h, w, 3] and at least one, got {images.dtype} of shape "
            f"{images.shape}"
        )
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} images: expected one each")
    if columns is not None and columns < 1:
        raise ValueError(f"{columns} columns: expected at least 1")
    n, height, width, _ = images.shape
    in_row = min(n, columns or int(np.ceil(np.sqrt(n * height / width))))
    rows = -(-n // in_row)
    # Everything is measured in widths of an image.
    label_room = 0.0 if labels is None else 0.14
    step_x, step_y = 1 + _GAP, height / width + label_room + _GAP
    page_width, page_height = in_row * step_x + _GAP, rows * step_y + _GAP

    title_room = 0.35 if title else 0.0  # inches
    figure = new_figure(
        max(_CELL * page_width, 2.5 if title else 0.0), _CELL * page_height + title_room
    )
    if title:
        figure.suptitle(title, fontsize=11)
    axes = figure.add_subplot()
    axes.set_axis_off()
    size = _font_size(labels or ())
    for i, image in enumerate(images):
        left, top = _GAP + i % in_row * step_x, _GAP + i // in_row * step_y
        bottom = top + height / width
        axes.imshow(image, extent=(left, left + 1, bottom, top), interpolation="nearest")
        if labels is not None:
            axes.text(left + 0.5, bottom + 0.02, labels[i], ha="center", va="top", fontsize=size)
    axes.set_xlim(0, page_width)
    axes.set_ylim(page_height, 0)
    axes.set_aspect("equal")
    return figure


def _font_size(labels: Sequence[str]) -> float:
    """Largest size, up to 8 points, at which the longest label is as wide as an image."""
    longest = max(map(len, labels), default=1)
    return min(8.0, 72 * _CELL / (0.6 * max(1, longest)))
