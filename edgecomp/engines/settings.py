"""What a user may tell the builder: memory, effort, tactics. Presets are TOML files in `engines/presets/`."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edgecomp.errors import InvalidSpec, UnknownName
from edgecomp.resources import data_path
from edgecomp.specs._toml import read_toml

__all__ = ["MOST_WORKSPACE_MIB", "OWN", "OWN_SETTINGS", "BuilderSettings", "load_preset", "preset_names", "settings_of"]

OWN = -1  # the builder's own choice
MOST_WORKSPACE_MIB = 1 << 20
_HIGHEST_LEVEL = 5


class BuilderSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of the builder; each has a value that leaves the choice to it.

    Attributes:
        workspace_mib: the most scratch memory of a layer; 0: the builder's own limit.
        opt_level: 0 (quick) to 5 (thorough); -1: the builder's own, which is 3.
        max_aux_streams: streams beside the main one; -1: the builder's own choice.
        tactic_sources: names of TensorRT's `TacticSource`; none: the builder's own.
    """

    workspace_mib: Annotated[int, Meta(ge=0, le=MOST_WORKSPACE_MIB)] = 0
    opt_level: Annotated[int, Meta(ge=OWN, le=_HIGHEST_LEVEL)] = OWN
    max_aux_streams: Annotated[int, Meta(ge=OWN, le=64)] = OWN
    tactic_sources: tuple[str, ...] | None = None


OWN_SETTINGS = BuilderSettings()


class _Preset(BuilderSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    schema: Literal[1]
    title: str


def preset_names() -> tuple[str, ...]:
    """Return the names of all shipped presets."""
    return tuple(sorted(path.stem for path in data_path("engines", "presets").glob("*.toml")))


def load_preset(name: str) -> BuilderSettings:
    """Read a shipped preset."""
    if name not in preset_names():
        raise UnknownName("preset", name, preset_names())
    preset = read_toml(data_path("engines", "presets", f"{name}.toml"), _Preset, what="preset")
    fields = {field: getattr(preset, field) for field in BuilderSettings.__struct_fields__}
    return BuilderSettings(**fields)


def settings_of(*, preset: str = "", workspace_mib: int = 0, opt_level: int = OWN) -> BuilderSettings:
    """Return a preset's settings, or the builder's own, with what was asked for by name above them."""
    if not 0 <= workspace_mib <= MOST_WORKSPACE_MIB:
        raise InvalidSpec(
            f"workspace {workspace_mib} MiB is not between 0 (the builder's own limit) and {MOST_WORKSPACE_MIB}"
        )
    if not OWN <= opt_level <= _HIGHEST_LEVEL:
        raise InvalidSpec(f"opt-level {opt_level} is not between 0 (quick) and {_HIGHEST_LEVEL} (thorough)")
    settings = load_preset(preset) if preset else BuilderSettings()
    changes = {"workspace_mib": workspace_mib} if workspace_mib else {}
    if opt_level != OWN:
        changes["opt_level"] = opt_level
    return msgspec.structs.replace(settings, **changes)
