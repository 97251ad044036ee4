"""Lightning and Accelerate in two processes against the same loop in one with the whole batches."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankError
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from flatmtl import SAM, SAMO, MultiTaskOptimizer
from flatmtl.integrations.accelerate import Backward
from flatmtl.integrations.lightning import MultiTaskMixin
from flatmtl.weighting import MGDA, PCGrad

accelerate = pytest.importorskip("accelerate")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own dependencies'
    lightning = pytest.importorskip("lightning")

TASKS = ("a", "b")
PROCESSES = 2
BATCHES, SIZE = 4, 8  # of the whole
SHARPNESS = {"plain": None, "sam": SAM(0.05), "samo": SAMO(0.05)}
FORWARDS = {"plain": 1, "sam": 3, "samo": 7}  # of two tasks a batch
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec.*")


def data(seed: int, size: int, *, sampled: bool = False) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    x, a, b = (
        torch.randn(BATCHES * SIZE, n, generator=generator, dtype=torch.float64) for n in (6, 1, 1)
    )
    whole = TensorDataset(x, a, b)
    sampler = DistributedSampler(whole, shuffle=False) if sampled else None
    return DataLoader(whole, batch_size=size, sampler=sampler)


class Net(nn.Module):
    """With statistics of the batches that nothing is computed from: replicas keep those of rank 0."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 9), nn.Tanh())
        self.seen = nn.BatchNorm1d(9, affine=False)
        self.heads = nn.ModuleDict({t: nn.Linear(9, 1) for t in TASKS})
        self.fails_at, self.forwards = 0, 0
        self.statistics: list[torch.Tensor] = []  # before each forward pass

    def forward(self, x: torch.Tensor, tasks: Any) -> dict[str, torch.Tensor]:
        self.forwards += 1
        if self.forwards == self.fails_at:
            raise ValueError(f"forward {self.forwards}")
        features = self.trunk(x)
        self.statistics.append(self.seen.running_mean.clone())
        self.seen(features.detach())
        return {t: self.heads[t](features) for t in tasks}


def task_losses(model: nn.Module, batch: Any, tasks: Any = TASKS) -> dict[str, torch.Tensor]:
    outputs, targets = model(batch[0], tasks), dict(zip(TASKS, batch[1:]))
    return {t: nn.functional.mse_loss(outputs[t], targets[t]) for t in tasks}


def wrap(model: nn.Module, kind: str, weighting: Any, group: Any) -> MultiTaskOptimizer:
    return MultiTaskOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        weighting=weighting(),
        sharpness=SHARPNESS[kind],
        model=model,
        process_group=group,
    )


def found(net: Net, stride: int) -> dict[str, torch.Tensor]:
    """Its parameters, and the statistics that every step began with."""
    parameters = {name: value.detach().clone() for name, value in net.named_parameters()}
    return {**parameters, "statistics": torch.stack(net.statistics)[::stride]}


