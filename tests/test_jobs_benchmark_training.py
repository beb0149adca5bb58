"""Training steps side by side with PyTorch, on networks of seven layers."""

import dataclasses
import functools
import importlib
import json

import jax
import numpy as np
import pytest
from PIL import Image

from topk_jax import networks
from topk_jax.jobs import benchmark_steps, benchmark_torch, benchmark_training
from topk_jax.jobs.benchmark_steps import Case, Input, Row, Scaling
from topk_jax.networks import ResNet, variable_shapes
from topk_jax.weights import variables_to_state_dict

SMALL = {"batch_size": 4, "image_size": 8, "rounds": 2}
TINY = {"width": 4, "bottleneck": False, "stem": "cifar", "shortcut": "padding"}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A network of the form of ResNet-32 that compiles in a second."""
    known = networks._NETWORKS
    monkeypatch.setitem(known, "tiny", functools.partial(ResNet, blocks=(1, 1), **TINY))


@pytest.fixture
def photos(tmp_path):
    """A folder of JPEGs, five images in three classes."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(("ant", "ant", "bee", "cow", "cow")):
        path = tmp_path / "photos" / name / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def run(**changes):
    lines: list[str] = []
    arguments = SMALL | {"networks": ["tiny"], "devices": ()} | changes
    return benchmark_training.run(report=lines.append, **arguments), lines


