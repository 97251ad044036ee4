"""Writes docs/benchmarks.md from pytest-benchmark's JSON.

python -m bench.report [bench/results/cpu.json [docs/benchmarks.md]]     ("-": to the terminal)

Nothing is rounded in flatmtl's favour: its times are rounded up, factors, shares and GB/s down; what
is required is compared unrounded.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.quality import FAILED, MEANING
from bench.race import OURS
from bench.solvers import METHODS, OP, SMALL

ROOT = Path(__file__).resolve().parent.parent
Record = dict[str, Any]  # one benchmark's extra_info

TITLES = {
    "row_norms": "`row_norms`: norms of the rows of J",
    "gram": "`gram`: G = J Jᵀ",
    "gram_difference": "`gram_difference`: Gram matrix of S - J",
    "combine": "`combine`: d = Σ wᵢ gᵢ, into a preallocated d",
    "combine_flat": "`combine_flat`: d = Σ aᵢ gᵢ + Σ bᵢ (sᵢ - gᵢ), into a preallocated d",
    "project": "`project`: T combinations of the rows, preallocated",
    "gram_pair": "`gram_pair`: Gram matrices of J and of S - J",
    "graddrop_": "`graddrop_`: GradDrop, into a preallocated d",
    "mean": "Mean",
    "pcgrad": "PCGrad",
    "mgda": "MGDA (TorchJD stops after at most 100 Frank-Wolfe steps, unconverged; ours is exact)",
    "upgrad": "UPGrad",
    "cagrad": "CAGrad",
    "nash_mtl": "Nash-MTL",
    "imtl_g": "IMTL-G",
    "config": "ConFIG",
}


def floor(value: float, digits: int) -> str:
    """``value`` with so many decimals, rounded down."""
    scale = 10**digits
    return f"{math.floor(value * scale) / scale:.{digits}f}"


def milliseconds(seconds: float) -> str:
    """Three significant digits, rounded up."""
    ms = seconds * 1e3
    digits = max(0, 2 - math.floor(math.log10(ms)))
    return f"{math.ceil(ms * 10**digits) / 10**digits:.{digits}f}"


def share(record: Record, yardstick: str) -> str:
    return floor(100 * record["share"][yardstick], 0) + " %"


def factor(record: Record, other: str) -> str:
    value = record["faster"].get(other)
    return "–" if value is None else f"{floor(value, 2)}×"


def count(columns: int) -> str:
    return f"1e{round(math.log10(columns))}"


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """A Markdown table; columns of numbers are right-aligned, the named ones left."""
    left = ("", "op", "method", "against", "against plain torch")
    marks = (":---" if name in left else "---:" for name in head)
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(marks) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def rivals(records: list[Record]) -> list[str]:
    """The names of all others in a group, in their order."""
    return list(dict.fromkeys(name for r in records for name in r["faster"]))


def header(data: Record) -> list[str]:
    machine = data["machine_info"]
    cpu = machine["cpu"]
    cache = int(cpu.get("l3_cache_size") or 0) >> 20
    lines = [
        "# Benchmarks",
        "",
        "Written by `python -m bench.report`; do not edit.",
        "",
        f"- CPU: {cpu.get('brand_raw', 'unknown')}, {cpu.get('count')} cores, L3 {cache} MiB; "
        f"{machine['threads']} threads",
        f"- torch {machine['torch']}, TorchJD {machine['torchjd'] or 'not installed'}, "
        f"flatmtl {machine['flatmtl']}, Python {machine['python_version']}; "
        f"operators: {'C++' if machine['body'] == 'cpu' else machine['body']}",
        f"- {data['datetime'][:10]}, by `make bench`",
        "",
    ]
    if machine["quick"]:
        lines += ["**A quick run on a small grid: these numbers show that it runs, no more.**", ""]
    return [
        *lines,
        "float32. In every round flatmtl, each rival and the yardsticks run once, one after the other, "
        "on inputs that cycle through at least 256 MB where P ≥ 1e6 (cold caches; P = 1e5 is warm). "
        "Times are medians over the rounds. *Of read* and *of copy* are the bytes that flatmtl has to "
        "move at least per second against those of `J.sum()` and of a copy in the same round; factors "
        "are a rival's time over flatmtl's in the same round; both medians over the rounds. Shares "
        "and factors are rounded down, flatmtl's times up. Above 1× flatmtl is faster.",
        "",
    ]


def ops_section(records: list[Record]) -> list[str]:
    lines = ["## Operators over J", ""]
    for name in dict.fromkeys(r["name"] for r in records):
        group = [r for r in records if r["name"] == name]
        others = rivals(group)
        lines += [f"### {TITLES[name]}", ""]
        lines += table(
            ["P", "T", "ms", "GB/s", "of read", "of copy", *(f"vs `{o}`" for o in others)],
            [
                [
                    count(r["columns"]), str(r["tasks"]), milliseconds(r["median_s"][OURS]),
                    floor(r["gb_per_s"], 1), share(r, "read"), share(r, "copy"),
                    *(factor(r, o) for o in others),
                ]
                for r in sorted(group, key=lambda r: (r["columns"], r["tasks"]))
            ],
        )  # fmt: skip
    return lines


def row_section(records: list[Record]) -> list[str]:
    lines = [
        "## Operators over one row",
        "",
        "One row of P elements and the 40 parameter tensors it stands for.",
        "",
    ]
    return lines + table(
        ["op", "P", "ms", "GB/s", "of read", "of copy", "against plain torch"],
        [
            [
                f"`{r['name']}`", count(r["columns"]), milliseconds(r["median_s"][OURS]),
                floor(r["gb_per_s"], 1), share(r, "read"), share(r, "copy"),
                ", ".join(f"{factor(r, o)} `{o}`" for o in r["faster"]),
            ]
            for r in sorted(records, key=lambda r: (r["name"], r["columns"]))
        ],
    )  # fmt: skip


def aggregate_section(records: list[Record]) -> list[str]:
    lines = [
        "## The whole aggregate, J → d",
        "",
        "`flatmtl.aggregate(J, method)`, which allocates d; `out=`: the same into a preallocated d. "
        "LibMTL's maths: PCGrad on whole gradients, re-implemented (bench/peers.py); left out where a "
        "call takes seconds. The share counts the floor: J read twice (once for Mean), d written.",
        "",
    ]
    for name in dict.fromkeys(r["name"] for r in records):
        group = [r for r in records if r["name"] == name]
        others = [o for o in rivals(group) if o != "flatmtl, out="]
        lines += [f"### {TITLES[name]}", ""]
        lines += table(
            ["P", "T", "ms", "ms, `out=`", "of read", *(f"vs {o}" for o in others)],
            [
                [
                    count(r["columns"]), str(r["tasks"]), milliseconds(r["median_s"][OURS]),
                    milliseconds(r["median_s"]["flatmtl, out="]), share(r, "read"),
                    *(factor(r, o) for o in others),
                ]
                for r in sorted(group, key=lambda r: (r["columns"], r["tasks"]))
            ],
        )  # fmt: skip
    return lines


def pipeline_section(records: list[Record]) -> list[str]:
    lines = [
        "### PCGrad, from the parameters' gradients to `.grad`",
        "",
        "40 parameter tensors. flatmtl packs T lists of gradients into J, aggregates into d, and `.grad` "
        "are views of d; TorchJD starts from the `.jac` fields that its backward pass has filled. The "
        "share counts gradients read, J written, J read twice, d written.",
        "",
    ]
    others = rivals(records)
    return lines + table(
        ["P", "T", "ms", "of read", *(f"vs {o}" for o in others)],
        [
            [
                count(r["columns"]), str(r["tasks"]), milliseconds(r["median_s"][OURS]),
                share(r, "read"), *(factor(r, o) for o in others),
            ]
            for r in sorted(records, key=lambda r: (r["columns"], r["tasks"]))
        ],
    )  # fmt: skip


def microseconds(seconds: float | None) -> str:
    """Whole ones, or three digits; rounded up."""
    if seconds is None:
        return "–"
    micro = seconds * 1e6
    digits = max(0, 2 - math.floor(math.log10(micro)))
    rounded = math.ceil(micro * 10**digits) / 10**digits
    return f"{rounded:.{min(digits, 1)}f}" if micro < 100 else f"{math.ceil(micro)}"


def two_digits(value: float | None) -> str:
    """Rounded up; None is infinity."""
    if value is None:
        return "∞"
    if value <= 0:
        return "0"
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / step * (1 - 1e-12)) * step:.1e}"


def residual(judged: Record | None) -> str:
    """Of the median and of the worst problem."""
    if judged is None:
        return "–"
    return f"{two_digits(judged['median'])}, {two_digits(judged['worst'])}"


def failures(judged: Record | None) -> str:
    return "–" if judged is None else f"{judged['failed']} of {judged['n']}"


def times_of(record: Record) -> dict[str, float]:
    """Seconds of everyone's call, those measured outside the rounds included."""
    return {**record["median_s"], **record["slow_s"]}


