"""`edgecomp.load`: the object that a product calls."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

np = pytest.importorskip("numpy")

import edgecomp  # noqa: E402 - numpy first, or skip
from edgecomp import api  # noqa: E402
from edgecomp.bundle import Bundle, open_bundle  # noqa: E402
from edgecomp.errors import BundleError, InvalidSpec, RunError  # noqa: E402
from edgecomp.images import read_image, to_pixels  # noqa: E402
from edgecomp.report.profile import describe_profile  # noqa: E402
from edgecomp.resources import photograph_path  # noqa: E402
from edgecomp.runners import open_runner  # noqa: E402
from edgecomp.serving import Model  # noqa: E402
from edgecomp.serving import model as model_module  # noqa: E402
from edgecomp.serving.memory import measure_memory  # noqa: E402


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three buckets behind a tiny ViT, batches 1 and 4."""
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    out = tmp_path_factory.mktemp("serving") / "fastervlm"
    api.export("fastervlm", preset="smoke-host", budget=[4, 8, 12], batch=[1, 4], out=out)
    return out


@pytest.fixture
def pixels(bundle: Path) -> Any:
    preprocess = edgecomp.load(bundle)._bundle.manifest.preprocess
    assert preprocess is not None
    return to_pixels(read_image(photograph_path()), preprocess, "float32")[0]


def noise(count: int) -> list[Any]:
    return list(np.random.default_rng(0).standard_normal((count, 3, 64, 64), dtype=np.float32))


def test_a_call_gives_what_run_gives(bundle: Path, pixels: Any) -> None:
    """Whatever form the image comes in."""
    expected = api.run(bundle, photograph_path(), budget=8, batch=1, threads=1).outputs
    photo = read_image(photograph_path())
    forms = [str(photograph_path()), photograph_path(), photo, np.asarray(photo.convert("RGB")), pixels]
    forms.append({"image": pixels[None]})
    with edgecomp.load(bundle, threads=1) as model:
        for form in forms:
            answer = model(form, budget=8)
            assert (answer.budget, answer.reason) == (8, "the smallest that keeps 8")
            assert list(answer.outputs) == ["kept", "index"]
            for name, array in expected.items():
                assert np.array_equal(answer[name], array), type(form)


def test_the_smallest_bucket_that_serves(bundle: Path, pixels: Any) -> None:
    with edgecomp.load(bundle, threads=1) as model:
        assert model.buckets == (4, 8, 12)
        found = [model(pixels, budget=budget).budget for budget in (1, 4, 5, "50%", 12)]
        assert found == [4, 4, 8, 8, 12]
        answer = model(pixels)
        assert (answer.budget, answer.reason) == (12, "no budget was given: the largest")
        for budget in (0, 13, "100%"):
            with pytest.raises(InvalidSpec, match=rf"budget {budget} is not between 1 and 12.*4, 8, 12"):
                model(pixels, budget=budget)


def test_a_batch_keeps_the_order_and_gives_what_single_calls_give(bundle: Path) -> None:
    """Seven requests of mixed budgets: batches of four where they fill one."""
    images, budgets = noise(7), [4, 12, 4, 4, None, 4, 4]
    with edgecomp.load(bundle, threads=1) as model:
        alone = [model(image, budget=budget) for image, budget in zip(images, budgets, strict=True)]
        model.reset_stats()
        together = model.infer_batch(images, budget=budgets)
        assert [answer.budget for answer in together] == [4, 12, 4, 4, 12, 4, 4]
        for one, other in zip(alone, together, strict=True):
            assert one.reason == other.reason
            assert np.array_equal(one["index"], other["index"])
            assert np.abs(one["kept"] - other["kept"]).max() <= 1e-5
        assert model.stats().requests == 7
        assert model.infer_batch([]) == []
        with pytest.raises(InvalidSpec, match="2 budgets for 3 requests"):
            model.infer_batch(images[:3], budget=[4, 8])


def test_a_bundle_without_batch_one_serves_single_requests(tmp_path: Path, bundle: Path) -> None:
    out = tmp_path / "fours"
    api.export("fastervlm", preset="smoke-host", budget=8, batch=4, out=out)
    (image,) = noise(1)
    with edgecomp.load(out, threads=1) as fours, edgecomp.load(bundle, threads=1) as ones:
        for answer in (fours(image), *fours.infer_batch([image, image])):
            assert answer["kept"].shape == (1, 8, 64)
            assert np.abs(answer["kept"] - ones(image, budget=8)["kept"]).max() <= 1e-5


@pytest.mark.parametrize(
    ("precision", "rest", "word"), [("bf16", "bf16", "bf16"), ("fp8", "fp16", "fp8"), ("int8", "bf16", "bf16")]
)
def test_a_type_without_kernels_is_refused_before_a_request(bundle: Path, precision: Any, rest: Any, word: str) -> None:
    whole = open_bundle(bundle)
    typed = Bundle(whole.path, msgspec.structs.replace(whole.manifest, precision=precision, rest=rest))
    with pytest.raises(RunError, match=rf"no kernels for {word}, which \S+fastervlm computes in.*--precision fp16"):
        Model(typed, runner="onnxruntime", threads=1, resident=None)


