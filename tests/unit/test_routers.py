"""Routers: each formula by plain loops, its thresholds, its corners, what it refuses, and its graph."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="routers are torch modules")
onnxruntime = pytest.importorskip("onnxruntime", reason="graphs are run by ONNX Runtime")

import onnx_ir as ir  # noqa: E402 - torch first, or skip
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from edgecomp.backbones.assemble import assemble  # noqa: E402
from edgecomp.backbones.seam import Stem  # noqa: E402
from edgecomp.compressors._base import initialise  # noqa: E402
from edgecomp.errors import InvalidSpec, UnknownName, WeightsError  # noqa: E402
from edgecomp.export.lower import lower  # noqa: E402
from edgecomp.export.opcheck import require_allowed  # noqa: E402
from edgecomp.export.passes import inline_functions, require_static, strip_metadata  # noqa: E402
from edgecomp.routers import Router, RouterSite, StemScore, router_class  # noqa: E402
from edgecomp.routers._base import even_thresholds, next_above  # noqa: E402
from edgecomp.specs import Preprocess, TensorSpec, load_oplists, load_recipe  # noqa: E402
from edgecomp.specs.order import Order  # noqa: E402
from edgecomp.specs.router import router_names  # noqa: E402
from edgecomp.words import WORD_SIGNALS, read_words  # noqa: E402

SIDE = 32
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
NO_WORDS = np.zeros((1, 5), np.float32)
IMAGE_ROUTERS = ("difficulty", "detail")
STEM_ROUTERS = ("complexity", "coverage", "policy")


def image_site(buckets: Sequence[int] = (64, 144, 256, 400), *, side: int = SIDE, **more: Any) -> RouterSite:
    uint8 = more.pop("dtype", "float32") == "uint8"
    shape = (1, side, side, 3) if uint8 else (1, 3, side, side)
    return RouterSite(
        buckets=tuple(buckets),
        tokens_in=576,
        image=TensorSpec("image", shape, "uint8" if uint8 else "float32", "image"),
        preprocess=Preprocess(side, 0.9, "bicubic", MEAN, STD),
        **more,
    )


def stem_site(
    buckets: Sequence[int] = (4, 9, 16), *, tokens: int = 36, prefix: int = 1, width: int = 8, **more: Any
) -> RouterSite:
    stem = (
        TensorSpec("tokens", (1, prefix + tokens, width), "float32", "tokens"),
        TensorSpec("class_attention", (1, 3, tokens), "float32", "attention"),
    )
    kept = more.pop("kept", tuple(buckets))
    return RouterSite(
        buckets=tuple(buckets),
        tokens_in=tokens,
        span=more.pop("span", (0, tokens)),
        stem=more.pop("stem", stem),
        score=more.pop("score", StemScore(("class_attention",), lambda attention: attention.mean(1), kept)),
        num_prefix_tokens=prefix,
        **more,
    )


def summed(prefix: int, kept: Sequence[int]) -> dict[str, Any]:
    """What a site has where a score was summed up in front of the stem's end."""
    return {"score": StemScore(("score",), lambda score: score[:, prefix:], tuple(kept))}


def build(name: str, site: RouterSite, **params: Any) -> Router:
    cls = router_class(name)
    router = cls(cls.parse_params(params, name=name), site).eval()
    initialise(router, torch.Generator().manual_seed(0))
    return router


def decide(router: Router, *seen: Any, thresholds: Sequence[float] | None = None) -> tuple[Any, Any, dict[str, Any]]:
    """Return bucket, need and signals by name, of numpy arrays, and hold their shapes to what is declared."""
    tensors = [torch.as_tensor(part) for part in seen]
    batch = len(tensors[0])
    cuts = torch.tensor([list(thresholds or router.default_thresholds)] * batch, dtype=torch.float32)
    with torch.no_grad():
        found = router(*tensors, cuts)
    for value, spec in zip(found, router.output_specs(batch), strict=True):
        assert tuple(value.shape) == spec.shape, spec.name
        assert value.dtype in (getattr(torch, spec.dtype), torch.float64), spec.name
        assert torch.isfinite(value).all(), spec.name
    bucket, need, signals = (value.numpy() for value in found)
    assert ((need >= 0) & (need <= 1)).all()
    return bucket, need, dict(zip(router.signal_names, signals.T, strict=True))


# -- images and their proxies by loops ------------------------------------------------------------------------------


