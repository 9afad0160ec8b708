"""Gradient descent that finds its learning rate from two successive gradients, without a line search.

The change of the gradient along the last step measures the curvature, and with it the longest step that is
safe. Two rules are enough: do not grow too fast, and do not step further than the local curvature allows.
Malitsky and Mishchenko prove convergence for convex functions from them. Seen as an ODE solver this is a
control of the local error of Euler's method, where RMSprop limits the displacement.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from adaptive_optax._core.checks import check_choice, check_params, check_same_tree
from adaptive_optax._core.norms import root_of_squares
from adaptive_optax._core.overrides import assigned, filled_like
from adaptive_optax._core.precision import (
    abs_square,
    cast,
    incremented,
    scalar_dtype,
    scale,
    scaled,
    updated_param,
    wide_dtype,
    widen,
)
from adaptive_optax._core.ranges import check_hyperparameter, check_members
from adaptive_optax._core.state_check import check_state
from adaptive_optax._core.states import carries_hyperparameters
from adaptive_optax._core.transformation import transformation
from adaptive_optax._core.trees import Count, Params, Scalar, Updates, by_leaf
from adaptive_optax._core.values import as_hyperparameter, value_at

AdgdRule = Literal["2020", "2023"]
"""Which paper's learning rates `adgd` takes; those of 2023 are longer."""

# So far apart are two learning rates at most, as far as the control remembers; beyond, growth has no limit.
_LARGEST_RATIO = 1e30


def _set_learning_rate(state: Any, name: str, value: Any) -> Any:
    if value is None:  # the control has never been switched off
        return state
    check_members(name, value, state.learning_rate, "adgd")
    return state._replace(learning_rate=filled_like(state.learning_rate, value))


@carries_hyperparameters("learning_rate", set_value=_set_learning_rate)
class AdgdState(NamedTuple):
    """State of `adgd`.

    Attributes:
        count: Number of steps taken.
        learning_rate: The learning rate of the last step; before the first step, of the first. If you set it,
            the control goes on from the new value; None changes nothing.
        nonzero: The last learning rate that was not 0, from which the control goes on after a 0.
        ratio: The learning rate of the last step over the one before; the largest finite number of its dtype
            while growth has no limit.
        params: The parameters before the last step, float32 or wider; 0 before the first.
        gradient: The gradient of the last step, float32 or wider; 0 before the first.
    """

    count: Count
    learning_rate: Scalar
    nonzero: Scalar
    ratio: Scalar
    params: Params
    gradient: Updates


