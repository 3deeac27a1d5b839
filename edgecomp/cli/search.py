"""`edgecomp search`."""

from __future__ import annotations

from typing import Annotated

import typer

from edgecomp import api
from edgecomp.cli.export import parse_sets
from edgecomp.cli.talk import JSON, emit, finish, progress

__all__ = ["command"]


def command(
    method: Annotated[str, typer.Option(help="A method's name; `edgecomp list methods` shows them.")] = "",
    recipe: Annotated[str, typer.Option(help="A recipe's TOML file, instead of --method.")] = "",
    preset: Annotated[str, typer.Option(help="A named size of the recipe.")] = "",
    backbone: Annotated[str, typer.Option(help="A timm ViT, or a folder of transformers, to compress in.")] = "",
    weights: Annotated[str, typer.Option(help="The method's checkpoint, or `random`.")] = "",
    backbone_weights: Annotated[str, typer.Option(help="The host's checkpoint, `random`, or `pretrained`.")] = "",
    target: Annotated[str, typer.Option(help="`local`, or a target's name; `edgecomp list targets`.")] = "local",
    max_p50: Annotated[float | None, typer.Option(metavar="MS", help="Median of a run, at most.")] = None,
    max_p99: Annotated[float | None, typer.Option(metavar="MS", help="p99 of a run, at most.")] = None,
    max_energy: Annotated[float | None, typer.Option(metavar="MJ", help="Millijoules of a run, at most.")] = None,
    data: Annotated[str, typer.Option(help="Images to tell agreement on; default: a stated proxy.")] = "",
    min_agreement: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Agreement with the uncompressed model, at least.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of IDX files: `test` or `train`.")] = "",
    images: Annotated[int, typer.Option(help="So many of --data, at random.")] = 128,
    seed: Annotated[int, typer.Option(help="Of that choice.")] = 0,
    budget: Annotated[list[int] | None, typer.Option(help="Only these counts of tokens kept; repeatable.")] = None,
    step: Annotated[int, typer.Option(help="Distance of budgets: 8, 16 or 32; 0: by the tokens there are.")] = 0,
    precision: Annotated[
        list[str] | None, typer.Option(help="To try, or `all`; repeatable; default: the recipe's.")
    ] = None,
    schedule: Annotated[
        list[str] | None, typer.Option(help="To search, or `all`; repeatable; default: the preset's.")
    ] = None,
    rest: Annotated[str, typer.Option(help="What int8 and fp8 leave.")] = "",
    fp32: Annotated[list[str] | None, typer.Option("--fp32", help="A module or node in fp32; repeatable.")] = None,
    calibration: Annotated[str, typer.Option(help="Images for scales and ranges; default: --data.")] = "",
    calibration_images: Annotated[int, typer.Option(help="The most read of it; 0: 64.")] = 0,
    image_size: Annotated[int, typer.Option(help="Side of the image; 0: the recipe's or the host's.")] = 0,
    feature_layer: Annotated[int, typer.Option(help="Host layer that is compressed; 0: the recipe's.")] = 0,
    output: Annotated[str, typer.Option(help="`tokens` or `logits`.")] = "",
    input_dtype: Annotated[str, typer.Option(help="`float32` or `uint8`.")] = "",
    batch: Annotated[int, typer.Option(help="Items of a run.")] = 1,
    set_: Annotated[list[str] | None, typer.Option("--set", help="params.NAME=VALUE; repeatable.")] = None,
    runner: Annotated[
        str, typer.Option(help="`onnxruntime`, `onnxruntime-cuda`, `tensorrt` or `rtx`.")
    ] = "onnxruntime",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: the runtime's choice.")] = 0,
    duration: Annotated[float, typer.Option(help="Least seconds to measure each candidate for.")] = 10.0,
    on: Annotated[
        list[str] | None,
        typer.Option("--on", metavar="ssh://USER@HOST[:PORT]/DIR", help="Measure there; several share the work."),
    ] = None,
    noise: Annotated[float, typer.Option(help="Share by which a measured time may be off.")] = 0.05,
    exhaustive: Annotated[bool, typer.Option("--exhaustive", help="Measure every candidate.")] = False,
    baselines: Annotated[
        bool, typer.Option("--baselines/--no-baselines", help="Random pruning and pooling beside the winner.")
    ] = True,
    keep_bundles: Annotated[bool, typer.Option("--keep-bundles", help="Of all candidates.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what was measured in --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be looked at, and how long.")] = False,
    out: Annotated[str, typer.Option(help="The folder; the same command goes on where it ended.")] = "",
    json: JSON = False,
) -> None:
    """Search the budget that agrees most with the uncompressed model, under limits of time and energy."""
    with progress("search") as say:
        report = api.search(
            method,
            recipe=recipe,
            preset=preset,
            backbone=backbone,
            weights=weights,
            backbone_weights=backbone_weights,
            target=target,
            max_p50_ms=max_p50,
            max_p99_ms=max_p99,
            max_energy_mj=max_energy,
            data=data,
            min_agreement=min_agreement,
            split=split,
            images=images,
            seed=seed,
            budget=budget or (),
            step=step,
            precision=precision or (),
            schedule=schedule or (),
            rest=rest,
            fp32=fp32 or (),
            calibration=calibration,
            calibration_images=calibration_images,
            image_size=image_size,
            feature_layer=feature_layer,
            output=output,
            input_dtype=input_dtype,
            batch=batch,
            params=parse_sets(set_ or [], "params"),
            runner=runner,
            threads=threads,
            duration_s=duration,
            on=on or (),
            noise=noise,
            exhaustive=exhaustive,
            baselines=baselines,
            keep_bundles=keep_bundles,
            fresh=fresh,
            dry_run=dry_run,
            out=out,
            progress=say,
        )

    def text() -> str:
        from edgecomp.report.search import SearchPlan, describe_plan, describe_search

        return describe_plan(report) if isinstance(report, SearchPlan) else describe_search(report)

    emit(report, as_json=json, text=text)
    if not dry_run:
        finish(report)
