"""The main job: its files, what a second run takes over, and every kind of bad input."""

import csv
import errno
import importlib.util
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from topk_jax import cli, images
from topk_jax.decisions import read_trials
from topk_jax.jobs import shape_bias as job
from topk_jax.stimuli import builtin
from topk_jax.weights import load_variables, variables_to_state_dict, write_state_dict

ROOT = pathlib.Path(__file__).parents[1]
# One site compiles faster than five.
COMMAND = {"sparsities": (0.5, 0.1), "sites": ("pool5",)}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    """A folder of 64 of the built-in stimuli, as a user's own set would lie."""
    folder = tmp_path_factory.mktemp("stimuli")
    stimuli = builtin.builtin_cue_conflict(seed=5)
    for index in range(0, len(stimuli), 20):
        target = folder / stimuli.category[index] / stimuli.image_names[index]
        images.write_image(target, stimuli.load(index))
    return folder


@pytest.fixture(scope="module")
def done(data, tmp_path_factory) -> tuple[pathlib.Path, dict, list[str]]:
    """A finished run: its folder, summary and printed lines."""
    folder = tmp_path_factory.mktemp("run") / "out"
    lines: list[str] = []
    summary = job.run(folder, data=data, **COMMAND, report=lines.append)
    return folder, summary, lines


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_files(done):
    folder, summary, _ = done
    assert json.loads((folder / "summary.json").read_text()).keys() == {
        *("schema", "flags", "model", "weights", "data", "aggregation", "seed", "versions"),
        "subjects",
    }
    names = ["builtin", "builtin-topk-50", "builtin-topk-10"]
    assert [row["subject"] for row in summary["subjects"]] == names
    assert [row["sparsity"] for row in summary["subjects"]] == [1.0, 0.5, 0.1]
    for stem in ("shape_bias", "shape_bias_boxplot", "stimuli"):
        with Image.open(folder / f"{stem}.png") as picture:
            assert min(picture.size) > 300
        assert (folder / f"{stem}.pdf").read_bytes().startswith(b"%PDF")
    tables = folder / "raw-data" / "cue-conflict"
    assert sorted(path.name for path in tables.iterdir()) == sorted(
        f"cue-conflict_{name}_session-1.csv" for name in names
    )
    assert not list(folder.rglob("*.partial"))


def test_summary_is_what_the_tables_say(done):
    """Counted again from the CSVs, with nothing of the library."""
    folder, _, _ = done
    summary = json.loads((folder / "summary.json").read_text())
    for row in summary["subjects"]:
        name = f"cue-conflict_{row['subject']}_session-1.csv"
        trials = rows_of(folder / "raw-data" / "cue-conflict" / name)
        assert list(trials[0]) == [
            *("subj", "session", "trial", "rt", "object_response", "category", "condition"),
            "imagename",
        ]
        shape = texture = conflict = right = 0
        for trial in trials:
            assert trial["subj"] == row["subject"]
            assert trial["rt"] == trial["condition"] == "NaN"
            cue = "".join(c for c in trial["imagename"].split("-")[1][:-4] if not c.isdigit())
            right += trial["object_response"] == trial["category"]
            if cue != trial["category"]:
                conflict += 1
                shape += trial["object_response"] == trial["category"]
                texture += trial["object_response"] == cue
        assert (row["n_images"], row["n_conflict"]) == (64, conflict)
        assert (row["n_shape"], row["n_texture"]) == (shape, texture)
        assert row["n_other"] == conflict - shape - texture
        assert row["n_excluded"] == 64 - conflict
        assert row["accuracy"] == pytest.approx(right / 64)
        assert row["decided_fraction"] == pytest.approx((shape + texture) / conflict)
        assert row["shape_fraction"] == pytest.approx(shape / conflict)
        if shape + texture:
            assert row["shape_bias"] == pytest.approx(shape / (shape + texture))
        else:
            assert row["shape_bias"] is None
        assert sum(row["response_histogram"].values()) == 64
        for key in ("shape_bias_ci95", "shape_bias_ci95_bootstrap"):
            assert len(row[key]) == 2


def test_report(done):
    _, summary, lines = done
    text = "\n".join(lines)
    assert summary["weights"]["sha256"][:8] in text
    for row in summary["subjects"]:
        line = next(line for line in lines if line.startswith(row["subject"] + " "))
        assert f"{row['n_shape']}" in line.split()
        assert f"{row['decided_fraction']:.3f}" in line.split()
        for warning in row["warnings"]:
            assert f"warning: {row['subject']}: {warning}" in lines


def test_a_second_run_takes_what_is_there(done, data):
    folder, summary, _ = done
    tables = sorted((folder / "raw-data" / "cue-conflict").iterdir())
    before = [path.stat().st_mtime_ns for path in tables]
    removed = tables[-1]
    kept = removed.read_bytes()
    removed.unlink()
    again = job.run(folder, data=data, **COMMAND)
    after = [path.stat().st_mtime_ns for path in tables]
    assert after[:-1] == before[:-1]
    assert after[-1] > before[-1]
    assert removed.read_bytes() == kept
    assert json.dumps(again) == json.dumps(summary)


