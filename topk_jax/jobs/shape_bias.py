"""The main job: the shape bias of a network, plain and with Top-K, from images to figures.

Writes `summary.json`, `raw-data/cue-conflict/*.csv` (one table a subject, in the benchmark's
format), the matrix plot, the box plot and a sheet of stimuli. Subjects whose table is there are not
evaluated again.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from topk_jax import decisions, files, images, metrics
from topk_jax.decisions import Aggregation, CategoryMapping, Trials
from topk_jax.jobs import provenance
from topk_jax.metrics import ShapeBias
from topk_jax.networks import create_network
from topk_jax.networks.sites import TopKSites
from topk_jax.stimuli import Stimuli, builtin, cue_conflict
from topk_jax.topk import TopK
from topk_jax.weights import default_preprocessing, load_variables, resolve_weights

HUMANS = "humans"
DATASET = "cue-conflict"
_SHEET = 48  # stimuli on the contact sheet


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network as it is evaluated.

    Attributes:
        name: `<model>`, `<model>-topk-<percent>` or `<model>-rest-<percent>`.
        sparsity: Kept fraction that its sites were given; 1.0 is the plain network.
        rest: The complement of the top is kept.
        sites: What `create_network` takes as `topk`.
    """

    name: str
    sparsity: float
    rest: bool
    sites: TopKSites


def subjects_of(
    model: str,
    sparsities: Sequence[float],
    *,
    sites: Sequence[str] | None = None,
    rest: bool = False,
    baseline: bool = True,
) -> list[Subject]:
    """The plain network (unless `baseline` is off), then one subject a fraction.

    Args:
        model: Name of a network.
        sparsities: Kept fractions in (0, 1]; 1 is the plain network (nothing, with `rest`).
        sites: Names of the features made sparse; None is the published sites.
        rest: Keep the complement instead.
        baseline: Put the plain network in front.

    Raises:
        ValueError: A fraction out of range, or an unknown model or site.
    """
    names = sites or create_network(model).published_sites
    subjects = [Subject(model, 1.0, False, None)] if baseline else []
    for sparsity in sparsities:
        if sparsity == 1 and not rest:
            if not baseline:
                subjects.append(Subject(model, 1.0, False, None))
            continue
        kind = "rest" if rest else "topk"
        layer = TopK(sparsity, keep="rest" if rest else "top", parent=None)
        name = f"{model}-{kind}-{format(100 * sparsity, 'g')}"
        subjects.append(Subject(name, sparsity, rest, dict.fromkeys(names, layer)))
    for subject in subjects:
        create_network(model, topk=subject.sites)
    return subjects


def load_stimuli(data: str | os.PathLike[str], mapping: CategoryMapping, *, seed: int) -> Stimuli:
    """The stimuli that `--data` names: "builtin", "cue-conflict" (downloaded once) or a folder."""
    if data == "builtin":
        return builtin.builtin_cue_conflict(seed=seed)
    folder = cue_conflict.download_cue_conflict() if data == DATASET else data
    return cue_conflict.read_cue_conflict(folder, categories=mapping.names)


def mapping_of(model: str) -> CategoryMapping:
    """Categories that a network's classes are mapped to."""
    if model == "builtin":
        return decisions.identity_mapping(builtin.BUILTIN_CATEGORIES)
    return decisions.IMAGENET16


