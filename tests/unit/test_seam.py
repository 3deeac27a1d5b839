"""Stems and what belongs to them in a bundle: own constants, several batches, raw frames, rows of equal number."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="exports need torch")
onnx = pytest.importorskip("onnx", reason="graphs are looked into")

from edgecomp import api  # noqa: E402 - torch first, or skip
from edgecomp.backbones.padding import RowPadding  # noqa: E402
from edgecomp.bundle import MANIFEST, WEIGHTS, Bundle, digest_of, golden_key, open_bundle  # noqa: E402
from edgecomp.engines import installed_flavours  # noqa: E402
from edgecomp.errors import BundleError, InvalidSpec  # noqa: E402
from edgecomp.images import read_image, to_pixels  # noqa: E402
from edgecomp.parity import read_goldens  # noqa: E402
from edgecomp.resources import photograph_path  # noqa: E402
from edgecomp.runners import open_runner  # noqa: E402
from edgecomp.runners.chain import open_graph  # noqa: E402
from edgecomp.specs import TensorSpec  # noqa: E402
from edgecomp.specs.origin import file_sha256  # noqa: E402

Cli = Callable[..., Any]
Edit = Callable[[Path, Callable[[dict[str, Any]], object]], None]

SIDE, PATCHES, WIDTH = 32, 16, 24


def tiny_host() -> Any:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(1)
    host = VisionTransformer(
        img_size=SIDE, patch_size=8, num_classes=7, embed_dim=WIDTH, depth=3, num_heads=2, mlp_ratio=1
    )
    for parameter in host.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    host.pretrained_cfg = {"crop_pct": 1.0, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    return host


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """Export behind the tiny host; equal requests are exported once."""
    found: dict[str, Bundle] = {}

    def export(method: str, **options: Any) -> Bundle:
        key = repr((method, sorted(options.items())))
        if key not in found:
            out = tmp_path_factory.mktemp("seam") / "bundle"
            found[key] = open_bundle(api.export(method, backbone=tiny_host(), out=out, **options).bundle)
        return found[key]

    return export


def externals(bundle: Bundle, model: str) -> dict[int, int]:
    """Return the places in the weights file that a graph reads, and their lengths."""
    graph = onnx.load(str(bundle.path / model), load_external_data=False).graph
    found = [{e.key: e.value for e in tensor.external_data} for tensor in graph.initializer if tensor.external_data]
    assert {entry["location"] for entry in found} <= {WEIGHTS}
    return {int(entry["offset"]): int(entry["length"]) for entry in found}


def infer(bundle: Bundle, graph: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    with open_graph("onnxruntime", bundle, graph, threads=1) as runner:
        return runner.infer(inputs)


# -- a bucket's own constants -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "has_own"),
    [("tocom", {"preset": "smoke", "budget": [4, 10]}, True), ("attention-pruning", {"budget": [4, 8]}, False)],
)
def test_own_bytes_are_those_that_no_other_budget_reads(
    method: str, options: dict[str, Any], has_own: bool, made: Callable[..., Bundle]
) -> None:
    """`tocom` folds its correction, which depends on the budget, into matrices of queries and values."""
    bundle = made(method, **options)
    read = {graph.model: externals(bundle, graph.model) for graph in bundle.manifest.graphs}
    assert len(read) == 3
    for bucket in bundle.manifest.buckets:
        others = {place for model, places in read.items() if model != bucket.model for place in places}
        own = {place: length for place, length in read[bucket.model].items() if place not in others}
        assert bucket.own_bytes == sum(own.values())
        assert (bucket.own_bytes > 0) is has_own
        if has_own:  # at least the folded matrices of the blocks that merge
            assert bucket.own_bytes >= 2 * 4 * WIDTH**2


def test_own_bytes_are_shown(made: Callable[..., Bundle]) -> None:
    from edgecomp.report.export import ExportReport, describe_export
    from edgecomp.report.text import size

    manifest = made("tocom", preset="smoke", budget=[4, 10]).manifest
    text = describe_export(ExportReport(Path("x"), manifest, False, None, 1.0, 1))
    assert "own weights" in text
    for bucket in manifest.buckets:
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [bucket.model]]
        assert line.endswith(size(bucket.own_bytes))


def test_buckets_share_one_weights_file_with_their_stem(made: Callable[..., Bundle]) -> None:
    """The stem's weights are there once, and no bucket of a method without weights reads any of them."""
    bundle = made("attention-pruning", budget=[4, 8])
    (stem,) = bundle.manifest.stem
    assert sum(externals(bundle, stem.model).values()) > 4 * 3 * 4 * WIDTH**2
    assert all(externals(bundle, bucket.model) == {} for bucket in bundle.manifest.buckets)


