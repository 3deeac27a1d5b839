"""Other machines: a verb of the same command line runs there, over the system's own ssh, and its results come back.

`docs/remote.md` says what is copied, what is left there, and what each error means.
"""

from edgecomp.remote.job import Attached
from edgecomp.remote.place import Place, read_place
from edgecomp.remote.session import RemoteRun, run_there
from edgecomp.remote.wheel import make_wheel

__all__ = ["Attached", "Place", "RemoteRun", "make_wheel", "read_place", "run_there"]
