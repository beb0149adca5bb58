"""Reads the pickles inside torch's files without running anything that they ask for.

A pickle is a program for a small stack machine, and the one in the standard library calls whatever
the program names. The one below knows the data types of a state_dict and nothing else: it builds
plain Python values, `Storage` and `Tensor` descriptions, imports nothing and calls nothing. A
program that names another function or class is refused at that name. It allocates no more than
the program itself is long, whatever numbers stand in it.
"""

import dataclasses
import math
import pickletools
import warnings
from collections.abc import Callable, Sequence
from typing import IO, Any

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype[Any]] = {
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}
"""Element types of tensors, by the name of their storage's class."""

_MAX_DIMENSIONS = 32


@dataclasses.dataclass(frozen=True)
class Storage:
    """A one-dimensional run of elements that tensors look into.

    Attributes:
        key: the name under which the file keeps its bytes.
        dtype: of the elements.
        size: number of elements under `key`.
        start: first element of this storage; not 0 only for views in the legacy format.
        length: number of elements of this storage.
    """

    key: str
    dtype: np.dtype[Any]
    size: int
    start: int
    length: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor: a strided look at a storage, within its bounds.

    Attributes:
        storage: where the elements are.
        offset: the first element, counted from the beginning of the bytes under the storage's key.
        shape: sizes, none negative.
        strides: distances in elements, none negative.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Global:
    """A function or class that the pickle names; it stays a name."""

    name: str


_MARK = object()

_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
}
# Operations whose argument is the value, as `pickletools` decodes it.
_VALUES = frozenset((
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
))  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# Operations that look up or call a class in ways that no state_dict needs.
_REFUSED = frozenset((
    "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "BYTEARRAY8", "NEXT_BUFFER",
))  # fmt: skip


def load_pickle(file: IO[bytes], *, storages: dict[str, Storage] | None = None) -> Any:
    """Reads one pickle from where `file` stands, and leaves it behind the pickle's last byte.

    Args:
        file: anything with `read` and `readline`.
        storages: filled with the first storage of each key, whoever looks into it.

    Returns:
        None, bool, int, float, str, bytes, tuple, list, dict (an OrderedDict too), `Storage`,
        `Tensor`, or such values inside one another.

    Raises:
        ValueError: the pickle is broken, or needs what is not allowed; a refused function or class
            is named.
    """
    machine = _Machine({} if storages is None else storages)
    with warnings.catch_warnings():
        # From a damaged text that looks like an escape sequence.
        warnings.simplefilter("ignore", DeprecationWarning)
        for operation, argument, _ in pickletools.genops(file):
            if operation.name == "STOP":
                return machine.pop()
            machine.run(operation.name, argument)
    raise ValueError("the pickle has no end")


