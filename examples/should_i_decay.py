"""Should I decay Adam's learning rate? Asked of two small networks, and answered by measurement.

The question as first asked in public: someone trains an image-localization network with Adam, is told to add
exponential decay, and wonders whether to. Some answered that Adam needs none, others that it helped.

`--task localization` is such a network: it puts boxes around handwritten digits on noisy canvases. `--task
text` is a character-level transformer on the prose of Python's manual. Eight ways to train are tuned over
peak learning rates on a few seeds. Each then runs at its best rate on fresh seeds and is compared with
constant Adam, paired by seed. Averaging the parameters of constant Adam is the alternative that a decay has
to beat.

    pip install -e .[examples]
    python examples/should_i_decay.py

It takes two to three minutes on two CPU cores (text: five), ends with an answer, and writes to `--out`:
report.html, rates.png, differences.png, curves.png, effective_rates.png, results.csv (one row per trial),
summary.json (the findings) and comparison.npz (for `study.load`). If stopped, it resumes when run again; a
larger `--seeds` adds seeds.
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

SETTINGS: dict[str, dict[str, Any]] = {
    "localization": {"steps": 2560, "seeds": 12, "tuning_seeds": 4, "validation_points": 20},
    "text": {"steps": 1000, "seeds": 8, "tuning_seeds": 2, "validation_points": 8},
    "smoke": {"steps": 48, "seeds": 5, "tuning_seeds": 1, "validation_points": 4, "growth": 0},
}
SMOKE_SIZES = {
    "localization": {"train_count": 256, "validation_count": 64, "batch_size": 32},
    "text": {"validation_count": 16, "width": 16, "layers": 1},
}
# The second grid is for the global-norm form, which needs other rates for its single step size. A grid grows
# if its best rate is on an edge.
RATES = {
    "localization": ((1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2), (1e-4, 2e-4, 5e-4, 1e-3)),
    "text": ((2e-3, 5e-3, 1e-2), (2e-3, 5e-3, 1e-2)),
    "smoke": ((1e-3, 3e-3), (1e-3, 3e-3)),
}
PICTURES = ("rates", "differences", "curves", "effective_rates")
LIMITS = """This does not show
- that the result holds elsewhere: it is one small network, one split of the data and one length of training
- which part of one-cycle matters: it also warms up and cycles the momentum
- a ranking of the arms: all but one comparison are with constant Adam
- anything between the rates tried, or for settings that were not tuned"""


def make_arms(task: study.Task, task_name: str, steps: int) -> dict[str, Any]:
    """Makes the arms, functions of (peak learning rate, total steps); the first is the baseline.

    On localization, which trains for 40 epochs, "0.8 every 5 epochs" is literal. The text is seen about once,
    so there the rate falls equally often: every eighth of the run.
    """
    every, words = 5 * task.steps_per_epoch, "5 epochs"
    if task_name == "text":
        every = max(1, steps // 8)
        words = f"{every} steps"

    def adamw_one_cycle(peak, steps):
        cycle = ao.one_cycle(peak, steps)
        return ao.adamw(cycle.learning_rate, b1=cycle.momentum, weight_decay=1e-2)

    return {
        "Adam, constant": study.arm("adam:constant"),
        f"Adam, 0.8 every {words}": lambda peak, steps: ao.adam(ao.step_decay(peak, 0.8, every)),
        "Adam, exponential to 1 %": study.arm("adam:exponential"),
        "Adam, one-cycle": study.arm("adam:one_cycle"),
        "AdamW, one-cycle": adamw_one_cycle,
        "Adam, averaged": study.arm("adam:constant:averaged"),
        "RMSprop": study.arm("rmsprop:constant"),
        "RMSprop, global norm": study.arm("global_rmsprop:constant"),
    }


def answer(comparison: study.Comparison) -> str:
    """Answers in one sentence; also judges the decay that did best in tuning against averaging."""
    info, verdicts, table = comparison.info, comparison.verdicts, comparison.table
    decays, averaged = info["arms"][1:4], "Adam, averaged"
    decisions = [verdicts[arm].decision for arm in decays]
    if better := [arm.removeprefix("Adam, ") for arm in decays if verdicts[arm].decision == "better"]:
        lead = "it depends on the decay" if "worse" in decisions else f"yes, with {' or '.join(better)}"
    elif "undecided" in decisions:
        lead = "these seeds cannot tell"
    else:
        lead = "it does not matter" if "equivalent" in decisions else "no"

    tuning = table[table["phase"] == "tuning"].groupby(["arm", "learning_rate"])["final_metric"]
    tuned = tuning.agg(lambda metrics: metrics.mean(skipna=False))  # NaN where a trial diverged
    best = min(decays, key=lambda arm: tuned[arm].min())
    pair = table.loc[table["arm"].isin([best, averaged])]
    against_averaging = study.judge(pair, baseline=averaged, look=len(info["looks"]))[best]

    def say(name: str, verdict: study.Verdict) -> str:
        unit = 100 * verdict.relative_effect / verdict.effect if verdict.effect else 0.0
        effect, low, high = (f"{unit * x:+.1f}" for x in (verdict.effect, *verdict.interval))
        return f"{name.removeprefix('Adam, ')} is {verdict.decision} ({effect} %, {low} to {high})"

    return (
        f"Should I decay Adam's learning rate? On {info['task']}, {lead}: against constant Adam on "
        f"{info['seeds']} fresh seeds, each at its own best peak rate, "
        f"{'; '.join(say(arm, verdicts[arm]) for arm in decays)}; "
        f"{say('averaging the parameters without decay', verdicts[averaged])}, "
        f"and compared with that {say(best, against_averaging)}."
    )


def save(comparison: study.Comparison, found: str, out: Path) -> None:
    """Writes the report, the pictures, the table and the findings."""
    comparison.to_html(out / "report.html")
    comparison.save(out / "comparison.npz")
    comparison.to_csv(out / "results.csv")
    for picture in PICTURES:
        comparison.plot(picture).savefig(out / f"{picture}.png", dpi=160)
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
    parser.add_argument("--steps", type=int, help="training steps per trial (default: 2560; text: 1000)")
    parser.add_argument("--seeds", type=int, help="fresh seeds, at least 5 (default: 12; text: 8)")
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
    rates = {arm: RATES[size]["global" in arm] for arm in arms}
    if jax.default_backend() == "cpu":
        settings["mode"] = "scan"  # the mode that timing chooses for both tasks on an idle machine
    try:
        comparison = study.compare(task, arms, learning_rates=rates, out=out, **settings)
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
