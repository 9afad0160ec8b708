"""Averages of the parameters: the effect of a decaying learning rate, without decaying it.

With a constant rate the last iterates wander around the minimum, and their average is closer to it. Averaging
is the strongest rival of decay, needs no fixed horizon, and does not change training.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from adaptive_optax._core.checks import check_params, check_same_tree
from adaptive_optax._core.foresight import ROUNDED, Magnitudes, accepted, holding, if_accepted, if_valid
from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax._core.precision import incremented, scalar_dtype, scale, updated_params, wide_dtype, widen
from adaptive_optax._core.ranges import check_hyperparameter
from adaptive_optax._core.state_check import check_state
from adaptive_optax._core.states import carries_hyperparameters, unwrapped
from adaptive_optax._core.transformation import transformation
from adaptive_optax._core.trees import Count, OptState, Params, PyTree, Scalar
from adaptive_optax._core.values import as_hyperparameter, static_value, value_at
from adaptive_optax.moments.ema import decay_at, ema_weight

_POWER = 8.0


@carries_hyperparameters("power")
class AverageParametersState(NamedTuple):
    """State of `average_parameters` with a power.

    Attributes:
        count: Number of steps taken.
        average: The average, like the parameters, float32 or wider.
        power: The exponent of the last step.
    """

    count: Count
    average: Params
    power: Scalar


@carries_hyperparameters("decay")
class EmaParametersState(NamedTuple):
    """State of `average_parameters` with a decay.

    Attributes:
        count: Number of steps taken.
        average: The bias-corrected average, like the parameters, float32 or wider.
        decay: The decay of the last step; before the first step, of the first.
        weight: The sum of the weights of all steps before bias correction.
    """

    count: Count
    average: Params
    decay: Scalar
    weight: Scalar


_STATES = (AverageParametersState, EmaParametersState)


def average_parameters(
    power: ArrayLike = _POWER, *, decay: optax.ScalarOrSchedule | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps an average of the parameters: over the last part of the run, or with a constant decay.

    Put it last in a chain, train as usual, and evaluate `averaged_parameters(params, opt_state)`. It does not
    change the updates.

    With a `power`, the default,

    $$
    \bar\theta_t = \bar\theta_{t-1} + \frac{\gamma + 1}{t + \gamma} (\theta_t - \bar\theta_{t-1})
    $$

    gives $\theta_i$ a weight that grows with $i^\gamma$. The mean age of the average is about
    $t/(\gamma + 2)$ steps at any t, 10 % at the default, so the length of the run need not be known.

    With a `decay` it is the usual EMA, with a mean age of about $1 / (1 - \beta)$ steps and the bias
    correction of `optax.ema`, exact for any sequence of decays:

    $$
    w_t = \beta_t w_{t-1} + (1 - \beta_t), \qquad
    \bar\theta_t = \bar\theta_{t-1} + \frac{1 - \beta_t}{w_t} (\theta_t - \bar\theta_{t-1})
    $$

    so $\bar\theta_1 = \theta_1$, and early averages are not biased toward the initial parameters.
    PyTorch's `swa_utils.get_ema_multi_avg_fn(0.999)` gives the first iterate full weight instead; use
    `decay=lambda count: jnp.where(count == 0, 0.0, 0.999)` for its values. TensorFlow's warm-up is
    `decay=lambda count: jnp.minimum(0.999, (2 + count) / (11 + count))`.

    The average is float32: once its relative difference from the parameters is below
    $2^{-24} / (1 - \beta)$ (0.06 % at 0.9999), a step no longer changes it.

    The average includes whatever the parameters become: a huge step affects it for as long as that step has
    weight, and a NaN stays in it for good. The updates do not depend on it.

    Args:
        power: $\gamma$ in [0, inf); 0 gives the plain mean of all steps.
        decay: $\beta$ in [0, 1), or a schedule of the step count, which starts at 0; None averages by
            `power`.

    Returns:
        The transformation; `update` needs `params`.

    Raises:
        ValueError: If `power` or `decay` is out of range or both are given (at construction), a leaf is not
            floating (at init), or `params` is missing (at update).

    State cost: one float32 copy of the parameters.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp, optax
        >>> tx = optax.chain(ao.sgd(1.0), ao.average_parameters(power=0.0))
        >>> params = jnp.zeros(1)
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     updates, state = tx.update(-jnp.ones(1), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> params.tolist(), ao.averaged_parameters(params, state).tolist()  # the mean of 1, 2 and 3
        ([3.0], [2.0])

    Source: Shamir & Zhang 2013, "Stochastic gradient descent for non-smooth optimization", section 4
    (polynomial-decay averaging); Kingma and Ba 2015, "Adam", section 3 (the correction).
    """
    check_hyperparameter("power", power)
    if decay is not None:
        decay = as_hyperparameter("decay", decay)
        if static_value(power) not in (None, _POWER):
            raise ValueError(f"Give power or decay, not both, got power={power!r} and decay={decay!r}.")

    def init_fn(params):
        real = scalar_dtype(params)
        # Copies, so that state and parameters can both be donated.
        average = jax.tree.map(lambda x: jnp.array(x, wide_dtype(x)), params)
        count = jnp.zeros((), jnp.int32)
        if decay is None:
            return AverageParametersState(count, average, value_at(power, count, real))
        return EmaParametersState(count, average, value_at(decay, count, real), jnp.zeros((), real))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_params("average_parameters", params)
        check_state("average_parameters", state, init_fn, "params", params)
        check_same_tree("average_parameters", "updates", updates, "the state", state.average)
        check_same_tree("average_parameters", "params", params, "the state", state.average)
        share, state = _share_of_newest(state, power, decay)
        leaves, treedef = jax.tree.flatten(state.average)
        # The average is over the updated parameters, rounded to their dtype.
        new = updated_params(params, updates)
        average = [
            if_accepted(accepted(), a + scale(x - a, share), a)
            for a, x in zip(leaves, widen(new), strict=True)
        ]
        return widen(updates), state._replace(average=holding(jax.tree.unflatten(treedef, average)))

    return transformation("average_parameters", init_fn, update_fn, growth=_growth)


