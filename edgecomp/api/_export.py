"""`edgecomp export`: a recipe, weights and a place become a bundle."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgecomp.api._emulate import runnable
from edgecomp.api._forced import check_choices, half_of
from edgecomp.api._manifest import make_manifest
from edgecomp.api._progress import Progress, silent
from edgecomp.api._request import (
    CALIBRATION_IMAGES,
    asked_then,
    default_folder,
    read_order,
    request_digest,
    require_calibration,
    require_in_range,
)
from edgecomp.bundle import GOLDEN, MANIFEST, WEIGHTS, Bundle, new_bundle, open_bundle, require_free, seal
from edgecomp.errors import (
    BundleBusy,
    BundleError,
    InvalidSpec,
    MissingDependency,
    ParityError,
)
from edgecomp.evaluation.data import open_images
from edgecomp.lock import bundle_lock, lock_path
from edgecomp.parity import OutputParity, ParityReport, check_bucket, read_goldens
from edgecomp.parity.check import Judged, judge, label_of
from edgecomp.report.export import ExportReport
from edgecomp.runners.chain import open_graph
from edgecomp.specs import DType, Output, Recipe
from edgecomp.specs.manifest import Bucket, Manifest, PartGraph
from edgecomp.specs.order import Order
from edgecomp.specs.precision import PrecisionPlan

if TYPE_CHECKING:
    from torch import nn

    from edgecomp.backbones.assemble import Assembly
    from edgecomp.compressors._base import Compressor
    from edgecomp.export.samples import Sampled
    from edgecomp.runners import Array

__all__ = ["export"]

_ENOUGH = 16  # calibration images
_EXPORTER = threading.Lock()  # torch's exporter serves one thread at a time
_TIE = " (or two scores are closer than floating point tells apart, which another --seed shows)"


def export(
    method: str | Compressor = "",
    *,
    recipe: str | Path = "",
    preset: str = "",
    backbone: str | nn.Module = "",
    weights: str | Path = "",
    backbone_weights: str | Path = "",
    budget: str | int | Sequence[str | int] = (),
    align: int = 1,
    batch: int | Sequence[int] = (),
    image_size: int = 0,
    feature_layer: int = 0,
    prefix: str = "",
    output: Output | str = "",
    input_dtype: DType | str = "",
    precision: str = "",
    rest: str = "",
    fp32: Sequence[str] = (),
    calibration: str | Path = "",
    calibration_images: int = 0,
    opset: int = 0,
    params: Mapping[str, Any] | None = None,
    stem: bool = True,
    router: str = "",
    router_params: Mapping[str, Any] | None = None,
    router_weights: str | Path = "random",
    pad_to: int = 0,
    then: str = "",
    then_preset: str = "",
    then_params: Mapping[str, Any] | None = None,
    then_weights: str | Path = "random",
    between: int = 0,
    with_plain: bool = False,
    seed: int = 0,
    out: str | Path = "",
    force: bool = False,
    progress: Progress = silent,
) -> ExportReport:
    """Rewrite a compressor for static shapes, export it to ONNX, prove it in ONNX Runtime, and write a bundle.

    Empty strings, sequences and zeros mean the recipe's default, which is `random` for weights.

    Args:
        method: a method's name, or a `Compressor` of your own (a trained one keeps its weights).
        recipe: a recipe's TOML file, instead of `method`.
        preset: a named size of the recipe.
        backbone: a timm ViT's name, a folder of an image tower that transformers saved, a listed tower's name, `none`
            (tokens are the input), or a timm ViT or image tower of your own.
        weights: `random`, or the compressor's checkpoint, alone or in a whole model: a file (.safetensors, .pt), an
            index, or a folder of shards. A file that holds both compressor and host (keys `compressor.*` and
            `backbone.*`) serves for both.
        backbone_weights: `random`, `pretrained` (timm downloads them), or the host's checkpoint; "": `random`, and of a
            folder the weights in it.
        budget: tokens kept, each a count or a percentage such as "25%"; one bucket each.
        align: 1, or 8, 16 or 32: budgets are rounded up to a multiple of it, which hardware likes.
        batch: batch sizes; one graph for each budget and batch.
        image_size: side of the image in pixels, a multiple of the patch.
        feature_layer: which of the host's layers is compressed, counted from the end (-1: after the final norm).
        prefix: `drop` or `keep` the host's class and register tokens in front of a method after it; "": as the method
            takes them. One that takes patches alone is handed what is kept like patches.
        output: `tokens` or `logits`.
        input_dtype: `float32` (B, 3, S, S), normalised; or `uint8` (B, S, S, 3), raw RGB frames.
        precision: `fp32`; `fp16` or `bf16`, which all nodes compute in but the islands, which stay in fp32; `int8` or
            `fp8`, which linear layers compute in.
        rest: `fp16`, `bf16` or `fp32`: what int8 and fp8 leave; "": fp16.
        fp32: shell patterns of modules, with all inside them and from any dot of their path on (`blocks.3.mlp`,
            `blocks.*.attn.proj`), or of node names, that stay in fp32 beside the islands.
        calibration: a folder of images that scales of int8 and fp8, and the range check of fp16, are taken from; "":
            seeded inputs and the shipped photograph.
        calibration_images: the most that are read of it, chosen at random; 0: 64. Without `calibration` there are none.
        opset: 18 to 20; 22 with bf16.
        params: parameters of the method that replace the preset's.
        stem: with several budgets, write the part that all buckets share once, as `stem.onnx`; False: whole graphs.
        router: what picks a bucket for a request, as `edgecomp list routers` shows them, or `none`; "": the recipe's
            own, where there are several buckets.
        router_params: parameters of the router.
        router_weights: `random`, or the router's checkpoint, where it has weights.
        pad_to: rows that every bucket gives, prefix tokens among them, with `count` and `mask`; 0: as many as it keeps.
        then: a second method, which runs on the tokens of the first; budgets are then of what the second keeps.
        then_preset, then_params: its preset and parameters.
        then_weights: `random`, or its checkpoint.
        between: tokens that the first hands to the second; 0: as many as the first keeps by default.
        with_plain: add the uncompressed model as `plain.onnx`.
        seed: of random weights and golden inputs.
        out: the folder to write; default: a name made of method, preset or backbone, and size.
        force: replace another bundle at `out`.
        progress: takes one line for each stage.

    Returns:
        the report; its manifest says what was made.

    Raises:
        SpecError, WeightsError: the request cannot be; nothing was written.
        ExportError: torch, a static check or an op allow-list refuses the graph; nothing was written.
        EdgecompError: `out` is taken, in use or cannot be written; the old content is whole.
    """
    started = time.perf_counter()
    order = read_order(
        method, recipe, preset, backbone, weights, backbone_weights, budget, align, image_size, feature_layer, output,
        input_dtype, params, stem, router, router_params, router_weights, pad_to, seed, prefix,
        then=asked_then(then, then_preset, then_params, between), then_weights=then_weights,
    )  # fmt: skip
    batch = (batch,) if isinstance(batch, int) else batch
    defaults = order.recipe.defaults
    if precision in ("", defaults.precision):  # what the recipe says of its own precision
        rest, fp32 = rest or defaults.rest, tuple(fp32) or defaults.fp32
    plan = PrecisionPlan.asked(precision or defaults.precision, rest, tuple(fp32))
    if plan.needs_samples and not str(calibration):
        calibration, calibration_images = defaults.calibration, calibration_images or defaults.calibration_images
    opset, batches = plan.opset(opset or (0 if plan.rest == "bf16" else defaults.opset)), tuple(batch) or defaults.batch
    require_in_range(order, batches)
    require_calibration(plan, calibration, calibration_images)
    if str(calibration):
        calibration_images = calibration_images or CALIBRATION_IMAGES
    folder = Path(out) if str(out) else default_folder(order)
    request = request_digest(order, plan, opset, batches, with_plain, calibration, calibration_images)
    if (found := _unchanged(folder, request)) is not None:
        size = found.file(WEIGHTS).size
        if lock_path(folder).exists():  # what an export left that was killed after its last step
            with suppress(BundleBusy), bundle_lock(folder, "export", say=progress):
                pass
        return ExportReport(folder, found.manifest, True, None, time.perf_counter() - started, size)
    require_free(folder, force=force)

    progress("loading torch")
    try:
        from edgecomp.backbones.assemble import assemble
        from edgecomp.export.golden import write_goldens
        from edgecomp.export.graphs import write_graphs
    except ImportError as error:
        raise MissingDependency(error.name or str(error), needed_for="`edgecomp export`", extra="cpu") from error

    if importlib.util.find_spec("onnxruntime") is None:
        raise MissingDependency("onnxruntime", needed_for="the check at the end of `edgecomp export`", extra="cpu")
    progress("building the model")
    assembly = assemble(order)
    _require_fixed(assembly, order)
    if with_plain and assembly.plain is None:
        raise InvalidSpec(f"{order.recipe.method} on given tokens has no uncompressed model; drop --with-plain")
    sampled, image_notes = _samples(plan, assembly, calibration, calibration_images, order.seed, progress)
    with bundle_lock(folder, "export", say=progress), new_bundle(folder, force=force) as work:
        with _EXPORTER:
            graphs = write_graphs(
                work,
                assembly,
                order.recipe,
                opset=opset,
                precision=plan,
                samples=sampled.samples if sampled is not None else (),
                batches=batches,
                with_plain=with_plain,
                progress=progress,
            )
        progress("computing goldens with the original")
        judge_static = _StaticJudge(order.recipe)
        write_goldens(work, assembly, batch=max(batches), seed=order.seed, with_plain=with_plain, compare=judge_static)
        kinds = {"model": graphs.buckets, "plain": graphs.plain, "stem": graphs.stem, "router": graphs.router}
        roles = {graph.model: role for role, members in kinds.items() for graph in members}
        roles |= {WEIGHTS: "weights", GOLDEN: "golden"}
        manifest = seal(work, make_manifest(assembly, order, request, plan, opset, graphs, sampled, image_notes), roles)
        report = _check(work, folder, manifest, progress)
    size = next(entry.size for entry in manifest.files if entry.name == WEIGHTS)
    return ExportReport(folder, manifest, False, report, time.perf_counter() - started, size)


def _tie(recipe: Recipe) -> str:
    """Return what else may be the cause where a method chooses tokens."""
    return "" if recipe.level == "E0" else _TIE


class _StaticJudge:
    """Holds the static module to the original, before ONNX."""

    def __init__(self, recipe: Recipe) -> None:
        self.tolerance, self.tie = recipe.tolerances["fp32"], _tie(recipe)

    def __call__(self, case: str, output: str, got: Array, expected: Array) -> None:
        row = judge("the static rewrite", case, output, got, expected, self.tolerance)
        if not row:
            raise ParityError(
                f"the static rewrite does not give what the original gives: case {case}, output {output}: "
                f"{'; '.join(row.failures)}. No bundle was written; correct the compressor's forward{self.tie}"
            )


def _unchanged(folder: Path, request: str) -> Bundle | None:
    """Return the bundle at `folder` when it is whole and answers the same request."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        found = open_bundle(folder)
    except BundleError:
        return None  # something else, or damaged: `require_free` says what to do
    return found if found.manifest.request == request else None


