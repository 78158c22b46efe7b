"""Runs a command, and kills it and all processes that it started when the caller ends.

    python bench/leash.py COMMAND...        # standard input: a pipe that the caller holds open

The caller starts this as the leader of a process group. When the caller ends, even by kill -9, the
pipe closes and the whole group is killed, so no process keeps the GPU. This process ignores
interrupts of the group; the command receives them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def wait_for_the_caller_to_end() -> None:
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the command's, also where it was ignored here
    try:
        process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    except OSError as error:
        print(error, flush=True)
        return 127
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait_for_the_caller_to_end, daemon=True).start()
    status = process.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
