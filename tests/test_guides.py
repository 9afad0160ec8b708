"""The guides' code runs, and finds what the guides say."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

DOCS = Path(__file__).parents[1] / "docs"


def code_of(page, number=0):
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)[number]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(page, number=0):
    names = {"__name__": "__main__"}
    exec(compile(code_of(page, number), page, "exec"), names)
    return names


def test_a_script_of_ones_own_gets_a_verdict(capsys):
    names = run("own_script.md")
    assert names["comparison"].verdict().decision == "better"
    assert capsys.readouterr().out.startswith("linear is better than constant")


def test_a_pytorch_script_follows_the_arms_schedule():
    pytest.importorskip("torch")
    assert run("own_script.md", 1)["comparison"].verdict().decision == "better"


def test_an_average_in_a_script_of_ones_own_is_judged(capsys):
    names = run("own_script.md", 2)
    assert names["comparison"].verdict().decision == "better"
    assert capsys.readouterr().out.startswith("sgd:constant:averaged is better")


def test_a_run_under_way_is_told_whether_to_decay(capsys):
    names = run("decay_now.md")
    assert names["found"].steps == (0, 300)
    assert names["found"].best(0).decision == "worse" and names["found"].best().decision == "better"
    assert capsys.readouterr().out.startswith("Yes: from step 300, ")


def test_an_absurd_rate_is_limited(capsys):
    names = run("error_control.md")
    loss, x, y = names["loss"], names["x"], names["y"]
    assert loss(names["params"], x, y) < 0.1 * loss(jax.tree.map(jnp.zeros_like, names["params"]), x, y)
    assert capsys.readouterr().out.startswith("loss 0.")


def test_a_state_is_created_where_it_belongs():
    names = run("scale.md")
    mu = names["state"][1][0].mu
    assert mu.codes["w"].sharding.is_equivalent_to(names["split"], 2)
    assert len(mu.codes["w"].addressable_shards) == jax.device_count()
