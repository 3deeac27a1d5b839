"""What a search exports: the method's budgets, the uncompressed model, and what both are compared with."""

from __future__ import annotations

import shutil
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from edgecomp.api._export import export
from edgecomp.api._progress import Progress
from edgecomp.api._request import read_order
from edgecomp.bundle import Bundle, open_bundle
from edgecomp.errors import ExportError, InvalidSpec, MissingDependency, SpecError
from edgecomp.search.run import Made
from edgecomp.search.space import Family, Subject, name_of
from edgecomp.specs import load_recipe
from edgecomp.specs.manifest import Manifest
from edgecomp.specs.precision import PrecisionPlan

__all__ = ["Exporter", "ModelAsked", "baselines_of", "describe"]

_OWN_TABLES = ("piecewise", "table")  # schedules that a user's table makes, so that there is nothing to choose
_PLACES = ("source_map", "index")  # outputs that say where tokens come from: they are the host's own


class ModelAsked(msgspec.Struct, frozen=True, kw_only=True):
    """What is searched, as `api.export` takes it."""

    method: str
    recipe: str = ""
    preset: str = ""
    backbone: str = ""
    weights: str = ""
    backbone_weights: str = ""
    image_size: int = 0
    feature_layer: int = 0
    output: str = ""
    input_dtype: str = ""
    batch: int = 1
    rest: str = ""
    fp32: tuple[str, ...] = ()
    calibration: str = ""
    calibration_images: int = 0
    opset: int = 0
    params: Mapping[str, Any] = {}


class Described(msgspec.Struct, frozen=True):
    """The subject, and whether the plain model is the very network that the method stands in."""

    subject: Subject
    output: str
    is_same_network: bool


def describe(asked: ModelAsked) -> Described:
    """Build the model once, to learn what can be searched: torch is needed, nothing is exported.

    Raises:
        SpecError, WeightsError, MissingDependency: as `api.export`.
    """
    order = read_order(
        asked.method, asked.recipe, asked.preset, asked.backbone, asked.weights, asked.backbone_weights, (), 1,
        asked.image_size, asked.feature_layer, asked.output, asked.input_dtype, asked.params, False, "", None,
        "random", 0, 0,
    )  # fmt: skip
    try:
        from edgecomp.backbones.assemble import assemble
        from edgecomp.compressors import compressor_class
    except ImportError as error:
        raise MissingDependency(error.name or str(error), needed_for="`edgecomp search`", extra="cpu") from error
    assembly = assemble(order)
    compressor = assembly.models[0].compressor
    schedules: tuple[str, ...] = ()
    if assembly.placement == "inside" and "schedule" not in asked.params:
        hints = typing.get_type_hints(type(compressor.params), include_extras=False)
        if typing.get_origin(hints.get("schedule")) is Literal:
            own = compressor.params.schedule
            every = [word for word in typing.get_args(hints["schedule"]) if word not in _OWN_TABLES]
            schedules = tuple(dict.fromkeys((own, *every)))
    places = [spec.name for spec in compressor.output_specs() if spec.name in _PLACES]
    is_host = assembly.plain is not None and assembly.placement in ("inside", "after")
    cls = compressor_class(order.recipe.method)
    possible = cls.possible_counts(compressor.params, compressor.site)
    subject = Subject(
        method=order.recipe.method,
        preset=assembly.preset,
        placement=assembly.placement,
        backbone=assembly.backbone,
        tokens_in=cls.count_tokens(compressor.params, compressor.site),
        rule=order.recipe.rule(assembly.preset).narrowed(possible),
        schedules=schedules,
        has_plain=assembly.plain is not None,
        image_size=assembly.image_size,
        feature_layer=assembly.feature_layer,
    )
    return Described(subject, assembly.output, is_host and (assembly.output == "logits" or bool(places)))


