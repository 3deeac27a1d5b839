"""The policies against brute force over many shapes, and DeepSeek-OCR's pages in tiles."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image, ImageOps

import edgecomp
from edgecomp import api
from edgecomp.bundle import Bundle, open_bundle
from edgecomp.errors import InvalidSpec, RunError
from edgecomp.inputs import read_tensors
from edgecomp.serving.parts import image_pixels, lay_out
from edgecomp.slices import (
    SlicePolicy,
    TilePolicy,
    best_size,
    choose_grid,
    choose_tiles,
    fit_tiles,
    grid_of_rows,
    layout_of_page,
    prepare_page,
)
from edgecomp.specs import load_recipe
from edgecomp.specs.manifest import ThenRecord
from edgecomp.specs.preprocess import Preprocess

HALF = (0.5, 0.5, 0.5)
SIDES = sorted({*range(60, 2600, 67), 447, 448, 449, 640, 641, 672, 1008, 1280, 1344, 4000})
SHAPES = [*product(SIDES, SIDES), (1, 5000), (5000, 1), (30, 9000), (12000, 700)]


def _pairs(counts):
    """Return every (columns, rows) with one of these products, by trying them all."""
    return [(c, r) for c in range(1, 11) for r in range(1, 11) if c * r in counts]


@pytest.mark.parametrize("policy", [SlicePolicy(), SlicePolicy(resolution=336, most=6)], ids=["minicpm-v", "llava-uhd"])
def test_slices_are_those_of_the_formulas(policy: SlicePolicy) -> None:
    """Over some 2000 shapes: areas as whole numbers, aspects as exact ratios above 1 instead of by logarithms."""
    for width, height in SHAPES:
        ideal = min(-(-width * height // policy.resolution**2), policy.most)
        found = choose_grid(width, height, policy)
        if ideal == 1:
            assert found is None
            continue
        grids = _pairs({ideal - 1, ideal, ideal + 1} - {1} - set(range(policy.most + 1, 99)))
        errors = {grid: _times_apart(Fraction(width, height), Fraction(*grid)) for grid in grids}
        assert found is not None
        assert errors[found] == min(errors.values()), (width, height)


def _times_apart(one: Fraction, other: Fraction) -> Fraction:
    return max(one / other, other / one)


@pytest.mark.parametrize("most", [4, 6, 9])
def test_tiles_are_those_of_the_formulas(most: int) -> None:
    """The nearest aspect by difference; of equal aspects the largest that the page fills by more than a half."""
    policy = TilePolicy(most=most)
    for width, height in SHAPES:
        found = choose_tiles(width, height, policy)
        if width <= 640 and height <= 640:
            assert found is None
            continue
        aspect = Fraction(width, height)
        grids = _pairs(set(range(2, most + 1)))
        least = min(abs(aspect - Fraction(*grid)) for grid in grids)
        nearest = sorted((g for g in grids if abs(aspect - Fraction(*g)) == least), key=math.prod)
        filled = [grid for grid in nearest[1:] if 2 * width * height > 640**2 * math.prod(grid)]
        assert found == (filled or nearest)[-1 if filled else 0], (width, height)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((640, 640), None),
        ((641, 640), (2, 2)),  # 1 x 1 is not among 2 to 6 tiles: 2 x 2 is the square
        ((1240, 1754), (2, 3)),  # A4 at 150 dpi
        ((1754, 1240), (3, 2)),
        ((2000, 500), (4, 1)),
        ((900, 300), (3, 1)),
    ],
)
def test_grids_of_pages(size: tuple[int, int], grid: tuple[int, int] | None) -> None:
    assert choose_tiles(*size, TilePolicy()) == grid


def test_a_square_of_two_sizes() -> None:
    """9 tiles hold 3.7 megapixels: from half of that on they are taken instead of 4."""
    policy = TilePolicy(most=9)
    assert choose_tiles(1357, 1357, policy) == (2, 2)
    assert choose_tiles(1358, 1358, policy) == (3, 3)


def test_sides_rounded_to_the_nearest_patch() -> None:
    """MiniCPM-V rounds where LLaVA-UHD takes the floor; halves go to the even multiple."""
    down, nearest = SlicePolicy(), SlicePolicy(sides="nearest")
    assert best_size(300, 200, down, enlarge=True) == (546, 364)  # 547 x 365
    assert best_size(300, 250, down, enlarge=True) == (476, 406)  # 489 x 408
    assert best_size(300, 250, nearest, enlarge=True) == (490, 406)
    assert best_size(35, 49, nearest) == (28, 56)  # 2.5 and 3.5 patches


def test_every_arrangement_is_told_by_its_rows() -> None:
    """Rows of the graphs, counted one by one, and the places of newlines and separator in them."""
    policy, seen = TilePolicy(most=9), set()
    for columns, rows in [(0, 0), *_pairs(set(range(2, 10)))]:
        marks = []
        for _ in range(rows * 10):
            marks += ["token"] * columns * 10 + ["newline"]
        for _ in range(16):
            marks += ["token"] * 16 + ["newline"]
        marks.append("separator")
        grid = (columns, rows) if columns else None
        assert grid_of_rows(len(marks), columns * rows, policy) == grid
        layout = layout_of_page(grid, policy)
        assert [i for i, mark in enumerate(marks) if mark == "newline"] == layout.newlines.tolist()
        assert layout.separators.tolist() == [len(marks) - 1]
        assert layout.order.tolist() == list(range(len(marks)))
        seen.add(len(marks))
    assert len(seen) == 23


def test_a_page_is_padded_and_its_tiles_are_cut() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (96, 130, 3), dtype=np.uint8)
    page, policy = Image.fromarray(colours), TilePolicy(tile=64, view=128)
    square = Preprocess(128, 1.0, "bicubic", HALF, HALF)
    view, tiles = prepare_page(page, (3, 2), policy, square)
    padded = ImageOps.pad(page, (128, 128), Image.Resampling.BICUBIC, color=(127, 127, 127))
    np.testing.assert_allclose(view[0], np.asarray(padded).transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    assert tiles is not None
    assert tiles.shape == (1, 6, 3, 64, 64)
    whole = np.asarray(page.resize((192, 128), Image.Resampling.BICUBIC)).transpose(2, 0, 1) / 127.5 - 1
    laid = tiles[0].reshape(2, 3, 3, 64, 64).transpose(2, 0, 3, 1, 4).reshape(3, 128, 192)
    np.testing.assert_allclose(laid, whole, atol=1e-6)
    small, none = prepare_page(page, None, TilePolicy(tile=0, view=64), square, dtype="uint8")
    assert none is None
    np.testing.assert_array_equal(small[0], np.asarray(page.resize((64, 64), Image.Resampling.BICUBIC)))
    line, _ = prepare_page(Image.new("RGB", (1, 5000)), None, policy, square)
    assert line.shape == (1, 3, 128, 128)


def test_the_next_larger_grid_of_a_bundle() -> None:
    held = [None, (1, 2), (3, 2), (2, 3)]
    assert fit_tiles((1, 2), held, TilePolicy()) == (1, 2)
    assert fit_tiles((2, 1), held, TilePolicy()) == (3, 2)
    assert fit_tiles(None, held[1:], TilePolicy()) == (1, 2)
    with pytest.raises(InvalidSpec, match=r"4 x 1 tiles .*the largest has 3 x 2 tiles; export .*--budget 683"):
        fit_tiles((4, 1), held, TilePolicy())


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No tiles, two above each other, and three beside each other."""
    pytest.importorskip("torch")
    out = tmp_path_factory.mktemp("pages") / "bundle"
    return api.export("deepseek-ocr", preset="smoke-tiles", budget=[3, 15, 17], out=out).bundle


