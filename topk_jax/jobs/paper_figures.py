"""The panels of Li et al. 2023, Figures 2 and 3, for any pictures, with numbers beside the looking.

fig2 is texture synthesis, fig3 reconstruction: from all activations, from the Top-K, and from the
others. For each mode the table has the distances of `synthesis.distances` and, where a classifier
is given, how it names the results: by the class that it gives the target.
"""

import dataclasses
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Float32, UInt8

from topk_jax import figures, files, images
from topk_jax.jobs import synthesize
from topk_jax.networks import create_network
from topk_jax.synthesis.presets import ObjectiveKind
from topk_jax.weights import default_preprocessing, load_variables, resolve_weights

PRESETS: dict[str, tuple[str, ObjectiveKind]] = {
    "fig2": ("li2023", "texture"),
    "fig3": ("li2023_reconstruction", "reconstruction"),
}
_TITLES = {"all": "all activations", "top": "Top-K at {}", "rest": "all but the Top-K at {}"}


@dataclasses.dataclass(frozen=True)
class ModeSummary:
    """Means over the images of one mode.

    Attributes:
        mode: "all", "top" or "rest".
        n_images: Number of images.
        gram_distance: See `synthesis.distances`.
        activation_distance: See there.
        n_named: Images that the classifier gives the class of their target; None without one.
        probability: Mean probability of that class.
        target_probability: The same for the targets.
    """

    mode: str
    n_images: int
    gram_distance: float
    activation_distance: float
    n_named: int | None
    probability: float | None
    target_probability: float | None


def run(
    figure: str,
    output_dir: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str],
    weights: str | os.PathLike[str] | None = None,
    sparsity: float | None = None,
    size: int | tuple[int, int] | None = None,
    max_evaluations: int | None = None,
    seed: int = 0,
    classifier: str | None = None,
    classifier_weights: str | os.PathLike[str] | None = None,
    progress: Callable[..., Any] | None = None,
    report: Callable[[str], None] = logging.info,
) -> list[ModeSummary]:
    """Makes the images, the panel `<figure>.png` and `.pdf`, and `numbers.json`.

    Args:
        figure: "fig2" or "fig3".
        output_dir: Run folder, as in `synthesize.run`; so are the next eight.
        source: Pictures.
        weights: Of VGG-19.
        sparsity: Part of each feature map that is the top.
        size: Of the images.
        max_evaluations: For each image.
        seed: Of the noise.
        progress: Wraps each search.
        report: Is given each line of what a reader wants to see.
        classifier: Network of ImageNet's classes that names the results; None for no names.
        classifier_weights: Its weights; None is "imagenet".

    Raises:
        ValueError, OSError: As in `synthesize.run`.
    """
    if figure not in PRESETS:
        raise ValueError(f"unknown figure {figure!r}: expected {' or '.join(PRESETS)}")
    preset, objective = PRESETS[figure]
    name = _namer(classifier, classifier_weights) if classifier else None
    summary = synthesize.run(
        output_dir,
        source=source,
        preset=preset,
        weights=weights,
        objective=objective,
        modes=synthesize.MODES,
        sparsity=sparsity,
        size=size,
        seeds=(seed,),
        max_evaluations=max_evaluations,
        histogram_match=objective == "texture",
        histogram_bins=100,
        progress=progress,
        report=report,
    )
    folder = files.local_path(output_dir)
    rows = summary["images"]
    pictures = {row["image"]: images.read_image(folder / f"{row['image']}.png") for row in rows}
    setting = synthesize.setting_of(preset, size=size, sparsity=sparsity)
    targets = {each.stem: each.pixels for each in synthesize.read_targets(source, setting)}
    summaries = summarize(rows, pictures, targets, name)
    percent = f"{format(100 * setting.sparsity, 'g')} %"
    panel = figures.picture_rows(
        {"target": list(targets.values())}
        | {
            _TITLES[mode].format(percent): [
                pictures[row["image"]] for row in rows if row["mode"] == mode
            ]
            for mode in synthesize.MODES
        }
    )
    figures.save(panel, folder / figure)
    files.write_json(
        folder / "numbers.json",
        {"classifier": classifier, "modes": [dataclasses.asdict(each) for each in summaries]},
    )
    for line in format_table(summaries, classifier):
        report(line)
    return summaries


def summarize(
    rows: Sequence[dict[str, Any]],
    pictures: dict[str, UInt8[np.ndarray, "h w 3"]],
    targets: dict[str, UInt8[np.ndarray, "h w 3"]],
    name: Callable[[UInt8[np.ndarray, "h w 3"]], Float32[np.ndarray, " classes"]] | None,
) -> list[ModeSummary]:
    """Means of each mode.

    Args:
        rows: The images of `synthesize.run`'s summary.
        pictures: By the image's name.
        targets: By their stem.
        name: Probabilities of the classes of a picture.
    """
    classes, before = {}, {}
    if name is not None:
        for stem, target in targets.items():
            probabilities = name(target)
            classes[stem] = int(np.argmax(probabilities))
            before[stem] = float(np.max(probabilities))
    summaries = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        chosen = [row for row in rows if row["mode"] == mode]
        named, probability, target_probability = None, None, None
        if name is not None:
            found = [name(pictures[row["image"]]) for row in chosen]
            own = [classes[row["target"]] for row in chosen]
            named = sum(int(np.argmax(p)) == c for p, c in zip(found, own, strict=True))
            probability = statistics.fmean(float(p[c]) for p, c in zip(found, own, strict=True))
            target_probability = statistics.fmean(before.values())
        summaries.append(
            ModeSummary(
                mode,
                len(chosen),
                statistics.fmean(row["gram_distance"] for row in chosen),
                statistics.fmean(row["activation_distance"] for row in chosen),
                named,
                probability,
                target_probability,
            )
        )
    return summaries


def format_table(summaries: Sequence[ModeSummary], classifier: str | None) -> list[str]:
    """The printed table."""
    lines = [
        "mode   images  Gram distance  activation distance"
        + (f"  named as the target by {classifier}  probability (target's)" if classifier else "")
    ]
    for each in summaries:
        line = (
            f"{each.mode:5}  {each.n_images:6}  {each.gram_distance:13.3f}  "
            f"{each.activation_distance:19.3f}"
        )
        if classifier:
            line += (
                f"  {each.n_named} of {each.n_images}, {each.probability:.3f} "
                f"({each.target_probability:.3f})"
            )
        lines.append(line)
    return lines


def _namer(
    model: str, weights: str | os.PathLike[str] | None
) -> Callable[[UInt8[np.ndarray, "h w 3"]], Float32[np.ndarray, " classes"]]:
    """Probabilities that a network gives to the classes of one picture."""
    network = create_network(model)
    preprocessing = default_preprocessing(model)
    variables = jax.device_put(load_variables(model, resolve_weights(model, weights or "imagenet")))

    @jax.jit
    def probabilities(variables: Any, x: Any) -> Any:
        return jax.nn.softmax(network.apply(variables, x, train=False)[0][0])

    def name(picture: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, " classes"]:
        shown = images.fit(picture, preprocessing.image_size)
        return np.asarray(probabilities(variables, images.normalize(shown[None], preprocessing)))

    return name
