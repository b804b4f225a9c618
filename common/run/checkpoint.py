"""One file that holds everything a run needs to go on, written atomically."""

import io
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, TypedDict

import torch
from torch import Tensor, nn

from common.run.errors import UserError
from common.training import Progress, TrainingOptions

FORMAT = 3
READABLE = (2, 3)  # 2: there was no option --norm-groups; 1: the norms had other groups
LOG_COLUMNS = ("epoch", "step", "train_loss", "held_out_loss", "images_per_second", "seconds")


@dataclass
class RunOptions(TrainingOptions):
    """The training options that a checkpoint carries."""

    dataset: str = "cifar10"
    precision: str = "auto"  # or one of device.DTYPES, see device.pick_precision


@dataclass
class RunProgress(Progress):
    """How far a run has come, as a checkpoint carries it."""

    loss_sum: float = 0.0  # sum of the losses of the images seen in the epoch under way
    seconds: float = 0.0  # what those images took, without checkpoints and sample grids
    log: list[dict[str, Any]] = field(default_factory=list)  # the rows of log.csv, one per completed epoch


class Checkpoint(TypedDict):
    """What `checkpoint.pt` holds: tensors and plain Python values, so that `weights_only=True` loads it."""

    format: int  # FORMAT of the version that wrote it
    stage: str  # name of the script, without .py
    model_options: dict[str, Any]  # the stage's model options, as on the command line
    training_options: dict[str, Any]  # the fields of RunOptions
    progress: dict[str, Any]  # the fields of RunProgress
    model: dict[str, Tensor]  # state dict of the trained weights
    ema: dict[str, Tensor]  # state dict of the averaged weights
    optimizer: dict[int, Any]  # Adam's moments, of each parameter in turn; None where there never was a gradient
    scaler: dict[str, Any]  # state of the GradScaler of a run in fp16; otherwise empty


EMA_ONLY = ("format", "stage", "model_options", "training_options", "progress", "ema")  # what drawing takes


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Writes the checkpoint, or raises a UserError; until it is whole and on the disk, the one before stays."""
    packed = pack(path, checkpoint)
    with atomic_write(path) as file:
        file.write(packed.getbuffer())


def pack(path: Path, checkpoint: Checkpoint) -> io.BytesIO:
    """What `save` writes. Raises a UserError if it cannot be written, or `load` would refuse it."""
    try:
        packed = _packed(checkpoint)
        _unpack(packed, path, checkpoint["stage"])
    except (UserError, pickle.PicklingError, AttributeError, TypeError) as error:  # three of pickle's
        raise UserError(f"a checkpoint of this run could not be read again: {error}") from error
    return packed


def save_weights(path: Path, checkpoint: Checkpoint) -> None:
    """Writes what drawing from the averaged weights takes, and no more, in half precision."""
    half = {name: weight.half() if weight.is_floating_point() else weight for name, weight in checkpoint["ema"].items()}
    part = {key: value for key, value in checkpoint.items() if key in EMA_ONLY}
    with atomic_write(path) as file:
        file.write(_packed({**part, "ema": half}).getbuffer())


def _packed(contents: Any) -> io.BytesIO:
    packed = io.BytesIO()
    torch.save(contents, packed)  # not straight to the disk: of a full one torch.save does not say that it is full
    packed.seek(0)
    return packed


def load(path: Path, stage: str, ema_only: bool = False) -> Checkpoint:
    """Reads a checkpoint of the given stage into main memory, and checks that it is whole.

    Args:
        ema_only: be content with what `save_weights` leaves.

    Raises:
        UserError: there is none, it is damaged, or it belongs to another stage or to another version of the project.
    """
    if not path.is_file():
        raise UserError(f"{path}: no checkpoint there")
    return _unpack(io.BytesIO(path.read_bytes()), path, stage, ema_only)


def _unpack(file: io.BytesIO, path: Path, stage: str, ema_only: bool = False) -> Checkpoint:
    with reading(path), warnings.catch_warnings():
        if zipfile.ZipFile(file).testzip():
            raise ValueError("its checksums are wrong")
        file.seek(0)
        warnings.simplefilter("ignore")  # of foreign files torch says more than that it cannot load them
        contents = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(contents, dict) or "format" not in contents or "stage" not in contents:
        raise UserError(f"{path}: not a checkpoint of this project")
    if type(contents["format"]) is not int or contents["format"] not in READABLE:
        raise UserError(
            f"{path}: written in format {contents['format']}, but this version reads formats "
            f"{' and '.join(map(str, READABLE))}; train again, or use the version that wrote it"
        )
    if contents["stage"] != stage:
        raise UserError(f"{path}: a checkpoint of {contents['stage']}.py, not of {stage}.py")
    wanted = EMA_ONLY if ema_only else Checkpoint.__annotations__
    missing = {*wanted} - contents.keys() - {"scaler"}  # which older ones lack
    if missing:
        raise UserError(f"{path}: damaged: it lacks {', '.join(sorted(missing))}")
    with reading(path):  # what it lacks, being older, has its default
        contents["training_options"] = asdict(RunOptions(**contents["training_options"]))
        contents["progress"] = asdict(RunProgress(**contents["progress"]))
    return contents  # type: ignore[return-value]


def survives(value: Any) -> bool:
    """Whether a value comes back from a checkpoint as it is."""
    try:
        return not isinstance(value, Tensor) and bool(torch.load(_packed(value), weights_only=True) == value)
    except Exception:  # a function, say, or a file
        return False


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Fills a model with weights that come from a file.

    Raises:
        UserError: they are another model's, or not finite. (Buffers may hold what they like.)
    """
    with reading(path):
        sound = {name for name, parameter in model.named_parameters() if parameter.isfinite().all()}
        model.load_state_dict(weights)
        for name, parameter in model.named_parameters():
            if name in sound and not parameter.isfinite().all():  # a mask may be infinite from the start
                raise ValueError(f"{name} holds numbers that are not finite")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what unpacking a damaged or foreign checkpoint raises into a UserError that names the file."""
    try:
        yield
    except Exception as error:  # there is no end of what hostile bytes make a reader raise; torch's advice is left out
        if "out of memory" in str(error):  # of a GPU
            raise
        reason = "" if isinstance(error, pickle.UnpicklingError) else f": {' '.join(str(error).split())[:200]}"
        raise UserError(f"{path}: not a checkpoint of this project, or a damaged one{reason}") from error


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Opens a temporary file beside `path` and moves it there once it is written and on the disk.

    Whatever happens in between, `path` is the old file, whole, or the new one, whole. Its folder must exist.

    Raises:
        UserError: the disk is full, say, or the folder may not be written to or has vanished.
    """
    temporary = path.with_name(f".{path.name[:50]}.{os.getpid()}.tmp")  # short enough for any file system
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: not written ({error.strerror or error}); what was there is kept") from error
    finally:
        with suppress(OSError):  # it has been moved
            temporary.unlink()
