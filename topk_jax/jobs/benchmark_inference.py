"""Images a second of whole networks, plain and with Top-K, side by side with PyTorch.

Both sides get the same random weights and images, float32, and all processors that the process may
use. Their outputs are compared before anything is timed. Networks are done one after the other, so
that only one's weights are in memory.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Float, Float32

from topk_jax.jobs import benchmark, benchmark_torch
from topk_jax.jobs.benchmark import Ratio
from topk_jax.jobs.benchmark_torch import MemoryFormat, Torch
from topk_jax.networks import create_network, variable_shapes
from topk_jax.weights import variables_to_state_dict

NETWORKS = ("alexnet", "vgg16", "resnet50", "squeezenet1_1")
LAYOUTS: tuple[MemoryFormat, ...] = ("contiguous", "channels_last")

OURS = "topk_jax"
SAME = 1e-3
"""Relative difference of the logits up to which both sides give one image the same answer."""

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "torchvision")


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of one network with one activation.

    Attributes:
        network: Its name.
        sparsity: Kept fraction; 1.0 is the plain network.
        compile_seconds: Until our program was compiled; in no other number.
        seconds: Of each round, by candidate: "topk_jax", "contiguous" and "channels_last".
        differences: Largest difference of each image's logits between the sides, relative to the
            largest logit; empty without PyTorch. With Top-K PyTorch's side is a stable sort here.
    """

    network: str
    sparsity: float
    compile_seconds: float
    seconds: dict[str, tuple[float, ...]]
    differences: tuple[float, ...]

    @property
    def n_same(self) -> int:
        """Images whose logits agree within `SAME`."""
        return sum(difference <= SAME for difference in self.differences)

    def ratio(self, layout: str) -> Ratio:
        """PyTorch's time over ours."""
        return benchmark.ratio(self.seconds[layout], self.seconds[OURS])

    def as_dict(self, batch_size: int) -> dict[str, Any]:
        """For the JSON file."""
        others = [name for name in self.seconds if name != OURS]
        return {
            "network": self.network,
            "sparsity": self.sparsity,
            "compile_seconds": self.compile_seconds,
            "seconds": self.seconds,
            "images_per_second": {
                name: batch_size / statistics.median(values)
                for name, values in self.seconds.items()
            },
            "ratio": {name: dataclasses.asdict(self.ratio(name)) for name in others},
            "largest_difference": max(self.differences, default=None),
            "n_same": self.n_same if self.differences else None,
        }


