"""What is refused, or read, beside the tensors of a whole model: half of it, its config.json, what headers say."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402 - torch first, or skip

import edgecomp  # noqa: E402
from edgecomp import api  # noqa: E402
from edgecomp.checkpoint import path_digest  # noqa: E402
from edgecomp.compressors import compressor_class  # noqa: E402
from edgecomp.compressors._checkpoint import Checkpoint, spell_missing  # noqa: E402
from edgecomp.compressors._declared import read_declared  # noqa: E402
from edgecomp.compressors._recognise import recognise  # noqa: E402
from edgecomp.errors import InvalidSpec, WeightsError  # noqa: E402
from edgecomp.report.contents import describe_contents  # noqa: E402
from edgecomp.specs import load_recipe  # noqa: E402
from edgecomp.specs.layout import Layout, _expand_all, best_match  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name: str) -> dict[str, torch.Tensor]:
    tensors = load_file(GOLDEN / name)
    return {key.removeprefix("weight."): value for key, value in tensors.items() if key.startswith("weight.")}


def idefics1() -> dict[str, torch.Tensor]:
    state = golden("perceiver_idefics1/n50.safetensors")
    return state | {"latents": torch.cat([state["latents"], state["latents"].flip(0)])}


def keys_of(layout: Layout, *, optional: bool = False) -> list[str]:
    """Return one key for each pattern, of module 0 of each list."""
    patterns = (*layout.keys, *layout.optional) if optional else layout.keys
    return [".".join("0" if word == "*" else word for word in words) for words in _expand_all(patterns)]


def write(path: Path, keys: Iterable[str]) -> Path:
    save_file({key: torch.zeros(1) for key in keys}, path)
    return path


def refusal(method: str, path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        recognise(load_recipe(method), compressor_class(method), Checkpoint(path).stored)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- half of a whole model ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "form", "lost"),
    [
        ("perceiver", 4, "modality_projection.up_proj.weight"),
        ("deepseek-ocr", 1, "multi_modal_projector.weight"),
        ("fastvlm", 0, "mm_projector.0.weight"),
        ("fastvlm", 2, "multi_modal_projector.linear_1.weight"),
    ],
)
def test_a_whole_model_that_lacks_a_key_is_no_smaller_form(method: str, form: int, lost: str, tmp_path: Path) -> None:
    layout = load_recipe(method).layouts[form]
    keys = [f"model.{key}" for key in keys_of(layout)]
    assert f"model.{lost}" in keys
    path = write(tmp_path / "x.safetensors", [key for key in keys if key != f"model.{lost}"] + ["lm_head.weight"])
    text = refusal(method, path)
    assert f"holds the layout {layout.name} of {method} in part: 1 missing: model.{lost}" in text


@pytest.mark.parametrize(
    ("method", "form", "stranger"),
    [
        ("perceiver", 4, "modality_projection.gate_proj.weight.absmax"),
        ("perceiver", 4, "modality_projection.gate_proj.lora_A.weight"),
        ("q-former", 0, "language_projection.lora_A.weight"),
        ("q-former", 1, "my_head.weight"),
        ("deepseek-ocr", 1, "my.weight"),
        ("fastvlm", 0, "mm_projector.norm.weight"),
        ("fastvlm", 2, "multi_modal_projector.linear_3.weight"),
    ],
)
def test_a_stranger_makes_a_whole_model_no_smaller_form(method: str, form: int, stranger: str, tmp_path: Path) -> None:
    """What the smaller form would leave out (a projection, the query tokens) is a part of the model all the same."""
    layout = load_recipe(method).layouts[form]
    keys = [*(f"model.{key}" for key in keys_of(layout)), "lm_head.weight"]
    whole = recognise(
        load_recipe(method), compressor_class(method), Checkpoint(write(tmp_path / "w.safetensors", keys)).stored
    )
    assert whole is not None
    assert whole.layout == layout
    text = refusal(method, write(tmp_path / "x.safetensors", [*keys, f"model.{stranger}"]))
    assert f"in the layout {layout.name} of {method} below 'model.', with 1 not known: model.{stranger}. Leave" in text


@pytest.mark.parametrize(
    ("lost", "told"),
    [("projector.layers.weight", "projector.layers.weight"), ("image_newline", r"newline \(by edgecomp's name\)")],
)
def test_what_stands_behind_deepseeks_encoder_is_there_whole_or_not_at_all(lost: str, told: str) -> None:
    cls = compressor_class("deepseek-ocr")
    keys = keys_of(load_recipe("deepseek-ocr").layouts[0], optional=True)
    state = {key: torch.zeros(1, 1, 1, 1) for key in keys if key != lost}
    with pytest.raises(WeightsError, match=f"lack {told}, and hold what belongs to it"):
        cls.infer_params(state, cls.Params())


def test_forms_of_one_copy_are_not_counted_as_copies(tmp_path: Path) -> None:
    keys = keys_of(load_recipe("perceiver").layouts[4])
    copies = [f"{who}.model.connector.{key}" for who in ("student", "teacher") for key in keys]
    assert "holds the layout idefics2 2 times" in refusal("perceiver", write(tmp_path / "x.safetensors", copies))


# -- whose keys -----------------------------------------------------------------------------------------------


def test_a_part_of_a_model_may_be_called_compressor(tmp_path: Path) -> None:
    own = {f"compressor.resampler.{key}": value for key, value in idefics1().items()}
    broken = {"backbone.layers.0.weight": torch.full((2,), torch.nan), "language_model.norm": torch.zeros(2)}
    save_file(own | broken, tmp_path / "x.safetensors")
    module = edgecomp.compressor("perceiver", weights=tmp_path / "x.safetensors", tokens=50, head_dim=16)
    assert torch.equal(module.latents, idefics1()["latents"])


def test_a_part_of_edgecomps_own_with_strangers_says_which(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", ["compressor.latents", "backbone.cls_token", "spare.weight"])
    with pytest.raises(WeightsError, match=r"1 of neither: spare\.weight"):
        edgecomp.compressor("perceiver", weights=path)


def test_what_blip2_keeps_for_retrieval_is_another_models(tmp_path: Path) -> None:
    recipe = load_recipe("q-former")
    more = ["embeddings.word_embeddings.weight", "itm_head.bias", "text_projection.weight", "vision_projection.bias",
            "qformer.encoder.layer.0.intermediate.dense.weight"]  # fmt: skip
    path = write(tmp_path / "x.safetensors", [*keys_of(recipe.layouts[0]), *more])
    match = recognise(recipe, compressor_class("q-former"), Checkpoint(path).stored)
    assert match is not None
    assert sorted(match.foreign) == sorted(more)


def test_towers_of_video_llava_are_another_models(tmp_path: Path) -> None:
    recipe = load_recipe("matryoshka")
    towers = ["image_tower.encoder.layers.0.mlp.fc1.weight", "video_tower.encoder.layers.0.mlp.fc1.weight"]
    path = write(tmp_path / "x.safetensors", [*keys_of(recipe.layouts[1]), *towers])
    match = recognise(recipe, compressor_class("matryoshka"), Checkpoint(path).stored)
    assert match is not None
    assert sorted(match.foreign) == towers


@pytest.mark.parametrize(
    ("method", "keys", "texts"),
    [
        ("resampler-2d", ["multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_1.bias"],
         ("in none of the layouts of resampler-2d", "nearest is minicpm-v, which needs {query,proj}, ", "Convert")),
        ("pixel-shuffle", ["visual.merger.proj.x"], ("the nearest is internvl, which needs {layer_norm,",)),
    ],
)  # fmt: skip
def test_where_no_key_answers_the_closest_layout_is_named(
    method: str, keys: Sequence[str], texts: Sequence[str], tmp_path: Path
) -> None:
    text = refusal(method, write(tmp_path / "x.safetensors", keys))
    for words in texts:
        assert words in text, text


@pytest.mark.parametrize("method", ["tome", "evit", "dtem", "vist"])
def test_methods_without_layouts_name_the_method_of_a_file_too(method: str, tmp_path: Path) -> None:
    save_file(idefics1(), tmp_path / "x.safetensors")
    assert "It is a checkpoint of perceiver: give --method perceiver" in refusal(method, tmp_path / "x.safetensors")


def test_what_a_class_alone_knows_is_not_another_methods(tmp_path: Path) -> None:
    """slice-wise takes its inner method's layouts, query-decoder torch's own decoder; neither recipe declares one."""
    layer = torch.nn.TransformerDecoderLayer(16, 2, 32)
    decoder = {f"decoder.{key}": value for key, value in torch.nn.TransformerDecoder(layer, 1).state_dict().items()}
    for method, state in (
        ("slice-wise", idefics1()),
        ("query-decoder", decoder | {"queries": torch.zeros(4, 16)}),
        ("evit", golden("evit/keep70_fuse.safetensors")),
    ):
        path = tmp_path / f"{method}.safetensors"
        save_file(state, path)
        assert recognise(load_recipe(method), compressor_class(method), Checkpoint(path).stored) is None


def test_a_missing_key_is_spelt_as_the_file_would() -> None:
    spelt = {
        "layers.0.ff.fc1.weight": "blocks.0.1.fc.weight",
        "norm.weight": "layer_norm.weight",
        "layers.1.ff.norm.bias": "blocks.1.1.ln.bias",
    }
    for own, told in (
        ("layers.1.ff.fc1.weight", "blocks.1.1.fc.weight"),
        ("layers.0.ff.norm.bias", "blocks.0.1.ln.bias"),
        ("norm.bias", "layer_norm.bias"),
        ("latents", "latents (by edgecomp's name)"),
    ):
        assert spell_missing(own, spelt) == told


# -- config.json beside the weights -----------------------------------------------------------------------------


def write_with_config(folder: Path, state: dict[str, torch.Tensor], config: Any) -> Path:
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_config_beside_the_weights_tells_what_no_tensor_stores(tmp_path: Path) -> None:
    config = {"perceiver_config": {"resampler_head_dim": 8}}
    folder = write_with_config(tmp_path, {f"model.p.{key}": value for key, value in idefics1().items()}, config)
    module = edgecomp.compressor("perceiver", weights=folder, tokens=50)
    assert (module.params.head_dim, module.params.num_heads) == (8, 4)
    (fit,) = api.inspect(weights=folder).fits
    assert fit.params["head_dim"] == 8
    assert "config.json beside the weights says params.head_dim=8 (perceiver_config.resampler_head_dim)" in fit.notes
    with pytest.raises(InvalidSpec, match=r"head_dim=16 was set, and config\.json beside the weights says 8"):
        edgecomp.compressor("perceiver", weights=folder, tokens=50, head_dim=16)

    before = path_digest(folder)
    (folder / "config.json").write_text(json.dumps({"perceiver_config": {"resampler_head_dim": 16}}))
    assert path_digest(folder) != before  # so that no earlier bundle is taken for this one


@pytest.mark.parametrize(
    ("method", "form", "prefix", "config", "told"),
    [
        ("deepseek-ocr", 0, "model.", {"vision_config": {"width": {"clip-l-14-224": {"heads": 8}}}}, {"clip_heads": 8}),
        (
            "deepseek-ocr",
            0,
            "model.",
            {"vision_config": {"encoder_config": {"num_attention_heads": 4}}},
            {"clip_heads": 4},
        ),
        (
            "deepseek-ocr",
            1,
            "model.",
            {"vision_config": {"encoder_config": {"num_attention_heads": 4}, "sam_config": {"patch_size": 8}}},
            {"clip_heads": 4, "patch_size": 8},
        ),
        (
            "deepseek-ocr",
            3,
            "",
            {"model_type": "unlimited_ocr_vision", "encoder_config": {"num_attention_heads": 4}},
            {"clip_heads": 4},
        ),
        ("pixel-shuffle", 0, "", {"downsample_factor": 3}, {"factor": 3}),
        ("q-former", 2, "", {"model_type": "blip_2_qformer", "num_attention_heads": 3}, {"num_heads": 3}),
        ("q-former", 2, "", {"model_type": "llama", "num_attention_heads": 3}, {}),
        ("q-former", 2, "llm.", {"model_type": "blip_2_qformer", "num_attention_heads": 3}, {}),
        ("q-former", 0, "", ["no", "table"], {}),
    ],
)
def test_where_a_config_says_it(
    method: str, form: int, prefix: str, config: Any, told: dict[str, int], tmp_path: Path
) -> None:
    recipe = load_recipe(method)
    match = best_match([f"{prefix}{key}" for key in keys_of(recipe.layouts[form])], recipe.layouts)
    assert match is not None
    path = tmp_path / "config.json"
    assert read_declared(path, match, method=method) is None
    path.write_text(json.dumps(config))
    found = read_declared(path, match, method=method)
    assert found is not None
    assert {name: value for name, (value, _) in found.items()} == told


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ("[" * 150_000, "is no JSON"),
        ({"scale_factor": "2"}, "says scale_factor='2', where a number above 0 belongs"),
        ({"scale_factor": True}, "says scale_factor=True, where a number above 0 belongs"),
        ({"scale_factor": -1}, "says scale_factor=-1, where"),
    ],
)
def test_a_config_that_cannot_be(config: Any, text: str, tmp_path: Path) -> None:
    folder = write_with_config(tmp_path, {"c.modality_projection.proj.weight": torch.zeros(4, 16)}, {})
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(WeightsError) as caught:
        edgecomp.compressor("pixel-shuffle", weights=folder)
    assert text in str(caught.value)
    assert str(folder / "config.json") in str(caught.value)


def test_a_config_of_another_activation_is_refused(tmp_path: Path) -> None:
    state = {f"{name}.{leaf}": torch.zeros(16, 16)[0 if leaf == "bias" or name == "layer_norm" else slice(None)].clone()
             for name in ("layer_norm", "linear_1", "linear_2") for leaf in ("weight", "bias")}  # fmt: skip
    folder = write_with_config(tmp_path, state, {"projector_hidden_act": "relu", "downsample_ratio": 0.5})
    with pytest.raises(WeightsError, match="says projector_hidden_act='relu', and pixel-shuffle computes with 'gelu'"):
        edgecomp.compressor("pixel-shuffle", weights=folder)
    config = {"projector_hidden_act": "gelu", "downsample_ratio": 0.25,
              "vision_config": {"image_size": [64, 64], "patch_size": [8, 8]}}  # fmt: skip
    write_with_config(tmp_path, state, config)
    module = edgecomp.compressor("pixel-shuffle", weights=folder)
    assert (module.params.factor, module.params.embed_dim, module.params.tokens) == (4, 1, 64)
    write_with_config(tmp_path, state, {})
    notes = next(fit.notes for fit in api.inspect(weights=folder).fits if fit.method == "pixel-shuffle")
    assert any("params.factor=2" in note and ", and nothing was read of it in config.json" in note for note in notes)


#: Keys of config.json, of original and method: the value that is computed with, and another.
SWITCHES = [
    ("deepseek-ocr", "vision_config.encoder_config.hidden_act", "quick_gelu", "gelu"),
    ("deepseek-ocr", "vision_config.encoder_config.layer_norm_eps", 1e-5, 1e-2),
    ("deepseek-ocr", "vision_config.sam_config.hidden_act", "gelu", "relu"),
    ("deepseek-ocr", "vision_config.sam_config.layer_norm_eps", 1e-6, 1e-2),
    ("fastvlm", "projector_hidden_act", "gelu", "relu"),
    ("fastvlm", "mm_projector_type", "mlp2x_gelu", "mlp2x_relu"),
    ("matryoshka", "projector_hidden_act", "gelu", "quick_gelu"),
    ("matryoshka", "mm_projector_type", "mlp2x_gelu", "identity"),
    ("perceiver", "perceiver_config.hidden_act", "silu", "gelu"),
    ("perceiver", "text_config.hidden_act", "silu", "gelu"),
    ("pixel-shuffle", "projector_hidden_act", "gelu", "silu"),
    ("pixel-shuffle", "ps_version", "v2", "v1"),
    ("q-former", "qformer_config.layer_norm_eps", 1e-12, 1e-5),
]


@pytest.mark.parametrize(("method", "key", "computed", "other"), SWITCHES)
def test_what_a_method_computes_with_is_held_against_the_config(
    method: str, key: str, computed: float | str, other: float | str, tmp_path: Path
) -> None:
    recipe, path = load_recipe(method), tmp_path / "config.json"
    layouts = [layout for layout in recipe.layouts if key in layout.fixed]
    assert layouts
    for layout in layouts:
        match = best_match([f"model.{name}" for name in keys_of(layout)], recipe.layouts)
        assert match is not None
        assert match.layout.name == layout.name
        for value in (computed, other):
            told: Any = value
            for word in reversed(key.split(".")):
                told = {word: told}
            path.write_text(json.dumps(told))
            if value == computed:
                assert read_declared(path, match, method=method) == {}
            else:
                with pytest.raises(WeightsError) as caught:
                    read_declared(path, match, method=method)
                assert f"config.json says {key}={other!r}, and {method} computes with {computed!r}" in str(caught.value)


# -- inspect offers nothing that export refuses -------------------------------------------------------------------


def test_inspect_keeps_what_export_keeps(tmp_path: Path) -> None:
    """The preset's 169 of 1521 tokens are none of what 16 joined by fours can be."""
    config = {"scale_factor": 2, "vision_config": {"image_size": 32, "patch_size": 8}}
    folder = write_with_config(tmp_path, {"c.modality_projection.proj.weight": torch.zeros(4, 16)}, config)
    (fit,) = api.inspect(weights=folder).fits
    made = edgecomp.compressor("pixel-shuffle", weights=folder).budget
    assert (fit.tokens_in, fit.kept, fit.may_keep) == (16, (4,), "one of 4")
    assert (made.tokens_in, made.tokens_out) == (16, 4)


