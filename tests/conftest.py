"""What all tests share.

Ctrl-C reaches children, a test marked `gpu` is skipped where there is no GPU, and with `-n` tests that share what is
slow to make run in one process: those of one method among the contracts, those of one file elsewhere.
"""

from __future__ import annotations

import signal

import pytest


def pytest_configure() -> None:
    """Take Ctrl-C again where a shell that put the run into the background had it ignored: children inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.xdist_group(_group_of(item)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    from edgecomp.engines import local_gpu_sm

    if local_gpu_sm() is None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="there is no NVIDIA GPU on this machine"))


def _group_of(item: pytest.Item) -> str:
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    smoke = params.get("smoke")
    return str(smoke.method if smoke is not None else params.get("method", item.path.name))
