"""Recipes: what to train, written in YAML, checked before anything runs.

YAML only fills these typed fields; an unknown key, model, method or data set is refused with the nearest known one.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator
from pydantic.errors import PydanticUserError
from torch import nn

from lowbit.train.registry import nearest
from lowbit.train.schedule import published_growth

__all__ = [
    "ELSEWHERE",
    "DataConfig",
    "ModelConfig",
    "QuantizeConfig",
    "Recipe",
    "RecipeError",
    "ScheduleConfig",
    "TrainConfig",
    "differing_keys",
    "load_recipe",
    "parse_recipe",
]

ELSEWHERE: Final = ("name", "description", "data.root", "train.device", "train.workers")
"""Keys that say where a run is made, and not what is made: a resume may change them, and no result depends on them."""


class RecipeError(ValueError):
    """A recipe that can't be used; the message names the file, the key and what would be right."""


class Strict(BaseModel):
    """A section: unknown keys are refused, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelConfig(BaseModel):
    """``name`` and the model's own arguments beside it. ``package.module:function`` names a model of yours."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @property
    def arguments(self) -> dict[str, Any]:
        """The model's own arguments."""
        return dict(self.model_extra or {})


class QuantizeConfig(Strict):
    """Arguments of ``prepare``; see there."""

    method: str = "slb"
    weight_bits: Annotated[int, Field(ge=1, le=32)] = 1
    activation_bits: Annotated[int, Field(ge=1, le=32)] = 1
    activation: str = "auto"
    edges: Literal["int8", "float", "none"] = "int8"
    residual_dtype: Literal["float32", "float16"] = "float32"
    state_batchnorm: bool = False
    skip: tuple[str, ...] = ()
    overrides: dict[str, dict[str, Any]] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)
    activation_options: dict[str, Any] = Field(default_factory=dict)


class AugmentConfig(Strict):
    """What is done to each training image at random.

    Attributes:
        crop: shift by up to this many pixels; for data sets in memory.
        flip: mirror half of the images left to right.
        resized_crop: share of the image's area that is cut out and resized, smallest and largest: [0.08, 1.0] as published
            for ImageNet; for data sets that are decoded image by image.
        ratio: width / height of that cut, smallest and largest.
        rotate: turn by a random multiple of 90 degrees; for the patches of super-resolution.
    """

    crop: Annotated[int, Field(ge=0)] = 0
    flip: bool = False
    resized_crop: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    rotate: bool = False

    @model_validator(mode="after")
    def _agree(self) -> AugmentConfig:
        if self.resized_crop is not None and not 0 < self.resized_crop[0] <= self.resized_crop[1] <= 1:
            raise ValueError(f"resized_crop {list(self.resized_crop)}: shares of the area, 0 < smallest, largest <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio {list(self.ratio)}: 0 < smallest <= largest")
        return self


class DataConfig(BaseModel):
    """``name``, ``root`` (None: found by itself), ``augment``, and the data set's own arguments beside them."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    root: str | None = None
    augment: AugmentConfig = AugmentConfig()

    @property
    def arguments(self) -> dict[str, Any]:
        """The data set's own arguments."""
        return dict(self.model_extra or {})


class DistillConfig(Strict):
    """Knowledge distillation: the loss becomes (1 - weight) * the task's + weight * T^2 KL(teacher || network), both at T.

    Weight 1 with temperature 1 is the distributional loss of ReActNet (2003.03488).

    Attributes:
        teacher: directory or checkpoint of a finished run, with the same classes and images; usually a float network.
        weight: share of the teacher.
        temperature: T, which the logits are divided by.
    """

    teacher: str
    weight: Annotated[float, Field(gt=0, le=1)] = 0.9
    temperature: Annotated[float, Field(gt=0)] = 4.0


