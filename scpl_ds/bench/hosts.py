"""Network namespaces as hosts: ranks of a benchmark that reach each other over a slow link only.

``launch/namespaces.sh`` makes them.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import socket
import statistics
import struct
import time
from pathlib import Path

from scpl_ds.errors import RecipeError

FOLDER = Path("/var/run/netns")
_CLONE_NEWNET = 0x40000000
_SIOCGIFADDR = 0x8915
_LOOPBACK = "lo"
_CONNECTIONS = 15


def check(hosts: tuple[str, ...], ranks: int, folder: Path = FOLDER) -> None:
    """Refuse what ranks could not enter, before any is started.

    Raises:
        RecipeError: A namespace is not there, this process may not enter any, or they would not
            all have as many ranks.
    """
    if hosts and (len(set(hosts)) != len(hosts) or ranks % len(hosts)):
        raise RecipeError(
            f"--namespaces {','.join(hosts)}: {len(set(hosts))} namespaces for {ranks} ranks. "
            "Name each once, and as many as divide --ranks."
        )
    for name in hosts:
        if not (folder / name).exists():
            raise RecipeError(
                f"--namespaces {name}: there is no network namespace of that name in {folder}. "
                "`sudo bash launch/namespaces.sh up 2 100mbit` makes host0 and host1."
            )
    if hosts and os.geteuid() != 0:
        raise RecipeError("--namespaces: only root may enter a network namespace. Use sudo.")


def enter(name: str, folder: Path = FOLDER) -> str:
    """Move this thread, and what it starts from now on, into a network namespace; gloo is told to
    use its interface, which is returned.

    Raises:
        OSError: It cannot be entered, or has no interface.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with open(folder / name) as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"network namespace {name}: {os.strerror(number)}")
    os.environ["GLOO_SOCKET_IFNAME"] = link = interface()
    return link


def interface() -> str:
    """The interface of this process's namespace that is not the loopback.

    Raises:
        OSError: There is none.
    """
    names = [name for _, name in socket.if_nameindex() if name != _LOOPBACK]
    if not names:
        raise OSError("this network namespace has no interface but the loopback")
    return names[0]


def address(name: str) -> str:
    """The IPv4 address of an interface of this process's namespace.

    Raises:
        OSError: It has none.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        answer = fcntl.ioctl(asked, _SIOCGIFADDR, struct.pack("256s", name.encode()))
    return socket.inet_ntoa(answer[20:24])


def round_trip_s(first: str, second: str, folder: Path = FOLDER) -> float:
    """Seconds from one namespace to another and back: the median of what TCP takes to connect.

    This thread is in ``second`` afterwards: for a process of its own.

    Raises:
        OSError: A namespace cannot be entered, or one does not reach the other in 5 s.
    """
    server = socket.create_server((address(enter(first, folder)), 0), backlog=_CONNECTIONS)
    enter(second, folder)
    times: list[float] = []
    with server:
        for _ in range(_CONNECTIONS):  # the first one also asks for the hardware address
            began = time.monotonic()
            socket.create_connection(server.getsockname(), timeout=5).close()
            times.append(time.monotonic() - began)
    return statistics.median(times)


def bytes_out(name: str, table: str | None = None) -> int:
    """What ``name`` has sent since it was made, headers and acknowledgements included.

    Args:
        name: An interface of this process's namespace.
        table: ``/proc/self/net/dev``, unless given.
    """
    text = Path("/proc/self/net/dev").read_text() if table is None else table
    found = re.search(rf"^\s*{re.escape(name)}:(.*)$", text, re.MULTILINE)
    if found is None:
        raise OSError(f"no interface {name} in /proc/self/net/dev")
    return int(found[1].split()[8])
