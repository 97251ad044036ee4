"""Many small networks of one form trained side by side, each on a group of tasks of its own.

The first layers stand in one matrix, the others in batched ones (`torch.bmm`): on a CPU faster than one
network after the other. All start from the same weights and see the same batches; no network touches
another, and Adam works element by element, so each is trained as it would be alone (up to rounding).
"""

import math

import numpy as np
import torch
from torch import nn


class Regressor(nn.Module):
    """A shared trunk of two hidden layers and a linear head a task."""

    def __init__(self, features, width, tasks):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.heads = nn.ModuleDict({name: nn.Linear(width, 1) for name in tasks})

    def forward(self, x, tasks):
        """The predictions of some tasks: name -> [N]."""
        hidden = self.trunk(x)
        return {name: self.heads[name](hidden).squeeze(1) for name in tasks}


class Networks(nn.Module):
    """Copies of one Regressor side by side, each for its own group.

    Args:
        model: what all start from, T heads.
        groups: M groups of task names.
    """

    def __init__(self, model, groups):
        super().__init__()
        first, second = model.trunk[0], model.trunk[2]
        names, copies = list(model.heads), len(groups)
        heads = torch.cat([head.weight for head in model.heads.values()])  # [T, H]
        offsets = torch.cat([head.bias for head in model.heads.values()])  # [T]

        def stacked(tensor):
            return nn.Parameter(tensor.detach().expand(copies, *tensor.shape).contiguous())

        self.copies = copies
        self.first = nn.Parameter(first.weight.detach().repeat(copies, 1))  # [M H, F]
        self.first_bias = nn.Parameter(first.bias.detach().repeat(copies))
        self.second, self.second_bias = stacked(second.weight.T), stacked(second.bias[None])
        self.heads, self.heads_bias = stacked(heads.T), stacked(offsets[None])
        mask = torch.tensor([[name in group for name in names] for group in groups])
        self.register_buffer("mask", mask.float())  # [M, T]

    def forward(self, x):
        """What every network predicts of every task: [M, N, T]."""
        hidden = torch.relu(nn.functional.linear(x, self.first, self.first_bias))
        hidden = hidden.view(len(x), self.copies, -1).transpose(0, 1)  # [M, N, H]
        hidden = torch.relu(torch.baddbmm(self.second_bias, hidden, self.second))
        return torch.baddbmm(self.heads_bias, hidden, self.heads)

    def loss(self, x, y):
        """The sum over the networks of the sum of their own tasks' mean squared errors."""
        return ((self(x) - y).square().mean(1) * self.mask).sum()


def batches(rows, size, epochs, seed):
    """Epoch by epoch a list of mini-batches, the same for every network of a seed."""
    order = np.random.default_rng(seed)
    for _ in range(epochs):
        shuffled = torch.from_numpy(order.permutation(rows))
        yield [shuffled[k : k + size] for k in range(0, len(rows) - size + 1, size)]


def adam(model, lr, steps):
    """AdamW and its schedule: the rate rises over a tenth of the steps, then falls as a cosine to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)

    def share(step):
        rise = max(1, steps // 10)
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


@torch.no_grad()
def errors(networks, x, y, rows, at_once=1024):
    """Mean squared error of every network and task, NaN where the task is not the network's: [M, T]."""
    total = torch.zeros_like(networks.mask)
    for start in range(0, len(rows), at_once):
        part = rows[start : start + at_once]
        total += (networks(x[part]) - y[part]).square().sum(1)
    return torch.where(networks.mask > 0, total / len(rows), torch.nan).numpy()
