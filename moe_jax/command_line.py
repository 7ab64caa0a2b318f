"""What the command lines of all packages share: commands with an example, overrides anywhere, exit statuses."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import itertools
import math
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from moe_jax.errors import INTERRUPTED, MISTAKEN, PREEMPTED, UNAVAILABLE, Preempted, UserError
from moe_jax.files import is_remote, location
from moe_jax.outages import is_denied, passes

# Not ENOENT: a file that the program itself should have made is a fault of ours, and keeps its traceback.
_BUCKETS = ("aiohttp", "gcsfs", "google")  # packages that raise what a bucket answers
_MENDABLE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "mend the access, or name another place"),
    **dict.fromkeys((errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG), "name another place"),
}


def make_parser(program: str, description: str, examples: str) -> tuple[argparse.ArgumentParser, Any]:
    """(parser, what `add_command` adds to) of `program`, as in `python -m moe_jax`."""
    parser = argparse.ArgumentParser(
        program, description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    return parser, parser.add_subparsers(required=True, metavar="COMMAND")


def add_command(
    commands: Any, name: str, command: Callable[[Any], Any], text: str, *examples: str, config: str = ""
) -> argparse.ArgumentParser:
    """Add `name`, which calls `command` with its options; the parser, for more of them.

    `examples` are what may stand behind the name. `config`, a help text, makes it take a config and overrides.
    """
    sub = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.epilog = "\n".join(["Example:", *(f"  {sub.prog} {example}".rstrip() for example in examples)])
    sub.set_defaults(command=command)
    if config:
        sub.add_argument("config", help=config)
        add_overrides(sub)
    return sub


def add_overrides(sub: argparse.ArgumentParser) -> None:
    """Let the command take `dotted.name=value` words."""
    sub.add_argument("overrides", nargs="*", help="dotted.name=value", metavar="OVERRIDE")


def at_least(least: float, kind: type[int] | type[float] = int) -> Callable[[str], Any]:
    """A type of option: a finite number from `least` on, for `add_argument`."""

    def parse_number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            whole = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {whole} of {least} or more")
        return value

    return parse_number


def seed(text: str) -> int:
    """A type of option: what random generators of all libraries take."""
    value = at_least(0)(text)
    if value >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not below 2**32")
    return value


def prompt(text: str) -> str:
    """A type of option: text for a tokenizer."""
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of a command line that are no UTF-8 come as halves of surrogate pairs
        raise argparse.ArgumentTypeError("the text is not UTF-8") from None
    return text


def top_p(text: str) -> float:
    """A type of option: a share of the probability, above 0 and at most 1."""
    value = at_least(0, float)(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and at most 1")
    return value


def add_json(sub: argparse.ArgumentParser) -> None:
    """Let the command write what it found."""
    sub.add_argument("--json", metavar="PATH", help="write the numbers here as well")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; overrides may stand before and after them, which argparse cannot say by itself."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale without the characters of a text must not end a command
            stream.reconfigure(errors="backslashreplace")
    arguments, rest = parser.parse_known_args(argv)
    words = [word for word in rest if not word.startswith("-") and "=" not in word]
    if (
        len(words) == 1 and getattr(arguments, "output", words) is None
    ):  # behind options argparse takes it for a stray
        arguments.output = words[0]
        rest.remove(words[0])
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    unknown = [word for word in rest if word not in overrides]
    if unknown or (overrides and not hasattr(arguments, "overrides")):
        dashed = [word.lstrip("-") for word in unknown if "=" in word] if hasattr(arguments, "overrides") else []
        if hasattr(arguments, "overrides") and not dashed:
            dashed = [f"{name.lstrip('-')}={value}" for name, value in itertools.pairwise(unknown)][:1]
        hint = f"; an option of the config is written {dashed[0]}" if dashed else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown or overrides)}{hint}")
    if overrides:
        arguments.overrides += overrides
    return arguments


def drop_output() -> None:
    """Write what comes and what is buffered to nowhere; else the interpreter's end would try once more and fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _sentence(error: Exception) -> str:
    """Cause and mend of what no code of ours could foresee; empty where it is a fault of ours."""
    if passes(error) or type(error).__module__.partition(".")[0] in _BUCKETS:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return f"a bucket cannot be reached ({reason}); check its name, the network and the access to it"
    if is_denied(error):
        return f"a bucket denies the access ({' '.join(str(error).split())[:300]}); grant it to the account in use"
    if not isinstance(error, OSError) or error.errno not in _MENDABLE:
        return ""
    where = ": ".join(filter(None, (error.filename2 or error.filename, error.strerror)))
    return f"{where}; {_MENDABLE[error.errno]}"


def heed_interrupts() -> None:
    """For programs: raise a signal again that fell into a callback of the garbage collector (JAX has one).

    Python drops what a signal's handler raises there, and Ctrl-C would have been in vain.
    """

    def dropped(what: Any) -> None:
        number = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}.get(what.exc_type)
        if number is None or signal.getsignal(number) is signal.SIG_DFL:
            sys.__unraisablehook__(what)
        else:
            again = threading.Timer(0.05, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()

    sys.unraisablehook = dropped


def _require_place(option: str, path: object) -> None:
    """UserError where no file of this name could be written."""
    if not isinstance(path, str) or is_remote(path):
        return
    file = Path(location(path))
    if file.is_dir():
        raise UserError(f"{path} is a folder; name another place for --{option}")
    if file.exists() and not file.is_file():  # a pipe or a device
        return
    above = next(folder for folder in file.resolve().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"nothing can be written in {above}; name another place for --{option}")


def leave(status: int) -> NoReturn:
    """End the process with a status of `guarded`.

    Interrupted, at once: threads of native code that still compute crash where Python takes itself down.
    """
    if status != INTERRUPTED:
        sys.exit(status)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(status)


def guarded(command: Callable[[Any], Any], arguments: Any) -> int:
    """Call a command; its exit status.

    What the user can mend becomes one sentence and MISTAKEN, what passes by itself UNAVAILABLE, a preemption
    PREEMPTED, Ctrl-C INTERRUPTED; the rest keeps its traceback.
    """
    try:
        for option in ("json", "profile"):  # told before minutes of work, not after them
            _require_place(option, getattr(arguments, option, None))
        status = command(arguments) or 0
        if status == 0 and sys.stdout:  # a daemon may have none
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        said, status = "interrupted", INTERRUPTED
    except BrokenPipeError:
        (poll := select.poll()).register(sys.stdout, 0)
        if not poll.poll(0):
            raise
        drop_output()  # its reader, `head` say, has what it wants
        return 141  # what a shell calls an end by SIGPIPE
    except UserError as error:
        said, status = f"error: {error}", MISTAKEN
        if passes(error):
            said, status = f"{said} (a bucket did not answer: the same command goes on)", UNAVAILABLE
    except Preempted as notice:
        said, status = f"preempted: {notice}", PREEMPTED
    except Exception as error:
        if not (sentence := _sentence(error)):
            raise
        said, status = f"error: {sentence}", UNAVAILABLE if passes(error) else MISTAKEN
    print(said, file=sys.stderr, flush=True)
    return status
