import json
import math
import sys
import types

import pytest

from topk_jax.training.metrics_log import open_log, read_records


def test_records_come_back_and_later_ones_are_forgotten(tmp_path):
    with open_log(tmp_path, step=0) as log:
        for step in (1, 2, 3):
            log.write({"kind": "train", "step": step, "loss": step / 3})
    with open_log(tmp_path, step=2) as log:
        assert [record["step"] for record in read_records(tmp_path)] == [1, 2]
        log.write({"kind": "train", "step": 3, "loss": math.nan})
    assert [record["loss"] for record in read_records(tmp_path)] == [1 / 3, 2 / 3, None]


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    with open_log(tmp_path, step=0) as log:
        log.write({"kind": "train", "step": 1})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    assert [record["step"] for record in read_records(tmp_path)] == [1]
    with open_log(tmp_path, step=1) as log:
        log.write({"kind": "train", "step": 2})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_other_processes_write_nothing():
    with open_log(None, step=0) as log:
        log.write({"kind": "train", "step": 1})


@pytest.fixture
def tensorboard(monkeypatch):
    """A stand-in for tensorboardX that notes what it is given."""
    given = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            given.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            given.append((name, value, step))

        def close(self):
            given.append("closed")

    module = types.ModuleType("tensorboardX")
    module.SummaryWriter = SummaryWriter
    module.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    return given


def test_tensorboard_gets_the_numbers_where_it_is_installed(tmp_path, tensorboard):
    with open_log(tmp_path, step=4) as log:
        log.write(
            {"kind": "validation", "step": 5, "epoch": 1, "accuracy": {"clean": 0.5, "blur": None}}
        )
    assert tensorboard == [
        (str(tmp_path / "tensorboard"), 5),
        ("validation/accuracy/clean", 0.5, 5),
        "closed",
    ]
