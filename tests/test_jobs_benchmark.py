import importlib
import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from topk_jax.jobs import benchmark, benchmark_inference, benchmark_torch
from topk_jax.jobs.benchmark_inference import Row
from topk_jax.networks import create_network, variable_shapes

ROOT = pathlib.Path(__file__).parents[1]


def make_row(network="vgg16", sparsity=0.1, ours=(1.0, 2.0), theirs=(2.0, 2.0), differences=(0.0,)):
    return Row(
        network=network,
        sparsity=sparsity,
        compile_seconds=3.0,
        seconds={"topk_jax": ours, "contiguous": theirs},
        differences=differences,
    )


def test_rounds_alternate_and_each_timed_call_follows_one_of_its_own():
    now, log = 0.0, []

    def candidate(name, cost):
        def call():
            nonlocal now
            log.append(name)
            now += cost * len(log)

        return call

    seconds = benchmark.measure(
        {"a": candidate("a", 1.0), "b": candidate("b", 10.0)}, rounds=2, clock=lambda: now
    )
    assert log == ["a", "a", "b", "b"] * 2
    # Only the second, fourth ... calls are timed.
    assert seconds == {"a": (2.0, 6.0), "b": (40.0, 80.0)}
    with pytest.raises(ValueError, match="rounds=0: expected at least 1"):
        benchmark.measure({}, rounds=0)


def test_ratios_are_taken_within_each_round():
    found = benchmark.ratio((2.0, 9.0, 8.0), (1.0, 3.0, 8.0))
    assert (found.median, found.low, found.high) == (2.0, 1.0, 3.0)
    assert str(found) == "2.00 (1.00-3.00)"
    assert benchmark.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert math.isnan(benchmark.geometric_mean([]))


def test_a_wide_spread_is_noisy():
    assert benchmark.is_noisy((1.0, 1.6))
    assert not benchmark.is_noisy((1.0, 1.4))


def test_table_has_means_and_marks_noise():
    rows = [make_row(), make_row("alexnet", ours=(1.0, 1.0), theirs=(8.0, 8.0))]
    lines = benchmark_inference.format_rows(rows, 32)
    assert lines[0].split("|")[1:4] == [" network ", " Top-K ", " images/s "]
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "vgg16", "10 %", "21.3*", "3.0", "16.0", "1.50 (1.00-2.00)", "1 of 1",
    ]  # fmt: skip
    assert len({len(line) for line in lines[:4]}) == 1
    assert "Geometric mean of the ratios, 10 %: 3.46 (contiguous)." in lines
    assert lines[-1].startswith("`*`: the slowest round took more than 1.5 times")
    alone = Row("vgg16", 1.0, 3.0, {"topk_jax": (1.0, 1.0)}, ())
    assert benchmark_inference.format_rows([alone], 8)[2:] == [
        "| vgg16   | plain |      8.0 |       3.0 |"
    ]


def test_row_for_json():
    row = make_row(differences=(0.0, 1e-2)).as_dict(batch_size=4)
    assert row["images_per_second"] == {"topk_jax": 4 / 1.5, "contiguous": 2.0}
    assert row["ratio"] == {"contiguous": {"median": 1.5, "low": 1.0, "high": 2.0}}
    assert (row["n_same"], row["largest_difference"]) == (1, 1e-2)


