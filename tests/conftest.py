"""Test session set-up: eight CPU devices, quick compilation, programs kept between runs, x64 as a fixture."""

import functools
import gc
import os
import threading
from pathlib import Path

import hypothesis
import jax
import pytest
from compiling import AS_IN_USE, QUICKLY, as_flags

try:
    from jax._src.interpreters import mlir  # private to JAX, and no more than a saving
except ImportError:
    mlir = None

hypothesis.settings.register_profile("project", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("project")


def pytest_addoption(parser):
    parser.addoption(
        "--random-examples", type=int, default=2000, help="how many test_random_chains.py draws in all"
    )
    parser.addoption(
        "--no-compilation-cache", action="store_true", help="compile everything again, and keep nothing"
    )
    parser.addoption(
        "--optimize", action="store_true", help="compile as XLA does by default: takes five times as long"
    )


def pytest_configure(config):
    """Sets up XLA before it starts.

    Compiled programs are kept under .pytest_cache: workers share them, and the next run finds them.
    """
    if _make_ir_context is not None:
        mlir.make_ir_context = _ir_context
    devices, own = "--xla_force_host_platform_device_count=8", os.environ.get("XLA_FLAGS", "")
    if devices not in own:  # a worker of pytest-xdist inherits them
        options = {} if config.getoption("--optimize") else QUICKLY
        os.environ["XLA_FLAGS"] = f"{devices} {as_flags(options)} {own}".strip()  # the user's last: they win
    if config.getoption("--no-compilation-cache"):
        jax.config.update("jax_enable_compilation_cache", False)
        return
    folder = jax.config.jax_compilation_cache_dir or str(Path(config.rootpath, ".pytest_cache", "compiled"))
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)  # for what tests start as processes of their own


_make_ir_context = getattr(mlir, "make_ir_context", None)


_kept = threading.local()  # a context is for one thread at a time


def _ir_context():
    """JAX makes one for each program, which takes a fifth of the time of a small one."""
    if not hasattr(_kept, "context"):
        _kept.context = _make_ir_context()
    return _kept.context


def pytest_collection_finish():
    """Leaves alone what is loaded: walking all of it again and again takes a twentieth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keeps together what shares fixtures and compiled programs: a file, or a case of the contracts.

    Small groups come last: the chains, which share nothing, keep all workers busy to the end.
    """
    from cases import CASES
    from xdist.scheduler import LoadScopeScheduling

    names = {case.name for case in CASES}

    class ByFileOrCase(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            if file.endswith("test_random_chains.py"):
                return nodeid
            name = names.intersection(test.rpartition("[")[2].rstrip("]").split("-"))
            return f"{file}::{name.pop()}" if name else file

    if config.getoption("dist") == "load":  # what -n asks for
        return ByFileOrCase(config, log)


MOST_TESTS = 1200  # whose programs a worker holds at a time: those of the whole suite are many gigabytes
_held = 0


def pytest_runtest_teardown(item, nextitem):
    """Forgets compiled programs now and then; the next tests read back those that they need."""
    global _held
    _held += 1
    if _held >= MOST_TESTS:
        jax.clear_caches()
        vars(_kept).clear()
        _held = 0


@pytest.fixture
def random_examples(request) -> int:
    """The value of `--random-examples`."""
    return request.config.getoption("--random-examples")


@pytest.fixture
def optimized(monkeypatch):
    """Compiles as in use: what is promised of the bits of different programs holds for these."""
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=AS_IN_USE))


@pytest.fixture
def x64():
    """Enables 64-bit types for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """Each of the two, with 64-bit types enabled for the wider one."""
    if request.param == "float64":
        request.getfixturevalue("x64")
    return request.param
