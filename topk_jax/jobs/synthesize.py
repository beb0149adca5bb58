"""Texture synthesis and reconstruction of a folder of pictures: files in, pictures and tables out.

Each target, mode and seed is one image, `<stem>_<objective>_<mode>_seed<k>.png`. An image that is
there is not made again; one that was interrupted goes on from its last snapshot, bit for bit as if
it had not been.
"""

import csv
import dataclasses
import hashlib
import itertools
import os
import pathlib
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import UInt8

from topk_jax import files, images, parallel, synthesis
from topk_jax.jobs import provenance
from topk_jax.networks import FeatureExtractor
from topk_jax.stimuli import builtin
from topk_jax.synthesis import lbfgs, objectives
from topk_jax.synthesis.objectives import Mode
from topk_jax.synthesis.presets import ObjectiveKind, Preset

MODES: tuple[Mode, ...] = ("all", "top", "rest")
BUILTIN = "builtin"
"""Name of the built-in targets."""

_BUILTIN_TARGETS = (1, 4, 7)  # categories, one picture each
_SNAPSHOTS = "snapshots"
_LOSSES = "losses.csv"
_COLUMNS = ("image", "iteration", "evaluation", "loss")


@dataclasses.dataclass(frozen=True)
class Target:
    """A picture that images are made of.

    Attributes:
        stem: What its results are called by.
        pixels: The picture at the size of the results.
        sha256: Of the pixels as they were read, before they were resized.
    """

    stem: str
    pixels: UInt8[np.ndarray, "h w 3"]
    sha256: str


@dataclasses.dataclass(frozen=True)
class Image:
    """One image to be made.

    Attributes:
        target: What of.
        objective: "texture" or "reconstruction".
        mode: "all", "top" or "rest".
        seed: Of the noise.
    """

    target: Target
    objective: ObjectiveKind
    mode: Mode
    seed: int

    @property
    def name(self) -> str:
        """Name of its file, without the extension."""
        return f"{self.target.stem}_{self.objective}_{self.mode}_seed{self.seed}"


def setting_of(preset: str, **changes: Any) -> Preset:
    """A preset with those of its fields changed that are not None."""
    given = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(synthesis.find_preset(preset), **given)


def list_layers(preset: Preset) -> list[str]:
    """Lines that name every feature of a preset's network, those that it compares marked."""
    return [
        f"{name}{'  *' if name in preset.layers else ''}" for name in preset.network().feature_names
    ]


def read_targets(source: str | os.PathLike[str], preset: Preset) -> list[Target]:
    """The targets that `--input` names: "builtin", a picture, or all pictures of a folder.

    Raises:
        ValueError: No pictures, a damaged one, one of a single colour, or two whose results would
            have the same name.
        OSError: What cannot be read.
    """
    targets = []
    for stem, pixels in _read(source):
        if np.all(pixels == pixels[:1, :1]):
            raise ValueError(f"{stem}: a picture of one colour: there is nothing to synthesise")
        digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
        targets.append(Target(stem, synthesis.fit_target(pixels, preset), digest))
    return targets


def _read(source: str | os.PathLike[str]) -> Iterator[tuple[str, UInt8[np.ndarray, "h w 3"]]]:
    if source == BUILTIN:
        stimuli = builtin.builtin_congruent(seed=0, per_category=1)
        yield from ((stimuli.category[i], stimuli.load(i)) for i in _BUILTIN_TARGETS)
        return
    path = files.local_path(source)
    paths = images.list_images(path) if path.is_dir() else [path]
    if not paths:
        raise ValueError(f"{path}: no pictures there (.png, .jpg and the like)")
    stems: dict[str, pathlib.Path] = {}
    for file in paths:
        other = stems.setdefault(file.stem, file)
        if other != file:
            raise ValueError(
                f"{path}: {other.name} and {file.name} would share their results' names; rename one"
            )
    yield from zip(stems, images.map_parallel(images.read_image, paths), strict=True)


