"""The pickle machine: what it builds, what it refuses, and that nothing ever runs."""

import builtins
import io
import os
import pickle
import struct

import pytest
from torch_file_fixtures import Call, Global, Persistent, Raw, Writer, encode, pickled

from topk_jax.weights.pickles import Storage, Tensor, load_pickle


def load(value):
    return load_pickle(io.BytesIO(pickled(value)))


@pytest.fixture(autouse=True)
def alarm(monkeypatch):
    """Everything that the hostile pickles below would call fails the test."""

    def called(*_, **__):
        pytest.fail("a pickle ran something")

    with monkeypatch.context() as patch:
        patch.setattr(os, "system", called)
        patch.setattr(os, "getcwd", called)
        patch.setattr(builtins, "eval", called)
        yield


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -3,
        2**80,
        -(2**40),
        1.5,
        "naïve\n\U0001f40d",
        (),
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, (2, "x"), None, 4),
        [1, [2, 3]],
        {"a": 1, 2: [None], None: ()},
    ],
)
def test_values_of_the_standard_pickler(value, protocol):
    assert load_pickle(io.BytesIO(pickle.dumps(value, protocol))) == value


def test_shared_values_are_read_through_the_memo():
    value = [["same"]] * 3
    for protocol in (1, 2, 4):
        loaded = load_pickle(io.BytesIO(pickle.dumps(value, protocol)))
        assert loaded == value
        assert loaded[0] is loaded[1] is loaded[2]


def test_stops_behind_the_pickle():
    file = io.BytesIO(pickled(1) + pickled("two") + b"rest")
    assert [load_pickle(file), load_pickle(file), file.read()] == [1, "two", b"rest"]


def test_python_2_strings_and_ordered_dicts():
    pairs = Raw(b"](](U\x01aK\x01e](U\x01bK\x02ee")
    value = Raw(encode(Global("collections", "OrderedDict")) + encode(pairs) + b"\x85R")
    assert load(value) == {"a": 1, "b": 2}


def storage_id(key="0", size=6, name="FloatStorage"):
    return Persistent(("storage", Global("torch", name), key, "cpu", size))


def tensor(offset=0, shape=(2, 3), strides=(3, 1), storage=None, name="_rebuild_tensor_v2"):
    arguments = (storage or storage_id(), offset, shape, strides, False, {})
    return Call(Global("torch._utils", name), arguments)


def test_tensor():
    loaded = load(tensor())
    assert isinstance(loaded, Tensor)
    assert isinstance(loaded.storage, Storage)
    assert (loaded.storage.key, loaded.storage.dtype, loaded.storage.size) == ("0", "float32", 6)
    assert (loaded.offset, loaded.shape, loaded.strides) == (0, (2, 3), (3, 1))


def test_very_old_tensor_parameter_and_size():
    old = Call(Global("torch._utils", "_rebuild_tensor"), (storage_id(), 0, (6,), (1,)))
    parameter = Call(Global("torch._utils", "_rebuild_parameter"), (old, True, {}))
    assert load(parameter) == load(old)
    assert load(Call(Global("torch", "Size"), ([2, 3],))) == (2, 3)


def test_storages_are_collected():
    storages = {}
    data = pickled([tensor(), tensor(storage=storage_id("7"))])
    load_pickle(io.BytesIO(data), storages=storages)
    assert list(storages) == ["0", "7"]


