"""Parity: how close a runner's outputs are to the original's goldens, and whether that is close enough."""

from edgecomp.parity.check import (
    CASES,
    NO_LIMITS,
    OutputParity,
    ParityReport,
    SelectionParity,
    SelfTest,
    cases_of,
    check_bucket,
    expected_of,
    inputs_of,
    judge,
    read_goldens,
    rows_of,
)
from edgecomp.parity.forced import check_selection
from edgecomp.parity.layers import Culprit, LayerParity, find_culprits, judge_layer
from edgecomp.parity.limits import Limits, read_limits
from edgecomp.parity.metrics import Difference, compare
from edgecomp.parity.selection import ChoiceParity, Flip, judge_choices
from edgecomp.parity.self_test import question_runner

__all__ = [
    "CASES",
    "NO_LIMITS",
    "ChoiceParity",
    "Culprit",
    "Difference",
    "Flip",
    "LayerParity",
    "Limits",
    "OutputParity",
    "ParityReport",
    "SelectionParity",
    "SelfTest",
    "cases_of",
    "check_bucket",
    "check_selection",
    "compare",
    "expected_of",
    "find_culprits",
    "inputs_of",
    "judge",
    "judge_choices",
    "judge_layer",
    "question_runner",
    "read_goldens",
    "read_limits",
    "rows_of",
]
