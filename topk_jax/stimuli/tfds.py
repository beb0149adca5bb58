"""Image classification sets of tensorflow-datasets, read without TensorFlow.

The set must have been prepared as array_record, the format with random access:
`tfds.builder(name, file_format="array_record").download_and_prepare()` (for some sets that takes
TensorFlow; reading does not).
"""

import itertools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from topk_jax import files, images
from topk_jax.stimuli.base import Stimuli, chosen_classes, listed

_CHUNK = 256  # records read at once for their labels
_ADVICE = 'prepare it with tfds.builder({!r}, file_format="array_record").download_and_prepare()'


def read_tfds(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
) -> Stimuli:
    """Reads the labels of a prepared set; the images are read and decoded when they are needed.

    The whole split is read once for its labels, which tensorflow-datasets keeps beside the images.

    Args:
        name: of the set, with its config and version where needed, as "imagenette/160px-v2".
        split: for example "train", "validation" or "train[:10%]".
        data_dir: folder of all sets; by default that of tensorflow-datasets
            (~/tensorflow_datasets).
        classes: names of the classes to use, in the order of the labels; all, in the order of the
            set, by default.

    Returns:
        Stimuli named after set and split, in the order of the split, called
        "<class>/<number in the split>".

    Raises:
        ValueError: the set is not there or not as array_record, has no such split, is not one of
            images with a class each, or has no images of a class of the list.
        OSError: what cannot be read.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    folder = None if data_dir is None else os.fspath(files.local_path(data_dir))
    advice = _ADVICE.format(name)
    try:
        # From its files alone: the code of a set may need TensorFlow, and is not needed.
        builder: Any = read_only_builder.builder_from_files(name, data_dir=folder)
    except ValueError as error:
        where = folder or "tensorflow-datasets' default folder"
        raise ValueError(f"{name}: not found in {where}; {advice}") from error
    info = builder.info
    image, label = _keys(name, info.features, tfds)
    decoders = {key: tfds.decode.SkipDecoding() for key in info.features if key != label}
    try:
        source = builder.as_data_source(split, decoders=decoders)
    except NotImplementedError as error:
        raise ValueError(
            f"{info.data_dir}: prepared as {info.file_format.value}, not as array_record; {advice}"
        ) from error
    except ValueError as error:
        splits = ", ".join(sorted(info.splits))
        raise ValueError(
            f"{name}: no split {split!r}; it has {splits} and parts of these"
        ) from error
    names = tuple(info.features[label].names)
    chosen = chosen_classes(classes, names, place=f"{name} {split}")
    labels = _labels(source, label)
    rows = np.flatnonzero(np.isin(labels, [names.index(each) for each in chosen])).tolist()
    category = tuple(names[labels[row]] for row in rows)
    missing = sorted(set(chosen) - set(category))
    if classes is not None and missing:
        raise ValueError(f"{name} {split}: no images of {listed(missing)}")
    width = len(str(max(0, len(labels) - 1)))
    image_names = tuple(f"{each}/{row:0{width}}" for each, row in zip(category, rows, strict=True))

    def load(index: int) -> UInt8[np.ndarray, "h w 3"]:
        data = source[rows[index]][image]
        return images.decode_image(data, name=f"{info.full_name} {split} {image_names[index]}")

    return Stimuli(
        name=f"{info.name}-{split}",
        categories=chosen,
        image_names=image_names,
        category=category,
        condition=("NaN",) * len(rows),
        load=load,
        origin=f"{info.data_dir} {split}",
    )


def _keys(name: str, features: Any, tfds: Any) -> tuple[str, str]:
    """Under which keys a record has its image and its class."""
    found = [
        [key for key, feature in features.items() if isinstance(feature, kind)]
        for kind in (tfds.features.Image, tfds.features.ClassLabel)
    ]
    if any(len(keys) != 1 for keys in found):
        raise ValueError(
            f"{name}: records of {listed(sorted(features))}; "
            "expected exactly one image and one class label"
        )
    return found[0][0], found[1][0]


def _labels(source: Any, key: str) -> Int[np.ndarray, " n"]:
    def of_chunk(start: int) -> list[int]:
        rows = range(start, min(start + _CHUNK, len(source)))
        return [int(record[key]) for record in source.__getitems__(list(rows))]

    chunks = images.map_parallel(of_chunk, range(0, len(source), _CHUNK))
    return np.fromiter(itertools.chain.from_iterable(chunks), np.int64, len(source))
