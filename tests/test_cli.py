"""The command line, called as a user calls it."""

import dataclasses
import re
import shlex
import sys
from pathlib import Path

import optax
import pytest
from typer.testing import CliRunner

from adaptive_optax import study
from adaptive_optax.study.cli import app
from adaptive_optax.study.engine import trials
from adaptive_optax.study.loading import load_arms, load_task
from adaptive_optax.study.recommendation import code_for

MODULE = """
import dataclasses
import jax, jax.numpy as jnp, numpy as np, optax
import adaptive_optax as ao
from adaptive_optax import study

x = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
data = {"x": x, "y": x @ np.arange(3, dtype=np.float32)}


def make():
    return study.Task(
        init=lambda key: jax.random.normal(key, (3,)),
        loss=lambda w, batch, key: jnp.mean((batch["x"] @ w - batch["y"]) ** 2) + 0.1,
        train=data, validation=data, batch_size=8, name="a regression",
    )


def make_with(size):
    return make()


def broken():
    return make().missing


def leaves():
    raise SystemExit(0)


def my_arm(learning_rate, total_steps):
    return ao.sgd(learning_rate)


def one_argument(learning_rate):
    return ao.sgd(learning_rate)


def failing_arm(learning_rate, total_steps):
    raise KeyError("nothing here")


def averaging(learning_rate, total_steps):
    return optax.chain(ao.sgd(learning_rate), ao.average_parameters())


def turns_negative(w, batch):
    return jnp.log(jnp.mean((batch["x"] @ w - batch["y"]) ** 2) + 0.1)


def score(w, batch):
    return -jnp.mean(jnp.abs(batch["x"] @ w - batch["y"]))


task = make()
number = 3
scored = dataclasses.replace(task, metric=score, maximize=True)
logarithm = dataclasses.replace(task, metric=turns_negative)
unsaid = dataclasses.replace(task, metric=score)


def raises(run):
    return {}["nothing"]
"""

# Modules that cannot be imported: their code, and what the sentence says.
UNUSABLE = {
    "raises": ("x = 1\nraise RuntimeError('no data\\nat all')", "RuntimeError: no data (raises.py, line 2)"),
    "wrong_syntax": ("x = 1\ndef f(:\n", "SyntaxError: invalid syntax (wrong_syntax.py, line 2)"),
    "no_text": ("# \x00", "SyntaxError: source code string cannot contain null bytes"),
    "ends": (
        "import sys\nsys.exit(0)",
        "it ends the program, SystemExit: 0 (ends.py, line 2); put code that",
    ),
    "needs": ("import absent_package", "No module named 'absent_package' (needs.py, line 1)"),
    "attribute": ("import math\nmath.nothing", "has no attribute 'nothing' (attribute.py, line 2)"),
    "wrong_task": (
        "from adaptive_optax import study\ntask = study.Task(1, 2, 3, 4, batch_size=1)",
        "ValueError: init must be a function, got 1 (wrong_task.py, line 2)",
    ),
}


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MODULE)
    for name, (code, _) in UNUSABLE.items():
        (tmp_path / f"{name}.py").write_text(code)
    (tmp_path / "interrupts.py").write_text("raise KeyboardInterrupt")
    (tmp_path / "a_file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere/at/all")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(trials, "Program", None)


