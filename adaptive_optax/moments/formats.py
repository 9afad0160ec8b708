"""All storage formats: resolving `storage=`, `mu_storage=` and `nu_storage=`, and decoding moments."""

from __future__ import annotations

from typing import Any

import jax

from adaptive_optax._core.precision import wide_dtype, widen
from adaptive_optax._core.trees import Moment, PyTree
from adaptive_optax._core.values import static_value
from adaptive_optax.moments.bfloat16 import BFloat16
from adaptive_optax.moments.int8 import Int8
from adaptive_optax.moments.storage import (
    CompressedMoment,
    Float32,
    NearestCast,
    Role,
    Storage,
    cast_like,
    check_storage,
)

_BY_NAME = {"float32": Float32(), "bfloat16": BFloat16(), "int8": Int8()}

# The formats that the tests of this library pass through `check_storage`. It computes on the device, for up
# to a second, which building an optimizer should not do without need. Subclasses are checked.
CHECKED = (Float32, NearestCast, BFloat16, Int8)


def as_storage(value: Storage | str, name: str = "storage", **decays: Any) -> Storage:
    """Returns the storage that a user gave as an argument of a transformation, after checks.

    Args:
        value: A `Storage`, "float32", "bfloat16" or "int8".
        name: The name of the argument, for errors.
        **decays: The decay of the moment to store, a number or a schedule, keyed by the name of its argument.

    Returns:
        The storage.

    Raises:
        ValueError: If the value is not a storage, breaks the interface of one, or cannot represent the
            changes of a moment with this decay.

    Examples:
        >>> import adaptive_optax as ao
        >>> ao.as_storage("bfloat16", decay=0.9)
        BFloat16(rounding='stochastic')
    """
    if isinstance(value, str) and value in _BY_NAME:
        value = _BY_NAME[value]
    if not isinstance(value, Storage):
        known = ", ".join(map(repr, _BY_NAME))
        raise ValueError(
            f"{name} must be Float32(), BFloat16(...), Int8(...) or one of {known}, got {value!r}."
        )
    if type(value) not in CHECKED:
        check_storage(name, value)
    for argument, decay in decays.items():
        known = static_value(decay)
        if known is not None and known > value.largest_decay:
            raise ValueError(
                f"{argument} must be at most {value.largest_decay} with {name}={value}, got {decay!r}: "
                f"reducing a value by {1 - known:.2g} of itself rounds back to the same value, so the "
                'moment never decays. BFloat16(rounding="stochastic") has no such limit.'
            )
    return value


def is_rounded(moment: PyTree) -> bool:
    """Whether a moment is kept in fewer bits than it is computed with: compressed, or in a narrower dtype."""
    return isinstance(moment, CompressedMoment) or any(
        x.dtype != wide_dtype(x) for x in jax.tree.leaves(moment)
    )


def encode_like(moment: PyTree, values: PyTree, *, count: jax.Array, role: Role) -> Any:
    """Encodes a tree of values in the format of a moment."""
    if isinstance(moment, CompressedMoment):
        return moment.encode_like(values, count=count, role=role)
    return cast_like(moment, values)


def encode_as(storage: Storage, values: PyTree, *, count: jax.Array, role: Role) -> Any:
    """Encodes a tree of values as a new moment in a storage format."""
    return storage.encode(storage.init(values, role), values, count=count, role=role)


def dense(moment: Moment) -> PyTree:
    """Decodes a moment to a tree of float32 arrays, whatever its storage.

    Use it to inspect the `mu` or `nu` of a state, or to compute with it outside a transformation.

    Args:
        moment: A moment in any storage, or any tree of arrays. It may be traced.

    Returns:
        The values, float32 (float64 or complex if the moment is); None for None.

    Raises:
        ValueError: If an `Int8` moment was written by a version whose maps this version does not know.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.scale_by_adam(nu_storage=ao.Int8(min_size=1))
        >>> _, state = tx.update(jnp.full(64, 2.0), tx.init(jnp.zeros(64)))
        >>> state.nu.codes.dtype, bool(jnp.allclose(ao.dense(state.nu), 0.004, rtol=1e-2))
        (dtype('uint8'), True)
    """
    return moment.decoded() if isinstance(moment, CompressedMoment) else widen(moment)


def with_values(state: PyTree) -> Any:
    """Returns a state whose compressed moments are replaced by their values.

    A code is an integer, which cannot show that the value it stands for is not finite.
    """

    def is_compressed(node):
        return isinstance(node, CompressedMoment)

    return jax.tree.map(lambda x: x.decoded() if is_compressed(x) else x, state, is_leaf=is_compressed)
