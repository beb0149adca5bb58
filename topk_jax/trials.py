"""The table of trials, its CSVs, and the names of cue-conflict images.

`topk_jax.decisions` says what a trial is and is where these names are imported from.
"""

import csv
import dataclasses
import functools
import io
import math
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from topk_jax.files import atomic_write

_COLUMNS = (
    "subj",
    "session",
    "trial",
    "rt",
    "object_response",
    "category",
    "condition",
    "imagename",
)
_INTEGERS = ("session", "trial")
_PREFIX_TOKENS = 6  # <trial>_<experiment>_<observer>_<condition>_<category>_<number>_<image>
_CUE_CONFLICT = re.compile(r"([^-_\d./\\]+)(\d+)-([^-_\d./\\]+)(\d+)(?:-\d+)?(?:\.[A-Za-z]\w*)?")
_PERSON = re.compile(r"subject-\d+")


class CueConflictName(NamedTuple):
    """What the name of a cue-conflict image says: the two categories and which picture of each."""

    shape: str
    shape_exemplar: int
    texture: str
    texture_exemplar: int


def parse_cue_conflict_name(name: str) -> CueConflictName:
    """Takes the file name of a cue-conflict image apart.

    `<shape><i>-<texture><j>.png`, as on the disk; the six further words that the tables of people
    put in front (`0001_s5n_s01_0_airplane_00_airplane1-bicycle2.png`) and the angle at the end of
    filled silhouettes (`airplane1-bicycle2-108.png`) are accepted and dropped.

    Raises:
        ValueError: the name is not of this form.
    """
    tokens = name.split("_")
    prefixed = len(tokens) == _PREFIX_TOKENS + 1 and tokens[0].isdigit()
    match = _CUE_CONFLICT.fullmatch(tokens[-1] if prefixed else name)
    if match is None:
        raise ValueError(
            f"{name!r} is not the name of a cue-conflict image: expected "
            "<shape><number>-<texture><number>.png, such as airplane1-bicycle2.png (no digit, "
            "'-', '_' or '.' in the name of a category)"
        )
    shape, shape_exemplar, texture, texture_exemplar = match.groups()
    return CueConflictName(shape, int(shape_exemplar), texture, int(texture_exemplar))


def _image_key(name: str) -> str:
    """What is left of an image's name without the words that differ between observers."""
    *_, before, last = ["", *name.split("_")]
    return f"{before}_{last}" if re.match(r"n\d", before) else last


