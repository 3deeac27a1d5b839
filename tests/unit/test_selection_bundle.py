"""`edgecomp parity` with --selection, --explain, --self-test, --against, --atol and --bisect, on small bundles."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgecomp.bundle import GOLDEN, open_bundle, seal
from edgecomp.errors import BundleError
from edgecomp.parity import check_selection, read_goldens
from edgecomp.specs import Tolerance

CHOICES = ("model.m12.b2.onnx", "model.m12.b2.forced.onnx")


@pytest.fixture(scope="session")
def merger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of tome on given tokens, two rows; not to be written to, but for its folder parity/."""
    pytest.importorskip("torch")
    from edgecomp import api

    out = tmp_path_factory.mktemp("merger") / "bundle"
    return api.export("tome", preset="smoke-given", budget=[12], batch=[2], out=out).bundle


@pytest.fixture
def copied(merger, tmp_path):
    return shutil.copytree(merger, tmp_path / "bundle", ignore=shutil.ignore_patterns("parity"))


def resealed(bundle: Path, change) -> Path:
    """Change a bundle's files, and give it the manifest that fits."""
    opened = open_bundle(bundle)
    change()
    seal(bundle, opened.manifest, {entry.name: entry.role for entry in opened.manifest.files})
    return bundle


def scaled_scores(bundle: Path, factors) -> None:
    """Multiply what a merge measures similarity on, so that its scores are off."""
    import onnx_ir as ir

    path = bundle / CHOICES[0]
    model = ir.load(path)
    node = next(node for node in model.graph if node.op_type == "TopKMerge")
    value = node.inputs[0]
    table = ir.Value(name="off", const_value=ir.tensor(factors(value.shape), name="off"), shape=value.shape)
    table.type = value.type
    model.graph.register_initializer(table)
    scaled = ir.node("Mul", [value, table])
    scaled.outputs[0].shape, scaled.outputs[0].type = value.shape, value.type
    model.graph.insert_before(node, [scaled])
    node.replace_input_with(0, scaled.outputs[0])
    path.write_bytes(ir.to_proto(model).SerializeToString())


def noise(size, seed=1):
    def make(shape):
        return (1 + size * np.random.default_rng(seed).standard_normal(tuple(shape))).astype(np.float32)

    return make


def test_choices_agree_and_the_closest_call_is_told(cli, merger):
    said = cli("parity", merger, "--explain")
    assert said.code == 0, said.err
    for part in (
        "with the original's choices forced",
        "merge    1.000      0",
        "all 2 choices agree",
        "closest call: ",
    ):
        assert part in said.out, part
    sidecar = json.loads((merger / "parity" / "model.m12.b2.forced.json").read_bytes())
    assert [one["op"] for one in sidecar["choices"]] == ["ArgMax", "TopK"]
    assert not list((merger / "parity").glob("weights*"))


def test_a_forced_graph_that_was_altered_is_made_again(cli, copied):
    assert cli("parity", copied, "--selection").code == 0
    forced = copied / "parity" / CHOICES[1]
    good = forced.read_bytes()
    forced.write_bytes(b"another")
    assert cli("parity", copied, "--selection").code == 0
    assert forced.read_bytes() == good


def test_wrong_scores_fail_by_their_choices_where_the_forced_values_are_right(cli, copied):
    resealed(copied, lambda: scaled_scores(copied, noise(0.5)))
    said = cli("parity", copied, "--explain", "--json")
    report = json.loads(said.out)
    assert said.code == 1
    (part,) = report["selection"]
    assert not [row for row in part["forced"] if row["failures"]]
    wrong = [row for row in part["choices"] if row["failures"]]
    assert wrong
    assert "margin" in wrong[0]["failures"][0]
    assert [row for row in report["outputs"] if row["failures"]]
    text = cli("parity", copied, "--explain").out
    assert "first divergence in each case:" in text
    assert "the original's scores" in text
    assert "verdict: FAIL" in text


