"""Accuracy on labelled images: the statistics, the data, known answers, the gate, and what is refused."""

from __future__ import annotations

import gzip
import json
import math
import shlex
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edgecomp import api
from edgecomp.bundle import open_bundle
from edgecomp.errors import InvalidSpec, RunError
from edgecomp.evaluation import LabelledImages, balanced_subset, median_interval, open_data, paired_drop, score, wilson
from edgecomp.evaluation.data import _read_idx
from edgecomp.images import to_pixels
from edgecomp.runners import Array
from edgecomp.runners.chain import open_graph
from edgecomp.specs import Preprocess

Cli = Callable[..., Any]

SIDE, CLASSES, IMAGES = 16, 7, 21  # 21 images in batches of 4: five, and one of a single image
FRAMES = np.random.default_rng(0).integers(0, 256, (IMAGES, 4, 4), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
Z = 1.959963984540054


def write_idx(path: Path, values: npt.NDArray[np.uint8]) -> None:
    header = struct.pack(">I", 0x0800 + values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    content = header + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_pair(folder: Path, frames: Array, labels: Array, *, prefix: str = "t10k", suffix: str = ".gz") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", frames.astype(np.uint8))
    write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", labels.astype(np.uint8))
    return folder


def write_folders(folder: Path, names: dict[str, int]) -> Path:
    """Class folders with so many images each; the grey value tells the class's place and the image's."""
    for place, (name, count) in enumerate(names.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (SIDE, SIDE), 10 * place + number).save(folder / name / f"{number}.png")
    return folder


# -- statistics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        (85, 100, 0.7671644, 0.9069402),  # R: prop.test(85, 100, correct = FALSE)
        (0, 10, 0.0, Z**2 / (10 + Z**2)),
        (10, 10, 10 / (10 + Z**2), 1.0),
        (1, 2, 0.5 - Z / (2 * math.sqrt(2 + Z**2)), 0.5 + Z / (2 * math.sqrt(2 + Z**2))),
    ],
)
def test_wilson(count: int, total: int, low: float, high: float) -> None:
    found = wilson(count, total)
    assert found.value == count / total
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-7)


def test_paired_drop_by_its_formula() -> None:
    found = paired_drop(30, 10, 1000)
    first, second = 31 / 1002, 11 / 1002
    half = Z * math.sqrt((first + second - (first - second) ** 2) / 1002)
    assert found.value == 0.02
    assert (found.low, found.high) == pytest.approx((first - second - half, first - second + half))
    swapped = paired_drop(10, 30, 1000)
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low))


def test_paired_drop_where_nothing_changed_has_a_width() -> None:
    found = paired_drop(0, 0, 100)
    assert found.value == 0
    assert found.high == -found.low == pytest.approx(Z * math.sqrt(2 / 102 / 102))


def test_paired_drop_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    cells = rng.multinomial(200, [0.06, 0.03, 0.91], size=4000)
    found = [paired_drop(int(lost), int(gained), 200) for lost, gained, _ in cells]
    share = np.mean([estimate.low <= 0.03 <= estimate.high for estimate in found])
    assert 0.94 <= share <= 0.975


@pytest.mark.parametrize(
    ("n", "low", "high"), [(1, 1, 1), (5, 1, 5), (6, 1, 6), (10, 2, 9), (25, 8, 18), (100, 40, 61)]
)
def test_interval_of_a_median_by_tables(n: int, low: int, high: int) -> None:
    """The ranks that tables of the sign test give; below 6 there are none, and the ends stand in."""
    found = median_interval([float(i) for i in range(n, 0, -1)])
    assert (found.value, found.low, found.high) == ((n + 1) / 2, low, high)


def test_interval_of_a_median_of_many() -> None:
    found = median_interval(range(60_000))
    assert found.low == pytest.approx(30_000 - Z * math.sqrt(60_000) / 2, abs=2)


@pytest.mark.parametrize("call", [lambda: wilson(2, 1), lambda: paired_drop(2, 2, 3), lambda: median_interval([])])
def test_statistics_of_nothing_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="no "):
        call()


# -- data -----------------------------------------------------------------------------------------------------


