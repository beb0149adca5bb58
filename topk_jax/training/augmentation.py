"""Random crops and mirror images for training, as torchvision makes them of PIL images.

Data contract: uint8 NumPy images [h, w, 3] in, uint8 [size, size, 3] out, on the host. What is
random comes from the `numpy.random.Generator` that is given first; a generator in the same state
gives the same image.
"""

import dataclasses
import math
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import UInt8

from topk_jax import images

Crop = Literal["random_resized", "padded", "none"]

_TRIES = 10


class Box(NamedTuple):
    """Part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def random_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """Draws a box as torchvision's `RandomResizedCrop` (Szegedy et al. 2015, section 6).

    Area and logarithm of the ratio are uniform, as is the place among those within the image. After
    ten boxes that do not fit, it is the largest box in the middle whose ratio is allowed.

    Args:
        rng: Source of the draws.
        height: Of the image, pixels.
        width: Of the image, pixels.
        scale: Least and largest area, as parts of the image's.
        ratio: Least and largest width divided by height.
    """
    for _ in range(_TRIES):
        area = height * width * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(0, height - h, endpoint=True))
            return Box(top, int(rng.integers(0, width - w, endpoint=True)), h, w)
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return Box((height - h) // 2, (width - w) // 2, h, w)


def random_resized_crop(
    rng: np.random.Generator,
    image: UInt8[np.ndarray, "h w 3"],
    size: int,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> UInt8[np.ndarray, "size size 3"]:
    """Resizes the part of an image in a `random_box` to a square of `size` pixels a side.

    Raises:
        ValueError: Bad image or size.
    """
    box = random_box(rng, *image.shape[:2], scale=scale, ratio=ratio)
    return images.resized_crop(image, *box, size)


def random_crop(
    rng: np.random.Generator, image: UInt8[np.ndarray, "h w 3"], size: int, padding: int
) -> UInt8[np.ndarray, "size size 3"]:
    """Cuts a square out of the image in a frame of zeros, as torchvision's `RandomCrop`.

    Args:
        rng: Source of the draws.
        image: uint8 [h, w, 3].
        size: Side of the square, pixels; for CIFAR 32.
        padding: Width of the frame, pixels; for CIFAR 4.

    Raises:
        ValueError: The image with its frame is smaller than the square.
    """
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    height, width = padded.shape[:2]
    if size > min(height, width):
        raise ValueError(
            f"an image of {image.shape[0]} x {image.shape[1]} with a frame of {padding} is smaller "
            f"than the crop of {size}: use crop='random_resized', or a smaller size"
        )
    top = rng.integers(0, height - size, endpoint=True)
    left = rng.integers(0, width - size, endpoint=True)
    return padded[top : top + size, left : left + size].copy()


def random_flip(
    rng: np.random.Generator, image: UInt8[np.ndarray, "h w 3"]
) -> UInt8[np.ndarray, "h w 3"]:
    """The image or, as likely, its mirror image, left for right."""
    return np.ascontiguousarray(image[:, ::-1]) if rng.random() < 0.5 else image


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What becomes of an image before it is trained on.

    Attributes:
        crop: "random_resized" as for ImageNet, "padded" (`random_crop`) as for CIFAR, or "none",
            the image brought to `size` as in an evaluation (`images.fit`).
        flip: Mirror half of the images.
        size: Side of the network's input, pixels.
        padding: Width of the frame of "padded", pixels.
        scale: Of "random_resized", see `random_box`.
        ratio: Of "random_resized", see `random_box`.
    """

    crop: Crop
    flip: bool
    size: int
    padding: int = 4
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: A field out of range or unknown.
        """
        if self.crop not in get_args(Crop):
            raise ValueError(f"crop={self.crop!r}: expected one of {', '.join(get_args(Crop))}")
        if self.size < 1 or self.padding < 0:
            raise ValueError(
                f"size={self.size}, padding={self.padding}: expected pixels, at least 1 and 0"
            )
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high < math.inf:
                raise ValueError(f"{name}={(low, high)}: expected 0 < least <= largest")

    def __call__(
        self, rng: np.random.Generator, image: UInt8[np.ndarray, "h w 3"]
    ) -> UInt8[np.ndarray, "size size 3"]:
        """The image to train on.

        Raises:
            ValueError: Bad image, or one too small for the crop.
        """
        if self.crop == "random_resized":
            image = random_resized_crop(rng, image, self.size, scale=self.scale, ratio=self.ratio)
        elif self.crop == "padded":
            image = random_crop(rng, image, self.size, self.padding)
        else:
            image = images.fit(image, self.size)
        return random_flip(rng, image) if self.flip else image
