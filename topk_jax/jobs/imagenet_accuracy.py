"""Accuracy of a network on ImageNet's classes, plain and with Top-K: is this network what it says?

The published top-1 and top-5 accuracies check weights, preprocessing and architecture at once, and
show what Top-K costs. With an output folder `summary.json` is written; subjects that it has already
are not evaluated again.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from absl import logging
from jaxtyping import Float, Int

from topk_jax import evaluation, files, images, metrics
from topk_jax.images import Preprocessing
from topk_jax.jobs import provenance, shape_bias
from topk_jax.jobs.shape_bias import Subject
from topk_jax.networks import create_network
from topk_jax.stimuli import Stimuli, imagenet
from topk_jax.weights import WeightsFile, default_preprocessing, load_variables, resolve_weights

Transform = Literal["none", "catalogue"]
TRANSFORMS: tuple[Transform, ...] = ("catalogue", "none")

_FIVE = 5


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """How often a network named the right one of 1,000 classes.

    Attributes:
        n_images: Images shown.
        n_top1: Images whose class got the largest logit.
        n_top5: Images whose class was among the five largest.
    """

    n_images: int
    n_top1: int
    n_top5: int

    def as_dict(self) -> dict[str, Any]:
        """The counts, both accuracies in [0, 1] and their Wilson intervals, for `summary.json`."""
        n = self.n_images
        return dataclasses.asdict(self) | {
            "top1": self.n_top1 / n,
            "top1_ci95": metrics.wilson_interval(self.n_top1, n),
            "top5": self.n_top5 / n,
            "top5_ci95": metrics.wilson_interval(self.n_top5, n),
        }


def ranks(
    logits: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    """How many classes come before the right one: 0 is top-1, below 5 is top-5.

    Of equal logits the class of the lowest number comes first.

    Args:
        logits: One row an image.
        labels: Number of the right class of each image.

    Raises:
        ValueError: NaN among the logits, or a class that they do not have.
    """
    classes = logits.shape[1]
    if np.isnan(logits).any():
        raise ValueError("NaN among the logits: the weights are damaged or do not fit the network")
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= classes:
        raise ValueError(f"labels from {labels.min()} to {labels.max()} for {classes} classes")
    right = np.take_along_axis(logits, labels[:, None], axis=1)
    earlier = np.arange(classes)[None] < labels[:, None]
    return ((logits > right) | ((logits == right) & earlier)).sum(axis=1)


def with_transform(stimuli: Stimuli, transform: Transform, preprocessing: Preprocessing) -> Stimuli:
    """The stimuli as a transform leaves them.

    Args:
        stimuli: Images of any size.
        transform: "catalogue" resizes the short side to `resize_size` and cuts out the centre, as
            the published accuracies have it. "none" leaves the images alone; the evaluation then
            fits those of another size than the network's, with a notice.
        preprocessing: Sizes of "catalogue".

    Raises:
        ValueError: Another transform.
    """
    if transform == "none":
        return stimuli
    if transform != "catalogue":
        raise ValueError(f"transform {transform!r}: expected {' or '.join(TRANSFORMS)}")
    return dataclasses.replace(
        stimuli, load=lambda index: images.preprocess(stimuli.load(index), preprocessing)
    )


def run(
    output_dir: str | os.PathLike[str] | None,
    *,
    data: str | os.PathLike[str],
    model: str = "alexnet",
    weights: str | os.PathLike[str] = "imagenet",
    sparsities: Sequence[float] = (),
    sites: Sequence[str] | None = None,
    rest: bool = False,
    transform: Transform = "catalogue",
    batch_size: int = 64,
    progress: Callable[..., Any] | None = None,
    report: Callable[[str], None] = logging.info,
) -> dict[str, Any]:
    """Evaluates the plain network, then one subject a fraction, and returns the summary.

    Args:
        output_dir: Run folder; continued if it holds this very command, refused if another. None or
            "" writes nothing.
        data: Folder `<WordNet id>/<image>`.
        model: Name of a network with ImageNet's classes.
        weights: A tag of the catalogue, or a file.
        sparsities: Kept fractions, see `shape_bias.subjects_of` for these three.
        sites: Names of the features made sparse.
        rest: Keep the complement.
        transform: See `with_transform`.
        batch_size: Images a call.
        progress: `progress(iterable, total=, desc=, unit=)` wraps the images of each subject.
        report: Is given each line of what a reader wants to see.

    Returns:
        {model, weights, data, transform, versions, subjects: [{subject, sparsity, rest, n_images,
        n_top1, n_top5, top1, top1_ci95, top5, top5_ci95}]}; sparsity 1.0 is the plain network.

    Raises:
        ValueError: Bad input; OSError: what cannot be read, downloaded or written.
    """
    subjects = shape_bias.subjects_of(model, sparsities, sites=sites, rest=rest)
    classes = create_network(model).num_classes
    if classes != imagenet.CLASSES:
        raise ValueError(
            f"{model} answers with {classes} classes, not with ImageNet's {imagenet.CLASSES}; "
            "choose another network, for example alexnet"
        )
    flags = {
        "model": model,
        "weights": os.fspath(weights),
        "data": os.fspath(data),
        "sparsity": list(sparsities),
        "sites": list(sites) if sites else None,
        "rest": rest,
        "transform": transform,
        "batch_size": batch_size,
    }
    preprocessing = default_preprocessing(model)
    stimuli = with_transform(imagenet.read_class_folders(data), transform, preprocessing)
    weights_file = resolve_weights(model, weights)
    head = {
        "model": model,
        "weights": {"name": os.fspath(weights), "sha256": weights_file.sha256},
        "data": {"origin": stimuli.origin, "n_images": len(stimuli)},
        "transform": transform,
        "versions": provenance.versions(),
    }
    rows: list[dict[str, Any]] = []
    with _folder(output_dir, flags) as folder:
        known = _rows_of(folder, weights_file, head["data"])
        variables = None
        report(f"weights {weights_file.origin} ({weights_file.sha256[:8]}), data {stimuli.origin}")
        for line in _heading(subjects, weights_file):
            report(line)
        for subject in subjects:
            row = known.get(subject.name)
            if row is None:
                variables = variables or load_variables(model, weights_file)
                accuracy = _evaluate(
                    model, subject, variables, stimuli, preprocessing, batch_size, progress
                )
                row = {"subject": subject.name, "sparsity": subject.sparsity, "rest": subject.rest}
                row |= accuracy.as_dict()
            rows.append(row)
            report(_format_row(row, subjects))
            if folder is not None:
                folder.write_summary(head | {"subjects": rows})
    return head | {"subjects": rows}


def _evaluate(
    model: str,
    subject: Subject,
    variables: Any,
    stimuli: Stimuli,
    preprocessing: Preprocessing,
    batch_size: int,
    progress: Callable[..., Any] | None,
) -> Accuracy:
    network = create_network(model, topk=subject.sites)

    def predict(variables: Any, batch: Any) -> Any:
        return network.apply(variables, batch, train=False)[0]

    def show(items: Iterable[Any]) -> Iterable[Any]:
        if progress is None:
            return items
        return progress(items, total=len(stimuli), desc=subject.name, unit="image")

    number = {wnid: index for index, wnid in enumerate(stimuli.categories)}
    labels = np.array([number[wnid] for wnid in stimuli.category])
    found: list[np.ndarray] = []
    done = 0
    for logits in evaluation.predict_logits(
        predict,
        stimuli,
        variables=variables,
        preprocessing=preprocessing,
        batch_size=batch_size,
        progress=show,
    ):
        found.append(ranks(logits, labels[done : done + len(logits)]))
        done += len(logits)
    before = np.concatenate(found)
    return Accuracy(len(before), int((before < 1).sum()), int((before < _FIVE).sum()))


@contextlib.contextmanager
def _folder(
    path: str | os.PathLike[str] | None, flags: dict[str, Any]
) -> Iterator[files.RunFolder | None]:
    if not path:
        yield None
        return
    with files.run_folder(path, flags) as folder:
        yield folder


def _rows_of(
    folder: files.RunFolder | None, weights: WeightsFile, data: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Subjects that an earlier run of the same command has finished."""
    if folder is None or folder.previous is None:
        return {}
    provenance.refuse_other_weights(folder, weights)
    earlier = folder.previous.get("data")
    if earlier not in (None, data):
        raise ValueError(
            f"{folder.path}: made with {earlier['n_images']} images, {data['origin']} now has "
            f"{data['n_images']}; choose another output folder"
        )
    return {row["subject"]: row for row in folder.previous.get("subjects", [])}


def _width(subjects: Sequence[Subject]) -> int:
    return max(len("subject"), *(len(subject.name) for subject in subjects))


def _heading(subjects: Sequence[Subject], weights: WeightsFile) -> list[str]:
    lines = []
    entry = weights.entry
    if entry is not None and entry.top1 is not None:
        lines.append(
            f"published for these weights on the 50,000 validation images: top-1 {entry.top1} %, "
            f"top-5 {entry.top5} %"
        )
    column = f"{'% [95 % interval] (right of n)':35}"
    return [*lines, f"{'subject':{_width(subjects)}}  top-1 {column}  top-5 {column}".rstrip()]


def _format_row(row: dict[str, Any], subjects: Sequence[Subject]) -> str:
    """One line of the printed table."""

    def accuracy(name: str) -> str:
        low, high = row[f"{name}_ci95"]
        right = f"({row[f'n_{name}']} of {row['n_images']})"
        return f"{100 * row[name]:5.1f} % [{100 * low:.1f}, {100 * high:.1f}] {right}"

    name = f"{row['subject']:{_width(subjects)}}"
    return f"{name}  {accuracy('top1'):41}  {accuracy('top5')}"
