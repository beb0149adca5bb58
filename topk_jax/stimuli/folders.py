"""Labelled images in folders, one folder a class, on the disk or inside a zip archive.

Images are decoded when they are loaded: reading a set looks at names alone, so that a large one is
there at once, and a damaged image is met where it is used.
"""

import os
import pathlib
import threading
import zipfile
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import UInt8

from topk_jax import files, images
from topk_jax.stimuli.base import Stimuli, chosen_classes, listed

LAYOUT = "<class>/<image>, for example cat/1.jpg"

_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_LARGEST_MEMBER = 2**30  # bytes unpacked; no image file comes near
# What zipfile raises on damaged archives and on members that it cannot unpack.
_DAMAGED = (
    zipfile.BadZipFile,
    ValueError,
    LookupError,
    EOFError,
    OverflowError,
    RuntimeError,  # encrypted, or of a newer version of the format
    zlib.error,
)
_APPLE_ATTRIBUTES = "__MACOSX"  # what macOS's archiver adds, named like the images beside it


def read_image_folder(
    folder: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
    name: str | None = None,
) -> Stimuli:
    """Reads the names of images sorted into folders, one a class; the images when they are needed.

    Hidden files, files without an image's suffix, files beside the classes' folders and folders
    within them are left out.

    Args:
        folder: has the classes' folders directly inside.
        classes: names of the folders to use, in the order of the labels; all of them, sorted, by
            default.
        name: of the set; by default that of the folder.

    Returns:
        Stimuli in the order of the classes, then of the file names, called "<class>/<file>".

    Raises:
        OSError: the folder is missing or cannot be read.
        ValueError: no folders, a class of the list that has none, or one without images.
    """
    folder = files.local_path(folder)
    found = [path.name for path in class_folders(folder)]
    return stimuli_in_folders(
        folder,
        chosen_classes(classes, found, place=str(folder)),
        name=folder.resolve().name if name is None else name,
    )


def class_folders(folder: str | os.PathLike[str], *, layout: str = LAYOUT) -> list[pathlib.Path]:
    """Returns the folders directly inside `folder`, sorted by name, hidden ones left out.

    Args:
        folder: where to look.
        layout: what was expected, for the errors.

    Raises:
        OSError: the folder is missing, is a file or cannot be read.
        ValueError: no folders inside.
    """
    folder = files.local_path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder; expected one with {layout}")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: a file; expected a folder with {layout}")
    found = sorted(
        path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir()
    )
    if not found:
        raise ValueError(f"{folder}: no folders of images; expected {layout}")
    return found


def stimuli_in_folders(
    folder: pathlib.Path,
    classes: Sequence[str],
    *,
    name: str,
    categories: Sequence[str] | None = None,
    layout: str = LAYOUT,
) -> Stimuli:
    """The images of some class folders, whose names are known.

    Args:
        folder: has the classes' folders directly inside.
        classes: folders to use, in order.
        name: of the set.
        categories: all names that an answer can have; those of the classes by default.
        layout: what was expected, for the errors.

    Raises:
        OSError: a folder is missing or cannot be read.
        ValueError: one without images.
    """

    def file_names(each: str) -> list[str]:
        return [path.name for path in _images_of_class(folder / each, layout)]

    listings = images.map_parallel(file_names, classes)
    image_names, category = _columns(zip(classes, listings, strict=True))

    def load(index: int) -> UInt8[np.ndarray, "h w 3"]:
        return images.read_image(folder / image_names[index])

    return Stimuli(
        name=name,
        categories=tuple(classes if categories is None else categories),
        image_names=image_names,
        category=category,
        condition=("NaN",) * len(image_names),
        load=load,
        origin=str(folder),
    )


