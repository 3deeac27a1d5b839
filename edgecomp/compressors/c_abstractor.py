"""C-Abstractor: convolutions on the token grid, adaptive average pooling, convolutions, and an MLP to another width.

Paper: "Honeybee: Locality-enhanced Projector for Multimodal LLM" (arXiv:2312.06742), section 4.2. The released code is
khanrc/honeybee, at the commit in `export/recipes/c-abstractor.toml`; its stages are timm's `RegStage`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecomp.compressors._base import Compressor, Natural, Params, Positive, constant
from edgecomp.compressors._checkpoint import count_numbered, load_exactly, part_with
from edgecomp.compressors._eager import norm_channels
from edgecomp.compressors._grid import adaptive_line, grid_sides, resample_grid, squares_up_to
from edgecomp.compressors._keys import CONV_1X1, KeyMap, leading_axis
from edgecomp.errors import InvalidSpec, WeightsError
from edgecomp.specs import Output, Site, TensorSpec, TokenBudget

__all__ = ["CAbstractor"]

_EPS = 1e-5  # of the norms inside a stage (timm's LayerNormAct2d)
_PRENORM_EPS = 1e-6


class CAbstractorParams(Params, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of C-Abstractor.

    Attributes:
        tokens: tokens handed over where no host says how many.
        embed_dim: width of the tokens; a host decides it.
        hidden_dim: width of the convolutions.
        output_dim: width of what comes out: a language model's.
        depth: blocks of each of the two stages; 0: pooling and MLP alone.
        mlp_depth: linear layers of the MLP.
        eos_tokens: learned tokens behind the pooled ones; a budget counts them.
        prenorm: LayerNorm on the tokens.
        positions: a learned table over the tokens, added to them.
        grid_rows: rows of the grid of tokens; 0: it is square.
        query_rows: rows of the pooled grid; 0: it is square.
    """

    tokens: Positive = 576
    embed_dim: Positive = 1024
    hidden_dim: Positive = 1024
    output_dim: Positive = 4096
    depth: Natural = 3
    mlp_depth: Positive = 2
    eos_tokens: Natural = 0
    prenorm: bool = False
    positions: bool = True
    grid_rows: Natural = 0
    query_rows: Natural = 0


class RegBlock(nn.Module):
    """A bottleneck of RegNet with squeeze-and-excitation, on tokens (B, N, C) -> (B, N, D)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        squeezed = round(channels * 0.25)
        self.conv1, self.norm1 = nn.Linear(channels, width, bias=False), nn.LayerNorm(width, eps=_EPS)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.squeeze, self.excite = nn.Linear(width, squeezed), nn.Linear(squeezed, width)
        self.conv3, self.norm3 = nn.Linear(width, width, bias=False), nn.LayerNorm(width, eps=_EPS)
        if channels != width:
            self.shortcut, self.shortcut_norm = nn.Linear(channels, width, bias=False), nn.LayerNorm(width, eps=_EPS)

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """Return the block's output for tokens in raster order."""
        hidden = F.silu(self.norm1(self.conv1(x)))
        plane = hidden.transpose(1, 2).reshape(hidden.shape[0], hidden.shape[2], rows, columns)
        hidden = F.silu(self.norm2(self.conv2(plane).flatten(2).transpose(1, 2)))
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(hidden.mean(1, keepdim=True)))))  # (B, 1, D)
        hidden = self.norm3(self.conv3(hidden * gate))
        skip = self.shortcut_norm(self.shortcut(x)) if hasattr(self, "shortcut") else x
        return F.silu(hidden + skip)


def _stage(depth: int, channels: int, width: int) -> nn.ModuleList:
    return nn.ModuleList(RegBlock(channels if index == 0 else width, width) for index in range(depth))


