"""Texture synthesis side by side with PyTorch and SciPy: time an evaluation, loss for a budget.

The objective, the start and the number of evaluations are the same on all sides; losses are
compared after as many evaluations of value and gradient, the lowest one seen so far counting for
each. The target's Gram matrices, the images and the weights are the same arrays.
"""

import dataclasses
import importlib.util
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from topk_jax import synthesis
from topk_jax.jobs import benchmark, benchmark_torch, synthesize
from topk_jax.networks import VGG, feature_shapes
from topk_jax.synthesis import parametrization
from topk_jax.synthesis.objectives import Mode
from topk_jax.synthesis.presets import Preset
from topk_jax.weights import CAFFE_PREPROCESSING, WeightsFile

OURS = "topk_jax"
LAYOUTS: tuple[benchmark_torch.MemoryFormat, ...] = ("contiguous", "channels_last")
TORCH_LBFGS, SCIPY = "torch LBFGS", "scipy L-BFGS-B"
_MEMORY = 100
_PACKAGES = ("jax", "jaxlib", "numpy", "optax", "scipy", "torch")

Trace = list[float]
"""Loss of each evaluation, in order."""


@dataclasses.dataclass(frozen=True)
class Search:
    """One target, one optimiser.

    Attributes:
        target: Name of the picture.
        optimizer: Which.
        losses: Lowest loss, in units of `objectives.Scaled`, by number of evaluations.
        seconds: Of an evaluation, everything included but compilation.
    """

    target: str
    optimizer: str
    losses: dict[int, float]
    seconds: float


def run(
    *,
    preset: str = "li2023",
    weights: str | os.PathLike[str] | None = None,
    source: str | os.PathLike[str] = synthesize.BUILTIN,
    modes: Sequence[Mode] = ("all",),
    image_size: int = 256,
    evaluations: Sequence[int] = (),
    rounds: int = 5,
    seed: int = 0,
    compare: bool = True,
    output: str | os.PathLike[str] | None = None,
    command: str = "topk_jax.jobs.benchmark_synthesis.run",
    report: Callable[[str], None] = logging.info,
) -> dict[str, Any]:
    """Measures an evaluation and, with `evaluations`, whole searches; returns everything measured.

    Args:
        preset: Name of a preset with a VGG.
        weights: Tag of the catalogue or a file; None draws random ones from the seed.
        source: Pictures, as in `synthesize.run`.
        modes: Masks to be measured.
        image_size: Height and width of the images, pixels.
        evaluations: Budgets at which the losses of the optimisers are compared, for mode "all" on
            every picture; none leaves the searches out.
        rounds: How often each candidate is timed.
        seed: Of random weights and of the noise.
        compare: Measure PyTorch and SciPy too, where they are installed.
        output: A .md or .json file that the results are added to.
        command: What is noted there as the way to repeat the measurement.
        report: Is given each line of what a reader wants to see.

    Raises:
        ValueError: Bad input. RuntimeError: the losses of both sides do not agree.
    """
    setting = dataclasses.replace(synthesis.find_preset(preset), size=(image_size, image_size))
    if not isinstance(setting.network(), VGG):
        raise ValueError(f"{preset}: expected a preset with a VGG")
    if output:
        benchmark.check_output(output)
    torch = benchmark_torch.import_alone(report) if compare else None
    loaded = synthesis.load_weights(setting, weights=weights) if weights else _random(setting, seed)
    targets = synthesize.read_targets(source, setting)
    features = synthesis.extractor(setting, loaded)
    rows = []
    for mode in modes:
        problem = synthesis.create_problem(
            setting, loaded, targets[0].pixels, objective="texture", mode=mode, features=features
        )
        seconds, compiling = _time_evaluation(setting, loaded, problem, mode, torch, rounds, seed)
        ratios = {
            layout: benchmark.ratio(seconds[layout], seconds[OURS])
            for layout in LAYOUTS
            if layout in seconds
        }
        rows.append((mode, seconds, compiling, ratios))
        report(_brief(mode, seconds, ratios))
    if compare and evaluations and importlib.util.find_spec("scipy") is None:
        report("without scipy: pip install scipy to compare with its L-BFGS-B")
    searches: list[Search] = []
    for target in targets if evaluations else ():
        problem = synthesis.create_problem(
            setting, loaded, target.pixels, objective="texture", features=features
        )
        budget = max(evaluations)
        for optimizer, call in _optimizers(setting, loaded, problem, torch, seed, compare).items():
            start = time.perf_counter()
            trace = call(budget)
            spent = (time.perf_counter() - start) / len(trace)
            losses = {n: min(trace[:n]) for n in evaluations}
            searches.append(Search(target.stem, optimizer, losses, spent))
            report(f"{target.stem}, {optimizer}: {_losses(losses)}, {1e3 * spent:.0f} ms each")
    result = {
        "benchmark": "synthesis",
        "command": command,
        **benchmark.setting(_PACKAGES if compare else _PACKAGES[:-2]),
        "preset": preset,
        "weights": loaded.file.origin,
        "image_size": image_size,
        "rounds": rounds,
        "seed": seed,
        "rows": [
            {"mode": mode, "seconds": seconds, "compile_seconds": compiling,
             "ratio": {name: dataclasses.asdict(value) for name, value in ratios.items()}}
            for mode, seconds, compiling, ratios in rows
        ],
        "searches": [dataclasses.asdict(search) for search in searches],
    }  # fmt: skip
    table = _evaluation_table(rows)
    if searches:
        table += ["", *_search_table(searches)]
    for line in table:
        report(line)
    if output:
        note = (
            f"{preset} with weights {loaded.file.origin}, {image_size} x {image_size} pixels, "
            f"rounds: {rounds}"
        )
        benchmark.append(output, result, benchmark.section("Synthesis", result, note, table))
        report(f"added to {os.fspath(output)}")
    return result


