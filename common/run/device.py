"""What the machine can do: which device and precision, memory, compilation."""

import copy
import ctypes
import sys
import warnings
from contextlib import suppress

import torch
from torch import Tensor, nn

from common.diffusion import NoisePredictor
from common.run import distributed
from common.run.datasets import IMAGE_SHAPE
from common.run.errors import UsageError, UserError, tell, warn

NO_GPU = "this machine, or this build of PyTorch, has no cuda"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of the model's arithmetic


def pick_device(name: str) -> torch.device:
    """The device that --device names; of several GPUs, the one of this process.

    Raises:
        UsageError: the machine does not have it, or this build of PyTorch cannot use it.
    """
    reason = _why_no_gpu() if name in ("auto", "cuda") else ""
    if name == "auto" and reason:
        if reason != NO_GPU:
            warn(f"going on without the GPU: {reason}")
        name = "mps" if torch.backends.mps.is_available() and distributed.WORLD_SIZE == 1 else "cpu"
    if name == "cuda" and reason:
        raise UsageError(f"argument --device: {reason}; try --device auto")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UsageError("argument --device: this machine, or this build of PyTorch, has no mps; try --device auto")
    if name == "mps" and distributed.WORLD_SIZE > 1:
        raise UsageError("argument --device: several processes cannot share mps; give cpu, or start one process")
    if name in ("cpu", "mps"):
        return torch.device(name)
    torch.cuda.set_device(distributed.LOCAL_RANK)
    torch.backends.cudnn.benchmark = True  # shapes do not change, so trying all algorithms once pays
    torch.backends.cudnn.allow_tf32 = False  # fp32 is what it says
    return torch.device("cuda", distributed.LOCAL_RANK)


def _why_no_gpu() -> str:
    """Why this process has no GPU that computes; empty if it has one, which is tried."""
    with warnings.catch_warnings(record=True) as told:  # PyTorch warns of a driver that is too old
        warnings.simplefilter("always")
        if not torch.cuda.is_available():
            return " ".join(str(told[0].message).split()) if told else NO_GPU
        if torch.cuda.device_count() <= distributed.LOCAL_RANK:
            raise UsageError(
                "--nproc-per-node: each process needs a GPU of its own, and this machine has "
                f"{torch.cuda.device_count()}; start fewer processes, or give --device cpu"
            )
        try:
            torch.ones(1, device=torch.device("cuda", distributed.LOCAL_RANK)).add(1).item()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            gpu = f"{torch.cuda.get_device_name(distributed.LOCAL_RANK)} cannot be used by PyTorch {torch.__version__}"
            return f"{gpu} ({str(error).splitlines()[0]}); https://pytorch.org/get-started/locally lists other builds"
    return ""


def pick_precision(name: str, device: torch.device) -> str:
    """The precision that --precision names, one of DTYPES.

    "auto" is bf16 on GPUs and x86 CPUs that multiply in it, fp16 on GPUs that have tensor cores for no more than that,
    else fp32.
    """
    if name in DTYPES:
        return name
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16"
        has_tensor_cores = torch.cuda.get_device_capability(device) >= (7, 0)
        return "fp16" if has_tensor_cores and "GTX 16" not in torch.cuda.get_device_name(device) else "fp32"
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a model computes in that precision, where that is safe."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def in_precision(model: nn.Module, precision: str = "fp32") -> NoisePredictor:
    """The model, under autocast to that precision; what it returns is float32."""

    def predict_noise(xt: Tensor, t: Tensor) -> Tensor:
        with autocast(xt.device, precision):
            noise = model(xt.clone(), t.clone())  # it may change what it is given
        if not isinstance(noise, Tensor) or noise.shape != xt.shape or not noise.is_floating_point():
            found = f"{noise.dtype} {tuple(noise.shape)}" if isinstance(noise, Tensor) else type(noise).__name__
            raise UserError(
                f"the model must return noise like its images, floating-point {tuple(xt.shape)}; got {found}"
            )
        return noise.float()

    return predict_noise


def compiles_training(choice: bool | None, device: torch.device, precision: str) -> bool:
    """Whether to compile the model for training: as chosen, or, if nothing is (None), where it is known to pay.

    That is on GPUs, and in bf16 on CPUs with AMX, whose convolutions are so fast that what lies between them, which the
    compiler fuses, takes a good part of the time.
    """
    if choice is not None:
        return choice
    if device.type == "cuda":
        return True
    return device.type == "cpu" and precision == "bf16" and bool(torch.cpu.get_capabilities().get("amx_bf16"))


def keep_freed_memory() -> None:
    """Makes the C library keep large blocks that are freed, where it is glibc.

    By default it gives each large tensor back to the system and has the next one filled with zeros page by page, which
    on a CPU takes up to a third of a training step.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt:
        mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
        if mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25):  # which is the most for older versions
            mallopt(trim_threshold, 2**31 - 1)


def compile_model(model: nn.Module, batch_size: int, precision: str = "fp32", training: bool = False) -> None:
    """Compiles a model that predicts noise, in place, by running it, with a backward pass if it is for training.

    On a GPU it is also recorded as CUDA graphs, which saves the time of launching its kernels one by one; what it
    returns there is overwritten by the next call. Where that fails, for want of a C++ compiler, say, a warning tells
    so, and the model goes on as it is.
    """
    if distributed.RANK == 0:
        tell("compiling, which can take two minutes the first time")
    device = next(model.parameters()).device
    x = torch.zeros(batch_size, *IMAGE_SHAPE, device=device)
    t = torch.zeros(batch_size, dtype=torch.int64, device=device)
    state = copy.deepcopy(model.state_dict())  # of which running it may change the buffers
    buffers = [(module, dict(module._buffers)) for module in model.modules()]  # or put others in their place
    try:
        model.compile(dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None)
        with warnings.catch_warnings(), torch.set_grad_enabled(training):
            warnings.simplefilter("ignore")
            for _ in range(2 if device.type == "cuda" else 1):  # the second call records
                model.zero_grad()
                output = in_precision(model, precision)(x, t)
                if training:
                    output.mean().backward()
    except Exception as error:  # whatever it is, the model works without
        why = "Python's headers are missing, install python3-dev: " if "Python.h" in str(error) else ""
        warn(f"going on without compilation, which failed: {why}{type(error).__name__}: {error}")
        with suppress(Exception):  # where PyTorch refuses to compile at all, there is nothing to take back
            model.compile(disable=True)
    finally:
        model.zero_grad()
        for module, before in buffers:
            module._buffers.update(before)
        with suppress(RuntimeError):  # what running it has added cannot be taken back; Run.check tells of that
            model.load_state_dict(state)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the error says that a tensor did not fit into memory, of whichever device."""
    words = ["out of memory", "can't allocate memory", "invalid buffer size", "size calculation overflowed"]
    words += ["alloc_failed", "unable to find an engine"]  # of cuDNN and cuBLAS
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)