@pytest.mark.parametrize(
    ("method", "form", "shapes", "text"),
    [
        # Cohere's projector: as LLaVA's by its keys, and half of what linear_1 makes is the gate of the other half
        ("matryoshka", 1, {"linear_1.weight": (64, 16), "linear_1.bias": (64,), "linear_2.weight": (8, 32),
                           "linear_2.bias": (8,)}, "multi_modal_projector.linear_2.weight (8, 32) instead of"),
        # LFM2-VL's: as InternVL's, and between the layers of a width of its own
        ("pixel-shuffle", 0, {"layer_norm.weight": (16,), "layer_norm.bias": (16,), "linear_1.weight": (12, 16),
                              "linear_1.bias": (12,), "linear_2.weight": (8, 12), "linear_2.bias": (8,)},
         "linear_2.weight (8, 12) instead of"),
        ("perceiver", 2, {"latents": (64, 4)}, "of another shape"),
    ],
)  # fmt: skip
def test_inspect_holds_shapes_against_the_module(
    method: str, form: int, shapes: dict[str, tuple[int, ...]], text: str, tmp_path: Path
) -> None:
    keys = keys_of(load_recipe(method).layouts[form])
    state = idefics1() if method == "perceiver" else {}
    state |= {key: torch.zeros(shape) for name, shape in shapes.items() for key in keys if key.endswith(name)}
    save_file(state, tmp_path / "x.safetensors")
    params = {"head_dim": 16} if method == "perceiver" else {}
    fits = {fit.method: fit for fit in api.inspect(weights=tmp_path / "x.safetensors", params=params).fits}
    assert text in fits[method].problem
    assert fits[method].command == ""
    with pytest.raises(WeightsError) as caught:
        edgecomp.compressor(method, weights=tmp_path / "x.safetensors", **params)
    assert str(caught.value) == fits[method].problem


