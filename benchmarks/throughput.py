"""How fast the stages train and sample, against the plain loop that a tutorial would write.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --stages A G --device cpu --data-dir data

Plain is the same model in fp32, eager, with a DataLoader over PIL images, Adam and `.item()` each step. Ours is what
`part_*.py` does by default, or with the --precision and --compile given here. Each is a process of its own, and they
take turns of a few seconds, so that what disturbs the machine disturbs both. Sampling is timed over a part of the 1000
steps, which all do the same work, and scaled.
"""

import argparse
import importlib
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.diffusion import NoisePredictor, NoiseSchedule, ddpm
from common.run.checkpoint import RunOptions
from common.run.datasets import IMAGE_SHAPE, load_cifar10, load_images
from common.run.device import (
    DTYPES,
    compile_model,
    compiles_training,
    in_precision,
    keep_freed_memory,
    pick_device,
    pick_precision,
)
from common.run.errors import UserError
from common.run.options import whole_number
from common.run.trainer import Run

STAGES = {
    "A": "part_a_cifar",
    "B": "part_b_cifar_more_channels",
    "C": "part_c_cifar_silu",
    "D": "part_d_cifar_arch",
    "E": "part_e_cifar_deeper",
    "F": "part_f_cifar_hflips",
    "G": "part_g_cifar",
}
FLIPPED = ("F", "G")
BATCH_SIZE = 128
SAMPLED = 64  # images drawn at a time
SCHEDULE_STEPS = 1000


# What is timed: each of these generators does one step each time it is asked for the next


def plain_training(stage: str, device: torch.device, data_dir: Path) -> Iterator[None]:
    model = new_model(stage).to(device)
    flip = [transforms.RandomHorizontalFlip()] if stage in FLIPPED else []
    transform = transforms.Compose([*flip, transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
    data = load_cifar10(data_dir)
    data.transform = transform
    loader = DataLoader(data, batch_size=BATCH_SIZE, shuffle=True)
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, SCHEDULE_STEPS)).cumprod(0).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    total = 0.0
    while True:
        for images, _ in loader:
            x0 = images.to(device)
            t = torch.randint(SCHEDULE_STEPS, (len(x0),), device=device)
            noise = torch.randn_like(x0)
            a = alpha_bar[t][:, None, None, None]
            loss = F.mse_loss(model(a.sqrt() * x0 + (1 - a).sqrt() * noise, t), noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
            yield


def our_training(stage: str, device: torch.device, data_dir: Path, precision: str, compile: bool) -> Iterator[Any]:
    model = new_model(stage).to(device)
    run = Run(stage, {}, model, RunOptions(epochs=10**9, batch_size=BATCH_SIZE, hflip=stage in FLIPPED), precision)
    if compile:
        compile_model(model, BATCH_SIZE, precision, training=True)
    yield from run.steps(load_images("cifar10", data_dir).to(device))


def sampling(stage: str, device: torch.device, precision: str, compile: bool, ours: bool) -> Iterator[Any]:
    model = new_model(stage).to(device).eval()
    if compile:
        compile_model(model, SAMPLED, precision)
    predict_noise: NoisePredictor = in_precision(model, precision) if ours else model
    while True:
        noise = torch.randn(SAMPLED, *IMAGE_SHAPE, device=device)
        yield from ddpm(predict_noise, NoiseSchedule().to(device), noise, torch.Generator(device))


def new_model(stage: str) -> nn.Module:
    return importlib.import_module(STAGES[stage]).Model()


# What each of the two processes does when it is asked, and what it keeps in between

ours: bool
options: argparse.Namespace
device: torch.device
precision: str
steps: Iterator[Any]


def start(*arguments: Any) -> None:
    global ours, options, device, precision
    ours, options = arguments
    device = pick_device(options.device)
    precision = pick_precision(options.precision if ours else "fp32", device)
    if ours:
        keep_freed_memory()


def begin(stage: str, what: str) -> float:
    """Takes the first step of a training or a sampling. Returns the seconds."""
    global steps
    if what == "sample":
        steps = sampling(stage, device, precision, ours and options.compiled["sample"], ours)
    elif ours:
        steps = our_training(stage, device, options.data_dir, precision, options.compiled["train"])
    else:
        steps = plain_training(stage, device, options.data_dir)
    return advance(1)


def advance(count: int) -> float:
    """Takes so many steps. Returns the seconds."""
    synchronize()
    started = time.perf_counter()
    for _ in range(count):
        next(steps)
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def peak_memory() -> float:
    """The most memory that tensors took on the GPU, or the whole process on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # here, for Windows has none, and other scripts import this one

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def matmul_flops() -> float:
    """Operations per second of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).to(DTYPES[precision])
    seconds = []
    for _ in range(13):
        synchronize()
        started = time.perf_counter()
        torch.mm(a, b)
        synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / statistics.median(seconds[3:])


