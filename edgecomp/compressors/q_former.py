"""The Q-Former: learned queries attend to each other, to a text where there is one, and to the image's tokens.

Papers: "BLIP-2" (arXiv:2301.12597), section 3.1, and "InstructBLIP" (arXiv:2305.06500), section 2.3. The weights are
those of transformers' layout (version in `export/recipes/q-former.toml`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecomp.compressors._attention import MultiHeadAttention, key_bias
from edgecomp.compressors._base import Compressor, Natural, Params, Positive
from edgecomp.compressors._checkpoint import count_numbered, load_exactly
from edgecomp.compressors._eager import gelu
from edgecomp.compressors._keys import KeyMap, leading_axis
from edgecomp.errors import InvalidSpec, WeightsError
from edgecomp.specs import Output, Site, TensorSpec, TokenBudget

__all__ = ["QFormer"]

_EPS = 1e-12  # BERT's


class QFormerParams(Params, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of the Q-Former.

    Attributes:
        tokens: patch tokens where no host says how many.
        prefix_tokens: class and register tokens in front of them, which are read too; a host says how many.
        context_dim: width of the incoming tokens; a host decides it.
        embed_dim, depth, num_heads, hidden_dim: of the layers; `hidden_dim` is the MLP's.
        cross_every: each layer whose number this divides reads the image, the first among them.
        latents: rows of the query table; a budget takes the first M. 0: the largest budget.
        projection_dim: width of the language model behind it (`language_projection`); 0: there is none.
        words: of a text that is read with the queries (InstructBLIP); shorter ones are masked. 0: there is none.
        vocabulary, positions: rows of the tables of words and of their places.
        mask: take a `context_mask`, true where a token is real.
    """

    tokens: Positive = 256
    prefix_tokens: Natural = 1
    context_dim: Positive = 1408
    embed_dim: Positive = 768
    depth: Positive = 12
    num_heads: Positive = 12
    hidden_dim: Positive = 3072
    cross_every: Positive = 2
    latents: Natural = 0
    projection_dim: Natural = 0
    words: Natural = 0
    vocabulary: Positive = 30522
    positions: Positive = 512
    mask: bool = False


class FeedForward(nn.Module):
    """Post-norm MLP with its residual sum. (B, M, D) -> (B, M, D)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Return the rows behind the MLP."""
        return self.norm(x + self.fc2(F.gelu(self.fc1(x))))  # type: ignore[no-any-return]


