"""Flax: a train state whose `apply_gradients` forwards extra arguments, and states and losses for nnx.

`flax.nnx.Optimizer` works without changes, including `optimizer.update(model, grads, value=loss)`. Only a
state that was made outside of it needs `optimizer_from_state`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import optax
from flax import nnx
from flax.training import train_state

from adaptive_optax._core.checks import check_same_tree
from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax._core.trees import OptState, Params, Updates

State = TypeVar("State", bound="TrainState")
Model = TypeVar("Model")


class TrainState(train_state.TrainState):
    """flax.training's TrainState, for transformations that need extra arguments.

    For example, `reduce_on_plateau` needs `value`. Keywords of `apply_gradients` that are fields of the state
    are replaced, as in Flax; all others are forwarded to `tx`.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp, optax
        >>> from adaptive_optax.integrations.flax import TrainState
        >>> tx = optax.chain(ao.sgd(1.0), ao.reduce_on_plateau(factor=0.5, patience=1))
        >>> state = TrainState.create(apply_fn=None, params={"w": jnp.ones(1)}, tx=tx)
        >>> for loss in (1.0, 1.0):
        ...     state = state.apply_gradients(grads={"w": jnp.ones(1)}, value=loss)
        >>> state.params["w"].tolist(), state.step
        ([-0.5], 2)
    """

    def apply_gradients(self: State, *, grads: Updates, **kwargs: Any) -> State:
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
        is_multi_steps = isinstance(self.tx, optax.MultiSteps)  # passes them on, and has no type that says so
        tx = self.tx if is_multi_steps else optax.with_extra_args_support(self.tx)

        def update(updates, state, params=None):
            return tx.update(updates, state, params, **extra)

        bound = self.replace(tx=optax.GradientTransformation(tx.init, update))
        after = train_state.TrainState.apply_gradients(bound, grads=grads, **fields)
        return cast(State, after.replace(tx=fields.get("tx", self.tx)))


def optimizer_from_state(
    model: Model,
    tx: optax.GradientTransformation,
    opt_state: OptState,
    *,
    wrt: nnx.filterlib.Filter = nnx.Param,
) -> nnx.Optimizer[Model]:
    """Builds an `nnx.Optimizer` that continues from a state, such as one from `from_optax` or `from_torch`.

    `nnx.Optimizer` wraps every array of the state in its own Variable, so a state that was made outside of it
    cannot be assigned to its `opt_state` (under `nnx.jit`, "Cannot set key on immutable node").

    Args:
        model: The model.
        tx: The transformation that continues the run.
        opt_state: A state of `tx` for the model's parameters, in any containers: leaves are matched by path.
        wrt: As in `nnx.Optimizer`.

    Returns:
        The optimizer. Its own `step` starts at 0; nothing in this library reads it.

    Raises:
        ValueError: If the leaves or shapes of the state differ from those of `tx`.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp, optax
        >>> from adaptive_optax.integrations.flax import optimizer_from_state
        >>> from flax import nnx
        >>> model, tx = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), ao.adam(1e-3)
        >>> params = nnx.state(model, nnx.Param)
        >>> state = ao.from_optax(optax.adam(1e-3).init(params), tx, params)
        >>> optimizer = optimizer_from_state(model, tx, state)
        >>> _ = optimizer.update(model, nnx.grad(lambda model: model(jnp.ones((1, 2))).sum())(model))
        >>> int(optimizer.opt_state[0].count[...])
        1
    """
    like = jax.eval_shape(tx.init, nnx.state(model, wrt))
    check_same_tree("optimizer_from_state", "opt_state", opt_state, "the state of tx", like, ordered=False)
    by_path = dict(paths_and_leaves(opt_state))
    leaves = [by_path[path] for path, _ in paths_and_leaves(like)]
    state = jax.tree.structure(like).unflatten(leaves)
    # nnx.Optimizer wraps what init returns.
    optimizer = nnx.Optimizer(model, optax.GradientTransformation(lambda params: state, tx.update), wrt=wrt)
    optimizer.tx = tx
    return optimizer


def value_fn(
    loss: Callable[..., Any],
    model: nnx.Module,
    *batch: Any,
    wrt: nnx.filterlib.Filter = nnx.Param,
    has_aux: bool = False,
) -> Callable[[Params], jax.Array]:
    """Makes the loss of a batch a function of the parameters, for `error_controlled` and line searches.

    Call it before the gradient is taken: it keeps the model as it is now, with the counts of its random
    streams, so that dropout falls on the same units. Calls of the function do not change the model.

    In Flax linen it is a line of Python: `value_fn=lambda params: loss(params, batch)`.

    Args:
        loss: `loss(model, *batch)`, as for `nnx.value_and_grad`.
        model: The model.
        *batch: The other arguments of the loss.
        wrt: As in `nnx.Optimizer`.
        has_aux: Whether the loss returns a pair whose first element is the value.

    Returns:
        A function of the parameters, in the containers in which `nnx.Optimizer` passes them.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> from adaptive_optax.integrations.flax import value_fn
        >>> from flax import nnx
        >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> optimizer = nnx.Optimizer(model, ao.error_controlled(ao.scale_by_adam(), 0.1), wrt=nnx.Param)
        >>> def loss(model, x):
        ...     return jnp.mean(model(x) ** 2)
        >>> @nnx.jit
        ... def step(model, optimizer, x):
        ...     f = value_fn(loss, model, x)
        ...     value, grads = nnx.value_and_grad(loss)(model, x)
        ...     optimizer.update(model, grads, value=value, value_fn=f)
        ...     return value
        >>> values = [float(step(model, optimizer, jnp.ones((4, 2)))) for _ in range(100)]
        >>> values[-1] < 0.5 * values[0]
        True
    """
    graphdef, params, rest = nnx.split(model, wrt, ...)
    kept = jax.tree.map(lambda x: x, rest)  # its Variables share their values with the model's
    structure = jax.tree.structure(params)

    def value_of(params: Params) -> jax.Array:
        own = structure.unflatten(jax.tree.leaves(params))
        result = loss(nnx.merge(graphdef, own, kept, copy=True), *batch)
        if not has_aux:
            return result
        if not (isinstance(result, tuple) and len(result) == 2):
            raise ValueError(f"loss must return (value, aux) with has_aux=True, got {result!r}.")
        return result[0]

    return value_of
