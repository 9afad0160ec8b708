"""Rejecting steps that would put a NaN or an infinity into parameters or state."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer, eval_jaxpr

from adaptive_optax._core.checks import check_same_tree, check_transformation
from adaptive_optax._core.entries import arrays_of_entries
from adaptive_optax._core.foresight import deciding, foreseeing
from adaptive_optax._core.once_more import kept_apart
from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax._core.precision import cast, incremented, scalar_dtype, updated_params, wide_dtype, widen
from adaptive_optax._core.state_check import check_state, check_state_kept
from adaptive_optax._core.states import has_own_rejection, states_of
from adaptive_optax._core.transformation import transformation, with_array_state
from adaptive_optax._core.trees import Count, OptState, Scalar
from adaptive_optax.moments.formats import with_values
from adaptive_optax.transforms.match_parameter_dtype import outgoing
from adaptive_optax.wrappers.accumulation import AccumulateGradientsState
from adaptive_optax.wrappers.reporting import OnReject, check_on_reject, report_first


class RejectNonfiniteState(NamedTuple):
    """State of `reject_nonfinite`.

    Attributes:
        inner_state: State of the inner transformation after the last accepted step.
        total: Number of rejected steps.
        in_a_row: Number of steps rejected since the last accepted one.
        bound: An upper bound on the magnitudes in the state of `inner` and in the parameters, float32, or
            float64 if a parameter is; 0 if it is not known, and None in states of older versions.
    """

    inner_state: OptState
    total: Count
    in_a_row: Count
    bound: Scalar | None = None


def reject_nonfinite(
    inner: optax.GradientTransformation, *, on_reject: OnReject | None = None
) -> optax.GradientTransformationExtraArgs:
    """Makes every step a transaction: a bad step changes nothing, however many occur in a row.

    Wrap the whole chain in it, outermost (except for `verified`), and a run survives NaN gradients, spikes
    that overflow a second moment, and overflow anywhere inside. A step is rejected if

    * a gradient contains a NaN or an infinity,
    * an update does,
    * a finite element of the state becomes non-finite (an infinite one, such as the best value of optax's
      plateau before its first metric, may stay infinite), or
    * a finite element of the parameters, if `update` receives them, would become non-finite in
      `optax.apply_updates`.

    Then the updates are zero and the state does not change, including step counts and schedules, so that the
    run continues as if the batch had not occurred. All devices make the same decision, because it is based on
    global arrays.

    It should be outermost because transformations outside it do not see the rejection. A `trace` after it
    would keep moving the parameters with its momentum, and weight decay after it would keep decaying them.

    With gradient accumulation there are two places for it. Outside, around
    `optax.MultiSteps(tx, k).gradient_transformation()`, it drops only the micro-batch with a NaN; but a
    finite spike is accumulated before it overflows, and every rejection then restores the sum that contains
    it. Inside, `optax.MultiSteps(reject_nonfinite(tx), k)`, a spike costs its k micro-batches, but a NaN
    stays in optax's accumulator. So wrap both; `get_rejections` reads the outer one.

    This does not cover other effects of the forward pass, such as batch statistics, which a bad batch has
    already corrupted. `keep_if_rejected` applies the same decision to them.

    `optax.apply_if_finite` checks only the updates, requires them in the gradients' dtype, and accepts the
    NaN after its limit. A run in which `in_a_row` keeps growing is lost in any case: watch for it with
    `get_rejections` or `on_reject`.

    Args:
        inner: Any transformation whose state keeps its structure.
        on_reject: `on_reject(what, path)` is called on the host, through `jax.debug.callback`, at each
            rejected step, with the first thing that was bad, "gradient", "update", "state" or "parameter",
            and the path of its first bad leaf; `print` works. None for no call.

    Returns:
        The transformation.

    Raises:
        ValueError: If `inner` is not a transformation or `on_reject` is not a function (at construction), or
            the state changes structure, shape or dtype (at update).

    Inside a compiled step, a chain of this library's transformations is decided before it is taken: each
    declares how large its updates and its state can become, so small gradients are enough to know that
    everything stays finite, and the step costs little more than without rejection. The first step, gradients
    whose magnitudes sum to more than 4e9, and about one step in a thousand (with `amsgrad` one in a hundred)
    are decided by their results. A state or parameters that you replace between two steps are trusted to be
    as small as those that they replace; set `state._replace(bound=jnp.zeros_like(state.bound))` to have them
    looked at. Steps with other transformations, with `Int8` moments or float16, outside jit, or without
    `params` are decided by their results, which takes several times as long as the update.

    State cost: the state of `inner`, two counters and a float32.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.reject_nonfinite(ao.adam(1e-3), on_reject=print)
        >>> state = tx.init({"w": jnp.ones(2)})
        >>> for gradient in (jnp.array([1.0, jnp.nan]), jnp.array([1.0, 1e20]), jnp.ones(2)):
        ...     updates, state = tx.update({"w": gradient}, state)
        gradient w
        state 0/nu/w
        >>> ao.get_rejections(state).total.item(), state.inner_state[0].count.item()
        (2, 1)
    """
    check_transformation("inner", inner)
    check_on_reject(on_reject)
    inner = with_array_state(inner)

    def own_init(params):
        # Two arrays, because a state with the same array in two places cannot be donated.
        total, in_a_row = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        return RejectNonfiniteState(None, total, in_a_row, jnp.zeros((), scalar_dtype(params)))

    def older_init(params):
        return own_init(params)._replace(bound=None)

    def init_fn(params):
        inner_state = inner.init(params)
        for state in states_of((AccumulateGradientsState, optax.MultiStepsState), inner_state):
            if any(map(has_own_rejection, jax.tree.leaves(state, is_leaf=has_own_rejection))):
                raise ValueError(
                    "reject_nonfinite: the scale of a dynamic_loss_scale inside an accumulation could never "
                    "fall here, because micro-batches that overflow do not reach it. Put dynamic_loss_scale "
                    "outside: dynamic_loss_scale(accumulate_gradients(inner, every))."
                )
        return own_init(params)._replace(inner_state=inner_state)

    def update_fn(updates, state, params=None, **extra_args):
        is_older = getattr(state, "bound", 0) is None
        check_state("reject_nonfinite", state, older_init if is_older else own_init, "updates", updates)
        old, old_bound = state.inner_state, state.bound

        def step(updates, old, params):
            new_updates, new = inner.update(updates, old, params, **extra_args)
            check_state_kept(
                "reject_nonfinite",
                old,
                new,
                "optax's states take the gradients' dtype: cast the gradients first",
            )
            if params is not None:
                check_same_tree("reject_nonfinite", "updates", new_updates, "params", params)
            return new_updates, new

        forecast = _foresee(step, updates, old, params, old_bound)
        decision = None
        if forecast is None:
            new_updates, new = step(updates, old, params)
            places = _places(updates, new_updates, old, params)
            if not places:
                return new_updates, state._replace(inner_state=new)
            finite = _tops(updates, new_updates, old, new, params) < jnp.inf
            accepted = jnp.all(finite)
            bound = None if old_bound is None else jnp.zeros_like(old_bound)
        else:
            places = _places(updates, forecast.updates, old, params)
            finite, bound = jax.lax.cond(
                forecast.is_finite,
                lambda: (jnp.ones(len(places), jnp.bool_), forecast.bound),
                lambda: _looked_at(step, updates, old, params, old_bound),
            )
            accepted = jnp.all(finite)
            bound = jnp.where(accepted, bound, old_bound)
            with deciding(accepted) as decision:
                new_updates, new = step(updates, old, params)
        if on_reject is not None:
            report_first(on_reject, places, finite)
        kept = jax.tree.map(
            lambda before, after: before.kept_at_rejection(after) if has_own_rejection(before) else before,
            old,
            new,
            is_leaf=has_own_rejection,
        )
        state = RejectNonfiniteState(
            inner_state=jax.tree.map(
                lambda before, after: (
                    after
                    if decision is not None and decision.holds(after)
                    else jnp.where(accepted, after, before)
                ),
                kept,
                new,
            ),
            total=jnp.where(accepted, state.total, incremented(state.total)),
            in_a_row=jnp.where(accepted, 0, incremented(state.in_a_row)),
            bound=bound,
        )
        new_updates = outgoing(new_updates, old)
        return jax.tree.map(lambda u: jnp.where(accepted, u, jnp.zeros_like(u)), new_updates), state

    return transformation(None, init_fn, update_fn)


def _places(updates: Any, new_updates: Any, old: Any, params: Any) -> list[tuple[str, str]]:
    """What can be non-finite and its path, in the order of `_tops`."""
    trees = {"gradient": updates, "update": new_updates, "state": _inexact(old), "parameter": params}
    return [(what, path) for what, tree in trees.items() for path, _ in paths_and_leaves(tree)]


def _tops(updates: Any, new_updates: Any, old: Any, new: Any, params: Any) -> jax.Array:
    """The largest magnitude in each of `_places`, inf if the step makes anything there non-finite."""
    tops = [_top(x) for x in jax.tree.leaves((updates, new_updates))]
    pairs = zip(jax.tree.leaves(_inexact(old)), jax.tree.leaves(_inexact(new)), strict=True)
    # A finite step can overflow the parameter's dtype.
    moves = (
        []
        if params is None
        else zip(jax.tree.leaves(params), updated_params(params, new_updates), strict=True)
    )
    return _stacked(tops + [_top(after, before) for before, after in (*pairs, *moves)])


def _top(x: jax.Array, before: jax.Array | None = None) -> jax.Array:
    """The largest magnitude of an array: inf for a NaN, and the largest number for what was not finite."""
    x = cast(x, wide_dtype(x))
    # The modulus of a finite complex number may overflow.
    magnitude = jnp.maximum(jnp.abs(x.real), jnp.abs(x.imag)) if jnp.iscomplexobj(x) else jnp.abs(x)
    magnitude = jnp.where(jnp.isnan(magnitude), jnp.inf, magnitude)  # devices may lose a NaN in a maximum
    if before is not None:
        magnitude = jnp.where(jnp.isfinite(before), magnitude, jnp.finfo(magnitude.dtype).max)
    return jnp.max(magnitude, initial=0)


def _stacked(scalars: list[jax.Array]) -> jax.Array:
    """Scalars as one array, in the widest of their dtypes."""
    widest = functools.reduce(np.promote_types, (x.dtype for x in scalars), np.dtype(np.float32))
    return jnp.stack([x.astype(widest) for x in scalars])


def _inexact(state: Any) -> Any:
    """The values in a state, without integers and bools."""

    def leaf(x):
        return x if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else None

    return jax.tree.map(leaf, with_values(state))


# A step is foreseen to be finite while all that it reads is below the first two, and all that it writes below
# the third, by a bound that each step raises a little. When that bound has become too large, or is not known
# yet, one step is decided by its results, which also tell a new one.
_LARGEST_GRADIENT, _LARGEST_VALUE, _LARGEST_BOUND = 2.0**32, 2.0**50, 2.0**120
_FEW = 4096  # values that are looked at in the new state itself


class _Forecast(NamedTuple):
    """What is known of a step before it.

    Attributes:
        updates: The shapes of the new updates.
        is_finite: Whether everything certainly stays finite.
        bound: If so, a bound on the new state and parameters.
    """

    updates: Any
    is_finite: jax.Array
    bound: jax.Array


def _foresee(step: Any, updates: Any, old: Any, params: Any, bound: Any) -> _Forecast | None:
    """Returns a forecast; None if something in the step does not declare how large it can become."""
    leaves = jax.tree.leaves((updates, old, params))
    if bound is None or params is None or not any(isinstance(x, Tracer) for x in leaves):
        return None
    dtypes = filter(lambda dtype: jnp.issubdtype(dtype, jnp.inexact), map(jnp.result_type, leaves))
    if any(float(jnp.finfo(dtype).max) < _LARGEST_BOUND for dtype in dtypes):
        return None
    if any(map(has_own_rejection, jax.tree.leaves(old, is_leaf=has_own_rejection))):
        return None

    def traced(updates, old, params, bound):
        with foreseeing(bound.dtype) as known:
            known.know(updates, _LARGEST_GRADIENT)
            known.know((old, params), bound)
            new_updates, new = step(updates, old, params)
        few, many, scalars = [], [], set(map(id, arrays_of_entries(new)))
        for after in jax.tree.leaves(new):
            is_known = known.bound(after) is not None
            is_scalar = after.ndim == 0 or id(after) in scalars
            if is_scalar or (not is_known and after.size <= _FEW):  # hyperparameters, a measurement
                few.append(jnp.all(jnp.isfinite(after)))
            if is_known or after.size > _FEW:
                many.append(after)
        move, state = known.bound(new_updates), known.bound(many)
        if move is None or state is None:
            return new_updates, None
        return new_updates, (jnp.all(jnp.stack([*few, True])), jnp.maximum(bound + move, state))

    closed, (shapes, declared) = jax.make_jaxpr(traced, return_shape=True)(updates, old, params, bound)
    if declared is None or closed.effects:
        return None
    # XLA removes the rest of the step from this copy.
    flat = jax.tree.leaves((updates, old, params, bound))
    few_finite, after = eval_jaxpr(closed.jaxpr, closed.consts, *flat)[-2:]
    # A sum over devices keeps a NaN, which a maximum may lose.
    sums = [jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(widen(updates))]
    total = jnp.sum(_stacked(sums)) if sums else jnp.zeros((), jnp.float32)
    is_finite = (bound > 0) & few_finite & (after <= _LARGEST_BOUND) & (total <= _LARGEST_GRADIENT)
    return _Forecast(shapes, is_finite, after)


def _looked_at(
    step: Any, updates: Any, old: Any, params: Any, bound: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Takes a step only to see what is finite, and a new bound, in the dtype of the old one."""
    updates, old, params = kept_apart((updates, old, params))
    new_updates, new = step(updates, old, params)
    tops = _tops(updates, new_updates, old, new, params)
    values = tops[len(jax.tree.leaves((updates, new_updates))) :]
    is_small = jnp.max(values, initial=0) <= _LARGEST_VALUE
    return tops < jnp.inf, jnp.where(
        is_small, jnp.asarray(_LARGEST_VALUE, bound.dtype), jnp.zeros_like(bound)
    )
