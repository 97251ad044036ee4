"""The processes that train together, and what goes between them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

ProcessGroup = dist.ProcessGroup


class RankFailedError(RuntimeError):
    """Another rank raised in this step, which was made on none. The text holds that rank's error."""


class Ranks:
    """A process group, and the DistributedDataParallel modules whose own collectives rest meanwhile.

    Args:
        group: the process group.
        replicas: the modules.

    Attributes:
        size: how many ranks there are.
        rank: which one this is.
        agreed: whether they have compared what they train.
        broken: a collective has failed: there is no use in another one.
    """

    def __init__(
        self, group: ProcessGroup, replicas: Sequence[DistributedDataParallel] = ()
    ) -> None:
        self.group = group
        self.replicas = list(replicas)
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.agreed = False
        self.broken = False
        self._failures = (
            0  # steps that some rank failed in: each has a place of its own in the store
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return Ranks(self.group, copy.deepcopy(self.replicas, memo))

    # ------------------------------------------------------------ collectives

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """A collective: one that fails leaves the group in no state for another."""
        try:
            yield
        except RuntimeError:
            self.broken = True
            raise

    def add_up(self, tensor: Tensor) -> dist.Work:
        """``tensor`` <- its sum over the ranks, once the result has been waited for."""
        with self._talking():
            work: dist.Work = dist.all_reduce(tensor, group=self.group, async_op=True)
        return work

    def wait(self, works: Sequence[dist.Work]) -> None:
        """Until all have arrived: on CUDA it is the stream that waits."""
        with self._talking():
            for work in works:
                work.wait()

    def total(self, tensor: Tensor) -> Tensor:
        """``tensor``, summed over the ranks in place."""
        self.wait([self.add_up(tensor)])
        return tensor

    def gather(self, facts: Any) -> list[Any]:  # noqa: ANN401
        """Every rank's ``facts``, by rank. Reads the device: not for every step."""
        found: list[Any] = [None] * self.size
        with self._talking():
            dist.all_gather_object(found, facts, group=self.group)
        return found

    # ------------------------------------------------------------ the replicas

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Passes inside start no collective of the replicas' own.

        Their gradients are averaged task by task here, and buffers are sent by ``send_buffers``: inside a
        pass, a rank that failed before it would leave the others waiting.
        """
        with ExitStack() as stack:
            for module in self.replicas:
                stack.enter_context(module.no_sync())
                stack.callback(setattr, module, "require_forward_param_sync", True)
                module.require_forward_param_sync = False
            yield

    def send_buffers(self) -> None:
        """The replicas' buffers <- those of rank 0, as ``broadcast_buffers`` asks for."""
        found: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for module in self.replicas:
            if module.broadcast_buffers:
                for buffer in module.modules_buffers:
                    found.setdefault((buffer.dtype, buffer.device), []).append(buffer)
        first = dist.get_global_rank(self.group, 0)
        for buffers in found.values():
            flat = torch.cat([buffer.detach().reshape(-1) for buffer in buffers])
            with self._talking():
                dist.broadcast(flat, src=first, group=self.group)
            parts = flat.split([buffer.numel() for buffer in buffers])
            with torch.no_grad():
                for buffer, part in zip(buffers, parts, strict=True):
                    buffer.copy_(part.view(buffer.shape))

    # ------------------------------------------------------------ errors

    def tell(self, failure: BaseException) -> None:
        """Leaves the error of this rank for the others to find."""
        text = f"rank {self.rank}: {type(failure).__name__}: {failure}"
        self._store().set(self._key(), text)
        self._failures += 1

    def told(self) -> RankFailedError:
        """The error that another rank has left. To be raised: the step was not made."""
        store = self._store()
        try:
            store.wait([self._key()], timedelta(seconds=5))
            text = store.get(self._key()).decode()
        except RuntimeError:  # torch.distributed's own errors are such
            text = "its own output says why"
        self._failures += 1
        return RankFailedError(
            f"the step was made on no rank, as one failed: {text} (seen from rank {self.rank})"
        )

    def _key(self) -> str:
        return f"flatmtl/{self.group.group_name}/failed/{self._failures}"

    def _store(self) -> Any:  # noqa: ANN401
        return dist.distributed_c10d._get_default_store()


def find_ranks(process_group: object, model: nn.Module | None, alone: str = "None") -> Ranks | None:
    """The ranks that train together; None where this process trains by itself.

    Args:
        process_group: "model": found from the model; a process group; None: by itself.
        model: may hold DistributedDataParallel modules.
        alone: what says "by itself", for the error.

    Raises:
        TypeError: ``process_group`` is none of these.
        ValueError: there are several processes, and nothing says how they belong together; or a replica
            cannot be trained so.
    """
    if process_group is None:
        return None
    if not (process_group == "model" or isinstance(process_group, dist.ProcessGroup)):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup, 'model' or None, got "
            f"{process_group!r}"
        )
    if not (dist.is_available() and dist.is_initialized()):
        return None
    modules = [] if model is None else list(model.modules())
    replicas = [m for m in modules if isinstance(m, DistributedDataParallel)]
    for module in replicas:
        if module.static_graph:
            raise ValueError(
                "model must be a DistributedDataParallel without static_graph=True, whose hooks count "
                "backward passes: a step has one for every task"
            )
    group = process_group
    if group == "model":
        groups = {id(m.process_group): m.process_group for m in replicas}
        if len(groups) > 1:
            raise ValueError(
                f"process_group must be given where the model's replicas have {len(groups)} of them"
            )
        if groups:
            group = next(iter(groups.values()))
        elif dist.get_world_size() > 1:
            raise ValueError(
                "process_group must be given where several processes run and model= is no "
                "DistributedDataParallel: the group that trains together (torch.distributed.group.WORLD), "
                f"or {alone} if every process trains a model of its own"
            )
        else:
            return None
    assert isinstance(group, dist.ProcessGroup)
    return Ranks(group, replicas) if dist.get_world_size(group) > 1 else None
