"""Averages of the parameters along the way: what a decaying learning rate does, done to the result instead.

With a constant rate the last iterates wander about the minimum; their average is nearer to it. It is the
strongest rival of decay, needs no horizon, and leaves training as it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptive_optax._checks import check_inexact, check_params, check_same_tree, check_scalar, check_state
from adaptive_optax._precision import incremented, scalar_dtype, scale, widen
from adaptive_optax._states import states_of


class AverageParametersState(NamedTuple):
    """State of `average_parameters`.

    Attributes:
        count: Number of steps taken, int32 scalar.
        average: The average, like the parameters, float32 at least.
        power: The exponent, float32 scalar (float64 if a parameter is).
    """

    count: jax.Array
    average: Any
    power: jax.Array

    hyperparameters = ("power",)  # not a field: it has no annotation


def average_parameters(power: float = 8.0) -> optax.GradientTransformationExtraArgs:
    r"""Keeps an average of the parameters, in which late ones weigh more.

    Put it last in a chain, train as usual, and evaluate `averaged_parameters(params, opt_state)`. The updates
    pass through, in float32 at least.

    .. math::
        \bar\theta_t = \bar\theta_{t-1} + \frac{\gamma + 1}{t + \gamma} (\theta_t - \bar\theta_{t-1})

    gives :math:`\theta_i` a weight that grows with :math:`i^\gamma`. The average is about as old as
    :math:`t/(\gamma + 2)` steps whatever t is, so no length of run has to be known: 10 % at the default.

    Args:
        power: :math:`\gamma` in [0, inf); 0 is the plain mean of all steps. May be a JAX scalar or a tracer,
            whose range cannot be checked.

    Returns:
        The transformation; `update` needs `params`.

    Raises:
        ValueError: If `power` is out of range (at construction), a leaf is not floating (at init), or
            `params` is missing (at update).

    State cost: one float32 copy of the parameters.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp, optax
        >>> tx = optax.chain(ao.sgd(1.0), ao.average_parameters(power=0.0))
        >>> params = jnp.zeros(1)
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     updates, state = tx.update(-jnp.ones(1), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> params.tolist(), ao.averaged_parameters(params, state).tolist()  # the mean of 1, 2 and 3
        ([3.0], [2.0])

    Source: Shamir & Zhang 2013, "Stochastic gradient descent for non-smooth optimization", section 4
    (polynomial-decay averaging).
    """
    check_scalar("power", power, "[0, inf)")

    def init_fn(params):
        check_inexact("average_parameters", "params", params)
        real = scalar_dtype(params)
        return AverageParametersState(jnp.zeros((), jnp.int32), widen(params), jnp.asarray(power, real))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_state("average_parameters", state, AverageParametersState)
        check_params("average_parameters", params)
        check_inexact("average_parameters", "updates", updates)
        check_same_tree("average_parameters", "updates", updates, "the state", state.average)
        check_same_tree("average_parameters", "params", params, "the state", state.average)
        count = incremented(state.count)
        gamma = state.power
        weight = (gamma + 1) / (count.astype(gamma.dtype) + gamma)
        leaves, treedef = jax.tree.flatten(state.average)
        # Of the parameters as they will be, rounded to their dtype.
        new = optax.apply_updates(jax.tree.leaves(params), jax.tree.leaves(updates))
        average = [a + scale(x - a, weight) for a, x in zip(leaves, widen(new), strict=True)]
        state = AverageParametersState(count, jax.tree.unflatten(treedef, average), gamma)
        return widen(updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def averaged_parameters(params: Any, opt_state: Any) -> Any:
    """Gives the average that `average_parameters` keeps, in the dtypes of the parameters.

    Made to be the `evaluate` of `study.compare`, where some arms average and some do not: without an average
    in the state it gives `params`.

    Args:
        params: The parameters that are trained.
        opt_state: The optimizer's state.

    Raises:
        ValueError: If the state holds more than one average.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> params = jnp.ones(2)
        >>> ao.averaged_parameters(params, ao.adam(1e-3).init(params)) is params
        True
    """
    found = states_of(AverageParametersState, opt_state)
    if len(found) > 1:
        raise ValueError(f"opt_state must hold one average of the parameters, got {len(found)}.")
    if not found:
        return params
    return jax.tree.map(lambda x, a: a.astype(x.dtype), params, found[0].average)
