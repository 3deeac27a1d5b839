"""A bundle with a router: which bucket a request goes to, what runs for it, and what each verb shows of it."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="exports need torch")
onnx = pytest.importorskip("onnx", reason="a router's graph is changed")

import edgecomp  # noqa: E402 - torch first, or skip
from edgecomp import api  # noqa: E402
from edgecomp.bundle import GOLDEN, golden_key, open_bundle  # noqa: E402
from edgecomp.errors import BundleError, InvalidSpec, RunError  # noqa: E402
from edgecomp.images import to_pixels  # noqa: E402
from edgecomp.profiles.result import RoutedTime  # noqa: E402
from edgecomp.report.profile import describe_profile  # noqa: E402
from edgecomp.resources import photograph_path  # noqa: E402
from edgecomp.runners import open_runner  # noqa: E402
from edgecomp.serving import Model  # noqa: E402
from edgecomp.specs.origin import file_sha256  # noqa: E402
from edgecomp.specs.router import ROUTERS, router_names  # noqa: E402
from edgecomp.words import read_words  # noqa: E402

Cli = Callable[..., Any]
Edit = Callable[[Path, Callable[[dict[str, Any]], object]], None]

SIDE = 32
BUCKETS = (4, 8, 12)
STD = (0.2, 0.3, 0.4)
LONG = "How many small birds are not on the wire, and why? " * 12


def tiny_host() -> Any:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(1)
    host = VisionTransformer(
        img_size=SIDE, patch_size=8, num_classes=7, embed_dim=24, depth=2, num_heads=2, mlp_ratio=1
    )
    for parameter in host.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.zeros_(host.cls_token)
    host.pretrained_cfg = {"crop_pct": 1.0, "mean": (0.4, 0.5, 0.6), "std": STD}
    return host


REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "difficulty": ("dynamicvit", {"budget": BUCKETS, "output": "logits", "batch": [1, 2], "params": {"blocks": [1]}}),
    "detail": ("fastervlm", {"budget": [4, 8]}),
    "complexity": ("query-aware", {"budget": [4, 8]}),
    "coverage": ("fastervlm", {"budget": BUCKETS, "batch": [1, 2]}),
    "policy": ("tome", {"budget": [4, 8]}),
    "fixed": ("fastervlm", {"budget": [4, 8], "router_params": {"budget": 4}}),
}


@pytest.fixture(scope="module")
def of_router(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Export a bundle for each router, when it is first asked for; not to be written to."""
    found: dict[str, Path] = {}

    def export(router: str) -> Path:
        if router not in found:
            method, options = REQUESTS[router]
            out = tmp_path_factory.mktemp("routed") / router
            found[router] = api.export(method, backbone=tiny_host(), router=router, out=out, **options).bundle
        return found[router]

    return export


@pytest.fixture(scope="module")
def by_words(of_router: Callable[[str], Path]) -> Path:
    """A bundle whose router reads image and words: three buckets, batches 1 and 2, logits."""
    return of_router("difficulty")


@pytest.fixture(scope="module")
def by_stem(of_router: Callable[[str], Path]) -> Path:
    """A bundle whose router reads the stem: three buckets, batches 1 and 2."""
    return of_router("coverage")


def pictures(count: int = 9) -> list[Any]:
    """Images (H, W, 3) from plain to noisy."""
    rng = np.random.default_rng(0)
    noise = rng.integers(-128, 128, (count, SIDE, SIDE, 3))
    strength = np.linspace(0, 1, count)[:, None, None, None]
    return list(np.clip(128 + strength * noise, 0, 255).astype(np.uint8))


def set_thresholds(bundle: Path, edit: Edit, inputs: list[dict[str, Any]] | list[Any]) -> list[Any]:
    """Move the thresholds into the middle of what the images need, and return their needs."""
    with edgecomp.load(bundle, threads=1) as model:
        needs = np.array([model(one).need for one in inputs], np.float64)
    cuts = needs.shape[1]
    edges = [float(np.quantile(needs[:, k], (k + 1) / (cuts + 1), method="midpoint")) for k in range(cuts)]
    edit(bundle, lambda raw: raw["router"].update(thresholds=edges))
    return list(needs)


@pytest.fixture
def spread(by_stem: Path, tmp_path: Path, edit_manifest: Edit) -> Path:
    """A copy of `by_stem` whose thresholds send the pictures to different buckets."""
    bundle = shutil.copytree(by_stem, tmp_path / "spread")
    set_thresholds(bundle, edit_manifest, pictures())
    return bundle


