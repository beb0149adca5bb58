import collections
import csv
import gzip
import io
import itertools
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image

from topk_jax import download, stimuli
from topk_jax.stimuli import cue_conflict


def write(folder, names, size=(4, 5)):
    """Writes small images whose grey level is their place in the list."""
    for level, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size[::-1], (level, level, level)).save(path)
    return folder


NAMES = ["cat/cat2-dog1.png", "cat/cat10-cat3.png", "dog/dog1-cat2.bmp", "dog/dog1-dog1.gif"]


def test_order_columns_and_images(tmp_path):
    folder = write(tmp_path / "größe 1", NAMES)
    for hidden in (".DS_Store", "cat/._cat2-dog1.png", ".git/config"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        (folder / hidden).write_text("x")
    (folder / "LICENSE").write_text("beside the folders")
    read = stimuli.read_cue_conflict(str(folder))
    assert read.name == "cue-conflict"
    assert read.categories == ("cat", "dog")
    # Sorted as text: "cat10" before "cat2".
    assert read.image_names == (
        "cat10-cat3.png",
        "cat2-dog1.png",
        "dog1-cat2.bmp",
        "dog1-dog1.gif",
    )
    assert read.category == ("cat", "cat", "dog", "dog")
    assert read.condition == ("NaN",) * 4
    assert read.origin == str(folder)
    assert len(read) == 4
    assert [int(read.load(index)[0, 0, 0]) for index in range(4)] == [1, 0, 2, 3]
    assert read.load(0).shape == (4, 5, 3)


def test_given_categories(tmp_path):
    write(tmp_path, NAMES)
    read = stimuli.read_cue_conflict(tmp_path, categories=("dog", "cat", "bird"))
    assert read.categories == ("dog", "cat", "bird")
    with pytest.raises(ValueError, match=r"dog: unknown shape category 'dog'.*known are cat, bird"):
        stimuli.read_cue_conflict(tmp_path, categories=["cat", "bird"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cat/kitten.png", r"kitten\.png: .*not the name of a cue-conflict image"),
        ("cat/cat-dog1.png", r"cat-dog1\.png: .*not the name"),
        ("cat/dog1-cat1.png", r"dog1-cat1\.png: the name says 'dog', the folder 'cat'"),
        (
            "cat/cat1-doge2.png",
            r"cat1-doge2\.png: unknown texture category 'doge' \(did you mean 'd",
        ),
        (
            "cat/cat1-xyz2.png",
            r"cat1-xyz2\.png: unknown texture category 'xyz'; known are cat, dog",
        ),
        ("cat/session-1/cat1-dog1.png", r"session-1: a folder where images were expected: <shape>"),
    ],
)
def test_bad_names_and_layouts(tmp_path, name, message):
    write(tmp_path, [*NAMES, name])
    with pytest.raises(ValueError, match=message) as caught:
        stimuli.read_cue_conflict(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "an empty file"), (b"no image", "not an image"), (None, "No such file")],
)
def test_bad_files_are_found_before_anything_is_shown(tmp_path, content, message):
    write(tmp_path, NAMES)
    bad = tmp_path / "dog" / "dog3-cat1.png"
    if content is None:
        bad.symlink_to(tmp_path / "gone")
    else:
        bad.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        stimuli.read_cue_conflict(tmp_path)
    assert str(bad) in str(caught.value)


