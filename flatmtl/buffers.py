"""Module buffers (BatchNorm statistics) across the perturbed passes, which must not change them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from flatmtl.watch import outside


class BufferKeeper:
    """Keeps a model's buffers as they are at one moment and puts them back, in their own storage."""

    def __init__(self, model: nn.Module | None) -> None:
        self._model = model
        self._places: list[tuple[nn.Module, str]] = []
        self._buffers: list[Tensor] = []
        self._copies: list[Tensor] = []

    def save(self) -> None:
        """Takes copies."""
        if self._model is None:
            return
        found = [
            ((module, name), buffer)
            for module in _modules(self._model)
            for name, buffer in module._buffers.items()
            if buffer is not None and not _expanded(buffer)
        ]
        self._places = [place for place, _ in found]
        self._buffers = [buffer for _, buffer in found]
        same = len(self._copies) == len(self._buffers) and all(
            c.shape == b.shape and c.dtype == b.dtype and c.device == b.device
            for c, b in zip(self._copies, self._buffers, strict=True)
        )
        if not same:
            self._copies = [torch.empty_like(b) for b in self._buffers]
        _copy(self._copies, self._buffers)

    def restore(self, *, unseen: bool = False) -> None:
        """Puts the copies back, and the tensors themselves where a module holds another by now.

        Args:
            unseen: autograd is not told of the write: a graph from before is still to be gone through.
        """
        for (module, name), buffer in zip(self._places, self._buffers, strict=True):
            module._buffers[name] = buffer
        _copy([b.data for b in self._buffers] if unseen else self._buffers, self._copies)

    def undo_unless(self, ok: Tensor) -> None:
        """Puts the copies back where ``ok`` (bool, 0-dim) is false; nothing is read."""
        for (module, name), copy in zip(self._places, self._copies, strict=True):
            now = module._buffers.get(name)  # the closure may have put another tensor there
            if now is not None and now.shape == copy.shape and now.dtype == copy.dtype:
                now.copy_(torch.where(ok.to(now.device), now, copy))


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """Every module once; as ``model.modules()``, without the names, which cost most of its time."""
    waiting, seen = [model], {id(model)}
    while waiting:
        module = waiting.pop()
        yield module
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)


def _expanded(buffer: Tensor) -> bool:
    """An expanded view: one element stands for many, so that nothing can write to it in place."""
    return buffer.layout == torch.strided and any(
        n > 1 and s == 0 for n, s in zip(buffer.shape, buffer.stride(), strict=True)
    )


def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    if to:
        with torch.no_grad():
            torch._foreach_copy_(to, source)


@contextmanager
def watch_for_running_statistics(
    active: bool, passes: str = "perturbed", owner: str = "MultiTaskOptimizer"
) -> Iterator[None]:
    """Warns if a layer updates running statistics inside; used where no model was given to keep them.

    Args:
        active: whether to look.
        passes: what kind of passes are inside, for the warning.
        owner: whose ``model=`` would help.
    """
    if not active:
        yield
        return
    found: set[str] = set()

    def look(module: nn.Module, _: object) -> None:
        keeps = isinstance(module, nn.modules.batchnorm._NormBase)
        if keeps and module.training and module.track_running_stats:
            found.add(type(module).__name__)

    handle = register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()
    if found:
        warnings.warn(
            f"{', '.join(sorted(found))} updates its running statistics in the {passes} passes too: "
            f"give {owner} the model (model=) to keep them to the clean pass",
            stacklevel=outside(),
        )
