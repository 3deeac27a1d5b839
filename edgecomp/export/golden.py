"""Golden inputs and outputs: seeded numbers and the shipped photograph, through the eager original."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from edgecomp.backbones.assemble import Assembly
from edgecomp.backbones.placed import PlacedModel, PlainModel
from edgecomp.backbones.seam import Rest, Stem
from edgecomp.bundle import GOLDEN, choice_key, golden_key
from edgecomp.export.choices import ChoiceRecorder
from edgecomp.images import PixelType, read_image, resize_and_crop, to_pixels
from edgecomp.resources import photograph_path
from edgecomp.specs import Preprocess, TensorSpec
from edgecomp.words import WORD_SIGNALS, read_words

__all__ = ["golden_inputs", "input_specs_of", "run_module", "write_goldens"]

Array = npt.NDArray[np.generic]
_POSITIONS = 0.1  # standard deviation of the table of positions; tokens have one
_HALVINGS = 8  # of the way from a plain image to noise, on the search for a router's threshold
_BESIDE = 1e-3  # how far a threshold is moved to one side of a need
_IDS = 16  # of a vocabulary's first entries
_PATCH = 16  # pixels; side of the photograph's patches where tokens are made of it


def write_goldens(
    folder: Path,
    assembly: Assembly,
    *,
    batch: int,
    seed: int,
    with_plain: bool,
    compare: Callable[[str, str, Array, Array], None],
) -> None:
    """Write inputs and the original's outputs for each budget, at the largest batch; smaller ones take the first rows.

    Args:
        batch: the largest batch.
        seed: of the inputs.
        with_plain: hold outputs of the uncompressed model too.
        compare: is handed case, output name, what the static module gives and what the original gives.
    """
    from safetensors.numpy import save

    specs = input_specs_of(assembly, batch)
    models: dict[str, PlacedModel | PlainModel] = {
        f"m{model.compressor.budget.tokens_out}": model for model in assembly.models
    }
    if with_plain and assembly.plain is not None:
        models["plain"] = assembly.plain
    tensors: dict[str, Array] = {}
    for case, inputs in golden_inputs(specs, seed=seed, preprocess=assembly.preprocess).items():
        for name, array in inputs.items():
            tensors[golden_key("input", case, name)] = np.ascontiguousarray(array)
        for part, model in models.items():
            arrays = [inputs[spec.name] for spec in model.input_specs(batch)]
            expected = run_module(model.reference().eval(), arrays)
            with ChoiceRecorder() as recorder:
                got = run_module(model, arrays)
            for spec, want, have in zip(model.output_specs(batch), expected, got, strict=True):
                compare(case, spec.name, have, want)
                tensors[golden_key("output", case, spec.name, part=part)] = np.ascontiguousarray(want)
            if assembly.then is None or assembly.seam is None:
                tensors |= _choices(recorder, case, part)  # equal outputs: these are the original's choices
        if assembly.then is not None:
            tensors |= _goldens_of_parts(assembly, inputs, case, batch, compare)
    if assembly.router is not None:
        tensors |= _router_goldens(assembly, tensors, batch)
    (folder / GOLDEN).write_bytes(save(tensors))


def _goldens_of_parts(
    assembly: Assembly,
    inputs: Mapping[str, Array],
    case: str,
    batch: int,
    compare: Callable[[str, str, Array, Array], None],
) -> dict[str, Array]:
    """Return what the original of the first of two methods hands over, and the choices of each by itself.

    The second's choices are those on what the first's original gave. Of graphs that are cut between them the golden
    file has them in place of the choices of both in a row, and of one graph for both under a name of their own.
    """
    seam, tensors = assembly.seam or 0, dict[str, Array]()
    word = "" if assembly.seam is not None else "then-"
    stem = Stem(assembly.models[-1], seam)
    arrays = [inputs[spec.name] for spec in stem.input_specs(batch)]
    expected = run_module(_Handing(assembly.models[-1]).eval(), arrays)
    with ChoiceRecorder() as recorder:
        got = run_module(stem, arrays)
    tensors |= _choices(recorder, case, "stem")
    handed: dict[str, Array] = {}
    for spec, want, have in zip(stem.output_specs(batch), expected, got, strict=True):
        compare(case, f"{spec.name} of {assembly.preset}", have, want)
        handed[spec.name] = want
        tensors[golden_key("output", case, spec.name, part="stem")] = np.ascontiguousarray(want)
    for model in assembly.models:
        rest = Rest(model, seam)
        with ChoiceRecorder() as recorder:
            run_module(rest, [{**inputs, **handed}[spec.name] for spec in rest.input_specs(batch)])
        tensors |= _choices(recorder, case, f"{word}m{model.compressor.budget.tokens_out}")
    return tensors


class _Handing(nn.Module):
    """What the first of two originals in a row hands to the second."""

    def __init__(self, model: PlacedModel) -> None:
        super().__init__()
        self.original = model.reference()

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return it."""
        return self.original.hand_over(*inputs)  # type: ignore[operator, no-any-return]


