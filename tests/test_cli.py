import os
import pathlib
import pty
import re
import signal
import struct
import subprocess
import sys
import time

import jax
import pytest

from topk_jax import cli

ROOT = pathlib.Path(cli.__file__).parents[1]

# Without __init__.py, which imports all of the library: that takes two seconds, and what happens to
# flags and errors in `cli` does not depend on it.
CLI_ALONE = f"""
import sys, types
package = types.ModuleType("topk_jax")
package.__path__ = [{str(ROOT / "topk_jax")!r}]
sys.modules["topk_jax"] = package
"""

SCRIPT = '''"""Counts to 100 %.

A second paragraph."""
import sys
from absl import app, flags, logging
from topk_jax import cli
from ml_collections import config_flags

FLAGS = flags.FLAGS
flags.DEFINE_integer("batch_size", 64, "Images a batch.")
flags.DEFINE_string("code", "", "What to do.")
flags.DEFINE_string("must", None, "Has to be there.", required="--needs" in sys.argv)
flags.DEFINE_bool("needs", False, "Makes --must a must.")
config_flags.DEFINE_config_file("config", None, "Configuration.")

def main(argv):
    print("main was called")
    exec(FLAGS.code, globals())

if __name__ == "__main__":
    cli.run(main)
'''

CONFIG = """
from ml_collections import config_dict
def get_config():
    return config_dict.ConfigDict({"rate": 0.1})
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "config.py").write_text(CONFIG)
    path = folder / "count.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(scope="module")
def light_script(script):
    """The script with `cli` as all it imports of the library."""
    path = script.with_name("light.py")
    docstring, code = SCRIPT.split("import sys\n", 1)
    path.write_text(docstring + CLI_ALONE + code)
    return path


def command(script, *arguments):
    # ml_collections loads configurations the old way.
    warnings = "error,ignore:the load_module:DeprecationWarning"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": warnings}
    return {"args": [sys.executable, str(script), *arguments], "env": environment}


def call(script, *arguments, **options):
    return subprocess.run(
        **command(script, *arguments), capture_output=True, text=True, timeout=60, **options
    )


def test_help_prints_docstring_flags_and_defaults(script):
    for flag in ("--help", "--helpfull"):
        done = call(script, flag)
        assert done.returncode == 0
        assert "Counts to 100 %.\n\nA second paragraph." in done.stdout
        assert re.search(r"--batch_size: Images a batch.\n\s+\(default: '64'\)", done.stdout)
        assert "--compilation_cache_dir" in done.stdout
        assert "main was called" not in done.stdout
        assert done.stderr == ""


def test_success_and_own_exit_code(script):
    done = call(script, "--batch_size=3", "--code=assert FLAGS.batch_size == 3; print(__name__)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "main was called\n__main__\n", "")
    assert call(script, "--code=sys.exit(7)").returncode == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bath_size=3"], "Unknown command line flag 'bath_size'. Did you mean: batch_size; "),
        (["--batch_size=many"], "flag --batch_size=many: invalid literal"),
        (["--needs"], "--must must have a value"),
        (["one", "two words"], "unexpected argument 'one two words'; flags are written --name="),
        (["--config=CONFIG", "--config.ratte=1"], 'Did you mean "rate"'),
        (["--config=CONFIG", "--config.rate=fast"], "--config.rate=fast"),
    ],
)
def test_bad_flags_are_one_line_and_exit_2(light_script, arguments, message):
    config = str(light_script.parent / "config.py")
    done = call(light_script, *(argument.replace("CONFIG", config) for argument in arguments))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("code", "exit_code", "message"),
    [
        ("raise ValueError('bad\\n  news')", 2, "error: bad news"),
        ("open('/no where')", 2, "error: /no where: No such file or directory"),
        ("open('/')", 2, "error: /: Is a directory"),
        (
            "raise PermissionError(13, 'Permission denied', b'/a')",
            2,
            "error: /a: Permission denied",
        ),
        ("raise app.UsageError('not both')", 2, "error: not both"),
        ("FLAGS['batch_size'].parse('x')", 2, "error: flag --batch_size=x: invalid literal"),
        ("raise ValueError", 2, "error: ValueError"),
        (
            "raise OSError(28, 'No space left on device', '/run/a')",
            1,
            "error: /run/a: No space left on device",
        ),
        ("raise BlockingIOError('in use by process 3')", 1, "error: in use by process 3"),
        ("raise RuntimeError('RESOURCE_EXHAUSTED: Out\\nof memory')", 1, "error: RESOURCE_EXHAUST"),
        ("raise MemoryError", 1, "error: out of memory"),
        ("raise ConnectionError('no route')", 1, "error: no route"),
        ("raise BrokenPipeError(32, 'Broken pipe')", 1, "error: [Errno 32] Broken pipe"),
        ("raise KeyboardInterrupt", 130, "interrupted; "),
    ],
)
def test_expected_errors_are_one_line(light_script, code, exit_code, message):
    done = call(light_script, f"--code={code}")
    assert done.returncode == exit_code
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert done.stdout == "main was called\n"


def test_long_failures_are_cut(light_script):
    done = call(light_script, "--code=raise RuntimeError('word ' * 5000)")
    assert done.returncode == 1
    assert len(done.stderr) < 700
    assert "--verbosity=1 shows all" in done.stderr


@pytest.mark.parametrize("error", ["KeyError('a')", "NotImplementedError('a')", "TypeError('a')"])
def test_bugs_keep_their_traceback(light_script, error):
    done = call(light_script, f"--code=raise {error}")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert error.replace("('a')", ": ") in done.stderr


def test_verbosity_shows_the_traceback_before_the_line(script):
    done = call(script, "--verbosity=1", "--code=raise ValueError('bad news')")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "error: bad news"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("count", [3, 100_000])
def test_reader_that_goes_away(script, light_script, unbuffered, count):
    # Once with what the whole library leaves to be done at exit.
    chosen = script if count == 3 and not unbuffered else light_script
    options = command(chosen, f"--code=sys.stdin.read(1)\nfor i in range({count}): print(i)")
    options["env"]["PYTHONUNBUFFERED"] = unbuffered
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(**options, **pipes, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stdin is not None
        process.stdin.write("g")
        process.stdin.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("count", [3, 100_000])
def test_output_on_a_full_disk(light_script, count):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            **command(light_script, f"--code=for i in range({count}): print(i)"),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "No space left on device" in done.stderr
    assert done.stderr.count("\n") == 1


def test_ctrl_c_in_the_middle_of_parallel_work(script):
    # One write a line: two threads that print get between each other's number and line end.
    code = """
