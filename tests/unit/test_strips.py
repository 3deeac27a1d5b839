"""Text becomes strips of pixels, in the smallest bucket that holds it; a text that is too long is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

import edgecomp
from edgecomp import api
from edgecomp.bundle import open_bundle
from edgecomp.errors import InvalidSpec, RunError
from edgecomp.strips import render_strips

WORDS = "The quick brown fox jumps over the lazy dog. "


def test_the_line_is_cut_into_rows_of_patches():
    found = render_strips(WORDS * 20, images=(2, 4))
    assert (found.images.shape, found.images.dtype, found.used) == ((2, 224, 224, 3), np.uint8, 2)
    font = ImageFont.load_default(10)
    line = (WORDS * 20).strip()
    assert found.pixels == int(np.ceil(font.getlength(line)))
    canvas = Image.new("L", (2 * 16 * 224, 14), 255)
    ImageDraw.Draw(canvas).text((0, (14 - sum(font.getmetrics())) // 2), line, fill=0, font=font)
    strips = np.asarray(canvas)
    for place in range(32):
        row = found.images[place // 16, place % 16 * 14 : (place % 16 + 1) * 14, :, 0]
        np.testing.assert_array_equal(row, strips[:, place * 224 : (place + 1) * 224])


def test_the_mask_is_true_where_there_is_ink():
    found = render_strips("ink", images=(1, 3))
    assert found.images.shape[0] == found.patch_mask.shape[0] == found.used == 1
    assert found.patch_mask.shape[1] == 256
    places = np.flatnonzero(found.patch_mask[0])
    assert places.tolist() == list(range(len(places)))
    assert 1 <= len(places) <= 3
    for place in range(256):
        row, column = divmod(place, 16)
        patch = found.images[0, row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
        assert found.patch_mask[0, place] == bool((patch < 255).any())


def test_the_smallest_bucket_that_holds_the_text_is_taken():
    counts = {repeats: len(render_strips(WORDS * repeats, images=(14, 7, 28)).images) for repeats in (1, 120, 200, 330)}
    assert list(counts.values()) == [7, 14, 14, 28]
    blank = render_strips(WORDS, images=(7,))
    assert (blank.images[1:] == 255).all()
    assert not blank.patch_mask[1:].any()


def test_white_space_runs_become_one_space():
    one, other = render_strips("two\n\n  words ", images=(1,)), render_strips("two words", images=(1,))
    np.testing.assert_array_equal(one.images, other.images)


def test_a_text_that_is_too_long_is_refused_with_figures():
    text = WORDS * 800
    length = int(np.ceil(ImageFont.load_default(10).getlength(text.strip())))
    needed = -(-length // 3584)
    words = rf"{len(text) - 1} characters and is {length} pixels long at 10 pixels: {needed} images of 3584\. "
    with pytest.raises(InvalidSpec, match=words + r"The largest bucket has 28 \(100352 pixels\), and about"):
        render_strips(text, images=(7, 14, 28))
    with pytest.raises(InvalidSpec, match="2000000 characters, above the 1048576"):
        render_strips("a" * 2_000_000, images=(28,))


def test_what_cannot_be_rendered_is_refused(tmp_path):
    with pytest.raises(InvalidSpec, match="a text of 3 characters has nothing to render"):
        render_strips(" \n ", images=(7,))
    with pytest.raises(InvalidSpec, match=r"the font is \d+ pixels high at size 20, and a strip 14"):
        render_strips("a", images=(7,), font_size=20)
    (tmp_path / "font.ttf").write_bytes(b"no font")
    with pytest.raises(RunError, match=r"font .*font\.ttf cannot be read"):
        render_strips("a", images=(7,), font=tmp_path / "font.ttf")
    with pytest.raises(
        InvalidSpec, match="2 characters that the font that Pillow brings lacks: 你 U\\+4F60, 界 U\\+754C;"
    ):
        render_strips("hello 你界", images=(7,))
    for words in ({"size": 100}, {"patch": 225}, {"font_size": 0}, {"images": ()}):
        (name, value), *_ = words.items()
        with pytest.raises(InvalidSpec, match=f"{name}={re.escape(str(value))}"):
            render_strips("a", **{"images": (7,), **words})


@pytest.fixture(scope="module")
def strips_bundle(tmp_path_factory):
    out = tmp_path_factory.mktemp("vist") / "bundle"
    return api.export("vist", preset="smoke-host", batch=(1, 2), out=out).bundle


def test_run_renders_a_text_file(strips_bundle, tmp_path):
    (tmp_path / "text.txt").write_text("of a few words")
    report = api.run(strips_bundle, tmp_path / "text.txt")
    assert report.model == "model.m4.b1.onnx"
    assert "1 image of text" in report.reason
    assert report.outputs["latents"].shape == (1, 4, 64)
    (tmp_path / "long.txt").write_text("of a good many words more " * 3)
    long = api.run(strips_bundle, tmp_path / "long.txt")
    assert long.model == "model.m4.b2.onnx"
    assert long.outputs["latents"].shape == (2, 4, 64)
    alone = api.run(strips_bundle, tmp_path / "text.txt", batch=2)
    assert alone.model == "model.m4.b2.onnx"
    np.testing.assert_allclose(alone.outputs["latents"], report.outputs["latents"], atol=1e-5)
    (tmp_path / "longer.txt").write_text("of a good many words more " * 9)
    with pytest.raises(InvalidSpec, match=r"images of 256\. The largest bucket has 2 \(512 pixels\)"):
        api.run(strips_bundle, tmp_path / "longer.txt")


def test_load_renders_a_text(strips_bundle, tmp_path):
    """A .txt file, or a text without any request; `run --text` alike."""
    text = "of a good many words more " * 3
    (tmp_path / "text.txt").write_text(text)
    report = api.run(strips_bundle, text=text)
    assert (report.model, report.layout.parts, report.layout.rows) == ("model.m4.b2.onnx", 2, 8)
    with edgecomp.load(strips_bundle, threads=1) as model:
        for answer in (model(tmp_path / "text.txt"), model(text=text), *model.infer_batch([None], texts=[text])):
            assert answer.reason == report.reason
            assert answer.layout.order.tolist() == list(range(8))
            np.testing.assert_allclose(answer["latents"], report.outputs["latents"], atol=1e-5)
        with pytest.raises(InvalidSpec, match=r"two texts were given"):
            model(tmp_path / "text.txt", text)
        with pytest.raises(InvalidSpec, match=r"The largest bucket has 2 \(512 pixels\), and about \d+ characters fit"):
            model(text=text * 3)
    with pytest.raises(InvalidSpec, match="--draw shows what became of an image, and this one is rendered of a text"):
        api.run(strips_bundle, tmp_path / "text.txt", draw=tmp_path / "patches.png")
    with pytest.raises(RunError, match=r"font .*none\.ttf cannot be read"):
        edgecomp.load(strips_bundle, font=tmp_path / "none.ttf")(text="words")


def test_a_text_for_a_model_that_takes_none(strips_bundle, tmp_path):
    (tmp_path / "text.txt").write_text("words")
    bundle = api.export("vist", preset="smoke", budget=4, batch=1, out=tmp_path / "tokens").bundle
    with pytest.raises(InvalidSpec, match=r"takes tokens float32\[1, 24, 32\], patch_mask bool\[1, 24\]"):
        api.run(bundle, tmp_path / "text.txt")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(RunError, match=r"text .*bad\.txt cannot be read"):
        api.run(strips_bundle, tmp_path / "bad.txt")
    with pytest.raises(InvalidSpec, match=r"--font a\.ttf: .* is no \.txt file"):
        api.run(strips_bundle, font="a.ttf")


def test_a_bundle_takes_images_and_their_masks(strips_bundle):
    opened = open_bundle(strips_bundle)
    assert [spec.name for spec in opened.manifest.buckets[0].inputs] == ["image", "patch_mask"]
    assert opened.manifest.buckets[0].inputs[1].shape == (1, 16)
