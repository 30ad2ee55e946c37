"""The recipes and tables that ship: each parses, each builds its network, each cell of the papers' tables trains, exports and proves.

Training is two steps on generated images of the official layouts, through ``lowbit train`` and ``lowbit export``: narrow
networks on small images here, the networks as published, at full size, marked slow (``make test-recipes``).
"""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from generated import shortened, write_cifar, write_imagenet
from lowbit import cli
from lowbit.train.data import cifar
from lowbit.train.data.shards import write_shards
from lowbit.train.network import build_network
from lowbit.train.recipe import (
    AugmentConfig,
    DistillConfig,
    QuantizeConfig,
    ScheduleConfig,
    TrainConfig,
    load_recipe,
    parse_recipe,
)
from lowbit.train.rundir import InputSpec, columns
from lowbit.train.space import load_space
from lowbit.train.table import Cell, load_table
from lowbit.train.tasks import TASKS
from lowbit.train.trainer import load_data

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "recipes"
TABLES = sorted((FOLDER / "tables").glob("*.yaml"))
PAPERS = [path for start in ("slb-", "lns-", "compared-") for path in TABLES if path.stem.startswith(start)]
SPACES = sorted((FOLDER / "search").glob("*.yaml"))
RECIPES = sorted(path for path in FOLDER.rglob("*.yaml") if path not in TABLES + SPACES)

pytestmark = pytest.mark.filterwarnings("ignore:LNS with rho_plus = 0.2:UserWarning")


def _id(path: Path) -> str:
    return str(path.relative_to(FOLDER))


# ------------------------------------------------------------------------------------------------ every file


@pytest.mark.parametrize("path", SPACES, ids=_id)
def test_every_space_has_trials_that_can_be_built(path: Path) -> None:
    """The first and ten by chance; ``load_space`` has tried every value."""
    space = load_space(path)
    assert space.name == path.stem, "a space has the name of its file"
    assert space.table not in {table.stem for table in TABLES}, (
        "the table that it writes replaces no other one's results"
    )
    assert space.config.description
    draw = random.Random(1)
    drawn = [{name: draw.choice(d.ends) for name, d in space.dimensions.items()} for _ in range(10)]
    for params in (space.first, *drawn):
        for cell in space.cell(params).with_needs():
            data = InputSpec(1, 28, 28, (73,), 1 / 90, tuple(map(str, range(10))))
            build_network(cell.recipe, data)


