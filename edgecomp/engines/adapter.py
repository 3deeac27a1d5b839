"""How TensorRT 10.3 to 10.x, 11.x and TensorRT for RTX differ: all of it, and nowhere else.

Precision is not among the differences: every network is strongly typed, so the graph decides. What TensorRT 11
removed (precision flags of the builder, calibrators, types of layers) is not touched on any version. The functions are
type-checked against stubs of each generation in `tests/stubs/`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from packaging.version import Version

from edgecomp.engines.settings import OWN, BuilderSettings
from edgecomp.errors import InvalidSpec, TargetMismatch

if TYPE_CHECKING:
    import tensorrt as trt
    import tensorrt_rtx as rtx

__all__ = [
    "TITLES",
    "Flavour",
    "FlavourName",
    "attach_timing_cache",
    "create_config",
    "create_network",
    "has_product",
    "has_timing_cache",
    "other_headers",
    "prefers_function_bodies",
    "read_engine",
    "serialize_timing_cache",
    "watch",
]

FlavourName = Literal["tensorrt", "rtx"]
TITLES: dict[FlavourName, str] = {"tensorrt": "TensorRT", "rtx": "TensorRT for RTX"}

_FUNCTIONS_GIVE_WAY = Version("10.7")  # from here on the ONNX parser prefers a plugin to a function body
_OLDEST_RTX_HEADERS = 10
_TURING = 75
_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Flavour:
    """An imported TensorRT: its short name, its version, and the Python module."""

    name: FlavourName
    version: str
    module: Any = dataclasses.field(repr=False)

    @property
    def title(self) -> str:
        """How a message calls it."""
        return f"{TITLES[self.name]} {self.version}"


def create_network(flavour: Flavour, builder: trt.Builder) -> trt.INetworkDefinition:
    """Return an empty network that is strongly typed: 10.x needs the flag, and all later versions accept it."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.module
    return builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))


def create_config(
    flavour: Flavour, builder: trt.Builder, *, sms: tuple[int, ...], precision: str, settings: BuilderSettings
) -> trt.IBuilderConfig:
    """Return the builder's configuration.

    The TF32 flag is the one precision that a graph cannot state: TensorRT sets it by default, and would then run
    fp32 layers with 10 bits of mantissa. It is cleared unless the precision asked for is "tf32".

    Args:
        flavour: the TensorRT that builds.
        builder: its builder.
        sms: compute capabilities of the plan; full TensorRT takes that of the local GPU.
        precision: the word that the graph was exported with.
        settings: memory, effort and tactics; what they leave open is the builder's own.
    """
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.module
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the plan then tells which types its layers run in
    if precision == "tf32":
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)
    if settings.workspace_mib > 0:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mib * _MIB)
    if settings.opt_level != OWN:
        config.builder_optimization_level = settings.opt_level
    if settings.max_aux_streams != OWN:
        config.max_aux_streams = settings.max_aux_streams
    if settings.tactic_sources is not None:
        config.set_tactic_sources(_tactic_sources(flavour, settings.tactic_sources))
    if flavour.name == "rtx":
        _set_compute_capabilities(flavour, config, sms)
    return config


def prefers_function_bodies(flavour: Flavour) -> bool:
    """Whether the ONNX parser runs a function's body though a plugin is registered: before 10.7, as on JetPack 6."""
    return flavour.name == "tensorrt" and Version(flavour.version) < _FUNCTIONS_GIVE_WAY


def other_headers(flavour: Flavour, major: int) -> int:
    """Return the major version of the headers that a plugin has to be compiled with, where `major` does not fit; or 0.

    Full TensorRT takes plugins of its own major; TensorRT for RTX those of 10 and later.
    """
    if flavour.name == "rtx":
        return 0 if major >= _OLDEST_RTX_HEADERS else _OLDEST_RTX_HEADERS
    own = int(flavour.version.partition(".")[0])
    return 0 if major == own else own


def has_product(flavour: FlavourName, sm: int, precision: str) -> bool:
    """Whether this TensorRT has matrix products of a precision for a GPU that could run them.

    TensorRT for RTX has none in fp32 for SM75 (tried with 1.7.1), and says so late in the build.
    """
    return not (flavour == "rtx" and sm == _TURING and precision == "fp32")


def has_timing_cache(flavour: Flavour) -> bool:
    """Whether timing caches do anything: TensorRT for RTX times nothing when it builds (no-ops since 1.2)."""
    return flavour.name != "rtx"


def attach_timing_cache(config: trt.IBuilderConfig, content: bytes) -> bool:
    """Give a configuration a timing cache, of these bytes or empty, and return whether it was accepted.

    A cache of another version or GPU is refused here, and the configuration is as it was.
    """
    cache = config.create_timing_cache(content)
    return cache is not None and bool(config.set_timing_cache(cache, ignore_mismatch=False))


def serialize_timing_cache(config: trt.IBuilderConfig) -> bytes:
    """Return the bytes of a configuration's timing cache after a build; none where there is no cache."""
    cache = config.get_timing_cache()
    return b"" if cache is None else bytes(cache.serialize())


def watch(flavour: Flavour, config: trt.IBuilderConfig, step: Callable[[str, int, int], bool]) -> trt.IProgressMonitor:
    """Report the builder's steps; keep what is returned until the build ends.

    Args:
        flavour: the TensorRT that builds.
        config: of the build.
        step: called with a phase, the step and how many steps it has, maybe from several threads; False cancels. It
            must not raise: TensorRT would print the error and lose it.
    """
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.module

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:  # noqa: ARG002 - its form
            self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step_index: int) -> bool:
            return step(phase_name, step_index + 1, self._steps.get(phase_name, 0))

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    monitor = Monitor()
    config.progress_monitor = monitor
    return monitor


def read_engine(flavour: Flavour, logger: trt.ILogger, plan: memoryview) -> str:
    """Return what a built engine says of its layers, as JSON; "" where it cannot be read on this machine."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.module
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        return ""
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def _tactic_sources(flavour: Flavour, names: tuple[str, ...]) -> int:
    """Return the bits of tactic sources; 10.x has more of them than 11 and RTX."""
    known = flavour.module.TacticSource
    for name in names:
        if not hasattr(known, name):
            has = ", ".join(sorted(word for word in dir(known) if word.isupper()))
            raise InvalidSpec(f"{flavour.title} has no tactic source {name!r}; it has {has}. Change the preset")
    return sum(1 << int(getattr(known, name)) for name in names)


def _set_compute_capabilities(flavour: Flavour, config: Any, sms: tuple[int, ...]) -> None:
    """Say which GPUs the plan is for; RTX alone builds for others than the local one."""
    if TYPE_CHECKING:
        rtx_config: rtx.IBuilderConfig
        import tensorrt_rtx as rtx
    else:
        rtx = flavour.module
    rtx_config = config
    known = rtx.ComputeCapability
    rtx_config.num_compute_capabilities = len(sms)
    for index, sm in enumerate(sms):
        if not hasattr(known, f"SM{sm}"):
            names = sorted((name for name in dir(known) if name.startswith("SM")), key=lambda name: int(name[2:]))
            raise TargetMismatch(f"{flavour.title} has no compute capability SM{sm}; it has {', '.join(names)}")
        rtx_config.set_compute_capability(getattr(known, f"SM{sm}"), index)
