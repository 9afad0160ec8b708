"""Time of a jitted update + apply against optax on the same chain and tree.

Both run alternately in one process, each donating its parameters and state as a training loop does. Prints,
for each tree and chain, the median of the times and the median of the paired ratios (below 1: faster than
optax) with its quartiles, and the ratio of the times that tracing and compiling took.

    python -m benchmarks.update_step [--runs 40] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
import rich.progress
import rich.table

import adaptive_optax as ao
from benchmarks.setting import publish

Shapes = dict[str, tuple[int, ...]]


def transformer_shapes(layers: int = 12, width: int = 384, vocabulary: int = 8192) -> Shapes:
    """The leaves of a small transformer: one embedding and eight leaves a layer."""
    shapes: Shapes = {"embedding": (vocabulary, width)}
    for i in range(layers):
        shapes |= {f"{i}/{name}": (width, width) for name in ("query", "key", "value", "out")}
        shapes |= {f"{i}/up": (width, 4 * width), f"{i}/down": (4 * width, width)}
        shapes |= {f"{i}/norm_1": (width,), f"{i}/norm_2": (width,)}
    return shapes


TREES: dict[str, Callable[[], Shapes]] = {
    "one leaf of 16 M": lambda: {"leaf": (4096, 4096)},
    "transformer, 97 leaves": transformer_shapes,
    "400 small leaves": lambda: {str(i): (64, 64) if i % 2 else (64,) for i in range(400)},
}

CHAINS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "adamw": (lambda: ao.adamw(1e-3), lambda: optax.adamw(1e-3)),
    "clip + adamw": (
        lambda: optax.chain(ao.clip_by_global_norm(1.0), ao.adamw(1e-3)),
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
    ),
    # optax has no global form: its rmsprop stands beside both.
    "rmsprop": (lambda: ao.rmsprop(1e-3), lambda: optax.rmsprop(1e-3)),
    "global_rmsprop": (lambda: ao.global_rmsprop(1e-3), lambda: optax.rmsprop(1e-3)),
}


class Contender:
    """One compiled step with its own parameters and state."""

    def __init__(self, tx: optax.GradientTransformation, shapes: Shapes, gradients: Any):
        params = {name: jnp.full(shape, 0.1) for name, shape in shapes.items()}
        self._gradients = gradients

        def step(params, state, gradients):
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        start = time.perf_counter()
        self._carry = (params, tx.init(params))
        self._step = jax.jit(step, donate_argnums=(0, 1)).lower(*self._carry, gradients).compile()
        self.compile_seconds = time.perf_counter() - start

    def seconds(self) -> float:
        """Runs one step and returns its time."""
        start = time.perf_counter()
        self._carry = jax.block_until_ready(self._step(*self._carry, self._gradients))
        return time.perf_counter() - start


def compare(chain: str, tree: str, runs: int) -> dict[str, Any]:
    """Times one chain on one tree, ours and optax's alternating."""
    shapes = TREES[tree]()
    keys = jax.random.split(jax.random.key(0), len(shapes))
    gradients = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    ours, theirs = (Contender(make(), shapes, gradients) for make in CHAINS[chain])
    pairs = []
    for i in range(runs + 4):  # who goes first alternates
        first = (ours, theirs)[i % 2].seconds()
        second = (theirs, ours)[i % 2].seconds()
        pairs.append((second, first) if i % 2 else (first, second))
    pairs = pairs[4:]  # the first ones warm the caches up
    ratios = [a / b for a, b in pairs]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "chain": chain,
        "tree": tree,
        "parameters": sum(int(np.prod(shape)) for shape in shapes.values()),
        "ours_ms": 1e3 * statistics.median(a for a, _ in pairs),
        "optax_ms": 1e3 * statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [low, high],
        "compile_ours_s": ours.compile_seconds,
        "compile_optax_s": theirs.compile_seconds,
    }


def main() -> None:
    """Prints the table and, if asked, writes it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=40, help="timed pairs of steps a row (at least 30)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    if args.runs < 30:
        parser.error(f"--runs must be at least 30, got {args.runs}.")

    table = rich.table.Table("tree", "chain", "ms", "optax, ms", "ratio", "quartiles", "compile")
    rows = []
    for tree in rich.progress.track(TREES, "measuring"):
        for chain in CHAINS:
            row = compare(chain, tree, args.runs)
            rows.append(row)
            low, high = row["ratio_quartiles"]
            compiling = row["compile_ours_s"] / row["compile_optax_s"]
            numbers = (f"{row['ours_ms']:.2f}", f"{row['optax_ms']:.2f}", f"{row['ratio']:.2f}")
            table.add_row(tree, chain, *numbers, f"{low:.2f}-{high:.2f}", f"{compiling:.2f}")
    rich.print(table)
    publish("update_step", rows, args.json)


if __name__ == "__main__":
    main()
