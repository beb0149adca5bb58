"""L-BFGS with a strong-Wolfe line search: optax's direction, a search driven from the host.

Data contract: an objective is a function of one float32 array that gives a scalar. Arrays stay on
their device; the host sees two numbers an evaluation. The loop is in Python, not in XLA, because
XLA:CPU computes the gradients of convolutions several times slower inside its own loops, and
because progress, snapshots and Ctrl-C then need no further machinery; on an accelerator the two
numbers cost next to nothing beside an evaluation.

The budget counts evaluations of value and gradient, as comparisons between optimisers must.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

Objective = Callable[[Float[Array, "..."]], Float[Array, ""]]
"""A function of an array. As a `jax.tree_util.Partial` its arguments (weights, targets) are those
of the compiled program; those of any other callable become constants in it."""

Status = Literal[
    "running", "evaluations", "iterations", "gradient", "stalled", "line search failed"
]
"""Why a search has ended: its budget of evaluations or of iterations, the gradient's tolerance or a
gradient of zero, no progress, or no better point along two directions in turn."""

_SUFFICIENT_DECREASE = 1e-4  # c1 of the Wolfe conditions (Nocedal and Wright 2006, section 3.1)
_CURVATURE = 0.9  # c2
_TRIALS = 25  # evaluations of one search at most
_STALL_STEPS = 10
_EPSILON = float(np.finfo(np.float32).eps)


class State(NamedTuple):
    """An accepted point, and all that the next iteration needs; a pytree.

    Attributes:
        x: The point.
        value: Objective there.
        gradient: Its gradient there.
        memory: optax's state. It is given away to the next iteration: copy it to keep it.
        fresh: The memory is empty: the next direction is steepest descent.
        iterations: Accepted steps so far.
        evaluations: Evaluations so far, the first one included.
        first_gradient: Largest entry of the gradient at the start.
        recent: Values of the last ten accepted points before this one, oldest first.
        status: "running", or why the search has ended.
    """

    x: Array
    value: float
    gradient: Array
    memory: Any
    fresh: bool
    iterations: int
    evaluations: int
    first_gradient: float
    recent: tuple[float, ...]
    status: Status


def state_to_arrays(state: State) -> dict[str, np.ndarray]:
    """A state as named NumPy arrays, for `numpy.savez`; `state_from_arrays` gives it back exactly.

    To be called before the next state is asked for.
    """
    fields = state._asdict() | {f"memory.{k}": v for k, v in state.memory._asdict().items()}
    del fields["memory"]
    return {name: np.asarray(value) for name, value in fields.items()}


def state_from_arrays(arrays: Mapping[str, np.ndarray]) -> State:
    """The state that `state_to_arrays` took apart.

    Raises:
        ValueError: Arrays of something else.
    """
    names = [f"memory.{name}" for name in optax.ScaleByLBFGSState._fields]
    absent = {*names, *State._fields} - {*arrays, "memory"}
    if absent:
        raise ValueError(f"not the state of a search: no {', '.join(sorted(absent))}")
    memory = optax.ScaleByLBFGSState(*(jnp.asarray(arrays[name]) for name in names))
    return State(
        x=jnp.asarray(arrays["x"]),
        value=float(arrays["value"]),
        gradient=jnp.asarray(arrays["gradient"]),
        memory=memory,
        fresh=bool(arrays["fresh"]),
        iterations=int(arrays["iterations"]),
        evaluations=int(arrays["evaluations"]),
        first_gradient=float(arrays["first_gradient"]),
        recent=tuple(arrays["recent"].tolist()),
        status=cast(Status, str(arrays["status"])),
    )


class _Trial(NamedTuple):
    """A point of a line search: x + step * direction, projected on the bounds."""

    step: float
    value: float
    slope: float
    x: Any = None
    gradient: Any = None


def minimize(
    objective: Objective,
    x: Float[Array, "..."],
    *,
    max_evaluations: int = 500,
    max_iterations: int | None = None,
    gradient_tolerance: float = 0.0,
    stall_tolerance: float = 0.0,
    memory_size: int = 100,
    bounds: tuple[Any, Any] | None = None,
    resume: State | None = None,
) -> Iterator[State]:
    """Minimises an objective; yields the start and then every accepted point.

    The last state has the status that says why it ended. Values never rise by more than rounding.
    The first step moves `x` by a hundredth of its norm whatever the scale of the objective. A trial
    that is not finite counts as too far. A search that finds no better point is repeated once from
    steepest descent with an empty memory.

    Args:
        objective: See `Objective`.
        x: Start, float32, any shape.
        max_evaluations: The search ends when as many evaluations have been made.
        max_iterations: The same for accepted steps; None is no limit.
        gradient_tolerance: It ends when the largest entry of the gradient (projected on the bounds)
            is at most this fraction of the start's; 0 turns this off.
        stall_tolerance: It ends when the last ten steps together lowered the value by less than
            this fraction of it; 0 turns this off.
        memory_size: Pairs of differences kept: 2 * memory_size arrays like `x`.
        bounds: Least and greatest value, scalars or arrays that broadcast to `x`; None for none.
            The iterates are projected (Bertsekas 1982): entries at a bound that the gradient pushes
            against are left out of the direction.
        resume: A state to go on from, of the same objective and settings; `x` is then not used.
            What follows is bit for bit what would have followed without the interruption.

    Yields:
        States. Their `memory` is only good until the next one is asked for.

    Raises:
        ValueError: A bad setting.
        FloatingPointError: The objective or its gradient is not finite at the start.
    """
    if min(max_evaluations, memory_size, 1 if max_iterations is None else max_iterations) < 1:
        raise ValueError(
            f"max_evaluations={max_evaluations}, max_iterations={max_iterations}, "
            f"memory_size={memory_size}: expected at least 1 of each"
        )
    if not isinstance(objective, jax.tree_util.Partial):
        objective = jax.tree_util.Partial(objective)
    x = jnp.asarray(x if resume is None else resume.x, jnp.float32)
    limits = None
    if bounds is not None:
        limits = tuple(jnp.broadcast_to(jnp.asarray(b, jnp.float32), x.shape) for b in bounds)
    state = _start(objective, x, limits, memory_size) if resume is None else resume
    state = state._replace(status="running")  # a search that ended may be given a larger budget
    while True:
        if state.status == "running":
            largest = math.inf
            if gradient_tolerance:
                largest = float(_largest(state.x, state.gradient, limits))
            if state.evaluations >= max_evaluations:
                state = state._replace(status="evaluations")
            elif max_iterations is not None and state.iterations >= max_iterations:
                state = state._replace(status="iterations")
            elif largest <= gradient_tolerance * state.first_gradient:
                state = state._replace(status="gradient")
            elif _stalled(state, stall_tolerance):
                state = state._replace(status="stalled")
        yield state
        if state.status != "running":
            return
        state = _iterate(objective, state, max_evaluations, limits, memory_size)


def _stalled(state: State, tolerance: float) -> bool:
    enough = tolerance > 0 and len(state.recent) == _STALL_STEPS
    return enough and state.recent[0] - state.value < tolerance * abs(state.value)


def _start(objective: Objective, x: Array, limits: Any, memory_size: int) -> State:
    trial = _fetched(0.0, _evaluate(objective, x, jnp.zeros_like(x), 0.0, limits))
    if not math.isfinite(trial.value) or not math.isfinite(trial.slope):
        raise FloatingPointError(
            f"the objective is {trial.value} at the start, or its gradient is not finite: "
            "nothing to descend from"
        )
    # Compiled, since optax hands out one array of zeros twice, which cannot be given away twice.
    memory = jax.jit(optax.scale_by_lbfgs(memory_size).init)(x)
    largest = float(_largest(trial.x, trial.gradient, limits))
    return State(trial.x, trial.value, trial.gradient, memory, True, 0, 1, largest, (), "running")


def _iterate(
    objective: Objective, state: State, max_evaluations: int, limits: Any, memory_size: int
) -> State:
    """The next accepted point, or the same one with the status of a failure."""
    while True:
        direction, memory, scalars = _direction(
            state.memory, state.x, state.gradient, limits, memory_size, state.fresh
        )
        slope, largest, norm, x_norm = map(float, jax.device_get(scalars))
        if not state.fresh and not -math.inf < slope < 0:
            state = state._replace(memory=memory, fresh=True)
            continue
        if not -math.inf < slope < 0:  # a gradient of zero, or one that is not finite
            ended: Status = "gradient" if slope == 0 else "line search failed"
            return state._replace(memory=memory, status=ended)
        step = 1.0
        if state.fresh:
            step = 0.01 * max(x_norm, 1e-3 * math.sqrt(state.x.size)) / norm

        def evaluate(step: float, direction: Array = direction, x: Array = state.x) -> _Trial:
            return _fetched(step, _evaluate(objective, x, direction, step, limits))

        best, used = _search(
            evaluate,
            _Trial(0.0, state.value, slope),
            step,
            trials=min(_TRIALS, max_evaluations - state.evaluations),
            least=1e-9 * max(1.0, x_norm / math.sqrt(state.x.size)) / largest,
        )
        evaluations = state.evaluations + used
        if best is not None:
            # s.y of the new pair. The Wolfe conditions make it positive; rounding may not, nor a
            # search that ran out of evaluations: such a pair would spoil the memory.
            curvature = best.step * (best.slope - slope)
            return state._replace(
                x=best.x,
                value=best.value,
                gradient=best.gradient,
                memory=memory,
                fresh=not curvature > 0,
                iterations=state.iterations + 1,
                evaluations=evaluations,
                recent=(*state.recent, state.value)[-_STALL_STEPS:],
            )
        state = state._replace(memory=memory, evaluations=evaluations)
        if evaluations >= max_evaluations:
            return state
        if state.fresh:
            return state._replace(status="line search failed")
        state = state._replace(fresh=True)


@jax.jit
def _evaluate(objective: Objective, x: Array, direction: Array, step: Any, limits: Any) -> Any:
    """Point, value, slope along the (projected) direction, gradient."""
    point = x + jnp.asarray(step, jnp.float32) * direction
    if limits is not None:
        point = jnp.clip(point, *limits)
    # TF32 products would be noise to the line search.
    with jax.default_matmul_precision("highest"):
        value, gradient = jax.value_and_grad(objective)(point)
    slope = jnp.vdot(_free(point, gradient, limits), direction)
    return point, value, slope, gradient


def _fetched(step: float, evaluated: Any) -> _Trial:
    x, value, slope, gradient = evaluated
    value, slope = map(float, jax.device_get((value, slope)))
    return _Trial(step, value, slope, x, gradient)


@functools.partial(jax.jit, static_argnames=("memory_size",), donate_argnums=0)
def _direction(
    memory: Any, x: Array, gradient: Array, limits: Any, memory_size: int, fresh: Any
) -> Any:
    """Descent direction, the memory with the newest pair, and scalars that describe them."""
    free = _free(x, gradient, limits)
    # A count of zero makes optax take no pair and the scaled gradient; weights of zero switch the
    # older pairs off.
    memory = memory._replace(
        count=jnp.where(fresh, 0, memory.count),
        weights_memory=jnp.where(fresh, 0.0, memory.weights_memory),
    )
    update, memory = optax.scale_by_lbfgs(memory_size).update(free, memory, x)
    direction = jnp.negative(update)  # pyright: ignore[reportArgumentType]
    if limits is not None:
        direction = jnp.where(free == 0, 0.0, direction)
    norms = jnp.linalg.norm(direction.ravel()), jnp.linalg.norm(x.ravel())
    return direction, memory, (jnp.vdot(free, direction), jnp.max(jnp.abs(direction)), *norms)


def _free(x: Array, gradient: Array, limits: Any) -> Array:
    """The gradient without the entries that push against a bound that is reached."""
    if limits is None:
        return gradient
    low, high = limits
    held = ((x <= low) & (gradient > 0)) | ((x >= high) & (gradient < 0))
    return jnp.where(held, 0.0, gradient)


@jax.jit
def _largest(x: Array, gradient: Array, limits: Any) -> Array:
    return jnp.max(jnp.abs(_free(x, gradient, limits)))


def _search(
    evaluate: Callable[[float], _Trial], start: _Trial, step: float, *, trials: int, least: float
) -> tuple[_Trial | None, int]:
    """Step that meets the strong Wolfe conditions (Nocedal and Wright 2006, algorithms 3.5, 3.6).

    Args:
        evaluate: The objective along the direction.
        start: Its value and slope at 0; the slope is negative.
        step: First trial.
        trials: Evaluations at most.
        least: Width of a bracket that is not worth dividing.

    Returns:
        The accepted trial, else the lowest one with a sufficient decrease, else None; and the
        number of evaluations. Only an accepted trial may be higher than the start, by rounding.
    """
    slack = 4 * _EPSILON * abs(start.value)
    low, high = start, None
    slow = False
    for used in range(1, trials + 1):
        trial = evaluate(step)
        if not (math.isfinite(trial.value) and math.isfinite(trial.slope)):
            trial = _Trial(step, math.inf, math.nan)
        decrease = _SUFFICIENT_DECREASE * step * start.slope
        too_high = trial.value > start.value + decrease + slack
        if too_high or (low is not start and trial.value >= low.value):
            high = trial
        elif abs(trial.slope) <= -_CURVATURE * start.slope:
            return trial, used
        else:
            previous, low = low, trial
            if high is None and trial.slope < 0:
                far = _cubic_minimum(previous, trial)
                near = trial.step + 0.01 * (trial.step - previous.step)
                step = min(max(far, near), 10 * trial.step) if far > near else 10 * trial.step
                continue
            if high is None or trial.slope * (high.step - trial.step) >= 0:
                high = previous
        width = abs(high.step - low.step)
        if width <= least:
            break
        step, slow = _inside(low, high, slow)
    else:
        used = trials
    return (low if low.value < start.value else None), used


def _inside(low: _Trial, high: _Trial, slow: bool) -> tuple[float, bool]:
    """Next trial between the ends of a bracket; twice near the same end is moved inwards."""
    left, right = sorted((low.step, high.step))
    width = right - left
    if not math.isfinite(high.value):
        return low.step + (0.1 if low.step == 0 else 0.5) * (high.step - low.step), False
    step = _cubic_minimum(low, high)
    if not left < step < right:
        step = left + width / 2
    near = min(right - step, step - left) < 0.1 * width
    if near and slow:
        step = right - 0.1 * width if right - step < step - left else left + 0.1 * width
        near = False
    return step, near


def _cubic_minimum(a: _Trial, b: _Trial) -> float:
    """Minimum of the cubic through two values and slopes (equation 3.59); NaN if it has none."""
    if a.step == b.step:
        return math.nan
    d1 = a.slope + b.slope - 3 * (a.value - b.value) / (a.step - b.step)
    square = d1 * d1 - a.slope * b.slope
    if not square >= 0:
        return math.nan
    d2 = math.copysign(math.sqrt(square), b.step - a.step)
    denominator = b.slope - a.slope + 2 * d2
    if denominator == 0:
        return math.nan
    return b.step - (b.step - a.step) * (b.slope + d2 - d1) / denominator