import os, time
from topk_jax import images
def work(index):
    os.write(1, b"%d\\n" % index)
    time.sleep(0.1)
for _ in images.map_parallel(work, range(10_000), workers=2):
    pass
"""
    with subprocess.Popen(
        **command(script, f"--code={code}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert "3\n" in iter(process.stdout.readline, "")
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "interrupted; finished work is kept\n"
    assert time.monotonic() - start < 5


def test_cli_alone_does_not_import_jax():
    code = f"""{CLI_ALONE}
from topk_jax import cli
heavy = {{"jax", "numpy", "matplotlib", "tensorflow"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- flags ---------------------------------------------------------------------------------------


def test_parse_fractions():
    assert cli.parse_fractions("0.5,0.1") == (0.5, 0.1)
    assert cli.parse_fractions(" 1, 5e-2 ,.3") == (1.0, 0.05, 0.3)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("0", "'0'"),
        ("-1", "'-1'"),
        ("0.1,1.5", "'1.5'"),
        ("abc", "'abc'"),
        ("nan", "'nan'"),
        ("inf", "'inf'"),
        ("", "''"),
        ("0.1,,0.2", "''"),
        ("0.1 0.2", "'0.1 0.2'"),
        ("10%", "'10%'"),
        ("1e-999", "'1e-999'"),
    ],
)
def test_parse_fractions_refuses(text, part):
    with pytest.raises(ValueError, match="more than 0 and at most 1") as caught:
        cli.parse_fractions(text, flag="keep")
    assert str(caught.value).startswith(f"--keep={text}: {part} is not a fraction")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["0.1,0.10", "0.2,.5,0.5", "0.1,0.10000000001"])
def test_parse_fractions_refuses_the_same_twice(text):
    with pytest.raises(ValueError, match="is there twice"):
        cli.parse_fractions(text)


def test_device_line():
    assert cli.device_line() == f"cpu, {jax.device_count()} devices, jax {jax.__version__}"


# --- lists, counts and sizes -------------------------------------------------------------------


def test_counts():
    assert cli.parse_counts(["0", " 7", "2"], flag="seeds", least=0) == (0, 7, 2)
    assert cli.parse_counts([], flag="seeds") == ()
    for words in (["-1"], ["0"], ["1", "1"], ["x"], ["1.5"], [""], ["4294967296"]):
        with pytest.raises(ValueError, match=r"--seeds=.*: expected whole numbers from 1 on"):
            cli.parse_counts(words, flag="seeds")


def test_choices():
    assert cli.parse_choices(["b", " a"], ("a", "b", "c"), flag="mode") == ("b", "a")
    for words in ([], ["d"], ["a", "a"], [""]):
        with pytest.raises(ValueError, match=r"--mode=.*: expected a, b, c, each at most once"):
            cli.parse_choices(words, ("a", "b", "c"), flag="mode")


def test_sizes_are_short_sides_or_width_and_height():
    assert cli.parse_size("256") == 256
    assert cli.parse_size("320x240") == (240, 320)
    for text in ("", "0", "320x", "x", "1x2x3", "-4", "3.5", "axb", "0x4"):
        with pytest.raises(ValueError, match=rf"--size={text}: expected pixels"):
            cli.parse_size(text)


