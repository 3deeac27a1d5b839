"""Pictures of patches: what the layers are made of, what is drawn, and what `run --draw` says."""

from __future__ import annotations

import json
import re
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec
import numpy as np
import pytest
from PIL import Image

from edgecomp.api._draw import picture_of, require_drawable, write_picture
from edgecomp.bundle import open_bundle
from edgecomp.errors import EdgecompError, InvalidSpec, MissingDependency, RunError
from edgecomp.parity.forced import own_choices
from edgecomp.patches import PatchLayer, PatchLayers, Picture, compose_layers, grid_of, join_layers, layer_title, to_rgb
from edgecomp.report.colours import group_colours, heat_colours, heat_map
from edgecomp.report.patch_raster import draw_heat, draw_patches
from edgecomp.report.patch_shapes import borders, group_places, rims
from edgecomp.report.pictures import patch_figures, picture_html, picture_png, picture_svg
from edgecomp.resources import photograph_path
from edgecomp.specs.choice import ChoiceNode

SVG = "{http://www.w3.org/2000/svg}"
CELL = 12
HOSTILE = "<script>alert(1)</script>&\"'\x00\x1b\udcff"


def layer(rows, *, tokens=0, scores=None, name="block 3"):
    rows = np.asarray(rows, np.int32)
    held = np.full(len(rows), np.nan, np.float32) if scores is None else np.asarray(scores, np.float32)
    return PatchLayer(name, "blocks.3", tokens or int(rows.max()) + 1, rows, held, "" if scores is None else "theirs")


def picture(*layers, image="a.png", bundle="b", notes=(), level=200):
    side = grid_of(len(layers[0].rows)) if layers else (4, 4)
    patches = PatchLayers("tome", "m.onnx", *side, 1, 5, layers, notes)
    return Picture(image, bundle, np.full((side[0] * 4, side[1] * 4, 3), level, np.uint8), patches)


# 4 x 4 patches: 0, 1 and 4 are one group, 10 and 15 another that does not hang together, 2 and 3 are dropped
MIXED = [7, 7, -1, -1, 7, 0, 1, 2, 3, 4, 8, 5, 6, 9, 10, 8]


def top_k(number, scores, k, *, where="blocks.0", indices=None, **more):
    """Return a choice of one row, and its scores and indices, as a graph makes it."""
    scores = np.asarray([scores], np.float32)
    ranked = np.argsort(-scores, axis=1, kind="stable")[:, :k] if indices is None else np.asarray([indices])
    node = ChoiceNode(number, "TopK", where, (1, k), -1, k, True, more.pop("ordered", False), **more)
    return node, (scores, ranked)


def arg_max(number, match, targets, *, where="blocks.0", **more):
    node = ChoiceNode(number, "ArgMax", where, (1, len(match)), -1, 1, True, False, **more)
    return node, (np.zeros((1, len(match), targets), np.float32), np.asarray([match]))


def composed(*choices, patches, tokens_out):
    nodes = [node for node, _ in choices]
    chosen = {node.number: made for node, made in choices}
    return compose_layers(nodes, chosen, patches=patches, tokens_out=tokens_out)


# -- composing ----------------------------------------------------------------------------------------------------


