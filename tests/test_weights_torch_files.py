"""Reading torch's files: both formats, every layout of a tensor, and all that can be wrong."""

import base64
import builtins
import os
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest
from torch_file_fixtures import (
    DTYPES,
    GOLDEN_LEGACY,
    GOLDEN_ZIP,
    SYSTEM,
    Call,
    Global,
    Writer,
    legacy_bytes,
    parameter,
    pickled,
    state_dict_bytes,
    zip_bytes,
)

from topk_jax.weights.torch_files import read_state_dict

FORMATS = ["zip", "legacy"]


def save(path, value, writer, form, **options):
    """Writes `value` in one of the two formats, and returns the path."""
    write = zip_bytes if form == "zip" else legacy_bytes
    path.write_bytes(write(value, writer.storages, **options))
    return path


def example(dtype, shape=(2, 3)):
    values = np.arange(np.prod(shape, dtype=int)).reshape(shape) % 5
    values = values % 2 if np.dtype(dtype).kind == "b" else values
    return np.asarray(values).astype(dtype)


@pytest.mark.parametrize("golden", [GOLDEN_ZIP, GOLDEN_LEGACY], ids=FORMATS)
def test_files_of_torch(tmp_path, golden):
    path = tmp_path / "weights.pth"
    path.write_bytes(zlib.decompress(base64.b85decode(golden)))
    base = np.arange(24, dtype=np.float32)
    numbers = [-3, 0, 5]
    expected = {
        "features.0.weight": (np.arange(6, dtype=np.float32) / 4).reshape(1, 2, 3),
        "view": base[4:16].reshape(3, 4),
        "transposed": base.reshape(4, 6).T,
        "step": base[1::5],
        "expanded": np.full((3, 4), 2.5, np.float32),
        "scalar": np.array(7),
        "empty": np.zeros((0, 3), np.float32),
        "d.float64": np.array(numbers, np.float64),
        "d.float16": np.array(numbers, np.float16),
        "d.bfloat16": np.array(numbers, ml_dtypes.bfloat16),
        "d.int32": np.array(numbers, np.int32),
        "d.int16": np.array(numbers, np.int16),
        "d.int8": np.array(numbers, np.int8),
        "d.uint8": np.array([200, 0, 5], np.uint8),
        "d.bool": np.array([True, False, True]),
    }
    loaded = read_state_dict(path)
    assert list(loaded) == list(expected)
    for name, array in expected.items():
        assert loaded[name].dtype == array.dtype, name
        np.testing.assert_array_equal(loaded[name], array, strict=True, err_msg=name)


