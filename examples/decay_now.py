"""Should the learning rate of a run under way decay now? Asked at three of its checkpoints.

A network that puts boxes around digits is trained with Adam at a constant rate. From three checkpoints of
that run, the study continues it in five ways: at the constant rate, with a linear decay to 0, with one like
1 - sqrt(t/T), at half the rate, and with the parameters averaged. What they gain over the constant rate, on
the same batches, answers the question.

    pip install -e .[examples]
    python examples/decay_now.py

It takes under two minutes on two CPU cores and writes to `--out`: decay_now.png, decay_now.csv, and a report
for each checkpoint. If stopped, it resumes when run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import numpy as np
import optax

import adaptive_optax as ao
from adaptive_optax import study
from adaptive_optax.study import tasks

RATE = 3e-3


def checkpoints(task: study.Task, steps: list[int]) -> list[study.Start]:
    """Trains at a constant rate, and returns where the run is at some steps."""
    tx, random = ao.adam(RATE), np.random.default_rng(0)
    params, model_state = task.start(jax.random.key(0))
    opt_state = tx.init(params)

    @jax.jit
    def step(params, model_state, opt_state, batch, key):
        loss = jax.value_and_grad(task.training_loss, has_aux=True)
        (_, model_state), gradients = loss(params, model_state, batch, key)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), model_state, opt_state

    found = []
    for i in range(max(steps) + 1):
        if i in steps:
            found.append(study.Start(params, opt_state, model_state, step=i))
        chosen = random.integers(task.train_count, size=task.batch_size)
        batch = jax.tree.map(lambda x, chosen=chosen: x[chosen], task.train)
        params, model_state, opt_state = step(params, model_state, opt_state, batch, jax.random.key(i))
    return found


def command_line() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Asks at three checkpoints of a run whether it should decay."
    )
    parser.add_argument("--at", default="50,400,1200", help="the checkpoints' steps")
    parser.add_argument("--steps", type=int, default=200, help="the steps that are left")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("decay_now_out"))
    return parser


def main() -> None:
    """Trains, forks, and says whether to decay."""
    options = command_line().parse_args()

    task = tasks.localization()
    starts = checkpoints(task, [int(step) for step in options.at.split(",")])
    found = study.decay_now(task, starts, steps=options.steps, seeds=options.seeds, out=options.out)
    print(found.sentence)
    found.comparisons[-1].print_summary()
    found.plot().savefig(options.out / "decay_now.png", dpi=150)
    found.table.to_csv(options.out / "decay_now.csv", index=False)
    for step, comparison in zip(found.steps, found.comparisons, strict=True):
        comparison.to_html(options.out / f"report_{step}.html")


if __name__ == "__main__":
    main()
