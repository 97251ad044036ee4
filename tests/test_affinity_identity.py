"""Training with AffinityProbe is training without it, bit for bit."""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
import torch
from affinity_nets import NETS, batches, differences, frozen, picture, storages, train_twice
from oracle_affinity import total
from torch import nn

from flatmtl import SAM, AffinityProbe, MultiTaskOptimizer
from flatmtl.weighting import Mean, PCGrad

BASES = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
}
MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "optimizer": {"look_ahead": "optimizer"},
    "groups": {"groups": [(0, 1), (0, 1, 2)]},
    "first_order": {"mode": "first_order"},
    "etap": {"mode": "first_order", "momentum": True},
}
WRAPS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "pcgrad": {},
    "sam": {"sharpness": SAM(0.05)},
    "replay": {"sharpness": SAM(0.05, aggregate="direct"), "replay_rng": True},
    "skip": {"nonfinite": "skip", "history": 3},
    "mean": {"weighting": Mean(), "jacobian": "batched"},  # which looks at no whole Gram matrix
}


def build(net: str, base: str, wrap: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = NETS[net]()
    params = [p for p in model.parameters() if p.requires_grad]
    opt = BASES[base](params)
    options = WRAPS[wrap]
    if options is not None:
        opt = MultiTaskOptimizer(opt, **{"weighting": PCGrad(), "model": model, **options})
    return model, opt


def attach(
    model: nn.Module, opt: torch.optim.Optimizer, how: dict[str, Any], every: int = 2
) -> AffinityProbe:
    given = {} if isinstance(opt, MultiTaskOptimizer) else {"model": model}
    return AffinityProbe(opt, every=every, **given, **how)


def trace(net: str, base: str, wrap: str, how: dict[str, Any], data: list, every: int = 2):
    """A training run of the user's; a function of whether there is a probe."""

    def train(with_probe: bool) -> list[Any]:
        model, opt = build(net, base, wrap)
        probe = attach(model, opt, how, every) if with_probe else None
        schedule = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
        calls: list[str] = []
        opt.register_step_pre_hook(lambda *_: calls.append("pre"))
        opt.register_step_post_hook(lambda *_: calls.append("post"))
        if isinstance(opt, MultiTaskOptimizer):
            opt.base_optimizer.register_step_pre_hook(lambda *_: calls.append("base pre"))
            opt.base_optimizer.register_step_post_hook(lambda *_: calls.append("base post"))
        places, seen = storages(model), []
        for batch in data:

            def closure(batch=batch):
                return model.losses(batch)

            if isinstance(opt, MultiTaskOptimizer):
                losses = opt.step(closure)
            else:
                opt.zero_grad()
                extra = sum(p.square().sum() for p in model.parameters())  # a graph from before
                losses = probe(closure) if probe else closure()
                (total(losses) + 1e-3 * extra).backward()
                opt.step()
            schedule.step()
            assert storages(model) == places
            seen.append(picture(model, opt, losses=losses, calls=calls,
                                schedule=schedule.state_dict()))  # fmt: skip
        if probe:
            assert probe.measured == -(-len(data) // every)
            record = probe.record()
            assert record.counts().max() == probe.measured
            assert differences(seen[-1]["rng"], frozen(torch.get_rng_state())) == []
        return seen

    return train


CASES = [("mixed", wrap) for wrap in WRAPS]
CASES += [(net, wrap) for net in list(NETS)[1:] for wrap in ("plain", "pcgrad", "sam")]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("net", "wrap"), CASES)
def test_nothing_differs(net, mode, wrap, rng):
    data = batches(net, int(rng.integers(2**31)), 4)
    base = str(rng.choice(["momentum"] if mode == "etap" else list(BASES)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_twice(trace(net, base, wrap, MODES[mode], data), int(rng.integers(2**31)))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("mode", ["exact", "optimizer"])
def test_every_base_optimizer_at_every_step(base, mode, rng):
    data = batches("mixed", int(rng.integers(2**31)), 4)
    for wrap in ("plain", "pcgrad"):
        train_twice(
            trace("mixed", base, wrap, MODES[mode], data, every=1), int(rng.integers(2**31))
        )


MICRO = [(mode, wrap, "list") for mode in MODES for wrap in ("pcgrad", "sam")]
MICRO += [(mode, "plain", "calls") for mode in MODES]
MICRO += [(mode, "pcgrad", "calls") for mode in ("first_order", "etap")]  # exact: all at once


@pytest.mark.parametrize(("mode", "wrap", "micro"), MICRO)
def test_micro_batches(mode, wrap, micro, rng):
    seed = int(rng.integers(2**31))
    data = [batches("mixed", seed + k, 2) for k in range(4)]

    def train(with_probe: bool) -> list[Any]:
        model, opt = build("mixed", "momentum", wrap)
        probe = attach(model, opt, MODES[mode]) if with_probe else None
        seen = []
        for parts in data:
            closures = [lambda part=part: model.losses(part) for part in parts]
            if wrap == "plain":  # gradients are there already when the probe measures the second
                for closure in closures:
                    total(probe(closure) if probe else closure()).backward()
                opt.step()
                seen.append(picture(model, opt))
                opt.zero_grad()
                continue
            if micro == "calls":
                for closure in closures:
                    opt.backward(closure)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                opt.step()
                opt.zero_grad()
            else:
                opt.step(closures)
            seen.append(picture(model, opt))
        return seen

    train_twice(train, int(rng.integers(2**31)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrap", ["plain", "pcgrad", "sam"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_amp(mode, wrap, dtype, rng):
    """With a step that overflows, and one after it at which the probe measures again."""
    data = batches("mixed", int(rng.integers(2**31)), 5)

    def train(with_probe: bool) -> list[Any]:
        model, opt = build("mixed", "momentum", wrap)
        probe = attach(model, opt, MODES[mode]) if with_probe else None
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        seen = []
        for k, batch in enumerate(data):

            def closure(batch=batch, k=k):
                with torch.autocast("cpu", dtype=dtype):
                    losses = model.losses(batch)
                return [x * 3e38 * 1e5 if k == 2 else x for x in losses]

            if isinstance(opt, MultiTaskOptimizer):
                opt.backward(closure, scaler=scaler)
            else:
                opt.zero_grad()
                losses = probe(closure, scaler=scaler) if probe else closure()
                scaler.scale(total(losses)).backward()
            scaler.step(opt)
            scaler.update()
            seen.append(picture(model, opt, scale=scaler.get_scale()))
        assert scaler.get_scale() < 2.0**10
        if probe:
            counts = probe.record().counts()
            assert counts.max() == 2
            assert probe.measured == (3 if wrap == "plain" else 2)  # a step that is skipped is none
        return seen

    train_twice(train, int(rng.integers(2**31)))


@pytest.mark.parametrize("wrap", ["plain", "pcgrad", "sam"])
@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_in_between(mode, wrap, rng):
    """Model, optimizer and probe through a file: training and record are those of one run."""
    data = batches("mixed", int(rng.integers(2**31)), 6)
    seed = int(rng.integers(2**31))
    records, pictures = [], []
    for cut in (None, 3):
        torch.manual_seed(seed)
        model, opt = build("mixed", "momentum", wrap)
        probe = attach(model, opt, MODES[mode])
        for k, batch in enumerate(data):
            if k == cut:
                file = io.BytesIO()
                states = [model.state_dict(), opt.state_dict(), probe.state_dict()]
                torch.save([*states, torch.get_rng_state()], file)
                file.seek(0)
                model, opt = build("mixed", "momentum", wrap)
                probe = attach(model, opt, MODES[mode])
                *states, random = torch.load(file, weights_only=True)
                for thing, state in zip((model, opt, probe), states):
                    thing.load_state_dict(state)
                torch.set_rng_state(random)
            if isinstance(opt, MultiTaskOptimizer):
                opt.step(lambda: model.losses(batch))
            else:
                opt.zero_grad()
                total(probe(lambda: model.losses(batch))).backward()
                opt.step()
        records.append(probe.record())
        left = picture(model, opt)
        left.pop("flags")
        pictures.append(left)
    # the frozen parameter is no part of a state that a new model lacks: it is in the state dict
    assert differences(*pictures) == []
    for quantity in records[0].quantities:
        assert (records[0].mean[quantity] == records[1].mean[quantity]).all(), quantity
        assert (records[0].counts(quantity) == records[1].counts(quantity)).all()
    assert records[0].steps.tolist() == records[1].steps.tolist() == [3]


def test_a_compiled_model(rng):
    data = batches("mixed", int(rng.integers(2**31)), 3)

    def train(with_probe: bool) -> list[Any]:
        model, opt = build("mixed", "momentum", "plain")
        probe = attach(model, opt, {}, 1) if with_probe else None
        trunk = torch.compile(model.trunk, backend="aot_eager")
        seen = []
        for x, y in data:

            def closure(x=x, y=y):
                h = trunk(x)
                return [(head(h) - y[:, :2]).square().mean() for head in model.heads]

            opt.zero_grad()
            total(probe(closure) if probe else closure()).backward()
            opt.step()
            seen.append(picture(model, opt))
        return seen

    train_twice(train, int(rng.integers(2**31)))
    torch._dynamo.reset()
