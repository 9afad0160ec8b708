"""Training on many devices: data parallel or fully sharded, the same code on one process or several.

A small decoder-only transformer learns the prose of Python's manual. `--layout data` keeps the parameters
and the optimizer's state on every device and splits only the batch. `--layout full` (fully sharded, as in
FSDP and ZeRO) splits parameters and state too; each weight is gathered where it is used. `ao.state_sharding`
says where every array of the optimizer's state belongs. Meshes with Auto and with Explicit axes both work.

    pip install -e .[examples]
    python examples/sharded_training.py --layout full --axes explicit

On a CPU it simulates 8 devices, `--devices` of them; on accelerators it uses what is there. It takes about a
minute on two cores, and writes loss.png to `--out`. To train on two processes (on two hosts, give each the
same `--coordinator`), start both:

    python examples/sharded_training.py --devices 1 --processes 2 --process 0 --coordinator localhost:9911
    python examples/sharded_training.py --devices 1 --processes 2 --process 1 --coordinator localhost:9911

They end with the parameters of one process with `--devices 2`, bit for bit, as the checksum shows.

For your own model, change `texts`, `init` and `loss`, and how `sharding_of` splits a parameter.
"""

from __future__ import annotations

import argparse
import functools
import re
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.progress
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure

import adaptive_optax as ao

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz.,'()_0"
WIDTH, LAYERS, HEADS, CONTEXT, BATCH = 64, 2, 4, 64, 32


def texts() -> tuple[np.ndarray, np.ndarray]:
    """The manual as codes of `ALPHABET`, for training and validation."""
    from pydoc_data.topics import topics

    def codes(names):
        text = "\n".join(topics[name].lower() for name in names)
        kept = re.sub(f"[^{re.escape(ALPHABET)}]+", " ", text)
        return np.array([ALPHABET.index(c) for c in re.sub(r"\s+", " ", kept)], np.int32)

    names = sorted(topics)
    return codes(n for i, n in enumerate(names) if i % 8), codes(names[::8])


