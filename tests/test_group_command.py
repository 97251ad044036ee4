"""``python -m flatmtl group``."""

from __future__ import annotations

import csv
import itertools
import re
import subprocess
import sys

import numpy as np
import pytest

from flatmtl import AffinityRecord
from flatmtl.__main__ import main
from flatmtl.affinity._progress import Bar
from flatmtl.grouping import select_groups

TASKS = ["ss", "depth", "normals", "keys", "edges"]


def a_record(rng, tasks=TASKS, epochs=3, noise=0.1, **changes) -> AffinityRecord:
    shape = (epochs, len(tasks), len(tasks))
    count = np.full(shape, 25)
    arguments = {
        "mean": {"affinity": rng.uniform(0.1, 1.0, shape)},
        "m2": {"affinity": noise**2 * 24 * np.ones(shape)},
        "count": {"affinity": count},
        "metadata": {"mode": "exact", "look_ahead": "sgd", "momentum": False},
    }
    return AffinityRecord(tasks=list(tasks), steps=[25] * epochs, **(arguments | changes))


@pytest.fixture
def group(capsys, tmp_path):
    """Runs the command on a record or a file; returns what it printed."""

    def run(source, *options: str, status: int = 0) -> str:
        if isinstance(source, AffinityRecord):
            source.save(tmp_path / "record.npz")
            source = tmp_path / "record.npz"
        assert main(["group", str(source), *options]) == status
        out, err = capsys.readouterr()
        if status == 0:
            assert not err
            return out
        assert not out and len(err.splitlines()) == 1 and err.startswith("group: ")
        return err

    return run


def served(text: str) -> dict[str, tuple[int, float]]:
    """task -> (group, score), from the table."""
    lines = text.splitlines()
    first = next(n for n, line in enumerate(lines) if line.split() == ["task", "group", "score"])
    rows = itertools.takewhile(str.strip, lines[first + 1 :])
    return {
        line[:-19].strip(): (int(line[-19:].split()[0]), float(line.split()[-1])) for line in rows
    }


def best(matrix: np.ndarray, most: int) -> float:
    """By trying all covers of few tasks."""
    tasks = range(len(matrix))
    sets = [g for m in range(2, len(matrix) + 1) for g in itertools.combinations(tasks, m)]
    found = []
    for number in range(1, most + 1):
        for chosen in itertools.combinations(sets, number):
            if len(set().union(*chosen)) == len(matrix):
                scores = [
                    max(np.mean([matrix[t, j] for j in g if j != t]) for g in chosen if t in g)
                    for t in tasks
                ]
                found.append(np.mean(scores))
    return max(found)


def test_groups_scores_and_the_value_by_number(group, rng):
    record = a_record(rng)
    text = group(record, "--max-groups", "3")
    grouping = select_groups(record, 3)
    assert f"mean score {best(record.matrix(), 3):.6g} ±" in text
    table = served(text)
    assert set(table) == set(TASKS)
    for task, (number, score) in table.items():
        assert number == grouping.served_by[task] + 1
        assert score == pytest.approx(grouping.scores[task], rel=1e-3)
    for number, value in enumerate(grouping.by_count, 1):
        shown = "not possible" if value is None else f"{value:.6g}"
        assert re.search(rf"^ +{number} +{re.escape(shown)}", text, re.MULTILINE)
    for number, members in enumerate(grouping.groups, 1):
        line = re.search(rf"^ +{number}  (\D.*)$", text, re.MULTILINE)[1]
        named = {name.rstrip("*"): name.endswith("*") for name in line.split(", ")}
        assert named == {task: grouping.served_by[task] != number - 1 for task in members}
    assert "75 measured steps in 3 epochs; row = recipient" in text


