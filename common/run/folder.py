"""What lies in a run folder beside the checkpoint: the lock and log.csv."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from common.run.checkpoint import LOG_COLUMNS, atomic_write
from common.run.errors import UsageError, warn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MARK = ".run.lock"  # where it lies, a run was begun, and files named as in RUN_FILES are ours
SAMPLE_NAME = re.compile(r"data|epoch-\d{4,}")
RUN_FILES = ("checkpoint.pt", "log.csv", "samples.png", "eval.json", "samples")


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Makes the folder, and keeps other processes from training in it for as long as this one lives.

    The lock goes with the process, whatever ends it.

    Raises:
        UsageError: another process is training there.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / MARK, "ab") as file:
        try:
            _lock(file, wait=False)
        except BlockingIOError as error:
            raise UsageError(
                f"--run-dir {run_dir}: another process is training there; wait for its end, or name another folder"
            ) from error
        for name in ("checkpoint.pt", "log.csv"):
            for left_by_a_death in run_dir.glob(f".{name}.[0-9]*.tmp"):
                left_by_a_death.unlink()
        yield


@contextmanager
def one_at_a_time(data_dir: Path) -> Iterator[None]:
    """Lets one process after the other prepare a data set, where its folder takes a lock."""
    with suppress(OSError):
        data_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with suppress(OSError):
            _lock(held.enter_context(open(data_dir / ".data.lock", "ab")), wait=True)
        yield


def _lock(file: IO[bytes], wait: bool) -> None:
    """Takes the file's lock, or raises BlockingIOError. Windows, and file systems without locks, go without."""
    if not fcntl:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise
        warn(f"waiting for another process, which has {file.name} locked")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        pass


def remove_run(run_dir: Path) -> None:
    """Deletes what a run writes, file by file, but for the checkpoint, which the next run's first one replaces."""
    samples = run_dir / "samples"
    drawn = [] if samples.is_symlink() else [path for path in samples.glob("*.png") if SAMPLE_NAME.fullmatch(path.stem)]
    for path in [*(run_dir / name for name in RUN_FILES if name != "checkpoint.pt"), *drawn]:
        if path.is_file():
            path.unlink()


def write_log(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a log.csv anew, a row an epoch, so that no interruption leaves half a row, or one twice."""
    lines = [LOG_COLUMNS, *([row[name] for name in LOG_COLUMNS] for row in rows)]
    with atomic_write(path) as file:
        file.write("".join(",".join(map(str, line)) + "\n" for line in lines).encode())
