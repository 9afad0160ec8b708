"""The benchmark's parts that need no clock: what is counted, what is floor, and how the README is written."""

import functools
import json
import math
import runpy
import subprocess
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from typer.testing import CliRunner

import adaptive_optax as ao
from adaptive_optax import study
from benchmarks import __main__ as command
from benchmarks import (
    error_control,
    error_control_basin,
    error_control_deterministic,
    error_control_edge,
    error_rates,
    limit_cost,
    readme,
    scaling,
    sequential,
    setting,
    sources,
    studies,
    trees,
    update_step,
)
from benchmarks.contenders import (
    HAS_TORCH,
    Step,
    TorchStep,
    gradient_sets,
    number_of_sets,
    torch_module,
)
from benchmarks.programs import entry_kernels
from benchmarks.tables import Table, digits, ratio
from benchmarks.timing import OutOfTime, against, alternate, in_time

PROJECT = Path(__file__).parent.parent


def test_gpt2_small_is_gpt2_small():
    shapes = trees.gpt2_small()
    assert len(shapes) == 148
    assert trees.size(shapes) == 124_439_808


def test_one_leaf_has_its_size():
    assert trees.one_leaf(2**24) == {"leaf": (4096, 4096)}
    assert trees.size(trees.one_leaf(2**29)) == 2**29


def test_contenders_take_turns_in_changing_order_and_are_warmed_up_before_each_turn():
    order = []
    contenders = {name: lambda name=name: order.append(name) for name in "abc"}
    times = alternate(contenders, rounds=20)
    assert {len(values) for values in times.values()} == {20}
    assert order[::2] == order[1::2]
    rounds = [tuple(order[i : i + 6 : 2]) for i in range(0, len(order), 6)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 3


def test_no_round_is_begun_after_the_time_is_up_but_fifteen_are_run():
    assert len(alternate({"a": lambda: None}, rounds=100, seconds=0.0)["a"]) == 15


def test_ratios_are_paired():
    found = against({"a": np.array([1.0, 2.0, 3.0]), "b": np.array([2.0, 4.0, 6.0])}, "b")
    assert found["a"]["ratio"] == {"median": 0.5, "low": 0.5, "high": 0.5}
    assert found["a"]["ms"] == 2000.0


def test_kernels_are_what_the_entry_computation_runs():
    def f(x, y):
        return jnp.sum(x * y), jnp.sort(x), x

    text = jax.jit(f).lower(jnp.ones(1000), jnp.ones(1000)).compile().as_text()
    assert entry_kernels(text) >= 2
    assert entry_kernels(jax.jit(lambda x: (x, x)).lower(jnp.ones(3)).compile().as_text()) <= 2
    one = "\nENTRY %m (p: f32[2]) -> (f32[2], f32[2]) {\n  %p = f32[2]{0} parameter(0)\n"
    one += (
        "  %a.1 = (f32[2]{0}, f32[2]{0}) fusion(%p), kind=kLoop\n  %g = f32[2]{0} get-tuple-element(%a.1)\n"
    )
    assert entry_kernels(one + "  ROOT %t = (f32[2]{0}, f32[2]{0}) tuple(%g, %p)\n}\n") == 1


def test_a_step_is_the_optimizer_s_and_goes_round_its_sets():
    shapes = trees.small_leaves(4)
    rotated = 3 * 16 * trees.size(shapes)
    gradients = gradient_sets(shapes, rotated)
    assert len(gradients) == number_of_sets(shapes, rotated) == 3
    step = Step(lambda: ao.adamw(1e-3), shapes, gradients)
    params = {name: jnp.asarray(x) for name, x in trees.constant(shapes, 0.1).items()}
    state = optax.adamw(1e-3).init(params)
    for _ in range(3):
        step()
    for _ in range(3):  # one went before, to warm up
        updates, state = optax.adamw(1e-3).update(gradients[0], state, params)
        params = optax.apply_updates(params, updates)
    second_time_round, _ = step()
    for name, x in second_time_round.items():
        np.testing.assert_allclose(x, params[name], rtol=1e-5, atol=1e-7)
    found = step.properties()
    parameters = trees.size(shapes)
    assert found["state_bytes_per_parameter"] == pytest.approx(8, abs=100 / parameters)
    assert found["peak_bytes_per_parameter"] >= 16
    assert set(step.preparation) == {"trace", "lower", "compile"}


@pytest.mark.parametrize(
    ("chains", "name", "gradient", "parameter"),
    [
        (update_step.CHAINS, "adam", 4, 4),
        (update_step.CHAINS, "adamw", 4, 4),
        (update_step.CHAINS, "rmsprop", 4, 4),
        (update_step.CHAINS, "global_rmsprop", 8, 4),
        (update_step.CHAINS, "clip + adamw", 8, 4),
        (update_step.CHAINS, "adam per tensor", 8, 4),
        (update_step.LOW_PRECISION, "adamw, bfloat16 state", 4, 4),
        (update_step.LOW_PRECISION, "adamw, int8 state", 4, 4),
        (update_step.LOW_PRECISION, "adamw, bfloat16 parameters + stochastic rounding", 2, 2),
    ],
)
def test_the_floor_is_gradients_parameters_and_state_moved_once(chains, name, gradient, parameter):
    chain, parameters = chains[name], 2**16
    state = jax.eval_shape(chain.ours().init, jax.ShapeDtypeStruct((256, 256), chain.dtype))
    moved = gradient + 2 * parameter + 2 * ao.state_bytes(state) / parameters
    assert chain.least_bytes == pytest.approx(moved, abs=0.01)


@pytest.mark.parametrize(
    "shapes", [trees.like_square(10, 32), trees.one_leaf(2**24), trees.small_leaves(400)]
)
def test_what_a_contender_goes_round_is_larger_than_caches(shapes):
    assert number_of_sets(shapes) * 16 * trees.size(shapes) >= 128 * 2**20


@pytest.mark.parametrize("name", list(update_step.LOW_PRECISION))
def test_a_reference_has_the_parameters_of_what_it_is_compared_to(name):
    chain, shapes = update_step.LOW_PRECISION[name], trees.small_leaves(2)
    gradients = [jax.tree.map(lambda x: x.astype(chain.dtype), g) for g in gradient_sets(shapes, 1)]
    for make in (chain.ours, chain.optax):
        params, _ = Step(make, shapes, gradients, dtype=chain.dtype)()
        assert {x.dtype for x in params.values()} == {jnp.dtype(chain.dtype)}


def test_numbers_are_written_with_three_digits():
    assert [digits(x) for x in (0.01234, 1.234, 12.34, 123.4, 12345.6, 0.0)] == [
        "0.0123", "1.23", "12.3", "123", "12,346", "0.00",
    ]  # fmt: skip
    assert digits(None) == ratio(None) == ""
    assert ratio({"ratio": {"median": 0.5, "low": 0.4, "high": 0.625}}) == "0.50 (0.40–0.62)"


def test_a_row_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="'Times' has 2 cells, got 1"):
        Table("Times", ["a", "b"]).add("x")


