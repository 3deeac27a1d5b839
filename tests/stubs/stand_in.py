"""Stand-ins for what is not here: the module `tensorrt`, made from a stub, and libraries, compiled from `tests/native`.

The module has the documented names alone, holds arguments to the documented signatures, and records the calls.
"""

from __future__ import annotations

import enum
import functools
import inspect
import shutil
import subprocess
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

__all__ = ["GENERATIONS", "NATIVE", "STUBS", "StandIn", "compile_cpp", "stand_in"]

STUBS = Path(__file__).resolve().parent
NATIVE = STUBS.with_name("native")
GENERATIONS = {"10.3.0": "tensorrt-10.3", "11.4.1": "tensorrt-11"}


class StandIn(types.ModuleType):
    """A module with the names of a stub; `calls` holds what was called, `behave` what a call returns."""

    calls: list[tuple[str, tuple[Any, ...]]]
    behave: dict[str, Callable[..., Any]]


def stand_in(generation: str, version: str) -> StandIn:
    """Make a module of a stub."""
    path = next((STUBS / generation).glob("*.pyi"))
    names: dict[str, Any] = {}
    source = "from __future__ import annotations\n" + path.read_text(encoding="utf-8")
    exec(compile(source, str(path), "exec"), names)
    module = StandIn(path.stem)
    module.calls, module.behave = [], {}
    for name, value in names.items():
        if isinstance(value, type) and name != "_Enum":
            setattr(module, name, rebuild(value, names["_Enum"], module))
    module.__version__ = version
    return module


def rebuild(stub: type, enumeration: type, module: StandIn) -> type:
    """Return a class that has what the stub has, and refuses the rest."""
    if issubclass(stub, enumeration):
        members = {name: number for number, name in enumerate(n for n in stub.__annotations__ if n != "name")}
        made = enum.Enum(stub.__qualname__, members)  # type: ignore[misc]
        made.__int__ = lambda self: self.value  # type: ignore[attr-defined]
        return made
    allowed = set(inspect.get_annotations(stub))
    body: dict[str, Any] = {}
    for name, value in vars(stub).items():
        if isinstance(value, type):
            body[name] = rebuild(value, enumeration, module)
        elif inspect.isfunction(value):
            body[name] = recorded(stub.__name__, name, value, module)
            allowed.add(name)

    def get(self: object, name: str) -> Any:
        raise AttributeError(f"{stub.__name__}.{name} is not in this TensorRT, or was not set")

    def put(self: object, name: str, value: object) -> None:
        if type(self) is made and not name.startswith("_") and name not in allowed:
            raise AttributeError(f"{stub.__name__}.{name} is not in this TensorRT")
        module.calls.append((f"{stub.__name__}.{name}=", (value,)))
        object.__setattr__(self, name, value)

    made = type(stub.__name__, (), {**body, "__getattr__": get, "__setattr__": put})
    return made


def recorded(owner: str, name: str, function: Any, module: StandIn) -> Any:
    """Return a method that checks its arguments, notes the call, and does what the test wants."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def method(*words: Any, **named: Any) -> Any:
        bound = signature.bind(*words, **named)
        key = f"{owner}.{name}"
        module.calls.append((key, tuple(bound.arguments.values())[1:]))
        return module.behave[key](*words, **named) if key in module.behave else None

    return method


def compile_cpp(out: Path, *words: object) -> Path:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no g++ or clang++ here")
    out.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [compiler, "-std=c++17", *map(str, words), "-o", str(out), "-ldl"],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return out
