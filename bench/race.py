"""Runs entrants in turn, A B C A B C ..., so that a swing of the machine's bandwidth meets all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.contests import Call, Contest

OURS = "flatmtl"
Times = dict[str, list[float]]


def wall_clock(call: Call) -> float:
    """Seconds of one call on the CPU."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


class DeviceClock:
    """Seconds of one call on a CUDA device, by events, with a cold L2.

    Writing a buffer larger than the L2 empties it, and keeps the device busy until the host has queued
    the call: what the host takes to launch it is not counted.
    """

    def __init__(self) -> None:
        size = max(2 * torch.cuda.get_device_properties(0).L2_cache_size, 256 << 20)
        self._flush = torch.empty(size, dtype=torch.uint8, device="cuda")

    def __call__(self, call: Call) -> float:
        """Seconds between the events around the call."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def entrants(contest: Contest) -> dict[str, Call]:
    """A turn of everyone in a contest, in the order of a round; the read yardstick comes next to ours."""
    calls = dict(contest.others)
    calls.update({name: call for name, (call, _) in reversed(contest.yardsticks.items())})
    calls[OURS] = contest.ours
    return {name: _turn(call, contest.calls) for name, call in calls.items()}


def _turn(call: Call, calls: int) -> Call:
    if calls == 1:
        return call

    def turn() -> None:
        for _ in range(calls):
            call()

    return turn


def rounds_for(
    calls: dict[str, Call], clock: Callable[[Call], float], seconds: float, least: int, most: int
) -> int:
    """How many rounds fit into ``seconds``. Warms everything up (compiles, allocates) on the way."""
    for call in calls.values():
        call()
    one_round = sum(clock(call) for call in calls.values())
    return min(most, max(least, int(seconds / max(one_round, 1e-9))))


def run(
    contest: Contest,
    clock: Callable[[Call], float],
    *,
    seconds: float,
    least: int = 5,
    most: int = 200,
) -> dict[str, Any]:
    """Measures a contest, without pytest-benchmark; returns ``summary``."""
    calls = entrants(contest)
    rounds = rounds_for(calls, clock, seconds, least, most)
    times: Times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(clock(call))
    return summary(contest, times)


def summary(contest: Contest, times: Times) -> dict[str, Any]:
    """What is kept of a contest.

    Returns:
        "median_s": name -> median of a call; "iqr_s": of ours; "rounds"; "faster": other -> median over the
        rounds of (its time / ours in the same round); "share": yardstick -> median over the rounds of
        (our bytes per second / its in the same round); "bytes" and "gb_per_s" of ours.
    """
    ours = times[OURS]
    quarters = statistics.quantiles(ours, n=4) if len(ours) > 1 else [ours[0]] * 3
    result: dict[str, Any] = {
        "rounds": len(ours),
        "median_s": {n: statistics.median(laps) / contest.calls for n, laps in times.items()},
        "iqr_s": (quarters[2] - quarters[0]) / contest.calls,
        "faster": {name: _median_ratio(times[name], ours) for name in contest.others},
    }
    if contest.bytes:
        result["bytes"] = contest.bytes
        result["gb_per_s"] = contest.bytes / statistics.median(ours) / 1e9
        result["share"] = {
            name: _median_ratio(times[name], ours) * contest.bytes / moved
            for name, (_, moved) in contest.yardsticks.items()
        }
        result["yardstick_gb_per_s"] = {
            name: moved / statistics.median(times[name]) / 1e9
            for name, (_, moved) in contest.yardsticks.items()
        }
    return result


def _median_ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
