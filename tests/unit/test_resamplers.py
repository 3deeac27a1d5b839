"""Resamplers: what they refuse, and checkpoints of the models that they stand in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402 - torch first, or skip

from edgecomp import api  # noqa: E402
from edgecomp.bundle import open_bundle  # noqa: E402
from edgecomp.compressors import compressor_class  # noqa: E402
from edgecomp.errors import InvalidSpec, WeightsError  # noqa: E402
from edgecomp.specs import load_recipe  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = {"tokens": 16, "context_dim": 8, "embed_dim": 32, "num_heads": 2}


def make(method: str, budget: int, preset: str, **params: Any) -> Any:
    return compressor_class(method).from_recipe(load_recipe(method), budget, preset=preset, **params)


@pytest.mark.parametrize(
    ("method", "preset", "budget", "params", "words"),
    [
        ("resampler-2d", "qwen-vl", 9, {"tokens": 18}, "18 tokens are no square grid; 16 = 4 x 4 and 25 = 5 x 5 are"),
        ("llava-uhd", "uhd", 9, {"tokens": 18}, "llava-uhd: 18 tokens are no square grid"),
        ("llava-uhd", "uhd", 9, {"tokens": 20, "rows": 7}, "20 tokens do not fill 7 rows (params.rows=7)"),
        ("resampler-2d", "qwen-vl", 10, {}, "10 queries make no square grid; the nearest that do are 9 and 16"),
        ("resampler-2d", "qwen-vl", 9, {"queries": 16}, "budget 9 is not the 16 queries of the table"),
        ("resampler-2d", "qwen-vl", 9, {"embed_dim": 30}, "embed_dim=30 must be a multiple of 4 and of num_heads=2"),
        ("resampler-2d", "qwen-vl", 9, {"target_sizes": True}, "goes with key_places=absolute, not resized"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(
    method: str, preset: str, budget: int, params: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidSpec) as caught:
        make(method, budget, preset, **{**TINY, **params})
    assert words in str(caught.value)


def weights_of(folder: str, name: str) -> dict[str, Any]:
    tensors = load_file(GOLDEN / folder / f"{name}.safetensors")
    return {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")}


def as_qwen_vl(weights: dict[str, Any]) -> dict[str, Any]:
    """Return weights as a whole Qwen-VL names them, among tensors of its tower and language model."""
    outer = ("ln_post.weight", "ln_post.bias", "proj")
    visual = "transformer.visual."
    state = {f"{visual}{'' if key in outer else 'attn_pool.'}{key}": value for key, value in weights.items()}
    for layer in range(40):
        state[f"{visual}transformer.resblocks.{layer}.attn.in_proj.weight"] = torch.zeros(2, 2)
        state[f"transformer.h.{layer}.attn.c_attn.weight"] = torch.zeros(2, 2)
    return {**state, f"{visual}conv1.weight": torch.zeros(2, 3, 2, 2), f"{visual}ln_pre.weight": torch.zeros(2)}


def test_a_whole_qwen_vl_is_read(tmp_path: Path) -> None:
    weights = weights_of("minicpm_resampler", "q16_n64")
    save_file(as_qwen_vl(weights), tmp_path / "qwen.safetensors")
    report = api.export(
        "resampler-2d",
        weights=tmp_path / "qwen.safetensors",
        params={"tokens": 64, "num_heads": 4},
        out=tmp_path / "out",
    )
    manifest = report.manifest
    assert manifest.weights.layout == "qwen-vl"
    assert manifest.params["queries"] == 16
    assert manifest.params["context_dim"] == 40
    assert any("left out" in note and "transformer.h" in note for note in manifest.notes), manifest.notes
    assert report.parity


@pytest.mark.parametrize(("keep", "layout"), [(True, "omnilmm"), (False, "minicpm-v")])
def test_the_position_table_tells_the_layout(keep: bool, layout: str) -> None:
    weights = {f"resampler.{key}": value for key, value in weights_of("minicpm_resampler", "q16_n64").items()}
    if not keep:
        del weights["resampler.pos_embed"]
    assert compressor_class("resampler-2d").layout_of(weights) == layout


def test_heads_that_no_checkpoint_stores_are_said(tmp_path: Path) -> None:
    """A width below 128 has one head by the family's rule, and inspect says the number and the rule."""
    module = make("resampler-2d", 4, "smoke", embed_dim=96, num_heads=0)
    file = module.save(tmp_path / "own.safetensors", layout="omnilmm")
    fit = next(fit for fit in api.inspect(weights=file).fits if fit.method == "resampler-2d")
    assert not fit.problem
    (note,) = (note for note in fit.notes if "params.num_heads" in note)
    assert "params.num_heads=0 (1: one for each 128 of 96 channels, and at least one); --set it if" in note


def test_siblings_are_refused_by_name() -> None:
    weights = as_qwen_vl(weights_of("minicpm_resampler", "q16_n64"))
    with pytest.raises(WeightsError, match="layout qwen-vl, whose queries read the whole image; use resampler-2d"):
        compressor_class("llava-uhd").layout_of(weights)
    with pytest.raises(WeightsError, match=r"0 resamplers .* first keys: latents"):
        compressor_class("resampler-2d").layout_of({"latents": torch.zeros(2, 2)})


def test_target_sizes_beyond_the_table_stay_finite() -> None:
    """A graph cannot refuse a number: places behind the last one are the last."""
    module = make("resampler-2d", 4, "smoke-sizes", most_side=2, images=1)
    with torch.inference_mode():
        (latents,) = module(torch.ones(2, 20, 32), torch.tensor([[4, 5], [300, -1]], dtype=torch.int32))
    assert torch.isfinite(latents).all()


