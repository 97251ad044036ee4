"""Rows of which every rank keeps a part (``shard_rows=True``)."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from shard_runs import Case, Run, check_failures, chosen, compared, failing
from torch import Tensor

from flatmtl import MAML, SAM, SAMO, weighting

SHARP = SAM(0.05)
DIRECT = SAM(0.05, aggregate="direct")
METHODS = ["Mean", "PCGrad", "MGDA", "NashMTL", "CAGrad", "IMTL", "DWA", "UncertaintyWeighting"]
SAMS = [None, SHARP, DIRECT, SAM(0.5, adaptive=True), SAM(0.05, joint_norm=True)]
NETS = ["conv", "tiny", "apart", "single", "norm", "branch", "few", "open"]
LABELS = ["not_on_last", "on_first_alone", "not_at_first", "idle", "idle_at_first", "moving"]

GROUPS: dict[str, list[Case]] = {
    "methods": [
        # the flat parts of NashMTL count as much as the gradients: rounding shows
        Case(method, sharpness=DIRECT if method == "NashMTL" and sharp is SHARP else sharp)
        for method, sharp in product(METHODS, SAMS)
    ],
    "nets": [
        Case(method, net=net, sharpness=sharp)
        for method, net, sharp in product(("MGDA", "UncertaintyWeighting"), NETS, (None, SHARP))
    ],
    "labels": [
        Case(method, labels=labels, sharpness=sharp)
        for method, labels, sharp in product(
            ("PCGrad", "DWA", "UncertaintyWeighting"), LABELS, (None, SHARP)
        )
    ],
    "samples": [
        Case(method, samples=samples, labels=labels, sharpness=sharp)
        for method, (samples, labels), sharp in product(
            ("MGDA", "IMTL", "DWA"),
            (("number", "all"), ("tasks", "all"), ("tasks", "moving"), ("", "zero_on_last")),
            (None, SHARP),
        )
    ],
    "options": [
        Case("MGDA", sharpness=sharp, base=base, more=more)
        for sharp in (None, SHARP)
        for base, more in (
            ("adam", {}),
            ("momentum", {"jacobian": "batched"}),
            ("momentum", {"history": 3}),
            ("momentum", {"nonfinite": "skip"}),
            ("momentum", {"nonfinite": "mask"}),
            ("momentum", {"weights_every": 3}),
            ("adamw", {"weights_every": 2, "history": 2}),
            ("momentum", {"replay_rng": True}),
        )
    ],
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("group", GROUPS)
def test_ranks_make_the_steps_of_one_process(ranks, rng, group, size):
    seed = int(rng.integers(2**31))
    wrong = compared(ranks(size), chosen(GROUPS[group], size, seed), size, seed, 1e-9)
    assert not wrong, "\n".join(wrong)


def test_half_precision_and_scaler(ranks, rng):
    seed = int(rng.integers(2**31))
    rows = [
        Case(method, sharpness=sharp, labels=labels, samples=samples,
             dtype=torch.float32, more={"row_dtype": torch.bfloat16})
        for method, (labels, samples) in (("Mean", ("all", "")), ("MGDA", ("moving", "number")))
        for sharp in (None, DIRECT)
    ]  # fmt: skip
    # bfloat16 has 8 bits: a row of one process is rounded once, one of ranks once for each of them
    wrong = compared(ranks(2), rows, 2, seed, 3e-2)
    scaled = [
        Case(method, sharpness=sharp, scaler=True, dtype=torch.float32)
        for method in ("PCGrad", "UncertaintyWeighting")
        for sharp in (None, SHARP)
    ]
    wrong += compared(ranks(2), scaled, 2, seed, 1e-4)
    assert not wrong, "\n".join(wrong)


def test_ranks_stay_the_same(ranks, rng):
    seed = int(rng.integers(2**31))
    for size, method, sharp in ((2, "MGDA", SHARP), (4, "PCGrad", None)):
        case = Case(method, sharpness=sharp, base="adam", labels="moving", dtype=torch.float32)
        first, *others = ranks(size).run(fifty, case, size, seed)
        assert first.isfinite().all()
        assert all(torch.equal(one, first) for one in others)


def fifty(rank: int, case: Case, size: int, seed: int) -> Tensor:
    return Run(case, seed, size, rank).train(50)


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize(("size", "who"), [(2, 1), (4, 0)])
def test_a_rank_that_fails(ranks, rng, size, who):
    seed = int(rng.integers(2**31))
    cases = [
        (Case(method, sharpness=sharp, labels=labels), where, steps)
        for method, sharp, labels, where, steps in (
            ("PCGrad", None, "all", 0, 0),
            ("MGDA", SHARP, "all", 0, 0),
            ("MGDA", SHARP, "all", 2, 0),
            ("PCGrad", None, "moving", 0, 3),
            ("MGDA", SHARP, "all", 0, 3),
            ("MGDA", DIRECT, "all", 1, 3),
            ("IMTL", SHARP, "all", 3, 3),
            ("UncertaintyWeighting", None, "all", 0, 3),
            ("UncertaintyWeighting", SHARP, "all", 1, 3),
        )
    ]
    results = ranks(size).run(failing, cases, who, size, seed)
    check_failures(cases, results, who, size, seed)


def test_gradients_that_are_not_finite(ranks, rng):
    seed = int(rng.integers(2**31))
    cases = [(Case("MGDA", sharpness=sharp), "nan", 2) for sharp in (None, SHARP)]
    for found in zip(*ranks(2).run(failing, cases, 1, 2, seed), strict=True):
        for kind, text, same, _ in found:
            assert kind == "FloatingPointError", text
            assert same


# ---------------------------------------------------------------- memory


def memory(rank: int, cases: list[Case], size: int, seed: int) -> list[tuple[int, ...]]:
    found = []
    for case in cases:
        run = Run(case, seed, size, rank)
        run.train()
        roles = run.optimizer._engine.roles
        sharded = roles.sharded
        elsewhere = {name for block in roles.blocks for name in block._made}
        assert not elsewhere & {"jac", "sam", "both"}
        kept = sum(rows.numel() for rows in sharded._buffers.values())
        sent = sum(message.numel() for message in sharded._outgoing)
        own = max((block.size for block in roles.own.values()), default=0)
        shared = 0 if roles.shared is None else roles.shared.size
        found.append((kept, sent, shared, own, sum(p.numel() for p in run.net.parameters())))
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_holds_its_part_only(ranks, rng, size):
    """T (P + O) / n elements and a tail a family; two messages on their way."""
    seed = int(rng.integers(2**31))
    cases = [
        Case("MGDA", net=net, sharpness=sharp, dtype=torch.float32)
        for net in ("conv", "single", "tiny")
        for sharp in (None, SHARP)
    ]
    results = ranks(size).run(memory, cases, size, seed)
    for case, *found in zip(cases, *results, strict=True):
        for kept, sent, shared, own, numbers in found:
            part = (shared + own) // size + 16  # a cache line of float32 for the tail
            assert kept == (1 + (case.sharpness is not None)) * case.tasks * part
            assert sent == 2 * size * part
            assert shared <= numbers + 16 * (size + 30)  # whole cache lines, and n of them


# ---------------------------------------------------------------- what it refuses

REFUSED = [
    ("GradDrop", {}, "looks at whole rows"),
    ("MoCo", {}, "looks at whole rows"),
    ("MGDA", {"weights_per": "parameter"}, "weights_per"),
    ("MGDA", {"sharpness": SAM(0.05, every=2)}, "above 1"),
    ("MGDA", {"sharpness": SAM(0.05, aggregate="second")}, "'second'"),
    ("MGDA", {"sharpness": SAM(0.05, aggregate="each")}, "'each'"),
    ("MGDA", {"sharpness": SHARP, "sync_perturbation": False}, "sync_perturbation=False"),
    ("FairGrad", {"sharpness": SAMO(0.01)}, "SAMO"),
    ("Mean", {"sharpness": MAML(0.01, first_order=True)}, "MAML"),
]


def refused(rank: int, size: int, seed: int) -> list[str]:
    texts = []
    for method, more, _ in REFUSED:
        sharp = more.get("sharpness")
        rest = {k: v for k, v in more.items() if k != "sharpness"}
        try:
            Run(Case(method, sharpness=sharp, more=rest), seed, size, rank)
            texts.append("accepted")
        except (ValueError, NotImplementedError) as error:
            texts.append(str(error))
    for sharp in (None, SHARP):
        run = Run(Case("MGDA", sharpness=sharp), seed, size, rank)
        for _ in range(3):  # at the first step and later
            before = run.values()
            closure, _ = run.closure(0)
            with pytest.raises(ValueError, match="one micro-batch a step with shard_rows=True"):
                run.optimizer.step([closure, closure])
            assert torch.equal(run.values(), before)
            run.step()
    return texts


def test_what_it_refuses(ranks, rng):
    assert all(hasattr(weighting, method) for method, _, _ in REFUSED)
    for texts in ranks(2).run(refused, 2, int(rng.integers(2**31))):
        for (method, _, words), text in zip(REFUSED, texts, strict=True):
            assert words in text, (method, text)
            assert "shard_rows must be False" in text or "process_group must be None" in text


def unlike(rank: int, seed: int) -> list[str]:
    """One rank was told otherwise than the other."""
    texts = []
    for what in ("shard_rows", "shared", "weights_per"):
        case = Case("MGDA", wrap="shard_rows" if what == "shard_rows" and rank else "ddp")
        run = Run(case, seed, 2, rank)
        if what == "shared":
            run.optimizer._engine.named = list(run.net.trunk.parameters())[: rank + 1]
        elif what == "weights_per":
            numbers = {id(p): k * rank for k, p in enumerate(run.net.parameters())}
            run.optimizer._engine.groups = lambda numbers=numbers: numbers
        try:
            run.step()
            texts.append("made")
        except Exception as error:
            texts.append(f"{type(error).__name__}: {error}")
    return texts


def test_options_that_differ(ranks, rng):
    first, second = ranks(2).run(unlike, int(rng.integers(2**31)))
    for name, one, other in zip(
        ("shard_rows", "shared", "weights_per"), first, second, strict=True
    ):
        assert one.startswith(f"ValueError: {name} must be the same on every rank"), one
        assert one == other
