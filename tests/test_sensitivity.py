"""Sensitivity: one layer changes and nothing else, interrupted equals uninterrupted, the choice is the best there is, the recipe trains."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowbit import report
from lowbit.inspect import layer_table
from lowbit.train import sensitivity, sensitivity_page
from lowbit.train.export import export_run
from lowbit.train.layers import QuantLayer
from lowbit.train.mixed import Budget, BudgetError, Choice, _recipe, best_choice, propose
from lowbit.train.network import load_trained
from lowbit.train.recipe import RecipeError, load_recipe
from lowbit.train.rundir import RunError
from lowbit.train.sensitivity import Bits, Images, Network, measure, parse_bits
from lowbit.train.trainer import load_data, train
from test_cli import Call, call  # noqa: F401
from test_report import Page
from test_train_superres import recipe as pictures_recipe
from test_train_superres import write as write_pictures
from test_trainer import recipe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

PAIRS = [Bits(1, 1), Bits(8, 8)]
FLOAT = {"quantize__method": "float", "quantize__activation_bits": 32, "quantize__edges": "float"}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float run on stripes: stem, 3 blocks, 2 shortcuts, head."""
    place = tmp_path_factory.mktemp("runs") / "float"
    train(recipe(**FLOAT, model__width=16, train__epochs=2), place)
    return place


def again(run_dir: Path, to: Path) -> Path:
    """The run without what was measured of it."""
    (to / "checkpoints").mkdir(parents=True)
    for name in ("run.json", "recipe.yaml", "checkpoints/final.ckpt"):
        (to / name).write_bytes((run_dir / name).read_bytes())
    return to


@pytest.fixture(scope="module")
def tree(run_dir: Path) -> dict[str, Any]:
    return measure(run_dir, PAIRS, images=40, steps=3)


