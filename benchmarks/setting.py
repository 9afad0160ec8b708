"""The machine and versions with which a benchmark ran, without which its numbers mean nothing."""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from benchmarks import sources

RESULTS = Path(__file__).resolve().parent / "results"
VERSIONED = ("adaptive_optax", "jax", "jaxlib", "optax", "flax", "torch")


def hardware() -> str:
    """Names the accelerator, or the CPU by its cores, for file names: "cpu_2_cores", "nvidia_h200"."""
    device = jax.devices()[0]
    name = f"cpu {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
    return re.sub(r"\W+", "_", name.lower()).strip("_")


def setting(command: str, measures: Iterable[str]) -> dict[str, Any]:
    """Returns command, commit, date, hardware, versions, and hashes of the modules that are measured."""
    device = jax.devices()[0]
    return {
        "command": command,
        "commit": _git("rev-parse", "--short", "HEAD"),
        # Only changes to the library and the benchmarks count, not the results that a run writes.
        "uncommitted_changes": _git("status", "--porcelain", "--", "../adaptive_optax", "*.py") != "",
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "device": f"{len(jax.devices())} x {device.platform}: {device.device_kind}",
        "host": f"{os.cpu_count()} CPU cores, {_processor()}",
        "python": platform.python_version(),
        "versions": {
            name: importlib.import_module(name).__version__
            for name in VERSIONED
            if importlib.util.find_spec(name) is not None
        },
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "sources": sources.fingerprints(measures),
    }


def cores_busy_elsewhere(seconds: float = 1.0) -> float:
    """Returns how many cores other programs keep busy, measured while this one sleeps (Linux); else NaN.

    A busy core distorts ratios too: PyTorch's threads spin while they wait for each other, and lose a time
    slice of the scheduler at every wait; XLA's threads sleep.
    """
    stat = Path("/proc/stat")
    if not stat.exists():
        return math.nan

    def ticks() -> tuple[int, int]:
        counts = [int(x) for x in stat.read_text().splitlines()[0].split()[1:9]]
        return sum(counts), counts[3] + counts[4]  # idle, and idle for a disk

    whole, idle = ticks()
    time.sleep(seconds)
    whole_after, idle_after = ticks()
    return (os.cpu_count() or 1) * (1 - (idle_after - idle) / (whole_after - whole))


def origin(result: dict[str, Any]) -> str:
    """Returns the origin of a result in one line."""
    versions, commit = result["versions"], result["commit"]
    named = ["jax", "optax"] + (["torch"] if result.get("uses_torch") else [])
    parts = [
        result["host"] if " cpu: " in result["device"] else result["device"].split(": ")[1],
        f"Python {result['python']}",
        f"adaptive_optax {versions['adaptive_optax']} at {commit}"
        + (" with uncommitted changes" if result["uncommitted_changes"] else ""),
        *(f"{name} {versions[name]}" for name in named),
        result["date"],
        f"`{result['command']}`",
        *([f"XLA_FLAGS={result['xla_flags']}"] if result["xla_flags"] else []),
        *([result["note"]] if "note" in result else []),
        *([changes] if (changes := sources.mark(result["sources"])) else []),
    ]
    return ", ".join(parts)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.machine()