def _noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_page_is_run_in_the_bucket_of_its_tiles(pages: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.png"
    with edgecomp.load(pages, threads=1) as model:
        for size, rows, words, newlines in (
            ((100, 128), 3, "the page in 3 rows", [1]),
            ((130, 260), 15, "1 x 2 tiles and the page in 15 rows: as 130 x 260 pixels ask for", [2, 5, 8, 11, 13]),
            (
                (260, 130),
                17,
                "3 x 1 tiles and the page in 17 rows: the next larger, as 2 x 1 tiles, which 260",
                [6, 13, 15],
            ),
        ):
            image = _noise(*size)
            image.save(file)
            report = api.run(pages, file, threads=1, out=tmp_path / "rows.safetensors")
            assert report.tokens_out == rows
            assert words in report.reason
            assert report.layout is not None
            assert list(report.layout.newlines) == newlines
            for form in (file, image, np.asarray(image)):
                answer = model(form)
                assert (answer.budget, answer.reason) == (rows, report.reason)
                np.testing.assert_array_equal(answer["compressed"], report.outputs["compressed"])
            assert answer.layout is not None
            written = read_tensors(tmp_path / "rows.safetensors")
            np.testing.assert_array_equal(written["layout.newlines"], answer.layout.newlines)
        together = model.infer_batch([_noise(100, 128), _noise(130, 260), _noise(90, 90)])
        assert [answer.budget for answer in together] == [3, 15, 3]
        assert model.stats().requests == 12
        forced = model(_noise(90, 90), budget=17)
        assert "the smallest that keeps 17" in forced.reason


def test_inputs_by_name_say_which_bucket(pages: Path) -> None:
    image, tiles = np.zeros((1, 3, 64, 64), np.float32), np.zeros((1, 3, 3, 128, 128), np.float32)
    with edgecomp.load(pages, threads=1) as model:
        assert model({"image": image}).budget == 3
        assert model({"image": image, "tiles_3": tiles}).budget == 17
        with pytest.raises(RunError, match=r"inputs image, tiles_9 are of no bucket; give image or image, tiles_2 or"):
            model({"image": image, "tiles_9": tiles})
        with pytest.raises(RunError, match=r"'tiles_2' has shape \[1, 3, 3, 128, 128\], expected \[1, 2, 3"):
            model({"image": image, "tiles_2": tiles})


def test_a_page_is_laid_out_where_a_second_method_reads_its_rows(pages: Path) -> None:
    """It is not cropped to its middle, as an image of another encoder is."""
    opened = open_bundle(pages)
    manifest = opened.manifest
    then = ThenRecord("tome", "smoke", {}, 15, manifest.weights, load_recipe("tome").source)
    (bucket,) = (b for b in manifest.buckets if b.budget.tokens_out == 15)
    kept = msgspec.structs.replace(bucket, budget=msgspec.structs.replace(bucket.budget, tokens_out=4))
    row = Bundle(pages, msgspec.structs.replace(manifest, buckets=(kept,), then=then))
    page = _noise(130, 260)
    alone, laid = lay_out(opened, page, budget=15), lay_out(row, page)
    assert alone is not None
    assert laid is not None
    assert laid.reason == "1 x 2 tiles and the page in 15 rows, of which 4 are kept"
    assert laid.layout.order.tolist() == [0, 1, 2, 3]
    assert all(np.array_equal(laid.inputs[name], value) for name, value in alone.inputs.items())
    np.testing.assert_array_equal(image_pixels(row, page, "float32"), alone.inputs["image"])
    with pytest.raises(InvalidSpec, match=r"cut into 2 x 1 tiles .* with --between \d+"):
        lay_out(row, _noise(260, 130))


def test_pages_that_are_refused(pages: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.png"
    _noise(500, 130).save(file)
    with pytest.raises(InvalidSpec, match=r"cut into 4 x 1 tiles .*the largest has 3 x 1 tiles; .*--budget 21"):
        api.run(pages, file)
    _noise(130, 260).save(file)
    with pytest.raises(InvalidSpec, match=r"--draw shows one image, and model\.m15\.b1\.onnx takes tiles beside it"):
        api.run(pages, file, draw=tmp_path / "patches.png")
    with pytest.raises(InvalidSpec, match="takes an image in parts, which no router that reads words sees"):
        api.run(pages, file, text="what?")
    (tmp_path / "text.txt").write_text("words")
    with pytest.raises(InvalidSpec, match=r"text\.txt is a text, and .* takes image float32"):
        api.run(pages, tmp_path / "text.txt")
