"""Identifies a study by digests of its programs and data, and by the settings that affect its results.

Programs are hashed as JAX lowers them, with the constants they close over: renaming a variable changes
nothing, a different weight decay does. They are hashed completely, as the engine runs them: an arm's program
is a trial from its initial parameters to its last step, with the task's loss and shapes, at every learning
rate that it is compiled for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jaxlib.version
import numpy as np

from adaptive_optax.study.engine.chunks import digest, digest_arrays
from adaptive_optax.study.engine.trainers import ArmSpec
from adaptive_optax.study.engine.trials import (
    TELEMETRY,
    Plan,
    as_trials,
    at_rate,
    jax_settings,
    make_trial,
)
from adaptive_optax.study.start import Start
from adaptive_optax.study.task import Task

# These change no results: where to dump, and the number of CPU devices, which "device" already records.
_HARMLESS_FLAGS = re.compile(r"--xla_(dump_|force_host_platform_device_count)")
_CALLBACK = re.compile(r"custom_call @\w*python\w*callback.* -> (?!\(\))")  # a callback whose result is used


def describe_study(
    task: Task, plan: Plan, base_seed: int, paired_batches: bool, start: Start | None = None
) -> dict[str, Any]:
    """Describes, in JSON-compatible values, what trials of a study share and what affects their results.

    Raises:
        ValueError: If a program of the task cannot be recognized later.
    """
    key = jax.random.key(0, impl="threefry2x32")
    params, model_state = jax.eval_shape(task.start, key)
    train, validation = (jax.tree.map(_abstract, data) for data in (task.train, task.validation))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((task.batch_size, *x.shape[1:]), x.dtype), train)
    differentiated = jax.value_and_grad(task.training_loss, has_aux=True)
    init = _lowered(task.start, key)
    loss = _lowered(differentiated, params, model_state, batch, key)
    metric = _lowered(task.validation_metric, params, model_state, validation)
    began = None if start is None else (start.params, start.model_state, start.opt_state)
    return {
        **({} if began is None else {"start data": _data(began)}),
        "training data": _data(task.train),
        "validation data": _data(task.validation),
        "batch size": task.batch_size,
        "init program": _digest("init", init),
        "loss program": _digest("loss", loss),
        "metric program": _digest("metric", metric),
        "steps": plan.steps,
        "validation steps": list(plan.validation_steps),
        "telemetry": list(TELEMETRY),
        "base seed": base_seed,
        "paired batches": paired_batches,
        "record shapes": {
            "training": [len(plan.training_steps)],
            "validation": [len(plan.validation_steps)],
            "telemetry": [len(plan.telemetry_steps), len(TELEMETRY)],
        },
        "environment": {
            "jax": jax.__version__,
            "jaxlib": jaxlib.version.__version__,
            "device": f"{len(jax.local_devices())} x {jax.devices()[0].device_kind}",
            "XLA flags": [
                flag
                for flag in sorted(os.environ.get("XLA_FLAGS", "").split())
                if not _HARMLESS_FLAGS.match(flag)
            ],
            **jax_settings(),
        },
    }


def describe_arm(name: str, task: Task, spec: ArmSpec, plan: Plan, rate: float | None) -> dict[str, str]:
    """Returns digests of an arm's programs, at one learning rate if the arm is compiled for each.

    Raises:
        ValueError: If the arm cannot be traced at that rate, or cannot be recognized later.
    """
    functions = make_trial(task, at_rate(spec.function, rate), plan, spec.evaluate)
    trial = jax.tree.map(lambda x: jax.ShapeDtypeStruct((), x.dtype), as_trials([0.0], [0]))
    train, validation = (jax.tree.map(_abstract, data) for data in (task.train, task.validation))
    index = jax.ShapeDtypeStruct((), np.int32)

    origin = jax.tree.map(_abstract, spec.origin)

    def whole(trial, origin, begin, end, train):
        return functions.advance(functions.start(trial, origin), trial, begin, end, train)

    try:
        state = jax.eval_shape(functions.start, trial, origin)
        program = _lowered(whole, trial, origin, index, index, train)
        evaluation = _lowered(functions.metric, state, train, validation)
    except Exception as error:
        at = "" if rate is None else f" at learning rate {rate}"
        reason = str(error).partition("\n")[0]
        raise ValueError(f"arm {name!r} cannot be run{at}: {type(error).__name__}: {reason}") from error
    return {
        "program": digest(_digest(f"arm {name!r}", program).encode(), str(spec.stream).encode()),
        "evaluation": _digest(f"evaluate of arm {name!r}", evaluation),
    }


def stream_of(name: str) -> int:
    """An arm's own stream of batch orders, derived from its name so that other arms do not affect it."""
    return 1 + int(digest(repr(name).encode())[:8], 16) % (2**32 - 1)


def _lowered(function: Callable[..., Any], *arguments: Any) -> str:
    return jax.jit(function).lower(*arguments).as_text()


def _digest(what: str, program: str) -> str:
    if _CALLBACK.search(program):
        raise ValueError(
            f"out cannot save a study whose {what} calls back into Python (jax.pure_callback and the like): "
            "a change in that code cannot be detected."
        )
    return digest(program.encode())


def _abstract(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, jax.dtypes.canonicalize_dtype(array.dtype))


def _data(data: Any) -> str:
    leaves, structure = jax.tree.flatten(data)
    arrays = {str(i): np.asarray(leaf) for i, leaf in enumerate(leaves)}
    return digest(str(structure).encode(), digest_arrays(arrays).encode())
