"""The others: runtimes that compute the same network in float32 or in 8 bits.

A peer is opened on a Graph and gives a function that runs it once: every optimisation on, buffers bound beforehand, as many threads as
ours. A peer that is not installed is named as such; none is left out silently.
"""

from __future__ import annotations

import ctypes
import io
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from lowbit.bench.int8 import Quantized, quantized
from lowbit.bench.measure import in_turn, timed
from lowbit.bench.twin import channels_last, float_twin
from lowbit.graph import Graph, Node

Array = NDArray[Any]
Run = Callable[[], None]
Answer = Callable[[Array], Array]
"""From an input batch as the twin takes it to the output, both float32 and channels first."""


@dataclass(frozen=True)
class Session:
    """A network in a peer.

    Attributes:
        run: computes it once, on the same numbers each time.
        answer: computes it for a batch, channels first; the codes of an 8-bit model are encoded and decoded.
        note: what ran: signedness, precision, compiled or not.
        file_bytes: of the ONNX model that was opened; 0 where the peer made one of its own of it.
    """

    run: Run
    answer: Answer
    note: str = ""
    file_bytes: int = 0


@dataclass(frozen=True)
class Peer:
    """One way to run a float twin.

    Attributes:
        name: as ``--peers`` takes it.
        title: as tables show it.
        packages: it needs, the one with its version first.
        extra: of lowbit's, that installs them.
    """

    name: str
    title: str
    packages: tuple[str, ...]
    extra: str
    _open: Callable[[onnx.ModelProto, int, Array], Session]

    @property
    def version(self) -> str | None:
        """Of its first package; None where one is not installed."""
        try:
            first, *_ = [version(package) for package in self.packages]
        except PackageNotFoundError:
            return None
        return first

    @property
    def missing(self) -> str:
        """What to say where it is not installed."""
        return f"{self.title}: not installed; pip install 'lowbit[{self.extra}]'"

    def session(self, graph: Graph, threads: int, batch: int = 1, examples: Array | None = None) -> Session:
        """`graph`'s float twin, ready to run.

        Args:
            graph: any Graph.
            threads: of the peer.
            batch: images in a run.
            examples: inputs of the twin, channels first, a multiple of `batch` of them: ranges of 8-bit models are measured on them, and
                they are what `run` computes. None for standard normal ones.
        """
        model = float_twin(graph, batch)
        if examples is None:
            examples = np.random.default_rng(0).standard_normal(_dims(model.graph.input[0]), np.float32)
        with _kept_signal_stack():
            return self._open(model, threads, examples)

    def empty(self, threads: int) -> Session:
        """A call that computes nothing: what a call costs by itself."""
        attributes = {"shape": (1,), "dtype": "float32"}
        nodes = (Node("input", "input", attrs=attributes), Node("output", "output", ("input",)))
        return self.session(Graph(nodes, {}), threads)


class _SignalStack(ctypes.Structure):
    _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def _kept_signal_stack() -> Iterator[None]:
    """OpenVINO gives this thread another stack for signals, with room for a signal's frame and nothing else: the next one that
    Python handles (a child's end, once PyTorch has had loader processes) would end this process."""
    if sys.platform != "linux":
        yield
        return
    libc, before = ctypes.CDLL(None), _SignalStack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)


def chosen(names: Sequence[str]) -> tuple[Peer, ...]:
    """Peers by name, in the order of `PEERS`; ``all`` is all of them.

    Raises:
        ValueError: an unknown name.
    """
    unknown = [name for name in names if name not in PEERS and name != "all"]
    if unknown:
        raise ValueError(f"unknown peer {unknown[0]!r}; there are {', '.join(PEERS)}, all")
    return tuple(peer for name, peer in PEERS.items() if name in names or "all" in names)


def installed(peers: Iterable[Peer]) -> tuple[list[Peer], list[str]]:
    """The peers that can run, and a sentence for each that can't."""
    found, missing = [], []
    for peer in peers:
        if peer.version is None:
            missing.append(peer.missing)
        else:
            found.append(peer)
    return found, missing


