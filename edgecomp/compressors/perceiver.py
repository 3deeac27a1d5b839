"""The Perceiver resampler: learned latents read any number of tokens and replace them.

Paper: "Flamingo: a Visual Language Model for Few-Shot Learning" (arXiv:2204.14198), section 3.1.1 and
appendix A.1.1. One module carries the weight families of flamingo-pytorch, OpenFlamingo, Idefics1 and Idefics2
(commits in `export/recipes/perceiver.toml`), and the founding notes' cross-attention-only form.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import torch
import torch.nn.functional as F
from msgspec import Meta
from torch import Tensor, nn

from edgecomp.compressors._attention import MASKED, attend, merge_heads, split_heads
from edgecomp.compressors._base import Compressor, Natural, Params, Positive, count_heads
from edgecomp.compressors._checkpoint import count_numbered, load_exactly
from edgecomp.compressors._keys import KeyMap
from edgecomp.compressors._norms import RMSNorm
from edgecomp.errors import InvalidSpec, WeightsError
from edgecomp.specs import Output, Site, TensorSpec, TokenBudget

__all__ = ["Perceiver"]

Family = Literal["flamingo", "open-flamingo", "idefics1", "idefics2", "cross-only"]


class PerceiverParams(Params, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of the Perceiver resampler.

    Attributes:
        family: whose norms, activations and position tables.
        tokens: tokens in each frame where no host says how many.
        context_dim: width of the incoming tokens; a host decides it.
        embed_dim: width of the latents; 0: as wide as the context. Another width needs `projection_dim`.
        projection_dim: hidden width of Idefics2's gated projection in front (0: none).
        depth, num_heads, head_dim, kv_heads: of the layers; kv_heads 0: as many as num_heads.
        ff_mult: hidden width of the MLP over `embed_dim`.
        latents: rows of the latent table; a budget takes the first M. 0: the largest budget.
        qk_norm: LayerNorm on each head's queries and keys (Idefics1).
        images, frames: images (Flamingo: media) in one request, and frames in each of them that is a video; above 1
            they become axes behind the batch.
        media_embeds, frame_embeds: rows of the position tables over images and frames (0: none).
        mask: take a `context_mask`, true where a token is real.
    """

    family: Family = "flamingo"
    tokens: Positive = 576
    context_dim: Positive = 1024
    embed_dim: Natural = 0
    projection_dim: Natural = 0
    depth: Positive = 2
    num_heads: Positive = 8
    head_dim: Positive = 64
    kv_heads: Natural = 0
    ff_mult: Annotated[float, Meta(gt=0, le=64)] = 4.0
    latents: Natural = 0
    qk_norm: bool = False
    images: Positive = 1
    frames: Positive = 1
    media_embeds: Natural = 0
    frame_embeds: Natural = 0
    mask: bool = False

    @property
    def width(self) -> int:
        """Width of the latents."""
        return self.embed_dim or self.context_dim

    @property
    def groups(self) -> int:
        """Query heads for each key-value head."""
        return self.num_heads // (self.kv_heads or self.num_heads)


def _activation(family: Family) -> Callable[[Tensor], Tensor]:
    return {"idefics1": F.relu, "idefics2": F.silu}.get(family, F.gelu)


