"""RMSprop: the gradient divided by its moving root mean square, at any granularity.

Seen as an ODE solver for the gradient flow, RMSprop limits how far one Euler step moves: per coordinate, or,
with the global granularity, along the whole gradient, whose direction it then keeps. It bounds the
displacement of a step, not the solver's local error, which would need curvature.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from adaptive_optax._core.checks import check_bool, check_same_tree
from adaptive_optax._core.described import described
from adaptive_optax._core.entries import entry, stacked, with_entries
from adaptive_optax._core.foresight import ROUNDED, Magnitudes, holding, if_valid
from adaptive_optax._core.precision import (
    abs_square,
    as_wide_as,
    incremented,
    scalar_dtype,
    scale,
    scaled,
    widen,
)
from adaptive_optax._core.ranges import check_hyperparameter
from adaptive_optax._core.state_check import Settings, check_state
from adaptive_optax._core.states import carries_hyperparameters
from adaptive_optax._core.transformation import transformation
from adaptive_optax._core.trees import Count, Moment, Scalars, by_leaf
from adaptive_optax._core.values import as_hyperparameter, value_at
from adaptive_optax.moments.carried import MomentField, carries_moments
from adaptive_optax.moments.ema import Decay, decay_at, ema, ema_weight, kept, weight_error
from adaptive_optax.moments.formats import as_storage
from adaptive_optax.moments.granularity import Granularity, as_granularity
from adaptive_optax.moments.storage import Storage
from adaptive_optax.transforms.direction import Bound, lost_to_underflow, over_root, root_of

# A floor on the centred second moment, as a fraction of the plain one. A nearly constant gradient has almost
# no variance, and without a floor its direction would be unbounded.
_CENTERED_FLOOR = 0.01


@carries_moments(
    mu=MomentField("mu", decay="decay"),
    nu=MomentField("nu", weight="nu_weight", decay="decay"),
)
@carries_hyperparameters("decay", "eps")
@with_entries
class ScaleByRmsState(NamedTuple):
    """State of `scale_by_rms`.

    Attributes:
        count: Number of steps taken.
        mu: First moment, like the parameters, float32 or wider, or as stored by `storage`; None unless
            `centered`.
        nu: Second moment, one value per group, float32 or wider, or as stored by `storage`; if `centered`,
            the moment about `mu`.
        scalars: One array of the following, so that passing the state to a step is cheap.
        decay: The decay of the last step.
        eps: The eps of the last step.
        nu_weight: Sum of the weights in `nu`; 1 - decay^count for a constant decay.
    """

    count: Count
    mu: Moment | None
    nu: Moment
    scalars: Scalars

    decay = entry("scalars")  # type: jax.Array
    eps = entry("scalars")  # type: jax.Array
    nu_weight = entry("scalars")  # type: jax.Array


def scale_by_rms(
    decay: optax.ScalarOrSchedule = 0.9,
    eps: optax.ScalarOrSchedule = 1e-8,
    initial_scale: ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    *,
    centered: bool = False,
    granularity: Granularity | str = "coordinate",
    storage: Storage | str = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""Divides gradients by a moving root mean square of each group of coordinates.

    Use it as the adaptive part of a chain without a first moment. Per coordinate it equals optax's
    `scale_by_rms`; with `granularity="global"` it keeps the gradient's direction and adapts only its length.

    With groups $I_k$ of $n_k$ coordinates (each equation is one line of the code, in this order):

    $$
    \begin{aligned}
    q_{k,t} &= \tfrac{1}{n_k} \textstyle\sum_{i \in I_k} |g_{i,t}|^2 \\
    v_t &= \beta v_{t-1} + (1 - \beta) q_t, \qquad v_0 = \text{initial\_scale} \\
    r_t &= \sqrt{v_t + \epsilon} \quad\text{or}\quad \sqrt{v_t} + \epsilon \\
    u_t &= g_t / r_t
    \end{aligned}
    $$

    $g$ is `updates`, $\beta$ is `decay`, $v$ is `state.nu`. With `bias_correction`, $v$ is replaced by the
    weighted mean of $q_1 \dots q_t$, which excludes $v_0$: `initial_scale` then has no effect
    (optax divides it by $1-\beta^t$ as well, which is biased).

    With `centered`, v is the second moment about the moving mean m, in a form without cancellation:

    $$
    \delta_t = g_t - m_{t-1}, \quad m_t = m_{t-1} + (1-\beta) \delta_t, \quad
    s_t = \beta (s_{t-1} + (1-\beta) q(\delta_t)) = v_t - q(m_t)
    $$

    with a floor of $0.01 v$, which bounds the direction by $1/\sqrt{0.01 (1-\beta)}$. With both
    `centered` and `bias_correction`, `mu` and `nu` hold corrected values: $(1-\beta)$ becomes
    $(1-\beta)/w_t$ above.

    Args:
        decay: $\beta$ in [0, 1), or a schedule. 0.9 averages over about ten steps.
        eps: $\epsilon \ge 0$, in units of the squared gradient if `eps_in_sqrt`, else of the gradient;
            or a schedule.
        initial_scale: $v_0 \ge 0$, in units of the squared gradient.
        eps_in_sqrt: Whether to add eps inside the root (optax, TensorFlow) or outside it (PyTorch).
        bias_correction: Whether to divide by the sum of weights, so that the first steps are not longer.
        centered: Whether to use the second moment about the moving mean.
        granularity: Which coordinates share a second moment: a `Granularity`, "coordinate", "tensor" or
            "global".
        storage: The format of the moments between steps: a `Storage`, "float32", "bfloat16" or "int8".

    Returns:
        The transformation. `params`, if given, must match the updates.

    Raises:
        ValueError: If an argument is out of range (at construction), a leaf is not floating (at init), or the
            gradients' tree differs from that of the state or of `params` (at update). Without `params`, a
            wrong tree cannot be detected if several leaves share a moment.

    State cost: one float32 per group; `centered` adds one per coordinate.

    A gradient too large to be squared makes v infinite, and what shares it stops moving. A NaN stays in the
    moments and the updates. `reject_nonfinite` keeps both out.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp, optax
        >>> tx = optax.chain(ao.scale_by_rms(), ao.scale_by_learning_rate(0.1))
        >>> params = jnp.array([3.0, -2.0])
        >>> state = tx.init(params)
        >>> for _ in range(60):
        ...     updates, state = tx.update(2 * params, state)
        ...     params = optax.apply_updates(params, updates)
        >>> bool(jnp.abs(params).max() < 0.2)
        True

    Source: Hinton 2012, lecture 6e; Graves 2013, "Generating sequences with recurrent neural networks",
    equations 38-45 (centred). Bounds and the stable centred form are derived for this library.
    """
    decay, eps = as_hyperparameter("decay", decay), as_hyperparameter("eps", eps)
    check_hyperparameter("initial_scale", initial_scale)
    check_bool("eps_in_sqrt", eps_in_sqrt)
    check_bool("bias_correction", bias_correction)
    check_bool("centered", centered)
    granularity = as_granularity(granularity)
    storage = as_storage(storage, decay=decay)

    is_plain = storage.only_rounds and not centered

    def init_fn(params):
        dtype = scalar_dtype(params)
        count = jnp.zeros((), jnp.int32)
        nu = storage.init(granularity.template(params), "nu")
        if not bias_correction:
            start = jax.tree.map(lambda x: jnp.full_like(x, initial_scale), storage.decode(nu))
            nu = storage.encode(nu, start, count=count, role="nu")
        return ScaleByRmsState(
            count=count,
            mu=storage.init(params, "mu") if centered else None,
            nu=nu,
            scalars=stacked([value_at(decay, count, dtype), value_at(eps, count, dtype), 0], dtype),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is not None:
            check_same_tree("scale_by_rms", "updates", updates, "params", params, ordered=False)
        check_state("scale_by_rms", state, init_fn, "updates", updates, _SETTINGS)
        dtype = state.scalars.dtype
        b = decay_at(decay, state.count, dtype)
        eps_t = value_at(eps, state.count, dtype) if callable(eps) else eps
        count = incremented(state.count)
        nu_weight = ema_weight(state.nu_weight, b)
        eps_root, eps_outside = (eps_t, 0.0) if eps_in_sqrt else (0.0, eps_t)
        step = _Step(b, eps_outside, eps_root, 1 / nu_weight if bias_correction else 1.0)
        g, old_nu, mu = widen(updates), storage.decode(state.nu), None
        if centered:
            old_mu = storage.decode(state.mu)
            check_same_tree("scale_by_rms", "updates", g, "the state", old_mu)
            old_mu = as_wide_as(old_mu, g)
            if bias_correction:
                step = step._replace(decay=_corrected(b, state.nu_weight, nu_weight))
            delta, mu = _first_moment(step, g, old_mu)
            squares = granularity.pool(abs_square(delta))
            old_nu = as_wide_as(old_nu, squares)
            nu, root = _centered_second_moment(step, old_nu, squares, granularity.pool(abs_square(mu)))
        else:
            squares = granularity.pool(abs_square(g))
            check_same_tree("scale_by_rms", "updates", squares, "the state", old_nu)
            nu, root = _second_moment(step, old_nu, squares)
        direction = _direction(step, g, granularity.spread(root, g))
        new_mu = storage.encode(state.mu, mu, count=count, role="mu") if centered else None
        new_nu = storage.encode(state.nu, nu, count=count, role="nu")
        if is_plain:
            holding(new_nu)
        used = (value_at(x, state.count, dtype) for x in (b.keep, eps_t))
        return direction, ScaleByRmsState(
            count=count,
            mu=new_mu,
            nu=new_nu,
            scalars=stacked([*used, nu_weight], dtype),
        )

    def max_ratio(state):
        # q_t has weight 1 - decay in v_t, so |u|^2 <= 1 / (1 - decay); the floor on s adds a factor 1 / 0.01.
        dtype = state.scalars.dtype
        b = decay_at(decay, state.count - 1, dtype)
        plain = (state.nu_weight if bias_correction else 1.0) / b.take
        ratio = jnp.sqrt(plain / _CENTERED_FLOOR if centered else plain)
        return ratio * (1 + weight_error(b, dtype))

    is_known = is_plain and granularity.is_mean_or_sum
    growth = functools.partial(_growth, eps_in_sqrt) if is_known else None
    tx = transformation("scale_by_rms", init_fn, update_fn, growth=growth)
    return described(tx, Bound(granularity, max_ratio, {"nu": storage}))


_SETTINGS = {
    "mu": Settings(presence="centered", form="storage"),
    "nu": Settings(shape="granularity, or for other updates", form="storage"),
}


class _Step(NamedTuple):
    """The scalars of a step: the decay, eps outside and inside the root, and the factor of v."""

    decay: Decay
    eps: Any
    eps_root: Any
    nu_factor: Any


def _growth(eps_in_sqrt: bool, given: Magnitudes, state: ScaleByRmsState) -> tuple[jax.Array, jax.Array]:
    """Bounds on the direction and on v: it averages q, and (1 - decay) |g|^2 <= size v."""
    largest_q = given.size * jnp.square(given.updates)
    eps, eps_root = (0.0, state.eps) if eps_in_sqrt else (state.eps, 0.0)
    relative = jax.lax.rsqrt(1 - state.decay) * lost_to_underflow(state.decay, eps, eps_root)
    direction = ROUNDED * math.sqrt(given.size) * relative
    valid = (state.decay >= 0) & (state.decay < 1) & (state.eps >= 0)
    return if_valid(direction, valid), jnp.maximum(given.state, largest_q) * ROUNDED


@by_leaf(like=("nu", "squares"))
def _second_moment(step: _Step, nu: jax.Array, squares: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For one leaf of statistics: v_t and the root to divide by."""
    nu = ema(nu, squares, step.decay)
    return nu, root_of(scaled(nu, step.nu_factor), step.eps, step.eps_root)


@by_leaf(like=("g", "mu"))
def _first_moment(step: _Step, g: jax.Array, mu: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For one leaf: delta_t and m_t."""
    return g - mu, ema(mu, g, step.decay)


@by_leaf(like=("nu", "squares"))
def _centered_second_moment(
    step: _Step, nu: jax.Array, squares: jax.Array, mean_sq: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """For one leaf of statistics: s_t and the root to divide by, given q(delta_t) and q(m_t)."""
    nu = kept(nu + scale(squares, step.decay.take), step.decay)
    floored = jnp.maximum(nu, _CENTERED_FLOOR * (nu + mean_sq))
    return nu, root_of(floored, step.eps, step.eps_root)


@by_leaf(like="g")
def _direction(step: _Step, g: jax.Array, root: jax.Array) -> jax.Array:
    return over_root(g, root, step.eps, step.eps_root)


def _corrected(b: Decay, old_weight: jax.Array, new_weight: jax.Array) -> Decay:
    """The decay with which an average of bias-corrected values is itself bias-corrected."""
    return Decay(b.keep * old_weight / new_weight, b.take / new_weight)


def scale_by_global_rms(
    decay: optax.ScalarOrSchedule = 0.9,
    eps: optax.ScalarOrSchedule = 1e-8,
    initial_scale: ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    *,
    centered: bool = False,
    storage: Storage | str = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Divides gradients by the moving root mean square of the whole tree, keeping their direction.

    `scale_by_rms` with `granularity="global"`; see there for equations, arguments, returns and errors. Use
    `scale_by_rms(granularity=Global("sum"))` to divide by the plain norm.

    State cost: one float32.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.scale_by_global_rms()
        >>> gradient = jnp.array([3.0, -4.0])
        >>> direction, _ = tx.update(gradient, tx.init(gradient))
        >>> bool(jnp.allclose(direction / jnp.linalg.norm(direction), gradient / 5))
        True
    """
    return scale_by_rms(
        decay,
        eps,
        initial_scale,
        eps_in_sqrt,
        bias_correction,
        centered=centered,
        granularity="global",
        storage=storage,
    )