def solver_section(records: list[Record]) -> list[str]:
    lines = [
        "## Solvers, G → w",
        "",
        "Microseconds on one core, T × T, one Gram matrix a call, ten calls in a row (the first after other "
        "work takes several times as long). *flatmtl*: `weighting(gram)` from Python. *operator*: the C++ "
        "operator called alone. *solver*: one problem's share of a call with 64 of them, which is the solver "
        "with next to no call around it. The rivals get float32, as in their own pipelines; those "
        "above 1 ms a call are timed outside the rounds.",
        "",
        "A time means little without what came out. *Residual*: the median and the worst over random "
        "problems (`bench.cases.gram_with_conflict`: norms in [1/3, 3], a third to 60 % of the pairs in "
        "conflict) of one measure a method, the same for everyone, computed in float64 in numpy on the raw "
        f"Gram matrix (bench/quality.py); a *failure* is a residual above {FAILED:g}. Rivals start anew at "
        "every problem; the slowest get fewer problems. LibMTL's maths are the published solvers "
        "re-implemented (bench/peers.py), without the framework around them. UPGrad and DualProj of TorchJD "
        "and LibMTL add a ridge of 1e-4 to G / tr G by default, and that ridge is what their residual shows.",
        "",
    ]
    names = [r for r in rivals(records) if r not in (OP, "plain torch")]
    slow = (name for r in records for name in r["slow_s"] if name != "plain torch")
    names = list(dict.fromkeys([*names, *slow]))
    head = ["method", "T", "flatmtl µs", "operator µs", "solver µs", "residual", "failures"]
    for rival in names:
        head += [f"{rival}: µs", "residual", "failures"]
    rows = []
    for r in sorted(records, key=lambda r: (METHODS.index(r["name"]), r["tasks"])):
        times, quality = times_of(r), r["quality"]
        row = [
            r["name"], str(r["tasks"]), microseconds(times[OURS]), microseconds(times.get(OP)),
            microseconds(r["alone_s"]), residual(quality.get(OURS)), failures(quality.get(OURS)),
        ]  # fmt: skip
        for rival in names:
            judged = quality.get(rival)
            row += [microseconds(times.get(rival)), residual(judged), failures(judged)]
        rows.append(row)
    lines += table(head, rows)
    lines += ["The residuals, all relative:", ""]
    return [*lines, *(f"- {name}: {meaning}" for name, meaning in MEANING.items()), ""]


