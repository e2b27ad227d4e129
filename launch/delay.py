"""A switch with a long way through it: what comes in at one port leaves at the others MS later.

    ip netns exec SWITCH python3 launch/delay.py MS PORT PORT ...

``launch/namespaces.sh delay`` starts it in the place of a bridge. It is for kernels without netem,
and takes whole segments of up to 64 KiB from the kernel (PACKET_VNET_HDR), so that Python keeps up
with a gigabit. It ends when a port is gone. Linux, root; nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import select
import socket
import sys
import time
from collections import deque

_SOL_PACKET = 263
_PACKET_IGNORE_OUTGOING = 23
_PACKET_VNET_HDR = 15
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_ETH_P_ALL = 3
_HEADER = 10
"""Bytes of ``struct virtio_net_hdr``: which checksums are left to compute, where to cut."""
_SEGMENT = _HEADER + 2**16 + 256
_BUFFER = 64 * 2**20
_AT_ONCE = 64
"""Packets taken from a port before others are looked at."""


def port(name: str) -> socket.socket:
    """All packets that come in at an interface, and a way out of it."""
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    made.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    made.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    made.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
    made.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER)
    made.bind((name, _ETH_P_ALL))
    made.setblocking(False)
    return made


class Switch:
    """Learns at which port an address is, as a bridge does; holds every packet equally long.

    The delay is constant, so packets leave in the order in which they came.
    """

    def __init__(self, ports: list[socket.socket], delay_s: float) -> None:
        self._ports, self._delay_s = ports, delay_s
        self._held: deque[tuple[float, socket.socket, bytes]] = deque()
        self._places: dict[bytes, socket.socket] = {}

    def serve(self) -> None:
        """For ever.

        Raises:
            OSError: A port is gone.
        """
        while True:
            wait = max(0.0, self._held[0][0] - time.monotonic()) if self._held else None
            for came in select.select(self._ports, [], [], wait)[0]:
                self._take(came)
            while self._held and self._held[0][0] <= time.monotonic():
                _, came, packet = self._held.popleft()
                self._leave(came, packet)

    def _take(self, came: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(_AT_ONCE):
                packet = came.recv(_SEGMENT)
                self._held.append((time.monotonic() + self._delay_s, came, packet))

    def _leave(self, came: socket.socket, packet: bytes) -> None:
        to, source = packet[_HEADER : _HEADER + 6], packet[_HEADER + 6 : _HEADER + 12]
        self._places[source] = came
        at = self._places.get(to)
        for out in self._ports if at is None else [at]:
            if out is not came:
                try:
                    out.send(packet)
                except OSError as error:  # a full queue drops packets, as a switch's does
                    if error.errno not in (errno.EAGAIN, errno.ENOBUFS):
                        raise


def main() -> None:
    milliseconds, *names = sys.argv[1:]
    switch = Switch([port(name) for name in names], float(milliseconds) / 1e3)
    if os.fork():
        return  # it is ready
    os.setsid()
    for number in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    with contextlib.suppress(OSError):
        # A network card does not wait for a core either.
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    gc.disable()  # there are no cycles
    with contextlib.suppress(OSError):
        switch.serve()


if __name__ == "__main__":
    main()
