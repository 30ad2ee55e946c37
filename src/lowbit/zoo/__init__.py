"""The zoo: trained networks that come with the package, each a ``NAME.lowbit`` with its card ``NAME.json`` beside it.

>>> net = lowbit.load("fashion-demo")
>>> net.classify("picture.png")

A name stands wherever a file does. What lies in the folder wins: a file called like a network of the zoo is that file. A card says
what the network is, how it was made and what was measured of this very file; one that does not fit its file is refused.
`lowbit zoo add` writes both (`lowbit.train.zoo`). Needs no more than the runtime.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lowbit.packfile import FileError

__all__ = ["FOLDER", "METRICS", "Card", "ZooError", "card_at", "check_name", "load_card", "locate", "names"]

FORMAT: Final = 1
"""Of the cards."""

FOLDER = Path(__file__).parent
"""Where the files and the cards lie."""

METRICS: Final = {"classify": "accuracy", "superres": "psnr"}
"""What the networks of each task are measured by."""

_NAME: Final = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


class ZooError(FileError):
    """No network of this name, or a card that can't be used or does not fit its file."""


@dataclass(frozen=True)
class Card:
    """What is known of a network of the zoo.

    Attributes:
        name, title, task: what it is called, what it is in a sentence, and "classify" or "superres".
        bytes, sha256: of the file.
        measured: of this very file, on the engine: ``metric, value, images, data, split``; of super-resolution ``bicubic`` and
            ``pictures``: ``name, psnr, psnr_bicubic`` of each.
        seeds: ``values`` (seed -> metric of the training graph on the test images), ``mean, sd``; sd is None for one seed.
        time: ``milliseconds`` of one call on ``threads`` threads, ``batch``, ``isa``, ``machine``, ``trusted`` and ``peers`` (name ->
            ``milliseconds, ratio``: how many times ours), as `lowbit bench` measured them; None where nobody did.
        recipe: all of it, every field resolved.
        command: makes the file and the card again, in the folder of lowbit's repository.
        licence: of the data it was trained on.
        made: ``date, lowbit, commit``.
    """

    name: str
    title: str
    task: str
    bytes: int
    sha256: str
    measured: Mapping[str, Any]
    seeds: Mapping[str, Any]
    time: Mapping[str, Any] | None
    recipe: Mapping[str, Any]
    command: str
    licence: str
    made: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The network's file."""
        return FOLDER / f"{self.name}.lowbit"

    @property
    def result(self) -> str:
        """What was measured of the file, in its unit."""
        value = float(self.measured["value"])
        if self.measured["metric"] == "psnr":
            return f"{value:.2f} dB ({value - float(self.measured['bicubic']):+.2f} over bicubic)"
        return f"{value:.2%}"

    @property
    def milliseconds(self) -> str:
        """Of one image or patch; nothing where it was not measured."""
        return "" if self.time is None else f"{self.time['milliseconds'] / self.time['batch']:.3g}"

    def to_json(self) -> dict[str, Any]:
        """The content of the card's file."""
        return {"format": FORMAT, **{key: getattr(self, key) for key in self.__dataclass_fields__}}


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _number(value: Any) -> bool:
    """Of JSON, and finite: Python reads NaN and Infinity there too."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _count(value: Any) -> bool:
    return isinstance(value, int) and _number(value) and value >= 1


def _each(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A mapping with names, all of whose values are good."""
    return lambda value: isinstance(value, dict) and all(map(good, value.values()))


def _has(**parts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict) and all(key in value and good(value[key]) for key, good in parts.items())
    )


_FIELDS: Final[Mapping[str, Callable[[Any], bool]]] = {
    "name": _text,
    "title": _text,
    "task": lambda value: _text(value) and value in METRICS,
    "bytes": _count,
    "sha256": lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None,
    "measured": _has(metric=_text, value=_number, images=_count, data=_text, split=_text),
    "seeds": _has(values=_each(_number), mean=_number, sd=lambda value: value is None or _number(value)),
    "time": lambda value: (
        value is None
        or _has(
            milliseconds=_number, batch=_count, threads=_count, peers=_each(_has(milliseconds=_number, ratio=_number))
        )(value)
    ),
    "recipe": _has(name=_text),
    "command": _text,
    "licence": _text,
    "made": _has(date=_text),
}
_OF_PICTURES: Final = _has(
    bicubic=_number,
    ssim=_number,
    pictures=lambda value: (
        isinstance(value, list)
        and bool(value)
        and all(map(_has(name=_text, psnr=_number, psnr_bicubic=_number), value))
    ),
)


def names() -> list[str]:
    """The networks there are: files with a card, and cards without a file (which `load_card` refuses)."""
    return sorted({path.stem for ending in ("lowbit", "json") for path in FOLDER.glob(f"*.{ending}")})


