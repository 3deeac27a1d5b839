"""Which TensorRT builds for a target on this machine, and importing it. `adapter` knows how they differ."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sys

from packaging.specifiers import InvalidSpecifier, SpecifierSet

from edgecomp.engines._soname import provide_soname
from edgecomp.engines.adapter import TITLES, Flavour, FlavourName
from edgecomp.engines.gpu import local_gpu_sm
from edgecomp.errors import BuildError, InvalidSpec, MissingDependency, TargetMismatch, UnknownName
from edgecomp.specs.target import Target

__all__ = [
    "Flavour",
    "choose_flavour",
    "installed_flavours",
    "load_flavour",
    "planned_flavour",
]

_NAMES: tuple[FlavourName, ...] = ("tensorrt", "rtx")  # in the order that "auto" prefers
_MODULES = {"tensorrt": ("tensorrt",), "rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_EXTRAS = {"tensorrt": "gpu", "rtx": "rtx"}


def installed_flavours() -> tuple[FlavourName, ...]:
    """Return the flavours whose Python module can be found; imports none of them."""
    return tuple(name for name in _NAMES if _module_name(name))


def load_flavour(name: str) -> Flavour:
    """Import a flavour.

    Args:
        name: "tensorrt" or "rtx".
    """
    flavour = _require_name(name)
    module_name = _module_name(flavour)
    if not module_name:
        raise _missing(flavour, "building an engine")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, OSError) as error:
        raise BuildError(
            f"the package {module_name!r} is installed but cannot be imported: {error}; "
            f"its libraries are missing or do not fit this system"
        ) from error
    version = str(module.__version__)
    if flavour == "rtx" and sys.platform.startswith("linux"):
        major = version.partition(".")[0]
        provide_soname("libtensorrt_rtx.so", f"libtensorrt_rtx.so.{major}")
    return Flavour(flavour, version, module)


def choose_flavour(target: Target, runtime: str = "auto") -> FlavourName:
    """Return the flavour that builds for a target on this machine, or say why there is none.

    Full TensorRT builds for the GPU that is present, so it has to have the target's compute capability.
    TensorRT for RTX builds for any GPU that it knows, on any machine.

    Args:
        target: what the engine is for.
        runtime: "tensorrt", "rtx", or "auto", which prefers full TensorRT where it is installed and fits.
    """
    possible = _possible(target, runtime)
    installed = tuple(name for name in possible if _module_name(name))
    if not installed:
        name = possible[-1]
        other = tuple(flavour for flavour in _NAMES if flavour not in possible and _module_name(flavour))
        if other and runtime == "auto":
            raise TargetMismatch(
                f"{TITLES[other[0]]}, which is installed here, does not build for {target.name} (SM{target.sm}); "
                f"{TITLES[name]} {target.runtimes[name]} does. {target.build_on}"
            )
        raise _missing(name, f"building an engine for {target.name} (SM{target.sm}; {target.build_on.rstrip('.')})")
    refusals = []
    for name in installed:
        refusal = _refusal(name, target)
        if not refusal:
            return name
        refusals.append(refusal)
    refusals += [
        f"{TITLES[name]} would build for it and is not installed: pip install 'edgecomp[{_EXTRAS[name]}]'"
        for name in possible
        if name not in installed
    ]
    raise TargetMismatch(f"{'; '.join(refusals)}; {target.build_on}")


def planned_flavour(target: Target, runtime: str = "auto") -> FlavourName:
    """Return the flavour that would build for a target; none is imported, and none has to be installed.

    Args:
        target: what the engine would be for.
        runtime: "tensorrt", "rtx", or "auto": what is installed here and fits, and else full TensorRT where it builds
            for the target at all.

    Raises:
        TargetMismatch: no flavour builds for the target, or not the one that was asked for.
    """
    possible = _possible(target, runtime)
    for name in possible:
        if _module_name(name) and (name == "rtx" or local_gpu_sm() == target.sm):
            return name
    return possible[0]


def _possible(target: Target, runtime: str) -> tuple[FlavourName, ...]:
    """Return the flavours that build for a target, of those that were asked for."""
    if target.is_estimate_only:
        raise TargetMismatch(
            f"no supported TensorRT builds for {target.name} (SM{target.sm}); it serves estimates only: "
            f"{target.build_on}"
        )
    asked = _NAMES if runtime == "auto" else (_require_name(runtime),)
    possible = tuple(name for name in asked if name in target.runtimes)
    if not possible:
        raise TargetMismatch(
            f"{TITLES[asked[0]]} does not build for {target.name} (SM{target.sm}), "
            f"{' or '.join(TITLES[name] for name in target.runtimes)} does; {target.build_on}"
        )
    return possible


def _missing(name: FlavourName, needed_for: str) -> MissingDependency:
    """Return the error of a flavour that is not installed; on Arm, TensorRT is not in the package index."""
    advice = ""
    if name == "tensorrt" and platform.machine() != "x86_64":
        advice = "on Jetson it comes with JetPack: make the virtual environment with --system-site-packages"
    return MissingDependency(_MODULES[name][0], needed_for=needed_for, extra=_EXTRAS[name], advice=advice)


def _require_name(name: str) -> FlavourName:
    for known in _NAMES:
        if name == known:
            return known
    raise UnknownName("runtime", name, ("auto", *_NAMES))


def _module_name(name: FlavourName) -> str:
    """Return the name of the first module of a flavour that can be found, or "" when there is none."""
    for module in _MODULES[name]:
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin is not None:  # a folder that happens to have that name has no origin
            return module
    return ""


def _refusal(name: FlavourName, target: Target) -> str:
    """Return why an installed flavour cannot build for a target, or "" when it can."""
    if name == "tensorrt":
        local = local_gpu_sm()
        if local is None:
            return (
                f"TensorRT builds for the GPU of the machine it runs on, and there is no GPU here; "
                f"{target.name} has SM{target.sm}"
            )
        if local != target.sm:
            return (
                f"TensorRT builds for the GPU of the machine it runs on, which has SM{local} here; "
                f"{target.name} has SM{target.sm}"
            )
    version = load_flavour(name).version
    wanted = target.runtimes[name]
    try:
        fits = SpecifierSet(wanted).contains(version, prereleases=True)
    except InvalidSpecifier:
        raise InvalidSpec(
            f"target {target.name}: runtimes.{name} = {wanted!r} is no version range; write for example '>=10.3,<12'"
        ) from None
    return "" if fits else f"{TITLES[name]} {version} is installed, and {target.name} needs {wanted}"
