"""Reporting to the host what caused a rejection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

OnReject = Callable[[str, str], Any]
"""A function of what was not finite and the path of its leaf, called on the host for a rejected step."""


def check_on_reject(on_reject: Any) -> None:
    """Raises unless `on_reject` is None or a function."""
    if on_reject is not None and not callable(on_reject):
        raise ValueError(f"on_reject must be None or a function of (what, path), got {on_reject!r}.")


def report_first(on_reject: OnReject, places: list[tuple[str, str]], finite: jax.Array) -> None:
    """Calls `on_reject` with the first place that is not finite, if there is one."""

    def call(finite):
        # Under vmap both branches of the cond run for all members.
        if not finite.all():
            on_reject(*places[int(finite.argmin())])

    jax.lax.cond(jnp.all(finite), lambda _: None, lambda flags: jax.debug.callback(call, flags), finite)
