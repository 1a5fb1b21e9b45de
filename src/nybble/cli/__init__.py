"""The command line: one verb a file. The only place that prints, exits or downloads.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Errors are one line on standard error; `--debug` shows the
traceback. Tables go to standard output, progress to standard error, `--json` gives a machine-readable result.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, NoReturn

import typer

from nybble.cli.arguments import read
from nybble.errors import NybbleError, is_out_of_memory
from nybble.version import __version__

INTERRUPTED = 130
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""What a disk says that has no room, or does not write."""
Misuse: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
"""What typer raises for wrong arguments: its own class, or that of the click package, by its version."""

VERBS = (
    "compare",
    "report",
    "quantize",
    "convert",
    "methods",
    "formats",
    "plan",
    "inspect",
    "eval",
    "generate",
    "bench",
    "train",
    "prune",
)
"""Each is the module of its name, with NAME, HELP and run; `--help` lists them in this order."""


def make_app(verbs: Sequence[str] = VERBS) -> typer.Typer:
    """The command line with some of its verbs. Reading the options of all ten takes longer than printing a version."""
    app = typer.Typer(
        name="nybble",
        help="Make a language model small and fast on the machine you have, and prove what that cost.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name in verbs:
        verb = importlib.import_module(f"nybble.cli.{name}")
        app.command(verb.NAME, help=verb.HELP, epilog=None)(verb.run)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nybble {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass  # --debug is read in main(), which also covers errors before this is called


def main() -> NoReturn:
    """Run the command line; leaves with the exit code."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = _run(arguments)
        sys.stdout.flush()
        if code == INTERRUPTED:  # typer turned KeyboardInterrupt into this, silently
            raise KeyboardInterrupt
    except NybbleError as error:
        if debug:
            _show_traceback()
        code = _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = _fail("interrupted; no half-written output was left behind", INTERRUPTED)
    except Misuse as error:
        code = _fail(f"{error.format_message()} (nybble --help, or nybble VERB --help)", 2)  # type: ignore[attr-defined]
    except BrokenPipeError:  # `nybble plan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except Exception as error:
        if debug:
            _show_traceback()
        code = _fail(_unforeseen(error), 1)
    _leave(code if isinstance(code, int) else 0)


def _unforeseen(error: Exception) -> str:
    """What to say of an exception that nobody raised on purpose."""
    if is_out_of_memory(error):
        how = "quantize and convert stay within --memory, and take less with fewer --threads; shorter and fewer windows help all"
        return f"out of memory ({' '.join(str(error).split())[:200] or 'nothing more is known'}): {how}"
    if isinstance(error, OSError) and error.errno in DISK:
        return f"cannot write {error.filename or 'a file'}: {error.strerror}"
    name = type(error).__name__
    return f"internal error, please report it: {name}: {error} (nybble --debug ... shows the traceback)"


def _leave(code: int) -> NoReturn:
    """End the process. One of several that torchrun started goes at once: its communication threads may let go of a tensor
    while the interpreter is taken apart, and that aborts (pytorch/pytorch#190489)."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run(arguments: list[str]) -> object:
    """Carry a command line out. A plain one goes straight to its verb; typer takes 0.1 s to read it."""
    arguments = arguments or ["--help"]
    wanted = next((argument for argument in arguments if not argument.startswith("-")), "")
    if wanted not in VERBS:
        return make_app()(args=arguments, standalone_mode=False)
    run = importlib.import_module(f"nybble.cli.{wanted}").run
    values = read(run, arguments[1:]) if arguments[0] == wanted else None
    if values is None:
        return make_app([wanted])(args=arguments, standalone_mode=False)
    run(**values)
    return 0


def _show_traceback() -> None:
    import traceback  # a few milliseconds, for errors only

    traceback.print_exc()


def _fail(message: str, code: int) -> int:
    line = "".join(c if c.isprintable() else " " for c in " ".join(message.split()))
    print(f"nybble: error: {line}", file=sys.stderr, flush=True)
    return code


def _interrupt(_: int, __: FrameType | None) -> None:
    raise KeyboardInterrupt