RESULT = {
    "hardware": "cpu_2_cores", "host": "2 CPU cores", "device": "2 x cpu: cpu", "python": "3.11",
    "versions": {"adaptive_optax": "0.1", "jax": "0.10", "optax": "0.2"}, "xla_flags": "", "rows": [1, 2],
    "commit": "abc1234", "uncommitted_changes": False, "date": "2026-01-01", "command": "a command",
    "sources": {},
}  # fmt: skip


def made(result):
    table = Table("Times", ["n", "ms"])
    for n in result["rows"]:
        table.add(str(n), "0.5")
    return {"main": table}


def test_a_block_of_the_readme_is_made_of_the_result():
    text = "Before\n\n<!-- benchmark:speed main -->\nold\n<!-- /benchmark -->\n\nAfter\n"
    found = readme.render(text, {"speed": {"cpu_2_cores": RESULT}}, {"speed": made})
    assert found.startswith(
        "Before\n\n<!-- benchmark:speed main -->\nTimes (2 CPU cores, Python 3.11, adaptive_optax"
    )
    assert "adaptive_optax 0.1 at abc1234, jax 0.10, optax 0.2, 2026-01-01, `a command`; [" in found
    assert "[numbers](benchmarks/results/speed_cpu_2_cores.json)" in found
    assert "| n | ms |\n| --- | --- |\n| 1 | 0.5 |\n| 2 | 0.5 |\n" in found
    assert found.endswith("<!-- /benchmark -->\n\nAfter\n")
    assert readme.render(found, {"speed": {"cpu_2_cores": RESULT}}, {"speed": made}) == found


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("speeed main", "suite 'speeed'; the suites are speed"),
        ("speed other", "no table 'other'; it has main"),
        ("empty main", "no result of the suite 'empty'"),
    ],
)
def test_a_block_that_means_nothing_is_refused(block, message):
    text = f"<!-- benchmark:{block} -->\n<!-- /benchmark -->\n"
    with pytest.raises(ValueError, match=message):
        readme.render(text, {"speed": {"cpu_2_cores": RESULT}}, {"speed": made, "empty": made})


@pytest.mark.parametrize(
    "text",
    [
        "<!-- benchmark:speed -->\n<!-- /benchmark -->",
        "<!-- benchmark:speed main -->\nan end is missing",
        "a beginning is missing\n<!-- /benchmark -->",
        "<!-- benchmark:speed main -->\nprose\n<!-- benchmark:speed main -->\n<!-- /benchmark -->",
        "<!-- benchmark:speed main -->\nanother's end\n<!-- /study -->",
        "<!-- study:decay/text -->\n<!-- /benchmark -->",
    ],
)
def test_a_mark_without_a_block_is_refused(text):
    with pytest.raises(ValueError, match="is not a block of the README"):
        readme.render(text, {"speed": {"cpu_2_cores": RESULT}}, {"speed": made})


STUDY = studies.Study(
    "Text ([trials]({root}docs/x.csv)):",
    Table(
        "text",
        ["arm", "peak", "minus Adam, %"],
        [["Adam", "0.01", ""], ["AdamW", "0.02", "−13.4 [−22.2, −4.6]"]],
    ),
    Table("text", ["what", "number"], [["trials", "188"], ["updates saved by grown", "57 %"]]),
    ["train.py"],
)
SPEED = Table(
    "speed",
    ["tree", "chain", "ratio"],
    [["big", "adam", "1.05 (1.0–1.1)"], ["big", "adamw", "0.98 (0.9–1.1)"], ["small", "adam", "2"]],
)


