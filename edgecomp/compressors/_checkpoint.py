"""Reading checkpoints that anybody may have made, and loading them without leaving anything unsaid."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from edgecomp.checkpoint import FLOATS, Entry, Stored, count_tensors, locate, read_headers, stored_of
from edgecomp.errors import WeightsError
from edgecomp.files import JSON_ERRORS
from edgecomp.specs.origin import WeightsOrigin, file_origin

__all__ = [
    "IMAGE_SIZE",
    "METHOD",
    "PARAMS",
    "PRESET",
    "TOKENS_IN",
    "TOKENS_OUT",
    "Checkpoint",
    "Saved",
    "count_numbered",
    "load_exactly",
    "part_with",
    "read_checkpoint",
    "rename_key",
    "rename_keys",
    "saved_of",
    "spell_missing",
    "state_digest",
    "weights_origin",
    "write_checkpoint",
]

# In the metadata of what `Compressor.save` writes.
METHOD, PARAMS, PRESET = "edgecomp.method", "edgecomp.params", "edgecomp.preset"
TOKENS_IN, TOKENS_OUT, IMAGE_SIZE = "edgecomp.tokens_in", "edgecomp.tokens_out", "edgecomp.image_size"
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a word of a key
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")


class Saved(msgspec.Struct, frozen=True):
    """What is said of the module beside the weights: what `Compressor.save` wrote; of originals, their config.json.

    Attributes:
        declared: parameters as a config.json beside the weights gives them; None where there is no such file.
        tokens_in, tokens_out: tokens that went in, and that it kept; 0 where the file does not say.
        image_size: of an encoder, in pixels; 0 of others.
        layer: of the hidden states of its tower the one that a whole model reads, from the end; 0: not said.
    """

    params: dict[str, Any] = {}
    preset: str = ""
    declared: dict[str, Any] | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    image_size: int = 0
    layer: int = 0

    def renamed(self, names: Mapping[str, str]) -> Saved:
        """Return the same with parameters by their names of today, which `names` gives for those of before."""
        params = {names.get(name, name): value for name, value in self.params.items()}
        return msgspec.structs.replace(self, params=params)


class Checkpoint:
    """An open checkpoint: names and shapes are known, and a tensor is read when it is asked for.

    Args:
        path: a file, an index, or a folder with one checkpoint; see `edgecomp.checkpoint.locate`.

    Attributes:
        notes: what was passed over in opening it.
    """

    def __init__(self, path: Path) -> None:
        located = locate(path)
        self._pickled: dict[str, Tensor] = {}
        self.notes: list[str] = []
        if not located.is_pickled:
            self.stored = read_headers(located)
            return
        found = {file: _read_pickle(file, self.notes) for file in located.files}
        entries = {}
        for file, tensors in found.items():
            self._pickled |= tensors
            entries[file] = {
                name: Entry(file, tuple(tensor.shape), _name_type(tensor.dtype), tensor.numel() * tensor.element_size())
                for name, tensor in tensors.items()
            }
        self.stored = stored_of(located, entries)

    @property
    def path(self) -> Path:
        """What the user named."""
        return self.stored.located.path

    @property
    def saved(self) -> Saved:
        """What the file says of the module that it was saved from."""
        return saved_of(self.stored)

    def read(
        self, names: Mapping[str, str] | None = None, *, say: Callable[[str], None] = lambda note: None
    ) -> dict[str, Tensor]:
        """Read tensors as fp32 on the CPU, whatever floating type they are stored in; integers stay what they are.

        Args:
            names: what each is to be called -> its name in the checkpoint; all, by their own names, where left out.
            say: is told what was passed over, and when values were stored in another floating type than fp32.

        Raises:
            WeightsError: a tensor lies in a shard that is absent, holds no plain values, or NaN or Inf.
        """
        chosen = {name: name for name in self.stored.names} if names is None else names
        self.stored.require_there(chosen.values())
        files: dict[Path, dict[str, str]] = {}
        for name, key in chosen.items():
            files.setdefault(self.stored.entries[key].file, {})[name] = key
        read: dict[str, Tensor] = {}
        for file, wanted in files.items():
            tensors = self._tensors(file, wanted)
            read |= {name: _plain(tensors[name], file, key) for name, key in wanted.items()}
        for note in self.notes:
            say(note)
        self._say_types(chosen.values(), say)
        return {name: read[name] for name in chosen}

    def require_floats(self, names: Iterable[str], *, needed: Iterable[str]) -> None:
        """Refuse by the headers alone what `read`, or loading what it read, would refuse: values that are no weights.

        Args:
            needed: those that are weights in any case; others may be counters or places.
        """
        weights, entries = set(needed), self.stored.entries
        for key in names:
            dtype = entries[key].dtype if key in entries else "float32"
            if dtype in FLOATS or (key not in weights and "float" not in dtype):
                continue
            raise WeightsError(
                f"weights file {entries[key].file}: {key!r} is stored as {dtype}, which is no plain floating type; "
                "give the checkpoint in bfloat16, float16 or float32"
            )

    def outline(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """Return tensors of the right shapes that hold nothing; those of absent shards are left out."""
        held = {name: self.stored.entries[key] for name, key in names.items() if key in self.stored.entries}
        return {name: torch.empty(entry.shape, device="meta") for name, entry in held.items()}

    def _tensors(self, file: Path, wanted: Mapping[str, str]) -> dict[str, Tensor]:
        if self._pickled:
            return {name: self._pickled[key] for name, key in wanted.items()}
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                return {name: opened.get_tensor(key) for name, key in wanted.items()}
        except (SafetensorError, OSError, ValueError, AttributeError) as error:
            raise WeightsError(
                f"weights file {file} is truncated or not safetensors ({file.stat().st_size} bytes): {error}; "
                "copy it again"
            ) from None

    def _say_types(self, keys: Iterable[str], say: Callable[[str], None]) -> None:
        counts = Counter(self.stored.entries[key].dtype for key in keys)
        floats = {dtype: count for dtype, count in counts.most_common() if "float" in dtype}
        if set(floats) - {"float32"}:
            mix = ", ".join(f"{dtype} ({count_tensors(count)})" for dtype, count in floats.items())
            told = mix if len(floats) > 1 else next(iter(floats))
            say(f"{self.path.name} stores {told}; it was read as float32")


def saved_of(stored: Stored) -> Saved:
    """Return what a checkpoint says of the module that it was saved from."""
    metadata, path = stored.metadata, stored.located.path
    try:
        params = msgspec.json.decode(metadata.get(PARAMS, "{}"), type=dict[str, Any])
    except JSON_ERRORS as error:
        raise WeightsError(f"weights file {path}: {PARAMS} in its metadata is damaged ({error})") from None
    counts = {key: metadata.get(key, "0") for key in (TOKENS_IN, TOKENS_OUT, IMAGE_SIZE)}
    for key, text in counts.items():
        if not re.fullmatch("[0-9]{1,7}", text):
            raise WeightsError(f"weights file {path}: {key}={text!r} in its metadata is no count")
    tokens_in, tokens_out, image_size = map(int, counts.values())
    return Saved(params, metadata.get(PRESET, ""), tokens_in=tokens_in, tokens_out=tokens_out, image_size=image_size)


def read_checkpoint(path: Path, *, say: Callable[[str], None] = lambda note: None) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint as fp32 on the CPU; a pickle is read weights-only. See `Checkpoint`.

    Raises:
        WeightsError: the file is absent, truncated, no checkpoint, holds code, or holds NaN or Inf.
    """
    return Checkpoint(path).read(say=say)


