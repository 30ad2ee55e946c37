"""The front: what beats what, what is old, the picture, and a real measurement beside ONNX Runtime."""

from __future__ import annotations

import itertools
import json
import re
import sys
from concurrent.futures import Future
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import lowbit
from lowbit import cli, page
from lowbit.bench.peers import Session
from lowbit.bench.superres import low_resolution
from lowbit.train import aggregate, cells, compare, measure_front
from lowbit.train.cells import Places
from lowbit.train.data.superres import Pair
from lowbit.train.front import beaten_by, figure, footnote, front_rows, hover, read_front, resolve
from lowbit.train.labels import Label, place
from lowbit.train.recipe import load_recipe
from lowbit.train.rundir import RunError, write_json
from lowbit.train.table import Table, load_table
from lowbit.train.tasks.superres import psnr
from lowbit.train.trainer import train
from lowbit.train.workers import Job
from lowbit.upscale import Upscaler

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


# ------------------------------------------------------------------------------------------ dominance


def test_beaten_by_on_every_small_case() -> None:
    """All sets of up to three points on a 3x3 grid, ties in one and in both included, against the definition."""
    grid = list(itertools.product(range(3), range(3)))
    for count in (0, 1, 2, 3):
        for points in itertools.product(grid, repeat=count):
            scores, costs = [p[0] for p in points], [p[1] for p in points]
            found = beaten_by(scores, costs)
            for (score, cost), by in zip(points, found, strict=True):
                better = [i for i, (s, c) in enumerate(points) if s >= score and c <= cost and (s, c) != (score, cost)]
                assert (by is None) == (not better)
                if by is not None:
                    assert by in better
                    assert found[by] is None, "who is named stands on the front"


def test_equal_points_stand_together() -> None:
    assert beaten_by([0.9, 0.9, 0.9, 0.8], [1.0, 1.0, 2.0, 1.0]) == [None, None, 0, 0]
    assert beaten_by([0.9, 0.95, 0.99], [1.0, 1.0, 1.0]) == [2, 2, None]


def test_costs_that_noise_decides() -> None:
    assert beaten_by([0.9, 0.91], [1.0, 1.015], 0.02) == [1, None]
    assert beaten_by([0.9, 0.91], [1.0, 1.025], 0.02) == [None, None]
    assert beaten_by([0.9, 0.9], [1.0, 1.015], 0.02) == [None, None]
    assert beaten_by([0.9, 0.91, 0.92], [1.0, 1.015, 1.03], 0.02) == [2, 2, None], "who is named stands on the front"


# ------------------------------------------------------------------------------------------ what was measured


def point(
    cell: str, ms: float, size: int, runtime: str = "lowbit", values: Any = None, hash_: str = "h"
) -> dict[str, Any]:
    seconds = {"median": ms / 1e3, "p10": 0.9 * ms / 1e3, "p90": 1.2 * ms / 1e3, "samples": 10}
    proof = {"integers": 100, "integers_differ": 0} if runtime == "lowbit" else None
    made = {"cell": cell, "runtime": runtime, "seed": 0, "hash": hash_, "seconds": seconds, "bytes": size}
    return {**made, "note": "", "values": values, "proof": proof}


def front(*points: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "format": 1,
        "table": "t",
        "metric": "accuracy",
        "split": "test",
        "date": "2030-01-02T03:04:05+00:00",
        "code": {},
        "machine": {"processor": "some CPU"},
        "versions": {"lowbit": "1", "onnxruntime": "2"},
        "isa": "avx2",
        "threads": 1,
        "repeats": 10,
        "input": [28, 28, 1],
        "trusted": True,
        "warnings": [],
        "left_out": [],
        "points": list(points),
        **changes,
    }


def row(label: str, mean: float | None, sd: float | None = 0.002) -> dict[str, Any]:
    return {"label": label, "mean": mean, "sd": sd, "n": 3}


ROWS = [row("slow", 0.90), row("fast", 0.88), row("worse", 0.87), row("float", 0.91)]
POINTS = [
    point("slow", 0.2, 9000),
    point("fast", 0.1, 5000),
    point("worse", 0.15, 4000),
    point("float", 2.0, 90000),
    point("float", 1.0, 30000, "ort-int8", {"0": 0.90, "1": 0.91, "2": 0.92}),
]
HASHES = {(r["label"], 0): "h" for r in ROWS}


