"""The direction that a transformation would return if all gradients so far had been the present one.

Momentum mixes gradients of many batches into a step. What the loss of one batch does along such a step is
hard to tell from noise; along the batch's own gradient, rescaled as the transformation rescales gradients, it
is not.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adaptive_optax._core.precision import scaled
from adaptive_optax._core.states import states_of, unwrapped
from adaptive_optax.moments.carried import moments_declared_by, types_with_moments
from adaptive_optax.moments.formats import dense, encode_like
from adaptive_optax.transforms.adam import ScaleByAdamState
from adaptive_optax.transforms.momentum import TraceState

_NO_BOUND = 1e30
# optax's states hold a momentum, but not its decay, which is found from two updates.
_OPTAX = {optax.ScaleByAdamState: "mu", optax.TraceState: "trace"}


def momentum_free_direction(
    direction: optax.GradientTransformationExtraArgs, updates: Any, state: Any, params: Any, **extra_args: Any
) -> Any:
    r"""Returns the direction without momentum: $D^{-1} g$ for Adam's $D = \sqrt{\hat v} + \epsilon$.

    The second moments are those that the step with this gradient has. Every first moment is replaced by the
    one that it tends to if all gradients are this one, as it arrives there: clipping in front is taken into
    account. Known are the moments that `carries_moments` declares with their weights, `trace`, and
    optax's `scale_by_adam` and `trace`; the momentum of other transformations stays.

    Args:
        direction: A transformation of gradients.
        updates: The gradients.
        state: The state before the step.
        params: The parameters, or None.
        **extra_args: What `direction` is given besides.
    """

    def after(state):
        return direction.update(updates, state, params, **extra_args)

    kinds = (*types_with_moments(), TraceState, *_OPTAX)
    stages = _stages(state, kinds)
    if not stages:
        return after(state)[0]

    def replaced(f, first, last, *states):
        """The first of the states, with f of the nodes of some stages in all states."""
        position = iter(stages)

        def of_nodes(node, *others):
            if not isinstance(node, kinds):
                return node
            return f(node, *others) if first <= next(position) <= last else node

        return jax.tree.map(of_nodes, *states, is_leaf=lambda node: isinstance(node, kinds))

    # What arrives at a momentum depends on those in front of it in the chain, so these come first.
    settled, last = state, max(stages)
    for stage in range(last + 1):
        start = replaced(_emptied, stage, last, settled)
        once = after(start)[1]
        twice = once
        if states_of(tuple(_OPTAX), state):  # after the same gradient once more
            twice = after(replaced(_with_first_moments_of, stage, stage, start, once))[1]
        settled = replaced(_settled, stage, stage, settled, once, twice)
    return after(settled)[0]


def _stages(state: Any, kinds: tuple[type, ...]) -> list[int]:
    """For each momentum in a state, how many are in front of it in a chain, whose states are plain tuples."""
    found: list[int] = []

    def walk(node, stage):
        """Returns the stage of what comes after the node."""
        if isinstance(node, kinds):
            found.append(stage)
            return stage + 1
        parts = jax.tree.leaves(node, is_leaf=lambda part: part is not node)
        if len(parts) == 1 and parts[0] is node:
            return stage
        ends = [stage]
        for part in parts:
            ends.append(walk(part, ends[-1] if type(node) is tuple else stage))
        return max(ends)

    walk(state, 0)
    return found


def _weighted(state: Any) -> dict[str, str]:
    """The first moments of a state that know the sum of their weights, with the field of that sum."""
    declared = moments_declared_by(type(state), "mu")
    return {name: moment.weight for name, moment in declared.items() if moment.weight}


def _emptied(state: Any) -> Any:
    """A state before its first momentum, but with its second moments and counts."""
    if isinstance(state, TraceState):
        return state._replace(trace=jax.tree.map(jnp.zeros_like, state.trace))
    for kind, field in _OPTAX.items():
        if isinstance(state, kind):
            return state._replace(**{field: jax.tree.map(jnp.zeros_like, getattr(state, field))})
    for name, weight in _weighted(state).items():
        zeros = jax.tree.map(jnp.zeros_like, dense(getattr(state, name)))
        state = _with_moment(state, name, zeros)._replace(**{weight: jnp.zeros_like(getattr(state, weight))})
    return state


def _with_first_moments_of(state: Any, other: Any) -> Any:
    for kind, field in _OPTAX.items():
        if isinstance(state, kind):
            return state._replace(**{field: getattr(other, field)})
    return state


def _settled(state: Any, once: Any, twice: Any) -> Any:
    """A state with the momentum that it tends to, given those after one and two of the same gradient."""
    if isinstance(state, TraceState):
        return state._replace(trace=scaled(once.trace, 1 / (1 - once.momentum)))
    for kind, field in _OPTAX.items():
        if isinstance(state, kind):
            return state._replace(**{field: _limit(getattr(once, field), getattr(twice, field), state)})
    for name, weight in _weighted(state).items():
        total = getattr(once, weight)
        mean = scaled(dense(getattr(once, name)), 1 / jnp.where(total > 0, total, 1))
        state = _with_moment(state, name, mean)._replace(**{weight: jnp.ones_like(getattr(state, weight))})
    if isinstance(state, ScaleByAdamState):
        # The second moment would be raised to what a mean of so many steps allows, and this is not one.
        state = state._replace(bound_sq=jnp.full_like(state.bound_sq, _NO_BOUND))
    return state


def _limit(once: Any, twice: Any, state: Any) -> Any:
    """The momentum of a state of optax that equal gradients tend to, given two of them."""
    change = jax.tree.map(lambda x, y: y - x, once, twice)
    decay = _largest(change) / jnp.maximum(_largest(once), jnp.finfo(jnp.float32).tiny)
    # optax's Adam divides by 1 - b^count, whatever its average holds.
    share = 1 - decay**state.count if isinstance(state, optax.ScaleByAdamState) else 1.0
    return scaled(once, share / jnp.maximum(1 - decay, 1e-6))


def _with_moment(state: Any, name: str, values: Any) -> Any:
    role = moments_declared_by(type(state))[name].role
    encoded = encode_like(getattr(state, name), values, count=unwrapped(state.count), role=role)
    return state._replace(**{name: encoded})


def _largest(tree: Any) -> jax.Array:
    """The largest magnitude in a tree, float32."""
    tops = [jnp.max(jnp.abs(x), initial=0).astype(jnp.float32) for x in jax.tree.leaves(tree)]
    return jnp.max(jnp.stack(tops), initial=0) if tops else jnp.zeros((), jnp.float32)
