"""Accuracy and speed of several graphs on the same images, batch by batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from edgecomp.errors import RunError
from edgecomp.evaluation.data import LabelledImages, Labels
from edgecomp.images import PixelType, to_pixels
from edgecomp.profiles.statistics import Estimate, median_interval, paired_drop, wilson
from edgecomp.runners import Array, Runner
from edgecomp.specs import Preprocess

__all__ = ["Comparison", "Evaluation", "GraphScore", "Pace", "score"]

_WARM_UP_RUNS = 3
_TOP = 5

Pace = Literal["faster", "slower", "no difference"]


class Comparison(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A bucket beside the plain model, on the same images.

    Attributes:
        drop: accuracy (top-1) of the plain model minus the bucket's; paired, see `paired_drop`.
        lost: images that the plain model gets right and the bucket wrong.
        gained: the other way round.
        agreement: share of images to which both give the same class, right or wrong.
        time_ratio: the bucket's time over the plain model's, the median over batches; below 1 the bucket is faster.
        pace: whether the interval of the ratio lies below 1, above it, or holds it.
    """

    drop: Estimate
    lost: int
    gained: int
    agreement: Estimate
    time_ratio: Estimate
    pace: Pace


class GraphScore(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One graph on all images.

    Attributes:
        right: images whose class is the one with the highest logit.
        top1, top5: shares of images whose class is the first, or among the first five; `top5` is None with five
            classes or fewer, where it says nothing. Of equal logits the lower class comes first.
        not_finite: images for which a logit was NaN or Inf; they count as wrong, and agree with nothing.
        ms_per_image: the median over batches of a run's time over the batch size.
        run_ms: time of each run, in the order of the batches.
        against_plain: None for the plain model, and where there is none.
    """

    model: str
    right: int
    top1: Estimate
    top5: Estimate | None
    not_finite: int
    ms_per_image: Estimate
    run_ms: tuple[float, ...]
    against_plain: Comparison | None


class Evaluation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `score` found; the plain model comes first where there is one."""

    images: int
    batch: int
    num_classes: int
    scores: tuple[GraphScore, ...]


class _Tally:
    """What is gathered of one graph."""

    def __init__(self, total: int) -> None:
        self.predicted = np.full(total, -1, np.int64)
        self.in_top = np.zeros(total, bool)
        self.run_ms: list[float] = []
        self.not_finite = 0


def score(
    runners: Mapping[str, Runner],
    *,
    plain: str,
    data: LabelledImages,
    indices: npt.NDArray[np.int64],
    preprocess: Preprocess,
    input_name: str,
    dtype: PixelType,
    output_name: str,
    batch: int,
    num_classes: int,
    progress: Callable[[str], None] = lambda line: None,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> Evaluation:
    """Run every graph on every image, and compare each with the plain one.

    **Speed.** The graphs take turns on each batch of the same images, and another begins each time, so that the
    machine's drift meets all alike. Each is run 3 times before the first that counts. Only the run itself is timed:
    reading and preparing images is not, since a camera has its own way to do that.

    **The last batch** is filled up with its last image. What the filling gives is not counted; its time is that of a
    whole batch, and is taken for one.

    Args:
        runners: open graphs of one batch size, by name.
        plain: which of them the others are compared with; "" for none.
        data: the images.
        indices: which of them, in this order.
        preprocess, dtype: how an image becomes the input `input_name`.
        output_name: the logits (B, num_classes).
        progress: takes a line about ten times a second.
        clock: nanoseconds that only grow.

    Raises:
        RunError: a label that the graphs have no class for; an image that cannot be read; logits of another shape.
    """
    labels = data.labels[indices]
    require_labels(data, num_classes)
    tallies = {name: _Tally(len(indices)) for name in runners}
    names, told, started = list(runners), time.monotonic(), time.monotonic()
    for turn, first in enumerate(range(0, len(indices), batch)):
        members = indices[first : first + batch]
        inputs = {input_name: _make_batch(data, members, preprocess, dtype, batch)}
        if not turn:
            for runner in runners.values():
                for _ in range(_WARM_UP_RUNS):
                    runner.infer(inputs)
        begin = turn % len(names)
        for name in (*names[begin:], *names[:begin]):
            before = clock()
            outputs = runners[name].infer(inputs)
            tallies[name].run_ms.append((clock() - before) / 1e6)
            logits = _find_logits(name, outputs, output_name, (batch, num_classes))[: len(members)]
            _count(tallies[name], slice(first, first + len(members)), logits, labels)
        if time.monotonic() - told > 0.1:
            told = time.monotonic()
            progress(_how_far(first + len(members), len(indices), told - started))
    order = [plain, *(name for name in names if name != plain)] if plain else names
    rows = tuple(_score_of(name, tallies, plain, labels, batch, num_classes) for name in order)
    return Evaluation(len(indices), batch, num_classes, rows)


def require_labels(data: LabelledImages, num_classes: int) -> None:
    """Refuse labels that the model has no class for."""
    above = np.flatnonzero(data.labels >= num_classes)
    if above.size:
        label = int(data.labels[above[0]])
        named = f" ({data.classes[label]!r})" if label < len(data.classes) else ""
        raise RunError(
            f"data {data.path}: image {int(above[0])} has the label {label}{named}, and the model has {num_classes} "
            f"classes, 0 to {num_classes - 1}; {above.size} of {len(data.labels)} labels are too high. Give the data "
            f"that the model was trained for, or the order of its classes in {data.path / 'classes.txt'}"
        )


def _make_batch(
    data: LabelledImages, members: Sequence[int] | npt.NDArray[np.int64], preprocess: Preprocess, dtype: PixelType,
    batch: int,
) -> Array:  # fmt: skip
    pixels = [to_pixels(data.image(int(index)), preprocess, dtype) for index in members]
    pixels += pixels[-1:] * (batch - len(pixels))
    return np.concatenate(pixels)


def _find_logits(model: str, outputs: Mapping[str, Array], name: str, shape: tuple[int, int]) -> Array:
    if name not in outputs or outputs[name].shape != shape:
        found = ", ".join(f"{key} {list(value.shape)}" for key, value in outputs.items())
        raise RunError(f"{model} gave {found}, expected {name} {list(shape)}; export the bundle again")
    return outputs[name]


def _count(tally: _Tally, place: slice, logits: Array, labels: Labels) -> None:
    scores, expected = logits.astype(np.float64), labels[place]
    finite = np.isfinite(scores).all(axis=1)
    scores[~finite] = 0.0
    own = np.take_along_axis(scores, expected[:, None], axis=1)
    is_before = np.arange(scores.shape[1])[None] < expected[:, None]
    ahead = ((scores > own) | ((scores == own) & is_before)).sum(axis=1)
    tally.predicted[place] = np.where(finite, scores.argmax(axis=1), -1)
    tally.in_top[place] = finite & (ahead < _TOP)
    tally.not_finite += int((~finite).sum())


def _score_of(
    name: str, tallies: Mapping[str, _Tally], plain: str, labels: Labels, batch: int, num_classes: int
) -> GraphScore:
    tally, total = tallies[name], len(labels)
    is_right = tally.predicted == labels
    return GraphScore(
        model=name,
        right=int(is_right.sum()),
        top1=wilson(int(is_right.sum()), total),
        top5=wilson(int(tally.in_top.sum()), total) if num_classes > _TOP else None,
        not_finite=tally.not_finite,
        ms_per_image=median_interval([ms / batch for ms in tally.run_ms]),
        run_ms=tuple(tally.run_ms),
        against_plain=_compare(tally, tallies[plain], labels) if plain and name != plain else None,
    )


def _compare(tally: _Tally, plain: _Tally, labels: Labels) -> Comparison:
    is_right, was_right = tally.predicted == labels, plain.predicted == labels
    lost, gained = int((was_right & ~is_right).sum()), int((is_right & ~was_right).sum())
    agree = int(((tally.predicted == plain.predicted) & (tally.predicted >= 0)).sum())
    ratio = median_interval([own / max(base, 1e-6) for own, base in zip(tally.run_ms, plain.run_ms, strict=True)])
    pace: Pace = "faster" if ratio.high < 1 else "slower" if ratio.low > 1 else "no difference"
    if len(tally.run_ms) < 6:  # so few carry no interval
        pace = "no difference"
    return Comparison(
        drop=paired_drop(lost, gained, len(labels)),
        lost=lost,
        gained=gained,
        agreement=wilson(agree, len(labels)),
        time_ratio=ratio,
        pace=pace,
    )


def _how_far(done: int, total: int, seconds: float) -> str:
    left = seconds / done * (total - done)
    return f"{done:,} of {total:,} images, about {left:.0f} s left"
