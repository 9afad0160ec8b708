"""Ready-made optimizers: chains of this library's transformations, to be read at a glance.

Every one keeps its last learning rate in its state (`get_hyperparams`), accepts a number, a scalar array, a
tracer or a schedule for it, and hands out updates for `optax.apply_updates`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optax
from jax.typing import ArrayLike

from adaptive_optax._checks import check_bool, check_choice, check_scalar
from adaptive_optax.moments.adam_mini import AdamMiniBlocks
from adaptive_optax.moments.formats import as_storage
from adaptive_optax.moments.granularity import Granularity
from adaptive_optax.moments.storage import Storage, as_nearest
from adaptive_optax.transforms.adam import EpsForm, scale_by_adam
from adaptive_optax.transforms.learning_rate import scale_by_learning_rate
from adaptive_optax.transforms.momentum import trace
from adaptive_optax.transforms.rms import scale_by_rms
from adaptive_optax.transforms.weight_decay import Coupling, add_decoupled_weight_decay


def adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: optax.ScalarOrSchedule = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: Any = None,
    *,
    eps_form: EpsForm = "paper",
    nesterov: bool = False,
    amsgrad: bool = False,
    bias_correction: bool = True,
    granularity: Granularity | str = "coordinate",
    mu_storage: Storage | str = "float32",
    nu_storage: Storage | str = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Builds Adam: `scale_by_adam`, then the learning rate.

    The default where nothing is known of the problem. Whether its learning rate should decay depends on the
    problem too; measure it.

    Args:
        learning_rate: At least 0, a number or a schedule; 1e-3 is where to begin.
        b1: See `scale_by_adam`, which has the equations, for this and all that follow.
        b2: As there.
        eps: As there.
        eps_root: As there.
        mu_dtype: As there.
        eps_form: As there.
        nesterov: As there.
        amsgrad: As there.
        bias_correction: As there.
        granularity: As there.
        mu_storage: As there.
        nu_storage: As there.

    Returns:
        The chain.

    Raises:
        ValueError: If an argument is out of range, naming it.

    State cost: two float32 copies of the parameters, with granularity "tensor" or "global" one.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp, optax
        >>> tx = ao.adam(ao.step_decay(0.3, 0.5, every=20))
        >>> params = jnp.array([3.0, -2.0])
        >>> state = tx.init(params)
        >>> for _ in range(80):
        ...     updates, state = tx.update(2 * params, state)
        ...     params = optax.apply_updates(params, updates)
        >>> bool(jnp.abs(params).max() < 0.5), round(float(ao.get_hyperparams(state)["learning_rate"]), 4)
        (True, 0.0375)

    Source: Kingma and Ba 2015, algorithm 1.
    """
    direction = scale_by_adam(
        b1,
        b2,
        eps,
        eps_root,
        mu_dtype,
        eps_form=eps_form,
        nesterov=nesterov,
        amsgrad=amsgrad,
        bias_correction=bias_correction,
        granularity=granularity,
        mu_storage=mu_storage,
        nu_storage=nu_storage,
    )
    return optax.chain(direction, scale_by_learning_rate(learning_rate))


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: optax.ScalarOrSchedule = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any = None,
    *,
    decay_coupling: Coupling = "learning_rate",
    decay_schedule: optax.ScalarOrSchedule | None = None,
    eps_form: EpsForm = "paper",
    nesterov: bool = False,
    amsgrad: bool = False,
    bias_correction: bool = True,
    granularity: Granularity | str = "coordinate",
    mu_storage: Storage | str = "float32",
    nu_storage: Storage | str = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Builds AdamW: Adam with decoupled weight decay.

    Use it where large weights are to be discouraged: an L2 term in Adam's loss is scaled away by the second
    moment. The equations are in `scale_by_adam` and `add_decoupled_weight_decay`.

    Args:
        learning_rate: At least 0, a number or a schedule.
        b1: See `scale_by_adam`.
        b2: As there.
        eps: As there.
        eps_root: As there.
        mu_dtype: As there.
        weight_decay: At least 0, a number or a schedule; see `add_decoupled_weight_decay`.
        mask: Which leaves decay; as there.
        decay_coupling: `coupling` there: "learning_rate" (default: PyTorch's and optax's), "schedule" or
            "independent".
        decay_schedule: `schedule` there, for `decay_coupling="schedule"`.
        eps_form: See `scale_by_adam`.
        nesterov: As there.
        amsgrad: As there.
        bias_correction: As there.
        granularity: As there.
        mu_storage: As there.
        nu_storage: As there.

    Returns:
        The chain. `update` needs `params`.

    Raises:
        ValueError: If an argument is out of range, naming it.

    State cost: that of `adam`.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp, optax
        >>> tx = ao.adamw(0.1, weight_decay=0.5)
        >>> params = jnp.array([2.0])
        >>> updates, _ = tx.update(jnp.zeros(1), tx.init(params), params)
        >>> round(float(optax.apply_updates(params, updates)[0]), 4)  # 2 (1 - 0.1 * 0.5)
        1.9

    Source: Loshchilov and Hutter 2019, algorithm 2.
    """
    check_choice("decay_coupling", decay_coupling, ("learning_rate", "schedule", "independent"))
    direction = scale_by_adam(
        b1,
        b2,
        eps,
        eps_root,
        mu_dtype,
        eps_form=eps_form,
        nesterov=nesterov,
        amsgrad=amsgrad,
        bias_correction=bias_correction,
        granularity=granularity,
        mu_storage=mu_storage,
        nu_storage=nu_storage,
    )
    decay = add_decoupled_weight_decay(
        weight_decay, coupling=decay_coupling, schedule=decay_schedule, mask=mask
    )
    step = scale_by_learning_rate(learning_rate)
    if decay_coupling == "learning_rate":
        return optax.chain(direction, decay, step)
    return optax.chain(direction, step, decay)


def adam_mini(
    learning_rate: optax.ScalarOrSchedule,
    params_layout: Mapping[str, Granularity | str] | None = None,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: optax.ScalarOrSchedule = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any = None,
    *,
    decay_coupling: Coupling = "learning_rate",
    decay_schedule: optax.ScalarOrSchedule | None = None,
    mu_storage: Storage | str = "float32",
    nu_storage: Storage | str = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Builds Adam-mini: AdamW with one second moment a head, an output neuron or a token.

    Use it for transformers in place of AdamW, with AdamW's hyperparameters and half of its state. It is
    `adamw` with `granularity=AdamMiniBlocks(params_layout)`.

    Args:
        learning_rate: At least 0, a number or a schedule.
        params_layout: What the parameters are, by their paths; see `AdamMiniBlocks`. None is `FLAX_LAYOUT`,
            for linen's and nnx's attention, dense and embedding layers.
        b1: See `scale_by_adam`.
        b2: As there.
        eps: As there.
        eps_root: As there.
        mu_dtype: As there.
        weight_decay: See `adamw`.
        mask: As there.
        decay_coupling: As there.
        decay_schedule: As there.
        mu_storage: See `scale_by_adam`.
        nu_storage: As there.

    Returns:
        The chain. `update` needs `params`.

    Raises:
        ValueError: If an argument is out of range (at construction), or the layout finds no queries and keys
            in the parameters, listing their paths (at init).

    State cost: one float32 copy of the parameters and a value a block: about half of `adamw`'s.

    Example:
        >>> import adaptive_optax as ao, jax, jax.numpy as jnp
        >>> from flax import linen
        >>> x = jnp.ones((4, 64))
        >>> params = linen.MultiHeadAttention(num_heads=4).init(jax.random.key(0), x)["params"]
        >>> mini, full = ao.adam_mini(1e-3).init(params), ao.adamw(1e-3).init(params)
        >>> round(ao.state_bytes(mini) / ao.state_bytes(full), 2)
        0.51

    Source: Zhang et al. 2024, "Adam-mini: use fewer learning rates to gain more".
    """
    return adamw(
        learning_rate,
        b1,
        b2,
        eps,
        eps_root,
        mu_dtype,
        weight_decay,
        mask,
        decay_coupling=decay_coupling,
        decay_schedule=decay_schedule,
        granularity=AdamMiniBlocks(params_layout),
        mu_storage=mu_storage,
        nu_storage=nu_storage,
    )