def run(
    output_dir: str | os.PathLike[str],
    *,
    model: str = "builtin",
    weights: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    sparsities: Sequence[float] = (0.1,),
    baseline: bool = True,
    sites: Sequence[str] | None = None,
    rest: bool = False,
    aggregation: Aggregation = "mean",
    humans: str | os.PathLike[str] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[..., Any] | None = None,
    report: Callable[[str], None] = logging.info,
) -> dict[str, Any]:
    """Evaluates the subjects, writes everything into `output_dir` and returns the summary.

    Args:
        output_dir: Run folder; continued if it holds this very command, refused if another.
        model: Name of a network.
        weights: "builtin", "imagenet" or a file; the default is "builtin" for the built-in network,
            else "imagenet".
        data: "builtin", "cue-conflict" or a folder; the default is "builtin" for the built-in
            network, else "cue-conflict".
        sparsities: Kept fractions, see `subjects_of` for these five.
        baseline: The plain network is added.
        sites: Names of the features made sparse.
        rest: Keep the complement.
        aggregation: How the probabilities of a category's classes are combined.
        humans: Folder of the benchmark's CSVs of people, drawn and reported beside the networks.
        batch_size: Images a call.
        seed: Of the built-in stimuli and of the bootstrap.
        progress: `progress(iterable, total=, desc=, unit=)` wraps the images of each subject.
        report: Is given each line of what a reader wants to see.

    Raises:
        ValueError: Bad input; OSError: what cannot be read, downloaded or written.
    """
    weights = weights or ("builtin" if model == "builtin" else "imagenet")
    data = data or ("builtin" if model == "builtin" else DATASET)
    subjects = subjects_of(model, sparsities, sites=sites, rest=rest, baseline=baseline)
    mapping = mapping_of(model)
    flags = {
        "model": model,
        "weights": os.fspath(weights),
        "data": os.fspath(data),
        "sparsity": list(sparsities),
        "baseline": baseline,
        "sites": list(sites) if sites else None,
        "rest": rest,
        "aggregation": aggregation,
        "humans": os.fspath(humans) if humans else None,
        "batch_size": batch_size,
        "seed": seed,
    }
    people = _read_people(humans, mapping) if humans else None
    weights_file = resolve_weights(model, weights)
    stimuli = load_stimuli(data, mapping, seed=seed)
    with files.run_folder(output_dir, flags) as folder:
        provenance.refuse_other_weights(folder, weights_file)
        head = {
            "model": model,
            "weights": {"name": os.fspath(weights), "sha256": weights_file.sha256},
            "data": {"origin": stimuli.origin, "n_images": len(stimuli)},
            "aggregation": aggregation,
            "seed": seed,
            "versions": provenance.versions(),
        }
        report(f"weights {weights_file.origin} ({weights_file.sha256[:8]}), data {stimuli.origin}")
        folder.write_summary(head | {"subjects": []})
        load = functools.cache(lambda: load_variables(model, weights_file))
        measure = functools.partial(metrics.shape_bias, categories=mapping.names, seed=seed)
        results: dict[str, ShapeBias] = {}
        rows: list[dict[str, Any]] = []
        for subject in subjects:
            trials = _take_or_evaluate(
                folder.path / "raw-data" / DATASET,
                subject,
                stimuli,
                functools.partial(
                    _evaluate, model, load, mapping, aggregation, batch_size, progress
                ),
            )
            results[subject.name] = measure(trials)
            rows.append(
                {"subject": subject.name, "sparsity": subject.sparsity, "rest": subject.rest}
                | results[subject.name].as_dict()
            )
            folder.write_summary(head | {"subjects": rows})
        summary = head | {"subjects": rows}
        if people is not None:
            results[HUMANS] = measure(people)
            summary["humans"] = results[HUMANS].as_dict()
        _draw(folder.path, results, people, stimuli, measure)
        folder.write_summary(summary)
        for line in format_results(results):
            report(line)
    return summary


def format_results(results: Mapping[str, ShapeBias]) -> list[str]:
    """The printed table, one line a subject, then each subject's warnings."""
    width = max(len("subject"), *(len(name) for name in results))
    lines = [
        f"{'subject':{width}}  {'S':>5} {'X':>5} {'other':>5} decided  S/n    "
        "shape bias [95 % interval; by exemplar]       accuracy  congruent"
    ]
    for name, result in results.items():
        wilson = "[{:.3f}, {:.3f}".format(*result.shape_bias_ci95)
        clustered = "{:.3f}, {:.3f}]".format(*result.shape_bias_ci95_bootstrap)
        lines.append(
            f"{name:{width}}  {result.n_shape:5} {result.n_texture:5} {result.n_other:5} "
            f"{result.decided_fraction:7.3f}  {result.shape_fraction:.3f}  "
            f"{result.shape_bias:.3f} {wilson}; {clustered:28} "
            f"{result.accuracy:9.3f} {result.congruent_accuracy:9.3f}"
        )
    excluded = {result.n_excluded for result in results.values()}
    conflicts = {result.n_conflict for result in results.values()}
    if len(excluded) == 1:
        lines.append(
            f"of {next(iter(conflicts))} images in conflict; {next(iter(excluded))} with the same "
            "shape and texture are left out (congruent: accuracy on these)"
        )
    for name, result in results.items():
        lines.extend(f"warning: {name}: {warning}" for warning in result.warnings)
    return lines


