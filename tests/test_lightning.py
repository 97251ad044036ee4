"""MultiTaskMixin under the Lightning Trainer against the same loop written by hand, to the bit."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flatmtl import SAM, SAMO, MultiTaskOptimizer
from flatmtl.integrations.lightning import MultiTaskMixin
from flatmtl.weighting import MGDA, NashMTL, PCGrad

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own dependencies'
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.plugins import MixedPrecision

TASKS = ("a", "b")
SHARPNESS = {"plain": None, "sam": SAM(0.05), "samo": SAMO(0.01)}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec.*")


class Module(MultiTaskMixin, lightning.LightningModule):
    """Two regressions; what it is to do is given from outside."""

    def __init__(self, sharpness=None, weighting=PCGrad, schedule=None, base=torch.optim.Adam):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh())
        self.heads = nn.ModuleDict({t: nn.Linear(16, 1) for t in TASKS})
        self.sharpness, self.weighting, self.schedule = sharpness, weighting, schedule
        self.base = base
        self.forwards, self.dtypes, self.rates, self.grads, self.seen = 0, set(), [], [], []

    def multitask_losses(self, batch, tasks=TASKS):
        self.forwards += 1
        x, targets = batch[0], dict(zip(TASKS, batch[1:]))
        features = self.trunk(x)
        self.dtypes.add(self.trunk[0](x).dtype)
        return {t: nn.functional.mse_loss(self.heads[t](features), targets[t]) for t in tasks}

    def make(self):
        return MultiTaskOptimizer(
            self.base(self.parameters(), lr=0.01),
            weighting=self.weighting(),
            sharpness=self.sharpness,
            model=self,
        )

    def configure_optimizers(self):
        optimizer = self.make()
        return self.schedule(optimizer) if self.schedule else optimizer

    def on_before_optimizer_step(self, optimizer):
        self.grads.append([p.grad.clone() for p in self.parameters() if p.grad is not None])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        self.seen.append({k: float(v) for k, v in self.trainer.callback_metrics.items()})


def data(rng, batches=4, size=8):
    x, a, b = (
        torch.from_numpy(rng.standard_normal((batches * size, n))).float() for n in (6, 1, 1)
    )
    return DataLoader(TensorDataset(x, a, b), batch_size=size)


def fit(module, loader, ckpt_path=None, **options):
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, **options}
    trainer = lightning.Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, **options
    )
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


def by_hand(
    module, loader, epochs=2, *, dtype=None, clip=None, accumulate=1, scaler=None, each=None
):
    """The loop that the mixin replaces."""
    module = copy.deepcopy(module)
    optimizer = module.make()
    for _ in range(epochs):
        batches = list(loader)
        for start in range(0, len(batches), accumulate):

            def closure(batch):
                def losses(tasks=TASKS):
                    context = torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext()
                    with context:
                        found = module.multitask_losses(batch, tasks)
                    return {t: loss / accumulate for t, loss in found.items()}

                return losses

            group = batches[start : start + accumulate]
            found = optimizer.backward([closure(batch) for batch in group], scaler=scaler)
            means = {t: float(loss) * accumulate / len(group) for t, loss in found.items()}
            module.seen += [means] * len(group)
            if scaler:
                scaler.unscale_(optimizer)
            if clip:
                torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            if each:
                each(optimizer)
    return module, optimizer


def assert_same(module, other):
    for (name, one), two in zip(module.state_dict().items(), other.state_dict().values()):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_the_same_parameters_as_a_loop_by_hand(rng, sharpness):
    module, loader = Module(SHARPNESS[sharpness]), data(rng)
    expected, _ = by_hand(module, loader)
    start = copy.deepcopy(module.state_dict())
    trainer = fit(module, loader)
    assert trainer.global_step == 8
    assert module.trunk[1].num_batches_tracked == 8
    assert_same(module, expected)
    assert not torch.equal(module.trunk[0].weight, start["trunk.0.weight"])
    assert module.forwards == 8 * {"plain": 1, "sam": 3, "samo": 7}[sharpness]
    assert len(module.grads) == 8


def test_the_trainer_counts_steps_to_its_limit(rng):
    module, loader = Module(SAM(0.05)), data(rng)
    trainer = fit(module, loader, max_steps=5, max_epochs=-1)
    assert trainer.global_step == 5
    assert module.trunk[1].num_batches_tracked == 5


def test_the_losses_are_logged(rng):
    module, loader = Module(SAM(0.05)), data(rng)
    first = module.multitask_losses(next(iter(loader)))
    fit(module, loader, max_epochs=1)
    assert set(module.seen[0]) == {"train_loss/a", "train_loss/b"}
    for task in TASKS:
        assert module.seen[0][f"train_loss/{task}"] == pytest.approx(float(first[task]), rel=1e-6)
    assert module.seen[0] != module.seen[1]


def test_a_list_of_losses_a_missing_task_and_a_closure_that_computes_all(rng):
    class Listed(Module):
        def multitask_losses(self, batch):
            found = super().multitask_losses(batch)
            missing = self.forwards > 1 and float(batch[1][0]) < self.threshold
            return [found["a"], None if missing else found["b"]]

    module, loader = Listed(), data(rng)
    firsts = [float(batch[1][0]) for batch in loader]
    module.threshold = sorted(firsts[1:])[1]  # above one of the later batches'
    fit(module, loader, max_epochs=1)
    assert set(module.seen[0]) == {"train_loss/0", "train_loss/1"}


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping(rng, algorithm):
    module, loader = Module(SAM(0.05), base=torch.optim.SGD), data(rng)
    module.gradient_clip_val, module.gradient_clip_algorithm = 1e-3, algorithm
    start = copy.deepcopy(module)
    if algorithm == "norm":
        expected, _ = by_hand(module, loader, clip=1e-3)
    fit(module, loader)
    if algorithm == "norm":
        assert_same(module, expected)
    moved = max(
        float((p - q).abs().max())
        for p, q in zip(module.parameters(), start.parameters(), strict=True)
    )
    assert 0 < moved <= 8 * 0.01 * 1e-3 * 1.01
    # on_before_optimizer_step sees them before the clipping, as in Lightning
    assert max(float(g.abs().max()) for g in module.grads[0]) > 1e-3


@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_accumulation(rng, sharpness):
    """Five batches by two: an epoch's last step has one."""
    module, loader = Module(SHARPNESS[sharpness], weighting=MGDA), data(rng, batches=5)
    module.accumulate_grad_batches = 2
    expected, _ = by_hand(module, loader, accumulate=2)
    trainer = fit(module, loader)
    assert trainer.global_step == 6
    assert_same(module, expected)
    assert module.seen[0] == {}  # nothing computed yet
    for batch in (1, 3, 4):  # the last of a step's
        logged = {t: module.seen[batch][f"train_loss/{t}"] for t in TASKS}
        assert logged == pytest.approx(expected.seen[batch], rel=1e-5)


