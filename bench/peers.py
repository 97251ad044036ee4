"""The aggregation methods as others compute them: TorchJD where installed, and published descriptions.

"LibMTL's maths" are the solvers that trainer frameworks and the papers' code run (LibMTL, nash-mtl, CAGrad,
...), written here from their description in the papers and from what each minimises; no code is theirs.
Both get float32, as their own pipelines do. What is not installed is left out.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flatmtl.ops import reference

try:
    import torchjd
    from torchjd import aggregation as _torchjd
except ImportError:  # an optional rival: its columns stay empty
    torchjd = None

Array = NDArray[Any]

CAGRAD_C = 0.4  # everyone's: flatmtl's defaults
FAIRGRAD_ALPHA = 2.0
KRUM_BYZANTINE = 0


# ---------------------------------------------------------------- aggregators, J -> d


def torchjd_aggregator(name: str, tasks: int = 0) -> Callable[[Tensor], Tensor] | None:
    """TorchJD's aggregator for J of so many tasks; None without TorchJD or what it needs."""
    if torchjd is None:
        return None
    makers: dict[str, Callable[[], Any]] = {
        "mean": _torchjd.Mean,
        "pcgrad": _torchjd.PCGrad,
        "mgda": _torchjd.MGDA,
        "upgrad": _torchjd.UPGrad,
        "imtl_g": _torchjd.IMTLG,
        "config": _torchjd.ConFIG,
        "cagrad": lambda: _torchjd.CAGrad(CAGRAD_C),
        "nash_mtl": lambda: _torchjd.NashMTL(tasks),
    }
    try:
        return makers[name]()
    except ImportError:
        return None


def torchjd_jac_to_grad(jac: Tensor, offsets: list[int]) -> Callable[[], None]:
    """TorchJD's PCGrad from ``.jac`` fields, those of J [T, P] cut at ``offsets``, to ``.grad``."""
    from torchjd.autojac import jac_to_grad

    params = []
    for begin, end in zip(offsets, [*offsets[1:], jac.shape[1]], strict=True):
        param = torch.zeros(end - begin, dtype=jac.dtype, device=jac.device, requires_grad=True)
        param.jac = jac[:, begin:end].contiguous()  # [T, elements]
        params.append(param)
    aggregator = _torchjd.PCGrad()

    def call() -> None:
        for param in params:
            param.grad = None  # it adds to what is there
        jac_to_grad(params, aggregator, retain_jac=True)

    return call


def plain_torch(name: str) -> Callable[[Tensor], Tensor] | None:
    """The method in a few lines of torch: Gram matrix, weights, ``w @ J``."""
    if name == "mean":
        return lambda jac: jac.mean(0)
    if name == "pcgrad":
        return lambda jac: pcgrad_weights(jac @ jac.T).to(jac.dtype) @ jac
    return None


def pcgrad_weights(gram: Tensor) -> Tensor:
    """PCGrad's weights (sum form), [T, T] -> [T]: flatmtl's reference operator."""
    tasks = gram.shape[0]
    order = torch.rand(tasks, tasks, device=gram.device).argsort(1)
    return reference.solve_pcgrad(gram[None], order[None])[0][0]


def pcgrad_on_gradients(jac: Tensor) -> Tensor:
    """PCGrad as published and as trainer frameworks run it (LibMTL): on the gradients themselves.

    Every task's gradient is copied, held against every other one at full length, and projected at
    full length; the projected gradients are added up in Python (Yu et al., arXiv 2001.06782, Alg. 1).
    """
    rows = list(jac.unbind())
    projected = [row.clone() for row in rows]
    for i, own in enumerate(projected):
        for j in random.sample(range(len(rows)), len(rows)):
            if j == i:
                continue
            dot = own @ rows[j]
            if dot < 0:
                own -= dot / rows[j].norm().square() * rows[j]
    return sum(projected)


# ---------------------------------------------------------------- solvers, G -> w

Solve = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Solver:
    """How one rival solves one method.

    Attributes:
        make: (T) -> a solver as new, with no state.
        takes: "gram", float32 [T, T], or "factor": float32 [T, T] whose rows have that Gram matrix, for
            those that want the gradients themselves.
        weights: (what the solver returned, what it took) -> float64 [T], in the scale of the paper.
    """

    make: Callable[[int], Solve]
    takes: str = "gram"
    weights: Callable[[Any, Tensor], Array] = lambda result, _: np.asarray(result, np.float64)

    def inputs(self, gram: Tensor) -> Tensor:
        """What the solver takes, from a float64 Gram matrix."""
        return (torch.linalg.cholesky(gram) if self.takes == "factor" else gram).float()


def solvers(name: str) -> dict[str, Solver]:
    """The rivals of one method that are installed: "TorchJD", "LibMTL's maths"."""
    found = {}
    if torchjd is not None and name in _TORCHJD:
        found["TorchJD"] = _TORCHJD[name]
    if name in _PUBLISHED:
        found["LibMTL's maths"] = _PUBLISHED[name]
    return {rival: solver for rival, solver in found.items() if _works(solver)}


