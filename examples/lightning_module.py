"""FS-MTL under PyTorch Lightning: two tasks on one trunk, on synthetic data, in seconds.

python examples/lightning_module.py          (pip install "flatmtl[lightning]")
"""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flatmtl
from flatmtl.integrations.lightning import MultiTaskMixin


class TwoTasks(MultiTaskMixin, lightning.LightningModule):  # the mixin first
    gradient_clip_val = 5.0  # in place of the Trainer's, as accumulate_grad_batches would be

    def __init__(self, rho=0.05):
        super().__init__()
        self.rho = rho
        self.trunk = nn.Sequential(nn.Linear(10, 64), nn.BatchNorm1d(64), nn.ReLU())
        self.heads = nn.ModuleDict({"sum": nn.Linear(64, 1), "product": nn.Linear(64, 1)})

    def multitask_losses(self, batch, tasks=("sum", "product")):
        """Forward only; the perturbed passes ask for one task at a time."""
        x, targets = batch[0], {"sum": batch[1], "product": batch[2]}
        features = self.trunk(x)
        return {t: nn.functional.mse_loss(self.heads[t](features), targets[t]) for t in tasks}

    def configure_optimizers(self):
        optimizer = flatmtl.MultiTaskOptimizer(
            torch.optim.Adam(self.parameters(), lr=1e-2),
            weighting=flatmtl.weighting.PCGrad(),
            sharpness=flatmtl.SAM(rho=self.rho),
            model=self,
        )
        # attached to the MultiTaskOptimizer; stepped as the "interval" says
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=80)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def validation_step(self, batch, batch_idx):
        self.log_dict({f"val_loss/{t}": loss for t, loss in self.multitask_losses(batch).items()})


def data(seed, n=256):
    x = torch.randn(n, 10, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, :5].sum(1, keepdim=True), x[:, 7:9].prod(1, keepdim=True))


def main(epochs=20):
    lightning.seed_everything(0, verbose=False)
    model = TwoTasks()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loaders = [DataLoader(data(seed), batch_size=64, shuffle=seed == 0) for seed in (0, 1)]
    before = trainer.validate(model, loaders[1], verbose=False)[0]
    trainer.fit(model, loaders[0])
    after = trainer.validate(model, loaders[1], verbose=False)[0]
    for name in before:
        print(f"{name}: {before[name]:.4f} -> {after[name]:.4f}")
    print(f"{trainer.global_step} steps")
    return before, after


if __name__ == "__main__":
    main()
