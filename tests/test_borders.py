"""The hard border: torch is imported under src/lowbit/train and nowhere else."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "lowbit"


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_torch_stays_in_train() -> None:
    files = [p for p in SOURCE.rglob("*.py") if "train" not in p.relative_to(SOURCE).parts]
    assert len(files) > 10
    assert [p.name for p in files if imported(p) & {"torch", "lightning", "torchmetrics"}] == []


def test_the_graph_knows_numpy_and_itself_only() -> None:
    for name in ("bits.py", "graph.py", "interpreter.py", "packfile.py", "files.py"):
        others = imported(SOURCE / name) - {"numpy", "safetensors", "lowbit"}
        assert not {o for o in others if not _standard(o)}, name


def _standard(module: str) -> bool:
    import sys

    return module in sys.stdlib_module_names