def test_a_row_is_the_recipient_in_a_csv_too(group, tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("recipient\\source,a,b,c\na,,0.9,0.1\nb,0.2,,0.1\nc,0.3,0.4,\n")
    text = group(path, "--max-groups", "1", "--near-ties", "0")
    assert {task: score for task, (_, score) in served(text).items()} == {
        "a": 0.5, "b": 0.15, "c": 0.35
    }  # fmt: skip
    assert "±" not in text, "nothing is known of its errors"


def test_quantity_epochs_and_normalise(group, rng):
    found = {p: dict(getattr(a_record(rng), p)) for p in ("mean", "m2", "count")}
    found["mean"]["cosine"] = rng.uniform(-1, 1, (3, 5, 5))
    found["m2"]["cosine"], found["count"]["cosine"] = (
        found["m2"]["affinity"],
        found["count"]["affinity"],
    )
    record = a_record(rng, **found)
    for options, matrix in (
        (["--quantity", "cosine"], record.matrix("cosine")),
        (["--epochs", "1:"], record.matrix(epochs=slice(1, None))),
        (["--epochs", "0"], record.matrix(epochs=0)),
        (["--epochs=-1"], record.matrix(epochs=-1)),
        (["--epochs=-2:-1"], record.matrix(epochs=1)),
        (["--normalise"], record.matrix(normalise=True)),
    ):
        text = group(record, "--max-groups", "2", *options)
        assert f"mean score {best(matrix, 2):.6g}" in text
    assert "25 measured steps in 1 epoch;" in group(record, "--max-groups", "2", "--epochs", "1")


def test_rules_go_through(group, rng):
    record = a_record(rng, [*TASKS[:3], "a, b", 7])
    names = record.tasks
    for options, rules in (
        (["--must", "ss,7", "--must-not", '"a, b",depth'],
         {"must": [("ss", 7)], "must_not": [("a, b", "depth")]}),
        (["--must", "ss, depth", "--must", "normals,7"],
         {"must": [("ss", "depth"), ("normals", 7)]}),
        (["--partition"], {"partition": True}),
        (["--allow-single"], {"allow_single": True}),
        (["--objective", "hoa", "--minimise"], {"objective": "hoa", "minimise": True}),
    ):  # fmt: skip
        grouping = select_groups(record, 3, **rules)
        table = served(group(record, "--max-groups", "3", *options))
        assert table == {
            str(task): (
                grouping.served_by[task] + 1,
                pytest.approx(grouping.scores[task], rel=1e-3),
            )
            for task in names
        }


def test_near_ties_and_thin_margins(group, rng):
    matrix = np.full((4, 4), 0.1)
    matrix[0, 1] = matrix[1, 0] = matrix[2, 3] = matrix[3, 2] = 0.5
    changed = matrix.copy()
    changed[[0, 2, 1, 3], [2, 0, 3, 1]] = 0.4999  # almost as good partners
    errors = {
        "m2": {"affinity": np.zeros((1, 4, 4))},
        "count": {"affinity": np.full((1, 4, 4), 25)},
    }
    sure = a_record(rng, "abcd", 1, mean={"affinity": matrix[None]}, **errors)
    text = group(sure, "--max-groups", "2", "--near-ties", "1")
    assert "± 0 " in text and "thin margins" not in text
    text = group(sure, "--max-groups", "2", "--near-ties", "0")
    assert "next best" not in text
    unsure = a_record(rng, "abcd", 1, mean={"affinity": matrix[None]}, noise=9.0)
    text = group(unsure, "--max-groups", "2", "--near-ties", "2")
    assert text.count("(within a standard error)") == 2
    assert "caveat: thin margins: 2 of these are" in text
    almost = a_record(rng, "abcd", 1, mean={"affinity": changed[None]}, **errors)
    text = group(almost, "--max-groups", "2", "--near-ties", "2")
    assert "0.02%" in text
    assert "caveat: thin margins: 1 of these is less than 1% or one standard error" in text


def test_the_error_of_the_mean_score(group, rng):
    """Pairs of two: the mean of four entries, each with an error of its own."""
    matrix = np.full((4, 4), 0.1)
    matrix[0, 1] = matrix[1, 0] = matrix[2, 3] = matrix[3, 2] = 0.5
    m2 = np.ones((1, 4, 4))
    m2[0, 0, 1] = 4.0
    record = a_record(rng, "abcd", 1, mean={"affinity": matrix[None]}, m2={"affinity": m2})
    each = 1.0 / (25 * 24)
    expected = np.sqrt(4 * each + 3 * each) / 4
    assert f"mean score 0.5 ± {expected:.1g} " in group(record, "--max-groups", "2")


def test_caveats_are_told(group, rng):
    record = a_record(rng, metadata={"mode": "exact", "momentum": True})
    text = group(record, "--max-groups", "2", "--allow-single")
    for caveat in record.caveats():
        assert f"caveat: {caveat}\n" in text
    assert "look better than it is" in text
    assert "caveat:" not in group(a_record(rng, noise=0), "--max-groups", "1", "--near-ties", "0")


def test_many_tasks_by_the_heuristic(group, rng):
    record = a_record(rng, [f"t{i}" for i in range(40)])
    text = group(record, "--max-groups", "4", "--heuristic")
    assert "found by a heuristic, nothing can be better than" in text and len(served(text)) == 40
    assert "heuristic" in group(record, "--max-groups", "4", status=2)


def test_what_it_writes(group, rng, tmp_path):
    record = a_record(rng, ["a,b", *TASKS[1:]])
    text = group(
        record,
        "--max-groups",
        "2",
        "--csv",
        str(tmp_path / "g.csv"),
        "--plot",
        str(tmp_path / "g.png"),
    )
    assert text.splitlines()[-1] == f"written: {tmp_path / 'g.csv'}, {tmp_path / 'g.png'}"
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "g.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    grouping = select_groups(record, 2)
    assert len(rows) == sum(map(len, grouping.groups))
    for row in rows:
        number = int(row["group"]) - 1
        assert row["task"] in grouping.groups[number]
        here = grouping.served_by[row["task"]] == number
        assert row["served there"] == ("yes" if here else "no")
        assert row["score"] == (repr(grouping.scores[row["task"]]) if here else "")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--max-groups", "0"], "max_groups must be"),
        (
            ["--max-groups", "2", "--must", "ss,nobody"],
            "unknown task 'nobody'; the tasks are ss, d",
        ),
        (["--max-groups", "1", "--must-not", "ss,depth"], "no selection"),
        (["--max-groups", "2", "--must", "ss,depth", "--must-not", "ss,depth"], "contradict"),
        (["--max-groups", "2", "--epochs", "5:9"], "3 epochs, got 5:9"),
        (["--max-groups", "2", "--quantity", "cosine"], "quantity must be one of 'affinity'"),
        (["--max-groups", "2", "--plot", "/nowhere/x.png"], "/nowhere: no such folder"),
        (["--max-groups", "2", "--csv", "/nowhere/x.csv"], "/nowhere: no such folder"),
        (["--max-groups", "2", "--near-ties", "-1"], "near_ties must be"),
    ],
)
def test_options_that_cannot_be_met(options, match, group, rng):
    assert match in group(a_record(rng), *options, status=2)


