"""DeepSeek-OCR's encoder: a windowed ViT, a convolutional compressor of 16 to 1, a global ViT on what is left.

Paper: "DeepSeek-OCR: Contexts Optical Compression" (arXiv:2510.18234), section 3.2. Modes of the paper are presets;
`gundam` reads a page in tiles beside its overview. The commits of the original, and of transformers' version with other
keys, stand in `export/recipes/deepseek-ocr.toml`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
import torch
import torch.nn.functional as F
from msgspec import Meta
from torch import Tensor, nn

from edgecomp.compressors._base import Compressor, Natural, Params, Positive, constant
from edgecomp.compressors._checkpoint import count_numbered, load_exactly, spell_missing
from edgecomp.compressors._eager import norm_channels
from edgecomp.compressors._grid import antialiased_line, bilinear_line, require_multiple, resample_grid
from edgecomp.compressors._keys import KeyMap, leading_axis
from edgecomp.compressors._norms import ChannelLayerNorm
from edgecomp.compressors._vit import Block
from edgecomp.errors import InvalidSpec, WeightsError
from edgecomp.specs import Output, Placement, Site, TensorSpec, TokenBudget

__all__ = ["DeepSeekOCR"]

Part = Literal["whole", "features", "compressor"]

_STRIDE = 4  # of the two convolutions together, along each side
_MOST_TILES = 9


class DeepSeekOCRParams(Params, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of DeepSeek-OCR's encoder.

    Attributes:
        part: `whole`: all of it, with newlines and separator; `features`: what the projector would read, one row for
            each token; `compressor`: the two convolutions alone, on the tokens of the windowed ViT's neck.
        tokens: that the compressor is given where it stands alone, a square.
        embed_dim, depth, num_heads, mlp_ratio: of the windowed ViT.
        patch_size: side of a patch in pixels.
        window: side of a window, in patches.
        global_blocks: blocks that attend to the whole grid, counted from 0.
        table_side: side of the grid that positions are stored for.
        neck_dim, middle_dim: channels in front of the two convolutions, and between them.
        clip_dim, clip_depth, clip_heads, clip_hidden: of the global ViT; its width is the compressor's output.
        clip_table_side: as `table_side`.
        projector_dim: width of the language model.
        tile_size: side of a tile in pixels (mode gundam); 0: no tiles.
        most: tiles of a page, for who cuts it (6; the original names 9 as the largest number); see `edgecomp.slices`.
            No graph depends on it.
    """

    part: Part = "whole"
    tokens: Positive = 4096
    embed_dim: Positive = 768
    depth: Positive = 12
    num_heads: Positive = 12
    mlp_ratio: Annotated[float, Meta(gt=0, le=64)] = 4.0
    patch_size: Positive = 16
    window: Positive = 14
    global_blocks: tuple[Natural, ...] = (2, 5, 8, 11)
    table_side: Positive = 64
    neck_dim: Positive = 256
    middle_dim: Positive = 512
    clip_dim: Positive = 1024
    clip_depth: Positive = 24
    clip_heads: Positive = 16
    clip_hidden: Positive = 4096
    clip_table_side: Positive = 16
    projector_dim: Positive = 1280
    tile_size: Natural = 0
    most: Annotated[int, Meta(ge=2, le=9)] = 6

    @property
    def pixels_per_token(self) -> int:
        """Side of the square that one token stands for."""
        return self.patch_size * _STRIDE


def _quick_gelu(x: Tensor) -> Tensor:
    return x * (1.702 * x).sigmoid()