def cells(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def make_row(**changes):
    seconds = {"topk_jax": (1.0, 2.0), "contiguous": (2.0, 2.0)}
    row = Row(Case("resnet18", 64, 96, 0), 0.2, 3.0, 5 * 2**20, 2**20, seconds, {"loss": 0.0})
    return dataclasses.replace(row, **changes)


def test_table_of_steps():
    lines = benchmark_training.format_rows([make_row(), make_row(sparsity=1.0)])
    assert cells(lines[0])[3:] == [
        "images/s", "ms", "compile s", "memory MiB", "PyTorch contiguous", "ratio (min-max)",
    ]  # fmt: skip
    assert cells(lines[2]) == [
        "resnet18", "64x96x96", "20 %", "42.7*", "1500", "3.0", "5 + 1", "32.0", "1.50 (1.00-2.00)",
    ]  # fmt: skip
    assert "Geometric mean of the ratios, plain: 1.50 (contiguous)." in lines
    assert lines[-1].startswith("Memory: temporary buffers of our step, plus its arguments")
    alone = benchmark_training.format_rows([make_row(seconds={"topk_jax": (1.0,)})])
    assert len(cells(alone[0])) == 7
    assert not any("Geometric" in line for line in alone)


def test_table_of_devices():
    scaling = Scaling(Case("resnet32", 128, 32, 0), {1: (2.0, 3.0), 4: (4.0, 4.0)})
    lines = benchmark_training.format_scaling([scaling])
    assert cells(lines[2]) == ["resnet32", "128", "1", "51.2", "1.00 (1.00-1.00)"]
    assert cells(lines[3]) == ["resnet32", "128", "4", "32.0", "0.62 (0.50-0.75)"]
    assert "Fake devices that share" in lines[-1]
    assert scaling.as_dict()["speedup"][4]["low"] == 0.5


def test_table_of_inputs():
    case = Case("resnet32", 100, 32, 0)
    measured = Input(case, "memory", (0.1, 0.1), fed=(2.0, 1.25), repeated=(1.5, 1.25))
    lines = benchmark_training.format_inputs([measured])
    assert cells(lines[2]) == [
        "resnet32", "memory", "1000.0", "72.7", "61.5*", "12.5 % (0.0 % to 25.0 %)",
    ]  # fmt: skip
    assert measured.as_dict()["share"] == {"median": 0.125, "low": 0.0, "high": 0.25}


def test_ours_alone_where_torch_is_missing(tmp_path, photos, monkeypatch):
    find = importlib.import_module

    def missing(name):
        if name == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return find(name)

    monkeypatch.setattr(benchmark_torch.importlib, "import_module", missing)
    output = tmp_path / "speed.json"
    result, lines = run(sparsities=[0.5], source=photos, output=output)
    assert lines[0].startswith("topk_jax alone: torch is not installed")
    assert json.loads(output.read_text()) == [json.loads(json.dumps(result))]
    assert [row["sparsity"] for row in result["rows"]] == [1.0, 0.5]
    for row in result["rows"]:
        assert list(row["seconds"]) == ["topk_jax"]
        assert len(row["seconds"]["topk_jax"]) == SMALL["rounds"]
        assert row["differences"] == {}
    shapes = variable_shapes(Case("tiny", 4, 8, 0).create())["params"]
    numbers = 2 * sum(leaf.size for leaf in jax.tree.leaves(shapes))  # parameters and momentum
    assert result["rows"][0]["arguments"] >= 4 * numbers + 4 * 8 * 8 * 3  # and a byte a pixel
    assert result["rows"][0]["temporary"] > 0
    assert [each["source"] for each in result["input"]] == ["JPEG folder", "memory"]
    assert result["scaling"] == []
    assert "torch" not in result["versions"]


def test_a_batch_is_divided_among_devices():
    case = {"network": "tiny", "batch_size": 4, "image_size": 8, "seed": 0}
    asked = {"case": case, "counts": [1, 2], "rounds": 3}
    seconds = json.loads(benchmark_steps._answer(json.dumps(asked)))
    assert list(seconds) == ["1", "2"]
    assert all(len(values) == 3 and min(values) > 0 for values in seconds.values())


@pytest.mark.slow
def test_devices_have_a_process_of_their_own():
    scaling = benchmark_steps.measure_scaling(Case("resnet20", 16, 4, 0), (16,), 1, print)
    assert jax.local_device_count() < 16
    assert list(scaling.seconds) == [1, 16]


def test_the_process_of_the_devices_says_what_failed():
    with pytest.raises(RuntimeError, match=r"the process of 1 devices failed: .*'resnet21'"):
        benchmark_steps.measure_scaling(Case("resnet21", 2, 4, 0), (1,), 1, print)


def test_input_is_what_training_gets(photos, monkeypatch):
    seen = []

    class Spy(benchmark_steps.Step):
        def fit(self, batches, steps):
            seen.append([next(batches) for _ in range(steps)])

    with benchmark_steps.open_images(photos, 0) as found:
        inputs = benchmark_steps.measure_input(Spy(Case("tiny", 4, 8, 0), 1.0), found, 1)
    assert [each.source for each in inputs] == ["JPEG folder", "memory"]
    repeated, folder, memory = seen[0], seen[2], seen[4]
    for batch in (*repeated, *folder, *memory):
        assert batch["image"].shape == (1, 4, 8, 8, 3)
        assert batch["image"].dtype == np.uint8
    assert all(batch is repeated[0] for batch in repeated)
    # The decoded images are the files', in the same order and with the same crops.
    for ours, theirs in zip(folder, memory, strict=True):
        np.testing.assert_array_equal(ours["image"], theirs["image"])
    assert not np.array_equal(folder[0]["image"], folder[1]["image"])


def test_drawn_images_are_jpegs_of_ten_classes_at_most_for_the_network(monkeypatch):
    monkeypatch.setattr(benchmark_steps, "_DRAWN_IMAGES", 17)
    with benchmark_steps.open_images("builtin", 0) as found:
        assert len(found) == 17
        assert found.load(3).shape == (96, 96, 3)
        assert all(name.endswith(".jpg") for name in found.image_names)
        assert max(found.labels) >= benchmark_steps.CLASSES
    with pytest.raises(OSError, match="jpg"):
        found.load(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"networks": []}, "no networks to measure"),
        ({"networks": ["resnet21"]}, "unknown network 'resnet21'"),
        ({"networks": ["vgg11"]}, "vgg11: expected a ResNet"),
        ({"networks": ["resnet18_li2023"]}, "--nocompare"),
        ({"sparsities": [1.5]}, r"in \(0, 1\]"),
        ({"batch_size": 0}, "batch size 0"),
        ({"batch_size": 6, "devices": (1, 4)}, "a multiple of 4, for example 8"),
        ({"output": "speed.txt"}, r"\.md or \.json"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        run(**arguments)


def test_usual_sizes():
    cases = benchmark_training._cases(["resnet18", "resnet32"], [0.2], None, None, 3, True)
    assert cases == [Case("resnet18", 64, 64, 3), Case("resnet32", 128, 32, 3)]


@pytest.fixture(scope="module")
def packages():
    pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    return benchmark_torch.import_torch()


@pytest.mark.parity
@pytest.mark.parametrize("name", ["resnet20", "resnet110"])
def test_torchs_small_resnet_has_our_names_and_shapes(packages, name):
    network = networks.create_network(name)
    with packages.torch.device("meta"):
        module = benchmark_torch.cifar_resnet(
            packages.torch, blocks=network.blocks, width=16, num_classes=10
        )
    shapes = jax.tree.map(lambda leaf: np.empty(leaf.shape), variable_shapes(network))
    expected = {key: array.shape for key, array in variables_to_state_dict(shapes).items()}
    found = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    assert {key: shape for key, shape in found.items() if "num_batches" not in key} == expected


@pytest.mark.parity
def test_both_sides_compute_the_same(packages, photos):
    result, lines = run(sparsities=[0.5], source=photos, compare=True)
    for row in result["rows"]:
        assert list(row["seconds"]) == ["topk_jax", "contiguous", "channels_last"]
        assert list(row["differences"]) == list(benchmark_steps.SAME)
        assert row["differences"]["loss"] < 1e-5
    assert any("differences: loss" in line for line in lines)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"learning_rate": 1.02e-3}, "parameters"),
        ({"momentum": 0.0}, "second step"),
        ({"weight_decay": 0.1}, "parameters"),
    ],
)
def test_another_update_is_not_timed(packages, monkeypatch, change, what):
    other = dataclasses.replace(benchmark_steps.OPTIMIZER, **change)
    step = benchmark_torch.training_step

    def changed(*args, optimizer, **kwargs):
        return step(*args, optimizer=other, **kwargs)

    monkeypatch.setattr(benchmark_torch, "training_step", changed)
    ours = benchmark_steps.Step(Case("tiny", 4, 8, 0), 1.0)
    with pytest.raises(RuntimeError, match=rf"from PyTorch is \S+ \({what}\), .* compute the same"):
        benchmark_steps.measure_step(ours, packages, 1)


@pytest.mark.parity
def test_another_loss_is_not_timed(packages, monkeypatch):
    monkeypatch.setattr(benchmark_torch, "authors_topk", lambda packages, fraction: lambda x: 2 * x)
    ours = benchmark_steps.Step(Case("tiny", 4, 8, 0), 0.5)
    with pytest.raises(RuntimeError, match=r"tiny \(50 %\): .* \(loss\), expected"):
        benchmark_steps.measure_step(ours, packages, 1)
