"""Wall time of `edgecomp build` with TensorRT for RTX over a bare builder on the same graph, both as fresh processes.

    python benchmarks/build.py [--rounds 5] [--sm 89] [--json FILE]

A ViT-B/16 at 224 pixels in fp16, random weights. The bare process parses the file and builds a strongly typed network;
`build_engine` also hashes graph, weights and plan, proves the types of the matrix products, and writes plan and record
to disk, with fsync. Both write the plan. Reach 1.2. The peak memory of both stands beside.

The graph is what `edgecomp export --precision fp16` makes, where it can: the plain model of a tome bundle. Else a ViT-B
in fp16 is written here by hand, with LayerNorm and softmax in fp32.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import parse, publish

_BARE = """
import sys
from pathlib import Path
from edgecomp.engines.flavour import load_flavour
trt = load_flavour("rtx").module
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file(sys.argv[1])
config = builder.create_builder_config()
config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
config.clear_flag(trt.BuilderFlag.TF32)
config.num_compute_capabilities = 1
config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + sys.argv[3]), 0)
Path(sys.argv[2]).write_bytes(builder.build_serialized_network(network, config))
"""
_OURS = """
import sys
from pathlib import Path
from edgecomp.bundle import open_bundle
from edgecomp.engines import build_engine
from edgecomp.specs import load_target
from edgecomp.specs.origin import file_sha256
model, out = Path(sys.argv[1]), Path(sys.argv[2])
data = model.with_name("weights.data")
inside = model.with_name("manifest.json").is_file()
graphs = open_bundle(model.parent, verify=False).manifest.graphs if inside else ()
islands = [name for graph in graphs if graph.model == model.name for name in graph.islands]
build_engine(model, out, target=load_target({"86": "a10", "89": "rtx-4090", "120": "rtx-5090"}[sys.argv[3]]),
             runtime="rtx", precision="fp16", onnx_sha256=file_sha256(model), weights_sha256=file_sha256(data),
             weight_bytes=data.stat().st_size, fp32_nodes=islands, progress=lambda line: None)
"""


def main() -> None:
    """Measure and print."""
    options = parse(__doc__ or "", rounds=(int, 5, "rounds"), sm=(str, "89", "compute capability: 86, 89 or 120"))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = _exported(place)
        made_by = "edgecomp export --precision fp16" if model else "hand-written ViT-B"
        model = model or _vit_b(place / "vit-b")
        runs: dict[str, list[str]] = {
            "bare": [sys.executable, "-c", _BARE, str(model), str(place / "bare.engine"), options.sm],
            "edgecomp": [sys.executable, "-c", _OURS, str(model), str(place / "out"), options.sm],
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        memory: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(1 + (1 if options.quick else options.rounds)):
            for name, command in runs.items():
                _empty(place / "out")
                taken, peak = _run(command)
                if turn:  # the first round fills the system's cache of files
                    seconds[name].append(taken)
                    memory[name].append(peak)
        same = _compare(place)
    ratios = [ours / bare for ours, bare in zip(seconds["edgecomp"], seconds["bare"], strict=True)]
    rows: list[list[object]] = [
        [name, f"{statistics.median(found):.2f}", f"{min(found):.2f}", f"{max(found):.2f}", f"{max(memory[name]):.0f}"]
        for name, found in seconds.items()
    ]
    rows.append(["ratio", f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f}", f"{max(ratios):.2f}", ""])
    title = f"build of a ViT-B fp16 ({made_by}) for SM{options.sm}: seconds; plans: {same}"
    publish(title, ["process", "median", "min", "max", "peak MiB"], rows, options.json)


def _run(command: list[str]) -> tuple[float, float]:
    """Return the seconds and the peak MiB of a process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    taken = time.perf_counter() - started
    if status:
        raise SystemExit(f"{command[:4]} failed: {process.stderr.read().decode() if process.stderr else status}")
    return taken, usage.ru_maxrss / 1024


def _empty(folder: Path) -> None:
    for file in folder.glob("*"):
        file.unlink()


def _compare(place: Path) -> str:
    plans = [place / "bare.engine", *(place / "out").glob("*.engine")]
    digests = {hashlib.sha256(plan.read_bytes()).hexdigest() for plan in plans}
    return "the same bytes" if len(digests) == 1 else "other bytes"


