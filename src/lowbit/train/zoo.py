"""Networks into the zoo, and every file there held against its card: what `lowbit.zoo` describes is made and measured here."""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from lowbit import zoo
from lowbit.files import write_atomic
from lowbit.packfile import read
from lowbit.train.cells import measured as compared_by
from lowbit.train.cells import read_result
from lowbit.train.data import DataError
from lowbit.train.data.superres import Pictures
from lowbit.train.evaluation import evaluate_file, evaluate_pictures
from lowbit.train.recipe import ELSEWHERE, Recipe, RecipeError, differing_keys, flatten, load_recipe, parse_recipe
from lowbit.train.rundir import RunError, code_version, now, read_json, read_run
from lowbit.train.statistics import summary
from lowbit.train.trainer import load_data
from lowbit.upscale import Upscaler
from lowbit.zoo import METRICS, Card, ZooError

__all__ = ["LARGEST", "PSNR_TOLERANCE", "Checked", "add_run", "check"]

LARGEST: Final = 1_000_000
"""Bytes: the zoo comes with the package."""

PSNR_TOLERANCE: Final = 1e-3
"""dB. The engine gives the same numbers everywhere; what decodes a JPEG may round otherwise."""

_BENCH_FORMAT: Final = 2
_LICENCES: Final = {
    "fashion_mnist": "Fashion-MNIST: MIT",
    "photographs": "photographs of Debian's packages lomiri-wallpapers-16.04, plasma-workspace-wallpapers and mate-backgrounds: "
    "CC BY, CC BY-SA, GPL, as their copyright files say; none of them is in the file",
}

_CHANGES: Final = 4
"""Fields in which a run may differ from the recipe that its command names."""

_log = logging.getLogger("lowbit.train")


# ------------------------------------------------------------------------------------------------ into the zoo


def add_run(
    run_dir: str | Path,
    name: str,
    title: str,
    *,
    others: Sequence[str | Path] = (),
    trained_by: str | None = None,
    licence: str | None = None,
    overwrite: bool = False,
) -> Card:
    """Put an exported run into the zoo: its file, and a card with what is measured here and now.

    The file is measured on the engine, on all test images; ``RUN/bench.json`` gives the times, where it is there.

    Args:
        run_dir: a finished run with ``model.lowbit`` and ``proof.json``, as `lowbit export` leaves them.
        name: what it is called from now on, see `lowbit.zoo.check_name`.
        title: what it is, in a sentence.
        others: the same recipe with other seeds: run directories, or result files of `lowbit compare`.
        trained_by: the command that trained the run; by default `lowbit train` with the recipe below ./recipes that the run has.
        licence: of the data; known for the data sets that come as Debian packages.
        overwrite: replace the network of that name.

    Raises:
        ZooError: an impossible name, one that is taken, a file that is too large; no command or licence is known.
        RunError: not a finished, exported run, or the file is not what the proof is about; another recipe among `others`.
        DataError: the test images are not there.
    """
    zoo.check_name(name)
    if not title.strip():
        raise ZooError(f"{name}: a network of the zoo needs a title, a sentence that says what it is")
    if name in zoo.names() and not overwrite:
        raise ZooError(f"{name}: the zoo has a network of this name; replace it with --overwrite")
    place = Path(run_dir)
    recipe, proof = _exported(place)
    content = (place / "model.lowbit").read_bytes()
    if len(content) > LARGEST:
        raise ZooError(f"{place}: model.lowbit has {len(content):,} bytes; the zoo takes up to {LARGEST:,}")
    if licence is None and recipe.data.name not in _LICENCES:
        raise ZooError(f"{place}: the licence of the data {recipe.data.name!r} is not known; give it with --licence")
    command = _command(place, recipe, name, title, trained_by)
    seeds = {recipe.seed: _on_test(place, proof)}
    for other in others:
        seed, value = _other_seed(Path(other), recipe)
        if seed in seeds:
            raise RunError(f"{other}: its seed is {seed}, which is there already; give runs of other seeds")
        seeds[seed] = value
    found = summary(list(seeds.values()))
    version = code_version()
    card = Card(
        name,
        title.strip(),
        recipe.task,
        len(content),
        hashlib.sha256(content).hexdigest(),
        _measure(place / "model.lowbit", recipe, proof),
        {"values": {str(seed): seeds[seed] for seed in sorted(seeds)}, "mean": found.mean, "sd": found.sd},
        _times(place, recipe),
        _stored(recipe),
        command,
        licence or _LICENCES[recipe.data.name],
        {"date": now()[:10], "lowbit": version["lowbit"], "commit": version["commit"]},
    )
    write_atomic(zoo.FOLDER / f"{name}.lowbit", content)
    text = json.dumps(card.to_json(), indent=1, ensure_ascii=False) + "\n"
    write_atomic(zoo.FOLDER / f"{name}.json", text.encode())
    return zoo.load_card(name)