def test_two_merges_after_a_class_token():
    """Six patches behind a class token: of tokens 1 to 6, the even ones 2, 4, 6 are sources, 1, 3, 5 targets."""
    merge = {"merge": 0, "partition": "alternate", "r": 1, "prefix": 1}
    first = (arg_max(0, [1, 2, 0], 3, **merge), top_k(1, [0.2, 0.9, 0.5], 1, **merge))
    # patches 0..5 are tokens 1..6; source 4 (patch 3) goes to target 5 (patch 4); kept 2, 6 come first: patches 1, 5
    # then patches 0, 2, {3, 4}. Of these five, tokens 2 and 4 (places 1, 3: patches 5 and 2) are sources.
    merge = {"merge": 1, "partition": "alternate", "r": 1, "prefix": 1, "where": "blocks.1"}
    second = (arg_max(2, [2, 0], 3, **merge), top_k(3, [0.7, 0.1], 1, **merge))
    # place 1 (patch 5) goes to the third target, place 4: {3, 4}
    result = composed(*first, *second, patches=6, tokens_out=4)
    assert not result.problem
    one, two = result.layers
    assert (one.name, two.name) == ("block 0", "block 1")
    assert one.rows.tolist() == [2, 0, 3, 4, 4, 1]
    assert one.counts == (4, 2, 0)
    assert two.rows.tolist() == [2, 1, 0, 3, 3, 3]
    assert two.groups == (3,)
    assert two.tokens == 4
    np.testing.assert_array_equal(one.scores, np.asarray([np.nan, 0.2, np.nan, 0.9, np.nan, 0.5], np.float32))
    np.testing.assert_array_equal(two.scores, np.asarray([np.nan, np.nan, 0.1, np.nan, np.nan, 0.7], np.float32))


def test_unmerged_tokens_in_the_order_of_their_rank():
    """Without a prefix, 4 patches: 0 and 2 are sources; all are ranked, so that what stays stands in that order."""
    merge = {"merge": 0, "partition": "alternate", "r": 1, "prefix": 0}
    six = composed(arg_max(0, [1, 1, 0], 3, **merge), top_k(1, [0.1, 0.5, 0.4], 3, **merge), patches=6, tokens_out=5)
    assert six.layers[0].rows.tolist() == [1, 2, 3, 3, 0, 4]  # patch 4 is ranked before patch 0


def test_a_merge_by_score():
    """The four of highest score are in turn source and target: 5 and 3 merge into 1 and 4, as they match."""
    merge = {"merge": 0, "partition": "by_score", "r": 2, "prefix": 1}
    scores = [0.0, 0.8, 0.1, 0.7, 0.2, 0.9]
    ranked = top_k(0, scores, 4, **merge)  # 5, 1, 3, 4
    (one,) = composed(ranked, arg_max(1, [1, 1], 2, **merge), patches=6, tokens_out=4).layers
    assert one.rows.tolist() == [0, 2, 1, 3, 3, 3]
    np.testing.assert_array_equal(one.scores, np.asarray(scores, np.float32))
    whole = top_k(0, scores, 6, **merge)  # ranked behind those: 2, 0
    (one,) = composed(whole, arg_max(1, [1, 1], 2, **merge), patches=6, tokens_out=4).layers
    assert one.rows.tolist() == [1, 2, 0, 3, 3, 3]


def test_two_prunings_and_a_token_made_of_the_dropped():
    """A fused token stands behind those kept, and may be kept itself."""
    first = top_k(0, [0.5, 0.1, 0.4, 0.3, 0.2], 3)  # 0, 2, 3 stay, and one is made: 4 tokens
    second = top_k(1, [0.1, 0.2, 0.3, 0.9], 2, where="blocks.1", ordered=True)  # the made one, then patch 3
    one, two = composed(first, second, patches=5, tokens_out=3).layers
    assert one.rows.tolist() == [0, -1, 1, 2, -1]
    assert (one.tokens, one.made, one.counts) == (4, 1, (3, 0, 2))
    assert two.rows.tolist() == [-1, -1, -1, 1, -1]
    assert (two.tokens, two.made) == (3, 2)
    np.testing.assert_array_equal(two.scores, np.asarray([0.1, np.nan, 0.2, 0.3, np.nan], np.float32))


