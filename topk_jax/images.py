"""Image files to arrays and back; resizing and cropping exactly as torchvision does it.

An image is a uint8 NumPy array [height, width, 3], RGB in the sRGB colour space, 0 to 255. Only
`normalize` makes floats of it: float32 with the channels last, as the networks take them; it works
on NumPy and on JAX arrays alike. Everything else runs on the host, in Pillow and NumPy: no
resampling on a device gives Pillow's pixels, and the published accuracies are Pillow's.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import itertools
import os
import pathlib
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
from absl import logging
from jaxtyping import Float32, Shaped, UInt8
from PIL import Image, ImageCms

from topk_jax import files

Item = TypeVar("Item")
Result = TypeVar("Result")

# What Pillow's decoders raise on damaged files, by format.
_DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    AttributeError,
    RuntimeError,
    struct.error,
    zlib.error,
)
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How the images of a published accuracy were prepared.

    Attributes:
        image_size: side of the square that the network sees, pixels.
        resize_size: what the short side is resized to before the crop, pixels.
        mean: subtracted from each channel after division by 255.
        std: what each channel is then divided by.
    """

    image_size: int
    resize_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET_PREPROCESSING = Preprocessing(224, 256, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Torchvision's transform for ImageNet validation, also that of all networks of the catalogue."""


def read_image(path: str | os.PathLike[str]) -> UInt8[np.ndarray, "h w 3"]:
    """Reads an image file as a viewer shows it.

    Turned upright (EXIF), transparency on white, palettes, grey and CMYK made RGB, an embedded
    colour profile converted to sRGB, 16 bits scaled to 8, the first frame of several. Integers of
    32 bits count as 16-bit values; floats as 0 to 1, or as 0 to 255 where one is above 1.

    Args:
        path: a file in any format that Pillow reads.

    Returns:
        uint8 [height, width, 3], writable.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it is empty, no image, damaged, or larger than Pillow's limit for decompression
            bombs. Both name the file.
    """
    with _opened(files.local_path(path)) as image:
        return _upright_rgb(image, path)


def decode_image(data: bytes, *, name: str) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes an image file that is in memory, as `read_image` does one on the disk.

    Args:
        data: the bytes of the file.
        name: what errors call it, such as "photos.zip/cat/1.jpg".

    Returns:
        uint8 [height, width, 3], writable.

    Raises:
        ValueError: as `read_image`.
    """
    with _opened(name, data) as image:
        return _upright_rgb(image, name)


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Returns (height, width) of an image file from its header, as stored (not turned upright).

    Raises:
        OSError, ValueError: as `read_image`, as far as the header shows it.
    """
    with _opened(files.local_path(path)) as image:
        return image.height, image.width


def _upright_rgb(image: Image.Image, path: str | os.PathLike[str]) -> UInt8[np.ndarray, "h w 3"]:
    image.load()
    upright = _UPRIGHT.get(_orientation(image))
    rgb = _as_rgb(image, path)
    if upright is not None:
        rgb = rgb.transpose(upright)
    return np.array(rgb)


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str], data: bytes | None = None) -> Iterator[Image.Image]:
    """Opens an image; what goes wrong with it inside the `with` statement names `path`.

    The bytes are `data`, or else those of the file.
    """
    try:
        with open(path, "rb") if data is None else io.BytesIO(data) as file:
            if not file.read(1):
                raise ValueError("an empty file")
            file.seek(0)
            image = Image.open(file)
            if not image.width * image.height:
                raise ValueError("no pixels")
            yield image
    except _BOMB as error:
        raise ValueError(
            f"{path}: more than {Image.MAX_IMAGE_PIXELS} pixels, too large to be an image"
        ) from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{path}: not an image that Pillow can read") from error
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: damaged or not an image: {reason}") from error


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation of a loaded image; a damaged EXIF block counts as none."""
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except _DAMAGED:
        return 1


def _as_rgb(image: Image.Image, path: str | os.PathLike[str]) -> Image.Image:
    """Converts a loaded image of any mode to RGB in sRGB."""
    profile = image.info.get("icc_profile")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    alpha = None
    if image.has_transparency_data:
        grey = image.mode in ("1", "L", "LA")
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        image = rgba.getchannel("R") if grey else rgba.convert("RGB")
    elif image.mode in ("1", "P"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if profile:
        image = _to_srgb(image, profile, path)
    rgb = image.convert("RGB")
    if alpha is None:
        return rgb
    return Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales a grey image of 16-bit integers or floats to 8 bits, which Pillow would clip."""
    values = np.asarray(image)
    transparent = image.info.get("transparency")
    low, high = values.min(), values.max()
    if image.mode != "F":
        if low < 0 or high > 65535:
            raise ValueError(f"grey values from {low} to {high}; expected 0 to 65535")
        grey = (values.astype(np.uint32) + 128) // 257
    elif low >= 0 and high <= 255:  # false for NaN
        grey = np.rint(values * (255.0 if high <= 1 else 1.0))
    else:
        raise ValueError(f"grey values from {low} to {high}; expected 0 to 1 or 0 to 255")
    result = Image.fromarray(grey.astype(np.uint8))
    if isinstance(transparent, int):
        opaque = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
        return Image.merge("LA", (result, opaque))
    return result


