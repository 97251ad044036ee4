"""The whole aggregate, J -> d, against plain torch and the peers."""

from __future__ import annotations

import pytest

from bench.contests import METHODS, aggregate_contest, pipeline_contest


@pytest.mark.parametrize("name", METHODS)
def test_aggregate(name, inputs, measure):
    required = name == "pcgrad" and inputs.tasks == 8
    measure(
        aggregate_contest(name, inputs),
        kind="aggregate",
        tasks=inputs.tasks,
        columns=inputs.columns,
        effort=8 if required else 1,
        least=9 if required else 3,
    )


def test_pipeline(inputs, measure):
    measure(pipeline_contest(inputs), kind="pipeline", tasks=inputs.tasks, columns=inputs.columns)