SYSTEM = Global("posix", "system")
HOSTILE = {
    "os.system": (Call(SYSTEM, ("true",)), "global posix.system"),
    "os.system by another name": (Call(Global("os", "system"), ("true",)), "global os.system"),
    "eval": (Call(Global("builtins", "eval"), ("1",)), "global builtins.eval"),
    "Python 2": (Call(Global("__builtin__", "eval"), ("1",)), "global __builtin__.eval"),
    "getattr chain": (Call(Global("builtins", "getattr"), (1, "x")), "global builtins.getattr"),
    "import": (Call(Global("importlib", "import_module"), ("os",)), "importlib.import_module"),
    "a pickled network": (Global("torchvision.models.resnet", "ResNet"), "resnet.ResNet"),
    "torch.load": (Call(Global("torch", "load"), ("x",)), "global torch.load"),
    "look-alike": (Global("torch._utils", "_rebuild_tensor_v2.__globals__"), "__globals__"),
    "another storage": (Global("torch", "ComplexFloatStorage"), "torch.ComplexFloatStorage"),
    "STACK_GLOBAL": (Raw(encode("os") + encode("system") + b"\x93"), "global os.system"),
    "STACK_GLOBAL of no text": (Raw(encode(1) + encode(2) + b"\x93"), "not text"),
    "INST": (Raw(b"(" + encode("true") + b"ios\nsystem\n"), "global os.system"),
    "INST of the allowed": (Raw(b"(icollections\nOrderedDict\n"), "OrderedDict"),
    "OBJ": (Raw(b"(" + encode(SYSTEM) + encode("true") + b"o"), "global posix.system"),
    "OBJ of the allowed": (
        Raw(b"(" + encode(Global("collections", "OrderedDict")) + b"o"),
        "OBJ .of collections.OrderedDict",
    ),
    "NEWOBJ": (Raw(encode(SYSTEM) + b")\x81"), "global posix.system"),
    "NEWOBJ of the allowed": (
        Raw(encode(Global("torch", "FloatStorage")) + b")\x81"),
        "NEWOBJ .of torch.FloatStorage",
    ),
    "extension registry": (Raw(b"\x82\x01"), "EXT1"),
    "REDUCE of a storage class": (
        Call(Global("torch", "FloatStorage"), (3,)),
        "call of torch.FloatStorage",
    ),
    "REDUCE of a string": (Call("os.system", ("true",)), "call of str"),
    "REDUCE without a tuple": (
        Raw(encode(Global("collections", "OrderedDict")) + b"NR"),
        "without a tuple",
    ),
    "BUILD with __setstate__": (
        Raw(encode(tensor()) + encode({"__setstate__": "x"}) + b"b"),
        "fills a dict",
    ),
    "BUILD on a global": (Raw(encode(Global("torch", "Size")) + b"}b"), "fills a dict"),
    "persistent id of a module": (Persistent(("module", "x", "y", "z")), "kind 'module'"),
    "persistent id of no tuple": (Persistent("storage"), "persistent id"),
    "persistent id with a string for a class": (
        Persistent(("storage", "torch.FloatStorage", "0", "cpu", 1)),
        "persistent id",
    ),
    "persistent id with a function for a class": (
        Persistent(("storage", Global("torch", "Size"), "0", "cpu", 1)),
        "persistent id",
    ),
    "persistent id with a path for a key": (
        Persistent(("storage", Global("torch", "FloatStorage"), 0, "cpu", 1)),
        "persistent id",
    ),
    "text persistent id": (Raw(b"P0\n"), "persistent id"),
}


