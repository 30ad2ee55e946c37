"""Networks into the zoo, and every file there held against its card: what `lowbit.zoo` describes is made and measured here."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from lowbit import zoo
from lowbit.files import write_atomic
from lowbit.packfile import read
from lowbit.train.cells import FORMAT as RESULT_FORMAT
from lowbit.train.cells import measured as compared_by
from lowbit.train.data import DataError
from lowbit.train.data.superres import Pictures
from lowbit.train.evaluation import evaluate_file, evaluate_pictures
from lowbit.train.proof import DECISION_BOUND, PSNR_BOUND
from lowbit.train.recipe import ELSEWHERE, Recipe, RecipeError, differing_keys, flatten, load_recipe, parse_recipe
from lowbit.train.rundir import RunError, code_version, now, read_json, read_run
from lowbit.train.statistics import summary
from lowbit.train.trainer import load_data
from lowbit.upscale import Upscaler
from lowbit.zoo import METRICS, Card, ZooError

__all__ = ["LARGEST", "PSNR_TOLERANCE", "SSIM_TOLERANCE", "Checked", "add_run", "check"]

LARGEST: Final = 1_000_000
"""Bytes: the zoo comes with the package."""

PSNR_TOLERANCE: Final = 1e-3
"""dB. The engine gives the same numbers everywhere; what decodes a JPEG may round otherwise."""

SSIM_TOLERANCE: Final = 1e-4
"""For the same reason."""

_BENCH_FORMAT: Final = 2
_LICENCES: Final = {
    "fashion_mnist": "Fashion-MNIST: MIT",
    "photographs": "photographs of Debian's packages lomiri-wallpapers-16.04, plasma-workspace-wallpapers and mate-backgrounds: "
    "CC BY, CC BY-SA, GPL, as their copyright files say; none of them is in the file",
}

_CHANGES: Final = 4
"""Fields in which a run may differ from the recipe that its command names."""

_PATH: Final = re.compile(r"""(?:^|[\s='"\[,(])(~?/[^\s'"]+)""")
"""An absolute path in a command."""

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
        trained_by: the command that trained the run, and those in `others`; by default `lowbit train` with the recipe below ./recipes
            that the run has.
        licence: of the data; known for the data sets that come as Debian packages.
        overwrite: replace the network of that name.

    Raises:
        ZooError: an impossible name, one that is taken, a file that is too large; no command or licence is known, or the command
            names a path of this machine; data that is found in a folder of one's own alone.
        RunError: not a finished, exported run, or the file is not what the proof or the times are about; another recipe among `others`.
        DataError: the test images are not there, or some of them can't be used.
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
    stored = _stored(place, recipe)
    digest = hashlib.sha256(content).hexdigest()
    times = _times(place, digest)
    seeds = {recipe.seed: _Seed(place, recipe, *_on_test(place, proof))}
    for other in others:
        each = _other_seed(Path(other), recipe)
        if each.recipe.seed in seeds:
            raise RunError(f"{other}: its seed is {each.recipe.seed}, which is there already; give runs of other seeds")
        if each.images != seeds[recipe.seed].images:
            raise RunError(
                f"{other}: was measured on {each.images:,} test images, and {place} on {seeds[recipe.seed].images:,}; "
                "measure both on the same"
            )
        seeds[each.recipe.seed] = each
    command = _command(list(seeds.values()), name, title, trained_by, licence, times)
    found = summary([each.value for each in seeds.values()])
    version = code_version()
    card = Card(
        name,
        title.strip(),
        recipe.task,
        len(content),
        digest,
        _measure(place / "model.lowbit", recipe, proof),
        {"values": {str(seed): seeds[seed].value for seed in sorted(seeds)}, "mean": found.mean, "sd": found.sd},
        times,
        stored,
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
    keys = ("failures", "file_bytes", "decisions", "accuracy_training", "accuracy_engine")
    proof = read_json(beside, f"make it again with `lowbit export {place}`", keys=keys)
    if proof is None or not path.is_file():
        raise RunError(
            f"{place}: has no {(beside if proof is None else path).name}; make it with `lowbit export {place}`"
        )
    size = path.stat().st_size
    recipe, meta = load_recipe(place / "recipe.yaml"), read(path).meta
    same = (meta.get("recipe"), meta.get("seed"), meta.get("task")) == (recipe.name, recipe.seed, recipe.task)
    if proof["failures"] or proof["file_bytes"] != size or not same:
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
        if data.broken:
            raise DataError(
                f"{data.name}: {len(data.broken)} of the test pictures can't be used ({', '.join(data.broken[:3])}); a network of the "
                f"zoo is measured on all of them: repair or remove them, then `lowbit export {path.parent}` again"
            )
        proved = {picture["name"]: picture["psnr_engine"] for picture in proof.get("pictures") or ()}
        now = {row["name"]: row["psnr"] for row in found["pictures"]}
        if now.keys() != proved.keys() or any(abs(now[key] - proved[key]) > PSNR_TOLERANCE for key in now):
            raise RunError(
                f"{path}: gives {found['psnr']:.4f} dB on {len(now)} test pictures, and something else in its proof: it is another "
                "file, or the pictures are others; export the run again"
            )
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


@dataclass(frozen=True)
class _Seed:
    """What a seed gave on the test images: the metric of its training graph, on how many; and the run or result that says so."""

    place: Path
    recipe: Recipe
    value: float
    images: int


def _on_test(place: Path, proof: Mapping[str, Any]) -> tuple[float, int]:
    """The metric of a run's training graph on the test images, and their number."""
    if proof.get("pictures"):
        return fmean(picture["psnr_training"] for picture in proof["pictures"]), len(proof["pictures"])
    if proof["accuracy_training"] is None:
        raise RunError(f"{place}: proof.json has no accuracy; make it again with `lowbit export {place}`")
    return float(proof["accuracy_training"]), proof["decisions"]


def _other_seed(path: Path, recipe: Recipe) -> _Seed:
    """The same recipe with another seed."""
    if path.is_dir():
        run = read_run(path)
        other = load_recipe(path / "recipe.yaml")
        metric, tested = run["metric"], (run["results"] or {}).get("test")
    else:
        way_out = "give a result file of `lowbit compare`, or a run directory"
        result = read_json(path, way_out, RESULT_FORMAT, ("label", "run", "recipe", "metric", "results"))
        if result is None:
            raise RunError(f"{path}: no such run directory or result file")
        try:
            other = parse_recipe(result["recipe"], str(path))
        except RecipeError as error:
            raise RunError(str(error)) from None
        if compared_by(result)[0] != "test":
            raise RunError(f"{path}: was not measured on the test images")
        metric, tested = result["metric"], result["results"]["test"]
    keys = differing_keys(other, recipe, (*ELSEWHERE, "seed", "train.start_from", "train.distill.teacher"))
    if keys:
        raise RunError(f"{path}: is a run of another recipe; it differs in {', '.join(keys[:3])}")
    if tested is not None:
        return _Seed(path, other, float(tested[metric]), tested["images"])
    return _Seed(path, other, *_on_test(path, _exported(path)[1]))


def _times(place: Path, digest: str) -> dict[str, Any] | None:
    """What `lowbit bench` measured of the file with this checksum; None where it did not."""
    path = place / "bench.json"
    way_out = f"`lowbit bench {place / 'model.lowbit'} --json {path}`"
    tree = read_json(path, f"make it again with {way_out}", _BENCH_FORMAT, ("whole",))
    if tree is None:
        _log.warning("%s: has no bench.json, so the card has no times; %s measures them", place, way_out)
        return None
    if tree.get("sha256") != digest:  # earlier versions did not say
        raise RunError(f"{path}: is of another file than model.lowbit is now; make it again with {way_out}")
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


def _stored(place: Path, recipe: Recipe) -> dict[str, Any]:
    """The recipe without where it was trained: no path of a machine goes into a card.

    Raises:
        ZooError: its data is found in a folder of one's own alone, so nobody could check the network.
    """
    tree = recipe.plain()
    tree["data"]["root"] = None
    tree["train"] |= {"device": "auto", "workers": None}
    for section, key in ((tree["train"], "start_from"), (tree["train"]["distill"] or {}, "teacher")):
        if section.get(key) is not None and _PATH.match(section[key]):
            section[key] = Path(section[key]).name
    try:
        load_data(parse_recipe(tree))
    except DataError as error:
        raise ZooError(
            f"{place}: {error}, and a card names no folder; the zoo takes networks whose data is found without data.root, such as "
            "fashion_mnist, cifar10 and photographs"
        ) from None
    return tree


def _command(
    seeds: Sequence[_Seed],
    name: str,
    title: str,
    trained_by: str | None,
    licence: str | None,
    times: Mapping[str, Any] | None,
) -> str:
    """What makes file and card again; the run that the file is of comes first in `seeds`.

    Raises:
        ZooError: it is not known, or names a path of this machine.
    """
    place, run = seeds[0].place, _named_alike(seeds[0].place, f"runs/{name}")
    steps = [_training(seeds[0], run)] if trained_by is None else [trained_by]
    others = []
    for other in seeds[1:]:
        there = str(other.place)
        if other.place.is_dir():
            there = _named_alike(other.place, f"runs/{name}-seed{other.recipe.seed}")
            steps += [f"{_training(other, there)} --test"] if trained_by is None else []
        others.append(there)
    for text in (*steps, *others):
        if (path := _PATH.search(text)) is not None:
            raise ZooError(
                f"{place}: the command in its card would name {path[1]}, a path of this machine; give --seeds, and with --trained-by "
                "what trained the run, with paths relative to lowbit's repository"
            )
    steps.append(shlex.join(["lowbit", "export", run]))
    if times is not None:
        bench = ["lowbit", "bench", f"{run}/model.lowbit"]
        for key in ("threads", "batch"):
            bench += [f"--{key}", str(times[key])] if times[key] != 1 else []
        bench += ["--peers", ",".join(times["peers"])] if times["peers"] else []
        steps.append(shlex.join([*bench, "--json", f"{run}/bench.json"]))
    add = ["lowbit", "zoo", "add", run, "--name", name, "--title", title.strip()]
    add += [word for there in others for word in ("--seeds", there)]
    for option, value in (("--trained-by", trained_by), ("--licence", licence)):
        add += [option, value] if value is not None else []
    return " && ".join([*steps, shlex.join([*add, "--overwrite"])])


def _named_alike(run: Path, instead: str) -> str:
    """A run's name in a command: where it lies outside of the working folder, another one."""
    return instead if run.is_absolute() else str(run)


def _training(seed: _Seed, run: str) -> str:
    """The command that trained a run."""
    source = _recipe_file(seed.recipe)
    if source is None:
        raise ZooError(
            f"{seed.place}: no recipe below ./recipes is this run's; say what trained it with --trained-by 'lowbit train ...', so that "
            "the file can be made again"
        )
    threads = "OMP_NUM_THREADS=1 " if read_run(seed.place).get("machine", {}).get("threads") == 1 else ""
    return f"{threads}lowbit train {source} --run-dir {shlex.quote(run)}"


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
    return " ".join(
        [shlex.quote(str(best[0])), *(f"--set {shlex.quote(f'{key}={json.dumps(own[key])}')}" for key in best[1])]
    )


# ------------------------------------------------------------------------------------------------ against the card


@dataclass(frozen=True)
class Checked:
    """A file that fits its card: on how many images it was measured again, and what of the card could not be."""

    card: Card
    images: int
    missing: tuple[str, ...] = ()


def check(name: str) -> Checked:
    """Hold a file of the zoo against its card: size and checksum, and what was measured, measured again on the engine.

    Accuracy is equal to the last image, over the whole test set; PSNR to `PSNR_TOLERANCE` for each picture that is there, SSIM to
    `SSIM_TOLERANCE` where all of them are.

    Raises:
        ZooError: something does not fit. DataError: the test images are not there, or one of them can't be used.
    """
    card = zoo.load_card(name)
    try:
        recipe = parse_recipe(dict(card.recipe), f"{name}: the recipe of its card")
    except RecipeError as error:
        raise ZooError(str(error)) from None
    _hold_to_itself(card, recipe)
    try:
        return _check_pictures(card, recipe) if recipe.task == "superres" else _check_images(card)
    except DataError as error:
        raise DataError(f"{name}: can't be measured here: {error}") from None


def _hold_to_itself(card: Card, recipe: Recipe) -> None:
    """What a card says twice is the same."""

    def same(one: float | None, other: float | None) -> bool:
        return one == other or (one is not None and other is not None and math.isclose(one, other, rel_tol=1e-9))

    def refuse(why: str) -> ZooError:
        return ZooError(f"{card.name}: its card does not fit itself: {why}")

    measured, seeds = card.measured, card.seeds
    if recipe.task != card.task or METRICS[recipe.task] != measured["metric"]:
        raise refuse(f"the task of the recipe is {recipe.task!r}")
    own = seeds["values"].get(str(recipe.seed))
    if own is None:
        raise refuse(
            f"the seed of the recipe is {recipe.seed}, and the seeds are {', '.join(seeds['values']) or 'none'}"
        )
    apart = PSNR_BOUND + PSNR_TOLERANCE if card.task == "superres" else DECISION_BOUND
    if abs(own - measured["value"]) > apart + 1e-9:
        raise refuse(f"{measured['metric']} of the file is {measured['value']:.4f}, of its training graph {own:.4f}")
    found = summary(list(seeds["values"].values()))
    for key, value in (("mean", found.mean), ("sd", found.sd)):
        if not same(value, seeds[key]):
            raise refuse(f"the {key} of its seeds is {value}, and not {seeds[key]}")
    if card.task != "superres":
        return
    pictures = measured["pictures"]
    if len(pictures) != measured["images"]:
        raise refuse(f"it has {len(pictures)} pictures, and not {measured['images']}")
    for key, column in (("value", "psnr"), ("bicubic", "psnr_bicubic")):
        mean = fmean(picture[column] for picture in pictures)
        if not same(mean, measured[key]):
            raise refuse(f"the mean {column} of its pictures is {mean:.4f} dB, and not {measured[key]:.4f}")


def _check_images(card: Card) -> Checked:
    found = evaluate_file(card.path, split="test")
    then = (card.measured["value"], card.measured["images"])
    if (found["accuracy"], found["images"]) != then:
        raise ZooError(
            f"{card.name}: its card does not fit its file: the card says {then[0]:.4%} of {then[1]:,} images, the engine gives "
            f"{found['accuracy']:.4%} of {found['images']:,}"
        )
    return Checked(card, found["images"])


def _check_pictures(card: Card, recipe: Recipe) -> Checked:
    data = load_data(recipe)
    assert isinstance(data, Pictures)
    there = [path for path in data.test if path.is_file()]
    if not there:
        raise DataError(f"{data.name}: none of the {len(data.test)} test pictures is there; {data.way_out}")
    source = Pictures(data.name, (), (), there, data.upscale, on_broken="stop")
    found = evaluate_pictures(Upscaler(card.path), source, "test")
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
    if not then and not abs(found["ssim"] - card.measured["ssim"]) <= SSIM_TOLERANCE:
        raise ZooError(
            f"{card.name}: its card does not fit its file: SSIM is {card.measured['ssim']:.5f} there, {found['ssim']:.5f} now"
        )
    return Checked(card, found["images"], tuple(then))