def small_gradients_section(records: list[Record]) -> list[str]:
    lines = [
        f"### Small gradients: norms times {SMALL:g}, T = {records[0]['tasks']}",
        "",
        "The same problems and measures with shorter gradients, as late in training. Nothing else "
        "changes: each method's answer scales with the gradients in a known way.",
        "",
    ]
    names = list(dict.fromkeys(n for r in records for n in r["quality"]))
    head = ["method", *(part for name in names for part in (f"{name}: residual", "failures"))]
    rows = []
    for r in records:
        judged = [r["quality"].get(name) for name in names]
        rows.append([r["name"], *(part for j in judged for part in (residual(j), failures(j)))])
    return lines + table(head, rows)


def small_section(records: list[Record]) -> list[str]:
    lines = [
        "### Other operators on T × T",
        "",
        "`draw_order_` is part of pcgrad's and gradvac's calls. A rival's time over flatmtl's.",
        "",
    ]
    return lines + table(
        ["", "T", "µs", "against"],
        [
            [
                r["name"], str(r["tasks"]), str(math.ceil(r["median_s"][OURS] * 1e6)),
                ", ".join(f"{factor(r, o)} {o}" for o in r["faster"]),
            ]
            for r in sorted(records, key=lambda r: (r["name"], r["tasks"]))
        ],
    )  # fmt: skip


