"""One merge step in ONNX Runtime, as a multiple of its floor.

    python benchmarks/merge.py [--rounds 9] [--json FILE]

The floor is what no form can avoid, measured in the same rounds: the score product of the two halves, and a copy of as
many bytes as go in and out. The forms: the function body as it ships, its two ways of summing groups forced, the token
maths of `_tokens.py` exported as they stand (a full one-hot product), and the paper's form (a full ranking and
ScatterElements with a sum, which no TensorRT takes).
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from common import interleave, parse, publish, ratio
from torch import Tensor, nn

from edgecomp.compressors._tokens import merge_pairs, pair_tokens, top_k_merge
from edgecomp.compressors.tome import bipartite_soft_matching
from edgecomp.export.lower import lower
from edgecomp.export.merge_body import merge_body
from edgecomp.export.passes import add_merge_body
from edgecomp.runners import open_runner
from edgecomp.specs import TensorSpec

_WIDTH = 64  # of the metric
_SHAPES = ((197, 384, 16, 1), (576, 768, 288, 0), (1024, 768, 512, 0))  # tokens, width, r, prefix


class _Step(nn.Module):
    def __init__(self, form: Callable[..., tuple[Tensor, Tensor]], r: int, prefix: int) -> None:
        super().__init__()
        self.form, self.r, self.prefix = form, r, prefix

    def forward(self, metric: Tensor, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        return self.form(metric, x, size, self.r, self.prefix)


def _op(metric: Tensor, x: Tensor, size: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    return top_k_merge(metric, x, size, r=r, num_prefix_tokens=prefix)[:2]


def _one_hot(metric: Tensor, x: Tensor, size: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    return merge_pairs(pair_tokens(metric, r=r, num_prefix_tokens=prefix), x, size)


def _paper(metric: Tensor, x: Tensor, size: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    return bipartite_soft_matching(metric, x, size, r, prefix, ascending=True)[:2]


#: name -> the form, and the largest r its body is made for (0: the step's own; none: it needs no body)
_FORMS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], int]] = {
    "edgecomp's body": (_op, 0),
    "body, groups at once": (_op, 1),
    "body, groups in chunks": (_op, 1 << 20),
    "one-hot product over all": (_one_hot, -1),
    "paper: ranking, ScatterElements(add)": (_paper, -1),
}


def main() -> None:
    """Measure and print."""
    options = parse(__doc__ or "", rounds=(int, 9, "rounds"))
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in _SHAPES:
            rows += _time_shape(Path(folder), shape, rounds=2 if options.quick else options.rounds)
    header = ["tokens, width, r", "threads", "form", "us", "over the floor"]
    publish("one merge step, batch 1, medians of interleaved rounds", header, rows, options.json)


def _time_shape(folder: Path, shape: tuple[int, int, int, int], *, rounds: int) -> list[list[object]]:
    tokens, width, r, _ = shape
    generator = np.random.default_rng(0)
    inputs = {
        "metric": generator.standard_normal((1, tokens, _WIDTH), dtype=np.float32),
        "x": generator.standard_normal((1, tokens, width), dtype=np.float32),
        "size": np.ones((1, tokens, 1), np.float32),
    }
    files = {
        name: _export(folder / f"{index}.onnx", *form, shape, inputs)
        for index, (name, form) in enumerate(_FORMS.items())
    }
    rows: list[list[object]] = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        runs: dict[str, Callable[[], object]] = {"floor": _floor(tokens, width, r)}
        for name, file in files.items():
            runner = open_runner("onnxruntime", file, threads=threads)
            runs[name] = lambda runner=runner: runner.infer(inputs)  # type: ignore[misc]
        samples = interleave(runs, rounds=rounds, repeats=100 if tokens < 500 else 30)
        for name in runs:
            microseconds = statistics.median(samples[name]) * 1e3
            over = f"{ratio(samples, name, 'floor'):.1f}"
            rows.append([f"{tokens}, {width}, {r}", threads, name, f"{microseconds:.0f}", over])
    return rows


def _floor(tokens: int, width: int, r: int) -> Callable[[], object]:
    """Return a run of the score product and of a copy that reads and writes as many bytes as the step must."""
    a, b = torch.randn(tokens // 2, _WIDTH), torch.randn(_WIDTH, tokens // 2)
    scores = torch.empty(tokens // 2, tokens // 2)
    moved = tokens * (_WIDTH + width) + (tokens - r) * width  # floats in and out
    source, target = torch.ones(moved // 2), torch.empty(moved // 2)

    def run() -> None:
        torch.mm(a, b, out=scores)
        target.copy_(source)

    return run


def _export(
    path: Path,
    form: Callable[..., tuple[Tensor, Tensor]],
    largest_r: int,
    shape: tuple[int, int, int, int],
    inputs: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]],
) -> Path:
    tokens, width, r, prefix = shape
    specs = [TensorSpec(name, value.shape, "float32", "features") for name, value in inputs.items()]
    outputs = [
        TensorSpec("y", (1, tokens - r, width), "float32", "tokens"),
        TensorSpec("merged_size", (1, tokens - r, 1), "float32", "features"),
    ]
    model = lower(_Step(form, r, prefix), inputs=specs, outputs=outputs, opset=20)
    add_merge_body(model)
    if largest_r > 0:
        body = merge_body(
            mode="wavg", partition="alternate", order="ascending", largest_r=largest_r, with_map=False, opset=20
        )
        model.functions[body.identifier()] = body
    ir.save(model, path)
    return path


if __name__ == "__main__":
    main()
