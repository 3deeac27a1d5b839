"""Recipes and budgets load, errors name file and key, and another package can bring a method."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from edgecomp.errors import InvalidSpec, UnknownName
from edgecomp.resources import data_path
from edgecomp.specs import BudgetRule, TensorSpec, TokenBudget, load_recipe, method_names, parse_budget
from edgecomp.specs.backbone import read_backbones

METHODS = ("lookupvit", "perceiver")

Edited = Callable[[str, str], str]


@pytest.fixture
def edited(tmp_path: Path) -> Edited:
    """Return a function that writes lookupvit's recipe with one passage replaced, and returns its path."""
    text = data_path("export", "recipes", "lookupvit.toml").read_text(encoding="utf-8")

    def write(old: str, new: str) -> str:
        assert old in text
        path = tmp_path / "mine.toml"
        path.write_text(text.replace(old, new), encoding="utf-8")
        return str(path)

    return write


# -- recipes ------------------------------------------------------------------------------------------


def test_the_methods_of_this_issue_are_there() -> None:
    assert set(METHODS) <= set(method_names())


@pytest.mark.parametrize("name", method_names())
def test_recipe_loads_under_its_own_name_with_source_and_thresholds(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.method == name
    assert recipe.source.paper
    assert recipe.smoke_presets
    assert recipe.defaults.preset not in recipe.smoke_presets
    for preset in recipe.presets:
        assert recipe.rule(preset).default
    for precision, tolerance in recipe.tolerances.items():
        assert 0 < tolerance.max_rel < 1, precision
        assert "to be measured" not in tolerance.derivation, precision
    for reasons in (recipe.unread, recipe.extra_ops, recipe.invariances):
        assert all(len(reason) > 10 for reason in reasons.values())


@pytest.mark.parametrize("name", method_names())
def test_recipe_survives_json(name: str) -> None:
    recipe = load_recipe(name)
    assert msgspec.json.decode(msgspec.json.encode(recipe), type=type(recipe)) == recipe


def test_recipe_is_frozen() -> None:
    with pytest.raises(AttributeError, match="immutable"):
        load_recipe("lookupvit").method = "other"  # type: ignore[misc]


def test_recipe_by_path_is_the_same() -> None:
    path = data_path("export", "recipes", "lookupvit.toml")
    assert load_recipe(str(path)) == load_recipe("lookupvit")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        pytest.param('level = "E0"', 'level = "E0"\nspeed = 9', "`speed`", id="unknown key"),
        pytest.param("crop = 0.9", "crop = 0.9\ncorp = 0.9", "`corp` - at `$.preprocess`", id="unknown key below"),
        pytest.param(
            "[presets.b16]", "[presets.b16]\nsize = 1", "`size` - at `$.presets[...]`", id="unknown in preset"
        ),
        pytest.param("image_size = 224", 'image_size = "224"', "$.defaults.image_size", id="wrong type"),
        pytest.param("batch = [1]", "batch = 1", "$.defaults.batch", id="a number for a list"),
        pytest.param("opset = 20", "opset = 21", "$.defaults.opset", id="opset out of range"),
        pytest.param("schema = 1", "schema = 2", "$.schema", id="newer schema"),
        pytest.param('level = "E0"', 'level = "E9"', "'E9'", id="unknown level"),
        pytest.param('method = "lookupvit"', 'method = "Lookup ViT"', "$.method", id="bad name"),
        pytest.param('paper = "arXiv:2407.12753"\n', "", "`paper`", id="no paper"),
        pytest.param("[budgets]", "[badgets]", "badgets", id="no budgets"),
        pytest.param("choices = [9, 25, 49, 100]", "choices = [9, 49]", "budgets.default holds 25", id="default"),
        pytest.param("default = [25]", "default = []", "budgets.default is empty", id="empty default"),
        pytest.param("default = [25]", "default = [0]", "$.budgets.default", id="budget of zero"),
        pytest.param('encoder = "s16"', 'encoder = "s61"', "placements.encoder names the preset 's61'", id="placement"),
        pytest.param('preset = "s16"', 'preset = "s61"', "defaults.preset names 's61'", id="default preset"),
        pytest.param("presets.smoke", "presets.tiny", "no preset whose name begins with 'smoke'", id="no smoke"),
        pytest.param("max_rel = 2e-5", "max_rel = 0.0", "$.tolerances[...].max_rel", id="tolerance of zero"),
        pytest.param("[tolerances.fp32]", "[tolerances.fp99]", "fp99", id="unknown precision"),
        pytest.param("[presets.b16]", "[presets.s16]", "s16", id="duplicate preset"),
        pytest.param("[placements]", "[placements]\n[placements]", "placements", id="duplicate table"),
        pytest.param("opset = 20", "opset = 20\nopset = 19", "overwrite", id="duplicate key"),
        pytest.param("opset = 20", "opset 20", "line", id="not TOML"),
    ],
)
def test_mistake_names_file_and_key(edited: Edited, old: str, new: str, said: str) -> None:
    path = edited(old, new)
    with pytest.raises(InvalidSpec, match=r"recipe .*mine\.toml: ") as raised:
        load_recipe(path)
    assert path in str(raised.value)
    assert said in str(raised.value)
    assert "compare it with the ones that edgecomp ships" in str(raised.value)
    assert len(str(raised.value).splitlines()) <= 3


