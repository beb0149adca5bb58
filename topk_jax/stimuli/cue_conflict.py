"""The cue-conflict images of Geirhos et al. (ICLR 2019): one thing's shape, another's texture.

On the disk: `<shape>/<shape><i>-<texture><j>.png`, one folder a shape category. The real set has
1,280 images of 224 x 224 pixels, 80 for each of 16 shapes and 5 for each of the 256 pairs (80 of
the images have texture and shape of the same category).
"""

import collections
import difflib
import gzip
import itertools
import os
import pathlib
import tarfile
import tempfile
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from topk_jax import decisions, files, images
from topk_jax.stimuli.base import Stimuli

URL = "https://github.com/bethgelab/model-vs-human/releases/download/v0.1/cue-conflict.tar.gz"
"""The archive of the real set, as published with the model-vs-human benchmark (CC-BY-4.0)."""

_NAME = "cue-conflict"
_LAYOUT = "<shape>/<shape><number>-<texture><number>.png"
_IMAGES, _PER_SHAPE, _PER_PAIR, _SIDE = 1280, 80, 5, 224
_LARGEST_ARCHIVE = 2**30  # bytes unpacked; the real set has 136 MB


def read_cue_conflict(
    folder: str | os.PathLike[str], *, categories: Sequence[str] | None = None
) -> Stimuli:
    """Reads the names in a folder of cue-conflict images; the images are read when they are needed.

    All names are parsed and the header of every file is looked at before anything is returned.
    Hidden files are left out, and so are files beside the shapes' folders.

    Args:
        folder: has one folder a shape category, with files `<shape><number>-<texture><number>` of
            any image format.
        categories: the names that shapes and textures may have; by default those of the folders,
            sorted.

    Returns:
        Stimuli named "cue-conflict", sorted by folder, then by file name.

    Raises:
        OSError: the folder or a file is missing or cannot be read.
        ValueError: no images, a file that is no image, whose name does not parse, whose shape is
            not its folder's or whose texture is unknown, or folders within a shape's folder. The
            message names the file.
    """
    folder = files.local_path(folder)
    shapes = [path for path in _visible(folder) if path.is_dir()]
    if not shapes:
        raise ValueError(f"{folder}: no folders of images; expected {_LAYOUT}")
    known = tuple(categories or (path.name for path in shapes))
    for shape in shapes:
        if shape.name not in known:
            raise ValueError(f"{shape}: {_unknown('shape', shape.name, known)}")
    paths = [path for shape in shapes for path in _images_of_shape(shape, known)]

    def load(index: int) -> UInt8[np.ndarray, "h w 3"]:
        return images.read_image(paths[index])

    return Stimuli(
        name=_NAME,
        categories=known,
        image_names=tuple(path.name for path in paths),
        category=tuple(path.parent.name for path in paths),
        condition=("NaN",) * len(paths),
        load=load,
        origin=str(folder),
    )


def _visible(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _images_of_shape(folder: pathlib.Path, known: tuple[str, ...]) -> list[pathlib.Path]:
    """Returns the image files of one shape, checked."""
    paths = _visible(folder)
    if not paths:
        raise ValueError(f"{folder}: no images; expected {_LAYOUT}")
    for path in paths:
        if path.is_dir():
            raise ValueError(
                f"{path}: a folder where images were expected: {_LAYOUT}, "
                "without folders for sessions or datasets"
            )
    for path in paths:
        try:
            shape, _, texture, _ = decisions.parse_cue_conflict_name(path.name)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if shape != folder.name:
            raise ValueError(f"{path}: the name says {shape!r}, the folder {folder.name!r}")
        if texture not in known:
            raise ValueError(f"{path}: {_unknown('texture', texture, known)}")
        images.read_size(path)
    return paths


def _unknown(cue: str, name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"unknown {cue} category {name!r}{hint}; known are {', '.join(known)}"


def download_cue_conflict() -> pathlib.Path:
    """Fetches and unpacks the real set, once, into the cache folder of topk_jax.

    Returns:
        The folder, for `read_cue_conflict`. Everything in it has been checked: number, names and
        size of the images.

    Raises:
        OSError: it could not be fetched; the message says where to put the archive by hand.
        ValueError: the archive is damaged or is not the published set.
    """
    from topk_jax import download

    folder = download.cache_dir() / _NAME
    if not folder.exists():
        hint = "a folder of these images will also do"
        _unpack(download.fetch(URL, filename=f"{_NAME}.tar.gz", hint=hint), folder)
    _verify(folder)
    return folder


def _unpack(archive: pathlib.Path, folder: pathlib.Path) -> None:
    """Unpacks the archive's images as `folder`, which appears when it is complete and checked."""
    with tempfile.TemporaryDirectory(prefix=f".{_NAME}-", dir=folder.parent) as temporary:
        try:
            _extract(archive, pathlib.Path(temporary))
            _verify(pathlib.Path(temporary) / _NAME)
        except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{archive}: not the archive of the cue-conflict images ({reason}); "
                f"remove it and put {URL} in its place"
            ) from error
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(error.filename or folder)) from error
        try:
            os.rename(pathlib.Path(temporary) / _NAME, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise


def _extract(archive: pathlib.Path, folder: pathlib.Path) -> None:
    unpacked = 0
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            unpacked += max(member.size, 0)
            if unpacked > _LARGEST_ARCHIVE:
                raise ValueError("it unpacks to more than 1 GiB")
            if not member.isfile() and not member.isdir():
                raise ValueError(f"{member.name} is neither a file nor a folder")
            # Refuses absolute paths and paths out of the folder, drops owners and set-uid bits.
            tar.extract(member, folder, filter="data")


def _verify(folder: pathlib.Path) -> None:
    """Checks that a folder holds the real set, whole."""
    if not folder.is_dir():
        raise ValueError(f"it has no folder {folder.name}")
    stimuli = read_cue_conflict(folder)
    advice = "; remove the folder to have it made again"
    if len(stimuli) != _IMAGES:
        raise ValueError(f"{folder}: {len(stimuli)} images, expected {_IMAGES}{advice}")
    shapes, pairs = collections.Counter(stimuli.category), collections.Counter()
    for name in stimuli.image_names:
        shape, _, texture, _ = decisions.parse_cue_conflict_name(name)
        pairs[shape, texture] += 1
        path = folder / shape / name
        if path.suffix != ".png" or images.read_size(path) != (_SIDE, _SIDE):
            raise ValueError(f"{path}: expected a PNG of {_SIDE} x {_SIDE} pixels{advice}")
    for shape in stimuli.categories:
        if shapes[shape] != _PER_SHAPE:
            raise ValueError(
                f"{folder}: {shapes[shape]} images of {shape}, expected {_PER_SHAPE}{advice}"
            )
    for shape, texture in itertools.product(stimuli.categories, repeat=2):
        if pairs[shape, texture] != _PER_PAIR:
            raise ValueError(
                f"{folder}: {pairs[shape, texture]} images of {shape} with the texture of "
                f"{texture}, expected {_PER_PAIR}{advice}"
            )
