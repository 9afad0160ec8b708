"""What was rejected or dropped: the counts, the calls, and the same decision for a model's own state."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adaptive_optax as ao

PARAMS = {"a": jnp.ones(2), "b": jnp.ones(3)}
BAD = PARAMS | {"b": jnp.array([1.0, jnp.nan, 1.0])}


def counts(state):
    return tuple(int(x) for x in ao.get_rejections(state))


def dropping(inner, every=2, **others):
    return ao.accumulate_gradients(inner, every, drop_nonfinite=True, **others)


def test_dropped_micro_batches_are_counted_beside_rejected_steps():
    burst = optax.GradientTransformation(
        lambda params: optax.EmptyState(), lambda g, s, p=None: (jax.tree.map(jnp.exp, g), s)
    )
    tx = dropping(ao.reject_nonfinite(optax.chain(burst, ao.sgd(0.1))))
    step, state, seen = jax.jit(tx.update), tx.init(PARAMS), []
    large = jax.tree.map(lambda x: 300 * x, PARAMS)
    for g in (BAD, BAD, PARAMS, BAD, PARAMS, large, large, large, PARAMS, PARAMS):
        _, state = step(g, state)
        seen.append(counts(state))
    assert seen == [
        (0, 0, 1, 1),
        (0, 0, 2, 2),
        (0, 0, 2, 0),
        (0, 0, 3, 1),
        (0, 0, 3, 0),
        (1, 1, 3, 0),  # a mean of 150 overflows inside
        (1, 1, 3, 0),
        (2, 2, 3, 0),
        (2, 2, 3, 0),
        (2, 0, 3, 0),
    ]


def test_of_one_alone_the_other_is_zero():
    assert counts(ao.reject_nonfinite(ao.sgd(0.1)).init(PARAMS)) == (0, 0, 0, 0)
    _, state = dropping(ao.sgd(0.1)).update(BAD, dropping(ao.sgd(0.1)).init(PARAMS))
    assert counts(state) == (0, 0, 1, 1)
    two = optax.chain(dropping(ao.sgd(0.1)), dropping(ao.sgd(0.1))).init(PARAMS)
    with pytest.raises(ValueError, match="must hold one state of accumulate_gradients, got 2"):
        ao.get_rejections(two)


def test_what_has_weight_zero_is_not_dropped():
    tx = dropping(ao.sgd(0.1))
    _, state = tx.update(BAD, tx.init(PARAMS), weight=0)
    assert counts(state) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("gradients", "weight", "call"),
    [
        (BAD, 1.0, ("gradient", "b")),
        (PARAMS | {"a": jnp.array([jnp.inf, 1.0])}, 1.0, ("gradient", "a")),
        (PARAMS, np.nan, ("weight", "")),
        (jax.tree.map(lambda x: 1e19 * x, PARAMS), 1.0, ("gradient norm", "")),
    ],
)
def test_on_reject_is_called_once_a_dropped_micro_batch(gradients, weight, call):
    calls = []
    tx = dropping(ao.sgd(0.1), on_reject=lambda *arguments: calls.append(arguments))
    step = jax.jit(lambda g, state, weight: tx.update(g, state, weight=weight))
    state = tx.init(PARAMS)
    for g, w in ((PARAMS, 1.0), (gradients, weight), (BAD, 0.0), (PARAMS, 2.0)):
        _, state = step(g, state, w)
    jax.effects_barrier()
    assert calls == [call] and counts(state)[2] == 1


def test_on_reject_needs_what_it_reports():
    with pytest.raises(ValueError, match="needs drop_nonfinite=True"):
        ao.accumulate_gradients(ao.sgd(0.1), 2, on_reject=print)
    with pytest.raises(ValueError, match=re.escape("on_reject must be None or a function of (what, path)")):
        dropping(ao.sgd(0.1), on_reject="print")


# --- The model's own state ----------------------------------------------------------------------------------


def kept(tx, sequence):
    """Which of the calls had their new state kept; a weight can stand beside the gradient."""

    @jax.jit
    def step(state, g, weight):
        _, state = tx.update(g, state, PARAMS, weight=weight)
        return state, ao.keep_if_rejected(state, {"mean": jnp.ones(2)}, {"mean": jnp.zeros(2)})["mean"]

    state, taken = tx.init(PARAMS), []
    for g in sequence:
        g, weight = g if isinstance(g, tuple) else (g, 1.0)
        state, new = step(state, g, weight)
        taken.append(int(new.sum()) // 2)
    return taken


def test_the_decision_is_that_of_the_last_call():
    sequence = [PARAMS, BAD, BAD, PARAMS, BAD, PARAMS, (BAD, 0.0), PARAMS]
    reject = ao.reject_nonfinite(ao.sgd(0.1))
    assert kept(reject, [g for g in sequence if isinstance(g, dict)]) == [1, 0, 0, 1, 0, 1, 1]
    dropped = [1, 0, 0, 1, 0, 1, 0, 1]
    assert kept(dropping(ao.sgd(0.1)), sequence) == dropped
    assert kept(dropping(reject), sequence) == dropped
    assert kept(ao.reject_nonfinite(dropping(ao.sgd(0.1))), sequence) == dropped
    assert kept(optax.chain(optax.identity(), dropping(ao.sgd(0.1), 3)), sequence) == dropped


def test_a_sum_that_is_bad_is_so_from_its_bad_micro_batch_on():
    reject = ao.reject_nonfinite(ao.sgd(0.1))
    assert kept(ao.accumulate_gradients(reject, 3), [PARAMS, BAD, PARAMS, *[PARAMS] * 4]) == [
        *(1, 0, 0),
        *(1, 1, 1, 1),
    ]
    multi_steps = optax.MultiSteps(reject, 2).gradient_transformation()
    assert kept(multi_steps, [PARAMS, PARAMS, PARAMS, BAD]) == [1, 1, 1, 0]


def test_a_nan_batch_changes_neither_parameters_nor_batch_statistics():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first, self.norm = nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.norm(self.first(x)))

    for tx in (
        ao.reject_nonfinite(ao.adam(0.1)),
        ao.accumulate_gradients(ao.reject_nonfinite(ao.adam(0.1)), 2, drop_nonfinite=True),
    ):
        model = Model(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, x):
            others = nnx.Not(nnx.Param)
            old = jax.tree.map(lambda x: x, nnx.state(model, others))  # generators of random numbers too
            grads = nnx.grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
            optimizer.update(model, grads)
            nnx.update(model, ao.keep_if_rejected(optimizer.opt_state, nnx.state(model, others), old))

        x = jnp.arange(8.0).reshape(4, 2)
        for _ in range(2):
            step(model, optimizer, x)
        before = jax.tree.map(jnp.copy, nnx.state(model))
        step(model, optimizer, x.at[1, 1].set(jnp.nan))
        for left, right in zip(jax.tree.leaves(before), jax.tree.leaves(nnx.state(model)), strict=True):
            assert jnp.array_equal(left, right)
        step(model, optimizer, x)
        assert not jnp.array_equal(before["norm"]["mean"][...], model.norm.mean[...])


def test_there_must_be_something_that_rejects_and_states_alike():
    with pytest.raises(ValueError, match="opt_state must hold a state of reject_nonfinite, dynamic_loss_sc"):
        ao.keep_if_rejected(ao.sgd(0.1).init(PARAMS), PARAMS, PARAMS)
    state = ao.reject_nonfinite(ao.sgd(0.1)).init(PARAMS)
    with pytest.raises(ValueError, match=r"keep_if_rejected: .*'b'.*float32\(3,\).*float32\(2,\)"):
        ao.keep_if_rejected(state, PARAMS | {"b": jnp.ones(2)}, PARAMS)
