"""Contract 12: a graph with a plausible mistake in it fails the parity check.

A mutation lists the places of a graph where it can strike, each as a function that changes the graph. It strikes
nodes of the compressor only: the host is not rewritten, and with random weights its heads are nearly alike.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import onnx_ir as ir
import pytest

from edgecomp.bundle import golden_key
from edgecomp.export.modules import module_of
from edgecomp.export.passes import add_merge_body
from edgecomp.parity import CASES, ParityReport, check_bucket, read_goldens
from edgecomp.runners import open_runner

# -- mutations: a graph -> the changes that can be made to it -------------------------------------------------


def dropped_residual(model, bucket):
    """A residual sum passes its branch alone."""
    return [lambda a=add, b=branch: _bypass(a, b) for add, _, branch in _residuals(model)]


def identity(model, bucket):
    """Every residual sum passes its skip alone: the blocks do nothing."""
    found = _residuals(model)
    if not found:
        return []

    def change():
        for add, skip, _ in reversed(found):
            _bypass(add, skip)

    return [change]


def wrong_head(model, bucket):
    """Head 0 attends as head 1 does."""
    changes = []
    for node in _softmaxes(model):
        heads = node.outputs[0].shape[1]
        if heads > 1:
            changes.append(lambda n=node, h=heads: _gather_after(model, n, [1, *range(1, h)], axis=1))
    return changes


def wrong_table(model, bucket):
    """A constant table (positions, latents, resize) is read from its second row on."""
    tables = {}
    for node in _own_nodes(model):
        for position, value in enumerate(node.inputs):
            tensor = ir.convenience.get_const_tensor(value) if value is not None else None
            if tensor is None or len(tensor.shape) < 2:
                continue
            # The rows of a Concat's constant may be a set of keys, whose order means nothing.
            if node.op_type in ("Add", "Sub", "Mul") or (
                node.op_type in ("MatMul", "LayerNormalization", "Gather", "Expand") and position == 0
            ):
                rolled = _rolled(tensor.numpy())
                if rolled is not None:
                    tables[value.name] = (value, rolled)
    return [lambda v=value, r=rolled: _set_constant(v, r) for value, rolled in tables.values()]


def transposed_grid(model, bucket):
    """Rows and columns change places: pixels of an image, tokens in raster order (with their masks)."""
    if bucket.inputs[0].kind == "image":
        shape = bucket.inputs[0].shape
        axes = (-3, -2) if bucket.inputs[0].dtype == "uint8" else (-2, -1)
        order = list(range(len(shape)))
        order[axes[0]], order[axes[1]] = order[axes[1]], order[axes[0]]
        return [lambda: _transpose_input(model, order)]
    order = _transposed_order(bucket.inputs[0].shape[-2])
    if order is None:
        return []

    def change():
        for value, spec in zip(model.graph.inputs, bucket.inputs, strict=True):
            axis = len(spec.shape) - (2 if spec.kind == "tokens" else 1)
            if spec.shape[axis] == len(order):  # a query has no place on the grid
                _gather_input(model, value, order, axis=axis)

    return [change]


def wrong_axis(model, bucket):
    """Softmax normalises over queries instead of keys."""
    return [lambda n=node: n.attributes.update({"axis": ir.AttrInt64("axis", 2)}) for node in _softmaxes(model)]


def swapped_kv(model, bucket):
    """Keys and values of one product change places."""
    changes = []
    for node in _own_nodes(model):
        if node.op_type == "Split" and len(node.outputs) == 2 and node.outputs[0].shape == node.outputs[1].shape:
            changes.append(lambda n=node: _swap(*n.outputs))
    return changes


def ignored_mask(model, bucket):
    """The mask says that every token is real."""
    changes = []
    for value, spec in zip(model.graph.inputs, bucket.inputs, strict=True):
        if spec.kind == "mask":
            ones = np.ones(spec.shape, bool)
            changes.append(lambda v=value, o=ones: _replace(v, _constant(model, "all_real", o)))
    return changes


def mirrored_kernel(model, bucket):
    """The kernel of a convolution that shrinks a grid is read from right to left."""

    def change(value):
        kernel = ir.convenience.get_const_tensor(value).numpy()
        _set_constant(value, kernel[..., ::-1])

    return [lambda v=node.inputs[1]: change(v) for node in _shrinking(model)]


def shifted_kernel(model, bucket):
    """Zeros stand in front of a grid alone, and not around it, so that a kernel lies beside its place."""

    def change(node):
        top, left, bottom, right = node.attributes["pads"].as_ints()
        node.attributes["pads"] = ir.AttrInt64s("pads", [top + bottom, left + right, 0, 0])

    padded = [node for node in _shrinking(model) if any(node.attributes["pads"].as_ints())]
    return [lambda n=node: change(n) for node in padded]


def _shrinking(model):
    convolutions = [node for node in _own_nodes(model) if node.op_type == "Conv" and len(node.outputs[0].shape) == 4]
    return [node for node in convolutions if max(node.attributes["strides"].as_ints()) > 1]


def _merge_mutation(model, **attributes):
    """Change an attribute of all merge nodes, and give them the body that goes with it."""
    nodes = [node for node in model.graph if node.op_type == "TopKMerge"]

    def change():
        for node in nodes:
            for name, value in attributes.items():
                kind = ir.AttrString if isinstance(value, str) else ir.AttrInt64
                node.attributes[name] = kind(name, value)
        add_merge_body(model)

    return [change] if nodes else []


def unweighted_mean(model, bucket):
    """Merged tokens are averaged as if each stood for one."""
    return _merge_mutation(model, mode="mean")


def dropped_sources(model, bucket):
    """Tokens that should merge are dropped."""
    return _merge_mutation(model, mode="prune")


def wrong_order(model, bucket):
    """Unmerged tokens come in another order."""
    nodes = [node for node in model.graph if node.op_type == "TopKMerge"]
    order = nodes[0].attributes["order"].as_string() if nodes else ""
    return _merge_mutation(model, order="rank" if order == "ascending" else "ascending")


def one_more_protected(model, bucket):
    """One token more is kept from merging."""
    nodes = [node for node in model.graph if node.op_type == "TopKMerge"]
    if not nodes:
        return []
    prefix = nodes[0].attributes["num_prefix_tokens"].as_int() + 1
    free = min(node.inputs[1].shape[1] - prefix - 2 * node.attributes["r"].as_int() for node in nodes)
    return _merge_mutation(model, num_prefix_tokens=prefix) if free >= 0 else []


def first_r(model, bucket):
    """The first r sources merge, instead of those ranked first: the ranking is of constants."""
    rankings = [(function, node) for function in model.functions.values() for node in function if _ranks(node)]

    def change():
        ((function, ranking),) = rankings
        ranked = ranking.inputs[0]
        zero = ir.Node("", "Sub", [ranked, ranked])
        function.insert_before(ranking, [zero])
        ranking.replace_input_with(0, zero.outputs[0])

    return [change] if rankings else []


def _ranks(node):
    """Whether a node of a merge's body ranks tokens: by their best match, or by the scores that were given."""
    producer = node.inputs[0].producer() if node.op_type == "TopK" else None
    return producer is not None and producer.op_type in ("ReduceMax", "Slice")


