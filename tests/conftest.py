"""What all tests share.

Ctrl-C reaches children, a test marked `gpu` is skipped where there is no GPU, and with `-n` tests that share what is
slow to make run in one process: those of one method among the contracts, those of one file elsewhere.
"""

from __future__ import annotations

import re
import signal
from typing import Any

import pytest


def pytest_configure() -> None:
    """Take Ctrl-C again where a shell that put the run into the background had it ignored: children inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep a group of tests in one process. xdist's own groups fail with pytest 9.2, which ignores its renaming."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group_of(nodeid)

        def _assign_work_unit(self, node: Any) -> None:
            """Begin with whole programs: few tests and many minutes, behind which one process would end alone."""
            long = next((group for group in self.workqueue if re.fullmatch(r"(tests/)?test_\w+\.py", group)), None)
            if long is not None:
                self.workqueue.move_to_end(long, last=False)
            super()._assign_work_unit(node)

    return ByGroup(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    from edgecomp.engines import local_gpu_sm

    if local_gpu_sm() is None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="there is no NVIDIA GPU on this machine"))


def _group_of(nodeid: str) -> str:
    """Return the method of a contract, or the file of any other test."""
    from edgecomp.specs import method_names

    file, _, name = nodeid.partition("::")
    if "/contracts/" in file:
        found = [method for method in method_names() if re.search(rf"[\[-]{method}[-\]]", name)]
        if found:
            return max(found, key=len)
    return file
