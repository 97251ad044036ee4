"""Balanced multi-task learning."""

from __future__ import annotations

from torch import Tensor

from flatmtl.weighting import _options
from flatmtl.weighting._base import Scaling
from flatmtl.weighting._loss import LossWeighting
from flatmtl.weighting._shares import shares

_LARGEST = 80.0  # exponent: exp(80) leaves float32 gradients room


class BMTL(LossWeighting):
    """Balanced multi-task learning (Liang and Zhang, arXiv 2002.04792): the larger a loss, the more weight.

    The paper minimises sum_i h(L_i) with h(z) = exp(z / t), t the temperature: w_i = exp(L_i / t) / t.
    Bounded, the default, is T t log sum_i exp(L_i / t), whose weights T softmax(L / t) have the same ratios
    and the sum T. A large temperature gives equal weights, a small one all weight to the largest loss. T: the
    tasks that are there. Only the paper's abstract and others' code were read.

    Args:
        temperature: in units of the losses. 50 is that of two independent re-uses, another has 0.2 to 0.8;
            the paper's was not verified.
        bounded: False: the paper's form. Its exponents stop at 80, where float32 gradients would overflow.
        scaling: as for every weighting.

    Raises:
        ValueError, TypeError: an argument is none of the above.
    """

    paper = "Liang and Zhang, A simple general approach to balance task difficulty"
    arxiv = "2002.04792"
    year = 2020

    def __init__(
        self, *, temperature: float = 50.0, bounded: bool = True, scaling: Scaling = "raw"
    ) -> None:
        super().__init__(scaling=scaling)
        self.temperature = _options.real("temperature", temperature, above=0)
        if not isinstance(bounded, bool):
            raise TypeError(f"bounded must be True or False, got {type(bounded).__name__}")
        self.bounded = bounded

    def _weigh(self, losses: Tensor, there: Tensor | None) -> Tensor:
        if self.bounded:
            return shares(losses, there, self.temperature)
        return (losses / self.temperature).clamp_(max=_LARGEST).exp_().div_(self.temperature)
