"""Time of a jitted update + apply, compared with optax and PyTorch on the same chain and tree.

Contenders in a row are interleaved in one process, after a warm-up. Each cycles through sets of parameters,
state and gradients that together are larger than any cache.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

import adaptive_optax as ao
from benchmarks import trees
from benchmarks.contenders import (
    HAS_TORCH,
    ROTATED_BYTES,
    SEEDS,
    Step,
    TorchStep,
    gradient_sets,
    preparation,
    preparation_sum,
    torch_module,
)
from benchmarks.tables import Table, digits, ratio
from benchmarks.timing import against, alternate, copy_bandwidth, in_time

MEASURES = (
    "interop.convert_storage",
    "monitoring.telemetry",
    "optimizers",
    "transforms.clipping",
    "transforms.stochastic_rounding",
    "wrappers.reject_nonfinite",
)

RATE = 1e-3
# Lets XLA's CPU backend recognize that a moment can be overwritten in place after its last reader.
REGION_ANALYSIS = {"xla_cpu_copy_insertion_use_region_analysis": True}


@dataclasses.dataclass(frozen=True)
class Chain:
    """An optimizer of this library, what it is compared with, and the least bytes per parameter in a step.

    The bytes are those of gradients, parameters and state, each read and written once; gradients are read
    twice if a norm is needed first.
    """

    ours: Callable[[], Any]
    optax: Callable[[], Any]
    least_bytes: float
    dtype: str = "float32"
    second: Callable[[], Any] | None = None  # another optimizer that does the same with optax alone
    torch: str = ""
    torch_kinds: tuple[str, ...] = ("fused", "foreach")
    max_norm: float | None = None
    options: dict[str, Any] | None = None


def _adamw_kept_as(storage: str) -> Any:
    return ao.adamw(RATE, mu_storage=storage, nu_storage=storage)


CHAINS = {
    "adam": Chain(lambda: ao.adam(RATE), lambda: optax.adam(RATE), 28, torch="Adam"),
    "adamw": Chain(lambda: ao.adamw(RATE), lambda: optax.adamw(RATE), 28, torch="AdamW"),
    "clip + adamw": Chain(
        lambda: optax.chain(ao.clip_by_global_norm(1.0), ao.adamw(RATE)),
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE)),
        32,
        torch="AdamW",
        max_norm=1.0,
    ),
    "rmsprop": Chain(
        lambda: ao.rmsprop(RATE), lambda: optax.rmsprop(RATE), 20, torch="RMSprop", torch_kinds=("foreach",)
    ),
    # optax has no global form, so both are compared with its rmsprop.
    "global_rmsprop": Chain(lambda: ao.global_rmsprop(RATE), lambda: optax.rmsprop(RATE), 16),
    "adam per tensor": Chain(lambda: ao.adam(RATE, granularity="tensor"), lambda: optax.adam(RATE), 24),
}
# Compared with optax's AdamW on the same parameters, whatever the state's format; optax keeps its moments
# in the parameters' dtype.
LOW_PRECISION = {
    "adamw, bfloat16 state": Chain(
        lambda: _adamw_kept_as("bfloat16"),
        lambda: optax.adamw(RATE),
        20,
        second=lambda: optax.adamw(RATE, mu_dtype="bfloat16"),
    ),
    "adamw, int8 state": Chain(lambda: _adamw_kept_as("int8"), lambda: optax.adamw(RATE), 16.25),
    "adamw, bfloat16 parameters + stochastic rounding": Chain(
        lambda: optax.chain(ao.adamw(RATE), ao.stochastic_rounding()),
        lambda: optax.adamw(RATE),
        22,
        dtype="bfloat16",
    ),
}
# Compared with the same optimizer without the wrapper.
WRAPPED = {
    "telemetry(adamw), every=10": Chain(
        lambda: ao.telemetry(ao.adamw(RATE), every=10), lambda: ao.adamw(RATE), 28
    ),
    "telemetry(adamw), every=1": Chain(lambda: ao.telemetry(ao.adamw(RATE)), lambda: ao.adamw(RATE), 28),
    "reject_nonfinite(adamw)": Chain(
        lambda: ao.reject_nonfinite(ao.adamw(RATE)),
        lambda: ao.adamw(RATE),
        28,
        second=lambda: optax.apply_if_finite(optax.adamw(RATE), max_consecutive_errors=100),
    ),
}


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _rows(quick: bool) -> Iterator[tuple[str, trees.Shapes, str, Chain, int]]:
    """Yields tree, shapes, chain, and how often its preparation is timed."""
    if quick:
        tiny = trees.small_leaves(6)
        chains = CHAINS | LOW_PRECISION | WRAPPED
        yield from (("6 small leaves", tiny, name, chain, 1) for name, chain in chains.items())
        return
    if not _on_cpu():
        yield from _rows_of_an_accelerator()
        return
    large, big = 2**24, "16 M"
    leaf = trees.one_leaf(large)
    for name, chain in CHAINS.items():
        yield f"one leaf of {big}", leaf, name, chain, 3
    for name, chain in LOW_PRECISION.items():
        yield f"one leaf of {big}", leaf, name, chain, 3
        if name == "adamw, bfloat16 state":
            compiled = dataclasses.replace(chain, options=REGION_ANALYSIS, second=None)
            yield f"one leaf of {big}", leaf, f"{name}, region analysis", compiled, 3
    for name, chain in WRAPPED.items():
        yield f"one leaf of {big}", leaf, name, chain, 3
    gpt2 = trees.gpt2_small()
    for name in ["adamw", "clip + adamw", "global_rmsprop"]:
        yield "GPT-2 small, 148 leaves", gpt2, name, CHAINS[name], 1
    for name in ["adamw", "clip + adamw", "rmsprop", "global_rmsprop"]:
        yield "400 small leaves", trees.small_leaves(400), name, CHAINS[name], 3
    yield "2000 small leaves", trees.small_leaves(2000), "adamw", CHAINS["adamw"], 1


def _rows_of_an_accelerator() -> Iterator[tuple[str, trees.Shapes, str, Chain, int]]:
    """Yields what says most first, because time may run out; compiling takes most of it."""
    leaf, gpt2 = trees.one_leaf(2**29), trees.gpt2_small()
    for name in ("adamw", "clip + adamw", "global_rmsprop"):
        yield "400 small leaves", trees.small_leaves(400), name, CHAINS[name], 1
    for name, chain in (CHAINS | LOW_PRECISION | WRAPPED).items():
        yield "one leaf of 512 M", leaf, name, chain, 1
    for name in ("adamw", "clip + adamw", "global_rmsprop"):
        yield "GPT-2 small, 148 leaves", gpt2, name, CHAINS[name], 1
    for name, chain in LOW_PRECISION.items():
        yield "GPT-2 small, 148 leaves", gpt2, name, chain, 1
    yield "2000 small leaves", trees.small_leaves(2000), "adamw", CHAINS["adamw"], 1


def measure(quick: bool, advance: Callable[[str], None]) -> dict[str, Any]:
    """Measures all rows; `advance` receives the name of the next."""
    bandwidths: list[float] = []
    rows, note = in_time(_measured(quick, advance, bandwidths))
    # The best measurement of all, since other machines on the same host slow down some.
    bandwidth = max(bandwidths, default=0.0)
    for row in rows:
        floor_ms = 1e3 * row["least_bytes_per_parameter"] * row["parameters"] / bandwidth
        row["of_the_floor"] = floor_ms / row["timed"]["ours"]["ms"]
    measured = {"rows": rows, "copy_bandwidth_gb_s": bandwidth / 1e9}
    return measured | {"uses_torch": HAS_TORCH, "seeds": SEEDS} | note


def _measured(
    quick: bool, advance: Callable[[str], None], bandwidths: list[float]
) -> Iterator[dict[str, Any]]:
    of_tree, gradients = "", []
    for tree, shapes, name, chain, repeats in _rows(quick):
        advance(f"{tree}: {name}")
        if tree != of_tree:
            of_tree, gradients = tree, []
            bandwidths.append(copy_bandwidth(2**22 if quick else 2**28 if _on_cpu() else 2**31))
            gradients = gradient_sets(shapes, 2**20 if quick else ROTATED_BYTES)
        yield _measure_row(tree, shapes, name, chain, gradients, repeats, quick)


def _measure_row(
    tree: str,
    shapes: trees.Shapes,
    name: str,
    chain: Chain,
    gradients: list[Any],
    repeats: int,
    quick: bool,
) -> dict[str, Any]:
    if chain.dtype != "float32":
        gradients = [jax.tree.map(lambda x: x.astype(chain.dtype), g) for g in gradients]
    ours = Step(chain.ours, shapes, gradients, dtype=chain.dtype, options=chain.options)
    reference = Step(chain.optax, shapes, gradients, dtype=chain.dtype)
    contenders: dict[str, Any] = {"optax": reference, "ours": ours}
    if chain.second is not None:
        contenders["second"] = Step(chain.second, shapes, gradients, dtype=chain.dtype)
    if name == "adamw" and len(shapes) <= 400:
        # A step that only returns its arguments: what remains is handing buffers over.
        contenders["hand-over"] = Step(
            chain.ours, shapes, gradients, body=lambda params, state, _: (params, state)
        )
    if HAS_TORCH and chain.torch:
        optimizer = getattr(torch_module().optim, chain.torch)
        decay = {"weight_decay": 1e-4} if chain.torch == "AdamW" else {}
        for kind in chain.torch_kinds:
            make = functools.partial(optimizer, lr=RATE, **decay, **{kind: True})
            contenders[f"torch {kind}"] = TorchStep(make, shapes, gradients, max_norm=chain.max_norm)
    timed = against(alternate(contenders, 15 if quick else 100, seconds=2.0), "optax")
    return {
        "tree": tree,
        "chain": name,
        "leaves": len(shapes),
        "parameters": trees.size(shapes),
        "timed": timed,
        "least_bytes_per_parameter": chain.least_bytes,
        "preparation_s": preparation({"ours": ours, "optax": reference}, repeats),
        "ours": ours.properties(),
        "optax": reference.properties(),
    }


def _preparation(row: dict[str, Any]) -> str:
    return f"{preparation_sum(row, 'ours') / preparation_sum(row, 'optax'):.2f}"


def tables(result: dict[str, Any]) -> dict[str, Table]:
    """Returns the tables: main chains, PyTorch, and the costs of low precision, wrappers and handing over."""
    main = Table(
        "Update and apply against optax",
        ["tree", "chain", "ms", "optax, ms", "ratio", "of the floor", "trace + compile", "kernels per leaf"],
    )
    low = Table(
        "Low-precision state and parameters",
        [
            "tree",
            "adamw with",
            "ms",
            "optax, ms",
            "ratio",
            "optax, mu in bfloat16, ms",
            "of the floor",
            "state, B",
            "peak, B",
            "trace + compile",
        ],
    )
    wrapped = Table(
        "Wrappers around adamw",
        ["step", "ms", "without, ms", "ratio", "kernels per leaf, without", "optax's own, ms"],
    )
    torch = Table(
        "PyTorch on the same tree" + ("" if result["uses_torch"] else ", which was not installed"),
        ["tree", "chain", "ms", "torch fused, ms", "torch foreach, ms"],
    )
    spare = Table("Handing the buffers over", ["tree", "adamw, ms", "no arithmetic, ms", "share"])
    for row in result["rows"]:
        timed, ours = row["timed"], row["ours"]
        name, both = row["chain"], (digits(timed["ours"]["ms"]), digits(timed["optax"]["ms"]))
        second = digits(timed["second"]["ms"] if "second" in timed else None)
        of_floor = f"{100 * row['of_the_floor']:.0f} %"
        if name in CHAINS:
            fusions = f"{ours['kernels_per_leaf']:.1f}, {row['optax']['kernels_per_leaf']:.1f}"
            main.add(row["tree"], name, *both, ratio(timed["ours"]), of_floor, _preparation(row), fusions)
        elif name in WRAPPED:
            fusions = f"{ours['kernels_per_leaf']:.0f}, {row['optax']['kernels_per_leaf']:.0f}"
            wrapped.add(name, *both, ratio(timed["ours"]), fusions, second)
        else:
            size, peak = (f"{ours[f'{kind}_bytes_per_parameter']:.2f}" for kind in ("state", "peak"))
            kept = name.removeprefix("adamw, ")
            times = *both, ratio(timed["ours"]), second
            low.add(row["tree"], kept, *times, of_floor, size, peak, _preparation(row))
        if "torch foreach" in timed:
            fused, foreach = (timed.get(f"torch {kind}", {}).get("ms") for kind in ("fused", "foreach"))
            torch.add(row["tree"], name, both[0], digits(fused), digits(foreach))
        if "hand-over" in timed:
            share = timed["hand-over"]["ms"] / timed["ours"]["ms"]
            spare.add(row["tree"], both[0], digits(timed["hand-over"]["ms"]), f"{100 * share:.0f} %")
    return {"main": main, "low_precision": low, "wrapped": wrapped, "torch": torch, "hand_over": spare}
