"""Pools of worker processes in one gloo group, and a record of the collectives they issue.

A test asks the fixture `ranks` for a pool and has every process call one function of its module:

    def summed(rank: int, size: int) -> torch.Tensor:
        with counted() as calls:
            row = torch.full((size,), float(rank))
            dist.all_reduce(row)
        assert calls == [("all_reduce", 4 * size)]
        return row

    def test_sum(ranks):
        assert [row.tolist() for row in ranks(2).run(summed, 3)] == [[1.0] * 3] * 2
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode

COLLECTIVE_SECONDS = 30.0  # after which gloo gives a collective up
CHECK_SECONDS = 10.0  # for the group to show that it works after a failure
GRACE_SECONDS = 5.0  # for the others to answer once a process has died
STACK_SECONDS = 0.2  # for a hanging process to print where it is
# What a process would take seconds to import, each time that a pool starts.
PRELOADED = ["flatmtl", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint"]

Failure = tuple[str, str, str]  # type name, message, traceback


class RankError(AssertionError):
    """A call failed on some ranks.

    Attributes:
        failures: rank -> (type name, message, traceback text) of what it raised; a process that
            died is a ("ProcessDied", exit code, "").
        hung: the ranks that had not answered in time.
    """

    def __init__(self, failures: dict[int, Failure], hung: list[int]) -> None:
        self.failures = failures
        self.hung = hung
        lines = [f"ranks {sorted(failures)} failed, ranks {hung} hang"]
        for rank, (kind, message, trace) in sorted(failures.items()):
            lines.append(f"rank {rank}: {kind}: {message}\n{trace}")
        super().__init__("\n".join(lines))


class Pool:
    """Processes that live from call to call, one gloo group over all of them.

    They start at the first call. One that died or hangs takes the others with it; the next call
    starts all anew. State that a function leaves behind (a global, a group) stays in its process.

    Attributes:
        warnings: by rank, the (category, message) of each warning of the last call; empty for a
            rank that did not answer.
    """

    def __init__(self, world_size: int, environment: Mapping[str, str] | None = None) -> None:
        """`environment` is added to that of the processes."""
        self.world_size = world_size
        self.warnings: list[list[tuple[str, str]]] = []
        self._environment = dict(environment or {})
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._store: TCPStore | None = None
        self._check_first = False

    def run(
        self, function: Callable[..., Any], *args: Any, timeout: float = 60.0, **kwargs: Any
    ) -> list[Any]:
        """Has every process call `function(rank, *args, **kwargs)`.

        Torch's generator is seeded from that of the caller and the rank: another seed on every
        rank, the same ones in every run of a test that has the fixture `rng`.

        Args:
            function: one that the processes can import: at the top of a module.
            *args: anything that can be pickled; tensors are copied.
            timeout: seconds until a rank that has not answered is taken to hang.
            **kwargs: as `args`.

        Returns:
            What the ranks returned, by rank.

        Raises:
            RankError: some ranks raised, died or hang.
        """
        if self._check_first:
            try:
                self._call(_works, (), {}, CHECK_SECONDS)
            except RankError:
                self.close()
        if not self._processes:
            self._start()
        return self._call(function, args, kwargs, timeout)

    def close(self) -> None:
        """Ends the processes, whatever they do."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections, self._store = [], [], None
        self._check_first = False

    def _start(self) -> None:
        # The store is here: its port is free for certain, and it outlives every rank.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "WORLD_SIZE": str(self.world_size),
            "GLOO_SOCKET_IFNAME": "lo",
            **self._environment,
        }
        context = get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        for rank in range(self.world_size):
            here, there = context.Pipe()
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=_work, args=(rank, there, environment), daemon=True)
            process.start()
            there.close()  # only the process holds it now: its death ends the pipe
            self._processes.append(process)
            self._connections.append(here)
        self._call(_join, (self.world_size, self._store.port), {}, 60.0)

    def _call(
        self, function: Callable[..., Any], args: Any, kwargs: dict[str, Any], timeout: float
    ) -> list[Any]:
        request = pickle.dumps((function, args, kwargs))
        seed = torch.initial_seed()
        try:
            for rank, connection in enumerate(self._connections):
                with suppress(OSError):  # it has died: _answers finds out
                    connection.send_bytes(((seed + rank) % 2**63).to_bytes(8, "big") + request)
            answers, died = self._answers(time.monotonic() + timeout)
        except BaseException:  # answers to come would be taken for those of the next call
            self.close()
            raise
        hung = [rank for rank in range(self.world_size) if rank not in {*answers, *died}]
        if hung:
            for rank in hung:
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
            time.sleep(STACK_SECONDS)
        if hung or died:
            self.close()
        failures = dict(died)
        results: list[Any] = [None] * self.world_size
        self.warnings = [[] for _ in results]
        for rank, answer in answers.items():
            result, failure, self.warnings[rank] = pickle.loads(answer)
            if failure is None:
                results[rank] = pickle.loads(result)
            else:
                failures[rank] = failure
        self._check_first = bool(failures) and bool(self._processes)
        if failures or hung:
            raise RankError(failures, hung)
        return results

    def _answers(self, deadline: float) -> tuple[dict[int, bytes], dict[int, Failure]]:
        answers: dict[int, bytes] = {}
        died: dict[int, Failure] = {}
        waited = {connection: rank for rank, connection in enumerate(self._connections)}
        while waited:
            ready = wait(list(waited), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waited.pop(connection)
                try:
                    answers[rank] = connection.recv_bytes()
                except (EOFError, OSError):
                    self._processes[rank].join()
                    code = self._processes[rank].exitcode
                    died[rank] = ("ProcessDied", f"exit code {code}", "")
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return answers, died


def _work(rank: int, connection: Connection, environment: Mapping[str, str]) -> None:
    """The body of a process: one answer for each request, until the pipe ends."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    torch.set_warn_always(True)  # torch's own: in every call, not once in a process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which end this
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    with suppress(EOFError, OSError):
        while True:
            connection.send_bytes(_answer(rank, connection.recv_bytes()))


def _answer(rank: int, request: bytes) -> bytes:
    # Everything goes as bytes: a pipe would hand tensors over as files in shared memory.
    torch.manual_seed(int.from_bytes(request[:8], "big"))
    failure = None
    result = b""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            function, args, kwargs = pickle.loads(request[8:])
            result = pickle.dumps(function(rank, *args, **kwargs))
        except BaseException as error:  # pytest.fail and sys.exit too
            failure = (type(error).__name__, str(error), traceback.format_exc())
    warned = [(w.category.__name__, str(w.message)) for w in caught]
    return pickle.dumps((result, failure, warned))


def _join(rank: int, world_size: int, port: int) -> None:
    import flatmtl  # noqa: F401  here, so that no test's time limit has to cover it

    store = TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(
        "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )


def _works(rank: int) -> None:
    dist.barrier()
    total = torch.tensor(2**rank)
    dist.all_reduce(total)  # half a collective left over could be taken for the barrier
    if total.item() != 2 ** dist.get_world_size() - 1:
        raise RuntimeError("the group is out of step")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Pool]]:
    """`ranks(n)`: the pool of `n` processes that all tests share."""
    from conftest import SEED  # it imports this module

    pools: dict[int, Pool] = {}

    def pool(world_size: int) -> Pool:
        if world_size not in pools:
            pools[world_size] = Pool(world_size, {"FLATMTL_TEST_SEED": str(SEED)})
        return pools[world_size]

    yield pool
    for made in pools.values():
        made.close()


# What torch.distributed calls the ops of c10d. Those of _c10d_functional have these names.
NAMES = {
    "_allgather_base_": "all_gather_into_tensor",
    "_reduce_scatter_base_": "reduce_scatter_tensor",
    "allgather_": "all_gather",
    "allgather_coalesced_": "all_gather_coalesced",
    "allgather_into_tensor_coalesced_": "all_gather_into_tensor_coalesced",
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce_coalesced",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all_single",
    "recv_any_source_": "recv",
}
# The first of these that an op has is what the rank hands in.
MESSAGES = ("input_tensors", "input_tensor", "input_list", "inputs", "input", "tensors", "tensor")


@contextmanager
def counted(group: dist.ProcessGroup | None = None) -> Iterator[list[tuple[str, int]]]:
    """Lists the collectives that this thread issues, in their order, of all groups or of `group`.

    It sees the dispatched ops: calls of torch.distributed, of its objects' collectives (several
    ops each), of the reducer and the buffers of DDP, of FSDP, in a forward and in a backward on
    the CPU. It cannot see those of another thread (the callbacks of futures, as PowerSGD's hook
    has them), nor of a Backend called by itself: gloo's own count tells that some are missing.
    What goes through the store (init_process_group, new_group) is no collective.

    Yields:
        (name, bytes) of each, the name that of the function of torch.distributed. The bytes are
        what this rank hands in: its own part for a gather, the whole input for a reduce_scatter
        and an all_to_all, the buffer for an all_reduce, a broadcast, a send or a recv, nothing for
        a barrier and for a scatter from elsewhere.

    Raises:
        RuntimeError: gloo counts other collectives than these. Its monitored_barrier counts as
            several.
    """
    before = _issued(group)
    record = _Record(group)
    with record:
        yield record.calls
    for name, issued in _issued(group).items():
        issued -= before.get(name, 0)
        if issued != record.seen[name]:
            raise RuntimeError(f"saw {record.seen[name]} of {issued} collectives of group {name}")


def _issued(group: dist.ProcessGroup | None) -> dict[str, int]:
    """How many collectives this rank has issued, by group."""
    groups = dist.distributed_c10d._world.pg_map if group is None else [group]
    numbers = [each._get_sequence_number_for_group() for each in groups]  # type: ignore[attr-defined]
    return {each.group_name: number for each, number in zip(groups, numbers)}


class _Record(TorchDispatchMode):
    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, int]] = []
        self.seen: Counter[str] = Counter()  # by group
        self._group = group

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace in ("c10d", "_c10d_functional"):
            names = [argument.name for argument in func._schema.arguments]
            given = {**dict(zip(names, args)), **kwargs}
            group = given.get("process_group", given.get("group_name"))
            if group is not None:  # without one (wait_tensor) nothing is sent
                name = _name(group)
                self.seen[name] += 1
                if self._group is None or name == self._group.group_name:
                    self.calls.append(_call(func.overloadpacket.__name__, given))
        return func(*args, **kwargs)


def _name(group: Any) -> str:
    if isinstance(group, str):
        return group
    if isinstance(group, torch.ScriptObject):
        group = dist.ProcessGroup.unbox(group)
    return group.group_name


def _call(op: str, given: Mapping[str, Any]) -> tuple[str, int]:
    name = NAMES.get(op, op.removesuffix("_out").removesuffix("_"))
    if name.endswith("barrier"):  # its tensor only says which device
        return name, 0
    return name, _bytes(next(given[key] for key in MESSAGES if key in given))


def _bytes(message: Any) -> int:
    if isinstance(message, torch.Tensor):
        return message.numel() * message.element_size()
    return sum(_bytes(part) for part in message)
