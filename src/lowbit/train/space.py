"""Search spaces in YAML, checked before anything runs: which recipes ``lowbit search`` may try.

::

    name: fashion-mnist                  # the file's name
    recipe: ../fashion-mnist/x.yaml      # relative to this file; or a recipe written out here
    set: {train.epochs: 6}               # changes of every trial, by dotted key
    runs:                                # trained first, once for all trials that start from the same
      teacher: {set: {quantize: {method: float, weight_bits: 32, activation_bits: 32}}}
      dorefa: {like: [width], set: {quantize.method: dorefa, train.epochs: 3}}   # one for each width
    space:                               # the first value of each makes the first trial
      width: {field: model.width, values: [16, 32, 48]}
      lr: {field: train.lr, low: 0.03, high: 0.3, log: true, default: 0.1}       # step: and integer: true go with it
      method:                            # a choice may change several fields
        choices:
          sign: {set: {quantize.method: sign}}
          slb: {set: {quantize.method: slb, schedule.growth: 100}}
      start: {choices: {random: {}, dorefa: {after: dorefa}}}                    # as in tables: after, start, teacher
    prune: {rungs: [2, 4], margin: 1.0}  # epochs; points (or dB) by which one that is no slower was better there
    limit_ms: 0.5                        # a slower network is not trained
    seed: 1000                           # of every trial
    table:                               # of the table that is written at the end
      set: {train.final: true}
      seeds: 3
      cells: {twin: {set: {quantize.method: float}}}                             # beside those of the front

A trial's recipe is the recipe, ``set``, then the space's changes in their order. Two dimensions may not change the same
field, unless both give a mapping: then these are joined (``quantize.overrides``, layer by layer).
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field, ValidationError, model_validator

from lowbit.train.recipe import (
    Recipe,
    RecipeError,
    Strict,
    assign,
    check_kind,
    explain_validation,
    flatten,
    parse_recipe,
    read_yaml,
)
from lowbit.train.registry import nearest
from lowbit.train.table import OWNED, START, TEACHER, Cell, CellConfig, Label, hash_recipe

__all__ = ["Dimension", "Prune", "Space", "SpaceError", "load_space"]

TRIAL: Final = "trial"
"""Label of a trial's cell; its run is named after its recipe's hash."""
_COMBINATIONS: Final = 40
"""Tries to find a combination that a value fits into."""

Params = Mapping[str, Any]
"""A value of each dimension: a choice's name, or a number of a range."""


class SpaceError(RecipeError):
    """A space that can't be searched; the message names the file, the dimension and what would be right."""


class Choice(Strict):
    """What one choice changes.

    Attributes:
        set: changes of the recipe, by dotted key.
        after: the run that the trial starts from, put at the key ``start``.
        start: where its directory goes.
        teacher: the run that teaches, put at ``train.distill.teacher``.
    """

    set: dict[str, Any] = Field(default_factory=dict)
    after: str | None = None
    start: str = START
    teacher: str | None = None

    @property
    def needs(self) -> dict[str, str]:
        """Dotted key -> name of the run that goes there."""
        given = ((self.start, self.after), (TEACHER, self.teacher))
        return {key: name for key, name in given if name is not None}


class RunConfig(Choice):
    """A run that trials start from: the recipe, the changes of the dimensions in ``like``, then its own. It may start from
    one above it."""

    like: tuple[str, ...] = ()