def step_section(records: list[Record]) -> list[str]:
    lines = [
        "## Whole training steps",
        "",
        "`MultiTaskOptimizer.step` around SGD. *Passes alone*: the forward and backward passes that the "
        "method needs, and the update, with nothing done with the gradients; flatmtl's own share of the "
        "step is what comes on top. mlp: 8 tasks, 1.05 M shared parameters, batch 64; resnet: 3 tasks, "
        "0.18 M, batch 32, BatchNorm.",
        "",
    ]
    rows = []
    for r in records:
        alone = r["faster"]["passes alone"]  # passes / step, median over the rounds
        rows.append(
            [
                r["model"], r["name"], milliseconds(r["median_s"][OURS]),
                milliseconds(r["median_s"]["passes alone"]),
                f"{math.ceil(100 * (1 - alone))} %",
                f"{math.ceil(100 / r['faster']['summed loss']) / 100:.2f}×",
                factor(r, "TorchJD"),
            ]
        )  # fmt: skip
    head = ["", "method", "ms a step", "passes alone", "flatmtl's share",
            "× the time of a summed-loss step", "vs TorchJD"]  # fmt: skip
    return lines + table(head, rows)


RIVALS = {"foreach": "plain torch (`_foreach`)", "loops": "research code's loops"}


def own_time_section(records: list[Record]) -> list[str]:
    lines = [
        "## FS-MTL: a step's own time",
        "",
        "Own time: a step without what runs in the closure, in `torch.autograd` and in the base optimizer "
        "(SGD), all measured in the same step (bench/own_time.py). FS-MTL with PCGrad (sum), 1 + T forward "
        "and 2T backward passes for everyone. *Plain torch*: preallocated J and S, `_foreach` operators, "
        "`J @ J.T`, PCGrad on T × T on the host (bench/fs_mtl_torch.py). *Loops*: research code's way, from "
        "a description: lists of clones, a norm and a dot product a tensor, `.item()`, `.data` swapped "
        "(bench/fs_mtl_loops.py). That all three make the same step is a test "
        "(tests/test_bench_fs_mtl.py). " + networks(records),
        "",
    ]
    rows = []
    for r in records:
        for name, title in {OURS: "flatmtl", **RIVALS}.items():
            entry = r[name]
            ours = name == OURS
            rows.append(
                [
                    r["model"] if ours else "", title, milliseconds(entry["own_s"]),
                    milliseconds(entry["total_s"]),
                    f"{math.ceil(1000 * entry['share']) / 10:.1f} %",
                    milliseconds(entry["forward_s"]), milliseconds(entry["backward_s"]),
                    milliseconds(entry["update_s"]),
                    "–" if ours else f"{floor(entry['factor'], 2)}×",
                ]
            )  # fmt: skip
    head = ["", "method", "own ms", "step ms", "own share of the step", "forward ms", "backward ms",
            "update ms", "own time over flatmtl's"]  # fmt: skip
    return lines + table(head, rows)


def networks(records: list[Record]) -> str:
    return (
        "; ".join(
            f"{r['model']}: {r['tasks']} tasks, {r['columns'] / 1e6:.2f} M shared parameters, "
            f"batch {r['batch']}"
            for r in records
        )
        + "."
    )


def memory_section(records: list[Record]) -> list[str]:
    lines = [
        "## Memory of a step",
        "",
        f"{records[0]['model']}, T = {records[0]['tasks']}: every allocation of the first three steps "
        "(bench/memory.py), in units of the model's parameters. *Own*: the most that the step's own buffers "
        "and temporaries take at one time; `.grad` are among them. *Kept*: what of these is left after a "
        "step. *Gradients of the passes*: the most that results of backward passes take outside of those, "
        "on top; *first step*: the same there.",
        "",
    ]
    rows = []
    for r in records:
        for name, title in {OURS: "flatmtl", **RIVALS}.items():
            steps = r["steps"][name]
            first, last = steps[0], steps[-1]
            unit = r["model_bytes"]
            rows.append(
                [
                    "FS-MTL" if r["sharpness"] else "PCGrad", title,
                    *(
                        ceiling(value / unit, 2)
                        for value in (
                            max(s["own"] for s in steps), last["kept"], last["gradients"],
                            first["gradients"],
                        )
                    ),
                ]
            )  # fmt: skip
    head = ["", "method", "own, at most", "kept", "gradients of the passes", "first step"]
    return lines + table(head, rows)


