"""What the transformations for bfloat16 and float16 parameters share.

`optax.apply_updates` adds in float32 and rounds to the nearest value of the parameter's dtype. In bfloat16,
with 8 bits, a step of less than 1/512 of a parameter has no effect: 1.0 plus a thousand times 0.001 stays
1.0. `stochastic_rounding`, `kahan_summation` and `master_weights` compute the new parameter q themselves,
round it each in its own way, and return q - p as the update, so that applying it gives exactly q.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adaptive_optax._core.foresight import ROUNDED, Magnitudes
from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax._core.random_bits import is_low_precision


def in_float32(p: jax.Array) -> jax.Array:
    return p.astype(jnp.float32)


def rounded_growth(given: Magnitudes, state: Any) -> tuple[jax.Array, jax.Array]:
    """Bounds an update that leads to a sum rounded to the parameter's dtype; the state has no arrays."""
    return ROUNDED * given.updates + (ROUNDED - 1) * given.params, given.state


def update_to_reach(p: jax.Array, target: jax.Array) -> jax.Array:
    """The float32 update for which p + update rounds to `target`, a value of p's dtype.

    target - p is exact if the two have similar magnitudes. If target is much larger, its relative error of
    2^-24 is far below half a unit of p's dtype. If it is much smaller, it is a sum of float32 numbers as
    large as p, hence a multiple of their unit, and the difference is exact again.
    """
    return target - in_float32(p)


def for_low_precision(owner: str, params: Any, f: Callable[[jax.Array], jax.Array]) -> Any:
    """Returns what is kept for each parameter: `f` of it if it has 16 bits, else a scalar 0 of its dtype."""
    check_low_precision(owner, params)
    return jax.tree.map(lambda p: f(p) if is_low_precision(p) else jnp.zeros((), p.dtype), params)


def check_still_low(owner: str, params: Any, kept: Any) -> None:
    """Raises if parameters had 16 bits when the state was made, and a sum without a cast has widened them.

    `kept` is what `for_low_precision` made. If it was made in float32 for a scalar, this cannot be seen.
    """
    low = {path for path, x in paths_and_leaves(kept) if jnp.ndim(x) or is_low_precision(jnp.asarray(x))}
    for path, p in paths_and_leaves(params):
        if path in low and not is_low_precision(p):
            raise ValueError(
                f"{owner}: {path!r} is {p.dtype} but had 16 bits when the state was made. Was the update "
                "added without a cast, as in equinox.apply_updates? Use optax.apply_updates, or end the "
                "chain with match_parameter_dtype."
            )


def check_low_precision(owner: str, params: Any) -> None:
    for path, p in paths_and_leaves(params):
        if is_low_precision(p) and jnp.finfo(p.dtype).bits < 16:
            raise ValueError(f"{owner}: {path!r} must be bfloat16, float16 or wider, got {p.dtype}.")
