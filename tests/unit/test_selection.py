"""Choices against the original's, without a model: what is a tie, what is a wrong choice, and what is said of it."""

from __future__ import annotations

import numpy as np
import pytest

from edgecomp.errors import InvalidSpec
from edgecomp.parity import (
    Limits,
    ParityReport,
    SelectionParity,
    SelfTest,
    judge,
    judge_choices,
    question_runner,
    read_limits,
)
from edgecomp.parity.layers import LayerParity, find_culprits, judge_layer
from edgecomp.parity.selection import NOISE_FACTOR
from edgecomp.specs import TensorSpec, TokenBudget, Tolerance
from edgecomp.specs.choice import ChoiceNode
from edgecomp.specs.manifest import Bucket

TOLERANCE = Tolerance(max_rel=1e-4, min_cosine=0.999, derivation="made for these tests alone")
SCORES = np.array([[0.9, 0.1, 0.8, 0.5, 0.500001, 0.2, 0.7, 0.05]], np.float32)


def top_k(k=4, **given):
    shape = given.pop("indices", (1, k))
    return ChoiceNode(
        number=0, op="TopK", where="blocks.3", indices=shape, axis=-1, k=k, largest=True, **{"ordered": False, **given}
    )


def rank(scores):
    return np.argsort(-scores, axis=-1, kind="stable")


def judged(node, scores, got_scores, got=None, *, max_rel=1e-4):
    """Return the one row of a choice by the original's scores and by the runner's."""
    chosen = rank(got_scores)[:, : node.k] if got is None else np.asarray(got)
    outputs = {f"{node.name}.scores": got_scores, f"{node.name}.indices": chosen}
    original = {0: (scores, rank(scores).astype(np.int32))}
    (row,) = judge_choices("model.m4.b1.onnx", "photo", (node,), original, outputs, max_rel=max_rel)
    return row


def noisy(size, *, scores=SCORES, seed=0):
    return (scores + np.random.default_rng(seed).uniform(-size, size, scores.shape)).astype(np.float32)


# -- sets -------------------------------------------------------------------------------------------------------


def test_equal_scores_agree():
    row = judged(top_k(), SCORES, SCORES.copy())
    assert row
    assert row.verdict == "agree"
    assert row.agreement == 1.0
    assert row.flips == 0
    assert row.margin == pytest.approx(1e-6, rel=0.1)  # between 0.500001, which is kept, and 0.5
    assert row.worst is None
    assert row.where == "blocks.3"


def test_a_flip_inside_the_noise_is_a_tie():
    got = noisy(2e-6)
    got[0, 3], got[0, 4] = 0.500002, 0.499999
    row = judged(top_k(), SCORES, got)
    assert row
    assert row.verdict == "tie within noise"
    assert row.flips == 1
    assert row.agreement == pytest.approx(3 / 5)
    assert (row.worst.original, row.worst.got) == (4, 3)
    assert row.worst.margin <= row.noise
    assert row.is_close


def test_the_noise_is_what_was_measured_times_the_factor():
    got = SCORES.copy()
    got[0] += np.float32(1e-5)
    row = judged(top_k(), SCORES, got)
    assert row.noise == pytest.approx(NOISE_FACTOR * 1e-5, rel=0.02)
    assert judged(top_k(), SCORES, got, max_rel=1e-5).noise == pytest.approx(0.9e-5, rel=0.02)  # never more than that


def test_a_flip_outside_the_noise_fails_and_names_tokens_scores_and_margin():
    got = SCORES.copy()
    got[0, 1] = 0.6  # one wrong score among good ones
    row = judged(top_k(), SCORES, got)
    assert not row
    assert row.verdict == "FAIL"
    (text,) = row.failures
    for part in ("row 0: token 4 is dropped and 1 kept in its place", "0.5000", "0.60", "margin 0.4", "noise"):
        assert part in text, part


def test_one_wrong_score_does_not_excuse_itself_in_a_coarse_type():
    """Its own error is no part of what counts as noise: that is of the scores that most tokens have."""
    got = noisy(1e-6)
    got[0, 1] = 0.6
    row = judged(top_k(), SCORES, got, max_rel=1.0)
    assert not row
    assert row.noise < 1e-5