def _choices(model):
    """Return the nodes that choose tokens by plain ops; what chooses in a merge's body has mutations of its own."""
    return (
        [] if model.functions else [node for node in _own_nodes(model) if node.op_type in ("TopK", "ArgMax", "ArgMin")]
    )


def _weightless_nodes(model, *kinds):
    """Return nodes of a graph with neither attention nor merge op: one that clusters tokens by plain ops."""
    if _softmaxes(model) or model.functions:
        return []
    return [node for node in _own_nodes(model) if node.op_type in kinds]


def farthest_for_nearest(model, bucket):
    """A choice takes the smallest instead of the largest."""

    def change(node):
        if node.op_type == "TopK":
            largest = node.attributes.get_int("largest", 1)
            node.attributes["largest"] = ir.AttrInt64("largest", 1 - largest)
        else:
            node.op_type = {"ArgMax": "ArgMin", "ArgMin": "ArgMax"}[node.op_type]

    return [lambda n=node: change(n) for node in _choices(model)]


def first_k(model, bucket):
    """The first k tokens are taken, whatever their score."""

    def change(node):
        same = ir.Node("", "Sub", [node.inputs[0], node.inputs[0]])
        model.graph.insert_before(node, [same])
        node.replace_input_with(0, same.outputs[0])

    return [lambda n=node: change(n) for node in _choices(model) if node.op_type == "TopK"]


