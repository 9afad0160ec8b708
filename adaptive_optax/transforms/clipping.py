"""The global norm, accurate over float32's range, and clipping by it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from adaptive_optax._core.checks import check_inexact
from adaptive_optax._core.foresight import Magnitudes, if_valid
from adaptive_optax._core.norms import root_of_squares
from adaptive_optax._core.precision import abs_square, scalar_dtype, scaled, widen
from adaptive_optax._core.ranges import check_hyperparameter
from adaptive_optax._core.transformation import transformation
from adaptive_optax._core.trees import PyTree, Scalar, by_leaf
from adaptive_optax._core.values import value_at


def global_norm(tree: PyTree) -> Scalar:
    r"""Returns the Euclidean norm of all coordinates of a tree.

    $\sqrt{\sum_i |x_i|^2}$, computed in float32 for any dtypes (float64 if a leaf is). If the plain sum
    of squares overflows or loses digits to underflow, it is recomputed with coordinates scaled by a power of
    two. Accurate for |x| from 1e-30 to 1e30; inf and NaN propagate.

    Args:
        tree: Floating or complex leaves of any shapes and dtypes.

    Returns:
        A float32 (float64) scalar, 0 for an empty tree.

    Raises:
        ValueError: If a leaf is neither floating nor complex.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> norm = ao.global_norm({"a": jnp.array([3e20]), "b": jnp.array([4e20])})
        >>> f"{norm:.5g}"
        '5e+20'
    """
    check_inexact("global_norm", "tree", tree)
    dtype = scalar_dtype(tree)
    # Squared in the sum's dtype, so that float32 leaves next to float64 ones have the larger range.
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree) if jnp.size(x)]
    leaves = [x.astype(np.promote_types(x.dtype, dtype)) for x in leaves]
    if not leaves:
        return jnp.zeros((), dtype)

    def sum_of_squares(factor, leaves):
        return sum(_sum_of_squares((factor, dtype), leaves), start=jnp.zeros((), dtype))

    return root_of_squares(sum_of_squares, leaves, sum(x.size for x in leaves), dtype)


@by_leaf(like="x")
def _sum_of_squares(scalars: tuple[Any, Any], x: jax.Array) -> jax.Array:
    factor, dtype = scalars
    return jnp.sum(abs_square(scaled(x, factor))).astype(dtype)


def clip_by_global_norm(max_norm: ArrayLike) -> optax.GradientTransformationExtraArgs:
    r"""Scales updates down so that their global norm is at most `max_norm`.

    Put it first in a chain if single batches give gradients much longer than usual.
    $u = g \min(1, \text{max\_norm} / \lVert g \rVert)$, one multiplication per coordinate. If the norm
    is not finite, the updates are returned unchanged, so that the bad coordinates can still be found; nothing
    of them is kept.

    The norm includes all gradients in the tree. Exclude parameters that are not trained by wrapping the chain
    in `freeze`. A group with `optax.set_to_zero` after the clipping still counts: its gradients, which may
    grow without bound, would shrink all updates.

    Args:
        max_norm: The largest norm, in (0, inf].

    Returns:
        The transformation, which ignores `params`.

    Raises:
        ValueError: If `max_norm` is out of range (at construction) or a leaf is not floating.

    State cost: none.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.clip_by_global_norm(1.0)
        >>> updates, _ = tx.update(jnp.array([3e20, 4e20]), tx.init(jnp.zeros(2)))
        >>> bool(jnp.allclose(updates, jnp.array([0.6, 0.8])))
        True

    Source: Pascanu, Mikolov and Bengio 2013, "On the difficulty of training recurrent neural networks",
    algorithm 1.
    """
    check_hyperparameter("max_norm", max_norm)

    def init_fn(params):
        return optax.EmptyState()

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        norm = global_norm(updates)
        limit = value_at(max_norm, jnp.zeros((), jnp.int32), norm.dtype)
        factor = jnp.where(jnp.isfinite(norm) & (norm > limit), limit / jnp.where(norm > 0, norm, 1), 1)
        return scaled(widen(updates), factor), state

    return transformation(
        "clip_by_global_norm", init_fn, update_fn, growth=functools.partial(_growth, max_norm)
    )


def _growth(max_norm: Any, given: Magnitudes, state: Any) -> tuple[jax.Array, jax.Array]:
    del state
    return if_valid(given.updates, jnp.asarray(max_norm) >= 0), given.state
