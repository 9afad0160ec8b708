"""The memory that a state needs, and converting a live state to other storage formats."""

from __future__ import annotations

import math
from typing import Any

import jax

from adaptive_optax._core.states import replace_states, states_of, unwrapped
from adaptive_optax._core.trees import OptState
from adaptive_optax._core.values import known_scalar
from adaptive_optax.moments.formats import as_storage, dense, encode_as
from adaptive_optax.moments.storage import Role, Storage
from adaptive_optax.transforms.adam import ScaleByAdamState, moments_of
from adaptive_optax.transforms.rms import ScaleByRmsState

_WITH_MOMENTS = (ScaleByAdamState, ScaleByRmsState)


def state_bytes(opt_state: OptState) -> int:
    """Counts the bytes of a state.

    Args:
        opt_state: Any tree of arrays: a state, a moment, parameters. Abstract arrays work too, so you need
            not create the state: `state_bytes(jax.eval_shape(tx.init, params))`.

    Returns:
        The bytes of all arrays, over all devices; a replicated array counts once.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> ao.state_bytes(ao.sgd(0.1, momentum=0.9).init(jnp.zeros((1000, 1000))))
        4000013
    """
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(opt_state))


def convert_storage(
    opt_state: OptState, *, mu_storage: Storage | str | None = None, nu_storage: Storage | str | None = None
) -> OptState:
    """Converts a live state to other storage formats, so that the run continues from the same point.

    It converts all states of `scale_by_adam` and `scale_by_rms`, at any depth. Build the transformation that
    continues the run with the same formats. (`scale_by_rms` has one `storage` for both moments, so pass the
    same format in both arguments.)

    Args:
        opt_state: The state of any transformation.
        mu_storage: The new format of the first moments: a `Storage`, "float32", "bfloat16" or "int8"; None
            keeps the old one.
        nu_storage: The new format of the second moments, with the same choices.

    Returns:
        The state as the transformation with these formats expects it. Values that the old format rounded stay
        rounded; second moments are raised to the minimum that the first moments imply.

    Raises:
        ValueError: If a format is unknown or cannot represent the changes of a moment at the state's decay,
            or `opt_state` contains no moment.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> params = jnp.zeros((64, 256))
        >>> state = ao.adam(1e-3).init(params)
        >>> smaller = ao.convert_storage(state, mu_storage="bfloat16", nu_storage="int8")
        >>> smaller = ao.adam(1e-3, mu_storage="bfloat16", nu_storage="int8").update(params, smaller)[1]
        >>> ao.state_bytes(state), ao.state_bytes(smaller)
        (131109, 49453)
    """
    if not states_of(_WITH_MOMENTS, opt_state):
        raise ValueError(
            "convert_storage: opt_state must hold a state of scale_by_adam or scale_by_rms, got a "
            f"{type(opt_state).__name__} without one."
        )
    return replace_states(_WITH_MOMENTS, opt_state, lambda state: _converted(state, mu_storage, nu_storage))


def _converted(state: Any, mu_storage: Any, nu_storage: Any) -> Any:
    if isinstance(state, ScaleByAdamState):
        mu, nu, nu_max = moments_of(state)
        decays = _known(b1=state.b1), _known(b2=state.b2)
    else:
        mu, nu, nu_max = dense(state.mu), dense(state.nu), None
        decays = (_known(decay=state.decay),) * 2
    converted = {}

    def convert(role: Role, given, decay, **moments):
        if given is None:
            return
        storage = as_storage(f"{role}_storage", given, **decay)
        for field, values in moments.items():
            if values is not None:
                moment = encode_as(storage, values, count=unwrapped(state.count), role=role)
                converted[field] = _wrapped_like(state.count, moment)

    convert("mu", mu_storage, decays[0], mu=mu)
    convert("nu", nu_storage, decays[1], nu=nu, nu_max=nu_max)
    return state._replace(**converted)


def _known(**scalars: Any) -> dict[str, float]:
    known = {name: known_scalar(value) for name, value in scalars.items()}
    return {name: value for name, value in known.items() if value is not None}


def _wrapped_like(scalar: Any, moment: Any) -> Any:
    """Wraps the arrays that a format adds in nnx Variables, if the state's scalars are in Variables."""
    if unwrapped(scalar) is scalar:
        return moment

    def is_wrapped(x):
        return unwrapped(x) is not x

    return jax.tree.map(lambda x: x if is_wrapped(x) else scalar.replace(x), moment, is_leaf=is_wrapped)
