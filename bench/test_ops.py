"""Every op against plain torch and the bandwidth."""

from __future__ import annotations

import pytest

from bench.cases import Inputs
from bench.contests import MATRIX_OPS, ROW_OPS, op_contest


def _required(name: str, inputs: Inputs) -> bool:
    """Numbers that are promised get more rounds."""
    large = inputs.columns == 10_000_000
    return large and (
        (name == "gram" and inputs.tasks <= 16) or (name == "combine" and inputs.tasks == 8)
    )


@pytest.mark.parametrize("name", MATRIX_OPS)
def test_matrix_op(name, inputs, measure, compile_):
    contest = op_contest(name, inputs, compile_=compile_(inputs))
    required = _required(name, inputs)
    measure(
        contest,
        kind="op",
        tasks=inputs.tasks,
        columns=inputs.columns,
        effort=6 if required else 1,
        least=15 if required else 3,
    )


@pytest.mark.parametrize("name", ROW_OPS)
def test_row_op(name, row_inputs, measure, compile_):
    contest = op_contest(name, row_inputs, compile_=compile_(row_inputs))
    measure(contest, kind="row op", columns=row_inputs.columns)
