"""A whole training loop around FS-MTL, in seconds on a CPU: validation, schedule, warm-up, checkpoint.

python examples/plain_loop.py [plain]
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flatmtl

TASKS = ("sum", "product")


class TwoTasks(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(10, 64), nn.BatchNorm1d(64), nn.ReLU())
        self.heads = nn.ModuleDict({t: nn.Linear(64, 1) for t in TASKS})

    def losses(self, batch, tasks=TASKS):
        """Forward only; the perturbed passes ask for one task at a time."""
        x, targets = batch[0], dict(zip(TASKS, batch[1:], strict=True))
        features = self.trunk(x)
        return {t: nn.functional.mse_loss(self.heads[t](features), targets[t]) for t in tasks}


def make(steps, flat=True):
    """The model, its optimizer and its schedule: a resumed run makes them in the same way."""
    model = TwoTasks()
    optimizer = flatmtl.MultiTaskOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        weighting=flatmtl.weighting.PCGrad(),
        sharpness=flatmtl.SAM(rho=0.05, warmup=10) if flat else None,
        model=model,  # BatchNorm statistics are those of the clean pass
        history=1000,
    )
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def data(seed, n=256):
    x = torch.randn(n, 10, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, :5].sum(1, keepdim=True), x[:, 7:9].prod(1, keepdim=True))


@torch.no_grad()
def validate(model, loader):
    model.eval()
    sums = [torch.stack(list(model.losses(batch).values())) for batch in loader]
    model.train()
    return torch.stack(sums).mean(0)


def main(epochs=20, flat=True):
    torch.manual_seed(0)
    train, valid = (DataLoader(data(seed), 64, shuffle=seed == 0) for seed in (0, 1))
    model, optimizer, schedule = make(epochs * len(train), flat)
    before = validate(model, valid)
    for epoch in range(epochs):
        for batch in train:
            # the forward passes alone: no zero_grad, no backward
            optimizer.backward(partial(model.losses, batch))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
        if epoch == epochs // 2:  # everything that a resumed run needs
            with tempfile.TemporaryDirectory() as folder:
                parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
                path = Path(folder) / "checkpoint.pt"
                torch.save({name: part.state_dict() for name, part in parts.items()}, path)
                saved = torch.load(path)
            model, optimizer, schedule = make(epochs * len(train), flat)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            schedule.load_state_dict(saved["schedule"])
    after = validate(model, valid)
    for task, first, last in zip(TASKS, before, after, strict=True):
        print(f"{task}: {first:.4f} -> {last:.4f}")
    conflict = 100 * optimizer.history.arrays()["conflict"].mean()
    print(
        f"{epochs * len(train)} steps; gradients in conflict in {conflict:.0f} % of the later ones"
    )
    return before, after


if __name__ == "__main__":
    main(flat="plain" not in sys.argv[1:])
