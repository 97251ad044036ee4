"""A rank that cannot go on: all raise, nothing has changed, and the next step is as ever."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankError
from ranks_training import Case, Run, same, snapshot
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flatmtl import SAM, MultiTaskOptimizer
from flatmtl.weighting import DWA, MGDA, Mean, PCGrad, UncertaintyWeighting

SHARP = SAM(0.05)
SECONDS = 10.0  # a failure is known at once; a hang lasts 30


class Bomb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ValueError("boom in the backward pass")


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a step.

    Attributes:
        where: "clean", "backward", "perturbed", "names", "nan", or "both": one rank's clean pass and
            another's backward pass.
        step: at which.
    """

    where: str
    step: int


def spoiled(
    closure: Callable[..., Any], where: str, called: list[int], named: bool
) -> Callable[..., Any]:
    """The closure with the fault in it. `called`: how often it was."""

    def losses(tasks: Any = None) -> Any:
        called[0] += 1
        found = closure() if tasks is None else closure(tasks=tasks)
        if where == "clean":
            raise ValueError("boom in the clean pass")
        if where == "perturbed" and called[0] == 3:  # the clean one, task 0, task 1
            raise ValueError("boom in a perturbed pass")
        if where in ("backward", "nan") and called[0] == 1:
            spoil = Bomb.apply if where == "backward" else lambda loss: loss * torch.nan
            values = dict(found) if named else dict(enumerate(found))
            there = [key for key, loss in values.items() if loss is not None]
            key = list(values)[1] if list(values)[1] in there else there[0]
            values[key] = spoil(values[key])
            return values if named else list(values.values())
        if where == "names" and called[0] == 1:
            return found[:2]
        return found

    return losses


def failing(
    rank: int, cases: list[tuple[Case, Fault]], size: int, bad: int, seed: int
) -> list[dict[str, Any]]:
    found = []
    undisturbed: dict[Any, Tensor] = {}
    for case, fault in cases:
        run = Run(case, seed, size, rank)
        while run.k < fault.step:
            run.step()
        before = snapshot(run)
        called = [0]
        where = fault.where if rank == bad else None
        if fault.where == "both":
            where = "clean" if rank == bad else "backward"

        def wrap(closure: Callable[..., Any]) -> Callable[..., Any]:
            return closure if where is None else spoiled(closure, where, called, case.named)

        start, error = time.monotonic(), None
        try:
            run.step(wrap)
            run.k -= 1
        except Exception as raised:
            error = raised
        seconds = time.monotonic() - start
        result = {
            "error": None if error is None else (type(error).__name__, str(error)),
            "seconds": seconds,
            "same": same(before, snapshot(run)),
            "parameters": same(before[0], snapshot(run)[0]),
        }
        run.optimizer.zero_grad()
        try:
            result["end"] = run.train()
        except Exception:
            result["end"] = traceback.format_exc()
        if (key := repr(case)) not in undisturbed:
            undisturbed[key] = Run(case, seed, size, rank).train()
        result["undisturbed"] = undisturbed[key]
        found.append(result)
    return found


def name_of(case: Case, fault: Fault) -> str:
    more = dict(case.more)
    return f"{case.weighting} {case.sharpness} {case.net} {case.data} {more} {fault}"


WAYS = [
    Case("pcgrad"),
    Case("pcgrad", named=True, ddp=False),
    Case("pcgrad", sharpness=SHARP),
    Case("pcgrad", sharpness=SHARP, more={"sync_perturbation": False}),
    Case("mgda", more={"jacobian": "batched"}),
    Case("mgda", net="unused"),
    Case("mgda", net="unused", sharpness=SHARP),
    Case("uw"),
    Case("uw", sharpness=SHARP),
    Case("uw", net="unused"),
    Case("dwa", batches=2),
    Case("famo"),
    Case("imtl", sharpness=SHARP),
    Case("graddrop"),
    Case("mgda", more={"weights_every": 3}),
    Case("mgda", sharpness=SHARP, more={"weights_every": 3}),
    Case("mgda", sharpness=SAM(0.05, every=2)),
    Case("mgda", data="at_first_on_one"),
]


