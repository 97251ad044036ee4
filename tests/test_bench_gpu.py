"""bench/gpu.sh's Python parts, small and on the CPU: everything but the CUDA calls."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import race
from bench import sanitize as sanitizing
from bench.contests import MATRIX_OPS, ROW_OPS
from bench.gpu import __main__ as command
from bench.gpu import aggregate, machine, sizes, steps, store, table
from bench.gpu.aggregate import AT_BEST, CAPTURED
from bench.gpu.bench import Bench
from bench.gpu.steps import GRAPH, MODELS, PASSES
from bench.solvers import METHODS

ROOT = Path(__file__).parents[1]
LARGE = sizes.MAIN_COLUMNS
DTYPES = ("float32", "bfloat16")


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The folder of results; ``run("kernels")`` runs a part and gives what it wrote."""
    monkeypatch.setattr(store, "RESULTS", tmp_path / "results")

    def run(part: str, *options: str) -> dict:
        command.main([part, "--device", "cpu", "--quick", *options])
        return json.loads((tmp_path / "results" / "cpu-quick.json").read_text())

    return run


def failures(part: dict) -> list[dict]:
    return [r for r in part["records"] if "error" in r or any(k.endswith("_error") for k in r)]


def test_ceiling(results):
    found = results("ceiling")["ceiling"]["ceiling"]
    assert found.keys() == {"copy", "read", "write"} and all(v > 0 for v in found.values())


def test_kernels(results):
    part = results("kernels")["kernels"]
    assert not failures(part) and not part["missing"]
    for t in sizes.QUICK_TASKS:
        for dtype in ("float32", "bfloat16"):
            names = {
                r["name"]
                for r in part["records"]
                if r["kind"] == "op" and r["tasks"] == t and r["dtype"] == dtype
            }
            assert names == set(MATRIX_OPS)
    rows = [r["name"] for r in part["records"] if r["kind"] == "row op"]
    assert sorted(rows) == sorted([*ROW_OPS] * 2)
    for r in part["records"]:
        if r["kind"] == "accuracy":
            assert r["same_bits"] and r["off"] < 1e-6
        else:
            assert r["median_s"][race.OURS] > 0 and r["bytes"] > 0


def test_solvers(results):
    part = results("solvers")["solvers"]
    assert not failures(part) and not part["missing"]
    at_eight = [r for r in part["records"] if r["tasks"] == 8]
    assert [r["name"] for r in at_eight] == list(METHODS)
    assert all(r["wall_s"] > 0 for r in at_eight)


def test_aggregate(results):
    part = results("aggregate", "--seconds", "300")["aggregate"]
    assert not failures(part) and not part["missing"]
    pcgrad = part["records"][0]
    assert {"plain torch", "torch, solved on the host", "LibMTL's maths"} <= pcgrad["faster"].keys()
    # each of two passes over J, and d
    assert pcgrad["bytes"] == (2 * pcgrad["tasks"] + 1) * pcgrad["columns"] * 4


def test_plain_torch_at_its_best(tmp_path, monkeypatch):
    """Compiled and as graphs; a form that cannot be captured is named, the others are measured."""

    def captured(call):
        if call.__name__ == "<lambda>":
            raise RuntimeError("made up")
        return call

    monkeypatch.setattr(aggregate, "compiled", lambda function: function)
    monkeypatch.setattr(aggregate, "captured", captured)
    part = store.Part("aggregate", "cpu", tmp_path / "cpu.json")
    end = time.monotonic() + 1000
    aggregate._at_its_best(Bench("cpu", True, part, race.wall_clock, end, turn=1e-3))
    (record,) = part.records
    assert "error" not in record
    assert record["failed_rivals"] == {CAPTURED[0]: "RuntimeError: made up"}
    assert record["faster"].keys() == {*AT_BEST, CAPTURED[1]}


def test_steps_and_that_parts_leave_each_other_alone(results):
    results("ceiling")
    both = results("steps")
    assert both.keys() == {"ceiling", "steps"}
    (step,) = both["steps"]["records"]
    assert not failures(both["steps"])
    assert step["median_s"].keys() == {race.OURS, "foreach", "loops", PASSES}


@pytest.mark.parametrize("part", ["kernels", "solvers", "aggregate", "steps"])
def test_a_part_out_of_time_says_what_it_left_out(part, results):
    """What there was no time for is named, not passed over in silence."""
    found = results(part, "--seconds", "1e-9")[part]
    assert found["missing"]
    assert not [r for r in found["records"] if r["kind"] != "accuracy"]


def test_table_of_nothing(results):
    with pytest.raises(SystemExit, match="must hold the results of a part"):
        results("table")


