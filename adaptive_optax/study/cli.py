"""The command `adaptive-optax`: compare arms, or look for a learning rate, on a task of one's own."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from rich.console import Console

from adaptive_optax.study.arms import OPTIMIZERS, SCHEDULES, arm
from adaptive_optax.study.comparison import compare
from adaptive_optax.study.report import print_summary
from adaptive_optax.study.result import Comparison
from adaptive_optax.study.task import Task
from adaptive_optax.transforms.averaging import averaged_parameters

DEFAULT_RATES = "3e-4,1e-3,3e-3,1e-2,3e-2"
INTERRUPTED = 130  # the shell's exit code after Ctrl-C

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Answers learning-rate questions on your own model and data.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

TaskArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:TASK",
        help="A study.Task, or a function without arguments that makes one: 'package.module:task' or "
        "'path/to/file.py:task'. Built in: adaptive_optax.study.tasks:localization and :text.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder for the report, tables and finished trials; run again to go on.", show_default=False
    ),
]
CpuDevices = Annotated[
    int,
    typer.Option(min=0, help="Devices to split a CPU into; 0 for one a core.", rich_help_panel="Execution"),
]


@app.command("compare")
def compare_command(
    task: TaskArgument,
    arms: Annotated[
        str,
        typer.Option(
            help=f"Comma-separated optimizer:schedule[:averaged]; the first is the baseline. "
            f"Optimizers: {', '.join(OPTIMIZERS)}. Schedules: {', '.join(SCHEDULES)}."
        ),
    ] = "adam:constant,adam:exponential,adam:one_cycle",
    learning_rates: Annotated[
        str, typer.Option("--learning-rates", "--rates", help="Peak rates to tune over, comma-separated.")
    ] = DEFAULT_RATES,
    steps: Annotated[int, typer.Option(help="Training steps of every trial.")] = 1000,
    seeds: Annotated[int, typer.Option(help="Fresh seeds for the verdict, at least 5.")] = 8,
    tuning_seeds: Annotated[int, typer.Option(help="Seeds for choosing the rates.")] = 3,
    margin: Annotated[
        float | None,
        typer.Option(
            help="Smaller differences are equivalent, in the metric's units.", show_default="1 % of it"
        ),
    ] = None,
    out: Out = None,
    base_seed: Annotated[int, typer.Option(help="Repeats the study with other random numbers.")] = 0,
    mode: Annotated[
        str | None,
        typer.Option(help="scan, step or vmap.", show_default="the fastest", rich_help_panel="Execution"),
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(
            help="Trials a call on each device.",
            show_default="by speed or memory",
            rich_help_panel="Execution",
        ),
    ] = None,
    cpu_devices: CpuDevices = 0,
) -> None:
    """Compares ways to train, each at its own best peak rate, and gives a verdict."""
    console = Console(highlight=False)
    with _plain_errors():
        names = [name.strip() for name in arms.split(",") if name.strip()]
        if duplicates := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"arms must differ, got {duplicates.pop()!r} twice.")
        built = {name: arm(name) for name in names}
        rates = _numbers("learning-rates", learning_rates)
        _split_cpu(cpu_devices)
        loaded = _load_task(task)
        try:
            comparison = compare(
                loaded,
                built,
                learning_rates=rates,
                steps=steps,
                seeds=seeds,
                tuning_seeds=tuning_seeds,
                margin=margin,
                out=out,
                evaluate=averaged_parameters,
                base_seed=base_seed,
                mode=mode,
                chunk=chunk,
            )
        except KeyboardInterrupt as error:
            partial: Comparison | None = vars(error).get("comparison")
            console.print(f"Stopped after {0 if partial is None else len(partial.table)} finished trials.")
            if out is not None:
                console.print(f"They are kept in {out}; the same command goes on from there.")
            raise typer.Exit(INTERRUPTED) from None
        if out is not None:
            comparison.table.to_csv(out / "trials.csv", index=False)
            comparison.save(out / "comparison.npz")
            comparison.plot().savefig(out / "report.png", dpi=150)
            comparison.to_html(out / "report.html")
        print_summary(comparison, console)
        if out is not None:
            console.print(f"\nReport: {out / 'report.html'}")


@app.command("lr-find")
def lr_find_command(
    task: TaskArgument,
    optimizer: Annotated[
        str, typer.Option(help=f"The optimizer at a constant rate: {', '.join(OPTIMIZERS)}.")
    ] = "adam",
    low: Annotated[float, typer.Option(help="Lowest rate.")] = 1e-6,
    high: Annotated[float, typer.Option(help="Highest rate.")] = 1.0,
    steps: Annotated[
        int | None, typer.Option(help="Steps of a trial.", show_default="as in lr_range_test")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Seeds at every rate.", show_default="as in lr_range_test")
    ] = None,
    out: Out = None,
    cpu_devices: CpuDevices = 0,
) -> None:
    """Looks for a learning rate with short trials at constant rates."""
    from adaptive_optax.study.range_test import lr_range_test

    console = Console(highlight=False)
    with _plain_errors():
        build = arm(f"{optimizer}:constant")
        _split_cpu(cpu_devices)
        loaded = _load_task(task)
        given: dict[str, Any] = {"steps": steps, "seeds": seeds}
        given = {name: value for name, value in given.items() if value is not None}
        found = lr_range_test(loaded, lambda rate: build(rate, 1), low=low, high=high, **given)
        console.print(found.sentence)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            found.table.to_csv(out / "lr_find.csv", index=False)
            found.plot().savefig(out / "lr_find.png", dpi=150)
            console.print(f"Picture: {out / 'lr_find.png'}")


def main() -> None:
    """Runs the command line."""
    app(prog_name="adaptive-optax")


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Turns a wrong argument into one line and exit code 2."""
    try:
        yield
    except ValueError as error:
        typer.echo(f"adaptive-optax: {error}", err=True)
        raise typer.Exit(2) from None


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{name} must be numbers separated by commas, got {text!r}.") from None


def _split_cpu(devices: int) -> None:
    with contextlib.suppress(RuntimeError):  # raised where JAX has started already
        jax.config.update("jax_num_cpu_devices", devices or os.cpu_count() or 1)


def _load_task(name: str) -> Task:
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ValueError(f"MODULE:TASK must name a module and a task in it, got {name!r}.")
    sys.path.insert(0, os.getcwd())
    try:
        if place.endswith(".py"):
            if not Path(place).is_file():
                raise FileNotFoundError("there is no such file")
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # classes in it may look themselves up
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except (ImportError, FileNotFoundError) as error:
        raise ValueError(f"{place!r} cannot be imported: {error}") from error
    found = getattr(module, attribute, None)
    if found is None:
        raise ValueError(f"module {place!r} has no {attribute!r}.")
    if not isinstance(found, Task) and callable(found):
        found = found()
    if not isinstance(found, Task):
        raise ValueError(f"{name} must be a study.Task or make one, got {type(found).__name__}.")
    return found