def run(
    output_dir: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] = BUILTIN,
    preset: str = "builtin",
    weights: str | os.PathLike[str] | None = None,
    objective: ObjectiveKind | None = None,
    modes: Sequence[Mode] = MODES,
    sparsity: float | None = None,
    layers: Sequence[str] | None = None,
    size: int | tuple[int, int] | None = None,
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    max_evaluations: int | None = None,
    memory_size: int = 100,
    mask_image: bool = False,
    histogram_match: bool = True,
    histogram_bins: int | None = None,
    snapshot_every: int = 100,
    devices: list[parallel.Device] | None = None,
    progress: Callable[..., Any] | None = None,
    report: Callable[[str], None] = logging.info,
) -> dict[str, Any]:
    """Makes every image, writes all into `output_dir` and returns the summary.

    Args:
        output_dir: Run folder; continued if it holds this very command, refused if another.
        source: "builtin", a picture or a folder of pictures.
        preset: Name of a preset, or of a VGG or AlexNet.
        weights: Tag of the catalogue or a file; None is the preset's.
        objective: "texture" or "reconstruction"; None is the preset's.
        modes: Which activations count, one image each.
        sparsity: Part of each feature map that is the top; None is the preset's.
        layers: Features compared; None is the preset's.
        size: (height, width), or the short side; None is the preset's.
        seeds: Of the noise, one image each.
        steps: Iterations at most; None is no limit.
        max_evaluations: Evaluations at most; None is the preset's.
        memory_size: Pairs that L-BFGS keeps.
        mask_image: Reconstruction compares the target's positions alone.
        histogram_match: Give the result the target's distribution of grey levels.
        histogram_bins: Of that distribution; None is one for each grey level.
        snapshot_every: Evaluations between snapshots; 0 for none.
        devices: One image at a time on each; all local ones by default.
        progress: `progress(iterable, total=, desc=, unit=, position=, note=)` wraps each search.
        report: Is given each line of what a reader wants to see.

    Raises:
        ValueError: Bad input; OSError: what cannot be read, downloaded or written.
        FloatingPointError: An objective that is not finite at the start.
    """
    setting = setting_of(
        preset,
        layers=tuple(layers) if layers else None,
        size=size,
        sparsity=sparsity,
        objective=objective,
        max_evaluations=max_evaluations,
    )
    # All that can be said of the command is said before a folder belongs to it.
    for mode in modes:
        objectives.check_mask(mode, setting.sparsity)
    if mask_image and setting.objective == "texture":
        raise ValueError(
            "mask_image is for reconstruction: a texture masks the image by its own Top-K"
        )
    loaded = synthesis.load_weights(setting, weights=weights)
    targets = read_targets(source, setting)
    network = FeatureExtractor(setting.network(), setting.layers)
    for height, width, _ in {target.pixels.shape for target in targets}:
        shape = jax.ShapeDtypeStruct((1, height, width, 3), np.float32)
        jax.eval_shape(network, loaded.variables, shape)  # too small for a pool?
    todo = [
        Image(target, setting.objective, mode, seed)
        for target, seed, mode in itertools.product(targets, seeds, modes)
    ]
    flags = {
        "input": os.fspath(source),
        "preset": preset,
        "weights": os.fspath(weights or setting.weights),
        "objective": setting.objective,
        "mode": list(modes),
        "sparsity": setting.sparsity,
        "layers": list(setting.layers),
        "size": setting.size,
        "seeds": list(seeds),
        "steps": steps,
        "max_evaluations": setting.max_evaluations,
        "memory_size": memory_size,
        "mask_image": mask_image,
        "histogram_match": histogram_match,
        "histogram_bins": histogram_bins,
    }
    with files.run_folder(output_dir, flags) as folder:
        provenance.refuse_other_weights(folder, loaded.file)
        _refuse_other_targets(folder, targets)
        head = {
            "preset": preset,
            "weights": {"name": flags["weights"], "sha256": loaded.file.sha256},
            "targets": {target.stem: target.sha256 for target in targets},
            "versions": provenance.versions(),
        }
        report(
            f"weights {loaded.file.origin} ({loaded.file.sha256[:8]}), {len(targets)} targets, "
            f"{len(todo)} images: {setting.objective} of {', '.join(setting.layers)}"
        )
        rows = {row["image"]: row for row in (folder.previous or {}).get("images") or []}
        rows = {n: r for n, r in rows.items() if (folder.path / f"{n}.png").exists()}
        losses = _read_losses(folder.path / _LOSSES, rows)
        maker = _Maker(
            setting, loaded, folder.path,
            {"max_evaluations": setting.max_evaluations, "max_iterations": steps,
             "memory_size": memory_size},
            mask_image, histogram_match, histogram_bins, snapshot_every, progress,
        )  # fmt: skip
        folder.write_summary(head | {"images": list(rows.values())})
        missing = [image for image in todo if image.name not in rows]
        for image, (row, trace) in zip(
            missing, parallel.map_devices(maker.make, missing, devices=devices), strict=True
        ):
            rows[image.name] = row
            losses[image.name] = trace
            finished = [each.name for each in todo if each.name in rows]
            _write_losses(folder.path / _LOSSES, {name: losses[name] for name in finished})
            summary = head | {"images": [rows[name] for name in finished]}
            folder.write_summary(summary)
            report(format_row(row))
        summary = head | {"images": [rows[image.name] for image in todo]}
        folder.write_summary(summary)
        if len(modes) > 1:
            _draw_sheet(folder.path, todo, len(modes))
    return summary


