"""Whole models as transformers saves them in shards: recognised, read in part, equal to transformers' own module.

And back: what is saved in the layout has the very names and shapes of transformers' class, and gives what it gave.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

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
        model, config, values: names of the classes, and the configuration's values.
        layout, prefix: of the file that transformers saves.
        words: for `edgecomp.compressor`.
        given: shape of what goes in, but for the batch: tokens, or an image.
        inner: prefix of the part in the class's own names, which since transformers 5 are not the file's.
        original: takes the model and what goes in.
        own_layout: whose names the class has, where the file's are others.
        beside: names of the class that the part does not hold.
    """

    model: str
    config: str
    values: dict[str, Any]
    method: str
    layout: str
    prefix: str
    words: dict[str, Any]
    given: tuple[int, ...]
    inner: str
    original: Callable[[Any, Any], Any]
    own_layout: str = ""
    beside: tuple[str, ...] = ()


def _idefics2(model: Any, tokens: Any) -> Any:
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
    return model.model.connector(tokens, mask)


def _blip2(model: Any, tokens: Any) -> Any:
    queries = model.query_tokens.expand(len(tokens), -1, -1)
    seen = model.qformer(query_embeds=queries, encoder_hidden_states=tokens, return_dict=True)
    return model.language_projection(seen.last_hidden_state)


WORDS = torch.tensor([[3, 9, 4, 1, 1], [7, 2, 5, 6, 8]])
IS_WORD = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)


def _text(case: Case) -> tuple[Any, ...]:
    return (WORDS.to(torch.int32), IS_WORD) if case.words.get("words") else ()


