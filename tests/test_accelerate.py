"""A MultiTaskOptimizer in Accelerate's loop against the same loop written by hand, to the bit."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flatmtl import SAM, SAMO, MultiTaskOptimizer
from flatmtl.integrations.accelerate import Backward
from flatmtl.weighting import MGDA, NashMTL, PCGrad

accelerate = pytest.importorskip("accelerate")

TASKS = ("a", "b")
SHARPNESS = {"plain": None, "sam": SAM(0.05), "samo": SAMO(0.01)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh())
        self.heads = nn.ModuleDict({t: nn.Linear(16, 1) for t in TASKS})
        self.dtypes = set()

    def forward(self, x, tasks):
        features = self.trunk(x)
        self.dtypes.add(self.trunk[0](x).dtype)
        return {t: self.heads[t](features) for t in tasks}


def task_losses(model, batch, tasks=TASKS):
    outputs, targets = model(batch[0], tasks), dict(zip(TASKS, batch[1:]))
    return {t: nn.functional.mse_loss(outputs[t], targets[t]) for t in tasks}


@pytest.fixture
def accelerator():
    """Makes accelerators; their state is one for the process."""

    def make(**options):
        accelerate.state.AcceleratorState._reset_state(True)
        accelerate.state.GradientState._reset_state()
        return accelerate.Accelerator(cpu=True, **options)

    yield make
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


def data(rng, batches=4, size=8):
    x, a, b = (
        torch.from_numpy(rng.standard_normal((batches * size, n))).float() for n in (6, 1, 1)
    )
    return DataLoader(TensorDataset(x, a, b), batch_size=size)


def wrap(model, sharpness=None, weighting=PCGrad):
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    return MultiTaskOptimizer(base, weighting=weighting(), sharpness=sharpness, model=model)


def assert_same(model, other):
    for (name, one), two in zip(model.state_dict().items(), other.state_dict().values()):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_the_same_parameters_as_a_loop_by_hand(rng, accelerator, sharpness, steps, precision):
    """Five batches: the last step of an epoch has fewer where they are accumulated."""
    loader, model = data(rng, batches=5), Net()
    other = copy.deepcopy(model)
    optimizer = wrap(other, SHARPNESS[sharpness])
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    expected = []
    for _ in range(2):
        batches = list(loader)
        for start in range(0, 5, steps):

            def closure(batch):
                def losses(tasks=TASKS):
                    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                        outputs = other(batch[0], tasks)
                    targets = dict(zip(TASKS, batch[1:]))
                    return {
                        t: nn.functional.mse_loss(outputs[t].float(), targets[t]) / steps
                        for t in tasks
                    }

                return losses

            group = batches[start : start + steps]
            if sharpness == "plain":  # one after the other
                found = [optimizer.backward(closure(batch)) for batch in group]
                found = {t: found[-1][t] * steps for t in TASKS}
            else:
                found = optimizer.backward([closure(batch) for batch in group])
                found = {t: loss * steps / len(group) for t, loss in found.items()}
            expected.append({t: float(loss) for t, loss in found.items()})
            torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    one = accelerator(mixed_precision=precision, gradient_accumulation_steps=steps)
    optimizer = wrap(model, SHARPNESS[sharpness])
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    model, optimizer, loader, schedule = one.prepare(model, optimizer, loader, schedule)
    backward, seen = Backward(one, optimizer), []
    for _ in range(2):
        for batch in loader:
            with one.accumulate(model):
                losses = backward(task_losses, model, batch)
                if one.sync_gradients:
                    one.clip_grad_norm_(model.parameters(), 0.1)
                    seen.append({t: float(loss) for t, loss in losses.items()})
                else:
                    assert (losses is None) == (sharpness != "plain")
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    assert model.dtypes == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert len(seen) == len(expected) == 2 * (5 if steps == 1 else 3)
    assert_same(model, other)
    assert schedule.get_last_lr() == pytest.approx([0.01 * 0.9 ** len(seen)])
    for one, two in zip(seen, expected):
        assert one == pytest.approx(two, rel=1e-5)


def test_losses_that_are_there_already(rng, accelerator):
    """A list, divided by the number of batches and given back whole."""
    loader, model = data(rng, batches=2), Net()
    other = copy.deepcopy(model)
    one = accelerator(gradient_accumulation_steps=2)
    optimizer, loader = one.prepare(wrap(model, weighting=MGDA), loader)
    backward = Backward(one, optimizer)
    for batch in loader:
        with one.accumulate(model):
            given = list(task_losses(model, batch).values())
            found = backward(given)
            assert [float(x) for x in found] == pytest.approx([x.item() for x in given])
            optimizer.step()
            optimizer.zero_grad()
    mine = wrap(other, weighting=MGDA)
    for batch in loader:
        mine.backward([loss / 2 for loss in task_losses(other, batch).values()])
    mine.step()
    assert_same(model, other)


@pytest.mark.parametrize("sharpness", ["plain", "sam"])
def test_a_step_that_the_scaler_skips(rng, accelerator, sharpness):
    """Accelerate has no scaler on a CPU: it is put where Accelerate puts it on a GPU."""
    one, model, loader = accelerator(), Net(), data(rng)
    other = copy.deepcopy(model)
    one.scaler, one.native_amp = torch.amp.GradScaler("cpu", init_scale=1024.0), True
    one.state._mixed_precision = "fp16"  # clip_grad_norm_ asks for it
    optimizer = wrap(model, SHARPNESS[sharpness], NashMTL)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    optimizer, loader, schedule = one.prepare(optimizer, loader, schedule)
    assert optimizer.scaler is one.scaler
    backward, skipped = Backward(one, optimizer), []

    def losses(batch, bad, tasks=TASKS):
        found = task_losses(model, batch, tasks)
        return {t: loss * (float("inf") if bad else 1.0) for t, loss in found.items()}

    for number, batch in enumerate(loader):
        before = copy.deepcopy(model.state_dict())
        backward(losses, batch, number == 2)
        one.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        schedule.step()
        skipped.append(one.optimizer_step_was_skipped)
        same = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert same == (number == 2)
        optimizer.zero_grad()
    assert skipped == [False, False, True, False]
    assert one.scaler.get_scale() == 512.0
    assert schedule.get_last_lr() == pytest.approx([0.01 * 0.9**3])
    mine = wrap(other, SHARPNESS[sharpness], NashMTL)  # without a scaler, without the bad batch
    schedule = torch.optim.lr_scheduler.ExponentialLR(mine, 0.9)
    for number, batch in enumerate(loader):
        if number != 2:
            mine.backward(partial(task_losses, other, batch))
            torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1)
            mine.step()
            schedule.step()
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_without_the_helper_a_skipped_step_goes_unseen(rng, accelerator):
    """Why there is a helper; should this fail, Accelerate has learned it."""
    accelerator()
    model, batch = Net(), next(iter(data(rng)))
    optimizer, scaler = wrap(model), torch.amp.GradScaler("cpu", init_scale=8.0)
    wrapped = accelerate.optimizer.AcceleratedOptimizer(optimizer, scaler=scaler)
    assert not hasattr(wrapped, "backward")
    optimizer.backward(
        [loss * float("inf") for loss in task_losses(model, batch).values()], scaler=scaler
    )
    wrapped.step()
    assert scaler.get_scale() == 4.0
    assert not wrapped.step_was_skipped


@pytest.mark.parametrize("sharpness", ["sam", "samo"])
def test_a_resumed_run_is_the_same_to_the_bit(rng, accelerator, sharpness, tmp_path):
    loader, start = data(rng), Net()

    def prepared(net):
        one = accelerator()
        optimizer = wrap(net, SHARPNESS[sharpness])
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return one, *one.prepare(net, optimizer, loader, schedule)

    def epoch(one, model, optimizer, loader, schedule):
        backward = Backward(one, optimizer)
        for batch in loader:
            backward(task_losses, model, batch)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return model

    whole = prepared(copy.deepcopy(start))
    epoch(*whole)
    whole[0].save_state(str(tmp_path / "saved"))
    expected = epoch(*whole)
    resumed = prepared(Net())
    resumed[0].load_state(str(tmp_path / "saved"))
    assert_same(epoch(*resumed), expected)


def test_wrong_use_is_named(rng, accelerator):
    one, model = accelerator(gradient_accumulation_steps=2), Net()
    batch = next(iter(data(rng)))
    optimizer = wrap(model, SAM(0.05))
    with pytest.raises(TypeError, match=r"accelerator\.prepare made .* got MultiTaskOptimizer"):
        Backward(one, optimizer)
    prepared = one.prepare(optimizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(one), "num_processes", 2)
        with pytest.raises(ValueError, match="where 2 train, got one of 1"):
            Backward(one, prepared)
    backward = Backward(one, prepared)
    with pytest.raises(ValueError, match=r"given with their batch, as backward\(task_losses"):
        backward(lambda tasks=TASKS: task_losses(model, batch, tasks))
    vector = torch.stack(list(task_losses(model, batch).values()))
    with pytest.raises(TypeError, match="must be a list or a dict of scalars"):
        backward(vector)
    with pytest.raises(ValueError, match="must be a closure"):
        backward(task_losses(model, batch))
    with pytest.raises(TypeError, match="got AcceleratedOptimizer"):
        Backward(one, one.prepare(torch.optim.SGD(model.parameters(), lr=0.1)))