def _random(preset: Preset, seed: int) -> synthesis.Weights:
    """Kernels as He et al. (2015), of the layers that are needed alone; biases of zero."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return np.zeros(shape, np.float32)
        scale = np.float32((2 / np.prod(shape[:-1])) ** 0.5)
        return scale * rng.standard_normal(shape, np.float32)

    shapes = feature_shapes(preset.network(), preset.layers)
    variables = jax.tree.map(lambda leaf: draw(leaf.shape), shapes)
    origin = f"random seed={seed}"
    return synthesis.Weights(
        variables, CAFFE_PREPROCESSING, WeightsFile(pathlib.Path(), "", origin, None)
    )


def _time_evaluation(
    preset: Preset,
    weights: synthesis.Weights,
    problem: synthesis.Problem,
    mode: Mode,
    torch: Any,
    rounds: int,
    seed: int,
) -> tuple[dict[str, tuple[float, ...]], float]:
    """Seconds of value and gradient with respect to the image by candidate, and of compiling."""
    z = parametrization.start(
        jax.random.key(seed), problem.parametrization, problem.shape, problem.deviation
    )
    image = problem.parametrization.to_image(z)
    start = time.perf_counter()
    jax.block_until_ready(_value_and_gradient(problem.objective, image))
    compiling = time.perf_counter() - start
    candidates: dict[str, Callable[[], Any]] = {
        OURS: lambda: jax.block_until_ready(_value_and_gradient(problem.objective, image))
    }
    if torch is not None:
        for layout in LAYOUTS:
            objective = TorchTexture(torch, preset, weights, problem, mode=mode, layout=layout)
            x = objective.image(np.asarray(image))
            candidates[layout] = lambda objective=objective, x=x: objective.value_and_gradient(x)
        ours, theirs = (
            float(_value_and_gradient(problem.objective, image)[0]),
            candidates[LAYOUTS[0]]()[0],
        )
        if mode == "all" and not abs(ours - theirs) <= 1e-3 * abs(ours):
            raise RuntimeError(f"the losses do not agree: {ours} here, {theirs} in PyTorch")
    return benchmark.measure(candidates, rounds=rounds), compiling


_value_and_gradient = jax.jit(lambda objective, x: jax.value_and_grad(objective)(x))


class TorchTexture:
    """The texture objective as PyTorch's users write it: eager modules, autograd."""

    def __init__(
        self,
        torch: Any,
        preset: Preset,
        weights: synthesis.Weights,
        problem: synthesis.Problem,
        *,
        mode: Mode = "all",
        layout: benchmark_torch.MemoryFormat = "contiguous",
    ):
        self._torch = torch
        self._preset = preset
        self._mode = mode
        self._format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        params = weights.variables["params"]
        self._convolutions = {
            name: (
                torch.from_numpy(np.array(part["kernel"].transpose(3, 2, 0, 1))).contiguous(
                    memory_format=self._format
                ),
                torch.from_numpy(np.array(part["bias"])),
            )
            for name, part in params.items()
        }
        targets = problem.objective.objective.args[1]
        self._targets = {
            name: torch.from_numpy(np.array(gram[0][0])) for name, gram in targets.items()
        }
        self._scale = preset.weight / float(problem.objective.unit)

    def image(self, image: np.ndarray) -> Any:
        """A leaf tensor of an image [1, h, w, 3]."""
        tensor = self._torch.from_numpy(np.array(image)).permute(0, 3, 1, 2)
        return tensor.contiguous(memory_format=self._format).requires_grad_(True)

    def value_and_gradient(self, x: Any) -> tuple[float, Any]:
        """Loss in the units of `objectives.Scaled`, and its gradient."""
        loss = self.loss(x)
        (gradient,) = self._torch.autograd.grad(loss, x)
        return float(loss.detach()), gradient

    def loss(self, x: Any) -> Any:
        """Loss of a tensor [1, 3, h, w]."""
        functional = self._torch.nn.functional
        network, total, index = self._preset.network(), 0.0, 0
        assert isinstance(network, VGG)
        left = set(self._targets)
        pool = functional.avg_pool2d if network.pool == "average" else functional.max_pool2d
        for stage, count in enumerate(network.convolutions, start=1):
            for i in range(1, count + 1):
                kernel, bias = self._convolutions[f"features.{index}"]
                x = functional.conv2d(x, kernel, bias, padding=1)
                total = total + self._term(left, f"conv{stage}_{i}", x)
                x = functional.relu(x)
                total = total + self._term(left, f"relu{stage}_{i}", x)
                index += 2
                if not left:
                    return total * self._scale
            x = pool(x, 2, 2)
            index += 1
            total = total + self._term(left, f"pool{stage}", x)
            if not left:
                return total * self._scale
        raise ValueError(f"no features {', '.join(sorted(left))}")

    def _term(self, left: set[str], name: str, x: Any) -> Any:
        if name not in left:
            return 0.0
        left.discard(name)
        _, c, h, w = x.shape
        rows = x.reshape(c, h * w)
        if self._mode != "all":
            kept = rows.abs().topk(max(1, int(self._preset.sparsity * h * w)), dim=1).indices
            mask = self._torch.zeros_like(rows).scatter_(1, kept, 1)
            rows = rows * (mask if self._mode == "top" else 1 - mask)
        gram = rows @ rows.T / (c * h * w)
        return ((gram - self._targets[name]) ** 2).sum()


