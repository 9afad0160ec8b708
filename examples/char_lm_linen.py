"""A language model in Flax linen that survives being killed, and can be trained on when it has ended.

A small transformer learns the prose of Python's manual character by character: AdamW under the one-cycle policy for
rate and momentum, two micro-batches a step of the optimizer, bfloat16 parameters rounded at random, telemetry, and
with `--int8` moments of 8 bits. Batches and dropout depend on nothing but the number of the step.

    pip install -e .[examples]
    python examples/char_lm_linen.py

It takes about two minutes on two CPU cores. Kill it at any time, with Ctrl-C, SIGTERM or SIGKILL: the same command
goes on from the last checkpoint and ends with the same bits. When it has ended, a larger `--steps` trains on: the
rate rises again from where it was. `--out` receives checkpoints/, curve.csv and curve.png.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import signal
import sys
import zlib
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import adaptive_optax as ao
from adaptive_optax.integrations.orbax import Checkpoints

ALPHABET = " abcdefghijklmnopqrstuvwxyz.,()'"
CONTEXT, BATCH, MICRO_BATCHES, PEAK, EVALUATE_EVERY, PLANS = 64, 32, 2, 4e-3, 100, 16


def prose() -> tuple[np.ndarray, np.ndarray]:
    """The manual's paragraphs as codes, for training and (every eighth topic) for validation, without overlap."""
    parts: dict[bool, list[str]] = {True: [], False: []}
    seen: set[str] = set()  # whole paragraphs, and what any six words of validation are
    for validation in (True, False):
        for i, name in enumerate(sorted(topics)):
            for block in re.split(r"\n\s*\n", topics[name]) if (i % 8 == 0) == validation else ():
                text = " ".join(block.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").split())
                is_prose = sum(c.isalpha() or c == " " for c in text) >= 0.88 * len(text) >= 52
                text = " ".join("".join(c if c in ALPHABET else " " for c in text).split())
                words = text.split()
                phrases = {" ".join(words[i : i + 6]) for i in range(max(len(words) - 5, 1))}
                if is_prose and text not in seen and (validation or not phrases & seen):
                    parts[validation].append(text)
                    seen |= {text} | (phrases if validation else set())
    coded = {key: np.array([ALPHABET.index(c) for c in " ".join(texts)]) for key, texts in parts.items()}
    return coded[False], coded[True]


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
    """One cycle for the first plan; from each later one on, what was left is stretched, or a new hat begins."""
    cycle, planned = ao.one_cycle(PEAK, int(plan[0, 1])), int(plan[0, 1])
    for at, total in plan[1:].tolist():
        if total:  # a finished run moves half as far per step as one at half the peak would
            integral = PEAK / 4 * (total - at) if at >= planned else None
            cycle, planned = ao.replan(cycle, at=at, total_steps=total, integral=integral), total
    return cycle


def optimizer(cycle: ao.OneCycle, storage: str) -> optax.GradientTransformation:
    """AdamW with everything around it; a moment of the rate is a step of the optimizer, not a micro-batch."""
    adamw = ao.adamw(
        cycle.learning_rate,
        b1=cycle.momentum,
        weight_decay=0.1,
        mask=ao.decay_mask,
        mu_storage=storage,
        nu_storage=storage,
    )
    measured = ao.telemetry(optax.chain(ao.clip_by_global_norm(1.0), adamw, ao.stochastic_rounding()))
    return ao.accumulate_gradients(measured, MICRO_BATCHES)


def command_line() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Trains a character model that survives being killed.")
    parser.add_argument("--steps", type=int, default=2000, help="micro-batches in all, an even number")
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
    if given.steps < 4 or given.steps % MICRO_BATCHES:
        parser.error(f"--steps must be an even number of at least 4, got {given.steps}.")
    for name in ("save_every", "layers"):
        if getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(given, name)}.")
    if given.width < 4 or given.width % 4:
        parser.error(f"--width must be a multiple of 4, got {given.width}.")
    model, storage = Transformer(given.width, given.layers), "int8" if given.int8 else "float32"
    train, validation = map(jnp.asarray, prose())
    emissions = given.steps // MICRO_BATCHES

    # What a checkpoint holds. The plans of the rate, rows of (from, to), belong to it: the run may become longer.
    params = model.init(jax.random.key(0), jnp.zeros((1, CONTEXT), int), train=False)
    plan = np.zeros((PLANS, 2), np.int32)
    plan[0, 1] = emissions
    start = {"params": params, "opt": optimizer(schedules(plan), storage).init(params), "plan": plan}
    checkpoints = Checkpoints(given.out / "checkpoints")
    try:
        first, run = checkpoints.restore(start, step=given.from_step) or (0, start)
    except ValueError as error:
        sys.exit(
            f"{error}\nTo use an older checkpoint, add --from-step STEP; for another model, another --out."
        )
    used = int((run["plan"][:, 1] > 0).sum())
    if given.steps < first:
        sys.exit(f"--steps must be at least {first}, the steps of the checkpoint, got {given.steps}.")
    if emissions != run["plan"][used - 1, 1] and given.steps > first:
        if used == PLANS:
            sys.exit(
                f"--steps was changed {PLANS - 1} times, which is as often as a checkpoint can remember."
            )
        run["plan"][used] = first // MICRO_BATCHES, emissions
        print(
            f"The run of {MICRO_BATCHES * run['plan'][used - 1, 1]} steps is planned anew for {given.steps}."
        )
    cycle = schedules(run["plan"])
    tx = optimizer(cycle, storage)
    rate = jax.jit(cycle.learning_rate)

    def bits(params, codes, train, key=None):
        logits = model.apply(params, codes[:, :-1], train=train, rngs={"dropout": key} if train else {})
        return optax.softmax_cross_entropy_with_integer_labels(logits, codes[:, 1:]).mean() / math.log(2)

    def windows(text, starts):
        return text[starts[:, None] + jnp.arange(CONTEXT + 1)]

    @jax.jit
    def step(params, state, i):
        key, dropout = jax.random.split(jax.random.fold_in(jax.random.key(1), i))
        batch = windows(train, jax.random.randint(key, (BATCH,), 0, len(train) - CONTEXT))
        loss, grads = jax.value_and_grad(bits)(params, batch, True, dropout)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    @jax.jit
    def evaluate(params):
        return bits(params, windows(validation, jnp.arange(0, len(validation) - CONTEXT, CONTEXT)), False)

    @jax.jit
    def continued(params, codes):
        def next_one(i, codes):
            seen = jax.lax.dynamic_slice(codes, (i - CONTEXT,), (CONTEXT,))
            logits = model.apply(params, seen[None], train=False)[0, -1]
            chosen = jax.random.categorical(jax.random.fold_in(jax.random.key(2), i), logits / 0.7)
            return codes.at[i].set(chosen)

        return jax.lax.fori_loop(CONTEXT, len(codes), next_one, codes)

    curve = given.out / "curve.csv"  # what is there of later steps than the checkpoint's comes again
    lines = list(csv.reader(curve.open())) if first and curve.exists() else []
    rows = [row for row in lines if len(row) == 4 and row[0].isdigit() and int(row[0]) <= first]
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    if first == given.steps:
        print(f"The run of {first} steps is finished; a larger --steps trains on.", flush=True)
    else:
        print(f"Step {first} of {given.steps}" + (": resumed." if first else "."), flush=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    given.out.mkdir(parents=True, exist_ok=True)
    with checkpoints, curve.open("w", newline="", buffering=1) as file, Progress(*columns) as progress:
        writer = csv.writer(file)
        writer.writerows(rows)
        bar = progress.add_task("", total=given.steps, completed=first)
        for i in range(first, given.steps):
            run["params"], run["opt"], loss = step(run["params"], run["opt"], i)
            done, now = i + 1, float(rate(i // MICRO_BATCHES))
            checked = (
                f"{evaluate(run['params']):.4f}" if done % EVALUATE_EVERY == 0 or done == given.steps else ""
            )
            writer.writerow(row := [str(done), f"{loss:.4f}", f"{now:.3g}", checked])
            rows.append(row)
            progress.update(bar, completed=done, description=f"{loss:.3f} bits per character, rate {now:.2g}")
            if done % given.save_every == 0 or done == given.steps or signals:
                checkpoints.save(done, run)
            if signals and done < given.steps:
                progress.stop()
                checkpoints.close()
                print(f"Stopped after step {done} and saved it; the same command goes on from there.")
                return

    text = continued(run["params"], jnp.concatenate([validation[:CONTEXT], jnp.zeros(200, int)]))
    leaves = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(run["params"]))
    print(
        f"Validation: {evaluate(run['params']):.4f} bits per character. A sample, after the first {CONTEXT}:"
    )
    print("".join(ALPHABET[code] for code in text))
    print(f"Last measured: {ao.get_telemetry(run['opt'])}" if False else "", end="")
    print(f"Checksum of the parameters: {zlib.crc32(leaves):08x}")
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
    above.legend(frameon=False)
    below.plot(table[:, 0], table[:, 2])
    below.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    return figure


if __name__ == "__main__":
    main()
