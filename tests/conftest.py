"""What all tests share: a test marked `gpu` is skipped, with the reason, where there is no GPU."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    from edgecomp.engines import local_gpu_sm

    if local_gpu_sm() is None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="there is no NVIDIA GPU on this machine"))