def test_inspect_says_that_a_q_former_alone_lacks_its_queries(tmp_path: Path) -> None:
    save_file(golden("qformer/blip2_q8_n50.safetensors"), tmp_path / "x.safetensors")
    (fit,) = api.inspect(weights=tmp_path / "x.safetensors", params={"num_heads": 2}).fits
    assert "1 missing: query_tokens" in fit.problem


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float8_e4m3fn, "float8_e4m3fn"), (torch.int64, "int64"), (torch.complex64, "complex64")]
)
def test_inspect_says_what_types_are_refused(dtype: Any, name: str, tmp_path: Path) -> None:
    state = idefics1()
    save_file(state | {"latents": state["latents"].to(dtype)}, tmp_path / "x.safetensors")
    contents: Any = api.inspect(weights=tmp_path / "x.safetensors", params={"head_dim": 16})
    (fit,) = contents.fits
    assert f"'latents' is stored as {name}, which is no plain floating type" in fit.problem
    assert fit.command == ""
    assert f"all but {name}, which no weight may be in, are read as float32" in describe_contents(contents)


def test_inspect_says_that_a_layout_is_there_twice(tmp_path: Path) -> None:
    state = {f"{who}.{key}": value.clone() for key, value in idefics1().items() for who in ("see", "hear")}
    save_file(state, tmp_path / "x.safetensors")
    (fit,) = api.inspect(weights=tmp_path / "x.safetensors", params={"head_dim": 16}).fits
    assert "holds the layout idefics1 2 times" in fit.problem