def format_row(row: dict[str, Any]) -> str:
    """The printed line of a finished image."""
    return (
        f"{row['image']}: {row['evaluations']} evaluations, loss {row['first_loss']:.4g} -> "
        f"{row['final_loss']:.4g} ({row['status']}), {row['seconds']:.0f} s; distance to the "
        f"target: Gram {row['gram_distance']:.3g}, activations {row['activation_distance']:.3g}"
    )


class _Maker:
    """Makes one image at a time on a device; what all images share is made once a device."""

    def __init__(
        self,
        preset: Preset,
        weights: synthesis.Weights,
        folder: pathlib.Path,
        limits: dict[str, Any],
        mask_image: bool,
        histogram_match: bool,
        histogram_bins: int | None,
        snapshot_every: int,
        progress: Callable[..., Any] | None,
    ):
        self._preset = preset
        self._weights = weights
        self._folder = folder
        self._limits = limits
        self._mask_image = mask_image
        self._histogram_match = histogram_match
        self._histogram_bins = histogram_bins
        self._snapshot_every = snapshot_every
        self._progress = progress
        self._features: dict[Any, jax.tree_util.Partial] = {}

    def make(
        self, image: Image, device: parallel.Device, stop: threading.Event
    ) -> tuple[dict[str, Any], list[tuple[int, int, float]]]:
        """Makes an image and its file; returns its row of the summary and the trace of its loss."""
        with jax.default_device(device):
            if device not in self._features:
                self._features[device] = synthesis.extractor(self._preset, self._weights)
            return self._make(image, self._features[device], stop)

    def _make(
        self, image: Image, features: jax.tree_util.Partial, stop: threading.Event
    ) -> tuple[dict[str, Any], list[tuple[int, int, float]]]:
        problem = synthesis.create_problem(
            self._preset,
            self._weights,
            image.target.pixels,
            objective=image.objective,
            mode=image.mode,
            mask_image="target" if self._mask_image else "none",
            features=features,
        )
        state, trace, before = self._resumed(image)
        start = time.monotonic()
        states = synthesis.search(jax.random.key(image.seed), problem, resume=state, **self._limits)
        if self._progress is not None:
            states = self._progress(
                states,
                total=self._limits["max_evaluations"],
                desc=image.name,
                unit="evaluation",
                position=lambda state: state.evaluations,
                note=lambda state: f"loss {problem.published_loss(state.value):.4g}",
            )
        saved = state.evaluations if state else 0
        try:
            for state in states:
                if not trace or trace[-1][0] != state.iterations:
                    loss = problem.published_loss(state.value)
                    trace.append((state.iterations, state.evaluations, loss))
                due = self._snapshot_every and state.evaluations - saved >= self._snapshot_every
                if stop.is_set() or (due and state.status == "running"):
                    saved = state.evaluations
                    seconds = before + time.monotonic() - start
                    self._save(image, problem, state, trace, seconds)
                if stop.is_set():
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            # The picture; the state may have been given away to the iteration that was cut off.
            if state is not None:
                self._picture(image, problem, state)
            raise
        assert state is not None  # a search yields its start
        seconds = before + time.monotonic() - start
        picture = synthesis.picture(problem, state)
        if self._histogram_match:
            picture = synthesis.match_histograms(
                picture, image.target.pixels, bins=self._histogram_bins
            )
        row = {
            "image": image.name,
            "target": image.target.stem,
            "objective": image.objective,
            "mode": image.mode,
            "seed": image.seed,
            "iterations": state.iterations,
            "evaluations": state.evaluations,
            "first_loss": trace[0][2],
            "final_loss": problem.published_loss(state.value),
            "status": state.status,
            "seconds": seconds,
        } | synthesis.distances(self._preset, features, image.target.pixels, problem, state)
        images.write_image(self._folder / f"{image.name}.png", picture)
        self._state_file(image).unlink(missing_ok=True)
        return row, trace

    def _state_file(self, image: Image) -> pathlib.Path:
        return self._folder / _SNAPSHOTS / f"{image.name}.npz"

    def _picture(self, image: Image, problem: synthesis.Problem, state: lbfgs.State) -> None:
        name = f"{image.name}_{state.evaluations:06}.png"
        images.write_image(self._folder / _SNAPSHOTS / name, synthesis.picture(problem, state))

    def _save(
        self,
        image: Image,
        problem: synthesis.Problem,
        state: lbfgs.State,
        trace: list[tuple[int, int, float]],
        seconds: float,
    ) -> None:
        arrays: dict[str, Any] = lbfgs.state_to_arrays(state)
        with files.atomic_write(self._state_file(image)) as file:
            np.savez(file, trace=np.array(trace, np.float64), seconds=np.float64(seconds), **arrays)
        self._picture(image, problem, state)

    def _resumed(
        self, image: Image
    ) -> tuple[lbfgs.State | None, list[tuple[int, int, float]], float]:
        """The last snapshot, the trace up to it and the seconds it took; nothing where none is."""
        path = self._state_file(image)
        if not path.exists():
            return None, [], 0.0
        try:
            with open(path, "rb") as file, np.load(file) as archive:
                arrays = dict(archive)
            state = lbfgs.state_from_arrays(arrays)
            trace = [(int(i), int(e), float(loss)) for i, e, loss in arrays["trace"]]
            return state, trace, float(arrays["seconds"])
        except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
            logging.warning("%s: %s; the image is begun again", path, error)
            return None, [], 0.0


