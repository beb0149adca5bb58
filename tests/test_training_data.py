import zipfile

import numpy as np
import pytest
from PIL import Image

from topk_jax import images
from topk_jax.training.data import find_datasets, make_augmentation
from topk_jax.training.settings import Data


def write_classes(folder, *, classes=("ant", "bee", "cow"), count=6, side=40):
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (side, side + 9, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


@pytest.fixture
def folder(tmp_path):
    for part in ("train", "val"):
        write_classes(tmp_path / "set" / part)
    return tmp_path / "set"


def data(path, **fields):
    return Data(**({"path": str(path), "image_size": 16, "resize_size": 20} | fields))


@pytest.mark.parametrize("in_memory", [False, True])
def test_folders(folder, in_memory):
    found = find_datasets(data(folder, in_memory=in_memory, suppressed=("gray", "blur2")))
    assert found.classes == ("ant", "bee", "cow")
    assert list(found.validation) == ["clean", "gray", "blur2"]
    assert len(found.training()) == 18
    assert found.training().load(0).shape == (40, 49, 3)
    clean, gray = (found.validation[name].load(7) for name in ("clean", "gray"))
    original = images.read_image(folder / "val" / "bee" / "1.png")
    resized = images.center_crop(images.resize_short_side(original, 20), 16)
    np.testing.assert_array_equal(clean, resized)
    np.testing.assert_array_equal(gray[..., 0], np.asarray(Image.fromarray(clean).convert("L")))
    assert found.cue_conflict is None


def test_some_classes_in_an_order(folder):
    found = find_datasets(data(folder, classes=("cow", "ant")))
    assert found.classes == ("cow", "ant")
    training = found.training()
    assert training.labels.tolist() == [0] * 6 + [1] * 6
    assert training.image_names[0].startswith("cow")


def test_archives_are_folders(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, path.relative_to(folder))
    with zipfile.ZipFile(tmp_path / "test.zip", "w") as archive:
        for path in sorted((folder / "val").rglob("*.png")):
            archive.write(path, f"test/{path.relative_to(folder / 'val')}")
    plain = find_datasets(data(folder))
    for validation in ("val", "test.zip:test"):
        zipped = find_datasets(data(tmp_path / "all.zip", source="zip", validation=validation))
        assert zipped.classes == plain.classes
        for a, b in (
            (plain.training(), zipped.training()),
            (plain.validation["clean"], zipped.validation["clean"]),
        ):
            assert len(a) == len(b)
            np.testing.assert_array_equal(a.load(11), b.load(11))
    further = data(folder, further={"zipped": f"{tmp_path / 'test.zip'}:test", "none": ""})
    assert list(find_datasets(further).validation) == ["clean", "zipped"]


def test_a_long_tail_is_cut_from_the_training_set_alone(folder):
    found = find_datasets(data(folder, long_tail=4.0))
    assert np.bincount(found.training().labels).tolist() == [6, 3, 1]  # int(6 * 4 ** (-c / 2))
    assert len(found.validation["clean"]) == 18


def test_drawn_images():
    settings = Data(
        source="builtin", builtin_images=32, builtin_test_per_category=1, cue_conflict="builtin",
        mapping="identity",
    )  # fmt: skip
    found = find_datasets(settings, seed=3)
    assert list(found.validation) == ["congruent", "silhouette", "texture"]
    assert found.training().labels.tolist() == [*range(16), *range(16)]
    assert len(found.cue_conflict) == 1280
    assert found.mapping.names == found.classes
    other = find_datasets(settings, seed=4)
    assert np.any(found.training().load(0) != other.training().load(0))


def test_what_does_not_fit_together_is_named(folder, tmp_path):
    write_classes(tmp_path / "other", classes=("ant", "bee", "dog"))
    with pytest.raises(ValueError, match="dog"):
        find_datasets(data(folder, further={"other": str(tmp_path / "other")}))
    with pytest.raises(ValueError, match="blurry"):
        find_datasets(data(folder, suppressed=("blurry",)))
    with pytest.raises(OSError, match="validation"):
        find_datasets(data(folder, validation="validation"))
    with pytest.raises((OSError, ValueError), match=r"all\.zip"):
        find_datasets(data(tmp_path / "all.zip", source="zip"))


def test_augmentation_is_what_the_config_says():
    found = make_augmentation(Data(crop="padded", padding=2, flip=False, image_size=32))
    assert (found.crop, found.padding, found.flip, found.size) == ("padded", 2, False, 32)
