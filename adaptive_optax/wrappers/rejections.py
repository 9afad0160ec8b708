"""Counts of rejected steps, and the same decision for state outside the optimizer."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from adaptive_optax._core.state_check import check_state_kept
from adaptive_optax._core.states import states_of, unwrapped
from adaptive_optax._core.trees import Count, OptState
from adaptive_optax.wrappers.accumulation import AccumulateGradientsState
from adaptive_optax.wrappers.reject_nonfinite import RejectNonfiniteState

Tree = TypeVar("Tree")


class Rejections(NamedTuple):
    """How many steps were rejected and how many micro-batches were dropped.

    Attributes:
        total: Total number of steps that `reject_nonfinite` or `dynamic_loss_scale` rejected.
        in_a_row: Number of steps rejected since the last accepted one.
        dropped: Total number of micro-batches that `accumulate_gradients(..., drop_nonfinite=True)` dropped.
        dropped_in_a_row: Number of micro-batches dropped since the last one that was not.
    """

    total: Count
    in_a_row: Count
    dropped: Count
    dropped_in_a_row: Count


def get_rejections(opt_state: OptState) -> Rejections:
    """Reads how many steps were rejected and how many micro-batches were dropped.

    Args:
        opt_state: A state that contains one `reject_nonfinite`, `dynamic_loss_scale` or
            `accumulate_gradients`, or an accumulation and one of the others, at any depth. If two of the same
            kind are nested, the outer one is read.

    Returns:
        The counters, int32 scalars; 0 if the state does not have them.

    Raises:
        ValueError: If there is none, or more than one of a kind.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.accumulate_gradients(ao.reject_nonfinite(ao.sgd(0.1)), 2, drop_nonfinite=True)
        >>> _, state = tx.update(jnp.array([jnp.nan]), tx.init(jnp.ones(1)))
        >>> {name: int(x) for name, x in ao.get_rejections(state)._asdict().items()}
        {'total': 0, 'in_a_row': 0, 'dropped': 1, 'dropped_in_a_row': 1}
    """
    rejecting = states_of(RejectNonfiniteState, opt_state)
    accumulating = states_of(AccumulateGradientsState, opt_state)
    if len(rejecting) > 1 or not (rejecting or accumulating):
        raise ValueError(f"opt_state must hold one state of reject_nonfinite, got {len(rejecting)}.")
    if len(accumulating) > 1:
        raise ValueError(f"opt_state must hold one state of accumulate_gradients, got {len(accumulating)}.")

    def counts(states, *names):
        return [unwrapped(getattr(states[0], n)) if states else jnp.zeros((), jnp.int32) for n in names]

    return Rejections(
        *counts(rejecting, "total", "in_a_row"), *counts(accumulating, "dropped", "dropped_in_a_row")
    )


def keep_if_rejected(opt_state: OptState, new: Tree, old: Tree) -> Tree:
    """Returns the new state of a model, or the old one if the optimizer rejected the step.

    A bad batch "changes nothing" only if the state changed by its forward pass is restored as well: a NaN in
    the running statistics of a batch norm stays there. Call this after `update`, inside the jitted step. A
    step counts as rejected if `reject_nonfinite` or `dynamic_loss_scale` rejected it, or if
    `accumulate_gradients` excluded its micro-batch (dropped, or weight 0). If an accumulation does not drop,
    all its micro-batches from the bad one to the rejected emission count as rejected.

    Args:
        opt_state: The optimizer's state after the update, which contains such states at any depth.
        new: The model's state after the forward pass, any tree of arrays.
        old: The model's state before the forward pass.

    Returns:
        `new` if the step was taken, else `old`.

    Raises:
        ValueError: If nothing in `opt_state` rejects or accumulates, or `old` does not match `new`.

    Examples:
        With flax.nnx, for a batch norm:

        >>> import adaptive_optax as ao, jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
        >>> optimizer = nnx.Optimizer(model, ao.reject_nonfinite(ao.sgd(0.1)), wrt=nnx.Param)
        >>> @nnx.jit
        ... def step(model, optimizer, x):
        ...     old = nnx.as_pure(nnx.state(model, nnx.BatchStat))  # a copy: Variables change in place
        ...     grads = nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model)
        ...     optimizer.update(model, grads)
        ...     new = nnx.as_pure(nnx.state(model, nnx.BatchStat))
        ...     nnx.update(model, ao.keep_if_rejected(optimizer.opt_state, new, old))
        >>> step(model, optimizer, jnp.array([[1.0], [jnp.nan]]))
        >>> model.mean[...].tolist(), model.var[...].tolist()
        ([0.0], [1.0])

        With linen, `batch_stats = ao.keep_if_rejected(state.opt_state, new_batch_stats, state.batch_stats)`.
    """
    rejected = _rejected(opt_state)
    if rejected is None:
        raise ValueError(
            "opt_state must hold a state of reject_nonfinite, dynamic_loss_scale or accumulate_gradients, "
            f"got a {type(opt_state).__name__} without one."
        )
    check_state_kept("keep_if_rejected", old, new, "pass the model's state before and after the step")
    return jax.tree.map(lambda x, y: jnp.where(rejected, y, x), new, old)


def _rejected(opt_state: Any) -> jax.Array | None:
    """Whether the last call of update had no effect; None if nothing in the state records this."""
    found: list[Any] = []
    kinds = RejectNonfiniteState, AccumulateGradientsState, optax.MultiStepsState
    for state in states_of(kinds, opt_state):
        if isinstance(state, RejectNonfiniteState):
            inner = _rejected(state.inner_state)
            found += [unwrapped(state.in_a_row) > 0, *([] if inner is None else [inner])]
        elif isinstance(state, AccumulateGradientsState):
            inner = _rejected(state.inner_state)
            found += [~unwrapped(state.took_part), ~jnp.isfinite(unwrapped(state.square))]
            # Inner wrappers have decided in this call only if it emitted.
            found += [] if inner is None else [inner & (unwrapped(state.micro_step) == 0)]
        else:
            inner = _rejected(state.inner_opt_state)
            found += [] if inner is None else [inner & (unwrapped(state.mini_step) == 0)]
    return None if not found else jnp.any(jnp.stack(found))