@pytest.fixture
def spread_words(by_words: Path, tmp_path: Path, edit_manifest: Edit) -> Path:
    """Likewise of `by_words`."""
    bundle = shutil.copytree(by_words, tmp_path / "spread_words")
    set_thresholds(bundle, edit_manifest, pictures())
    return bundle


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often each graph runs in `edgecomp.serving`."""
    counted: Counter[str] = Counter()

    def counting(name: str, model: Path, **options: Any) -> Any:
        runner = open_runner(name, model, **options)
        infer = runner.infer

        def count(inputs: dict[str, Any]) -> dict[str, Any]:
            counted[model.name] += 1
            return infer(inputs)

        runner.infer = count  # type: ignore[method-assign]
        return runner

    monkeypatch.setattr("edgecomp.serving.model.open_runner", counting)
    return counted


def pixels_of(bundle: Path, image: Any) -> Any:
    preprocess = open_bundle(bundle).manifest.preprocess
    assert preprocess is not None
    return to_pixels(Image.fromarray(image), preprocess, "float32")


def request_of(bundle: Path, image: Any) -> dict[str, Any]:
    """Return an image as named inputs, with what a model takes beside it."""
    inputs: dict[str, Any] = {"image": pixels_of(bundle, image)}
    for spec in open_bundle(bundle).manifest.buckets[0].inputs[1:]:
        inputs[spec.name] = np.random.default_rng(5).standard_normal((1, *spec.shape[1:]), dtype=np.float32)
    return inputs


def by_hand(bundle: Path, inputs: dict[str, Any], text: str = "") -> tuple[int, Any, dict[str, float]]:
    """Run the graphs one after the other, without `edgecomp.serving`; return bucket, need and signals."""
    manifest = open_bundle(bundle).manifest
    assert manifest.router is not None
    graph = next(graph for graph in manifest.router.graphs if graph.batch == 1)
    seen = {**inputs, "words": read_words(text)}
    seen["thresholds"] = np.array([manifest.router.thresholds], np.float32)
    if graph.stem:
        with open_runner("onnxruntime", bundle / graph.stem, threads=1) as stem:
            seen |= stem.infer({"image": inputs["image"]})
    with open_runner("onnxruntime", bundle / graph.model, threads=1) as runner:
        found = runner.infer({name: seen[name] for name in runner.input_names})
    kept = sorted({bucket.budget.tokens_out for bucket in manifest.buckets})
    place = sum(need >= cut for need, cut in zip(found["need"][0], seen["thresholds"][0], strict=True))
    assert found["bucket"].tolist() == [place]
    return kept[place], found["need"][0], dict(zip(manifest.router.signals, found["signals"][0], strict=True))


# -- one request ----------------------------------------------------------------------------------------------


def test_every_router_is_served_here() -> None:
    assert set(REQUESTS) == set(router_names())


@pytest.mark.parametrize("router", [name for name in router_names() if name != "fixed"])
def test_a_request_goes_where_its_need_says(
    router: str, of_router: Callable[[str], Path], tmp_path: Path, edit_manifest: Edit
) -> None:
    """And it gets what that bucket gives when it is asked for by its budget."""
    bundle = shutil.copytree(of_router(router), tmp_path / router)
    requests = [request_of(bundle, image) for image in pictures()]
    set_thresholds(bundle, edit_manifest, requests)
    record = open_bundle(bundle).manifest.router
    assert record is not None
    assert (record.name, record.reads_words) == (router, ROUTERS[router].words)
    with edgecomp.load(bundle, threads=1) as model:
        served = set()
        for request in requests:
            answer = model(request)
            budget, need, signals = by_hand(bundle, request)
            assert answer.budget == budget
            assert np.array(answer.need, np.float32).tolist() == need.tolist()
            assert answer.signals == signals
            alone = model(request, budget=budget)
            assert list(answer.outputs) == list(alone.outputs)
            for name, array in alone.outputs.items():
                assert np.array_equal(answer[name], array), name
            assert answer.reason.startswith(f"router {router}")
            assert alone.reason == f"the smallest that keeps {budget}"
            assert (alone.need, alone.signals) == ((), {})
            served.add(budget)
        assert len(served) > 1  # it does choose
        assert (bool(record.graphs[0].stem)) == (ROUTERS[router].reads == "stem")


def test_fixed_is_always_the_same(of_router: Callable[[str], Path], runs: Counter[str]) -> None:
    with edgecomp.load(of_router("fixed"), threads=1) as model:
        for image in pictures(3):
            answer = model(image)
            assert (answer.budget, answer.reason) == (4, "router fixed")
            assert (answer.need, answer.signals) == ((), {})
        assert model(image, budget=8).budget == 8
        assert (model.stats().routed, model.stats().router_seconds) == (0, {})
    assert runs == {"stem.onnx": 4, "model.m4.b1.onnx": 3, "model.m8.b1.onnx": 1}


def test_the_reason_says_which_side(spread_words: Path) -> None:
    """The threshold below that was reached, and the one above that was not."""
    record = open_bundle(spread_words).manifest.router
    assert record is not None
    low, high = (f"{cut:.3f}" for cut in record.thresholds)
    with edgecomp.load(spread_words, threads=1) as model:
        reasons = {answer.budget: answer for answer in map(model, pictures())}
    need = {budget: f"{answer.need[0]:.3f}" for budget, answer in reasons.items()}
    assert reasons[4].reason == f"router difficulty: need {need[4]} is below {low}"
    assert reasons[8].reason == f"router difficulty: need {need[8]} reaches {low} and {need[8]} is below {high}"
    assert reasons[12].reason == f"router difficulty: need {need[12]} reaches {high}"


def test_what_the_reason_says_is_true(by_stem: Path, tmp_path: Path, edit_manifest: Edit) -> None:
    """Also where a request reaches a higher threshold and not a lower one, as thresholds of one each may have it."""
    image = pictures()[-1]
    with edgecomp.load(by_stem, threads=1) as model:
        first, second = model(image).need
    said = re.compile(r"([\d.]+) (reaches|is below) ([\d.]+)")
    for number, cuts in enumerate(([first + 0.1, second / 2], [first / 2, second + 0.1])):
        bundle = shutil.copytree(by_stem, tmp_path / str(number))
        edit_manifest(bundle, lambda raw, cuts=cuts: raw["router"].update(thresholds=cuts))
        with edgecomp.load(bundle, threads=1) as model:
            answer = model(image)
        reached = sum(need >= cut for need, cut in zip((first, second), cuts, strict=True))
        assert answer.budget == BUCKETS[reached]
        found = said.findall(answer.reason)
        assert found or f"{reached} of 2 thresholds are reached" in answer.reason
        for need, verb, cut in found:
            assert (float(need) >= float(cut)) is (verb == "reaches"), answer.reason


def test_words_change_the_bucket(by_words: Path) -> None:
    """In any script, empty, and long; a request without a text is one with an empty text."""
    plain = np.full((SIDE, SIDE, 3), 128, np.uint8)
    pixels = {"image": pixels_of(by_words, plain)}
    texts = ["", LONG, "Why?", "\u4f60\u597d\uff0c\u4e16\u754c", "\U0001f600", "\u0645\u0627 \u0647\u0630\u0627\u061f"]
    texts += ["word " * 100_000, "\x00\n\t", "How many, and why not?"]
    with edgecomp.load(by_words, threads=1) as model:
        silent = model(plain)
        assert silent.signals == model(plain, None).signals
        budgets = []
        for text in texts:
            answer = model(plain, text)
            expected, need, signals = by_hand(by_words, pixels, text)
            assert (answer.budget, answer.signals) == (expected, signals)
            assert np.array(answer.need, np.float32).tolist() == need.tolist()
            budgets.append(answer.budget)
        assert model(plain, "").need == silent.need
    assert (budgets[0], budgets[texts.index(LONG)], budgets[6]) == (4, 12, 12)


def test_a_budget_overrides_the_router(by_words: Path, runs: Counter[str]) -> None:
    with edgecomp.load(by_words, threads=1) as model:
        plain = pictures()[0]
        for budget, kept in ((4, 4), (5, 8), ("75%", 12), (12, 12)):
            assert model(plain, LONG, budget=budget).budget == kept
        assert model.stats().routed == 0
    assert not [name for name in runs if name.startswith("router")]


@pytest.mark.parametrize(
    ("request_", "options", "message"),
    [
        ("coverage", {"text": "why?"}, r"a text was given, and nothing in .* reads words; drop it, or export"),
        ("coverage", {"text": ""}, "a text was given"),
        ("fixed", {"text": "why?"}, "a text was given"),
        ("fixed", {"features": {"query": np.zeros((1, 24), np.float32)}}, "unexpected: query"),
        ("complexity", {}, r"takes query float32\[1, 24\] beside the image; give features"),
        ("complexity", {"features": {}}, "inputs missing: query"),
        ("complexity", {"features": {"query": np.zeros((2, 24), np.float32)}}, r"shape \[2, 24\]"),
        ("complexity", {"features": {"query": np.full((1, 24), np.nan, np.float32)}}, "holds 24 NaN"),
        ("difficulty", {"text": 5}, "text 5 is of type int; give the question as a str"),
        ("difficulty", {"text": b"why?"}, "is of type bytes"),
        ("difficulty", {"budget": 4.0}, r"budget 4\.0 is of type float; give a count such as 4"),
        ("difficulty", {"budget": True}, "budget True is of type bool"),
        ("difficulty", {"budget": 0}, "budget 0 is not between 1 and 12"),
        ("difficulty", {"budget": 13}, "budget 13 is not between 1 and 12"),
    ],
)
def test_what_a_model_does_not_take(
    request_: str, options: dict[str, Any], message: str, of_router: Callable[[str], Path]
) -> None:
    with edgecomp.load(of_router(request_), threads=1) as model:
        with pytest.raises((InvalidSpec, RunError), match=message):
            model(pictures()[0], **options)
        assert model.stats().requests == model.stats().routed == 0


# -- what runs ------------------------------------------------------------------------------------------------


def test_the_stem_runs_once_a_request(spread: Path, spread_words: Path, runs: Counter[str]) -> None:
    """Whether the router reads it or not."""
    for bundle in (spread, spread_words):
        runs.clear()
        with edgecomp.load(bundle, threads=1) as model:
            served = Counter(model(image).budget for image in pictures())
            assert len(served) > 1
        assert (runs["stem.b1.onnx"], runs["router.b1.onnx"]) == (9, 9)
        assert {name: count for name, count in runs.items() if name.startswith("model")} == {
            f"model.m{tokens}.b1.onnx": count for tokens, count in served.items()
        }


def test_a_batch_runs_its_stem_once_too(spread: Path, runs: Counter[str]) -> None:
    """Seven images: three pairs and one alone, through stem and router; then the pairs that each bucket has."""
    with edgecomp.load(spread, threads=1) as model:
        served = Counter(answer.budget for answer in model.infer_batch(pictures()[:7]))
    assert {name: runs[name] for name in runs if not name.startswith("model")} == {
        "stem.b2.onnx": 3, "stem.b1.onnx": 1, "router.b2.onnx": 3, "router.b1.onnx": 1,
    }  # fmt: skip
    for tokens, count in served.items():
        assert runs[f"model.m{tokens}.b2.onnx"] == count // 2
        assert runs[f"model.m{tokens}.b1.onnx"] == count % 2


def test_a_batch_equals_one_by_one(spread: Path, spread_words: Path) -> None:
    """In the order of the requests, whatever goes where; with texts, and with budgets for some."""
    images = pictures()
    order = np.random.default_rng(1).permutation(len(images))
    texts = [LONG if place % 3 == 0 else None for place in range(len(images))]
    budgets = [None, 4, None, 12, None, None, 8, None, None]
    for bundle, words in ((spread, [None] * len(images)), (spread_words, texts)):
        with edgecomp.load(bundle, threads=1) as model:
            mixed = [images[place] for place in order]
            together = model.infer_batch(mixed, words, budget=budgets)
            alone = [model(*one, budget=budget) for *one, budget in zip(mixed, words, budgets, strict=True)]
            assert len({answer.budget for answer in alone}) == 3
            for one, other in zip(together, alone, strict=True):
                assert one.budget == other.budget
                assert one.need == pytest.approx(other.need, abs=1e-5)
                assert one.signals == pytest.approx(other.signals, abs=1e-5)
                for name, array in other.outputs.items():
                    assert np.abs(one[name] - array).max() <= 1e-4, name


def test_batches_that_do_not_fit(by_words: Path) -> None:
    images = pictures(3)
    with edgecomp.load(by_words, threads=1) as model:
        with pytest.raises(InvalidSpec, match="2 texts for 3 requests"):
            model.infer_batch(images, ["a", "b"])
        with pytest.raises(InvalidSpec, match="1 features for 3 requests"):
            model.infer_batch(images, features=[None])
        with pytest.raises(InvalidSpec, match="4 budgets for 3 requests"):
            model.infer_batch(images, budget=[4, 4, 4, 4])
        with pytest.raises(InvalidSpec, match="texts are a single str for 3 requests"):
            model.infer_batch(images, "why")
        assert model.infer_batch([], []) == []
        assert model.stats().requests == 0


def test_what_is_counted(spread_words: Path) -> None:
    with edgecomp.load(spread_words, threads=1) as model:
        assert (model.stats().routed, model.stats().router_seconds) == (0, {})
        served = Counter(model(image).budget for image in pictures())
        served.update(answer.budget for answer in model.infer_batch(pictures()))
        served.update(model(image, budget=8).budget for image in pictures(2))
        stats = model.stats()
        assert (stats.requests, stats.routed) == (20, 18)
        assert {tokens: bucket.requests for tokens, bucket in stats.buckets.items()} == dict(served)
        assert sum(bucket.share for bucket in stats.buckets.values()) == pytest.approx(1)
        assert list(stats.router_seconds) == ["0.5", "0.9", "0.99"]
        assert 0 < stats.router_seconds["0.5"] <= stats.router_seconds["0.99"]
        metrics = stats.metrics()
        assert metrics["edgecomp_routed_total"] == 18
        assert metrics['edgecomp_router_seconds{quantile="0.5"}'] == stats.router_seconds["0.5"]
        assert {name.partition("{")[0] for name in metrics} == {
            "edgecomp_loads_total", "edgecomp_resident_buckets", "edgecomp_routed_total", "edgecomp_router_seconds",
            "edgecomp_requests_total", "edgecomp_request_seconds",
        }  # fmt: skip
        model.reset_stats()
        assert (model.stats().requests, model.stats().routed, model.stats().router_seconds) == (0, 0, {})


def test_one_resident_bucket_beside_stem_and_router(spread: Path, runs: Counter[str]) -> None:
    with edgecomp.load(spread, threads=1) as model:
        expected = [model(image) for image in pictures()]
    changes = sum(one.budget != other.budget for one, other in itertools.pairwise(expected))
    with edgecomp.load(spread, threads=1, resident=1) as model:
        for image, one in zip(pictures(), expected, strict=True):
            answer = model(image)
            assert model.stats().resident == (answer.budget,)
            assert np.array_equal(answer["kept"], one["kept"])
        assert model.stats().loads == 1 + changes > 2
        opened = set(model._shared)
    assert opened == {"stem.b1.onnx", "router.b1.onnx"}


def test_eight_threads(spread_words: Path) -> None:
    """Calls and batches at once, one resident bucket: every answer is right, and every request is counted."""
    images = pictures()
    texts = [None, LONG, "Why?"]
    with edgecomp.load(spread_words, threads=1) as alone:
        expected = {(i, t): alone(image, texts[t]) for i, image in enumerate(images) for t in range(3)}
    assert len({answer.budget for answer in expected.values()}) == 3

    def right(answer: Any, key: tuple[int, int]) -> None:
        one = expected[key]
        assert (answer.budget, answer.need) == (one.budget, pytest.approx(one.need, abs=1e-5))
        assert np.abs(answer["logits"] - one["logits"]).max() <= 1e-4

    def work(model: Model, number: int) -> None:
        for turn in range(6):
            keys = [((number + turn + k) % len(images), (number * turn + k) % 3) for k in range(3)]
            if number % 2:
                answers = model.infer_batch([images[i] for i, _ in keys], [texts[t] for _, t in keys])
            else:
                answers = [model(images[i], texts[t]) for i, t in keys]
            for answer, key in zip(answers, keys, strict=True):
                right(answer, key)

    with edgecomp.load(spread_words, threads=1, resident=1) as model:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: work(model, number), range(8)))
        stats = model.stats()
        assert (stats.requests, stats.routed) == (144, 144)
        assert len(stats.resident) == 1


def test_after_closing(by_words: Path, by_stem: Path) -> None:
    for bundle in (by_words, by_stem):
        model = edgecomp.load(bundle, threads=1)
        model(pictures()[0])
        model.close()
        model.close()
        for call in (lambda m=model: m(pictures()[0]), lambda m=model: m.infer_batch(pictures()[:2])):
            with pytest.raises(RunError, match="is closed; load the bundle again"):
                call()
        assert model.stats().requests == 1


def test_closing_lets_a_request_end(by_words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is closed while the router runs: stem and bucket still run, then all is let go."""
    model = edgecomp.load(by_words, threads=1)

    def opened(name: str, path: Path, **options: Any) -> Any:
        runner = open_runner(name, path, **options)
        if path.name.startswith("router"):
            infer = runner.infer
            runner.infer = lambda inputs: (model.close(), infer(inputs))[1]  # type: ignore[method-assign]
        return runner

    monkeypatch.setattr("edgecomp.serving.model.open_runner", opened)
    answer = model(pictures()[0])
    assert answer.outputs["logits"].shape == (1, 7)
    assert model.stats().requests == 1
    assert (dict(model._loaded), model._shared) == ({}, {})
    with pytest.raises(RunError, match="is closed; load the bundle again"):
        model(pictures()[0])


