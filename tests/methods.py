"""Every weighting by name, with options that suit a number of tasks, and what may be asked of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import oracles_weighting as ow
import torch
from torch import Tensor

from flatmtl.weighting import Weighting, by_name

NO_ACTIVE, SOME_INACTIVE, NOT_CONVERGED, RIDGE_RAISED, FALLBACK, INVALID = 1, 2, 4, 8, 16, 32

ALL = ["mean", "sum", "constant", "pcgrad", "gradvac", "mgda", "cagrad", "nash_mtl", "fairgrad",
       "imtl_g", "aligned_mtl", "upgrad", "dualproj", "config", "pivrg", "pcd", "krum", "sdmgrad",
       "modo", "cr_mogm", "rlw"]  # fmt: skip
# of losses alone: weighting(losses)
LOSS = ["slaw", "famo", "uw", "imtl_l", "dwa", "gls", "si", "bmtl", "stch", "go4align"]
BOTH = ["imtl", "gradnorm", "emtl_like"]  # look at the Gram matrix and the losses
ROWS = ["graddrop", "trimmed_mean", "moco", "db_mtl", "excess_mtl"]  # need the gradients themselves
RANDOM = ["pcgrad", "gradvac", "rlw"]  # draws depend on the step and on the place in the batch
STATEFUL = ["gradvac", "nash_mtl", "pcd", "sdmgrad", "modo", "cr_mogm"]
CROSS = ["sdmgrad", "modo"]  # take any cross-Gram
# weights that may be negative
SIGNED = ["imtl_g", "config", "aligned_mtl", "gradvac"]


def make(name: str, tasks: int = 4, **options) -> Weighting:
    """A fresh weighting for so many tasks."""
    if name == "constant":
        options.setdefault("weights", torch.arange(1.0, tasks + 1))
    elif name == "krum":
        options.setdefault("byzantine", 0)
    elif name == "trimmed_mean":
        options.setdefault("trim", 1)
    elif name in ("imtl", "gradnorm"):
        options.setdefault("tasks", tasks)
    elif name == "cr_mogm":
        options.setdefault("weighting", by_name("mgda"))
    elif name in ("uw", "imtl_l"):
        options.setdefault("tasks", tasks)
    elif name == "trimmed_mean":
        options.setdefault("trim", int(tasks > 2))
    elif name == "go4align":
        options.setdefault("groups", min(tasks, 2))
    return by_name(name, **options)


# ---- the exact solvers, as ops ---------------------------------------------------------------


class Exact(NamedTuple):
    """An op as `solve(body, gram [B, T, T], ridge) -> weights, status, residual`, and the oracle's
    `residual(gram, weights, ridge)` of one problem."""

    solve: Callable[..., tuple[Tensor, Tensor, Tensor]]
    residual: Callable[[np.ndarray, np.ndarray, float], ow.Residual]


TAU, EPS, BETA, RANK = 0.02, 1e-8, 0.999, 2.0**-23


def pivrg_preference(tasks: int) -> np.ndarray:
    return ow.pivrg_preference(np.linspace(-30, 70, tasks))


def _vector(values: np.ndarray, gram: Tensor) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float64)).to(gram.device)


def _state(gram: Tensor) -> Tensor:
    return gram.new_zeros(*gram.shape[:-2], gram.shape[-1] + 1)


def _fair(alpha: float) -> Exact:
    return Exact(
        lambda body, g, ridge: body.solve_alpha_fair(g, alpha, None, ridge),
        lambda g, w, ridge: ow.fair_residual(g, w, alpha, ridge=ridge),
    )


def _aligned_residual(gram: np.ndarray, w: np.ndarray, ridge: float) -> ow.Residual:
    """Against the longer eigensolver; rows: per unit of the condition of what is kept."""
    best, condition, nearest = ow.aligned(gram, eigh=ow.eigen if len(w) <= 8 else np.linalg.eigh)
    if nearest < 1e-7:  # an eigenvalue at the rank limit: either side is right
        return ow.Residual(0.0, 0.0)
    error = np.abs(w - best).max() / np.abs(best).max()
    return ow.Residual(error / condition, error)


EXACT = {
    "mgda": Exact(lambda body, g, ridge: body.solve_mgda(g, ridge), ow.mgda_residual),
    "cagrad": Exact(
        lambda body, g, ridge: body.solve_cagrad(g, 0.4, 0, ridge),
        lambda g, w, ridge: ow.cagrad_residual(g, w, 0.4, ridge),
    ),
    "nash": Exact(
        lambda body, g, ridge: body.solve_nash_(g, _state(g), 1, 0.0, ridge),
        lambda g, w, ridge: ow.fair_residual(g, w, 1.0, ridge=ridge),
    ),
    "fair_half": _fair(0.5),
    "fair_one": _fair(1.0),
    "fair_two": _fair(2.0),
    "pivrg": Exact(
        lambda body, g, ridge: body.solve_alpha_fair(
            g, 2.0, _vector(pivrg_preference(g.shape[-1]), g), ridge
        ),
        lambda g, w, ridge: ow.fair_residual(g, w, 2.0, pivrg_preference(len(w)), ridge),
    ),
    "imtl_g": Exact(lambda body, g, ridge: body.solve_imtl_g(g, ridge), ow.imtl_g_residual),
    "config": Exact(
        lambda body, g, ridge: body.solve_config(g, None, ridge),
        lambda g, w, ridge: ow.config_residual(g, w, ridge=ridge),
    ),
    "aligned": Exact(
        lambda body, g, ridge: body.solve_aligned(g, None, 0, RANK), _aligned_residual
    ),
    "upgrad": Exact(
        lambda body, g, ridge: body.solve_dual_cone(g, None, True, ridge),
        lambda g, w, ridge: upgrad_residual(g, w, ridge),
    ),
    "dualproj": Exact(
        lambda body, g, ridge: body.solve_dual_cone(g, None, False, ridge),
        lambda g, w, ridge: ow.dual_cone_residual(g, w, np.full(len(w), 1 / len(w)), ridge),
    ),
    "pcd": Exact(
        lambda body, g, ridge: body.solve_pcd_(g, _state(g), TAU, BETA, EPS, ridge),
        lambda g, w, ridge: ow.pcd_residual(g, w, pcd_scales(g), TAU, ridge),
    ),
}


def pcd_scales(gram: np.ndarray) -> np.ndarray:
    return ow.pcd_scales(np.diag(gram), EPS, BETA)[0]


def upgrad_residual(gram: np.ndarray, w: np.ndarray, ridge: float) -> ow.Residual:
    """Against the other solver, backward: d and each <g_i, d> as it has them.

    The weights alone do not show their T parts; G w does not depend on how a duplicate is split.
    """
    tasks = len(w)
    n, c = ow.scaled(gram, ridge)
    best = ow.upgrad(gram, np.full(tasks, 1 / tasks), ridge)
    difference = np.abs(c @ (n * w - n * best))
    size = np.abs(c) @ np.abs(n * best)
    length = np.sqrt((n * best) @ c @ (n * best))
    rows = (difference / np.where(size > 0, size, 1)).max()
    return ow.Residual(float(rows), float(difference.max() / length if length > 0 else 0.0))


def fallback_weights(gram: np.ndarray) -> np.ndarray:
    n = np.sqrt(np.diag(gram))
    return n.min() / n / (n.min() / n).sum()