def torchjd_weighting(name: str, tasks: int = 0) -> Solve | None:
    """TorchJD's weighting for a Gram matrix on any device; None without one."""
    solver = solvers(name).get("TorchJD")
    return solver.make(tasks) if solver is not None and solver.takes == "gram" else None


def _works(solver: Solver) -> bool:
    try:
        solver.make(2)
    except ImportError:
        return False
    return True


def _weights_of_update(update: Tensor, factor: Tensor) -> Array:
    """d = F'w for w."""
    rows = factor.double()
    return torch.linalg.solve(rows.T, update.double()).numpy()


def _torchjd_solver(name: str, *options: Any, **named: Any) -> Solver:
    return Solver(lambda _: getattr(_torchjd, name)(*options, **named))


_TORCHJD: dict[str, Solver] = {
    "mean": _torchjd_solver("MeanWeighting"),
    "sum": _torchjd_solver("SumWeighting"),
    "constant": Solver(lambda tasks: _torchjd.ConstantWeighting(torch.ones(tasks))),
    "pcgrad": _torchjd_solver("PCGradWeighting"),
    "gradvac": _torchjd_solver("GradVacWeighting"),
    "mgda": _torchjd_solver("MGDAWeighting"),
    "cagrad": _torchjd_solver("CAGradWeighting", CAGRAD_C),
    # its NashMTL wants the Jacobian; max_norm=0: not clipped
    "nash_mtl": Solver(lambda tasks: _torchjd.NashMTL(tasks, max_norm=0.0).weighting, "factor"),
    "fairgrad": _torchjd_solver("FairGradWeighting", FAIRGRAD_ALPHA),
    "imtl_g": _torchjd_solver("IMTLGWeighting"),
    "aligned_mtl": Solver(lambda tasks: _torchjd.AlignedMTLWeighting(torch.ones(tasks))),
    "upgrad": _torchjd_solver("UPGradWeighting"),
    "dualproj": _torchjd_solver("DualProjWeighting"),
    "config": Solver(lambda _: _torchjd.ConFIG(), "factor", _weights_of_update),
    "pcd": _torchjd_solver("PCDWeighting"),
    "krum": _torchjd_solver("KrumWeighting", KRUM_BYZANTINE),
    "sdmgrad": _torchjd_solver("SDMGradWeighting"),
    "modo": _torchjd_solver("MoDoWeighting"),
    "cr_mogm": Solver(lambda _: _torchjd.CRMOGMWeighting(_torchjd.UPGradWeighting())),
    "rlw": _torchjd_solver("RandomWeighting"),
}


# ---------------------------------------------------------------- solvers from their descriptions


class _NashCcp:
    """Nash-MTL by the convex-concave procedure (Navon et al., arXiv 2202.01017, section 3.2).

    With beta = G a: minimise sum(beta) + the linearisation at the last a of phi = sum log(a_i beta_i),
    subject to log a_i + log beta_i >= 0, 20 times at most, each a conic program for ECOS. As in the
    published code G is divided by its Frobenius norm, the constraint brings the factor back, an early
    stop looks at the divided equation, and where the program fails the last a stays (ones at first).
    """

    def __init__(self, tasks: int) -> None:
        import cvxpy

        self._cvxpy = cvxpy
        self._solver = "ECOS" if "ECOS" in cvxpy.installed_solvers() else None
        self._last = np.ones(tasks)

    def __call__(self, gram: Tensor) -> Array:
        raw = gram.numpy().astype(np.float64)
        norm = np.linalg.norm(raw)
        scaled = raw / norm
        for _ in range(20):
            weights = self._subproblem(scaled, norm, self._last)
            if weights is None:
                break
            step, self._last = np.linalg.norm(weights - self._last), weights
            if step < 1e-6 or np.linalg.norm(scaled @ weights - 1 / weights) < 1e-3:
                break
        return self._last

    def _subproblem(self, gram: Array, norm: float, last: Array) -> Array | None:
        cvxpy = self._cvxpy
        slope = 1 / last + gram.T @ (1 / (gram @ last))
        weights = cvxpy.Variable(len(last), nonneg=True)
        beta = gram @ weights
        problem = cvxpy.Problem(
            cvxpy.Minimize(cvxpy.sum(beta) + slope @ (weights - last) / norm),
            [cvxpy.log(weights * norm) + cvxpy.log(beta) >= 0],
        )
        limits = {"max_iters": 100} if self._solver else {}
        try:
            problem.solve(solver=self._solver, **limits)
        except (cvxpy.SolverError, ValueError):
            return None
        value = weights.value
        return None if value is None or not (value > 0).all() else value


