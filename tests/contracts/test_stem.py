"""Contract 13: the stem and what each bucket has of its own, in a row, are the whole graph, bit for bit."""

from __future__ import annotations

import functools
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from conftest import SEED, Smoke

from edgecomp import api
from edgecomp.backbones.inside import InsideModel
from edgecomp.backbones.seam import Rest, Stem, find_seam
from edgecomp.bundle import golden_key, open_bundle
from edgecomp.parity import CASES, read_goldens
from edgecomp.runners import open_runner
from edgecomp.runners.chain import open_graph
from edgecomp.specs import load_recipe


@pytest.fixture(scope="session")
def two_budgets(assembled):
    """Return a function that gives two or more budgets of a preset, where its default is one; or the only one."""

    @functools.cache
    def choose(smoke):
        if len(smoke.budgets) > 1:
            return tuple(sorted(smoke.budgets))
        (only,) = smoke.budgets
        rule, most = smoke.recipe.rule(smoke.preset), assembled(smoke).models[0].compressor.budget.tokens_in
        others = [count for count in range(1, most + 1) if count != only and rule.allows(count)]
        return tuple(sorted((only, *others[:1])))

    return choose


def _has_host(assembly):
    return assembly.placement != "encoder" and assembly.backbone != "none"


def _require_seam(assembly):
    """Skip a preset whose models share nothing, after a look at why."""
    seams = [model.seam for model in assembly.models]
    if not _has_host(assembly):
        assert seams == [None] * len(seams)
        assert find_seam(assembly.models) is None
        pytest.skip(f"placement {assembly.placement}, backbone {assembly.backbone}: there is no host to share")


def test_the_parts_in_a_row_are_the_whole(smoke, assembled, two_budgets, make_inputs):
    """In fp64, as the modules stand and as they are exported (with what is folded into matrices)."""
    _require_seam(assembled(smoke, dtype="float64"))
    budgets = two_budgets(smoke)
    if len(budgets) == 1:
        pytest.skip(f"{budgets[0]} is the only budget of this preset")
    assembly = assembled(smoke, budgets=budgets, dtype="float64")
    seam = find_seam(assembly.models)
    assert seam == assembly.seam == min(model.seam for model in assembly.models)
    for case, inputs in make_inputs(assembly, dtype="float64").items():
        for folded in (False, True):
            with ExitStack() as stack, torch.inference_mode():
                for model in assembly.models if folded else ():
                    stack.enter_context(model.as_exported() if isinstance(model, InsideModel) else ExitStack())
                stem = Stem(assembly.models[-1], seam)
                handed = stem(inputs[0])
                assert [tuple(value.shape) for value in handed] == [spec.shape for spec in stem.output_specs(2)]
                for model in assembly.models:
                    where = f"{case}, budget {model.compressor.budget.tokens_out}, folded {folded}"
                    for own, shared in zip(Stem(model, seam)(inputs[0]), handed, strict=True):
                        assert torch.equal(own, shared), where
                    rest = Rest(model, seam)
                    assert len(rest.input_specs()) == len(handed) + len(inputs) - 1
                    chained, whole = rest(*handed, *inputs[1:]), model(*inputs)
                    for spec, one, other in zip(rest.output_specs(2), chained, whole, strict=True):
                        assert tuple(one.shape) == spec.shape, where
                        assert torch.equal(one, other), f"{where}, {spec.name}"


def test_one_model_has_no_seam(smoke, assembled):
    """There is nobody to share with."""
    assembly = assembled(smoke)
    assert find_seam(assembly.models[:1]) is None


@pytest.fixture(scope="session")
def parts_of(tmp_path_factory):
    """Return a function that exports the two smallest budgets of a preset as stem and rests; `bundle_of` has wholes."""

    @functools.cache
    def export(smoke):
        options = {"budget": sorted(smoke.budgets)[:2], "batch": max(smoke.batches), "seed": SEED}
        folder = tmp_path_factory.mktemp("stems") / f"{smoke.method}-{smoke.preset}"
        return open_bundle(api.export(smoke.method, preset=smoke.preset, out=folder, **options).bundle)

    return export


@pytest.fixture
def both(sampled_method, assembled, parts_of, bundle_of):
    """Return a method's first preset with a host and several budgets: a bundle with a stem, and one of whole graphs."""
    smokes = [Smoke(sampled_method, preset) for preset in load_recipe(sampled_method).smoke_presets]
    hosted = [smoke for smoke in smokes if _has_host(assembled(smoke))]
    found = [smoke for smoke in hosted if len(smoke.budgets) > 1]
    if not found:
        seams = [assembled(smoke).seam for smoke in smokes]
        assert seams == [None] * len(smokes)
        why = "one budget behind their host" if hosted else "no host"
        pytest.skip(f"the smoke presets of {smokes[0].method} have {why}")
    return found[0], parts_of(found[0]), bundle_of(found[0])


def _pairs(parts, whole):
    """Return the buckets that both bundles have."""
    found = [(own, it) for own in parts.manifest.buckets for it in whole.select(batch=own.batch)]
    found = [(own, it) for own, it in found if own.budget == it.budget]
    assert found
    return found


def test_graphs_in_a_row_are_the_whole_graph(both):
    """In ONNX Runtime, whose optimiser sees other graphs on each side."""
    _, parts, whole = both
    goldens = read_goldens(parts.path)
    for name, array in read_goldens(whole.path).items():
        assert name not in goldens or np.array_equal(goldens[name], array), name
    for threads in (1, 2):
        for own, all_in_one in _pairs(parts, whole):
            assert (own.inputs, own.outputs) == (all_in_one.inputs, all_in_one.outputs)
            with (
                open_graph("onnxruntime", parts, own, threads=threads) as chain,
                open_runner("onnxruntime", whole.path / all_in_one.model, threads=threads) as single,
            ):
                assert set(chain.input_names) == set(single.input_names)
                assert chain.output_names == single.output_names
                for case in CASES:
                    inputs = {spec.name: goldens[golden_key("input", case, spec.name)] for spec in own.inputs}
                    expected, got = single.infer(inputs), chain.infer(inputs)
                    for name, array in expected.items():
                        assert got[name].dtype == array.dtype
                        assert np.array_equal(got[name], array), (own.model, threads, case, name)


def test_the_manifest_names_the_stem(both, assembled):
    smoke, parts, whole = both
    assembly = assembled(smoke)
    (stem,) = parts.manifest.stem
    assert parts.file(stem.model).role == "stem"
    assert [bucket.stem for bucket in parts.manifest.buckets] == [stem.model] * 2
    assert stem.inputs == assembly.models[0].input_specs(stem.batch)[:1]
    assert stem.outputs == assembly.models[0].seam_specs(stem.batch)
    assert (whole.manifest.stem, {bucket.stem for bucket in whole.manifest.buckets}) == ((), {""})
    for bucket, all_in_one in _pairs(parts, whole):
        assert 0 < stem.flops <= bucket.flops  # the stem's are in it; what prunes has none of its own
        assert bucket.flops == all_in_one.flops
        assert sum(bucket.ops.values()) < sum(all_in_one.ops.values())
