"""FS-MTL in a few lines: two regression tasks on one trunk, on synthetic data, in a second.

python examples/two_tasks.py
"""

import torch
from torch import nn

import flatmtl

torch.manual_seed(0)
trunk = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
heads = nn.ModuleList([nn.Linear(32, 1), nn.Linear(32, 1)])
model = nn.ModuleList([trunk, heads])
x = torch.randn(256, 10)
targets = [x[:, :5].sum(1, keepdim=True), x[:, 3:].prod(1, keepdim=True)]


def losses(tasks=(0, 1)):
    """The losses of the tasks asked for: the perturbed passes ask for one at a time."""
    features = trunk(x)
    return [nn.functional.mse_loss(heads[t](features), targets[t]) for t in tasks]


optimizer = flatmtl.MultiTaskOptimizer(
    torch.optim.Adam(model.parameters(), lr=1e-2),
    weighting=flatmtl.weighting.PCGrad(),
    sharpness=flatmtl.SAM(rho=0.05),
    model=model,
)
for step in range(101):
    clean = optimizer.step(losses)
    if step % 20 == 0:
        print(f"step {step:3d}  " + "  ".join(f"task {t}: {v:.4f}" for t, v in enumerate(clean)))
