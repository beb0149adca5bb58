import importlib.machinery
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from topk_jax.stimuli import imagenet

# Imagenette's classes and their numbers among ImageNet's.
IMAGENETTE = {
    "n01440764": 0,
    "n02102040": 217,
    "n02979186": 482,
    "n03000684": 491,
    "n03028079": 497,
    "n03394916": 566,
    "n03417042": 569,
    "n03425413": 571,
    "n03445777": 574,
    "n03888257": 701,
}


def write(path: pathlib.Path, color=(10, 20, 30), size=(6, 4)) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def test_wnids_are_the_classes_in_their_usual_order():
    wnids = imagenet.imagenet_wnids()
    assert len(wnids) == len(set(wnids)) == 1000
    assert list(wnids) == sorted(wnids)
    assert {wnid: wnids.index(wnid) for wnid in IMAGENETTE} == IMAGENETTE
    assert (wnids[207], wnids[999]) == ("n02099601", "n15075141")  # golden retriever, toilet tissue


def test_the_list_is_found_without_importing_tensorflow_datasets():
    code = (
        "import sys; from topk_jax.stimuli import imagenet; imagenet.imagenet_wnids();"
        "sys.exit('tensorflow_datasets' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def found(monkeypatch, folder):
    spec = None
    if folder is not None:
        spec = importlib.machinery.ModuleSpec("tensorflow_datasets", None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(imagenet.importlib.util, "find_spec", lambda name: spec)


def test_a_missing_list_is_told_with_the_package_that_brings_it(monkeypatch, tmp_path):
    for folder in (None, tmp_path):
        found(monkeypatch, folder)
        with pytest.raises(FileNotFoundError, match="pip install tensorflow-datasets"):
            imagenet.imagenet_wnids()


def test_a_list_of_another_length_is_refused(monkeypatch, tmp_path):
    path = tmp_path / "datasets" / "imagenet2012" / "labels.txt"
    path.parent.mkdir(parents=True)
    path.write_text("n01440764\nn01443537\n")
    found(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match=r"labels.txt: 2 names, expected 1000"):
        imagenet.imagenet_wnids()


def test_any_part_of_the_classes_is_read_sorted(tmp_path):
    write(tmp_path / "n03888257" / "b.png", color=(1, 2, 3))
    write(tmp_path / "n03888257" / "a.JPEG")
    write(tmp_path / "n01440764" / "b.png", color=(4, 5, 6))
    write(tmp_path / "n01440764" / ".hidden.png")
    (tmp_path / "n01440764" / "notes.txt").write_text("not an image")
    (tmp_path / "README").write_text("beside the folders")
    (tmp_path / ".cache").mkdir()
    stimuli = imagenet.read_class_folders(tmp_path)
    assert stimuli.image_names == ("n01440764/b.png", "n03888257/a.JPEG", "n03888257/b.png")
    assert stimuli.category == ("n01440764", "n03888257", "n03888257")
    assert len(stimuli.categories) == 1000
    assert stimuli.categories[0] == "n01440764"
    assert stimuli.condition == ("NaN",) * 3
    assert (stimuli.name, stimuli.origin) == ("imagenet", str(tmp_path))
    np.testing.assert_array_equal(stimuli.load(0), np.full((4, 6, 3), (4, 5, 6), np.uint8))
    np.testing.assert_array_equal(stimuli.load(2), np.full((4, 6, 3), (1, 2, 3), np.uint8))


def test_a_folder_that_is_no_class_is_named_with_an_example(tmp_path):
    write(tmp_path / "n01440764" / "a.png")
    write(tmp_path / "tench" / "a.png")
    with pytest.raises(ValueError, match=r"/tench: no class .* for example n01440764/") as error:
        imagenet.read_class_folders(tmp_path)
    assert "did you mean" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mistyped_class_gets_the_nearest(tmp_path):
    write(tmp_path / "n0144076" / "a.png")
    with pytest.raises(ValueError, match=r"did you mean n01440764\?"):
        imagenet.read_class_folders(tmp_path)


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no folders of images"):
        imagenet.read_class_folders(tmp_path)
    write(tmp_path / "n01440764" / "images" / "a.png")
    with pytest.raises(ValueError, match=r"n01440764: no images; expected <WordNet id>/<image>"):
        imagenet.read_class_folders(tmp_path)
    with pytest.raises(FileNotFoundError):
        imagenet.read_class_folders(tmp_path / "missing")


def test_a_file_that_is_no_image_is_found_before_anything_runs(tmp_path):
    write(tmp_path / "n01440764" / "a.png")
    (tmp_path / "n01440764" / "b.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"b\.jpg: .*an empty file"):
        imagenet.read_class_folders(tmp_path)


@pytest.mark.real
def test_the_real_validation_pictures(shared):
    stimuli = imagenet.read_class_folders(shared / "images" / "imagenet_val")
    assert len(stimuli) == 250
    assert set(stimuli.category) == set(IMAGENETTE)
    assert stimuli.load(0).dtype == np.uint8
