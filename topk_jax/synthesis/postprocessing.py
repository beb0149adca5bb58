"""From an optimised image to the picture that is shown."""

from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from topk_jax.images import Preprocessing


def to_pixels(
    image: Float32[Any, "h w 3"], preprocessing: Preprocessing
) -> UInt8[np.ndarray, "h w 3"]:
    """Grey levels of an image in the network's units: the inverse of `images.normalize`, rounded.

    Values outside 0 to 255 are clipped.
    """
    std, mean = (np.asarray(value, np.float32) for value in (preprocessing.std, preprocessing.mean))
    levels = (np.asarray(image, np.float32) * std + mean) * np.float32(255)
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def match_histograms(
    image: UInt8[np.ndarray, "h w c"],
    target: UInt8[np.ndarray, "th tw c"],
    *,
    bins: int | None = None,
) -> UInt8[np.ndarray, "h w c"]:
    """Gives each channel of an image the distribution of grey levels that the target's has.

    Each pixel goes from its rank in the image (equal pixels share their mean rank) to the level of
    that rank in the target, read off the target's cumulative histogram linearly between the edges
    of its bins.

    Args:
        image: uint8; its size may differ from the target's.
        target: uint8, with as many channels.
        bins: None is one bin about each grey level, and the result is rounded: an image matched to
            itself stays as it is. A number is that of equal bins from the target's least to its
            greatest level, and the result is cut down to whole levels (Li et al. 2023, code, with
            100).

    Raises:
        ValueError: Another dtype, other channels, no pixels, or no bins.
    """
    if image.ndim != 3 or target.ndim != 3 or image.shape[2] != target.shape[2]:
        raise ValueError(
            f"images of shapes {image.shape} and {target.shape}: expected [h, w, c] with as many "
            "channels in both"
        )
    if image.dtype != np.uint8 or target.dtype != np.uint8 or not image.size * target.size:
        raise ValueError("images to be matched: expected uint8 and at least one pixel")
    if bins is not None and bins < 1:
        raise ValueError(f"bins={bins}: expected at least 1")
    matched = np.empty_like(image)
    for channel in range(image.shape[2]):
        levels = _matched(image[..., channel].ravel(), target[..., channel].ravel(), bins)
        matched[..., channel] = levels.reshape(image.shape[:2])
    return matched


def _matched(source: np.ndarray, target: np.ndarray, bins: int | None) -> np.ndarray:
    """Levels, float64, of the source's pixels."""
    counts = np.bincount(source, minlength=256)
    middle = np.cumsum(counts) - counts / 2
    if bins is None:
        # Half a pixel below the mean rank, a level meets the middle of its own bin.
        rank = middle / source.size
        histogram, edges = np.histogram(target, bins=np.arange(257) - 0.5)
    else:
        rank = (middle + 0.5) / source.size
        histogram, edges = np.histogram(target, bins=bins)
    cumulative = np.concatenate([[0.0], np.cumsum(histogram) / target.size])
    # Where the cumulative histogram is level, a rank that meets it exactly gets its last edge.
    levels = np.interp(rank, cumulative, edges)
    return (np.rint(levels) if bins is None else levels)[source]
