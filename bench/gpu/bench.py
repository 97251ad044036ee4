"""What every part is given: the device, its clock, how long it may take, where results go."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bench import race
from bench.contests import Call, Contest
from bench.gpu.store import Part, Record

Clock = Callable[[Call], float]


@dataclass
class Bench:
    """One part's run.

    Attributes:
        device: "cuda" or "cpu".
        quick: small sizes only.
        part: takes the results.
        clock: seconds of a call.
        end: the time (``time.monotonic``) at which it has to be over.
        turn: seconds of measuring a contest.
    """

    device: str
    quick: bool
    part: Part
    clock: Clock
    end: float
    turn: float
    _started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.monotonic()

    def measure(self, contest: Contest, *, turn: float | None = None, **about: object) -> Record:
        """One contest, recorded; errors are recorded too, so that one failure does not end the run."""
        record: Record = {"name": contest.name, **about}
        self.part.records.append(record)
        for name, call in list(contest.others.items()):
            try:
                call()
            except Exception as error:  # TorchJD refuses some dtypes; the others still run
                del contest.others[name]
                record.setdefault("failed_rivals", {})[name] = message(error)
        try:
            record |= race.run(contest, self.clock, seconds=turn or self.turn, least=3, most=50)
        except Exception as error:
            record["error"] = message(error)
            print("failed:", record, flush=True)
        return record

    def seconds(self, call: Call, rounds: int = 5) -> float:
        """The median of a call, warmed up."""
        call()
        return sorted(self.clock(call) for _ in range(rounds))[rounds // 2]

    def wait(self) -> None:
        """For the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def wall(self, call: Call, calls: int = 20) -> float:
        """Seconds of wall time a call, ``calls`` queued one after the other and waited for."""
        self.wait()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        self.wait()
        return (time.perf_counter() - begin) / calls

    def release(self) -> None:
        """Gives freed memory back, for the next size."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"[{time.monotonic() - self._started:5.1f} s] {text}", flush=True)


def message(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def captured(call: Call, calls: int = 1) -> Call:
    """The call, so many times, captured in a CUDA graph; a call of the result replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()

    def replay(_kept: Call = call) -> None:  # what the graph writes to lives in the call
        graph.replay()

    return replay