def _to_srgb(image: Image.Image, profile: bytes, path: str | os.PathLike[str]) -> Image.Image:
    """Applies an embedded colour profile; one that does not fit the image is left out."""
    try:
        mode, transform = _srgb_transform(profile)
        if mode == "RGB" and image.mode == "L":
            image = image.convert("RGB")
        if image.mode != mode:
            raise ValueError(f"a {mode} profile in a {image.mode} image")
        if transform is None:
            return image
        return ImageCms.applyTransform(image, transform) or image
    except (ImageCms.PyCMSError, *_DAMAGED) as error:
        logging.log_first_n(
            logging.WARNING, "%s: colour profile left out: %s (said once)", 1, path, error
        )
        return image


@functools.lru_cache(maxsize=16)
def _srgb_transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Returns the image mode that a profile describes, and the way to sRGB (None: it is sRGB)."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()  # pyright: ignore[reportAttributeAccessIssue]
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space)
    if mode is None:
        raise ValueError(f"a profile for {space}")
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "RGB":
        # Profiles of sRGB differ in their last digits. Their images must stay as they are.
        levels = np.array([*range(0, 256, 15)], np.uint8)
        colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 17 + 1, 3)
        changed = ImageCms.applyTransform(Image.fromarray(colours), transform)
        if np.abs(np.asarray(changed, np.int16) - colours).max() <= 2:
            return mode, None
    return mode, transform


def write_image(path: str | os.PathLike[str], image: UInt8[np.ndarray, "h w 3"]) -> None:
    """Writes an image as PNG: lossless, and whole or not at all.

    Args:
        path: the file, ending in ".png"; missing folders are made.
        image: uint8 [height, width, 3].

    Raises:
        ValueError: another suffix, dtype or shape.
        OSError: the file cannot be written.
    """
    target = files.local_path(path)
    if target.suffix.lower() != ".png":
        raise ValueError(f"{target}: images are written as PNG; write a name that ends in .png")
    data = io.BytesIO()
    Image.fromarray(checked(image)).save(data, "PNG")
    with files.atomic_write(target) as file:
        file.write(data.getbuffer())