def init(key: jax.Array) -> dict[str, Any]:
    """The parameters; all weights have their outputs last."""
    shapes = {"embed": (len(ALPHABET), WIDTH), "place": (CONTEXT, WIDTH), "output": (WIDTH, len(ALPHABET))}
    for i in range(LAYERS):
        shapes |= {f"query{i}": (WIDTH, 3 * WIDTH), f"mix{i}": (WIDTH, WIDTH)}
        shapes |= {f"up{i}": (WIDTH, 4 * WIDTH), f"down{i}": (4 * WIDTH, WIDTH)}
    keys = jax.random.split(key, len(shapes))
    return {n: jax.random.normal(k, s) * s[0] ** -0.5 for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def normalized(x: jax.Array) -> jax.Array:
    """Root mean square normalization."""
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def loss(params: dict[str, Any], windows: jax.Array) -> jax.Array:
    """Cross-entropy in bits per character, for windows of codes [window, position]."""
    x = jax.nn.one_hot(windows[:, :-1], len(ALPHABET)) @ params["embed"] + params["place"]
    for i in range(LAYERS):
        parts = jnp.split(normalized(x) @ params[f"query{i}"], 3, axis=-1)
        q, k, v = (part.reshape(*part.shape[:2], HEADS, WIDTH // HEADS) for part in parts)
        scores = jnp.einsum("bthd,bshd->bhts", q, k) * (WIDTH // HEADS) ** -0.5
        visible = jnp.tril(jnp.ones((CONTEXT, CONTEXT), bool))
        attention = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1)
        x += jnp.einsum("bhts,bshd->bthd", attention, v).reshape(x.shape) @ params[f"mix{i}"]
        x += jax.nn.relu(normalized(x) @ params[f"up{i}"]) ** 2 @ params[f"down{i}"]
    logits = jax.nn.log_softmax(normalized(x) @ params["output"])
    wanted = jax.nn.one_hot(windows[:, 1:], len(ALPHABET))
    return -jnp.mean(jnp.sum(logits * wanted, axis=-1)) / jnp.log(2.0)


def sharding_of(x: Any, mesh: Mesh, layout: str) -> NamedSharding:
    """Splits the longest axis that all devices can share, if the layout is "full"."""
    axes = sorted(range(x.ndim), key=lambda axis: -x.shape[axis])
    axis = next((axis for axis in axes if x.shape[axis] % mesh.size == 0), None)
    if layout == "data" or axis is None:
        return NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def train(options: argparse.Namespace) -> tuple[list[float], float, int]:
    """Trains the model; returns the losses, the validation loss and a checksum of the parameters."""
    kind = AxisType.Explicit if options.axes == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(kind,))
    move = jax.sharding.reshard if options.axes == "explicit" else jax.lax.with_sharding_constraint
    whole, by_batch = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    cycle = ao.one_cycle(1e-2, options.steps)
    tx = optax.chain(
        ao.clip_by_global_norm(1.0),
        ao.adamw(cycle.learning_rate, b1=cycle.momentum, mask=ao.decay_mask),
    )

    # Every array is created where it belongs, so nothing is ever whole on one device.
    abstract = jax.eval_shape(init, jax.random.key(0))
    layout = jax.tree.map(lambda x: sharding_of(x, mesh, options.layout), abstract)
    params = jax.jit(init, out_shardings=layout)(jax.random.key(0))
    state_layout = ao.state_sharding(tx, params)
    state = jax.jit(tx.init, out_shardings=state_layout)(params)

    def gathered_loss(params, windows):
        return loss(jax.tree.map(lambda w: move(w, whole), params), windows)

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(layout, state_layout, whole))
    def step(params, state, windows):
        value, gradients = jax.value_and_grad(gathered_loss)(params, windows)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    evaluate = jax.jit(gathered_loss, out_shardings=whole)
    training, validation = texts()

    def batch(text, starts):
        """The same windows on all processes, of which each device gets its part."""
        windows = text[starts[:, None] + np.arange(CONTEXT + 1)]
        return jax.make_array_from_callback(windows.shape, by_batch, lambda index: windows[index])

    losses, random = [], np.random.default_rng(0)
    bar = rich.progress.Progress(
        *rich.progress.Progress.get_default_columns(), "{task.fields[loss]}", disable=jax.process_index() > 0
    )
    with jax.set_mesh(mesh), bar:
        task = bar.add_task("training", total=options.steps, loss="")
        for _ in range(options.steps):
            windows = batch(training, random.integers(len(training) - CONTEXT, size=BATCH))
            params, state, value = step(params, state, windows)
            losses.append(float(value))
            bar.update(task, advance=1, loss=f"{losses[-1]:.3f} bits per character")
        starts = np.linspace(0, len(validation) - CONTEXT - 1, 512).astype(int)
        final = float(evaluate(params, batch(validation, starts)))
        complete = jax.jit(lambda tree: tree, out_shardings=jax.tree.map(lambda _: whole, layout))(params)
    leaves = [np.asarray(x.addressable_data(0)) for x in jax.tree.leaves(complete)]
    if jax.process_index() == 0:
        for name, tree in (("parameters", params), ("optimizer state", state)):
            shards = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree)]
            total = ao.state_bytes(tree)
            print(f"{name}: {sum(shards):,} bytes on each of {mesh.size} devices, {total:,} in all")
    return losses, final, zlib.crc32(b"".join(x.tobytes() for x in leaves))


def picture(losses: list[float], final: float) -> Figure:
    """Draws the losses and their running mean."""
    axes = (figure := Figure(figsize=(4.8, 3.2), layout="constrained")).subplots()
    axes.plot(losses, color="0.8", linewidth=0.8, label="training, each batch")
    width = max(len(losses) // 20, 1)
    mean = np.convolve(losses, np.ones(width) / width, mode="valid")
    axes.plot(np.arange(width - 1, len(losses)), mean, color="#d55e00", label=f"mean of {width} batches")
    axes.plot(len(losses), final, "o", color="black", label=f"validation: {final:.3f}")
    axes.set(xlabel="step", ylabel="bits per character")
    axes.legend(frameon=False)
    return figure


def command_line() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Trains a small transformer on many devices.")
    parser.add_argument("--layout", choices=("full", "data"), default="full")
    parser.add_argument("--axes", choices=("auto", "explicit"), default="auto")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--devices", type=int, default=8, help="simulated devices of a process, on a CPU")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0, help="the number of this process, from 0")
    parser.add_argument("--coordinator", default="localhost:9911", help="host and port of process 0")
    parser.add_argument("--out", type=Path, default=Path("out/sharded_training"))
    return parser


def main() -> None:
    """Trains the model, prints its loss and draws the curve."""
    options = command_line().parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices)
    if options.processes > 1:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    losses, final, checksum = train(options)
    if jax.process_index() == 0:
        print(f"{final:.3f} bits per character on other topics; checksum of the parameters: {checksum:08x}")
        options.out.mkdir(parents=True, exist_ok=True)
        picture(losses, final).savefig(options.out / "loss.png", dpi=160)


if __name__ == "__main__":
    main()
