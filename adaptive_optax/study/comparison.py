"""Comparing arms: every arm at its own best rate, on fresh seeds, with a verdict.

Tune: every arm runs every peak rate on the tuning seeds; a grid whose best rate lies on its edge grows.
Confirm: every arm at its best rate runs on seeds that tuning has not seen.
Judge: `verdict.judge` on the confirming trials alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adaptive_optax._checks import check_bool, check_choice, check_integer, check_scalar
from adaptive_optax.study.arms import arm as named_arm
from adaptive_optax.study.arms import check_arm
from adaptive_optax.study.fingerprint import describe_study
from adaptive_optax.study.layout import MODES, settle_layout
from adaptive_optax.study.progress import TrialProgress
from adaptive_optax.study.result import FIRST_FRESH_SEED, Comparison, collect, tuning_means
from adaptive_optax.study.runner import ArmSpec, Runner
from adaptive_optax.study.store import Key, Store
from adaptive_optax.study.task import Task
from adaptive_optax.study.trials import Arm, Evaluate, Plan
from adaptive_optax.study.tuning import Grid


def compare(
    task: Task,
    arms: Mapping[str, Arm] | Sequence[str],
    *,
    learning_rates: Sequence[float] | Mapping[str, Sequence[float]],
    seeds: int = 8,
    steps: int,
    tuning_seeds: int = 3,
    baseline: str | None = None,
    margin: float | None = None,
    out: str | os.PathLike[str] | None = None,
    evaluate: Evaluate | Mapping[str, Evaluate] | None = None,
    validation_points: int | Sequence[int] = 20,
    growth: int = 3,
    base_seed: int = 0,
    paired_batches: bool = True,
    mode: str | None = None,
    chunk: int | None = None,
    progress: bool | None = None,
) -> Comparison:
    r"""Measures which of several ways to train is better on a task, each at its own best learning rate.

    Every arm runs every peak rate on the tuning seeds; the rate with the lowest mean final metric is the
    arm's own (the lower one at a tie). At that rate it runs on fresh seeds, and only those enter the verdict.
    A seed decides the initial parameters, the order of the batches and the keys of the loss, the same for
    every arm, so that arms are compared seed by seed.

    Args:
        task: What to train.
        arms: `{name: arm}` with `arm(learning_rate, total_steps) -> transformation`, or names for
            `study.arm`, such as `["adam:constant", "adam:one_cycle"]`. At least two.
        learning_rates: Peak rates to try, positive, usually a factor of about 3 apart; or a mapping from
            arm to its own.
        seeds: Fresh seeds for the verdict, at least 5. With `out`, a later call with more adds to those that
            are there, and the verdict pays for every look: look k may err with probability
            :math:`0.05 \cdot 2^{-k}`.
        steps: Training steps of a trial, at least 1.
        tuning_seeds: Seeds for choosing the rates, from 1 to 1000.
        baseline: The arm that the others are compared with; the first by default.
        margin: Differences smaller than this are equivalent, in the metric's units; None for 1 % of the
            baseline's metric, which has to be positive.
        out: A folder in which every finished chunk is kept. Called again, after a crash too, the study goes
            on where it was; several processes may share it.
        evaluate: `evaluate(params, opt_state) -> params` to be judged, for all arms or by arm; None judges
            the trained ones. `ao.averaged_parameters` judges the average where an arm keeps one.
        validation_points: How often to take the metric, evenly spaced, or the steps at which to take it;
            before the first and after the last step it is taken in any case.
        growth: How many rates may be added on either side of an arm's grid while its best lies on that edge.
        base_seed: Part of all seeds; another one repeats the study with other random numbers.
        paired_batches: False gives every arm its own order of batches, so that even identical arms differ: a
            check of the procedure itself, which then must not tell them apart.
        mode: "scan", "step" or "vmap" instead of choosing (see `study.trials`).
        chunk: Trials a call on each device instead of choosing it.
        progress: Whether to show a progress bar; None shows it in a terminal.

    Returns:
        The comparison. An arm's trials that diverge are outcomes: they are counted, and judged by the larger
        of their initial metric and the worst finite one.

    Raises:
        ValueError: If an argument is out of range, an arm does not run, or `out` holds another study. All
            before anything is trained.
        BaseException: Whatever interrupts the trials (Ctrl-C too) has the attribute `comparison`, with the
            trials that were finished.

    >>> import jax, jax.numpy as jnp
    >>> from adaptive_optax import study
    >>> x = jax.random.normal(jax.random.key(0), (256, 4))
    >>> y = x @ jnp.arange(4.0) + jax.random.normal(jax.random.key(1), (256,))
    >>> task = study.Task(
    ...     init=lambda key: jax.random.normal(key, (4,)),
    ...     loss=lambda w, batch, key: jnp.mean((batch["x"] @ w - batch["y"]) ** 2),
    ...     train={"x": x, "y": y}, validation={"x": x, "y": y}, batch_size=4, name="regression",
    ... )
    >>> comparison = study.compare(
    ...     task, ["adam:constant", "adam:cosine"], learning_rates=[0.03, 0.1, 0.3], steps=200, seeds=5
    ... )
    >>> comparison.verdict().decision
    'better'
    """
    began = time.perf_counter()
    arms = _check_arms(arms)
    baseline = next(iter(arms)) if baseline is None else baseline
    check_choice("baseline", baseline, arms)
    grids = _check_rates(learning_rates, arms)
    check_integer("seeds", seeds, "[5, inf)")
    check_integer("steps", steps, "[1, inf)")
    check_integer("tuning_seeds", tuning_seeds, f"[1, {FIRST_FRESH_SEED}]")
    check_integer("growth", growth, "[0, inf)")
    check_integer("base_seed", base_seed, "[0, 4294967295]")
    check_bool("paired_batches", paired_batches)
    if margin is not None:
        check_scalar("margin", margin, "(0, inf)")
    if mode is not None:
        check_choice("mode", mode, MODES)
    if chunk is not None:
        check_integer("chunk", chunk, "[1, inf)")
    plan = Plan(steps, _validation_steps(validation_points, steps))
    evaluates = _check_evaluate(evaluate, arms)
    specs = {
        name: ArmSpec(
            function,
            check_arm(name, function, task, plan, evaluates[name], grids[name][0]),
            evaluates[name],
            0 if paired_batches else index,
        )
        for index, (name, function) in enumerate(arms.items())
    }

    store = None
    if out is not None:
        settings = {
            "tuning seeds": tuning_seeds,
            "baseline": baseline,
            "growth": growth,
            "base seed": base_seed,
        }
        store = Store(out, describe_study(task, specs, plan, grids, **settings))
    most = max(seeds, *(len(grid) * tuning_seeds for grid in grids.values()))
    example_rate = next(iter(grids.values()))[0]
    layout, seconds_a_step = settle_layout(
        task, specs, plan, store, trials=most, example_rate=example_rate, mode=mode, chunk=chunk
    )

    tuned = {name: Grid(grid, growth) for name, grid in grids.items()}
    fresh = range(FIRST_FRESH_SEED, FIRST_FRESH_SEED + seeds)
    info: dict[str, Any] = {
        "task": task.name,
        "baseline": baseline,
        "arms": list(arms),
        "steps": steps,
        "tuning_seeds": tuning_seeds,
        "seeds": seeds,
        "margin": None if margin is None else float(margin),
        "looks": [],
        "mode": layout.mode,
        "chunk": layout.width,
        "seconds_a_step": seconds_a_step,
        "devices": [device.device_kind for device in jax.devices()],
        "versions": _versions(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "metric_name": task.metric_name,
        "dataset": {"train": task.train_count, "validation": task.validation_count},
        "batch_size": task.batch_size,
        "parameters": task.parameter_count,
    }
    runner: Runner | None = None

    def so_far() -> Comparison:
        """The comparison of the trials that are finished."""
        found = collect(runner.results if runner else {}, specs, plan, baseline, fresh)
        means = tuning_means(found.table)
        complete = {
            name: grid for name, grid in tuned.items() if all(r in means.get(name, ()) for r in grid.rates)
        }
        chosen = {
            "best_rates": {name: grid.best(means[name]) for name, grid in complete.items()},
            "on_edge": {name: grid.on_edge(means[name]) for name, grid in complete.items()},
            "grid": {name: grid.rates for name, grid in tuned.items()},
            "grown": {name: grid.grown for name, grid in tuned.items()},
            "seconds": round(time.perf_counter() - began, 3),
        }
        return dataclasses.replace(found, info=info | chosen)

    def tuning_keys(rates: Mapping[str, Sequence[float]]) -> list[Key]:
        return [
            Key(name, rate, seed) for name in arms for rate in rates[name] for seed in range(tuning_seeds)
        ]

    total = sum(len(grid) * tuning_seeds for grid in grids.values()) + len(arms) * seeds
    with TrialProgress(total, progress) as bar:
        try:
            runner = Runner(task, specs, plan, layout, store, bar, base_seed)
            wanted = tuning_keys(grids)
            while wanted:
                runner.run(wanted, "tuning")
                means = tuning_means(so_far().table)
                wanted = tuning_keys({name: grid.extend(means[name]) for name, grid in tuned.items()})
                bar.extend(len(wanted))
            best = so_far().info["best_rates"]
            runner.run([Key(name, best[name], seed) for name in arms for seed in fresh], "verdict")
        except BaseException as error:
            partial = so_far()
            vars(error)["comparison"] = partial
            where = f", and in {str(out)!r}, where the study can go on" if out is not None else ""
            error.add_note(
                f"The {len(partial.table)} trials that had finished are in this exception's attribute "
                f"'comparison'{where}."
            )
            raise
    info["looks"] = store.look(seeds) if store else [seeds]
    return so_far()


def _versions() -> dict[str, str]:
    packages = ("adaptive-optax", "jax", "optax", "flax", "numpy", "scipy")
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


# ---- Arguments ----


def _check_arms(arms: Any) -> dict[str, Arm]:
    if isinstance(arms, str) or not isinstance(arms, Mapping | Sequence):
        raise ValueError(f"arms must map names to arms, or list names of usual arms, got {arms!r}.")
    if not isinstance(arms, Mapping):
        arms = {name: named_arm(name) for name in arms}
    if len(arms) < 2:
        raise ValueError(f"arms must be at least two, to be compared, got {len(arms)}.")
    for name in arms:
        if not isinstance(name, str) or not name:
            raise ValueError(f"arms must have non-empty strings as names, got {name!r}.")
    return dict(arms)


def _check_rates(learning_rates: Any, arms: Mapping[str, Arm]) -> dict[str, list[float]]:
    if isinstance(learning_rates, Mapping):
        if set(learning_rates) != set(arms):
            missing = sorted(set(arms) ^ set(learning_rates))
            raise ValueError(f"learning_rates must have the same names as arms; {', '.join(missing)} differ.")
        return {name: _check_grid(learning_rates[name]) for name in arms}
    return {name: _check_grid(learning_rates) for name in arms}


def _check_grid(rates: Any) -> list[float]:
    values = np.atleast_1d(np.asarray(rates, float))
    if values.ndim != 1 or not len(values) or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"learning_rates must be positive numbers, at least one, got {rates!r}.")
    return sorted(set(values.tolist()))


def _check_evaluate(evaluate: Any, arms: Mapping[str, Arm]) -> dict[str, Evaluate | None]:
    if isinstance(evaluate, Mapping):
        for name in evaluate:
            check_choice("evaluate", name, arms)
        return {name: evaluate.get(name) for name in arms}
    if not (evaluate is None or callable(evaluate)):
        raise ValueError(
            f"evaluate must be a function of (params, opt_state), or map arms to such, got {evaluate!r}."
        )
    return dict.fromkeys(arms, evaluate)


def _validation_steps(points: Any, steps: int) -> tuple[int, ...]:
    if isinstance(points, Sequence | np.ndarray) and not isinstance(points, str):
        for point in points:
            check_integer("validation_points", point, f"[0, {steps}]", "steps of a trial")
        return tuple(sorted({0, *map(int, points), steps}))
    check_integer("validation_points", points, "[1, inf)")
    return tuple(sorted(set(np.linspace(0, steps, int(points) + 1).round().astype(int).tolist())))
