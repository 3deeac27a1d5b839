"""What the NVIDIA driver says of a GPU's clocks, heat, power and throttling, by its library NVML.

NVML comes with the driver, so it is called through ctypes, and a board or a server needs no package. Every call may be
answered with "not supported": on Jetsons most are. Such an answer is kept as an answer, never filled in.
"""

from __future__ import annotations

import ctypes
from types import TracebackType
from typing import Any, Literal

from edgecomp.errors import RunError
from edgecomp.profiles.state import GpuState

__all__ = ["HARMLESS_REASONS", "Nvml", "NvmlSampler", "is_gpu_reason", "throttle_words"]

_LIBRARY = "libnvidia-ml.so.1"
_NOT_SUPPORTED, _INSUFFICIENT_SIZE = 3, 7
_ABSENT = -1  # ours, for a function that the library lacks; NVML's own codes are not negative
_GRAPHICS, _SM, _MEMORY = 0, 1, 2  # nvmlClockType_t
_SLOWDOWN, _GPU_MAX = 1, 3  # nvmlTemperatureThresholds_t: where hardware, and where the driver, slows clocks down
_POWER_INSTANT = 186  # NVML_FI_DEV_POWER_INSTANT
_NOT_AVAILABLE = 0xFFFFFFFF  # NVML_VALUE_NOT_AVAILABLE, in a call that succeeded
_MIB = 1 << 20
_TEXT = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE and NVML_DEVICE_UUID_V2_BUFFER_SIZE

_REASONS = (
    (0x001, "idle"),
    (0x002, "application clocks setting"),
    (0x004, "software power cap"),
    (0x008, "hardware slowdown"),
    (0x010, "sync boost"),
    (0x020, "software thermal slowdown"),
    (0x040, "hardware thermal slowdown"),
    (0x080, "hardware power brake"),
    (0x100, "display clock setting"),
    (0x200, "board limit"),
    (0x400, "reliability"),
)  # nvmlClocksEventReason* of nvml.h
HARMLESS_REASONS = frozenset({"idle", "application clocks setting", "display clock setting"})
"""Reasons that do not move: nothing runs, or a user or a display has set the clocks."""

Mig = Literal["on", "off", "unsupported", "unknown"]


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _Margin(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint), ("celsius", ctypes.c_int))


class _Heat(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint), ("sensor", ctypes.c_int), ("celsius", ctypes.c_int))


class _Value(ctypes.Union):
    _fields_ = (("double", ctypes.c_double), ("uint", ctypes.c_uint), ("whole", ctypes.c_ulonglong))


class _Field(ctypes.Structure):
    _fields_ = (
        ("field", ctypes.c_uint),
        ("scope", ctypes.c_uint),
        ("timestamp", ctypes.c_longlong),
        ("latency_us", ctypes.c_longlong),
        ("kind", ctypes.c_int),
        ("code", ctypes.c_int),
        ("value", _Value),
    )


def throttle_words(bits: int) -> tuple[str, ...]:
    """Return the reasons of a bit mask in words; a bit that NVML's header does not know is named by its number."""
    known = sum(bit for bit, _ in _REASONS)
    words = [word for bit, word in _REASONS if bits & bit]
    words += [f"reason 0x{1 << place:x}" for place in range(bits.bit_length()) if (bits & ~known) >> place & 1]
    return tuple(words)


def is_gpu_reason(word: str) -> bool:
    """Say whether a reason is NVML's, which holds the GPU's clocks and no other."""
    return word.startswith("reason 0x") or any(word == known for _, known in _REASONS)


