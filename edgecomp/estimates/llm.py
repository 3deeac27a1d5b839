"""What fewer visual tokens save downstream: prefill FLOPs by layer, the KV cache, and the time to the first token.

A decoder layer of n tokens, width d, H query and G key heads of size h, and a gated MLP of width m has
`n d (2 H h + 2 G h) + 2 n^2 H h + 3 n d m` multiply-adds: with H h = d that is `2 n d^2 (1 + G / H) + 2 n^2 d + 3 n d
m`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from edgecomp.errors import InvalidSpec, UnknownName
from edgecomp.estimates.applied import applied_for
from edgecomp.estimates.efficiency import Load, modelled_us
from edgecomp.estimates.peaks import rate_of, require_precision
from edgecomp.files import JSON_ERRORS
from edgecomp.specs.costs import Amount, Whole
from edgecomp.specs.target import Target

__all__ = [
    "SHAPES",
    "LlmShape",
    "Prefill",
    "activation_bytes",
    "layer_flops",
    "load_shape",
    "merging_flops",
    "parse_schedule",
    "prefill",
    "pruning_flops",
    "tokens_by_layer",
    "weight_bytes",
]

Count = Annotated[int, Meta(ge=1, le=1 << 24)]
_LARGEST_CONFIG = 1 << 20
_LARGEST_FLOPS = 10**30
_LARGEST_SEQUENCE = 1 << 22
_WEIGHT_BYTES = {"fp32": 4.0, "tf32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "fp8": 1.0, "fp4": 0.5}
_PAGERANK_ROUNDS = 5
_NESTED = ("text_config", "llm_config", "language_config", "thinker_config")
_MOST_LAYERS = 1000  # the deepest decoders have some 120
_SILU = ("silu", "swish")
#: Whose layers are the formula above: grouped keys, attention to all that came before, a gated MLP of silu.
_KNOWN_TYPES = (
    "llama",
    "mistral",
    "vicuna",
    "qwen2",
    "qwen2_vl",
    "qwen2_vl_text",
    "qwen2_5_vl",
    "qwen2_5_vl_text",
    "qwen3",
    "qwen3_vl",
    "qwen3_vl_text",
    "llava",  # its first versions put the sizes of LLaMA, Mistral or Qwen2 beside their own
    "llava_llama",
    "llava_mistral",
    "llava_qwen",
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")


class LlmShape(msgspec.Struct, frozen=True):
    """A decoder of LLaMA's kind: grouped keys, a gated MLP, no biases that count.

    Attributes:
        tied: the embedding is the head, and held once.
    """

    name: str
    layers: Count
    dim: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    mlp: Count
    vocabulary: Count
    tied: bool = False

    @property
    def parameters(self) -> int:
        """Of the layers and the embeddings; norms are left out."""
        attention = self.dim * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        tables = (1 if self.tied else 2) * self.vocabulary * self.dim
        return self.layers * (attention + 3 * self.dim * self.mlp) + tables


def _shape(
    name: str, layers: int, dim: int, heads: int, kv_heads: int, head_dim: int, mlp: int, vocabulary: int, *, tied: bool
) -> LlmShape:
    return LlmShape(name, layers, dim, heads, kv_heads, head_dim, mlp, vocabulary, tied)


#: layers, width, query heads, key heads, size of a head, width of the MLP, vocabulary; of the public configurations.
SHAPES = {
    one.name: one
    for one in (
        _shape(
            "llama-7b", 32, 4096, 32, 32, 128, 11008, 32000, tied=False
        ),  # LLaMA, LLaMA-2, Vicuna, and LLaVA-1.5 on them
        _shape("llama-13b", 40, 5120, 40, 40, 128, 13824, 32000, tied=False),
        _shape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256, tied=False),
        _shape("llama-3.2-1b", 16, 2048, 32, 8, 64, 8192, 128256, tied=True),
        _shape("llama-3.2-3b", 28, 3072, 24, 8, 128, 8192, 128256, tied=True),
        _shape("qwen2-0.5b", 24, 896, 14, 2, 64, 4864, 151936, tied=True),
        _shape("qwen2-1.5b", 28, 1536, 12, 2, 128, 8960, 151936, tied=True),
        _shape("qwen2-7b", 28, 3584, 28, 4, 128, 18944, 152064, tied=False),
        _shape("qwen2.5-3b", 36, 2048, 16, 2, 128, 11008, 151936, tied=True),
        _shape("qwen3-0.6b", 28, 1024, 16, 8, 128, 3072, 151936, tied=True),
        _shape("qwen3-1.7b", 28, 2048, 16, 8, 128, 6144, 151936, tied=True),
        _shape("qwen3-4b", 36, 2560, 32, 8, 128, 9728, 151936, tied=True),
        _shape("qwen3-8b", 36, 4096, 32, 8, 128, 12288, 151936, tied=False),
    )
}


class Prefill(msgspec.Struct, frozen=True):
    """The prefill of one sequence.

    Attributes:
        visual_tokens: that the language model is given.
        tokens: of each layer, with the text.
        flops: of all layers; `flops_by_layer` of each.
        overhead_flops: of choosing tokens inside the model, where the schedule's method states it.
        kv_bytes: of the cache after prefill, 16 bits a number: each layer holds the tokens that reached it.
        low_us, mid_us, high_us: to the first token, without the vision encoder; the head on one token is part of it.
    """

    visual_tokens: Whole
    tokens: tuple[Whole, ...]
    flops: int
    flops_by_layer: tuple[int, ...]
    overhead_flops: int
    kv_bytes: Whole
    low_us: Amount
    mid_us: Amount
    high_us: Amount

    def __post_init__(self) -> None:
        """Refuse FLOPs that an edited document can hold, and no prefill has."""
        for flops in (self.flops, self.overhead_flops, *self.flops_by_layer):
            if not 0 <= flops <= _LARGEST_FLOPS:
                raise ValueError(
                    f"a prefill has {flops:.3g} FLOPs" if flops < 1e300 else "a prefill's FLOPs have no end"
                )


def load_shape(name: str) -> LlmShape:
    """Return a known shape by name, or read a config.json of Hugging Face.

    Raises:
        UnknownName: neither a known name nor a .json file. InvalidSpec: the file is damaged, lacks a size, or
        describes a
            model of another kind.
    """
    if not name.endswith(".json"):
        if name not in SHAPES:
            hint = "A path that ends in .json names a config of your own."
            raise UnknownName("language model", name, SHAPES, hint=hint)
        return SHAPES[name]
    path = Path(name)
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise InvalidSpec(f"--llm {name} is larger than {_LARGEST_CONFIG} bytes; give the model's config.json")
        document = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise InvalidSpec(f"--llm {name} cannot be read: {error.strerror}; give the model's config.json") from None
    except JSON_ERRORS as error:
        raise InvalidSpec(f"--llm {name} is not JSON ({error}); give the model's config.json") from None
    if not isinstance(document, dict):
        raise InvalidSpec(f"--llm {name} holds no object; give the model's config.json")
    return _from_config(name, document)


def _from_config(name: str, document: dict[str, Any]) -> LlmShape:
    inner = next((document[key] for key in _NESTED if isinstance(document.get(key), dict)), document)
    if experts := next((key for key in _EXPERTS if inner.get(key)), ""):
        raise InvalidSpec(
            f"--llm {name} has {experts} = {inner[experts]!r}: a mixture of experts, whose FLOPs hang on routing; "
            "only dense decoders are modelled"
        )
    kind = str(inner.get("model_type") or document.get("model_type") or "")
    _require_known_layers(name, kind, inner)

    def size(key: str, default: int = 0, most: int = (1 << 24) - 1) -> int:
        value = inner.get(key)
        if value is None and default:
            return default
        if type(value) is int and value > most:
            raise InvalidSpec(f"--llm {name}: {key} is {value} and at most {most}; mend the config.json")
        if type(value) is not int or value < 1:
            known = ", ".join(sorted(str(one) for one in inner)[:12])
            raise InvalidSpec(
                f"--llm {name}: {key} is {value!r} and must be a positive integer; a config.json of LLaMA, "
                "Qwen2 or Qwen3 "
                f"has it (this one has {known})"
            )
        return value

    dim, heads = size("hidden_size"), size("num_attention_heads")
    if inner.get("head_dim") is None and dim % heads:
        raise InvalidSpec(
            f"--llm {name}: hidden_size {dim} is no multiple of {heads} heads, and head_dim is not said; mend the "
            "config.json"
        )
    kv_heads, head_dim = size("num_key_value_heads", heads), size("head_dim", max(1, dim // heads))
    if heads % kv_heads:
        raise InvalidSpec(
            f"--llm {name}: {heads} heads cannot share {kv_heads} key heads evenly; mend num_key_value_heads"
        )
    return LlmShape(
        name=kind,
        layers=size("num_hidden_layers", most=_MOST_LAYERS),
        dim=dim,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=size("intermediate_size"),
        vocabulary=size("vocab_size"),
        tied=bool(inner.get("tie_word_embeddings", document.get("tie_word_embeddings", False))),
    )


def _require_known_layers(name: str, kind: str, inner: dict[str, Any]) -> None:
    """Refuse a decoder whose layers are not those that are counted: a wrong time would look like a right one."""
    if kind not in _KNOWN_TYPES:
        raise InvalidSpec(
            f"--llm {name} is of model_type {kind or 'missing'!r}, whose layers are not modelled; known are "
            f"{', '.join(_KNOWN_TYPES)}"
        )
    if inner.get("kv_lora_rank"):
        raise InvalidSpec(
            f"--llm {name} has kv_lora_rank = {inner['kv_lora_rank']!r}: latent attention, which is not modelled; only "
            "grouped keys are"
        )
    window = inner.get("sliding_window")
    layers = inner.get("layer_types")
    slides = "sliding_attention" in layers if isinstance(layers, list) else False
    if slides or (window and inner.get("use_sliding_window", not kind.startswith("qwen"))):
        raise InvalidSpec(
            f"--llm {name} has sliding_window = {window!r} in use, and every layer is counted as attending to all "
            "tokens; where your sequences are shorter, write null (and no sliding_attention in layer_types) into a "
            "copy of it"
        )
    act = inner.get("hidden_act", _SILU[0])
    if act not in _SILU:
        raise InvalidSpec(f"--llm {name} has hidden_act = {act!r}; only a gated MLP of {_SILU[0]} is modelled")


def parse_schedule(text: str, *, layers: int) -> tuple[float, ...]:
    """Return the share of the visual tokens that each layer works on.

    Args:
        text: `K:SHARE,...`: from layer K on (the first is 0), that share of the visual tokens that the language model
            was given. Or `fastv` (2:0.5), `pyramiddrop` (a half, a quarter, an eighth behind each quarter of the
            layers), `aim` (an eighth fewer each layer, from layer 13 of 32, 14 of 28, and else from the middle on).
            "": all of them.

    Raises:
        InvalidSpec: a step that is none, out of order, or beyond the last layer; a share that rises.
    """
    if text == "aim":
        start = 13 if layers == 32 else layers // 2
        return tuple(max(0.0, 1 - 0.125 * max(0, layer - start + 1)) for layer in range(layers))
    steps = {"": "", "fastv": "2:0.5"}.get(text, text)
    if text == "pyramiddrop":
        steps = ",".join(f"{layers * quarter // 4}:{0.5**quarter}" for quarter in (1, 2, 3))
    shares, last = [1.0] * layers, -1
    for step in filter(None, steps.split(",")):
        layer, share = _step(step, text, layers)
        if layer <= last:
            raise InvalidSpec(f"--schedule {text!r}: layer {layer} comes after layer {last}; give them in rising order")
        if share > shares[-1]:
            raise InvalidSpec(
                f"--schedule {text!r}: share {share:g} is more than the {shares[-1]:g} before it; none comes back"
            )
        shares[layer:] = [share] * (layers - layer)
        last = layer
    return tuple(shares)


def _step(step: str, text: str, layers: int) -> tuple[int, float]:
    layer, colon, share = step.partition(":")
    try:
        found = int(layer), float(share)
    except ValueError:
        colon = ""
        found = 0, 0.0
    if not colon:
        raise InvalidSpec(
            f"--schedule {text!r}: {step!r} is no LAYER:SHARE; write for example 2:0.5, or fastv, pyramiddrop or aim"
        )
    if not 0 <= found[0] < layers:
        raise InvalidSpec(f"--schedule {text!r}: layer {found[0]} is not one of the {layers} layers, 0 to {layers - 1}")
    if not 0 <= found[1] <= 1:
        raise InvalidSpec(f"--schedule {text!r}: share {share} is not between 0 and 1")
    return found


def tokens_by_layer(visual: int, text: int, shares: tuple[float, ...]) -> tuple[int, ...]:
    """Return how many tokens each layer works on; a share is rounded down, as AIM's and FastV's code does."""
    return tuple(int(visual * share) + text for share in shares)


def layer_flops(shape: LlmShape, tokens: int) -> int:
    """Return the FLOPs of one decoder layer's prefill; the causal half that a kernel may skip is counted."""
    wide = shape.heads * shape.head_dim
    projections = tokens * shape.dim * (2 * wide + 2 * shape.kv_heads * shape.head_dim)
    return 2 * (projections + 2 * tokens * tokens * wide + 3 * tokens * shape.dim * shape.mlp)


