"""The address at which each worker listens for the others, reachable from other hosts."""

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

from lightning_async_localsgd.membership.store import connection_to

__all__ = ["INTERFACE_VARIABLE", "Route", "choose_addresses", "listening_at", "make_gloo_group", "route_to"]

INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"
"""The environment variable that names gloo's network interface."""

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of a network interface


class Route(NamedTuple):
    """The network route from a host to the job's store. Both ends are IP addresses; None: unknown."""

    source: str | None
    """This host's own address on the route."""
    target: str | None
    """The store's address, as this host resolves it."""


def route_to(store: Store) -> Route:
    """The route from this host to ``store``. Unknown if the store is not a TCP one, or the user names the interface.

    The interface on the route to ``MASTER_ADDR`` is the one that reaches the other hosts. Gloo takes the interface of
    the host's name instead. On many systems it is the loopback interface.
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
    # Gloo cannot connect an IPv4 address to an IPv6 one: all hosts must prefer the same family.
    for family, kind, protocol, _, target in sorted(found, key=lambda entry: entry[0] != socket.AF_INET):
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(target)  # a datagram socket: this chooses the route and sends nothing
                return Route(str(probe.getsockname()[0]), str(target[0]))
        except OSError:
            continue
    return Route(None, None)


def choose_addresses(routes: Sequence[Route]) -> list[str | None]:
    """The address at which each worker is to listen; None: gloo's choice.

    On the store's own host the route may not leave the host. Its address is then the one that other hosts use.

    Args:
        routes: the route of each worker.
    """
    seen = [route.target for route in routes if route.target is not None and not _is_loopback(route.target)]
    return [
        seen[0] if seen and route.source is not None and _is_loopback(route.source) else route.source
        for route in routes
    ]


def _is_loopback(address: str) -> bool:
    return ip_address(address.partition("%")[0]).is_loopback


def make_gloo_group(store: Store, rank: int, size: int, timeout: timedelta, address: str | None) -> ProcessGroupGloo:
    """A gloo group beside the default group, if there is one.

    Args:
        store: the group's own part of the store, for its rendezvous over a connection of its own.
        rank: rank of this process.
        size: number of processes.
        timeout: timeout of the group's operations.
        address: the address at which this process is to listen; None: gloo's choice.
    """
    store = connection_to(store)
    if address is None:
        return ProcessGroupGloo(store, rank, size, timeout)
    options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # as torch's own tests make them
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timeout
    return ProcessGroupGloo(store, rank, size, options)


@contextmanager
def listening_at(address: str | None) -> Iterator[None]:
    """Groups that torch makes in the body listen at this address. Torch only accepts the name of an interface.

    Args:
        address: the address; None: gloo's choice.
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
