"""Rejecting steps that would put a NaN or an infinity into parameters or state."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptive_optax._core.checks import check_same_tree, check_transformation
from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax._core.precision import incremented, updated_param
from adaptive_optax._core.state_check import check_state, check_state_kept
from adaptive_optax._core.states import has_own_rejection, states_of
from adaptive_optax._core.transformation import transformation, with_array_state
from adaptive_optax._core.trees import Count, OptState
from adaptive_optax.transforms.match_parameter_dtype import outgoing
from adaptive_optax.wrappers.accumulation import AccumulateGradientsState
from adaptive_optax.wrappers.reporting import OnReject, check_on_reject, report_first


class RejectNonfiniteState(NamedTuple):
    """State of `reject_nonfinite`.

    Attributes:
        inner_state: State of the inner transformation after the last accepted step.
        total: Number of rejected steps.
        in_a_row: Number of steps rejected since the last accepted one.
    """

    inner_state: OptState
    total: Count
    in_a_row: Count


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

    State cost: the state of `inner` and two counters. Selecting the old or the new state writes it once more.

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
        del params
        # Two arrays, because a state with the same array in two places cannot be donated.
        return RejectNonfiniteState(None, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

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
        check_state("reject_nonfinite", state, own_init, "updates", updates)
        old = state.inner_state
        new_updates, new = inner.update(updates, old, params, **extra_args)
        check_state_kept(
            "reject_nonfinite", old, new, "optax's states take the gradients' dtype: cast the gradients first"
        )
        places, finite = [], []
        for what, tree in (("gradient", updates), ("update", new_updates)):
            for path, x in paths_and_leaves(tree):
                places.append((what, path))
                finite.append(jnp.all(jnp.isfinite(x)))
        for (path, before), after in zip(paths_and_leaves(old), jax.tree.leaves(new), strict=True):
            if jnp.issubdtype(after.dtype, jnp.inexact):
                places.append(("state", path))
                finite.append(jnp.all(jnp.isfinite(after) | ~jnp.isfinite(before)))
        if params is not None:
            check_same_tree("reject_nonfinite", "updates", new_updates, "params", params)
            # A finite step can overflow the parameter's dtype.
            moves = zip(paths_and_leaves(params), jax.tree.leaves(new_updates), strict=True)
            for (path, before), u in moves:
                after = updated_param(before, u)
                places.append(("parameter", path))
                finite.append(jnp.all(jnp.isfinite(after) | ~jnp.isfinite(before)))
        if not finite:
            return new_updates, state._replace(inner_state=new)
        finite = jnp.stack(finite)
        accepted = jnp.all(finite)
        if on_reject is not None:
            report_first(on_reject, places, finite)
        kept = jax.tree.map(
            lambda before, after: before.kept_at_rejection(after) if has_own_rejection(before) else before,
            old,
            new,
            is_leaf=has_own_rejection,
        )
        state = RejectNonfiniteState(
            inner_state=jax.tree.map(lambda before, after: jnp.where(accepted, after, before), kept, new),
            total=jnp.where(accepted, state.total, incremented(state.total)),
            in_a_row=jnp.where(accepted, 0, incremented(state.in_a_row)),
        )
        new_updates = outgoing(new_updates, old)
        return jax.tree.map(lambda u: jnp.where(accepted, u, jnp.zeros_like(u)), new_updates), state

    return transformation(None, init_fn, update_fn)