@pytest.mark.parametrize(
    ("choices", "tokens_out", "problem"),
    [
        ((top_k(0, [1, 2, 3, 4], 4),), 4, "blocks.0 ranks all 4 tokens"),
        ((top_k(0, [1, 2, 3, 4], 3), top_k(1, [1, 2, 3, 4], 2)), 2, "blocks.0 makes 2 choices by rank"),
        ((arg_max(0, [1, 1], 2),), 2, "blocks.0 makes 0 choices by rank"),
        ((top_k(0, [1, 2, 3], 2),), 2, "the first choice is among 3 tokens, and there are 4 patches"),
        ((top_k(0, [1, 2, 3, 4], 3), top_k(1, [1, 2], 1, where="b")), 1, "blocks.0 leaves 3 tokens, and there are 2"),
        ((top_k(0, [1, 2, 3, 4], 3),), 2, "blocks.0 leaves 3 tokens, and there are 2 behind it"),
    ],
)
def test_choices_that_say_nothing_of_patches(choices, tokens_out, problem):
    result = composed(*choices, patches=4, tokens_out=tokens_out)
    assert not result.layers
    assert problem in result.problem


def test_own_choices_are_those_of_the_free_run():
    """A chain of choices, each by what the one before chose, is settled in as many runs as there are choices."""
    nodes = tuple(ChoiceNode(n, "TopK", f"b{n}", (1, 2), -1, 2, True, True) for n in range(3))

    class Chain:
        runs = 0

        def infer(self, inputs):
            self.runs += 1
            scores, found = inputs["x"], {}
            for node in nodes:
                found[f"{node.name}.scores"] = scores
                found[f"{node.name}.indices"] = np.argsort(-scores, axis=1, kind="stable")[:, :2]
                scores = np.take_along_axis(scores, inputs[node.name], 1)[:, ::-1] * np.float32(0.5)
            return {**found, "end": scores}

    chain = Chain()
    outputs, chosen = own_choices(chain, nodes, {"x": np.asarray([[1.0, 4.0, 2.0]], np.float32)})
    assert [chosen[n][1].tolist() for n in range(3)] == [[[1, 2]], [[1, 0]], [[1, 0]]]
    assert outputs["end"].tolist() == [[0.25, 0.5]]
    assert chain.runs <= 4

    class Fickle(Chain):
        def infer(self, inputs):
            found = super().infer(inputs)
            return {**found, f"{nodes[1].name}.indices": np.asarray([[self.runs % 2, 1 - self.runs % 2]])}

    with pytest.raises(RunError, match=r"choice\.001\.b1 is chosen otherwise in each of 4 runs"):
        own_choices(Fickle(), nodes, {"x": np.asarray([[1.0, 4.0, 2.0]], np.float32)})


def test_names_of_layers_and_grids():
    assert layer_title("backbone.model.blocks.11") == "block 11"
    assert layer_title("compressor.heads.3") == "compressor.heads.3"
    assert layer_title("") == "compressor"
    assert (grid_of(196), grid_of(195)) == ((14, 14), None)


def test_an_image_is_what_the_model_saw(exported):
    preprocess = open_bundle(exported).manifest.preprocess
    raw = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3) * 5
    normal = (raw / 255 - np.asarray(preprocess.mean)) / np.asarray(preprocess.std)
    assert to_rgb(raw, preprocess).tolist() == raw[0].tolist()
    assert to_rgb(normal.transpose(0, 3, 1, 2).astype(np.float32), preprocess).tolist() == raw[0].tolist()


# -- joining ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(exported):
    """Return a manifest and a bucket of 16 patches and so many tokens, for outputs made by hand."""

    def make(tokens_out, placement="inside", prefix=1):
        manifest = open_bundle(exported).manifest
        bucket = manifest.buckets[0]
        budget = msgspec.structs.replace(bucket.budget, tokens_in=16, tokens_out=tokens_out)
        manifest = msgspec.structs.replace(manifest, placement=placement, num_prefix_tokens=prefix)
        return manifest, msgspec.structs.replace(bucket, budget=budget)

    return make


def test_padding_rows_are_no_tokens(fake):
    index = np.asarray([[0, 4, 9, -1, -1, -1]], np.int32)  # class token, patches 3 and 8, and one that was made
    mask = np.asarray([[True, True, True, True, False, False]])
    found = join_layers(*fake(3, "after"), {"index": index, "mask": mask, "count": mask.sum(1)})
    (end,) = found.layers
    assert np.flatnonzero(~end.dropped).tolist() == [3, 8]
    assert end.rows[[3, 8]].tolist() == [0, 1]
    assert (end.tokens, end.made) == (3, 1)
    assert "1 token is made of several patches" in found.notes[0]
    bare = np.asarray([[0, 4, 9, -1]], np.int32)  # of a method that hands on no class token, the same numbers
    (end,) = join_layers(*fake(4, "after"), {"index": bare}).layers
    assert np.flatnonzero(~end.dropped).tolist() == [0, 4, 9]


