"""Arrays as stimuli, and stimuli kept decoded."""

import itertools
import pathlib
import threading

import numpy as np
import pytest
from PIL import Image

from topk_jax.stimuli import from_arrays, in_memory, read_image_folder


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (12, 4, 5, 3), dtype=np.uint8)


LABELS = np.array([2, 0, 1, 1, 2, 0, 0, 0, 2, 1, 0, 2])


def test_arrays_are_stimuli(pixels):
    stimuli = from_arrays(pixels, LABELS.astype(np.uint8), ["a", "b", "c", "unused"], name="set")
    assert stimuli.categories == ("a", "b", "c", "unused")
    assert stimuli.labels.tolist() == LABELS.tolist()
    assert stimuli.image_names[:3] == ("c/00", "a/01", "b/02")
    assert (stimuli.name, stimuli.origin) == ("set", "12 images in memory")
    for index, picture in enumerate(pixels):
        np.testing.assert_array_equal(stimuli.load(index), picture)
    stimuli.load(3)[:] = 0
    assert pixels[3].any(), "the caller has a copy"
    assert len(from_arrays(pixels[:0], LABELS[:0], ["a"], name="none")) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixels": np.zeros((12, 4, 5, 3), np.float32)}, r"pixels of float32 \[12, 4, 5, 3\]"),
        ({"pixels": np.zeros((12, 4, 5), np.uint8)}, r"expected uint8 \[n, height, width, 3\]"),
        ({"pixels": np.zeros((12, 3, 4, 5), np.uint8)}, "expected uint8"),
        ({"labels": LABELS[:-1]}, r"labels of int64 \[11\] for 12 images"),
        ({"labels": LABELS.astype(np.float32)}, "labels of float32"),
        ({"labels": LABELS[:, None]}, r"labels of int64 \[12, 1\]"),
        ({"labels": LABELS + 1}, "labels from 1 to 3 for 3 categories; expected 0 to 2"),
        ({"labels": LABELS - 1}, "labels from -1 to 1"),
        ({"categories": ["a", "b", "a"]}, "category 'a' is there twice"),
        ({"categories": "abc"}, "categories='abc': expected a list"),
    ],
)
def test_arrays_are_checked(pixels, changes, message):
    given = {"pixels": pixels, "labels": LABELS, "categories": ["a", "b", "c"]} | changes
    with pytest.raises(ValueError, match=message):
        from_arrays(*given.values(), name="set")


def folder_of(path: pathlib.Path, sizes) -> pathlib.Path:
    (path / "cat").mkdir(parents=True)
    for level, size in enumerate(sizes):
        Image.new("RGB", size, (level, 0, 0)).save(path / "cat" / f"{level}.png")
    return path


@pytest.mark.parametrize("sizes", [[(4, 4)] * 5, [(4, 4), (4, 4), (6, 5), (4, 4), (4, 4)]])
def test_in_memory_needs_no_files(tmp_path, sizes):
    folder = folder_of(tmp_path / "set", sizes)
    seen = []
    stimuli = in_memory(
        read_image_folder(folder), progress=lambda items: (seen.append(0) or item for item in items)
    )
    assert len(seen) == 5
    folder.rename(tmp_path / "away")
    expected = read_image_folder(tmp_path / "away")
    assert stimuli.image_names == expected.image_names
    for index in range(5):
        np.testing.assert_array_equal(stimuli.load(index), expected.load(index))
    stimuli.load(0)[:] = 9
    assert not stimuli.load(0).any()


def test_in_memory_raises_again_what_loading_raised(tmp_path):
    folder = folder_of(tmp_path / "set", [(4, 4)] * 4)
    (folder / "cat" / "1.png").write_bytes(b"torn")
    lazy = read_image_folder(folder)
    (folder / "cat" / "2.png").unlink()
    stimuli = in_memory(lazy)
    caught = []
    for _ in range(2):
        with pytest.raises(ValueError, match=r"1\.png: not an image") as damaged:
            stimuli.load(1)
        with pytest.raises(FileNotFoundError, match=r"No such file.*2\.png") as missing:
            stimuli.load(2)
        caught += [damaged.value, missing.value]
    assert caught[0] is not caught[2], "each with a traceback of its own"
    assert caught[3].filename == str(folder / "cat" / "2.png")
    assert stimuli.load(3)[0, 0, 0] == 3


def test_in_memory_loads_in_parallel():
    gate = threading.Barrier(2)
    stimuli = from_arrays(
        np.zeros((2, 1, 1, 3), np.uint8), np.zeros(2, np.int64), ["a"], name="set"
    )
    calls = itertools.count()

    def load(index):
        next(calls)
        gate.wait(timeout=20)
        return np.full((1, 1, 3), index, np.uint8)

    import dataclasses

    kept = in_memory(dataclasses.replace(stimuli, load=load))
    assert kept.load(1)[0, 0, 0] == 1
    assert next(calls) == 2
