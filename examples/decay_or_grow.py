"""Should the learning rate decay, or the batch grow? The same noise in fewer updates, measured.

Smith et al. (2018): "Don't decay the learning rate, increase the batch size". Here a network that puts boxes
around handwritten digits on noisy canvases is trained in four ways that see the same samples:

    decayed            the learning rate times 0.8 every eighth of the run (by default every 5 epochs)
    grown              grows the batch instead of decaying, up to 8 batches per update (`ao.grow_batch`)
    grown, b1 kept     the same without scaling Adam's b1, since that removes the damping that high rates need
    large throughout   8 batches in every update, with the decayed rate: the cost of fewer updates alone

Each is tuned over peak learning rates on a few seeds. At its best rate it is then compared with the decay on
fresh seeds, paired by seed. Steps are micro-batches, so all arms see equally many samples; only the number of
updates differs.

    pip install -e .[examples]
    python examples/decay_or_grow.py

It takes about two minutes on two CPU cores, ends with a table and a sentence, and writes to `--out`:
report.html, comparison.png, results.csv (one row per trial), summary.json, comparison.npz (for `study.load`).
If stopped, it resumes when run again; a larger `--seeds` adds seeds. `--optimizer momentum` asks the same
about SGD with momentum, whose scaling rule is linear; Adam's is a square root.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import optax
from rich import box
from rich.console import Console
from rich.table import Table

import adaptive_optax as ao
from adaptive_optax import study
from adaptive_optax.study import tasks

SETTINGS: dict[str, Any] = {"steps": 2560, "seeds": 24, "tuning_seeds": 4, "validation_points": 20}
SMOKE: dict[str, Any] = {"steps": 48, "seeds": 5, "tuning_seeds": 1, "validation_points": 4, "growth": 0}
SMOKE_SIZES = {"train_count": 256, "validation_count": 64, "batch_size": 32}
# A grid grows if its best rate is on an edge.
RATES = {"adam": (1e-3, 2e-3, 5e-3, 1e-2), "momentum": (2e-3, 5e-3, 1e-2, 2e-2)}
SMOKE_RATES = (1e-3, 3e-3)
B1, B2, EPS, MOMENTUM = 0.9, 0.999, 1e-8, 0.9
LIMITS = """This does not show
- that the result holds elsewhere: it is one small network, one split of the data and one length of training
- that growing is faster: that depends on how much faster the hardware runs larger batches
- that more can be gained: beyond the noise scale, larger batches cost samples"""


def decay(peak: Any, steps: int) -> optax.Schedule:
    """The decay that the batch growth replaces: eight stairs, down to 21 % of the peak."""
    return ao.step_decay(peak, 0.8, max(1, steps // 8))


def growth_of(steps: int, optimizer: str, factor: int) -> ao.BatchGrowth:
    """The batch growth that replaces the decay, for a peak of 1."""
    adams: dict[str, Any] = {"kind": "adam", "b1": B1, "b2": B2, "eps": EPS}
    rules = adams if optimizer == "adam" else {}
    return ao.grow_batch(decay(1.0, steps), total_steps=steps, max_factor=factor, **rules)


def make_arms(optimizer: str, factor: int) -> dict[str, Any]:
    """Makes the arms, functions of (peak learning rate, total steps); the first is the baseline."""
    constant: dict[str, Any] = {"b1": B1, "b2": B2, "eps": EPS}

    def tx(rate, **moments):
        if optimizer == "adam":
            return ao.adam(rate, **(constant | moments))
        return ao.sgd(rate, momentum=MOMENTUM)

    def decayed(peak, steps):
        return tx(decay(peak, steps))

    def grown(peak, steps, **kept):
        growth = growth_of(steps, optimizer, factor)
        moments = {} if growth.b1 is None else {"b1": growth.b1, "b2": growth.b2, "eps": growth.eps} | kept
        inner = tx(lambda count: peak * growth.learning_rate(count), **moments)
        return ao.accumulate_gradients(inner, growth.accumulation_steps)

    def large(peak, steps):
        return ao.accumulate_gradients(tx(decay(peak, steps // factor)), factor)

    arms = {"decayed": decayed, "grown": grown, "large throughout": large}
    if optimizer == "adam":
        arms["grown, b1 kept"] = functools.partial(grown, b1=B1)
    return arms


def updates_of(info: dict[str, Any], optimizer: str, factor: int) -> dict[str, int]:
    """The number of updates of each arm."""
    steps = info["steps"]
    grown = growth_of(steps, optimizer, factor).emissions
    known = {"decayed": steps, "large throughout": steps // factor}
    return {arm: known.get(arm, grown) for arm in info["arms"]}


def answer(comparison: study.Comparison, updates: dict[str, int], optimizer: str, factor: int) -> str:
    """Answers in one sentence."""
    info = comparison.info

    def say(arm: str) -> str:
        verdict = comparison.verdict(arm)
        unit = 100 * verdict.relative_effect / verdict.effect if verdict.effect else 0.0
        effect, low, high = (f"{unit * x:+.1f}" for x in (verdict.effect, *verdict.interval))
        return f"{verdict.decision} ({effect} % in {info['metric_name']}, {low} to {high})"

    kept = f", with b1 kept {say('grown, b1 kept')}" if optimizer == "adam" else ""
    saved = 1 - updates["grown"] / updates["decayed"]
    return (
        f"Decay or grow? On {info['task']} with {optimizer}, on {info['seeds']} fresh seeds and at equal "
        f"samples, growing the batch up to {factor}-fold instead of decaying the learning rate is "
        f"{say('grown')}{kept}, in {updates['grown']:,} updates instead of {updates['decayed']:,}: "
        f"{100 * saved:.0f} % fewer."
    )


def print_updates(comparison: study.Comparison, updates: dict[str, int], console: Console) -> None:
    """Prints the updates of every arm beside its samples."""
    info, most = comparison.info, max(updates.values())
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("arm")
    for heading in ("samples", "updates", "saved"):
        table.add_column(heading, justify="right")
    for arm, count in updates.items():
        samples = info["steps"] * info["batch_size"]
        table.add_row(arm, f"{samples:,}", f"{count:,}", f"{100 * (1 - count / most):.0f} %")
    console.print(table)


def save(comparison: study.Comparison, found: str, updates: dict[str, int], out: Path) -> None:
    """Writes the report, the picture, the table and the findings."""
    comparison.to_html(out / "report.html")
    comparison.save(out / "comparison.npz")
    comparison.to_csv(out / "results.csv")
    comparison.plot().savefig(out / "comparison.png", dpi=160)
    summary = {
        "answer": found,
        "does_not_show": LIMITS.splitlines()[1:],
        "updates": updates,
        "verdicts": {arm: dataclasses.asdict(verdict) for arm, verdict in comparison.verdicts.items()},
        "info": comparison.info,
    }
    finite = json.loads(json.dumps(summary), parse_constant=lambda _: None)  # JSON has no NaN
    (out / "summary.json").write_text(json.dumps(finite, indent=2) + "\n")


def command_line() -> argparse.ArgumentParser:
    """Returns the parser of the options."""
    parser = argparse.ArgumentParser(description="Measures decaying the rate against growing the batch.")
    parser.add_argument("--optimizer", choices=RATES, default="adam", help="default: %(default)s")
    parser.add_argument("--steps", type=int, help="micro-batches per trial (default: 2560)")
    parser.add_argument("--seeds", type=int, help="fresh seeds, at least 5 (default: 24)")
    parser.add_argument("--max-factor", type=int, default=8, help="largest growth (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where to write (default: out/decay_or_grow/OPTIMIZER)")
    parser.add_argument("--smoke", action="store_true", help="a tiny run to check that everything works")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Runs the comparison."""
    parser = command_line()
    values = parser.parse_args(arguments)
    with contextlib.suppress(RuntimeError):  # raised if JAX is already in use
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)

    given = {name: getattr(values, name) for name in ("steps", "seeds") if getattr(values, name) is not None}
    settings = (SMOKE if values.smoke else SETTINGS) | given
    optimizer, factor = values.optimizer, values.max_factor
    out = values.out or Path("out/decay_or_grow") / (optimizer + "-smoke" * values.smoke)
    if jax.default_backend() == "cpu":
        settings["mode"] = "scan"  # the mode that timing chooses on an idle machine
    try:
        comparison = study.compare(
            tasks.localization(**(SMOKE_SIZES if values.smoke else {})),
            make_arms(optimizer, factor),
            learning_rates=SMOKE_RATES if values.smoke else RATES[optimizer],
            out=out,
            **settings,
        )
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print(f"Stopped. The finished trials are in {out}; run the same command again to resume.")
        sys.exit(130)

    console, updates = Console(highlight=False), updates_of(comparison.info, optimizer, factor)
    found = answer(comparison, updates, optimizer, factor)
    save(comparison, found, updates, out)
    comparison.print_summary(console)
    print_updates(comparison, updates, console)
    console.print(f"{comparison.info['seconds']:.0f} s; report, picture and table are in {out}\n\n{LIMITS}")
    if values.smoke:
        console.print("- anything at all: a smoke run only shows that everything works")
    console.print(f"\n{found}", style="bold")


if __name__ == "__main__":
    main()
