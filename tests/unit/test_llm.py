"""What fewer visual tokens save in a language model: against AIM's published totals, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgecomp.errors import InvalidSpec, UnknownName
from edgecomp.estimates.llm import (
    SHAPES,
    layer_flops,
    load_shape,
    merging_flops,
    parse_schedule,
    prefill,
    pruning_flops,
    tokens_by_layer,
)
from edgecomp.specs import load_target

QWEN, LLAMA, THOR = SHAPES["qwen2-7b"], SHAPES["llama-7b"], load_target("thor-t5000")
CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}


def config(folder: Path, **changes: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({**CONFIG, **changes}), encoding="utf-8")
    return str(path)


def test_a_layer_is_the_formula_of_grouped_keys() -> None:
    """2 n d^2 (1 + g) + 2 n^2 d + 3 n d m multiply-adds, with g = H_kv / H."""
    n, d, m, g = 1668, 3584, 18944, 4 / 28
    assert layer_flops(QWEN, n) == pytest.approx(2 * (2 * n * d**2 * (1 + g) + 2 * n**2 * d + 3 * n * d * m), rel=1e-12)


def test_parameters_are_those_of_the_models() -> None:
    billions = {name: round(shape.parameters / 1e9, 2) for name, shape in SHAPES.items()}
    known = {"llama-7b": 6.74, "llama-13b": 13.02, "llama-3.1-8b": 8.03, "qwen2-7b": 7.62, "qwen3-8b": 8.19}
    assert {name: billions[name] for name in known} == known


def test_aim_on_32_frames_is_14_8_percent_of_the_prefill() -> None:
    """Published: 14.8 % of the base, 1568 -> 1372, ..., 196, 0 visual tokens from layer 14 of 28 on."""
    base = prefill(QWEN, THOR, visual=32 * 196, text=100)
    cut = prefill(QWEN, THOR, visual=32 * 49, text=100, schedule="aim")
    assert [count - 100 for count in cut.tokens[13:23]] == [1568, 1372, 1176, 980, 784, 588, 392, 196, 0, 0]
    assert cut.flops / base.flops == pytest.approx(0.148, abs=0.0005)
    assert cut.overhead_flops == 4_179_420_464


def test_aim_states_what_its_own_steps_cost() -> None:
    """Published with its code: 88.25 + 4.18 GFLOP for 32 frames in Qwen2, 0.2271 + 0.0283 for LLaVA-1.5's image."""
    assert merging_flops(196 * 32, 3584, rounds=2) == 88_251_957_248
    assert pruning_flops(QWEN, 49 * 32, 100, parse_schedule("aim", layers=28)) == 4_179_420_464
    assert merging_flops(576, 1024, rounds=3) == 227_082_240
    assert pruning_flops(LLAMA, 72, 40, parse_schedule("aim", layers=32)) == 28_326_788


def test_schedules() -> None:
    assert parse_schedule("", layers=3) == (1, 1, 1)
    assert parse_schedule("1:0.5,2:0", layers=4) == (1, 0.5, 0, 0)
    assert parse_schedule("fastv", layers=32) == (1.0,) * 2 + (0.5,) * 30
    drop = parse_schedule("pyramiddrop", layers=32)
    assert [drop.count(share) for share in (1.0, 0.5, 0.25, 0.125)] == [8, 8, 8, 8]
    assert parse_schedule("aim", layers=32)[12:15] == (1.0, 0.875, 0.75)
    assert tokens_by_layer(49, 7, (1.0, 0.29)) == (56, 21)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("half", r"'half' is no LAYER:SHARE.*fastv, pyramiddrop or aim"),
        ("2:x", "'2:x' is no LAYER:SHARE"),
        ("2", "'2' is no LAYER:SHARE"),
        ("28:0.5", "layer 28 is not one of the 28 layers, 0 to 27"),
        ("-1:0.5", "layer -1"),
        ("2:1.5", r"share 1\.5 is not between 0 and 1"),
        ("2:nan", "share nan is not between 0 and 1"),
        ("4:0.5,2:0.2", "layer 2 comes after layer 4"),
        ("2:0.5,4:0.7", r"share 0\.7 is more than the 0\.5 before it"),
    ],
)
def test_a_schedule_that_is_none_is_named(text: str, told: str) -> None:
    with pytest.raises(InvalidSpec, match=told):
        parse_schedule(text, layers=28)