def test_a_study_of_the_readme_is_generated_too():
    text = "Before\n<!-- study:decay/text -->\nold\n<!-- /study -->\nAfter\n"
    found = readme.render(text, {}, {}, {"decay/text": STUDY}, root="../")
    made = f"Text ([trials](../docs/x.csv)):\n\n{STUDY.table.markdown()}\n"
    assert found == f"Before\n<!-- study:decay/text -->\n{made}<!-- /study -->\nAfter\n"
    with pytest.raises(ValueError, match="the study 'decay/text'; the studies are other"):
        readme.render(text, {}, {}, {"other": STUDY})


@pytest.mark.parametrize(
    ("mark", "number"),
    [
        ("study decay/text | Adam | peak", "0.01"),
        ("study decay/text | AdamW | minus | size", "13 %"),
        ("facts decay/text | trials | number", "188"),
        ("facts decay/text | updates saved by grown | number", "57"),
        ("benchmark speed main | big; adam | ratio", "1.05"),
        ("benchmark speed main | big; adamw | ratio", "0.98"),
    ],
)
def test_a_number_of_the_prose_is_that_of_a_cell(mark, number):
    tables = {"speed": lambda result: {"main": SPEED}}
    text = f"It takes <!-- cell:{mark} -->0.5<!-- /cell --> times."
    found = readme.render(text, {"speed": {"cpu_2_cores": RESULT}}, tables, {"decay/text": STUDY})
    assert found == f"It takes <!-- cell:{mark} -->{number}<!-- /cell --> times."


def test_every_ratio_that_is_clearly_above_1_is_listed():
    rows = [
        ["big", "adam", "1.05 (1.01–1.10)", "12"],
        ["big", "adamw", "0.98 (0.90–1.10)", "13"],
        ["3 leaves", "sgd", "1.50 (0.99–2.00)", "2.00 (1.50–2.50)"],
        ["8", "1,000", "1.50 (1.40–1.60)", "0.5"],
    ]
    trials = [["a", "0.50 (0.40–0.60)"], ["b", "2.00 (1.90–2.10)"], ["c", "0.90 (0.80–1.01)"]]
    tables = {
        "speed": lambda result: {
            "main": Table("speed", ["tree", "chain", "ratio", "every step"], rows),
            "trials": Table("trials per second", ["study", "ratio"], trials, of_speeds=True),
        }
    }
    text = "Before\n<!-- slower -->\nold\n<!-- /slower -->\nAfter\n"
    found = readme.render(text, {"speed": {"cpu_2_cores": RESULT}}, tables)
    assert found.splitlines()[2:] == [
        "| suite | what | ratio |",
        "| --- | --- | --- |",
        "| speed | 3 leaves, sgd, every step | 2.00 (1.50–2.50) |",
        "| speed | a | 0.50 (0.40–0.60) |",
        "| speed | 8 tree, 1,000 chain | 1.50 (1.40–1.60) |",
        "| speed | big, adam | 1.05 (1.01–1.10) |",
        "<!-- /slower -->",
        "After",
    ]


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("study decay/text | SGD | peak", "must have one row that begins with 'SGD'"),
        ("study decay/text | Adam | pace", "a column 'pace'"),
        ("study decay/text | Adam | minus", "has no number"),
        ("study decay/text/more words | Adam | minus", "The source of a cell must be"),
        ("benchmark speed other | big | ratio", "speed has no table 'other'"),
        ("benchmark speed | big | ratio", "The source of a cell must be"),
    ],
)
def test_a_number_of_no_cell_is_refused(mark, message):
    tables = {"speed": lambda result: {"main": SPEED}}
    with pytest.raises(ValueError, match=message):
        readme.render(
            f"It is <!-- cell:{mark} -->1<!-- /cell -->",
            {"speed": {"cpu_2_cores": RESULT}},
            tables,
            {"decay/text": STUDY},
        )


@pytest.mark.parametrize("indent", ["", "  "])
def test_a_number_that_would_end_a_paragraph_or_a_list_is_refused(indent):
    text = f"- It takes\n{indent}<!-- cell:study decay/text | Adam | peak -->0.01<!-- /cell --> times.\n"
    with pytest.raises(ValueError, match="begins a line, where Markdown takes it for the end of a paragraph"):
        readme.render(text, {}, {}, {"decay/text": STUDY})
    assert readme.render(text.replace("\n" + indent, " "), {}, {}, {"decay/text": STUDY})


