"""Methods at their published size: ONNX Runtime over torch eager, and as a share of their encoder.

    python benchmarks/projectors.py [--rounds 9] [--method c-abstractor,tokenpacker] [--json FILE]
    python benchmarks/projectors.py --encoders 1 [--rounds 5]
    python benchmarks/projectors.py --ops 1 [--rounds 15]

All recipes that stand after an encoder, each at its own preset for that place, on given tokens, the smallest batch, 1
and 2 threads, interleaved; with --encoders 1 those that are whole encoders, on images of the sizes in `_ENCODERS`.
"Eager" is the static module itself in torch; "original" is the eager original. The share of the encoder is by FLOPs, of
the plain ViT with these tokens and this width (depths in `_DEPTHS`, MLP of factor 4). Reach: no method slower than
eager at 1 thread, 0.85 of it at 2.

With --ops 1: pooling and resizing as a constant matrix, in its two factors and whole, over the op that it replaces, in
torch and, where ONNX Runtime has that op, there. Reach: 1.0 over the op.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from common import interleave, parse, publish, ratio
from torch import Tensor, nn

from edgecomp import api
from edgecomp.backbones.assemble import assemble
from edgecomp.bundle import open_bundle
from edgecomp.compressors._grid import adaptive_line, bilinear_line, resample_grid, roi_line
from edgecomp.errors import EdgecompError
from edgecomp.export.golden import golden_inputs
from edgecomp.export.lower import lower
from edgecomp.runners import open_runner
from edgecomp.specs import Recipe, TensorSpec, load_recipe, method_names
from edgecomp.specs.order import Order

_DEPTHS = {192: 12, 384: 12, 768: 12, 1024: 24, 1152: 27, 1280: 32, 1408: 39}  # of ViTs by their width
_WIDTH = 1024  # of the tokens that are pooled
_ENCODERS = (  # method, preset, pixels
    ("dual-path", "s16", 672),
    ("fastvlm", "hd", 256),
    ("fastvlm", "hd", 512),
    ("fastvlm", "hd", 1024),
    ("deepseek-ocr", "tiny", 512),
    ("deepseek-ocr", "base", 1024),
)


def main() -> None:
    """Measure and print."""
    options = parse(
        __doc__ or "",
        rounds=(int, 9, "rounds"),
        method=(str, "", "which, with commas; all if left out"),
        encoders=(int, 0, "1: whole encoders, in place of what stands after one"),
        ops=(int, 0, "1: the constant matrices over the ops that they replace"),
    )
    rounds = 3 if options.quick else options.rounds
    if options.ops:
        header = ["threads", "what", "as", "ms", "over the op in torch", "over it in ONNX Runtime"]
        publish("pooling and resizing, width 1024", header, _ops(rounds), options.json)
        return
    rows: list[list[object]] = []
    listed = options.method.split(",") if options.method else method_names()
    header = ["method", "tokens", "GFLOP", "of encoder", "threads", "ms", "over eager", "over original"]
    if options.encoders:
        for name, preset, size in _ENCODERS[: 1 if options.quick else None]:
            if name in listed:
                found = _method(load_recipe(name), rounds, preset=preset, backbone="none", image_size=size)
                rows += [[f"{name} {preset}, {size} pixels", *row[1:]] for row in found]
                print(*rows[-2:], flush=True)
        publish("whole encoders, ONNX Runtime", header, rows, options.json)
        return
    for name in listed:
        recipe = load_recipe(name)
        if "after" in recipe.placements:
            rows += _method(recipe, rounds, preset=recipe.placements["after"], backbone="none")
            print(*rows[-2:], flush=True)
    publish("methods on given tokens, ONNX Runtime", header, rows, options.json)


def _method(recipe: Recipe, rounds: int, **words: Any) -> list[list[object]]:
    """Return a row for each number of threads."""
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = assemble(Order(recipe=recipe, **words)).models[0]
            words["budget"] = [model.compressor.budget.tokens_out]
            api.export(recipe.method, out=Path(folder) / "bundle", **words)
        except EdgecompError as error:  # it needs a host or weights
            return [[recipe.method, str(error)[:60], "", "", "", "", "", ""]]
        bucket = open_bundle(Path(folder) / "bundle").manifest.buckets[0]  # of slices and strips: the fewest
        batch = f", batch {bucket.batch}" if bucket.batch > 1 else ""
        specs, flops = model.input_specs(bucket.batch), bucket.flops / bucket.batch
        inputs = golden_inputs(specs, seed=0, preprocess=None)["seeded"]
        tensors = [torch.from_numpy(inputs[spec.name].copy()) for spec in specs]
        site, budget = model.compressor.site, model.compressor.budget
        after = site.placement == "after"
        share = _share(flops, site.tokens_in, site.embed_dim) if after else "-"
        original = model.reference().eval()
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with open_runner("onnxruntime", Path(folder) / "bundle" / bucket.model, threads=threads) as runner:
                runs: dict[str, Callable[[], object]] = {
                    "onnx": partial(runner.infer, inputs),
                    "eager": partial(_eager, model, tensors),
                    "original": partial(_eager, original, tensors),
                }
                samples = interleave(runs, rounds=rounds)
            rows.append(
                [
                    recipe.method,
                    f"{budget.tokens_in} to {budget.tokens_out}{batch}",
                    f"{flops / 1e9:.2f}",
                    share,
                    threads,
                    f"{statistics.median(samples['onnx']):.1f}",
                    f"{ratio(samples, 'onnx', 'eager'):.2f}",
                    f"{ratio(samples, 'onnx', 'original'):.2f}",
                ]
            )
    return rows


def _share(flops: float, tokens: int, width: int) -> str:
    """Return a method's FLOPs over those of the plain ViT in front of it."""
    if width not in _DEPTHS:
        return "-"
    encoder = _DEPTHS[width] * (24 * tokens * width**2 + 4 * tokens**2 * width)
    return f"{flops / encoder:.1%}"