def test_wrong_scores_everywhere_do_not_excuse_a_flip():
    """Noise that is measured on wrong scores would explain every flip."""
    row = judged(top_k(), SCORES, np.zeros_like(SCORES))
    assert not row
    assert row.flips
    assert row.noise == pytest.approx(0.9e-4, rel=0.02)


def test_scores_that_are_off_are_said_where_no_token_went_another_way():
    got = SCORES.copy()
    got[0, 0] = 1.5
    row = judged(top_k(), SCORES, got)
    assert row
    assert row.verdict == "agree, scores off"
    assert row.score_error == pytest.approx(0.6)
    assert row.score_limit == pytest.approx(0.9e-4)


def test_a_wrong_choice_excuses_no_output():
    expected = np.zeros((1, 4), np.float32) + 1
    miss = judge("model.m4.b1.onnx", "photo", "x", 2 * expected, expected, TOLERANCE)
    tied, off = noisy(2e-6), SCORES.copy()
    tied[0, 3], tied[0, 4], off[0, 1] = 0.500002, 0.499999, 0.6

    def report(*rows):
        part = SelectionParity("model.m4.b1.onnx", (), rows)
        return ParityReport("b", "r", "", 1, "fp32", TOLERANCE, (miss,), selection=(part,))

    tie, wrong = judged(top_k(), SCORES, tied), judged(top_k(), SCORES, off)
    assert report(tie).close_call(miss) == tie
    assert report(tie)
    assert report(tie, wrong).close_call(miss) is None
    assert not report(tie, wrong)
    assert not report(judged(top_k(2), SCORES, SCORES.copy()))  # a clear call, and another output: no choice made it


def test_a_choice_that_does_not_follow_its_own_scores_fails():
    row = judged(top_k(), SCORES, SCORES.copy(), [[0, 2, 6, 3]])
    assert "row 0: 3 is chosen where 4 is due (it does not take the highest of its own scores)" in row.failures[0]


def test_of_equal_scores_the_lower_place_comes_first():
    scores = np.array([[1.0, 0.5, 0.5, 0.0]], np.float32)
    assert judged(top_k(2), scores, scores.copy(), [[0, 1]])
    row = judged(top_k(2), scores, scores.copy(), [[0, 2]])
    assert "2 is chosen where 1 is due (ties go to the lower place); 1 such places" in row.failures[0]


def test_scores_that_are_nan_fail():
    got = SCORES.copy()
    got[0, 1] = np.nan
    assert "1 of 8 scores are NaN" in judged(top_k(), SCORES, got, [[0, 2, 6, 4]]).failures[0]


def test_the_order_of_sources_that_merge_means_nothing():
    """Where a merge ranks all sources, the order of those that stay is that of the output's rows."""
    similarity = np.array([[[0.9, 0.1], [0.3, 0.8], [0.2, 0.1], [0.1, 0.6]]], np.float32)
    got = similarity.copy()
    got[0, 0, 0], got[0, 1, 1] = 0.8, 0.9
    assert merged(similarity, got, r=2, k=4).flips == 0
    got = similarity.copy()
    got[0, 2, 0], got[0, 3, 1] = 0.6, 0.2
    assert "token 6 is ranked where 8 was" in merged(similarity, got, r=2, k=4).failures[0]


def test_order_counts_where_nothing_sorts_it_afterwards():
    got = SCORES.copy()
    got[0, 0], got[0, 2] = 0.8, 0.9
    assert judged(top_k(), SCORES, got)
    row = judged(top_k(ordered=True), SCORES, got)
    assert not row
    assert row.agreement == 1.0
    assert "token 2 is ranked where 0 was" in row.failures[0]