class TrainConfig(Strict):
    """How long, how fast, on what.

    Attributes:
        epochs: passes over the training images.
        batch_size: images in a forward pass of one process. A step of the optimiser sees ``batch_size`` times ``accumulate``
            times the number of processes; ``lr`` is for that many and is not scaled by itself.
        eval_batch_size: images in a forward pass of an evaluation or calibration.
        accumulate: forward passes whose gradients are averaged for one step; each has BN statistics of its own.
        optimizer: "sgd" (Nesterov off), "adam" or "adamw".
        lr: peak learning rate.
        momentum: of SGD.
        weight_decay: of float weights; BN, PReLU and biases have none.
        latent_lr_scale: the quantized layers' latent weights or logits learn this much faster.
        latent_weight_decay: decay of the latent weights or logits.
        lr_schedule: "cosine" to 0, "linear" to 0, "step" (times ``gamma`` at each of ``milestones``, in epochs), "constant".
        warmup: epochs of linear increase, may be a fraction.
        grad_clip: what ``grad_clip_by`` limits; None for no clipping.
        grad_clip_by: "norm": the norm of the whole gradient is at most ``grad_clip``. "rate": VDSR's adjustable clipping (1511.04587, 3.2):
            each component is clipped to +-``grad_clip`` / (the learning rate of its group at that step).
        loss: "auto": cross-entropy for classify, "l1" for superres. For superres: "l1" (mean absolute error), "mse" (mean squared error) or
            "patch" (half the squared error, summed over a patch, mean over the batch: the loss of VDSR, whose gradients are as large as its
            learning rates and clipping ask for).
        label_smoothing: share of the target spread over all classes.
        final: train on all training images, choose nothing: for settings that are fixed.
        validate_every: epochs between two evaluations.
        calibration_images: clean training images BN is calibrated on; None for as many as are held out.
        precision: "float32", or "bf16" for the soft training steps. Evaluation is float32 always.
        device: "auto" (a GPU where there is one), "cpu" or "gpu".
        devices: processes on each machine, one for each GPU; None for as many as torchrun started. ``lowbit train`` starts them.
        nodes: machines; None for as many as torchrun runs on.
        strategy: "auto" or "ddp": every process has the whole network, gradients are averaged.
        channels_last: memory format of the training steps.
        workers: processes of each rank that load images, for data sets that don't lie in memory; None for one on each core
            (16 at most), 0 for none. The batches do not depend on it.
        start_from: directory or checkpoint of a run to start from, float or low-bit: weights, batch norms, PReLUs, and the
            state of quantizers of the same kind. LNS needs a binary one.
        warm_start: epochs at the start, may be a fraction, in which only the methods' mapping networks (LNS) learn.
        mapping_lr_scale: the mapping networks learn this much faster.
        distill: a teacher, see ``DistillConfig``.
    """

    epochs: Annotated[int, Field(ge=1)] = 10
    batch_size: Annotated[int, Field(ge=2)] = 100
    accumulate: Annotated[int, Field(ge=1)] = 1
    eval_batch_size: Annotated[int, Field(ge=1)] = 500
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    latent_lr_scale: Annotated[float, Field(gt=0)] = 1.0
    latent_weight_decay: Annotated[float, Field(ge=0)] = 0.0
    lr_schedule: Literal["cosine", "linear", "step", "constant"] = "cosine"
    milestones: tuple[float, ...] = ()
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    warmup: Annotated[float, Field(ge=0)] = 0.0
    grad_clip: Annotated[float, Field(gt=0)] | None = None
    grad_clip_by: Literal["norm", "rate"] = "norm"
    loss: Literal["auto", "cross_entropy", "l1", "mse", "patch"] = "auto"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    final: bool = False
    validate_every: Annotated[int, Field(ge=1)] = 1
    calibration_images: Annotated[int, Field(ge=1)] | None = None
    precision: Literal["float32", "bf16"] = "float32"
    device: Literal["auto", "cpu", "gpu"] = "auto"
    devices: Annotated[int, Field(ge=1)] | None = None
    nodes: Annotated[int, Field(ge=1)] | None = None
    strategy: Literal["auto", "ddp"] = "auto"
    channels_last: bool = True
    workers: Annotated[int, Field(ge=0)] | None = None
    start_from: str | None = None
    warm_start: Annotated[float, Field(ge=0)] = 0.0
    mapping_lr_scale: Annotated[float, Field(gt=0)] = 1.0
    distill: DistillConfig | None = None

    @field_validator("strategy", mode="before")
    @classmethod
    def _whole_networks(cls, value: Any) -> Any:
        if isinstance(value, str) and value.lower().startswith(("fsdp", "deepspeed")):
            raise ValueError(
                f"{value} shards the parameters, but scales, mapping networks and BN calibration need whole layers, and a low-bit "
                "network of this kind fits on any device: use ddp, and if memory is short a smaller train.batch_size with "
                "train.accumulate"
            )
        return value

    @model_validator(mode="after")
    def _agree(self) -> TrainConfig:
        if self.lr_schedule == "step" and not self.milestones:
            raise ValueError("lr_schedule: step needs milestones, for example [5, 8]")
        if self.lr_schedule != "step" and self.milestones:
            raise ValueError(f"milestones belong to lr_schedule: step, not {self.lr_schedule}")
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError("milestones must rise")
        if self.warmup >= self.epochs:
            raise ValueError(f"warmup of {self.warmup} epochs in a run of {self.epochs}")
        if self.warm_start >= self.epochs:
            raise ValueError(f"warm_start of {self.warm_start} epochs in a run of {self.epochs}")
        return self


