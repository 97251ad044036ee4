"""Parameters that FSDP2 (``fully_shard``) keeps in parts."""

from __future__ import annotations

import time
from itertools import product

import pytest
import torch
import torch.distributed as dist
from shard_runs import Case, Run, chosen, compared, failing, whole
from torch import Tensor, nn

from flatmtl import SAM, MultiTaskOptimizer
from flatmtl.shards import is_sharded
from flatmtl.weighting import PCGrad

SHARP = SAM(0.05)
DIRECT = SAM(0.05, aggregate="direct")
METHODS = ["Mean", "PCGrad", "MGDA", "NashMTL", "CAGrad", "IMTL", "DWA", "UncertaintyWeighting"]
SAMS = [
    None,
    SHARP,
    DIRECT,
    SAM(0.05, joint_norm=True),
    SAM(0.05, rho_task=0.02, warmup=2),
    SAM(0.5, adaptive=True, eta=0.01, joint_norm=True),
    SAM(0.5, adaptive=True, exempt_bias=True),
]
WRAPS = ["heads_replicated", "heads_sharded", "root"]
LABELS = ["not_on_last", "on_first_alone", "not_at_first", "moving"]


def of(wrap: str, **options) -> Case:
    return Case(wrap=wrap, **options)


GROUPS: dict[str, list[Case]] = {
    "methods": [
        of(
            WRAPS[k % 3],
            method=method,
            sharpness=DIRECT if method == "NashMTL" and sharp is SHARP else sharp,
        )
        for k, (method, sharp) in enumerate(product(METHODS, SAMS))
    ],
    "wraps": [
        of(wrap, method=method, sharpness=sharp, reshard=reshard, base=base)
        for wrap, (method, sharp), (reshard, base) in product(
            WRAPS,
            (("MGDA", None), ("PCGrad", SHARP), ("UncertaintyWeighting", None)),
            ((True, "adam"), (False, "adamw"), (None, "momentum")),
        )
    ],
    "nets": [
        of(wrap, method=method, net=net, sharpness=sharp)
        for wrap, method, net, sharp in product(
            ("heads_replicated", "heads_sharded"),
            ("MGDA", "UncertaintyWeighting"),
            ("tiny", "single", "norm", "branch", "few", "open"),
            (None, SHARP),
        )
    ],
    "labels": [
        of("heads_replicated", method=method, labels=labels, sharpness=sharp)
        for method, labels, sharp in product(
            ("PCGrad", "DWA", "UncertaintyWeighting"), LABELS, (None, SHARP)
        )
    ],
    "samples": [
        of(wrap, method=method, samples=samples, labels=labels, sharpness=sharp)
        for method, (wrap, samples, labels), sharp in product(
            ("MGDA", "IMTL", "DWA"),
            (
                ("heads_replicated", "number", "all"),
                ("root", "tasks", "all"),
                ("heads_replicated", "tasks", "moving"),
                ("heads_sharded", "", "zero_on_last"),
            ),
            (None, SHARP),
        )
    ],
    "options": [
        of(wrap, method="MGDA", sharpness=sharp, more=more)
        for wrap, sharp, more in product(
            ("heads_replicated", "heads_sharded"),
            (None, SHARP),
            ({"history": 3}, {"nonfinite": "skip"}, {"nonfinite": "mask"}, {"replay_rng": True}),
        )
    ],
    "one": [
        of("one", method=method, sharpness=sharp)
        for method, sharp in product(("MGDA", "UncertaintyWeighting"), (None, SHARP))
    ],
}
COPIES = [
    of(wrap, method=method, sharpness=sharp, labels=labels)
    for wrap, method, sharp, labels in product(
        ("copies", "copies_heads_sharded"),
        ("PCGrad", "MGDA", "UncertaintyWeighting"),
        (None, SHARP),
        ("all", "moving"),
    )
    if wrap == "copies" or labels == "all"
]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("group", GROUPS)
def test_ranks_make_the_steps_of_one_process(ranks, rng, group, size):
    seed = int(rng.integers(2**31))
    wrong = compared(ranks(size), chosen(GROUPS[group], size, seed), size, seed, 1e-9)
    assert not wrong, "\n".join(wrong)


