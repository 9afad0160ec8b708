"""For how many steps a schedule was made: an attribute of the schedule, which is a plain function."""

from __future__ import annotations

from typing import Any

import optax

ENDLESS = -1  # made for no length in particular

_ATTRIBUTE = "planned_steps"


def with_length(schedule: optax.Schedule, steps: int) -> optax.Schedule:
    """Marks a schedule as made for a number of steps, or as `ENDLESS`; returns it."""
    setattr(schedule, _ATTRIBUTE, steps)
    return schedule


def length_of(schedule: Any) -> int | None:
    """Returns the number of steps for which a schedule was made, `ENDLESS`, or None if it is unknown."""
    return getattr(schedule, _ATTRIBUTE, None)
