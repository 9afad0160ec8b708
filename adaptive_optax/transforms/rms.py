"""RMSprop: the gradient over a moving root mean square of itself, at any granularity.

Seen as an ODE solver for the gradient flow, RMSprop limits how far one Euler step moves: per coordinate, or,
with the global granularity, along the gradient as a whole, whose direction it then keeps. It bounds the
displacement of a step, not the solver's local error, which would need curvature.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from adaptive_optax._checks import check_bool, check_inexact, check_same_tree, check_scalar, check_state
from adaptive_optax._precision import abs_square, incremented, scalar_dtype, scale, scaled, value_at, widen
from adaptive_optax._trees import by_leaf
from adaptive_optax.moments.ema import Decay, decay_at, ema, ema_weight, weight_error
from adaptive_optax.moments.formats import as_storage
from adaptive_optax.moments.granularity import Granularity, as_granularity
from adaptive_optax.moments.storage import Storage
from adaptive_optax.transforms.direction import Bound, bounded, divide_by_root

# Of the centred second moment, as a fraction of the plain one: a nearly constant gradient has next to no
# variance, and without a floor its direction has no bound.
_CENTERED_FLOOR = 0.01


class ScaleByRmsState(NamedTuple):
    """State of `scale_by_rms`.

    Attributes:
        count: Number of steps taken, int32 scalar.
        mu: First moment, like the parameters, float32 at least; None unless `centered`.
        nu: Second moment, one value a group, float32 at least; `centered`: the moment about `mu`.
        decay: The decay of the last step, float32 scalar (float64 if a parameter is).
        eps: The eps of the last step, likewise.
        nu_weight: Sum of the weights in `nu`, 1 - decay^count for a constant decay, likewise.
    """

    count: jax.Array
    mu: Any
    nu: Any
    decay: jax.Array
    eps: jax.Array
    nu_weight: jax.Array

    hyperparameters = ("decay", "eps")  # not a field: it has no annotation


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

    Use it as the adaptive part of a chain when no first moment is wanted. Per coordinate it is optax's
    `scale_by_rms`; with `granularity="global"` it keeps the gradient's direction and adapts its length only.

    With groups :math:`I_k` of :math:`n_k` coordinates, in the order of the code:

    .. math::
        q_{k,t} &= \tfrac{1}{n_k} \textstyle\sum_{i \in I_k} |g_{i,t}|^2 \\
        v_t &= \beta v_{t-1} + (1 - \beta) q_t, \qquad v_0 = \text{initial\_scale} \\
        u_t &= g_t / \sqrt{v_t + \epsilon} \quad\text{or}\quad g_t / (\sqrt{v_t} + \epsilon)

    g is `updates`, :math:`\beta` is `decay`, v is `state.nu`. With `bias_correction`, v is replaced by the
    weighted mean of :math:`q_1 \dots q_t`, in which :math:`v_0` has no part: `initial_scale` then has no
    effect (optax divides it by :math:`1-\beta^t` too, which is biased).

    With `centered`, v is the second moment about the moving mean m, in a form without cancellation:

    .. math::
        \delta_t = g_t - m_{t-1}, \quad m_t = m_{t-1} + (1-\beta) \delta_t, \quad
        s_t = \beta (s_{t-1} + (1-\beta) q(\delta_t)) = v_t - q(m_t)

    floored at 0.01 v, which bounds the direction by :math:`1/\sqrt{0.01 (1-\beta)}`. With `bias_correction`
    too, `mu` and `nu` hold corrected values: :math:`(1-\beta)` becomes :math:`(1-\beta)/w_t` above.

    Args:
        decay: :math:`\beta` in [0, 1), or a schedule. 0.9 averages over about ten steps.
        eps: :math:`\epsilon \ge 0`, in units of the squared gradient if `eps_in_sqrt`, else of the gradient;
            or a schedule.
        initial_scale: :math:`v_0 \ge 0`, in units of the squared gradient.
        eps_in_sqrt: Whether eps stands under the root (optax, TensorFlow) or beside it (PyTorch).
        bias_correction: Whether to divide by the weights' sum, so that the first steps are not longer.
        centered: Whether to take the second moment about the moving mean.
        granularity: Which coordinates share a second moment: a `Granularity`, "coordinate", "tensor" or
            "global".
        storage: The format of the moments between steps: a `Storage`, "float32", "bfloat16" or "int8".

    Numbers may be JAX scalars or tracers; a tracer's range cannot be checked.

    Returns:
        The transformation. `update(updates, state)` returns float32 (or wider) directions; `params`, where
        given, must be like the updates, and extra arguments are ignored.

    Raises:
        ValueError: If an argument is out of range (at construction), a leaf is not floating (at init) or the
            gradients' tree is not that of the state or of `params` (at update). Without `params`, moments
            that several leaves share do not show a wrong tree.

    State cost: one float32 a group; `centered` adds one a coordinate.

    Valid for gradients of 0 and of 1e-17 to 1e18 (to 1e15 where coordinates share a moment); smaller ones
    count as 0 in v. A larger one makes the state non-finite, for good.

    Example:
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
    check_scalar("decay", decay, "[0, 1)", schedule=True)
    check_scalar("eps", eps, "[0, inf)", schedule=True)
    check_scalar("initial_scale", initial_scale, "[0, inf)")
    check_bool("eps_in_sqrt", eps_in_sqrt)
    check_bool("bias_correction", bias_correction)
    check_bool("centered", centered)
    granularity = as_granularity(granularity)
    storage = as_storage("storage", storage, decay=decay)

    def init_fn(params):
        check_inexact("scale_by_rms", "params", params)
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
            decay=value_at(decay, count, dtype),
            eps=value_at(eps, count, dtype),
            nu_weight=jnp.zeros((), dtype),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_state("scale_by_rms", state, ScaleByRmsState)
        check_inexact("scale_by_rms", "updates", updates)
        if params is not None:
            check_same_tree("scale_by_rms", "updates", updates, "params", params, ordered=False)
        dtype = state.nu_weight.dtype
        b = decay_at(decay, state.count, dtype)
        eps_t = value_at(eps, state.count, dtype) if callable(eps) else eps
        count = incremented(state.count)
        nu_weight = ema_weight(state.nu_weight, b)
        eps_root, eps_beside = (eps_t, 0.0) if eps_in_sqrt else (0.0, eps_t)
        g, old_nu = widen(updates), storage.decode(state.nu)
        if centered:
            old_mu = storage.decode(state.mu)
            check_same_tree("scale_by_rms", "updates", g, "the state", old_mu)
            if bias_correction:
                b = _corrected(b, state.nu_weight, nu_weight)
            delta = jax.tree.map(lambda g, m: g - m, g, old_mu)
            mu = ema(old_mu, g, b)
            nu = jax.tree.map(
                lambda s, q: scale(s + scale(q, b.take), b.keep), old_nu, granularity.pool(abs_square(delta))
            )
            floor = granularity.pool(abs_square(mu))
            second = jax.tree.map(lambda s, m2: jnp.maximum(s, _CENTERED_FLOOR * (s + m2)), nu, floor)
            direction = divide_by_root(g, second, granularity, eps=eps_beside, eps_root=eps_root)
        else:
            mu = None
            squares = granularity.pool(abs_square(g))
            check_same_tree("scale_by_rms", "updates", squares, "the state", old_nu)
            move = _move_by_leaf if granularity.per_leaf else _move
            nu_factor = 1 / nu_weight if bias_correction else 1.0
            step = _Step(b, eps_beside, eps_root, nu_factor, granularity)
            direction, nu = move(step, g, old_nu, squares)
        return direction, ScaleByRmsState(
            count=count,
            mu=storage.encode(state.mu, mu, count=count, role="mu") if centered else None,
            nu=storage.encode(state.nu, nu, count=count, role="nu"),
            decay=value_at(decay, state.count, dtype),
            eps=value_at(eps, state.count, dtype),
            nu_weight=nu_weight,
        )

    def max_ratio(state):
        # q_t enters v_t with weight 1 - decay, so |u|^2 <= 1 / (1 - decay); the floor on s costs 1 / 0.01.
        dtype = state.nu_weight.dtype
        b = decay_at(decay, state.count - 1, dtype)
        plain = (state.nu_weight if bias_correction else 1.0) / b.take
        ratio = jnp.sqrt(plain / _CENTERED_FLOOR if centered else plain)
        return ratio * (1 + weight_error(b, dtype))

    return bounded(init_fn, update_fn, Bound(granularity, max_ratio, {"nu": storage}))


class _Step(NamedTuple):
    """What a step needs beside trees: the decay, eps beside and under the root, v's factor, the groups."""

    decay: Decay
    eps: Any
    eps_root: Any
    nu_factor: Any
    granularity: Granularity


def _move(step: _Step, g: Any, nu: Any, squares: Any) -> tuple[Any, Any]:
    """Returns the direction and the new moment; of trees, or of leaves where none share a moment."""
    nu = ema(nu, squares, step.decay)
    second = scaled(nu, step.nu_factor)
    return divide_by_root(g, second, step.granularity, eps=step.eps, eps_root=step.eps_root), nu


_move_by_leaf = by_leaf(results=2)(_move)


def _corrected(b: Decay, old_weight: jax.Array, new_weight: jax.Array) -> Decay:
    """The decay with which an average of corrected values is itself corrected."""
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

    `scale_by_rms` with `granularity="global"`; its equations, arguments, returns and errors are there. Use
    `scale_by_rms(granularity=Global("sum"))` to divide by the plain norm.

    State cost: one float32.

    Example:
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
