"""Networks of recipes: built from a recipe alone, or restored as a run or a checkpoint holds them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowbit.train.models import build_model, model_factory
from lowbit.train.prepare import prepare
from lowbit.train.quantizers import QuantizerWarning
from lowbit.train.recipe import Recipe, RecipeError, load_recipe, parse_recipe
from lowbit.train.rundir import InputSpec, RunError, read_checkpoint, read_run

if TYPE_CHECKING:
    from lowbit.train.start import Start

__all__ = ["Trained", "build_network", "float_network", "load_run", "load_trained", "restore"]


def float_network(recipe: Recipe, spec: InputSpec) -> nn.Module:
    """The recipe's network before it is prepared, with random weights: the float twin.

    Raises:
        ValueError: it can't be built.
    """
    name, arguments = recipe.model.name, recipe.model.arguments
    if not spec.classes and "classes" in inspect.signature(model_factory(name)).parameters:
        raise ValueError(f"model {name!r} names classes; a network for super-resolution has an argument `upscale`")
    try:
        return build_model(
            name,
            classes=len(spec.classes),
            in_channels=spec.channels,
            image_size=spec.height,
            upscale=spec.upscale,
            **arguments,
        )
    except ValueError:
        raise
    except Exception as error:  # of anybody's own code
        raise ValueError(f"model {name!r} can't be built: {type(error).__name__}: {error}") from error


def build_network(recipe: Recipe, spec: InputSpec, start: Start | None = None) -> nn.Module:
    """The recipe's network for an input, prepared; the same for the same recipe.

    Args:
        recipe: what to build.
        spec: the input it reads and the classes it answers.
        start: the trained network to start from; None for random weights drawn with the recipe's seed.

    Raises:
        RecipeError: the model or the quantization can't be built, or not started from there.
    """
    q = recipe.quantize
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = float_network(recipe, spec)
            if start is not None:
                start.load_weights(model)
            model = prepare(
                model,
                method=q.method,
                weight_bits=q.weight_bits,
                activation_bits=q.activation_bits,
                activation=q.activation,
                edges=q.edges,
                image=spec.pixels,
                residual_dtype=q.residual_dtype,
                state_batchnorm=q.state_batchnorm,
                skip=q.skip,
                overrides=q.overrides,
                options=q.options,
                activation_options=q.activation_options,
            )
            if start is not None:
                start.load_quantizers(model)
            return model
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{recipe.name}: {error}") from error


def restore(recipe: Recipe, spec: InputSpec, tree: Mapping[str, Any], place: str) -> nn.Module:
    """The network of a checkpoint, in evaluation.

    Raises:
        RunError: it does not fit the recipe; ``place`` in front.
    """
    with warnings.catch_warnings(action="ignore", category=QuantizerWarning):  # said when it was trained
        model = build_network(recipe, spec)
    try:
        model.load_state_dict(tree["state_dict"])
    except RuntimeError as error:
        raise RunError(f"{place} does not fit the recipe ({str(error).splitlines()[0]})") from None
    return model.eval()


def load_run(run_dir: str | Path) -> tuple[Recipe, nn.Module]:
    """The recipe and the final network of a finished run: calibrated, hard, in eval mode, on the CPU.

    Raises:
        RunError: no run directory, an unfinished or failed run, a broken checkpoint.
    """
    found = _of_run(Path(run_dir))
    return found.recipe, found.model


@dataclass(frozen=True)
class Trained:
    """A trained network, in evaluation on the CPU, with the recipe it was built by and the input it reads."""

    recipe: Recipe
    spec: InputSpec
    model: nn.Module = field(repr=False)


def _of_run(run_dir: Path) -> Trained:
    run = read_run(run_dir)
    if run["status"] != "finished":
        why = f" ({run['error']})" if run.get("error") else ""
        raise RunError(
            f"{run_dir}: this run has not finished: it is {run['status']}{why} after {run['epochs_done']} of "
            f"{run['epochs']} epochs; resume it first"
        )
    recipe, spec = load_recipe(run_dir / "recipe.yaml"), InputSpec.from_json(run["input"])
    tree = read_checkpoint(run_dir / "checkpoints" / "final.ckpt", str(run_dir))
    return Trained(recipe, spec, restore(recipe, spec, tree, f"{run_dir}: final.ckpt"))


def _refuse_code(recipe: Any, place: Path) -> None:
    """A checkpoint is data, and comes from anywhere: it may not say which function of which package is called."""
    model = recipe.get("model") if isinstance(recipe, Mapping) else None
    name = str(model.get("name")) if isinstance(model, Mapping) else ""
    if ":" in name:
        raise RunError(
            f"{place} is of the model {name!r}, Python code that a checkpoint may not have called: give the directory of its run"
        )


def load_trained(path: str | Path, what: str = "") -> Trained:
    """The network of a finished run's directory, or of one checkpoint (``best.ckpt``, ``final.ckpt``).

    Args:
        path: directory or file; ``~`` is the home directory. The directory is trusted as a recipe is: it may name a function.
        what: the key that asks for it, in front of messages.

    Raises:
        RunError: it is not there, not finished, broken, or a checkpoint that does not tell its recipe and input, or of
            a model ``package.module:function``.
    """
    place = Path(path).expanduser()
    try:
        if place.is_dir():
            return _of_run(place)
        tree = read_checkpoint(place, what)
        if "recipe" not in tree or "input" not in tree:
            raise RunError(
                f"{place} does not tell the recipe and the input of its network: give the directory of its run, or "
                "its best.ckpt or final.ckpt"
            )
        _refuse_code(tree["recipe"], place)
        recipe, spec = parse_recipe(tree["recipe"], str(place)), InputSpec.from_json(tree["input"])
        return Trained(recipe, spec, restore(recipe, spec, tree, str(place)))
    except (RecipeError, RunError) as error:
        raise RunError(str(error) if str(error).startswith(what) else f"{what}: {error}") from None
