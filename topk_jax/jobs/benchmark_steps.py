"""Training steps, timed: beside PyTorch's, on several devices, and fed by the input pipeline.

A step is everything from a uint8 batch on the host to new parameters: normalisation, forward and
backward pass in float32, mean cross-entropy, SGD with momentum and weight decay. Both sides start
from the same random weights, make the same steps on the same batch, and are compared before
anything is timed.

On a CPU the further devices are fake ones that share its processors, in a process of their own:
they show what dividing a batch costs, not what a second processor gains. Run as a module, this file
is that process.
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

BUILTIN = "builtin"
SITE = "layer2"
"""Where Top-K is put: after the second stage, as Li et al. (2023) train."""

CLASSES = 10
OPTIMIZER = Optimizer(learning_rate=1e-3, momentum=0.9, weight_decay=5e-4, schedule="constant")
"""The rate is small so that rounding, which ReLU and Top-K amplify from step to step, stays small
in the steps that are compared; it costs nothing else."""

SAME = {"loss": 1e-4, "parameters": 1e-2, "statistics": 1e-2, "second step": 0.1}
"""Relative differences up to which plain networks of both sides compute the same.

Of the loss before the first step; of the changes that it makes to parameters and statistics, as
norms over all of them; and of the changes of the parameters after a second one, which shows the
momentum. Where rounding moves an entry over a ReLU's zero, its gradient comes or goes: some 5e-4 is
usual after the first step, and 5e-3 after the second."""

SAME_TOPK = {"loss": 2e-3, "parameters": 5e-2, "statistics": 5e-2, "second step": 0.2}
"""The same with Top-K. Where rounding decides which of two nearly equal entries is kept, the loss
itself changes, by some 1e-4, and the parameters after two steps by some 2e-2."""

FOLDER, MEMORY = "JPEG folder", "memory"
FED_STEPS = 6
"""Steps a timed call where input is measured: more than the batches that wait ready."""

_DRAWN_IMAGES, _DRAWN_SIZE = 512, 96
_MOST_IMAGES = 2048  # of a folder, so that they fit into memory
_ENDLESS = 1_000_000  # epochs


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
            raise ValueError(f"{self.network}: expected a ResNet, such as resnet18")
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
        differences: Relative ones between the sides, see `SAME`; empty without PyTorch.
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


class Step:
    """Our step, compiled, with its state; each call makes one more and gives the loss before it.

    Attributes:
        case: What is trained.
        sparsity: Kept fraction; 1.0 is the plain network.
        batch: What every call gets, on the host.
        state: The state, replicated.
        compiled: The program.
        compile_seconds: How long that took.
    """

    def __init__(self, case: Case, sparsity: float, *, devices: int = 1):
        """Takes the first devices of this process."""
        self.case, self.sparsity = case, sparsity
        chosen = jax.local_devices()[:devices]
        optimizer = training.make_optimizer(OPTIMIZER, steps_per_epoch=1, epochs=1)
        network = case.create(sparsity).clone(axis_name=parallel.AXIS)
        step = training.make_train_step(network, optimizer, preprocessing=IMAGENET_PREPROCESSING)
        state = training.create_state(case.variables(), optimizer, jax.random.key(case.seed))
        self.state = parallel.replicate(state, chosen)
        self.batch = parallel.shard(case.batch(), devices)
        mapped: Any = parallel.map_step(step, devices=chosen)
        start = time.perf_counter()
        self.compiled = mapped.lower(self.state, self.batch).compile()
        self.compile_seconds = time.perf_counter() - start

    def __call__(self) -> float:
        """Makes a step and waits for it."""
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


def measure_step(ours: Step, packages: Torch | None, rounds: int) -> Row:
    """Times our step beside PyTorch's, which is eager and in either memory layout.

    Args:
        ours: Fresh, on one device.
        packages: None measures ours alone.
        rounds: How often each is timed.

    Raises:
        RuntimeError: The two sides do not compute the same.
    """
    case = ours.case
    candidates: dict[str, Callable[[], float]] = {OURS: ours}
    differences: dict[str, float] = {}
    if packages is not None:
        batch, modules = case.batch(), {}
        for layout in LAYOUTS:
            modules[layout] = _torch_module(packages, case, ours.sparsity, layout)
            candidates[layout] = benchmark_torch.training_step(
                packages,
                modules[layout],
                batch,
                preprocessing=IMAGENET_PREPROCESSING,
                optimizer=OPTIMIZER,
                memory_format=layout,
            )
        differences = _differences(ours, candidates, modules)
        _check_agreement(ours, differences)
    seconds = benchmark.measure(candidates, rounds=rounds)
    memory = ours.compiled.memory_analysis()
    return Row(
        case,
        ours.sparsity,
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
    ours: Step, steps: Mapping[str, Callable[[], float]], modules: Mapping[str, Any]
) -> dict[str, float]:
    """Makes two steps on each side; the largest of the differences from PyTorch's modules."""
    start = variables_to_state_dict(ours.case.variables())
    statistics = [name for name in start if ".running_" in name]
    parameters = [name for name in start if name not in statistics]

    def relative(names: Sequence[str]) -> float:
        found = variables_to_state_dict(jax.device_get(ours.state.variables))
        largest = []
        for module in modules.values():
            expected = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
            wrong = sum(np.sum(np.square(found[name] - expected[name])) for name in names)
            change = sum(np.sum(np.square(expected[name] - start[name])) for name in names)
            largest.append(np.sqrt(wrong / change))
        return float(np.max(largest))  # not max(), which may pass over a NaN

    losses = {name: step() for name, step in steps.items()}
    differences = {
        "loss": float(np.max([abs(losses[OURS] / losses[name] - 1) for name in modules])),
        "parameters": relative(parameters),
        "statistics": relative(statistics),
    }
    for step in steps.values():
        step()
    return differences | {"second step": relative(parameters)}


