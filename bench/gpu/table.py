"""The short table: what each promise asks for, beside what was measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from bench import race
from bench.contests import ROW_TASKS
from bench.gpu import sizes
from bench.gpu.aggregate import AT_BEST, CAPTURED, PLAIN, nearest
from bench.gpu.steps import GRAPH, MODELS, shares
from bench.solvers import METHODS

Record = dict[str, Any]
# P at which shares of the ceiling are promised
LARGE = tuple(p for p in sizes.COLUMNS if p >= sizes.MAIN_COLUMNS)


@dataclass(frozen=True)
class Line:
    """One promise.

    Attributes:
        what: of what.
        asked: the number that is asked for.
        got: the worst number that was measured; None: none was.
        most: whether ``asked`` is an upper bound.
        where: where ``got`` was found.
        lacking: what the promise needs and has no number, with the reason.
    """

    what: str
    asked: float
    got: float | None
    most: bool
    where: str
    lacking: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """Whether it holds: "PASS" (everywhere), "short" (somewhere), or "not measured" (somewhere)."""
        if self.got is not None and (self.got > self.asked if self.most else self.got < self.asked):
            return "short"
        return "not measured" if self.lacking or self.got is None else "PASS"

    def __str__(self) -> str:
        got = "-" if self.got is None else f"{self.got:.3g}"
        sign = "<=" if self.most else ">="
        notes = [self.where] if self.where else []
        if self.lacking:
            more = ", ..." if len(self.lacking) > 3 else ""
            notes.append(f"{len(self.lacking)} lacking: {', '.join(self.lacking[:3])}{more}")
        line = f"{self.what:50}{sign} {self.asked:<8.3g}{got:>9}   {self.verdict:13}"
        return line + "; ".join(notes)


def lines(results: Record) -> list[Line]:
    """Every promise."""
    return [
        *_shares(results),
        *_aggregate(results),
        *_solvers(results),
        *_steps(results),
        *_accuracy(results),
    ]


def _records(results: Record, part: str, kind: str) -> list[Record]:
    records = results.get(part, {}).get("records", [])
    return [r for r in records if r["kind"] == kind and "error" not in r]


def _find(results: Record, part: str, kind: str, **what: object) -> Record | str:
    """The one record of this, or why there is none that counts."""
    body = results.get(part, {}).get("machine", {}).get("body", "cuda")
    if body != "cuda":
        return f"operators: {body}"
    for r in results.get(part, {}).get("records", []):
        if {"kind": kind, **what}.items() <= {k: r.get(k) for k in ("kind", *what)}.items():
            return "failed" if "error" in r else r
    return "not measured"


def _number(found: Record | str, value: Callable[[Record], float | None]) -> float | str:
    """What is read from a record, or why it is not there."""
    if isinstance(found, str):
        return found
    number = value(found)
    if number is not None:
        return number if math.isfinite(number) else "not finite"
    return "failed" if any(key.endswith("_error") for key in found) else "not measured"


def _promise(what: str, asked: float, needs: dict[str, float | str], *, most: bool = False) -> Line:
    """The line of the worst of ``needs``: every place where it is to hold -> the number, or why none."""
    numbers = [(n, place) for place, n in needs.items() if not isinstance(n, str)]
    lacking = tuple(f"{place} ({why})" for place, why in needs.items() if isinstance(why, str))
    if not numbers:
        return Line(what, asked, None, most, "", lacking)
    got, where = (max if most else min)(numbers)
    return Line(what, asked, got, most, f"worst of {len(numbers)}: {where}", lacking)


def _shares(results: Record) -> Iterator[Line]:
    ceiling = results.get("kernels", {}).get("ceiling", {}).get("copy")
    both = ("float32", "bfloat16")

    def share(
        what: str, asked: float, kind: str, name: str, tasks: Iterable[int], dtypes: Iterable[str]
    ) -> Line:
        """At every T, P and dtype of it that the part measures when it has the time."""
        needs = {}
        for t, p, dtype in itertools.product(tasks, LARGE, dtypes):
            found = _find(results, "kernels", kind, name=name, tasks=t, columns=p, dtype=dtype)
            needs[f"T={t}, P={p:.2g}, {dtype}"] = _number(
                found, lambda r: r["gb_per_s"] * 1e9 / ceiling if ceiling else None
            )
        return _promise(what, asked, needs)

    def gram(what: str, asked: float, low: int, high: int, dtype: str) -> Line:
        tasks = [t for t in sizes.TASKS if low <= t <= high]
        return share(what, asked, "op", "gram", tasks, [dtype])

    yield gram("gram float32, T <= 8: of the copy ceiling", 0.90, 1, 8, "float32")
    yield gram("gram float32, T <= 16", 0.85, 9, 16, "float32")
    yield gram("gram float32, T <= 40", 0.75, 17, 40, "float32")
    yield gram("gram bfloat16, T <= 16", 0.85, 1, 16, "bfloat16")
    yield share("combine, P >= 2.5e7", 0.90, "op", "combine", sizes.TASKS, both)
    for name in ("pack_row_", "perturb_"):
        yield share(f"{name}, P >= 2.5e7", 0.90, "row op", name, [ROW_TASKS], both)


def _aggregate(results: Record) -> Iterator[Line]:
    main: Record = {
        "name": "pcgrad", "tasks": sizes.MAIN_TASKS, "columns": sizes.MAIN_COLUMNS, "dtype": "float32",
    }  # fmt: skip
    plain = _find(results, "aggregate", "aggregate", **main)
    best = _find(results, "aggregate", "aggregate, at its best", **main)

    def times(found: Record | str, rivals: Iterable[str]) -> dict[str, float | str]:
        return {rival: _faster(found, rival) for rival in rivals}

    floor = _number(plain, lambda r: r["median_s"][race.OURS] / r["floor_s"])
    yield _promise("aggregate T=8: of the byte floor", 1.15, {"PCGrad, eager": floor}, most=True)
    torch_ = times(plain, PLAIN) | times(best, AT_BEST)
    for name in CAPTURED:  # a form that cannot be captured has no such time
        if not (isinstance(best, dict) and name in best.get("failed_rivals", {})):
            torch_ |= times(best, [name])
    yield _promise("aggregate T=8: times faster than plain torch", 3, torch_)
    yield _promise("aggregate T=8: than TorchJD", 10, times(plain, ["TorchJD"]))
    yield _promise("aggregate T=8: than LibMTL", 50, times(plain, ["LibMTL's maths"]))


def _faster(found: Record | str, rival: str) -> float | str:
    """How many times faster than one rival."""
    if isinstance(found, dict) and rival in found.get("failed_rivals", {}):
        return "failed"
    return _number(found, lambda r: r["faster"].get(rival))


def _solvers(results: Record) -> Iterator[Line]:
    def micros(r: Record) -> float | None:
        return None if "graph_error" in r or "graph_s" not in r else 1e6 * r["graph_s"]

    needs = {
        name: _number(_find(results, "solvers", "solver", name=name, tasks=8), micros)
        for name in METHODS
    }
    yield _promise("solvers T=8, a graph replay: us", 50, needs, most=True)


def _steps(results: Record) -> Iterator[Line]:
    steps = {model: _find(results, "steps", "step", name=model) for model in MODELS}
    for kind in ("kernels", "beside the passes"):

        def percent(r: Record, kind: str = kind) -> float | None:
            return 100 * found[kind] if kind in (found := shares(r)) else None

        needs = {m: _number(r, percent) for m, r in steps.items() if m.startswith("resnet18")}
        yield _promise(f"FS-MTL step, ResNet-18: {kind}, %", 3, needs, most=True)

    def faster(r: Record) -> float | None:
        captured = r["median_s"].get(race.OURS + GRAPH)
        return None if captured is None else r["median_s"][race.OURS] / captured

    yield _promise(
        "FS-MTL step: captured, times faster than eager",
        1,
        {model: _number(r, faster) for model, r in steps.items()},
    )


def _accuracy(results: Record) -> Iterator[Line]:
    found = {f"T={t}": _find(results, "kernels", "accuracy", tasks=t) for t in sizes.TASKS}
    errors = {at: _number(r, lambda r: r["off"] / r["rounded_off"]) for at, r in found.items()}
    yield _promise("gram float32: error, of the rounded exact one's", 2, errors, most=True)
    same = {at: _number(r, lambda r: float(r["same_bits"])) for at, r in found.items()}
    yield _promise("gram float32: the same bits at every call", 1, same)


def details(results: Record) -> Iterator[str]:
    """The numbers behind: gram and combine by T at the P of the promises, aggregates, solvers, steps."""
    kernels = results.get("kernels", {})
    ceiling = kernels.get("ceiling", {}).get("copy")
    if ceiling:
        yield f"{'kernel':18}{'dtype':>10}{'T':>4}{'P':>8}{'ms':>10}{'of copy':>9}   nearest rival"
    for kind in ("op", "row op"):
        for r in _records(results, "kernels", kind):
            if r["columns"] in (sizes.MAIN_COLUMNS, sizes.QUICK_COLUMNS[0]) and (
                r["tasks"] == 8 or r["name"] in ("gram", "combine")
            ):
                yield (
                    f"{r['name']:18}{r['dtype']:>10}{r['tasks']:>4}{r['columns']:>8.0e}"
                    f"{1e3 * r['median_s'][race.OURS]:>10.4f}"
                    f"{100 * r['gb_per_s'] * 1e9 / ceiling:>8.0f}%{_nearest(r)}"
                )
    for r in _records(results, "aggregate", "aggregate"):
        ours = r["median_s"][race.OURS]
        graph = f", graph {1e3 * r['graph_s']:.3f}" if "graph_s" in r else ""
        yield (
            f"aggregate {r['name']:10}{r['dtype']:>10} T={r['tasks']:<3} P={r['columns']:.0e}: "
            f"{1e3 * ours:.3f} ms"
            f"{graph}; {ours / r['floor_s']:.2f} of the byte floor{_nearest(r)}"
        )
    for r in _records(results, "solvers", "solver"):
        if r["tasks"] in (8, 40):
            cells = [
                r["median_s"][race.OURS], r["wall_s"], r.get("graph_s"), r.get("graph_each_s"),
                r.get("wall_s_torchjd"),
            ]  # fmt: skip
            texts = ["-" if c is None else f"{1e6 * c:.1f}" for c in cells]
            heads = ("device", "wall", "graph", "one of many", "TorchJD's wall")
            yield f"solver {r['name']:12} T={r['tasks']:<3} us: " + ", ".join(
                f"{head} {text}" for head, text in zip(heads, texts, strict=True)
            )
    for r in _records(results, "steps", "step"):
        times = ", ".join(f"{name} {1e3 * s:.2f}" for name, s in r["median_s"].items())
        parts = ", ".join(f"{name} {100 * s:.1f} %" for name, s in shares(r).items())
        yield f"step {r['name']}, ms: {times}" + (
            f"; of the captured one: {parts}" if parts else ""
        )


def _nearest(r: Record) -> str:
    found = nearest(r)
    name = min(found, key=found.__getitem__, default=None)
    return "" if name is None else f"   {found[name]:.2f}x {name}"


def troubles(results: Record) -> Iterator[str]:
    """What failed, and what there was no time for."""
    for name, part in results.items():
        for r in part.get("records", []):
            wrong = {k: r[k] for k in r if k in ("error", "failed_rivals") or k.endswith("_error")}
            if wrong:
                yield f"FAILED {name}: {r['name']}, T={r.get('tasks')}: {wrong}"
        missing = part.get("missing", [])
        if missing:
            yield f"no time in {name} for {len(missing)}: {', '.join(missing[:4])}" + (
                ", ..." if len(missing) > 4 else ""
            )


def show(results: Record) -> str:
    """All of it; the promises last."""
    heads = []
    for name, part in results.items():
        m, c = part["machine"], part.get("ceiling", {})
        limits = ", ".join(f"{k} {v / 1e9:.0f} GB/s" for k, v in c.items())
        heads.append(
            f"{name}: {m['date']}, {m['device']}, torch {m['torch']}, commit {m['commit']}, "
            f"operators: {m['body']}" + (f"; {limits}" if limits else "")
        )
    return "\n".join(
        [
            *heads, "", *details(results), "", *troubles(results), "",
            f"{'promise':50}{'asked':11}{'measured':>9}", *map(str, lines(results)),
        ]
    )  # fmt: skip