def _samples(
    plan: PrecisionPlan, assembly: Assembly, folder: str | Path, limit: int, seed: int, progress: Progress
) -> tuple[Sampled | None, tuple[str, ...]]:
    """Return what to calibrate with, if anything, and notes about it."""
    from edgecomp.export.golden import input_specs_of
    from edgecomp.export.samples import golden_samples, image_samples, require_image

    if not plan.needs_samples:
        return None, ()
    specs = input_specs_of(assembly, 1)
    if not str(folder):
        return golden_samples(specs, seed=seed, preprocess=assembly.preprocess), ()
    require_image(specs, source=str(folder))
    assert assembly.preprocess is not None
    progress("reading calibration images")
    images = open_images(folder, limit=limit, seed=seed)
    name = Path(folder).resolve().name
    pictures = (images.image(index) for index in images.indices)
    sampled = image_samples(pictures, specs, source=name, seed=seed, preprocess=assembly.preprocess)
    few = (
        f"{len(images.indices)} calibration images are few; {_ENOUGH} or more make scales that hold for others"
        if len(images.indices) < _ENOUGH
        else ""
    )
    return sampled, (*images.notes, *([few] if few else []))


def _require_fixed(assembly: Assembly, order: Order) -> None:
    """Refuse what the router `fixed` cannot be asked for, before anything is exported."""
    if assembly.router_name != "fixed":
        return
    kept = [model.compressor.budget.tokens_out for model in assembly.models]
    if len(kept) == 1:
        raise InvalidSpec(
            f"router fixed: there is one bucket, {kept[0]}, and nothing to choose; give several --budget, or drop it"
        )
    if order.router_weights != "random":
        raise InvalidSpec(f"router fixed has no weights; drop --router-weights {order.router_weights}")
    budget = order.router_params.get("budget", kept[-1])
    if type(budget) is not int or budget not in kept or set(order.router_params) - {"budget"}:
        raise InvalidSpec(
            f"router fixed takes the one parameter budget, one of {', '.join(map(str, kept))}, and was given "
            f"{dict(order.router_params)}; for example --set router.budget={kept[0]}"
        )