# The measurement


def measure(stage: str, options: argparse.Namespace, bar: tqdm) -> dict[str, Any]:
    """One stage's numbers. Rates are medians over the turns, ratios medians over the ratios of neighbouring turns."""
    row: dict[str, Any] = {"stage": stage}
    peaks: dict[str, list[float]] = {"plain": [], "ours": []}
    with ExitStack() as stack:
        context = multiprocessing.get_context("spawn")
        workers = [
            stack.enter_context(ProcessPoolExecutor(1, context, initializer=start, initargs=(ours, options)))
            for ours in (False, True)
        ]

        def ask(what: Callable[..., float], *arguments: Any) -> list[float]:
            """What each of the two answers, one after the other."""
            return [worker.submit(what, *arguments).result() for worker in workers]

        for what, images_per_step in (("train", BATCH_SIZE), ("sample", SAMPLED / SCHEDULE_STEPS)):
            bar.set_description(f"{stage} {what}")
            first_step = ask(begin, stage, what)
            ask(advance, 5)  # a GPU's first steps are not like the others
            lengths = [max(1, round(options.seconds / seconds)) for seconds in ask(advance, 1)]
            if what == "train":  # before the matrix products, which take memory too
                row["peak_memory"] = dict(zip(peaks, ask(peak_memory)))
            rates: list[list[float]] = []
            for _ in range(options.repeats):
                rates.append([n * images_per_step / w.submit(advance, n).result() for n, w in zip(lengths, workers)])
                for name, flops in zip(peaks, ask(matmul_flops)):
                    peaks[name].append(flops)
                bar.update()
            row[what] = {
                "plain": statistics.median(r[0] for r in rates),
                "ours": statistics.median(r[1] for r in rates),
                "ratio": statistics.median(r[1] / r[0] for r in rates),
                "flops_per_image": flops_per_image(stage, what),
                "first_step_seconds": dict(zip(peaks, first_step)),
            }
    for name in peaks:
        peak = statistics.median(peaks[name])
        for what in ("train", "sample"):
            row[what][f"{name}_share_of_peak"] = row[what][name] * row[what]["flops_per_image"] / peak
    return row


def flops_per_image(stage: str, what: str) -> float:
    """Of one training step, or of the 1000 steps that draw an image."""
    model = new_model(stage)
    batch = 2
    x, t = torch.randn(batch, *IMAGE_SHAPE), torch.zeros(batch, dtype=torch.int64)
    # The counter knows attention's products in this form, not in that of the CPU's fused kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        if what == "train":
            model(x, t).sum().backward()
            return counter.get_total_flops() / batch
        with torch.no_grad():
            model(x, t)
        return counter.get_total_flops() / batch * SCHEDULE_STEPS


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()}"


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| stage | train: plain | ours | ratio | sample: plain | ours | ratio | GiB: plain | ours | first step, s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["stage"]]
        for what, digits in (("train", 0), ("sample", 2)):
            for name in ("plain", "ours"):
                cells.append(f"{row[what][name]:.{digits}f} ({row[what][f'{name}_share_of_peak']:.0%})")
            cells.append(f"{row[what]['ratio']:.2f}")
        cells += [f"{row['peak_memory'][name]:.1f}" for name in ("plain", "ours")]
        cells.append(f"{row['train']['first_step_seconds']['ours']:.1f}")
        print("|", " | ".join(cells), "|")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all seven")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("auto", *DTYPES), default="auto", help="ours; plain is fp32")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="ours (default: as part_*.py does)")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder that keeps CIFAR-10")
    parser.add_argument("--repeats", type=whole_number(1), default=5, help="turns that each of the two takes")
    parser.add_argument("--seconds", type=whole_number(1), default=5, help="about how long a turn is")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # after which the processes are stopped too
    try:
        device = pick_device(options.device)
        load_images("cifar10", options.data_dir)
    except UserError as error:
        sys.exit(f"throughput.py: error: {error}")

    precision = pick_precision(options.precision, device)
    options.compiled = {
        "train": compiles_training(options.compile, device, precision),
        "sample": bool(options.compile),
    }
    with tqdm(total=2 * options.repeats * len(options.stages), unit=" turns", disable=None) as bar:
        rows = [measure(stage, options, bar) for stage in options.stages]
    compiled = " and ".join(what for what, value in options.compiled.items() if value) or "nothing"
    print(f"{machine(device)}; torch {torch.__version__}; batch {BATCH_SIZE}")
    print(f"plain in fp32; ours in {precision}, compiled: {compiled}")
    print("images/s, medians of", options.repeats, "turns; share of the machine's own matmul in brackets\n")
    print_table(rows)


if __name__ == "__main__":
    main()
