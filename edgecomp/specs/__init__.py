"""Frozen nouns and their TOML loaders. No torch, numpy or ONNX here."""

from edgecomp.specs.budget import BudgetRule, TokenBudget, parse_budget, read_count
from edgecomp.specs.oplist import OpList, OpRule, Refusal, load_oplists
from edgecomp.specs.plugin import Plugin, load_plugin, plugin_names
from edgecomp.specs.preprocess import Preprocess
from edgecomp.specs.recipe import Preset, Recipe, Tolerance, load_recipe, method_names
from edgecomp.specs.site import Output, Placement, Site
from edgecomp.specs.target import Target, load_target, target_names
from edgecomp.specs.tensor import DType, TensorSpec

__all__ = [
    "BudgetRule",
    "DType",
    "OpList",
    "OpRule",
    "Output",
    "Placement",
    "Plugin",
    "Preprocess",
    "Preset",
    "Recipe",
    "Refusal",
    "Site",
    "Target",
    "TensorSpec",
    "TokenBudget",
    "Tolerance",
    "load_oplists",
    "load_plugin",
    "load_recipe",
    "load_target",
    "method_names",
    "parse_budget",
    "plugin_names",
    "read_count",
    "target_names",
]
