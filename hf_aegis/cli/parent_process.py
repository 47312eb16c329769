"""Commands that another command started, and that end when it does."""

import ctypes
import os
import signal
import sys


PARENT_VARIABLE = "HF_AEGIS_PARENT"
"""Environment variable with the process id of the command that started this one."""

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """
    On Linux, asks the kernel to kill this process when the one named in the environment ends, be it by `kill -9`, so
    that no training runs on unseen, were it to save a checkpoint, and a second one meets it in the same folder.
    Nothing happens elsewhere, or where no parent is named.
    """
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # It may have ended before the kernel was asked.
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGKILL)
