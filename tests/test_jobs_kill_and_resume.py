"""The harness alone, on a stand-in for the training that takes half a second."""

import sys

import pytest

from topk_jax.jobs import kill_and_resume

# Twelve steps; its checkpoint is the number of steps, written whole. With "forgetful" as its first
# argument a run that goes on starts from another number.
TRAINING = """
import json, pathlib, sys, time

kind, flag = sys.argv[1:]
folder = pathlib.Path(flag.removeprefix("--workdir="))
(folder / "checkpoints" / "latest").mkdir(parents=True, exist_ok=True)
state = folder / "state"
begun = int(state.read_text()) if state.exists() else 0
value = begun + (0.5 if kind == "forgetful" and begun else 0)
log = folder / "metrics.jsonl"
lines = log.read_text().splitlines()[:begun] if log.exists() else []
log.write_text("".join(line + "\\n" for line in lines))
if kind == "failing":
    sys.exit("error: no such folder")
for step in range(begun + 1, 13):
    time.sleep(0.02)
    value += 1
    with open(log, "a") as file:
        file.write(json.dumps({"kind": "train", "step": step, "loss": value,
                               "images_per_second": time.time()}) + "\\n")
    half = folder / "checkpoints" / "latest" / f"{step}.tmp"
    half.mkdir(exist_ok=True)
    half.touch()
    time.sleep(0.02)
    partial = folder / "partial"
    partial.write_text(str(step))
    partial.replace(state)
    half.rmdir()
(folder / "weights.safetensors").write_text(str(value))
"""


def run(tmp_path, kind, **options):
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    lines = []
    try:
        return kill_and_resume.run(
            [sys.executable, str(script), kind], seed=0, report=lines.append, **options
        ), lines
    except RuntimeError as error:
        error.add_note(str(lines))
        raise


def test_killed_runs_are_compared_with_the_whole_one(tmp_path):
    result, lines = run(tmp_path, "exact", kills=6)
    assert result["kills"] == 6
    assert result["kills_while_saving"] >= 2
    assert result["records"] == 12
    assert sum("kill" in line and "of 6" in line for line in lines) == 6
    assert sum("has the losses" in line for line in lines) == result["runs"] >= 1


def test_other_numbers_are_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="other numbers than the whole one"):
        run(tmp_path, "forgetful", kills=8)


def test_a_training_that_fails_is_said(tmp_path):
    with pytest.raises(RuntimeError, match="exit code 1: error: no such folder"):
        run(tmp_path, "failing", kills=1)
