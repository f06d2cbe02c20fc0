"""Runs code as ``python -c`` would, for tests of what is imported first.

Nearly all the time that ``import lightning`` takes is that of torch's and torchmetrics' modules. Each code is run by a
fork of a process that has imported those, but neither Lightning nor this package.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

_SERVER = """
import json, os, sys, traceback
import torch._dynamo, torch.distributed.fsdp, torchmetrics

ours = ("lightning", "pytorch_lightning", "lightning_fabric", "lightning_async_localsgd", "tests")
assert not set(ours) & set(sys.modules), sys.modules.keys()
for line in sys.stdin:
    code, output = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            main = sys.modules["__main__"] = type(sys)("__main__")
            exec(code, vars(main))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def _server() -> tuple[IO[str], IO[str]]:
    """It ends with this process, which its standard input comes from."""
    command = [sys.executable, "-c", _SERVER]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout


def run(code: str) -> tuple[int, str]:
    """Run code; returns the exit code and what was printed, with the traceback of an exception."""
    requests, answers = _server()
    with TemporaryDirectory() as folder:
        output = Path(folder, "output")
        requests.write(json.dumps([code, str(output)]) + "\n")
        requests.flush()
        exitcode = int(answers.readline())
        return exitcode, output.read_text()