def open_all(
    peers: Sequence[Peer], graph: Graph, threads: int, batch: int = 1, examples: Array | None = None
) -> tuple[dict[str, Session], list[str]]:
    """A session of each peer by its name, and a sentence for each that can't run this Graph."""
    sessions, failures = {}, []
    for peer in peers:
        try:
            sessions[peer.name] = peer.session(graph, threads, batch, examples)
        except Exception as error:  # of the peer's own code: it is left out, and said so
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            failures.append(f"{peer.title} can't run this: {first}")
    return sessions, failures


def _fastest(sessions: Sequence[Session]) -> Session:
    """The one with the shortest run, from a few in turn; fewer where runs are long."""
    if len(sessions) == 1:
        return sessions[0]
    samples = [timed(session.run) for session in sessions]
    first = in_turn(samples, 1)
    more = in_turn(samples, 4 if max(first)[0] < _LONG else 1)
    seconds = [a + b for a, b in zip(first, more, strict=True)]
    return sessions[int(np.argmin([min(s) for s in seconds]))]


_LONG: Final = 0.5
"""Seconds."""

Opened = Callable[[onnx.ModelProto, int, Array], tuple[Run, Answer, str]]
"""Compiles a model for a number of threads, binds an input, and says what is worth a note."""


def _float32(opened: Opened, model: onnx.ModelProto, threads: int, examples: Array) -> Session:
    """The faster of the model with channels first and with channels last at its ends."""
    x = examples[: _dims(model.graph.input[0])[0]]
    return _fastest(_both_orders(opened, Quantized(model, None, None), threads, x, ""))


def _int8(opened: Opened, model: onnx.ModelProto, threads: int, examples: Array) -> list[Session]:
    """All forms: activations as uint8 and as int8, sums in 8 bits and in float32, channels first and last at the ends."""
    x = examples[: _dims(model.graph.input[0])[0]]
    sessions = []
    forms = [(False, True, "u8s8"), (True, True, "s8s8")]
    if any(node.op_type == "Add" for node in model.graph.node):
        forms.append((False, False, "u8s8, sums in float32"))
    for signed, sums, note in forms:
        sessions += _both_orders(opened, quantized(model, examples, signed, sums), threads, x, note)
    return sessions


def _computes_nothing(model: onnx.ModelProto) -> bool:
    """Whether it is the empty call's, which has nothing to quantize."""
    return [node.op_type for node in model.graph.node] == ["Identity"]


def _dims(value: onnx.ValueInfoProto) -> list[int]:
    return [d.dim_value for d in value.type.tensor_type.shape.dim]


def _both_orders(opened: Opened, found: Quantized, threads: int, x: Array, note: str) -> list[Session]:
    codes = found.input.encode(x) if found.input else x
    images = [len(_dims(end)) == 4 for end in (found.model.graph.input[0], found.model.graph.output[0])]
    sessions = []
    for last in (False, True) if any(images) else (False,):
        model = channels_last(found.model) if last else found.model
        given = codes.transpose(0, 2, 3, 1) if last and images[0] else codes
        run, call, more = opened(model, threads, np.ascontiguousarray(given))
        answer = _answer(found, call, last and images[0], last and images[1])
        order = "channels last" if last else "channels first"
        words = ", ".join(part for part in (note, order, more) if part)
        sessions.append(Session(run, answer, words, model.ByteSize()))
    return sessions


def _answer(found: Quantized, call: Answer, last_in: bool, last_out: bool) -> Answer:
    """`call` on codes in its own order, as an answer on float32 with channels first."""

    def answer(x: Array) -> Array:
        given = found.input.encode(x) if found.input else x
        y = call(np.ascontiguousarray(given.transpose(0, 2, 3, 1)) if last_in else given)
        y = found.output.decode(y) if found.output else y
        return y.transpose(0, 3, 1, 2) if last_out else y

    return answer


# --------------------------------------------------------------------------------------------- ONNX Runtime


