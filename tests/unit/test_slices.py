"""The slicing policy: grids and sizes by its formulas, inputs of a bundle, and the order of the rows that come out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

import edgecomp
from edgecomp import api
from edgecomp.bundle import Bundle, open_bundle
from edgecomp.errors import EdgecompError, InvalidSpec, RunError
from edgecomp.inputs import read_tensors
from edgecomp.report.run import describe_run
from edgecomp.serving.parts import lay_out
from edgecomp.slices import (
    NEWLINE,
    SEPARATOR,
    SlicePolicy,
    TilePolicy,
    best_size,
    choose_grid,
    cut,
    join_rows,
    order_of_rows,
    prepare_slices,
    rows_of_bucket,
)
from edgecomp.specs import TensorSpec, load_recipe
from edgecomp.specs.preprocess import Preprocess

POLICY = SlicePolicy()
TINY = SlicePolicy(resolution=56, patch=14)
SQUARE = Preprocess(56, 1.0, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((448, 448), None),  # the area of one slice
        ((300, 600), None),  # less than that, whatever the shape
        ((449, 448), (2, 1)),  # ideal 2: of (1, 2), (2, 1), (1, 3), (3, 1)
        ((450, 450), (1, 2)),  # two are equally near, and the first is taken
        ((896, 448), (2, 1)),
        ((448, 896), (1, 2)),
        ((896, 896), (2, 2)),  # ideal 4
        ((1344, 896), (3, 2)),  # ideal 6
        ((672, 1008), (2, 2)),  # ideal 4, with 3 and 5: two slices would have been as near
        ((1344, 1344), (3, 3)),  # ideal 9, and no more
        ((4000, 3000), (3, 3)),
        ((4000, 500), (8, 1)),
        ((100, 10000), (1, 6)),  # ideal 5: the longest strip of up to 6
        ((500, 100000), (1, 9)),
    ],
)
def test_grids(size: tuple[int, int], grid: tuple[int, int] | None) -> None:
    assert choose_grid(*size, POLICY) == grid


def test_the_paper_cuts_six() -> None:
    paper = SlicePolicy(resolution=336, most=6)
    assert choose_grid(1008, 672, paper) == (3, 2)
    assert choose_grid(3000, 2000, paper) == (3, 2)


def test_every_grid_of_a_count_is_weighed() -> None:
    for width in range(60, 4000, 137):
        for height in range(60, 4000, 191):
            grid = choose_grid(width, height, POLICY)
            ideal = min(math.ceil(width * height / 448**2), 9)
            if grid is None:
                assert ideal <= 1
                continue
            columns, rows = grid
            assert columns * rows in {ideal - 1, ideal, ideal + 1} - {0, 1}
            assert columns * rows <= 9
            error = abs(math.log(width / height) - math.log(columns / rows))
            for count in {ideal - 1, ideal, ideal + 1} - {0, 1}:
                others = [(c, count // c) for c in range(1, count + 1) if count % c == 0 and count <= 9]
                assert all(error <= abs(math.log(width / height) - math.log(c / r)) + 1e-12 for c, r in others)


def test_sizes() -> None:
    assert best_size(448, 448, POLICY) == (448, 448)
    assert best_size(300, 200, POLICY) == (294, 196)  # not enlarged: floored to patches
    assert best_size(300, 200, POLICY, enlarge=True) == (546, 364)  # int(448 / sqrt(1.5)) = 365, int(365 * 1.5) = 547
    assert best_size(10, 10000, POLICY) == (14, 9996)


def test_an_image_is_cut_into_what_it_is_made_of() -> None:
    """Slices laid side by side are the resized image."""
    colours = np.random.default_rng(0).integers(0, 256, (112, 168, 3), dtype=np.uint8)
    image = Image.fromarray(colours)
    sliced = cut(image, TINY)
    assert sliced.grid == (3, 2)
    assert [part.size for part in sliced.slices] == [(56, 56)] * 6
    assert sliced.overview.size == (56, 42)  # int(56 / sqrt(1.5)) = 45, int(45 * 1.5) = 67: floored to patches of 14
    rows = [np.concatenate([np.asarray(part) for part in sliced.slices[at : at + 3]], 1) for at in (0, 3)]
    np.testing.assert_array_equal(np.concatenate(rows), colours)
    small = cut(image.resize((30, 20)), TINY)
    assert small.grid is None
    assert small.slices == ()
    assert small.overview.size == (56, 42)


def test_inputs_of_a_bundle() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (100, 168, 3), dtype=np.uint8)
    padded = msgspec.structs.replace(TINY, fit="pad")
    made = prepare_slices(Image.fromarray(colours), padded, SQUARE, dtype="uint8")
    columns, rows = made.grid or (0, 0)
    assert made.count == columns * rows + 1
    assert len(made.image) == len(made.mask) == len(made.sizes) == rows_of_bucket(made.count, (1, 3, 4, 5, 7, 10))
    assert made.image.shape[1:] == (56, 56, 3)
    for sizes, mask in zip(made.sizes, made.mask.reshape(-1, 4, 4), strict=True):
        assert mask.sum() == sizes[0] * sizes[1]
        assert mask[: sizes[0], : sizes[1]].all()
    assert (made.sizes[: made.count] > 0).all()
    assert not made.mask[made.count :].any()
    floats = prepare_slices(Image.fromarray(colours), TINY, SQUARE)
    assert floats.mask[: made.count].all()
    assert floats.image.shape == (len(made.image), 3, 56, 56)
    assert floats.image.dtype == np.float32


def test_where_the_overview_stands() -> None:
    image = Image.new("RGB", (112, 56), (255, 0, 0))
    first, last = (
        prepare_slices(image, SlicePolicy(resolution=56, patch=14, overview=at), SQUARE) for at in ("first", "last")
    )  # type: ignore[arg-type]
    assert first.grid == last.grid == (2, 1)
    np.testing.assert_array_equal(first.sizes[0], last.sizes[2])
    np.testing.assert_array_equal(first.image[1:3], last.image[:2])


def test_the_order_of_rows() -> None:
    order = order_of_rows((2, 2), 2, POLICY)
    assert order.tolist() == [0, 1, 2, 3, SEPARATOR, 4, 5, NEWLINE, 6, 7, SEPARATOR, 8, 9, NEWLINE]
    last = order_of_rows((2, 1), 2, SlicePolicy(overview="last"))
    assert last.tolist() == [0, 1, SEPARATOR, 2, 3, NEWLINE, 4, 5]
    assert order_of_rows(None, 3, POLICY).tolist() == [0, 1, 2]
    latents = np.arange(5 * 2 * 3, dtype=np.float32).reshape(5, 2, 3)
    separator, newline = np.full(3, -10, np.float32), np.full(3, -20, np.float32)
    joined = join_rows(latents, order, separator=separator, newline=newline)
    assert joined.shape == (14, 3)
    np.testing.assert_array_equal(joined[4], separator)
    np.testing.assert_array_equal(joined[7], newline)
    np.testing.assert_array_equal(joined[8], latents[3, 0])
    # rows that only fill the batch are named by nothing
    filled = np.concatenate([latents, np.full((2, 2, 3), np.nan, np.float32)])
    np.testing.assert_array_equal(join_rows(filled, order, separator=separator, newline=newline), joined)


def test_six_slices_of_64_and_the_overview_are_448_tokens() -> None:
    assert len(order_of_rows((3, 2), 64, POLICY)) == 7 * 64 + 6


def test_refusals() -> None:
    with pytest.raises(InvalidSpec, match=r"12 rows .* above the largest batch of the bundle, 10; .*--batch 12"):
        rows_of_bucket(12, (1, 3, 4, 5, 7, 10))
    assert [rows_of_bucket(count, (10, 1, 3)) for count in (1, 2, 3, 4)] == [1, 3, 3, 10]
    with pytest.raises(RunError, match="0 x 5 pixels cannot be sliced"):
        choose_grid(0, 5, POLICY)
    with pytest.raises(InvalidSpec, match="patches of 14 pixels, and the encoder takes 60"):
        prepare_slices(Image.new("RGB", (9, 9)), TINY, Preprocess(60, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3))  # type: ignore[arg-type]
    with pytest.raises(RunError, match="the order names row 9, and 2 slices have 4 rows"):
        join_rows(
            np.zeros((2, 2, 3), np.float32), order_of_rows((2, 2), 2, POLICY), separator=np.zeros(3, np.float32),
            newline=np.zeros(3, np.float32),
        )  # fmt: skip


def test_a_policy_made_in_code_is_held_to_its_types() -> None:
    for words, told in (({"fit": "x"}, "fit='x': .*one of stretch, pad"), ({"most": 0}, "most=0: Expected `int` >= 1")):
        with pytest.raises(InvalidSpec, match=told):
            SlicePolicy(**words)  # type: ignore[arg-type]
    with pytest.raises(InvalidSpec, match="TilePolicy: most=10"):
        TilePolicy(most=10)
    with pytest.raises(InvalidSpec, match=r"2 rows .* batches=\(\)"):
        rows_of_bucket(2, ())


def test_the_host_decides_the_patch_and_where_nothing_is_said_the_resolution() -> None:
    pytest.importorskip("torch")
    from edgecomp.compressors import compressor_class
    from edgecomp.specs import Site

    cls, recipe = compressor_class("slice-wise"), load_recipe("slice-wise")
    host = Site("after", image_size=224, tokens_in=196, embed_dim=768)  # patches of 16
    decided = cls.parse_params({**cls.params_of_site(host), "inner_params": {"num_heads": 2}}, method="slice-wise")
    completed = cls.for_budgets(decided, [4])
    assert (completed.patch, completed.resolution) == (16, 224)
    assert "patch" not in cls.params_of_site(msgspec.structs.replace(host, tokens_in=197))  # with a class token
    for preset, side in (("resampler", 448), ("uhd", 336)):
        given = cls.parse_params(recipe.preset(preset).params, method="slice-wise")
        assert cls.for_budgets(given, [144]).resolution == side


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a tiny ViT with a resampler behind it, for one slice, and for two with their overview."""
    pytest.importorskip("torch")
    params = {"images": 1, "resolution": 56, "most": 2}
    folder = tmp_path_factory.mktemp("slices") / "bundle"
    words = {"preset": "smoke", "batch": (1, 3), "params": params, "out": folder}
    return api.export("slice-wise", **words).bundle