class _Machine:
    """The stack and the memo, and what each operation does to them."""

    def __init__(self, storages: dict[str, Storage]):
        self._storages = storages
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise ValueError("broken pickle: it takes a value where there is none")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        for start in range(len(self._stack) - 1, -1, -1):
            if self._stack[start] is _MARK:
                values = self._stack[start + 1 :]
                del self._stack[start:]
                return values
        raise ValueError("broken pickle: a mark is missing")

    def _top(self, kind: type) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            raise ValueError(f"broken pickle: it fills a {kind.__name__} where there is none")
        return self._stack[-1]

    def run(self, name: str, argument: Any) -> None:
        """Runs one operation, named as in `pickletools`."""
        push = self._stack.append
        if name in _VALUES:
            push(argument)
        elif name in _CONSTANTS:
            push(_CONSTANTS[name]())
        elif name in _TUPLES:
            values = [self.pop() for _ in range(_TUPLES[name])]
            push(tuple(reversed(values)))
        elif name in _REFUSED:
            raise ValueError(f"refused {_asked_for(name, argument, self._stack)}")
        else:
            self._run_other(name, argument)

    def _run_other(self, name: str, argument: Any) -> None:
        push = self._stack.append
        match name:
            case "PROTO" | "FRAME":
                pass
            case "TUPLE":
                push(tuple(self._pop_to_mark()))
            case "LIST":
                push(self._pop_to_mark())
            case "DICT":
                push(_filled({}, self._pop_to_mark()))
            case "APPEND":
                value = self.pop()
                self._top(list).append(value)
            case "APPENDS":
                values = self._pop_to_mark()
                self._top(list).extend(values)
            case "SETITEM":
                value, key = self.pop(), self.pop()
                _filled(self._top(dict), [key, value])
            case "SETITEMS":
                values = self._pop_to_mark()
                _filled(self._top(dict), values)
            case "POP":
                self.pop()
            case "POP_MARK":
                self._pop_to_mark()
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self._memo[len(self._memo) if argument is None else argument] = self._top(object)
            case "GET" | "BINGET" | "LONG_BINGET":
                if argument not in self._memo:
                    raise ValueError(f"broken pickle: nothing was kept under {argument}")
                push(self._memo[argument])
            case "GLOBAL":
                push(_global(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                attribute, module = self.pop(), self.pop()
                if not isinstance(module, str) or not isinstance(attribute, str):
                    raise ValueError("refused a global whose name is not text")
                push(_global(f"{module}.{attribute}"))
            case "REDUCE":
                arguments, function = self.pop(), self.pop()
                push(_reduce(function, arguments))
            case "BUILD":
                self.pop()
                # The attributes of an OrderedDict (its `_metadata`): nothing of use to us.
                self._top(dict)
            case "BINPERSID":
                storage = _storage(self.pop())
                self._storages.setdefault(storage.key, storage)
                push(storage)
            case "PERSID":
                raise ValueError(f"refused a persistent id in text form, {argument!r}")
            case _:
                raise ValueError(f"refused the pickle operation {name}")


def _asked_for(operation: str, argument: Any, stack: Sequence[Any]) -> str:
    """Names what an operation that is never run wanted."""
    if operation == "INST":
        return f"the global {str(argument).replace(' ', '.')}"
    names = [value.name for value in stack if isinstance(value, _Global)]
    return f"an object made by the pickle operation {operation}" + (
        f" (of {names[-1]})" if names else ""
    )


def _global(name: str) -> _Global:
    if name not in DTYPES and name not in _FUNCTIONS:
        raise ValueError(
            f"refused the global {name}: a file of weights holds tensors only; where it was "
            "written, save model.state_dict(), or a safetensors file"
        )
    return _Global(name)


def _reduce(function: Any, arguments: Any) -> Any:
    if not isinstance(function, _Global) or function.name not in _FUNCTIONS:
        called = function.name if isinstance(function, _Global) else type(function).__name__
        raise ValueError(f"refused a call of {called}")
    if not isinstance(arguments, tuple):
        raise ValueError(f"broken pickle: {function.name} is called without a tuple of arguments")
    return _FUNCTIONS[function.name](arguments)


def _filled(into: dict[Any, Any], items: Sequence[Any]) -> dict[Any, Any]:
    """Sets keys and values that alternate in `items`."""
    if len(items) % 2:
        raise ValueError("broken pickle: a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Others could be nested as deep as the file is long, and hashing recurses.
        if not isinstance(key, str | int | float | bytes | None):
            raise ValueError(f"refused a {type(key).__name__} as the key of a dict")
        into[key] = value
    return into


def _storage(identifier: Any) -> Storage:
    """Returns the storage of a persistent id, the only kind that torch writes."""
    match identifier:
        case ("storage", _Global(name), str(key), _, int(size), *rest) if name in DTYPES:
            pass
        case (kind, *_) if isinstance(kind, str) and kind != "storage":
            raise ValueError(f"refused a persistent id of kind {kind!r}; expected 'storage'")
        case _:
            raise ValueError("refused a persistent id that does not describe a storage")
    match rest:
        case [] | [None]:
            start, length = 0, size
        case [(_, int(start), int(length))]:
            pass
        case _:
            raise ValueError(f"the view of storage {key!r} is not understood")
    if size < 0 or start < 0 or length < 0 or start + length > size:
        raise ValueError(
            f"storage {key!r}: elements {start} to {start + length} of {size} do not exist"
        )
    return Storage(key, DTYPES[name], size, start, length)


def _rebuild_tensor(arguments: tuple[Any, ...]) -> Tensor:
    match arguments:
        case (Storage() as storage, int(offset), tuple(shape), tuple(strides), *_):
            pass
        case _:
            raise ValueError("a tensor is not described by storage, offset, shape and strides")
    numbers = (offset, *shape, *strides)
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError("a tensor has an offset, size or stride that is negative or no number")
    if len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor has {len(shape)} sizes and {len(strides)} strides")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if math.prod(shape) > 0 and last >= storage.length:
        raise ValueError(
            f"a tensor of shape {shape} reaches element {last} of a storage of {storage.length}"
        )
    return Tensor(storage, storage.start + offset, shape, strides)


def _rebuild_parameter(arguments: tuple[Any, ...]) -> Tensor:
    if not arguments or not isinstance(arguments[0], Tensor):
        raise ValueError("a parameter holds no tensor")
    return arguments[0]


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """OrderedDict(), or as Python 2 wrote it OrderedDict([[key, value], ...])."""
    match arguments:
        case ():
            return {}
        case (list(pairs),) if all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
            return _filled({}, [item for pair in pairs for item in pair])
    raise ValueError("an OrderedDict is not made of pairs")


def _size(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(arguments) != 1 or not isinstance(arguments[0], list | tuple):
        raise ValueError("a torch.Size is not made of a tuple")
    return tuple(arguments[0])


_FUNCTIONS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.Size": _size,
}