def run(
    networks: Sequence[str] = NETWORKS,
    *,
    sparsities: Sequence[float] = (0.1,),
    batch_size: int = 32,
    image_size: int = 224,
    rounds: int = 5,
    seed: int = 0,
    compare: bool = True,
    output: str | os.PathLike[str] | None = None,
    command: str = "topk_jax.jobs.benchmark_inference.run",
    report: Callable[[str], None] = logging.info,
) -> dict[str, Any]:
    """Measures each network plain and with each fraction, and returns everything measured.

    Args:
        networks: Their names.
        sparsities: Kept fractions at the published sites.
        batch_size: Images a call.
        image_size: Side of the images in pixels.
        rounds: How often each candidate is timed.
        seed: Of weights and images.
        compare: Measure PyTorch too, where it is installed and JAX runs on the CPU.
        output: A .md or .json file that the results are added to.
        command: What is noted there as the way to repeat the measurement.
        report: Is given each line of what a reader wants to see.

    Returns:
        {benchmark, command, date, machine, versions, batch_size, image_size, rounds, seed, rows:
        [`Row.as_dict`]}.

    Raises:
        ValueError: Bad input, or images too small for a network.
        RuntimeError: The plain networks of both sides do not agree: there is nothing to compare.
    """
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size}: expected at least 1")
    if not networks:
        raise ValueError(f"no networks to measure; expected for example {','.join(NETWORKS)}")
    for name in networks:
        for sparsity in (None, *sparsities):
            create_network(name, topk=sparsity)
        if compare and name == "builtin":
            raise ValueError("builtin: PyTorch has no such network; --nocompare measures it alone")
    if output:
        benchmark.check_output(output)
    packages = benchmark_torch.import_for_cpu(report) if compare else None
    facts = benchmark.setting(_PACKAGES if packages else _PACKAGES[:-2])
    # Plain once, whether or not it is asked for as a fraction of 1.
    fractions = (1.0, *(sparsity for sparsity in sparsities if sparsity != 1))
    rows: list[Row] = []
    for name in networks:
        variables, images = _random_inputs(name, batch_size, image_size, seed)
        for sparsity in fractions:
            row = _measure(name, sparsity, variables, images, packages, rounds)
            _check_agreement(row, report)
            rows.append(row)
            report(_format_row_briefly(row, batch_size))
        del variables
    result = {
        "benchmark": "inference",
        "command": command,
        **facts,
        "batch_size": batch_size,
        "image_size": image_size,
        "rounds": rounds,
        "seed": seed,
        "rows": [row.as_dict(batch_size) for row in rows],
    }
    table = format_rows(rows, batch_size)
    for line in table:
        report(line)
    if output:
        note = (
            f"batch {batch_size}, {image_size} x {image_size} pixels, float32, rounds: {rounds}, "
            f"seed: {seed}"
        )
        benchmark.append(output, result, benchmark.section("Inference", result, note, table))
        report(f"added to {os.fspath(output)}")
    return result


def format_rows(rows: Sequence[Row], batch_size: int) -> list[str]:
    """The table, and below it the geometric means and what to know about noise."""
    layouts = [layout for layout in LAYOUTS if layout in rows[0].seconds]
    titles = ["network", "Top-K", "images/s", "compile s"]
    for layout in layouts:
        titles += [f"PyTorch {layout}", "ratio (min-max)"]
    titles += ["same logits"] if layouts else []
    lines = benchmark.format_table(titles, [_cells(row, layouts, batch_size) for row in rows])
    for sparsity in dict.fromkeys(row.sparsity for row in rows):
        chosen = [row for row in rows if row.sparsity == sparsity]
        means = [
            f"{benchmark.geometric_mean(row.ratio(layout).median for row in chosen):.2f} ({layout})"
            for layout in layouts
        ]
        if means:
            lines += [
                "",
                f"Geometric mean of the ratios, {format_activation(sparsity)}: {', '.join(means)}.",
            ]
    if any(benchmark.is_noisy(seconds) for row in rows for seconds in row.seconds.values()):
        lines += ["", benchmark.NOISE_NOTE]
    return lines


def _cells(row: Row, layouts: Sequence[str], batch_size: int) -> list[str]:
    def speed(name: str) -> str:
        seconds = row.seconds[name]
        noisy = "*" if benchmark.is_noisy(seconds) else ""
        return f"{batch_size / statistics.median(seconds):.1f}{noisy}"

    cells = [
        row.network,
        format_activation(row.sparsity),
        speed(OURS),
        f"{row.compile_seconds:.1f}",
    ]
    for layout in layouts:
        cells += [speed(layout), str(row.ratio(layout))]
    return cells + ([f"{row.n_same} of {len(row.differences)}"] if layouts else [])


def format_activation(sparsity: float) -> str:
    """What a table calls a kept fraction, of which 1 is the plain network."""
    return "plain" if sparsity == 1 else f"{format(100 * sparsity, 'g')} %"


def _format_row_briefly(row: Row, batch_size: int) -> str:
    """What is said while the others are still measured."""
    speeds = ", ".join(
        f"{name} {batch_size / statistics.median(seconds):.1f}"
        for name, seconds in row.seconds.items()
    )
    return f"{row.network} ({format_activation(row.sparsity)}): {speeds} images/s"