def faults(case: Case) -> list[Fault]:
    found = [Fault(where, step) for where in ("clean", "backward") for step in (0, 2)]
    if case.sharpness is not None:
        found += [Fault("perturbed", step) for step in (0, 2)]
    if not case.named and case.batches == 1:
        found.append(Fault("names", 2))
    found.append(Fault("both", 2))
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_that_raises(ranks, rng, size):
    seed, bad = int(rng.integers(2**31)), int(rng.integers(size))
    cases = [(case, fault) for case in WAYS for fault in faults(case)]
    every = 5 if size == 2 else 20  # others in every run
    cases = cases[seed % every :: every]
    results = ranks(size).run(failing, cases, size, bad, seed, timeout=90)
    wrong = []
    for (case, fault), *found in zip(cases, *results, strict=True):
        every = case.sharpness.every if isinstance(case.sharpness, SAM) else 1
        again = fault.step % max(every, case.more.get("weights_every", 1))
        silent = fault.where == "perturbed" and again  # there are fewer passes
        for rank, one in enumerate(found):
            said = [] if silent else list(complaints(one, fault, rank, bad, every))
            wrong += [f"{name_of(case, fault)}: rank {rank} {text}" for text in said]
    assert not wrong, "\n".join(wrong)


def complaints(one: dict[str, Any], fault: Fault, rank: int, bad: int, every: int) -> Iterator[str]:
    """What is wrong about what a rank has gone through."""
    kind, text = one["error"] or ("", "")
    # a rank that is to fail in its backward pass may hear of the other before it
    told = kind == "RankFailedError" and (
        f"rank {bad}: ValueError: " in text or fault.where == "both"
    )
    raised = kind == "ValueError" and not text.startswith("the step")
    own = rank == bad
    if not (raised if own else told or (raised and fault.where == "both")):
        yield f"raises {kind}: {text}"
    if not ("boom" in text or fault.where == "names"):
        yield f"says {text}"
    if one["seconds"] > SECONDS:
        yield f"takes {one['seconds']} s"
    if not one["parameters"]:
        yield "has other parameters"
    # the first step tells what is shared; a perturbed pass overwrites the flat part of earlier ones
    elif not (one["same"] or fault.step == 0 or (fault.where == "perturbed" and every > 1)):
        yield "has another state"
    if isinstance(one["end"], str):
        yield f"cannot go on: {one['end'][-600:]}"
    elif not torch.equal(one["end"], one["undisturbed"]):
        yield "goes on otherwise"


def behind(rank: int, size: int, bad: int, seed: int) -> list[tuple[str, str]]:
    """FAMO looks at the losses again after a step: one rank fails there, and then in a clean pass."""
    run = Run(Case("famo"), seed, size, rank)
    run.step()

    def wrap(closure: Callable[..., Any]) -> Callable[..., Any]:
        calls = [0]

        def losses() -> Any:
            calls[0] += 1
            if calls[0] == 2 and rank == bad:
                raise ValueError("boom behind the step")
            return closure()

        return losses

    texts = [raised(lambda: run.step(wrap))]
    where = ["clean"] if rank == bad else []
    for fault in where * 2 or [""] * 2:
        texts.append(raised(lambda: run.step(lambda c: spoiled(c, fault, [0], False))))
    run.step()
    texts.append((str(run.flat().tolist()), ""))
    return texts


def test_a_rank_that_raises_behind_the_step(ranks, rng):
    bad = int(rng.integers(2))
    results = ranks(2).run(behind, 2, bad, int(rng.integers(2**31)))
    assert results[0][-1] == results[1][-1]
    boom = ["boom behind the step", "boom in the clean pass", "boom in the clean pass"]
    assert results[bad][:3] == [("ValueError", text) for text in boom]
    for (kind, text), cause in zip(results[1 - bad], boom):
        assert kind == "RankFailedError"
        assert f"rank {bad}: ValueError: {cause}" in text


# A loss that is not finite, on one rank.


def not_finite(rank: int, cases: list[Case], size: int, bad: int, seed: int) -> list[Any]:
    found = []
    for case in cases:
        run = Run(case, seed, size, rank)
        while run.k < 2:
            run.step()
        before = snapshot(run)
        called = [0]

        def wrap(closure: Callable[..., Any]) -> Callable[..., Any]:
            return closure if rank != bad else spoiled(closure, "nan", called, case.named)

        error = None
        try:
            run.step(wrap)
        except Exception as raised:
            error = type(raised).__name__
            run.k += 1
        finite = run.optimizer.last_status()["finite"]
        kept = same(before[0], snapshot(run)[0])
        found.append((error, kept, finite, run.flat(), run.train()))
    return found


