import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_fixtures import SMALL, small_data, small_network, start

from topk_jax import parallel, training
from topk_jax.topk import TopK


@functools.cache
def mapped_step(devices, microbatch=None, batch_norm=False):
    """Network, optimiser and the step over some devices; compiled once for all tests."""
    network = small_network(batch_norm=batch_norm, axis_name=parallel.AXIS)
    optimizer = optax.sgd(0.1, momentum=0.9)
    step = training.make_train_step(network, optimizer, preprocessing=SMALL, microbatch=microbatch)
    mapped = parallel.map_step(step, devices=jax.devices()[:devices])
    return network, optimizer, mapped


def run(devices, valid, *, steps=3, **options):
    """Variables and sums after some steps on one batch of 64 rows of which some are padding."""
    network, optimizer, mapped = mapped_step(devices, **options)
    images, labels = small_data(64)
    batch = {"image": images, "label": labels, "mask": np.arange(64) < valid}
    state = parallel.replicate(start(network, optimizer), jax.devices()[:devices])
    for _ in range(steps):
        state, sums = mapped(state, parallel.shard(batch, devices))
    for leaf in jax.tree.leaves(state.params):
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert all(np.array_equal(shards[0], shard) for shard in shards[1:])
    return jax.device_get((state.variables, sums))


@pytest.mark.parametrize("valid", [64, 61, 33, 3])
def test_eight_devices_give_what_one_gives(valid):
    one, one_sums = run(1, valid)
    eight, eight_sums = run(8, valid)
    assert one_sums["count"] == eight_sums["count"] == valid
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one_sums["loss"], eight_sums["loss"], rtol=1e-5)


def test_batch_statistics_are_those_of_all_devices():
    one, _ = run(1, 64, batch_norm=True)
    eight, _ = run(8, 64, batch_norm=True)
    assert one["batch_stats"]
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("valid", [64, 61])
def test_microbatches_change_nothing(valid):
    whole, sums = run(1, valid)
    parts, parts_sums = run(2, valid, microbatch=12)  # 32 rows a device: 12, 12, 8
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert sums["correct"] == parts_sums["correct"]


def test_microbatches_are_refused_with_batch_normalisation():
    with pytest.raises(ValueError, match="leave out microbatch=8"):
        run(1, 64, microbatch=8, batch_norm=True)


def test_one_step_is_gradient_descent_on_the_mean_cross_entropy():
    after, sums = run(8, 50, steps=1)
    network, optimizer, _ = mapped_step(8)
    before = start(network, optimizer).params
    images, labels = small_data(64)
    x = (images[:50].astype(np.float32) / 255 - 0.5) / 0.25

    def loss(params):
        logits, _ = network.apply({"params": params}, x, train=False)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:50, None], axis=1)
        return -jnp.mean(chosen)

    value, gradient = jax.jit(jax.value_and_grad(loss))(before)
    np.testing.assert_allclose(sums["loss"] / 50, value, rtol=1e-5)
    wanted = jax.tree.map(lambda p, g: np.asarray(p) - 0.1 * np.asarray(g), before, gradient)
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(after["params"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_random_controls_draw_anew_each_step():
    """At rate zero nothing but the draws can change the loss from step to step."""
    network = small_network(topk={"pool1": TopK(0.5, select="random")})
    step = training.make_train_step(network, optax.sgd(0.0), preprocessing=SMALL)
    mapped = jax.pmap(
        step, axis_name=parallel.AXIS, in_axes=(None, 0), out_axes=None, devices=jax.devices()[:1]
    )
    images, labels = small_data(8)
    batch = {"image": images, "label": labels, "mask": np.ones(8, bool)}

    def losses():
        state = parallel.replicate(start(network, optax.sgd(0.0)), jax.devices()[:1])
        found = []
        for _ in range(2):
            state, sums = mapped(state, parallel.shard(batch, 1))
            found.append(float(sums["loss"]))
        return found

    first, second = losses()
    assert first != second
    assert losses() == [first, second]


def test_random_variables_have_the_variance_of_he():
    network = small_network(widths=(64, 128), batch_norm=True)
    variables = training.init_variables(network, jax.random.key(1))
    kernel = np.asarray(variables["params"]["features.4"]["kernel"])
    assert kernel.shape == (3, 3, 64, 128)
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 64)), rtol=0.02)
    assert np.all(np.asarray(variables["params"]["features.1"]["scale"]) == 1)
    assert np.all(np.asarray(variables["batch_stats"]["features.1"]["var"]) == 1)
    assert not np.any(np.asarray(variables["params"]["features.4"]["bias"]))
