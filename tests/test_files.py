import errno
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from topk_jax import files


def only_entries(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def unprivileged():
    """Drops root's rights, which would open every folder."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_atomic_write_bytes_and_text(tmp_path):
    target = tmp_path / "new folder" / "ünï cödé.bin"
    with files.atomic_write(target) as file:
        file.write(b"\x00\r\n\xff")
        assert not target.exists()
    assert target.read_bytes() == b"\x00\r\n\xff"
    with files.atomic_write(str(target), "w") as file:
        file.write("é\nline\r\n")
    assert target.read_bytes() == "é\nline\r\n".encode()
    with files.atomic_write(epath.Path(target)) as file:
        file.write(b"1")
    assert target.read_bytes() == b"1"
    assert only_entries(target.parent) == [target.name]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_write_keeps_the_old_file_when_the_body_raises(tmp_path, error):
    target = tmp_path / "a"
    target.write_text("old")

    def write_half():
        with files.atomic_write(target) as file:
            file.write(b"new")
            raise error("stop")

    with pytest.raises(error, match="stop"):
        write_half()
    assert target.read_text() == "old"
    assert only_entries(tmp_path) == ["a"]


def test_full_disk_names_the_file_and_keeps_the_old_one(tmp_path, monkeypatch):
    target = tmp_path / "result.json"
    target.write_text("old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*result\.json") as caught:
        files.write_json(target, {"a": 1})
    assert caught.value.errno == errno.ENOSPC
    assert target.read_text() == "old"
    assert only_entries(tmp_path) == ["result.json"]


def test_error_of_another_file_in_the_body_stays_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, files.atomic_write(tmp_path / "a") as file:
        file.write((tmp_path / "missing").read_bytes())
    assert caught.value.filename == str(tmp_path / "missing")


def test_unwritable_folder_names_the_file(tmp_path, unprivileged):
    del unprivileged
    locked = tmp_path / "locked"
    if os.geteuid() == os.getuid():
        locked.mkdir()
        locked.chmod(0o500)
    with (
        pytest.raises(PermissionError, match="Permission denied") as caught,
        files.atomic_write(locked / "a"),
    ):
        pass
    assert str(tmp_path) in caught.value.filename


def test_a_file_in_the_way_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"), files.atomic_write(tmp_path / "file" / "a"):
        pass
    with pytest.raises(IsADirectoryError), files.atomic_write(tmp_path):
        pass
    with (
        pytest.raises(NotADirectoryError, match="expected a folder"),
        files.run_folder(tmp_path / "file", {}),
    ):
        pass


def test_permissions_follow_the_umask_or_the_old_file(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_json(tmp_path / "new", 1)
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640
    (tmp_path / "new").chmod(0o604)
    files.write_json(tmp_path / "new", 2)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o604


def test_links_are_followed_and_devices_refused(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    files.write_json(tmp_path / "link", 3)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "3\n"
    with pytest.raises(ValueError, match="not a plain file"), files.atomic_write("/dev/null"):
        pass


def test_bad_modes_and_paths(tmp_path):
    with pytest.raises(ValueError, match='expected "wb"'):
        files.atomic_write(tmp_path / "a", "a")  # pyright: ignore
    with pytest.raises(ValueError, match="only local"):
        files.local_path("gs://bucket/a")
    with pytest.raises(ValueError, match="empty path"):
        files.local_path("")
    assert files.local_path("~/a") == pathlib.Path.home() / "a"


def test_write_json_values(tmp_path):
    value = {
        "nan": float("nan"),
        "nested": (np.float32(0.5), [np.inf, {"x": np.array([[1, 2]], np.int64)}]),
        "flags": [True, np.bool_(False), None, np.int8(-3)],
        "half": np.asarray([0.1, np.nan], ml_dtypes.bfloat16),
        "path": pathlib.PurePosixPath("a/ü"),
        3: "\N{SNOWMAN}\udcff",
    }
    files.write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "nan": None,
        "nested": [0.5, [None, {"x": [[1, 2]]}]],
        "flags": [True, False, None, -3],
        "half": [0.10009765625, None],
        "path": "a/ü",
        "3": "\N{SNOWMAN}\udcff",
    }


@pytest.mark.parametrize("value", [{1, 2}, b"x", np.array([b"a"]), np.array([1j]), object()])
def test_write_json_refuses_what_json_cannot_hold(tmp_path, value):
    (tmp_path / "a").write_text("old")
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        files.write_json(tmp_path / "a", {"v": value})
    assert (tmp_path / "a").read_text() == "old"


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()
    # FIPS 180-4, one-block message.
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256(str(tmp_path / "a")).startswith("ba7816bf8f01cfea")
    with pytest.raises(FileNotFoundError):
        files.sha256(tmp_path / "missing")


def test_run_folder_first_and_second_run(tmp_path):
    folder = tmp_path / "runs" / "größe 1"
    flags = {"sparsity": (0.1, 0.5), "model": None, "seed": np.int32(3)}
    plain = {"sparsity": [0.1, 0.5], "model": None, "seed": 3}
    with files.run_folder(folder, flags) as run:
        assert run.previous is None
        assert run.path == folder
        assert json.loads((folder / "summary.json").read_text()) == {"schema": 1, "flags": plain}
        run.write_summary({"subjects": [{"bias": float("nan")}], "flags": "mine"})
    with files.run_folder(str(folder), flags) as run:
        assert run.previous == {"schema": 1, "flags": plain, "subjects": [{"bias": None}]}
        # Starting again loses nothing.
        assert json.loads((folder / "summary.json").read_text()) == run.previous


def test_run_folder_refuses_another_command(tmp_path):
    with files.run_folder(tmp_path, {"seed": 0, "rest": False, "old": "x"}) as run:
        run.write_summary({"done": True})
    before = (tmp_path / "summary.json").read_bytes()
    with (
        pytest.raises(ValueError, match="another run") as caught,
        files.run_folder(tmp_path, {"seed": 1, "rest": False, "new": [2]}),
    ):
        pass
    message = str(caught.value)
    assert "seed was 0, now 1" in message
    assert 'old was "x", now not given' in message
    assert "new was not given, now [2]" in message
    assert "rest" not in message
    assert "\n" not in message
    assert (tmp_path / "summary.json").read_bytes() == before


def test_run_folder_refuses_the_folder_of_somebody_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"thesis\.tex"), files.run_folder(tmp_path, {}):
        pass
    assert only_entries(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b'{"schema": 1, "fla', "not JSON"),
        (b"\xff\xfe\x00", "not text"),
        (b"[1]", "not the summary"),
        (b'{"a": 1}', "not the summary"),
        (b'{"schema": 2, "flags": {}}', "layout 2, this version writes 1"),
    ],
)
def test_run_folder_refuses_an_unreadable_summary(tmp_path, content, message):
    (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(ValueError, match=message), files.run_folder(tmp_path, {}):
        pass
    assert (tmp_path / "summary.json").read_bytes() == content
    assert only_entries(tmp_path) == ["summary.json"]


def test_run_folder_removes_what_a_killed_run_left(tmp_path):
    left = tmp_path / "raw-data" / ".topk_jax-0123456789abcdef.partial"
    with files.run_folder(tmp_path, {}):
        left.parent.mkdir()
        left.write_text("half")
        (tmp_path / "raw-data" / "whole.csv").write_text("a")
    with files.run_folder(tmp_path, {}):
        assert only_entries(left.parent) == ["whole.csv"]


def test_run_folder_killed_before_its_summary_is_free(tmp_path):
    (tmp_path / ".lock").write_text("1\n")
    (tmp_path / ".topk_jax-0123456789abcdef.partial").write_text("half")
    with files.run_folder(tmp_path, {"a": 1}) as run:
        assert run.previous is None
    assert only_entries(tmp_path) == [".lock", "summary.json"]


HOLD = """
import sys
from topk_jax import files
with files.run_folder(sys.argv[1], {"a": 1}):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_run_folder_lock_against_another_process_and_its_death(tmp_path):
    folder = tmp_path / "run"
    root = str(pathlib.Path(files.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        env=os.environ | {"PYTHONPATH": root},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(BlockingIOError, match=f"in use by process {holder.pid}"),
            files.run_folder(folder, {"a": 1}),
        ):
            pass
        holder.kill()
    with files.run_folder(folder, {"a": 1}) as run:
        assert run.previous == {"schema": 1, "flags": {"a": 1}}


def test_run_folder_lock_within_one_process(tmp_path):
    caught = []

    def second():
        try:
            with files.run_folder(tmp_path, {}):
                pass
        except BlockingIOError as error:
            caught.append(str(error))

    with files.run_folder(tmp_path, {}):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(caught) == 1
    assert str(tmp_path) in caught[0]
    second()
    assert len(caught) == 1


def test_run_folder_on_a_full_disk_names_the_folder(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(OSError, match="No space left") as caught,
        files.run_folder(tmp_path / "r", {}),
    ):
        pass
    assert str(tmp_path / "r") in str(caught.value)
    monkeypatch.undo()
    with files.run_folder(tmp_path / "r", {}) as run:
        assert run.previous is None


def test_run_folder_without_locks_warns_and_goes_on(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    with files.run_folder(tmp_path, {}) as run:
        assert run.previous is None
    assert "no locks" in caplog.text
