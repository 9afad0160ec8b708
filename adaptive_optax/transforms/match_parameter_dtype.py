"""Updates with the dtypes of the parameters, for callers that add them without a cast."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptive_optax._core.checks import check_params
from adaptive_optax._core.low_precision import rounded_growth
from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax._core.precision import cast, widen
from adaptive_optax._core.random_bits import is_low_precision, round_to_nearest
from adaptive_optax._core.states import states_of
from adaptive_optax._core.transformation import transformation
from adaptive_optax._core.trees import PyTree, by_leaf


class MatchParameterDtypeState(NamedTuple):
    """State of `match_parameter_dtype`. It is empty, but tells wrappers to keep the dtypes of updates."""


def outgoing(updates: Any, inner_state: PyTree) -> Any:
    """Returns a wrapper's updates: float32 or wider, or unchanged with `match_parameter_dtype` inside."""
    return updates if states_of(MatchParameterDtypeState, inner_state) else widen(updates)


def match_parameter_dtype() -> optax.GradientTransformationExtraArgs:
    r"""Casts updates to the dtypes of the parameters so that a plain sum gives the same new values.

    Use it if the caller adds updates without a cast: `equinox.apply_updates`, which would otherwise turn a
    bfloat16 model into float32, or sums under strict dtype promotion. `optax.apply_updates` casts, so it does
    not need this. Put it last and outermost, `optax.chain(reject_nonfinite(inner), match_parameter_dtype())`,
    also after `stochastic_rounding`, `kahan_summation` and `master_weights`. Wrappers around it keep its
    dtypes, except `kahan_summation`, `master_weights` and anything that changes the updates after it.

    For a 16-bit parameter p and an update u, with $\circ$ for rounding to p's dtype, the result is
    $v = \circ(q - p)$ with $q = \circ(p + u)$. If q is between p/2 and 2 p, v is exact and
    $p + v = q$. A larger step may miss q by half a unit in the last place of v before the sum is
    rounded. Nothing of a NaN is kept.

    Returns:
        The transformation; `update` needs `params`.

    Raises:
        ValueError: If a leaf is not floating, or `params` is missing or does not match the updates (at
            update).

    State cost: none.

    Examples:
        >>> import adaptive_optax as ao, jax, jax.numpy as jnp, optax
        >>> tx = optax.chain(ao.adam(1e-3), ao.match_parameter_dtype())
        >>> params = {"w": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2)}
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> jax.tree.map(lambda p, u: str((p + u).dtype), params, updates)
        {'b': 'float32', 'w': 'bfloat16'}
    """

    def init_fn(params):
        del params
        return MatchParameterDtypeState()

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_params("match_parameter_dtype", params)
        known = dict(paths_and_leaves(params))  # perhaps in other containers, in another order
        own = [known[path] for path, _ in paths_and_leaves(updates)]
        return _in_dtype((), updates, jax.tree.unflatten(jax.tree.structure(updates), own)), state

    return transformation("match_parameter_dtype", init_fn, update_fn, growth=rounded_growth)


@by_leaf(like="u")
def _in_dtype(_: None, u: jax.Array, p: jax.Array) -> jax.Array:
    if not is_low_precision(p):
        return cast(u, p.dtype)
    wide = p.astype(jnp.float32)
    target = round_to_nearest(wide + u.astype(jnp.float32), p.dtype)
    # Sterbenz's lemma: the difference of two numbers within a factor of 2 of each other is exact.
    return (target - wide).astype(p.dtype)
