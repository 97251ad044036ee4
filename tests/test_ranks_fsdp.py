"""Parameters that FSDP2 (``fully_shard``) keeps in parts."""

from __future__ import annotations

from itertools import product

import pytest
from shard_runs import Case, chosen, compared

from flatmtl import SAM

SHARP = SAM(0.05)
DIRECT = SAM(0.05, aggregate="direct")
METHODS = ["Mean", "PCGrad", "MGDA", "NashMTL", "CAGrad", "IMTL", "DWA", "UncertaintyWeighting"]
SAMS = [None, SHARP, DIRECT, SAM(0.05, joint_norm=True), SAM(0.05, rho_task=0.02, warmup=2)]
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