class Nvml:
    """NVML, opened, and the one GPU that this process uses. Close it, or use it in a `with` statement.

    Args:
        visible: `CUDA_VISIBLE_DEVICES`; None when it is not set.
        is_bus_order: whether CUDA numbers the GPUs as NVML does; else it puts the fastest first.
        library: the file of NVML, for a stand-in.

    Attributes:
        index: NVML's number of the GPU.
        num_gpus: how many NVML knows.
        notes: what makes the choice of the GPU uncertain.

    Raises:
        RunError: there is no NVML, it does not start, or no GPU is visible; the text says which.
    """

    def __init__(self, *, visible: str | None = None, is_bus_order: bool = True, library: str = _LIBRARY) -> None:
        try:
            self._library: Any = ctypes.CDLL(library)
        except OSError:
            raise RunError(f"no NVIDIA driver: {library} cannot be loaded; nothing is known of a GPU") from None
        code = self._call("nvmlInit_v2")
        if code != 0:
            raise RunError(f"NVML does not start: {self._word(code)}; look at nvidia-smi")
        self.notes: tuple[str, ...] = ()
        self._is_open, self._is_instance = True, False
        try:
            self._handle = self._choose(visible, is_bus_order=is_bus_order)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Nvml:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of NVML; a second call does nothing."""
        if self._is_open:
            self._is_open = False
            self._call("nvmlShutdown")

    def read(self) -> tuple[GpuState, dict[str, str]]:
        """Return the GPU's state now, and NVML's word for why by the names of the fields that could not be read."""
        refused: dict[str, str] = {}

        def number(field: str, function: str, *words: Any, kind: Any = ctypes.c_uint) -> float | None:
            code, value = self._number(function, *words, kind=kind)
            if code != 0 or value == _NOT_AVAILABLE:
                refused[field] = self._word(code) if code else "not available"
                return None
            return float(value)

        reasons = number("throttle_reasons", self._reasons_function(), kind=ctypes.c_ulonglong)
        limit = number("power_limit_mw", "nvmlDeviceGetEnforcedPowerLimit")
        code, heat = _Thermometer(self._library, self._handle).read()
        celsius = None if heat is None else float(heat)
        if celsius is None:
            refused["temperature_c"] = self._word(code)
        persistent = number("is_persistent", "nvmlDeviceGetPersistenceMode")
        used, total, busy = self._memory_and_load(refused)
        mig = self._mig()
        state = GpuState(
            name=self._text("nvmlDeviceGetName", self._handle) or "unknown",
            source="nvml",
            index=self.index,
            num_gpus=self.num_gpus,
            sm=self._sm(refused),
            driver=self._text("nvmlSystemGetDriverVersion") or "unknown",
            graphics_mhz=number("graphics_mhz", "nvmlDeviceGetClockInfo", _GRAPHICS),
            sm_mhz=number("sm_mhz", "nvmlDeviceGetClockInfo", _SM),
            memory_mhz=number("memory_mhz", "nvmlDeviceGetClockInfo", _MEMORY),
            max_graphics_mhz=number("max_graphics_mhz", "nvmlDeviceGetMaxClockInfo", _GRAPHICS),
            max_sm_mhz=number("max_sm_mhz", "nvmlDeviceGetMaxClockInfo", _SM),
            max_memory_mhz=number("max_memory_mhz", "nvmlDeviceGetMaxClockInfo", _MEMORY),
            temperature_c=celsius,
            temperature_limit_c=self._temperature_limit(celsius, refused),
            power_mw=number("power_mw", "nvmlDeviceGetPowerUsage"),
            power_limit_mw=limit,
            utilization_percent=busy,
            throttle_reasons=None if reasons is None else throttle_words(int(reasons)),
            memory_used_mib=used,
            memory_total_mib=total,
            num_processes=self._count_processes(refused),
            is_persistent=None if persistent is None else persistent == 1,
            mig=mig,
            mig_instance=self._is_instance or mig == "on",
        )
        return state, refused

    def energy_mj(self) -> int | None:
        """Return the GPU's own counter of energy since the driver was loaded; None where it has none."""
        code, value = self._number("nvmlDeviceGetTotalEnergyConsumption", kind=ctypes.c_ulonglong)
        return value if code == 0 else None

    def sampler(self) -> NvmlSampler:
        """Return what reads clocks, heat, power and throttling again and again."""
        return NvmlSampler(self._library, self._handle, self._reasons_function())

    def _choose(self, visible: str | None, *, is_bus_order: bool) -> ctypes.c_void_p:
        count = ctypes.c_uint()
        code = self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        if code != 0 or count.value == 0:
            raise RunError(f"NVML finds no GPU ({self._word(code) if code else '0 devices'}); look at nvidia-smi")
        self.num_gpus = count.value
        entry = "0" if visible is None else visible.split(",")[0].strip()
        self.index = self._index_of(entry)
        handle = self._handle_at(self.index) if 0 <= self.index < count.value else None
        if handle is None:
            raise RunError(
                f"CUDA_VISIBLE_DEVICES={visible!r} shows none of the {count.value} GPUs that NVML knows, so CUDA finds "
                "none"
            )
        names = {self._text("nvmlDeviceGetName", self._handle_at(index)) for index in range(count.value)}
        if entry.isdecimal() and len(names) > 1 and not is_bus_order:
            note = (
                f"gpu: {count.value} different GPUs, and CUDA may number them otherwise than NVML; the state is that "
                f"of NVML's number {self.index}; set CUDA_DEVICE_ORDER=PCI_BUS_ID to be sure"
            )
            self.notes = (note,)
        return handle

    def _index_of(self, entry: str) -> int:
        """Return NVML's number for an entry of CUDA_VISIBLE_DEVICES: a number, or the start of a UUID; -1 for none."""
        if entry.isdecimal():
            return int(entry)
        if entry.startswith("MIG-"):
            self._is_instance = True
            return self._index_of_instance(entry)
        if not entry.startswith("GPU-"):
            return -1
        uuids = [self._text("nvmlDeviceGetUUID", self._handle_at(index)) for index in range(self.num_gpus)]
        return next((index for index, uuid in enumerate(uuids) if uuid.startswith(entry)), -1)

    def _index_of_instance(self, entry: str) -> int:
        """Return the number of the GPU that an instance is cut from; before driver 470 its UUID named that GPU."""
        if entry.startswith("MIG-GPU-"):
            return self._index_of(entry.removeprefix("MIG-").partition("/")[0])
        instance, whole, index = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_uint()
        steps = (
            ("nvmlDeviceGetHandleByUUID", entry.encode(), ctypes.byref(instance)),
            ("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", instance, ctypes.byref(whole)),
            ("nvmlDeviceGetIndex", whole, ctypes.byref(index)),
        )
        return index.value if all(self._call(*step) == 0 for step in steps) else -1

    def _handle_at(self, index: int) -> ctypes.c_void_p | None:
        handle = ctypes.c_void_p()
        code = self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
        return handle if code == 0 else None

    def _reasons_function(self) -> str:
        """Return the function's name: CUDA 12.2 gave it a new one."""
        new = "nvmlDeviceGetCurrentClocksEventReasons"
        return new if hasattr(self._library, new) else "nvmlDeviceGetCurrentClocksThrottleReasons"

    def _memory_and_load(self, refused: dict[str, str]) -> tuple[float | None, float | None, float | None]:
        memory, load = _Memory(), _Utilization()
        codes = (
            self._call("nvmlDeviceGetMemoryInfo", self._handle, ctypes.byref(memory)),
            self._call("nvmlDeviceGetUtilizationRates", self._handle, ctypes.byref(load)),
        )
        for code, fields in zip(
            codes, (("memory_used_mib", "memory_total_mib"), ("utilization_percent",)), strict=True
        ):
            refused.update({field: self._word(code) for field in fields if code != 0})
        used, total = (memory.used / _MIB, memory.total / _MIB) if codes[0] == 0 else (None, None)
        return used, total, float(load.gpu) if codes[1] == 0 else None

    def _sm(self, refused: dict[str, str]) -> int | None:
        major, minor = ctypes.c_int(), ctypes.c_int()
        code = self._call("nvmlDeviceGetCudaComputeCapability", self._handle, ctypes.byref(major), ctypes.byref(minor))
        if code != 0:
            refused["sm"] = self._word(code)
            return None
        return major.value * 10 + minor.value

    def _temperature_limit(self, celsius: float | None, refused: dict[str, str]) -> float | None:
        """Return the lowest temperature at which clocks fall; newer GPUs tell how far it is instead of where."""
        found = []
        for threshold in (_SLOWDOWN, _GPU_MAX):
            code, value = self._number("nvmlDeviceGetTemperatureThreshold", threshold)
            if code == 0 and 0 < value < 200:
                found.append(float(value))
        if found:
            return min(found)
        margin = _Margin(version=ctypes.sizeof(_Margin) | 1 << 24)
        code = self._call("nvmlDeviceGetMarginTemperature", self._handle, ctypes.byref(margin))
        if code == 0 and celsius is not None:
            return celsius + float(margin.celsius)
        refused["temperature_limit_c"] = self._word(code) if code else "not available"
        return None

    def _count_processes(self, refused: dict[str, str]) -> int | None:
        count = ctypes.c_uint(0)
        code = self._call("nvmlDeviceGetComputeRunningProcesses_v3", self._handle, ctypes.byref(count), None)
        if code in {0, _INSUFFICIENT_SIZE}:  # with no room for their names, it still counts them
            return count.value
        refused["num_processes"] = self._word(code)
        return None

    def _mig(self) -> Mig:
        current, pending = ctypes.c_uint(), ctypes.c_uint()
        code = self._call("nvmlDeviceGetMigMode", self._handle, ctypes.byref(current), ctypes.byref(pending))
        if code == 0:
            return "on" if current.value else "off"
        return "unsupported" if code in {_NOT_SUPPORTED, _ABSENT} else "unknown"

    def _number(self, function: str, *words: Any, kind: Any = ctypes.c_uint) -> tuple[int, int]:
        """Return NVML's code and the number that it wrote."""
        value = kind()
        return self._call(function, self._handle, *words, ctypes.byref(value)), value.value

    def _text(self, function: str, *words: Any) -> str:
        buffer = ctypes.create_string_buffer(_TEXT)
        if self._call(function, *words, buffer, ctypes.c_uint(_TEXT)) != 0:
            return ""
        return "".join(letter for letter in buffer.value.decode(errors="replace") if letter.isprintable())

    def _call(self, function: str, *words: Any) -> int:
        """Return the code of a call; a driver that is too old for the function gives `_ABSENT`."""
        try:
            return int(getattr(self._library, function)(*words))
        except AttributeError:
            return _ABSENT

    def _word(self, code: int) -> str:
        """Return NVML's word for a code."""
        if code == _ABSENT:
            return "this driver has no such call"
        try:
            describe = self._library.nvmlErrorString
        except AttributeError:
            return f"error {code}"
        describe.restype = ctypes.c_char_p
        text = describe(ctypes.c_int(code))
        return f"{text.decode(errors='replace')} ({code})" if text else f"error {code}"