def pictures() -> dict[str, Any]:
    """Return images (3, S, S) in [0, 1] of several kinds."""
    rng = np.random.default_rng(7)
    soft = rng.random((3, 8, 8)).repeat(4, 1).repeat(4, 2) * 0.5 + rng.random((3, SIDE, SIDE)) * 0.06
    strokes = np.ones((3, SIDE, SIDE))
    strokes[:, 16:, :16] = (np.arange(16) // 2 % 2)[None, None]
    spots = {count: np.full((3, SIDE, SIDE), 0.25) for count in (3, 7)}
    for count, image in spots.items():
        for place in range(count):
            image[:, 3 + 8 * (place // 3), 3 + 8 * (place % 3)] = (0.9, 0.8, 0.1)
    return {
        "noise": rng.random((3, SIDE, SIDE)),
        "weak noise": 0.4 + 0.2 * rng.random((3, SIDE, SIDE)),
        "patches": soft,
        "strokes": strokes,
        "corner": np.pad(rng.random((3, 12, 12)), ((0, 0), (0, 20), (20, 0))),
        "ramp": np.broadcast_to(np.linspace(0, 1, SIDE), (3, SIDE, SIDE)).copy(),
        "three spots": spots[3],
        "seven spots": spots[7],
        "constant": np.full((3, SIDE, SIDE), 0.3),
    }


def normalised(image: Any) -> Any:
    """Return pixels as the model takes them: (1, 3, S, S) float32."""
    mean, std = (np.array(value)[:, None, None] for value in (MEAN, STD))
    return ((image - mean) / std).astype(np.float32)[None]


def grey_of(image: Any) -> list[list[float]]:
    red, green, blue = image.tolist()
    return [
        [0.299 * red[y][x] + 0.587 * green[y][x] + 0.114 * blue[y][x] for x in range(len(red))] for y in range(len(red))
    ]


def edge_map(image: Any) -> list[list[int]]:
    grey = grey_of(image)
    side = len(grey)
    found = [[0] * side for _ in range(side)]
    for y in range(side):
        for x in range(side):
            right = abs(grey[y][x + 1] - grey[y][x]) if x + 1 < side else 0.0
            down = abs(grey[y + 1][x] - grey[y][x]) if y + 1 < side else 0.0
            found[y][x] = int(max(right, down) > 0.1)
    return found


def edge_share(image: Any) -> float:
    edges = edge_map(image)
    return sum(map(sum, edges)) / len(edges) ** 2


def colours_of(image: Any) -> float:
    total = 0.0
    for channel in image.tolist():
        values = [value for row in channel for value in row]
        mean = sum(values) / len(values)
        total += sum((value - mean) ** 2 for value in values) / len(values)
    return 4 * total / 3


def objects_of(image: Any) -> float:
    edges = edge_map(image)
    step = len(edges) // 16
    cells = [
        [sum(sum(row[x * step : (x + 1) * step]) for row in edges[y * step : (y + 1) * step]) for x in range(16)]
        for y in range(16)
    ]
    total, peaks = sum(map(sum, cells)), 0
    for y in range(16):
        for x in range(16):
            around = [cells[v][u] for v in range(y - 1, y + 2) for u in range(x - 1, x + 2) if 0 <= v < 16 > u >= 0]
            peaks += cells[y][x] >= max(around) and cells[y][x] * 256 > total
    return min(1.0, peaks / 10)


def text_of(image: Any, patch: int) -> float:
    """Return the highest text likelihood of all whole patches."""
    side = len(image[0]) // patch * patch
    image = image[:, :side, :side]
    grey, edges, found = grey_of(image), edge_map(image), []
    for top in range(0, side, patch):
        for left in range(0, side, patch):
            places = [(y, x) for y in range(top, top + patch) for x in range(left, left + patch)]
            values = [grey[y][x] for y, x in places]
            mean = sum(values) / len(values)
            variance = sum((value - mean) ** 2 for value in values) / len(values)
            high, low = [v for v in values if v > mean], [v for v in values if v <= mean]
            if variance < 1e-9:
                found.append(0.0)
                continue
            step = sum(high) / len(high) - sum(low) / len(low)
            share = len(high) / len(values)
            dense = min(1.0, 2 * sum(edges[y][x] for y, x in places) / len(places))
            found.append(dense * min(1.0, share * (1 - share) * step**2 / variance) * min(1.0, 2 * step))
    return max(found)


QUESTIONS = {
    "": (0, 0, 0, 0, 0),
    "   \n\t?!": (0, 0, 0, 0, 0),
    "What is shown?": (3, 0, 0, 0, 0),
    "How many dogs are not brown, and why?": (8, 1, 1, 1, 0),
    "Why isn't there a number?": (5, 1, 1, 1, 0),
    "It doesn\u2019t matter": (3, 1, 0, 0, 0),
    "It DOESN\u2019T matter BECAUSE": (4, 1, 0, 1, 0),
    "ants note counters seasons texture": (5, 0, 0, 0, 0),
    "Read the small TEXT in the corner": (7, 0, 0, 0, 1),
    "\u4f60\u597d\uff0c\u4e16\u754c": (2, 0, 0, 0, 0),  # Chinese: a run each side of the comma
    "\u041f\u043e\u0447\u0435\u043c\u0443 \u043d\u0435\u0442?": (2, 0, 0, 0, 0),  # Russian
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902 \u0915\u094d\u092f\u093e \u0939\u0948": (
        4,
        0,
        0,
        0,
        0,
    ),  # Hindi
    "\u0645\u0627 \u0647\u0630\u0627\u061f": (2, 0, 0, 0, 0),  # Arabic
    "nai\u0308ve cafe\u0301": (2, 0, 0, 0, 0),  # accents of their own
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645": (1, 0, 0, 0, 0),  # Persian, a joiner inside
    "it's 3.5 m_a-b": (5, 0, 0, 0, 0),
    "\U0001f600 \U0001f600": (0, 0, 0, 0, 0),
}


@pytest.mark.parametrize("text", QUESTIONS, ids=range(len(QUESTIONS)))
def test_words_of_any_script(text: str) -> None:
    """Marks and joiners belong to their word, and English switches need whole words."""
    found = read_words(text)
    assert found.dtype == np.float32
    assert found.shape == (1, len(WORD_SIGNALS))
    assert tuple(found[0]) == QUESTIONS[text]


def test_a_very_long_text_is_counted() -> None:
    assert read_words("word " * 100_000)[0].tolist() == [2000, 0, 0, 0, 0]  # 10,000 characters are read
    assert read_words("how\nmany  birds")[0].tolist() == [3, 0, 1, 0, 0]
    assert read_words("x" * 100_000)[0, 0] == 1


# -- difficulty -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", pictures())
def test_difficulty_is_the_notes_formula(kind: str) -> None:
    image = pictures()[kind]
    router = build("difficulty", image_site())
    edges, colours, objects = edge_share(image), colours_of(image), objects_of(image)
    of_image = 0.3 * edges + 0.2 * colours + 0.5 * objects
    for text, (words, negation, counting, reasoning, _) in QUESTIONS.items():
        query = 0.2 * words / 20 + 0.3 * negation + 0.3 * counting + 0.2 * reasoning
        expected = min(1.0, max(0.0, 0.6 * of_image + 0.4 * query))
        bucket, need, signals = decide(router, normalised(image), read_words(text))
        assert need[0] == pytest.approx([expected] * 3, abs=1e-5)
        assert bucket[0] == sum(float(need[0, 0]) >= np.float32(cut) for cut in (0.3, 0.6, 0.85))
        for name, value in {
            "edge_density": edges, "colour_variance": colours, "objects": objects, "image": of_image, "query": query,
            "difficulty": expected,
        }.items():  # fmt: skip
            assert signals[name][0] == pytest.approx(value, abs=1e-5), name


def test_pictures_differ_in_every_proxy() -> None:
    """The formula's test would not see a swapped or lost term otherwise."""
    for proxy in (edge_share, colours_of, objects_of, lambda image: text_of(image, 16)):
        values = {round(proxy(image), 4) for image in pictures().values()}
        assert len(values) >= 4
        assert 0.0 in values


def test_difficulty_bucket_at_the_notes_bounds() -> None:
    """Below a bound the smaller bucket, from the bound on the larger; 75 and 150 words meet 0.3 and 0.6."""
    router = build("difficulty", image_site())
    assert router.default_thresholds == (0.3, 0.6, 0.85)
    plain = normalised(pictures()["constant"])
    for words, expected in ((0, 0), (74, 0), (75, 1), (149, 1), (150, 2), (212, 2), (213, 3), (100_000, 3)):
        bucket, need, _ = decide(router, plain, read_words("la " * words))
        assert bucket.tolist() == [expected], (words, need)
    assert need[0, 0] == 1.0

    class Given(router_class("difficulty")):  # type: ignore[misc]
        def judge(self, *seen: Any) -> Any:
            return seen[1][:, :1], seen[1].repeat(1, 2)[:, :6]

    stub = Given(router_class("difficulty").Params(), image_site())
    low, high = np.float32(0), np.float32(1)
    for place, bound in enumerate(map(np.float32, (0.3, 0.6, 0.85))):
        for value, above in ((np.nextafter(bound, low), 0), (bound, 1), (np.nextafter(bound, high), 1)):
            seen = np.full((1, 5), value, np.float32)
            assert decide(stub, plain, seen)[0].tolist() == [place + above]


def test_a_uint8_image_reads_as_its_pixels() -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
    router = build("difficulty", image_site(dtype="uint8"))
    _, need, signals = decide(router, pixels, NO_WORDS.repeat(2, 0))
    for place, image in enumerate(pixels.transpose(0, 3, 1, 2) / 255):
        assert signals["edge_density"][place] == pytest.approx(edge_share(image), abs=1e-4)
        assert signals["colour_variance"][place] == pytest.approx(colours_of(image), abs=1e-5)
        assert need[place, 0] == pytest.approx(0.6 * signals["image"][place], abs=1e-6)


# -- detail ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [0, 8, 12])
@pytest.mark.parametrize("kind", pictures())
def test_detail_is_the_notes_gate(kind: str, patch: int) -> None:
    """Two buckets: the gate itself; need: its graded form. 12 does not divide 32: whole patches alone."""
    image = pictures()[kind]
    router = build("detail", image_site((49, 89), patch_size=patch))
    edges, text = edge_share(image), text_of(image, patch or 16)
    asked = {question: (found[0], found[4]) for question, found in QUESTIONS.items()}
    for question, (words, detail) in {**asked, "la " * 15: (15, 0), "la " * 16: (16, 0)}.items():
        bucket, need, signals = decide(router, normalised(image), read_words(question))
        assert need[0, 0] == pytest.approx(min(1.0, max(words / 30, detail, edges / 0.6, text)), abs=2e-5)
        assert bucket[0] == (words > 15 or detail or edges > 0.3 or text > 0.5), (question, edges, text)
        found = [signals[name][0] for name in ("words", "detail", "edge_density", "text_likelihood")]
        assert found == pytest.approx([float(words), float(detail), edges, text], abs=2e-5)


def test_detail_opens_above_its_bounds_alone() -> None:
    plain = normalised(pictures()["constant"])
    router = build("detail", image_site((49, 89)))
    (threshold,) = router.default_thresholds
    assert np.float32(threshold) == np.nextafter(np.float32(0.5), np.float32(1))
    for text, expected in (("la " * 15, 0), ("la " * 16, 1), ("small", 1), ("smaller", 0), ("", 0)):
        assert decide(router, plain, read_words(text))[0].tolist() == [expected], text
    for text, expected in (("la " * 7, 0), ("la " * 8, 1), ("la " * 16, 2), ("la " * 23, 3)):  # a quarter each
        assert decide(build("detail", image_site()), plain, read_words(text))[0].tolist() == [expected]


@pytest.mark.parametrize("count", [30, 31])
def test_detail_at_its_edge_bound(count: int) -> None:
    """An edge density of 0.3 exactly, 30 of 100 pixels, does not open the gate."""
    image = np.zeros((3, 10, 10))
    for place in range(10):  # three edges each: at the spot, to its left, above it
        image[:, 2 + 2 * (place // 4), 2 + 2 * (place % 4)] = 0.2
    image[:, 0, 0] = 0.2 * (count - 30)  # one
    assert sum(map(sum, edge_map(image))) == count
    bucket, _, signals = decide(build("detail", image_site((49, 89), side=10)), normalised(image), NO_WORDS)
    assert signals["edge_density"][0] == np.float32(count / 100)
    assert bucket[0] == (count > 30)


# -- complexity -----------------------------------------------------------------------------------------------------


def complexity_of(tokens: Any) -> tuple[float, float]:
    """Return local variance and variance of tokens (N, D) by loops."""
    count, width = tokens.shape
    side, local, total, windows = round(count**0.5), 0.0, 0.0, 0
    for channel in range(width):
        values = tokens[:, channel].tolist()
        mean = sum(values) / count
        total += sum((value - mean) ** 2 for value in values) / count / width
        for y in range(side - 2):
            for x in range(side - 2):
                window = [values[(y + v) * side + x + u] for v in range(3) for u in range(3)]
                middle = sum(window) / 9
                local += sum((value - middle) ** 2 for value in window) / 9 / width
                windows += 1
    return local / (windows / width), total


def grids() -> dict[str, Any]:
    rng = np.random.default_rng(11)
    waves = np.sin(np.arange(6)[:, None, None] / 2 + np.arange(6)[None, :, None] / 3 + np.arange(8) / 5)
    return {
        "noise": rng.normal(size=(36, 8)),
        "far from zero": 500 + rng.normal(size=(36, 8)),
        "smooth": waves.reshape(36, 8),
        "slope": np.arange(6.0).repeat(6)[:, None] * np.arange(1, 9),
        "rough and smooth": waves.reshape(36, 8) + 0.3 * rng.normal(size=(36, 8)),
        "large": 1e4 * rng.normal(size=(36, 8)),
        "one token": np.eye(36, 8, k=-14),
    }


def with_prefix(patches: Any, prefix: int = 1) -> Any:
    """Put tokens that nothing may read in front."""
    return np.concatenate([np.full((prefix, patches.shape[1]), 1e3), patches])[None].astype(np.float32)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.2, 0.6)])
@pytest.mark.parametrize("kind", grids())
def test_complexity_is_local_over_global_variance(kind: str, low: float, high: float) -> None:
    given = with_prefix(grids()[kind])
    local, total = complexity_of(given[0, 1:].astype(float))
    bucket, need, signals = decide(build("complexity", stem_site(), low=low, high=high), given)
    expected = min(1.0, max(0.0, (local / total - low) / (high - low)))
    assert need[0] == pytest.approx([expected] * 2, abs=1e-4)
    assert signals["local_variance"][0] == pytest.approx(local, rel=1e-3)
    assert signals["variance"][0] == pytest.approx(total, rel=1e-3)
    assert signals["complexity"][0] == pytest.approx(local / total, abs=1e-4)
    assert bucket[0] == (expected >= 0.3) + (expected >= 0.7)


def test_complexity_reaches_all_buckets_and_has_no_scale() -> None:
    router = build("complexity", stem_site())
    assert router.default_thresholds == (0.3, 0.7)
    needs = {kind: decide(router, with_prefix(grid))[1][0, 0] for kind, grid in grids().items()}
    assert {int(need >= 0.3) + int(need >= 0.7) for need in needs.values()} == {0, 1, 2}
    scaled = decide(router, with_prefix(grids()["noise"] * 1000))[1][0, 0]
    assert scaled == pytest.approx(needs["noise"], abs=1e-5)


@pytest.mark.parametrize("side", [3, 7, 14, 24])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e4, 1e-20])
def test_equal_tokens_are_not_complex(value: float, side: int) -> None:
    """Exact zeros, though a mean of equal numbers is not always that number."""
    channels = np.broadcast_to(value * (1 + np.arange(8) / 7), (side**2, 8))
    bucket, need, signals = decide(build("complexity", stem_site(tokens=side**2)), with_prefix(channels))
    assert need.tolist() == [[0.0, 0.0]]
    assert bucket.tolist() == [0]
    assert signals["variance"].tolist() == [0.0]


