"""Methods that map a grid of tokens to another: their pooling, their checkpoints, and what they refuse."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from edgecomp.backbones.assemble import assemble
from edgecomp.compressors import compressor_class
from edgecomp.compressors._base import initialise
from edgecomp.compressors._grid import adaptive_line, bilinear_line, gather_groups, resample_grid
from edgecomp.errors import InvalidSpec, WeightsError
from edgecomp.specs import load_recipe
from edgecomp.specs.order import Order


def build(method, preset="smoke", budgets=(), **order):
    words = {"budgets": tuple(map(str, budgets)), **order}
    return assemble(Order(recipe=load_recipe(method), preset=preset, **words))


def module_of(method, preset="smoke", budgets=(), **params):
    return build(method, preset, budgets, params=params).models[0].compressor


def grid(rows, columns, width=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows * columns, width, generator=generator, dtype=torch.float64)


def planes(tokens, rows, columns):
    return tokens.transpose(1, 2).reshape(len(tokens), -1, rows, columns)


# -- constant matrices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target"), [((24, 24), (12, 12)), ((14, 14), (6, 6)), ((5, 7), (3, 7)), ((6, 4), (1, 1))]
)
def test_two_factors_are_adaptive_pooling(source, target):
    tokens = grid(*source)
    lines = [adaptive_line(a, b) for a, b in zip(source, target, strict=True)]
    got = resample_grid(tokens, *lines)
    expected = F.adaptive_avg_pool2d(planes(tokens, *source), target).flatten(2).transpose(1, 2)
    assert float((got - expected).abs().max()) <= 1e-14
    assert float((got - torch.kron(*lines) @ tokens).abs().max()) <= 1e-14


@pytest.mark.parametrize("target", [12, 8, 6, 4, 1])
def test_two_factors_are_a_bilinear_resize(target):
    tokens, line = grid(24, 24), bilinear_line(24, target)
    expected = F.interpolate(planes(tokens, 24, 24), size=(target, target), mode="bilinear")
    assert float((resample_grid(tokens, line, line) - expected.flatten(2).transpose(1, 2)).abs().max()) <= 1e-14


def test_squares_come_together_in_raster_order():
    tokens = torch.arange(24, dtype=torch.float64).reshape(1, 24, 1)  # 4 x 6
    assert gather_groups(tokens, 4, 6, 2)[0, :, :, 0].tolist()[:2] == [[0, 1, 6, 7], [2, 3, 8, 9]]


# -- originals --------------------------------------------------------------------------------------------------


def test_a_layer_of_d_abstractor_is_transformers_deformable_layer():
    """The original's layers are transformers' own; its class needs a release of 2023, its layers are there today."""
    from transformers import DeformableDetrConfig
    from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrDecoderLayer

    static = module_of("d-abstractor", "smoke-tables", [16]).double()
    config = DeformableDetrConfig(
        d_model=32, decoder_attention_heads=2, decoder_n_points=4, decoder_ffn_dim=32, num_feature_levels=1,
        attn_implementation="eager",
    )  # fmt: skip
    layer = DeformableDetrDecoderLayer(config).double().eval()
    initialise(layer, torch.Generator().manual_seed(3))
    state = {f"layers.0.{key}": value for key, value in layer.state_dict().items()}
    whole = {
        "query_position_embeddings.weight": torch.cat([static.place_table, static.query_table], dim=1),
        "reference_points": static.references[None],
        "v_pos_emb": static.positions[None],
        "output_proj.weight": static.output_proj.weight,
        "output_proj.bias": static.output_proj.bias,
    }
    assert static.load_original({f"abstractor.{k}": v for k, v in {**whole, **state}.items()}) == "honeybee-d"
    tokens = grid(4, 4, 32)
    with torch.inference_mode():
        memory = tokens + static.positions
        expected = layer(
            static.query_table.expand(2, -1, -1), static.place_table.expand(2, -1, -1),
            reference_points=static.references.expand(2, -1, -1)[:, :, None], spatial_shapes=torch.tensor([[4, 4]]),
            spatial_shapes_list=[(4, 4)], level_start_index=torch.tensor([0]), encoder_hidden_states=memory,
        )  # fmt: skip
        expected = static.output_proj(expected[0] if isinstance(expected, tuple) else expected)
        for module in (static, static.reference()):
            assert float((module(tokens)[0] - expected).abs().max()) <= 1e-12


def test_old_honeybee_checkpoints_lose_the_class_tokens_position():
    static = module_of("c-abstractor", budgets=[10])
    state = _honeybee(static)
    table = state["abstractor.pos_emb"]
    assert static.load_original({**state, "abstractor.pos_emb": F.pad(table, (0, 0, 1, 0), value=7.0)}) == "honeybee"
    assert torch.equal(static.positions, table[0])
    cls = type(static)
    old = {**state, "abstractor.pos_emb": torch.zeros(1, 50, 24)}
    assert cls.infer_params(old, static.params)["tokens"] == 49
    with pytest.raises(WeightsError, match=r"positions for 64 tokens, and 49 go in"):
        static.load_original({**state, "abstractor.pos_emb": torch.zeros(1, 64, 24)})


def _honeybee(static):
    """Return the weights of a C-Abstractor as Honeybee names them."""
    state = {}
    for name, tensor in static.state_dict().items():
        part = name.split(".")
        if part[0] in ("before", "after"):
            key = f"net.{2 * (part[0] == 'after')}.b{int(part[1]) + 1}."
            inner, last = part[2], part[3]
            words = {
                "squeeze": "se.fc1",
                "excite": "se.fc2",
                "shortcut": "downsample.conv",
                "shortcut_norm": "downsample.bn",
            }
            words |= {f"conv{n}": f"conv{n}.conv" for n in (1, 2, 3)} | {f"norm{n}": f"conv{n}.bn" for n in (1, 2, 3)}
            key += f"{words[inner]}.{last}"
            if last == "weight" and inner in ("conv1", "conv3", "squeeze", "excite", "shortcut"):
                tensor = tensor[:, :, None, None]
        elif part[0] == "mlp":
            key = f"readout.{2 * int(part[1])}.{part[2]}"
        else:
            key, tensor = {"positions": "pos_emb", "eos": "eos_tokens"}[name], tensor[None]
        state[f"abstractor.{key}"] = tensor
    return state


def test_a_whole_models_checkpoint_gives_its_connector(tmp_path):
    from safetensors.torch import save_file

    static = module_of("pixel-shuffle")
    names = {"norm": "layer_norm", "fc1": "linear_1", "fc2": "linear_2"}
    own = static.state_dict()
    state = {f"model.multi_modal_projector.{names[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in own.items()}
    state |= {f"model.language_model.layers.{n}.mlp.up_proj.weight": torch.zeros(2, 2) for n in range(40)}
    save_file(state, tmp_path / "model.safetensors")
    assembly = build("pixel-shuffle", weights=str(tmp_path / "model.safetensors"))
    assert assembly.weights.layout == "internvl"
    assert any("40" in note for note in assembly.notes)
    loaded = assembly.models[0].compressor.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in own.items())


def test_a_siblings_checkpoint_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file(_honeybee(module_of("c-abstractor", budgets=[10])), tmp_path / "honeybee.safetensors")
    with pytest.raises(WeightsError, match=r"honeybee\.safetensors"):
        build("tokenpacker", weights=str(tmp_path / "honeybee.safetensors"))


def test_tokenpacker_reads_the_layers_of_its_host():
    assembly = build("tokenpacker", preset="tokenpacker", budgets=[4], backbone="test_vit", image_size=64,
                     params={"hidden_dim": 32, "num_heads": 2, "output_dim": 16, "levels": [-3, -2]})  # fmt: skip
    model = assembly.models[0]
    assert [spec.name for spec in model.input_specs()] == ["image"]
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        tokens, levels = model.embed(image)
        width = tokens.shape[-1]
        assert levels.shape == (1, 16, 2 * width)
        assert torch.equal(levels[..., width:], tokens)  # the feature layer is -2
        assert not torch.equal(levels[..., :width], tokens)
        assert model(image)[0].shape == (1, 4, 16)


def test_a_default_budget_that_the_grid_lacks_is_told():
    params = {"hidden_dim": 32, "num_heads": 2, "output_dim": 16, "tokens": 729, "embed_dim": 8}
    assembly = build("tokenpacker", preset="tokenpacker", params=params)
    assert [model.compressor.budget.tokens_out for model in assembly.models] == [81]
    told = "81 of 729 tokens are kept, since the preset's 144 is not possible here; a budget is one of 1, 9, 81, 729"
    assert told in assembly.notes


# -- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "preset", "budgets", "params", "words"),
    [
        ("c-abstractor", "honeybee", [128], {}, "budget 128 is not possible for c-abstractor; it must be one of 1"),
        ("c-abstractor", "honeybee", [96], {}, "576, or with --set params.query_rows=ROWS whole rows"),
        ("c-abstractor", "honeybee", [144], {"tokens": 577}, "577 tokens in are no square grid; 576 = 24 x 24 and 625"),
        ("c-abstractor", "honeybee", [144], {"grid_rows": 25}, "do not fill 25 rows (params.grid_rows=25)"),
        ("d-abstractor", "honeybee", [140], {}, "budget 140 is not possible for d-abstractor; it must be one of 1, 4"),
        ("d-abstractor", "honeybee", [144], {"queries": 100}, "budget 144 is not possible for d-abstractor"),
        ("pixel-shuffle", "internvl", [100], {}, "budget 100 is not possible for pixel-shuffle; it must be one of 256"),
        ("pixel-shuffle", "internvl", [], {"tokens": 729}, "squares of 2 x 2; factors that fit it: 1, 3, 9, 27"),
        ("pixel-shuffle", "qwen2-vl", [], {"tokens": 90}, "90 grouped tokens are no multiple of 2 x 2 = 4"),
        ("matryoshka", "pooling", [100], {}, "not possible for matryoshka; it must be one of 1, 4, 9, 16, 36, 64"),
        ("matryoshka", "pooling", [], {"tokens": 600}, "600 tokens in are no square grid; 576 = 24 x 24"),
        ("tokenpacker", "tokenpacker", [100], {}, "budget 100 is not possible for tokenpacker; it must be one of 1"),
        ("tokenpacker", "tokenpacker", [144], {"num_heads": 7}, "hidden_dim=1024 is not a multiple of num_heads=7"),
        ("tokenpacker", "tokenpacker", [], {"levels": []}, "params.levels=[]: Expected `array` of length >= 1"),
        ("multi-scale", "global-local", [], {"tokens": 576}, "params.tokens=576 was set, and multi-scale takes 2448"),
        ("multi-scale", "pyramid", [100], {}, "budget 100 is not possible for multi-scale; it must be one of 189"),
        ("multi-scale", "pyramid", [], {"levels": [[32, 144]]}, "a level of 32 x 32 is above the 24 x 24 grid"),
        ("multi-scale", "pyramid", [], {"levels": [[12, 100], [4, 25]]}, "16 tokens and cannot be averaged to 25"),
        ("multi-scale", "pyramid", [], {"levels": [[12, 120]]}, "120 outputs of level 0 are no square grid"),
        ("multi-scale", "pyramid", [], {"resampled": [5]}, "params.resampled holds 5, and the levels are 0 to 2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(method, preset, budgets, params, words):
    with pytest.raises(InvalidSpec, match=re.escape(words)):
        build(method, preset, budgets, params=params)


def test_grids_of_levels_are_as_many_tokens_as_the_host_gives():
    with pytest.raises(InvalidSpec, match=r"16 tokens go in, and the grids of the levels .* have 20 together"):
        build("multi-scale", preset="smoke-levels", backbone="test_vit", image_size=64)


@pytest.mark.parametrize("method", ["matryoshka", "tokenpacker", "d-abstractor", "multi-scale"])
def test_no_refusal_names_a_parameter_that_holds_no_rows(method):
    with pytest.raises(InvalidSpec, match=r"20 tokens in are no square grid; 16 = 4 x 4 and 25 = 5 x 5 are$"):
        build(method, params={"tokens": 20})


@pytest.mark.parametrize("method", ["c-abstractor", "pixel-shuffle", "matryoshka", "tokenpacker", "d-abstractor"])
def test_weights_in_no_layout_are_refused(method):
    cls = compressor_class(method)
    with pytest.raises(WeightsError, match=r"first keys.*stray\.weight"):
        cls.infer_params({"stray.weight": torch.zeros(2, 2)}, cls.Params())
