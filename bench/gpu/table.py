"""The short table: what each promise asks for, beside what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bench import race
from bench.gpu import sizes
from bench.gpu.aggregate import nearest
from bench.gpu.steps import GRAPH, shares

Record = dict[str, Any]
LARGE = sizes.MAIN_COLUMNS  # from this P on shares of the ceiling are promised


@dataclass(frozen=True)
class Line:
    """One promise.

    Attributes:
        what: of what.
        asked: the number that is asked for.
        got: the number that was measured; None: it was not.
        most: whether ``asked`` is an upper bound.
        where: where ``got`` was found, or why there is none.
    """

    what: str
    asked: float
    got: float | None
    most: bool
    where: str

    @property
    def verdict(self) -> str:
        """Whether it holds: "PASS", "short", or "not measured"."""
        if self.got is None:
            return "not measured"
        return (
            "PASS" if (self.got <= self.asked if self.most else self.got >= self.asked) else "short"
        )

    def __str__(self) -> str:
        got = "-" if self.got is None else f"{self.got:.3g}"
        sign = "<=" if self.most else ">="
        return f"{self.what:50}{sign} {self.asked:<8.3g}{got:>9}   {self.verdict:13}{self.where}"


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


def _worst(what: str, asked: float, found: list[tuple[float, str]], *, most: bool = False) -> Line:
    """The line of the worst of some numbers, each with its place."""
    if not found:
        return Line(what, asked, None, most, "")
    got, where = (max if most else min)(found)
    return Line(what, asked, got, most, f"worst of {len(found)}: {where}")


def _shares(results: Record) -> Iterator[Line]:
    ceiling = results.get("kernels", {}).get("ceiling", {}).get("copy")
    found = [*_records(results, "kernels", "op"), *_records(results, "kernels", "row op")]

    def share(what: str, asked: float, fits: Callable[[Record], bool]) -> Line:
        fitting = [r for r in found if r["columns"] >= LARGE and fits(r)]
        return _worst(what, asked, [(r["gb_per_s"] * 1e9 / ceiling, _place(r)) for r in fitting])

    def gram(dtype: str, low: int, high: int) -> Callable[[Record], bool]:
        return lambda r: (r["name"] == "gram" and r["dtype"] == dtype and low <= r["tasks"] <= high)

    yield share("gram float32, T <= 8: of the copy ceiling", 0.90, gram("float32", 1, 8))
    yield share("gram float32, T <= 16", 0.85, gram("float32", 9, 16))
    yield share("gram float32, T <= 40", 0.75, gram("float32", 17, 40))
    yield share("gram bfloat16, T <= 16", 0.85, gram("bfloat16", 1, 16))
    for name in ("combine", "pack_row_", "perturb_"):
        yield share(f"{name}, P >= 2.5e7", 0.90, lambda r, name=name: r["name"] == name)


def _place(r: Record) -> str:
    return f"T={r['tasks']}, P={r['columns']:.0e}, {r['dtype']}"


def _aggregate(results: Record) -> Iterator[Line]:
    def at_main(kind: str) -> list[Record]:
        return [
            r
            for r in _records(results, "aggregate", kind)
            if r["name"] == "pcgrad"
            and (r["tasks"], r["columns"]) == (sizes.MAIN_TASKS, sizes.MAIN_COLUMNS)
        ]

    main = at_main("aggregate")
    floors = [(r["median_s"][race.OURS] / r["floor_s"], "PCGrad, eager") for r in main]
    yield _worst("aggregate T=8: of the byte floor", 1.15, floors, most=True)
    rivals = [
        (f, n) for r in [*main, *at_main("aggregate, compiled")] for n, f in nearest(r).items()
    ]
    plain = [(f, n) for f, n in rivals if "torch" in n]
    yield _worst("aggregate T=8: times faster than plain torch", 3, plain)
    yield _worst("aggregate T=8: than TorchJD", 10, [x for x in rivals if x[1] == "TorchJD"])
    yield _worst("aggregate T=8: than LibMTL", 50, [x for x in rivals if x[1].startswith("LibMTL")])


def _solvers(results: Record) -> Iterator[Line]:
    records = [r for r in _records(results, "solvers", "solver") if r["tasks"] == 8]
    times = [(1e6 * r["graph_s"], r["name"]) for r in records if "graph_s" in r]
    yield _worst("solvers T=8, a graph replay: us", 50, times, most=True)


def _steps(results: Record) -> Iterator[Line]:
    steps = _records(results, "steps", "step")
    resnets = [r for r in steps if r["name"].startswith("resnet18")]
    found = [(r["name"], shares(r)) for r in resnets]
    for kind in ("kernels", "beside the passes"):
        values = [(100 * s[kind], name) for name, s in found if kind in s]
        yield _worst(f"FS-MTL step, ResNet-18: {kind}, %", 3, values, most=True)
    yield _worst(
        "FS-MTL step: captured, times faster than eager",
        1,
        [
            (r["median_s"][race.OURS] / r["median_s"][race.OURS + GRAPH], r["name"])
            for r in steps
            if race.OURS + GRAPH in r["median_s"]
        ],
    )


def _accuracy(results: Record) -> Iterator[Line]:
    records = _records(results, "kernels", "accuracy")
    errors = [(r["off"] / r["rounded_off"], f"T={r['tasks']}") for r in records]
    yield _worst("gram float32: error, of the rounded exact one's", 2, errors, most=True)
    same = [(float(r["same_bits"]), f"T={r['tasks']}") for r in records]
    yield _worst("gram float32: the same bits at every call", 1, same)


def details(results: Record) -> Iterator[str]:
    """The numbers behind: gram and combine by T at the P of the promises, aggregates, solvers, steps."""
    kernels = results.get("kernels", {})
    ceiling = kernels.get("ceiling", {}).get("copy")
    if ceiling:
        yield f"{'kernel':18}{'dtype':>10}{'T':>4}{'P':>8}{'ms':>10}{'of copy':>9}   nearest rival"
    for kind in ("op", "row op"):
        for r in _records(results, "kernels", kind):
            if r["columns"] in (LARGE, sizes.QUICK_COLUMNS[0]) and (
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
            f"aggregate {r['name']:10} T={r['tasks']:<3} P={r['columns']:.0e}: {1e3 * ours:.3f} ms"
            f"{graph}; {ours / r['floor_s']:.2f} of the byte floor{_nearest(r)}"
        )
    for r in _records(results, "solvers", "solver"):
        if r["tasks"] in (8, 40):
            cells = [r["median_s"][race.OURS], r["wall_s"], r.get("graph_s"), r.get("graph_each_s")]
            texts = ["-" if c is None else f"{1e6 * c:.1f}" for c in cells]
            heads = ("device", "wall", "graph", "one of many")
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
            wrong = {k: r[k] for k in r if k == "error" or k.endswith("_error")}
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
            f"{name}: {m['date']}, {m['device']}, torch {m['torch']}, operators: {m['body']}"
            + (f"; {limits}" if limits else "")
        )
    return "\n".join(
        [
            *heads, "", *details(results), "", *troubles(results), "",
            f"{'promise':50}{'asked':11}{'measured':>9}", *map(str, lines(results)),
        ]
    )  # fmt: skip
