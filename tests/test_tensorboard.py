"""HistoryWriter: every step once, as scalars, and nothing lost in silence."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch

from flatmtl.history import History
from flatmtl.integrations.tensorboard import HistoryWriter

TAGS = {
    "loss": "losses",
    "weight": "weights",
    "flat_weight": "flat_weights",
    "norm": "norms",
    "sharpness": "sharpness",
}


class Notes:
    """A SummaryWriter that remembers: (tag, step) -> value; nothing is written twice."""

    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag, scalar_value, global_step=None):
        assert type(scalar_value) is float and type(global_step) is int
        assert (tag, global_step) not in self.scalars
        self.scalars[tag, global_step] = scalar_value


def record(history: History, rng, steps: int) -> list[dict[str, torch.Tensor]]:
    tasks, given = len(history.tasks), []
    for _ in range(steps):
        jac = torch.from_numpy(rng.standard_normal((tasks, tasks + 3)))
        step = {name: torch.from_numpy(rng.standard_normal(tasks)) for name in TAGS.values()}
        step["gram"] = jac @ jac.T
        history.record(**step)
        given.append(step)
    return given


def expected(
    tasks, given, numbers, prefix: str = "flatmtl/", offset: int = 0
) -> dict[tuple[str, int], float]:
    """From the formulas, step by step."""
    scalars = {}
    for n in numbers:
        step = given[n]
        for tag, name in TAGS.items():
            for i, task in enumerate(tasks):
                if name in step and not math.isnan(step[name][i]):
                    scalars[f"{prefix}{tag}/{task}", n + offset] = float(step[name][i])
        gram = step.get("gram")
        cosines = []
        for i, j in itertools.combinations(range(len(tasks)), 2):
            if gram is not None and gram[i, i] > 0 and gram[j, j] > 0:
                cosines.append(float(gram[i, j]) / math.sqrt(gram[i, i] * gram[j, j]))
        if cosines:
            scalars[f"{prefix}conflict", n + offset] = sum(c < 0 for c in cosines) / len(cosines)
            scalars[f"{prefix}cosine", n + offset] = sum(cosines) / len(cosines)
    return scalars


def test_every_step_is_written_once(rng):
    tasks = ["left", "right", 2]
    history, notes = History(10, tasks), Notes()
    writer, given = HistoryWriter(notes), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for new in (3, 0, 10, 1, 7):
            given += record(history, rng, new)
            assert writer.write(history) == new
    assert notes.scalars == pytest.approx(expected(tasks, given, range(21)), rel=1e-12)
    assert len(notes.scalars) == 21 * (5 * 3 + 2)
    assert writer.lost == 0


def test_what_is_missing_is_left_out(rng):
    tasks = ["a", "b", "c"]
    history, notes = History(10, tasks), Notes()
    given = record(history, rng, 1)
    bare = {"losses": torch.tensor([1.0, torch.nan, 3.0], dtype=torch.float64)}
    history.record(**bare)
    lame = record(history, rng, 1)[0]
    lame["gram"][1] = lame["gram"][:, 1] = 0
    history.record(**lame)
    HistoryWriter(notes).write(history)
    # step 2 was recorded before its Gram matrix was made lame
    kept = {key: value for key, value in notes.scalars.items() if key[1] != 2}
    numbers = {0: given[0], 1: bare, 3: lame}
    assert kept == pytest.approx(expected(tasks, numbers, [0, 1, 3]), rel=1e-12)
    assert {tag for tag, step in kept if step == 1} == {"flatmtl/loss/a", "flatmtl/loss/c"}


def test_lost_steps_are_said_once_and_counted(rng):
    tasks = ["a", "b"]
    history, notes = History(4, tasks), Notes()
    writer = HistoryWriter(notes)
    given = record(history, rng, 7)
    with pytest.warns(UserWarning, match="steps 0 to 2 were gone.*every 4 steps") as said:
        assert writer.write(history) == 4
    assert len(said) == 1 and said[0].filename == __file__
    assert writer.lost == 3
    given += record(history, rng, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        writer.write(history)
    assert writer.lost == 5
    written = [*range(3, 7), *range(9, 13)]
    assert notes.scalars == pytest.approx(expected(tasks, given, written), rel=1e-12)


def test_cleared_steps_count_as_lost(rng):
    history, notes = History(8, ["a", "b"]), Notes()
    writer = HistoryWriter(notes)
    record(history, rng, 2)
    writer.write(history)
    record(history, rng, 3)
    history.clear()
    assert writer.write(history) == 0
    record(history, rng, 1)
    with pytest.warns(UserWarning, match="steps 2 to 4"):
        assert writer.write(history) == 1
    assert writer.lost == 3


def test_another_history_needs_another_writer(rng):
    notes = Notes()
    first, second = History(4, ["a", "b"]), History(4, ["a", "b"])
    given, also = record(first, rng, 2), record(second, rng, 3)
    writer = HistoryWriter(notes)
    writer.write(first)
    with pytest.raises(ValueError, match="HistoryWriter of its own"):
        writer.write(second)
    HistoryWriter(notes, offset=2).write(second)
    assert notes.scalars == pytest.approx(expected(["a", "b"], given + also, range(5)), rel=1e-12)


@pytest.mark.parametrize(("prefix", "start"), [("", ""), ("run/one", "run/one/")])
def test_prefix_and_offset(prefix, start, rng):
    history, notes = History(4, ["a", "b"]), Notes()
    given = record(history, rng, 3)
    HistoryWriter(notes, prefix, offset=100).write(history)
    assert notes.scalars == pytest.approx(
        expected(["a", "b"], given, range(3), start, 100), rel=1e-12
    )


def test_a_write_reads_the_device_once(rng, monkeypatch):
    history, notes = History(4, ["a", "b"]), Notes()
    writer, reads = HistoryWriter(notes), []
    record(history, rng, 3)
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: reads.append(1) or cpu(tensor))
    writer.write(history)
    assert len(reads) == 1


@pytest.mark.parametrize("writer", [None, "runs", object()])
def test_a_writer_that_cannot_write(writer):
    with pytest.raises(TypeError, match="writer must be a torch.utils.tensorboard.SummaryWriter"):
        HistoryWriter(writer)


def test_tensorboard_reads_it_back(tmp_path, rng):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    tasks = ["left", "right"]
    history = History(10, tasks)
    given = record(history, rng, 4)
    given[2]["losses"][1] = torch.nan  # after recording: changes nothing
    with SummaryWriter(tmp_path) as summary:
        writer = HistoryWriter(summary)
        writer.write(history)
        given += record(history, rng, 3)
        writer.write(history)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    arrays = history.arrays()
    for i, task in enumerate(tasks):
        for tag, name in TAGS.items():
            scalars = events.Scalars(f"flatmtl/{tag}/{task}")
            assert [s.step for s in scalars] == list(range(7))
            np.testing.assert_allclose([s.value for s in scalars], arrays[name][:, i], rtol=1e-6)
    assert len(events.Tags()["scalars"]) == 5 * 2 + 2