@dataclasses.dataclass(frozen=True, eq=False)
class Trials:
    """What observers answered: one row for each image shown to one observer.

    Columns may be given as any sequence; they are copied, and cannot be written to. Two tables are
    equal where all columns are (NaN being equal to NaN).

    Attributes:
        subj: [n] text, the observer: a network's name, or `subject-01` and so on for people.
        session: [n] int64.
        trial: [n] int64, counts from 1 in the order of presentation.
        rt: [n] float64, reaction time in seconds; NaN for networks and where there is no answer.
        object_response: [n] text, the category answered, or "na" for no answer in time.
        category: [n] text, the true category; of a cue-conflict image that of its shape.
        condition: [n] text, level of distortion; "NaN" where there is none.
        imagename: [n] text, the file's name without folders.

    Raises:
        ValueError: columns of different lengths, not one-dimensional, of another type, or with
            empty text or line breaks.
    """

    subj: np.ndarray
    session: np.ndarray
    trial: np.ndarray
    rt: np.ndarray
    object_response: np.ndarray
    category: np.ndarray
    condition: np.ndarray
    imagename: np.ndarray

    def __post_init__(self) -> None:
        for name in _COLUMNS:
            object.__setattr__(self, name, _frozen(_column(name, getattr(self, name))))
        lengths = {name: len(getattr(self, name)) for name in _COLUMNS}
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise ValueError(f"columns of different lengths: {shown}")

    @classmethod
    def of_network(
        cls,
        subject: str,
        decisions: Sequence[str] | np.ndarray,
        *,
        category: Sequence[str] | np.ndarray,
        imagename: Sequence[str] | np.ndarray,
        condition: str | Sequence[str] | np.ndarray = "NaN",
        session: int = 1,
    ) -> "Trials":
        """Table of one network: trials numbered from 1 and no reaction times."""
        n = len(decisions)
        return cls(
            subj=np.full(n, subject),
            session=np.full(n, session),
            trial=np.arange(1, n + 1),
            rt=np.full(n, np.nan),
            object_response=np.asarray(decisions),
            category=np.asarray(category),
            condition=np.broadcast_to(np.asarray(condition), n),
            imagename=np.asarray(imagename),
        )

    @classmethod
    def concatenate(cls, tables: Iterable["Trials"]) -> "Trials":
        """All rows of the tables, in their order.

        Raises:
            ValueError: there is no table.
        """
        tables = list(tables)
        if not tables:
            raise ValueError("no tables to concatenate: expected at least one")
        return cls(*(np.concatenate([getattr(t, name) for t in tables]) for name in _COLUMNS))

    def __len__(self) -> int:
        return len(self.subj)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Trials):
            return NotImplemented
        return all(
            np.array_equal(getattr(self, name), getattr(other, name), equal_nan=name == "rt")
            for name in _COLUMNS
        )

    def select(self, rows: ArrayLike) -> "Trials":
        """Some of the rows.

        Args:
            rows: a mask, [n] bool, or the numbers of the rows in the order wanted, int.

        Raises:
            ValueError: a mask of another length, a number out of range, or neither of the two.
        """
        rows = np.asarray(rows)
        if not rows.size and rows.dtype != bool:
            rows = rows.astype(np.int64)
        mask = rows.dtype == bool and rows.shape == (len(self),)
        numbers = rows.dtype.kind in "iu" and rows.ndim == 1
        if numbers and rows.size:
            numbers = -len(self) <= rows.min() and rows.max() < len(self)
        if not (mask or numbers):
            raise ValueError(
                f"select: expected a mask or row numbers of a table of {len(self)} trials, got "
                f"{rows.dtype} of shape {rows.shape}"
            )
        return Trials(*(getattr(self, name)[rows] for name in _COLUMNS))

    @property
    def image_key(self) -> np.ndarray:
        """[n] text: names one image alike for all observers; trials are aligned by it.

        The last word of the file's name, split at "_", or the last two where the first of them is a
        WordNet id.
        """
        return self._image_keys

    @property
    def texture(self) -> np.ndarray:
        """[n] text: texture category of each cue-conflict image; ValueError if there are others."""
        return self._cues[1]

    @property
    def shape_exemplar(self) -> np.ndarray:
        """[n] text: picture that gave the shape ("airplane1"); ValueError as for `texture`."""
        return self._cues[0]

    # Tables do not change, so what is read off the names is kept.
    @functools.cached_property
    def _image_keys(self) -> np.ndarray:
        return _frozen(np.array([_image_key(name) for name in self.imagename.tolist()], np.str_))

    @functools.cached_property
    def _cues(self) -> tuple[np.ndarray, np.ndarray]:
        names = [parse_cue_conflict_name(name) for name in self.imagename.tolist()]
        exemplars = [f"{name.shape}{name.shape_exemplar}" for name in names]
        textures = [name.texture for name in names]
        return _frozen(np.array(exemplars, np.str_)), _frozen(np.array(textures, np.str_))