def _check(work: Path, folder: Path, manifest: Manifest, progress: Progress) -> ParityReport:
    """Run each graph in ONNX Runtime against the goldens."""
    goldens, tolerance = read_goldens(work), manifest.recipe.tolerances[manifest.precision]
    rows: list[OutputParity] = []
    missed: list[Bucket | PartGraph] = []
    version = ""
    parts = {part.label: part for bucket in manifest.buckets for part in manifest.parts_of(bucket)}
    graphs: list[Judged] = [*manifest.buckets, *parts.values(), *manifest.routers, *manifest.plain]
    opener = partial(open_graph, "onnxruntime", threads=0)
    with runnable(Bundle(work, manifest), "onnxruntime", progress=progress) as ready:
        for graph in graphs:
            progress(f"checking {label_of(graph)} in ONNX Runtime")
            with opener(ready.bundle, graph, model=half_of(ready, graph)) as runner:
                found = check_bucket(runner, graph, goldens, tolerance)
                version = runner.version
            rows.extend(found)
            if not all(found) and isinstance(graph, (Bucket, PartGraph)) and manifest.precision != "fp32":
                missed.append(graph)
        chosen = check_choices(  # the forced form stays in `parity/`: a board has nothing to make it with
            ready,
            missed,
            goldens,
            tolerance,
            open_one=opener,
            progress=lambda label: progress(f"checking {label} with the original's choices forced"),
        )
    report = ParityReport(
        str(folder), "onnxruntime", version, 0, manifest.precision, tolerance, tuple(rows),
        selection=chosen, emulated=ready.emulated,
    )  # fmt: skip
    if not report:
        raise ParityError(
            f"ONNX Runtime does not give what the original gives: {_first_miss(report)}. No bundle was written; report "
            f"this with the command{_tie(manifest.recipe)}"
        )
    return report


def _first_miss(report: ParityReport) -> str:
    """Return what a report failed by: the output furthest off, or a choice that breaks its own rule."""
    worst = report.worst
    if worst.failures:
        return f"{worst.model}, case {worst.case}, output {worst.output}: {'; '.join(worst.failures)}"
    forced = next((row for part in report.selection for row in part.forced if not row), None)
    if forced is not None:
        return (
            f"{forced.model}, case {forced.case}, output {forced.output}, with the original's choices forced: "
            f"{'; '.join(forced.failures)}"
        )
    choice = next(one for part in report.selection for one in part.choices if not one)
    return f"{choice.model}, case {choice.case}, choice {choice.number} in {choice.where}: {'; '.join(choice.failures)}"
