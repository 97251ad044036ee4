"""First-order affinity of ToxCast's 617 tasks, most of whose labels are missing, and groups by it.

    python examples/affinity_toxcast.py --data toxcast.csv.gz --out toxcast-out

The table is data/toxcast.csv.gz of the chemprop repository (github.com/chemprop/chemprop, MIT), commit
b83635bcddaddcdb91d453128edec9f2be0d25cf: 8,576 molecules as SMILES text, 617 assays with 0, 1 or nothing
(71 %). Inputs are hashed n-grams of the text.

`MultiTaskOptimizer` holds a row of gradients for every task: 617 rows of the trunk's 131,200 parameters
(1,024 -> 128) are 324 MB, and a trunk of ten times the size would need ten times that. From its Gram
matrix a first-order probe has the affinity of all 617 x 617 pairs without another pass. One backward pass a
task: with a head a task a vectorised pass (`flatmtl.Batched`) would carry every head's part through all of
its lanes, which was four times slower here.
"""

import argparse
import resource
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from molecules import FEATURES, ngram_features, read_table, standardise
from progress import progress
from torch import nn

import flatmtl
from flatmtl.grouping import cluster_groups


@dataclass(frozen=True)
class Settings:
    """What a run is."""

    epochs: int = 2
    batch: int = 256
    width: int = 128
    lr: float = 1e-3
    every: int = 2  # steps between two that the probe measures
    groups: int = 8


QUICK = Settings(epochs=3, batch=32, width=8, every=1, groups=3)


class Assays(nn.Module):
    """A trunk of one hidden layer and a logistic regression a task on it."""

    def __init__(self, width, names):
        super().__init__()
        self.names = names
        self.trunk = nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU())
        self.heads = nn.ModuleList([nn.Linear(width, 1) for _ in names])

    def losses(self, x, y, labelled):
        """Mean cross-entropy over a task's labelled molecules; None for a task without any.

        Args:
            x: [N, F].
            y: [N, T], 0 where not labelled.
            labelled: [N, T], 1 or 0.
        """
        hidden = self.trunk(x)
        counts = labelled.sum(0)
        found = {}
        for task, (name, count) in enumerate(zip(self.names, counts.tolist(), strict=True)):
            if count == 0:
                found[name] = None
                continue
            each = nn.functional.binary_cross_entropy_with_logits(
                self.heads[task](hidden).squeeze(1), y[:, task], reduction="none"
            )
            found[name] = (each * labelled[:, task]).sum() / count
        return found


def measure(features, values, names, settings, seed=0):
    """One training of all tasks together under a first-order probe.

    Args:
        features: [N, F].
        values: [N, T], NaN where not labelled.
        names: of the T tasks.
        settings: what the run is.
        seed: of first weights and batches.

    Returns:
        The record, with the overlap of the labels; mean losses by step (numpy); seconds in the loop.
    """
    torch.manual_seed(seed)
    x = torch.from_numpy(features.astype(np.float32))
    known = ~np.isnan(values)
    y, labelled = (
        torch.from_numpy(table.astype(np.float32)) for table in (np.nan_to_num(values), known)
    )
    model = Assays(settings.width, names)
    optimizer = flatmtl.MultiTaskOptimizer(
        torch.optim.Adam(model.parameters(), lr=settings.lr),
        weighting=flatmtl.weighting.Mean(),
        model=model,
    )
    probe = flatmtl.AffinityProbe(optimizer, mode="first_order", every=settings.every)
    steps = len(x) // settings.batch
    seen = []
    start = time.perf_counter()
    with progress(settings.epochs * steps) as advance:
        for epoch in range(settings.epochs):
            for rows in torch.randperm(len(x)).split(settings.batch)[:steps]:
                losses = optimizer.step(partial(model.losses, x[rows], y[rows], labelled[rows]))
                seen.append(np.mean([float(loss) for loss in losses.values() if loss is not None]))
                advance(1, f"epoch {epoch + 1} of {settings.epochs}")
            probe.end_epoch()
    seconds = time.perf_counter() - start
    return probe.record(labelled=known), np.array(seen), seconds


