"""Contract 14: methods stand inside and after the image towers of transformers as they do in timm's transformers."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from conftest import SEED, Smoke
from test_values import LIMITS, _error

from edgecomp import api
from edgecomp.backbones.seam import Rest, Stem, find_seam
from edgecomp.bundle import golden_key, open_bundle
from edgecomp.engines import installed_flavours
from edgecomp.engines.nodes import place_nodes, read_graph
from edgecomp.errors import InvalidSpec
from edgecomp.export.costs import count_costs
from edgecomp.export.golden import run_module
from edgecomp.export.retrace import reassemble
from edgecomp.parity import CASES, read_goldens
from edgecomp.runners.chain import open_graph
from edgecomp.specs import load_recipe, method_names

transformers = pytest.importorskip("transformers")

SIZE = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
CONFIGS = {
    "clip": lambda: transformers.CLIPVisionConfig(**SIZE, intermediate_size=96),
    "siglip": lambda: transformers.SiglipVisionConfig(**SIZE, intermediate_size=96),
    "dinov2": lambda: transformers.Dinov2WithRegistersConfig(**SIZE, mlp_ratio=2, num_register_tokens=4),
}
_QUICK = {"dynamicvit": "siglip", "evit": "dinov2", "visionzip": "clip"}  # `-m slow` has the others
BLOCKS = {"clip": "encoder.layers", "siglip": "encoder.layers", "dinov2": "encoder.layer"}


def presets_in_hosts():
    """Return the smoke presets that stand in or behind a host, the first of each placement of a method."""
    found = {}
    for name in method_names():
        recipe = load_recipe(name)
        for preset in recipe.smoke_presets:
            it = recipe.preset(preset)
            if it.placement in ("inside", "after") and (it.backbone or recipe.defaults.backbone) != "none":
                found.setdefault((name, it.placement), Smoke(name, preset))
    return list(found.values())


HOSTED = presets_in_hosts()
IN_TURN = [(one, _QUICK.get(one.method, list(CONFIGS)[place % len(CONFIGS)])) for place, one in enumerate(HOSTED)]
QUICK = [pair if pair[0].method in _QUICK else pytest.param(*pair, marks=pytest.mark.slow) for pair in IN_TURN]


@pytest.fixture(scope="session")
def tower(tmp_path_factory):
    """Return a function that writes a folder with the configuration of a tower."""

    @functools.cache
    def write(name):
        folder = tmp_path_factory.mktemp("towers") / name
        CONFIGS[name]().save_pretrained(folder)
        return str(folder)

    return write


@pytest.fixture
def placed(tower, make_assembly):
    """Return a function that places a smoke preset in a tower, where the tower has what the method reads."""

    def place(smoke, name, **order):
        try:
            return make_assembly(smoke, backbone=tower(name), backbone_weights="random", **order)
        except InvalidSpec as error:
            if name == "siglip" and "class token" in str(error):
                pytest.skip(str(error))
            raise

    return place


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("one", HOSTED, ids=str)
def test_static_equals_the_original_in_a_tower(one, name, placed, make_inputs):
    assembly = placed(one, name, dtype="float64")
    assert assembly.backbone == name
    for inputs in make_inputs(assembly, dtype="float64").values():
        for model in assembly.models:
            assert _error(model, inputs) <= LIMITS["float64"]
            with torch.inference_mode():
                both, single = model(*inputs), [model(*(v[row : row + 1] for v in inputs)) for row in (0, 1)]
            for index, value in enumerate(both):
                apart = torch.cat([outputs[index] for outputs in single])
                assert float((value.double() - apart.double()).abs().max()) <= 1e-12


def test_logits_of_a_tower(tmp_path, make_assembly, make_inputs):
    """A model for image classification, with nothing removed and with tokens merged inside."""
    config = transformers.Dinov2Config(**SIZE, mlp_ratio=2, num_labels=5)
    config.architectures = ["Dinov2ForImageClassification"]
    config.save_pretrained(tmp_path / "classifier")
    smoke = Smoke("tome", load_recipe("tome").smoke_presets[0])
    order = {"backbone": str(tmp_path / "classifier"), "output": "logits", "dtype": "float64"}
    assembly = make_assembly(smoke, **order)
    (image,) = make_inputs(assembly, dtype="float64")["seeded"]
    with torch.inference_mode():
        for model in assembly.models:
            assert _error(model, [image]) <= LIMITS["float64"]
            assert model(image)[0].shape == (2, 5)
        assert assembly.plain(image)[0].shape == (2, 5)


@pytest.mark.parametrize(("one", "name"), IN_TURN, ids=str)
def test_stem_and_rest_are_the_whole_in_a_tower(one, name, placed, make_inputs):
    assembly = placed(one, name, dtype="float64")
    most = assembly.models[-1].compressor.budget.tokens_in
    rule, used = one.recipe.rule(one.preset), {model.compressor.budget.tokens_out for model in assembly.models}
    other = next((count for count in range(1, most + 1) if rule.allows(count) and count not in used), None)
    budgets = tuple(sorted({*used, other})) if len(used) == 1 and other else tuple(sorted(used))
    try:
        assembly = placed(one, name, budgets=budgets, dtype="float64")
    except InvalidSpec as error:
        pytest.skip(f"one budget alone: {error}")
    if len(budgets) == 1:
        pytest.skip(f"{budgets[0]} is the only budget of this preset")
    seam = find_seam(assembly.models)
    if len(assembly.models) == 1:
        pytest.skip(f"{budgets[0]} is the only budget of this preset")
    assert seam is not None
    inputs = make_inputs(assembly, dtype="float64")["seeded"]
    with torch.inference_mode():
        handed = Stem(assembly.models[-1], seam)(inputs[0])
        for model in assembly.models:
            for part, whole in zip(Rest(model, seam)(*handed, *inputs[1:]), model(*inputs), strict=True):
                assert torch.equal(part, whole)


@pytest.mark.parametrize(("one", "name"), QUICK, ids=str)
def test_the_bundle_of_a_tower(one, name, tower, tmp_path):
    """Exported, checked by ONNX Runtime and named block by block; engines of one of them."""
    words = {"backbone": tower(name), "preset": one.preset, "budget": one.budgets[:1], "seed": SEED}
    try:
        report = api.export(one.method, out=tmp_path / "bundle", **words)
    except InvalidSpec as error:
        if name == "siglip" and "class token" in str(error):
            pytest.skip(str(error))
        raise
    assert report
    manifest = report.manifest
    assert (manifest.backbone, manifest.backbone_weights.kind) == (name, "random")
    assert "transformers" in manifest.tools
    graph = open_bundle(report.bundle).path / manifest.buckets[0].model
    row = BLOCKS[name].rpartition(".")[2]
    rows = {f"{row}.{block}" for block in range(6 + 1 + manifest.feature_layer)}
    labels = set(place_nodes(read_graph(graph).nodes))
    assert {label.removeprefix("backbone.model.encoder.") for label in labels if "compressor" not in label} - {
        ""
    } == rows
    assert rows <= {op.block for op in count_costs(graph).ops}
    made = reassemble(manifest, manifest.buckets[0], weights="random", backbone_weights=tower(name)).models[0]
    goldens = read_goldens(report.bundle)
    inputs = [goldens[golden_key("input", "seeded", spec.name)][:1] for spec in manifest.buckets[0].inputs]
    for spec, array in zip(made.output_specs(), run_module(made, inputs), strict=True):
        expected = goldens[golden_key("output", "seeded", spec.name, part=f"m{manifest.buckets[0].budget.tokens_out}")]
        assert np.abs(array.astype(np.float64) - expected[:1]).max() < 1e-4, spec.name


@pytest.mark.parametrize(
    "name", ["clip", *(pytest.param(name, marks=pytest.mark.slow) for name in ("siglip", "dinov2"))]
)
def test_engines_and_a_router_of_a_tower(name, tower, tmp_path):
    """One method that cuts tokens with a stem in front, and one that merges them where there is no class token."""
    method = "tome" if name == "siglip" else "evit"
    smoke = Smoke(method, load_recipe(method).smoke_presets[0])
    words = {"backbone": tower(name), "preset": smoke.preset, "budget": sorted(smoke.budgets)[:2], "seed": SEED}
    bundle = open_bundle(api.export(method, router="complexity", out=tmp_path / "bundle", **words).bundle)
    assert api.parity(bundle.path, threads=1)
    (stem,) = bundle.manifest.stem
    goldens = read_goldens(bundle.path)
    for bucket in bundle.manifest.buckets:
        assert bucket.stem == stem.model
        with open_graph("onnxruntime", bundle, bucket, threads=1) as chain:
            for case in CASES:
                inputs = {spec.name: goldens[golden_key("input", case, spec.name)] for spec in bucket.inputs}
                assert all(np.isfinite(array).all() for array in chain.infer(inputs).values())
    if "rtx" in installed_flavours():
        engines = api.build(bundle.path, target="a10", runtime="rtx", plugin="off").engines
        assert all(engine.record.size_bytes > 1000 for engine in engines)
