"""The examples run as they stand, and what they train learns."""

import csv
import importlib.util
import os
import re
import runpy
import signal
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NEEDS = {"lightning_module": "lightning", "accelerate_loop": "accelerate"}
# the affinity examples and their helpers: test_example_affinity.py
AFFINITY = {"affinity_qm8", "affinity_toxcast", "affinity_report"}
AFFINITY |= {"many_networks", "molecules", "progress"}


def load(name: str):
    """The example as a module: nothing runs yet."""
    if name in NEEDS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pytest.importorskip(NEEDS[name])
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested():
    examples = {p.stem for p in EXAMPLES.glob("*.py")}
    assert examples == {"two_tasks", "plain_loop", "many_processes", *NEEDS} | AFFINITY


def test_two_tasks(capsys):
    runpy.run_path(str(EXAMPLES / "two_tasks.py"), run_name="__main__")
    assert "step 100" in capsys.readouterr().out


@pytest.mark.parametrize("flat", [True, False])
def test_plain_loop(flat, capsys):
    before, after = load("plain_loop").main(flat=flat)
    assert (after < 0.7 * before).all()
    assert "80 steps" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec.*")
def test_lightning_module(capsys):
    before, after = load("lightning_module").main(epochs=8)
    assert set(before) == {"val_loss/sum", "val_loss/product"}
    assert all(after[name] < 0.7 * before[name] for name in before)
    assert "32 steps" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_loop(precision, capsys):
    module = load("accelerate_loop")
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    seen = module.main(epochs=8, mixed_precision=precision)
    assert all(seen[-1][name] < 0.7 * seen[0][name] for name in seen[0])
    assert "32 steps" in capsys.readouterr().out


@pytest.fixture
def tox21(tmp_path, rng):
    """A table of Tox21's form: 0, 1 or nothing; the labels say which letters a text is rich in."""
    smiles = ["".join(rng.choice(list("CNOF=1"), rng.integers(8, 25))) for _ in range(160)]
    smiles = [f"{text}({k})" for k, text in enumerate(smiles)]
    lines = [["smiles", *"CNO"]]
    for text in smiles:
        labels = [str(float(text.count(letter) > len(text) / 7)) for letter in "CNO"]
        lines.append([text, *np.where(rng.random(3) < 0.8, labels, "")])
    path = tmp_path / "tox21.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    return path


TINY = ["--epochs", "5", "--batch", "32", "--width", "16", "--lr", "1e-2"]


def scores(text: str, processes: int) -> None:
    (found,) = re.findall(r"(\d) processes, mean AUC (\S+) -> (\S+)", text)  # of rank 0 only
    assert int(found[0]) == processes
    assert float(found[2]) > max(0.65, float(found[1]))
    assert text.count("largest difference between processes: 0\n") == 1


@pytest.mark.parametrize("options", [["--shard-rows", "--sam"], ["--fsdp"]])
def test_many_processes(options, tox21):
    command = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", "2", str(EXAMPLES / "many_processes.py"), "--data", str(tox21)]
    process = subprocess.Popen(
        [sys.executable, *command, *options, *TINY],
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # its processes can be ended with it
    )
    try:
        out, errors = process.communicate(timeout=120)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors
    scores(out, 2)


def test_many_processes_in_one(tox21, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delenv("RANK", raising=False)
    assert load("many_processes").main(["--data", str(tox21), *TINY]) == 0
    scores(capsys.readouterr().out, 1)
