"""Settings for every test: eight CPU devices, strict promotion, warnings as errors (pyproject)."""

import atexit
import os
import pathlib
import shutil
import signal
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # What one test compiled no other one of this run compiles again, in whichever process: workers
    # of pytest-xdist and scripts under test inherit the variables.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="topk_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import chex
import jax
import pytest

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell starts background jobs deaf to Ctrl-C, and the scripts under test would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

chex.set_n_cpu_devices(8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """Folder of the real images, weights and reference results."""
    folder = os.environ.get("TOPK_JAX_SHARED")
    if not folder:
        pytest.skip("TOPK_JAX_SHARED is not set: the real images and weights are not here")
    path = pathlib.Path(folder).resolve()
    if not path.is_dir():
        pytest.fail(f"TOPK_JAX_SHARED={folder} is not a folder")
    return path