def test_an_image_damaged_behind_its_header_is_named_when_loaded(tmp_path):
    write(tmp_path, NAMES)
    path = tmp_path / "cat" / "cat1-dog1.png"
    Image.effect_noise((60, 60), 50).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:900])
    read = stimuli.read_cue_conflict(tmp_path)
    index = read.image_names.index("cat1-dog1.png")
    with pytest.raises(ValueError, match=r"cat1-dog1\.png: damaged"):
        read.load(index)


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(ValueError, match="no folders of images; expected <shape>/"):
        stimuli.read_cue_conflict(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="no folders of images"):
        stimuli.read_cue_conflict(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing"):
        stimuli.read_cue_conflict(tmp_path / "missing")
    with pytest.raises(NotADirectoryError, match=r"a\.png"):
        stimuli.read_cue_conflict(tmp_path / "a.png")
    write(tmp_path, NAMES)
    (tmp_path / "bird").mkdir()
    with pytest.raises(ValueError, match="bird: no images"):
        stimuli.read_cue_conflict(tmp_path)


# --- Stimuli -------------------------------------------------------------------------------------


def five(**changes):
    columns = {
        "name": "numbers",
        "categories": ("even", "odd"),
        "image_names": ("a", "b", "c", "d", "e"),
        "category": ("even", "odd", "even", "odd", "even"),
        "condition": ("0", "1", "2", "3", "4"),
        "load": lambda index: np.full((1, 1, 3), index, np.uint8),
        "origin": "here",
    }
    return stimuli.Stimuli(**(columns | changes))


def test_select():
    chosen = five().select([3, 0, -1])
    assert chosen.image_names == ("d", "a", "e")
    assert chosen.category == ("odd", "even", "even")
    assert chosen.condition == ("3", "0", "4")
    assert [int(chosen.load(index)[0, 0, 0]) for index in range(3)] == [3, 0, 4]
    assert chosen.origin == "here (3 of 5)"
    again = chosen.select(np.array([False, True, True]))
    assert again.image_names == ("a", "e")
    assert int(again.load(1)[0, 0, 0]) == 4
    assert len(five().select([])) == 0
    assert five().select(range(5)).origin == "here"


def test_select_refuses():
    with pytest.raises(IndexError):
        five().select([5])
    with pytest.raises(IndexError):
        five().select(np.array([True]))
    with pytest.raises(ValueError, match="a is there twice"):
        five().select([0, 0])
    with pytest.raises(ValueError, match="expected a list of whole numbers"):
        five().select([0.5])
    with pytest.raises(ValueError, match="expected a list of whole numbers"):
        five().select(2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"category": ("even",)}, "5 images, 1 categories and 5 conditions"),
        ({"condition": ()}, "5 images, 5 categories and 0 conditions"),
        ({"categories": ("even",)}, "image b is of category 'odd'; known are even"),
        ({"image_names": ("a", "b", "a", "d", "e")}, "image a is there twice"),
    ],
)
def test_stimuli_refuse_columns_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        five(**changes)


# --- download ------------------------------------------------------------------------------------

SHAPES = [chr(ord("a") + index) * 3 for index in range(16)]


def png(size):
    data = io.BytesIO()
    Image.new("RGB", (size, size)).save(data, "PNG")
    return data.getvalue()


def real_names():
    """1,280 names: each shape has 10 pictures, each pair of shape and texture 5."""
    counter = itertools.count()
    return [
        f"{shape}/{shape}{next(counter) % 10 + 1}-{texture}{picture}.png"
        for shape, texture, picture in itertools.product(SHAPES, SHAPES, range(1, 6))
    ]