def test_step_and_epoch_schedules(rng):
    def step(optimizer):
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 2},
        }

    def epoch(optimizer):
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    loader = data(rng)
    module = Module(SAM(0.05), schedule=step)
    fit(module, loader)
    assert module.rates == pytest.approx([0.01 * 0.5 ** (k // 2) for k in range(1, 9)])
    module = Module(SAM(0.05), schedule=epoch)
    fit(module, loader)
    assert module.rates == pytest.approx([0.01] * 3 + [0.005] * 4 + [0.0025])


def test_a_schedule_by_hand_is_the_same(rng):
    module, loader = Module(SAM(0.05), schedule=cosine), data(rng)
    made = []

    def each(optimizer):
        if not made:
            made.append(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8))
        made[0].step()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a schedule that was made late
        expected, _ = by_hand(module, loader, each=each)
    fit(module, loader)
    assert_same(module, expected)


def cosine(optimizer):
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("sharpness", [SAM(0.05, every=3), SAMO(0.01)], ids=["sam", "samo"])
def test_a_resumed_run_is_the_same_to_the_bit(rng, sharpness, tmp_path):
    """With a stream (PCGrad), moments, a schedule, and a flat part that is used again."""
    module, loader = Module(sharpness, schedule=cosine), data(rng)
    begun, resumed = copy.deepcopy(module), copy.deepcopy(module)
    fit(module, loader, max_epochs=2)
    trainer = fit(begun, loader, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    for p in resumed.parameters():
        nn.init.zeros_(p)  # all must come from the file
    after = fit(resumed, loader, max_epochs=2, ckpt_path=tmp_path / "one.ckpt")
    assert after.global_step == 8
    assert_same(resumed, module)
    assert not torch.equal(module.trunk[0].weight, begun.trunk[0].weight)
    one, two = (m.optimizers().state_dict() for m in (module, resumed))
    assert one["param_groups"] == two["param_groups"]
    for k, entry in one["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, two["state"][k][name]), name


def test_resumed_in_the_middle_of_an_epoch(rng, tmp_path):
    """Lightning begins the loader anew then, so that all batches are one and the same here."""
    module = Module(SAM(0.05), schedule=cosine)
    batch = TensorDataset(*(part.repeat(4, 1) for part in next(iter(data(rng)))))
    loader = DataLoader(batch, batch_size=8)
    resumed = copy.deepcopy(module)
    saving = lightning.pytorch.callbacks.ModelCheckpoint(
        dirpath=tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1
    )
    fit(module, loader, enable_checkpointing=True, callbacks=[saving])
    assert (tmp_path / "step=3.ckpt").exists()
    trainer = fit(resumed, loader, ckpt_path=tmp_path / "step=3.ckpt")
    assert trainer.global_step == 8
    assert_same(resumed, module)


def test_bf16_autocast_is_for_the_forward_passes_alone(rng):
    class Watched(Module):
        def multitask_losses(self, batch, tasks=TASKS):
            losses = super().multitask_losses(batch, tasks)
            for loss in losses.values():
                loss.register_hook(lambda grad: inside.append(torch.is_autocast_enabled("cpu")))
            return losses

    inside = []
    module, loader = Watched(SAM(0.05)), data(rng)
    expected, _ = by_hand(module, loader, dtype=torch.bfloat16)
    inside.clear()
    fit(module, loader, precision="bf16-mixed")
    assert module.dtypes == {torch.bfloat16}
    assert inside == [False] * (8 * 4)
    assert_same(module, expected)


@pytest.mark.parametrize("sharpness", ["plain", "sam"])
def test_fp16_uses_the_scaler_of_the_precision_plugin(rng, sharpness):
    """With a method that is not homogeneous, clipping, and a step that overflows."""
    module, loader = Module(SHARPNESS[sharpness], weighting=NashMTL), data(rng)
    module.gradient_clip_val = 0.1

    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)

    expected, optimizer = by_hand(module, loader, dtype=torch.float16, clip=0.1, scaler=scaler())
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler())
    trainer = fit(module, loader, plugins=[plugin])
    assert module.dtypes == {torch.float16}
    assert plugin.scaler.get_scale() == 2.0**12
    assert trainer.global_step == 8
    assert_same(module, expected)
    assert optimizer.state[next(expected.parameters())]["step"] == 8
    # unscaled, as the hook sees them
    assert max(float(g.abs().max()) for g in module.grads[0]) < 100


def test_a_step_that_the_scaler_skips_changes_nothing(rng):
    class Overflows(Module):
        def multitask_losses(self, batch, tasks=TASKS):
            losses = super().multitask_losses(batch, tasks)
            factor = float("inf") if self.trainer.global_step == self.bad else 1.0
            return {t: loss * factor for t, loss in losses.items()}

    module, loader = Overflows(SAM(0.05)), data(rng)
    module.bad = 3
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    states = []
    module.on_train_batch_end = lambda *args: states.append(copy.deepcopy(module.state_dict()))
    fit(module, loader, plugins=[plugin])
    same = [
        all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(states, states[1:], strict=False)
    ]
    assert same == [False, False, True, False, False, False, False]  # statistics too
    assert plugin.scaler.get_scale() == 4.0


def test_wrong_use_is_named(rng):
    with pytest.raises(TypeError, match="before LightningModule"):

        class Wrong(lightning.LightningModule, MultiTaskMixin):
            pass

    class Bare(MultiTaskMixin, lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 1)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(TypeError, match=r"must return one flatmtl.MultiTaskOptimizer, got SGD"):
        fit(Bare(), data(rng))

    class NoLosses(Bare):
        def configure_optimizers(self):
            base = super().configure_optimizers()
            return MultiTaskOptimizer(base, weighting=PCGrad())

    with pytest.raises(NotImplementedError, match="NoLosses must define multitask_losses"):
        fit(NoLosses(), data(rng))
    with pytest.raises(Exception, match="manual optimization"):
        fit(Module(), data(rng), gradient_clip_val=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lightning.Trainer, "world_size", 2)
        with pytest.raises(ValueError, match="where 2 train, got one of 1"):
            fit(Module(), data(rng))
    for name, value in [("accumulate_grad_batches", 0), ("gradient_clip_algorithm", "l2")]:
        module = Module()
        module.gradient_clip_val = 1.0
        setattr(module, name, value)
        with pytest.raises(ValueError, match=f"{name} must be .* got"):
            fit(module, data(rng))


def test_the_other_package_name(rng):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = pytest.importorskip("pytorch_lightning")

    class Other(MultiTaskMixin, other.LightningModule):
        def __init__(self):
            super().__init__()
            self.trunk, self.heads = nn.Linear(6, 4), nn.ModuleList([nn.Linear(4, 1)] * 1)
            self.heads.append(nn.Linear(4, 1))

        def multitask_losses(self, batch, tasks=(0, 1)):
            features = self.trunk(batch[0]).tanh()
            return [nn.functional.mse_loss(self.heads[t](features), batch[1 + t]) for t in tasks]

        def configure_optimizers(self):
            base = torch.optim.SGD(self.parameters(), lr=0.1)
            return MultiTaskOptimizer(base, weighting=PCGrad(), sharpness=SAM(0.05), model=self)

    trainer = other.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Other(), data(rng))
    assert trainer.global_step == 4
