"""What goes wrong: the exceptions that end a command with one line on stderr, and what never ends one."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class UserError(Exception):
    """Something its reader can mend. The message is one line: the option or file, what is wrong with it, what to do."""

    exit_status = 1


class UsageError(UserError):
    """The command line itself is wrong."""

    exit_status = 2


@contextmanager
def only_telling() -> Iterator[None]:
    """For a block that only tells of work that is done and saved: its failure is a warning, and never ends a run."""
    try:
        yield
    except Exception as error:  # of a log or a picture, there is no end of what can go wrong
        warn(f"going on without: {type(error).__name__}: {error}")


def warn(message: str) -> None:
    """Writes a warning of one line to stderr."""
    tell(f"warning: {printable(message)[:1000]}")


def printable(text: str) -> str:
    """A text on one line, without what could steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def tell(line: str) -> None:
    """Writes a line to stderr, if anybody reads it."""
    with suppress(AttributeError, OSError, ValueError):  # the first where there is none, for which print takes stdout
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def counted(number: int, noun: str) -> str:
    """For example "1 epoch", "5 epochs"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def say(message: str) -> None:
    """Writes a line to stdout. That its reader has left, as in `train | head -1`, is no reason to stop working."""
    try:
        print(message, flush=True)
    except (OSError, ValueError) as error:
        warn(f"stdout takes no more: {error}")


def drop_what_nobody_takes() -> None:
    """Call this last: what stdout and stderr still hold and cannot write would make Python exit with status 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            with suppress(AttributeError, OSError, ValueError):  # there is none, or it is closed
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
