"""Imported by the fork server before all else: it ends with its parent even while it still imports. Linux alone has that."""

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1

if sys.platform == "linux":
    ctypes.CDLL(None).prctl(
        PR_SET_PDEATHSIG, signal.SIGKILL
    )  # not inherited by the workers, which `launch._begin` ends
