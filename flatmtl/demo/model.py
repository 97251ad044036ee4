"""A small residual network with BatchNorm: one trunk, one head per task."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flatmtl.demo.idx import CLASSES


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, H / stride, W / stride], rounded up."""
        return torch.relu(self.body(x) + self.shortcut(x))


class PairNet(nn.Module):
    """Classifies the image at the top left (task 0) and the one at the bottom right (task 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2, bias=False),  # [B, 16, 18, 18]
            nn.BatchNorm2d(16),
            nn.ReLU(),
            BasicBlock(16, 16, stride=1),
            BasicBlock(16, 32, stride=2),  # [B, 32, 9, 9]
            BasicBlock(32, 64, stride=2),  # [B, 64, 5, 5]
            nn.Flatten(),
            nn.Linear(1600, 100),
            nn.ReLU(),
        )
        self.heads = nn.ModuleList(nn.Linear(100, CLASSES) for _ in range(2))

    def forward(self, x: Tensor, tasks: Sequence[int]) -> list[Tensor]:
        """Logits [B, 10] of each of ``tasks`` for canvases ``x`` [B, 1, 36, 36]."""
        features = self.trunk(x)  # [B, 100]
        return [self.heads[task](features) for task in tasks]