def test_cuda_is_refused_without_a_device(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        command.main(["kernels"])
    assert "needs a CUDA device" in capsys.readouterr().err


# ---- the promises --------------------------------------------------------------------------------


def made_up(kernels: float = 0.95, wanted: float = 1.0) -> dict:
    """Results as of a GPU with a copy ceiling of 1e12 bytes/s, on which every promise is just kept."""
    about = {"missing": []}
    about["machine"] = {
        "date": "-", "device": "made up", "torch": "-", "commit": "0a1b", "body": "cuda"
    }  # fmt: skip

    def op(kind, name, tasks, columns, dtype):
        times = {race.OURS: 1e-3}
        return {
            "kind": kind, "name": name, "tasks": tasks, "columns": columns, "dtype": dtype,
            "median_s": times, "faster": {"torch": 3.0}, "gb_per_s": 1000 * kernels,
        }  # fmt: skip

    ops = [
        op("op", name, t, p, dtype)
        for name in ("gram", "combine")
        for t in sizes.TASKS
        for p in sizes.COLUMNS
        for dtype in DTYPES
    ]
    # where no ceiling is promised a share may be small
    for r in ops:
        if r["columns"] < LARGE or r["tasks"] == 64 and r["name"] == "gram":
            r["gb_per_s"] = 1.0
    rows = [
        op("row op", name, 8, p, dtype)
        for name in ("pack_row_", "perturb_")
        for p in sizes.COLUMNS
        for dtype in DTYPES
    ]
    accuracy = [
        {
            "kind": "accuracy", "name": "gram", "tasks": t, "off": 2e-8 * wanted, "rounded_off": 1e-8,
            "same_bits": True,
        }
        for t in sizes.TASKS
    ]  # fmt: skip
    main = {
        **op("aggregate", "pcgrad", 8, LARGE, "float32"),
        "floor_s": 1e-3 / 1.15 / wanted,
        "faster": {
            "flatmtl, out=": 0.9, "plain torch": 3.0 / wanted, "torch, solved on the host": 5.0,
            "TorchJD": 10.0 / wanted, "LibMTL's maths": 50.0 / wanted,
        },
    }  # fmt: skip
    compiled = {
        **op("aggregate, at its best", "pcgrad", 8, LARGE, "float32"),
        "faster": dict.fromkeys([*AT_BEST, *CAPTURED], 4.0),
    }
    solvers = [
        {
            "kind": "solver", "name": name, "tasks": 8, "median_s": {race.OURS: 6e-5},
            "wall_s": 7e-5, "graph_s": 5e-5 * wanted, "graph_each_s": 4e-5,
        }
        for name in METHODS
    ]  # fmt: skip
    models = [
        {
            "kind": "step", "name": model, "kernels_s": 0.03 * wanted,
            "median_s": {
                race.OURS: 1.0 / wanted, race.OURS + GRAPH: 1.0, PASSES: 1.0,
                PASSES + GRAPH: 1 - 0.03 * wanted,
            },
        }
        for model in MODELS
    ]  # fmt: skip
    parts = {
        "kernels": {**about, "ceiling": {"copy": 1e12}, "records": [*ops, *rows, *accuracy]},
        "aggregate": {**about, "records": [main, compiled]},
        "solvers": {**about, "records": solvers},
        "steps": {**about, "records": models},
    }
    return json.loads(json.dumps(parts))  # no part shares anything with another


def verdicts(found: dict) -> dict[str, str]:
    return {line.what: line.verdict for line in table.lines(found)}


def test_promises_that_are_kept():
    assert set(verdicts(made_up(wanted=0.99)).values()) == {"PASS"}


def test_promises_that_are_not():
    found = verdicts(made_up(kernels=0.7, wanted=1.01))
    bits = [what for what, verdict in found.items() if verdict == "PASS"]
    assert bits == ["gram float32: the same bits at every call"]
    other = made_up()
    other["kernels"]["records"][-1]["same_bits"] = False
    assert verdicts(other)["gram float32: the same bits at every call"] == "short"


def test_the_worst_counts():
    """One size that falls short is enough, and is named."""
    found = made_up()
    (bad,) = (
        r
        for r in found["kernels"]["records"]
        if (r["name"], r.get("dtype"), r["tasks"]) == ("gram", "float32", 4)
        and r["columns"] == LARGE
    )
    bad["gb_per_s"] = 500.0
    (line,) = (k for k in table.lines(found) if k.what.startswith("gram float32, T <= 8"))
    assert (line.verdict, line.got) == ("short", 0.5) and "T=4, P=2.5e+07, float32" in line.where


def test_what_was_not_measured_is_neither():
    assert set(verdicts({}).values()) == {"not measured"}


GRAM = {"kind": "op", "name": "gram", "dtype": "float32", "columns": LARGE}
SOLVER = {"kind": "solver", "name": "nash_mtl"}
STEP = {"kind": "step", "name": "resnet18, T=2"}
MAIN = {"kind": "aggregate", "name": "pcgrad"}
BEST = {"kind": "aggregate, at its best"}
FAILED = {"error": "RuntimeError: y"}


@pytest.mark.parametrize(
    ("part", "which", "change", "promise", "named"),
    [
        ("kernels", GRAM | {"tasks": 4}, None, "gram float32, T <= 8: of the copy ceiling", "T=4"),
        ("kernels", GRAM | {"tasks": 4}, FAILED, "gram float32, T <= 8: of the copy ceiling", "T=4"),
        ("kernels", {"kind": "accuracy", "tasks": 64}, None,
         "gram float32: the same bits at every call", "T=64"),
        ("kernels", {"name": "perturb_", "columns": LARGE, "dtype": "bfloat16"}, None,
         "perturb_, P >= 2.5e7", "bfloat16"),
        ("solvers", SOLVER, {"graph_error": "RuntimeError: y"},
         "solvers T=8, a graph replay: us", "nash_mtl (failed)"),
        ("solvers", SOLVER, FAILED, "solvers T=8, a graph replay: us", "nash_mtl (failed)"),
        ("solvers", SOLVER, None, "solvers T=8, a graph replay: us", "nash_mtl (not measured)"),
        ("steps", STEP, {"median_s": {race.OURS: 1.0}, "graph_error": "y"},
         "FS-MTL step: captured, times faster than eager", "resnet18, T=2 (failed)"),
        ("steps", STEP, {"median_s": {race.OURS: 1.0}, "graph_error": "y"},
         "FS-MTL step, ResNet-18: kernels, %", "resnet18, T=2 (failed)"),
        ("aggregate", MAIN, {"failed_rivals": {"plain torch": "y"}},
         "aggregate T=8: times faster than plain torch", "plain torch (failed)"),
        ("aggregate", BEST, None, "aggregate T=8: times faster than plain torch", "torch.compile"),
    ],
)  # fmt: skip
def test_what_a_promise_needs_and_lacks_is_named(part, which, change, promise, named):
    """One size that failed, or that was not measured, is enough: the others do not stand for it."""
    found = made_up(wanted=0.99)
    records = found[part]["records"]
    one = next(r for r in records if which.items() <= r.items())
    if change is None:
        records.remove(one)
    else:
        one |= change
    (line,) = (line for line in table.lines(found) if line.what == promise)
    assert line.verdict == "not measured"
    assert named in " ".join(line.lacking) and named in str(line)


def test_what_falls_short_is_short_whatever_else_lacks():
    found = made_up(wanted=1.01)
    records = found["solvers"]["records"]
    records.pop()
    assert verdicts(found)["solvers T=8, a graph replay: us"] == "short"


def test_plain_torch_that_cannot_be_captured_has_no_graph_to_beat():
    found = made_up()
    (best,) = (r for r in found["aggregate"]["records"] if r["kind"] == BEST["kind"])
    best["failed_rivals"] = {CAPTURED[0]: best["faster"].pop(CAPTURED[0])}
    assert verdicts(found)["aggregate T=8: times faster than plain torch"] == "PASS"
    best["faster"][CAPTURED[1]] = 2.0
    assert verdicts(found)["aggregate T=8: times faster than plain torch"] == "short"


def test_the_reference_operators_keep_no_promise():
    found = made_up()
    for part in found.values():
        part["machine"]["body"] = "reference"
    assert set(verdicts(found).values()) == {"not measured"}
    assert all("operators: reference" in str(line) for line in table.lines(found))


def test_the_table_of_a_file_needs_no_device(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(made_up()))
    command.main(["table", "--results", str(path)])
    said = capsys.readouterr().out
    assert "PASS" in said and "commit 0a1b" in said
    with pytest.raises(SystemExit):
        command.main(["kernels", "--results", str(path)])
    assert "must come with the part table, got kernels" in capsys.readouterr().err


def test_no_numbers_of_the_reference_operators(monkeypatch, capsys):
    """A device without flatmtl's own CUDA operators is refused: they would be written as flatmtl's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine._library, "body", lambda name, device: "reference")
    monkeypatch.setitem(machine._library.missing, "cuda", "not built")
    with pytest.raises(SystemExit):
        command.main(["kernels"])
    assert "needs flatmtl's CUDA library, got none" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["sanitize"])
    with pytest.raises(SystemExit):
        sanitizing.main()
    assert "needs flatmtl's CUDA library, got none" in capsys.readouterr().err


def test_the_whole_table_ends_with_the_promises():
    found = made_up()
    found["steps"]["missing"] = ["40 heads"]
    found["steps"]["records"].append({"kind": "step", "name": "x", "error": "RuntimeError: y"})
    text = table.show(found).splitlines()
    assert text[-1] == str(table.lines(found)[-1])
    assert any("FAILED steps: x" in line for line in text)
    assert any("no time in steps for 1: 40 heads" in line for line in text)


def test_shares_of_a_step():
    record = {
        "median_s": {race.OURS + GRAPH: 2.0, PASSES + GRAPH: 1.5}, "kernels_s": 0.1
    }  # fmt: skip
    assert steps.shares(record) == {"beside the passes": 0.25, "kernels": 0.05}
    assert steps.shares({"median_s": {race.OURS: 1.0}}) == {}


# ---- the script ----------------------------------------------------------------------------------


def script(*words: str, **variables: str) -> subprocess.CompletedProcess:
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, **variables},
    )


def test_an_unknown_part_is_refused():
    made = script("bench")
    assert made.returncode == 2 and "usage: bench/gpu.sh all|build|test" in made.stderr


def test_a_part_that_takes_too_long_is_stopped():
    made = script("sanitize", "--device", "cpu", LIMIT="1")
    assert made.returncode == 124 and "sanitize was stopped after 1 s" in made.stdout


def test_a_part_that_will_not_stop_is_killed(tmp_path):
    stubborn = tmp_path / "python"
    stubborn.write_text("#!/bin/sh\ntrap '' TERM\nsleep 60\n")
    stubborn.chmod(0o755)
    made = script("table", PYTHON=str(stubborn), LIMIT="1")
    assert made.returncode == 137 and "table was stopped after 1 s" in made.stdout


def test_a_build_that_fails_is_the_end_of_it():
    """The other parts would measure an older library, or the reference operators."""
    made = script("all", PYTHON="false")
    assert made.returncode == 1 and "FAILED: build;" in made.stderr
    assert re.findall(r"^== (\w+), at most", made.stdout, re.M) == ["build"]


def test_tests_that_are_all_skipped_are_no_pass():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    made = script("test")
    assert made.returncode == 1 and "needs a CUDA device" in made.stderr


@pytest.mark.parametrize("words", [("--device", "cpu"), ("--device=cpu",)], ids=str)
@pytest.mark.parametrize("part", ["build", "test", "variants"])
def test_parts_that_are_nothing_without_a_gpu(part, words):
    made = script(part, *words, PYTHON="false")
    assert (made.returncode, made.stdout) == (0, f"== {part}: not without a GPU\n")


def test_all_parts_together_take_less_than_ten_minutes():
    text = (ROOT / "bench" / "gpu.sh").read_text()
    limits = text.split("LIMITS=(")[1].split(")")[0]
    pairs = [pair.split("=") for pair in limits.split()]
    (ending,) = re.findall(r"^ENDING=(\d+)", text, re.M)
    assert len(pairs) == 10
    assert sum(int(seconds) + int(ending) for _, seconds in pairs) < 600
    page = (ROOT / "docs" / "gpu.md").read_text()
    for name, seconds in pairs:
        assert f"| `{name[1:-1]}` | {seconds} |" in page


OPTIONAL = {"quadprog", "scipy", "hypothesis", "torchjd", "matplotlib", "pandas", "sklearn", "rich"}


def imported(path: Path, seen: set[Path]) -> set[str]:
    """What importing a module of tests/ imports, with the other modules of tests/ that it does."""
    seen.add(path)
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    for name in list(found):
        other = path.parent / f"{name}.py"
        if other.exists() and other not in seen:
            found |= imported(other, seen)
    return found


def test_tests_for_the_gpu_can_be_collected_where_little_is_installed():
    command = (ROOT / "bench" / "gpu.sh").read_text().split("grep -lE '")[1].split("'")[0]
    files = [p for p in (ROOT / "tests").glob("test_*.py") if re.search(command, p.read_text())]
    assert len(files) > 25
    for path in files:
        assert not imported(path, set()) & OPTIONAL, path.name


def test_sanitizing_ends_in_time_and_says_how_far_it_came(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sanitize", "--device", "cpu", "--seconds", "5"])
    sanitizing.main()
    said = capsys.readouterr().out
    found = re.search(r"^(\d+) of 64 sizes, every op: no error on cpu$", said, re.M)
    assert found and int(found[1]) >= sanitizing.NEEDED


def test_sanitizing_next_to_nothing_fails(monkeypatch):
    assert {t for t, _ in sanitizing.SIZES[: sanitizing.NEEDED]} == {8, 17, 33, 65}
    monkeypatch.setattr(sys, "argv", ["sanitize", "--device", "cpu", "--seconds", "0"])
    with pytest.raises(SystemExit, match="^0 of 64 sizes in 0 s: 4 must be done at least$"):
        sanitizing.main()
