"""What every script shares: flags, exit codes, one-line errors, progress, the compilation cache.

A script is flags and one call:

    def main(argv):
        cli.enable_compilation_cache(FLAGS.compilation_cache_dir)
        ...

    if __name__ == "__main__":
        cli.run(main)

Exit codes: 0 done (and `--help`), 1 the run failed, 2 bad input or bad flags, 130 Ctrl-C, 141 the
reader of our output went away. Importing this module does not import JAX.
"""

import hashlib
import importlib.metadata
import logging as python_logging
import math
import os
import pathlib
import platform
import select
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import tqdm
from absl import app, flags, logging

Item = TypeVar("Item")
Word = TypeVar("Word", bound=str)

_COMPILATION_CACHE_DIR = flags.DEFINE_string(
    "compilation_cache_dir",
    None,
    "Folder that keeps compiled programs for the next run; by default in the user's cache folder, "
    "empty for none.",
)

_BAD_INPUT = (
    ValueError,
    flags.Error,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)
# JAX's own errors (out of memory, no such backend) are RuntimeErrors.
_RUN_FAILED = (OSError, RuntimeError, MemoryError, FloatingPointError)
_BUGS = (NotImplementedError, RecursionError)
# What a flag's parser may raise, ml_collections' override of an unknown field among it.
_BAD_FLAG = (flags.Error, ValueError, TypeError, LookupError, AttributeError, OSError)

_LONGEST_FAILURE = 600

_open_bars: list[tqdm.tqdm] = []


def run(main: Callable[[list[str]], Any], *, argv: list[str] | None = None) -> NoReturn:
    """Parses the flags, calls `main(argv)` and ends the process.

    An expected error becomes one line `error: ...` on stderr and exit code 2 (bad input, bad flags)
    or 1 (the run failed). Anything else is a bug and keeps its traceback; `--verbosity=1` shows the
    traceback of expected errors too.

    Args:
        main: the script; gets `argv` without the flags, that is, the script's name alone.
        argv: the command line, `sys.argv` by default.
    """
    flags.FLAGS.register_key_flag_for_module(
        sys.argv[0], flags.FLAGS[_COMPILATION_CACHE_DIR.name]
    )  # --help shows the flags of the script and this one
    try:
        app.run(_UsageAsFlagError(main), argv=argv, flags_parser=_parse_flags)
    except SystemExit as error:
        code = error.code
    except KeyboardInterrupt:
        _say("interrupted; finished work is kept")
        code = 130
    except _BUGS:
        raise
    except _BAD_INPUT as error:
        code = _failed(error, 2)
    except _RUN_FAILED as error:
        code = _failed(error, 1)
    sys.exit(_flush_stdout() or code)


class _UsageAsFlagError:
    """Calls `main` so that absl does not answer a usage error with the whole help."""

    def __init__(self, main: Callable[[list[str]], Any]):
        self._main = main

    def __call__(self, argv: list[str]) -> Any:
        if logging.get_verbosity() < logging.DEBUG:
            # JAX reports each backend that it tried and did not find.
            python_logging.getLogger("jax").setLevel(python_logging.WARNING)
            # Orbax reports forty lines a checkpoint; what fails is raised too.
            logging.get_absl_handler().addFilter(_is_not_orbax)
        try:
            return self._main(argv)
        except app.UsageError as error:
            raise flags.Error(str(error)) from error


def _is_not_orbax(record: python_logging.LogRecord) -> bool:
    return "orbax" not in pathlib.Path(record.pathname).parts


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except SystemExit:
        sys.exit(0)  # help was asked for and given; absl would exit 1
    except _BAD_FLAG as error:
        message = _message(error)
        head, config, trace = str(error).partition("Error whilst parsing config file")
        if config:  # ml_collections puts the whole traceback of the file into its message
            message = head + trace.strip().splitlines()[-1].partition(": ")[2]
        if isinstance(error, flags.UnrecognizedFlagError):
            message = f"{message.removesuffix(' ?')}; --help lists the flags"
        elif not isinstance(error, flags.Error):
            message = f"bad flag: {message}"
        raise flags.Error(message) from error
    if rest[1:]:
        raise flags.Error(
            f"unexpected argument {' '.join(rest[1:])!r}; flags are written --name=value, "
            "--help lists them"
        )
    return rest


def _failed(error: BaseException, code: int) -> int:
    if isinstance(error, BrokenPipeError) and _reader_is_gone():
        return 141
    if logging.get_verbosity() >= logging.DEBUG:
        traceback.print_exception(error)
    message = _message(error)
    if code == 1 and len(message) > _LONGEST_FAILURE:
        # XLA lists every buffer when memory runs out.
        message = f"{message[:_LONGEST_FAILURE]} ... (--verbosity=1 shows all)"
    _say(f"error: {message}")
    return code


