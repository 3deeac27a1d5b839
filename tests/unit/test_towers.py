"""Image towers of transformers as hosts: the same tokens as transformers', and as timm's with the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

import msgspec  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402

from edgecomp import api  # noqa: E402
from edgecomp.backbones.attention import attend, attend_fused  # noqa: E402
from edgecomp.backbones.host import HostRequest  # noqa: E402
from edgecomp.backbones.timm import TimmHost  # noqa: E402
from edgecomp.backbones.towers import load_tower  # noqa: E402
from edgecomp.backbones.transformers import TransformersHost, split_classifier  # noqa: E402
from edgecomp.errors import InvalidSpec, UnknownName, WeightsError  # noqa: E402
from edgecomp.resources import data_path  # noqa: E402
from edgecomp.search.recipe import recipe_text, winner_recipe  # noqa: E402
from edgecomp.specs.backbone import is_model_folder, read_backbones  # noqa: E402

SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
PERCEPTRON = {**SIZE, "intermediate_size": 64}
TOWERS = {
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", PERCEPTRON),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", PERCEPTRON),
    "dinov2": ("Dinov2Model", "Dinov2Config", {**SIZE, "mlp_ratio": 2}),
    "dinov2-swiglu": ("Dinov2Model", "Dinov2Config", {**SIZE, "mlp_ratio": 2, "use_swiglu_ffn": True}),
    "dinov2-registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {**SIZE, "mlp_ratio": 2, "num_register_tokens": 4},
    ),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {**PERCEPTRON, "num_register_tokens": 4}),
}


def make(name: str, **other: Any) -> Any:
    cls, config, words = TOWERS[name]
    torch.manual_seed(0)
    return shake(getattr(transformers, cls)(getattr(transformers, config)(**{**words, **other})))


@torch.no_grad()
def shake(model: Any) -> Any:
    """Give every parameter values that show."""
    for parameter in model.parameters():
        parameter.copy_(parameter + 0.2 * torch.randn(parameter.shape))
    return model.double().eval()


def saved(model: Any, folder: Path, **options: Any) -> str:
    model.float().save_pretrained(folder, **options)
    model.double()
    return str(folder)


def load(folder: str, **words: Any) -> tuple[TransformersHost, Any, list[str]]:
    notes: list[str] = []
    request = HostRequest(name=folder, **{"weights": "", "feature_layer": -1, "seed": 0, **words})
    host, origin = load_tower(request, listed=(), say=notes.append)
    return host.double(), origin, notes


def picture(size: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def last_of(model: Any, image: torch.Tensor, **words: Any) -> torch.Tensor:
    tokens = model(image, **words).last_hidden_state
    if not type(model).__name__.startswith("CLIP"):
        return tokens
    return getattr(model, "vision_model", model).post_layernorm(tokens)


@pytest.mark.parametrize("name", TOWERS)
def test_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = make(name)
    host, origin, notes = load(saved(model, tmp_path), levels=(-3, -2))
    prefix, image = host.num_prefix_tokens, picture()
    with torch.inference_mode():
        states = model(image, output_hidden_states=True).hidden_states
        tokens, features = host.look(image, ("levels",), None)
        assert torch.allclose(tokens, last_of(model, image), atol=1e-6)  # the file is in fp32
        assert torch.allclose(features["levels"], torch.cat([states[1], states[2]], -1)[:, prefix:], atol=1e-6)
    assert (notes, origin.kind, origin.layout) == ([], "file", f"transformers {model.config.model_type}")
    assert host.site.tokens_in == 16
    assert host.has_class_token == (name != "siglip")


@pytest.mark.parametrize("name", TOWERS)
def test_another_image_size_is_by_transformers_own_rule(name: str, tmp_path: Path) -> None:
    model = make(name)
    host, _, _ = load(saved(model, tmp_path), image_size=96)
    words = {"interpolate_pos_encoding": True} if name in ("clip", "siglip") else {}
    with torch.inference_mode():
        expected = last_of(model, picture(96), **words)[:, host.num_prefix_tokens :]
        assert torch.allclose(host(picture(96)), expected, atol=1e-5)
    with pytest.raises(InvalidSpec, match=r"image size 90 is not a multiple of the patch of .*, 16; .*: 96"):
        load(str(tmp_path), image_size=90)


@pytest.mark.parametrize("name", TOWERS)
def test_an_earlier_layer_is_a_hidden_state(name: str, tmp_path: Path) -> None:
    model = make(name)
    folder = saved(model, tmp_path)
    host, _, _ = load(folder, feature_layer=-2)
    with torch.inference_mode():
        states = model(picture(), output_hidden_states=True).hidden_states
        assert torch.allclose(host(picture()), states[2][:, host.num_prefix_tokens :], atol=1e-6)
    assert host.depth == 2
    with pytest.raises(InvalidSpec, match=r"feature layer -4 of .* must lie between -3 and -1"):
        load(folder, feature_layer=-4)


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("form", [attend, attend_fused])
def test_attention_is_what_transformers_saw(name: str, form: Any, tmp_path: Path) -> None:
    model = make(name)
    model.set_attn_implementation("eager")
    host, _, _ = load(saved(model, tmp_path))
    host.require_open_blocks(tokens_move=False)
    prefix = host.num_prefix_tokens
    with torch.inference_mode():
        seen = model(picture(), output_attentions=True).attentions
        names = ("class_attention", "received_attention", "cumulative_attention")
        _, found = host.look(picture(), names, form)
        received = [weights.mean(2)[:, :, prefix:] for weights in seen]
        assert torch.allclose(found["class_attention"], seen[-1][:, :, 0, prefix:].double(), atol=1e-5)
        assert torch.allclose(found["received_attention"], received[-1].double(), atol=1e-5)
        assert torch.allclose(found["cumulative_attention"], sum(received).double(), atol=1e-5)


# -- the same weights in timm -----------------------------------------------------------------------------------


def joint(state: dict[str, torch.Tensor], layer: str, part: str) -> torch.Tensor:
    return torch.cat([state[f"{layer}.{name}_proj.{part}"] for name in "qkv"])


def to_timm(name: str, state: dict[str, torch.Tensor], depth: int) -> dict[str, torch.Tensor]:
    """Return a tower's tensors under timm's names."""
    is_clip = name == "clip"
    layers, attention = ("encoder.layers", "self_attn") if is_clip else ("encoder.layer", "attention")
    norm, out = ("layer_norm", "out_proj") if is_clip else ("norm", "o_proj")
    front = "embeddings.patch_embedding" if is_clip else "embeddings.patch_embeddings.projection"
    made = {
        f"patch_embed.proj.{part}": state[f"{front}.{part}"] for part in ("weight", *(() if is_clip else ("bias",)))
    }
    if is_clip:
        made["cls_token"] = state["embeddings.class_embedding"][None, None]
        made["pos_embed"] = state["embeddings.position_embedding.weight"][None]
        made |= {f"norm_pre.{part}": state[f"pre_layrnorm.{part}"] for part in ("weight", "bias")}
    else:
        made["cls_token"], made["pos_embed"] = state["embeddings.cls_token"], state["embeddings.position_embeddings"]
        if "embeddings.register_tokens" in state:
            made["reg_token"] = state["embeddings.register_tokens"]
            # timm adds positions to patches alone here, and holds the class token with its own
            made["cls_token"] = made["cls_token"] + made["pos_embed"][:, :1]
            made["pos_embed"] = made["pos_embed"][:, 1:]
    for index in range(depth):
        old, new = f"{layers}.{index}", f"blocks.{index}"
        for part in ("weight", "bias"):
            made[f"{new}.attn.qkv.{part}"] = joint(state, f"{old}.{attention}", part)
            made[f"{new}.attn.proj.{part}"] = state[f"{old}.{attention}.{out}.{part}"]
            for which in ("1", "2"):
                made[f"{new}.norm{which}.{part}"] = state[f"{old}.{norm}{which}.{part}"]
                made[f"{new}.mlp.fc{which}.{part}"] = state[f"{old}.mlp.fc{which}.{part}"]
        if not is_clip:
            for which in ("1", "2"):
                made[f"{new}.ls{which}.gamma"] = state[f"{old}.layer_scale{which}.lambda1"]
    final = "post_layernorm" if is_clip else "layernorm"
    return made | {f"norm.{part}": state[f"{final}.{part}"] for part in ("weight", "bias")}


FORMS = {
    "clip": ("vit_base_patch16_clip_quickgelu_224", {"hidden_act": "quick_gelu"}),
    "dinov2": ("vit_small_patch14_dinov2", {}),
    "dinov2-registers": ("vit_small_patch14_reg4_dinov2", {}),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_timm_and_transformers_give_the_same_tokens(name: str, feature_layer: int, tmp_path: Path) -> None:
    kind, words = FORMS[name]
    model = make(name, **words)
    ratio = 2
    size = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": ratio}
    vit = timm.create_model(kind, num_classes=0, **size).double().eval()
    for block in vit.blocks:  # transformers' default is 1e-5 in CLIP and 1e-6 in DINOv2
        block.norm1.eps = block.norm2.eps = model.config.layer_norm_eps
    vit.norm.eps = model.config.layer_norm_eps
    if name == "clip":
        vit.norm_pre.eps = model.config.layer_norm_eps
    vit.load_state_dict(to_timm(name, model.state_dict(), 3), strict=True)
    ours = TransformersHost(model, name=name, feature_layer=feature_layer)
    theirs = TimmHost(vit, name=kind, feature_layer=feature_layer)
    assert ours.site == theirs.site
    assert ours.num_prefix_tokens == theirs.num_prefix_tokens
    names = ("class_attention", "keys", "attention_output", "class_query", "cumulative_attention")
    with torch.inference_mode():
        assert torch.allclose(ours(picture()), theirs(picture()), atol=1e-11)
        (tokens, found), (others, expected) = (host.look(picture(), names, attend) for host in (ours, theirs))
        assert torch.allclose(tokens, others, atol=1e-11)
        for feature in names:
            assert torch.allclose(found[feature], expected[feature], atol=1e-11), feature


# -- folders ----------------------------------------------------------------------------------------------------


def test_a_recipe_that_names_a_folder_takes_the_folders_weights(tmp_path: Path) -> None:
    """As `search` writes the winner's: the host of that graph, and not one of random weights."""
    folder = saved(make("siglip"), tmp_path / "host")
    found = api.export("matryoshka", preset="pooling", backbone=folder, budget=4, out=tmp_path / "found").manifest
    asked = msgspec.structs.replace(found.recipe.defaults, backbone=folder)
    recipe = winner_recipe(found, found.buckets[0], asked=asked)
    (tmp_path / "r.toml").write_text(recipe_text(recipe, said="x"), encoding="utf-8")
    again = api.export(recipe=tmp_path / "r.toml", out=tmp_path / "again").manifest
    assert again.backbone_weights == found.backbone_weights
    assert again.backbone_weights is not None
    assert again.backbone_weights.kind == "file"
    asked = msgspec.structs.replace(asked, backbone_weights="random")
    (tmp_path / "r.toml").write_text(recipe_text(winner_recipe(found, found.buckets[0], asked=asked), said="x"))
    assert 'backbone_weights = "random"' in (tmp_path / "r.toml").read_text()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_whole_model_in_shards_serves_with_its_image_tower(kind: str, tmp_path: Path) -> None:
    text = {**PERCEPTRON, "vocab_size": 50000}
    words = {"vision_config": PERCEPTRON, "text_config": {key: text[key] for key in text if "size" not in key[-5:]}}
    words["text_config"] |= {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 50000, "num_hidden_layers": 1}
    title = {"clip": "CLIP", "siglip": "Siglip"}[kind]
    config = getattr(transformers, f"{title}Config")(**words)
    model = shake(getattr(transformers, f"{title}Model")(config))
    host, origin, notes = load(saved(model, tmp_path, max_shard_size="100KB"))
    with torch.inference_mode():
        expected = last_of(model.vision_model, picture())[:, host.num_prefix_tokens :]
        assert torch.allclose(host(picture()), expected, atol=1e-6)
    assert "tensors that are no part of the image tower" in notes[0]
    assert origin.layout == f"transformers {kind}_vision_model"