# -- coverage -------------------------------------------------------------------------------------------------------


def smallest_bucket(scores: Sequence[int], buckets: Sequence[int], p: Fraction) -> int:
    """Try one bucket after another, in exact numbers."""
    ordered = sorted(scores, reverse=True)
    for place, kept in enumerate(buckets[:-1]):
        if sum(ordered[:kept]) >= p * sum(ordered):
            return place
    return len(buckets) - 1


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    scores=st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 8, 100]), min_size=9, max_size=9),
    buckets=st.sets(st.integers(1, 14), min_size=2, max_size=5),
    tenths=st.integers(1, 9),
)
def test_coverage_is_the_smallest_bucket_that_holds_the_share(
    scores: list[int], buckets: set[int], tenths: int
) -> None:
    """Against a search over buckets; ties at the share itself, zeros, and buckets above N among them."""
    stem = (TensorSpec("score", (1, 2 + 9), "float32", "features"),)
    site = stem_site(sorted(buckets), tokens=9, prefix=2, stem=stem, **summed(2, sorted(buckets)))
    router = build("coverage", site, p=tenths / 10)
    bucket, need, signals = decide(router, np.array([[1e6, 1e6, *scores]], np.float32))
    assert bucket[0] == smallest_bucket(scores, sorted(buckets), Fraction(tenths, 10))
    ordered, total = sorted(scores, reverse=True), sum(scores)
    losses = [1 - sum(ordered[:kept]) / total if total else 0.0 for kept in sorted(buckets)[:-1]]
    assert need[0] == pytest.approx(losses, abs=1e-6)
    assert signals["mass"][0] == total
    assert signals["highest"][0] == pytest.approx(ordered[0] / total if total else 0.0, abs=1e-6)


