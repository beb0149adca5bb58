"""Training steps side by side with PyTorch, their memory, more devices, and what the input costs.

A step is everything from a uint8 batch on the host to new parameters: normalisation, forward and
backward pass in float32, mean cross-entropy, SGD with momentum and weight decay. Both sides start
from the same random weights, make the same steps on the same batch, and are compared before
anything is timed.

On a CPU the further devices are fake ones that share its processors, in a process of their own: they
show what dividing a batch costs, not what a second processor gains. Run as a module, this file is
that process.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from PIL import Image

from topk_jax import images, parallel, stimuli, training
from topk_jax.images import IMAGENET_PREPROCESSING
from topk_jax.jobs import benchmark, benchmark_torch
from topk_jax.jobs.benchmark import Ratio
from topk_jax.jobs.benchmark_inference import LAYOUTS, OURS, format_activation
from topk_jax.jobs.benchmark_torch import Torch
from topk_jax.networks import ResNet, create_network
from topk_jax.stimuli import Stimuli, builtin
from topk_jax.training.augmentation import Augmentation
from topk_jax.training.settings import Optimizer
from topk_jax.weights import variables_to_state_dict

NETWORKS = ("resnet18", "resnet32")
BUILTIN = "builtin"
SITE = "layer2"
"""Where Top-K is put: after the second stage, as Li et al. (2023) train."""

CLASSES = 10
OPTIMIZER = Optimizer(learning_rate=1e-3, momentum=0.9, weight_decay=5e-4, schedule="constant")
"""The rate is small so that rounding, which ReLU and Top-K amplify from step to step, stays small
in the steps that are compared; it costs nothing else."""

SAME_LOSS = 1e-4
"""Relative difference of the first losses up to which both sides compute the same."""
SAME_PLAIN, SAME_TOPK = 1e-2, 5e-2
"""The same of the changes of parameters and statistics in `COMPARED_STEPS`, as norms over all of
them. Where rounding moves an entry over a ReLU's zero or Top-K's cut, its gradient comes or goes:
some 1e-3 is usual in plain networks, some 1e-2 with Top-K."""
COMPARED_STEPS = 2  # the second shows the momentum

FOLDER, MEMORY = "JPEG folder", "memory"
FED_STEPS = 6
"""Steps a timed call where input is measured: more than the batches that wait ready."""

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "numpy", "pillow", "torch", "torchvision")
_DRAWN_IMAGES, _DRAWN_SIZE = 512, 96
_MOST_IMAGES = 2048  # of a folder, so that they fit into memory
_ENDLESS = 1_000_000  # epochs
_MEBIBYTE = 2**20


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and the size of what it is trained on.

    Attributes:
        network: Its name, a ResNet.
        batch_size: Images a step.
        image_size: Side of the images, pixels.
        seed: Of weights and images.
    """

    network: str
    batch_size: int
    image_size: int
    seed: int

    def create(self, sparsity: float = 1.0) -> ResNet:
        """The network with ten classes, plain or with a kept fraction at `SITE`.

        Raises:
            ValueError: An unknown network, or none of the ResNets.
        """
        topk = None if sparsity == 1 else {SITE: sparsity}
        if not isinstance(create_network(self.network), ResNet):
            raise ValueError(f"{self.network}: expected a ResNet, such as {', '.join(NETWORKS)}")
        network = create_network(self.network, topk=topk, num_classes=CLASSES)
        assert isinstance(network, ResNet)
        return network

    def variables(self) -> dict[str, Any]:
        """Random variables, from the seed."""
        key = jax.random.key(self.seed)
        return training.init_variables(self.create(), key, image_size=self.image_size)

    def batch(self) -> dict[str, np.ndarray]:
        """Random images uint8 [n, size, size, 3], labels int32 [n], and a mask that keeps all."""
        rng = np.random.default_rng(self.seed)
        shape = (self.batch_size, self.image_size, self.image_size, 3)
        return {
            "image": rng.integers(0, 256, shape, dtype=np.uint8),
            "label": rng.integers(0, CLASSES, self.batch_size, dtype=np.int32),
            "mask": np.ones(self.batch_size, bool),
        }


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of the step of one network with one activation.

    Attributes:
        case: What was trained.
        sparsity: Kept fraction; 1.0 is the plain network.
        compile_seconds: Until our step was compiled; in no other number.
        temporary: Bytes of our step beside its arguments, as XLA plans them.
        arguments: Bytes of state and batch; the new state takes the place of the old.
        seconds: Of each round, by candidate: "topk_jax", "contiguous" and "channels_last".
        differences: Relative, between the sides: "loss", "parameters", "statistics" (see
            `SAME_LOSS`, `SAME_PLAIN`); empty without PyTorch.
    """

    case: Case
    sparsity: float
    compile_seconds: float
    temporary: int
    arguments: int
    seconds: dict[str, tuple[float, ...]]
    differences: dict[str, float]

    def ratio(self, layout: str) -> Ratio:
        """PyTorch's time over ours."""
        return benchmark.ratio(self.seconds[layout], self.seconds[OURS])

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        others = [name for name in self.seconds if name != OURS]
        ratios = {name: dataclasses.asdict(self.ratio(name)) for name in others}
        return dataclasses.asdict(self) | {"ratio": ratios}


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Steps of one network, the same batch divided among more and more devices.

    Attributes:
        case: What was trained.
        seconds: Of each round, by number of devices.
    """

    case: Case
    seconds: dict[int, tuple[float, ...]]

    def speedup(self, devices: int) -> Ratio:
        """Time of one device over that of several."""
        return benchmark.ratio(self.seconds[1], self.seconds[devices])

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        speedups = {count: dataclasses.asdict(self.speedup(count)) for count in self.seconds}
        return dataclasses.asdict(self) | {"speedup": speedups}


@dataclasses.dataclass(frozen=True)
class Input:
    """What the input of one network costs.

    Attributes:
        case: What was trained.
        source: "JPEG folder" or "memory".
        alone: Seconds a batch of each round, made ahead in threads with nothing else to do.
        fed: Seconds a step of each round, fed with these batches.
        repeated: The same, fed with one batch again and again.
    """

    case: Case
    source: str
    alone: tuple[float, ...]
    fed: tuple[float, ...]
    repeated: tuple[float, ...]

    @property
    def share(self) -> Ratio:
        """Part of a fed step that the input adds; its median, least and largest of the rounds."""
        shares = [1 - each / fed for each, fed in zip(self.repeated, self.fed, strict=True)]
        return Ratio(statistics.median(shares), min(shares), max(shares))

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return dataclasses.asdict(self) | {"share": dataclasses.asdict(self.share)}


def run(
    networks: Sequence[str] = NETWORKS,
    *,
    sparsities: Sequence[float] = (0.2,),
    batch_size: int | None = None,
    image_size: int | None = None,
    devices: Sequence[int] = (1, 2, 4),
    source: str | os.PathLike[str] = BUILTIN,
    rounds: int = 5,
    seed: int = 0,
    compare: bool = True,
    output: str | os.PathLike[str] | None = None,
    command: str = "topk_jax.jobs.benchmark_training.run",
    report: Callable[[str], None] = logging.info,
) -> dict[str, Any]:
    """Measures each network, and returns everything measured.

    Args:
        networks: Names of ResNets.
        sparsities: Kept fractions after the second stage; plain networks are always measured.
        batch_size: Images a step; by default 128 for the networks for small images, 64 for others.
        image_size: Side of the images, pixels; by default 32 and 64.
        devices: Numbers of devices that a batch is divided among; none leaves this part out.
        source: A folder of class folders that the input is measured with, or "builtin": a
            temporary one of drawn JPEGs of 96 x 96 pixels.
        rounds: How often each candidate is timed.
        seed: Of weights and images.
        compare: Measure PyTorch too, where it is installed and JAX runs on the CPU.
        output: A .md or .json file that the results are added to.
        command: What is noted there as the way to repeat the measurement.
        report: Is given each line of what a reader wants to see.

    Returns:
        {benchmark, command, date, machine, versions, rounds, seed, rows: [`Row.as_dict`], scaling:
        [`Scaling.as_dict`], input: [`Input.as_dict`]}.

    Raises:
        ValueError: Bad input. OSError: The folder of images cannot be read.
        RuntimeError: The two sides do not compute the same, or the process of the fake devices
            failed.
    """
    cases = _cases(networks, sparsities, batch_size, image_size, seed, compare)
    for case in cases:
        for count in devices:
            parallel.check_shared_evenly(case.batch_size, count)
    if output:
        benchmark.check_output(output)
    packages = benchmark_torch.import_for_cpu(report) if compare else None
    facts = benchmark.setting(_PACKAGES if packages else _PACKAGES[:-2])
    fractions = (1.0, *(sparsity for sparsity in sparsities if sparsity != 1))
    rows: list[Row] = []
    scaling: list[Scaling] = []
    inputs: list[Input] = []
    with _images(source, seed) as found:
        for case in cases:
            for sparsity in fractions:
                rows.append(_measure_step(case, sparsity, packages, rounds))
                report(_format_briefly(rows[-1]))
            if devices:
                scaling.append(_measure_scaling(case, devices, rounds, report))
            inputs += _measure_input(case, found, rounds)
    result = {
        "benchmark": "training",
        "command": command,
        **facts,
        "rounds": rounds,
        "seed": seed,
        "rows": [row.as_dict() for row in rows],
        "scaling": [each.as_dict() for each in scaling],
        "input": [each.as_dict() for each in inputs],
    }
    table = format_rows(rows)
    if scaling:
        table += ["", *format_scaling(scaling)]
    table += ["", *format_inputs(inputs)]
    series = [row.seconds.values() for row in rows] + [each.seconds.values() for each in scaling]
    series += [(each.alone, each.fed, each.repeated) for each in inputs]
    if any(benchmark.is_noisy(seconds) for each in series for seconds in each):
        table += ["", benchmark.NOISE_NOTE]
    for line in table:
        report(line)
    if output:
        note = f"float32, SGD with momentum, rounds: {rounds}, seed: {seed}"
        benchmark.append(output, result, benchmark.section("Training", result, note, table))
        report(f"added to {os.fspath(output)}")
    return result


def format_rows(rows: Sequence[Row]) -> list[str]:
    """The table of steps, and below it the geometric means and what the memory is."""
    layouts = [layout for layout in LAYOUTS if layout in rows[0].seconds]
    titles = ["network", "batch", "Top-K", "images/s", "ms", "compile s", "memory MiB"]
    for layout in layouts:
        titles += [f"PyTorch {layout}", "ratio (min-max)"]
    cells = []
    for row in rows:
        case = row.case
        cells.append(
            [
                case.network,
                f"{case.batch_size}x{case.image_size}x{case.image_size}",
                format_activation(row.sparsity),
                _speed(case.batch_size, row.seconds[OURS]),
                f"{1e3 * statistics.median(row.seconds[OURS]):.0f}",
                f"{row.compile_seconds:.1f}",
                f"{row.temporary / _MEBIBYTE:.0f} + {row.arguments / _MEBIBYTE:.0f}",
            ]
        )
        for layout in layouts:
            cells[-1] += [_speed(case.batch_size, row.seconds[layout]), str(row.ratio(layout))]
    lines = benchmark.format_table(titles, cells)
    for sparsity in dict.fromkeys(row.sparsity for row in rows):
        means = [
            f"{benchmark.geometric_mean(ratios):.2f} ({layout})"
            for layout in layouts
            if (ratios := [row.ratio(layout).median for row in rows if row.sparsity == sparsity])
        ]
        if means:
            lines += [
                "",
                f"Geometric mean of the ratios, {format_activation(sparsity)}: {', '.join(means)}.",
            ]
    return [
        *lines,
        "",
        "Memory: temporary buffers of our step, plus its arguments (state and batch), in XLA's "
        "plan of the compiled program; the new state takes the place of the old.",
    ]


def format_scaling(rows: Sequence[Scaling]) -> list[str]:
    """The table of devices."""
    cells = [
        [
            row.case.network,
            str(row.case.batch_size),
            str(devices),
            _speed(row.case.batch_size, seconds),
            str(row.speedup(devices)),
        ]
        for row in rows
        for devices, seconds in row.seconds.items()
    ]
    titles = ["network", "images a step", "devices", "images/s", "times one device (min-max)"]
    lines = benchmark.format_table(titles, cells)
    if jax.default_backend() == "cpu":
        lines += [
            "",
            f"Fake devices that share {benchmark.cpu_count()} processors: 1 is the most that can "
            "be expected, and what is missing is the cost of dividing the batch.",
        ]
    return lines


def format_inputs(rows: Sequence[Input]) -> list[str]:
    """The table of what the input costs."""
    cells = []
    for row in rows:
        low, middle, high = (
            100 * share for share in (row.share.low, row.share.median, row.share.high)
        )
        cells.append(
            [
                row.case.network,
                row.source,
                _speed(row.case.batch_size, row.alone),
                _speed(row.case.batch_size, row.repeated),
                _speed(row.case.batch_size, row.fed),
                f"{middle:.1f} % ({low:.1f} to {high:.1f})",
            ]
        )
    titles = ["network", "input", "alone, images/s", "steps on one batch", "steps on the input"]
    return [
        *benchmark.format_table([*titles, "share of a step"], cells),
        "",
        "Input: random-resized crop and flip, made ahead in threads; files come from the system's "
        "cache. Its share is the time by which a step that is fed with it takes longer.",
    ]


def _speed(batch_size: int, seconds: Sequence[float]) -> str:
    noisy = "*" if benchmark.is_noisy(seconds) else ""
    return f"{batch_size / statistics.median(seconds):.1f}{noisy}"


def _format_briefly(row: Row) -> str:
    """What is said while the others are still measured."""
    times = ", ".join(f"{k} {1e3 * statistics.median(v):.0f} ms" for k, v in row.seconds.items())
    differences = ", ".join(f"{name} {value:.1g}" for name, value in row.differences.items())
    agreement = f"; differences: {differences}" if differences else ""
    return f"{row.case.network} ({format_activation(row.sparsity)}): {times}{agreement}"


def _cases(
    networks: Sequence[str],
    sparsities: Sequence[float],
    batch_size: int | None,
    image_size: int | None,
    seed: int,
    compare: bool,
) -> list[Case]:
    if not networks:
        raise ValueError(f"no networks to measure; expected for example {','.join(NETWORKS)}")
    for name, value in (("batch size", batch_size), ("image size", image_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} {value}: expected at least 1")
    cases = []
    for name in networks:
        network = Case(name, 0, 0, seed).create()
        for sparsity in sparsities:
            Case(name, 0, 0, seed).create(sparsity)
        small = network.stem == "cifar"
        if compare and small and network.shortcut != "padding":
            raise ValueError(f"{name}: PyTorch has no such network; --nocompare measures it alone")
        usual = (128, 32) if small else (64, 64)
        cases.append(Case(name, batch_size or usual[0], image_size or usual[1], seed))
    return cases


class _Step:
    """Our step with its state; each call makes one more and gives the loss before it."""

    def __init__(
        self, case: Case, sparsity: float, batch: Mapping[str, Any], devices: list[parallel.Device]
    ):
        optimizer = training.make_optimizer(OPTIMIZER, steps_per_epoch=1, epochs=1)
        network = case.create(sparsity).clone(axis_name=parallel.AXIS)
        step = training.make_train_step(network, optimizer, preprocessing=IMAGENET_PREPROCESSING)
        state = training.create_state(case.variables(), optimizer, jax.random.key(case.seed))
        self.state = parallel.replicate(state, devices)
        self.batch = parallel.shard(batch, len(devices))
        start = time.perf_counter()
        mapped = parallel.map_step(step, devices=devices)
        self.compiled = mapped.lower(self.state, self.batch).compile()
        self.compile_seconds = time.perf_counter() - start

    def __call__(self) -> float:
        self.state, sums = jax.block_until_ready(self.compiled(self.state, self.batch))
        return float(sums["loss"] / sums["count"])

    def fit(self, batches: Iterator[Any], steps: int) -> None:
        """Makes steps as a training run does, which waits for none of them but the last."""
        self.state, _ = training.fit(
            self.compiled,
            self.state,
            batches,
            start=0,
            stop=steps,
            report=lambda record: None,
            log_every=steps,
        )
        jax.block_until_ready(self.state)


def _measure_step(case: Case, sparsity: float, packages: Torch | None, rounds: int) -> Row:
    batch = case.batch()
    ours = _Step(case, sparsity, batch, jax.local_devices()[:1])
    memory = ours.compiled.memory_analysis()
    candidates: dict[str, Callable[[], float]] = {OURS: ours}
    differences: dict[str, float] = {}
    if packages is not None:
        modules = {layout: _torch_module(packages, case, sparsity, layout) for layout in LAYOUTS}
        for layout, module in modules.items():
            candidates[layout] = benchmark_torch.training_step(
                packages,
                module,
                batch,
                preprocessing=IMAGENET_PREPROCESSING,
                optimizer=OPTIMIZER,
                memory_format=layout,
            )
        differences = _differences(case, ours, candidates, modules)
        _check_agreement(case, sparsity, differences)
    seconds = benchmark.measure(candidates, rounds=rounds)
    return Row(
        case,
        sparsity,
        ours.compile_seconds,
        memory.temp_size_in_bytes,
        memory.argument_size_in_bytes,
        seconds,
        differences,
    )


def _torch_module(
    packages: Torch, case: Case, sparsity: float, layout: benchmark_torch.MemoryFormat
) -> Any:
    """PyTorch's network with the same weights, in memory of its own."""
    state_dict = variables_to_state_dict(case.variables())
    return benchmark_torch.network(
        packages,
        case.network,
        {name: array.copy() for name, array in state_dict.items()},
        activation=None if sparsity == 1 else benchmark_torch.authors_topk(packages, sparsity),
        sites=(SITE,),
        num_classes=CLASSES,
        memory_format=layout,
    )


