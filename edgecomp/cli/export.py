"""`edgecomp export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from edgecomp import api
from edgecomp.cli.talk import JSON, emit, finish, progress
from edgecomp.errors import InvalidSpec

__all__ = ["command"]


def command(
    method: Annotated[str, typer.Option(help="A method's name; `edgecomp list methods` shows them.")] = "",
    recipe: Annotated[str, typer.Option(help="A recipe's TOML file, instead of --method.")] = "",
    preset: Annotated[str, typer.Option(help="A named size of the recipe.")] = "",
    backbone: Annotated[
        str, typer.Option(help="A timm ViT, a folder of transformers, or `none`: tokens are the input.")
    ] = "",
    weights: Annotated[
        str, typer.Option(help="The method's checkpoint, alone or in a whole model: a file or a folder; or `random`.")
    ] = "",
    backbone_weights: Annotated[
        str, typer.Option(help="The host's checkpoint, `random`, or `pretrained` (downloads by timm).")
    ] = "",
    budget: Annotated[list[str] | None, typer.Option(help="Tokens KEPT: a count or 25%; repeatable.")] = None,
    align: Annotated[int, typer.Option(help="Round each budget up to a multiple of it: 8, 16 or 32.")] = 1,
    batch: Annotated[list[int] | None, typer.Option(help="Batch size; repeatable.")] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side of the image in pixels; default: the recipe's or the host's.")
    ] = None,
    feature_layer: Annotated[
        int | None, typer.Option(help="Host layer that is compressed, counted from the end.")
    ] = None,
    drop_prefix: Annotated[
        bool | None,
        typer.Option("--drop-prefix/--keep-prefix", help="A host's class and register tokens; default: the method's."),
    ] = None,
    output: Annotated[str, typer.Option(help="`tokens` or `logits`.")] = "",
    input_dtype: Annotated[str, typer.Option(help="`float32`, or `uint8`: raw RGB frames (B, S, S, 3).")] = "",
    precision: Annotated[
        str, typer.Option(help="`fp32`, `fp16`, `bf16`, `int8` or `fp8`, written into the graph.")
    ] = "",
    rest: Annotated[str, typer.Option(help="What int8 and fp8 leave: `fp16` (default), `bf16`, `fp32`.")] = "",
    fp32: Annotated[
        list[str] | None,
        typer.Option("--fp32", help="A module with all inside it (`blocks.3.mlp`), or a node, in fp32; repeatable."),
    ] = None,
    calibration: Annotated[
        str, typer.Option(help="A folder of images for scales and ranges; default: seeded inputs and a photograph.")
    ] = "",
    calibration_images: Annotated[int | None, typer.Option(help="The most images read of it; default: 64.")] = None,
    opset: Annotated[int | None, typer.Option(help="18 to 20; default: 20, and 22 with bf16.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="params.NAME=VALUE, router.NAME=VALUE or then.NAME=VALUE; repeatable."),
    ] = None,
    no_stem: Annotated[
        bool, typer.Option("--no-stem", help="Whole graphs, also where several buckets share a part.")
    ] = False,
    router: Annotated[str, typer.Option(help="What picks a bucket; `edgecomp list routers` shows them.")] = "",
    router_weights: Annotated[str, typer.Option(help="The router's checkpoint, or `random`.")] = "random",
    pad_to: Annotated[int | None, typer.Option(help="Rows that every bucket gives, with count and mask.")] = None,
    then: Annotated[list[str] | None, typer.Option(help="A second method, on the first one's tokens.")] = None,
    then_preset: Annotated[str, typer.Option(help="A named size of its recipe.")] = "",
    then_weights: Annotated[str, typer.Option(help="Its checkpoint, or `random`.")] = "random",
    between: Annotated[
        int | None, typer.Option(help="Tokens that the first hands to the second; --budget is what the second keeps.")
    ] = None,
    with_plain: Annotated[bool, typer.Option("--with-plain", help="Add the uncompressed model.")] = False,
    seed: Annotated[int, typer.Option(help="Of random weights and golden inputs.")] = 0,
    out: Annotated[str, typer.Option(help="The folder to write; default: named after method and size.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace another bundle.")] = False,
    json: JSON = False,
) -> None:
    """Rewrite a compressor for static shapes, export it to ONNX, prove it, and write a bundle."""
    params, router_params = parse_sets(set_ or [], "params"), parse_sets(set_ or [], "router")
    numbers = {"--image-size": image_size, "--feature-layer": feature_layer, "--opset": opset, "--pad-to": pad_to}
    numbers |= {"--calibration-images": calibration_images, "--between": between}
    for option, number in numbers.items():
        if number == 0:
            raise InvalidSpec(f"{option} 0 is out of range; leave it out for the default")
    with progress("export") as say:
        report = api.export(
            method,
            recipe=recipe,
            preset=preset,
            backbone=backbone,
            weights=weights,
            backbone_weights=backbone_weights,
            budget=budget or (),
            align=align,
            batch=batch or (),
            image_size=image_size or 0,
            feature_layer=feature_layer or 0,
            prefix="" if drop_prefix is None else "drop" if drop_prefix else "keep",
            output=output,
            input_dtype=input_dtype,
            precision=precision,
            rest=rest,
            fp32=fp32 or (),
            calibration=calibration,
            calibration_images=calibration_images or 0,
            opset=opset or 0,
            params=params,
            stem=not no_stem,
            router=router,
            router_params=router_params,
            router_weights=router_weights,
            pad_to=pad_to or 0,
            then=_one_second(then or []),
            then_preset=then_preset,
            then_params=parse_sets(set_ or [], "then"),
            then_weights=then_weights,
            between=between or 0,
            with_plain=with_plain,
            seed=seed,
            out=Path(out) if out else "",
            force=force,
            progress=say,
        )

    def text() -> str:
        from edgecomp.report.export import describe_export

        return describe_export(report)

    emit(report, as_json=json, text=text)
    finish(report)


def _one_second(then: list[str]) -> str:
    """Return the second method; a third is refused, where an option given twice would silently be its last."""
    if len(then) > 1:
        raise InvalidSpec(f"--then {' --then '.join(then)}: two methods stand in a row, not three; give it once")
    return then[0] if then else ""


def parse_sets(words: list[str], space: Literal["params", "router", "then"]) -> dict[str, Any]:
    """Read the `SPACE.NAME=VALUE` words of one space; a value is TOML where it parses, else text."""
    import msgspec

    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        prefix, _, name = key.partition(".")
        if not equals or prefix not in ("params", "router", "then") or not name:
            raise InvalidSpec(f"--set {word!r} is not of the form params.NAME=VALUE; for example --set params.depth=4")
        if prefix != space:
            continue
        if name in found:
            raise InvalidSpec(f"--set {key} is given twice; give it once")
        try:
            parsed = msgspec.toml.decode(f"value = {value}")
        except (msgspec.DecodeError, ValueError):
            parsed = {}
        found[name] = parsed["value"] if len(parsed) == 1 else value  # more keys: the text holds further lines
    return found
