"""Training steps side by side with PyTorch, their memory, more devices, and what the input costs.

`benchmark_steps` says what a step is and how it is measured; here are the run and its tables.
"""

import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import logging

from topk_jax import parallel
from topk_jax.jobs import benchmark, benchmark_steps, benchmark_torch
from topk_jax.jobs.benchmark_inference import LAYOUTS, OURS, format_activation
from topk_jax.jobs.benchmark_steps import BUILTIN, Case, Input, Row, Scaling, Step

NETWORKS = ("resnet18", "resnet32")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "numpy", "pillow", "torch", "torchvision")
_MEBIBYTE = 2**20


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
    with benchmark_steps.open_images(source, seed) as found:
        for case in cases:
            plain, *sparse = (Step(case, sparsity) for sparsity in fractions)
            for step in (plain, *sparse):
                rows.append(benchmark_steps.measure_step(step, packages, rounds))
                report(_format_briefly(rows[-1]))
            inputs += benchmark_steps.measure_input(plain, found, rounds)
            report(f"{case.network}: input from files adds {_percent(inputs[-2].share.median)}")
            if devices:
                scaling.append(benchmark_steps.measure_scaling(case, devices, rounds, report))
                report(f"{case.network}: measured on {len(scaling[-1].seconds)} numbers of devices")
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
            f"Fake devices that share {benchmark.cpu_count()} processors: they add no speed, and "
            "what is missing to 1 is the cost of dividing the batch.",
        ]
    return lines


def format_inputs(rows: Sequence[Input]) -> list[str]:
    """The table of what the input costs."""
    cells = []
    for row in rows:
        share = row.share
        cells.append(
            [
                row.case.network,
                row.source,
                _speed(row.case.batch_size, row.alone),
                _speed(row.case.batch_size, row.repeated),
                _speed(row.case.batch_size, row.fed),
                f"{_percent(share.median)} ({_percent(share.low)} to {_percent(share.high)})",
            ]
        )
    titles = ["network", "input", "alone, images/s", "steps on one batch", "steps on the input"]
    return [
        *benchmark.format_table([*titles, "share of a step"], cells),
        "",
        "Input: random-resized crop and flip, made ahead in threads; files come from the system's "
        "cache. Its share is the time by which a step that is fed with it takes longer.",
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


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
        network = Case(name, 1, 1, seed).create()
        for sparsity in sparsities:
            Case(name, 1, 1, seed).create(sparsity)
        small = network.stem == "cifar"
        if compare and small and network.shortcut != "padding":
            raise ValueError(f"{name}: PyTorch has no such network; --nocompare measures it alone")
        usual = (128, 32) if small else (64, 64)
        cases.append(Case(name, batch_size or usual[0], image_size or usual[1], seed))
    return cases
