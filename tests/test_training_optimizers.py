import math

import jax
import numpy as np
import pytest

from topk_jax.training import make_optimizer, make_schedule
from topk_jax.training.settings import Optimizer


def rates(settings, *, steps_per_epoch=4, epochs=5):
    with jax.numpy_dtype_promotion("standard"):
        schedule = make_schedule(settings, steps_per_epoch=steps_per_epoch, epochs=epochs)
        return [float(schedule(np.int32(step))) for step in range(steps_per_epoch * epochs)]


def test_cosine_once_an_epoch_as_the_authors_do():
    found = rates(Optimizer(learning_rate=0.1, schedule="cosine", per="epoch"))
    expected = [0.05 * (1 + math.cos(math.pi * (step // 4) / 5)) for step in range(20)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found[:4] == [pytest.approx(0.1)] * 4


def test_cosine_each_step():
    found = rates(Optimizer(learning_rate=0.1, schedule="cosine"))
    expected = [0.05 * (1 + math.cos(math.pi * step / 20)) for step in range(20)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_cosine_after_a_warm_up():
    found = rates(Optimizer(learning_rate=0.1, schedule="cosine", warmup_epochs=0.5))
    rise = [0, 0.05]
    fall = [0.05 * (1 + math.cos(math.pi * step / 18)) for step in range(18)]
    np.testing.assert_allclose(found, rise + fall, rtol=1e-5, atol=1e-9)


def test_steps_after_a_warm_up():
    settings = Optimizer(
        learning_rate=0.2, schedule="step", milestones=(2, 4), factor=0.1, warmup_epochs=1
    )
    expected = [0, 0.05, 0.1, 0.15] + [0.2] * 4 + [0.02] * 8 + [0.002] * 4
    np.testing.assert_allclose(rates(settings), expected, rtol=1e-5, atol=1e-9)


def test_constant():
    assert rates(Optimizer(learning_rate=0.3, schedule="constant")) == [pytest.approx(0.3)] * 20


def updated(settings, gradients, params):
    """Parameters after one step a gradient."""
    optimizer = make_optimizer(settings, steps_per_epoch=1, epochs=100)
    state = optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, params)
            params = jax.tree.map(lambda p, u: p + u, params, updates)
    return params


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", ["all", "kernels"])
def test_sgd_with_momentum_and_decay_in_numpy(nesterov, decay):
    rng = np.random.default_rng(0)
    params = {
        "kernel": rng.normal(size=(2, 3)).astype(np.float32),
        "bias": rng.normal(size=3).astype(np.float32),
    }
    gradients = [
        {name: rng.normal(size=value.shape).astype(np.float32) for name, value in params.items()}
        for _ in range(4)
    ]
    settings = Optimizer(
        learning_rate=0.1, momentum=0.8, nesterov=nesterov, weight_decay=0.05, decay=decay,
        schedule="constant",
    )  # fmt: skip
    found = updated(settings, gradients, params)
    for name, value in params.items():
        expected, velocity = value.astype(np.float64), 0.0
        factor = 0.05 if decay == "all" or name == "kernel" else 0.0
        for gradient in gradients:
            slope = gradient[name] + factor * expected
            velocity = 0.8 * velocity + slope
            expected = expected - 0.1 * (slope + 0.8 * velocity if nesterov else velocity)
        np.testing.assert_allclose(found[name], expected, rtol=1e-5)


def test_clipping_bounds_the_norm_of_the_gradient():
    params = {"a": np.zeros(2, np.float32), "b": np.zeros(1, np.float32)}
    gradient = {"a": np.array([3, 0], np.float32), "b": np.array([4], np.float32)}
    settings = Optimizer(learning_rate=1.0, momentum=0.0, clip_norm=0.5, schedule="constant")
    found = updated(settings, [gradient], params)
    np.testing.assert_allclose(found["a"], [-0.3, 0], rtol=1e-6)
    np.testing.assert_allclose(found["b"], [-0.4], rtol=1e-6)


def test_adamw_spares_biases_where_only_kernels_decay():
    params = {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}
    zeros = jax.tree.map(np.zeros_like, params)
    settings = Optimizer(name="adamw", learning_rate=0.1, weight_decay=0.5, decay="kernels",
                         schedule="constant")  # fmt: skip
    found = updated(settings, [zeros], params)
    np.testing.assert_allclose(found["kernel"], 0.95, rtol=1e-6)
    np.testing.assert_array_equal(found["bias"], params["bias"])


@pytest.mark.parity
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_pytorchs(nesterov):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    start = rng.normal(size=(3, 3)).astype(np.float32)
    gradients = [rng.normal(size=(3, 3)).astype(np.float32) for _ in range(6)]
    parameter = torch.nn.Parameter(torch.tensor(start))
    theirs = torch.optim.SGD(
        [parameter], lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=nesterov
    )
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        theirs.step()
    settings = Optimizer(
        learning_rate=0.1, momentum=0.9, weight_decay=5e-4, nesterov=nesterov, schedule="constant"
    )
    ours = updated(settings, [{"w": gradient} for gradient in gradients], {"w": start})
    np.testing.assert_allclose(ours["w"], parameter.detach().numpy(), rtol=1e-5, atol=1e-6)