def test_missing_tolerance_is_named(tmp_path: Path) -> None:
    text = data_path("export", "recipes", "lookupvit.toml").read_text(encoding="utf-8")
    head, _, rest = text.partition("[tolerances.fp32]")
    path = tmp_path / "mine.toml"
    path.write_text(head + "[tolerances]\n\n" + rest[rest.index("[unread]") :], encoding="utf-8")
    with pytest.raises(InvalidSpec, match=r"mine\.toml: .*tolerances lack defaults\.precision, 'fp32'"):
        load_recipe(str(path))


def test_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.toml"
    path.write_bytes(b'schema = 1\nsummary = "caf\xe9"\n')
    with pytest.raises(InvalidSpec, match=r"recipe .*latin\.toml is not UTF-8 \(byte 25\); save it as UTF-8"):
        load_recipe(str(path))


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match=r"recipe .*none\.toml cannot be read: No such file or directory"):
        load_recipe(str(tmp_path / "none.toml"))


def test_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").mkdir()
    with pytest.raises(InvalidSpec, match=r"recipe .*a\.toml cannot be read: Is a directory"):
        load_recipe(str(tmp_path / "a.toml"))


def test_file_that_is_much_too_large(tmp_path: Path) -> None:
    path = tmp_path / "big.toml"
    path.write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(InvalidSpec, match=r"big\.toml is larger than 1048576 bytes; is it a TOML file\?"):
        load_recipe(str(path))


def test_unknown_method_lists_the_known_and_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"no method 'lookupvti'; did you mean 'lookupvit'\?") as raised:
        load_recipe("lookupvti")
    assert f"Known: {', '.join(method_names())}." in str(raised.value)
    assert "--recipe FILE" in str(raised.value)


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(UnknownName, match=r"no preset of lookupvit 'b61'; did you mean 'b16'\?.*released"):
        load_recipe("lookupvit").preset("b61")


def test_preset_without_budgets_has_those_of_the_recipe() -> None:
    recipe = load_recipe("lookupvit")
    assert recipe.rule("s16") == recipe.budgets
    assert recipe.rule("table64") == BudgetRule(default=(64,), minimum=1, maximum=128)


# -- budgets ------------------------------------------------------------------------------------------

ANY = BudgetRule(default=(1,), maximum=1000)
FOUR = BudgetRule(default=(25,), choices=(9, 25, 49, 100))


