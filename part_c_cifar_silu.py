"""Part C: SiLU.

Part B's network with one activation for all of it, as an option. SiLU, x * sigmoid(x), is smooth where ReLU has a
corner, and lets some gradient through where its input is negative.

    python part_c_cifar_silu.py train    # or, its defaults spelled out:
    python part_c_cifar_silu.py train --batch-size 128 --lr 1e-3 --epochs 120 --model-channels 32 --activation silu
    python part_c_cifar_silu.py test
    python part_c_cifar_silu.py eval

2,215,875 parameters; 4.9 minutes an epoch on 2 cores of a Xeon with AMX; held-out loss 0.0322 after 20 epochs.
"""

import argparse
from functools import partial

import torch
from torch import Tensor, nn

from common.blocks import (
    ACTIVATIONS,
    ActivationFn,
    Downsample,
    PositionalEncoding,
    ResnetBlock,
    Upsample,
    group_norm,
    zero_init,
)
from common.run import options
from common.run.cli import main


class Model(nn.Module):
    """A U-Net that predicts the noise in images.

    Args:
        num_steps: how many time steps there are.
        ch: width of the first convolution, a multiple of 32; the two levels end with 2 and 4 times as many channels.
        activation_fn: makes every activation of the network, for example `nn.SiLU`.
        norm_groups: number of groups in every GroupNorm; by default a group has four channels or more.
    """

    def __init__(
        self,
        num_steps: int = 1000,
        ch: int = 32,
        activation_fn: ActivationFn = nn.SiLU,
        norm_groups: int | None = None,
    ):
        super().__init__()
        embed_dim = 4 * ch
        self.embed = nn.Sequential(
            PositionalEncoding(ch, num_steps),
            nn.Linear(ch, embed_dim),
            activation_fn(),
            nn.Linear(embed_dim, embed_dim),
            activation_fn(),
        )
        block = partial(ResnetBlock, embed_dim=embed_dim, activation_fn=activation_fn, norm_groups=norm_groups)

        self.conv_in = nn.Conv2d(3, ch, kernel_size=3, padding=1)

        self.enc1_1 = block(ch, ch)
        self.enc1_2 = block(ch, 2 * ch)
        self.downconv1 = Downsample(2 * ch, 2 * ch)
        self.enc2_1 = block(2 * ch, 2 * ch)
        self.enc2_2 = block(2 * ch, 4 * ch)
        self.downconv2 = Downsample(4 * ch, 4 * ch)

        self.bottleneck_1 = block(4 * ch, 4 * ch)
        self.bottleneck_2 = block(4 * ch, 4 * ch)

        self.upconv2 = Upsample(4 * ch, 4 * ch)
        self.dec2_1 = block(8 * ch, 4 * ch)
        self.dec2_2 = block(4 * ch, 2 * ch)
        self.upconv1 = Upsample(2 * ch, 2 * ch)
        self.dec1_1 = block(4 * ch, 2 * ch)
        self.dec1_2 = block(2 * ch, ch)

        self.norm_out = group_norm(ch, norm_groups)
        self.act_out = activation_fn()
        self.conv_out = zero_init(nn.Conv2d(ch, 3, kernel_size=3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x: noisy images (B, 3, 32, 32). t: their time steps, int64 (B,). Returns the noise in them."""
        emb = self.embed(t)  # (B, embed_dim)
        x = self.conv_in(x)  # (B, ch, 32, 32)

        x = self.enc1_1(x, emb)
        x = skip1 = self.enc1_2(x, emb)  # (B, 2ch, 32, 32)
        x = self.downconv1(x)
        x = self.enc2_1(x, emb)
        x = skip2 = self.enc2_2(x, emb)  # (B, 4ch, 16, 16)
        x = self.downconv2(x)

        x = self.bottleneck_1(x, emb)
        x = self.bottleneck_2(x, emb)  # (B, 4ch, 8, 8)

        x = torch.cat([self.upconv2(x), skip2], dim=1)  # (B, 8ch, 16, 16)
        x = self.dec2_1(x, emb)
        x = self.dec2_2(x, emb)
        x = torch.cat([self.upconv1(x), skip1], dim=1)  # (B, 4ch, 32, 32)
        x = self.dec1_1(x, emb)
        x = self.dec1_2(x, emb)  # (B, ch, 32, 32)

        return self.conv_out(self.act_out(self.norm_out(x)))


def build_model(args: argparse.Namespace) -> Model:
    return Model(
        ch=args.model_channels,
        activation_fn=ACTIVATIONS[args.activation],
        norm_groups=args.norm_groups,
    )


stage = options.Stage(
    __file__,
    __doc__,
    build_model,
    model_options=[
        options.model_channels,
        options.activation,
        options.norm_groups,
    ],
)

if __name__ == "__main__":
    main(stage)
