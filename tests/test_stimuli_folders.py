"""Class folders on the disk and in zip archives."""

import concurrent.futures
import io
import pathlib
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image

from topk_jax import images
from topk_jax.stimuli import (
    Stimuli,
    check_same_classes,
    folders,
    read_image_folder,
    read_image_zip,
)

FILES = ["cat/b.png", "cat/a.JPG", "dog/b.png", "dog/10.png", "dog/9.png", "emu/x.png"]


def encoded(level: int, suffix: str = "png", size=(5, 4)) -> bytes:
    data = io.BytesIO()
    kind = {"png": "PNG", "jpg": "JPEG"}[suffix.lower()]
    Image.new("RGB", size, (level, level, level)).save(data, kind)
    return data.getvalue()


def write(folder: pathlib.Path, names=FILES) -> pathlib.Path:
    """Images whose grey level is ten times their place in the list."""
    for level, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(10 * level, path.suffix[1:]))
    return folder


def pack(path, names=FILES, *, compression=zipfile.ZIP_STORED, prefix="", extra=()):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for level, name in enumerate(names):
            archive.writestr(prefix + name, encoded(10 * level, name.rpartition(".")[2]))
        for name, data in extra:
            archive.writestr(name, data)
    return path


def levels(stimuli):
    return [int(stimuli.load(index)[0, 0, 0]) for index in range(len(stimuli))]


EXPECTED = ("cat/a.JPG", "cat/b.png", "dog/10.png", "dog/9.png", "dog/b.png", "emu/x.png")


# --- folders -------------------------------------------------------------------------------------


def test_all_classes_sorted(tmp_path):
    folder = write(tmp_path / "größe 1")
    for other in (".DS_Store", "cat/._b.png", "cat/notes.txt", ".git/config", "README.png"):
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_text("x")
    (folder / "dog" / "more").mkdir()
    stimuli = read_image_folder(str(folder))
    assert stimuli.image_names == EXPECTED
    assert stimuli.categories == ("cat", "dog", "emu")
    assert stimuli.category == ("cat", "cat", "dog", "dog", "dog", "emu")
    assert stimuli.labels.tolist() == [0, 0, 1, 1, 1, 2]
    assert stimuli.labels.dtype == np.int32
    assert stimuli.condition == ("NaN",) * 6
    assert (stimuli.name, stimuli.origin) == ("größe 1", str(folder))
    assert levels(stimuli) == [10, 0, 30, 40, 20, 50]
    assert stimuli.load(0).shape == (4, 5, 3)


def test_a_list_of_classes_chooses_and_orders(tmp_path):
    stimuli = read_image_folder(write(tmp_path), classes=["emu", "cat"], name="birds first")
    assert stimuli.categories == ("emu", "cat")
    assert stimuli.image_names == ("emu/x.png", "cat/a.JPG", "cat/b.png")
    assert stimuli.labels.tolist() == [0, 1, 1]
    assert levels(stimuli) == [50, 10, 0]
    assert stimuli.name == "birds first"


def test_the_name_of_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path / "val"))
    assert read_image_folder(".").name == "val"


