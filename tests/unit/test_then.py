"""Two methods in a row: one bundle, whose parts and whole are held to the originals."""

from __future__ import annotations

import functools

import msgspec
import numpy as np
import pytest
import torch

import edgecomp
from edgecomp import api
from edgecomp.backbones.assemble import assemble
from edgecomp.bundle import golden_key, open_bundle
from edgecomp.compressors._chain import Chain
from edgecomp.errors import InvalidSpec, UnknownName, WeightsError
from edgecomp.export.cut import write_half
from edgecomp.parity import CASES, check_bucket, read_goldens
from edgecomp.runners.chain import open_graph
from edgecomp.specs import load_recipe
from edgecomp.specs.order import Order
from edgecomp.specs.recipe import Then, followed_by

FIRST = "spatial-frequency-protect"
ROW = {"preset": "smoke-host", "then": "tome", "between": 11}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function that exports a row of two methods, once for each set of options."""
    folder = tmp_path_factory.mktemp("rows")

    @functools.cache
    def export(method, items):
        return api.export(method, out=folder / str(abs(hash((method, items)))), **dict(items)).bundle

    return lambda method=FIRST, **options: open_bundle(
        export(method, tuple((key, tuple(v) if isinstance(v, list) else v) for key, v in options.items()))
    )


def _assemble(first, second, *, preset="", between=0, dtype=torch.float64, params=None, **order):
    recipe = followed_by(load_recipe(first), Then(second, order.pop("then_preset", ""), params or {}, between))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return assemble(Order(recipe=recipe, preset=preset, **order))
    finally:
        torch.set_default_dtype(before)


def _inputs(model, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for spec in model.input_specs(2):
        if spec.dtype == "bool":
            found.append(torch.arange(spec.shape[-1]).expand(spec.shape) < spec.shape[-1] - 3)
        else:
            found.append(torch.randn(spec.shape, generator=generator, dtype=torch.float64))
    return found


ROWS = [
    (FIRST, "smoke-host", "tome", 11, "4", {}, {"merged": (4, 64), "size": (4, 1), "source_map": (16,)}),
    (FIRST, "smoke", "attention-pruning", 9, "5", {"score": "norm"}, {"kept": (5, 16), "index": (5,)}),
    ("tome", "smoke-given", "tome", 12, "7", {}, {"merged": (7, 16), "size": (7, 1), "source_map": (21,)}),
    ("tome", "smoke-given", "attention-pruning", 12, "5", {"score": "norm"},
     {"kept": (5, 16), "source_map": (21,), "first_size": (12, 1)}),
    ("attention-pruning", "smoke", "tome", 9, "5", {}, {"merged": (5, 16), "size": (5, 1), "source_map": (21,)}),
    ("perceiver", "smoke-host", "attention-pruning", 8, "3", {"score": "norm"}, {"kept": (3, 64), "then_index": (3,)}),
    ("llava-uhd", "smoke-host", "attention-pruning", 9, "4", {"score": "norm"}, {"kept": (4, 32), "then_index": (4,)}),
    (FIRST, "smoke", "perceiver", 20, "16", {"num_heads": 2, "head_dim": 8, "depth": 1},
     {"latents": (16, 16), "first_index": (20,)}),
    ("slow-fast", "smoke", "tome", 9, "5", {},
     {"merged": (5, 16), "size": (5, 1), "source_map": (20,), "first_text_kept": (4, 12), "first_text_index": (4,)}),
]  # fmt: skip


@pytest.mark.parametrize(("first", "preset", "second", "between", "budget", "params", "gives"), ROWS)
def test_the_row_is_the_originals_in_a_row(first, preset, second, between, budget, params, gives):
    assembly = _assemble(first, second, preset=preset, between=between, budgets=(budget,), params=params)
    (model,) = assembly.models
    assert isinstance(model.compressor, Chain)
    assert {spec.name: spec.shape[1:] for spec in model.output_specs()} == gives
    assert (model.compressor.budget.tokens_out, assembly.then.between) == (int(budget), between)
    inputs = _inputs(model)
    with torch.inference_mode():
        got, expected = model(*inputs), model.reference()(*inputs)
    for spec, one, other in zip(model.output_specs(2), got, expected, strict=True):
        assert tuple(one.shape) == spec.shape
        assert one.dtype == other.dtype
        assert float((one.double() - other.double()).abs().max()) <= 1e-10, spec.name


def test_maps_go_from_end_to_end():
    """A token's row holds it: merged tokens are the means of those that the map sends there."""
    assembly = _assemble(FIRST, "tome", preset="smoke", between=9, budgets=("6",))
    (model,) = assembly.models
    (tokens,) = _inputs(model)
    with torch.inference_mode():
        merged, size, source_map = model(tokens)
    assert int((source_map < 0).sum()) == 2 * (20 - 9)
    for row in range(2):
        for place in range(6):
            members = tokens[row][source_map[row] == place]
            assert len(members) == int(size[row, place])
            assert torch.allclose(members.mean(0), merged[row, place])


