"""The command group and the entry point: from errors to one line and an exit status."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from dedupstore import __version__
from dedupstore.cli.context import Context
from dedupstore.cli.guard import run_guarded
from dedupstore.errors import DedupError, InterruptedByUserError
from dedupstore.location import default_store

# Which module of this package defines a command. Only the module that is needed is loaded: all of
# them take longer than most commands do.
_MODULES = {
    "attach": "mounting",
    "check": "maintenance",
    "clone": "images",
    "detach": "mounting",
    "diff": "images",
    "evict": "pulling",
    "export": "transfers",
    "gc": "maintenance",
    "import": "transfers",
    "info": "images",
    "init": "images",
    "ls": "images",
    "mount": "mounting",
    "prefetch": "pulling",
    "pull": "pulling",
    "push": "remotes",
    "reconnect": "mounting",
    "remote": "remotes",
    "rename": "images",
    "rm": "images",
    "serve": "serving",
    "stats": "maintenance",
    "sync": "syncing",
    "trace": "tracing",
    "umount": "mounting",
}


class _Commands(click.Group):
    """The group. Commands are loaded when they are asked for; an interrupt leaves it as one of our
    failures, before click prints about it."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Every command's name, in order."""
        return sorted(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The command of a name, None if there is none."""
        if cmd_name not in _MODULES:
            return None
        module = importlib.import_module(f"dedupstore.cli.{_MODULES[cmd_name]}")
        commands: tuple[click.Command, ...] = module.COMMANDS
        return next(command for command in commands if command.name == cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise InterruptedByUserError from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--store",
    type=click.Path(path_type=Path, readable=False),  # opening it says more than click would
    metavar="DIR",
    help="The store. Default: $DEDUPSTORE, else /var/lib/dedupstore for root, else "
    "$XDG_DATA_HOME/dedupstore.",
)
@click.version_option(__version__, prog_name="dedupstore")
@click.pass_context
def cli(context: click.Context, store: Path | None) -> None:
    """Deduplicating store for disk images, served as block devices that share one cache."""
    context.obj = Context((store or default_store(os.environ, os.getuid())).absolute())


def _run(arguments: list[str] | None) -> int:
    """Run a command; every expected failure becomes one line on standard error."""
    try:
        result: Any = cli.main(arguments, prog_name="dedupstore", standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        return _failed(str(InterruptedByUserError()), InterruptedByUserError.exit_status)
    except click.UsageError as error:
        error.show()
        return 2
    except click.ClickException as error:
        return _failed(error.format_message(), error.exit_code)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except DedupError as error:
        return _failed(str(error), error.exit_status)
    except BrokenPipeError:
        # Whoever read our output has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return result if isinstance(result, int) else 0


def _failed(message: str, status: int) -> int:
    line = message.replace("\n", "\\n")  # of a path
    click.echo(f"dedupstore: {line}", err=True)
    return status


def _lead_to_own_python() -> None:
    """If another Python's directory comes first on PATH, such as pyenv's or a container image's
    own, put that of the one that this runs on before it: the Python inside nbdkit takes its
    standard library from where the first `python3` is, and with another one's ends without a
    word."""
    own = Path(sys.base_prefix) / "bin"
    found = shutil.which("python3")
    if found is not None and Path(found).resolve().parent != own.resolve():
        os.environ["PATH"] = f"{own}{os.pathsep}{os.environ['PATH']}"


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `dedupstore` program."""
    _lead_to_own_python()
    sys.exit(run_guarded(lambda: _run(arguments)))
