"""Checkpoints as people hold them: whole models in shards, of another method, half there, damaged on purpose."""

from __future__ import annotations

import json
import shlex
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402 - torch first, or skip

import edgecomp  # noqa: E402
from edgecomp import api  # noqa: E402
from edgecomp.checkpoint import locate  # noqa: E402
from edgecomp.compressors._checkpoint import Checkpoint, read_checkpoint, weights_origin  # noqa: E402
from edgecomp.errors import EdgecompError, InvalidSpec, WeightsError  # noqa: E402
from edgecomp.specs.layout import Layout, best_match, name_groups  # noqa: E402

Cli = Callable[..., Any]
GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name: str) -> dict[str, torch.Tensor]:
    tensors = load_file(GOLDEN / name)
    return {key.removeprefix("weight."): value for key, value in tensors.items() if key.startswith("weight.")}


def write_shards(folder: Path, *shards: Mapping[str, torch.Tensor], index: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    names = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: value.contiguous() for name, value in shard.items()}, folder / file, {"format": "pt"})
        names |= dict.fromkeys(shard, file)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


IDEFICS1 = "perceiver_idefics1/n50.safetensors"
SET = {"head_dim": 16}


def resampler() -> dict[str, torch.Tensor]:
    """Return Idefics1's golden weights with 16 latents, which the recipe declares."""
    state = golden(IDEFICS1)
    return state | {"latents": torch.cat([state["latents"], state["latents"].flip(0)])}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Idefics1's resampler below a prefix, in one shard with a part of a language model; the rest in another."""
    own = {f"model.perceiver_resampler.{name}": value for name, value in resampler().items()}
    text = {f"model.layers.{n}.mlp.up_proj.weight": torch.zeros(2, 2) for n in range(40)}
    tower = {f"model.vision_model.layers.{n}.mlp.fc1.weight": torch.zeros(2, 2) for n in range(20)}
    folder = tmp_path_factory.mktemp("whole") / "idefics"
    return write_shards(folder, {**own, **dict(list(text.items())[:10])}, text, tower)


# -- folders, shards and indices ------------------------------------------------------------------------------


def test_a_folder_an_index_and_a_shard_name_the_same_checkpoint(whole: Path) -> None:
    names = [Checkpoint(path).stored.names for path in (whole, *sorted(whole.iterdir()))]
    assert len(names) == 5
    assert len(set(map(frozenset, names))) == 1
    note = locate(whole / "model-00002-of-00003.safetensors").note
    assert "model-00002-of-00003.safetensors is one shard of 3; the whole checkpoint beside it was taken" in note


def test_shards_without_an_index_are_taken_when_all_are_there(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "x", {"a": torch.ones(2)}, {"b": torch.zeros(3)}, index=False)
    assert set(read_checkpoint(folder)) == {"a", "b"}
    (folder / "model-00002-of-00002.safetensors").unlink()
    for path in (folder, folder / "model-00001-of-00002.safetensors"):
        with pytest.raises(WeightsError, match=r"1 of 2 shards are not there, first model-00002-of-00002\.safet"):
            read_checkpoint(path)


def test_pickled_shards(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.zeros(3).bfloat16()}, tmp_path / "pytorch_model-00002-of-00002.bin")
    index = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    said: list[str] = []
    read = read_checkpoint(tmp_path, say=said.append)
    assert {name: value.dtype for name, value in read.items()} == {"a": torch.float32, "b": torch.float32}
    assert said == [f"{tmp_path.name} stores float32 (1 tensor), bfloat16 (1 tensor); it was read as float32"]


