"""`edgecomp evaluate`: accuracy and speed of a bundle on labelled images, beside the plain model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from edgecomp.api._progress import Progress, silent
from edgecomp.bundle import Bundle, open_bundle
from edgecomp.errors import InvalidSpec
from edgecomp.evaluation import Evaluation, LabelledImages, balanced_subset, open_data, score
from edgecomp.profiles.machine import read_machine
from edgecomp.report.evaluate import EvaluationReport
from edgecomp.runners import Runner, require_threads
from edgecomp.runners.chain import open_graph
from edgecomp.serving import Model, RoutedRunner
from edgecomp.specs import Preprocess, TensorSpec
from edgecomp.specs.manifest import Bucket, Manifest, PlainGraph

__all__ = ["evaluate"]

ROUTED = "routed"
_HOW = "export it again with --output logits --with-plain"


def evaluate(
    bundle: str | Path,
    data: str | Path,
    *,
    split: str = "",
    limit: int | None = None,
    seed: int = 0,
    runner: str = "onnxruntime",
    threads: int = 0,
    budget: str | int | None = None,
    batch: int | None = None,
    texts: Sequence[str] = (),
    max_drop: float | None = None,
    progress: Progress = silent,
) -> EvaluationReport:
    """Measure top-1 and top-5 accuracy of each bucket and of the plain model, how they agree, and their speed.

    Args:
        bundle: the folder; its graphs give logits, and `plain.onnx` is one of them where there is to be a comparison.
        data: a folder of labelled images: a folder for each class, or IDX files (MNIST's layout).
        split: of IDX files, `test` (where left out) or `train`.
        limit: so many images, chosen at random with the classes in balance; None: all.
        seed: of that choice.
        runner, threads: as in `parity`.
        budget: only the bucket that keeps so many tokens (a count or a percentage); None: all.
        batch: one of the bundle's batch sizes; None: its largest.
        texts: questions that routed requests carry, in turn, for a router that reads words.
        max_drop: percentage points of top-1 that a bucket may lose against the plain model; None: any.
        progress: takes a line now and then.

    Returns:
        the report; `bool(report)` is false when a bucket loses more than `max_drop`.

    Raises:
        InvalidSpec: the bundle gives no logits or takes no images, or an option is out of range.
        RunError: the data is absent, damaged or of classes that the model does not have.
        BundleError, MissingDependency: as in `parity`.
    """
    require_threads(threads)
    _require_in_range(limit, seed, max_drop)
    opened = open_bundle(Path(bundle))
    record = opened.manifest.router
    if texts and (record is None or not record.reads_words):
        raise InvalidSpec(f"{len(texts)} texts were given, and no router of {bundle} reads words; drop them")
    batch = max(bucket.batch for bucket in opened.select(budget=budget, batch=batch))
    graphs: list[Bucket | PlainGraph] = list(opened.select(budget=budget, batch=batch))
    plain = [graph for graph in opened.manifest.plain if graph.batch == batch]
    image, logits, preprocess = _require_classifier(opened, graphs[0])
    if max_drop is not None and not plain:
        raise InvalidSpec(f"--max-drop {max_drop:g}: bundle {bundle} has no plain model to lose against; {_HOW}")
    graphs = [*plain, *graphs]

    progress("reading the data")
    images = open_data(data, split=split)
    count = len(images.labels) if limit is None else min(limit, len(images.labels))
    indices = balanced_subset(images.labels, count, seed=seed) if count < len(images.labels) else np.arange(count)
    manifest = opened.manifest
    routed: RoutedRunner | None = None
    with ExitStack() as stack:
        loaded: dict[str, Runner] = {}
        for graph in graphs:
            progress(f"loading {graph.model} in {runner}")
            session = open_graph(runner, opened, graph, threads=threads, takes_turns=True)
            loaded[graph.model] = stack.enter_context(session)
        version = session.version
        if manifest.router is not None and batch == 1 and budget is None:
            model = stack.enter_context(Model(opened, runner=runner, threads=threads, resident=None))
            routed = loaded[ROUTED] = RoutedRunner(model, texts)
        machine = read_machine()
        found = score(
            loaded,
            plain=plain[0].model if plain else "",
            data=images,
            indices=indices,
            preprocess=preprocess,
            input_name=image.name,
            dtype="uint8" if image.dtype == "uint8" else "float32",
            output_name=logits.name,
            batch=batch,
            num_classes=logits.shape[1],
            progress=progress,
        )
    tokens_in = manifest.buckets[0].budget.tokens_in
    kept: dict[str, float] = {g.model: g.budget.tokens_out if isinstance(g, Bucket) else tokens_in for g in graphs}
    flops = {graph.model: graph.flops // graph.batch for graph in graphs}
    notes = [*_notes(manifest, images, found, limit), *images.notes]
    if routed is not None:
        served = routed.served[-found.images :]  # warm-up runs came before
        of = {bucket.budget.tokens_out: bucket for bucket in manifest.buckets if bucket.batch == 1}
        kept[ROUTED] = sum(served) / len(served)
        flops[ROUTED] = sum(of[tokens].flops for tokens in served) // len(served) + _router_flops(manifest)
        shares = ", ".join(f"{tokens}: {served.count(tokens) / len(served):.1%}" for tokens in of)
        notes.append(f"routed by {manifest.router.name if manifest.router else ''} to {shares} (tokens kept: share)")
        notes.append(
            "ms/image of routed is a median over requests to different buckets, with what the object itself costs"
        )
        if record is not None and record.reads_words and not texts:
            notes.append(f"router {record.name} reads words, and the images came without; --texts gives them questions")
    elif manifest.router is not None and budget is None:
        has_one = any(bucket.batch == 1 for bucket in manifest.buckets)
        how = "--batch 1 shows it" if has_one else "export with --batch 1 as well to see it"
        notes.append(f"batch {batch} is not routed: a router picks a bucket for each image; {how}")
    return EvaluationReport(
        bundle=str(bundle),
        data=str(data),
        layout=images.kind,
        found=len(images.labels),
        seed=seed,
        runner=runner,
        version=version,
        threads=threads,
        machine=machine,
        kept=kept,
        flops=flops,
        plain=plain[0].model if plain else "",
        max_drop=max_drop,
        notes=tuple(notes),
        evaluation=found,
    )


def _router_flops(manifest: Manifest) -> int:
    """Return what the router's own graph costs at batch 1."""
    stems = {stem.model: stem.flops for stem in manifest.stem}
    return next((graph.flops - stems.get(graph.stem, 0) for graph in manifest.routers if graph.batch == 1), 0)


def _require_in_range(limit: int | None, seed: int, max_drop: float | None) -> None:
    if limit is not None and limit < 1:
        raise InvalidSpec(f"limit {limit} is below 1; leave it out for all images")
    if not 0 <= seed < 1 << 63:
        raise InvalidSpec(f"seed {seed} is not between 0 and 2^63 - 1")
    if max_drop is not None and not 0 <= max_drop <= 100:
        raise InvalidSpec(f"max drop {max_drop:g} is not between 0 and 100 percentage points of top-1 accuracy")


def _require_classifier(opened: Bundle, graph: Bucket | PlainGraph) -> tuple[TensorSpec, TensorSpec, Preprocess]:
    """Return the image that goes in, the logits that come out, and how pixels are prepared; or refuse the bundle."""
    manifest, path = opened.manifest, opened.path
    if manifest.output != "logits":
        advice = _HOW
        if "logits" not in manifest.recipe.outputs:
            advice = f"{manifest.method} alone classifies nothing, so evaluate the model that reads its tokens"
        raise InvalidSpec(
            f"bundle {path} gives {', '.join(map(str, graph.outputs))} and no logits, which accuracy needs; {advice}"
        )
    logits = next((spec for spec in graph.outputs if spec.name == "logits" and len(spec.shape) == 2), None)
    if logits is None:
        raise InvalidSpec(f"bundle {path} gives {', '.join(map(str, graph.outputs))}, expected logits [B, classes]")
    is_image = len(graph.inputs) == 1 and graph.inputs[0].kind == "image" and len(graph.inputs[0].shape) == 4
    if not is_image or manifest.preprocess is None:
        raise InvalidSpec(
            f"bundle {path} takes {', '.join(map(str, graph.inputs))}, and images can be given to a model alone that "
            "takes one image; export it with a --backbone"
        )
    return graph.inputs[0], logits, manifest.preprocess


def _notes(manifest: Manifest, data: LabelledImages, found: Evaluation, limit: int | None) -> list[str]:
    """Return what a reader of the figures must know, in words."""
    notes = []
    if not manifest.plain:
        notes.append(f"the bundle has no plain model, so nothing is said of a drop, agreement or gain; {_HOW}")
    elif manifest.backbone == "none":
        notes.append(f"{manifest.plain_name} has random weights: its accuracy means nothing, and so do drop, agreement")
    own = manifest.backbone_weights if manifest.placement == "inside" else manifest.weights
    if any(origin is not None and origin.kind == "random" for origin in (own, manifest.backbone_weights)):
        notes.append("the weights are random, so that accuracy is a matter of chance; export with trained ones")
    if limit is not None and limit > len(data.labels):
        notes.append(f"--limit {limit} is above the {len(data.labels)} images that there are; all were taken")
    highest = int(data.labels.max())
    if data.classes and len(data.classes) < found.num_classes:
        notes.append(
            f"the data has {len(data.classes)} classes and the model {found.num_classes}: right only if they are the "
            f"model's first {len(data.classes)}, in its order; classes.txt in the data's folder says otherwise"
        )
    elif not data.classes and highest < found.num_classes - 1:
        notes.append(f"no label is above {highest}, and the model has {found.num_classes} classes: are they its own?")
    notes += [
        f"{row.model} gave NaN or Inf for {row.not_finite} images; they count as wrong"
        for row in found.scores
        if row.not_finite
    ]
    return notes