class ScheduleConfig(Strict):
    """SLB's temperature; nothing for methods without one. See ``Schedule``.

    ``growth`` is T at the end, 1000 by default; or ``speed`` is what T is multiplied with in every epoch between start
    and end, as the paper has it (then T at the end depends on the number of epochs, see ``published_growth``).
    """

    kind: Literal["exponential", "linear", "sine"] = "exponential"
    growth: Annotated[float, Field(ge=1)] | None = None
    speed: Annotated[float, Field(ge=1)] | None = None
    start: Annotated[float, Field(ge=0, lt=1)] = 0.0
    end: Annotated[float, Field(gt=0, le=1)] = 0.9
    every: Literal["step", "epoch"] = "step"

    @model_validator(mode="before")
    @classmethod
    def _growth_or_speed(cls, tree: Any) -> Any:
        if isinstance(tree, dict):
            given = [key for key in ("growth", "speed") if tree.get(key) is not None]
            if len(given) == 2:
                raise ValueError("give growth (T at the end) or speed (T's factor for each epoch), not both")
            if not given:
                return {**tree, "growth": 1000.0}
        return tree

    @model_validator(mode="after")
    def _agree(self) -> ScheduleConfig:
        if self.start >= self.end:
            raise ValueError(f"start {self.start} must come before end {self.end}")
        return self

    def total_growth(self, epochs: int) -> float:
        """T at the end of a run of ``epochs``."""
        if self.speed is not None:
            return published_growth(self.speed, epochs, self.start, self.end)
        return 1000.0 if self.growth is None else self.growth


class Recipe(Strict):
    """Everything a training run depends on."""

    name: str
    description: str = ""
    task: str = "classify"
    seed: Annotated[int, Field(ge=0)] = 0
    model: ModelConfig
    quantize: QuantizeConfig = QuantizeConfig()
    data: DataConfig
    train: TrainConfig = TrainConfig()
    schedule: ScheduleConfig = ScheduleConfig()

    def plain(self) -> dict[str, Any]:
        """Every field, resolved, as plain dicts, lists, numbers and strings."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The resolved recipe; ``load_recipe`` reads it back equal."""
        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True, width=120)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of a tree."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differing_keys(one: Recipe, other: Recipe, ignored: Collection[str] = ()) -> list[str]:
    """Dotted names of the fields in which two recipes differ, without those ``ignored`` (``ELSEWHERE``)."""
    a, b = dict(flatten(one.plain())), dict(flatten(other.plain()))
    missing = object()
    return sorted(key for key in {*a, *b} if key not in ignored and a.get(key, missing) != b.get(key, missing))


def _fields(where: Sequence[str | int], root: type[BaseModel]) -> list[str]:
    """Known keys of the section a dotted path leads to, through optional sections and mappings of sections."""
    section: Any = root
    for part in where:
        if inspect.isclass(section) and issubclass(section, BaseModel):
            section = section.model_fields[str(part)].annotation if str(part) in section.model_fields else None
        else:
            section = (get_args(section) or (None,))[-1]  # of a mapping's values
        inner = [a for a in get_args(section) if inspect.isclass(a) and issubclass(a, BaseModel)]
        if type(None) in get_args(section) and inner:
            section = inner[0]
    return list(section.model_fields) if inspect.isclass(section) and issubclass(section, BaseModel) else []


def explain_validation(error: ValidationError, root: type[BaseModel]) -> str:
    """The first of pydantic's complaints about a ``root`` in one line: the dotted key, and what would be right."""
    first = error.errors()[0]
    where = first["loc"]
    key = ".".join(str(part) for part in where)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}: {nearest(str(where[-1]), _fields(where[:-1], root))}{more}"
    if first["type"] == "missing":
        return f"key {key!r} is missing{more}"
    message = first["msg"].removeprefix("Value error, ")
    value = first.get("input")
    ours = first["type"] == "value_error"  # a sentence of a validator here, which names the value where it matters
    shown = f", got {value!r}" if isinstance(value, (str, int, float, bool, type(None))) and not ours else ""
    return f"{key}: {message}{shown}{more}" if key else f"{message}{more}"


