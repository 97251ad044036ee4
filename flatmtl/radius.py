"""Warns of a radius that is too large: exploding losses at the perturbed parameters, or a dead network."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from flatmtl.watch import Watch, outside

EXPLODES = 10.0  # times the clean loss, or the first one

_TEXTS = {
    "exploded": "the losses at the perturbed parameters are more than "
    f"{EXPLODES:g} times the clean ones: rho is too large here (try a half, or SAM(warmup=...))",
    "gone": "every task's gradient in the shared parameters is zero: the network may have collapsed, "
    "which too large a rho does (try a half, or SAM(warmup=...))",
}


class RadiusWatch:
    """Looks at the losses of sharp steps; each warning comes once."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._first: Tensor | None = None  # float64 [T], the first clean losses
        self._warned: set[str] = set()

    @property
    def watching(self) -> bool:
        """Whether there is a warning left to give."""
        return len(self._warned) < len(_TEXTS)

    def look(self, clean: Tensor, rise: Tensor, squares: Tensor | None) -> None:
        """Notes a step; nothing is read here on CUDA.

        Args:
            clean: float64 [T], the losses (NaN: missing).
            rise: float64 [T], the losses at the perturbed parameters minus those.
            squares: float64 [T], squared norms of the shared gradients; None: not known.
        """
        if self._first is None or self._first.shape != clean.shape:
            self._first = clean.clone()
        usual = torch.maximum(clean.abs(), self._first.nan_to_num(0).abs())
        exploded = clean.isfinite() & ~(rise <= EXPLODES * usual)
        gone = torch.zeros_like(exploded[0])
        if squares is not None:
            gone = (squares == 0).all().to(gone.device)
        self._watch.post(torch.stack([exploded.any(), gone]), self._warn)

    def _warn(self, flags: list[bool]) -> None:
        for (name, text), flag in zip(_TEXTS.items(), flags, strict=True):
            if flag and name not in self._warned:
                self._warned.add(name)
                warnings.warn(text, stacklevel=outside())
