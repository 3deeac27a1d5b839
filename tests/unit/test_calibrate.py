"""Thresholds from real images: which sets are tried, which is chosen, what is written, and what is refused."""

from __future__ import annotations

import errno
import gzip
import hashlib
import itertools
import json
import os
import shlex
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import edgecomp
from edgecomp import api
from edgecomp import bundle as bundles
from edgecomp.api import _calibrate
from edgecomp.bundle import MANIFEST, golden_key, open_bundle
from edgecomp.errors import EdgecompError, InvalidSpec
from edgecomp.evaluation import open_images
from edgecomp.evaluation.thresholds import assign, candidates, choose, one_for_all
from edgecomp.images import to_pixels
from edgecomp.parity import read_goldens

Cli = Callable[..., Any]
Edit = Callable[[Path, Callable[[dict[str, Any]], object]], None]

SIDE, BUCKETS, IMAGES = 16, (4, 8, 12), 12


# -- thresholds ---------------------------------------------------------------------------------------------

GRID = st.one_of(
    st.sampled_from([0.0, 1.0, 0.5]),  # ties, and both ends
    st.floats(0, 1, width=32),
    st.integers(0, 10).map(lambda tenth: tenth / 10),
)


@st.composite
def many_needs(draw: st.DrawFn) -> Any:
    """Needs of some images: one number for all thresholds, or one for each."""
    images, cuts = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    if draw(st.booleans()):
        column = draw(st.lists(GRID, min_size=images, max_size=images))
        return np.repeat(np.array(column, np.float32)[:, None], cuts, 1)
    rows = draw(st.lists(st.lists(GRID, min_size=cuts, max_size=cuts), min_size=images, max_size=images))
    return np.array(rows, np.float32)


def routed(needs: Any, thresholds: Sequence[float]) -> list[int]:
    """Count in plain Python how many thresholds each image reaches."""
    cuts = [np.float32(cut) for cut in thresholds]
    return [sum(need >= cut for need, cut in zip(row, cuts, strict=True)) for row in needs]


@given(needs=many_needs(), cut=st.lists(GRID, min_size=4, max_size=4))
def test_assign_counts_as_a_router_does(needs: Any, cut: list[float]) -> None:
    thresholds = cut[: needs.shape[1]]
    assert assign(needs, thresholds).tolist() == routed(needs, thresholds)


@settings(max_examples=300)
@given(needs=many_needs())
def test_candidates_go_from_all_smallest_to_all_largest(needs: Any) -> None:
    """And on the way no image ever goes back to a smaller bucket."""
    found = candidates(needs)
    places = [routed(needs, thresholds) for thresholds in found]
    images, cuts = needs.shape
    assert places[0] == [0] * images
    assert places[-1] == [cuts] * images
    for before, after in itertools.pairwise(places):
        assert all(low <= high for low, high in zip(before, after, strict=True))
    assert len(set(found)) == len(found)
    assert all(len(thresholds) == cuts for thresholds in found)
    assert all(float(np.float32(cut)) == cut for thresholds in found for cut in thresholds)  # as the graph takes them