def _random_inputs(
    name: str, batch_size: int, image_size: int, seed: int
) -> tuple[dict[str, Any], Float32[np.ndarray, "n h w 3"]]:
    """Variables that keep the scale of the activations, and unit-normal images."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Float32[np.ndarray, "..."]:
        kind = path[-1].key
        if kind in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        noise = rng.standard_normal(leaf.shape, np.float32)
        if kind == "kernel":
            noise *= np.float32((2 / np.prod(leaf.shape[:-1])) ** 0.5)
            return noise
        return noise * np.float32(0.1)

    shapes = variable_shapes(create_network(name))
    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    return variables, rng.standard_normal((batch_size, image_size, image_size, 3), np.float32)


def _measure(
    name: str,
    sparsity: float,
    variables: Mapping[str, Any],
    images: Float32[np.ndarray, "n h w 3"],
    packages: Torch | None,
    rounds: int,
) -> Row:
    compile_seconds, ours = _ours(name, sparsity, variables, images)
    candidates: dict[str, Callable[[], Any]] = {OURS: ours}
    differences: tuple[float, ...] = ()
    if packages is not None:
        state_dict = variables_to_state_dict(variables)
        differences = _differences(
            ours(), _exact_logits(packages, name, sparsity, state_dict, images)
        )
        fast = None if sparsity == 1 else benchmark_torch.authors_topk(packages, sparsity)
        for layout in LAYOUTS:
            module = benchmark_torch.network(
                packages, name, state_dict, activation=fast, memory_format=layout
            )
            candidates[layout] = benchmark_torch.inference(
                packages, module, images, memory_format=layout
            )
            candidates[layout]()
    seconds = benchmark.measure(candidates, rounds=rounds)
    return Row(name, sparsity, compile_seconds, seconds, differences)


def _ours(
    name: str, sparsity: float, variables: Mapping[str, Any], images: Float32[np.ndarray, "n h w 3"]
) -> tuple[float, Callable[[], jax.Array]]:
    """Seconds until our program was compiled, and a call of it."""
    network = create_network(name, topk=None if sparsity == 1 else sparsity)
    on_device = jax.device_put((variables, images))
    start = time.perf_counter()
    compiled = (
        jax.jit(lambda variables, images: network.apply(variables, images, train=False)[0])
        .lower(*on_device)
        .compile()
    )
    return time.perf_counter() - start, lambda: jax.block_until_ready(compiled(*on_device))


def _exact_logits(
    packages: Torch,
    name: str,
    sparsity: float,
    state_dict: Mapping[str, np.ndarray],
    images: Float32[np.ndarray, "n h w 3"],
) -> Float32[np.ndarray, "n classes"]:
    """PyTorch's logits, with ties in Top-K decided as we decide them."""
    exact = None if sparsity == 1 else benchmark_torch.stable_topk(packages, sparsity)
    module = benchmark_torch.network(packages, name, state_dict, activation=exact)
    return benchmark_torch.inference(packages, module, images)()


def _differences(ours: Any, theirs: Float[np.ndarray, "n classes"]) -> tuple[float, ...]:
    difference = np.abs(np.asarray(ours) - theirs).max(axis=1) / np.abs(theirs).max()
    return tuple(difference.tolist())


def _check_agreement(row: Row, report: Callable[[str], None]) -> None:
    """Plain networks must agree; with Top-K rounding may turn a near-tie, and that spreads."""
    if row.n_same == len(row.differences):
        return
    line = (
        f"{row.network} ({format_activation(row.sparsity)}): the logits of {row.n_same} of "
        f"{len(row.differences)} images agree with PyTorch's within {SAME:g}, the largest relative "
        f"difference is {max(row.differences):.1g}"
    )
    if row.sparsity == 1:
        raise RuntimeError(f"{line}: the two sides do not compute the same")
    report(f"{line}; rounding decides between nearly equal values")
