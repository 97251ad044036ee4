"""Weightings: from the Gram matrix of the task gradients to one weight a task."""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple

from flatmtl.weighting._base import SolveStatus, Weighting
from flatmtl.weighting.aligned_mtl import AlignedMTL
from flatmtl.weighting.bmtl import BMTL
from flatmtl.weighting.cagrad import CAGrad
from flatmtl.weighting.config import ConFIG
from flatmtl.weighting.constant import Constant
from flatmtl.weighting.cr_mogm import CRMOGM
from flatmtl.weighting.db_mtl import DBMTL
from flatmtl.weighting.dualproj import DualProj
from flatmtl.weighting.dwa import DWA
from flatmtl.weighting.emtl_like import EMTLLike
from flatmtl.weighting.excess_mtl import ExcessMTL
from flatmtl.weighting.fairgrad import FairGrad
from flatmtl.weighting.famo import FAMO
from flatmtl.weighting.gls import GLS
from flatmtl.weighting.go4align import GO4Align
from flatmtl.weighting.graddrop import GradDrop
from flatmtl.weighting.gradnorm import GradNorm
from flatmtl.weighting.gradvac import GradVac
from flatmtl.weighting.imtl import IMTL
from flatmtl.weighting.imtl_g import IMTLG
from flatmtl.weighting.imtl_l import IMTLL
from flatmtl.weighting.krum import Krum
from flatmtl.weighting.mean import Mean
from flatmtl.weighting.mgda import MGDA
from flatmtl.weighting.moco import MoCo
from flatmtl.weighting.modo import MoDo
from flatmtl.weighting.nash_mtl import NashMTL
from flatmtl.weighting.pcd import PCD
from flatmtl.weighting.pcgrad import PCGrad
from flatmtl.weighting.pivrg import PIVRG
from flatmtl.weighting.random_loss import RandomLossWeighting
from flatmtl.weighting.scale_invariant import ScaleInvariant
from flatmtl.weighting.sdmgrad import SDMGrad
from flatmtl.weighting.slaw import SLAW
from flatmtl.weighting.stch import STCH
from flatmtl.weighting.sum import Sum
from flatmtl.weighting.trimmed_mean import TrimmedMean
from flatmtl.weighting.upgrad import UPGrad
from flatmtl.weighting.uw import UncertaintyWeighting

__all__ = [
    "BMTL",
    "CRMOGM",
    "DBMTL",
    "DWA",
    "FAMO",
    "GLS",
    "IMTL",
    "IMTLG",
    "IMTLL",
    "METHODS",
    "MGDA",
    "PCD",
    "PIVRG",
    "SLAW",
    "STCH",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "Constant",
    "DualProj",
    "EMTLLike",
    "ExcessMTL",
    "FairGrad",
    "GO4Align",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "Krum",
    "Mean",
    "MethodInfo",
    "MoCo",
    "MoDo",
    "NashMTL",
    "PCGrad",
    "RandomLossWeighting",
    "SDMGrad",
    "ScaleInvariant",
    "SolveStatus",
    "Sum",
    "TrimmedMean",
    "UPGrad",
    "UncertaintyWeighting",
    "Weighting",
    "by_name",
    "methods",
]

#: name -> class
METHODS: dict[str, type[Weighting]] = {
    "mean": Mean,
    "sum": Sum,
    "constant": Constant,
    "pcgrad": PCGrad,
    "gradvac": GradVac,
    "mgda": MGDA,
    "cagrad": CAGrad,
    "nash_mtl": NashMTL,
    "fairgrad": FairGrad,
    "imtl_g": IMTLG,
    "aligned_mtl": AlignedMTL,
    "upgrad": UPGrad,
    "dualproj": DualProj,
    "config": ConFIG,
    "pivrg": PIVRG,
    "pcd": PCD,
    "krum": Krum,
    "sdmgrad": SDMGrad,
    "modo": MoDo,
    "cr_mogm": CRMOGM,
    "rlw": RandomLossWeighting,
    "slaw": SLAW,
    "famo": FAMO,
    "uw": UncertaintyWeighting,
    "imtl_l": IMTLL,
    "dwa": DWA,
    "gls": GLS,
    "si": ScaleInvariant,
    "bmtl": BMTL,
    "stch": STCH,
    "go4align": GO4Align,
    "imtl": IMTL,
    "gradnorm": GradNorm,
    "emtl_like": EMTLLike,
    "graddrop": GradDrop,
    "trimmed_mean": TrimmedMean,
    "moco": MoCo,
    "db_mtl": DBMTL,
    "excess_mtl": ExcessMTL,
}


def _plain(name: str) -> str:
    """A name without what does not matter in it."""
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


_BY_PLAIN_NAME = {_plain(name): cls for name, cls in METHODS.items()}
_BY_PLAIN_NAME[_plain("random_loss_weighting")] = RandomLossWeighting


class MethodInfo(NamedTuple):
    """What there is to know about a method.

    Attributes:
        name: for ``by_name``.
        cls: the class.
        paper: authors and title or venue.
        arxiv: number there, "" if none.
        year: of the paper.
        needs: what it looks at: "gram", "norms", "losses", "gram and losses", "norms and losses", "rows",
            "rows and losses", "cross-gram of two batches", "nothing".
        state: what it keeps from call to call, "" if nothing.
    """

    name: str
    cls: type[Weighting]
    paper: str
    arxiv: str
    year: int
    needs: str
    state: str


def methods() -> list[MethodInfo]:
    """All methods, in the order of ``METHODS``."""
    return [
        MethodInfo(name, cls, cls.paper, cls.arxiv, cls.year, cls.needs, cls.state)
        for name, cls in METHODS.items()
    ]


def by_name(name: str, **options: Any) -> Weighting:  # noqa: ANN401
    """A weighting by its name, as in ``by_name("pcgrad", seed=3)``.

    Args:
        name: one of ``METHODS``, or "random_loss_weighting"; upper and lower case, "-", "_" and spaces
            do not matter.
        **options: the method's own.

    Raises:
        TypeError, ValueError: no method has that name.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}")
    method = _BY_PLAIN_NAME.get(_plain(name))
    if method is None:
        near = difflib.get_close_matches(name.lower(), METHODS, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"name must be one of {', '.join(sorted(METHODS))}, got {name!r}{hint}")
    return method(**options)
