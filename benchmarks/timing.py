"""Times of contenders interleaved in one process, the bandwidth that bounds them, and when to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class OutOfTime(Exception):
    """Raised by `advance` if no time is left for what comes next."""


def in_time(rows: Iterator[Any]) -> tuple[list[Any], dict[str, str]]:
    """Returns rows as long as there is time and memory for them, and a note for the result if not for all.

    Args:
        rows: A generator that calls `advance` before each row.
    """
    kept: list[Any] = []
    try:
        for row in rows:
            kept.append(row)
    except OutOfTime:
        return kept, {"note": f"stopped after {len(kept)} rows: no time was left"}
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0][:80]
        return kept, {"note": f"stopped after {len(kept)} rows: {reason}"}
    return kept, {}


WARM_UP, FEWEST_ROUNDS = 2, 15  # rounds that do not count, and rounds that always run


def alternate(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, seconds: float = np.inf
) -> dict[str, np.ndarray]:
    """Calls the contenders in turn, in a random order for each round; returns their times in seconds.

    Each is called twice and timed the second time, so that it does not pay for what the previous one left
    behind, such as spinning threads and freed pages.

    Args:
        contenders: Functions that return something to wait for.
        rounds: The largest number of timed rounds, after the warm-up.
        seconds: After this time no further round begins, unless there were fewer than `FEWEST_ROUNDS`.
    """
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    began, rng = time.perf_counter(), np.random.default_rng(0)
    for i in range(rounds + WARM_UP):
        if i >= FEWEST_ROUNDS + WARM_UP and time.perf_counter() - began > seconds:
            break
        for name in rng.permutation(names).tolist():
            jax.block_until_ready(contenders[name]())
            start = time.perf_counter()
            jax.block_until_ready(contenders[name]())
            times[name].append(time.perf_counter() - start)
    return {name: np.array(values[WARM_UP:]) for name, values in times.items()}


def median_and_quartiles(values: np.ndarray) -> dict[str, float]:
    """Returns "median", "low" and "high" quartile."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def against(times: Mapping[str, np.ndarray], reference: str) -> dict[str, dict[str, Any]]:
    """Returns each contender's median in ms, and its ratios to the reference's time in the same round."""
    return {
        name: {
            "ms": 1e3 * float(np.median(values)),
            "ratio": median_and_quartiles(values / times[reference]),
            "rounds": len(values),
        }
        for name, values in times.items()
    }


def copy_bandwidth(size_bytes: int, rounds: int = 30) -> float:
    """Returns the best rate, in bytes per second, at which a compiled in-place x + 1 reads and writes."""
    x = jnp.ones(size_bytes // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    best = np.inf
    for _ in range(rounds):
        start = time.perf_counter()
        x = jax.block_until_ready(add(x))
        best = min(best, time.perf_counter() - start)
    return 2 * size_bytes / best