def test_groups_beyond_the_budget_are_dropped(fake):
    source_map = np.asarray([[*range(8), *range(8)]], np.int32)
    (end,) = join_layers(*fake(6, "after", 0), {"source_map": source_map, "count": np.asarray([8])}).layers
    assert np.flatnonzero(end.dropped).tolist() == [6, 7, 14, 15]
    assert (end.tokens, end.counts) == (6, (0, 12, 4))


def test_prefix_tokens_are_no_patches(fake):
    source_map = np.asarray([[0, *range(1, 9), *range(1, 9)]], np.int32)  # the class token, then 16 patches
    (end,) = join_layers(*fake(8), {"source_map": source_map}).layers
    assert end.rows.tolist() == [*range(8), *range(8)]
    few = np.asarray([[3, 0, -1, -1, -1]], np.int32)  # of a method that hands on no class token, rows by the data
    (end,) = join_layers(*fake(5, "after"), {"index": few, "mask": np.arange(5)[None] < 3}).layers
    assert np.flatnonzero(~end.dropped).tolist() == [0, 3]
    assert end.rows[[0, 3]].tolist() == [1, 0]


def test_choices_that_are_not_the_map_are_not_drawn(fake):
    node, made = top_k(0, list(range(16)), 4)
    index = np.asarray([[0, 1, 2, 3, 4]], np.int32)
    found = join_layers(*fake(4), {"index": index}, nodes=[node], chosen={0: made})
    (end,) = found.layers
    assert np.flatnonzero(~end.dropped).tolist() == [0, 1, 2, 3]
    assert "the last layer of its choices is not the map" in found.notes[0]
    assert (end.name, end.score_range) == ("at the end", None), "scores of another block are not those of the end"
    (end,) = join_layers(*fake(4, "after", 0), {"index": index[:, :4]}, nodes=[node], chosen={0: made}).layers
    assert (end.name, end.score_range) == ("block 0", (0, 15))
    right = np.asarray([[0, 13, 14, 15, 16]], np.int32)
    found = join_layers(*fake(4), {"index": right}, nodes=[node], chosen={0: made})
    assert found.notes == ()
    assert found.layers[0].name == "block 0"


def test_no_map_is_said_and_none_invented(fake):
    manifest, bucket = fake(4)
    assert join_layers(manifest, bucket, {}, chosen={}).notes == (
        "no patch map: nothing is chosen, and the 4 output tokens are made of all 16 patches",
    )
    node, made = top_k(0, list(range(16)), 16)
    odd = join_layers(manifest, bucket, {}, nodes=[node], chosen={0: made})
    assert not odd.layers
    assert "do not say where patches are (blocks.0 ranks all 16 tokens" in odd.notes[0]
    unknown = join_layers(manifest, bucket, {}, notes=["onnx_ir is not there"])
    assert unknown.notes[0] == "onnx_ir is not there"
    assert "its choices are not known" in unknown.notes[1]
    many = msgspec.structs.replace(bucket, budget=msgspec.structs.replace(bucket.budget, tokens_in=15))
    assert "15 tokens make no square" in join_layers(manifest, many, {"index": np.zeros((1, 5), int)}).notes[0]


# -- pixels -------------------------------------------------------------------------------------------------------


def cell_of(drawn, place, columns=4):
    """Return the inside of a patch, without what is drawn on its rim."""
    y, x = divmod(place, columns)
    return drawn[y * CELL + 3 : (y + 1) * CELL - 3, x * CELL + 3 : (x + 1) * CELL - 3].astype(int)