def _choices(recorder: ChoiceRecorder, case: str, part: str) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    for number, choice in enumerate(recorder.choices):
        tensors[choice_key(case, part, number, f"{choice.op}.scores")] = choice.scores
        tensors[choice_key(case, part, number, f"{choice.op}.indices")] = choice.indices
    return tensors


def input_specs_of(assembly: Assembly, batch: int) -> tuple[TensorSpec, ...]:
    """Return what the models of all buckets take together: a bucket may take an input that another has not."""
    specs = {spec.name: spec for model in assembly.models for spec in model.input_specs(batch)}
    return tuple(specs.values())


def _router_goldens(assembly: Assembly, inputs: Mapping[str, Array], batch: int) -> dict[str, Array]:
    """Return what the router says in torch: of the two cases, and of an image on each side of each threshold.

    These images lie between the photograph's mean colour and the seeded noise. Where they are all on one side, the
    two whose needs are farthest apart are taken, and the threshold moves between them.
    """
    router = assembly.router
    assert router is not None
    seam = assembly.seam
    stem = Stem(assembly.models[-1], seam) if router.reads == "stem" and seam is not None else None
    name = assembly.models[0].input_specs()[0].name
    usual = np.asarray(router.default_thresholds, np.float32)
    silence = np.zeros((1, len(WORD_SIGNALS)), np.float32)
    tensors: dict[str, Array] = {}

    def ask(case: str, first: Array, words: Array, thresholds: Array) -> Array:
        """Hold a case, and return the need of its first row."""
        rows = len(first)
        given = {"words": np.repeat(words, rows, 0), "thresholds": np.repeat(thresholds[None], rows, 0)}
        if not router.reads_words:
            del given["words"]
        seen = [first]
        beside: dict[str, Array] = {}
        if stem is not None:  # what its method reads besides is the same on both sides of a threshold
            for spec in stem.input_specs()[1:]:
                keys = (golden_key("input", one, spec.name) for one in (case, "seeded"))
                beside[spec.name] = next(inputs[key][:rows] for key in keys if key in inputs)
            handed = run_module(stem, [first, *beside.values()])
            named = dict(zip((spec.name for spec in stem.output_specs()), handed, strict=True))
            seen = [named[key] for key in router.stem_inputs]
        outputs = run_module(router, [*seen, *given.values()])
        if case:
            tensors.update(
                {golden_key("input", case, key): value for key, value in {name: first, **beside, **given}.items()}
            )
            for spec, output in zip(router.output_specs(), outputs, strict=True):
                tensors[golden_key("output", case, spec.name, part="router")] = np.ascontiguousarray(output)
        need: Array = outputs[1][0]
        return need

    for case, text in (("seeded", "How many small birds are not on the wire, and why?"), ("photo", "")):
        ask(case, inputs[golden_key("input", case, name)][:batch], read_words(text), usual)
    photo, noise = (inputs[golden_key("input", case, name)][:1] for case in ("photo", "seeded"))
    axes = (1, 2) if photo.dtype == np.uint8 else (2, 3)
    flat = np.broadcast_to(photo.mean(axes, keepdims=True, dtype=np.float64), photo.shape)

    def blend(share: float) -> Array:
        mixed: Array = (flat + share * (noise - flat)).astype(photo.dtype)
        return mixed

    for place, threshold in enumerate(usual):
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if ask("", blend(middle), silence, usual)[place] >= threshold else (middle, high)
        gap = high - low  # a further step to each side, so that rounding elsewhere cannot change the side
        under, over = blend(max(0.0, low - gap)), blend(min(1.0, high + gap))
        needs = [ask("", image, silence, usual)[place] for image in (under, over)]
        if needs[0] < threshold <= needs[1]:
            ask(f"under-{place + 1}", under, silence, usual)
            ask(f"over-{place + 1}", over, silence, usual)
            continue
        pool = [
            (float(ask("", image, silence, usual)[place]), image) for image in (photo, noise, blend(0.1), blend(0.5))
        ]
        clear = [one for one in pool if one[0] > _BESIDE] or pool  # a need of almost nothing is all rounding
        (least, plain), (most, busy) = (choose(clear, key=lambda one: one[0]) for choose in (min, max))
        middle, aside = (least + most) / 2, max(0.0, _BESIDE - (most - least) / 2)  # aside: of needs that are all alike
        ask(f"under-{place + 1}", plain, silence, np.full_like(usual, middle + aside))
        ask(f"over-{place + 1}", busy, silence, np.full_like(usual, middle - aside))
    return tensors