@pytest.mark.parametrize("tenths", range(1, 10))
def test_coverage_of_the_share_exactly_is_enough(tenths: int) -> None:
    """Ten equal scores: M of them hold M tenths, which is the share itself for every bucket once."""
    stem = (TensorSpec("score", (1, 10), "float32", "features"),)
    site = stem_site(range(1, 11), tokens=10, prefix=0, stem=stem, **summed(0, range(1, 11)))
    router = build("coverage", site, p=tenths / 10)
    for score in (1.0, 3.0, 0.125):  # sums that float32 holds
        assert decide(router, np.full((1, 10), score, np.float32))[0].tolist() == [tenths - 1]


def shares_kept(method: str, budgets: Sequence[int], **more: Any) -> Any:
    """Return for three images what a coverage router says, the stem's outputs by name, and each bucket's index."""
    order = Order(
        recipe=load_recipe(method), budgets=tuple(map(str, budgets)), image_size=64, router="coverage", **more
    )
    assembly = assemble(order)
    router, models = assembly.router, assembly.models
    assert router is not None
    assert assembly.seam is not None
    stem = Stem(models[-1], assembly.seam)
    images = np.random.default_rng(0).standard_normal((3, 3, 64, 64), dtype=np.float32)
    with torch.no_grad():
        handed = dict(zip((spec.name for spec in stem.output_specs()), stem(torch.from_numpy(images)), strict=True))
        _, need, _ = decide(router, *(handed[name] for name in router.stem_inputs))
        index = [model(torch.from_numpy(images))[1].numpy() for model in models]
    return [
        (
            need[place],
            {name: value[place].double().numpy() for name, value in handed.items()},
            [i[place] for i in index],
        )
        for place in range(3)
    ]