@pytest.mark.parametrize("legacy", [False, True], ids=FORMATS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_ten_dtypes(tmp_path, dtype, legacy):
    arrays = {"a.weight": example(dtype), "b": example(dtype, ()), "c": example(dtype, (0, 4))}
    path = tmp_path / "weights.pth"
    path.write_bytes(state_dict_bytes(arrays, legacy=legacy))
    loaded = read_state_dict(path)
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        assert loaded[name].dtype == dtype
        assert loaded[name].tobytes() == array.tobytes()
        assert loaded[name].shape == array.shape
        assert loaded[name].flags["C_CONTIGUOUS"]


@pytest.mark.parametrize("form", FORMATS)
def test_shared_storages_strides_and_views(tmp_path, form):
    base = np.arange(24, dtype=np.float32)
    writer = Writer()
    view = {"view": ("99", 5, 10), "legacy": True} if form == "legacy" else {}
    state = {
        "whole": writer.tensor(base),
        "rows": writer.tensor(base, offset=4, shape=(2, 3), strides=(6, 1), size=24),
        "columns": writer.tensor(base, offset=1, shape=(3, 2), strides=(1, 6), size=24),
        "expanded": writer.tensor(base, offset=2, shape=(4, 5), strides=(0, 0)),
        "odd stride of one": writer.tensor(base, offset=23, shape=(1, 1), strides=(2**70, 99)),
        "view": writer.tensor(base, offset=1, shape=(4,), strides=(2,), **view),
        "parameter": parameter(writer.tensor(base, offset=3, shape=(), strides=())),
    }
    loaded = read_state_dict(save(tmp_path / "w.pth", state, writer, form))
    start = 6 if form == "legacy" else 1
    expected = {
        "whole": base,
        "rows": base[4:16].reshape(2, 6)[:, :3],
        "columns": np.array([[1, 7], [2, 8], [3, 9]], np.float32),
        "expanded": np.full((4, 5), 2, np.float32),
        "odd stride of one": np.array([[23]], np.float32),
        "view": base[start : start + 8 : 2],
        "parameter": np.array(3, np.float32),
    }
    assert list(loaded) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(loaded[name], array, strict=True, err_msg=name)
    loaded["whole"][:] = -1  # its own memory
    np.testing.assert_array_equal(loaded["rows"], expected["rows"])


def test_names_lose_wrappers_wherever_they_stand(tmp_path):
    names = ["module.conv.weight", "features.module.0.bias", "_orig_mod.module.fc.weight"]
    path = tmp_path / "w.pth"
    path.write_bytes(state_dict_bytes({name: example(np.float32) for name in names}))
    assert list(read_state_dict(path)) == ["conv.weight", "features.0.bias", "fc.weight"]


def test_names_that_only_contain_the_word_stay(tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(state_dict_bytes({"submodule.modules.weight": example(np.float32)}))
    assert list(read_state_dict(path)) == ["submodule.modules.weight"]


def test_two_names_that_become_one(tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(state_dict_bytes({n: example(np.float32) for n in ("a.module.b", "a.b")}))
    with pytest.raises(ValueError, match=r"two tensors are called 'a\.b'"):
        read_state_dict(path)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_training_checkpoint(tmp_path, form, key):
    writer = Writer()
    momentum = writer.tensor(example(np.float64))  # before the weights, of another size
    weights = {"module.a": writer.tensor(example(np.float32))}
    value = {"epoch": 3, "optimizer": {"state": {0: momentum}}, key: weights, "best": 71.5}
    loaded = read_state_dict(save(tmp_path / "w.pth.tar", value, writer, form))
    assert list(loaded) == ["a"]
    np.testing.assert_array_equal(loaded["a"], example(np.float32), strict=True)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("a string", "a str of length"),
        ([1, 2], "a list of length 2"),
        (3, "a int; expected a state_dict"),
        (None, "None; expected"),
        ({}, "an empty dict"),
        ({"epoch": 3, "lr": 0.1}, "epoch: a int, lr: a float"),
        ({"state_dict": {}}, "empty dict"),
        ({1: 2}, "int: a int"),
        ({str(i): i for i in range(9)}, r"4: a int \.\.\."),
        ("tensor", "a single tensor"),
        (
            Call(Global("posix", "system"), ("true",)),
            r"refused the global posix\.system.*save model\.state_dict\(\)",
        ),
        (
            {"state_dict": {}, "args": Global("argparse", "Namespace")},
            r"refused the global argparse\.Namespace",
        ),
    ],
)
def test_other_objects(tmp_path, monkeypatch, form, what, named):
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("it ran"))
    writer = Writer()
    value = writer.tensor(example(np.float32)) if what == "tensor" else what
    path = save(tmp_path / "w.pth", value, writer, form)
    with pytest.raises(ValueError, match=rf"^{path}: .*{named}") as raised:
        read_state_dict(path)
    assert "\n" not in str(raised.value)


