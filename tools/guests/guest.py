"""A running guest, driven from here step by step.

Owns qemu, its console's log, and the conversation with the agent. Not thread-safe: one thread talks
to a guest at a time; others may do as they like with this machine meanwhile.
"""

from __future__ import annotations

import base64
import contextlib
import inspect
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tools.guests import agent, cache
from tools.guests.content import HOST_ADDRESS, content
from tools.guests.forward import Forwarder

QEMU = "qemu-system-x86_64"
MEMORY_MIB = 1024
# An idle machine takes 4 to 7.
BOOT_SECONDS = 120.0
COMMAND_SECONDS = 60.0
# For the agent to end what has not ended in time, and for its answer.
_GRACE_SECONDS = 10.0
# Of a console on which nothing went wrong; else it is shown from there on.
_TAIL_LINES = 40
_TROUBLE = re.compile(r"Kernel panic|Oops|BUG:|general protection fault")

# An oops is a panic, a panic ends qemu: it cannot go unnoticed.
_KERNEL_OPTIONS = "console=ttyS0 quiet oops=panic panic=-1"

# A unix socket of this machine, or an address as the socket module has it.
HostSocket = Path | tuple[str, int]


class GuestError(Exception):
    """The guest did not boot, died or hangs, or a command in it did; with the console's tail."""