def test_a_flip_inside_the_noise_of_a_coarse_type_is_a_tie(copied, merger):
    """Scores a little off, in a type that allows it: the output differs by a token, and the verdict is yes."""
    from edgecomp.api._forced import forced_graph
    from edgecomp.parity import ParityReport, check_bucket
    from edgecomp.runners.chain import open_graph

    coarse = Tolerance(max_rel=0.2, min_cosine=0.5, derivation="as coarse as a type of few bits")
    found = {}
    for seed in range(12):
        shutil.rmtree(copied)
        shutil.copytree(merger, copied, ignore=shutil.ignore_patterns("parity"))
        opened = open_bundle(resealed(copied, lambda seed=seed: scaled_scores(copied, noise(0.05, seed))))
        (bucket,), goldens = opened.manifest.buckets, read_goldens(copied)
        path, forced = forced_graph(opened, bucket)
        with open_graph("onnxruntime", opened, bucket, threads=1, model=path) as runner:
            part = check_selection(runner, copied, bucket, forced.choices, goldens, coarse)
        with open_graph("onnxruntime", opened, bucket, threads=1) as runner:
            rows = check_bucket(runner, bucket, goldens, coarse)
        report = ParityReport("b", "onnxruntime", "", 1, "fp32", coarse, rows, selection=(part,))
        found.update({row.verdict: (report, row) for row in part.choices if not all(rows)})
    report, row = found["tie within noise"]  # and a source map differs, which is not judged on its values
    assert report
    assert row.flips
    assert row.worst.margin <= row.noise
    assert all(part for part in report.selection[0].forced)


def test_sizes_that_are_wrong_fail_in_the_coarsest_type(copied):
    """Free and with choices forced: how many tokens a row stands for is decided by choices, and rounded by nothing."""
    from safetensors.numpy import load_file, save_file

    from edgecomp.api._forced import forced_graph
    from edgecomp.parity import check_bucket
    from edgecomp.runners.chain import open_graph

    def move_one_token():
        held = load_file(copied / GOLDEN)
        sizes = held["output.photo.m12.size"]
        largest, least = sizes[0].argmax(), sizes[0].argmin()
        sizes[0, largest] -= 1
        sizes[0, least] += 1
        save_file(held, copied / GOLDEN)

    coarse = Tolerance(max_rel=0.9, min_cosine=0.2, derivation="as coarse as a type of few bits")
    opened = open_bundle(resealed(copied, move_one_token))
    (bucket,), goldens = opened.manifest.buckets, read_goldens(copied)
    path, forced = forced_graph(opened, bucket)
    with open_graph("onnxruntime", opened, bucket, threads=1, model=path) as runner:
        part = check_selection(runner, copied, bucket, forced.choices, goldens, coarse)
    with open_graph("onnxruntime", opened, bucket, threads=1) as runner:
        rows = check_bucket(runner, bucket, goldens, coarse)
    for judged in (part.forced, rows):
        (wrong,) = (row for row in judged if not row)
        assert (wrong.case, wrong.output) == ("photo", "size")
        assert "2 of 24 counts differ" in wrong.failures[0]


def test_bundles_without_choices_are_told_apart(cli, copied):
    from safetensors.numpy import load_file, save_file

    def strip():
        held = load_file(copied / GOLDEN)
        save_file({name: array for name, array in held.items() if not name.startswith("choice.")}, copied / GOLDEN)

    resealed(copied, strip)
    assert cli("parity", copied).code == 0
    said = cli("parity", copied, "--selection")
    assert said.code == 2
    assert "golden.safetensors does not hold what the original chose" in said.err
    assert "--force" in said.err


def test_a_method_that_chooses_nothing_says_so(cli, bundle):
    said = cli("parity", bundle, "--explain", "--budget", 4)
    assert said.code == 0
    assert "model.m4.b1.onnx chooses no tokens by a score: nothing to force" in said.out
    assert "first divergence: none" in said.out


def test_a_link_in_place_of_the_folder_is_refused(cli, copied, tmp_path):
    (copied / "parity").symlink_to(tmp_path)
    said = cli("parity", copied, "--selection")
    assert said.code == 2
    assert "link" in said.err


def test_one_runner_against_another(cli, merger):
    said = cli("parity", merger, "--runner", "onnxruntime:1", "--against", "onnxruntime:2", "--selection")
    assert said.code == 0
    assert "1 threads, fp32, against onnxruntime:2" in said.out


