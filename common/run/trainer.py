"""A Trainer that uses the machine, can be saved and resumed."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from common.run import checkpoint, distributed
from common.run.checkpoint import LOG_COLUMNS, Checkpoint, RunOptions, RunProgress
from common.run.device import in_precision
from common.run.errors import UserError
from common.training import Trainer


class Run(Trainer):
    """A Trainer that uses the machine, and all that has to be saved for it to go on.

    Of several processes, each has a Run. They draw the same numbers, take a share of each batch each, and average
    their gradients, so that their weights stay the same.

    Args:
        stage: name of the script, for the checkpoint.
        model_options: the stage's model options, for the checkpoint.
        model: as for Trainer. Before the first step, `device.compile_model` may compile it.
        options: see RunOptions. The number of processes must divide the batch size.
        precision: what the model computes in, one of device.DTYPES. In fp16 the gradients are scaled.
    """

    options: RunOptions
    progress: RunProgress

    def __init__(
        self, stage: str, model_options: dict[str, Any], model: nn.Module, options: RunOptions, precision: str = "fp32"
    ):
        distributed.broadcast([*model.parameters(), *model.buffers()])
        super().__init__(model, options)
        self.progress = RunProgress()
        self.stage = stage
        self.model_options = model_options
        self.precision = precision
        self.predict_noise = in_precision(model, precision)
        self.predict_averaged = in_precision(self.ema.module, precision)
        self._state_names = model.state_dict().keys()
        # These are read rarely: each reading makes a GPU wait.
        self._loss_sum = torch.zeros((), device=self.device)  # of the images seen in the epoch under way
        self._loss_count = torch.zeros((), dtype=torch.int64, device=self.device)  # how many these are
        self.scaler = self._scale_gradients() if precision == "fp16" else None
        if self.scaler or distributed.WORLD_SIZE > 1:
            self.optimizer.register_step_pre_hook(lambda *arguments: self._prepare_gradients())

    def gradient_step(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """As Trainer.gradient_step, of this rank's share of the batch; adds up losses."""
        mine = (x.chunk(distributed.WORLD_SIZE)[distributed.RANK] for x in (x0, t, noise))
        loss = super().gradient_step(*mine)
        if distributed.WORLD_SIZE > 1:
            distributed.average([loss])
            distributed.broadcast([b for name, b in self.model.named_buffers() if name in self._state_names])
        self._loss_sum += loss * len(x0)
        self._loss_count += len(x0)
        return loss

    def _scale_gradients(self) -> GradScaler:
        """Scales the gradients of the backward pass by a factor, for the smallest of them underflow in fp16.

        The factor adapts (arXiv:1710.03740, section 3.2): a step whose gradients overflow is skipped, and halves it;
        after 2,000 others it doubles. All of that is computed on the device, so that nothing waits for a GPU.
        """
        scaler, predict_noise = GradScaler(self.device.type), self.predict_noise

        def predict_and_scale(xt: Tensor, t: Tensor) -> Tensor:
            noise = predict_noise(xt, t)
            noise.register_hook(scaler.scale)  # of its gradient; the loss, which is shown, stays as it is
            return noise

        self.predict_noise = predict_and_scale
        self.optimizer.register_step_post_hook(lambda *arguments: scaler.update())
        return scaler

    def _prepare_gradients(self) -> None:
        """Makes the gradients ready for the optimiser."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        distributed.average(gradients)  # before all else: what does not fit fp16 on one rank, all skip
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
            overflow = ~nn.utils.get_total_norm(gradients).isfinite()
            self.optimizer.found_inf = overflow.float()  # type: ignore[attr-defined]  # then fused Adam skips the step

    def check(self) -> None:
        """Makes sure that the run is worth saving: that its losses, weights and moments are finite. Waits for a GPU.

        Raises:
            UserError: it is not, or in fp16 no scale is small enough for the gradients.
        """
        if changed := self.model.state_dict().keys() ^ self._state_names:
            raise UserError(
                f"the model has gained or lost {', '.join(sorted(changed))} since it was built, so that no checkpoint "
                "would fit it; make all parameters and buffers in __init__"
            )
        if self.scaler and self.scaler.get_scale() < 1:
            raise UserError("the gradients do not fit fp16, however small their scale; try --precision fp32")
        pairs = zip(self.model.parameters(), self.ema.module.parameters())
        trained = [weight for pair in pairs if pair[0].requires_grad and pair[0].numel() for weight in pair]
        moments = [moment for state in self.optimizer.state.values() for moment in state.values() if moment.numel()]
        if not nn.utils.get_total_norm([self._loss_sum, *trained, *moments], norm_type=math.inf).isfinite():
            raise UserError(
                f"at step {self.progress.step}, the loss, the weights or Adam's moments are no longer finite, with "
                f"--lr {self.options.lr:g}; try a lower --lr, or --precision fp32"
            )

    def mean_loss(self) -> float:
        """Mean loss of the images seen in the epoch under way."""
        return (self._loss_sum / self._loss_count).item()

    def log_epoch(self, held_out_loss: float) -> None:
        """Adds the row of the epoch that is complete to the log, and makes ready for the next one.

        Raises:
            UserError: the averaged weights' held-out loss is not finite, although the weights are.
        """
        if not math.isfinite(held_out_loss):
            raise UserError("the averaged weights' held-out loss is not finite; try --precision fp32")
        progress = self.progress
        losses = (round(self.mean_loss(), 6), round(held_out_loss, 6))
        speed = (round(self._loss_count.item() / progress.seconds, 1), round(progress.seconds, 2))
        progress.log.append(dict(zip(LOG_COLUMNS, (progress.epoch, progress.step, *losses, *speed))))
        progress.seconds = 0.0
        self._loss_sum.zero_()
        self._loss_count.zero_()

    def checkpoint(self) -> Checkpoint:
        """All that `restore` needs, and the stage's model options, from which the model can be built again."""
        self.progress.loss_sum = self._loss_sum.item()
        moments = self.optimizer.state_dict()["state"]
        return {
            "format": checkpoint.FORMAT,
            "stage": self.stage,
            "model_options": self.model_options,
            "training_options": asdict(self.options),
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": {n: moments.get(n) for n, _ in enumerate(self.model.parameters())},
            "scaler": self.scaler.state_dict() if self.scaler else {},
        }

    def restore(self, saved: Checkpoint, path: Path) -> None:
        """Goes to where `saved`, read from `path`, stopped, with this Run's own options; before the first step."""
        self.progress = RunProgress(**saved["progress"])
        self._loss_sum.fill_(self.progress.loss_sum)
        self._loss_count.fill_(self.progress.seen)
        checkpoint.load_weights(self.model, saved["model"], path)
        checkpoint.load_weights(self.ema.module, saved["ema"], path)
        moments, parameters = saved["optimizer"], enumerate(self.model.parameters())
        with checkpoint.reading(path):
            state = {n: _fitting_moments(moments[n], p, n) for n, p in parameters if moments[n] is not None}
            param_groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state, "param_groups": param_groups})
            if self.scaler and saved.get("scaler"):
                self.scaler.load_state_dict(saved["scaler"])


def _fitting_moments(state: dict[str, Tensor], parameter: Tensor, n: int) -> dict[str, Tensor]:
    """Adam's state of parameter number n, in its memory layout, which fused Adam relies on."""
    step, first, second = state["step"], state["exp_avg"], state["exp_avg_sq"]
    if not (step.shape == () and first.shape == second.shape == parameter.shape):
        raise ValueError(f"the optimizer's state of parameter {n} has another shape")
    moments = (torch.empty_like(parameter).copy_(moment) for moment in (first, second))
    return dict(zip(("step", "exp_avg", "exp_avg_sq"), (step, *moments)))