def _exported(place: Path) -> tuple[Recipe, dict[str, Any]]:
    """The recipe and the proof of an exported run, whose file is the one that was proved."""
    run = read_run(place)
    if run["status"] != "finished":
        raise RunError(f"{place}: this run has not finished; go on with `lowbit train {place} --resume`")
    path, beside = place / "model.lowbit", place / "proof.json"
    proof = read_json(beside, f"make it again with `lowbit export {place}`")
    if proof is None or not path.is_file():
        raise RunError(
            f"{place}: has no {(beside if proof is None else path).name}; make it with `lowbit export {place}`"
        )
    size = path.stat().st_size
    recipe, meta = load_recipe(place / "recipe.yaml"), read(path).meta
    same = (meta.get("recipe"), meta.get("seed"), meta.get("task")) == (recipe.name, recipe.seed, recipe.task)
    if proof.get("failures") or proof.get("file_bytes") != size or not same:
        raise RunError(
            f"{place}: model.lowbit is not the file that proof.json is about; `lowbit export {place}` makes both again"
        )
    return recipe, proof


def _measure(path: Path, recipe: Recipe, proof: Mapping[str, Any]) -> dict[str, Any]:
    """What the file itself gives on the test images, with the engine."""
    data = load_data(recipe)
    if not data.has_test:
        raise DataError(f"{data.name}: has no test images, which a network of the zoo is measured on")
    about = {"data": recipe.data.name, "split": "test"}
    if recipe.task == "superres":
        assert isinstance(data, Pictures)
        found = evaluate_pictures(Upscaler(path), data, "test")
        pictures = [{key: row[key] for key in ("name", "psnr", "psnr_bicubic")} for row in found["pictures"]]
        measured = {"metric": "psnr", "value": found["psnr"], "images": found["images"], **about}
        return {**measured, "bicubic": found["psnr_bicubic"], "ssim": found["ssim"], "pictures": pictures}
    found = evaluate_file(path, split="test")
    if found["accuracy"] != proof["accuracy_engine"]:
        raise RunError(
            f"{path}: answers {found['accuracy']:.2%} of the test images, and {proof['accuracy_engine']:.2%} in its proof: it is another "
            "file, or the images are others; export the run again"
        )
    return {"metric": "accuracy", "value": found["accuracy"], "images": found["images"], **about}


def _on_test(place: Path, proof: Mapping[str, Any]) -> float:
    """The metric of a run's training graph on the test images."""
    if proof.get("pictures"):
        return fmean(picture["psnr_training"] for picture in proof["pictures"])
    if proof.get("accuracy_training") is None:
        raise RunError(f"{place}: proof.json has no accuracy; make it again with `lowbit export {place}`")
    return float(proof["accuracy_training"])


def _other_seed(path: Path, recipe: Recipe) -> tuple[int, float]:
    """Seed and metric of the same recipe with another seed."""
    if path.is_dir():
        run = read_run(path)
        other = load_recipe(path / "recipe.yaml")
        tested = (run["results"] or {}).get("test")
        if tested is not None:
            value = float(tested[run["metric"]])
        else:
            other, proof = _exported(path)
            value = _on_test(path, proof)
    else:
        result = read_result(path)
        if result is None:
            raise RunError(f"{path}: no such run directory or result file")
        try:
            other = parse_recipe(result["recipe"], str(path))
        except RecipeError as error:
            raise RunError(str(error)) from None
        split, value = compared_by(result)
        if split != "test":
            raise RunError(f"{path}: was not measured on the test images")
    keys = differing_keys(other, recipe, (*ELSEWHERE, "seed", "train.start_from", "train.distill.teacher"))
    if keys:
        raise RunError(f"{path}: is a run of another recipe; it differs in {', '.join(keys[:3])}")
    return other.seed, value


def _times(place: Path, recipe: Recipe) -> dict[str, Any] | None:
    path = place / "bench.json"
    way_out = f"`lowbit bench {place / 'model.lowbit'} --json {path}`"
    tree = read_json(path, f"make it again with {way_out}", _BENCH_FORMAT, ("network", "whole"))
    if tree is None:
        _log.warning("%s: has no bench.json, so the card has no times; %s measures them", place, way_out)
        return None
    if tree["network"] != recipe.name:
        raise RunError(f"{path}: is of another network, {tree['network']!r}; make it again with {way_out}")
    whole = tree["whole"]
    try:
        peers = {
            name: {"milliseconds": 1e3 * peer["theirs"]["median"], "ratio": peer["ratio"], "noisy": peer["noisy"]}
            for name, peer in whole["peers"].items()
        }
        return {
            "milliseconds": 1e3 * whole["ours"]["median"],
            **{key: tree[key] for key in ("batch", "threads", "isa", "machine")},
            "trusted": whole["trusted"],
            "peers": peers,
        }
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: is damaged ({error}); make it again with {way_out}") from None


