"""Memory per device of parameters and optimizer state, for large transformers on many devices.

    python -m benchmarks.memory

Nothing is allocated. Bytes between steps follow from `jax.eval_shape` and `ao.state_sharding`. Those of
a training step, with its activations and temporaries, come from XLA's compilers for TPUs, if they are
installed (`benchmarks.compilers`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
import rich.progress
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

import adaptive_optax as ao
from benchmarks import compilers
from benchmarks.end_to_end import Transformer, training_step
from benchmarks.tables import Table, digits

MEASURES = (
    "optimizers",
    "transforms.stochastic_rounding",
    "wrappers.accumulation",
    "wrappers.master_weights",
    "interop.sharding",
)

DEVICES = (8, 64, 512, 4096)
COMPILED = ("256 TPU v5e", "4096 TPU v5p")
HEAD = 128


@dataclasses.dataclass(frozen=True)
class Size:
    """The sizes of a transformer with gated MLPs and grouped queries, as in Touvron et al. 2023."""

    width: int
    layers: int
    hidden: int
    key_heads: int = 8
    vocabulary: int = 32_768


# Multiples of 512, so that every mesh below splits them evenly.
SIZES = {
    "1 B": Size(2048, 22, 5632),
    "7 B": Size(4096, 32, 11_264, key_heads=32),
    "70 B": Size(8192, 80, 28_672),
}
# The optimizers, and the dtype of the parameters.
OPTIMIZERS: dict[str, tuple[Callable[[], optax.GradientTransformation], Any]] = {
    "adamw": (lambda: ao.adamw(1e-3), jnp.float32),
    "adamw, bfloat16 moments": (
        lambda: ao.adamw(1e-3, mu_storage="bfloat16", nu_storage="bfloat16"),
        jnp.float32,
    ),
    "adamw, int8 moments": (lambda: ao.adamw(1e-3, mu_storage="int8", nu_storage="int8"), jnp.float32),
    "adam_mini": (lambda: ao.adam_mini(1e-3), jnp.float32),
    "accumulate_gradients(adamw, 4)": (lambda: ao.accumulate_gradients(ao.adamw(1e-3), 4), jnp.float32),
    "bfloat16 parameters, master_weights(adamw)": (lambda: ao.master_weights(ao.adamw(1e-3)), jnp.bfloat16),
    "bfloat16 parameters, adamw + stochastic_rounding": (
        lambda: optax.chain(ao.adamw(1e-3), ao.stochastic_rounding()),
        jnp.bfloat16,
    ),
    "bfloat16 parameters, adamw, int8 moments + stochastic_rounding": (
        lambda: optax.chain(ao.adamw(1e-3, mu_storage="int8", nu_storage="int8"), ao.stochastic_rounding()),
        jnp.bfloat16,
    ),
}


def transformer(size: Size) -> dict[str, tuple[tuple[int, ...], tuple[Any, ...]]]:
    """Every parameter's shape and mesh axes, by its path in Flax: fully sharded, with tensor parallelism."""
    heads, fsdp, tensor = size.width // HEAD, *compilers.AXES
    into_heads, gated = (fsdp, tensor, None), (fsdp, tensor)
    layer = {
        "attention/query/kernel": ((size.width, heads, HEAD), into_heads),
        "attention/key/kernel": ((size.width, size.key_heads, HEAD), into_heads),
        "attention/value/kernel": ((size.width, size.key_heads, HEAD), into_heads),
        "attention/out/kernel": ((heads, HEAD, size.width), (tensor, None, fsdp)),
        "Dense_gate/kernel": ((size.width, size.hidden), gated),
        "Dense_up/kernel": ((size.width, size.hidden), gated),
        "Dense_down/kernel": ((size.hidden, size.width), (tensor, fsdp)),
        "norm_0/scale": ((size.width,), ()),
        "norm_1/scale": ((size.width,), ()),
    }
    found = {f"layer_{i}/{path}": leaf for i in range(size.layers) for path, leaf in layer.items()}
    return found | {
        "Embed_0/embedding": ((size.vocabulary, size.width), (tensor, fsdp)),
        "norm/scale": ((size.width,), ()),
        "Dense_out/kernel": ((size.width, size.vocabulary), gated),
    }


