"""The images of a run: trained on, validated on, and those that the shape bias is asked of."""

import dataclasses
import os
import pathlib
from collections.abc import Callable

from topk_jax import images
from topk_jax import stimuli as sets
from topk_jax.decisions import IMAGENET16, CategoryMapping, identity_mapping
from topk_jax.stimuli import Stimuli, builtin
from topk_jax.training.augmentation import Augmentation
from topk_jax.training.settings import Data

CLEAN = "clean"
"""Name of the first validation set."""

Progress = Callable[..., object]


@dataclasses.dataclass(frozen=True)
class Datasets:
    """Where the images of a run are; none has been read yet.

    Attributes:
        classes: Names of the classes, in the order of the labels.
        training: Gives the training images; draws or decodes them all where the run says so.
        validation: Name -> images at the network's input size, "clean" (or "congruent") first.
        cue_conflict: For the shape bias.
        mapping: Categories of those.
    """

    classes: tuple[str, ...]
    training: Callable[[], Stimuli]
    validation: dict[str, Stimuli]
    cue_conflict: Stimuli | None
    mapping: CategoryMapping


def find_datasets(data: Data, *, seed: int = 0) -> Datasets:
    """Finds the images of a run; what is missing or does not fit together is an error here.

    Args:
        data: Names them.
        seed: Of drawn images and of shuffled patches. What a long-tailed set keeps is always the
            same.

    Raises:
        OSError: A folder or file is missing or cannot be read.
        ValueError: Folders without images, folders of other classes, or an unknown suppression.
    """
    if data.source == "builtin":
        training, validation = _builtin(data, seed)
        classes = builtin.BUILTIN_CATEGORIES
    else:
        train, clean = (_read(data, part) for part in (data.train, data.validation))
        further = {name: _named(data, where) for name, where in data.further.items() if where}
        sets.check_same_classes(train, clean, *further.values())
        classes = train.categories
        if data.long_tail > 1:
            train = sets.long_tailed(train, data.long_tail)

        def training() -> Stimuli:
            return sets.in_memory(train) if data.in_memory else train

        validation = {
            name: _at_input_size(stimuli, data)
            for name, stimuli in ({CLEAN: clean} | further).items()
        }
    first = next(iter(validation))
    for word in data.suppressed:
        suppressed = sets.suppress(validation[first], word, seed=seed)
        validation[word] = sets.in_memory(suppressed) if data.in_memory else suppressed
    conflict = None
    if data.cue_conflict == "builtin":
        conflict = builtin.builtin_cue_conflict(seed=data.builtin_test_seed)
    elif data.cue_conflict:
        conflict = sets.read_cue_conflict(data.cue_conflict)
    mapping = IMAGENET16 if data.mapping == "imagenet16" else identity_mapping(classes)
    return Datasets(classes, training, validation, conflict, mapping)


def make_augmentation(data: Data) -> Augmentation:
    """What is done to training images."""
    return Augmentation(crop=data.crop, flip=data.flip, size=data.image_size, padding=data.padding)


def _builtin(data: Data, seed: int) -> tuple[Callable[[], Stimuli], dict[str, Stimuli]]:
    def training() -> Stimuli:
        pixels, labels = builtin.builtin_training_images(
            data.builtin_images, seed=seed, shares=data.builtin_shares
        )
        categories = builtin.BUILTIN_CATEGORIES
        return sets.from_arrays(pixels, labels, categories, name="builtin")

    draws = (builtin.builtin_congruent, builtin.builtin_silhouettes, builtin.builtin_textures)
    tests = [
        draw(seed=data.builtin_test_seed, per_category=data.builtin_test_per_category)
        for draw in draws
    ]
    return training, {stimuli.name: stimuli for stimuli in tests}


def _read(data: Data, part: str) -> Stimuli:
    classes = data.classes or None
    if data.source == "tfds":
        return sets.read_tfds(data.path, part, classes=classes)
    if data.source == "zip":
        archive, colon, inside = part.rpartition(":")
        path = pathlib.Path(data.path)
        path = path.parent / archive if colon else path
        return sets.read_image_zip(path, folder=inside, classes=classes)
    return sets.read_image_folder(os.path.join(data.path, part), classes=classes)


def _named(data: Data, where: str) -> Stimuli:
    """A further validation set: a folder, or `archive.zip:folder`."""
    archive, colon, inside = where.rpartition(":")
    classes = data.classes or None
    if colon and archive.endswith(".zip"):
        return sets.read_image_zip(archive, folder=inside, classes=classes)
    return sets.read_image_folder(where, classes=classes)


def _at_input_size(stimuli: Stimuli, data: Data) -> Stimuli:
    preprocessing = data.preprocessing
    fitted = dataclasses.replace(
        stimuli, load=lambda index: images.preprocess(stimuli.load(index), preprocessing)
    )
    return sets.in_memory(fitted) if data.in_memory else fitted