def test_pixels_of_kept_merged_and_dropped():
    drawn = draw_patches(picture(layer(MIXED)), 0, cell=CELL)
    assert drawn.shape == (4 * CELL, 4 * CELL, 3)
    kept, merged, dropped = (cell_of(drawn, place) for place in (5, 0, 2))
    assert (kept == 200).all()
    assert dropped.mean() < 130 < kept.mean()
    assert len(np.unique(dropped)) > 1, "a dropped patch is hatched, not dark alone"
    assert (merged == merged[0, 0]).all()
    assert not (merged[0, 0] == merged[0, 0, 0]).all(), "a group has a hue"
    for one, other in ((0, 1), (0, 4), (10, 15)):
        assert (cell_of(drawn, one)[0, 0] == cell_of(drawn, other)[0, 0]).all()
    assert (cell_of(drawn, 0)[0, 0] != cell_of(drawn, 10)[0, 0]).any()


def test_a_border_stands_around_a_group_and_not_within_it():
    drawn = draw_patches(picture(layer(MIXED)), 0, cell=CELL).astype(int)
    middle = CELL // 2
    between_kept = drawn[CELL + middle, 2 * CELL - 3 : 2 * CELL + 3]  # patches 5 and 6
    around_group = drawn[CELL + middle, CELL - 3 : CELL + 3]  # patches 4 and 5
    within_group = drawn[middle, CELL - 3 : CELL + 3]  # patches 0 and 1
    assert (between_kept == 200).all()
    assert around_group.min() < 30, "a dark line"
    assert around_group.max() == 255, "on a light one"
    assert (within_group == within_group[0]).all()
    assert (drawn[middle, 0] < 30).all(), "and at the rim of the image"
    assert (drawn[CELL, 2 * CELL + middle] == 225).all(), "a thin rim at what is dropped"


def test_lines_are_as_long_as_they_go():
    edges = {tuple(edge) for edge in borders(layer(MIXED), 4, 4)}
    assert (0, 0, 2, False) in edges
    assert (0, 0, 2, True) in edges
    assert (1, 1, 1, False) in edges
    assert not [edge for edge in edges if edge[:2] == (2, 0) and not edge[3]]  # no group stands there
    assert {tuple(edge) for edge in rims(layer(MIXED), 4, 4)} == {
        (2, 0, 2, False), (2, 1, 2, False), (2, 0, 1, True), (4, 0, 1, True),
    }  # fmt: skip


def test_groups_that_touch_have_different_colours_and_keep_them():
    generator = np.random.default_rng(0)
    first = generator.integers(0, 30, 100)
    second = first // 2
    layers = [layer(rows, tokens=30) for rows in (first, second)]
    shown = picture(*layers).patches
    for one, places in zip(layers, group_places(shown), strict=True):
        grid, rows = places.reshape(10, 10), one.rows.reshape(10, 10)
        for a, b in ((grid[:-1], grid[1:]), (grid[:, :-1], grid[:, 1:])):
            other = rows[:-1] != rows[1:] if a.shape == (9, 10) else rows[:, :-1] != rows[:, 1:]
            assert ((a != b) | ~other | (a < 0)).all()
    alone = [np.asarray([0, 0, -1, 1]), np.asarray([0, 0, -1, 0])]
    before, after = group_places(picture(*[layer(rows) for rows in alone]).patches)
    assert before.tolist() == [0, 0, -1, -1]
    assert after[0] == before[0]


def test_colours_differ_in_lightness_too():
    coded = heat_colours() / 255
    linear = np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)
    light = 116 * np.cbrt(linear @ [0.2126, 0.7152, 0.0722]) - 16  # CIE L*
    assert light[0] < 10
    assert light[-1] > 90
    steps = np.diff(light[::5])
    assert (steps > 0.5 * steps.mean()).all()
    assert (steps < 1.6 * steps.mean()).all()
    assert heat_map(np.asarray([0.0, 1.0, 2.0])).tolist() == heat_colours()[[0, -1, -1]].tolist()
    assert len(np.unique(group_colours(), axis=0)) == len(group_colours()) == 12


