"""Hosts for tests: network namespaces of this machine, with names and addresses of their own, joined by a cable."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

NAMES = ("node0", "node1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWNET = 0x00020000, 0x04000000, 0x40000000


@cache
def why_not() -> str:
    """Why there can be no hosts here; empty if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        subprocess.run(_in_namespace(f"lal{os.getpid()}try", "true"), check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return f"network namespaces do not work here: {error}"
    return ""


def _in_namespace(name: str, command: str) -> list[str]:
    add = f"ip netns add {name} && ip -n {name} link set lo up"
    script = f"{add} && ip netns exec {name} unshare --uts --mount {command}"
    return ["bash", "-c", f"trap 'ip netns del {name}' EXIT; {script}"]


@dataclass(frozen=True)
class Host:
    """A host: a network namespace, a name, and a file of other names.

    Args:
        space: name of the network namespace.
        name: its own.
        names: what it sees as ``/etc/hosts``.
    """

    space: str
    name: str
    names: Path

    @property
    def command(self) -> list[str]:
        """The start of a command line that runs the rest of it there."""
        enter = f'{self._take_names} && exec "$@"'
        return ["ip", "netns", "exec", self.space, "unshare", "--uts", "--mount", "bash", "-c", enter, "bash"]

    def enter(self) -> None:
        """Have this process, and all that it starts, be there from now on."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{self.space}") as space:
            if libc.setns(space.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
        if libc.unshare(_CLONE_NEWUTS | _CLONE_NEWNS) != 0:
            raise OSError(ctypes.get_errno(), "unshare")
        subprocess.run(["bash", "-c", f"mount --make-rprivate / && {self._take_names}"], check=True)

    @property
    def _take_names(self) -> str:
        return f"mount --bind {shlex.quote(str(self.names))} /etc/hosts && hostname {self.name}"


@contextmanager
def two_hosts(folder: Path) -> Iterator[list[Host]]:
    """Two hosts.

    Each resolves its own name to a loopback address, as Debian sets hosts up, and the other's to the real one.
    """
    spaces = [f"lal{os.getpid()}{letter}" for letter in "ab"]
    try:
        for space in spaces:
            _ip(f"netns add {space}")
        _ip(f"link add cable netns {spaces[0]} type veth peer name cable netns {spaces[1]}")
        for space, address in zip(spaces, ADDRESSES, strict=True):
            _ip(f"-n {space} addr add {address}/24 dev cable")
            _ip(f"-n {space} link set lo up")
            _ip(f"-n {space} link set cable up")
        yield [Host(space, NAMES[i], _write_names(folder, i)) for i, space in enumerate(spaces)]
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


def _write_names(folder: Path, index: int) -> Path:
    names = folder / f"hosts{index}"
    other = 1 - index
    names.write_text(f"127.0.0.1 localhost\n127.0.1.1 {NAMES[index]}\n{ADDRESSES[other]} {NAMES[other]}\n")
    return names


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True, text=True)


def alone() -> list[str]:
    """The start of a command line that runs the rest where no port is taken, if there can be such a place."""
    if why_not():
        return []
    return ["unshare", "--net", "bash", "-c", 'ip link set lo up && exec "$@"', "bash"]


def be_alone() -> None:
    """Have this process, and all that it starts, be where no port is taken, if there can be such a place."""
    if why_not():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    _ip("link set lo up")


def join(pid: int) -> None:
    """Have this process, and all that it starts, be where another process is."""
    own, others = Path("/proc/self/ns"), Path(f"/proc/{pid}/ns")
    if not own.exists():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    kinds = [kind for kind in ("uts", "net", "mnt") if not (own / kind).samefile(others / kind)]
    with ExitStack() as stack:
        for space in [stack.enter_context((others / kind).open()) for kind in kinds]:
            if libc.setns(space.fileno(), 0) != 0:
                raise OSError(ctypes.get_errno(), "setns")


def run_together(
    commands: list[list[str]], folder: Path, environment: Mapping[str, str], timeout: float = 300
) -> list[tuple[int, str]]:
    """Run several commands at once; returns exit code and output of each, with that of all processes they started.

    Those that outlive the time are killed, with all they have started.
    """

    def run(command: list[str]) -> tuple[int, str]:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        return process.returncode, output

    with ThreadPoolExecutor(len(commands)) as pool:
        return list(pool.map(run, commands))
