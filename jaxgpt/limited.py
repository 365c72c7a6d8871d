"""What somebody else wrote, worked on in a process of its own whose time and memory the kernel limits.

Neither `10 ** (10 ** 8)` in a chat template nor `((a{1000}){1000}){1000}` as a regular expression heeds a signal."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def in_process(function: Callable[..., Any], seconds: int, **arguments: Any) -> Any:
    """What a function of a module that imports no JAX (60 ms) returns; arguments and result are JSON's. It calls
    `limit(seconds, ...)` itself, when it has all that it needs. Raises ValueError, saying why, when there is no end."""
    path = [str(Path(__file__).parents[1]), *filter(None, sys.path)]  # also where this package is not installed
    program = "import json, sys; asked = json.load(sys.stdin); sys.path[:] = asked['path']; "
    program += f"from {function.__module__} import {function.__name__} as function; "
    program += "json.dump(function(**asked['arguments']), sys.stdout)"
    request = json.dumps({"path": path, "arguments": arguments}).encode()
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # NumPy's each take 32 MB of the address space
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], input=request, capture_output=True, env=env)
    if done.returncode == -signal.SIGXCPU:
        raise ValueError(f"it computes for more than {seconds} s")
    if done.returncode:
        raise ValueError(f"it ended the process that ran it, with status {done.returncode}")
    return json.loads(done.stdout)


def limit(seconds: int, memory: int) -> None:
    """From here on no file can be opened, and there are `seconds` of computing and `memory` bytes of address space."""
    import resource

    limits = (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory)
    for name, most in (*limits, (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NOFILE, 0)):
        with contextlib.suppress(OSError, ValueError):  # macOS has no RLIMIT_AS
            resource.setrlimit(name, (most, most + 1))  # at the hard limit of CPU time SIGKILL would hide SIGXCPU
