"""Kills training runs at random moments and looks whether they go on as if nothing had happened."""

import contextlib
import pathlib
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from topk_jax import files
from topk_jax.jobs.train import CHECKPOINTS, WEIGHTS_FILE
from topk_jax.training.metrics_log import read_records

_CLOCKED = ("images_per_second",)  # what differs between two runs of the same numbers
_POLL_SECONDS = 0.002


def run(
    command: Sequence[str], *, kills: int, seed: int, report: Callable[[str], None]
) -> dict[str, Any]:
    """Runs a training to its end, then again and again with SIGKILL in between.

    Every second kill comes at a random moment of the run, the others while a checkpoint is being
    written. A run that ends before its kill is compared too, and another one begins.

    Args:
        command: Of the training, without `--workdir`.
        kills: Number of kills.
        seed: Of the moments.
        report: Gets a line a kill.

    Returns:
        `kills`, `kills_while_saving`, `runs` compared, `records` of each.

    Raises:
        RuntimeError: A run failed, or one that was killed gave other numbers than the first.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="kill_and_resume_") as scratch:
        folder = pathlib.Path(scratch)
        report("a run without kills")
        seconds = _finish(command, folder / "whole")
        expected = _numbers(folder / "whole")
        done = saving = runs = 0
        while done < kills or runs == 0:
            workdir = folder / f"killed_{runs}"
            while done < kills:
                while_saving = done % 2 == 1
                moment = _kill(command, workdir, rng.uniform(0.1, 1) * seconds, while_saving)
                if moment is None:
                    break
                done += 1
                saving += "saved" in moment
                report(f"kill {done} of {kills}: {moment}")
            _finish(command, workdir)
            runs += 1
            if _numbers(workdir) != expected:
                raise RuntimeError(
                    f"a killed run gave other numbers than the whole one ({done} kills, "
                    f"--seed={seed})"
                )
            report(f"run {runs} has the losses, accuracies and weights of the whole one")
    records = len(expected[0])
    return {"kills": done, "kills_while_saving": saving, "runs": runs, "records": records}


def _start(command: Sequence[str], workdir: pathlib.Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command, f"--workdir={workdir}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(command: Sequence[str], workdir: pathlib.Path) -> float:
    """Lets a run come to its end; returns its seconds."""
    begun = time.monotonic()
    process = _start(command, workdir)
    _, errors = process.communicate()
    if process.returncode:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the training failed with exit code {process.returncode}: {last}")
    return time.monotonic() - begun


def _kill(
    command: Sequence[str], workdir: pathlib.Path, delay: float, while_saving: bool
) -> str | None:
    """Starts the run and kills it; returns what it was doing, None if it came to its end."""
    started = time.time()
    process = _start(command, workdir)
    begun = time.monotonic()
    what = "at a random moment"
    while process.poll() is None:
        late = time.monotonic() - begun >= delay
        half = late and _is_saving(workdir, started)
        if half or (late and not while_saving):
            process.kill()
            what = "while a checkpoint was being saved" if half else what
            break
        time.sleep(_POLL_SECONDS)
    _, errors = process.communicate()
    if process.returncode > 0:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the training failed with exit code {process.returncode}: {last}")
    if process.returncode == 0:
        return None
    records = read_records(workdir)
    return f"{what}, after step {records[-1]['step'] if records else 0}"


def _is_saving(workdir: pathlib.Path, since: float) -> bool:
    """Says whether half a checkpoint is there that is younger than `since`."""
    for path in (workdir / CHECKPOINTS).glob("*/*tmp*"):
        with contextlib.suppress(FileNotFoundError):  # complete by now
            if path.stat().st_ctime >= since:
                return True
    return False


def _numbers(workdir: pathlib.Path) -> tuple[list[dict[str, Any]], str]:
    """What must be the same: all records but for the clock, and the weights."""
    records = [
        {name: value for name, value in record.items() if name not in _CLOCKED}
        for record in read_records(workdir)
    ]
    return records, files.sha256(workdir / WEIGHTS_FILE)
