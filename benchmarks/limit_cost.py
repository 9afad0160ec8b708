"""The cost of `error_controlled`: a jitted training step with and without it.

The limit probes with a value in one step in ten, so whole periods of ten steps are timed, interleaved in one
process. Reports the median of per-round ratios with its 95 % interval (bootstrap).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

import adaptive_optax as ao
from adaptive_optax import study
from adaptive_optax.study import tasks
from benchmarks.tables import Table, digits
from benchmarks.telemetry import convolutional
from benchmarks.timing import alternate, in_time

MEASURES = (
    "optimizers",
    "study.tasks",
    "wrappers.error_control",
)

STEPS = 10  # per block
RATE = 1e-3
WARM_UP = 100  # steps, in which the limit is found: it probes more often before
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "without": lambda: ao.adam(RATE),
    "with": lambda: ao.error_controlled(ao.scale_by_adam(), RATE, every=STEPS),
}


class Training:
    """A compiled step with its own parameters and state."""

    def __init__(self, task: study.Task, tx: optax.GradientTransformation):
        """Compiles the step and warms up."""
        params, model_state = task.start(jax.random.key(0))
        batch = jax.tree.map(lambda x: jnp.asarray(x[: task.batch_size]), task.train)
        key = jax.random.key(1)
        full = optax.with_extra_args_support(tx)

        def step(params, state):
            def loss(params):
                return task.training_loss(params, model_state, batch, key)[0]

            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = full.update(gradient, state, params, value=value, value_fn=loss)
            return optax.apply_updates(params, updates), state

        self._carry: Any = (params, tx.init(params))
        self._step = jax.jit(step, donate_argnums=(0, 1)).lower(*self._carry).compile()
        for _ in range(WARM_UP // STEPS):
            self()

    def __call__(self) -> Any:
        """Runs a block."""
        for _ in range(STEPS):
            self._carry = self._step(*self._carry)
        return self._carry

    @property
    def opt_state(self) -> Any:
        """The state of the optimizer."""
        return self._carry[1]


def measure(quick: bool, advance: Callable[[str], None]) -> dict[str, Any]:
    """Measures four networks; a quick run one."""
    networks = (tasks.localization, tasks.digits, convolutional, tasks.text)

    def measured():
        for make in networks[:1] if quick else networks:
            task = make()
            advance(task.name)
            yield _row(task, rounds=3 if quick else 50)

    rows, note = in_time(measured())
    return {"rows": rows, "seeds": {"parameters": 0, "bootstrap": 0}} | note


def _row(task: study.Task, rounds: int) -> dict[str, Any]:
    trainings = {name: Training(task, make()) for name, make in OPTIMIZERS.items()}
    before = ao.get_error_control(trainings["with"].opt_state).probes.item()
    steps = 0

    def counted():
        nonlocal steps
        steps += STEPS
        return trainings["with"]()

    times = alternate(trainings | {"with": counted}, rounds)
    probes = ao.get_error_control(trainings["with"].opt_state).probes.item() - before
    ratios = times["with"] / times["without"]
    found = scipy.stats.bootstrap((ratios,), np.median, rng=np.random.default_rng(0), method="percentile")
    low, high = found.confidence_interval
    return {
        "network": task.name,
        "parameters": task.parameter_count,
        "batch_size": task.batch_size,
        "ms": {name: 1e3 * float(np.median(seconds)) / STEPS for name, seconds in times.items()},
        "ratio": float(np.median(ratios)),
        "ratio_interval": [float(low), float(high)],
        "probes_per_step": probes / steps,
    }


def tables(result: dict[str, Any]) -> dict[str, Table]:
    """Returns the table."""
    table = Table(
        f"A training step with the limit (`every={STEPS}`) over one without",
        ["network", "ms without", "ms with", "ratio"],
    )
    for row in result["rows"]:
        low, high = row["ratio_interval"]
        table.add(
            f"{row['network']}, {row['parameters']:,} parameters",
            digits(row["ms"]["without"]),
            digits(row["ms"]["with"]),
            f"{row['ratio']:.2f} ({low:.2f}–{high:.2f})",
        )
    return {"cost": table}