def alone_not_finite(case: Case, seed: int, size: int) -> tuple[Any, Tensor, Tensor]:
    run = Run(case, seed, size)
    while run.k < 2:
        run.step()
    called = [0]
    try:
        run.step(lambda closure: spoiled(closure, "nan", called, case.named))
    except FloatingPointError:
        run.k += 1
    return run.optimizer.last_status()["finite"], run.flat(), run.train()


@pytest.mark.parametrize("size", [2, 4])
def test_a_loss_that_is_not_finite(ranks, rng, size):
    seed, bad = int(rng.integers(2**31)), int(rng.integers(size))
    cases = [
        Case(name, sharpness=sharpness, more={"nonfinite": nonfinite, **more})
        for name, sharpness, more in (
            ("pcgrad", None, {}),
            ("pcgrad", SHARP, {}),
            ("pcgrad", SHARP, {"sync_perturbation": False}),
            ("uw", None, {}),
            ("dwa", SHARP, {}),
            ("famo", None, {}),
            ("mgda", None, {"weights_every": 3}),
            ("mgda", SHARP, {"weights_every": 3}),
        )
        for nonfinite in ("raise", "mask", "skip")
    ]
    cases = cases if size == 2 else cases[seed % 2 :: 2]
    results = ranks(size).run(not_finite, cases, size, bad, seed)
    wrong = []
    for case, *found in zip(cases, *results, strict=True):
        how = case.more["nonfinite"]
        local = "sync_perturbation" in case.more
        flags, after, end = (None, None, None) if local else alone_not_finite(case, seed, size)
        for rank, (error, kept, finite, flat, last) in enumerate(found):
            name = f"{case.weighting} {case.sharpness} {dict(case.more)} rank {rank}"
            if error != ("FloatingPointError" if how == "raise" else None):
                wrong.append(f"{name}: raises {error}")
            if kept != (how != "mask"):
                wrong.append(f"{name}: kept {kept}")
            if finite != flags and not local:
                wrong.append(f"{name}: finite {finite}")
            if not (torch.equal(flat, found[0][3]) and torch.equal(last, found[0][4])):
                wrong.append(f"{name}: differs from rank 0")
            if after is not None and not torch.allclose(flat, after, 1e-8, 1e-10):
                wrong.append(f"{name}: one process is elsewhere after the step")
            if end is not None and not torch.allclose(last, end, 1e-8, 1e-10):
                wrong.append(f"{name}: one process is elsewhere at the end")
    assert not wrong, "\n".join(wrong)


# What must be the same on all ranks.


def optimizer_of(
    net: nn.Module,
    *,
    lr: float = 0.1,
    weighting: Any = None,
    params: Any = None,
    kind: Any = torch.optim.SGD,
    **more: Any,
) -> MultiTaskOptimizer:
    base = kind(list(net.parameters()) if params is None else params, lr=lr)
    more = {"process_group": dist.group.WORLD, **more}
    return MultiTaskOptimizer(base, weighting=weighting or Mean(), model=net, **more)


class Pair(nn.Module):
    def __init__(self, names: tuple[str, str] = ("one", "two"), width: int = 3) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(3, width, bias=False))
        self.names = names

    def forward(self, x: Tensor) -> list[Tensor]:
        first, second = (getattr(self, name)(x) for name in self.names)
        return [(first + second).square().mean(), first.square().mean(), second.square().mean()]


