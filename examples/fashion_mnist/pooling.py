"""Plain average pooling of the patch grid in one block of the host: what pruning has to beat. Not a method of edgecomp.

A constant matrix averages adaptive bins of the 7 x 7 patches: no score, no TopK, one product.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from host import PREPROCESS, load_host
from torch import Tensor, nn
from torch.nn import functional as F

from edgecomp.evaluation import balanced_subset, open_data, score
from edgecomp.export.flops import count_flops
from edgecomp.export.lower import lower
from edgecomp.profiles.machine import read_machine
from edgecomp.report.evaluate import EvaluationReport
from edgecomp.runners import open_runner
from edgecomp.specs import Preprocess, TensorSpec

__all__ = ["PooledHost", "evaluate_pooling", "nearest_grid", "pooling_matrix"]

_SIDE, _PIXELS, _OPSET = 7, 28, 20
_PREPROCESS = Preprocess(
    size=_PIXELS,
    crop=PREPROCESS["crop_pct"],
    interpolation=PREPROCESS["interpolation"],
    mean=PREPROCESS["mean"],
    std=PREPROCESS["std"],
)


def nearest_grid(count: int) -> tuple[int, int]:
    """Return the grid, square or one row longer than wide, whose cells come nearest to `count`; of two the smaller."""
    grids = [(rows, columns) for rows in range(1, _SIDE + 1) for columns in (rows - 1, rows) if columns]
    return min(grids, key=lambda grid: (abs(grid[0] * grid[1] - count), grid))


def pooling_matrix(grid: tuple[int, int]) -> Tensor:
    """Return the matrix (M, 49) of adaptive average pooling; where 7 is no multiple of a side, bins overlap."""
    cells = torch.eye(_SIDE * _SIDE).reshape(-1, _SIDE, _SIDE)
    return F.adaptive_avg_pool2d(cells, grid).flatten(1).T.contiguous()  # (M, 49)


class PooledHost(nn.Module):
    """The host with its patches pooled between attention and MLP of one block, where edgecomp's pruners act too.

    Shapes: image (B, 3, 28, 28) -> logits (B, 10).

    Args:
        grid: what the 7 x 7 patches become; None: nothing is pooled, which is the plain host.
        block: in which, counted from 0.
    """

    matrix: Tensor

    def __init__(self, grid: tuple[int, int] | None, block: int) -> None:
        super().__init__()
        self.host: Any = load_host()
        self.block = -1 if grid is None else block
        self.register_buffer("matrix", pooling_matrix(grid or (_SIDE, _SIDE)))

    def forward(self, image: Tensor) -> tuple[Tensor]:
        """Return the logits."""
        host = self.host
        tokens = host.norm_pre(host.patch_drop(host._pos_embed(host.patch_embed(image))))
        for index, block in enumerate(host.blocks):
            tokens = tokens + block.ls1(block.attn(block.norm1(tokens)))
            if index == self.block:
                tokens = torch.cat([tokens[:, :1], self.matrix @ tokens[:, 1:]], 1)  # (B, 1 + M, D)
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        return (host.forward_head(host.norm(tokens)),)


def evaluate_pooling(
    data: Path, *, grids: Sequence[tuple[int, int]], block: int, batch: int, threads: int, limit: int | None
) -> EvaluationReport:
    """Return what `api.evaluate` would, of the plain host and of pooling to each of `grids` in a block."""
    image = TensorSpec("image", (batch, 3, _PIXELS, _PIXELS), "float32", "image")
    logits = TensorSpec("logits", (batch, 10), "float32", "features")
    images = open_data(data)
    count = min(limit or len(images.labels), len(images.labels))
    indices = balanced_subset(images.labels, count, seed=0) if count < len(images.labels) else np.arange(count)
    kept, flops = {}, {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        runners = {}
        for grid in (None, *sorted(grids)):
            name = "plain" if grid is None else f"{grid[0]}x{grid[1]}"
            graph = lower(PooledHost(grid, block).eval(), inputs=[image], outputs=[logits], opset=_OPSET)
            kept[name], flops[name] = _SIDE * _SIDE if grid is None else grid[0] * grid[1], count_flops(graph) // batch
            path = Path(folder) / f"{name}.onnx"
            ir.save(graph, path)
            session = open_runner("onnxruntime", path, threads=threads, takes_turns=True)
            runners[name] = stack.enter_context(session)
        machine = read_machine()
        found = score(
            runners,
            plain="plain",
            data=images,
            indices=indices,
            preprocess=_PREPROCESS,
            input_name=image.name,
            dtype="float32",
            output_name=logits.name,
            batch=batch,
            num_classes=10,
        )
    return EvaluationReport(
        bundle="",
        data=str(data),
        layout=images.kind,
        found=len(images.labels),
        seed=0,
        runner=session.name,
        version=session.version,
        threads=threads,
        machine=machine,
        kept=kept,
        flops=flops,
        plain="plain",
        max_drop=None,
        notes=(),
        evaluation=found,
    )