@pytest.fixture
def as_command(monkeypatch):
    """Calls as from a shell: the advice is to call the same command again."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["/bin/adaptive-optax", *map(str, arguments)])
        return call(*arguments)

    return command


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], terminal_width=80)


ARMS = "sgd:constant,sgd:cosine"
QUICK = ("--steps", 30, "--seeds", 5, "--tuning-seeds", 2, "--rates", "0.03,0.1,0.3", "--mode", "scan")


@pytest.mark.parametrize("name", ["mine:task", "mine:make", "mine.py:task"])
def test_compare_ends_in_a_report(name):
    result = call("compare", name, *QUICK, "--arms", "adam:constant,adam:one_cycle", "--out", "report")
    assert result.exit_code == 0, result.output
    out = Path("report")
    html = (out / "report.html").read_text()
    comparison = study.load(out / "comparison.npz")
    assert "a regression" in html
    assert comparison.verdict().decision in result.output
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "trials.csv").read_text().splitlines()) == 1 + len(comparison.table)
    again = call("compare", name, *QUICK, "--arms", "adam:constant,adam:one_cycle", "--out", "report")
    assert again.exit_code == 0, again.output


def check_refused(result, message):
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.output.count("\n") == 1 and "Traceback" not in result.output
    assert message in result.output


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine:nothing", "module 'mine' has no 'nothing'"),
        ("mine:number", "mine:number must be a study.Task or return one, got int"),
        ("absent:task", "'absent' cannot be imported: No module named 'absent'."),
        ("absent.sub:task", "'absent.sub' cannot be imported: No module named 'absent'."),
        ("absent.py:task", "'absent.py' cannot be imported: FileNotFoundError"),
        ("mine", "MODULE:TASK must name a module and a task in it, got 'mine'"),
        ("..:x", "MODULE:TASK must name a module and a task in it, got '..:x'"),
        (".mine:task", "MODULE:TASK must name a module and a task in it, got '.mine:task'"),
        (":", "MODULE:TASK must name a module"),
        ("mine:", "MODULE:TASK must name a module"),
        (":task", "MODULE:TASK must name a module"),
        ("", "MODULE:TASK must name a module"),
        ("a..b:task", "'a..b' cannot be imported"),
        ("mine.task:x", "'mine.task' cannot be imported: "),
        ("mine:broken", "AttributeError: 'Task' object has no attribute 'missing' (mine.py, line 24)"),
        (
            "mine:leaves",
            "mine:leaves must return a task when called without arguments: SystemExit: 0 (mine.py, line 28)",
        ),
        *((f"{name}{end}:task", message) for name, (_, message) in UNUSABLE.items() for end in ("", ".py")),
    ],
)
def test_a_task_that_cannot_be_loaded_is_one_line_and_exit_code_2(name, message, no_training):
    check_refused(call("compare", name), message)


@pytest.mark.parametrize("name", ["mine:make_with", "mine:one_argument"])
def test_a_function_of_one_argument_is_a_training_function_and_no_task(name, no_training):
    message = f"{name} must return a task when called without arguments: TypeError"
    check_refused(call("lr-find", name), message)


def test_a_task_that_needs_a_missing_package_names_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lacking.py").write_text(
        "def task():\n    raise ImportError(\"the digits need it: pip install 'extra'.\")\n"
    )
    message = "lacking:task cannot import what it needs: ImportError: the digits need it: pip install 'extra'"
    result = call("compare", "lacking:task")
    check_refused(result, message)
    assert ".." not in result.output


def test_a_training_function_is_compared(tmp_path):
    arguments = ["--arms", "sgd:constant,sgd:linear", "--rates", "0.1", "--seeds", 5, "--tuning-seeds", 1]
    result = call("compare", "own_script:train_sgd", *arguments, "--steps", 4, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "train_sgd" in (tmp_path / "report.html").read_text()
    status = call("status", tmp_path).output
    assert "18 of 18 trials, judged with 5 seeds" in status and "Finished; the last trial finished" in status


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "adam:constant,adam:sideways"], "the schedule must be one of"),
        (["--arms", "sgd:cosine,sgd:cosine"], "arms must have distinct names, got 'sgd:cosine' twice"),
        (["--arms", "adam:constant"], "arms must hold at least two"),
        (["--arms", ""], "arms must hold at least two"),
        (["--arms", "adam:constant,adamm:constant"], "the optimizer must be one of adam, adamw"),
        (["--arms", "adam:constant,adamm:constant"], "No module named 'adamm'"),
        (["--arms", "adam:constant,adamm"], "the optimizer must be one of"),
        (["--arms", "adam:constant,=mine:my_arm"], "expected a name before '='"),
        (["--arms", "adam:constant,mine:number"], "mine:number must be an arm, a function of"),
        (["--arms", "adam:constant,mine:one_argument"], "arm 'one_argument' cannot be run: TypeError"),
        (["--arms", "adam:constant,mine:failing_arm"], "KeyError: 'nothing here' (mine.py, line 40)"),
        (["--arms", "adam:constant,ends:my_arm"], "it ends the program"),
        (["--arms", "adam:constant,\x1b[31m=mine:my_arm"], "holds a control character"),
        (["--rates", "fast"], "--learning-rates must be numbers separated by commas"),
        (["--rates", ""], "--learning-rates must be numbers separated by commas"),
        (["--rates", "-1"], "learning_rates must be one or more positive"),
        (["--rates", "0.1,nan"], "learning_rates must be one or more positive"),
        (["--rates", "inf"], "learning_rates must be one or more positive"),
        (
            ["--rates", "1e300"],
            "learning_rates must be a number in (0, inf), got 1e+300, which is inf in float32",
        ),
        (
            ["--rates", "1e-60"],
            "learning_rates must be a number in (0, inf), got 1e-60, which is 0.0 in float32",
        ),
        (["--seeds", "3"], "seeds must be an integer in [5, 100000], got 3"),
        (["--steps", "0"], "steps must be an integer"),
        (["--steps", "9" * 20], "steps must be an integer in [1, 2147483647]"),
        (["--seeds", "9" * 20], "seeds must be an integer in ["),
        (["--tuning-seeds", "9" * 20], "tuning_seeds must be an integer in ["),
        (["--base-seed", "9" * 20], "base_seed must be an integer in ["),
        (["--chunk", "9" * 20], "chunk must be an integer in ["),
        (["--margin", "nan"], "margin must be a number in (0, inf)"),
        (["--mode", "fast"], "mode must be one of"),
        (["--cpu-devices", "100000"], "--cpu-devices must be an integer in [0, "),
        (["--cpu-devices", "-1"], "--cpu-devices must be an integer in [0, "),
        (["--maximize"], "maximize=True must come with a metric other than the loss"),
        (["--out", ""], "must name a folder"),
        (["--out", "a_file"], "must be a folder"),
        (["--out", "a_file/below"], "must be a folder"),
        (["--out", "dangling"], "must be a folder"),
        (["--out", "x" * 300], "must be a folder"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(arguments, message, no_training):
    check_refused(call("compare", "mine:task", *arguments), message)


def test_a_negative_metric_needs_a_margin_before_training(no_training):
    check_refused(
        call("compare", "mine:unsaid"), "margin must be given, in the metric's units: the metric is -"
    )


STARTS = """
starts = [study.Start(jnp.full(3, 2.0 - i), ao.adam(0.1).init(jnp.ones(3)), step=i) for i in (0, 1)]
"""


def test_decay_now_prints_where_its_files_are():
    Path("mine.py").write_text(MODULE + STARTS)
    result = call("decay-now", "mine:starts", "--steps", 4, "--seeds", 5, "--out", "now", "--same-end")
    assert result.exit_code == 0, result.output
    for file in ("decay_now.png", "report_0.html", "report_1.html"):
        assert f": now/{file}" in result.output and (Path("now") / file).exists()
    check_refused(
        call("decay-now", "mine:starts", "--task", "mine:one_argument"),
        "task must be a study.Task for decay_now",
    )
    status = call("status", "now").output
    assert status.index("now/step_0:") < status.index("now/step_1:") and status.count("Finished") == 2


def test_status_of_what_is_not_there():
    check_refused(call("status", "nowhere"), "there is no folder 'nowhere'")
    check_refused(call("status", "."), "path must be a folder that compare saves to, got '.'")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ends:task"], "it ends the program"),
        (["mine:task", "--out", ""], "must name a folder"),
        (["mine:task", "--out", "a_file"], "must be a folder"),
        (["mine:task", "--out", "dangling"], "must be a folder"),
        (["mine:task", "--optimizer", "adamm"], "the optimizer must be one of"),
        (["mine:task", "--optimizer", "adam:cosine"], "--optimizer must be an optimizer without a schedule"),
        (["mine:task", "--optimizer", "ema"], "--optimizer must be an optimizer without a schedule"),
        (["mine:task", "--optimizer", "schedule_free:sgd"], "--optimizer must be an optimizer without"),
        (["mine:task", "--optimizer", "mine:one_argument"], "cannot be run: TypeError"),
        (["mine:task", "--low", "nan"], "low must be a number in (0, inf), got nan"),
        (["mine:task", "--high", "1e300"], "high must be a number in (0, inf), got 1e+300, which is inf"),
        (["mine:task", "--low", "2"], "high must be above low"),
        (["mine:task", "--steps", "9" * 20], "steps must be an integer in [4, 2147483647]"),
        (["mine:task", "--seeds", "9" * 20], "seeds must be an integer in [2, 10000]"),
        (["mine:task", "--cpu-devices", "100000"], "--cpu-devices must be an integer in [0, "),
    ],
)
def test_lr_find_refuses_before_the_test(arguments, message, no_training):
    check_refused(call("lr-find", *arguments), message)


def test_a_wrong_option_is_exit_code_2():
    assert call("compare", "mine:task", "--steps", "many").exit_code == 2
    assert call("compare").exit_code == 2


def test_a_traceback_is_shown_where_it_is_asked_for():
    result = call("compare", "raises:task", "--traceback")
    assert result.exit_code == 2 and 'raises.py", line 2' in result.output and "Traceback" in result.output


def test_what_fails_later_is_one_line_and_exit_code_1(monkeypatch):
    def fails(self, *arguments):
        raise RuntimeError("out of memory\nof some kind")

    monkeypatch.setattr(trials.Program, "run", fails)
    result = call("compare", "mine:task", *QUICK, "--arms", ARMS)
    assert result.exit_code == 1 and result.output.count("\n") == 1
    assert re.match(
        "adaptive-optax: RuntimeError: out of memory .*; use --traceback for details", result.output
    )


def test_arms_of_ones_own():
    arms = "sgd:constant,mine:my_arm, mine.py:my_arm,again=mine:my_arm,other = sgd:constant"
    with pytest.raises(
        ValueError, match="arms must have distinct names, got 'my_arm' twice; name them, as in mine=mine.py"
    ):
        load_arms(arms)
    loaded = load_arms(arms.replace("mine.py:my_arm", "file=mine.py:my_arm"))
    assert [each.source for each in loaded] == [part.split("=")[-1].strip() for part in arms.split(",")]
    found = {each.name: each.arm for each in loaded}
    assert list(found) == ["sgd:constant", "my_arm", "file", "again", "other"]
    assert found["my_arm"] is found["again"] and found["other"] == study.arm("sgd:constant")
    Path("sgd.py").write_text("constant = None")
    assert load_arms("sgd:constant")[0].arm == study.arm("sgd:constant")  # known ones go first
    result = call("compare", "mine:task", *QUICK, "--arms", "sgd:constant,mine:my_arm", "--out", "report")
    assert result.exit_code == 0, result.output
    assert study.load("report/comparison.npz").verdict("my_arm").effect == 0


def test_rivals_of_a_schedule_are_arms_with_rates_that_suit_them():
    arms = "sgd:constant,prodigy,schedule_free:sgd,mean=ema"
    assert [each.name for each in load_arms(arms)] == ["sgd:constant", "prodigy", "schedule_free:sgd", "mean"]
    assert load_arms(arms)[3].arm == study.arm("adam:constant:ema")
    result = call("compare", "mine:task", *QUICK, "--arms", arms, "--out", "report")
    assert result.exit_code == 0, result.output
    said = "prodigy: tuned over its own rates, 0.3, 1, 3"
    assert said in " ".join(result.output.split())
    assert "prodigy was tuned over its own rates, 0.3, 1, 3, since" in Path("report/report.html").read_text()
    assert study.load("report/comparison.npz").details.own_rates == ("prodigy",)


def code_of(output):
    """The statements of Python or the command that the output ends in."""
    return [line.strip() for line in output.splitlines() if line.startswith("    ")]


AVERAGED = [
    "# After training, use the average of the parameters, which was judged.",
    "averaged = ao.swap_averaged(model, opt_state)  # after training",
]


def test_the_code_for_every_arm_runs(as_command):
    Path("below").mkdir()
    Path("below/with-dash.py").write_text(Path("mine.py").read_text())
    code = {
        "sgd:constant:averaged": ["tx = optax.chain(ao.sgd(0.3), ao.average_parameters())", *AVERAGED],
        "renamed=sgd:constant": ["import adaptive_optax as ao", "tx = ao.sgd(0.3)"],
        "mine:my_arm": ["from mine import my_arm", "tx = my_arm(0.3, 30)"],
        "other=mine:averaging": ["from mine import averaging", "tx = averaging(0.3, 30)", *AVERAGED],
        "file=below/with-dash.py:my_arm": ['tx = runpy.run_path("below/with-dash.py")["my_arm"](0.3, 30)'],
    }
    result = as_command("compare", "mine:task", *QUICK, "--arms", ",".join(code), "--out", "report")
    assert result.exit_code == 0, result.output
    comparison = study.load("report/comparison.npz")
    rates = dict.fromkeys(comparison.info["arms"], 0.3)
    comparison = dataclasses.replace(
        comparison, details=dataclasses.replace(comparison.details, best_rates=rates)
    )
    for arm, expected in zip(comparison.info["arms"], code.values(), strict=True):
        found = code_for(comparison.details, arm).splitlines()
        assert found[-len(expected) :] == expected
        names = {}
        exec("\n".join(line for line in found if line not in AVERAGED), names)
        assert isinstance(names["tx"], optax.GradientTransformation)


def test_a_metric_that_turns_negative_is_measured_and_asks_for_a_margin(as_command):
    arguments = ("compare", "mine:logarithm", *QUICK, "--arms", "adam:constant,adam:cosine")
    result = as_command(*arguments)
    assert result.exit_code == 1, result.output
    assert result.output.startswith("Not judged: margin must be given, in the metric's units")
    row = next(line for line in result.output.splitlines() if line.startswith(" adam:cosine "))
    assert re.search(r"[-+]\d\.\d+ +not judged", row)  # the difference is measured
    words = " ".join(result.output.split())
    assert "with --margin, the smallest" in words and "without --out nothing was saved" in words
    assert "comparison.with_margin" not in result.output
    command = code_of(result.output)[-1]
    assert command.startswith("adaptive-optax compare mine:logarithm")
    assert command.endswith("--margin MARGIN")
    kept = as_command(*arguments, "--out", "report")
    assert kept.exit_code == 1 and "nothing is trained again" in " ".join(kept.output.split())
    assert Path("report/comparison.npz").exists()
    again = call(*shlex.split(code_of(kept.output)[-1].replace("MARGIN", "0.1"))[1:])
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize("lost", [("report.html",), ("trials.csv", "report.png")])
def test_a_file_that_cannot_be_written_costs_neither_the_summary_nor_the_others(lost):
    for name in lost:
        Path("report", name).mkdir(parents=True)
    result = call("compare", "mine:task", *QUICK, "--arms", ARMS, "--out", "report")
    assert result.exit_code == 1, (result.output, result.exception)
    assert study.load("report/comparison.npz").verdict().decision in result.stdout
    said = result.stderr.splitlines()
    assert [line.partition(" was not written: ")[0] for line in said] == [
        f"adaptive-optax: report/{name}" for name in lost
    ]
    assert ("Report: " in result.stdout) == ("report.html" not in lost)
    written = {path.name for path in Path("report").iterdir() if path.is_file()}
    assert {"trials.csv", "comparison.npz", "report.png", "report.html"} - written == set(lost)


def test_lr_find_says_what_could_not_be_written():
    Path("found/lr_find.csv").mkdir(parents=True)
    result = call("lr-find", "mine:task", "--low", 1e-4, "--high", 10, "--out", "found")
    assert result.exit_code == 1 and result.stdout.strip()
    assert result.stderr.startswith("adaptive-optax: found/lr_find.csv was not written: IsADirectoryError")
    assert result.stderr.count("\n") == 1 and Path("found/lr_find.png").is_file()


def test_a_file_is_imported_once_and_hides_no_module():
    import json

    Path("json.py").write_text("from mine import make\ntask = make()\nclass Here: pass\n")
    task = load_task("json.py:task")
    assert load_task("./json.py:task") is task and sys.modules["json"] is json
    Path("below").mkdir()
    Path("below/neighbour.py").write_text("from mine import task")
    Path("below/taking.py").write_text("from neighbour import task")
    assert load_task("below/taking.py:task").name == "a regression"


@pytest.mark.parametrize("arguments", [["mine:scored"], ["mine:unsaid", "--maximize"]])
def test_a_higher_metric_is_better_where_the_task_or_an_option_says_so(arguments):
    result = call("compare", *arguments, *QUICK, "--margin", 0.01, "--arms", ARMS, "--out", "report")
    assert result.exit_code == 0, result.output
    info = study.load("report/comparison.npz").info
    assert info["maximize"] is True and info["best_rates"]["sgd:constant"] >= 0.1


@pytest.mark.parametrize("optimizer", ["adam", "mine:my_arm"])
def test_lr_find(optimizer):
    found = ("--low", 1e-4, "--high", 10, "--optimizer", optimizer, "--out", "found")
    result = call("lr-find", "mine:task", *found)
    assert result.exit_code == 0, result.output
    assert Path("found/lr_find.png").read_bytes().startswith(b"\x89PNG")
    assert Path("found/lr_find.csv").exists()


@pytest.mark.parametrize("command", [[], ["compare"], ["lr-find"]])
def test_help_reads_well(command):
    result = call(*command, "--help")
    assert result.exit_code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    assert max(map(len, text.splitlines())) <= 80
    assert "MODULE:TASK" in text or not command
    if command == ["compare"]:
        words = " ".join(text.replace("│", " ").split())
        for each in (
            "schedule_free:adam, schedule_free:adamw, schedule_free:sgd, prodigy, dadapt_adamw, ema",
            ":ema",
        ):
            assert each in words
    if command == ["lr-find"]:
        assert "lr_find.csv and lr_find.png" in text and "finished trials" not in text


def test_an_arm_that_always_raises_is_named_with_what_it_raised():
    arms = "a=mine:my_arm,b=mine:my_arm"
    result = call(
        "compare", "mine:raises", "--arms", arms, "--steps", 2, "--rates", "0.1", "--tuning-seeds", 1
    )
    assert result.exit_code == 1
    assert re.search(r"trial of arm 'a' raised, the first with KeyError: 'nothing'; use", result.output)


@pytest.mark.parametrize(
    ("finished", "said"),
    [
        (0, "Stopped before the first trials had finished.\n"),
        (
            2,
            "Stopped after [0-9]+ finished trials.\nThey are saved in report; run the same command again",
        ),
    ],
)
def test_an_interrupted_comparison_says_what_is_kept(finished, said, monkeypatch):
    run, calls = trials.Program.run, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) > finished:
            raise KeyboardInterrupt
        return run(self, *arguments)

    monkeypatch.setattr(trials.Program, "run", interrupted)
    result = call("compare", "mine:task", *QUICK, "--arms", ARMS, "--out", "report")
    assert result.exit_code == 130, (result.output, result.exception)
    assert re.match(said, result.output)


@pytest.mark.parametrize("command", ["compare", "lr-find"])
def test_interrupted_before_anything_is_130(command):
    result = call(command, "interrupts:task")
    assert result.exit_code == 130 and result.output == "adaptive-optax: stopped.\n"
