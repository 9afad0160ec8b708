"""Trials per second of the study, compared with typical Python loops over optax and over PyTorch.

The task is a digits MLP (64-128-128-10) with batches of 64. All train the same trials (rates x seeds) with
Adam and evaluate on the validation set at the same points. The loops are efficient ones: one optax step,
jitted once, with the rate as an argument, and the batches of an epoch indexed with NumPy. Compilation is
timed separately. They alternate in one process; the study uses one device per core.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from adaptive_optax import study
from adaptive_optax.study.engine.chunks import Key
from adaptive_optax.study.engine.placement import settle_placement
from adaptive_optax.study.engine.progress import TrialProgress
from adaptive_optax.study.engine.runner import Runner
from adaptive_optax.study.engine.trainers import ArmSpec, TaskTrainer
from adaptive_optax.study.engine.trials import Plan
from benchmarks.contenders import HAS_TORCH, torch_module
from benchmarks.tables import Table, digits, ratio
from benchmarks.timing import in_time, median_and_quartiles

MEASURES = (
    "study.engine.placement",
    "study.engine.runner",
    "study.engine.trainers",
    "study.engine.trials",
)

SIZES = (64, 128, 128, 10)
BATCH, STEPS, POINTS = 64, 400, 10
RATES = (3e-4, 1e-3, 3e-3, 1e-2)


def init(key: jax.Array) -> list[dict[str, jax.Array]]:
    """Draws the weights."""
    keys = jax.random.split(key, len(SIZES) - 1)
    return [
        {"kernel": jax.random.normal(k, (a, b)) * (2 / a) ** 0.5, "bias": jnp.zeros(b)}
        for k, a, b in zip(keys, SIZES, SIZES[1:], strict=False)
    ]


def loss(params: Any, batch: Any, key: Any = None) -> jax.Array:
    """The cross-entropy of a batch."""
    x, labels = batch
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    logits = x @ params[-1]["kernel"] + params[-1]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_task() -> study.Task:
    """The digits, three quarters for training."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(pixels))
    x, y = (np.asarray(pixels)[order] / 16).astype(np.float32), np.asarray(labels)[order].astype(np.int32)
    cut = len(x) * 3 // 4
    return study.Task(init, loss, (x[:cut], y[:cut]), (x[cut:], y[cut:]), batch_size=BATCH, name="digits MLP")


