"""Shared by the adaptive transformations: the division by the root second moment, and its bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptive_optax._core.described import description_of
from adaptive_optax._core.precision import divide
from adaptive_optax._core.values import static_value
from adaptive_optax.moments.granularity import Granularity
from adaptive_optax.moments.storage import Storage


def root_of(second: jax.Array, eps: Any, eps_root: Any) -> jax.Array:
    """Returns sqrt(second + eps_root) + eps, the divisor of a direction."""
    return _plus(jnp.sqrt(_plus(second, eps_root)), eps)


def over_root(numerator: jax.Array, root: jax.Array, eps: Any, eps_root: Any) -> jax.Array:
    """Returns numerator / root, where `root` is the broadcast result of `root_of`.

    Where the root is 0 the result is 0: with eps = 0, a coordinate whose gradients were all 0 does not move.
    A NaN stays a NaN.
    """
    tiny = float(jnp.finfo(jnp.float32).tiny)
    if any((static_value(e) or 0.0) > tiny for e in (eps, eps_root)):
        return divide(numerator, root)
    is_zero = root == 0
    ratio = divide(numerator, jnp.where(is_zero, jnp.ones_like(root), root))
    return jnp.where(is_zero, jnp.zeros_like(ratio), ratio)


def _plus(x: jax.Array, value: Any) -> jax.Array:
    return x if static_value(value) == 0 else x + jnp.asarray(value, x.dtype)


def lost_to_underflow(decay: jax.Array, eps: Any, eps_root: Any) -> jax.Array:
    """Bounds what second moments that are flushed to 0 add to a direction, as a factor of its bound.

    An average of squares loses less than tiny / (1 - decay), so the bound times the root of that is missing
    in the numerator's bound. The root to divide by is at least that of tiny, or what the eps make it; with
    neither the direction is 0.
    """
    tiny = float(jnp.finfo(jnp.float32).tiny)
    least = jnp.asarray(eps, decay.dtype) + jnp.sqrt(jnp.asarray(eps_root, decay.dtype))
    root = jnp.where(least > 0, jnp.minimum(least, tiny**0.5), tiny**0.5)
    return 1 + (2 * tiny) ** 0.5 * jax.lax.rsqrt(1 - decay) / root


class Bound(NamedTuple):
    """The invariant of a direction u: pool(|u|^2) <= max_ratio(state)^2 in every group.

    Attributes:
        granularity: The groups.
        max_ratio: Returns the bound, a scalar, given the state returned by `update`.
        storages: The storage of each second moment in the state, keyed by field.
    """

    granularity: Granularity
    max_ratio: Callable[[Any], jax.Array]
    storages: dict[str, Storage]


def bound_of(tx: optax.GradientTransformation) -> Bound | None:
    """Returns the bound that describes a transformation's update, or None."""
    return description_of(Bound, tx)