@pytest.mark.parametrize(
    ("text", "tokens_in", "rule", "tokens_out"),
    [
        ("49", 196, FOUR, 49),
        (" 49 ", 196, FOUR, 49),
        ("25%", 196, FOUR, 49),
        ("12.5%", 196, ANY, 24),  # 24.5: halves to even
        ("37.5%", 100, ANY, 38),  # 37.5: halves to even
        ("0.1%", 196, ANY, 1),  # at least one
        ("100%", 196, ANY, 196),
        ("196", 196, ANY, 196),
        ("1e1%", 100, ANY, 10),
    ],
)
def test_budget_is_what_is_kept(text: str, tokens_in: int, rule: BudgetRule, tokens_out: int) -> None:
    found = parse_budget(text, tokens_in=tokens_in, rule=rule, method="tome")
    assert found == TokenBudget(tokens_in=tokens_in, tokens_out=tokens_out)


@pytest.mark.parametrize(
    ("text", "rule", "said"),
    [
        ("50", FOUR, "budget 50 is not possible for tome; it must be one of 9, 25, 49, 100"),
        ("50%", FOUR, "budget 50% of 196 = 98 is not possible for tome"),
        ("197", ANY, "budget 197 is above the 196 tokens that go into tome; a budget is what is KEPT"),
        ("0", ANY, "budget 0 is not possible for tome; it must be from 1 to 1000"),
        ("-3", ANY, "budget -3 is not possible"),
        ("0%", ANY, "budget '0%' is not above 0% and at most 100%"),
        ("101%", ANY, "budget '101%' is not above 0% and at most 100%"),
        ("-5%", ANY, "budget '-5%' is not above 0%"),
        ("nan%", ANY, "budget 'nan%' is not above 0%"),
        ("inf%", ANY, "budget 'inf%' is not above 0%"),
        ("many", ANY, "budget 'many' is neither a count nor a percentage"),
        ("2.5", ANY, "budget '2.5' is neither a count nor a percentage"),
        ("%", ANY, "budget '%' is neither a count nor a percentage"),
        ("", ANY, "budget '' is neither a count nor a percentage"),
        ("25 % of", ANY, "--budget 49 or --budget 25%"),
    ],
)
def test_budget_that_cannot_be(text: str, rule: BudgetRule, said: str) -> None:
    with pytest.raises(InvalidSpec) as raised:
        parse_budget(text, tokens_in=196, rule=rule, method="tome")
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("default", "possible", "taken"),
    [
        ((144,), (1, 9, 81, 729), (81,)),
        ((144,), (1, 4, 16), (4,)),  # not all 16 that go in
        ((144,), (36, 144, 576), (144,)),
        ((2,), (4, 16), (4,)),
        ((288,), (12,), (12,)),
    ],
)
def test_a_default_that_a_grid_lacks_becomes_the_next_below(default, possible, taken) -> None:
    rule = BudgetRule(default).narrowed(possible)
    assert (rule.default, rule.choices) == (taken, possible)


def test_ratios_of_a_budget() -> None:
    budget = TokenBudget(tokens_in=196, tokens_out=49)
    assert (budget.keep_ratio, budget.compression) == (0.25, 4.0)


# -- tensors and backbones ----------------------------------------------------------------------------


def test_tensor_spec_reads_well_and_takes_a_batch() -> None:
    spec = TensorSpec("image", (1, 3, 224, 224), "float32", "image")
    assert str(spec) == "image float32[1, 3, 224, 224]"
    assert spec.with_batch(8).shape == (8, 3, 224, 224)


