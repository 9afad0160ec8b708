"""Ten thousand steps of a small language model with every wrapper on, a batch of NaN and a preemption.

    python -m benchmarks --suite soak

A run in one go and one that is killed half-way and begun again should end with the same bits, trace the step
once per process, reject the one bad batch, and need no more memory at the end than after a tenth of it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adaptive_optax as ao
from adaptive_optax.integrations.orbax import Checkpoints
from adaptive_optax.study.tasks import ALPHABET, prose_windows
from benchmarks.end_to_end import Transformer
from benchmarks.tables import Table, digits

MEASURES = (
    "integrations.orbax",
    "monitoring.telemetry",
    "optimizers",
    "schedules.one_cycle",
    "study.tasks",
    "transforms.averaging",
    "transforms.clipping",
    "wrappers.accumulation",
    "wrappers.error_control",
    "wrappers.freezing",
    "wrappers.loss_scale",
    "wrappers.master_weights",
    "wrappers.reject_nonfinite",
)

STEPS, QUICK_STEPS = 10_000, 40
SAVES, WATCHES = 20, 100  # checkpoints, and measurements of memory
CONTEXT, BATCH, MICRO_BATCHES = 32, 16, 2
RUNS = {"in one go": False, "killed half-way, resumed": True}


def optimizer(steps: int) -> optax.GradientTransformationExtraArgs:
    """AdamW in 8 bits under one cycle, within every wrapper that trains."""
    cycle = ao.one_cycle(0.02, max(steps // MICRO_BATCHES, 2))
    storage: Any = {"mu_storage": ao.Int8(min_size=256), "nu_storage": "bfloat16"}
    # Inside, since `value_fn` needs all parameters.
    adam = ao.freeze(ao.scale_by_adam(cycle.momentum, **storage), "positions")
    limited = ao.error_controlled(adam, cycle.learning_rate)
    decay = ao.add_decoupled_weight_decay(1e-4, mask=ao.mask_by_path("kernel$|embedding$"))
    inner = optax.chain(ao.clip_by_global_norm(1.0), limited, decay, ao.average_parameters(0.99))
    measured = ao.telemetry(ao.master_weights(inner), every=10)
    accumulated = ao.accumulate_gradients(measured, MICRO_BATCHES)
    return ao.dynamic_loss_scale(accumulated)  # contains a `reject_nonfinite`


def train(steps: int, out: Path, kill_at: int | None) -> dict[str, Any]:
    """Trains, from the newest checkpoint in `out` if there is one; a checkpoint at every twentieth."""
    windows = jnp.asarray(prose_windows(CONTEXT)[0])
    model = Transformer(vocabulary=len(ALPHABET), width=32, layers=1, heads=4)
    params = model.init(jax.random.key(0), windows[:1, :-1].astype(int))["params"]
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    tx, traced, watched = optimizer(steps), [], []

    @jax.jit
    def step(params, state, i):
        traced.append(i)
        chosen = jax.random.randint(jax.random.fold_in(jax.random.key(1), i), (BATCH,), 0, len(windows))
        codes = windows[chosen].astype(int)

        def loss(params):
            logits: Any = model.apply({"params": params}, codes[:, :-1])
            entropy = optax.softmax_cross_entropy_with_integer_labels(
                logits.astype(jnp.float32), codes[:, 1:]
            )
            return entropy.mean() * jnp.where(i == steps // 3, jnp.nan, 1.0)

        def scaled(params):
            value = loss(params)
            return ao.scale_loss(value, state), value

        (_, value), gradients = jax.value_and_grad(scaled, has_aux=True)(params)
        updates, state = tx.update(gradients, state, params, value=value, value_fn=loss)
        return optax.apply_updates(params, updates), state, value

    with Checkpoints(out) as checkpoints:
        run = {"params": params, "state": tx.init(params)}
        first, run = checkpoints.restore(run) or (0, run)
        loss = jnp.nan
        for i in range(first, steps):
            run["params"], run["state"], loss = step(run["params"], run["state"], i)
            if (i + 1) % max(steps // WATCHES, 1) == 0:
                watched.append(_memory())
            if (i + 1) % (steps // SAVES) == 0:
                checkpoints.save(i + 1, run)
            if i == kill_at and first == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    leaves = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(run))
    return {
        "checksum": f"{zlib.crc32(leaves):08x}",
        "traced": len(traced),
        "memory": watched,
        "rejected": int(ao.get_rejections(run["state"]).total),
        "loss": float(loss),
        "first": first,
    }


def _memory() -> tuple[float, int]:
    """Resident megabytes of this process, and the number of arrays that JAX holds."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(jax.live_arrays())


def measure(quick: bool, advance: Callable[[str], None]) -> dict[str, Any]:
    """Runs both, each in a process of its own, two if it is killed."""
    steps = QUICK_STEPS if quick else STEPS
    runs = {}
    for name, is_killed in RUNS.items():
        advance(f"{steps} steps {name}")
        with tempfile.TemporaryDirectory() as out:
            arguments = ["--steps", str(steps), "--out", out]
            began = time.perf_counter()
            if is_killed:
                killed = _process([*arguments, "--kill-at", str(steps * 11 // 20 + 1)])
                if killed.returncode != -signal.SIGKILL:
                    raise ValueError(f"The run was to be killed, and was not: {killed.stderr[-500:]}")
            ended = _process(arguments)
            if ended.returncode:
                raise ValueError(f"The run failed: {ended.stderr[-500:]}")
            checkpoints = Checkpoints(out).steps()
        found = json.loads(ended.stdout.splitlines()[-1])
        runs[name] = found | {"checkpoints": checkpoints, "seconds": time.perf_counter() - began}
    return {"steps": steps, "runs": runs, "seeds": {"parameters": 0, "batches": 1}}


def _process(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.soak", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)


def tables(result: dict[str, Any]) -> dict[str, Table]:
    """Returns a row for each run."""
    table = Table(
        f"{result['steps']:,} steps with every wrapper on, one batch of NaN",
        ["run", "checksum", "traced", "rejected", "MB after a tenth", "at the end", "arrays", "loss", "s"],
    )
    for name, run in result["runs"].items():
        (early, _), (late, arrays) = run["memory"][len(run["memory"]) // 10], run["memory"][-1]
        numbers = [f"{early:.0f}", f"{late:.0f}", str(arrays), digits(run["loss"]), f"{run['seconds']:.0f}"]
        table.add(name, run["checksum"], str(run["traced"]), str(run["rejected"]), *numbers)
    return {"main": table}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One process of the soak; prints what it saw as JSON.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kill-at", type=int)
    given = parser.parse_args()
    print(json.dumps(train(given.steps, given.out, given.kill_at)))
