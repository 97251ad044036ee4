"""From the rows g_i (at the parameters) and s_i (perturbed) to one update of the shared parameters.

The rows are read once for a Gram matrix and once for the update. The flat parts f_i = s_i - g_i are
never expanded in products: that cancels for a small radius.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flatmtl import ops
from flatmtl.block import Block
from flatmtl.columns import Columns
from flatmtl.sharded import Part
from flatmtl.solves import Observed, Solves
from flatmtl.weighting._rows import RowMethod, RowState


@dataclass
class Found:
    """What an aggregation came to.

    Attributes:
        weights: float64 [T], of the gradients g_i (of the s_i for "direct"); None where the update is no
            weighted sum of them. The mean over the groups where each has its own.
        flat: float64 [T], of the flat parts f_i; None if they were not weighted apart.
        gram: float64 [T, T], of the rows that ``weights`` are for; a diagonal one where the weighting
            looks at no more; None where it looks at none.
        clean: whether ``gram`` is of the gradients at the parameters, not at the perturbed ones.
    """

    weights: Tensor | None
    flat: Tensor | None = None
    gram: Tensor | None = None
    clean: bool = True


class Families:
    """Aggregates the rows of a block.

    Args:
        solves: the weightings.
        scale: 0-dim, by which the gradients are too large; None: 1.
        full: always the whole Gram matrix, also where a weighting needs its diagonal only, or none.
        seen: the losses, for the weightings that look at them.
        columns: of each group that has weights of its own; None: one for all parameters.
        known: Gram matrices of whole rows where a block holds a part of them: float64 [T, T] of the rows
            "jac", "sam", and of the "flat" parts.
    """

    def __init__(
        self,
        solves: Solves,
        scale: Tensor | None,
        *,
        full: bool,
        seen: Observed | None = None,
        columns: Columns | None = None,
        known: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._known = known or {}
        self._solves = solves
        self._scale = None if scale is None else scale.double()
        self._inverse = None if scale is None else scale.double().square().reciprocal()
        self._full = full
        self._seen = seen
        self._columns = columns

    def unscaled(self, gram: Tensor) -> Tensor:
        """``gram`` as if the gradients had not been scaled."""
        return gram if self._inverse is None else gram * self._inverse.to(gram.device)

    def gram(self, rows: Tensor, kind: str = "") -> Tensor:
        """float64 [T, T], of the gradients in ``rows`` as if they had not been scaled.

        ``kind``: "jac" or "sam", where the rows are those of a block: their Gram matrix may be known.
        """
        known = self._known.get(kind)
        return self.unscaled(ops.gram(rows) if known is None else known)

    def plain(self, block: Block | Part, squares: Tensor, sound: Tensor) -> Found:
        """update = A(g)."""
        return self._aggregate("loss", block, "jac", block.update, squares, sound)

    def solved(self, gram: Tensor, sound: Tensor) -> Found:
        """The weights of rows whose Gram matrix [T, T] is there already."""
        gram = self.unscaled(gram)
        seen = gram.diag().diag() if self._solves.weightings["loss"].diagonal_only else gram
        return Found(self._solve("loss", seen, sound), gram=gram if self._full else seen)

    def direct(self, block: Block | Part, sound: Tensor) -> Found:
        """update = A(s)."""
        found = self._aggregate("loss", block, "sam", block.update, None, sound)
        found.clean = False
        return found

    def decomposed(
        self, block: Block | Part, squares: Tensor, sound: Tensor, *, keep: bool
    ) -> Found:
        """update = A(g) + A'(f). With ``keep``, A'(f) alone stays in ``block.kept``."""
        weighting = self._solves.weightings["loss"]
        if isinstance(block, Block) and isinstance(weighting, RowMethod):
            return self._rows_and_flat(block, sound)
        if isinstance(block, Block) and self._columns is not None:
            found, a, b = self._by_group_and_flat(block, self._columns, sound)
        else:
            found = self._weigh_both(block, squares, sound)
            assert found.weights is not None
            assert found.flat is not None
            a, b = found.weights.unsqueeze(0), found.flat.unsqueeze(0)
        for k, part in self._parts(block):
            jac, sam = block.jac[:, part], block.sam[:, part]
            if keep:
                assert isinstance(block, Block)
                zero = torch.zeros_like(b[k])
                ops.combine_flat(jac, zero, sam, b[k], block.kept[part])
                ops.combine(jac, a[k], block.update[part]).add_(block.kept[part])
            else:
                ops.combine_flat(jac, a[k], sam, b[k], block.update[part])
        return found

    def second(self, block: Block, squares: Tensor, sound: Tensor) -> Found:
        """update = A''(A(g), A'(f)). The pair is formed: from Gram matrices, a short one would cancel."""
        gram, a = self._by_gram("loss", block.jac, "jac", squares, sound)
        block.sam.sub_(block.jac)
        _, b = self._by_gram("flat", block.sam, "", None, sound)
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
        _, weights = self._by_gram("loss", block.jac, "", None, sound)
        ops.combine(block.jac, weights, block.update)
        return Found(weights * of_g, weights * of_f, of_all)

    # ------------------------------------------------------------ one set of rows

    def _aggregate(
        self,
        name: str,
        block: Block | Part,
        kind: str,
        out: Tensor,
        squares: Tensor | None,
        sound: Tensor,
    ) -> Found:
        """``out`` [P] <- the aggregate of the "jac" or "sam" rows by the weighting of that name."""
        weighting = self._solves.weightings[name]
        rows = block.jac if kind == "jac" else block.sam
        if isinstance(block, Block) and isinstance(weighting, RowMethod):
            weights = self._by_rows(name, block, rows, out, sound)
            return Found(weights, gram=self._for_the_record(rows))
        if self._columns is not None:
            grams = self._grams(ops.gram, self._columns, rows)  # [B, T, T]
            each = self._solve(name, grams, sound.expand(grams.shape[:-1]))
            for k, part in self._parts(block):
                ops.combine(rows[:, part], each[k], out[part])
            return Found(self._mean(each), gram=grams.sum(0))
        gram = None
        if weighting.one_pass:
            weights = self._of_losses(name, sound)
            gram = self._for_the_record(rows, kind)
        else:
            gram, weights = self._by_gram(name, rows, kind, squares, sound)
        ops.combine(rows, weights, out)
        return Found(weights, gram=gram)

    def _by_gram(
        self, name: str, rows: Tensor, kind: str, squares: Tensor | None, sound: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The Gram matrix for the record, and the weights.

        Where norms will do, and the packing has counted them (``squares``), they decide: the same bits
        whether somebody wants to see the whole matrix or not.
        """
        if squares is None or not self._solves.weightings[name].diagonal_only:
            gram = self.gram(rows, kind)
            return gram, self._solve(name, gram, sound)
        gram = self.unscaled(squares.diag())
        weights = self._solve(name, gram, sound)
        return (self.gram(rows, kind) if self._full else gram), weights

    def _weigh_both(self, block: Block | Part, squares: Tensor, sound: Tensor) -> Found:
        """The weights of the gradients and of the flat parts."""
        weighting = self._solves.weightings["loss"]
        if weighting.one_pass:  # linear, and the same for both
            weights = self._of_losses("loss", sound)
            return Found(weights, weights, self._for_the_record(block.jac, "jac"))
        if "flat" in self._known:
            gram, a = self._by_gram("loss", block.jac, "jac", squares, sound)
            flat = self.unscaled(self._known["flat"])
        elif weighting.diagonal_only:
            gram, a = self._by_gram("loss", block.jac, "jac", squares, sound)
            flat = self.unscaled(ops.gram_difference(block.sam, block.jac))
        else:
            gram, flat = map(self.unscaled, ops.gram_pair(block.sam, block.jac))
            a = self._solve("loss", gram, sound)
        return Found(a, self._solve("flat", flat, sound), gram)

    def _by_group_and_flat(
        self, block: Block, columns: Columns, sound: Tensor
    ) -> tuple[Found, Tensor, Tensor]:
        """The same with weights [B, T] for every group."""
        grams = self._grams(ops.gram, columns, block.jac)
        flats = self._grams(ops.gram_difference, columns, block.sam, block.jac)
        sound = sound.expand(grams.shape[:-1])
        a, b = self._solve("loss", grams, sound), self._solve("flat", flats, sound)
        return Found(self._mean(a), self._mean(b), grams.sum(0)), a, b

    def _mean(self, weights: Tensor) -> Tensor:
        """[B, T] -> [T], over the groups that have columns here."""
        assert self._columns is not None
        here = [k for k, parts in enumerate(self._columns) if parts]
        return torch.stack([weights[k] for k in here]).mean(0)

    def _rows_and_flat(self, block: Block, sound: Tensor) -> Found:
        """The two aggregates of rows, added. The flat parts' one is left in ``block.kept``."""
        block.sam.sub_(block.jac)
        a = self._by_rows("loss", block, block.jac, block.update, sound)
        b = self._by_rows("flat", block, block.sam, block.kept, sound)
        block.update.add_(block.kept)
        return Found(a, b, self._for_the_record(block.jac))

    def _by_rows(
        self, name: str, block: Block, rows: Tensor, out: Tensor, sound: Tensor
    ) -> Tensor | None:
        method = self._solves.weightings[name]
        if isinstance(method, RowState):
            method._carry(block.layout, block.size)
        return self._solves.of_rows(
            name, rows, out, seen=self._seen, sound=sound, scale=self._scale
        )

    # ------------------------------------------------------------ the pieces

    def _solve(self, name: str, gram: Tensor, sound: Tensor) -> Tensor:
        return self._solves(name, gram, sound, self._seen)

    def _of_losses(self, name: str, sound: Tensor) -> Tensor:
        """Weights from the losses; 0 where the gradient is not finite all the same."""
        assert self._seen is not None
        weights = self._solves.of_losses(name, self._seen)
        return torch.where(sound.to(weights.device), weights, 0.0)

    def _for_the_record(self, rows: Tensor, kind: str = "") -> Tensor | None:
        """The Gram matrix where the method does without, but somebody wants to see it."""
        return self.gram(rows, kind) if self._full else None

    def _grams(self, op: Callable[..., Tensor], columns: Columns, *rows: Tensor) -> Tensor:
        """float64 [B, T, T], of each group's columns; zero for a group that has none here."""
        tasks = rows[0].shape[0]
        none = torch.zeros(tasks, tasks, dtype=torch.float64, device=rows[0].device)
        grams = []
        for parts in columns:
            found = [op(*(r[:, part] for r in rows)) for part in parts]
            grams.append(torch.stack(found).sum(0) if len(found) > 1 else (found or [none])[0])
        return self.unscaled(torch.stack(grams))

    def _parts(self, block: Block | Part) -> list[tuple[int, slice]]:
        """Every run of columns with the number of its group."""
        if self._columns is None:
            return [(0, slice(0, block.size))]
        return [(k, part) for k, parts in enumerate(self._columns) for part in parts]
