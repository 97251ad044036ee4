"""Which parameters are shared between tasks and which belong to one task."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flatmtl.block import Block
from flatmtl.losses import TaskName
from flatmtl.messages import Messages
from flatmtl.sharded import Part, ShardedRows

Gradients = Sequence[Tensor | None]


def named_shared(
    shared: Iterable[Tensor] | None, known: Sequence[Tensor], label: Callable[[Tensor], str]
) -> list[Tensor] | None:
    """The caller's list of shared parameters, checked against the optimizer's.

    Raises:
        TypeError, ValueError: an entry is no parameter of the optimizer, or is given twice.
    """
    if shared is None:
        return None
    if isinstance(shared, Tensor) or not isinstance(shared, Iterable):
        raise TypeError(f"shared must be an iterable of parameters, got {type(shared).__name__}")
    listed = list(shared)
    ids = {id(p) for p in known}
    seen: set[int] = set()
    for k, param in enumerate(listed):
        if not isinstance(param, Tensor):
            raise TypeError(f"shared[{k}] must be a parameter, got {type(param).__name__}")
        if id(param) not in ids:
            raise ValueError(
                f"shared[{k}] must be one of the optimizer's parameters, got another tensor of shape "
                f"{list(param.shape)}"
            )
        if id(param) in seen:
            raise ValueError(f"shared must name every parameter once, got {label(param)} twice")
        seen.add(id(param))
    return listed


@dataclass(frozen=True)
class Layout:
    """How the blocks' buffers are to lie.

    Attributes:
        row_dtype: of the rows of gradients; None: the parameters'.
        exempt: ids of parameters that the adaptive scaling leaves out.
        both: the shared block's two families of rows are one matrix.
        ends: its ``update`` and ``kept`` are one matrix.
        joined: a task's shared and own rows lie side by side, as one message to other processes.
        part: how many processes keep a part of each row, and which of them this is; None: all is here.
        local: gives what this process holds of a parameter; None: all of it.
        moved: called when parameters have been written.
    """

    row_dtype: torch.dtype | None = None
    exempt: frozenset[int] = frozenset()
    both: bool = False
    ends: bool = False
    joined: bool = False
    part: tuple[int, int] | None = None
    local: Callable[[Tensor], Tensor] | None = None
    moved: Callable[[], None] | None = None


class Roles:
    """The parameters' roles, found from which tasks' gradients reach them.

    Shared are those that the caller named, or else those reached by at least two tasks (by the only
    one, where there is only one). A parameter that no task has reached yet has no role.

    Attributes:
        params: the trainable parameters, in the optimizer's order.
        shared: their block, [T, P] rows; None if there are none.
        own: task -> the block of its own parameters, one row.
        shared_index: positions in ``params`` of the shared block's parameters.
        own_index: task -> positions of its own block's parameters.
        shared_set: the entries of ``shared_index``.
        owner: position of a parameter -> the task whose own it is.
        settled: whether the blocks are laid out.
        messages: the buffers of rows where they are joined.
        of_turn: task -> what its gradient reaches, whatever its role, as far as ranks have told each other
            (CoopFlat).
        sharded: those where each process keeps a part.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        tasks: Sequence[TaskName],
        named: Sequence[Tensor] | None,
        label: Callable[[Tensor], str],
        layout: Layout | None = None,
    ) -> None:
        self.params = list(params)
        self.tasks = list(tasks)
        self._named = None if named is None else {id(p) for p in named}
        self._label = label
        self._layout = layout or Layout()
        self._reach: list[set[int]] = [set() for _ in params]
        self._seen: set[int] = set()  # tasks that an earlier pass had
        self._new: dict[int, set[int]] = {}  # parameter -> tasks that first reached it this pass
        self.shared: Block | None = None
        self.own: dict[int, Block] = {}
        self.shared_index: list[int] = []
        self.own_index: dict[int, list[int]] = {}
        self.shared_set: frozenset[int] = frozenset()
        self.owner: dict[int, int] = {}
        self.settled = False
        self.messages: Messages | None = None
        self.of_turn: dict[int, set[int]] = {}
        self.sharded: ShardedRows | None = None

    def _is_shared(self, k: int) -> bool:
        if self._named is not None:
            return id(self.params[k]) in self._named
        return len(self._reach[k]) >= 2 or len(self.tasks) == 1

    def note(self, task: int, grads: Gradients) -> bool:
        """Notes what one task's gradients reach. True if the roles have to be settled (again).

        Raises:
            ValueError: a parameter that belonged to one task is reached by another that was there
                before, or a gradient is sparse.
        """
        fresh = False
        for k, grad in enumerate(grads):
            if grad is None or task in self._reach[k]:
                continue
            self.check_dense(k, grad)
            fresh = self.note_reach(task, k) or fresh
        return fresh

    def check_dense(self, k: int, grad: Tensor) -> None:
        """Raises ValueError if the gradient of parameter ``k`` is sparse."""
        if grad.layout != self.params[k].layout:
            raise ValueError(
                f"{self._label(self.params[k])} must have a dense gradient, got layout {grad.layout}"
            )

    def note_reach(self, task: int, k: int) -> bool:
        """Notes that a task reaches parameter ``k``. True if the roles have to be settled (again).

        Raises:
            ValueError: the parameter belonged to one task, and this one was there before.
        """
        if task in self._reach[k]:
            return False
        before = self._reach[k] - self._new.get(k, set())
        newcomer = task not in self._seen  # what it reaches was not known yet
        was_shared = self._is_shared(k)
        if self.settled and before and not newcomer and not was_shared:
            raise ValueError(
                f"{self._label(self.params[k])} must keep one role: it belonged to task "
                f"{self.tasks[next(iter(before))]!r} alone, and task {self.tasks[task]!r} reaches it "
                "now; name the shared parameters with shared="
            )
        self._reach[k].add(task)
        self._new.setdefault(k, set()).add(task)
        return not before or not was_shared

    def note_all(self, tasks: Collection[int], reached: Iterable[tuple[int, int]]) -> bool:
        """Notes the tasks of a pass, and all pairs of a task and a parameter that it reaches.

        Returns:
            Whether the roles have to be settled (again).

        Raises:
            ValueError: as ``note_reach``; then nothing was noted.
        """
        fresh = not self.settled
        try:
            for task, k in reached:
                fresh = self.note_reach(task, k) or fresh
        except BaseException:
            self.end_pass(tasks, keep=False)
            raise
        self.end_pass(tasks, keep=True)
        return fresh

    def knows(self, tasks: Collection[int]) -> bool:
        """Whether the blocks are laid out, by passes that had all these tasks."""
        return self.settled and self._seen.issuperset(tasks)

    @property
    def complete(self) -> bool:
        """Whether every task has been there and every parameter been reached: there is no more to learn."""
        return self.settled and len(self._seen) == len(self.tasks) and all(self._reach)

    def unseen(self) -> list[TaskName]:
        """The tasks that no pass had so far."""
        return [name for task, name in enumerate(self.tasks) if task not in self._seen]

    def reached_by(self, tasks: Collection[int]) -> set[int]:
        """Positions of the parameters with a role that some of these tasks are known to reach."""
        index = [*self.shared_index, *(k for t in tasks for k in self.own_index.get(t, []))]
        return {k for k in index if not self._reach[k].isdisjoint(tasks)}

    def end_pass(self, tasks: Collection[int], *, keep: bool) -> None:
        """Keeps what ``note`` has noted of these tasks since the last call, or forgets it (a failed pass)."""
        if not keep:
            for k, noted in self._new.items():
                self._reach[k] -= noted
        else:
            self._seen.update(tasks)
        self._new = {}

    def name_shared(self, positions: Iterable[int]) -> None:
        """These parameters are shared, whoever reaches them; those not named so belong to one task."""
        self._named = (self._named or set()) | {id(self.params[k]) for k in positions}

    def reach(self) -> list[list[int]]:
        """The tasks that have reached each parameter, for a checkpoint."""
        return [sorted(tasks) for tasks in self._reach]

    def take_reach(self, reach: Sequence[Sequence[int]]) -> None:
        """Takes up what ``reach`` gave and lays out the blocks."""
        self._reach = [set(tasks) for tasks in reach]
        self._seen = set().union(*self._reach)
        if any(self._reach):
            self.settle()

    def settle(self) -> None:
        """Gives every reached parameter its role and lays out the blocks.

        Raises:
            ValueError: a parameter outside ``shared=`` is reached by two tasks, or dtypes or devices
                differ within a role.
        """
        shared_index: list[int] = []
        own_index: dict[int, list[int]] = {}
        for k, reach in enumerate(self._reach):
            if not reach:
                continue
            if self._is_shared(k):
                shared_index.append(k)
            elif len(reach) == 1:
                own_index.setdefault(next(iter(reach)), []).append(k)
            else:
                names = [self.tasks[t] for t in sorted(reach)]
                raise ValueError(
                    f"shared must name {self._label(self.params[k])}, or only one task may reach it: "
                    f"tasks {names} do"
                )
        for index in (shared_index, *own_index.values()):
            index.sort(key=self._is_exempt)  # stable: the exempt ones last
        shared = None
        if shared_index:
            rows = len(self.tasks)
            layout = self._layout
            shared = self._block(shared_index, rows, both=layout.both, ends=layout.ends)
        own = {task: self._block(index, 1) for task, index in own_index.items()}
        messages = sharded = None
        if self._layout.part is not None:
            sharded = ShardedRows(shared, own, len(self.tasks), *self._layout.part)
        elif self._layout.joined:
            messages = Messages(shared, own, len(self.tasks), both=self._layout.both)
        # Nothing has changed up to here, should a role not hold.
        flats = self.flats()
        self.shared, self.shared_index = shared, shared_index
        self.shared_set = frozenset(shared_index)
        self.owner = {k: task for task, index in own_index.items() for k in index}
        self.own, self.own_index = own, own_index
        self.messages, self.sharded = messages, sharded
        self.settled = True
        self.put_flats(flats)

    def flats(self) -> dict[int, Tensor]:
        """id(parameter) -> its segment of the flat part that is kept, where one is."""
        return {
            id(param): view
            for block in self.blocks
            if block.has_flat
            for param, view in zip(block.params, block.views(block.kept), strict=True)
        }

    def put_flats(self, flats: dict[int, Tensor]) -> None:
        """Takes up what ``flats`` gave; a parameter that it lacks has a flat part of zero."""
        for block in self.blocks:
            kept = [flats.get(id(p)) for p in block.params]
            if any(one is not None for one in kept):
                pairs = zip(kept, block.params, strict=True)
                block.pack(block.kept, [None if f is None else f.to(p) for f, p in pairs])
                block.has_flat = True

    def _is_exempt(self, k: int) -> bool:
        return id(self.params[k]) in self._layout.exempt

    def _block(
        self, index: Sequence[int], rows: int, *, both: bool = False, ends: bool = False
    ) -> Block:
        chosen = [self.params[k] for k in index]
        return Block(
            chosen,
            lambda k: self._label(chosen[k]),
            rows,
            row_dtype=self._row_dtype(chosen[0]),
            exempt=sum(map(self._is_exempt, index)),
            both=both,
            ends=ends,
            pieces=1 if self._layout.part is None else self._layout.part[0],
            local=self._layout.local,
            moved=self._layout.moved,
        )

    def _row_dtype(self, param: Tensor) -> torch.dtype | None:
        narrow = self._layout.row_dtype
        if narrow is not None and param.dtype not in (torch.float32, narrow):
            raise TypeError(
                f"row_dtype must be None for parameters that are not float32: {self._label(param)} is "
                f"{param.dtype}"
            )
        return narrow

    @property
    def rows(self) -> Block | Part | None:
        """The shared rows that are kept here: of the block, or this process's part of it."""
        return self.shared if self.sharded is None else self.sharded.shared()

    def own_rows(self, task: int) -> Block | Part:
        """The same of a task's own parameters."""
        return self.own[task] if self.sharded is None else self.sharded.own(task)

    def per_task(self, squares: Mapping[int, Tensor]) -> Tensor:
        """float64 [T] from squared norms (0-dim), 0 where a task has none."""
        device = self.params[0].device
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return torch.stack([squares.get(t, zero).to(device) for t in range(len(self.tasks))])

    @property
    def blocks(self) -> list[Block]:
        """All blocks, the shared one first."""
        return [b for b in (self.shared, *self.own.values()) if b is not None]