def differing(rank: int, bad: int, what: str) -> Any:
    """What a rank raises at its first step, with something else on the rank `bad`."""
    torch.manual_seed(5)
    other = rank == bad
    net = Pair(("one", "three") if other and what == "names" else ("one", "two"))
    tasks, more = (0, 1, 2), {}
    if what == "values" and other:
        with torch.no_grad():
            net.two.weight[1, 2] += 1e-6
    elif what == "shapes" and other:
        net = Pair(width=2)
    elif what == "number" and other:
        net.third = nn.Linear(2, 2)
    elif what == "frozen" and other:
        net.two.weight.requires_grad_(False)
    elif what == "lr" and other:
        more["lr"] = 0.2
    elif what == "betas":
        more["kind"] = torch.optim.Adam
        if other:
            more["params"] = [{"params": list(net.parameters()), "betas": (0.8, 0.99)}]
    elif what == "tensor lr":
        lr = torch.tensor(0.2 if other else 0.1)
        more["params"] = [{"params": list(net.parameters()), "lr": lr}]
        more["kind"] = torch.optim.Adam
    elif what == "order" and other:
        more["params"] = list(net.parameters())[::-1]
    elif what == "groups" and other:
        more["params"] = [{"params": [p]} for p in net.parameters()]
    elif what == "group lr":
        first, second = net.parameters()
        more["params"] = [{"params": [first, second]}]
        if other:
            more["params"] = [{"params": [first]}, {"params": [second], "lr": 0.3}]
    elif what == "weighting":
        more["weighting"] = MGDA() if other else Mean()
    elif what == "seed":
        more["weighting"] = PCGrad(seed=rank if other else 0)
    elif what == "arguments":
        more["weighting"] = DWA(temperature=3.0 if other else 2.0)
    elif what == "sharpness" and other:
        more["sharpness"] = SAM(0.05)
    elif what == "rho":
        more["sharpness"] = SAM(0.1 if other else 0.05)
    elif what == "optimizer" and other:
        more["kind"] = torch.optim.Adam
    elif what == "weights_per" and other:
        more["weights_per"] = "parameter"
    elif what == "jacobian" and other:
        more["jacobian"] = "batched"
    elif what == "shared" and other:
        more["shared"] = [net.one.weight]
    elif what == "loss order":
        more["weighting"] = UncertaintyWeighting(3)
    if what == "T" and other:
        tasks = (0, 1)
    optimizer = optimizer_of(net, **more)
    before = [p.detach().clone() for p in net.parameters()]

    def closure() -> Any:
        losses = net(torch.full((2, 3), 1.0 + rank))
        chosen = [losses[t] for t in tasks]
        if what in ("task order", "loss order"):
            names = "bac" if other else "abc"
            return {name: losses["abc".index(name)] for name in names}
        if what == "task names":
            return dict(zip("abd" if other else "abc", losses))
        return chosen

    start = time.monotonic()
    try:
        optimizer.step(closure)
    except Exception as error:
        kept = same(before, list(net.parameters()))
        return type(error).__name__, str(error), kept, time.monotonic() - start
    return [p.detach().clone() for p in net.parameters()]


def differings(rank: int, bad: int, kinds: list[str]) -> list[Any]:
    return [differing(rank, bad, what) for what in kinds]


BOTH_SIDES = {
    "T": ("[0, 1, 2]", "[0, 1]"),
    "task order": ("['a', 'b', 'c']", "['b', 'a', 'c']"),
    "loss order": ("['a', 'b', 'c']", "['b', 'a', 'c']"),
    "task names": ("['a', 'b', 'c']", "['a', 'b', 'd']"),
    "shapes": ("[3, 3]", "[2, 3]"),
    "number": ("2", "4"),
    "frozen": ("float64", "frozen"),
    "names": ("two", "three"),
    "order": ("one", "two"),
    "values": ("two", "rank"),
    "lr": ("0.1", "0.2"),
    "betas": ("0.999", "0.99"),
    "tensor lr": ("0.1", "0.2"),
    "groups": ("param_groups[0]", "1"),
    "group lr": ("param_groups[0]", "1"),
    "weighting": ("Mean", "MGDA"),
    "seed": ("PCGrad", "seed"),
    "arguments": ("2.0", "3.0"),
    "sharpness": ("None", "SAM"),
    "rho": ("0.05", "0.1"),
    "optimizer": ("momentum", "amsgrad"),
    "weights_per": ("None", "[0, 1]"),
    "shared": ("shared", "rank"),
}


@pytest.mark.parametrize("size", [2, 4])
def test_what_differs_is_said_on_every_rank(ranks, rng, size):
    bad = int(rng.integers(1, size))
    kinds = list(BOTH_SIDES)
    results = ranks(size).run(differings, bad, kinds, timeout=90)
    wrong = []
    for what, *found in zip(kinds, *results, strict=True):
        for rank, one in enumerate(found):
            if isinstance(one, list):
                wrong.append(f"{what}: rank {rank} makes the step")
                continue
            kind, text, kept, seconds = one
            parts = [*BOTH_SIDES[what], "rank 0", f"rank {bad}"]
            missing = [
                p for p in parts if p not in text and not (what == "frozen" and p == "float64")
            ]
            if kind != "ValueError" or missing:
                wrong.append(f"{what}: rank {rank} raises {kind}: {text} without {missing}")
            if not kept or seconds > SECONDS:
                wrong.append(f"{what}: rank {rank}: kept {kept}, {seconds} s")
    assert not wrong, "\n".join(wrong)


def test_what_may_differ(ranks):
    first, second = ranks(2).run(differings, 1, ["jacobian"])
    assert isinstance(first[0], list)
    assert same(first, second)


# Arguments.