class Dimension(Strict):
    """``choices``, or a ``field`` with ``values``, or with ``low`` and ``high``.

    Attributes:
        choices: name -> what it changes.
        field: dotted key of a recipe's field.
        values: what it may be.
        low, high: the ends of a range, both included.
        default: the value of a range in the first trial; the lower end where it is left out.
        log: draw the logarithm.
        step: of a grid; with ``integer`` 1 where it is left out.
        integer: whole numbers.
    """

    choices: dict[Label, Choice] | None = None
    field: str | None = None
    values: tuple[Any, ...] | None = None
    low: float | None = None
    high: float | None = None
    default: float | None = None
    log: bool = False
    step: Annotated[float, Field(gt=0)] | None = None
    integer: bool = False

    @model_validator(mode="after")
    def _one_kind(self) -> Dimension:
        kinds = [self.choices is not None, self.values is not None, self.low is not None or self.high is not None]
        if sum(kinds) != 1 or (self.choices is None) != (self.field is not None):
            raise ValueError("is either choices:, or field: with values:, or field: with low: and high:")
        if self.choices is not None and not self.choices:
            raise ValueError("choices: is empty; there is nothing to choose from")
        if self.values is not None and not self.values:
            raise ValueError("values: is empty; there is nothing to choose from")
        if self.values is not None and len(set(map(name_of, self.values))) < len(self.values):
            raise ValueError("values: has one of them twice")
        if kinds[2]:
            if (
                self.low is None
                or self.high is None
                or not (math.isfinite(self.low) and self.low < self.high < math.inf)
            ):
                raise ValueError("a range has low: and high:, low < high")
            if self.default is not None and not self.low <= self.default <= self.high:
                raise ValueError("default: lies between low and high")
            if self.log and (self.low <= 0 or self.step is not None):
                raise ValueError("log: true goes with low > 0 and without step:")
            if self.integer and any(v is not None and v != int(v) for v in (self.low, self.high, self.step)):
                raise ValueError("integer: true goes with whole low, high and step")
        elif self.log or self.integer or self.step is not None or self.default is not None:
            raise ValueError("log:, step:, integer: and default: belong to a range, low: and high:")
        return self

    @property
    def names(self) -> tuple[str, ...] | None:
        """The names of its values; None for a range."""
        if self.choices is not None:
            return tuple(self.choices)
        return None if self.values is None else tuple(map(name_of, self.values))

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that show whether the dimension can be used: all of them, of a range its ends."""
        return self.names or (self._number(self.low), self._number(self.high))

    @property
    def first(self) -> Any:
        """The first value; of a range its default."""
        return self.ends[0] if self.default is None else self._number(self.default)

    def _number(self, value: Any) -> float | int:
        return int(value) if self.integer else float(value)

    def choice(self, value: Any) -> Choice:
        """What a value changes. Numbers of a range have three significant digits, or are whole."""
        if self.choices is not None:
            return self.choices[value]
        assert self.field is not None
        if self.values is not None:
            return Choice(set={self.field: dict(zip(self.names or (), self.values, strict=True))[value]})
        return Choice(set={self.field: int(value) if self.integer else float(f"{value:.3g}")})

    @property
    def keys(self) -> set[str]:
        """Dotted keys that some value of it changes."""
        changed = [self.choice(value) for value in self.ends]
        return {key for each in changed for key in (*each.set, *each.needs)}


def name_of(value: Any) -> str:
    """A value as the study keeps it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


class Prune(Strict):
    """When a trial is given up: at one of ``rungs`` (epochs) another trial of as many epochs whose network is no slower was better
    by ``margin`` (in the unit that is shown: points of accuracy, dB)."""

    rungs: tuple[Annotated[int, Field(ge=1)], ...] = ()
    margin: Annotated[float, Field(ge=0)] = 1.0

    @model_validator(mode="after")
    def _agree(self) -> Prune:
        if list(self.rungs) != sorted(set(self.rungs)):
            raise ValueError(f"rungs: {list(self.rungs)} must rise")
        return self


