"""Sets of tensorflow-datasets, against one that is written here as array_record."""

import pathlib
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from topk_jax import images
from topk_jax.stimuli import read_tfds

pytest.importorskip("array_record", reason="array_record has no build for this platform")

# A builder must live in a package; it runs in a process of its own, with nothing of ours.
BUILDER = '''
import io
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds


class Tiny(tfds.core.GeneratorBasedBuilder):
    """Fifteen images of three classes."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "picture": tfds.features.Image(shape=(None, None, 3)),
            "kind": tfds.features.ClassLabel(names=["zebra", "ant", "unused", "fox"]),
            "note": tfds.features.Text(),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(12), "val": self._generate_examples(3)}

    def _generate_examples(self, count):
        for i in range(count):
            data = io.BytesIO()
            Image.new("RGB", (5 + i, 4), (10 * i, 0, 0)).save(data, "PNG")
            kind = ["zebra", "ant", "fox"][i % 3]
            data = data.getvalue() if i != 7 else b"torn"
            yield i, {"picture": data, "kind": kind, "note": f"n{i}"}


class Plain(tfds.core.GeneratorBasedBuilder):
    """No images."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({"number": np.int64})
        )

    def _split_generators(self, dl_manager):
        return {"train": iter([(0, {"number": 1})])}

    def _generate_examples(self):
        yield from ()
'''


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> pathlib.Path:
    code, data = tmp_path_factory.mktemp("code"), tmp_path_factory.mktemp("tfds")
    package = code / "tiny_sets"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "builders.py").write_text(BUILDER)
    program = f"""
        from tiny_sets import builders
        for kind in (builders.Tiny, builders.Plain):
            kind(data_dir={str(data)!r}, file_format="array_record").download_and_prepare()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=code,
        env={"PYTHONPATH": str(code), "PATH": "", "HOME": str(code), "NO_GCE_CHECK": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return data


def test_labels_names_and_images(data_dir):
    stimuli = read_tfds("tiny", "train", data_dir=data_dir)
    assert stimuli.categories == ("zebra", "ant", "unused", "fox")
    assert sorted(stimuli.category) == ["ant"] * 4 + ["fox"] * 4 + ["zebra"] * 4
    assert stimuli.name == "tiny-train"
    assert str(data_dir) in stimuli.origin
    assert stimuli.image_names[3] == f"{stimuli.category[3]}/03"
    found, damaged = set(), []
    for index, category in enumerate(stimuli.category):
        try:
            image = stimuli.load(index)
        except ValueError as error:
            damaged.append(f"{category}: {error}")
            continue
        number = image.shape[1] - 5  # the size tells which one it is
        np.testing.assert_array_equal(
            image, np.full((4, 5 + number, 3), (10 * number, 0, 0), np.uint8)
        )
        assert category == ["zebra", "ant", "fox"][number % 3]
        found.add(number)
    assert found == set(range(12)) - {7}
    (message,) = damaged
    assert re.fullmatch(r"ant: tiny/1\.0\.0 train ant/\d\d: not an image that .*", message)


def test_a_list_of_classes_and_parts_of_splits(data_dir):
    stimuli = read_tfds("tiny", "train", data_dir=data_dir, classes=["fox", "zebra"])
    assert stimuli.categories == ("fox", "zebra")
    assert len(stimuli) == 8
    assert [stimuli.load(i).shape[1] % 3 for i in range(8)] == [
        {"fox": 1, "zebra": 2}[category] for category in stimuli.category
    ]  # 5 + number, whose rest is 2 for a fox and 0 for a zebra
    assert len(read_tfds("tiny:1.0.0", "train[:5]", data_dir=data_dir)) == 5
    assert len(read_tfds("tiny", "train+val", data_dir=data_dir)) == 15


def test_many_threads(data_dir):
    stimuli = read_tfds("tiny", "val", data_dir=data_dir)
    expected = [stimuli.load(index) for index in range(3)]
    rows = np.random.default_rng(0).integers(0, 3, 300).tolist()
    for row, image in zip(rows, images.map_parallel(stimuli.load, rows, workers=8), strict=True):
        np.testing.assert_array_equal(image, expected[row])


def test_what_is_wrong_is_said_in_a_line(data_dir, tmp_path):
    def refused(message, *arguments, **options):
        with pytest.raises(ValueError, match=message) as caught:
            read_tfds(*arguments, **{"data_dir": data_dir} | options)
        assert "\n" not in str(caught.value)

    refused(r"tiny: not found in .*; prepare it with .*array_record", "tiny", "train",
            data_dir=tmp_path)  # fmt: skip
    refused(r"nothing: not found in", "nothing", "train")
    refused(r"tiny: no split 'test'; it has train, val", "tiny", "test")
    refused(r"plain: records of number; expected exactly one image", "plain", "train")
    refused(r"no class foxx \(did you mean fox\?\)", "tiny", "train", classes=["foxx"])
    refused(r"tiny train: no images of unused", "tiny", "train", classes=["fox", "unused"])


def test_another_format_is_refused(data_dir, tmp_path):
    folder = tmp_path / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    for path in (data_dir / "tiny" / "1.0.0").iterdir():
        text = path.read_bytes()
        if path.suffix == ".json":
            text = text.replace(b"array_record", b"tfrecord")
        (folder / path.name.replace("array_record", "tfrecord")).write_bytes(text)
    with pytest.raises(ValueError, match=r"prepared as tfrecord, not as array_record; prepare it"):
        read_tfds("tiny", "train", data_dir=tmp_path)


def test_tensorflow_is_not_imported(data_dir):
    program = (
        "import sys; from topk_jax.stimuli import read_tfds;"
        f"assert len(read_tfds('tiny', 'val', data_dir={str(data_dir)!r})) == 3;"
        "sys.exit('tensorflow' in sys.modules)"
    )
    root = pathlib.Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0