def test_class_folders_are_sorted(tmp_path: Path) -> None:
    data = open_data(write_folders(tmp_path / "data", {"dog": 2, "cat": 3, "10": 1}))
    assert data.classes == ("10", "cat", "dog")
    assert data.labels.tolist() == [0, 1, 1, 1, 2, 2]
    assert [np.asarray(data.image(index))[0, 0].tolist() for index in (0, 3, 4)] == [[20] * 3, [12] * 3, [0] * 3]
    assert data.notes == ()


def test_classes_txt_gives_the_order_and_classes_without_a_folder(tmp_path: Path) -> None:
    folder = write_folders(tmp_path / "data", {"cat": 1, "dog": 2, "emu": 0})
    (folder / "classes.txt").write_text("dog\nzebra\nemu\ncat\n")
    (folder / "README.md").write_text("x")
    (folder / "cat" / "video.mp4").write_bytes(b"x")
    (folder / "cat" / ".DS_Store").write_bytes(b"x")
    data = open_data(folder)
    assert data.labels.tolist() == [3, 0, 0]
    assert data.notes == (
        "2 entries are no images of a class and were left out: README.md, cat/video.mp4",
        "1 class folders hold no image: emu",
    )


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx(tmp_path: Path, suffix: str) -> None:
    labels = np.arange(IMAGES) % 3
    write_pair(tmp_path, FRAMES, labels, suffix=suffix)
    write_pair(tmp_path, FRAMES[:5], labels[:5] + 1, prefix="train", suffix=suffix)
    data = open_data(tmp_path)
    assert data.labels.tolist() == labels.tolist()
    assert np.array_equal(np.asarray(data.image(7)), FRAMES[7])
    assert (data.kind, data.classes) == ("IDX test", ())
    assert open_data(tmp_path, split="train").labels.tolist() == [1, 2, 3, 1, 2]


def test_grey_becomes_rgb(tmp_path: Path) -> None:
    data = open_data(write_pair(tmp_path, FRAMES, np.zeros(IMAGES)))
    pixels = to_pixels(data.image(0), Preprocess(SIDE, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3), "uint8")
    assert np.array_equal(pixels[0], np.repeat(FRAMES[0][:, :, None], 3, axis=2))


def test_balanced_subset() -> None:
    labels = np.repeat([0, 1, 2, 5], [50, 2, 30, 30])
    chosen = balanced_subset(labels, 23, seed=0)
    assert sorted(np.bincount(labels[chosen]).tolist()) == [0, 0, 2, 7, 7, 7]
    assert len(set(chosen.tolist())) == 23
    assert np.array_equal(chosen, balanced_subset(labels, 23, seed=0))
    assert not np.array_equal(chosen, balanced_subset(labels, 23, seed=1))
    assert balanced_subset(labels, 112, seed=3).tolist() == list(range(112))


def test_header_that_lies_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(struct.pack(">4I", 0x803, 1 << 20, 90, 90) + b"x" * 100))
    with pytest.raises(RunError, match="1048576 x 90 x 90 = 8493465600 values and holds only 100"):
        _read_idx(path, 0x803)
    path.write_bytes(gzip.compress(struct.pack(">4I", 0x803, 1 << 31, 1 << 31, 1 << 31)))
    with pytest.raises(RunError, match="above the 8 GiB"):
        _read_idx(path, 0x803)


# -- known answers --------------------------------------------------------------------------------------------


class Told:
    """A runner that gives known logits: the first pixel of a frame says which image it is."""

    name = version = "told"

    def __init__(self, logits: Array, ms: float, clock: list[int]) -> None:
        self.logits, self.ms, self.clock, self.calls = logits, ms, clock, 0

    def __enter__(self) -> Told:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def infer(self, inputs: dict[str, Array]) -> dict[str, Array]:
        self.calls += 1
        self.clock[0] += round(self.ms * 1e6)
        return {"logits": self.logits[inputs["image"][:, 0, 0, 0].astype(int)]}


