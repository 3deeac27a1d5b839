"""`edgecomp estimate`: its wall time, its FLOPs beside torch's own counter, and the fit that its efficiency comes from.

    python benchmarks/estimate.py [--rounds 5] [--json FILE]
    python benchmarks/estimate.py --flops [--json FILE]
    python benchmarks/estimate.py --fit [--json FILE]

The first times the verb as a fresh process on a ViT-L/16 (its graph alone: no weights are written, none are read), and
the function that a search calls. Reach: 2 seconds for the verb. `--flops` exports ten models, of timm and of edgecomp,
and counts them by `export/costs.py` and by torch. `--fit` fits the published rows anew, prints each row beside what the
fit without it says, and writes `profiles/published/fit.toml`.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
from common import publish

from edgecomp.estimates import estimate_graph
from edgecomp.estimates.efficiency import Efficiency, Fit
from edgecomp.estimates.published import refit, shipped_rows
from edgecomp.specs import load_recipe, load_target

FIT = Path(__file__).resolve().parents[1] / "profiles" / "published" / "fit.toml"
TIMM = (
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "vit_large_patch16_224",
    "vit_base_patch14_dinov2.lvd142m",
    "vit_base_patch16_siglip_224",
    "deit_small_patch16_224",
)
OURS = (("tome", ""), ("lookupvit", ""), ("perceiver", ""))


def save_graph(module: Any, inputs: Any, outputs: Any, path: Path) -> None:
    """Export a module and write its graph; its weights are named and not written, which an estimate does not notice."""
    import onnx_ir as ir

    from edgecomp import __version__
    from edgecomp.backbones.inside import InsideModel
    from edgecomp.export.lower import lower
    from edgecomp.export.passes import add_merge_body, strip_metadata

    with module.as_exported() if isinstance(module, InsideModel) else nullcontext():
        graph = lower(module, inputs=inputs, outputs=outputs, opset=20)
    strip_metadata(graph, producer_version=__version__)
    add_merge_body(graph)
    offset = 0
    for value in graph.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < 4096:
            continue
        value.const_value = ir.ExternalTensor(
            "weights.data",
            offset,
            tensor.nbytes,
            tensor.dtype,
            shape=tensor.shape,
            name=value.name,
            base_dir=path.parent,
        )
        offset += tensor.nbytes
    ir.save(graph, path)


def timm_graph(name: str, folder: Path) -> tuple[Path, int]:
    """Write the graph of a timm model; return it and the FLOPs by torch's counter."""
    import timm
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from edgecomp.specs import TensorSpec

    class Tuple(torch.nn.Module):
        def __init__(self, module: Any) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Any) -> Any:
            return (self.module(x),)

    module = timm.create_model(name, num_classes=0).eval().requires_grad_(False)
    size = module.default_cfg["input_size"]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shape = tuple(module(torch.zeros(1, *size)).shape)
    specs = TensorSpec("x", (1, *size), "float32", "image"), TensorSpec("y", shape, "float32", "tokens")
    path = folder / f"{name}.onnx"
    save_graph(Tuple(module), specs[:1], specs[1:], path)
    return path, int(counter.get_total_flops())


def our_graph(method: str, preset: str, folder: Path) -> tuple[Path, int]:
    """Write the graph of one of edgecomp's methods; return it and the FLOPs by torch's counter."""
    from edgecomp.backbones.assemble import assemble
    from edgecomp.export.flops import count_module_flops
    from edgecomp.specs.order import Order

    recipe = load_recipe(method)
    model = assemble(Order(recipe=recipe, preset=preset or recipe.defaults.preset)).models[0]
    path = folder / f"{method}.onnx"
    save_graph(model, model.input_specs(1), model.output_specs(1), path)
    return path, count_module_flops(model)


def flops_rows(folder: Path) -> Iterator[list[object]]:
    """Yield model, ops, FLOPs by edgecomp and by torch, and how far they are apart."""
    from edgecomp.export.costs import count_costs

    for label, path, by_torch in (
        *((name, *timm_graph(name, folder)) for name in TIMM),
        *((f"{method} {preset}".strip(), *our_graph(method, preset, folder)) for method, preset in OURS),
    ):
        costs = count_costs(path)
        ratio = 100 * (costs.flops / by_torch - 1)
        yield [label, len(costs.ops), f"{costs.flops / 1e9:.4f}", f"{by_torch / 1e9:.4f}", f"{ratio:+.3f} %"]


