"""XLA's compilers for accelerators, on a machine that has none, and what they made of a step.

They come as wheels, `pip install -e ".[structure]"`, and compile ahead of time for a described device or
slice. Their programs say how many kernels a step launches, what these read and write, how much memory they
need and which collectives they run. That is structure, not time: launches and traffic bound it from below.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, Sharding

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


def origin() -> dict[str, Any]:
    """Returns what a result says of where it comes from, in place of the machine that compiled."""
    note = ", ".join(f"{name} {version}" for name, version in versions().items())
    return {"seeds": {}, "hardware": "ahead_of_time", "note": note}


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


def placed(shapes: Any, shardings: Any) -> Any:
    """Returns a tree of shapes with a tree of shardings, or one for all."""
    if isinstance(shardings, Sharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
    )
