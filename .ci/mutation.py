"""Mutation testing of the mathematics: changes one thing at a time in a file and runs the file's tests.

`python .ci/mutation.py adaptive_optax/schedules/cyclical.py` runs the mutants of one file, `--sample 20` only
twenty of them, drawn at random; without a file, those of `moments/`, `transforms/` and `schedules/`. It needs
`pip install -e ".[test,mutation]"` and exits with 1 if a mutant survives.

The mutants are cosmic-ray's: it changes the file and starts the tests in a process of their own. (mutmut
forks, which JAX's threads do not survive, and wraps functions, which changes their signatures.) The tree is
copied first, so an interrupted run leaves no mutant behind. Results are kept in `out/mutation/`, where an
interrupted run resumes; `--again` starts afresh.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "adaptive_optax"
FOLDERS = [PACKAGE / name for name in ("moments", "transforms", "schedules")]

# The tests of a file are tests/test_<its name>.py; here are the others.
TESTS = {
    "moments/bfloat16": ["storage"],
    "moments/blocks": ["int8", "storage", "convert_storage"],
    "moments/by_path": ["moments"],
    "moments/ema": ["moments"],
    "moments/formats": ["storage", "convert_storage"],
    "moments/granularity": ["moments", "rms"],
    "moments/int8": ["int8", "storage"],
    "transforms/adam_bound": ["adam", "verified", "adam_states"],
    "transforms/direction": ["adam", "rms", "verified"],
    "transforms/learning_rate": ["optimizers", "hyperparams", "set_hyperparams"],
    "transforms/match_parameter_dtype": ["ecosystem"],
    "transforms/momentum": ["optimizers", "hyperparams", "set_hyperparams"],
    "transforms/reduce_on_plateau": ["plateau"],
    "transforms/stochastic_rounding": ["low_precision_parameters"],
    "transforms/weight_decay": ["optimizers", "hyperparams", "set_hyperparams"],
    "schedules/_phases": ["schedules"],
    "schedules/_steps": ["schedules"],
    "schedules/cyclical": ["schedules"],
    "schedules/exponential_decay": ["schedules"],
    "schedules/inverse_sqrt": ["schedules"],
    "schedules/per_epoch": ["schedules"],
    "schedules/step_decay": ["schedules"],
    "schedules/warmup_cosine": ["schedules"],
    "schedules/warmup_stable_decay": ["schedules"],
    "schedules/one_cycle": ["schedules"],
    "schedules/cosine_restarts": ["schedules"],
}

# Those of cosmic-ray's operators that make a mistake a person could make; `|` stands mostly in annotations.
OPERATORS = re.compile(
    r"core/(ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Mul|Mod_FloorDiv|Pow_Mul)"
    r"|ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Lt_LtE|LtE_Lt|Gt_GtE|GtE_Gt|Is_IsNot|IsNot_Is)"
    r"|ReplaceUnaryOperator_(USub_UAdd|Delete_USub|Delete_Not)|ReplaceAndWithOr|ReplaceOrWithAnd|AddNot"
    r"|ReplaceTrueWithFalse|ReplaceFalseWithTrue|NumberReplacer|RemoveDecorator|ReplaceBreakWithContinue"
    r"|ReplaceContinueWithBreak|ZeroIterationForLoop)"
)


def tests_of(path: Path) -> list[str]:
    """The test files of a file, and the test of its default values."""
    name = path.relative_to(PACKAGE).with_suffix("").as_posix()
    files = [f"tests/test_{test}.py" for test in TESTS.get(name, [path.stem])]
    for file in files:
        if not (ROOT / file).exists():
            raise SystemExit(f"{file} does not exist: name the tests of {name} in TESTS.")
    return ["tests/test_package.py::test_signatures", *files]


def mutate(path: Path, options: argparse.Namespace) -> int:
    """Runs the mutants of a file, prints its score and its survivors, and returns their number."""
    name = path.relative_to(ROOT).as_posix()
    results = ROOT / "out" / "mutation"
    results.mkdir(parents=True, exist_ok=True)
    session = results / f"{name.removesuffix('.py').replace('/', '.')}.sqlite"
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(results / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        tracked = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for file in filter(None, tracked.stdout.split("\0")):
            if (ROOT / file).exists():
                (tree / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / file, tree / file)
        tests = " ".join([*tests_of(path), *options.pytest])
        # `-m pytest` puts the copy before the installed package.
        command = f"{sys.executable} -m pytest -x -q -p no:randomly -p no:cacheprovider {tests}"

        def run(*arguments: str) -> None:
            subprocess.run(arguments, cwd=tree, env=environment, check=True)

        configuration = Path(folder) / "cosmic-ray.toml"
        configuration.write_text(
            f"[cosmic-ray]\nmodule-path = ['{name}']\ntimeout = {options.timeout}\nexcluded-modules = []\n"
            f"test-command = '{command}'\ndistributor.name = 'local'\n"
        )
        cosmic_ray = str(Path(sys.executable).parent / "cosmic-ray")
        print(f"{name}: the tests without a mutant, which also warms the compilation cache", flush=True)
        run(*command.split())
        if options.again or not session.exists():
            run(cosmic_ray, "init", str(configuration), str(session), "--force")
            _choose(session, options)
        run(cosmic_ray, "exec", str(configuration), str(session))
    return _report(name, session)


def _choose(session: Path, options: argparse.Namespace) -> None:
    """Marks as skipped what is not to be run."""
    with use_db(session, WorkDB.Mode.open) as database:
        items = list(database.work_items)
        chosen = [item for item in items if OPERATORS.fullmatch(item.mutations[0].operator_name)]
        if options.sample and options.sample < len(chosen):
            # Job ids differ from run to run; the position and the operator do not.
            chosen.sort(key=lambda item: (item.mutations[0].start_pos, item.mutations[0].operator_name))
            chosen = random.Random(options.seed).sample(chosen, options.sample)
        run = {item.job_id for item in chosen}
        for item in items:
            if item.job_id not in run:
                database.set_result(item.job_id, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))


def _report(name: str, session: Path) -> int:
    with use_db(session, WorkDB.Mode.open) as database:
        mutations = {item.job_id: item.mutations[0] for item in database.work_items}
        results = [(mutations[job], result) for job, result in database.results]
    results = [(mutation, r) for mutation, r in results if r.worker_outcome != WorkerOutcome.SKIPPED]
    survivors = [(mutation, r) for mutation, r in results if r.test_outcome == TestOutcome.SURVIVED]
    for mutation, result in survivors:
        print(f"\nSurvivor at line {mutation.start_pos[0]}, {mutation.operator_name}:\n{result.diff}")
    killed = len(results) - len(survivors)
    print(f"\n{name}: {killed} of {len(results)} mutants killed, {len(survivors)} survived", flush=True)
    return len(survivors)


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "files", nargs="*", type=Path, help="files to mutate (default: all of the three folders)"
    )
    parser.add_argument("--sample", type=int, help="that many mutants of each file, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default 0)")
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="seconds after which a mutant counts as killed"
    )
    parser.add_argument("--again", action="store_true", help="begin anew instead of going on")
    parser.add_argument(
        "--pytest", nargs=1, default=[], help="one more argument of pytest, such as --pytest=-kcyclical"
    )
    options = parser.parse_args()
    files = [path.resolve() for path in options.files] or sorted(
        path for folder in FOLDERS for path in folder.glob("*.py") if path.name != "__init__.py"
    )
    sys.exit(sum(mutate(path, options) for path in files) > 0)


if __name__ == "__main__":
    main()