def time_verb(rounds: int, folder: Path) -> list[list[object]]:
    """Time the verb on a ViT-L, and the function inside it."""
    path, _ = timm_graph("vit_large_patch16_224", folder)
    words = [sys.executable, "-m", "edgecomp", "estimate", str(path), "--target", "agx-orin-64", "--precision", "fp16"]
    rows: list[list[object]] = []
    for label, more in (("estimate of ViT-L/16", []), ("the same with --go-no-go", ["--go-no-go"])):
        seconds, processor = [], []
        for _ in range(rounds):
            started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([*words, *more], check=True, capture_output=True)
            seconds.append(time.perf_counter() - started)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        wall, cpu = statistics.median(seconds), statistics.median(processor)
        rows.append([label, f"{wall:.2f} s", f"{min(seconds):.2f} to {max(seconds):.2f} s", f"{cpu:.2f} s"])
    from edgecomp.export.costs import count_costs

    costs, target = count_costs(path), load_target("agx-orin-64")
    milliseconds = []
    for _ in range(10 * rounds):
        started = time.perf_counter()
        estimate_graph(costs, target, precision="fp16")
        milliseconds.append(1e3 * (time.perf_counter() - started))
    spread = f"{min(milliseconds):.1f} to {max(milliseconds):.1f} ms"
    rows.append(["estimate_graph, as a search calls it", f"{statistics.median(milliseconds):.1f} ms", spread, "-"])
    return rows


def fit_rows() -> tuple[Fit, list[list[object]]]:
    """Fit the published rows; return the fit, and each row beside what the fits without it say."""
    made, errors = refit(shipped_rows())
    rows: list[list[object]] = [
        [
            one.row.target,
            one.row.model,
            one.row.precision,
            one.row.batch,
            f"{one.us / 1e3:.2f}",
            f"{one.without_row / 1e3:.2f}",
            f"{one.without_row / one.us:.2f}",
            f"{one.without_device / one.us:.2f}",
            len(one.row.assumed),
        ]
        for one in errors
    ]
    return made, rows


def as_toml(made: Fit) -> str:
    """Return a fit as `profiles/published/fit.toml` holds it."""

    def numbers(efficiency: Efficiency) -> list[str]:
        return [f"{name} = {value:.6g}" for name, value in msgspec.structs.asdict(efficiency).items()]

    lines = ["# Made from rows.toml by: python benchmarks/estimate.py --fit", "schema = 1", f"rows = {made.rows}"]
    for name in ("error_row", "median_row", "error_device", "median_device", "rms", "rms_filling"):
        lines.append(f"{name} = {getattr(made, name):.6g}")
    names = ", ".join(f'"{name}"' for name in made.targets)
    lines.append(f"targets = [{names}]")
    lines += ["", "[devices]", *(f"{name} = {error:.6g}" for name, error in made.devices.items())]
    lines += ["", "[efficiency]", *numbers(made.efficiency), "", "[filling]", *numbers(made.filling)]
    for name, efficiency in made.without.items():
        lines += ["", f"[without.{name}]", *numbers(efficiency)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=None, help="write the figures here too")
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it works, not to quote")
    parser.add_argument("--rounds", type=int, default=5, help="processes to time")
    parser.add_argument("--flops", action="store_true", help="ten models beside torch's counter")
    parser.add_argument("--fit", action="store_true", help="fit the published rows, and write the fit")
    words = parser.parse_args()
    if words.fit:
        made, rows = fit_rows()
        header = [
            "target",
            "model",
            "precision",
            "batch",
            "published ms",
            "without it",
            "ratio",
            "no device",
            "assumed",
        ]
        publish("Published rows, and the fit without each", header, rows, words.json)
        FIT.write_text(as_toml(made), encoding="utf-8")
        print(f"written to {FIT.name}: {made.efficiency}")
        return
    with tempfile.TemporaryDirectory() as folder:
        if words.flops:
            header = ["model", "ops", "GFLOP", "GFLOP by torch", "apart"]
            publish("FLOPs from the graph and by torch", header, list(flops_rows(Path(folder))), words.json)
            return
        rows = time_verb(1 if words.quick else words.rounds, Path(folder))
    publish(
        "edgecomp estimate, ViT-L/16, 224 pixels", ["what", "median", "range", "of the processor"], rows, words.json
    )


if __name__ == "__main__":
    main()
