"""Wall time of `edgecomp build` with TensorRT for RTX over a bare builder on the same graph, both as fresh processes.

    python benchmarks/build.py [--rounds 5] [--sm 89] [--json FILE]

A ViT-B/16 at 224 pixels in fp16, random weights. The bare process parses the file and builds a strongly typed network;
`build_engine` also hashes graph, weights and plan, proves the types of the matrix products, and writes plan and record
to disk, with fsync. Both write the plan. Reach 1.2. The peak memory of both stands beside. The graph is the plain model
of a tome bundle that `edgecomp export --precision fp16 --with-plain` makes.
"""

from __future__ import annotations

import hashlib
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import parse, publish, run_apart

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
graphs = open_bundle(model.parent, verify=False).manifest.graphs
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
        model = _export(place)
        runs: dict[str, list[str]] = {
            "bare": [sys.executable, "-c", _BARE, str(model), str(place / "bare.engine"), options.sm],
            "edgecomp": [sys.executable, "-c", _OURS, str(model), str(place / "out"), options.sm],
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        memory: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(1 + (1 if options.quick else options.rounds)):
            for name, command in runs.items():
                _empty(place / "out")
                done = run_apart(command)
                if turn:  # the first round fills the system's cache of files
                    seconds[name].append(done.seconds)
                    memory[name].append(done.peak_mib)
        same = _compare(place)
    ratios = [ours / bare for ours, bare in zip(seconds["edgecomp"], seconds["bare"], strict=True)]
    rows: list[list[object]] = [
        [name, f"{statistics.median(found):.2f}", f"{min(found):.2f}", f"{max(found):.2f}", f"{max(memory[name]):.0f}"]
        for name, found in seconds.items()
    ]
    rows.append(["ratio", f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f}", f"{max(ratios):.2f}", ""])
    title = f"build of a ViT-B fp16 for SM{options.sm}: seconds; plans: {same}"
    publish(title, ["process", "median", "min", "max", "peak MiB"], rows, options.json)


def _empty(folder: Path) -> None:
    for file in folder.glob("*"):
        file.unlink()


def _compare(place: Path) -> str:
    plans = [place / "bare.engine", *(place / "out").glob("*.engine")]
    digests = {hashlib.sha256(plan.read_bytes()).hexdigest() for plan in plans}
    return "the same bytes" if len(digests) == 1 else "other bytes"


def _export(place: Path) -> Path:
    words = ["--method", "tome", "--backbone", "vit_base_patch16_224", "--precision", "fp16", "--with-plain"]
    command = [sys.executable, "-m", "edgecomp", "export", *words, "--out", str(place / "bundle")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return place / "bundle" / "plain.onnx"


if __name__ == "__main__":
    main()
