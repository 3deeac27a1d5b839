"""DeepSeek-OCR: the compressor alone, tiles in buckets, the layouts of whole models, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402 - torch first, or skip

from edgecomp import api  # noqa: E402
from edgecomp.backbones.assemble import assemble  # noqa: E402
from edgecomp.compressors._checkpoint import read_checkpoint  # noqa: E402
from edgecomp.compressors.deepseek_ocr import DeepSeekOCR  # noqa: E402
from edgecomp.errors import InvalidSpec, WeightsError  # noqa: E402
from edgecomp.specs import Site, TokenBudget, load_recipe  # noqa: E402
from edgecomp.specs.order import Order  # noqa: E402

ROOT = Path(__file__).parents[1] / "golden"
GOLDEN = ROOT / "deepseek_ocr_encoder" / "s128.safetensors"
GOLDEN_HF = ROOT / "deepseek_ocr_hf" / "photo_s128.safetensors"


def weights_of(path):
    return {k.removeprefix("weight."): v.clone() for k, v in load_file(path).items() if k.startswith("weight.")}


def with_ends(weights, projector, separator):
    """Add what only a whole model has."""
    generator = torch.Generator().manual_seed(0)
    ends = {f"{projector}.weight": (20, 48), f"{projector}.bias": (20,), "image_newline": (20,), separator: (20,)}
    return weights | {name: torch.randn(shape, generator=generator) for name, shape in ends.items()}


def as_whole_model(kind):
    """Return a whole model's checkpoint, with thousands of tensors that are the language model's."""
    if kind == "deepseek":
        named = with_ends(weights_of(GOLDEN), "projector.layers", "view_seperator")
        language = [f"model.layers.{n}.mlp.experts.{k}.up_proj.weight" for n in range(40) for k in range(50)]
    else:
        tower = {f"vision_tower.{key}": value for key, value in weights_of(GOLDEN_HF).items()}
        named = with_ends(tower, "multi_modal_projector", "view_separator")
        language = [f"model.language_model.layers.{n}.mlp.experts.{k}.weight" for n in range(40) for k in range(50)]
    whole = {f"model.{key}": value for key, value in named.items()}
    return whole | {name: torch.zeros(1) for name in (*language, "lm_head.weight")}


@pytest.mark.parametrize("kind", ["deepseek", "transformers"])
def test_a_whole_models_checkpoint_is_loaded_without_its_language_model(kind, tmp_path):
    save_file(as_whole_model(kind), tmp_path / "model.safetensors")
    words = {"preset": "smoke", "weights": tmp_path / "model.safetensors", "params": {"clip_heads": 4}}
    report = api.export("deepseek-ocr", out=tmp_path / "bundle", **words)
    manifest = report.manifest
    assert manifest.weights.layout == kind
    (told,) = [note for note in manifest.notes if note.startswith("weights in the layout")]
    part = {"deepseek": "model.layers", "transformers": "model.language_model"}[kind]
    assert f"left out as of another model: {part} 2000, lm_head 1" in told
    params = manifest.params
    assert (params["part"], params["projector_dim"], params["num_heads"], params["window"]) == ("whole", 20, 3, 4)
    assert list(params["global_blocks"]) == [1]
    assert report.parity


def test_what_transformers_saves_is_loaded(tmp_path):
    """Its own class, with weights of its own, saved by itself: the tokens are its tokens."""
    unlimited = pytest.importorskip("transformers.models.unlimited_ocr")
    sam = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 32, "image_size": 64,
           "output_channels": 8, "downsample_channels": [8, 16], "global_attn_indexes": [1],
           "window_size": 3}  # fmt: skip
    clip = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 42, "patch_size": 14}  # fmt: skip
    config = unlimited.UnlimitedOcrVisionConfig(sam_config=sam, encoder_config=clip)
    torch.manual_seed(0)
    model = unlimited.UnlimitedOcrVisionModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "saved")
    words = {"preset": "smoke", "weights": tmp_path / "saved", "params": {"clip_heads": 2}, "budget": 5}
    with pytest.raises(InvalidSpec, match="budget 5 is not possible"):
        api.export("deepseek-ocr", out=tmp_path / "bundle", **words)
    state = read_checkpoint(tmp_path / "saved")
    recipe = load_recipe("deepseek-ocr")
    params = DeepSeekOCR.parse_params({"clip_heads": 2}, method="deepseek-ocr")
    params = DeepSeekOCR.parse_params(
        {"clip_heads": 2, **DeepSeekOCR.infer_params(state, params)}, method="deepseek-ocr"
    )
    module = DeepSeekOCR(params, Site("encoder", image_size=128), TokenBudget(64, 4)).eval()
    assert module.load_original(state, unread=tuple(recipe.unread)) in ("deepseek", "transformers")
    image = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        (got,) = module(image)
        expected = model(image).last_hidden_state
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5


def test_the_compressor_alone_gives_the_originals_numbers():
    tensors = load_file(GOLDEN)
    recipe = load_recipe("deepseek-ocr")
    sizes = {"part": "compressor", "tokens": 64, "neck_dim": 12, "middle_dim": 16, "clip_dim": 24}
    module = DeepSeekOCR.from_recipe(recipe, 4, preset="smoke-compressor", **sizes).eval()
    assert module.load_original(weights_of(GOLDEN), unread=tuple(recipe.unread)) == "deepseek"
    tokens = tensors["output.neck"].flatten(2).transpose(1, 2)
    expected = tensors["output.compressed"].flatten(2).transpose(1, 2)
    for one in (module, module.reference()):
        with torch.inference_mode():
            (got,) = one(tokens)
        assert float((got - expected).abs().max() / expected.abs().max()) < 1e-6


def test_the_compressor_alone_is_cut_out_of_a_preset(tmp_path):
    report = api.export("deepseek-ocr", preset="tiny", params={"part": "compressor"}, out=tmp_path / "bundle")
    (bucket,) = report.manifest.buckets
    assert report.manifest.placement == "after"
    assert [spec.name for spec in bucket.inputs] == ["tokens"]
    assert set(bucket.ops) == {"Conv", "Reshape", "Transpose"}
    assert bucket.outputs[0].shape[1] * 16 == bucket.inputs[0].shape[1]


def test_buckets_with_other_tiles_stand_in_one_bundle(tmp_path):
    """Each takes as many tiles as it lays out, and the smallest none at all."""
    report = api.export("deepseek-ocr", preset="smoke-tiles", budget=[3, 13, 17], out=tmp_path / "bundle")
    taken = {bucket.budget.tokens_out: [spec.name for spec in bucket.inputs] for bucket in report.manifest.buckets}
    assert taken == {3: ["image"], 13: ["image", "tiles_2"], 17: ["image", "tiles_3"]}
    patches = {bucket.budget.tokens_out: bucket.budget.tokens_in for bucket in report.manifest.buckets}
    assert patches == {3: 16, 13: 16 + 2 * 64, 17: 16 + 3 * 64}
    assert report.parity
    assert api.parity(report.bundle)


def test_rows_of_tiles_newlines_and_separator():
    """Two tiles of 2 x 2 tokens above each other, then one token of the page, then the separator."""
    module = DeepSeekOCR.from_recipe(load_recipe("deepseek-ocr"), 15, preset="smoke-tiles")
    newline, separator = 9, 10
    page = [8, newline]
    assert module.layout.tolist() == [0, 1, newline, 2, 3, newline, 4, 5, newline, 6, 7, newline, *page, separator]
    beside = DeepSeekOCR.from_recipe(load_recipe("deepseek-ocr"), 13, preset="smoke-tiles")
    assert beside.layout.tolist() == [0, 1, 4, 5, newline, 2, 3, 6, 7, newline, *page, separator]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"image_size": 600}, "image size 600 is not a multiple of 64.*the nearest is 576"),
        (
            {"image_size": 768},
            "makes 157 rows of an image of 768 pixels, and preset base .*: image sizes 512, 640, 1024, 1280",
        ),
        (
            {"preset": "smoke", "params": {"part": "compressor", "tokens": 1600}},
            "params.tokens=1600 was set, and deepseek-ocr takes 64 tokens",
        ),
        ({"preset": "smoke", "params": {"tokens": 64}}, "takes an image of 128 pixels here"),
        ({"budget": 111}, "images of 1024 pixels give 273 rows, not a budget of 111"),
        ({"preset": "tiny", "params": {"part": "features"}, "budget": 73}, "images of 512 pixels give 64 rows"),
        ({"preset": "gundam", "params": {"tile_size": 600}}, "params.tile_size 600 is not a multiple of 64"),
        ({"preset": "gundam", "budget": 900}, "budget 900 is not possible"),
        (
            {"preset": "smoke-tiles", "budget": 13, "params": {"tile_size": 64}},
            "13 rows are those of 1x5 and 4x2 and 9x1 tiles",
        ),
        ({"preset": "smoke-compressor", "params": {"tokens": 60}}, "60 tokens are none; 16 and 64 are"),
        ({"preset": "smoke", "params": {"global_blocks": [2]}}, "names block 2, and there are 2"),
        ({"preset": "smoke", "params": {"clip_heads": 3}}, "clip_dim=16 is not a multiple of its 3 heads"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(words, match, tmp_path):
    with pytest.raises(InvalidSpec, match=match):
        api.export("deepseek-ocr", out=tmp_path / "bundle", **words)
    assert list(tmp_path.iterdir()) == []


def test_a_presets_budgets_do_not_rule_another_part():
    order = Order(recipe=load_recipe("deepseek-ocr"), preset="smoke", params={"part": "compressor"})
    assert assemble(order).models[0].compressor.budget == TokenBudget(64, 4)


def test_half_of_the_weights_is_an_error_that_names_them(tmp_path):
    weights = {key: value for key, value in as_whole_model("deepseek").items() if "net_3" not in key}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="net_3"):
        api.export("deepseek-ocr", preset="smoke", weights=tmp_path / "model.safetensors", out=tmp_path / "bundle")


def test_no_backbone_is_what_an_encoder_has_anyhow(tmp_path):
    report = api.export("deepseek-ocr", preset="smoke", backbone="none", out=tmp_path / "bundle")
    assert report.manifest.placement == "encoder"