def swapped_comparison(model, bucket):
    """What should be above is below."""

    def change(node):
        first, second = node.inputs
        node.replace_input_with(0, second)
        node.replace_input_with(1, first)

    return [lambda n=node: change(n) for node in _weightless_nodes(model, "Greater", "Less", "GreaterOrEqual")]


def dropped_division(model, bucket):
    """A mean or a unit vector is left a sum or a vector."""
    one = np.ones((), np.float32)
    nodes = [node for node in _weightless_nodes(model, "Div") if not (_only_looks_for_its_best(node) or _is_even(node))]
    return [lambda n=node: n.replace_input_with(1, _constant(model, "mutant_one", one)) for node in nodes]


def _only_looks_for_its_best(node):
    """Whether rows are only compared with others, for the best of them: their own length changes no order."""
    products = [use.node for use in node.outputs[0].uses() if use.node.op_type == "MatMul" and use.idx == 0]
    readers = [use.node.op_type for product in products for use in product.outputs[0].uses()]
    return bool(products) and len(products) == len(node.outputs[0].uses()) and set(readers) == {"ArgMax"}


def _is_even(node):
    """Whether rows are scaled to length 1 that a LayerNorm has just made nearly as long as each other."""
    made = node.inputs[0].producer()
    if made is not None and made.op_type == "Slice":
        made = made.inputs[0].producer()
    return made is not None and made.op_type == "LayerNormalization"


def _is_plain(model):
    """Whether a graph neither attends, merges nor chooses: it mixes tokens by constants and channels by weights."""
    return not (_softmaxes(model) or model.functions or _choices(model))


def wrong_rows(model, bucket):
    """A matrix meets its channels one place further on: they were joined in another order."""
    changes = []
    for node in _own_nodes(model) if _is_plain(model) else ():
        tensor = ir.convenience.get_const_tensor(node.inputs[1]) if node.op_type == "MatMul" else None
        if tensor is not None and len(tensor.shape) == 2:
            changes.append(lambda v=node.inputs[1], t=tensor: _set_constant(v, np.roll(t.numpy(), 1, 0)))
    return changes


def dropped_activation(model, bucket):
    """What goes into an activation comes out of it."""
    nodes = _own_nodes(model) if _is_plain(model) else []
    changes = [lambda n=node: _bypass(n, n.inputs[0]) for node in nodes if node.op_type in ("Gelu", "Relu")]
    for node in nodes:
        gates = [value.producer() for value in node.inputs] if node.op_type == "Mul" else []
        for gate, value in zip(gates, reversed(node.inputs), strict=True) if len(gates) == 2 else ():
            if gate is not None and gate.op_type == "Sigmoid" and gate.inputs[0] is value:
                changes.append(lambda n=node, v=value: _bypass(n, v))
    return changes


def dropped_transpose(model, bucket):
    """Tokens are joined, or laid out as planes, in the order in which they lie."""
    changes = []
    for node in _own_nodes(model) if _is_plain(model) else ():
        readers = [reader for reader, _ in node.outputs[0].uses()]
        if node.op_type == "Transpose" and readers and all(reader.op_type == "Reshape" for reader in readers):
            changes.append(lambda n=node: _bypass(n, n.inputs[0]))
    return changes


def _averages(model):
    """Return the constant matrices that average tokens: rows of shares that add up to one."""
    found = {}
    for node in _own_nodes(model):
        tensor = ir.convenience.get_const_tensor(node.inputs[0]) if node.op_type == "MatMul" else None
        if tensor is not None and len(tensor.shape) == 2:
            array = tensor.numpy()
            if array.min() >= 0 and np.allclose(array.sum(-1), 1, atol=1e-5) and (array.max(-1) < 1).any():
                found[node.inputs[0].name] = (node.inputs[0], array)
    return found.values()


def first_of_bin(model, bucket):
    """Pooling takes one token of each bin, not their mean."""
    return [
        lambda v=value, a=array: _set_constant(v, np.eye(a.shape[1], dtype=a.dtype)[a.argmax(-1)])
        for value, array in _averages(model)
    ]