def test_files_that_cannot_be_read(group, tmp_path, rng):
    assert "missing.npz: No such file" in group(
        tmp_path / "missing.npz", "--max-groups", "2", status=2
    )
    assert "missing.csv: No such file" in group(
        tmp_path / "missing.csv", "--max-groups", "2", status=2
    )
    (tmp_path / "bad.csv").write_text(",a,b\na,1,2\n")
    assert "must be square" in group(tmp_path / "bad.csv", "--max-groups", "2", status=2)
    (tmp_path / "bad.npz").write_text("no archive")
    assert "not an npz file" in group(tmp_path / "bad.npz", "--max-groups", "2", status=2)
    assert "irectory" in group(tmp_path, "--max-groups", "2", status=2)
    count = {"affinity": np.full((3, 5, 5), 25)}
    count["affinity"][:, 1, 2] = 0
    gap = a_record(rng, count=count)
    assert "affinity must be finite" in group(gap, "--max-groups", "2", status=2)


def test_pictures_need_matplotlib(group, rng, tmp_path, monkeypatch):
    """Said before a search that may take long."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = str(tmp_path / "x.png")
    assert "flatmtl[plots]" in group(a_record(rng), "--max-groups", "2", "--plot", out, status=2)


@pytest.mark.parametrize(
    "option", ["--must=ss", "--must=ss,", "--epochs=x", "--epochs=", "--near-ties=x"]
)
def test_options_that_do_not_parse(option, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["group", "x.npz", "--max-groups", "2", option])
    assert stop.value.code == 2
    assert f"argument {option.split('=')[0]}" in capsys.readouterr().err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["group", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "example: python -m flatmtl group" in text and "recipient\\source" in text


def test_as_a_program(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "flatmtl", "group", str(tmp_path / "no.npz"), "--max-groups", "2"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "no.npz" in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------- progress


class Screen(list):
    """A stderr that somebody looks at."""

    def write(self, text: str) -> int:
        self.append(text)
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True


@pytest.fixture
def look(monkeypatch):
    """Called in the test: pytest puts its own stderr in place after the fixtures."""

    def look() -> Screen:
        found = Screen()
        monkeypatch.setattr(sys, "stderr", found)
        return found

    return look


def test_a_short_search_shows_no_bar(look):
    screen = look()
    with Bar("working") as bar:
        bar(0.5)
    assert not screen


def test_a_plain_bar_without_rich(look, monkeypatch):
    screen = look()
    monkeypatch.setattr("flatmtl.affinity._progress._PATIENCE", -1.0)
    for module in ("rich", "rich.console", "rich.progress"):
        monkeypatch.setitem(sys.modules, module, None)
    with Bar("working") as bar:
        bar(0.25)
        bar(0.5)
    text = "".join(screen)
    assert "working  25%" in text and "working  50%" in text and text.endswith("\r")


def test_a_bar_with_rich(look, monkeypatch):
    screen = look()
    pytest.importorskip("rich")
    monkeypatch.setattr("flatmtl.affinity._progress._PATIENCE", -1.0)
    with Bar("working") as bar:
        bar(0.25)
        bar(1.0)
    assert "working" in "".join(screen)


def test_no_bar_in_a_log(monkeypatch, capsys):
    monkeypatch.setattr("flatmtl.affinity._progress._PATIENCE", -1.0)
    with Bar("working") as bar:
        bar(0.5)
    assert capsys.readouterr().err == ""


def test_ctrl_c_says_so(group, rng, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("flatmtl.grouping.select_groups", stop)
    assert "group: stopped" in group(a_record(rng), "--max-groups", "2", status=130)


def test_draws(group, rng):
    record = a_record(rng, noise=1.0)
    out = group(record, "--max-groups", "2", "--draws", "20", "--must-not", "ss,depth")
    drawn = out.split("selections in 20 draws")[1]
    shares = [float(share) for share in re.findall(r"([\d.]+) %", drawn.split("caveat")[0])]
    assert shares and abs(sum(shares) - 100) < 0.5
    assert not re.search(r"{[^}]*ss, depth[^}]*}", drawn)
    err = group(record, "--max-groups", "2", "--draws", "20", "--normalise", status=2)
    assert "--draws goes with" in err


def test_the_picture_is_of_what_was_chosen(group, rng, tmp_path, monkeypatch):
    plots = pytest.importorskip("flatmtl.plots")
    pytest.importorskip("matplotlib")
    seen = {}
    monkeypatch.setattr(plots, "grouping_report", lambda *args, **options: seen.update(options))
    group(
        a_record(rng), "--max-groups", "2", "--epochs", "1:3", "--normalise",
        "--plot", str(tmp_path / "x.png"),
    )  # fmt: skip
    assert seen == {"quantity": "affinity", "epochs": slice(1, 3), "normalise": True}


def test_long_groups_are_wrapped(group, rng):
    tasks = [f"task number {n:03d}" for n in range(40)]
    out = group(a_record(rng, tasks), "--max-groups", "1", "--heuristic")
    listed = [line for line in out.splitlines() if ", task" in line]
    assert len(listed) > 4 and max(map(len, listed)) <= 110
    assert out.split("task  ")[0].count("task number") == 40


def test_a_reader_that_has_enough(rng, tmp_path):
    a_record(rng, [f"t{n}" for n in range(9)]).save(tmp_path / "r.npz")
    line = f"{sys.executable} -m flatmtl group {tmp_path / 'r.npz'} --max-groups 3 | head -c 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, check=False
    )
    assert done.stderr == "" and len(done.stdout) <= 1


def test_groups_that_hang_on_a_rows_scale(group):
    """One row is a hundred times as wide as the others, and wants another partner than they do."""
    matrix = np.array([[0, 0.0, 9.0, 9.0], [1, 0, 0, 0], [0, 0, 0, 1.0], [0, 0, 1.0, 0]])
    wide = AffinityRecord.from_matrix(matrix, list("abcd"))
    raw = group(wide, "--max-groups", "2", "--partition")
    even = group(wide, "--max-groups", "2", "--partition", "--normalise")
    chosen = [set(select_groups(m, 2, tasks=list("abcd"), partition=True).groups)
              for m in (wide.matrix(), wide.matrix(normalise=True))]  # fmt: skip
    assert chosen[0] != chosen[1], "or the example shows nothing"
    assert "hang on the rows' scales" in raw and "hang on" not in even
    for names in chosen[1]:
        assert "{" + ", ".join(names) + "}" in raw
    same = AffinityRecord.from_matrix(np.array([[0, 1.0], [2.0, 0]]))
    assert "hang on" not in group(same, "--max-groups", "1")