def test_a_study_s_table_shows_fresh_seeds_and_percent_of_the_baseline():
    verdict = {"effect": -0.5, "relative_effect": -0.25, "interval": [-0.6, 0.4], "decision": "undecided"}
    summary = {
        "info": {
            "task": "a task", "arms": ["a", "b"], "baseline": "a", "metric_name": "squared_error",
            "best_rates": {"a": 0.01, "b": 0.5},
        },
        "verdicts": {"b": verdict}, "updates": {"a": 2000, "b": 20},
    }  # fmt: skip
    trials = [
        {"arm": arm, "phase": phase, "final_metric": metric}
        for arm, phase, metric in [
            ("a", "tuning", "9"), ("a", "verdict", "1"), ("a", "verdict", "3"), ("b", "verdict", "1.5"),
            ("b", "verdict", "1.5"),
        ]
    ]  # fmt: skip
    made = studies.table(summary, trials)
    assert made.columns == ["arm", "peak", "updates", "squared error", "minus a, %", "verdict"]
    assert made.rows == [
        ["a", "0.01", "2,000", "2.000 ± 1.000", "", "baseline"],
        ["b", "0.5", "20", "1.500 ± 0.000", "−25.0 [−30.0, +20.0]", "undecided"],
    ]
    del summary["updates"]
    summary["info"]["sequential"] = {"first": 5, "most": 20}
    made = studies.table(summary, trials[:-1] * 2)
    assert made.columns[2] == "seeds" and [row[2] for row in made.rows] == ["4", "2"]


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["a.py"], ["a.py"]),
        (["a.py", "--out", "docs/a"], ["a.py"]),
        (["a.py", "--out", "docs/a", "--task", "text"], ["a.py", "--task", "text"]),
        (["a.py", "--out=docs/a", "--task", "text"], ["a.py", "--task", "text"]),
    ],
)
def test_the_command_of_a_study_is_shown_without_its_folder(command, shown):
    assert studies._without_out(command) == shown


def test_a_study_s_facts_are_counts_and_shares():
    info = {"task": "a task", "grid": {"a": [1, 2], "b": [1, 2, 3]}, "tuning_seeds": 2, "arms": ["a", "b"]}
    summary = {"info": info | {"looks": [5, 8], "seeds": 6}, "updates": {"a": 2000, "b": 500}}
    # Five rates on two seeds and two arms on at most eight: 26 trials.
    assert studies.facts(summary, [{}] * 13).rows == [
        ["trials", "13"],
        ["trials, % of the whole grid and all seeds", "50 %"],
        ["updates saved by a", "0 %"],
        ["updates saved by b", "75 %"],
    ]
    summary = {"info": info | {"looks": None, "seeds": 6}}
    assert studies.facts(summary, [{}] * 11).rows[1][1] == "50 %"


MODULE = '''"""A module.

Of two lines.
"""

import math  # for pi


class A:
    """A class."""

    # A comment.
    def f(self, x):
        """A method, of one line."""
        y = "# no comment"
        return math.pi * x, y


def g():
    """Nothing."""
'''


def test_a_fingerprint_is_that_of_code_without_words():
    assert sources.code(MODULE).splitlines() == [
        "import math",
        "class A:",
        "    def f(self, x):",
        '        y = "# no comment"',
        "        return math.pi * x, y",
        "def g():",
    ]


@pytest.mark.parametrize("suite", command.Suite)
def test_what_a_suite_measures_exists(suite):
    found = sources.fingerprints(command.module(suite).MEASURES)
    assert set(command.module(suite).MEASURES) <= found.keys() and all(found.values())
    assert not sources.changed(found)


def test_what_is_measured_is_imported_through_every_module():
    found = sources.fingerprints(["optimizers"])
    assert {"optimizers", "transforms.adam", "moments.int8", "_core.values"} <= found.keys()
    assert not any(name.startswith(("study", "wrappers", "interop")) for name in found)
    with pytest.raises(ValueError, match="has no module 'optimisers' to measure"):
        sources.fingerprints(["optimisers"])


def test_a_result_of_older_code_is_marked(tmp_path):
    package = tmp_path / sources.PACKAGE
    package.mkdir()
    for name in "abcdef":
        (package / f"{name}.py").write_text(f'"""{name}."""\n{name} = 1\n')
    recorded = dict.fromkeys("abcdef", sources._fingerprint(tmp_path, "a")) | {
        name: sources._fingerprint(tmp_path, name) for name in "abcde"
    }
    assert sources.changed(recorded, tmp_path) == ["f"]

    recorded = sources.fingerprints(["optimizers"])
    assert sources.mark(recorded) == "" and setting.origin(RESULT | {"sources": recorded}).endswith(
        "command`"
    )
    old = recorded | {"transforms.adam": "older"}
    assert sources.mark(old) == "**measured before changes** to `transforms.adam`"
    assert setting.origin(RESULT | {"sources": old}).endswith("changes** to `transforms.adam`")
    old |= {"_core.trees": "older", "_core.values": "older"}
    assert sources.mark(old).endswith("to `_core.trees`, `_core.values` and 1 more module")
    assert sources.mark(old | {"gone": "x"}).endswith("to `_core.trees`, `_core.values` and 2 more modules")


def test_wrong_verdicts_are_counted():
    result = error_rates.measure(quick=True, advance=lambda text: None)
    assert [row["wrong"] <= 0.25 for row in result["rows"]] == [True] * 7
    (table,) = error_rates.tables(result).values()
    assert table.rows[-1][:3] == ["normal", "1", "8, 12, 16"]
    # An arm that is far away is found in every table, and none of equal numbers.
    trials = error_rates.normal(np.random.default_rng(0), (20, 2, 8))
    assert error_rates.wrong(trials + np.array([[0.0], [50.0]])).all()
    assert not error_rates.wrong(np.ones((20, 2, 8))).any()


