"""Files that are whole or absent, and the folder of one run.

Every result is written under a temporary name in its own folder, flushed to the disk and renamed:
a reader sees the old file or the new one, never half of one, and a failed write leaves the old file
as it was. A run folder holds `summary.json` from the first moment on; it is locked while in use,
continued by the same command and refused to any other.

Paths are local: `str`, `pathlib.Path` or `etils.epath.Path`.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import os
import pathlib
import secrets
from collections.abc import Iterator, Mapping
from typing import IO, Any, BinaryIO, Literal, TextIO, overload

import numpy as np
from absl import logging

SCHEMA = 1
"""Version of the layout of `summary.json`; raised when a reader of the old one would go wrong."""

SUMMARY = "summary.json"
"""Name of the file that makes a folder a run folder."""

_LOCK = ".lock"
_PARTIAL = ".topk_jax-{}.partial"
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


def local_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns `path` as a local path, `~` expanded.

    Args:
        path: text or any path object.

    Raises:
        ValueError: the path is empty or an address such as `gs://bucket/folder`, where neither
            locks nor renaming work.
    """
    text = os.fspath(path)
    if not text:
        raise ValueError("an empty path: expected the name of a file or folder")
    scheme, colon, _ = text.partition("://")
    if colon and scheme.isalnum():
        raise ValueError(f"{text}: only local files and folders can be used, not {scheme}://")
    return pathlib.Path(text).expanduser()


@overload
def atomic_write(
    path: str | os.PathLike[str], mode: Literal["wb"] = "wb"
) -> contextlib.AbstractContextManager[BinaryIO]: ...
@overload
def atomic_write(
    path: str | os.PathLike[str], mode: Literal["w"]
) -> contextlib.AbstractContextManager[TextIO]: ...
def atomic_write(
    path: str | os.PathLike[str], mode: Literal["wb", "w"] = "wb"
) -> contextlib.AbstractContextManager[IO[Any]]:
    """Opens a file for writing that appears under its name only when all of it is on the disk.

    Missing parent folders are made. An existing file keeps its permissions, a new one gets those of
    the umask; a symbolic link is followed. When the body of the `with` statement raises, or the
    disk is full, the earlier file is untouched and the temporary one is removed.

    Args:
        path: the file to write.
        mode: "wb" for bytes, "w" for text (UTF-8; line ends are written as given).

    Returns:
        A context manager that gives the open file.

    Raises:
        ValueError: another mode, or a path that is not a plain local file.
        OSError: the file cannot be written; the error names `path`.
    """
    if mode not in ("wb", "w"):
        raise ValueError(f'mode {mode!r}: expected "wb" (bytes) or "w" (text)')
    return _atomic_write(path, mode)


