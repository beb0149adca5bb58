import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from topk_jax import metrics
from topk_jax.images import IMAGENET_PREPROCESSING
from topk_jax.jobs import imagenet_accuracy
from topk_jax.networks import create_network, variable_shapes
from topk_jax.stimuli import imagenet
from topk_jax.weights import variables_to_state_dict, write_state_dict

ROOT = pathlib.Path(__file__).parents[1]
CLASSES = ("n01440764", "n02102040", "n03888257")


@pytest.fixture
def pictures(tmp_path) -> pathlib.Path:
    rng = np.random.default_rng(0)
    for index, wnid in enumerate(CLASSES):
        folder = tmp_path / "pictures" / wnid
        folder.mkdir(parents=True)
        for number in range(index + 1):
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((224, 224)).save(folder / f"{number}.png")
    return tmp_path / "pictures"


@pytest.fixture
def weights(tmp_path) -> pathlib.Path:
    """SqueezeNet whose logits hardly depend on the image: the larger, the lower the class."""
    shapes = variable_shapes(create_network("squeezenet1_1"))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    state = variables_to_state_dict(zeros)
    state["classifier.1.bias"] = np.linspace(2, 1, 1000, dtype=np.float32)
    path = tmp_path / "constant.safetensors"
    write_state_dict(path, state)
    return path


def quietly(*args, **kwargs):
    lines = []
    result = imagenet_accuracy.run(*args, report=lines.append, **kwargs)
    return result, lines


def test_ranks_against_a_stable_sort():
    rng = np.random.default_rng(1)
    logits = rng.integers(0, 4, (50, 9)).astype(np.float32)  # many ties
    labels = rng.integers(0, 9, 50)
    expected = [
        np.argsort(-row, kind="stable").tolist().index(label)
        for row, label in zip(logits, labels, strict=True)
    ]
    assert imagenet_accuracy.ranks(logits, labels).tolist() == expected


def test_ranks_refuse_nan_and_labels_out_of_range():
    with pytest.raises(ValueError, match="NaN among the logits"):
        imagenet_accuracy.ranks(np.array([[0.0, np.nan]]), np.array([0]))
    for label in (-1, 2):
        with pytest.raises(ValueError, match=f"labels from {label} to {label} for 2 classes"):
            imagenet_accuracy.ranks(np.zeros((1, 2)), np.array([label]))


def test_catalogue_transform_is_torchvisions(pictures):
    # Resize to 256 (bilinear, antialiased) and the central 224, straight in Pillow.
    path = pictures / CLASSES[0] / "0.png"
    Image.open(path).resize((300, 200)).save(path)
    resized = Image.open(path).resize((384, 256), Image.Resampling.BILINEAR)
    expected = np.asarray(resized.crop((80, 16, 304, 240)))
    stimuli = imagenet.read_class_folders(pictures)
    changed = imagenet_accuracy.with_transform(stimuli, "catalogue", IMAGENET_PREPROCESSING)
    np.testing.assert_array_equal(changed.load(0), expected)
    plain = imagenet_accuracy.with_transform(stimuli, "none", IMAGENET_PREPROCESSING)
    assert plain.load(0).shape == (200, 300, 3)
    with pytest.raises(ValueError, match="expected catalogue or none"):
        imagenet_accuracy.with_transform(stimuli, "stretch", IMAGENET_PREPROCESSING)  # pyright: ignore


def test_counts_rows_and_files(pictures, weights, tmp_path):
    run = {"data": pictures, "model": "squeezenet1_1", "weights": weights, "batch_size": 4}
    sparse = {"sparsities": (0.2,), "sites": ("pool5",)}  # compiles faster than all three sites
    summary, lines = quietly(tmp_path / "run", **sparse, transform="none", **run)
    # Class 0 has the largest logit always, so the one tench of six pictures is right.
    plain, sparse = summary["subjects"]
    assert plain == {
        "subject": "squeezenet1_1",
        "sparsity": 1.0,
        "rest": False,
        "n_images": 6,
        "n_top1": 1,
        "n_top5": 1,
        "top1": 1 / 6,
        "top1_ci95": metrics.wilson_interval(1, 6),
        "top5": 1 / 6,
        "top5_ci95": metrics.wilson_interval(1, 6),
    }
    assert (sparse["subject"], sparse["sparsity"]) == ("squeezenet1_1-topk-20", 0.2)
    assert any(re.search(r"squeezenet1_1 +16\.7 % \[.*\] \(1 of 6\)", line) for line in lines)
    written = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert written["subjects"][1]["n_images"] == 6
    assert written["flags"]["transform"] == "none"
    assert len(written["weights"]["sha256"]) == 64


def test_a_rerun_takes_what_is_there(pictures, weights, tmp_path, monkeypatch):
    run = {"data": pictures, "model": "squeezenet1_1", "weights": weights, "batch_size": 4}
    first, lines = quietly(tmp_path / "run", **run)
    monkeypatch.setattr(imagenet_accuracy, "_evaluate", None)
    again, repeated = quietly(tmp_path / "run", **run)
    assert again["subjects"][0]["n_top5"] == first["subjects"][0]["n_top5"]
    assert repeated == lines
    with pytest.raises(ValueError, match="transform was"):
        quietly(tmp_path / "run", transform="none", **run)
    (pictures / CLASSES[2] / "0.png").unlink()
    with pytest.raises(ValueError, match=r"made with 6 images, .* now has 5; choose another"):
        quietly(tmp_path / "run", **run)


def test_without_a_folder_nothing_is_written(pictures, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    run = {"data": pictures, "model": "squeezenet1_1", "weights": weights, "batch_size": 4}
    summary, _ = quietly("", **run)
    assert summary["subjects"][0]["n_images"] == 6
    assert sorted(tmp_path.rglob("*")) == before


def test_a_network_of_other_classes_is_refused(pictures):
    with pytest.raises(ValueError, match="builtin answers with 16 classes, not with ImageNet's"):
        quietly("", data=pictures, model="builtin", weights="builtin")


def script(*arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "imagenet_accuracy.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


def test_the_script_prints_one_line_for_bad_input(tmp_path):
    done = script("--model=squeezenet1_1", f"--data={tmp_path}", "--weights=imagenet")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"error: {tmp_path}: no folders of images; expected <WordNet id>/<image>, for example "
        "n01440764/ILSVRC2012_val_00000293.JPEG"
    )
    done = script()
    assert done.returncode == 2
    assert "--data" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.real
@pytest.mark.parametrize(
    ("transform", "top1", "top5"), [("none", 55.2, 80.8), ("catalogue", 50.4, 80.8)]
)
def test_accuracy_of_squeezenet_on_real_pictures(shared, transform, top1, top5):
    summary, _ = quietly(
        None,
        data=shared / "images" / "imagenet_val",
        model="squeezenet1_1",
        weights=shared / "weights" / "squeezenet1_1.pth",
        transform=transform,
    )
    row = summary["subjects"][0]
    assert row["n_images"] == 250
    assert 100 * row["top1"] == pytest.approx(top1, abs=1)
    assert 100 * row["top5"] == pytest.approx(top5, abs=1)
