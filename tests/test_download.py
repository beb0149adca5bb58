"""Downloads against a server on this machine that misbehaves in every way we know."""

import hashlib
import http.server
import io
import pathlib
import re
import socket
import stat
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from topk_jax import download

DATA = bytes(range(256)) * 4096  # 1 MiB
DIGEST = hashlib.sha256(DATA).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with what `server.plan` says for each request in turn, the last one for ever."""

    def do_GET(self):
        server = self.server
        with server.lock:
            number = server.requests
            server.requests += 1
        what = server.plan[min(number, len(server.plan) - 1)]
        if isinstance(what, int):
            self.send_error(what)
            return
        announced, body = what
        self.send_response(200)
        if announced is not None:
            self.send_header("Content-Length", str(announced))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server whose `plan` is a list of statuses or (Content-Length, body)."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.plan, running.requests, running.lock = [(len(DATA), DATA)], 0, threading.Lock()
        running.url = f"http://127.0.0.1:{running.server_port}/models/file.pth"
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    folder = tmp_path / "cache"
    monkeypatch.setenv("TOPK_JAX_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The seconds between tries, which nobody waits for here."""
    seconds = []
    monkeypatch.setattr("pooch.core.time.sleep", seconds.append)
    return seconds


def left_over(cache):
    return [path for path in cache.rglob("*") if path.is_file()]


def test_fetches_once(server, cache, capfd):
    path = download.fetch(server.url, filename="weights/file.pth", sha256_prefix=DIGEST[:8])
    assert path == cache / "weights" / "file.pth"
    assert path.read_bytes() == DATA
    assert left_over(cache) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    again = download.fetch(server.url, filename="weights/file.pth", sha256_prefix=DIGEST[:8])
    assert again == path
    assert server.requests == 1
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err.splitlines() == [f"downloading {server.url}"]


