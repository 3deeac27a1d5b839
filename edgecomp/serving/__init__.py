"""A bundle as one object, for products: an image in, tokens out, one of its graphs chosen for each request."""

from __future__ import annotations

from edgecomp.serving.model import Answer, Model, RoutedRunner, load
from edgecomp.serving.stats import BucketStats, Stats

__all__ = ["Answer", "BucketStats", "Model", "RoutedRunner", "Stats", "load"]
