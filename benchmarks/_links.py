"""Workers on hosts of their own, joined by slow links: network namespaces of this machine. Needs Linux and root."""

import ctypes
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "cable"
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET


@dataclass(frozen=True)
class Host:
    """A namespace with one link to a switch."""

    name: str
    address: str

    def enter(self) -> None:
        """Moves this thread, and the threads that it starts from now on, to the host."""
        libc = ctypes.CDLL(None, use_errno=True)
        with Path("/var/run/netns", self.name).open() as namespace:
            if libc.setns(namespace.fileno(), _NEW_NETWORK):
                raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {self.name}")


@contextmanager
def hosts(number: int, mbit: float | Sequence[float]) -> Iterator[list[Host]]:
    """Hosts with links of their own.

    Args:
        number: how many.
        mbit: what each link carries in each direction, in Mbit/s, headers of Ethernet, IP and TCP included; one number
            for all, or one for each.
    """
    rates = [mbit] * number if isinstance(mbit, (int, float)) else list(mbit)
    switch = f"plan{os.getpid()}switch"
    found = [Host(f"plan{os.getpid()}h{i}", f"10.78.0.{i + 1}") for i in range(number)]
    spaces = [switch, *(host.name for host in found)]
    try:
        for space in spaces:
            _run(f"ip netns add {space}")
            _run(f"ip -n {space} link set lo up")
        _run(f"ip -n {switch} link add bridge type bridge")
        _run(f"ip -n {switch} link set bridge up")
        for i, host in enumerate(found):
            _run(f"ip link add {INTERFACE} netns {host.name} type veth peer name port{i} netns {switch}")
            _run(f"ip -n {host.name} addr add {host.address}/24 dev {INTERFACE}")
            _run(f"ip -n {switch} link set port{i} master bridge")
            for space, device in ((host.name, INTERFACE), (switch, f"port{i}")):
                _run(f"ip -n {space} link set {device} up")
                _run(f"tc -n {space} qdisc add dev {device} root tbf rate {rates[i]}mbit burst 128kb latency 100ms")
        yield found
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True, text=True)
