"""One training run of the demo: a method, a seed, a rho -> learning curve and step times."""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import flatmtl
from flatmtl.demo.clock import StepClock
from flatmtl.demo.model import PairNet
from flatmtl.demo.multifashion import TASKS, Pairs, PairSplits
from flatmtl.weighting import Mean, PCGrad

METHODS = ("mean", "pcgrad", "f-pcgrad")
BATCH = 64
LEARNING_RATE = 1e-3
LAST = 3  # a run is judged by the mean of its last three epochs


class Stopped(Exception):
    """The run was asked to stop before it was done."""


@dataclass(frozen=True)
class RunConfig:
    """What one run trains. ``rho`` is read by f-pcgrad only."""

    method: str
    seed: int
    epochs: int
    rho: float = 0.0


@dataclass
class RunResult:
    """What one run measured.

    ``test`` holds the accuracy of each task, in 0..1, after each epoch; ``validation`` that of the
    last ``LAST`` epochs only, by which choices are made.

    ``own_share`` is the share of the optimizer's step that is spent in flatmtl's own code:
    1 - (closure + ``torch.autograd.grad`` + step of the base optimizer) / whole step, over all
    steps, measured by wrapping those three (``StepClock``).
    """

    config: RunConfig
    validation: list[list[float]] = field(default_factory=list)  # [LAST][tasks]
    test: list[list[float]] = field(default_factory=list)  # [epochs][tasks]
    loss: list[float] = field(default_factory=list)  # mean clean train loss of each epoch
    seconds_per_step: float = float("nan")  # CPU time, median over the steps
    own_share: float = float("nan")


def steps_per_epoch(pairs: int) -> int:
    """Full batches only: BatchNorm and the step times like them equal."""
    return pairs // BATCH


def train(config: RunConfig, pairs: PairSplits, on_step: Callable[[], None]) -> RunResult:
    """Trains from scratch and evaluates.

    ``on_step`` is called after every step; it may raise ``Stopped``.
    """
    torch.manual_seed(config.seed)
    images, labels = _tensors(pairs.train)
    validation, test = _tensors(pairs.validation), _tensors(pairs.test)
    model = PairNet()
    base = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    clock = StepClock(base)
    optimizer = make_optimizer(config, base, model)
    result = RunResult(config)
    for epoch in range(config.epochs):
        model.train()
        order = torch.randperm(len(images))
        epoch_loss = torch.zeros(())
        for k in range(steps_per_epoch(len(images))):
            batch = order[k * BATCH : (k + 1) * BATCH]
            x, y = images[batch], labels[batch]
            with clock.step():
                losses = optimizer.step(clock.outside(_closure(model, x, y)))
            assert isinstance(losses, list)  # the closure's own type
            epoch_loss += sum(losses)
            on_step()
        result.loss.append(float(epoch_loss) / (len(TASKS) * steps_per_epoch(len(images))))
        if epoch >= config.epochs - LAST:
            result.validation.append(evaluate(model, *validation))
        result.test.append(evaluate(model, *test))
    result.seconds_per_step = median(clock.whole)
    result.own_share = 1.0 - sum(clock.foreign) / sum(clock.whole)
    return result


def make_optimizer(
    config: RunConfig, base: torch.optim.Optimizer, model: nn.Module
) -> "flatmtl.MultiTaskOptimizer":
    """The multi-task optimizer of one method around ``base``."""
    if config.method not in METHODS:
        raise ValueError(f"method: must be one of {', '.join(METHODS)}, got {config.method!r}")
    weighting = Mean() if config.method == "mean" else PCGrad(seed=config.seed)
    sharpness = flatmtl.SAM(rho=config.rho) if config.method == "f-pcgrad" else None
    return flatmtl.MultiTaskOptimizer(base, weighting=weighting, sharpness=sharpness, model=model)


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """Accuracy of each task."""
    model.eval()
    correct = torch.zeros(len(TASKS), dtype=torch.int64)
    for x, y in zip(images.split(500), labels.split(500), strict=True):
        logits = torch.stack(model(x, range(len(TASKS))), dim=1)  # [B, T, 10]
        correct += (logits.argmax(dim=2) == y).sum(dim=0)
    return (correct / len(images)).tolist()


def _closure(model: nn.Module, x: Tensor, y: Tensor) -> Callable[..., list[Tensor]]:
    def closure(tasks: list[int] | None = None) -> list[Tensor]:
        wanted = range(len(TASKS)) if tasks is None else tasks
        logits = model(x, wanted)
        return [cross_entropy(out, y[:, task]) for out, task in zip(logits, wanted, strict=True)]

    return closure


def _tensors(pairs: Pairs) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(pairs.images).float().div_(255.0).unsqueeze(1)  # [N, 1, 36, 36]
    # With one channel this only renames the strides, but it carries over to every activation of the
    # network, and the CPU's convolutions are faster that way by about a third.
    images = images.to(memory_format=torch.channels_last)
    return images, torch.from_numpy(pairs.labels)  # [N, T]