def losses(tree: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {(row["name"], key): at["loss"] for row in tree["layers"] for key, at in row["bits"].items() if "loss" in at}


# ------------------------------------------------------------------------------------------------ measuring


def test_every_layer_at_every_pair(tree: dict[str, Any], run_dir: Path) -> None:
    names = [row["name"] for row in tree["layers"]]
    assert len(names) == 7
    assert {row["trained"] for row in tree["layers"][1:]} == {"32/32"}
    assert tree["layers"][0]["trained"] == "32/8"  # pixels
    assert set(tree["layers"][0]["bits"]) == {"1/8", "8/8"}
    assert all(set(row["bits"]) == {"1/1", "8/8"} for row in tree["layers"][1:])
    assert len(losses(tree)) == 14
    assert json.loads((run_dir / "sensitivity.json").read_text()) == tree
    assert tree["data"] == {"name": "stripes", "split": "validation", "images": 40, "trained_on": False}
    for row in tree["layers"]:
        for at in row["bits"].values():
            assert at["value"] == pytest.approx(tree["reference"]["value"] - at["loss"])
            assert at["seconds"] > 0
        assert next(iter(row["bits"].values()))["bytes"] < row["bits"]["8/8"]["bytes"]


@pytest.mark.parametrize("key", ["trained", "1/1", "8/8"])
def test_parts_add_up_to_the_file(tree: dict[str, Any], key: str) -> None:
    def part(row: dict[str, Any]) -> float:
        pixels = f"{key.partition('/')[0]}/8"
        return row["bytes"] if key == "trained" else row["bits"].get(key, row["bits"].get(pixels))["bytes"]

    assert sum(map(part, tree["layers"])) == pytest.approx(tree["network"][key]["bytes"], abs=1e-6)


def test_nothing_else_changes(run_dir: Path) -> None:
    trained = load_trained(run_dir, "test")
    net = Network(trained, str(run_dir))
    x = next(iter(load_data(trained.recipe).calibration(32, 32)))
    net.look_at_inputs(x)
    name = "blocks.1.body.0.conv"
    assert net.signed[name]  # a sum, no ReLU before it
    model = net.changed({name: Bits(2, 2)}, x)
    layer = model.get_submodule(name)
    assert isinstance(layer, QuantLayer)
    assert (layer.weight_quantizer.bits, layer.input_quantizer.bits) == (2, 2)
    assert layer.input_quantizer.signed
    assert bool(layer.input_quantizer.initialised)
    assert torch.equal(layer.weight, trained.model.get_submodule(name).weight)
    own, before = model.state_dict(), trained.model.state_dict()
    assert all(torch.equal(own[key], before[key]) for key in before)
    assert all(key.startswith(f"{name}.") for key in own.keys() - before.keys())
    assert not model.training
    assert [n for n, m in model.named_modules() if isinstance(m, QuantLayer)] == ["stem", name]
    # without a change it is the network itself
    same = net.changed({}, x)
    with torch.no_grad():
        assert torch.equal(same(x), trained.model(x))


def test_scores_are_of_each_image(run_dir: Path) -> None:
    trained = load_trained(run_dir, "test")
    here = Images(trained.recipe, trained.spec, load_data(trained.recipe), 60, 0)
    net = Network(trained, str(run_dir))
    model = net.changed({}, here.example)
    scores = here.scores(model)
    data = load_data(trained.recipe)
    with torch.no_grad():
        expected = (model(data.val_x).argmax(1) == data.val_y).numpy()
    assert np.array_equal(scores, expected)
    assert Images(trained.recipe, trained.spec, data, 20, 0).scores(model).tolist() == expected[::3].tolist()
    assert sensitivity.mean_and_error(np.array([1.0, 0.0, 0.0, 1.0]))[1] == pytest.approx((1 / 3) ** 0.5 / 2)


def test_interrupted_is_uninterrupted(run_dir: Path, tree: dict[str, Any], tmp_path: Path) -> None:
    place = again(run_dir, tmp_path / "again")

    def stop(stage: str, done: int, total: int) -> None:  # noqa: ARG001
        if stage == "layers" and done == 3:
            raise KeyboardInterrupt

    some = {"layers": ["stem", "head"], "images": 40, "steps": 3, "timed": False}
    with pytest.raises(KeyboardInterrupt):
        measure(place, PAIRS, **some, on_progress=stop)
    assert len(losses(json.loads((place / "sensitivity.json").read_text()))) == 2
    seen: list[int] = []
    whole = measure(place, PAIRS, **some, on_progress=lambda stage, done, total: seen.append(total))
    assert seen[-1] == 3  # two that were left, and the reference
    assert losses(whole) == {key: loss for key, loss in losses(tree).items() if key[0] in ("stem", "head")}
    measure(place, PAIRS, **some, on_progress=lambda stage, done, total: seen.append(done))
    assert seen[-1] == 0  # nothing is left


def test_from_a_run_of_logits(tmp_path: Path) -> None:
    """SLB's layer at 8 bits starts from the values it runs with: no number of the network changes but by rounding."""
    place = tmp_path / "slb"
    train(recipe(train__epochs=1), place)
    trained = load_trained(place, "test")
    net = Network(trained, str(place))
    x = next(iter(load_data(trained.recipe).calibration(32, 32)))
    net.look_at_inputs(x)
    name = "blocks.1.body.0.conv"
    assert net.layers[name] == Bits(1, 1)
    model = net.changed({name: Bits(8, 1)}, x)
    with torch.no_grad():
        assert torch.allclose(model(x), trained.model(x), atol=1e-4)
    assert net.changed({name: Bits(32, 32)}, x).get_submodule(name).weight.unique().tolist() == [-1, 1]
    found = measure(place, [Bits(8, 1)], layers=[name], images=30, steps=0, timed=False)
    assert losses(found) == {(name, "8/1"): pytest.approx(0, abs=0.04)}
    other = _recipe(place, net, {name: Bits(8, 1)}, ())
    assert other.train.start_from is None  # logits are no start for other bits
    assert other.quantize.overrides[name]["weight_bits"] == 8
    assert other.train.latent_lr_scale == 10  # as the run was trained


def test_pictures(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", [f"{name}.png" for name in "abcd"])
    train(pictures_recipe(tmp_path / "train", train__epochs=1), tmp_path / "run")
    found = measure(tmp_path / "run", [Bits(8, 8)], layers=["*0*"], steps=2)
    assert found["metric"] == "psnr"
    assert len(losses(found)) == 1
    assert "dB" in sensitivity_page.markdown(found)


# ------------------------------------------------------------------------------------------------ choosing


def brute_force(layers: dict[str, list[Choice]], budget: Budget) -> float | None:
    best = None
    for picked in itertools.product(*layers.values()):
        size, time = sum(c.bytes for c in picked), sum(c.seconds for c in picked)
        loss = sum(max(c.loss, 0) for c in picked)
        kept = [
            budget.bytes is None or size <= budget.bytes,
            budget.seconds is None or time <= budget.seconds,
            budget.loss is None or loss <= budget.loss + 1e-12,
        ]
        goal = size if budget.bytes is None and budget.seconds is None else loss
        if all(kept) and (best is None or goal < best):
            best = goal
    return best


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_the_best(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layers = {
        f"layer{i}": [
            Choice(
                Bits(b, b),
                float(rng.integers(-3, 40)) / 1000,
                float(rng.integers(100, 9000)),
                float(rng.uniform(1e-7, 1e-5)),
            )
            for b in (1, 2, 4, 8)
        ]
        for i in range(5)
    }
    middle = sum(np.median([c.bytes for c in choices]) for choices in layers.values())
    time = sum(np.median([c.seconds for c in choices]) for choices in layers.values())
    for budget in (
        Budget(bytes=middle),
        Budget(seconds=time),
        Budget(bytes=middle, seconds=time),
        Budget(loss=0.03),
        Budget(bytes=middle, loss=0.05),
    ):
        expected = brute_force(layers, budget)
        if expected is None:
            with pytest.raises(BudgetError, match="no choice of bits keeps"):
                best_choice(layers, budget)
            continue
        picked = best_choice(layers, budget)
        assert list(picked) == list(layers)
        goal = [c.bytes if budget.bytes is None and budget.seconds is None else max(c.loss, 0) for c in picked.values()]
        assert sum(goal) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_budgets_that_cant_be() -> None:
    layers = {"a": [Choice(Bits(1, 1), 0.1, 100.0, None), Choice(Bits(8, 8), 0.0, 800.0, None)]}
    with pytest.raises(BudgetError, match="has 100 bytes"):
        best_choice(layers, Budget(bytes=99))
    with pytest.raises(BudgetError, match="needs the layers' times"):
        best_choice(layers, Budget(seconds=1e-3))
    with pytest.raises(BudgetError, match="above 0"):
        Budget(bytes=0)
    with pytest.raises(BudgetError, match="above 0"):
        Budget()


# ------------------------------------------------------------------------------------------------ the proposal


def test_the_proposal_trains_and_exports(run_dir: Path, tree: dict[str, Any], tmp_path: Path) -> None:
    limit = (tree["network"]["1/1"]["bytes"] + tree["network"]["8/8"]["bytes"]) // 2
    done = propose(
        run_dir, tree, Budget(bytes=limit), tmp_path / "mixed.yaml", changes=["train.epochs=1", "train.batch_size=90"]
    )
    assert done["bytes"] <= limit
    assert len(set(done["bits"].values())) > 1
    text = (tmp_path / "mixed.yaml").read_text()
    assert f"{done['bytes']:,} bytes" in text.splitlines()[0]
    mixed = load_recipe(tmp_path / "mixed.yaml")
    assert mixed.train.start_from == str(run_dir)
    assert mixed.train.optimizer == "adam"
    result = train(mixed, tmp_path / "run")
    assert result.run["epochs_done"] == 1  # two steps
    exported = export_run(tmp_path / "run")
    bits = {
        row.name: f"{row.weight_bits}/{row.activation_bits}" for row in layer_table(exported.graph) if row.weight_bits
    }
    assert {name: bits[name] for name in done["bits"]} == done["bits"]
    assert exported.file_bytes == done["bytes"]


def test_the_smallest_within_a_loss(run_dir: Path, tree: dict[str, Any]) -> None:
    done = propose(run_dir, tree, Budget(loss=1.0))
    assert {bits for name, bits in done["bits"].items() if name.startswith("blocks") and "body" in name} == {"1/1"}
    assert done["bytes"] <= tree["network"]["1/1"]["bytes"] + 8  # its name is longer
    with pytest.raises(BudgetError, match="the smallest network"):
        propose(run_dir, tree, Budget(bytes=100))
    with pytest.raises(RecipeError, match="epochz"):
        propose(run_dir, tree, Budget(loss=1.0), changes=["train.epochz=1"])


# ------------------------------------------------------------------------------------------------ what is wrong


@pytest.mark.usefixtures("tree")
def test_what_cant_be_measured(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"otherwise \(steps: 3 there, 4 now\).*--overwrite"):
        measure(run_dir, PAIRS, images=40, steps=4)
    with pytest.raises(ValueError, match="no layer that can change its bits.*blocks"):
        measure(run_dir, PAIRS, layers=["nothing*"], images=40, steps=3)
    with pytest.raises(RunError, match="not a run directory"):
        measure(tmp_path / "model.lowbit")
    place = again(run_dir, tmp_path / "damaged")
    (place / "sensitivity.json").write_text("{")
    with pytest.raises(RunError, match="sensitivity.json: can't be read.*--overwrite"):
        measure(place, PAIRS, images=40, steps=3)
    for text in ("1", "5/5", "1/1/1", "a/b", "-1/1"):
        with pytest.raises(ValueError, match="such as 2/4; each is one of 1, 2, 3, 4, 8, 32"):
            parse_bits(text)
    assert parse_bits("2/32") == Bits(2, 32)


# ------------------------------------------------------------------------------------------------ what is shown


def test_tables(run_dir: Path, tree: dict[str, Any], tmp_path: Path) -> None:
    ranked = sensitivity_page.ranked_rows(tree)
    assert len(ranked) == 15
    each = [float(row[4]) if row[4] else np.inf for row in ranked[1:]]
    assert each == sorted(each)
    assert all((each[i] == np.inf) == row[3].startswith(("-", "0.00")) for i, row in enumerate(ranked[1:]))
    assert sensitivity_page.columns(tree) == ["1/1", "8/8"]
    heat = sensitivity_page.heat_table(tree)
    assert heat[1][2].endswith("(1/8)")
    for path in sensitivity_page.write(run_dir, tree):
        assert path.is_file()
    page = Page(run_dir / "sensitivity.html")
    assert page.loaded == []
    assert "blocks.1.body.0.conv" in page.source
    whole, _ = report.write_report(run_dir, tmp_path / "report.html")
    assert "<h2>Sensitivity</h2>" in Page(whole).source
    assert "| head | 32/32 |" in (run_dir / "sensitivity.md").read_text()


@pytest.mark.usefixtures("tree")
def test_command(call: Call, run_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    settings = ("--images", 40, "--steps", 3, "--bits", "1/1", "--bits", "8/8")
    status, shown, _ = call(
        "sensitivity", run_dir, *settings, "--loss", 50, "-o", tmp_path / "m.yaml", "--set", "seed=7"
    )
    assert status == 0
    shown = " ".join(shown.split())  # lines are as long as the terminal is wide
    assert "what each layer alone loses" in shown
    assert "by loss for each byte saved" in shown
    assert "proposed" in shown
    assert load_recipe(tmp_path / "m.yaml").seed == 7
    for arguments, words in (
        (("--set", "seed=7"), "are for a proposal"),
        (("--budget-ms", -1), "above 0"),
        (("--bits", "9/9"), "write bits of weights"),
        (("--budget-bytes", 10), "no choice of bits keeps 10 bytes"),
    ):
        status, _, errors = call("sensitivity", run_dir, *settings, *arguments)
        assert status == 2
        assert words in " ".join(errors.replace("│", " ").split())
