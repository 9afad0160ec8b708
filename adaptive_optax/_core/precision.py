"""The precision rule: arithmetic, moments and scalars are float32, or float64 for float64 parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def wide_dtype(x: Any) -> jnp.dtype:
    """Returns the dtype in which a leaf is computed: float32, float64, complex64 or complex128."""
    return np.promote_types(jnp.result_type(x), np.float32)  # jnp's function fails under strict promotion


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


def as_wide_as(tree: Any, like: Any) -> Any:
    """Casts every leaf up to the dtype of the matching leaf of `like` if that is wider.

    For example a moment to the dtype of the gradient.
    """
    leaves, treedef = jax.tree.flatten(tree)  # in the same order, perhaps in other containers
    pairs = zip(leaves, jax.tree.leaves(like), strict=True)
    return treedef.unflatten([cast(x, np.promote_types(x.dtype, y.dtype)) for x, y in pairs])


def cast(x: Any, dtype: Any) -> jax.Array:
    """Returns a strongly typed array of the given dtype: x itself, with nothing to trace, if it is one."""
    if isinstance(x, jax.Array) and x.dtype == dtype and not x.weak_type:
        return x
    return jnp.asarray(x, dtype)


def abs_square(tree: Any) -> Any:
    """Returns |x|^2, real and non-negative, in at least float32."""

    def leaf(x):
        x = cast(x, wide_dtype(x))
        return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)

    return jax.tree.map(leaf, tree)


def inner_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the real inner product of two arrays, in the dtype in which they are computed."""
    dtype = np.promote_types(wide_dtype(x), wide_dtype(y))
    x, y = cast(x, dtype), cast(y, dtype)
    return jnp.sum(x.real * y.real + x.imag * y.imag) if jnp.iscomplexobj(x) else jnp.sum(x * y)


def scale(x: jax.Array, factor: Any) -> jax.Array:
    """Returns x times a real factor, in the dtype of x."""
    if jnp.iscomplexobj(x):
        return jax.lax.complex(scale(x.real, factor), scale(x.imag, factor))
    return x * (factor if isinstance(factor, float) else cast(factor, x.dtype))


def scaled(tree: Any, factor: Any) -> Any:
    """Returns a tree times a real factor; the tree itself if the factor is the Python number 1.0."""
    if isinstance(factor, float) and factor == 1:
        return tree
    return jax.tree.map(lambda x: scale(x, factor), tree)


def updated_param(param: jax.Array, update: jax.Array) -> jax.Array:
    """Applies an update as `optax.apply_updates` does; a plain sum would fail under strict promotion."""
    wide = np.promote_types(param.dtype, update.dtype)
    return (param.astype(wide) + update.astype(wide)).astype(param.dtype)


def updated_params(params: Any, updates: Any) -> list[jax.Array]:
    """Returns the leaves of the parameters after an update."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(updates), strict=True)
    return [updated_param(p, u) for p, u in pairs]


def divide(x: jax.Array, divisor: jax.Array) -> jax.Array:
    """Returns x divided by a real number, in the dtype of x."""
    if jnp.iscomplexobj(x):
        return jax.lax.complex(divide(x.real, divisor), divide(x.imag, divisor))
    return x / cast(divisor, x.dtype)


def incremented(count: jax.Array) -> jax.Array:
    """Returns the next step count, int32, which saturates instead of wrapping around."""
    return jnp.asarray(optax.safe_increment(count))