def _check_names(recipe: Recipe) -> None:
    """Every name must be known, and every argument of a model or data set one it has."""
    from lowbit.train.data import DATASETS
    from lowbit.train.models import model_arguments, model_factory
    from lowbit.train.prepare import prepare
    from lowbit.train.quantizers import ACTIVATIONS, WEIGHTS, QuantizerWarning
    from lowbit.train.tasks import TASKS

    TASKS.get(recipe.task).check(recipe)
    if recipe.train.distill is not None and recipe.task != "classify":
        raise ValueError(f"train.distill compares class probabilities: it belongs to task classify, not {recipe.task}")
    WEIGHTS.get(recipe.quantize.method)
    q = recipe.quantize
    if q.activation != "auto":
        ACTIVATIONS.get(q.activation)
    try:  # the bits and options, by the judge of them
        with warnings.catch_warnings(action="ignore", category=QuantizerWarning):  # said where the network is trained
            prepare(
                nn.Conv2d(1, 1, 1),
                q.method,
                q.weight_bits,
                q.activation_bits,
                activation=q.activation,
                edges="none",
                options=q.options,
                activation_options=q.activation_options,
            )
    except ValueError as error:  # the layer has no name
        raise ValueError(f"quantize: {str(error).removeprefix('prepare: ').removeprefix(': ')}") from None
    known = list(model_arguments(recipe.model.name))
    for key in recipe.model.arguments:
        if key not in known:
            raise ValueError(f"unknown key 'model.{key}': {nearest(key, [*known, 'name'])}")
    _check_types("model", recipe.model.arguments, model_factory(recipe.model.name))
    dataset = DATASETS.get(recipe.data.name)
    taken = [key for key in inspect.signature(dataset).parameters if key != "root"]
    for key in recipe.data.arguments:
        if key not in taken:
            raise ValueError(f"unknown key 'data.{key}': {nearest(key, [*taken, *DataConfig.model_fields])}")
    _check_types("data", recipe.data.arguments, dataset)


def _check_types(section: str, arguments: Mapping[str, Any], function: Any) -> None:
    """Hold arguments against the function's annotations, where it has some that can be checked."""
    try:
        hints = get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except Exception:  # names that are there for type checkers only: anybody's own code
        return
    for key, value in arguments.items():
        try:
            TypeAdapter(hints.get(key, Any)).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"{section}.{key}: {error.errors()[0]['msg']}, got {value!r}") from None
        except PydanticUserError:
            continue  # no type of data


_KINDS: Final = {
    "recipe": ("a recipe", "`lowbit train` runs it"),
    "table": ("a table", "`lowbit compare` runs it, `lowbit train --cell LABEL` one cell"),
    "space": ("a space to search", "`lowbit search` runs it"),
}


def check_kind(tree: Mapping[str, Any], wanted: str, source: str) -> None:
    """Refuse a file that is one of the other kinds: "recipe", "table" or "space".

    Raises:
        RecipeError: with ``source`` in front, and the command that takes it.
    """
    kind = wanted
    if "recipe" in tree and "model" not in tree:
        kind = "space" if "space" in tree else "table"
    elif "recipe" not in tree and "model" in tree:
        kind = "recipe"
    if kind != wanted:
        what, way_out = _KINDS[kind]
        raise RecipeError(f"{source}: is {what}, not {_KINDS[wanted][0]}; {way_out}")


def parse_recipe(tree: Any, source: str = "recipe") -> Recipe:
    """Check a plain dict against the fields and the registries.

    Raises:
        RecipeError: with ``source`` in front.
    """
    if not isinstance(tree, dict):
        raise RecipeError(f"{source}: a recipe is a mapping of keys to values, found {type(tree).__name__}")
    check_kind(tree, "recipe", source)
    try:
        recipe = Recipe.model_validate(tree)
        _check_names(recipe)
    except ValidationError as error:
        raise RecipeError(f"{source}: {explain_validation(error, Recipe)}") from None
    except ValueError as error:
        raise RecipeError(f"{source}: {error}") from None
    return recipe


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice and reads 1e-4 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                problem = f"key {key!r} is written twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-4 for a string, and asks for 1.0e-4
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{where}: not YAML: {error.problem or error.context}{line}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def assign(tree: dict[str, Any], key: str, value: Any, what: str) -> None:
    """Put ``value`` at the dotted ``key`` of a tree, in place of what is there; sections are made on the way.

    Raises:
        RecipeError: a part of the way is no section; ``what`` in front.
    """
    *path, last = key.strip().split(".")
    section = tree
    for part in path:
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            raise RecipeError(f"{what}: {part!r} is not a section")
    section[last] = value


def assign_text(tree: dict[str, Any], assignment: str) -> None:
    """``assign`` from the command line's ``key.subkey=value``; the value is YAML."""
    key, equals, text = assignment.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {assignment!r}: write key.subkey=value, for example train.epochs=3")
    assign(tree, key, _parse_yaml(text, f"--set {assignment!r}"), f"--set {assignment!r}")


def read_yaml(path: Path, what: str = "recipe") -> Any:
    """The plain content of a YAML file, with the rules recipes have: no key twice, 1e-4 is a number.

    Raises:
        RecipeError: no such file (``what`` it is to hold is said), not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: can't read this {what} ({getattr(error, 'strerror', None) or error})") from None
    return _parse_yaml(text, str(path))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply ``key.subkey=value`` overrides in order, check it.

    Raises:
        RecipeError: no such file, not YAML, an unknown or impossible key; one error, the file's name in front.
    """
    tree = read_yaml(Path(path))
    if isinstance(tree, dict):
        for assignment in overrides:
            assign_text(tree, assignment)
    return parse_recipe(tree, str(path))
