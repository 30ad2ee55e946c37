"""The best bits of each layer for a budget, by the losses that `lowbit.train.sensitivity` measured, as a recipe that trains.

The losses of single layers are added up, as mixed-precision searches by sensitivity do (Dong et al., ICCV 2019, arXiv 1905.03696;
Hubara et al., ICML 2021, arXiv 2006.10518, who choose by an integer programme as well). The sum is a prediction; the mixed
network's own loss is measured beside it, in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from lowbit.train.data import DataSource
from lowbit.train.layers import quantized_layers
from lowbit.train.network import build_network, load_trained
from lowbit.train.recipe import Recipe, assign_text, parse_recipe
from lowbit.train.rundir import RunError, RunLock, write_json, write_text
from lowbit.train.sensitivity import RESULT, Bits, Images, Network, Report, mean_and_error, size_of
from lowbit.train.start import read_start
from lowbit.train.trainer import load_data
from lowbit.train.units import unit

__all__ = ["Budget", "BudgetError", "Choice", "best_choice", "propose"]

_ROUNDS: Final = 8
"""Corrections of a budget: a mixed network's file differs by a few bytes from the sum of its layers' parts."""

_TRAIN: Final = {
    "optimizer": "adam",
    "lr": 2e-3,
    "weight_decay": 0.0,
    "latent_lr_scale": 1.0,
    "latent_weight_decay": 0.0,
    "lr_schedule": "cosine",
    "milestones": (),
    "warmup": 0.0,
    "grad_clip": None,
}
"""What a recipe that starts from a float run trains with: Adam, as one rate has to do for latent and float weights."""


class BudgetError(ValueError):
    """No choice of bits keeps the budget; the message says what can be had."""


@dataclass(frozen=True)
class Choice:
    """One possibility for a layer: the bits, what they are predicted to cost, and what they take."""

    bits: Bits
    loss: float
    bytes: float
    seconds: float | None


@dataclass(frozen=True)
class Budget:
    """What a network may have: bytes of the file, seconds of the engine for an input, loss (accuracy 0..1, or dB).

    With ``bytes`` or ``seconds`` the loss is made as small as possible, with ``loss`` alone the file.
    """

    bytes: float | None = None
    seconds: float | None = None
    loss: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.bytes, self.seconds, self.loss) if value is not None]
        if not given or any(not value > 0 for value in given):
            raise BudgetError("a budget is bytes, milliseconds or a loss above 0")


def best_choice(
    layers: Mapping[str, Sequence[Choice]], budget: Budget, rest: Choice | None = None
) -> dict[str, Choice]:
    """One choice for each layer: an integer programme, solved to the end.

    minimise sum_l loss(l, c_l), subject to sum_l bytes(l, c_l) <= bytes, sum_l seconds(l, c_l) <= seconds, sum_l loss(l, c_l) <= loss;
    without bytes and seconds minimise sum_l bytes(l, c_l). A loss below 0 is noise, and counts as 0. Of equal sums the one with fewer
    bytes is taken.

    Args:
        layers: what each can have.
        budget: see there.
        rest: bytes and seconds of the network that no layer has.

    Raises:
        BudgetError: nothing keeps the budget.
    """
    names = [name for name, choices in layers.items() for _ in choices]
    flat = [choice for choices in layers.values() for choice in choices]
    losses = np.array([max(choice.loss, 0.0) for choice in flat])
    sizes = np.array([choice.bytes for choice in flat])
    limits: list[tuple[str, np.ndarray[Any, Any], float]] = []
    if budget.bytes is not None:
        limits.append(("bytes", sizes, budget.bytes - (rest.bytes if rest else 0)))
    if budget.seconds is not None:
        if any(choice.seconds is None for choice in flat):
            raise BudgetError("a budget of time needs the layers' times: measure them (without --no-time)")
        times = np.array([choice.seconds for choice in flat], np.float64)
        limits.append(("time", times, budget.seconds - ((rest.seconds or 0) if rest else 0)))
    if budget.loss is not None:
        limits.append(("loss", losses, budget.loss))
    one_each = np.array([[float(name == layer) for name in names] for layer in layers])
    constraints = [LinearConstraint(one_each, 1, 1)]
    for _, cost, limit in limits:
        scale = float(np.abs(cost).max()) or 1.0
        constraints.append(LinearConstraint(cost[None] / scale, -np.inf, limit / scale))
    small = sizes / (sizes.max() * len(layers) or 1.0)
    goal = small if budget.bytes is None and budget.seconds is None else losses / (losses.max() or 1.0) + 1e-6 * small
    found = milp(
        goal, integrality=np.ones(len(flat)), bounds=Bounds(0, 1), constraints=constraints, options={"mip_rel_gap": 0}
    )
    if found.x is None:
        raise BudgetError(_why_not(layers, budget, rest))
    return {name: choice for name, choice, taken in zip(names, flat, found.x, strict=True) if taken > 0.5}


def _why_not(layers: Mapping[str, Sequence[Choice]], budget: Budget, rest: Choice | None) -> str:
    smallest = sum(min(choice.bytes for choice in choices) for choices in layers.values()) + (rest.bytes if rest else 0)
    parts = [f"the smallest network of the bits that were measured has {smallest:,.0f} bytes"]
    if budget.seconds is not None:
        fastest = sum(min(choice.seconds or 0 for choice in choices) for choices in layers.values())
        parts.append(f"the fastest takes {1e3 * (fastest + ((rest.seconds or 0) if rest else 0)):.3g} ms")
    wanted = [
        text
        for value, text in (
            (budget.bytes, f"{budget.bytes or 0:,.0f} bytes"),
            (budget.seconds, f"{1e3 * (budget.seconds or 0):.3g} ms"),
            (budget.loss, f"a loss of {budget.loss or 0:.4g}"),
        )
        if value is not None
    ]
    return f"no choice of bits keeps {' and '.join(wanted)}: {', '.join(parts)}; measure fewer bits (--bits), or allow more"


# ------------------------------------------------------------------------------------------------ the proposal


def propose(
    run_dir: str | Path,
    tree: dict[str, Any],
    budget: Budget,
    output: str | Path | None = None,
    *,
    changes: Sequence[str] = (),
    data: DataSource | None = None,
    on_progress: Report | None = None,
) -> dict[str, Any]:
    """Choose bits for a budget and write the recipe; the proposal goes into ``RUN/sensitivity.json`` too.

    The recipe is the run's with ``quantize.overrides``. Of a float run it starts from the run's weights (``train.start_from``) and
    trains with Adam as long as the run did; of a low-bit run it keeps the run's training and starts from its weights where they are real.

    Args:
        run_dir: the run.
        tree: what `lowbit.train.sensitivity.measure` gave.
        budget: see there.
        output: the recipe; by default ``RUN/mixed.yaml``.
        changes: ``key=value`` for the recipe, as --set takes them.
        data: the run's data set; by default the recipe's own.
        on_progress: called with (stage, done, total).

    Returns:
        ``budget, bits`` (by layer), ``predicted, loss, standard_error`` (the sum of the layers' losses; the mixed network's own, after
        the same steps), ``bytes, seconds`` (of that network), ``recipe`` (the file).

    Raises:
        BudgetError: nothing keeps the budget. RecipeError: `changes` that can't be.
    """
    with RunLock(Path(run_dir)) as lock:
        lock.take()
        return _propose(Path(run_dir), tree, budget, output, changes, data, on_progress or (lambda *_: None))


def _propose(
    place: Path,
    tree: dict[str, Any],
    budget: Budget,
    output: str | Path | None,
    changes: Sequence[str],
    data: DataSource | None,
    report: Report,
) -> dict[str, Any]:
    path = Path(output) if output is not None else place / "mixed.yaml"
    if not path.parent.is_dir():
        raise RunError(f"{path}: there is no directory {path.parent}")
    trained = load_trained(place)
    net = Network(trained, str(place))
    settings = tree["settings"]
    here = Images(net.recipe, net.spec, data or load_data(net.recipe), settings["images"], settings["steps"])
    net.look_at_inputs(here.example)
    layers, rest = _choices(net, tree)
    best_choice(layers, budget, rest)  # whether there is one
    report("the mixed network", 0, 3)
    kept, picked = budget, {}
    timed = tree["network"]["trained"]["seconds"] is not None
    for _ in range(_ROUNDS):
        picked = best_choice(layers, kept, rest)
        bits = {name: choice.bits for name, choice in picked.items()}
        recipe = _recipe(place, net, bits, changes)
        model = net.changed(bits, here.example)
        size = size_of(model, here, list(net.layers), timed, recipe)
        more_bytes = size.bytes - budget.bytes if budget.bytes is not None else 0.0
        more_time = (size.seconds or 0) - budget.seconds if budget.seconds is not None else 0.0
        if more_bytes <= 0 and more_time <= 0:
            break
        kept = Budget(
            None if kept.bytes is None else kept.bytes - max(more_bytes, 0),
            None if kept.seconds is None else kept.seconds - max(more_time, 0),
            budget.loss,
        )
    else:
        raise BudgetError(
            f"{place}: no mixed network keeps this budget when it is frozen: the nearest has {size.bytes:,} bytes"
            + ("" if size.seconds is None else f" and takes {1e3 * size.seconds:.3g} ms")
        )
    report("the mixed network", 1, 3)
    before = here.reference(net)
    report("the mixed network", 2, 3)
    loss, error = mean_and_error(before - here.answers(net, bits))
    build_network(recipe, net.spec, None if recipe.train.start_from is None else read_start(recipe.train.start_from))
    proposal = {
        "budget": {"bytes": budget.bytes, "seconds": budget.seconds, "loss": budget.loss},
        "bits": {name: str(chosen) for name, chosen in bits.items()},
        "predicted": sum(max(choice.loss, 0.0) for choice in picked.values()),
        "loss": loss,
        "standard_error": error,
        "bytes": size.bytes,
        "seconds": size.seconds,
        "recipe": path.name,
    }
    write_text(path, _header(net.recipe, proposal, tree["metric"]) + recipe.to_yaml())
    tree["proposal"] = proposal
    write_json(place / RESULT, tree)
    report("the mixed network", 3, 3)
    return {**proposal, "recipe": str(path)}


def _choices(net: Network, tree: Mapping[str, Any]) -> tuple[dict[str, list[Choice]], Choice]:
    """What was measured of each layer, and the bits it was trained with; what of the network no layer has."""
    layers = {}
    for row in tree["layers"]:
        found = [Choice(net.layers[row["name"]], 0.0, row["bytes"], row["seconds"])]
        for key, at in row["bits"].items():
            if "loss" in at:
                found.append(Choice(Bits(*map(int, key.split("/"))), at["loss"], at["bytes"], at["seconds"]))
        layers[row["name"]] = found
    whole = tree["network"]["trained"]
    own = [choices[0] for choices in layers.values()]
    seconds = None if whole["seconds"] is None else whole["seconds"] - sum(choice.seconds or 0 for choice in own)
    return layers, Choice(Bits(32, 32), 0.0, whole["bytes"] - sum(choice.bytes for choice in own), seconds)


def _recipe(place: Path, net: Network, bits: Mapping[str, Bits], changes: Sequence[str]) -> Recipe:
    tree = net.recipe.plain()
    q = net.recipe.quantize
    overrides = net.overrides(bits)
    tree["name"] = f"{net.recipe.name}-mixed"
    tree["description"] = f"{net.recipe.name} with the bits of each layer that lowbit sensitivity proposed."
    tree["quantize"]["overrides"] = {**{k: v for k, v in q.overrides.items() if k not in overrides}, **overrides}
    trained = dict(quantized_layers(net.model))
    if all(layer.weight_quantizer.bits in (8, 32) for layer in trained.values()):
        tree["train"] |= {**_TRAIN, "milestones": [], "start_from": str(place)}
    elif all(trained[name].weight_quantizer.real_latent for name in overrides if name in trained):
        tree["train"]["start_from"] = str(place)
    for change in changes:
        assign_text(tree, change)
    return parse_recipe(tree, f"{place}: the proposed recipe")


def _header(recipe: Recipe, proposal: Mapping[str, Any], metric: str) -> str:
    name, factor, _ = unit(metric)
    what = "points" if name == "%" else name
    time = "" if proposal["seconds"] is None else f", {1e3 * proposal['seconds']:.3g} ms on the engine"
    return (
        f"# Proposed by `lowbit sensitivity` for {recipe.name}: {proposal['bytes']:,} bytes{time}.\n"
        f"# The layers' losses add up to {factor * proposal['predicted']:.2f} {what}; this network, fine-tuned as they were, loses "
        f"{factor * proposal['loss']:.2f} +- {factor * proposal['standard_error']:.2f}\n"
        "# (standard error), before it is trained.\n"
    )
