"""The logic of a search: which budgets are looked at, the front, the limits, the journal; nothing is run here."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from edgecomp.errors import EdgecompError, InvalidSpec, RunError
from edgecomp.search.front import dominators, front
from edgecomp.search.limits import judge
from edgecomp.search.plan import Seen, best, coarse, is_monotone, next_budgets
from edgecomp.search.result import Agreement, Figure, Limits, Measured, SearchResult, read_search
from edgecomp.search.space import Family, Subject, budgets_of, name_of, precisions_of, schedules_of
from edgecomp.search.state import Exported, Journal, Judged, Refused, Timed, flat
from edgecomp.specs import BudgetRule

COUNTS = tuple(range(16, 197, 16))  # the 12 budgets of a ViT-S


def walk(
    counts: tuple[int, ...],
    of: Callable[[int], Seen],
    *,
    least: float = 0.0,
    noise: float = 0.05,
    width: int = 2,
    ties: bool = True,
) -> tuple[int | None, dict[int, Seen]]:
    """Search, and return the winner with all that was looked at."""
    seen: dict[int, Seen] = {}
    for _ in range(len(counts) + 1):
        step = next_budgets(counts, seen, min_agreement=least, noise=noise, width=width, ties=ties)
        if not step.budgets:
            assert set(seen) | set(step.skipped) == set(counts), "each is looked at, or left out by a rule"
            return best(seen, min_agreement=least), seen
        assert not set(step.budgets) & set(seen), "nothing is measured twice"
        seen |= {count: of(count) for count in step.budgets}
    raise AssertionError("it does not end")


def exhaustive(counts: tuple[int, ...], of: Callable[[int], Seen], least: float = 0.0) -> int | None:
    return best({count: of(count) for count in counts}, min_agreement=least)


def growing(rng: random.Random, size: int) -> list[float]:
    """Numbers that do not fall, some of them equal."""
    total, found = rng.uniform(5, 30), []
    for _ in range(size):
        found.append(total)
        total += rng.choice([0.0, rng.uniform(0.01, 6)])
    return found


@pytest.mark.parametrize("least", [0.0, 0.9])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_on_monotone_data_it_finds_what_an_exhaustive_search_finds(least: float, width: int) -> None:
    rng = random.Random(7)
    for _ in range(300):
        size = rng.randint(1, 14)
        counts = tuple(sorted(rng.sample(range(1, 200), size)))
        ms, agreement = growing(rng, size), sorted(rng.uniform(0.5, 1) for _ in counts)
        limit = rng.uniform(3, 60)
        data = {c: Seen(t / limit, a, t) for c, t, a in zip(counts, ms, agreement, strict=True)}
        found, _ = walk(counts, data.__getitem__, least=least, width=width)
        assert found == exhaustive(counts, data.__getitem__, least)


def test_on_noisy_monotone_data_it_finds_what_an_exhaustive_search_finds() -> None:
    rng = random.Random(8)
    noise, factor = 0.1, 1.1 / 0.9
    for _ in range(500):
        size = rng.randint(1, 14)
        counts = tuple(range(8, 8 * size + 1, 8))
        ms = [t * rng.uniform(1 - noise, 1 + noise) for t in growing(rng, size)]
        agreement = sorted(rng.choice([0.7, 0.8, 0.9, 0.95, 1.0]) for _ in counts)  # many are equal
        limit = rng.uniform(5, 60)
        data = {c: Seen(t / limit, a, t) for c, t, a in zip(counts, ms, agreement, strict=True)}
        found, _ = walk(counts, data.__getitem__, noise=noise)
        right = exhaustive(counts, data.__getitem__)
        assert (found is None) == (right is None)
        if found is not None and right is not None:
            assert data[found].agreement == data[right].agreement
            assert data[found].latency_us <= data[right].latency_us * factor


def test_where_agreement_wavers_it_is_no_worse_than_twice_that() -> None:
    rng = random.Random(9)
    waver = 0.02
    for _ in range(300):
        ms = growing(rng, len(COUNTS))
        truth = sorted(rng.uniform(0.5, 0.95) for _ in COUNTS)
        limit = rng.uniform(5, 60)
        data = {
            c: Seen(t / limit, a + rng.uniform(-waver, waver), t) for c, t, a in zip(COUNTS, ms, truth, strict=True)
        }
        found, right = walk(COUNTS, data.__getitem__)[0], exhaustive(COUNTS, data.__getitem__)
        assert (found is None) == (right is None)
        if found is not None and right is not None:
            assert (data[found].agreement or 0) >= (data[right].agreement or 0) - 2 * waver


def test_where_latency_is_not_monotone_the_winner_meets_the_limit_and_it_is_said() -> None:
    rng = random.Random(10)
    said = 0
    for _ in range(200):
        data = {c: Seen((t := rng.uniform(1, 20)) / 10, c / 200, t) for c in COUNTS}
        found, seen = walk(COUNTS, data.__getitem__)
        if found is not None:
            assert data[found].load <= 1
        said += not is_monotone(seen)
    assert said > 150


def test_is_monotone_allows_for_noise_and_no_more() -> None:
    one = {1: Seen(1, 1, 105.0), 2: Seen(1, 1, 95.0)}
    assert is_monotone(one, noise=0.05)
    assert not is_monotone({**one, 3: Seen(1, 1, 94.9)}, noise=0.05)
    assert not is_monotone(one, noise=0.04)


def test_it_looks_at_few_where_few_can_win() -> None:
    def of(limit: float) -> Callable[[int], Seen]:
        return lambda count: Seen((20 + count / 4) / limit, count / 200, 20 + count / 4)

    assert coarse(COUNTS) == (16, 80, 144, 192)
    all_meet, seen = walk(COUNTS, of(100), ties=False)
    assert (all_meet, sorted(seen)) == (192, [16, 80, 144, 192]), "the largest meets the limit: nothing agrees more"
    none, seen = walk(COUNTS, of(5), ties=False)
    assert (none, sorted(seen)) == (None, [16, 80, 144, 192]), "the smallest is far above"
    found, seen = walk(COUNTS, of(50), noise=0.02, ties=False)
    assert found == 112  # 48 ms; 128 take 52
    assert len(seen) <= 8


def test_it_says_by_which_rule_a_budget_is_left_out() -> None:
    def seen(load: float, agreement: float) -> Seen:
        return Seen(load, agreement, load)

    known = {16: seen(0.4, 0.5), 80: seen(0.9, 0.8), 144: seen(1.5, 0.9)}
    step = next_budgets(COUNTS, known, min_agreement=0.7)
    assert step.skipped[160] == "m144 is above the limit by more than noise, and more tokens are no faster"
    assert step.skipped[64] == "m80 meets the limit, and fewer tokens agree no more"
    assert set(step.budgets) <= {96, 112, 128}
    poor = next_budgets(COUNTS, {144: seen(1.01, 0.6)}, min_agreement=0.7)
    assert poor.skipped[16] == "m144 agrees too little already, and fewer tokens agree no more"
    assert set(poor.budgets) <= {160, 176, 192}
    assert 160 in next_budgets(COUNTS, {144: seen(1.09, 0.6)}).budgets + tuple(
        count for count in COUNTS if count not in next_budgets(COUNTS, {144: seen(1.09, 0.6)}).skipped
    ), "8 % above may be noise"


def test_a_rule_that_was_seen_to_fail_leaves_nothing_out() -> None:
    known = {16: Seen(2.0, 0.1, 20), 80: Seen(0.9, 0.4, 9), 192: Seen(1.5, 0.9, 15)}
    step = next_budgets(COUNTS, known)
    assert set(step.budgets) <= set(range(96, 177, 16))
    assert not set(range(96, 177, 16)) & set(step.skipped), "16 is slow, and yet 80 is fast: more may be fast, too"


def test_of_equal_agreement_the_fewest_tokens_are_sought() -> None:
    def of(count: int) -> Seen:
        return Seen(count / 1000, 1.0 if count >= 48 else 0.9, float(count))

    found, seen = walk(COUNTS, of)
    assert found == 48
    assert len(seen) < len(COUNTS)


def test_exhaustive_looks_at_all_and_refused_are_left_out() -> None:
    seen: dict[int, Seen] = {}
    while step := next_budgets(COUNTS, seen, refused=(16,), exhaustive=True).budgets:
        seen |= {count: Seen(0.1, 1.0, 1.0) for count in step}
    assert set(seen) == set(COUNTS) - {16}
    assert 16 not in next_budgets(COUNTS, {}, refused=(16,)).budgets


# -- the front ----------------------------------------------------------------------------------------------


def test_front_and_dominators_are_those_of_the_definition() -> None:
    rng = random.Random(3)
    for _ in range(200):
        points = {f"p{i}": (float(rng.randint(1, 6)), rng.randint(1, 6) / 10) for i in range(rng.randint(0, 12))}

        def beats(one: str, other: str, of: dict[str, tuple[float, float]] = points) -> bool:
            (a, b), (c, d) = of[one], of[other]
            return a <= c and b >= d and (a, b) != (c, d)

        members = {name for name in points if not any(beats(other, name) for other in points)}
        assert set(front(points)) == members
        for name, by in dominators(points).items():
            assert set(by) == {other for other in members if beats(other, name)}
            assert bool(by) == (name not in members)


# -- limits -------------------------------------------------------------------------------------------------


def measured(p50: Figure, p99: Figure | None = None, **fields: object) -> Measured:
    return Measured(source="measured", where="local", p50_us=p50, p99_us=p99, samples=100, **fields)  # type: ignore[arg-type]


def test_a_latency_is_held_to_the_end_of_its_interval() -> None:
    one = measured(Figure(9800, 9500, 10_400), Figure(11_000, 10_900, 12_500), max_us=14_000)
    assert judge(one, None, Limits(max_p50_ms=10.5)).misses == ()
    verdict = judge(one, None, Limits(max_p50_ms=10))
    assert verdict.misses == ("p50 9.800 ms is at most 10, the upper end of its interval 10.400 is not",)
    assert verdict.load == pytest.approx(1.04)
    assert judge(one, None, Limits(max_p50_ms=9)).misses == ("p50 9.800 ms is above 9",)
    assert judge(one, None, Limits(max_p99_ms=12.6)).load == pytest.approx(12.5 / 12.6)


def test_where_samples_bound_nothing_the_largest_counts() -> None:
    one = measured(Figure(9800, 9500, 10_400), Figure(11_000, 10_900, None, True), max_us=14_000)
    verdict = judge(one, None, Limits(max_p99_ms=13))
    assert verdict.misses == ("p99 11.000 ms is at most 13, the largest of so few samples 14.000 is not",)


def test_an_estimate_is_held_to_the_end_of_its_band() -> None:
    one = Measured(source="estimated", where="t4", p50_us=Figure(5000, 4000, 7000))
    assert judge(one, None, Limits(max_p99_ms=7)).misses == ()
    verdict = judge(one, None, Limits(max_p50_ms=6))
    assert verdict.misses == ("p50 5.000 ms is at most 6, the upper end of the estimate 7.000 is not",)


def test_several_limits_hold_together() -> None:
    limits = Limits(max_p50_ms=12, max_p99_ms=14, max_energy_mj=2, min_agreement=0.9)
    one = measured(Figure(10_000, 9000, 11_000), Figure(13_000, 12_000, 13_500), energy_mj=3.0)
    verdict = judge(one, Agreement(0.8), limits)
    assert verdict.misses == ("energy 3.000 mJ is above 2", "agreement 0.8000 is below 0.9")
    assert (verdict.load, verdict.excess) == (1.5, 1.5)
    assert judge(one, Agreement(0.45), limits).excess == 2.0
    assert judge(one, None, limits).misses[-1] == "agreement that is unknown is below 0.9"


# -- the space ----------------------------------------------------------------------------------------------


def subject(tokens: int, **fields: object) -> Subject:
    rule = fields.pop("rule", BudgetRule(default=(1,)))
    return Subject("tome", "vit", "inside", "vit", tokens, rule, **fields)  # type: ignore[arg-type]


def test_budgets_are_multiples_that_hardware_likes() -> None:
    assert budgets_of(subject(196), ["fp32"]) == COUNTS
    assert budgets_of(subject(576), ["fp32"])[:2] == (32, 64)
    assert budgets_of(subject(196), ["fp32"], step=32) == (32, 64, 96, 128, 160, 192)
    assert budgets_of(subject(64), ["fp32"])[0] == 4
    assert budgets_of(subject(64), ["fp32", "int8"]) == (16, 32, 48), "int8 takes 16 rows at once"
    assert budgets_of(subject(16), ["int8"])[:2] == (1, 2), "a model so small has no such multiples"
    assert budgets_of(subject(196, rule=BudgetRule(default=(25,), choices=(9, 25, 400))), ["fp32"]) == (9, 25)
    assert budgets_of(subject(196), ["fp32"], asked=[50, 7, 50]) == (7, 50)
    with pytest.raises(
        InvalidSpec, match="budget 197 is not possible for tome: it must be at least 1, and at most 196"
    ):
        budgets_of(subject(196), ["fp32"], asked=[197])
    with pytest.raises(InvalidSpec, match="of 7 tokens, and no multiple of 8"):
        budgets_of(subject(7), ["fp32"], step=8)


def test_precisions_and_schedules() -> None:
    assert precisions_of([], "fp32") == ("fp32",)
    assert precisions_of(["int8", "fp32"], "fp32") == ("fp32", "int8")
    assert precisions_of(["all"], "fp32") == ("fp32", "fp16", "bf16", "int8", "fp8")
    with pytest.raises(InvalidSpec, match="precision 'int4' is none of fp32"):
        precisions_of(["int4"], "fp32")
    two = subject(196, schedules=("constant", "linear"))
    assert schedules_of([], two) == ("constant",)
    assert schedules_of(["all"], two) == ("constant", "linear")
    assert schedules_of([], subject(196)) == ("",)
    with pytest.raises(InvalidSpec, match="--schedule linear: tome has no schedules"):
        schedules_of(["linear"], subject(196))
    with pytest.raises(InvalidSpec, match="schedule 'cubic' is none of constant, linear"):
        schedules_of(["cubic"], two)
    assert name_of(Family("candidate", "evit", "fp16", "linear"), 98) == "evit linear m98 fp16"
    assert name_of(Family("plain", "", "fp32"), 196) == "plain fp32"


# -- the journal --------------------------------------------------------------------------------------------

OF = flat({"method": "tome", "machine": {"cpu": "a", "cores": 2}, "duration_s": 3.0, "fp32": ()})
RECORDS = (
    Exported(("tome m8 fp32",), "candidate-tome-fp32-8", 1.5),
    Timed("tome m8 fp32", measured(Figure(1.5, None, 2.0)), 3.0, 100),
    Judged("tome m8 fp32", None, 0.1),
    Judged("tome m9 fp32", Agreement(0.5, 0.4, 0.6, 10), 0.1),
    Refused("tome m10 fp32", "fails parity", "x\ny"),
)


def written(path: Path) -> bytes:
    with Journal(path, OF) as journal:
        for record in RECORDS:
            journal.add(record)
    return path.read_bytes()


def test_a_journal_cut_at_any_byte_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", synced.append)
    whole = written(tmp_path / "whole")
    assert len(synced) == len(RECORDS) + 2, "the first line, the folder, and each record"
    path = tmp_path / "cut"
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        with Journal(path, OF) as journal:
            kept = len(journal.records)
            lines = whole[:size].count(b"\n")
            assert kept == max(0, lines - 1)
            assert tuple(journal.records) == RECORDS[:kept]
            assert journal.dropped == size - (whole[:size].rfind(b"\n") + 1)
            for record in RECORDS[kept:]:
                journal.add(record)
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("method", "evit", "method 'tome', and this one has 'evit'"),
        ("machine.cpu", "b", "machine.cpu 'a', and this one has 'b'"),
        ("duration_s", 4.0, r"duration_s 3\.0, and this one has 4\.0"),
        ("new", 1, "new 'nothing', and this one has 1"),
    ],
)
def test_a_journal_of_another_search_is_refused(tmp_path: Path, field: str, value: object, says: str) -> None:
    whole = written(tmp_path / "journal")
    with pytest.raises(InvalidSpec, match=says):
        Journal(tmp_path / "journal", {**OF, field: value})
    assert (tmp_path / "journal").read_bytes() == whole, "it is left as it was"


def test_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    whole = written(path)
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2][:20] + b"\n", *lines[3:]]))
    with pytest.raises(RunError, match="line 3 is damaged"):
        Journal(path, OF)
    path.write_bytes(b"{}\n")
    with pytest.raises(RunError, match="is no journal of a search"):
        Journal(path, OF)
    path.write_bytes(lines[0].replace(b'"schema":1', b'"schema":2'))
    with pytest.raises(RunError, match=r"of schema 2, and this edgecomp writes .* of schema 1"):
        Journal(path, OF)
    with pytest.raises(EdgecompError, match="cannot be used: Is a directory"):
        Journal(tmp_path, OF)


# -- the document -------------------------------------------------------------------------------------------


def test_a_document_is_read_whole_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    for content, says in (
        (b'{"kind": "edgecomp search", "sch', "is truncated or no JSON"),
        (b'{"kind": "edgecomp result", "schema": 1}', "its kind is 'edgecomp result'"),
        (b"[1]", "its kind is 'missing'"),
        (b'{"kind": "edgecomp search", "schema": 9}', "of schema 9, and this edgecomp reads 1"),
        (b'{"kind": "edgecomp search", "schema": 1, "rows": 5}', "is damaged or was edited"),
    ):
        path.write_bytes(content)
        with pytest.raises(RunError, match=says):
            read_search(path)
    with pytest.raises(RunError, match="cannot be read: No such file"):
        read_search(tmp_path / "none.json")
    assert {"rows", "winner", "recipe"} <= {field.name for field in msgspec.structs.fields(SearchResult)}
