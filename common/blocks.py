"""The building blocks of every stage's U-Net."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

ActivationFn = Callable[[], nn.Module]

ACTIVATIONS: dict[str, ActivationFn] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "leakyrelu": nn.LeakyReLU,
    "gelu": nn.GELU,
}


def zero_init(conv: nn.Conv2d) -> nn.Conv2d:
    """Sets a convolution to zero, so that a block starts as its shortcut, and an untrained network predicts 0."""
    for weight in conv.parameters():
        nn.init.zeros_(weight)
    return conv


def group_norm(channels: int, norm_groups: int | None = None) -> nn.GroupNorm:
    """GroupNorm; by default with at least four channels to a group, and at most 32 groups.

    32 groups are DDPM's (arXiv:2006.11239), whose narrowest level has 128 channels. The lower limit is that of EDM's
    code (arXiv:2206.00364). With one channel to a group, a norm removes each channel's mean: in the last norm that is
    the mean colour of the predicted noise, in a ResnetBlock's second norm the time step that was just added.
    """
    groups = min(32, channels // 4) if norm_groups is None else norm_groups
    if groups < 1 or channels % groups:
        raise ValueError(f"norm_groups: {channels} channels cannot be split into {groups} groups")
    return nn.GroupNorm(groups, channels)


class PositionalEncoding(nn.Module):
    """The sinusoids of "Attention Is All You Need" (arXiv:1706.03762, section 3.5), looked up by time step.

    Column 2k is sin(t / 10000^(2k/dim)), column 2k + 1 is cos of the same angle: neighbouring steps look alike.

    Args:
        dim: width of the encoding, even.
        max_len: how many time steps there are; `t` runs from 0 to max_len - 1.
    """

    table: Tensor

    def __init__(self, dim: int, max_len: int):
        super().__init__()
        if dim % 2:
            raise ValueError(f"dim must be even, got {dim}")
        t = torch.arange(max_len, dtype=torch.float64)[:, None]
        frequency = torch.exp(torch.arange(0, dim, 2, dtype=torch.float64) * (-math.log(10000.0) / dim))
        table = torch.stack([torch.sin(t * frequency), torch.cos(t * frequency)], dim=-1)  # (max_len, dim/2, 2)
        self.register_buffer("table", table.reshape(max_len, dim).float(), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """t: int64 (B,). Returns float (B, dim)."""
        return self.table[t]


class TimestepBlock(nn.Module):
    """Base class of the modules whose `forward` takes the time step's embedding as well as the image: `(x, emb)`."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: (B, C, H, W). emb: (B, embed_dim)."""
        raise NotImplementedError


class TimestepBlockSequential(nn.Sequential, TimestepBlock):
    """A Sequential that hands `emb` to those of its members that are TimestepBlocks."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        """x: (B, C, H, W). emb: (B, embed_dim)."""
        for module in self:
            x = module(x, emb) if isinstance(module, TimestepBlock) else module(x)
        return x


class ResnetBlock(TimestepBlock):
    """Two 3x3 convolutions with the time step added between them, and a shortcut around both.

    The residual block of DDPM (arXiv:2006.11239, appendix B) without its dropout. As in its code, the second
    convolution starts at zero: an untrained block is its shortcut.

    Args:
        in_channels, out_channels: numbers of channels; `group_norm` must be able to split both.
        embed_dim: width of the time step's embedding.
        activation_fn: makes the activation, for example `nn.SiLU`.
        norm_groups: groups of both norms, see `group_norm`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embed_dim: int,
        activation_fn: ActivationFn = nn.SiLU,
        norm_groups: int | None = None,
    ):
        super().__init__()
        self.norm1 = group_norm(in_channels, norm_groups)
        self.act1 = activation_fn()
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.embed_proj = nn.Linear(embed_dim, out_channels)
        self.norm2 = group_norm(out_channels, norm_groups)
        self.act2 = activation_fn()
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1))
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: (B, in_channels, H, W). emb: (B, embed_dim), activated already. Returns (B, out_channels, H, W)."""
        h = self.conv1(self.act1(self.norm1(x)))
        h = h + self.embed_proj(emb)[:, :, None, None]
        h = self.conv2(self.act2(self.norm2(h)))
        return self.shortcut(x) + h


class Downsample(nn.Module):
    """Halves height and width with a strided 3x3 convolution."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_channels, H, W). Returns (B, out_channels, H/2, W/2)."""
        return self.conv(x)


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_channels, H, W). Returns (B, out_channels, 2H, 2W)."""
        return self.conv(self.upsample(x))
