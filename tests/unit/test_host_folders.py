"""Folders of image towers as people hold them: how their processors prepare images, and configurations that are odd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from PIL import Image  # noqa: E402 - torch first, or skip

import edgecomp  # noqa: E402
from edgecomp.backbones.assemble import assemble  # noqa: E402
from edgecomp.backbones.host import HostRequest, require_layers  # noqa: E402
from edgecomp.backbones.towers import load_tower  # noqa: E402
from edgecomp.compressors._saliency import text_likelihood  # noqa: E402
from edgecomp.errors import InvalidSpec, WeightsError  # noqa: E402
from edgecomp.images import to_pixels  # noqa: E402
from edgecomp.specs import load_recipe  # noqa: E402
from edgecomp.specs.order import Order  # noqa: E402

SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8, "intermediate_size": 64,
}  # fmt: skip


DINOV2: dict[str, Any] = {
    "model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64,
    "patch_size": 16,
}  # fmt: skip


def folder_of(path: Path, config: dict[str, Any] | None = None, **files: Any) -> str:
    for name, content in {"config": config or SIGLIP, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def load(folder: str, **words: Any) -> Any:
    request = HostRequest(name=folder, **{"weights": "random", "feature_layer": -1, "seed": 0, **words})
    return load_tower(request, listed=(), say=lambda note: None)[0]


@pytest.mark.parametrize("name", ["preprocessor_config", "processor_config"])
def test_pixels_are_those_of_the_folders_processor(name: str, tmp_path: Path) -> None:
    """A picture that is no square is stretched, as transformers' SigLIP processor does."""
    processor = transformers.SiglipImageProcessor(size={"height": 32, "width": 32}, resample=2, do_normalize=False)
    told = json.loads(processor.to_json_string())
    folder = folder_of(tmp_path, **{name: told if name.startswith("pre") else {"image_processor": told}})
    pixels = np.random.default_rng(0).integers(0, 255, (10, 20, 3), np.uint8).repeat(6, 0).repeat(6, 1)
    image = Image.fromarray(pixels)
    expected = np.asarray(processor(image, return_tensors="np")["pixel_values"])
    got = to_pixels(image, load(folder).preprocess, "float32")
    assert got.shape == expected.shape == (1, 3, 32, 32)
    np.testing.assert_allclose(got, expected, atol=1.5 / 255)  # torchvision's tensors round once less than Pillow


@pytest.mark.parametrize(("shortest", "crop"), [(36, 32), (37, 32), (73, 64), (64, 64)])
@pytest.mark.parametrize("sides", [(101, 67), (67, 101), (120, 83), (90, 90)])
def test_the_centre_is_cut_where_transformers_cuts_it(
    shortest: int, crop: int, sides: tuple[int, int], tmp_path: Path
) -> None:
    """Half a pixel is rounded down there, and the shorter side becomes what the processor says, never one less."""
    processor = transformers.BitImageProcessor(
        size={"shortest_edge": shortest}, crop_size={"height": crop, "width": crop}, resample=2
    )
    folder = folder_of(
        tmp_path, {**DINOV2, "image_size": crop}, preprocessor_config=json.loads(processor.to_json_string())
    )
    down, across = (np.linspace(0, 255, side) for side in sides)
    ramps = np.stack([*np.meshgrid(down, across, indexing="ij"), np.zeros(sides)], -1)
    image = Image.fromarray(ramps.astype(np.uint8))
    expected = np.asarray(processor(image, return_tensors="np")["pixel_values"])
    got = to_pixels(image, load(folder).preprocess, "float32")
    np.testing.assert_allclose(got, expected, atol=2 / 255 / 0.26)


def test_a_processor_of_another_size_is_told(tmp_path: Path) -> None:
    told = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
    folder = folder_of(tmp_path, DINOV2, preprocessor_config=told)
    notes: list[str] = []
    load_tower(HostRequest(name=folder, weights="random", feature_layer=-1, seed=0), listed=(), say=notes.append)
    assert notes == [
        "preprocessor_config.json of the backbone makes squares of 32 pixels, and 64 are taken here (--image-size)"
    ]


def test_a_folder_without_a_processor_is_prepared_as_its_family_is(tmp_path: Path) -> None:
    assert load(folder_of(tmp_path)).preprocess.stretch