class CAbstractor(Compressor):
    """Pool a grid of tokens between two stages of convolutions, and map it to another width.

    Shapes: tokens (B, N, C) on an h x w grid -> abstracted (B, M, O), M = q p pooled tokens on a q x p grid, in raster
    order, and `eos_tokens` behind them. Weights do not depend on M.

    Static rewrite: nothing in the original depends on data (level E0). Adaptive pooling is a constant matrix, applied
    in its two factors. Tokens stay (B, N, D) throughout, so that 1x1 convolutions are products and norms act on the
    last axis; only the depthwise 3x3 convolution sees them as planes.

    Source: arXiv:2312.06742, section 4.2; khanrc/honeybee, honeybee/projectors/projectors.py.
    """

    Params = CAbstractorParams
    reads_grid = True
    budget_hint = ", or with --set params.query_rows=ROWS whole rows, besides the eos_tokens"
    unstored_params = ("grid_rows", "query_rows")
    zero_means: ClassVar[Mapping[str, str]] = dict.fromkeys(unstored_params, "a square grid")
    pool_rows: Tensor
    pool_columns: Tensor

    def __init__(self, params: CAbstractorParams, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        width = params.hidden_dim if params.depth else params.embed_dim
        self.grid, self.pooled = _grids(params, budget)
        for name, source, target in zip(("pool_rows", "pool_columns"), self.grid, self.pooled, strict=True):
            self.register_buffer(name, constant(adaptive_line(source, target)), persistent=False)
        if params.prenorm:
            self.prenorm = nn.LayerNorm(params.embed_dim, eps=_PRENORM_EPS)
        if params.positions:
            self.positions = nn.Parameter(torch.zeros(budget.tokens_in, params.embed_dim))
        self.before = _stage(params.depth, params.embed_dim, width)
        self.after = _stage(params.depth, width, width)
        self.mlp = nn.ModuleList(
            nn.Linear(width if index == 0 else params.output_dim, params.output_dim)
            for index in range(params.mlp_depth)
        )
        if params.eos_tokens:
            self.eos = nn.Parameter(torch.zeros(params.eos_tokens, params.output_dim))

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `tokens`."""
        return (TensorSpec("tokens", (batch, self.budget.tokens_in, self.params.embed_dim), "float32", "tokens"),)

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `abstracted`."""
        shape = (batch, self.budget.tokens_out, self.params.output_dim)
        return (TensorSpec("abstracted", shape, "float32", "tokens"),)

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return the pooled tokens, and those of the end behind them."""
        x = self.prenorm(tokens) if self.params.prenorm else tokens
        if self.params.positions:
            x = x + self.positions
        for block in self.before:
            x = block(x, *self.grid)
        x = resample_grid(x, self.pool_rows, self.pool_columns)
        for block in self.after:
            x = block(x, *self.pooled)
        for index, layer in enumerate(self.mlp):
            x = layer(F.silu(x) if index else x)
        if self.params.eos_tokens:
            x = torch.cat([x, self.eos.expand(x.shape[0], -1, -1)], dim=1)
        return (x,)

    def reference(self) -> nn.Module:
        """Return the original's forward pass on this module's parameters."""
        return CAbstractorOriginal(self)

    @classmethod
    def possible_counts(cls, params: CAbstractorParams, site: Site) -> tuple[int, ...]:
        """Return the sizes of the pooled grids, with the tokens behind them."""
        most, rows = site.tokens_in - params.eos_tokens, params.query_rows
        pooled = tuple(range(rows, most + 1, rows)) if rows else squares_up_to(max(0, most))
        return tuple(count + params.eos_tokens for count in pooled)

    @classmethod
    def layout_of(cls, state: Mapping[str, Tensor]) -> str:
        """Return `honeybee` for the released code's keys."""
        return "" if _is_own_layout(state) else "honeybee" if part_with(state, _ANCHOR) else ""

    @classmethod
    def infer_params(cls, state: Mapping[str, Tensor], params: CAbstractorParams) -> dict[str, Any]:  # noqa: ARG003
        """Return widths, depths and tables of a checkpoint."""
        own, _ = _to_own_keys(state)
        sizes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        if "mlp.0.weight" not in sizes:
            raise WeightsError(
                f"weights are in neither layout of c-abstractor, honeybee or edgecomp; first keys: "
                f"{', '.join(list(state)[:5])}. Give a checkpoint whose keys hold abstractor.readout.0.weight"
            )
        output, width = sizes["mlp.0.weight"]
        found: dict[str, Any] = {"output_dim": output, "mlp_depth": count_numbered(sizes, "mlp")}
        found |= {"depth": count_numbered(sizes, "before"), "prenorm": "prenorm.weight" in sizes}
        found |= {"positions": "positions" in sizes, "eos_tokens": sizes.get("eos", (0,))[0]}
        if found["depth"]:
            found["hidden_dim"] = width
        if "before.0.conv1.weight" in sizes:
            found["embed_dim"] = sizes["before.0.conv1.weight"][1]
        elif "positions" in sizes:
            found["embed_dim"] = sizes["positions"][1]
        if "positions" in sizes:
            found["tokens"] = _tokens_of(sizes["positions"][0])
        return found

    def load_original(self, state: Mapping[str, Tensor], *, unread: Sequence[str] = ()) -> str:
        """Load a checkpoint of Honeybee, whole model or abstractor alone, or edgecomp's own.

        An old checkpoint has a row for the class token in front of its position table, which is dropped.
        """
        layout = self.layout_of(state) or "edgecomp"
        own, file_keys = _to_own_keys(state)
        tokens = self.budget.tokens_in
        table = own.get("positions")
        if layout == "honeybee" and table is not None and table.ndim == 2 and len(table) != tokens:
            if len(table) != tokens + 1:
                raise WeightsError(
                    f"the weights have positions for {_tokens_of(len(table))} tokens, and {tokens} go in; give an "
                    "image of the size that they were trained with (--image-size), or params.tokens without a host"
                )
            own["positions"] = table[1:]
        load_exactly(self, own, layout=layout, unread=unread, file_keys=file_keys)
        return layout

    @property
    def key_maps(self) -> Mapping[str, KeyMap]:
        """Honeybee's names."""
        return {"honeybee": _HONEYBEE}


def _grids(params: CAbstractorParams, budget: TokenBudget) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the sides of the grid of tokens and of the pooled one."""
    pooled = budget.tokens_out - params.eos_tokens
    if pooled < 1:
        raise InvalidSpec(
            f"c-abstractor: budget {budget.tokens_out} holds {params.eos_tokens} eos_tokens and leaves {pooled} pooled "
            "ones; raise the budget, or lower params.eos_tokens"
        )
    words = {"method": "c-abstractor"}
    grid = grid_sides(budget.tokens_in, params.grid_rows, what="tokens in", param="grid_rows", **words)
    return grid, grid_sides(pooled, params.query_rows, what="pooled tokens", param="query_rows", **words)


def _tokens_of(rows: int) -> int:
    """Return the patch tokens of a table of positions: one row less where a class token makes up the square."""
    side = math.isqrt(rows - 1)
    return rows - 1 if rows > 1 and side * side == rows - 1 else rows


_ANCHOR = "readout.0.weight"
_HONEYBEE = KeyMap(
    ("pos_emb", "positions", leading_axis(3)),
    ("eos_tokens", "eos", leading_axis(3)),
    ("prenorm.**", "prenorm.**"),
    ("readout.2*.**", "mlp.*.**"),
    ("net.{0,2}.b1+*.conv{1,3}.conv.weight", "{before,after}.*.conv{1,3}.weight", CONV_1X1),
    ("net.{0,2}.b1+*.conv2.conv.weight", "{before,after}.*.conv2.weight"),
    ("net.{0,2}.b1+*.conv{1,2,3}.bn.**", "{before,after}.*.norm{1,2,3}.**"),
    ("net.{0,2}.b1+*.se.{fc1,fc2}.weight", "{before,after}.*.{squeeze,excite}.weight", CONV_1X1),
    ("net.{0,2}.b1+*.se.{fc1,fc2}.bias", "{before,after}.*.{squeeze,excite}.bias"),
    ("net.{0,2}.b1+*.downsample.conv.weight", "{before,after}.*.shortcut.weight", CONV_1X1),
    ("net.{0,2}.b1+*.downsample.bn.**", "{before,after}.*.shortcut_norm.**"),
)


def _is_own_layout(state: Mapping[str, Tensor]) -> bool:
    return "mlp.0.weight" in state and not any(key.startswith(("net.", "readout.")) for key in state)


def _to_own_keys(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """Return the tensors under this module's keys, and what the file calls each of these."""
    part = {} if _is_own_layout(state) else part_with(state, _ANCHOR)
    if not part:
        return dict(state), None
    return _HONEYBEE.read(state, part)


class CAbstractorOriginal(nn.Module):
    """The eager original on the parameters of a `CAbstractor`: planes of channels, as the released code has them."""

    def __init__(self, static: CAbstractor) -> None:
        super().__init__()
        self.static = static

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return what the static module returns."""
        static, params = self.static, self.static.params
        x = tokens
        if params.prenorm:
            x = F.layer_norm(x, x.shape[-1:], static.prenorm.weight, static.prenorm.bias, _PRENORM_EPS)
        if params.positions:
            x = x + static.positions[None]
        planes = x.movedim(-1, 1).reshape(len(x), -1, *static.grid)  # (B, C, h, w)
        for block in static.before:
            planes = self._block(block, planes)
        planes = F.adaptive_avg_pool2d(planes, static.pooled)
        for block in static.after:
            planes = self._block(block, planes)
        x = planes.flatten(2).movedim(1, -1)
        layers: Any = static.mlp
        for index, layer in enumerate(layers):
            x = x * torch.sigmoid(x) if index else x
            x = x @ layer.weight.T + layer.bias
        if params.eos_tokens:
            x = torch.cat([x, torch.stack([static.eos] * len(x))], dim=1)
        return (x,)

    def _block(self, block: Any, planes: Tensor) -> Tensor:
        hidden = F.silu(norm_channels(block.norm1, F.conv2d(planes, block.conv1.weight[:, :, None, None])))
        hidden = F.conv2d(hidden, block.conv2.weight, padding=1, groups=hidden.shape[1])
        hidden = F.silu(norm_channels(block.norm2, hidden))
        squeezed = F.adaptive_avg_pool2d(hidden, 1)
        squeezed = F.silu(F.conv2d(squeezed, block.squeeze.weight[:, :, None, None], block.squeeze.bias))
        gate = torch.sigmoid(F.conv2d(squeezed, block.excite.weight[:, :, None, None], block.excite.bias))
        hidden = norm_channels(block.norm3, F.conv2d(hidden * gate, block.conv3.weight[:, :, None, None]))
        if hasattr(block, "shortcut"):
            planes = norm_channels(block.shortcut_norm, F.conv2d(planes, block.shortcut.weight[:, :, None, None]))
        return F.silu(hidden + planes)