def read_image_zip(
    path: str | os.PathLike[str],
    *,
    folder: str = "",
    classes: Sequence[str] | None = None,
    name: str | None = None,
) -> Stimuli:
    """Reads images sorted into class folders that lie in a zip archive, without unpacking it.

    Args:
        path: the archive; it stays open while the stimuli are in use.
        folder: where in the archive the classes' folders are: "train" for "train/cat/1.jpg", ""
            for "cat/1.jpg".
        classes: as `read_image_folder` has it.
        name: of the set; by default that of `folder`, or of the archive without its suffix.

    Returns:
        Stimuli as `read_image_folder` gives them; any number of threads may load at once.

    Raises:
        OSError: the archive is missing or cannot be read.
        ValueError: it is damaged or no zip archive, has no such folder, no images in class
            folders, no folder for a class of the list, or a class without images.
    """
    path = files.local_path(path)
    archive = _Archive(path)
    parts = [part for part in pathlib.PurePosixPath(folder).parts if part != "/"]
    place = "/".join([str(path), *parts])
    found = _classes_inside(archive.names, "".join(f"{part}/" for part in parts))
    if not any(found.values()):
        others = sorted(map(repr, _folders_of_classes(archive.names)))
        hint = f"; there are some with folder={listed(others)}" if others else ""
        raise ValueError(f"{place}: no folders of images; expected {LAYOUT}{hint}")
    chosen = chosen_classes(classes, sorted(found), place=place)
    for each in chosen:
        if not found[each]:
            raise ValueError(f"{place}/{each}: no images; expected {LAYOUT}")
    image_names, category = _columns((each, sorted(found[each])) for each in chosen)
    members = ["/".join([*parts, each]) for each in image_names]

    def load(index: int) -> UInt8[np.ndarray, "h w 3"]:
        member = members[index]
        return images.decode_image(archive.read(member), name=f"{path}/{member}")

    return Stimuli(
        name=name if name is not None else parts[-1] if parts else path.stem,
        categories=chosen,
        image_names=image_names,
        category=category,
        condition=("NaN",) * len(image_names),
        load=load,
        origin=place,
    )


def _images_of_class(folder: pathlib.Path, layout: str) -> list[pathlib.Path]:
    paths = images.list_images(folder)
    if not paths:
        inner = any(path.is_dir() for path in folder.iterdir())
        hint = "; it has folders, so perhaps it is the one to read" if inner else ""
        raise ValueError(f"{folder}: no images; expected {layout}{hint}")
    return paths


def _columns(
    listings: Iterable[tuple[str, Sequence[str]]],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names and categories of all images, from the file names of each class."""
    rows = [(f"{each}/{file}", each) for each, names in listings for file in names]
    return tuple(row[0] for row in rows), tuple(row[1] for row in rows)


def _classes_inside(members: Iterable[str], prefix: str) -> dict[str, list[str]]:
    """File names of the images in each folder that is directly below `prefix`, "" or "train/"."""
    found: dict[str, list[str]] = {}
    for member in members:
        if member.startswith(prefix):
            folder, slash, file = member[len(prefix) :].partition("/")
            if slash and folder and not folder.startswith(".") and folder != _APPLE_ATTRIBUTES:
                names = found.setdefault(folder, [])
                if "/" not in file and images.is_image_name(file):
                    names.append(file)
    return found


def _folders_of_classes(members: Iterable[str]) -> set[str]:
    """Where class folders with images lie, "" for the top of the archive."""
    paths = (member.split("/") for member in members)
    return {
        "/".join(path[:-2]) for path in paths if len(path) > 1 and images.is_image_name(path[-1])
    }


class _Archive:
    """A zip archive whose members can be read from any number of threads.

    ZipFile's own lock makes each piece that an open member reads a seek and a read in one; its
    count of open members has none, so that opening and closing are guarded here. Unpacking, the
    long part, happens outside of both locks.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._lock = threading.Lock()
        try:
            self._archive = zipfile.ZipFile(path)
            self.names = tuple(dict.fromkeys(self._archive.namelist()))
        except _DAMAGED as error:
            raise ValueError(f"{path}: damaged or not a zip archive: {_reason(error)}") from error
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error

    def read(self, member: str) -> bytes:
        """Returns the bytes of a member.

        Raises:
            OSError: the archive cannot be read.
            ValueError: the member is damaged, encrypted or far too large; the message names it.
        """
        try:
            info = self._archive.getinfo(member)
            if info.file_size > _LARGEST_MEMBER:
                raise ValueError(f"it unpacks to {info.file_size} bytes")
            if info.compress_type not in _COMPRESSIONS:
                raise ValueError("compressed as few can read; pack it stored or deflated")
            with self._lock:
                file = self._archive.open(info)
            try:
                return file.read()
            finally:
                with self._lock:
                    file.close()
        except (OSError, *_DAMAGED) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise OSError(error.errno, error.strerror, f"{self._path}/{member}") from error
            raise ValueError(
                f"{self._path}/{member}: cannot be unpacked: {_reason(error)}"
            ) from error


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