def test_a_plan_is_measured_beside_others_and_a_bound():
    result = sequential.measure(quick=True, advance=lambda text: None)
    made = sequential.tables(result)
    assert made.keys() == {"seeds", "found", "fewest"}
    plan = result["rows"][0]
    assert plan["plan"] == "`Sequential(5, 32)`"
    # At d = 2 almost all tables are decided early, without an effect almost none.
    assert 5 <= plan["seeds"][-1] < 8 and plan["seeds"][0] > 30
    assert plan["found"][-1] == 1 and plan["found"][0] < 0.1
    assert 5 <= result["bounds"][0]["seeds"] <= plan["seeds"][-1] + 0.5


def test_the_docstring_of_sequential_says_what_was_measured():
    (result,) = command.stored()["sequential"].values()
    plan, lines = result["rows"][0], study.Sequential.__doc__.splitlines()
    expected = {
        "expected seeds": [f"{x:.1f}" for x in plan["seeds"]],
        "found, %": [f"{100 * x:.1f}" for x in plan["found"]],
        "of 32 seeds, %": [f"{100 * x:.1f}" for x in result["without looks"]],
    }
    for name, numbers in expected.items():
        (line,) = [each for each in lines if each.strip().startswith(f"| {name} |")]
        assert [cell.strip() for cell in line.split("|")[2:-1]] == numbers


def test_medians_over_tasks_count_a_lost_run_as_infinitely_bad():
    def row(task, *worse):
        cells = [{"worse_percent": x} for x in worse]
        return {
            "task": task, "shape": "constant", "tuned_peak": 0.1, "metric": "loss", "best": 1.0,
            "without": cells[:3], "with": cells[3:],
        }  # fmt: skip

    rows = [row("a", 0, 9, None, 0, 1, 2), row("b", 0, 3, None, 4, 5, -6), row("c", 0, 4, 5, 1, 1, 20_000)]
    made = error_control_basin.tables(rows)["basin_medians"]
    assert made.rows == [["constant", "+4.0", "diverged", "+1.0", "+1.0", "+2.0"]]


def test_a_result_of_unknown_origin_is_named(tmp_path):
    (tmp_path / "telemetry_cpu_2_cores.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="telemetry_cpu_2_cores.json.*run --suite telemetry again"):
        command.stored(tmp_path)


def test_a_busy_machine_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "cores_busy_elsewhere", lambda: 1.5)
    with pytest.raises(ValueError, match="keep 1.5 cores busy"):
        command.run_here(command.Suite.update_step, tmp_path, quick=False)


def test_what_is_started_and_awaited_is_one_kernel():
    text = "\nENTRY %m () -> f32[2] {\n  %s = (f32[2]{0}, u32[]) copy-start(%p)\n"
    assert entry_kernels(text + "  ROOT %d = f32[2]{0} copy-done(%s)\n}\n") == 1


def test_the_pages_are_what_the_committed_results_say():
    text = "".join((PROJECT / page).read_text() for page in command.PAGES)
    assert text.count("<!-- benchmark:") >= 12
    assert text.count("<!-- study:") == len(studies.published()) == 5
    assert text.count("<!-- cell:") >= 8
    for page in command.PAGES:
        assert command.rendered(page) == (PROJECT / page).read_text(), page


def test_every_committed_result_says_where_it_comes_from():
    results = [json.loads(path.read_text()) for path in command.RESULTS.glob("*.json")]
    assert len(results) >= 6
    for result in results:
        assert {
            "command",
            "commit",
            "hardware",
            "host",
            "python",
            "versions",
            "xla_flags",
            "seeds",
            "sources",
        } <= result.keys()


def test_exponents_are_those_of_power_laws():
    def row(grows, x):
        timed = {"ours": {"ms": 3 * x**0.5}, "optax": {"ms": 2 * x}}
        prepared = {"ours": {"trace": x, "compile": x}, "optax": {"trace": x**2}}
        return {"grows": grows, grows: x, "timed": timed, "preparation_s": prepared}

    rows = [row(grows, 10.0**e) for grows in ("parameters", "leaves") for e in range(1, 7)]
    found = scaling._exponents(rows)
    assert found["step against leaves"] == pytest.approx({"ours": 0.5, "optax": 1.0})
    assert found["trace + compile against leaves"] == pytest.approx({"ours": 1.0, "optax": 2.0})
    assert all(math.isfinite(x) for fitted in found.values() for x in fitted.values())


@pytest.fixture
def begun(monkeypatch):
    """The suites for which a process is started; none is."""
    suites = []

    def run(arguments, **_):
        if arguments[0] == "git":  # asked for the commit of a published study
            return subprocess.CompletedProcess(arguments, 0, stdout="")
        is_suite = "--suite" in arguments
        suites.append(arguments[arguments.index("--suite") + 1] if is_suite else arguments[1:])
        return subprocess.CompletedProcess(arguments, 0)

    monkeypatch.setattr(command.subprocess, "run", run)
    return suites


