"""The peak rates that an estimate divides by: stated ones, and the few that may be derived from them."""

from __future__ import annotations

from typing import Annotated, get_args

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from edgecomp.errors import InvalidSpec, UnknownName
from edgecomp.specs.target import Peak, PowerMode, Precision, Target

__all__ = ["Rate", "at_power_mode", "rate_of", "require_precision"]

_FIRST_TF32 = 80  # compute capability
_FP32_OF_FP16 = {72: 8, 75: 8}  # 64 FP32 cores (128 FLOP a clock) beside tensor cores of 1024 FLOP a clock in each SM


class Rate(msgspec.Struct, frozen=True):
    """A dense peak rate.

    Attributes:
        tera: 1e12 FLOP or OP in a second.
        confidence: `stated`, `derived` or `unverified`.
        source: where it was read, or how it was derived.
    """

    tera: Annotated[float, Meta(gt=1e-9, le=1e12)]
    confidence: str
    source: str


def require_precision(target: Target, word: str) -> Precision:
    """Return a precision that the target runs.

    Raises:
        UnknownName: no such precision. InvalidSpec: the target does not run it.
    """
    known: tuple[Precision, ...] = get_args(Precision)
    for precision in known:
        if precision == word:
            if precision not in target.precisions:
                raise InvalidSpec(
                    f"target {target.name} (SM{target.sm}) does not run {word}; it runs {', '.join(target.precisions)}"
                )
            return precision
    raise UnknownName("precision", word, known)


def rate_of(target: Target, precision: Precision) -> Rate:
    """Return the dense peak rate of a precision.

    A rate that the target states is taken as it is. Three may be derived, and are marked so: bf16 equals fp16 (both
    accumulate in fp32 on tensor cores that have bf16), tf32 is half of fp16 (on every tensor core from SM80 on), and
    fp32 is tf32 where there is any, as TensorRT multiplies unless it is told otherwise, or on SM72 and SM75 an eighth
    of fp16.

    Raises:
        InvalidSpec: the target does not run it, or states no rate that it follows from.
    """
    require_precision(target, precision)
    if precision in target.peaks:
        return _stated(target.peaks[precision])
    fp16 = target.peaks.get("fp16")
    if precision == "fp32" and "tf32" in target.precisions:
        through = rate_of(target, "tf32")
        return Rate(through.tera, "derived", f"fp32 products run as tf32: {through.source}")
    if fp16 is not None and precision == "bf16" and target.sm >= _FIRST_TF32:
        return Rate(fp16.value, "derived", f"equal to fp16: {fp16.source}")
    if fp16 is not None and precision == "tf32" and target.sm >= _FIRST_TF32:
        return Rate(fp16.value / 2, "derived", f"half of fp16: {fp16.source}")
    if fp16 is not None and precision == "fp32" and target.sm in _FP32_OF_FP16:
        ratio = _FP32_OF_FP16[target.sm]
        return Rate(fp16.value / ratio, "derived", f"1/{ratio} of fp16 on SM{target.sm}: {fp16.source}")
    raise InvalidSpec(
        f"target {target.name} runs {precision} and states no peak for it; write [peaks.{precision}] with "
        "value, source, "
        f'confidence and sparsity = "dense" into a copy of its file, and give that with --target FILE.toml; '
        f"it states {', '.join(target.peaks) or 'none'}"
    )


def _stated(peak: Peak) -> Rate:
    return Rate(peak.value, peak.confidence, peak.source)


def at_power_mode(target: Target, name: str) -> tuple[Target, str]:
    """Return the target with its peaks scaled to the GPU clock of a power mode, and what was done.

    Raises:
        UnknownName: the target has no such mode. InvalidSpec: its clock is not known.
    """
    modes = {mode.name: mode for mode in target.power_modes}
    if name not in modes:
        raise UnknownName(f"power mode of {target.name}", name, modes)
    mode, highest = modes[name], max(mode.gpu_mhz for mode in target.power_modes)
    if not mode.gpu_mhz:
        raise InvalidSpec(
            f"target {target.name}: the GPU clock of power mode {name} is not known, so its peaks cannot be "
            "scaled; write "
            "gpu_mhz of this mode, and of the mode the peaks belong to, into a copy of the file and give that "
            "with --target"
        )
    factor = mode.gpu_mhz / highest
    peaks = {
        word: replace(peak, value=peak.value * factor, confidence="derived" if factor < 1 else peak.confidence)
        for word, peak in target.peaks.items()
    }
    return replace(target, peaks=peaks), _scaled(mode, factor, highest)


def _scaled(mode: PowerMode, factor: float, highest: float) -> str:
    if factor == 1:
        return f"power mode {mode.name}: {mode.gpu_mhz:g} MHz, the clock that the peaks belong to"
    return (
        f"power mode {mode.name}: peaks times {factor:.3f} ({mode.gpu_mhz:g} of {highest:g} MHz); "
        "the clock of the memory is not known and its bandwidth is left as it is"
    )
