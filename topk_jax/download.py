"""Files from the network: whole and checked, or absent.

A download goes to a folder of its own within the cache folder; only a complete file whose digest
is right is moved to its final name. Several processes may fetch the same file at once. Nothing is
downloaded, and pooch is not imported, before `fetch` needs it.
"""

import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tqdm
from absl import logging

from topk_jax import files

_TIMEOUT = 30.0  # seconds without an answer, and between two pieces of one
_PIECE = 1 << 18  # bytes; pooch flushes the file after each piece
_AGAIN = (408, 425, 429)  # "client errors" of HTTP that a later try may not meet


def cache_dir() -> pathlib.Path:
    """Folder for downloads, converted weights and compiled programs; it may not exist yet.

    Returns:
        $TOPK_JAX_CACHE if that is set, else `topk_jax` in the user's cache folder
        ($XDG_CACHE_HOME or ~/.cache; ~/Library/Caches on macOS).
    """
    chosen = os.environ.get("TOPK_JAX_CACHE")
    if chosen:
        return pathlib.Path(chosen).expanduser().absolute()
    if sys.platform == "darwin":
        return pathlib.Path("~/Library/Caches/topk_jax").expanduser()
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "topk_jax"


def fetch(
    url: str,
    *,
    filename: str,
    sha256_prefix: str | None = None,
    retries: int = 3,
    progress: bool = True,
    hint: str | None = None,
) -> pathlib.Path:
    """Returns the file of an address, downloading it unless the cache folder has it.

    A file that is there with another digest is replaced, once the right one has arrived.

    Args:
        url: http or https address.
        filename: path within `cache_dir()` under which the file is kept.
        sha256_prefix: the first hexadecimal digits, or all 64, of the file's SHA-256. Without it
            only the length that the server announces is checked.
        retries: how often a broken, truncated or wrong download is tried again, waiting 1, 2, 3 ...
            seconds. What cannot get better (404, a malformed address) is not.
        progress: a bar on a terminal, one line elsewhere.
        hint: what else the user could do, appended to the error of a failed download.

    Raises:
        ValueError: `sha256_prefix` is not hexadecimal, or `filename` leads out of the cache folder.
        OSError: no network, no such file, wrong digest, or the cache folder cannot be written; one
            line that names the address and the file to put in place by hand.
    """
    if sha256_prefix is not None and not re.fullmatch("[0-9a-f]{4,64}", sha256_prefix):
        raise ValueError(
            f"sha256_prefix={sha256_prefix!r}: expected 4 to 64 hexadecimal digits, or None"
        )
    if not filename or ".." in pathlib.PurePath(filename).parts or os.path.isabs(filename):
        raise ValueError(f"filename={filename!r}: expected a path within the cache folder")
    target = cache_dir() / filename
    present = ""
    if target.is_file():
        digest = files.sha256(target) if sha256_prefix else ""
        if digest.startswith(sha256_prefix or ""):
            return target
        present = f"; the file there is not it (sha256 {digest[:8]}..., expected {sha256_prefix})"
        logging.warning(
            "%s: sha256 %s..., expected %s: fetched anew", target, digest[:8], sha256_prefix
        )
    by_hand = f"download it by hand and save it as {target}{present}" + (
        f"; {hint}" if hint else ""
    )
    try:
        _download(url, target, _Download(sha256_prefix, progress, retries), by_hand)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(
            error.errno,
            f"{error.strerror or os.strerror(error.errno)} (download of {url}); the environment "
            "variable TOPK_JAX_CACHE names another folder",
            str(cache_dir()),
        ) from error
    return target


