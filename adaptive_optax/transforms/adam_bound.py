r"""The tight bound on Adam's direction, and the lower bound on v that keeps it after rounding.

By the Cauchy-Schwarz inequality |m_t|^2 <= A_t^2 v_t, where A_t^2 = sum_j c_j^2 / d_j for the coefficients
c_j and d_j of the gradient of step j in m_t and v_t. A_t^2 follows the recursion of `next_bound_sq` for any
sequence of decays, and is in the state as `bound_sq`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from adaptive_optax._core.checks import check_bool, check_integer
from adaptive_optax._core.precision import scale
from adaptive_optax._core.ranges import check_hyperparameter
from adaptive_optax._core.values import static_value
from adaptive_optax.moments.ema import Decay


def next_bound_sq(bound_sq: jax.Array, d1: Decay, d2: Decay) -> jax.Array:
    """A_t^2 = (b1^2 / b2) A_{t-1}^2 + (1 - b1)^2 / (1 - b2), with 0 / 0 = 0, clipped to a finite number."""
    dtype = bound_sq.dtype
    keep1, take1, keep2, take2 = (jnp.asarray(x, dtype) for d in (d1, d2) for x in (d.keep, d.take))
    older = jnp.where(bound_sq * keep1 == 0, 0, keep1**2 / keep2 * bound_sq)
    return jnp.minimum(older + take1**2 / take2, jnp.finfo(dtype).max)


def corrected_bound_sq(bound_sq: jax.Array, mu_weight: Any, nu_weight: Any) -> jax.Array:
    """Returns B_t^2 = A_t^2 w_2 / w_1^2, the square of the bound on m-hat / sqrt(v-hat)."""
    return bound_sq / mu_weight**2 * nu_weight


def least_nu(pooled_mu: Any, bound_sq: jax.Array) -> Any:
    """Returns pool(|m|^2) / A^2, a lower bound on v before it is rounded (Cauchy-Schwarz)."""
    is_bounded = bound_sq > 0
    inverse = jnp.where(is_bounded, 1 / jnp.where(is_bounded, bound_sq, 1), 0)
    return jax.tree.map(lambda m2: scale(m2, inverse), pooled_mu)


def scalars_after(steps: int, b1: float, b2: float) -> dict[str, float]:
    """Returns the sums of weights and the bound of a state after `steps` steps with constant decays."""
    largest = float(jnp.finfo(jnp.float32).max)
    bound = adam_bound(b1, b2, steps, bias_correction=False) if steps else 0.0
    return {"mu_weight": 1 - b1**steps, "nu_weight": 1 - b2**steps, "bound_sq": min(bound**2, largest)}


def adam_bound(b1: float, b2: float, count: int | None = None, *, bias_correction: bool = True) -> float:
    r"""Returns the largest magnitude that a coordinate of Adam's direction can have.

    Gradients that grow by $\beta_2/\beta_1$ per step attain the bound. It holds for `scale_by_adam`
    without `nesterov`, with any eps and with or without `amsgrad`. For coarser granularities it bounds the
    root mean square of the direction over a group (its norm with `reduce="sum"`).

    $$
    A_t^2 = \frac{(1-\beta_1)^2}{1-\beta_2} \sum_{j<t} (\beta_1^2/\beta_2)^j, \qquad
    B_t = A_t \sqrt{1-\beta_2^t} / (1-\beta_1^t)
    $$

    Args:
        b1: $\beta_1$ in [0, 1).
        b2: $\beta_2$ in [0, 1).
        count: The number of steps t >= 1, or None for the limit.
        bias_correction: Whether to return $B_t$, or $A_t$ for the uncorrected direction.

    Returns:
        The bound, at least 1 in the limit; inf if `count` is None and b1^2 >= b2 (and b1 > 0).

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> import adaptive_optax as ao
        >>> round(ao.adam_bound(0.9, 0.999), 4), round(ao.adam_bound(0.9, 0.999, 1), 4)
        (7.2703, 1.0)

    Source: derived for this library with the Cauchy-Schwarz inequality.
    """
    check_hyperparameter("b1", b1)
    check_hyperparameter("b2", b2)
    check_bool("bias_correction", bias_correction)
    for name, decay in (("b1", b1), ("b2", b2)):
        if static_value(decay) is None:
            raise ValueError(f"{name} must be concrete in adam_bound, got a tracer; the state has bound_sq.")
    b1, b2 = float(b1), float(b2)
    if count is None:
        if b1 == 0:
            return 1 / math.sqrt(1 - b2)
        return (1 - b1) * math.sqrt(b2 / ((1 - b2) * (b2 - b1**2))) if b1**2 < b2 else math.inf
    check_integer("count", count, "[1, inf)")
    if b1 == 0 or count == 1:
        total = 1.0
    elif b2 == 0:
        return math.inf
    else:
        rho = b1**2 / b2
        try:
            total = float(count) if rho == 1 else math.expm1(count * math.log(rho)) / (rho - 1)
        except OverflowError:
            return math.inf
    bound = (1 - b1) * math.sqrt(total / (1 - b2))
    return bound * math.sqrt(1 - b2**count) / (1 - b1**count) if bias_correction else bound