@contextlib.contextmanager
def _atomic_write(path: str | os.PathLike[str], mode: str) -> Iterator[IO[Any]]:
    target = pathlib.Path(os.path.realpath(local_path(path)))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if target.exists() and not target.is_file():
        # Renaming over a device or a pipe would replace it by a plain file.
        raise ValueError(f"{target}: not a plain file, so it cannot be replaced")
    partial = target.parent / _PARTIAL.format(secrets.token_hex(8))
    encoding, newline = (None, None) if mode == "wb" else ("utf-8", "")
    try:
        with _named(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, mode.replace("w", "x"), encoding=encoding, newline=newline) as file:
                if target.exists():
                    os.fchmod(file.fileno(), target.stat().st_mode & 0o7777)
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _named(path: pathlib.Path) -> Iterator[None]:
    """Puts `path` into an OSError that names no file, or our temporary one."""
    try:
        yield
    except OSError as error:
        ours = error.filename is None or str(error.filename).endswith(_PARTIAL.split("{}")[1])
        if error.errno is None or not ours:
            raise
        raise OSError(error.errno, error.strerror or os.strerror(error.errno), str(path)) from error


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as JSON, atomically, indented by two spaces.

    Args:
        path: the file to write.
        value: mappings, lists, tuples, strings, numbers, None, paths, NumPy scalars and arrays, and
            anything that NumPy takes for an array. NaN and infinities become null, since JSON has
            no word for them.

    Raises:
        TypeError: `value` holds something else; nothing is written.
        OSError: the file cannot be written.
    """
    text = json.dumps(_plain(value), indent=2, allow_nan=False) + "\n"
    with atomic_write(path, "w") as file:
        file.write(text)


def json_line(value: Any) -> str:
    """Returns `value` as JSON on one line, with its line end; values as `write_json` takes them.

    Raises:
        TypeError: `value` holds something else.
    """
    return json.dumps(_plain(value), allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Returns `value` made of JSON's own types only."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.ndarray | np.generic) or hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.dtype.kind == "V" and array.dtype.names is None:
            array = array.astype(np.float64)  # bfloat16 and its like: each value exactly
        if array.dtype.kind not in "biufU":
            raise TypeError(f"an array of {array.dtype} cannot be written as JSON")
        return _plain(array.tolist())
    raise TypeError(f"{type(value).__name__} {value!r} cannot be written as JSON")


def sha256(path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 digest of a file as 64 hexadecimal digits; reads it piece by piece."""
    with open(local_path(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A folder in the hands of this process, as `run_folder` gives it.

    Attributes:
        path: the folder; it exists.
        flags: what identifies the command, in JSON's types.
        previous: `summary.json` as an earlier run of the same command left it, None on a first run.
    """

    path: pathlib.Path
    flags: dict[str, Any]
    previous: dict[str, Any] | None

    def write_summary(self, result: Mapping[str, Any]) -> None:
        """Writes `summary.json`: schema and flags, which are this folder's, then `result`."""
        head = {"schema": SCHEMA, "flags": self.flags}
        write_json(self.path / SUMMARY, head | dict(result) | head)


@contextlib.contextmanager
def run_folder(path: str | os.PathLike[str], flags: Mapping[str, Any]) -> Iterator[RunFolder]:
    """Holds the folder of a run while the `with` statement lasts.

    The folder is made if it is missing, locked against other processes (the lock of a killed
    process does not count) and marked by a `summary.json` with the flags. Files that a killed run
    left half written are removed.

    Args:
        path: the folder.
        flags: what identifies the command: a later run with other values is refused.

    Yields:
        The folder, with the summary of the earlier run if there was one.

    Raises:
        ValueError: the folder belongs to a run with other flags or of another layout, its summary
            cannot be read, or it holds other files; nothing in it is touched.
        BlockingIOError: another process is using it.
        OSError: the folder cannot be made or written; the error names it.
    """
    folder = local_path(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "expected a folder for the results", str(folder))
    wanted: dict[str, Any] = _plain(flags)
    _previous_summary(folder, wanted)  # before anything is made in a folder that is not ours
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        previous = _previous_summary(folder, wanted)
        for partial in folder.rglob(_PARTIAL.format("*")):
            partial.unlink(missing_ok=True)
        run = RunFolder(folder, wanted, previous)
        if previous is None:
            run.write_summary({})
        yield run


def _previous_summary(folder: pathlib.Path, flags: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the folder's summary, None if there is none; refuses a folder that is not ours."""
    file = folder / SUMMARY
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        _refuse_foreign_files(folder)
        return None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not text, so not the summary of a run") from error
    try:
        summary = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file}: not JSON (line {error.lineno}); choose another folder or remove the file"
        ) from error
    if not isinstance(summary, dict) or not isinstance(summary.get("flags"), dict):
        raise ValueError(f"{file}: not the summary of a run of topk_jax; choose another folder")
    if summary.get("schema") != SCHEMA:
        raise ValueError(
            f"{file}: layout {summary.get('schema')!r}, this version writes {SCHEMA}; "
            "choose another folder"
        )
    before = summary["flags"]
    names = [name for name in before | flags if _shown(before, name) != _shown(flags, name)]
    if names:
        differences = ", ".join(
            f"{name} was {_shown(before, name)}, now {_shown(flags, name)}" for name in names
        )
        raise ValueError(
            f"{folder}: holds another run ({differences}); "
            "choose another folder or repeat the earlier values"
        )
    return summary


def _shown(flags: Mapping[str, Any], name: str) -> str:
    return json.dumps(flags[name], sort_keys=True) if name in flags else "not given"


def _refuse_foreign_files(folder: pathlib.Path) -> None:
    if not folder.exists():
        return
    ours = (_LOCK, ".DS_Store")
    for entry in sorted(folder.iterdir()):
        if entry.name not in ours and not entry.match(_PARTIAL.format("*")):
            raise ValueError(
                f"{folder}: holds {entry.name} but no {SUMMARY}, so it is not a run's folder; "
                "choose an empty or a new one"
            )


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """Holds the folder's lock.

    The lock file stays behind: removing it could pull it from under a process that has just opened
    it. The lock itself belongs to the process and goes with it.
    """
    # r+ would need the file to be there, w would empty it before we know that it is ours.
    file_number = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    with open(file_number, "r+", encoding="utf-8") as file:
        try:
            fcntl.flock(file_number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = file.read().strip()
            who = f"process {holder}" if holder else "another process"
            raise BlockingIOError(
                f"{folder}: in use by {who}; wait for it or choose another folder"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                raise OSError(error.errno, error.strerror, str(folder)) from error
            logging.warning("%s: no locks on this file system; use it from one process", folder)
        with _named(folder):
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        yield