def _differences(
    case: Case,
    ours: _Step,
    steps: Mapping[str, Callable[[], float]],
    modules: Mapping[str, Any],
) -> dict[str, float]:
    """Makes the steps that are compared; the largest relative differences of PyTorch's modules."""
    losses = {name: [step() for _ in range(COMPARED_STEPS)] for name, step in steps.items()}
    start = variables_to_state_dict(case.variables())
    found = variables_to_state_dict(jax.device_get(ours.state.variables))
    running = {name for name in start if ".running_" in name}

    def relative(names: set[str], expected: Mapping[str, np.ndarray]) -> float:
        wrong = sum(np.sum(np.square(found[name] - expected[name])) for name in names)
        change = sum(np.sum(np.square(expected[name] - start[name])) for name in names)
        return float(np.sqrt(wrong / change))

    differences: list[dict[str, float]] = []
    for layout, module in modules.items():
        expected = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
        differences.append(
            {
                "loss": abs(losses[OURS][0] / losses[layout][0] - 1),
                "parameters": relative(set(start) - running, expected),
                "statistics": relative(running, expected),
            }
        )
    # Not max(), which may pass over a NaN.
    return {name: float(np.max([each[name] for each in differences])) for name in differences[0]}


def _check_agreement(case: Case, sparsity: float, differences: Mapping[str, float]) -> None:
    change = SAME_PLAIN if sparsity == 1 else SAME_TOPK
    for name, difference in differences.items():
        bound = SAME_LOSS if name == "loss" else change
        if not difference <= bound:
            raise RuntimeError(
                f"{case.network} ({format_activation(sparsity)}): after {COMPARED_STEPS} steps the "
                f"relative difference from PyTorch in {name} is {difference:.2g}, expected at most "
                f"{bound:g}: the two sides do not compute the same"
            )