def families(groups, names):
    """Share of the pairs of tasks within one group that are of one assay family (the name's first part).

    Returns:
        That share, and what it would be for groups drawn at random.
    """
    family = np.array([name.split("_")[0] for name in names])
    same = family[:, None] == family
    inside = np.zeros_like(same)
    for group in groups:
        at = [names.index(name) for name in group]
        inside[np.ix_(at, at)] = True
    pairs = ~np.eye(len(names), dtype=bool)
    return same[inside & pairs].mean(), same[pairs].mean()


def _groups(record, most):
    """Several ways to as many groups, and how far they follow the assay families; Markdown."""
    names = record.tasks
    matrices = {
        "affinity": record.matrix(),
        "affinity, rows normalised": record.matrix(normalise=True),
        "cosine": record.matrix("cosine"),
    }
    lines = ["| by | of | sizes | pairs inside of one family | at random | objective (bound) | s |"]
    lines += ["|:---|:---|:---|---:|---:|---:|---:|"]
    for label, matrix in matrices.items():
        known = np.nan_to_num(matrix)  # a pair that was never measured says nothing: 0
        for way in ("clustering", "select_groups"):
            start, value = time.perf_counter(), ""
            if way == "clustering":
                groups = cluster_groups(known, most, tasks=names)
            else:
                found = flatmtl.select_groups(known, most, tasks=names, heuristic=True)
                groups, value = found.groups, f"{found.objective:.3g} ({found.bound:.3g})"
            seconds = time.perf_counter() - start
            inside, chance = families(groups, names)
            sizes = ", ".join(map(str, sorted(map(len, groups), reverse=True)))
            lines.append(
                f"| {way} | {label} | {sizes} | {100 * inside:.0f} % | {100 * chance:.0f} % | "
                f"{value} | {seconds:.1f} |"
            )
    return lines


def run(data, folder, settings):
    """The whole run; returns its report as Markdown."""
    import sklearn  # noqa: F401  # missing: said before the work, not after it

    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    smiles, names, values = read_table(data)
    everyone = np.arange(len(smiles))
    features = np.clip(standardise(ngram_features(smiles), everyone), -5, 5)
    known = ~np.isnan(values)
    record, losses, seconds = measure(features, values, names, settings)
    record.save(folder / "affinity.npz")
    part = max(1, len(losses) // 10)
    counts = record.counts()
    off = ~np.eye(len(names), dtype=bool)
    lines = [
        "# First-order affinity of ToxCast",
        "",
        f"{len(smiles)} molecules, {len(names)} tasks, {100 * (1 - known.mean()):.1f} % of labels "
        f"missing; {len(losses)} steps of {settings.batch}, {int(record.steps.sum())} measured; "
        f"{seconds:.0f} s in the loop.",
        f"Mean training loss of the first and last tenth of the steps: {losses[:part].mean():.3f}, "
        f"{losses[-part:].mean():.3f}.",
        f"Measurements a pair: {counts[off].min()} to {counts[off].max()}; pairs never measured: "
        f"{(counts[off] == 0).sum()}.",
        f"Sample overlap (share of the recipient's labelled molecules that the source has): median "
        f"{np.median(record.overlap[off]):.2f}; below 0.3 for "
        f"{100 * (record.overlap[off] < 0.3).mean():.0f} % of the pairs.",
    ]
    positive = 100 * (record.matrix()[off] > 0).mean()
    lines += [f"Affinity above zero for {positive:.0f} % of the pairs.", ""]
    lines += _groups(record, settings.groups)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lines += [
        "",
        f"Peak resident memory {peak:.0f} MB; {time.perf_counter() - began:.0f} s in all, "
        f"{torch.get_num_threads()} threads.",
    ]
    text = "\n".join(lines) + "\n"
    (folder / "affinity_toxcast.md").write_text(text)
    return text


def main(arguments=None):
    """Reads the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="toxcast.csv.gz")
    parser.add_argument("--out", type=Path, default=Path("toxcast-out"))
    parser.add_argument("--quick", action="store_true", help="seconds; its numbers mean nothing")
    args = parser.parse_args(arguments)
    try:
        print(run(args.data, args.out, QUICK if args.quick else Settings()))
    except (OSError, ValueError, ImportError) as error:
        print(f"affinity_toxcast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