def test_copies_of_the_shards(ranks, rng):
    seed = int(rng.integers(2**31))
    wrong = compared(ranks(4), chosen(COPIES, 4, seed), 4, seed, 1e-9)
    assert not wrong, "\n".join(wrong)


def test_biases_are_exempt_where_parameters_stay_gathered(ranks, rng):
    seed = int(rng.integers(2**31))
    exempt = SAM(0.5, adaptive=True, exempt_bias=True)
    cases = [of("root", method="MGDA", sharpness=exempt, reshard=keep) for keep in (None, False)]
    wrong = compared(ranks(2), cases, 2, seed, 1e-9)
    assert not wrong, "\n".join(wrong)


def test_clipping_and_half_precision(ranks, rng):
    seed = int(rng.integers(2**31))
    clipped = [
        of(wrap, method="MGDA", clip=0.1, sharpness=sharp, base="adam")
        for wrap, sharp in product(("heads_replicated", "root"), (None, SHARP))
    ]
    wrong = compared(ranks(2), clipped, 2, seed, 1e-9)
    half = [
        of("root", method="MGDA", half=True, sharpness=sharp, dtype=torch.float32)
        for sharp in (None, DIRECT)
    ]
    # gathered in bfloat16, of 8 bits
    wrong += compared(ranks(2), half, 2, seed, 3e-2)
    assert not wrong, "\n".join(wrong)


def test_ranks_stay_the_same(ranks, rng):
    seed = int(rng.integers(2**31))
    case = of(
        "heads_replicated",
        method="MGDA",
        sharpness=SHARP,
        base="adam",
        labels="moving",
        dtype=torch.float32,
    )
    first, *others = ranks(2).run(fifty, case, 2, seed)
    assert first.isfinite().all()
    assert all(torch.equal(one, first) for one in others)


def fifty(rank: int, case: Case, size: int, seed: int) -> Tensor:
    return Run(case, seed, size, rank).train(50)


# ---------------------------------------------------------------- beside the step


def around(rank: int, cases: list[Case], size: int, seed: int) -> list[Tensor]:
    """Our steps, a plain loop, our steps again; looks at .grad and at where parameters lie."""
    found = []
    for case in cases:
        run = Run(case, seed, size, rank)
        run.train(3)  # the third knows what the tasks reach
        closure, _ = run.closure(3)
        kept = list(run.net.trunk.parameters())
        run.optimizer.backward(closure)
        for param in run.net.parameters():
            assert param.grad is not None
            assert is_sharded(param.grad) == is_sharded(param)
            if is_sharded(param):
                assert param.grad.placements == param.placements
                assert param.grad.shape == param.shape
        assert all(map(is_sharded, kept))
        norm = nn.utils.clip_grad_norm_(kept, 1e9)
        alone = torch.cat([whole(p.grad).reshape(-1) for p in kept]).norm()
        torch.testing.assert_close(whole(norm), alone)
        run.optimizer.step()
        run.made += 1
        plain_steps(run, 2)
        assert all(p.grad is None for p in run.net.parameters())
        found.append(run.train(2))
    return found


def plain_steps(run: Run, steps: int) -> None:
    """The mean of the losses, by the base optimizer alone."""
    base = run.optimizer.base_optimizer
    for _ in range(steps):
        base.zero_grad()
        closure, _ = run.closure(run.made)
        run.made += 1
        torch.stack(closure()).mean().backward()
        for param in run.net.heads.parameters():
            if run.rank is not None and not is_sharded(param):
                dist.all_reduce(param.grad)
                param.grad /= run.of
        base.step()
        base.zero_grad()


def test_what_is_left_behind(ranks, rng):
    seed = int(rng.integers(2**31))
    cases = [
        of(wrap, method="MGDA", sharpness=sharp, reshard=reshard)
        for (wrap, reshard), sharp in product(
            (("heads_replicated", True), ("root", False)), (None, SHARP)
        )
    ]
    results = ranks(2).run(around, cases, 2, seed)
    for case, *found in zip(cases, *results, strict=True):
        alone = Run(case, seed, 2)
        alone.train(4)
        plain_steps(alone, 2)
        values = alone.train(2)
        for one in found:
            assert float((one - values).norm() / values.norm()) < 1e-9, f"{case}"


