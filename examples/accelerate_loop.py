"""FS-MTL in a Hugging Face Accelerate loop: accumulation, clipping, a scheduler; seconds on a CPU.

python examples/accelerate_loop.py           (pip install "flatmtl[accelerate]")
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flatmtl
from flatmtl.integrations.accelerate import Backward


class TwoTasks(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(10, 64), nn.BatchNorm1d(64), nn.ReLU())
        self.heads = nn.ModuleDict({"sum": nn.Linear(64, 1), "product": nn.Linear(64, 1)})

    def forward(self, x, tasks):
        """The outputs of the tasks asked for."""
        features = self.trunk(x)
        return {t: self.heads[t](features) for t in tasks}


def task_losses(model, batch, tasks=("sum", "product")):
    """Forward only; the perturbed passes ask for one task at a time."""
    targets = {"sum": batch[1], "product": batch[2]}
    outputs = model(batch[0], tasks)  # the prepared model: its forward runs under autocast
    return {t: nn.functional.mse_loss(outputs[t], targets[t]) for t in tasks}


def main(epochs=20, mixed_precision="bf16", accumulate=2):
    torch.manual_seed(0)
    accelerator = Accelerator(
        cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=accumulate
    )
    model = TwoTasks()
    optimizer = flatmtl.MultiTaskOptimizer(
        torch.optim.Adam(model.parameters(), lr=1e-2),
        weighting=flatmtl.weighting.PCGrad(),
        sharpness=flatmtl.SAM(rho=0.05),
        model=model,
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4 * epochs)
    x = torch.randn(256, 10)
    data = TensorDataset(x, x[:, :5].sum(1, keepdim=True), x[:, 7:9].prod(1, keepdim=True))
    loader = DataLoader(data, batch_size=64 // accumulate, shuffle=True)

    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    backward = Backward(accelerator, optimizer)  # in place of accelerator.backward
    seen = []
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                losses = backward(task_losses, model, batch)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 5.0)
                    seen.append({t: loss.item() for t, loss in losses.items()})
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    for name in seen[0]:
        print(f"{name}: {seen[0][name]:.4f} -> {seen[-1][name]:.4f}")
    print(f"{len(seen)} steps")
    return seen


if __name__ == "__main__":
    main()