class Guest:
    """A Debian kernel under qemu with one processor, emulated, from construction to `close`.

    `files` puts files there (see `content`). `sockets` maps a unix socket of the guest to a server
    of this machine, which need not run yet. `terminal` puts the console on this process's terminal.
    Raises UnavailableError if qemu or the kernel is not there; with `fetch` it is fetched.
    """

    def __init__(
        self,
        kernel: str = "bookworm",
        *,
        memory_mib: int = MEMORY_MIB,
        files: Mapping[str, Path | bytes] | None = None,
        sockets: Mapping[str, HostSocket] | None = None,
        terminal: bool = False,
        fetch: bool = False,
    ) -> None:
        if shutil.which(QEMU) is None:
            raise cache.UnavailableError(f"not installed: {QEMU}")
        self._kernel = cache.kernel(kernel, fetch=fetch)
        archives = [self._kernel.modules, cache.programs(fetch=fetch)]
        self._directory = Path(tempfile.mkdtemp(prefix="guest-"))
        self._forwarders: list[Forwarder] = []
        self._channel, far = socket.socketpair()
        self._received = b""
        self._process: subprocess.Popen[bytes] | None = None
        try:
            with far, (self._directory / "initrd").open("wb") as initrd:
                for archive in archives:
                    with archive.open("rb") as part:
                        shutil.copyfileobj(part, initrd, 1 << 20)
                initrd.write(content(files or {}))
                initrd.flush()
                command = self._command(far.fileno(), memory_mib, terminal)
                self._process = self._start(command, far.fileno(), terminal)
            self.release: str = self._receive(BOOT_SECONDS)["release"]
            (self._directory / "initrd").unlink()
            for path, target in (sockets or {}).items():
                self._connect(path, target)
        except BaseException:
            self.close()
            raise

    def _command(self, channel: int, memory_mib: int, terminal: bool) -> list[str]:
        log = f"logfile={self._directory / 'console'}"
        console = f"stdio,id=console,signal=off,{log}" if terminal else f"null,id=console,{log}"
        return [
            *(QEMU, "-accel", "tcg", "-smp", "1", "-m", str(memory_mib)),
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
            *("-kernel", str(self._kernel.vmlinuz), "-initrd", str(self._directory / "initrd")),
            *("-append", _KERNEL_OPTIONS),
            *("-nic", "user,model=virtio-net-pci"),
            *("-chardev", console, "-serial", "chardev:console"),
            *("-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,fd={channel}"),
            *("-device", f"virtserialport,chardev=agent,name={agent.PORT}"),
        ]

    def _start(self, command: list[str], channel: int, terminal: bool) -> subprocess.Popen[bytes]:
        stream = None if terminal else subprocess.DEVNULL
        with (self._directory / "qemu").open("wb") as errors:
            return subprocess.Popen(
                command, pass_fds=(channel,), stdin=stream, stdout=stream, stderr=errors
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the guest, as pulling the plug would. May be called again."""
        self._channel.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        for forwarder in self._forwarders:
            forwarder.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    # --- what it does ---

    def run(
        self, command: str | Sequence[str | Path], timeout: float | None = COMMAND_SECONDS
    ) -> subprocess.CompletedProcess[str]:
        """Run a command (text: by the shell) to its end, whatever status comes of it.

        Raises GuestError if it takes longer than `timeout` seconds; None waits for ever.
        """
        return self._run(command, timeout, terminal=False)

    def do(
        self, command: str | Sequence[str | Path], timeout: float | None = COMMAND_SECONDS
    ) -> str:
        """Run a command that must succeed; what it printed. Raises GuestError."""
        result = self.run(command, timeout)
        if result.returncode:
            raise GuestError(f"{_text(command)}: exit status {result.returncode}\n{result.stderr}")
        return result.stdout

    def interact(self, command: str | Sequence[str | Path]) -> int:
        """Run a command on the guest's console; its exit status. No time limit."""
        return self._run(command, None, terminal=True).returncode

    def python(
        self,
        function: Callable[..., Any] | str,
        *arguments: Any,
        timeout: float | None = COMMAND_SECONDS,
    ) -> Any:
        """Call a function in the guest, in a process of its own; arguments and result are JSON.

        A function of a module that the guest has is called there; of any other its source goes
        over, so it imports what it needs itself. Text is source that defines `main`. Raises
        GuestError with the guest's traceback, or after `timeout` seconds.
        """
        request: dict[str, Any]
        if isinstance(function, str):
            request = {"module": "", "name": "main", "source": function}
        else:
            source = textwrap.dedent(inspect.getsource(function))
            # What is the main program here is another there.
            module = "" if function.__module__ == "__main__" else function.__module__
            request = {"module": module, "name": function.__qualname__, "source": source}
        request |= {"op": "python", "args": arguments, "timeout": timeout}
        answer = self._ask(request, timeout)
        if "result" not in answer:
            raise self._failure(f"{request['name']}: no end after {timeout} s, or killed")
        return answer["result"]

    def write(self, path: str, data: bytes, *, executable: bool = False) -> None:
        """Write a file in the guest, with the directories above it."""
        text = base64.b64encode(data).decode()
        mode = 0o755 if executable else 0o644
        request = {"op": "write", "path": path, "data": text, "mode": mode}
        self._ask(request, COMMAND_SECONDS)

    def console(self) -> str:
        """What the kernel and the start script have printed so far."""
        log = self._directory / "console"
        return log.read_text(errors="replace") if log.exists() else ""

    # --- how ---

    def _run(
        self, command: str | Sequence[str | Path], timeout: float | None, *, terminal: bool
    ) -> subprocess.CompletedProcess[str]:
        argv = command if isinstance(command, str) else [os.fspath(word) for word in command]
        request = {"op": "run", "command": argv, "timeout": timeout, "terminal": terminal}
        answer = self._ask(request, timeout)
        output = (answer["stdout"], answer["stderr"])
        if answer["status"] is None:
            printed = "".join(output)
            raise self._failure(f"{_text(command)}: no end after {timeout} s\n{printed}")
        return subprocess.CompletedProcess(argv, answer["status"], *output)

    def _connect(self, path: str, target: HostSocket) -> None:
        """Make a unix socket of the guest lead to a server of this machine."""
        if isinstance(target, Path):
            forwarder = Forwarder(target)
            self._forwarders.append(forwarder)
            target = ("127.0.0.1", forwarder.port)
        host, port = target
        address = HOST_ADDRESS if host in {"127.0.0.1", "localhost"} else host
        self.do(["mkdir", "-p", str(Path(path).parent)])
        listen = shlex.quote(f"UNIX-LISTEN:{path},fork")
        self.do(
            f"socat -b 262144 {listen} TCP:{address}:{port},nodelay &"
            f"until [ -S {shlex.quote(path)} ]; do sleep 0.05; done"
        )

    def _ask(self, request: Mapping[str, Any], timeout: float | None) -> dict[str, Any]:
        try:
            self._channel.settimeout(None if timeout is None else _GRACE_SECONDS)
            self._channel.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise self._failure(f"the guest is gone ({error.strerror})") from None
        answer = self._receive(None if timeout is None else timeout + _GRACE_SECONDS)
        if "error" in answer:
            raise GuestError(f"in the guest: {answer['error']}")
        return answer

    def _receive(self, timeout: float | None) -> dict[str, Any]:
        """The agent's next message. After a failure the guest is of no more use."""
        deadline = None if timeout is None else time.monotonic() + timeout
        parts = [self._received]
        while b"\n" not in parts[-1]:
            left = None if deadline is None else deadline - time.monotonic()
            part = b""
            with contextlib.suppress(OSError):  # qemu died with unread requests
                if left is not None and left <= 0:
                    raise self._failure(f"the guest does not answer ({timeout:.0f} s)")
                self._channel.settimeout(left)
                try:
                    part = self._channel.recv(1 << 20)
                except TimeoutError:
                    continue
            if not part:
                raise self._failure("the guest has ended")
            parts.append(part)
        line, _, self._received = b"".join(parts).partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failure(self, what: str) -> GuestError:
        qemu = self._directory / "qemu"
        said = qemu.read_text(errors="replace") if qemu.exists() else ""
        lines = self.console().splitlines()
        trouble = [at for at, line in enumerate(lines) if _TROUBLE.search(line)]
        tail = lines[min(trouble, default=-_TAIL_LINES) :]
        return GuestError("\n".join([f"{self._kernel.suite}: {what}", *said.splitlines(), *tail]))


def _text(command: str | Sequence[str | Path]) -> str:
    return command if isinstance(command, str) else shlex.join(os.fspath(word) for word in command)
