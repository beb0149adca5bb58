"""The Top-K activation alone, side by side with a copy of the tensor and with PyTorch.

On a CPU the other side is PyTorch: the authors' formulation, and the fastest of several others on
the same tensor. On a GPU also the Pallas kernel and `lax.top_k` with a scatter. A copy of the same
tensor (`2 * x` into new memory) shows how far the memory alone would let one go.
"""

import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array

from topk_jax import kernels
from topk_jax.jobs import benchmark, benchmark_torch
from topk_jax.topk import kept_count, topk_activation

SHAPES = (
    (64, 55, 55, 64),
    (64, 27, 27, 192),
    (64, 13, 13, 384),
    (64, 13, 13, 256),
    (16, 224, 224, 64),
    (16, 112, 112, 128),
    (16, 56, 56, 256),
    (16, 28, 28, 512),
    (16, 14, 14, 512),
    (32, 56, 56, 256),
    (32, 28, 28, 512),
    (32, 14, 14, 1024),
    (32, 7, 7, 2048),
)
"""Maps of AlexNet, VGG16 and ResNet-50, NHWC: where Top-K is applied, and larger ones."""

FRACTIONS = (0.05, 0.1, 0.2, 0.5)
DATA = ("normal", "relu", "coarse")
OURS, BACKWARD, COPY, AUTHORS, BEST = "topk_jax", "backward", "copy", "authors", "best"

_PACKAGES = ("jax", "jaxlib", "numpy", "torch")
_CHECKED_ENTRIES = 1 << 22  # exactness is checked on as many images as hold about this many


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of one tensor and fraction.

    Attributes:
        shape: NHWC.
        dtype: "float32" or "bfloat16".
        fraction: Part kept.
        compile_seconds: Until the forward program was compiled; in no other number.
        temporary: Temporary memory of the forward program over the memory of the tensor.
        seconds: Of each round, by candidate: "topk_jax" (forward), "backward" (forward and
            backward), "copy", "authors" and "best" (PyTorch), on a GPU "xla" and "lax.top_k".
        best: Which of PyTorch's formulations was the fastest.
    """

    shape: tuple[int, ...]
    dtype: str
    fraction: float
    compile_seconds: float
    temporary: float
    seconds: dict[str, tuple[float, ...]]
    best: str | None

    def ratio(self, other: str) -> benchmark.Ratio:
        """Another candidate's time over ours."""
        return benchmark.ratio(self.seconds[other], self.seconds[OURS])

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        ratios = {name: dataclasses.asdict(self.ratio(name)) for name in self.seconds}
        return dataclasses.asdict(self) | {"ratio": ratios}


def run(
    *,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    fractions: Sequence[float] = FRACTIONS,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    data: str = "normal",
    rounds: int = 5,
    seed: int = 0,
    compare: bool = True,
    output: str | os.PathLike[str] | None = None,
    command: str = "topk_jax.jobs.benchmark_topk.run",
    report: Callable[[str], None] = logging.info,
) -> dict[str, Any]:
    """Measures every shape, dtype and fraction, and returns everything measured.

    Args:
        shapes: NHWC shapes.
        fractions: Parts kept.
        dtypes: "float32", "bfloat16".
        data: "normal", "relu" (half zeros) or "coarse" (quarter steps: many ties).
        rounds: How often each candidate is timed.
        seed: Of the tensors.
        compare: Measure PyTorch too, where it is installed.
        output: A .md or .json file that the results are added to.
        command: What is noted there as the way to repeat the measurement.
        report: Is given each line of what a reader wants to see.

    Returns:
        {benchmark, command, date, machine, versions, data, rounds, seed, rows: [`Row.as_dict`]}.

    Raises:
        ValueError: Bad input.
        RuntimeError: A result is not the exact one.
    """
    if data not in DATA:
        raise ValueError(f"data {data!r}: expected one of {', '.join(DATA)}")
    for shape in shapes:
        if len(shape) != 4 or min(shape) < 1:
            raise ValueError(f"shape {shape}: expected four positive sizes, NHWC")
    if output:
        benchmark.check_output(output)
    torch = benchmark_torch.import_alone(report) if compare else None
    facts = benchmark.setting(_PACKAGES if torch else _PACKAGES[:-1])
    rows = []
    for dtype in dtypes:
        for shape in shapes:
            x = _draw(shape, dtype, data, seed)
            for fraction in fractions:
                rows.append(_measure(x, fraction, torch, rounds))
                report(_format_briefly(rows[-1]))
    result = {
        "benchmark": "topk",
        "command": command,
        **facts,
        "data": data,
        "rounds": rounds,
        "seed": seed,
        "rows": [row.as_dict() for row in rows],
    }
    table = format_rows(rows)
    for line in table:
        report(line)
    if output:
        title = f"Top-K alone, {data} data"
        note = f"{data} data, rounds: {rounds}, seed: {seed}"
        benchmark.append(output, result, benchmark.section(title, result, note, table))
        report(f"added to {os.fspath(output)}")
    return result


