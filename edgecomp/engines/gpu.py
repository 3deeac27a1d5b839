"""Asks the driver which GPU is here; needs no CUDA toolkit and no Python package."""

from __future__ import annotations

import ctypes

__all__ = ["local_gpu_sm"]

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h


def local_gpu_sm() -> int | None:
    """Return the compute capability of the first GPU without the dot, for example 89.

    `None` is an answer and no failure: there is no driver here, or no GPU that the process may use.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    if driver.cuInit(0) != 0:
        return None
    device = ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    found = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) != 0:
            return None
        found.append(value.value)
    return found[0] * 10 + found[1]
