"""The global norm, right over float32's range, and clipping by it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from adaptive_optax._checks import check_inexact, check_scalar
from adaptive_optax._precision import abs_square, scalar_dtype, scaled, value_at, widen
from adaptive_optax._trees import by_leaf


def global_norm(tree: Any) -> jax.Array:
    r"""Returns the Euclidean norm of all coordinates of a tree.

    :math:`\sqrt{\sum_i |x_i|^2}`, computed in float32 whatever the leaves are (float64 if a leaf is). Where a
    plain sum of squares overflows or loses digits to underflow, it is taken again of coordinates scaled by a
    power of two. Right for |x| from 1e-30 to 1e30; inf and NaN propagate.

    Args:
        tree: Floating or complex leaves, any shapes and dtypes.

    Returns:
        A float32 (float64) scalar, 0 for an empty tree.

    Raises:
        ValueError: If a leaf is neither floating nor complex.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> norm = ao.global_norm({"a": jnp.array([3e20]), "b": jnp.array([4e20])})
        >>> f"{norm:.5g}"
        '5e+20'
    """
    check_inexact("global_norm", "tree", tree)
    dtype = scalar_dtype(tree)
    # Squared in the sum's dtype: a float32 leaf beside a float64 one has its range.
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree) if jnp.size(x)]
    leaves = [x.astype(np.promote_types(x.dtype, dtype)) for x in leaves]
    if not leaves:
        return jnp.zeros((), dtype)

    def sum_of_squares(factor):
        (sums,) = _sum_of_squares((factor, dtype), leaves)
        return sum(sums, start=jnp.zeros((), dtype))

    # Squares below the smallest normal number are flushed to 0. Together they are less than the rounding
    # error of any sum above `lowest`; below it, and at overflow, the sum is taken again of scaled values.
    limits = jnp.finfo(dtype)
    lowest = float(limits.tiny) / float(limits.eps) * sum(x.size for x in leaves)
    shift = 2.0**80 if dtype == jnp.float32 else 2.0**600
    plain = sum_of_squares(1.0)

    def scaled_norm():
        factor = jnp.where(plain < lowest, jnp.asarray(shift, dtype), jnp.asarray(1 / shift, dtype))
        return jnp.sqrt(sum_of_squares(factor)) / factor

    fits = (plain >= lowest) & (plain < jnp.inf)
    return jax.lax.cond(fits | jnp.isnan(plain), lambda: jnp.sqrt(plain), scaled_norm)


@by_leaf(results=1)
def _sum_of_squares(scalars: tuple[Any, Any], x: jax.Array) -> tuple[jax.Array]:
    factor, dtype = scalars
    return (jnp.sum(abs_square(scaled(x, factor))).astype(dtype),)


def clip_by_global_norm(max_norm: ArrayLike) -> optax.GradientTransformationExtraArgs:
    r"""Scales updates down so that their global norm is at most `max_norm`.

    The first link of a chain, where single batches give gradients much longer than usual.
    :math:`u = g \min(1, \text{max\_norm} / \lVert g \rVert)`, one multiplication a coordinate. If the norm is
    not finite the updates are returned as they are, so that the bad coordinates can still be found.

    Args:
        max_norm: The largest norm, in (0, inf]; a number, a JAX scalar or a tracer (not checked).

    Returns:
        The transformation. It has no state, returns float32 (or wider) updates and ignores `params` and
        extra arguments.

    Raises:
        ValueError: If `max_norm` is out of range (at construction) or a leaf is not floating.

    State cost: none.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.clip_by_global_norm(1.0)
        >>> updates, _ = tx.update(jnp.array([3e20, 4e20]), tx.init(jnp.zeros(2)))
        >>> bool(jnp.allclose(updates, jnp.array([0.6, 0.8])))
        True

    Source: Pascanu, Mikolov and Bengio 2013, "On the difficulty of training recurrent neural networks",
    algorithm 1.
    """
    check_scalar("max_norm", max_norm, "(0, inf]")

    def init_fn(params):
        check_inexact("clip_by_global_norm", "params", params)
        return optax.EmptyState()

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        check_inexact("clip_by_global_norm", "updates", updates)
        norm = global_norm(updates)
        limit = value_at(max_norm, jnp.zeros((), jnp.int32), norm.dtype)
        factor = jnp.where(jnp.isfinite(norm), jnp.minimum(1, limit / norm), 1)
        return scaled(widen(updates), factor), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