def format_rows(rows: Sequence[Row]) -> list[str]:
    """The table of all rows, and below it the geometric means a dtype."""
    others = [
        name for name in (AUTHORS, BEST, "lax.top_k", "pallas_gpu") if name in rows[0].seconds
    ]
    titles = ["shape NHWC", "dtype", "kept", "ms (min-max)", "copy ms", "fwd+bwd / fwd"]
    titles += [f"{name} / ours" for name in others] + ["compile s", "temp / x"]
    lines = benchmark.format_table(titles, [_cells(row, others) for row in rows])
    for dtype in dict.fromkeys(row.dtype for row in rows):
        chosen = [row for row in rows if row.dtype == dtype]
        means = [
            f"{name} {benchmark.geometric_mean(ratios):.2f} (smallest {min(ratios):.2f})"
            for name in others
            if (ratios := [row.ratio(name).median for row in chosen])
        ]
        backward = benchmark.geometric_mean(row.ratio(BACKWARD).median for row in chosen)
        copy = benchmark.geometric_mean(1 / row.ratio(COPY).median for row in chosen)
        lines += [
            "",
            f"Geometric means, {dtype}, times ours: {', '.join((*means, f'copy 1/{copy:.2f}'))}; "
            f"forward and backward {backward:.2f} times forward.",
        ]
    if any(benchmark.is_noisy(row.seconds[OURS]) for row in rows):
        lines += ["", benchmark.NOISE_NOTE]
    return lines


def _cells(row: Row, others: Sequence[str]) -> list[str]:
    ours = [1e3 * seconds for seconds in row.seconds[OURS]]
    noisy = "*" if benchmark.is_noisy(ours) else ""
    return [
        "x".join(map(str, row.shape)),
        row.dtype,
        f"{row.fraction:g}",
        f"{statistics.median(ours):.1f} ({min(ours):.1f}-{max(ours):.1f}){noisy}",
        f"{1e3 * statistics.median(row.seconds[COPY]):.1f}",
        f"{row.ratio(BACKWARD).median:.2f}",
        *(str(row.ratio(name)) for name in others),
        f"{row.compile_seconds:.1f}",
        f"{row.temporary:.2f}",
    ]


def _format_briefly(row: Row) -> str:
    times = ", ".join(f"{k} {1e3 * statistics.median(v):.1f}" for k, v in row.seconds.items())
    return f"{'x'.join(map(str, row.shape))} {row.dtype} {row.fraction:g}: {times} ms"


def _draw(shape: tuple[int, ...], dtype: str, data: str, seed: int) -> Array:
    x = np.random.default_rng(seed).standard_normal(shape, np.float32)
    if data == "relu":
        x = np.maximum(x, 0)
    elif data == "coarse":
        x = np.round(4 * x) / 4
    return jnp.asarray(x).astype(dtype)


def _measure(x: Array, fraction: float, torch: Any, rounds: int) -> Row:
    activation = functools.partial(topk_activation, fraction=fraction)
    start = time.perf_counter()
    compiled = jax.jit(activation).lower(x).compile()
    compile_seconds = time.perf_counter() - start
    _check_exact(x, compiled(x), fraction)
    memory = compiled.memory_analysis()
    temporary = memory.temp_size_in_bytes / x.nbytes if memory else float("nan")

    def both(x: Array, gradient: Array) -> tuple[Array, Array]:
        y, pull = jax.vjp(activation, x)
        return y, pull(gradient)[0]

    candidates: dict[str, Callable[[], Any]] = {
        OURS: _call(compiled, x),
        BACKWARD: _call(jax.jit(both), x, x),
        COPY: _call(jax.jit(lambda x: 2 * x), x),
    }
    if jax.default_backend() == "gpu":
        with kernels.force("pallas_gpu"):
            kernel = jax.jit(lambda x: activation(x)).lower(x).compile()
        candidates |= {
            "pallas_gpu": _call(kernel, x),
            "lax.top_k": _call(jax.jit(lambda x: _by_lax_top_k(x, fraction)), x),
        }
    best = None
    if torch is not None:
        forms = benchmark_torch.topk_forms(torch, x, fraction)
        candidates[AUTHORS] = forms[AUTHORS]
        best = min((name for name in forms if name != AUTHORS), key=lambda n: _once(forms[n]))
        candidates[BEST] = forms[best]
    for call in candidates.values():
        call()
    seconds = benchmark.measure(candidates, rounds=rounds)
    return Row(x.shape, x.dtype.name, fraction, compile_seconds, temporary, seconds, best)


def _call(function: Callable[..., Any], *args: Array) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(function(*args))


def _once(call: Callable[[], Any]) -> float:
    """Seconds of a second call."""
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _by_lax_top_k(x: Array, fraction: float) -> Array:
    """`lax.top_k` of the magnitudes, scattered into a mask: the usual way in JAX."""
    n, h, w, c = x.shape
    rows = jnp.transpose(x, (0, 3, 1, 2)).reshape(n * c, h * w)
    _, kept = jax.lax.top_k(jnp.abs(rows), kept_count(fraction, (h, w)))
    mask = jnp.zeros(rows.shape, jnp.bool_).at[jnp.arange(n * c)[:, None], kept].set(True)
    return jnp.where(mask, rows, jnp.zeros((), x.dtype)).reshape(n, c, h, w).transpose(0, 2, 3, 1)


def _check_exact(x: Array, y: Array, fraction: float) -> None:
    """Compares some images with a stable sort in NumPy."""
    images = max(1, _CHECKED_ENTRIES * len(x) // x.size)
    rows = np.asarray(x[:images].astype(jnp.float32))
    rows = rows.transpose(0, 3, 1, 2).reshape(-1, x.shape[1] * x.shape[2])
    found = np.asarray(y[:images].astype(jnp.float32))
    found = found.transpose(0, 3, 1, 2).reshape(rows.shape)
    order = np.argsort(-np.abs(rows), axis=1, kind="stable")
    kept = order[:, : kept_count(fraction, x.shape[1:3])]
    mask = np.zeros(rows.shape, bool)
    np.put_along_axis(mask, kept, True, axis=1)
    if not np.array_equal(found, np.where(mask, rows, 0)):
        raise RuntimeError(f"{x.shape} {x.dtype} at {fraction:g}: not the exact Top-K")