def test_another_command_in_the_folder_is_refused(done, data):
    folder, _, _ = done
    before = (folder / "summary.json").read_bytes()
    with pytest.raises(ValueError, match=r"aggregation"):
        job.run(folder, data=data, **COMMAND, aggregation="max")
    assert (folder / "summary.json").read_bytes() == before


def test_a_table_of_other_images_is_refused(done, data, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(done[0], folder)
    mine = tmp_path / "mine"
    shutil.copytree(data, mine)
    summary = json.loads((folder / "summary.json").read_text())
    summary["flags"]["data"] = str(mine)
    (folder / "summary.json").write_text(json.dumps(summary))
    extra = next(iter((mine / "fish").iterdir()))
    shutil.copy(extra, extra.with_name("fish99-heart1.png"))
    with pytest.raises(ValueError, match="its images are not those of"):
        job.run(folder, data=mine, **COMMAND)


@pytest.fixture
def undrawn(monkeypatch):
    """Without the figures, which take most of the time of a run."""
    monkeypatch.setattr(job, "_draw", lambda *_: None)


@pytest.mark.usefixtures("undrawn")
def test_other_weights_under_the_same_name_are_refused(data, tmp_path):
    weights = tmp_path / "mine.safetensors"
    state = variables_to_state_dict(load_variables("builtin", "builtin"))
    write_state_dict(weights, state)
    job.run(tmp_path / "out", weights=weights, data=data, baseline=True, sparsities=(1.0,))
    write_state_dict(weights, {key: -value for key, value in state.items()})
    with pytest.raises(ValueError, match="made with other weights"):
        job.run(tmp_path / "out", weights=weights, data=data, sparsities=(1.0,))


@pytest.mark.usefixtures("undrawn")
def test_rest_and_sites(data, tmp_path):
    options = {"rest": True, "sites": ("pool4", "pool5"), "baseline": False}
    summary = job.run(tmp_path / "out", data=data, sparsities=(0.05,), **options)
    (row,) = summary["subjects"]
    assert (row["subject"], row["rest"], row["sparsity"]) == ("builtin-rest-5", True, 0.05)


def test_people_are_shown_beside(data, tmp_path):
    humans = tmp_path / "humans"
    humans.mkdir()
    trials = [(p.parent.name, p.name) for p in sorted(data.rglob("*.png"))]
    for person in (1, 2):
        with open(humans / f"cue-conflict_subject-0{person}_session_1.csv", "w") as file:
            file.write("subj,session,trial,rt,object_response,category,condition,imagename\n")
            for i, (shape, name) in enumerate(trials, start=1):
                file.write(f"subject-0{person},1,{i},0.5,{shape},{shape},0,{name}\n")
    summary = job.run(tmp_path / "out", data=data, sparsities=(1.0,), humans=humans)
    assert summary["humans"]["shape_bias"] == 1.0
    assert summary["humans"]["n_images"] == 2 * len(trials)


def test_no_decision_at_all_is_nan_and_said(data, tmp_path):
    """Every answer is a third category: the bias is null, the run ends well and says why."""
    weights = tmp_path / "constant.safetensors"
    state = variables_to_state_dict(load_variables("builtin", "builtin"))
    last = max(key for key in state if key.startswith("classifier") and key.endswith("bias"))
    state[last.replace("bias", "weight")] *= 0
    state[last] = np.eye(16, dtype=np.float32)[3]
    write_state_dict(weights, state)
    constant = builtin.BUILTIN_CATEGORIES[3]
    mine = tmp_path / "data"
    for path in data.rglob("*.png"):
        if constant not in path.name:
            (mine / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, mine / path.parent.name / path.name)
    lines: list[str] = []
    summary = job.run(
        tmp_path / "out", weights=weights, data=mine, sparsities=(1.0,), report=lines.append
    )
    (row,) = summary["subjects"]
    assert math.isnan(row["shape_bias"])
    assert (
        json.loads((tmp_path / "out" / "summary.json").read_text())["subjects"][0]["shape_bias"]
        is None
    )
    assert any("no decision" in line for line in lines)


def script():
    """The script as a module, loaded once: its flags are global."""
    name = "topk_jax_script_shape_bias"
    if name not in sys.modules:
        path = ROOT / "scripts" / "shape_bias.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def run_script(capsys, *arguments) -> tuple[int, str, str]:
    module = script()
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        with pytest.raises(SystemExit) as error:
            cli.run(module.main, argv=["shape_bias.py", *arguments])
    captured = capsys.readouterr()
    return int(error.value.code or 0), captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity=0"], "'0' is not a fraction to keep"),
        (["--sparsity=-1"], "'-1' is not a fraction to keep"),
        (["--sparsity=1.5"], "'1.5' is not a fraction to keep"),
        (["--sparsity=abc"], "'abc' is not a fraction to keep"),
        (["--model=vgg61"], "unknown network 'vgg61': did you mean .*vgg16"),
        (["--sites=pool9"], "unknown Top-K site 'pool9'"),
        (["--weights=imagenot"], "unknown weights 'imagenot'"),
        (["--weights=/nowhere/w.pth"], "/nowhere/w.pth: No such file"),
        (["--data=/nowhere/stimuli"], "/nowhere/stimuli"),
        (["--aggregation=median"], "aggregation"),
        (["--batch_size=0"], "batch_size"),
        (["--speed=9"], "speed"),
        (["positional"], "unexpected argument 'positional'"),
        (["--humans=/nowhere"], "/nowhere"),
        (["--model=alexnet", "--weights=builtin"], "builtin"),
    ],
)
def test_bad_flags_are_one_line(capsys, tmp_path, arguments, message):
    code, _, err = run_script(capsys, *arguments, f"--output_dir={tmp_path / 'out'}")
    lines = [line for line in err.splitlines() if line]
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert re.search(message, lines[0])
    assert not (tmp_path / "out" / "raw-data").exists()


