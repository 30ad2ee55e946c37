"""Running a file needs numpy and safetensors, nothing else: seen in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden" / "format1.lowbit"

CODE = f"""
import sys
import numpy as np
import lowbit
net = lowbit.load({str(GOLDEN)!r})
x = np.zeros((2, *net.input_shape), net.input_dtype)
assert net(x).shape == (2, *net.output_shape)
assert lowbit.read({str(GOLDEN)!r}).run(x).tobytes() == net(x).tobytes()
own = {{"lowbit", "numpy", "safetensors"}}
others = set()
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None) or ""
    if "site-packages" in file:
        others.add(name.partition(".")[0])
others -= {{n for n in others if n.startswith("_")}}  # editable-install hooks
assert not others - own, others - own
assert not {{"torch", "lightning", "onnxruntime", "typer", "PIL"}} & set(sys.modules)
print("ran")
"""


def test_running_a_file_imports_numpy_and_safetensors_only() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "ran", done.stderr