def test_sizes_count_the_tokens_of_the_first():
    assembly = _assemble("tome", "tome", preset="smoke-given", between=12, budgets=("7",))
    (model,) = assembly.models
    with torch.inference_mode():
        _, size, source_map = model(*_inputs(model))
    counts = torch.stack([torch.bincount(row, minlength=7) for row in source_map])
    assert torch.equal(size[..., 0].long(), counts)


@pytest.mark.parametrize("stem", [True, False], ids=["parts", "whole"])
def test_a_bundle_holds_the_row(made, stem):
    opened = made(**ROW, budget=[4, 7], stem=stem)
    manifest = opened.manifest
    assert manifest.methods == "spatial-frequency-protect then tome"
    assert (manifest.then.method, manifest.then.preset, manifest.then.between) == ("tome", "given", 11)
    assert manifest.recipe.then == Then("tome", between=11)
    assert [bucket.budget.tokens_out for bucket in manifest.buckets] == [4, 7]
    assert len(manifest.stem) == stem
    report = api.parity(opened.path, selection=True)
    assert report
    models = {row.model for row in report.outputs}
    whole = {"model.m4.b1.onnx", "model.m7.b1.onnx"}
    fronts = ["stem.onnx"] if stem else whole
    parts = {f"{name} ({FIRST} alone)" for name in fronts} | {f"{name} (tome alone)" for name in whole}
    assert models == whole | parts
    assert {part.model for part in report.selection} == models
    wheres = {choice.where for part in report.selection if part.model in whole for choice in part.choices}
    assert wheres == {"compressor.first", "compressor.second"}


def test_a_fault_in_either_half_of_one_graph_is_named(made, tmp_path):
    """The halves are cut out of the graph itself: a node that is wrong there is wrong in its half alone."""
    import shutil

    import onnx_ir as ir

    opened = made(**ROW, budget=[4, 7], stem=False)
    first, second = opened.manifest.parts_of(opened.manifest.buckets[0])
    assert [spec.name for spec in first.outputs] == [spec.name for spec in second.inputs]
    assert first.outputs[0].shape == (1, 11, 64)
    for half, wrong in ((first, "backbone"), (second, "compressor.second")):
        folder = tmp_path / half.half
        folder.mkdir()
        shutil.copy(opened.path / "weights.data", folder)
        model = ir.load(opened.path / half.model)
        _spoil(model, wrong)
        ir.save(model, folder / half.model)
        missed = set()
        for part in (first, second):
            write_half(folder / half.model, folder / "half.onnx", part)
            with open_graph("onnxruntime", opened, part, threads=1, model=folder / "half.onnx") as runner:
                rows = check_bucket(runner, part, read_goldens(opened.path), opened.manifest.recipe.tolerances["fp32"])
            missed |= {part.half for row in rows if not row}
        assert missed == {half.half}


