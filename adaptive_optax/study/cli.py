"""The command `adaptive-optax`: compares arms, or finds a learning rate, on the user's own task."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from rich.console import Console

from adaptive_optax._core.checks import check_integer
from adaptive_optax.study.arms import ESTIMATORS, FACTORS, OPTIMIZERS, SCHEDULE_FREE, SCHEDULES, is_standard
from adaptive_optax.study.comparison import compare
from adaptive_optax.study.engine.store import check_folder
from adaptive_optax.study.loading import (
    load_arm,
    load_arms,
    load_function,
    load_starts,
    load_subject,
    load_task,
)
from adaptive_optax.study.origin import described
from adaptive_optax.study.report.findings import judge_all
from adaptive_optax.study.report.page import print_summary
from adaptive_optax.study.result import Comparison
from adaptive_optax.study.statistics.sequential import Sequential

DEFAULT_RATES = "3e-4,1e-3,3e-3,1e-2,3e-2"
# Exit codes. FAILED covers later failures and a missing verdict; INTERRUPTED is the shell's code for Ctrl-C.
WRONG_ARGUMENT, FAILED, INTERRUPTED = 2, 1, 130

app: typer.Typer = typer.Typer(
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
        "'path/to/file.py:task'. Built in: adaptive_optax.study.tasks:localization, :digits and :text. "
        "compare also takes a training function of your own, train(run).",
        show_default=False,
    ),
]
Margin = Annotated[
    float | None,
    typer.Option(
        help="Differences below this count as equivalent, in the metric's units.",
        show_default="1 % of the baseline's metric",
    ),
]
CpuDevices = Annotated[
    int,
    typer.Option(help="Devices to split a CPU into; 0 for one per core.", rich_help_panel="Execution"),
]
Traceback = Annotated[
    bool,
    typer.Option("--traceback", help="Show where an error comes from.", rich_help_panel="Execution"),
]


@app.command("compare")
def compare_command(
    task: TaskArgument,
    arms: Annotated[
        str,
        typer.Option(
            help="Comma-separated; the first is the baseline. Standard arms: optimizer:schedule, followed "
            f"by :limited, :averaged or :ema if wanted. Optimizers: {', '.join(OPTIMIZERS)}. Schedules: "
            f"{', '.join(SCHEDULES)}. Without a schedule: "
            f"{', '.join(f'schedule_free:{name}' for name in SCHEDULE_FREE)}, {', '.join(ESTIMATORS)}, ema "
            "(adam:constant:ema). Your own arms: "
            "'package.module:arm' or 'path/to/file.py:arm', functions of (learning_rate, total_steps). "
            "Prefix an arm with 'name=' to rename it."
        ),
    ] = "adam:constant,adam:exponential,adam:one_cycle",
    learning_rates: Annotated[
        str,
        typer.Option(
            "--learning-rates",
            "--rates",
            help="Peak rates to tune over, comma-separated. Arms of "
            f"{' and '.join(ESTIMATORS)} have their own: {', '.join(f'{each:g}' for each in FACTORS)}.",
        ),
    ] = DEFAULT_RATES,
    steps: Annotated[int, typer.Option(help="Training steps of every trial.")] = 1000,
    seeds: Annotated[
        str,
        typer.Option(
            help="Fresh seeds for the verdict, at least 5; or first..most, such as 5..32: more seeds until "
            "every arm is decided."
        ),
    ] = "8",
    tuning: Annotated[
        str,
        typer.Option(help="grid: every rate on every tuning seed. race: those with little chance drop out."),
    ] = "grid",
    tuning_seeds: Annotated[int, typer.Option(help="Seeds for choosing the rates.")] = 3,
    margin: Margin = None,
    maximize: Annotated[
        bool | None,
        typer.Option(
            "--maximize/--minimize",
            help="Whether a higher metric is better.",
            show_default="the task's setting",
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            help="Folder for the report, tables and finished trials; run again to resume.",
            show_default=False,
        ),
    ] = None,
    base_seed: Annotated[int, typer.Option(help="Repeats the study with other random numbers.")] = 0,
    mode: Annotated[
        str | None,
        typer.Option(help="scan, step or vmap.", show_default="the fastest", rich_help_panel="Execution"),
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(
            help="Trials per call on each device.",
            show_default="by speed or memory",
            rich_help_panel="Execution",
        ),
    ] = None,
    cpu_devices: CpuDevices = 0,
    show_traceback: Traceback = False,
) -> None:
    """Compares ways to train, each at its own best peak rate, and gives a verdict."""
    console = Console(highlight=False)
    with _plain_errors(show_traceback):
        rates = _numbers("learning-rates", learning_rates)
        _split_cpu(cpu_devices)
        loaded = load_subject(task)
        sources = load_arms(arms)
        try:
            comparison = compare(
                loaded,
                {name: found for name, found, _ in sources},
                learning_rates=rates,
                steps=steps,
                seeds=_seeds(seeds),
                tuning=tuning,
                tuning_seeds=tuning_seeds,
                margin=margin,
                out=out,
                base_seed=base_seed,
                mode=mode,
                chunk=chunk,
                maximize=maximize,
            )
        except KeyboardInterrupt as error:
            _report_saved_trials(vars(error).get("comparison"), out, console)
            raise typer.Exit(INTERRUPTED) from None
        own = {name: source for name, _, source in sources}
        details = dataclasses.replace(comparison.details, own_arms=own)
        comparison = dataclasses.replace(comparison, details=details)
        print_summary(comparison, console)  # first, because writing may fail
        judged = bool(judge_all(comparison)[0])
        lost: set[Path] = set()
        if out is not None:
            report = Path(out, "report.html")
            files = {
                Path(out, "trials.csv"): comparison.to_csv,
                Path(out, "comparison.npz"): comparison.save,
                Path(out, "report.png"): lambda path: comparison.plot().savefig(path, dpi=150),
                report: comparison.to_html,
            }
            lost = _write(files, show_traceback)
            if report not in lost:
                console.print(f"\nReport: {report}", markup=False)
        if lost or not judged:
            raise typer.Exit(FAILED)


@app.command("lr-find")
def lr_find_command(
    task: TaskArgument,
    optimizer: Annotated[
        str,
        typer.Option(
            help=f"The optimizer at a constant rate: {', '.join(OPTIMIZERS)}; or your own arm, as in compare."
        ),
    ] = "adam",
    low: Annotated[float, typer.Option(help="Lowest rate.")] = 1e-6,
    high: Annotated[float, typer.Option(help="Highest rate.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Steps per trial.")] = 100,
    seeds: Annotated[int, typer.Option(help="Seeds per rate.")] = 5,
    out: Annotated[
        str | None,
        typer.Option(
            help="Folder for lr_find.csv and lr_find.png; a later call trains everything again and "
            "overwrites them.",
            show_default=False,
        ),
    ] = None,
    cpu_devices: CpuDevices = 0,
    show_traceback: Traceback = False,
) -> None:
    """Finds a learning rate with short trials at constant rates."""
    from adaptive_optax.study.range_test import lr_range_test

    console = Console(highlight=False)
    with _plain_errors(show_traceback):
        if is_standard(optimizer) and optimizer not in OPTIMIZERS:
            raise ValueError(
                f"--optimizer must be an optimizer without a schedule, or MODULE:ARM, got {optimizer!r}."
            )
        folder = None if out is None else check_folder("--out", out)
        _split_cpu(cpu_devices)
        loaded = load_task(task)
        arm = load_arm(f"{optimizer}:constant" if optimizer in OPTIMIZERS else optimizer).arm
        found = lr_range_test(
            loaded, lambda rate: arm(rate, steps), low=low, high=high, steps=steps, seeds=seeds
        )
        console.print(found.sentence, markup=False)
        if folder is not None:
            picture = folder / "lr_find.png"
            files = {
                folder / "lr_find.csv": lambda path: found.table.to_csv(path, index=False),
                picture: lambda path: found.plot().savefig(path, dpi=150),
            }
            lost = _write(files, show_traceback)
            if picture not in lost:
                console.print(f"Picture: {picture}", markup=False)
            if lost:
                raise typer.Exit(FAILED)


@app.command("decay-now")
def decay_now_command(
    start: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:START",
            help="Where a run of a study.Task is: a study.Start, several (checkpoints of one run), or a "
            "function without arguments that returns them.",
            show_default=False,
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option(help="MODULE:TASK, a study.Task.", show_default="task, in the same module"),
    ] = None,
    steps: Annotated[
        int, typer.Option(help="For how many steps to go on from each checkpoint: those that are left.")
    ] = 1000,
    same_end: Annotated[
        bool,
        typer.Option(
            "--same-end",
            help="Go on from earlier checkpoints for longer, so that all end where the newest does.",
        ),
    ] = False,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="The run's rate now. Needed if the state does not hold it, as that of optax.adam(3e-3).",
            show_default="read from the optimizer's state",
        ),
    ] = None,
    optimizer: Annotated[
        str,
        typer.Option(
            help=f"The run's optimizer: {', '.join(OPTIMIZERS)}; or 'package.module:function', a function of "
            "a learning rate or schedule."
        ),
    ] = "adam",
    seeds: Annotated[int, typer.Option(help="Orders of the batches to try, at least 5.")] = 8,
    margin: Margin = None,
    out: Annotated[
        str | None,
        typer.Option(
            help="Folder for reports, picture and finished trials; run again to resume.", show_default=False
        ),
    ] = None,
    cpu_devices: CpuDevices = 0,
    show_traceback: Traceback = False,
) -> None:
    """Says whether a run under way should decay its learning rate now, or later."""
    from adaptive_optax.study.decay import decay_now

    console = Console(highlight=False)
    with _plain_errors(show_traceback):
        folder = None if out is None else check_folder("--out", out)
        _split_cpu(cpu_devices)
        starts = load_starts(start)
        loaded: Any = load_subject(f"{start.rpartition(':')[0]}:task" if task is None else task)
        made_by = optimizer if optimizer in OPTIMIZERS else load_function("--optimizer", optimizer)
        found = decay_now(
            loaded, starts, steps=steps, learning_rate=learning_rate, optimizer=made_by, seeds=seeds,
            margin=margin, out=folder, same_end=same_end,
        )  # fmt: skip
        console.print(found.sentence, markup=False)
        print_summary(found.comparisons[-1], console)
        if folder is not None:
            picture = folder / "decay_now.png"
            files: dict[Path, Callable[[Path], object]] = {
                folder / "decay_now.csv": lambda path: found.table.to_csv(path, index=False),
                picture: lambda path: found.plot().savefig(path, dpi=150),
            }
            labels = {picture: "Picture"}
            for step, comparison in zip(found.steps, found.comparisons, strict=True):
                report = folder / f"report_{step}.html"
                files[report], labels[report] = comparison.to_html, f"Report from step {step:,}"
            lost = _write(files, show_traceback)
            written = {path: what for path, what in labels.items() if path not in lost}
            console.print("", *(f"{what}: {path}" for path, what in written.items()), sep="\n", markup=False)
            if lost:
                raise typer.Exit(FAILED)


@app.command("status")
def status_command(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="The folder given as --out, or out=.", show_default=False)
    ],
    show_traceback: Traceback = False,
) -> None:
    """Shows the progress of a study in another process or on a cluster."""
    from adaptive_optax.study.status import read_status, studies_in

    console = Console(highlight=False)
    with _plain_errors(show_traceback):
        for each in studies_in(folder):
            if each != Path(folder):  # of `decay-now`
                console.print(f"{each}:", markup=False)
            read_status(each).print(console)


def main() -> None:
    """Runs the command line."""
    app(prog_name="adaptive-optax")


def _report_saved_trials(partial: Comparison | None, out: str | None, console: Console) -> None:
    if partial is None or partial.table.empty:
        console.print("Stopped before the first trials had finished.")
        return
    count = len(partial.table)
    console.print(f"Stopped after {count} finished trial{'s' * (count > 1)}.")
    if out is not None and any(Path(out).glob("trials/*.npz")):
        console.print(
            f"{'They are' if count > 1 else 'It is'} saved in {out}; run the same command again to resume.",
            markup=False,
        )


@contextlib.contextmanager
def _plain_errors(show_traceback: bool) -> Iterator[None]:
    """Turns an error into one line and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("adaptive-optax: stopped.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except typer.Exit:
        raise
    except (Exception, SystemExit) as error:
        _print_error("", error, show_traceback)
        is_argument = isinstance(error, ValueError | OSError)
        raise typer.Exit(WRONG_ARGUMENT if is_argument else FAILED) from None


def _write(files: dict[Path, Callable[[Path], object]], show_traceback: bool) -> set[Path]:
    """Writes files independently of each other; returns those that could not be written."""
    lost = set()
    for path, write in files.items():
        try:
            write(path)
        except Exception as error:
            _print_error(f"{path} was not written: ", error, show_traceback)
            lost.add(path)
    return lost


def _print_error(what: str, error: BaseException, show_traceback: bool) -> None:
    if show_traceback:
        traceback.print_exception(error)
    message = str(error) if type(error) is ValueError else f"{described(error)}; use --traceback for details."
    typer.echo(f"adaptive-optax: {' '.join((what + message).split())}", err=True)


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{name} must be numbers separated by commas, got {text!r}.") from None


def _seeds(text: str) -> int | Sequential:
    """Reads a number of seeds, or a plan as first..most."""
    try:
        first, *most = map(int, text.split("..", 1))
    except ValueError as error:
        raise ValueError(f"--seeds must be a number, or first..most such as 5..32, got {text!r}.") from error
    return Sequential(first, *most) if most else first


def _split_cpu(devices: int) -> None:
    cores = os.cpu_count() or 1
    check_integer("--cpu-devices", devices, f"[0, {max(64, 4 * cores)}]", f"{cores} cores")
    with contextlib.suppress(RuntimeError):  # raised if JAX has already started
        jax.config.update("jax_num_cpu_devices", devices or cores)
