"""Where each worker listens for the others: the address at which its host is reached from elsewhere."""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from ipaddress import ip_address
from typing import Any, NamedTuple

from torch.distributed import PrefixStore, ProcessGroupGloo, Store

__all__ = ["INTERFACE_VARIABLE", "Route", "choose_addresses", "listening_at", "make_gloo_group", "route_to"]

INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"
"""By which gloo is told the network interface to use."""

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of a network interface


class Route(NamedTuple):
    """The way from a host to the job's store. Both ends are IP addresses; None: unknown."""

    source: str | None
    """This host's own address on that way."""
    target: str | None
    """The store's address, as this host resolves it."""


def route_to(store: Store) -> Route:
    """The way from this host to ``store``. Unknown if the store is not a TCP one, or the user names the interface.

    The interface on the way to ``MASTER_ADDR`` is the one that reaches the other hosts. Gloo takes that of the host's
    name instead, which on many systems is the loopback interface.
    """
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    host = getattr(store, "host", None)
    if not host or INTERFACE_VARIABLE in os.environ:
        return Route(None, None)
    try:
        found = socket.getaddrinfo(host, store.port, type=socket.SOCK_DGRAM)  # type: ignore[attr-defined]
    except OSError:
        return Route(None, None)
    # Gloo cannot connect an IPv4 address to an IPv6 one, so that all hosts must prefer the same.
    for family, kind, protocol, _, target in sorted(found, key=lambda entry: entry[0] != socket.AF_INET):
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(target)  # of a datagram socket: chooses the way and sends nothing
                return Route(str(probe.getsockname()[0]), str(target[0]))
        except OSError:
            continue
    return Route(None, None)


def choose_addresses(routes: Sequence[Route]) -> list[str | None]:
    """The address at which each worker is to listen; None: what gloo chooses.

    On the host of the store the way to it may not leave the host: then its address is the one that others see.

    Args:
        routes: of each worker.
    """
    seen = [route.target for route in routes if route.target is not None and not _is_loopback(route.target)]
    return [
        seen[0] if seen and route.source is not None and _is_loopback(route.source) else route.source
        for route in routes
    ]


def _is_loopback(address: str) -> bool:
    return ip_address(address.partition("%")[0]).is_loopback


def make_gloo_group(store: Store, rank: int, size: int, timeout: timedelta, address: str | None) -> ProcessGroupGloo:
    """A gloo group beside whatever default group there is.

    Args:
        store: for the processes to meet, the group's own.
        rank: this process.
        size: number of processes.
        timeout: of its operations.
        address: where this process is to listen; None: what gloo chooses.
    """
    if address is None:
        return ProcessGroupGloo(store, rank, size, timeout)
    options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # as torch's own tests make them
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timeout
    return ProcessGroupGloo(store, rank, size, options)


@contextmanager
def listening_at(address: str | None) -> Iterator[None]:
    """In the body, groups that torch makes listen at this address; it can only be told the name of an interface.

    Args:
        address: None: what gloo chooses.
    """
    interface = _interface_of(address) if address is not None else None
    if interface is None or INTERFACE_VARIABLE in os.environ:
        yield
        return
    os.environ[INTERFACE_VARIABLE] = interface
    try:
        yield
    finally:
        del os.environ[INTERFACE_VARIABLE]


def _interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address; None if there is none, or the system is not Linux."""
    if sys.platform != "linux":
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has none
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
