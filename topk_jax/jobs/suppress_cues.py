"""A folder of images, once more for each suppressed cue: `<word>/<class>/<stem>.png`.

Each `<word>` is a folder of class folders of its own, to be read by `read_image_folder`. Images
that are there are not made again.
"""

import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import UInt8

from topk_jax import files, images
from topk_jax.jobs import provenance
from topk_jax.stimuli import Stimuli, read_image_folder
from topk_jax.stimuli.suppression import Suppression, parse_suppression

WORDS = ("gray", "blur1", "blur2", "bilateral", "shuffle4")

_SHEET = "sheet"
_EXAMPLES = 6  # rows of the sheet
_CELL = 224  # pixels of the sheet's pictures, where they have no common size


def read_input(folder: str | os.PathLike[str]) -> Stimuli:
    """The images of a folder: those in its class folders or, if it has no folders, its own.

    Raises:
        OSError: The folder is missing or cannot be read.
        ValueError: It has no images.
    """
    folder = files.local_path(folder)
    names: list[str] = []
    if folder.is_dir() and not any(_is_visible_folder(path) for path in folder.iterdir()):
        names = [path.name for path in images.list_images(folder)]
    if not names:
        return read_image_folder(folder)
    name = folder.resolve().name
    return Stimuli(
        name=name,
        categories=(name,),
        image_names=tuple(names),
        category=(name,) * len(names),
        condition=("NaN",) * len(names),
        load=lambda index: images.read_image(folder / names[index]),
        origin=str(folder),
    )


def _is_visible_folder(path: pathlib.Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def run(
    output_dir: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str],
    words: Sequence[str] = WORDS,
    image_size: int = 224,
    seed: int = 0,
    strict: bool = False,
    progress: Callable[..., Any] | None = None,
    report: Callable[[str], None] = logging.info,
) -> dict[str, Any]:
    """Makes every image that is not there yet, draws the sheet and returns the summary.

    Args:
        output_dir: Run folder; continued if it holds this very command, refused if another.
        source: Folder of class folders, or of images.
        words: Suppressions, as `parse_suppression` reads them.
        image_size: Short side and width of the central square, pixels; 0 leaves images as they are.
        seed: Of the order of shuffled tiles.
        strict: Stop at an image that cannot be read, rather than leave it out with a warning.
        progress: `progress(iterable, total=, desc=, unit=)` wraps the images.
        report: Is given each line of what a reader wants to see.

    Returns:
        {data: {origin, n_images, names_sha256}, versions, n_written, n_kept, damaged: {name: why}};
        n_written counts files, n_kept those that were there.

    Raises:
        ValueError: Bad input, or no image can be read; OSError: what cannot be read or written.
    """
    suppressions = [parse_suppression(word) for word in words]
    if not suppressions or len(set(suppressions)) != len(suppressions):
        raise ValueError(f"suppress={','.join(words)}: expected some, each once")
    if image_size < 0:
        raise ValueError(f"image_size={image_size}: expected pixels, or 0 to leave images alone")
    if image_size:
        for suppression in suppressions:
            suppression.check_size(image_size, image_size)
    stimuli = read_input(source)
    _refuse_equal_stems(stimuli)
    flags = {
        "input": os.fspath(source),
        "suppress": [suppression.word for suppression in suppressions],
        "image_size": image_size,
        "seed": seed,
    }
    names = "\n".join(stimuli.image_names)
    data = {
        "origin": stimuli.origin,
        "n_images": len(stimuli),
        "names_sha256": hashlib.sha256(names.encode()).hexdigest(),
    }
    with files.run_folder(output_dir, flags) as folder:
        _refuse_other_images(folder, data)
        head = {"data": data, "versions": provenance.versions()}
        folder.write_summary(head)
        size = f"{image_size} x {image_size} pixels" if image_size else "their own size"
        report(
            f"{len(stimuli)} images of {stimuli.origin} at {size}: "
            f"{', '.join(suppression.word for suppression in suppressions)}"
        )
        maker = _Maker(stimuli, suppressions, folder.path, image_size, seed, strict)
        made = images.map_parallel(maker.make, range(len(stimuli)))
        if progress is not None:
            made = progress(made, total=len(stimuli), desc="suppress cues", unit="image")
        damaged: dict[str, str] = {}
        written = 0
        for name, result in zip(stimuli.image_names, made, strict=True):
            if isinstance(result, int):
                written += result
            else:
                logging.warning("%s; left out", result)
                damaged[name] = result
        if len(damaged) == len(stimuli):
            raise ValueError(f"{stimuli.origin}: none of {len(stimuli)} images can be read")
        kept = (len(stimuli) - len(damaged)) * len(suppressions) - written
        summary = head | {"n_written": written, "n_kept": kept, "damaged": damaged}
        folder.write_summary(summary)
        _draw_sheet(maker, [i for i, n in enumerate(stimuli.image_names) if n not in damaged])
        report(
            f"{written} files written, {kept} were there, "
            f"{len(damaged)} of {len(stimuli)} images left out"
        )
    return summary


