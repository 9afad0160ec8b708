"""The progress of a study: a bar in a terminal, plain lines elsewhere."""

import io
import re
import time

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


def test_a_short_study_is_silent_where_there_is_no_terminal(capfd):
    compare()
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def slow(run):
    time.sleep(0.05)
    run.report(0, 5.0)
    return 1.0 + 0.1 * (run.seed % 7) + (run.arm == "two")


@pytest.mark.parametrize("progress", [None, False])
def test_a_long_study_writes_plain_lines_where_there_is_no_terminal(capfd, monkeypatch, progress):
    monkeypatch.setattr(module, "EVERY", 0.2)
    monkeypatch.setattr(module, "SHORT", 0.1)
    settings = {"learning_rates": [0.1], "steps": 4, "seeds": 5, "tuning_seeds": 1, "growth": 0}
    study.compare(slow, {"one": constant, "two": constant}, progress=progress, **settings)
    captured = capfd.readouterr()
    assert captured.out == ""
    if progress is False:
        assert captured.err == ""
        return
    first, *later = captured.err.splitlines()
    estimate = r"slow: 12 trials of 4 steps; the first took .* s per step: about .* of computing\."
    assert re.fullmatch(estimate, first)
    assert "compiling" not in first and later
    for line in later:
        assert re.match(r"slow: \d+ of 12 trials, .* s, about .* s left; leading: one 1", line), line


def test_what_a_folder_has_is_counted(tmp_path, screen):
    compare(out=tmp_path)
    screen.truncate(0)
    trials = len(compare(out=tmp_path).table)
    assert f"{trials}/{trials} trials" in screen.getvalue()


def test_the_estimate_leaves_out_what_was_finished_before(screen):
    with TrialProgress(72, steps=10, open_ended=True) as bar:
        bar.found(63)
        bar.took(2.0, 1)
        assert "about" not in bar.line
        bar.advance(1)
        assert re.search("64 of at least 72 trials, .* s, about .* s left for these", bar.line)
    text = " ".join(screen.getvalue().split())
    assert "at least 72 trials of 10 steps, 63 of them finished before; the first took 2 s" in text
    assert "0.2 s per step: about 18 s of computing for these." in text


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
    assert re.search(
        "s per step: about .* of computing for these", " ".join(text.split())
    )  # the grid may grow
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