def test_results_are_added_to_what_is_there(tmp_path):
    for path in (tmp_path / "a.json", tmp_path / "a.md"):
        benchmark.append(path, {"run": 1}, ["# One"])
        benchmark.append(path, {"run": 2}, ["# Two"])
    assert json.loads((tmp_path / "a.json").read_text()) == [{"run": 1}, {"run": 2}]
    assert (tmp_path / "a.md").read_text() == "# One\n\n# Two\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", r"ends in \.md or \.json"),
        ("a.json", "{", r"not JSON \(line 1\)"),
        ("a.json", "{}", "not a list of results"),
    ],
)
def test_an_output_that_cannot_be_extended_is_refused_first(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        benchmark_inference.run(["squeezenet1_1"], output=path)
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"networks": []}, "no networks to measure"),
        ({"networks": ["vgg61"]}, "unknown network 'vgg61'"),
        ({"networks": ["builtin"]}, "--nocompare"),
        ({"batch_size": 0}, "batch size 0"),
        ({"sparsities": [1.5]}, r"in \(0, 1\]"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        benchmark_inference.run(**arguments)


def test_ours_alone_where_torch_is_missing(tmp_path, monkeypatch):
    find = importlib.import_module

    def missing(name):
        if name == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return find(name)

    monkeypatch.setattr(benchmark_torch.importlib, "import_module", missing)
    lines = []
    result = benchmark_inference.run(
        ["squeezenet1_1"],
        sparsities=[0.2],
        batch_size=2,
        image_size=32,
        rounds=2,
        output=tmp_path / "speed.md",
        command="the command",
        report=lines.append,
    )
    assert lines[0].startswith("topk_jax alone: torch is not installed")
    assert [row["sparsity"] for row in result["rows"]] == [1.0, 0.2]
    assert all(list(row["seconds"]) == ["topk_jax"] for row in result["rows"])
    assert all(len(row["seconds"]["topk_jax"]) == 2 for row in result["rows"])
    assert "torch" not in result["versions"]
    section = (tmp_path / "speed.md").read_text()
    assert "`the command`" in section
    assert "| squeezenet1_1 |  20 % |" in section


def test_a_broken_installation_of_torch_is_told(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms\ndoes not exist")

    monkeypatch.setattr(benchmark_torch.importlib, "import_module", broken)
    with pytest.raises(ImportError, match="torch is installed but cannot be imported: operator"):
        benchmark_torch.import_torch()


def test_plain_networks_that_disagree_are_an_error_and_sparse_ones_a_line():
    said = []
    with pytest.raises(RuntimeError, match=r"logits of 1 of 2 images agree .* is 0\.5"):
        benchmark_inference._check_agreement(
            make_row(sparsity=1.0, differences=(0.5, 0.0)), said.append
        )
    assert not said
    benchmark_inference._check_agreement(make_row(differences=(0.5, 0.0)), said.append)
    assert "rounding decides" in said[0]


def test_random_weights_depend_on_the_seed_alone():
    shapes = variable_shapes(create_network("squeezenet1_1"))["params"]
    (first, images), (again, _), (other, _) = (
        benchmark_inference._random_inputs("squeezenet1_1", 2, 32, seed) for seed in (3, 3, 4)
    )
    kernel = first["params"]["features.0"]["kernel"]
    assert kernel.shape == shapes["features.0"]["kernel"].shape
    assert kernel.dtype == images.dtype == np.float32
    np.testing.assert_array_equal(kernel, again["params"]["features.0"]["kernel"])
    assert not np.array_equal(kernel, other["params"]["features.0"]["kernel"])
    assert kernel.std() == pytest.approx(math.sqrt(2 / 27), rel=0.1)


@pytest.fixture(scope="module")
def packages():
    pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    return benchmark_torch.import_torch()


@pytest.mark.parity
def test_both_forms_of_torchs_topk_against_a_loop(packages):
    torch = packages.torch
    rng = np.random.default_rng(0)
    # No two magnitudes alike, so that neither form has a choice.
    x = (rng.permutation(2 * 3 * 5 * 4) + 1.0).reshape(2, 3, 5, 4).astype(np.float32)
    x *= rng.choice([-1, 1], x.shape)
    expected = np.zeros_like(x)
    for index in np.ndindex(2, 3):
        for place in np.argsort(-np.abs(x[index]).ravel())[:6]:  # int(.3 * 5 * 4)
            expected[index].flat[place] = x[index].flat[place]
    for form in (benchmark_torch.authors_topk, benchmark_torch.stable_topk):
        layouts = (torch.contiguous_format, torch.channels_last)
        for layout in layouts:
            given = torch.from_numpy(x).contiguous(memory_format=layout)
            np.testing.assert_array_equal(form(packages, 0.3)(given).numpy(), expected)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["alexnet", "resnet18", "squeezenet1_1", "vgg11"])
def test_both_sides_compute_the_same(packages, name):
    result = benchmark_inference.run(
        [name], sparsities=[0.3], batch_size=2, image_size=64, rounds=1, report=lambda line: None
    )
    for row in result["rows"]:
        assert list(row["seconds"]) == ["topk_jax", "contiguous", "channels_last"]
        assert row["n_same"] == 2


def script(*arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


def test_the_first_word_names_the_benchmark():
    done = script("inference", "--networks=vgg61")
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown network 'vgg61'")
    done = script("inferense")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: flag --benchmark=inferense: value should be one of "
        "<inference|topk|synthesis|training>"
    )


def test_flags_of_training():
    done = script("training", "--devices=1,3", "--networks=resnet20", "--batch_size=8")
    assert done.returncode == 2
    assert done.stderr.startswith("error: a batch of 8 cannot be shared evenly by 3 devices")