class PythonLoop:
    """A typical loop: a jitted step, called in a loop for every trial."""

    def __init__(self, task: study.Task):
        """Jits the step, which compiles at its first call."""
        self.task = task
        self.init = jax.jit(init)
        self.evaluate = jax.jit(loss)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, rate, batch):
            value, gradient = jax.value_and_grad(loss)(params, batch)
            updates, state = optax.adam(rate).update(gradient, state, params)
            return optax.apply_updates(params, updates), state, value

        self.step = step

    def train(self, rate: float, seed: int) -> float:
        """Runs one trial; returns its final validation loss."""
        x, y = self.task.train
        params = self.init(jax.random.key(seed))
        state, order = optax.adam(rate).init(params), np.random.default_rng(seed)
        per_epoch, final, shuffled = self.task.steps_per_epoch, 0.0, np.arange(len(x))
        for index in range(STEPS):
            if index % per_epoch == 0:
                shuffled = order.permutation(len(x))
            chosen = shuffled[index % per_epoch * BATCH :][:BATCH]
            params, state, _ = self.step(params, state, rate, (x[chosen], y[chosen]))
            if (index + 1) % (STEPS // POINTS) == 0:
                final = float(self.evaluate(params, self.task.validation))
        return final


class TorchLoop:
    """The same in PyTorch, eager, on the CPU or the GPU."""

    def __init__(self, task: study.Task):
        """Puts the data on the device."""
        torch = torch_module()
        torch.set_num_threads(os.cpu_count() or 1)
        self._torch, self._device = torch, "cuda" if torch.cuda.is_available() else "cpu"
        self._task = task
        (x, y), validation = task.train, task.validation
        self._x, self._y = torch.tensor(x, device=self._device), torch.tensor(y, device=self._device).long()
        self._validation = tuple(torch.tensor(a, device=self._device) for a in validation)

    def train(self, rate: float, seed: int) -> float:
        """Runs one trial; returns its final validation loss."""
        torch = self._torch
        torch.manual_seed(seed)
        layers: list[Any] = []
        for a, b in zip(SIZES, SIZES[1:], strict=False):
            layers += [torch.nn.Linear(a, b), torch.nn.ReLU()]
            torch.nn.init.normal_(layers[-2].weight, std=(2 / a) ** 0.5)
        model = torch.nn.Sequential(*layers[:-1]).to(self._device)
        optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
        entropy = torch.nn.functional.cross_entropy
        order, per_epoch, final = np.random.default_rng(seed), self._task.steps_per_epoch, 0.0
        shuffled = np.arange(len(self._x))
        for index in range(STEPS):
            if index % per_epoch == 0:
                shuffled = order.permutation(len(self._x))
            chosen = torch.from_numpy(shuffled[index % per_epoch * BATCH :][:BATCH]).to(self._device)
            optimizer.zero_grad()
            entropy(model(self._x[chosen]), self._y[chosen]).backward()
            optimizer.step()
            if (index + 1) % (STEPS // POINTS) == 0:
                with torch.no_grad():
                    x, y = self._validation
                    final = float(entropy(model(x), y.long()))
        return final


def measure(quick: bool, advance: Callable[[str], None]) -> dict[str, Any]:
    """Measures studies of 1 to 256 trials, on an accelerator to 1024."""
    task = make_task()
    plan = Plan(STEPS, tuple(range(0, STEPS + 1, STEPS // POINTS)))
    arms = {"adam": ArmSpec(lambda rate, steps: optax.adam(rate), "once", None, 0)}
    loops: dict[str, Any] = {"loop": PythonLoop(task)} | ({"torch": TorchLoop(task)} if HAS_TORCH else {})
    began = time.perf_counter()
    loops["loop"].train(RATES[0], 0)
    loop_compile = time.perf_counter() - began
    most = [] if jax.default_backend() == "cpu" else [1024]  # an accelerator has room for more

    def measured():
        for trials in [1, 2] if quick else [1, 4, 16, 64, 256, *most]:
            advance(f"{trials} trials")
            row = _row(task, plan, arms, loops, trials, rounds=1 if quick else 3 if trials >= 64 else 5)
            yield row | {"loop_first_call_s": loop_compile}

    rows, note = in_time(measured())
    settings = {"steps": STEPS, "batch_size": BATCH, "rates": RATES, "points": POINTS}
    seeds = {"split": 0, "trials": "from 0, four rates each"}
    return {"rows": rows, "settings": settings, "uses_torch": HAS_TORCH, "seeds": seeds} | note


def _row(
    task: study.Task, plan: Plan, arms: dict[str, ArmSpec], loops: dict[str, Any], trials: int, rounds: int
) -> dict[str, Any]:
    began = time.perf_counter()
    placement, _ = settle_placement(task, arms, plan, trials=trials, example_rate=RATES[0])
    keys = [Key("adam", RATES[i % len(RATES)], i // len(RATES)) for i in range(trials)]

    def run_study():
        runner = Runner(TaskTrainer(task, arms, plan, placement), None, TrialProgress(trials, show=False))
        runner.run(keys, "")
        return runner.results

    losses = {"study": [curves.validation[-1] for curves in run_study().values()]}
    first_call = time.perf_counter() - began
    looped = keys[:8]  # a loop's time is the same for every trial
    speeds: dict[str, list[float]] = {name: [] for name in ("study", *loops)}
    for _ in range(rounds):
        began = time.perf_counter()
        run_study()
        speeds["study"].append(trials / (time.perf_counter() - began))
        for name, loop in loops.items():
            began = time.perf_counter()
            losses[name] = [loop.train(key.rate, key.seed) for key in looped]
            speeds[name].append(len(looped) / (time.perf_counter() - began))
    return {
        "trials": trials,
        "layout": placement._asdict(),
        "trials_per_second": {name: float(np.median(values)) for name, values in speeds.items()},
        "over": {
            name: {"ratio": median_and_quartiles(np.divide(speeds["study"], speeds[name]))} for name in loops
        },
        "study_first_call_s": first_call,
        "mean_final_loss": {name: float(np.mean(values)) for name, values in losses.items()},
        "rounds": rounds,
    }


def tables(result: dict[str, Any]) -> dict[str, Table]:
    """Returns the table; the first calls of study and loop include compilation."""
    table = Table(
        "Trials per second of a digits MLP",
        ["trials", "placement", "study", "optax loop", "ratio", "torch loop", "ratio", "first calls, s"],
        of_speeds=True,
    )
    for row in result["rows"]:
        speed, placement = row["trials_per_second"], row["layout"]
        table.add(
            str(row["trials"]),
            f"{placement['mode']}, {placement['width']} on {placement['devices']}",
            digits(speed["study"]),
            digits(speed["loop"]),
            ratio(row["over"]["loop"]),
            digits(speed.get("torch")),
            ratio(row["over"].get("torch")),
            f"{row['study_first_call_s']:.1f}, {row['loop_first_call_s']:.1f}",
        )
    return {"main": table}