def mean_of_heads(stem: dict[str, Any], name: str = "class_attention") -> Any:
    return stem[name].mean(0)


def norms(stem: dict[str, Any]) -> Any:
    return np.linalg.norm(stem["tokens"], axis=-1)


@pytest.mark.parametrize(
    ("method", "params", "score", "prefix"),
    [
        ("attention-pruning", {}, mean_of_heads, 0),
        ("attention-pruning", {"heads": "max", "dropped": "residual"}, lambda s: s["class_attention"].max(0), 0),
        (
            "attention-pruning",
            {"score": "hybrid"},
            lambda s: 0.6 * norms(s) + 0.4 * mean_of_heads(s, "received_attention"),
            0,
        ),
        ("attention-pruning", {"score": "norm"}, norms, 0),
        ("attention-pruning", {"score": "text-likelihood"}, lambda s: s["text_likelihood"], 0),
        ("fastervlm", {}, mean_of_heads, 0),
        ("visionzip", {}, mean_of_heads, 1),
        ("vispruner", {"important_ratio": 1.0}, mean_of_heads, 0),
        ("prumerge", {"adaptive": False}, None, 0),
    ],
)
def test_coverage_is_of_the_scores_that_the_method_keeps_by(
    method: str, params: dict[str, Any], score: Any, prefix: int
) -> None:
    """What the buckets' own indices leave out is the share that the router says they lose."""
    pytest.importorskip("timm")
    for need, stem, kept in shares_kept(method, [5, 9, 12], backbone="test_vit", params=params):
        if score is None:  # class attention from query and keys
            logits = stem["keys"] @ stem["class_query"] / stem["keys"].shape[-1] ** 0.5
            scores = np.exp(logits - logits.max())
            scores = scores[1:] / scores.sum()
        else:
            scores = np.asarray(score(stem), float)
        assert scores.shape == (16,)
        for said, index in zip(need, kept[:-1], strict=True):
            own = index[prefix:]
            stays = scores[own[own >= 0] - prefix].sum()
            assert said == pytest.approx(1 - stays / scores.sum(), abs=1e-5)