@pytest.mark.parametrize("bucket", [-1, 3, 1 << 40])
def test_a_router_that_answers_outside_the_buckets(
    bucket: int, by_words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mad:
        """A router that was altered, or is somebody else's."""

        name = version = "mad"
        input_names = ("image", "words", "thresholds")
        output_names = ("bucket", "need", "signals")

        def infer(self, inputs: dict[str, Any]) -> dict[str, Any]:
            return {"bucket": np.array([bucket]), "need": np.zeros((1, 2)), "signals": np.zeros((1, 6))}

    def opened(name: str, model: Path, **options: Any) -> Any:
        return Mad() if model.name.startswith("router") else open_runner(name, model, **options)

    monkeypatch.setattr("edgecomp.serving.model.open_runner", opened)
    with edgecomp.load(by_words, threads=1) as model:
        with pytest.raises(RunError, match=f"router difficulty names bucket {bucket}, and there are 3; export again"):
            model(pictures()[0])
        assert model.stats().requests == 0
        assert model(pictures()[0], budget=8).budget == 8  # it still serves what is asked for by budget


# -- run ------------------------------------------------------------------------------------------------------


def test_run_asks_the_router(by_words: Path, cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "plain.png"
    Image.new("RGB", (SIDE, SIDE), (128, 128, 128)).save(file)
    with edgecomp.load(by_words, threads=1) as model:
        for text in (None, LONG, ""):
            report, answer = api.run(by_words, file, text=text, threads=1), model(file, text)
            assert (report.tokens_out, report.reason, report.signals) == (answer.budget, answer.reason, answer.signals)
            assert report.model == f"model.m{answer.budget}.b1.onnx"
            assert np.array_equal(report.outputs["logits"], answer["logits"])
    asked = api.run(by_words, file, text=LONG, budget=8, threads=1)
    assert (asked.tokens_out, asked.reason, asked.signals) == (8, "the smallest that keeps 8", {})
    assert api.run(by_words, file, budget=5, threads=1).tokens_out == 8
    with pytest.raises(InvalidSpec, match="budget 0 is not between 1 and 12"):
        api.run(by_words, file, budget=0)
    said = cli("run", by_words, file, "--text", LONG, "--threads", 1)
    assert said.code == 0
    assert "chosen     router difficulty: need" in said.out
    assert "signals    edge_density 0.000, colour_variance 0.000" in said.out
    raw = json.loads(cli("run", by_words, file, "--text", LONG, "--threads", 1, "--json").out)
    assert raw["signals"]["query"] > 1
    assert raw["tokens_out"] == 12


def test_run_takes_features_beside_an_image(of_router: Callable[[str], Path], tmp_path: Path, cli: Cli) -> None:
    bundle, query = of_router("complexity"), np.random.default_rng(2).standard_normal((1, 24), dtype=np.float32)
    np.savez(tmp_path / "query.npz", query=query)
    np.savez(tmp_path / "other.npz", question=query)
    report = api.run(bundle, photograph_path(), text_features=tmp_path / "query.npz", threads=1)
    with edgecomp.load(bundle, threads=1) as model:
        answer = model(photograph_path(), features={"query": query})
    assert (report.tokens_out, report.reason) == (answer.budget, answer.reason)
    for name, array in answer.outputs.items():
        assert np.array_equal(report.outputs[name], array)
    for words, text in (
        (["--text-features", tmp_path / "other.npz"], "inputs missing: query; unexpected: question"),
        ([], "query float32[1, 24], and photograph.jpg is no file of named tensors"),
        (["--text-features", tmp_path / "query.npz", "--text", "why?"], "nothing in"),
        (["--text-features", tmp_path / "nowhere.npz"], "nowhere.npz does not exist"),
    ):
        said = cli("run", bundle, photograph_path(), *words)
        assert (said.code, said.out) == (2, "")
        assert text in said.err


def test_run_of_a_larger_batch_is_not_routed(by_words: Path, cli: Cli) -> None:
    report = api.run(by_words, photograph_path(), batch=2, threads=1)
    assert (report.tokens_out, report.reason) == (12, "batch 2, which `run` does not route")
    said = cli("run", by_words, photograph_path(), "--batch", 2, "--text", "why?")
    assert said.code == 2
    assert "batch 2 takes a file of all inputs" in said.err


# -- evaluate and profile -------------------------------------------------------------------------------------


def labelled(folder: Path, frames: list[Any], labels: list[int]) -> Path:
    folder.mkdir()
    grey = np.array([frame[:, :, 0] for frame in frames])
    for name, values in (("images-idx3", grey), ("labels-idx1", np.array(labels, np.uint8))):
        header = struct.pack(">I", 0x0800 + values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
        (folder / f"t10k-{name}-ubyte").write_bytes(header + values.tobytes())
    return folder


@pytest.fixture
def scored(by_words: Path, tmp_path: Path, edit_manifest: Edit) -> tuple[Path, Path, list[Any]]:
    """A bundle that routes, labels that its largest bucket gives, and the images."""
    bundle = shutil.copytree(by_words, tmp_path / "scored")
    grey = [np.repeat(frame[:, :, :1], 3, 2) for frame in pictures()]
    set_thresholds(bundle, edit_manifest, grey)
    with edgecomp.load(bundle, threads=1) as model:
        labels = [int(model(image, budget=12)["logits"].argmax()) for image in grey]
    return bundle, labelled(tmp_path / "data", grey, labels), grey


def test_evaluate_shows_what_routing_gives(scored: tuple[Path, Path, list[Any]], cli: Cli) -> None:
    bundle, data, grey = scored
    report = api.evaluate(bundle, data, batch=1, threads=1)
    manifest = open_bundle(bundle).manifest
    flops = {bucket.budget.tokens_out: bucket.flops for bucket in manifest.buckets if bucket.batch == 1}
    inputs = [{"image": pixels_of(bundle, image)} for image in grey]
    served = [by_hand(bundle, one)[0] for one in inputs]
    with edgecomp.load(bundle, threads=1) as model:
        given = [model(one, budget=b)["logits"].argmax() for one, b in zip(inputs, served, strict=True)]
        right = [model(one, budget=12)["logits"].argmax() for one in inputs]
    assert len(set(served)) == 3
    (row,) = [row for row in report.evaluation.scores if row.model == "routed"]
    assert row.right == sum(one == other for one, other in zip(given, right, strict=True))
    assert report.kept["routed"] == pytest.approx(np.mean(served))
    assert manifest.router is not None
    (router,) = [graph for graph in manifest.router.graphs if graph.batch == 1]  # it reads the image: no stem is in it
    assert (router.stem, report.flops["routed"]) == ("", sum(map(flops.get, served)) // len(served) + router.flops)
    (note,) = [note for note in report.notes if note.startswith("routed by")]
    shares = ", ".join(f"{b}: {served.count(b) / len(served):.1%}" for b in BUCKETS)
    assert note == f"routed by difficulty to {shares} (tokens kept: share)"
    said = cli("evaluate", bundle, "--data", data, "--batch", 1, "--threads", 1)
    shown = next(line.split() for line in said.out.splitlines() if line.startswith("routed "))
    assert shown[1:3] == [f"{np.mean(served):.1f}", f"{100 * row.top1.value:.2f}"]


def test_evaluate_gives_questions_to_a_router_that_reads_words(scored: tuple[Path, Path, list[Any]]) -> None:
    bundle, data, grey = scored
    silent = api.evaluate(bundle, data, batch=1, threads=1)
    assert any("reads words, and the images came without; --texts" in note for note in silent.notes)
    asked = api.evaluate(bundle, data, batch=1, threads=1, texts=[LONG])
    assert not any("reads words" in note for note in asked.notes)
    with edgecomp.load(bundle, threads=1) as model:
        budgets = [model({"image": pixels_of(bundle, image)}, LONG).budget for image in grey]
    assert asked.kept["routed"] == pytest.approx(np.mean(budgets))
    assert asked.kept["routed"] > silent.kept["routed"]


def test_questions_where_nothing_reads_them(by_stem: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match=r"1 texts were given, and no router of .* reads words; drop them"):
        api.evaluate(by_stem, tmp_path, texts=["why?"])


def test_evaluate_says_when_it_does_not_route(scored: tuple[Path, Path, list[Any]]) -> None:
    bundle, data, _ = scored
    pairs = api.evaluate(bundle, data, threads=1)
    assert pairs.evaluation.batch == 2
    assert "routed" not in pairs.kept
    assert "batch 2 is not routed: a router picks a bucket for each image; --batch 1 shows it" in pairs.notes
    one = api.evaluate(bundle, data, batch=1, budget=4, threads=1)
    assert "routed" not in one.kept
    assert not any("routed" in note for note in one.notes)


def test_profile_shows_what_routing_costs(by_stem: Path) -> None:
    report = api.profile(by_stem, duration_s=0.02, threads=1)
    ms = {profile.model: profile.p50_us / 1000 for profile in report.profiles}
    shared, own = ("stem", "router"), [f"model.m{tokens}" for tokens in BUCKETS]
    assert list(ms) == [f"{name}.b{batch}.onnx" for batch in (1, 2) for name in (*shared, *own)]
    assert [one.model for one in report.routing] == [f"{name}.b{batch}.onnx" for batch in (1, 2) for name in own]
    for one in report.routing:
        router_ms = ms[f"router.b{one.batch}.onnx"]
        assert one.router_ms == router_ms
        assert one.routed_ms == pytest.approx(router_ms + ms[one.model])
        ends = (ms[f"model.m4.b{one.batch}.onnx"], ms[f"model.m12.b{one.batch}.onnx"])
        assert (one.smallest_ms, one.largest_ms) == ends
    lines = [line for line in describe_profile(report).splitlines() if line.startswith("router, batch")]
    for line, one in zip(lines, report.routing[::3], strict=True):
        share = 100 * one.router_ms / one.smallest_ms
        assert line == (f"router, batch {one.batch}: {one.router_ms:.3f} ms, {share:.1f} % of stem and smallest bucket")


def test_profile_says_where_the_router_does_not_pay(by_stem: Path) -> None:
    alone = api.profile(by_stem, duration_s=0.02, threads=1, batch=1, budget=4)
    measured = alone.profiles
    assert ([profile.model for profile in measured], alone.routing) == (["model.m4.b1.onnx"], ())

    def printed(router_ms: float, largest_ms: float) -> str:
        times = {"router_ms": router_ms, "routed_ms": 2 + router_ms, "smallest_ms": 2.0, "largest_ms": largest_ms}
        routed = (RoutedTime(model="m4", batch=1, **times),)
        return describe_profile(msgspec.structs.replace(alone, routing=routed))

    slow = printed(1.0, 2.5)
    assert "router, batch 1: 1.000 ms, 50.0 % of stem and smallest bucket" in slow
    assert "routed to m4: 3.000 ms, and the largest bucket alone takes 2.500 ms: the router does not pay" in slow
    assert "does not pay" not in printed(0.1, 2.5)


# -- parity ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", [name for name in router_names() if name != "fixed"])
def test_parity_covers_router_and_what_is_routed(router: str, of_router: Callable[[str], Path]) -> None:
    """Both cases, an image on each side of each threshold, and requests as they are sent."""
    bundle = of_router(router)
    report = api.parity(bundle, threads=1)
    assert report
    manifest = open_bundle(bundle).manifest
    assert manifest.router is not None
    cuts = len(manifest.router.thresholds)
    cases = {"seeded", "photo", *(f"{side}-{place + 1}" for side in ("under", "over") for place in range(cuts))}
    rows = {(row.model, row.case, row.output) for row in report.outputs}
    for graph in manifest.router.graphs:
        assert {row[1:] for row in rows if row[0] == graph.model} == {
            (case, output) for case in cases for output in ("bucket", "need", "signals")
        }
    routed = {row[1:] for row in rows if row[0].startswith("routed to ")}
    outputs = [spec.name for spec in manifest.buckets[0].outputs]
    sent = {row[1] for row in rows if row[1].startswith("sent to ")}  # buckets that no case reached
    assert routed == {(case, name) for case in cases | sent for name in outputs} | {(case, "bucket") for case in sent}
    kept = {bucket.budget.tokens_out for bucket in manifest.buckets}
    assert {row[0] for row in rows if row[0].startswith("routed to ")} == {f"routed to {tokens}" for tokens in kept}
    chosen = {row[1:] for row in rows if row[0] == f"router {router}"}
    asked = cases - {"seeded"} if manifest.router.reads_words else cases  # the seeded case has words
    assert chosen == {(case, "bucket") for case in asked}
    assert api.parity(bundle, threads=1, budget=4)
    assert {row.model for row in api.parity(bundle, threads=1, budget=4, batch=1).outputs} == {"model.m4.b1.onnx"}


@pytest.mark.parametrize("router", [name for name in router_names() if name != "fixed"])
def test_the_sides_of_a_threshold_are_two_sides(router: str, of_router: Callable[[str], Path]) -> None:
    """The goldens tell a router that always answers the same from one that looks."""
    from safetensors.numpy import load_file

    bundle = of_router(router)
    goldens, manifest = load_file(bundle / GOLDEN), open_bundle(bundle).manifest
    assert manifest.router is not None
    for place in range(len(manifest.router.thresholds)):
        under, over = (
            tuple(goldens[golden_key(role, f"{side}-{place + 1}", name, part=part)][0] for role, name, part in (
                ("output", "need", "router"), ("input", "thresholds", ""), ("output", "bucket", "router"),
            ))
            for side in ("under", "over")
        )  # fmt: skip
        assert under[0][place] < under[1][place]
        assert over[0][place] >= over[1][place]
        assert under[2] < over[2]
        images = (goldens[golden_key("input", f"{side}-{place + 1}", "image")] for side in ("under", "over"))
        assert not np.array_equal(*images)


def test_parity_of_a_fixed_router_is_that_of_its_bucket(of_router: Callable[[str], Path]) -> None:
    report = api.parity(of_router("fixed"), threads=1)
    assert report
    routed = [(row.model, row.case, row.output) for row in report.outputs if row.model.startswith("routed")]
    assert routed == [("routed to 4", case, name) for case in ("seeded", "photo") for name in ("kept", "index")]


def rehash(bundle: Path, name: str, edit: Edit) -> None:
    """Write a changed file's size and hash into the manifest, as a forger would."""

    def change(raw: dict[str, Any]) -> None:
        for entry in raw["files"]:
            if entry["name"] == name:
                entry.update(size=(bundle / name).stat().st_size, sha256=file_sha256(bundle / name))

    edit(bundle, change)


@pytest.fixture
def forged(of_router: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(of_router("detail"), tmp_path / "forged")


def test_a_router_that_decides_otherwise_fails(forged: Path, edit_manifest: Edit, cli: Cli) -> None:
    """Below the threshold the larger bucket: each need is right, and each bucket wrong."""
    model = onnx.load(str(forged / "router.onnx"), load_external_data=False)
    (node,) = [node for node in model.graph.node if node.op_type == "GreaterOrEqual"]
    node.op_type = "Less"
    (forged / "router.onnx").write_bytes(model.SerializeToString())
    rehash(forged, "router.onnx", edit_manifest)
    report = api.parity(forged, threads=1)
    assert not report
    failed = {(row.model, row.case, row.output) for row in report.outputs if row.failures}
    cases = ("seeded", "photo", "under-1", "over-1")
    asked = {("router detail", case, "bucket") for case in cases[1:]}  # as it is served; the first case has words
    assert failed == {("router.onnx", case, "bucket") for case in cases} | asked
    said = cli("parity", forged, "--threads", 1)
    assert said.code == 1
    assert "router.onnx, over-1, bucket: 1 of 1 indices differ, most at [0]: got 0, expected 1" in said.out
    assert "verdict: FAIL" in said.out


def test_a_swapped_router_fails(forged: Path, edit_manifest: Edit, cli: Cli) -> None:
    """The router of a host whose pixels have another standard deviation."""
    model = onnx.load(str(forged / "router.onnx"), load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer if list(tensor.dims)[-3:] == [3, 1, 1]}
    (std,) = [tensor for tensor in tensors.values() if np.allclose(onnx.numpy_helper.to_array(tensor).ravel(), STD)]
    std.CopyFrom(onnx.numpy_helper.from_array(np.full(std.dims, 0.1, np.float32), std.name))
    (forged / "router.onnx").write_bytes(model.SerializeToString())
    rehash(forged, "router.onnx", edit_manifest)
    said = cli("parity", forged, "--threads", 1)
    assert said.code == 1
    assert "router.onnx, photo, signals: max rel error" in said.out
    assert "model.m4.b1.onnx, photo, kept: " not in said.out  # the buckets are what they were


def test_a_corrupted_threshold_of_the_goldens_fails(forged: Path, edit_manifest: Edit, cli: Cli) -> None:
    from safetensors.numpy import load_file, save_file

    goldens = load_file(forged / GOLDEN)
    key = golden_key("input", "over-1", "thresholds")
    goldens[key] = goldens[key] + 1
    save_file(goldens, forged / GOLDEN)
    rehash(forged, GOLDEN, edit_manifest)
    said = cli("parity", forged, "--threads", 1)
    assert said.code == 1
    assert "router.onnx, over-1, bucket: 1 of 1 indices differ" in said.out


@pytest.mark.parametrize("thresholds", [[], [0.5, 0.5]])
def test_thresholds_that_do_not_fit_the_buckets(forged: Path, edit_manifest: Edit, thresholds: list[float]) -> None:
    """Two buckets have one threshold: a manifest that says otherwise is an error, not a wrong bucket."""
    edit_manifest(forged, lambda raw: raw["router"].update(thresholds=thresholds))
    with pytest.raises(BundleError, match=r"the manifest's router 'detail' does not fit its 2 buckets \(thresholds \["):
        open_bundle(forged)


def test_an_altered_threshold_is_seen(forged: Path, cli: Cli) -> None:
    file = forged / "manifest.json"
    raw = json.loads(file.read_bytes())
    raw["router"]["thresholds"] = [0.123]
    file.write_text(json.dumps(raw))
    said = cli("parity", forged)
    assert (said.code, said.out) == (2, "")
    assert "does not match its own digest" in said.err


def test_a_routed_result_that_is_not_its_buckets_own_fails(
    of_router: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit too much, and only where the router was asked."""
    infer = Model._infer

    def wrong(self: Model, graph: Any, seen: list[dict[str, Any]]) -> list[dict[str, Any]]:
        outputs = infer(self, graph, seen)
        for one, found in zip(seen, outputs, strict=True):
            if "kept" in found and "thresholds" in one:
                found["kept"] = np.nextafter(found["kept"], np.float32(9))
        return outputs

    monkeypatch.setattr(Model, "_infer", wrong)
    report = api.parity(of_router("detail"), threads=1)
    failed = {(row.model.split()[0], row.output) for row in report.outputs if row.failures}
    assert failed == {("routed", "kept")}


# -- refused --------------------------------------------------------------------------------------------------

BASE = "export --method fastervlm --preset smoke-host"
TWO = f"{BASE} --budget 4 --budget 8"
REFUSED: list[tuple[str, tuple[str, ...]]] = [
    (f"{TWO} --router dificulty", ("no router 'dificulty'; did you mean 'difficulty'?", "coverage", "fixed")),
    (f"{BASE} --budget 4 --router difficulty", ("there is one bucket, 4, and nothing to choose", "drop --router")),
    (f"{BASE} --budget 4 --router fixed", ("router fixed: there is one bucket, 4, and nothing to choose",)),
    (f"{BASE} --budget 4 --router coverage", ("there is one bucket, 4, and nothing to choose",)),
    *(
        (f"{TWO} --router {name} --no-stem", ("reads what the stem hands over, and there is none; drop --no-stem",))
        for name, facts in ROUTERS.items()
        if facts.reads == "stem"
    ),
    (f"{TWO} --router coverage --set router.q=0.5", ("no parameter of router coverage 'q'", "p")),
    (f"{TWO} --router coverage --set router.p=1.5", ("router coverage:", "p", "--set router.NAME=VALUE")),
    (f"{TWO} --router difficulty --set router.p=0.5", ("no parameter of router difficulty 'p'",)),
    (f"{TWO} --set router.p=0.5", ("parameters or weights of a router were given, and no router",)),
    (f"{TWO} --router-weights {{weights}}", ("parameters or weights of a router were given, and no router",)),
    (f"{TWO} --router policy --router-weights nowhere.safetensors", ("weights file nowhere.safetensors is not there",)),
    (f"{TWO} --router difficulty --router-weights {{weights}}", ("has no weights; drop --router-weights",)),
    (f"{TWO} --router policy --router-weights {{weights}}", ("policy router", "fc1.weight", "not known: x")),
    (f"{TWO} --router fixed --set router.budget=4.0", ("router fixed takes the one parameter budget, one of 4, 8",)),
    (f"{TWO} --router fixed --set router.budget=5", ("router fixed takes the one parameter budget, one of 4, 8",)),
    (f"{TWO} --router fixed --router-weights {{weights}}", ("router fixed has no weights; drop --router-weights",)),
    (f"{TWO} --router fixed --set router.tokens=4", ("router fixed takes the one parameter budget", "'tokens': 4")),
    (
        "export --method fastervlm --preset smoke --router coverage",
        ("reads what the stem hands over, and there is none",),
    ),
    ("export --method fastervlm --preset smoke --router detail", ("reads the image, and this model takes no single",)),
    (f"{TWO} --budget 4 --router coverage", ("budgets 4, 8, 4", "twice")),
]


@pytest.mark.parametrize(("command", "texts"), REFUSED, ids=[command for command, _ in REFUSED])
def test_refused(command: str, texts: tuple[str, ...], cli: Cli, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "weights.safetensors")
    words = shlex.split(command.format(weights=tmp_path / "weights.safetensors"))
    said = cli(*words, "--out", tmp_path / "out")
    assert (said.code, said.out) == (2, ""), said.err
    assert said.err.startswith("error: ")
    assert 1 <= said.err.count("\n") <= 3
    for text in texts:
        assert text in said.err, f"{text!r} is not in {said.err!r}"
    assert [file.name for file in tmp_path.iterdir()] == ["weights.safetensors"]


def test_unsorted_budgets_are_taken_with_a_word(by_words: Path, tmp_path: Path) -> None:
    """So that the router's buckets ascend, whatever the order of the request."""
    from edgecomp.backbones.assemble import assemble
    from edgecomp.specs import load_recipe
    from edgecomp.specs.order import Order

    order = Order(recipe=load_recipe("fastervlm"), backbone=tiny_host(), budgets=("8", "4"), router="coverage")
    assembly = assemble(order)
    assert [model.compressor.budget.tokens_out for model in assembly.models] == [4, 8]
    assert assembly.router is not None
    assert assembly.router.site.buckets == (4, 8)
    assert "budgets 8, 4 are taken in ascending order" in assembly.notes