def _optimizers(
    preset: Preset,
    weights: synthesis.Weights,
    problem: synthesis.Problem,
    torch: Any,
    seed: int,
    compare: bool,
) -> dict[str, Callable[[int], Trace]]:
    """Searches from the same start, by optimiser: number of evaluations -> losses of them."""
    space = problem.parametrization
    z = parametrization.start(jax.random.key(seed), space, problem.shape, problem.deviation)

    def ours(budget: int) -> Trace:
        trace: Trace = []
        for state in synthesis.search(
            jax.random.key(seed), problem, max_evaluations=budget, memory_size=_MEMORY
        ):
            # Trials that were not accepted count as no better than the point before.
            last = trace[-1] if trace else state.value
            trace += [last] * (state.evaluations - len(trace) - 1) + [state.value]
        return trace

    def of_numbers(objective: Any, z: Any) -> Any:
        return jax.value_and_grad(lambda z: objective(space.to_image(z)))(z)

    compiled = jax.jit(of_numbers)
    jax.block_until_ready(compiled(problem.objective, z))

    def scipy(budget: int) -> Trace:
        import scipy.optimize

        trace: Trace = []

        def call(flat: np.ndarray) -> tuple[float, np.ndarray]:
            point = jnp.asarray(flat.reshape(z.shape), jnp.float32)
            value, gradient = compiled(problem.objective, point)
            trace.append(float(value))
            return trace[-1], np.asarray(gradient, np.float64).ravel()

        scipy.optimize.minimize(
            call, np.asarray(z, np.float64).ravel(), jac=True, method="L-BFGS-B",
            options={"maxcor": _MEMORY, "maxfun": budget, "maxiter": budget, "ftol": 0.0,
                     "gtol": 0.0, "maxls": 25},
        )  # fmt: skip
        return trace[:budget]

    def torch_lbfgs(budget: int) -> Trace:
        objective = TorchTexture(torch, preset, weights, problem)
        numbers = objective.image(np.asarray(z))
        low, high = float(space.low), float(space.high)
        published = float(problem.objective.unit)
        trace: Trace = []
        optimizer = torch.optim.LBFGS(
            [numbers], lr=1.0, max_iter=budget, max_eval=budget, tolerance_grad=0,
            tolerance_change=0, history_size=_MEMORY, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure() -> Any:
            optimizer.zero_grad()
            loss = objective.loss(low + (high - low) * torch.sigmoid(numbers))
            trace.append(float(loss.detach()))
            loss = loss * published  # the scale that the authors optimise in
            loss.backward()
            return loss

        optimizer.step(closure)
        return trace[:budget]

    optimizers: dict[str, Callable[[int], Trace]] = {OURS: ours}
    if compare and preset.parametrization == "sigmoid":
        if torch is not None:
            optimizers[TORCH_LBFGS] = torch_lbfgs
        if importlib.util.find_spec("scipy") is not None:
            optimizers[SCIPY] = scipy
    return optimizers


def _brief(mode: str, seconds: Mapping[str, Sequence[float]], ratios: Mapping[str, Any]) -> str:
    times = ", ".join(f"{name} {1e3 * statistics.median(s):.0f} ms" for name, s in seconds.items())
    return f"{mode}: {times}" + "".join(f"; {name}/ours {r}" for name, r in ratios.items())


def _losses(losses: Mapping[int, float]) -> str:
    return ", ".join(f"{value:.4g} after {n}" for n, value in losses.items())


def _evaluation_table(rows: Sequence[tuple[Any, ...]]) -> list[str]:
    layouts = list(rows[0][3])
    titles = ["mode", "ms", "compile s"]
    for layout in layouts:
        titles += [f"PyTorch {layout} ms", "ratio (min-max)"]

    def milliseconds(values: Sequence[float]) -> str:
        noisy = "*" if benchmark.is_noisy(values) else ""
        return f"{1e3 * statistics.median(values):.0f}{noisy}"

    cells = []
    for mode, seconds, compiling, ratios in rows:
        cells.append([mode, milliseconds(seconds[OURS]), f"{compiling:.1f}"])
        for layout in layouts:
            cells[-1] += [milliseconds(seconds[layout]), str(ratios[layout])]
    lines = benchmark.format_table(titles, cells)
    if any(benchmark.is_noisy(values) for row in rows for values in row[1].values()):
        lines += ["", benchmark.NOISE_NOTE]
    return lines


def _search_table(searches: Sequence[Search]) -> list[str]:
    """Losses by target and budget, and geometric means of the ratios to ours below."""
    optimizers = list(dict.fromkeys(search.optimizer for search in searches))
    budgets = list(searches[0].losses)
    found = {(s.target, s.optimizer, n): s.losses[n] for s in searches for n in budgets}
    cells = [
        [target, str(n), *(f"{found[target, optimizer, n]:.3g}" for optimizer in optimizers)]
        for target in dict.fromkeys(search.target for search in searches)
        for n in budgets
    ]
    lines = benchmark.format_table(["target", "evaluations", *optimizers], cells)
    for optimizer in optimizers[1:]:
        for n in budgets:
            targets = [s.target for s in searches if s.optimizer == optimizer]
            ratios = [found[t, OURS, n] / found[t, optimizer, n] for t in targets]
            within = sum(value <= 1.05 for value in ratios)
            lines += ["", f"Ours / {optimizer} after {n}: geometric mean "
                      f"{benchmark.geometric_mean(ratios):.3f}, at most 1.05 on {within} of "
                      f"{len(ratios)} targets."]  # fmt: skip
    for optimizer in optimizers:
        each = statistics.median(s.seconds for s in searches if s.optimizer == optimizer)
        lines += ["", f"{optimizer}: {1e3 * each:.0f} ms an evaluation, searches as a whole."]
    return lines