def test_one_command_measures_every_suite_that_is_published(tmp_path, monkeypatch, begun):
    monkeypatch.setattr(command.compilers, "missing", lambda: "")
    command.main(out=tmp_path)
    assert begun == list(command.Suite)
    assert command.stored().keys() == set(begun)


def test_publishing_runs_the_examples_too(tmp_path, monkeypatch, begun):
    monkeypatch.setattr(command.compilers, "missing", lambda: "")
    command.main(out=tmp_path, publish=True, quick=True)
    assert begun[: len(command.Suite)] == list(command.Suite)
    scripts = {Path(script).name: options for script, *options in begun[len(command.Suite) :]}
    assert scripts.keys() == {"should_i_decay.py", "decay_or_grow.py", "watch_learning_rates.py"}
    assert len(begun) == len(command.Suite) + len(studies.published()) + 1
    for folder in studies.published():
        ran = json.loads((tmp_path / "docs" / folder / "setting.json").read_text())
        assert ran["command"].startswith("python examples/") and "study.engine.trials" in ran["sources"]
    for script, options in scripts.items():
        runpy.run_path(str(PROJECT / "examples" / script))["command_line"]().parse_args(options)
        assert options[options.index("--out") + 1].startswith(str(tmp_path))


def test_what_needs_compilers_that_are_not_there_is_skipped(tmp_path, monkeypatch, capsys, begun):
    monkeypatch.setattr(command.compilers, "missing", lambda: "Install them.")
    command.main(out=tmp_path)
    assert set(command.Suite) - set(begun) == {"structure", "memory"}
    assert "structure: skipped. Install them." in capsys.readouterr().err


def test_a_quick_run_does_not_overwrite_what_is_published():
    with pytest.raises(Exception, match="--quick measures nothing"):
        command.main(quick=True)


def test_a_quick_run_writes_its_result_and_tables(tmp_path, monkeypatch):
    chains = [update_step.CHAINS["adamw"], *list(update_step.LOW_PRECISION.values())[:1]]
    rows = [
        ("4 leaves", trees.small_leaves(4), name, chain, 1) for name, chain in zip("ab", chains, strict=True)
    ]
    monkeypatch.setattr(update_step, "_rows", lambda quick: rows)
    outcome = CliRunner().invoke(
        command.app, ["--suite", "update_step", "--quick", "--out", str(tmp_path)], catch_exceptions=False
    )
    assert outcome.exit_code == 0, outcome.output
    (suite,) = command.stored(tmp_path)
    assert suite == "update_step"
    (result,) = command.stored(tmp_path)[suite].values()
    assert [row["chain"] for row in result["rows"]] == ["a", "b"]
    for row in result["rows"]:
        assert math.isfinite(row["timed"]["ours"]["ratio"]["median"])
    assert len(update_step.tables(result)["low_precision"].rows) == 2


@pytest.mark.skipif(not HAS_TORCH, reason="needs PyTorch")
def test_pytorch_s_step_has_each_leaf_s_own_gradient():
    shapes = trees.small_leaves(12)  # from ten on JAX's order of the names is not that of the numbers
    gradients = gradient_sets(shapes, 1)
    make = functools.partial(torch_module().optim.SGD, lr=1.0)
    step = TorchStep(make, shapes, gradients)  # which takes one step, to warm up
    params, _ = next(step._turns)
    for p, (name, start) in zip(params, trees.constant(shapes, 0.1).items(), strict=True):
        moved = start - np.asarray(gradients[0][name])
        np.testing.assert_allclose(p.detach().numpy(), moved, rtol=1e-6, atol=1e-6)


def test_a_quick_run_of_error_control_has_tables_and_pictures_of_all_parts():
    result = json.loads(json.dumps(error_control.measure(True, lambda text: None), allow_nan=False))
    assert result.keys() == {*error_control.PARTS, "settings", "seeds"}
    tables = error_control.tables(result)
    assert tables.keys() == {"basin", "basin_medians", "no_rate", "followed", "deterministic"}
    assert [row[:2] for row in tables["basin"].rows] == [["regression, batch 256", "constant"]]
    assert len(tables["no_rate"].rows) == len(tables["followed"].rows) == 1
    assert len(tables["deterministic"].rows) == 3
    assert all(row["has_converged"] for row in result["deterministic"])
    (edge,) = result["edge"]
    assert [point["step"] for point in edge["points"]] == list(range(0, 60, 10))
    parts = ("basin", "edge")
    names = {f"error_control_{part}_{theme}" for part in parts for theme in ("light", "dark")}
    assert error_control.figures(result).keys() == names
    assert error_control.tables({"deterministic": result["deterministic"]}).keys() == {"deterministic"}


def test_the_cost_of_a_limit_is_that_of_one_probe_in_ten_steps():
    result = json.loads(json.dumps(limit_cost.measure(True, lambda text: None), allow_nan=False))
    (row,) = result["rows"]
    assert row["probes_per_step"] == pytest.approx(0.1) and 0 < row["ratio"] < 100
    assert len(limit_cost.tables(result)["cost"].rows) == 1