def rmsprop(
    learning_rate: optax.ScalarOrSchedule,
    decay: optax.ScalarOrSchedule = 0.9,
    eps: optax.ScalarOrSchedule = 1e-8,
    initial_scale: ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: optax.ScalarOrSchedule | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    granularity: Granularity | str = "coordinate",
    storage: Storage | str = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Builds RMSprop: `scale_by_rms`, the learning rate, then momentum if asked for.

    Use it where gradients change too fast for Adam's first moment, or with a coarser granularity as gradient
    descent with an adaptive step. Momentum accumulates updates with their learning rates, as in optax and
    TensorFlow; PyTorch applies the learning rate last, which differs while it moves.

    Args:
        learning_rate: At least 0, a number or a schedule.
        decay: See `scale_by_rms`, which has the equations. PyTorch's is 0.99.
        eps: As there. PyTorch's stands beside the root.
        initial_scale: As there.
        eps_in_sqrt: As there.
        centered: As there.
        momentum: In [0, 1), a number or a schedule; None for none. See `trace`.
        nesterov: Whether the momentum looks ahead.
        bias_correction: See `scale_by_rms`.
        granularity: As there.
        storage: As there.

    Returns:
        The chain.

    Raises:
        ValueError: If an argument is out of range, or `nesterov` comes without `momentum`.

    State cost: one float32 a group; `centered` and `momentum` add one copy of the parameters each.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp, optax
        >>> tx = ao.rmsprop(0.05, momentum=0.5)
        >>> params = jnp.array([3.0, -2.0])
        >>> state = tx.init(params)
        >>> for _ in range(80):
        ...     updates, state = tx.update(2 * params, state)
        ...     params = optax.apply_updates(params, updates)
        >>> bool(jnp.abs(params).max() < 0.5)
        True

    Source: Hinton 2012, lecture 6e; Graves 2013, equations 38-45.
    """
    direction = scale_by_rms(
        decay,
        eps,
        initial_scale,
        eps_in_sqrt,
        bias_correction,
        centered=centered,
        granularity=granularity,
        storage=storage,
    )
    return optax.chain(direction, scale_by_learning_rate(learning_rate), *_momentum(momentum, nesterov))


def global_rmsprop(
    learning_rate: optax.ScalarOrSchedule,
    decay: optax.ScalarOrSchedule = 0.9,
    eps: optax.ScalarOrSchedule = 1e-8,
    initial_scale: ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: optax.ScalarOrSchedule | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    storage: Storage | str = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Builds RMSprop in its global form: the step adapts its length and keeps the gradient's direction.

    `rmsprop` with `granularity="global"`; arguments, returns and errors are those of `rmsprop`.

    State cost: one float32.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.global_rmsprop(0.1, decay=0.0)
        >>> gradient = jnp.array([3.0, -4.0])
        >>> updates, _ = tx.update(gradient, tx.init(gradient))
        >>> bool(jnp.allclose(updates, -0.1 * gradient / jnp.sqrt(25 / 2)))
        True
    """
    return rmsprop(
        learning_rate,
        decay,
        eps,
        initial_scale,
        eps_in_sqrt,
        centered,
        momentum,
        nesterov,
        bias_correction,
        granularity="global",
        storage=storage,
    )


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: optax.ScalarOrSchedule | None = None,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds stochastic gradient descent: momentum if asked for, then the learning rate.

    The baseline that an adaptive method has to beat.

    Args:
        learning_rate: At least 0, a number or a schedule.
        momentum: In [0, 1), a number or a schedule (one-cycle has one); None for none. See `trace`.
        nesterov: Whether the momentum looks ahead.
        accumulator_dtype: The dtype in which the momentum is kept; None for float32.

    Returns:
        The chain.

    Raises:
        ValueError: If an argument is out of range, or `nesterov` or `accumulator_dtype` comes without
            `momentum`.

    State cost: none without momentum, else one float32 copy of the parameters.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.sgd(0.5)
        >>> updates, _ = tx.update(jnp.array([2.0]), tx.init(jnp.array([1.0])))
        >>> updates.tolist()
        [-1.0]

    Source: Robbins and Monro 1951; Sutskever et al. 2013.
    """
    if accumulator_dtype is not None and momentum is None:
        raise ValueError(f"accumulator_dtype needs momentum=, got {accumulator_dtype!r} without it.")
    return optax.chain(
        *_momentum(momentum, nesterov, accumulator_dtype), scale_by_learning_rate(learning_rate)
    )


def _momentum(momentum: Any, nesterov: bool, accumulator_dtype: Any = None):
    check_bool("nesterov", nesterov)
    if momentum is None:
        if nesterov:
            raise ValueError("nesterov=True needs momentum=.")
        return ()
    check_scalar("momentum", momentum, "[0, 1)", schedule=True)
    as_storage("accumulator_dtype", as_nearest("accumulator_dtype", accumulator_dtype), momentum=momentum)
    return (trace(momentum, nesterov, accumulator_dtype),)
