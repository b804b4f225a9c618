"""Guidance: samples of a class that is asked for, by a network that never saw a label (arXiv:2105.05233, section 4).

A second network, the classifier, learns to predict the class y of a noisy image x_t. By Bayes' rule,

    log p(x_t | y) = log p(x_t) + log p(y | x_t) - log p(y),

and the predicted noise, divided by -sqrt(1 - alpha_bar), estimates the gradient of log p(x_t). So asking for a class
means subtracting sqrt(1 - alpha_bar) times the gradient of the classifier's log p(y | x_t) from the predicted noise.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.blocks import Downsample, PositionalEncoding, ResnetBlock, TimestepBlockSequential, group_norm
from common.diffusion import NoisePredictor, NoiseSchedule

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")  # of CIFAR-10


class Classifier(nn.Module):
    """Predicts the CIFAR-10 class of a noisy image: the left half of a U-Net, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(PositionalEncoding(32, 1000), nn.Linear(32, 128), nn.SiLU())
        self.blocks = TimestepBlockSequential(
            Downsample(3, 64),
            ResnetBlock(64, 64, embed_dim=128),  # (B, 64, 16, 16)
            Downsample(64, 128),
            ResnetBlock(128, 128, embed_dim=128),  # (B, 128, 8, 8)
            Downsample(128, 256),
            ResnetBlock(256, 256, embed_dim=128),  # (B, 256, 4, 4)
            group_norm(256),
            nn.SiLU(),
        )
        self.out = nn.Linear(256, len(CLASSES))

    def forward(self, xt: Tensor, t: Tensor) -> Tensor:
        """xt: noisy images (B, 3, 32, 32). t: their time steps, int64 (B,). Returns log p(y | x_t), (B, 10)."""
        return self.out(self.features(xt, t)).log_softmax(dim=1)

    def features(self, xt: Tensor, t: Tensor) -> Tensor:
        """The features from which the last layer predicts the class, (B, 256)."""
        return self.blocks(xt, self.embed(t)).mean(dim=(2, 3))


def guided(
    predict_noise: NoisePredictor,
    classifier: Callable[[Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    label: int,
    scale: float,
) -> NoisePredictor:
    """Turns `predict_noise` into one that steers the samples towards the class `label` (that paper's eq. 14).

    The paper uses this for DDIM. For DDPM it shifts each step's mean by scale * variance * gradient; this shifts it by
    scale * beta / sqrt(alpha) * gradient, nearly the same until the last steps, whose variance is far below beta.

    Args:
        classifier: x_t (B, C, H, W) and t (B,) -> log p(y | x_t) of each class y, as a Classifier computes it.
        label: the class, from 0 on; of a Classifier an index into CLASSES.
        scale: 1 is Bayes' rule; more makes the class clearer, and the samples more alike.
    """

    def predict_guided_noise(xt: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = xt.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(classifier(x, t)[:, label].sum(), x)  # of each image its own
        return predict_noise(xt, t) - scale * schedule.noise_scale[t, None, None, None] * gradient

    return predict_guided_noise
