"""Tox21 in several processes, on CPUs or GPUs, each with a part of every batch.

    torchrun --nproc-per-node 2 examples/many_processes.py --data tox21.csv [--shard-rows | --fsdp] [--sam]

The table is data/tox21.csv of the chemprop repository (github.com/chemprop/chemprop, MIT), commit
b83635bcddaddcdb91d453128edec9f2be0d25cf: 7,831 molecules as SMILES text, 12 assays with 0, 1 or nothing
(17 %). A loss is a mean over the labels that a process has in its part of a batch; `samples=` says how many
these are, so that the step is that of the whole batch. `python examples/many_processes.py` is one process.
"""

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from molecules import FEATURES, ngram_features, read_table, split, standardise
from progress import progress
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import flatmtl

cross_entropy = nn.functional.binary_cross_entropy_with_logits


class Assays(nn.Module):
    """A trunk and a logistic regression a task on it."""

    def __init__(self, width, names):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.heads = nn.ModuleDict({name: nn.Linear(width, 1) for name in names})

    def forward(self, x, tasks):
        """task -> logits [N, 1]; a call of the model itself, where DDP and FSDP2 act."""
        hidden = self.trunk(x)
        return {name: self.heads[name](hidden) for name in tasks}


def start():
    """Joins the processes that torchrun has started, or makes a group of one; returns the device."""
    cuda = torch.cuda.is_available()
    backend = "nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda" if cuda else "cpu")


def spread(model, fsdp):
    """The model as the processes train it together."""
    if not fsdp:
        return DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for layer in model.trunk:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    # heads are small, and where they are whole, a process may lack a task
    return fully_shard(model, ignored_params=set(model.heads.parameters()))


def load(path, seed=0):
    """Training and test sets (inputs, labels with NaN where there is none), and the tasks' names."""
    smiles, names, values = read_table(path)
    rows = split(smiles, [int(0.8 * len(smiles))], seed)
    features = np.clip(standardise(ngram_features(smiles), rows[0]), -5, 5)
    x, y = (torch.from_numpy(table.astype(np.float32)) for table in (features, values))
    return [TensorDataset(x[part], y[part]) for part in rows], names


def losses_of(model, names, x, y):
    """A closure that gives the mean loss of each task's labels here (None: there are none)."""
    labelled = {name: (~y[:, k].isnan()).nonzero().squeeze(1) for k, name in enumerate(names)}

    def losses(tasks=tuple(names)):
        outputs, found = model(x, tasks), {}
        for name in tasks:
            rows, k = labelled[name], names.index(name)
            scores, labels = outputs[name][rows, 0], y[rows, k]
            found[name] = cross_entropy(scores, labels) if len(rows) else None
        return found

    return losses


def auc(scores, labels):
    """Area under the ROC curve: the share of pairs of a 1 and a 0 in which the 1 scores higher."""
    ones, zeros = scores[labels == 1], scores[labels == 0]
    return (ones.unsqueeze(1) > zeros).double().mean().item()


@torch.no_grad()
def score(model, names, dataset, device):
    """Mean area under the ROC curve over the tasks. FSDP2 needs every process here."""
    x, y = (table.to(device) for table in dataset.tensors)
    outputs = model(x, names)
    return float(np.mean([auc(outputs[name][:, 0], y[:, k]) for k, name in enumerate(names)]))


def differences(model):
    """The largest difference between a parameter of any process and rank 0's."""
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    mine = torch.cat([p.detach().reshape(-1) for p in whole])
    first = mine.clone()
    dist.broadcast(first, src=0)
    largest = (mine - first).abs().max()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def train(args, device):
    """Trains; returns the test score before and after, and the largest difference between processes."""
    rank, size = dist.get_rank(), dist.get_world_size()
    (training, test), names = load(args.data)
    torch.manual_seed(0)  # the same first weights everywhere
    model = spread(Assays(args.width, names).to(device), args.fsdp)
    optimizer = flatmtl.MultiTaskOptimizer(
        torch.optim.Adam(model.parameters(), lr=args.lr),
        weighting=flatmtl.weighting.PCGrad(),
        sharpness=flatmtl.SAM(rho=0.05) if args.sam else None,
        model=model,
        shard_rows=args.shard_rows,
    )
    sampler = DistributedSampler(training)
    loader = DataLoader(training, args.batch // size, sampler=sampler)
    before = score(model, names, test, device)
    bar = progress(args.epochs * len(loader)) if rank == 0 else nullcontext(lambda *_: None)
    with bar as advance:
        for epoch in range(args.epochs):
            sampler.set_epoch(epoch)
            for batch in loader:
                x, y = (table.to(device) for table in batch)
                counts = (~batch[1].isnan()).sum(0).tolist()  # on the host: nothing waits for a GPU
                optimizer.step(
                    losses_of(model, names, x, y), samples=dict(zip(names, counts, strict=True))
                )
                advance(1, f"epoch {epoch + 1} of {args.epochs}")
    return before, score(model, names, test, device), differences(model)


def main(arguments=None):
    """Reads the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="tox21.csv")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--shard-rows", action="store_true", help="a part of each row on every process"
    )
    how.add_argument("--fsdp", action="store_true", help="a part of each parameter, too")
    parser.add_argument("--sam", action="store_true", help="sharpness-aware: FS-MTL")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=256, help="of all processes together")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args(arguments)
    device = start()
    try:
        before, after, apart = train(args, device)
        if dist.get_rank() == 0:
            print(f"{dist.get_world_size()} processes, mean AUC {before:.3f} -> {after:.3f}")
            print(f"largest difference between processes: {apart:g}")
    except (OSError, ValueError) as error:
        print(f"many_processes: {error}", file=sys.stderr)
        return 2
    finally:
        dist.destroy_process_group()
    return 0 if apart == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
