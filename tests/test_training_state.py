import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
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


@pytest.mark.parametrize("valid", [64, 61, 33, 3])
def test_batch_statistics_are_those_of_all_valid_rows(valid):
    """Also where some devices have padding alone; a mean of the devices' means would be NaN."""
    one, _ = run(1, valid, batch_norm=True)
    eight, _ = run(8, valid, batch_norm=True)
    assert one["batch_stats"]
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


def test_padding_changes_no_statistics():
    """Rows with a False mask may hold anything."""
    network, optimizer, mapped = mapped_step(8, batch_norm=True)
    images, labels = small_data(64)
    results = []
    for filling in (0, 255):
        batch = {"image": images.copy(), "label": labels, "mask": np.arange(64) < 50}
        batch["image"][50:] = filling
        state = parallel.replicate(start(network, optimizer))
        state, _ = mapped(state, parallel.shard(batch, 8))
        results.append(jax.device_get(state.variables))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("valid", [64, 33])
@pytest.mark.parametrize("way", ["shard_map", "named_sharding"])
def test_the_step_means_the_same_without_pmap(way, valid):
    """Gradients come out eight times too large where a sum over devices is taken twice."""
    network, optimizer, _ = mapped_step(8, batch_norm=True)
    step = training.make_train_step(network, optimizer, preprocessing=SMALL)
    mesh = Mesh(np.array(jax.devices()), (parallel.AXIS,))
    images, labels = small_data(64)
    batch = {"image": images, "label": labels, "mask": np.arange(64) < valid}
    if way == "shard_map":
        spec = PartitionSpec(parallel.AXIS)
        program = jax.jit(
            jax.shard_map(
                step, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=PartitionSpec(),
                check_vma=False,
            )
        )  # fmt: skip
    else:
        # One replica that is the whole batch, which the compiler spreads over the devices.
        batch = parallel.shard(batch, 1)
        spec = PartitionSpec(None, parallel.AXIS)
        program = jax.jit(jax.vmap(step, in_axes=(None, 0), out_axes=None, axis_name=parallel.AXIS))
    batch = jax.device_put(batch, NamedSharding(mesh, spec))
    state = parallel.replicate(start(network, optimizer))
    for _ in range(3):
        state, sums = program(state, batch)
    expected, expected_sums = run(8, valid, batch_norm=True)
    assert sums["count"] == expected_sums["count"] == valid
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(state.variables), strict=True):
        np.testing.assert_allclose(a, np.asarray(b), rtol=1e-5, atol=2e-6)


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


def test_the_moving_average_follows_the_variables():
    network, optimizer = small_network(batch_norm=True, axis_name=parallel.AXIS), optax.sgd(0.1)
    step = training.make_train_step(network, optimizer, preprocessing=SMALL, ema_decay=0.75)
    mapped = parallel.map_step(step, devices=jax.devices()[:1])
    variables = training.init_variables(network, jax.random.key(0), image_size=8)
    state = training.create_state(variables, optimizer, jax.random.key(0), ema=True)
    state = parallel.replicate(state, jax.devices()[:1])
    images, labels = small_data(16)
    batch = {"image": images, "label": labels, "mask": np.ones(16, bool)}
    expected = jax.tree.map(np.float64, variables)
    for _ in range(3):
        state, _ = mapped(state, parallel.shard(batch, 1))
        now = jax.device_get(state.variables)
        expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, expected, now)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(state.ema), strict=True):
        np.testing.assert_allclose(a, np.asarray(b), rtol=1e-5, atol=1e-6)


def test_sixteen_bits_of_activations_leave_the_state_in_thirty_two():
    images, labels = small_data(64)
    batch = {"image": images, "label": labels, "mask": np.ones(64, bool)}
    network, optimizer = small_network(batch_norm=True, axis_name=parallel.AXIS), optax.sgd(0.1)
    losses = {}
    for precision in ("float32", "bfloat16"):
        step = training.make_train_step(
            network, optimizer, preprocessing=SMALL, precision=precision
        )
        mapped = parallel.map_step(step, devices=jax.devices()[:1])
        state = parallel.replicate(start(network, optimizer), jax.devices()[:1])
        for _ in range(5):
            state, sums = mapped(state, parallel.shard(batch, 1))
        losses[precision] = float(sums["loss"])
        leaves = jax.tree.leaves((state.variables, state.opt_state))
        assert {leaf.dtype for leaf in leaves} <= {np.dtype(np.float32), np.dtype(np.int32)}
    assert losses["float32"] != losses["bfloat16"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)