def classifying(name: str) -> Any:
    if name == "dinov2":
        config = transformers.Dinov2Config(**TOWERS["dinov2"][2], num_labels=7)
        return shake(transformers.Dinov2ForImageClassification(config))
    title = {"clip": "CLIP", "siglip": "Siglip"}[name]
    config = getattr(transformers, f"{title}Config")(vision_config=PERCEPTRON, num_labels=7)
    return shake(getattr(transformers, f"{title}ForImageClassification")(config))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2"])
def test_a_classifiers_folder_serves_with_its_tower_and_its_logits(name: str, tmp_path: Path) -> None:
    model = classifying(name)
    folder = saved(model, tmp_path)
    host, _, notes = load(folder)
    tower = model.dinov2 if name == "dinov2" else model.vision_model
    with torch.inference_mode():
        expected = last_of(tower, picture())[:, host.num_prefix_tokens :]
        assert torch.allclose(host(picture()), expected, atol=1e-6)
        assert "2 tensors" in notes[0]
        host, _, notes = load(folder, keep_head=True)
        assert (host.num_classes, notes) == (7, [])
        logits = model(picture()).logits
        assert torch.allclose(host.classifier(picture()), logits, atol=1e-6)
        own, linear = split_classifier(model)
        host = TransformersHost(own, name="mine", feature_layer=-1, linear=linear)
        assert torch.allclose(host.classifier(picture()), logits, atol=1e-12)