def _exported(place: Path) -> Path | None:
    """Return a plain fp16 ViT-B as edgecomp exports it; `None` where it cannot yet."""
    words = ["--method", "tome", "--backbone", "vit_base_patch16_224", "--precision", "fp16", "--with-plain"]
    done = subprocess.run(
        [sys.executable, "-m", "edgecomp", "export", *words, "--out", str(place / "bundle")],
        capture_output=True,
        check=False,
    )
    model = place / "bundle" / "plain.onnx"
    return model if done.returncode == 0 and model.is_file() else None


def _vit_b(folder: Path, *, depth: int = 12, width: int = 768, heads: int = 12, tokens: int = 196) -> Path:
    """Write a ViT-B in fp16, LayerNorm and softmax in fp32, with its weights in a file beside it."""
    import onnx

    helper, kinds = onnx.helper, onnx.TensorProto
    random = np.random.default_rng(0)
    nodes: list[Any] = []
    weights: list[Any] = []

    def weight(name: str, *shape: int, dtype: type = np.float16) -> str:
        weights.append(onnx.numpy_helper.from_array((random.standard_normal(shape) * 0.02).astype(dtype), name))
        return name

    def add(op: str, name: str, inputs: list[str], **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def norm(name: str, x: str) -> str:
        x = add("Cast", f"{name}/up", [x], to=kinds.FLOAT)
        scale, bias = weight(f"{name}.w", width, dtype=np.float32), weight(f"{name}.b", width, dtype=np.float32)
        return add("Cast", f"{name}/down", [add("LayerNormalization", name, [x, scale, bias])], to=kinds.FLOAT16)

    def dense(name: str, x: str, rows: int, columns: int) -> str:
        x = add("MatMul", f"{name}/MatMul", [x, weight(f"{name}.weight", rows, columns)])
        return add("Add", f"{name}/Add", [x, weight(f"{name}.bias", columns)])

    for name, shape in {
        "grid": [1, width, tokens], "split": [1, tokens, heads, width // heads], "join": [1, tokens, width],
    }.items():  # fmt: skip
        weights.append(onnx.numpy_helper.from_array(np.array(shape), name))
    kernel = weight("patch.weight", width, 3, 16, 16)
    x = add("Conv", "/patch/Conv", ["image", kernel], kernel_shape=[16, 16], strides=[16, 16])
    x = add("Transpose", "/patch/T", [add("Reshape", "/patch/R", [x, "grid"])], perm=[0, 2, 1])
    for index in range(depth):
        name = f"/blocks.{index}"
        inner = norm(f"{name}/norm1", x)
        parts = {}
        for part, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
            one = add("Reshape", f"{name}/{part}/R", [dense(f"{name}/{part}", inner, width, width), "split"])
            parts[part] = add("Transpose", f"{name}/{part}/T", [one], perm=order)
        scores = add("MatMul", f"{name}/scores", [parts["q"], parts["k"]])
        scores = add("Softmax", f"{name}/softmax", [add("Cast", f"{name}/s/up", [scores], to=kinds.FLOAT)], axis=-1)
        scores = add("Cast", f"{name}/s/down", [scores], to=kinds.FLOAT16)
        out = add("Transpose", f"{name}/o/T", [add("MatMul", f"{name}/o", [scores, parts["v"]])], perm=[0, 2, 1, 3])
        out = dense(f"{name}/proj", add("Reshape", f"{name}/o/R", [out, "join"]), width, width)
        x = add("Add", f"{name}/res1", [x, out])
        inner = add("Gelu", f"{name}/gelu", [dense(f"{name}/fc1", norm(f"{name}/norm2", x), width, 4 * width)])
        x = add("Add", f"{name}/res2", [x, dense(f"{name}/fc2", inner, 4 * width, width)])
    graph = helper.make_graph(
        nodes,
        "vit-b",
        [helper.make_tensor_value_info("image", kinds.FLOAT16, [1, 3, 224, 224])],
        [helper.make_tensor_value_info(x, kinds.FLOAT16, [1, tokens, width])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    folder.mkdir()
    onnx.save(model, folder / "plain.onnx", save_as_external_data=True, location="weights.data")
    return folder / "plain.onnx"


if __name__ == "__main__":
    main()