def ceiling(value: float, digits: int) -> str:
    """``value`` with so many decimals, rounded up."""
    scale = 10**digits
    return f"{math.ceil(value * scale) / scale:.{digits}f}"


OWN_SHARE, OWN_FACTORS = 0.03, {"foreach": 3.0, "loops": 10.0}  # on resnet18


def required_of_steps(records: list[Record]) -> list[list[str]]:
    """Own time and memory."""
    rows = []
    record = next(
        (r for r in records if r["kind"] == "own time" and r["model"] == "resnet18"), None
    )
    if record is not None:
        value = record[OURS]["share"]
        rows.append(
            [
                "FS-MTL, ResNet-18, T = 3: flatmtl's own share of the step", f"≤ {OWN_SHARE:.0%}",
                ceiling(100 * value, 2) + " %", "yes" if value <= OWN_SHARE else "**no**",
            ]
        )  # fmt: skip
        for name, least in OWN_FACTORS.items():
            factor_ = record[name]["factor"]
            rows.append(
                [
                    f"the same step: own time smaller than that of {RIVALS[name]}",
                    f"≥ {least:.0f}×", floor(factor_, 2) + "×", verdict(factor_, least),
                ]
            )  # fmt: skip
    for r in (r for r in records if r["kind"] == "memory"):
        limit = 2 * r["tasks"] + 2 if r["sharpness"] else r["tasks"] + 1
        most = max(s["own"] for s in r["steps"][OURS]) / r["model_bytes"]
        name = "FS-MTL" if r["sharpness"] else "PCGrad"
        rows.append(
            [
                f"{name}, {r['model']}, T = {r['tasks']}: own memory, in models",
                f"≤ {limit}", ceiling(most, 2), "yes" if most <= limit else "**no**",
            ]
        )  # fmt: skip
    return rows


def required_section(records: list[Record]) -> list[str]:
    def find(kind: str, name: str, tasks: int, columns: int) -> Record | None:
        wanted = {"kind": kind, "name": name, "tasks": tasks, "columns": columns}
        return next((r for r in records if wanted.items() <= r.items()), None)

    rows = []

    def bandwidth(name: str, tasks: int, least: float) -> None:
        record = find("op", name, tasks, 10_000_000)
        value = record["share"]["read"] if record else None
        shown = "not measured" if value is None else floor(100 * value, 1) + " %"
        rows.append(
            [
                f"`{name}`, T = {tasks}, P = 1e7: share of the read bandwidth",
                f"≥ {100 * least:.0f} %", shown, verdict(value, least),
            ]
        )  # fmt: skip

    def times(other: str, columns: int, least: float) -> None:
        record = find("aggregate", "pcgrad", 8, columns)
        value = record["faster"].get(other) if record else None
        shown = "not measured" if value is None else floor(value, 2) + "×"
        if record and value is not None:
            median = record["median_s"]
            into = floor(median[other] / median["flatmtl, out="], 2)
            shown += f" (with `out=` {into}×)"
        rows.append(
            [
                f"`aggregate(J, PCGrad())`, T = 8, P = {count(columns)}: faster than {other}",
                f"≥ {least:.0f}×", shown, verdict(value, least),
            ]
        )  # fmt: skip

    for tasks in (2, 4, 8, 16):
        bandwidth("gram", tasks, 0.8)
    bandwidth("combine", 8, 0.7)
    times("TorchJD", 10_000_000, 4)
    times("LibMTL's maths", 10_000_000, 4)
    times("TorchJD", 100_000, 3)
    return [
        "## Required against measured",
        "",
        *table(
            ["", "required", "measured", "reached"],
            [*rows, *required_of_solvers(records), *required_of_steps(records)],
        ),
    ]


# seconds of the solver on one core at T = 8 and T = 40
QUICK_SOLVERS = ("pcgrad", "imtl_g", "config", "aligned_mtl")
SOLVER_LIMITS: dict[str, dict[int, float]] = {
    **{name: {8: 20e-6, 40: 2e-3} for name in QUICK_SOLVERS},
    **{n: {8: 100e-6, 40: 2e-3} for n in ("mgda", "dualproj", "nash_mtl", "fairgrad", "cagrad")},
    "upgrad": {8: 100e-6, 40: 3e-3},
}
DISPATCH = 15e-6  # of ``weighting(gram)`` over the solver, at T = 2
CERTIFICATE, RAW = 1e-9, 1e-6  # residuals: the solver's own, and on the raw Gram matrix


