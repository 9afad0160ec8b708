"""What takes part in a comparison of update steps: optimizers of optax's interface, and of PyTorch."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

import adaptive_optax as ao
from benchmarks.trees import Shapes, normal, on_device, size

HAS_TORCH = importlib.util.find_spec("torch") is not None
# The sets of arrays that a contender goes round are together larger than any cache, as is what a network
# computes between two updates.
_ROTATED_BYTES = 256 * 2**20
_MOST_SETS = 16


def number_of_sets(shapes: Shapes) -> int:
    """How many sets of parameters, gradients and Adam's state a contender goes round."""
    return int(np.clip(_ROTATED_BYTES // (16 * size(shapes)), 1, _MOST_SETS))


def gradient_sets(shapes: Shapes, dtype: str = "float32") -> list[dict[str, jax.Array]]:
    """Draws the gradients that all contenders share, a tree a set."""
    return [on_device(normal(shapes, seed), dtype) for seed in range(number_of_sets(shapes))]


class Step:
    """A compiled update with `optax.apply_updates`, which donates parameters and state as training does."""

    def __init__(
        self,
        make: Callable[[], optax.GradientTransformation],
        shapes: Shapes,
        gradients: Sequence[Any],
        *,
        dtype: str = "float32",
        options: dict[str, Any] | None = None,
        body: Callable[[Any, Any, Any], tuple[Any, Any]] | None = None,
    ):
        """Compiles the step.

        Args:
            make: Makes the optimizer.
            shapes: The tree.
            gradients: The trees of gradients to go round.
            dtype: Of the parameters.
            options: What `jax.jit` takes as `compiler_options`.
            body: `body(params, state, gradients)` in place of the update.
        """
        tx = make()
        start = normal(shapes, seed=100, scale=0.1)
        self._sets = []
        for gradient in gradients:
            params = on_device(start, dtype)
            self._sets.append(([params, jax.block_until_ready(tx.init(params))], gradient))
        (params, state), gradient = self._sets[0]
        self._jit = lambda: _jitted(make(), body, options)
        self._arguments = jax.eval_shape(lambda *x: x, params, state, gradient)
        self._compiled = self._jit().lower(params, state, gradient).compile()
        self._turns = itertools.cycle(self._sets)
        self._parameters, self._leaves = size(shapes), len(shapes)
        self._state_bytes = ao.state_bytes(state)

    def __call__(self) -> Any:
        """Runs a step on the next set."""
        carry, gradient = next(self._turns)
        carry[:] = self._compiled(*carry, gradient)
        return carry

    def preparation_seconds(self) -> dict[str, float]:
        """Traces, lowers and compiles anew, as in a fresh process."""
        jax.clear_caches()
        began = time.perf_counter()
        traced = self._jit().trace(*self._arguments)
        traced_at = time.perf_counter()
        lowered = traced.lower()
        lowered_at = time.perf_counter()
        lowered.compile()
        compiled_at = time.perf_counter()
        return {
            "trace": traced_at - began,
            "lower": lowered_at - traced_at,
            "compile": compiled_at - lowered_at,
        }

    def properties(self) -> dict[str, float]:
        """Kernels a leaf; bytes of state, and at the peak of a step, for each parameter."""
        memory = self._compiled.memory_analysis()
        peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        return {
            "kernels_a_leaf": kernels(self._compiled.as_text()) / self._leaves,
            "state_bytes_a_parameter": self._state_bytes / self._parameters,
            "peak_bytes_a_parameter": (peak - memory.alias_size_in_bytes) / self._parameters,
        }


def _jitted(tx: Any, body: Any, options: dict[str, Any] | None) -> Any:
    def step(params, state, gradients):
        if body is not None:
            return body(params, state, gradients)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1), compiler_options=options)


def preparation(steps: dict[str, Step], repeats: int) -> dict[str, dict[str, float]]:
    """Returns the medians of the seconds that tracing, lowering and compiling take, the steps in turn."""
    runs = [{name: step.preparation_seconds() for name, step in steps.items()} for _ in range(repeats)]
    return {
        name: {part: statistics.median(run[name][part] for run in runs) for part in runs[0][name]}
        for name in steps
    }


_NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}


def kernels(hlo: str) -> int:
    """Counts what the entry computation of an optimized module runs: fusions, reductions, copies, calls."""
    entry = hlo[hlo.index("\nENTRY ") :]
    entry = entry[: entry.index("\n}")]
    opcodes = re.findall(r"^\s+(?:ROOT )?%?\S+ = (?:\(.*?\)|\S+) ([a-z][\w-]*)\(", entry, re.MULTILINE)
    return sum(opcode not in _NO_KERNEL for opcode in opcodes)


def torch_module() -> Any:
    """Imports PyTorch, which need not be installed."""
    return importlib.import_module("torch")


class TorchStep:
    """PyTorch's optimizer on the same tree, its gradients already there."""

    def __init__(
        self,
        make: Callable[[Any], Any],
        shapes: Shapes,
        gradients: Sequence[Any],
        *,
        max_norm: float | None = None,
    ):
        """Makes an optimizer a set.

        Args:
            make: Makes the optimizer of a list of parameters.
            shapes: The tree.
            gradients: The trees of gradients to go round.
            max_norm: The norm to clip at first, if any.
        """
        torch = torch_module()
        torch.set_num_threads(os.cpu_count() or 1)
        self._torch, self._max_norm = torch, max_norm
        device = "cuda" if torch.cuda.is_available() else "cpu"
        start = normal(shapes, seed=100, scale=0.1)
        sets = []
        for gradient in gradients:
            params = [torch.nn.Parameter(torch.tensor(x, device=device)) for x in start.values()]
            for p, g in zip(params, gradient.values(), strict=True):
                p.grad = torch.tensor(np.asarray(g), device=device)
            sets.append((params, make(params)))
        self._turns = itertools.cycle(sets)

    def __call__(self) -> None:
        """Runs a step on the next set and waits for it."""
        params, optimizer = next(self._turns)
        if self._max_norm is not None:
            self._torch.nn.utils.clip_grad_norm_(params, self._max_norm, foreach=True)
        optimizer.step()
        if self._torch.cuda.is_available():
            self._torch.cuda.synchronize()