def test_quiet(server, capfd):
    download.fetch(server.url, filename="file", progress=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("length", [len(DATA), None])
def test_bar_on_a_terminal(server, monkeypatch, length):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    server.plan = [(length, DATA)]
    download.fetch(server.url, filename="file", sha256_prefix=DIGEST)
    shown = terminal.getvalue()
    assert shown.startswith("\rfile.pth: ")
    assert ("1.05M/1.05M" in shown) == (length is not None)
    assert shown.endswith("\n")


def test_whole_digest_and_none(server):
    assert download.fetch(server.url, filename="a", sha256_prefix=DIGEST).read_bytes() == DATA
    assert download.fetch(server.url, filename="b").read_bytes() == DATA


DROPPED = {
    "at once": (len(DATA), b""),
    "in the middle": (len(DATA), DATA[: len(DATA) // 2]),
    "before the last byte": (len(DATA), DATA[:-1]),
    "without a length": (None, DATA[:-1]),
    "another file": (len(DATA), DATA[::-1]),
    "server error": 500,
    "overloaded": 503,
    "too many requests": 429,
}


@pytest.mark.parametrize("answer", DROPPED.values(), ids=DROPPED)
def test_tries_again(server, cache, waits, answer):
    server.plan = [answer, answer, answer, (len(DATA), DATA)]
    path = download.fetch(server.url, filename="file", sha256_prefix=DIGEST[:8])
    assert path.read_bytes() == DATA
    assert server.requests == 4
    assert waits == [1, 2, 3]
    assert left_over(cache) == [path]


@pytest.mark.parametrize("answer", DROPPED.values(), ids=DROPPED)
def test_gives_up(server, cache, answer):
    server.plan = [answer]
    with pytest.raises(OSError, match=re.escape(server.url)) as raised:
        download.fetch(server.url, filename="file", sha256_prefix=DIGEST[:8], hint="or use --x")
    message = str(raised.value)
    assert server.requests == 4
    assert "4 tries" in message
    assert f"save it as {cache / 'file'}; or use --x" in message
    assert "\n" not in message
    assert left_over(cache) == []


def test_truncation_is_seen_without_a_digest(server, cache):
    server.plan = [(len(DATA), DATA[:-1])]
    with pytest.raises(OSError, match=r"broke off|of 1048576 bytes"):
        download.fetch(server.url, filename="file", retries=0)
    assert server.requests == 1
    assert left_over(cache) == []


def test_wrong_digest_is_said(server):
    with pytest.raises(OSError, match=rf"has sha256 {DIGEST[:8]}, expected 01234567"):
        download.fetch(server.url, filename="file", sha256_prefix="01234567", retries=1)
    assert server.requests == 2


def test_404_is_final(server, cache, capfd):
    server.plan = [404]
    with pytest.raises(OSError, match=rf"^{server.url}: HTTP 404 Not Found; download it by hand"):
        download.fetch(server.url, filename="file", sha256_prefix=DIGEST[:8], progress=False)
    assert server.requests == 1
    assert left_over(cache) == []
    assert capfd.readouterr().err == ""


def test_no_network(monkeypatch, cache):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/file.pth"
        with pytest.raises(
            OSError, match=rf"^{url}: no connection \(Connection refused\)"
        ) as raised:
            download.fetch(url, filename="weights/file.pth", sha256_prefix=DIGEST[:8])
    assert f"download it by hand and save it as {cache / 'weights/file.pth'}" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("url", ["ftpx://host/file", "no address", "http://"])
def test_malformed_addresses_are_final(url, waits):
    with pytest.raises(OSError, match="download it by hand"):
        download.fetch(url, filename="file", progress=False)
    assert waits == []


def test_a_file_put_there_by_hand_is_checked(server, cache):
    (cache / "weights").mkdir(parents=True)
    path = cache / "weights" / "file.pth"
    path.write_bytes(DATA)
    download.fetch(server.url, filename="weights/file.pth", sha256_prefix=DIGEST[:8])
    assert server.requests == 0
    path.write_bytes(DATA[:-1])
    download.fetch(server.url, filename="weights/file.pth", sha256_prefix=DIGEST[:8])
    assert server.requests == 1
    assert path.read_bytes() == DATA


def test_a_wrong_file_stays_when_no_better_one_comes(server, cache):
    cache.mkdir()
    (cache / "file").write_bytes(b"wrong")
    server.plan = [404]
    with pytest.raises(OSError, match="the file there is not it"):
        download.fetch(server.url, filename="file", sha256_prefix=DIGEST[:8])
    assert (cache / "file").read_bytes() == b"wrong"


def test_many_at_once(server, cache):
    def fetch(_):
        return download.fetch(server.url, filename="file", sha256_prefix=DIGEST, progress=False)

    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(fetch, range(8)))
    assert set(paths) == {cache / "file"}
    assert left_over(cache) == [cache / "file"]
    assert paths[0].read_bytes() == DATA


def test_cache_folder_that_cannot_be_made(server, cache):
    cache.write_text("a file where the folder should be")
    with pytest.raises(OSError, match="TOPK_JAX_CACHE") as raised:
        download.fetch(server.url, filename="file")
    assert str(cache) in str(raised.value)
    assert cache.read_text() == "a file where the folder should be"


def test_full_disk(server, cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*TOPK_JAX_CACHE") as raised:
        download.fetch(server.url, filename="file")
    assert raised.value.filename == str(cache)
    assert left_over(cache) == []


@pytest.mark.parametrize("prefix", ["", "abc", "xyzw1234", "ABCDEF12", "0" * 65])
def test_bad_prefixes(prefix):
    with pytest.raises(ValueError, match="hexadecimal digits"):
        download.fetch("http://127.0.0.1/x", filename="file", sha256_prefix=prefix)


@pytest.mark.parametrize("filename", ["", "../x", "/etc/x", "a/../../x"])
def test_bad_filenames(filename):
    with pytest.raises(ValueError, match="within the cache folder"):
        download.fetch("http://127.0.0.1/x", filename=filename)


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TOPK_JAX_CACHE", "~/here")
    assert download.cache_dir() == tmp_path / "here"
    monkeypatch.setenv("TOPK_JAX_CACHE", "relative")
    assert download.cache_dir() == pathlib.Path.cwd() / "relative"
    monkeypatch.delenv("TOPK_JAX_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert download.cache_dir() == tmp_path / "xdg" / "topk_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert download.cache_dir() == tmp_path / ".cache" / "topk_jax"
    monkeypatch.setattr("sys.platform", "darwin")
    assert download.cache_dir() == tmp_path / "Library" / "Caches" / "topk_jax"