@given(needs=many_needs(), low=st.floats(0, 1, width=32))
def test_images_of_equal_need_stay_together(needs: Any, low: float) -> None:
    needs[: len(needs) // 2] = np.float32(low)
    for thresholds in candidates(needs):
        assert len(set(routed(needs, thresholds)[: len(needs) // 2])) <= 1


@pytest.mark.parametrize("images", [1, 2, 3, 4, 7, 10, 255])
def test_with_two_buckets_hardly_a_split_is_left_out(images: int) -> None:
    """So many images above the one threshold: none, one, two, ..., all; of an odd number every other one may lack."""
    needs = (np.random.default_rng(images).permutation(images).astype(np.float32)[:, None] + 1) / (images + 2)
    found = sorted({sum(routed(needs, one)) for one in candidates(needs)})
    assert (found[0], found[-1]) == (0, images)
    assert max(high - low for low, high in itertools.pairwise(found)) <= 1 + images % 2


@settings(max_examples=300)
@given(needs=many_needs(), limit=st.floats(0, 4), most=st.booleans(), ragged=st.randoms(use_true_random=False))
def test_choose_is_the_best_of_all_candidates(needs: Any, limit: float, most: bool, ragged: Any) -> None:
    """By brute force, also of a cost that does not grow with the bucket, such as a latency here."""
    cost = np.array([ragged.uniform(0, 4) for _ in range(needs.shape[1] + 1)])

    def holds(places: Any) -> bool:
        return bool(cost[np.asarray(places)].mean() <= limit)

    fitting = [places for one in candidates(needs) if holds(places := routed(needs, one))]
    found = choose(needs, holds, most=most)
    if not fitting:  # one bucket for all is left
        fitting = [[place] * len(needs) for place in range(len(cost)) if holds([place] * len(needs))]
    if not fitting:
        assert found is None
        return
    assert found is not None
    places = routed(needs, found)
    assert holds(places)
    assert sum(places) == (max if most else min)(map(sum, fitting))


@given(needs=many_needs())
def test_one_bucket_for_all(needs: Any) -> None:
    found = [routed(needs, thresholds) for thresholds in one_for_all(needs)]
    assert found == [[place] * len(needs) for place in range(needs.shape[1] + 1)]


@settings(max_examples=200)
@given(needs=many_needs(), share=st.floats(0, 1))
def test_a_mean_between_smallest_and_largest_is_always_reached(needs: Any, share: float) -> None:
    tokens = 4.0 * np.arange(1, needs.shape[1] + 2)
    target = tokens[0] + share * (tokens[-1] - tokens[0])
    found = choose(needs, lambda places: float(tokens[places].mean()) <= target, most=True)
    assert found is not None
    assert tokens[routed(needs, found)].mean() <= target
    if share == 1:
        assert routed(needs, found) == [needs.shape[1]] * len(needs)


# -- a bundle, and images whose needs differ ------------------------------------------------------------------


def frames() -> Any:
    """Images from plain to noisy: the difficulty of each is above that of the one before, or nearly so."""
    rng = np.random.default_rng(3)
    noise = rng.integers(-128, 128, (IMAGES, SIDE, SIDE))
    strength = np.linspace(0, 1, IMAGES)[:, None, None]
    return np.clip(128 + strength * noise, 0, 255).astype(np.uint8)


def write_pngs(folder: Path) -> Path:
    """In folders of folders, as they lie about in the world."""
    for place, frame in enumerate(frames()):
        file = folder / ("a" if place % 2 else "b/c") / f"{place}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame).save(file)
    return folder


def write_idx(folder: Path, split: str = "t10k") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in (("images-idx3", frames()), ("labels-idx1", np.zeros(IMAGES, np.uint8))):
        header = struct.pack(">I", 0x0800 + values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
        (folder / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
    return folder


def tiny_host() -> Any:
    torch = pytest.importorskip("torch")
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(1)
    host = VisionTransformer(
        img_size=SIDE, patch_size=4, num_classes=7, embed_dim=16, depth=2, num_heads=2, mlp_ratio=1
    )
    for parameter in host.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)  # so that classes differ from image to image
    torch.nn.init.zeros_(host.cls_token)
    host.pretrained_cfg = {"crop_pct": 1.0, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    return host


def export_classifier(out: Path) -> api.ExportReport:
    options: dict[str, Any] = {"budget": BUCKETS, "output": "logits", "params": {"blocks": [1]}}
    return api.export("dynamicvit", backbone=tiny_host(), router="difficulty", out=out, **options)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DynamicViT inside a tiny ViT of 7 classes, with a router; not to be written to."""
    return export_classifier(tmp_path_factory.mktemp("classifier") / "bundle").bundle


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruner behind the same host, of an image and a query, with a router of the stem; not to be written to."""
    out = tmp_path_factory.mktemp("pruned") / "bundle"
    return api.export("query-aware", backbone=tiny_host(), budget=[4, 8], router="complexity", out=out).bundle


@pytest.fixture
def bundle(classifier: Path, tmp_path: Path) -> Path:
    return shutil.copytree(classifier, tmp_path / "bundle")


@pytest.fixture(scope="module")
def pngs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pngs(tmp_path_factory.mktemp("pngs") / "holidays")


class Told(msgspec.Struct):
    """What a bundle says of each image, asked one by one."""

    pixels: list[Any]
    needs: Any
    first: dict[int, list[Any]]

    def agreement(self, budgets: Sequence[int]) -> float:
        same = [self.first[b][i].argmax() == self.first[BUCKETS[-1]][i].argmax() for i, b in enumerate(budgets)]
        return sum(map(bool, same)) / len(same)


@pytest.fixture(scope="module")
def told(classifier: Path, pngs: Path) -> Told:
    images = open_images(pngs)
    with edgecomp.load(classifier, threads=1) as model:
        preprocess = model.bundle.manifest.preprocess
        assert preprocess is not None
        pixels = [to_pixels(images.image(index), preprocess, "float32")[0] for index in images.indices]
        needs = np.array([model(one).need for one in pixels], np.float32)
        first = {budget: [model(one, budget=budget)["logits"] for one in pixels] for budget in BUCKETS}
    return Told(pixels, needs, first)


def routed_now(bundle: Path, told: Told) -> list[int]:
    """Return the bucket that each image goes to, asked one by one."""
    with edgecomp.load(bundle, threads=1) as model:
        return [model(one).budget for one in told.pixels]


def contents(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if file.is_file()}


def test_the_images_can_tell_thresholds_apart(told: Told) -> None:
    """What follows would not see a wrong choice otherwise."""
    assert len({float(need) for need in told.needs[:, 0]}) >= IMAGES - 2
    smallest, middle = (told.agreement([budget] * IMAGES) for budget in BUCKETS[:2])
    assert smallest < 1
    assert middle < 1


# -- the three targets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [4, 6, 7.9, 10, 12])
def test_mean_tokens(target: float, bundle: Path, pngs: Path, told: Told) -> None:
    before = open_bundle(bundle).manifest.router
    assert before is not None
    old = routed_now(bundle, told)
    report = api.calibrate(bundle, pngs, mean_tokens=target, threads=1)
    budgets = routed_now(bundle, told)
    made = report.router.calibration
    assert made is not None
    assert np.mean(budgets) <= target
    assert made.mean_tokens == pytest.approx(np.mean(budgets))
    assert made.agreement == pytest.approx(told.agreement(budgets))
    assert (made.target, made.images, made.agreement_of) == (f"mean tokens {target}", IMAGES, "the class")
    fitting = [np.mean([BUCKETS[place] for place in routed(told.needs, one)]) for one in candidates(told.needs)]
    assert np.mean(budgets) == pytest.approx(max(mean for mean in fitting if mean <= target))
    assert [use.tokens for use in report.buckets] == list(BUCKETS)
    assert [use.after for use in report.buckets] == [budgets.count(budget) for budget in BUCKETS]
    assert [use.before for use in report.buckets] == [old.count(budget) for budget in BUCKETS]
    for use in report.buckets:
        assert use.agreement == pytest.approx(told.agreement([use.tokens] * IMAGES))
    assert report.before == before.thresholds != report.router.thresholds


@pytest.mark.parametrize("share", [0.01, 0.5, 0.8, 1.0])
def test_keep_agreement(share: float, bundle: Path, pngs: Path, told: Told) -> None:
    report = api.calibrate(bundle, pngs, keep_agreement=share, threads=1)
    budgets = routed_now(bundle, told)
    assert told.agreement(budgets) >= share
    assert report.router.calibration is not None
    assert report.router.calibration.agreement == pytest.approx(told.agreement(budgets))
    tried = [[BUCKETS[place] for place in routed(told.needs, one)] for one in candidates(told.needs)]
    assert sum(budgets) == min(sum(one) for one in tried if told.agreement(one) >= share)


TIMES = {4: 0.004, 8: 0.010, 12: 0.016}  # seconds
ROUTER_SECONDS = 0.001


@pytest.fixture
def given_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every bucket take its time in TIMES, and asking the router a millisecond more."""

    def timed(model: Any, image: Any, text: str | None, budget: int | None, **more: Any) -> tuple[Any, float]:
        answer = model(image, text, budget=budget, **more)
        return answer, TIMES[answer.budget]

    monkeypatch.setattr(_calibrate, "_timed", timed)
    monkeypatch.setattr(_calibrate, "_router_seconds", lambda model: ROUTER_SECONDS)


@pytest.mark.parametrize("target", [5.6, 8.4, 12.1, 17.5])
def test_latency_target(target: float, bundle: Path, pngs: Path, told: Told, given_times: None) -> None:
    report = api.calibrate(bundle, pngs, latency_target_ms=target, threads=1)
    budgets = routed_now(bundle, told)

    def mean_ms(chosen: Sequence[int]) -> float:
        return 1000 * (float(np.mean([TIMES[budget] for budget in chosen])) + ROUTER_SECONDS)

    assert mean_ms(budgets) <= target
    assert report.mean_ms == pytest.approx(mean_ms(budgets))
    assert report.router_ms == pytest.approx(1000 * ROUTER_SECONDS)
    assert {use.tokens: use.ms for use in report.buckets} == pytest.approx({t: 1000 * s for t, s in TIMES.items()})
    tried = [[BUCKETS[place] for place in routed(told.needs, one)] for one in candidates(told.needs)]
    assert sum(budgets) == max(sum(one) for one in tried if mean_ms(one) <= target)


def test_a_latency_that_the_middle_bucket_alone_reaches(
    bundle: Path, pngs: Path, told: Told, given_times: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the quickest here: all images go there, and below it nothing is reached."""
    monkeypatch.setitem(TIMES, 8, 0.003)
    report = api.calibrate(bundle, pngs, latency_target_ms=4.05, threads=1)
    assert routed_now(bundle, told) == [8] * IMAGES
    assert report.mean_ms == pytest.approx(4.0)
    with pytest.raises(InvalidSpec, match=r"on these 12 images: the least is 4\.000 ms, with the router \(1\.000 ms\)"):
        api.calibrate(bundle, pngs, latency_target_ms=3.95, threads=1)


def test_real_times(bundle: Path, pngs: Path) -> None:
    """On a real clock: an hour is time enough for the largest bucket, a nanosecond for none."""
    report = api.calibrate(bundle, pngs, latency_target_ms=3.6e6, threads=1)
    assert [use.after for use in report.buckets] == [0, 0, IMAGES]
    assert all(use.ms > 0 for use in report.buckets)
    assert report.mean_ms == pytest.approx(report.buckets[-1].ms + report.router_ms)
    before = contents(bundle)
    with pytest.raises(InvalidSpec, match=r"no thresholds reach latency target in ms 1e-06 on these 12 images: the le"):
        api.calibrate(bundle, pngs, latency_target_ms=1e-6, threads=1)
    assert contents(bundle) == before


def test_agreement_of_tokens_is_a_cosine(pruned: Path, pngs: Path, tmp_path: Path) -> None:
    """Where no class comes out: of the mean token. What goes in beside the image is that of the goldens."""
    bundle = shutil.copytree(pruned, tmp_path / "bundle")
    report = api.calibrate(bundle, pngs, keep_agreement=1.0, threads=1)
    made = report.router.calibration
    assert made is not None
    assert (made.agreement_of, made.agreement) == ("the mean token (cosine)", 1.0)
    images, features = open_images(pngs), {"query": read_goldens(bundle)[golden_key("input", "seeded", "query")][:1]}
    with edgecomp.load(bundle, threads=1) as model:
        preprocess = model.bundle.manifest.preprocess
        assert preprocess is not None
        cosines = []
        for index in images.indices:
            pixels = to_pixels(images.image(index), preprocess, "float32")[0]
            kept = [model(pixels, budget=budget, features=features)["kept"][0] for budget in (4, 8)]
            few, many = (array.astype(np.float64).mean(0) for array in kept)
            cosines.append(few @ many / np.sqrt(few @ few) / np.sqrt(many @ many))
            assert model(pixels, features=features).budget == 8
    assert report.buckets[0].agreement == pytest.approx(np.mean(cosines))
    assert np.mean(cosines) < 0.999
    assert "query: the same for all images, those of the bundle's golden inputs" in report.notes
    assert any(note.startswith("all buckets run the whole encoder") for note in report.notes)


def test_questions_go_with_the_images_in_turn(bundle: Path, pngs: Path, told: Told) -> None:
    """They send a request higher, which thresholds for images alone would not reckon with."""
    asked = ["How many are not here, and why?", "", "Why?"]
    with edgecomp.load(bundle, threads=1) as model:
        needs = [model(one, asked[place % 3]).need for place, one in enumerate(told.pixels)]
    report = api.calibrate(bundle, pngs, mean_tokens=8, texts=asked, threads=1)
    alone = api.calibrate(bundle, pngs, mean_tokens=8, threads=1)
    assert report.router.thresholds != alone.router.thresholds
    budgets = [BUCKETS[place] for place in routed(np.array(needs, np.float32), report.router.thresholds)]
    assert [use.after for use in report.buckets] == [budgets.count(budget) for budget in BUCKETS]
    assert report.router.calibration is not None
    assert report.router.calibration.mean_tokens == pytest.approx(np.mean(budgets))
    assert np.mean(budgets) <= 8
    said = "router difficulty reads words, and the images came without: a question sends a request higher"
    assert said not in report.notes
    assert said in alone.notes


# -- data -----------------------------------------------------------------------------------------------------


def test_idx_files_give_what_images_give(bundle: Path, pngs: Path, told: Told, tmp_path: Path) -> None:
    """Of the same pixels; the order of a folder's names is another, which a mean does not see."""
    of_images = api.calibrate(bundle, pngs, mean_tokens=7, threads=1)
    of_idx = api.calibrate(bundle, write_idx(tmp_path / "idx"), mean_tokens=7, threads=1)
    assert of_idx.router.thresholds == of_images.router.thresholds
    one, other = of_images.router.calibration, of_idx.router.calibration
    assert one is not None
    assert other is not None
    assert (one.data, other.data) == ("holidays", "idx")
    assert one.sha256 != other.sha256
    assert (one.mean_tokens, one.agreement) == (other.mean_tokens, other.agreement)
    write_idx(tmp_path / "both", "train")
    assert api.calibrate(bundle, tmp_path / "both", split="train", mean_tokens=7, threads=1)


def test_the_hash_is_of_the_prepared_images_in_order(bundle: Path, pngs: Path, told: Told) -> None:
    report = api.calibrate(bundle, pngs, mean_tokens=7, threads=1)
    assert report.router.calibration is not None
    expected = hashlib.sha256(b"".join(one[None].tobytes() for one in told.pixels)).hexdigest()
    assert report.router.calibration.sha256 == expected


def test_a_limit_takes_some_at_random(bundle: Path, pngs: Path) -> None:
    found = [
        api.calibrate(bundle, pngs, mean_tokens=8, limit=5, seed=seed, threads=1).router.calibration
        for seed in (0, 0, 1)
    ]
    assert [made.images for made in found if made] == [5, 5, 5]
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_what_cannot_be_read_is_named_and_counted(bundle: Path, tmp_path: Path, told: Told) -> None:
    data = write_pngs(tmp_path / "data")
    for name in ("x.png", "y.jpg", "b/z.bmp", "q.webp"):
        (data / name).write_bytes(b"no image")
    (data / "a" / "cut.png").write_bytes((data / "a" / "1.png").read_bytes()[:60])
    (data / "notes.txt").write_text("x")
    (data / ".hidden.png").write_bytes(b"x")
    report = api.calibrate(bundle, data, mean_tokens=7, threads=1)
    assert report.router.calibration is not None
    assert report.router.calibration.images == IMAGES
    broken, other, *_ = report.notes
    assert broken.startswith("5 images cannot be read and were left out: ")
    assert sum(name in broken for name in ("x.png", "y.jpg", "z.bmp", "q.webp", "cut.png")) == 5
    assert other == "1 files are no images and were left out: notes.txt"
    limited = api.calibrate(bundle, data, mean_tokens=7, limit=IMAGES, threads=1)
    assert limited.router.calibration is not None
    assert limited.router.calibration.images == IMAGES  # others take the place of those that cannot be read


# -- what is written ------------------------------------------------------------------------------------------


def test_only_the_manifest_changes(bundle: Path, pngs: Path, tmp_path: Path) -> None:
    before, old = contents(bundle), open_bundle(bundle).manifest
    report = api.calibrate(bundle, pngs, mean_tokens=6, threads=1)
    after = contents(bundle)
    assert {name for name in after if after[name] != before.get(name)} == {MANIFEST}
    assert set(after) == set(before)
    assert os.listdir(tmp_path) == ["bundle"]
    manifest = open_bundle(bundle).manifest  # its digest, and every hash
    assert manifest.router == report.router
    assert manifest.router is not None
    assert old.router is not None
    assert manifest.digest != old.digest
    changed = msgspec.structs.replace(
        manifest.router, thresholds=old.router.thresholds, calibration=old.router.calibration
    )
    assert msgspec.structs.replace(manifest, router=changed, digest=old.digest) == old
    raw = json.loads((bundle / MANIFEST).read_bytes())["router"]
    assert raw["calibration"]["target"] == "mean tokens 6"
    assert str(pngs.parent) not in (bundle / MANIFEST).read_text()  # a path tells who somebody is


def test_what_is_calibrated_still_serves(bundle: Path, pngs: Path, cli: Cli) -> None:
    api.calibrate(bundle, pngs, mean_tokens=6, threads=1)
    assert api.parity(bundle, threads=1)
    again = export_classifier(bundle)
    assert again.reused
    assert again.manifest == open_bundle(bundle).manifest
    assert again.manifest.router is not None
    assert again.manifest.router.calibration is not None
    assert "set for mean tokens 6" in cli("inspect", bundle).out


def test_calibrating_again_starts_from_what_is_there(bundle: Path, pngs: Path) -> None:
    first = api.calibrate(bundle, pngs, mean_tokens=6, threads=1)
    second = api.calibrate(bundle, pngs, mean_tokens=10, threads=1)
    assert second.before == first.router.thresholds
    assert [use.before for use in second.buckets] == [use.after for use in first.buckets]
    third = api.calibrate(bundle, pngs, mean_tokens=6, threads=1)
    assert third.router == first.router


@pytest.mark.parametrize("when", ["write", "sync", "replace", "interrupt"])
def test_an_interrupted_write_leaves_the_old_manifest(
    when: str, bundle: Path, pngs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(bundle)
    error: BaseException = OSError(errno.ENOSPC, "No space left on device")
    if when == "interrupt":
        error = KeyboardInterrupt()

    def fail(*words: Any, **more: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        if when == "write":
            patch.setattr(Path, "write_bytes", fail)
        elif when == "sync":
            patch.setattr(bundles, "_sync", fail)
        else:
            patch.setattr(os, "replace", fail)
        if when == "interrupt":
            with pytest.raises(KeyboardInterrupt):
                api.calibrate(bundle, pngs, mean_tokens=6, threads=1)
        else:
            with pytest.raises(EdgecompError, match=r"No space left on device; nothing was changed"):
                api.calibrate(bundle, pngs, mean_tokens=6, threads=1)
    assert contents(bundle) == before
    assert os.listdir(tmp_path) == ["bundle"]
    assert open_bundle(bundle)


# -- the command line -----------------------------------------------------------------------------------------


def test_text(bundle: Path, pngs: Path, cli: Cli, told: Told) -> None:
    old = routed_now(bundle, told)
    said = cli("calibrate", bundle, "--data", pngs, "--mean-tokens", 7, "--threads", 1)
    assert (said.code, said.err) == (0, "")
    record, budgets = open_bundle(bundle).manifest.router, routed_now(bundle, told)
    assert record is not None
    assert record.calibration is not None
    lines = said.out.splitlines()
    assert lines[0] == f"{bundle}: router difficulty set for mean tokens 7"
    assert f"12 images of holidays, sha256 {record.calibration.sha256[:12]}" in said.out
    assert ", ".join(f"{cut:.4f}" for cut in record.thresholds) in said.out
    assert f"{np.mean(budgets):.1f} tokens kept" in said.out
    assert f"{100 * told.agreement(budgets):.2f} % with the largest bucket, of the class" in said.out
    for budget in BUCKETS:
        (row,) = [line.split() for line in lines if line.split()[:1] == [str(budget)]]
        assert row[1:3] == [str(old.count(budget)), str(budgets.count(budget))]
        bar = row[3] if row[3].startswith("#") else ""
        assert len(bar) == round(40 * budgets.count(budget) / IMAGES)
        assert row[-1] == f"{100 * told.agreement([budget] * IMAGES):.2f}"


def test_text_says_where_the_router_does_not_pay(
    bundle: Path, pngs: Path, cli: Cli, given_times: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("calibrate", bundle, "--data", pngs, "--threads", 1, "--latency-target")
    said = cli(*words, 17.5)
    assert "a routed request takes 17.000 ms, and bucket 12 alone 16.000 ms: the router does not pay here" in said.out
    assert "router     1.000 ms a request, 25.0 % of the smallest bucket" in said.out
    assert "take longer than bucket" not in said.out
    assert "does not pay" not in cli(*words, 8).out
    monkeypatch.setitem(TIMES, 8, 0.0155)
    said = cli(*words, 8)
    text = "router and bucket 8 take longer than bucket 12 alone (16.000 ms): here the router does not pay for it"
    assert text in said.out


def test_json(bundle: Path, pngs: Path, cli: Cli, told: Told) -> None:
    said = cli("calibrate", bundle, "--data", pngs, "--keep-agreement", 0.9, "--threads", 1, "--json")
    report = json.loads(said.out, parse_constant=pytest.fail)
    budgets = routed_now(bundle, told)
    assert report["router"]["calibration"]["target"] == "agreement 0.9"
    assert report["router"]["calibration"]["agreement"] >= 0.9
    assert [use["after"] for use in report["buckets"]] == [budgets.count(budget) for budget in BUCKETS]
    assert json.loads((bundle / MANIFEST).read_bytes())["router"] == report["router"]


# -- refused --------------------------------------------------------------------------------------------------

GOOD = "{bundle} --data {pngs}"
TABLE: list[tuple[str, tuple[str, ...]]] = [
    ("nowhere --data {pngs} --mean-tokens 8", ("bundle nowhere is not a folder",)),
    ("{bundle} --mean-tokens 8", ("Missing option", "--data")),
    (GOOD, ("0 targets were given", "exactly one of --mean-tokens, --latency-target, --keep-agreement")),
    (f"{GOOD} --mean-tokens 8 --keep-agreement 0.5", ("2 targets were given",)),
    (f"{GOOD} --mean-tokens 8 --keep-agreement 0.5 --latency-target 1", ("3 targets were given",)),
    (f"{GOOD} --mean-tokens 0", ("mean tokens 0.0 is not at least 1 and at most 1048576",)),
    (f"{GOOD} --mean-tokens -4", ("mean tokens -4.0 is not at least 1",)),
    (f"{GOOD} --mean-tokens nan", ("mean tokens nan",)),
    (f"{GOOD} --mean-tokens many", ("many",)),
    (f"{GOOD} --mean-tokens 13", ("mean tokens 13 is above 12, what the largest bucket keeps", "Give 4 to 12")),
    (
        f"{GOOD} --mean-tokens 3",
        ("no thresholds reach mean tokens 3 on these 12 images", "the least is 4"),
    ),
    (f"{GOOD} --latency-target 0", ("latency target in ms 0.0 is not above 0",)),
    (f"{GOOD} --latency-target inf", ("latency target in ms inf",)),
    (
        f"{GOOD} --latency-target 0.000001",
        ("no thresholds reach latency target in ms 1e-06", "nothing was written"),
    ),
    (f"{GOOD} --keep-agreement 1.01", ("agreement 1.01 is not above 0 and at most 1",)),
    (f"{GOOD} --keep-agreement 0", ("agreement 0.0 is not above 0",)),
    (f"{GOOD} --keep-agreement nan", ("agreement nan",)),
    (f"{GOOD} --mean-tokens 8 --limit 0", ("limit 0 is below 1",)),
    (f"{GOOD} --mean-tokens 8 --threads -1", ("threads=-1 is not between 0",)),
    (f"{GOOD} --mean-tokens 8 --runner tensorflow", ("no runner 'tensorflow'", "onnxruntime")),
    (f"{GOOD} --mean-tokens 8 --split test", ("--split test", "holds no IDX files")),
    ("{bundle} --data {bad}/idx --mean-tokens 8 --split tset", ("no split of IDX files 'tset'",)),
    ("{bundle} --data {bad}/idx --mean-tokens 8 --split train", ("lacks train-images-idx3-ubyte[.gz]",)),
    ("{bundle} --data nowhere --mean-tokens 8", ("data nowhere is not a folder",)),
    ("{bundle} --data {bad}/empty --mean-tokens 8", ("empty holds 0 files and no image among them", ".png")),
    ("{bundle} --data {bad}/texts --mean-tokens 8", ("texts holds 2 files and no image among them",)),
    (
        "{bundle} --data {bad}/broken --mean-tokens 8",
        ("none of its 2 images can be read", "a.png (", "b.jpg (", "is not a JPEG, PNG, WebP or BMP"),
    ),
    (f"{GOOD} --mean-tokens 8 --texts nowhere.txt", ("--texts nowhere.txt cannot be read", "No such file")),
    (f"{GOOD} --mean-tokens 8 --texts {{bad}}/blank.txt", ("blank.txt holds no question",)),
    (f"{GOOD} --mean-tokens 8 --texts {{bad}}/latin.txt", ("latin.txt cannot be read", "UTF-8")),
    (
        "{silent} --data {pngs} --mean-tokens 6 --texts {bad}/one.txt",
        ("1 texts were given, and the router complexity reads no words",),
    ),
    ("{plain} --data {pngs} --mean-tokens 4", ("has no router", "export it with --router")),
    ("{tokens} --data {pngs} --mean-tokens 4", ("has no router",)),
    ("{fixed} --data {pngs} --mean-tokens 4", ("the router fixed, which has no thresholds", "--router difficulty")),
]


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad_images")
    for name, files in (("empty", ()), ("texts", ("a.txt", "b.csv")), ("broken", ("a.png", "b.jpg"))):
        (folder / name).mkdir()
        for file in files:
            (folder / name / file).write_bytes(b"neither")
    write_idx(folder / "idx")
    for file, content in (("blank.txt", b" \n\n"), ("latin.txt", b"caf\xe9?\n"), ("one.txt", b"Why?\n")):
        (folder / file).write_bytes(content)
    return folder


def make_fixed(raw: dict[str, Any]) -> None:
    """Turn a manifest into that of a bundle whose router is `fixed`, which has no graph."""
    raw["files"] = [entry for entry in raw["files"] if entry["role"] != "router"]
    raw["router"] |= {"name": "fixed", "graphs": [], "thresholds": [], "signals": [], "fixed": 8, "reads_words": False}


@pytest.mark.parametrize(("command", "texts"), TABLE, ids=[command for command, _ in TABLE])
def test_refused(
    command: str, texts: tuple[str, ...], cli: Cli, bundle: Path, pngs: Path, bad: Path, pruned: Path, exported: Path,
    exported_tokens: Path, edit_manifest: Edit, tmp_path: Path,
) -> None:  # fmt: skip
    fixed = tmp_path / "fixed"
    if "{fixed}" in command:
        shutil.copytree(bundle, fixed)
        (fixed / "router.onnx").unlink()
        edit_manifest(fixed, make_fixed)
    before = contents(bundle)
    words = {"bundle": bundle, "pngs": pngs, "bad": bad, "plain": exported, "tokens": exported_tokens, "fixed": fixed}
    words["silent"] = pruned
    said = cli("calibrate", *shlex.split(command.format(**words)))
    assert (said.code, said.out) == (2, ""), said.err
    assert said.err.startswith("error: ")
    assert 1 <= said.err.count("\n") <= 3
    for text in texts:
        assert text in said.err, f"{text!r} is not in {said.err!r}"
    assert contents(bundle) == before


def test_a_model_that_takes_no_image(bundle: Path, pngs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_bundle(bundle)
    blind = msgspec.structs.replace(opened, manifest=msgspec.structs.replace(opened.manifest, preprocess=None))
    monkeypatch.setattr(_calibrate, "open_bundle", lambda path: blind)
    with pytest.raises(InvalidSpec, match=r"takes image float32.*calibration has images; export it with a --backbone"):
        api.calibrate(bundle, pngs, mean_tokens=8)


def test_an_altered_bundle_is_not_calibrated(bundle: Path, pngs: Path) -> None:
    file = bundle / "router.onnx"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(EdgecompError, match=r"router\.onnx has \d+ bytes"):
        api.calibrate(bundle, pngs, mean_tokens=8)
