"""The command ``python`` of ``tests.commands``; runs with the standard library alone, which starts in no time."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys


def main(python: str, place: str, *arguments: str) -> None:
    """Have the server in ``place`` run a script or a module; anything else is for the real interpreter."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-u", "-m")):
        os.execv(python, [python, *arguments])
    server = socket.socket(socket.AF_UNIX)
    server.connect(f"{place}/server")
    request = {
        "pid": os.getpid(),
        "executable": f"{place}/python",
        "arguments": arguments,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
    }
    socket.send_fds(server, [b"!"], [0, 1, 2])
    server.sendall(json.dumps(request).encode() + b"\n")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: server.sendall(bytes([number])))
    code = int(server.makefile().readline())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
