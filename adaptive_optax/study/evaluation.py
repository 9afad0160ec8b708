"""What is judged: the trained parameters, or parameters derived from them, such as their average."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_optax._core.checks import check_integer
from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax.study.task import Task
from adaptive_optax.transforms.averaging import averaged_parameters

Arm = Callable[[Any, int], optax.GradientTransformation]
"""A way to train: `arm(peak_learning_rate, total_steps) -> transformation`. The rate may be traced."""

Evaluate = Callable[..., Any]
"""What is judged in place of the trained parameters, as a function of the end of a trial; see `judged_by`."""

OFFERED = ("model_state", "task", "train")  # keyword arguments that `evaluate` may take
BATCHES = 32  # training batches for recomputing batch statistics


@dataclasses.dataclass(frozen=True)
class EvaluatedArm:
    """An arm that determines which parameters are judged, so that calls of `compare` need not.

    The decorator `judged_by` makes one. An arm may also be any function with an attribute `evaluate`.

    Attributes:
        build: `build(learning_rate, total_steps) -> transformation`.
        evaluate: Returns what is judged, as in `compare`. If it does not take the model state, batch
            statistics are recomputed for the parameters it returns.

    Examples:
        >>> import adaptive_optax as ao, optax
        >>> from adaptive_optax import study
        >>> def second_half(learning_rate, total_steps):
        ...     return optax.chain(ao.adam(learning_rate), ao.average_parameters(power=0.0))
        >>> arm = study.EvaluatedArm(second_half, ao.averaged_parameters)
        >>> tx = arm(1e-3, 100)
    """

    build: Arm
    evaluate: Evaluate

    def __call__(self, learning_rate: Any, total_steps: int) -> optax.GradientTransformation:
        """Builds the transformation."""
        return self.build(learning_rate, total_steps)

    def __post_init__(self) -> None:
        if not callable(self.build):
            raise ValueError(f"build must be a function of (learning_rate, total_steps), got {self.build!r}.")
        check_evaluate("evaluate", self.evaluate)

    @property
    def __name__(self) -> str:
        return getattr(self.build, "__name__", "<arm>")


def judged_by(evaluate: Evaluate) -> Callable[[Arm], EvaluatedArm]:
    """Returns a decorator for an arm that is judged by something other than its trained parameters.

    Args:
        evaluate: `evaluate(params, opt_state) -> params` to be judged, as in `compare`. Batch statistics are
            recomputed for the parameters it returns. To choose the batch statistics too, take the model state
            as a third argument: the result of `evaluate(params, opt_state, model_state)` is judged unchanged.

    Examples:
        >>> import adaptive_optax as ao, jax, optax
        >>> from adaptive_optax import study
        >>> @study.judged_by(lambda params, opt_state: jax.tree.map(lambda x: x / 2, params))
        ... def halved(learning_rate, total_steps):
        ...     return ao.sgd(learning_rate)
        >>> halved.__name__
        'halved'
    """
    check_evaluate("evaluate", evaluate)
    return lambda arm: EvaluatedArm(arm, evaluate)


@dataclasses.dataclass(frozen=True)
class _Recomputed:
    """The result of `recompute_batch_statistics`; equal for equal arguments, so that it compiles once."""

    evaluate: Evaluate
    batches: int

    def __call__(self, params: Any, opt_state: Any, model_state: Any, *, task: Task, train: Any) -> Any:
        judged, model_state, _ = apply_evaluate(self.evaluate, task, params, opt_state, model_state, train)
        if is_same(judged, params) or not has_statistics(model_state):
            return judged, model_state  # the statistics, if any, already belong to these parameters
        return judged, _recomputed(task, judged, model_state, train, self.batches)


def recompute_batch_statistics(
    evaluate: Evaluate = averaged_parameters, *, batches: int = BATCHES
) -> Evaluate:
    r"""Returns an `evaluate` that also recomputes batch statistics for the parameters it judges.

    Batch statistics gathered in training belong to the trained parameters. Used with averaged parameters,
    they make a network with batch normalisation worse. This runs training batches through the network with
    the judged parameters, as `torch.optim.swa_utils.update_bn` does. It is the default, with 32 batches, for
    arms named `:averaged`, for arms that keep an average and have no `evaluate`, and for arms whose
    `evaluate` does not take the model state.

    With `Task.batch_statistics`, which `nnx_task` sets, the statistics become the plain mean over the
    batches:

    $$
    s_i = \tfrac{i}{i+1} s_{i-1} + \tfrac{1}{i+1} b_i, \quad i = 0 \dots n-1.
    $$

    Without it, `loss` runs on one batch after another, starting from the state in which training ended, and
    the statistics change as in training: with momentum m, a share $m^n$ of the old ones remains, so
    choose n above $3 / (1-m)$. If `evaluate` returns the trained parameters, nothing is recomputed.

    Args:
        evaluate: Returns the parameters to be judged; the average by default.
        batches: n, the number of training batches per evaluation, at least 1; at most one epoch is used. They
            are spread evenly over the training data.

    Raises:
        ValueError: If `evaluate` is not such a function or `batches` is out of range.

    Examples:
        >>> from adaptive_optax import study
        >>> evaluate = study.recompute_batch_statistics(batches=100)
    """
    check_evaluate("evaluate", evaluate)
    check_integer("batches", batches, f"[1, {2**31 - 1}]")
    return _Recomputed(evaluate, int(batches))


def declared(arm: Any, attribute: str) -> Any:
    """Returns what an arm declares as an attribute, or None.

    Looks inside `functools.partial`, `functools.wraps` and `EvaluatedArm`.
    """
    seen = set()
    while arm is not None and id(arm) not in seen:
        seen.add(id(arm))
        if (found := getattr(arm, attribute, None)) is not None:
            return found
        if isinstance(arm, functools.partial):
            arm = arm.func
        else:
            arm = arm.build if isinstance(arm, EvaluatedArm) else getattr(arm, "__wrapped__", None)
    return None


def without_task(name: str, evaluate: Evaluate) -> Evaluate:
    """Returns an `evaluate` in the form that a training function calls, with parameters and state alone.

    Raises:
        ValueError: If it needs more; the message begins with the name.
    """
    while isinstance(evaluate, _Recomputed):  # the batch statistics are the function's own
        evaluate = evaluate.evaluate
    check_evaluate(name, evaluate)
    try:
        inspect.signature(evaluate).bind(None, None)
    except TypeError as error:
        raise ValueError(
            f"{name} must be a function of (params, opt_state) for a training function, which has no task; "
            f"got one of {inspect.signature(evaluate)}."
        ) from error
    except ValueError:  # written in C
        pass
    return evaluate


def keeps_average(arm: Arm, rate: float, steps: int) -> bool:
    """Whether an arm builds a transformation that keeps an average of the parameters."""
    params = {"parameter": jnp.zeros((2, 2))}
    try:
        tx = arm(rate, steps)
        return isinstance(tx, optax.GradientTransformation) and (
            averaged_parameters(params, tx.init(params)) is not params
        )
    except Exception:  # it needs the user's own parameters, or a worker's devices
        return False


def schedule_free_point(params: Any, opt_state: Any) -> Any:
    """Returns the averaged point of `optax.contrib.schedule_free`, where its authors evaluate."""
    return optax.contrib.schedule_free_eval_params(opt_state, params)


def evaluated(
    evaluate: Evaluate | None, task: Task, params: Any, opt_state: Any, model_state: Any, train: Any
) -> tuple[Any, Any]:
    """Returns the parameters and the model state that are judged.

    The batch statistics of training fit the trained parameters only. If `evaluate` returns others and does
    not decide about the model state, they are recomputed.

    Raises:
        ValueError: As `apply_evaluate`.
    """
    if evaluate is None:
        return params, model_state
    judged, new_state, decides = apply_evaluate(evaluate, task, params, opt_state, model_state, train)
    if decides or is_same(judged, params) or not has_statistics(model_state):
        return judged, new_state
    return judged, _recomputed(task, judged, model_state, train, BATCHES)


def apply_evaluate(
    evaluate: Evaluate, task: Task, params: Any, opt_state: Any, model_state: Any, train: Any
) -> tuple[Any, Any, bool]:
    """Returns the parameters and model state from `evaluate`, and whether it decides about the latter.

    Raises:
        ValueError: If `evaluate` returns neither parameters like `params` nor these with a model state.
    """
    third, names = _asked_for(evaluate)
    offered = {"model_state": model_state, "task": task, "train": train}
    arguments = (params, opt_state, model_state) if third else (params, opt_state)
    result = evaluate(*arguments, **{name: offered[name] for name in names})
    if _shapes(result) == _shapes(params):
        return result, model_state, third or "model_state" in names
    if isinstance(result, tuple) and len(result) == 2:
        if _shapes(result[0]) == _shapes(params) and _shapes(result[1]) == _shapes(model_state):
            return *result, True
    raise ValueError(
        "evaluate must return parameters with the structure and shapes of init's, or a pair of these and the "
        f"model state; got {type(result).__name__} with {_differing(result, params)}."
    )


def is_same(a: Any, b: Any) -> bool:
    """Whether two trees hold the same array objects, not merely equal values."""
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def has_statistics(model_state: Any) -> bool:
    """Whether the model state has floating values, which training batches may change, unlike counts."""
    return any(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(model_state))


def check_evaluate(name: str, evaluate: Any) -> None:
    """Refuses anything but a function of (params, opt_state) whose other arguments can be supplied."""
    if not callable(evaluate):
        raise ValueError(f"{name} must be a function of (params, opt_state), got {evaluate!r}.")
    _asked_for(evaluate, name)


def _asked_for(evaluate: Evaluate, name: str = "evaluate") -> tuple[bool, list[str]]:
    """Whether `evaluate` takes the model state as a third argument, and which keywords it takes."""
    try:
        parameters = list(inspect.signature(evaluate).parameters.values())
    except (TypeError, ValueError):  # written in C
        return False, []
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    third = positional[2:3]
    takes_state = bool(third) and (third[0].default is third[0].empty or third[0].name == "model_state")
    takes_two = len(positional) >= 2 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    unknown = [p.name for p in positional[3:] if p.default is p.empty]
    unknown += [p.name for p in keywords if p.name not in OFFERED and p.default is p.empty]
    if unknown or not takes_two:
        raise ValueError(
            f"{name} must be a function of (params, opt_state), optionally with model_state as a third "
            f"argument and task and train by keyword; got one of {inspect.signature(evaluate)}."
        )
    return takes_state, [p.name for p in keywords if p.name in OFFERED]


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path: jnp.shape(leaf) for path, leaf in paths_and_leaves(tree)}


def _differing(result: Any, params: Any) -> str:
    found, expected = _shapes(result), _shapes(params)
    for path in [*expected, *found]:
        if found.get(path) != expected.get(path):
            which = "nothing" if path not in found else f"shape {found[path]}"
            wanted = "nothing" if path not in expected else f"shape {expected[path]}"
            return f"{which} at {path!r} where init has {wanted}"
    return "the leaves of init"


def _recomputed(task: Task, params: Any, model_state: Any, train: Any, batches: int) -> Any:
    """The model state after running the training batches, with unchanged parameters."""
    size, count = task.batch_size, min(batches, task.steps_per_epoch)
    # Spread every batch over all the data, which may be sorted.
    samples = np.arange(count * size) * task.train_count // (count * size)
    samples = jnp.asarray(samples.reshape(size, count).T, jnp.int32)

    def pass_batch(i, state):
        batch = jax.tree.map(lambda x: x[samples[i]], train)
        key = jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), i)
        if task.batch_statistics is None:
            return task.training_loss(params, state, batch, key)[1]
        seen = i.astype(jnp.float32)
        return task.batch_statistics(params, state, batch, key, seen / (seen + 1))

    return jax.lax.fori_loop(0, count, pass_batch, model_state)


# Judges the average if an arm keeps one, otherwise the trained parameters.
AVERAGE_IF_KEPT = recompute_batch_statistics()
