"""`api.export` with what a user brings: modules, trained compressors, checkpoints, camera frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from safetensors.torch import save_file  # noqa: E402 - torch first, or skip
from torch import nn  # noqa: E402

from edgecomp import api  # noqa: E402
from edgecomp.bundle import WEIGHTS, open_bundle  # noqa: E402
from edgecomp.compressors import compressor_class  # noqa: E402
from edgecomp.errors import InvalidSpec, UnknownName  # noqa: E402
from edgecomp.images import read_image, to_pixels  # noqa: E402
from edgecomp.resources import photograph_path  # noqa: E402
from edgecomp.runners import Array, open_runner  # noqa: E402
from edgecomp.specs import load_recipe  # noqa: E402


def infer(model: Path, **inputs: Array) -> dict[str, Array]:
    with open_runner("onnxruntime", model, threads=1) as runner:
        return runner.infer(inputs)


@torch.no_grad()
def trained(module: nn.Module, seed: int) -> nn.Module:
    """Stand in for training: values that no initialisation of edgecomp gives."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_own_timm_model_with_a_fine_tuned_head(tmp_path: Path) -> None:
    """The host is the user's; its head stays on; the plain graph shares the weights."""
    model = trained(timm.create_model("test_vit", img_size=64, num_classes=5), 1)
    before, image = snapshot(model), torch.randn(1, 3, 64, 64)
    logits = model(image)
    report = api.export("perceiver", preset="smoke-host", backbone=model, with_plain=True, out=tmp_path / "out")

    assert list(snapshot(model)) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert isinstance(model.head, nn.Linear)
    assert torch.equal(model(image), logits)

    with torch.inference_mode():
        tokens = model.forward_features(image)[:, 1:]
    plain = infer(report.bundle / "plain.onnx", image=image.numpy())["tokens"]
    np.testing.assert_allclose(plain, tokens.numpy(), atol=1e-4)
    manifest = report.manifest
    assert manifest.backbone_weights is not None
    assert (manifest.backbone_weights.kind, manifest.backbone_weights.name) == ("module", "VisionTransformer")
    assert len(manifest.backbone_weights.sha256) == 64

    host_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert report.weights_bytes < 4 * manifest.parameters + host_bytes / 4  # one host, not two