def _stored(recipe: Recipe) -> dict[str, Any]:
    """The recipe without where it was trained: no path of a machine goes into a card."""
    tree = recipe.plain()
    tree["data"]["root"] = None
    tree["train"] |= {"device": "auto", "workers": None}
    for section, key in ((tree["train"], "start_from"), (tree["train"]["distill"] or {}, "teacher")):
        if section.get(key) is not None and Path(section[key]).expanduser().is_absolute():
            section[key] = Path(section[key]).name
    return tree


def _command(place: Path, recipe: Recipe, name: str, title: str, trained_by: str | None) -> str:
    run = Path("runs") / name if place.is_absolute() else place
    if trained_by is None:
        source = _recipe_file(recipe)
        if source is None:
            raise ZooError(
                f"{place}: no recipe below ./recipes is this run's; say what trained it with --trained-by 'lowbit train ...', so that "
                "the file can be made again"
            )
        threads = "OMP_NUM_THREADS=1 " if read_run(place).get("machine", {}).get("threads") == 1 else ""
        trained_by = f"{threads}lowbit train {source} --run-dir {run}"
    add = f"lowbit zoo add {run} --name {name} --title {shlex.quote(title.strip())} --overwrite"
    return f"{trained_by} && lowbit export {run} && {add}"


def _recipe_file(recipe: Recipe) -> str | None:
    """The file below ./recipes that says the same, or nearly so, and the --set for what it says otherwise."""
    own = dict(flatten(recipe.plain()))
    best: tuple[Path, list[str]] | None = None
    for path in sorted(Path("recipes").rglob("*.yaml")):
        if path.parent.name == "tables":
            continue
        try:
            keys = differing_keys(load_recipe(path), recipe, ELSEWHERE)
        except RecipeError:
            continue
        plain = all(isinstance(own.get(key), str | int | float | bool) for key in keys)
        if plain and len(keys) <= _CHANGES and (best is None or len(keys) < len(best[1])):
            best = path, keys
    if best is None:
        return None
    return " ".join([str(best[0]), *(f"--set {shlex.quote(f'{key}={json.dumps(own[key])}')}" for key in best[1])])


# ------------------------------------------------------------------------------------------------ against the card


@dataclass(frozen=True)
class Checked:
    """A file that fits its card: on how many images it was measured again, and what of the card could not be."""

    card: Card
    images: int
    missing: tuple[str, ...] = ()


def check(name: str) -> Checked:
    """Hold a file of the zoo against its card: size and checksum, and what was measured, measured again on the engine.

    Accuracy is equal to the last image, over the whole test set; PSNR to `PSNR_TOLERANCE` for each picture that is there.

    Raises:
        ZooError: something does not fit. DataError: no test images are there.
    """
    card = zoo.load_card(name)
    try:
        recipe = parse_recipe(dict(card.recipe), f"{name}: the recipe of its card")
    except RecipeError as error:
        raise ZooError(str(error)) from None
    if recipe.task != card.task or METRICS[recipe.task] != card.measured["metric"]:
        raise ZooError(f"{name}: its card does not fit itself: the task of the recipe is {recipe.task!r}")
    if recipe.task == "superres":
        return _check_pictures(card, recipe)
    found = evaluate_file(card.path, split="test")
    then = (card.measured["value"], card.measured["images"])
    if (found["accuracy"], found["images"]) != then:
        raise ZooError(
            f"{name}: its card does not fit its file: the card says {then[0]:.4%} of {then[1]:,} images, the engine gives "
            f"{found['accuracy']:.4%} of {found['images']:,}"
        )
    return Checked(card, found["images"])


def _check_pictures(card: Card, recipe: Recipe) -> Checked:
    data = load_data(recipe)
    assert isinstance(data, Pictures)
    there = [path for path in data.test if path.is_file()]
    if not there:
        raise DataError(f"{data.name}: none of the {len(data.test)} test pictures is there; {data.way_out}")
    found = evaluate_pictures(Upscaler(card.path), Pictures(data.name, (), (), there, data.upscale), "test")
    then = {picture["name"]: picture for picture in card.measured["pictures"]}
    for row in found["pictures"]:
        before = then.pop(row["name"], None)
        if before is None:
            raise ZooError(f"{card.name}: its card does not fit its file: it says nothing of the picture {row['name']}")
        for key in ("psnr", "psnr_bicubic"):
            if not abs(row[key] - before[key]) <= PSNR_TOLERANCE:
                raise ZooError(
                    f"{card.name}: its card does not fit its file: {row['name']} has {key} {before[key]:.4f} dB there, "
                    f"{row[key]:.4f} dB now"
                )
    mean = fmean(picture["psnr"] for picture in card.measured["pictures"])
    if (
        not abs(mean - card.measured["value"]) <= PSNR_TOLERANCE
        or len(card.measured["pictures"]) != card.measured["images"]
    ):
        raise ZooError(f"{card.name}: its card does not fit itself: the mean of its pictures is {mean:.4f} dB")
    return Checked(card, found["images"], tuple(then))
