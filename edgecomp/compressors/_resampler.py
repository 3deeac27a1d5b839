"""What the resamplers of Qwen-VL, MiniCPM-V and LLaVA-UHD share: one cross-attention, its parts and its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec
import torch
from torch import Tensor, nn

from edgecomp.compressors._attention import MultiHeadAttention
from edgecomp.compressors._base import Compressor, Natural, Params, Positive, constant
from edgecomp.compressors._checkpoint import load_exactly
from edgecomp.compressors._grid import bicubic_line, grid_sides, sincos_grid
from edgecomp.compressors._keys import KeyMap
from edgecomp.errors import InvalidSpec, WeightsError
from edgecomp.specs import Output, Site, TensorSpec, TokenBudget

__all__ = ["GridParams", "GridResampler", "Natural", "Positive"]

EPS = 1e-6  # of the three norms


class GridParams(Params, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of a resampler whose queries and keys have places on grids.

    Attributes:
        tokens: tokens of an image where no host says how many.
        context_dim: width of the incoming tokens; a host decides it.
        embed_dim: width of queries and output, a multiple of 4.
        num_heads: of the attention; 0: one for each 128 channels.
        queries: rows of the query table; 0: as many as the budget.
        rows: rows of the token grid; 0: it is square.
        images: images in one request; above 1 they become an axis behind the batch.
    """

    tokens: Positive = 1024
    context_dim: Positive = 1664
    embed_dim: Positive = 4096
    num_heads: Natural = 0
    queries: Natural = 0
    rows: Natural = 0
    images: Positive = 1

    @property
    def heads(self) -> int:
        """Heads of the attention."""
        return self.num_heads or max(1, self.embed_dim // 128)


class GridResampler(Compressor):
    """A table of queries that reads the tokens of an image once: no self-attention, no MLP.

    The position table of the queries is stored and not trained. Keys have it resized to their grid, which is baked
    when weights are loaded.
    """

    width_param = "context_dim"
    unstored_params = ("num_heads",)
    zero_means: ClassVar[Mapping[str, str]] = {
        "num_heads": "{params.heads}: one for each 128 of {params.embed_dim} channels, and at least one"
    }
    #: The name of this method's layout in a checkpoint with a position table and no outer projection.
    stored_layout: ClassVar[str] = "omnilmm"
    params: Any
    pos_embed: Tensor
    key_places: Tensor

    def __init__(self, params: Any, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        self._require_consistent()
        width = params.embed_dim
        self.query = nn.Parameter(torch.zeros(params.queries, width))
        self.kv_proj: nn.Module = nn.Identity()
        if params.context_dim != width:
            self.kv_proj = nn.Linear(params.context_dim, width, bias=False)
        self.ln_q, self.ln_kv = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.attn = MultiHeadAttention(width, params.heads)
        self.ln_post = nn.LayerNorm(width, eps=EPS)
        self.proj = nn.Parameter(torch.zeros(width, width))
        if self.stores_places:
            side = math.isqrt(params.queries)
            self.register_buffer("pos_embed", constant(sincos_grid(side, side, width)))
            self.register_buffer("key_places", torch.empty(0), persistent=False)
            self.register_load_state_dict_post_hook(_bake)  # type: ignore[no-untyped-call]
            _bake(self, None)

    @property
    def stores_places(self) -> bool:
        """Whether the table of the query grid is part of a checkpoint."""
        return True

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the token grid."""
        params = self.params
        return grid_sides(self.site.tokens_in, params.rows, method=self.method_name, what="tokens", param="rows")

    def _require_consistent(self) -> None:
        params = self.params
        if params.embed_dim % 4 or params.embed_dim % params.heads:
            raise InvalidSpec(
                f"{self.method_name}: params.embed_dim={params.embed_dim} must be a multiple of 4 and of "
                f"num_heads={params.heads}"
            )
        if self.budget.tokens_out != params.queries:
            raise InvalidSpec(
                f"{self.method_name}: budget {self.budget.tokens_out} is not the {params.queries} queries of the "
                "table, and a part of them covers no image; export each count by itself"
            )
        side = math.isqrt(params.queries)
        if self.stores_places and side * side != params.queries:
            raise InvalidSpec(
                f"{self.method_name}: {params.queries} queries make no square grid; the nearest that do are "
                f"{side * side} and {(side + 1) ** 2}"
            )

    @property
    def media_shape(self) -> tuple[int, ...]:
        """The axis of images behind the batch, where there are several."""
        return (self.params.images,) if self.params.images > 1 else ()

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `tokens`."""
        shape = (batch, *self.media_shape, self.site.tokens_in, self.params.context_dim)
        return (TensorSpec("tokens", shape, "float32", "tokens"),)

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `latents`."""
        shape = (batch, *self.media_shape, self.budget.tokens_out, self.params.embed_dim)
        return (TensorSpec("latents", shape, "float32", "tokens"),)

    def project(self, tokens: Tensor) -> Tensor:
        """Return what keys and values are made of, one image a row: (B * I, N, D)."""
        tokens = tokens.reshape(-1, self.site.tokens_in, self.params.context_dim)
        return self.ln_kv(self.kv_proj(tokens))  # type: ignore[no-any-return]

    def finish(self, read: Tensor) -> Tensor:
        """Return the output of what was read: (B * I, M, D) -> (B, [I,] M, D)."""
        latents: Tensor = self.ln_post(read) @ self.proj
        return latents.reshape(-1, *self.media_shape, *latents.shape[1:])

    # -- checkpoints ----------------------------------------------------------------------------------

    @classmethod
    def for_budgets(cls, params: Any, counts: Sequence[int]) -> Any:
        """Size the query table by the largest budget where nothing else did."""
        return params if params.queries else msgspec.structs.replace(params, queries=max(counts))

    @classmethod
    def default_counts(cls, params: Any, site: Site) -> tuple[int, ...]:  # noqa: ARG003 - the table alone decides
        """Return the rows of the query table, where they are known."""
        return (params.queries,) if params.queries else ()

    @classmethod
    def layout_of(cls, state: Mapping[str, Tensor]) -> str:
        """Return `qwen-vl`, `minicpm-v` (without a position table), or what this method calls all others."""
        layout = "" if _is_own_layout(state) else _to_own_keys(state)[0]
        return cls.stored_layout if layout == "omnilmm" else layout

    @classmethod
    def infer_params(cls, state: Mapping[str, Tensor], params: Any) -> dict[str, Any]:  # noqa: ARG003 - shapes tell all
        """Return widths and the number of queries."""
        _, own, _ = _to_own_keys(state)
        queries, width = own["query"].shape
        context = own["kv_proj.weight"].shape[1] if "kv_proj.weight" in own else width
        return {"queries": queries, "embed_dim": width, "context_dim": context}

    def load_original(self, state: Mapping[str, Tensor], *, unread: Sequence[str] = ()) -> str:
        """Load a checkpoint of Qwen-VL, OmniLMM, MiniCPM-V or LLaVA-UHD, or edgecomp's own; its keys say which."""
        layout = self.layout_of(state) or "edgecomp"
        _, own, file_keys = _to_own_keys(state)
        load_exactly(self, own, layout=layout, unread=unread, file_keys=file_keys)
        return layout

    @property
    def key_maps(self) -> Mapping[str, KeyMap]:
        """The names of this method's original; OmniLMM's resampler is Qwen-VL's, too."""
        if not self.stores_places:
            return {"minicpm-v": _PLAIN}
        return {self.stored_layout: _PLAIN} | ({"qwen-vl": _QWEN_VL} if self.stored_layout == "omnilmm" else {})


def _rules(inner: str, outer: str) -> KeyMap:
    """Return the names below the prefix of the resampler, and of its last norm and projection."""
    return KeyMap(
        (f"{inner}{{query,pos_embed}}", "{query,pos_embed}"),
        (f"{inner}{{kv_proj,ln_q,ln_kv}}.**", "{kv_proj,ln_q,ln_kv}.**"),
        (f"{inner}attn.in_proj_**", ("attn.to_q.**", "attn.to_k.**", "attn.to_v.**")),
        (f"{inner}attn.out_proj.**", "attn.to_out.**"),
        (f"{outer}ln_post.**", "ln_post.**"),
        (f"{outer}proj", "proj"),
    )


_PLAIN = _rules("", "")
_QWEN_VL = _rules("transformer.visual.attn_pool.", "transformer.visual.")


def _bake(module: Any, _: object) -> None:
    """Resize the stored table to the grid of the keys."""
    side = math.isqrt(module.params.queries)
    rows, columns = module.grid
    resize = torch.kron(bicubic_line(side, rows), bicubic_line(side, columns)).to(module.pos_embed.device)
    module.key_places = (resize @ module.pos_embed.double()).to(module.pos_embed.dtype)


def _is_own_layout(state: Mapping[str, Tensor]) -> bool:
    return "attn.to_q.weight" in state


def _to_own_keys(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor], dict[str, str] | None]:
    """Strip the prefix of a whole model, and split the packed projection.

    Returns:
        the layout, the tensors under this module's keys, and what the file calls each of these keys.
    """
    if _is_own_layout(state):
        return "", dict(state), None
    packed = "attn.in_proj_weight"
    prefixes = [key[: -len(packed)] for key in state if key.endswith(packed)]
    prefixes = [prefix for prefix in prefixes if f"{prefix}query" in state and f"{prefix}ln_kv.weight" in state]
    if len(prefixes) != 1:
        raise WeightsError(
            f"weights hold {len(prefixes)} resamplers (query, ln_kv and {packed} side by side), and one is read; "
            f"first keys: {', '.join(list(state)[:5])}. Give a checkpoint of Qwen-VL, OmniLMM, MiniCPM-V or LLaVA-UHD"
        )
    prefix = prefixes[0]
    file_keys = {key.removeprefix(prefix): key for key in state if key.startswith(prefix)}
    outer = prefix.removesuffix("attn_pool.")
    if outer != prefix:  # Qwen-VL keeps the last norm and projection beside the resampler
        file_keys |= {
            name: f"{outer}{name}" for name in ("ln_post.weight", "ln_post.bias", "proj") if f"{outer}{name}" in state
        }
    layout = "qwen-vl" if outer != prefix else "omnilmm" if "pos_embed" in file_keys else "minicpm-v"
    return layout, *_PLAIN.read(state, file_keys)