def _ort(model: onnx.ModelProto, threads: int, x: Array) -> tuple[Run, Answer, str]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_ortvalue_input("input", onnxruntime.OrtValue.ortvalue_from_numpy(x))
    binding.bind_output("output")

    def run() -> None:
        session.run_with_iobinding(binding)

    return run, lambda x: session.run(None, {"input": x})[0], ""


def _ort_int8(model: onnx.ModelProto, threads: int, examples: Array) -> Session:
    if _computes_nothing(model):
        return _float32(_ort, model, threads, examples)
    return _fastest(_int8(_ort, model, threads, examples))


# --------------------------------------------------------------------------------------------- OpenVINO

_PRODUCTS: Final = frozenset({"Convolution", "FullyConnected", "MatMul"})


def _openvino(model: onnx.ModelProto, threads: int, x: Array) -> tuple[Run, Answer, str]:
    import openvino as ov

    run, answer, products = _compiled(ov.Core().read_model(model.SerializeToString()), threads, x)
    return run, answer, "" if x.dtype == np.float32 else products


def _openvino_int8(model: onnx.ModelProto, threads: int, examples: Array) -> Session:
    """The fastest of those of ONNX Runtime's quantization and that of NNCF, OpenVINO's own."""
    if _computes_nothing(model):
        return _float32(_openvino, model, threads, examples)
    return _fastest([*_int8(_openvino, model, threads, examples), _nncf(model, threads, examples)])


def _nncf(model: onnx.ModelProto, threads: int, examples: Array) -> Session:
    loggers = logging.getLoggerClass()
    import nncf
    import openvino as ov

    logging.setLoggerClass(loggers)  # NNCF puts its own in the place of everybody's
    batch = _dims(model.graph.input[0])[0]
    batches = np.split(examples, len(examples) // batch)
    nncf.set_log_level(logging.ERROR)
    with redirect_stdout(io.StringIO()):  # its progress bars
        small = nncf.quantize(
            ov.Core().read_model(model.SerializeToString()),
            nncf.Dataset(batches),
            preset=nncf.QuantizationPreset.PERFORMANCE,
            target_device=nncf.TargetDevice.CPU,
            subset_size=len(batches),
        )
    run, answer, products = _compiled(small, threads, batches[0])
    return Session(run, answer, f"NNCF {version('nncf')}, {products}")


def _compiled(model: Any, threads: int, x: Array) -> tuple[Run, Answer, str]:
    """An OpenVINO model for a number of threads; also how many of the products that OpenVINO made of it run in 8 bits."""
    import openvino as ov

    compiled = ov.Core().compile_model(
        model,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",  # or it takes bfloat16 where the CPU has it
        },
    )
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(x))

    def run() -> None:
        request.infer()

    def answer(x: Array) -> Array:
        return np.array(compiled.create_infer_request().infer({0: x})[0])

    info = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    products = [i["runtimePrecision"].astype(str) for i in info if i["layerType"].astype(str) in _PRODUCTS]
    small = sum(precision in ("i8", "u8") for precision in products)
    return run, answer, f"{small} of {len(products)} products in int8"


# --------------------------------------------------------------------------------------------- PyTorch


def _torch(model: onnx.ModelProto, threads: int, examples: Array) -> Session:
    from lowbit.train.torch_twin import open_twin

    return Session(*open_twin(model, threads, examples[: _dims(model.graph.input[0])[0]]))


PEERS: Final = {
    peer.name: peer
    for peer in (
        Peer("ort-fp32", "ONNX Runtime fp32", ("onnxruntime",), "bench", partial(_float32, _ort)),
        Peer("ort-int8", "ONNX Runtime int8", ("onnxruntime",), "bench", _ort_int8),
        Peer("openvino-fp32", "OpenVINO fp32", ("openvino",), "bench", partial(_float32, _openvino)),
        Peer("openvino-int8", "OpenVINO int8", ("openvino", "nncf", "onnxruntime"), "bench", _openvino_int8),
        Peer("torch", "PyTorch fp32", ("torch",), "train", _torch),
    )
}
"""Every peer, by name."""
