"""Tables: a grid of recipes in YAML, checked before anything runs, resolved into cells.

::

    name: slb-vgg-small-cifar10          # the file's name
    title: SLB, VGG-Small on CIFAR-10
    recipe: vgg-small.yaml               # relative to this file; or a recipe written out here
    set: {train.epochs: 500}             # changes of every cell, by dotted key
    axes:                                # the grid is their product; a cell's label joins the values' labels by "/"
      weights: {"1": {quantize.weight_bits: 1}, "2": {quantize.weight_bits: 2}}
      activations: {"1": {quantize.activation_bits: 1}, "32": {quantize.activation_bits: 32}}
    skip: ["2/1"]                        # combinations left out
    cells:                               # further changes of a cell of the grid, or cells beside it
      "1/32": {set: {schedule.speed: 1.04}}
      float: {set: {quantize.method: float}}
      tuned: {set: {train.lr: 0.01}, after: float}            # starts from float's run of the same seed
      taught: {set: {train.distill.weight: 1}, teacher: float}
    published:                           # shown where a cell's data set is the paper's
      {dataset: cifar10, metric: accuracy, source: "SLB, Table 1", values: {"1/1": 92.0}, runs: {"1/1": 92.4}}
    compare: [[tuned, float]]            # paired differences; by default every cell less the first
    seeds: 3                             # 0, 1, 2; a cell may have seeds: of its own
    tune:                                # what is tried on the held-out images before the table is run
      set: {train.epochs: 20}
      seed: 1000
      tries: [{train.lr: 0.1}, {train.lr: 0.05}]              # or for each label its own list, of the same length

A cell's recipe is the table's, then ``set``, the axes in their order, the cell's own ``set``, the command line's. A value
replaces what is at its key, whole sections included.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from lowbit.train.recipe import (
    ELSEWHERE,
    Recipe,
    RecipeError,
    Strict,
    assign,
    assign_text,
    check_kind,
    differing_keys,
    explain_validation,
    flatten,
    load_recipe,
    parse_recipe,
    read_yaml,
)
from lowbit.train.registry import nearest
from lowbit.train.rundir import RunError, read_run

__all__ = [
    "Cell",
    "Published",
    "Table",
    "TableError",
    "Tune",
    "hash_recipe",
    "load_cell",
    "load_table",
    "stored_recipe",
]

START: Final = "train.start_from"
TEACHER: Final = "train.distill.teacher"
_LABEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*(/[A-Za-z0-9][A-Za-z0-9._+-]*)*")
OWNED: Final = ("name", "description", "seed")
"""Fields of a recipe that the runner fills in."""


class TableError(RecipeError):
    """A table that can't be used; the message names the file, the cell and what would be right."""


