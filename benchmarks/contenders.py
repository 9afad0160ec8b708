"""The contenders in a comparison of update steps: optimizers with optax's interface, and PyTorch's."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adaptive_optax as ao
from benchmarks.programs import entry_kernels
from benchmarks.trees import Shapes, constant, normal, on_device, size

HAS_TORCH = importlib.util.find_spec("torch") is not None
# The sets that a contender cycles through together exceed the caches of the relevant machines (50 MiB
# on an H200), as is what a network computes between two updates.
ROTATED_BYTES = 128 * 2**20
SEEDS = {"gradients": "the number of the set, from 0"}


def number_of_sets(shapes: Shapes, rotated_bytes: int = ROTATED_BYTES) -> int:
    """How many sets of parameters, gradients and Adam's state a contender cycles through."""
    return math.ceil(rotated_bytes / (16 * size(shapes)))  # four values of 4 bytes per parameter


def gradient_sets(shapes: Shapes, rotated_bytes: int = ROTATED_BYTES) -> list[dict[str, jax.Array]]:
    """Draws the gradients that all contenders share, one tree per set."""
    return [
        on_device(normal(shapes, seed), "float32") for seed in range(number_of_sets(shapes, rotated_bytes))
    ]


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
            gradients: The trees of gradients to cycle through.
            dtype: The dtype of the parameters.
            options: `compiler_options` for `jax.jit`.
            body: `body(params, state, gradients)`, replacing the update.
        """
        params = on_device(constant(shapes, 0.1), dtype)
        gradient, state = gradients[0], make().init(params)
        self._jit = lambda: _jitted(make(), body, options)
        self._arguments = jax.eval_shape(lambda *x: x, params, state, gradient)
        self._compiled, self.preparation = self.prepare()
        first = [params, state]
        self._sets = [(first, gradient)]
        self._sets += [(jax.tree.map(jnp.copy, first), gradient) for gradient in gradients[1:]]
        self._turns = itertools.cycle(self._sets)
        for _ in self._sets:  # a set's first step gets buffers that no step has made
            jax.block_until_ready(self())
        self._parameters, self._leaves = size(shapes), len(shapes)
        self._state_bytes = ao.state_bytes(state)

    def __call__(self) -> Any:
        """Runs a step on the next set."""
        carry, gradient = next(self._turns)
        carry[:] = self._compiled(*carry, gradient)
        return carry

    def prepare(self) -> tuple[Any, dict[str, float]]:
        """Traces, lowers and compiles from scratch; returns the program and the seconds of each stage."""
        jax.clear_caches()
        began = time.perf_counter()
        traced = self._jit().trace(*self._arguments)
        traced_at = time.perf_counter()
        lowered = traced.lower()
        lowered_at = time.perf_counter()
        compiled = lowered.compile()
        compiled_at = time.perf_counter()
        seconds = {
            "trace": traced_at - began,
            "lower": lowered_at - traced_at,
            "compile": compiled_at - lowered_at,
        }
        return compiled, seconds

    def properties(self) -> dict[str, float]:
        """Kernels per leaf; bytes per parameter of state, and at the peak of a step."""
        memory = self._compiled.memory_analysis()
        if memory is None:
            raise RuntimeError(f"The backend {jax.default_backend()!r} does not report the memory of a step.")
        peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        return {
            "kernels_per_leaf": entry_kernels(self._compiled.as_text()) / self._leaves,
            "state_bytes_per_parameter": self._state_bytes / self._parameters,
            "temp_bytes_per_parameter": memory.temp_size_in_bytes / self._parameters,
            "peak_bytes_per_parameter": (peak - memory.alias_size_in_bytes) / self._parameters,
        }


def _jitted(tx: Any, body: Any, options: dict[str, Any] | None) -> Any:
    def step(params, state, gradients):
        if body is not None:
            return body(params, state, gradients)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1), compiler_options=options)


def preparation(steps: dict[str, Step], repeats: int) -> dict[str, dict[str, float]]:
    """Returns median seconds of tracing, lowering and compiling, with the steps interleaved."""
    runs = [{name: step.preparation for name, step in steps.items()}]
    runs += [{name: step.prepare()[1] for name, step in steps.items()} for _ in range(repeats - 1)]
    return {
        name: {part: statistics.median(run[name][part] for run in runs) for part in runs[0][name]}
        for name in steps
    }


def preparation_sum(row: dict[str, Any], name: str) -> float:
    """Returns the total seconds of tracing, lowering and compiling, from a row of results."""
    return sum(row["preparation_s"][name].values())


def torch_module() -> Any:
    """Imports PyTorch, an optional dependency."""
    return importlib.import_module("torch")


class TorchStep:
    """PyTorch's optimizer on the same tree, with gradients already set."""

    def __init__(
        self,
        make: Callable[[Any], Any],
        shapes: Shapes,
        gradients: Sequence[Any],
        *,
        max_norm: float | None = None,
    ):
        """Makes one optimizer per set, and creates its state by a first step.

        Args:
            make: Makes an optimizer for a list of parameters.
            shapes: The tree.
            gradients: The trees of gradients to cycle through.
            max_norm: If given, gradients are first clipped to this norm.
        """
        torch = torch_module()
        torch.set_num_threads(os.cpu_count() or 1)
        self._torch, self._max_norm = torch, max_norm
        device = "cuda" if torch.cuda.is_available() else "cpu"
        start = constant(shapes, 0.1)
        sets = []
        for gradient in gradients:
            params = [torch.nn.Parameter(torch.tensor(x, device=device)) for x in start.values()]
            for p, name in zip(params, start, strict=True):
                p.grad = torch.tensor(np.asarray(gradient[name]), device=device)
            sets.append((params, make(params)))
        self._turns = itertools.cycle(sets)
        for _ in sets:
            self()

    def __call__(self) -> None:
        """Runs a step on the next set and waits for it."""
        params, optimizer = next(self._turns)
        if self._max_norm is not None:
            self._torch.nn.utils.clip_grad_norm_(params, self._max_norm, foreach=True)
        optimizer.step()
        if self._torch.cuda.is_available():
            self._torch.cuda.synchronize()