# -- batches and raw frames ---------------------------------------------------------------------------------


def test_each_batch_has_its_stem(made: Callable[..., Bundle]) -> None:
    bundle = made("fastervlm", budget=[4, 8], batch=[1, 2])
    assert [(stem.model, stem.batch) for stem in bundle.manifest.stem] == [("stem.b1.onnx", 1), ("stem.b2.onnx", 2)]
    for bucket in bundle.manifest.buckets:
        assert bucket.stem == f"stem.b{bucket.batch}.onnx"
    assert {entry.name for entry in bundle.manifest.files if entry.role == "stem"} == {"stem.b1.onnx", "stem.b2.onnx"}
    goldens = read_goldens(bundle.path)
    image = goldens[golden_key("input", "photo", "image")]
    assert len(image) == 2
    for budget in (4, 8):
        (one,), (two,) = (bundle.select(budget=budget, batch=batch) for batch in (1, 2))
        both = infer(bundle, two, {"image": image})
        for row in (0, 1):
            alone = infer(bundle, one, {"image": image[row : row + 1]})
            assert np.array_equal(both["index"][row : row + 1], alone["index"])
            assert np.abs(both["kept"][row : row + 1] - alone["kept"]).max() <= 1e-5
    assert len({tuple(row) for row in both["index"].tolist()}) == 2  # the rows do differ
    assert api.parity(bundle.path, threads=1)


@pytest.fixture(scope="module")
def frames(made: Callable[..., Bundle]) -> Bundle:
    return made("attention-pruning", preset="smoke-text", budget=[4, 8], input_dtype="uint8")


def test_raw_frames_go_into_the_stem(frames: Bundle, made: Callable[..., Bundle]) -> None:
    """Also where the score reads raw pixels: the text likelihood is part of what the stem hands over."""
    (stem,) = frames.manifest.stem
    assert stem.inputs == (TensorSpec("image", (1, SIDE, SIDE, 3), "uint8", "image"),)
    assert [spec.name for spec in stem.outputs] == ["tokens", "text_likelihood"]
    with open_runner("onnxruntime", frames.path / stem.model, threads=1) as runner:
        assert runner.output_names == ("tokens", "text_likelihood")
    normalised = made("attention-pruning", preset="smoke-text", budget=[4, 8])
    assert api.parity(frames.path, threads=1)
    preprocess = frames.manifest.preprocess
    assert preprocess is not None
    photo = read_image(photograph_path())
    for raw, other in zip(frames.manifest.buckets, normalised.manifest.buckets, strict=True):
        found = infer(frames, raw, {"image": to_pixels(photo, preprocess, "uint8")})
        expected = infer(normalised, other, {"image": to_pixels(photo, preprocess, "float32")})
        assert np.array_equal(found["index"], expected["index"])
        assert np.abs(found["kept"] - expected["kept"]).max() <= 1e-4


def test_frames_in_a_row_are_the_whole_graph(frames: Bundle, made: Callable[..., Bundle]) -> None:
    whole = made("attention-pruning", preset="smoke-text", budget=[4], input_dtype="uint8")
    assert whole.manifest.stem == ()
    image = np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 3), np.uint8)
    found = infer(frames, frames.manifest.buckets[0], {"image": image})
    for name, array in infer(whole, whole.manifest.buckets[0], {"image": image}).items():
        assert np.array_equal(found[name], array), name


# -- rows of equal number -----------------------------------------------------------------------------------

PER_ROW = (
    TensorSpec("kept", (1, 5, 3), "float32", "tokens"),
    TensorSpec("index", (1, 5), "int32", "indices"),
    TensorSpec("size", (1, 5, 1), "float32", "features"),
    TensorSpec("source_map", (1, 5), "int32", "indices"),  # as long as the rows, and of the tokens that go in
)
OWN_MASK = (TensorSpec("count", (1,), "int64", "indices"), TensorSpec("mask", (1, 5), "bool", "mask"))