class _Thermometer:
    """Reads the temperature by the call that the library has: CUDA 13 gave it a new one, and CUDA 14 drops the old."""

    def __init__(self, library: Any, handle: ctypes.c_void_p) -> None:
        self._handle = handle
        self._old = getattr(library, "nvmlDeviceGetTemperature", None)
        self._new = getattr(library, "nvmlDeviceGetTemperatureV", None)
        self._number = ctypes.c_uint()
        self._heat = _Heat(version=ctypes.sizeof(_Heat) | 1 << 24)
        self._to_number, self._to_heat = ctypes.byref(self._number), ctypes.byref(self._heat)

    def read(self) -> tuple[int, int | None]:
        """Return NVML's code, and degrees where it is 0."""
        if self._old is not None:
            code = self._old(self._handle, 0, self._to_number)
            return code, None if code else self._number.value
        if self._new is None:
            return _ABSENT, None
        code = self._new(self._handle, self._to_heat)
        return code, None if code else self._heat.celsius


class NvmlSampler:
    """Reads what changes, with nothing allocated but the numbers: about ten microseconds of Python a call.

    ctypes lets go of the interpreter's lock for the time that the driver takes.

    Attributes:
        power_is_averaged: the power is an average over the last second, because this driver gives no other.
    """

    def __init__(self, library: Any, handle: ctypes.c_void_p, reasons: str) -> None:
        self._handle = handle
        self._field = _Field(field=_POWER_INSTANT)
        self._uint, self._long = ctypes.c_uint(), ctypes.c_ulonglong()
        self._to_field, self._to_uint, self._to_long = map(ctypes.byref, (self._field, self._uint, self._long))

        def function(name: str) -> Any:
            return getattr(library, name, None)

        self._clock, self._thermometer = function("nvmlDeviceGetClockInfo"), _Thermometer(library, handle)
        self._power, self._reasons = function("nvmlDeviceGetPowerUsage"), function(reasons)
        self._fields = function("nvmlDeviceGetFieldValues")
        self.power_is_averaged = self._instant_power() is None
        if self.power_is_averaged:
            self._fields = None

    def sample(self) -> tuple[int | None, int | None, int | None, int | None, int | None]:
        """Return clocks of multiprocessors and memory in MHz, degrees, milliwatts, and the mask of throttle reasons."""
        power = self._instant_power()
        return (
            self._number(self._clock, _SM),
            self._number(self._clock, _MEMORY),
            self._thermometer.read()[1],
            self._number(self._power) if power is None else power,
            self._mask(),
        )

    def _instant_power(self) -> int | None:
        if self._fields is None or self._fields(self._handle, 1, self._to_field) != 0 or self._field.code != 0:
            return None
        return int(self._field.value.uint)

    def _number(self, function: Any, *words: int) -> int | None:
        if function is None or function(self._handle, *words, self._to_uint) != 0:
            return None
        value = self._uint.value
        return None if value == _NOT_AVAILABLE else value

    def _mask(self) -> int | None:
        if self._reasons is None or self._reasons(self._handle, self._to_long) != 0:
            return None
        return self._long.value
