"""A study trains what its functions and data are when it is called, and nothing that an earlier call left."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptive_optax as ao
from adaptive_optax import study
from adaptive_optax.study.engine import trials

X = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
Y = X @ np.arange(1.0, 5.0, dtype=np.float32)


def regression(x=X, y=Y, factor=lambda: 1.0, offset=lambda: 0.0):
    data = {"x": x.copy(), "y": y.copy()}

    def error(w, batch):
        return jnp.mean((batch["x"] @ w - batch["y"]) ** 2)

    return study.Task(
        lambda key: jax.random.normal(key, (4,)),
        lambda w, batch, key: factor() * error(w, batch),
        data,
        data,
        batch_size=8,
        metric=lambda w, batch: error(w, batch) + offset(),
    )


def plain(rate, steps):
    return ao.sgd(rate)


def finals(arms, task=None, **keywords):
    """The final metrics of each arm on the fresh seeds."""
    given = {"learning_rates": [0.03], "steps": 8, "seeds": 5, "tuning_seeds": 1, "growth": 0} | keywords
    compared = study.compare(
        regression() if task is None else task, arms, mode="scan", chunk=4, progress=False, **given
    )
    fresh = compared.table[compared.table["phase"] == "verdict"]
    return {arm: fresh.loc[fresh["arm"] == arm, "final_metric"].tolist() for arm in dict(arms)}


class Sgd(NamedTuple):
    scale: float

    def __call__(self, rate, steps):
        return ao.sgd(rate * self.scale)


class Adam(NamedTuple):
    scale: float

    def __call__(self, rate, steps):
        return ao.adam(rate * self.scale)


@dataclasses.dataclass(frozen=True)
class Built:
    family: str
    build: Any = dataclasses.field(compare=False)

    def __call__(self, rate, steps):
        return self.build(rate)


@dataclasses.dataclass
class Mutable:
    decay: float

    def __call__(self, rate, steps):
        return ao.adamw(rate, weight_decay=self.decay)


@dataclasses.dataclass(frozen=True)
class Scaled:
    family: str
    scale: float = dataclasses.field(compare=False)

    def __call__(self, params, opt_state):
        return self.scale * params


EQUAL = {
    "named tuples": (Sgd(1.0), Adam(1.0)),
    "a field that is not compared": (Built("m", ao.sgd), Built("m", ao.adam)),
}


@pytest.mark.parametrize("kind", EQUAL)
@pytest.mark.parametrize("kept", [False, True])
def test_arms_that_compare_equal_are_two_arms(kind, kept, tmp_path):
    first, second = EQUAL[kind]
    assert first == second
    keywords = {"out": tmp_path} if kept else {}
    found = finals({"sgd": first, "adam": second}, **keywords)
    expected = finals({"sgd": plain, "adam": lambda rate, steps: ao.adam(rate)})
    assert found == expected and found["sgd"] != found["adam"]


def test_evaluates_that_compare_equal_are_two(tmp_path):
    arms = {"whole": plain, "half": plain}
    evaluate = {"whole": Scaled("e", 1.0), "half": Scaled("e", 0.5)}
    found = finals(arms, evaluate=evaluate, out=tmp_path)
    assert found["whole"] == finals({"a": plain, "b": plain})["a"] != found["half"]


def test_an_arm_need_not_be_hashable():
    mutable = Mutable(0.5)
    with pytest.raises(TypeError):
        hash(mutable)
    found = finals({"a": plain, "b": mutable})
    assert found["b"] == finals({"a": plain, "b": lambda r, s: ao.adamw(r, weight_decay=0.5)})["b"]


class Loss(NamedTuple):
    power: int

    def __call__(self, w, batch, key):
        return jnp.mean(jnp.abs(batch["x"] @ w - batch["y"]) ** self.power)


class Vector(NamedTuple):
    power: int

    def __call__(self, w, batch, key):
        return batch["x"] @ w


@dataclasses.dataclass
class Unhashable:
    power: int

    def __call__(self, w, batch, key):
        return Loss(self.power)(w, batch, key)


def test_functions_of_a_task_that_compare_equal_or_have_no_hash_are_checked_each_for_itself():
    task = dataclasses.replace(regression(), loss=Loss(2))
    assert Loss(2) == Vector(2)
    with pytest.raises(ValueError, match="loss must return a real scalar"):
        dataclasses.replace(task, loss=Vector(2))
    arms = {"a": plain, "b": lambda rate, steps: ao.adam(rate)}
    assert finals(arms, dataclasses.replace(task, loss=Unhashable(2))) == finals(arms, task)


def test_a_range_test_takes_any_optimizer():
    @dataclasses.dataclass
    class Optimizer:
        decay: float

        def __call__(self, rate):
            return ao.adamw(rate, weight_decay=self.decay)

    keywords = {"points": 5, "steps": 5, "seeds": 2, "progress": False}
    one, other = (study.lr_range_test(regression(), Optimizer(d), **keywords) for d in (0.0, 500.0))
    assert not one.table.equals(other.table)


READS = {
    "arm": lambda read: (regression(), {"a": plain, "b": lambda r, s: ao.adamw(r, weight_decay=read())}, {}),
    "loss": lambda read: (regression(factor=read), {"a": plain, "b": plain}, {}),
    "metric": lambda read: (regression(offset=read), {"a": plain, "b": plain}, {}),
    "evaluate": lambda read: (
        regression(),
        {"a": plain, "b": plain},
        {"evaluate": lambda params, opt_state: read() * params},
    ),
}


@pytest.mark.parametrize("where", READS)
def test_what_a_function_reads_is_read_at_each_call(where):
    value = 1.0
    task, arms, keywords = READS[where](lambda: value)
    before = finals(arms, task, **keywords)
    assert finals(arms, task, **keywords) == before
    value = 3.0
    after = finals(arms, task, **keywords)
    fresh_task, fresh_arms, fresh_keywords = READS[where](lambda: 3.0)
    assert after == finals(fresh_arms, fresh_task, **fresh_keywords) != before


def test_data_that_were_changed_in_place_are_looked_at_again():
    task = regression()
    arms = {"a": plain, "b": lambda r, s: ao.adam(r)}
    before = finals(arms, task)
    task.train["y"][:] = 0
    assert task.train["y"] is task.validation["y"]
    assert finals(arms, task) == finals(arms, regression(y=0 * Y)) != before


def test_a_range_test_sees_what_has_changed_too():
    task, scale = regression(), 1.0
    keywords = {"points": 5, "steps": 5, "seeds": 2, "progress": False}

    def optimizer(rate):
        return ao.sgd(rate * scale)

    tables = [study.lr_range_test(task, optimizer, **keywords).table]
    scale = 0.5
    tables.append(study.lr_range_test(task, optimizer, **keywords).table)
    task.train["y"][:] = 0
    tables.append(study.lr_range_test(task, optimizer, **keywords).table)
    assert not tables[0].equals(tables[1]) and not tables[1].equals(tables[2])


def test_nothing_is_held_after_a_study():
    finals({"a": plain, "b": plain})
    assert trials._program.cache_info().currsize == trials._place_data.cache_info().currsize == 0
    with pytest.raises(ValueError, match="out must"):
        finals({"a": plain, "b": plain}, out="")
    assert trials._program.cache_info().currsize == trials._place_data.cache_info().currsize == 0


def test_debugging_of_nans_changes_no_program(tmp_path):
    arms = ["sgd:constant", "adam:constant"]
    named = {name: study.arm(name) for name in arms}
    before = finals(named, out=tmp_path)
    with jax.debug_nans(True):
        assert finals(named, out=tmp_path) == before  # the folder's
        assert finals(named) == before


def test_metrics_are_as_precise_as_x64_has_them(x64, tmp_path):
    x, y = X.astype(np.float64), Y.astype(np.float64)
    arms = {"a": plain, "b": lambda r, s: ao.sgd(0.9 * r)}
    bare, shifted = (
        finals(
            arms, regression(x, y, offset=lambda offset=offset: offset), margin=0.01, out=tmp_path / str(i)
        )
        for i, offset in enumerate((0.0, 1e8))
    )
    for arm in arms:
        np.testing.assert_allclose(np.array(shifted[arm]) - 1e8, bare[arm], atol=1e-6)
    # From the folder, and beyond float32.
    again = finals(arms, regression(x, y, offset=lambda: 1e8), margin=0.01, out=tmp_path / "1")
    assert again == shifted
    assert np.isfinite(finals(arms, regression(x, y, offset=lambda: 1e39), margin=0.01)["a"]).all()
