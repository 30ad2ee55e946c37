"""The zoo: every file fits its card, names stand for files, cards that don't fit are refused, runs become networks of the zoo."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from PIL import Image

import lowbit
from lowbit import zoo
from lowbit.packfile import FileError
from lowbit.predict import ImageError
from lowbit.train import zoo as making
from lowbit.train.data import DATASETS, DataError
from lowbit.train.data.superres import Pictures, photographs, picture_folder
from lowbit.train.evaluation import evaluate_file
from lowbit.train.export import export_run
from lowbit.train.rundir import RunError
from lowbit.train.trainer import train
from lowbit.zoo import ZooError
from test_cli import Call, call  # noqa: F401
from test_train_superres import picture
from test_train_superres import recipe as picture_recipe
from test_train_superres import write as write_pictures
from test_trainer import recipe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

NAMES = zoo.names()
CLASSIFIERS = [name for name in NAMES if zoo.load_card(name).task == "classify"]
ENLARGERS = [name for name in NAMES if zoo.load_card(name).task == "superres"]


# ------------------------------------------------------------------------------------------------ the files


@pytest.mark.parametrize("name", NAMES)
def test_every_file_fits_its_card(name: str) -> None:
    """Measured again: classifiers on the whole test set, super-resolution on the pictures that are installed here."""
    try:
        done = making.check(name)
    except DataError as error:
        pytest.skip(str(error))
    assert done.images >= 6
    assert not done.missing or done.card.task == "superres"


@pytest.mark.parametrize("name", NAMES)
def test_every_card(name: str) -> None:
    zoo.check_name(name)
    card = zoo.load_card(name)
    assert card.bytes < making.LARGEST
    assert card.seeds["values"][str(card.recipe["seed"])] == pytest.approx(card.measured["value"], abs=2e-4)
    text = (zoo.FOLDER / f"{name}.json").read_text()
    assert not any(place in text for place in ("/tmp", "/root", "/home", "/work"))
    assert re.match(r"(OMP_NUM_THREADS=1 )?lowbit (train|compare) recipes/", card.command)
    assert re.search(rf"&& lowbit zoo add runs/\S+ --name {name} ", card.command)
    assert ("lowbit bench" in card.command) == (card.time is not None)
    for kind in ("lowbit", "json"):
        assert (
            f"src/lowbit/zoo/{name}.{kind}"
            not in subprocess.run(
                ["git", "check-ignore", f"src/lowbit/zoo/{name}.{kind}"],
                cwd=Path(__file__).parent.parent,
                capture_output=True,
                text=True,
            ).stdout
        )  # what git ignores the wheel leaves out


# ------------------------------------------------------------------------------------------------ names for files


def test_three_lines(tmp_path: Path) -> None:
    """README's first example, in a process of its own, without torch."""
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    name = CLASSIFIERS[0]
    code = (
        f"import lowbit\nnet = lowbit.load({name!r})\nprint(net.classify('picture.png'))\n"
        "import sys\nassert not {'torch', 'typer', 'yaml'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    net = lowbit.load(name)
    logits = net(pixels[:, :, None])
    best = net.meta["classes"][int(logits.argmax())]
    assert done.stdout.startswith(f"(({best!r}, 0.") or done.stdout.startswith(f"(({best!r}, 1.0)")
    missing = subprocess.run(
        [sys.executable, "-c", "import sys\nsys.modules['PIL'] = None\n" + code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert missing.stderr.strip().endswith(
        "classify reads picture files with Pillow, which is not installed: pip install 'lowbit[cli]'"
    )


def test_classify() -> None:
    net = lowbit.load(CLASSIFIERS[0])
    pixels = np.random.default_rng(1).integers(0, 256, net.input_shape, np.uint8)
    found = net.classify(pixels, top=10)
    logits = net(pixels).astype(np.float64)
    assert [name for name, _ in found] == [net.meta["classes"][i] for i in np.argsort(-logits, kind="stable")]
    assert sum(share for _, share in found) == pytest.approx(1)
    assert net.classify(255 - pixels, top=1, invert=True) == found[:1]
    assert len(net.classify(pixels)) == 3
    with pytest.raises(ValueError, match="one picture: a file, or uint8 of shape"):
        net.classify(pixels.astype(np.float32))
    with pytest.raises(ValueError, match="one picture"):
        net.classify(pixels[None])
    with pytest.raises(ImageError, match="no such file"):
        net.classify("nothing.png")
    if ENLARGERS:
        with pytest.raises(ImageError, match="lowbit upscale"):
            lowbit.load(ENLARGERS[0]).classify(pixels)


def test_a_file_comes_before_the_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name, other = NAMES[0], NAMES[-1]
    assert zoo.locate(name) == zoo.FOLDER / f"{name}.lowbit"
    (tmp_path / name).mkdir()
    assert zoo.locate(name) == zoo.FOLDER / f"{name}.lowbit"  # a folder is no file
    (tmp_path / name).rmdir()
    shutil.copy(zoo.load_card(other).path, tmp_path / name)
    assert zoo.locate(name) == Path(name)
    assert lowbit.read(name).meta["recipe"] == lowbit.read(other).meta["recipe"]
    assert zoo.card_at(name) is None


@pytest.mark.parametrize("open_it", [lowbit.load, lowbit.read, zoo.locate, evaluate_file], ids=lambda f: f.__name__)
def test_names_that_are_not_there(open_it: Any) -> None:
    close = NAMES[0][:-1] + "x"
    with pytest.raises(
        FileError,
        match=f"no such file, and no network of the zoo; did you mean '{NAMES[0]}'.*The zoo has .*{NAMES[-1]}",
    ):
        open_it(close)
    if open_it is not zoo.locate:
        with pytest.raises(FileError, match="other/thing: no such file"):
            open_it("other/thing")
    for text in (f"zoo/{NAMES[0]}", f"{NAMES[0]}.lowbit", f"./x/{NAMES[0]}.lowbit"):
        with pytest.raises(FileError, match=f"the network of the zoo is named '{NAMES[0]}' alone, without a folder"):
            open_it(text)


def test_commands_take_names(call: Call, tmp_path: Path) -> None:  # noqa: F811
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    name = CLASSIFIERS[0]
    status, shown, _ = call("list", "zoo")
    assert status == 0
    for card in map(zoo.load_card, NAMES):
        assert f"{card.name} " in shown
        assert card.result.split()[0] in shown  # a narrow terminal breaks the rest
        assert f"{card.bytes / 1000:.1f}" in shown
    status, shown, _ = call("predict", name, tmp_path / "a.png", "--top", 1)
    assert status == 0
    assert lowbit.load(name).classify(pixels[:, :, None])[0][0] in shown
    status, shown, _ = call("inspect", name)
    assert status == 0
    assert f"{zoo.load_card(name).bytes:,}" in shown
    status, shown, errors = call("evaluate", name)
    if "no such file" not in errors:
        assert status == 0
        assert shown.count(zoo.load_card(name).result) == 2  # measured, and its card's
    for larger in ENLARGERS[:1]:
        Image.fromarray(picture(1, 40, 44)).save(tmp_path / "b.png")
        status, _, _ = call("upscale", larger, tmp_path / "b.png", tmp_path / "c.png")
        assert status == 0
        assert Image.open(tmp_path / "c.png").size == (88, 80)
    status, _, errors = call("predict", name[:-1], tmp_path / "a.png")
    assert status == 2
    assert f"did you mean '{name}'" in errors


# ------------------------------------------------------------------------------------------------ cards that don't fit


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo of its own with one network, ``small``."""
    place = tmp_path / "zoo"
    place.mkdir()
    name = CLASSIFIERS[0]
    shutil.copy(zoo.FOLDER / f"{name}.lowbit", place / "small.lowbit")
    card = json.loads((zoo.FOLDER / f"{name}.json").read_text())
    (place / "small.json").write_text(json.dumps({**card, "name": "small"}))
    monkeypatch.setattr(zoo, "FOLDER", place)
    assert zoo.names() == ["small"]
    zoo.load_card("small")
    return place


def change(folder: Path, **fields: Any) -> None:
    card = json.loads((folder / "small.json").read_text())
    (folder / "small.json").write_text(json.dumps({k: v for k, v in {**card, **fields}.items() if v != "DROP"}))


def refused(words: str) -> None:
    for open_it in (lowbit.load, zoo.load_card, making.check):
        with pytest.raises(ZooError, match=words):
            open_it("small")


@pytest.mark.parametrize("field", zoo._FIELDS)
def test_a_card_that_lacks_a_field(folder: Path, field: str) -> None:
    change(folder, **{field: "DROP"})
    refused(rf"^small: its card small.json lacks '{field}'; make both again")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sha256": 64 * "0"}, r"does not fit its file: the checksum \(SHA-256\) is another one"),
        ({"bytes": 7}, "does not fit its file: the file has .* bytes, the card says 7"),
        ({"bytes": True}, "no usable 'bytes'"),
        ({"bytes": 10**400}, "no usable 'bytes'"),
        ({"task": ["classify"]}, "no usable 'task'"),
        ({"seeds": {"values": {"0": math.nan}, "mean": 1, "sd": None}}, "no usable 'seeds'"),
        ({"seeds": {"values": {"0": 1}, "mean": math.inf, "sd": None}}, "no usable 'seeds'"),
        ({"seeds": {"values": {"0": 1}, "mean": 1, "sd": "1"}}, "no usable 'seeds'"),
        ({"time": {"milliseconds": 1, "batch": 0, "threads": 1, "peers": {}}}, "no usable 'time'"),
        ({"time": {"milliseconds": math.nan, "batch": 1, "threads": 1, "peers": {}}}, "no usable 'time'"),
        ({"time": {"milliseconds": 1, "batch": 1, "threads": 1, "peers": {"torch": 3}}}, "no usable 'time'"),
        ({"bytes": "7"}, "no usable 'bytes'"),
        ({"sha256": "abc"}, "no usable 'sha256'"),
        ({"title": " "}, "no usable 'title'"),
        ({"task": "detect"}, "no usable 'task'"),
        ({"time": {"milliseconds": 1}}, "no usable 'time'"),
        ({"measured": {"metric": "accuracy"}}, "no usable 'measured'"),
        (
            {"measured": {"metric": "psnr", "value": 1, "images": 1, "data": "a", "split": "test"}},
            "measures 'psnr', but",
        ),
        ({"name": "other"}, "is that of 'other'"),
        ({"format": 2}, "is no card of format 1"),
        ({"colour": "red"}, "unknown field 'colour'"),
    ],
)
def test_a_card_that_says_otherwise(folder: Path, fields: dict[str, Any], words: str) -> None:
    change(folder, **fields)
    refused(f"^small: its card.*{words}")


def test_a_card_of_another_task(folder: Path) -> None:
    pictures = [{"name": "a", "psnr": 30.0, "psnr_bicubic": 29.0}]
    measured = {"metric": "psnr", "value": 30.0, "images": 1, "data": "a", "split": "test", "bicubic": 29.0}
    for more in ({}, {"ssim": 1, "pictures": 5}, {"ssim": 1, "pictures": []}, {"pictures": pictures}):
        change(folder, task="superres", measured={**measured, **more})
        refused("needs 'bicubic', 'ssim' and 'pictures'")
    change(folder, task="superres", measured={**measured, "ssim": 0.9, "pictures": pictures})
    refused("the file's task is 'classify', the card says 'superres'")


def test_files_that_are_not_there(folder: Path) -> None:
    (folder / "small.json").rename(folder / "card")
    refused("has no card")
    (folder / "small.json").write_text("{")
    refused("can't be read")
    shutil.move(folder / "card", folder / "small.json")
    content = (folder / "small.lowbit").read_bytes()
    (folder / "small.lowbit").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused("checksum")
    (folder / "small.lowbit").unlink()
    refused(r"small.lowbit can't be read")


def test_a_result_that_is_not_the_files(folder: Path) -> None:
    card = json.loads((folder / "small.json").read_text())
    change(folder, measured={**card["measured"], "value": card["measured"]["value"] + 1e-4})
    zoo.load_card("small")
    try:
        with pytest.raises(
            ZooError, match="does not fit its file: the card says .* of 10,000 images, the engine gives"
        ):
            making.check("small")
    except DataError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"seeds": {"values": {"0": 0.9026, "1": 0.9}, "mean": 0.9026, "sd": 0.0018384776310850}},
            "the mean of its seeds is",
        ),
        ({"seeds": {"values": {"0": 0.9026, "1": 0.9}, "mean": 0.9013, "sd": None}}, "the sd of its seeds is"),
        (
            {"seeds": {"values": {"1": 0.9026}, "mean": 0.9026, "sd": None}},
            "the seed of the recipe is 0, and the seeds are 1",
        ),
        ({"seeds": {"values": {"0": 0.91}, "mean": 0.91, "sd": None}}, "of its training graph 0.9100"),
    ],
)
def test_a_card_that_does_not_fit_itself(folder: Path, fields: dict[str, Any], words: str) -> None:
    value = {"metric": "accuracy", "value": 0.9026, "images": 10_000, "data": "fashion_mnist", "split": "test"}
    change(folder, measured=value, **fields)
    zoo.load_card("small")
    with pytest.raises(ZooError, match=f"small: its card does not fit itself: .*{words}"):
        making.check("small")


def test_pictures_of_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands there for all pictures is the mean of theirs; SSIM is measured again where all of them are there."""
    if not ENLARGERS:
        pytest.skip("no network for super-resolution")
    place = tmp_path / "zoo"
    place.mkdir()
    shutil.copy(zoo.FOLDER / f"{ENLARGERS[0]}.lowbit", place / "small.lowbit")
    card = json.loads((zoo.FOLDER / f"{ENLARGERS[0]}.json").read_text())
    card["name"] = "small"
    measured = card["measured"]
    measured["pictures"] = [row for row in measured["pictures"] if row["name"] == "camera.png"]
    (row,) = measured["pictures"]
    measured |= {"images": 1, "value": row["psnr"], "bicubic": row["psnr_bicubic"]}
    seed = str(card["recipe"]["seed"])
    card["seeds"] = {"values": {seed: row["psnr"]}, "mean": row["psnr"], "sd": None}
    monkeypatch.setattr(zoo, "FOLDER", place)
    data = photographs()
    data.test = [path for path in data.test if path.stem == "camera"]
    monkeypatch.setattr(making, "load_data", lambda recipe: data)
    found = making.evaluate_pictures(making.Upscaler(place / "small.lowbit"), data, "test")
    for changes, words in (
        ({"ssim": found["ssim"]}, None),
        ({"ssim": found["ssim"] + 2e-4}, "does not fit its file: SSIM is"),
        ({"bicubic": row["psnr_bicubic"] + 1e-4}, "does not fit itself: the mean psnr_bicubic"),
        ({"value": row["psnr"] + 1e-4}, "does not fit itself: the mean psnr of"),
        ({"images": 2}, "does not fit itself: it has 1 pictures, and not 2"),
    ):
        (place / "small.json").write_text(json.dumps({**card, "measured": {**measured, **changes}}))
        if words is None:
            assert making.check("small").images == 1
            continue
        with pytest.raises(ZooError, match=words):
            making.check("small")


def test_a_picture_that_is_not_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ENLARGERS:
        pytest.skip("no network for super-resolution")
    place = tmp_path / "zoo"
    place.mkdir()
    shutil.copy(zoo.FOLDER / f"{ENLARGERS[0]}.lowbit", place / "small.lowbit")
    card = json.loads((zoo.FOLDER / f"{ENLARGERS[0]}.json").read_text())
    row = next(row for row in card["measured"]["pictures"] if row["name"] == "camera.png")
    row["psnr"] += 0.01
    card["measured"]["value"] = fmean(row["psnr"] for row in card["measured"]["pictures"])
    (place / "small.json").write_text(json.dumps({**card, "name": "small"}))
    monkeypatch.setattr(zoo, "FOLDER", place)
    data = photographs()
    data.test = [path for path in data.test if path.stem == "camera"]
    monkeypatch.setattr(making, "load_data", lambda recipe: data)
    with pytest.raises(ZooError, match="camera.png has psnr"):
        making.check("small")


# ------------------------------------------------------------------------------------------------ into the zoo


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of a tiny recipe, one exported, the other with a test result."""
    base = tmp_path_factory.mktemp("runs")
    train(recipe(train__epochs=1), base / "seed3")
    train(recipe(train__epochs=1).model_copy(update={"seed": 4}), base / "seed4", test=True)
    export_run(base / "seed3")
    return base


MORE = {"trained_by": "lowbit train tiny.yaml", "licence": "made by a test"}


def test_add(folder: Path, runs: Path) -> None:
    card = making.add_run(runs / "seed3", "tiny-one", " Stripes. ", others=[runs / "seed4"], **MORE)
    assert zoo.names() == ["small", "tiny-one"]
    assert card.path.read_bytes() == (runs / "seed3" / "model.lowbit").read_bytes()
    assert (card.title, card.task, card.time) == ("Stripes.", "classify", None)
    proof = json.loads((runs / "seed3" / "proof.json").read_text())
    assert card.measured == {
        "metric": "accuracy",
        "value": proof["accuracy_engine"],
        "images": 60,
        "data": "stripes",
        "split": "test",
    }
    assert list(card.seeds["values"]) == ["3", "4"]
    assert card.seeds["mean"] == pytest.approx(sum(card.seeds["values"].values()) / 2)
    assert (
        card.seeds["values"]["4"]
        == json.loads((runs / "seed4" / "run.json").read_text())["results"]["test"]["accuracy"]
    )
    assert card.seeds["sd"] is not None
    assert card.command.startswith(
        "lowbit train tiny.yaml && lowbit export runs/tiny-one && lowbit zoo add runs/tiny-one"
    )
    assert card.command.endswith(
        "--seeds runs/tiny-one-seed4 --trained-by 'lowbit train tiny.yaml' --licence 'made by a test' --overwrite"
    )
    assert making.check("tiny-one").images == 60
    assert lowbit.load("tiny-one").meta["recipe"] == "tiny"
    assert str(runs) not in (folder / "tiny-one.json").read_text()


def test_add_with_times(folder: Path, runs: Path, tmp_path: Path) -> None:
    place = tmp_path / "run"
    shutil.copytree(runs / "seed3", place)
    ours = {"median": 2e-3}
    bench: dict[str, Any] = {
        "format": 2,
        "sha256": hashlib.sha256((place / "model.lowbit").read_bytes()).hexdigest(),
        "network": "tiny",
        "batch": 2,
        "threads": 1,
        "isa": "scalar",
        "machine": {},
        "whole": {
            "ours": ours,
            "trusted": True,
            "peers": {"torch": {"theirs": {"median": 0.02}, "ratio": 10.0, "noisy": False}},
        },
    }
    (place / "bench.json").write_text(json.dumps(bench))
    card = making.add_run(place, "timed", "T", **MORE)
    assert card.milliseconds == "1"
    assert card.time is not None
    assert card.time["peers"] == {"torch": {"milliseconds": 20.0, "ratio": 10.0, "noisy": False}}
    assert (
        " && lowbit bench runs/timed/model.lowbit --batch 2 --peers torch --json runs/timed/bench.json && lowbit zoo add"
        in card.command
    )
    for other in ({**bench, "sha256": 64 * "0"}, {k: v for k, v in bench.items() if k != "sha256"}):
        (place / "bench.json").write_text(json.dumps(other))
        with pytest.raises(RunError, match=r"bench.json: is of another file than model.lowbit is now.*lowbit bench"):
            making.add_run(place, "timed", "T", overwrite=True, **MORE)
    assert (folder / "timed.json").is_file()


def test_what_cant_be_added(folder: Path, runs: Path, tmp_path: Path) -> None:
    run = runs / "seed3"
    for name in ("a/b", "../x", "Big", "with space", "dot.lowbit", "", "-x", "x-"):
        with pytest.raises(
            ZooError, match="lower-case words" if "/" not in name else "has a path separator: a network"
        ):
            making.add_run(run, name, "T", **MORE)
    with pytest.raises(ZooError, match="has a network of this name; replace it with --overwrite"):
        making.add_run(run, "small", "T", **MORE)
    with pytest.raises(ZooError, match="needs a title"):
        making.add_run(run, "new", " ", **MORE)
    with pytest.raises(ZooError, match="licence of the data 'stripes' is not known"):
        making.add_run(run, "new", "T", trained_by="lowbit train")
    with pytest.raises(ZooError, match="--trained-by"):
        making.add_run(run, "new", "T", licence="mine")
    with pytest.raises(RunError, match="its seed is 3, which is there already"):
        making.add_run(run, "new", "T", others=[run], **MORE)
    with pytest.raises(RunError, match="no such run directory or result file"):
        making.add_run(run, "new", "T", others=[tmp_path / "nothing.json"], **MORE)
    with pytest.raises(RunError, match="not a run directory"):
        making.add_run(tmp_path, "new", "T", **MORE)
    (tmp_path / "README.md").write_text("# words")
    (tmp_path / "bench.json").write_text('{"format": 2}')
    for file in ("README.md", "bench.json"):
        with pytest.raises(RunError, match=rf"{file}: .*; give a result file of `lowbit compare`, or a run directory$"):
            making.add_run(run, "new", "T", others=[tmp_path / file], **MORE)
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    text = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(text.replace("lr: 0.05", "lr: 0.06").replace("seed: 3", "seed: 5"))
    (copy / "proof.json").unlink()
    with pytest.raises(RunError, match=r"copy: is a run of another recipe; it differs in train\.lr$"):
        making.add_run(run, "new", "T", others=[copy], **MORE)
    for damaged in ("[]", "{}"):
        (copy / "proof.json").write_text(damaged)
        with pytest.raises(RunError, match=r"proof\.json: is .*make it again with `lowbit export"):
            making.add_run(copy, "new", "T", **MORE)
    shutil.copy(run / "proof.json", copy / "proof.json")
    (copy / "recipe.yaml").write_text(text)
    shutil.copy(folder / "small.lowbit", copy / "model.lowbit")
    with pytest.raises(RunError, match="not the file that proof.json is about"):
        making.add_run(copy, "new", "T", **MORE)
    (copy / "model.lowbit").unlink()
    with pytest.raises(RunError, match=r"has no model.lowbit; make it with `lowbit export"):
        making.add_run(copy, "new", "T", **MORE)
    assert zoo.names() == ["small"]
    assert len(list(folder.iterdir())) == 2


def test_too_large(folder: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    monkeypatch.setattr(making, "LARGEST", 1000)
    with pytest.raises(ZooError, match="the zoo takes up to 1,000"):
        making.add_run(runs / "seed3", "new", "T", **MORE)


def test_the_command_is_found(runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    own = recipe(train__epochs=1)
    assert making._recipe_file(own) is None
    (tmp_path / "recipes" / "some").mkdir(parents=True)
    (tmp_path / "recipes" / "some" / "broken.yaml").write_text("name: x")
    (tmp_path / "recipes" / "some" / "tiny.yaml").write_text(own.model_copy(update={"seed": 0}).to_yaml())
    assert making._recipe_file(own) == "recipes/some/tiny.yaml --set seed=3"
    one = making._Seed(runs / "seed3", own, 0.9, 60)
    two = making._Seed(runs / "seed4", own.model_copy(update={"seed": 4}), 0.9, 60)
    result = making._Seed(Path("results/my table/seed5.json"), own.model_copy(update={"seed": 5}), 0.9, 60)
    command = making._command([one, two, result], "n", "It's", None, None, None)
    assert command.replace("OMP_NUM_THREADS=1 ", "") == (
        "lowbit train recipes/some/tiny.yaml --set seed=3 --run-dir runs/n && "
        "lowbit train recipes/some/tiny.yaml --set seed=4 --run-dir runs/n-seed4 --test && lowbit export runs/n && "
        "lowbit zoo add runs/n --name n --title 'It'\"'\"'s' --seeds runs/n-seed4 --seeds 'results/my table/seed5.json' --overwrite"
    )
    shutil.copytree(runs / "seed3", tmp_path / "my runs" / "a;b")
    spaced = making._Seed(Path("my runs/a;b"), own, 0.9, 60)
    words = shlex.split(making._command([spaced], "n", "T", None, "free", None))
    assert words.count("my runs/a;b") == 3
    assert words[-3:] == ["--licence", "free", "--overwrite"]


def test_no_path_of_a_machine_in_a_command(runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    own = recipe(train__epochs=1)
    started = own.model_copy(update={"train": own.train.model_copy(update={"start_from": "/home/me/secret/run"})})
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "tiny.yaml").write_text(own.to_yaml())
    run = making._Seed(runs / "seed3", own, 0.9, 60)
    result = making._Seed(Path("/home/me/secret/seed4.json"), own.model_copy(update={"seed": 4}), 0.9, 60)
    for seeds, trained_by in (
        ([making._Seed(runs / "seed3", started, 0.9, 60)], None),
        ([run, result], None),
        ([run], "lowbit train x.yaml --set data.root=/home/me/secret/data"),
        ([run], "lowbit train ~/secret/x.yaml"),
    ):
        with pytest.raises(ZooError, match=r"would name .*/secret/[a-z0-9./]+, a path of this machine; .*--trained-by"):
            making._command(seeds, "n", "A/B and 3 / 4", trained_by, None, None)
    assert "--set 'train.start_from=" in making._command(
        [
            making._Seed(
                runs / "seed3",
                started.model_copy(update={"train": own.train.model_copy(update={"start_from": "runs/b"})}),
                1,
                1,
            )
        ],
        "n",
        "A/B and 3 / 4",
        None,
        None,
        None,
    )
    assert making._stored(runs / "seed3", started)["train"]["start_from"] == "run"


# ------------------------------------------------------------------------------------------------ pictures into the zoo

PICTURES: list[Path | None] = [None]
"""Where the data set below lies, once a test has put it there: last."""


@DATASETS.register("pictures_of_a_test")
def pictures_of_a_test(root: str | None = None, patch: int = 8, patches: int = 64, best_of: int = 2) -> Pictures:
    return picture_folder(root or PICTURES[-1], patch=patch, patches=patches, best_of=best_of)


@pytest.fixture(scope="module")
def enlarger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Pictures, and an exported run that was trained on them."""
    base = tmp_path_factory.mktemp("enlarger")
    write_pictures(base / "data" / "train", [f"{name}.png" for name in "abcd"])
    write_pictures(base / "data" / "test", ["t1.png", "t2.png"], height=50, width=45)
    train(picture_recipe(base / "data", train__epochs=1), base / "run")
    export_run(base / "run")
    return base / "data", base / "run"


@pytest.mark.usefixtures("folder")
def test_pictures_that_nobody_else_finds(enlarger: tuple[Path, Path]) -> None:
    with pytest.raises(
        ZooError, match=r"run: picture_folder needs data\.root: .*a card names no folder; .*fashion_mnist"
    ):
        making.add_run(enlarger[1], "mine", "T", **MORE)
    assert "mine" not in zoo.names()


def test_add_an_enlarger(folder: Path, enlarger: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = (Path(shutil.copytree(each, tmp_path / each.name)) for each in enlarger)
    text = (run / "recipe.yaml").read_text().replace(str(enlarger[0]), str(data))
    (run / "recipe.yaml").write_text(text.replace("name: picture_folder", "name: pictures_of_a_test"))
    PICTURES.append(data)
    card = making.add_run(run, "mine", "T", **MORE)
    assert (card.measured["images"], len(card.measured["pictures"])) == (2, 2)
    assert making.check("mine").images == 2
    picture = data / "test" / "t1.png"
    content = picture.read_bytes()
    picture.write_bytes(content[:200])
    with pytest.raises(DataError, match=r"1 of the test pictures can't be used \(t1\.png\); .*repair or remove"):
        making.add_run(run, "mine", "T", overwrite=True, **MORE)
    with pytest.raises(DataError, match=r"mine: can't be measured here: .*t1\.png"):
        making.check("mine")
    shutil.copy(data / "test" / "t2.png", picture)
    with pytest.raises(RunError, match=r"gives .* dB on 2 test pictures, and something else in its proof"):
        making.add_run(run, "mine", "T", overwrite=True, **MORE)
    picture.unlink()
    with pytest.raises(RunError, match=r"gives .* dB on 1 test pictures, and something else in its proof"):
        making.add_run(run, "mine", "T", overwrite=True, **MORE)
    card_then = json.loads((folder / "mine.json").read_text())
    picture.write_bytes(content)
    card_then["recipe"]["data"]["name"] = "picture_folder"
    (folder / "mine.json").write_text(json.dumps(card_then))
    with pytest.raises(DataError, match=r"mine: can't be measured here: picture_folder needs data\.root"):
        making.check("mine")


def test_commands_add_and_check(call: Call, folder: Path, runs: Path) -> None:  # noqa: F811
    arguments = ("--name", "by-command", "--title", "T", "--trained-by", "lowbit train x", "--licence", "mine")
    status, shown, errors = call("zoo", "add", runs / "seed3", *arguments)
    assert status == 0, errors
    assert "has no bench.json" in errors
    assert (folder / "by-command.lowbit").is_file()
    assert "by-command" in shown
    status, shown, _ = call("zoo", "check", "by-command")
    assert status == 0
    assert "as its card says, 60 images" in shown
    status, _, errors = call("zoo", "check", "by-comand")
    assert status == 2
    assert "by-comand: no such network in the zoo; did you mean 'by-command'? The zoo has by-command, small" in errors
    change(folder, bytes=7)
    status, shown, errors = call("zoo", "check", "small", "by-command")
    assert status == 2
    assert "by-command: " in shown, "the next one is measured all the same"
    assert "small: its card does not fit its file" in errors
    assert "1 of 2 networks" in errors
    for kind in ("zoo", ""):
        status, shown, _ = call("list", *filter(None, [kind]))
        assert status == 0
        assert "by-command" in shown
        assert "does not fit its file" in " ".join(shown.split())
    assert "isas" in shown
