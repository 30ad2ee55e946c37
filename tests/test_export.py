"""The proof and the export: they hold where they should, and they fail where they must."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import lowbit
from lowbit import Graph, Tensor
from lowbit.train import Pixels, calibrate_batchnorm, freeze, prepare
from lowbit.train import proof as proving
from lowbit.train.data import DATASETS, ImageData
from lowbit.train.export import ExportError, export_run
from lowbit.train.models import build_model
from lowbit.train.proof import prove
from lowbit.train.recipe import parse_recipe
from lowbit.train.rundir import RunError
from lowbit.train.trainer import train


def images(seed: int, count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 1, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def network() -> tuple[torch.nn.Module, Graph]:
    torch.manual_seed(0)
    model = build_model("bireal_resnet14", classes=4, in_channels=1, image_size=12, width=8, blocks=2)
    model = prepare(model, image=Pixels((120,), 1 / 70), residual_dtype="float16")
    calibrate_batchnorm(model, [images(0, 64)])
    model.train()(images(0, 64))
    calibrate_batchnorm(model, [images(0, 64)])
    return model.eval(), freeze(model, images(0, 1))


def test_the_proof_holds(network) -> None:
    model, graph = network
    labels = torch.arange(600) % 4
    seen: list[tuple[str, int, int]] = []
    p = prove(model, graph, lowbit.load(graph), images(1, 130), (images(2, 600), labels), lambda *a: seen.append(a))
    assert p.failures() == []
    assert (p.inputs, p.integers_differ, p.first_difference) == (130, 0, None)
    quantized = [t for t in graph.validate().values() if t.codes and t.codes.kind != "unsigned"]
    assert p.root_activations == 130 * sum(int(np.prod(t.shape)) for t in quantized)
    assert p.root_comparisons == 130 * sum(int(np.prod(t.shape)) * (2**t.codes.bits - 1) for t in quantized)
    assert p.root_comparisons > p.root_activations
    assert p.integers > p.root_activations
    assert (p.decisions, p.decisions_changed) == (600, 0)
    with torch.no_grad():
        right = (model(images(2, 600)).argmax(1) == labels).float().mean().item()
    assert p.accuracy_training == p.accuracy_engine == pytest.approx(right)
    assert seen[-1] == ("decisions", 600, 600)
    assert json.loads(json.dumps(p.as_dict()))["failures"] == []


def changed(graph: Graph, name: str, f) -> Graph:
    data = f(graph.tensors[name].data.copy())
    return Graph(graph.nodes, {**graph.tensors, name: Tensor(data, graph.tensors[name].codes)}, graph.meta)


def test_one_wrong_weight_in_the_engine_is_found_by_name(network) -> None:
    model, graph = network

    def flip(w: np.ndarray) -> np.ndarray:
        w[0, 0, 0, 0] *= -1
        return w

    layer = next(n.name for n in graph.nodes if n.op == "conv2d" and graph.tensors[f"{n.name}.weight"].codes.bits == 1)
    p = prove(model, graph, lowbit.load(changed(graph, f"{layer}.weight", flip)), images(1, 64))
    assert p.integers_differ > 0
    behind = [n.name for n in graph.nodes].index(layer)
    assert [n.name for n in graph.nodes].index(p.first_difference) >= behind
    assert any(p.first_difference in failure for failure in p.failures())


def test_a_graph_that_is_not_the_training_graph_has_root_flips(network) -> None:
    """Both engine and interpreter run the wrong constant: they agree, and yet it is not the network that was trained."""
    model, graph = network
    first = next(n for n in graph.nodes if n.op == "add" and n.params)
    wrong = changed(graph, first.params["term"], lambda t: t + np.float32(0.05))
    p = prove(model, wrong, lowbit.load(wrong), images(1, 64))
    assert p.integers_differ == 0
    assert p.root_flips > 0
    assert p.cascaded_flips >= p.root_flips
    assert len(p.root_by_layer) == 1  # the layers behind are fed the training graph's own numbers
    assert any("root flips" in failure for failure in p.failures())


def test_decisions_have_their_bound(network) -> None:
    model, graph = network
    head = next(n.name for n in graph.nodes if n.op == "linear")
    wrong = changed(graph, f"{head}.weight", lambda w: w[::-1])
    p = prove(model, wrong, lowbit.load(wrong), images(1, 64))
    assert p.root_flips == 0
    assert p.decisions_changed > 0
    assert any("decisions changed" in failure for failure in p.failures())


if "noise" not in DATASETS:

    @DATASETS.register("noise")
    def noise(root: str | None = None) -> ImageData:  # noqa: ARG001
        def read(seed: int, count: int):
            return images(seed, count), torch.arange(count) % 4

        return ImageData(
            "noise",
            tuple("abcd"),
            (1, 12, 12),
            (128,),
            1 / 74,
            lambda: read(1, 700),
            lambda: read(2, 100),
            validation=600,
        )


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = {
        "name": "noisy",
        "model": {"name": "bireal_resnet14", "width": 4, "blocks": 1},
        "quantize": {"residual_dtype": "float16"},
        "data": {"name": "noise"},
        "train": {"epochs": 1, "batch_size": 20, "eval_batch_size": 100},
    }
    path = tmp_path_factory.mktemp("runs") / "noisy"
    train(parse_recipe(tree), path, progress=False)
    return path


def test_export_writes_the_file_that_it_proved(run_dir: Path, tmp_path: Path) -> None:
    done = export_run(run_dir, tmp_path / "n.lowbit")
    assert done.path.stat().st_size == done.file_bytes
    assert lowbit.read(done.path) == done.graph
    assert done.graph.meta["classes"] == list("abcd")
    told = json.loads((run_dir / "proof.json").read_text())
    assert told["integers_differ"] == 0
    assert told["inputs"] == 512
    assert told["decisions"] == 100
    assert export_run(run_dir).path == run_dir / "model.lowbit"
    assert (run_dir / "model.lowbit").read_bytes() == done.path.read_bytes()
    assert export_run(run_dir, inputs=5000).proof.inputs == 700  # all there are


def test_export_fails_where_the_proof_does(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = proving._compare_engine

    def one_bit(proof, graph, engine, x) -> None:
        real(proof, graph, engine, x)
        proof.integers_differ, proof.first_difference = 1, "blocks.0.conv.quantize"

    monkeypatch.setattr(proving, "_compare_engine", one_bit)
    with pytest.raises(ExportError, match=r"not the one that was trained: 1 of .* first in blocks.0.conv.quantize"):
        export_run(run_dir, tmp_path / "n.lowbit")
    assert not list(tmp_path.iterdir())
    assert json.loads((run_dir / "proof.json").read_text())["integers_differ"] == 1


def test_export_refuses(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="at least 500 inputs, not 10"):
        export_run(run_dir, inputs=10)
    with pytest.raises(ValueError, match="there is no directory"):
        export_run(run_dir, tmp_path / "nowhere" / "n.lowbit")
    with pytest.raises(RunError, match="not a run directory"):
        export_run(tmp_path)
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    state = json.loads((run_dir / "run.json").read_text())
    (unfinished / "run.json").write_text(json.dumps({**state, "status": "running"}))
    with pytest.raises(RunError, match="has not finished"):
        export_run(unfinished)


def test_root_flips_are_bounded_by_comparisons() -> None:
    """8-bit codes have 255 thresholds that a number can lie next to."""
    flips = {"root_activations": 1_000_000, "root_flips": 200, "root_by_layer": {"stem": 200}}
    assert proving.Proof(root_comparisons=255_000_000, **flips).failures() == []
    assert (
        "bound 1e-06 of their 1000000 comparisons" in proving.Proof(root_comparisons=1_000_000, **flips).failures()[0]
    )


def test_the_proof_is_a_plain_record() -> None:
    p = proving.Proof(root_activations=10, root_flips=1, root_by_layer={"stem": 1})
    assert p.root_flip_rate == 0.1
    assert "most in stem" in p.failures()[0]
    assert set(dataclasses.asdict(p)) < set(p.as_dict())
