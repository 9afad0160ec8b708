"""Should I decay Adam's learning rate? Asked of three small networks, and answered by measurement.

The question as first asked in public: someone trains an image-localization network with Adam, is told to add
exponential decay, and wonders whether to. Some answered that Adam needs none, others that it helped.

`--task localization` is such a network: it puts boxes around handwritten digits on noisy canvases. `--task
digits` reads noisy digits with convolutions and batch normalisation, although a fifth of its training labels
are wrong; its metric is the accuracy. `--task text` is a character-level transformer on the prose of Python's
manual. Eleven ways to train are compared with constant Adam, paired by seed: decays, and what people use in
place of a decay, such as averaged parameters, schedule-free AdamW, and estimates of the rate.

Peak learning rates race on a few seeds: those with little chance drop out (`tuning="race"`). Each arm then
runs at its best rate on fresh seeds until it is decided (`seeds=study.Sequential(...)`).

    pip install -e .[examples]
    python examples/should_i_decay.py

It takes about three minutes on two CPU cores (digits: three, text: seven), ends with an answer, and writes to
`--out`: report.html, rates.png, differences.png, curves.png, effective_rates.png, results.csv (one row per
trial), summary.json (the findings) and comparison.npz (for `study.load`). If stopped, it resumes when run
again; a larger `--seeds` adds seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

import adaptive_optax as ao
from adaptive_optax import study
from adaptive_optax.study import tasks

FIRST = 5  # seeds at the first look
SETTINGS: dict[str, dict[str, Any]] = {
    "localization": {"steps": 2560, "seeds": 20, "tuning_seeds": 3, "validation_points": 20},
    "digits": {"steps": 800, "seeds": 20, "tuning_seeds": 3, "validation_points": 16},
    "text": {"steps": 1000, "seeds": 13, "tuning_seeds": 2, "validation_points": 8},
    "smoke": {"steps": 48, "seeds": 5, "tuning_seeds": 1, "validation_points": 4, "growth": 0},
}
SMOKE_SIZES = {
    "localization": {"train_count": 256, "validation_count": 64, "batch_size": 32},
    "digits": {"train_count": 256, "channels": 2},
    "text": {"validation_count": 16, "width": 16, "layers": 1},
}
# The second grid is for the global-norm form, which needs other rates for its single step size. A grid grows
# if its best rate is on an edge.
RATES = {
    "localization": ((1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2), (1e-4, 2e-4, 5e-4, 1e-3)),
    "digits": ((1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2), (1e-4, 2e-4, 5e-4, 1e-3)),
    "text": ((2e-3, 5e-3, 1e-2), (2e-3, 5e-3, 1e-2)),
    "smoke": ((1e-3, 3e-3), (1e-3, 3e-3)),
}
PICTURES = ("rates", "differences", "curves", "effective_rates")
LIMITS = """This does not show
- that the result holds elsewhere: it is one small network, one split of the data and one length of training
- which part of one-cycle matters: it also warms up and cycles the momentum
- a ranking of the arms: all but one comparison are with constant Adam
- anything between the rates tried, or for settings that were not tuned"""


DECAYS = ("Adam, 0.8 every", "Adam, exponential", "Adam, linear", "Adam, one-cycle")  # as their names begin
AVERAGED = "Adam, averaged"
RIVALS = (AVERAGED, "AdamW, schedule-free")  # of a decay, at a constant rate


def make_arms(task: study.Task, task_name: str, steps: int) -> dict[str, Any]:
    """Makes the arms, functions of (peak learning rate, total steps); the first is the baseline.

    On localization, which trains for 40 epochs, "0.8 every 5 epochs" is literal. On the other tasks the rate
    falls equally often: every eighth of the run.
    """
    every, words = 5 * task.steps_per_epoch, "5 epochs"
    if task_name != "localization":
        every = max(1, steps // 8)
        words = f"{every} steps"

    def adamw_one_cycle(peak, steps):
        cycle = ao.one_cycle(peak, steps)
        return ao.adamw(cycle.learning_rate, b1=cycle.momentum, weight_decay=1e-2)

    return {
        "Adam, constant": study.arm("adam:constant"),
        f"Adam, 0.8 every {words}": lambda peak, steps: ao.adam(ao.step_decay(peak, 0.8, every)),
        "Adam, exponential to 1 %": study.arm("adam:exponential"),
        "Adam, linear to 0": study.arm("adam:linear"),
        "Adam, one-cycle": study.arm("adam:one_cycle"),
        "AdamW, one-cycle": adamw_one_cycle,
        AVERAGED: study.arm("adam:constant:averaged"),
        "AdamW, schedule-free": study.arm("schedule_free:adamw"),
        "Prodigy": study.arm("prodigy"),
        "D-Adaptation": study.arm("dadapt_adamw"),
        "RMSprop": study.arm("rmsprop:constant"),
        "RMSprop, global norm": study.arm("global_rmsprop:constant"),
    }


def answer(comparison: study.Comparison) -> str:
    """Answers in one sentence; also judges the decay that did best in tuning against its best rival."""
    info, verdicts, table = comparison.info, comparison.verdicts, comparison.table
    decays = [arm for arm in info["arms"] if arm.startswith(DECAYS)]
    rivals = [arm for arm in RIVALS if arm in verdicts]
    decisions = [verdicts[arm].decision for arm in decays]
    if better := [short(arm) for arm in decays if verdicts[arm].decision == "better"]:
        lead = "it depends on the decay" if "worse" in decisions else f"yes, with {' or '.join(better)}"
    elif "undecided" in decisions:
        lead = "these seeds cannot tell"
    else:
        lead = "it does not matter" if "equivalent" in decisions else "no"

    decay, rival = comparison.best_in_tuning(decays), comparison.best_in_tuning(rivals)
    plan = comparison.details.sequential
    against_rival = study.judge(
        table.loc[table["arm"].isin([decay, rival])],
        baseline=rival,
        maximize=info["maximize"],
        look=None if plan else len(info["looks"]),
        sequential=plan,
    )[decay]

    def say(name: str, verdict: study.Verdict) -> str:
        if verdict.reason:
            return f"{name} is {verdict.decision} ({verdict.reason})"
        unit = 100 * verdict.relative_effect / verdict.effect if verdict.effect else 0.0
        effect, low, high = (f"{unit * x:+.1f}" for x in (verdict.effect, *verdict.interval))
        return f"{name} is {verdict.decision} ({effect} %, {low} to {high})"

    seeds = f"up to {max(info['looks'])}" if plan else info["seeds"]
    return (
        f"Should I decay Adam's learning rate? On {info['task']}, {lead}: against constant Adam on "
        f"{seeds} fresh seeds, each at its own best peak rate, "
        f"{'; '.join(say(short(arm), verdicts[arm]) for arm in decays)}; without decay "
        f"{'; '.join(say(short(arm), verdicts[arm]) for arm in rivals)}, "
        f"and compared with {short(rival)} {say(short(decay), against_rival)}."
    )


def short(arm: str) -> str:
    """An arm's name in a sentence about Adam."""
    return {AVERAGED: "averaging the parameters"}.get(arm, arm.removeprefix("Adam, "))


