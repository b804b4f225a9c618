"""What each process runs in test_distributed.py: a tiny training, and measures; what comes of it is left behind."""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from common.run import distributed
from common.run.checkpoint import RunOptions
from common.run.evaluate import measure_bound, measure_losses
from common.run.loop import train
from common.run.pictures import sample_images
from common.run.trainer import Run
from tests import tiny_run


def train_rank(folder: Path) -> None:
    """Three epochs of 50 images in batches of 12, so that two are left over."""
    torch.manual_seed(0)
    options = RunOptions(epochs=3, batch_size=12, hflip=True)
    network = tiny_run.Tiny()
    network.unused = nn.Parameter(torch.zeros(3))  # which never has a gradient
    trainer = Run(tiny_run.STAGE, {}, network, options)
    trainer.optimizer.param_groups[0]["eps"] = 1e-2  # or Adam makes much of rounding errors of gradients near zero
    held_out = torch.randint(256, (600, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    train(trainer, tiny_run.make_images(), held_out[:20], folder / "run", sample_every=0)

    shares = torch.zeros(3, dtype=torch.int64)  # how many images this process has put through the model, for what

    def model(xt: Tensor, t: Tensor) -> Tensor:
        shares[work] += len(xt)
        return 0.5 * xt

    work = 0
    losses = measure_losses(model, trainer.schedule, held_out)
    work = 1
    bound = measure_bound(model, trainer.schedule, held_out)
    work = 2
    sample_images(model, trainer.schedule, 6, steps=1, batch_size=2, spread=True)
    results = (trainer.model.state_dict(), trainer.progress.log, torch.stack([losses, *bound]), shares)
    torch.save(results, folder / f"rank{distributed.RANK}.pt")


def overflow_on_last_rank(folder: Path) -> None:
    """Three steps in fp16; in the second, the gradients of the last rank are too large."""
    run = tiny_run.make_trainer("fp16", batch_size=12)
    predict_noise = run.predict_noise

    def explode(xt: Tensor, t: Tensor) -> Tensor:
        noise = predict_noise(xt, t)
        if distributed.RANK == distributed.WORLD_SIZE - 1 and run.progress.step == 1:
            noise.register_hook(lambda gradient: gradient * torch.inf)
        return noise

    run.predict_noise = explode
    for _ in zip(range(3), run.steps(tiny_run.make_images())):
        run.check()
    torch.save(run.checkpoint(), folder / f"overflow{distributed.RANK}.pt")


if __name__ == "__main__":
    distributed.start()
    train_rank(Path(sys.argv[1]))
    overflow_on_last_rank(Path(sys.argv[1]))
    distributed.stop()