def test_images_are_looked_at_only_when_loaded(tmp_path):
    write(tmp_path)
    (tmp_path / "cat" / "b.png").write_bytes(b"torn")
    stimuli = read_image_folder(tmp_path)
    assert len(stimuli) == 6
    with pytest.raises(ValueError, match=r"cat/b\.png: not an image"):
        stimuli.load(1)
    (tmp_path / "dog" / "10.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"dog/10\.png"):
        stimuli.load(2)


def test_folder_errors_name_the_path_and_what_would_be_right(tmp_path):
    def refused(error, message, folder=tmp_path, **options):
        with pytest.raises(error, match=message) as caught:
            read_image_folder(folder, **options)
        assert "\n" not in str(caught.value)

    refused(FileNotFoundError, r"/missing: no such folder; .*<class>/", tmp_path / "missing")
    refused(ValueError, "no folders of images; expected <class>/<image>")
    write(tmp_path)
    refused(NotADirectoryError, r"b\.png: a file; expected a folder", tmp_path / "cat" / "b.png")
    refused(
        ValueError,
        r"no class dogg, horse \(did you mean dog\?\); it has cat, dog, emu",
        classes=("cat", "dogg", "horse"),
    )
    refused(ValueError, r"classes='cat': expected a list", classes="cat")
    refused(ValueError, r"classes=\[\]: expected a list", classes=[])
    refused(ValueError, "category 'cat' is there twice", classes=["cat", "cat"])
    (tmp_path / "fox").mkdir()
    refused(ValueError, "/fox: no images; expected <class>/<image>, for example cat/1.jpg$")
    assert len(read_image_folder(tmp_path, classes=["dog"])) == 3, "fox is not used"
    refused(ValueError, "it has folders, so perhaps it is the one to read", tmp_path.parent)


def test_many_missing_classes_are_not_all_listed(tmp_path):
    with pytest.raises(ValueError, match=r"c9 and 10 more|c9, and 10 more") as caught:
        read_image_folder(write(tmp_path), classes=[f"c{i}" for i in range(20)])
    assert "c15" not in str(caught.value)


# --- zip archives --------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("prefix", ["", "train/", "data/small/train/"])
def test_zip_is_what_the_folder_is(tmp_path, compression, prefix):
    extra = [
        ("__MACOSX/cat/b.png", b"x"),
        (f"{prefix}cat/._b.png", b"x"),
        (f"{prefix}cat/notes.txt", b"x"),
        (f"{prefix}cat/deeper/a.png", b"x"),
        (f"{prefix}.git/a.png", b"x"),
        (f"{prefix}a.png", b"beside the folders"),
        ("other/cat/c.png", b"x"),
    ][: None if prefix else -1]
    path = pack(tmp_path / "set.zip", compression=compression, prefix=prefix, extra=extra)
    read = read_image_zip(str(path), folder=prefix)
    expected = read_image_folder(write(tmp_path / "folder"))
    for column in ("image_names", "categories", "category", "condition"):
        assert getattr(read, column) == getattr(expected, column)
    for index in range(len(read)):
        np.testing.assert_array_equal(read.load(index), expected.load(index))
    assert read.name == ("train" if prefix else "set")
    assert read.origin == f"{path}/{prefix}".rstrip("/")
    chosen = read_image_zip(path, folder=prefix, classes=("emu", "cat"), name="n")
    assert (chosen.categories, levels(chosen), chosen.name) == (("emu", "cat"), [50, 10, 0], "n")


def test_zip_errors_name_the_archive_and_what_would_be_right(tmp_path):
    def refused(error, message, path, **options):
        with pytest.raises(error, match=message) as caught:
            read_image_zip(path, **options)
        assert "\n" not in str(caught.value)

    path = pack(tmp_path / "set.zip", prefix="train/", extra=[("train/fox/", b"")])
    inside = r"no folders of images; expected <class>/<image>, .*; there are some with "
    refused(ValueError, rf"set\.zip/trian: {inside}folder='train'$", path, folder="trian")
    refused(ValueError, rf"set\.zip: {inside}folder='train'$", path)
    refused(ValueError, r"set\.zip/train/fox: no images", path, folder="train")
    refused(ValueError, r"set\.zip/train: no class bat \(did you mean cat\?\); it has cat, dog",
            path, folder="train", classes=["bat"])  # fmt: skip
    refused(FileNotFoundError, r"none\.zip", tmp_path / "none.zip")
    torn = tmp_path / "torn.zip"
    torn.write_bytes(path.read_bytes()[:-40])
    refused(ValueError, r"torn\.zip: damaged or not a zip archive", torn)
    torn.write_bytes(b"")
    refused(ValueError, r"torn\.zip: damaged or not a zip archive", torn)
    empty = pack(tmp_path / "empty.zip", names=[])
    refused(ValueError, r"empty\.zip: no folders of images; expected <class>/<image>, for .*jpg$",
            empty)  # fmt: skip


def test_damaged_members_are_met_when_loaded(tmp_path):
    path = pack(tmp_path / "set.zip", extra=[("cat/z.png", b"no image")])
    content = bytearray(path.read_bytes())
    content[content.index(encoded(20)) + 40] ^= 255  # dog/b.png, which its CRC tells
    path.write_bytes(content)
    stimuli = read_image_zip(path)
    with pytest.raises(ValueError, match=r"set\.zip/cat/z\.png: not an image"):
        stimuli.load(stimuli.image_names.index("cat/z.png"))
    with pytest.raises(ValueError, match=r"set\.zip/dog/b\.png: cannot be unpacked: .*CRC"):
        stimuli.load(stimuli.image_names.index("dog/b.png"))
    assert levels(stimuli.select([0, 1])) == [10, 0]


def test_members_that_cannot_or_should_not_be_unpacked(tmp_path, monkeypatch):
    path = pack(tmp_path / "set.zip")
    content = bytearray(path.read_bytes())
    place = 0
    while (place := content.find(b"PK\x01\x02", place + 1)) > 0:
        content[place + 8] |= 1  # the flag of encryption, in every entry of the directory
    (tmp_path / "locked.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"cat/a\.JPG: cannot be unpacked: .*(encrypted|password)"):
        read_image_zip(tmp_path / "locked.zip").load(0)
    rare = pack(tmp_path / "rare.zip", compression=zipfile.ZIP_BZIP2)
    with pytest.raises(ValueError, match=r"a\.JPG: cannot be unpacked: .*stored or deflated"):
        read_image_zip(rare).load(0)
    monkeypatch.setattr(folders, "_LARGEST_MEMBER", 10)
    with pytest.raises(ValueError, match=r"a\.JPG: cannot be unpacked: it unpacks to \d+ bytes"):
        read_image_zip(path).load(0)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_is_read_from_many_threads(tmp_path, compression):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (60, 40, 40, 3), dtype=np.uint8)
    with zipfile.ZipFile(tmp_path / "set.zip", "w", compression) as archive:
        for i, picture in enumerate(pictures):
            data = io.BytesIO()
            Image.fromarray(picture).save(data, "PNG")
            archive.writestr(f"all/{i:03}.png", data.getvalue())
    stimuli = read_image_zip(tmp_path / "set.zip")
    start = threading.Barrier(8)

    def read(seed):
        start.wait()
        order = np.random.default_rng(seed).permutation(len(pictures)).tolist() * 3
        return all(np.array_equal(stimuli.load(i), pictures[i]) for i in order)

    with concurrent.futures.ThreadPoolExecutor(8) as executor:
        assert all(executor.map(read, range(8)))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archives_with_wrong_bytes_raise_nothing_else(tmp_path, compression):
    whole = pack(tmp_path / "set.zip", names=FILES[:3], compression=compression).read_bytes()
    path, rng, refused = tmp_path / "torn.zip", np.random.default_rng(0), 0
    for round_ in range(150):
        content = bytearray(whole)
        for place in rng.integers(0, len(content), 2):
            content[place] = rng.integers(0, 256)
        path.write_bytes(content if round_ % 5 else content[: rng.integers(0, len(content))])
        try:
            levels(read_image_zip(path))
        except (ValueError, OSError) as error:
            refused += "torn.zip" in str(error)
        else:
            refused += 1  # bytes that matter to nobody
    assert refused == 150, "every error names the archive"


# --- bytes, categories ---------------------------------------------------------------------------


def test_bytes_are_decoded_as_files_are(tmp_path):
    image = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, options in (("a.png", {}), ("b.jpg", {"exif": exif}), ("c.tif", {})):
        image.save(tmp_path / name, **options)
        data = (tmp_path / name).read_bytes()
        decoded = images.decode_image(data, name="x")
        np.testing.assert_array_equal(decoded, images.read_image(tmp_path / name))
        assert decoded.flags.writeable
    torn = (tmp_path / "a.png").read_bytes()[:45]
    for bad, message in ((b"", "an empty file"), (b"text", "not an image"), (torn, "damaged")):
        with pytest.raises(ValueError, match=f"^set.zip/a.png: .*{message}"):
            images.decode_image(bad, name="set.zip/a.png")


def of_classes(*categories, name="train"):
    return Stimuli(
        name=name,
        categories=categories,
        image_names=categories,
        category=categories,
        condition=("NaN",) * len(categories),
        load=lambda index: np.zeros((1, 1, 3), np.uint8),
        origin=f"data/{name}",
    )


def test_classes_that_differ_are_named_on_either_side():
    train = of_classes("a", "b", "c")
    check_same_classes()
    check_same_classes(train)
    check_same_classes(train, of_classes("a", "b", "c", name="val"), train)
    with pytest.raises(
        ValueError,
        match=r"^train \(data/train\) and val \(data/val\) .*: b, c only in train; d only in val$",
    ):
        check_same_classes(train, train, of_classes("a", "d", name="val"))
    with pytest.raises(ValueError, match=r"different classes: c only in train$"):
        check_same_classes(train, of_classes("a", "b", name="val"))
    with pytest.raises(ValueError, match=r"another order \(class 1 is b and c\)"):
        check_same_classes(train, of_classes("a", "c", "b", name="val"))


@pytest.mark.real
def test_cifar10_in_its_zip(shared):
    stimuli = read_image_zip(shared / "images" / "cifar10_test.zip", folder="test")
    assert len(stimuli) == 10_000
    assert np.bincount(stimuli.labels).tolist() == [1000] * 10
    assert stimuli.categories[:3] == ("airplane", "automobile", "bird")
    assert stimuli.load(9_999).shape == (32, 32, 3)
