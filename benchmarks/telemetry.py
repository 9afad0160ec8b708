"""The cost of telemetry and of rejection: a jitted training step with and without them.

Uses two networks that find a digit, the example's, whose step takes a quarter of a millisecond, and a small
convolutional one, and the language model of the text task. The variants are interleaved in one process, ten
steps at a time, because `every=10` measures one step in ten. Reports the median of per-round ratios to the
step without, with its 95 % interval (bootstrap).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from flax import nnx

import adaptive_optax as ao
from adaptive_optax import study
from adaptive_optax.study.tasks import localization, text
from benchmarks.tables import Table, digits
from benchmarks.timing import alternate, in_time

MEASURES = (
    "monitoring.telemetry",
    "optimizers",
    "study.tasks",
    "wrappers.reject_nonfinite",
)

STEPS = 10  # per block
OPTIMIZERS = {
    "without": lambda: ao.adam(1e-3),
    "every=10": lambda: ao.telemetry(ao.adam(1e-3), every=10),
    "every=1": lambda: ao.telemetry(ao.adam(1e-3)),
    'every=1, per="tensor"': lambda: ao.telemetry(ao.adam(1e-3), per="tensor"),
    "reject_nonfinite": lambda: ao.reject_nonfinite(ao.adam(1e-3)),
}


class ConvNet(nnx.Module):
    """Two convolutions and two dense layers, from an image of 28 x 28 to a box."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.first = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.second = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.hidden = nnx.Linear(7 * 7 * 32, 64, rngs=rngs)
        self.box = nnx.Linear(64, 4, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns the boxes for images [image, row, column, 1]."""
        x = nnx.max_pool(nnx.relu(self.first(images)), (2, 2), (2, 2))
        x = nnx.max_pool(nnx.relu(self.second(x)), (2, 2), (2, 2)).reshape(len(x), -1)
        return self.box(nnx.relu(self.hidden(x)))


def convolutional() -> study.Task:
    """The convolutional network on noise, since only its time matters."""
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(64, 28, 28, 1)), "y": rng.normal(size=(64, 4))}
    data = {name: values.astype(np.float32) for name, values in data.items()}

    def loss(model, batch):
        return jnp.mean(jnp.abs(model(batch["x"]) - batch["y"]))

    def build(rngs):
        return ConvNet(rngs=rngs)

    return study.nnx_task(build, loss, data, data, batch_size=64, name="convolutional network")


class Training:
    """A compiled step with its own parameters and state."""

    def __init__(self, task: study.Task, tx: optax.GradientTransformation):
        params, self._model_state = task.start(jax.random.key(0))
        batch = jax.tree.map(lambda x: jnp.asarray(x[: task.batch_size]), task.train)
        key = jax.random.key(1)

        def step(params, state):
            def loss(params):
                return task.training_loss(params, self._model_state, batch, key)[0]

            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        self._carry: Any = (params, tx.init(params))
        self._step = jax.jit(step, donate_argnums=(0, 1)).lower(*self._carry).compile()

    def __call__(self) -> Any:
        """Runs a block."""
        for _ in range(STEPS):
            self._carry = self._step(*self._carry)
        return self._carry


def measure(quick: bool, advance: Callable[[str], None]) -> dict[str, Any]:
    """Measures all networks, a quick run two."""

    def measured():
        for make in (localization, convolutional, *(() if quick else (text,))):
            task = make()
            advance(task.name)
            yield _rows(task, rounds=15 if quick else 50)

    rows, note = in_time(measured())
    return {"rows": sum(rows, []), "seeds": {"parameters": 0, "noise": 0, "bootstrap": 0}} | note


def _rows(task: study.Task, rounds: int) -> list[dict[str, Any]]:
    trainings = {name: Training(task, make()) for name, make in OPTIMIZERS.items()}
    times = alternate(trainings, rounds)
    rows = []
    for name, seconds in times.items():
        ratios = seconds / times["without"]
        found = scipy.stats.bootstrap((ratios,), np.median, rng=np.random.default_rng(0), method="percentile")
        low, high = found.confidence_interval
        rows.append(
            {
                "network": task.name,
                "parameters": task.parameter_count,
                "batch_size": task.batch_size,
                "telemetry": name,
                "ms": 1e3 * float(np.median(seconds)) / STEPS,
                "ratio": float(np.median(ratios)),
                "ratio_interval": [float(low), float(high)],
            }
        )
    return rows


def tables(result: dict[str, Any]) -> dict[str, Table]:
    """Returns the table."""
    table = Table(
        "A training step with telemetry, or with rejection, over one without",
        ["network", "ms without", *(f"`{name}`" for name in OPTIMIZERS if name != "without")],
    )
    networks = dict.fromkeys((row["network"], row["parameters"]) for row in result["rows"])
    for network, parameters in networks:
        rows = {row["telemetry"]: row for row in result["rows"] if row["network"] == network}
        cells = []
        for name in OPTIMIZERS:
            low, high = rows[name]["ratio_interval"]
            cells.append(f"{rows[name]['ratio']:.2f} ({low:.2f}–{high:.2f})")
        table.add(f"{network}, {parameters:,} parameters", digits(rows["without"]["ms"]), *cells[1:])
    return {"main": table}