def test_coverage_of_a_sum_inside_a_host() -> None:
    pytest.importorskip("timm")
    params = {"score": "cumulative-attention", "schedule": "step", "blocks": [4, 8]}
    more: dict[str, Any] = {"backbone": "vit_tiny_patch16_224", "preset": "inside"}
    for need, stem, _ in shares_kept("attention-pruning", [4, 8], params=params, **more):
        ordered = np.sort(stem["score"][1:])[::-1]
        assert need == [pytest.approx(ordered[4:].sum() / ordered.sum(), abs=1e-5)]
    with pytest.raises(InvalidSpec, match=r"router coverage reads the score .* or makes it behind the stem"):
        shares_kept("evit", [4, 8], backbone="vit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("values", "expected"), [([0.0], 0.0), ([-1.0], 0.0), ([-5.0, 1.0], 0.5), ([1e-25], 0.75), ([3e30], 0.75)]
)
def test_coverage_of_odd_scores_is_a_number(values: list[float], expected: float) -> None:
    """Nothing to hold: the smallest bucket, which loses nothing; what is below zero counts as zero."""
    scores = np.resize(np.array(values, np.float32), (1, 3, 36))
    bucket, need, _ = decide(build("coverage", stem_site((9, 18))), scores)
    assert need.tolist() == [[pytest.approx(expected, abs=1e-6)]]
    assert bucket.tolist() == [int(expected > 0)]


# -- policy ---------------------------------------------------------------------------------------------------------


def keep_of(router: Router, patches: Any, factor: float) -> tuple[float, float]:
    """Return the ratio and what is kept, by numpy."""
    state = {name: value.double().numpy() for name, value in router.state_dict().items()}
    x = patches.astype(float).mean(0)
    for layer in ("fc1", "fc2"):
        x = np.maximum(0, state[f"{layer}.weight"] @ x + state[f"{layer}.bias"])
    ratio = 1 / (1 + math.exp(-(state["fc3.weight"] @ x + state["fc3.bias"]).item()))
    return ratio, 1 - min(1.0, ratio * factor)


@pytest.mark.parametrize(
    ("cuts", "depth", "factor"),
    [((), 0, 1.0), ((), 12, 1.0), ((3, 6, 9), 12, 1.75), ((0,), 12, 1.0), ((11,), 12, 23 / 12)],
)
def test_policy_takes_the_nearest_bucket(cuts: tuple[int, ...], depth: int, factor: float) -> None:
    buckets = (9, 18, 27, 36)
    router: Any = build("policy", stem_site(buckets, cuts=cuts, depth=depth))
    assert router.default_thresholds == pytest.approx((0.375, 0.625, 0.875))
    with torch.no_grad():
        router.fc3.weight *= 20
        router.fc3.bias -= 1.0
    rng, seen = np.random.default_rng(2), set()
    for _ in range(40):
        given = with_prefix(rng.normal(size=(36, 8)) + 2 * rng.normal(size=8))
        ratio, keep = keep_of(router, given[0, 1:], factor)
        bucket, need, signals = decide(router, given)
        assert need[0] == pytest.approx([keep] * 3, abs=1e-5)
        assert signals["ratio"][0] == pytest.approx(ratio, abs=1e-5)
        assert signals["removed"][0] == pytest.approx(1 - keep, abs=1e-5)
        distances = [abs(count / 36 - keep) for count in buckets]
        assert bucket[0] == distances.index(min(distances))
        seen.add(int(bucket[0]))
    assert len(seen) >= 3


def test_policy_between_two_buckets_takes_the_larger() -> None:
    router: Any = build("policy", stem_site((9, 18)))
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.zero_()
        router.fc3.bias.fill_(math.log(0.625 / 0.375))
    tokens = np.zeros((1, 37, 8), np.float32)
    need = float(decide(router, tokens)[1][0, 0])
    assert need == pytest.approx(0.375)
    assert decide(router, tokens, thresholds=[need])[0].tolist() == [1]
    assert decide(router, tokens, thresholds=[next_above(need)])[0].tolist() == [0]


def test_policy_says_that_it_is_untrained_until_it_is_loaded() -> None:
    router, other = build("policy", stem_site()), build("policy", stem_site())
    assert router.remarks == ("the policy router is untrained: its weights are random",)
    state = {name: value + 1 for name, value in router.state_dict().items()}
    assert sorted(state) == [f"{layer}.{part}" for layer in ("fc1", "fc2", "fc3") for part in ("bias", "weight")]
    other.load(state)
    assert other.remarks == ()
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("fc2.bias"), "1 missing: fc2.bias"),
        (lambda state: state.update({"fc4.bias": torch.zeros(1)}), "1 not known: fc4.bias"),
        (lambda state: state.update({"fc1.weight": torch.zeros(512, 16)}), "fc1.weight (512, 16) instead of (512, 8)"),
        (lambda state: state.update({"fc3.bias": torch.zeros(1, dtype=torch.int64)}), "fc3.bias torch.int64"),
    ],
    ids=["missing", "unknown", "the notes' width", "integers"],
)
def test_policy_refuses_weights_that_do_not_fit(change: Callable[[dict[str, Any]], object], says: str) -> None:
    router = build("policy", stem_site())
    state = dict(router.state_dict())
    change(state)
    with pytest.raises(WeightsError) as caught:
        router.load(state)
    assert says in str(caught.value)
    assert router.remarks


