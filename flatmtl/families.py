"""From the rows g_i (at the parameters) and s_i (perturbed) to one update of the shared parameters.

The rows are read once for a Gram matrix and once for the update. The flat parts f_i = s_i - g_i are
never expanded in products: that cancels for a small radius.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flatmtl import ops
from flatmtl.block import Block
from flatmtl.solves import Solves


@dataclass
class Found:
    """What an aggregation came to.

    Attributes:
        weights: float64 [T], of the gradients g_i (of the s_i for "direct").
        flat: float64 [T], of the flat parts f_i; None if they were not weighted apart.
        gram: float64 [T, T], of the rows that ``weights`` are for; a diagonal one where the weighting
            looks at no more.
        clean: whether ``gram`` is of the gradients at the parameters, not at the perturbed ones.
    """

    weights: Tensor
    flat: Tensor | None = None
    gram: Tensor | None = None
    clean: bool = True


class Families:
    """Aggregates the rows of a block.

    Args:
        solves: the weightings.
        inverse_scale: 0-dim float64, 1 / scale^2 of Gram matrices of scaled gradients; None: not scaled.
        full: always the whole Gram matrix, also where a weighting needs its diagonal only.
    """

    def __init__(self, solves: Solves, inverse_scale: Tensor | None, *, full: bool) -> None:
        self._solves = solves
        self._inverse = inverse_scale
        self._full = full

    def unscaled(self, gram: Tensor) -> Tensor:
        """``gram`` as if the gradients had not been scaled."""
        return gram if self._inverse is None else gram * self._inverse.to(gram.device)

    def _gram(self, name: str, rows: Tensor, squares: Tensor | None) -> Tensor:
        if squares is not None and self._solves.weightings[name].diagonal_only and not self._full:
            return self.unscaled(squares.diag())  # the packing has counted the norms already
        return self.unscaled(ops.gram(rows))

    def plain(self, block: Block, squares: Tensor, sound: Tensor) -> Found:
        """update = A(g)."""
        gram = self._gram("loss", block.jac, squares)
        weights = self._solves("loss", gram, sound)
        ops.combine(block.jac, weights, block.update)
        return Found(weights, gram=gram)

    def decomposed(self, block: Block, squares: Tensor, sound: Tensor, *, keep: bool) -> Found:
        """update = A(g) + A'(f). With ``keep``, A'(f) alone stays in ``block.kept``."""
        if self._solves.weightings["loss"].diagonal_only and not self._full:
            gram = self._gram("loss", block.jac, squares)
            flat = self.unscaled(ops.gram_difference(block.sam, block.jac))
        else:
            gram, flat = map(self.unscaled, ops.gram_pair(block.sam, block.jac))
        a = self._solves("loss", gram, sound)
        b = self._solves("flat", flat, sound)
        if keep:
            ops.combine_flat(block.jac, torch.zeros_like(b), block.sam, b, block.kept)
            ops.combine(block.jac, a, block.update).add_(block.kept)
        else:
            ops.combine_flat(block.jac, a, block.sam, b, block.update)
        return Found(a, b, gram)

    def direct(self, block: Block, sound: Tensor) -> Found:
        """update = A(s)."""
        gram = self._gram("loss", block.sam, None)
        weights = self._solves("loss", gram, sound)
        ops.combine(block.sam, weights, block.update)
        return Found(weights, gram=gram, clean=False)

    def second(self, block: Block, squares: Tensor, sound: Tensor) -> Found:
        """update = A''(A(g), A'(f)). The pair is formed: from Gram matrices, a short one would cancel."""
        gram = self._gram("loss", block.jac, squares)
        block.sam.sub_(block.jac)
        a = self._solves("loss", gram, sound)
        b = self._solves("flat", self._gram("flat", block.sam, None), sound)
        ops.combine(block.jac, a, block.ends[0])
        ops.combine(block.sam, b, block.ends[1])
        pair = self.unscaled(ops.gram(block.ends))
        outer = self._solves("outer", pair)
        kept, added = outer.to(block.update.dtype)
        block.ends[0].mul_(kept).addcmul_(block.ends[1], added)
        return Found(outer[0] * a, outer[1] * b, gram)

    def each(self, block: Block, sound: Tensor) -> Found:
        """update = A(h), h_i = A'(g_i, f_i); the h_i take the place of the g_i."""
        block.sam.sub_(block.jac)
        gram = self.unscaled(ops.gram(block.both))
        tasks = sound.shape[0]
        of_all = gram[:tasks, :tasks].contiguous()
        both = torch.cat([sound, sound])
        gram = torch.where(both.unsqueeze(1) & both, gram, torch.zeros_like(gram))
        cross = gram.diagonal(tasks)  # <g_i, f_i>
        lengths = gram.diag()
        pairs = torch.stack([lengths[:tasks], cross, cross, lengths[tasks:]], 1).view(-1, 2, 2)
        inner = self._solves("flat", pairs)  # [T, 2]
        of_g, of_f = inner.unbind(1)
        block.jac.mul_(of_g.unsqueeze(1).to(block.jac.dtype))
        block.jac.addcmul_(block.sam, of_f.unsqueeze(1).to(block.jac.dtype))
        weights = self._solves("loss", self._gram("loss", block.jac, None), sound)
        ops.combine(block.jac, weights, block.update)
        return Found(weights * of_g, weights * of_f, of_all)
