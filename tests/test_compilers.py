"""What benchmarks.compilers reads off compiled programs, and the compilers where they are installed."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks import compilers, memory, programs, structure

ROOT = Path(__file__).parents[1]
HLO = """HloModule jit_step, is_scheduled=true

%fused (a: f32[4], b: f32[4]) -> bf16[4] {
  %a = f32[4]{0} parameter(0)
  %b = f32[4]{0} parameter(1)
  %sum = f32[4]{0} add(%a, %b)
  ROOT %half = bf16[4]{0} convert(%sum)
}

%body (carry: (s32[], f32[8])) -> (s32[], f32[8]) {
  %carry = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%carry), index=1
  %doubled = f32[8]{0} add(%x, %x)
  %i = s32[] get-tuple-element(%carry), index=0
  ROOT %next = (s32[], /*index=1*/f32[8]{0}) tuple(%i, %doubled)
}

%condition (carry.1: (s32[], f32[8])) -> pred[] {
  %carry.1 = (s32[], f32[8]{0}) parameter(0)
  %j = s32[] get-tuple-element(%carry.1), index=0
  ROOT %less = pred[] compare(%j, %j), direction=LT
}

%yes (y: f32[2]) -> f32[2] {
  %y = f32[2]{0} parameter(0)
  ROOT %copied = f32[2]{0} copy(%y)
}

%no (n: f32[2]) -> f32[2] {
  ROOT %n = f32[2]{0} parameter(0)
}

%never (z: f32[100]) -> f32[100] {
  %z = f32[100]{0} parameter(0)
  ROOT %copied.2 = f32[100]{0} copy(%z)
}

ENTRY %main (p: f32[4], q: f32[4]) -> bf16[4] {
  %p = f32[4]{0:T(256)} parameter(0)
  %q = f32[4]{0} parameter(1)
  %loop = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body
  %choice = f32[2]{0} conditional(%c, %u, %v), branch_computations={%yes, %no}
  %norm = f32[] all-reduce(%s), channel_id=1, to_apply=%never
  %begun = (f32[4]{0}, f32[4]{0}) all-gather-start(%p), channel_id=2
  %ended = f32[4]{0} all-gather-done(%begun)
  ROOT %out = bf16[4]{0} fusion(%p, %q), kind=kLoop, calls=%fused
}
"""


def test_kernels_are_what_is_run_by_itself():
    found = {kernel.name: (kernel.operation, kernel.traffic) for kernel in programs.kernels(HLO)}
    assert found == {
        "out": ("fusion", 16 + 16 + 8),  # not what is fused
        "doubled": ("add", 3 * 32),  # in the body of a loop, once
        "copied": ("copy", 2 * 8),  # in a branch
    }
    ordinary = {kernel.name for kernel in programs.kernels(HLO, all_branches=False)}
    assert ordinary == {"out", "doubled"}


def test_collectives_count_once():
    assert programs.collectives(HLO) == {"all-reduce": 1, "all-gather": 1}


def test_without_the_compilers_it_says_what_to_install(monkeypatch, tmp_path):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    for suite in ("structure", "memory"):
        outcome = CliRunner().invoke(command.app, ["--suite", suite, "--quick", "--out", str(tmp_path)])
        assert outcome.exit_code == 2 and 'pip install -e ".[structure]"' in outcome.output


def test_memory_is_printed_without_the_compilers(monkeypatch, capsys):
    def missing(quick, advance):
        raise ValueError("not installed")

    row = {"size": "1 B", "parameters": 10**9, "devices": 8, "optimizer": "adamw"}
    rows = [row | {"bytes": {"parameters": 5 * 10**8, "state": 10**9}}]
    monkeypatch.setattr(memory, "measure", missing)
    monkeypatch.setattr(memory, "counted", lambda quick, advance: rows)
    memory.main()
    shown = capsys.readouterr().out
    assert "1.0 billion parameters" in shown and "500 + 1,000" in shown and "not installed" in shown


@pytest.mark.parametrize("suite", ["structure", "memory"])
def test_a_quick_run_for_described_devices(suite, tmp_path):
    if lacking := compilers.missing():
        pytest.skip(lacking)
    arguments = ["--suite", suite, "--quick", "--out", tmp_path]
    command_line = [sys.executable, "-m", "benchmarks", *arguments]
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / f"{suite}_ahead_of_time.json").read_text())
    assert result["xla_flags"] == "" and "libtpu" in result["note"]
    found = {"structure": structure, "memory": memory}[suite].tables(result)
    assert all(table.rows for table in found.values())
    if suite == "structure":
        kernels = {row["chain"]: row["kernels"] for row in result["rows"] if row["device"] == "H100"}
        assert 19 <= kernels["optax: adamw"] <= kernels["adamw"] <= 40
        assert not any(row["collectives"] for row in result["collectives"] if row["chain"] == "adamw")
