"""The progress bar: what it shows in a terminal, and nothing elsewhere."""

import io

import pytest
from quadratic import constant, quadratic_task
from rich.console import Console

from adaptive_optax import study
from adaptive_optax.study.engine import progress as module
from adaptive_optax.study.engine.progress import TrialProgress


def compare(**keywords):
    return study.compare(
        quadratic_task(1.0, 0.1),
        {"one": constant, "two": constant},
        learning_rates=[0.1, 0.2, 0.4],
        steps=4,
        seeds=5,
        tuning_seeds=1,
        mode="scan",
        chunk=1,
        **keywords,
    )


def test_it_is_silent_where_there_is_no_terminal(capfd):
    compare()
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@pytest.fixture
def screen(monkeypatch):
    """What a terminal 100 columns wide would get."""
    written = io.StringIO()

    def console(**keywords):
        return Console(file=written, force_terminal=True, width=100)

    monkeypatch.setattr(module, "Console", console)
    return written


def test_it_shows_arm_trials_best_and_time_in_a_terminal(screen):
    comparison = compare()
    text = screen.getvalue()
    assert "two (verdict)" in text
    trials = len(comparison.table)
    assert f"{trials}/{trials} trials" in text
    assert "trials of 4 steps; the first took" in text
    assert "s per step: about" in " ".join(text.split())
    leader = comparison.summary["final_metric"].idxmin()
    assert f"leading: {leader} {comparison.summary['final_metric'].min():.4g} ± " in text
    assert "left" in text


def test_it_can_be_switched_off(screen):
    compare(progress=False)
    assert screen.getvalue() == ""


def test_parts_of_trials_add_up(screen):
    with TrialProgress(4) as bar:
        with bar.part(2) as reached:
            reached(0.5)
            reached(1.0)
        bar.extend(2)
        bar.advance(4)
    assert "6/6 trials" in screen.getvalue()
