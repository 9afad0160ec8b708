"""Comparing arms: every arm at its own best rate, on fresh seeds, with a verdict.

Tune: every arm runs at every peak rate on the tuning seeds, or its rates race; a grid whose best rate is on
its edge grows.
Confirm: every arm runs at its best rate on seeds that tuning has not seen: a fixed number, or more until it
is decided.
Judge: `judge` uses the confirming trials alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import inspect
import math
import os
import platform
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from adaptive_optax._core.checks import check_bool, check_choice, check_integer, check_name, check_scalar
from adaptive_optax._core.ranges import check_hyperparameter
from adaptive_optax.study.arms import NamedArm
from adaptive_optax.study.arms import arm as named_arm
from adaptive_optax.study.details import Details
from adaptive_optax.study.direction import Direction
from adaptive_optax.study.engine.chunks import Key, Results
from adaptive_optax.study.engine.jobs import check_executor, describe_executor
from adaptive_optax.study.engine.progress import TrialProgress
from adaptive_optax.study.engine.run import Train
from adaptive_optax.study.engine.runner import Runner
from adaptive_optax.study.engine.store import DIED, Look, Store
from adaptive_optax.study.engine.trials import one_study
from adaptive_optax.study.evaluation import Arm, Evaluate, declared
from adaptive_optax.study.result import FIRST_FRESH_SEED, Comparison, collect
from adaptive_optax.study.start import Start
from adaptive_optax.study.statistics.race import race_on, tuning_costs
from adaptive_optax.study.statistics.sequential import MOST_SEEDS, Sequential
from adaptive_optax.study.statistics.tuning import Grid, Round, grid_on, tuning_means
from adaptive_optax.study.subject import FunctionSubject, TaskSubject
from adaptive_optax.study.task import Task

MOST_STEPS = 2**31 - 1  # a step count is an int32
TUNINGS = ("grid", "race")


def compare(
    task: Task | Train,
    arms: Mapping[str, Arm | str] | Sequence[Arm | str],
    *,
    learning_rates: Sequence[float] | Mapping[str, Sequence[float]],
    seeds: int | Sequential = 8,
    steps: int,
    tuning_seeds: int = 3,
    baseline: str | None = None,
    margin: float | None = None,
    out: str | os.PathLike[str] | None = None,
    evaluate: Evaluate | Mapping[str, Evaluate | None] | None = None,
    validation_points: int | Sequence[int] = 20,
    growth: int | None = None,
    tuning: str = "grid",
    base_seed: int = 0,
    paired_batches: bool = True,
    mode: str | None = None,
    chunk: int | None = None,
    progress: bool | None = None,
    maximize: bool | None = None,
    executor: Any = None,
    start: Start | None = None,
    name: str | None = None,
    metric_name: str | None = None,
) -> Comparison:
    r"""Measures which of several ways to train is better on a task, each at its own best learning rate.

    Every arm runs at every peak rate on the tuning seeds; the rate with the best mean final metric is chosen
    (the lower one at a tie). At that rate the arm runs on fresh seeds, and only those enter the verdict.
    A seed determines the initial parameters, the order of the batches and the keys of the loss, identically
    for every arm, so that arms are compared seed by seed.

    Instead of a task, the first argument may be the user's own training function, in any framework:
    `train(run)` trains as its `Run` says, once per trial, and returns the final metric (or reports it, or
    yields metrics). It alone knows which devices it uses. A trial that raises is an outcome: it counts as
    diverged, and the table keeps its traceback. With `out`, the next call runs it again: what it lacked may
    be there by then. Under `jax.distributed` every process calls the function with the same trials in the
    same order, so that one trial may use the devices of all; what process 0 returns and reports counts.

    Args:
        task: What to train: a task, or a function `train(run) -> metric`.
        arms: At least two, as `{name: arm}` or as a list. An arm is a function
            `arm(learning_rate, total_steps) -> transformation`, or the name of a standard arm (`study.arm`)
            such as `"adam:one_cycle"`. In a list, functions are named by their `__name__`. For a training
            function, an arm may return any object; the function finds it in `run.transformation`.
        learning_rates: Peak rates to try, positive as float32, usually a factor of about 3 apart; or a
            mapping from arm names to rates. An arm with an attribute `learning_rates` has rates of its own,
            which a list does not replace: "prodigy" and "dadapt_adamw" are tuned over the factors 0.3, 1 and
            3 of the rate that they estimate, and the report says so. A mapping may leave such arms out, or
            name them to replace their rates.
        seeds: Fresh seeds for the verdict, from 5 to 100,000. With `out`, a later call with more seeds adds
            to the existing ones, and the error rate is shared among looks: look k may err with probability
            $0.05 \cdot 2^{-k}$. Or a plan, `study.Sequential(first, most)`: after each of its looks only
            undecided arms and the baseline get more seeds, until every arm is decided; an arm that more seeds
            cannot decide (a deterministic task, or no trial that did not diverge) stops too. All looks
            together err with probability 0.05. In `out` a plan must be kept, with its baseline, arms and
            rates: after its last look no seeds can be added.
        steps: Training steps per trial, from 1 to 2,147,483,647.
        tuning_seeds: Seeds for choosing the rates, from 1 to 1000.
        baseline: The arm that the others are compared with; the first by default.
        margin: Differences smaller than this are equivalent, in the metric's units. None means 1 % of the
            baseline's metric, which must then be positive: if the metric is negative before training, a
            margin is required.
        out: A folder in which every finished chunk is saved. Called again, even after a crash, the study
            resumes where it stopped; several processes may share the folder. A training function is
            recognized by its code and what it uses of its own module: functions, classes and values, of a
            namespace of options those that it reads by name. Changes in other modules are not seen; a warning
            names values in which none can be seen.
        evaluate: What is judged, overriding the arms' own choice: a function for all arms, or a mapping from
            arms to functions, or to None for the trained parameters. An arm not named here is judged by its
            own `evaluate` (`judged_by`); without one, by the average it keeps (`average_parameters`); without
            an average, by its trained parameters. The function is `evaluate(params, opt_state) -> params`. It
            may take the model state as a third argument, and `task` and `train` (the training data) by
            keyword; it may return `(params, model_state)`. If it neither takes nor returns the model state,
            batch statistics are recomputed for the parameters it returns (`recompute_batch_statistics`).
        validation_points: How often to compute the metric, evenly spaced, or the steps at which to compute
            it. It is always computed before the first and after the last step.
        growth: How many rates may be added on either side of an arm's grid while its best rate is on that
            edge; None for 3, or for 0 with `start`.
        tuning: How the rates are chosen. "grid" runs every rate on every tuning seed. "race" runs every rate
            on the first one, and then only rates that can still win: it finds the grid's rate, or one as good
            within the standard error, in more than 95 % of cases with at most 60 % of the trials
            (`tests/test_race.py`).
        base_seed: Part of all seeds; a different one repeats the study with different random numbers.
        paired_batches: False gives every arm its own order of batches, so that even identical arms differ.
            This checks the procedure itself, which must then find no difference.
        mode: How trials are trained, "scan", "step" or "vmap"; None chooses.
        chunk: Trials per call on each device; None chooses.
        progress: True shows a progress bar, False nothing. None shows it in a terminal; elsewhere, except in
            a notebook, it writes a plain line to the standard error every half a minute.
        maximize: Whether higher metrics are better. None: as the task says; lower for a training function,
            which gets no verdict if that looks wrong (`Comparison.verdicts`).
        executor: Where to train: any `concurrent.futures.Executor`, such as a process pool (spawned, not
            forked), `dask.distributed`'s `Client.get_executor()` or `mpi4py.futures`' pool; or submitit's.
            A job is a chunk of a task's trials, or one call of a training function. None trains in this
            process. Needs cloudpickle (the extra "cluster").
        start: A run under way, from which every arm goes on for `steps` steps, with its parameters and
            moments, on the same batches for equal seeds; schedules begin now. `decay_now` asks the question.
        name: What a training function is called in the report; None for the function's own name.
        metric_name: What its metric is called there; None for "metric".

    `evaluate`, `validation_points`, `paired_batches`, `mode`, `chunk` and `start` are for tasks alone; `name`
    and `metric_name` for training functions, since a task has its own.

    Returns:
        The comparison. Diverged trials are outcomes too. They are counted, and judged by the worse of their
        initial metric and the worst finite one.

    Raises:
        ValueError: If an argument is out of range, an arm does not run, or `out` holds another study. Raised
            before anything is trained; but only the first trial of an averaging arm shows that a training
            function does not ask for what is judged (`Run.eval_params`).
        RuntimeError: If all trials of an arm raised in tuning; it shows the first traceback.
        BaseException: An exception that interrupts the trials (including Ctrl-C) has the attribute
            `comparison`, with the finished trials.

    Examples:
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
        >>> comparison.recommend().arm
        'adam:cosine'
    """
    began = time.perf_counter()
    listed = not isinstance(arms, Mapping)
    arms, usual_arms = _check_arms(arms)
    baseline = next(iter(arms)) if baseline is None else baseline
    check_choice("baseline", baseline, arms)
    grids, own_rates = _check_rates(learning_rates, arms)
    if isinstance(seeds, Sequential):
        plan, most_seeds = seeds, seeds.most
    else:
        other = "" if isinstance(seeds, int) else "or a study.Sequential"
        check_integer("seeds", seeds, f"[5, {MOST_SEEDS}]", other)
        plan, most_seeds = None, int(seeds)
    check_integer("steps", steps, f"[1, {MOST_STEPS}]")
    check_choice("tuning", tuning, TUNINGS)
    check_integer("tuning_seeds", tuning_seeds, f"[1, {FIRST_FRESH_SEED}]")
    growth = (3 if start is None else 0) if growth is None else growth
    check_integer("growth", growth, "[0, 100]")
    check_integer("base_seed", base_seed, f"[0, {2**32 - 1}]")
    # Convert to Python integers, since they are written as JSON.
    steps, tuning_seeds, growth, base_seed = map(int, (steps, tuning_seeds, growth, base_seed))
    if margin is not None:
        check_scalar("margin", margin, "(0, inf)")
    if maximize is not None:
        check_bool("maximize", maximize)
    if executor is not None:
        check_executor(executor)
    for_tasks = {
        "evaluate": evaluate,
        "validation_points": validation_points,
        "paired_batches": paired_batches,
        "mode": mode,
        "chunk": chunk,
        "start": start,
    }
    names = {"name": name, "metric_name": metric_name}
    for argument, given in names.items():
        if given is not None:
            check_name(argument, given)
    if isinstance(task, Task):
        if any(given is not None for given in names.values()):
            raise ValueError("name and metric_name must be left out for a study.Task, which has its own.")
        if maximize is not None:
            task = dataclasses.replace(task, maximize=bool(maximize))
        subject = TaskSubject(task, arms, grids, steps, base_seed=base_seed, **for_tasks)
        if margin is None:
            subject.check_relative_margin()
    elif callable(task):
        _refuse_given(for_tasks)
        subject = FunctionSubject(task, arms, grids, steps, base_seed=base_seed, maximize=maximize, **names)
    else:
        raise ValueError(
            f"task must be a study.Task or a function train(run) -> metric, got {type(task).__name__}."
        )

    store = None if out is None else subject.store(out)
    plan_kept = None if plan is None else (plan.first, plan.most)
    if store is not None:
        store.check_look(Look(most_seeds, baseline, dict.fromkeys(arms, math.nan), plan_kept))
    direction = Direction(subject.maximize)
    tuned = {name: Grid(grid, growth, direction) for name, grid in grids.items()}
    details = Details(
        task=subject.name,
        baseline=baseline,
        arms=tuple(arms),
        usual_arms=usual_arms,
        own_arms=_sources(arms, listed),
        steps=steps,
        tuning=tuning,
        tuning_seeds=tuning_seeds,
        seeds=most_seeds,
        sequential=plan,
        margin=None if margin is None else float(margin),
        maximize=subject.maximize,
        out=None if out is None else os.fspath(out),
        own_rates=own_rates,
        looks=(),
        best_rates={},
        on_edge={},
        executor=describe_executor(executor),
        seconds_per_step={},
        versions=_versions(),
        command=(Path(sys.argv[0]).name, *sys.argv[1:]),
        grid={},
        grown={},
        seconds=0.0,
        **subject.details(),
    )
    runner: Runner | None = None
    asked: dict[Key, None] = {}  # the trials of this call so far; a folder may hold others
    looks_at = (most_seeds,) if plan is None else plan.looks

    def known() -> Details:
        """The details by now."""
        counts = {name: [0, 0] for name in arms}
        for key in asked:
            counts[key.arm][key.seed >= FIRST_FRESH_SEED] += 1
        return dataclasses.replace(
            details,
            wanted={name: (tuned, max(judged, looks_at[0])) for name, (tuned, judged) in counts.items()},
            grid={name: tuple(grid.rates) for name, grid in tuned.items()},
            grown={name: tuple(grid.grown) for name, grid in tuned.items()},
            seconds=round(time.perf_counter() - began, 3),
        )

    def so_far() -> Comparison:
        """The comparison of the finished trials."""
        return collect(runner.results if runner else {}, asked, subject, known())

    def train(wanted: list[Key], phase: str, runner: Runner) -> None:
        asked.update(dict.fromkeys(wanted))
        if store is not None:
            store.save_details(known().as_json())
        runner.run(wanted, phase)

    def next_rounds() -> dict[str, Round]:
        """What tuning still needs, by arm."""
        table = so_far().table
        if tuning == "race":
            costs = tuning_costs(table, direction)
            return {name: race_on(grid, costs.get(name, {}), tuning_seeds) for name, grid in tuned.items()}
        means = tuning_means(table, direction)
        return {name: grid_on(grid, means.get(name, {}), tuning_seeds) for name, grid in tuned.items()}

    def lacking(rounds: Mapping[str, Round]) -> list[Key]:
        """The trials of these rounds that were not asked for yet."""
        keys = [
            Key(name, rate, seed)
            for name, found in rounds.items()
            if not found.finished
            for rate in found.running
            for seed in range(found.seeds)
        ]
        return [key for key in keys if key not in asked]

    rounds = next_rounds()
    trials = len(lacking(rounds)) + len(arms) * looks_at[0]
    open_ended = plan is not None or tuning == "race" or growth > 0
    shown = TrialProgress(
        trials, progress, direction, steps, open_ended, subject.name, isinstance(subject, TaskSubject)
    )
    with one_study(), shown as bar:
        try:
            most = max(looks_at[0], *(len(found.running) * found.seeds for found in rounds.values()))
            trainer, chosen = subject.trainer(store, executor, trials=most)
            details = dataclasses.replace(details, **chosen)
            runner = Runner(trainer, store, bar, executor)
            while wanted := lacking(rounds):
                bar.extend(len(wanted) if asked else 0)
                train(wanted, "tuning", runner)
                _refuse_broken(runner.results, arms)
                rounds = next_rounds()
            best = {name: found.best for name, found in rounds.items() if found.best is not None}
            # A run under way has its rate; one that is tried alone is not the best of several.
            on_edge = {
                name: grid.on_edge(best[name]) and not (start is not None and len(grid.rates) == 1)
                for name, grid in tuned.items()
            }
            details = dataclasses.replace(details, best_rates=best, on_edge=on_edge)
            if store is not None:
                store.check_look(Look(most_seeds, baseline, best, plan_kept))
            running, trained, looks = list(arms), 0, []
            for seeds_by_now in looks_at:
                fresh = range(FIRST_FRESH_SEED + trained, FIRST_FRESH_SEED + seeds_by_now)
                wanted = [Key(name, best[name], seed) for name in running for seed in fresh]
                bar.extend(len(wanted) if trained else 0)
                train(wanted, "verdict", runner)
                look = Look(seeds_by_now, baseline, best, plan_kept)
                looks = store.look(look) if store else [*looks, look]
                details = dataclasses.replace(details, looks=tuple(each.seeds for each in looks))
                undecided = so_far().unfinished
                if not undecided:
                    break
                running, trained = [name for name in arms if name in (baseline, *undecided)], seeds_by_now
        except BaseException as error:
            partial = so_far()
            vars(error)["comparison"] = partial
            if len(partial.table):
                error.add_note(_note(partial.table, store, list(asked)))
            raise
        finally:
            if runner is not None:
                runner.close()
    if store is not None:
        store.save_details(known().as_json())
    return so_far()


def _refuse_broken(results: Results, arms: Mapping[str, Any]) -> None:
    """Stops the study if every trial of an arm raised: its code is wrong, not its learning rate."""
    for name in arms:
        errors = [str(curves.error) for key, curves in results.items() if key.arm == name]
        if errors and all(errors):
            which = "the only trial" if len(errors) == 1 else f"all {len(errors)} trials"
            named = [line for line in errors[0].splitlines() if re.match(r"[\w.]+(:|$)", line)]
            first = f", the first with {named[-1]}" if named else ""
            raise RuntimeError(f"{which} of arm {name!r} raised{first}\n\n{errors[0]}")


def _note(table: pd.DataFrame, store: Store | None, keys: Sequence[Key]) -> str:
    count, raised = len(table), any(error and not error.startswith(DIED) for error in table["error"])
    trials = "1 finished trial is" if count == 1 else f"{count} finished trials are"
    note = f"The {trials} in this exception's attribute 'comparison'"
    kept = store.count(keys) if store else 0
    if store is None or not kept:
        return f"{note}."
    which = "" if kept == count else f"{kept} of them "
    note = f"{note}, and {which}in {str(store.path)!r}, from which the study can resume"
    return f"{note}; trials that raised run again." if raised else f"{note}."


def _versions() -> dict[str, str]:
    packages = ("adaptive-optax", "jax", "optax", "flax", "numpy", "scipy")
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


# ---- Arguments ----


def _check_arms(arms: Any) -> tuple[dict[str, Arm], dict[str, str]]:
    """Returns the arms by name, and the names that `study.arm` gives to the standard ones."""
    if isinstance(arms, str) or not isinstance(arms, Mapping | Sequence):
        raise ValueError(
            f"arms must map names to arms, or list arms and names of standard arms, got {arms!r}."
        )
    if not isinstance(arms, Mapping):
        names = [_name_of(each) for each in arms]
        if duplicates := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"arms must have distinct names, got {min(duplicates)!r} twice; {_NAME_THEM}.")
        arms = dict(zip(names, arms, strict=True))
    if len(arms) < 2:
        raise ValueError(f"arms must hold at least two arms, got {len(arms)}.")
    for name in arms:
        check_name("the name of an arm", name)
    arms = {name: named_arm(each) if isinstance(each, str) else each for name, each in arms.items()}
    return arms, {name: each.__name__ for name, each in arms.items() if isinstance(each, NamedArm)}


def _sources(arms: Mapping[str, Arm], listed: bool) -> dict[str, str]:
    """Where the user's own arms come from, if known: what they say, or their names in a list."""
    said = {name: declared(each, "source") for name, each in arms.items()}
    named = {name: name for name in arms if listed and name.isidentifier()}
    return named | {name: source for name, source in said.items() if isinstance(source, str)}