@pytest.mark.parametrize(("value", "named"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickles_run_nothing_and_are_named(value, named):
    with pytest.raises(ValueError, match=named):
        load(value)


@pytest.mark.parametrize(("value", "named"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickles_hide_nowhere(value, named):
    with pytest.raises(ValueError, match=named):
        load({"state_dict": [1, value], "epoch": 3})


BROKEN_TENSORS = {
    "beyond the storage": tensor(offset=1),
    "beyond by strides": tensor(strides=(4, 1)),
    "beyond in a scalar": tensor(offset=6, shape=(), strides=()),
    "huge": tensor(shape=(2**40, 2**40), strides=(2**40, 1)),
    "negative size": tensor(shape=(-2, 3)),
    "negative stride": tensor(offset=5, strides=(-3, -1)),
    "negative offset": tensor(offset=-1),
    "text for a size": tensor(shape=("2", 3)),
    "too few strides": tensor(strides=(1,)),
    "too many dimensions": tensor(shape=(1,) * 33, strides=(1,) * 33),
    "list for a shape": tensor(shape=[2, 3]),
    "no storage": tensor(storage="0"),
    "negative storage": tensor(storage=storage_id(size=-1)),
    "view beyond its storage": tensor(
        storage=Persistent(("storage", Global("torch", "FloatStorage"), "0", "cpu", 6, ("1", 4, 4)))
    ),
    "strange view": tensor(
        storage=Persistent(("storage", Global("torch", "FloatStorage"), "0", "cpu", 6, "1"))
    ),
    "parameter of nothing": Call(Global("torch._utils", "_rebuild_parameter"), (1, True, {})),
    "size of nothing": Call(Global("torch", "Size"), (3,)),
    "dict of no pairs": Call(Global("collections", "OrderedDict"), ([[1]],)),
}


@pytest.mark.parametrize("value", BROKEN_TENSORS.values(), ids=BROKEN_TENSORS)
def test_broken_descriptions(value):
    with pytest.raises(ValueError, match=r"tensor|storage|stride|offset|Size|pairs|elements"):
        load(value)


def test_view_of_a_storage_is_shifted():
    identifier = ("storage", Global("torch", "FloatStorage"), "0", "cpu", 6, ("1", 2, 4))
    loaded = load(tensor(offset=1, shape=(3,), strides=(1,), storage=Persistent(identifier)))
    assert (loaded.offset, loaded.storage.length) == (3, 4)
    with pytest.raises(ValueError, match="element 4 of a storage of 4"):
        load(tensor(offset=2, shape=(3,), strides=(1,), storage=Persistent(identifier)))


BROKEN = {
    "nothing": b"",
    "no end": b"\x80\x02N",
    "empty stack": b"\x80\x02.",
    "only a mark": b"\x80\x02(.",
    "no mark": b"\x80\x02t.",
    "tuple of nothing": b"\x80\x02\x86.",
    "append to nothing": b"\x80\x02NNa.",
    "item without a dict": b"\x80\x02NNNs.",
    "odd items": b"\x80\x02}(Nu.",
    "unknown memo": b"\x80\x02h\x05.",
    "unknown operation": b"\x80\x02\xff.",
    "text cut off": b"\x80\x02X\xff\x00\x00\x00abc",
    "no utf-8": b"\x80\x02X\x01\x00\x00\x00\xff.",
    "no number": b"\x80\x02Ix\n.",
    "no escape sequence": b"\x80\x02S'\\d'\nNt.",
    "a tuple as a key": b"\x80\x02})Ns.",
    "DUP": b"\x80\x02N2.",
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_broken_pickles(data):
    with pytest.raises(ValueError, match=r"\S"):
        load_pickle(io.BytesIO(data))


def test_every_truncation_of_a_pickle_is_an_error():
    import numpy as np

    writer = Writer()
    data = pickled({"a": writer.tensor(np.zeros((2, 3), np.float32)), "b": [1.5, "x", 2**70]})
    load_pickle(io.BytesIO(data))
    for length in range(len(data)):
        with pytest.raises(ValueError, match=r"\S"):
            load_pickle(io.BytesIO(data[:length]))


def test_large_numbers_allocate_nothing():
    # The standard unpickler makes a memo of 2^32 slots for the first of these.
    assert load(Raw(b"Nr\xff\xff\xff\xff")) is None
    for opcodes in (
        b"\x8d" + struct.pack("<Q", 2**62),
        b"\x8e" + struct.pack("<Q", 2**62),
        b"\x8b" + struct.pack("<i", 2**31 - 1),
        b"\x96" + struct.pack("<Q", 2**62),
    ):
        with pytest.raises(ValueError, match=r"\S"):
            load(Raw(opcodes))


def test_deep_nesting_is_no_recursion():
    depth = 100_000
    nested = load(Raw(b")" + b"\x85" * depth))
    with pytest.raises(ValueError, match="tuple as the key"):
        load(Raw(b"}" + b")" + b"\x85" * depth + b"Ns"))
    with pytest.raises(ValueError, match="no number"):
        load(tensor(shape=(Raw(b")" + b"\x85" * depth), 3)))
    while nested:
        (nested,) = nested
