"""Ready-made optimizers: short chains of this library's transformations.

Each accepts a number, a scalar array, a tracer or a schedule as its learning rate, keeps the last value in
its state (`get_hyperparams`), and returns updates for `optax.apply_updates`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, Unpack

import optax
from jax.typing import ArrayLike, DTypeLike

from adaptive_optax._core.checks import check_bool, check_choice
from adaptive_optax._core.trees import Mask
from adaptive_optax._core.values import as_hyperparameter
from adaptive_optax.moments.adam_mini import AdamMiniBlocks
from adaptive_optax.moments.formats import as_storage
from adaptive_optax.moments.granularity import Granularity
from adaptive_optax.moments.storage import Storage, as_nearest
from adaptive_optax.transforms.adam import AdamVariants, scale_by_adam
from adaptive_optax.transforms.learning_rate import scale_by_learning_rate
from adaptive_optax.transforms.momentum import trace
from adaptive_optax.transforms.rms import scale_by_rms
from adaptive_optax.transforms.weight_decay import Coupling, add_decoupled_weight_decay

Factory = TypeVar("Factory", bound=Callable[..., Any])


def _with_keywords_of(factory: Callable[..., Any]) -> Callable[[Factory], Factory]:
    """Shows the keywords of `factory` in the signature of a function that forwards them as `**variants`.

    The signature is what `help`, notebooks and both `inject_hyperparams` (ours and optax's) read.
    """

    def decorate(function):
        own = inspect.signature(function)
        named = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        forwarded = [
            p
            for p in inspect.signature(factory).parameters.values()
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        ]
        vars(function)["__signature__"] = own.replace(parameters=[*named, *forwarded])
        return function

    return decorate


@_with_keywords_of(scale_by_adam)
def adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: optax.ScalarOrSchedule = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    **variants: Unpack[AdamVariants],
) -> optax.GradientTransformationExtraArgs:
    """Builds Adam: `scale_by_adam`, then the learning rate.

    The default choice when nothing is known about the problem. Whether the learning rate should decay depends
    on the problem; measure it. A NaN or a huge gradient stays in the moments; see `scale_by_adam`.

    Args:
        learning_rate: At least 0, a number or a schedule; 1e-3 is a good start.
        b1: See `scale_by_adam`, which also has the equations.
        b2: See `scale_by_adam`.
        eps: See `scale_by_adam`.
        eps_root: See `scale_by_adam`.
        mu_dtype: See `scale_by_adam`.
        eps_form: See `scale_by_adam`.
        nesterov: See `scale_by_adam`.
        amsgrad: See `scale_by_adam`.
        bias_correction: See `scale_by_adam`.
        granularity: See `scale_by_adam`.
        mu_storage: See `scale_by_adam`.
        nu_storage: See `scale_by_adam`.

    Returns:
        The chain.

    Raises:
        ValueError: If an argument is out of range, naming it.

    State cost: two float32 copies of the parameters, or one with granularity "tensor" or "global".

    Examples:
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
    direction = scale_by_adam(b1, b2, eps, eps_root, mu_dtype, **variants)
    return optax.chain(direction, scale_by_learning_rate(learning_rate))


@_with_keywords_of(scale_by_adam)
def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: optax.ScalarOrSchedule = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Mask | None = None,
    *,
    decay_coupling: Coupling = "learning_rate",
    decay_schedule: optax.ScalarOrSchedule | None = None,
    **variants: Unpack[AdamVariants],
) -> optax.GradientTransformationExtraArgs:
    """Builds AdamW: Adam with decoupled weight decay.

    Use it to discourage large weights: Adam's second moment would scale away an L2 term in the loss. The
    equations are in `scale_by_adam` and `add_decoupled_weight_decay`. A NaN or a huge gradient stays in the
    moments (see `scale_by_adam`), while the weights keep decaying.

    Args:
        learning_rate: At least 0, a number or a schedule.
        b1: See `scale_by_adam`.
        b2: See `scale_by_adam`.
        eps: See `scale_by_adam`.
        eps_root: See `scale_by_adam`.
        mu_dtype: See `scale_by_adam`.
        weight_decay: At least 0, a number or a schedule; see `add_decoupled_weight_decay`.
        mask: Which leaves decay; see `add_decoupled_weight_decay`.
        decay_coupling: The `coupling` of `add_decoupled_weight_decay`: "learning_rate" (default, as in
            PyTorch and optax), "schedule" or "independent".
        decay_schedule: Its `schedule`, for `decay_coupling="schedule"`.
        eps_form: See `scale_by_adam`.
        nesterov: See `scale_by_adam`.
        amsgrad: See `scale_by_adam`.
        bias_correction: See `scale_by_adam`.
        granularity: See `scale_by_adam`.
        mu_storage: See `scale_by_adam`.
        nu_storage: See `scale_by_adam`.

    Returns:
        The chain. `update` needs `params`.

    Raises:
        ValueError: If an argument is out of range, naming it.

    State cost: the same as `adam`.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp, optax
        >>> tx = ao.adamw(0.1, weight_decay=0.5)
        >>> params = jnp.array([2.0])
        >>> updates, _ = tx.update(jnp.zeros(1), tx.init(params), params)
        >>> round(float(optax.apply_updates(params, updates)[0]), 4)  # 2 (1 - 0.1 * 0.5)
        1.9

    Source: Loshchilov and Hutter 2019, algorithm 2.
    """
    check_choice("decay_coupling", decay_coupling, ("learning_rate", "schedule", "independent"))
    direction = scale_by_adam(b1, b2, eps, eps_root, mu_dtype, **variants)
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
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Mask | None = None,
    *,
    decay_coupling: Coupling = "learning_rate",
    decay_schedule: optax.ScalarOrSchedule | None = None,
    mu_storage: Storage | str = "float32",
    nu_storage: Storage | str = "float32",
) -> optax.GradientTransformationExtraArgs:
    """Builds Adam-mini: AdamW with one second moment per head, output neuron or token.

    Use it for transformers in place of AdamW, with AdamW's hyperparameters and half of its state. It is
    `adamw` with `granularity=AdamMiniBlocks(params_layout)`. A NaN or a huge gradient stays in the moment of
    its block.

    Args:
        learning_rate: At least 0, a number or a schedule.
        params_layout: The roles of the parameters, by path; see `AdamMiniBlocks`. None means `FLAX_LAYOUT`,
            for the attention, dense and embedding layers of linen and nnx.
        b1: See `scale_by_adam`.
        b2: See `scale_by_adam`.
        eps: See `scale_by_adam`.
        eps_root: See `scale_by_adam`.
        mu_dtype: See `scale_by_adam`.
        weight_decay: See `adamw`.
        mask: See `adamw`.
        decay_coupling: See `adamw`.
        decay_schedule: See `adamw`.
        mu_storage: See `scale_by_adam`.
        nu_storage: See `scale_by_adam`.

    Returns:
        The chain. `update` needs `params`.

    Raises:
        ValueError: If an argument is out of range (at construction), or no pattern of `params_layout` finds
            queries and keys (at init; the message lists the paths).

    State cost: one float32 copy of the parameters, plus one value per block: about half of `adamw`'s.

    Examples:
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
    """Builds RMSprop: `scale_by_rms`, the learning rate, then optional momentum.

    Use it where gradients change too fast for Adam's first moment, or with a coarser granularity as gradient
    descent with an adaptive step size. Momentum accumulates updates that already include the learning rate,
    as in optax and TensorFlow; PyTorch applies the learning rate last, which differs while the rate changes.
    A NaN or a huge gradient stays in the moment; see `scale_by_rms`.

    Args:
        learning_rate: At least 0, a number or a schedule.
        decay: See `scale_by_rms`, which also has the equations. PyTorch's default is 0.99.
        eps: See `scale_by_rms`. PyTorch adds it outside the root.
        initial_scale: See `scale_by_rms`.
        eps_in_sqrt: See `scale_by_rms`.
        centered: See `scale_by_rms`.
        momentum: In [0, 1), a number or a schedule; None for none. See `trace`.
        nesterov: Whether to use Nesterov momentum.
        bias_correction: See `scale_by_rms`.
        granularity: See `scale_by_rms`.
        storage: See `scale_by_rms`.

    Returns:
        The chain.

    Raises:
        ValueError: If an argument is out of range, or `nesterov` is given without `momentum`.

    State cost: one float32 per group; `centered` and `momentum` add one copy of the parameters each.

    Examples:
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
    """Builds global RMSprop: the step adapts its length and keeps the gradient's direction.

    `rmsprop` with `granularity="global"`; arguments, returns and errors are the same. A huge gradient
    in one coordinate stops all of them for good, and a NaN makes all of them NaN: wrap it in
    `reject_nonfinite`.

    State cost: one float32.

    Examples:
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
    accumulator_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds stochastic gradient descent: optional momentum, then the learning rate.

    The baseline that an adaptive method has to beat. A NaN or a huge gradient passes into the update.
    Momentum forgets a huge gradient but keeps a NaN; see `trace`.

    Args:
        learning_rate: At least 0, a number or a schedule.
        momentum: In [0, 1), a number or a schedule (`one_cycle` returns one); None for none. See `trace`.
        nesterov: Whether to use Nesterov momentum.
        accumulator_dtype: The dtype in which the momentum is stored; None for float32.

    Returns:
        The chain.

    Raises:
        ValueError: If an argument is out of range, or `nesterov` or `accumulator_dtype` is given without
            `momentum`.

    State cost: one float32 copy of the parameters with momentum, else none.

    Examples:
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
    momentum = as_hyperparameter("momentum", momentum)
    as_storage(as_nearest("accumulator_dtype", accumulator_dtype), "accumulator_dtype", momentum=momentum)
    return (trace(momentum, nesterov, accumulator_dtype),)
