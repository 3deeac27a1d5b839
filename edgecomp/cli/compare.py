"""`edgecomp compare`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from edgecomp import api
from edgecomp.cli.talk import JSON, emit, finish, progress
from edgecomp.errors import InvalidSpec

__all__ = ["command"]


def command(
    models: Annotated[
        list[str] | None, typer.Argument(help="Two or more: bundles, .onnx files, result files of `edgecomp profile`.")
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Compare methods instead, on one host and image: names with commas, or `all`.")
    ] = "",
    image: Annotated[str, typer.Option(help="With --methods: the image; default: the shipped photograph.")] = "",
    backbone: Annotated[
        str,
        typer.Option(help="With --methods: a timm ViT, or a folder of transformers; default: vit_small_patch16_224."),
    ] = "",
    backbone_weights: Annotated[
        str, typer.Option(help="With --methods: `random`, `pretrained`, or the host's checkpoint.")
    ] = "",
    image_size: Annotated[int, typer.Option(help="With --methods: pixels a side; 0: the host's own.")] = 0,
    cache: Annotated[str, typer.Option(help="With --methods: folder of the exports; default: edgecomp's cache.")] = "",
    base: Annotated[str, typer.Option(help="The model that ratios are to; default: the first.")] = "",
    runner: Annotated[
        str, typer.Option(help="`onnxruntime`, `onnxruntime-cuda`, `tensorrt` or `rtx`.")
    ] = "onnxruntime",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: the runtime's choice.")] = 0,
    budget: Annotated[
        str | None, typer.Option(help="Only buckets that keep so many tokens; with --methods: what each keeps, 64.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Only this batch size.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each model, at least.")] = 20,
    duration: Annotated[float, typer.Option(help="Seconds to go on taking turns for; 0: --rounds decide.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the orders in which models take turns.")] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Compare results of different models or machines too, and say so.")
    ] = False,
    out: Annotated[str, typer.Option(help="Write the comparison: a .json file.")] = "",
    json: JSON = False,
) -> None:
    """Compare models side by side, in turns in one run; or, with --methods, many methods on one image."""
    if methods:
        _compare_methods(
            methods,
            given={"models": models, "base": base, "force": force},
            as_json=json,
            image=image,
            image_size=image_size,
            batch=1 if batch is None else batch,
            runner=runner,
            threads=threads,
            rounds=rounds,
            duration_s=duration,
            seed=seed,
            cache=cache,
            out=out,
            **{
                name: value
                for name, value in (("backbone", backbone), ("backbone_weights", backbone_weights), ("budget", budget))
                if value
            },
        )
        return
    alone = {"image": image, "backbone": backbone, "backbone-weights": backbone_weights, "image-size": image_size}
    _refuse({**alone, "cache": cache}, "goes with --methods, which is not given")
    with progress("compare") as say:
        report = api.compare(
            models or [],
            base=base,
            runner=runner,
            threads=threads,
            budget=budget,
            batch=batch,
            rounds=rounds,
            duration_s=duration,
            seed=seed,
            force=force,
            out=out,
            progress=say,
        )

    def text() -> str:
        from edgecomp.report.compare import describe_comparison

        return describe_comparison(report)

    emit(report, as_json=json, text=text)
    finish(report)


def _compare_methods(methods: str, *, given: Mapping[str, Any], as_json: bool, **words: Any) -> None:
    _refuse(given, "does not go with --methods, which exports its models itself")
    with progress("compare") as say:
        report = api.compare_methods(methods, progress=say, **words)

    def text() -> str:
        from edgecomp.report.methods import describe_methods_report

        return describe_methods_report(report)

    emit(report, as_json=as_json, text=text)


def _refuse(given: Mapping[str, Any], why: str) -> None:
    for name, value in given.items():
        if value:
            word = ", ".join(value) if name == "models" else f"--{name}" + (f" {value}" if value is not True else "")
            raise InvalidSpec(f"{word} {why}; drop one of the two")
