"""Training: Algorithm 1 of DDPM (arXiv:2006.11239), epoch after epoch, with Adam and averaged weights."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from common.data import random_hflip, random_seed, seed_everything, shuffled_batches, to_float
from common.diffusion import NoisePredictor, NoiseSchedule, diffusion_loss


@dataclass
class TrainingOptions:
    """Everything besides the model and the images that decides the trained weights."""

    epochs: int = 120
    batch_size: int = 128
    lr: float = 1e-3  # constant; DDPM's network of 36 million weights was trained with 2e-4
    ema_decay: float = 0.9999  # an upper limit, which runs of fewer than 90,000 steps do not reach
    hflip: bool = False
    seed: int = 0


@dataclass
class Progress:
    """How far training has got."""

    step: int = 0  # gradient steps made
    epoch: int = 0  # epochs completed
    seen: int = 0  # images already used in the epoch under way


class Trainer:
    """Trains a model, which is in train mode, to predict noise, on the device that the model is on."""

    def __init__(self, model: nn.Module, options: TrainingOptions):
        self.model = model
        self.options = options
        self.progress = Progress()
        self.device = next(model.parameters()).device
        self.schedule = NoiseSchedule().to(self.device)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, fused=True)  # in one kernel
        self.ema = AveragedWeights(model, options.ema_decay)
        self.predict_noise: NoisePredictor = model  # a wrapper of the model may take its place

    def steps(self, images: Tensor) -> Iterator[Tensor]:
        """Algorithm 1 on uint8 images (N, 3, 32, 32), until the epochs are done; yields the mean loss of each step."""
        options, progress = self.options, self.progress
        while progress.epoch < options.epochs:
            for batch in shuffled_batches(images, options.batch_size, options.seed, progress.epoch, progress.seen):
                seed_everything(random_seed(options.seed, "step", progress.step))  # a resumed training draws the same
                x0 = self.augment(batch)
                t = torch.randint(self.schedule.steps, (len(x0),), device=self.device)
                noise = torch.randn_like(x0)
                loss = self.gradient_step(x0, t, noise)
                self.ema.update(progress.step)
                progress.step += 1
                progress.seen += len(batch)
                if progress.seen + options.batch_size > len(images):  # too few are left for a batch
                    progress.epoch, progress.seen = progress.epoch + 1, 0
                yield loss  # all is counted by now, so a run that is saved here can resume from here

    def augment(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, 32, 32) as the model sees them: float32 in [-1, 1] and, if `hflip`, flipped at random."""
        x0 = to_float(images)
        return random_hflip(x0) if self.options.hflip else x0

    def gradient_step(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """One step of Adam on the batch's mean loss, which it returns."""
        self.optimizer.zero_grad()
        loss = diffusion_loss(self.predict_noise, self.schedule, x0, t, noise).mean()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class AveragedWeights:
    """An exponential moving average of a model's weights, to be updated after every step.

    After n updates the old average keeps the share (1 + n) / (10 + n), but at most `decay`. So it spans about the last
    tenth of the training so far: the random start is soon forgotten, and a short training profits too. The first update
    copies the weights. Buffers and frozen weights are always copied.

    torch's AveragedModel takes several times as long, and makes a GPU wait.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        self.model = model
        self.decay = decay
        pairs = [*zip(self.module.parameters(), model.parameters())]
        self._averaged = [averaged for averaged, weight in pairs if weight.requires_grad]
        self._current = [weight.detach() for _, weight in pairs if weight.requires_grad]
        self._frozen = [(averaged, weight) for averaged, weight in pairs if not weight.requires_grad]

    def update(self, n: int) -> None:
        """Averages in the model's weights as they are now, after `n` updates."""
        decay = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        # averaged = decay * averaged + (1 - decay) * current, for all weights at once
        get_ema_multi_avg_fn(decay)(self._averaged, self._current, n)
        for frozen, weight in self._frozen:
            frozen.copy_(weight)
        buffers = dict(self.model.named_buffers())  # looked up each time: a model may put another in one's place
        for name, buffer in self.module.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])