def test_policy_on_a_table_speaks_of_entries() -> None:
    """The notes' int(32 + 96 n), in the nearest of four nested buckets."""
    router = build("policy", stem_site((32, 64, 96, 128), tokens=196, span=(32, 128)))
    assert router.default_thresholds == pytest.approx((1 / 6, 1 / 2, 5 / 6))
    order = Order(
        recipe=load_recipe("adaptive-lookupvit"), preset="smoke-host", budgets=("2", "4", "8"), router="policy"
    )
    made = assemble(order).router
    assert made is not None
    assert made.default_thresholds == pytest.approx((1 / 6, 2 / 3))


def test_blanks_do_not_hide_words() -> None:
    assert read_words(" " * 20_000 + "how many not why small").tolist() == [[5, 1, 1, 1, 1]]
    assert read_words("x " * 20_000 + "why").tolist() == [[5000, 0, 0, 0, 0]]


# -- what all routers keep ------------------------------------------------------------------------------------------


def site_of(name: str, buckets: Sequence[int]) -> RouterSite:
    return image_site(buckets) if name in IMAGE_ROUTERS else stem_site(buckets)


def feed_of(router: Router, batch: int, seed: int) -> list[Any]:
    """Return what a router reads, without thresholds: seed 0 all zeros, then random."""
    rng = np.random.default_rng(seed)
    feed: list[Any] = []
    for spec in router.input_specs(batch)[:-1]:
        if spec.name == "words":
            values = rng.integers(0, 2, spec.shape) * ([20, 1, 1, 1, 1] if seed % 2 else [3, 0, 0, 1, 0])
        elif spec.dtype == "uint8":
            values = rng.integers(0, 256, spec.shape)
        elif spec.kind == "image":
            kinds = list(pictures().values())
            values = np.concatenate([normalised(kinds[(seed + place) % len(kinds)]) for place in range(batch)])
        elif spec.kind == "attention":
            values = rng.random(spec.shape) ** rng.integers(1, 9)
        else:
            slope = np.linspace(0, 2, spec.shape[1]).reshape(1, -1, *[1] * (len(spec.shape) - 2))
            values = rng.normal(size=spec.shape) + rng.normal() * slope
        feed.append((values * (seed > 0)).astype(spec.dtype))
    return feed


def test_every_router_but_the_fixed_one_is_tested_here() -> None:
    assert {*IMAGE_ROUTERS, *STEM_ROUTERS, "fixed"} == set(router_names())
    for name in (*IMAGE_ROUTERS, *STEM_ROUTERS):
        cls = router_class(name)
        assert cls.__name__ == f"{name.title()}Router"
        assert (cls.reads, cls.reads_words) == (("image", True) if name in IMAGE_ROUTERS else ("stem", False))


@pytest.mark.parametrize("buckets", [(4, 9), (4, 9, 16), (4, 9, 16, 25), (1, 2, 3, 5, 8, 13, 36)])
@pytest.mark.parametrize("name", [*IMAGE_ROUTERS, *STEM_ROUTERS])
def test_thresholds_rise_and_every_bucket_is_named(name: str, buckets: tuple[int, ...]) -> None:
    router = build(name, site_of(name, buckets))
    thresholds = router.default_thresholds
    assert len(thresholds) == len(buckets) - 1
    assert list(thresholds) == sorted(thresholds)
    assert all(0 < cut < 1 for cut in thresholds)
    special = {("difficulty", 4), ("detail", 2), ("complexity", 3)}
    if name in ("difficulty", "detail", "complexity") and (name, len(buckets)) not in special:
        assert thresholds == even_thresholds(len(buckets))
    feed = feed_of(router, 3, seed=4)
    assert decide(router, *feed, thresholds=[2.0] * len(thresholds))[0].tolist() == [0] * 3
    assert decide(router, *feed, thresholds=[0.0] * len(thresholds))[0].tolist() == [len(buckets) - 1] * 3


