"""Reading checkpoints that anybody may have made, and loading them without leaving anything unsaid."""

from __future__ import annotations

import fnmatch
import pickle
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from edgecomp.errors import WeightsError

__all__ = ["load_exactly", "read_checkpoint", "rename_key", "rename_keys"]

_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")


def read_checkpoint(path: Path, *, say: Callable[[str], None] = lambda note: None) -> dict[str, Tensor]:
    """Read a `.safetensors` or `.pt` file as fp32 tensors on the CPU; a pickle is read weights-only.

    Args:
        say: is told when values were stored in another floating type than fp32.

    Raises:
        WeightsError: the file is absent, truncated, no checkpoint, holds code, or holds NaN or Inf.
    """
    if not path.is_file():
        raise WeightsError(f"weights file {path} is not there; check the path")
    if path.suffix == ".safetensors":
        state = _read_safetensors(path)
    elif path.suffix in _PICKLES:
        state = _read_pickle(path)
    else:
        raise WeightsError(f"weights file {path} ends in {path.suffix!r}; give .safetensors or {', '.join(_PICKLES)}")
    if not state:
        raise WeightsError(f"weights file {path} holds no tensor; is it the right file?")
    read, stored = {}, set()
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise WeightsError(
                f"weights file {path}: {name!r} is a sparse, quantized or empty (meta) tensor; save plain values"
            )
        if tensor.is_floating_point():
            stored.add(str(tensor.dtype).removeprefix("torch."))
            tensor = tensor.to(torch.float32)
            broken = int((~torch.isfinite(tensor)).sum())
            if broken:
                raise WeightsError(
                    f"weights file {path}: {broken} of {tensor.numel()} values of {name!r} are NaN or Inf; "
                    "the checkpoint is broken, take an earlier one"
                )
        read[name] = tensor
    if stored - {"float32"}:
        say(f"{path.name} stores {', '.join(sorted(stored))}; it was read as float32")
    return read


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state: dict[str, Tensor] = load_file(path, device="cpu")
        return state
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"weights file {path} is truncated or not safetensors ({path.stat().st_size} bytes): {error}; copy it again"
        ) from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice to whoever wrote the file
            content = torch.load(path, map_location="cpu", weights_only=True)
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


def _damaged(path: Path, problem: str) -> WeightsError:
    first = problem.strip().splitlines()[0].split(". ")[0][:200].rstrip(" .:")
    return WeightsError(
        f"weights file {path} is truncated or no checkpoint ({path.stat().st_size} bytes): {first}; copy it again"
    )


def rename_key(name: str, patterns: Sequence[tuple[str, str]]) -> str:
    """Rename a key by regular expressions, each applied to what the one before it left."""
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name


def rename_keys(state: Mapping[str, Tensor], patterns: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Rename all keys; see `rename_key`."""
    return {rename_key(name, patterns): tensor for name, tensor in state.items()}


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
    missing = [key for key in own if key not in given]
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
        ("missing (by edgecomp's names)" if spelt else "missing", missing),
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
