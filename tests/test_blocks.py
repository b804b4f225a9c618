"""The building blocks, against their formulas and diffusers' residual block."""

import math

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from common.blocks import (
    PositionalEncoding,
    ResnetBlock,
    TimestepBlock,
    TimestepBlockSequential,
    group_norm,
)


def test_positional_encoding_is_the_formula() -> None:
    dim = 64
    encoding = PositionalEncoding(dim, 1000)(torch.tensor([0, 1, 37, 999]))
    for row, t in zip(encoding, (0, 1, 37, 999)):
        for k in range(dim // 2):
            angle = t * 10000 ** (-2 * k / dim)
            assert row[2 * k].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert row[2 * k + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_positional_encoding_refuses_an_odd_width() -> None:
    with pytest.raises(ValueError, match="even"):
        PositionalEncoding(33, 1000)


@pytest.mark.parametrize("out_channels", [128, 256])
def test_resnet_block_is_that_of_diffusers(out_channels: int) -> None:
    torch.manual_seed(0)
    ours = ResnetBlock(128, out_channels, embed_dim=64)
    theirs = ResnetBlock2D(
        in_channels=128, out_channels=out_channels, temb_channels=64, groups=32, eps=1e-5, skip_time_act=True
    )
    names = {"conv_shortcut": "shortcut", "time_emb_proj": "embed_proj"}
    state = theirs.state_dict()
    ours.load_state_dict(
        {names.get(key.split(".")[0], key.split(".")[0]) + "." + key.split(".")[1]: state[key] for key in state}
    )
    x, emb = torch.randn(2, 128, 8, 8), torch.randn(2, 64)
    torch.testing.assert_close(ours(x, emb), theirs(x, emb))


def test_an_untrained_resnet_block_is_its_shortcut() -> None:
    x = torch.randn(2, 32, 4, 4)
    assert torch.equal(ResnetBlock(32, 32, embed_dim=8)(x, torch.randn(2, 8)), x)


@pytest.mark.parametrize(("channels", "groups"), [(16, 4), (32, 8), (96, 24), (128, 32), (512, 32)])
def test_group_norm_has_four_channels_to_a_group_or_32_groups(channels: int, groups: int) -> None:
    assert group_norm(channels).num_groups == groups


@pytest.mark.parametrize(("channels", "norm_groups"), [(16, 32), (32, 12), (2, None), (32, 0)])
def test_channels_that_cannot_be_split_into_the_groups_are_told(channels: int, norm_groups: int | None) -> None:
    with pytest.raises(ValueError, match=f"norm_groups: {channels} channels cannot be split into"):
        group_norm(channels, norm_groups)


@pytest.mark.parametrize("channels", [16, 32, 64, 128])
def test_group_norm_keeps_what_sets_the_means_of_its_channels_apart(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, means = torch.randn(2, channels, 8, 8, generator=generator), torch.randn(channels, generator=generator)
    kept = group_norm(channels)(x + 3 * means[:, None, None]).mean(dim=(0, 2, 3))
    assert torch.corrcoef(torch.stack([kept, means]))[0, 1] > 0.5


def test_sequential_hands_the_embedding_to_timestep_blocks_alone() -> None:
    class Scale(TimestepBlock):
        def forward(self, x: Tensor, emb: Tensor) -> Tensor:
            return x * emb

    sequence = TimestepBlockSequential(Scale(), nn.ReLU(), TimestepBlockSequential(Scale()))
    assert isinstance(sequence, TimestepBlock)
    assert sequence(torch.tensor([-1.0, 2.0]), torch.tensor(3.0)).tolist() == [0, 18]
