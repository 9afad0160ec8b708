"""The benchmark's parts that need no clock: what is counted, what is floor, and how the README is written."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adaptive_optax as ao
from benchmarks import __main__ as command
from benchmarks import readme, scaling, trees, update_step
from benchmarks.contenders import Step, gradient_sets, kernels, number_of_sets
from benchmarks.tables import Table, digits, ratio
from benchmarks.timing import against, alternate

PROJECT = Path(__file__).parent.parent


def test_gpt2_small_is_gpt2_small():
    shapes = trees.gpt2_small()
    assert len(shapes) == 148
    assert trees.size(shapes) == 124_439_808


def test_one_leaf_has_its_size():
    assert trees.one_leaf(2**24) == {"leaf": (4096, 4096)}
    assert trees.size(trees.one_leaf(2**29)) == 2**29


def test_contenders_take_turns_and_each_is_first_equally_often():
    order = []
    contenders = {name: lambda name=name: order.append(name) for name in "abc"}
    times = alternate(contenders, rounds=15)
    assert {len(values) for values in times.values()} == {15}
    rounds = [tuple(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({one[0] for one in rounds}) == 3


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
    assert kernels(text) >= 2
    assert kernels(jax.jit(lambda x: (x, x)).lower(jnp.ones(3)).compile().as_text()) <= 2
    one = "\nENTRY %m (p: f32[2]) -> (f32[2], f32[2]) {\n  %p = f32[2]{0} parameter(0)\n"
    one += (
        "  %a.1 = (f32[2]{0}, f32[2]{0}) fusion(%p), kind=kLoop\n  %g = f32[2]{0} get-tuple-element(%a.1)\n"
    )
    assert kernels(one + "  ROOT %t = (f32[2]{0}, f32[2]{0}) tuple(%g, %p)\n}\n") == 1


def test_a_step_is_the_optimizer_s_and_goes_round_its_sets():
    shapes = trees.small_leaves(4)
    gradients = gradient_sets(shapes)
    assert len(gradients) == number_of_sets(shapes) == 16
    step = Step(lambda: ao.adamw(1e-3), shapes, gradients)
    params = {name: jnp.asarray(x) for name, x in trees.normal(shapes, seed=100, scale=0.1).items()}
    state = optax.adamw(1e-3).init(params)
    for _ in range(16):
        step()
    for _ in range(2):
        updates, state = optax.adamw(1e-3).update(gradients[0], state, params)
        params = optax.apply_updates(params, updates)
    second_time_round, _ = step()
    for name, x in second_time_round.items():
        np.testing.assert_allclose(x, params[name], rtol=1e-5, atol=1e-7)
    found = step.properties()
    parameters = trees.size(shapes)
    assert found["state_bytes_a_parameter"] == pytest.approx(8, abs=100 / parameters)
    assert found["peak_bytes_a_parameter"] >= 16
    assert set(step.preparation_seconds()) == {"trace", "lower", "compile"}


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
    "versions": {"jax": "0.10", "optax": "0.2"}, "xla_flags": "", "rows": [1, 2],
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
        "Before\n\n<!-- benchmark:speed main -->\nTimes (2 CPU cores, Python 3.11, jax 0.10"
    )
    assert "[numbers](benchmarks/results/speed_cpu_2_cores.json)" in found
    assert "| n | ms |\n| --- | --- |\n| 1 | 0.5 |\n| 2 | 0.5 |\n" in found
    assert found.endswith("<!-- /benchmark -->\n\nAfter\n")
    assert readme.render(found, {"speed": {"cpu_2_cores": RESULT}}, {"speed": made}) == found


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("speeed main", "suite 'speeed'; there are speed"),
        ("speed other", "no table 'other'; it has main"),
        ("empty main", "no result of the suite 'empty'"),
    ],
)
def test_a_block_that_means_nothing_is_refused(block, message):
    text = f"<!-- benchmark:{block} -->\n<!-- /benchmark -->\n"
    with pytest.raises(ValueError, match=message):
        readme.render(text, {"speed": {"cpu_2_cores": RESULT}}, {"speed": made, "empty": made})


def test_the_readme_is_what_the_committed_results_say():
    text = (PROJECT / "README.md").read_text()
    assert text.count("<!-- benchmark:") == text.count("<!-- /benchmark -->") >= 6
    assert command.rendered(text) == text


def test_every_committed_result_says_where_it_comes_from():
    results = [json.loads(path.read_text()) for path in command.RESULTS.glob("*.json")]
    assert len(results) >= 6
    for result in results:
        assert {"command", "commit", "hardware", "host", "python", "versions", "xla_flags"} <= result.keys()


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


def test_a_quick_run_does_not_overwrite_what_is_published():
    with pytest.raises(Exception, match="--quick measures nothing"):
        command.main(quick=True)


def test_a_quick_run_writes_its_result_and_tables(tmp_path):
    command.run_here(command.Suite.update_step, tmp_path, quick=True)
    (suite,) = command.stored(tmp_path)
    assert suite == "update_step"
    (result,) = command.stored(tmp_path)[suite].values()
    assert {row["chain"] for row in result["rows"]} >= {"adamw", "global_rmsprop"}
    assert update_step.tables(result)["main"].rows