@pytest.mark.parametrize("name", list(error_control_basin.all_arms(list(error_control_basin.SHAPES))))
def test_an_arm_of_a_basin_takes_a_step_at_a_traced_rate(name):
    arm = error_control_basin.all_arms(list(error_control_basin.SHAPES))[name]
    params = {"w": jnp.ones(3)}

    def loss(params):
        return jnp.sum(params["w"] ** 2)

    def step(rate):
        tx = optax.with_extra_args_support(arm(rate, 10))
        value, gradient = jax.value_and_grad(loss)(params)
        updates, _ = tx.update(gradient, tx.init(params), params, value=value, value_fn=loss)
        return optax.apply_updates(params, updates)

    assert loss(jax.jit(step)(1.0 if name == "prodigy" else 1e-3)) < loss(params)


def basin_rows():
    """Rows of two tasks, one with an accuracy, whose highest peak has diverged on one seed."""
    rates = [0.001, 0.002]
    found = []
    for name, has_accuracy in (("a", False), ("b", True)):
        task = types.SimpleNamespace(metric_name="some_metric", maximize=has_accuracy)
        for shape in list(error_control_basin.SHAPES)[:2]:
            grid = np.array([[0.4, 0.6], [0.7, 0.9]])
            common, tuned = error_control_basin._tuned(task, rates, grid)
            peaks = [rates[tuned] * factor for factor in error_control_basin.FACTORS]
            without = [grid[tuned], np.array([0.6, 0.6]), np.array([0.5, np.inf])]
            cells = [
                error_control_basin._cells(task, common["best"], peaks, each)
                for each in (without, [grid[0]] * 3)
            ]
            found.append({"task": name, "shape": shape, "without": cells[0], "with": cells[1]} | common)
    return found


def test_a_basin_is_relative_to_the_best_rate_of_the_grid_and_worse_is_positive():
    loss, _, accuracy, _ = basin_rows()
    assert (loss["tuned_peak"], accuracy["tuned_peak"]) == (0.001, 0.002)
    assert [cell["rate"] for cell in loss["with"]] == pytest.approx([0.001, 0.01, 0.1])
    table = error_control_basin.tables([loss, accuracy])["basin"].rows
    assert table == [
        ["a", "constant", "0.0010", "some metric 0.500", "+20.0", "diverged", "+0.0", "+0.0", "+0.0"],
        ["b", "constant", "0.0020", "some metric 0.800", "+25.0", "diverged", "+37.5", "+37.5", "+37.5"],
    ]
    assert loss["without"][2]["metrics"] == [0.5, None]
    assert error_control_basin._percent({"worse_percent": 1e6}) == "> 9,999"


def test_a_rate_that_diverges_is_never_the_tuned_one():
    for maximize in (False, True):
        task = types.SimpleNamespace(metric_name="loss", maximize=maximize)
        common, tuned = error_control_basin._tuned(task, [1.0, 2.0], np.array([[np.nan, 0.1], [0.3, 0.3]]))
        assert (tuned, common["tuned_peak"], common["grid"][0]["mean"]) == (1, 2.0, None)


def test_a_basin_is_drawn_with_one_panel_per_task_and_one_for_the_legend():
    figures = error_control_basin.figures(basin_rows())
    panels = figures["error_control_basin_dark"].axes
    assert [axes.get_title("left") for axes in panels[:2]] == ["a", "b"]
    assert [len(axes.lines) for axes in panels[:2]] == [4, 4]
    assert [axes.get_yscale() for axes in panels[:2]] == ["log", "linear"]
    (legend,) = [axes.get_legend() for axes in panels if axes.get_legend()]
    assert len(legend.get_texts()) == 4


@pytest.mark.parametrize("name", list(error_control_deterministic.METHODS)[1:2] + ["optax.lbfgs"])
def test_gradients_are_counted_once_at_each_point(name):
    problem, method = error_control_deterministic.quadratic(10), error_control_deterministic.METHODS[name]
    points = set()

    def loss(x):
        jax.debug.callback(lambda x: points.add(x.tobytes()), x)
        return problem.loss(x)

    counted = error_control_deterministic.Problem(loss, problem.start)
    found = error_control_deterministic.evaluations(counted, method)
    jax.effects_barrier()
    assert found["has_converged"] and found["values"] == 0
    assert found["gradients"] == len(points)


def test_values_of_a_line_search_are_counted():
    problem = error_control_deterministic.quadratic(10)
    method = error_control_deterministic.METHODS["gradient descent with backtracking"]
    calls = []

    def loss(x):
        jax.debug.callback(lambda x: calls.append(x), x)
        return problem.loss(x)

    counted = error_control_deterministic.Problem(loss, problem.start)
    found = error_control_deterministic.evaluations(counted, method, most=20)
    jax.effects_barrier()
    assert found["gradients"] == 20 and not found["has_converged"]
    assert len(calls) == found["gradients"] + found["values"]


def test_a_count_says_that_it_is_a_bound_or_has_diverged():
    row = {"gradients": 1234, "values": 0, "is_finite": True, "has_converged": True}
    count = error_control_deterministic._count
    assert count(row) == "1,234"
    assert count(row | {"values": 5}) == "1,234 + 5"
    assert count(row | {"has_converged": False}) == "> 20,000"
    assert count(row | {"has_converged": False, "is_finite": False}) == "diverged"