def test_run_slices_an_image(bundle: Path, tmp_path: Path) -> None:
    for size, rows, words in (
        ((90, 45), 3, "2 x 1 slices and an overview of a batch of 3"),
        ((40, 50), 1, "one slice"),
    ):
        Image.new("RGB", size, (9, 99, 200)).save(tmp_path / "image.png")
        report = api.run(bundle, tmp_path / "image.png")
        assert words in report.reason
        (latents,) = report.outputs.values()
        assert latents.shape == (rows, 4, 32)
    Image.new("RGB", (90, 45)).save(tmp_path / "image.png")
    with pytest.raises(InvalidSpec, match=r"3 rows .* above the largest batch of the bundle, 1"):
        api.run(bundle, tmp_path / "image.png", batch=1)


def test_positions_on_another_grid_than_the_encoders_are_refused(bundle: Path, tmp_path: Path) -> None:
    """A manifest from before the host decided, or a host with prefix tokens that were kept."""
    opened = open_bundle(bundle)
    assert opened.manifest.params["patch"] == 16
    params = {**opened.manifest.params, "patch": 32}
    buckets = tuple(
        msgspec.structs.replace(b, inputs=(*b.inputs, TensorSpec("target_sizes", (b.batch, 2), "int32", "sizes")))
        for b in opened.manifest.buckets
    )
    manifest = msgspec.structs.replace(opened.manifest, params=params, buckets=buckets)
    other = Bundle(opened.path, manifest)
    with pytest.raises(InvalidSpec, match=r"patches of 32 are 2 x 2 positions, .* hands over 16 tokens"):
        lay_out(other, Image.new("RGB", (40, 50)))


