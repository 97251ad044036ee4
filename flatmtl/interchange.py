"""flatmtl's weightings inside TorchJD, and TorchJD's inside flatmtl.

``pip install "flatmtl[peers]"`` brings TorchJD; without it the two functions here raise ImportError and
nothing else in flatmtl notices. Written against TorchJD 0.18.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from flatmtl import ops
from flatmtl.ops._status import FALLBACK, NOT_CONVERGED
from flatmtl.weighting import SolveStatus, Weighting
from flatmtl.weighting._rows import check_takes_gram

__all__ = ["from_torchjd", "to_torchjd"]


def _torchjd() -> Any:  # noqa: ANN401
    """The package ``torchjd.aggregation``."""
    try:
        from torchjd import aggregation
    except ImportError as error:
        raise ImportError(
            "flatmtl.interchange needs TorchJD (imported as torchjd); "
            'install it with: pip install "flatmtl[peers]"'
        ) from error
    return aggregation


# ---------------------------------------------------------------- flatmtl in TorchJD


def to_torchjd(weighting: Weighting) -> Any:  # noqa: ANN401
    """A flatmtl weighting as a TorchJD ``Weighting`` of Gramians.

    For ``torchjd.aggregation.GramianWeightedAggregator``, for autogram's Gramians, and inside TorchJD's
    own wrappers (``CRMOGMWeighting``)::

        aggregator = GramianWeightedAggregator(to_torchjd(flatmtl.weighting.NashMTL()))
        torchjd.autojac.backward(losses)
        torchjd.autojac.jac_to_grad(model.parameters(), aggregator)

    It is a ``torch.nn.Module``: the weighting's state is in its ``state_dict()``, and ``reset()`` resets
    it. A float32 Gramian is solved as one (the ridge of float32, see docs/weightings.md), half precision
    ones after conversion to float32. The weights carry no gradient.

    Args:
        weighting: for example ``flatmtl.weighting.UPGrad()``; the module keeps this very object.

    Returns:
        A module: Gramian [T, T] -> weights [T] in the Gramian's dtype, on its device. Its attribute
        ``flatmtl_weighting`` is ``weighting``, with ``last_status()``.

    Raises:
        ImportError: TorchJD is not installed.
        TypeError: ``weighting`` is no flatmtl weighting.
    """
    if not isinstance(weighting, Weighting):
        raise TypeError(f"weighting must be a flatmtl Weighting, got {type(weighting).__name__}")
    check_takes_gram(weighting)
    return _module_class()(weighting)


@functools.cache
def _module_class() -> Any:  # noqa: ANN401
    """The module's class, made at the first use: its bases are TorchJD's."""
    aggregation = _torchjd()
    from torchjd import Stateful

    class FlatmtlWeighting(aggregation.Weighting, Stateful):  # type: ignore[misc,name-defined]
        """A flatmtl weighting on a Gramian."""

        def __init__(self, weighting: Weighting) -> None:
            super().__init__()
            self.flatmtl_weighting = weighting

        def forward(self, gramian: Tensor, /) -> Tensor:
            """Weights in the Gramian's dtype."""
            with torch.no_grad():
                exact = gramian.dtype in (torch.float32, torch.float64)
                weights = self.flatmtl_weighting(gramian if exact else gramian.float())
                return weights.to(gramian.dtype)

        def reset(self) -> None:
            """Back to the state before the first call."""
            self.flatmtl_weighting.reset()

        def get_extra_state(self) -> dict[str, Any]:
            """The weighting's state, for ``state_dict``."""
            return self.flatmtl_weighting.state_dict()

        def set_extra_state(self, state: dict[str, Any]) -> None:
            """Takes up a saved state."""
            self.flatmtl_weighting.load_state_dict(state)

        def extra_repr(self) -> str:
            """The weighting."""
            return type(self.flatmtl_weighting).__name__

        def __reduce__(self) -> tuple[Any, ...]:
            # a class made in a function has no name that pickle would find
            return to_torchjd, (self.flatmtl_weighting,), self.__dict__

    return FlatmtlWeighting


# ---------------------------------------------------------------- TorchJD in flatmtl