def rows_of(specs: tuple[TensorSpec, ...], batch: int) -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, 9, (batch, *spec.shape[1:])).astype(spec.dtype) for spec in specs]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("extra", [0, 1, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_padding_rows_is_numpy_pad(batch: int, extra: int, masked: bool) -> None:
    """Zeros for tokens and what goes with each, -1 for indices; 4 kept and one prefix token make 5 rows."""
    specs = PER_ROW + (OWN_MASK if masked else ())
    given = rows_of(specs, batch)
    padding = RowPadding(specs, kept=4, tokens_in=16, pad_to=5 + extra)
    found = [tensor.numpy() for tensor in padding(tuple(map(torch.from_numpy, given)))]
    expected = {
        "kept": np.pad(given[0], ((0, 0), (0, extra), (0, 0))),
        "index": np.pad(given[1], ((0, 0), (0, extra)), constant_values=-1),
        "size": np.pad(given[2], ((0, 0), (0, extra), (0, 0))),
        "source_map": given[3],
        "count": given[4] if masked else np.full(batch, 5, np.int64),
        "mask": np.pad(given[5] if masked else np.ones((batch, 5), bool), ((0, 0), (0, extra))),
    }
    names = [spec.name for spec in padding.output_specs(batch)]
    assert names == list(expected)
    for spec, value in zip(padding.output_specs(batch), found, strict=True):
        assert np.array_equal(value, expected[spec.name]), spec.name
        assert (value.shape, str(value.dtype)) == (spec.shape, spec.dtype), spec.name


def test_buckets_of_equal_rows_hold_what_they_held(made: Callable[..., Bundle]) -> None:
    """With `pad_to`, each bucket gives the rows that it gives without, and then nothing."""
    own, filled = made("fastervlm", budget=[4, 8], batch=[1, 2]), made("fastervlm", budget=[4, 8], pad_to=9)
    shapes = {tuple(spec.shape for spec in bucket.outputs) for bucket in filled.manifest.buckets}
    assert shapes == {((1, 9, WIDTH), (1, 9), (1,), (1, 9))}
    assert api.parity(filled.path, threads=1)
    image = read_goldens(own.path)[golden_key("input", "photo", "image")][:1]
    for budget in (4, 8):
        (bucket,), (wide,) = own.select(budget=budget, batch=1), filled.select(budget=budget)
        expected, found = infer(own, bucket, {"image": image}), infer(filled, wide, {"image": image})
        assert np.array_equal(found["kept"][:, :budget], expected["kept"])
        assert np.array_equal(found["index"][:, :budget], expected["index"])
        assert not found["kept"][:, budget:].any()
        assert (found["index"][:, budget:] == -1).all()
        assert found["count"].tolist() == [budget]
        assert found["mask"].tolist() == [[row < budget for row in range(9)]]


REFUSED: list[tuple[str, tuple[str, ...]]] = [
    (
        "--method perceiver --preset smoke --pad-to 9",
        ("pad_to=9", "rows of tokens [B, M, D]", "latents float32[1, 2, 4, 32] comes first"),
    ),
    ("--method tome --preset smoke --output logits --pad-to 9", ("pad_to=9: logits have no rows", "--output logits")),
    (
        "--method tome --preset smoke --budget 3 --budget 7 --pad-to 7",
        ("pad_to=7 is below the 8 rows of a bucket, 1 of them beside the budget's 7; give at least 8",),
    ),
    ("--method tome --preset smoke --pad-to -1", ("pad_to=-1 is below 0",)),
    ("--method tome --preset smoke --pad-to 18", ("pad_to=18 is above 17, the rows there would be if all 16 tokens",)),
    ("--method tome --preset smoke --pad-to 0", ("--pad-to 0 is out of range",)),
]


@pytest.mark.parametrize(("words", "texts"), REFUSED, ids=[words for words, _ in REFUSED])
def test_rows_that_cannot_be(words: str, texts: tuple[str, ...], cli: Cli, tmp_path: Path) -> None:
    said = cli("export", *shlex.split(words), "--out", tmp_path / "out")
    assert (said.code, said.out) == (2, "")
    for text in texts:
        assert text in said.err
    assert list(tmp_path.iterdir()) == []


# -- manifests ----------------------------------------------------------------------------------------------


def as_schema_1(bundle: Path) -> None:
    """Write the manifest as edgecomp wrote it before there were stems and routers."""
    raw = json.loads((bundle / MANIFEST).read_bytes())
    assert raw.pop("stem") == []
    assert raw.pop("router") is None
    for graph in (*raw["buckets"], *raw["plain"]):
        assert graph.pop("stem") == ""
        graph.pop("own_bytes", None)
    raw["schema"] = 1
    raw["digest"] = digest_of(raw)
    (bundle / MANIFEST).write_text(json.dumps(raw))


def test_a_bundle_of_schema_1_opens(bundle: Path) -> None:
    """What was exported before stems and routers stays of use."""
    before = open_bundle(bundle).manifest
    as_schema_1(bundle)
    opened = open_bundle(bundle).manifest
    assert (opened.schema, opened.stem, opened.router) == (1, (), None)
    assert [bucket.own_bytes for bucket in opened.buckets] == [0, 0]
    assert [(b.model, b.budget, b.inputs, b.outputs) for b in opened.buckets] == [
        (b.model, b.budget, b.inputs, b.outputs) for b in before.buckets
    ]
    assert api.parity(bundle, threads=1)
    assert api.run(bundle, photograph_path(), threads=1).tokens_out == 9


def test_an_altered_bundle_of_schema_1_does_not_open(bundle: Path) -> None:
    as_schema_1(bundle)
    raw = json.loads((bundle / MANIFEST).read_bytes())
    raw["opset"] = 19
    (bundle / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(BundleError, match="does not match its own digest"):
        open_bundle(bundle)


@pytest.fixture
def parts(made: Callable[..., Bundle], tmp_path: Path) -> Path:
    """A copy of a bundle with a stem, to be damaged."""
    return shutil.copytree(made("attention-pruning", budget=[4, 8]).path, tmp_path / "parts")


@pytest.mark.parametrize("name", ["stem.b2.onnx", "model.m8.b1.onnx", "../stem.onnx", WEIGHTS])
def test_a_stem_that_is_not_there(parts: Path, name: str, edit_manifest: Edit) -> None:
    """A bucket names another file than a stem: nothing else of the folder is taken for one."""
    edit_manifest(parts, lambda raw: raw["buckets"][0].update(stem=name))
    with pytest.raises(BundleError, match="the manifest has no stem") as caught:
        open_bundle(parts)
    assert name in str(caught.value)


def test_a_stem_without_its_entry(parts: Path, edit_manifest: Edit) -> None:
    edit_manifest(parts, lambda raw: raw.update(stem=[]))
    with pytest.raises(BundleError, match=r"the manifest has no stem stem\.onnx"):
        open_bundle(parts)
    edit_manifest(parts, lambda raw: [bucket.update(stem="") for bucket in raw["buckets"]])
    with pytest.raises(BundleError, match=r"gives no use to 'stem\.onnx'"):
        open_bundle(parts)


@pytest.mark.parametrize("damage", ["remove", "truncate"])
def test_a_stem_that_is_damaged(parts: Path, damage: str) -> None:
    file = parts / "stem.onnx"
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"stem\.onnx"):
        open_bundle(parts)


def test_one_bucket_is_a_whole_graph(made: Callable[..., Bundle]) -> None:
    """There is nobody to share with, so that no stem is cut off."""
    whole = made("attention-pruning", preset="smoke-text", budget=[4], input_dtype="uint8")
    assert {entry.role for entry in whole.manifest.files} == {"model", "weights", "golden"}
    with pytest.raises(InvalidSpec, match="reads what the stem hands over, and there is none; drop --no-stem"):
        made("attention-pruning", budget=[4, 8], router="coverage", stem=False)


# -- engines ------------------------------------------------------------------------------------------------


@pytest.mark.skipif("rtx" not in installed_flavours(), reason="TensorRT for RTX is not installed")
def test_stem_router_and_buckets_become_engines(made: Callable[..., Bundle]) -> None:
    bundle = made("fastervlm", budget=[4, 8], router="coverage")
    names = ["stem.onnx", "model.m4.b1.onnx", "model.m8.b1.onnx", "router.onnx"]
    report = api.build(bundle.path, target="rtx-4090", runtime="rtx")
    assert sorted(engine.record.model for engine in report.engines) == sorted(names)
    for engine in report.engines:
        assert engine.record.onnx_sha256 == bundle.file(engine.record.model).sha256
        assert file_sha256(engine.path) == engine.record.sha256
        assert not engine.reused
    (router,) = [engine.record for engine in report.engines if engine.record.model == "router.onnx"]
    assert [spec.name for spec in router.outputs] == ["bucket", "need", "signals"]
    again = api.build(bundle.path, target="rtx-4090", runtime="rtx", budget=8)
    assert [engine.record.model for engine in again.engines] == ["stem.onnx", "model.m8.b1.onnx"]
    assert all(engine.reused for engine in again.engines)
