"""Tables of the published studies, from what the examples wrote to `docs/STUDY/CASE/`."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.setting import origin
from benchmarks.tables import Table

PROJECT = Path(__file__).resolve().parent.parent
MEASURES = (
    "study.arms",
    "study.engine.runner",
    "study.engine.trainers",
    "study.statistics.judge",
    "study.statistics.race",
    "study.statistics.sequential",
    "study.statistics.tuning",
    "study.tasks",
)


class Study(NamedTuple):
    """A published study.

    Attributes:
        title: What it is, how it was measured, and links to its files, with {root} before their paths.
        table: One row per arm.
        facts: What else is said of it: a name and a number in each row.
        command: The example that runs it, and its options.
    """

    title: str
    table: Table
    facts: Table
    command: list[str]


def published(project: Path = PROJECT) -> dict[str, Study]:
    """Returns every study under `docs/`, by its folder: "should_i_decay/text"."""
    found = {}
    for path in sorted((project / "docs").glob("*/*/summary.json")):
        folder = path.parent.relative_to(project).as_posix()
        with (path.parent / "results.csv").open(newline="") as file:
            trials = list(csv.DictReader(file))
        summary = json.loads(path.read_text())
        if not (origin_of := path.parent / "setting.json").exists():
            raise ValueError(f"{origin_of} is missing; run python -m benchmarks --publish.")
        setting = json.loads(origin_of.read_text())
        found[folder.removeprefix("docs/")] = Study(
            _title(summary, trials, folder, setting),
            table(summary, trials),
            facts(summary, trials),
            _without_out(summary["info"]["command"]),
        )
    return found


def _without_out(command: list[str]) -> list[str]:
    """A command without the folder that it wrote to."""
    kept = [word for word in command if not word.startswith("--out=")]
    at = kept.index("--out") if "--out" in kept else len(kept)
    return kept[:at] + kept[at + 2 :]


def _title(
    summary: Mapping[str, Any], trials: list[dict[str, str]], folder: str, setting: dict[str, Any]
) -> str:
    info = summary["info"]
    epochs = info["steps"] * info["batch_size"] / info["dataset"]["train"]
    seeds = sorted({len(found) for found in _fresh_metrics(trials).values()})  # a plan may let arms differ
    settings = [
        f"{info['parameters']:,} parameters",
        f"{info['steps']:,} steps of {info['batch_size']} samples",
        f"{epochs:.2g} epochs",
        f"{f'{seeds[0]} to ' * (len(seeds) > 1)}{seeds[-1]} seeds",
        origin(setting),
    ]
    files = {"trials": "results.csv", "numbers": "summary.json", "report": "report.html"}
    links = ", ".join(f"[{name}]({{root}}{folder}/{file})" for name, file in files.items())
    return f"{info['task'].capitalize()} ({', '.join(settings)}; {links}):"


def table(summary: Mapping[str, Any], trials: list[dict[str, str]]) -> Table:
    """Returns a table with one row per arm.

    Args:
        summary: The study's summary.json.
        trials: The rows of its results.csv.
    """
    info, verdicts, metrics = summary["info"], summary["verdicts"], _fresh_metrics(trials)
    metric, baseline = info["metric_name"].replace("_", " "), info["baseline"]
    counts = {}
    if "updates" in summary:
        counts["updates"] = summary["updates"]
    if info.get("sequential"):
        counts["seeds"] = {arm: len(found) for arm, found in metrics.items()}
    made = Table(info["task"], ["arm", "peak", *counts, metric, f"minus {baseline}, %", "verdict"])
    for arm in info["arms"]:
        error = np.std(metrics[arm], ddof=1) / np.sqrt(len(metrics[arm]))
        cells = [arm, f"{info['best_rates'][arm]:g}", *(f"{count[arm]:,}" for count in counts.values())]
        cells.append(f"{np.mean(metrics[arm]):.3f} ± {error:.3f}")
        made.add(*cells, *(("", "baseline") if arm == baseline else _judged(verdicts[arm])))
    return made


def facts(summary: Mapping[str, Any], trials: list[dict[str, str]]) -> Table:
    """Returns the numbers that belong to no arm alone: trials run, and the updates that an arm saves."""
    info, made = summary["info"], Table(summary["info"]["task"], ["what", "number"])
    whole = info["tuning_seeds"] * sum(len(rates) for rates in info["grid"].values())
    whole += max(info["looks"] or [info["seeds"]]) * len(info["arms"])
    made.add("trials", str(len(trials)))
    made.add("trials, % of the whole grid and all seeds", f"{100 * len(trials) / whole:.0f} %")
    updates = summary.get("updates", {})
    for arm, count in updates.items():
        made.add(f"updates saved by {arm}", f"{100 * (1 - count / max(updates.values())):.0f} %")
    return made


def _fresh_metrics(trials: list[dict[str, str]]) -> dict[str, list[float]]:
    """The final metrics on fresh seeds, by arm."""
    found: dict[str, list[float]] = {}
    for row in trials:
        if row["phase"] == "verdict":
            found.setdefault(row["arm"], []).append(float(row["final_metric"]))
    return found


def _judged(verdict: Mapping[str, Any]) -> tuple[str, str]:
    """The difference from the baseline with its interval, in percent of the baseline, and the decision."""
    unit = 100 * verdict["relative_effect"] / verdict["effect"] if verdict["effect"] else 0.0
    effect, low, high = (
        f"{unit * x:+.1f}".replace("-", "−") for x in (verdict["effect"], *verdict["interval"])
    )
    return f"{effect} [{low}, {high}]", verdict["decision"]