def merging_flops(tokens: int, dim: int, *, rounds: int) -> int:
    """Return the FLOPs of AIM's merging before the language model: `(N / 2)^2 2 D + 4 N D`, N halved each round."""
    lengths = [tokens // 2**step for step in range(rounds)]
    return int(sum(2 * (n / 2) ** 2 * dim + 4 * n * dim for n in lengths))


def pruning_flops(shape: LlmShape, visual: int, text: int, shares: tuple[float, ...]) -> int:
    """Return the FLOPs of AIM's pruning inside the language model: a softmax and a few rounds of PageRank a layer.

    It runs on all tokens once, and then in each layer that keeps some but not all of the visual ones.
    """
    lengths = [visual + text, *(int(visual * share) + text for share in shares if 0 < share < 1)]
    each = 6 + 2 * _PAGERANK_ROUNDS
    return sum(each * shape.heads * n * n + (2 * shape.heads + 1) * n for n in lengths)


def prefill(
    shape: LlmShape,
    target: Target,
    *,
    visual: int,
    text: int,
    schedule: str = "",
    precision: str = "fp16",
) -> Prefill:
    """Estimate the prefill of one sequence.

    Args:
        visual: tokens the language model is given.
        text: tokens that no schedule drops.
        schedule: see `parse_schedule`.
        precision: of products and weights; the cache and what is between stay in 16 bits.

    Raises:
        InvalidSpec: tokens out of range, a schedule that is none, a precision without a peak.
    """
    for word, count in (("--visual-tokens", visual), ("--text-tokens", text)):
        if not 0 <= count <= _LARGEST_SEQUENCE:
            raise InvalidSpec(f"{word} {count} is not between 0 and {_LARGEST_SEQUENCE}")
    shares = parse_schedule(schedule, layers=shape.layers)
    tokens = tokens_by_layer(visual, text, shares)
    if min(tokens) < 1:
        raise InvalidSpec(
            f"--visual-tokens {visual} with --text-tokens {text} leaves a layer without tokens; give text"
        )
    by_layer = tuple(layer_flops(shape, count) for count in tokens)
    overhead = pruning_flops(shape, visual, text, shares) if schedule == "aim" else 0
    applied = applied_for(target.name)
    mid = float(modelled_us(_load(shape, target, tokens, precision), applied.efficiency).sum())
    spread = math.exp(applied.error)
    return Prefill(
        visual_tokens=visual,
        tokens=tokens,
        flops=sum(by_layer),
        flops_by_layer=by_layer,
        overhead_flops=overhead,
        kv_bytes=sum(2 * 2 * count * shape.kv_heads * shape.head_dim for count in tokens),
        low_us=mid / spread,
        mid_us=mid,
        high_us=mid * spread,
    )


def weight_bytes(shape: LlmShape, precision: str) -> int:
    """Return the bytes of the weights in a precision; embeddings too."""
    return int(shape.parameters * _WEIGHT_BYTES[precision])


def activation_bytes(shape: LlmShape, tokens: tuple[int, ...]) -> int:
    """Return the most bytes that live at once in a layer beside the cache, in 16 bits: the residual with the rest.

    The rest is the layer's input with queries, keys, values and what attention makes of them, or with gate and up.
    """
    wide, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return 2 * max(tokens) * (2 * shape.dim + max(2 * wide + 2 * keys, 2 * shape.mlp))


def _load(shape: LlmShape, target: Target, tokens: tuple[int, ...], precision: str) -> Load:
    """Seven kernels a layer: norm, qkv, attention, out, norm, gate and up, down; and the head on one token."""
    word = require_precision(target, precision)
    tera, half = rate_of(target, word).tera, rate_of(target, "fp16" if "fp16" in target.precisions else "fp32").tera
    wide, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    each = _WEIGHT_BYTES[precision]
    narrow = precision in ("int8", "fp8", "fp4")
    rows: list[tuple[float, float, float, float]] = []  # us in 16 bits, in 8, bytes, elements

    def product(n: int, inner: int, outer: int) -> None:
        us = 2 * n * inner * outer / tera / 1e6
        rows.append(
            (0.0 if narrow else us, us if narrow else 0.0, 2 * n * (inner + outer) + each * inner * outer, n * outer)
        )

    for n in tokens:
        rows.append((0.0, 0.0, 4 * n * shape.dim, 0))
        product(n, shape.dim, wide + 2 * keys)
        rows.append((4 * n * n * wide / half / 1e6, 0.0, 2 * n * (2 * wide + 2 * keys), n * wide))
        product(n, wide, shape.dim)
        rows.append((0.0, 0.0, 4 * n * shape.dim, 0))
        product(n, shape.dim, 2 * shape.mlp)
        product(n, shape.mlp, shape.dim)
    product(1, shape.dim, shape.vocabulary)
    table = np.asarray(rows, np.float64)
    blocks = table[:, 3] / target.multiprocessors if target.multiprocessors else np.zeros(len(rows))
    return Load(table[:, 0], table[:, 1], table[:, 2] / target.bandwidth_gb_s.value / 1e3, blocks, np.ones(len(rows)))