def _eager(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    with torch.inference_mode():
        model(*inputs)


# -- constant matrices over the ops that they replace ----------------------------------------------------------


class _Map(nn.Module):
    """A function of one set of tokens as a module that can be exported."""

    def __init__(self, form: Callable[..., Tensor], tokens: int, out: int, **constants: Tensor) -> None:
        super().__init__()
        self.form, self.tokens, self.out, self.names = form, tokens, out, tuple(constants)
        for name, value in constants.items():
            self.register_buffer(name, value.float())

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        return (TensorSpec("tokens", (batch, self.tokens, _WIDTH), "float32", "tokens"),)

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        return (TensorSpec("pooled", (batch, self.out, _WIDTH), "float32", "tokens"),)

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return (self.form(tokens, *(getattr(self, name) for name in self.names)),)


def _whole(tokens: Tensor, matrix: Tensor) -> Tensor:
    return matrix @ tokens


def _by_planes(tokens: Tensor, side: int, op: Callable[[Tensor], Tensor]) -> Tensor:
    planes = tokens.transpose(1, 2).reshape(tokens.shape[0], -1, side, side)
    return op(planes).flatten(2).transpose(1, 2)


def _forms() -> dict[str, tuple[int, int, Tensor, Callable[[Tensor], Tensor]]]:
    """Return by name: side in, side out, the line of the matrix, and the op on planes."""
    from torchvision.ops import roi_align

    def align(planes: Tensor) -> Tensor:  # 8 x 8 cells of the grid, 3 x 3 bins each, as LLaVA-UHD reads regions
        line = torch.arange(8, dtype=torch.float32) * 3
        y, x = torch.meshgrid(line, line, indexing="ij")
        boxes = torch.stack([x, y, x + 3, y + 3], dim=-1).reshape(-1, 4)
        regions = roi_align(planes, torch.cat([torch.zeros(64, 1), boxes], dim=1), (3, 3))  # (64, D, 3, 3)
        return regions.reshape(8, 8, -1, 3, 3).permute(2, 0, 3, 1, 4).reshape(1, -1, 24, 24)

    return {
        "adaptive pooling 24 to 12": (24, 12, adaptive_line(24, 12), lambda x: F.adaptive_avg_pool2d(x, 12)),
        "adaptive pooling 24 to 10": (24, 10, adaptive_line(24, 10), lambda x: F.adaptive_avg_pool2d(x, 10)),
        "adaptive pooling 48 to 12": (48, 12, adaptive_line(48, 12), lambda x: F.adaptive_avg_pool2d(x, 12)),
        "average of 8 x 8, 24 to 3": (24, 3, adaptive_line(24, 3), lambda x: F.avg_pool2d(x, 8)),
        "bilinear resize 24 to 12": (
            24,
            12,
            bilinear_line(24, 12),
            lambda x: F.interpolate(x, (12, 12), mode="bilinear"),
        ),
        "bilinear resize 24 to 8": (24, 8, bilinear_line(24, 8), lambda x: F.interpolate(x, (8, 8), mode="bilinear")),
        "RoIAlign 24 x 24, 8 x 8 cells of 3 x 3": (24, 24, roi_line(24, 8, 3), align),
    }


def _ops(rounds: int) -> list[list[object]]:
    rows: list[list[object]] = []
    for name, (side, target, line, op) in _forms().items():
        tokens = np.random.default_rng(0).standard_normal((1, side**2, _WIDTH), dtype=np.float32)
        given = torch.from_numpy(tokens)
        counts = (side**2, target**2)
        original = _Map(partial(_by_planes, side=side, op=op), *counts)
        models = {
            "two factors": _Map(lambda x, rows: resample_grid(x, rows, rows), *counts, rows=line),
            "one matrix": _Map(_whole, *counts, matrix=torch.kron(line, line)),
            "the op": original,
        }
        with torch.inference_mode():
            expected = original(given)[0]
            for label, model in models.items():
                error = float((model(given)[0] - expected).abs().max())
                assert error < 1e-4, f"{name} as {label} is off by {error}"
        with tempfile.TemporaryDirectory() as folder:
            graphs = {}
            for label, model in models.items():
                try:
                    graph = lower(model, inputs=model.input_specs(), outputs=model.output_specs(), opset=20)
                except Exception:  # noqa: BLE001 - an op that has no ONNX form fails in as many ways
                    continue
                graphs[label] = Path(folder) / f"{len(graphs)}.onnx"
                ir.save(graph, graphs[label])
            for threads in (1, 2):
                torch.set_num_threads(threads)
                loaded = {label: open_runner("onnxruntime", path, threads=threads) for label, path in graphs.items()}
                runs: dict[str, Callable[[], object]] = {"torch": partial(_eager, original, [given])}
                for label, runner in loaded.items():
                    runs[label] = partial(runner.infer, {"tokens": tokens})
                samples = interleave(runs, rounds=rounds)
                for label in loaded:
                    over = f"{ratio(samples, label, 'the op'):.2f}" if "the op" in loaded else "no such op"
                    milliseconds = f"{statistics.median(samples[label]):.3f}"
                    rows.append([threads, name, label, milliseconds, f"{ratio(samples, label, 'torch'):.2f}", over])
    return rows


if __name__ == "__main__":
    main()