def golden_inputs(
    specs: Sequence[TensorSpec], *, seed: int, preprocess: Preprocess | None
) -> dict[str, dict[str, Array]]:
    """Return two cases of named inputs, `seeded` and `photo`.

    seeded: images and tokens of standard normal values (uint8: uniform; attention: their softmax), masks and sizes
    that end at different lengths (row 0 at three quarters), ids below 16.
    photo: the shipped photograph, in each row turned by a further quarter (mirrored after four); tokens are
    its 16-pixel patches times a fixed random matrix; masks and sizes are full.

    Args:
        specs: the inputs, with the largest batch.
        seed: of the numbers.
        preprocess: of images; None where the model takes tokens.
    """
    cases: dict[str, dict[str, Array]] = {"seeded": {}, "photo": {}}
    for index, spec in enumerate(specs):
        generator = np.random.default_rng([seed, index])
        rows = spec.shape[0] if spec.kind == "mask" else math.prod(spec.shape[: -_row_rank(spec)])
        if spec.kind == "mask":
            cases["seeded"][spec.name] = _ragged_mask(spec)
            cases["photo"][spec.name] = np.ones(spec.shape, dtype=bool)
        elif spec.kind == "image" and preprocess is not None:
            cases["seeded"][spec.name] = _noise(generator, spec)
            cases["photo"][spec.name] = _photographs(rows, preprocess, spec)
        elif spec.kind == "tokens":
            cases["seeded"][spec.name] = _noise(generator, spec)
            cases["photo"][spec.name] = _projected_patches(rows, generator, spec)
        elif spec.kind == "sizes":
            cases["seeded"][spec.name], cases["photo"][spec.name] = _sizes(spec)
        elif spec.kind == "ids":
            for case in cases.values():
                case[spec.name] = generator.integers(0, _IDS, spec.shape).astype(spec.dtype)
        elif spec.kind == "attention":
            cases["seeded"][spec.name], cases["photo"][spec.name] = _noise(generator, spec), _noise(generator, spec)
        else:
            cases["seeded"][spec.name] = cases["photo"][spec.name] = _noise(generator, spec)
    return cases


def run_module(module: nn.Module, inputs: Sequence[Array], *, threads: int = 1) -> tuple[npt.NDArray[np.float32], ...]:
    """Run a torch module on numpy arrays, without gradients, on one thread: equal bytes on any number of cores.

    Args:
        threads: another number, where speed is what counts; 0: torch's own choice.
    """
    usual = torch.get_num_threads()
    torch.set_num_threads(threads or usual)
    try:
        with torch.inference_mode():
            outputs = module(*(torch.from_numpy(np.ascontiguousarray(array)) for array in inputs))
    finally:
        torch.set_num_threads(usual)
    return tuple(output.numpy() for output in outputs)


def _row_rank(spec: TensorSpec) -> int:
    """Return how many trailing axes one image or one set of tokens has."""
    return {"image": 3, "tokens": 2}.get(spec.kind, len(spec.shape) - 1)


