"""What tells how tasks and methods compare: gradients, features, tables of results, rankings."""

from flatmtl.measures.features import feature_overlap, feature_saliency
from flatmtl.measures.gradients import conflict_share, gradient_cosines, mean_cosine, norm_ratios
from flatmtl.measures.rankings import kendall, permutation_p, spearman
from flatmtl.measures.tables import MeanInterval, delta_m, mean_interval, mean_rank

__all__ = [
    "MeanInterval",
    "conflict_share",
    "delta_m",
    "feature_overlap",
    "feature_saliency",
    "gradient_cosines",
    "kendall",
    "mean_cosine",
    "mean_interval",
    "mean_rank",
    "norm_ratios",
    "permutation_p",
    "spearman",
]