@pytest.mark.parametrize(
    ("told", "text"),
    [
        ({"rescale_factor": 1 / 127.5}, r"rescale_factor=0\.0078"),
        ({"do_rescale": False}, "rescale_factor=1"),
        ({"resample": 0}, "resample=0"),
        ({"do_resize": False}, "resample=None"),
        ({"image_mean": [0.5, float("nan"), 0.5]}, r"image_mean=\[0\.5, nan, 0\.5\]"),
        ({"image_mean": 0.5}, r"image_mean=0\.5"),
        ({"image_std": [0, 1, 1]}, r"image_std=\[0"),
        ({"size": {"height": 32, "width": 48}}, "size={'height': 32, 'width': 48}"),
        ({"size": {"longest_edge": 32}}, "size={'longest_edge': 32}"),
        ({"size": {"shortest_edge": 32}, "do_center_crop": False}, "do_center_crop=False"),
        ([], r"preprocessor_config.json holds '\[\]'"),
    ],
)
def test_what_cannot_be_prepared_is_refused(told: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match=text):
        load(folder_of(tmp_path, preprocessor_config=told))


def test_odd_configurations(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match=r"vision_config of .* is None"):
        load(folder_of(tmp_path, {"model_type": "clip", "vision_config": None}))
    with pytest.raises(InvalidSpec, match="num_channels=1"):
        load(folder_of(tmp_path, {**SIGLIP, "num_channels": 1}))
    short = {"model_type": "siglip", "architectures": ["SiglipForImageClassification"]}
    short["vision_config"] = {"num_hidden_layers": 1, "image_size": 32, "patch_size": 16}  # type: ignore[assignment]
    assert load(folder_of(tmp_path, short), keep_head=True).linear.in_features == 768
    with pytest.raises(InvalidSpec, match="empty has 0 blocks"):
        require_layers("empty", 0, -1, (), keep_head=False)


def test_patches_of_text_leave_out_what_is_left_over() -> None:
    """A 70-pixel image in patches of 16 has 4 x 4 of them, those of its first 64 pixels."""
    pixels = torch.rand(1, 3, 70, 70, generator=torch.Generator().manual_seed(0))
    found = text_likelihood(pixels, 16)
    assert found.shape == (1, 16)
    torch.testing.assert_close(found[:, :3], text_likelihood(pixels[..., :66, :66], 16)[:, :3])


def test_what_reads_the_class_token_says_so(tmp_path: Path) -> None:
    order = Order(recipe=load_recipe("prumerge"), backbone=folder_of(tmp_path), backbone_weights="random")
    with pytest.raises(InvalidSpec, match=r"prumerge reads the class token, and .* has no class token"):
        assemble(order)


def test_a_module_for_another_grid_than_its_host_gives_is_refused(tmp_path: Path) -> None:
    module = edgecomp.compressor("tokenpacker", preset="smoke", embed_dim=32)
    order = Order(
        recipe=load_recipe("tokenpacker"), compressor=module, backbone=folder_of(tmp_path), backbone_weights="random"
    )
    with pytest.raises(InvalidSpec, match="TokenPacker given was made for 36 tokens, and 16 go in here"):
        assemble(order)


def test_numbers_of_python_and_numpy() -> None:
    module = edgecomp.compressor("perceiver", preset="smoke", grid=np.int64(4), queries=np.int64(4), depth=np.int64(1))
    assert (module.budget.tokens_in, module.budget.tokens_out, module.params.depth) == (16, 4, 1)
    for words, text in (
        ({"grid": "24"}, "grid='24' is no whole number"),
        ({"seed": -1}, "seed -1 is not between"),
        ({"grid": 5, "method": "lookupvit", "preset": "smoke"}, "params.tokens=25 was set, and lookup"),
        ({"method": None}, "method=None is no name"),
    ):
        with pytest.raises(InvalidSpec, match=text):
            edgecomp.compressor(**{"method": "perceiver", **words})  # type: ignore[arg-type]


def test_altered_modules_are_refused() -> None:
    recipe = load_recipe("perceiver")
    meta = edgecomp.compressor("perceiver", preset="smoke").to("meta")
    with pytest.raises(WeightsError, match=r"'media_embeds' of Perceiver.* is on the meta device"):
        assemble(Order(recipe=recipe, compressor=meta))
    grown = edgecomp.compressor("perceiver", preset="smoke")
    grown.lora = torch.nn.Linear(2, 2)
    with pytest.raises(WeightsError, match=r"lora\.weight.*merge what was put into it"):
        assemble(Order(recipe=recipe, compressor=grown))


def test_prumerge_under_autocast() -> None:
    module = edgecomp.compressor("prumerge", preset="smoke-fixed")
    inputs = [torch.randn(spec.shape) for spec in module.input_specs(1)]
    with torch.autocast("cpu", torch.bfloat16):
        assert module(*inputs)[0].isfinite().all()
