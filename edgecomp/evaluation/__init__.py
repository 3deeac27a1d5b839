"""Evaluation: accuracy on labelled images, beside the plain model's, and the speed of both. No torch here."""

from edgecomp.evaluation.data import LabelledImages, balanced_subset, open_data
from edgecomp.evaluation.score import Comparison, Evaluation, GraphScore, score
from edgecomp.evaluation.statistics import Estimate, median_interval, paired_drop, wilson

__all__ = [
    "Comparison",
    "Estimate",
    "Evaluation",
    "GraphScore",
    "LabelledImages",
    "balanced_subset",
    "median_interval",
    "open_data",
    "paired_drop",
    "score",
    "wilson",
]
