"""Several processes on parts of a batch make the steps of one process on the whole."""

from __future__ import annotations

import traceback
from itertools import product

import pytest
import torch
from ranks_training import Case, Run, part
from torch import Tensor, nn

from flatmtl import SAM

SHARP = SAM(0.05)
GRAM = ["mean", "pcgrad", "mgda", "nash_mtl", "cagrad", "imtl_g"]
LOSSES = ["uw", "dwa", "famo", "gls", "imtl_l", "rlw", "bmtl", "slaw", "stch", "go4align", "si"]
BOTH = ["imtl", "gradnorm", "emtl_like"]
ROWS = ["graddrop", "moco", "trimmed_mean", "db_mtl", "excess_mtl"]
LABELS = ["not_on_last", "on_first_alone", "not_at_step_2", "not_at_first", "at_first_on_one", "idle",
          "nothing_on_last_at_first", "moving"]  # fmt: skip

GROUPS: dict[str, list[Case]] = {
    "gram": [
        Case(name, sharpness=sharpness, base="adam" if name in ("mgda", "cagrad") else "momentum")
        for name, sharpness in product(GRAM, (None, SHARP))
    ],
    "sharpness": [
        Case(name, sharpness=sharpness)
        for name in ("pcgrad", "mgda")
        for sharpness in (
            SAM(0.05, aggregate="direct"),
            SAM(0.05, aggregate="second"),
            SAM(0.05, aggregate="each"),
            SAM(0.5, adaptive=True),
            SAM(0.5, adaptive=True, eta=0.01, exempt_bias=True),
            SAM(0.05, every=2),
            SAM(0.05, joint_norm=True),
            SAM(0.05, rho_task=0.02, warmup=3),
        )
    ],
    "nets": [
        Case("mgda", net=net, sharpness=sharpness, ddp=ddp)
        for net, sharpness, ddp in product(
            ("vector", "shared", "apart", "single", "unused"), (None, SHARP), (True, False)
        )
    ]
    + [
        Case(name, net=net, sharpness=sharpness)
        for name, net, sharpness in product(
            ("uw", "moco"), ("vector", "shared", "apart", "single", "unused"), (None, SHARP)
        )
    ],
    "options": [
        Case(name, sharpness=sharpness, more=more, steps=7)
        for name, sharpness in product(("mgda", "pcgrad"), (None, SHARP))
        for more in (
            {"jacobian": "batched"},
            {"weights_per": "parameter"},
            {"weights_every": 3},
            {"history": 5},
            {"nonfinite": "skip"},
            {"replay_rng": True},
        )
        if not (name == "pcgrad" and "weights_per" in more)
    ]
    + [Case("mgda", sharpness=SAM(0.05, every=2), more={"weights_every": 2}, steps=7)],
    "batches": [
        Case(name, sharpness=sharpness, batches=2, more=more)
        for name, sharpness, more in product(
            ("mgda", "uw", "imtl", "dwa"), (None, SHARP), ({}, {"weights_every": 3})
        )
        if name == "mgda" or (name == "imtl" and not more) or not more
    ],
    "scaler": [
        Case(name, sharpness=sharpness, scaler=True, dtype=torch.float32)
        for name, sharpness in product(("pcgrad", "uw", "trimmed_mean"), (None, SHARP))
    ],
    "losses": [
        Case(name, sharpness=sharpness)
        for name, sharpness in product(LOSSES + BOTH + ROWS, (None, SHARP))
    ],
    "labels": [
        Case(name, sharpness=sharpness, data=data, named=named)
        for (name, named), sharpness, data in product(
            (("pcgrad", True), ("uw", False)), (None, SHARP), LABELS
        )
    ],
    "labels_of_others": [
        Case(name, sharpness=sharpness, data=data, more=more)
        for (name, more), sharpness, data in product(
            (
                ("gradnorm", {}),
                ("moco", {}),
                ("famo", {}),
                ("mgda", {"weights_every": 3}),
                ("mgda", {"jacobian": "batched"}),
            ),
            (None, SHARP),
            ("at_first_on_one", "moving", "idle"),
        )
    ],
    "samples": [
        Case(name, sharpness=sharpness, data=data, samples=samples, named=named, more=more)
        for (name, more), sharpness, (data, samples, named) in product(
            (
                ("pcgrad", {}),
                ("uw", {}),
                ("imtl", {}),
                ("famo", {}),
                ("mgda", {"weights_every": 3}),
            ),
            (None, SHARP),
            (("uneven", "number", False), ("ragged", "mapping", True)),
        )
    ]
    + [Case("graddrop", data="ragged", samples="mapping")]
    + [
        Case(name, sharpness=sharpness, data="nothing", samples="number", more=more)
        for (name, more), sharpness in product(
            (("pcgrad", {}), ("uw", {}), ("mgda", {"weights_every": 3})), (None, SHARP)
        )
    ],
}


