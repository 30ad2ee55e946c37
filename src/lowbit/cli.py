"""The command line: parsing and printing only.

Every verb imports what it needs when it runs, so that running files needs no torch.
"""

from __future__ import annotations

import inspect as introspection
import io
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from lowbit.inspect import Contents
    from lowbit.train.cells import Places, Step
    from lowbit.train.compare import Event
    from lowbit.train.export import Export
    from lowbit.train.search import Event as SearchEvent
    from lowbit.train.table import Cell
    from lowbit.train.table import Table as TableOfRecipes
    from lowbit.train.workers import Executor
    from lowbit.upscale import Job, Upscaler
    from lowbit.zoo import Card

app = typer.Typer(
    name="lowbit",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    help="Train networks with 1- to 4-bit weights and activations, and run the same integers on a CPU.\n\n"
    "The whole way: [bold]lowbit train RECIPE[/], [bold]lowbit export RUN[/], [bold]lowbit predict FILE IMAGE[/].",
    epilog="LOWBIT_DEBUG=1 shows where an error came from. LOWBIT_ISA=scalar forces a row of kernels.",
)
out = Console()
err = Console(stderr=True)

_EXTRAS: Final = {
    "cli": ("PIL",),
    "train": (
        "jinja2",
        "lightning",
        "matplotlib",
        "optuna",
        "pydantic",
        "scipy",
        "skimage",
        "tensorboard",
        "torch",
        "torchmetrics",
        "yaml",
    ),
    "bench": ("nncf", "onnx", "onnxruntime", "openvino"),
    "ray": ("ray",),
}
"""Modules of each extra, to name it when one is missing."""

RunArgument = Annotated[Path, typer.Argument(help="A run directory, as `lowbit train` leaves it.", metavar="RUN")]
FileArgument = Annotated[
    Path, typer.Argument(help="A .lowbit file, or a network of the zoo by its name.", metavar="FILE")
]
ThreadsOption = Annotated[int, typer.Option(help="Threads of the engine.", min=1)]
IsaOption = Annotated[str | None, typer.Option(help="Force a row of kernels; see `lowbit list isas`.")]


# --------------------------------------------------------------------------------------------- errors


def run() -> None:
    """Run the command line; an expected error is one line on standard error and exit status 2."""
    sys.path.append(str(Path.cwd()))  # where a recipe's model `package.module:function` is looked for
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a file's name may be in another encoding
    try:
        app()
    except Exception as error:
        line = explain(error)
        if line is None or os.environ.get("LOWBIT_DEBUG"):
            raise
        if not getattr(error, "told", False):  # another process of the same run says it
            sys.stderr.write(f"error: {line}\n")
        raise SystemExit(2) from None


def explain(error: Exception) -> str | None:
    """An expected error in one line; None for a bug, which keeps its traceback."""
    if isinstance(error, ImportError):
        if error.name == "lowbit._engine":
            return "the native engine is not built: install lowbit again (pip install . in its repository)"
        top = (error.name or "").partition(".")[0]
        for extra, modules in _EXTRAS.items():
            if top in modules:
                return f"this needs an extra that is not installed ({top}): pip install 'lowbit[{extra}]'"
        return None
    if isinstance(error, MemoryError):
        return "out of memory: take a smaller batch, or smaller pictures"
    if type(error).__module__.partition(".")[0] == "lowbit" or isinstance(error, ValueError):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror or error}"
    return None


def _warn(messages: Iterable[str]) -> None:
    for message in messages:
        err.print(f"[yellow]warning:[/] {escape(message)}", soft_wrap=True)