def test_points_and_who_beats_them() -> None:
    found = resolve(front(*POINTS), ROWS, HASHES, "test")
    by = {p["name"]: (p["time_beaten_by"], p["size_beaten_by"]) for p in found["points"]}
    assert by == {
        "slow": (None, None),
        "fast": (None, None),
        "worse": ("fast", None),
        "float": ("float (ORT int8)", "float (ORT int8)"),
        "float (ORT int8)": (None, None),
    }
    int8 = found["points"][-1]
    assert (round(int8["mean"], 12), round(int8["sd"], 12), int8["n"]) == (0.91, 0.01, 3), "its own score, not float's"
    assert front_rows(found, "accuracy")[1:3] == [
        ["fast", "88.00 +- 0.20", "3", "0.100", "0.0900 .. 0.120", "5.00", "front", "front"],
        ["worse", "87.00 +- 0.20", "3", "0.150", "0.135 .. 0.180", "4.00", "by fast", "front"],
    ]
    assert "4 files proved: 0 of 400 integers differ" in footnote(found)
    assert hover(found["points"][2], "accuracy").splitlines() == [
        "worse, lowbit",
        "87.00 ± 0.20 %, 3 seeds",
        "0.150 ms, 4.00 kB",
        "against time: beaten by fast",
        "against size: on the front",
    ]


def test_what_is_old_or_not_measured_is_left_out_and_said() -> None:
    points = [*POINTS, point("gone", 1.0, 1)]
    found = resolve(
        front(*points), [*ROWS, row("new", 0.9), row("empty", None)], {**HASHES, ("slow", 0): "other"}, "test"
    )
    assert [p["cell"] for p in found["points"]] == ["fast", "worse", "float", "float"]
    assert (found["stale"], found["unmeasured"]) == (["slow", "gone"], ["new"])
    assert "another recipe than the table has now, and left out: slow, gone." in footnote(found)
    assert "Not measured: new; lowbit compare --front measures all." in footnote(found)
    found = resolve(front(*POINTS), ROWS, HASHES, "validation")
    assert [p["name"] for p in found["points"]] == ["slow", "fast", "worse", "float"]
    assert "float (ORT int8): its score is of the test images, the table's of the validation images" in footnote(found)
    noisy = resolve(front(*POINTS, trusted=False, input=[3]), ROWS, HASHES, "test")
    assert "not quiet" in footnote(noisy)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"format": 2, "points": []}',
        '{"format": 1}',
        '{"format": 1, "points": []}',
        json.dumps(front(1)),  # type: ignore[arg-type]
        json.dumps(front({**POINTS[0], "runtime": "tvm"})),
        json.dumps(front({**POINTS[0], "seconds": {"median": float("nan"), "p10": 1, "p90": 1}})),
        json.dumps(front({k: v for k, v in POINTS[0].items() if k != "hash"})),
    ],
)
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "front.json"
    assert read_front(path) is None
    path.write_text(text)
    with pytest.raises(RunError, match=r"front\.json: .*delete it and measure again"):
        read_front(path)
    path.write_text(json.dumps(front(*POINTS)))
    assert read_front(path) == front(*POINTS)


# ------------------------------------------------------------------------------------------ pictures


def test_labels_lie_on_nothing() -> None:
    from matplotlib.figure import Figure

    rng = np.random.default_rng(0)
    with page.style():
        drawn = Figure(figsize=(8.4, 6.0), layout="constrained")
        axes = drawn.subplots()
        axes.set_xscale("log")
        xs, ys = np.concatenate([rng.uniform(1, 1.02, 12), rng.uniform(1, 30, 12)]), rng.uniform(0, 1, 24)
        axes.plot(xs, ys, "o")
        axes.set_xlim(0.5, 60)
        axes.set_ylim(-0.2, 1.2)
        boxes = place(
            axes, [Label(f"label-{i}", x, y, {"fontsize": 8}) for i, (x, y) in enumerate(zip(xs, ys, strict=True))]
        )
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for x, y in axes.transData.transform(np.column_stack([xs, ys])):
        assert not any(box.contains(x, y) for box in boxes)
    inside = axes.get_window_extent()
    assert all(inside.x0 <= b.x0 and b.x1 <= inside.x1 and inside.y0 <= b.y0 and b.y1 <= inside.y1 for b in boxes)


def test_one_point_can_be_drawn() -> None:
    found = resolve(front(POINTS[0]), [row("slow", 0.9, None)], HASHES, "test")
    with page.style():
        assert len(figure(found, "accuracy").axes) == 2


