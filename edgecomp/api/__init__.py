"""The public functions of edgecomp, one a verb and a file; each returns a value and prints nothing.

    from edgecomp import api
    report = api.export("lookupvit", budget=[25, 49])
    assert api.parity(report.bundle)

Each is imported when it is first used, so that `edgecomp.api` costs nothing by itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgecomp.api._build import build
    from edgecomp.api._calibrate import calibrate
    from edgecomp.api._check import check
    from edgecomp.api._compare import compare
    from edgecomp.api._doctor import doctor
    from edgecomp.api._draw import draw
    from edgecomp.api._estimate import estimate
    from edgecomp.api._evaluate import evaluate
    from edgecomp.api._export import export
    from edgecomp.api._inspect import inspect
    from edgecomp.api._listing import list_backbones, list_methods, list_routers, list_targets
    from edgecomp.api._methods import compare_methods
    from edgecomp.api._pack import pack, unpack
    from edgecomp.api._parity import parity
    from edgecomp.api._plugin import plugin_build, plugin_check, plugin_list
    from edgecomp.api._profile import profile
    from edgecomp.api._remote import remote
    from edgecomp.api._report import report
    from edgecomp.api._results import results_check, results_diff, results_list, results_show
    from edgecomp.api._run import run
    from edgecomp.api._search import search
    from edgecomp.api._target import target_calibrate
    from edgecomp.api._verify import verify

__all__ = [
    "build",
    "calibrate",
    "check",
    "compare",
    "compare_methods",
    "doctor",
    "draw",
    "estimate",
    "evaluate",
    "export",
    "inspect",
    "list_backbones",
    "list_methods",
    "list_routers",
    "list_targets",
    "pack",
    "parity",
    "plugin_build",
    "plugin_check",
    "plugin_list",
    "profile",
    "remote",
    "report",
    "results_check",
    "results_diff",
    "results_list",
    "results_show",
    "run",
    "search",
    "target_calibrate",
    "unpack",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'edgecomp.api' has no attribute {name!r}")
    verb = name.partition("_")[0]
    module = {"list": "_listing", "unpack": "_pack"}.get(verb, f"_{verb}")
    module = "_methods" if name == "compare_methods" else module
    return getattr(importlib.import_module(f"edgecomp.api.{module}"), name)
