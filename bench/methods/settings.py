"""What is trained on each data set, in full and in the quick run."""

from __future__ import annotations

from dataclasses import dataclass, replace

VERSION = 1  # of the training code: a new number makes all cells anew


@dataclass(frozen=True)
class Setting:
    """How one data set is trained.

    ``lr`` and ``rho`` were chosen by ``python -m bench.methods scan``: see docs/methods_benchmark.md.
    """

    train: int  # samples
    validation: int
    test: int
    batch: int
    epochs: int
    lr: float  # peak rate of AdamW; it rises over a tenth of the steps, then falls as a cosine
    rho: float  # of SAM, shared and own parameters alike
    wide: float  # a larger radius, at which the two ways of aggregation can differ more
    width: int = 0  # of the two hidden layers; the image network has its own

    @property
    def steps(self) -> int:
        """Steps of one training; full batches only."""
        return self.epochs * (self.train // self.batch)


_IMAGES = Setting(640, 1000, 2000, batch=32, epochs=4, lr=3e-3, rho=0.005, wide=0.02)
_TABLE = {"batch": 128, "epochs": 3, "lr": 1e-2, "rho": 0.02, "wide": 0.1, "width": 64}

FULL = {
    "multifashion": _IMAGES,
    "fashion_mnist": _IMAGES,
    "qm8": Setting(3840, 1000, 4000, **_TABLE),
    "tox21": Setting(3840, 1000, 2991, **_TABLE),
    "adult": Setting(6400, 3000, 16281, **_TABLE),
}

QUICK = {
    name: replace(setting, train=setting.train // 2, test=min(setting.test, 2000))
    for name, setting in FULL.items()
}

# Scanned on validation samples: every rate without sharpness, then every radius at the best of them.
SCANNED_LR = (1e-3, 3e-3, 1e-2, 3e-2)
SCANNED_RHO = {
    "multifashion": (0.005, 0.01, 0.02, 0.05),
    "fashion_mnist": (0.005, 0.01, 0.02, 0.05),
    "qm8": (0.02, 0.05, 0.1, 0.2),
    "tox21": (0.02, 0.05, 0.1, 0.2),
    "adult": (0.02, 0.05, 0.1, 0.2),
}
