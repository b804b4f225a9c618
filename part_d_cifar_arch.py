"""Part D: the shape of the DDPM network.

Part C had two skip connections, one at each level but the lowest. Here every encoder block's output becomes one, so
that every decoder block gets one of its own. The blocks live in three lists, and the forward pass is two loops.

    python part_d_cifar_arch.py train    # or, its defaults spelled out:
    python part_d_cifar_arch.py train --batch-size 128 --lr 1e-3 --epochs 120 --model-channels 32 --activation silu
    python part_d_cifar_arch.py test
    python part_d_cifar_arch.py eval

1,523,715 parameters; 4.3 minutes an epoch on 2 cores of a Xeon with AMX; held-out loss 0.0320 after 20 epochs.
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
    TimestepBlock,
    TimestepBlockSequential,
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
        ch: width of the first level, a multiple of 32; the others have twice as many channels.
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

        self.input_blocks = nn.ModuleList(
            [
                nn.Conv2d(3, ch, kernel_size=3, padding=1),
                block(ch, ch),
                block(ch, ch),
                Downsample(ch, ch),  # to 16 x 16
                block(ch, 2 * ch),
                block(2 * ch, 2 * ch),
                Downsample(2 * ch, 2 * ch),  # to 8 x 8
                block(2 * ch, 2 * ch),
                block(2 * ch, 2 * ch),
            ]
        )

        self.middle_block = TimestepBlockSequential(
            block(2 * ch, 2 * ch),
            block(2 * ch, 2 * ch),
        )

        self.output_blocks = nn.ModuleList(
            [
                block(4 * ch, 2 * ch),  # takes in the channels so far and those of a skip: 2 + 2
                block(4 * ch, 2 * ch),
                TimestepBlockSequential(block(4 * ch, 2 * ch), Upsample(2 * ch, 2 * ch)),
                block(4 * ch, 2 * ch),
                block(4 * ch, 2 * ch),
                TimestepBlockSequential(block(3 * ch, 2 * ch), Upsample(2 * ch, 2 * ch)),  # 2 + 1
                block(3 * ch, ch),  # 2 + 1
                block(2 * ch, ch),  # 1 + 1
                block(2 * ch, ch),
            ]
        )

        self.out = nn.Sequential(
            group_norm(ch, norm_groups),
            activation_fn(),
            zero_init(nn.Conv2d(ch, 3, kernel_size=3, padding=1)),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x: noisy images (B, 3, 32, 32). t: their time steps, int64 (B,). Returns the noise in them."""
        emb = self.embed(t)  # (B, embed_dim)

        skips = []
        for block in self.input_blocks:
            x = block(x, emb) if isinstance(block, TimestepBlock) else block(x)
            skips.append(x)

        x = self.middle_block(x, emb)  # (B, 2ch, 8, 8)

        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, emb)

        return self.out(x)


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
