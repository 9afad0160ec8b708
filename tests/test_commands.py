"""Every command that the pages, the examples and the recorded results name can be run as it is printed."""

import functools
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from adaptive_optax.study.cli import app as study_app
from benchmarks.__main__ import app as benchmarks_app

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
WITH_COMMANDS = {*PAGES[:3], "docs/benchmarks.md", "docs/own_script.md", "docs/decay_now.md", "docs/scale.md"}
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
STUDIES = sorted((ROOT / "docs").rglob("summary.json"))


def commands(text):
    """The commands in a page's shell blocks and code spans, each as a list of words."""
    without_blocks = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [
        line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()
    ]
    lines += re.findall(r"`([^`\n]+)`", without_blocks)
    lines += re.findall(r"^    (python .*)$", without_blocks, re.MULTILINE)  # in docstrings
    for part in (part for line in lines for part in line.split("&&")):
        if "python" in part or "adaptive-optax" in part:
            words = shlex.split(part, comments=True)
            if Path(words[0]).name in ("python", "python3", "adaptive-optax") and len(words) > 1:
                yield [Path(words[0]).name, *words[1:]]


def parse(app, arguments):
    """Returns the values of a command line, without running it."""
    values, copy = {}, typer.Typer()
    for command in app.registered_commands:

        @functools.wraps(command.callback)
        def record(**given):
            values.update(given)

        copy.command(command.name)(record)
    outcome = CliRunner().invoke(copy, arguments)
    assert outcome.exit_code == 0, outcome.output
    return values


def check(words, pytest_options):
    """Fails unless the program exists and accepts its options."""
    program, *arguments = words
    if program == "adaptive-optax":
        parse(study_app, arguments)
    elif arguments[0] == "-m":
        module, *arguments = arguments[1:]
        if module == "benchmarks":
            parse(benchmarks_app, arguments)
        elif module.startswith("benchmarks."):
            assert (
                not arguments
                and '__name__ == "__main__"' in (ROOT / f"{module.replace('.', '/')}.py").read_text()
            )
        elif module == "pytest":
            for word in arguments:
                named = word.removeprefix("--").partition("=")[0].replace("-", "_")
                assert not word.startswith("--") or hasattr(pytest_options, named), word
                assert "/" not in word or (ROOT / word).exists(), word
        else:  # of the standard library or installed; a module of this repository must be listed above
            assert module in ("venv", "build", "twine"), f"{module} is not known to be a program"
    elif arguments[0] != "-c":
        script, *arguments = arguments
        assert '__name__ == "__main__"' in (ROOT / script).read_text() or script == ".ci/public_types.py"
        if "\nimport torch" in (ROOT / script).read_text():  # not among the tests' requirements
            pytest.importorskip("torch")
        if script.startswith("examples/"):
            runpy.run_path(str(ROOT / script))["command_line"]().parse_args(arguments)


@pytest.mark.parametrize(
    "page", [*PAGES, *(str(p.relative_to(ROOT)) for p in (ROOT / "examples").glob("*.py"))]
)
def test_the_commands_of_a_page_are_accepted(page, request):
    found = list(commands((ROOT / page).read_text()))
    assert found or page not in WITH_COMMANDS
    for words in found:
        check(words, request.config.option)


def test_the_readme_names_its_main_commands():
    found = {" ".join(words) for words in commands((ROOT / "README.md").read_text())}
    assert {"python examples/should_i_decay.py", "python -m pytest -n 2"} <= found
    assert any(command.startswith("adaptive-optax compare ") for command in found)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_command_of_a_result_measures_it_again(path):
    program, *arguments = shlex.split(json.loads(path.read_text())["command"])
    assert [program, *arguments[:2]] == ["python", "-m", "benchmarks"]
    (suite,) = parse(benchmarks_app, arguments[2:])["suite"]
    assert path.name.startswith(f"{suite}_")


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: "-".join(path.parts[-3:-1]))
def test_the_command_of_a_published_study_is_accepted(path):
    script, *arguments = json.loads(path.read_text())["info"]["command"]
    check(["python", f"examples/{script}", *arguments], None)


@pytest.mark.parametrize(
    "line",
    [
        "python -m benchmarks.low_precision --seeds 12",
        "python -m benchmarks --suite speed",
        "python -m pytest tests/test_nothing.py",
        "python -m pytest --no-such-option",
        "python examples/should_i_decay.py --task images",
        "python examples/nothing.py",
        "adaptive-optax compare module:task --rate 1e-3",
        "adaptive-optax find module:task",
    ],
)
def test_a_command_that_would_not_run_is_noticed(line, request):
    ((*words,),) = commands(f"```bash\n{line}\n```")
    with pytest.raises((AssertionError, SystemExit, FileNotFoundError)):
        check(words, request.config.option)
