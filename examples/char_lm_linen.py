"""A language model in Flax linen that survives being killed, and can be trained on when it has ended.

A small transformer learns the prose of Python's manual: AdamW under the one-cycle policy, two micro-batches
for each of its steps, bfloat16 parameters rounded at random, telemetry, and with `--int8` moments of 8 bits.

    pip install -e .[examples]
    python examples/char_lm_linen.py

It takes about a minute on two CPU cores. Kill it at any time: the same command goes on and ends with the same
bits. When it has ended, a larger `--steps` trains on. `--out` receives checkpoints/, curve.csv and curve.png.
For your own text, replace `prose_windows`, which returns codes [window, character], and `ALPHABET`.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

import adaptive_optax as ao
from adaptive_optax.integrations.orbax import Checkpoints
from adaptive_optax.study.tasks import ALPHABET, prose_windows

COLUMNS = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
CONTEXT, BATCH, MICRO_BATCHES, PEAK, EVALUATE_EVERY, PLANS = 64, 32, 2, 4e-3, 100, 16


class Transformer(nn.Module):
    """A decoder of pre-norm blocks: bfloat16 parameters, float32 arithmetic."""

    width: int
    layers: int

    @nn.compact
    def __call__(self, codes: jax.Array, train: bool) -> jax.Array:
        """Returns the logits of the next character at every position."""
        kind: Any = {"param_dtype": jnp.bfloat16, "dtype": jnp.float32}
        place = nn.Embed(CONTEXT, self.width, **kind)(jnp.arange(codes.shape[-1]))
        x = nn.Embed(len(ALPHABET), self.width, **kind)(codes) + place
        for _ in range(self.layers):
            attend = nn.MultiHeadDotProductAttention(4, **kind)
            x = x + attend(nn.LayerNorm(**kind)(x), mask=nn.make_causal_mask(codes))
            wide = nn.gelu(nn.Dense(4 * self.width, **kind)(nn.LayerNorm(**kind)(x)))
            x = x + nn.Dropout(0.1, deterministic=not train)(nn.Dense(self.width, **kind)(wide))
        return nn.Dense(len(ALPHABET), **kind)(nn.LayerNorm(**kind)(x))


def schedules(plan: np.ndarray) -> ao.OneCycle:
    """One cycle for the first plan; later ones stretch what was left of it, or begin a new hat."""
    cycle, planned = ao.one_cycle(PEAK, int(plan[0, 1])), int(plan[0, 1])
    for at, total in plan[1:].tolist():
        if total:  # a finished run moves half as far per step as one at half the peak would
            integral = PEAK / 4 * (total - at) if at >= planned else None
            cycle, planned = ao.replan(cycle, at=at, total_steps=total, integral=integral), total
    return cycle


def optimizer(cycle: ao.OneCycle, storage: str) -> optax.GradientTransformation:
    """AdamW with everything around it."""
    kinds: Any = {"mu_storage": storage, "nu_storage": storage, "mask": ao.decay_mask}
    adamw = ao.adamw(cycle.learning_rate, b1=cycle.momentum, weight_decay=0.1, **kinds)
    measured = ao.telemetry(optax.chain(ao.clip_by_global_norm(1.0), adamw, ao.stochastic_rounding()))
    return ao.accumulate_gradients(measured, MICRO_BATCHES)


def command_line() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Trains a character model that survives being killed.")
    parser.add_argument("--steps", type=int, default=1000, help="micro-batches in all, an even number")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--int8", action="store_true", help="keep Adam's moments in 8 bits")
    parser.add_argument("--width", type=int, default=64, help="a multiple of 4")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--from-step", type=int, help="go back to this checkpoint instead of the newest")
    parser.add_argument("--out", type=Path, default=Path("out/char_lm"))
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Trains, or goes on; then evaluates, draws and prints."""
    parser = command_line()
    given = parser.parse_args(arguments)
    uneven = given.steps % MICRO_BATCHES or given.width % 4
    if uneven or min(given.steps / 4, given.width / 4, given.save_every, given.layers) < 1:
        parser.error("--steps must be even, at least 4, --width a multiple of 4, --save-every, --layers > 0.")
    model, storage = Transformer(given.width, given.layers), "int8" if given.int8 else "float32"
    train, validation = map(jnp.asarray, prose_windows(CONTEXT))  # codes [window, CONTEXT + 1]
    params = model.init(jax.random.key(0), validation[:1, :-1], train=False)
    emissions, plan = given.steps // MICRO_BATCHES, np.zeros((PLANS, 2), np.int32)
    plan[0, 1] = emissions  # the plans of the rate, rows of (from, to), are in the checkpoint too
    start = {"params": params, "opt": optimizer(schedules(plan), storage).init(params), "plan": plan}
    checkpoints = Checkpoints(given.out / "checkpoints")
    try:
        first, run = checkpoints.restore(start, step=given.from_step) or (0, start)
    except ValueError as error:
        sys.exit(f"{error}\nFor an older checkpoint, add --from-step STEP; for another model, another --out.")
    used = int((run["plan"][:, 1] > 0).sum())
    if given.steps < first:
        sys.exit(f"--steps must be at least {first}, the steps of the checkpoint, got {given.steps}.")
    if emissions != run["plan"][used - 1, 1] and given.steps > first:
        if used == PLANS:
            sys.exit(f"--steps can be changed {PLANS - 1} times, and was.")
        run["plan"][used] = first // MICRO_BATCHES, emissions
        print(
            f"The run of {MICRO_BATCHES * run['plan'][used - 1, 1]} steps is planned anew for {given.steps}."
        )
    cycle = schedules(run["plan"])
    tx, rate = optimizer(cycle, storage), jax.jit(cycle.learning_rate)

    def bits(params, codes, key=None):
        rngs = None if key is None else {"dropout": key}
        logits: Any = model.apply(params, codes[:, :-1], train=key is not None, rngs=rngs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, codes[:, 1:].astype(int))
        return losses.mean() / math.log(2)

    @jax.jit
    def step(params, state, i):
        key, dropout = jax.random.split(jax.random.fold_in(jax.random.key(1), i))
        batch = train[jax.random.randint(key, (BATCH,), 0, len(train))]
        loss, grads = jax.value_and_grad(bits)(params, batch, dropout)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    evaluate = jax.jit(lambda params: bits(params, validation))

    @jax.jit
    def next_code(params, seen, i):
        logits: Any = model.apply(params, seen[None], train=False)
        return jax.random.categorical(jax.random.fold_in(jax.random.key(2), i), logits[0, -1] / 0.7)

    curve = given.out / "curve.csv"  # what is there of later steps than the checkpoint's comes again
    lines = curve.read_text().splitlines() if first and curve.exists() else []
    rows = [r for x in lines if len(r := x.split(",")) == 4 and r[0].isdigit() and int(r[0]) <= first]
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    end = "begins" if not first else "resumed" if first < given.steps else "finished; raise --steps to go on"
    print(f"Step {first} of {given.steps}: {end}.", flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    partial = curve.with_suffix(".partial")
    partial.write_text("".join(",".join(row) + "\n" for row in rows))
    partial.replace(curve)
    with checkpoints, curve.open("a", buffering=1) as file, Progress(*COLUMNS) as progress:
        bar = progress.add_task("", total=given.steps, completed=first)
        for i in range(first, given.steps):
            run["params"], run["opt"], loss = step(run["params"], run["opt"], i)
            done, now = i + 1, float(rate(i // MICRO_BATCHES))
            due = done % EVALUATE_EVERY == 0 or done == given.steps
            checked = f"{evaluate(run['params']):.4f}" if due else ""
            rows.append([str(done), f"{loss:.4f}", f"{now:.3g}", checked])
            file.write(",".join(rows[-1]) + "\n")
            progress.update(bar, completed=done, description=f"{loss:.3f} bits per character, rate {now:.2g}")
            if done % given.save_every == 0 or done == given.steps or signals:
                checkpoints.save(done, run)
            if signals and done < given.steps:
                progress.stop()
                checkpoints.close()
                print(f"Stopped after step {done} and saved it; the same command goes on from there.")
                return

    text = np.asarray(validation[0, :CONTEXT])
    for i in range(200):
        text = np.append(text, next_code(run["params"], text[-CONTEXT:], i))
    crc = zlib.crc32(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(run["params"])))
    norm = ao.get_telemetry(run["opt"]).gradient_norm
    print(f"Validation: {evaluate(run['params']):.4f} bits per character, gradient {norm:.2g}. A sample:")
    print("".join(ALPHABET[code] for code in text))
    print(f"Checksum of the parameters: {crc:08x}")
    draw([[float(x or "nan") for x in row] for row in rows]).savefig(given.out / "curve.png", dpi=160)


def draw(rows: list[list[float]]) -> Figure:
    """Training and validation above, the learning rate below."""
    table = np.array(rows)
    figure = Figure(figsize=(7, 5), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    above.plot(table[:, 0], table[:, 1], lw=0.5, alpha=0.6, label="training, each batch")
    checked = table[np.isfinite(table[:, 3])]
    above.plot(checked[:, 0], checked[:, 3], "o-", ms=3, label="validation")
    above.set(ylabel="bits per character")
    above.legend()
    below.plot(table[:, 0], table[:, 2])
    below.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    return figure


if __name__ == "__main__":
    main()
