"""The roofline and its efficiency: the formula by hand, fused kernels, peaks, the fit of the published rows."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import asdict, replace

from edgecomp.errors import InvalidSpec, UnknownName
from edgecomp.estimates import estimate_graph
from edgecomp.estimates.applied import Applied, shipped_for
from edgecomp.estimates.efficiency import Efficiency, Load, Observed, fit, modelled_us, shipped_fit
from edgecomp.estimates.fusion import fuse
from edgecomp.estimates.geometry import Geometry, transformer_costs
from edgecomp.estimates.memory import judge_bytes, judge_memory
from edgecomp.estimates.peaks import at_power_mode, rate_of, require_precision
from edgecomp.estimates.published import refit, shipped_rows
from edgecomp.specs import load_target
from edgecomp.specs.costs import GraphCosts, OpCost, ValueCost

VIT_S = Geometry(197, 384, 12, 6, 1536, 768)
FULL = Applied(Efficiency(compute=1.0, compute8=1.0, bandwidth=1.0, launch_us=5.0, tile=1.0), 0.0, "a test")


def chain(*ops: OpCost, inputs: tuple[str, ...], outputs: tuple[str, ...], size: int = 1000) -> GraphCosts:
    """A graph of ops whose values all hold `size` numbers."""
    names = {name for op in ops for name in (*op.reads, *op.writes)}
    weights = {name: ValueCost((10, 10), "float32", moves=False) for op in ops for name in op.weights}
    values = {name: ValueCost((1, size), "float32") for name in sorted(names)}
    return GraphCosts("made.onnx", 1, 0, inputs, outputs, ops, values, weights)


def op(kind: str, reads: str, writes: str, *, flops: int = 0, weights: str = "", role: str = "model") -> OpCost:
    return OpCost(
        name=f"{kind}:{writes}",
        op=kind,
        module="",
        block="",
        kind=kind,
        role=role,
        call="",
        flops=flops,
        reads=tuple(reads.split()),
        writes=tuple(writes.split()),
        weights=tuple(weights.split()),
        dtype="float32",
        of_weights=bool(weights and flops),
        bytes_written=4000,
    )


# -- kernels ------------------------------------------------------------------------------------------------


def test_a_vit_is_seven_kernels_a_block() -> None:
    kernels = fuse(transformer_costs(VIT_S), plugin=False)
    assert len(kernels) == 7 * 12 + 2
    block = [kernel.kind for kernel in kernels if kernel.block == "blocks.3"]
    assert block == ["norm", "matmul", "attention", "matmul", "norm", "matmul", "matmul"]


def test_pointwise_ops_join_the_last_of_their_inputs() -> None:
    costs = chain(
        op("matmul", "x", "a", flops=10, weights="w"),
        op("norm", "a", "b"),
        op("elementwise", "b a", "c"),
        op("sort", "c", "d"),
        op("elementwise", "d", "e"),
        inputs=("x",),
        outputs=("e",),
    )
    kernels = fuse(costs, plugin=False)
    assert [(kernel.kind, kernel.ops) for kernel in kernels] == [
        ("matmul", 1),
        ("norm", 2),
        ("sort", 1),
        ("elementwise", 1),
    ]
    assert (kernels[1].reads, kernels[1].writes) == (("a",), ("c",))


def test_scores_that_others_read_break_the_attention() -> None:
    ops = [
        op("matmul", "q k", "s", flops=10),
        op("elementwise", "s", "t"),
        op("softmax", "t", "p"),
        op("matmul", "p v", "o", flops=10),
    ]
    whole = fuse(chain(*ops, inputs=("q", "k", "v"), outputs=("o",)), plugin=False)
    assert [(kernel.kind, kernel.ops, kernel.reads, kernel.writes) for kernel in whole] == [
        ("attention", 4, ("q", "k", "v"), ("o",))
    ]
    broken = fuse(chain(*ops, op("reduce", "p", "r"), inputs=("q", "k", "v"), outputs=("o", "r")), plugin=False)
    assert [kernel.kind for kernel in broken] == ["matmul", "softmax", "matmul", "reduce"]
    early = fuse(chain(*ops, op("reduce", "s", "r"), inputs=("q", "k", "v"), outputs=("o", "r")), plugin=False)
    assert [kernel.kind for kernel in early] == ["matmul", "softmax", "matmul", "reduce"]
    given_out = fuse(chain(*ops, inputs=("q", "k", "v"), outputs=("o", "p")), plugin=False)
    assert len(given_out) == 3


def test_views_are_no_kernels() -> None:
    costs = chain(op("norm", "x", "a"), op("view", "a", "b"), op("norm", "b", "c"), inputs=("x",), outputs=("c",))
    assert [kernel.reads for kernel in fuse(costs, plugin=False)] == [("x",), ("a",)]


def test_a_call_is_one_kernel_in_its_plugin() -> None:
    inner = [
        replace(op("sort", "x", "a", role="merge"), call="m"),
        replace(op("gather", "a x", "b", role="merge"), call="m"),
    ]
    costs = chain(*inner, op("norm", "b", "c"), inputs=("x",), outputs=("c",))
    assert [kernel.name for kernel in fuse(costs, plugin=True)] == ["m", "norm:c"]
    assert len(fuse(costs, plugin=False)) == 3
    of_plugin = estimate_graph(costs, load_target("t4"), applied=FULL)
    assert of_plugin.launch_us == (3 + 1) * 5  # the plugin launches three kernels a call


# -- the formula --------------------------------------------------------------------------------------------


def test_the_formula_by_hand() -> None:
    # t4: 65 TFLOP/s in fp16, 320 GB/s, 40 multiprocessors
    costs = chain(op("matmul", "x", "y", flops=65_000_000_000, weights="w"), inputs=("x",), outputs=("y",), size=400)
    made = estimate_graph(costs, load_target("t4"), precision="fp16", applied=FULL)
    assert made.mid_us == pytest.approx(1000 + 5)
    assert (made.bound, made.idle_us) == ("compute", 0)
    half = replace(FULL, efficiency=replace(FULL.efficiency, compute=0.5, tile=20.0), error=math.log(2))
    made = estimate_graph(costs, load_target("t4"), precision="fp16", applied=half)
    assert made.kernels[0].fill == 0.5  # 400 elements are 20 tiles, for 40 multiprocessors
    assert made.mid_us == pytest.approx(1000 / 0.5 / 0.5 + 5)
    assert made.idle_us == pytest.approx(2000)
    assert (made.low_us, made.high_us) == pytest.approx((made.mid_us / 2, made.mid_us * 2))
    assert made.error == pytest.approx(1.0)


def test_bytes_bound_what_has_no_products() -> None:
    costs = chain(op("norm", "x", "y", weights="w"), inputs=("x",), outputs=("y",), size=160_000_000)
    made = estimate_graph(costs, load_target("t4"), applied=FULL)
    assert made.bytes == 2 * 640_000_000 + 400
    assert made.mid_us == pytest.approx(made.bytes / 320e3 + 5)
    assert made.bound == "memory"
    halved = estimate_graph(costs, load_target("t4"), precision="fp16", applied=FULL)
    assert halved.bytes == made.bytes // 2


def test_parts_sum_to_the_middle_and_kernels_too() -> None:
    made = estimate_graph(transformer_costs(VIT_S), load_target("a100"), precision="fp16")
    assert made.compute_us + made.memory_us + made.launch_us == pytest.approx(made.mid_us)
    assert sum(kernel.us for kernel in made.kernels) == pytest.approx(made.mid_us)
    assert made.low_us < made.mid_us < made.high_us
    assert made.flops == transformer_costs(VIT_S).flops


def test_a_batch_scales_what_moves_and_not_the_weights() -> None:
    costs, target = transformer_costs(VIT_S), load_target("t4")
    one, eight = (estimate_graph(costs, target, precision="fp16", batch=batch) for batch in (1, 8))
    by_shape = estimate_graph(transformer_costs(VIT_S, batch=8), target, precision="fp16")
    assert eight.weight_bytes == one.weight_bytes
    assert (eight.flops, eight.bytes, eight.activation_bytes) == (
        by_shape.flops,
        by_shape.bytes,
        by_shape.activation_bytes,
    )
    assert eight.mid_us == pytest.approx(by_shape.mid_us)
    assert any("scaled by 8" in note for note in eight.notes)


def test_a_graph_without_a_batch_is_not_scaled() -> None:
    costs = replace(transformer_costs(VIT_S), batch=0)
    with pytest.raises(InvalidSpec, match=r"(?s)--batch 4: .*patches \[1, 197, 768\].*export it at that batch"):
        estimate_graph(costs, load_target("t4"), batch=4)


def test_int8_is_of_products_with_weights_alone() -> None:
    costs, target = transformer_costs(VIT_S), load_target("t4")
    of_int8, of_fp16 = (estimate_graph(costs, target, precision=word) for word in ("int8", "fp16"))
    assert set(of_int8.peaks) == {"int8", "fp16"}
    assert of_int8.weight_bytes < 0.52 * of_fp16.weight_bytes
    assert of_int8.mid_us < of_fp16.mid_us


def test_activations_live_only_as_long_as_they_are_read() -> None:
    costs = chain(
        op("norm", "x", "a"), op("norm", "a", "b"), op("norm", "b", "c"), op("norm", "c", "y"),
        inputs=("x",), outputs=("y",), size=1000,
    )  # fmt: skip
    made = estimate_graph(costs, load_target("t4"), applied=FULL)
    assert made.activation_bytes == 4 * 4000  # x and y throughout, and two of the chain


# -- peaks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "precision", "tera", "confidence"),
    [
        ("a100", "fp16", 312, "stated"),
        ("a100", "bf16", 312, "derived"),
        ("a100", "tf32", 156, "derived"),
        ("a100", "fp32", 156, "derived"),
        ("t4", "fp32", 65 / 8, "derived"),
        ("xavier-nx", "fp32", 0.75, "derived"),
        ("agx-orin-64", "fp16", 42.5, "derived"),
        ("h100", "fp8", 1979, "stated"),
    ],
)
def test_rates_are_dense_and_marked(target: str, precision: str, tera: float, confidence: str) -> None:
    rate = rate_of(load_target(target), precision)
    assert (rate.tera, rate.confidence) == (pytest.approx(tera), confidence)


def test_a_precision_that_the_target_does_not_run_is_refused() -> None:
    with pytest.raises(InvalidSpec, match=r"orin-nano \(SM87\) does not run fp8; it runs fp32, tf32, fp16, bf16, int8"):
        require_precision(load_target("orin-nano"), "fp8")
    with pytest.raises(UnknownName, match="no precision 'fp17'; did you mean 'fp16'"):
        require_precision(load_target("orin-nano"), "fp17")


def test_a_peak_that_is_not_there_is_named() -> None:
    target = load_target("t4")
    bare = replace(target, peaks={"fp16": target.peaks["fp16"]})
    with pytest.raises(InvalidSpec, match=r"(?s)t4 runs int8 and states no peak.*\[peaks\.int8\].*it states fp16"):
        rate_of(bare, "int8")
    with pytest.raises(InvalidSpec, match="states no peak for it"):
        estimate_graph(transformer_costs(VIT_S), bare, precision="int8")


def test_power_modes_scale_by_the_clock_or_are_refused() -> None:
    thor = load_target("thor-t5000")
    with pytest.raises(InvalidSpec, match="clock of power mode 40W is not known"):
        at_power_mode(thor, "40W")
    with pytest.raises(UnknownName, match="power mode of thor-t5000"):
        at_power_mode(thor, "41W")
    modes = (thor.power_modes[1], replace(thor.power_modes[0], gpu_mhz=785.0))
    slower, said = at_power_mode(replace(thor, power_modes=modes), "40W")
    assert (slower.peaks["fp16"].value, slower.peaks["fp16"].confidence) == (129.0, "derived")
    assert slower.bandwidth_gb_s == thor.bandwidth_gb_s
    assert "times 0.500 (785 of 1570 MHz)" in said


def test_derived_peaks_and_unknown_precisions_are_noted() -> None:
    costs = transformer_costs(VIT_S)
    assert any(
        "fp16 peak of agx-orin-64 is derived" in n
        for n in estimate_graph(costs, load_target("agx-orin-64"), precision="fp16").notes
    )
    assert any(
        "no published row is in fp8" in n for n in estimate_graph(costs, load_target("h100"), precision="fp8").notes
    )
    with pytest.raises(InvalidSpec, match="float64"):
        estimate_graph(replace(costs, ops=tuple(replace(one, dtype="float64") for one in costs.ops)), load_target("t4"))


# -- the fit ------------------------------------------------------------------------------------------------


def test_the_shipped_fit_is_that_of_the_published_rows() -> None:
    made, errors = refit(shipped_rows())
    shipped = shipped_fit()
    for name in ("rows", "targets"):
        assert getattr(made, name) == getattr(shipped, name)
    for name in ("error_row", "median_row", "error_device", "median_device", "rms", "rms_filling"):
        assert getattr(made, name) == pytest.approx(getattr(shipped, name), rel=1e-3), name
    for name, efficiency in {"": made.efficiency, "filling": made.filling, **made.without}.items():
        other = shipped.efficiency if not name else shipped.filling if name == "filling" else shipped.without[name]
        assert asdict(efficiency) == pytest.approx(asdict(other), rel=1e-3), name
    assert made.devices == pytest.approx(shipped.devices, rel=1e-3)
    assert len(errors) == len(shipped_rows().rows) == shipped.rows
    by_hand = [abs(math.log(one.without_row / one.us)) for one in errors]
    assert np.quantile(by_hand, 0.9) == pytest.approx(shipped.error_row, rel=1e-3)


@pytest.mark.parametrize("file", ["README.md", "docs/estimate.md"])
def test_documents_state_the_error_of_the_fit(file: str) -> None:
    text = (Path(__file__).resolve().parents[2] / file).read_text(encoding="utf-8")
    fitted = shipped_fit()
    assert f"{fitted.rows} published" in text
    for error in (fitted.error_row, fitted.error_device):
        assert f"{math.exp(error):.2f}" in text


def test_the_document_states_the_error_on_each_device() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "estimate.md").read_text(encoding="utf-8")
    for name, error in shipped_fit().devices.items():
        assert f"{name} {math.exp(error):.2f}" in text


def test_every_published_row_says_where_it_comes_from() -> None:
    rows = shipped_rows()
    assert all(row.source and row.geometry in rows.geometries for row in rows.rows)
    assert all(left.reason for left in rows.left_out)
    nano = [row for row in rows.rows if row.target.startswith("orin-nano")]
    assert nano
    assert all("batch 1" in row.assumed for row in nano)  # their source states no batch


def test_the_fit_finds_what_made_the_times() -> None:
    generator = np.random.default_rng(0)
    true = Efficiency(compute=0.6, compute8=0.2, bandwidth=0.5, launch_us=3.0, tile=8192.0)
    observed = []
    for scale in (1, 3, 10, 30, 100, 300):
        load = Load(*(scale * generator.uniform(0, 10, 20) for _ in range(3)), np.zeros(20), np.ones(20))
        observed.append(Observed("t4", load, float(modelled_us(load, true).sum())))
    found = fit(observed, Efficiency(compute=0.4, compute8=0.35, bandwidth=0.6, launch_us=8.0, tile=8192.0))
    assert asdict(found) == pytest.approx(asdict(true), rel=1e-2)


def test_the_error_is_that_of_rows_or_of_devices() -> None:
    fitted = shipped_fit()
    assert shipped_for("t4").error == fitted.error_row
    assert shipped_for("h100").error == fitted.error_device > fitted.error_row
    worst = fitted.devices[fitted.worst_device]
    assert worst > fitted.error_device
    said = f"(the worst, {fitted.worst_device}: 9 of 10 within {math.exp(worst):.2f})"
    assert f"none of h100: each device left out in turn {said}" in shipped_for("h100").source


# -- memory -------------------------------------------------------------------------------------------------


def test_memory_of_a_board_is_shared() -> None:
    costs = transformer_costs(VIT_S)
    small = estimate_graph(costs, load_target("orin-nano"), precision="fp16")
    verdict = judge_memory(small, load_target("orin-nano"))
    assert (verdict.verdict, verdict.available_bytes) == ("fits", 6 << 30)
    assert "2 GiB for the system" in verdict.assumed
    assert verdict.needed_bytes == small.weight_bytes + small.activation_bytes + (1 << 29)
    assert judge_bytes(load_target("orin-nano"), weight_bytes=5 << 30, activation_bytes=0).verdict == "tight"
    assert judge_bytes(load_target("orin-nano"), weight_bytes=6 << 30, activation_bytes=0).verdict == "does not fit"
    assert judge_memory(small, load_target("t4")).available_bytes == 16 << 30
