"""Decoupled weight decay, and the three things it may be coupled to."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_optax._checks import (
    check_choice,
    check_inexact,
    check_params,
    check_same_tree,
    check_scalar,
    check_state,
)
from adaptive_optax._paths import paths_and_leaves
from adaptive_optax._precision import incremented, scalar_dtype, scale, value_at, widen

Coupling = Literal["learning_rate", "schedule", "independent"]


class AddDecoupledWeightDecayState(NamedTuple):
    """State of `add_decoupled_weight_decay`.

    Attributes:
        count: Number of steps taken, int32 scalar.
        weight_decay: The weight decay of the last step, without the schedule's factor, float32 scalar
            (float64 if a parameter is).
    """

    count: jax.Array
    weight_decay: jax.Array

    hyperparameters = ("weight_decay",)  # not a field: it has no annotation


def add_decoupled_weight_decay(
    weight_decay: optax.ScalarOrSchedule,
    *,
    coupling: Coupling = "learning_rate",
    schedule: optax.ScalarOrSchedule | None = None,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Shrinks the parameters directly, past the adaptive scaling.

    Where it stands in the chain depends on what the decay is coupled to. With :math:`\theta` the parameters,
    :math:`\lambda` `weight_decay`, u the direction and :math:`\Delta = -\eta_t u` the update:

    ===================  ==========================  ==============================================
    `coupling`           place                       returns
    ===================  ==========================  ==============================================
    `"learning_rate"`    before the learning rate    :math:`u + \lambda\theta` (PyTorch, optax)
    `"schedule"`         after the learning rate     :math:`\Delta - s_t\lambda\theta`
    `"independent"`      after the learning rate     :math:`\Delta - \lambda\theta`
    ===================  ==========================  ==============================================

    With "learning_rate" a step shrinks the parameters by :math:`1 - \eta_t\lambda`, so that a new learning
    rate needs a new :math:`\lambda`. With the other two it does not; "schedule" is Loshchilov and Hutter's
    algorithm, in which :math:`s_t` is the schedule without its peak value, from 0 to 1.

    Args:
        weight_decay: :math:`\lambda \ge 0`, or a schedule. Dimensionless; with "learning_rate" per unit
            of the learning rate, typically 1e-4 to 0.1.
        coupling: `"learning_rate"`, `"schedule"` or `"independent"`.
        schedule: :math:`s_t`, a schedule or a number >= 0; needed by, and only by, `coupling="schedule"`.
        mask: Which leaves decay: a tree of bools like the parameters or a prefix of it, or a function from
            the parameters to one. None: all.

    Numbers may be JAX scalars or tracers; a tracer's range cannot be checked.

    Returns:
        The transformation. `update` needs `params`; extra arguments are ignored. Updates are float32 or
        wider.

    Raises:
        ValueError: If an argument is out of range or not used by the coupling (at construction), a leaf is
            not floating or the mask does not fit (at init), or `params` is missing or unlike the updates.

    State cost: two scalars.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.add_decoupled_weight_decay(0.1, mask=lambda params: {"w": True, "b": False})
        >>> params = {"w": jnp.ones(1), "b": jnp.ones(1)}
        >>> updates, _ = tx.update({"w": jnp.zeros(1), "b": jnp.zeros(1)}, tx.init(params), params)
        >>> [round(float(updates[name][0]), 3) for name in "wb"]
        [0.1, 0.0]

    Source: Loshchilov and Hutter 2019, "Decoupled weight decay regularization", algorithm 2, line 12.
    """
    check_scalar("weight_decay", weight_decay, "[0, inf)", schedule=True)
    check_choice("coupling", coupling, ("learning_rate", "schedule", "independent"))
    if coupling == "schedule":
        if schedule is None:
            raise ValueError(
                "coupling='schedule' needs schedule= (decay_schedule= in adamw), the factor in a step."
            )
        check_scalar("schedule", schedule, "[0, inf)", schedule=True)
    elif schedule is not None:
        raise ValueError(
            "schedule= (decay_schedule= in adamw) is used by coupling='schedule' only, "
            f"got it with coupling={coupling!r}."
        )

    def init_fn(params):
        check_inexact("add_decoupled_weight_decay", "params", params)
        _masked_leaves(mask, params)
        count = jnp.zeros((), jnp.int32)
        return AddDecoupledWeightDecayState(count, value_at(weight_decay, count, scalar_dtype(params)))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_params("add_decoupled_weight_decay", params)
        check_state("add_decoupled_weight_decay", state, AddDecoupledWeightDecayState)
        check_inexact("add_decoupled_weight_decay", "updates", updates)
        check_same_tree("add_decoupled_weight_decay", "updates", updates, "params", params)
        dtype = state.weight_decay.dtype
        value = value_at(weight_decay, state.count, dtype)
        factor = value if coupling == "learning_rate" else -value
        if coupling == "schedule":
            factor *= value_at(schedule, state.count, dtype)
        leaves, treedef = jax.tree.flatten(widen(updates))
        decaying = zip(leaves, jax.tree.leaves(widen(params)), _masked_leaves(mask, params), strict=True)
        leaves = [u + scale(theta, factor) if decays else u for u, theta, decays in decaying]
        state = AddDecoupledWeightDecayState(incremented(state.count), value)
        return jax.tree.unflatten(treedef, leaves), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _masked_leaves(mask: Any, params: Any) -> list[bool]:
    """Returns for each leaf of `params` whether it decays.

    Leaves are matched by path, not by tree structure, so that a mask made from `nnx.state` fits the unwrapped
    tree that `nnx.Optimizer` hands to `update`.
    """
    tree = mask(params) if callable(mask) else mask
    paths = [path for path, _ in paths_and_leaves(params)]
    if tree is None:
        return [True] * len(paths)
    entries = dict(paths_and_leaves(tree))
    # Leaves that `optax.masked` or `optax.partition` hide are known too: the mask is of the whole tree.
    places = [path for path, _ in paths_and_leaves(params, masked=True)]
    known = {prefix for path in places for prefix in _prefixes(path)}
    for path, value in entries.items():
        if np.shape(value) or np.asarray(value).dtype != np.bool_:
            raise ValueError(f"mask must hold bools, got {value!r} at {path!r}.")
        if places and path not in known:
            raise ValueError(f"mask has a leaf {path!r} that params have not.")
    found = []
    for path in paths:
        match = next((prefix for prefix in _prefixes(path) if prefix in entries), None)
        if match is None:
            raise ValueError(f"mask says nothing about the leaf {path!r} of params.")
        found.append(bool(entries[match]))
    return found


def _prefixes(path: str) -> list[str]:
    """The path, then its parents, down to the root."""
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(len(parts), -1, -1)]
