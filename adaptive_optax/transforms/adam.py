"""Adam: a moving mean of the gradient divided by its moving root mean square, at any granularity."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any, Literal, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from adaptive_optax._core.checks import check_bool, check_choice, check_real, check_same_tree
from adaptive_optax._core.described import described
from adaptive_optax._core.entries import entry, stacked, with_entries
from adaptive_optax._core.foresight import ROUNDED, Magnitudes, holding, if_accepted, if_valid
from adaptive_optax._core.precision import (
    abs_square,
    as_wide_as,
    cast,
    incremented,
    scalar_dtype,
    scale,
    scaled,
    widen,
)
from adaptive_optax._core.ranges import check_hyperparameter
from adaptive_optax._core.state_check import Settings, check_state
from adaptive_optax._core.states import carries_hyperparameters, unwrapped
from adaptive_optax._core.transformation import transformation
from adaptive_optax._core.trees import Count, Moment, PyTree, Scalars, by_leaf
from adaptive_optax._core.values import as_hyperparameter, static_value, value_at
from adaptive_optax.moments.carried import MomentField, Values, carries_moments, moments_of
from adaptive_optax.moments.ema import Decay, decay_at, ema, ema_weight, weight_error
from adaptive_optax.moments.formats import as_storage
from adaptive_optax.moments.granularity import (
    Granularity,
    as_granularity,
    is_own_statistic,
    mean_over_groups,
)
from adaptive_optax.moments.storage import Storage, as_nearest
from adaptive_optax.transforms.adam_bound import corrected_bound_sq, least_nu, next_bound_sq
from adaptive_optax.transforms.direction import Bound, lost_to_underflow, over_root, root_of


def _raise_nu(state: Any, values: Values) -> Values:
    """Raises second moments to `least_nu`, as decoding a lossy format does, if shapes reveal the groups."""
    mu, nu, bound_sq = values["mu"], values["nu"], unwrapped(state.bound_sq)
    if jax.tree.structure(nu) != jax.tree.structure(mu):  # shared by several leaves
        return values

    def raised(v, m, bound_sq):
        if not is_own_statistic(v.shape, m.shape):
            return v
        return jnp.maximum(v, least_nu(mean_over_groups(abs_square(m), v.shape), bound_sq))

    new = {"nu": jax.tree.map(lambda v, m: raised(v, m, bound_sq), nu, mu)}
    if values["nu_max"] is not None:  # the largest corrected one
        weight = unwrapped(state.nu_weight)
        of_corrected = bound_sq * jnp.where(weight > 0, weight, 1)
        new["nu_max"] = jax.tree.map(lambda v, m: raised(v, m, of_corrected), values["nu_max"], mu)
    return values | new


@carries_moments(
    _raise_nu,
    mu=MomentField("mu", weight="mu_weight", decay="b1"),
    nu=MomentField("nu", weight="nu_weight", decay="b2"),
    nu_max=MomentField("nu", decay="b2"),
)
@carries_hyperparameters("b1", "b2", "eps")
@with_entries
class ScaleByAdamState(NamedTuple):
    """State of `scale_by_adam`.

    Attributes:
        count: Number of steps taken.
        mu: First moment m, like the parameters, float32 or wider, or as stored by `mu_storage`.
        nu: Second moment v, one value per group, float32 or wider, or as stored by `nu_storage`.
        nu_max: Largest second moment so far, like `nu`; None unless `amsgrad`.
        scalars: One array of the following, so that passing the state to a step is cheap.
        b1: The decay of `mu` in the last step.
        b2: The decay of `nu` in the last step.
        eps: The eps of the last step.
        mu_weight: Sum of the weights in `mu`, 1 - b1^count for a constant b1.
        nu_weight: Sum of the weights in `nu`.
        bound_sq: The square of the tight bound on |m| / sqrt(v), for the decays used so far and the rounding
            of the stored moments.
    """

    count: Count
    mu: Moment
    nu: Moment
    nu_max: Moment | None
    scalars: Scalars

    b1 = entry("scalars")  # type: jax.Array
    b2 = entry("scalars")  # type: jax.Array
    eps = entry("scalars")  # type: jax.Array
    mu_weight = entry("scalars")  # type: jax.Array
    nu_weight = entry("scalars")  # type: jax.Array
    bound_sq = entry("scalars")  # type: jax.Array


EpsForm = Literal["paper", "tensorflow"]
"""Where Adam adds eps; see `scale_by_adam`."""


class AdamVariants(TypedDict, total=False):
    """The keywords of `scale_by_adam`, for optimizers that forward them."""

    eps_form: EpsForm
    nesterov: bool
    amsgrad: bool
    bias_correction: bool
    granularity: Granularity | str
    mu_storage: Storage | str
    nu_storage: Storage | str


def scale_by_adam(
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: optax.ScalarOrSchedule = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    eps_form: EpsForm = "paper",
    nesterov: bool = False,
    amsgrad: bool = False,
    bias_correction: bool = True,
    granularity: Granularity | str = "coordinate",
    mu_storage: Storage | str = "float32",
    nu_storage: Storage | str = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales gradients to Adam's direction.

    Use it as the adaptive part of a chain. With a coarser `granularity` the second moment needs almost no
    memory; `"global"` gives momentum with a single adaptive step size.

    With groups $I_k$ of $n_k$ coordinates (each is one line of the code, in this order):

    $$
    \begin{aligned}
    w_{i,t} &= \beta_i w_{i,t-1} + (1 - \beta_i) \\
    q_t &= \tfrac{1}{n_k} \textstyle\sum_{i \in I_k} |g_{i,t}|^2 \\
    v_t &= \beta_2 v_{t-1} + (1 - \beta_2) q_t \\
    \hat v_t &= v_t / w_{2,t} \\
    r_t &= \sqrt{\hat v_t + \epsilon_r} + \epsilon \\
    m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
    \hat m_t &= m_t / w_{1,t} \\
    u_t &= \hat m_t / r_t
    \end{aligned}
    $$

    $g$ is `updates`; $m$, $v$, $w_1$, $w_2$ are the state's `mu`, `nu`, `mu_weight`, `nu_weight`;
    $\epsilon_r$ is `eps_root`. The sums of weights follow the same recursion as the averages, so the
    bias correction is exact when `b1` or `b2` changes; for constants it is $1 - \beta^t$.

    Variants:
        * `eps_form="tensorflow"`: $(\sqrt{w_2} / w_1)\, m / (\sqrt{v + \epsilon_r} + \epsilon)$, the
          "epsilon hat" of Kingma and Ba's section 2, as in TensorFlow and Keras (where eps is 1e-7).
        * `nesterov`: $\beta_1 m_t / w_{1,t+1} + (1 - \beta_1) g_t / w_{1,t}$ in place of
          $\hat m_t$, as in optax. PyTorch's NAdam also moves $\beta_1$.
        * `amsgrad`: the largest $\hat v$ so far in place of $\hat v$ (the largest $v$ where $v$ is
          not corrected: without `bias_correction`, and in the "tensorflow" form), as in optax. PyTorch takes
          the largest v and corrects it afterwards.

    The length of the direction has a tight bound, `adam_bound`: for the defaults it tends to 7.27, not 1.

    Args:
        b1: $\beta_1$ in [0, 1), or a schedule. 0.9 averages over about ten steps.
        b2: $\beta_2$ in [0, 1), or a schedule. 0.999 averages over about a thousand steps.
        eps: $\epsilon \ge 0$, in units of the gradient, or a schedule.
        eps_root: $\epsilon_r \ge 0$, in units of the squared gradient; needed to differentiate
            through a step with v = 0.
        mu_dtype: As in optax, the dtype in which m is stored, rounded to nearest. None uses `mu_storage`.
            Moments of complex parameters keep their complex dtype in any case; complex64 means float32 for
            real parameters.
        eps_form: `"paper"` or `"tensorflow"`.
        nesterov: Whether to use Nesterov momentum (Dozat 2016).
        amsgrad: Whether to use the maximum of v so far (Reddi et al. 2018).
        bias_correction: Whether to divide by the sums of weights.
        granularity: Which coordinates share a second moment: a `Granularity`, "coordinate", "tensor" or
            "global".
        mu_storage: The format of m between steps: a `Storage`, "float32", "bfloat16" or "int8".
        nu_storage: The format of v between steps, with the same choices.

    Returns:
        The transformation, which ignores `params`.

    Raises:
        ValueError: If an argument is out of range or both `mu_dtype` and `mu_storage` are given (at
            construction), a leaf is not floating (at init), or the gradients' tree differs from the state's
            (at update).

    Warns:
        UserWarning: If b1^2 >= b2, because then the direction has no bound.

    State cost: two float32 copies of the parameters; with a coarser granularity, one copy plus one value per
    group.

    A gradient too large to be squared makes v infinite, and what shares it stops moving. A NaN stays in the
    moments and the updates. `reject_nonfinite` keeps both out.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp, optax
        >>> tx = optax.chain(ao.scale_by_adam(), ao.scale_by_learning_rate(0.1))
        >>> params = jnp.array([3.0, -2.0])
        >>> state = tx.init(params)
        >>> for _ in range(100):
        ...     updates, state = tx.update(2 * params, state)
        ...     params = optax.apply_updates(params, updates)
        >>> bool(jnp.abs(params).max() < 0.3)
        True

    Source: Kingma and Ba 2015, "Adam", algorithm 1; Dozat 2016; Reddi, Kale and Kumar 2018, algorithm 2.
    The bound is derived for this library; the one in Kingma and Ba's section 2.1 does not hold.
    """
    b1, b2 = as_hyperparameter("b1", b1), as_hyperparameter("b2", b2)
    eps = as_hyperparameter("eps", eps)
    check_hyperparameter("eps_root", eps_root)
    check_choice("eps_form", eps_form, ("paper", "tensorflow"))
    check_bool("nesterov", nesterov)
    check_bool("amsgrad", amsgrad)
    check_bool("bias_correction", bias_correction)
    granularity = as_granularity(granularity)
    if mu_dtype is not None and mu_storage != "float32":
        raise ValueError(f"Give mu_dtype or mu_storage, not both, got {mu_dtype!r} and {mu_storage!r}.")
    if mu_dtype is None:
        mu_storage = as_storage(mu_storage, "mu_storage", b1=b1)
    else:
        mu_storage = as_storage(as_nearest("mu_dtype", mu_dtype), "mu_dtype", b1=b1)
    nu_storage = as_storage(nu_storage, "nu_storage", b2=b2)
    known_b1, known_b2 = static_value(b1), static_value(b2)
    if known_b1 is not None and known_b2 is not None and 0 < known_b1 and known_b1**2 >= known_b2:
        warnings.warn(f"b1**2 >= b2 ({b1}**2 >= {b2}): Adam's direction has no bound.", stacklevel=2)
    corrects_nu = bias_correction and eps_form == "paper"
    # How much rounding can lengthen the direction. If that is unbounded, a floor on nu restores the bound.
    errors = mu_storage.relative_error, nu_storage.relative_error
    needs_floor = math.inf in errors
    stretch = 1.0 if needs_floor else (1 + errors[0]) ** 2 / (1 - errors[1])
    only_rounds = not needs_floor and mu_storage.only_rounds and nu_storage.only_rounds

    def init_fn(params):
        dtype = scalar_dtype(params)
        count = jnp.zeros((), jnp.int32)
        template = granularity.template(params)
        return ScaleByAdamState(
            count=count,
            mu=mu_storage.init(params, "mu"),
            nu=nu_storage.init(template, "nu"),
            nu_max=nu_storage.init(template, "nu") if amsgrad else None,
            scalars=stacked([*(value_at(x, count, dtype) for x in (b1, b2, eps)), 0, 0, 0], dtype),
        )

    def numerator_factors(d1, mu_weight):
        """The factors of m and g in the numerator; None for no g."""
        if not nesterov:
            return (1 / mu_weight if bias_correction else 1.0), None
        if not bias_correction:
            return d1.keep, d1.take
        return d1.keep / ema_weight(mu_weight, d1), d1.take / mu_weight

    def decoded_nu(state, old_mu):
        """The second moment, raised to its lower bound where a format may have rounded it to less."""

        def smallest():
            stored = jax.eval_shape(nu_storage.decode, state.nu)
            least = least_nu(granularity.pool(abs_square(old_mu)), state.bound_sq)
            return jax.tree.map(lambda low, v: cast(low, v.dtype), least, stored)

        nu = nu_storage.decode(state.nu, lower=smallest)
        if needs_floor and nu_storage.relative_error < math.inf:
            nu = jax.tree.map(jnp.maximum, nu, smallest())
        return nu

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        check_state("scale_by_adam", state, init_fn, "updates", updates, _SETTINGS)
        dtype = state.scalars.dtype
        d1, d2 = decay_at(b1, state.count, dtype), decay_at(b2, state.count, dtype)
        count = incremented(state.count)
        mu_weight, nu_weight = ema_weight(state.mu_weight, d1), ema_weight(state.nu_weight, d2)  # w
        mu_factor, g_factor = numerator_factors(d1, mu_weight)
        step = _Step(
            d1=d1,
            d2=d2,
            eps=value_at(eps, state.count, dtype) if callable(eps) else eps,
            eps_root=eps_root,
            mu_factor=mu_factor,
            g_factor=g_factor,
            nu_factor=1 / nu_weight if corrects_nu else 1.0,
            direction_factor=jnp.sqrt(nu_weight) if bias_correction and not corrects_nu else 1.0,
        )

        g = widen(updates)
        old_mu = mu_storage.decode(state.mu)
        check_same_tree("scale_by_adam", "updates", g, "the state", old_mu)
        check_real("scale_by_adam", "updates", g, "the state", old_mu)
        old_mu = as_wide_as(old_mu, g)
        old_nu = decoded_nu(state, old_mu)
        squares = granularity.pool(abs_square(g))  # q
        old_max = as_wide_as(nu_storage.decode(state.nu_max), squares) if amsgrad else None
        nu, nu_max, root = _second_moment(step, old_nu, old_max, squares)  # v, r
        mu, direction = _direction(step, old_mu, g, granularity.spread(root, g))  # m, u

        new_mu = mu_storage.encode(state.mu, mu, count=count, role="mu")
        new_nu = nu_storage.encode(state.nu, nu, count=count, role="nu")
        new_max = nu_storage.encode(state.nu_max, nu_max, count=count, role="nu") if amsgrad else None
        if only_rounds:
            holding((new_mu, new_nu, new_max))
        used = (value_at(x, state.count, dtype) for x in (d1.keep, d2.keep, step.eps))
        bound_sq = next_bound_sq(stretch * state.bound_sq, d1, d2)
        return direction, ScaleByAdamState(
            count=count,
            mu=new_mu,
            nu=new_nu,
            nu_max=new_max,
            scalars=stacked([*used, mu_weight, nu_weight, bound_sq], dtype),
        )

    def max_ratio(state):
        dtype = state.scalars.dtype
        d1, d2 = decay_at(b1, state.count - 1, dtype), decay_at(b2, state.count - 1, dtype)
        mu_weight, nu_weight = (state.mu_weight, state.nu_weight) if bias_correction else (1.0, 1.0)
        squared = corrected_bound_sq(state.bound_sq, mu_weight, nu_weight)
        if nesterov:
            # The newest gradient enters both terms of the numerator, the older ones the first only.
            from_mu, from_g = numerator_factors(d1, state.mu_weight)
            older = state.bound_sq - d1.take**2 / d2.take
            squared = (from_mu**2 * older + (from_mu * d1.take + from_g) ** 2 / d2.take) * nu_weight
        return jnp.sqrt(squared) * (1 + weight_error(d2, dtype))

    storages = {"nu": nu_storage} | ({"nu_max": nu_storage} if amsgrad else {})
    is_known = only_rounds and granularity.is_mean_or_sum
    growth = functools.partial(_growth, eps_root) if is_known else None
    tx = transformation("scale_by_adam", init_fn, update_fn, growth=growth)
    return described(tx, Bound(granularity, max_ratio, storages))


