"""What the adaptive transformations share: numerator over root second moment, and how long that can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptive_optax._precision import concrete, divide
from adaptive_optax.moments.granularity import Granularity
from adaptive_optax.moments.storage import Storage


def divide_by_root(numerator: Any, second: Any, granularity: Granularity, *, eps: Any, eps_root: Any) -> Any:
    """Returns numerator / (sqrt(second + eps_root) + eps); `second` has a value a group, which is spread.

    Where the divisor is 0 the result is 0: with eps = 0, a coordinate whose gradient was 0 so far does not
    move. A NaN stays a NaN.
    """
    tiny = float(jnp.finfo(jnp.float32).tiny)
    positive = any((concrete(e) or 0.0) > tiny for e in (eps, eps_root))

    def quotient(x, divisor):
        ratio = divide(x, divisor)
        return ratio if positive else jnp.where(divisor == 0, jnp.zeros_like(ratio), ratio)

    divisors = jax.tree.map(lambda v: _plus(jnp.sqrt(_plus(v, eps_root)), eps), second)
    return jax.tree.map(quotient, numerator, granularity.spread(divisors, numerator))


def _plus(x: jax.Array, value: Any) -> jax.Array:
    return x if concrete(value) == 0 else x + jnp.asarray(value, x.dtype)


class Bound(NamedTuple):
    """The invariant of a direction u: pool(|u|^2) <= max_ratio(state)^2 in every group.

    Attributes:
        granularity: The groups.
        max_ratio: Returns the bound, a scalar, from the state that the update returned.
        storages: The storage of each second moment in the state, by field.
    """

    granularity: Granularity
    max_ratio: Callable[[Any], jax.Array]
    storages: dict[str, Storage]


def bounded(
    init_fn: Callable[..., Any], update_fn: Callable[..., Any], bound: Bound
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation that `bound_of` knows the bound of."""
    # On the function, which survives copies, `_replace` and a pass through a tree; a subclass would not.
    vars(update_fn)["bound"] = bound
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def bound_of(tx: optax.GradientTransformation) -> Bound | None:
    """Returns the bound of a transformation that was made with `bounded`."""
    return getattr(tx.update, "bound", None)
