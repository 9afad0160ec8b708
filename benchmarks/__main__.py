"""`python -m benchmarks`: measures, writes JSON, and generates tables and pictures from it."""

from __future__ import annotations

import contextlib
import enum
import importlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import rich
import rich.progress
import typer

from benchmarks import compilers
from benchmarks.readme import render as render_readme
from benchmarks.setting import RESULTS, cores_busy_elsewhere, hardware, setting
from benchmarks.studies import MEASURES, published
from benchmarks.timing import OutOfTime

PROJECT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    *sorted(path.relative_to(PROJECT).as_posix() for path in (PROJECT / "docs").rglob("*.md")),
)
PICTURES = PROJECT / "docs" / "performance"
MOST_CORES_BUSY = 0.2


class Suite(enum.StrEnum):
    """The available benchmarks."""

    update_step = "update_step"
    scaling = "scaling"
    study_throughput = "study_throughput"
    end_to_end = "end_to_end"
    telemetry = "telemetry"
    low_precision = "low_precision"
    error_control = "error_control"
    error_rates = "error_rates"
    sequential = "sequential"
    limit_cost = "limit_cost"
    structure = "structure"
    memory = "memory"
    soak = "soak"


# What an hour with an accelerator is for, and the seconds after which each begins nothing more. Together with
# starting the processes they take at most `ACCELERATOR_SECONDS`.
ON_ACCELERATOR = {
    Suite.update_step: 210,
    Suite.end_to_end: 60,
    Suite.study_throughput: 70,
    Suite.limit_cost: 30,
    Suite.telemetry: 20,
}
ACCELERATOR_SECONDS = 480
AHEAD_OF_TIME = (Suite.structure, Suite.memory)  # by compilers that are installed apart
NOT_TIMED = (*AHEAD_OF_TIME, Suite.soak, Suite.error_control, Suite.error_rates, Suite.sequential)


def module(suite: str) -> Any:
    """Returns a suite's module.

    It has `MEASURES` (modules of the library, for `benchmarks.sources`), `measure(quick, advance)`,
    `tables(result)` and perhaps `figures(result)`.
    """
    return importlib.import_module(f"benchmarks.{suite}")


def stored(folder: Path = RESULTS) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the results in a folder, by suite and hardware."""
    found: dict[str, dict[str, Any]] = {}
    for suite in Suite:
        for path in sorted(folder.glob(f"{suite}_*.json")):
            try:
                result = json.loads(path.read_text())
            except ValueError as error:
                raise ValueError(f"{path} is no JSON: {error}.") from None
            if not {"hardware", "sources"} <= result.keys():
                raise ValueError(f"{path} does not record its origin; run --suite {suite.value} again.")
            found.setdefault(suite, {})[result["hardware"]] = result
    return found


def draw(results: dict[str, dict[str, dict[str, Any]]], folder: Path) -> None:
    """Draws all pictures of the results."""
    for suite, by_hardware in results.items():
        for where, result in by_hardware.items():
            for name, figure in getattr(module(suite), "figures", lambda _: {})(result).items():
                folder.mkdir(parents=True, exist_ok=True)
                figure.savefig(folder / f"{name}_{where}.png", dpi=150)


def rendered(page: str) -> str:
    """Returns a page's text with tables generated from the committed results and studies."""
    text = (PROJECT / page).read_text()
    tables: dict[str, Any] = {suite: module(suite).tables for suite in Suite}
    return render_readme(text, stored(), tables, published(), root="../" * page.count("/"))


def run_here(suite: Suite, out: Path, quick: bool, seconds: float = math.inf) -> None:
    """Measures one suite in this process and writes its result, if there is one after `seconds`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror}.") from None
    busy = cores_busy_elsewhere()
    if not quick and suite not in NOT_TIMED and busy > MOST_CORES_BUSY:
        raise ValueError(f"Other programs keep {busy:.1f} cores busy; timings need an idle machine.")
    # PyTorch's contenders need some of a GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # The study splits a CPU into one device per core; in the other suites a step uses all cores.
    if suite in (Suite.study_throughput, Suite.low_precision, Suite.error_control):
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    began = time.perf_counter()
    with rich.progress.Progress(
        rich.progress.SpinnerColumn(), "{task.description}", rich.progress.TimeElapsedColumn(), transient=True
    ) as progress:
        bar = progress.add_task(suite.value)

        def advance(text: str) -> None:
            progress.update(bar, description=f"{suite.value}: {text}")
            if time.perf_counter() - began > seconds:
                raise OutOfTime(text)

        try:
            result = module(suite).measure(quick, advance)
        except OutOfTime as stopped:
            raise ValueError(f"{suite.value}: no result after {seconds:g} s, before {stopped}.") from None
    if not result.get("rows", True):
        raise ValueError(f"{suite.value}: {result['note']}.")
    limit = "" if seconds == math.inf else f" --seconds {seconds:g}"
    command = f"python -m benchmarks --suite {suite.value}{limit}{' --quick' if quick else ''}"
    result = setting(command, module(suite).MEASURES) | {"cores_busy_elsewhere": busy} | result
    path = out / f"{suite.value}_{result['hardware']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    for table in module(suite).tables(result).values():
        rich.print(table.rich())
    rich.print(f"{suite.value}: {time.perf_counter() - began:.0f} s, {path}")


def run_examples(out: Path, quick: bool) -> None:
    """Runs the examples whose results are published, into `docs/`, or into an `out` of one's own."""
    # Relative where it is published: a study records where it was written.
    docs = Path("docs") if out == RESULTS else out / "docs"
    for folder, study in published().items():
        script, *options = study.command
        _run_example(script, [*options, "--out", str(docs / folder), *(["--smoke"] if quick else [])])
        ran = setting(" ".join(["python", f"examples/{script}", *options]), MEASURES)
        written = PROJECT / docs / folder
        written.mkdir(parents=True, exist_ok=True)
        (written / "setting.json").write_text(json.dumps(ran, indent=1) + "\n")
    epochs = ["--epochs", "1"] if quick else []
    _run_example("watch_learning_rates.py", ["--out", str(docs / "effective_rates"), *epochs])


