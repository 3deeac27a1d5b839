"""`edgecomp profile model.onnx`: an ONNX file of anybody's, with static shapes, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgecomp import __version__
from edgecomp.api._measure import Plan, command_of, measure_opened, short_of, target_named, utc_now
from edgecomp.api._profile_layers import Part, ablate_blocks, layer_times, with_shares
from edgecomp.api._progress import Progress
from edgecomp.errors import InvalidSpec, RunError
from edgecomp.profiles.machine import read_machine
from edgecomp.profiles.result import BlockTime, LayerTime, Result, Subject
from edgecomp.runners import Array, Runner, open_runner
from edgecomp.specs.origin import file_sha256

__all__ = ["profile_file", "seeded_inputs"]

_FLOATS = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}
_INTEGERS = {
    f"tensor({word})": np.dtype(word) for word in ("int8", "int16", "int32", "int64", "uint16", "uint32", "uint64")
}


def profile_file(model: Path, plan: Plan, *, budget: str | int | None, batch: int | None, progress: Progress) -> Result:
    """Measure an ONNX file; see `profile`."""
    if budget is not None or batch is not None:
        option = "--budget" if budget is not None else "--batch"
        raise InvalidSpec(f"{option} with {model.name}: an ONNX file is measured as it is; only bundles hold several")
    if not plan.runner.startswith("onnxruntime") or plan.original:
        asked = "--original" if plan.original else f"--runner {plan.runner}"
        raise InvalidSpec(
            f"{asked} with {model.name}: engines and torch models are made of bundles (`edgecomp export`); a plain "
            "ONNX file is measured in onnxruntime or onnxruntime-cuda"
        )
    if not model.is_file():
        raise RunError(f"model {model} cannot be read: there is no such file; check the path")

    def opened() -> Runner:
        return open_runner(plan.runner, model, threads=plan.threads)

    machine = read_machine()
    looked_at: Any = opened()
    with looked_at:
        inputs = seeded_inputs(model.name, looked_at.inputs)
    progress(f"timing {model.name} in {plan.runner}")
    items = next((array.shape[0] for array in inputs.values() if array.ndim), 1)
    notes = ["inputs are seeded noise, integers zeros"]

    def note(said: str) -> None:
        notes.append(said)
        progress(f"note: {said}")

    profile = measure_opened(plan, opened, inputs, model=model.name, batch=items, say=note, is_first=True)
    if short := short_of(plan, profile):
        note(short)
    layers: tuple[LayerTime, ...] = ()
    blocks: tuple[BlockTime, ...] = ()
    part = Part(model, model.name, inputs)
    if plan.per_layer:
        progress(f"timing the layers of {model.name}")
        layers = layer_times(plan, part, opened)
        profile = with_shares(profile, layers)
    if plan.ablate:
        blocks = ablate_blocks(plan, part, weights=model.parent, progress=progress)
    return Result(
        created=utc_now(),
        edgecomp=__version__,
        command=command_of(model, plan),
        target=target_named(plan, profile),
        subject=Subject(name=model.stem, digest=file_sha256(model)),
        machine=machine,
        profiles=(profile,),
        layers=layers,
        blocks=blocks,
        notes=tuple(notes),
    )


def seeded_inputs(name: str, inputs: Sequence[tuple[str, Sequence[Any], str]]) -> dict[str, Array]:
    """Return the same inputs on every machine: normal noise, bytes at random, True, and zeros of whole numbers.

    A whole number is an index more often than not, and only 0 is one of every table.

    Args:
        name: of the model, for messages.
        inputs: name, shape and ONNX Runtime's word for the type of each.

    Raises:
        InvalidSpec: a dimension is no number or below 1, or a type is none of numpy's.
    """
    random = np.random.default_rng(0)
    made: dict[str, Array] = {}
    for given, shape, kind in inputs:
        loose = [dim for dim in shape if not isinstance(dim, int) or dim < 1]
        if loose:
            raise InvalidSpec(
                f"{name}: input {given!r} has the dimension {loose[0]!r} in {list(shape)}, and a latency belongs to "
                "one shape that holds something; export the model with numbers from 1 on in its place"
            )
        if kind in _FLOATS:
            made[given] = random.standard_normal(shape, np.float64).astype(_FLOATS[kind])
        elif kind == "tensor(uint8)":
            made[given] = random.integers(0, 256, shape, np.uint8)
        elif kind == "tensor(bool)":
            made[given] = np.ones(shape, np.bool_)
        elif kind in _INTEGERS:
            made[given] = np.zeros(shape, _INTEGERS[kind])
        else:
            raise InvalidSpec(f"{name}: input {given!r} is a {kind}, which numpy does not have; give it a float input")
    return made