def check_name(name: str) -> None:
    """What a network may be called: lower-case words of letters and digits with "-" between them, so that no name is a path.

    Raises:
        ZooError: anything else.
    """
    if not _NAME.fullmatch(name):
        what = " has a path separator" if "/" in name or os.sep in name else ""
        raise ZooError(
            f"{name!r}{what and ':' + what}: a network of the zoo is called by lower-case words of letters and digits with '-' between "
            "them, like fashion-fast"
        )


def load_card(name: str) -> Card:
    """The card of a network, held against its file: size, checksum and task.

    Raises:
        ZooError: no such network, a field that is missing or wrong, or another file than the card's.
    """
    if name not in names():
        raise ZooError(f"{name}: no such network in the zoo; {_hint(name)}")
    path = FOLDER / f"{name}.json"
    try:
        tree = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ZooError(f"{name}: this network of the zoo has no card ({path.name}); {_AGAIN}") from None
    except (OSError, ValueError) as error:
        raise ZooError(f"{name}: its card {path.name} can't be read ({error}); {_AGAIN}") from None
    card = _parse(name, tree)
    _hold(card)
    return card


def _parse(name: str, tree: Any) -> Card:
    def refuse(why: str) -> ZooError:
        return ZooError(f"{name}: its card {name}.json {why}; {_AGAIN}")

    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise refuse(f"is no card of format {FORMAT}")
    for key, good in _FIELDS.items():
        if key not in tree:
            raise refuse(f"lacks {key!r}")
        if not good(tree[key]):
            raise refuse(f"has no usable {key!r}")
    unknown = set(tree) - set(_FIELDS) - {"format"}
    if unknown:
        raise refuse(f"has an unknown field {min(unknown)!r}")
    if tree["name"] != name:
        raise refuse(f"is that of {tree['name']!r}")
    measured = tree["measured"]
    if measured["metric"] != METRICS[tree["task"]]:
        raise refuse(
            f"measures {measured['metric']!r}, but networks of the task {tree['task']!r} have {METRICS[tree['task']]!r}"
        )
    if tree["task"] == "superres" and not _OF_PICTURES(measured):
        raise refuse("has no usable 'measured': super-resolution needs 'bicubic', 'ssim' and 'pictures'")
    return Card(**{key: tree[key] for key in _FIELDS})


def _hold(card: Card) -> None:
    """Hold a card against its file, without reading the tensors."""

    def refuse(why: str) -> ZooError:
        return ZooError(f"{card.name}: its card does not fit its file: {why}; {_AGAIN}")

    try:
        content = card.path.read_bytes()
    except OSError as error:
        raise refuse(f"{card.path.name} can't be read ({error.strerror or error})") from None
    if len(content) != card.bytes:
        raise refuse(f"the file has {len(content):,} bytes, the card says {card.bytes:,}")
    if hashlib.sha256(content).hexdigest() != card.sha256:
        raise refuse("the checksum (SHA-256) is another one")
    try:
        end = 8 + int.from_bytes(content[:8], "little")
        meta = json.loads(json.loads(content[8:end])["__metadata__"]["lowbit"])["graph"]["meta"]
        task = meta.get("task", "classify")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise refuse("the file is no lowbit file") from None
    if task != card.task:
        raise refuse(f"the file's task is {task!r}, the card says {card.task!r}")


_AGAIN: Final = "make both again with `lowbit zoo add`, or install lowbit again"


def _hint(name: str) -> str:
    known = names()
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    there = f"zoo has {', '.join(known) or 'nothing'}"
    return f"did you mean {' or '.join(map(repr, close))}? The {there}" if close else f"the {there}"


def locate(source: str | os.PathLike[str]) -> Path:
    """The file that `source` names: a path, or the name of a network of the zoo where there is no such file.

    Raises:
        ZooError: a name that neither is a file nor in the zoo, or whose card does not fit its file.
    """
    text = os.fspath(source)
    path = Path(text)
    if path.is_file() or path.parent == FOLDER:
        return path
    if text in names():  # a folder of that name is no file
        return load_card(text).path
    if path.exists():
        return path  # a folder: whoever reads says what is wrong with it
    if path.suffix == "" and path.name == text:
        raise ZooError(f"{text}: no such file, and no network of the zoo; {_hint(text)}")
    if path.stem in names():
        raise ZooError(
            f"{text}: no such file; the network of the zoo is named {path.stem!r} alone, without a folder or an ending"
        )
    return path


def card_at(path: str | os.PathLike[str]) -> Card | None:
    """The card of a file that lies in the zoo; None for any other file.

    Raises:
        ZooError: see `load_card`.
    """
    place = Path(path)
    return load_card(place.stem) if place.parent == FOLDER else None