def trained(rank: int, cases: list[Case], size: int, seed: int) -> list[Tensor | str]:
    found: list[Tensor | str] = []
    for case in cases:
        try:
            found.append(Run(case, seed, size, rank).train())
        except Exception:
            found.append(traceback.format_exc())
    return found


def compared(
    pool, cases: list[Case], size: int, seed: int, tolerance: float
) -> tuple[list[str], list[float]]:
    """What is wrong, and how far each case is from that of one process."""
    wrong, errors = [], []
    results = pool.run(trained, cases, size, seed, timeout=90)
    for case, *found in zip(cases, *results, strict=True):
        texts = [one for one in found if isinstance(one, str)]
        if texts:
            wrong.append(f"{case}: raises {texts[0][-1500:]}")
            continue
        alone = Run(case, seed, size).train()
        if any(not torch.equal(one, found[0]) for one in found[1:]):
            wrong.append(f"{case}: the ranks differ")
        error = float((found[0] - alone).norm() / alone.norm())
        errors.append(error)
        if not error <= tolerance:
            wrong.append(f"{case}: off by {error:.2g}")
    return wrong, errors


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("group", GROUPS)
def test_ranks_make_the_steps_of_one_process(ranks, rng, group, size):
    seed = int(rng.integers(2**31))
    tolerance = 1e-4 if group == "scaler" else 1e-9
    # every second or third case, others in every run: processes beyond the cores are slow
    every = 1 if group == "gram" else 2 if size == 2 else 3
    cases = GROUPS[group][seed % every :: every]
    wrong, _ = compared(ranks(size), cases, size, seed, tolerance)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("size", [2, 4])
def test_rows_in_half_precision(ranks, rng, size):
    seed = int(rng.integers(2**31))
    cases = [
        Case(
            name,
            sharpness=sharpness,
            dtype=torch.float32,
            more={"row_dtype": torch.bfloat16},
            data=data,
            samples=samples,
        )
        for name, sharpness, (data, samples) in product(
            ("mean", "mgda", "uw"), (None, SHARP), (("even", None), ("ragged", "mapping"))
        )
    ]
    # bfloat16 has 8 bits: a row of one process is rounded once, one of ranks once for each of them
    wrong, _ = compared(ranks(size), cases, size, seed, 2e-2)
    assert not wrong, "\n".join(wrong)


# Each rank perturbs along its own gradient.


def own_way(rank: int, cases: list[Case], size: int, seed: int) -> list[Tensor]:
    return [Run(case, seed, size, rank).train() for case in cases]


