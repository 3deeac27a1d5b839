"""The merge kernel on an NVIDIA GPU, against torch eager and torch.compile, and as a multiple of its floor.

    python benchmarks/merge_gpu.py [--rounds 9] [--json FILE]

Needs a GPU, nvcc, and a torch with CUDA; without one of them it says which is missing and measures nothing.

The kernel is called through its C interface, without TensorRT. The floor is what no form can avoid: the bytes that go
in and out at the copy bandwidth that this card shows in the same rounds, or one launch of an empty kernel where that
takes longer. Where a TensorRT is installed that builds for this card, ViT-S engines follow: plain, and with ToMe by the
plugin and by the function body; and a plan that was built for SM80 is loaded here, to see whether it runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import interleave, parse, publish, ratio
from torch import Tensor

from edgecomp import api
from edgecomp.bundle import open_bundle
from edgecomp.engines import choose_flavour, load_flavour, local_gpu_sm
from edgecomp.errors import EdgecompError
from edgecomp.resources import data_path
from edgecomp.specs import load_target

_SHAPES = ((197, 384, 16, 1), (576, 768, 288, 0), (1024, 768, 512, 0))  # tokens, width, r, prefix
_BATCHES = (1, 8, 64)
_METRIC_WIDTH = 64
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
_COPIED = 1 << 28  # bytes of the copy that shows the bandwidth


def main() -> None:
    """Measure and print."""
    options = parse(__doc__ or "", rounds=(int, 9, "rounds"))
    missing = _missing()
    if missing:
        print(f"nothing measured: {missing}")
        return
    rounds = 2 if options.quick else options.rounds
    with tempfile.TemporaryDirectory() as folder:
        kernel = _compile(Path(folder))
        gigabytes = _copy_bandwidth(rounds)
        rows = [
            row
            for name, dtype in _DTYPES.items()
            for shape in _SHAPES
            for batch in _BATCHES
            for row in _time_merge(kernel, name, dtype, shape, batch, gigabytes, rounds)
        ]
        header = ["type", "tokens, width, r", "batch", "form", "us", "over the floor", "kernel's time over it"]
        title = f"one merge step, copy bandwidth {gigabytes:.0f} GB/s, medians of interleaved rounds"
        publish(title, header, rows, options.json)
        title = "ViT-S engines, fp32, batch 1, medians of interleaved rounds"
        path = options.json and options.json.with_stem(f"{options.json.stem}-engines")
        publish(title, ["engine", "ms", "speed over plain"], _time_engines(Path(folder), rounds), path)
        print(_does_sm80_plan_run(Path(folder)))


def _missing() -> str:
    if local_gpu_sm() is None:
        return "there is no NVIDIA GPU on this machine"
    if not torch.cuda.is_available():
        return "this torch has no CUDA"
    if shutil.which("nvcc") is None:
        return "there is no nvcc on PATH"
    return ""


# -- one merge step -------------------------------------------------------------------------------------------


def _compile(folder: Path) -> ctypes.CDLL:
    """Compile the kernel alone for this card."""
    sm, out = local_gpu_sm(), folder / "kernel.so"
    source = data_path("engines", "plugins", "topk_merge") / "kernel.cu"
    words = ["-shared", "-std=c++17", "-O3", f"-gencode=arch=compute_{sm},code=sm_{sm}", "-Xcompiler=-fPIC"]
    subprocess.run(["nvcc", *words, str(source), "-o", str(out)], check=True)
    library = ctypes.CDLL(str(out))
    library.edgecomp_topk_merge_workspace.restype = ctypes.c_size_t
    return library


def _on_gpu(run: Callable[[], object], calls: int) -> Callable[[], object]:
    """Return `calls` runs in a row, and the wait for the last of them."""

    def many() -> None:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()

    return many


def _copy_bandwidth(rounds: int) -> float:
    """Return GB/s, read and written, of a copy on the card."""
    source = torch.ones(_COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    samples = interleave({"copy": _on_gpu(lambda: target.copy_(source), 20)}, rounds=rounds)
    return 20 * 2 * _COPIED / (statistics.median(samples["copy"]) * 1e-3) / 1e9


def _time_merge(
    library: ctypes.CDLL,
    type_name: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    batch: int,
    gigabytes: float,
    rounds: int,
) -> list[list[object]]:
    tokens, width, r, prefix = shape
    metric = torch.randn(batch, tokens, _METRIC_WIDTH, device="cuda", dtype=dtype)
    x = torch.randn(batch, tokens, width, device="cuda", dtype=dtype)
    size = torch.ones(batch, tokens, 1, device="cuda")
    empty = torch.zeros(1, device="cuda")
    compiled = torch.compile(_merge_eagerly, dynamic=False)
    calls = 50
    forms: dict[str, Callable[[], object]] = {
        "empty launch": empty.zero_,
        "kernel": _kernel_call(library, metric, x, size, r, prefix),
        "torch eager": lambda: _merge_eagerly(metric, x, size, r, prefix),
        "torch.compile": lambda: compiled(metric, x, size, r, prefix),
    }
    samples = interleave({name: _on_gpu(run, calls) for name, run in forms.items()}, rounds=rounds)
    times = {name: statistics.median(values) / calls * 1e3 for name, values in samples.items()}
    moved = metric.nbytes + x.nbytes * (2 * tokens - r) / tokens + size.nbytes * (2 * tokens - r) / tokens
    floor = max(moved / gigabytes / 1e3, times["empty launch"])
    at = [type_name, f"{tokens}, {width}, {r}", batch]
    rows: list[list[object]] = [[*at, "floor", f"{floor:.1f}", "1.0", ""]]
    for name in list(forms)[1:]:
        gain = f"{ratio(samples, 'kernel', name):.2f}"
        rows.append([*at, name, f"{times[name]:.1f}", f"{times[name] / floor:.1f}", gain])
    return rows


def _kernel_call(
    library: ctypes.CDLL, metric: Tensor, x: Tensor, size: Tensor, r: int, prefix: int
) -> Callable[[], object]:
    """Return a call of the kernel on the current stream, with memory of its own for the outputs."""
    batch, tokens, width = x.shape
    kind = [torch.float32, torch.float16, torch.bfloat16].index(x.dtype)
    params = (ctypes.c_int32 * 10)(batch, tokens, metric.shape[-1], width, r, prefix, 0, 0, 0, kind)
    needed = library.edgecomp_topk_merge_workspace(ctypes.byref(params))
    kept = [
        metric,
        x,
        size,
        x.new_empty(batch, tokens - r, width),
        size.new_empty(batch, tokens - r, 1),
        torch.empty(needed, dtype=torch.uint8, device=x.device),
    ]
    at = [ctypes.c_void_p(value.data_ptr()) for value in kept]
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)

    def run() -> list[Tensor]:
        code = library.edgecomp_topk_merge(
            stream, ctypes.byref(params), *at[:3], None, *at[3:5], None, at[5], ctypes.c_size_t(needed)
        )
        if code:
            raise RuntimeError(f"the kernel refuses: code {code}")
        return kept

    return run


def _merge_eagerly(metric: Tensor, x: Tensor, size: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Merge as the paper's section 3 has it: a full ranking, and a scatter that adds."""
    unit = metric / metric.norm(dim=-1, keepdim=True)
    scores = unit[:, ::2] @ unit[:, 1::2].mT
    if prefix:
        scores[:, 0] = -torch.inf
    best, nearest = scores.max(dim=-1)
    ranking = best.argsort(dim=-1, descending=True)
    sources, kept = ranking[:, :r, None], ranking[:, r:].sort(dim=-1).values[..., None]
    target = nearest[..., None].gather(1, sources)

    def merge(values: Tensor) -> Tensor:
        even, odd, width = values[:, ::2], values[:, 1::2], values.shape[-1]
        moved = even.gather(1, sources.expand(-1, -1, width))
        odd = odd.scatter_add(1, target.expand(-1, -1, width), moved)
        return torch.cat([even.gather(1, kept.expand(-1, -1, width)), odd], dim=1)

    total = merge(size)
    return (merge(x * size) / total).to(x.dtype), total


# -- engines --------------------------------------------------------------------------------------------------


def _time_engines(folder: Path, rounds: int) -> list[list[object]]:
    target = next((t for row in api.list_targets() if (t := load_target(row.name)).sm == local_gpu_sm()), None)
    if target is None:
        return [[f"none: no target of SM{local_gpu_sm()} is shipped", "", ""]]
    plans = {}
    try:
        choose_flavour(target)
        api.export("tome", backbone="vit_small_patch16_224", output="logits", with_plain=True, out=folder / "tome")
        bundle = open_bundle(folder / "tome")
        for plugin in ("require", "off"):
            report = api.build(bundle.path, target=target.name, plugin=plugin)
            for built in report.engines:
                merging = "ToMe, plugin" if built.record.plugins else "ToMe, function body"
                plans[merging if built.record.merges else "plain"] = built.path
    except EdgecompError as error:
        return [[f"none: {error}", "", ""]]
    with contextlib.ExitStack() as stack:
        runs = {name: stack.enter_context(_engine(path)) for name, path in plans.items()}
        calls = 50
        samples = interleave({name: _on_gpu(run, calls) for name, run in runs.items()}, rounds=rounds)
    return [
        [name, f"{statistics.median(values) / calls:.3f}", f"{ratio(samples, 'plain', name):.2f}"]
        for name, values in samples.items()
    ]


@contextlib.contextmanager
def _engine(plan: Path) -> Iterator[Callable[[], object]]:
    """Load a plan, with the plugin library beside it, and yield a call of it on random inputs."""
    flavour = load_flavour("rtx" if ".rtx." in plan.name else "tensorrt")
    trt: Any = flavour.module
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    for library in plan.parent.glob("*.so") if ".plugin." in plan.name else ():
        runtime.get_plugin_registry().load_library(str(library))
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise RuntimeError(f"{plan.name} does not load on this card")
    context = engine.create_execution_context()
    kinds = {trt.DataType.FLOAT: torch.float32, trt.DataType.HALF: torch.float16, trt.DataType.INT32: torch.int32}
    kept = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        shape, kind = tuple(engine.get_tensor_shape(name)), kinds[engine.get_tensor_dtype(name)]
        kept.append(torch.randn(shape, device="cuda").to(kind))
        context.set_tensor_address(name, kept[-1].data_ptr())
    stream = torch.cuda.Stream()
    yield lambda: context.execute_async_v3(stream.cuda_stream)
    torch.cuda.synchronize()


def _does_sm80_plan_run(folder: Path) -> str:
    """Build for SM80 and load the plan here."""
    try:
        target = load_target("a100")
        runtime = choose_flavour(target, "rtx")
        onnx = open_bundle(folder / "tome").path
        report = api.build(onnx, target=target.name, runtime=runtime, plugin="off")
        with _engine(report.engines[0].path) as run:
            run()
            torch.cuda.synchronize()
    except (EdgecompError, RuntimeError) as error:
        return f"a plan for SM80 on SM{local_gpu_sm()}: no ({error})"
    return f"a plan for SM80 on SM{local_gpu_sm()}: it runs"


if __name__ == "__main__":
    main()
