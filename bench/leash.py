"""Runs a command, and kills it with all that it has started when the caller is gone.

    python bench/leash.py COMMAND...        # standard input: a pipe that the caller holds open

The caller starts this as the leader of a process group. Whatever ends the caller, kill -9 too,
closes the pipe, and the whole group is killed: no process is left that holds the GPU. Interrupts of
the group are for the command alone.
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