def definition(case: Case, size: int, seed: int) -> Tensor:
    """m-sharpness, from its definition: SGD on A(g) + A(s - g), or A(s); A: mean or median.

    g_i = sum_r c_ri g_ri / sum_r c_ri with g_ri the gradient of rank r, s_i the same mean of the
    gradients of rank r at theta + eps_ri, eps_ri = rho T^2 g_ri / ||T g_ri||.
    """
    one = Run(case, seed, size)
    sam = case.sharpness
    assert isinstance(sam, SAM)
    rho_task = sam.rho if sam.rho_task is None else sam.rho_task
    shared = list(one.net.trunk.parameters())
    own = [list(one.net.heads[t].parameters()) for t in range(3)]
    speed: dict[nn.Parameter, Tensor] = {}

    def aggregate(rows: Tensor) -> Tensor:
        return rows.mean(0) if case.weighting == "mean" else rows.median(0).values

    def loss(k: int, rows: list[int], t: int) -> Tensor | None:
        there = one.there[k, rows, t]
        if not there.any():
            return None
        return (one.net(one.x[k, rows])[t] - one.y[k, rows, t])[there].square().mean()

    def moves(params: list[nn.Parameter], grads: list[Tensor], rho: float) -> list[Tensor]:
        scale = [p.detach().abs() + sam.eta if sam.adaptive else torch.ones_like(p) for p in params]
        norm = sum((s * g).square().sum() for s, g in zip(scale, grads)).sqrt()
        return [rho * s * s * g / norm for s, g in zip(scale, grads)]

    for k in range(case.steps):
        plain, perturbed = [], []
        for t in range(3):
            params = shared + own[t]
            sums = [[torch.zeros_like(p) for p in params] for _ in range(2)]
            total = 0.0
            for rank in range(size):
                (rows,) = part(case, size, rank)
                found = loss(k, rows, t) if rows else None
                if found is None:
                    continue
                count = float(one.there[k, rows, t].sum()) if case.samples else 1.0
                grads = list(torch.autograd.grad(found, params))
                if sam.joint_norm:
                    eps = moves(params, grads, sam.rho)
                else:
                    n = len(shared)
                    eps = moves(shared, grads[:n], sam.rho) + moves(own[t], grads[n:], rho_task)
                before = [p.detach().clone() for p in params]
                with torch.no_grad():
                    for p, e in zip(params, eps):
                        p.add_(e)
                again = loss(k, rows, t)
                assert again is not None
                sharp = torch.autograd.grad(again, params)
                with torch.no_grad():
                    for p, b in zip(params, before):
                        p.copy_(b)
                total += count
                for into, found_there in zip(sums, (grads, sharp)):
                    for a, b in zip(into, found_there):
                        a.add_(b, alpha=count)
            plain.append([g / total for g in sums[0]])
            perturbed.append([g / total for g in sums[1]])
        n = len(shared)
        rows_g = torch.stack([torch.cat([g.flatten() for g in gs[:n]]) for gs in plain])
        rows_s = torch.stack([torch.cat([g.flatten() for g in gs[:n]]) for gs in perturbed])
        if sam.aggregate == "direct":
            step = aggregate(rows_s)
        else:
            step = aggregate(rows_g) + aggregate(rows_s - rows_g)
        update = list(step.split([p.numel() for p in shared]))
        pairs = [(p, u.view_as(p)) for p, u in zip(shared, update)]
        pairs += [(p, g) for t in range(3) for p, g in zip(own[t], perturbed[t][n:])]
        with torch.no_grad():
            for p, g in pairs:
                speed[p] = g if p not in speed else 0.9 * speed[p] + g
                p.sub_(case.lr * speed[p])
    return one.flat()


@pytest.mark.parametrize("size", [2, 4])
def test_each_rank_perturbs_along_its_own_gradient(ranks, rng, size):
    seed = int(rng.integers(2**31))
    local = {"sync_perturbation": False}
    cases = [
        Case(name, sharpness=sharpness, data=data, samples=samples, more=local, steps=3)
        for name, sharpness, (data, samples) in product(
            ("mean", "trimmed_mean"),
            (
                SAM(0.3, rho_task=0.1),
                SAM(0.3, aggregate="direct"),
                SAM(0.3, joint_norm=True),
                SAM(0.5, adaptive=True, eta=0.01),
            ),
            (("even", None), ("not_on_last", None), ("ragged", "mapping"), ("idle", None)),
        )
    ]
    cases = cases if size == 2 else cases[seed % 3 :: 3]
    for case, *found in zip(cases, *ranks(size).run(own_way, cases, size, seed), strict=True):
        expected = definition(case, size, seed)
        for one in found:
            assert torch.equal(one, found[0]), case
        error = (found[0] - expected).norm() / expected.norm()
        assert error < 1e-9, (case, error)
        if case.data == "idle" and size == 2:
            continue  # one rank has it all
        together = Run(case, seed, size).train()
        assert (together - expected).norm() / expected.norm() > 1e-6, case  # another method
