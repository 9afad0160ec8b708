"""XLA's compilers for accelerators, on a machine that has none, and what they made of a step.

They come as wheels, `pip install -e ".[structure]"`, and compile ahead of time for a described device or
slice. Their programs say how many kernels a step launches, what these read and write, how much memory they
need and which collectives they run. That is structure, not time: launches and traffic bound it from below.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib.metadata
import math
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

WHEELS = ("libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")
AXES = ("fsdp", "tensor")
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98  l2_cache_size: 52428800
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 1 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# The chips of a slice, as a mesh of the axes "fsdp" and "tensor".
SLICES = {
    "8 H100": ("cuda", "1x1x8", (2, 4)),
    "16 TPU v5e": ("tpu", "v5e:4x4", (4, 4)),
    "256 TPU v5e": ("tpu", "v5e:16x16", (32, 8)),
    "4096 TPU v5p": ("tpu", "v5p:16x16x16", (512, 8)),
}
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5} | {
    f"{kind}{bits}": bits / 8 for kind in ("s", "u", "f", "bf") for bits in (8, 16, 32, 64)
}
_KERNELS = frozenset(
    ("fusion", "copy", "sort", "custom-call", "reduce", "scatter", "convert", "select", "broadcast", "add")
) | {"multiply"}
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)(?:, |$)")
_ARRAY = re.compile(r"\b([a-z]+\d+|pred)(?:e\w+)?\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_BY_CALL = re.compile(r"to_apply=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


def missing() -> str:
    """Returns what to install; nothing if the wheels are there."""
    try:
        versions()
    except importlib.metadata.PackageNotFoundError as error:
        return (
            f'XLA\'s compilers for accelerators are not installed ({error}): pip install -e ".[structure]".'
        )
    return ""


@contextlib.contextmanager
def available() -> Iterator[None]:
    """Lets XLA find what it needs. To be entered before JAX has started any device.

    Raises:
        ValueError: If the wheels are not installed.
    """
    if lacking := missing():
        raise ValueError(lacking)
    environment = dict(os.environ)
    nvcc = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cuda_nvcc"
    os.environ["PATH"] += os.pathsep + str(nvcc / "bin")
    os.environ["XLA_FLAGS"] = f"--xla_gpu_cuda_data_dir={nvcc} --xla_gpu_autotune_level=0"
    # Without these, libtpu asks a cloud's metadata server what it is part of.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    jax.config.update("jax_platforms", "cpu")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)


def versions() -> dict[str, str]:
    """Returns the versions of the wheels."""
    return {wheel: importlib.metadata.version(wheel) for wheel in WHEELS}


def devices(platform: str, topology: str) -> Any:
    """Returns the described devices."""
    if platform == "tpu":
        return topologies.get_topology_desc(topology, platform="tpu").devices
    described: dict[str, Any] = {"target_config": H100, "topology": topology}
    return topologies.get_topology_desc(topology, platform="cuda", **described).devices


def mesh_of(name: str) -> Mesh:
    """Returns a mesh over one of `SLICES`."""
    platform, topology, shape = SLICES[name]
    found = np.array(devices(platform, topology)).reshape(shape)
    return Mesh(found, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An instruction that is run by itself, and the bytes of its operands and results."""

    name: str
    operation: str
    traffic: float


def kernels(hlo: str) -> list[Kernel]:
    """Returns the kernels of a compiled program.

    Bodies of loops and branches of conditionals count once each, so what a step does not run counts too.
    """
    bodies, entry = _computations(re.sub(r"/\*.*?\*/", "", hlo))
    found: list[Kernel] = []
    waiting, seen = [entry], {entry}
    while waiting:
        sizes: dict[str, float] = {}
        for line in bodies.get(waiting.pop(), ()):
            match = _INSTRUCTION.match(line)
            if not match:
                continue
            name, shape, operation, operands = match.groups()
            sizes[name] = _bytes(shape)
            if operation in _KERNELS:
                read = (sizes.get(each.strip().lstrip("%"), 0) for each in operands.split(","))
                found.append(Kernel(name, operation, sizes[name] + sum(read)))
            called = _CALLED.findall(line) + (_CALLED_BY_CALL.findall(line) if operation == "call" else [])
            for branches in _BRANCHES.findall(line):
                called += [each.strip().lstrip("%") for each in branches.split(",")]
            waiting += [each for each in called if each not in seen]
            seen |= set(called)
    return found


def collectives(hlo: str) -> dict[str, int]:
    """Counts the collectives of a compiled program, by kind."""
    kinds = "|".join(_COLLECTIVES)
    return dict(collections.Counter(re.findall(rf" ({kinds})(?:-start)?\(", hlo)))


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of every computation, and the name of the one that the program begins with."""
    starts = list(_COMPUTATION.finditer(hlo))
    ends = [start.start() for start in starts[1:]] + [len(hlo)]
    bodies = {start[2]: hlo[start.end() : end].splitlines() for start, end in zip(starts, ends, strict=True)}
    return bodies, next(start[2] for start in starts if start[1])


def _bytes(shape: str) -> float:
    return sum(
        _BYTES.get(dtype, 0) * math.prod(int(n) for n in sizes.split(",") if n)
        for dtype, sizes in _ARRAY.findall(shape)
    )