def _mgda_line_search(gram: Tensor) -> Array:
    """Sener and Koltun (arXiv 1810.04650) as published: from the best pair of tasks, at most 250 steps.

    A step is along the negative gradient in the plane sum w = 1 to the simplex's first face, back onto
    the simplex, and to the shortest vector on the line between. It ends where w changes by below 1e-5.
    """
    matrix = gram.numpy()
    tasks = len(matrix)
    own = np.diag(matrix)

    def share(first: Any, cross: Any, second: Any) -> Any:
        """Of the first of two vectors in their shortest convex combination, kept off 0 and 1."""
        inner = (second - cross) / np.maximum(first + second - 2 * cross, 1e-30)
        return np.where(cross >= first, 0.999, np.where(cross >= second, 0.001, inner))

    shares = share(own[:, None], matrix, own[None])
    lengths = (
        shares**2 * own[:, None] + (1 - shares) ** 2 * own + 2 * shares * (1 - shares) * matrix
    )
    lengths[np.diag_indices(tasks)] = np.inf
    i, j = np.unravel_index(np.argmin(lengths), lengths.shape)
    w = np.zeros(tasks)
    w[i], w[j] = shares[i, j], 1 - shares[i, j]
    for _ in range(250):
        slope = matrix @ w
        direction = slope.mean() - slope
        down, up = direction < 0, direction > 0
        ends = np.concatenate([-w[down] / direction[down], (1 - w[up]) / direction[up]])
        ends = ends[ends > 1e-7]
        target = _on_simplex(w + (ends.min() if len(ends) else 1.0) * direction)
        a, b, c = w @ matrix @ w, w @ matrix @ target, target @ matrix @ target
        kept = float(share(a, b, c))
        new = kept * w + (1 - kept) * target
        change, w = np.abs(new - w).sum(), new
        if change < 1e-5:
            break
    return w


def _on_simplex(point: Array) -> Array:
    down = np.sort(point)[::-1]
    excess = (np.cumsum(down) - 1) / np.arange(1, len(point) + 1)
    return np.maximum(point - excess[np.nonzero(down > excess)[0][-1]], 0)


def _cagrad_slsqp(gram: Tensor) -> Array:
    """CAGrad's dual by scipy's SLSQP from the mean, eps 1e-8 under the roots; without a rescaling."""
    from scipy.optimize import minimize

    matrix = gram.numpy().astype(np.float64)
    tasks = len(matrix)
    toward, radius = matrix.mean(1), CAGRAD_C * np.sqrt(matrix.mean() + 1e-8)
    found = minimize(
        lambda w: w @ toward + radius * np.sqrt(w @ matrix @ w + 1e-8),
        np.full(tasks, 1 / tasks),
        method="SLSQP",
        bounds=[(0, 1)] * tasks,
        constraints={"type": "eq", "fun": lambda w: 1 - w.sum()},
    ).x
    return 1 / tasks + radius / np.sqrt(found @ matrix @ found + 1e-8) * found


def _fairgrad_least_squares(gram: Tensor) -> Array:
    """FairGrad's equation as a least-squares problem with numerical derivatives, scipy's defaults."""
    from scipy.optimize import least_squares

    matrix, tasks = gram.numpy(), len(gram)
    start = np.full(tasks, 1 / tasks)
    residual = lambda w: matrix @ w - w ** (-1 / FAIRGRAD_ALPHA)  # noqa: E731
    return least_squares(residual, start, bounds=(0, np.inf)).x


def _upgrad_quadprog(gram: Tensor) -> Array:
    """UPGrad's T programs by quadprog, on G over its trace (0 below 1e-4) with a ridge of 1e-4."""
    from quadprog import solve_qp

    matrix = gram.numpy().astype(np.float64)
    tasks, eye = len(matrix), np.eye(len(matrix))
    trace = np.trace(matrix)
    matrix = (matrix / trace if trace >= 1e-4 else 0 * matrix) + 1e-4 * eye
    return sum(solve_qp(matrix, np.zeros(tasks), eye, unit / tasks)[0] for unit in eye)


def _imtl_g_inverse(gram: Tensor) -> Tensor:
    """IMTL-G's closed form: the inverse of the (T-1) x (T-1) products of g_1 - g_k and u_1 - u_l."""
    norms = gram.diagonal().sqrt()
    cross = gram / norms  # <g_k, u_l>
    difference = cross[:1, :1] - cross[:1] - cross[:, :1] + cross
    rest = (cross[0, 0] - cross[0, 1:]) @ torch.inverse(difference[1:, 1:])
    return torch.cat([1 - rest.sum(0, keepdim=True), rest])


def _aligned_eigh(gram: Tensor) -> Tensor:
    """Aligned-MTL by eigenvalues, cut at T eps of the largest, scaled by the least; the sum."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > values[-1] * len(values) * torch.finfo(gram.dtype).eps
    values, vectors = values[kept], vectors[:, kept]
    return values[0].sqrt() * (vectors / values.sqrt()) @ vectors.sum(0)


def _needing(package: str, solve: Solve) -> Solver:
    def make(_: int) -> Solve:
        if find_spec(package) is None:
            raise ImportError(package)
        return solve

    return Solver(make)


_PUBLISHED: dict[str, Solver] = {
    "nash_mtl": Solver(_NashCcp),
    "mgda": Solver(lambda _: _mgda_line_search),
    "cagrad": _needing("scipy", _cagrad_slsqp),
    "fairgrad": _needing("scipy", _fairgrad_least_squares),
    "upgrad": _needing("quadprog", _upgrad_quadprog),
    "imtl_g": Solver(lambda _: _imtl_g_inverse),
    "aligned_mtl": Solver(lambda _: _aligned_eigh),
}
