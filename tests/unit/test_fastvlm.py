"""FastVLM: the layouts of Apple, timm and transformers, of training and of inference, and what is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
from safetensors.torch import load_file, save_file  # noqa: E402 - torch first, or skip

from edgecomp import api  # noqa: E402
from edgecomp.compressors.fastvlm import FastVLM  # noqa: E402
from edgecomp.errors import InvalidSpec, WeightsError  # noqa: E402
from edgecomp.specs import Site, TokenBudget, load_recipe  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden" / "fastvithd" / "s64_inference.safetensors"


def small_trunk(*, inference_mode):
    """timm's class in the form of `fastvit_mci3`, small, with statistics that training would leave."""
    from timm.layers import LayerNorm2d
    from timm.models.fastvit import FastVit, RepConditionalPosEnc

    position = partial(RepConditionalPosEnc, spatial_shape=(7, 7))
    torch.manual_seed(0)
    model = FastVit(
        layers=(2, 1, 1, 1, 1), embed_dims=(8, 8, 16, 32, 32), mlp_ratios=(2,) * 5, se_downsamples=(False,) * 5,
        downsamples=(False, True, True, True, True), pos_embs=(None, None, None, position, position), num_classes=0,
        token_mixers=("repmixer",) * 3 + ("attention",) * 2, norm_layer=partial(LayerNorm2d, eps=1e-5),
        lkc_use_act=True, stem_use_scale_branch=False, inference_mode=inference_mode,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape)
                scaled = 0.3 * noise if tensor.ndim > 1 else 1 + 0.3 * noise if "weight" in name else 0.3 * noise
                tensor.copy_(scaled.abs() + 0.5 if "running_var" in name else scaled)
    return model


def load(weights, image_size):
    recipe = load_recipe("fastvlm")
    params = FastVLM.parse_params(FastVLM.infer_params(weights, FastVLM.Params()), method="fastvlm")
    tokens = (image_size // 64) ** 2
    module = FastVLM(params, Site("encoder", image_size=image_size), TokenBudget(16 * tokens, tokens)).eval()
    return module, module.load_original(weights, unread=tuple(recipe.unread))


@pytest.mark.parametrize("inference_mode", [True, False], ids=["inference", "training"])
def test_timms_trunk_gives_the_same_tokens(inference_mode):
    """Branches for training are summed into one kernel each; timm runs them side by side."""
    trunk = small_trunk(inference_mode=inference_mode)
    weights = {name: value.clone() for name, value in trunk.state_dict().items() if not name.startswith("head.")}
    module, layout = load(weights, 128)
    assert layout == "timm"
    assert module.params.depths == (2, 1, 1, 1, 1)
    image = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = trunk.forward_features(image).flatten(2).transpose(1, 2)
        for one in (module, module.reference()):
            (got,) = one(image)
            assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5


def whole_model(kind):
    """A whole model's checkpoint, the trunk from Apple's code or timm's, with tensors that are the language model's."""
    projector = {"0.weight": (20, 64), "0.bias": (20,), "1.weight": (20, 20), "1.bias": (20,)}
    made = {key: torch.randn(shape, generator=torch.Generator().manual_seed(2)) for key, shape in projector.items()}
    if kind == "apple":
        trunk = {k.removeprefix("weight."): v.clone() for k, v in load_file(GOLDEN).items() if k.startswith("weight.")}
        named = {f"vision_tower.vision_tower.model.{key}": value for key, value in trunk.items()}
        named |= {f"mm_projector.{2 * int(key[0])}{key[1:]}": value for key, value in made.items()}
        language = "model.layers"
    else:
        state = small_trunk(inference_mode=True).state_dict()
        named = {f"vision_tower.timm_model.{key}": value.clone() for key, value in state.items()}
        named |= {f"multi_modal_projector.linear_{1 + int(key[0])}{key[1:]}": value for key, value in made.items()}
        language = "model.language_model.layers"
    whole = {f"model.{key}": value for key, value in named.items()}
    return whole | {f"{language}.{n}.mlp.{k}.weight": torch.zeros(1) for n in range(100) for k in range(20)}


@pytest.mark.parametrize("kind", ["apple", "timm"])
def test_a_whole_models_checkpoint_is_loaded_with_its_projector(kind, tmp_path):
    save_file(whole_model(kind), tmp_path / "model.safetensors")
    words = {"preset": "smoke", "weights": tmp_path / "model.safetensors", "params": {"head_dim": 32}}
    report = api.export("fastvlm", out=tmp_path / "bundle", **words)
    assert report.manifest.weights.layout == kind
    (told,) = [note for note in report.manifest.notes if note.startswith("weights in the layout")]
    assert f"{'model.layers' if kind == 'apple' else 'model.language_model'} 2000" in told
    assert report.manifest.params["projector_dim"] == 20
    assert list(report.manifest.params["widths"]) == [8, 8, 16, 32, 32]
    assert report.manifest.buckets[0].outputs[0].shape == (1, 4, 20)
    assert report.parity


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"image_size": 500}, "image size 500 is not a multiple of 64.*the nearest is 512"),
        ({"image_size": 1600}, "625 rows of an image of 1600 pixels.*: image sizes 64, 128, 192, .*, 1472, 1536$"),
        ({"budget": 64}, "1024 pixels give 256 tokens, not a budget of 64; --image-size 512 gives that"),
        ({"preset": "trunk", "output": "logits"}, "no pooled embedding.*params.num_classes"),
        ({"preset": "smoke", "params": {"depths": [1, 1]}}, "2 depths and 5 widths"),
        ({"preset": "smoke", "params": {"depths": [1], "widths": [8]}}, "1 stages do not make one token of 64 pixels"),
        ({"preset": "smoke", "params": {"widths": [4, 6, 8, 8, 16]}}, "width 6 is not a multiple of 4"),
        ({"preset": "smoke", "params": {"head_dim": 3}}, "width 16 is not a multiple of head_dim=3"),
        ({"backbone": "vit_small_patch16_224"}, "fastvlm stands encoder, not after a host"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(words, match, tmp_path):
    with pytest.raises(InvalidSpec, match=match):
        api.export("fastvlm", out=tmp_path / "bundle", **words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["conv_exp.se.reduce.bias", "convffn.conv.bn.running_mean"])
def test_what_is_missing_is_named(missing, tmp_path):
    weights = {key: value for key, value in whole_model("apple").items() if missing not in key}
    save_file(weights, tmp_path / "model.safetensors")
    words = {"preset": "smoke", "weights": tmp_path / "model.safetensors", "params": {"head_dim": 32}}
    with pytest.raises(WeightsError, match=missing.replace(".", r"\.")):
        api.export("fastvlm", out=tmp_path / "bundle", **words)