def _spoil(model, module):
    """Double what a module's last node of floating-point numbers gives."""
    import onnx_ir as ir

    nodes = [node for node in model.graph if node.metadata_props.get("edgecomp.module", "").startswith(module)]
    value = next(node.outputs[0] for node in reversed(nodes) if node.outputs[0].dtype == ir.DataType.FLOAT)
    name, shown = value.name, value.is_graph_output()
    twice = ir.node("Add", [value, value])
    twice.outputs[0].shape, twice.outputs[0].type = value.shape, value.type
    value.replace_all_uses_with(twice.outputs[0], replace_graph_outputs=True)
    twice.replace_input_with(0, value)
    twice.replace_input_with(1, value)
    model.graph.insert_after(value.producer(), twice)
    if shown:
        value.name, twice.outputs[0].name = f"inner.{name}", name


def test_a_fault_in_either_part_is_named(made, tmp_path):
    import onnx_ir as ir
    from safetensors.numpy import save

    opened = made(**ROW, budget=[4, 7], stem=True)
    goldens = read_goldens(opened.path)
    (part, *_) = opened.manifest.parts_of(opened.manifest.buckets[0])
    assert part.outputs[0].name == "handed"
    for case in CASES:
        key = golden_key("output", case, "handed", part="stem")
        assert goldens[key].shape == (1, 11, 64)
    assert ir.load(opened.path / "stem.onnx").graph.outputs[0].name == "handed"
    wrong = {**goldens, key: goldens[key] + 1}
    assert len(save(wrong)) == len(save(goldens))
    tolerance = opened.manifest.recipe.tolerances["fp32"]
    with open_graph("onnxruntime", opened, part, threads=1) as runner:
        rows = check_bucket(runner, part, wrong, tolerance)
    missed = [(row.model, row.case, row.output) for row in rows if not row]
    assert missed == [("stem.onnx (spatial-frequency-protect alone)", CASES[-1], "handed")]


def test_profile_names_the_method_of_each_stage(made):
    opened = made(**ROW, budget=[4, 7], stem=True)
    report = api.profile(opened.path, budget=4, threads=1, runs=5, warmup_s=0.01, duration_s=0.05)
    stages = {stage.name: stage.how for profile in report.profiles for stage in profile.stages}
    assert stages["stem"].startswith("test_vit and spatial-frequency-protect; ")
    assert stages["behind the stem"].startswith("tome; ")


def test_parts_in_a_row_are_the_whole_graph(made):
    parts, whole = (made(**ROW, budget=[4, 7], stem=stem) for stem in (True, False))
    goldens = read_goldens(parts.path)
    for one, other in zip(parts.manifest.buckets, whole.manifest.buckets, strict=True):
        inputs = {"image": goldens[golden_key("input", "photo", "image")]}
        with open_graph("onnxruntime", parts, one, threads=1) as chain, open_graph(
            "onnxruntime", whole, other, threads=1
        ) as single:  # fmt: skip
            expected, got = single.infer(inputs), chain.infer(inputs)
        for name, array in expected.items():
            assert np.array_equal(got[name], array), name


def test_half_precision_holds_each_part(made):
    opened = made(**ROW, budget=7, precision="fp16")
    assert opened.manifest.stem[0].precision == "fp16"
    assert api.parity(opened.path)


def test_a_resampler_and_what_prunes_its_latents(tmp_path):
    """LLaVA-UHD's queries have no attention of a class token: they are chosen by their norm."""
    options = {"preset": "smoke-host", "then": "attention-pruning", "budget": 4, "out": tmp_path / "row"}
    with pytest.raises(InvalidSpec, match=r"llava-uhd then attention-pruning: .* reads class_attention"):
        api.export("llava-uhd", **options)
    opened = open_bundle(api.export("llava-uhd", **options, then_params={"score": "norm"}).bundle)
    assert opened.manifest.then.between == 9
    report = api.parity(opened.path, selection=True)
    assert report
    assert {row.model for row in report.outputs} == {
        "model.m4.b1.onnx",
        "stem.onnx (llava-uhd alone)",
        "model.m4.b1.onnx (attention-pruning alone)",
    }