def _instructblip(model: Any, tokens: Any) -> Any:
    queries = model.query_tokens.expand(len(tokens), -1, -1)
    mask = torch.cat([torch.ones(queries.shape[:2], dtype=torch.bool), IS_WORD], dim=1)
    seen = model.qformer(
        input_ids=WORDS, attention_mask=mask, query_embeds=queries, encoder_hidden_states=tokens, return_dict=True
    )
    return model.language_projection(seen.last_hidden_state[:, : queries.shape[1]])


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
        "perceiver", "idefics1", "model.perceiver_resampler.", {}, (20, 32),
        "model.perceiver_resampler.",
        lambda model, tokens: model.model.perceiver_resampler(tokens),
    ),
    "idefics2": Case(
        "Idefics2ForConditionalGeneration", "Idefics2Config",
        {"vision_config": VISION, "text_config": {"model_type": "mistral", **TEXT}, "image_token_id": 3,
         "perceiver_config": {"hidden_size": 32, "resampler_n_latents": 16, "resampler_depth": 2,
                              "resampler_n_heads": 4, "resampler_head_dim": 8, "num_key_value_heads": 2}},
        "perceiver", "idefics2", "model.connector.", {}, (20, 32), "model.connector.", _idefics2,
    ),
    "blip2": Case(
        "Blip2ForConditionalGeneration", "Blip2Config",
        {"vision_config": VISION, "qformer_config": QFORMER, "text_config": OPT, "num_query_tokens": 8},
        "q-former", "blip-2", "", {"prefix_tokens": 0, "queries": 8}, (20, 32), "", _blip2,
        beside=("vision_model.", "language_model."),
    ),
    "internvl": Case(
        "InternVLForConditionalGeneration", "InternVLConfig",
        {"vision_config": {**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
         "text_config": {"model_type": "qwen2", **TEXT}},
        "pixel-shuffle", "internvl", "multi_modal_projector.", {}, (16, 32),
        "model.multi_modal_projector.", _internvl,
    ),
    "idefics3": Case(
        "Idefics3ForConditionalGeneration", "Idefics3Config",
        {"vision_config": VISION, "text_config": {"model_type": "llama", **TEXT}, "scale_factor": 2},
        "pixel-shuffle", "idefics3", "model.connector.", {}, (16, 32), "model.connector.",
        lambda model, tokens: model.model.connector(tokens),
    ),
    "smolvlm": Case(
        "SmolVLMForConditionalGeneration", "SmolVLMConfig",
        {"vision_config": VISION, "text_config": {"model_type": "llama", **TEXT}, "scale_factor": 4},
        "pixel-shuffle", "idefics3", "model.connector.", {"queries": 1}, (16, 32), "model.connector.",
        lambda model, tokens: model.model.connector(tokens),
    ),
    "qwen2-vl": Case(
        "Qwen2VLForConditionalGeneration", "Qwen2VLConfig",
        {"vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2,
                           "patch_size": 8}, "text_config": {**TEXT, **ROPE}},
        "pixel-shuffle", "qwen2-vl", "visual.merger.", {"order": "grouped"}, (16, 32), "model.visual.merger.",
        lambda model, tokens: torch.stack([model.model.visual.merger(sample) for sample in tokens]),
    ),
    "qwen2.5-vl": Case(
        "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig",
        {"vision_config": {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2,
                           "intermediate_size": 48, "patch_size": 8, "fullatt_block_indexes": [1]},
         "text_config": {**TEXT, **ROPE}},
        "pixel-shuffle", "qwen2.5-vl", "visual.merger.", {"order": "grouped"}, (16, 32), "model.visual.merger.",
        lambda model, tokens: torch.stack([model.model.visual.merger(sample) for sample in tokens]),
    ),
    "instructblip": Case(
        "InstructBlipForConditionalGeneration", "InstructBlipConfig",
        {"vision_config": VISION, "qformer_config": {**QFORMER, "max_position_embeddings": 16}, "text_config": OPT,
         "num_query_tokens": 8},
        "q-former", "instructblip", "", {"num_heads": 2, "prefix_tokens": 0, "queries": 8, "words": 5}, (20, 32), "",
        _instructblip, beside=("vision_model.", "language_model."),
    ),
    "llava": Case(
        "LlavaForConditionalGeneration", "LlavaConfig",
        {"vision_config": {"model_type": "clip_vision_model", **VISION},
         "text_config": {"model_type": "llama", **TEXT}},
        "matryoshka", "llava-hf", "", {}, (16, 32), "model.",
        lambda model, tokens: model.model.multi_modal_projector(tokens),
        beside=("model.vision_tower.", "model.language_model."),
    ),
    "unlimited-ocr": Case(
        "UnlimitedOcrForConditionalGeneration", "UnlimitedOcrConfig",
        {"vision_config": {
            "sam_config": {"hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
                           "image_size": 128, "patch_size": 16, "window_size": 3, "global_attn_indexes": [1],
                           "mlp_dim": 32, "downsample_channels": [12, 16]},
            "encoder_config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                               "num_attention_heads": 2, "image_size": 28, "patch_size": 14}},
         "text_config": {**TEXT, "moe_intermediate_size": 16, "n_routed_experts": 2, "num_experts_per_tok": 1,
                         "n_shared_experts": 1}},
        "deepseek-ocr", "deepseek", "model.", {"preset": "smoke", "image_size": 128}, (3, 128, 128), "model.",
        lambda model, image: torch.stack(list(model.model.get_image_features(image).pooler_output)),
        own_layout="transformers", beside=("model.language_model.",),
    ),
    "fast-vlm": Case(
        "FastVlmForConditionalGeneration", "FastVlmConfig",
        {"vision_config": {"model_type": "timm_wrapper", "architecture": "fastvit_mci3", "hidden_size": 64,
                           "do_pooling": True, "model_args": {
                               "inference_mode": True, "layers": [1, 1, 1, 1, 1], "embed_dims": [8, 8, 16, 32, 32],
                               "mlp_ratios": [2, 2, 2, 2, 2]}},
         "text_config": {"model_type": "qwen2", **TEXT}},
        "fastvlm", "timm", "model.", {"preset": "smoke", "head_dim": 32, "image_size": 128}, (3, 128, 128), "model.",
        lambda model, image: model.model.get_image_features(image).pooler_output,
        beside=("model.language_model.",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_a_whole_model_of_transformers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    if not hasattr(transformers, case.model):
        pytest.skip(f"transformers {transformers.__version__} has no {case.model}")
    model, other = (_make(case, seed) for seed in (0, 1))
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2

    asked = {key: value for key, value in case.words.items() if key not in ("queries", "image_size", "preset")}
    fit = _fit(case, tmp_path, asked)
    assert (fit.layout, fit.prefix) == (case.layout, case.prefix)

    sizes = {} if "image_size" in case.words else {"tokens": case.given[0]}
    module = edgecomp.compressor(case.method, weights=tmp_path, **sizes, **_budget(case), **case.words).eval()
    given = torch.randn(2, *case.given)
    with torch.inference_mode():
        expected = case.original(model, given)
        got = module(given, *_text(case))[0]
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)

    layout = case.own_layout or case.layout
    module.save(tmp_path / "part.st.safetensors", layout=layout)
    part = {f"{case.inner}{key}": value for key, value in load_file(tmp_path / "part.st.safetensors").items()}
    names = {
        key for key in model.state_dict() if key.startswith(case.inner) and not key.startswith(OTHERS + case.beside)
    }
    assert part.keys() == names
    other.load_state_dict({**other.state_dict(), **part}, strict=True)
    with torch.inference_mode():
        torch.testing.assert_close(case.original(other, given), expected, atol=2e-5, rtol=1e-4)

    save_file({key: value.clone() for key, value in model.state_dict().items()}, tmp_path / "own.safetensors")
    fit = _fit(case, tmp_path / "own.safetensors", asked)
    assert (fit.layout, fit.prefix) == (layout, case.inner)


#: Of every class: what stands in front of or behind all parts.
OTHERS = ("lm_head.", "model.text_model.")


@pytest.mark.parametrize(("name", "key"), [("llava", ""), ("fast-vlm", ""), ("unlimited-ocr", "encoder_config")])
@pytest.mark.filterwarnings("ignore")
def test_what_transformers_computes_otherwise_is_refused(name: str, key: str, tmp_path: Path) -> None:
    case = CASES[name]
    if not hasattr(transformers, case.model):
        pytest.skip(f"transformers {transformers.__version__} has no {case.model}")
    values: dict[str, Any] = copy.deepcopy(case.values)
    if key:
        values["vision_config"][key] |= {"hidden_act": "relu", "num_attention_heads": 4}
    else:
        values["projector_hidden_act"] = "relu"
    _make(case._replace(values=values), 0).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"config\.json says [\w.]+_act='relu', and .* computes with '\w*gelu'"):
        edgecomp.compressor(case.method, weights=tmp_path, **_budget(case), **case.words)


@pytest.mark.filterwarnings("ignore")
def test_heads_of_a_folder_of_transformers(tmp_path: Path) -> None:
    """Another count than the preset's; the names of the file are DeepSeek's, its config.json is transformers'."""
    case = CASES["unlimited-ocr"]
    if not hasattr(transformers, case.model):
        pytest.skip(f"transformers {transformers.__version__} has no {case.model}")
    values: dict[str, Any] = copy.deepcopy(case.values)
    values["vision_config"]["encoder_config"]["num_attention_heads"] = 4
    model = _make(case._replace(values=values), 0)
    model.save_pretrained(tmp_path)
    module = edgecomp.compressor(case.method, weights=tmp_path, **case.words).eval()
    assert module.params.clip_heads == 4
    given = torch.randn(1, *case.given)
    with torch.inference_mode():
        torch.testing.assert_close(module(given)[0], case.original(model, given), atol=2e-5, rtol=1e-4)


def _make(case: Case, seed: int) -> Any:
    """Make a model with random weights, also where transformers begins with zeros, and statistics of a training."""
    torch.manual_seed(seed)
    model = getattr(transformers, case.model)(getattr(transformers, case.config)(**case.values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for key, value in model.named_buffers():
            if key.endswith(("running_mean", "running_var")):
                value.add_(0.3 * torch.rand_like(value))
    return model


def _fit(case: Case, path: Path, asked: dict[str, Any]) -> Any:
    """Return what `inspect --weights` says first, which leaves no key of the part over."""
    contents: Any = api.inspect(weights=path, params=asked)
    fit = contents.fits[0]
    assert fit.method == case.method
    assert fit.tensors + fit.foreign == contents.tensors
    assert fit.unknown == ()
    return fit


def _budget(case: Case) -> dict[str, int]:
    """Return the tokens kept, where the method does not take them from the weights."""
    return {"queries": case.given[0]} if case.method == "matryoshka" else {}


def test_a_model_without_a_compressor_is_refused(tmp_path: Path) -> None:
    """A language model has thousands of keys and none of a compressor's; the text says whose they are."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert not api.inspect(weights=tmp_path)
    with pytest.raises(WeightsError, match=r"none of the layouts of perceiver .* first keys of \d+: "):
        edgecomp.compressor("perceiver", weights=tmp_path)