def _version(wanted: bool) -> None:
    if wanted:
        import lowbit

        out.print(f"lowbit {lowbit.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    pass


# --------------------------------------------------------------------------------------------- train


@app.command(
    epilog="Example: lowbit train recipes/fashion-mnist/bireal14-w1a1-slb-demo.yaml --run-dir runs/demo "
    "--set train.epochs=3"
)
def train(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="A recipe (YAML). With --cell a table of recipes, with --resume also the run directory itself.",
            metavar="RECIPE",
        ),
    ],
    cell: Annotated[
        str | None,
        typer.Option(
            metavar="LABEL",
            help="Train this cell of a table; a cell it starts from is looked for in runs/, where --cell puts it too.",
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the recipe: train.epochs=3. Repeatable."),
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where the run goes; by default runs/ and the recipe's name.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same as --set seed=N.", min=0)] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run, from its last epoch.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that lies there.")] = False,
    test: Annotated[
        bool, typer.Option("--test/--no-test", help="Evaluate the final network on the test images, once.")
    ] = False,
    devices: Annotated[
        int | None, typer.Option(help="Processes, one for each GPU: the same as --set train.devices=N.", min=1)
    ] = None,
) -> None:
    """Train a network as a recipe says, into a run directory.

    Pictures of super-resolution that can't be used are passed over and named, and the exit status is 1, though the run is whole.
    """
    from lowbit.train.distributed import launch, main_process
    from lowbit.train.recipe import RecipeError, load_recipe
    from lowbit.train.table import load_cell
    from lowbit.train.trainer import train as train_recipe
    from lowbit.train.units import result_line

    overrides = list(changes or [])
    if seed is not None and cell is None:
        overrides.append(f"seed={seed}")
    if devices is not None:
        overrides.append(f"train.devices={devices}")
    if resume and recipe.is_dir():
        run_dir, recipe = run_dir or recipe, recipe / "recipe.yaml"
    elif (recipe / "run.json").is_file():
        raise RecipeError(f"{recipe}: is a run directory, not a recipe; go on with the run with --resume")
    loaded = load_recipe(recipe, overrides) if cell is None else load_cell(recipe, cell, seed or 0, overrides)
    status = launch(loaded, sys.argv[1:])
    if status is not None:
        raise typer.Exit(status)
    place = run_dir or Path("runs") / loaded.name
    talks = main_process()
    if talks:
        _log_to_stderr()
    try:
        result = train_recipe(loaded, place, resume=resume, overwrite=overwrite, test=test)
    except (KeyboardInterrupt, SystemExit):
        if talks:
            err.print(f"interrupted; go on with: [bold]lowbit train {escape(str(place))} --resume[/]", soft_wrap=True)
        raise typer.Exit(130) from None
    except OSError as error:
        error.filename = error.filename or place  # a full disk says nothing of where
        raise
    if not talks:
        return
    metric = result.run["metric"]
    table = _facts(f"{loaded.name}: {result.run['epochs_done']} epochs in {result.run['wall_seconds']:.0f} s")
    for part in ("validation", "test"):
        found = result.results[part]
        if found is not None:
            table.add_row(f"{metric}, {part}", result_line(found, metric))
    if result.results["validation"] is None:
        table.add_row(metric, "not measured: all training images were used (train.final); export measures it")
    table.add_row("run directory", str(place))
    out.print(table)
    out.print(f"next: [bold]lowbit export {escape(str(place))}[/]", soft_wrap=True)
    if result.run["task"] == "superres" and result.run["broken_images"]:
        names = result.run["broken_images"]
        many = len(names) > 1
        passed_over = f"{'were' if many else 'was'} passed over: {', '.join(names)}"
        _warn([f"{len(names)} picture{'s'[:many]} can't be used and {passed_over}"])
        raise typer.Exit(1)


class _Lines(logging.Handler):
    """Writes to what is standard error at the time: a caller in the same process may have redirected it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print("warning: " * (record.levelno >= logging.WARNING) + self.format(record), file=sys.stderr, flush=True)
        except (OSError, ValueError):  # a closed pipe ends no training
            self.handleError(record)


def _log_to_stderr() -> None:
    """The trainer's own lines, one for each epoch, warnings included."""
    log = logging.getLogger("lowbit")
    if not log.handlers:
        log.addHandler(_Lines())
        log.setLevel(logging.INFO)


def _facts(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value", overflow="fold")
    return table


# --------------------------------------------------------------------------------------------- evaluate, export


class Split(StrEnum):
    """Images to evaluate on."""

    val = "val"
    test = "test"


@app.command(
    epilog="Examples: lowbit evaluate runs/demo --split test   |   lowbit evaluate shoes.lowbit --data my_images"
)
def evaluate(
    what: Annotated[
        Path,
        typer.Argument(
            help="A run directory, a .lowbit file, or a network of the zoo by its name.", metavar="RUN_OR_FILE"
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Of a run, a file in one, or the zoo: another folder with its data set. Of a file elsewhere: a data set's name, a folder "
            "with its files, or a folder with one folder of images for each class. Of super-resolution any folder of pictures.",
        ),
    ] = None,
    split: Annotated[
        Split | None,
        typer.Option(
            help="val: the held-out training images (with train.final the network was trained on them). test: the test images. By default "
            "val, of the zoo test, which its cards are of."
        ),
    ] = None,
    beside: Annotated[
        Path | None,
        typer.Option(
            help="Of super-resolution: another run or file, such as the linear control or the float twin, on the same pictures.",
            metavar="RUN_OR_FILE",
        ),
    ] = None,
    threads: ThreadsOption = 1,
) -> None:
    """Measure accuracy, of super-resolution PSNR and SSIM: of a run's training graph, or of a file on the engine.

    PSNR and SSIM are those of luma, without as many pixels of each border as the picture is enlarged. Pictures that can't be read are
    passed over and named, and the exit status is 1.
    """
    from lowbit import zoo
    from lowbit.train.data import DATASETS
    from lowbit.train.evaluation import evaluate_file, evaluate_run, task_of

    card = None if what.is_dir() else zoo.card_at(zoo.locate(what))
    part = (split or (Split.test if card else Split.val)).value
    if card is not None and (part != card.measured["split"] or data is not None):
        card = None  # it speaks of other images
    for path in () if beside is None else (what, beside):
        if task_of(path) != "superres":
            raise typer.BadParameter(f"--beside {beside}: {path} classifies images; --beside is for super-resolution")

    def measure(path: Path) -> dict[str, Any]:
        return evaluate_run(path, data, part) if path.is_dir() else evaluate_file(path, data, part, threads)

    with _each_warning_once():
        found = measure(what)
        other = None if beside is None else measure(beside)
    if found["metric"] == "psnr":
        pictures = f"{part} pictures" if data is None else f"{data}, {part}" if data in DATASETS else data
        _print_pictures(f"{what}, {pictures}, computed by {found['computed_by']}", found, card, beside, other)
        if found["broken"]:
            raise typer.Exit(1)
        return
    table = _facts(f"{what}, {part} images")
    table.add_row("accuracy", f"{found['accuracy']:.2%}")
    if card is not None:
        table.add_row("accuracy, its card", card.result)
    table.add_row("images", f"{found['images']:,}")
    table.add_row("computed by", found["computed_by"])
    out.print(table)


@contextmanager
def _each_warning_once() -> Iterator[None]:
    """The library's lines on standard error; what is said of a picture is not said again when another network is measured on it."""
    _log_to_stderr()
    said: set[str] = set()

    def new(record: logging.LogRecord) -> bool:
        before = len(said)
        said.add(record.getMessage())
        return len(said) > before

    handlers = logging.getLogger("lowbit").handlers
    for handler in handlers:
        handler.addFilter(new)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(new)


def _print_pictures(
    title: str, found: Mapping[str, Any], card: Card | None, beside: Path | None, other: Mapping[str, Any] | None
) -> None:
    names = [picture["name"] for picture in found["pictures"]]
    if other is not None and [picture["name"] for picture in other.get("pictures", ())] != names:
        raise typer.BadParameter(f"--beside {beside}: it was not measured on the same pictures; name them with --data")
    table = Table(title=escape(title), title_justify="left")
    table.add_column("picture", overflow="fold")
    for heading in ("PSNR", "bicubic", "gain", "SSIM", "bicubic", *(("beside", "gain") if other else ())):
        table.add_column(heading, justify="right", no_wrap=True)

    def row(name: str, each: Mapping[str, Any], its: Mapping[str, Any] | None) -> None:
        gain = each["psnr"] - each["psnr_bicubic"]
        values = [f"{each['psnr']:.2f}", f"{each['psnr_bicubic']:.2f}", f"{gain:+.2f}"]
        values += [f"{each['ssim']:.4f}", f"{each['ssim_bicubic']:.4f}"]
        values += [f"{its['psnr']:.2f}", f"{each['psnr'] - its['psnr']:+.2f}"] if its else []
        table.add_row(escape(name), *values)

    others = [None] * len(names) if other is None else other["pictures"]
    for picture, its in zip(found["pictures"], others, strict=True):
        row(picture["name"], picture, its)
    table.add_section()
    row(f"mean of {found['images']}", found, other)
    out.print(table)
    out.print("PSNR in dB, of luma" + ("" if beside is None else f"; beside: {escape(str(beside))}"), soft_wrap=True)
    if card is not None:
        out.print(f"its card: {card.result}, mean of {card.measured['images']}", soft_wrap=True, highlight=False)
    if "published" in found:
        said = found["published"]
        rows = ", ".join(f"{name} {psnr:.2f}" for name, psnr in said["psnr"].items())
        out.print(f"published on {said['set']} x{said['scale']}, PSNR in dB: {rows}", soft_wrap=True)
    if "written" in found:
        out.print(f"wrote [bold]{escape(found['written'])}[/]", soft_wrap=True)
    if found["broken"]:  # each was named when its turn came
        broken = len(found["broken"])
        err.print(f"{broken} of {broken + found['images']} pictures could not be measured", highlight=False)


@app.command(epilog="Example: lowbit export runs/demo -o shoes.lowbit")
def export(
    run_dir: RunArgument,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The file; by default RUN/model.lowbit.")
    ] = None,
    inputs: Annotated[int, typer.Option(help="Inputs to compare interpreter and engine on, at least 500.")] = 512,
) -> None:
    """Freeze a finished run into a .lowbit file and prove that the file is the network that was trained.

    No file is written where the proof fails.
    """
    from lowbit.train.export import export_run

    with _progress() as report:
        done = export_run(run_dir, output, inputs=inputs, on_progress=report)
    out.print(_proof_table(done))
    out.print(f"wrote [bold]{escape(str(done.path))}[/]", soft_wrap=True)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def _proof_table(done: Export) -> Table:
    proof = done.proof
    table = _facts(f"the proof, engine on {proof.isa}")
    table.add_row(
        "interpreter against engine",
        f"{proof.integers_differ:,} of {proof.integers:,} integers differ, {proof.inputs} inputs",
    )
    table.add_row(
        "root flips against the training graph", f"{proof.root_flips:,} of {proof.root_activations:,} activations"
    )
    if proof.pictures is None:
        table.add_row("decisions that changed", f"{proof.decisions_changed:,} of {proof.decisions:,}")
    else:
        table.add_row("PSNR, training graph", f"{proof.psnr('training'):.3f} dB, {len(proof.pictures)} pictures")
        table.add_row("PSNR, engine", f"{proof.psnr('engine'):.3f} dB, at most {proof.psnr_apart:.4f} dB apart")
        table.add_row("PSNR, bicubic", f"{proof.psnr('bicubic'):.3f} dB")
    if proof.accuracy_training is not None and proof.accuracy_engine is not None:
        table.add_row("accuracy, training graph", f"{proof.accuracy_training:.2%}")
        table.add_row("accuracy, engine", f"{proof.accuracy_engine:.2%}")
    table.add_row(
        "file",
        f"{done.file_bytes:,} bytes, {done.float_bytes / done.file_bytes:.1f}x smaller than the float32 parameters",
    )
    return table


# --------------------------------------------------------------------------------------------- inspect, predict, bench


@app.command(epilog="Example: lowbit inspect runs/demo/model.lowbit")
def inspect(
    file: FileArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what is in a file: shape, bits, bytes and multiply-accumulates of every layer, every byte accounted for."""
    from lowbit.inspect import inspect as inspect_file

    contents = inspect_file(file)
    if as_json:
        sys.stdout.write(json.dumps(contents.as_dict(), indent=1) + "\n")
        return
    out.print(_layers_table(contents))
    out.print(_sizes_table(contents))


def _layers_table(contents: Contents) -> Table:
    table = Table(title=f"{contents.path}: {contents.meta.get('recipe', 'network')}", title_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("op")
    for heading in ("output", "W bits", "A bits", "bytes", "MACs"):
        table.add_column(heading, justify="right")
    for layer in contents.layers:
        table.add_row(
            layer.name,
            layer.op,
            "x".join(map(str, layer.output)),
            "" if layer.weight_bits is None else str(layer.weight_bits),
            "" if layer.activation_bits is None else str(layer.activation_bits),
            f"{layer.file_bytes:,}" if layer.file_bytes else "",
            f"{layer.macs:,}" if layer.macs else "",
        )
    table.add_section()
    total = contents.weight_bytes + contents.constant_bytes
    table.add_row("all layers", "", "", "", "", f"{total:,}", f"{contents.macs:,}")
    return table


def _sizes_table(contents: Contents) -> Table:
    table = Table(title="the file", title_justify="left", show_header=False)
    table.add_column("part")
    table.add_column("bytes", justify="right")
    table.add_column("")
    for name, size in (
        ("weights", contents.weight_bytes),
        ("factors, terms and slopes", contents.constant_bytes),
        ("graph description", contents.description_bytes),
        ("container", contents.container_bytes),
    ):
        table.add_row(name, f"{size:,}", f"{size / contents.file_bytes:.0%}")
    table.add_section()
    smaller = f"{contents.float_bytes / contents.file_bytes:.1f}x smaller than float32"
    table.add_row("file", f"{contents.file_bytes:,}", smaller)
    if contents.low_bit_ratio is not None:
        table.add_row("low-bit layers, with their scales", "", f"{contents.low_bit_ratio:.1f}x smaller than float32")
    return table


@app.command(epilog="Examples: lowbit predict model.lowbit shoe.png   |   lowbit predict model.lowbit photos/ --top 1")
def predict(
    file: FileArgument,
    images: Annotated[list[Path], typer.Argument(help="PNG or JPEG files, or folders of them.", metavar="IMAGE...")],
    top: Annotated[int, typer.Option(help="How many classes to show.", min=1)] = 3,
    invert: Annotated[
        bool, typer.Option("--invert", help="Swap dark and light: for a dark object on white, of Fashion-MNIST's kind.")
    ] = False,
    threads: ThreadsOption = 1,
    isa: IsaOption = None,
) -> None:
    """Name the classes of images. An image is resized and cropped to the network's input.

    Of several images those that can't be read are named and left out; the exit status is then 1.
    """
    from lowbit.predict import ImageError, check_network, find_images
    from lowbit.predict import predict as predict_images
    from lowbit.runtime import load

    engine = load(file, threads=threads, isa=isa)
    check_network(engine, str(file))
    paths = find_images(images)
    broken: list[ImageError] = []

    def leave_out(error: ImageError) -> None:
        if len(images) == 1 and not images[0].is_dir():
            raise error
        broken.append(error)
        err.print(f"[red]left out:[/] {escape(str(error))}", soft_wrap=True, highlight=False)

    table = Table(show_header=True)
    table.add_column("image", overflow="fold")
    table.add_column("class")
    table.add_column("probability", justify="right")
    for found in predict_images(engine, paths, top, invert, leave_out):
        for i, (name, share) in enumerate(found.classes):
            table.add_row(escape(str(found.path)) if i == 0 else "", escape(name), f"{share:.1%}")
    if table.row_count:
        out.print(table)
    if broken:
        err.print(f"{len(broken)} of {len(paths)} images could not be read", highlight=False)
        raise typer.Exit(1)


@app.command(
    epilog="Examples: lowbit upscale x2.lowbit photo.jpg photo-x2.png   |   lowbit upscale x2.lowbit photos/ larger/ --threads 2   |   "
    "lowbit upscale x2.lowbit photos/ larger/ --compare larger/page.html --float float.lowbit"
)
def upscale(
    file: FileArgument,
    source: Annotated[Path, typer.Argument(help="A picture (PNG, JPEG, BMP, WebP) or a folder of them.", metavar="IN")],
    target: Annotated[
        Path,
        typer.Argument(
            help="The larger picture (.png or .jpg), or a folder; of a folder of pictures PNGs of the same name go there.",
            metavar="OUT",
        ),
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite; without it, what is there already is left as it is.")
    ] = False,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="PAGE",
            help="Also write a page (HTML, and a PNG beside it) with crops side by side: nearest, bicubic, this file.",
        ),
    ] = None,
    twin: Annotated[
        Path | None, typer.Option("--float", metavar="FILE", help="With --compare: another file to show beside it.")
    ] = None,
    threads: ThreadsOption = 1,
    tile: Annotated[
        int | None,
        typer.Option(
            help="Largest side of the parts that a picture is cut into, in its pixels; the result is the same. By default what is fastest."
        ),
    ] = None,
    isa: IsaOption = None,
) -> None:
    """Enlarge pictures of any size with a super-resolution network.

    Depth, transparency, colour profile and EXIF data are kept, as far as these stay true; EXIF's orientation is applied. The same
    command goes on with a folder where it was interrupted; another network's pictures are refused. A picture of a folder that can't be
    read is named and left out; the exit status is then 1.
    """
    from lowbit.upscale import Upscaler, check_there, jobs

    if twin is not None and compare is None:
        raise typer.BadParameter("--float FILE is shown on a page: add --compare PAGE")
    larger = Upscaler(file, threads=threads, tile=tile, isa=isa)
    beside = None if twin is None else Upscaler(twin, threads=threads, tile=tile, isa=isa)
    work = jobs(source, target)
    if compare is not None:
        from lowbit import sidebyside

        sidebyside.check_place(compare, work, larger, beside)
    to_do = [job for job in work if force or not job.done]
    if not to_do and not source.is_dir() and compare is None:
        raise typer.BadParameter(f"{work[0].target} is there already; overwrite it with --force")
    if len(to_do) < len(work):
        unknown = check_there(larger, [job for job in work if job.done])
        foreign = f" ({unknown} of them say not by which network)" if unknown else ""
        err.print(
            f"{len(work) - len(to_do)} of {len(work)} are there already{foreign}; --force makes them again",
            highlight=False,
        )
    try:
        failed = _upscale_all(larger, to_do, alone=not source.is_dir())
    except KeyboardInterrupt:
        then = "the same command goes on" if source.is_dir() else f"{work[0].target} was not written"
        err.print(escape(f"interrupted; {then}"), soft_wrap=True, highlight=False)
        raise typer.Exit(130) from None
    done = [job for job in work if job.done]
    if compare is not None and done:
        for path in sidebyside.write_page(compare, done, larger, file, beside, twin):
            out.print(f"wrote [bold]{escape(str(path))}[/]", soft_wrap=True)
    elif compare is not None:
        err.print(f"{escape(str(compare))}: not written, there is no enlarged picture to show", soft_wrap=True)
    if failed:
        err.print(f"{failed} of {len(work)} pictures could not be enlarged", highlight=False)
        raise typer.Exit(1)


def _upscale_all(larger: Upscaler, to_do: Sequence[Job], alone: bool) -> int:
    """Enlarge them, with one bar for all; returns how many could not be. `alone`: an error ends it."""
    from lowbit.pictures import ImageError, read_header
    from lowbit.upscale import UpscaleError, upscale_file

    sizes: dict[Path, int] = {}
    for job in to_do:
        with suppress(ImageError):  # named when its turn comes
            header = read_header(job.source)
            sizes[job.source] = header.width * header.height
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("time left"),
        TimeRemainingColumn(),
    )
    failed = done = 0
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        bar = bars.add_task("", total=sum(sizes.values()))
        for job in to_do:
            pixels = sizes.get(job.source, 0)
            bars.update(bar, description=escape(job.source.name), completed=done)
            start = time.perf_counter()

            def tiles(at: int, of: int, before: int = done, pixels: int = pixels) -> None:
                bars.update(bar, completed=before + pixels * at / of)

            try:
                made = upscale_file(larger, job, tiles)
            except (ImageError, UpscaleError) as error:
                if alone:
                    raise
                failed += 1
                err.print(f"[red]left out:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
            else:
                took = time.perf_counter() - start
                facts = f"{made.width} x {made.height}, {took:.1f} s"
                out.print(f"{escape(str(job.target))}: {facts}", soft_wrap=True, highlight=False)
            done += pixels
    return failed


@app.command(epilog="Example: lowbit bench runs/demo/model.lowbit --threads 1 --json runs/demo/bench.json")
def bench(
    file: FileArgument,
    threads: Annotated[int, typer.Option(help="Threads, and cores, of all.", min=1)] = 1,
    isa: IsaOption = None,
    peers: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Runtimes beside it, with commas between: ort-fp32, ort-int8, openvino-fp32, openvino-int8, torch; or all.",
        ),
    ] = "ort-fp32",
    repeats: Annotated[int, typer.Option(help="Samples of each.", min=2)] = 100,
    batch: Annotated[int, typer.Option(help="Images in a call.", min=1)] = 1,
    output: Annotated[Path | None, typer.Option("--json", help="Write the numbers here.", metavar="FILE")] = None,
    layers: Annotated[bool, typer.Option("--layers/--no-layers", help="Measure every layer too.")] = True,
) -> None:
    """Time a file beside the same network in ONNX Runtime, OpenVINO or PyTorch, in turn, on the same cores."""
    from lowbit import bench as measure
    from lowbit.files import check_file

    names = peers.split(",")
    if output is not None:  # before minutes of measuring
        check_file(output)
    with err.status("measuring"):
        result = measure.bench_file(
            file, threads=threads, isa=isa, batch=batch, repeats=repeats, layers=layers, peers=names
        )
    console = measure.wide_console()
    if layers:
        console.print(measure.layers_table(result))
    console.print(measure.whole_table(result))
    for line in (measure.startup_line(result["startup"]), measure.peak_line(result["peak"])):
        console.print(line, soft_wrap=True, highlight=False)
    _warn(result["missing"])
    _warn(result["warnings"])
    if output is not None:
        measure.write_result(output, result)


# --------------------------------------------------------------------------------------------- compare


@app.command(
    epilog="Examples: lowbit compare recipes/tables/fashion-mnist-bits.yaml --seeds 3   |   "
    "lowbit compare TABLE --check-one   |   lowbit compare TABLE --tune"
)
def compare(
    file: Annotated[Path, typer.Argument(help="A table of recipes (YAML).", metavar="TABLE")],
    seeds: Annotated[int | None, typer.Option(help="Seeds of each cell; by default the table's.", min=1)] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Cells at once; by default one for each GPU, else for each core.", min=1)
    ] = None,
    on: Annotated[
        str,
        typer.Option(
            metavar="WHERE",
            help="local: processes of this machine. ray or ray:HOST:PORT: the nodes of a Ray cluster, of which this machine "
            "is one, by default RAY_ADDRESS's; --out lies on a file system that they share.",
        ),
    ] = "local",
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Where the runs go; by default runs/ and the table's name.")
    ] = None,
    cells_dir: Annotated[
        Path,
        typer.Option("--cells", help="Where results go: one small file a cell, and the table as JSON, Markdown, HTML."),
    ] = Path("results"),
    only: Annotated[list[str] | None, typer.Option(metavar="LABEL", help="These cells only. Repeatable.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a field of every cell's recipe. Repeatable."),
    ] = None,
    test: Annotated[
        bool, typer.Option("--test/--no-test", help="Evaluate each final network on the test images, once.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is done and what would run, and end.")] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check-one", help="Train nothing but one finished cell, drawn by chance, again, and compare the results."
        ),
    ] = False,
    check_seed: Annotated[
        int | None, typer.Option(help="Draw the same cell again: the number the check printed.", min=0)
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Difference that passes the check, in the table's unit. By default 0 on the same machine, versions and code, else 3 "
            "sqrt(2) deviations between seeds.",
            min=0,
        ),
    ] = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Run cells again whose recipe has changed since their result.")
    ] = False,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Run the table's tries instead, on the held-out images, never the test images."),
    ] = False,
    front: Annotated[
        bool,
        typer.Option(
            "--front",
            help="Then time one run of every cell, in turn on one core, float and 8-bit networks in ONNX Runtime too, and draw the score "
            "against milliseconds and bytes.",
        ),
    ] = False,
) -> None:
    """Train every cell of a table over seeds, resumably and in parallel; means, paired differences, one HTML page.

    Cells whose result is there are not run again.
    """
    from lowbit.train import aggregate, cells, compare
    from lowbit.train.table import load_table

    if tune and (check or seeds):
        raise typer.BadParameter("--tune goes without --check-one and --seeds")
    if front and (tune or check or only):
        raise typer.BadParameter(
            "--front measures all cells in one run: it goes without --tune, --check-one and --only"
        )
    table = load_table(file, changes or ())
    places = cells.Places(out_dir or Path("runs") / table.name, cells_dir / table.name)
    if tune:
        places, test = places.below("tune"), False
    wanted = table.tries(only or ()) if tune else table.cells(seeds, only or ())
    timed = _cells_to_time(wanted, places) if front else []
    steps = cells.plan(wanted, places, test=test, refresh=refresh, runs_of=timed)
    on_cpu = all(cell.recipe.train.device == "cpu" for cell in wanted)
    devices = max(cell.recipe.train.devices or 1 for cell in wanted)
    executor = _executor(on, jobs, "cpu" if on_cpu else "auto", devices)
    if dry_run:
        _print_plan(steps, cells.read_results(wanted, places), executor.slots)
        return
    cells.refuse(steps)
    failures = []
    if not check:
        known = cells.read_results(table.tries() if tune else table.cells(seeds), places)
        cells.check_data(steps, test, known, places)
        with _cell_lines(queued=on != "local") as show:
            try:
                failures = compare.run(table.name, steps, places, executor, test=test, refresh=refresh, on_event=show)
            except KeyboardInterrupt:
                err.print("interrupted; the same command goes on")
                raise typer.Exit(130) from None
    for failure in failures:
        where = f" (log: {failure.log})" if failure.log else ""
        err.print(f"[red]failed:[/] {escape(f'{failure.cell.title}: {failure.error}{where}')}", soft_wrap=True)
    if tune:
        _print_tries(*compare.best_tries(table, wanted, places))
    else:
        if front:
            _measure_front(table, wanted, places, seeds)
        tree = aggregate.aggregate(table, places, seeds)
        _print_results(aggregate.table_rows(tree), tree["title"])
        if tree["comparisons"]:
            _print_results(aggregate.difference_rows(tree), "differences, paired by seed")
        if tree["front"] is not None:
            _print_front(tree["front"], tree["metric"])
        for path in aggregate.write(table, tree, cells_dir):
            out.print(f"wrote [bold]{escape(str(path))}[/]", soft_wrap=True)
    if check:
        folder = None
        if on != "local":
            (folder := places.runs).mkdir(parents=True, exist_ok=True)
        _check_one(table.name, wanted, cells.read_results(wanted, places), executor, folder, check_seed, tolerance)
    if failures:
        raise typer.Exit(1)


def _cells_to_time(wanted: Sequence[Cell], places: Places) -> list[Cell]:
    from lowbit.train.measure_front import runs_to_time

    return runs_to_time(wanted, places)


def _measure_front(table: TableOfRecipes, wanted: Sequence[Cell], places: Places, seeds: int | None) -> None:
    from lowbit.train import aggregate, cells
    from lowbit.train.measure_front import measure
    from lowbit.train.rundir import write_json

    results = cells.read_results(wanted, places)
    split = aggregate.aggregate(table, places, seeds)["split"]
    with err.status("") as status:
        found = measure(
            table, wanted, results, places, split=split, on_progress=lambda text: status.update(escape(text))
        )
    write_json(places.front, found)
    _warn(found["warnings"])


def _print_front(front: Mapping[str, Any], metric: str) -> None:
    from lowbit.train.front import front_rows

    _print_results([[*row[:4], *row[5:]] for row in front_rows(front, metric)], "front")
    if front["stale"]:
        _warn(
            [
                f"measured with another recipe than the table has now: {', '.join(front['stale'])}; --front measures again"
            ]
        )
    _warn(f"left out: {text}" for text in front["left_out"])


def _executor(where: str, jobs: int | None, device: str, devices: int) -> Executor:
    from lowbit.train import workers

    kind, _, address = where.partition(":")
    if where == "local":
        return workers.LocalExecutor(jobs, device, devices)
    if kind != "ray" or where == "ray:":
        raise typer.BadParameter(f"--on {where}: is local, ray or ray:HOST:PORT")
    from lowbit.train.on_ray import RayExecutor

    return RayExecutor(where if address.startswith("//") else address, jobs, device, devices)


def _print_results(rows: Sequence[Sequence[str]], title: str) -> None:
    table = Table(title=escape(title), title_justify="left")
    for i, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if i else "left", overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(escape, row))
    out.print(table)


def _print_tries(rows: Sequence[tuple[Cell, str, bool]], chosen: str) -> None:
    table = Table(title="on the held-out images", title_justify="left")
    for heading in ("cell", "changes", "result", ""):
        table.add_column(heading, overflow="fold")
    for cell, value, best in rows:
        what = ", ".join(f"{key}: {v}" for key, v in cell.changes.items())
        table.add_row(escape(cell.title), escape(what), value, "best" if best else "")
    out.print(table)
    out.print("the best of each, for the table's file:\n")
    sys.stdout.write(chosen)


def _check_one(
    table: str,
    wanted: Sequence[Cell],
    results: Mapping[tuple[str, str], Mapping[str, Any]],
    executor: Executor,
    folder: Path | None,
    seed: int | None,
    tolerance: float | None,
) -> None:
    from lowbit.train import cells, compare

    seed = int(time.time()) if seed is None else seed
    cell = compare.draw(wanted, results, seed)
    took = _duration(results[cell.key]["seconds"])
    err.print(
        f"check: {escape(cell.title)} again (--check-seed {seed}); it took {took}", highlight=False, soft_wrap=True
    )
    factor = cells.unit(results[cell.key]["metric"])[1]
    limit = None if tolerance is None else tolerance / factor
    with _cell_lines(queued=folder is not None) as show:
        done = compare.check_one(table, cell, results, executor, tolerance=limit, folder=folder, on_event=show)
    facts = _facts(f"check of {cell.title}")
    facts.add_row("stored", f"{cells.show(done.stored, done.metric)} ({done.split})")
    facts.add_row("again", cells.show(done.again, done.metric))
    facts.add_row("equal to the last digit", "yes" if done.again == done.stored else "no")
    facts.add_row("differs in", ", ".join(done.differs) or "nothing: same machine, versions and code")
    facts.add_row("tolerance", cells.show(done.tolerance, done.metric))
    facts.add_row("check", "passed" if done.passed else "FAILED")
    out.print(facts)
    if not done.passed:
        raise typer.Exit(1)


def _print_plan(steps: Sequence[Step], results: Mapping[Any, Mapping[str, Any]], jobs: int) -> None:
    from lowbit.train.cells import Action, estimate

    table = Table(show_header=True)
    for heading in ("cell", "what it needs", ""):
        table.add_column(heading, overflow="fold")
    for step in steps:
        table.add_row(escape(step.cell.title), step.action.value, escape(step.why))
    out.print(table)
    to_run = sum(step.action in (Action.run, Action.resume, Action.overwrite) for step in steps)
    seconds = estimate(steps, list(results.values()), jobs)
    about = f", about {_duration(seconds)} with {jobs} at once" if seconds else ""
    out.print(f"{len(steps)} cells, {to_run} to train{about}", highlight=False)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@contextmanager
def _cell_lines(queued: bool) -> Iterator[Callable[[Event], None]]:
    """A line with a bar for each cell under way; where standard error is no terminal, lines as things happen.

    ``queued``: a cell waits in a queue until a worker takes it, and the worker's node is shown.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("epoch"),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    words = {
        "start": "queued" if queued else "started",
        "place": "started",
        "wait": "is trained by another process; waiting",
        "finish": "finished",
        "fail": "failed",
    }
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        lines: dict[tuple[str, str], Any] = {}

        def show(event: Event) -> None:
            key = event.cell.key
            if event.kind == "start":
                waits = " (queued)" if queued else ""
                lines[key] = bars.add_task(escape(event.cell.title) + waits, total=event.total)
            elif event.kind == "place" and key in lines:
                bars.update(lines[key], description=escape(f"{event.cell.title} ({event.text})"))
            elif event.kind == "epoch" and key in lines:
                bars.update(lines[key], completed=event.done)
            elif event.kind in ("finish", "fail", "retry") and key in lines:
                bars.remove_task(lines.pop(key))
            if event.kind != "epoch" and not (event.kind in ("start", "place") and err.is_terminal):
                said = words.get(event.kind, event.kind) + (f": {event.text}" if event.text else "")
                err.print(f"{escape(event.cell.title)}: {escape(said)}", soft_wrap=True, highlight=False)

        yield show


# --------------------------------------------------------------------------------------------- sensitivity


@app.command(
    epilog="Examples: lowbit sensitivity runs/float   |   lowbit sensitivity runs/float --budget-bytes 40000 -o mixed.yaml"
)
def sensitivity(
    run_dir: RunArgument,
    bits: Annotated[
        list[str] | None,
        typer.Option(
            metavar="W/A",
            help="Bits of weights / of inputs to try; by default 1/1, 2/2, 4/4 and 8/8. 32 is float. Repeatable.",
        ),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option("--layer", metavar="PATTERN", help="These layers only, such as 'blocks.*'. Repeatable."),
    ] = None,
    images: Annotated[int, typer.Option(help="Held-out images to answer, spread over all.", min=2)] = 2000,
    steps: Annotated[
        int | None,
        typer.Option(help="Of fine-tuning for each layer and pair of bits; 0 for none. By default 50.", min=0),
    ] = None,
    timed: Annotated[bool, typer.Option("--time/--no-time", help="Measure the layers' time on the engine.")] = True,
    budget_bytes: Annotated[
        int | None,
        typer.Option(help="Propose the mixed network with the least loss whose file has at most as many bytes.", min=1),
    ] = None,
    budget_ms: Annotated[
        float | None, typer.Option(help="The same for the engine's milliseconds for an image, on one thread.")
    ] = None,
    loss: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS",
            help="Propose the smallest file that loses at most as many points (of pictures dB), as the layers add up.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The proposed recipe; by default RUN/mixed.yaml.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the proposed recipe. Repeatable."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Measure again what is there.")] = False,
) -> None:
    """Measure which layer costs how much at which bits, and propose a recipe with mixed bits.

    One layer at a time goes to other bits, everything else stays as it was trained. The same command goes on where it was interrupted.
    """
    from lowbit.train import sensitivity_page
    from lowbit.train.mixed import Budget, propose
    from lowbit.train.sensitivity import PAIRS, STEPS, measure, parse_bits
    from lowbit.train.units import unit

    pairs = [parse_bits(text) for text in bits] if bits else PAIRS
    wants = [value for value in (budget_bytes, budget_ms, loss) if value is not None]
    if (output or changes) and not wants:
        raise typer.BadParameter("-o and --set are for a proposal: add --budget-bytes, --budget-ms or --loss")
    if any(not value > 0 for value in wants):
        raise typer.BadParameter("--budget-ms and --loss are above 0")
    with _progress() as report:
        tree = measure(
            run_dir,
            pairs,
            layers=layers or (),
            images=images,
            steps=STEPS if steps is None else steps,
            timed=timed,
            overwrite=overwrite,
            on_progress=report,
        )
        path = None
        if wants:
            budget = Budget(
                budget_bytes,
                None if budget_ms is None else budget_ms / 1e3,
                None if loss is None else loss / unit(tree["metric"])[1],
            )
            path = propose(run_dir, tree, budget, output, changes=changes or (), on_progress=report)["recipe"]
    _print_results(sensitivity_page.heat_table(tree), f"{run_dir}: what each layer alone loses")
    ranked = sensitivity_page.ranked_rows(tree)
    _print_results(ranked[:21], "by loss for each byte saved" + (": the first 20" if len(ranked) > 21 else ""))
    table = _facts("all of it")
    for name, value in sensitivity_page.facts(tree):
        table.add_row(name, escape(value))
    out.print(table)
    for written in sensitivity_page.write(run_dir, tree):
        out.print(f"wrote [bold]{escape(str(written))}[/]", soft_wrap=True)
    if path is not None:
        out.print(f"next: [bold]lowbit train {escape(path)}[/]", soft_wrap=True)


# --------------------------------------------------------------------------------------------- the zoo

zoo_app = typer.Typer(no_args_is_help=True, help="Networks that come with the package; `lowbit list zoo` names them.")
app.add_typer(zoo_app, name="zoo")


@zoo_app.command(
    "add",
    epilog="Example: lowbit zoo add runs/fast --name fashion-fast --title 'Fashion-MNIST, 10x faster than float' --seeds runs/fast-1",
)
def zoo_add(
    run_dir: Annotated[
        Path, typer.Argument(help="A run that was exported, and timed into RUN/bench.json.", metavar="RUN")
    ],
    name: Annotated[str, typer.Option(help="What it is called: lower-case words with '-' between them.")],
    title: Annotated[str, typer.Option(help="What it is, in a sentence.")],
    seeds: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RUN_OR_RESULT",
            help="The same recipe with another seed: a run, or a result file of compare. Repeatable.",
        ),
    ] = None,
    trained_by: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="What trained the run (and runs of --seeds), where no recipe below ./recipes is its own.",
        ),
    ] = None,
    licence: Annotated[str | None, typer.Option(help="Of the data, where it is not known.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the network of that name.")] = False,
) -> None:
    """Put an exported run into the zoo: its file, and a card with what is measured of it now, on all test images."""
    from lowbit.train.zoo import add_run

    _log_to_stderr()
    with err.status("measuring"):
        card = add_run(
            run_dir, name, title, others=seeds or (), trained_by=trained_by, licence=licence, overwrite=overwrite
        )
    out.print(_card_table(card.name, card.result, card.bytes, len(card.seeds["values"])))
    out.print(f"wrote [bold]{escape(str(card.path))}[/] and its card", soft_wrap=True)