def test_what_is_needed_besides_goes_to_its_part(made):
    """A query is the second method's own input."""
    opened = made(preset="smoke", then="query-aware", between=12, budget=5)
    assert [spec.name for spec in opened.manifest.buckets[0].inputs] == ["tokens", "query"]
    assert [spec.name for spec in opened.manifest.stem[0].inputs] == ["tokens"]
    assert api.parity(opened.path)
    assert api.estimate(opened.path, target="orin-nano")


def test_a_recipe_names_the_second_method(tmp_path):
    from edgecomp.specs._toml import to_toml

    recipe = followed_by(load_recipe(FIRST), Then("tome", params={"order": "ascending"}, between=11))
    path = tmp_path / "row.toml"
    path.write_text(to_toml(recipe))
    report = api.export(recipe=path, preset="smoke-host", budget=5, out=tmp_path / "row")
    assert report.manifest.then.params["order"] == "ascending"
    assert report.manifest.then.between == 11
    again = api.export(recipe=path, preset="smoke-host", budget=5, out=tmp_path / "row")
    assert again.reused


# -- what cannot be in a row ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "options", "words"),
    [
        ("perceiver", {"preset": "smoke", "then": "tome", "between": 4},
         r"perceiver gives latents float32\[1, 2, 4, 32\], and tome takes tokens \[B, N, D\]; .* params.images=1"),
        ("llava-uhd", {"preset": "smoke", "then": "tome"}, "one image in a request with --set params.images=1"),
        (FIRST, {"preset": "smoke", "then": "attention-pruning", "between": 9, "budget": 4},
         r"spatial-frequency-protect then attention-pruning: attention-pruning reads class_attention of an encoder"),
        (FIRST, {"preset": "smoke", "then": "lookupvit", "then_preset": "smoke", "between": 9},
         r"spatial-frequency-protect then lookupvit: preset smoke of lookupvit stands encoder"),
        (FIRST, {"preset": "smoke", "then": "evit", "between": 9},
         r"spatial-frequency-protect then evit: evit stands inside, and behind spatial-frequency-protect it is handed"),
        ("tome", {"preset": "smoke", "then": "tome"}, r"tome then tome: tome stands inside its host here"),
        ("tome", {"preset": "smoke-given", "then": "tome"},
         r"tome then tome: tome has the budgets 5, 12 where nothing is said, and hands .* example --between 5"),
        (FIRST, {"preset": "smoke", "then": "tome", "between": 9, "budget": 10}, r"protect then tome: budget 10 .* 9"),
        (FIRST, {"preset": "smoke", "then": "tome", "between": 5},
         "then tome: --between 5: budget 5 is not possible for spatial-frequency-protect; it must be from 6 to 20"),
        (FIRST, {"preset": "smoke", "then": "tome", "between": 25}, "--between 25: budget 25 is above the 20 tokens"),
        ("tome", {"preset": "smoke-given", "then": FIRST, "between": 12}, r"no square grid; set then.grid_height to 2"),
        ("tome", {"preset": "smoke-threshold", "then": "attention-pruning", "budget": 4,
          "then_params": {"score": "norm"}},
         r"tome then attention-pruning: tome fills rows up .* attention-pruning takes no mask \[1, 20\]"),
        (FIRST, {"preset": "smoke", "then": "tome", "between": 9, "then_params": {"embed_dim": 8}},
         r"then.embed_dim=8 was set, and the tokens of spatial-frequency-protect say 16"),
        (FIRST, {"preset": "smoke", "then": "slow-fast", "between": 9,
                 "then_params": {"words": 7}, "then_preset": "smoke"}, "9 tokens are no 4 equal rows"),
        ("deepseek-ocr", {"preset": "smoke", "then": "c-abstractor"},
         r"deepseek-ocr then c-abstractor: .* 7 tokens in are no square grid.*--set then\.grid_rows=ROWS"),
        (FIRST, {"preset": "smoke", "between": 9}, "--between: there is one method; name the second with --then"),
        (FIRST, {"preset": "smoke", "then": "tome", "between": -1}, "--between -1 is below 0"),
    ],
)  # fmt: skip
def test_a_row_that_does_not_fit_is_refused(first, options, words, tmp_path):
    with pytest.raises(InvalidSpec, match=words):
        api.export(first, out=tmp_path / "row", **options)
    assert not (tmp_path / "row").exists()