def test_one_fraction():
    assert cli.parse_fraction("0.05") == 0.05
    with pytest.raises(ValueError, match=r"--sparsity=0.1,0.2: expected one fraction"):
        cli.parse_fraction("0.1,0.2")
    with pytest.raises(ValueError, match="'2' is not a fraction to keep"):
        cli.parse_fraction("2")


# --- progress ------------------------------------------------------------------------------------


def test_progress_off_a_terminal(capsys, monkeypatch):
    clock = iter([0.0, 4.0, 10.0, 15.0, 20.0, 500.0, 530.0, 560.0, 560.0])
    now = [0.0]

    def monotonic():
        return now[0]

    monkeypatch.setattr(cli.time, "monotonic", monotonic)
    seen = []
    for item in cli.progress(list("abcdefg"), desc="work", unit="batch"):
        seen.append(item)
        now[0] = next(clock)
    assert "".join(seen) == "abcdefg"
    assert capsys.readouterr().err == (
        "work: 3/7, 10.0 s, 0.3 batch/s\n"
        "work: 5/7, 20.0 s, 0.25 batch/s\n"
        "work: 6/7, 500.0 s, 0.012 batch/s\n"
        "work: 7/7, 530.0 s, 0.0132 batch/s\n"
    )


def test_progress_of_an_iterator_of_unknown_length(capsys):
    assert list(cli.progress(iter("ab"))) == ["a", "b"]
    assert re.fullmatch(r"2, 0\.\d s, \S+ it/s\n", capsys.readouterr().err)
    assert list(cli.progress([], desc="none")) == []
    assert capsys.readouterr().err.startswith("none: 0/0, ")


def test_progress_of_items_that_say_how_far_they_are(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    items = [40, 45, 52, 60]  # a run that is continued: 40 were done before
    for _ in cli.progress(
        iter(items), total=60, unit="evaluation", position=int, note=lambda item: f"loss {item}"
    ):
        now[0] += 6.0
    assert capsys.readouterr().err == (
        "45/60, 12.0 s, 0.417 evaluation/s, loss 45\n60/60, 24.0 s, 0.833 evaluation/s, loss 60\n"
    )


def test_progress_bar_on_a_terminal_ends_before_the_error(light_script):
    termios = pytest.importorskip("termios")
    fcntl = pytest.importorskip("fcntl")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    code = """
bar = cli.progress(range(4), desc="halfway")  # the name keeps it open
for item in bar:
    if item == 2: raise ValueError("stop")
"""
    with subprocess.Popen(
        **command(light_script, f"--code={code}"), stdout=subprocess.DEVNULL, stderr=theirs
    ) as process:
        os.close(theirs)
        output = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # Linux says so when the other side is closed
                break
            if not piece:
                break
            output += piece
    os.close(ours)
    assert process.returncode == 2
    text = output.decode()
    assert "halfway:" in text
    assert "4 [" in text
    assert text.endswith("\r\nerror: stop\r\n")


# --- compilation cache ---------------------------------------------------------------------------

NAMES = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def jax_config(monkeypatch):
    """Restores JAX's settings of the cache, and JAX's own variable is not set."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = {name: getattr(jax.config, name) for name in NAMES}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_compilation_cache_folder(tmp_path, monkeypatch, jax_config):
    del jax_config
    monkeypatch.setenv("TOPK_JAX_CACHE", str(tmp_path / "ours"))
    folder = cli.enable_compilation_cache()
    assert folder is not None
    assert folder.is_dir()
    assert folder.is_relative_to(tmp_path / "ours")
    assert re.match(rf"{re.escape(jax.lib.__version__)}-.*-[0-9a-f]{{12}}$", folder.name)
    assert cli.enable_compilation_cache() == folder
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
    assert jax.config.jax_persistent_cache_min_entry_size_bytes == -1
    assert cli.enable_compilation_cache(str(tmp_path / "given")) == tmp_path / "given"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "jax's"))
    assert cli.enable_compilation_cache() == tmp_path / "jax's"


def test_no_compilation_cache(tmp_path, jax_config, caplog):
    del jax_config
    assert cli.enable_compilation_cache("") is None
    assert jax.config.jax_enable_compilation_cache is False
    (tmp_path / "file").write_text("")
    with caplog.at_level("INFO", "absl"):
        assert cli.enable_compilation_cache(str(tmp_path / "file" / "folder")) is None
    assert "No compilation cache" in caplog.text
    assert jax.config.jax_enable_compilation_cache is False


def test_second_process_finds_the_programs(script, tmp_path):
    code = """
import jax
cli.enable_compilation_cache(FLAGS.compilation_cache_dir)
jax.jit(lambda x: x * 2 + 1)(jax.numpy.ones(3)).block_until_ready()
"""
    arguments = [f"--compilation_cache_dir={tmp_path}/new", f"--code={code}"]
    contents = []
    for _ in range(2):
        done = call(script, *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        contents.append({p.name: p.stat().st_mtime_ns for p in (tmp_path / "new").glob("*-cache")})
    assert contents[0]
    assert contents[0] == contents[1]
