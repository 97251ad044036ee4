"""A probe under Lightning and Accelerate: it measures, and training is the same to the bit."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flatmtl import SAM, AffinityProbe, MultiTaskOptimizer
from flatmtl.weighting import PCGrad

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec.*")
TASKS = ("a", "b")
MODES = {None: None, "exact": {}, "first order": {"mode": "first_order"}}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.Tanh())
        self.heads = nn.ModuleDict({t: nn.Linear(16, 1) for t in TASKS})

    def losses(self, batch, tasks=TASKS):
        features, targets = self.trunk(batch[0]), dict(zip(TASKS, batch[1:]))
        return {t: nn.functional.mse_loss(self.heads[t](features), targets[t]) for t in tasks}

    forward = losses


def optimizer(model, sharpness):
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    return MultiTaskOptimizer(base, weighting=PCGrad(), sharpness=sharpness, model=model)


def loader(seed):
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randn(32, n, generator=generator) for n in (6, 1, 1)]
    return DataLoader(TensorDataset(*columns), batch_size=8)


def state(model):
    return [t.clone() for t in model.state_dict().values()]


def check(runs, measured):
    without = runs[None][0]
    for mode in ("exact", "first order"):
        trained, probe = runs[mode]
        assert all(torch.equal(a, b) for a, b in zip(without, trained)), mode
        assert probe.measured == measured
        assert np.isfinite(probe.record().matrix()).all()
        assert probe.record().tasks == list(TASKS)
    # the same rows, a first-order look and a real one: much alike at this learning rate
    exact, first = (runs[mode][1].record() for mode in ("exact", "first order"))
    np.testing.assert_allclose(exact.matrix("first_order"), first.matrix(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("by", [1, 2])
@pytest.mark.parametrize("sharpness", [None, SAM(0.05)], ids=["plain", "sam"])
def test_lightning(sharpness, by, rng):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own dependencies'
        lightning = pytest.importorskip("lightning")
    from flatmtl.integrations.lightning import MultiTaskMixin

    class Module(MultiTaskMixin, lightning.LightningModule):
        accumulate_grad_batches = by

        def __init__(self, mode):
            super().__init__()
            self.net, self.mode, self.probe = Net(), mode, None

        def multitask_losses(self, batch, tasks=TASKS):
            return self.net.losses(batch, tasks)

        def configure_optimizers(self):
            made = optimizer(self, sharpness)
            if self.mode is not None:
                self.probe = AffinityProbe(made, every=2, **MODES[self.mode])
            return made

        def on_train_epoch_end(self):
            if self.probe is not None:
                self.probe.end_epoch()

    seed, runs = int(rng.integers(2**31)), {}
    for mode in MODES:
        torch.manual_seed(seed)
        module = Module(mode)
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, loader(seed))
        runs[mode] = state(module), module.probe
    check(runs, measured=4 // by)
    assert runs["exact"][1].record().steps.tolist() == [2 // by] * 2


@pytest.mark.parametrize("by", [1, 2])
@pytest.mark.parametrize("sharpness", [None, SAM(0.05)], ids=["plain", "sam"])
def test_accelerate(sharpness, by, rng):
    accelerate = pytest.importorskip("accelerate")
    from flatmtl.integrations.accelerate import Backward

    seed, runs = int(rng.integers(2**31)), {}
    for mode in MODES:
        accelerate.state.AcceleratorState._reset_state(True)
        accelerate.state.GradientState._reset_state()
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=by)
        torch.manual_seed(seed)
        model = Net()
        multi = optimizer(model, sharpness)
        probe = None if mode is None else AffinityProbe(multi, every=2, **MODES[mode])
        model, prepared, batches = accelerator.prepare(model, multi, loader(seed))
        backward = Backward(accelerator, prepared)
        for _ in range(2):
            for batch in batches:
                with accelerator.accumulate(model):
                    backward(partial(model.losses, batch))
                    prepared.step()
                    prepared.zero_grad()
        runs[mode] = state(model), probe
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()
    check(runs, measured=4 // by)