def _growth(given: Magnitudes, state: Any) -> tuple[jax.Array, jax.Array]:
    """The average lies between the old one and the new parameters."""
    average = ROUNDED * jnp.maximum(given.state, given.params + given.updates)
    if isinstance(state, AverageParametersState):
        return given.updates, if_valid(average, state.power >= 0)
    return given.updates, if_valid(average, state.decay >= 0, state.decay <= 1, state.weight > 0)


def _share_of_newest(state: Any, power: Any, decay: Any) -> tuple[jax.Array, Any]:
    """The weight of the newest parameters in the average, and the state with updated scalars."""
    count = incremented(state.count)
    if isinstance(state, AverageParametersState):
        gamma = value_at(power, state.count, state.power.dtype)
        share = (gamma + 1) / (count.astype(gamma.dtype) + gamma)
        return share, state._replace(count=count, power=gamma)
    dtype = state.weight.dtype
    decays = decay_at(decay, state.count, dtype)
    if isinstance(decays.keep, float) and decays.keep > 0:
        # 1 - b^t in closed form: a sum of small terms stops growing before it reaches 1.
        weight = -jnp.expm1(count.astype(dtype) * math.log(decays.keep))
    else:
        weight = ema_weight(state.weight, decays)
    used = value_at(decays.keep, state.count, dtype)
    return decays.take / weight, state._replace(count=count, decay=used, weight=weight)


def averaged_parameters(params: Params, opt_state: OptState) -> Params:
    """Returns the parameters, replaced by the averages of `average_parameters` where there are any.

    Leaves are matched by path, so `params` and `opt_state` may use different containers: nnx states,
    `nnx.as_pure` of them, linen dictionaries. Inside `optax.masked`, `optax.partition` or
    `partition_by_path`, some leaves may have no average, and several groups may have their own.

    If the state holds no average at all, this returns `params`, so that `study.compare` can evaluate arms
    with and without averaging in the same way. `swap_averaged` raises instead.

    Args:
        params: The trained parameters, any tree or an nnx module.
        opt_state: The optimizer's state, at any depth, or `nnx.state(optimizer)`.

    Returns:
        A tree like `params`, in its dtypes; a new module for an nnx module.

    Raises:
        ValueError: If a leaf has several averages, or no leaf of `params` has the path and shape of an
            average.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> params = jnp.ones(2)
        >>> ao.averaged_parameters(params, ao.adam(1e-3).init(params)) is params
        True
    """
    averages = _averages(opt_state)
    return params if averages is None else _with_averages(params, averages)