def _frozen(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


def _column(name: str, values: ArrayLike) -> np.ndarray:
    """A checked copy of one column."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"column {name}: expected one dimension, got shape {array.shape}")
    if name in _INTEGERS or name == "rt":
        kinds, dtype = ("iu", np.int64) if name in _INTEGERS else ("fiu", np.float64)
        if array.dtype.kind not in kinds and array.size:
            raise ValueError(f"column {name}: expected {np.dtype(dtype)}, got {array.dtype}")
        return array.astype(dtype)
    texts = array.tolist()
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"column {name}: expected text, got {text!r} in row {row}")
        if re.search(r"[\r\n\0]", text) or not (text or name == "condition"):
            raise ValueError(
                f"column {name}: row {row} is {text!r}, expected text on one line, not empty"
            )
    if name == "condition":
        # Tables saved by other programs leave a missing condition empty or write "nan".
        texts = ["NaN" if text.lower() in ("", "nan") else text for text in texts]
    return np.array(texts, np.str_)


def trials_filename(dataset: str, subject: str, session: int = 1) -> str:
    """Name of the CSV of one observer and session, as the benchmark's.

    `cue-conflict_resnet50-topk-10_session-1.csv`, `cue-conflict_subject-01_session_1.csv`. The
    benchmark writes a network's `_` as `-`, so that `a_b` and `a-b` share a file; here the name
    stays as it is. Readers, ours and the benchmark's, take the observer from the table.

    Raises:
        ValueError: a folder in the dataset's or the observer's name, or an empty name.
    """
    for name in (dataset, subject):
        if not name or re.search(r"[/\\\0]", name):
            raise ValueError(f"{name!r}: expected a name without folders, for a file name")
    separator = "_" if _PERSON.fullmatch(subject) else "-"
    return f"{dataset}_{subject}_session{separator}{session}.csv"


def write_trials(path: str | os.PathLike[str], trials: Trials) -> None:
    """Writes trials as the benchmark's CSV, atomically; equal tables give equal bytes.

    Raises:
        OSError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    columns = {name: getattr(trials, name).tolist() for name in _COLUMNS}
    columns["rt"] = ["NaN" if math.isnan(rt) else repr(rt) for rt in columns["rt"]]
    writer.writerows(zip(*columns.values(), strict=True))
    with atomic_write(path, "w") as file:
        file.write(text.getvalue())


def read_trials(path: str | os.PathLike[str]) -> Trials:
    """Reads one of the benchmark's CSVs, or all those of a folder.

    Headers may be in capitals and in any order, lines may end as on Windows, further columns are
    ignored. `na` is an answer (none in time), `NaN` a missing reaction time or condition.

    Args:
        path: a CSV, or a folder whose `.csv` files are read in the order of their names; hidden
            files and folders inside it are left out.

    Returns:
        The trials of all observers, in the order of the files.

    Raises:
        OSError: nothing there, or not readable.
        ValueError: a folder without CSVs, or a file that is no table of trials; the message names
            the file, the line and the column.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        return _read_file(path)
    files = sorted(
        file
        for file in path.iterdir()
        if file.suffix.lower() == ".csv" and not file.name.startswith(".") and file.is_file()
    )
    if not files:
        raise ValueError(f"{path}: no .csv file in this folder; expected tables of trials")
    return Trials.concatenate(_read_file(file) for file in files)


def _read_file(path: pathlib.Path) -> Trials:
    columns: dict[str, list] = {name: [] for name in _COLUMNS}
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = [name.strip().lower() for name in next(reader, [])]
            _check_header(path, header)
            for row in reader:
                if not row:  # Python's csv makes blank lines on Windows
                    continue
                if len(row) != len(header):
                    raise ValueError(
                        f"{path}, line {reader.line_num}: {len(row)} values, expected {len(header)}"
                    )
                values = dict(zip(header, row, strict=True))
                for name in _COLUMNS:
                    try:
                        columns[name].append(_parse(name, values[name]))
                    except ValueError as error:
                        raise ValueError(
                            f"{path}, line {reader.line_num}, column {name}: {error}"
                        ) from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text, so not a table of trials") from error
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: not a CSV ({error})") from error
    return Trials(*(np.array(values) for values in columns.values()))


def _check_header(path: pathlib.Path, header: list[str]) -> None:
    missing = [name for name in _COLUMNS if name not in header]
    twice = [name for name in _COLUMNS if header.count(name) > 1]
    if missing or twice:
        what = f"no column {', '.join(missing)}" if missing else f"column {twice[0]} twice"
        raise ValueError(f"{path}, line 1: {what}; expected the header {','.join(_COLUMNS)}")


def _parse(name: str, text: str) -> str | int | float:
    """The value of one cell; ValueError with what was expected."""
    if name in _INTEGERS:
        if not re.fullmatch(r"-?[0-9]{1,18}", text):
            raise ValueError(f"{text!r}, expected a whole number")
        return int(text)
    if name == "rt":
        try:
            return float(text or "nan")
        except ValueError:
            raise ValueError(f"{text!r}, expected seconds or NaN") from None
    if re.search(r"[\r\n\0]", text) or not (text or name == "condition"):
        hint = ' ("na" stands for no answer)' if name == "object_response" else ""
        raise ValueError(f"{text!r}, expected text on one line{hint}")
    return text