def test_the_model_in_torch_is_a_runner(cli, merger, tmp_path):
    said = cli("parity", merger, "--runner", "torch")
    assert said.code == 0
    assert re.match(r".*: torch \d\S*, fp32, against the PyTorch original", said.out.splitlines()[0])
    spoiled = shutil.copytree(merger, tmp_path / "bundle", ignore=shutil.ignore_patterns("parity"))
    resealed(spoiled, lambda: scaled_scores(spoiled, noise(0.5)))
    assert cli("parity", spoiled, "--runner", "torch").code == 0  # the graph is off, and not the model
    said = cli("parity", spoiled, "--runner", "onnxruntime:1", "--against", "torch", "--selection")
    assert said.code == 1
    assert "1 threads, fp32, against torch" in said.out
    assert "FAIL" in said.out.partition("choices, each on the rows")[2]


@pytest.mark.parametrize(
    "words",
    [
        {"method": "tome", "preset": "smoke", "backbone": "test_vit2", "image_size": 96, "budget": [7]},
        {"method": "tome", "backbone": "test_vit", "budget": [30]},  # a host that is not the default preset's
        {"method": "perceiver", "backbone": "test_vit", "budget": [16, 32]},
        {"method": "fastervlm", "preset": "smoke-host", "feature_layer": -1, "budget": [5]},
    ],
)
def test_torch_makes_the_hosts_that_the_bundle_has(tmp_path, words):
    """And the original that `profile` times is the bundle's, too."""
    pytest.importorskip("torch")
    from edgecomp import api
    from edgecomp.export.retrace import reassemble

    opened = open_bundle(api.export(**words, out=tmp_path / "bundle").bundle)
    manifest = opened.manifest
    assert api.parity(opened.path, runner="torch")
    for bucket in manifest.buckets:
        made = reassemble(manifest, bucket, weights="random", backbone_weights="random")
        assert (made.backbone, made.image_size) == (manifest.backbone, manifest.image_size)
        assert sum(one.numel() for one in made.models[-1].parameters()) == manifest.parameters
    forged = msgspec.structs.replace(manifest, parameters=manifest.parameters + 1)
    with pytest.raises(BundleError, match=rf"parameters {manifest.parameters}, not {forged.parameters}"):
        reassemble(forged, bucket, weights="random", backbone_weights="random")


def test_torch_leaves_routers_out(tmp_path):
    """And says so."""
    pytest.importorskip("torch")
    from edgecomp import api
    from edgecomp.report.parity import describe_parity

    out = tmp_path / "bundle"
    made = api.export("evit", preset="smoke", budget=[5, 11], router="detail", out=out)
    report = api.parity(made.bundle, runner="torch")
    assert report
    assert report.left_out
    assert f"{report.left_out[0]}: left out, torch runs no routers" in describe_parity(report)
    assert {row.model for row in report.outputs} == {
        bucket.model for bucket in open_bundle(made.bundle).manifest.buckets
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--runner", "onnxruntime:x"), "runner 'onnxruntime:x': give a name, or NAME:THREADS"),
        (("--against", "onnxrutime"), "no runner 'onnxrutime'; did you mean 'onnxruntime'?"),
        (("--runner", "onnxruntime:99999"), "threads=99999"),
        (("--runner", "onnxruntime:1", "--threads", "2"), "has threads of its own, and threads=2 is another number"),
        (("--runner", "torch:4"), "torch takes no number of threads, write torch"),
        (("--runner", "torch", "--threads", "2"), "threads=2 with runner torch: it takes no number of threads"),
        (("--runner", "torch", "--selection"), "is the model itself, and takes no choices"),
        (("--runner", "torch", "--bisect"), "is the model itself"),
        (("--runner", "torch", "--weights", "here.pt"), "the bundle was made with random (seed 0), untrained"),
        (("--runner", "original"), "'original' is no runner but what was recorded of the original"),
        (("--against", "original:3"), "'original:3' is no runner"),
        (("--atol", "merge:1"), "--atol names the output 'merge'; the bundle's are merged, size, source_map"),
        (("--bisect", "--weights", "here.pt"), "the bundle was made with random (seed 0), untrained"),
    ],
)
def test_what_cannot_be_asked_is_refused(cli, merger, options, message):
    said = cli("parity", merger, *options)
    assert said.code == 2
    assert message in said.err


