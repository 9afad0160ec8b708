"""Describes which parameters of an arm are judged: the trained ones, or ones derived from its state."""

from __future__ import annotations

from typing import NamedTuple

import jax

from adaptive_optax.study.evaluation import (
    Arm,
    Evaluate,
    apply_evaluate,
    evaluated,
    has_statistics,
    is_same,
    schedule_free_point,
)
from adaptive_optax.study.task import Task
from adaptive_optax.transforms.averaging import averaged_parameters


class Judged(NamedTuple):
    """What an arm is judged by, and how to obtain the same parameters after the user's own training.

    Attributes:
        by: What the arm is judged by.
        then: What to do after training; "" if training ends with the judged parameters.
        code: The same as a statement; "" if there is none.
    """

    by: str
    then: str = ""
    code: str = ""


TRAINED = Judged("its trained parameters")


def describe_judged(task: Task, arm: Arm, evaluate: Evaluate | None, rate: float, steps: int) -> Judged:
    """Describes what `evaluate` returns for an arm, by tracing it on the state before training."""
    if evaluate is None:
        return TRAINED
    traced: list[tuple[bool, bool, bool, bool]] = []

    def trace(key, train):
        params, model_state = task.start(key)
        opt_state = arm(rate, steps).init(params)
        given = task, params, opt_state, model_state, train
        judged, new_state = evaluated(evaluate, *given)
        *_, decides = apply_evaluate(evaluate, *given)
        same = is_same(judged, params), is_same(new_state, model_state)
        traced.append((*same, has_statistics(model_state), decides))
        return judged

    jax.eval_shape(trace, jax.random.key(0), task.train)
    same_params, same_state, statistics, decides = traced[-1]
    if same_params and same_state:
        return TRAINED
    function = getattr(evaluate, "evaluate", evaluate)  # without `recompute_batch_statistics` around it
    renewed = statistics and not same_state
    of_training = ", with the batch statistics of training" * (statistics and same_state)
    return _described(function, renewed, of_training, function is not evaluate or not decides)


def describe_evaluate(evaluate: Evaluate | None) -> Judged:
    """Describes what `evaluate` returns where there is no task, and so no batch statistics either."""
    return TRAINED if evaluate is None else _described(evaluate)


def _described(
    function: Evaluate, renewed: bool = False, of_training: str = "", by_default: bool = False
) -> Judged:
    """Describes what a function returns.

    Args:
        function: The function.
        renewed: Whether the batch statistics are not those of training.
        of_training: Words about batch statistics that are.
        by_default: Whether renewed ones are recomputed, rather than chosen by the function.
    """
    if function is averaged_parameters:
        recomputed = ", with batch statistics recomputed for it" * renewed
        renew = "; recompute its batch statistics, as help(ao.swap_averaged) shows" * renewed
        return Judged(
            f"the average of its parameters{recomputed}{of_training}",
            f"use the average of the parameters, which was judged{of_training}{renew}",
            "averaged = ao.swap_averaged(model, opt_state)  # after training",
        )
    if function is schedule_free_point:
        recomputed = ", with batch statistics recomputed for it" * renewed
        return Judged(
            f"its schedule-free average{recomputed}",
            "use the schedule-free average, which was judged"
            + "; recompute its batch statistics with training batches" * renewed,
            "averaged = optax.contrib.schedule_free_eval_params(opt_state, params)  # after training",
        )
    name = getattr(function, "__name__", "")
    result = f"the result of {name if name.isidentifier() else 'its evaluate'} for"
    recomputed = ", with batch statistics recomputed for them" * (renewed and by_default)
    end = recomputed + of_training
    return Judged(f"{result} its parameters{end}", f"use {result} the parameters{end}, which was judged")
