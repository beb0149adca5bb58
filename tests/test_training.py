import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from topk_jax import files, parallel, training, weights
from topk_jax.images import Preprocessing
from topk_jax.networks.vgg import VGG
from topk_jax.topk import TopK
from topk_jax.training import builtin, loop

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMALL = Preprocessing(8, 8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def small_network(**options):
    fields = {
        "widths": (8, 16), "pooled_size": 1, "hidden": (16,), "num_classes": 3, "dropout": 0.0
    }  # fmt: skip
    return VGG((1, 1), **(fields | options))


def small_data(count, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count).astype(np.int32)
    images = rng.integers(0, 120, (count, 8, 8, 3))
    images[np.arange(count), :, :, labels] += 100
    return images.astype(np.uint8), labels


def start(network, optimizer, seed=0):
    key = jax.random.key(seed)
    variables = training.init_variables(network, key, image_size=8)
    return training.create_state(variables, optimizer, key)


@functools.cache
def mapped_step(devices, microbatch=None, batch_norm=False):
    """Network, optimiser and the step over some devices; compiled once for all tests."""
    network = small_network(batch_norm=batch_norm, axis_name=parallel.AXIS)
    optimizer = optax.sgd(0.1, momentum=0.9)
    step = training.make_train_step(network, optimizer, preprocessing=SMALL, microbatch=microbatch)
    mapped = jax.pmap(
        step, axis_name=parallel.AXIS, in_axes=(None, 0), out_axes=None, donate_argnums=0,
        devices=jax.devices()[:devices],
    )  # fmt: skip
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


def fit_small(report, *, epochs=8, learning_rate=1e-2):
    network, optimizer = small_network(dropout=0.1), optax.adam(learning_rate)
    images, labels = small_data(200)
    devices = jax.devices()[:2]
    batches = training.shuffled_batches(
        images, labels, batch_size=32, epochs=epochs, seed=0, devices=len(devices)
    )
    step = training.make_train_step(network, optimizer, preprocessing=SMALL)
    return training.fit(
        step, start(network, optimizer), batches, report=report, log_every=14, devices=devices
    )


def test_fit_learns_a_small_problem_and_reports():
    records = []
    state = fit_small(records.append)
    assert [record["step"] for record in records] == [14, 28, 42, 56]
    assert records[-1]["loss"] < 0.4 * records[0]["loss"]
    assert records[-1]["accuracy"] > 0.9
    images, labels = small_data(100, seed=1)
    x = (images.astype(np.float32) / 255 - 0.5) / 0.25
    variables = jax.device_get(state.variables)
    logits, _ = jax.jit(lambda v, x: small_network().apply(v, x, train=False))(variables, x)
    assert np.mean(np.argmax(logits, axis=-1) == labels) > 0.9


def test_a_loss_that_is_not_finite_ends_the_run():
    records = []
    with pytest.raises(RuntimeError, match=r"the loss is .* lower learning rate"):
        fit_small(records.append, learning_rate=np.inf)
    assert not np.isfinite(records[-1]["loss"])


def test_parameters_that_are_not_finite_after_the_last_step_are_refused():
    images, labels = small_data(4)
    batches = training.shuffled_batches(images, labels, batch_size=4, epochs=1, seed=0)
    network, optimizer = small_network(), optax.sgd(np.inf)
    step = training.make_train_step(network, optimizer, preprocessing=SMALL)
    state, records = start(network, optimizer), []
    with pytest.raises(RuntimeError, match="parameters are not finite"):
        training.fit(step, state, batches, report=records.append, devices=jax.devices()[:1])
    assert np.isfinite(records[-1]["loss"])


def test_batches_show_every_image_once_an_epoch():
    images = np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1).repeat(3, axis=3)
    labels = np.arange(50, dtype=np.int32)
    batches = list(
        loop.shuffled_batches(images, labels, batch_size=20, epochs=2, seed=5, devices=8)
    )
    assert [batch["mask"].sum() for batch in batches] == [20, 20, 10] * 2
    assert {batch["image"].shape for batch in batches} == {(8, 3, 1, 1, 3)}
    orders = []
    for epoch in (batches[:3], batches[3:]):
        order = np.concatenate([batch["label"][batch["mask"]] for batch in epoch])
        pixels = np.concatenate([batch["image"][batch["mask"]] for batch in epoch])
        np.testing.assert_array_equal(pixels[:, 0, 0, 0], order)
        np.testing.assert_array_equal(np.sort(order), labels)
        orders.append(order)
    assert np.any(orders[0] != orders[1])


