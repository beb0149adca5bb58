"""From a folder of images to folders without a cue: what is written, kept, left out and refused."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from topk_jax import images
from topk_jax.jobs import suppress_cues
from topk_jax.stimuli import read_image_folder, suppress

ROOT = pathlib.Path(__file__).parents[1]
WORDS = ("gray", "blur1", "bilateral", "shuffle4")


def write(folder, names, size=(30, 20)):
    rng = np.random.default_rng(0)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture
def pictures(tmp_path):
    return write(tmp_path / "val", ["cat/1.png", "cat/2.jpg", "dog/1.png"])


def run(out, source, **changes):
    lines: list[str] = []
    settings = {"words": WORDS, "image_size": 16, "seed": 3} | changes
    return suppress_cues.run(out, source=source, report=lines.append, **settings), lines


def written(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*/*.png"))}


def test_each_word_is_a_folder_to_evaluate_on(pictures, tmp_path):
    summary, lines = run(tmp_path / "out", pictures)
    assert (summary["n_written"], summary["n_kept"], summary["damaged"]) == (12, 0, {})
    assert summary == {
        name: value
        for name, value in json.loads((tmp_path / "out" / "summary.json").read_text()).items()
        if name not in ("schema", "flags")
    }
    for word in WORDS:
        made = read_image_folder(tmp_path / "out" / word)
        expected = suppress(read_image_folder(pictures), word, seed=3, image_size=16)
        assert made.image_names == ("cat/1.png", "cat/2.png", "dog/1.png")
        for index in range(3):
            np.testing.assert_array_equal(made.load(index), expected.load(index))
    sheet = images.read_image(tmp_path / "out" / "sheet.png")
    assert sheet.shape[1] > 2 * sheet.shape[0], "two classes by five columns"
    assert lines[0].endswith("at 16 x 16 pixels: gray, blur1, bilateral, shuffle4")
    assert lines[-1] == "12 files written, 0 were there, 0 of 3 images left out"


def test_a_rerun_makes_what_is_missing(pictures, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(out, pictures)
    before = written(out)
    (out / "blur1" / "cat" / "2.png").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*/*.png")}
    summary, _ = run(out, pictures)
    assert (summary["n_written"], summary["n_kept"]) == (1, 11)
    assert written(out) == before
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    monkeypatch.setattr(images, "write_image", None)
    assert run(out, pictures)[0]["n_written"] == 0


def test_an_interrupted_run_goes_on(pictures, tmp_path):
    out = tmp_path / "out"
    write(pictures, [f"cat/{i}.png" for i in range(100, 200)])

    def interrupting(made, **_):
        for index, result in enumerate(made):
            if index == 2:
                raise KeyboardInterrupt
            yield result

    with pytest.raises(KeyboardInterrupt):
        run(out, pictures, words=("gray",), progress=interrupting)
    done = len(written(out))
    assert 2 <= done < 103
    summary, _ = run(out, pictures, words=("gray",))
    assert (summary["n_written"], summary["n_kept"]) == (103 - done, done)


def test_a_flat_folder_and_images_of_their_own_size(tmp_path):
    folder = write(tmp_path / "photos", ["a.jpg", "b.b.PNG"])
    write(folder, ["c.png"], size=(12, 40))
    (folder / ".cache").mkdir()
    summary, _ = run(tmp_path / "out", folder, image_size=0, words=("blur1", "shuffle2"))
    assert summary["n_written"] == 6
    assert sorted(path.name for path in (tmp_path / "out" / "blur1").iterdir()) == [
        "a.png", "b.b.png", "c.png",
    ]  # fmt: skip
    assert images.read_size(tmp_path / "out" / "shuffle2" / "c.png") == (40, 12)
    assert (tmp_path / "out" / "sheet.png").exists()


def test_damaged_images_are_left_out_or_stop_the_run(pictures, tmp_path, caplog):
    (pictures / "cat" / "1.png").write_bytes(b"torn")
    with caplog.at_level("WARNING", logger="absl"):
        summary, lines = run(tmp_path / "out", pictures)
    assert list(summary["damaged"]) == ["cat/1.png"]
    assert "1.png: not an image" in summary["damaged"]["cat/1.png"]
    assert "1.png: not an image that Pillow can read; left out" in caplog.text
    assert lines[-1] == "8 files written, 0 were there, 1 of 3 images left out"
    assert len(written(tmp_path / "out")) == 8
    with pytest.raises(ValueError, match=r"cat/1\.png: not an image"):
        run(tmp_path / "strict", pictures, strict=True)
    for name in ("cat/2.jpg", "dog/1.png"):
        (pictures / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"val: none of 3 images can be read"):
        run(tmp_path / "none", pictures)


def test_a_write_that_fails_is_no_damaged_image(pictures, tmp_path):
    out = tmp_path / "out"
    run(out, pictures, words=("gray",))
    (out / "gray" / "dog" / "1.png").unlink()
    (out / "gray" / "dog").rmdir()
    (out / "gray" / "dog").write_text("in the way")
    with pytest.raises(OSError, match="dog"):
        run(out, pictures, words=("gray",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"words": ("blurry",)}, "unknown suppression 'blurry'; expected gray, blur<sigma"),
        ({"words": ("blur1", "blur1.0")}, "each once"),
        ({"words": ()}, "expected some"),
        ({"words": ("shuffle3",)}, "3 x 3 tiles do not divide 16 x 16 pixels; .* 1, 2, 4, 8, 16"),
        ({"image_size": -1}, "image_size=-1: expected pixels, or 0"),
        ({"source": "missing"}, "missing: no such folder; expected one with <class>/<image>"),
        ({"source": "empty"}, "empty: no folders of images; expected <class>/<image>"),
    ],
)
def test_bad_settings(pictures, tmp_path, changes, message):
    (tmp_path / "empty").mkdir()
    source = tmp_path / changes.get("source", "val")
    changes = {name: value for name, value in changes.items() if name != "source"}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(tmp_path / "out", source, **changes)
    assert not (tmp_path / "out").exists(), "the corrected command may have the folder"


def test_tiles_that_do_not_divide_one_image_are_said_with_its_name(pictures, tmp_path):
    with pytest.raises(ValueError, match=r"cat/1\.png: 4 x 4 tiles do not divide 30 x 20 pixels"):
        run(tmp_path / "out", pictures, image_size=0)


def test_names_that_would_collide_and_other_images_are_refused(pictures, tmp_path):
    run(tmp_path / "out", pictures)
    write(pictures, ["dog/new.png"])
    with pytest.raises(ValueError, match=r"made from 3 images, .*val now has 4"):
        run(tmp_path / "out", pictures)
    with pytest.raises(ValueError, match=r"holds another run \(seed was 3, now 4\)"):
        run(tmp_path / "out", pictures, seed=4)
    write(pictures, ["dog/1.jpg"])
    with pytest.raises(ValueError, match=r"dog/1\.jpg and dog/1\.png would share"):
        run(tmp_path / "other", pictures)


def test_script(pictures, tmp_path):
    def script(*arguments):
        return subprocess.run(
            [sys.executable, "scripts/suppress_cues.py", *arguments],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )

    out = tmp_path / "out"
    (pictures / "cat" / "1.png").write_bytes(b"torn")
    arguments = [f"--input={pictures}", f"--output_dir={out}", "--suppress=gray,shuffle2"]
    done = script(*arguments, "--image_size=16")
    assert done.returncode == 0, done.stderr
    assert "1.png: not an image that Pillow can read; left out" in done.stderr
    assert done.stdout.splitlines()[1:] == [
        "4 files written, 0 were there, 1 of 3 images left out",
        f"written to {out}: a folder a word, sheet.png, summary.json",
    ]
    assert len(written(out)) == 4
    refused = script(*arguments, "--image_size=15")
    assert refused.returncode == 2
    assert refused.stderr == (
        "error: 2 x 2 tiles do not divide 15 x 15 pixels; tiles a side can be 1, 3, 5, 15\n"
    )
