"""All formats: what the arguments `storage=`, `mu_storage=` and `nu_storage=` mean, and how to read one."""

from __future__ import annotations

from typing import Any

import jax

from adaptive_optax._precision import concrete, widen
from adaptive_optax._states import unwrapped
from adaptive_optax.moments.bfloat16 import BFloat16
from adaptive_optax.moments.int8 import FORMAT, Int8, Int8Moment, decoded
from adaptive_optax.moments.storage import Float32, Role, Storage, cast_like

_BY_NAME = {"float32": Float32(), "bfloat16": BFloat16(), "int8": Int8()}


def as_storage(name: str, value: Storage | str, **decays: Any) -> Storage:
    """Returns the storage that the argument called `name` means.

    Args:
        name: For the message.
        value: What the user gave.
        **decays: The decay of the moment that is stored, by the name of its argument.

    Raises:
        ValueError: If the value is no storage, or one in which a moment with this decay stands still.
    """
    if isinstance(value, str) and value in _BY_NAME:
        value = _BY_NAME[value]
    if not isinstance(value, Storage):
        known = ", ".join(map(repr, _BY_NAME))
        raise ValueError(
            f"{name} must be Float32(), BFloat16(...), Int8(...) or one of {known}, got {value!r}."
        )
    for argument, decay in decays.items():
        known = concrete(decay)
        if known is not None and known > value.largest_decay:
            raise ValueError(
                f"{argument} must be at most {value.largest_decay} with {name}={value}, got {decay!r}: "
                f"a step that takes {1 - known:.2g} of a value off it rounds back to that value, so the "
                'moment never decays. BFloat16(rounding="stochastic") has no such limit.'
            )
    return value


def refilled(moment: Any, values: Any, *, count: jax.Array, role: Role) -> Any:
    """Returns a tree of values in the format that a moment of this library has."""
    if isinstance(moment, Int8Moment):
        storage = Int8(int(unwrapped(moment.block_size)))
        return storage.encode(moment, values, count=count, role=role)
    return cast_like(moment, values)


def dense(moment: Any) -> Any:
    """Returns a moment as a tree of float32 arrays, whatever it is kept in.

    To look at the `mu` or `nu` of a state, or to compute with it outside a transformation.

    Args:
        moment: A moment of this library, in any storage, or any tree of arrays. It may be traced.

    Returns:
        The values: float32, float64 and complex where the moment is; None for None.

    Raises:
        ValueError: If an `Int8` moment was written by a version whose maps are not known here.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.scale_by_adam(nu_storage=ao.Int8(min_size=1))
        >>> _, state = tx.update(jnp.full(64, 2.0), tx.init(jnp.zeros(64)))
        >>> state.nu.codes.dtype, bool(jnp.allclose(ao.dense(state.nu), 0.004))
        (dtype('uint8'), True)
    """
    if not isinstance(moment, Int8Moment):
        return widen(moment)
    known, size = map(known_scalar, (moment.format, moment.block_size))
    if known is not None and known != FORMAT:
        raise ValueError(f"moment must be an Int8Moment of format {FORMAT}, got format {int(known)}.")
    return decoded(moment, unwrapped(moment.block_size) if size is None else int(size))


def known_scalar(x: Any) -> float | None:
    """Returns the value of a state's scalar, None where it is traced or abstract."""
    x = unwrapped(x)
    return None if isinstance(x, jax.ShapeDtypeStruct) else concrete(x)


def recoded(storage: Storage, values: Any, *, count: jax.Array, role: Role) -> Any:
    """Returns a tree of values as a moment in a format."""
    return storage.encode(storage.init(values, role), values, count=count, role=role)