_NAME_THEM = "give a dictionary with a name for each"


def _name_of(arm: Any) -> str:
    name = arm if isinstance(arm, str) else getattr(arm, "__name__", "<no name>")
    if not isinstance(name, str) or name.startswith("<"):  # "<lambda>", for instance
        raise ValueError(f"arms in a list must have names, and {arm!r} has none; {_NAME_THEM}.")
    return name


def _check_rates(
    learning_rates: Any, arms: Mapping[str, Arm]
) -> tuple[dict[str, list[float]], tuple[str, ...]]:
    """Returns the rates of every arm, and the arms whose rates are those that they declare."""
    found = {name: declared(each, "learning_rates") for name, each in arms.items()}
    own = {
        name: _check_grid(f"learning_rates of arm {name!r}", rates)
        for name, rates in found.items()
        if rates is not None
    }
    if isinstance(learning_rates, Mapping):
        differ = {*arms} - {*own} - {*learning_rates} | {*learning_rates} - {*arms}
        if differ:
            names = ", ".join(sorted(map(str, differ)))
            raise ValueError(f"learning_rates must have the same names as arms; {names} differ.")
        given = {name: _check_grid("learning_rates", rates) for name, rates in learning_rates.items()}
        grids = own | given
    else:
        given, shared = {}, _check_grid("learning_rates", learning_rates)
        grids = {name: shared for name in arms} | own
    return {name: grids[name] for name in arms}, tuple(name for name in own if name not in given)


def _check_grid(name: str, rates: Any) -> list[float]:
    try:
        values = np.atleast_1d(np.asarray(rates, float))
    except (TypeError, ValueError):
        values = np.full(1, np.nan)
    if values.ndim != 1 or not len(values) or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"{name} must be one or more positive numbers, got {rates!r}.")
    for value in values.tolist():
        check_hyperparameter(name, value, interval="(0, inf)", dtype=np.float32)
    return sorted(set(values.tolist()))


def _refuse_given(for_tasks: Mapping[str, Any]) -> None:
    """Refuses what has no meaning for a training function."""
    parameters = inspect.signature(compare).parameters
    for name, value in for_tasks.items():
        default = parameters[name].default
        if value is not default and value != default:
            raise ValueError(
                f"{name} must be left out for a training function, which decides about it itself, "
                f"got {value!r}."
            )
