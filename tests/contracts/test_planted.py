"""Parity catches what is planted into a graph, in one of its three parts: values, values forced, choices.

By default one method of each kind is tried; `-m slow` has the others. `docs/parity.md` has the table.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import planted
import pytest

from edgecomp.export.forced import force_choices
from edgecomp.export.modules import MODULE_KEY
from edgecomp.parity import check_bucket, check_selection, read_goldens
from edgecomp.runners import open_runner

#: Faults that no part sees, and why.
UNSEEN = {
    ("half_softmax", "attention-pruning", "smoke-text"): "with random weights the error is 3.8e-6, within 2e-5",
    ("half_softmax", "d-abstractor", "smoke-tables"): "likewise 1.5e-5, within 4e-5",
    ("half_softmax", "fastervlm", "smoke-host"): "likewise 3.5e-6",
    ("half_softmax", "spatial-frequency-protect", "smoke-host"): "likewise 4.0e-6",
    ("half_softmax", "visionzip", "smoke-host"): "likewise 4.4e-6",
    ("off_by_one", "pitome", "smoke"): "all that can merge do merge, so that nothing stands behind the last",
}


@pytest.fixture
def parts_of(tmp_path):
    """Return a function that says which parts of parity a graph fails: `values`, `forced`, `choices`."""

    def find(bundle, bucket, model):
        ir.save(model, tmp_path / "model.onnx")
        goldens, tolerance = read_goldens(bundle.path), bundle.manifest.recipe.tolerances["fp32"]
        with open_runner("onnxruntime", tmp_path / "model.onnx", threads=1) as runner:
            failed = set() if all(check_bucket(runner, bucket, goldens, tolerance)) else {"values"}
        model = ir.load(tmp_path / "model.onnx")
        nodes = force_choices(model)
        if nodes:
            ir.save(model, tmp_path / "forced.onnx")
            with open_runner("onnxruntime", tmp_path / "forced.onnx", threads=1) as runner:
                part = check_selection(runner, bundle.path, bucket, nodes, goldens, tolerance)
            failed |= {word for word, rows in (("forced", part.forced), ("choices", part.choices)) if not all(rows)}
        return failed

    return find


def _load(bundle, bucket):
    model = ir.load(bundle.path / bucket.model)
    ir.external_data.load_to_model(model)
    return model


def _smokes(method):
    from edgecomp.specs import load_recipe

    return load_recipe(method).smoke_presets


def test_what_is_planted_is_caught(sampled_method, bundle_of, parts_of, note, smoke_of):
    """One bundle of a method, each fault in turn; and without any, nothing fails."""
    seen = []
    for preset in _smokes(sampled_method)[: None if sampled_method not in planted.QUICK else 1]:
        bundle = bundle_of(smoke_of(sampled_method, preset))
        bucket = bundle.manifest.buckets[0]
        assert parts_of(bundle, bucket, _load(bundle, bucket)) == set()
        for fault in planted.FAULTS:
            model = _load(bundle, bucket)
            if not fault(model):
                continue
            failed = parts_of(bundle, bucket, model)
            if (fault.__name__, sampled_method, preset) in UNSEEN or _means_nothing(fault, bundle, bucket):
                continue
            assert failed, f"{fault.__name__} in {sampled_method} {preset} is not seen"
            seen.append(f"{fault.__name__}: {', '.join(sorted(failed))}")
    assert len({one.partition(":")[0] for one in seen}) >= 3, seen
    note(f"planted in {sampled_method}: {'; '.join(seen)}")


def _means_nothing(fault, bundle, bucket):
    """Whether the recipe says that the order of the tokens cannot change the output."""
    reads_tokens = bucket.inputs[0].kind == "tokens" and all(spec.name != "index" for spec in bucket.outputs)
    return fault is planted.transposed_grid and reads_tokens and "token-order" in bundle.manifest.recipe.invariances


def test_choices_alone_are_judged_by_layer(bundle_of, parts_of, smoke_of):
    """First-k in a graph that is forced gives the right values: only the choices tell."""
    bundle = bundle_of(smoke_of("evit", "smoke"))
    bucket = bundle.manifest.buckets[0]
    model = _load(bundle, bucket)
    assert planted.first_k(model) == 2
    assert parts_of(bundle, bucket, model) == {"values", "choices"}


def test_weights_that_two_nodes_read_are_struck_once():
    """A graph that runs its layers on tiles and on the whole reads each matrix twice: twice swapped is not swapped."""
    x = ir.Value(name="x", shape=ir.Shape([1, 2]), type=ir.TensorType(ir.DataType.FLOAT))
    weights = []
    for layer in range(2):
        array = np.arange(12, dtype=np.float32).reshape(2, 6) + 100 * layer
        weights.append(ir.Value(name=f"w{layer}", shape=ir.Shape(array.shape), const_value=ir.tensor(array)))
    nodes = [ir.node("MatMul", [x, weight]) for _ in range(2) for weight in weights]
    for index, node in enumerate(nodes):
        node.metadata_props[MODULE_KEY] = f"blocks.{index % 2}.attn.qkv"
    graph = ir.Graph([x], [node.outputs[0] for node in nodes], nodes=nodes, initializers=weights)
    model = ir.Model(graph, ir_version=10)
    assert planted.swapped_kv(model) == 2
    assert weights[0].const_value.numpy().tolist() == [[0, 1, 4, 5, 2, 3], [6, 7, 10, 11, 8, 9]]
    assert planted.other_layers_weights(model) == 1
    assert weights[1].const_value.numpy().tolist() == [[0, 1, 4, 5, 2, 3], [6, 7, 10, 11, 8, 9]]
