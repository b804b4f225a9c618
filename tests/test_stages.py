"""The seven networks: parameters, gradients, norms, and what their options change."""

import argparse
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.blocks import ResnetBlock, TimestepBlockSequential
from common.run.options import model_defaults
from part_g_cifar import AttentionBlock
from tests.conftest import STAGES

PARAMETERS = dict(zip(STAGES, (559_331, 2_215_875, 2_215_875, 1_523_715, 2_017_667, 2_017_667, 2_193_219)))


def make_model(stage: str, **options: Any) -> nn.Module:
    """A stage's model in which no weight is left at zero, so that everything shows in the output."""
    torch.manual_seed(0)
    model = importlib.import_module(stage).Model(**options)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def run(model: nn.Module, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model(torch.randn(batch, 3, 32, 32, generator=generator), torch.arange(batch) * 300)


@pytest.mark.parametrize("stage", STAGES)
def test_number_of_parameters(stage: str) -> None:
    assert sum(p.numel() for p in make_model(stage).parameters()) == PARAMETERS[stage]


@pytest.mark.parametrize("stage", STAGES)
def test_every_parameter_learns(stage: str) -> None:
    model = make_model(stage)
    model(torch.randn(2, 3, 32, 32), torch.tensor([3, 700])).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("stage", STAGES)
def test_an_untrained_net_predicts_no_noise(stage: str) -> None:
    assert not run(importlib.import_module(stage).Model()).any()


NOT_THE_DEFAULTS = {
    "model_channels": 64,
    "activation": "relu",
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "attention_resolutions": [8],
    "norm_groups": 1,
}


@pytest.mark.parametrize("name", STAGES)
def test_every_model_option_changes_the_network(name: str) -> None:
    stage = importlib.import_module(name).stage
    defaults = model_defaults(stage)

    def built(**change: Any) -> str:
        with torch.device("meta"):
            return str(stage.build_model(argparse.Namespace(**{**defaults, **change})))

    for option in defaults:
        assert built(**{option: NOT_THE_DEFAULTS[option]}) != built(), option


def test_groups_of_the_norms() -> None:
    for stage in STAGES:
        norms = [m for m in make_model(stage).modules() if isinstance(m, nn.GroupNorm)]
        assert norms
        for norm in norms:
            assert norm.num_groups <= 32
            assert norm.num_channels // norm.num_groups >= 4
            assert norm.num_groups == 32 or norm.num_channels // norm.num_groups == 4


def test_activations() -> None:
    def kinds(model: nn.Module) -> list[type]:
        return [type(m) for m in model.modules() if isinstance(m, (nn.ReLU, nn.SiLU, nn.LeakyReLU, nn.GELU))]

    for stage in STAGES[2:]:
        for activation in (nn.ReLU, nn.LeakyReLU, nn.GELU):
            assert set(kinds(make_model(stage, activation_fn=activation))) == {activation}


def block_widths(block: nn.Module) -> tuple[int, int]:
    resnet = next(m for m in block.modules() if isinstance(m, ResnetBlock))
    return resnet.conv1.in_channels // 32, resnet.conv1.out_channels // 32


@pytest.mark.parametrize(
    ("num_res_blocks", "channel_mult"), [(2, (2, 2, 2, 1)), (1, (1,)), (3, (1, 2, 3)), (1, (1,) * 6)]
)
def test_loops_of_e_and_g_follow_their_options(num_res_blocks: int, channel_mult: tuple[int, ...]) -> None:
    options = {"num_res_blocks": num_res_blocks, "channel_mult": channel_mult}
    for model in (
        make_model("part_e_cifar_deeper", **options),
        make_model("part_g_cifar", attention_resolutions=(32,), **options),
    ):
        assert run(model).shape == (2, 3, 32, 32)
        levels = len(channel_mult)
        inputs = list(model.get_submodule("input_blocks").children())
        outputs = list(model.get_submodule("output_blocks").children())
        assert len(inputs) == 1 + levels * num_res_blocks + levels - 1
        assert len(outputs) == levels * (num_res_blocks + 1)
        assert all(isinstance(block, TimestepBlockSequential) for block in outputs)
        decoder = [block_widths(block)[1] for block in outputs]
        assert decoder == [mult for mult in reversed(channel_mult) for _ in range(num_res_blocks + 1)]
        middle = [m for m in model.get_submodule("middle_block").children() if isinstance(m, ResnetBlock)]
        assert len(middle) == num_res_blocks


def test_e_with_the_options_of_d_has_the_size_of_d() -> None:
    e = make_model("part_e_cifar_deeper", channel_mult=(1, 2, 2))
    assert sum(p.numel() for p in e.parameters()) == PARAMETERS["part_d_cifar_arch"]


def test_too_many_levels_are_refused() -> None:
    for stage in STAGES[4:]:
        with pytest.raises(ValueError, match="channel_mult: 32"):
            make_model(stage, channel_mult=(1,) * 7)


def test_attention_is_where_the_options_say() -> None:
    def places(**options: Any) -> list[str]:
        model = make_model("part_g_cifar", **options)
        return [name for name, module in model.named_modules() if isinstance(module, AttentionBlock)]

    assert places(attention_resolutions=()) == ["middle_block.1"]
    assert len(places(attention_resolutions=(32, 16, 8, 4))) == 4 * 5 + 1
    with pytest.raises(ValueError, match="attention_resolutions: must"):
        places(attention_resolutions=(7,))
