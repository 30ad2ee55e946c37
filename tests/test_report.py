"""The report: one self-contained page from whatever a run directory holds, and the same facts in a few lines."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import lowbit
from lowbit import report
from lowbit.train.recipe import load_recipe
from lowbit.train.rundir import RunError, write_json, write_metrics
from networks import CLASSES, classifier

ROOT = Path(__file__).parent.parent
CONFUSION = [[90, 7, 3], [4, 95, 1], [0, 20, 80]]

Make = Callable[..., Path]


class Page(HTMLParser):
    """Checks that tags are balanced; collects what would be loaded and the text."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key in ("src", "href", "xlink:href", "data", "action") and value:
                self.loaded.append(value)
            if key == "id" and value:
                self.ids.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    @property
    def text(self) -> str:
        return html.unescape(re.sub(r"<[^>]*>", " ", self.source))


def row(epoch: int, **changes: Any) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "step": 100 * epoch,
        "lr": 0.1,
        "train_loss": 1 / epoch,
        "train_accuracy": 1 - 0.5 / epoch,
        "val_loss": 1.1 / epoch,
        "val_accuracy": 0.9 - 0.5 / epoch,
        "gap": 0.1**epoch,
        "temperature": 10.0**epoch,
        "flips_epoch": 0.1 / epoch,
        "flips_start": 0.1,
        "images_per_second": 1000.0,
        "seconds": 1.0,
        **changes,
    }


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A run directory with the parts asked for."""

    def build(*parts: str, rows: int = 3, run: dict[str, Any] | None = None, **changes: Any) -> Path:
        place = tmp_path / "run"
        place.mkdir()
        recipe = load_recipe(ROOT / "examples/own_images.yaml", ["model.name=bireal_resnet14"])
        (place / "recipe.yaml").write_text(recipe.to_yaml())
        measured = {"accuracy": 0.8833, "loss": 0.3, "images": 300, "confusion": CONFUSION}
        write_json(
            place / "run.json",
            {
                "format": 1,
                "name": "own-images",
                "status": "finished",
                "error": None,
                "seed": 0,
                "started": "2026-01-02T03:04:05+00:00",
                "finished": "2026-01-02T03:05:05+00:00",
                "wall_seconds": 60.0,
                "resumed": 0,
                "versions": {"python": "3.11", "lowbit": "0.1.0"},
                "machine": {"processor": "a processor", "cores": 2, "threads": 2, "gpu": None},
                "input": {"classes": list(CLASSES)},
                "task": "classify",
                "metric": "accuracy",
                "parameters": 1234,
                "epochs": 3,
                "epochs_done": rows,
                "warnings": [],
                "results": {"validation": measured, "test": None},
                **(run or {}),
            },
        )
        write_metrics(place / "metrics.csv", [row(e + 1, **changes) for e in range(rows)], "accuracy")
        if "file" in parts:
            lowbit.save(classifier(), place / "model.lowbit")
            proof = {
                "inputs": 512,
                "integers": 3_000_000,
                "integers_differ": 0,
                "root_activations": 1_000_000,
                "root_flips": 0,
                "decisions": 300,
                "decisions_changed": 0,
                "accuracy_training": 0.88,
                "accuracy_engine": 0.89,
                "confusion": CONFUSION,
                "failures": [],
                "file_bytes": 5000,
                "float_bytes": 100_000,
            }
            (place / "proof.json").write_text(json.dumps(proof))
        if "bench" in parts:
            from lowbit.bench import bench_file, write_result

            write_result(place / "bench.json", bench_file(place / "model.lowbit", repeats=2))
        return place

    return build


def test_a_whole_run(make: Make) -> None:
    place = make("file", "bench")
    path, missing = report.write_report(place)
    assert path == place / "report.html"
    assert missing == []
    page = Page(path)
    for words in (
        "own-images",
        "89.00%",
        "integers that differ",
        "Loss",
        "SLB gap and temperature",
        "Flipped weights",
        "Confusion matrix",
        "answered by the engine",
        "block0",
        "the same numbers in float32",
        "ONNX Runtime",
        "a processor",
        "method: slb",
    ):
        assert words in page.text, words
    assert page.tags.count("svg") == 5
    assert "Layers against this core's peak" in page.text


def test_nothing_is_loaded_from_elsewhere(make: Make) -> None:
    path, _ = report.write_report(make("file", "bench"))
    page = Page(path)
    assert all(target.startswith("#") for target in page.loaded)
    assert not {"script", "link", "img", "iframe", "image"} & set(page.tags)
    assert "@import" not in page.source
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page.source))
    assert len(page.ids) == len(set(page.ids))  # figures share one page
    used = re.findall(r"url\(#([^)]*)\)", page.source) + [t[1:] for t in page.loaded]
    assert set(used) <= set(page.ids)


def test_the_same_run_gives_the_same_page(make: Make, tmp_path: Path) -> None:
    place = make("file")
    one, _ = report.write_report(place, tmp_path / "one.html")
    two, _ = report.write_report(place, tmp_path / "two.html")
    assert one.read_bytes() == two.read_bytes()


def test_what_is_missing_is_named_with_its_command(make: Make) -> None:
    place = make()
    path, missing = report.write_report(place)
    assert [command for _, command in missing] == [
        f"lowbit export {place}",
        f"lowbit bench {place / 'model.lowbit'} --json {place / 'bench.json'}",
    ]
    text = Page(path).text
    assert all(command in text for _, command in missing)
    assert "88.33%" in text  # what there is instead: the held-out images
    assert "answered by the training graph" in text
    assert "Speed" not in text


def test_a_run_that_has_just_begun(make: Make) -> None:
    place = make(rows=0, run={"status": "failed", "error": "interrupted", "results": None})
    path, missing = report.write_report(place)
    assert missing[0] == (
        "the end of the training (failed after 0 of 3 epochs)",
        f"lowbit train {place} --resume",
    )
    assert "No epoch has ended yet" in Page(path).text
    assert [name for name, _ in report.summary(place)][:2] == ["report", f"missing: {missing[0][0]}"]


def test_warnings_and_images_that_were_passed_over(make: Make) -> None:
    names = [f"cat/{i}.png" for i in range(7)]
    text = Page(report.write_report(make(run={"warnings": ["rho is high"], "broken_images": names}))[0]).text
    assert "Warning: rho is high" in text
    assert "7 of the images can't be read and were passed over" in text
    assert "cat/4.png, ..." in text
    assert "cat/5.png" not in text


def test_methods_without_temperature_and_runs_without_held_out_images(make: Make) -> None:
    nothing = dict.fromkeys(("val_loss", "val_accuracy", "gap", "temperature", "flips_epoch", "flips_start"))
    page = Page(report.write_report(make(**nothing))[0])
    assert page.tags.count("svg") == 2
    assert "Nothing was held out" in page.text


def test_names_are_text_not_markup(make: Make) -> None:
    evil = '<script>alert("x")</script>'
    place = make(run={"name": evil, "input": {"classes": [evil, "&amp;", "ok"]}, "warnings": [evil]})
    page = Page(report.write_report(place)[0])
    assert "script" not in page.tags
    assert evil in html.unescape(page.source)


def test_summary(make: Make) -> None:
    place = make("file", "bench")
    report.write_report(place)
    facts = dict(report.summary(place))
    size = (place / "model.lowbit").stat().st_size
    assert facts["accuracy, training graph"] == "88.00% of 300 images"
    assert facts["accuracy, engine"] == "89.00% of 300 images"
    assert facts["integers that differ, interpreter and engine"] == "0 of 3,000,000, on 512 images"
    assert facts["root flips against the training graph"] == "0 of 1,000,000 activations"
    assert facts["decisions that changed"] == "0 of 300"
    assert facts["file"].startswith(f"{size:,} bytes, {100_000 / size:.1f}x smaller")
    assert "smaller than in float32" in facts["low-bit layers with their scales"]
    assert "ms on 1 thread" in facts["time for an image"]
    assert facts["report"] == str(place / "report.html")
    assert not any(name.startswith("missing") for name in facts)


def test_a_failed_proof_is_shown(make: Make) -> None:
    place = make("file")
    proof = json.loads((place / "proof.json").read_text())
    (place / "proof.json").write_text(json.dumps({**proof, "integers_differ": 7, "failures": ["7 integers differ"]}))
    assert ("the proof fails", "7 integers differ") in report.summary(place)


def test_broken_parts(make: Make, tmp_path: Path) -> None:
    place = make("file")
    (place / "bench.json").write_text("{")
    with pytest.raises(RunError, match=r"bench\.json: can.t be read"):
        report.write_report(place)
    (place / "bench.json").write_text('{"format": 1}')  # of an older lowbit: as good as none
    assert [what for what, _ in report.write_report(place)[1]] == ["the speed"]
    (place / "bench.json").unlink()
    (place / "report.html").unlink()
    (place / "model.lowbit").write_bytes(b"x")
    with pytest.raises(lowbit.FileError, match=r"model\.lowbit"):
        report.write_report(place)
    with pytest.raises(RunError, match="not a run directory"):
        report.summary(tmp_path)
    assert not (place / "report.html").exists()


def test_a_page_that_cannot_be_written(make: Make) -> None:
    with pytest.raises(lowbit.FileError, match="can't be written"):
        report.write_report(make(), "/proc/nowhere.html")
