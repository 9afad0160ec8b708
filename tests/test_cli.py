"""The command line, called as a user calls it."""

import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adaptive_optax import study
from adaptive_optax.study.cli import app

MODULE = """
import jax, jax.numpy as jnp, numpy as np
from adaptive_optax import study

x = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
data = {"x": x, "y": x @ np.arange(3, dtype=np.float32)}


def make():
    return study.Task(
        init=lambda key: jax.random.normal(key, (3,)),
        loss=lambda w, batch, key: jnp.mean((batch["x"] @ w - batch["y"]) ** 2) + 0.1,
        train=data, validation=data, batch_size=8, name="a regression",
    )


task = make()
number = 3
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("mine", None)


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], terminal_width=80)


QUICK = ("--steps", 30, "--seeds", 5, "--tuning-seeds", 2, "--rates", "0.03,0.1,0.3", "--mode", "scan")


@pytest.mark.parametrize("name", ["mine:task", "mine:make", "mine.py:task"])
def test_compare_ends_in_a_report(name):
    result = call("compare", name, *QUICK, "--arms", "adam:constant,adam:one_cycle", "--out", "report")
    assert result.exit_code == 0, result.output
    out = Path("report")
    html = (out / "report.html").read_text()
    comparison = study.load(out / "comparison.npz")
    assert "a regression" in html
    assert comparison.verdict().decision in result.output
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "trials.csv").read_text().splitlines()) == 1 + len(comparison.table)
    again = call("compare", name, *QUICK, "--arms", "adam:constant,adam:one_cycle", "--out", "report")
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mine:nothing"], "module 'mine' has no 'nothing'"),
        (["mine:number"], "mine:number must be a study.Task or make one, got int"),
        (["absent:task"], "'absent' cannot be imported: No module named 'absent'"),
        (["absent.py:task"], "'absent.py' cannot be imported"),
        (["mine"], "MODULE:TASK must name a module and a task in it, got 'mine'"),
        (["mine:task", "--arms", "adam:constant,adam:sideways"], "the schedule must be one of"),
        (["mine:task", "--arms", "sgd:cosine,sgd:cosine"], "arms must differ, got 'sgd:cosine' twice"),
        (["mine:task", "--arms", "adam:constant"], "arms must be at least two"),
        (["mine:task", "--rates", "fast"], "--learning-rates must be numbers separated by commas"),
        (["mine:task", "--rates", "-1"], "learning_rates must be positive"),
        (["mine:task", "--seeds", "3"], "seeds must be an integer in [5, inf), got 3"),
        (["mine:task", "--steps", "0"], "steps must be an integer"),
        (["mine:task", "--mode", "fast"], "mode must be one of"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(arguments, message):
    result = call("compare", *arguments)
    assert result.exit_code == 2
    assert result.output.count("\n") == 1 and "Traceback" not in result.output
    assert message in result.output


def test_a_wrong_option_is_exit_code_2():
    assert call("compare", "mine:task", "--steps", "many").exit_code == 2
    assert call("compare").exit_code == 2
    assert call("lr-find", "mine:task", "--optimizer", "adamm").exit_code == 2


def test_lr_find():
    result = call("lr-find", "mine:task", "--low", 1e-4, "--high", 10, "--out", "found")
    assert result.exit_code == 0, result.output
    assert Path("found/lr_find.png").read_bytes().startswith(b"\x89PNG")
    assert Path("found/lr_find.csv").exists()


@pytest.mark.parametrize("command", [[], ["compare"], ["lr-find"]])
def test_help_reads_well(command):
    result = call(*command, "--help")
    assert result.exit_code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    assert max(map(len, text.splitlines())) <= 80
    assert "MODULE:TASK" in text or not command


def test_an_interrupted_comparison_says_what_is_kept(monkeypatch):
    from adaptive_optax.study import trials

    run, calls = trials.Program.run, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return run(self, *arguments)

    monkeypatch.setattr(trials.Program, "run", interrupted)
    result = call("compare", "mine:task", *QUICK, "--out", "report")
    assert result.exit_code == 130
    assert "Stopped after" in result.output and "goes on from there" in result.output