def _message(error: BaseException) -> str:
    """Returns an error's message as one line."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    if isinstance(error, MemoryError) and not error.args:
        message = "out of memory"
    elif isinstance(error, OSError) and error.strerror and error.filename is not None:
        message = f"{os.fsdecode(error.filename)}: {error.strerror}"
    elif isinstance(error, KeyError) and error.args:
        message = str(error.args[0])
    else:
        message = str(error)
    return " ".join(message.split()) or type(error).__name__


def _say(line: str) -> None:
    while _open_bars:
        _open_bars.pop().close()  # ends the line that the bar stands on
    print(line, file=sys.stderr, flush=True)


def _reader_is_gone() -> bool:
    """Says whether stdout is a pipe that nobody reads, as in `script | head -1`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _flush_stdout() -> int:
    """Flushes stdout; returns 0, or the exit code if that fails, and makes the last flush quiet."""
    try:
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        code = 141
    except OSError as error:
        _say(f"error: the output could not be written: {_message(error)}")
        code = 1
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def with_first_word(argv: Sequence[str], *, flag: str) -> list[str]:
    """Writes a first word that is no flag, as in `benchmark.py topk`, as the flag it stands for."""
    if len(argv) > 1 and not argv[1].startswith("-"):
        return [argv[0], f"--{flag}={argv[1]}", *argv[2:]]
    return list(argv)


def parse_fractions(text: str, *, flag: str = "sparsity") -> tuple[float, ...]:
    """Reads a comma list of kept fractions such as "0.5,0.1".

    Args:
        text: the flag's value.
        flag: the flag's name, for the errors.

    Returns:
        The fractions in the order given, each more than 0 and at most 1.

    Raises:
        ValueError: a part is no number or out of range, two are the same (they would share their
            files, whose names have the percentage with six digits), or there is none.
    """
    fractions: dict[str, float] = {}
    for part in text.split(","):
        try:
            fraction = float(part)
        except ValueError:
            fraction = math.nan
        if not 0 < fraction <= 1:
            raise ValueError(
                f"--{flag}={text}: {part.strip()!r} is not a fraction to keep; expected numbers "
                f"more than 0 and at most 1, separated by commas, for example --{flag}=0.5,0.1"
            )
        percent = format(100 * fraction, "g")
        if percent in fractions:
            raise ValueError(f"--{flag}={text}: {percent} % is there twice; write it once")
        fractions[percent] = fraction
    return tuple(fractions.values())


def parse_fraction(text: str, *, flag: str = "sparsity") -> float:
    """Reads one kept fraction such as "0.05".

    Raises:
        ValueError: not one number that is more than 0 and at most 1.
    """
    fractions = parse_fractions(text, flag=flag)
    if len(fractions) != 1:
        raise ValueError(f"--{flag}={text}: expected one fraction, for example --{flag}=0.05")
    return fractions[0]


def parse_choices(words: Sequence[str], choices: Sequence[Word], *, flag: str) -> tuple[Word, ...]:
    """Reads a list flag whose words are known.

    Raises:
        ValueError: an unknown word, one that is there twice, or none.
    """
    found = {choice: None for word in words for choice in choices if choice == word.strip()}
    if not words or len(found) != len(words):
        raise ValueError(
            f"--{flag}={','.join(words)}: expected {', '.join(choices)}, each at most once"
        )
    return tuple(found)


def parse_counts(words: Sequence[str], *, flag: str, least: int = 1) -> tuple[int, ...]:
    """Reads a list flag of whole numbers such as "0,1,2"; an empty list is none.

    Raises:
        ValueError: not whole numbers from `least` to 2**32 - 1, or one that is there twice.
    """
    counts = {
        int(word): None for word in words if word.strip().isdecimal() and least <= int(word) < 2**32
    }
    if len(counts) != len(words):
        raise ValueError(
            f"--{flag}={','.join(words)}: expected whole numbers from {least} on, each once, "
            f"separated by commas, for example --{flag}={least},{least + 1}"
        )
    return tuple(counts)


def parse_size(text: str, *, flag: str = "size") -> int | tuple[int, int]:
    """Reads the size of an image: its short side, "256", or width and height, "320x240".

    Returns:
        The short side, or (height, width), in pixels.

    Raises:
        ValueError: not one or two positive whole numbers.
    """
    parts = text.strip().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(
            f"--{flag}={text}: expected pixels, the short side as --{flag}=256 or width and height "
            f"as --{flag}=320x240"
        )
    numbers = [int(part) for part in parts]
    return numbers[0] if len(numbers) == 1 else (numbers[1], numbers[0])


def parse_shape(text: str, *, flag: str = "shapes") -> tuple[int, int, int, int]:
    """Reads a shape such as "16x28x28x512".

    Args:
        text: one part of the flag's value.
        flag: the flag's name, for the error.

    Raises:
        ValueError: not four positive whole numbers with x between them.
    """
    parts = text.strip().split("x")
    if len(parts) != 4 or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(
            f"--{flag}: {text.strip()!r} is no shape; expected images x height x width x channels, "
            f"for example --{flag}=16x28x28x512"
        )
    n, h, w, c = map(int, parts)
    return n, h, w, c