def save(comparison: study.Comparison, found: str, out: Path) -> None:
    """Writes the report, the pictures, the table and the findings."""
    comparison.to_html(out / "report.html")
    comparison.save(out / "comparison.npz")
    comparison.to_csv(out / "results.csv")
    for picture in PICTURES:
        for theme, suffix in (("light", ""), ("dark", "_dark")):
            comparison.plot(picture, theme=theme).savefig(out / f"{picture}{suffix}.png", dpi=160)
    summary = {
        "answer": found,
        "does_not_show": LIMITS.splitlines()[1:],
        "verdicts": {arm: dataclasses.asdict(verdict) for arm, verdict in comparison.verdicts.items()},
        "info": comparison.info,
    }
    finite = json.loads(json.dumps(summary), parse_constant=lambda _: None)  # JSON has no NaN
    (out / "summary.json").write_text(json.dumps(finite, indent=2) + "\n")


def command_line() -> argparse.ArgumentParser:
    """Returns the parser of the options."""
    parser = argparse.ArgumentParser(description="Measures whether Adam's learning rate should decay.")
    parser.add_argument("--task", choices=SMOKE_SIZES, default="localization", help="default: %(default)s")
    parser.add_argument("--steps", type=int, help="training steps per trial")
    parser.add_argument("--seeds", type=int, help="the most fresh seeds for an arm, at least 5")
    parser.add_argument("--out", type=Path, help="where to write (default: out/should_i_decay/TASK)")
    parser.add_argument("--smoke", action="store_true", help="a tiny run to check that everything works")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Runs the comparison."""
    parser = command_line()
    values = parser.parse_args(arguments)
    with contextlib.suppress(RuntimeError):  # raised if JAX is already in use
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)

    size = "smoke" if values.smoke else values.task
    given = {name: getattr(values, name) for name in ("steps", "seeds") if getattr(values, name) is not None}
    settings = SETTINGS[size] | given
    out = values.out or Path("out/should_i_decay") / (values.task + "-smoke" * values.smoke)
    task = getattr(tasks, values.task)(**(SMOKE_SIZES[values.task] if values.smoke else {}))
    arms = make_arms(task, values.task, settings["steps"])
    own_rates = [
        name for name, arm in arms.items() if getattr(arm, "learning_rates", None)
    ]  # of the estimators
    rates = {name: RATES[size]["global" in name] for name in arms if name not in own_rates}
    if jax.default_backend() == "cpu":
        settings["mode"] = "scan"  # the mode that timing chooses for all tasks on an idle machine
    try:
        settings["seeds"] = study.Sequential(FIRST, settings["seeds"])
        comparison = study.compare(task, arms, learning_rates=rates, tuning="race", out=out, **settings)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print(f"Stopped. The finished trials are in {out}; run the same command again to resume.")
        sys.exit(130)

    console, found = Console(highlight=False), answer(comparison)
    save(comparison, found, out)
    comparison.print_summary(console)
    console.print(
        f"\n{comparison.info['seconds']:.0f} s; report, pictures and tables are in {out}\n\n{LIMITS}"
    )
    if values.smoke:
        console.print("- anything at all: a smoke run only shows that everything works")
    console.print(f"\n{found}", style="bold")


if __name__ == "__main__":
    main()
