"""Cells on a Ray cluster of two nodes on this machine: a killed worker, a lost node, drivers that are killed and stopped."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import yaml
from PIL import Image
from ray.cluster_utils import Cluster

from lowbit import cli, remote
from lowbit.remote import RemoteError, Task
from lowbit.train import cells, compare
from lowbit.train.cells import Places
from lowbit.train.on_ray import RayExecutor
from lowbit.train.recipe import load_recipe
from lowbit.train.rundir import RunError, read_run, write_json
from lowbit.train.table import Table, load_table
from lowbit.train.trainer import train
from lowbit.train.workers import Executor, Job

PATIENCE = 240.0
"""Seconds until a test gives up; nothing waits for so long unless something is broken."""

# The first training on each node stops in the middle of its second epoch, until it is killed.
MODEL = """
import os
import signal
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, in_channels):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes),
        )
        self.steps = 0

    def forward(self, x):
        if self.training:
            self.steps += 1
            if self.steps == STEPS:
                halt()
        return self.layers(x)

def halt():
    node = os.environ.get("RAY_RAYLET_PID")
    if node:
        try:
            descriptor = os.open(f"halt-{node}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return
        os.write(descriptor, f"{os.getpid()} {os.getppid()} .".encode())
        while True:
            signal.pause()
"""


def wait_for(found: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + PATIENCE
    while not (value := found()):
        assert time.monotonic() < end, f"{what}: not after {PATIENCE:.0f} s"
        time.sleep(0.02)
    return value


def halted(node: int | str = "*") -> tuple[int, int]:
    """The training that stopped on a node, and the Ray worker it belongs to."""

    def read() -> list[str]:
        return [text for path in Path().glob(f"halt-{node}") if (text := path.read_text()).endswith(".")]

    child, parent, _ = wait_for(read, f"halt on node {node}")[0].split()
    return int(child), int(parent)


def alive(process: int) -> bool:
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    base = tempfile.mkdtemp(prefix="lb", dir="/tmp")  # short: paths of sockets have 107 characters
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", base)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("RAY_ADDRESS", raising=False)
        Path(base, "ray").mkdir()
        nodes = Cluster()
        try:
            nodes.add_node(num_cpus=2, node_name="first", include_dashboard=False)
            nodes.add_node(num_cpus=1, node_name="second")
            yield nodes
        finally:
            ray.shutdown()
            nodes.shutdown()
            shutil.rmtree(base, ignore_errors=True)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 20)):
        for label, low in (("dark", 0), ("light", 60)):
            folder = root / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(low, low + 190, (8, 8), np.uint8)).save(folder / f"{i}.png")
    return root


def write(images: Path, **described: Any) -> Path:
    """A table of cells of the model above, in this folder."""
    sys.modules.pop("halting", None)
    Path("halting.py").write_text(MODEL.replace("STEPS", "12"))  # 9 steps an epoch
    tree = {
        "name": "grid",
        "recipe": {
            "model": {"name": "halting:Net"},
            "data": {"name": "image_folder", "root": str(images), "size": 8, "channels": 1},
            "quantize": {"method": "slb", "weight_bits": 1},
            "train": {"epochs": 3, "batch_size": 8, "lr": 0.05, "device": "cpu"},
        },
        "cells": described,
        "seeds": 1,
    }
    path = Path("grid.yaml")
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def go(
    table: Table, places: Places, executor: Executor, on_event: Callable[[compare.Event], None]
) -> list[compare.Failure]:
    return compare.run(table.name, cells.plan(table.cells(), places), places, executor, on_event=on_event)


def measured(table: Table, places: Places) -> dict[str, Any]:
    found = cells.read_results(table.cells(), places)
    return {k[0]: [result["results"][split] for split in ("validation", "test")] for k, result in found.items()}


class Here:
    """An executor that trains in this process, one cell after the other."""

    slots = 1

    def submit(self, job: Job) -> Future[int]:
        train(load_recipe(job.recipe), job.run_dir, test=job.test)
        future: Future[int] = Future()
        future.set_result(0)
        return future

    def stop(self) -> None:
        raise AssertionError


# ------------------------------------------------------------------------------------------ a cluster


def test_a_killed_worker_and_a_lost_node(
    cluster: Cluster, images: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every cell is there once, equal, to the last digit, to one that nobody disturbed."""
    learning_rates = {"base": 0.1, "fast": 0.2, "slow": 0.01, "tuned": 0.02}
    described: dict[str, Any] = {label: {"set": {"train.lr": lr}} for label, lr in learning_rates.items()}
    described["tuned"]["after"] = "base"
    table = load_table(write(images, **described))
    second = next(iter(cluster.worker_nodes))
    killed = []

    def kill() -> None:
        child, worker = halted(raylet(cluster.head_node))
        killed.append(child)
        os.kill(worker, signal.SIGKILL)
        killed.append(halted(raylet(second))[0])
        cluster.remove_node(second, allow_graceful=False)

    places, events = Places(Path("runs"), Path("results")), []
    handler = signal.getsignal(signal.SIGTERM)
    executor = RayExecutor(cluster.address, device="cpu")
    assert signal.getsignal(signal.SIGTERM) == handler
    assert executor.slots == 3
    assert RayExecutor(cluster.address, 1, device="cpu").slots == 1
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert not go(table, places, executor, events.append)
    killer.join()
    assert not any(map(alive, killed)), "nobody went on before they had ended"
    wait_for(lambda: executor.slots == 2, "news of the lost node")

    said = [(event.kind, event.cell.label) for event in events]
    again = [event for event in events if event.kind == "retry"]
    labels = [event.cell.label for event in again]
    assert len(set(labels)) == len(labels) == 2
    for event, node in zip(sorted(again, key=lambda e: e.text), ("first", "second"), strict=True):
        assert re.fullmatch(
            rf"its worker was killed \(SIGKILL, on {node} \(\S+\), process \d+\); it goes on", event.text
        )
    for label in learning_rates:
        assert said.count(("finish", label)) == 1
        assert said.count(("start", label)) == said.count(("place", label)) == 1 + labels.count(label)
        result = cells.read_result(Path("results", f"{label}-seed0.json"))
        assert result is not None
        assert result["resumed"] == labels.count(label)
        assert Path("runs", label, "seed0.log").read_text().count("--- node ") == 1 + labels.count(label)
    assert len(list(Path("results").iterdir())) == 4
    assert capfd.readouterr().out == "", "Ray is quiet"

    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    undisturbed = Places(Path("runs here"), Path("results here"))
    assert not go(table, undisturbed, Here(), lambda event: None)
    assert measured(table, places) == measured(table, undisturbed)
    assert len(measured(table, places)) == 4
    cluster.add_node(num_cpus=1, node_name="second")


def test_drivers_that_are_stopped_and_killed(cluster: Cluster, images: Path) -> None:
    """An interrupt ends the tasks; those of a killed driver never write beside those of the next one."""
    table = load_table(write(images, only={}))
    places = Places(Path("runs/grid"), Path("results/grid"))

    stopped = []

    def interrupt(event: compare.Event) -> None:
        if event.kind == "place":
            stopped.append(halted()[0])
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        go(table, places, RayExecutor(cluster.address, device="cpu"), interrupt)
    assert not alive(stopped[0])
    assert "interrupted; go on with" in Path("runs/grid/only/seed0.log").read_text(), "not killed"

    next(Path().glob("halt-*")).unlink()
    line = [sys.executable, "-m", "lowbit", "compare", "grid.yaml", "--on", f"ray:{cluster.address}"]
    with Path("said").open("w") as log:
        driver = subprocess.Popen(line, stdout=log, stderr=log)
    orphan, _ = halted()
    place = remote.worker_of(places.run_dir(table.cells()[0]))
    wait_for(lambda: "started" in Path("said").read_text(), "the driver's word")
    driver.kill()
    driver.wait()
    assert Path("said").read_text() == f"only seed 0: queued: 1 of 3 epochs are done\nonly seed 0: started: {place}\n"

    assert not go(table, places, RayExecutor(cluster.address, device="cpu"), lambda event: None)
    assert not alive(orphan), "it was waited for"
    assert read_run(places.run_dir(table.cells()[0]))["resumed"] == 2
    assert list(measured(table, places)) == ["only"]


def test_what_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        closed = f"127.0.0.1:{listener.getsockname()[1]}"
        for address, message in [
            ("ray://x:1", r"ray://x:1: Ray's client is not offered; start lowbit compare on a node"),
            (closed, rf"no Ray cluster at {closed}: .*Connection refused; on the first machine `ray start --head`"),
            ("x", r"no Ray cluster at x: an address is HOST:PORT"),
        ]:
            with pytest.raises(RunError, match=message):
                RayExecutor(address)
        monkeypatch.setenv("RAY_ADDRESS", closed)
        with pytest.raises(RunError, match=f"no Ray cluster at {closed}"):
            RayExecutor()


def test_a_cluster_that_is_too_small(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="no node of the Ray cluster has the 3 CPUs that a cell takes"):
        RayExecutor(cluster.address, device="cpu", devices=3)
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    with pytest.raises(RunError, match="OMP_NUM_THREADS=many: with --on ray it is the number of CPUs"):
        RayExecutor(cluster.address)


# ------------------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize("where", ["rya", "ray:", "local:8"])
def test_where_is_local_or_ray(where: str, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.app(["compare", str(write(images, only={})), "--on", where])
    assert stop.value.code == 2
    assert "is local, ray or ray:HOST:PORT" in " ".join(capsys.readouterr().err.replace("│", " ").split())


# ------------------------------------------------------------------------------------------ a node, without Ray


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "cell").mkdir()
    return tmp_path / "cell" / "seed0"


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a node does not see now it never sees."""
    monkeypatch.setattr(remote, "SIGHT_SECONDS", 0.0)


def task(run_dir: Path, ticket: str) -> Task:
    base = run_dir.parent.parent
    return Task(["--version"], run_dir, base / "log", ticket, str(base), remote.source_digest(), {"NO_COLOR": "1"})


@pytest.mark.usefixtures("at_once")
def test_one_ticket_is_valid(run_dir: Path) -> None:
    assert remote.withdraw(run_dir), "nobody ever had one"
    assert not list(run_dir.parent.iterdir())
    old, new = remote.issue(run_dir), remote.issue(run_dir)
    with pytest.raises(RemoteError, match="--out has to lie on a file system that all nodes share"):
        remote._take(run_dir, old, "a")
    assert remote.worker_of(run_dir) == ""
    descriptor = remote._take(run_dir, new, "b")
    assert remote.worker_of(run_dir) == "b"
    assert not remote.withdraw(run_dir)
    with pytest.raises(RemoteError, match="is trained by b; wait for its end"):
        remote.issue(run_dir)
    os.close(descriptor)
    assert remote.withdraw(run_dir)
    with pytest.raises(RemoteError, match="--out has to lie"):
        remote._take(run_dir, new, "b")
    remote._worker_file(run_dir).write_text('{"ticket')  # just being written
    assert remote.worker_of(run_dir) == ""


@pytest.mark.usefixtures("at_once")
def test_what_a_node_lacks(run_dir: Path, tmp_path: Path) -> None:
    ticket = remote.issue(run_dir)
    for changes, message in [
        ({"source": "another"}, "node n1: has another version of lowbit"),
        ({"folder": "/no/such"}, "node n1: has no folder /no/such, where"),
        ({"run_dir": tmp_path / "other" / "seed0"}, f"node n1: {tmp_path}/other is not the folder here"),
        ({"log": tmp_path / "no" / "log"}, f"node n1: [Errno 2] No such file or directory: '{tmp_path}/no/log'"),
    ]:
        status, error = remote.train_cell(replace(task(run_dir, ticket), **changes), "n1")
        assert status == 2
        assert error.startswith(message)
    assert not (tmp_path / "other").exists()
    assert remote.withdraw(run_dir), "nothing holds it"


def test_a_cell_waits_for_its_predecessor(run_dir: Path, tmp_path: Path) -> None:
    ticket = remote.issue(run_dir)
    predecessor = remote.lock(remote._worker_file(run_dir))
    assert predecessor is not None
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(remote.train_cell(task(run_dir, ticket), "n1")))
    thread.start()
    thread.join(0.3)
    assert not done
    os.close(predecessor)
    thread.join(PATIENCE)
    assert done == [(0, "")]
    assert remote.worker_of(run_dir) == f"n1, process {os.getpid()}"
    assert (tmp_path / "log").read_text().startswith("--- node n1\nlowbit ")


def test_a_failure_names_the_node(images: Path) -> None:
    class Failing(Here):
        def submit(self, job: Job) -> Future[int]:
            ticket = remote.issue(job.run_dir)
            os.close(remote._take(job.run_dir, ticket, "n1, process 5"))
            job.log.write_text(
                "--- node n1\nerror: nowhere: no such folder\n" if "a" in job.run_dir.parts else "--- node n1\n"
            )
            future: Future[int] = Future()
            future.set_result(3)
            return future

    table = load_table(write(images, a={}, b={}))
    failures = go(table, Places(Path("runs").absolute(), Path("results")), Failing(), lambda event: None)
    assert [failure.error for failure in failures] == [
        "nowhere: no such folder, on n1, process 5",
        "exit status 3, on n1, process 5",
    ]


@pytest.mark.parametrize(("kills", "fails"), [((1, 2), False), ((0, 0), True), ((1, 2, 2), True)])
def test_a_cell_is_resumed_as_long_as_it_comes_further(kills: tuple[int, ...], fails: bool, images: Path) -> None:
    left = list(kills)

    class Killed(Here):
        """Workers that are killed after so many epochs."""

        whole: dict[str, Any]

        def submit(self, job: Job) -> Future[int]:
            if not job.resume:
                super().submit(job)
                self.whole = read_run(job.run_dir)
            undone = {"status": "running", "epochs_done": left[0], "results": None} if left else {}
            write_json(job.run_dir / "run.json", {**self.whole, **undone})
            future: Future[int] = Future()
            future.set_result(-signal.SIGKILL if left else 0)
            del left[:1]
            return future

    table = load_table(write(images, only={"set": {"model.name": "vgg_small", "model.width": 4, "data.size": 16}}))
    failures = go(table, Places(Path("runs").absolute(), Path("results")), Killed(), lambda event: None)
    assert [failure.error for failure in failures] == (["its worker was killed twice (SIGKILL)"] if fails else [])
    assert not left