def _card_table(name: str, result: str, size: int, seeds: int) -> Table:
    table = _facts(name)
    table.add_row("measured, test images", result)
    table.add_row("file", f"{size:,} bytes")
    table.add_row("seeds", str(seeds))
    return table


@zoo_app.command("check", epilog="Example: lowbit zoo check")
def zoo_check(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="Which; by default all.")] = None,
) -> None:
    """Hold files of the zoo against their cards: size, checksum, task, and what was measured, on the engine again.

    The exit status is 2 where one does not fit, or where its test images are not here.
    """
    from lowbit import zoo
    from lowbit.packfile import FileError
    from lowbit.train.data import DataError
    from lowbit.train.zoo import check

    wanted, failed = names or zoo.names(), 0
    for name in wanted:
        try:
            with err.status(f"measuring {name}"):
                done = check(name)
        except (FileError, DataError) as error:
            failed += 1
            err.print(f"[red]failed:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
            continue
        left = f"; not here: {', '.join(done.missing)}" if done.missing else ""
        what = "pictures" if done.card.task == "superres" else "images"
        out.print(
            f"{name}: {done.card.result} as its card says, {done.images:,} {what}{left}",
            highlight=False,
            soft_wrap=True,
        )
    if failed:
        if len(wanted) > 1:
            err.print(f"{failed} of {len(wanted)} networks could not be held against their cards", highlight=False)
        raise typer.Exit(2)


# --------------------------------------------------------------------------------------------- search


@app.command(
    epilog="Example: lowbit search recipes/search/fashion-mnist.yaml --minutes 120, then lowbit compare on the table that it writes"
)
def search(
    file: Annotated[Path, typer.Argument(help="A space of recipes (YAML).", metavar="SPACE")],
    minutes: Annotated[
        float, typer.Option(help="How long; what is under way at the end goes on the next time.", min=0.01)
    ] = 60.0,
    jobs: Annotated[
        int | None, typer.Option(help="Trials at once; by default one for each GPU, else for each core.", min=1)
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Train at most so many.", min=1)] = None,
    on: Annotated[
        str,
        typer.Option(
            metavar="WHERE",
            help="local, ray or ray:HOST:PORT, as in compare. Networks are timed on this machine.",
        ),
    ] = "local",
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", help="Study, runs and results; by default runs/search- and the space's name."),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(help="Where the table of the front goes, for compare; by default tables/ in the --out folder."),
    ] = None,
) -> None:
    """Search a space of recipes for the front: held-out score against milliseconds on the engine. Resumable.

    Speed is measured before training; slow trials that are behind are stopped. Claims rest on `lowbit compare` of the table.
    """
    from lowbit.train import search as searching
    from lowbit.train import search_report
    from lowbit.train.space import load_space

    space = load_space(file)
    folder = out_dir or Path("runs") / f"search-{space.name}"
    first = space.cell(space.first).recipe.train
    executor = _executor(on, jobs, first.device, first.devices or 1)
    with _trial_lines(minutes) as show, searching.Search(space, folder, executor, show) as study:
        show.front = lambda: search_report.progress_line(study.front, study.metric)
        stopped = False
        try:
            study.run(minutes, trials)
        except KeyboardInterrupt:
            stopped = True
        paths = search_report.write(study, table)
    _print_results(
        search_report.front_rows(study), f"front of {len(study.trials)} trials: {search_report.counts(study)}"
    )
    for path in paths:
        out.print(f"wrote [bold]{escape(str(path))}[/]", soft_wrap=True)
    if stopped:
        err.print("interrupted; the same command goes on")
        raise typer.Exit(130)
    if not study.front:
        err.print("nothing was trained to its end; the same command goes on")
    elif len(paths) > 1:
        out.print(f"next: [bold]lowbit compare {escape(str(paths[-1]))} --front[/]", soft_wrap=True)


class _TrialLines:
    """A line with a bar for each trial under way and one for the search; where standard error is no terminal, lines."""

    def __init__(self, bars: Progress, minutes: float) -> None:
        self._bars = bars
        self._began, self._minutes = time.monotonic(), minutes
        self._lines: dict[int, Any] = {}
        self._whole = bars.add_task("search", total=60 * minutes)
        self.front: Callable[[], str] = lambda: ""

    def __call__(self, event: SearchEvent) -> None:
        took = time.monotonic() - self._began
        self._bars.update(self._whole, completed=min(took, 60 * self._minutes))
        name = f"trial {event.trial}"
        if event.kind in ("start", "run") and event.trial not in self._lines:
            self._lines[event.trial] = self._bars.add_task(name, total=event.total or None)
        elif event.kind == "epoch" and event.trial in self._lines:
            self._bars.update(self._lines[event.trial], completed=event.done, total=event.total)
        elif event.kind in ("finish", "prune", "fail", "back") and event.trial in self._lines:
            self._bars.remove_task(self._lines.pop(event.trial))
        if event.kind == "epoch":
            return
        words = {
            "start": "",
            "run": "trains ",
            "finish": "",
            "prune": "stopped: ",
            "skip": "not trained: ",
            "back": "put back: ",
            "fail": "failed: ",
            "wait": "waits: ",
        }[event.kind]
        left = max(self._minutes - took / 60, 0)
        err.print(escape(f"{name}: {words}{event.text}"), soft_wrap=True, highlight=False)
        if event.kind == "finish":
            err.print(
                escape(f"{self.front()}; {left:.0f} of {self._minutes:g} min left"), soft_wrap=True, highlight=False
            )


@contextmanager
def _trial_lines(minutes: float) -> Iterator[_TrialLines]:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        yield _TrialLines(bars, minutes)


# --------------------------------------------------------------------------------------------- report, list


@app.command(epilog="Example: lowbit report runs/demo -o report.html")
def report(
    run_dir: RunArgument,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The page; by default RUN/report.html.")] = None,
    summary: Annotated[
        bool, typer.Option("--summary", help="Print the final facts as one table, and write nothing.")
    ] = False,
) -> None:
    """Write a run as one self-contained HTML page: curves, gap, flips, confusion, sizes, speeds."""
    from lowbit import report as page

    if summary:
        table = _facts(str(run_dir))
        for name, value in page.summary(run_dir):
            table.add_row(name, escape(value))
        out.print(table)
        return
    path, missing = page.write_report(run_dir, output)
    for what, command in missing:
        err.print(f"missing: {what}; make it with [bold]{escape(command)}[/]", soft_wrap=True)
    out.print(f"wrote [bold]{escape(str(path))}[/]", soft_wrap=True)


class Kind(StrEnum):
    """What there are lists of."""

    zoo = "zoo"
    recipes = "recipes"
    tables = "tables"
    search = "search"
    models = "models"
    methods = "methods"
    datasets = "datasets"
    ops = "ops"
    isas = "isas"


@app.command("list", epilog="Example: lowbit list methods")
def list_(
    kind: Annotated[
        str | None, typer.Argument(metavar="KIND", help=f"One of {', '.join(Kind)}; by default all of them.")
    ] = None,
) -> None:
    """List what there is: the zoo; recipes, tables, spaces to search in this folder; models, methods, data sets, ops, instruction sets."""
    if kind is not None and kind not in list(Kind):
        raise ValueError(f"list {kind}: there are lists of {', '.join(Kind)}")
    for wanted in [Kind(kind)] if kind else list(Kind):
        try:
            rows = _LISTS[wanted]()
        except ModuleNotFoundError as error:
            if kind:
                raise
            rows = [("", explain(error) or str(error))]
        headings = ("name", "task", "measured", "kB", "ms", "what it is") if wanted is Kind.zoo else ()
        table = Table(
            title=wanted.value, title_justify="left", show_header=bool(headings), box=None, padding=(0, 2, 0, 1)
        )
        table.add_column("name", no_wrap=True)
        for heading in headings[1:] or ("",):
            table.add_column(heading, justify="right" if heading in ("kB", "ms") else "left")
        for name, *more in rows:
            table.add_row(escape(name), *(f"[dim]{escape(what)}[/]" for what in more))
        out.print(table)
        if not kind:
            out.print()


def _zoo() -> list[tuple[str, ...]]:
    from lowbit import zoo

    rows: list[tuple[str, ...]] = []
    for name in zoo.names():
        try:
            c = zoo.load_card(name)
        except zoo.ZooError as error:
            rows.append((name, "", "", "", "", str(error)))
        else:
            rows.append((c.name, c.task, c.result, f"{c.bytes / 1000:.1f}", c.milliseconds, c.title))
    return rows


def _kind(path: Path) -> str:
    """Of a file below recipes/: "tables", "search" or "recipes"."""
    return path.parent.name if path.parent.name in ("tables", "search") else "recipes"


def _recipes(kind: str = "recipes") -> list[tuple[str, ...]]:
    import yaml

    rows: list[tuple[str, ...]] = []
    for path in sorted(path for path in Path("recipes").rglob("*.yaml") if _kind(path) == kind):
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
            rows.append((str(path), str(tree.get("title") or tree.get("description", ""))))
        except (yaml.YAMLError, AttributeError, UnicodeDecodeError):
            rows.append((str(path), "not a recipe"))
    place = "recipes" if kind == "recipes" else f"recipes/{kind}"
    return rows or [("", f"none: they are looked for in ./{place}, in the folder of lowbit's repository")]


def _tables() -> list[tuple[str, ...]]:
    return _recipes("tables")


def _search() -> list[tuple[str, ...]]:
    return _recipes("search")


def _about(registry: Any) -> list[tuple[str, ...]]:
    return [(name, "\n".join([_summary(registry.get(name)), *_taken(registry.get(name))])) for name in registry]


_GIVEN: Final = ("bits", "classes", "in_channels", "image_size", "root", "upscale")
"""Arguments that have keys of their own in a recipe, or come from the data."""


def _taken(thing: Any) -> list[str]:
    """A line with the options of a method, model or data set and their defaults; none where there are none."""
    known = {key: p.default for key, p in introspection.signature(thing).parameters.items() if key not in _GIVEN}
    return ["Options: " + ", ".join(f"{key}={value}" for key, value in known.items())] if known else []


def _summary(thing: Any) -> str:
    """The first paragraph of a docstring, with the formulas that a "::" at its end announces."""
    head, *more = (introspection.getdoc(thing) or "").split("\n\n")
    text = " ".join(head.split()).replace("``", "`")
    if not text.endswith("::") or not more:
        return text
    return "\n".join([text.removesuffix("::").rstrip() + ":", *("  " + line.strip() for line in more[0].splitlines())])


def _models() -> list[tuple[str, ...]]:
    from lowbit.train.models import MODELS

    return [*_about(MODELS), ("package.module:function", "Your own: any function that gives an nn.Module.")]


def _methods() -> list[tuple[str, ...]]:
    from lowbit.train.quantizers import ACTIVATIONS, WEIGHTS

    weights: list[tuple[str, ...]] = [(name, f"weights: {what}") for name, what in _about(WEIGHTS)]
    return weights + [(name, f"activations: {what}") for name, what in _about(ACTIVATIONS)]


def _datasets() -> list[tuple[str, ...]]:
    from lowbit.train.data import DATASETS

    return _about(DATASETS)


def _ops() -> list[tuple[str, ...]]:
    from lowbit.graph import OPS

    return [*((name, "") for name in OPS), ("", "docs/OPS.md says what each one means")]


def _isas() -> list[tuple[str, ...]]:
    from lowbit.runtime import isas

    return [(name, "this CPU runs it" if there else "not on this CPU") for name, there in isas().items()]


_LISTS: Final[dict[Kind, Callable[[], list[tuple[str, ...]]]]] = {
    Kind.zoo: _zoo,
    Kind.recipes: _recipes,
    Kind.tables: _tables,
    Kind.search: _search,
    Kind.models: _models,
    Kind.methods: _methods,
    Kind.datasets: _datasets,
    Kind.ops: _ops,
    Kind.isas: _isas,
}