def told(predicted: list[int], labels: list[int], classes: int, *, second: int = -1) -> Array:
    """Logits whose highest is at `predicted`; the label's own is the `second`-highest, where there is one."""
    logits = np.zeros((len(predicted), classes), np.float32)
    logits[np.arange(len(predicted)), predicted] = 9
    for image, label in enumerate(labels):
        if second >= 0 and predicted[image] != label:
            above = [c for c in range(classes) if c not in (label, predicted[image])][:second]
            logits[image, above] = 5
            logits[image, label] = 1
    return logits


def run_told(plain: Array, bucket: Array, labels: list[int], *, ms: tuple[float, float] = (4.0, 2.0)) -> Any:
    clock = [0]
    runners = {"bucket": Told(bucket, ms[1], clock), "plain": Told(plain, ms[0], clock)}
    frames = np.repeat(np.arange(len(labels), dtype=np.uint8), 4).reshape(-1, 2, 2)
    found = score(
        runners,  # type: ignore[arg-type]
        plain="plain",
        data=LabelledImages(Path("x"), "made", np.array(labels), (), lambda index: Image.fromarray(frames[index])),
        indices=np.arange(len(labels)),
        preprocess=Preprocess(2, 1.0, "bicubic", (0, 0, 0), (1, 1, 1)),
        input_name="image",
        dtype="uint8",
        output_name="logits",
        batch=4,
        num_classes=plain.shape[1],
        clock=lambda: clock[0],
    )
    return found, runners


def test_known_logits_give_known_numbers() -> None:
    labels = [0, 1, 2, 3, 4, 5, 6, 0, 1, 2] * 3  # 30 images: 7 whole batches of 4, and one of 2
    right = list(labels)
    plain = [*right[:24], *[(label + 1) % 8 for label in right[24:]]]  # wrong on the last 6
    bucket = [(label + 2) % 8 if place < 5 else label for place, label in enumerate(right)]  # wrong on the first 5
    found, runners = run_told(told(plain, labels, 8, second=3), told(bucket, labels, 8, second=4), labels)
    first, second = found.scores
    assert (first.model, second.model) == ("plain", "bucket")
    assert (first.right, second.right) == (24, 25)
    assert first.top1 == wilson(24, 30)
    assert first.top5 == wilson(30, 30)  # where it is wrong, the label comes fifth
    assert second.top5 == wilson(25, 30)  # and here sixth
    compared = second.against_plain
    assert (compared.lost, compared.gained) == (5, 6)
    assert compared.drop == paired_drop(5, 6, 30)
    assert compared.agreement == wilson(19, 30)
    assert len(first.run_ms) == len(second.run_ms) == 8
    assert first.ms_per_image.value == pytest.approx(1.0)
    assert compared.time_ratio.value == pytest.approx(0.5)
    assert compared.pace == "faster"
    assert runners["plain"].calls == runners["bucket"].calls == 8 + 3


@pytest.mark.parametrize(("ms", "pace"), [(5.0, "slower"), (4.0, "no difference"), (3.0, "faster")])
def test_pace(ms: float, pace: str) -> None:
    logits = told([0] * 24, [0] * 24, 6)
    found, _ = run_told(logits, logits, [0] * 24, ms=(4.0, ms))
    assert found.scores[1].against_plain.pace == pace


def test_few_runs_tell_no_pace() -> None:
    logits = told([0] * 20, [0] * 20, 6)
    found, _ = run_told(logits, logits, [0] * 20, ms=(4.0, 9.0))
    assert found.scores[1].against_plain.pace == "no difference"


def test_nan_is_wrong_and_agrees_with_nothing() -> None:
    labels = [0, 1, 2, 3]
    logits = told(labels, labels, 6)
    broken = logits.copy()
    broken[2, 5] = np.nan
    found, _ = run_told(broken, broken, labels)
    assert found.scores[1].not_finite == 1
    assert found.scores[1].top1 == wilson(3, 4)
    assert found.scores[1].top5 == wilson(3, 4)
    assert found.scores[1].against_plain.agreement == wilson(3, 4)


def test_equal_logits_go_to_the_lower_class() -> None:
    labels = [0, 5, 4, 1]
    flat = np.zeros((4, 6), np.float32)
    found, _ = run_told(flat, flat, labels)
    assert found.scores[0].top1 == wilson(1, 4)
    assert found.scores[0].top5 == wilson(3, 4)


