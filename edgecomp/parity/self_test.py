"""What a runner must agree with: itself. No golden is needed for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from edgecomp.parity.check import SelfTest, counts_of, inputs_of, judge
from edgecomp.runners import Runner
from edgecomp.specs import Tolerance
from edgecomp.specs.manifest import Bucket

__all__ = ["question_runner"]

Array = npt.NDArray[np.generic]
_CASE = "photo"


def question_runner(
    runner: Runner,
    bucket: Bucket,
    goldens: Mapping[str, Array],
    tolerance: Tolerance,
    *,
    with_threads: Mapping[int, Callable[[], Runner]],
) -> tuple[SelfTest, ...]:
    """Ask a runner three questions on the photograph.

    Duplicate rows: are rows of a batch that are alike answered alike? Repeated run: does the same input get the same
    answer again? Threads: does their number matter? Bits may differ, and it is said how far; they may not differ by
    more than the precision's tolerance.

    Args:
        with_threads: opens the same graph with a number of threads; empty where the runner has none.
    """
    inputs = inputs_of(bucket, goldens, _CASE)
    first = runner.infer(inputs)
    rows = [_duplicates(runner, bucket, inputs, tolerance)]
    rows.append(_compare(bucket, "repeated run", "the same input twice", runner.infer(inputs), first, tolerance))
    if not with_threads:
        why = f"not shown: {runner.name} has no number of threads"
        rows.append(SelfTest(bucket.model, "threads", why, is_not_shown=True))
        return tuple(rows)
    outputs = {}
    for count, opened in with_threads.items():
        with opened() as other:
            outputs[count] = other.infer(inputs)
    one, *others = outputs
    for count in others:
        what = f"{one} against {count} threads"
        rows.append(_compare(bucket, "threads", what, outputs[count], outputs[one], tolerance))
    return tuple(rows)


def _duplicates(runner: Runner, bucket: Bucket, inputs: Mapping[str, Array], tolerance: Tolerance) -> SelfTest:
    if bucket.batch == 1:
        why = "not shown: the batch is 1; export with --batch 2 as well"
        return SelfTest(bucket.model, "duplicate rows", why, is_not_shown=True)
    outputs = runner.infer({name: np.repeat(array[:1], bucket.batch, axis=0) for name, array in inputs.items()})
    alike = {name: np.repeat(array[:1], len(array), axis=0) for name, array in outputs.items()}
    return _compare(bucket, "duplicate rows", f"{bucket.batch} rows that are alike", outputs, alike, tolerance)


def _compare(
    bucket: Bucket, test: str, what: str, got: Mapping[str, Array], expected: Mapping[str, Array], tolerance: Tolerance
) -> SelfTest:
    counts = counts_of(bucket)
    rows = [
        judge(bucket.model, _CASE, name, got[name], expected[name], tolerance, is_count=name in counts)
        for name in expected
    ]
    same = all(np.array_equal(got[name], expected[name]) for name in expected)
    far = max(row.difference.max_rel for row in rows)
    detail = f"{what}: " + ("every bit the same" if same else f"max rel {far:.2e} apart")
    failures = tuple(f"{row.output}: {failure}" for row in rows for failure in row.failures)
    return SelfTest(bucket.model, test, detail, failures)
