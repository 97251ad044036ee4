"""Rows of which every rank keeps a part (``shard_rows=True``)."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from shard_runs import Case, chosen, compared

from flatmtl import SAM

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
