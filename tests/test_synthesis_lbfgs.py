"""L-BFGS against SciPy's, against analytic minima, and against its own promises."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from topk_jax.synthesis.lbfgs import minimize

# One size and one memory everywhere, so that the program of the direction is compiled once.
N = 10
MEMORY = 10
START = np.tile(np.array([-1.2, 1.0], np.float32), N // 2)
CURVATURES = np.logspace(0, 3, N)


def partial(function, *arguments):
    return jax.tree_util.Partial(function, *(jnp.asarray(a, jnp.float32) for a in arguments))


def rosenbrock(scale, x):
    return scale * jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def quadratic(matrix, vector, x):
    # Not by matmul, whose sums differ from one trial to the next on some machines.
    return jnp.sum(x * (0.5 * jnp.sum(matrix * x[None], axis=1) - vector))


def rotated(seed=0):
    """Symmetric matrix of condition 1000, and a vector, in float64."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(N, N)))[0]
    return (basis * CURVATURES) @ basis.T, 30 * rng.normal(size=N)


ROSENBROCK = partial(rosenbrock, 1.0)


def states_of(objective, x=START, **options):
    return list(minimize(objective, x, **({"memory_size": MEMORY} | options)))


def on_host(state):
    """A copy of a state that the next iteration leaves alone."""
    return jax.tree.map(lambda leaf: np.array(leaf) if isinstance(leaf, jax.Array) else leaf, state)


def lowest_of_scipy(function, evaluations, x=START, **options):
    """Lowest value among the first evaluations of SciPy's L-BFGS-B, float64."""
    values = []

    def recorded(x):
        value, gradient = function(x)
        values.append(value)
        return value, gradient

    scipy.optimize.minimize(
        recorded, x.astype(np.float64), jac=True, method="L-BFGS-B",
        options={"maxcor": MEMORY, "ftol": 0, "gtol": 0, "maxfun": evaluations}, **options,
    )  # fmt: skip
    return min(values[:evaluations])


class Recorder:
    """An objective that tells the host each point that it is evaluated at."""

    def __init__(self, function):
        self.points = []
        self._function = function

    def __call__(self, *arguments):
        jax.debug.callback(lambda x: self.points.append(np.array(x)), arguments[-1])
        return self._function(*arguments)


# --- where it gets to ----------------------------------------------------------------------------


def test_rosenbrock_as_fast_as_scipy():
    def function(x):
        return scipy.optimize.rosen(x), scipy.optimize.rosen_der(x)

    for budget, factor in ((20, 3.0), (40, 3.0), (60, 10.0)):
        reached = states_of(ROSENBROCK, max_evaluations=budget)[-1].value
        assert reached <= factor * lowest_of_scipy(function, budget), budget
    final = states_of(ROSENBROCK, max_evaluations=150)[-1]
    np.testing.assert_allclose(final.x, np.ones(N), atol=1e-4)
    assert final.value < 1e-9


def test_ill_conditioned_quadratic_as_fast_as_scipy():
    matrix, vector = rotated()
    exact = np.linalg.solve(matrix, vector)
    lowest = -0.5 * vector @ exact
    for budget in (15, 30):
        reached = states_of(partial(quadratic, matrix, vector), max_evaluations=budget)[-1].value
        reference = lowest_of_scipy(
            lambda x: (0.5 * x @ matrix @ x - vector @ x, matrix @ x - vector), budget
        )
        rounding = 1e-5 * abs(lowest)
        assert reached - lowest <= 4 * (reference - lowest) + rounding, budget
    final = states_of(partial(quadratic, matrix, vector), max_evaluations=120)[-1]
    np.testing.assert_allclose(final.x, exact, atol=3e-3 * np.abs(exact).max())