def test_load_slices_an_image_of_any_size(bundle: Path, tmp_path: Path) -> None:
    """A path, a Pillow image and an array give what `run` gives, with the order that a language model reads."""
    colours = np.random.default_rng(1).integers(0, 256, (45, 90, 3), dtype=np.uint8)
    image = Image.fromarray(colours)
    image.save(tmp_path / "image.png")
    report = api.run(bundle, tmp_path / "image.png", out=tmp_path / "rows.safetensors")
    with edgecomp.load(bundle, threads=1) as model:
        for form in (tmp_path / "image.png", image, colours):
            answer = model(form)
            assert answer.reason == report.reason == "2 x 1 slices and an overview of a batch of 3"
            np.testing.assert_allclose(answer["latents"], report.outputs["latents"], atol=1e-5)
        layout = answer.layout
        assert layout is not None
        assert (layout.grid, layout.parts) == ((2, 1), 3)
        assert layout.order.tolist() == order_of_rows((2, 1), 4, POLICY).tolist()
        assert (layout.separators.tolist(), layout.newlines.tolist()) == ([8], [13])
        assert report.layout is not None
        assert (report.layout.rows, report.layout.newlines) == (14, (13,))
        assert "14 rows in reading order, 1 newline and 1 separator among them" in describe_run(report)
        np.testing.assert_array_equal(read_tensors(tmp_path / "rows.safetensors")["layout.order"], layout.order)
        small, *others = model.infer_batch([image.resize((40, 50)), image, image.resize((50, 40))])
        assert small.reason == others[1].reason == "one slice of a batch of 1"
        np.testing.assert_array_equal(others[0]["latents"], answer["latents"])
        with pytest.raises(InvalidSpec, match=r"features were given beside a request that .* lays out"):
            model(image, features={})
    with pytest.raises(InvalidSpec, match=r"--draw shows one image as its encoder sees it, and .* takes slices"):
        api.run(bundle, tmp_path / "image.png", draw=tmp_path / "patches.png")


