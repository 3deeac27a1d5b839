"""Whole models as transformers saves them in shards: recognised, read in part, equal to transformers' own module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import edgecomp  # noqa: E402 - torch first, or skip
from edgecomp import api  # noqa: E402
from edgecomp.errors import WeightsError  # noqa: E402

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
ROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3], "rope_type": "default"}}
QFORMER = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "encoder_hidden_size": 32, "vocab_size": 64,
}  # fmt: skip
OPT = {
    "model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 64, "word_embed_proj_dim": 32,
}  # fmt: skip


class Case(NamedTuple):
    """A model, what it is recognised as, and what transformers' own module makes of tokens.

    Attributes:
        model, config: names of the classes, and the configuration's values.
        words: for `edgecomp.compressor`.
        tokens: how many go in.
        original: takes the model and tokens (B, N, 32).
    """

    model: str
    config: str
    values: dict[str, Any]
    method: str
    layout: str
    prefix: str
    words: dict[str, Any]
    tokens: int
    original: Callable[[Any, Any], Any]


def _idefics2(model: Any, tokens: Any) -> Any:
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
    return model.model.connector(tokens, mask)


def _blip2(model: Any, tokens: Any) -> Any:
    queries = model.query_tokens.expand(len(tokens), -1, -1)
    seen = model.qformer(query_embeds=queries, encoder_hidden_states=tokens, return_dict=True)
    return model.language_projection(seen.last_hidden_state)


def _internvl(model: Any, tokens: Any) -> Any:
    side = int(tokens.shape[1] ** 0.5)
    planes = model.model.pixel_shuffle(tokens.reshape(len(tokens), side, side, -1), scale_factor=0.5)
    return model.model.multi_modal_projector(planes.flatten(1, 2))


CASES = {
    "idefics1": Case(
        "IdeficsForVisionText2Text", "IdeficsConfig",
        {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
         "use_resampler": True, "cross_layer_interval": 1,
         "vision_config": {"embed_dim": 32, **{key: VISION[key] for key in VISION if key != "hidden_size"}},
         "perceiver_config": {"use_resampler": True, "resampler_n_latents": 16, "resampler_depth": 2,
                              "resampler_n_heads": 2, "resampler_head_dim": 8}},
        "perceiver", "idefics1", "model.perceiver_resampler.", {}, 20,
        lambda model, tokens: model.model.perceiver_resampler(tokens),
    ),
    "idefics2": Case(
        "Idefics2ForConditionalGeneration", "Idefics2Config",
        {"vision_config": VISION, "text_config": {"model_type": "mistral", **TEXT}, "image_token_id": 3,
         "perceiver_config": {"hidden_size": 32, "resampler_n_latents": 16, "resampler_depth": 2,
                              "resampler_n_heads": 4, "resampler_head_dim": 8, "num_key_value_heads": 2}},
        "perceiver", "idefics2", "model.connector.", {}, 20, _idefics2,
    ),
    "blip2": Case(
        "Blip2ForConditionalGeneration", "Blip2Config",
        {"vision_config": VISION, "qformer_config": QFORMER, "text_config": OPT, "num_query_tokens": 8},
        "q-former", "blip-2", "", {"prefix_tokens": 0, "queries": 8}, 20, _blip2,
    ),
    "internvl": Case(
        "InternVLForConditionalGeneration", "InternVLConfig",
        {"vision_config": {**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
         "text_config": {"model_type": "qwen2", **TEXT}},
        "pixel-shuffle", "internvl", "multi_modal_projector.", {}, 16, _internvl,
    ),
    "idefics3": Case(
        "Idefics3ForConditionalGeneration", "Idefics3Config",
        {"vision_config": VISION, "text_config": {"model_type": "llama", **TEXT}, "scale_factor": 2},
        "pixel-shuffle", "idefics3", "model.connector.", {}, 16,
        lambda model, tokens: model.model.connector(tokens),
    ),
    "smolvlm": Case(
        "SmolVLMForConditionalGeneration", "SmolVLMConfig",
        {"vision_config": VISION, "text_config": {"model_type": "llama", **TEXT}, "scale_factor": 4},
        "pixel-shuffle", "idefics3", "model.connector.", {}, 16,
        lambda model, tokens: model.model.connector(tokens),
    ),
    "qwen2-vl": Case(
        "Qwen2VLForConditionalGeneration", "Qwen2VLConfig",
        {"vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2,
                           "patch_size": 8}, "text_config": {**TEXT, **ROPE}},
        "pixel-shuffle", "qwen2-vl", "visual.merger.", {"order": "grouped"}, 16,
        lambda model, tokens: torch.stack([model.model.visual.merger(sample) for sample in tokens]),
    ),
    "qwen2.5-vl": Case(
        "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig",
        {"vision_config": {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2,
                           "intermediate_size": 48, "patch_size": 8, "fullatt_block_indexes": [1]},
         "text_config": {**TEXT, **ROPE}},
        "pixel-shuffle", "qwen2.5-vl", "visual.merger.", {"order": "grouped"}, 16,
        lambda model, tokens: torch.stack([model.model.visual.merger(sample) for sample in tokens]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_a_whole_model_of_transformers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    if not hasattr(transformers, case.model):
        pytest.skip(f"transformers {transformers.__version__} has no {case.model}")
    torch.manual_seed(0)
    model = getattr(transformers, case.model)(getattr(transformers, case.config)(**case.values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2

    asked = {key: value for key, value in case.words.items() if key != "queries"}
    contents: Any = api.inspect(weights=tmp_path, params=asked)
    (fit,) = contents.fits
    assert (fit.method, fit.layout, fit.prefix) == (case.method, case.layout, case.prefix)
    assert fit.tensors + fit.foreign == contents.tensors
    assert fit.unknown == ()

    module = edgecomp.compressor(case.method, weights=tmp_path, tokens=case.tokens, **case.words).eval()
    tokens = torch.randn(2, case.tokens, 32)
    with torch.inference_mode():
        expected = case.original(model, tokens)
        (got,) = module(tokens)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_a_model_without_a_compressor_is_refused(tmp_path: Path) -> None:
    """A language model has thousands of keys and none of a compressor's; the text says whose they are."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert not api.inspect(weights=tmp_path)
    with pytest.raises(WeightsError, match=r"none of the layouts of perceiver .* first keys of \d+: "):
        edgecomp.compressor("perceiver", weights=tmp_path)
