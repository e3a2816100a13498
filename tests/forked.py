"""A job in a process that may die: forked, so that it need not import torch again."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable


def in_a_child(job: Callable[[], object], seconds: float | None = None) -> bool:
    """Runs `job` in a forked process, killed after `seconds`; whether it ended by itself and was not killed."""
    child = os.fork()
    if not child:
        try:
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(1)  # OpenMP's threads are not forked along
            job()
            os._exit(0)
        except BaseException:
            os._exit(1)
    timer = threading.Timer(seconds or 600, os.kill, (child, signal.SIGKILL))
    timer.start()
    status = os.waitpid(child, 0)[1]
    timer.cancel()
    assert status in (0, signal.SIGKILL), f"the job failed: {os.waitstatus_to_exitcode(status)}"
    return status == 0


def dies() -> None:
    """What a job calls where it is to be killed."""
    os.kill(os.getpid(), signal.SIGKILL)