def test_load_takes_a_list_of_images(tmp_path: Path) -> None:
    """Where a request is several images, each is what it is by itself."""
    pytest.importorskip("torch")
    words = {"preset": "smoke-host", "budget": 8}
    two, one = (
        api.export("perceiver", params={"images": images}, out=tmp_path / str(images), **words).bundle
        for images in (2, 1)
    )
    images = [
        Image.fromarray(np.random.default_rng(at).integers(0, 256, (64, 80, 3), dtype=np.uint8)) for at in range(2)
    ]
    with edgecomp.load(two, threads=1) as several, edgecomp.load(one, threads=1) as single:
        latents = several(images)["latents"]
        assert latents.shape == (1, 2, 8, 64)
        for at, image in enumerate(images):
            np.testing.assert_allclose(latents[:, at], single(image)["latents"], atol=1e-5)
        with pytest.raises(RunError, match="takes 2 images in a request: give a list of so many"):
            several(images[0])


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"inner": "resampler-2d", "inner_params": {"images": 2}}, "inner_params.images=2: the images of a request"),
        ({"inner": "slice-wise"}, "slices are not sliced again"),
        ({"inner": "perceiver:idefics9"}, "no preset of perceiver 'idefics9'"),
        ({"inner": "evit"}, "params.inner=evit stands inside"),
        ({"inner_params": {"nonsense": 1}}, "resampler-2d:minicpm-v (inside slice-wise)"),
    ],
)
def test_methods_that_cannot_be_inside_are_refused(params: dict[str, Any], words: str) -> None:
    pytest.importorskip("torch")
    from edgecomp.compressors import compressor_class

    with pytest.raises(EdgecompError) as caught:
        compressor_class("slice-wise").from_recipe(load_recipe("slice-wise"), 9, preset="resampler", **params)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("preset", "fit", "is_said"), [("smoke", "pad", True), ("smoke", "stretch", False), ("smoke-mask", "pad", False)]
)
def test_padding_that_would_be_read_is_said(preset: str, fit: str, is_said: bool) -> None:
    pytest.importorskip("torch")
    from edgecomp.compressors import compressor_class

    recipe = load_recipe("slice-wise")
    sizes = {"tokens": 16, "context_dim": 32} if preset == "smoke" else {}
    module = compressor_class("slice-wise").from_recipe(
        recipe, recipe.rule(preset).default[-1], preset=preset, fit=fit, **sizes
    )
    assert any("takes no mask here, and reads what fills a square up" in note for note in module.remarks) == is_said


