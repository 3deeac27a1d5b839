"""A Compressor of the user's own, held to the one that is made of its parameters and weights, which is exported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from edgecomp.compressors._base import Compressor
from edgecomp.errors import InvalidSpec
from edgecomp.specs import TensorSpec

__all__ = ["require_as_made"]

_MAX_REL = 1e-5  # of an output's largest magnitude
_ROUNDINGS = 16  # in types in which one rounding is more than that
_FULL = 32  # bits
_SHOWN = 5  # changes in a refusal
_MADE = ("preset", "training")  # attributes that each module has of its own


def require_as_made(given: Compressor) -> None:
    """Refuse a module that computes something else than its parameters and weights say: that is what is exported.

    Both run on the same seeded input, where the module stands and in its types. What has no forward pass of its own
    (between the blocks of a host), or does not run there, is held to the other by what can be seen of the two.

    Raises:
        InvalidSpec: the two differ; names what was changed.
    """
    made = _remade(given)
    changes = list(_changes(given, made))
    outputs = None if given.site.placement == "inside" else _run(made)
    if outputs is None:
        if changes:
            raise InvalidSpec(_refusal(given, "was changed", changes))
        return
    try:
        found = _run_as_it_is(given)
    except Exception as error:  # a hook may raise anything
        told = f"does not run, and what its params and weights make does ({type(error).__name__}: {error})"
        raise InvalidSpec(_refusal(given, told, changes)) from error
    if len(found) != len(outputs):
        raise InvalidSpec(_refusal(given, f"gives {len(found)} outputs and not {len(outputs)}", changes))
    for spec, got, expected in zip(given.output_specs(), found, outputs, strict=True):
        if by := _difference(got, expected):
            told = f"gives another {spec.name} than its params and weights say ({by})"
            raise InvalidSpec(_refusal(given, told, changes))


def _refusal(given: Compressor, told: str, changes: Sequence[str]) -> str:
    """Return the text of a refusal."""
    more = f", and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
    seen = f" It differs in: {'; '.join(changes[:_SHOWN])}{more}." if changes else ""
    return (
        f"the {type(given).__name__} given {told}.{seen} Only params and weights are exported: take hooks off, put "
        "parts and attributes back, or load its state_dict() into a module of edgecomp.compressor and see what that "
        "gives"
    )


def _remade(given: Compressor) -> Compressor:
    """Make the module again, on the same tensors, with buffers of its own in the same types."""
    with torch.random.fork_rng(devices=[]):
        made = type(given)(given.params, given.site, given.budget, given.output)
    made.load_state_dict(given.state_dict(), strict=True, assign=True)
    theirs = dict(given.named_buffers())
    for name, part in made.named_modules():
        for key, buffer in part.named_buffers(recurse=False):
            like = theirs.get(f"{name}.{key}" if name else key)
            if like is not None:
                setattr(part, key, buffer.to(like.device, like.dtype))
    return made.eval()


def _inputs(module: Compressor) -> list[Tensor]:
    """Return seeded inputs in the type and at the place of the weights."""
    like = next((value for value in module.state_dict().values() if value.is_floating_point()), torch.empty(0))
    return [_input(spec, like, index) for index, spec in enumerate(module.input_specs(1))]


def _input(spec: TensorSpec, like: Tensor, seed: int) -> Tensor:
    """Return normal values, shares that sum to 1, or ones of what counts or names something."""
    if spec.kind == "counts" or not spec.dtype.startswith("float"):
        is_float = spec.dtype.startswith("float")
        return torch.ones(spec.shape, dtype=like.dtype if is_float else getattr(torch, spec.dtype), device=like.device)
    values = torch.randn(spec.shape, generator=torch.Generator().manual_seed(seed))
    return (values.softmax(-1) if spec.kind == "attention" else values).to(like.device, like.dtype)


def _run(made: Compressor) -> tuple[Tensor, ...] | None:
    """Return the outputs; None where torch cannot compute in these types here."""
    try:
        with torch.no_grad():
            return tuple(made(*_inputs(made)))
    except (RuntimeError, TypeError):
        return None


def _run_as_it_is(given: Compressor) -> tuple[Tensor, ...]:
    """Return the outputs in evaluation, and leave the module in the modes that it was in."""
    with _evaluating(given), torch.no_grad():
        outputs = given(*_inputs(given))
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    try:
        module.eval()
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _difference(got: Tensor, expected: Tensor) -> str:
    """Say how an output differs; "" where by rounding at most."""
    if got.shape != expected.shape:
        return f"shape {list(got.shape)} and not {list(expected.shape)}"
    if not expected.is_floating_point():
        wrong = int((got != expected).sum())
        return f"{wrong} of {expected.numel()} numbers are others" if wrong else ""
    largest = max(float(expected.double().abs().max()), torch.finfo(torch.float32).tiny)
    same = (got == expected) | (got.isnan() & expected.isnan())
    rel = float((got.double() - expected.double()).masked_fill(same, 0.0).abs().max()) / largest
    kind = torch.finfo(expected.dtype)
    most = _ROUNDINGS * kind.eps if kind.bits < _FULL else _MAX_REL
    return "" if rel <= most else f"{rel:.2g} of the largest magnitude away"


def _changes(given: Compressor, made: Compressor) -> Iterator[str]:
    """Say what can be seen to be other in a module than in the one made again."""
    parts, own = dict(made.named_modules()), dict(given.named_modules())
    for name in parts.keys() - own.keys():
        yield f"{name} is gone"
    for name, part in own.items():
        where = name or "the module"
        if name not in parts:
            yield f"{name} was added"
            continue
        other = parts[name]
        if type(part) is not type(other) or part.extra_repr() != other.extra_repr():
            yield f"{where} is {_named(part)} and not {_named(other)}"
        else:
            yield from _changed_attributes(where, part, other)
        if "forward" in vars(part):
            yield f"the forward of {where} was replaced"
        if _count_hooks(part) > _count_hooks(other):
            yield f"{where} has a forward hook"
        buffers = dict(other.named_buffers(recurse=False))
        for key, value in part.named_buffers(recurse=False):
            if key in buffers and (value.shape != buffers[key].shape or _difference(value, buffers[key])):
                yield f"the buffer {key} of {where} is not what params and weights make"


def _count_hooks(part: nn.Module) -> int:
    return len(part._forward_hooks) + len(part._forward_pre_hooks)


def _changed_attributes(where: str, part: nn.Module, other: nn.Module) -> Iterator[str]:
    """Say which plain numbers and words of a part are others."""
    for key, value in vars(part).items():
        if key.startswith("_") or key in _MADE or not isinstance(value, (int, float, str, tuple)):
            continue
        if hasattr(other, key) and getattr(other, key) != value:
            yield f"{key} of {where} is {value!r} and not {getattr(other, key)!r}"


def _named(part: nn.Module) -> str:
    return f"{type(part).__name__}({part.extra_repr()})"