def test_top_5_of_five_classes_says_nothing() -> None:
    logits = told([0, 1], [0, 1], 5)
    assert run_told(logits, logits, [0, 1])[0].scores[0].top5 is None


# -- bundles --------------------------------------------------------------------------------------------------


def tiny_host() -> Any:
    torch = pytest.importorskip("torch")
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(1)
    host = VisionTransformer(
        img_size=SIDE, patch_size=4, num_classes=CLASSES, embed_dim=16, depth=2, num_heads=2, mlp_ratio=1
    )
    for parameter in host.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)  # so that classes differ from image to image
    torch.nn.init.zeros_(host.cls_token)
    host.pretrained_cfg = {"crop_pct": 1.0, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    return host


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ToMe inside a tiny ViT of 7 classes, budgets 4 and 12 of 16, batches 1 and 4, with the plain model."""
    out = tmp_path_factory.mktemp("classifier") / "bundle"
    options: dict[str, Any] = {"budget": [4, 12], "batch": [1, 4], "output": "logits", "with_plain": True}
    return api.export("tome", backbone=tiny_host(), out=out, **options).bundle


@pytest.fixture(scope="session")
def frames_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same host for raw frames, without the plain model."""
    out = tmp_path_factory.mktemp("frames_classifier") / "bundle"
    return api.export("tome", backbone=tiny_host(), budget=4, output="logits", input_dtype="uint8", out=out).bundle


@pytest.fixture(scope="session")
def answers(classifier: Path) -> dict[str, Array]:
    """What each graph of batch 1 says of each image, one by one."""
    bundle = open_bundle(classifier)
    assert bundle.manifest.preprocess is not None
    found: dict[str, Array] = {}
    for graph in (*bundle.select(batch=1), bundle.manifest.plain[0]):
        with open_graph("onnxruntime", bundle, graph, threads=1) as runner:
            pixels = [to_pixels(Image.fromarray(frame), bundle.manifest.preprocess, "float32") for frame in FRAMES]
            logits = [runner.infer({"image": image})["logits"] for image in pixels]
        found[graph.golden_part] = np.concatenate(logits).argmax(1)
    return found


@pytest.fixture
def labelled(tmp_path: Path, answers: dict[str, Array]) -> Path:
    """IDX files whose labels are what the plain model says: it is always right."""
    return write_pair(tmp_path / "labelled", FRAMES, answers["plain"])


def test_evaluates_as_one_by_one(classifier: Path, labelled: Path, answers: dict[str, Array]) -> None:
    lines: list[str] = []
    report = api.evaluate(classifier, labelled, threads=1, progress=lines.append)
    assert len(set(answers["plain"].tolist())) > 2
    assert 0 < (answers["m4"] != answers["plain"]).sum() < IMAGES
    assert [row.model for row in report.evaluation.scores] == ["plain.b4.onnx", "model.m4.b4.onnx", "model.m12.b4.onnx"]
    for row, part in zip(report.evaluation.scores, ("plain", "m4", "m12"), strict=True):
        same = int((answers[part] == answers["plain"]).sum())
        assert row.top1 == wilson(same, IMAGES)
        assert len(row.run_ms) == 6
        if row.against_plain is not None:
            assert row.against_plain.agreement == wilson(same, IMAGES)
            assert row.against_plain.drop == paired_drop(IMAGES - same, 0, IMAGES)
    assert (report.found, report.evaluation.images, report.evaluation.batch) == (IMAGES, IMAGES, 4)
    assert report.kept == {"plain.b4.onnx": 16, "model.m4.b4.onnx": 4, "model.m12.b4.onnx": 12}
    assert report
    assert report.notes == (
        f"no label is above {answers['plain'].max()}, and the model has 7 classes: are they its own?",
    )
    assert "reading the data" in lines


def test_raw_frames_give_the_same_answers(frames_classifier: Path, labelled: Path, answers: dict[str, Array]) -> None:
    report = api.evaluate(frames_classifier, labelled, threads=1)
    assert report.evaluation.scores[0].right == (answers["m4"] == answers["plain"]).sum()
    assert report.evaluation.scores[0].against_plain is None
    assert "has no plain model" in report.notes[0]
    assert "--output logits --with-plain" in report.notes[0]


def test_limit_batch_and_budget(classifier: Path, labelled: Path) -> None:
    report = api.evaluate(classifier, labelled, threads=1, limit=10, batch=1, budget="25%")
    assert [row.model for row in report.evaluation.scores] == ["plain.b1.onnx", "model.m4.b1.onnx"]
    assert (report.evaluation.images, report.evaluation.batch) == (10, 1)
    assert len(report.evaluation.scores[0].run_ms) == 10
    more = api.evaluate(classifier, labelled, threads=1, limit=100, budget=4)
    assert "--limit 100 is above the 21 images that there are; all were taken" in more.notes


def test_class_folders_end_to_end(cli: Cli, classifier: Path, tmp_path: Path) -> None:
    data = write_folders(tmp_path / "data", {"a": 3, "b": 2})
    report = json.loads(cli("evaluate", classifier, "--data", data, "--threads", 1, "--json").out)
    assert report["evaluation"]["images"] == 5
    (note,) = report["notes"]
    assert note.startswith("the data has 2 classes and the model 7: right only if they are the model's first 2")


def test_text_and_gate(cli: Cli, classifier: Path, labelled: Path, answers: dict[str, Array]) -> None:
    drop = 100 * float((answers["m4"] != answers["plain"]).mean())
    said = cli("evaluate", classifier, "--data", labelled, "--threads", 1)
    assert (said.code, said.err) == (0, "")
    for text in ("21 of 21 images", "IDX test), 7 classes", "1 thread, batch 4, 6 runs each", "100.00", f"{drop:.2f}"):
        assert text in said.out
    assert "verdict" not in said.out
    failed = cli("evaluate", classifier, "--data", labelled, "--threads", 1, "--max-drop", 1)
    assert failed.code == 1
    assert f"model.m4.b4.onnx loses {drop:.2f} points, above the 1 allowed" in failed.out
    assert "verdict: FAIL" in failed.out
    passed = cli("evaluate", classifier, "--data", labelled, "--threads", 1, "--max-drop", 100, "--limit", 6)
    assert passed.code == 0
    assert "6 of 21 images (chosen with seed 0)" in passed.out
    assert "verdict: pass" in passed.out


def test_slower_buckets_are_said_not_to_pay(classifier: Path, labelled: Path) -> None:
    import msgspec

    from edgecomp.report.evaluate import describe_evaluation

    report = api.evaluate(classifier, labelled, threads=1, budget=4)
    plain, bucket = report.evaluation.scores
    for low, high, pace, text in (
        (1.1, 1.3, "slower", "model.m4.b4.onnx does not pay here: 1.20x the plain model's time"),
        (0.9, 1.5, "no difference", "model.m4.b4.onnx: no gain was measured: 1.20x the plain model's time"),
        (0.5, 0.9, "faster", ""),
    ):
        ratio = msgspec.structs.replace(bucket.against_plain.time_ratio, value=1.2, low=low, high=high)
        compared = msgspec.structs.replace(bucket.against_plain, time_ratio=ratio, pace=pace)
        rows = (plain, msgspec.structs.replace(bucket, against_plain=compared))
        found = msgspec.structs.replace(report.evaluation, scores=rows)
        printed = describe_evaluation(msgspec.structs.replace(report, evaluation=found))
        assert text in printed
        assert ("does not pay" in printed or "no gain" in printed) is bool(text)


def test_json_holds_every_figure(cli: Cli, classifier: Path, labelled: Path) -> None:
    said = cli("evaluate", classifier, "--data", labelled, "--threads", 1, "--json", "--max-drop", 1)
    assert said.code == 1
    report = json.loads(said.out, parse_constant=pytest.fail)
    row = report["evaluation"]["scores"][1]
    assert len(row["run_ms"]) == 6
    assert row["against_plain"]["drop"]["low"] <= row["against_plain"]["drop"]["value"]
    assert row["top5"]["value"] >= row["top1"]["value"]
    assert report["max_drop"] == 1
    assert report["machine"]["cores"] >= 1


def test_no_torch(classifier: Path, labelled: Path) -> None:
    script = (
        "import sys\n"
        "from edgecomp.cli import main\n"
        "try: main()\n"
        "finally: print([n for n in ('torch', 'timm', 'onnx', 'onnx_ir') if n in sys.modules], file=sys.stderr)\n"
    )
    words = ["evaluate", str(classifier), "--data", str(labelled), "--limit", "4"]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "[]\n")


