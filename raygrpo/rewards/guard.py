"""The init process of one reward function: starts it, and ends its whole process tree.

Run as a script (``guard.py HOST_PID FD TRACE_FD COMMAND...``) by an isolated interpreter: it holds
no user code and nothing that could get stuck. It ends every descendant of the reward when the
reward's process ends, on SIGTERM, or when its host is gone. A descendant may have left the process
group: as a child subreaper the guard adopts orphans, so that none is out of reach.

PR_SET_PDEATHSIG alone would not do: the kernel ties it to the *thread* that spawned the child, and
it reaches the child only, not what the child started.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

PR_SET_CHILD_SUBREAPER = 36
HOST_CHECK_S = 0.5


def main(host_pid: int, fds: list[int], command: list[str]) -> int:
    """Runs ``command`` with its descriptors and its guard's pid appended; its exit code."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signals = {signal.SIGTERM, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    arguments = [*command, *map(str, fds), str(os.getpid())]
    child = os.posix_spawn(command[0], arguments, os.environ, setsid=True, setsigmask=[])
    # The child's end must be the only one, so that its death closes the connection.
    for fd in fds:
        os.close(fd)
    code = 128 + signal.SIGKILL
    while os.getppid() == host_pid:
        received = signal.sigtimedwait(signals, HOST_CHECK_S)
        if received is not None and received.si_signo == signal.SIGTERM:
            break
        ended = _reap(child)
        if ended is not None:
            code = ended
            break
    _end_descendants()
    return code


def _reap(child: int) -> int | None:
    """Collects ended processes without waiting; the exit code of ``child`` if it is one of them."""
    code = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            if ended[0] == child:
                status = os.waitstatus_to_exitcode(ended[1])
                code = 128 - status if status < 0 else status
    return code


def _end_descendants() -> None:
    # Children of a killed process are adopted before it can be waited for: the next scan sees them.
    while True:
        for pid in _children():
            os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    mine = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as file:
                after_name = file.read().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(after_name[1]) == os.getpid():
            mine.append(int(entry))
    return mine


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), [int(fd) for fd in sys.argv[2:4]], sys.argv[4:]))