def test_the_cache_holds_what_reached_each_layer() -> None:
    made = prefill(QWEN, THOR, visual=100, text=10, schedule="14:0.5")
    assert made.kv_bytes == (14 * 110 + 14 * 60) * 2 * 4 * 128 * 2
    assert (sum(made.flops_by_layer), len(made.flops_by_layer)) == (made.flops, 28)
    assert made.low_us < made.mid_us < made.high_us


def test_a_short_prompt_is_bound_by_its_weights() -> None:
    """Reading 7.6 billion weights at 273 GB/s is a floor, which 4 bits lower."""
    wide, narrow = (prefill(QWEN, THOR, visual=0, text=1, precision=word).mid_us for word in ("fp16", "fp4"))
    floor = 2 * (QWEN.parameters - QWEN.vocabulary * QWEN.dim) / 273e9 * 1e6
    assert floor < wide < 3 * floor
    assert narrow < 0.5 * wide


@pytest.mark.parametrize(
    ("visual", "text", "told"),
    [(-1, 5, "--visual-tokens -1"), (5, 1 << 23, "--text-tokens 8388608"), (0, 0, "leaves a layer without tokens")],
)
def test_tokens_out_of_range(visual: int, text: int, told: str) -> None:
    with pytest.raises(InvalidSpec, match=told):
        prefill(QWEN, THOR, visual=visual, text=text)


def test_a_schedule_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(InvalidSpec, match="leaves a layer without tokens"):
        prefill(QWEN, THOR, visual=100, text=0, schedule="aim")


def test_a_config_of_ones_own(tmp_path: Path) -> None:
    shape = load_shape(config(tmp_path))
    assert (shape.layers, shape.kv_heads, shape.head_dim, shape.name) == (28, 4, 128, "qwen2")
    assert prefill(shape, THOR, visual=50, text=5).flops == prefill(QWEN, THOR, visual=50, text=5).flops
    nested = tmp_path / "nested.json"
    nested.write_text(json.dumps({"model_type": "llava", "text_config": {**CONFIG, "head_dim": 64}}), encoding="utf-8")
    assert load_shape(str(nested)).head_dim == 64
    for unused in ({"sliding_window": 131072, "use_sliding_window": False}, {"sliding_window": 131072}):
        assert load_shape(config(tmp_path, hidden_act="silu", **unused)) == shape
    assert load_shape(config(tmp_path, model_type="mistral", sliding_window=None)).name == "mistral"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_size": None}, r"hidden_size is None and must be a positive integer.*this one has hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"intermediate_size": "18944"}, "intermediate_size is '18944'"),
        ({"vocab_size": 1 << 40}, "vocab_size is 1099511627776"),
        ({"num_key_value_heads": 3}, "28 heads cannot share 3 key heads"),
        ({"num_experts": 64}, "num_experts = 64: a mixture of experts"),
        ({"num_hidden_layers": 16_000_000}, "num_hidden_layers is 16000000 and at most 1000"),
        ({"hidden_size": 3585}, "hidden_size 3585 is no multiple of 28 heads, and head_dim is not said"),
        *(
            (
                {"model_type": kind},
                f"is of model_type '{kind}', whose layers are not modelled; known are llama, mistral",
            )
            for kind in ("starcoder2", "bert", "clip_text_model", "phi", "gemma3_text", "deepseek_v2")
        ),
        ({"model_type": None}, "is of model_type 'missing'"),
        ({"kv_lora_rank": 512}, "kv_lora_rank = 512: latent attention"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window = 4096 in use"),
        ({"sliding_window": 4096, "use_sliding_window": True}, "sliding_window = 4096 in use"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window = None in use"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'; only a gated MLP of silu"),
    ],
)
def test_a_config_that_cannot_be_used_is_named(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidSpec, match=told):
        load_shape(config(tmp_path, **changes))


@pytest.mark.parametrize(
    ("content", "told"), [(b"{", "is not JSON"), (b"[1]", "holds no object"), (b"\xff", "is not JSON")]
)
def test_a_damaged_config(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InvalidSpec, match=told):
        load_shape(str(path))


def test_names_that_there_are_not(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="no language model 'qwen2-8b'; did you mean 'qwen3-8b'"):
        load_shape("qwen2-8b")
    with pytest.raises(InvalidSpec, match="cannot be read: No such file"):
        load_shape(str(tmp_path / "gone.json"))