def _measure_scaling(
    case: Case, devices: Sequence[int], rounds: int, report: Callable[[str], None]
) -> Scaling:
    """Steps on one and on more devices; on a CPU in a process that has as many."""
    counts = sorted({1, *devices})
    if jax.default_backend() == "cpu":
        return _scaling_in_child(case, counts, rounds)
    there = [count for count in counts if count <= jax.local_device_count()]
    if there != counts:
        report(f"{case.network}: only {jax.local_device_count()} devices here")
    return _scaling_here(case, there, rounds)


def _scaling_here(case: Case, counts: Sequence[int], rounds: int) -> Scaling:
    batch = case.batch()
    steps = {str(count): _Step(case, 1.0, batch, jax.local_devices()[:count]) for count in counts}
    for step in steps.values():
        step()
    seconds = benchmark.measure(steps, rounds=rounds)
    return Scaling(case, {int(count): values for count, values in seconds.items()})


def _scaling_in_child(case: Case, counts: Sequence[int], rounds: int) -> Scaling:
    request = {"case": dataclasses.asdict(case), "counts": list(counts), "rounds": rounds}
    flags = f"--xla_force_host_platform_device_count={max(counts)}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",  # of two the last one counts
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, json.dumps(request)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{case.network}: the process of {max(counts)} devices failed: {last}")
    seconds = json.loads(done.stdout.splitlines()[-1])
    return Scaling(case, {int(count): tuple(values) for count, values in seconds.items()})