def test_names_and_files_that_are_not_there(tmp_path):
    with pytest.raises(UnknownName, match="no method 'tom'; did you mean 'tome'"):
        api.export(FIRST, preset="smoke", then="tom", out=tmp_path / "row")
    with pytest.raises(WeightsError, match=r"weights file absent\.pt is not there"):
        api.export(FIRST, preset="smoke", then="query-aware", then_weights="absent.pt", out=tmp_path / "row")
    with pytest.raises(InvalidSpec, match=r"--then-weights there\.pt: there is one method"):
        api.export(FIRST, preset="smoke", then_weights="there.pt", out=tmp_path / "row")


def test_three_in_a_row_are_refused(cli, tmp_path, monkeypatch):
    """By the command line, by a recipe that names the second itself, and by a second whose recipe names a third."""
    from edgecomp.specs import recipe as recipes
    from edgecomp.specs._toml import to_toml

    monkeypatch.chdir(tmp_path)
    said = cli("export", "--method", FIRST, "--then", "tome", "--then", "perceiver")
    assert said.code == 2
    assert "--then tome --then perceiver: two methods stand in a row, not three" in said.err
    own = followed_by(load_recipe(FIRST), Then("tome", between=11))
    (tmp_path / "row.toml").write_text(to_toml(own))
    with pytest.raises(InvalidSpec, match=f"{FIRST} then tome, as its recipe says, then perceiver: two methods"):
        api.export(recipe=tmp_path / "row.toml", then="perceiver")
    load = recipes.load_recipe
    third = msgspec.structs.replace(load("tome"), then=Then("perceiver"))
    monkeypatch.setattr(recipes, "load_recipe", lambda name: third if name == "tome" else load(name))
    with pytest.raises(InvalidSpec, match=f"{FIRST} then tome then perceiver, as the recipe of tome says"):
        followed_by(load(FIRST), Then("tome"))
    assert [path.name for path in tmp_path.iterdir()] == ["row.toml"]


def test_a_mask_goes_on(made):
    """Rows that the first method fills up are masked for the second."""
    opened = made("tome", preset="smoke-threshold", then="perceiver", then_preset="smoke-cross-only", budget=4)
    assert [spec.name for spec in opened.manifest.stem[0].outputs][:2] == ["handed", "handed_mask"]
    assert api.parity(opened.path)


# -- weights of the second, and routers -------------------------------------------------------------------------


def test_weights_of_the_second_are_given_again(made, tmp_path):
    """A bundle whose second method has weights from a file is made again with that file, and with no other."""
    second = edgecomp.compressor("perceiver", preset="smoke-cross-only", tokens=9, context_dim=16, seed=3)
    file, other = second.save(tmp_path / "own.safetensors"), tmp_path / "other.safetensors"
    edgecomp.compressor("perceiver", preset="smoke-cross-only", tokens=9, context_dim=16, seed=4).save(other)
    options = {"preset": "smoke", "then": "perceiver", "then_preset": "smoke-cross-only", "between": 9, "budget": 4}
    opened = open_bundle(api.export(FIRST, **options, then_weights=file, out=tmp_path / "row").bundle)
    assert (opened.manifest.then.weights.kind, opened.manifest.then.weights.name) == ("file", file.name)
    assert api.parity(opened.path, runner="torch", then_weights=file)
    assert not api.parity(opened.path, per_layer=True, then_weights=file).culprits
    assert api.profile(
        opened.path, original=True, then_weights=str(file), runs=2, warmup_s=0, duration_s=0.01, stages=False
    )
    for given in ("random", other):
        with pytest.raises(InvalidSpec, match=rf"--then-weights {given} is not that; give --then-weights FILE"):
            api.parity(opened.path, runner="torch", then_weights=given)