def _noise(generator: np.random.Generator, spec: TensorSpec) -> Array:
    if spec.dtype == "uint8":
        return generator.integers(0, 256, spec.shape, dtype=np.uint8)
    if spec.kind == "attention":
        weights = np.exp(generator.standard_normal(spec.shape, dtype=np.float32))
        shares: Array = (weights / weights.sum(-1, keepdims=True)).astype(spec.dtype)
        return shares
    return generator.standard_normal(spec.shape, dtype=np.float32).astype(spec.dtype)


def _ragged_mask(spec: TensorSpec) -> Array:
    """Return rows that keep three quarters of the tokens, a half, all, one, none, and so on."""
    count = spec.shape[-1]
    lengths = [max(1, count * 3 // 4), max(1, count // 2), count, 1, 0]
    rows = np.arange(math.prod(spec.shape[:-1]))
    return (np.arange(count) < np.array(lengths)[rows % 5, None]).reshape(spec.shape)


def _sizes(spec: TensorSpec) -> tuple[Array, Array]:
    """Return sizes that fill three quarters of the largest, most square grid, a half, all, one token, none; and all."""
    most = spec.limit or spec.tokens
    downs = range(1, min(most, math.isqrt(spec.tokens)) + 1)
    down, across = max(
        ((down, min(most, spec.tokens // down)) for down in downs), key=lambda at: (at[0] * at[1], at[0])
    )
    ragged = [(max(1, down * 3 // 4), across), (down, max(1, across // 2)), (down, across), (1, 1), (0, 0)]
    rows = np.arange(math.prod(spec.shape[:-1]))
    seeded = np.array(ragged, spec.dtype)[rows % 5].reshape(spec.shape)
    return seeded, np.broadcast_to(np.array((down, across), spec.dtype), spec.shape).copy()


def _turned(pixels: npt.NDArray[np.uint8], row: int) -> npt.NDArray[np.uint8]:
    turned = np.rot90(pixels, row % 4)
    return turned[:, ::-1] if row // 4 % 2 else turned


def _photographs(rows: int, preprocess: Preprocess, spec: TensorSpec) -> Array:
    from PIL import Image

    size = spec.shape[-2]  # not that of the preprocessing where an input is a part of an image
    preprocess = msgspec.structs.replace(preprocess, size=size)
    pixels = np.asarray(resize_and_crop(read_image(photograph_path()), preprocess))
    whole = Preprocess(size, 1.0, preprocess.interpolation, preprocess.mean, preprocess.std)
    dtype: PixelType = "uint8" if spec.dtype == "uint8" else "float32"
    turned = [np.ascontiguousarray(_turned(pixels, row)) for row in range(rows)]
    return np.concatenate([to_pixels(Image.fromarray(t), whole, dtype) for t in turned]).reshape(spec.shape)


def _projected_patches(rows: int, generator: np.random.Generator, spec: TensorSpec) -> Array:
    """Return (rows, N, D): patches in raster order, less mean, times a random matrix, of about unit variance.

    A small random table of positions is added, as encoders have one: patches of a clear sky are then alike, not equal.
    """
    count, width = spec.shape[-2:]
    side = math.isqrt(count - 1) + 1
    whole = Preprocess(side * _PATCH, 1.0, "bicubic", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    pixels = np.asarray(resize_and_crop(read_image(photograph_path()), whole))
    matrix = generator.standard_normal((3 * _PATCH**2, width), dtype=np.float32) / math.sqrt(3 * _PATCH**2)
    positions = _POSITIONS * generator.standard_normal((count, width), dtype=np.float32)
    made = []
    for row in range(rows):
        turned = (_turned(pixels, row).astype(np.float32) / 255 - 0.5) / 0.25
        patches = turned.reshape(side, _PATCH, side, _PATCH, 3).swapaxes(1, 2).reshape(side * side, -1)
        # einsum, since the bits of a product by BLAS depend on the number of threads
        made.append(np.einsum("np,pd->nd", patches, matrix)[:count] + positions)
    return np.stack(made).astype(spec.dtype).reshape(spec.shape)