def test_own_model_of_another_size_or_kind(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="Sequential"):
        api.export("perceiver", backbone=nn.Sequential(nn.Linear(2, 2)), out=tmp_path / "out")
    model = timm.create_model("test_vit", img_size=32)
    with pytest.raises(InvalidSpec, match=r"64.*32"):
        api.export("perceiver", preset="smoke-host", image_size=64, backbone=model, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_own_model_that_is_not_square(tmp_path: Path) -> None:
    wide = timm.create_model("test_vit", img_size=(64, 96))
    with pytest.raises(InvalidSpec, match="takes images of 64 x 96 pixels; hosts take square ones"):
        api.export("tome", backbone=wide, out=tmp_path / "wide")


def test_graph_that_computes_something_else_is_a_failed_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1, and nothing is written."""
    from edgecomp.api import _export
    from edgecomp.cli import main

    def spoil(*words: Any) -> Any:
        rows = check_bucket(*words)
        return tuple(msgspec.structs.replace(row, failures=("one value differs",)) for row in rows)

    check_bucket = _export.check_bucket
    monkeypatch.setattr(_export, "check_bucket", spoil)
    out = tmp_path / "out"
    monkeypatch.setattr(
        "sys.argv", ["edgecomp", *["export", "--method", "fastervlm", "--preset", "smoke", "--out"], str(out)]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "ONNX Runtime does not give what the original gives: model.m5.b1.onnx" in capsys.readouterr().err
    assert not out.exists()


def test_own_trained_compressor(tmp_path: Path) -> None:
    cls = compressor_class("lookupvit")
    compressor = trained(cls.from_recipe(load_recipe("lookupvit"), 9, preset="smoke"), 2)
    before, image = snapshot(compressor), torch.randn(2, 3, 64, 64)
    report = api.export(compressor, batch=[2], out=tmp_path / "out", preset="smoke")
    assert all(torch.equal(tensor, before[name]) for name, tensor in compressor.state_dict().items())
    with torch.inference_mode():
        (expected,) = compressor(image)
    got = infer(report.bundle / "model.m9.b2.onnx", image=image.numpy())["compressed"]
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-4)
    assert report.manifest.weights.kind == "module"
    assert [bucket.budget.tokens_out for bucket in report.manifest.buckets] == [9]


def test_class_that_is_no_method(tmp_path: Path) -> None:
    cls = compressor_class("lookupvit")

    class Mine(cls):  # type: ignore[misc, valid-type]
        pass

    mine = Mine.from_recipe(load_recipe("lookupvit"), 9, preset="smoke")
    with pytest.raises(InvalidSpec, match="Mine is no known method's class"):
        api.export(mine, out=tmp_path / "out")


@pytest.mark.parametrize("classes", [7])
def test_number_of_classes_follows_the_head_of_the_weights(tmp_path: Path, classes: int) -> None:
    cls = compressor_class("lookupvit")
    model = cls.from_recipe(load_recipe("lookupvit"), 4, preset="smoke", output="logits", num_classes=classes)
    trained(model, 3)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    common = {"preset": "smoke", "output": "logits", "weights": tmp_path / "w.safetensors"}
    report = api.export("lookupvit", budget=[4], out=tmp_path / "out", **common)
    assert report.manifest.params["num_classes"] == classes
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        (expected,) = model(image)
    got = infer(report.bundle / "model.m4.b1.onnx", image=image.numpy())["logits"]
    assert got.shape == (1, classes)
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-4)
    with pytest.raises(InvalidSpec, match="num_classes=10 was set, and the weights say 7"):
        api.export("lookupvit", params={"num_classes": 10}, out=tmp_path / "other", **common)


def test_camera_frames_give_what_normalised_pixels_give(exported: Path, tmp_path: Path) -> None:
    """uint8 takes raw pixels; float32 takes the same after the recipe's preprocessing."""
    report = api.export("lookupvit", preset="smoke", budget=[9], input_dtype="uint8", out=tmp_path / "out")
    (bucket,) = report.manifest.buckets
    assert [str(spec) for spec in bucket.inputs] == ["image uint8[1, 64, 64, 3]"]
    preprocess = report.manifest.preprocess
    assert preprocess is not None
    photograph = read_image(photograph_path())
    frames = infer(report.bundle / bucket.model, image=to_pixels(photograph, preprocess, "uint8"))
    pixels = infer(exported / bucket.model, image=to_pixels(photograph, preprocess, "float32"))
    np.testing.assert_allclose(frames["compressed"], pixels["compressed"], atol=1e-4)
    assert float(np.std(frames["compressed"])) > 0.1
    ran = api.run(report.bundle, photograph_path())
    np.testing.assert_array_equal(ran.outputs["compressed"], frames["compressed"])


def test_budgets_share_one_weights_file(exported: Path, tmp_path: Path) -> None:
    one = api.export("lookupvit", preset="smoke", budget=[9], out=tmp_path / "one")
    both = open_bundle(exported).file(WEIGHTS).size
    assert len(open_bundle(exported).manifest.buckets) == 2
    assert both < 1.05 * one.weights_bytes
    assert one.weights_bytes == pytest.approx(4 * one.manifest.parameters, rel=0.1)
    assert all((exported / f"model.m{m}.b1.onnx").stat().st_size < 60_000 for m in (4, 9))


def test_media_become_an_axis_of_the_image(tmp_path: Path) -> None:
    report = api.export("perceiver", preset="smoke-host", params={"images": 2}, batch=[3], out=tmp_path / "out")
    (bucket,) = report.manifest.buckets
    assert [str(spec) for spec in bucket.inputs] == ["image float32[3, 2, 3, 64, 64]"]
    assert [str(spec) for spec in bucket.outputs] == ["latents float32[3, 2, 8, 64]"]
    image = np.random.default_rng(0).standard_normal((3, 2, 3, 64, 64), dtype=np.float32)
    whole = infer(report.bundle / bucket.model, image=image)["latents"]
    turned = infer(report.bundle / bucket.model, image=image[::-1, ::-1].copy())["latents"]
    np.testing.assert_allclose(turned[::-1, ::-1], whole, atol=1e-4)  # no position table: images are equal
    ran = api.run(report.bundle, photograph_path())
    np.testing.assert_allclose(ran.outputs["latents"][0, 0], ran.outputs["latents"][2, 1], atol=1e-4)


def test_idefics2_checkpoint_of_transformers(tmp_path: Path) -> None:
    """Made by transformers' own module, saved as safetensors, exported, and equal to transformers' output."""
    pytest.importorskip("transformers")
    from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
    from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

    config = Idefics2PerceiverConfig(
        hidden_size=32,
        resampler_n_latents=16,
        resampler_depth=2,
        resampler_n_heads=4,
        resampler_head_dim=8,
        num_key_value_heads=2,
    )
    config._attn_implementation = "eager"
    original = trained(Idefics2PerceiverResampler(config), 5)
    save_file(original.state_dict(), tmp_path / "idefics2.safetensors")
    report = api.export(
        "perceiver",
        backbone="none",
        weights=tmp_path / "idefics2.safetensors",
        params={"head_dim": 8, "tokens": 50, "mask": True},
        out=tmp_path / "out",
    )
    manifest = report.manifest
    assert (manifest.preset, manifest.weights.layout) == ("idefics2", "idefics2")
    assert (manifest.params["num_heads"], manifest.params["kv_heads"], manifest.params["depth"]) == (4, 2, 2)
    (bucket,) = manifest.buckets
    assert bucket.budget.tokens_out == 16

    tokens, mask = torch.randn(1, 50, 32), torch.ones(1, 50, dtype=torch.bool)
    for length in (50, 31):
        mask[:, length:] = False
        with torch.inference_mode():
            expected = original(tokens, mask)
        got = infer(report.bundle / bucket.model, tokens=tokens.numpy(), context_mask=mask.numpy())["latents"]
        np.testing.assert_allclose(got, expected.numpy(), atol=1e-4)


def test_names_are_refused_before_torch_is_asked(tmp_path: Path) -> None:
    for words, text in (
        ({"method": "lookupvitt"}, "did you mean 'lookupvit'"),
        ({"method": "lookupvit", "precision": "int4"}, "no precision 'int4'"),
        ({"method": "lookupvit", "output": "boxes"}, "'boxes'"),
    ):
        with pytest.raises(UnknownName, match=text):
            api.export(out=tmp_path / "out", **words)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_progress_is_told(tmp_path: Path) -> None:
    lines: list[str] = []
    api.export("perceiver", preset="smoke", budget=[4], out=tmp_path / "out", progress=lines.append)
    assert lines[0] == "loading torch"
    assert "exporting model.m4.b1.onnx" in lines
    assert lines[-1] == "checking model.m4.b1.onnx in ONNX Runtime"
