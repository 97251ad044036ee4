"""A whole step without the host, on the CPU: nothing is read, and a replay of its operators is a step."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from methods import make
from step_options import KINDS, SHARP
from tape import taped
from torch import Tensor, nn

from flatmtl import MAML, SAM, SAMO, MultiTaskOptimizer
from flatmtl.losses import loss_vector
from flatmtl.solves import Observed
from flatmtl.weighting import GradVac, PCGrad, by_name, methods

TASKS = 3
ALL = tuple(range(TASKS))
GRAM_NEEDS = (
    "gram",
    "norms",
    "nothing",
    "cross-gram of two batches",
    "what the other method needs",
)
BY_GRAM = [m.name for m in methods() if not m.cls.one_pass and m.needs in GRAM_NEEDS]
# GradNorm refuses negative losses on the CPU, by looking at them there
OTHERS = [
    m.name
    for m in methods()
    if m.name not in BY_GRAM and not m.cls.looks_back and m.name != "gradnorm"
]

OPTIONS = {
    **SHARP,
    "mask": {"sharpness": SAM(0.05), "nonfinite": "mask"},
    "maml": {"sharpness": MAML(lr=0.05)},
    "by layer": {"sharpness": SAM(0.05), "weights_per": "layer"},
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 5)
        )
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(TASKS))

    def losses(self, x: Tensor, tasks=ALL) -> list[Tensor]:
        z = self.trunk(x)
        return [0.3 + (self.heads[t](z) - t).square().mean() for t in tasks]


class Training:
    """A network, its optimizer and a batch in a place of its own."""

    def __init__(self, weighting, **options) -> None:
        self.net, self.x = Net(), torch.randn(16, 6)
        base = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)
        self.opt = MultiTaskOptimizer(base, weighting=weighting, model=self.net, **options)

    def step(self, x: Tensor | None = None) -> list[Tensor]:
        if x is not None:
            self.x.copy_(x)

        def closure(tasks=ALL):
            return self.net.losses(self.x, tasks)

        return self.opt.step(closure)

    def in_halves(self, x: Tensor | None = None) -> list[Tensor]:
        """A step of two micro-batches."""
        if x is not None:
            self.x.copy_(x)
        parts = self.x.chunk(2)
        return self.opt.step(
            [lambda tasks=ALL, part=part: self.net.losses(part, tasks) for part in parts]
        )

    def everything(self) -> list[Tensor]:
        """All that a training consists of."""
        found = list(self.net.state_dict().values())
        found += [t for s in self.opt.state.values() for t in s.values() if isinstance(t, Tensor)]
        for weighting in (self.opt.weighting, self.opt.flat_weighting):
            if weighting is not None:
                found += _tensors(weighting.state_dict())
        return found


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, dict):
        return [t for part in value.values() for t in _tensors(part)]
    return [value] if isinstance(value, Tensor) else []


def check(training: Training, monkeypatch, step: str = "step") -> None:
    """Three replays with new data leave, to the bit, what three steps of a twin leave."""
    for _ in range(2):
        getattr(training, step)()
    twin = copy.deepcopy(training)
    getattr(twin, step)()  # the recorded step is one too
    with taped(monkeypatch) as tape:
        losses = getattr(training, step)()
    for _ in range(3):
        x = torch.randn(16, 6)
        training.x.copy_(x)
        tape.replay()
        expected = getattr(twin, step)(x)
        assert all(map(torch.equal, losses, expected))
    found, wanted = training.everything(), twin.everything()
    assert len(found) == len(wanted) and all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BY_GRAM)
def test_every_gram_weighting(name, kind, monkeypatch, rng):
    check(Training(make(name, TASKS), **KINDS[kind]), monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OTHERS)
def test_every_other_method(name, kind, monkeypatch, rng):
    """With the losses looked at as on a device: there they are not read."""

    def observed(self, losses, roles) -> Observed:
        values = loss_vector(losses, roles.params[0].device)
        return Observed(values, values.isfinite())

    monkeypatch.setattr("flatmtl.engine.Engine.observed", observed)
    monkeypatch.setattr("flatmtl.weighting._loss._refuse", lambda *_, **__: None)
    check(Training(make(name, TASKS), **KINDS[kind]), monkeypatch)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_kind_of_sharp_step(name, monkeypatch, rng):
    check(Training(PCGrad(), **OPTIONS[name]), monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches(kind, monkeypatch, rng):
    check(Training(PCGrad(), **KINDS[kind]), monkeypatch, "in_halves")


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[0].item(), lambda x: bool(x[0]), lambda x: x.tolist(), lambda x: float(x[0]),
        lambda x: torch.equal(x, x), lambda x: x.nonzero(), lambda x: x.numpy(),
        lambda x: x[x > 0], lambda x: x.masked_select(x > 0), lambda x: x.unique(),
        lambda x: torch.tensor([1.0, 2.0]), lambda x: x.new_tensor([1.0]),
        lambda x: torch.as_tensor([1.0]), lambda x: x.__setitem__(x > 0, 1.0),
    ],
)  # fmt: skip
def test_the_tape_refuses_what_needs_the_host(read, monkeypatch):
    x = torch.ones(2)
    with pytest.raises(AssertionError, match="the host"), taped(monkeypatch):
        read(x)


def test_a_replay_shows_what_the_host_counts(monkeypatch, rng):
    """``every=2`` makes steps of two kinds in turn, which a graph does not."""
    with pytest.raises(AssertionError):
        check(Training(PCGrad(), sharpness=SAM(0.05, every=2)), monkeypatch)


# ---- what is refused, and told -------------------------------------------------------------------


@pytest.fixture
def capturing(monkeypatch):
    """Calls to it: a CUDA graph is being captured from now on."""
    return lambda: monkeypatch.setattr("flatmtl.cuda_graphs.capturing", lambda: True)


def refused(training: Training, capturing, match: str, warm: int = 2) -> None:
    for _ in range(warm):
        training.step()
    before = [t.clone() for t in training.everything()]
    capturing()
    with pytest.raises(RuntimeError, match=match + ".* while a CUDA graph is captured"):
        training.step()
    assert all(map(torch.equal, before, training.everything()))


def test_the_first_step_is_refused(capturing, rng):
    """A replay would zero momenta and begin random streams anew every time."""
    refused(Training(PCGrad(), nonfinite="mask"), capturing, "a step must have been made", warm=0)


def test_a_first_step_after_loading_is_refused(capturing, rng):
    training = Training(GradVac(), nonfinite="mask")
    training.step()
    training.opt.load_state_dict(training.opt.state_dict())
    refused(training, capturing, "a step must have been made", warm=0)


@pytest.mark.parametrize("name", ["pcgrad", "gradvac", "nash_mtl", "moco"])
def test_a_state_that_begins_anew_is_refused(name, capturing, rng):
    training = Training(by_name(name), nonfinite="mask")
    training.step()
    training.opt.weighting.reset()
    capturing()
    with pytest.raises(RuntimeError, match="must have been called before, on this device"):
        training.step()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sharpness": SAMO(0.05)}, "sharpness must not be SAMO"),
        ({"sharpness": SAM(0.05), "replay_rng": True}, "replay_rng must be off"),
        ({"weights_every": 3}, "weights_every must be 1, not 3,"),
        ({"sharpness": SAM(0.05, every=2)}, "SAM's every must be 1, not 2,"),
        (
            {"sharpness": SAM(0.05, warmup=3)},
            r"SAM's warmup of 3 steps must be over \(this is step 2\)",
        ),
    ],
    ids=["samo", "replay_rng", "weights_every", "every", "warmup"],
)
def test_what_only_the_host_can_do_is_refused(options, match, capturing, rng):
    refused(Training(PCGrad(), **{"nonfinite": "mask", **options}), capturing, match)


def test_a_warm_up_that_is_over_is_not_refused(capturing, rng):
    training = Training(PCGrad(), nonfinite="mask", sharpness=SAM(0.05, warmup=2))
    for _ in range(2):
        training.step()
    capturing()
    training.step()


def test_other_parameters_than_before_are_refused(capturing, rng):
    training = Training(PCGrad(), nonfinite="mask")
    training.net.trunk[0].weight.requires_grad_(False)
    for _ in range(2):
        training.step()
    training.net.trunk[0].weight.requires_grad_(True)
    refused(training, capturing, "params must be those of the step before", warm=0)


def test_a_momentum_that_would_begin_is_refused(capturing, rng):
    """A task that was missing from every step before: its head has no state yet."""
    training = Training(PCGrad(), nonfinite="mask")

    def without_the_last(tasks=ALL):
        return [*training.net.losses(training.x)[:-1], None]

    for _ in range(2):
        training.opt.step(without_the_last)
    capturing()
    with pytest.raises(RuntimeError, match="base_optimizer must have a state.* while a CUDA graph"):
        training.step()


def test_a_step_that_the_host_may_skip_is_refused(capturing, rng):
    training = Training(PCGrad(), nonfinite="skip")
    training.step()
    capturing()
    with pytest.raises(
        RuntimeError, match="base_optimizer must be fused.* while a CUDA graph is captured"
    ):
        training.step()


def test_losses_after_the_step_are_refused(capturing, rng):
    refused(
        Training(by_name("famo"), nonfinite="mask"), capturing, "the weighting none that looks back"
    )


def test_that_nothing_raises_from_a_graph_is_told(capturing, monkeypatch, rng):
    training = Training(PCGrad())
    training.step()
    capturing()
    with pytest.warns(
        UserWarning, match="nonfinite='mask': an exception cannot leave a CUDA graph"
    ):
        training.step()
    other = Training(PCGrad(), nonfinite="mask")
    monkeypatch.undo()
    other.step()
    capturing()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.step()
