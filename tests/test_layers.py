"""Layers against NumPy loops; the networks' parity tests compare them with PyTorch's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from topk_jax import layers


def loop_max_pool(x, size, stride, padding, ceil):
    """PyTorch's definition, window by window."""
    n = x.shape[0]
    room = n + 2 * padding - size
    count = (-(-room // stride) if ceil else room // stride) + 1
    if ceil and (count - 1) * stride >= n + padding:
        count -= 1
    out = np.full((count, count), -np.inf)
    for i in range(count):
        for j in range(count):
            top, left = i * stride - padding, j * stride - padding
            window = x[max(top, 0) : top + size, max(left, 0) : left + size]
            out[i, j] = window.max()
    return out


@pytest.mark.parametrize(
    ("n", "size", "stride", "padding", "ceil"),
    [
        *[(112, 3, 2, 1, False), (7, 2, 2, 0, False), (55, 3, 2, 0, False), (13, 3, 2, 0, False)],
        *[(112, 3, 2, 0, True), (54, 3, 2, 0, True), (111, 3, 2, 0, True), (6, 3, 2, 1, True)],
        *[(5, 2, 3, 0, True), (4, 2, 3, 1, True), (5, 5, 2, 0, False)],
    ],
)
def test_max_pool(n, size, stride, padding, ceil):
    x = np.random.default_rng(n).normal(size=(n, n)).astype(np.float32)
    options = {"size": size, "stride": stride, "padding": padding, "ceil": ceil}
    pool = functools.partial(layers.max_pool, **options)
    found = jax.jit(pool)(x[None, :, :, None])
    np.testing.assert_array_equal(found[0, :, :, 0], loop_max_pool(x, size, stride, padding, ceil))


@pytest.mark.parametrize("n", [2, 6, 7, 9])
def test_avg_pool(n):
    x = np.random.default_rng(n).normal(size=(1, n, n, 3)).astype(np.float32)
    even = x[:, : n // 2 * 2, : n // 2 * 2]
    expected = even.reshape(1, n // 2, 2, n // 2, 2, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(layers.avg_pool(x, 2, 2), expected, rtol=1e-5, atol=1e-6)


def test_a_map_smaller_than_the_window_is_an_error():
    with pytest.raises(ValueError, match="input image is too small"):
        layers.max_pool(jnp.ones((1, 2, 2, 1)), 3, 2)


@pytest.mark.parametrize("size", [1, 2, 6, 7])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 7), (13, 19)])
def test_adaptive_avg_pool(shape, size):
    x = np.random.default_rng(1).normal(size=(2, *shape, 3)).astype(np.float32)
    expected = np.empty((2, size, size, 3))
    for i in range(size):
        for j in range(size):
            rows = slice(i * shape[0] // size, -(-(i + 1) * shape[0] // size))
            columns = slice(j * shape[1] // size, -(-(j + 1) * shape[1] // size))
            expected[:, i, j] = x[:, rows, columns].mean(axis=(1, 2))
    np.testing.assert_allclose(layers.adaptive_avg_pool(x, size), expected, rtol=2e-5, atol=1e-6)


def test_flatten_channels_first():
    x = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    np.testing.assert_array_equal(
        layers.flatten_channels_first(x)[0], x[0].transpose(2, 0, 1).ravel()
    )


def batch_norm_loop(x, mask, scale, bias, epsilon=1e-5):
    """Output, running mean and running variance (unbiased) after one step from zeros and ones."""
    valid = x[mask].reshape(-1, x.shape[-1]).astype(np.float64)
    mean, var, n = valid.mean(axis=0), valid.var(axis=0), len(valid)
    y = (x - mean) / np.sqrt(var + epsilon) * scale + bias
    return y, 0.1 * mean, 0.9 + 0.1 * var * n / (n - 1)


@pytest.mark.parametrize("valid", [64, 61, 33, 3])
def test_batch_norm_on_uneven_devices(valid):
    """Eight devices, of which some have few valid rows or none, agree with one loop over all."""
    rng = np.random.default_rng(valid)
    # A mean far from zero: E[x^2] - E[x]^2 would lose every digit of the variance.
    x = (rng.normal(size=(64, 3, 3, 2)) + 1000).astype(np.float32)
    mask = np.arange(64) < valid
    scale, bias = np.array([1.5, 0.5], np.float32), np.array([0.1, -0.2], np.float32)
    expected = batch_norm_loop(x, mask, scale, bias)
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": np.zeros(2, np.float32), "var": np.ones(2, np.float32)},
    }
    module = layers.BatchNorm(axis_name="devices")

    @functools.partial(jax.pmap, axis_name="devices", in_axes=(None, 0, 0), out_axes=(0, None))
    def step(variables, x, mask):
        return module.apply(
            variables, x, use_running_average=False, mask=mask, mutable=["batch_stats"]
        )

    y, updates = step(variables, x.reshape(8, 8, 3, 3, 2), mask.reshape(8, 8))
    found = np.asarray(y).reshape(x.shape)
    np.testing.assert_allclose(found[mask], expected[0][mask], rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], expected[1], rtol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["var"], expected[2], rtol=1e-4)


def test_batch_norm_with_running_statistics():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 3, 4)).astype(np.float32)
    scale, bias, mean = rng.normal(size=(3, 4)).astype(np.float32)
    var = rng.uniform(0.5, 2, size=4).astype(np.float32)
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": mean, "var": var},
    }
    apply = jax.jit(functools.partial(layers.BatchNorm().apply, use_running_average=True))
    found = apply(variables, x)
    expected = (x - mean) / np.sqrt(var + 1e-5) * scale + bias
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train", [False, True])
def test_batch_norm_in_half_precision(train):
    """Statistics in float32, here of a mean of 100 and a deviation of 1; output in bfloat16."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(16, 8, 8, 2)) + 100, jnp.bfloat16)
    scale, bias = jnp.array([1.5, 0.5], jnp.bfloat16), jnp.array([0.25, -0.5], jnp.bfloat16)
    stats = {"mean": np.full(2, 90, np.float32), "var": np.full(2, 4, np.float32)}
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
    apply = functools.partial(layers.BatchNorm().apply, use_running_average=not train)
    y, updates = jax.jit(functools.partial(apply, mutable=["batch_stats"]))(variables, x)
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    mean, var = np.full(2, 90.0), np.full(2, 4.0)
    if train:
        mean, var, n = exact.mean(axis=(0, 1, 2)), exact.var(axis=(0, 1, 2)), exact.size / 2
        found = updates["batch_stats"]
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
        np.testing.assert_allclose(found["mean"], 0.9 * 90 + 0.1 * mean, rtol=1e-6)
        np.testing.assert_allclose(found["var"], 0.9 * 4 + 0.1 * var * n / (n - 1), rtol=1e-5)
    expected = (exact - mean) / np.sqrt(var + 1e-5) * np.array([1.5, 0.5]) + np.array([0.25, -0.5])
    np.testing.assert_allclose(y.astype(np.float32), expected, rtol=2**-8, atol=1e-3)


def test_avg_pool_in_half_precision():
    """Summed in float32: 1 + 1 / 256 rounds to 1 in bfloat16, the mean of sixteen does not."""
    x = np.ones((1, 4, 4, 1), np.float32)
    x[0, 1:] = 1 / 256
    found = layers.avg_pool(jnp.asarray(x, jnp.bfloat16), 4, 4)
    assert found.dtype == jnp.bfloat16
    assert found.item() == jnp.asarray((4 + 12 / 256) / 16, jnp.bfloat16).item()


def test_max_pool_gives_the_gradient_to_the_first_of_equals():
    x = np.zeros((1, 4, 4, 1), np.float32)
    x[0, 0, 1] = x[0, 1, 0] = 1  # a tie on the diagonal: row-major order decides
    gradient = jax.jit(jax.grad(lambda x: layers.max_pool(x, 2, 2).sum()))(x)[0, :, :, 0]
    expected = [[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(gradient, expected)


def test_max_pool_keeps_nan():
    x = np.array([[np.nan, 1], [2, 3]], np.float32)[None, :, :, None]
    assert np.isnan(layers.max_pool(x, 2, 2)).all()
    assert np.isnan(layers.max_pool(x[:, ::-1, ::-1], 2, 2)).all()