def test_shipped_backbones_make_their_tokens() -> None:
    rows = read_backbones(data_path("export", "backbones.toml"))
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        assert row.tokens == (row.image_size // row.patch_size) ** 2, row.name


# -- methods of other packages ------------------------------------------------------------------------

MODULE = '''
from edgecomp.compressors._base import Compressor, Params
from edgecomp.specs import TensorSpec

__all__ = ["FirstTokens"]


class FirstTokens(Compressor):
    """Keeps the first M tokens."""

    Params = Params

    def input_specs(self, batch=1):
        return (TensorSpec("tokens", (batch, self.budget.tokens_in, self.site.embed_dim), "float32", "tokens"),)

    def output_specs(self, batch=1):
        return (TensorSpec("kept", (batch, self.budget.tokens_out, self.site.embed_dim), "float32", "tokens"),)

    def forward(self, tokens):
        return (tokens[:, : self.budget.tokens_out] * 1.0,)

    def reference(self):
        return self
'''

RECIPE = """
schema = 1
method = "first-tokens"
summary = "keeps the first tokens"
level = "E0"
outputs = ["tokens"]
budgets = { default = [4], maximum = 16 }
placements = { after = "plain" }
preprocess = { crop = 1.0, interpolation = "bicubic", mean = [0.5, 0.5, 0.5], std = [0.5, 0.5, 0.5] }

[source]
title = "none"
paper = "none"
upstream = "none"
commit = "none"
licence = "none"

[defaults]
preset = "plain"
image_size = 224
batch = [1]
output = "tokens"
opset = 20
precision = "fp32"

[presets]
plain = { summary = "any size", placement = "after" }
smoke = { summary = "test size", placement = "after", backbone = "none", params = { tokens = 9, embed_dim = 8 } }

[tolerances.fp32]
max_rel = 1e-6
min_cosine = 0.999999
derivation = "it copies values, so there is no error"
"""


@pytest.fixture
def other_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a tiny distribution that brings a method, and return the folder that it is in."""
    site = tmp_path / "site"
    info = site / "first_tokens_method-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: first-tokens-method\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[edgecomp.compressors]\nfirst-tokens = first_tokens_method:FirstTokens\n")
    (site / "first_tokens_method.py").write_text(MODULE)
    (site / "first_tokens_method.toml").write_text(RECIPE)
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "first_tokens_method", raising=False)
    return site


def test_method_of_another_package_is_among_the_names(other_package: Path) -> None:
    assert "first-tokens" in method_names()
    recipe = load_recipe("first-tokens")
    assert (recipe.method, recipe.smoke_presets, recipe.budgets.default) == ("first-tokens", ("smoke",), (4,))
    assert "first_tokens_method" not in sys.modules


def test_method_of_another_package_is_listed_by_the_command_line(other_package: Path) -> None:
    paths = [str(other_package), str(Path(__file__).parents[2])]
    done = subprocess.run(
        [sys.executable, "-m", "edgecomp", "list", "methods", "--json"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in msgspec.json.decode(done.stdout)}
    assert rows["first-tokens"]["summary"] == "keeps the first tokens"
    assert set(METHODS) < rows.keys()


def test_method_of_another_package_has_its_class_and_exports(other_package: Path, tmp_path: Path) -> None:
    for name in ("torch", "timm", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed; pip install 'edgecomp[cpu]' brings it")
    from edgecomp import api
    from edgecomp.compressors import compressor_class

    found = compressor_class("first-tokens")
    assert (found.__module__, found.__name__) == ("first_tokens_method", "FirstTokens")
    report = api.export("first-tokens", preset="smoke", out=tmp_path / "bundle")
    assert report.parity
    (bucket,) = report.manifest.buckets
    assert (bucket.budget.tokens_in, bucket.budget.tokens_out) == (9, 4)
    assert (tmp_path / "bundle" / "model.m4.b1.onnx").is_file()


def test_entry_point_without_its_module_is_named(other_package: Path) -> None:
    (other_package / "first_tokens_method.py").unlink()
    with pytest.raises(InvalidSpec, match="entry point 'first_tokens_method:FirstTokens' names a module that is not"):
        load_recipe("first-tokens")


def test_method_without_its_recipe_is_named(other_package: Path) -> None:
    (other_package / "first_tokens_method.toml").unlink()
    with pytest.raises(InvalidSpec, match=r"first_tokens_method\.toml cannot be read: No such file"):
        load_recipe("first-tokens")


def test_module_with_two_compressors_is_refused(other_package: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed; pip install 'edgecomp[cpu]' brings it")
    from edgecomp.compressors import compressor_class

    text = MODULE.replace('["FirstTokens"]', '["FirstTokens", "Compressor"]')
    (other_package / "first_tokens_method.py").write_text(text)
    with pytest.raises(InvalidSpec, match=r"first_tokens_method\.__all__ lists 2 compressors"):
        compressor_class("first-tokens")