@pytest.mark.parity
def test_rosenbrock_as_fast_as_torch():
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(START.copy()).requires_grad_()
    values = []

    def closure():
        optimizer.zero_grad()
        value = (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
        value.backward()
        values.append(value.item())
        return value

    optimizer = torch.optim.LBFGS(
        [x], max_iter=200, max_eval=60, history_size=MEMORY, tolerance_grad=0,
        tolerance_change=0, line_search_fn="strong_wolfe",
    )  # fmt: skip
    optimizer.step(closure)
    for budget in (20, 40, 60):
        reached = states_of(ROSENBROCK, max_evaluations=budget)[-1].value
        assert reached <= 10 * min(values[:budget]), budget


def test_a_single_number():
    (state,) = states_of(lambda x: (x - 3) ** 2, np.zeros(()), max_evaluations=30)[-1:]
    assert state.x.shape == ()
    np.testing.assert_allclose(state.x, 3, rtol=1e-4)


def test_result_does_not_depend_on_the_scale_of_the_objective():
    scales = (1e-10, 1e-4, 1.0, 1e4, 1e8)
    relative = [
        states_of(partial(rosenbrock, scale), max_evaluations=50)[-1].value / scale
        for scale in scales
    ]
    assert max(relative) <= 1.5 * min(relative)
    assert max(relative) < 1e-2 * scipy.optimize.rosen(START)


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e8])
def test_first_trial_moves_by_a_hundredth_of_the_norm(scale):
    recorder = Recorder(rosenbrock)
    for start in (START, 10 * START):
        recorder.points.clear()
        states_of(partial(recorder, scale), start, max_evaluations=2)
        jax.effects_barrier()
        first, second = recorder.points
        np.testing.assert_array_equal(first, start)
        moved = np.linalg.norm(second - first)
        np.testing.assert_allclose(moved, 0.01 * np.linalg.norm(start), rtol=1e-3)
        gradient = scipy.optimize.rosen_der(start.astype(np.float64))
        np.testing.assert_allclose(
            (second - first) / moved, -gradient / np.linalg.norm(gradient), atol=1e-3
        )


def test_starts_at_zero():
    final = states_of(ROSENBROCK, np.zeros(N, np.float32), max_evaluations=150)[-1]
    np.testing.assert_allclose(final.x, np.ones(N), atol=1e-3)


# --- what every state promises -------------------------------------------------------------------


def test_values_and_gradients_are_those_of_the_points_and_values_never_rise():
    states = states_of(ROSENBROCK, max_evaluations=150)
    assert len(states) > 50
    for state in states:
        x = np.asarray(state.x, np.float64)
        np.testing.assert_allclose(state.value, scipy.optimize.rosen(x), rtol=1e-3, atol=1e-9)
        np.testing.assert_allclose(state.gradient, scipy.optimize.rosen_der(x), rtol=1e-3, atol=0.1)
    for before, after in itertools.pairwise(states):
        assert after.value <= before.value * (1 + 1e-6)
        assert after.evaluations >= before.evaluations
        assert after.iterations <= before.iterations + 1


def test_a_value_below_rounding_of_its_offset_never_rises_beyond_it():
    offset = states_of(lambda x: 1e3 + 1e-3 * rosenbrock(1.0, x), max_evaluations=100)
    for before, after in itertools.pairwise(offset):
        assert after.value <= before.value + 8 * np.finfo(np.float32).eps * before.value
    assert offset[-1].value < 1000.01


def test_accepted_steps_meet_the_strong_wolfe_conditions():
    states = states_of(ROSENBROCK, max_evaluations=80)
    checked = 0
    for before, after in itertools.pairwise(states[:-1]):
        x, y = (np.asarray(state.x, np.float64) for state in (before, after))
        slope = scipy.optimize.rosen_der(x) @ (y - x)
        later = scipy.optimize.rosen_der(y) @ (y - x)
        assert slope < 0
        if -slope < 1e-5 * before.value:
            continue  # at the level of rounding
        decrease = scipy.optimize.rosen(y) - scipy.optimize.rosen(x)
        assert decrease <= 1e-4 * slope + 1e-6 * before.value
        assert abs(later) <= 0.9 * abs(slope) * 1.01
        checked += 1
    assert checked > 30