def _text(value: Any) -> Any:
    """YAML reads 1 where "1" is meant."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Label = Annotated[str, BeforeValidator(_text), Field(pattern=rf"^{_LABEL.pattern}$")]
Changes = dict[str, Any]


class CellConfig(Strict):
    """What is special about a cell.

    Attributes:
        set: changes of its recipe, by dotted key.
        after: the cell whose run of the same seed it starts from, put at the key ``start``.
        start: where the run directory goes.
        teacher: the cell whose run of the same seed teaches it, put at ``train.distill.teacher``.
        seeds: how many, where not as many as the table says.
    """

    set: Changes = Field(default_factory=dict)
    after: Label | None = None
    start: str = START
    teacher: Label | None = None
    seeds: Annotated[int, Field(ge=1)] | None = None

    @property
    def needs(self) -> dict[str, str]:
        """Dotted key -> label of the cell whose run goes there."""
        given = ((self.start, self.after), (TEACHER, self.teacher))
        return {key: label for key, label in given if label is not None}


class Published(Strict):
    """Numbers of a paper, in its unit (percent for accuracy, dB for PSNR).

    Attributes:
        dataset: the recipe's data set they were measured on, or its names; cells on another show none.
        metric: what was measured.
        source: paper and table.
        values: label -> the paper's number.
        runs: label -> what the authors' own later runs gave, where they published it.
        top5: label -> the paper's top-5 accuracy; the measured one then stands beside it.
    """

    dataset: str | tuple[str, ...]
    metric: str = "accuracy"
    source: str
    values: dict[Label, float]
    runs: dict[Label, float] = Field(default_factory=dict)
    top5: dict[Label, float] = Field(default_factory=dict)

    def on(self, dataset: str) -> bool:
        """Whether the numbers are of this data set."""
        return dataset in ((self.dataset,) if isinstance(self.dataset, str) else self.dataset)


class Tune(Strict):
    """What is tried for each cell. The held-out images alone choose; the test images are never read.

    Attributes:
        set: changes of every try: shorter runs, and ``train.final: false`` where the table has it true.
        seed: of all tries; not one of the table's seeds.
        tries: changes, one mapping for each try: one list for all cells, or a list for each label.
        equal: refuse lists of different length. False is for a reason that is written down.
    """

    set: Changes = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=0)] = 1000
    tries: Any
    equal: bool = True

    @model_validator(mode="after")
    def _shape(self) -> Tune:
        lists = self.tries.values() if isinstance(self.tries, dict) else [self.tries]
        for tries in lists:
            if not isinstance(tries, list) or not tries or not all(isinstance(t, dict) for t in tries):
                raise ValueError(
                    "tries is a list of changes ([{train.lr: 0.1}, {train.lr: 0.05}]), or one for each label"
                )
        return self

    def of(self, label: str) -> list[Changes]:
        """The tries of a cell; none where it has none."""
        return list(self.tries.get(label, [])) if isinstance(self.tries, dict) else list(self.tries)


class _TableConfig(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    title: str = ""
    description: str = ""
    recipe: Any
    set: Changes = Field(default_factory=dict)
    axes: dict[str, dict[Label, Changes]] = Field(default_factory=dict)
    skip: tuple[Label, ...] = ()
    cells: dict[Label, CellConfig] = Field(default_factory=dict)
    published: Published | None = None
    compare: tuple[tuple[Label, Label], ...] | None = None
    seeds: Annotated[int, Field(ge=1)] = 3
    tune: Tune | None = None


def slug(label: str) -> str:
    """A label as part of a file's name."""
    return label.replace("/", "-")


@dataclass(frozen=True)
class Cell:
    """One run of a table: a label and a seed (or a try), resolved.

    Attributes:
        label: which cell of the table.
        run: which run of it: "seed0", "try2", or "start", which tries of other cells start from.
        recipe: complete. Where a run of another cell goes, "run of LABEL" stands.
        hash: of everything the result depends on, see ``hash_recipe``.
        needs: dotted key of the recipe -> the cell whose run directory goes there.
        changes: of a try: its own mapping in ``tune.tries``, without what ``tune.set`` gives to all of them.
    """

    label: str
    run: str
    recipe: Recipe
    hash: str
    needs: Mapping[str, Cell] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        """What tells the cells of a table apart."""
        return self.label, self.run

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.label} " + re.sub(r"^(seed|try)(?=[0-9])", r"\1 ", self.run)

    @property
    def place(self) -> Path:
        """The run directory, below the table's."""
        return Path(slug(self.label)) / self.run

    @property
    def file(self) -> str:
        """Name of the file with its result."""
        return f"{slug(self.label)}-{self.run}.json"

    def resolve(self, runs: Mapping[str, str | Path]) -> Recipe:
        """The recipe with the run directories (dotted key -> path) it starts from."""
        tree = self.recipe.plain()
        for key in self.needs:
            assign(tree, key, str(runs[key]), self.title)
        return parse_recipe(tree, self.title)

    def with_needs(self) -> list[Cell]:
        """The cells whose runs it needs, theirs first, then itself."""
        before = [cell for need in self.needs.values() for cell in need.with_needs()]
        return [*{cell.key: cell for cell in before}.values(), self]


