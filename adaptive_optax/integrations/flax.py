"""Flax linen: a train state whose `apply_gradients` passes extra arguments on.

`flax.nnx.Optimizer` needs nothing from here: `optimizer.update(model, grads, value=loss)` works as it is.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, cast

import optax
from flax.training import train_state

State = TypeVar("State", bound="TrainState")


class TrainState(train_state.TrainState):
    """flax.training's TrainState, for transformations that want more than gradients and parameters.

    `reduce_on_plateau` wants `value`, a transformation of your own something else. Keywords of
    `apply_gradients` that are fields of the state are replaced, as in Flax; all others go to `tx`.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp, optax
        >>> from adaptive_optax.integrations.flax import TrainState
        >>> tx = optax.chain(ao.sgd(1.0), ao.reduce_on_plateau(factor=0.5, patience=1))
        >>> state = TrainState.create(apply_fn=None, params={"w": jnp.ones(1)}, tx=tx)
        >>> for loss in (1.0, 1.0):
        ...     state = state.apply_gradients(grads={"w": jnp.ones(1)}, value=loss)
        >>> state.params["w"].tolist(), state.step
        ([-0.5], 2)
    """

    def apply_gradients(self: State, *, grads: Any, **kwargs: Any) -> State:
        """Takes a step.

        Args:
            grads: Gradients like `params`.
            **kwargs: Fields of this state to replace, and extra arguments of the transformation's `update`.

        Returns:
            The state after the step.
        """
        names = {field.name for field in dataclasses.fields(self)}
        fields = {name: value for name, value in kwargs.items() if name in names}
        extra = {name: value for name, value in kwargs.items() if name not in names}
        tx = optax.with_extra_args_support(self.tx)

        def update(updates, state, params=None):
            return tx.update(updates, state, params, **extra)

        bound = self.replace(tx=optax.GradientTransformation(tx.init, update))
        after = train_state.TrainState.apply_gradients(bound, grads=grads, **fields)
        return cast(State, after.replace(tx=fields.get("tx", self.tx)))
