"""Parity: how close a runner's outputs are to the original's goldens, and whether that is close enough."""

from edgecomp.parity.check import CASES, OutputParity, ParityReport, cases_of, check_bucket, judge, read_goldens
from edgecomp.parity.metrics import Difference, compare

__all__ = [
    "CASES",
    "Difference",
    "OutputParity",
    "ParityReport",
    "cases_of",
    "check_bucket",
    "compare",
    "judge",
    "read_goldens",
]
