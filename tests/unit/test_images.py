"""Images of every mode become the pixels that torchvision would make, and damaged ones are refused in words."""

from __future__ import annotations

import math
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgecomp.errors import InvalidSpec, RunError
from edgecomp.images import Preprocess, read_image, resize_and_crop, to_pixels
from edgecomp.resources import photograph_path

HALF = (0.5, 0.5, 0.5)


def make_preprocess(size: int = 8, crop: float = 1.0, **changes: object) -> Preprocess:
    values: dict[str, object] = {"size": size, "crop": crop, "interpolation": "bicubic", "mean": HALF, "std": HALF}
    return Preprocess(**(values | changes))  # type: ignore[arg-type]


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return tuple(int(value) for value in np.asarray(image)[y, x])


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 100, (100, 100, 100)),
        ("LA", (0, 0), (255, 255, 255)),
        ("LA", (0, 51), (204, 204, 204)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("I;16", 257 * 7, (7, 7, 7)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 128, (0, 0, 0)),
        ("I;16", 129, (1, 1, 1)),
    ],
)
def test_png_modes_become_rgb(
    tmp_path: Path, mode: str, colour: int | tuple[int, ...], expected: tuple[int, ...]
) -> None:
    path = tmp_path / "image.png"
    Image.new(mode, (5, 4), colour).save(path)
    image = read_image(path)
    assert image.size == (5, 4)
    assert pixel(image, 4, 3) == expected


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "marked.png", transparency=0)
    opaque, marked = read_image(tmp_path / "opaque.png"), read_image(tmp_path / "marked.png")
    assert (pixel(opaque, 0), pixel(opaque, 1)) == ((10, 20, 30), (40, 50, 60))
    assert (pixel(marked, 0), pixel(marked, 1)) == ((255, 255, 255), (40, 50, 60))


@pytest.mark.parametrize(("mode", "marked", "kept"), [("L", 9, 8), ("RGB", (9, 9, 9), (8, 8, 8)), ("I;16", 2313, 2056)])
def test_a_colour_marked_transparent_becomes_white(
    tmp_path: Path, mode: str, marked: int | tuple[int, ...], kept: int | tuple[int, ...]
) -> None:
    image = Image.new(mode, (2, 1), marked)
    image.putpixel((1, 0), kept)
    image.save(tmp_path / "image.png", transparency=marked)
    read = read_image(tmp_path / "image.png")
    assert (pixel(read, 0), pixel(read, 1)) == ((255, 255, 255), (8, 8, 8))


@pytest.mark.parametrize(("cmyk", "expected"), [((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 255), (0, 0, 0))])
def test_cmyk_jpeg(tmp_path: Path, cmyk: tuple[int, ...], expected: tuple[int, ...]) -> None:
    path = tmp_path / "image.jpg"
    Image.new("CMYK", (16, 16), cmyk).save(path, quality=100)
    assert np.abs(np.subtract(pixel(read_image(path)), expected)).max() <= 3


@pytest.mark.parametrize("suffix", ["webp", "bmp"])
def test_other_formats(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.new("RGB", (16, 16), (200, 100, 50)).save(path)
    assert np.abs(np.subtract(pixel(read_image(path)), (200, 100, 50))).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    stored = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    shown = {  # what the EXIF standard says of each, in numpy's words
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.T,
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].T,
        8: np.rot90(stored),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "image.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "image.png"))[..., 0], shown)


def test_exif_orientation_6_of_a_jpeg_turns_clockwise(tmp_path: Path) -> None:
    stored = np.zeros((32, 64, 3), np.uint8)
    stored[:, :32] = (255, 0, 0)  # red on the left is red on top once upright
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / "image.jpg", exif=exif, quality=100)
    image = read_image(tmp_path / "image.jpg")
    assert image.size == (32, 64)
    assert pixel(image, 16, 8)[0] > 240
    assert pixel(image, 16, 56)[0] < 15


