"""Speed, side by side: the engine beside ONNX Runtime, OpenVINO and PyTorch, in one process on the same cores.

Whatever is compared takes turns, so that all of it sees the same machine. Reported are medians, the spread of the samples and of
the ratios of neighbouring samples, the share of what this core can do at most, measured in the same run, and a warning where the
machine is too noisy, or its clock too unsteady, to tell. Needs the extra ``lowbit[bench]``.

``lowbit bench FILE`` measures a file; ``python -m lowbit.bench`` layers, networks and training steps.
"""

from __future__ import annotations

from lowbit.bench.file import FORMAT, bench_file, bench_network
from lowbit.bench.layers import LAYERS, LOW_BIT, Layer, bench_layers, conv_graph, peer_examples, peer_graph
from lowbit.bench.measure import Comparison, Core, Peak, Timing, alternate, in_turn, pinned, timed
from lowbit.bench.peers import PEERS, Peer, Session, chosen, installed
from lowbit.bench.show import (
    digits,
    layers_table,
    peak_line,
    startup_line,
    whole_table,
    wide_console,
    write_result,
)
from lowbit.bench.startup import bench_startup
from lowbit.bench.twin import channels_last, float_twin

__all__ = [
    "FORMAT",
    "LAYERS",
    "LOW_BIT",
    "PEERS",
    "Comparison",
    "Core",
    "Layer",
    "Peak",
    "Peer",
    "Session",
    "Timing",
    "alternate",
    "bench_file",
    "bench_layers",
    "bench_network",
    "bench_startup",
    "channels_last",
    "chosen",
    "conv_graph",
    "digits",
    "float_twin",
    "in_turn",
    "installed",
    "layers_table",
    "peak_line",
    "peer_examples",
    "peer_graph",
    "pinned",
    "startup_line",
    "timed",
    "whole_table",
    "wide_console",
    "write_result",
]