def test_a_lower_score_may_be_the_better_one():
    node = ChoiceNode(number=0, op="TopK", where="", indices=(1, 2), axis=-1, k=2, largest=False, ordered=False)
    scores = np.array([[3.0, 1.0, 2.0, 5.0]], np.float32)
    outputs = {f"{node.name}.scores": scores, f"{node.name}.indices": np.array([[1, 2]])}
    (row,) = judge_choices("m", "photo", (node,), {0: (scores, np.array([[1, 2, 0, 3]]))}, outputs, max_rel=1e-4)
    assert row
    assert row.margin == pytest.approx(1.0)


# -- matches and merges -----------------------------------------------------------------------------------------


def best(batch=1, sources=2, **given):
    return ChoiceNode(
        number=1,
        op="ArgMax",
        where="blocks.3",
        indices=(batch, sources),
        axis=-1,
        k=1,
        largest=True,
        ordered=False,
        **given,
    )


def two_best(scores):
    index = rank(scores)[..., :2]
    return np.take_along_axis(scores, index, -1), index.astype(np.int32)


def test_a_match_is_compared_source_by_source():
    node = best()
    scores = np.array([[[0.9, 0.1, 0.2], [0.3, 0.7, 0.6]]], np.float32)
    got = scores.copy()
    got[0, 1, 2] = 0.75
    outputs = {f"{node.name}.scores": got, f"{node.name}.indices": got.argmax(-1)}
    (row,) = judge_choices("m", "photo", (node,), {1: two_best(scores)}, outputs, max_rel=1e-4)
    assert row.kind == "match"
    assert row.flips == 1
    assert row.agreement == pytest.approx(1 / 3)
    assert "token 1 goes to 2 and not to 1" in row.failures[0]


def merged(similarity, got, *, r=1, k=0, prefix=1):
    """Judge a merge of alternate tokens behind one class token: sources 2, 4, ..., targets 1, 3, ..."""
    sources = similarity.shape[1]
    nodes = (
        best(sources=sources, merge=0, partition="alternate", r=r, prefix=prefix),
        top_k(k or r, merge=0, partition="alternate", r=r, prefix=prefix),
    )
    original = {1: two_best(similarity), 0: (similarity.max(-1), rank(similarity.max(-1)).astype(np.int32))}
    outputs = {
        f"{nodes[0].name}.scores": got,
        f"{nodes[0].name}.indices": got.argmax(-1),
        f"{nodes[1].name}.scores": got.max(-1),
        f"{nodes[1].name}.indices": rank(got.max(-1))[:, : k or r],
    }
    (row,) = judge_choices("m", "photo", nodes, original, outputs, max_rel=1e-4)
    return row


SIMILARITY = np.array([[[0.9, 0.1], [0.3, 0.5], [0.2, 0.21]]], np.float32)


def test_a_merge_is_one_row_and_agrees_with_itself():
    row = merged(SIMILARITY, SIMILARITY.copy())
    assert row
    assert row.kind == "merge"
    assert row.agreement == 1.0


def test_where_a_token_that_does_not_merge_would_go_means_nothing():
    got = SIMILARITY.copy()
    got[0, 2, 0] = 0.4  # it now resembles the other target, and is still not among the best
    row = merged(SIMILARITY, got)
    assert row
    assert row.flips == 0


def test_a_source_that_goes_to_another_target_fails_by_its_place_among_all_tokens():
    got = SIMILARITY.copy()
    got[0, 0, 1] = 0.95
    row = merged(SIMILARITY, got)
    assert row.agreement == 0.0
    assert "token 2 goes to 3 and not to 1" in row.failures[0]


def test_another_source_that_merges_fails():
    got = SIMILARITY.copy()
    got[0, 1, 1] = 0.95
    assert "token 2 is dropped and 4 kept in its place" in merged(SIMILARITY, got).failures[0]


# -- thresholds of the user -------------------------------------------------------------------------------------