def _run_example(script: str, options: list[str]) -> None:
    command = [sys.executable, str(PROJECT / "examples" / script), *options]
    if subprocess.run(command, cwd=PROJECT).returncode:
        raise typer.Exit(1)


def measure_accelerator(out: Path, quick: bool) -> None:
    """Runs the suites of `ON_ACCELERATOR`, one process each; one that fails or takes too long is left out."""
    began = time.monotonic()
    for suite, share in ON_ACCELERATOR.items():
        left = ACCELERATOR_SECONDS - (time.monotonic() - began)
        if left < 10:
            typer.echo(f"{suite.value}: skipped, because no time is left.", err=True)
            continue
        arguments = ["--suite", suite.value, "--out", str(out), "--no-readme"]
        arguments += ["--seconds", f"{min(share, left - 5):g}", *(["--quick"] if quick else [])]
        try:
            code = subprocess.run(
                [sys.executable, "-m", "benchmarks", *arguments], cwd=PROJECT, timeout=left
            ).returncode
        except subprocess.TimeoutExpired:
            code = 1
        if code:
            typer.echo(f"{suite.value}: no result; what others measured is kept.", err=True)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turns problems with the machine, a result or the README into one line and exit code 2."""
    try:
        yield
    except ValueError as error:
        typer.echo(f"benchmarks: {error}", err=True)
        raise typer.Exit(2) from None


def main(
    suite: Annotated[
        list[Suite] | None, typer.Option(help="What to measure.", show_default="all suites")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for the results.", show_default="benchmarks/results")
    ] = RESULTS,
    quick: Annotated[bool, typer.Option(help="Tiny sizes: a test that it runs, not a measurement.")] = False,
    readme: Annotated[bool, typer.Option(help="Whether to update README and pictures afterwards.")] = True,
    render: Annotated[bool, typer.Option(help="Measure nothing; only update README and pictures.")] = False,
    publish: Annotated[
        bool, typer.Option(help="Measure every suite, and run every example whose results are published.")
    ] = False,
    accelerator: Annotated[
        bool, typer.Option(help="Measure what a GPU or TPU is needed for, in at most 8 minutes.")
    ] = False,
    seconds: Annotated[
        float, typer.Option(help="Begin no further measurement after so many seconds, and keep the others.")
    ] = math.inf,
) -> None:
    """Measures every suite whose results are published, and updates the README's tables and pictures."""
    out = out.resolve()  # the processes below have another working directory
    if quick and out == RESULTS:
        raise typer.BadParameter("--quick measures nothing worth publishing; choose another --out.")
    if accelerator and (suite or render or publish or seconds != math.inf):
        raise typer.BadParameter(
            "--accelerator chooses suites and seconds; give it without --suite, --render, --publish or "
            "--seconds."
        )
    if publish and (suite or render):
        raise typer.BadParameter("--publish runs everything; give it without --suite or --render.")
    if not seconds > 0:
        raise typer.BadParameter(f"--seconds must be above 0, got {seconds}.")
    if accelerator and not quick and hardware().startswith("cpu"):
        raise typer.BadParameter("--accelerator needs a GPU or TPU that JAX finds; here is only a CPU.")
    if accelerator:
        measure_accelerator(out, quick)
    suites = [] if render or accelerator else suite or list(Suite)
    if len(suites) == 1:
        with plain_errors():
            run_here(suites[0], out, quick, seconds)
    for one in suites if len(suites) > 1 else []:
        if one in AHEAD_OF_TIME and (lacking := compilers.missing()):
            typer.echo(f"{one.value}: skipped. {lacking}", err=True)
            continue
        # One process per suite, so that they share no memory, caches or devices, and a crash stops only one.
        arguments = ["--suite", one.value, "--out", str(out), "--no-readme", *(["--quick"] if quick else [])]
        arguments += [] if seconds == math.inf else ["--seconds", f"{seconds:g}"]
        if subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=PROJECT).returncode:
            raise typer.Exit(1)
    if publish:
        run_examples(out, quick)
    if not readme:
        return
    with plain_errors():
        draw(stored(out), PICTURES if out == RESULTS else out)
        if out == RESULTS:
            for page in PAGES:
                (PROJECT / page).write_text(rendered(page))


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