class _Maker:
    """Makes the files of one image at a time; called from several threads."""

    def __init__(
        self,
        stimuli: Stimuli,
        suppressions: Sequence[Suppression],
        folder: pathlib.Path,
        image_size: int,
        seed: int,
        strict: bool,
    ):
        self.stimuli = stimuli
        self.suppressions = suppressions
        self.folder = folder
        self._image_size = image_size
        self._seed = seed
        self._strict = strict

    def load(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """An image at its final size, all cues in place."""
        image = self.stimuli.load(index)
        return images.fit(image, self._image_size) if self._image_size else image

    def path(self, suppression: Suppression, index: int) -> pathlib.Path:
        """The file of an image."""
        name = pathlib.PurePosixPath(self.stimuli.image_names[index])
        return self.folder / suppression.word / name.with_name(f"{name.stem}.png")

    def make(self, index: int) -> int | str:
        """Makes the missing files of an image; returns their number, or why it cannot be read."""
        missing = [each for each in self.suppressions if not self.path(each, index).exists()]
        if not missing:
            return 0
        try:
            image = self.load(index)
        except (OSError, ValueError) as error:
            if self._strict:
                raise
            return " ".join(str(error).split())
        for each in missing:
            result = each.apply(image, image_name=self.stimuli.image_names[index], seed=self._seed)
            images.write_image(self.path(each, index), result)
        return len(missing)


def _refuse_equal_stems(stimuli: Stimuli) -> None:
    first: dict[pathlib.PurePosixPath, str] = {}
    for name in stimuli.image_names:
        other = first.setdefault(pathlib.PurePosixPath(name).with_suffix(""), name)
        if other != name:
            raise ValueError(
                f"{stimuli.origin}: {other} and {name} would share their results' names; rename one"
            )


def _refuse_other_images(folder: files.RunFolder, data: dict[str, Any]) -> None:
    earlier = (folder.previous or {}).get("data") or data
    if earlier["names_sha256"] != data["names_sha256"]:
        raise ValueError(
            f"{folder.path}: made from {earlier['n_images']} images, {data['origin']} now has "
            f"{data['n_images']} or others; choose another output folder"
        )


def _draw_sheet(maker: _Maker, readable: Sequence[int]) -> None:
    """One image a row, first as it is; of different classes where there are some."""
    from topk_jax import figures

    of_class: dict[str, int] = {}
    for index in readable:
        of_class.setdefault(maker.stimuli.category[index], index)
    candidates = list(of_class.values()) if len(of_class) > 1 else readable
    chosen = np.linspace(0, len(candidates) - 1, min(_EXAMPLES, len(candidates)))
    shown, labels = [], []
    for index in (candidates[round(place)] for place in chosen.tolist()):
        shown.append(maker.load(index))
        labels.append(maker.stimuli.category[index])
        for each in maker.suppressions:
            shown.append(images.read_image(maker.path(each, index)))
            labels.append(each.word)
    if len({picture.shape for picture in shown}) > 1:
        shown = [images.fit(picture, _CELL) for picture in shown]
    sheet = figures.contact_sheet(
        np.stack(shown), labels=labels, columns=1 + len(maker.suppressions)
    )
    figures.save(sheet, maker.folder / _SHEET)