def mesh_of(devices: int) -> AbstractMesh:
    """Eight devices along "tensor" where there are at least 64, all others along "fsdp"."""
    tensor = 8 if devices >= 64 else 1
    return AbstractMesh((devices // tensor, tensor), compilers.AXES, axis_types=(AxisType.Auto,) * 2)


def bytes_on_a_device(tree: Any, shardings: Any) -> int:
    """The bytes of a tree of shapes on each device."""
    sizes = jax.tree.map(
        lambda x, sharding: math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize, tree, shardings
    )
    return sum(jax.tree.leaves(sizes))


def held(tx: Any, params: Any) -> dict[str, int]:
    """What parameters and state take on each device between steps; `params` are shapes with shardings."""
    placed = jax.tree.map(lambda x: x.sharding, params)
    return {
        "parameters": bytes_on_a_device(params, placed),
        "state": bytes_on_a_device(jax.eval_shape(tx.init, params), ao.state_sharding(tx, params)),
    }


def measure(quick: bool, advance: Callable[[str], None]) -> dict[str, Any]:
    """Counts the bytes of all sizes, and compiles a training step for two slices."""
    with compilers.available():
        compiled = list(_compiled(quick, advance))
    return {"rows": list(counted(quick, advance)), "compiled": compiled} | compilers.origin()


def counted(quick: bool, advance: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Counts the bytes on each device for all sizes, numbers of devices and optimizers."""
    for name, size in list(SIZES.items())[: 1 if quick else None]:
        size = dataclasses.replace(size, layers=1) if quick else size
        for devices in DEVICES[:: 3 if quick else 1]:
            mesh = mesh_of(devices)
            for optimizer, (make, dtype) in list(OPTIMIZERS.items())[: 2 if quick else None]:
                advance(f"{name} on {devices} devices: {optimizer}")
                params = {
                    path: jax.ShapeDtypeStruct(
                        shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes))
                    )
                    for path, (shape, axes) in transformer(size).items()
                }
                count = sum(x.size for x in jax.tree.leaves(params))
                yield {
                    "size": name,
                    "parameters": count,
                    "devices": devices,
                    "optimizer": optimizer,
                    "bytes": held(make(), params),
                }


def _compiled(quick: bool, advance: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    model = Transformer(4096, 128, 1) if quick else Transformer(4096, 1024, 4)
    for name in COMPILED[: 1 if quick else None]:
        mesh = compilers.mesh_of(name)
        for optimizer, (make, dtype) in list(OPTIMIZERS.items())[: 1 if quick else None]:
            advance(f"training step on {name}: {optimizer}")
            yield {"slice": name, "optimizer": optimizer} | memory_of_a_step(model, make(), dtype, mesh)


def memory_of_a_step(model: Transformer, tx: Any, dtype: Any, mesh: Mesh) -> dict[str, int]:
    """The compiler's account of a training step, in bytes on each device, and what `held` says."""
    samples, length = 8 * mesh.shape["fsdp"], 128
    tokens = jax.ShapeDtypeStruct(
        (samples, length + 1), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("fsdp"))
    )
    example = jnp.zeros((1, length), jnp.int32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), example)["params"])
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=NamedSharding(mesh, _split(x.shape, mesh))),
        shapes,
    )
    shardings = ao.state_sharding(tx, params)
    state = compilers.placed(jax.eval_shape(tx.init, params), shardings)
    out = (jax.tree.map(lambda x: x.sharding, params), shardings, None)
    step = training_step(model, tx)
    lowered = jax.jit(step, donate_argnums=(0, 1), out_shardings=out).lower(params, state, tokens)
    memory: Any = lowered.compile().memory_analysis()
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "held": sum(held(tx, params).values()),
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
    }


def _split(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Splits the largest axis over "fsdp" and the next over "tensor", where they divide it."""
    spec: list[Any] = [None] * len(shape)
    for name in compilers.AXES:
        free = [i for i in np.argsort(shape)[::-1] if spec[i] is None and shape[i] % mesh.shape[name] == 0]
        if free and len(shape) > 1:
            spec[free[0]] = name
    return PartitionSpec(*spec)


def tables(result: dict[str, Any]) -> dict[str, Table]:
    """Returns a table for every size, and one of the compiled training steps."""
    found: dict[str, Table] = {}
    for size in dict.fromkeys(row["size"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["size"] == size]
        devices = list(dict.fromkeys(row["devices"] for row in rows))
        title = f"{rows[0]['parameters'] / 1e9:.1f} billion parameters: MB on each device, parameters + state"
        table = Table(title, ["optimizer", "bytes per parameter", *(f"{n} devices" for n in devices)])
        for optimizer in dict.fromkeys(row["optimizer"] for row in rows):
            mine = [row for row in rows if row["optimizer"] == optimizer]
            all_bytes = sum(mine[0]["bytes"].values()) * mine[0]["devices"] / mine[0]["parameters"]
            cells = [" + ".join(digits(n / 1e6) for n in row["bytes"].values()) for row in mine]
            table.add(optimizer, f"{all_bytes:.2f}", *cells)
        found[size.replace(" ", "").lower()] = table
    columns = ["slice", "optimizer", "parameters + state", "as the compiler pads them", "temporary"]
    title = (
        "A training step of a transformer of {:.0f} M parameters, by XLA's memory analysis: MB on each chip"
    )
    parameters = result["compiled"][0]["parameters"] / 1e6 if result["compiled"] else 0
    table = Table(title.format(parameters), columns)
    for row in result["compiled"]:
        cells = [digits(row[key] / 1e6) for key in ("held", "arguments", "temporary")]
        table.add(row["slice"], row["optimizer"], *cells)
    return found | {"compiled": table} if result["compiled"] else found


def main() -> None:
    """Prints the tables, and writes nothing: `python -m benchmarks --suite memory` publishes them."""
    with rich.progress.Progress("{task.description}", transient=True) as progress:
        bar = progress.add_task("")

        def advance(text: str) -> None:
            progress.update(bar, description=text)

        try:
            result = measure(False, advance)
        except ValueError as error:  # the compilers are not installed
            result = {"rows": list(counted(False, advance)), "compiled": [], "note": str(error)}
    for table in tables(result).values():
        rich.print(table.rich())
    rich.print(result["note"])


if __name__ == "__main__":
    main()
