"""Where patches are by a graph's choices, layer by layer, is where its own map says that they are."""

from __future__ import annotations

import numpy as np

from edgecomp.api._forced import forced_graph
from edgecomp.export.readers import write_readers
from edgecomp.parity import inputs_of, read_goldens
from edgecomp.parity.forced import own_choices
from edgecomp.patches import compose_layers, join_layers, read_end
from edgecomp.runners.chain import open_graph

MAPS = ("source_map", "index")


def test_layers_end_in_the_map_of_the_graph(smoke, bundle_of, tmp_path):
    opened = bundle_of(smoke)
    bucket = opened.manifest.buckets[0]
    path, forced = forced_graph(opened, bucket)
    if not forced.choices:
        assert not set(MAPS) & {spec.name for spec in bucket.outputs}
        check_readings(opened, bucket, tmp_path)
        return
    inputs = inputs_of(bucket, read_goldens(opened.path), "photo")
    with open_graph("onnxruntime", opened, bucket, threads=1, model=path) as runner:
        outputs, chosen = own_choices(runner, forced.choices, inputs)
    with open_graph("onnxruntime", opened, bucket, threads=1) as runner:
        for name, array in runner.infer(inputs).items():
            np.testing.assert_allclose(outputs[name], array, rtol=1e-4, atol=1e-4, err_msg=name)
    for row in range(bucket.batch):
        check_row(opened.manifest, bucket, outputs, forced.choices, chosen, row)


def check_readings(opened, bucket, folder):
    """The shares of attention that tokens give to patches are shares, and beside them the graph gives what it gave."""
    budget = bucket.budget
    sizes = {"batch": bucket.batch, "patches": budget.tokens_in, "tokens": budget.tokens_out}
    found = write_readers(opened.path / bucket.model, folder / "r.onnx", **sizes)
    inputs = inputs_of(bucket, read_goldens(opened.path), "photo")
    with open_graph("onnxruntime", opened, bucket, threads=1, model=folder / "r.onnx") as runner:
        outputs = runner.infer(inputs)
    with open_graph("onnxruntime", opened, bucket, threads=1) as runner:
        for name, array in runner.infer(inputs).items():
            np.testing.assert_allclose(outputs[name], array, rtol=1e-4, atol=1e-4, err_msg=name)
    for one in found:
        assert one.where
        shares = outputs[one.output]
        assert shares.shape == (bucket.batch, budget.tokens_in)
        assert (shares >= 0).all()
        assert (shares.sum(axis=1) < 1 + 1e-5).all()
    joined = join_layers(opened.manifest, bucket, {}, chosen={}, reads=[(r.where, outputs[r.output]) for r in found])
    if found and joined.layers:
        assert [layer.counts for layer in joined.layers] == [(0, 0, 0)] * len(found)
        assert all(layer.score_range[1] > layer.score_range[0] for layer in joined.layers)


def check_row(manifest, bucket, outputs, nodes, chosen, row):
    budget, known = bucket.budget, {"nodes": nodes, "chosen": chosen, "row": row}
    end = read_end(manifest, bucket, outputs, row=row)
    composed = compose_layers(nodes, chosen, patches=budget.tokens_in, tokens_out=budget.tokens_out, row=row)
    joined = join_layers(manifest, bucket, outputs, **known)
    if manifest.placement == "inside":
        assert not composed.problem
        assert len(composed.layers) > 1
        assert composed.layers[-1].rows.tolist() == end.rows.tolist()
        left = [layer.tokens for layer in composed.layers]
        assert left == sorted(left, reverse=True)
        assert left[-1] == end.tokens == budget.tokens_out
        # a graph of logits gives no map, and its layers are made of the choices alone
        bare = {name: array for name, array in outputs.items() if name not in MAPS}
        blind = join_layers(manifest, bucket, bare, **known)
        assert [layer.rows.tolist() for layer in blind.layers] == [layer.rows.tolist() for layer in joined.layers]
        assert any("held to nothing" in note for note in blind.notes)
    if joined.layers:  # not where tokens make no square
        assert joined.layers[-1].rows.tolist() == end.rows.tolist()
        assert not any("the end alone" in note for note in joined.notes)
    if "size" in outputs and "count" not in outputs:
        sizes = np.bincount(end.rows[end.rows >= 0], minlength=budget.tokens_out)
        assert sizes.tolist() == outputs["size"][row, -budget.tokens_out :, 0].tolist()