_PACKER = {"hidden_dim": 32, "num_heads": 2, "output_dim": 16, "levels": [-3, -2]}
_FORMER = {"embed_dim": 32, "num_heads": 2, "depth": 1}


@pytest.mark.parametrize(
    ("inner", "params", "budget", "backbone"),
    [
        ("attention-pruning", {}, 7, "test_vit"),
        ("fastervlm", {}, 7, "test_vit"),
        ("visionzip", {}, 7, "test_vit"),
        ("vispruner", {}, 7, "test_vit"),
        ("token-pooling", {}, 7, "test_vit"),
        ("prumerge", {}, 7, "test_vit"),
        ("tokenpacker", _PACKER, 4, "test_vit"),
        ("q-former", _FORMER, 4, "test_vit"),
        ("query-aware", {}, 7, "none"),
        ("spatial-frequency-protect", {"tokens": 16}, 7, "none"),
        ("slow-fast", {"tokens": 16}, 7, "none"),
    ],
)
def test_what_reads_more_than_tokens_is_the_same_inside(
    inner: str, params: dict[str, Any], budget: int, backbone: str
) -> None:
    torch = pytest.importorskip("torch")
    from edgecomp.backbones.assemble import assemble
    from edgecomp.specs.order import Order

    size = {"image_size": 64} if backbone != "none" else {}
    recipe, own = load_recipe(inner), dict(params)
    preset = recipe.placements["after"]
    width = assemble(Order(recipe=recipe, preset=preset, backbone=backbone, budgets=(str(budget),), params=own, **size))
    module = width.models[0]
    outer = {"inner": f"{inner}:{preset}", "inner_params": {k: v for k, v in own.items() if k != "tokens"}}
    if backbone == "none":
        site = module.compressor.site
        outer |= {"tokens": site.tokens_in, "context_dim": site.embed_dim}
    else:
        size["feature_layer"] = width.feature_layer
    sliced = assemble(
        Order(recipe=load_recipe("slice-wise"), backbone=backbone, budgets=(str(budget),), params=outer, **size)
    ).models[0]
    assert [str(spec) for spec in sliced.input_specs(2)] == [str(spec) for spec in module.input_specs(2)]
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(spec.shape, generator=generator) if spec.dtype == "float32" else torch.ones(spec.shape).bool()
        for spec in module.input_specs(2)
    ]
    with torch.inference_mode():
        for got, expected in zip(sliced(*inputs), module(*inputs), strict=True):
            assert torch.equal(got, expected)


def test_a_checkpoint_of_the_inner_method_is_read() -> None:
    torch = pytest.importorskip("torch")
    from edgecomp.compressors import compressor_class

    cls, recipe = compressor_class("slice-wise"), load_recipe("slice-wise")
    inner = {"embed_dim": 32, "num_heads": 2}
    sizes = {"preset": "resampler", "inner": "resampler-2d", "tokens": 9, "context_dim": 24}
    module, other = (cls.from_recipe(recipe, 4, **sizes, inner_params=inner) for _ in range(2))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    state = module.inner.original_state("omnilmm")
    found = cls.infer_params(state, cls.parse_params({"inner_params": inner}, method="slice-wise"))
    assert found["inner_params"]["queries"] == 4
    assert found["context_dim"] == 24
    assert other.load_original(state) == "omnilmm"
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in other.state_dict().items())
    assert other.load_original(module.state_dict()) == "edgecomp"
