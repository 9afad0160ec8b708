"""The average of the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference.averaging import polynomial_average

import adaptive_optax as ao


@pytest.mark.parametrize("power", [0.0, 1.0, 8.0, 2.5])
def test_it_is_the_papers_average(power):
    tx = optax.chain(ao.adam(0.1), ao.average_parameters(power))
    params = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
    state, iterates, found = tx.init(params), [], []
    for step in range(60):
        gradient = jax.tree.map(lambda x, step=step: x + jnp.sin(step + x), params)
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        iterates.append(np.append(params["w"], params["b"]))
        average = ao.averaged_parameters(params, state)
        found.append(np.append(average["w"], average["b"]))
    np.testing.assert_allclose(found, polynomial_average(iterates, power), rtol=2e-6, atol=2e-6)


def test_power_zero_is_the_mean_and_a_line_is_followed_at_a_fixed_share():
    # On the line w_t = t the average with power g is (t + 1) (g + 1) / (g + 2) - ... -> t (g + 1) / (g + 2).
    for power in (0.0, 8.0):
        tx, w = ao.average_parameters(power), jnp.zeros(1)
        state = tx.init(w)
        for _ in range(2000):
            updates, state = tx.update(jnp.ones(1), state, w)
            w = optax.apply_updates(w, updates)
        share = float(ao.averaged_parameters(w, state)[0] / w[0])
        assert share == pytest.approx((power + 1) / (power + 2), rel=2e-3)


def test_it_averages_what_the_parameters_really_become():
    """bfloat16 parameters that an update cannot move keep their average."""
    tx, w = ao.average_parameters(), jnp.ones(1, jnp.bfloat16)
    state = tx.init(w)
    for _ in range(10):
        updates, state = tx.update(jnp.full(1, 1e-3), state, w)
        w = optax.apply_updates(w, updates)
    assert state.average.tolist() == [1.0] and state.average.dtype == jnp.float32
    assert ao.averaged_parameters(w, state).dtype == jnp.bfloat16


def test_errors():
    with pytest.raises(ValueError, match=r"power must be a number in \[0, inf\), got -1"):
        ao.average_parameters(-1)
    tx = ao.average_parameters()
    with pytest.raises(ValueError, match="average_parameters needs the parameters"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    twice = optax.chain(tx, tx)
    with pytest.raises(ValueError, match="opt_state must hold one average of the parameters, got 2"):
        ao.averaged_parameters(jnp.ones(2), twice.init(jnp.ones(2)))