def refused(path: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would reach the user
        with pytest.raises(RunError) as caught:
            read_image(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    assert "does not exist; check the path" in refused(tmp_path / "no.png")


def test_folder(tmp_path: Path) -> None:
    assert "Is a directory" in refused(tmp_path)


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.png"
    path.touch()
    assert "is empty (0 bytes)" in refused(path)


@pytest.mark.parametrize(
    "content", [b"hello world", b"GIF89a\x01\0\x01\0", b"RIFF\0\0\0\0WAVEfmt ", b"%!PS-Adobe-3.0 EPSF"]
)
def test_not_an_image(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "text.png"
    path.write_bytes(content)
    assert f"is not a JPEG, PNG, WebP or BMP image: it begins with {content[:8]!r}" in refused(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
@pytest.mark.parametrize("share", [0.002, 0.01, 0.5, 0.9])
def test_truncated(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"image.{suffix}"
    noise(64, 64).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: max(14, int(len(whole) * share))])
    text = refused(path)
    assert "is truncated or damaged" in text
    assert f"{path.stat().st_size} bytes" in text


def test_damaged_chunk(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    noise(64, 64).save(path)
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(content)
    assert "is truncated or damaged" in refused(path)


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0)])
def test_zero_sized(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(png_header(width, height))
    assert f"is {width} x {height} pixels" in refused(path)


@pytest.mark.parametrize(
    ("width", "height", "extent"),
    [
        (60_000, 60_000, "3600.0 megapixels"),
        (10_001, 10_000, "10001 x 10000 = 100.0 megapixels"),
        (13_000, 13_000, "13000 x 13000 = 169.0 megapixels"),
    ],
)
def test_enormous_is_refused_by_its_header(tmp_path: Path, width: int, height: int, extent: str) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(width, height))
    assert f"has {extent} by its header, above the 100 megapixels" in refused(path)


def test_just_under_the_limit_is_read_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(png_header(10_000, 10_000))  # passes the limit and Pillow's warning, then has no pixels
    assert "is truncated or damaged" in refused(path)


def test_resize_and_crop_keeps_the_centre() -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    image = resize_and_crop(Image.fromarray(pixels), make_preprocess(size=10))
    assert np.asarray(image).min() == 255


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("extent", [(640, 427), (427, 640), (300, 301), (31, 17), (256, 256)])
@pytest.mark.parametrize("crop", [1.0, 0.9, 0.875])
def test_equals_torchvision(interpolation: str, extent: tuple[int, int], crop: float) -> None:
    transforms = pytest.importorskip("torchvision.transforms", reason="torchvision is the reference")
    mode = transforms.InterpolationMode(interpolation)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    image = noise(*extent)
    expected = transforms.Compose(
        [
            transforms.Resize(math.floor(224 / crop), interpolation=mode),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )(image).numpy()
    pixels = to_pixels(image, make_preprocess(224, crop, interpolation=interpolation, mean=mean, std=std), "float32")
    assert pixels.shape == (1, 3, 224, 224)
    assert np.abs(pixels[0] - expected).max() <= 1e-6


@pytest.mark.parametrize("extent", [(1, 100_000), (100_000, 1)])
def test_strip_needs_no_enormous_image_between(extent: tuple[int, int]) -> None:
    strip = Image.new("RGB", extent, (10, 20, 30))
    pixels = to_pixels(strip, make_preprocess(224, 0.875), "uint8")
    assert pixels.shape == (1, 224, 224, 3)
    assert (pixels == (10, 20, 30)).all()


def test_float32_values() -> None:
    image = Image.new("RGB", (20, 20), (255, 0, 51))
    pixels = to_pixels(image, make_preprocess(4, mean=(0.5, 0.25, 0.2), std=(0.5, 0.25, 0.1)), "float32")
    assert pixels.dtype == np.float32
    assert pixels.flags.c_contiguous
    assert pixels.shape == (1, 3, 4, 4)
    assert np.allclose(pixels[0, :, 2, 2], (1.0, -1.0, 0.0), atol=1e-6)


def test_uint8_values_are_raw_and_writable() -> None:
    pixels = to_pixels(Image.new("RGBA", (9, 6), (255, 0, 51, 255)), make_preprocess(4), "uint8")
    assert pixels.dtype == np.uint8
    assert pixels.shape == (1, 4, 4, 3)
    assert pixels[0, 1, 1].tolist() == [255, 0, 51]
    assert pixels.flags.writeable


def test_unknown_pixel_type() -> None:
    with pytest.raises(InvalidSpec, match=r"'float16' cannot be made; choose float32 or uint8"):
        to_pixels(noise(8, 8), make_preprocess(), "float16")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"size": 0}, "size 0"),
        ({"crop": 1.5}, "crop 1.5"),
        ({"crop": 0.0}, "crop 0.0"),
        ({"interpolation": "nearest"}, "'nearest' is not one of bicubic, bilinear"),
        ({"std": (0.5, 0.0, 0.5)}, "std [0.5, 0.0, 0.5] must be above 0"),
    ],
)
def test_impossible_preprocess(changes: dict[str, object], text: str) -> None:
    with pytest.raises(InvalidSpec, match=re.escape(text)):
        to_pixels(noise(8, 8), make_preprocess(**changes), "float32")  # type: ignore[arg-type]


def test_image_without_pixels() -> None:
    with pytest.raises(RunError, match="an image of 0 x 5 pixels"):
        resize_and_crop(Image.new("RGB", (0, 5)), make_preprocess())


def test_shipped_photograph() -> None:
    path = photograph_path()
    image = read_image(path)
    assert image.size == (512, 512)
    assert path.stat().st_size < 100_000
    assert np.asarray(image).std() > 40  # a photograph, not a plain field
    assert "Public domain" in path.with_name("README.md").read_text(encoding="utf-8")