class QFormerLayer(nn.Module):
    """Self-attention over queries and text, cross-attention of the queries, and an MLP for each of the two."""

    def __init__(self, params: QFormerParams, index: int) -> None:
        super().__init__()
        width = params.embed_dim
        self.attn, self.norm = MultiHeadAttention(width, params.num_heads), nn.LayerNorm(width, eps=_EPS)
        self.reads_image = index % params.cross_every == 0
        if self.reads_image:
            self.cross = MultiHeadAttention(width, params.num_heads, context_dim=params.context_dim)
            self.cross_norm = nn.LayerNorm(width, eps=_EPS)
        self.ff = FeedForward(width, params.hidden_dim)
        if params.words:
            self.ff_text = FeedForward(width, params.hidden_dim)

    def forward(
        self, queries: Tensor, text: Tensor | None, context: Tensor, masks: tuple[Tensor | None, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """Update queries (B, M, D) and text (B, T, D); a batch of 1 serves all until the image is read.

        Args:
            masks: bias of the self-attention's scores, and bias and factor of the cross-attention's.
        """
        text_bias, bias, keep = masks
        rows = queries if text is None else torch.cat([queries, text], dim=1)
        rows = self.norm(rows + self.attn(rows, rows, rows, text_bias))
        queries = rows[:, : queries.shape[1]]
        if self.reads_image:
            queries = self.cross_norm(queries + self.cross(queries, context, context, bias, keep))
        return self.ff(queries), None if text is None else self.ff_text(rows[:, queries.shape[1] :])


class QFormer(Compressor):
    """Replace N tokens by M queries that have read them, and the text where there is one.

    Shapes: tokens (B, P + N, C), optional context_mask (B, P + N) (bool, true = real), optional text_ids (B, T) int32
    and text_mask (B, T) -> latents (B, M, D), and text (B, T, D) where one goes in. P prefix tokens are read like all
    others.

    Static rewrite: nothing in the original depends on data (level E0); a text is padded to T words. Masks are a finite
    bias of -1e30. Queries stay one row of the batch until they read the image, so that without a text all before it
    folds to a constant. A sample without any real token: its queries read zeros.

    Source: arXiv:2301.12597, section 3.1; transformers' `Blip2QFormerModel` and `InstructBlipQFormerModel`.
    """

    Params = QFormerParams
    width_param = "context_dim"
    unstored_params = ("num_heads",)
    keeps_prefix = True
    hands_on_prefix = False

    def __init__(self, params: QFormerParams, site: Site, budget: TokenBudget, output: Output = "tokens") -> None:
        super().__init__(params, site, budget, output)
        width = params.embed_dim
        if width % params.num_heads:
            raise InvalidSpec(f"q-former: params.num_heads={params.num_heads} does not divide embed_dim={width}")
        if budget.tokens_out > params.latents:
            raise InvalidSpec(
                f"q-former: budget {budget.tokens_out} is above the {params.latents} queries of the table; lower the "
                "budget, or raise params.latents where no checkpoint fixes it"
            )
        if params.words > params.positions:
            raise InvalidSpec(
                f"q-former: params.words={params.words} is above params.positions={params.positions}, the rows of the "
                "table of places; lower it, or cut the text"
            )
        self.query_tokens = nn.Parameter(torch.zeros(params.latents, width))
        if params.words:
            self.word_embeddings = nn.Embedding(params.vocabulary, width)
            self.position_embeddings = nn.Embedding(params.positions, width)
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.layers = nn.ModuleList(QFormerLayer(params, index) for index in range(params.depth))
        if params.projection_dim:
            self.projection = nn.Linear(width, params.projection_dim)

    @property
    def rows_in(self) -> int:
        """Tokens that are read, prefix tokens among them."""
        return self.site.tokens_in + self.site.num_prefix_tokens

    def input_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `tokens`, and `context_mask`, `text_ids` and `text_mask` where the parameters ask for them."""
        params = self.params
        specs = [TensorSpec("tokens", (batch, self.rows_in, params.context_dim), "float32", "tokens")]
        if params.mask:
            specs.append(TensorSpec("context_mask", (batch, self.rows_in), "bool", "mask"))
        if params.words:
            specs.append(TensorSpec("text_ids", (batch, params.words), "int32", "ids", params.vocabulary))
            specs.append(TensorSpec("text_mask", (batch, params.words), "bool", "mask"))
        return tuple(specs)

    def output_specs(self, batch: int = 1) -> tuple[TensorSpec, ...]:
        """Return `latents`, and `text` where one goes in."""
        params = self.params
        shape = (batch, self.budget.tokens_out, params.projection_dim or params.embed_dim)
        latents = TensorSpec("latents", shape, "float32", "tokens")
        if not params.words:
            return (latents,)
        return latents, TensorSpec("text", (batch, params.words, params.embed_dim), "float32", "features")

    def forward(self, tokens: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """Return the queries behind the last layer, and the text."""
        params, count = self.params, self.budget.tokens_out
        given = list(rest)
        bias, keep = key_bias(given.pop(0), tokens) if params.mask else (None, None)
        queries = self.norm(self.query_tokens[:count]).unsqueeze(0)
        text = text_bias = None
        if params.words:
            ids, mask = given
            text = self.norm(self.word_embeddings(ids) + self.position_embeddings.weight[: params.words])
            text_bias = F.pad(key_bias(mask, tokens)[0], (count, 0))  # queries are never masked
            queries = queries.expand(tokens.shape[0], -1, -1)
        for layer in self.layers:
            queries, text = layer(queries, text, tokens, (text_bias, bias, keep))
        if params.projection_dim:
            queries = self.projection(queries)
        return (queries,) if text is None else (queries, text)

    def reference(self) -> nn.Module:
        """Return the original's forward pass on this module's parameters."""
        return QFormerOriginal(self)

    # -- checkpoints ----------------------------------------------------------------------------------

    @classmethod
    def for_budgets(cls, params: QFormerParams, counts: Sequence[int]) -> QFormerParams:
        """Size the query table by the largest budget where nothing else did."""
        return params if params.latents else msgspec.structs.replace(params, latents=max(counts))

    @classmethod
    def layout_of(cls, state: Mapping[str, Tensor]) -> str:
        """Return `blip-2`, or `instructblip` where words are embedded."""
        return "" if _is_own_layout(state) else _to_own_keys(state)[0]

    @classmethod
    def infer_params(cls, state: Mapping[str, Tensor], params: QFormerParams) -> dict[str, Any]:
        """Return sizes and counts of a checkpoint; the number of words stays as it was asked for."""
        _, own, _ = _to_own_keys(state)
        sizes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        hidden, width = sizes["layers.0.ff.fc1.weight"]
        depth = count_numbered(own, "layers")
        reading = [index for index in range(depth) if f"layers.{index}.cross.to_q.weight" in own]
        found: dict[str, Any] = {"embed_dim": width, "hidden_dim": hidden, "depth": depth}
        found["cross_every"] = reading[1] if len(reading) > 1 else depth
        found["context_dim"] = sizes["layers.0.cross.to_k.weight"][1]
        found["projection_dim"] = sizes["projection.weight"][0] if "projection.weight" in sizes else 0
        if "query_tokens" in sizes:
            found["latents"] = sizes["query_tokens"][0]
        if "word_embeddings.weight" in sizes:
            found["vocabulary"], found["positions"] = (
                sizes["word_embeddings.weight"][0],
                sizes["position_embeddings.weight"][0],
            )
            found["words"] = params.words or min(32, found["positions"])
        else:
            found["words"] = 0
        return found

    def load_original(self, state: Mapping[str, Tensor], *, unread: Sequence[str] = ()) -> str:
        """Load a checkpoint of BLIP-2 or InstructBLIP in transformers' layout, or edgecomp's own."""
        layout, own, file_keys = _to_own_keys(state)
        load_exactly(self, own, layout=layout or "edgecomp", unread=unread, file_keys=file_keys)
        return layout or "edgecomp"

    @property
    def key_maps(self) -> Mapping[str, KeyMap]:
        """Names of BLIP-2 in transformers, and of InstructBLIP where a text is read."""
        layout = "instructblip" if self.params.words else "blip-2"
        return {layout: _MAPS[layout]}


_LAYERS = "qformer.encoder.layer.*."
_MAP = KeyMap(
    ("query_tokens", "query_tokens", leading_axis(3)),
    ("language_projection.**", "projection.**"),
    ("qformer.embeddings.{word,position}_embeddings.**", "{word,position}_embeddings.**"),
    (_LAYERS + "attention.attention.{query,key,value}.**", "layers.*.attn.to_{q,k,v}.**"),
    (_LAYERS + "attention.output.dense.**", "layers.*.attn.to_out.**"),
    (_LAYERS + "attention.output.LayerNorm.**", "layers.*.norm.**"),
    (_LAYERS + "crossattention.attention.{query,key,value}.**", "layers.*.cross.to_{q,k,v}.**"),
    (_LAYERS + "crossattention.output.dense.**", "layers.*.cross.to_out.**"),
    (_LAYERS + "crossattention.output.LayerNorm.**", "layers.*.cross_norm.**"),
    (_LAYERS + "intermediate{_query,}.dense.**", "layers.*.{ff,ff_text}.fc1.**"),
    (_LAYERS + "output{_query,}.dense.**", "layers.*.{ff,ff_text}.fc2.**"),
    (_LAYERS + "output{_query,}.LayerNorm.**", "layers.*.{ff,ff_text}.norm.**"),
)
_MAPS = {
    "blip-2": KeyMap(("qformer.layernorm.**", "norm.**"), _MAP),
    "instructblip": KeyMap(("qformer.embeddings.layernorm.**", "norm.**"), _MAP),
}


def _is_own_layout(state: Mapping[str, Tensor]) -> bool:
    return "layers.0.attn.to_q.weight" in state


def _to_own_keys(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor], dict[str, str] | None]:
    """Strip the prefix of a whole model, and rename to this module's keys.

    A BLIP-2 checkpoint may carry MLPs for a text that nothing embeds; they are left out.

    Returns:
        the layout, the tensors under this module's keys, and what the file calls each of these keys.
    """
    if _is_own_layout(state):
        return "", dict(state), None
    mark = "encoder.layer.0.crossattention.attention.query.weight"
    prefixes = [key[: -len(mark)] for key in state if key.endswith(mark)]
    if len(prefixes) != 1:
        raise WeightsError(
            f"weights hold {len(prefixes)} Q-Formers (tensors named {mark}), and one is read; first keys: "
            f"{', '.join(list(state)[:5])}. Give a checkpoint of BLIP-2 or InstructBLIP in transformers' layout"
        )
    inner = prefixes[0]
    outer = inner.removesuffix("qformer.")
    names = ("query_tokens", "language_projection.weight", "language_projection.bias")
    beside = {name: f"{outer}{name}" for name in names if f"{outer}{name}" in state}
    part = {f"qformer.{key.removeprefix(inner)}": key for key in state if key.startswith(inner)}
    part = {name: key for name, key in part.items() if key not in beside.values()} | beside
    layout = "instructblip" if "qformer.embeddings.word_embeddings.weight" in part else "blip-2"
    own, file_keys = _MAPS[layout].read(state, part)
    if layout == "blip-2":
        own = {name: tensor for name, tensor in own.items() if ".ff_text." not in name}
    return layout, own, file_keys


class QFormerOriginal(nn.Module):
    """The eager original on the parameters of a `QFormer`, one sample at a time; padding is left out, not masked."""

    def __init__(self, static: QFormer) -> None:
        super().__init__()
        self.static = static

    def forward(self, tokens: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """Return what the static module returns."""
        samples = []
        for index, context in enumerate(tokens):
            given = [value[index] for value in rest]
            if self.static.params.mask:
                context = context[given.pop(0)]
            samples.append(self._sample(context, *given))
        return tuple(torch.stack(parts) for parts in zip(*samples, strict=True))

    def _sample(self, context: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        static: Any = self.static
        rows = static.query_tokens[: static.budget.tokens_out]
        count, real = len(rows), torch.ones(len(rows), dtype=torch.bool)
        if ids is not None and mask is not None:
            words = static.word_embeddings.weight[ids.long()] + static.position_embeddings.weight[: len(ids)]
            rows, real = torch.cat([rows, words]), torch.cat([real, mask])
        rows = self._norm(static.norm, rows)
        for layer in static.layers:
            rows = self._norm(layer.norm, rows + self._attend(layer.attn, rows, rows[real]))
            queries, text = rows[:count], rows[count:]
            if layer.reads_image:
                queries = self._norm(layer.cross_norm, queries + self._attend(layer.cross, queries, context))
            rows = self._mlp(layer.ff, queries)
            if ids is not None:
                rows = torch.cat([rows, self._mlp(layer.ff_text, text)])
        latents = rows[:count]
        if static.params.projection_dim:
            latents = F.linear(latents, static.projection.weight, static.projection.bias)
        return (latents,) if ids is None else (latents, rows[count:])

    def _attend(self, attn: MultiHeadAttention, rows: Tensor, memory: Tensor) -> Tensor:
        parts = [
            layer(given).chunk(attn.heads, -1)
            for layer, given in ((attn.to_q, rows), (attn.to_k, memory), (attn.to_v, memory))
        ]
        read = []
        for q, k, v in zip(*parts, strict=True):
            read.append(torch.softmax(torch.einsum("md,nd->mn", q, k) / q.shape[1] ** 0.5, dim=1) @ v)
        return attn.to_out(torch.cat(read, dim=1))  # type: ignore[no-any-return]

    def _mlp(self, ff: FeedForward, x: Tensor) -> Tensor:
        hidden = F.linear(x, ff.fc1.weight, ff.fc1.bias)
        return self._norm(ff.norm, x + F.linear(gelu(hidden), ff.fc2.weight, ff.fc2.bias))

    def _norm(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
