"""How many labelled samples tasks have in common."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def sample_overlap(labelled: ArrayLike) -> np.ndarray:
    """The share of the recipient's labelled samples that the source has labels for too.

    Args:
        labelled: bool [N, T], True where sample n has a label of task t.

    Returns:
        float64 [T, T], row = recipient, column = source; 1 on the diagonal, and NaN in the row of a task
        without labels. Not symmetric: a small task may lie within a large one.

    Raises:
        TypeError: ``labelled`` is not bool.
        ValueError: ``labelled`` is not [N, T].
    """
    given = np.asarray(labelled)
    if given.dtype != np.bool_:
        raise TypeError(f"labelled must be bool, got {given.dtype}")
    if given.ndim != 2:
        raise ValueError(
            f"labelled must have shape [samples, tasks], got shape {list(given.shape)}"
        )
    ones = given.astype(np.float64)  # [N, T]; counts are whole numbers far below 2^53: exact
    both = ones.T @ ones
    own = np.diag(both)[:, None]
    return np.divide(both, own, out=np.full_like(both, np.nan), where=own > 0)