def sums_for_means(model, bucket):
    """Pooling adds where it should average; a norm behind it would hide that."""
    if not _is_plain(model) or any("Normalization" in node.op_type for node in model.graph):
        return []
    return [lambda v=value, a=array: _set_constant(v, (a > 0).astype(a.dtype)) for value, array in _averages(model)]


REQUIRED = (dropped_residual, identity, wrong_head, wrong_table, transposed_grid)
MERGING = (unweighted_mean, dropped_sources, wrong_order, one_more_protected, first_r)
SELECTING = (farthest_for_nearest, first_k)
WEIGHTLESS = (farthest_for_nearest, swapped_comparison, dropped_division)
PROJECTING = (dropped_residual, identity, transposed_grid, wrong_rows, dropped_activation)
POOLING = (dropped_transpose, first_of_bin, sums_for_means)
SHRINKING = (mirrored_kernel, shifted_kernel)
OTHERS = (wrong_rows, dropped_activation, *POOLING, *SHRINKING)
MUTATIONS = (*REQUIRED, wrong_axis, swapped_kv, ignored_mask, *MERGING, *WEIGHTLESS, first_k, *OTHERS)
LEAST = 3  # mutations that must apply to each preset

each_mutation = pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda item: item.__name__.replace("_", "-"))


@each_mutation
def test_mutant_fails_parity(smoke, mutation, bundle_of, check, note):
    bundle = bundle_of(smoke)
    bucket = bundle.select(batch=smoke.batches[0])[0]
    count = len(mutation(_load(bundle, bucket), bucket))
    if not count:
        pytest.skip(f"nothing in {bucket.model} for it to strike")
    ratios = []
    for index in range(count):
        model = _load(bundle, bucket)
        mutation(model, bucket)[index]()
        report = check(bundle, bucket, model)
        ratios.append(report.worst.difference.max_rel / smoke.tolerance.max_rel)
        if _is_invariant(smoke, mutation, bucket):
            assert report, "the recipe declares that the order of the tokens cannot change the output"
            continue
        assert not report, (
            f"place {index} of {count}: error {report.worst.difference.max_rel:.3g} passed; if no implementation could "
            "show this change, state it under [invariances] in the recipe"
        )
        assert report.worst.failures
    note(
        f"{mutation.__name__.replace('_', '-'):17} {smoke!s:30} {count:3} places, error / threshold "
        f"{min(ratios):9.3g} to {max(ratios):9.3g}" + (" (invariant)" if _is_invariant(smoke, mutation, bucket) else "")
    )


def test_unmutated_graph_passes(smoke, bundle_of, check):
    """The machinery that loads, saves and checks mutants changes nothing by itself."""
    bundle = bundle_of(smoke)
    for bucket in bundle.manifest.buckets:
        assert check(bundle, bucket, _load(bundle, bucket))


def test_enough_mutations_apply_to_the_preset(smoke, bundle_of):
    bundle = bundle_of(smoke)
    bucket = bundle.select(batch=smoke.batches[0])[0]
    model = _load(bundle, bucket)
    kinds = [m.__name__ for m in MUTATIONS if m(model, bucket) and not _is_invariant(smoke, m, bucket)]
    assert len(kinds) >= LEAST, kinds


def test_every_required_mutation_applies_to_the_method(smokes, bundle_of, assembled):
    """A method that has no weights of its own, nor stands between those of a host, has other mutations."""
    placements = smokes[0].recipe.placements
    has_weights = any(True for smoke in smokes for _ in assembled(smoke).models[0].compressor.parameters())
    first = bundle_of(smokes[0]).manifest.buckets[0]
    selects, merges = any(spec.name == "index" for spec in first.outputs), any("TopKMerge" in op for op in first.ops)
    required = (transposed_grid, *(MERGING if merges else SELECTING if selects else WEIGHTLESS))
    graphs = []
    for smoke in smokes:
        bundle = bundle_of(smoke)
        bucket = bundle.select(batch=smoke.batches[0])[0]
        graphs.append((smoke, bucket, _load(bundle, bucket)))
    if has_weights or "inside" in placements:  # a method that maps a grid to a grid has no heads to exchange
        required = PROJECTING if all(_is_plain(model) for _, _, model in graphs) else REQUIRED
        if required is REQUIRED and not any(_softmaxes(model) or model.functions for _, _, model in graphs):
            required = (transposed_grid, *SELECTING)  # weights that score and merge, and none that attend
    if not any(_residuals(model) for _, _, model in graphs):  # a method without any residual sum has none to lose
        required = tuple(mutation for mutation in required if mutation not in (dropped_residual, identity))
    kinds = set()
    for smoke, bucket, model in graphs:
        kinds |= {m.__name__ for m in required if m(model, bucket) and not _is_invariant(smoke, m, bucket)}
    assert kinds == {mutation.__name__ for mutation in required}