def from_torchjd(
    weighting: Any,  # noqa: ANN401
    *,
    scaling: Any = "raw",  # noqa: ANN401
    max_norm: float | None = None,
) -> Weighting:
    """A TorchJD weighting of Gramians as a flatmtl weighting.

    For ``flatmtl.aggregate`` and ``MultiTaskOptimizer``::

        weighting = from_torchjd(torchjd.aggregation.UPGradWeighting())
        optimizer = flatmtl.MultiTaskOptimizer(base, weighting=weighting)

    The numbers are TorchJD's on flatmtl's float64 Gram matrix, and so are the cost, the accuracy and the
    host reads: what flatmtl says about its own solvers does not hold, and there is no residual. Two
    things are flatmtl's: a task whose gradient is zero or not finite is a zero row and column for TorchJD
    and gets weight 0; and weights that are not finite are replaced by ``w_i = (1/n_i) / sum_j (1/n_j)``,
    n the gradient norms, which the status tells. A batch is solved one problem after the other, a stateful
    weighting (``torchjd.Stateful``) with one copy a problem.

    Args:
        weighting: for example ``torchjd.aggregation.UPGradWeighting()``; a ``GramianWeightedAggregator``
            (``UPGrad()``) stands for the weighting inside it. Not the weightings that want the Jacobian
            itself (NashMTL, ExcessMTL).
        scaling: as of every flatmtl weighting.
        max_norm: as of every flatmtl weighting.

    Raises:
        ImportError: TorchJD is not installed.
        TypeError: ``weighting`` is no TorchJD weighting of Gramians.
    """
    return _FromTorchJD(weighting, scaling=scaling, max_norm=max_norm)


class _FromTorchJD(Weighting):
    """What ``from_torchjd`` returns."""

    needs = "gram"
    state = "the TorchJD weighting's"

    def __init__(
        self,
        weighting: Any,  # noqa: ANN401
        *,
        scaling: Any = "raw",  # noqa: ANN401
        max_norm: float | None = None,
    ) -> None:
        super().__init__(scaling=scaling, max_norm=max_norm)
        aggregation = _torchjd()
        if isinstance(weighting, aggregation.GramianWeightedAggregator):
            weighting = weighting.gramian_weighting
        if not isinstance(weighting, aggregation.Weighting):
            raise TypeError(
                "weighting must be a TorchJD weighting of Gramians, as torchjd.aggregation."
                f"UPGradWeighting(), got {_name(weighting)}"
            )
        if isinstance(weighting, aggregation.ExcessMTLWeighting) or "Nash" in _name(weighting):
            raise TypeError(
                f"weighting must take a Gramian; TorchJD's {_name(weighting)} takes the Jacobian"
            )
        self.torchjd_weighting: Any = weighting
        self._copies: list[nn.Module] = []  # of a stateful one, for problems 1, 2, ... of a batch
        self._batch: int | None = None  # of the first call; None before it

    def _solve(self, gram: Tensor) -> tuple[Tensor, SolveStatus]:
        # ones where active, and the activity bits; checks gram's shape and dtype on the way
        active, bits = ops.solve_constant(gram, None, 1.0)
        both = (active.unsqueeze(-1) * active.unsqueeze(-2)) > 0
        clean = torch.where(both, gram.detach(), 0.0)
        single = clean.dim() == 2
        problems = [clean] if single else list(clean.unbind())
        modules = self._modules_for(len(problems))
        with torch.no_grad():
            rows = [module(problem) for module, problem in zip(modules, problems, strict=True)]
        weights = (rows[0] if single else torch.stack(rows)).to(torch.float64) * (active > 0)
        return _or_inverse_norms(weights, clean, active, bits)

    def _modules_for(self, batch: int) -> list[nn.Module]:
        """One module for each problem: the same one if it keeps no state."""
        if not hasattr(self.torchjd_weighting, "reset"):
            return [self.torchjd_weighting] * batch
        if self._batch is None:
            self._batch = batch
            if batch > 1:
                self._copies = [copy.deepcopy(self.torchjd_weighting) for _ in range(batch - 1)]
        if self._batch != batch:
            raise ValueError(
                f"gram must hold {self._batch} problems, as at the first call, got {batch}; "
                "reset() starts anew"
            )
        return [self.torchjd_weighting, *self._copies]

    def reset(self) -> None:
        """Back to the state before the first call (a stateful weighting's own ``reset``)."""
        super().reset()
        if hasattr(self.torchjd_weighting, "reset"):
            self.torchjd_weighting.reset()
        self._copies, self._batch = [], None

    def state_dict(self) -> dict[str, Any]:
        """The modules' tensors, and TorchJD's note of the shapes that they are for."""
        modules = [self.torchjd_weighting, *self._copies]
        return {"batch": self._batch, "modules": [_module_state(module) for module in modules]}

    def _check_entries(self, state: dict[str, Any]) -> None:
        super()._check_entries(state)
        modules = state["modules"]
        if not isinstance(modules, list) or not modules:
            raise ValueError(
                f"state['modules'] must be a list of a module's states, got {modules!r}"
            )
        for entry in modules:
            _check_module_state(self.torchjd_weighting, entry)

    def _take_entries(self, state: dict[str, Any]) -> None:
        super()._take_entries(state)
        first, *others = state["modules"]
        self._copies, self._batch = [copy.deepcopy(self.torchjd_weighting) for _ in others], None
        for module, entry in zip(
            [self.torchjd_weighting, *self._copies], [first, *others], strict=True
        ):
            _take_module_state(module, entry)
        self._batch = state["batch"]


