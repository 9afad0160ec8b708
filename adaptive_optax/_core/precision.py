"""The precision rule: arithmetic, moments and scalars are float32, or float64 where the parameters are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer


def wide_dtype(x: Any) -> jnp.dtype:
    """Returns the dtype in which a leaf is computed: float32, float64, complex64 or complex128."""
    return np.promote_types(jnp.result_type(x), np.float32)  # not jnp's, which strict promotion forbids


def real_dtype(x: Any) -> jnp.dtype:
    """Returns the dtype of a leaf's magnitude, float32 or float64."""
    return jnp.finfo(wide_dtype(x)).dtype


def scalar_dtype(tree: Any) -> jnp.dtype:
    """Returns the dtype of the scalars that go with a tree: float64 if any leaf is, else float32."""
    dtype = jnp.dtype(jnp.float32)
    for leaf in jax.tree.leaves(tree):
        dtype = np.promote_types(dtype, real_dtype(leaf))
    return dtype


def widen(tree: Any) -> Any:
    """Casts every leaf to the dtype in which it is computed."""
    return jax.tree.map(lambda x: cast(x, wide_dtype(x)), tree)


def cast(x: Any, dtype: Any) -> jax.Array:
    """Returns an array in the given dtype, strongly typed; itself, at no cost to tracing, if it is that."""
    if isinstance(x, jax.Array) and x.dtype == dtype and not x.weak_type:
        return x
    return jnp.asarray(x, dtype)


def abs_square(tree: Any) -> Any:
    """Returns |x|^2, real and non-negative, in float32 at least."""

    def leaf(x):
        x = cast(x, wide_dtype(x))
        return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)

    return jax.tree.map(leaf, tree)


def scale(x: jax.Array, factor: Any) -> jax.Array:
    """Returns x times a real factor, in the dtype of x."""
    if jnp.iscomplexobj(x):
        return jax.lax.complex(scale(x.real, factor), scale(x.imag, factor))
    return x * (factor if isinstance(factor, float) else cast(factor, x.dtype))


def scaled(tree: Any, factor: Any) -> Any:
    """Returns a tree times a real factor; the tree itself where the factor is known to be 1."""
    if isinstance(factor, float) and factor == 1:
        return tree
    return jax.tree.map(lambda x: scale(x, factor), tree)


def moved(param: jax.Array, update: jax.Array) -> jax.Array:
    """Returns what `optax.apply_updates` makes of a parameter; strict promotion forbids the bare sum."""
    wide = np.promote_types(param.dtype, update.dtype)
    return (param.astype(wide) + update.astype(wide)).astype(param.dtype)


def divide(x: jax.Array, divisor: jax.Array) -> jax.Array:
    """Returns x over a real divisor, in the dtype of x."""
    if jnp.iscomplexobj(x):
        return jax.lax.complex(divide(x.real, divisor), divide(x.imag, divisor))
    return x / cast(divisor, x.dtype)


def concrete(value: Any) -> float | None:
    """Returns a hyperparameter's value where it is known now, None for a schedule or a tracer."""
    if callable(value) or isinstance(value, Tracer):
        return None
    return float(value)


def value_at(hyperparameter: Any, count: jax.Array, dtype: Any) -> jax.Array:
    """Evaluates a number, an array or a schedule at a step count, as a strongly typed scalar.

    Raises:
        ValueError: If a schedule returns something else than a scalar.
    """
    value: Any = hyperparameter(count) if callable(hyperparameter) else hyperparameter
    if value is None or (value.ndim if isinstance(value, jax.Array) else np.ndim(value)):
        raise ValueError(f"A schedule must return a scalar, got {value!r} from {hyperparameter!r}.")
    known = concrete(value)
    # Through a Python float, so that a NumPy float64 is rounded once and no weak type gets through; a copy,
    # so that a state which is donated does not take the caller's array with it.
    return jnp.array(value if known is None else known, dtype)


def incremented(count: jax.Array) -> jax.Array:
    """Returns the next step count, int32, which stays at its largest value rather than wrap round."""
    return jnp.asarray(optax.safe_increment(count))
