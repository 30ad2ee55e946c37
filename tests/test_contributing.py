"""A newcomer's quantizer, by CONTRIBUTING.md alone: its one file and one line go into a copy of the package, and the tests find it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import lowbit
import lowbit._engine

ROOT = Path(__file__).parents[1]

RUN = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]  # the installed package
sys.path.insert(0, sys.argv[1])
import lowbit, pytest
assert lowbit.__file__.startswith(sys.argv[1]), lowbit.__file__
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/test_quantizers.py", "-k", "twn", "-rA"]))
"""


def test_a_quantizer_is_one_file_and_one_line(tmp_path: Path) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split("## A quantizer, from nothing to the engine")[1].split("\n## ")[0]
    file, line = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    place = re.search(r"`src/(lowbit/train/quantizers/\w+\.py)`:", section)[1]
    table = re.search(r"table `(\w+)` of `src/(lowbit/[\w/]+\.py)`", section)

    package = tmp_path / "lowbit"
    shutil.copytree(Path(lowbit.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(lowbit._engine.__file__, package)
    assert not (tmp_path / place).exists()
    (tmp_path / place).write_text(file, encoding="utf-8")
    base = tmp_path / table[2]
    before, mark, after = base.read_text(encoding="utf-8").partition(f"\n{table[1]}: Registry")
    opening, brace, rest = after.partition("{\n")
    base.write_text(before + mark + opening + brace + line + rest, encoding="utf-8")

    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = set(re.findall(r"PASSED tests/test_quantizers.py::(\w+)\[[^\]]*twn", done.stdout))
    assert {"test_fake_weights_are_decoded_codes", "test_weights_have_a_gradient"} <= found
    assert "test_every_weight_quantizer_runs_as_trained" in found  # frozen, and the engine held to it
    assert "FAILED" not in done.stdout
