import json

import pytest

from topk_jax.jobs import run_table


def write_run(folder, seed, accuracy, *, topk="", classes=(0.5, 0.25), **result):
    folder.mkdir()
    summary = {
        "flags": {"seed": seed, "topk": topk, "optimizer.momentum": 0.9},
        "result": {
            "accuracy": accuracy, "per_class": {"clean": list(classes)}, "classes": ["ant", "bee"],
            "class_counts": [100, 10],
        } | result,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def runs(tmp_path):
    return [
        write_run(tmp_path / "a", 0, {"clean": 0.5, "blur2": 0.4}),
        write_run(tmp_path / "b", 1, {"clean": 0.7, "blur2": 0.35}, classes=(0.25, 0.5)),
        write_run(tmp_path / "c", 0, {"clean": 0.8, "blur2": 0.8}, topk="2_20"),
    ]


def test_seeds_are_pooled_and_what_differs_is_named(runs):
    lines = []
    groups = run_table.run(runs, report=lines.append)
    assert [group["settings"] for group in groups] == [{"topk": ""}, {"topk": "2_20"}]
    assert [group["seeds"] for group in groups] == [[0, 1], [0]]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]] == [
        ["none of these", "2", "0.600 (0.500-0.700)", "0.375 (0.350-0.400) / 0.65"],
        ["topk 2_20", "1", "0.800", "0.800 / 1.00"],
    ]


def test_classes_and_their_ranks(runs, tmp_path):
    lines = []
    run_table.run(runs, per_class=True, output=tmp_path / "table.md", report=lines.append)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[5:]]
    assert cells[0] == ["runs", "ant", "bee", "rank agreement"]
    assert cells[2:] == [
        ["training images", "100", "10", ""],
        ["none of these", "0.375", "0.375", "0.00"],
        ["topk 2_20", "0.500", "0.250", "1.00"],
    ]
    assert (tmp_path / "table.md").read_text().splitlines() == lines


def test_what_cannot_be_compared_is_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="no runs"):
        run_table.run([], report=print)
    with pytest.raises(ValueError, match=r"nowhere: no summary\.json"):
        run_table.run([tmp_path / "nowhere"], report=print)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "summary.json").write_text('{"flags": {}}')
    with pytest.raises(ValueError, match="unfinished: not a finished training run"):
        run_table.run([unfinished], report=print)
    again = write_run(tmp_path / "again", 0, {"clean": 0.5, "blur2": 0.4})
    with pytest.raises(ValueError, match="seed 0"):
        run_table.run([*runs, again], report=print)
    other = write_run(tmp_path / "other", 3, {"clean": 0.5}, topk="1_10")
    with pytest.raises(ValueError, match="different sets"):
        run_table.run([*runs, other], report=print)