def test_heat_of_scores():
    scored = layer(MIXED, scores=[*np.linspace(0, 1, 15), np.nan])
    drawn = draw_heat(scored, 4, 4, cell=CELL)
    assert (cell_of(drawn, 0) == heat_colours()[0]).all()
    assert (cell_of(drawn, 14) == heat_colours()[-1]).all()
    assert len(np.unique(cell_of(drawn, 15).reshape(-1, 3), axis=0)) == 2, "hatched where there is none"
    same = draw_heat(layer(MIXED, scores=[0.3] * 16), 4, 4, cell=CELL)
    assert (same == heat_colours()[0]).all()


# -- files --------------------------------------------------------------------------------------------------------


def texts(root):
    return [element.text for element in root.iter() if element.tag in (f"{SVG}text", "text")]


def test_svg_is_xml_that_needs_nothing_beside_it():
    scored = layer(MIXED, scores=np.linspace(0.25, 4, 16))
    written = picture_svg(picture(scored, layer([0] * 16, name="compressor.score_predictor.0.out_conv.5")))
    root = ET.fromstring(written)
    links = re.findall(r'(?:href|src)="([^"]*)"', written)
    assert links
    assert all(link.startswith(("data:image/png;base64,", "#ecp-")) for link in links)
    assert "url(http" not in written
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link[0] == "#"} | set(re.findall(r"url\(#([^)]*)\)", written)) <= set(ids)
    assert root.get("role") == "img"
    assert [root.find(f"{SVG}{tag}").get("id") for tag in ("title", "desc")] == root.get("aria-labelledby").split()
    said = root.find(f"{SVG}desc").text
    assert "16 patches (4 x 4) become 1 token" in said
    assert "Behind block 3, 11 tokens are left of 16 patches: 9 kept, 5 in 2 groups, 2 dropped." in said
    assert "from 0.25 to 4" in said
    assert "prefers-color-scheme:dark" in written
    shown = texts(root)
    assert {"0.25", "4", "block 3: 11 tokens", "9 kept, 5 in 2 groups, 2 dropped", "scores: theirs"} <= set(shown)
    assert any(text.startswith("\u2026") and text.endswith("out_conv.5: 1 token") for text in shown)
    assert "token 7: 3 patches" in [element.text for element in root.iter(f"{SVG}title")]


def test_svg_in_a_page_has_no_styles_of_its_own():
    """A page's policy forbids them, and its text is the page's."""
    written = picture_svg(picture(layer(MIXED, scores=np.linspace(0, 1, 16))), ident="p1", in_page=True)
    root = ET.fromstring(written)
    assert root.get("class") == "plot"
    assert "style" not in re.sub('data:[^"]*', "", written)
    assert {element.get("fill") for element in root.iter(f"{SVG}text")} == {"currentColor"}
    assert all(name.startswith("p1-") for name in re.findall(r'\bid="([^"]*)"', written))
    assert "<style>" in picture_svg(picture(layer(MIXED)))


def test_hostile_names_stay_text():
    shown = picture(layer(MIXED, name=HOSTILE), image=HOSTILE, bundle=HOSTILE, notes=(HOSTILE,))
    for written in (picture_svg(shown), picture_html(shown), *(f.svg for f in patch_figures(shown)[1])):
        assert "<script" not in written
        assert "&lt;script&gt;" in written
        assert not re.search("[\x00\x1b\ud800-\udfff]", written)
        written.encode()
    ET.fromstring(picture_svg(shown))
    assert picture_png(shown)[:4] == b"\x89PNG"