def test_thresholds_by_name_and_for_all_others():
    limits = read_limits(atol=["merged:1e-3", 1e-5], rtol=["merged:0.1"])
    assert limits.of("merged") == (1e-3, 0.1)
    assert limits.of("size") == (1e-5, 0.0)
    assert read_limits(atol=["merged:1"]).of("size") is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["merged:x"], "--atol merged:x: give a number"),
        ([":1e-3"], "--atol :1e-3: give a number"),
        (["-1"], "--atol -1: give a number that is not negative"),
        (["nan"], "--atol nan: give a number"),
        (["a:1", "a:2"], "--atol is given twice for the output 'a': 1 and 2"),
        (["1", "2"], "--atol is given twice for all outputs: 1 and 2"),
    ],
)
def test_thresholds_that_mean_nothing_are_refused(given, message):
    with pytest.raises(InvalidSpec) as error:
        read_limits(atol=given)
    assert message in str(error.value)


def test_a_threshold_for_no_output_is_refused():
    with pytest.raises(InvalidSpec, match=r"--rtol names the output 'logit'; the bundle's are kept, logits"):
        read_limits(rtol=["logit:1"]).require_known(["logits", "kept"])


def test_given_thresholds_replace_the_recipes():
    expected = np.array([[1.0, 2.0, 4.0]], np.float32)
    got = np.array([[1.0, 2.1, 4.3]], np.float32)
    assert not judge("m", "photo", "x", got, expected, TOLERANCE)
    assert judge("m", "photo", "x", got, expected, TOLERANCE, Limits(atol={"": 0.31}))
    assert judge("m", "photo", "x", got, expected, TOLERANCE, Limits(atol={"x": 0.01}, rtol={"x": 0.08}))
    row = judge("m", "photo", "x", got, expected, TOLERANCE, Limits(atol={"x": 0.2}))
    assert row.failures == ("1 of 3 values are not within atol 0.2 + rtol 0, most at [0, 2]: got 4.3, expected 4",)
    bad = np.array([[np.nan, 2.0, 4.0]], np.float32)
    for limits in (Limits(atol={"": 9.0}), Limits(rtol={"": 1e30})):
        for one, other in ((bad, expected), (expected, bad), (bad, bad)):
            failures = judge("m", "photo", "x", one, other, TOLERANCE, limits).failures
            assert "NaN" in failures[0]
            assert "1 of 3 values are not within" in failures[-1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("limits", [Limits(), Limits(atol={"": 0.1}), Limits(rtol={"x": 9.0}), Limits(atol={"x": 1e9})])
@pytest.mark.parametrize("side", ["got", "expected"])
def test_what_is_no_number_fails_on_either_side(bad, limits, side):
    arrays = {name: np.ones((1, 4), np.float32) for name in ("got", "expected")}
    assert judge("m", "photo", "x", arrays["got"], arrays["expected"], TOLERANCE, limits)
    arrays[side][0, 2] = bad
    row = judge("m", "photo", "x", arrays["got"], arrays["expected"], TOLERANCE, limits)
    assert row.failures[0] == f"1 of 4 {'expected ' if side == 'expected' else ''}values are NaN or Inf"


def test_counts_are_equal_or_wrong_in_any_precision():
    """A count that is off by one is within the tolerance of fp8, a third of the largest, and is no rounding."""
    fp8 = Tolerance(max_rel=0.35, min_cosine=0.9, derivation="of three bits of mantissa")
    expected, got = (np.array([sizes], np.float32)[..., None] for sizes in ([1, 2, 2, 4], [1, 1, 3, 4]))
    assert judge("m", "photo", "size", got, expected, fp8)
    row = judge("m", "photo", "size", got, expected, fp8, is_count=True)
    assert row.failures == ("2 of 4 counts differ, most at [0, 1, 0]: got 1, expected 2",)
    assert judge("m", "photo", "size", expected.copy(), expected, fp8, is_count=True)
    assert not judge("m", "photo", "size", expected + np.float32(1e-3), expected, fp8, is_count=True)
    assert not judge("m", "photo", "size", np.full_like(expected, np.nan), expected, fp8, is_count=True)
    loose, named = Limits(atol={"": 9.0}), Limits(atol={"size": 1.0})
    assert not judge("m", "photo", "size", got, expected, fp8, loose, is_count=True), "what is said of all is not of it"
    assert judge("m", "photo", "size", got, expected, fp8, named, is_count=True)


# -- a runner against itself ------------------------------------------------------------------------------------


class Wobbly:
    """Doubles its input; may answer later rows, or later runs, otherwise."""

    name = version = "wobbly"

    def __init__(self, *, row=0.0, run=0.0):
        self.row, self.run, self.runs = row, run, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def infer(self, inputs):
        x = inputs["x"]
        answer = 2 * x + self.row * np.arange(len(x), dtype=np.float32)[:, None] + self.run * self.runs
        self.runs += 1
        return {"y": answer.astype(np.float32)}


def questions(runner, *, batch=2, threads=()):
    budget = TokenBudget(4, 2)
    specs = TensorSpec("x", (batch, 4), "float32", "features"), TensorSpec("y", (batch, 4), "float32", "features")
    bucket = Bucket("model.m2.onnx", batch, specs[:1], specs[1:], 0, {}, budget=budget)
    goldens = {"input.photo.x": np.ones((batch, 4), np.float32)}
    opened = {count: (lambda other=other: other) for count, other in threads}
    rows: tuple[SelfTest, ...] = question_runner(runner, bucket, goldens, TOLERANCE, with_threads=opened)
    return {row.test: row for row in rows}


def test_a_steady_runner_agrees_with_itself():
    rows = questions(Wobbly(), threads=[(1, Wobbly()), (4, Wobbly())])
    assert all(rows.values())
    assert rows["threads"].detail == "1 against 4 threads: every bit the same"


def test_rows_that_are_alike_must_be_answered_alike():
    row = questions(Wobbly(row=0.5))["duplicate rows"]
    assert not row
    assert "y: max rel error 0.25" in row.failures[0]


def test_a_repeated_run_says_how_far_it_is():
    row = questions(Wobbly(run=1e-5))["repeated run"]
    assert row
    assert "max rel" in row.detail
    assert "apart" in row.detail
    assert not questions(Wobbly(run=1.0))["repeated run"]


def test_another_number_of_threads_may_not_change_the_answer():
    row = questions(Wobbly(), threads=[(1, Wobbly()), (4, Wobbly(row=0.5))])["threads"]
    assert not row


def test_what_cannot_be_asked_is_said():
    rows = questions(Wobbly(), batch=1)
    assert rows["duplicate rows"].is_not_shown
    assert "the batch is 1" in rows["duplicate rows"].detail
    assert "wobbly has no number of threads" in rows["threads"].detail


# -- module by module -------------------------------------------------------------------------------------------


def layer(module, read, local, error):
    return LayerParity("m", "photo", module, input_error=read, error=error, local=local, cosine=1.0)


def test_the_first_module_that_makes_an_error_is_named_and_those_that_hand_it_on_are_not():
    rows = [layer("a", 0, 1e-7, 1e-7), layer("b", 1e-7, 0.01, 0.01), layer("c", 0.01, 1e-7, 0.02)]
    (culprit,) = find_culprits(rows, limit=1e-4)
    assert str(culprit) == "m, photo: the error begins in b: 0.01 is made there, 1e-07 is read, 0.0001 allowed"


def test_an_error_between_two_modules_is_named_by_both():
    rows = [layer("a", 0, 1e-7, 1e-7), layer("b", 0.01, 1e-7, 0.01)]
    (culprit,) = find_culprits(rows, limit=1e-4)
    assert "begins between a and b: 0.01" in str(culprit)


def test_rounding_that_adds_up_has_no_culprit():
    assert not find_culprits([layer(str(n), n * 2e-5, 2e-5, (n + 1) * 2e-5) for n in range(20)], limit=1e-4)


def test_a_module_is_judged_by_what_it_makes_of_its_own_input():
    x = np.ones((1, 4), np.float32)
    row = judge_layer("m", "photo", "a", read=2 * x, gave=4 * x, explained=4 * x, original=(x, 2 * x))
    assert (row.input_error, row.local, row.error, row.cosine) == (1.0, 0.0, 1.0, 1.0)
