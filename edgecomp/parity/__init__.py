"""Parity: how close a runner's outputs are to the original's goldens, and whether that is close enough."""

from edgecomp.parity.check import OutputParity, ParityReport, check_bucket, read_goldens
from edgecomp.parity.metrics import Difference, compare

__all__ = ["Difference", "OutputParity", "ParityReport", "check_bucket", "compare", "read_goldens"]
