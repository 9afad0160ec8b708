"""Studies that are killed, resumed, changed, shared by processes, and distributed over hosts."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from compiling import QUICKLY, as_flags

from adaptive_optax import study
from adaptive_optax.study.engine.chunks import Curves, Key, pack, unpack
from adaptive_optax.study.engine.store import Store, write_atomically

SCRIPT = Path(__file__).with_name("study_process.py")


def start(result, *arguments):
    environment = os.environ | {"XLA_FLAGS": as_flags(QUICKLY), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, SCRIPT, result, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    output, error = process.communicate(timeout=180)
    assert process.returncode == 0, error
    return output, error


def assert_same(first, second):
    a, b = study.load(first), study.load(second)
    pd.testing.assert_frame_equal(a.table, b.table, check_exact=True)
    np.testing.assert_array_equal(a.validation_curves, b.validation_curves)
    np.testing.assert_array_equal(a.training_curves, b.training_curves)
    assert a.verdict().sentence == b.verdict().sentence


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The result of the study without a folder, in one go."""
    result = tmp_path_factory.mktemp("undisturbed") / "result.npz"
    finish(start(result))
    return result


def finished_chunks(out):
    return {path.name: path.stat().st_mtime_ns for path in out.glob("trials/*.npz")}


def test_a_killed_study_resumes_with_bit_identical_results(undisturbed, tmp_path):
    out, result = tmp_path / "out", tmp_path / "result.npz"
    process = start(result, "--out", out, "--slow", 0.3)
    deadline = time.monotonic() + 120
    while len(finished_chunks(out)) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = finished_chunks(out)
    finish(start(result, "--out", out))
    after = finished_chunks(out)
    assert {name: after[name] for name in before} == before  # nothing that was finished ran again
    assert len(after) > len(before)
    assert_same(result, undisturbed)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A finished study in a folder."""
    folder = tmp_path_factory.mktemp("kept")
    finish(start(folder / "result.npz", "--out", folder / "out"))
    return folder


CHANGES = {
    "loss": "changed: loss program",
    "arm": "changed: arm 'decayed' program.",
    "chunk": "chunk must be 2, as in the study already in out, got 3",
    "mode": "mode must be 'scan', as in the study already in out, got 'vmap'",
}


@pytest.fixture(scope="module")
def refusals(kept, tmp_path_factory):
    """Why each changed study is refused."""
    result = tmp_path_factory.mktemp("changed") / "result.npz"
    output, _ = finish(start(result, "--out", kept / "out", "--change", *CHANGES))
    return output.splitlines()


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_study_is_refused_with_what_changed(refusals, change):
    (line,) = (line for line in refusals if line.startswith(f"{change}: "))
    assert CHANGES[change] in line


def test_seeds_added_later_are_another_look(kept, tmp_path):
    before = finished_chunks(kept / "out")
    finish(start(tmp_path / "more.npz", "--out", kept / "out", "--seeds", 8))
    after = finished_chunks(kept / "out")
    assert {name: after[name] for name in before} == before
    first, more = study.load(kept / "result.npz"), study.load(tmp_path / "more.npz")
    assert first.info["looks"] == [5] and more.info["looks"] == [5, 8]
    fresh = more.table[more.table["phase"] == "verdict"]
    assert fresh.groupby("arm")["seed"].nunique().tolist() == [8, 8]
    again = fresh[fresh["seed"] < 1005].reset_index(drop=True)
    once = first.table[first.table["phase"] == "verdict"].reset_index(drop=True)
    pd.testing.assert_frame_equal(again, once, check_exact=True)
    # The same seeds a second time are no new look.
    finish(start(tmp_path / "again.npz", "--out", kept / "out", "--seeds", 5))
    assert study.load(tmp_path / "again.npz").info["looks"] == [5]
    # What a look costs: the p-value is doubled with each.
    table, arm = more.table, "decayed"
    alone = study.judge(table, baseline="constant", resamples=0)[arm].p_value
    assert more.verdicts[arm].p_value == pytest.approx(min(1.0, 4 * alone))


def test_processes_share_a_folder_and_no_trial_runs_twice(undisturbed, tmp_path):
    out = tmp_path / "out"
    results = [tmp_path / f"{name}.npz" for name in ("first", "second")]
    processes = [start(result, "--out", out, "--slow", 0.2) for result in results]
    for process in processes:
        finish(process)
    chunks = [unpack(path.read_bytes()) for path in out.glob("trials/*.npz")]
    assert sum(map(len, chunks)) == len(set().union(*chunks))
    for result in results:
        assert_same(result, undisturbed)


def test_two_distributed_processes_give_what_one_gives(undisturbed, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    results = [tmp_path / f"{k}.npz" for k in range(2)]
    processes = [start(result, "--process", k, "--port", port) for k, result in enumerate(results)]
    for process in processes:
        finish(process)
    for result in results:
        assert_same(result, undisturbed)


# ---- The parts ----


def test_pack_and_unpack():
    def record(*values):
        return Curves(*(np.array(value, np.float32) for value in values))

    results = {
        Key("a", 0.1, 3): record([0, 1, 2], [1.0, np.nan], [[np.nan, 1.0]]),
        Key("ä:b", 1e-300, 1000): record([1, 1, 1], [np.inf, 2.0], [[0.5, 0.25]]),
    }
    found = unpack(pack(results))
    assert found.keys() == results.keys()
    for key, expected in results.items():
        for ours, theirs in zip(found[key], expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def crash(*arguments):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="full"):
        write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"old"


def test_what_is_no_study_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out must be a folder that can be written to, got .*: it is a file"):
        Store(tmp_path / "file", {})
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / "x.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds trials without a study\.json"):
        Store(tmp_path, {})


def test_a_claim_is_held_until_it_is_let_go(tmp_path):
    keys = [Key("a", 0.1, 0)]
    with Store(tmp_path, {}).claim(keys) as first, Store(tmp_path, {}).claim(keys) as second:
        assert first and not second
    with Store(tmp_path, {}).claim(keys) as third:
        assert third


def test_processes_of_one_program_call_a_function_with_the_same_trials(tmp_path):
    results = [tmp_path / f"{k}.npz" for k in (0, 1)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    given = "--port", port, "--function", "--out", tmp_path / "out"
    for process in [start(result, "--process", k, *given) for k, result in enumerate(results)]:
        finish(process)
    assert_same(*results)
    found = study.load(results[0]).table
    assert not found["error"].any() and (found["final_metric"] == 1.0 + found["seed"]).all()
    assert len(finished_chunks(tmp_path / "out")) == len(found)