def test_states_stay_readable_after_the_search_has_gone_on():
    states = states_of(ROSENBROCK, max_evaluations=60)
    for state in states:
        assert np.all(np.isfinite(state.x))
        assert np.all(np.isfinite(state.gradient))
        assert state.x.dtype == jnp.float32


def test_recent_values_are_the_last_ten():
    states = states_of(ROSENBROCK, max_evaluations=40)
    values = [state.value for state in states]
    for index, state in enumerate(states):
        assert state.recent == tuple(values[max(0, index - 10) : index])


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 24, 60])
def test_budget_is_counted_exactly_and_never_exceeded(budget):
    recorder = COUNTED.func
    recorder.points.clear()
    states = states_of(COUNTED, max_evaluations=budget)
    jax.effects_barrier()
    assert states[-1].evaluations == len(recorder.points) == budget
    assert states[-1].status == "evaluations"
    assert [state.status for state in states[:-1]] == ["running"] * (len(states) - 1)
    assert states[0].evaluations == 1
    evaluated = {point.tobytes() for point in recorder.points}
    assert all(np.asarray(state.x).tobytes() in evaluated for state in states)


COUNTED = partial(Recorder(rosenbrock), 1.0)


def test_one_compilation_for_all_objectives_of_a_kind():
    traced = []

    def function(scale, x):
        traced.append(x.shape)
        return rosenbrock(scale, x)

    for scale in (1.0, 3.0):
        states_of(partial(function, scale), max_evaluations=60)
    assert traced == [(N,)]


# --- how it ends ---------------------------------------------------------------------------------


def test_a_flat_objective_ends_at_once():
    states = states_of(lambda x: 0 * jnp.sum(x) + 5)
    assert [(s.status, s.evaluations) for s in states] == [("running", 1), ("gradient", 1)]
    np.testing.assert_array_equal(states[-1].x, START)


def test_limit_of_iterations():
    states = states_of(ROSENBROCK, max_iterations=7)
    assert [state.iterations for state in states] == list(range(8))
    assert states[-1].status == "iterations"


def test_gradient_tolerance_is_a_fraction_of_the_first():
    states = states_of(ROSENBROCK, gradient_tolerance=1e-2)
    first = np.abs(scipy.optimize.rosen_der(START.astype(np.float64))).max()
    np.testing.assert_allclose(states[0].first_gradient, first, rtol=1e-5)
    largest = [np.abs(state.gradient).max() / first for state in states]
    assert states[-1].status == "gradient"
    assert largest[-1] <= 1e-2 < min(largest[:-1])


def test_stall_tolerance_looks_back_ten_steps():
    states = states_of(ROSENBROCK, stall_tolerance=0.5, max_evaluations=1000)
    values = [state.value for state in states]
    stalled = [
        index >= 10 and values[index - 10] - values[index] < 0.5 * values[index]
        for index in range(len(values))
    ]
    assert states[-1].status == "stalled"
    assert stalled == [False] * (len(values) - 1) + [True]


def test_without_a_tolerance_nothing_counts_as_stalled():
    state = on_host(states_of(ROSENBROCK, max_iterations=12)[-1])
    # Ten steps that rounding has let rise.
    state = state._replace(recent=(state.value * (1 - 1e-6),) * 10, status="running")
    statuses = [s.status for s in states_of(ROSENBROCK, resume=state, max_iterations=14)]
    assert statuses == ["running", "running", "iterations"]


def wrong_way(below, x):
    """A bowl, whose gradient points downhill where it is lower than `below`."""
    bowl = jnp.sum(x**2)
    return jnp.where(bowl < below, 2 * jax.lax.stop_gradient(bowl) - bowl, bowl)


def test_no_better_point_is_a_failure_and_leaves_the_point():
    states = states_of(partial(wrong_way, 1e9))
    assert states[-1].status == "line search failed"
    np.testing.assert_array_equal(states[-1].x, START)
    assert states[-1].iterations == 0
    assert 2 <= states[-1].evaluations <= 1 + 25