class Elsewhere(HTMLParser):
    """What a page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [
            f"{tag} {v}" for k, v in attrs if k in ("src", "href", "xlink:href") and not (v or "").startswith("#")
        ]
        self.loads += [tag] if tag in ("script", "link", "iframe") else []


# ------------------------------------------------------------------------------------------ for real

FLOAT = {"method": "float", "weight_bits": 32, "activation_bits": 32, "edges": "float"}
TABLE: dict[str, Any] = {
    "name": "tiny",
    "recipe": {
        "model": {"name": "bireal_resnet14", "width": 4, "blocks": 1},
        "quantize": {"method": "sign", "edges": "int8", "residual_dtype": "float16"},
        "data": {"name": "image_folder", "root": "DATA", "size": 8, "channels": 1},
        "train": {"epochs": 2, "batch_size": 8, "lr": 0.05, "device": "cpu"},
    },
    "cells": {"sign": {}, "float": {"set": {"quantize": FLOAT}, "seeds": 2}},
    "seeds": 1,
}


class Here:
    """An executor that trains in this process, one after the other."""

    slots = 1

    def submit(self, job: Job) -> Future[int]:
        train(load_recipe(job.recipe), job.run_dir, test=job.test)
        future: Future[int] = Future()
        future.set_result(0)
        return future

    def interrupt(self, run_dir: Path) -> None:
        raise AssertionError(run_dir)

    def stop(self) -> None:
        pass


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Table, Places, dict[str, Any]]:
    """A trained table, measured."""
    folder, rng = tmp_path_factory.mktemp("front"), np.random.default_rng(0)
    for part, count in (("train", 300), ("test", 60)):
        for label, low in (("dark", 0), ("light", 30)):
            (folder / "data" / part / label).mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(low, low + 160, (8, 8), np.uint8)
                Image.fromarray(noise).save(folder / "data" / part / label / f"{i}.png")
    recipe = {**TABLE["recipe"], "data": {**TABLE["recipe"]["data"], "root": str(folder / "data")}}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TABLE, "recipe": recipe}, sort_keys=False))
    table, places = load_table(path), Places(folder / "runs", folder / "results" / "tiny")
    steps = cells.plan(table.cells(), places)
    assert not compare.run("tiny", steps, places, Here())
    lines: list[str] = []
    results = cells.read_results(table.cells(), places)
    found = measure_front.measure(table, table.cells(), results, places, repeats=3, on_progress=lines.append)
    assert any("120 of 120 images" in line for line in lines)
    write_json(places.front, found)
    return table, places, found


def test_every_network_in_one_run(measured: tuple[Table, Places, dict[str, Any]]) -> None:
    table, places, found = measured
    results = cells.read_results(table.cells(), places)
    names = [(p["cell"], p["runtime"]) for p in found["points"]]
    assert names == [("sign", "lowbit"), ("float", "lowbit"), ("float", "ort-fp32"), ("float", "ort-int8")]
    assert found["left_out"] == []
    for each in found["points"]:
        s = each["seconds"]
        assert 0 < s["p10"] <= s["median"] <= s["p90"]
        assert s["samples"] == 3
        assert each["hash"] == results[each["cell"], "seed0"]["hash"]
        assert (each["proof"] or {"integers_differ": 0})["integers_differ"] == 0
        assert (each["proof"] is None) == (each["runtime"] != "lowbit") == (each["values"] is not None)
    sign, own, fp32, int8 = found["points"]
    assert sign["bytes"] == (places.run_dir(table.cell("sign", 0)) / "model.lowbit").stat().st_size < own["bytes"]
    assert sign["proof"]["integers"] > 0
    for seed, value in fp32["values"].items():
        assert value == results["float", f"seed{seed}"]["results"]["test"]["accuracy"], (
            "the float network is the same in both"
        )
    assert sorted(fp32["values"]) == sorted(int8["values"]) == ["0", "1"]
    assert "8" in int8["note"]
    assert int8["bytes"] != fp32["bytes"] > 4 * results["float", "seed0"]["parameters"]


def test_the_page_the_picture_and_the_document(measured: tuple[Table, Places, dict[str, Any]], tmp_path: Path) -> None:
    table, places, _ = measured
    tree = aggregate.aggregate(table, places)
    paths = aggregate.write(table, tree, tmp_path)
    assert [p.name for p in paths] == ["tiny.json", "tiny.md", "tiny.html", "tiny-front.png"]
    assert json.loads(paths[0].read_text())["front"]["points"][0]["cell"] == "sign"
    document, web = paths[1].read_text(), paths[2].read_text()
    assert "![Test accuracy against time and size](tiny-front.png)" in document
    assert re.search(r"\| sign \| \d+\.\d\d \| 1 \| 0\.0\d+ \|.*\| front \| front \|", document)
    assert "| float (ORT int8) |" in document
    assert Elsewhere(web).loads == []
    assert web.count('<g class="point"><title>') == 8
    assert "<title>float, ONNX Runtime int8" in web
    assert "Accuracy against time" in web
    assert "Accuracy against size" in web
    picture = np.asarray(Image.open(paths[3]).convert("RGB"))
    assert picture.shape[1] > 1500
    assert (picture[:3, :3] == 255).all()
    assert (picture != 255).any(axis=2).mean() > 0.005

    tree = aggregate.aggregate(load_table(table.path, ["train.lr=0.06"]), places)
    assert tree["front"]["points"] == [], "another recipe: no results"
    assert "Front" not in aggregate.markdown(tree)
    aggregate.write(table, tree, tmp_path / "old")
    assert not (tmp_path / "old" / "tiny-front.png").exists()


def test_a_run_that_is_not_there(measured: tuple[Table, Places, dict[str, Any]], tmp_path: Path) -> None:
    """On a clean checkout results are there and runs are not: what is timed is trained again, and nothing else."""
    table, places, _ = measured
    clean = Places(tmp_path / "runs", places.results)
    timed = measure_front.runs_to_time(table.cells(), clean)
    assert [cell.title for cell in timed] == ["sign seed 0", "float seed 0"]
    assert [s.action for s in cells.plan(table.cells(), clean)] == [cells.Action.done] * 3
    steps = {s.cell.title: s.action for s in cells.plan(table.cells(), clean, runs_of=timed)}
    assert steps == {
        "sign seed 0": cells.Action.run,
        "float seed 0": cells.Action.run,
        "float seed 1": cells.Action.done,
    }
    why = {s.cell.title: s.why for s in cells.plan(table.cells(), clean, runs_of=timed)}
    assert why == {
        "sign seed 0": "its run is not here and has to be timed",
        "float seed 0": "its run is not here and has to be timed",
        "float seed 1": "",
    }
    moved = Places(tmp_path / "moved", places.results)
    (moved.runs / "float").mkdir(parents=True)
    for name in ("seed1", "seed1.json"):
        (moved.runs / "float" / name).symlink_to(places.runs / "float" / name)
    assert [cell.title for cell in measure_front.runs_to_time(table.cells(), moved)][1] == "float seed 1"
    with pytest.raises(RunError, match="sign seed 0: its run .* is not there"):
        measure_front.measure(table, table.cells(), cells.read_results(table.cells(), clean), clean)
    with pytest.raises(RunError, match="no cell has a result yet"):
        measure_front.measure(table, table.cells(), {}, clean)


def test_the_command(
    measured: tuple[Table, Places, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table, places, found = measured
    made: list[int] = []
    monkeypatch.setattr(measure_front, "measure", lambda *_, **k: made.append(1) or {**found, "repeats": 77})
    monkeypatch.setenv("COLUMNS", "160")

    def call(*words: str) -> tuple[int, str]:
        folders = ["--out", str(places.runs), "--cells", str(places.results.parent)]
        monkeypatch.setattr(sys, "argv", ["lowbit", "compare", str(table.path), *folders, *words])
        with pytest.raises(SystemExit) as stop:
            cli.run()
        shown = capsys.readouterr()
        return int(str(stop.value.code or 0)), shown.out + shown.err

    status, said = call("--front")
    assert (status, len(made)) == (0, 1)
    assert "against" in said  # the column is as wide as the terminal
    assert "tiny-front.png" in said
    assert read_front(places.front)["repeats"] == 77  # type: ignore[index]
    status, said = call()
    assert (status, len(made)) == (0, 1), "drawn again without measuring"
    assert "against" in said
    for words in (["--front", "--check-one"], ["--front", "--only", "sign"], ["--front", "--tune"]):
        assert call(*words)[0] == 2
    write_json(places.front, found)


# ------------------------------------------------------------------------------------------ pictures as data


@pytest.mark.parametrize("size", [(64, 64), (70, 130), (65, 64)])
def test_psnr_in_tiles_is_that_of_the_whole(size: tuple[int, int]) -> None:
    """The engine in the peer's place: put together of tiles of one fixed size, to the last bit what it gives as a whole."""
    graph = low_resolution((64, 64), channels=8, layers=2)
    engine, whole = lowbit.load(graph), Upscaler(graph)
    session = Session(
        lambda: None, lambda x: np.asarray(engine(np.ascontiguousarray(x.transpose(0, 2, 3, 1)))).transpose(0, 3, 1, 2)
    )
    rng = np.random.default_rng(3)
    low = rng.random(size, np.float32)
    pair = Pair.of("a", low, rng.integers(0, 256, (2 * size[0], 2 * size[1]), np.uint8))

    class Data:
        def evaluation(self, *_: object, **__: object) -> list[Pair]:
            return [pair]

    found = measure_front._psnr(session, graph, Data(), "test", 0)  # type: ignore[arg-type]
    assert found == psnr(whole(low), pair[1][0, 0].numpy(), 2)


def test_a_picture_that_is_too_small_is_said() -> None:
    graph = low_resolution((64, 64), channels=8, layers=1)
    pair = Pair.of("tiny.png", np.zeros((30, 64), np.float32), np.zeros((60, 128), np.uint8))

    class Data:
        def evaluation(self, *_: object, **__: object) -> list[Pair]:
            return [pair]

    session = Session(lambda: None, lambda x: x)
    found = measure_front._psnr(session, graph, Data(), "test", 0)  # type: ignore[arg-type]
    assert found == "in ONNX Runtime it reads 64x64 pixels, and tiny.png has 30x64"
