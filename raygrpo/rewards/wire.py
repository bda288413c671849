"""Framed messages between a reward's host and its child process; every wait has a deadline.

A frame is its length (8 bytes, big-endian) and its bytes. `multiprocessing.connection` would block
in the middle of a frame whose other end is stuck.
"""

from __future__ import annotations

import socket
import struct
import time

HEADER = struct.Struct("!Q")
MAX_FRAME_BYTES = 1 << 31


class Channel:
    """One end of a stream socket.

    Deadlines are times of `time.monotonic`, in seconds; None waits for ever. A missed deadline
    raises TimeoutError; a dead other end raises EOFError or another OSError. Both break
    the channel.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, payload: bytes, deadline: float | None) -> None:
        """Sends one frame."""
        self._set_timeout(deadline)
        self._socket.sendall(HEADER.pack(len(payload)) + payload)

    def receive(self, deadline: float | None) -> bytes:
        """Receives one frame."""
        (size,) = HEADER.unpack(self._receive_exactly(HEADER.size, deadline))
        if size > MAX_FRAME_BYTES:
            raise EOFError(f"a frame of {size} bytes: the stream is broken")
        return self._receive_exactly(size, deadline)

    def is_idle(self) -> bool:
        """Whether the other end is there and nothing has arrived, as it must be between calls."""
        self._socket.setblocking(False)
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        """Closes this end."""
        self._socket.close()

    def _receive_exactly(self, size: int, deadline: float | None) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._set_timeout(deadline)
            part = self._socket.recv(min(size - len(data), 1 << 20))
            if not part:
                raise EOFError("the other end is gone")
            data += part
        return bytes(data)

    def _set_timeout(self, deadline: float | None) -> None:
        if deadline is None:
            self._socket.settimeout(None)
            return
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