def test_a_folder_with_a_configuration_alone_has_random_weights(tmp_path: Path) -> None:
    make("siglip").config.save_pretrained(tmp_path)
    one, origin, notes = load(str(tmp_path), seed=3)
    two, _, _ = load(str(tmp_path), seed=3)
    other, _, _ = load(str(tmp_path), seed=4)
    assert (origin.kind, origin.seed, len(origin.sha256)) == ("random", 3, 64)
    assert "holds a configuration and no weights: they are random" in notes[0]
    with torch.inference_mode():
        assert torch.equal(one(picture()), two(picture()))
        assert not torch.allclose(one(picture()), other(picture()))


def test_images_are_prepared_as_the_folder_says(tmp_path: Path) -> None:
    folder = saved(make("dinov2"), tmp_path)
    assert load(folder)[0].preprocess.mean[0] == pytest.approx(0.485)
    told = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3], "resample": 2, "do_center_crop": True}
    told |= {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told), encoding="utf-8")
    found = load(folder)[0].preprocess
    assert (found.mean, found.std, found.interpolation) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0), "bilinear")
    assert (found.size, found.crop) == (64, 0.875)


@pytest.mark.parametrize(
    ("edit", "error", "told"),
    [
        (lambda raw: raw.update(model_type="siglip2"), InvalidSpec, r"variable resolution .* model_type siglip, and"),
        (lambda raw: raw.update(model_type="swin"), UnknownName, r"'swin'.*dinov2_with_registers.*SigLIP 2"),
        (lambda raw: raw.pop("model_type"), InvalidSpec, "names no model_type"),
        (lambda raw: raw.update(num_attention_heads=5), InvalidSpec, r"hidden_size=32 .* num_attention_heads=5"),
        (lambda raw: raw.update(patch_size=[16, 8]), InvalidSpec, r"patch_size of .* is \[16, 8\]"),
        (lambda raw: raw.update(hidden_size=48), WeightsError, "do not fit"),
        (lambda raw: raw.update(num_hidden_layers=4), WeightsError, r"\d+ missing: encoder.layer.3"),
        (lambda raw: raw.update(num_hidden_layers=2), WeightsError, r"\d+ not known: encoder.layer.2"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(edit: Any, error: Any, told: str, tmp_path: Path) -> None:
    folder = saved(make("dinov2"), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    edit(raw)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(error, match=told):
        load(folder)


def test_folders_that_are_none_are_refused(tmp_path: Path) -> None:
    assert not is_model_folder("vit_small_patch16_224")
    assert not is_model_folder("none")
    assert is_model_folder(str(tmp_path))
    with pytest.raises(InvalidSpec, match=r"has no config\.json"):
        load(str(tmp_path))
    for text in ("{broken", "[" * 150_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InvalidSpec, match=r"config\.json cannot be read as JSON"):
            load(str(tmp_path))


def test_what_a_tower_has_not_is_refused(tmp_path: Path) -> None:
    folder = saved(make("dinov3"), tmp_path)
    host, _, _ = load(folder)
    with pytest.raises(InvalidSpec, match="DINOv3 with rotary positions, which would have to move"):
        host.require_open_blocks(tokens_move=True)
    with pytest.raises(InvalidSpec, match="has no classifier"):
        load(folder, keep_head=True)
    with pytest.raises(InvalidSpec, match="give --backbone FOLDER"):
        load(folder, weights="pretrained")
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with pytest.raises(InvalidSpec, match=r"'mine' is a CLIPTextModel of transformers; .*Dinov2Model"):
        TransformersHost(transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)), name="mine", feature_layer=-1)


@pytest.mark.parametrize("row", [row for row in read_backbones(data_path("export", "backbones.toml")) if row.config])
def test_listed_towers_are_what_their_configurations_make(row: Any) -> None:
    kinds = {"clip_vision_model": "CLIPVisionConfig", "siglip_vision_model": "SiglipVisionConfig"}
    kinds |= {"dinov2": "Dinov2Config", "dinov2_with_registers": "Dinov2WithRegistersConfig"}
    config = getattr(transformers, kinds.get(row.config["model_type"], "DINOv3ViTConfig")).from_dict(row.config)
    assert row.library == "transformers"
    assert (row.embed_dim, row.depth) == (config.hidden_size, config.num_hidden_layers)
    assert (row.image_size, row.patch_size) == (config.image_size, config.patch_size)
    prefix = (row.family not in ("SigLIP", "SigLIP 2")) + getattr(config, "num_register_tokens", 0)
    assert row.num_prefix_tokens == prefix