def _answer(request: str) -> str:
    """What the process of the fake devices is asked, and what it answers."""
    asked = json.loads(request)
    scaling = _scaling_here(Case(**asked["case"]), asked["counts"], asked["rounds"])
    return json.dumps(scaling.seconds)


@contextlib.contextmanager
def _images(source: str | os.PathLike[str], seed: int) -> Iterator[Stimuli]:
    """Images in a folder, as many as fit into memory; drawn ones are gone afterwards."""
    if source != BUILTIN:
        found = stimuli.read_image_folder(source)
        count = min(len(found), _MOST_IMAGES)
        yield found.select(np.arange(count) * len(found) // count)
        return
    with tempfile.TemporaryDirectory(prefix="benchmark_training_") as folder:
        drawn, labels = builtin.builtin_training_images(_DRAWN_IMAGES, seed=seed)
        for number, (image, label) in enumerate(zip(drawn, labels, strict=True)):
            path = pathlib.Path(folder, builtin.BUILTIN_CATEGORIES[label], f"{number:04}.jpg")
            path.parent.mkdir(exist_ok=True)
            large = images.resize(image, (_DRAWN_SIZE, _DRAWN_SIZE))
            Image.fromarray(large).save(path, quality=90)
        yield stimuli.read_image_folder(folder)


def _measure_input(case: Case, found: Stimuli, rounds: int) -> list[Input]:
    augmentation = Augmentation(crop="random_resized", flip=True, size=case.image_size)
    step = _Step(case, 1.0, case.batch(), jax.local_devices()[:1])
    candidates: dict[str, Callable[[], object]] = {
        "repeated": lambda: step.fit(itertools.repeat(step.batch), FED_STEPS)
    }

    def feed(stream: Iterator[Any]) -> None:
        step.fit(stream, FED_STEPS)

    def draw(stream: Iterator[Any]) -> None:
        for _ in range(FED_STEPS):
            next(stream)

    for source, loaded in ((FOLDER, found), (MEMORY, stimuli.in_memory(found))):
        for kind, use in (("alone", draw), ("fed", feed)):
            batches = training.Batches(
                loaded,
                augmentation,
                batch_size=case.batch_size,
                epochs=_ENDLESS,
                seed=case.seed,
                strict=True,
            )
            candidates[f"{kind} {source}"] = functools.partial(use, _with_few_classes(batches))
    each = {
        name: tuple(value / FED_STEPS for value in seconds)
        for name, seconds in benchmark.measure(candidates, rounds=rounds).items()
    }
    return [
        Input(case, source, each[f"alone {source}"], each[f"fed {source}"], each["repeated"])
        for source in (FOLDER, MEMORY)
    ]


def _with_few_classes(batches: training.Batches) -> Iterator[dict[str, Any]]:
    """The batches as training gets them, with labels of the network's ten classes."""
    for batch in training.iterate(batches):
        yield batch | {"label": batch["label"] % CLASSES}


if __name__ == "__main__":
    print(_answer(sys.argv[1]))
