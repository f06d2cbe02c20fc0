"""A network for tests: a host for each process, on a switch whose cables can be pulled out while the processes run.

Unlike the hosts of ``tests.hosts`` these are entered by a process that runs already, before it opens any connection.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

_CLONE_NEWNET = 0x40000000


class Network:
    """Hosts, numbered from 0.

    Args:
        name: begins the names of its network namespaces.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def address(self, host: int) -> str:
        """Where other hosts reach it."""
        return f"10.78.0.{host + 1}"

    def enter(self, host: int) -> None:
        """Have the calling thread, and all that it starts, be on a host from now on."""
        descriptor = os.open(f"/run/netns/{self._name}{host}", os.O_RDONLY)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(descriptor, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
        os.close(descriptor)

    def pull_out(self, host: int) -> None:
        """Cut a host off from all others. Nobody is told: what is sent to it and by it is lost."""
        _ip(f"-n {self._name}switch link set port{host} down")

    def plug_in(self, host: int) -> None:
        """Undo :meth:`pull_out`."""
        _ip(f"-n {self._name}switch link set port{host} up")


@contextmanager
def network(hosts: int) -> Iterator[Network]:
    """A network for the body."""
    name = f"lal{os.getpid()}net"
    spaces = [f"{name}switch", *(f"{name}{host}" for host in range(hosts))]
    made = Network(name)
    try:
        for space in spaces:
            _ip(f"netns add {space}")
            _ip(f"-n {space} link set lo up")
        _ip(f"-n {spaces[0]} link add switch type bridge")
        _ip(f"-n {spaces[0]} link set switch up")
        for host, space in enumerate(spaces[1:]):
            _ip(f"link add cable netns {space} type veth peer name port{host} netns {spaces[0]}")
            _ip(f"-n {spaces[0]} link set port{host} master switch")
            _ip(f"-n {space} addr add {made.address(host)}/24 dev cable")
            _ip(f"-n {space} link set cable up")
            made.plug_in(host)
        yield made
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True, text=True)