def device_line() -> str:
    """Returns backend, devices and version, for example "cpu, 1 device, jax 0.10.2".

    Raises:
        RuntimeError: JAX finds no device of the kind that JAX_PLATFORMS asks for.
    """
    import jax

    try:
        devices = jax.devices()
    except AssertionError as error:  # what jax 0.10 raises where the plugin is not installed
        wanted = os.environ.get("JAX_PLATFORMS")
        raise RuntimeError(f"JAX_PLATFORMS={wanted}: jax has no such backend here") from error
    count = f"{len(devices)} device{'s' if len(devices) != 1 else ''}"
    kind = devices[0].device_kind
    backend = jax.default_backend()
    name = backend if kind.lower() == backend else f"{backend} ({kind})"
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{name}, {count}{processes}, jax {jax.__version__}"


def enable_compilation_cache(directory: str | None = None) -> pathlib.Path | None:
    """Keeps compiled programs on the disk, so that a second run need not compile again.

    To be called before the first array is made.

    Args:
        directory: the folder, the flag `--compilation_cache_dir`. None is a folder of this jaxlib
            and this processor within the cache folder of topk_jax, unless
            JAX_COMPILATION_CACHE_DIR names one; "" is no cache.

    Returns:
        The folder in use, None if there is none: it was not wanted, or it cannot be written (then a
        notice is logged, since the run itself is not hurt).
    """
    import jax

    if directory == "":
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    chosen = directory or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    folder = pathlib.Path(chosen).expanduser() if chosen else _default_compilation_cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        logging.info("No compilation cache: %s: %s", folder, error.strerror)
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # JAX's own threshold of one second would leave most of our programs out.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def _default_compilation_cache() -> pathlib.Path:
    """Returns a folder that no other jaxlib or processor shares: their CPU code may crash here."""
    from topk_jax import download

    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        # Model and features of the first core; clock and core numbers differ from run to run.
        wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
        lines = text.split("\n\n")[0].splitlines()
        processor = "\n".join(line for line in lines if line.startswith(wanted))
    except OSError:
        processor = f"{platform.processor()} {platform.node()}"
    digest = hashlib.sha256(processor.encode()).hexdigest()[:12]
    jaxlib = importlib.metadata.version("jaxlib")
    return download.cache_dir() / "compiled" / f"{jaxlib}-{platform.machine()}-{digest}"


def progress(
    iterable: Iterable[Item],
    *,
    total: int | None = None,
    desc: str = "",
    unit: str = "it",
    position: Callable[[Item], int] | None = None,
    note: Callable[[Item], str] | None = None,
) -> Iterator[Item]:
    """Yields the items and shows how far it is, on stderr.

    On a terminal it is a bar; elsewhere a line after ten seconds, then whenever another tenth of
    the time has passed (at least ten seconds), and one at the end.

    Args:
        iterable: what to go through.
        total: its length, if it cannot tell itself.
        desc: what is being done.
        unit: what an item is, for the rate.
        position: how far it is after an item, for items that are not one unit each.
        note: what else to say of the last item.
    """
    if total is None and position is None and hasattr(iterable, "__len__"):
        total = len(iterable)  # pyright: ignore[reportArgumentType]
    show = _bar if sys.stderr.isatty() else _lines
    return show(iterable, total, desc, unit, position, note)


def _bar(
    iterable: Iterable[Item],
    total: int | None,
    desc: str,
    unit: str,
    position: Callable[[Item], int] | None,
    note: Callable[[Item], str] | None,
) -> Iterator[Item]:
    with tqdm.tqdm(total=total, desc=desc, unit=unit, dynamic_ncols=True) as bar:
        _open_bars.append(bar)
        try:
            for item in iterable:
                yield item
                if note:
                    bar.set_postfix_str(note(item), refresh=False)
                bar.update(position(item) - bar.n if position else 1)
        finally:
            if bar in _open_bars:
                _open_bars.remove(bar)


def _lines(
    iterable: Iterable[Item],
    total: int | None,
    desc: str,
    unit: str,
    position: Callable[[Item], int] | None,
    note: Callable[[Item], str] | None,
) -> Iterator[Item]:
    start = last = time.monotonic()
    begun: int | None = None  # where a continued run takes up; it has not done that much itself
    done = 0
    noted = ""

    def say() -> None:
        seconds = max(time.monotonic() - start, 1e-9)
        of_total = "" if total is None else f"/{total}"
        head = f"{desc}: " if desc else ""
        rate = f"{(done - (begun or 0)) / seconds:.3g} {unit}/s"
        line = f"{head}{done}{of_total}, {seconds:.1f} s, {rate}{noted}"
        print(line, file=sys.stderr, flush=True)

    for item in iterable:
        yield item
        done = position(item) if position else done + 1
        begun = (done if position else 0) if begun is None else begun
        noted = f", {note(item)}" if note else ""
        now = time.monotonic()
        if now - last >= max(10.0, 0.1 * (now - start)) and done != total:
            last = now
            say()
    say()
