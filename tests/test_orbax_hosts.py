"""Checkpoints that several processes write together, and that another number of them reads."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "checkpoint_process.py"


def together(folder, processes, devices):
    """What every one of the processes prints."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1]), "XLA_FLAGS": ""}
    running = [
        subprocess.Popen(
            [sys.executable, SCRIPT, folder, where, *map(str, (i, processes, devices))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(processes)
    ]
    ended = [process.communicate(timeout=300) for process in running]
    assert not any(process.returncode for process in running), ended
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Twelve steps of one process with four devices, in two runs."""
    folder = tmp_path_factory.mktemp("alone")
    return together(folder, 1, 4)[0], together(folder, 1, 4)[0]


@pytest.mark.parametrize(("before", "after"), [((2, 2), (2, 2)), ((2, 2), (1, 4)), ((1, 4), (2, 2))], ids=str)
def test_processes_save_together_and_others_go_on(tmp_path, before, after, alone):
    begun, ended = together(tmp_path, *before), together(tmp_path, *after)
    for found, expected, first in ((begun, alone[0], 0), (ended, alone[1], 6)):
        shards = {}
        for each in found:
            assert each["first"] == first and each["steps"] == [first + 4, first + 6]
            shards |= each["shards"]
        assert shards == expected["shards"]