def test_what_is_counted(bundle: Path) -> None:
    images = noise(4)
    with edgecomp.load(bundle, threads=1) as model:
        assert model.stats().requests == 0
        assert {tokens: one.requests for tokens, one in model.stats().buckets.items()} == {4: 0, 8: 0, 12: 0}
        for image in images[:3]:
            model(image, budget=4)
        model(images[3])
        stats = model.stats()
        assert (stats.requests, stats.loads, stats.resident) == (4, 2, (4, 12))
        assert (stats.buckets[4].requests, stats.buckets[4].share) == (3, 0.75)
        assert list(stats.buckets[4].seconds) == ["0.5", "0.9", "0.99"]
        assert 0 < stats.buckets[4].seconds["0.5"] <= stats.buckets[4].seconds["0.99"]
        metrics = stats.metrics()
        assert metrics['edgecomp_requests_total{bucket="4"}'] == 3
        assert metrics['edgecomp_requests_total{bucket="8"}'] == 0
        assert metrics["edgecomp_loads_total"] == 2
        assert 'edgecomp_request_seconds{bucket="12",quantile="0.9"}' in metrics
        model.reset_stats()
        assert model.stats().requests == 0


def test_no_more_graphs_are_held_than_asked(bundle: Path) -> None:
    """The one used longest ago goes first, and is loaded again when it is needed."""
    (image,) = noise(1)
    with edgecomp.load(bundle, threads=1, resident=2) as model:
        for budget in (4, 8, 4, 12):
            model(image, budget=budget)
        assert model.stats().resident == (4, 12)
        model(image, budget=8)
        assert model.stats().resident == (8, 12)
        assert model.stats().loads == 4
    with pytest.raises(InvalidSpec, match="resident=0"):
        edgecomp.load(bundle, resident=0)


