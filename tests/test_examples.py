"""The examples that train by hand: short runs write their pictures, and what they print is sensible."""

import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *arguments):
    """Runs an example's main as it is run from a shell, in the current folder."""
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](list(map(str, arguments)))


def pictures(folder):
    """The names of the pictures in a folder; none is empty."""
    paths = list(folder.rglob("*.png"))
    assert all(path.stat().st_size > 5000 for path in paths)
    return {path.stem for path in paths}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_localization(tmp_path, capsys):
    run("localization_nnx", "--steps", 20)
    assert pictures(tmp_path / "out/localization") == {"curves", "curves_dark", "boxes", "boxes_dark"}
    sentence = capsys.readouterr().out.splitlines()[-1]
    constant, decayed = map(float, re.findall(r"(\d\.\d+)(?: pixels at| times)", sentence))
    assert constant == decayed < 2.5  # below the 3.7 of a constant answer; nothing has decayed yet
    assert "one seed" in sentence and "examples/should_i_decay.py" in sentence


def test_range_test_and_plateau(tmp_path, capsys):
    run("lr_find_then_train", "--steps", 20, "--low", 1e-3, "--high", 0.1)
    assert pictures(tmp_path / "out") == {"lr_find_then_train", "lr_find_then_train_dark"}
    printed = capsys.readouterr().out
    (suggested,) = re.findall(r"Start from a learning rate of ([\d.]+)", printed)
    assert 1e-3 < float(suggested) < 0.1
    validation, test = map(float, re.findall(r"(\d\.\d+) (?:in validation|on the test)", printed))
    assert validation > 0.3 and abs(validation - test) < 0.1
    assert "lowered the rate 0 times" in printed


def test_a_range_test_that_suggests_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("lr_find_then_train", "--steps", 20, "--low", 1e-4, "--high", 1e-3, "--out", "here")
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert "raise high" in printed.out and "--high" in printed.err
    assert pictures(tmp_path / "here") == {"range_test"}


def test_fine_tuning(tmp_path, capsys):
    run("finetune_lora_nnx", "--steps", 80)
    assert pictures(tmp_path / "out/finetune_lora") == {"accuracy", "accuracy_dark"}
    printed = capsys.readouterr().out
    moments = {
        path: outcome for outcome, path in re.findall(r"^(kept|new) +\S+?/([mn]u/\S+)$", printed, re.M)
    }
    body = {path for path, outcome in moments.items() if outcome == "new"}
    assert len(moments) == 20
    assert body == {path for path in moments if "layer_" in path and "lora" not in path}
    before, after, frozen = map(float, re.findall(r"(\d\.\d{3}) (?:at the|if the)", printed))
    assert 0.4 < before < frozen and before < after


def train_sharded(*arguments):
    """Starts the sharded trainer as from a shell."""
    command = [sys.executable, str(EXAMPLES / "sharded_training.py"), "--steps", "6", *map(str, arguments)]
    environment = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def checksum(process):
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return re.findall(r"checksum of the parameters: (\w+)", printed), printed


def test_two_processes_train_to_the_bits_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = f"localhost:{free.getsockname()[1]}"
    together = ("--devices", 1, "--processes", 2, "--coordinator", where)
    both = [train_sharded(*together, "--process", i) for i in (0, 1)]
    (found,), _ = checksum(both[0])
    assert checksum(both[1])[0] == []
    (expected,), printed = checksum(train_sharded("--devices", 2))
    assert found == expected and pictures(tmp_path / "out") == {"loss"}
    per_device, total = re.findall(
        r"parameters: ([\d,]+) bytes on each of 2 devices, ([\d,]+) in all", printed
    )[0]
    assert 2 * int(per_device.replace(",", "")) == int(total.replace(",", ""))


@pytest.mark.parametrize("axes", ["auto", "explicit"])
def test_layouts_train_alike(tmp_path, axes):
    ends = []
    for layout in ("full", "data"):
        _, printed = checksum(train_sharded("--layout", layout, "--axes", axes, "--out", layout))
        ends += map(float, re.findall(r"([\d.]+) bits per character on other topics", printed))
    assert len(ends) == 2 and abs(ends[0] - ends[1]) < 0.002 and ends[0] < 4.9