def _refuse_other_targets(folder: files.RunFolder, targets: Sequence[Target]) -> None:
    earlier = (folder.previous or {}).get("targets") or {}
    for target in targets:
        if earlier.get(target.stem, target.sha256) != target.sha256:
            raise ValueError(
                f"{folder.path}: made from another picture called {target.stem}; "
                "choose another output folder"
            )


def _read_losses(path: pathlib.Path, rows: dict[str, Any]) -> dict[str, list[Any]]:
    """Lines of the images that are finished, by image."""
    losses: dict[str, list[Any]] = {name: [] for name in rows}
    if path.exists():
        with open(path, encoding="utf-8", newline="") as file:
            for name, *point in csv.reader(file):
                if name in losses:
                    losses[name].append(point)
    return losses


def _write_losses(path: pathlib.Path, losses: Mapping[str, Sequence[Any]]) -> None:
    with files.atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows((name, *point) for name, trace in losses.items() for point in trace)


def _draw_sheet(folder: pathlib.Path, todo: Sequence[Image], modes: int) -> None:
    """Target and modes in a row, one row for each target and seed."""
    from topk_jax import figures

    shown, labels = [], []
    for i, image in enumerate(todo):
        if i % modes == 0:
            shown.append(image.target.pixels)
            labels.append(image.target.stem)
        shown.append(images.read_image(folder / f"{image.name}.png"))
        labels.append(f"{image.mode}, seed {image.seed}" if image.seed else image.mode)
    height, width = (max(picture.shape[axis] for picture in shown) for axis in (0, 1))
    cells = np.full((len(shown), height, width, 3), 255, np.uint8)
    for cell, picture in zip(cells, shown, strict=True):
        top, left = (height - picture.shape[0]) // 2, (width - picture.shape[1]) // 2
        cell[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    sheet = figures.contact_sheet(cells, labels=labels, columns=1 + modes)
    figures.save(sheet, folder / "sheet")