def test_weights_of_a_second_method_that_there_is_not(tmp_path):
    opened = open_bundle(api.export("tome", preset="smoke-given", budget=5, out=tmp_path / "one").bundle)
    with pytest.raises(InvalidSpec, match=r"--then-weights some\.pt: the bundle is of tome alone"):
        api.parity(opened.path, runner="torch", then_weights="some.pt")


def test_a_router_chooses_among_the_buckets_of_the_second(tmp_path):
    """By the score of the second, on what the first hands over."""
    opened = open_bundle(
        api.export(FIRST, preset="smoke-host", then="attention-pruning", between=11, budget=[4, 7],
                   then_params={"score": "norm"}, router="coverage", out=tmp_path / "row").bundle
    )  # fmt: skip
    (graph,) = opened.manifest.routers
    assert graph.stem == "stem.onnx"
    report = api.parity(opened.path)
    assert report
    assert any(row.model.startswith("routed to") for row in report.outputs)


@pytest.mark.parametrize(("router", "reads"), [("detail", "image"), ("difficulty", "image"), ("policy", "handed")])
def test_a_router_reads_the_image_or_what_is_handed_over(router, reads):
    order = {"preset": "smoke-host", "between": 11, "budgets": ("4", "7"), "router": router}
    made = _assemble(FIRST, "tome", **order, dtype=torch.float32).router
    assert made.input_specs()[0].name == reads
    assert made.site.tokens_in == 11


@pytest.mark.parametrize(
    ("router", "options", "words"),
    [
        ("complexity", {"preset": "smoke-host", "then": "tome", "between": 9}, "the 9 tokens .* lie on none"),
        ("coverage", {"preset": "smoke-host", "then": "tome", "between": 9}, "of which this method makes none"),
        ("policy", {"preset": "smoke", "then": "tome", "between": 9}, "of two in a row an image is routed"),
    ],
)
def test_a_router_that_does_not_fit_a_row_is_refused(router, options, words, tmp_path):
    with pytest.raises(InvalidSpec, match=words):
        api.export(FIRST, budget=[4, 7], router=router, out=tmp_path / "row", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("second", "told"), [("c-abstractor", True), ("attention-pruning", False)]
)  # the second of which reads tokens one by one
def test_a_grid_of_chosen_tokens_is_told(second, told):
    params = {"output_dim": 16, "depth": 1, "hidden_dim": 16} if told else {"score": "norm"}
    made = _assemble(FIRST, second, preset="smoke", between=9, budgets=("4",), params=params, dtype=torch.float32)
    assert told == any(
        "c-abstractor reads the 9 tokens as a grid" in note and f"{FIRST} chooses or merges" in note
        for note in made.notes
    )


@pytest.mark.parametrize(
    ("first", "preset", "params", "between", "is_said"),
    [
        ("perceiver", "smoke-idefics1", {}, 4, True),
        ("query-decoder", "smoke", {}, 4, True),
        ("query-aware", "smoke-latents", {"latents": 4}, 4, True),
        ("resampler-2d", "smoke", {}, 9, False),
        ("matryoshka", "smoke", {}, 9, False),
    ],
)
def test_learned_queries_read_as_a_grid_are_said(first, preset, params, between, is_said):
    recipe = followed_by(load_recipe(first), Then("matryoshka", "smoke", {}, between))
    made = assemble(Order(recipe=recipe, preset=preset, params=params, budgets=("1",)))
    assert any("learned queries, which stand for no places in the image" in note for note in made.notes) == is_said
