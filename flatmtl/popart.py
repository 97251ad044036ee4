"""PopArt: regression heads whose targets are normalised while their scale is learnt."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flatmtl.ops import _check
from flatmtl.weighting import _options

_STATISTICS = ("mean", "variance", "filled", "shift", "scale")


class PopArt(nn.Module):
    """A linear head that learns normalised targets and keeps what it says in the targets' own unit.

    After van Hasselt et al., arXiv 1602.07714, and, for several tasks, Hessel et al., arXiv 1809.04474;
    both from memory and not re-checked. Mean mu and second moment nu of each output's targets are followed
    by an exponential average, sigma = sqrt(nu - mu^2). The module answers in normalised units, W x + b,
    and learns (y - mu)/sigma. Whenever mu and sigma move, weight and bias are rescaled so that
    sigma (W x + b) + mu stays what it was::

        heads = nn.ModuleDict({t: flatmtl.PopArt(nn.Linear(width, 1)) for t in tasks})
        for x, y in batches:                               # y[t]: [batch, 1], in task t's unit
            for t in tasks:
                heads[t].update(y[t])
            optimizer.step(lambda: {t: mse(heads[t](trunk(x)), heads[t].normalize(y[t])) for t in tasks})
        prediction = heads[t].denormalize(heads[t](trunk(x)))

    ``update`` writes the head's parameters. It belongs before the forward pass and outside of the closure,
    which a step with sharpness runs several times, at perturbed parameters. The optimizer's state
    (momentum, Adam's moments) is not rescaled: while sigma moves much, at first, it is of another scale.

    The averages are corrected for their start as Adam's are: the first update takes over the batch's
    moments, and early ones are about the mean over all batches so far. The output is kept at the first one
    too: with targets of 300 +- 10 the head then has a bias of -30 to unlearn. ``start`` sets mu and sigma
    from targets at hand and leaves an untrained head alone.

    A label that is not finite (NaN) is missing: moments are over the others, and an output without any
    stays as it is. Statistics are float64 whatever the module is cast to. The variance v = nu - mu^2 itself
    is followed, v <- (1 - r)(v + r (m - mu)^2) + r s with m and s mean and variance of the batch, because
    the difference loses its digits where |mu| is large beside sigma. mu and sigma of the head move in
    steps that its dtype can follow, of 8 times its resolution (1e-6 of sigma for float32, 6 % for bfloat16).

    Args:
        linear: the head, with a bias, an output each in its last dimension.
        beta: the averages' rate, above 0 and at most 1; 3e-4 from the papers (from memory).
        least: sigma is at least this, in the targets' unit.
        most: sigma is at most this. The papers' code has 1e-4 and 1e6 (from memory); wider here, for units
            in which the targets are small or large. Labels that were all the same have no sigma: it is 1.

    Attributes:
        linear: the head.
        mean: mu, the running one.
        variance: nu - mu^2, the running one.
        filled: how far the averages are filled, 1 - (1 - beta)^n after n updates.
        shift: mu, as the head has it.
        scale: sigma, as the head has it. All five are buffers, float64 [outputs].

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    mean: Tensor
    variance: Tensor
    filled: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(
        self, linear: nn.Linear, beta: float = 3e-4, *, least: float = 1e-8, most: float = 1e8
    ) -> None:
        super().__init__()
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        for name in ("weight", "bias"):
            if linear._parameters.get(name) is None:
                raise ValueError(
                    f"linear must have a {name} that is a parameter of its own, to be rescaled, got "
                    f"{linear!r}"
                )
        self.linear = linear
        self.beta = _options.real("beta", beta, above=0, at_most=1)
        self.least = _options.real("least", least, above=0)
        self.most = _options.real("most", most, at_least=self.least)
        zeros = torch.zeros(linear.out_features, dtype=torch.float64, device=linear.weight.device)
        for name in _STATISTICS:
            start = torch.ones_like(zeros) if name == "scale" else zeros.clone()
            self.register_buffer(name, start)

    def forward(self, features: Tensor) -> Tensor:
        """The head's answer in normalised units, [..., outputs]."""
        return self.linear(features)

    def normalize(self, targets: Tensor) -> Tensor:
        """(y - mu)/sigma, what the head learns.

        Args:
            targets: [..., outputs], in their own unit; NaN stays.

        Returns:
            Of targets' shape and dtype, float32 for half precision.

        Raises:
            TypeError, ValueError: ``targets`` does not fit.
        """
        self._fits("targets", targets)
        return ((targets.double() - self.shift) / self.scale).to(_at_least_single(targets))

    def denormalize(self, outputs: Tensor) -> Tensor:
        """sigma out + mu, the head's answer in the targets' unit; differentiable.

        Args:
            outputs: [..., outputs], of the module.

        Returns:
            Of outputs' shape and dtype, float32 for half precision.

        Raises:
            TypeError, ValueError: ``outputs`` does not fit.
        """
        self._fits("outputs", outputs)
        return (outputs.double() * self.scale + self.shift).to(_at_least_single(outputs))

    @torch.no_grad()
    def update(self, targets: Tensor) -> None:
        """Follows the targets of a batch and rescales the head, whose answers in their unit stay.

        Nothing is read on the host.

        Args:
            targets: [..., outputs], in their own unit; what is not finite is missing.

        Raises:
            TypeError, ValueError: ``targets`` does not fit.
        """
        present, mean, variance = self._moments(targets)
        filled = self.filled + self.beta * (1.0 - self.filled)
        rate = self.beta / filled
        move = mean - self.mean
        spread = (1.0 - rate) * (self.variance + rate * move.square()) + rate * variance
        self.mean.copy_(torch.where(present, self.mean + rate * move, self.mean))
        self.variance.copy_(torch.where(present, spread, self.variance))
        self.filled.copy_(torch.where(present, filled, self.filled))
        self._rescale()

    @torch.no_grad()
    def start(self, targets: Tensor) -> None:
        """Sets mu and sigma to those of these targets and leaves the head alone; once, before training.

        Later updates move them by ``beta``. Give it as many targets as there are.

        Args:
            targets: [..., outputs], in their own unit; what is not finite is missing, and an output
                without a label stays as it is.

        Raises:
            TypeError, ValueError: ``targets`` does not fit.
        """
        present, mean, variance = self._moments(targets)
        self.mean.copy_(torch.where(present, mean, self.mean))
        self.variance.copy_(torch.where(present, variance, self.variance))
        self.filled.masked_fill_(present, 1.0)
        self.shift.copy_(torch.where(present, self.mean, self.shift))
        self.scale.copy_(torch.where(present, self._sigma(), self.scale))

    def _moments(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each output: whether it has a label, their mean and their variance; [outputs]."""
        self._fits("targets", targets)
        y = targets.detach().double().reshape(-1, self.linear.out_features)  # [n, outputs]
        if len(y) == 0:
            nothing = torch.zeros_like(self.mean)
            return nothing.bool(), nothing, nothing
        known = y.isfinite()
        count = known.sum(0).clamp(min=1)
        # from one of the labels on: equal ones have a variance of 0, not of a rounding
        origin = torch.where(known, y, -torch.inf).amax(0)
        origin = torch.where(known.any(0), origin, 0.0)
        away = torch.where(known, y - origin, 0.0)
        mean = away.sum(0) / count
        variance = torch.where(known, away - mean, 0.0).square().sum(0) / count
        return known.any(0), origin + mean, variance

    def _sigma(self) -> Tensor:
        known = self.variance.sqrt().clamp(self.least, self.most)
        return torch.where(self.variance > 0, known, 1.0)

    def _rescale(self) -> None:
        """Takes the running statistics over into the head, where they are away from its own."""
        weight, bias = self.linear.weight, self.linear.bias
        step = 8 * torch.finfo(weight.dtype).eps
        sigma = self._sigma()
        far = (sigma - self.scale).abs() > step * self.scale
        far |= (self.mean - self.shift).abs() > step * self.scale
        scale = torch.where(far, sigma, self.scale)
        shift = torch.where(far, self.mean, self.shift)
        weight.copy_(weight.double() * (self.scale / scale).unsqueeze(1))
        bias.copy_((self.scale * bias.double() + (self.shift - shift)) / scale)
        self.scale.copy_(scale)
        self.shift.copy_(shift)

    def _fits(self, name: str, value: object) -> None:
        given = _check.tensor(name, value)
        outputs = self.linear.out_features
        if given.dim() < 1 or given.shape[-1] != outputs:
            raise ValueError(
                f"{name} must have shape [..., {outputs}], an entry for each output of the head, got "
                f"{list(given.shape)}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PopArt:
        """Moves the statistics with the module, and leaves them float64 when it is cast."""
        before = {name: getattr(self, name) for name in _STATISTICS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in before.items():
            after = getattr(self, name)
            if after.dtype != value.dtype:
                self._buffers[name] = value.to(after.device)
        return self

    def extra_repr(self) -> str:
        """The options."""
        return f"beta={self.beta}, least={self.least}, most={self.most}"


def _at_least_single(value: Tensor) -> torch.dtype:
    return torch.float32 if value.dtype in _check.HALF_TYPES else value.dtype