def test_a_failure_is_repeated_once_from_steepest_descent():
    recorder = Recorder(wrong_way)
    scales = np.logspace(-0.5, 0.5, N)
    states = states_of(partial(lambda below, x: recorder(below, x * scales), 1.0))
    jax.effects_barrier()
    before, last = states[-2:]
    assert last.status == "line search failed"
    assert last.iterations == before.iterations > 1
    np.testing.assert_array_equal(last.x, before.x)
    # Of the trials after the last accepted point, the final ones lie along its gradient.
    trials = np.stack(recorder.points[before.evaluations :]) / scales - np.asarray(before.x)
    along = [
        abs(t @ before.gradient) / np.linalg.norm(t) / np.linalg.norm(before.gradient)
        for t in trials
        if np.linalg.norm(t) > 1e-3
    ]
    assert along[0] < 0.99
    assert along[-1] > 0.9999
    assert len(trials) == last.evaluations - before.evaluations <= 50


def test_a_direction_that_climbs_is_replaced_by_steepest_descent():
    state = on_host(states_of(ROSENBROCK, max_iterations=8)[-1])
    turned = state.memory._replace(weights_memory=-1e3 * state.memory.weights_memory)
    state = state._replace(memory=turned, status="running")
    states = states_of(ROSENBROCK, resume=state, max_evaluations=150)
    assert states[-1].value < 1e-6
    for before, after in itertools.pairwise(states):
        assert after.value <= before.value * (1 + 1e-6)


# --- objectives that are not finite everywhere ---------------------------------------------------


@pytest.mark.parametrize("outside", [math.nan, math.inf, -math.inf])
def test_trials_that_are_not_finite_are_too_far(outside):
    weights = np.logspace(0, 1, N)

    def barrier(outside, x):
        inside = jnp.sum(jnp.asarray(weights, jnp.float32) * x - jnp.log(jnp.maximum(x, 1e-30)))
        return jnp.where(jnp.all(x > 0), inside, outside)

    recorder = Recorder(barrier)
    states = states_of(partial(recorder, outside), np.ones(N), max_evaluations=150)
    jax.effects_barrier()
    assert sum(np.any(point <= 0) for point in recorder.points) >= 3
    assert all(math.isfinite(state.value) for state in states)
    np.testing.assert_allclose(states[-1].x, 1 / weights, rtol=1e-3)


def test_a_gradient_that_is_not_finite_is_too_far():
    weights = np.logspace(0, 0.5, N)

    def roots(x):
        # Lower and lower beyond zero, where the gradient is NaN.
        return jnp.sum(jnp.asarray(weights, jnp.float32) * x - 2 * jnp.sqrt(jnp.maximum(x, 0)))

    assert np.isnan(jax.grad(roots)(jnp.full(N, -1.0))).any()
    states = states_of(roots, np.full(N, 2.0), max_evaluations=200)
    for state in states:
        assert np.all(np.isfinite(state.gradient))
    np.testing.assert_allclose(states[-1].x, weights**-2.0, rtol=5e-3)


@pytest.mark.parametrize(
    "objective",
    [
        lambda x: jnp.sum(x) + jnp.nan,
        lambda x: jnp.sum(x) + jnp.inf,
        lambda x: jnp.sum(jnp.sqrt(0 * x)),
    ],
    ids=["nan", "inf", "gradient"],
)
def test_a_start_that_is_not_finite_is_an_error(objective):
    with pytest.raises(FloatingPointError, match="at the start"):
        states_of(objective)