def _name(weighting: object) -> str:
    return (weighting if isinstance(weighting, type) else type(weighting)).__name__


def _or_inverse_norms(
    weights: Tensor, gram: Tensor, active: Tensor, bits: Tensor
) -> tuple[Tensor, SolveStatus]:
    """``weights``, or flatmtl's common fallback for the problems in which one is not finite."""
    good = weights.isfinite().all(-1)
    norms = gram.diagonal(dim1=-2, dim2=-1).to(torch.float64).sqrt()
    inverse = torch.where(active > 0, 1 / norms, 0.0)
    fallback = inverse / inverse.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    bits = bits | torch.where(good, 0, NOT_CONVERGED | FALLBACK)
    return torch.where(good.unsqueeze(-1), weights, fallback), SolveStatus(bits)


# nn.Module.load_state_dict would refuse a buffer that is None before the first call, as TorchJD's are, and
# TorchJD would drop a loaded one at the next call if it had no note (_state_key) of the shape it is for.


def _module_state(module: nn.Module) -> dict[str, Any]:
    """A copy of the module's tensors, and its submodules' ``_state_key``s."""
    keys = {
        name: part._state_key
        for name, part in module.named_modules()
        if hasattr(part, "_state_key")
    }
    tensors = {name: value.detach().clone() for name, value in module.state_dict().items()}
    return {"tensors": tensors, "keys": keys}


def _buffers(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The full names of all buffers, None ones too -> their modules and names there."""
    return {
        f"{path}.{name}".removeprefix("."): (part, name)
        for path, part in module.named_modules()
        for name in part._buffers
    }


def _check_module_state(module: nn.Module, state: Any) -> None:  # noqa: ANN401
    """Raises ValueError where ``state`` has entries that the module has not."""
    if not isinstance(state, dict) or set(state) != {"tensors", "keys"}:
        raise ValueError(
            f"state['modules'] must have entries of 'tensors' and 'keys', got {state!r}"
        )
    unknown = set(state["tensors"]) - set(_buffers(module)) - set(dict(module.named_parameters()))
    keyed = {name for name, part in module.named_modules() if hasattr(part, "_state_key")}
    if unknown or set(state["keys"]) != keyed:
        raise ValueError(
            f"state must be one of {_name(module)}, got one with {sorted(state['tensors'])}"
        )


def _take_module_state(module: nn.Module, state: dict[str, Any]) -> None:
    """Takes up a state that fits."""
    tensors = state["tensors"]
    for full, (part, name) in _buffers(module).items():
        value = tensors.get(full)
        part._buffers[name] = None if value is None else value.detach().clone()
    with torch.no_grad():
        for full, param in module.named_parameters():
            if full in tensors:
                param.copy_(tensors[full])
    for path, part in module.named_modules():
        if path in state["keys"]:
            part._state_key = state["keys"][path]
