"""Recipes: how a method becomes ONNX. One TOML file each, in `export/recipes/`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from edgecomp.errors import InvalidSpec, UnknownName
from edgecomp.resources import data_path
from edgecomp.specs._toml import read_toml
from edgecomp.specs.budget import BudgetRule
from edgecomp.specs.layout import Layout
from edgecomp.specs.precision import Rest, WrittenPrecision
from edgecomp.specs.router import router_names
from edgecomp.specs.site import Output, Placement

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = [
    "Defaults",
    "ImageStatistics",
    "Preset",
    "Recipe",
    "Source",
    "Then",
    "Tolerance",
    "followed_by",
    "load_recipe",
    "method_entry_points",
    "method_names",
]

Text = Annotated[str, Meta(min_length=3)]
Size = Annotated[int, Meta(ge=1, le=8192)]
Batch = Annotated[int, Meta(ge=1, le=4096)]


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the method comes from: paper, the code it is compared with, and that code's licence."""

    title: Text
    paper: Text
    upstream: Text
    commit: Text
    licence: Text


class ImageStatistics(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How images are prepared where no host says otherwise; see `Preprocess`."""

    crop: Annotated[float, Meta(gt=0, le=1)]
    interpolation: Literal["bicubic", "bilinear"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Tolerance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Thresholds of parity in one precision, and how they were derived.

    Attributes:
        max_rel: largest absolute error allowed, over the largest magnitude of the expected output.
        min_cosine: smallest cosine of any one token (last axis) allowed.
        derivation: the noise that was measured, how, and the factor on top of it.
    """

    max_rel: Annotated[float, Meta(gt=0)]
    min_cosine: Annotated[float, Meta(gt=0, le=1)]
    derivation: Annotated[str, Meta(min_length=20)]


class _Shared(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Thresholds of the precisions whose noise depends on the type and hardly on the method."""

    schema: Literal[1]
    tolerances: dict[WrittenPrecision, Tolerance]


class Preset(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A named size of a method.

    Attributes:
        summary: what it is, in one line.
        placement: where this size stands.
        params: the method's parameters; those left out have the method's defaults.
        budgets: the token counts it can be exported for; the recipe's where left out.
        image_size: the recipe's default where 0.
        backbone: host of an `after` or `inside` preset; the recipe's default where empty.
        layout: checkpoint layout that chooses this preset by its keys; empty for none.
    """

    summary: Text
    placement: Placement
    params: dict[str, Any] = {}
    budgets: BudgetRule | None = None
    image_size: Annotated[int, Meta(ge=0, le=8192)] = 0
    backbone: str = ""
    layout: str = ""


class Defaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What `edgecomp export` takes where the command line says nothing.

    Attributes:
        rest, fp32: of `precision`; they do not go with another one.
        input_dtype: `float32`, or `uint8`.
        weights, backbone_weights: `random`, `pretrained` (the backbone's alone), or a file; of the backbone also "": a
            folder's own, and random for all others.
        calibration, calibration_images: a folder of images for scales and ranges, and the most read of it.
        router: what picks a bucket where there are several; empty: nothing.
    """

    preset: str
    image_size: Size
    batch: tuple[Batch, ...]
    output: Output
    opset: Annotated[int, Meta(ge=18, le=20)]
    precision: WrittenPrecision
    backbone: str = "none"
    feature_layer: Annotated[int, Meta(le=-1)] = -1
    rest: Rest | Literal[""] = ""
    fp32: tuple[str, ...] = ()
    input_dtype: Literal["float32", "uint8"] = "float32"
    weights: str = "random"
    backbone_weights: str = ""
    calibration: str = ""
    calibration_images: Annotated[int, Meta(ge=0)] = 0
    router: str = ""


class Then(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A second method, which runs on the tokens of the first.

    Attributes:
        method: its name.
        preset: a named size of its recipe; its own for given tokens where empty.
        params: its parameters.
        between: tokens that the first hands it; 0: as many as the first keeps by default.
    """

    method: Annotated[str, Meta(pattern="^[a-z0-9][a-z0-9-]*$")]
    preset: str = ""
    params: dict[str, Any] = {}
    between: Annotated[int, Meta(ge=0, le=1 << 20)] = 0


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a method becomes ONNX, where it comes from, and how close its numbers must be.

    Attributes:
        schema: version of this file's layout.
        method: name of the compressor, equal to the file's stem for those that edgecomp ships.
        summary: one line for `edgecomp list methods`.
        level: parity level, E0 (data-independent shapes) to E4 (no runnable original).
        outputs: what `--output` may ask for.
        placements: default preset of each placement; the first is the method's own place.
        presets: named sizes; those whose name begins with `smoke` are what the tests run.
        layouts: how checkpoints of the originals name their tensors; see `Layout`.
        unread: checkpoint keys (shell patterns) that no forward pass reads, with the reason.
        extra_ops: ops outside the allow-lists that this method may use, with the reason.
        tolerances: of each precision; those that a file leaves out are the shared ones of `export/tolerances.toml`.
        invariances: changes of the input that cannot change the output, with the reason.
        then: another method, which runs on this one's tokens; budgets are then of what that one keeps.
    """

    schema: Literal[1]
    method: Annotated[str, Meta(pattern="^[a-z0-9][a-z0-9-]*$")]
    summary: Text
    level: Literal["E0", "E1", "E2", "E3", "E4"]
    source: Source
    outputs: tuple[Output, ...]
    defaults: Defaults
    budgets: BudgetRule
    placements: dict[Placement, str]
    presets: dict[str, Preset]
    preprocess: ImageStatistics
    tolerances: dict[WrittenPrecision, Tolerance]
    layouts: tuple[Layout, ...] = ()
    unread: dict[str, str] = {}
    extra_ops: dict[str, str] = {}
    invariances: dict[Literal["token-order"], str] = {}
    then: Then | None = None

    def __post_init__(self) -> None:
        for placement, preset in self.placements.items():
            if preset not in self.presets:
                raise ValueError(f"placements.{placement} names the preset {preset!r}, which is not under presets")
        if self.defaults.preset not in self.presets:
            raise ValueError(f"defaults.preset names {self.defaults.preset!r}, which is not under presets")
        if not self.smoke_presets:
            raise ValueError("no preset whose name begins with 'smoke'; the contracts need a small one")
        if self.defaults.router and self.defaults.router not in router_names():
            raise ValueError(
                f"defaults.router names {self.defaults.router!r}, which is none of {', '.join(router_names())}"
            )
        if self.defaults.precision not in self.tolerances:
            raise ValueError(f"tolerances lack defaults.precision, {self.defaults.precision!r}")

    @property
    def smoke_presets(self) -> tuple[str, ...]:
        """Names of the presets that the tests run."""
        return tuple(name for name in self.presets if name.startswith("smoke"))

    def preset(self, name: str) -> Preset:
        """Return a preset by name."""
        if name not in self.presets:
            raise UnknownName(f"preset of {self.method}", name, self.presets)
        return self.presets[name]

    def rule(self, preset: str) -> BudgetRule:
        """Return the token counts that a preset can be exported for."""
        return self.preset(preset).budgets or self.budgets


def followed_by(recipe: Recipe, then: Then) -> Recipe:
    """Return the recipe of two methods in a row: the wider tolerances, the ops and the parity level of both.

    Raises:
        InvalidSpec: the second names a method of its own to run then.
    """
    other = load_recipe(then.method)
    if other.then is not None:
        raise InvalidSpec(
            f"{recipe.method} then {other.method} then {other.then.method}, as the recipe of {other.method} says: two "
            "methods stand in a row, not three; name another with --then"
        )
    tolerances = {**other.tolerances, **recipe.tolerances}
    for precision in tolerances.keys() & other.tolerances.keys() & recipe.tolerances.keys():
        one, two = recipe.tolerances[precision], other.tolerances[precision]
        tolerances[precision] = Tolerance(
            max_rel=max(one.max_rel, two.max_rel),
            min_cosine=min(one.min_cosine, two.min_cosine),
            derivation=f"the wider of {recipe.method}'s and {other.method}'s. {one.derivation}",
        )
    return msgspec.structs.replace(
        recipe,
        level=max(recipe.level, other.level),
        tolerances=tolerances,
        extra_ops={**other.extra_ops, **recipe.extra_ops},
        invariances={},
        then=then,
    )


def method_entry_points() -> dict[str, EntryPoint]:
    """Return the methods that other packages add through the entry-point group `edgecomp.compressors`."""
    from importlib.metadata import entry_points  # 50 ms, which `edgecomp list targets` need not pay

    return {point.name: point for point in entry_points(group="edgecomp.compressors")}


def _shipped_methods() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in data_path("export", "recipes").glob("*.toml")))


def method_names() -> tuple[str, ...]:
    """Return the names of all methods: those that ship and those of other packages."""
    return tuple(sorted({*_shipped_methods(), *method_entry_points()}))


def load_recipe(name_or_path: str) -> Recipe:
    """Read the recipe of a method by its name, or any recipe by the path of its TOML file.

    A method of another package has its recipe beside its module: `pkg/foo.py` and `pkg/foo.toml`.
    """
    if name_or_path.endswith(".toml"):
        return _read(Path(name_or_path))
    if name_or_path in _shipped_methods():
        return _read(data_path("export", "recipes", f"{name_or_path}.toml"))
    points = method_entry_points()
    if name_or_path not in points:
        raise UnknownName("method", name_or_path, method_names(), hint="--recipe FILE takes a recipe of your own.")
    module = importlib.util.find_spec(points[name_or_path].module)
    if module is None or module.origin is None:
        raise InvalidSpec(
            f"method {name_or_path!r}: its entry point {points[name_or_path].value!r} names a module that is not "
            "there; reinstall the package that brings it"
        )
    return _read(Path(module.origin).with_suffix(".toml"))


def _read(path: Path) -> Recipe:
    """Read a recipe, and add the tolerances that all methods share."""
    recipe = read_toml(path, Recipe, what="recipe")
    shared = read_toml(data_path("export", "tolerances.toml"), _Shared, what="tolerances")
    return msgspec.structs.replace(recipe, tolerances={**shared.tolerances, **recipe.tolerances})
