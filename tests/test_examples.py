"""The examples run as they stand, and what they train learns."""

import importlib.util
import runpy
import warnings
from pathlib import Path

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
    assert examples == {"two_tasks", "plain_loop", *NEEDS} | AFFINITY


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