def test_page_has_every_layer_and_a_table():
    shown = picture(layer(MIXED, scores=np.linspace(0, 1, 16)), layer([0] * 16, name="block 6"), notes=("it is so",))
    page = picture_html(shown)
    assert page.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert page.count("<figure>") == 3
    assert re.search(r'<meta name="viewport"', page)
    cells = re.findall(r"<td>([^<]*)</td>", page)
    assert cells[:8] == ["block 3", "11", "9", "5", "2", "2", "0", "1"]
    assert cells[8:] == ["block 6", "1", "0", "16", "1", "0", "none", "none"]
    assert "<p>It is so.</p>" in page
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', page)) <= set(ids)
    assert "ns0" not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_figures_of_two_pictures_do_not_meet_in_a_page():
    one, other = (patch_figures(picture(layer(MIXED)), ident=ident) for ident in ("p1", "p2"))
    ids = re.findall(r'\bid="([^"]*)"', one[0] + one[1][1].svg + other[0] + other[1][1].svg)
    assert len(ids) == len(set(ids))
    assert [figure.name for figure in one[1]] == ["input", "block 3"]
    assert one[1][1].caption.startswith("Behind block 3")


def test_png_holds_what_the_svg_does():
    with Image.open(BytesIO(picture_png(picture(layer(MIXED), layer([0] * 16))))) as image:
        assert image.mode == "RGB"
        assert image.width > 3 * 280
    with Image.open(BytesIO(picture_png(picture(notes=("no patch map: so",))))) as image:
        assert image.height < 500


def test_a_picture_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    shown = picture(layer(MIXED))
    write_picture(tmp_path / "a.PNG", shown)
    with Image.open(tmp_path / "a.PNG") as image:
        assert image.format == "PNG"
    with pytest.raises(EdgecompError, match=r"a\.PNG/a\.svg cannot be written"):
        write_picture(tmp_path / "a.PNG" / "a.svg", shown)
    (tmp_path / "b.svg").write_text("before")

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(EdgecompError, match=r"b\.svg cannot be written: No space left on device"):
        write_picture(tmp_path / "b.svg", shown)
    assert (tmp_path / "b.svg").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.PNG", "b.svg"]


# -- the command line ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evit(tmp_path_factory):
    """A bundle that drops patches in two blocks; not to be written to."""
    pytest.importorskip("torch")
    from edgecomp import api

    return api.export("evit", preset="smoke", out=tmp_path_factory.mktemp("evit") / "b<b>").bundle


def test_run_draws(cli, evit, tmp_path):
    said = cli("run", evit, "--draw", tmp_path / "p.svg", "--json")
    assert (said.code, said.err) == (0, "")
    report = json.loads(said.out)
    assert report["drawn"] == str(tmp_path / "p.svg")
    assert [one["name"] for one in report["layers"]] == ["block 1", "block 3"]
    assert all(one["kept"] + one["merged"] + one["dropped"] == 16 for one in report["layers"])
    assert report["layers"][-1]["tokens"] == 11
    root = ET.fromstring((tmp_path / "p.svg").read_text())
    assert root.find(f"{SVG}title").text == "evit on photograph.jpg: b<b>"
    text = cli("run", evit, photograph_path(), "--draw", tmp_path / "p.html").out
    assert re.search(r"block 3 +11 +", text)
    assert "made of several patches" in text
    assert f"drawn to {tmp_path / 'p.html'}" in text
    assert "b&lt;b&gt;" in (tmp_path / "p.html").read_text()
    assert all(path.is_file() for path in evit.iterdir()), "nothing is written into a bundle"


def test_run_draws_named_inputs(cli, evit, tmp_path):
    pixels = np.random.default_rng(0).normal(size=(1, 3, 64, 64)).astype(np.float32)
    np.savez(tmp_path / "in.npz", image=pixels)
    assert cli("run", evit, tmp_path / "in.npz", "--draw", tmp_path / "p.png").code == 0
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_run_draws_what_has_no_map(cli, exported, tmp_path):
    said = cli("run", exported, "--budget", 4, "--draw", tmp_path / "p.svg")
    assert "note: nothing is chosen: each of the 4 output tokens reads all 16 patches" in said.out
    drawn = (tmp_path / "p.svg").read_text()
    assert (
        "4 tokens read all 16 patches. Heat map of scores (the share of attention that the output tokens give" in drawn
    )
    assert "kept" not in drawn