@pytest.mark.parametrize(
    ("method", "preset", "layout"),
    [
        ("resampler-2d", "smoke", "qwen-vl"),
        ("resampler-2d", "smoke", "omnilmm"),
        ("resampler-2d", "smoke-sizes", "minicpm-v"),
        ("llava-uhd", "smoke", "llava-uhd"),
    ],
)
def test_what_is_saved_as_an_original_is_read_back(method: str, preset: str, layout: str) -> None:
    module, other = (make(method, 4, preset) for _ in range(2))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    state = module.original_state(layout)
    assert type(other).layout_of(state) == layout
    assert other.load_original(state) == layout
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in other.state_dict().items())
    with pytest.raises(InvalidSpec, match="not in 'flamingo'"):
        module.original_state("flamingo")


@pytest.mark.parametrize(
    ("method", "budget", "params", "words"),
    [
        ("q-former", 9, {"latents": 4}, "budget 9 is above the 4 queries of the table"),
        ("q-former", 4, {"words": 600}, "params.words=600 is above params.positions=512"),
        ("q-former", 4, {"num_heads": 5}, "params.num_heads=5 does not divide embed_dim=32"),
        ("query-decoder", 64, {"latents": 16, "tokens": 64}, "budget 64 is above the 16 queries of the table"),
        ("query-decoder", 64, {"num_heads": 5, "tokens": 64}, "params.num_heads=5 does not divide width 32"),
    ],
)
def test_queries_that_do_not_fit_are_refused(method: str, budget: int, params: dict[str, Any], words: str) -> None:
    preset = {"q-former": "blip-2", "query-decoder": "q144"}[method]
    with pytest.raises(InvalidSpec) as caught:
        make(method, budget, preset, **{**TINY, "hidden_dim": 8, **params})
    assert words in str(caught.value)


def test_transformers_own_models_are_read() -> None:
    """Layouts as transformers saves them, with random weights, in a whole BLIP-2 and InstructBLIP."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    cases = (
        (transformers.Blip2QFormerModel, transformers.Blip2QFormerConfig, "blip-2", {}),
        (transformers.InstructBlipQFormerModel, transformers.InstructBlipQFormerConfig, "instructblip", {"words": 5}),
    )
    for model_class, config_class, layout, more in cases:
        config = config_class(**sizes, encoder_hidden_size=24, vocab_size=20, max_position_embeddings=8)
        original = model_class(config).eval()
        state = {f"qformer.{name}": value for name, value in original.state_dict().items()}
        state |= {"query_tokens": torch.randn(1, 4, 32), "vision_model.embeddings.class_embedding": torch.zeros(1)}
        cls = compressor_class("q-former")
        assert cls.layout_of(state) == layout
        given = {"prefix_tokens": 0, "num_heads": 2, **more}
        found = cls.infer_params(state, cls.parse_params(given, method="q-former"))
        assert (found["latents"], found["context_dim"], found["depth"], found["cross_every"]) == (4, 24, 2, 2)
        module = make("q-former", 4, "smoke", **{**given, **found, "tokens": 9, "mask": False})
        assert module.load_original(state) == layout
        tokens, queries = torch.randn(2, 9, 24), state["query_tokens"].expand(2, -1, -1)
        ids = torch.randint(0, 20, (2, 5)) if more else None
        with torch.inference_mode():
            if ids is None:
                expected = original(queries, encoder_hidden_states=tokens).last_hidden_state
                (got,) = module(tokens)
            else:
                real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
                mask = torch.cat([torch.ones(2, 4), real], 1).long()
                expected = original(
                    ids, attention_mask=mask, query_embeds=queries, encoder_hidden_states=tokens
                ).last_hidden_state[:, :4]
                got, _ = module(tokens, ids.int(), real)
        assert float((got - expected).abs().max()) < 1e-5


def test_a_torch_decoder_is_read() -> None:
    layer = torch.nn.TransformerDecoderLayer(32, 2, 48, 0.0, "gelu", batch_first=True, norm_first=True)
    decoder = torch.nn.TransformerDecoder(layer, 2, torch.nn.LayerNorm(32)).eval()
    state = {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
    state["queries"] = torch.randn(4, 32)
    module = make("query-decoder", 4, "smoke", context_dim=32)
    assert module.load_original(state) == type(module).layout_of(state) == "torch"
    tokens = torch.randn(2, 15, 32)
    with torch.inference_mode():
        expected = decoder(state["queries"].expand(2, -1, -1), tokens)
        assert float((module(tokens)[0] - expected).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("pixels", "first"),
    [(64, ""), (160, ""), (64, "matryoshka")],
    ids=["fewer than pixels", "more than in 64", "in a row"],
)
def test_sizes_count_the_tokens_that_the_method_reads(pixels: int, first: str, tmp_path: Path) -> None:
    """Behind a host or another method no input is the tokens; the photograph's golden is of all of them."""
    words: dict[str, Any] = {"backbone": "test_vit", "image_size": pixels, "budget": 1, "out": tmp_path / "bundle"}
    own = {"embed_dim": 32, "num_heads": 2}
    if first:
        words |= {"preset": "pooling", "between": 4, "then": "resampler-2d", "then_preset": "minicpm-v"}
        api.export(first, **words, then_params=own)
    else:
        api.export("resampler-2d", preset="minicpm-v", params=own, **words)
    (bucket,) = open_bundle(tmp_path / "bundle").manifest.buckets
    (sizes,) = [spec for spec in bucket.inputs if spec.kind == "sizes"]
    assert sizes.tokens == (4 if first else (pixels // 16) ** 2)
    golden = load_file(tmp_path / "bundle" / "golden.safetensors")
    (full,) = [value for name, value in golden.items() if "photo" in name and name.endswith("target_sizes")]
    assert int(full.prod()) == sizes.tokens
