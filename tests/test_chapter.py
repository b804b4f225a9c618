"""The chapter's networks, built here from their tables of layers, and its way to call the building blocks.

With the chapter's groups, 16 in part A and 32 from part B on, every stage computes what its table says, weight for
weight. The reference takes a state dict and functions of torch.nn.functional, and no module of ours.
"""

import importlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.blocks import Downsample, PositionalEncoding, ResnetBlock, TimestepBlock, TimestepBlockSequential, Upsample
from tests.conftest import ROOT, STAGES, run_stage

Weights = dict[str, Tensor]
Activation = Callable[[Tensor], Tensor]


class Chapter:
    """The layers that a table names, with the weights of a state dict, groups and an activation."""

    def __init__(self, weights: Weights, groups: int, activation: Activation):
        self.weights = weights
        self.groups = groups
        self.act = activation

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, self.groups, *self.of(name))

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight, bias = self.of(name)
        return F.conv2d(x, weight, bias, stride=stride, padding=weight.shape[-1] // 2)

    def embed(self, t: Tensor) -> Tensor:
        dim = self.weights["embed.1.weight"].shape[1]
        angles = t[:, None] * torch.tensor([10000 ** (-2 * k / dim) for k in range(dim // 2)], dtype=torch.float64)
        sinusoids = torch.empty(len(t), dim, dtype=torch.float64)
        sinusoids[:, 0::2], sinusoids[:, 1::2] = angles.sin(), angles.cos()
        h = self.act(F.linear(sinusoids.float().double(), *self.of("embed.1")))
        return self.act(F.linear(h, *self.of("embed.3")))

    def rb(self, name: str, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv(f"{name}.conv1", self.act(self.norm(f"{name}.norm1", x)))
        h = h + F.linear(emb, *self.of(f"{name}.embed_proj"))[:, :, None, None]
        h = self.conv(f"{name}.conv2", self.act(self.norm(f"{name}.norm2", h)))
        return h + (self.conv(f"{name}.shortcut", x) if f"{name}.shortcut.weight" in self.weights else x)

    def down(self, name: str, x: Tensor) -> Tensor:
        return self.conv(f"{name}.conv", x, stride=2)

    def up(self, name: str, x: Tensor) -> Tensor:
        return self.conv(f"{name}.conv", x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))

    def attention(self, name: str, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        h = F.conv1d(self.norm(f"{name}.norm", x).reshape(b, c, -1), *self.of(f"{name}.qkv"))
        parts = h.permute(0, 2, 1).split(c, dim=2)  # q, k, v: (B, pixels, C)
        weights = self.weights[f"{name}.attn.in_proj_weight"].split(c)
        biases = self.weights[f"{name}.attn.in_proj_bias"].split(c)
        q, k, v = (F.linear(part, w, bias) for part, w, bias in zip(parts, weights, biases))
        h = torch.softmax(q @ k.mT / math.sqrt(c), dim=2) @ v
        h = F.linear(h, *self.of(f"{name}.attn.out_proj")).permute(0, 2, 1)
        return x + F.conv1d(h, *self.of(f"{name}.out")).reshape(b, c, height, width)

    def last(self, norm: str, conv: str, x: Tensor, activation: Activation) -> Tensor:
        return self.conv(conv, activation(self.norm(norm, x)))

    # The tables

    def a_to_c(self, x: Tensor, t: Tensor, last: Activation) -> Tensor:
        emb = self.embed(t)
        x = self.conv("conv_in", x)
        skip1 = self.rb("enc1_2", self.rb("enc1_1", x, emb), emb)
        skip2 = self.rb("enc2_2", self.rb("enc2_1", self.down("downconv1", skip1), emb), emb)
        x = self.rb("bottleneck_2", self.rb("bottleneck_1", self.down("downconv2", skip2), emb), emb)
        x = torch.cat([self.up("upconv2", x), skip2], 1)
        x = self.rb("dec2_2", self.rb("dec2_1", x, emb), emb)
        x = torch.cat([self.up("upconv1", x), skip1], 1)
        x = self.rb("dec1_2", self.rb("dec1_1", x, emb), emb)
        return self.last("norm_out", "conv_out", x, last)

    def d(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.embed(t)
        kept = [self.conv("input_blocks.0", x)]
        for i in range(1, 9):
            layer = self.down if i in (3, 6) else self.rb
            kept.append(layer(f"input_blocks.{i}", kept[-1], *([emb] if layer == self.rb else [])))
        x = self.rb("middle_block.1", self.rb("middle_block.0", kept[-1], emb), emb)
        for i in range(9):
            x = torch.cat([x, kept.pop()], 1)
            if i in (2, 5):
                x = self.up(f"output_blocks.{i}.1", self.rb(f"output_blocks.{i}.0", x, emb))
            else:
                x = self.rb(f"output_blocks.{i}", x, emb)
        return self.last("out.0", "out.2", x, self.act)

    def e_to_g(self, x: Tensor, t: Tensor, attention_at: tuple[int, ...] | None) -> Tensor:
        """With the default depth and widths; attention_at: None in E and F, which have none, not even in the middle."""
        emb = self.embed(t)
        kept = [self.conv("input_blocks.0", x)]
        numbers: Iterator[int] = iter(range(1, 12))
        for level in range(4):
            attends = attention_at is not None and 32 // 2**level in attention_at
            for _ in range(2):
                name = f"input_blocks.{next(numbers)}"
                x = self.rb(name if attention_at is None else f"{name}.0", kept[-1], emb)
                kept.append(self.attention(f"{name}.1", x) if attends else x)
            if level < 3:
                kept.append(self.down(f"input_blocks.{next(numbers)}", kept[-1]))
        x = self.rb("middle_block.0", kept[-1], emb)
        if attention_at is not None:
            x = self.attention("middle_block.1", x)
        x = self.rb(f"middle_block.{1 if attention_at is None else 2}", x, emb)
        for i in range(12):
            level = 3 - i // 3
            attends = attention_at is not None and 32 // 2**level in attention_at
            x = self.rb(f"output_blocks.{i}.0", torch.cat([x, kept.pop()], 1), emb)
            if attends:
                x = self.attention(f"output_blocks.{i}.1", x)
            if i % 3 == 2 and level > 0:
                x = self.up(f"output_blocks.{i}.{2 if attends else 1}", x)
        return self.last("out.0", "out.2", x, self.act)


def reference(stage: str, weights: Weights, x: Tensor, t: Tensor) -> Tensor:
    letter = stage[5]
    chapter = Chapter(weights, groups=16 if letter == "a" else 32, activation=F.relu if letter in "ab" else F.silu)
    if letter in "abc":
        return chapter.a_to_c(x, t, F.relu if letter == "a" else F.silu)
    return chapter.d(x, t) if letter == "d" else chapter.e_to_g(x, t, (16,) if letter == "g" else None)


@pytest.mark.parametrize(
    ("stage", "options"), [*((stage, {}) for stage in STAGES), *((stage, {"ch": 64}) for stage in STAGES[1:4])]
)
def test_with_the_chapters_groups_every_stage_is_the_chapters_network(stage: str, options: dict[str, int]) -> None:
    torch.manual_seed(0)
    module = importlib.import_module(stage)
    model = module.Model(**options, norm_groups=16 if stage == "part_a_cifar" else 32).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, t = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 321, 999])
    with torch.no_grad():
        ours, theirs = model(x, t), reference(stage, dict(model.state_dict()), x, t)
        by_default = module.Model(**options).double()
        by_default.load_state_dict(model.state_dict())  # which has the same names, and computes something else
        assert not torch.allclose(by_default(x, t), theirs, rtol=1e-3)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_the_blocks_are_called_as_the_chapter_calls_them() -> None:
    """The ways in which its listings put a network together: by position, with as many channels out as in."""
    emb, x = torch.randn(2, 64), torch.randn(2, 32, 8, 8)
    assert ResnetBlock(32, 64, 64)(x, emb).shape == (2, 64, 8, 8)
    assert isinstance(ResnetBlock(32, 64, 64, nn.GELU).act1, nn.GELU)
    assert Downsample(32, 32)(x).shape == (2, 32, 4, 4)
    assert Upsample(32, 32)(x).shape == (2, 32, 16, 16)
    assert PositionalEncoding(64, 1000)(torch.tensor([0, 999])).shape == (2, 64)
    sequence = TimestepBlockSequential()
    for block in (ResnetBlock(32, 64, 64, nn.SiLU), Upsample(64, 64)):
        sequence.append(block)
    assert isinstance(sequence, TimestepBlock)
    assert sequence(x, emb).shape == (2, 64, 16, 16)


def test_the_groups_are_an_option_that_the_checkpoint_carries(
    tmp_path: Path, shapes_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--norm-groups", 16)
    run = ("--run-dir", tmp_path, "--device", "cpu", "--data-dir", shapes_dir, "--dataset", "shapes")
    short = ("--batch-size", 4, "--max-steps", 2)
    assert run_stage("part_a_cifar", "train", *words, *run, *short) == 0
    assert run_stage("part_a_cifar", "train", "--resume", *run, "--max-steps", 3) == 0
    draw = ("--run-dir", tmp_path, "--num-images", 2, "--steps", 2)
    assert run_stage("part_a_cifar", "test", *draw) == 0
    assert run_stage("part_a_cifar", "test", *words, *draw) == 0
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["model_options"] == {"norm_groups": 16}
    capsys.readouterr()
    assert run_stage("part_a_cifar", "test", "--norm-groups", 8, *draw) == 2
    refusal = f"argument --norm-groups: 8 contradicts {tmp_path / 'checkpoint.pt'}, which was made with 16"
    assert refusal in capsys.readouterr().err


def test_every_picture_of_the_chapter_is_there() -> None:
    names = ["a-cifar", "b-cifar-more-channels", "c-cifar-silu", "d-cifar-arch", "e-cifar-deeper", "f-cifar-aug"]
    for name in ["mnist-example-data.png", *(f"part-{name}-output.png" for name in (*names, "h-cifar-attn"))]:
        assert (ROOT / "assets" / name).exists(), name
