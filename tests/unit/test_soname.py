"""A loaded library answers to a second name, and the RTX parser survives a plugin because of it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from edgecomp.engines import _soname
from edgecomp.errors import BuildError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sonames are of the Linux loader")
rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="tensorrt_rtx_bindings is not installed"
)

# The C library is loaded in every process, so the mechanism is tested where there is no TensorRT too.
SECOND_NAME = """
import ctypes, os, pathlib, sys, tempfile
from edgecomp.engines import _soname
if sys.argv[1] == "file":
    _soname._load_from_memory = lambda name, content: None
tempfile.tempdir = sys.argv[2]
for name in ("libedgecomp_first.so", "libedgecomp_second.so", "libedgecomp_first.so"):
    _soname.provide_soname(name, "libc.so.6")
real = ctypes.CDLL("libc.so.6")
for name in ("libedgecomp_first.so", "libedgecomp_second.so"):
    library = ctypes.CDLL(name)
    assert ctypes.cast(library.getpid, ctypes.c_void_p).value == ctypes.cast(real.getpid, ctypes.c_void_p).value
    assert library.getpid() == os.getpid()
maps = [line for line in pathlib.Path("/proc/self/maps").read_text().splitlines() if "libedgecomp_" in line]
print(len(maps), sum("x" in line.split()[1] for line in maps))
print(os.listdir(sys.argv[2]))
"""

RTX_NAME = """
import ctypes
from edgecomp.engines import load_flavour
try:
    ctypes.CDLL("libtensorrt_rtx.so")
    print("answers already")
except OSError:
    pass
load_flavour("rtx"); load_flavour("rtx")
library, real = ctypes.CDLL("libtensorrt_rtx.so"), ctypes.CDLL("libtensorrt_rtx.so.1")
assert library.getInferLibVersion() == real.getInferLibVersion() > 0
assert not hasattr(ctypes.CDLL(None), "createInferBuilder_INTERNAL")
print("same library")
"""

# A plugin written in Python is enough to make the parser ask for "libtensorrt_rtx.so".
PLUGIN = """
import sys
import onnx
from onnx import TensorProto, helper
from edgecomp.engines import load_flavour
trt = load_flavour("rtx").module
bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)

class Doubled(*bases):
    def __init__(self):
        for base in bases:
            base.__init__(self)
        self.num_outputs, self.plugin_name, self.plugin_version, self.plugin_namespace = 1, "Doubled", "1", "edgecomp"
    def get_capability_interface(self, kind): return self
    def clone(self): return Doubled()
    def get_output_data_types(self, types): return [types[0]]
    def get_output_shapes(self, inputs, shape_inputs, builder):
        return [trt.DimsExprs([inputs[0][axis] for axis in range(len(inputs[0]))])]
    def get_fields_to_serialize(self): return trt.PluginFieldCollection([])

class Creator(trt.IPluginCreatorV3One):
    def __init__(self):
        trt.IPluginCreatorV3One.__init__(self)
        self.name, self.plugin_version, self.plugin_namespace = "Doubled", "1", "edgecomp"
        self.field_names = trt.PluginFieldCollection([])
    def create_plugin(self, name, fields, phase): return Doubled()

creator = Creator()
if sys.argv[1] == "registered":
    assert trt.get_plugin_registry().register_creator(creator, "edgecomp")
names = ["plugin_version", "plugin_namespace"]
opsets = [helper.make_opsetid("", 20)]
add = helper.make_node("Add", ["a", "a"], ["b"])
body = helper.make_function("edgecomp", "Doubled", ["a"], ["b"], [add], opsets, names)
node = helper.make_node("Doubled", ["x"], ["y"], domain="edgecomp", plugin_version="1", plugin_namespace="edgecomp")
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 8]) for name in "xy")
model = helper.make_model(helper.make_graph([node], "graph", [x], [y]), functions=[body], ir_version=9,
                          opset_imports=[*opsets, helper.make_opsetid("edgecomp", 1)])
logger = trt.Logger(trt.Logger.ERROR)
network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
assert parser.parse(model.SerializeToString())
print([network.get_layer(index).type.name for index in range(network.num_layers)])
"""


def run_python(code: str, *arguments: str) -> str:
    """Run `code` in a process of its own, because a loaded library stays, and the failure is an abort."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("way", ["memory", "file"])
def test_library_answers_to_second_name(way: str, tmp_path: Path) -> None:
    """Two names, one given twice: two mappings, none of them executable, and no file left."""
    assert run_python(SECOND_NAME, way, str(tmp_path)).splitlines() == ["2 0", "[]"]


def test_library_that_is_not_loaded_is_named() -> None:
    """A second name needs a library in memory."""
    with pytest.raises(BuildError, match=r"libedgecomp_absent\.so\.7 is not loaded"):
        _soname.provide_soname("libedgecomp_absent.so", "libedgecomp_absent.so.7")


def test_unknown_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the two machines that TensorRT runs on are written."""
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(BuildError, match=r"riscv64.*x86_64, aarch64"):
        _soname._shared_object("a.so", "b.so")


@pytest.mark.parametrize(("machine", "number"), [("x86_64", 62), ("aarch64", 183)])
def test_shared_object_is_of_the_machine(machine: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ELF header names the machine it is for."""
    monkeypatch.setattr("platform.machine", lambda: machine)
    content = _soname._shared_object("a.so", "b.so")
    assert content[:4] == b"\x7fELF"
    assert int.from_bytes(content[18:20], "little") == number


@rtx
def test_rtx_answers_to_its_plain_name() -> None:
    """Loading the flavour is enough; its symbols do not become global."""
    assert run_python(RTX_NAME).splitlines()[-1] == "same library"


@rtx
@pytest.mark.parametrize(("state", "layer"), [("registered", "PLUGIN_V3"), ("absent", "ELEMENTWISE")])
def test_parser_survives_a_plugin_node(state: str, layer: str) -> None:
    """With a plugin the parser makes a plugin layer and does not abort; without one it inlines the body."""
    pytest.importorskip("onnx")
    assert run_python(PLUGIN, state).strip() == f"['{layer}']"