@pytest.mark.parametrize("name", [*IMAGE_ROUTERS, *STEM_ROUTERS])
def test_samples_do_not_see_each_other_and_fp64_agrees(name: str) -> None:
    router = build(name, site_of(name, (4, 9, 16)))
    for seed in range(6):
        feed = feed_of(router, 3, seed)
        bucket, need, signals = decide(router, *feed)
        for place in range(3):
            alone = decide(router, *(part[place : place + 1] for part in feed))
            assert alone[0][0] == bucket[place]
            assert alone[1][0] == pytest.approx(need[place], abs=1e-6)
        router.double()
        _, precise, more = decide(router, *(part.astype(float) for part in feed))
        router.float()
        assert precise.dtype == np.float64
        assert need == pytest.approx(precise, abs=1e-5)
        for key, value in signals.items():
            assert value == pytest.approx(more[key], rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("name", [*IMAGE_ROUTERS, *STEM_ROUTERS])
def test_one_bucket_is_nothing_to_choose(name: str) -> None:
    with pytest.raises(InvalidSpec, match=r"there is one bucket, 16, and nothing to choose; give several --budget"):
        build(name, site_of(name, (16,)))


@pytest.mark.parametrize("name", [*IMAGE_ROUTERS, *STEM_ROUTERS])
def test_a_router_needs_what_it_reads(name: str) -> None:
    says = "this model takes no single image" if name in IMAGE_ROUTERS else "reads what the stem hands over, and there"
    with pytest.raises(InvalidSpec, match=says):
        build(name, RouterSite(buckets=(4, 9), tokens_in=36))


@pytest.mark.parametrize("name", [*IMAGE_ROUTERS, "complexity", "coverage"])
def test_routers_without_weights_load_none(name: str) -> None:
    with pytest.raises(InvalidSpec, match="has no weights; drop --router-weights"):
        build(name, site_of(name, (4, 9))).load({})


@pytest.mark.parametrize(
    ("name", "site", "says"),
    [
        ("difficulty", image_site(side=15), "the image has 15 pixels a side"),
        ("complexity", stem_site(tokens=35), r"hands over 35 patch tokens \(of 36\); choose another --router"),
        ("complexity", stem_site(tokens=4), "3 x 3 tokens or more, and the stem hands over 4 patch tokens"),
        (
            "complexity",
            stem_site(stem=(TensorSpec("tokens", (1, 2, 36, 8), "float32", "tokens"),)),
            r"tokens float32\[1, 2, 36, 8\]; choose another --router",
        ),
        (
            "policy",
            stem_site(stem=(TensorSpec("maps", (1, 8, 6, 6), "float32", "tokens"),)),
            r"reads tokens \(B, N, D\), and the stem hands over maps float32\[1, 8, 6, 6\]",
        ),
        (
            "coverage",
            stem_site(stem=stem_site().stem[:1], score=None),
            r"the stem hands over tokens float32\[1, 37, 8\], of which this method makes none",
        ),
    ],
)
def test_a_router_refuses_what_it_cannot_read(name: str, site: RouterSite, says: str) -> None:
    with pytest.raises(InvalidSpec, match=says):
        build(name, site)


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("complexity", {"low": 0.5, "high": 0.5}, "low=0.5 must lie below high=0.5"),
        ("complexity", {"low": -1.0}, ">= 0"),
        ("complexity", {"high": math.nan}, "> 0"),
        ("coverage", {"p": 0.0}, "> 0"),
        ("coverage", {"p": 1.0}, "< 1"),
        ("coverage", {"p": "half"}, "Expected `float`"),
    ],
)
def test_parameters_out_of_range_are_refused(name: str, values: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidSpec, match=says):
        router_class(name).parse_params(values, name=name)


@pytest.mark.parametrize("name", [*IMAGE_ROUTERS, *STEM_ROUTERS])
def test_unknown_parameters_are_refused(name: str) -> None:
    with pytest.raises(UnknownName, match=f"no parameter of router {name} 'weight'"):
        router_class(name).parse_params({"weight": 1.0}, name=name)


# -- graphs ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    site: RouterSite
    batch: int = 2
    opset: int = 18


CASES = {
    "difficulty": Case("difficulty", image_site()),
    "difficulty, uint8": Case("difficulty", image_site(dtype="uint8"), batch=1, opset=20),
    "detail": Case("detail", image_site((49, 89), patch_size=12)),
    "complexity": Case("complexity", stem_site()),
    "coverage": Case("coverage", stem_site((4, 9, 16, 36))),
    "coverage of a score": Case(
        "coverage",
        stem_site(stem=(TensorSpec("score", (1, 37), "float32", "features"),), **summed(1, (4, 9, 16))),
        batch=1,
        opset=20,
    ),
    "policy": Case("policy", stem_site(cuts=(3, 6), depth=12)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_graph_is_static_allowed_and_equal(case: Case) -> None:
    """What `write_graphs` checks of a bucket, then ONNX Runtime against torch."""
    router = build(case.name, case.site)
    specs = router.input_specs(case.batch)
    graph = lower(router, inputs=specs, outputs=router.output_specs(case.batch), opset=case.opset)
    strip_metadata(graph, producer_version="0")
    require_static(graph)
    inline_functions(graph)
    require_static(graph)
    require_allowed(graph, load_oplists(), extra=())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        ir.to_proto(graph).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    thresholds = np.array([router.default_thresholds] * case.batch, np.float32)
    buckets = set()
    for seed in range(12):
        feed = [*feed_of(router, case.batch, seed), thresholds]
        found = session.run(None, {spec.name: value for spec, value in zip(specs, feed, strict=True)})
        expected = decide(router, *feed[:-1])
        assert found[0].dtype == np.int64
        assert found[0].tolist() == expected[0].tolist()
        assert found[1] == pytest.approx(expected[1], abs=1e-6)
        for value, key in zip(found[2].T, router.signal_names, strict=True):
            assert value == pytest.approx(expected[2][key], rel=1e-5, abs=1e-5), key
        buckets |= set(found[0].tolist())
    assert len(buckets) >= 2 or case.name == "policy"