# -- refused --------------------------------------------------------------------------------------------------

TABLE: list[tuple[str, tuple[str, ...]]] = [
    ("nowhere --data {good}", ("bundle nowhere is not a folder",)),
    ("{bundle}", ("Missing option", "--data")),
    ("{bundle} --data nowhere", ("data nowhere is not a folder",)),
    ("{bundle} --data {bad}/nothing", ("nothing holds 0 files and no folder", "t10k-images-idx3-ubyte.gz")),
    ("{bundle} --data {bad}/hollow", ("hollow holds 2 folders and no image in them",)),
    ("{bundle} --data {bad}/corrupt", ("image ", "b.png is truncated or damaged")),
    ("{bundle} --data {bad}/text", ("b.png is not a JPEG, PNG, WebP or BMP", "b'not an i'")),
    ("{bundle} --data {bad}/stray", ("the folder 'dog' is no class of classes.txt (2 names)",)),
    ("{bundle} --data {bad}/twice", ("classes.txt: line 3 names 'cat' again",)),
    ("{bundle} --data {bad}/blank", ("classes.txt: line 2 is blank",)),
    ("{bundle} --data {bad}/many", ("image 7 has the label 7 ('7')", "the model has 7 classes, 0 to 6", "2 of 9")),
    ("{bundle} --data {bad}/high", ("image 20 has the label 200, and the model has 7 classes", "1 of 21")),
    ("{bundle} --data {bad}/alone", ("alone lacks t10k-labels-idx1-ubyte[.gz]",)),
    ("{bundle} --data {good} --split train", ("lacks train-images-idx3-ubyte[.gz]", "test, train")),
    ("{bundle} --data {good} --split tset", ("no split of IDX files 'tset'; did you mean 'test'?",)),
    ("{bundle} --data {bad}/many --split test", ("--split test", "class folders have no splits")),
    ("{bundle} --data {bad}/short", ("21 x 16 x 16 = 5376 values and holds only 5276",)),
    ("{bundle} --data {bad}/long", ("21 x 16 x 16 = 5376 values and holds more",)),
    ("{bundle} --data {bad}/cut", ("images-idx3-ubyte.gz is truncated or no gzip file",)),
    ("{bundle} --data {bad}/notgzip", ("images-idx3-ubyte.gz is truncated or no gzip file", "Not a gzipped file")),
    ("{bundle} --data {bad}/header", ("holds 7 bytes, fewer than the 16 of an IDX header",)),
    ("{bundle} --data {bad}/empty", ("holds 0 bytes, fewer than the 16 of an IDX header",)),
    ("{bundle} --data {bad}/magic", ("begins with the magic number 0x00000801 and not 0x00000803",)),
    ("{bundle} --data {bad}/counts", ("holds 21 images and t10k-labels-idx1-ubyte.gz 20 labels",)),
    ("{bundle} --data {bad}/zero", ("says 0 values, so it holds nothing to evaluate",)),
    ("{bundle} --data {good} --limit 0", ("limit 0 is below 1",)),
    ("{bundle} --data {good} --limit few", ("few",)),
    ("{bundle} --data {good} --seed -1", ("seed -1 is not between 0",)),
    ("{bundle} --data {good} --max-drop -1", ("max drop -1 is not between 0 and 100",)),
    ("{bundle} --data {good} --max-drop nan", ("max drop nan is not between 0 and 100",)),
    ("{bundle} --data {good} --batch 3", ("no batch 3; it has 1, 4",)),
    ("{bundle} --data {good} --budget 5", ("no budget 5; it has 4, 12",)),
    ("{bundle} --data {good} --runner tensorflow", ("no runner 'tensorflow'",)),
    ("{bundle} --data {good} --threads 9999", ("threads=9999",)),
    ("{no_plain} --data {good} --max-drop 1", ("--max-drop 1", "has no plain model", "--with-plain")),
    ("{lookup} --data {good}", ("gives compressed float32[1, 4, 32] and no logits", "--output logits --with-plain")),
    ("{tokens} --data {good}", ("and no logits", "perceiver alone classifies nothing")),
]


