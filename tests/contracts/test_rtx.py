"""Contract 9: TensorRT for RTX builds every bundle for Ampere and Blackwell, without the plugin and with it."""

from __future__ import annotations

import pytest

from edgecomp import api
from edgecomp.engines import installed_flavours, load_flavour, read_record
from edgecomp.engines.adapter import create_network
from edgecomp.engines.network import collecting_logger, parse_onnx
from edgecomp.engines.plugins import find_headers, find_nvcc
from edgecomp.errors import PluginMissing
from edgecomp.specs import load_target
from edgecomp.specs.origin import file_sha256

pytestmark = pytest.mark.skipif("rtx" not in installed_flavours(), reason="TensorRT for RTX is not installed")

TARGETS = {"a10": 86, "rtx-5090": 120}


@pytest.mark.parametrize("target", ["a10", pytest.param("rtx-5090", marks=pytest.mark.slow)])
def test_rtx_builds_the_bundle(smoke, bundle_of, target):
    bundle = bundle_of(smoke)
    assert load_target(target).sm == TARGETS[target]
    report = api.build(bundle.path, target=target, runtime="rtx", plugin="off")
    assert (report.target, report.sm, report.runtime) == (target, TARGETS[target], "rtx")
    assert sorted(engine.record.model for engine in report.engines) == sorted(b.model for b in bundle.manifest.buckets)
    buckets = {bucket.model: bucket for bucket in bundle.manifest.buckets}
    for engine in report.engines:
        record, bucket = engine.record, buckets[engine.record.model]
        assert engine.path.parent == bundle.path / "engines" / target
        assert engine.path.stat().st_size == record.size_bytes > 1000
        assert file_sha256(engine.path) == record.sha256
        assert read_record(engine.path) == record
        assert record.sm == (TARGETS[target],)
        assert record.precision == "fp32"
        assert record.onnx_sha256 == bundle.file(bucket.model).sha256
        assert not engine.reused
        merges = bucket.ops.get("TopKMerge", 0)
        assert [merge.by for merge in record.merges] == ["function"] * merges
        for tensors, specs in ((record.inputs, bucket.inputs), (record.outputs, bucket.outputs)):
            assert [(t.name, t.shape, t.dtype) for t in tensors] == [(s.name, s.shape, s.dtype) for s in specs]
    again = api.build(bundle.path, target=target, runtime="rtx", plugin="off")
    assert all(engine.reused for engine in again.engines)
    assert [engine.record for engine in again.engines] == [engine.record for engine in report.engines]


def test_no_layer_is_a_plugin(smoke, bundle_of):
    flavour = load_flavour("rtx")
    bundle = bundle_of(smoke)
    bucket = bundle.manifest.buckets[0]
    logger = collecting_logger(flavour)
    builder = flavour.module.Builder(logger)
    network = create_network(flavour, builder)
    parser = parse_onnx(flavour, network, logger, bundle.path / bucket.model)
    kinds = {network.get_layer(index).type.name for index in range(network.num_layers)}
    multiplies = bool({"MatMul", "Gemm", "Einsum", "TopKMerge"} & set(bucket.ops))
    expected = "MATRIX_MULTIPLY" if multiplies else "CONVOLUTION" if "Conv" in bucket.ops else "GATHER"
    assert expected in kinds, f"{bucket.ops} became {kinds}"
    assert [kind for kind in kinds if "PLUGIN" in kind] == []
    del parser


def test_with_the_plugin_each_merge_is_a_layer_of_it(smoke, bundle_of):
    bundle = bundle_of(smoke)
    bucket = bundle.manifest.buckets[0]
    merges = bucket.ops.get("TopKMerge", 0)
    if not merges:
        pytest.skip("no token merges in it")
    try:
        find_nvcc(), find_headers()
    except PluginMissing as missing:
        pytest.skip(f"the plugin cannot be compiled here: {missing}")
    words = {"target": "a10", "runtime": "rtx", "budget": bucket.budget.tokens_out, "batch": bucket.batch}
    (engine,) = api.build(bundle.path, plugin="require", **words).engines
    assert engine.path.name.endswith(".rtx.plugin.engine")
    assert [merge.by for merge in engine.record.merges] == ["plugin"] * merges
    (library,) = engine.record.plugins
    assert file_sha256(engine.path.parent / library.library) == library.sha256
    (plain,) = api.build(bundle.path, plugin="off", **words).engines
    assert plain.path != engine.path
    assert engine.path.is_file()