def weights_origin(path: Path, state: Mapping[str, Tensor], *, layout: str) -> WeightsOrigin:
    """Return where weights come from: of a checkpoint in shards, the digest is over the tensors taken from it.

    Args:
        state: these tensors, as they were read.
    """
    located = locate(path)
    if not located.is_sharded:
        return file_origin(located.files[0], layout=layout)
    folder = located.files[0].parent.resolve().name
    return WeightsOrigin(kind="file", name=folder, sha256=state_digest(state), layout=layout)


def write_checkpoint(path: Path, state: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> Path:
    """Write tensors as safetensors, whole or not at all."""
    from safetensors.torch import save_file

    if path.suffix != ".safetensors":
        raise WeightsError(f"weights file {path} ends in {path.suffix!r}; name it .safetensors")
    if not path.parent.is_dir():
        raise WeightsError(f"folder {path.parent} of weights file {path.name} is not there; make it first")
    broken = [key for key, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise WeightsError(
            f"{len(broken)} of {len(state)} tensors hold NaN or Inf, first {broken[0]}; nothing was written to {path}"
        )
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    copies = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in state.items()}  # none shares another's
    try:
        save_file(copies, part, {"format": "pt", **metadata})
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _name_type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain(tensor: Tensor, file: Path, key: str) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise WeightsError(
            f"weights file {file}: {key!r} is a sparse, quantized or empty (meta) tensor; save plain values"
        )
    if not tensor.is_floating_point():
        return tensor
    if tensor.dtype.itemsize == 1:
        raise WeightsError(
            f"weights file {file}: {key!r} is stored as {_name_type(tensor.dtype)}, whose scales stand elsewhere, so "
            "its values would be wrong; give the checkpoint in bfloat16, float16 or float32"
        )
    tensor = tensor.to(torch.float32)
    broken = int((~torch.isfinite(tensor)).sum())
    if broken:
        raise WeightsError(
            f"weights file {file}: {broken} of {tensor.numel()} values of {key!r} are NaN or Inf; "
            "the checkpoint is broken, take an earlier one"
        )
    return tensor


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 over names, types, shapes and bytes of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(msgspec.json.encode([name, str(tensor.dtype), list(tensor.shape)]))
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_pickle(path: Path, notes: list[str]) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice to whoever wrote the file
            # mapped, so that what is not taken is not read; files of before torch 1.6 cannot be
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))  # torch's own text advises to run it all the same
        if found is None:
            raise _damaged(path, "bytes that no checkpoint has") from None
        raise WeightsError(
            f"weights file {path} holds more than weights: loading it would run {found[1]}, so it was not loaded; "
            "save its state_dict alone, best as .safetensors"
        ) from None
    except Exception as error:  # noqa: BLE001 - a damaged pickle can raise anything
        is_told = isinstance(error, (RuntimeError, OSError)) and str(error)  # what else is raised says little
        raise _damaged(path, str(error) if is_told else "bytes that no checkpoint has") from None
    while isinstance(content, dict) and (inner := [w for w in _WRAPPERS if isinstance(content.get(w), dict)]):
        beside = [name for name, part in content.items() if name != inner[0] and _holds_tensors(part)]
        if beside:
            left = ", ".join(map(str, beside))
            notes.append(
                f"{path.name} holds several sets of tensors: {inner[0]} was read, and not {left}; save that one in a "
                "file of its own if it is meant"
            )
        content = content[inner[0]]
    if not isinstance(content, dict):
        raise WeightsError(
            f"weights file {path} holds a {type(content).__name__}, not named tensors; save a state_dict"
        )
    state = {str(name): tensor.detach() for name, tensor in content.items() if isinstance(tensor, Tensor)}
    if content and not state:
        keys = ", ".join(map(str, list(content)[:5]))
        raise WeightsError(f"weights file {path} holds no tensor, only {keys}; save a state_dict alone")
    return state