@pytest.fixture(scope="session")
def bad_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad_data")
    labels = np.zeros(IMAGES)
    (folder / "nothing").mkdir()
    for name in ("hollow/a", "hollow/b"):
        (folder / name).mkdir(parents=True)
    for name, content in (("corrupt", b""), ("text", b"not an image")):
        path = write_folders(folder / name, {"a": 1}) / "a" / "b.png"
        whole = (folder / name / "a" / "0.png").read_bytes()
        path.write_bytes(content or whole[: len(whole) // 2])
    for name, classes in (("stray", "cat\ncow"), ("twice", "cat\ndog\ncat"), ("blank", "cat\n\ndog")):
        (write_folders(folder / name, {"cat": 1, "dog": 1}) / "classes.txt").write_text(classes)
    write_folders(folder / "many", {str(number): 1 for number in range(9)})
    high = labels.copy()
    high[-1] = 200
    write_pair(folder / "high", FRAMES, high)
    write_pair(folder / "alone", FRAMES, labels)
    (folder / "alone" / "t10k-labels-idx1-ubyte.gz").unlink()
    for name, change in (
        ("short", lambda content: content[:-100]),
        ("long", lambda content: content + b"x"),
        ("header", lambda content: content[:7]),
        ("empty", lambda content: b""),
        ("magic", lambda content: b"\0\0\x08\x01" + content[4:]),
    ):
        file = write_pair(folder / name, FRAMES, labels, suffix="") / "t10k-images-idx3-ubyte"
        file.write_bytes(change(file.read_bytes()))
    for name in ("cut", "notgzip"):
        file = write_pair(folder / name, FRAMES, labels) / "t10k-images-idx3-ubyte.gz"
        file.write_bytes(file.read_bytes()[:200] if name == "cut" else b"hello")
    write_pair(folder / "counts", FRAMES, labels[:-1])
    write_pair(folder / "zero", FRAMES[:0], labels[:0])
    return folder


@pytest.mark.parametrize(("command", "texts"), TABLE, ids=[command for command, _ in TABLE])
def test_refused(
    command: str,
    texts: tuple[str, ...],
    cli: Cli,
    classifier: Path,
    frames_classifier: Path,
    exported: Path,
    exported_tokens: Path,
    bad_data: Path,
    tmp_path: Path,
) -> None:
    good = write_pair(tmp_path / "good", FRAMES, np.zeros(IMAGES))
    bundles = {"bundle": classifier, "no_plain": frames_classifier, "lookup": exported, "tokens": exported_tokens}
    said = cli("evaluate", *shlex.split(command.format(**bundles, good=good, bad=bad_data)))
    assert said.code == 2, said.err
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert 1 <= said.err.count("\n") <= 3
    for text in texts:
        assert text in said.err, f"{text!r} is not in {said.err!r}"


def test_needs_onnxruntime(classifier: Path, labelled: Path) -> None:
    script = "import sys\nsys.modules['onnxruntime'] = None\nfrom edgecomp.cli import main\nmain()\n"
    words = ["evaluate", str(classifier), "--data", str(labelled)]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "edgecomp[ort]" in done.stderr


def test_without_images_as_input(classifier: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle with logits whose input is not one image."""
    import msgspec

    from edgecomp.api import _evaluate

    opened = open_bundle(classifier)
    blind = msgspec.structs.replace(opened, manifest=msgspec.structs.replace(opened.manifest, preprocess=None))
    monkeypatch.setattr(_evaluate, "open_bundle", lambda path: blind)
    with pytest.raises(InvalidSpec, match=r"takes image float32\[4, 3, 16, 16\]"):
        api.evaluate(classifier, labelled)