def test_the_largest_eigenvalue_is_that_of_the_preconditioned_hessian():
    rng = np.random.default_rng(0)
    hessian, root = rng.normal(size=(4, 4)), rng.uniform(0.5, 2, 4)
    hessian = hessian @ hessian.T
    exact = np.linalg.eigvalsh(hessian / np.sqrt(np.outer(root, root)))[-1]

    def loss(params):
        x = jnp.concatenate([params["a"], params["b"]])
        return x @ hessian @ x / 2

    def tree(x):
        return {"a": jnp.asarray(x[:1]), "b": jnp.asarray(x[1:])}

    found, _ = error_control_edge.largest_eigenvalue(loss, tree(np.ones(4)), tree(root), tree(np.ones(4)), 60)
    assert found == pytest.approx(exact, rel=1e-3)


def test_the_accelerator_s_suites_share_eight_minutes(tmp_path, monkeypatch):
    begun = []

    def run(arguments, timeout, **_):
        suite, seconds = (arguments[arguments.index(name) + 1] for name in ("--suite", "--seconds"))
        begun.append((suite, float(seconds), timeout))
        clock[0] += min(float(seconds) + 15, timeout)  # each overruns a little
        code = {"study_throughput": 1}.get(suite, 0)
        if suite == "update_step":
            raise subprocess.TimeoutExpired(arguments, timeout)
        return subprocess.CompletedProcess(arguments, code)

    clock = [0.0]
    monkeypatch.setattr(command.subprocess, "run", run)
    monkeypatch.setattr(command.time, "monotonic", lambda: clock[0])
    command.measure_accelerator(tmp_path, quick=False)
    assert [suite for suite, _, _ in begun] == list(command.ON_ACCELERATOR)  # whatever became of the others
    assert all(0 < seconds < timeout for _, seconds, timeout in begun)
    assert clock[0] <= command.ACCELERATOR_SECONDS


def test_an_accelerator_is_needed_unless_the_run_is_quick(tmp_path):
    with pytest.raises(command.typer.BadParameter, match="--accelerator needs a GPU or TPU that JAX finds"):
        command.main(out=tmp_path, accelerator=True)


def test_rows_are_kept_when_time_or_memory_runs_out():
    def rows(error):
        yield {"n": 1}
        raise error

    assert in_time(iter([1, 2])) == ([1, 2], {})
    kept, note = in_time(rows(OutOfTime("the next")))
    assert kept == [{"n": 1}] and note == {"note": "stopped after 1 rows: no time was left"}
    kept, note = in_time(rows(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")))
    assert kept == [{"n": 1}] and note["note"] == "stopped after 1 rows: RESOURCE_EXHAUSTED: Out of memory"
    with pytest.raises(KeyError):
        in_time(rows(KeyError("a fault")))


def test_on_an_accelerator_a_suite_stops_early_and_is_rendered_beside_the_cpu_s(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "cores_busy_elsewhere", lambda: 0.0)
    with pytest.raises(ValueError, match="update_step: stopped after 0 rows: no time was left"):
        command.run_here(command.Suite.update_step, tmp_path, quick=True, seconds=-1.0)
    with pytest.raises(ValueError, match=r"end_to_end: no result after -1 s, before compiling: optax\."):
        command.run_here(command.Suite.end_to_end, tmp_path, quick=True, seconds=-1.0)
    device = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(setting.jax, "devices", lambda: [device])
    rows = list(update_step._rows(quick=True))[:2]
    monkeypatch.setattr(update_step, "_rows", lambda quick: iter(rows))
    command.run_here(command.Suite.update_step, tmp_path, quick=True, seconds=600.0)
    (written,) = tmp_path.glob("*.json")
    assert written.name == "update_step_nvidia_h100_80gb_hbm3.json"
    result = json.loads(written.read_text())
    assert result["command"] == "python -m benchmarks --suite update_step --seconds 600 --quick"
    both = {"update_step": {"cpu_2_cores": result | {"hardware": "cpu_2_cores"}, result["hardware"]: result}}
    text = "<!-- benchmark:update_step main -->\n<!-- /benchmark -->"
    page = readme.render(text, both, {"update_step": update_step.tables})
    assert page.count("Update and apply against optax (NVIDIA H100 80GB HBM3, ") == 2
    assert "(benchmarks/results/update_step_nvidia_h100_80gb_hbm3.json)" in page


def test_an_accelerator_s_rows_cover_every_chain_and_begin_with_what_says_most():
    rows = [(tree, name) for tree, _, name, _, _ in update_step._rows_of_an_accelerator()]
    assert rows[0] == ("400 small leaves", "adamw") and len(set(rows)) == len(rows)
    every = update_step.CHAINS | update_step.LOW_PRECISION | update_step.WRAPPED
    assert {name for tree, name in rows if tree == "one leaf of 512 M"} == set(every)
    assert {tree for tree, _ in rows} == {
        "400 small leaves", "one leaf of 512 M", "GPT-2 small, 148 leaves", "2000 small leaves"
    }  # fmt: skip
