"""Calls every op and weighting once at small awkward sizes on a device, for compute-sanitizer to watch.

compute-sanitizer --tool memcheck python -m bench.sanitize [--device cuda] [--seconds 40]

T around the kernels' boundaries, P that no vector width divides, rows that start anywhere. Values are
only looked at for being finite: whether they are right is what the tests are for. Ends in order when its
seconds are over, and fails where they did not do for the first sizes, which call every kernel's forms.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time

import torch

from bench import solvers as methods
from bench.gpu import machine
from flatmtl import ops

SIZES = [(8, 4099), (17, 4099), (33, 515), (65, 260), (3, 1025), (9, 130), (2, 3), (1, 1)]
NEEDED = 4  # T = 8, 17, 33, 65: a size of every form of the Gram matrix
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def look(tasks: int, columns: int, dtype: torch.dtype, device: str, offset: int) -> None:
    """Every op at one size; the rows begin ``offset`` elements after an aligned address."""

    def rows(count: int) -> torch.Tensor:
        wide = torch.randn(count, columns + 7, device=device).to(dtype)
        return wide[:, offset : offset + columns]

    jac, sam, wide_out = rows(tasks), rows(tasks), rows(tasks)
    weights = torch.rand(tasks, dtype=torch.float64, device=device)
    weights[0] = 0  # a row that is not read
    gram = ops.gram(jac)
    results = [gram, ops.gram_difference(sam, jac), ops.row_norms(jac), ops.combine(jac, weights)]
    results += ops.gram_pair(sam, jac)
    results.append(ops.combine_flat(jac, weights, sam, weights.flip(0)))
    results.append(ops.project(jac, torch.eye(tasks, dtype=torch.float64, device=device), wide_out))
    results.append(ops.affinity(gram, weights + 1, 0.1))
    results.append(ops.graddrop_(jac, torch.tensor([7, 0], device=device), leak=weights))

    for name in methods.METHODS:
        if tasks >= methods.least_tasks(name):
            for grams in (gram, gram.expand(2, tasks, tasks)):  # a state is of one shape
                results.append(methods.ours(name, tasks)(grams))

    cut = columns // 3
    row, saved = torch.empty_like(jac[0]), sam[0].contiguous()
    pieces = [piece.clone() for piece in (jac[0, :cut], jac[0, cut + columns % 2 :])]
    offsets = [0, cut + columns % 2]
    results.append(ops.pack_row_(row, pieces, offsets))
    results.append(ops.adaptive_sq_norm(saved, row, 0.01))
    ops.perturb_(pieces, saved, row, results[-2], offsets, [0.05, 0.1])
    ops.perturb_(pieces, saved, row, results[-1], offsets, [0.05, 0.1], adaptive=True, eta=0.01)
    ops.restore_(pieces, saved, offsets)
    results.append(ops.pack_row_(row, pieces, offsets, accumulate=True))
    for result in [*results, row, *pieces]:
        assert result.isfinite().all(), (tasks, columns, dtype)
    if dtype in (torch.bfloat16, torch.float16):
        look_beside_float32(jac, sam, weights, offset)


def look_beside_float32(
    jac: torch.Tensor, sam: torch.Tensor, weights: torch.Tensor, offset: int
) -> None:
    """Rows in half precision with float32 gradients, parameters and updates."""
    columns = jac.shape[1]

    def flat() -> torch.Tensor:
        return torch.randn(columns + offset, device=jac.device)[offset:]

    out, saved, cut = flat(), flat(), columns // 3
    ops.combine(jac, weights, out)
    ops.combine_flat(jac, weights, sam, weights.flip(0), out)
    pieces, offsets = [flat()[:cut], flat()[: columns - cut - columns % 2]], [0, cut + columns % 2]
    row = torch.empty_like(jac[0])
    results = [ops.pack_row_(row, pieces, offsets, accumulate=later) for later in (False, True)]
    results.append(ops.adaptive_sq_norm(saved, row, 0.01))
    ops.perturb_(pieces, saved, row, results[1], offsets, [0.05, 0.1])
    ops.perturb_(pieces, saved, row, results[2], offsets, [0.05, 0.1], adaptive=True, eta=0.01)
    for result in [*results, out, row, *pieces]:
        assert result.isfinite().all(), (jac.shape, jac.dtype, "beside float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    given = parser.parse_args()
    if why := machine.refusal(given.device):
        parser.error(why)
    device, end = given.device, time.monotonic() + given.seconds
    seed = int.from_bytes(os.urandom(4), "little")
    torch.manual_seed(seed)
    print(f"seed {seed}", flush=True)
    cases = list(itertools.product((1, 0), DTYPES, SIZES))
    done = 0
    for offset, dtype, (tasks, columns) in cases:
        if time.monotonic() >= end:
            break
        look(tasks, columns, dtype, device, offset)
        done += 1
    if device == "cuda":
        torch.cuda.synchronize()
    if done < NEEDED:
        sys.exit(
            f"{done} of {len(cases)} sizes in {given.seconds:g} s: {NEEDED} must be done at least"
        )
    print(f"{done} of {len(cases)} sizes, every op: no error on {device}")


if __name__ == "__main__":
    main()
