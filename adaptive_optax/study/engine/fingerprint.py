"""What makes a study the same study: hashes of the programs and the data, and the settings that matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_optax.study.runner import ArmSpec
from adaptive_optax.study.store import digest
from adaptive_optax.study.task import Task
from adaptive_optax.study.trials import TELEMETRY, Plan


def describe_study(
    task: Task, arms: dict[str, ArmSpec], plan: Plan, rates: dict[str, list[float]], **settings: Any
) -> dict[str, Any]:
    """Describes a study by everything that decides its results, as a dictionary that JSON can hold.

    The programs are hashed as JAX lowers them, with the constants they close over, so that renaming a
    variable is no change and another weight decay is one.
    """
    key = jax.random.key(0)
    params, model_state = jax.eval_shape(task.start, key)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((task.batch_size, *x.shape[1:]), x.dtype), task.train)
    differentiated = jax.value_and_grad(task.training_loss, has_aux=True)
    description = {
        "task": task.name,
        "training data": _data(task.train),
        "validation data": _data(task.validation),
        "batch size": task.batch_size,
        "init program": _program(task.start, key),
        "loss program": _program(differentiated, params, model_state, batch, key),
        "metric program": _program(task.validation_metric, params, model_state, task.validation),
        "arms": list(arms),
    }
    for name, spec in arms.items():
        description[f"arm {name!r} program"] = _arm(spec, params, plan, rates[name][0])
    return description | {
        "learning rates": rates,
        "steps": plan.steps,
        "validation steps": list(plan.validation_steps),
        "telemetry": list(TELEMETRY),
        "jax": jax.__version__,
        "device": f"{len(jax.local_devices())} x {jax.devices()[0].device_kind}",
        **settings,
    }


def _arm(spec: ArmSpec, params: Any, plan: Plan, example_rate: float) -> str:
    def one_update(rate, params, gradient, value):
        rate = example_rate if spec.compilation == "per rate" else rate
        tx = optax.with_extra_args_support(spec.function(rate, plan.steps))
        state = tx.init(params)
        updates, state = tx.update(
            gradient,
            state,
            params,
            value=value,
            grad=gradient,
            value_fn=lambda x: optax.tree.norm(x, squared=True),
        )
        judged = spec.evaluate(params, state) if spec.evaluate else params
        return updates, state, judged, spec.stream

    rate = jax.ShapeDtypeStruct((), jax.dtypes.canonicalize_dtype(np.float64))
    return _program(one_update, rate, params, params, jax.ShapeDtypeStruct((), jnp.float32))


def _program(function: Callable[..., Any], *arguments: Any) -> str:
    return digest(jax.jit(function).lower(*arguments).as_text().encode())


def _data(data: Any) -> str:
    leaves, structure = jax.tree.flatten(data)
    arrays = [np.asarray(leaf) for leaf in leaves]
    described = repr((str(structure), [(array.dtype.str, array.shape) for array in arrays])).encode()
    return digest(described, *(np.ascontiguousarray(array).data for array in arrays))