# -- pickles --------------------------------------------------------------------------------------------------


def test_a_second_set_of_tensors_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    state = idefics1()
    sets = {"model": state, "model_ema": {key: value + 1 for key, value in state.items()}, "optimizer": {"state": {}}}
    torch.save({**sets, "epoch": 3}, tmp_path / "x.pt")
    notes: list[str] = []
    read = Checkpoint(tmp_path / "x.pt").read(say=notes.append)
    assert torch.equal(read["latents"], state["latents"])
    (note,) = notes
    assert note.startswith("x.pt holds several sets of tensors: model was read, and not model_ema; save that one in a ")
    (fit,) = api.inspect(weights=tmp_path / "x.pt", params={"head_dim": 16}).fits
    assert note in fit.notes
    torch.save({"model": state, "optimizer": {"state": {}}}, tmp_path / "y.pt")
    assert not Checkpoint(tmp_path / "y.pt").notes


# -- headers --------------------------------------------------------------------------------------------------


def write_header(path: Path, header: str, num_bytes: int) -> Path:
    text = header.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_bytes))
    return path


@pytest.mark.parametrize(
    ("header", "text"),
    [
        ("[" * 150_000, "the header is no JSON"),
        ('{"__metadata__":' + "[" * 150_000, "the header is no JSON"),
        ('{"a":{"dtype":"F32","shape":[1e308,4],"data_offsets":[0,8]}}', "says nothing of where 'a' lies"),
        ('{"a":{"dtype":"F32","shape":[1180591620717411303424,4],"data_offsets":[0,8]}}', "nothing of where 'a' lies"),
        ('{"a":{"dtype":"F32","shape":"48","data_offsets":[0,8]}}', "says nothing of where 'a' lies"),
        (
            '{"a":{"dtype":"F32","shape":[4096,4608],"data_offsets":[0,8]}}',
            "gives 'a' 8 bytes for 4096 x 4608 of float",
        ),
        ('{"a":{"dtype":"BOOL","shape":[4],"data_offsets":[0,8]}}', "gives 'a' 8 bytes for 4 of bool"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,80]}}', "gives 'a' a place that cannot be"),
    ],
)
def test_headers_that_cannot_be(header: str, text: str, tmp_path: Path) -> None:
    path = write_header(tmp_path / "x.safetensors", header, 8)
    with pytest.raises(WeightsError) as caught:
        Checkpoint(path)
    assert text in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_an_index_that_nests_beyond_reason(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map":' + "[" * 150_000)
    with pytest.raises(WeightsError, match=r"index .* is no JSON"):
        Checkpoint(tmp_path)
