"""Which of this machine's addresses the other machines can reach, and on which interface it lies."""

from __future__ import annotations

import ipaddress
import socket
import struct
import time

from nemo_automodel.errors import AutoModelError

_SIOCGIFADDR = 0x8915


def await_name(host: str, seconds: float) -> None:
    """Wait until ``host`` is known: a machine that starts later than this one has no address yet.

    Raises:
        AutoModelError: It is not known after ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while not _resolve(host, 0):
        if time.monotonic() > deadline:
            raise AutoModelError(f"no machine is called {host}; correct the address at which the machines meet")
        time.sleep(1)


def local_address(host: str, port: int) -> str | None:
    """This machine's address on the way to ``host``; None where there is none that another machine could use."""
    for family, kind, _, _, address in _resolve(host, port):
        with socket.socket(family, kind) as probe:
            try:
                probe.connect(address)  # of a datagram socket: a look at the routing table, nothing is sent
            except OSError:
                continue
            own = probe.getsockname()[0]
            if not ipaddress.ip_address(own).is_loopback:
                return own
    return None


def can_listen(host: str, port: int) -> bool:
    """Whether ``host`` is this machine, by any of its addresses, and nobody listens at ``port`` yet."""
    for family, _, _, _, address in _resolve(host, port):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)  # possible for an own address only
                return True
            except OSError:
                continue
    return False


def interface_of(address: str | None) -> str | None:
    """The name of the interface that has the IPv4 ``address``; None where there is none, or no such call."""
    if address is None:
        return None
    try:
        import fcntl
    except ImportError:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # one without an address
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None


def _resolve(host: str, port: int) -> list[tuple]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except OSError:
        return []