def test_zip_with_any_root_and_no_byte_order(tmp_path):
    writer = Writer()
    state = {"a": writer.tensor(example(np.int16))}
    for root in ("squeezenet1_1-b8a52dc0", "a/b"):
        path = save(tmp_path / "w.pth", state, writer, "zip", root=root, byteorder=None)
        np.testing.assert_array_equal(read_state_dict(path)["a"], example(np.int16), strict=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64", "uint8", "bool"])
def test_big_endian_zip(tmp_path, dtype):
    array = example(DTYPES[dtype])
    writer = Writer()
    state = {"a": writer.tensor(array)}
    swapped = {key: held.view(f"u{held.itemsize}") for key, held in writer.storages.items()}
    swapped = {key: held.astype(f">u{held.itemsize}") for key, held in swapped.items()}
    path = tmp_path / "w.pth"
    path.write_bytes(zip_bytes(state, swapped, byteorder="big"))
    loaded = read_state_dict(path)["a"]
    assert loaded.dtype == array.dtype
    np.testing.assert_array_equal(loaded, array, strict=True)


def test_bytes_of_a_bool_that_are_neither_0_nor_1(tmp_path):
    writer = Writer()
    state = {"a": writer.tensor(np.zeros(3, bool))}
    path = tmp_path / "w.pth"
    path.write_bytes(zip_bytes(state, {"0": np.array([0, 1, 2], np.uint8)}))
    np.testing.assert_array_equal(read_state_dict(path)["a"], [False, True, True])


def bad_zip(value=None, storages=None, **options):
    writer = Writer()
    state = {"a": writer.tensor(np.zeros((64, 64), np.float32))}
    return zip_bytes(value or state, writer.storages if storages is None else storages, **options)


def flipped(data, position):
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def expanded(shape):
    writer = Writer()
    state = {"a": writer.tensor(np.zeros(1, np.float32), shape=shape, strides=(0,) * len(shape))}
    return zip_bytes(state, writer.storages)


BAD_FILES = {
    "empty": (b"", "an empty file"),
    "web page": (b"\n<!DOCTYPE html><html>no such file</html>", "a web page"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(50), "a PNG image"),
    "jpeg": (b"\xff\xd8\xff\xe0" + bytes(50), "a JPEG image"),
    "gzip": (b"\x1f\x8b\x08" + bytes(50), "unpack it"),
    "tar": (b"storages" + bytes(249) + b"ustar" + bytes(300), "a tar archive"),
    "text": (b"hello, world", "first bytes"),
    "one byte": (b"\x80", "."),
    "a pickle of something else": (pickled([1, 2]), "a pickle of a list of length 2"),
    "empty zip": (b"PK\x05\x06" + bytes(18), "an empty zip archive"),
    "zip truncated": (bad_zip()[:-100], "truncated or damaged"),
    "zip of half": (bad_zip()[:9000], "truncated or damaged"),
    "zip flipped data": (flipped(bad_zip(), 9000), "truncated or damaged.*CRC"),
    "zip of something else": (bad_zip(root="x").replace(b"data.pkl", b"data.txt"), "without data"),
    "two pickles": (bad_zip(extra={"other/data.pkl": b"N."}), "2 files data.pkl"),
    "TorchScript": (bad_zip(extra={"archive/constants.pkl": b"N."}), "TorchScript"),
    "zip compressed": (bad_zip(compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "zip byte order": (bad_zip(byteorder="middle"), "byte order is b'middle'"),
    "zip storage missing": (bad_zip(storages={}), "storage '0' is missing"),
    "zip storage short": (bad_zip(storages={"0": np.zeros(7, np.float32)}), "28 bytes, expected"),
    "zip without a pickle": (bad_zip(pickle=b""), "pickle exhausted"),
    "expanded to an exabyte": (expanded((2**30, 2**30)), "its tensors take"),
    "safetensors header": (b"\xff" * 7 + b"\x00" + b"{}", "safetensors"),
    "safetensors cut": ((200).to_bytes(8, "little") + b'{"a":{"dtype":"F32"', "safetensors"),
    "legacy protocol": (legacy_bytes({}, {}, protocol=1000), "expected 1001"),
    "legacy big-endian": (
        legacy_bytes({}, {}, system=SYSTEM | {"little_endian": False}),
        "big-endian",
    ),
    "legacy unknown storage": (
        legacy_bytes({"a": Writer().tensor(np.zeros(3, np.float32))}, {"7": np.zeros(3)}),
        "a storage that no tensor describes",
    ),
    "legacy storage missing": (
        legacy_bytes({"a": Writer().tensor(np.zeros(3, np.float32))}, {}),
        "storage '0' is missing",
    ),
    "legacy count": (
        legacy_bytes(
            {"a": Writer().tensor(np.zeros(3, np.float32))},
            {"0": np.zeros(3, np.float32)},
            counts={"0": 2**62},
        ),
        "elements, expected 3",
    ),
}


@pytest.mark.parametrize(("data", "named"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(tmp_path, data, named):
    path = tmp_path / "weights.pth"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"(?s)^{path}: .*{named}") as raised:
        read_state_dict(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("legacy", [False, True], ids=FORMATS)
def test_every_truncation_is_an_error(tmp_path, legacy):
    arrays = {"a": example(np.float32), "b": example(np.int64, (3,))}
    data = state_dict_bytes(arrays, legacy=legacy)
    path = tmp_path / "weights.pth"
    path.write_bytes(data)
    read_state_dict(path)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=rf"^{path}: "):
            read_state_dict(path)


def test_flipped_bits_of_a_zip_are_never_taken_for_weights(tmp_path):
    arrays = {"a": example(np.float32), "b": example(np.int64, (3,))}
    data = state_dict_bytes(arrays)
    path = tmp_path / "weights.pth"
    for position in range(0, len(data), 3):
        path.write_bytes(flipped(data, position))
        try:
            loaded = read_state_dict(path)
        except ValueError:
            continue
        # Flips in a time stamp or in the padding change nothing.
        assert {name: array.tolist() for name, array in loaded.items()} == {
            name: array.tolist() for name, array in arrays.items()
        }


def test_missing_folder_and_device(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        read_state_dict(tmp_path / "nothing.pth")
    with pytest.raises(IsADirectoryError, match="a folder"):
        read_state_dict(tmp_path)
    with pytest.raises(ValueError, match="not a plain file"):
        read_state_dict("/dev/zero")


def test_safetensors(tmp_path):
    import safetensors.numpy

    arrays = {f"module.{name}": example(dtype) for name, dtype in DTYPES.items()} | {
        "empty": example(np.float32, (0, 2)),
        "scalar": example(np.int64, ()),
    }
    for name in ("weights.safetensors", "weights.bin"):
        path = tmp_path / name
        safetensors.numpy.save_file(arrays, path)
        loaded = read_state_dict(path)
        assert set(loaded) == {name.removeprefix("module.") for name in arrays}
        for key, array in arrays.items():
            found = loaded[key.removeprefix("module.")]
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, array, strict=True)


def test_truncated_safetensors(tmp_path):
    import safetensors.numpy

    data = safetensors.numpy.save({"a": example(np.float32)})
    path = tmp_path / "weights.safetensors"
    for length in (*range(1, len(data), 7), len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=rf"^{path}: .*safetensors"):
            read_state_dict(path)


def test_torch_is_not_imported(tmp_path, monkeypatch):
    imported = builtins.__import__

    def without_torch(name, *arguments, **options):
        assert name.partition(".")[0] != "torch", "it imports torch"
        return imported(name, *arguments, **options)

    path = tmp_path / "weights.pth"
    path.write_bytes(state_dict_bytes({"a": example(np.float32)}))
    monkeypatch.setattr(builtins, "__import__", without_torch)
    assert list(read_state_dict(path)) == ["a"]


@pytest.mark.real
def test_squeezenet(shared):
    loaded = read_state_dict(shared / "weights" / "squeezenet1_1.pth")
    assert len(loaded) == 52
    assert sum(array.size for array in loaded.values()) == 1_235_496
    assert loaded["features.0.weight"].shape == (64, 3, 3, 3)
    assert loaded["classifier.1.weight"].shape == (1000, 512, 1, 1)
    assert {array.dtype for array in loaded.values()} == {np.dtype(np.float32)}
    assert all(np.isfinite(array).all() for array in loaded.values())


@pytest.mark.real
def test_vgg19_normalised(shared):
    loaded = read_state_dict(shared / "weights" / "vgg19_normalised.pth")
    layers = ["0", "2", "5", "9", "12", "16", "19", "22", "25", "29", "32", "35", "38"]
    assert set(loaded) == {f"{n}.{kind}" for n in layers for kind in ("weight", "bias")}
    assert loaded["0.weight"].shape == (3, 3, 1, 1)
    assert loaded["2.weight"].dtype == np.float16
    # The colour layer turns [0, 1] RGB into BGR of 0 to 255 minus the mean.
    np.testing.assert_allclose(
        loaded["0.weight"][:, :, 0, 0], 255 * np.eye(3)[::-1], atol=1e-3, rtol=0
    )


@pytest.mark.parity
@pytest.mark.parametrize("form", FORMATS)
def test_torch_reads_what_the_fixtures_write(tmp_path, form):
    torch = pytest.importorskip("torch")
    arrays = {name: example(dtype) for name, dtype in DTYPES.items()}
    path = tmp_path / "w.pth"
    path.write_bytes(state_dict_bytes(arrays, legacy=form == "legacy"))
    loaded = torch.load(path, weights_only=True)
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        as_bytes = loaded[name].view(torch.uint8) if array.dtype != bool else loaded[name]
        assert as_bytes.numpy().tobytes() == array.tobytes()
        assert tuple(loaded[name].shape) == array.shape


@pytest.mark.parity
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_reads_what_torchvision_writes(tmp_path, form, name):
    torch = pytest.importorskip("torch")
    torchvision = pytest.importorskip("torchvision")
    network = torch.nn.DataParallel(torchvision.models.get_model(name, weights=None))
    path = tmp_path / "w.pth.tar"
    torch.save(
        {"epoch": 1, "state_dict": network.state_dict()},
        path,
        _use_new_zipfile_serialization=form == "zip",
    )
    expected = {key.removeprefix("module."): v.numpy() for key, v in network.state_dict().items()}
    loaded = read_state_dict(path)
    assert list(loaded) == list(expected)
    for key, array in expected.items():
        np.testing.assert_array_equal(loaded[key], array, strict=True)
