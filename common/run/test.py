"""The command `test`: draws a picture grid from the trained model, and on demand a film and a strip."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm

from common.diffusion import NoiseSchedule
from common.guidance import CLASSES, Classifier, guided
from common.run import distributed
from common.run.device import autocast, in_precision
from common.run.errors import UsageError, counted, say
from common.run.models import TrainedModel, load_classifier, load_trained
from common.run.options import Stage
from common.run.pictures import (
    FILM_FORMATS,
    SAMPLERS,
    Film,
    check_outputs,
    make_folder,
    sample_images,
    save_film,
    save_grid,
    save_images,
    save_trajectory,
)

ENDINGS = {"--output": [".png"], "--film": list(FILM_FORMATS), "--trajectory": [".png"]}


def test(stage: Stage, options: argparse.Namespace, typed: Mapping[str, Any]) -> int:
    """Draws what a stage has learned. Returns the exit status."""
    steps = options.steps or SAMPLERS[options.sampler]
    outputs = {"--output": options.output, "--film": options.film, "--trajectory": options.trajectory}
    check_outputs(outputs, ENDINGS)
    if "guidance_scale" in typed and not options.label:
        raise UsageError("argument --guidance-scale: requires --label")
    trained = load_trained(stage, options, typed, min(options.batch_size, options.num_images))
    output = options.output or trained.folder / "samples.png"
    outputs["--output"] = output
    check_outputs(outputs, ENDINGS, trained.path)
    if options.label and trained.dataset != "cifar10":
        reason = f"these are classes of cifar10, and {trained.path} was trained on {trained.dataset}"
        raise UsageError(f"argument --label: {reason}")
    classifier = load_classifier(trained.device) if options.label else None
    if options.save_images:
        distributed.on_first(lambda: make_folder(options.save_images, outputs))
    # Where to, how many moments, how many images, how
    kinds = ((options.film, 50, 64, save_film), (options.trajectory, 10, 8, save_trajectory))
    films = [(path, Film(steps, frames, num_images), save) for path, frames, num_images, save in kinds if path]
    images = draw(trained, options, options.num_images, steps, [film for _, film, _ in films], classifier)
    frames = [film.frames() for _, film, _ in films]
    if distributed.RANK == 0:
        save_grid(images, output)
        of_class = f" of class {options.label}" if options.label else ""
        say(
            f"{output}: {counted(len(images), 'image')}{of_class} by {options.sampler} in {counted(steps, 'step')}, "
            f"{options.weights} weights after {counted(trained.epochs, 'epoch')}, {counted(trained.steps, 'step')} of "
            "training"
        )
        for (path, _, save), states in zip(films, frames):
            save(states, path)
            say(
                f"{path}: {counted(len(states[0]), 'image')} at {counted(len(states), 'moment')}, from noise to picture"
            )
        if options.save_images:
            save_images(images, options.save_images)
            say(f"{options.save_images}: {counted(len(images), 'image')}, a PNG each")
    return 0


def draw(
    trained: TrainedModel,
    options: argparse.Namespace,
    num_images: int,
    steps: int,
    films: Sequence[Film] = (),
    classifier: Classifier | None = None,
) -> Tensor:
    """Images from the model, uint8 (num_images, 3, 32, 32), by all processes together, with a bar and on film."""
    hide = distributed.hides_bars()
    total = num_images * steps // distributed.WORLD_SIZE
    with tqdm(total=total, unit=" image steps", desc=options.sampler, disable=hide) as bar:

        def watch(start: int, step: int, xt: Tensor) -> None:
            bar.update(len(xt) if step else 0)
            for film in films:
                film(start, step, xt)

        schedule = NoiseSchedule().to(trained.device)
        predict_noise = in_precision(trained.model, trained.precision)
        if classifier:
            label = CLASSES.index(options.label)
            predict_noise = guided(predict_noise, classifier, schedule, label, options.guidance_scale)
        with autocast(trained.device, trained.precision):  # the classifier too; around all steps, to cast weights once
            return sample_images(
                predict_noise,
                schedule,
                num_images,
                sampler=options.sampler,
                steps=steps,
                seed=options.seed,
                batch_size=options.batch_size,
                spread=True,
                watch=watch,
            )
