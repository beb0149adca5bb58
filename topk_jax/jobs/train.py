"""Trains a network as a config says, and goes on where an earlier run of it stopped."""

import contextlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from topk_jax import figures, files, parallel, weights
from topk_jax.jobs.provenance import versions
from topk_jax.networks import Network, create_network
from topk_jax.training import losses
from topk_jax.training.batches import Batches, iterate
from topk_jax.training.checkpoints import Checkpoints
from topk_jax.training.data import Datasets, find_datasets, make_augmentation
from topk_jax.training.loop import fit
from topk_jax.training.metrics_log import MetricsLog, open_log, read_records
from topk_jax.training.optimizers import make_optimizer
from topk_jax.training.settings import Settings, flattened, from_config
from topk_jax.training.state import create_state, init_variables, make_train_step
from topk_jax.training.validation import Validation

WEIGHTS_FILE = "weights.safetensors"
CHECKPOINTS = "checkpoints"
FIGURE = "training"

Report = Callable[[str], None]


def run(
    config: Mapping[str, Any],
    workdir: str | os.PathLike[str],
    *,
    report: Report,
    progress: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Trains, validates after each epoch and writes the weights.

    Writes into `workdir`: `metrics.jsonl` (a record a line), `checkpoints/` (the latest state, and
    the best for the first two validation sets), at the end `weights.safetensors` (torch's names and
    layout, as `load_variables` reads them; of the last epoch, whatever the best was),
    `training.png` and `.pdf`, and `summary.json`. A run that was ended goes on from its latest
    checkpoint and gives the same numbers, bit for bit on the same devices; a finished one is not
    repeated. All processes of a run call this with the same arguments; the first one writes.

    Args:
        config: Fields of `training.settings.Settings`, nested.
        workdir: Folder of the run, the same for all processes.
        report: Gets a line now and then.
        progress: `progress(iterable, total=, desc=, unit=, position=)` wraps the batches.

    Returns:
        What the last validation measured (see `Validation.measure`), and `epochs`, `classes`,
        `class_counts` (training images of each), `parameters`, `skipped` (training images that
        could not be read), `best` (by set: value, epoch, step) and `sha256` of the weights.

    Raises:
        ValueError: A field of the config or an image folder is wrong, or `workdir` belongs to
            another config (the differing fields are named).
        BlockingIOError: Another process trains in `workdir`.
        RuntimeError: The loss or a parameter is no longer finite; the last checkpoint stays.
        OSError: A file cannot be read or written.
    """
    settings = from_config(config)
    to_dict = getattr(config, "to_dict", None)
    flat = flattened(dict(config) if to_dict is None else to_dict())
    parallel.check_same_on_processes(sorted(flat.items()), "their config")
    parallel.check_shared_evenly(settings.batch_size, jax.device_count())
    datasets = find_datasets(settings.data, seed=settings.seed)
    network = _make_network(settings, len(datasets.classes))
    with contextlib.ExitStack() as stack:
        folder = None
        if parallel.is_first_process():
            folder = stack.enter_context(files.run_folder(workdir, flat))
        parallel.wait_for_processes("folder of the run")
        summary = json.loads((pathlib.Path(workdir) / files.SUMMARY).read_text(encoding="utf-8"))
        if "result" in summary:
            report(f"{workdir} holds the finished run of this config")
            return summary["result"]
        checkpoints = Checkpoints(pathlib.Path(workdir) / CHECKPOINTS)
        training = _Training(settings, network, datasets, checkpoints, report)
        stack.callback(checkpoints.close)
        with open_log(workdir if folder else None, step=training.step) as log:
            training.run(log, progress)
        checkpoints.close()
        result = training.result()
        if folder is not None:
            result["sha256"] = _write_results(folder, training, result)
        parallel.wait_for_processes("results of the run")
    return result


def _make_network(settings: Settings, classes: int) -> Network:
    options = {"num_classes": classes} | dict(settings.network_options)
    if options["num_classes"] != classes:
        raise ValueError(
            f"config.network_options.num_classes is {options['num_classes']}, but the images are "
            f"of {classes} classes: leave it out"
        )
    network = create_network(settings.network, topk=settings.sites, **options)
    return network.clone(axis_name=parallel.AXIS) if hasattr(network, "axis_name") else network


def _make_step(
    settings: Settings,
    network: Network,
    optimizer: optax.GradientTransformation,
    class_counts: Sequence[int],
) -> Callable[..., Any]:
    loss = losses.make_loss(
        settings.loss.name,
        class_counts=class_counts,
        beta=settings.loss.beta,
        gamma=settings.loss.gamma,
        form=settings.loss.form,
        label_smoothing=settings.loss.label_smoothing,
    )
    return make_train_step(
        network,
        optimizer,
        preprocessing=settings.data.preprocessing,
        loss=loss,
        microbatch=settings.microbatch or None,
        precision=settings.precision,
        ema_decay=settings.ema_decay,
    )


def _start_variables(settings: Settings, network: Network, key: jax.Array) -> dict[str, Any]:
    if settings.weights:
        return weights.load_variables(network, settings.weights)
    variables = init_variables(network, key, image_size=settings.data.image_size)
    if settings.loss.name == "class_balanced_focal" and settings.loss.form == "sigmoid":
        params = losses.with_sigmoid_prior(variables["params"], network.output_module)
        variables = variables | {"params": params}
    return variables


class _Training:
    """The run itself: what is compiled, where it stands, and what was measured last."""

    def __init__(
        self,
        settings: Settings,
        network: Network,
        datasets: Datasets,
        checkpoints: Checkpoints,
        report: Report,
    ):
        self._settings, self._checkpoints, self._report = settings, checkpoints, report
        data = settings.data
        if data.source == "builtin":
            report(f"drawing {data.builtin_images} images")
        stimuli = datasets.training()
        self._batches = Batches(
            stimuli,
            make_augmentation(data),
            batch_size=settings.batch_size,
            epochs=settings.epochs,
            seed=settings.seed,
            devices=jax.local_device_count(),
            process=(jax.process_index(), jax.process_count()),
            strict=data.strict,
        )
        self._classes = datasets.classes
        counts = np.bincount(self._batches.labels, minlength=len(datasets.classes))
        self._class_counts: list[int] = counts.tolist()
        optimizer = make_optimizer(
            settings.optimizer,
            steps_per_epoch=self._batches.steps_per_epoch,
            epochs=settings.epochs,
        )
        self._step = parallel.map_step(_make_step(settings, network, optimizer, self._class_counts))
        self._validation = Validation(
            network,
            datasets.validation,
            preprocessing=data.preprocessing,
            cue_conflict=datasets.cue_conflict,
            mapping=datasets.mapping,
            batch_size=max(64, jax.local_device_count()),
            seed=settings.seed,
            strict=data.strict,
        )
        init_key, noise_key = jax.random.split(jax.random.key(settings.seed))
        variables = _start_variables(settings, network, init_key)
        self.parameters = weights.count_parameters(variables)
        state = create_state(variables, optimizer, noise_key, ema=settings.ema_decay > 0)
        self._totals: dict[str, float] = dict.fromkeys(("loss", "correct", "count"), 0.0)
        self._best: dict[str, dict[str, float]] = {}
        self._measured: dict[str, Any] = {}
        restored = checkpoints.restore(state)
        if restored is not None:
            state, extra = restored
            self._totals, self._best = extra["totals"], extra["best"]
            self._measured = extra["measured"]
            report(f"going on after step {int(state.step)} of {len(self._batches)}")
        self.step = int(state.step)
        self._state = parallel.replicate(state)

    @property
    def variables(self) -> Any:
        """What is validated and written: the moving average where there is one."""
        return self._state.variables if self._state.ema is None else self._state.ema

    def run(self, log: MetricsLog, progress: Callable[..., Any] | None) -> None:
        """Makes the steps that are left."""
        settings, total = self._settings, len(self._batches)
        batches = iterate(self._batches, start=self.step)
        if progress is not None and self.step < total:
            place = itertools.count(self.step + 1)
            batches = progress(
                batches,
                total=total * settings.batch_size,
                desc="training",
                unit="img",
                position=lambda _: next(place) * settings.batch_size,
            )
        per_epoch, every = self._batches.steps_per_epoch, settings.checkpoint_every
        while self.step < total:
            end = (self.step // per_epoch + 1) * per_epoch
            stop = min(end, (self.step // every + 1) * every) if every else end
            self._state, sums = fit(
                self._step,
                self._state,
                batches,
                start=self.step,
                stop=stop,
                report=lambda record: self._log_training(log, record),
                log_every=settings.log_every,
            )
            self.step = stop
            self._totals = {name: self._totals[name] + value for name, value in sums.items()}
            if not bool(_all_finite(self._state.variables)):
                raise RuntimeError(
                    f"parameters are not finite after step {self.step}: a lower learning rate may "
                    "help"
                )
            if self.step == end:
                self._end_epoch(log, end // per_epoch)
            extra = {
                "totals": self._totals,
                "best": self._best,
                "measured": self._measured,
            }
            self._checkpoints.save(self.step, self._state, extra)
        next(batches, None)  # lets a progress bar say that it is done

    def result(self) -> dict[str, Any]:
        """What the last validation measured, and what else is said of a finished run."""
        return self._measured | {
            "epochs": self._settings.epochs,
            "classes": list(self._classes),
            "class_counts": self._class_counts,
            "parameters": self.parameters,
            "skipped": int(parallel.sum_over_processes(float(len(self._batches.skipped)))),
            "best": self._best,
        }

    def _log_training(self, log: MetricsLog, record: dict[str, Any]) -> None:
        per_epoch = self._batches.steps_per_epoch
        log.write({"kind": "train", "epoch": record["step"] / per_epoch} | record)

    def _end_epoch(self, log: MetricsLog, epoch: int) -> None:
        settings, totals = self._settings, self._totals
        count = max(totals["count"], 1)
        line = (
            f"epoch {epoch}/{settings.epochs}: loss {totals['loss'] / count:.4f}, "
            f"accuracy {totals['correct'] / count:.4f}"
        )
        self._totals = dict.fromkeys(totals, 0.0)
        if self._batches.skipped:
            line += f", {len(self._batches.skipped)} images left out"
        if epoch % settings.evaluate_every == 0 or epoch == settings.epochs:
            self._measured = self._validation.measure(self.variables)
            measured = {"kind": "validation", "step": self.step, "epoch": epoch} | self._measured
            log.write(measured)
            for name, value in self._measured["accuracy"].items():
                line += f", {name} {value:.4f}"
            if "shape_bias" in self._measured:
                line += (
                    f", shape bias {self._measured['shape_bias']:.3f} "
                    f"(decided {self._measured['decided_fraction']:.3f})"
                )
            self._keep_best(epoch)
        self._report(line)

    def _keep_best(self, epoch: int) -> None:
        """Keeps the state where it is the best so far, on each of the first two sets."""
        for name, value in itertools.islice(self._measured["accuracy"].items(), 2):
            if value > self._best.get(name, {"value": -1.0})["value"]:
                self._best[name] = {"value": value, "epoch": epoch, "step": self.step}
                self._checkpoints.save_best(name, self.step, self._state, self._measured)


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _write_results(folder: files.RunFolder, training: _Training, result: dict[str, Any]) -> str:
    """Writes weights, figure and summary; returns the digest of the weights."""
    path = folder.path / WEIGHTS_FILE
    variables = jax.device_get(training.variables)
    weights.write_state_dict(path, weights.variables_to_state_dict(variables))
    sha256 = files.sha256(path)
    curves = figures.training_curves(read_records(folder.path), title=folder.path.name)
    figures.save(curves, folder.path / FIGURE)
    folder.write_summary({"versions": versions(), "result": result | {"sha256": sha256}})
    return sha256
