"""From pictures to files: what is written, what is taken from an earlier run, what is refused."""

import csv
import itertools
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from topk_jax import images, synthesis
from topk_jax.jobs import synthesize
from topk_jax.synthesis import lbfgs

ROOT = pathlib.Path(__file__).parents[1]
SMALL = {
    "layers": ("pool2",),  # each masked layer is a program of its own to compile
    "size": 32,
    "max_evaluations": 12,
    "memory_size": 5,
    "snapshot_every": 4,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> pathlib.Path:
    """Two pictures of another aspect, one of them grey."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, mode in (("a.png", "RGB"), ("b.jpg", "L")):
        pixels = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).resize((60, 50)).save(folder / name)
    return folder


def run(folder, source, **changes):
    lines: list[str] = []
    settings = SMALL | {"devices": jax.devices()[:1]} | changes
    summary = synthesize.run(folder, source=source, report=lines.append, **settings)
    return summary, lines


@pytest.fixture(scope="module")
def done(tmp_path_factory, pictures):
    folder = tmp_path_factory.mktemp("done")
    summary, lines = run(folder, pictures)
    return folder, summary, lines


def images_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*_seed*.png"))}


def test_every_target_and_mode_is_a_file(done):
    folder, summary, lines = done
    names = [
        f"{stem}_texture_{mode}_seed0"
        for stem, mode in itertools.product("ab", ("all", "top", "rest"))
    ]
    assert sorted(f"{name}.png" for name in names) == sorted(images_of(folder))
    assert [row["image"] for row in summary["images"]] == names
    assert json.loads((folder / "summary.json").read_text())["images"] == summary["images"]
    for name in names:
        assert images.read_image(folder / f"{name}.png").shape == (32, 38, 3)
        assert any(line.startswith(f"{name}: 12 evaluations") for line in lines)
    assert (folder / "sheet.png").exists()
    assert not list((folder / "snapshots").glob("*.npz"))


def test_losses_are_those_of_the_summary(done):
    folder, summary, _ = done
    with open(folder / "losses.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    for row in summary["images"]:
        own = [line for line in lines if line["image"] == row["image"]]
        assert [int(line["iteration"]) for line in own] == list(range(row["iterations"] + 1))
        assert int(own[0]["evaluation"]) == 1
        assert int(own[-1]["evaluation"]) <= row["evaluations"] == 12
        assert float(own[0]["loss"]) == row["first_loss"]
        assert float(own[-1]["loss"]) == row["final_loss"] < row["first_loss"]


def test_distances_are_those_of_the_picture_without_histogram_matching(done, pictures, tmp_path):
    _, matched, _ = done
    summary, _ = run(tmp_path / "out", pictures / "a.png", modes=("all",), histogram_match=False)
    row = summary["images"][0]
    assert row["final_loss"] == matched["images"][0]["final_loss"]
    preset = synthesize.setting_of("builtin", size=32, layers=("pool2",))
    weights = synthesis.load_weights(preset)
    target = synthesis.fit_target(images.read_image(pictures / "a.png"), preset)
    written = images.read_image(tmp_path / "out" / f"{row['image']}.png")
    features = synthesis.extractor(preset, weights)
    found = [
        jax.device_get(features(images.normalize(each[None], weights.preprocessing)))
        for each in (written, target)
    ]
    ours, theirs = ([_gram(maps[name]) for name in preset.layers] for maps in found)
    difference = sum(float(np.sum((a - b) ** 2)) for a, b in zip(ours, theirs, strict=True))
    norm = sum(float(np.sum(b**2)) for b in theirs)
    # The written picture is rounded to whole levels.
    assert row["gram_distance"] == pytest.approx((difference / norm) ** 0.5, rel=0.05)
    last = [maps[preset.layers[-1]].astype(np.float64) for maps in found]
    expected = np.linalg.norm(last[0] - last[1]) / np.linalg.norm(last[1])
    assert row["activation_distance"] == pytest.approx(expected, rel=0.05)


def _gram(maps):
    rows = maps[0].reshape(-1, maps.shape[-1]).astype(np.float64)
    return rows.T @ rows / rows.size


def test_a_second_run_makes_nothing_again(done, pictures, monkeypatch):
    folder, summary, _ = done
    before = images_of(folder), (folder / "losses.csv").read_text()
    monkeypatch.setattr(synthesis, "search", None)
    again, _ = run(folder, pictures)
    assert again["images"] == summary["images"]
    assert (images_of(folder), (folder / "losses.csv").read_text()) == before


def test_a_missing_picture_is_made_again_and_the_others_are_not(done, pictures, monkeypatch):
    folder, _, _ = done
    before = images_of(folder), (folder / "losses.csv").read_text()
    (folder / "b_texture_top_seed0.png").unlink()
    calls = []
    search = synthesis.search
    monkeypatch.setattr(
        synthesis, "search", lambda *args, **kwargs: calls.append(1) or search(*args, **kwargs)
    )
    run(folder, pictures)
    after = images_of(folder), (folder / "losses.csv").read_text()
    assert len(calls) == 1
    assert after == before


def test_an_interrupted_run_goes_on_bit_for_bit(done, pictures, tmp_path):
    folder, summary, _ = done
    out = tmp_path / "out"
    seen = []

    def interrupting(states, **_):
        for state in states:
            yield state
            seen.append(state.evaluations)
            if len(images_of(out)) == 2 and state.evaluations >= 7:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(out, pictures, progress=interrupting)
    assert len(images_of(out)) == 2
    (state,) = (out / "snapshots").glob("*.npz")
    name = state.stem
    assert list((out / "snapshots").glob(f"{name}_{seen[-1]:06}.png"))
    seen.clear()

    def counting(states, **_):
        for state in states:
            seen.append(state.evaluations)
            yield state

    again, _ = run(out, pictures, progress=counting)
    assert seen[0] >= 4, "it begins at the snapshot"
    assert images_of(out) == images_of(folder)
    assert _without_seconds(again) == _without_seconds(summary)
    assert (out / "losses.csv").read_text() == (folder / "losses.csv").read_text()


def _without_seconds(summary):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in summary["images"]]


def test_a_damaged_snapshot_is_said_and_left(pictures, tmp_path, caplog, done):
    out = tmp_path / "out"
    (out / "snapshots").mkdir(parents=True)
    run(out / "run", pictures / "a.png", modes=("all",), max_evaluations=2)
    picture = out / "run" / "a_texture_all_seed0.png"
    expected = picture.read_bytes()
    picture.unlink()
    (out / "run" / "snapshots").mkdir(exist_ok=True)
    (out / "run" / "snapshots" / "a_texture_all_seed0.npz").write_bytes(b"PK\x03\x04 torn")
    with caplog.at_level("WARNING", logger="absl"):
        run(out / "run", pictures / "a.png", modes=("all",), max_evaluations=2)
    assert "a_texture_all_seed0.npz" in caplog.text
    assert "begun again" in caplog.text
    assert picture.read_bytes() == expected


def test_one_image_a_device_gives_the_same_files(done, pictures, tmp_path):
    folder, summary, _ = done
    used = set()

    def watching(states, **_):
        for state in states:
            used.update(state.x.devices() | state.memory.params.devices())
            yield state

    devices = jax.devices()[:2]  # the programs of the first are there
    again, _ = run(tmp_path, pictures, modes=("all",), devices=devices, progress=watching)
    assert used == set(devices)
    assert images_of(tmp_path).items() <= images_of(folder).items()
    assert len(images_of(tmp_path)) == 2
    assert _without_seconds(again) == [
        row for row in _without_seconds(summary) if row["mode"] == "all"
    ]


def test_reconstruction_by_the_target_mask(pictures, tmp_path):
    common = {"objective": "reconstruction", "modes": ("top",), "sparsity": 0.2, "seeds": (3,)}
    plain, _ = run(tmp_path / "plain", pictures / "a.png", **common)
    masked, _ = run(tmp_path / "masked", pictures / "a.png", mask_image=True, **common)
    (one,), (other,) = plain["images"], masked["images"]
    assert one["image"] == other["image"] == "a_reconstruction_top_seed3"
    assert other["first_loss"] < one["first_loss"]


def test_steps_end_a_search(pictures, tmp_path):
    summary, _ = run(tmp_path, pictures / "a.png", modes=("all",), steps=2)
    (row,) = summary["images"]
    assert (row["iterations"], row["status"]) == (2, "iterations")


def test_another_command_or_picture_in_the_folder_is_refused(done, pictures, tmp_path):
    folder, _, _ = done
    before = (folder / "summary.json").read_text()
    with pytest.raises(ValueError, match=r"holds another run \(sparsity was 0.05, now 0.1"):
        run(folder, pictures, sparsity=0.1)
    original = (pictures / "a.png").read_bytes()
    try:
        Image.fromarray(np.eye(40, dtype=np.uint8) * 255).save(pictures / "a.png")
        with pytest.raises(ValueError, match="made from another picture called a"):
            run(folder, pictures)
    finally:
        (pictures / "a.png").write_bytes(original)
    assert (folder / "summary.json").read_text() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "li2032"}, "unknown preset 'li2032': expected li2023"),
        ({"preset": "resnet18"}, "unknown preset 'resnet18'"),
        ({"layers": ["pool11"]}, "unknown feature 'pool11'.*pool1"),
        ({"sparsity": 1.5}, r"sparsity=1.5: expected a fraction in \(0, 1\]"),
        ({"sparsity": 1.0}, "'rest' with sparsity=1 leaves nothing"),
        ({"modes": ("side",)}, "mode='side': expected all or top or rest"),
        ({"mask_image": True}, "mask_image is for reconstruction"),
        ({"size": 3}, "too small"),
        ({"weights": "sin"}, "no weights|unknown weights"),
    ],
)
def test_bad_settings(pictures, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", pictures / "a.png", **changes)
    assert not (tmp_path / "out").exists(), "the corrected command may have the folder"


def test_bad_pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    with pytest.raises(ValueError, match="no pictures there"):
        run(tmp_path / "out", folder)
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        run(tmp_path / "out", folder / "nothing.png")
    Image.new("RGB", (40, 40), "red").save(folder / "plain.png")
    with pytest.raises(ValueError, match="plain: a picture of one colour"):
        run(tmp_path / "out", folder, preset="builtin")
    Image.linear_gradient("L").save(folder / "plain.png")
    (folder / "torn.png").write_bytes((folder / "plain.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"torn\.png: damaged or not an image"):
        run(tmp_path / "out2", folder)
    (folder / "torn.png").unlink()
    Image.linear_gradient("L").save(folder / "plain.jpg")
    with pytest.raises(ValueError, match=r"plain\.jpg and plain\.png would share.*rename one"):
        run(tmp_path / "out2", folder)
    assert not (tmp_path / "out2").exists()


def test_an_objective_that_is_not_finite_at_the_start_is_said(pictures, tmp_path, monkeypatch):
    def broken(*_, **__):
        return iter(lbfgs.minimize(lambda x: x.sum() * np.float32("nan"), np.zeros(3)))

    monkeypatch.setattr(synthesis, "search", broken)
    with pytest.raises(FloatingPointError, match="the objective is nan at the start"):
        run(tmp_path / "out", pictures / "a.png")


def test_script_lists_the_layers():
    done = subprocess.run(
        [sys.executable, "scripts/synthesize.py", "--preset=li2023", "--list_layers"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[:3] == ["conv1_1", "relu1_1  *", "conv1_2"]
    assert [line for line in lines if line.endswith("*")] == [
        f"{name}  *" for name in ("relu1_1", "pool1", "pool2", "pool3", "pool4")
    ]
    assert lines[-1] == "logits"