def _holds_tensors(part: object) -> bool:
    return isinstance(part, dict) and any(isinstance(value, Tensor) for value in part.values())


def _damaged(path: Path, problem: str) -> WeightsError:
    first = problem.strip().splitlines()[0].split(". ")[0][:200].rstrip(" .:")
    return WeightsError(
        f"weights file {path} is truncated or no checkpoint ({path.stat().st_size} bytes): {first}; copy it again"
    )


def rename_key(name: str, patterns: Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]) -> str:
    """Rename a key by regular expressions, each applied to what the one before it left; see `re.sub`."""
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name


def rename_keys(state: Mapping[str, Tensor], patterns: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Rename all keys; see `rename_key`."""
    return {rename_key(name, patterns): tensor for name, tensor in state.items()}


def part_with(state: Mapping[str, Tensor], anchor: str) -> dict[str, str]:
    """Return the keys of the one module of a whole model that holds `anchor`: short key -> the file's key.

    What stands outside that module (a language model, a vision tower) is left out. Empty: no module holds it.

    Raises:
        WeightsError: several modules hold it.
    """
    prefixes = sorted(key[: -len(anchor)] for key in state if key == anchor or key.endswith(f".{anchor}"))
    if not prefixes:
        return {}
    if len(prefixes) > 1:
        raise WeightsError(
            f"weights hold {anchor!r} {len(prefixes)} times, under {', '.join(map(repr, prefixes[:4]))}; give one of "
            "them"
        )
    return {key.removeprefix(prefixes[0]): key for key in state if key.startswith(prefixes[0])}


def count_numbered(names: Iterable[str], part: str) -> int:
    """Return how many modules are numbered below `part`: one more than the highest number, 0 without any."""
    numbers = (name.removeprefix(f"{part}.").partition(".")[0] for name in names if name.startswith(f"{part}."))
    return 1 + max(map(int, numbers), default=-1)


def spell_missing(key: str, spelt: Mapping[str, str]) -> str:
    """Return what a file would call a key that it lacks, by the nearest one that it has; else edgecomp's own name."""
    if not spelt:
        return key
    for other, told in spelt.items():  # the same tensor of another layer
        if _NUMBER.sub("*", other) != _NUMBER.sub("*", key) or other == told:
            continue
        pairs = iter(zip(_NUMBER.findall(other), _NUMBER.findall(key), strict=True))
        have, want = next(pairs, ("", ""))
        words = told.split(".")
        for place, word in enumerate(words):
            if word == have:
                words[place] = want
                have, want = next(pairs, ("", ""))
        if not have:
            return ".".join(words)
    module, _, leaf = key.rpartition(".")
    for other, told in spelt.items():  # the weight of a bias
        part, _, last = other.rpartition(".")
        if module and part == module and told.endswith(f".{last}"):
            return told.removesuffix(last) + leaf
    return f"{key} (by edgecomp's name)"


def load_exactly(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    layout: str,
    unread: Sequence[str] = (),
    file_keys: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Load `state` into `module`; every key must fit, or stand among `unread` (shell patterns).

    Args:
        file_keys: what the file calls a key of `state`, where `rename_keys` gave it another name.

    Returns:
        the keys that were left unread.

    Raises:
        WeightsError: it lists every key that is missing, not known, or of another shape, as the file spells it.
    """
    spelt = file_keys or {}
    own = module.state_dict()
    skipped = tuple(key for key in state if any(fnmatch.fnmatchcase(key, pattern) for pattern in unread))
    given = {key: tensor for key, tensor in state.items() if key not in skipped}
    problems = []
    missing = [spell_missing(key, spelt) for key in own if key not in given]
    unknown = [spelt.get(key, key) for key in given if key not in own]
    shapes = [
        f"{spelt.get(key, key)} {tuple(given[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in given and given[key].shape != own[key].shape
    ]
    types = [
        f"{spelt.get(key, key)} {given[key].dtype}"
        for key in own
        if key in given and own[key].is_floating_point() and not given[key].is_floating_point()
    ]
    for what, keys in (
        ("missing", missing),
        ("not known", unknown),
        ("of another shape", shapes),
        ("not of a floating type", types),
    ):
        if keys:
            problems.append(f"{len(keys)} {what}: {', '.join(keys)}")
    if problems:
        raise WeightsError(
            f"weights in the {layout} layout do not fit ({len(given)} keys given, {len(own)} needed). "
            + "; ".join(problems)
            + ". Match the parameters (--set) to the checkpoint, or give another file."
        )
    module.load_state_dict({key: tensor.to(own[key].dtype) for key, tensor in given.items()}, strict=True)
    return skipped