def test_only_what_is_needed_is_read(tmp_path: Path) -> None:
    """Of shards of 12 GB (holes, which take no disk) a few kilobytes: neither time nor memory grows with the rest."""
    own = {f"resampler.{name}": value for name, value in golden(IDEFICS1).items()}
    folder = write_shards(tmp_path / "big", own, {"x": torch.zeros(1)})
    shard = folder / "model-00002-of-00002.safetensors"
    count, size = 600, 20_000_000
    header = {
        f"llm.layers.{n}.weight": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [n * size, (n + 1) * size]}
        for n in range(count)
    }
    text = json.dumps(header).encode()
    with shard.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + count * size)
    names = dict.fromkeys(own, "model-00001-of-00002.safetensors") | dict.fromkeys(header, shard.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert shard.stat().st_size > 12e9
    before, started = _resident_mib(), time.process_time()
    contents: Any = api.inspect(weights=folder, params=SET)
    checkpoint = Checkpoint(folder)
    (fit,) = contents.fits
    read = checkpoint.read({name: f"{fit.prefix}{name}" for name in golden(IDEFICS1)})
    origin = weights_origin(folder, read, layout="idefics1")
    assert (fit.method, fit.layout, fit.foreign) == ("perceiver", "idefics1", count)
    assert (origin.name, len(origin.sha256)) == ("big", 64)
    assert _resident_mib() - before < 200
    assert time.process_time() - started < 20


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def test_export_of_a_whole_model_says_what_it_took(whole: Path, tmp_path: Path) -> None:
    report = api.export("perceiver", backbone="none", weights=whole, params=SET | {"tokens": 50}, budget=8,
                        preset="smoke-idefics1", out=tmp_path / "out")  # fmt: skip
    weights = report.manifest.weights
    assert (weights.kind, weights.name, weights.layout) == ("file", "idefics", "idefics1")
    assert weights.sha256 == weights_origin(whole, resampler(), layout="").sha256
    (told,) = [note for note in report.manifest.notes if "layout" in note]
    assert told == (
        "weights in the layout idefics1 of perceiver, below 'model.perceiver_resampler.': 27 tensors of 87; left out "
        "as of another model: model.layers 40, model.vision_model 20"
    )
    again = api.export("perceiver", backbone="none", weights=whole, params=SET | {"tokens": 50}, budget=8,
                       preset="smoke-idefics1", out=tmp_path / "out")  # fmt: skip
    assert again.reused
    assert api.parity(report.bundle)


# -- bad input ------------------------------------------------------------------------------------------------


def _index(folder: Path, **weight_map: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _outside(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        save_file({"a": torch.ones(1)}, folder.parent / "elsewhere.safetensors")
        save_file({"a": torch.ones(1)}, folder / "here.safetensors")
        _index(folder, a=name, b="here.safetensors")
        return folder

    return make


def _half(folder: Path) -> Path:
    state = {f"connector.{name}": value for name, value in golden(IDEFICS1).items()}
    later = {name: value for name, value in state.items() if ".blocks.1." in name}
    write_shards(folder, {name: value for name, value in state.items() if name not in later}, later)
    (folder / "model-00002-of-00002.safetensors").unlink()
    return folder


def _lying(folder: Path) -> Path:
    write_shards(folder, {"a": torch.ones(1)}, {"b": torch.ones(1)})
    _index(folder, a="model-00001-of-00002.safetensors", c="model-00002-of-00002.safetensors")
    return folder


def _control(folder: Path) -> Path:
    save_file({"a\n\x1b[2J": torch.ones(1)}, folder / "x.safetensors")
    return folder


def _text(folder: Path, text: str = "{not json") -> Path:
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def _none_there(folder: Path) -> Path:
    _index(folder, a="gone.safetensors")
    return folder


def _sibling(folder: Path) -> Path:
    save_file(golden("c_abstractor/l64_q36_f64.safetensors"), folder / "x.safetensors")
    return folder / "x.safetensors"


def _saved_sibling(folder: Path) -> Path:
    module = edgecomp.compressor("c-abstractor", preset="smoke")
    return module.save(folder / "saved.safetensors")


def _float8(folder: Path) -> Path:
    state = {name: value.to(torch.float8_e4m3fn) for name, value in golden(IDEFICS1).items()}
    save_file(state, folder / "x.safetensors")
    return folder / "x.safetensors"


def _twice(folder: Path) -> Path:
    state = {f"{part}.{name}": value.clone() for name, value in golden(IDEFICS1).items() for part in ("see", "hear")}
    save_file(state, folder / "x.safetensors")
    return folder / "x.safetensors"


def _strange(folder: Path) -> Path:
    state = {f"model.resampler.{name}": value for name, value in golden(IDEFICS1).items()}
    save_file({**state, "model.resampler.blocks.0.0.gate": torch.ones(1)}, folder / "x.safetensors")
    return folder / "x.safetensors"


def _near(folder: Path) -> Path:
    state = {f"m.{name}": value for name, value in golden(IDEFICS1).items() if name[:11] != "layer_norm."}
    save_file({**state, "m.extra": torch.ones(1)}, folder / "x.safetensors")
    return folder / "x.safetensors"


def _rows(folder: Path) -> Path:
    state = golden(IDEFICS1) | {"latents": torch.zeros(300, 32)}
    save_file(state, folder / "x.safetensors")
    return folder / "x.safetensors"


def _quantized(folder: Path) -> Path:
    state = golden(IDEFICS1)
    state["latents"] = torch.zeros(16, 32)
    state["blocks.0.1.fc.weight"] = state["blocks.0.1.fc.weight"].to(torch.int8)
    save_file(state, folder / "x.safetensors")
    return folder / "x.safetensors"


def _two_in_a_folder(folder: Path) -> Path:
    for name in ("one", "two"):
        save_file({"a": torch.ones(1)}, folder / f"{name}.safetensors")
    return folder


BAD: list[tuple[Callable[[Path], Path], tuple[str, ...]]] = [
    (_outside("../elsewhere.safetensors"), ("points outside its folder", "'../elsewhere.safetensors'", "nothing was")),
    (_outside("/etc/passwd.safetensors"), ("points outside its folder", "'/etc/passwd.safetensors'")),
    (_outside("sub/x.safetensors"), ("points outside its folder", "'sub/x.safetensors'")),
    (_outside("..\\x.safetensors"), ("points outside its folder",)),
    (_outside("C:x.safetensors"), ("points outside its folder",)),
    (_outside("x.exe"), ("names 'x.exe'", "ends in neither .safetensors")),
    (_half, ("is not whole", "model-00002-of-00002.safetensors", "12 of the tensors", "connector.blocks.1.0.")),
    (_lying, ("its index says that 'c' is in model-00002-of-00002.safetensors, which does not hold it",)),
    (_control, (r"names a tensor 'a\n\x1b[2J'", "control characters")),
    (_text, ("model.safetensors.index.json is no JSON",)),
    (lambda folder: _text(folder, '{"weight_map": {"a": 3}}'), ("has no weight_map of names and files",)),
    (_none_there, ("names 1 shards, and none of them is there, first gone.safetensors",)),
    (
        _sibling,
        ("none of the layouts of perceiver (flamingo, ", "It is a checkpoint of c-abstractor: give --method c-"),
    ),
    (_saved_sibling, ("was saved by edgecomp for the method c-abstractor, and this is perceiver",)),
    (_float8, ("is stored as float8_e4m3fn, whose scales stand elsewhere", "bfloat16")),
    (_twice, ("holds the layout idefics1 2 times", "'see.'", "'hear.'")),
    (
        _strange,
        ("layout idefics1 of perceiver below 'model.resampler.'", "1 not known: model.resampler.blocks.0.0.gate"),
    ),
    (_near, ("nearest is idefics1 below 'm.'", "2 missing: m.layer_norm.weight, m.layer_norm.bias", "known: m.extra")),
    (_rows, ("hold 300 learned entries", "preset idefics1 of perceiver does not declare (from 16 to 256)")),
    (_quantized, ("not of a floating type: blocks.0.1.fc.weight torch.int8",)),
    (_two_in_a_folder, ("holds 2 checkpoints: one.safetensors, two.safetensors; name one of them",)),
]


@pytest.mark.parametrize(("make", "texts"), BAD, ids=[f"{n}-{make.__name__}" for n, (make, _) in enumerate(BAD)])
def test_bad_checkpoints(make: Callable[[Path], Path], texts: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    path = make(folder)
    with pytest.raises(EdgecompError) as caught:
        api.export("perceiver", backbone="none", weights=path, params=SET | {"tokens": 300}, out=tmp_path / "out")
    for text in texts:
        assert text in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_absent_shard_of_others_is_no_hindrance(whole: Path, tmp_path: Path) -> None:
    """Who brings the one shard that is needed, and the index, has all that is needed."""
    for name in ("model-00001-of-00003.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    contents: Any = api.inspect(weights=tmp_path, params=SET)
    assert contents
    assert contents.absent == ("model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors")
    module = edgecomp.compressor("perceiver", weights=tmp_path, preset="smoke-idefics1", tokens=50, **SET)
    assert torch.equal(module.latents, resampler()["latents"].float())


def test_a_mix_of_types_is_said_with_counts(tmp_path: Path) -> None:
    state = golden(IDEFICS1)
    state |= {name: value.bfloat16() for name, value in state.items() if value.ndim == 2}
    save_file(state, tmp_path / "mix.safetensors")
    said: list[str] = []
    read = Checkpoint(tmp_path / "mix.safetensors").read(say=said.append)
    assert {value.dtype for value in read.values()} == {torch.float32}
    assert said == ["mix.safetensors stores float32 (14 tensors), bfloat16 (13 tensors); it was read as float32"]


def test_random_bytes_in_headers_and_indices_raise_nothing_else(tmp_path: Path) -> None:
    """Whatever a header or an index is altered to, it is read or refused, and refused in words."""
    write_shards(tmp_path, {"a.weight": torch.ones(2, 3)}, {"b.weight": torch.zeros(4)})
    generator = np.random.default_rng(0)
    refusals = []
    for file in sorted(tmp_path.iterdir()):
        whole = file.read_bytes()
        header = len(whole) if file.suffix == ".json" else 8 + int.from_bytes(whole[:8], "little")
        for _ in range(150):
            altered = bytearray(whole)
            for position in generator.integers(0, header, int(generator.integers(1, 4))):
                altered[position] = int(generator.choice(np.frombuffer(b'0129{}[]",:-./x\\\xff\x00', np.uint8)))
            file.write_bytes(altered)
            try:
                read_checkpoint(tmp_path)
            except WeightsError as error:
                refusals.append(str(error))
        file.write_bytes(whole)
    assert len(refusals) > 300
    assert [text for text in refusals if "\n" in text or str(tmp_path) not in text] == []
    assert set(read_checkpoint(tmp_path)) == {"a.weight", "b.weight"}


def test_weights_of_another_grid_are_refused(tmp_path: Path) -> None:
    save_file(golden("c_abstractor/l64_q36_f64.safetensors"), tmp_path / "x.safetensors")
    with pytest.raises(InvalidSpec, match=r"params\.tokens=100 was set, and the weights say 64"):
        edgecomp.compressor("c-abstractor", grid=10, queries=25, weights=tmp_path / "x.safetensors")


# -- inspect --------------------------------------------------------------------------------------------------


def test_inspect_prints_what_fits_and_what_exports_it(whole: Path, cli: Cli) -> None:
    said = cli("inspect", "--weights", whole, "--set", "params.head_dim=16")
    text = said.out
    assert said.code == 0
    for line in (
        "idefics: checkpoint, ",
        "in 3 shards, 87 tensors",
        "types      float32 (87); all are read as float32",
        "fits       perceiver, layout idefics1 below 'model.perceiver_resampler.': 27 tensors, ",
        "left out   60 tensors of other models: model.layers 40, model.vision_model 20",
        "embed_dim=32, family=idefics1",
        f"export     edgecomp export --method perceiver --weights {shlex.quote(str(whole))} --backbone none --set",
    ):
        assert line in text, text


def test_inspect_of_what_fits_nothing(tmp_path: Path, cli: Cli) -> None:
    save_file({"conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)}, tmp_path / "r.safetensors")
    said = cli("inspect", "--weights", tmp_path / "r.safetensors")
    assert said.code == 1
    assert "no layout of any method" in said.out
    assert "first keys conv1.weight, fc.weight" in said.out
    for words, text in (
        (["inspect"], "give either a bundle"),
        (["inspect", tmp_path, "--weights", tmp_path], "give either a bundle"),
        (["inspect", tmp_path, "--set", "params.a=1"], "parameters are for a checkpoint"),
    ):
        said = cli(*words)
        assert said.code == 2
        assert text in said.err


# -- the rule -------------------------------------------------------------------------------------------------


def test_prefix_foreign_and_unknown() -> None:
    layout = Layout("x", ("q", "net.*.{a,b}.weight"), ("pos",), ("layers.**",))
    keys = [
        "lm.head",
        "m.q",
        "m.net.0.a.weight",
        "m.net.0.b.weight",
        "m.layers.3.x.weight",
        "m.pos",
        "m.net.0.c.weight",
    ]
    match = best_match(keys, [layout])
    assert match is not None
    assert match.fits
    assert (match.prefix, match.unknown) == ("m.", ("m.net.0.c.weight",))
    assert match.foreign == ("lm.head", "m.layers.3.x.weight")
    assert match.names["net.0.a.weight"] == "m.net.0.a.weight"
    less = best_match(["m.q", "m.net.0.a.weight", "n.q"], [layout])
    assert less is not None
    assert (less.fits, less.prefix, less.missing) == (False, "m.", ("net.*.b.weight",))
    assert less.differences() == "1 missing: m.net.*.b.weight"
    assert best_match(["conv1.weight"], [layout]) is None
    assert name_groups(["model.layers.0.a", "model.layers.1.a", "lm_head.weight"]) == "model.layers 2, lm_head 1"


# -- edgecomp.compressor and save -----------------------------------------------------------------------------


def test_a_parameter_that_was_renamed_since_is_read_by_its_old_name(tmp_path: Path) -> None:
    from edgecomp.compressors._checkpoint import METHOD, PARAMS, PRESET, write_checkpoint

    module = edgecomp.compressor("perceiver", grid=4, queries=4, preset="smoke-idefics1", images=3)
    told = {
        ("media" if name == "images" else name): value for name, value in msgspec.structs.asdict(module.params).items()
    }
    assert told["media"] == 3
    written = {METHOD: "perceiver", PARAMS: json.dumps(told), PRESET: "smoke-idefics1"}
    path = write_checkpoint(tmp_path / "old.safetensors", module.state_dict(), metadata=written)
    again = edgecomp.compressor("perceiver", weights=path, queries=4)
    assert again.params.images == 3
    (fit,) = api.inspect(weights=path).fits
    assert "images" in fit.decided
    with pytest.raises(InvalidSpec, match=r"params\.images=2 was set, and the weights were saved with 3"):
        edgecomp.compressor("perceiver", weights=path, queries=4, images=2)


def test_a_trained_module_is_saved_loaded_and_exported(tmp_path: Path) -> None:
    """A few steps change the weights; the file, the module loaded from it and the bundle have them."""
    module = edgecomp.compressor(
        "perceiver", grid=4, queries=4, preset="smoke-idefics1", context_dim=24, num_heads=3, head_dim=8, depth=1
    )
    assert module.training
    assert (module.budget.tokens_in, module.budget.tokens_out) == (16, 4)
    tokens = torch.randn(8, 16, 24, generator=torch.Generator().manual_seed(0))
    optimizer, losses = torch.optim.Adam(module.parameters(), lr=1e-2), []
    for _ in range(20):
        (latents,) = module(tokens)
        loss = (latents.mean(1) - tokens.mean(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in module.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    path = module.save(tmp_path / "trained.safetensors")
    contents: Any = api.inspect(weights=path)
    (fit,) = contents.fits
    assert (fit.method, fit.layout, contents.saved_by) == ("perceiver", "edgecomp", "perceiver")
    again = edgecomp.compressor("perceiver", weights=path, preset="smoke-idefics1", queries=4)
    assert again.params.head_dim == module.params.head_dim == 8
    with torch.inference_mode():
        (expected,) = module.eval()(tokens)
        assert torch.equal(again.eval()(tokens)[0], expected)
    by_class = api.export(module, preset="smoke-idefics1", out=tmp_path / "class")
    by_file = api.export(
        "perceiver", backbone="none", preset="smoke-idefics1", weights=path, budget=4, out=tmp_path / "file"
    )
    assert by_class.manifest.weights.kind == "module"
    assert by_file.manifest.weights.layout == "edgecomp"
    stored = [report.bundle / "weights.data" for report in (by_class, by_file)]
    assert stored[0].read_bytes() == stored[1].read_bytes()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"grid": 4, "tokens": 20}, "tokens=20 is not a grid of 4 x 4"),
        ({"grid": -1}, "grid=-1"),
        ({"grid": 4, "queries": 64}, "budget 64 is above the 16 tokens"),
        ({"depht": 3}, "did you mean 'depth'"),
        ({"preset": "smoke-host", "weights": "nowhere.pt"}, "nowhere.pt is not there"),
    ],
)
def test_modules_that_cannot_be(words: dict[str, Any], text: str) -> None:
    with pytest.raises(EdgecompError, match=text):
        edgecomp.compressor("perceiver", **words)


def test_save_refuses(tmp_path: Path) -> None:
    module = edgecomp.compressor("perceiver", preset="smoke")
    for path, text in (
        (tmp_path / "x.pt", "ends in '.pt'; name it .safetensors"),
        (tmp_path / "no" / "x.safetensors", r"folder .*no of weights file x\.safetensors is not there"),
    ):
        with pytest.raises(WeightsError, match=text):
            module.save(path)
    with pytest.raises(InvalidSpec, match="not in 'lucid'"):
        module.save(tmp_path / "x.safetensors", layout="lucid")
    with torch.no_grad():
        module.latents[0, 0] = float("nan")
    with pytest.raises(WeightsError, match=r"1 of .* tensors hold NaN or Inf, first latents; nothing was written"):
        module.save(tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []
