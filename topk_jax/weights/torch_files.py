"""Reads `.pth` files (zip and legacy format) and `.safetensors` into NumPy arrays, without torch.

Nothing in a file is executed (see `pickles`), and no number in a file decides how much memory is
taken: sizes are checked against what the file holds before anything is allocated.

The formats, as torch writes them. Zip: members under one folder of any name; `data.pkl` describes
the tensors, `data/<key>` are the bytes of each storage, uncompressed, in the order that
`byteorder` says (little where it is absent). Legacy: consecutive pickles (a magic number, the
protocol's version, facts on the system, the object, the list of storage keys), then for each key
the number of elements as int64 and the elements.
"""

import errno
import io
import math
import mmap
import os
import pathlib
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np

from topk_jax.files import local_path
from topk_jax.weights.pickles import Storage, Tensor, load_pickle

StateDict = dict[str, np.ndarray]
"""Arrays under torch's names."""

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

# Where the state_dict lies in a training checkpoint: the usual key first.
_CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model")
# What DataParallel and torch.compile put into names, at any depth.
_WRAPPERS = frozenset({"module", "_orig_mod"})

_OTHER_FORMATS = (
    (b"<", "a web page or XML: the download went wrong"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run git lfs pull"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"%PDF", "a PDF"),
    (b"\x1f\x8b", "gzip data: unpack it first"),
    (b"\x89HDF", "an HDF5 file (Keras?)"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"PK\x05\x06", "an empty zip archive"),
)
_EXPECTED = "expected a file of torch.save or a .safetensors file"


def read_state_dict(path: str | os.PathLike[str]) -> StateDict:
    """Reads a file of weights.

    Of a training checkpoint the entry `state_dict` is taken. Components `module` and `_orig_mod`
    (DataParallel, torch.compile) are dropped from the names, wherever they stand.

    Args:
        path: a file of `torch.save`, either format, or a safetensors file; which one it is, the
            first bytes tell.

    Returns:
        Arrays under torch's names, in the file's order and with its dtypes (bfloat16 is
        `ml_dtypes.bfloat16`); each has its own memory.

    Raises:
        OSError: the file is missing, a folder, or cannot be read.
        ValueError: it is no such file, truncated, damaged, asks for anything to be executed (the
            refused function or class is named), or holds other things than named tensors. One
            line that begins with the path.
    """
    local = local_path(path)
    if local.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder; expected a file of weights", str(local))
    if local.exists() and not local.is_file():
        raise ValueError(f"{local}: not a plain file; {_EXPECTED}")
    try:
        with open(local, "rb") as file:
            return _without_wrappers(_read(local, file))
    except ValueError as error:
        raise ValueError(f"{local}: {error}") from error
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(local)) from error


def _read(path: pathlib.Path, file: IO[bytes]) -> StateDict:
    head = file.read(512)
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    if not head:
        raise ValueError(f"an empty file; {_EXPECTED}")
    if head.startswith(b"PK\x03\x04"):
        return _read_zip(file, size)
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return _read_safetensors(path)
    if head[:1] == b"\x80":
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _read_legacy(mapped)
    for start, what in _OTHER_FORMATS:
        if head.lstrip().startswith(start):
            raise ValueError(f"{what}; {_EXPECTED}")
    if head[257:262] == b"ustar":
        raise ValueError(f"a tar archive (torch before 0.1.10, or packed); {_EXPECTED}")
    raise ValueError(f"an unknown format (its first bytes are {head[:8]!r}); {_EXPECTED}")


def _read_safetensors(path: pathlib.Path) -> StateDict:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"a broken safetensors file: {error}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"a safetensors file with elements that NumPy lacks: {error}") from error


def _read_zip(file: IO[bytes], size: int) -> StateDict:
    try:
        with zipfile.ZipFile(file) as archive:
            members = {info.filename: info for info in archive.infolist()}
            root = _zip_root(members, size)
            described = archive.read(members[f"{root}data.pkl"])
            tensors = _tensors(load_pickle(io.BytesIO(described)))
            big_endian = False
            if f"{root}byteorder" in members:
                order = archive.read(members[f"{root}byteorder"])
                if order not in (b"little", b"big"):
                    raise ValueError(f"its byte order is {order[:20]!r}; expected little or big")
                big_endian = order == b"big"

            def read(storage: Storage) -> bytes:
                name = f"{root}data/{storage.key}"
                if name not in members:
                    raise ValueError(f"storage {storage.key!r} is missing from the archive")
                return archive.read(members[name])

            return _arrays(tensors, read, size, big_endian=big_endian)
    except (zipfile.BadZipFile, EOFError, struct.error, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # EINVAL: sent to a place before the file's beginning
        raise ValueError(
            f"truncated or damaged: it begins as torch's zip format does, but {error}"
        ) from error
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(f"not as torch writes it: {error}") from error


def _zip_root(members: Mapping[str, zipfile.ZipInfo], size: int) -> str:
    """Returns the folder of `data.pkl` with its slash; refuses what torch.save does not write."""
    roots = [name[: -len("data.pkl")] for name in members if f"/{name}".endswith("/data.pkl")]
    if not roots:
        raise ValueError(f"a zip archive without data.pkl, so not of torch.save; {_EXPECTED}")
    if len(roots) > 1:
        raise ValueError(f"a zip archive with {len(roots)} files data.pkl; {_EXPECTED}")
    root = roots[0]
    if f"{root}constants.pkl" in members:
        raise ValueError(
            "a TorchScript archive (a program, not weights): where it was written, "
            "torch.save(torch.jit.load(file).state_dict(), other_file)"
        )
    for name, info in members.items():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"its member {name} is compressed; torch writes none so")
    if sum(info.file_size for info in members.values()) > size:
        raise ValueError(f"its members are larger than the file ({size} bytes)")
    return root


def _read_legacy(mapped: mmap.mmap) -> StateDict:
    file: Any = mapped
    magic = load_pickle(file)
    if magic != _LEGACY_MAGIC:
        raise ValueError(f"a pickle of {_named(magic)}, not a file of torch.save; {_EXPECTED}")
    protocol, system = load_pickle(file), load_pickle(file)
    if protocol != _LEGACY_PROTOCOL:
        raise ValueError("an unknown version of torch's legacy format; expected 1001")
    if not isinstance(system, dict) or not system.get("little_endian", True):
        raise ValueError("written by a big-endian machine: save it anew in torch's zip format")
    storages: dict[str, Storage] = {}
    tensors = _tensors(load_pickle(file, storages=storages))
    keys = load_pickle(file)
    if not isinstance(keys, list):
        raise ValueError("the list of its storages is missing")
    places = _legacy_places(mapped, keys, storages)

    def read(storage: Storage) -> bytes:
        if storage.key not in places:
            raise ValueError(f"storage {storage.key!r} is missing")
        return mapped[places[storage.key]]

    return _arrays(tensors, read, len(mapped), big_endian=False)


def _legacy_places(
    mapped: mmap.mmap, keys: list[Any], storages: Mapping[str, Storage]
) -> dict[str, slice]:
    """Returns where the bytes of each storage lie, from where `mapped` stands."""
    places: dict[str, slice] = {}
    position = mapped.tell()
    for key in keys:
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None:
            raise ValueError("it holds a storage that no tensor describes")
        start = position + 8
        position = start + storage.size * storage.dtype.itemsize
        if position > len(mapped):
            raise ValueError(
                f"truncated: storage {key!r} ends at byte {position}, the file at {len(mapped)}"
            )
        (count,) = struct.unpack("<q", mapped[start - 8 : start])
        if count != storage.size:
            raise ValueError(f"storage {key!r} has {count} elements, expected {storage.size}")
        places[key] = slice(start, position)
    return places


def _tensors(loaded: Any) -> dict[str, Tensor]:
    """Returns the named tensors of what was saved: a state_dict, or a checkpoint with one."""
    if isinstance(loaded, dict):
        for key in _CHECKPOINT_KEYS:
            if isinstance(loaded.get(key), dict):
                loaded = loaded[key]
                break
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds {_named(loaded)}; expected a state_dict")
    strangers = [
        f"{key if isinstance(key, str) else type(key).__name__}: {_named(value)}"
        for key, value in loaded.items()
        if not isinstance(key, str) or not isinstance(value, Tensor)
    ]
    if strangers:
        shown = ", ".join(strangers[:5]) + (" ..." if len(strangers) > 5 else "")
        raise ValueError(f"expected named tensors only, but it holds {shown}")
    if not loaded:
        raise ValueError("it holds an empty dict; expected a state_dict")
    return loaded


def _named(value: Any) -> str:
    if isinstance(value, Tensor):
        return "a single tensor"
    if isinstance(value, dict | list | tuple | str | bytes):
        return f"a {type(value).__name__} of length {len(value)}"
    return "None" if value is None else f"a {type(value).__name__}"


def _arrays(
    tensors: Mapping[str, Tensor],
    read: Callable[[Storage], bytes],
    size: int,
    *,
    big_endian: bool,
) -> StateDict:
    """Copies every tensor out of its storage; one storage at a time is in memory."""
    wanted = sum(
        math.prod(tensor.shape) * tensor.storage.dtype.itemsize for tensor in tensors.values()
    )
    # Tensors may share a storage or repeat its elements (stride 0), within reason.
    if wanted > 4 * size + (64 << 20):
        raise ValueError(f"its tensors take {wanted} bytes, but the file has only {size}")
    sharing: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        sharing.setdefault(tensor.storage.key, []).append(name)
    arrays = {}
    for names in sharing.values():
        data = read(tensors[names[0]].storage)
        for name in names:
            arrays[name] = _array(tensors[name], data, big_endian)
    return {name: arrays[name] for name in tensors}


def _array(tensor: Tensor, data: bytes, big_endian: bool) -> np.ndarray:
    dtype = tensor.storage.dtype
    if len(data) < tensor.storage.size * dtype.itemsize:
        raise ValueError(
            f"truncated: storage {tensor.storage.key!r} has {len(data)} bytes, expected "
            f"{tensor.storage.size * dtype.itemsize}"
        )
    if 0 in tensor.shape:
        return np.empty(tensor.shape, dtype)
    # As integers first: bfloat16 knows no byte order, and a bool is a byte that may not be 0 or 1.
    number = f"{'>' if big_endian else '<'}u{dtype.itemsize}"
    flat = np.frombuffer(data, number, count=tensor.storage.size)[tensor.offset :]
    # The stride of a dimension of size 1 is never taken and can be any number.
    strides = tuple(
        stride * dtype.itemsize if n > 1 else 0
        for n, stride in zip(tensor.shape, tensor.strides, strict=True)
    )
    view = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)
    if dtype == np.bool_:
        return np.array(view != 0)
    return view.astype(f"=u{dtype.itemsize}", order="C").view(dtype)


def _without_wrappers(state_dict: StateDict) -> StateDict:
    plain: StateDict = {}
    for name, array in state_dict.items():
        short = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if short in plain:
            raise ValueError(f"two tensors are called {short!r} once module. is dropped")
        plain[short] = array
    return plain