def test_thresholds_of_the_user_decide(cli, merger):
    assert cli("parity", merger, "--atol", "merged:1e-4", "--rtol", "merged:1e-4").code == 0
    said = cli("parity", merger, "--atol", "merged:1e-12")
    assert said.code == 1
    assert "not within atol 1e-12 + rtol 0" in said.out
    assert "atol 1e-12 for merged" in said.out


def test_the_self_test_asks_all_three_questions(cli, merger):
    said = cli("parity", merger, "--self-test")
    assert said.code == 0
    for part in ("2 rows that are alike: ", "the same input twice: every bit the same", "1 against 4 threads: "):
        assert part in said.out, part


# -- module by module -------------------------------------------------------------------------------------------


def test_a_sound_graph_has_no_culprit(cli, bundle):
    said = cli("parity", bundle, "--bisect", "--per-layer", "--budget", 4)
    assert said.code == 0, said.err
    assert "no module makes an error of its own: " in said.out
    assert "compressor." in said.out


def test_a_graph_without_modules_says_so(cli, merger):
    said = cli("parity", merger, "--bisect")
    assert said.code == 0
    assert "not shown: no module of these graphs can be compared by itself" in said.out


def test_bisect_names_the_module_that_an_error_was_planted_in(cli, bundle):
    import onnx_ir as ir

    names = []

    def plant():
        for path in bundle.glob("model.*.onnx"):
            model = ir.load(path)
            linear = [n for n in model.graph if n.op_type == "MatMul" and n.inputs[1].const_value is not None]
            node = linear[len(linear) // 2]
            names.append(node.metadata_props["edgecomp.module"].removeprefix("model."))
            weight = node.inputs[1]
            array = weight.const_value.numpy()
            factors = 1 + 0.01 * np.random.default_rng(0).standard_normal(array.shape)
            weight.const_value = ir.tensor((array * factors).astype(np.float32), name=weight.name)
            path.write_bytes(ir.to_proto(model).SerializeToString())

    said = cli("parity", resealed(bundle, plant), "--bisect", "--json")
    assert said.code == 1
    report = json.loads(said.out)
    assert {culprit["module"] for culprit in report["culprits"]} == set(names)
    assert not any(culprit["is_between"] for culprit in report["culprits"])
    text = cli("parity", bundle, "--bisect").out
    assert f"the error begins in {names[0]}: " in text


def test_the_choices_of_an_int8_graph_can_be_forced(tmp_path):
    """ONNX Runtime cannot load a graph whose int8 weights share zero points."""
    pytest.importorskip("torch")
    from edgecomp import api

    out = tmp_path / "bundle"
    report = api.export("tome", preset="smoke", budget=[3], precision="int8", out=out, seed=0)
    judged = api.parity(report.bundle, selection=True)
    assert judged
    assert [part.model for part in judged.selection] == ["model.m3.b1.onnx"]
    assert all(row.difference.max_rel < 0.2 for part in judged.selection for row in part.forced)


def test_an_export_says_which_choice_broke_its_rule(merger):
    """Where all outputs are within the tolerance, the reason is the choice that failed, not an empty one."""
    from edgecomp import api
    from edgecomp.api._export import _first_miss

    report = api.parity(merger, selection=True)
    (part,) = report.selection
    wrong = msgspec.structs.replace(part.choices[0], failures=("takes the later of two equal scores",))
    part = msgspec.structs.replace(part, choices=(wrong, *part.choices[1:]))
    report = msgspec.structs.replace(report, selection=(part,))
    assert not report
    assert _first_miss(report) == (
        f"{part.model}, case {wrong.case}, choice {wrong.number} in {wrong.where}: takes the later of two equal scores"
    )
    forced = msgspec.structs.replace(part.forced[0], failures=("max rel error 1 above 2e-05",))
    broken = msgspec.structs.replace(part, forced=(forced, *part.forced[1:]))
    said = _first_miss(msgspec.structs.replace(report, selection=(broken,)))
    assert f"output {forced.output}, with the original's choices forced: max rel error 1 above 2e-05" in said
