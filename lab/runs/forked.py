"""Ends with its parent from its first moment, even while it imports. Linux alone has that; others notice later.

The fork server imports this before all else; `python -m lab.runs.forked MODULE ...` is `python -m MODULE ...`.
"""

import ctypes
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1

if sys.platform == "linux":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # not inherited: whoever is started here sees to itself

if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
