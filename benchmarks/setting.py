"""Where and with what a benchmark ran, printed and written beside its rows."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax
import optax
import rich

import adaptive_optax as ao


def publish(benchmark: str, rows: list[dict[str, Any]], path: Path | None, **more: Any) -> None:
    """Prints command, hardware and versions, and writes them with the rows as JSON if there is a path."""
    device = jax.devices()[0]
    setting = {
        "command": " ".join([f"python -m benchmarks.{benchmark}", *sys.argv[1:]]),
        "device": f"{len(jax.devices())} x {device.platform}: {device.device_kind}",
        "host": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {module.__name__: module.__version__ for module in (ao, jax, optax)},
        "python": platform.python_version(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    } | more
    rich.print(setting)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(setting | {"rows": rows}, indent=1) + "\n")