def _evaluate(
    model: str,
    load: Callable[[], Any],
    mapping: CategoryMapping,
    aggregation: Aggregation,
    batch_size: int,
    progress: Callable[..., Any] | None,
    subject: Subject,
    stimuli: Stimuli,
) -> Trials:
    # Imported here: a run that finds all its tables draws them without starting a backend.
    from topk_jax import evaluation

    network = create_network(model, topk=subject.sites)

    def predict(variables: Any, batch: Any) -> Any:
        return network.apply(variables, batch, train=False)[0]

    def show(items: Any) -> Any:
        if progress is None:
            return items
        return progress(items, total=len(stimuli), desc=subject.name, unit="image")

    return evaluation.evaluate(
        predict,
        stimuli,
        variables=load(),
        mapping=mapping,
        aggregation=aggregation,
        preprocessing=default_preprocessing(model),
        batch_size=batch_size,
        subject=subject.name,
        progress=show,
    )


def _take_or_evaluate(
    folder: pathlib.Path,
    subject: Subject,
    stimuli: Stimuli,
    evaluate: Callable[[Subject, Stimuli], Trials],
) -> Trials:
    """The subject's table: the one that is there, or a new one, written before it is returned."""
    path = folder / decisions.trials_filename(DATASET, subject.name)
    if path.exists():
        trials = decisions.read_trials(path)
        if tuple(trials.imagename.tolist()) != stimuli.image_names:
            raise ValueError(
                f"{path}: its images are not those of {stimuli.origin}; "
                "choose another output folder, or remove the file to make it anew"
            )
        return trials
    trials = evaluate(subject, stimuli)
    decisions.write_trials(path, trials)
    return trials


def _read_people(folder: str | os.PathLike[str], mapping: CategoryMapping) -> Trials:
    """Trials of the people (`subject-NN`) among the CSVs of a folder."""
    trials = decisions.read_trials(folder)
    people = trials.select(np.char.startswith(trials.subj, "subject-"))
    if not len(people):
        raise ValueError(f"{folder}: no table of people there (subj: subject-01 and so on)")
    unknown = sorted({*people.category, *people.texture} - set(mapping.names))
    if unknown:
        raise ValueError(
            f"{folder}: these people saw {', '.join(unknown)}, which are not categories of the "
            f"network ({', '.join(mapping.names)})"
        )
    return people


def _draw(
    folder: pathlib.Path,
    results: Mapping[str, ShapeBias],
    people: Trials | None,
    stimuli: Stimuli,
    measure: Callable[..., ShapeBias],
) -> None:
    from topk_jax import figures

    figures.save(figures.shape_bias_matrix(results), folder / "shape_bias")
    boxes: dict[str, ShapeBias | list[ShapeBias]] = dict(results)
    if people is not None:
        persons = sorted(set(people.subj.tolist()))
        boxes[HUMANS] = [measure(people.select(people.subj == p), bootstrap=0) for p in persons]
    figures.save(figures.shape_bias_boxplot(boxes), folder / "shape_bias_boxplot")
    chosen = np.unique(np.linspace(0, len(stimuli) - 1, _SHEET).astype(int)).tolist()
    shown = [stimuli.load(index) for index in chosen]
    size = min(224, *(min(image.shape[:2]) for image in shown))
    sheet = figures.contact_sheet(
        np.stack([images.fit(image, size) for image in shown]),
        labels=[pathlib.PurePath(stimuli.image_names[index]).stem for index in chosen],
        columns=8,
        title=f"{len(chosen)} of {len(stimuli)} stimuli: shape-texture",
    )
    figures.save(sheet, folder / "stimuli")
