"""`edgecomp calibrate`: a router's thresholds from real images."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from edgecomp.api._progress import Progress, silent
from edgecomp.bundle import golden_key, open_bundle, replace_manifest
from edgecomp.errors import InvalidSpec
from edgecomp.evaluation import Images, open_images
from edgecomp.evaluation.thresholds import Needs, Places, assign, choose
from edgecomp.images import PixelType
from edgecomp.lock import bundle_lock
from edgecomp.parity import read_goldens
from edgecomp.report.calibrate import BucketUse, CalibrationReport
from edgecomp.runners import Array, require_threads
from edgecomp.serving import Answer, Model
from edgecomp.serving.parts import image_pixels
from edgecomp.specs import TensorSpec
from edgecomp.specs.manifest import Calibration, Manifest, RouterRecord

__all__ = ["calibrate"]


def calibrate(
    bundle: str | Path,
    data: str | Path,
    *,
    mean_tokens: float | None = None,
    latency_target_ms: float | None = None,
    keep_agreement: float | None = None,
    texts: Sequence[str] = (),
    split: str = "",
    limit: int | None = 256,
    seed: int = 0,
    runner: str = "onnxruntime",
    threads: int = 0,
    progress: Progress = silent,
) -> CalibrationReport:
    """Set a router's thresholds so that a target holds on given images, and write them into the manifest.

    Every image runs through the router and through every bucket, in turn. Then one of many sets of thresholds is
    chosen (`evaluation.thresholds.candidates`): with the most tokens for the first two targets, else with the fewest.

    Args:
        bundle: the folder; exported with --router.
        data: a folder of images, in any folders below it, or of IDX files.
        mean_tokens: tokens kept by a request, on average at most.
        latency_target_ms: milliseconds of a routed request at batch 1 on this machine, on average at most.
        keep_agreement: share from 0 to 1 of images on which the routed bucket agrees with the largest one, at least:
            the same class where the bundle gives logits, else the mean cosine of the mean token.
        texts: questions, taken in turn with the images, for a router that reads words; none: all images come without.
        split: of IDX files, `test` or `train`.
        limit: so many images, chosen at random; None: all.
        seed: of that choice.
        runner, threads: as in `parity`.
        progress: takes a line now and then.

    Raises:
        InvalidSpec: the bundle has no router with thresholds, or not exactly one target was given, or no thresholds
            reach it; the text says what can be reached. RunError: the data is absent or no image can be read.
    """
    require_threads(threads)
    target, limit_of = _read_target(mean_tokens, latency_target_ms, keep_agreement)
    if limit is not None and limit < 1:
        raise InvalidSpec(f"limit {limit} is below 1; leave it out for 256 images")
    with bundle_lock(Path(bundle), "calibrate", say=progress):
        opened = open_bundle(Path(bundle))
        manifest, record = opened.manifest, opened.manifest.router
        if record is None or not record.thresholds:
            what = "no router" if record is None else f"the router {record.name}, which has no thresholds"
            raise InvalidSpec(f"bundle {bundle} has {what}; export it with --router, for example --router difficulty")
        first, *others = manifest.buckets[0].inputs
        if first.kind != "image" or manifest.preprocess is None:
            raise InvalidSpec(
                f"bundle {bundle} takes {', '.join(map(str, manifest.buckets[0].inputs))}, and calibration has images; "
                "export it with a --backbone"
            )
        if texts and not record.reads_words:
            raise InvalidSpec(f"{len(texts)} texts were given, and the router {record.name} reads no words; drop them")
        goldens = read_goldens(opened.path) if others else {}
        features = {spec.name: goldens[golden_key("input", "seeded", spec.name)][:1] for spec in others}
        progress("reading the data")
        images = open_images(data, split=split, limit=limit, seed=seed)
        with Model(opened, runner=runner, threads=threads, resident=None) as model:
            ask = partial(_timed, model, features=features or None)
            seen = _observe(model, images, ask, texts, dtype=first.dtype, progress=progress)
            version = model.runner_version
        buckets = model.buckets

        def mean_ms(places: Places) -> float:
            return float(seen.ms[places].mean()) + seen.router_ms

        def agreement(places: Places) -> float:
            return float(seen.agreement[np.arange(len(places)), places].mean())

        tokens = np.asarray(buckets)
        if mean_tokens is not None:
            if mean_tokens > buckets[-1]:
                raise InvalidSpec(
                    f"mean tokens {mean_tokens:g} is above {buckets[-1]}, what the largest bucket keeps; no thresholds "
                    f"reach it. Give {buckets[0]} to {buckets[-1]}"
                )
            found = choose(seen.needs, lambda places: float(tokens[places].mean()) <= mean_tokens, most=True)
            reach = f"the least is {buckets[0]}, the smallest bucket for all"
        elif latency_target_ms is not None:
            found = choose(seen.needs, lambda places: mean_ms(places) <= latency_target_ms, most=True)
            least = float(seen.ms.min()) + seen.router_ms
            reach = f"the least is {least:.3f} ms, with the router ({seen.router_ms:.3f} ms)"
        else:
            found = choose(seen.needs, lambda places: agreement(places) >= limit_of, most=False)
            reach = "the largest bucket for all reaches 1"
        if found is None:
            raise InvalidSpec(
                f"no thresholds reach {target} on these {len(seen.needs)} images: {reach}; nothing was written"
            )
        places = assign(seen.needs, found)
        made = Calibration(
            target=target,
            data=Path(data).resolve().name,
            sha256=seen.sha256,
            images=len(seen.needs),
            mean_tokens=float(tokens[places].mean()),
            agreement=agreement(places),
            agreement_of=seen.agreement_of,
        )
        updated = msgspec.structs.replace(record, thresholds=found, calibration=made)
        replace_manifest(opened, msgspec.structs.replace(manifest, router=updated))
        return CalibrationReport(
            bundle=str(bundle),
            router=updated,
            before=record.thresholds,
            buckets=_uses(record, seen, buckets, places),
            router_ms=seen.router_ms,
            mean_ms=mean_ms(places),
            runner=version,
            threads=threads,
            batch=min(bucket.batch for bucket in manifest.buckets),
            notes=(*images.notes, *_notes(manifest, record, texts, others)),
        )


def _read_target(
    mean_tokens: float | None, latency_target_ms: float | None, keep_agreement: float | None
) -> tuple[str, float]:
    """Return the one target in words, and its number."""
    named = {
        "mean tokens": (mean_tokens, 1.0, float(1 << 20)),
        "latency target in ms": (latency_target_ms, 0.0, 3.6e6),
        "agreement": (keep_agreement, 0.0, 1.0),
    }
    given = [(name, *one) for name, one in named.items() if one[0] is not None]
    if len(given) != 1:
        raise InvalidSpec(
            f"{len(given)} targets were given; give exactly one of --mean-tokens, --latency-target, --keep-agreement"
        )
    name, value, low, high = given[0]
    assert value is not None
    if not low <= value <= high or value == 0:
        least = f"at least {low:.0f}" if low else "above 0"
        raise InvalidSpec(f"{name} {value} is not {least} and at most {high:.0f}; give another")
    return f"{name} {value:.10g}", value


class _Seen(msgspec.Struct, frozen=True):
    """What was observed of all images: (I, K - 1) needs, (K,) ms, (I, K) agreement with the largest bucket."""

    needs: Needs
    ms: npt.NDArray[np.float64]
    agreement: npt.NDArray[np.float64]
    agreement_of: str
    router_ms: float
    sha256: str


def _notes(manifest: Manifest, record: RouterRecord, texts: Sequence[str], others: Sequence[TensorSpec]) -> list[str]:
    """Return what a reader of the figures must know."""
    notes = [_AFTER] if manifest.placement == "after" else []
    counts = any(spec.name == "count" for spec in manifest.buckets[0].outputs)
    if counts and len({bucket.outputs[0].shape[1] for bucket in manifest.buckets}) > 1:
        notes.append("tokens kept are the rows of a bucket; `count` says how many of them an image fills")
    if record.reads_words and not texts:
        notes.append(
            f"router {record.name} reads words, and the images came without: a question sends a request higher"
        )
    if others:
        named = ", ".join(spec.name for spec in others)
        notes.append(f"{named}: the same for all images, those of the bundle's golden inputs")
    return notes


def _observe(
    model: Model,
    images: Images,
    ask: Callable[..., tuple[Answer, float]],
    texts: Sequence[str],
    *,
    dtype: str,
    progress: Progress,
) -> _Seen:
    """Run router and buckets on all images, in turn, and time them."""
    buckets, digest, needs = model.buckets, hashlib.sha256(), []
    outputs: list[list[Array]] = []
    direct: dict[int, list[float]] = {tokens: [] for tokens in buckets}
    told = time.monotonic()
    pixels: PixelType = "uint8" if dtype == "uint8" else "float32"
    first = image_pixels(model.bundle, images.image(images.indices[0]), pixels)
    for _ in range(_WARM_UP):  # graphs are loaded by the first request that needs them
        for wanted in (None, *buckets):
            ask(first[0], None, wanted)
    model.reset_stats()
    for count in range(len(images.indices)):
        image = image_pixels(model.bundle, images.image(images.indices[count]), pixels)
        digest.update(np.ascontiguousarray(image).data)
        rows: list[Array] = []
        text = texts[count % len(texts)] if texts else None
        digest.update((text or "").encode())
        answer, _ = ask(image[0], text, None)
        needs.append(answer.need)
        for tokens in buckets:
            answer, took = ask(image[0], None, tokens)
            direct[tokens].append(took)
            rows.append(next(iter(answer.outputs.values()))[0])
        outputs.append(rows)
        if time.monotonic() - told > 0.5:
            told = time.monotonic()
            progress(f"image {count + 1} of {len(images.indices)}")
    is_logits = model.bundle.manifest.output == "logits"
    return _Seen(
        needs=np.asarray(needs, np.float32),
        ms=np.asarray([1000 * float(np.median(direct[tokens])) for tokens in buckets]),
        agreement=np.asarray([_agreement(rows, is_logits=is_logits) for rows in outputs]),
        agreement_of="the class" if is_logits else "the mean token (cosine)",
        router_ms=1000 * _router_seconds(model),
        sha256=digest.hexdigest(),
    )


_WARM_UP = 3
_AFTER = "all buckets run the whole encoder: what fewer tokens save is in the model that reads them, not in these times"


def _timed(
    model: Model, image: Array, text: str | None, budget: int | None, *, features: dict[str, Array] | None
) -> tuple[Answer, float]:
    started = time.perf_counter()
    answer = model(image, text, budget, features=features)
    return answer, time.perf_counter() - started


def _router_seconds(model: Model) -> float:
    """Return the median of what the router itself took for the requests since the warm-up."""
    return model.stats().router_seconds["0.5"]


def _agreement(rows: Sequence[Array], *, is_logits: bool) -> list[float]:
    """Return how each bucket's output agrees with the last one's."""
    if is_logits:
        return [float(row.argmax() == rows[-1].argmax()) for row in rows]
    means = [row.astype(np.float64).reshape(-1, row.shape[-1]).mean(0) for row in rows]
    last = means[-1]
    cosines = [float(mean @ last / max(np.linalg.norm(mean) * np.linalg.norm(last), 1e-30)) for mean in means]
    return [*(min(1.0, cosine) for cosine in cosines[:-1]), 1.0]  # the last agrees with itself, whatever rounding says


def _uses(record: RouterRecord, seen: _Seen, buckets: Sequence[int], places: Places) -> tuple[BucketUse, ...]:
    before = assign(seen.needs, record.thresholds)
    return tuple(
        BucketUse(
            tokens=tokens,
            before=int((before == place).sum()),
            after=int((places == place).sum()),
            ms=float(seen.ms[place]),
            agreement=float(seen.agreement[:, place].mean()),
        )
        for place, tokens in enumerate(buckets)
    )
