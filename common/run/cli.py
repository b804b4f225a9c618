"""The entry of every script: reads the command line, runs the command, and turns what goes wrong into one line."""

import argparse
import atexit
import io
import sys
from collections.abc import Sequence
from typing import NoReturn

from common.run import distributed
from common.run.device import is_out_of_memory, keep_freed_memory
from common.run.errors import UsageError, UserError, drop_what_nobody_takes, printable, tell
from common.run.evaluate import evaluate
from common.run.options import Stage, parse
from common.run.test import test
from common.run.train import train


def main(stage: Stage, argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a stage's command line and exits: with 2 if the command line is wrong, with 1 if anything else is."""
    atexit.register(drop_what_nobody_takes)
    options = None
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a console that lacks a letter is no reason to stop
    try:
        options, typed = parse(stage, argv)
        command = {"train": train, "test": test, "eval": evaluate}[options.command]
        keep_freed_memory()
        distributed.start()
        status = command(stage, options, typed)
        distributed.stop()
        sys.exit(status)
    except UserError as error:
        message, status = str(error), error.exit_status
    except argparse.ArgumentError as error:  # of a stage of one's own: an option that there is already, say
        message, status = str(error), UsageError.exit_status
    except OSError as error:  # a full disk, say, or a folder that may not be written to
        where = error.filename or getattr(options, "run_dir", "the current folder")
        message, status = f"{where}: {error.strerror or error}", 1
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            message = "out of memory; try a smaller --batch-size, or a smaller model"
        elif distributed.is_lost_connection(error):
            message = "another process of this run has ended, or cannot be reached"
        else:
            raise
        status = 1
    who = f"rank {distributed.RANK}: " if distributed.WORLD_SIZE > 1 else ""
    tell(f"{stage.name}.py: {who}error: {printable(message)}")
    distributed.exit_after_error(status)