def required_of_solvers(records: list[Record]) -> list[list[str]]:
    """One row a requirement: the worst of the methods it is for."""
    solvers = {(r["name"], r["tasks"]): r for r in records if r["kind"] == "solver"}
    rows: list[list[str]] = []

    def at_most(what: str, limit: float, shown: str, values: dict[str, float | None]) -> None:
        known = {name: value for name, value in values.items() if value is not None}
        worst = max(known, key=lambda name: known[name], default=None)
        if worst is None:
            rows.append([what, shown, "not measured", "–"])
            return
        value = known[worst]
        unit = microseconds(value) + " µs" if limit < 1 and "µs" in shown else f"{value:.2g}"
        text = f"{unit} ({worst})" if len(known) > 1 else unit
        rows.append([what, shown, text, "yes" if value <= limit else "**no**"])

    for tasks in (8, 40):
        for limit in sorted({limits[tasks] for limits in SOLVER_LIMITS.values()}):
            names = [name for name, limits in SOLVER_LIMITS.items() if limits[tasks] == limit]
            at_most(
                f"solver on one core, T = {tasks}: {', '.join(names)}",
                limit,
                f"≤ {limit * 1e6:.0f} µs",
                {n: solvers.get((n, tasks), {}).get("alone_s") for n in names},
            )
    over: dict[str, float | None] = {
        name: r["median_s"][OURS] - r["alone_s"]
        for (name, tasks), r in solvers.items()
        if tasks == 2 and r["alone_s"] is not None
    }
    at_most("`weighting(gram)`, T = 2, over the solver", DISPATCH, "≤ 15 µs", over)
    judged = {key: r["quality"][OURS] for key, r in solvers.items() if OURS in r["quality"]}
    certificates: dict[str, float | None] = {}
    raw: dict[str, float | None] = {}
    failed: dict[str, int] = {}
    problems: dict[str, int] = {}
    for (name, _), found in judged.items():
        worst = math.inf if found["worst"] is None else found["worst"]
        raw[name] = max(raw.get(name) or 0.0, worst)
        if "certificate" in found:
            certificates[name] = max(certificates.get(name) or 0.0, found["certificate"])
        failed[name] = failed.get(name, 0) + found["failed"]
        problems[name] = problems.get(name, 0) + found["n"]
    at_most(
        "the solver's own residual, random problems, every T", CERTIFICATE, "≤ 1e-9", certificates
    )
    at_most("the residual on the raw Gram matrix, the same problems", RAW, "≤ 1e-6", raw)
    if judged:
        count, fewest = sum(failed.values()), min(problems.values())
        ok = "**no**" if count else "yes" if fewest >= 1000 else "–"
        rows.append(
            [
                f"failures (residual above {FAILED:g}), a method", "0 of 1000",
                f"{count} of {fewest} or more", ok,
            ]
        )  # fmt: skip
    return rows


def verdict(value: float | None, least: float) -> str:
    if value is None:
        return "–"
    return "yes" if value >= least else "**no**"


def report(data: Record) -> str:
    """The page."""
    records = [b["extra_info"] for b in data["benchmarks"] if "kind" in b["extra_info"]]
    sections = {
        "op": ops_section, "row op": row_section, "aggregate": aggregate_section,
        "pipeline": pipeline_section,
        "solver": solver_section, "small gradients": small_gradients_section,
        "small op": small_section, "step": step_section,
        "own time": own_time_section, "memory": memory_section,
    }  # fmt: skip
    lines = header(data)
    for kind, section in sections.items():
        group = [r for r in records if r["kind"] == kind]
        if group:
            lines += section(group)
    return "\n".join([*lines, *required_section(records)])


def main(arguments: list[str]) -> None:
    source = Path(arguments[0]) if arguments else ROOT / "bench/results/cpu.json"
    target = arguments[1] if len(arguments) > 1 else ROOT / "docs/benchmarks.md"
    page = report(json.loads(source.read_text()))
    if target == "-":
        print(page)
    else:
        Path(target).parent.mkdir(exist_ok=True)
        Path(target).write_text(page)


if __name__ == "__main__":
    main(sys.argv[1:])