def checked(image: Shaped[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Returns an image with its pixels in order in memory: itself, or a copy.

    Raises:
        ValueError: not uint8 [height, width, 3], or without pixels.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(
            f"an image of {image.dtype} {list(image.shape)}; expected uint8 [height, width, 3]"
        )
    return np.ascontiguousarray(image)


def resize_short_side(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "H W 3"]:
    """Resizes an image so that its short side is `size`, as torchvision's `Resize(size)` on PIL.

    The long side is cut down to a whole number; bilinear with Pillow's antialiasing.

    Args:
        image: uint8 [height, width, 3].
        size: pixels, at least 1.

    Returns:
        uint8; of the two sides one is `size` and the other at least that.

    Raises:
        ValueError: bad image or size, or a shape so narrow that the result would have more pixels
            than Pillow's limit.
    """
    image = checked(image)
    _check_size(size)
    height, width = image.shape[:2]
    short, long = min(height, width), max(height, width)
    long_size = int(size * long / short)
    if Image.MAX_IMAGE_PIXELS and size * long_size > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{width} x {height} pixels: too narrow to resize the short side to {size}"
        )
    new_size = (size, long_size) if width <= height else (long_size, size)
    return np.array(Image.fromarray(image).resize(new_size, Image.Resampling.BILINEAR))


def resize(
    image: UInt8[np.ndarray, "h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "height width 3"]:
    """Resizes an image to a height and a width, with Pillow's Lanczos filter.

    Args:
        image: uint8 [height, width, 3].
        height: pixels, at least 1.
        width: pixels, at least 1.

    Returns:
        uint8; the image itself if it has that size.

    Raises:
        ValueError: bad image or size, or more pixels than Pillow's limit.
    """
    image = checked(image)
    _check_size(min(height, width))
    if Image.MAX_IMAGE_PIXELS and height * width > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{width} x {height} pixels: more than {Image.MAX_IMAGE_PIXELS}")
    if image.shape[:2] == (height, width):
        return image
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def resized_crop(
    image: UInt8[np.ndarray, "h w 3"], top: int, left: int, height: int, width: int, size: int
) -> UInt8[np.ndarray, "size size 3"]:
    """Cuts out a box and resizes it to a square, as torchvision's `resized_crop` on PIL.

    Bilinear with Pillow's antialiasing. Nothing outside the box is seen, as it is by a resize that
    is told of the box.

    Args:
        image: uint8 [h, w, 3].
        top: first row of the box.
        left: first column.
        height: rows of the box, at least 1.
        width: columns.
        size: side of the square in pixels, at least 1.

    Returns:
        uint8 [size, size, 3], a copy.

    Raises:
        ValueError: bad image or size, or a box that is not within the image.
    """
    image = checked(image)
    _check_size(size)
    rows, columns = image.shape[:2]
    if not (0 <= top < top + height <= rows and 0 <= left < left + width <= columns):
        raise ValueError(
            f"box of {height} x {width} pixels at row {top}, column {left}: expected one within "
            f"the image of {rows} x {columns}"
        )
    box = Image.fromarray(image[top : top + height, left : left + width])
    return np.array(box.resize((size, size), Image.Resampling.BILINEAR))


def center_crop(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Cuts out the central square, as torchvision's `CenterCrop(size)`; zeros where there is none.

    Args:
        image: uint8 [height, width, 3].
        size: side of the square in pixels, at least 1.

    Returns:
        uint8 [size, size, 3], a copy.

    Raises:
        ValueError: bad image or size.
    """
    image = checked(image)
    _check_size(size)
    missing = [max(0, size - side) for side in image.shape[:2]]
    padding = [(lack // 2, (lack + 1) // 2) for lack in missing]
    padded = np.pad(image, [*padding, (0, 0)])
    # Python's round: half to even, like torchvision.
    top, left = (round((side - size) / 2) for side in padded.shape[:2])
    return padded[top : top + size, left : left + size].copy()


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"size {size}: expected a number of pixels of at least 1")


def fit(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Brings an image to a network's input size: never stretched, and left alone if it has it.

    Args:
        image: uint8 [height, width, 3].
        size: side of the network's input in pixels.

    Returns:
        uint8 [size, size, 3]: the image itself, or its short side resized and its centre cut out.

    Raises:
        ValueError: bad image or size.
    """
    if image.shape[:2] == (size, size):
        return checked(image)
    return center_crop(resize_short_side(image, size), size)


def preprocess(
    image: UInt8[np.ndarray, "h w 3"], preprocessing: Preprocessing
) -> UInt8[np.ndarray, "size size 3"]:
    """Applies the transform of the ImageNet validation: resize the short side, cut out the centre.

    Args:
        image: uint8 [height, width, 3].
        preprocessing: gives `resize_size` and `image_size`.

    Returns:
        uint8 [image_size, image_size, 3], still to be normalised.

    Raises:
        ValueError: bad image.
    """
    return center_crop(
        resize_short_side(image, preprocessing.resize_size), preprocessing.image_size
    )


def normalize(
    images: Shaped[Any, "*batch h w 3"], preprocessing: Preprocessing
) -> Float32[Any, "*batch h w 3"]:
    """Divides by 255, subtracts the mean and divides by the standard deviation, per channel.

    Args:
        images: NumPy or JAX array with the channels last, 0 to 255, uint8 or float; also traced.
        preprocessing: gives `mean` and `std`.

    Returns:
        float32 of the same kind of array and the same shape.
    """
    shape = (1,) * (images.ndim - 1) + (3,)
    mean = np.asarray(preprocessing.mean, np.float32).reshape(shape)
    std = np.asarray(preprocessing.std, np.float32).reshape(shape)
    return (images.astype(np.float32) / np.float32(255) - mean) / std


def normalization_table(preprocessing: Preprocessing) -> Float32[np.ndarray, "256 3"]:
    """What `normalize` makes of each grey level in each channel, in NumPy's rounding.

    A compiler that fuses the three operations rounds them differently; two networks that agree to
    the last digit on the one input can disagree on the other, where Top-K meets near ties. Looking
    the value up on the device gives the host's bits on every backend.
    """
    levels = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2)
    return normalize(levels, preprocessing)[:, 0]


def list_images(folder: str | os.PathLike[str]) -> list[pathlib.Path]:
    """Returns the image files of a folder (not of its subfolders), sorted by name.

    Args:
        folder: where to look; hidden files and files without an image's suffix are left out.

    Raises:
        OSError: the folder is missing or cannot be read.
    """
    return sorted(
        path
        for path in files.local_path(folder).iterdir()
        if is_image_name(path.name) and path.is_file()
    )


def is_image_name(name: str) -> bool:
    """Says whether a file's name is that of an image: not hidden, with an image's suffix."""
    return pathlib.PurePath(name).suffix.lower() in _SUFFIXES and not name.startswith(".")


def map_parallel(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int | None = None,
    ahead: int = 64,
) -> Iterator[Result]:
    """Calls `function` on every item in threads and yields the results in order.

    Work starts with the first `next`. Pillow works outside Python's lock, so that threads are
    enough to decode while a device computes. An exception comes out where its result would have;
    closing the iterator, or leaving it after an exception, cancels what has not begun.

    Args:
        function: called from threads.
        items: taken one by one, in the caller's thread.
        workers: number of threads; one a processor by default.
        ahead: how many results may wait or be in work beyond the one that is being used.

    Returns:
        An iterator over the results.

    Raises:
        ValueError: `workers` or `ahead` below 1.
    """
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
        workers = workers or os.cpu_count() or 1
    if workers < 1 or ahead < 1:
        raise ValueError(f"workers={workers}, ahead={ahead}: expected at least 1 of each")
    return _map_parallel(function, iter(items), workers, ahead)


def _map_parallel(
    function: Callable[[Item], Result], items: Iterator[Item], workers: int, ahead: int
) -> Iterator[Result]:
    executor = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="map_parallel")
    pending: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
    try:
        for item in itertools.islice(items, ahead):
            pending.append(executor.submit(function, item))
        while pending:
            result = pending.popleft().result()
            for item in itertools.islice(items, 1):
                pending.append(executor.submit(function, item))
            yield result
    finally:
        executor.shutdown(cancel_futures=True)