def baselines_of(described: Described) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the methods to compare with, each with its form, and those that cannot stand there, with the reason."""
    subject, taken, refused = described.subject, [], []
    for method, form in (("attention-pruning", "random"), ("token-pooling", "")):
        recipe, why = load_recipe(method), ""
        if method == subject.method:
            continue
        if subject.placement not in ("inside", "after") or not subject.has_plain:
            why = f"{subject.method} stands in no host here ({subject.placement}), and {method} needs one"
        elif described.output not in recipe.outputs:
            why = f"{method} gives {', '.join(recipe.outputs)}, and {described.output} are compared"
        (refused.append((method, why)) if why else taken.append((method, form)))
    return taken, refused


class Exporter:
    """Exports families into bundles of one folder; a bundle that is there already is taken as it is."""

    def __init__(self, asked: ModelAsked, subject: Subject, folder: Path, say: Progress) -> None:
        self.asked, self.subject, self.folder, self.say = asked, subject, folder, say

    def _backbone(self) -> str:
        """Return the host as it was asked for, a folder by its path; else as the model has it."""
        has_host = self.subject.placement in ("inside", "after")
        return self.asked.backbone or (self.subject.backbone if has_host else "")

    def __call__(self, family: Family, budgets: Sequence[int], *, with_plain: bool) -> Sequence[Made]:
        """Return the graphs; see `edgecomp.search.run.Export`."""
        words = [family.key, *map(str, budgets), *(["plain"] if with_plain else [])]
        out = self.folder / "-".join(words)
        self.say(f"exporting {out.name}")
        report = export(
            **self._of(family),
            backbone=self._backbone(),
            budget=list(budgets),
            stem=False,  # whole graphs: what is measured is what one budget exports to
            with_plain=with_plain,
            out=out,
            force=True,
            progress=self.say,
        )
        return made_of(family, out, report.manifest)

    def plain(self, family: Family, budgets: Sequence[int]) -> Made:
        """Return the uncompressed model, as it comes beside the first of these budgets that can be exported.

        Raises:
            ExportError, SpecError: none of them can.
        """
        problem: ExportError | SpecError | None = None
        for count in dict.fromkeys((budgets[len(budgets) // 2], *budgets)):
            try:
                return next(one for one in self(family, (count,), with_plain=True) if one.family.role == "plain")
            except (ExportError, SpecError) as error:
                self.say(f"budget {count} gives no uncompressed model: {error}")
                problem = error
        raise problem or InvalidSpec(f"{family.method} has no budget to search")

    def _of(self, family: Family) -> dict[str, Any]:
        asked = self.asked
        plan = PrecisionPlan.asked(family.precision, "", ())
        of_precision = {
            "precision": family.precision,
            "rest": asked.rest if plan.quantized else "",
            "fp32": asked.fp32 if (asked.rest or plan.rest) != "fp32" else (),
            "calibration": asked.calibration if plan.needs_samples else "",
            "calibration_images": asked.calibration_images if plan.needs_samples and asked.calibration else 0,
        }
        shared = {
            "backbone_weights": asked.backbone_weights,
            "output": asked.output,
            "input_dtype": asked.input_dtype,
            "batch": asked.batch,
        }
        if family.role == "baseline":
            placement: Any = self.subject.placement
            recipe = load_recipe(family.method)
            preset = recipe.placements.get(placement, recipe.placements["after"])
            params = {"score": "random"} if family.schedule == "random" else {}
            host = {"image_size": self.subject.image_size, "feature_layer": self.subject.feature_layer}
            return {"method": family.method, "preset": preset, "params": params, **host, **shared, **of_precision}
        params = dict(asked.params)
        if family.schedule:
            params["schedule"] = family.schedule
        named = {"recipe": asked.recipe} if asked.recipe else {"method": asked.method}
        return {
            **named, "preset": self.subject.preset, "weights": asked.weights, "opset": asked.opset, "params": params,
            "image_size": asked.image_size, "feature_layer": asked.feature_layer, **shared, **of_precision,
        }  # fmt: skip

    def remove_all_but(self, kept: Sequence[str]) -> None:
        """Remove bundles that nobody needs any more."""
        for bundle in self.folder.iterdir() if self.folder.is_dir() else ():
            if bundle.is_dir() and bundle.name not in kept:
                shutil.rmtree(bundle, ignore_errors=True)

    def open(self, family: Family, tokens: int, bundle: str) -> Bundle:
        """Return the bundle that holds a candidate; exported again, alone, where it is not there."""
        path = self.folder / bundle
        if not bundle or not path.is_dir():
            path = self(family, (tokens,), with_plain=False)[0].bundle
        return open_bundle(path)


def made_of(family: Family, folder: Path, manifest: Manifest) -> list[Made]:
    """Return the graphs of a bundle as candidates."""
    made = [
        Made(name_of(family, one.budget.tokens_out), family, one.budget.tokens_out, folder, one.model, one.flops)
        for one in manifest.buckets
    ]
    plain = Family("plain", "", family.precision)
    tokens_in = manifest.buckets[0].budget.tokens_in
    made += [Made(name_of(plain, tokens_in), plain, tokens_in, folder, one.model, one.flops) for one in manifest.plain]
    if len({one.name for one in made}) != len(made):
        raise InvalidSpec(f"bundle {folder} holds several batch sizes; a search takes one")
    return made
