"""Schedules made of phases, each of which goes from one value to another between two positions in the run.

Warm-up, one-cycle and cool-down schedules are lists of phases. Between two phases, and after the last one,
the schedule holds the value it has reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_optax.schedules._length import with_length
from adaptive_optax.schedules._steps import Number, as_count, as_real, steps_since


class Phase(NamedTuple):
    """One phase; `begin` and `end` are positions in steps, which need not be whole."""

    begin: Number
    end: Number
    start_value: Number
    end_value: Number
    shape: str


def _linear(done: jax.Array, left: jax.Array) -> tuple[jax.Array, jax.Array]:
    return left, done


def _cosine(done: jax.Array, left: jax.Array) -> tuple[jax.Array, jax.Array]:
    # (1 + cos(pi x)) / 2 = sin(pi (1 - x) / 2)**2, which stays accurate near 0
    return jnp.sin(np.pi / 2 * left) ** 2, jnp.sin(np.pi / 2 * done) ** 2


def _one_minus_sqrt(done: jax.Array, left: jax.Array) -> tuple[jax.Array, jax.Array]:
    root = jnp.sqrt(done)
    return left / (1.0 + root), root  # 1 - sqrt(x) = (1 - x) / (1 + sqrt(x))


# Maps the fractions of a phase that are done and left (x and 1 - x, each to full precision) to the weights of
# the start and end values, which sum to 1. All are sums of non-negative terms, so nothing cancels.
SHAPES = {"linear": _linear, "cosine": _cosine, "1-sqrt": _one_minus_sqrt}


def in_phases(phases: Sequence[Phase], total_steps: int) -> optax.Schedule:
    """Builds a schedule for a run from `phases`; the first must begin at or before step 0.

    An empty phase jumps to its end value, so that a run without warm-up starts at the peak. An empty last
    phase is skipped, so that a run that is all warm-up ends at the peak.
    """

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        count = as_count(count)
        value = as_real(phases[0].start_value)
        for phase in phases:
            elapsed, remaining = steps_since(phase.begin, count), -steps_since(phase.end, count)
            length = as_real(phase.end - phase.begin)
            divisor = jnp.where(length > 0.0, length, 1.0)
            done = jnp.where(remaining > 0.0, jnp.maximum(elapsed, 0.0) / divisor, 1.0)
            left = jnp.maximum(remaining, 0.0) / divisor
            start_weight, end_weight = SHAPES[phase.shape](done, left)
            inside = as_real(phase.start_value) * start_weight + as_real(phase.end_value) * end_weight
            entered = elapsed >= 0.0
            if phase is phases[-1]:
                entered &= length > 0.0
            value = jnp.where(entered, inside, value)
        return value

    return with_length(schedule, total_steps)