def _download(url: str, target: pathlib.Path, download: "_Download", by_hand: str) -> None:
    """Fetches `url` and moves the checked file to `target`."""
    import pooch
    import requests

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as folder:
        name = target.name
        source = pooch.create(
            folder,
            base_url="",
            registry={name: None},  # pooch knows whole digests only: `_Download` checks
            urls={name: url},
            retry_if_failed=download.retries,
        )
        try:
            with _quiet_pooch():
                # Pooch's types describe its processors here.
                arrived = source.fetch(name, downloader=download)  # pyright: ignore[reportArgumentType]
        except (requests.RequestException, ValueError, _HopelessError) as error:
            tries = f" ({download.attempts} tries)" if download.attempts > 1 else ""
            raise OSError(f"{url}: {_reason(error)}{tries}; {by_hand}") from error
        with open(arrived, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(arrived, 0o644)  # temporary files are private; a cache folder may be shared
        os.replace(arrived, target)


class _HopelessError(Exception):
    """A failure that pooch is not to try again: neither a ValueError nor one of requests'."""


class _Bar(tqdm.tqdm):
    """A bar that pooch recognises as one: tqdm's own is false while its total is unknown."""

    def __bool__(self) -> bool:
        return True


class _Download:
    """Pooch's downloader: one attempt a call, with progress, and the checks on what arrived."""

    def __init__(self, sha256_prefix: str | None, progress: bool, retries: int):
        self.retries = retries
        self.attempts = 0
        self._prefix = sha256_prefix
        self._progress = progress
        self._failure = ""

    def __call__(self, url: str, output_file: str, pooch: Any, check_only: bool = False) -> None:
        """Downloads `url` to `output_file`."""
        import requests

        self.attempts += 1
        if self._failure:
            logging.warning("%s: %s; try %d", url, self._failure, self.attempts)
        try:
            length = self._attempt(url, output_file)
            self._check(output_file, length)
        except (requests.RequestException, ValueError) as error:
            self._failure = _reason(error)
            if _is_hopeless(error):
                raise _HopelessError(self._failure) from error
            raise

    def _attempt(self, url: str, output_file: str) -> int:
        """Returns the length that the server announced, 0 if it did not."""
        from pooch import HTTPDownloader

        on_terminal = self._progress and sys.stderr.isatty()
        if self._progress and not on_terminal and self.attempts == 1:
            tqdm.tqdm.write(f"downloading {url}", file=sys.stderr)
        answers: list[Any] = []  # one for each redirection; pooch closes none of them
        bar = _Bar(
            desc=url.rpartition("/")[2],
            unit="B",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not on_terminal,
        )
        # "identity": the length and the digest are those of the file itself.
        get = HTTPDownloader(
            progressbar=bar,  # pyright: ignore[reportArgumentType]
            chunk_size=_PIECE,
            timeout=_TIMEOUT,
            headers={"Accept-Encoding": "identity"},
            hooks={"response": lambda answer, *_, **__: answers.append(answer)},
        )
        try:
            get(url, output_file, None)
            return int(answers[-1].headers.get("Content-Length", 0))
        finally:
            bar.close()
            for answer in answers:
                answer.close()

    def _check(self, output_file: str, length: int) -> None:
        size = os.path.getsize(output_file)
        digest = files.sha256(output_file) if self._prefix else ""
        if self._prefix and digest.startswith(self._prefix):
            return
        if size < length:
            raise ValueError(f"only {size} of {length} bytes arrived")
        if self._prefix:
            raise ValueError(
                f"what arrived ({size} bytes) has sha256 {digest[: len(self._prefix)]}, "
                f"expected {self._prefix}"
            )


def _is_hopeless(error: Exception) -> bool:
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        status = error.response.status_code
        return 400 <= status < 500 and status not in _AGAIN
    # A malformed or foreign address is both.
    return isinstance(error, ValueError) and isinstance(error, requests.RequestException)


def _reason(error: BaseException) -> str:
    """Says in a few words what went wrong; requests' own messages nest those of three libraries."""
    import requests

    if isinstance(error, _HopelessError):
        return str(error)
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"HTTP {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.Timeout):
        return f"no answer within {_TIMEOUT:g} s"
    inner = error
    while type(inner).__module__.partition(".")[0] in ("requests", "urllib3"):
        deeper = inner.__cause__ or inner.__context__
        if deeper is None:
            break
        inner = deeper
    text = " ".join((getattr(inner, "strerror", None) or str(inner)).split())
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return f"the connection broke off ({text})"
    if isinstance(error, requests.ConnectionError):
        return f"no connection ({text})"
    return text or type(inner).__name__


@contextmanager
def _quiet_pooch() -> Iterator[None]:
    """Keeps pooch's own lines off stderr: `_Download` says what is worth saying."""
    import pooch

    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("ERROR")
    try:
        yield
    finally:
        logger.setLevel(level)
