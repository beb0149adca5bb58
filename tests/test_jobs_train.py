"""Whole runs: what they write, how they go on, what they refuse."""

import importlib.util
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from topk_jax import weights
from topk_jax.jobs import train
from topk_jax.networks import create_network
from topk_jax.training import Checkpoints, Validation, init_variables
from topk_jax.training.data import find_datasets
from topk_jax.training.metrics_log import read_records
from topk_jax.training.settings import from_config

ROOT = pathlib.Path(__file__).resolve().parent.parent


def builtin_config():
    spec = importlib.util.spec_from_file_location("config", ROOT / "configs" / "builtin.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def short_config(**fields):
    """64 images, two epochs of two steps; the committed config otherwise."""
    config = builtin_config()
    config.epochs, config.batch_size, config.log_every, config.microbatch = 2, 32, 1, 0
    config.evaluate_every = 1
    config.data.builtin_images, config.data.builtin_test_per_category = 64, 1
    config.update(fields)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: its folder, result and the lines that it said."""
    folder, lines = tmp_path_factory.mktemp("train") / "run", []
    result = train.run(short_config(), folder, report=lines.append)
    return folder, result, lines


def test_what_a_run_writes(finished):
    folder, result, lines = finished
    assert sorted(path.name for path in folder.iterdir() if path.name[0] != ".") == [
        "checkpoints", "metrics.jsonl", "summary.json", "training.pdf", "training.png",
        "weights.safetensors",
    ]  # fmt: skip
    assert list(result["accuracy"]) == ["congruent", "silhouette", "texture"]
    assert set(result) >= {"shape_bias", "decided_fraction", "n_shape", "n_texture", "sha256"}
    arrays = weights.read_state_dict(folder / "weights.safetensors")
    assert result["parameters"] == sum(array.size for array in arrays.values()) > 200_000
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["result"] == json.loads(json.dumps(result))
    assert summary["flags"]["data.builtin_images"] == 64
    records = read_records(folder)
    assert [record["step"] for record in records] == [1, 2, 2, 3, 4, 4]
    assert [record["kind"] for record in records] == ["train", "train", "validation"] * 2
    assert [line.split(":")[0] for line in lines if "epoch" in line] == ["epoch 1/2", "epoch 2/2"]


def test_the_weights_load_and_give_the_accuracies(finished):
    folder, result, _ = finished
    config = from_config(short_config())
    variables = weights.load_variables("builtin", folder / "weights.safetensors")
    datasets = find_datasets(config.data)
    validation = Validation(
        create_network("builtin"), datasets.validation, preprocessing=config.data.preprocessing
    )
    found = validation.measure(variables)
    assert found["accuracy"] == result["accuracy"]
    assert found["n_images"] == {"congruent": 16, "silhouette": 16, "texture": 16}
    assert np.nanmean(found["per_class"]["texture"]) == pytest.approx(result["accuracy"]["texture"])


def test_a_finished_run_is_not_repeated(finished):
    folder, result, _ = finished
    changed = (folder / "weights.safetensors").stat().st_mtime_ns
    lines = []
    again = train.run(short_config(), folder, report=lines.append)
    assert again == json.loads(json.dumps(result))
    assert (folder / "weights.safetensors").stat().st_mtime_ns == changed
    assert "finished" in lines[-1]


def test_another_config_is_refused_with_the_fields_that_differ(finished):
    folder, *_ = finished
    config = short_config()
    config.optimizer.learning_rate = 0.5
    with pytest.raises(ValueError, match=r"optimizer.learning_rate was 0.002, now 0.5"):
        train.run(config, folder, report=print)


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("at", [1, 3, 4])
def test_a_run_that_was_ended_goes_on_bit_for_bit(tmp_path, finished, at):
    folder, result, _ = finished

    def progress(batches, **options):
        for number, batch in enumerate(batches):
            if number == at:
                raise _KilledError
            yield batch
        if at == 4:
            raise _KilledError  # after the last checkpoint, before the results

    config = short_config(checkpoint_every=1)
    with pytest.raises(_KilledError):
        train.run(config, tmp_path / "run", report=print, progress=progress)
    assert not (tmp_path / "run" / "weights.safetensors").exists()
    lines = []
    again = train.run(config, tmp_path / "run", report=lines.append)
    assert any(line.startswith("going on after step") for line in lines)
    assert again["sha256"] == result["sha256"]
    assert again["best"] == result["best"]

    def numbers(path):
        return [
            {name: value for name, value in record.items() if name != "images_per_second"}
            for record in read_records(path)
        ]

    assert numbers(tmp_path / "run") == numbers(folder)


def test_the_best_states_are_kept(finished):
    folder, result, _ = finished
    config = from_config(short_config())
    like = _state_like(config)
    checkpoints = Checkpoints(folder / "checkpoints")
    assert list(result["best"]) == ["congruent", "silhouette"]
    for name, best in result["best"].items():
        state, extra = checkpoints.restore_best(name, like)
        assert int(state.step) == best["step"]
        assert extra["accuracy"][name] == best["value"]


def _state_like(config):
    from topk_jax.training import create_state, make_optimizer

    variables = init_variables(create_network("builtin"), jax.random.key(0), image_size=64)
    optimizer = make_optimizer(config.optimizer, steps_per_epoch=2, epochs=2)
    return create_state(variables, optimizer, jax.random.key(0))


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path):
    config = short_config(epochs=3)
    config.optimizer.update(
        {"name": "sgd", "learning_rate": 1e-3, "schedule": "step", "milestones": (1,),
         "factor": 1e38}
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"loss of step 4 is "):
        train.run(config, tmp_path / "run", report=print)
    assert not (tmp_path / "run" / "weights.safetensors").exists()
    state, _ = Checkpoints(tmp_path / "run" / "checkpoints").restore(
        _state_like(from_config(config))
    )
    assert int(state.step) == 2
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    config = short_config(checkpoint_every=1)
    usage = shutil.disk_usage(tmp_path)
    calls = []

    def fills_up(path):
        calls.append(path)
        return usage._replace(free=10**6) if len(calls) > 2 else usage

    monkeypatch.setattr(shutil, "disk_usage", fills_up)
    with pytest.raises(OSError, match=r"No space left .* 1\.0 MB, a checkpoint needs up to"):
        train.run(config, tmp_path / "run", report=print)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    state, _ = checkpoints.restore(_state_like(from_config(config)))
    checkpoints.close()
    assert int(state.step) == 1
    monkeypatch.undo()
    assert train.run(config, tmp_path / "run", report=print)["sha256"]


@pytest.mark.parametrize("name", ["epochs", "batch_size", "log_every"])
def test_settings_out_of_range_are_refused_before_anything_is_written(tmp_path, name):
    config = short_config()
    config[name] = 0
    with pytest.raises(ValueError, match=f"config.{name} is 0: expected 1 or more"):
        train.run(config, tmp_path / "run", report=print)
    assert not (tmp_path / "run").exists()


def test_a_batch_that_devices_cannot_share_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"batch of 30 .* 8 devices"):
        train.run(short_config(batch_size=30), tmp_path / "run", report=print)
    assert not (tmp_path / "run").exists()


def write_classes(folder, *, classes=("ant", "bee"), count=8, side=20, seed=0):
    rng = np.random.default_rng(seed)
    for place, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 120, (side, side + 4, 3))
            pixels[..., place] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")


def folder_config(path, **fields):
    return {
        "network": "cnn2",
        "epochs": 3, "batch_size": 8, "log_every": 10,
        "data": {"path": str(path), "image_size": 16, "resize_size": 18},
        "optimizer": {"learning_rate": 0.05},
    } | fields  # fmt: skip


def test_folders_with_damaged_images_and_a_further_set(tmp_path):
    write_classes(tmp_path / "images" / "train")
    write_classes(tmp_path / "images" / "val", count=4, seed=1)
    write_classes(tmp_path / "stylized", count=3, seed=2)
    (tmp_path / "images" / "train" / "ant" / "9.png").write_bytes(b"no image")
    (tmp_path / "images" / "val" / "bee" / "9.png").write_bytes(b"no image")
    config = folder_config(tmp_path / "images", ema_decay=0.5)
    config["data"] |= {"further": {"stylized": str(tmp_path / "stylized")}, "suppressed": ["gray"]}
    result = train.run(config, tmp_path / "run", report=print)
    assert result["skipped"] == 1
    assert result["n_images"] == {"clean": 8, "stylized": 6, "gray": 8}
    assert list(result["best"]) == ["clean", "stylized"]
    strict = folder_config(tmp_path / "images")
    strict["data"] |= {"strict": True}
    with pytest.raises(ValueError, match=r"9.png: not an image"):
        train.run(strict, tmp_path / "strict", report=print)


def test_images_that_do_not_fit_together_are_refused(tmp_path):
    write_classes(tmp_path / "images" / "train", count=1)
    write_classes(tmp_path / "images" / "val", classes=("ant", "cow"), count=1)
    with pytest.raises(ValueError, match="cow"):
        train.run(folder_config(tmp_path / "images"), tmp_path / "run", report=print)
    with pytest.raises(OSError, match="nowhere"):
        train.run(folder_config(tmp_path / "nowhere"), tmp_path / "run", report=print)
    assert not (tmp_path / "run").exists()


def script(*flags, devices=1, **options):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    return subprocess.Popen(
        [sys.executable, "scripts/train.py", *flags],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config=configs/nope.py"], "error: --config=configs/nope.py: no such file"),
        (["--config=configs/builtin.py", "--config.epoch=3"], "epochs"),
        (["--config=configs/builtin.py", "--config.epochs=0"], "config.epochs is 0"),
        (
            ["--config=configs/imagenette_topk.py:fast"],
            "error: flag --config=configs/imagenette_topk.py:fast: recipe 'fast': expected code or",
        ),
    ],
)
def test_the_script_reports_bad_flags_in_one_line(tmp_path, flags, message):
    with script(f"--workdir={tmp_path / 'run'}", *flags) as process:
        _, errors = process.communicate()
    assert process.returncode == 2
    assert message in errors
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "run").exists()


SHORT = (
    "--config=configs/builtin.py", "--config.data.builtin_images=64", "--config.epochs=2",
    "--config.batch_size=32", "--config.microbatch=0", "--config.log_every=1",
    "--config.evaluate_every=1", "--config.data.builtin_test_per_category=1",
    "--config.data.cue_conflict=",
)  # fmt: skip


def two_processes(*flags):
    """Two processes with two devices each, over loopback; what the first one printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = (
        *flags,
        "--distributed",
        "--num_processes=2",
        f"--coordinator_address=127.0.0.1:{port}",
    )
    with (
        script(*common, "--process_id=0", devices=2) as first,
        script(*common, "--process_id=1", devices=2) as second,
    ):
        try:
            outputs = [process.communicate(timeout=300) for process in (first, second)]
        except subprocess.TimeoutExpired:
            first.kill()
            second.kill()
            raise
    assert (first.returncode, second.returncode) == (0, 0), outputs
    assert "epoch" not in outputs[1][0]  # only the first speaks
    return outputs[0][0]


def test_two_processes_train_as_one(tmp_path):
    """Two processes of two devices over loopback, and one of four devices, give the same losses."""
    flags = (*SHORT, "--config.network_options.dropout=0.0")  # its noise is each device's own
    output = two_processes(*flags, f"--workdir={tmp_path / 'two'}")
    assert "4 devices, 2 processes" in output
    with script(*flags, f"--workdir={tmp_path / 'one'}", devices=4) as one:
        output = one.communicate(timeout=300)
    assert one.returncode == 0, output
    found, expected = read_records(tmp_path / "two"), read_records(tmp_path / "one")
    assert len(found) == len(expected) == 6
    for a, b in zip(found, expected, strict=True):
        assert a["step"] == b["step"]
        if a["kind"] == "train":
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        else:
            assert a["n_images"] == b["n_images"]
    # They go on together: the same run without its results takes the last checkpoint.
    summary = tmp_path / "two" / "summary.json"
    kept = json.loads(summary.read_text())
    result = kept.pop("result")
    summary.write_text(json.dumps(kept))
    output = two_processes(*flags, f"--workdir={tmp_path / 'two'}")
    assert "going on after step 4 of 4" in output
    assert json.loads(summary.read_text())["result"]["sha256"] == result["sha256"]


def test_ctrl_c_and_a_second_run_on_the_same_folder(tmp_path):
    flags = [*SHORT, f"--workdir={tmp_path / 'run'}", "--config.epochs=500"]
    with script(*flags) as process:
        deadline = time.monotonic() + 120
        while not read_records(tmp_path / "run") and time.monotonic() < deadline:
            time.sleep(0.1)
        with script(*flags) as second:
            _, errors = second.communicate()
        process.send_signal(signal.SIGINT)
        assert second.returncode == 1
        assert f"in use by process {process.pid}" in errors
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors.splitlines()[-1]
    assert read_records(tmp_path / "run")