def bad_stimulus(data, tmp_path, name, content):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("fish/fish1-heart9.png", b"", "fish1-heart9.png.*empty"),
        ("fish/fish1-heart9.png", b"hello", "fish1-heart9.png.*not an image"),
        ("fish/fish.png", b"hello", "fish.png"),
        ("fish/fish1-zebra2.png", b"hello", "zebra"),
        ("zebra/zebra1-fish2.png", b"hello", "zebra"),
    ],
)
def test_bad_stimuli_are_one_line(capsys, data, tmp_path, name, content, message):
    folder = bad_stimulus(data, tmp_path, name, content)
    out = tmp_path / "out"
    code, _, err = run_script(capsys, f"--data={folder}", f"--output_dir={out}")
    lines = [line for line in err.splitlines() if line]
    assert code == 2
    assert len(lines) == 1
    assert re.search(message, lines[0])


def test_an_image_that_breaks_later_keeps_what_is_done(data, tmp_path, capsys):
    """The header is sound, the pixels are cut off: found only when it is decoded."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    out = tmp_path / "out"
    victim = max(folder.rglob("*.png"))
    whole = victim.read_bytes()
    code, _, err = run_script(capsys, f"--data={folder}", f"--output_dir={out}", "--sparsity=1")
    assert code == 0
    victim.write_bytes(whole[: len(whole) // 2])
    code, _, err = run_script(
        capsys, f"--data={folder}", f"--output_dir={tmp_path / 'other'}", "--sparsity=1"
    )
    assert code == 2
    assert victim.name in err
    assert len([line for line in err.splitlines() if line.startswith("error")]) == 1
    assert (out / "shape_bias.png").exists()


def test_output_that_cannot_be_written(data, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    code, _, err = run_script(capsys, f"--data={data}", f"--output_dir={blocked / 'out'}")
    assert code in (1, 2)
    assert str(blocked) in err
    assert len([line for line in err.splitlines() if line]) == 1
    assert blocked.read_text() == "in the way"


def test_a_full_disk_keeps_what_is_done(data, tmp_path, capsys, monkeypatch):
    """The second table does not fit: one line, exit code 1, the first is whole."""
    real, calls = os.fsync, []

    def fsync(number):
        calls.append(number)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    out = tmp_path / "out"
    code, _, err = run_script(
        capsys, f"--data={data}", f"--output_dir={out}", "--sparsity=0.5", "--sites=pool5"
    )
    assert code == 1
    errors = [line for line in err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "No space left" in errors[0]
    assert str(out) in errors[0]
    (table,) = (out / "raw-data" / "cue-conflict").iterdir()
    assert len(read_trials(table)) == 64
    assert json.loads((out / "summary.json").read_text())["flags"]["sparsity"] == [0.5]
    monkeypatch.undo()
    code, out_text, _ = run_script(
        capsys, f"--data={data}", f"--output_dir={out}", "--sparsity=0.5", "--sites=pool5"
    )
    assert code == 0
    assert "builtin-topk-50" in out_text


def test_ctrl_c(data, tmp_path):
    """Interrupted while it works: exit code 130, no half file, and the same command goes on."""
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "scripts" / "shape_bias.py"), f"--output_dir={out}",
               "--sparsity=0.5,0.4,0.3,0.2,0.1,0.05"]  # fmt: skip
    process = subprocess.Popen(
        [*command, f"--data={data}"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=_environment(),
    )  # fmt: skip
    first = out / "raw-data" / "cue-conflict" / "cue-conflict_builtin_session-1.csv"
    for _ in range(600):
        if first.exists() or process.poll() is not None:
            break
        try:
            process.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.strip().splitlines()[-1].startswith("interrupted")
    assert len(read_trials(first)) == 64
    assert not list(out.rglob("*.partial"))


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path}
