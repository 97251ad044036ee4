"""The tables of docs/methods_benchmark.md, between markers; the prose around them is left as it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from bench.methods.cells import (
    COMPARED_DIRECT,
    DECOMPOSED,
    DIRECT,
    PLAIN,
    PLANNED,
    SINGLE,
    WIDE,
    WIDE_DIRECT,
)
from bench.methods.collect import SHOWN
from bench.methods.results import Results, Row
from bench.methods.stats import Estimate, holm, over_seeds, stratified

Times = dict[str, dict[str, dict[str, float]]]
_BESIDE = ("scan", "time", "parts")
_SHARPNESS = {
    PLAIN: "",
    DECOMPOSED: " + SAM",
    DIRECT: " + SAM, direct",
    WIDE: " + wide SAM",
    WIDE_DIRECT: " + wide SAM, direct",
}


def write_report(source: Path, page: Path) -> None:
    """Puts the tables of a results file into a page, which is made if there is none."""
    results = Results.read(source)
    beside = {what: source.with_name(f"{source.stem}_{what}.json") for what in _BESIDE}
    other = {what: json.loads(p.read_text()) for what, p in beside.items() if p.exists()}
    times: Times = other.get("time", {})
    blocks = {
        "run": run_block(results),
        "overall": overall(results, times),
        "sharpness": sharpness_effect(results),
        "direct": direct_effect(results, DECOMPOSED, DIRECT),
        "wide": direct_effect(results, WIDE, WIDE_DIRECT),
        **{name: dataset_table(results, name, times) for name in results.datasets},
    }
    if "scan" in other:
        blocks["scan"] = scan_block(other["scan"])
    if "parts" in other:
        blocks["parts"] = parts_block(other["parts"])
    text = page.read_text() if page.exists() else "# Methods on real data\n"
    page.write_text(insert(text, blocks))


def insert(text: str, blocks: dict[str, str]) -> str:
    """Replaces what stands between a block's markers; a block without markers goes to the end."""
    for name, block in blocks.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        new = f"{begin}\n{block.strip()}\n{end}"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if pattern.search(text):
            text = pattern.sub(lambda _, new=new: new, text)
        else:
            text = f"{text.rstrip()}\n\n{new}\n"
    return text


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    lines = [header, [":---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def label(row: Row) -> str:
    """How a row is called."""
    return ("single-task" if row[0] == SINGLE else row[0]) + _SHARPNESS[row[1]]


def spread(estimate: Estimate, digits: int = 2) -> str:
    """Mean and half interval."""
    half = "" if np.isnan(estimate.half) else f" ± {estimate.half:.{digits}f}"
    return f"{estimate.mean:+.{digits}f}{half}"


def p_text(p: float) -> str:
    """A p-value."""
    return "–" if np.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def run_block(results: Results) -> str:
    """What ran, and what did not."""
    lines = [
        f"{results.count} cells finished, {len(results.failed)} failed, of {results.about['asked']}; "
        f"{results.seconds:.0f} CPU seconds of training. Seeds {', '.join(map(str, results.seeds))}; "
        f"torch {results.about['torch']}, Python {results.about['python']}.",
    ]
    for sharpness in (PLAIN, DECOMPOSED):
        missing = results.partial(sharpness)
        if missing:
            lines.append(
                f"Left out of the tables, some cells missing{_SHARPNESS[sharpness]}: "
                f"{', '.join(missing)}."
            )
    for cell in results.failed:
        where = f"{cell['dataset']}, {cell['method']}{_SHARPNESS[cell['sharpness']]}"
        lines.append(f"Failed: {where}, seed {cell['seed']}: `{cell['error'][:200]}`")
    header = [
        "data set",
        "train",
        "test",
        "batch",
        "epochs",
        "steps",
        "width",
        "rate",
        "rho",
        "wide",
    ]
    rows = []
    for name in results.datasets:
        s = results.about["settings"][name]
        steps = s["epochs"] * (s["train"] // s["batch"])
        width = str(s["width"] or "–")
        sizes = [s["train"], s["test"], s["batch"], s["epochs"], steps]
        rows.append(
            [name, *map(str, sizes), width, *(f"{s[field]:g}" for field in ("lr", "rho", "wide"))]
        )
    return "\n\n".join(lines) + "\n\n" + table(header, rows)


def scan_block(scanned: dict[str, dict[str, dict[str, float]]]) -> str:
    """The choice of rate and radius."""
    rows = [
        [name, field, ", ".join(f"{value}: {score:.4g}" for value, score in by_value.items())]
        for name, fields in scanned.items()
        for field, by_value in fields.items()
    ]
    return table(["data set", "what", "validation metric, mean over the tasks"], rows)


def parts_block(parts: dict[str, dict[str, float]]) -> str:
    """How large the flat part is."""
    methods = list(next(iter(parts.values())))
    rows = [
        ["a task's own" if m == "rows" else m, *(f"{by_name[m]:.3g}" for by_name in parts.values())]
        for m in methods
    ]
    return table(["method", *parts], rows)


def overall(results: Results, times: Times) -> str:
    """Every row over all data sets: rank, Delta_m, difference to the mean, and cost of a step."""
    ranks = {name: results.ranks(name) for name in results.datasets}
    rows = results.rows()
    against = {
        row: stratified(results.deltas(row) - results.deltas(("mean", row[1])))
        for row in rows
        if row[0] != "mean" and ("mean", row[1]) in rows
    }
    adjusted = dict(zip(against, holm([e.p for e in against.values()]), strict=True))
    lines = []
    for row in rows:
        rank = float(np.mean([ranks[name][row] for name in results.datasets]))
        difference = against.get(row)
        lines.append(
            (
                rank,
                [
                    label(row),
                    f"{rank:.1f}",
                    spread(stratified(results.deltas(row))),
                    spread(difference) if difference else "",
                    p_text(adjusted[row]) if difference else "",
                    _relative_time(times, results.datasets, row),
                ],
            )
        )
    header = ["method", "mean rank", "Δm, %", "against mean, same sharpness", "p (Holm)", "time"]
    return table(header, [line for _, line in sorted(lines, key=lambda item: item[0])])


def _relative_time(times: Times, names: list[str], row: Row) -> str:
    """A step's time over that of the plain mean, the geometric mean over the data sets."""
    try:
        ratios = [times[n][row[0]][row[1]] / times[n]["mean"][PLAIN] for n in names]
    except KeyError:
        return ""
    return f"{float(np.exp(np.mean(np.log(ratios)))):.2f}×"


def dataset_table(results: Results, name: str, times: Times) -> str:
    """One data set: metrics, rank, Delta_m, time of a step; for many tasks their own table folded away."""
    tasks, factor = SHOWN[name]["tasks"], 1e3 if SHOWN[name]["kind"] == "numbers" else 1.0
    many = len(tasks) > 3
    ranks = results.ranks(name)
    rows: list[Row] = [(SINGLE, PLAIN), (SINGLE, DECOMPOSED), *results.rows()]
    rows += [(m, DIRECT) for m in COMPARED_DIRECT if results.has(name, (m, DIRECT))]
    body, folded = [], []
    for row in rows:
        if not results.has(name, row):
            continue
        found = factor * results.metrics(name, row)  # [S, T]
        means = [f"{value:.2f}" for value in found.mean(0)]
        milliseconds = times.get(name, {}).get(row[0], {}).get(row[1])
        body.append(
            [
                label(row),
                *([] if many else means),
                _plus_minus(over_seeds(found.mean(1))),
                f"{ranks[row]:.1f}" if row in ranks else "",
                "0 by definition"
                if row == rows[0]
                else spread(over_seeds(results.delta(name, row))),
                f"{1e3 * milliseconds:.1f}" if milliseconds else "",
            ]
        )
        folded.append([label(row), *means])
    header = ["method", *([] if many else tasks), "mean of tasks", "rank", "Δm, %", "ms/step"]
    text = f"{SHOWN[name]['metric']}.\n\n" + table(header, body)
    if many:
        text += (
            "\n\n<details><summary>Every task</summary>\n\n"
            + table(["method", *tasks], folded)
            + "\n\n</details>"
        )
    return text


def _plus_minus(estimate: Estimate) -> str:
    return spread(estimate).removeprefix("+")


def sharpness_effect(results: Results) -> str:
    """Delta_m with SAM minus Delta_m without, method by method, in pairs of seeds."""
    both = [m for m in results.methods(PLAIN) if m in results.methods(DECOMPOSED)]
    rows: list[str] = [SINGLE, *both] if _single_flat(results) else both
    return _differences(results, [((m, DECOMPOSED), (m, PLAIN)) for m in rows], both, "the methods")


def _single_flat(results: Results) -> bool:
    return all(results.has(name, (SINGLE, DECOMPOSED)) for name in results.datasets)


def direct_effect(results: Results, decomposed: str, direct: str) -> str:
    """Delta_m decomposed minus Delta_m direct at the same radius, in pairs of seeds."""
    both = set(results.methods(decomposed)) & set(results.methods(direct))
    there = [method for method in COMPARED_DIRECT if method in both]
    pairs = [((m, decomposed), (m, direct)) for m in there]
    # the two that collapse came to the comparison after their first results: they stand for themselves
    planned = [method for method in PLANNED if method in there]
    return _differences(results, pairs, planned, ", ".join(planned))


def _differences(
    results: Results, pairs: list[tuple[Row, Row]], pooled: list[str], together: str
) -> str:
    """First row of a pair minus the second: on each data set, over all, and the methods together."""
    if not pairs:
        return "No complete pairs."
    values = [results.deltas(a) - results.deltas(b) for a, b in pairs]  # each [D, S]
    estimates = [stratified(v) for v in values]
    adjusted = holm([e.p for e in estimates])
    body = [
        [
            "single-task" if pair[0][0] == SINGLE else pair[0][0],
            *(spread(over_seeds(v)) for v in value),
            spread(estimate),
            p_text(p),
        ]
        for pair, value, estimate, p in zip(pairs, values, estimates, adjusted, strict=True)
    ]
    middle = [v for pair, v in zip(pairs, values, strict=True) if pair[0][0] in pooled]
    if len(middle) > 1:
        # a method that collapses must not speak for the others
        both = np.median(middle, axis=0)  # [D, S]
        estimate = stratified(both)
        body.append(
            [
                f"**median** of {together}",
                *(spread(over_seeds(v)) for v in both),
                spread(estimate),
                f"{p_text(estimate.p)} (alone)",
            ]
        )
    return table(["method", *results.datasets, "all data sets", "p (Holm)"], body)
