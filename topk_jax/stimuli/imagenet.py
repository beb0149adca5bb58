"""Photographs in ImageNet's layout: one folder a class, named by its WordNet id.

On the disk: `<wnid>/<image>`, for example `n01440764/ILSVRC2012_val_00000293.JPEG`, for any of the
1,000 classes of ILSVRC2012. The number of a class, by which networks answer, is the place of its
WordNet id among all 1,000 in ascending order.
"""

import difflib
import importlib.util
import os
import pathlib

from topk_jax import files, images
from topk_jax.stimuli import folders
from topk_jax.stimuli.base import Stimuli

CLASSES = 1000

_NAME = "imagenet"
_LAYOUT = "<WordNet id>/<image>, for example n01440764/ILSVRC2012_val_00000293.JPEG"
_PACKAGE = "tensorflow_datasets"
_LABELS = pathlib.PurePath("datasets", "imagenet2012", "labels.txt")


def imagenet_wnids() -> tuple[str, ...]:
    """Returns the WordNet ids of the 1,000 classes, class 0 first, from tensorflow-datasets' list.

    The package is looked up, not imported: importing it takes seconds.

    Raises:
        FileNotFoundError: the package or its list is not there.
        ValueError: the list is not one of 1,000 different names.
    """
    found = importlib.util.find_spec(_PACKAGE)
    for folder in (found.submodule_search_locations if found else None) or ():
        path = pathlib.Path(folder) / _LABELS
        if path.is_file():
            wnids = tuple(path.read_text(encoding="ascii").split())
            if len(set(wnids)) != CLASSES or len(wnids) != CLASSES:
                raise ValueError(f"{path}: {len(wnids)} names, expected {CLASSES}, all different")
            return wnids
    raise FileNotFoundError(
        f"the list of ImageNet's classes is missing ({_PACKAGE}/{_LABELS}); "
        "pip install tensorflow-datasets brings it"
    )


def read_class_folders(folder: str | os.PathLike[str]) -> Stimuli:
    """Reads the names of images sorted into ImageNet's classes; the images when they are needed.

    The header of every image is looked at before anything is returned. Hidden files and files
    without an image's suffix are left out, and so are files beside the classes' folders.

    Args:
        folder: has one folder a class, named by its WordNet id; any of the 1,000 may be missing.

    Returns:
        Stimuli named "imagenet", sorted by class, then by file name. Categories are all 1,000
        WordNet ids in the order of the classes; images are called "<WordNet id>/<file>", since
        files of different classes may share a name.

    Raises:
        OSError: the folder or a file is missing or cannot be read.
        ValueError: no folders, one that is no class or has no images, or a file that is no image.
    """
    folder = files.local_path(folder)
    wnids = imagenet_wnids()
    known = frozenset(wnids)
    found = [path.name for path in folders.class_folders(folder, layout=_LAYOUT)]
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(name, wnids, 1, cutoff=0.8)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(
                f"{folder / name}: no class of ImageNet has this name{hint}; expected {_LAYOUT}"
            )
    stimuli = folders.stimuli_in_folders(
        folder, found, name=_NAME, categories=wnids, layout=_LAYOUT
    )
    for _ in images.map_parallel(
        lambda image_name: images.read_size(folder / image_name), stimuli.image_names
    ):
        pass
    return stimuli