def archive(path, names, content, *, root="cue-conflict/", extra=()):
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name in names:
            member = tarfile.TarInfo(root + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in extra:
            tar.addfile(member)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("TOPK_JAX_CACHE", str(folder))
    return folder


@pytest.fixture
def fetched(cache, monkeypatch):
    """Puts an archive in the place of the download; gives its path and the addresses asked for."""
    asked = []

    def fetch(url, *, filename, **_):
        asked.append(url)
        return cache / filename

    monkeypatch.setattr(download, "fetch", fetch)
    return cache / "cue-conflict.tar.gz", asked


def test_download_unpacks_once(fetched, cache):
    path, asked = fetched
    junk = tarfile.TarInfo("cue-conflict/aaa/._aaa1-bbb1.png")
    archive(path, real_names(), png(224), extra=[junk])
    folder = stimuli.download_cue_conflict()
    assert folder == cache / "cue-conflict"
    read = stimuli.read_cue_conflict(folder)
    assert len(read) == 1280
    assert set(collections.Counter(read.category).values()) == {80}
    assert stimuli.download_cue_conflict() == folder
    assert asked == [cue_conflict.URL]
    assert sorted(entry.name for entry in cache.iterdir()) == ["cue-conflict", path.name]
    # What is in the cache is checked again.
    (folder / "aaa" / read.image_names[0]).unlink()
    with pytest.raises(ValueError, match="1279 images, expected 1280; remove the folder"):
        stimuli.download_cue_conflict()


def bad_member(kind):
    member = tarfile.TarInfo("cue-conflict/aaa/aaa1-bbb1.png")
    if kind == "link":
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    elif kind == "outside":
        member.name = "../outside.png"
    elif kind == "bomb":
        member.size = 2**40
    return member


@pytest.mark.parametrize(
    ("kind", "message"),
    [("link", "neither a file nor a folder"), ("outside", "outside"), ("bomb", "more than 1 GiB")],
)
def test_hostile_archives_unpack_nothing(fetched, cache, kind, message):
    path, _ = fetched
    with gzip.open(path, "wb") as file:
        file.write(bad_member(kind).tobuf() + bytes(1024))
    with pytest.raises(ValueError, match=rf"cue-conflict\.tar\.gz: .*{message}.*remove it and put"):
        stimuli.download_cue_conflict()
    assert [entry.name for entry in cache.iterdir()] == [path.name]
    assert not (cache.parent / "outside.png").exists()


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "other folder"])
def test_damaged_archives(fetched, cache, damage):
    path, _ = fetched
    archive(path, real_names()[:30], png(8), root="other/" if damage == "other folder" else "")
    content = path.read_bytes()
    contents = {"truncated": content[: len(content) // 2], "text": b"<html>", "empty": b""}
    path.write_bytes(contents.get(damage, content))
    with pytest.raises(ValueError, match="not the archive of the cue-conflict images") as caught:
        stimuli.download_cue_conflict()
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in cache.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("change", "size", "message"),
    [
        (lambda names: names[:-1], 224, "1279 images, expected 1280"),
        (lambda names: names, 64, "expected a PNG of 224 x 224 pixels"),
        (
            lambda names: [*names[:-1], "aaa/aaa77-bbb1.png"],
            224,
            "81 images of aaa, expected 80",
        ),
        (
            lambda names: [*names[1:], "aaa/aaa77-bbb1.png"],
            224,
            "4 images of aaa with the texture of aaa, expected 5",
        ),
    ],
)
def test_archives_that_are_not_the_whole_set(fetched, cache, change, size, message):
    path, _ = fetched
    archive(path, change(real_names()), png(size))
    with pytest.raises(ValueError, match=message):
        stimuli.download_cue_conflict()
    assert not (cache / "cue-conflict").exists()


def test_full_disk_while_unpacking(fetched, cache, monkeypatch):
    path, _ = fetched
    archive(path, real_names()[:3], png(8))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "extract", full)
    with pytest.raises(OSError, match=r"No space left on device.*cue-conflict"):
        stimuli.download_cue_conflict()
    assert [entry.name for entry in cache.iterdir()] == [path.name]


def test_without_network_the_error_says_where_to_put_the_archive(cache, monkeypatch):
    monkeypatch.setattr(cue_conflict, "URL", "http://127.0.0.1:9/cue-conflict.tar.gz")
    real = download.fetch
    monkeypatch.setattr(download, "fetch", lambda url, **options: real(url, retries=0, **options))
    with pytest.raises(OSError, match=r"127\.0\.0\.1:9") as caught:
        stimuli.download_cue_conflict()
    assert str(cache / "cue-conflict.tar.gz") in str(caught.value)
    assert "\n" not in str(caught.value)


# --- the real set --------------------------------------------------------------------------------


@pytest.mark.real
def test_real_stimuli(shared):
    read = stimuli.read_cue_conflict(shared / "images" / "cue_conflict")
    assert len(read) == 256
    with open(shared / "reference" / "squeezenet1_1_decisions.csv", newline="") as file:
        expected = {row["image"] for row in csv.DictReader(file)}
    assert set(read.image_names) == expected
    assert set(collections.Counter(read.category).values()) == {16}
    assert all(map(str.startswith, read.image_names, read.category))
    folder = pathlib.Path(read.origin)
    for index, (name, category) in enumerate(zip(read.image_names, read.category, strict=True)):
        image = read.load(index)
        assert image.shape == (224, 224, 3)
        if index % 16 == 0:
            with Image.open(folder / category / name) as stored:
                np.testing.assert_array_equal(image, np.asarray(stored.convert("RGB")))