@pytest.mark.parametrize("path", RECIPES, ids=_id)
def test_every_recipe_builds_its_network(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem, "a recipe has the name of its file"
    assert recipe.description
    spec = InputSpec.of(load_data(recipe))
    model = build_network(recipe, spec)
    shape, _ = TASKS.get(recipe.task).of(recipe, spec).output_shape(spec)
    with torch.no_grad():
        assert model.eval()(spec.example(2)).shape == (2, *shape)


@pytest.mark.parametrize("path", RECIPES, ids=_id)
def test_resolved_recipes_read_back_equal(path: Path) -> None:
    recipe = load_recipe(path)
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_the_page_on_recipes_is_right(tmp_path: Path) -> None:
    """Its examples are read, and it names every key."""
    text = (ROOT / "docs" / "RECIPES.md").read_text(encoding="utf-8")
    recipe, table, space = (block.partition("```")[0] for block in text.split("```yaml\n")[1:])
    parse_recipe(yaml.safe_load(recipe))
    path = tmp_path / "mine-on-cifar10.yaml"
    path.write_text(table)
    cells = load_table(path).cells()
    assert {"1/1", "1/2", "2/2", "float", "dorefa", "lns", "mine"} == {cell.label for cell in cells}
    assert len(load_table(path).tries()) == 3 * 7
    path = tmp_path / "mine.yaml"
    path.write_text(space)
    assert load_space(path).name == "mine"
    sections = [QuantizeConfig, AugmentConfig, TrainConfig, DistillConfig, ScheduleConfig]
    keys = {key for section in sections for key in section.model_fields} | set(columns("accuracy"))
    assert [
        key for key in sorted(keys) if f"`{key}`" not in text and f" {key}," not in text and f", {key}`" not in text
    ] == []


def test_names_are_unique() -> None:
    names = [path.stem for path in (*RECIPES, *TABLES)]
    assert len(set(names)) == len(names)
    assert names


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_cell_of_every_table_resolves(path: Path) -> None:
    table = load_table(path)
    assert table.name == path.stem, "a table has the name of its file"
    assert table.config.title
    assert table.config.description
    cells = table.cells()
    assert len(cells) >= len(table.labels)
    assert {cell.label for cell in cells} == set(table.labels)
    for cell in table.cells(1):
        read = parse_recipe(yaml.safe_load(cell.recipe.to_yaml()))
        assert read == cell.recipe
    published = table.config.published
    assert published is None or all(published.on(cell.recipe.data.name) for cell in cells)


BITS = ("1/1", "1/2", "1/4", "1/8", "1/32", "2/2", "2/4", "2/8", "2/32", "4/4", "4/8", "4/32")
PUBLISHED = {  # SLB's tables, and the authors' later runs
    "slb-vgg-small-cifar10": (
        (92.0, 93.4, 93.5, 93.8, 93.8, 93.5, 93.9, 94.0, 94.0, 93.8, 94.0, 94.1),
        (92.4, 93.3, 93.8, 93.8, 93.7, 93.7, 93.9, 94.0, 94.0, 93.8, 94.0, 94.1),
    ),
    "slb-resnet20-cifar10": (
        (85.5, 89.5, 90.3, 90.5, 90.6, 90.6, 91.3, 91.7, 92.0, 91.6, 91.8, 92.1),
        (86.2, 89.7, 90.3, 90.6, 91.0, 90.8, 91.5, 91.6, 91.8, 91.5, 92.0, 92.2),
    ),
    "slb-bireal-resnet18-imagenet": (
        (61.3, 64.8, 66.0, 66.2, 67.1, 66.1, 67.5, 68.2, 68.4),
        (61.5, 64.9, 66.5, 66.8, 66.9, 66.7, 68.0, 68.4, 68.6),
    ),
}
SETTINGS = {  # optimizer, lr, weight decay of weights and of logits, batch, epochs
    "slb-vgg-small-cifar10": ("sgd", 0.02, 5e-4, 5e-4, 100, 500),
    "slb-resnet20-cifar10": ("sgd", 0.1, 1e-4, 1e-4, 100, 500),
    "slb-bireal-resnet18-imagenet": ("adam", 1e-3, 0, 0, 256, 240),
}


def test_the_33_cells_of_slb() -> None:
    """Bits, published accuracy, settings and the temperature's schedule of every cell, as the paper has them."""
    count = 0
    for name, (values, runs) in PUBLISHED.items():
        table = load_table(FOLDER / "tables" / f"{name}.yaml")
        published = table.config.published
        assert published is not None
        labels = BITS[: len(values)]
        assert sorted(table.labels) == sorted(labels)
        assert published.values == dict(zip(labels, values, strict=True))
        assert published.runs == dict(zip(labels, runs, strict=True))
        for cell in table.cells(1):
            q, s, t = cell.recipe.quantize, cell.recipe.schedule, cell.recipe.train
            weights, activations = map(int, cell.label.split("/"))
            assert (q.weight_bits, q.activation_bits, q.method, q.edges) == (weights, activations, "slb", "float")
            # 1.03 for one bit, 1.04 for 1/32 and two, 1.05 for 2/32 and four, 1.06 for 4/32; ImageNet 1.05
            level = {1: 0, 2: 1, 4: 2}[weights] + (activations == 32)
            speed = 1.05 if "imagenet" in name else (1.03, 1.04, 1.05, 1.06)[level]
            assert (s.speed, s.start, s.end, s.every) == (speed, 0.3 if "vgg" in name else 0.4, 0.9, "epoch")
            found = (t.optimizer, t.lr, t.weight_decay, t.latent_weight_decay, t.batch_size, t.epochs)
            assert found == SETTINGS[name]
            count += 1
    assert count == 33


def test_the_cells_of_lns() -> None:
    """Published accuracy and settings of both LNS tables, as the paper has them; theta's epochs come in front."""
    small, large = (load_table(FOLDER / "tables" / f"lns-{name}.yaml") for name in ("resnet20-cifar10", "imagenet"))
    assert small.config.published.values == {"baseline": 85.06, "fine-tuning": 85.26, "mapping": 85.36, "lns": 85.56}
    assert large.config.published.values == {
        "resnet18/baseline": 52.5, "resnet18/fine-tuning": 52.8, "resnet18/lns": 53.1, "bireal/baseline": 59.0,
        "bireal/lns": 59.4, "alexnet/baseline": 43.9, "alexnet/lns": 44.4,
    }  # fmt: skip
    assert large.config.published.top5 == {
        "resnet18/baseline": 76.7, "resnet18/fine-tuning": 76.8, "resnet18/lns": 77.0, "bireal/baseline": 81.3, "bireal/lns": 81.7,
    }  # fmt: skip

    def settings(cell: Cell) -> tuple[Any, ...]:
        t = cell.recipe.train
        steps = [m - t.warm_start for m in t.milestones]
        return (
            t.lr,
            t.batch_size,
            t.epochs - t.warm_start,
            steps,
            t.gamma,
            t.momentum,
            t.weight_decay,
            t.latent_weight_decay,
        )

    for cell in small.cells(1):
        if cell.label == "baseline":
            assert settings(cell) == (
                0.1,
                128,
                400,
                [100, 200, 300],
                0.1,
                0.9,
                0,
                0,
            )  # where its steps are is not published
        else:
            assert settings(cell) == (0.01, 128, 120, [30, 60, 90], 0.1, 0.9, 0, 0)
            assert [need.label for need in cell.needs.values()] == ["baseline"]
    for cell in large.cells(1):
        stage = cell.label.partition("/")[2]
        expected = (0.1, 256, 120, [70, 90, 110]) if stage == "baseline" else (0.01, 256, 45, [15, 30])
        assert settings(cell) == (*expected, 0.1, 0.9, 0, 0)
    for cell in (*small.cells(1, ["lns"]), *large.cells(1, ["resnet18/lns"])):
        assert cell.recipe.quantize.options == {"alpha": 1, "rho": 0.005}


# ------------------------------------------------------------------------------------------------ every cell


def _cells() -> dict[str, Cell]:
    """The cells of the papers' tables, one seed, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lowbit.train.quantizers.lns.HIGH_RATE", 1.0)  # no warning while tests are collected
        cells = [cell for path in PAPERS for cell in load_table(path).cells(1)]
    return {cell.recipe.name.removesuffix("-seed0"): cell for cell in cells}


def _network(cell: Cell) -> str:
    """What tells two networks apart when they are built and frozen."""
    recipe = cell.recipe
    options = {key: value for key, value in recipe.quantize.options.items() if key not in ("alpha", "rho")}
    quantize = {**recipe.quantize.model_dump(), "options": options}
    if quantize["activation"] == "auto" and quantize["activation_bits"] == 1:
        quantize["activation"] = "sign"
    return json.dumps([recipe.data.name, recipe.model.model_dump(), quantize], sort_keys=True)


def _distinct(cells: dict[str, Cell]) -> dict[str, Cell]:
    """Of the cells with one network the first."""
    found: dict[str, tuple[str, Cell]] = {}
    for name, cell in cells.items():
        found.setdefault(_network(cell), (name, cell))
    return dict(found.values())


OFFICIAL = cifar.CIFAR10
"""The layout that tests put a shorter one in the place of."""
CELLS = _cells()
DISTINCT = _distinct(CELLS)


def lowbit(*arguments: object) -> None:
    """The command line, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lowbit", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.run()
    assert not stop.value.code, f"lowbit {' '.join(map(str, arguments))}"


class Runs:
    """Runs of cells, each trained when it is first asked for, so that those that start from others find them.

    Args:
        folder: where the run directories go.
        changes: the --set of a cell.
    """

    def __init__(self, folder: Path, changes: Callable[[Cell], Sequence[str]]) -> None:
        self.folder, self.changes = folder, changes
        self.done: dict[str, Path] = {}

    def train(self, cell: Cell, *more: str) -> Path:
        """The run directory of a cell; ``more`` are further changes."""
        key = " ".join([cell.recipe.name, *more])
        if key not in self.done:
            before = {name: self.train(need) for name, need in cell.needs.items()}
            run_dir = self.folder / f"run{len(self.done)}"
            file = run_dir.with_suffix(".yaml")
            file.write_text(cell.resolve(before).to_yaml(), encoding="utf-8")
            lowbit("train", file, "--run-dir", run_dir, *sets([*self.changes(cell), *more]))
            assert json.loads((run_dir / "run.json").read_text())["status"] == "finished"
            with (run_dir / "metrics.csv").open(newline="") as rows:
                assert [row["step"] for row in csv.DictReader(rows)] == ["2"]
            self.done[key] = run_dir
        return self.done[key]


def prove(run_dir: Path) -> None:
    """Export a run, and look at what the proof says."""
    lowbit("export", run_dir)
    proof = json.loads((run_dir / "proof.json").read_text())
    assert proof["integers_differ"] == 0
    assert proof["integers"] > proof["inputs"] > 0
    assert proof["failures"] == []
    assert (run_dir / "model.lowbit").stat().st_size == proof["file_bytes"]


def sets(changes: Sequence[str]) -> list[str]:
    """As arguments."""
    return [word for change in changes for word in ("--set", change)]


def two_steps(cell: Cell, batch_size: int) -> list[str]:
    """Changes for one epoch of two steps, and an evaluation on held-out images."""
    train = cell.recipe.train
    return [
        "train.epochs=1",
        f"train.batch_size={batch_size}",
        f"data.train_images={2 * batch_size}",
        f"train.calibration_images={2 * batch_size}",
        f"train.eval_batch_size={4 * batch_size}",
        "train.final=false",
        "train.device=cpu",
        "train.workers=0",
        *(["train.warmup=0.5"] if train.warmup else []),
        *(["train.warm_start=0.5"] if train.warm_start else []),
    ]


@pytest.fixture(scope="module")
def cifar_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """CIFAR-10 with 10 images in a batch in place of 10,000, 8 held out in place of 5,000."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar, "CIFAR10", shortened(cifar.CIFAR10, 10))
        patch.setattr(cifar, "VALIDATION", 8)
        yield write_cifar(tmp_path_factory.mktemp("cifar"), cifar.CIFAR10)


@pytest.fixture(scope="module")
def imagenet_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet with 4 classes of 5 small images."""
    return write_imagenet(tmp_path_factory.mktemp("imagenet"), classes=4, train=5, val=2)


WIDTHS = {"alexnet": 6, "vgg_small": 8}  # of the others 4


def narrow(cell: Cell) -> list[str]:
    """Changes for a narrow network on small images."""
    name = cell.recipe.model.name
    width = f"model.width={WIDTHS.get(name, 4)}"
    if cell.recipe.data.name == "cifar10":
        return [width]
    size = 64 if name == "alexnet" else 32
    return [width, "data.validation_images=8", f"data.size={size}", f"data.resize={size + 4}"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, cifar_root: Path, imagenet_root: Path) -> Iterator[Runs]:
    """Narrow networks on small images, proved on 16 of them."""
    roots = {"cifar10": cifar_root, "imagenet_folder": imagenet_root}

    def changes(cell: Cell) -> list[str]:
        return [*two_steps(cell, 4), *narrow(cell), f"data.root={roots[cell.recipe.data.name]}"]

    with pytest.MonkeyPatch.context() as patch:
        # the trial before training freezes a copy, which takes longer than the two steps; the export freezes it anyway
        patch.setattr("lowbit.train.trainer._try_out", lambda *_: [])
        yield Runs(tmp_path_factory.mktemp("small"), changes)


@pytest.mark.parametrize("name", CELLS)
def test_every_cell_of_the_tables_trains_exports_and_proves(name: str, small: Runs) -> None:
    run_dir = small.train(CELLS[name])
    if name in DISTINCT:  # the same network is frozen once
        prove(run_dir)


def test_the_two_statistics_of_slb(small: Runs) -> None:
    """What the comment in SLB's tables says to set."""
    prove(small.train(CELLS["slb-vgg-small-cifar10-2-2"], "quantize.state_batchnorm=true"))


def test_shards(small: Runs, imagenet_root: Path, tmp_path: Path) -> None:
    write_shards(imagenet_root, tmp_path / "shards", samples=6)
    cell = CELLS["lns-imagenet-alexnet-baseline"]
    prove(small.train(cell, "data.name=imagenet_shards", f"data.root={tmp_path / 'shards'}"))


def test_in_a_process_of_its_own(imagenet_root: Path, tmp_path: Path) -> None:
    """As a user starts it: nothing patched, images decoded by worker processes."""
    cell = CELLS["lns-imagenet-alexnet-baseline"]
    file, run_dir = tmp_path / "cell.yaml", tmp_path / "run"
    file.write_text(cell.recipe.to_yaml(), encoding="utf-8")
    changes = [*two_steps(cell, 4), *narrow(cell), f"data.root={imagenet_root}", "train.workers=2"]
    for words in (["train", file, "--run-dir", run_dir, *sets(changes)], ["export", run_dir]):
        subprocess.run([sys.executable, "-m", "lowbit", *words], check=True)
    assert json.loads((run_dir / "proof.json").read_text())["integers_differ"] == 0


# ------------------------------------------------------------------------------------------------ at full size


@pytest.fixture(scope="module")
def thousand_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet with its 1000 classes, one image of each, about the size they have, none in val."""
    return write_imagenet(tmp_path_factory.mktemp("imagenet"), classes=1000, train=1, val=0, size=(400, 350))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, cifar_root: Path, thousand_classes: Path) -> Runs:
    """The networks as published: their widths, 224x224 images and 1000 classes. Proved on a few images."""

    def changes(cell: Cell) -> list[str]:
        if cell.recipe.data.name == "cifar10":
            return [*two_steps(cell, 4), f"data.root={cifar_root}"]
        return [*two_steps(cell, 2), f"data.root={thousand_classes}", "data.validation_images=2"]

    return Runs(tmp_path_factory.mktemp("full"), changes)


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTINCT)
def test_every_network_at_full_size(name: str, full: Runs) -> None:
    prove(full.train(DISTINCT[name]))


@pytest.fixture(scope="module")
def official_cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10 with all its 60,000 images, 176 MiB."""
    return write_cifar(tmp_path_factory.mktemp("official"), OFFICIAL)


@pytest.mark.slow
@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_lowbit_compare_on_every_table(path: Path, official_cifar: Path, imagenet_root: Path, tmp_path: Path) -> None:
    """A cell of each table, one that starts from another where there is one, by the command line in a process of its own."""
    cells = load_table(path).cells(1)
    simple = [cell for cell in cells if not cell.recipe.train.warm_start and cell.recipe.train.distill is None]
    cell = next((cell for cell in simple if cell.needs), simple[0])
    roots = {"cifar10": official_cifar, "imagenet_folder": imagenet_root}
    changes = [*two_steps(cell, 4), *narrow(cell), f"data.root={roots[cell.recipe.data.name]}"]
    changes.append("train.epochs=6")  # --set is for all cells, and some have 5 epochs of warm-up
    places = ["--out", tmp_path / "runs", "--cells", tmp_path / "results"]
    command = [
        "compare",
        path,
        "--only",
        cell.label,
        "--seeds",
        "1",
        "--jobs",
        "1",
        "--no-test",
        *places,
        *sets(changes),
    ]
    subprocess.run([sys.executable, "-m", "lowbit", *command], check=True)
    results = list((tmp_path / "results" / path.stem).glob("*seed0.json"))
    assert len(results) == len(cell.with_needs()) or len(results) == 1
    found: dict[str, Any] = json.loads(results[0].read_text())
    assert found["results"]["validation"]["images"] > 0