@dataclass(frozen=True)
class Table:
    """A checked table: every cell of it resolves to a recipe that can be built.

    Attributes:
        labels: of all cells, in the table's order.
    """

    path: Path
    config: _TableConfig
    labels: tuple[str, ...]
    _tree: Mapping[str, Any] = field(repr=False)
    _overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The table's name, that of its file."""
        return self.config.name

    @property
    def overrides(self) -> tuple[str, ...]:
        """The ``key=value`` texts that change every cell."""
        return self._overrides

    @property
    def comparisons(self) -> list[tuple[str, str]]:
        """Pairs (one, other) whose difference one - other is asked for."""
        if self.config.compare is not None:
            return list(self.config.compare)
        return [(label, self.labels[0]) for label in self.labels[1:]]

    def cells(self, seeds: int | None = None, labels: Iterable[str] = ()) -> list[Cell]:
        """Cells of the grid and beside it, label by label, seeds 0 .. seeds-1.

        Args:
            seeds: how many of each; by default what the cell says, or the table.
            labels: of these cells only; by default all.

        Raises:
            TableError: no such label.
        """
        wanted = self._wanted(labels)
        made: dict[tuple[str, str], Cell] = {}

        def count(label: str) -> int:
            return seeds or self.config.cells.get(label, CellConfig()).seeds or self.config.seeds

        return [self._cell(label, f"seed{seed}", seed, made) for label in wanted for seed in range(count(label))]

    def cell(self, label: str, seed: int) -> Cell:
        """One cell, whatever seeds the table has.

        Raises:
            TableError: no such label.
        """
        self._wanted([label])
        return self._cell(label, f"seed{seed}", seed, {})

    def tries(self, labels: Iterable[str] = ()) -> list[Cell]:
        """The runs of the table's ``tune`` section, label by label.

        Raises:
            TableError: there is none, a label is unknown, a cell has fewer tries than another, a try looks at no
                held-out images.
        """
        tune = self.config.tune
        if tune is None:
            raise TableError(f"{self.path}: has no section tune; it lists what is tried for each cell")
        made: dict[tuple[str, str], Cell] = {}
        cells = []
        for label in self._wanted(labels):
            for i, changes in enumerate(tune.of(label), 1):
                cells.append(self._cell(label, f"try{i}", tune.seed, made, changes, start="start", shared=tune.set))
        for cell in cells:
            if cell.recipe.train.final:
                raise TableError(
                    f"{self.path}: tune: {cell.title} has train.final: true and holds no images out to choose by; "
                    "put train.final: false into tune.set"
                )
        return cells

    def _wanted(self, labels: Iterable[str]) -> list[str]:
        chosen = list(labels)
        for label in chosen:
            if label not in self.labels:
                raise TableError(f"{self.path}: no cell {label!r}: {nearest(label, list(self.labels))}")
        return [label for label in self.labels if not chosen or label in chosen]

    def _cell(
        self,
        label: str,
        run: str,
        seed: int,
        made: dict[tuple[str, str], Cell],
        changes: Mapping[str, Any] = MappingProxyType({}),
        start: str | None = None,
        shared: Mapping[str, Any] = MappingProxyType({}),
    ) -> Cell:
        """One cell, with ``shared`` and then ``changes`` changed; and first those it needs: of the same run, or the run
        ``start`` with the changes ``shared`` alone."""
        if (label, run) in made:
            return made[label, run]
        own = self.config.cells.get(label, CellConfig())
        before = start or run
        needs = {key: self._cell(each, before, seed, made, {}, start, shared) for key, each in own.needs.items()}
        starts = {key: f"run of {need.label}" for key, need in needs.items()}
        recipe = self._recipe(label, seed, {**shared, **changes, **starts}, run)
        hash_ = hash_recipe(recipe, {key: need.hash for key, need in needs.items()})
        cell = Cell(label, run, recipe, hash_, needs, dict(changes))
        made[label, run] = cell
        return cell

    def _recipe(self, label: str, seed: int, last: Mapping[str, Any], run: str) -> Recipe:
        config = self.config
        where = f"{self.path}: cell {label!r}"
        tree = copy.deepcopy(dict(self._tree))
        layers: list[tuple[str, Mapping[str, Any]]] = [("set", config.set)]
        layers += [(f"axes.{axis}", changes) for axis, changes in _on_axes(config, label)]
        layers.append((f"cells.{label}.set", config.cells.get(label, CellConfig()).set))
        layers.append(("tune", last))
        try:
            for part, changes in layers:
                for key, value in changes.items():
                    if key in OWNED:
                        raise TableError(
                            f"{self.path}: {part}: {key!r} is filled in by the table; seeds: says how many runs"
                        )
                    assign(tree, key, copy.deepcopy(value), f"{where}: {part}")
            for text in self._overrides:
                if text.partition("=")[0].strip() in OWNED:
                    raise TableError(f"--set {text!r}: is filled in by the table; --seeds says how many runs")
                assign_text(tree, text)
            return parse_recipe(tree | {"name": f"{config.name}-{slug(label)}-{run}", "seed": seed}, where)
        except TableError:
            raise
        except RecipeError as error:
            raise TableError(str(error)) from None


