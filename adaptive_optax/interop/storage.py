"""The memory that a state takes, and the move of a live state to other formats."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from adaptive_optax._precision import abs_square, scale
from adaptive_optax._states import replace_states, states_of, unwrapped
from adaptive_optax.moments.formats import as_storage, dense, known_scalar, recoded
from adaptive_optax.moments.storage import Role, Storage
from adaptive_optax.transforms.adam import ScaleByAdamState
from adaptive_optax.transforms.rms import ScaleByRmsState

_WITH_MOMENTS = (ScaleByAdamState, ScaleByRmsState)


def state_bytes(opt_state: Any) -> int:
    """Counts the bytes that a state holds.

    Args:
        opt_state: Any tree of arrays: a state, a moment, parameters; abstract arrays too, so that a state
            need not be made: `state_bytes(jax.eval_shape(tx.init, params))`.

    Returns:
        The bytes of all arrays, over all devices, a replicated one once.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> ao.state_bytes(ao.sgd(0.1, momentum=0.9).init(jnp.zeros((1000, 1000))))
        4000020
    """
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(opt_state))


def convert_storage(
    opt_state: Any, *, mu_storage: Storage | str | None = None, nu_storage: Storage | str | None = None
) -> Any:
    """Moves a live state to other formats: the run goes on from where it is.

    All states of `scale_by_adam` and `scale_by_rms` in it are moved, at any depth. Build the transformation
    that goes on with the same formats (of `scale_by_rms`, whose one `storage` is that of both moments, with
    both arguments alike).

    Args:
        opt_state: The state of any transformation.
        mu_storage: The format of the first moments from now on: a `Storage`, "float32", "bfloat16" or "int8";
            None leaves them.
        nu_storage: That of the second moments.

    Returns:
        The state, as the transformation with these formats would have it. Values that the old format rounded
        stay rounded; what a second moment must be at least, given the first, it is.

    Raises:
        ValueError: If a format is unknown or stands still at the state's decay, or there is no moment in
            `opt_state`.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> params = jnp.zeros((64, 256))
        >>> state = ao.adam(1e-3).init(params)
        >>> smaller = ao.convert_storage(state, mu_storage="bfloat16", nu_storage="int8")
        >>> smaller = ao.adam(1e-3, mu_storage="bfloat16", nu_storage="int8").update(params, smaller)[1]
        >>> ao.state_bytes(state), ao.state_bytes(smaller)
        (131112, 49456)
    """
    if not states_of(_WITH_MOMENTS, opt_state):
        raise ValueError(
            "convert_storage: opt_state must hold a state of scale_by_adam or scale_by_rms, got a "
            f"{type(opt_state).__name__} without one."
        )
    return replace_states(_WITH_MOMENTS, opt_state, lambda state: _moved(state, mu_storage, nu_storage))


def _moved(state: Any, mu_storage: Any, nu_storage: Any) -> Any:
    mu, nu, nu_max = dense(state.mu), dense(state.nu), None
    if isinstance(state, ScaleByAdamState):
        nu_max = dense(state.nu_max)
        if _is_rounded(state.mu) or _is_rounded(state.nu):
            nu = _raised(nu, mu, unwrapped(state.bound_sq))
        decays = _known(b1=state.b1), _known(b2=state.b2)
    else:
        decays = (_known(decay=state.decay),) * 2
    moved = {}

    def move(role: Role, given, decay, **moments):
        if given is None:
            return
        storage = as_storage(f"{role}_storage", given, **decay)
        for field, values in moments.items():
            if values is not None:
                moment = recoded(storage, values, count=unwrapped(state.count), role=role)
                moved[field] = _wrapped_like(state.count, moment)

    move("mu", mu_storage, decays[0], mu=mu)
    move("nu", nu_storage, decays[1], nu=nu, nu_max=nu_max)
    return state._replace(**moved)


def _known(**scalars: Any) -> dict[str, float]:
    known = {name: known_scalar(value) for name, value in scalars.items()}
    return {name: value for name, value in known.items() if value is not None}


def _wrapped_like(scalar: Any, moment: Any) -> Any:
    """Wraps the arrays that a format adds as nnx has wrapped the state's scalars, if it has."""
    if unwrapped(scalar) is scalar:
        return moment

    def is_wrapped(x):
        return unwrapped(x) is not x

    wrap = type(scalar)
    return jax.tree.map(lambda x: x if is_wrapped(x) else wrap(x), moment, is_leaf=is_wrapped)


def _is_rounded(moment: Any) -> bool:
    return any(x.dtype.itemsize < 4 for x in jax.tree.leaves(moment))


def _raised(nu: Any, mu: Any, bound_sq: jax.Array) -> Any:
    """Raises second moments to |m|^2 / bound_sq, as decoding a lossy format does; those per coordinate."""
    if jax.tree.structure(nu) != jax.tree.structure(mu):  # shared by several leaves
        return nu
    inverse = jnp.where(bound_sq > 0, 1 / bound_sq, 0)

    def leaf(v, m2):
        return jnp.maximum(v, scale(m2, inverse)) if v.shape == m2.shape else v

    return jax.tree.map(leaf, nu, abs_square(mu))
