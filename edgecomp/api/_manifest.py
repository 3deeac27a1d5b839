"""What the manifest of an export says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from edgecomp.api._request import tools
from edgecomp.specs.manifest import Manifest, RouterGraph, RouterRecord
from edgecomp.specs.order import Order
from edgecomp.specs.precision import PrecisionPlan

if TYPE_CHECKING:
    from edgecomp.backbones.assemble import Assembly
    from edgecomp.export.graphs import Graphs
    from edgecomp.export.ranges import OutOfRange
    from edgecomp.export.samples import Sampled

__all__ = ["make_manifest"]


def make_manifest(
    assembly: Assembly,
    order: Order,
    request: str,
    plan: PrecisionPlan,
    opset: int,
    graphs: Graphs,
    sampled: Sampled | None,
    image_notes: Sequence[str],
) -> Manifest:
    from edgecomp.export.flops import count_module_flops

    model = assembly.models[-1]
    plain_flops = count_module_flops(assembly.plain) if assembly.plain is not None else 0
    notes = [*assembly.notes, *image_notes, *map(_risk, graphs.risky)]
    for bucket in graphs.buckets:
        ratio = bucket.flops / bucket.batch / plain_flops if plain_flops else 0.0
        if ratio > 1 and bucket.batch == min(b.batch for b in graphs.buckets):
            notes.append(
                f"keeping {bucket.budget.tokens_out} tokens costs {ratio:.2f}x the FLOPs of the uncompressed "
                f"{assembly.plain_name}: more, not less; it pays where fewer tokens are read after it"
            )
    return Manifest(
        schema=0,
        kind="",
        request=request,
        method=order.recipe.method,
        preset=assembly.preset,
        placement=assembly.placement,
        params=assembly.params,
        recipe=order.recipe,
        backbone=assembly.backbone,
        feature_layer=assembly.feature_layer,
        num_prefix_tokens=assembly.num_prefix_tokens,
        image_size=assembly.image_size,
        input_dtype=order.input_dtype,
        output=assembly.output,
        precision=plan.word,
        rest=plan.rest,
        fp32=plan.fp32,
        samples=sampled.record if sampled is not None else None,
        opset=opset,
        seed=order.seed,
        weights=assembly.weights,
        backbone_weights=assembly.backbone_weights,
        unread=dict(order.recipe.unread),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        plain_name=assembly.plain_name,
        plain_flops=plain_flops,
        preprocess=assembly.preprocess,
        buckets=graphs.buckets,
        plain=graphs.plain,
        stem=graphs.stem,
        router=_router_record(assembly, order, graphs.router),
        tools=tools(*(["transformers"] if _is_tower(assembly) else [])),
        notes=tuple(notes),
        files=(),
        prefix=order.prefix,
        then=assembly.then,
    )


def _is_tower(assembly: Assembly) -> bool:
    """Say whether the host is of transformers."""
    origin = assembly.backbone_weights
    return origin is not None and origin.layout.startswith("transformers")


def _router_record(assembly: Assembly, order: Order, graphs: tuple[RouterGraph, ...]) -> RouterRecord | None:
    """Return what the manifest says of the router."""
    router = assembly.router
    if router is not None:
        return RouterRecord(
            name=assembly.router_name,
            params=msgspec.to_builtins(router.params),
            reads_words=router.reads_words,
            signals=router.signal_names,
            thresholds=router.default_thresholds,
            weights=assembly.router_weights,
            graphs=graphs,
        )
    if assembly.router_name != "fixed":
        return None
    budget = order.router_params.get("budget", assembly.models[-1].compressor.budget.tokens_out)
    return RouterRecord("fixed", {"budget": budget}, False, (), (), None, (), fixed=budget)


def _risk(value: OutOfRange) -> str:
    """Return what the range check found, and the cure."""
    cures = " ".join(f"--fp32 '{name}'" for name in value.island)
    what = f"{value.op} {value.node!r}" if value.node else f"the input {value.tensor!r}"
    return (
        f"fp16 ends at 65504, and {what}{f' of {value.module}' if value.module else ''} reached "
        f"{value.absmax:.4g} on the calibration inputs; other inputs may overflow: {cures}"
    )
