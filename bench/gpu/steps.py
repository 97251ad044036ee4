"""The whole FS-MTL step, eager and as one captured CUDA graph, and flatmtl's own part of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench.contests import Call, Contest
from bench.fs_mtl_steps import FOREACH, LOOPS, Entrant
from bench.gpu.bench import Bench, captured, message
from bench.networks import Data, many_heads, resnet18
from bench.race import OURS

MODELS: dict[str, Callable[[], Data]] = {
    "resnet18, T=3": partial(resnet18, 128, 3),
    "resnet18, T=2": partial(resnet18, 128, 2),
    "40 heads": many_heads,
}
QUICK_MODELS: dict[str, Callable[[], Data]] = {"3 heads": partial(many_heads, 4, 3, 16)}
PASSES = "passes alone"
GRAPH = ", captured"
REPLAYS = 3  # under the profiler


def run(bench: Bench) -> None:
    """The part."""
    for model, make in (QUICK_MODELS if bench.quick else MODELS).items():
        if bench.left < 8:
            bench.part.missing.append(model)
            continue
        torch.manual_seed(0)
        _model(bench, model, make())
        bench.release()
        bench.say(model)
        bench.part.save()


def _model(bench: Bench, model: str, data: Data) -> None:
    network, x, y = (part.to(bench.device) for part in data)

    def entrant(name: str) -> Entrant:
        return Entrant(name, network, x, y)

    ours = entrant(OURS)
    others: dict[str, Call] = {}
    for name in (FOREACH, LOOPS):
        rival = entrant(name)
        others[name] = partial(rival.step, rival.losses)
    others[PASSES] = partial(passes_alone, entrant(PASSES))
    replay, failed = None, None
    if bench.device == "cuda":
        try:
            whole, bare = entrant(OURS), entrant(PASSES)
            replay = captured(partial(whole.step, whole.losses))
            others[OURS + GRAPH] = replay
            others[PASSES + GRAPH] = captured(partial(passes_alone, bare))
        except RuntimeError as error:
            failed = message(error)
    contest = Contest(model, 0, partial(ours.step, ours.losses), others)
    record = bench.measure(contest, turn=40 * bench.turn, kind="step", tasks=len(y))
    record["shared"] = sum(p.numel() for p in network.trunk.parameters())
    if failed is not None:
        record["graph_error"] = failed
    if replay is not None and OURS + GRAPH in contest.others:
        try:
            record["kernels_s"] = own_kernels(replay)
        except Exception as error:  # the profiler may not be allowed on this machine
            record["profile_error"] = message(error)


def passes_alone(entrant: Entrant) -> None:
    """1 + T forward and 2 T backward passes and the update; nothing is done with the gradients."""
    shared = list(entrant.network.trunk.parameters())
    own = [list(head.parameters()) for head in entrant.network.heads]
    losses = entrant.losses()
    for task, loss in enumerate(losses):
        last = task + 1 == len(losses)
        torch.autograd.grad(loss, shared + own[task], retain_graph=not last)
    for task, params in enumerate(own):
        found = torch.autograd.grad(entrant.losses([task])[0], shared + params)
        for param, grad in zip(shared + params, found, strict=True):
            param.grad = grad
    entrant.base.step()


def own_kernels(replay: Call) -> float:
    """Seconds of flatmtl's kernels in one replay, by the profiler's records of every kernel."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(REPLAYS):
            replay()
        torch.cuda.synchronize()
    times = [
        event.self_device_time_total
        for event in profile.key_averages()
        if "flatmtl::kernels::" in event.key
    ]
    if not times:
        raise RuntimeError("the profiler saw no kernel of flatmtl")
    return sum(times) / REPLAYS / 1e6


def shares(record: dict[str, dict[str, float]]) -> dict[str, float]:
    """Of a captured step: what is beside its passes; and what flatmtl's kernels take, where known."""
    times = record["median_s"]
    whole, bare = times.get(OURS + GRAPH), times.get(PASSES + GRAPH)
    if whole is None or bare is None:
        return {}
    found = {"beside the passes": 1 - bare / whole}
    if "kernels_s" in record:
        found["kernels"] = record["kernels_s"] / whole  # type: ignore[operator]
    return found
