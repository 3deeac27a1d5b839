"""What the NVIDIA driver gives without a CUDA toolkit or a Python package: which GPU is here, its memory, a stream."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from edgecomp.errors import RunError

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["Gpu", "local_gpu_sm"]

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_OUT_OF_MEMORY = 2
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may allocate meanwhile


def local_gpu_sm() -> int | None:
    """Return the compute capability of the first GPU without the dot, for example 89.

    `None` is an answer and no failure: there is no driver here, or no GPU that the process may use.
    """
    driver = _driver()
    if driver is None or driver.cuInit(0) != 0:
        return None
    device = ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    return _sm_of(driver, device)


class Gpu:
    """The first GPU: its primary context, a stream, and memory on it. Close it when all that uses it is gone.

    Raises:
        RunError: there is no GPU, or the driver refuses; with the driver's word for why.
    """

    def __init__(self) -> None:
        driver = _driver()
        sm = local_gpu_sm()
        if driver is None or sm is None:
            raise RunError(
                "no NVIDIA GPU can be used here, and engines run on nothing else; look at nvidia-smi and "
                "CUDA_VISIBLE_DEVICES, or use --runner onnxruntime"
            )
        self.sm = sm
        self._driver = driver
        self._device = ctypes.c_int()
        self._context, self._stream = ctypes.c_void_p(), ctypes.c_void_p()
        self._blocks: list[int] = []
        self._graphs: list[ctypes.c_void_p] = []
        self._events: list[ctypes.c_void_p] = []
        self._call("cuDeviceGet", ctypes.byref(self._device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        try:
            with self.current():
                self._call("cuStreamCreate", ctypes.byref(self._stream), _NON_BLOCKING)
        except RunError:
            driver.cuDevicePrimaryCtxRelease_v2(self._device)
            raise

    @property
    def stream(self) -> int:
        """The handle of the stream, as TensorRT takes it."""
        return self._stream.value or 0

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make the context that of this thread, as every other method, and TensorRT, need it."""
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def allocate(self, size: int) -> int:
        """Return the address of so many bytes; `close` frees them."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)), size=size)
        self._blocks.append(address.value)
        return address.value

    def upload(self, address: int, array: npt.NDArray[Any]) -> None:
        """Copy an array to the GPU, in the order of the stream; keep it until `wait`."""
        size = ctypes.c_size_t(array.nbytes)
        self._call(
            "cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), array.ctypes.data_as(ctypes.c_void_p), size, self._stream
        )

    def download(self, address: int, array: npt.NDArray[Any]) -> None:
        """Copy from the GPU into an array, in the order of the stream; it is there after `wait`."""
        size = ctypes.c_size_t(array.nbytes)
        self._call(
            "cuMemcpyDtoHAsync_v2", array.ctypes.data_as(ctypes.c_void_p), ctypes.c_uint64(address), size, self._stream
        )

    def wait(self) -> None:
        """Return when the stream has done all of its work."""
        self._call("cuStreamSynchronize", self._stream)

    def begin_recording(self) -> None:
        """Record what is put into the stream from here on, in place of doing it."""
        self._call("cuStreamBeginCapture_v2", self._stream, _THREAD_LOCAL)

    def end_recording(self) -> ctypes.c_void_p:
        """Return the graph of what was recorded, ready to be launched; `close` frees it."""
        graph, made = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        try:
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(made), graph, ctypes.c_ulonglong(0))
        finally:
            self._driver.cuGraphDestroy(graph)
        self._graphs.append(made)
        return made

    def launch(self, graph: ctypes.c_void_p) -> None:
        """Put a recorded graph into the stream."""
        self._call("cuGraphLaunch", graph, self._stream)

    def mark(self) -> ctypes.c_void_p:
        """Put an event into the stream, which notes the time when the GPU gets there; `close` frees it."""
        event = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(event), 0)
        self._events.append(event)
        self._call("cuEventRecord", event, self._stream)
        return event

    def mark_again(self, event: ctypes.c_void_p) -> None:
        """Put an event into the stream once more; its former time is lost."""
        self._call("cuEventRecord", event, self._stream)

    def us_between(self, first: ctypes.c_void_p, second: ctypes.c_void_p) -> float:
        """Return the microseconds between two events that have happened; the driver counts in half of one."""
        milliseconds = ctypes.c_float()
        self._call("cuEventElapsedTime", ctypes.byref(milliseconds), first, second)
        return milliseconds.value * 1000

    def close(self) -> None:
        """Free the memory, the stream and the context; a second call does nothing."""
        if not self._stream:
            return
        with self.current():
            self._driver.cuStreamSynchronize(self._stream)
            for graph in self._graphs:
                self._driver.cuGraphExecDestroy(graph)
            for event in self._events:
                self._driver.cuEventDestroy_v2(event)
            for address in self._blocks:
                self._driver.cuMemFree_v2(ctypes.c_uint64(address))
            self._driver.cuStreamDestroy_v2(self._stream)
        self._graphs, self._events, self._blocks, self._stream = [], [], [], ctypes.c_void_p()
        self._driver.cuDevicePrimaryCtxRelease_v2(self._device)

    def _call(self, name: str, *words: Any, size: int = 0) -> None:
        code = getattr(self._driver, name)(*words)
        if code == 0:
            return
        text = ctypes.c_char_p()
        known = self._driver.cuGetErrorName(code, ctypes.byref(text)) == 0 and text.value is not None
        said = text.value.decode() if known and text.value is not None else "an error without a name"
        if code == _OUT_OF_MEMORY and size:
            raise RunError(
                f"the GPU has no room for {size} bytes ({said}); end what else uses it, or take a smaller batch"
            )
        raise RunError(f"the NVIDIA driver says {said} ({code}) to {name}; look at nvidia-smi and the system's log")


def _driver() -> Any | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _sm_of(driver: Any, device: ctypes.c_int) -> int | None:
    found = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) != 0:
            return None
        found.append(value.value)
    return found[0] * 10 + found[1]
