"""The command line: the whole way on a folder of images, every expected error in one line, and no torch where none is needed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lowbit
from lowbit import bench, cli, predict, zoo
from lowbit.bench import superres
from networks import CLASSES, classifier

ROOT = Path(__file__).parent.parent
RECIPE = "examples/own_images.yaml"

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command in this process, from the repository's root: (exit status, stdout, stderr)."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lowbit", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.run()
        shown = capsys.readouterr()
        return int(str(stop.value.code or 0)), shown.out, shown.err

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "small.lowbit"
    lowbit.save(classifier(), path)
    return path


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    subprocess.run([sys.executable, ROOT / "examples/draw_shapes.py", folder], check=True)
    return folder


def image(path: Path, mode: str = "RGB", size: tuple[int, int] = (20, 14)) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], len(mode)), np.uint8)
    Image.fromarray(pixels.squeeze(), mode).save(path) if mode != "L" else Image.fromarray(pixels[..., 0]).save(path)
    return path


# ------------------------------------------------------------------------------------------ without torch


@pytest.mark.parametrize(
    "command",
    [
        ["--help"],
        ["train", "--help"],
        ["inspect", "MODEL"],
        ["inspect", "MODEL", "--json"],
        ["predict", "MODEL", "IMAGE"],
        ["upscale", "LARGER", "IMAGE", "OUT"],
        ["upscale", "--help"],
        ["bench", "MODEL", "--repeats", "2"],
        ["list", "isas"],
        ["list", "ops"],
        ["list", "zoo"],
        ["list", "recipes"],
    ],
    ids=" ".join,
)
def test_no_torch_is_imported(command: list[str], model: Path) -> None:
    lowbit.save(superres.low_resolution(), model.parent / "x2.lowbit")
    places = {"MODEL": str(model), "IMAGE": str(image(model.parent / "a.png"))}
    places |= {"LARGER": str(model.parent / "x2.lowbit"), "OUT": str(model.parent / "out.png")}
    arguments = [places.get(word, word) for word in command]
    code = (
        "import sys\nfrom lowbit.__main__ import main\n"
        f"sys.argv = ['lowbit', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("absent", "command", "extra"),
    [
        ("typer", "--help", "cli"),
        ("rich", "--help", "cli"),
        ("PIL", "predict MODEL IMAGE", "cli"),
        ("PIL", "upscale LARGER IMAGE OUT", "cli"),
        ("matplotlib", "upscale LARGER IMAGE OUT --compare PAGE", "train"),
        ("torch", f"train {RECIPE}", "train"),
        ("torch", "list methods", "train"),
        ("yaml", "list recipes", "train"),
        ("matplotlib", "report runs", "train"),
        ("onnxruntime", "bench MODEL", "bench"),
        ("ray", "compare recipes/tables/fashion-mnist.yaml --on ray --dry-run", "ray"),
    ],
)
def test_a_missing_extra_is_named(absent: str, command: str, extra: str, model: Path) -> None:
    lowbit.save(superres.low_resolution(), model.parent / "x2.lowbit")
    places = {"MODEL": str(model), "IMAGE": str(image(model.parent / "a.png"))}
    places |= {"LARGER": str(model.parent / "x2.lowbit"), "OUT": str(model.parent / "out.png")}
    places |= {"PAGE": str(model.parent / "page.html")}
    arguments = [places.get(word, word) for word in command.split()]
    code = (
        f"import sys\nsys.modules[{absent!r}] = None\n"
        f"sys.argv = ['lowbit', *{arguments!r}]\nfrom lowbit.__main__ import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(rf"error: .*pip install 'lowbit\[{extra}\]'\n", done.stderr)


def test_list_goes_on_where_an_extra_is_missing() -> None:
    code = "import sys\nsys.modules['torch'] = None\nsys.argv = ['lowbit', 'list']\nfrom lowbit.__main__ import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert "lowbit[train]" in done.stdout
    assert "scalar" in done.stdout


# ------------------------------------------------------------------------------------------ help


def test_every_verb_has_help_with_an_example(call: Call) -> None:
    code, text, _ = call("--help")
    assert code == 0
    verbs = [command.name or command.callback.__name__ for command in cli.app.registered_commands]
    assert len(verbs) == 12
    for verb in verbs:
        assert verb in text
        code, own, _ = call(verb, "--help")
        assert code == 0
        assert f"lowbit {verb} " in own.partition("Example")[2]
    for command in cli.zoo_app.registered_commands:
        code, own, _ = call("zoo", command.name, "--help")
        assert code == 0
        assert f"lowbit zoo {command.name}" in own.partition("Example")[2]


def test_version(call: Call) -> None:
    assert call("--version") == (0, f"lowbit {lowbit.__version__}\n", "")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("zoo", "measured"),
        ("recipes", "recipes/fashion-mnist/bireal14-w1a1-slb-demo.yaml"),
        ("tables", "recipes/tables/fashion-mnist-bits.yaml"),
        ("search", "recipes/search/fashion-mnist.yaml"),
        ("models", "bireal_resnet14"),
        ("methods", "slb"),
        ("methods", "Options: t_min=0.1, clip=True"),
        ("models", "blocks=4"),
        ("methods", "beta_o = mean(w_o)"),  # the formula below the first line
        ("datasets", "image_folder"),
        ("ops", "global_avg_pool"),
        ("isas", "scalar"),
    ],
)
def test_list(kind: str, expected: str, call: Call) -> None:
    code, text, _ = call("list", kind)
    assert code == 0
    assert expected in text


def test_list_says_where_recipes_are_looked_for(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "./recipes" in call("list", "recipes")[1]


# ------------------------------------------------------------------------------------------ errors


def test_every_expected_error_is_one_line(call: Call, model: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.lowbit"
    cut.write_bytes(model.read_bytes()[:-9])
    flipped = bytearray(model.read_bytes())
    flipped[-3] ^= 4
    (tmp_path / "flipped.lowbit").write_bytes(flipped)
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.yaml").write_text("- 1\n")
    photo = image(tmp_path / "photo.png")
    for arguments, message in [
        (["train", tmp_path / "no.yaml"], "no.yaml: can't read"),
        (["train", tmp_path / "list.yaml"], "a recipe is a mapping"),
        (["train", RECIPE, "--set", "train.epoch=1"], "unknown key 'train.epoch': did you mean 'epochs'"),
        (["train", RECIPE, "--set", "quantize.method=slbb"], "did you mean 'slb'"),
        (["train", RECIPE, "--set", "quantize.activation_bits=9"], "activation bits, not 9"),
        (["train", RECIPE, "--set", "model.name=examples.own_images:Nothing"], "can't be imported"),
        (["train", RECIPE, "--set", f"data.root={tmp_path / 'no'}", "--run-dir", tmp_path / "r"], "no such folder"),
        (["train", tmp_path / "empty", "--resume"], "recipe.yaml: can't read"),
        (["evaluate", tmp_path / "empty"], "not a run directory"),
        (["evaluate", tmp_path / "no"], "no: no such file"),
        (["evaluate", model], "say what to evaluate on with --data"),
        (["evaluate", model, "--data", "fashion_mnist"], "has the classes"),
        (["evaluate", model, "--data", tmp_path / "no"], "--data must hold one folder of images for each class"),
        (["export", tmp_path / "empty"], "not a run directory"),
        (["export", tmp_path / "no"], "no: not a run directory"),
        (["export", tmp_path / "empty", "--inputs", 3], "at least 500"),
        (["inspect", cut], "cut.lowbit: not a lowbit file, or a damaged one"),
        (["inspect", tmp_path / "flipped.lowbit"], "checksum"),
        (["inspect", tmp_path / "empty"], "empty: is a folder"),
        (["predict", model, tmp_path / "no.png"], "no.png: no such file"),
        (["predict", model, tmp_path / "text.png"], "text.png: not a readable image"),
        (["predict", model, tmp_path / "empty"], "no images in this folder"),
        (["predict", model, photo, "--isa", "sse1"], "sse1"),
        (["predict", model, photo, "--threads", 100000], "threads"),
        (["bench", model, "--threads", 100000], "threads = 100000"),
        (["bench", model, "--peers", "tvm"], "unknown peer 'tvm'; there are ort-fp32"),
        (
            ["bench", model, "--repeats", 2, "--no-layers", "--json", tmp_path / "no/b.json"],
            "no/b.json: No such file or directory",
        ),
        (["report", tmp_path / "empty"], "not a run directory"),
        (["sensitivity", tmp_path / "empty"], "error: " + str(tmp_path / "empty: not a run directory")),
        (["list", "colours"], "list colours: there are lists of zoo, recipes, tables, search, models"),
    ]:
        code, _, shown = call(*arguments)
        assert code == 2, (arguments, shown)
        assert re.fullmatch(r"error: [^\n]+\n", shown), (arguments, shown)
        assert message in shown, (arguments, shown)
    assert not (tmp_path / "r").exists()


def test_a_wrong_option_is_explained(call: Call) -> None:
    code, _, shown = call("inspect", "--nonsense")
    assert code == 2
    assert "--nonsense" in shown


def test_debug_shows_where_an_error_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["lowbit", "inspect", "nothing"])
    with pytest.raises(lowbit.FileError):
        cli.run()


def test_a_bug_keeps_its_traceback() -> None:
    assert cli.explain(KeyError("x")) is None
    assert cli.explain(ImportError("x", name="nothing_of_ours")) is None
    assert "engine is not built" in str(cli.explain(ModuleNotFoundError("x", name="lowbit._engine")))
    assert cli.explain(OSError(28, "No space left on device", "f")) == "f: No space left on device"
    assert "memory" in str(cli.explain(MemoryError()))


# ------------------------------------------------------------------------------------------ a file


def test_inspect(call: Call, model: Path) -> None:
    code, text, _ = call("inspect", model)
    assert code == 0
    for word in ("stem", "block1", "12x12x3", "82,944", "smaller than float32", f"{model.stat().st_size:,}"):
        assert word in text
    tree = json.loads(call("inspect", model, "--json")[1])
    parts = ("weight_bytes", "constant_bytes", "description_bytes", "container_bytes")
    assert sum(tree[part] for part in parts) == tree["file_bytes"] == model.stat().st_size


def test_predict_reads_what_is_given(call: Call, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, mode in (("a.png", "RGB"), ("b.jpg", "RGB"), ("c.png", "L"), ("d.png", "RGBA")):
        image(folder / name, mode)
    (folder / "notes.txt").write_text("not an image")
    code, text, _ = call("predict", model, folder, "--top", 3)
    assert code == 0
    assert all(f"{name}" in text for name in ("a.png", "b.jpg", "c.png", "d.png"))
    assert len(re.findall(r"\d%", text)) == 12
    assert call("predict", model, folder / "a.png", "--top", 1)[1].count("%") == 1


def test_predict_answers_what_the_network_does(call: Call, model: Path, tmp_path: Path) -> None:
    exact = image(tmp_path / "exact.png", size=(12, 12))
    pixels = np.asarray(Image.open(exact))
    for option, x in (([], pixels), (["--invert"], 255 - pixels)):
        best = CLASSES[int(classifier().run(x[None]).argmax())]
        assert best in call("predict", model, exact, "--top", 1, *option)[1]


def test_predict_passes_over_what_cannot_be_read(
    call: Call, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "c.png"):
        image(folder / name)
    (folder / "b.png").write_text("not an image")
    image(folder / "large.png", size=(100, 90))
    monkeypatch.setattr(predict, "available_memory", lambda: 100 * 90 * 20 - 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3)  # Pillow's word is not asked for
    code, text, shown = call("predict", model, folder, "--top", 1)
    assert code == 1
    assert text.count("%") == 2
    assert f"left out: {folder / 'b.png'}: not a readable image" in shown
    assert f"left out: {folder / 'large.png'}: 100 x 90 pixels need 0.0 GB of memory, 0.0 GB are free" in shown
    assert shown.endswith("2 of 4 images could not be read\n")
    code, text, shown = call("predict", model, folder / "b.png", folder / "large.png")
    assert (code, text) == (1, "")
    code, text, shown = call("predict", model, folder / "large.png")
    assert (code, text, shown.count("\n")) == (2, "", 1)


def test_bench_looks_at_the_place_first(
    call: Call, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "bench_file", lambda *_, **__: pytest.fail("measured"))
    assert "no/b.json: No such file or directory" in call("bench", model, "--json", tmp_path / "no/b.json")[2]
    assert f"{tmp_path}: Is a directory" in call("bench", model, "--json", tmp_path)[2]
    assert f"{model}: Not a directory" in call("bench", model, "--json", model / "b.json")[2]


def test_bench_shows_what_it_cannot_write(
    call: Call, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(bench, "write_result", full)
    code, text, shown = call("bench", model, "--repeats", 2, "--no-layers", "--json", tmp_path / "b.json")
    assert code == 2
    assert "ONNX Runtime" in text
    assert f"error: {tmp_path / 'b.json'}: No space left on device" in shown


def test_beside_is_refused_before_anything_is_measured(
    call: Call, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowbit.train import evaluation

    enlarges = tmp_path / "x2.lowbit"
    lowbit.save(superres.low_resolution(), enlarges)
    monkeypatch.setattr(evaluation, "evaluate_file", lambda *_: pytest.fail("measured"))
    for what, beside in ((model, enlarges), (enlarges, model)):
        code, _, shown = call("evaluate", what, "--data", tmp_path, "--beside", beside)
        assert code == 2
        assert "small.lowbitclassifiesimages" in re.sub(r"[│\s]", "", shown)


def test_evaluate_shows_the_card_beside_its_own_images_alone(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowbit.train import evaluation

    card = next(card for card in map(zoo.load_card, zoo.names()) if card.task == "superres")
    means = dict.fromkeys(("psnr", "psnr_bicubic", "ssim", "ssim_bicubic"), 1.0)
    found = {**means, "metric": "psnr", "computed_by": "the engine", "images": 1, "broken": [], "pictures": []}
    monkeypatch.setattr(evaluation, "evaluate_file", lambda *_: found)
    text = call("evaluate", card.name)[1]
    assert f"its card: {card.result}" in text
    assert f"{card.name}, test pictures, computed by the engine" in " ".join(text.split())
    for more in (["--split", "val"], ["--data", "examples"]):
        text = call("evaluate", card.name, *more)[1]
        assert "its card" not in text
        assert f"{card.name}, {more[1]}" in " ".join(text.split())


def test_bench(call: Call, model: Path, tmp_path: Path) -> None:
    code, text, _ = call("bench", model, "--repeats", 2, "--json", tmp_path / "b.json", "--isa", "scalar")
    assert code == 0
    assert "ONNX Runtime" in text
    assert "block0" in text
    assert json.loads((tmp_path / "b.json").read_text())["isa"] == "scalar"
    assert "block0" not in call("bench", model, "--repeats", 2, "--no-layers")[1]


# ------------------------------------------------------------------------------------------ the whole way


def test_the_whole_way_on_a_folder_of_images(call: Call, shapes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    data = ["--set", f"data.root={shapes}"]
    code, text, shown = call("train", RECIPE, *data, "--set", "train.epochs=2", "--seed", 3, "--run-dir", run)
    assert code == 0, shown
    assert f"lowbit export {run}" in text.replace("\n", "")
    recorded = json.loads((run / "run.json").read_text())
    assert (recorded["seed"], recorded["epochs_done"], recorded["results"]["test"]) == (3, 2, None)

    code, _, shown = call("train", RECIPE, *data, "--run-dir", run)
    assert code == 2
    assert "not empty" in shown
    code, _, shown = call("train", run, "--resume")
    assert code == 2
    assert "finished" in shown

    code, text, shown = call("export", run)
    assert code == 0, shown
    assert "0 of" in text
    file = run / "model.lowbit"

    answers = [call("evaluate", what, *more) for what, more in ((run, []), (file, []), (file, ["--threads", 2]))]
    accuracies = {match[0] for _, text, _ in answers if (match := re.search(r"\d+\.\d+%", text))}
    assert [code for code, _, _ in answers] == [0, 0, 0]
    assert accuracies == {f"{recorded['results']['validation']['accuracy']:.2%}"}
    outside = tmp_path / "elsewhere.lowbit"
    outside.write_bytes(file.read_bytes())
    assert "600" in call("evaluate", outside, "--data", shapes)[1]

    assert "circle" in call("predict", file, shapes / "circle" / "000.png", "--top", 3)[1]
    assert call("bench", file, "--repeats", 2, "--json", run / "bench.json")[0] == 0
    assert call("report", run)[0] == 0
    code, text, shown = call("report", run, "--summary")
    assert code == 0
    for words in ("accuracy, engine", "integers that differ", "root flips", "float32", "ONNX Runtime", "report.html"):
        assert words in text
    assert call("export", run, "-o", "/proc/nowhere.lowbit")[0] == 2


def test_the_example_in_python(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "shapes").symlink_to(shapes)
    done = subprocess.run(
        [sys.executable, ROOT / "examples/own_images.py", tmp_path / "shapes"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    accuracy = float(re.search(r"([\d.]+)% of 120", done.stdout)[1])  # type: ignore[index]
    assert accuracy > 60
    assert len((ROOT / "examples/own_images.py").read_text().splitlines()) < 80


def test_an_interrupted_run_says_how_to_go_on(shapes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--set", f"data.root={shapes}", "--set", "train.epochs=100000", "--run-dir", str(run)]
    process = subprocess.Popen(
        [sys.executable, "-m", "lowbit", "train", RECIPE, *options],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    end = time.monotonic() + 90
    while not (run / "checkpoints" / "last.ckpt").is_file():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"lowbit train {run} --resume" in shown.replace("\n", "")
    assert "Traceback" not in shown
    assert json.loads((run / "run.json").read_text())["error"] == "interrupted"
