"""Engines in TensorRT or TensorRT for RTX, on the first GPU; needs neither torch nor a CUDA toolkit.

The calls are the same on TensorRT 10.3 to 11 and RTX, and are type-checked against stubs of each (`tests/stubs/`).
"""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import threading
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecomp.engines import Flavour, Gpu, build_form, find_engine, libraries_of, load_flavour, loaded_library
from edgecomp.engines.network import collecting_logger, dtype_name
from edgecomp.engines.record import EngineRecord, EngineTensor
from edgecomp.errors import RunError
from edgecomp.runners import Array, Part
from edgecomp.runners.layers import Layer, layers_of_engine

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["TensorRTRunner"]

_WARM_RUNS = 3


class TensorRTRunner:
    """The engine of a bundle's graph that runs here.

    Args:
        model: the graph, in its bundle, whose engines lie in `engines/<target>/`.
        name: "tensorrt" or "rtx".
        weights: the bundle, where the graph is another form of one of its graphs; its engine is built here.
        cuda_graph: record the first execution as a CUDA graph, and launch that from then on.

    Raises:
        RunError: there is no GPU, or TensorRT does not take the engine. TargetMismatch: no engine runs here.
        MissingDependency: that TensorRT is not installed.
    """

    def __init__(self, model: Path, *, name: str, weights: Path | None = None, cuda_graph: bool = False) -> None:
        flavour = load_flavour(name)
        self.name, self.version, self._module = name, flavour.title, flavour.module
        self._runtime: trt.Runtime | None = None
        self._engine: trt.ICudaEngine | None = None
        self._context: trt.IExecutionContext | None = None
        self._addresses: dict[str, int] = {}
        self._records = cuda_graph
        self._graph: ctypes.c_void_p | None = None
        self._turn = threading.Lock()  # one context and one set of buffers: calls of several threads take turns
        self._gpu = Gpu()
        with contextlib.ExitStack() as stack:
            stack.callback(self._gpu.close)
            if weights is None:
                self._plan, record = find_engine(model, flavour, sm=self._gpu.sm)
            else:
                self._plan, record = build_form(model, weights, flavour, sm=self._gpu.sm)
            self._inputs, self._outputs = record.inputs, record.outputs
            with self._gpu.current():
                self._load(stack, flavour, record)
            self._stack = stack.pop_all()

    def _load(self, stack: contextlib.ExitStack, flavour: Flavour, record: EngineRecord) -> None:
        """Read the plan, and give each tensor its memory; on the stack stands what undoes it, the last step first."""
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = flavour.module
        logger: Any = collecting_logger(flavour)
        self._runtime = trt.Runtime(logger)
        stack.callback(self._drop_runtime)
        for library in libraries_of(self._plan, record):
            stack.enter_context(loaded_library(self._runtime.get_plugin_registry(), library))
        stack.callback(self._drop_engine)
        self._engine = self._runtime.deserialize_cuda_engine(self._plan.read_bytes())
        if self._engine is not None:
            self._require_recorded(trt.TensorIOMode.INPUT)
            self._context = self._engine.create_execution_context()
        if self._engine is None or self._context is None:
            raise RunError(
                f"{flavour.title} does not take {self._plan}: {'; '.join(logger.errors) or 'it gives no reason'}; "
                "build the engine again here"
            )
        for tensor in (*record.inputs, *record.outputs):
            size = int(np.prod(tensor.shape, dtype=np.int64)) * self._dtype(tensor).itemsize
            self._addresses[tensor.name] = self._gpu.allocate(size)
            if not self._context.set_tensor_address(tensor.name, self._addresses[tensor.name]):
                raise RunError(f"{flavour.title} takes no address for {tensor.name!r} of {self._plan}; build it again")

    def _drop_engine(self) -> None:
        with self._gpu.current():
            self._context = None
            self._engine = None

    def _drop_runtime(self) -> None:
        with self._gpu.current():
            self._runtime = None

    def _require_recorded(self, input_mode: trt.TensorIOMode) -> None:
        """Refuse a plan whose inputs and outputs are not those of its record."""
        assert self._engine is not None
        found: dict[bool, list[EngineTensor]] = {True: [], False: []}
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            dims = self._engine.get_tensor_shape(name)
            shape = tuple(int(dims[axis]) for axis in range(len(dims)))
            dtype = dtype_name(self._engine.get_tensor_dtype(name))
            found[self._engine.get_tensor_mode(name) == input_mode].append(EngineTensor(name, shape, dtype))
        for word, seen, recorded in (("inputs", found[True], self._inputs), ("outputs", found[False], self._outputs)):
            if sorted(seen, key=str) != sorted(recorded, key=str):
                raise RunError(
                    f"{self._plan} has the {word} {_words(seen)}, and its record says {_words(recorded)}; plan and "
                    "record are not of the same build: build the engine again"
                )

    def _dtype(self, tensor: EngineTensor) -> np.dtype[Any]:
        try:
            return np.dtype(tensor.dtype)
        except TypeError:
            raise RunError(
                f"{self._plan}: {tensor.name!r} is {tensor.dtype}, which numpy does not have; export the model with "
                "inputs and outputs in fp32 or fp16"
            ) from None

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in the graph's order."""
        return tuple(tensor.name for tensor in self._inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in the graph's order."""
        return tuple(tensor.name for tensor in self._outputs)

    def __enter__(self) -> TensorRTRunner:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Free the engine, its plugins and its memory."""
        self._stack.close()

    def infer(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Copy the inputs to the GPU, run the engine once, and copy the outputs back.

        Raises:
            RunError: an input has another name, shape or type than the engine's, or the run failed.
        """
        given = self._checked(inputs)
        with self._turn, self._gpu.current():
            self._upload(given)
            self._execute()
            outputs = self._download()
            self._gpu.wait()
        return outputs

    def time_parts(self, inputs: dict[str, Array], *, runs: int = 50) -> tuple[Part, ...]:
        """Return medians in microseconds of copying in, running, and copying out, by the GPU's own events."""
        given = self._checked(inputs)
        times: list[tuple[float, float, float]] = []
        with self._turn, self._gpu.current():
            marks = [self._gpu.mark() for _ in range(4)]
            for _ in range(runs):
                self._gpu.mark_again(marks[0])
                self._upload(given)
                self._gpu.mark_again(marks[1])
                self._execute()
                self._gpu.mark_again(marks[2])
                kept = self._download()
                self._gpu.mark_again(marks[3])
                self._gpu.wait()
                kept.clear()
                first, second, third = (self._gpu.us_between(marks[n], marks[n + 1]) for n in range(3))
                times.append((first, second, third))
        columns = zip(*times, strict=True)
        names = ("host to device", "engine", "device to host")
        how = f"by the GPU's events, {runs} runs"
        return tuple((name, statistics.median(column), how) for name, column in zip(names, columns, strict=True))

    def time_layers(self, inputs: dict[str, Array], model: Path, *, runs: int = 20) -> tuple[Layer, ...]:
        """Return what each layer takes, by TensorRT's profiler in an execution context of its own.

        A layer is what TensorRT made of the graph: one may hold a whole encoder.

        Args:
            inputs: by name.
            model: the ONNX file, whose nodes the inspector names.
            runs: that count; three more come first.
        """
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = self._module
        times: dict[str, list[float]] = {}

        class Profiler(trt.IProfiler):  # type: ignore[misc]
            def report_layer_time(self, layer_name: str, ms: float) -> None:
                times.setdefault(layer_name, []).append(ms * 1000)

        given = self._checked(inputs)
        assert self._engine is not None
        with self._turn, self._gpu.current():
            context = self._engine.create_execution_context()
            if context is None:
                raise RunError(f"{self.version} makes no second context of {self._plan.name}; its log says why")
            for name, address in self._addresses.items():
                context.set_tensor_address(name, address)
            context.profiler = Profiler()
            self._upload(given)
            for _ in range(_WARM_RUNS + runs):
                if not context.execute_async_v3(self._gpu.stream):
                    raise RunError(f"{self.version} did not run {self._plan.name} under its profiler")
                self._gpu.wait()
            information = self._engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
            del context
        return layers_of_engine({name: taken[_WARM_RUNS:] for name, taken in times.items()}, information, model)

    def _checked(self, inputs: dict[str, Array]) -> list[Array]:
        """Return the inputs in order, in one piece each; keep them until the stream is done."""
        if set(inputs) != set(self.input_names):
            raise RunError(f"{self._plan.name} takes {', '.join(self.input_names)}, and was given {', '.join(inputs)}")
        given = []
        for tensor in self._inputs:
            array = np.ascontiguousarray(inputs[tensor.name])
            if (array.shape, array.dtype) != (tensor.shape, self._dtype(tensor)):
                raise RunError(
                    f"{self._plan.name} takes {tensor.name!r} as {tensor.dtype} {list(tensor.shape)}, and was given "
                    f"{array.dtype} {list(array.shape)}"
                )
            given.append(array)
        if self._context is None:
            raise RunError(f"the runner of {self._plan.name} is closed; open it again")
        return given

    def _upload(self, given: list[Array]) -> None:
        for tensor, array in zip(self._inputs, given, strict=True):
            self._gpu.upload(self._addresses[tensor.name], array)

    def _download(self) -> dict[str, Array]:
        outputs: dict[str, Array] = {
            tensor.name: np.empty(tensor.shape, self._dtype(tensor)) for tensor in self._outputs
        }
        for name, array in outputs.items():
            self._gpu.download(self._addresses[name], array)
        return outputs

    def _execute(self) -> None:
        """Put one execution into the stream; the first one, and a record of it, where a CUDA graph is wanted."""
        if self._graph is not None:
            self._gpu.launch(self._graph)
            return
        self._enqueue()
        if self._records:  # what TensorRT does in a first execution alone must not be recorded
            self._gpu.wait()
            self._gpu.begin_recording()
            try:
                self._enqueue()
            except RunError:
                with contextlib.suppress(RunError):
                    self._gpu.end_recording()  # a stream that still records would fail all that follows
                raise
            self._graph = self._gpu.end_recording()

    def _enqueue(self) -> None:
        assert self._context is not None
        if not self._context.execute_async_v3(self._gpu.stream):
            raise RunError(f"{self.version} did not run {self._plan.name}; its log says why, build it again here")


def _words(tensors: list[EngineTensor] | tuple[EngineTensor, ...]) -> str:
    return ", ".join(f"{one.name} {one.dtype} {list(one.shape)}" for one in tensors) or "(none)"