def test_graphs_share_their_weights(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stem and buckets read the mapped file; nothing changes but rounding."""
    sessions: list[Any] = []

    def opened(*words: Any, **more: Any) -> Any:
        sessions.append(open_runner(*words, **more))
        return sessions[-1]

    monkeypatch.setattr(model_module, "open_runner", opened)
    image = noise(1)[0]
    for shared in (False, True):
        with edgecomp.load(bundle, threads=1, share_weights=shared) as model:
            found = [model(image, budget=tokens)["kept"] for tokens in model.buckets]
        options = [one._session.get_session_options() for one in sessions]
        assert len(options) == 4  # with the stem
        for one in options:
            if shared:
                assert one.get_session_config_entry("session.disable_prepacking") == "1"
            else:
                with pytest.raises(RuntimeError, match="disable_prepacking"):
                    one.get_session_config_entry("session.disable_prepacking")
        if not shared:
            expected, sessions[:] = found, []
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)
    with pytest.raises(InvalidSpec, match="share_weights with runner onnxruntime-cuda: it copies the weights"):
        edgecomp.load(bundle, runner="onnxruntime-cuda", share_weights=True)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process holds")
def test_memory_of_a_process_that_serves(tmp_path: Path) -> None:
    """Three buckets over 24 MiB of weights: three packed copies, or one mapping of them."""
    pytest.importorskip("torch")
    pytest.importorskip("onnxruntime")
    timm = pytest.importorskip("timm")
    host = timm.create_model("vit_small_patch16_224", img_size=64, depth=2, embed_dim=512, num_heads=8).eval()
    budgets, out = (4, 8, 12), tmp_path / "wide"
    api.export("attention-pruning", backbone=host, preset="inside", budget=budgets, stem=False, out=out)
    report = api.profile(out, duration_s=0.02, threads=1)
    alone, every, shared = report.memory
    assert [(use.buckets, use.share_weights) for use in report.memory] == [
        ((12,), False),
        (budgets, False),
        (budgets, True),
    ]
    weights = (out / "weights.data").stat().st_size / 2**20
    assert weights > 20
    for use in report.memory:
        assert use.peak_mib >= use.held_mib > weights
    assert every.held_mib - alone.held_mib > 1.7 * weights
    assert shared.held_mib - alone.held_mib < 0.5 * weights
    lines = describe_profile(report).splitlines()[-3:]
    assert lines[0].startswith("memory of a process that serves bucket 12 alone: ")
    assert lines[1].startswith(f"memory of a process that serves 3 buckets: {every.held_mib:.0f} MiB held, ")
    assert lines[2].startswith("memory of a process that serves 3 buckets with share_weights: ")
    assert api.profile(out, budget=4, duration_s=0.02, threads=1).memory == ()


def test_a_process_that_cannot_serve_is_an_error(bundle: Path) -> None:
    with pytest.raises(RunError, match=r"measuring the memory of .* failed: .*input 'image'"):
        measure_memory(bundle, (4,), {"image": np.zeros((1, 3, 8, 8), np.float32)}, runner="onnxruntime", threads=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.infer_batch(image for image in noise(2)), "requests are of type generator; give a list"),
        (lambda m: m.infer_batch(None), "requests are of type NoneType"),
        (lambda m: m.infer_batch("abc"), "requests are of type str"),
        (lambda m: m(noise(1)[0], features=[1]), "features are of type list; give a mapping"),
    ],
)
def test_calls_of_the_wrong_type(call: Any, message: str, bundle: Path) -> None:
    with edgecomp.load(bundle, threads=1) as model:
        with pytest.raises(InvalidSpec, match=message):
            call(model)
        assert len(model.infer_batch(np.stack(noise(2)))) == 2


def test_loading_what_is_no_path(bundle: Path) -> None:
    with pytest.raises(InvalidSpec, match="bundle None is of type NoneType; give the folder's path"):
        edgecomp.load(None)  # type: ignore[arg-type]
    with pytest.raises(InvalidSpec, match="share_weights='no' is neither True nor False"):
        edgecomp.load(bundle, share_weights="no")  # type: ignore[arg-type]


def test_after_closing(bundle: Path) -> None:
    (image,) = noise(1)
    model = edgecomp.load(bundle, threads=1)
    model(image)
    model.close()
    model.close()
    with pytest.raises(RunError, match="is closed; load the bundle again"):
        model(image)


def test_several_threads_at_once(bundle: Path) -> None:
    """Eight threads, two resident graphs: graphs come and go under requests that run, and every answer is right."""
    images = noise(4)
    with edgecomp.load(bundle, threads=1) as alone:
        expected = {(i, b): alone(image, budget=b)["kept"] for i, image in enumerate(images) for b in (4, 8, 12)}

    def work(model: Model, number: int) -> None:
        for turn in range(12):
            place, budget = (number + turn) % 4, (4, 8, 12)[(number + turn) % 3]
            answer = model(images[place], budget=budget)
            assert np.array_equal(answer["kept"], expected[place, budget])

    with edgecomp.load(bundle, threads=1, resident=2) as model:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: work(model, number), range(8)))
        assert model.stats().requests == 96


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (np.zeros((64, 64), np.uint8), r"an image of shape \(64, 64\) and type uint8 is neither"),
        (np.zeros((3, 32, 32), np.float32), r"an image of shape \(3, 32, 32\) and type float32"),
        (np.full((3, 64, 64), np.nan, np.float32), "the request.*not finite|NaN"),
        ({"picture": np.zeros((1, 3, 64, 64), np.float32)}, "inputs missing: image; unexpected: picture"),
        ({"image": np.zeros((2, 3, 64, 64), np.float32)}, "the request"),
        ("nowhere.jpg", "image nowhere.jpg does not exist"),
    ],
)
def test_requests_that_do_not_fit(request_: Any, message: str, bundle: Path) -> None:
    with edgecomp.load(bundle, threads=1) as model:
        with pytest.raises(RunError, match=message):
            model(request_)
        assert model.stats().requests == 0


def test_a_model_of_given_tokens_takes_names(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "given"
    api.export("query-aware", preset="smoke", budget=5, out=out)
    tokens = np.random.default_rng(0).standard_normal((1, 21, 16), dtype=np.float32)
    with edgecomp.load(out, threads=1) as model:
        answer = model({"tokens": tokens, "query": tokens[:, 3]})
        assert 3 in answer["index"]
        with pytest.raises(RunError, match=r"takes tokens .*, query .*: give a mapping with these names"):
            model(tokens)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a folder"):
        edgecomp.load(tmp_path / "nothing")


class _Nothing:
    """A runner that does nothing."""

    name = version = "nothing"
    input_names = ("image",)

    def infer(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs


def test_its_own_cost_is_small(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks, dispatch and counting of one request around a runner that does nothing: `benchmarks` has the figure."""
    monkeypatch.setattr("edgecomp.serving.model.open_runner", lambda *words, **more: _Nothing())
    (image,) = noise(1)
    with edgecomp.load(bundle) as model:
        times = []
        for turn in range(200):
            started = time.perf_counter()
            model(image, budget=(4, 8, 12)[turn % 3])
            times.append(time.perf_counter() - started)
    assert statistics.median(times) < 2e-3  # 0.1 ms on a quiet machine


def test_it_needs_no_torch(bundle: Path) -> None:
    """And `import edgecomp` alone needs not even numpy."""
    code = (
        "import sys, edgecomp; assert 'numpy' not in sys.modules\n"
        "model = edgecomp.load(sys.argv[1], threads=1)\n"
        "model(sys.argv[2])\n"
        "assert not {'torch', 'timm', 'onnx', 'edgecomp.compressors'} & set(sys.modules)\n"
    )
    words = [sys.executable, "-c", code, str(bundle), str(photograph_path())]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
