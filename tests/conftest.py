"""What all tests share: Ctrl-C reaches children, and a test marked `gpu` is skipped where there is no GPU."""

from __future__ import annotations

import signal

import pytest


def pytest_configure() -> None:
    """Take Ctrl-C again where a shell that put the run into the background had it ignored: children inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    from edgecomp.engines import local_gpu_sm

    if local_gpu_sm() is None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="there is no NVIDIA GPU on this machine"))