# --- bounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("start", ["zero", "outside"])
def test_quadratic_with_active_bounds(seed, start):
    matrix, vector = rotated(seed)
    low, high = np.full(N, -0.5), np.linspace(0.1, 2, N)
    expected = scipy.optimize.minimize(
        lambda x: (0.5 * x @ matrix @ x - vector @ x, matrix @ x - vector), np.zeros(N), jac=True,
        method="L-BFGS-B", bounds=list(zip(low, high, strict=True)),
        options={"ftol": 0, "gtol": 1e-10},
    )  # fmt: skip
    active = (expected.x == low) | (expected.x == high)
    assert 2 <= active.sum() <= N - 2
    x = np.zeros(N) if start == "zero" else np.full(N, 7.0)
    objective = partial(quadratic, matrix, vector)
    states = states_of(objective, x, bounds=(low, high), max_evaluations=150)
    for state in states:
        assert np.all(state.x >= np.float32(low))
        assert np.all(state.x <= np.float32(high))
    for before, after in itertools.pairwise(states):
        assert after.value <= before.value + 1e-6 * abs(before.value)
    np.testing.assert_allclose(states[-1].x, expected.x, atol=2e-3)
    assert states[-1].value <= expected.fun + 1e-4 * abs(expected.fun)
    # The bounds that are active are met exactly.
    np.testing.assert_array_equal(
        np.asarray(states[-1].x)[active], expected.x.astype(np.float32)[active]
    )


def test_bounds_that_are_never_met_change_nothing():
    free = states_of(ROSENBROCK, max_evaluations=40)
    bounded = states_of(ROSENBROCK, max_evaluations=40, bounds=(-100.0, 100.0))
    assert [state.value for state in bounded] == pytest.approx(
        [state.value for state in free], rel=1e-2
    )


def test_bounds_broadcast():
    goal = np.arange(6, dtype=np.float32).reshape(2, 3)
    final = states_of(
        lambda x: jnp.sum((x - goal) ** 2),
        np.zeros((2, 3)),
        bounds=(0.5, np.array([3.5, 1.5, 9])),
        max_evaluations=40,
    )[-1]
    np.testing.assert_allclose(final.x, [[0.5, 1, 2], [3, 1.5, 5]], atol=1e-4)


def test_projected_gradient_ends_the_search_at_a_corner():
    final = states_of(
        lambda x: jnp.sum((x - 3) ** 2), np.zeros(N), bounds=(-1.0, 1.0), gradient_tolerance=1e-3
    )[-1]
    assert final.status == "gradient"
    np.testing.assert_array_equal(final.x, np.ones(N))
    assert np.abs(final.gradient).max() > 1


def test_a_corner_that_the_gradient_pushes_against_ends_it_at_once():
    states = states_of(lambda x: jnp.sum(x), np.zeros(N), bounds=(0.0, 1.0))
    assert states[-1].status == "gradient"
    assert states[-1].evaluations == 1


# --- going on, and settings ----------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [None, (-2.0, 0.9)])
def test_resumed_search_is_bit_equal_to_an_uninterrupted_one(bounds):
    options = {"memory_size": MEMORY, "max_evaluations": 70, "bounds": bounds}
    kept = [on_host(state) for state in minimize(ROSENBROCK, START, **options)]
    assert len(kept) > 25
    for index in (0, 1, 17):  # before, within and beyond the size of the memory
        again = [
            on_host(state)
            for state in minimize(ROSENBROCK, START * 0, resume=kept[index], **options)
        ]
        assert len(again) == len(kept) - index
        for expected, found in zip(kept[index:], again, strict=True):
            assert expected[4:] == found[4:]
            assert expected.value == found.value
            for a, b in zip(jax.tree.leaves(expected[:4]), jax.tree.leaves(found[:4]), strict=True):
                assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_state_that_has_ended_ends_again():
    last = on_host(states_of(ROSENBROCK, max_evaluations=20)[-1])
    (again,) = states_of(ROSENBROCK, max_evaluations=20, resume=last)
    assert (again.status, again.evaluations) == ("evaluations", 20)


@pytest.mark.parametrize(
    "settings",
    [{"max_evaluations": 0}, {"memory_size": 0}, {"max_iterations": 0}, {"max_iterations": -1}],
)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match="expected at least 1 of each"):
        states_of(ROSENBROCK, **settings)