REFUSED = [
    ("GradDrop", None, {}, "looks at whole rows"),
    ("MGDA", None, {"weights_per": "parameter"}, "weights_per"),
    ("MGDA", SAM(0.05, every=2), {}, "above 1"),
    ("MGDA", SAM(0.05, aggregate="second"), {}, "'second'"),
    ("MGDA", SHARP, {"sync_perturbation": False}, "sync_perturbation=False"),
    ("MGDA", None, {"weights_every": 2}, "weights_every"),
    ("MGDA", None, {"jacobian": "batched"}, "jacobian"),
]


def refused(rank: int, size: int, seed: int) -> list[str]:
    texts = []
    for method, sharp, more, _ in REFUSED:
        try:
            Run(of("heads_replicated", method=method, sharpness=sharp, more=more), seed, size, rank)
            texts.append("accepted")
        except (ValueError, NotImplementedError) as error:
            texts.append(str(error))
    run = Run(of("heads_replicated"), seed, size, rank)
    for model in (None, run.net.heads):
        with pytest.raises(
            ValueError, match="model must be given, and be what fully_shard returned"
        ):
            MultiTaskOptimizer(run.optimizer.base_optimizer, weighting=PCGrad(), model=model)
    return texts


def test_what_it_refuses(ranks, rng):
    for texts in ranks(2).run(refused, 2, int(rng.integers(2**31))):
        for (method, _, _, words), text in zip(REFUSED, texts, strict=True):
            assert words in text, (method, text)
            assert "sharded (FSDP2)" in text, (method, text)


# ---------------------------------------------------------------- errors


def test_gradients_that_are_not_finite(ranks, rng):
    seed = int(rng.integers(2**31))
    cases = [(of("heads_replicated", method="MGDA", sharpness=s), "nan", 2) for s in (None, SHARP)]
    for found in zip(*ranks(2).run(failing, cases, 1, 2, seed), strict=True):
        for kind, text, same, _ in found:
            # the rank that looks later finds the text of the other
            assert kind in ("FloatingPointError", "RankFailedError"), text
            assert "finite" in text
            assert same


def errors(rank: int, case: Case, seed: int) -> tuple[str, str, float]:
    run = Run(case, seed, 2, rank, seconds=5.0)
    start = time.monotonic()
    try:
        run.train()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "", "", 0.0


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (
            of("heads_sharded", labels="late_on_last", sharpness=SHARP),
            "must not be None on any rank where the task's own",
        ),
        pytest.param(
            of("heads_replicated", labels="idle"),
            "at least one task on every rank",
            marks=pytest.mark.slow,  # each starts the processes anew
        ),
        (of("heads_replicated", labels="alone_on_last", net="branch"), "no other task through"),
        pytest.param(
            of("heads_replicated", labels="alone_on_last", net="branch", method="DWA"),
            "no other task through",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_a_rank_must_have(ranks, rng, case, words):
    """From the second step on, where it is known what tasks reach."""
    pool = ranks(2)
    try:
        first, last = pool.run(errors, case, int(rng.integers(2**31)))
    finally:
        pool.close()  # a group in which a collective has failed is of no more use
    assert last[0] == "ValueError", last
    assert first[0] == "RankFailedError", first
    for _, text, seconds in (first, last):
        assert words in text
        assert seconds < 30


def after_an_error(rank: int, seed: int) -> str:
    """A second optimizer in the processes where a first one has failed."""
    for text in ("one", "another"):
        run = Run(of("heads_replicated"), seed, 2, rank)
        run.train(1)

        def bad(text: str = text) -> list[Tensor]:
            raise KeyError(text)

        try:
            run.optimizer.step(bad)
        except Exception as error:
            found = str(error)
    return found


def test_an_error_of_an_earlier_optimizer_is_not_shown(ranks, rng):
    for text in ranks(2).run(after_an_error, int(rng.integers(2**31))):
        assert "another" in text
