"""The processes that train together, and what goes between them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flatmtl.ops._library import cpu_isa
from flatmtl.shards import is_sharded, mesh_of

if dist.is_available():
    ProcessGroup = dist.ProcessGroup
    # torch 2.13 has new names for them, and warns at the old ones
    _scatter: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    _join: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
else:

    class ProcessGroup:  # type: ignore[no-redef]
        """torch was built without torch.distributed: nothing is one."""


NOT_MADE = "the step was made on no rank, as one failed"


class RankFailedError(RuntimeError):
    """Another rank raised in this step, which was made on none. The text holds that rank's error."""


class Ranks:
    """A process group, and the DistributedDataParallel modules whose own collectives rest meanwhile.

    Args:
        group: the process group.
        replicas: the modules.
        copies: see below.
        units: FSDP2's modules.

    Attributes:
        copies: how many ranks hold the same part of a sharded parameter; 0: none is sharded.
        size: how many ranks there are.
        rank: which one this is.
        agreed: whether they have compared what they train.
        broken: a collective has failed: there is no use in another one.
    """

    def __init__(
        self,
        group: ProcessGroup,
        replicas: Sequence[DistributedDataParallel] = (),
        copies: int = 0,
        units: Sequence[Any] = (),
    ) -> None:
        self.group = group
        self.replicas, self.copies, self.units = list(replicas), copies, list(units)
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.agreed = False
        self.broken = False
        # why this rank did not make a step that others may have made
        self._unmade: str | None = None
        # steps that some rank failed in: each has a place of its own in the store
        self._failures = 0

    def __reduce__(self) -> Any:  # noqa: ANN401
        raise TypeError(
            "an optimizer of several processes cannot be pickled: save its state_dict(), or a "
            "flatmtl.distributed.Checkpoint"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        replicas, units = (copy.deepcopy(modules, memo) for modules in (self.replicas, self.units))
        return Ranks(self.group, replicas, self.copies, units)

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

    def scatter(self, part: Tensor, whole: Tensor) -> dist.Work:
        """``part`` [c] <- this rank's of the n equal parts of the sum of ``whole`` [n c] over the ranks."""
        with self._talking():
            work: dist.Work = _scatter(part, whole, group=self.group, async_op=True)
        return work

    def join(self, part: Tensor) -> Tensor:
        """[n c]: every rank's ``part`` [c], by rank."""
        whole = part.new_empty(self.size * part.numel())
        with self._talking():
            _join(whole, part, group=self.group)
        return whole

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

    def share(self, sharded: bool) -> float:
        """What a rank's sum over columns counts for in that over all ranks: each column counts once."""
        return 1.0 / (self.copies if sharded else self.size)

    # ------------------------------------------------------------ the replicas

    def watch(self, model: nn.Module) -> None:
        """The DistributedDataParallel modules in it are replicas too.

        Raises:
            ValueError: one cannot be trained so.
        """
        known = set(map(id, self.replicas))
        self.replicas += [module for module in replicas_in(model) if id(module) not in known]

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

    def forget_gathered(self) -> None:
        """Sharded parameters have been written: what FSDP2 has gathered of them is no longer true."""
        for unit in self.units:
            unit.reshard()

    # ------------------------------------------------------------ errors

    def tell(self, failure: BaseException) -> None:
        """Leaves the error of this rank for the others to find."""
        text = f"rank {self.rank}: {type(failure).__name__}: {failure}"
        self._store().set(self._key(), text)
        self._failures += 1

    def told(self, *, made: bool = False) -> RankFailedError:
        """The error that another rank has left, to be raised; ``made``: whether the step was all the same."""
        store = self._store()
        try:
            store.wait([self._key()], timedelta(seconds=5))
            text = store.get(self._key()).decode()
        except RuntimeError:  # torch.distributed's own errors are such
            text = "its own output says why"
        self._failures += 1
        what = "a rank failed behind a step that was made" if made else NOT_MADE
        return RankFailedError(f"{what}: {text} (seen from rank {self.rank})")

    def note_unmade(self, failure: BaseException, *, told: bool) -> None:
        """This rank alone may have failed behind its last message: the others hear of it at the next step."""
        alone = isinstance(failure, (RuntimeError, MemoryError))  # others come to all ranks alike
        if alone and not told:
            self._unmade = f"{type(failure).__name__}: {failure}"

    def check_made(self) -> None:
        """Raises RuntimeError if this rank did not make the last step, and the others may have."""
        if self._unmade is not None:
            text, self._unmade = self._unmade, None
            raise RuntimeError(
                f"every rank must make every step: rank {self.rank} failed in the last one, when it had sent "
                f"all there was to send ({text}); parameters may differ: load a checkpoint"
            )

    def lost(self, failure: Exception) -> bool:
        """Whether a failure here may be the consequence of another rank's."""
        return self.broken or (bool(self.copies) and isinstance(failure, RuntimeError))

    def why(self) -> RankFailedError | None:
        """The error that another rank has left, if one has: what failed here may be its consequence."""
        try:
            left = self._store().check([self._key()])
        except RuntimeError:
            left = False
        return self.told() if left else None

    def free_place(self) -> int:
        """The first place in the store where no earlier optimizer has left an error, from this one's on."""
        place, store = self._failures, self._store()
        while store.check([self._key(place)]):
            place += 1
        return place

    def begin_at(self, place: int) -> None:
        """Errors go to this place from now on, the same on all ranks."""
        self._failures = place

    def _key(self, place: int | None = None) -> str:
        number = self._failures if place is None else place
        return f"flatmtl/{self.group.group_name}/failed/{number}"

    def _store(self) -> Any:  # noqa: ANN401
        return dist.distributed_c10d._get_default_store()


def hardware(device: torch.device) -> str:
    """What this rank's arithmetic runs on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {cpu_isa()}"


def raise_failed(ranks: Ranks) -> Callable[[list[bool]], None]:
    """An act on "no rank has failed" (``Watch``).

    Raises:
        RankFailedError: (the act) the flag is false.
    """

    def act(sound: list[bool]) -> None:
        if not all(sound):
            raise ranks.told()

    return act


def find_ranks(
    process_group: object, model: nn.Module | None, params: Sequence[Tensor]
) -> Ranks | None:
    """The ranks that train together; None where this process trains by itself.

    Args:
        process_group: "model": found from the model; a process group; None: by itself.
        model: may hold DistributedDataParallel modules, or ones that FSDP2 shards.
        params: those of the optimizer.

    Raises:
        TypeError: ``process_group`` is none of these.
        ValueError: there are several processes, and nothing says how they belong together; or a replica
            cannot be trained so.
    """
    mesh = mesh_of(params)
    if process_group is None and mesh is None:
        return None
    if not (process_group == "model" or isinstance(process_group, ProcessGroup)):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup that this rank is in, 'model' or (unless "
            f"parameters are sharded) None, got {process_group!r}"
        )
    if not (dist.is_available() and dist.is_initialized()):
        return None
    modules = [] if model is None else list(model.modules())
    replicas = [] if model is None else replicas_in(model)
    if mesh is not None:
        return _find_sharded(mesh, modules, process_group)
    group = process_group
    if group == "model":
        groups = {id(m.process_group): m.process_group for m in replicas}
        if len(groups) > 1:
            raise ValueError(
                f"process_group must be given where the model's replicas have {len(groups)} of them"
            )
        if groups:
            group = next(iter(groups.values()))
        elif any(map(_is_unit, modules)):
            raise ValueError(
                "base_optimizer must be made of the parameters that fully_shard leaves (DTensors): call "
                "fully_shard first"
            )
        elif dist.get_world_size() > 1:
            raise ValueError(
                "process_group must be given where several processes run and model= is no "
                "DistributedDataParallel: the group that trains together (torch.distributed.group.WORLD), "
                "or None if every process trains a model of its own"
            )
        else:
            return None
    assert isinstance(group, ProcessGroup)
    return Ranks(group, replicas) if dist.get_world_size(group) > 1 else None


def replicas_in(model: nn.Module) -> list[DistributedDataParallel]:
    """The DistributedDataParallel modules that a model is or holds.

    Raises:
        ValueError: one cannot be trained with a backward pass a task.
    """
    replicas = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    for module in replicas:
        if module.static_graph:
            raise ValueError(
                "model must be a DistributedDataParallel without static_graph=True, whose hooks count "
                "backward passes: a step has one for every task"
            )
    return replicas


def _is_unit(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # as in is_sharded
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _find_sharded(mesh: Any, modules: Sequence[nn.Module], group: object) -> Ranks:  # noqa: ANN401
    units = [m for m in modules if _is_unit(m)]
    if not units:
        raise ValueError(
            "model must be given, and be what fully_shard returned, where parameters are DTensors"
        )
    if group == "model":
        if mesh.ndim == 1:
            group = mesh.get_group()
        elif mesh.size() == dist.get_world_size():
            group = dist.group.WORLD
        else:
            raise ValueError(
                f"process_group must be given: the group of all {mesh.size()} ranks of a mesh of "
                f"{mesh.ndim} dimensions"
            )
    assert isinstance(group, ProcessGroup)
    if dist.get_world_size(group) != mesh.size():
        raise ValueError(
            f"process_group must hold the {mesh.size()} ranks of the parameters' mesh, got "
            f"{dist.get_world_size(group)}"
        )
    shard = next(p for m in units for p in m.parameters() if is_sharded(p))
    (dim,) = [d for d, placement in enumerate(shard.placements) if placement.is_shard()]  # type: ignore[attr-defined]
    return Ranks(group, (), mesh.size() // mesh.size(dim), units)
