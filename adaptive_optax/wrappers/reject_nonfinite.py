"""Steps that would put a NaN or an infinity into parameters or state are not taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptive_optax._checks import check_same_tree, check_state, check_state_kept, check_transformation
from adaptive_optax._paths import paths_and_leaves
from adaptive_optax._precision import incremented, moved, widen
from adaptive_optax._states import one_state_of, unwrapped


class RejectNonfiniteState(NamedTuple):
    """State of `reject_nonfinite`.

    Attributes:
        inner_state: The inner transformation's, as the last accepted step left it.
        total: Number of rejected steps, int32 scalar.
        in_a_row: Number of steps rejected since the last accepted one, int32 scalar.
    """

    inner_state: Any
    total: jax.Array
    in_a_row: jax.Array


class Rejections(NamedTuple):
    """How many steps were rejected.

    Attributes:
        total: In all, int32 scalar.
        in_a_row: Since the last accepted one, int32 scalar.
    """

    total: jax.Array
    in_a_row: jax.Array


def reject_nonfinite(
    inner: optax.GradientTransformation, *, on_reject: Callable[[str, str], Any] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Makes every step a transaction: a bad one changes nothing, however many come in a row.

    Wrap the whole chain in it, outermost (but for `verified`), and a run survives NaN gradients, spikes that
    overflow a second moment, and overflow anywhere inside. A step is rejected if

    * a gradient holds a NaN or an infinity,
    * an update does,
    * an element of the state that was finite no longer is (one that was infinite, such as the best value of
      a plateau before its first metric, may stay so), or
    * an element of the parameters, where `update` is given them, no longer would be after
      `optax.apply_updates`.

    Then the updates are zero and the state is what it was, step counts and schedules included, so that the
    run goes on as if the batch had not been. All devices decide alike, as global arrays are looked at.

    Why outermost: what stands outside it does not see the rejection. A `trace` behind it would go on moving
    the parameters by its momentum, and a weight decay behind it would go on decaying them.

    With gradient accumulation there are two places. Outside, around
    `optax.MultiSteps(tx, k).gradient_transformation()`, it drops a micro-batch with a NaN alone; a finite
    spike is added up before it overflows, and every rejection then puts back the sum that holds it. Inside,
    `optax.MultiSteps(reject_nonfinite(tx), k)`, a spike costs its k micro-batches; a NaN stays in optax's
    accumulator. So wrap both; `get_rejections` reads the outer one.

    `optax.apply_if_finite` looks at the updates only, wants them in the gradients' dtype, and after its limit
    lets the NaN in. A run in which `in_a_row` keeps growing is over all the same: look at it with
    `get_rejections`, or give `on_reject`.

    Args:
        inner: Any transformation whose state keeps its structure.
        on_reject: `on_reject(what, path)` is called on the host, through `jax.debug.callback`, at each
            rejected step, with what was bad first, "gradient", "update", "state" or "parameter", and the path
            of its first bad leaf; `print` will do. None for no call.

    Returns:
        The transformation; extra arguments go to `inner`. Updates are float32 or wider.

    Raises:
        ValueError: If `inner` is no transformation or `on_reject` no function (at construction), or the state
            changes structure, shape or dtype (at update).

    State cost: that of `inner` and two counters. The new state is written once more where a rejection has to
    be undone.

    Example:
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
    if on_reject is not None and not callable(on_reject):
        raise ValueError(f"on_reject must be None or a function of (what, path), got {on_reject!r}.")
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        # Not one array twice: a state with an array in two places cannot be donated.
        return RejectNonfiniteState(inner.init(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        check_state("reject_nonfinite", state, RejectNonfiniteState)
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
            # A finite step can be more than the parameter's dtype holds.
            moves = zip(paths_and_leaves(params), jax.tree.leaves(new_updates), strict=True)
            for (path, before), u in moves:
                after = moved(before, u)
                places.append(("parameter", path))
                finite.append(jnp.all(jnp.isfinite(after) | ~jnp.isfinite(before)))
        if not finite:
            return new_updates, state._replace(inner_state=new)
        finite = jnp.stack(finite)
        accepted = jnp.all(finite)
        if on_reject is not None:
            _report(on_reject, places, finite)
        state = RejectNonfiniteState(
            inner_state=jax.tree.map(lambda before, after: jnp.where(accepted, after, before), old, new),
            total=jnp.where(accepted, state.total, incremented(state.total)),
            in_a_row=jnp.where(accepted, 0, incremented(state.in_a_row)),
        )
        return jax.tree.map(lambda u: jnp.where(accepted, u, jnp.zeros_like(u)), widen(new_updates)), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def get_rejections(opt_state: Any) -> Rejections:
    """Reads how many steps `reject_nonfinite` has rejected.

    Args:
        opt_state: A state with one `reject_nonfinite` in it, at any depth.

    Returns:
        The counters, int32 scalars.

    Raises:
        ValueError: If there is none, or more than one.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> ao.get_rejections(ao.reject_nonfinite(ao.sgd(0.1)).init(jnp.ones(2))).in_a_row.item()
        0
    """
    state = one_state_of(RejectNonfiniteState, opt_state, "reject_nonfinite")
    return Rejections(unwrapped(state.total), unwrapped(state.in_a_row))


def _report(on_reject: Callable[[str, str], Any], places: list[tuple[str, str]], finite: jax.Array) -> None:
    def call(finite):
        # Under vmap both branches of the cond run, for all members.
        if not finite.all():
            on_reject(*places[int(finite.argmin())])

    jax.lax.cond(jnp.all(finite), lambda _: None, lambda flags: jax.debug.callback(call, flags), finite)
