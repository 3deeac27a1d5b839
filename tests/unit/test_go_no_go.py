"""Would fewer tokens help: the projection against a graph that really has fewer, the verdicts, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from edgecomp.errors import InvalidSpec
from edgecomp.estimates import estimate_graph
from edgecomp.estimates.applied import Calibration, calibration_path, save
from edgecomp.estimates.efficiency import Efficiency
from edgecomp.estimates.geometry import Geometry, transformer_costs
from edgecomp.estimates.go_no_go import go_no_go
from edgecomp.estimates.project import blocks_of, with_fewer_tokens
from edgecomp.report.foresight import describe_go_no_go
from edgecomp.specs import load_target

VIT_B = Geometry(197, 768, 12, 12, 3072, 768)


def test_a_projection_from_the_first_block_on_is_the_smaller_model() -> None:
    cut = with_fewer_tokens(transformer_costs(VIT_B), tokens=96, behind=0)
    small = transformer_costs(replace(VIT_B, tokens=96))
    late = [op.flops for op in cut.ops if op.block.startswith("blocks")]
    assert late == [op.flops for op in small.ops if op.block.startswith("blocks")]
    shapes = [cut.values[name].dims for op in cut.ops if op.block != "front" for name in op.writes]
    assert shapes == [small.values[name].dims for op in small.ops if op.block != "front" for name in op.writes]


def test_blocks_in_front_of_the_cut_stay() -> None:
    costs = transformer_costs(VIT_B)
    cut = with_fewer_tokens(costs, tokens=96, behind=3)
    for number in range(3):
        assert [op for op in cut.ops if op.block == f"blocks.{number}"] == [
            op for op in costs.ops if op.block == f"blocks.{number}"
        ]
    assert all(
        now.flops < old.flops
        for now, old in zip(cut.ops, costs.ops, strict=True)
        if old.flops and old.block == "blocks.3"
    )


def test_a_width_that_equals_the_tokens_stays() -> None:
    costs = transformer_costs(Geometry(256, 256, 4, 4, 1024, 768))
    cut = with_fewer_tokens(costs, tokens=64, behind=0)
    small = transformer_costs(Geometry(64, 256, 4, 4, 1024, 768))
    late = [op.flops for op in small.ops if op.block != "front"]
    assert [op.flops for op in cut.ops if op.block != "front"] == late


def test_heads_as_wide_as_there_are_tokens_stay() -> None:
    costs = transformer_costs(Geometry(64, 256, 4, 4, 1024, 768))
    cut = with_fewer_tokens(costs, tokens=16, behind=0)
    small = transformer_costs(Geometry(16, 256, 4, 4, 1024, 768))
    for attribute in ("flops", "writes"):
        late = [[getattr(op, attribute) for op in one.ops if op.block != "front"] for one in (cut, small)]
        assert late[0] == late[1]
    numbers = [
        [one.values[name].elements for op in one.ops if op.block != "front" for name in op.writes]
        for one in (cut, small)
    ]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize(
    ("target", "batch", "verdict"),
    [("orin-nano-super", 1, "go"), ("agx-orin-64", 1, "little"), ("h100", 1, "no"), ("h100", 32, "go")],
)
def test_verdicts(target: str, batch: int, verdict: str) -> None:
    answer = go_no_go(transformer_costs(VIT_B), load_target(target), batch=batch)
    assert answer.verdict == verdict
    assert answer.sentence.startswith({"go": "Yes", "little": "Little", "no": "No"}[verdict])
    assert f"on {target} at batch {batch} in fp16" in answer.sentence
    half = next(reach for reach in answer.asked.reach if reach.tokens == 96)
    assert half.low <= half.faster <= half.high
    assert half.low < half.high  # the other fits do not agree
    assert f"{half.faster:.2f} times faster" in answer.sentence
    assert answer.overhead_us == pytest.approx(answer.asked.us - half.us)


def test_the_table_has_batches_and_precisions() -> None:
    answer = go_no_go(transformer_costs(VIT_B), load_target("t4"))
    assert [(row.precision, row.batch) for row in answer.rows] == [
        (word, batch) for word in ("fp16", "int8") for batch in (1, 8, 32)
    ]
    assert [reach.tokens for reach in answer.asked.reach] == [144, 96, 48]
    faster = [reach.faster for reach in answer.asked.reach]
    assert faster == sorted(faster)
    plain = estimate_graph(transformer_costs(VIT_B), load_target("t4"), precision="fp16", batch=8)
    assert next(row.us for row in answer.rows if (row.precision, row.batch) == ("fp16", 8)) == pytest.approx(
        plain.mid_us
    )


def test_a_precision_without_a_peak_is_left_out_with_its_reason() -> None:
    target = load_target("t4")
    bare = replace(target, peaks={"fp16": target.peaks["fp16"]})
    answer = go_no_go(transformer_costs(VIT_B), bare)
    assert {row.precision for row in answer.rows} == {"fp16"}
    assert "int8: target t4 runs int8 and states no peak" in answer.skipped[0]
    with pytest.raises(InvalidSpec, match="states no peak"):
        go_no_go(transformer_costs(VIT_B), bare, precision="int8")


def test_a_launch_bound_model_is_told_so() -> None:
    answer = go_no_go(transformer_costs(VIT_B), load_target("h100"))
    assert answer.asked.bound == "launch"
    assert "the rest is launches" in answer.sentence
    assert "at batch 32 it would be" in answer.sentence


def test_a_calibration_of_ones_own_has_no_other_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECOMP_CONFIG_DIR", str(tmp_path))
    own = Efficiency(compute=0.5, compute8=0.5, bandwidth=0.5, launch_us=2.0, tile=8192.0)
    save(Calibration(1, "t4", own, 0.1, "left out", ("a",)))
    assert calibration_path("t4").is_file()
    reach = go_no_go(transformer_costs(VIT_B), load_target("t4")).asked.reach[0]
    assert reach.low == reach.faster == reach.high
    said = "\n".join(describe_go_no_go(go_no_go(transformer_costs(VIT_B), load_target("t4"))))
    assert "other fits" not in said
    assert " to " not in said.partition("precision")[2].partition("times faster")[0]


def test_what_is_no_transformer_is_refused() -> None:
    costs = replace(transformer_costs(VIT_B), tokens=0, file="cnn.onnx")
    with pytest.raises(InvalidSpec, match=r"cnn\.onnx: 12 blocks and no tokens were found"):
        go_no_go(costs, load_target("t4"))
    with pytest.raises(InvalidSpec, match=r"made: 1 blocks"):
        blocks_of(transformer_costs(replace(VIT_B, depth=1), name="made"))
    with pytest.raises(InvalidSpec, match="198 tokens are not between 1 and the 197"):
        with_fewer_tokens(transformer_costs(VIT_B), tokens=198, behind=0)
    with pytest.raises(InvalidSpec, match="block 12 is not one of the 12"):
        with_fewer_tokens(transformer_costs(VIT_B), tokens=9, behind=12)
