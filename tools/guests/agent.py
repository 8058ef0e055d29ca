"""Runs in the guest: does what the host asks for over a virtio-serial port, one thing at a time.

A message is one line of JSON. A request has `op` and what that needs, its answer either the results
or `error`; bytes of text that are no UTF-8 are lone surrogates, as `os.fsdecode` makes them. A
command's output goes to memory files, so that what it leaves running in the background holds up
nothing. Python functions run in a child process: one that hangs costs the host its timeout, not the
guest.

The guest ends with its host: when the port is closed, so is this.
"""

import base64
import contextlib
import importlib
import json
import os
import signal
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

PORT = "agent"
Message = dict[str, Any]
# A process that does not die of SIGKILL waits in the kernel, and is left there.
_KILL_SECONDS = 1.0


def run(request: Message) -> Message:
    """Run a command to its end: an argument list, or text for the shell."""
    command = request["command"]
    argv = ["sh", "-c", command] if isinstance(command, str) else command
    with _memory_file() as stdout, _memory_file() as stderr:
        try:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL if not request["terminal"] else None,
                stdout=stdout if not request["terminal"] else None,
                stderr=stderr if not request["terminal"] else None,
                start_new_session=True,
            )
        except OSError as error:
            return {"status": 127, "stdout": "", "stderr": f"{argv[0]}: {error.strerror}\n"}
        status = _wait(process, request["timeout"])
        return {"status": status, "stdout": _content(stdout), "stderr": _content(stderr)}


def _memory_file() -> BinaryIO:
    return os.fdopen(os.memfd_create("output"), "w+b")


def _content(file: BinaryIO) -> str:
    size = os.fstat(file.fileno()).st_size
    return os.fsdecode(os.pread(file.fileno(), size, 0))


def _wait(process: subprocess.Popen[bytes], timeout: float | None) -> int | None:
    """The exit status; None when there was none in time, and all the command started is killed."""
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_KILL_SECONDS)
        return None


def python(request: Message) -> Message:
    """Call a function in a process of its own; JSON in, JSON out."""
    source, target = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(source)
        with os.fdopen(target, "w") as stream:
            stream.write(json.dumps(_call(request)))
            stream.flush()
            os._exit(0)
    os.close(target)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, request["timeout"] or 0)
    try:
        with os.fdopen(source) as stream:
            answer = stream.read()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.waitpid(child, 0)
    result: Message = json.loads(answer) if answer else {"status": None}
    return result


def _call(request: Message) -> Message:
    try:
        return {"result": _function(request)(*request["args"])}
    except BaseException:
        return {"error": traceback.format_exc()}


def _function(request: Message) -> Callable[..., Any]:
    """The function by name where the guest has its module, else made from its source."""
    if request["module"]:
        with contextlib.suppress(ImportError):
            function = getattr(importlib.import_module(request["module"]), request["name"])
            return cast(Callable[..., Any], function)
    space: dict[str, Any] = {"__name__": "guest"}
    exec(compile(request["source"], request["name"], "exec"), space)
    return cast(Callable[..., Any], space[request["name"]])


def write(request: Message) -> Message:
    """Write a file, with the directories above it."""
    path = Path(request["path"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(base64.b64decode(request["data"]))
    path.chmod(request["mode"])
    return {}


def _port() -> Path:
    for name in Path("/sys/class/virtio-ports").glob("*/name"):
        if name.read_text().strip() == PORT:
            return Path("/dev") / name.parent.name
    raise SystemExit(f"no virtio-serial port named {PORT}")


def main() -> None:
    """Answer requests until the host is gone."""
    operations = {"run": run, "python": python, "write": write}
    port = os.open(_port(), os.O_RDWR | os.O_CLOEXEC)
    with os.fdopen(port, "rb", closefd=False) as requests, os.fdopen(port, "wb") as answers:

        def answer(message: Message) -> None:
            answers.write(json.dumps(message).encode() + b"\n")
            answers.flush()

        answer({"release": os.uname().release})
        for line in requests:
            request = json.loads(line)
            try:
                message = operations[request["op"]](request)
            except Exception:
                message = {"error": traceback.format_exc()}
            answer(message)


if __name__ == "__main__":
    main()