def test_a_transposed_mask_alone_fails(smoke, bundle_of, check):
    """Where the order of tokens means nothing, tokens and their mask must still go together."""
    bundle = bundle_of(smoke)
    bucket = bundle.select(batch=smoke.batches[0])[0]
    order = _transposed_order(bucket.inputs[0].shape[-2])
    masks = [index for index, spec in enumerate(bucket.inputs) if spec.kind == "mask"]
    masks = [index for index in masks if order and bucket.inputs[index].shape[-1] == len(order)]
    if not masks:
        pytest.skip("it takes no mask")
    model = _load(bundle, bucket)
    for index in masks:
        _gather_input(model, model.graph.inputs[index], order, axis=len(bucket.inputs[index].shape) - 1)
    assert not check(bundle, bucket, model)


# -- one wrong element ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planted", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("everywhere", [True, False], ids=["all", "one"])
def test_values_that_are_not_finite_fail(smokes, planted, everywhere, bundle_of, check):
    smoke = smokes[0]
    bundle = bundle_of(smoke)
    bucket = bundle.select(batch=smoke.batches[0])[0]
    spec = bucket.outputs[0]
    place = tuple(size // 2 for size in spec.shape)
    factor = np.ones(spec.shape, np.float32)
    factor[() if everywhere else place] = planted
    model = _load(bundle, bucket)
    _scale_output(model, factor)
    report = check(bundle, bucket, model)
    assert not report
    worst = report.worst
    assert worst.difference.not_finite == (factor.size if everywhere else 1)
    text = "; ".join(worst.failures)
    assert "NaN or Inf" in text
    assert f"at {list(worst.difference.worst)}" in text
    assert f"expected {worst.difference.expected:.6g}" in text
    if not everywhere:
        assert worst.difference.worst == place


def test_the_worst_element_is_named_with_both_values(smokes, bundle_of, check):
    smoke = smokes[0]
    bundle = bundle_of(smoke)
    bucket = bundle.select(batch=smoke.batches[0])[0]
    spec = bucket.outputs[0]
    goldens = read_goldens(bundle.path)
    expected = [goldens[golden_key("output", case, spec.name, part=bucket.golden_part)] for case in CASES]
    least = np.minimum(*(np.abs(one[: bucket.batch].astype(np.float64)) for one in expected))
    place = tuple(int(one) for one in np.unravel_index(least.argmax(), least.shape))  # large in both cases
    factor = np.ones(spec.shape, np.float32)
    factor[place] = 3.0
    model = _load(bundle, bucket)
    _scale_output(model, factor)
    report = check(bundle, bucket, model)
    assert not report
    for row in report.outputs:
        if row.output != spec.name:
            assert row
            continue
        assert row.difference.worst == place
        assert row.difference.got == pytest.approx(3 * row.difference.expected, abs=1e-4)
        text = "; ".join(row.failures)
        for part in (
            str(list(place)),
            f"got {row.difference.got:.6g}",
            f"expected {row.difference.expected:.6g}",
            f"above {smoke.tolerance.max_rel:g}",
        ):
            assert part in text


# -- machinery --------------------------------------------------------------------------------------------------


@pytest.fixture
def check(tmp_path):
    """Return a function that saves a graph and holds it to a bundle's goldens."""
    numbers = itertools.count()

    def run(bundle, bucket, model):
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        ir.save(model, folder / bucket.model)
        tolerance = bundle.manifest.recipe.tolerances[bundle.manifest.precision]
        with open_runner("onnxruntime", folder / bucket.model, threads=1) as runner:
            rows = check_bucket(runner, bucket, read_goldens(bundle.path), tolerance)
            return ParityReport(str(folder), runner.name, runner.version, 1, "fp32", tolerance, rows)

    return run


def _load(bundle, bucket):
    model = ir.load(bundle.path / bucket.model)
    ir.external_data.load_to_model(model)
    return model


def _is_invariant(smoke, mutation, bucket):
    reads_tokens = bucket.inputs[0].kind == "tokens" and all(spec.name != "index" for spec in bucket.outputs)
    return mutation is transposed_grid and reads_tokens and "token-order" in smoke.recipe.invariances


def _own_nodes(model):
    return [node for node in model.graph if not module_of(node).startswith("backbone")]


def _softmaxes(model):
    return [n for n in _own_nodes(model) if n.op_type == "Softmax" and len(n.outputs[0].shape) == 4]


def _residuals(model):
    """Return (sum, skip, branch) of each Add of two activations of one shape; the skip was there first.

    A learned table may be the skip of the first block: it is a constant of the full shape.
    """
    order = {value: index for index, node in enumerate(model.graph) for value in node.outputs}
    found = []
    for node in _own_nodes(model):
        if node.op_type != "Add" or len(node.outputs[0].shape) < 3 or node.outputs[0].is_graph_output():
            continue
        if any(value.shape != node.outputs[0].shape for value in node.inputs):
            continue
        skip, branch = sorted(node.inputs, key=lambda value: order.get(value, -1))
        if branch in order and math.prod(node.outputs[0].shape[1:]) > 1:
            found.append((node, skip, branch))
    return found


def _bypass(node, value):
    """Give a node's readers another value."""
    _replace(node.outputs[0], value)


def _replace(old, new, *, but=()):
    assert not old.is_graph_output(), f"{old.name} has a name to keep"
    for node, index in tuple(old.uses()):
        if node not in but:
            node.replace_input_with(index, new)


def _swap(one, other):
    uses = tuple(one.uses()), tuple(other.uses())
    for pairs, new in zip(uses, (other, one), strict=True):
        for node, index in pairs:
            node.replace_input_with(index, new)


def _constant(model, name, array):
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _set_constant(value, array):
    value.const_value = ir.tensor(np.ascontiguousarray(array), name=value.name)


def _rolled(array):
    """Return the table without its first row, which comes last, or None where its rows are all alike."""
    for axis in range(array.ndim - 2, -1, -1):
        rolled = np.roll(array, 1, axis)
        if np.abs(rolled - array).max() > 0:
            return rolled
    return None


def _gather_after(model, node, indices, *, axis):
    old = node.outputs[0]
    chosen = _constant(model, f"mutant_indices_{old.name}", np.array(indices, np.int64))
    gather = ir.node("Gather", [old, chosen], attributes={"axis": axis})
    _like(gather.outputs[0], old)
    _replace(old, gather.outputs[0], but=(gather,))
    model.graph.insert_after(node, gather)


def _gather_input(model, value, order, *, axis):
    chosen = _constant(model, f"mutant_order_{value.name}", np.array(order, np.int64))
    _insert_after_input(model, value, ir.node("Gather", [value, chosen], attributes={"axis": axis}))


def _transpose_input(model, order):
    (value, *_) = model.graph.inputs
    _insert_after_input(model, value, ir.node("Transpose", [value], attributes={"perm": order}))


def _insert_after_input(model, value, node):
    _like(node.outputs[0], value)
    _replace(value, node.outputs[0], but=(node,))
    model.graph.insert_before(model.graph[0], node)


def _scale_output(model, factor):
    """Multiply the first output of the graph by a constant, keeping its name."""
    old = model.graph.outputs[0]
    name = old.name
    old.name = f"{name}_before"
    scaled = ir.node("Mul", [old, _constant(model, "mutant_factor", factor)])
    _like(scaled.outputs[0], old)
    scaled.outputs[0].name = name
    model.graph.append(scaled)
    model.graph.outputs[0] = scaled.outputs[0]


def _like(new, old):
    new.shape, new.type = old.shape, old.type
    new.name = f"mutant_{old.name}"


def _transposed_order(count):
    """Return the order in which the most square grid of so many tokens is read by columns; None for a line."""
    rows = max(size for size in range(1, math.isqrt(count) + 1) if count % size == 0)
    return None if rows == 1 else np.arange(count).reshape(rows, -1).T.flatten().tolist()