_SETTINGS = {
    "mu": Settings(form="mu_storage"),
    "nu": Settings(shape="granularity", form="nu_storage"),
    "nu_max": Settings(presence="amsgrad", shape="granularity", form="nu_storage"),
}


class _Step(NamedTuple):
    """The scalars of a step.

    Attributes:
        d1: The decay of m.
        d2: The decay of v.
        eps: As in `scale_by_adam`.
        eps_root: As in `scale_by_adam`.
        mu_factor: The factor of m in the numerator.
        g_factor: The factor of the gradient in the numerator, or None for no such term.
        nu_factor: The factor of v.
        direction_factor: The factor of the quotient.
    """

    d1: Decay
    d2: Decay
    eps: Any
    eps_root: Any
    mu_factor: Any
    g_factor: Any
    nu_factor: Any
    direction_factor: Any


@by_leaf(like=("nu", "nu_max", "squares"))
def _second_moment(
    step: _Step, nu: jax.Array, nu_max: jax.Array | None, squares: jax.Array
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """For one leaf of statistics: v_t, the largest v-hat so far, and the root to divide by."""
    nu = ema(nu, squares, step.d2)
    nu_hat = scaled(nu, step.nu_factor)
    if nu_max is not None:
        nu_hat = nu_max = if_accepted(step.d2.accepted, jnp.maximum(nu_max, nu_hat), nu_max)
    return nu, nu_max, root_of(nu_hat, step.eps, step.eps_root)


@by_leaf(like=("mu", "g"))
def _direction(step: _Step, mu: jax.Array, g: jax.Array, root: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For one leaf: m_t and the direction."""
    mu = ema(mu, g, step.d1)
    mu_hat = scaled(mu, step.mu_factor)
    if step.g_factor is not None:
        mu_hat = mu_hat + scale(g, step.g_factor)
    direction = over_root(mu_hat, root, step.eps, step.eps_root)
    return mu, scaled(direction, step.direction_factor)


def _growth(eps_root: Any, given: Magnitudes, state: ScaleByAdamState) -> tuple[jax.Array, jax.Array]:
    """Bounds on the direction and on the new moments.

    m and v are averages of g and of q, which is at most the sum of a group's squares. For the direction,
    |m|^2 <= A^2 v (`adam_bound`), v is at most `size` times the v of one coordinate, and nesterov's newest
    gradient has (1 - b2) |g|^2 <= v. A is clipped where it has no bound.
    """
    largest_q = given.size * jnp.square(given.updates)
    moments = jnp.maximum(given.state, jnp.maximum(given.updates, largest_q)) * ROUNDED
    if state.nu_max is not None:  # an average divided by its sum of weights
        moments = moments / state.nu_weight
    relative = jnp.sqrt(state.bound_sq) + jax.lax.rsqrt(1 - state.b2)
    relative = relative * lost_to_underflow(state.b2, state.eps, eps_root)
    direction = ROUNDED * math.sqrt(given.size) * relative / state.mu_weight
    valid = [(decay >= 0) & (decay < 1) for decay in (state.b1, state.b2)]
    valid += [state.eps >= 0, jnp.asarray(eps_root) >= 0, state.mu_weight > 0, state.nu_weight > 0]
    return if_valid(direction, *valid, state.bound_sq < 1e30), moments


# ---- Quantities derived from the state, for telemetry and conversions of states. ----


class DirectionParts(NamedTuple):
    """The parts of a direction u = mu_hat / root, and the second moment in the root."""

    mu_hat: PyTree
    nu_hat: PyTree
    root: PyTree


def direction_parts(state: ScaleByAdamState) -> DirectionParts:
    """Returns the parts of the last direction, or zeros and eps before the first step.

    A state does not tell the variants of its transformation: this is the form of `eps_form="paper"` with bias
    correction, without `eps_root` and `nesterov`. The largest second moment of `amsgrad` is in the root.
    """
    moments = moments_of(state)
    mu_weight, nu_weight = (jnp.where(w > 0, w, 1) for w in (state.mu_weight, state.nu_weight))
    nu_hat = scaled(moments["nu"], 1 / nu_weight)
    in_root = nu_hat if moments["nu_max"] is None else moments["nu_max"]  # which is corrected already
    root = jax.tree.map(lambda v: root_of(v, state.eps, 0.0), in_root)
    return DirectionParts(scaled(moments["mu"], 1 / mu_weight), nu_hat, root)
