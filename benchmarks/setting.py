"""Where and with what a benchmark ran, for its JSON file."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

import jax
import optax

import adaptive_optax as ao


def describe_setting(benchmark: str) -> dict[str, Any]:
    """Gives the command, the hardware and the versions."""
    device = jax.devices()[0]
    return {
        "command": " ".join([f"python -m benchmarks.{benchmark}", *sys.argv[1:]]),
        "device": f"{len(jax.devices())} x {device.platform}: {device.device_kind}",
        "host": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {module.__name__: module.__version__ for module in (ao, jax, optax)},
        "python": platform.python_version(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
