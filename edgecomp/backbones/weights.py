"""What could be exported from a checkpoint, from names and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from edgecomp.backbones.choices import choose_budgets, choose_output, read_saved, settle
from edgecomp.compressors import compressor_class
from edgecomp.compressors._checkpoint import Checkpoint
from edgecomp.compressors._recognise import OWN, fitting, fitting_own, require_whole
from edgecomp.errors import EdgecompError
from edgecomp.specs import BudgetRule, Placement, load_recipe
from edgecomp.specs.layout import Match
from edgecomp.specs.order import Order

__all__ = ["Candidate", "candidates"]


class Candidate(msgspec.Struct, frozen=True):
    """What a method would make of a checkpoint.

    Attributes:
        params: the method's parameters, as the checkpoint's shapes decide them.
        decided: names of those that they do decide.
        tokens_in: 0 where a host decides.
        default: tokens kept where nothing is said.
        notes: what an export would say.
        problem: why it could not be exported; "" where it could.
    """

    method: str
    match: Match
    preset: str = ""
    placement: Placement = "after"
    params: dict[str, Any] = {}
    decided: tuple[str, ...] = ()
    width: int = 0
    tokens_in: int = 0
    default: tuple[int, ...] = ()
    rule: BudgetRule | None = None
    notes: tuple[str, ...] = ()
    problem: str = ""


def candidates(path: Path, given: Mapping[str, Any]) -> tuple[Checkpoint, tuple[Candidate, ...]]:
    """Return an open checkpoint, and what each method whose layout it fits would make of it."""
    checkpoint = Checkpoint(path)
    found = fitting(checkpoint.stored) or fitting_own(checkpoint.stored)
    return checkpoint, tuple(_candidate(checkpoint, method, match, given) for method, match in found)


def _candidate(checkpoint: Checkpoint, method: str, match: Match, given: Mapping[str, Any]) -> Candidate:
    try:
        if match.layout.name != OWN:
            require_whole(match, load_recipe(method), checkpoint.stored)
        checkpoint.stored.require_there(match.names.values())
        checkpoint.require_floats(match.names.values(), needed=match.needed)
        return _settled(checkpoint, method, match, given)
    except EdgecompError as error:
        return Candidate(method, match, problem=str(error))


def _settled(checkpoint: Checkpoint, method: str, match: Match, asked: Mapping[str, Any]) -> Candidate:
    recipe, cls = load_recipe(method), compressor_class(method)
    state, _ = cls.split_checkpoint(checkpoint.outline(match.names))
    notes = list(checkpoint.notes)
    inside = "inside" in recipe.placements and recipe.preset(recipe.defaults.preset).placement == "inside"
    backbone = "" if inside or match.layout.name == OWN else "none" if "after" in recipe.placements else ""
    order = Order(recipe=recipe, weights=str(checkpoint.path), backbone=backbone, params=asked)
    saved = read_saved(checkpoint, match, method, notes)
    preset, params = settle(order, cls, state, saved, notes)
    placement = recipe.preset(preset).placement
    decided = (*saved.params, *(saved.declared or ()), *cls.infer_params(state, params))
    made = Candidate(
        method, match, preset, placement, msgspec.to_builtins(params), tuple(dict.fromkeys(decided)),
        width=int(getattr(params, cls.width_param, 0)), rule=recipe.rule(preset), notes=tuple(notes),
    )  # fmt: skip
    if placement == "inside":
        return made
    size = saved.image_size or recipe.preset(preset).image_size or recipe.defaults.image_size
    site = cls.site_without_host(params, placement, size)
    budgets = choose_budgets(order, cls, preset, params, site, saved, notes)
    with torch.device("meta"):  # what loading would refuse, by keys and shapes alone
        module = cls(cls.for_budgets(params, [b.tokens_out for b in budgets]), site, budgets[-1], choose_output(order))
        module.to("meta")  # what transformers lets torch make on the CPU in spite of it
        module.load_original(state, unread=tuple(recipe.unread))
    return msgspec.structs.replace(
        made,
        tokens_in=cls.count_tokens(params, site),
        default=tuple(budget.tokens_out for budget in budgets),
        rule=recipe.rule(preset).narrowed(cls.possible_counts(params, site)),
        notes=tuple(notes),
    )