def _check_agreement(ours: Step, differences: Mapping[str, float]) -> None:
    bounds = SAME if ours.sparsity == 1 else SAME_TOPK
    for name, difference in differences.items():
        if not difference <= bounds[name]:
            raise RuntimeError(
                f"{ours.case.network} ({format_activation(ours.sparsity)}): the relative "
                f"difference from PyTorch is {difference:.2g} ({name}), expected at most "
                f"{bounds[name]:g}: the two sides do not compute the same"
            )


def measure_scaling(
    case: Case, devices: Sequence[int], rounds: int, report: Callable[[str], None]
) -> Scaling:
    """Times the plain network's step with its batch divided among devices.

    Args:
        case: What is trained.
        devices: How many; one is measured in any case.
        rounds: How often each is timed.
        report: Is told where there are fewer.

    Raises:
        RuntimeError: The process of a CPU's fake devices failed.
    """
    counts = sorted({1, *devices})
    if jax.default_backend() == "cpu":
        return _scaling_in_child(case, counts, rounds)
    there = [count for count in counts if count <= jax.local_device_count()]
    if there != counts:
        report(f"{case.network}: only {jax.local_device_count()} devices here")
    return _scaling_here(case, there, rounds)


def _scaling_here(case: Case, counts: Sequence[int], rounds: int) -> Scaling:
    if max(counts) > jax.local_device_count():
        raise RuntimeError(f"{max(counts)} devices asked for, {jax.local_device_count()} found")
    steps = {str(count): Step(case, 1.0, devices=count) for count in counts}
    seconds = benchmark.measure(steps, rounds=rounds)
    return Scaling(case, {int(count): values for count, values in seconds.items()})


def _scaling_in_child(case: Case, counts: Sequence[int], rounds: int) -> Scaling:
    request = {"case": dataclasses.asdict(case), "counts": list(counts), "rounds": rounds}
    # Of a flag that is there twice the last one counts.
    xla_flags = (
        os.environ.get("XLA_FLAGS", ""),
        f"--xla_force_host_platform_device_count={max(counts)}",
    )
    package = os.fspath(pathlib.Path(__file__).parents[2])
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(xla_flags),
        "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH")))),
    }
    done = subprocess.run(
        [sys.executable, "-m", "topk_jax.jobs.benchmark_steps", json.dumps(request)],
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
def open_images(source: str | os.PathLike[str], seed: int) -> Iterator[Stimuli]:
    """Images in a folder; drawn ones are gone afterwards.

    Args:
        source: A folder of class folders, of which at most 2,048 images are taken, evenly; or
            "builtin", drawn into a temporary folder as JPEGs of 96 x 96 pixels.
        seed: Of the drawn ones.

    Raises:
        ValueError, OSError: As `stimuli.read_image_folder`.
    """
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
            large = images.resize(image, _DRAWN_SIZE, _DRAWN_SIZE)
            Image.fromarray(large).save(path, quality=90)
        yield stimuli.read_image_folder(folder)


def measure_input(step: Step, found: Stimuli, rounds: int) -> list[Input]:
    """Times batches alone, and steps fed with them or with one batch, from files and from memory.

    Args:
        step: On one device.
        found: Images in files.
        rounds: How often each is timed.
    """
    case = step.case
    augmentation = Augmentation(crop="random_resized", flip=True, size=case.image_size)
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