class TableOut(Strict):
    """The table that is written at the end: its ``name``, by default the space's with "-front" behind it; ``set`` changes all of its
    cells; ``seeds`` of each; ``cells`` are written out as they are, beside those of the front: float twins, say."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    seeds: Annotated[int, Field(ge=1)] = 3
    cells: dict[Label, CellConfig] = Field(default_factory=dict)


class _SpaceConfig(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    title: str = ""
    description: str = ""
    recipe: Any
    set: dict[str, Any] = Field(default_factory=dict)
    runs: dict[Label, RunConfig] = Field(default_factory=dict)
    space: dict[Label, Dimension]
    prune: Prune = Prune()
    limit_ms: Annotated[float, Field(gt=0)] | None = None
    seed: Annotated[int, Field(ge=0)] = 1000
    table: TableOut = TableOut()


@dataclass(frozen=True)
class Space:
    """A checked space."""

    path: Path
    config: _SpaceConfig
    base: Mapping[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        """The space's name."""
        return self.config.name

    @property
    def table(self) -> str:
        """Name of the table that is written at the end."""
        return self.config.table.name or f"{self.name}-front"

    @property
    def dimensions(self) -> Mapping[str, Dimension]:
        """What may vary, by name."""
        return self.config.space

    @property
    def first(self) -> dict[str, Any]:
        """The first value of each dimension."""
        return {name: d.first for name, d in self.dimensions.items()}

    @property
    def size(self) -> float:
        """The number of combinations; infinite with a range of floats."""
        counts = [len(d.names) if d.names else math.inf for d in self.dimensions.values()]
        return math.prod(counts)

    def changes(self, params: Params) -> dict[str, Any]:
        """Dotted key -> value, of a trial, mappings joined."""
        return self._joined(self.dimensions, params)

    def _joined(self, names: Sequence[str] | Mapping[str, Any], params: Params) -> dict[str, Any]:
        joined: dict[str, Any] = {}
        for name in names:
            for key, value in self.dimensions[name].choice(params[name]).set.items():
                before = joined.get(key)
                if isinstance(before, dict) and isinstance(value, dict):
                    joined[key] = {**before, **value}
                else:
                    joined[key] = value
        return joined

    def needs(self, params: Params) -> dict[str, str]:
        """Dotted key -> name of the run that a trial starts from."""
        return {k: run for name, d in self.dimensions.items() for k, run in d.choice(params[name]).needs.items()}

    def cell(self, params: Params) -> Cell:
        """A trial as a cell, with the cells that it needs.

        Raises:
            SpaceError: its recipe can't be built.
        """
        return self._cell(TRIAL, self.changes(params), self.needs(params), params)

    def changes_of_run(self, name: str, params: Params) -> dict[str, Any]:
        """Dotted key -> value, of the run ``name`` that a trial starts from."""
        run = self.config.runs[name]
        return {**self._joined(run.like, params), **run.set}

    def _cell(self, label: str, changes: Mapping[str, Any], starts: Mapping[str, str], params: Params) -> Cell:
        runs = self.config.runs
        needs = {k: self._cell(r, self.changes_of_run(r, params), runs[r].needs, params) for k, r in starts.items()}
        tree = copy.deepcopy(dict(self.base))
        try:
            for key, value in {
                **self.config.set,
                **changes,
                **{k: f"run of {c.label}" for k, c in needs.items()},
            }.items():
                assign(tree, key, copy.deepcopy(value), str(self.path))
            recipe = parse_recipe(tree | {"name": f"{self.name}-{label}", "seed": self.config.seed}, str(self.path))
        except SpaceError:
            raise
        except RecipeError as error:
            raise SpaceError(str(error)) from None
        digest = hash_recipe(recipe, {key: need.hash for key, need in needs.items()})
        run = digest[:12]
        return Cell(label, run, _named(recipe, f"{self.name}-{label}-{run}"), digest, needs)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes it this space: everything that decides what a trial is. Flat: dotted key -> JSON of the value."""
        plain = self.config.model_dump(mode="json", include={"set", "runs", "space", "seed"})
        flat = dict(flatten({"recipe": dict(self.base), **plain}))
        return {key: json.dumps(value, sort_keys=True) for key, value in sorted(flat.items())}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of ``identity``, in hex."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()


def _named(recipe: Recipe, name: str) -> Recipe:
    return recipe.model_copy(update={"name": name})


def load_space(path: str | Path) -> Space:
    """Read a space and check it: every value of every dimension is part of a recipe that can be built.

    Raises:
        SpaceError: no such file, not YAML, an unknown key or field, an empty dimension, two dimensions that change the same
            field, a run that is not there; one error, the file's name in front.
    """
    path = Path(path)
    try:
        tree = read_yaml(path, "space")
        if isinstance(tree, dict):
            check_kind(tree, "space", str(path))
    except RecipeError as error:
        raise SpaceError(str(error)) from None
    if not isinstance(tree, dict) or "space" not in tree:
        raise SpaceError(f"{path}: is no search space: a mapping with name, recipe and space (docs/RECIPES.md)")
    try:
        config = _SpaceConfig.model_validate(tree)
    except ValidationError as error:
        raise SpaceError(f"{path}: {explain_validation(error, _SpaceConfig)}") from None
    if not config.space:
        raise SpaceError(f"{path}: space: is empty; there is nothing to search")
    space = Space(path, config, _base(path, config.recipe))
    _check_keys(space)
    _check_runs(space)
    _check_values(space)
    return space


def _base(path: Path, recipe: Any) -> dict[str, Any]:
    if isinstance(recipe, str):
        try:
            recipe = read_yaml(path.parent / recipe)
        except RecipeError as error:
            raise SpaceError(f"{path}: recipe: {error}") from None
    if not isinstance(recipe, dict):
        raise SpaceError(f"{path}: recipe: is a recipe written out, or the path of one")
    return {key: value for key, value in recipe.items() if key not in OWNED}


def _check_keys(space: Space) -> None:
    """Who changes what: nothing twice, and nothing that the search fills in."""
    by: dict[str, str] = {}
    for name, dimension in space.dimensions.items():
        for key in sorted(dimension.keys):
            if key in OWNED:
                raise SpaceError(f"{space.path}: space.{name}: {key!r} is filled in by the search")
            for other, owner in by.items():
                same = key == other and not _mapping(space, owner, key) & _mapping(space, name, key)
                if same or key.startswith(f"{other}.") or other.startswith(f"{key}."):
                    raise SpaceError(
                        f"{space.path}: space.{owner} and space.{name} both change {max(key, other, key=len)}; make one "
                        "dimension of them, whose choices say both"
                    )
            by[key] = name


def _mapping(space: Space, name: str, key: str) -> bool:
    """Whether all that a dimension puts at a key are mappings."""
    d = space.dimensions[name]
    return all(isinstance(c.set[key], dict) for c in map(d.choice, d.ends) if key in c.set)


def _check_runs(space: Space) -> None:
    above: list[str] = []
    for name, run in space.config.runs.items():
        if name == TRIAL:
            raise SpaceError(f"{space.path}: runs: {TRIAL!r} is the trials' own name; rename it")
        for like in run.like:
            if like not in space.dimensions:
                known = nearest(like, list(space.dimensions))
                raise SpaceError(f"{space.path}: runs.{name}.like: no dimension {like!r}: {known}")
        for need in run.needs.values():
            if need not in above:
                raise SpaceError(f"{space.path}: runs.{name}: no run {need!r} above it: {nearest(need, above)}")
        above.append(name)
    for label in space.config.table.cells:
        if label in above or label.startswith(TRIAL):
            raise SpaceError(f"{space.path}: table.cells: {label!r} is a name of the table's other cells; rename it")
    for name, dimension in space.dimensions.items():
        for choice in map(dimension.choice, dimension.ends):
            for need in choice.needs.values():
                if need not in above:
                    raise SpaceError(f"{space.path}: space.{name}: no run {need!r}: {nearest(need, above)}")


def _check_values(space: Space) -> None:
    """Every value fits into some combination; the recipes hold images out."""
    draw = random.Random(0)
    for name, dimension in space.dimensions.items():
        for value in dimension.ends:
            problem: SpaceError | None = None
            for params in itertools.islice(_combinations(space, draw), _COMBINATIONS):
                try:
                    cell = space.cell({**params, name: value})
                except SpaceError as error:
                    problem = problem or error
                    continue
                problem = None
                _check_held_out(space, cell)
                break
            if problem is not None:
                why = str(problem).removeprefix(f"{space.path}: ")
                raise SpaceError(f"{space.path}: space.{name}: {name_of(value)} fits no recipe: {why}")


def _check_held_out(space: Space, cell: Cell) -> None:
    t = cell.recipe.train
    if t.final:
        raise SpaceError(
            f"{space.path}: train.final: true holds no images out to search by; put train.final: false into set, and true into "
            "table.set"
        )
    for rung in space.config.prune.rungs:
        if rung % t.validate_every:
            raise SpaceError(
                f"{space.path}: prune.rungs: nothing is evaluated after epoch {rung}: train.validate_every is {t.validate_every}"
            )


def _combinations(space: Space, draw: random.Random) -> Iterator[dict[str, Any]]:
    """The first one, then some by chance."""
    yield space.first
    while True:
        yield {name: draw.choice(d.ends) for name, d in space.dimensions.items()}
