"""Checkpoints that anybody may have made are read as fp32, and loaded with nothing left unsaid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402 - torch first, or skip
from torch import nn  # noqa: E402

from edgecomp.compressors._checkpoint import load_exactly, read_checkpoint  # noqa: E402
from edgecomp.errors import WeightsError  # noqa: E402


def refused(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth", "bin", "ckpt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_floats_become_fp32(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    values = torch.tensor([[1.5, -2.0], [0.25, 1024.0]])  # exact in every type
    state = {"weight": values.to(dtype), "steps": torch.tensor([7])}
    path = tmp_path / f"file.{suffix}"
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    read = read_checkpoint(path)
    assert list(read) == ["weight", "steps"] or set(read) == {"weight", "steps"}
    assert read["weight"].dtype == torch.float32
    assert torch.equal(read["weight"], values)
    assert read["steps"].dtype == torch.int64


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model_state_dict": state, "optimizer": {"lr": 0.1}},
        lambda state: {"model": state},
        lambda state: {"module": state},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {**state, "epoch": 3},
        lambda state: {name: nn.Parameter(tensor) for name, tensor in state.items()},
    ],
)
def test_wrappers_are_taken_off(tmp_path: Path, wrap: object) -> None:
    state = {"a.weight": torch.ones(2, 3), "a.bias": torch.zeros(2)}
    torch.save(wrap(state), tmp_path / "x.pt")  # type: ignore[operator]
    read = read_checkpoint(tmp_path / "x.pt")
    assert set(read) == {"a.weight", "a.bias"}
    assert not any(tensor.requires_grad for tensor in read.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(tmp_path: Path, value: float) -> None:
    broken = torch.zeros(4, 5)
    broken[2, 3] = broken[0, 0] = value
    save_file({"fine": torch.zeros(2), "head.weight": broken}, tmp_path / "x.safetensors")
    assert "2 of 20 values of 'head.weight' are NaN or Inf" in refused(tmp_path / "x.safetensors")


def test_fp64_beyond_fp32(tmp_path: Path) -> None:
    save_file({"w": torch.tensor([1e300, 1.0], dtype=torch.float64)}, tmp_path / "x.safetensors")
    assert "1 of 2 values of 'w' are NaN or Inf" in refused(tmp_path / "x.safetensors")


def test_tensors_without_plain_values(tmp_path: Path) -> None:
    for name, tensor in (("sparse", torch.eye(3).to_sparse()), ("meta", torch.zeros(3, device="meta"))):
        torch.save({name: tensor}, tmp_path / "x.pt")
        assert f"'{name}' is a sparse, quantized or empty (meta) tensor" in refused(tmp_path / "x.pt")


def test_whole_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "x.pt")
    text = refused(tmp_path / "x.pt")
    assert "loading it would run torch.nn.modules.linear.Linear" in text
    assert "weights_only" not in text  # torch's own text advises to switch the check off


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    state = {"a": torch.arange(64.0), "b": torch.arange(32.0)}
    save_file(state, tmp_path / "whole.safetensors")
    torch.save(state, tmp_path / "whole.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for whole in ("whole.safetensors", "whole.pt", "old.pt"):
        content = (tmp_path / whole).read_bytes()
        path = tmp_path / f"cut{Path(whole).suffix}"
        for size in range(0, len(content) - 1, max(1, len(content) // 40)):
            path.write_bytes(content[:size])
            text = refused(path)
            # the old format may be cut in the name of something that it would call, and is refused for that
            assert f"{size} bytes" in text or (whole == "old.pt" and "loading it would run" in text)


def test_random_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    torch.save({"a": torch.arange(64.0)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    whole = bytearray((tmp_path / "old.pt").read_bytes())
    for _ in range(200):
        altered = bytearray(whole)
        for position in generator.integers(0, len(altered), 3):
            altered[position] = int(generator.integers(0, 256))
        (tmp_path / "x.pt").write_bytes(altered)
        try:
            read_checkpoint(tmp_path / "x.pt")
        except WeightsError as error:
            assert str(tmp_path / "x.pt") in str(error)  # noqa: PT017 - reading it may also succeed


# -- load_exactly ---------------------------------------------------------------------------------------------


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))


def test_load_exactly() -> None:
    module = small()
    state = {name: torch.randn_like(tensor) for name, tensor in module.state_dict().items()}
    extra = {"pos_embedding": torch.zeros(1), "head.weight": torch.zeros(2), "head.bias": torch.zeros(2)}
    skipped = load_exactly(module, {**state, **extra}, layout="x", unread=("pos_*", "head.*"))
    assert skipped == ("pos_embedding", "head.weight", "head.bias")
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


def test_load_exactly_keeps_the_modules_type() -> None:
    module = small().double()
    load_exactly(module, {name: tensor.float() for name, tensor in module.state_dict().items()}, layout="x")
    assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float64}


def test_load_exactly_lists_everything_and_loads_nothing() -> None:
    module = small()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    given = {"0.weight": torch.zeros(4, 3), "0.bias": torch.zeros(9), "first": torch.zeros(1), "second": torch.zeros(1)}
    with pytest.raises(WeightsError) as caught:
        load_exactly(module, given, layout="tiny")
    text = str(caught.value)
    assert "the tiny layout do not fit (4 keys given, 3 needed)" in text
    assert "1 missing: 1.weight" in text
    assert "2 not known: first, second" in text
    assert "1 of another shape: 0.bias (9,) instead of (4,)" in text
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


# -- one file for the compressor and its host -----------------------------------------------------------------


@pytest.mark.parametrize("how", ["--weights alone", "both options"])
def test_one_file_serves_compressor_and_host(tmp_path: Path, how: str) -> None:
    import timm

    from edgecomp import api
    from edgecomp.compressors import compressor_class
    from edgecomp.runners import open_runner
    from edgecomp.specs import Site, TokenBudget, load_recipe
    from edgecomp.specs.origin import file_sha256

    cls = compressor_class("perceiver")
    torch.manual_seed(3)
    host = timm.create_model("test_vit", img_size=64, num_classes=7).eval()  # with a head that is not needed
    values = {**load_recipe("perceiver").preset("smoke-host").params, "context_dim": 64, "tokens": 16, "latents": 8}
    params = cls.parse_params(values, method="perceiver")
    compressor = cls(params, Site("after", tokens_in=16, embed_dim=64), TokenBudget(16, 8)).eval()
    for parameter in compressor.parameters():
        nn.init.normal_(parameter, std=0.3)
    state = {f"compressor.{name}": tensor for name, tensor in compressor.state_dict().items()}
    state |= {f"backbone.{name}": tensor for name, tensor in host.state_dict().items()}
    path = tmp_path / "both.safetensors"
    save_file({name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state.items()}, path)

    more = {} if how == "--weights alone" else {"backbone_weights": path}
    report = api.export("perceiver", preset="smoke-host", weights=path, out=tmp_path / "out", **more)
    manifest = report.manifest
    assert manifest.weights.sha256 == file_sha256(path)
    assert manifest.backbone_weights is not None
    assert (manifest.backbone_weights.kind, manifest.backbone_weights.sha256) == ("file", file_sha256(path))

    for module in (host, compressor):  # what bfloat16 left of the values
        module.load_state_dict({name: tensor.bfloat16().float() for name, tensor in module.state_dict().items()})
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        (expected,) = compressor(host.forward_features(image)[:, 1:])
    with open_runner("onnxruntime", report.bundle / "model.m8.b1.onnx", threads=1) as runner:
        got = runner.infer({"image": image.numpy()})["latents"]
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-4)


def test_load_exactly_spells_keys_as_the_file_does() -> None:
    module = torch.nn.Linear(2, 3)
    state = {"weight": torch.zeros(3, 4), "spare": torch.zeros(1)}
    with pytest.raises(WeightsError) as caught:
        load_exactly(module, state, layout="tiny", file_keys={"weight": "layers.0.w", "spare": "layers.0.x"})
    for words in ("1 missing: bias (by edgecomp's name)", "1 not known: layers.0.x", "layers.0.w (3, 4) instead of"):
        assert words in str(caught.value)
