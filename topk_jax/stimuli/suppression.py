"""Images with one cue taken away: colour, fine detail, texture, or the arrangement of parts.

A network that goes by shape loses less than another when colour or texture is suppressed, and more
when patches are shuffled; one that is merely worse loses on all of them. Filters work on what the
network sees, at its input size and before normalisation: uint8 [h, w, 3] to the same. Beyond an
image's edge they see it mirrored, the edge itself not repeated.
"""

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy.typing import ArrayLike

from topk_jax import images
from topk_jax.images import Preprocessing
from topk_jax.stimuli.base import Stimuli

Image = UInt8[np.ndarray, "h w 3"]

_EXPECTED = "gray, blur<sigma in pixels>, bilateral or shuffle<tiles a side>, as blur2 or shuffle4"
_WORD = re.compile(
    r"(?P<plain>gray|bilateral)|(?P<blur>blur)(?P<sigma>\d+(\.\d+)?)|(?P<shuffle>shuffle)(?P<grid>\d+)"
)
_LARGEST_SIGMA = 1000.0
_LARGEST_SQUARE = 3 * 255**2  # of the distance between two colours


def grayscale(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Luma of ITU-R BT.601 in all three channels, in the whole numbers of Pillow's `convert("L")`.

    Raises:
        ValueError: not uint8 [height, width, 3].
    """
    red, green, blue = np.moveaxis(images.checked(image), -1, 0).astype(np.uint32)
    luma = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
    return np.repeat(luma.astype(np.uint8)[..., None], 3, axis=2)


def gaussian_kernel(sigma: float) -> Float[np.ndarray, " n"]:
    """Weights of a Gaussian at whole distances up to ceil(3 sigma) on either side; their sum is 1.

    Args:
        sigma: standard deviation in pixels, more than 0 and at most 1000.

    Raises:
        ValueError: sigma out of range.
    """
    if not 0 < sigma <= _LARGEST_SIGMA:
        raise ValueError(
            f"sigma={sigma} pixels: expected more than 0 and at most {_LARGEST_SIGMA:g}"
        )
    distance = np.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)
    weights = np.exp(-0.5 * (distance / sigma) ** 2)
    return weights / weights.sum()


def gaussian_blur(image: UInt8[np.ndarray, "h w 3"], sigma: float) -> UInt8[np.ndarray, "h w 3"]:
    """Blurs with a Gaussian, along one axis and then the other, rounding once.

    Args:
        image: uint8 [height, width, 3].
        sigma: standard deviation in pixels, as `gaussian_kernel` has it.

    Raises:
        ValueError: bad image or sigma.
    """
    weights = gaussian_kernel(sigma)
    values = images.checked(image).astype(np.float64)
    for axis in (0, 1):
        values = _smoothed(values, weights, axis)
    return np.rint(values).astype(np.uint8)


def _smoothed(
    values: Float[np.ndarray, "h w 3"], weights: Float[np.ndarray, " n"], axis: int
) -> Float[np.ndarray, "h w 3"]:
    """Weighted sum of neighbours along one axis; the weights are symmetric."""
    radius, count = len(weights) // 2, values.shape[axis]
    margins = [(radius, radius) if each == axis else (0, 0) for each in range(values.ndim)]
    padded = np.pad(values, margins, mode="reflect")

    def neighbours(offset: int) -> Float[np.ndarray, "h w 3"]:
        start = radius + offset
        return padded[(slice(None),) * axis + (slice(start, start + count),)]

    total = weights[radius] * neighbours(0)
    pair = np.empty_like(total)
    for offset in range(1, radius + 1):
        np.add(neighbours(-offset), neighbours(offset), out=pair)
        pair *= weights[radius + offset]
        total += pair
    return total


def bilateral_filter(
    image: UInt8[np.ndarray, "h w 3"],
    *,
    window: int = 9,
    sigma_color: float = 75.0,
    sigma_space: float = 75.0,
    passes: int = 3,
) -> UInt8[np.ndarray, "h w 3"]:
    """Smooths within regions and keeps their edges (Tomasi and Manduchi, ICCV 1998).

    A neighbour weighs exp(-d^2 / 2 sigma_space^2) exp(-c^2 / 2 sigma_color^2): d is its distance in
    the image, c that of the two colours, Euclidean over red, green and blue. OpenCV's
    `bilateralFilter` differs: its c is the sum of the three absolute differences, its window a
    disc.

    Args:
        image: uint8 [height, width, 3].
        window: side of the square of neighbours in pixels, odd.
        sigma_color: in grey levels, of 0 to 255.
        sigma_space: in pixels.
        passes: how many times the filter is applied; each rounds to whole grey levels.

    Raises:
        ValueError: bad image, or a setting out of range.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window={window}: expected an odd number of pixels, for example 9")
    if not (0 < sigma_color < math.inf and 0 < sigma_space < math.inf) or passes < 1:
        raise ValueError(
            f"sigma_color={sigma_color}, sigma_space={sigma_space}, passes={passes}: expected "
            "numbers above 0 and at least 1 pass"
        )
    image = images.checked(image)
    for _ in range(passes):
        image = _bilateral_pass(image, window // 2, sigma_color, sigma_space)
    return image


def _bilateral_pass(image: Image, radius: int, sigma_color: float, sigma_space: float) -> Image:
    height, width = image.shape[:2]
    padded = np.pad(image, [(radius, radius), (radius, radius), (0, 0)], mode="reflect")
    levels = np.ascontiguousarray(np.moveaxis(padded, -1, 0), np.int32)
    values = levels.astype(np.float32)
    by_color = _color_weights(sigma_color)
    inside = (slice(radius, radius + height), slice(radius, radius + width))
    weighted = values[:, *inside].copy()
    total = np.ones((height, width), np.float32)
    for down in range(radius + 1):
        for right in range(1 if down == 0 else -radius, radius + 1):
            # A pixel weighs for its neighbour what the neighbour weighs for it: computed once, for
            # all pixels of which one of the two is inside.
            before, after = max(right, 0), max(-right, 0)
            rows = slice(radius - down, radius + height)
            columns = slice(radius - before, radius + width + after)
            difference = levels[:, rows, columns] - levels[:, *_moved(rows, columns, down, right)]
            difference *= difference
            square = difference[0] + difference[1]
            square += difference[2]
            weights = by_color[square]
            weights *= np.float32(math.exp(-(down**2 + right**2) / (2 * sigma_space**2)))
            ahead = weights[down:, before : before + width]
            behind = weights[:height, after : after + width]
            weighted += ahead * values[:, *_moved(*inside, down, right)]
            weighted += behind * values[:, *_moved(*inside, -down, -right)]
            total += ahead
            total += behind
    return np.moveaxis(np.rint(weighted / total), 0, -1).astype(np.uint8)


def _moved(rows: slice, columns: slice, down: int, right: int) -> tuple[slice, slice]:
    return (
        slice(rows.start + down, rows.stop + down),
        slice(columns.start + right, columns.stop + right),
    )


@functools.lru_cache(maxsize=4)
def _color_weights(sigma: float) -> Float[np.ndarray, " n"]:
    """The weight of each squared distance between two colours, float32."""
    squares = np.arange(_LARGEST_SQUARE + 1, dtype=np.float64)
    return np.exp(-squares / (2 * sigma**2)).astype(np.float32)


def patch_shuffle(
    image: UInt8[np.ndarray, "h w 3"], grid: int, permutation: Sequence[int] | ArrayLike
) -> UInt8[np.ndarray, "h w 3"]:
    """Cuts an image into tiles and puts them together in another order.

    Args:
        image: uint8 [height, width, 3].
        grid: tiles along each side; divides height and width.
        permutation: for each place, row by row, the number of the tile that comes there: each of
            0 to grid^2 - 1 once.

    Raises:
        ValueError: bad image, a grid that does not divide it (the message lists those that do), or
            no permutation.
    """
    image = images.checked(image)
    height, width = image.shape[:2]
    check_grid(grid, height, width)
    order = np.asarray(permutation)
    if order.dtype.kind not in "iu" or not np.array_equal(np.sort(order), np.arange(grid**2)):
        raise ValueError(
            f"a permutation of {order.dtype} {list(order.shape)}: expected each number from 0 to "
            f"{grid**2 - 1} once"
        )
    tiles = image.reshape(grid, height // grid, grid, width // grid, 3).swapaxes(1, 2)
    shuffled = tiles.reshape(grid**2, height // grid, width // grid, 3)[order]
    return shuffled.reshape(tiles.shape).swapaxes(1, 2).reshape(image.shape)


def check_grid(grid: int, height: int, width: int) -> None:
    """Raises ValueError, with the grids that would do, if `grid` does not divide both sides."""
    if grid < 1 or height % grid or width % grid:
        common = math.gcd(height, width)
        valid = [str(number) for number in range(1, common + 1) if common % number == 0]
        raise ValueError(
            f"{grid} x {grid} tiles do not divide {width} x {height} pixels; tiles a side can be "
            f"{', '.join(valid)}"
        )


def patch_permutation(grid: int, *, seed: int, image_name: str) -> Int[np.ndarray, " n"]:
    """The order of an image's tiles: drawn from seed and name, whatever the other images.

    Args:
        grid: tiles along each side, at least 1.
        seed: any whole number.
        image_name: of the image.

    Returns:
        A permutation of 0 to grid^2 - 1; tiles may stay where they are.
    """
    digest = hashlib.sha256(f"{seed}/{image_name}".encode()).digest()
    # The legacy generator, since its streams are the same in every version of NumPy.
    return np.random.RandomState(np.frombuffer(digest, "<u4")).permutation(grid**2)


@dataclasses.dataclass(frozen=True)
class Suppression:
    """One way to take a cue away.

    Attributes:
        cue: what is done: "gray", "blur", "bilateral" or "shuffle".
        strength: sigma of the blur in pixels, or tiles a side; 0 for the others.
    """

    cue: Literal["gray", "blur", "bilateral", "shuffle"]
    strength: float = 0.0

    @property
    def word(self) -> str:
        """What `parse_suppression` reads it from, for example "blur2"."""
        return f"{self.cue}{self.strength:.12g}" if self.strength else self.cue

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError if images of this size, in pixels, cannot be treated."""
        if self.cue == "shuffle":
            check_grid(int(self.strength), height, width)

    def apply(
        self, image: UInt8[np.ndarray, "h w 3"], *, image_name: str, seed: int = 0
    ) -> UInt8[np.ndarray, "h w 3"]:
        """Treats an image.

        Args:
            image: uint8 [height, width, 3].
            image_name: its name, from which with the seed the order of tiles is drawn.
            seed: of that draw.

        Raises:
            ValueError: an image that cannot be treated; the message has its name.
        """
        try:
            if self.cue == "gray":
                return grayscale(image)
            if self.cue == "blur":
                return gaussian_blur(image, self.strength)
            if self.cue == "bilateral":
                return bilateral_filter(image)
            grid = int(self.strength)
            return patch_shuffle(
                image, grid, patch_permutation(grid, seed=seed, image_name=image_name)
            )
        except ValueError as error:
            raise ValueError(f"{image_name}: {error}") from error


def parse_suppression(word: str) -> Suppression:
    """Reads "gray", "blur2" (sigma in pixels), "bilateral" or "shuffle4" (tiles a side).

    Raises:
        ValueError: another word, or a number out of range.
    """
    match = _WORD.fullmatch(word.strip())
    if match is None:
        raise ValueError(f"unknown suppression {word!r}; expected {_EXPECTED}")
    if match["blur"]:
        sigma = float(match["sigma"])
        gaussian_kernel(sigma)
        return Suppression("blur", sigma)
    if match["shuffle"]:
        grid = int(match["grid"])
        if grid < 1:
            raise ValueError(f"suppression {word!r}: expected at least 1 tile a side")
        return Suppression("shuffle", grid)
    return Suppression("gray" if match["plain"] == "gray" else "bilateral")


def suppress(
    stimuli: Stimuli,
    word: str,
    *,
    seed: int = 0,
    image_size: int | None = None,
    preprocessing: Preprocessing | None = None,
) -> Stimuli:
    """The stimuli with a cue taken away, each image when it is loaded.

    Filters mean what they say at the size that the network sees: give `image_size` or
    `preprocessing` unless the images have it.

    Args:
        stimuli: any set.
        word: as `parse_suppression` reads it, for example "blur2".
        seed: of the order of shuffled tiles; an image's order depends on it and the image's name
            alone.
        image_size: side of the network's input in pixels; images of another size have their short
            side resized and their centre cut out first, as `evaluate` does it.
        preprocessing: resize and crop that come first instead.

    Returns:
        Stimuli named "<name>-<word>", with the word as their condition.

    Raises:
        ValueError: an unknown word, both sizes given, or tiles that do not divide that size.
    """
    suppression = parse_suppression(word)
    if image_size is not None and preprocessing is not None:
        raise ValueError("image_size and preprocessing exclude each other; give one of them")
    size = image_size if preprocessing is None else preprocessing.image_size
    if size is not None:
        suppression.check_size(size, size)

    def load(index: int) -> UInt8[np.ndarray, "h w 3"]:
        image = stimuli.load(index)
        if preprocessing is not None:
            image = images.preprocess(image, preprocessing)
        elif image_size is not None:
            image = images.fit(image, image_size)
        return suppression.apply(image, image_name=stimuli.image_names[index], seed=seed)

    drawn = f" seed={seed}" if suppression.cue == "shuffle" else ""
    return dataclasses.replace(
        stimuli,
        name=f"{stimuli.name}-{suppression.word}",
        condition=(suppression.word,) * len(stimuli),
        load=load,
        origin=f"{stimuli.origin} ({suppression.word}{drawn})",
    )
