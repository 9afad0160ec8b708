"""What XLA makes of an update step for an H100 and a TPU: kernels, bytes, memory and collectives.

No accelerator is needed: the compilers come as wheels, see `benchmarks.compilers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import adaptive_optax as ao
from benchmarks import compilers, programs
from benchmarks.tables import Table

MEASURES = (
    "optimizers",
    "transforms.clipping",
    "transforms.stochastic_rounding",
    "monitoring.telemetry",
    "wrappers.reject_nonfinite",
    "wrappers.accumulation",
    "interop.sharding",
)

DEVICES = {"H100": ("cuda", "1x1x1"), "TPU v5e": ("tpu", "v5e:2x2")}
TREES = {"one": "One leaf of 16.8 M parameters", "tree": "A tree of 19 leaves, 8.5 M parameters"}


def chains() -> dict[str, tuple[optax.GradientTransformation, Any]]:
    """The chains whose kernels are counted, and the dtype of their parameters."""
    adamw, half, single = ao.adamw(1e-3), jnp.bfloat16, jnp.float32
    clipped = optax.chain(ao.clip_by_global_norm(1.0), adamw)
    return {
        "optax: adamw": (optax.adamw(1e-3), single),
        "adamw": (adamw, single),
        "optax: clip + adamw": (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), single),
        "clip + adamw": (clipped, single),
        "rmsprop": (ao.rmsprop(1e-3), single),
        "global_rmsprop": (ao.global_rmsprop(1e-3), single),
        "adamw per tensor": (ao.adamw(1e-3, granularity="tensor"), single),
        "adamw, bfloat16 moments": (ao.adamw(1e-3, mu_storage="bfloat16", nu_storage="bfloat16"), single),
        "adamw, int8 moments": (ao.adamw(1e-3, mu_storage="int8", nu_storage="int8"), single),
        "optax: apply_if_finite(adamw)": (optax.apply_if_finite(optax.adamw(1e-3), 5), single),
        "reject_nonfinite(adamw)": (ao.reject_nonfinite(adamw), single),
        "telemetry(adamw)": (ao.telemetry(adamw), single),
        "telemetry(adamw, every=10)": (ao.telemetry(adamw, every=10), single),
        "optax: MultiSteps(adamw, 4)": (
            optax.MultiSteps(optax.adamw(1e-3), 4).gradient_transformation(),
            single,
        ),
        "accumulate_gradients(adamw, 4)": (ao.accumulate_gradients(adamw, 4), single),
        "optax: adamw, bfloat16 parameters": (optax.adamw(1e-3), half),
        "adamw + stochastic_rounding": (optax.chain(adamw, ao.stochastic_rounding()), half),
    }


def sharded_chains() -> dict[str, optax.GradientTransformation]:
    """The chains whose collectives are counted."""
    clip, adamw, found = ao.clip_by_global_norm(1.0), ao.adamw(1e-3), chains()
    names = ("adamw", "optax: clip + adamw", "clip + adamw", "global_rmsprop", "adamw per tensor")
    return {name: found[name][0] for name in (*names, "adamw, int8 moments")} | {
        "clip + adamw + stochastic_rounding": optax.chain(clip, adamw, ao.stochastic_rounding()),
        "reject_nonfinite(clip + adamw)": ao.reject_nonfinite(optax.chain(clip, adamw)),
        "telemetry(clip + adamw)": ao.telemetry(optax.chain(clip, adamw)),
        "accumulate_gradients(clip + adamw, 4)": ao.accumulate_gradients(optax.chain(clip, adamw), 4),
    }


def parameters(kind: str, dtype: Any, width: int = 384) -> dict[str, Any]:
    """The shapes of a tree of `TREES`."""

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    if kind == "one":
        return {"w": leaf(16_384, 1024)}
    layer = {
        "qkv": leaf(width, 3 * width),
        "out": leaf(width, width),
        "up": leaf(width, 4 * width),
        "down": leaf(4 * width, width),
        "bias": leaf(4 * width),
        "scale": leaf(width),
    }
    return {"embedding": leaf(8192, width)} | {f"layer_{i}": layer for i in range(3)}


def step_of(tx: Any) -> Callable[..., Any]:
    """An update step of parameters, state and gradients."""

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def measure(quick: bool, advance: Callable[[str], None]) -> dict[str, Any]:
    """Compiles every chain for every device and slice."""
    with compilers.available():
        rows = list(_rows(quick, advance))
        communicating = list(_communicating(quick, advance))
    return {"rows": rows, "collectives": communicating} | compilers.origin()


def _rows(quick: bool, advance: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    for device, described in DEVICES.items():
        place = SingleDeviceSharding(compilers.devices(*described)[0])
        for kind in ("tree",) if quick else TREES:
            for name, (tx, dtype) in list(chains().items())[: 2 if quick else None]:
                advance(f"{device}, {TREES[kind]}: {name}")
                params = parameters(kind, dtype, 64 if quick else 384)
                yield {"device": device, "tree": kind, "chain": name} | _structure(tx, params, place)


def _communicating(quick: bool, advance: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    for name in list(compilers.SLICES)[: 2 if quick else None]:
        mesh = compilers.mesh_of(name)
        for chain, tx in list(sharded_chains().items())[: 2 if quick else None]:
            advance(f"{name}: {chain}")
            yield {"slice": name, "chain": chain, "collectives": _collectives(tx, mesh)}


def _structure(tx: Any, params: Any, place: Any) -> dict[str, Any]:
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(step_of(tx), donate_argnums=(0, 1), out_shardings=place)
    shapes = (compilers.placed(tree, place) for tree in (params, state, params))
    compiled: Any = step.lower(*shapes).compile()
    found = programs.kernels(compiled.as_text())
    ordinary = programs.kernels(compiled.as_text(), all_branches=False)
    count = sum(x.size for x in jax.tree.leaves(params))
    return {
        "leaves": len(jax.tree.leaves(params)),
        "parameters": count,
        "kernels": len(found),
        "bytes": sum(kernel.traffic for kernel in found) / count,
        "ordinary_kernels": len(ordinary),
        "ordinary_bytes": sum(kernel.traffic for kernel in ordinary) / count,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes / count,
    }


def _collectives(tx: Any, mesh: Mesh) -> dict[str, int]:
    """Those of a step whose parameters and state are split over all devices."""
    fsdp, tensor = mesh.axis_names

    def leaf(shape: tuple[int, ...], *axes: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    params = {"w": leaf((4096, 8192), fsdp, tensor), "b": leaf((8192,), (fsdp, tensor))}
    shardings = ao.state_sharding(tx, params)
    state = compilers.placed(jax.eval_shape(tx.init, params), shardings)
    out = (jax.tree.map(lambda x: x.sharding, params), shardings)
    step = jax.jit(step_of(tx), donate_argnums=(0, 1), out_shardings=out)
    compiled: Any = step.lower(params, state, params).compile()
    return programs.collectives(compiled.as_text())


def tables(result: dict[str, Any]) -> dict[str, Table]:
    """Returns a table of kernels and bytes for every tree, and one of collectives."""
    found: dict[str, Table] = {}
    for kind, title in TREES.items():
        columns = [f"{d}: {text}" for d in DEVICES for text in ("kernels", "bytes", "temporary")]
        table = Table(f"{title}: kernels of a step, bytes per parameter", ["chain", *columns])
        rows = {(row["chain"], row["device"]): row for row in result["rows"] if row["tree"] == kind}
        if not rows:
            continue
        for chain in dict.fromkeys(chain for chain, _ in rows):
            cells = []
            for device in DEVICES:
                row = rows[chain, device]
                kernels, moved = str(row["kernels"]), f"{row['bytes']:.1f}"
                if row["ordinary_kernels"] != row["kernels"]:
                    kernels = f"{row['ordinary_kernels']} ({kernels})"
                    moved = f"{row['ordinary_bytes']:.1f} ({moved})"
                cells += [kernels, moved, f"{row['temporary_bytes']:.1f}"]
            table.add(chain, *cells)
        found[kind] = table
    slices = list(dict.fromkeys(row["slice"] for row in result["collectives"]))
    table = Table("Collectives of a step, parameters and state split over all devices", ["chain", *slices])
    texts: dict[str, list[str]] = {}
    for row in result["collectives"]:
        text = ", ".join(f"{n} {kind}" for kind, n in sorted(row["collectives"].items())) or "none"
        texts.setdefault(row["chain"], []).append(text)
    for chain, cells in texts.items():
        table.add(chain, *cells)
    return found | {"collectives": table}
