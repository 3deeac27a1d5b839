"""Evaluation: accuracy on labelled images, beside the plain model's, and the speed of both. No torch here."""

from edgecomp.evaluation.data import Images, LabelledImages, balanced_subset, open_data, open_images
from edgecomp.evaluation.score import Comparison, Evaluation, GraphScore, score
from edgecomp.profiles.statistics import Estimate, median_interval, paired_drop, wilson

__all__ = [
    "Comparison",
    "Estimate",
    "Evaluation",
    "GraphScore",
    "Images",
    "LabelledImages",
    "balanced_subset",
    "median_interval",
    "open_data",
    "open_images",
    "paired_drop",
    "score",
    "wilson",
]