def raised(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def arguments(rank: int) -> dict[str, Any]:
    torch.manual_seed(3)
    found: dict[str, Any] = {}
    for name, value in (("text", "world"), ("number", 0), ("module", nn.Linear(1, 1))):
        found[name] = raised(lambda: optimizer_of(Pair(), process_group=value))
    found["plain"] = raised(lambda: optimizer_of(Pair(), process_group="model"))
    static = DistributedDataParallel(Pair(), static_graph=True)
    found["static"] = raised(lambda: optimizer_of(static, process_group="model"))
    inside = nn.ModuleDict({"net": DistributedDataParallel(Pair())})
    found["inside"] = raised(lambda: optimizer_of(inside, process_group="model"))

    net = Pair()
    optimizer = optimizer_of(net)
    x = torch.full((2, 3), 1.0 + rank)
    before = [p.detach().clone() for p in net.parameters()]
    for name, samples in (
        ("few", [1, 2]),
        ("names", {"a": 1, "b": 2, "c": 3}),
        ("negative", -1),
        ("nan", float("nan")),
        ("word", "4"),
        ("flag", True),
        ("words", ["1", "2", "3"]),
    ):
        found[f"samples {name}"] = raised(lambda: optimizer.step(lambda: net(x), samples=samples))
    # wrong on one rank alone
    mine = [1, 2] if rank == 1 else 2
    found["one rank"] = raised(lambda: optimizer.step(lambda: net(x), samples=mine))
    found["kept"] = same(before, list(net.parameters()))
    optimizer.backward(lambda: net(x))
    found["twice"] = raised(lambda: optimizer.backward(lambda: net(x)))
    optimizer.step()
    found["moved"] = not same(before, list(net.parameters()))
    found["after"] = [p.detach().clone() for p in net.parameters()]

    alone = Pair()
    optimizer = optimizer_of(alone, process_group=None)
    for _ in range(1 + rank):  # as many steps as it likes
        optimizer.step(lambda: alone(x))
    twin = Pair()
    twin.load_state_dict(dict(zip(twin.state_dict(), before)))
    return found


def test_arguments(ranks):
    first, second = ranks(2).run(arguments)
    assert same(first["after"], second["after"])
    for found in (first, second):
        for name in ("text", "number", "module"):
            assert found[name][0] == "TypeError", found[name]
            assert "process_group must be" in found[name][1]
        assert found["plain"][0] == "ValueError"
        assert "process_group must be given" in found["plain"][1]
        assert found["static"][0] == "ValueError"
        assert "static_graph" in found["static"][1]
        assert found["inside"] == ("", "")
        for name in ("few", "names", "negative", "nan"):
            assert found[f"samples {name}"][0] == "ValueError", (name, found[f"samples {name}"])
        for name in ("word", "flag", "words"):
            assert found[f"samples {name}"][0] == "TypeError", (name, found[f"samples {name}"])
        assert found["twice"][0] == "RuntimeError"
        assert "all micro-batches" in found["twice"][1]
        assert found["kept"]
        assert found["moved"]
    assert first["one rank"][0] == "RankFailedError"
    assert "rank 1: ValueError: samples must have" in first["one rank"][1]
    assert second["one rank"][0] == "ValueError"


# A rank that dies.


def dies(rank: int, who: int, case: Case, seed: int) -> Any:
    run = Run(case, seed, 2, rank)
    run.step()
    before = snapshot(run)[0]

    def wrap(closure: Callable[..., Any]) -> Callable[..., Any]:
        def last() -> Any:
            os._exit(7)

        return last if rank == who else closure

    start = time.monotonic()
    error = raised(lambda: run.step(wrap))
    torch.save(
        (error, same(before, snapshot(run)[0]), time.monotonic() - start), os.environ["ANSWER"]
    )
    return None


@pytest.mark.parametrize("case", [Case("pcgrad", sharpness=SHARP), Case("uw")])
def test_a_rank_that_dies(rng, tmp_path, case):
    from ranks import Pool

    answer = tmp_path / "answer"
    pool = Pool(2, {"ANSWER": str(answer)})
    try:
        with pytest.raises(RankError) as caught:
            pool.run(dies, 1, case, int(rng.integers(2**31)))
        assert caught.value.failures == {1: ("ProcessDied", "exit code 7", "")}
        assert caught.value.hung == []
        (kind, _), kept, seconds = torch.load(answer, weights_only=False)
        assert kind not in ("", "RankFailedError")
        assert kept
        assert seconds < SECONDS
    finally:
        pool.close()
