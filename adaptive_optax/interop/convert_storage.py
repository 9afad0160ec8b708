"""The memory that a state needs, and converting a live state to other storage formats."""

from __future__ import annotations

import math
from typing import Any

import jax

from adaptive_optax._core.states import replace_states, states_of, unwrapped
from adaptive_optax._core.trees import OptState
from adaptive_optax._core.values import known_scalar
from adaptive_optax.moments.carried import moments_declared_by, moments_of, types_with_moments
from adaptive_optax.moments.formats import as_storage, encode_as
from adaptive_optax.moments.storage import Role, Storage


def state_bytes(opt_state: OptState) -> int:
    """Counts the bytes of a state.

    Args:
        opt_state: Any tree of arrays: a state, a moment, parameters. Abstract arrays work too, so you need
            not create the state: `state_bytes(jax.eval_shape(tx.init, params))`.

    Returns:
        The bytes of all arrays, over all devices; a replicated array counts once.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> ao.state_bytes(ao.sgd(0.1, momentum=0.9).init(jnp.zeros((1000, 1000))))
        4000016
    """
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(opt_state))


def convert_storage(
    opt_state: OptState, *, mu_storage: Storage | str | None = None, nu_storage: Storage | str | None = None
) -> OptState:
    """Converts a live state to other storage formats, so that the run continues from the same point.

    It converts all states of `scale_by_adam` and `scale_by_rms`, and others that declare their moments
    (`carries_moments`), at any depth. Build the transformation that
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

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> params = jnp.zeros((64, 256))
        >>> state = ao.adam(1e-3).init(params)
        >>> smaller = ao.convert_storage(state, mu_storage="bfloat16", nu_storage="int8")
        >>> smaller = ao.adam(1e-3, mu_storage="bfloat16", nu_storage="int8").update(params, smaller)[1]
        >>> ao.state_bytes(state), ao.state_bytes(smaller)
        (131112, 50224)
    """
    kinds = types_with_moments()
    if not states_of(kinds, opt_state):
        raise ValueError(
            "convert_storage: opt_state must hold a state of scale_by_adam or scale_by_rms, got a "
            f"{type(opt_state).__name__} without one. Declare your own states with carries_moments."
        )
    storages: dict[Role, Storage | str | None] = {"mu": mu_storage, "nu": nu_storage}
    return replace_states(kinds, opt_state, lambda state: _converted(state, storages))


def _converted(state: Any, storages: dict[Role, Storage | str | None]) -> Any:
    moments, values = moments_declared_by(type(state)), moments_of(state)
    converted = {}
    for field, moment in moments.items():
        given = storages[moment.role]
        if given is None:
            continue
        decay = known_scalar(getattr(state, moment.decay)) if moment.decay else None
        decays = {} if decay is None else {moment.decay: decay}
        storage = as_storage(given, f"{moment.role}_storage", **decays)
        if values[field] is not None:
            new = encode_as(storage, values[field], count=unwrapped(state.count), role=moment.role)
            converted[field] = _wrapped_like(state.count, new)
    return state._replace(**converted)


def _wrapped_like(scalar: Any, moment: Any) -> Any:
    """Wraps the arrays that a format adds in nnx Variables, if the state's scalars are in Variables."""
    if unwrapped(scalar) is scalar:
        return moment

    def is_wrapped(x):
        return unwrapped(x) is not x

    return jax.tree.map(lambda x: x if is_wrapped(x) else scalar.replace(x), moment, is_leaf=is_wrapped)