def swap_averaged(model_or_params: PyTree, opt_state: OptState) -> PyTree:
    """Returns a model or parameters with the averages of `average_parameters` in place of trained values.

    For evaluation and export. The original is not modified, so there is nothing to swap back: evaluate the
    result and continue training the original. To continue from the average instead, update the original with
    it: `nnx.update(model, nnx.state(averaged))`.

    Running statistics, such as those of BatchNorm, are not parameters and belong to the trained weights.
    Recompute them before evaluating the averaged ones: run the averaged model over training data in training
    mode, without taking steps, until they have converged (about `1 / (1 - momentum)` batches).

    ```python
    averaged = ao.swap_averaged(model, optimizer.opt_state)
    averaged.train()
    for batch in batches:  # 100 for a momentum of 0.99
        averaged(batch)
    averaged.eval()
    ```

    Args:
        model_or_params: An nnx module, an Equinox module or any tree of parameters.
        opt_state: The optimizer's state, at any depth, or `nnx.state(optimizer)`.

    Returns:
        A new module or tree of the same kind.

    Raises:
        ValueError: If the state holds no average, a leaf has several, or no leaf has the path and shape of an
            average.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp, optax
        >>> tx = optax.chain(ao.sgd(1.0), ao.average_parameters(decay=0.5))
        >>> params = {"w": jnp.zeros(1)}
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update({"w": -jnp.ones(1)}, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> round(float(ao.swap_averaged(params, state)["w"][0]), 4)  # (1 + 2 * 2) / 3
        1.6667
    """
    averages = _averages(opt_state)
    if averages is None:
        raise ValueError(
            "swap_averaged: opt_state holds no average; put average_parameters last in the optimizer's chain."
        )
    return _with_averages(model_or_params, averages)


def _averages(opt_state: Any) -> dict[str, Any] | None:
    """The averages in a state, keyed by path; None if no transformation keeps any."""
    nodes = [node for node in jax.tree.leaves(opt_state, is_leaf=_keeps_average) if _keeps_average(node)]
    found: dict[str, Any] = {}
    for node in nodes:
        average = node["average"] if isinstance(node, Mapping) else node.average
        for path, leaf in paths_and_leaves(average):
            if path in found:
                raise ValueError(f"opt_state must hold one average per leaf, got several of {path!r}.")
            found[path] = unwrapped(leaf)
    return found if nodes else None


def _keeps_average(node: Any) -> bool:
    # nnx.state and restored checkpoints represent a state as a mapping from its fields.
    fields = set(node) if isinstance(node, Mapping) else None
    return isinstance(node, _STATES) or any(fields == set(kind._fields) for kind in _STATES)


def _with_averages(params: Any, averages: dict[str, Any]) -> Any:
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(params, nnx.Module):  # via its graph, so that tied parameters stay tied
        graph, state = nnx.split(params)
        return nnx.merge(graph, _with_averages(state, averages))
    leaves = paths_and_leaves(params)
    shapes = {path: jnp.shape(unwrapped(leaf)) for path, leaf in leaves if path in averages}
    for path, average in averages.items():
        if shapes.get(path) != average.shape:
            problem = f"has shape {shapes[path]} in params" if path in shapes else "is not in params"
            raise ValueError(
                f"params: the average of {path!r}, of shape {average.shape}, {problem}; pass the parameters "
                "that were passed to the optimizer's init."
            )

    def replaced(path, leaf):
        new = value = unwrapped(leaf)
        if path in averages:  # a copy, so that it can be donated together with the state
            new = jnp.array(averages[path], jnp.result_type(value))
        # An nnx Variable in hijax form is a reference, which must not change in the trained model.
        return new if value is leaf else leaf.replace(new)

    return jax.tree.unflatten(jax.tree.structure(params), [replaced(path, leaf) for path, leaf in leaves])