class FeedForward(nn.Module):
    """Pre-norm MLP without biases; gated for Idefics2. (B, M, D) -> (B, M, D)."""

    def __init__(self, params: PerceiverParams, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        hidden = max(1, int(params.width * params.ff_mult))
        self.norm = norm(params.width)
        self.fc1 = nn.Linear(params.width, hidden, bias=False)
        if params.family == "idefics2":
            self.up = nn.Linear(params.width, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, params.width, bias=False)
        self.act = _activation(params.family)

    def forward(self, x: Tensor) -> Tensor:
        """Return the update of x."""
        x = self.norm(x)
        hidden = self.act(self.fc1(x))
        if hasattr(self, "up"):
            hidden = hidden * self.up(x)
        return self.fc2(hidden)  # type: ignore[no-any-return]


class Projection(nn.Module):
    """Idefics2's gated MLP from the encoder's width to the latents' (`connector.modality_projection`)."""

    def __init__(self, context_dim: int, hidden: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(context_dim, hidden, bias=False)
        self.up = nn.Linear(context_dim, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, D)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class ResamplerLayer(nn.Module):
    """Latents attend to the tokens and to themselves, then an MLP; cross-only: to the tokens alone, no MLP."""

    def __init__(self, params: PerceiverParams, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.heads, self.kv_heads = params.num_heads, params.kv_heads or params.num_heads
        self.head_dim, self.groups = params.head_dim, params.groups
        self.is_cross_only = params.family == "cross-only"
        self.to_q = nn.Linear(params.width, self.heads * self.head_dim, bias=False)
        self.to_kv = nn.Linear(params.width, 2 * self.kv_heads * self.head_dim, bias=False)
        self.to_out = nn.Linear(self.heads * self.head_dim, params.width, bias=False)
        if not self.is_cross_only:
            self.norm_context, self.norm_latents = norm(params.width), norm(params.width)
            self.ff = FeedForward(params, norm)
        if params.qk_norm:
            self.q_norm, self.k_norm = nn.LayerNorm(self.head_dim), nn.LayerNorm(self.head_dim)

    def forward(self, latents: Tensor, context: Tensor, bias: Tensor | None, keep: Tensor | None) -> Tensor:
        """Update the latents.

        Shapes: latents (B, M, D), context (B, N, D), bias (B, 1, 1, N [+ M]) added to the scores, keep
        (B, 1, 1, N) multiplied into the weights -> (B, M, D).
        """
        if self.is_cross_only:
            return self.attend(latents, context, bias, keep)
        normed = self.norm_latents(latents)
        memory = torch.cat([self.norm_context(context), normed], dim=1)  # (B, N + M, D), tokens first
        latents = latents + self.attend(normed, memory, bias, None)
        return latents + self.ff(latents)  # type: ignore[no-any-return]

    def attend(self, queries: Tensor, memory: Tensor, bias: Tensor | None, keep: Tensor | None) -> Tensor:
        """Return the attention's output (B, M, D); grouped queries share a key-value head without copies."""
        batch, count, _ = queries.shape
        q = split_heads(self.to_q(queries), self.heads)  # (B, H, M, d)
        k, v = self.to_kv(memory).chunk(2, dim=-1)
        k, v = split_heads(k, self.kv_heads), split_heads(v, self.kv_heads)  # (B, KV, N, d)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if self.groups > 1:  # heads of one group follow each other: lay their queries end to end
            q = q.reshape(batch, self.kv_heads, self.groups * count, self.head_dim)
        read = attend(q, k, v, bias=bias, keep=keep)
        if self.groups > 1:
            read = read.reshape(batch, self.heads, count, self.head_dim)
        return self.to_out(merge_heads(read))  # type: ignore[no-any-return]


class Perceiver(Compressor):
    """Replace N tokens by M latents that have read them.

    Shapes: tokens (B, [T, [F,]] N, C), optional context_mask of the same leading axes (bool, true = real)
    -> latents (B, [T,] M, D). T images and F frames are axes where `images` or `frames` is above 1.

    Static rewrite: nothing in the original depends on data (level E0). The mask is a finite bias of -1e30,
    grouped heads are laid end to end instead of repeating keys and values, and key and value share one
    product. A sample without any real token: its latents read themselves (cross-only: zeros come out).

    Source: arXiv:2204.14198, section 3.1.1; flamingo-pytorch, open_flamingo, transformers' Idefics classes.
    """

    Params = PerceiverParams
    width_param = "context_dim"
    unstored_params = ("head_dim",)
    renamed_params: ClassVar[Mapping[str, str]] = {"media": "images"}

    def __init__(self, params: PerceiverParams, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        _require_consistent(params, budget)
        width = params.width

        def norm(size: int) -> nn.Module:
            return RMSNorm(size) if params.family == "idefics2" else nn.LayerNorm(size)

        if params.projection_dim:
            self.projection = Projection(params.context_dim, params.projection_dim, width)
        if params.media_embeds:
            self.media_embeds = nn.Parameter(torch.zeros(params.media_embeds, 1, width))
        if params.frame_embeds:
            self.frame_embeds = nn.Parameter(torch.zeros(params.frame_embeds, width))
        self.latents = nn.Parameter(torch.zeros(params.latents, width))
        self.layers = nn.ModuleList(ResamplerLayer(params, norm) for _ in range(params.depth))
        self.norm = nn.Identity() if params.family == "cross-only" else norm(width)

    @property
    def media_shape(self) -> tuple[int, ...]:
        """Axes between the batch and the tokens: (), (T,) or (T, F)."""
        if self.params.frames > 1:
            return (self.params.images, self.params.frames)
        return (self.params.images,) if self.params.images > 1 else ()

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `tokens`, and `context_mask` where the parameters ask for it."""
        shape = (batch, *self.media_shape, self.site.tokens_in)
        tokens = TensorSpec("tokens", (*shape, self.params.context_dim), "float32", "tokens")
        return (tokens, TensorSpec("context_mask", shape, "bool", "mask")) if self.params.mask else (tokens,)

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `latents`."""
        shape = (batch, *self.media_shape[:1], self.budget.tokens_out, self.params.width)
        return (TensorSpec("latents", shape, "float32", "tokens"),)

    def forward(self, tokens: Tensor, context_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the latents after the final norm."""
        params, count = self.params, self.budget.tokens_out
        batch = tokens.shape[0]
        context = tokens.reshape(batch * params.images, params.frames, -1, params.context_dim)
        if params.projection_dim:
            context = self.projection(context)
        if params.frame_embeds:
            context = context + self.frame_embeds[: params.frames, None]  # (F, 1, D)
        if params.media_embeds:
            context = context.reshape(batch, params.images, -1, params.width) + self.media_embeds[: params.images]
        context = context.reshape(batch * params.images, self.budget.tokens_in, params.width)
        bias, keep = self._mask(context_mask, batch * params.images)
        latents = self.latents[:count].expand(batch * params.images, -1, -1)
        for layer in self.layers:
            latents = layer(latents, context, bias, keep)
        return (self.norm(latents).reshape(batch, *self.media_shape[:1], count, params.width),)

    def _mask(self, context_mask: Tensor | None, rows: int) -> tuple[Tensor | None, Tensor | None]:
        """Return the bias of the scores, and for cross-only the factor of the weights."""
        if context_mask is None:
            return None, None
        keep = context_mask.reshape(rows, 1, 1, self.budget.tokens_in).to(self.latents.dtype)
        bias = (1.0 - keep) * MASKED
        if self.params.family == "cross-only":
            return bias, keep
        return F.pad(bias, (0, self.budget.tokens_out)), None  # latents are never masked

    def reference(self) -> nn.Module:
        """Return the original's forward pass on this module's parameters."""
        return PerceiverOriginal(self)

    @classmethod
    def count_tokens(cls, params: PerceiverParams, site: Site) -> int:
        """Return the tokens of one medium: those of each frame, times frames."""
        return site.tokens_in * params.frames

    @classmethod
    def for_budgets(cls, params: PerceiverParams, counts: Sequence[int]) -> PerceiverParams:
        """Size the latent table by the largest budget where nothing else did."""
        return params if params.latents else msgspec.structs.replace(params, latents=max(counts))

    @classmethod
    def layout_of(cls, state: Mapping[str, Tensor]) -> str:
        """Return the family that the keys tell."""
        return "" if _is_own_layout(state) else _to_own_keys(state, "flamingo")[0]

    @classmethod
    def infer_params(cls, state: Mapping[str, Tensor], params: PerceiverParams) -> dict[str, Any]:
        """Return family, sizes and counts of a checkpoint; the head width comes from the parameters."""
        family, own, _ = _to_own_keys(state, params.family)
        sizes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        latents, width = sizes["latents"]
        found: dict[str, Any] = {"family": family, "latents": latents, "embed_dim": width}
        found["depth"] = count_numbered(own, "layers")
        found["qk_norm"] = "layers.0.q_norm.weight" in sizes
        if found["qk_norm"]:
            found["head_dim"] = sizes["layers.0.q_norm.weight"][0]
        head_dim = found.get("head_dim", params.head_dim)
        if "layers.0.to_q.weight" in sizes and "layers.0.to_kv.weight" in sizes:
            heads = count_heads(sizes["layers.0.to_q.weight"][0], head_dim, name="layers.0.to_q")
            kv_heads = count_heads(sizes["layers.0.to_kv.weight"][0] // 2, head_dim, name="layers.0.to_k")
            found.update(num_heads=heads, kv_heads=0 if kv_heads == heads else kv_heads)
        if "layers.0.ff.fc1.weight" in sizes:
            found["ff_mult"] = sizes["layers.0.ff.fc1.weight"][0] / width
        if "projection.gate.weight" in sizes:
            found["projection_dim"], found["context_dim"] = sizes["projection.gate.weight"]
        else:
            found["context_dim"] = width
        for name in ("media_embeds", "frame_embeds"):
            found[name] = sizes[name][0] if name in sizes else 0
        return found

    def load_original(self, state: Mapping[str, Tensor], *, unread: Sequence[str] = ()) -> str:
        """Load a checkpoint of any of the four families, or edgecomp's own; its keys say which."""
        layout = self.layout_of(state) or "edgecomp"
        _, own, file_keys = _to_own_keys(state, self.params.family)
        load_exactly(self, own, layout=layout, unread=unread, file_keys=file_keys)
        return layout

    @property
    def key_maps(self) -> Mapping[str, KeyMap]:
        """The names of this family."""
        return {name: keys for name, keys in _MAPS.items() if name == self.params.family}


def _require_consistent(params: PerceiverParams, budget: TokenBudget) -> None:
    if params.width != params.context_dim and not params.projection_dim:
        raise InvalidSpec(
            f"perceiver: latents of width {params.width} cannot read tokens of width {params.context_dim}; "
            "use a host or weights of equal width, or params.projection_dim with family=idefics2"
        )
    if params.projection_dim and params.family != "idefics2":
        raise InvalidSpec(f"perceiver: params.projection_dim belongs to family=idefics2, not {params.family}")
    if params.num_heads % (params.kv_heads or params.num_heads):
        raise InvalidSpec(f"perceiver: num_heads={params.num_heads} is not a multiple of kv_heads={params.kv_heads}")
    if budget.tokens_out > params.latents:
        raise InvalidSpec(
            f"perceiver: budget {budget.tokens_out} is above the {params.latents} latents of the table; "
            "lower the budget, or raise params.latents where no checkpoint fixes it"
        )
    for axis, table in (("images", "media_embeds"), ("frames", "frame_embeds")):
        rows = getattr(params, table)
        if rows and getattr(params, axis) > rows:
            raise InvalidSpec(f"perceiver: params.{axis}={getattr(params, axis)} is above params.{table}={rows}")


_LUCIDRAINS = KeyMap(
    ("latents", "latents"),
    ("norm.**", "norm.**"),
    ("layers.*.0.norm_media.**", "layers.*.norm_context.**"),
    ("layers.*.0.norm_latents.**", "layers.*.norm_latents.**"),
    ("layers.*.0.{to_q,to_kv,to_out}.**", "layers.*.{to_q,to_kv,to_out}.**"),
    ("layers.*.1.{0,1,3}.**", "layers.*.ff.{norm,fc1,fc2}.**"),
)
_MAPS: dict[Family, KeyMap] = {
    "flamingo": KeyMap(_LUCIDRAINS, ("media_pos_emb", "media_embeds")),
    "open-flamingo": KeyMap(_LUCIDRAINS, ("media_time_embs", "media_embeds"), ("frame_embs", "frame_embeds")),
    "idefics1": KeyMap(
        ("latents", "latents"),
        ("layer_norm.**", "norm.**"),
        ("blocks.*.0.{context,latents}_layer_norm.**", "layers.*.norm_{context,latents}.**"),
        ("blocks.*.0.{q,k}_layer_norm.**", "layers.*.{q,k}_norm.**"),
        ("blocks.*.0.{q_proj,output_proj}.**", "layers.*.{to_q,to_out}.**"),
        (("blocks.*.0.k_proj.**", "blocks.*.0.v_proj.**"), "layers.*.to_kv.**"),
        ("blocks.*.1.{ln,fc,c_proj}.**", "layers.*.ff.{norm,fc1,fc2}.**"),
    ),
    "idefics2": KeyMap(
        ("perceiver_resampler.latents", "latents"),
        ("perceiver_resampler.norm.**", "norm.**"),
        ("perceiver_resampler.layers.*.input_{context,latents}_norm.**", "layers.*.norm_{context,latents}.**"),
        ("perceiver_resampler.layers.*.self_attn.{q,o}_proj.**", "layers.*.to_{q,out}.**"),
        (
            ("perceiver_resampler.layers.*.self_attn.k_proj.**", "perceiver_resampler.layers.*.self_attn.v_proj.**"),
            "layers.*.to_kv.**",
        ),
        ("perceiver_resampler.layers.*.post_attention_layernorm.**", "layers.*.ff.norm.**"),
        ("perceiver_resampler.layers.*.mlp.{gate,up,down}_proj.**", "layers.*.ff.{fc1,up,fc2}.**"),
        ("modality_projection.{gate,up,down}_proj.**", "projection.{gate,up,down}.**"),
    ),
}


def _is_own_layout(state: Mapping[str, Tensor]) -> bool:
    return "layers.0.to_kv.weight" in state


def _to_own_keys(
    state: Mapping[str, Tensor], family: Family
) -> tuple[Family, dict[str, Tensor], dict[str, str] | None]:
    """Tell the layout by its keys, strip the prefix of a whole model, and rename to this module's keys.

    Returns:
        the family, the tensors under this module's keys, and what the file calls each of these keys.
    """
    if _is_own_layout(state):
        return family, dict(state), None
    prefixes = [key[: -len("latents")] for key in state if key == "latents" or key.endswith(".latents")]
    if len(prefixes) != 1:
        raise WeightsError(
            f"weights hold {len(prefixes)} tensors named 'latents', and a perceiver has one; first keys: "
            f"{', '.join(list(state)[:5])}. Give a checkpoint of Flamingo, OpenFlamingo, Idefics1 or Idefics2"
        )
    prefix = prefixes[0]
    part = {key.removeprefix(prefix): key for key in state if key.startswith(prefix)}
    family = _tell_family(part)
    if family == "idefics2":
        part = {f"perceiver_resampler.{short}": key for short, key in part.items()}
        connector = prefix.removesuffix("perceiver_resampler.")
        if connector != prefix:
            projection = f"{connector}modality_projection."
            part |= {key.removeprefix(connector): key for key in state if key.startswith(projection)}
    return family, *_MAPS[family].read(state, part)


def _tell_family(keys: Collection[str]) -> Family:
    """Return the family of a checkpoint's keys."""
    if "layers.0.self_attn.q_proj.weight" in keys:
        return "idefics2"
    if "blocks.0.0.q_proj.weight" in keys:
        return "idefics1"
    if "layers.0.0.to_q.weight" in keys:
        return "flamingo" if "media_pos_emb" in keys else "open-flamingo"
    raise WeightsError(
        f"weights are in none of the layouts flamingo, open-flamingo, idefics1, idefics2 or edgecomp; "
        f"first keys: {', '.join(list(keys)[:5])}. Convert them to one of these"
    )


class PerceiverOriginal(nn.Module):
    """The eager original on the parameters of a `Perceiver`: heads repeated, masks at minus infinity."""

    def __init__(self, static: Perceiver) -> None:
        super().__init__()
        self.static = static

    def forward(self, tokens: Tensor, context_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return what the static module returns, one sample and one medium at a time."""
        params = self.static.params
        shape = (tokens.shape[0], params.images, params.frames, self.static.site.tokens_in)
        media = tokens.reshape(*shape, -1)
        masks = [None] * shape[0] if context_mask is None else list(context_mask.reshape(shape))
        samples = [
            torch.stack(
                [self._medium(index, m, None if mask is None else mask[index]) for index, m in enumerate(sample)]
            )
            for sample, mask in zip(media, masks, strict=True)
        ]
        result = torch.stack(samples)  # (B, T, M, D)
        return (result if self.static.media_shape else result[:, 0],)

    def _medium(self, index: int, frames: Tensor, mask: Tensor | None) -> Tensor:
        """Return (M, D) for frames (F, N, C) and their mask (F, N)."""
        static, params = self.static, self.static.params
        if params.projection_dim:
            gate, up = F.linear(frames, static.projection.gate.weight), F.linear(frames, static.projection.up.weight)
            frames = F.linear(F.silu(gate) * up, static.projection.down.weight)
        if params.frame_embeds:
            frames = torch.stack([frame + static.frame_embeds[f] for f, frame in enumerate(frames)])
        context = frames.flatten(0, 1)
        if params.media_embeds:
            context = context + static.media_embeds[index]
        latents = static.latents[: static.budget.tokens_out]
        for layer in static.layers:
            latents = self._layer(layer, latents, context, None if mask is None else mask.flatten())
        return latents if params.family == "cross-only" else self._norm(static.norm, latents)

    def _layer(self, layer: Any, latents: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        if layer.is_cross_only:
            return self._attend(layer, latents, context, mask)
        queries = self._norm(layer.norm_latents, latents)
        memory = torch.cat([self._norm(layer.norm_context, context), queries])
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(latents))])
        latents = latents + self._attend(layer, queries, memory, mask)
        normed = self._norm(layer.ff.norm, latents)
        hidden = _activation(self.static.params.family)(F.linear(normed, layer.ff.fc1.weight))
        if self.static.params.family == "idefics2":
            hidden = hidden * F.linear(normed, layer.ff.up.weight)
        return latents + F.linear(hidden, layer.ff.fc2.weight)

    def _attend(self, layer: ResamplerLayer, queries: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        key_weight, value_weight = layer.to_kv.weight.chunk(2)
        q = F.linear(queries, layer.to_q.weight).reshape(len(queries), layer.heads, -1).transpose(0, 1)
        k = F.linear(memory, key_weight).reshape(len(memory), layer.kv_heads, -1).transpose(0, 1)
        v = F.linear(memory, value_weight).reshape(len(memory), layer.kv_heads, -1).transpose(0, 1)
        k, v = k.repeat_interleave(layer.groups, dim=0), v.repeat_interleave(layer.groups, dim=0)
        if self.static.params.qk_norm:
            q, k = self._norm(layer.q_norm, q), self._norm(layer.k_norm, k)
        scores = torch.einsum("hmd,hnd->hmn", q, k) / layer.head_dim**0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        weights = scores.softmax(dim=-1).nan_to_num(0.0)  # NaN only where every key is masked
        return torch.einsum("hmn,hnd->mhd", weights, v).flatten(1) @ layer.to_out.weight.T

    def _norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        if isinstance(norm, RMSNorm):
            return norm.weight * (x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps))
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)  # type: ignore[arg-type]