def test_random_variables_have_the_variance_of_he():
    network = small_network(widths=(64, 128), batch_norm=True)
    variables = training.init_variables(network, jax.random.key(1))
    kernel = np.asarray(variables["params"]["features.4"]["kernel"])
    assert kernel.shape == (3, 3, 64, 128)
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 64)), rtol=0.02)
    assert np.all(np.asarray(variables["params"]["features.1"]["scale"]) == 1)
    assert np.all(np.asarray(variables["batch_stats"]["features.1"]["var"]) == 1)
    assert not np.any(np.asarray(variables["params"]["features.4"]["bias"]))


def test_weight_decay_spares_biases():
    config = committed_config()
    optimizer = builtin.make_optimizer(config, steps=100)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones((2,))}
    state = optimizer.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(10):
            updates, state = optimizer.update(zeros, state, params)
    assert np.all(np.asarray(updates["kernel"]) < 0)
    assert not np.any(np.asarray(updates["bias"]))


def committed_config():
    path = ROOT / "configs" / "builtin.py"
    spec = importlib.util.spec_from_file_location("builtin_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def test_builtin_run_writes_weights_that_load_and_is_not_repeated(tmp_path):
    config = committed_config()
    config.images, config.epochs, config.batch_size, config.log_every = 64, 2, 32, 2
    config.microbatch, config.test_per_category = None, 1
    lines = []
    result = training.train_builtin(config, str(tmp_path / "run"), report=lines.append)
    assert set(result) == {
        "congruent_accuracy", "silhouette_accuracy", "texture_accuracy", "conflict_shape_bias",
        "conflict_decided_fraction", "sha256",
    }  # fmt: skip
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["result"] == json.loads(json.dumps(result))
    records = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in records] == [2, 4]

    path = tmp_path / "run" / "weights.safetensors"
    variables = weights.load_variables("builtin", path)
    assert variables["params"]["features.0"]["kernel"].shape == (3, 3, 3, 16)
    fresh = training.init_variables(
        builtin.create_network("builtin"), jax.random.split(jax.random.key(config.seed))[0],
        image_size=64,
    )  # fmt: skip
    assert np.any(
        variables["params"]["features.0"]["kernel"] != fresh["params"]["features.0"]["kernel"]
    )

    changed = path.stat().st_mtime_ns
    again = training.train_builtin(config, str(tmp_path / "run"), report=lines.append)
    assert again == summary["result"]
    assert path.stat().st_mtime_ns == changed
    assert "finished" in lines[-1]


@pytest.mark.parametrize("name", ["images", "epochs", "batch_size"])
def test_settings_out_of_range_are_refused_before_anything_is_written(tmp_path, name):
    config = committed_config()
    config[name] = 0
    with pytest.raises(ValueError, match=f"config.{name} is 0: expected 1 or more"):
        training.train_builtin(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_config_is_refused(tmp_path):
    config = committed_config()
    with files.run_folder(tmp_path, config.to_dict() | {"epochs": 99}):
        pass
    with pytest.raises(ValueError, match="epochs was 99, now 6"):
        training.train_builtin(config, str(tmp_path))


def test_committed_network_knows_both_cues():
    variables = weights.load_variables("builtin", "builtin")
    network = builtin.create_network("builtin")
    result = training.measure(network, variables, seed=7, per_category=12)
    assert result["congruent_accuracy"] >= 0.95
    assert result["silhouette_accuracy"] >= 0.5
    assert result["texture_accuracy"] >= 0.5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config=configs/nope.py"], "error: --config=configs/nope.py: no such file"),
        (["--config=configs/builtin.py", "--config.epoch=3"], "epochs"),
    ],
)
def test_script_reports_bad_flags_in_one_line(tmp_path, flags, message):
    done = subprocess.run(
        [sys.executable, "scripts/train.py", f"--workdir={tmp_path / 'run'}", *flags],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