def adgd(
    max_learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    initial_learning_rate: ArrayLike = 1e-6,
    rule: AdgdRule = "2020",
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient descent with a learning rate from the curvature along the last step.

    Use it for smooth, deterministic functions: gradients of the whole data set, fits of few parameters,
    subproblems. It needs no rate, no line search and no values, and one gradient per step. With gradients of
    different batches the difference of two is mostly noise, and the learning rate falls towards 0.

    With $s = \theta_k - \theta_{k-1}$ and $y = g_k - g_{k-1}$ (norms are over the whole tree), the last
    learning rate $\lambda_{k-1}$ and the ratio of the last two $\rho_{k-1}$:

    $$
    \begin{aligned}
    L_k &= \lVert y \rVert / \lVert s \rVert \\
    \lambda_k &= \min\big( \sqrt{1 + \rho_{k-1}} \, \lambda_{k-1}, \; 1 / (2 L_k) \big)
        && \text{"2020"}, \; \rho_0 = \infty \\
    \lambda_k &= \min\big( \sqrt{2/3 + \rho_{k-1}} \, \lambda_{k-1}, \;
        \lambda_{k-1} / \sqrt{[2 \lambda_{k-1}^2 L_k^2 - 1]_+} \big) && \text{"2023"}, \; \rho_0 = 1/3 \\
    \rho_k &= \lambda_k / \lambda_{k-1} \\
    \Delta_k &= -\lambda_k g_k
    \end{aligned}
    $$

    $\lambda$ is `state.learning_rate`, $\rho$ is `state.ratio`. The second step of "2020" is as long as
    the curvature allows, whatever $\lambda_0$ is. A learning rate that goes on growing does so by a factor of
    1.618 per step in the end, in "2023" of 1.457.

    s is measured from the parameters, so links behind this one and parameters changed by hand are taken into
    account. Where it says nothing about the curvature, the papers say nothing either:

    * y = 0: the learning rate grows as fast as it may, by $\sqrt 2$ where growth has no limit.
    * s = 0, since the parameters' dtype rounds the whole last step away: the learning rate is doubled.
    * s = 0 for another reason, such as a zero gradient, or a norm that is not finite: it stays as it is.

    So a NaN passes into the update of its step; while it is in y, for one more step, the learning rate stays.
    A huge gradient makes it tiny, and it grows back by the factors above. `reject_nonfinite` keeps the first
    out, `clip_by_global_norm` in front of this the second.

    Args:
        max_learning_rate: An upper limit in [0, inf], or a schedule of the step count, which starts at 0. The
            control goes on from the learning rate that was taken. None for no limit.
        initial_learning_rate: $\lambda_0$ in (0, inf), less than the curvature allows. In float32 the
            gradient's change over a much shorter step than the default is lost in rounding. "2023" takes 39
            steps to grow by 1e6.
        rule: "2020" or "2023". On quadratics, a logistic regression and Rosenbrock's function "2023" needed
            a tenth fewer steps, after those in which it grows.

    Returns:
        The transformation; `update` needs `params`. The updates are those of a whole optimizer, with the sign
        of descent.

    Raises:
        ValueError: If an argument is out of range (at construction), a leaf is not floating (at init), or
            `params` is missing (at update).

    State cost: two float32 copies of the parameters, for the last parameters and gradient, and four scalars.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp, optax
        >>> curvature = jnp.array([1.0, 10.0])
        >>> tx, params = ao.adgd(), jnp.array([3.0, -2.0])
        >>> state = tx.init(params)
        >>> for _ in range(40):
        ...     updates, state = tx.update(curvature * params, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> bool(jnp.abs(params).max() < 1e-3), bool(ao.get_hyperparams(state)["learning_rate"] > 0.04)
        (True, True)

    Source: Malitsky and Mishchenko 2020, "Adaptive gradient descent without descent", algorithm 1, and 2024,
    "Adaptive proximal gradient method for convex optimization" (arXiv 2308.02261), algorithm 2, whose first
    step comes from a line search, which is left out here. Both rules and both $\rho_0$ were compared with
    the authors' published code.
    """
    if max_learning_rate is not None:
        max_learning_rate = as_hyperparameter("max_learning_rate", max_learning_rate)
    check_hyperparameter("initial_learning_rate", initial_learning_rate)
    check_choice("rule", rule, ("2020", "2023"))

    def capped(rate, count):
        if max_learning_rate is None:
            return rate
        return jnp.minimum(rate, value_at(max_learning_rate, count, rate.dtype))

    def init_fn(params):
        dtype = scalar_dtype(params)
        count = jnp.zeros((), jnp.int32)

        def initial():
            return value_at(initial_learning_rate, count, dtype)

        def zeros():
            return jax.tree.map(lambda x: jnp.zeros_like(x, wide_dtype(x)), params)

        return AdgdState(
            count=count,
            learning_rate=capped(initial(), count),
            nonzero=initial(),
            ratio=jnp.full((), jnp.finfo(dtype).max if rule == "2020" else 1 / 3, dtype),
            params=zeros(),
            gradient=zeros(),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_params("adgd", params)
        check_state("adgd", state, init_fn, "params", params)
        check_same_tree("adgd", "updates", updates, "the state", state.gradient)
        check_same_tree("adgd", "params", params, "the state", state.params)
        given = assigned("learning_rate", state.learning_rate, state.nonzero)
        last = jnp.where(given > 0, given, state.nonzero)
        s = cast(_distance(params, state.params), last.dtype)
        y = cast(_distance(updates, state.gradient), last.dtype)
        is_first = state.count == 0
        is_lost = jax.lax.cond(
            is_first | (s != 0), lambda: jnp.zeros((), jnp.bool_), lambda: _is_rounded_away(state, params)
        )
        is_seen = ~is_first & (s > 0) & jnp.isfinite(s) & jnp.isfinite(y)
        free = jnp.where(is_lost, _grown(last, 2.0), last)
        free = jnp.where(is_seen, _controlled(rule, last, state.ratio, s, y), free)
        taken = capped(free, state.count)
        new_ratio = taken / jnp.maximum(last, taken / _LARGEST_RATIO)
        state = AdgdState(
            count=incremented(state.count),
            learning_rate=taken,
            nonzero=jnp.where(taken > 0, taken, last),
            ratio=jnp.where(is_seen & (taken > 0), new_ratio, state.ratio),
            params=_copied(params, state.params),
            gradient=_copied(updates, state.gradient),
        )
        return scaled(widen(updates), -taken), state

    return transformation("adgd", init_fn, update_fn)


def _controlled(rule: AdgdRule, last: jax.Array, ratio: jax.Array, s: jax.Array, y: jax.Array) -> jax.Array:
    """The next learning rate, given the norms of s, which is not 0, and of y."""
    limits = jnp.finfo(last.dtype)
    largest = float(limits.max)
    inverse = jnp.minimum(s / jnp.where(y > 0, y, 1), largest / 2)  # 1 / L
    is_unlimited = ratio == largest
    growth = jnp.sqrt((1 if rule == "2020" else 2 / 3) + jnp.where(is_unlimited, 1, ratio))
    if rule == "2020":
        longest = inverse / 2
    else:
        # The bound of the paper is 1 / (L sqrt(2 - (1 / (L last))^2)), which nothing overflows in.
        is_bounded = inverse < math.sqrt(2) * last
        squared = jnp.square(jnp.where(is_bounded, inverse, 0) / last)
        longest = inverse / jnp.sqrt(jnp.maximum(2 - squared, float(limits.eps)))
        longest = jnp.where(is_bounded, longest, largest)
    grown = jnp.where(is_unlimited & (y > 0), largest, _grown(last, growth))
    # Never 0, from which nothing grows.
    return jnp.where(y > 0, jnp.maximum(jnp.minimum(grown, longest), float(limits.tiny)), grown)


def _grown(rate: jax.Array, factor: Any) -> jax.Array:
    """A learning rate times a factor, without overflow."""
    return jnp.minimum(rate, float(jnp.finfo(rate.dtype).max) / 2 / factor) * factor


def _distance(tree: Any, other: Any) -> jax.Array:
    """The norm of the difference of two trees, over the range of `global_norm`.

    The difference is taken where it is summed, so that no copy of the tree is made for it.
    """
    dtype = scalar_dtype((tree, other))
    pairs = [(x, y) for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True) if x.size]
    if not pairs:
        return jnp.zeros((), dtype)
    leaves, others = ([*column] for column in zip(*pairs, strict=True))

    def sum_of_squares(factor, arrays):
        return sum(_squared_distance((factor, dtype), *arrays), start=jnp.zeros((), dtype))

    return root_of_squares(sum_of_squares, (leaves, others), sum(x.size for x in leaves), dtype)


@by_leaf(like="x")
def _squared_distance(scalars: tuple[Any, Any], x: jax.Array, y: jax.Array) -> jax.Array:
    factor, dtype = scalars
    wide = np.promote_types(np.promote_types(x.dtype, y.dtype), dtype)
    return jnp.sum(abs_square(scaled(cast(x, wide) - cast(y, wide), factor))).astype(dtype)


def _is_rounded_away(state: AdgdState, params: Any) -> jax.Array:
    """Whether the last step was not 0, but too short for the dtypes of the parameters."""
    is_same, is_nonzero = _step_of((state.learning_rate,), params, state.gradient)
    is_lost = jnp.zeros((), jnp.bool_)
    for leaf in jax.tree.leaves(is_nonzero):
        is_lost |= leaf
    for leaf in jax.tree.leaves(is_same):
        is_lost &= leaf
    return is_lost


@by_leaf(like=("p", "p"))
def _step_of(scalars: tuple[Any], p: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For one leaf: whether the step leaves it as it is, and whether the step is not 0."""
    step = scale(g, -scalars[0])
    return jnp.all(updated_param(p, step) == p), jnp.any(step != 0)


def _copied(tree: Any, like: Any) -> Any:
    """Copies a tree in the dtypes and containers of another, so that both it and the state can be donated."""
    leaves, treedef = jax.tree.flatten(like)
    pairs = zip(jax.tree.leaves(tree), leaves, strict=True)
    return treedef.unflatten([jnp.array(x, y.dtype) for x, y in pairs])
