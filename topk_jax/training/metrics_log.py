"""The records of a run: `metrics.jsonl`, a JSON object a line, and TensorBoard if it is installed.

A record has `kind` ("train" or "validation"), `step` and `epoch`, and its numbers, some of them by
the name of a validation set.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from topk_jax import files

FILE = "metrics.jsonl"
_TENSORBOARD = "tensorboard"


def read_records(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a run, in order; a last line that was cut off is left out."""
    path = pathlib.Path(folder) / FILE
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


class MetricsLog:
    """Writes records as they come; from `open_log`."""

    def __init__(self, file: TextIO | None, writer: Any):
        self._file, self._writer = file, writer

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record; it is on its way to the disk when this returns."""
        if self._file is not None:
            self._file.write(files.json_line(record))
            self._file.flush()
        if self._writer is not None:
            for name, value in _numbers(record):
                self._writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])


@contextlib.contextmanager
def open_log(folder: str | os.PathLike[str] | None, *, step: int) -> Iterator[MetricsLog]:
    """Opens the log of a run that goes on after `step` steps; later records are forgotten.

    Args:
        folder: The run's; None, for all processes but the first, writes nothing.
        step: Of the checkpoint that the run goes on from; 0 is a new run.
    """
    if folder is None:
        yield MetricsLog(None, None)
        return
    kept = [record for record in read_records(folder) if record["step"] <= step]
    with files.atomic_write(pathlib.Path(folder) / FILE, "w") as file:
        file.writelines(files.json_line(record) for record in kept)
    with contextlib.ExitStack() as stack:
        writer = None
        if importlib.util.find_spec("tensorboardX") is not None:
            import tensorboardX  # pyright: ignore[reportMissingImports]

            writer = tensorboardX.SummaryWriter(
                os.path.join(folder, _TENSORBOARD), purge_step=step + 1
            )
            stack.callback(writer.close)
        path = pathlib.Path(folder) / FILE
        yield MetricsLog(stack.enter_context(open(path, "a", encoding="utf-8")), writer)


def _numbers(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name not in ("step", "epoch"):
            yield f"{prefix}{name}", float(value)