def test_run_refuses_what_it_cannot_draw(cli, exported, exported_tokens, tmp_path):
    for words, message in (
        ((exported, "--draw", tmp_path / "p.jpg"), "p.jpg must end in .png, .svg or .html"),
        ((exported, "--draw", exported / "p.png"), "p.png lies in the bundle, which would no longer be whole"),
        (
            (exported_tokens, "--draw", tmp_path / "p.png"),
            "takes tokens float32[1, 20, 24], and there is no image to draw",
        ),
    ):
        said = cli("run", *words)
        assert said.code == 2
        assert message in said.err
    assert not list(tmp_path.iterdir())


def test_a_batch_has_no_picture(exported):
    opened = open_bundle(exported)

    def with_batches(*batches):
        buckets = tuple(msgspec.structs.replace(opened.manifest.buckets[0], batch=batch) for batch in batches)
        return msgspec.structs.replace(opened, manifest=msgspec.structs.replace(opened.manifest, buckets=buckets))

    require_drawable(with_batches(1, 4), batch=None)
    with pytest.raises(InvalidSpec, match="batch 4 takes more; leave --batch out"):
        require_drawable(with_batches(1, 4), batch=4)
    with pytest.raises(InvalidSpec, match="batch 2 takes more; export the bundle with --batch 1 as well"):
        require_drawable(with_batches(2, 4), batch=None)
    first = msgspec.structs.replace(opened.manifest.buckets[0].inputs[0], shape=(1, 2, 3, 64, 64))
    bucket = msgspec.structs.replace(opened.manifest.buckets[0], inputs=(first,))
    several = msgspec.structs.replace(opened, manifest=msgspec.structs.replace(opened.manifest, buckets=(bucket,)))
    with pytest.raises(InvalidSpec, match=r"takes several at once, image float32\[1, 2, 3, 64, 64\]"):
        require_drawable(several, batch=None)


def test_without_onnx_ir_the_end_alone_is_drawn_and_it_is_said(evit, monkeypatch):
    """A bundle of before has no forced form, and a board has nothing to make it with."""

    def missing(*args, **more):
        raise MissingDependency("onnx_ir", needed_for=more["needed_for"], extra="export")

    monkeypatch.setattr("edgecomp.api._draw.forced_graph", missing)
    opened = open_bundle(evit)
    bucket = opened.manifest.buckets[0]
    index = np.asarray([[*range(11), -1]], np.int32)
    found = picture_of(opened, bucket, photograph_path(), {"index": index}).patches
    assert [one.name for one in found.layers] == ["at the end"]
    assert "the backbone's weights are random, untrained: so is what is chosen" in found.notes
    assert "the layers of `edgecomp run --draw` needs the package 'onnx_ir'" in found.notes[0]


def test_a_form_that_rounds_otherwise_is_said(evit):
    opened = open_bundle(evit)
    bucket = opened.manifest.buckets[0]
    index = np.asarray([[*range(11), -1]], np.int32)
    found = picture_of(opened, bucket, photograph_path(), {"index": index}).patches
    assert "its index is not the one of the outputs, and the picture is of that form" in found.notes[0]
    assert [one.name for one in found.layers] == ["block 1", "block 3"]


def test_report_has_the_patches_in_its_page(evit, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; pip install -e '.[dev]' brings it")
    from made_result import made_result

    from edgecomp import api
    from edgecomp.profiles.result import write_result

    write_result(made_result(), tmp_path / "r.json")
    outcome = api.report([tmp_path / "r.json"], html=tmp_path / "p.html", plot=tmp_path / "plots", bundle=evit)
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert '<figure id="patch-picture"' in text
    assert "b&lt;b&gt;" in text
    assert "b<b>" not in text
    assert not re.search(r"\sstyle=", text)
    (picture,) = (picture for one in outcome.page.sections for picture in one.pictures)
    assert picture.title == "evit on photograph.jpg: b<b>"
    assert {"patches.svg", "patches.png"} <= {path.name for path in (tmp_path / "plots").iterdir()}