def assert_equal(results: list[dict[str, torch.Tensor]], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        for result in results:
            assert torch.equal(result[name], results[0][name]), name
            if name != "statistics":  # those of the first rank's part
                torch.testing.assert_close(result[name], value, rtol=1e-8, atol=1e-9)


class Module(MultiTaskMixin, lightning.LightningModule):
    def __init__(self, kind: str, weighting: Any, accumulate: int, group: bool = True) -> None:
        super().__init__()
        self.net = Net().double()
        self.kind, self.weighting, self.group = kind, weighting, group
        self.accumulate_grad_batches = accumulate
        self.gradient_clip_val = 0.5

    def multitask_losses(self, batch: Any, tasks: Any = TASKS) -> dict[str, torch.Tensor]:
        return task_losses(self.net, batch, tasks)

    def configure_optimizers(self) -> MultiTaskOptimizer:
        return wrap(self, self.kind, self.weighting, dist.group.WORLD if self.group else None)


def fit(
    rank: int | None,
    seed: int,
    kind: str,
    weighting: Any = PCGrad,
    accumulate: int = 1,
    fails: tuple[int, int] | None = None,
    group: bool = True,
) -> dict[str, torch.Tensor]:
    """Two epochs by Lightning's Trainer; ``rank`` None: in one process."""
    torch.manual_seed(seed)
    module = Module(kind, weighting, accumulate, group)
    if fails is not None and fails[0] == rank:
        module.net.fails_at = fails[1]
    alone = rank is None
    if not alone:
        from lightning.pytorch.strategies import DDPStrategy

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1 if alone else PROCESSES,
        strategy="auto" if alone else DDPStrategy(process_group_backend="gloo"),
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # Lightning's shuffles
    )
    loader = data(seed, SIZE if alone else SIZE // PROCESSES, sampled=not alone)
    trainer.fit(module, loader)
    assert trainer.global_step == 2 * BATCHES // accumulate
    return found(module.net, FORWARDS[kind] * accumulate)


@pytest.mark.parametrize(
    ("kind", "weighting", "accumulate"),
    [("plain", MGDA, 1), ("plain", PCGrad, 2), ("sam", PCGrad, 1), ("samo", PCGrad, 2)],
)
def test_lightning(ranks, rng, kind, weighting, accumulate):
    seed = int(rng.integers(2**31))
    results = ranks(PROCESSES).run(fit, seed, kind, weighting, accumulate)
    assert_equal(results, fit(None, seed, kind, weighting, accumulate))


def test_lightning_with_a_rank_that_raises(ranks, rng):
    with pytest.raises(RankError) as caught:
        ranks(PROCESSES).run(fit, int(rng.integers(2**31)), "sam", fails=(1, 5))
    assert caught.value.failures[0][0] == "RankFailedError"
    assert "rank 1: ValueError: forward 5" in caught.value.failures[0][1]
    assert caught.value.failures[1][:2] == ("ValueError", "forward 5")


def test_lightning_without_a_group(ranks, rng):
    with pytest.raises(RankError, match="process_group of MultiTaskOptimizer must be") as caught:
        ranks(PROCESSES).run(fit, int(rng.integers(2**31)), "plain", group=False)
    assert sorted(caught.value.failures) == [0, 1]


def loop(
    rank: int | None,
    seed: int,
    kind: str,
    weighting: Any = PCGrad,
    steps: int = 1,
    given: str = "function",
    fails: tuple[int, int] | None = None,
    group: bool = True,
) -> dict[str, torch.Tensor]:
    """Two epochs of Accelerate's loop; ``rank`` None: in one process."""
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()
    alone = rank is None
    try:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=steps)
        assert accelerator.num_processes == (1 if alone else PROCESSES)
        torch.manual_seed(seed)
        net = Net().double()
        if fails is not None and fails[0] == rank:
            net.fails_at = fails[1]
        optimizer = wrap(net, kind, weighting, dist.group.WORLD if group else None)
        model, optimizer, loader = accelerator.prepare(
            net, optimizer, data(seed, SIZE if alone else SIZE // PROCESSES)
        )
        backward = Backward(accelerator, optimizer, model)
        for _ in range(2):
            for batch in loader:
                with accelerator.accumulate(model):
                    if given == "function":
                        backward(task_losses, model, batch)
                    elif given == "closure":
                        backward(lambda tasks=TASKS: task_losses(model, batch, tasks))
                    else:
                        backward(task_losses(model, batch))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
        return found(net, FORWARDS[kind] * steps)
    finally:
        accelerate.state.AcceleratorState._reset_state(True)
        accelerate.state.GradientState._reset_state()


@pytest.mark.parametrize(
    ("kind", "weighting", "steps", "given"),
    [
        ("plain", MGDA, 1, "function"),
        ("plain", PCGrad, 2, "function"),
        ("plain", PCGrad, 1, "losses"),
        ("sam", PCGrad, 2, "function"),
        ("samo", PCGrad, 1, "closure"),
    ],
)
def test_accelerate(ranks, rng, kind, weighting, steps, given):
    seed = int(rng.integers(2**31))
    results = ranks(PROCESSES).run(loop, seed, kind, weighting, steps, given)
    assert_equal(results, loop(None, seed, kind, weighting, steps, given))


def test_accelerate_with_a_rank_that_raises(ranks, rng):
    with pytest.raises(RankError) as caught:
        ranks(PROCESSES).run(loop, int(rng.integers(2**31)), "sam", fails=(0, 5))
    assert caught.value.failures[0][:2] == ("ValueError", "forward 5")
    assert caught.value.failures[1][0] == "RankFailedError"
    assert "rank 0: ValueError: forward 5" in caught.value.failures[1][1]


@pytest.mark.parametrize("given", ["losses", "closure"])
def test_accelerate_accumulates_functions_with_their_batches(ranks, rng, given):
    with pytest.raises(RankError, match="ValueError: losses must be given") as caught:
        ranks(PROCESSES).run(loop, int(rng.integers(2**31)), "plain", PCGrad, 2, given)
    assert sorted(caught.value.failures) == [0, 1]


def test_accelerate_without_a_group(ranks, rng):
    with pytest.raises(RankError, match="process_group of MultiTaskOptimizer must be") as caught:
        ranks(PROCESSES).run(loop, int(rng.integers(2**31)), "plain", group=False)
    assert sorted(caught.value.failures) == [0, 1]
