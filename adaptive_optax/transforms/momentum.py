"""Momentum: a decaying sum of the updates, in float32 whatever the parameters are."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptive_optax._checks import check_bool, check_inexact, check_same_tree, check_scalar, check_state
from adaptive_optax._precision import incremented, scalar_dtype, scale, value_at, widen
from adaptive_optax.moments.formats import as_storage
from adaptive_optax.moments.storage import as_nearest


class TraceState(NamedTuple):
    """State of `trace`.

    Attributes:
        count: Number of steps taken, int32 scalar.
        trace: The decaying sum, like the parameters, float32 at least or `accumulator_dtype`.
        momentum: The decay of the last step, float32 scalar (float64 if a parameter is).
    """

    count: jax.Array
    trace: Any
    momentum: jax.Array

    hyperparameters = ("momentum",)  # not a field: it has no annotation


def trace(
    decay: optax.ScalarOrSchedule, nesterov: bool = False, accumulator_dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Accumulates updates into a decaying sum.

    optax's function of the same name, in float32 at least (optax's state takes the dtype of the last
    gradients), with a decay that may be a schedule. Unlike Adam's first moment the sum is not an average: its
    length grows to :math:`1/(1-\mu)` times that of the updates.

    .. math::
        t_k = g_k + \mu_k t_{k-1}, \qquad u_k = t_k \quad\text{or, with nesterov,}\quad g_k + \mu_k t_k

    Args:
        decay: :math:`\mu` in [0, 1), or a schedule of the step count.
        nesterov: Whether to look ahead.
        accumulator_dtype: The dtype in which the sum is kept, rounded to nearest; None for float32.

    The number may be a JAX scalar or a tracer; a tracer's range cannot be checked.

    Returns:
        The transformation. It returns float32 (or wider) updates; `params` and extra arguments are ignored.

    Raises:
        ValueError: If an argument is out of range (at construction), a leaf is not floating (at init) or the
            updates' tree is not that of the state (at update).

    State cost: one float32 copy of the parameters.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.trace(0.5)
        >>> state = tx.init(jnp.zeros(1))
        >>> for _ in range(3):
        ...     updates, state = tx.update(jnp.ones(1), state)
        >>> updates.tolist()
        [1.75]

    Source: Sutskever et al. 2013, "On the importance of initialization and momentum", equations 1-4.
    """
    check_scalar("decay", decay, "[0, 1)", schedule=True)
    check_bool("nesterov", nesterov)
    storage = as_storage("accumulator_dtype", as_nearest("accumulator_dtype", accumulator_dtype), decay=decay)

    def init_fn(params):
        check_inexact("trace", "params", params)
        count = jnp.zeros((), jnp.int32)
        return TraceState(count, storage.init(params, "mu"), value_at(decay, count, scalar_dtype(params)))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        check_state("trace", state, TraceState)
        check_inexact("trace", "updates", updates)
        momentum = value_at(decay, state.count, state.momentum.dtype)
        count = incremented(state.count)
        g, total = widen(updates), storage.decode(state.trace)
        check_same_tree("trace", "updates", g, "the state", total)

        def decayed_sum(g, t):
            return g + scale(t, momentum)

        total = jax.tree.map(decayed_sum, g, total)
        updates = jax.tree.map(decayed_sum, g, total) if nesterov else total
        kept = storage.encode(state.trace, total, count=count, role="mu")
        return updates, TraceState(count, kept, momentum)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