class DeepSeekOCR(Compressor):
    """Encode a page in a sixteenth of the tokens that its patches make.

    Shapes: image (B, 3, S, S), in mode gundam with tiles_T (B, T, 3, s, s), row by row -> compressed (B, M, D). Of
    `whole`, M counts the tokens (S / 64)^2, a newline behind each row of them and the separator at the end; tiles come
    first, laid out as one grid with newlines of its own. Of `features`, M = (S / 64)^2. The compressor alone:
    tokens (B, N, C) of a square grid -> (B, N / 16, D).

    Static rewrite (level E0): nothing depends on data. Tables of positions are resized by constant matrices, one
    product along each axis (bicubic with antialiasing for absolute ones, linear for relative ones), which runtimes
    fold. Windows are filled up to a fixed count. Tiles, newlines and separator fall into place by one Gather of
    constant rows. The arrangement of tiles follows from the budget: c columns and r rows of tiles of n x n tokens take
    r n (c n + 1) rows, and with tiles of 640 pixels no two arrangements take as many.

    Source: arXiv:2510.18234, section 3.2; relative positions: arXiv:2203.16527.
    """

    Params = DeepSeekOCRParams
    reads_grid = True
    params: DeepSeekOCRParams
    width_param = "neck_dim"
    unstored_params = ("clip_heads", "patch_size")
    layout: Tensor

    def __init__(self, params: DeepSeekOCRParams, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        self.sides, self.tiles = _arrange(params, site, budget.tokens_out)
        if site.placement == "encoder":
            patches = (self.sides[0] * _STRIDE) ** 2 + sum(self.tiles[0] * self.tiles[1] * (side * _STRIDE) ** 2
                                                           for side in self.sides[1:])  # fmt: skip
            self.budget = msgspec.structs.replace(budget, tokens_in=patches)
        if params.part != "compressor":
            self._make_vits(params)
        self.compress = nn.ModuleList(
            nn.Conv2d(before, behind, 3, stride=2, padding=1, bias=False)
            for before, behind in ((params.neck_dim, params.middle_dim), (params.middle_dim, params.clip_dim))
        )
        if params.part == "whole":
            self.projector = nn.Linear(2 * params.clip_dim, params.projector_dim)
            self.newline = nn.Parameter(torch.zeros(params.projector_dim))
            self.separator = nn.Parameter(torch.zeros(params.projector_dim))
            self.register_buffer("layout", _layout(self.sides, self.tiles), persistent=False)

    def _make_vits(self, params: DeepSeekOCRParams) -> None:
        width, clip = params.embed_dim, params.clip_dim
        for name, dim, heads in (("embed_dim", width, params.num_heads), ("clip_dim", clip, params.clip_heads)):
            if dim % heads:
                raise InvalidSpec(f"deepseek-ocr: params.{name}={dim} is not a multiple of its {heads} heads")
        if wrong := [block for block in params.global_blocks if block >= params.depth]:
            raise InvalidSpec(
                f"deepseek-ocr: params.global_blocks names block {wrong[0]}, and there are {params.depth}, from 0"
            )
        self.patch_embed = nn.Conv2d(3, width, params.patch_size, stride=params.patch_size)
        self.positions = nn.Parameter(torch.zeros(params.table_side, params.table_side, width))
        self.blocks = nn.ModuleList(
            Block(
                width,
                params.num_heads,
                int(width * params.mlp_ratio),
                table=params.table_side if index in params.global_blocks else params.window,
                act=F.gelu,
                eps=1e-6,
            )
            for index in range(params.depth)
        )
        neck = params.neck_dim
        self.neck = nn.ModuleList(
            [
                nn.Conv2d(width, neck, 1, bias=False),
                ChannelLayerNorm(neck, eps=1e-6),
                nn.Conv2d(neck, neck, 3, padding=1, bias=False),
                ChannelLayerNorm(neck, eps=1e-6),
            ]
        )
        self.class_token = nn.Parameter(torch.zeros(clip))
        self.clip_positions = nn.Parameter(torch.zeros(1 + params.clip_table_side**2, clip))
        self.clip_norm = nn.LayerNorm(clip)
        self.clip_blocks = nn.ModuleList(
            Block(clip, params.clip_heads, params.clip_hidden, act=_quick_gelu, eps=1e-5)
            for _ in range(params.clip_depth)
        )
        for side in dict.fromkeys(self.sides):
            patches = side * _STRIDE
            for name, source, target, line in (
                ("positions", params.table_side, patches, antialiased_line),
                ("relative", 2 * params.table_side - 1, 2 * patches - 1, bilinear_line),
                ("clip", params.clip_table_side, side, antialiased_line),
            ):
                if source != target:
                    self.register_buffer(f"{name}_to_{side}", constant(line(source, target)), persistent=False)

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `image` and, of mode gundam, `tiles_T`; of the compressor alone `tokens`."""
        if self.params.part == "compressor":
            return (TensorSpec("tokens", (batch, self.budget.tokens_in, self.params.neck_dim), "float32", "tokens"),)
        size = self.site.image_size
        image = TensorSpec("image", (batch, 3, size, size), "float32", "image")
        count, size = self.tiles[0] * self.tiles[1], self.params.tile_size
        if not count:
            return (image,)
        return image, TensorSpec(f"tiles_{count}", (batch, count, 3, size, size), "float32", "image")

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `compressed`."""
        params = self.params
        width = {"whole": params.projector_dim, "features": 2 * params.clip_dim, "compressor": params.clip_dim}
        shape = (batch, self.budget.tokens_out, width[params.part])
        return (TensorSpec("compressed", shape, "float32", "tokens"),)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What an export should say of the rows."""
        if self.params.part != "whole":
            return ()
        (columns, rows), view = self.tiles, self.sides[0]
        local = self.sides[-1] if columns else 0
        text = f"{view}x{view} tokens of the whole image with {view} newlines, and the separator"
        if columns:
            text = (
                f"{columns}x{rows} tiles of {self.params.tile_size} pixels, {columns * local}x{rows * local} tokens "
                f"with {rows * local} newlines; {text}"
            )
        return (text,)

    def forward(self, first: Tensor, tiles: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the page's tokens."""
        if self.params.part == "compressor":
            side = math.isqrt(self.budget.tokens_in)
            grid = first.transpose(1, 2).reshape(first.shape[0], self.params.neck_dim, side, side)
            return (self.squeeze(grid).flatten(2).transpose(1, 2),)
        seen = self.look(first, self.sides[0])  # (B, N, 2 C)
        if self.params.part == "features":
            return (seen,)
        batch, ends = first.shape[0], torch.stack([self.newline, self.separator])
        rows = [self.projector(seen)]
        if tiles is not None:
            local = self.projector(self.look(tiles.flatten(0, 1), self.sides[1]))
            rows.insert(0, local.reshape(batch, -1, self.params.projector_dim))
        rows.append(ends.expand(batch, -1, -1))
        return (torch.cat(rows, 1)[:, self.layout],)

    def look(self, image: Tensor, side: int) -> Tensor:
        """Return both ViTs' channels of each token: (B, 3, S, S) -> (B, side * side, 2 C)."""
        tokens = self.patch_embed(image).flatten(2).transpose(1, 2)  # (B, N, D)
        tokens = tokens + self._resized("positions", self.positions.flatten(0, 1), side)
        for index, block in enumerate(self.blocks):
            is_global = index in self.params.global_blocks
            resize = getattr(self, f"relative_to_{side}", None) if is_global else None
            tokens = block(tokens, side * _STRIDE, 0 if is_global else self.params.window, resize)
        grid = tokens.transpose(1, 2).reshape(len(tokens), -1, side * _STRIDE, side * _STRIDE)
        for layer in self.neck:
            grid = layer(grid)
        squeezed = self.squeeze(grid).flatten(2).transpose(1, 2)  # (B, n n, C)
        stored = self.clip_positions
        table = torch.cat([stored[:1], self._resized("clip", stored[1:], side)])
        seen = torch.cat([self.class_token.expand(len(squeezed), 1, -1), squeezed], 1) + table
        seen = self.clip_norm(seen)
        for block in self.clip_blocks:
            seen = block(seen)
        return torch.cat([seen[:, 1:], squeezed], -1)

    def squeeze(self, grid: Tensor) -> Tensor:
        """Return a sixteenth of a grid: (B, C, h, w) -> (B, D, h / 4, w / 4)."""
        for layer in self.compress:
            grid = layer(grid)
        return grid

    def _resized(self, name: str, table: Tensor, side: int) -> Tensor:
        """Return a table (s s, D) for another grid: (N, D)."""
        line = getattr(self, f"{name}_to_{side}", None)
        return table if line is None else resample_grid(table.unsqueeze(0), line, line).squeeze(0)

    def reference(self) -> nn.Module:
        """Return the published forward pass on this module's parameters."""
        return DeepSeekOCROriginal(self)

    @classmethod
    def site_without_host(cls, params: DeepSeekOCRParams, placement: Placement, image_size: int) -> Site:
        """Return an encoder's site; of the compressor alone that of given tokens, as many as an image would give."""
        if params.part == "compressor" and placement == "encoder":
            require_multiple("image size", image_size, params.pixels_per_token, method="deepseek-ocr")
            tokens = (image_size // params.patch_size) ** 2
            return Site("after", tokens_in=tokens, embed_dim=params.neck_dim)
        return super().site_without_host(params, placement, image_size)

    @classmethod
    def count_tokens(cls, params: DeepSeekOCRParams, site: Site) -> int:
        """Return the patches of the image and of as many tiles as there can be, or the tokens that are given."""
        if site.placement != "encoder":
            return site.tokens_in
        require_multiple("image size", site.image_size, params.pixels_per_token, method="deepseek-ocr")
        tiles = _MOST_TILES * (params.tile_size // params.patch_size) ** 2
        return int((site.image_size // params.patch_size) ** 2 + tiles)

    @classmethod
    def default_counts(cls, params: DeepSeekOCRParams, site: Site) -> tuple[int, ...]:
        """Return the rows that the image size gives; those of tiles are the recipe's to say."""
        if params.tile_size and params.part == "whole":
            return ()
        is_encoder = site.placement == "encoder"
        side = site.image_size // params.pixels_per_token if is_encoder else _grid_side(site.tokens_in) // _STRIDE
        return (side * (side + 1) + 1 if params.part == "whole" else side * side,)

    @classmethod
    def layout_of(cls, state: Mapping[str, Tensor]) -> str:
        """Return `deepseek`, or `transformers`."""
        if any(key.startswith("sam_model.") for key in state):
            return "deepseek"
        return "transformers" if any(re.match(r"(vision_tower\.)?sam_encoder\.", key) for key in state) else ""

    @classmethod
    def infer_params(cls, state: Mapping[str, Tensor], params: DeepSeekOCRParams) -> dict[str, Any]:
        """Return what the shapes of a checkpoint decide, and the part that it has weights for."""
        tensors, spelt = _to_own_keys(state)
        own = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        if "compress.0.weight" not in own or "compress.1.weight" not in own:
            raise WeightsError(
                "weights are in no layout of deepseek-ocr (deepseek, transformers or edgecomp): the two convolutions "
                f"are missing; first keys: {', '.join(list(state)[:5])}"
            )
        found: dict[str, Any] = {"neck_dim": own["compress.0.weight"][1], "middle_dim": own["compress.0.weight"][0]}
        found["clip_dim"] = own["compress.1.weight"][0]
        if not {key.partition(".")[0] for key in own} & _VITS:
            return {**found, "part": "compressor"}
        if params.part == "compressor":
            return found
        end = [key for key in _END if key in own]
        wanted = [*_VIT_TABLES, *(_END if end and params.part == "whole" else ())]
        if missing := [key for key in wanted if key not in own]:
            lost = ", ".join(spell_missing(key, spelt) for key in missing)
            raise WeightsError(
                f"weights of deepseek-ocr lack {lost}, and hold what belongs to it; give the whole checkpoint, or "
                "--set params.part to what is in it"
            )
        if not end:
            found["part"] = "features"
        elif "projector.weight" in own:
            found["projector_dim"] = own["projector.weight"][0]
        found["table_side"], _, width = own["positions"]
        found["embed_dim"], found["depth"] = width, count_numbered(own, "blocks")
        found["num_heads"] = width // own["blocks.0.attn.rel_rows"][1]
        found["mlp_ratio"] = own["blocks.0.fc1.weight"][0] / width
        found["clip_table_side"] = math.isqrt(own["clip_positions"][0] - 1)
        found["clip_depth"] = count_numbered(own, "clip_blocks")
        found["clip_hidden"] = own["clip_blocks.0.fc1.weight"][0]
        tables = [(own[f"blocks.{index}.attn.rel_rows"][0] + 1) // 2 for index in range(found["depth"])]
        if len(set(tables)) > 1:  # else window and grid are of one size, and the tables do not tell which is which
            is_global = [table == found["table_side"] for table in tables]
            found["global_blocks"] = [index for index, one in enumerate(is_global) if one]
            found["window"] = next(table for table, one in zip(tables, is_global, strict=True) if not one)
        return found

    def load_original(self, state: Mapping[str, Tensor], *, unread: Sequence[str] = ()) -> str:
        """Load a checkpoint of DeepSeek or transformers; weights of parts that are not asked for are left out."""
        layout = self.layout_of(state) or "edgecomp"
        own, spelt = _to_own_keys(state)
        tops = {name.partition(".")[0] for name in self.state_dict()}
        beside = [key for key in own if key.partition(".")[0] in _TOPS - tops]
        load_exactly(self, own, layout=layout, unread=(*unread, *beside), file_keys=spelt)
        return layout

    @property
    def key_maps(self) -> Mapping[str, KeyMap]:
        """DeepSeek's names, and transformers'."""
        return _MAPS


def _arrange(params: DeepSeekOCRParams, site: Site, rows: int) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Return tokens along a side of the view, and of a tile, and how many columns and rows of tiles there are."""
    if params.part == "compressor":
        side = _grid_side(site.tokens_in)
        _require_rows(rows, {(side // _STRIDE) ** 2: [(0, 0)]}, f"{site.tokens_in} tokens")
        return (), (0, 0)
    if site.placement != "encoder":
        raise InvalidSpec(
            "deepseek-ocr is an encoder itself; after a host set params.part=compressor, or drop the host"
        )
    require_multiple("image size", site.image_size, params.pixels_per_token, method="deepseek-ocr")
    side, pixels = site.image_size // params.pixels_per_token, f"images of {site.image_size} pixels"
    if params.part == "features":
        if params.tile_size:
            raise InvalidSpec(f"deepseek-ocr: tiles of {params.tile_size} pixels need part=whole, which lays them out")
        _require_rows(rows, {side * side: [(0, 0)]}, pixels)
        return (side,), (0, 0)
    plain = side * (side + 1) + 1
    found = {plain: [(0, 0)]}
    if params.tile_size:
        require_multiple("params.tile_size", params.tile_size, params.pixels_per_token, method="deepseek-ocr")
        small = params.tile_size // params.pixels_per_token
        for columns in range(1, _MOST_TILES + 1):
            for lines in range(1, _MOST_TILES // columns + 1):
                if columns * lines > 1:
                    found.setdefault(plain + lines * small * (columns * small + 1), []).append((columns, lines))
    tiles = _require_rows(rows, found, pixels)
    return (side, params.tile_size // params.pixels_per_token) if tiles[0] else (side,), tiles


def _grid_side(tokens: int) -> int:
    """Return the side of the grid that the compressor is given."""
    side = math.isqrt(tokens)
    if side * side != tokens or side % _STRIDE:
        below = max(1, side // _STRIDE) * _STRIDE
        raise InvalidSpec(
            f"deepseek-ocr: the compressor takes a square grid whose side is a multiple of {_STRIDE}, and {tokens} "
            f"tokens are none; {below**2} and {(below + _STRIDE) ** 2} are"
        )
    return side


def _require_rows(rows: int, found: Mapping[int, list[tuple[int, int]]], what: str) -> tuple[int, int]:
    """Return the one arrangement that has so many rows."""
    arrangements = found.get(rows, [])
    if not arrangements:
        raise InvalidSpec(
            f"deepseek-ocr: {what} give {', '.join(map(str, sorted(found)))} rows, not a budget of {rows}"
        )
    if len(arrangements) > 1:
        both = " and ".join(f"{columns}x{lines}" for columns, lines in arrangements)
        raise InvalidSpec(f"deepseek-ocr: {rows} rows are those of {both} tiles; choose another params.tile_size")
    return arrangements[0]


def _layout(sides: tuple[int, ...], tiles: tuple[int, int]) -> Tensor:
    """Return which row stands where: of [tokens of tiles, tokens of the view, newline, separator], int64."""
    columns, lines = tiles
    count = columns * lines * sides[-1] ** 2 if columns else 0
    newline = count + sides[0] ** 2
    order: list[int] = []
    if columns:
        side = sides[-1]
        for y in range(lines * side):
            for x in range(columns * side):
                tile = y // side * columns + x // side
                order.append((tile * side + y % side) * side + x % side)
            order.append(newline)
    for y in range(sides[0]):
        order += [count + y * sides[0] + x for x in range(sides[0])] + [newline]
    return torch.tensor([*order, newline + 1])


def _inner(sam: str, clip: str) -> KeyMap:
    """Return what DeepSeek and transformers name alike, below the prefixes of the two ViTs."""
    unread = "embeddings.{patch_embedding.weight,position_ids}"
    return KeyMap(
        (f"{sam}.pos_embed", "positions", leading_axis(4)),
        (f"{clip}.embeddings.class_embedding", "class_token"),
        (f"{clip}.embeddings.position_embedding.weight", "clip_positions"),
        (f"{clip}.{unread}", f"vision_model.{unread}"),  # as the recipe names what it lets stand
        (f"{clip}.pre_layrnorm.**", "clip_norm.**"),
        ("image_newline", "newline"),
    )


def _layer(block: str, norm: str) -> KeyMap:
    """Return the names in a block of the windowed ViT."""
    return KeyMap(
        (f"{block}.*.{norm}{{1,2}}.**", "blocks.*.norm{1,2}.**"),
        (f"{block}.*.attn.rel_pos_{{h,w}}", "blocks.*.attn.rel_{rows,columns}"),
        (f"{block}.*.attn.{{qkv,proj}}.**", "blocks.*.attn.{qkv,proj}.**"),
        (f"{block}.*.mlp.lin{{1,2}}.**", "blocks.*.fc{1,2}.**"),
    )


def _clip_layer(block: str) -> KeyMap:
    """Return the names in a block of the global ViT, but for queries, keys and values."""
    return KeyMap(
        (f"{block}.*.layer_norm{{1,2}}.**", "clip_blocks.*.norm{1,2}.**"),
        (f"{block}.*.self_attn.out_proj.**", "clip_blocks.*.attn.proj.**"),
        (f"{block}.*.mlp.{{fc1,fc2}}.**", "clip_blocks.*.{fc1,fc2}.**"),
    )


def _released(sam: str, clip: str) -> KeyMap:
    """Return DeepSeek's names below the prefixes of the two ViTs."""
    return KeyMap(
        _inner(sam, clip),
        _layer(f"{sam}.blocks", "norm"),
        _clip_layer(f"{clip}.transformer.layers"),
        (f"{sam}.patch_embed.proj.**", "patch_embed.**"),
        (f"{sam}.neck.*.**", "neck.*.**"),
        (f"{sam}.net_{{2,3}}.**", "compress.{0,1}.**"),
        (f"{clip}.transformer.layers.*.self_attn.qkv_proj.**", "clip_blocks.*.attn.qkv.**"),
        ("projector.layers.**", "projector.**"),
        ("view_seperator", "separator"),
    )


_SAM, _CLIP = "vision_tower.sam_encoder", "vision_tower.vision_encoder"
_SPLIT = f"{_CLIP}.encoder.layers.*.self_attn."
_TRANSFORMERS = KeyMap(
    _inner(_SAM, _CLIP),
    _layer(f"{_SAM}.layers", "layer_norm"),
    _clip_layer(f"{_CLIP}.encoder.layers"),
    (f"{_SAM}.patch_embed.projection.**", "patch_embed.**"),
    (f"{_SAM}.neck.{{conv1,layer_norm1,conv2,layer_norm2}}.**", "neck.{0,1,2,3}.**"),
    (f"{_SAM}.proj.conv{{1,2}}.**", "compress.{0,1}.**"),
    ((f"{_SPLIT}q_proj.**", f"{_SPLIT}k_proj.**", f"{_SPLIT}v_proj.**"), "clip_blocks.*.attn.qkv.**"),
    ("multi_modal_projector.**", "projector.**"),
    ("view_separator", "separator"),
)
_MAPS = {"deepseek": _released("sam_model", "vision_model"), "transformers": _TRANSFORMERS}
#: How transformers saves the encoder: its own names outside, and DeepSeek's inside.
_MIXED = KeyMap(_TRANSFORMERS, _released(_SAM, _CLIP))
#: Of the two ViTs, and what stands behind them in a whole encoder: all of each or none.
_VIT_TABLES = ("positions", "clip_positions")
_END = ("projector.weight", "projector.bias", "newline", "separator")
_TOPS = frozenset(
    (
        "patch_embed", "positions", "blocks", "neck", "compress", "class_token", "clip_positions", "clip_norm",
        "clip_blocks", "projector", "newline", "separator",
    )
)  # fmt: skip
_VITS = _TOPS - {"compress", *(key.partition(".")[0] for key in _END)}


def _to_own_keys(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors under this module's keys, and what the file calls each of these."""
    layout = DeepSeekOCR.layout_of(state)
    if not layout:
        return dict(state), {key: key for key in state}
    if layout == "deepseek":
        return _MAPS[layout].read(state, {key: key for key in state})
    below = ("sam_encoder.", "vision_encoder.")  # the encoder alone lacks what stands in front
    return _MIXED.read(state, {f"vision_tower.{key}" if key.startswith(below) else key: key for key in state})


class DeepSeekOCROriginal(nn.Module):
    """The eager original: channels last, windows cut one by one, torch's own attention and resizes.

    Written apart from the static form, on the parameters of a `DeepSeekOCR`.
    """

    def __init__(self, static: DeepSeekOCR) -> None:
        super().__init__()
        self.static: Any = static

    def forward(self, first: Tensor, tiles: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return what the static module returns."""
        static = self.static
        if static.params.part == "compressor":
            side = math.isqrt(first.shape[1])
            return (self._convolve(first.reshape(len(first), side, side, -1).movedim(-1, 1)).flatten(2).movedim(1, 2),)
        seen = self._features(first)
        if static.params.part == "features":
            return (seen.flatten(1, 2),)
        pages = []
        for index, view in enumerate(seen):
            rows = []
            if tiles is not None:
                columns, lines = static.tiles
                local = [self._project(one) for one in self._features(tiles[index])]  # (n, n, D) each
                bands = [torch.cat(local[line * columns : (line + 1) * columns], dim=1) for line in range(lines)]
                rows.append(self._with_newlines(torch.cat(bands)))
            rows += [self._with_newlines(self._project(view)), static.separator[None]]
            pages.append(torch.cat(rows))
        return (torch.stack(pages),)

    def _project(self, x: Tensor) -> Tensor:
        return F.linear(x, self.static.projector.weight, self.static.projector.bias)

    def _with_newlines(self, grid: Tensor) -> Tensor:
        lines = [torch.cat([line, self.static.newline[None]]) for line in grid]
        return torch.cat(lines)

    def _features(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, n, n, 2 C), the global ViT's channels first."""
        static = self.static
        x = static.patch_embed(image).movedim(1, -1)  # (B, h, w, D)
        x = x + _resize_grid(static.positions, x.shape[1])
        for index, block in enumerate(static.blocks):
            window = 0 if index in static.params.global_blocks else static.params.window
            normed = block.norm1(x)
            x = x + (self._in_windows(block.attn, normed, window) if window else self._attend(block.attn, normed))
            x = x + block.fc2(F.gelu(block.fc1(block.norm2(x))))
        x = x.movedim(-1, 1)
        for layer in static.neck:
            x = layer(x) if isinstance(layer, nn.Conv2d) else norm_channels(layer, x)
        squeezed = self._convolve(x).movedim(1, -1)  # (B, n, n, C)
        side = squeezed.shape[1]
        table = static.clip_positions
        stored = math.isqrt(len(table) - 1)
        places = _resize_grid(table[1:].unflatten(0, (stored, stored)), side).flatten(0, 1)
        tokens = torch.cat([torch.stack([static.class_token + table[0]] * len(image)).unsqueeze(1),
                            squeezed.flatten(1, 2) + places], dim=1)  # fmt: skip
        tokens = static.clip_norm(tokens)
        for block in static.clip_blocks:
            normed = block.norm1(tokens)
            q, k, v = self._heads(block.attn, normed)
            tokens = tokens + block.attn.proj(F.scaled_dot_product_attention(q, k, v).movedim(1, 2).flatten(2))
            hidden = block.fc1(block.norm2(tokens))
            tokens = tokens + block.fc2(hidden * torch.sigmoid(1.702 * hidden))
        return torch.cat([tokens[:, 1:].unflatten(1, (side, side)), squeezed], dim=-1)

    def _convolve(self, x: Tensor) -> Tensor:
        for layer in self.static.compress:
            x = F.conv2d(F.pad(x, (1, 1, 1, 1)), layer.weight, stride=2)
        return x

    def _in_windows(self, attention: Any, x: Tensor, window: int) -> Tensor:
        size = x.shape[1]
        filled = -(-size // window) * window
        padded = F.pad(x, (0, 0, 0, filled - size, 0, filled - size))
        lines = []
        for y in range(0, filled, window):
            line = [self._attend(attention, padded[:, y : y + window, x0 : x0 + window])
                    for x0 in range(0, filled, window)]  # fmt: skip
            lines.append(torch.cat(line, dim=2))
        return torch.cat(lines, dim=1)[:, :size, :size]

    def _heads(self, attention: Any, tokens: Tensor) -> tuple[Tensor, ...]:
        """(B, N, D) -> queries, keys, values (B, H, N, d)."""
        return attention.qkv(tokens).unflatten(-1, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # type: ignore[no-any-return]

    def _attend(self, attention: Any, x: Tensor) -> Tensor:
        """(B, h, w, D), with a bias for the distance of rows and of columns."""
        side = x.shape[1]
        q, k, v = self._heads(attention, x.flatten(1, 2))
        grid = q.reshape(*q.shape[:2], side, side, -1)
        rows, columns = (_distances(table, side) for table in (attention.rel_rows, attention.rel_columns))
        by_row = torch.einsum("bhyxc,ykc->bhyxk", grid, rows)
        by_column = torch.einsum("bhyxc,xkc->bhyxk", grid, columns)
        bias = (by_row.unsqueeze(-1) + by_column.unsqueeze(-2)).flatten(4).flatten(2, 3)
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return attention.proj(read.movedim(1, 2).flatten(2)).unflatten(1, (side, side))  # type: ignore[no-any-return]


def _distances(table: Tensor, side: int) -> Tensor:
    """Return the vector of each distance of query and key: (side, side, d)."""
    if len(table) != 2 * side - 1:
        table = F.interpolate(table.T[None], size=2 * side - 1, mode="linear")[0].T
    return torch.stack([torch.stack([table[query - key + side - 1] for key in range(side)]) for query in range(side)])


def _resize_grid(table: Tensor, side: int) -> Tensor:
    """(s, s, D) -> (side, side, D)."""
    if table.shape[0] == side:
        return table
    image = table.movedim(-1, 0).unsqueeze(0)
    image = F.interpolate(image, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    return image[0].movedim(0, -1)
