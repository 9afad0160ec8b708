"""The character model of the examples: killed at random moments, stopped, damaged and trained on."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SMALL = ["--steps", "60", "--save-every", "5", "--width", "8", "--layers", "1"]


def command(*options):
    return [sys.executable, "examples/char_lm_linen.py", *SMALL, *map(str, options)]


def checksums(text):
    return re.findall(r"Checksum of the parameters: (\w{8})", text)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The output of an undisturbed run, that of one with ten kills, their curves, and the folder of both.

    A test may go on with the run that was killed, so its curve is read here.
    """
    out, rng = tmp_path_factory.mktemp("char_lm"), np.random.default_rng(0)
    undisturbed = run("--out", out / "undisturbed")
    assert undisturbed.returncode == 0, undisturbed.stderr
    outputs = []
    for i in range(10):
        process = subprocess.Popen(
            command("--out", out / "killed"),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        begun = process.stdout.readline()  # "Step 0 of 60: begins."
        newest = saved(out / "killed")
        while i % 2 and saved(out / "killed") == newest and process.poll() is None:
            time.sleep(0.005)  # every other kill comes once something has been saved
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        outputs.append((begun + process.communicate()[0], process.returncode))
    last = run("--out", out / "killed")
    assert last.returncode == 0, last.stderr
    curves = [(out / name / "curve.csv").read_bytes() for name in ("undisturbed", "killed")]
    return undisturbed.stdout, [*outputs, (last.stdout, 0)], curves, out


def saved(folder):
    path = folder / "checkpoints"
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit()) if path.exists() else []


def test_ten_kills_change_no_bit(runs):
    undisturbed, outputs, curves, out = runs
    assert checksums(outputs[-1][0]) == checksums(undisturbed)
    assert sum(code == -signal.SIGKILL for _, code in outputs) >= 8, outputs
    assert sum("resumed" in text for text, _ in outputs) >= 4, outputs
    assert curves[0] == curves[1] and curves[0].count(b"\n") >= 60
    assert (out / "killed/curve.png").stat().st_size > 10_000


def run(*options):
    return subprocess.run(command(*options), cwd=ROOT, capture_output=True, text=True)


def test_a_finished_run_is_evaluated_and_trained_on_without_a_jump(runs):
    output, _, _, out = runs
    again = run("--out", out / "killed")
    assert again.returncode == 0, again.stderr
    assert "Step 60 of 60: finished" in again.stdout
    assert checksums(again.stdout) == checksums(output)[:1]

    longer = run("--out", out / "killed", "--steps", 80)
    assert longer.returncode == 0, longer.stderr
    assert "The run of 60 steps is planned anew for 80." in longer.stdout
    assert "Step 60 of 80: resumed" in longer.stdout
    rates = np.loadtxt(out / "killed/curve.csv", delimiter=",", usecols=(0, 2))
    assert rates[:, 0].tolist() == list(range(1, 81))
    assert rates[60, 1] == pytest.approx(rates[59, 1], abs=1e-6) and 1e-3 < rates[62:, 1].max() < 4e-3

    shorter = run("--out", out / "killed")
    assert shorter.returncode == 1 and "--steps must be at least 80" in shorter.stderr


def test_sigterm_saves_and_a_damaged_checkpoint_says_what_to_do(runs, tmp_path):
    output, _, _, _ = runs
    process = subprocess.Popen(command("--out", tmp_path), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "Step 0 of 60: begins.\n"
    while not (tmp_path / "checkpoints" / "5").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    stopped = process.communicate()[0]
    assert process.returncode == 0
    if "Stopped after step" in stopped:
        at = re.search(
            r"Stopped after step (\d+) and saved it; the same command goes on from there", stopped
        )[1]
    else:  # it was quicker
        at = "60"
    steps = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert steps[-1] == int(at)

    os.truncate(tmp_path / "checkpoints" / at / "state" / "manifest.ocdbt", 20)
    damaged = run("--out", tmp_path)
    assert damaged.returncode == 1 and "Traceback" not in damaged.stderr
    assert f"Checkpoint {at} in {tmp_path / 'checkpoints'} is damaged" in damaged.stderr
    assert f"restore(like, step={steps[-2]})" in damaged.stderr and "add --from-step" in damaged.stderr

    resumed = run("--out", tmp_path, "--from-step", steps[-2])
    assert resumed.returncode == 0, resumed.stderr
    assert f"Step {steps[-2]} of 60: resumed" in resumed.stdout
    assert checksums(resumed.stdout) == checksums(output)[:1]


@pytest.mark.parametrize("options", [("--steps", 7), ("--save-every", 0), ("--width", 6)])
def test_options_out_of_range(options, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import char_lm_linen

    errors = io.StringIO()
    with pytest.raises(SystemExit), contextlib.redirect_stderr(errors):
        char_lm_linen.main(list(map(str, options)))
    assert options[0] in errors.getvalue()