def _grid(config: _TableConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    for point in itertools.product(*config.axes.values()):
        if point:
            yield "/".join(point), point


def _on_axes(config: _TableConfig, label: str) -> list[tuple[str, Changes]]:
    """The changes of each axis for a cell; none for cells beside the grid."""
    point = dict(_grid(config)).get(label, ())
    return [(axis, values[value]) for (axis, values), value in zip(config.axes.items(), point, strict=False)]


def load_table(path: str | Path, overrides: Sequence[str] = ()) -> Table:
    """Read a table, check it and every cell of it.

    Args:
        path: the YAML file.
        overrides: ``key.subkey=value`` for the recipes of all cells, last.

    Raises:
        TableError: no such file, not YAML, an unknown key or cell, cells that wait for each other, a recipe that can't
            be built, an override of what the table fills in; one error, the file's name in front.
    """
    table = _load(path, overrides)
    for label, cell in table.config.cells.items():
        for key, need in cell.needs.items():
            for text in overrides:
                if f"{key}.".startswith(f"{text.partition('=')[0].strip()}."):
                    raise TableError(
                        f"--set {text!r}: {table.path} fills in {key} of cell {label!r} with its run of {need!r}; another start "
                        f"is another cell of the table, or `lowbit train {table.path} --cell {label} --set {key}=RUN`"
                    )
    return table


def _load(path: str | Path, overrides: Sequence[str]) -> Table:
    path = Path(path)
    try:
        tree = read_yaml(path, "table")
    except TableError:
        raise
    except RecipeError as error:
        raise TableError(str(error)) from None
    if not isinstance(tree, dict):
        raise TableError(f"{path}: a table is a mapping of keys to values, found {type(tree).__name__}")
    try:
        check_kind(tree, "table", str(path))
    except RecipeError as error:
        raise TableError(str(error)) from None
    try:
        config = _TableConfig.model_validate(tree)
    except ValidationError as error:
        raise TableError(f"{path}: {explain_validation(error, _TableConfig)}") from None
    table = Table(path, config, _labels(path, config), _base(path, config.recipe), tuple(overrides))
    _check(table)
    return table


def load_cell(
    path: str | Path, label: str, seed: int = 0, overrides: Sequence[str] = (), runs: str | Path = "runs"
) -> Recipe:
    """The recipe of one cell of a table, to be trained by itself.

    Args:
        path, overrides: as in ``load_table``; an override may name a run to start from, or a teacher's: any run.
        label, seed: which cell.
        runs: the folder that has the runs it starts from, under their recipes' names: ``lowbit train --cell`` puts them there.

    Raises:
        TableError: as in ``load_table``; no such cell; a run that it starts from is not there, not finished, or one of
            another recipe than the table has, with these overrides or without.
    """
    table = _load(path, overrides)
    cell, plain = table.cell(label, seed), replace(table, _overrides=()).cell(label, seed)
    places: dict[str, str | Path] = {k.strip(): v for k, _, v in (text.partition("=") for text in overrides) if v}
    for key, need in cell.needs.items():
        if key in places:
            continue
        places[key] = _alone(need, runs)
        unfit = _unfit(_alone(need, runs), [_resolve_alone(each, runs) for each in (need, plain.needs[key])])
        if unfit is not None:
            problem, option = unfit
            raise TableError(
                f"{path}: cell {label!r} starts from a run of {need.label!r}, and {places[key]} {problem}: train it first "
                f"(--cell {need.label} --seed {seed}{option}), or say which run it starts from (--set {key}=RUN)"
            )
    return cell.resolve(places)


def _alone(cell: Cell, runs: str | Path) -> Path:
    """Where ``lowbit train --cell`` puts a cell."""
    return Path(runs) / cell.recipe.name


def _resolve_alone(cell: Cell, runs: str | Path) -> Recipe:
    return cell.resolve({key: _alone(need, runs) for key, need in cell.needs.items()})


def _unfit(run_dir: Path, recipes: Sequence[Recipe]) -> tuple[str, str] | None:
    """Why a run is none of these recipes, trained to its end, and the option that helps; None if it is.

    A key may have its value of any of the recipes.
    """
    if not (run_dir / "run.json").is_file():
        return "is not there", ""
    try:
        status = read_run(run_dir)["status"]
        found = load_recipe(run_dir / "recipe.yaml")
    except (RunError, RecipeError) as error:
        return f"can't be read ({error})", " --overwrite"
    keys = set.intersection(*(set(differing_keys(found, recipe, ELSEWHERE)) for recipe in recipes))
    if keys:
        key = min(keys)
        was, wanted = (dict(flatten(recipe.plain())).get(key) for recipe in (found, recipes[0]))
        return f"was trained with another recipe ({key}: {was}, not {wanted})", " --overwrite"
    return None if status == "finished" else (f"has not finished ({status})", " --resume")


def _base(path: Path, recipe: Any) -> dict[str, Any]:
    if isinstance(recipe, dict):
        return recipe
    if not isinstance(recipe, str):
        raise TableError(f"{path}: recipe: is a recipe written out, or the path of one")
    try:
        tree = read_yaml(path.parent / recipe)
    except RecipeError as error:
        raise TableError(f"{path}: recipe: {error}") from None
    if not isinstance(tree, dict):
        raise TableError(f"{path}: recipe: {recipe} is not a recipe")
    return tree


def _labels(path: Path, config: _TableConfig) -> tuple[str, ...]:
    grid = [label for label, _ in _grid(config)]
    repeated = [label for label in grid if grid.count(label) > 1]
    if repeated:
        raise TableError(f"{path}: axes: two cells are called {repeated[0]!r}; a label with '/' in it can do that")
    for label in config.skip:
        if label not in grid:
            raise TableError(f"{path}: skip: no cell {label!r} in the grid: {nearest(label, grid)}")
        if label in config.cells:
            raise TableError(f"{path}: cell {label!r} is both skipped and described")
    labels = [label for label in grid if label not in config.skip]
    labels += [label for label in config.cells if label not in labels]
    if not labels:
        raise TableError(f"{path}: has no cells: give axes or cells")
    files: dict[str, str] = {}
    for label in labels:
        other = files.setdefault(slug(label).casefold(), label)
        if other != label:
            raise TableError(f"{path}: cells {other!r} and {label!r} would share their files; rename one")
    return tuple(labels)


def _check(table: Table) -> None:
    path, config, known = table.path, table.config, list(table.labels)

    def check(label: str, where: str) -> None:
        if label not in known:
            raise TableError(f"{path}: {where}: no cell {label!r}: {nearest(label, known)}")

    for label, cell in config.cells.items():
        for needed in cell.needs.values():
            check(needed, f"cells.{label}")
        if cell.after and cell.teacher and cell.start == TEACHER:
            raise TableError(f"{path}: cells.{label}: start and teacher are both {TEACHER}")
        for key, needed in cell.needs.items():
            if key in cell.set:
                raise TableError(f"{path}: cells.{label}.set: {key!r} is filled in with the run of {needed!r}")
    for pair in config.compare or ():
        for label in pair:
            check(label, "compare")
        if pair[0] == pair[1]:
            raise TableError(f"{path}: compare: {pair[0]!r} with itself")
    if config.published is not None:
        for label in [*config.published.values, *config.published.runs, *config.published.top5]:
            if label not in config.skip:
                check(label, "published")
    _check_order(table)
    table.cells(1)  # every recipe
    if config.tune is not None:
        _check_tries(table, config.tune)


def _check_order(table: Table) -> None:
    """Cells that wait for each other are refused."""
    done: set[str] = set()

    def visit(label: str, way: tuple[str, ...]) -> None:
        if label in way:
            circle = " -> ".join([*way[way.index(label) :], label])
            raise TableError(f"{table.path}: cells start from each other: {circle}")
        if label not in done:
            for needed in table.config.cells.get(label, CellConfig()).needs.values():
                visit(needed, (*way, label))
            done.add(label)

    for label in table.labels:
        visit(label, ())


def _check_tries(table: Table, tune: Tune) -> None:
    if isinstance(tune.tries, dict):
        for label in tune.tries:
            if label not in table.labels:
                raise TableError(f"{table.path}: tune.tries: no cell {label!r}: {nearest(label, list(table.labels))}")
    seeds = max([table.config.seeds, *(cell.seeds or 0 for cell in table.config.cells.values())])
    if tune.seed < seeds:
        raise TableError(
            f"{table.path}: tune.seed: {tune.seed} is one of the table's seeds 0 to {seeds - 1}; "
            "settings are chosen with another"
        )
    counts = {label: len(tune.of(label)) for label in table.labels}
    most, least = max(counts, key=lambda k: counts[k]), min(counts, key=lambda k: counts[k])
    if tune.equal and counts[most] != counts[least]:
        raise TableError(
            f"{table.path}: tune.tries: {counts[most]} for {most!r}, {counts[least]} for {least!r}: each cell gets the same "
            "number of tries (equal: false allows otherwise)"
        )
    table.tries()


def _drop(tree: dict[str, Any], key: str) -> None:
    *way, last = key.split(".")
    for part in way:
        tree = tree.get(part, {})
    tree.pop(last, None)


def hash_recipe(recipe: Recipe, needs: Mapping[str, str] = MappingProxyType({})) -> str:
    """SHA-256, in hex, of what a run's result depends on.

    The resolved recipe as canonical JSON (sorted keys, no spaces) without its name and description, where the data lies
    and which device is asked for; in place of the run directories it starts from, their cells' hashes.
    """
    tree = recipe.plain()
    for key in ELSEWHERE:
        _drop(tree, key)
    for key, value in needs.items():
        assign(tree, key, value, recipe.name)
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def stored_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe for a result file: resolved, without fields that are unset and where the data lies.

    Read back with ``parse_recipe``, fields that came later have their defaults, and so the hash of this moment.
    """
    tree = _set_fields(recipe)
    for key in ELSEWHERE:
        if key not in OWNED:
            _drop(tree, key)
    return tree


def _set_fields(model: BaseModel) -> dict[str, Any]:
    plain, kept = model.model_dump(mode="json"), {}
    for key, value in plain.items():
        inner = getattr(model, key, None)
        known = type(model).model_fields.get(key)
        if isinstance(inner, BaseModel):
            kept[key] = _set_fields(inner)
        elif value is not None or known is None or known.default is not None:
            kept[key] = value
    return kept
