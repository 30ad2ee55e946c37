"""Graph <-> file. The format is docs/FORMAT.md, on one page: a safetensors file with one metadata key.

Same Graph, same bytes. Parsing is left to the safetensors library and to json; every rule has a named error, and whatever the
file says is checked by `Graph.validate` before anything runs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors
import safetensors.numpy

from lowbit.bits import Codes, pack, packed_size, unpack
from lowbit.files import write_atomic
from lowbit.graph import ROLES, Graph, GraphError, Node, Tensor

FORMAT: Final = 1
KEY: Final = "lowbit"


class FileError(ValueError):
    """A file that can't be read or written as a .lowbit file. The message names the file and the reason."""


def save(graph: Graph, path: str | os.PathLike[str]) -> int:
    """Write `graph` to `path`; returns the number of bytes. The file appears whole or not at all.

    Raises:
        GraphError: the graph breaks a rule.
        FileError: the file can't be written.
    """
    data = dumps(graph)
    try:
        write_atomic(path, data)
    except OSError as e:
        raise FileError(f"{os.fspath(path)}: can't be written: {e.strerror or e}") from None
    return len(data)


def dumps(graph: Graph) -> bytes:
    """The bytes of `graph`'s file."""
    graph.validate()
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for name in sorted(graph.tensors):
        t = graph.tensors[name]
        tensors[name] = t.data if t.codes is None else pack(t.codes.index(t.data), t.codes.bits)
    description = {
        "nodes": [_node_to_json(n, before) for n, before in zip(graph.nodes, (None, *graph.nodes), strict=False)],
        "tensors": {name: _codes_to_json(t) for name, t in graph.tensors.items() if t.codes is not None},
        "meta": dict(graph.meta),
    }
    try:
        canonical = _canonical(description)
    except (TypeError, ValueError) as e:
        raise GraphError(f"meta or an attribute is not plain JSON: {e}") from None
    header = _canonical({"format": FORMAT, "graph": description, "sha256": _checksum(canonical, tensors)})
    return safetensors.numpy.save(tensors, metadata={KEY: header})


def read(path: str | os.PathLike[str]) -> Graph:
    """Read the Graph in the file `path`, or of the network of the zoo that is called so; checked whole.

    Raises:
        FileError: no such file or network, not a lowbit file, a newer format, damaged, or a Graph that breaks a rule.
    """
    from lowbit.zoo import locate  # which needs FileError

    name = os.fspath(locate(path))
    if Path(name).is_dir():
        raise FileError(f"{name}: is a folder, not a .lowbit file (a run's file is RUN/model.lowbit)")
    if not Path(name).is_file():
        raise FileError(f"{name}: no such file")
    try:
        with safetensors.safe_open(name, framework="numpy") as f:
            metadata = f.metadata() or {}
            tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    except OSError as e:
        raise FileError(f"{name}: can't be read: {e.strerror or e}") from None
    except Exception as e:  # safetensors raises its own and plain exceptions for a damaged container
        raise FileError(f"{name}: not a lowbit file, or a damaged one: {e}") from None
    try:
        return _decode(metadata, tensors)
    except (GraphError, FileError) as e:
        raise FileError(f"{name}: {e}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as e:
        raise FileError(f"{name}: its description is not a Graph: {type(e).__name__}: {e}") from None


def _decode(metadata: Mapping[str, str], tensors: Mapping[str, Any]) -> Graph:
    if set(metadata) != {KEY}:
        raise FileError("not a lowbit file: the metadata has no key 'lowbit', or others beside it")
    header = json.loads(metadata[KEY])
    if header["format"] != FORMAT:
        raise FileError(
            f"has format {header['format']!r}; this version of lowbit reads format {FORMAT}: upgrade lowbit"
        )
    if set(header) != {"format", "graph", "sha256"} or set(header["graph"]) != {"nodes", "tensors", "meta"}:
        raise FileError("its description has unknown or missing keys")
    description = header["graph"]
    if header["sha256"] != _checksum(_canonical(description), tensors):
        raise FileError("damaged: the checksum does not match its content")
    nodes: list[Node] = []
    for node in description["nodes"]:
        nodes.append(_node_from_json(node, nodes[-1] if nodes else None))
    coded = description["tensors"]
    if not set(coded) <= set(tensors):
        raise FileError("describes a tensor that it does not hold")
    constants: dict[str, Tensor] = {}
    for name, data in tensors.items():
        if name in coded:
            constants[name] = _tensor_from_json(name, coded[name], data)
        elif data.dtype != np.float32:
            raise FileError(f"the tensor {name!r} is {data.dtype}, neither float32 nor described as codes")
        else:
            constants[name] = Tensor(data)
    graph = Graph(tuple(nodes), constants, description["meta"])
    graph.validate()
    return graph


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _checksum(canonical: str, tensors: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(canonical.encode())
    for name in sorted(tensors):
        data = np.ascontiguousarray(tensors[name])
        little_endian = data.astype(data.dtype.newbyteorder("<"), copy=False)
        digest.update(_canonical([name, str(data.dtype), list(data.shape)]).encode())
        digest.update(little_endian.tobytes())
    return digest.hexdigest()


def _usual(op: str, name: str, inputs: Sequence[str]) -> dict[str, str]:
    """The constants of a node under their usual names, which the file leaves out."""
    role = ROLES.get(op)
    return {} if role is None or len(inputs) != 1 else {role: f"{name}.{role}"}


def _node_to_json(node: Node, before: Node | None) -> dict[str, Any]:
    out: dict[str, Any] = {"op": node.op, "name": node.name}
    if list(node.inputs) != ([before.name] if before else []):
        out["inputs"] = list(node.inputs)
    if dict(node.params) != _usual(node.op, node.name, node.inputs):
        out["params"] = dict(node.params)
    if node.attrs:
        out["attrs"] = dict(node.attrs)
    return out


def _node_from_json(value: dict[str, Any], before: Node | None) -> Node:
    if not {"op", "name"} <= set(value) <= {"op", "name", "inputs", "params", "attrs"}:
        raise FileError(f"a node has the wrong keys: {sorted(value)}")
    attrs = {key: _tuples(item) for key, item in value.get("attrs", {}).items()}
    op, name = value["op"], value["name"]
    inputs = value.get("inputs", [before.name] if before else [])
    params = value.get("params", _usual(op, name, inputs))
    if not all(isinstance(text, str) for text in [op, name, *inputs, *params.values()]):
        raise FileError("a node has a name that is no string")
    return Node(op, name, tuple(inputs), params, attrs)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _codes_to_json(t: Tensor) -> dict[str, Any]:
    assert t.codes is not None
    out: dict[str, Any] = {"kind": t.codes.kind, "bits": t.codes.bits, "shape": list(t.data.shape)}
    if t.codes.table:
        out["table"] = list(t.codes.table)
    return out


def _tensor_from_json(name: str, value: dict[str, Any], data: Any) -> Tensor:
    if not {"kind", "bits", "shape"} <= set(value) <= {"kind", "bits", "shape", "table"}:
        raise FileError(f"the tensor {name!r} has the wrong keys: {sorted(value)}")
    shape = value["shape"]
    if not isinstance(shape, list) or any(type(s) is not int or s < 1 for s in shape):
        raise FileError(f"the tensor {name!r} has the shape {shape!r}")
    table = tuple(value.get("table", ()))
    if any(type(v) is not int for v in table):
        raise FileError(f"the tensor {name!r} has a table of other things than integers")
    codes = Codes(value["kind"], value["bits"], table=table)
    size = 1
    for s in shape:
        size *= s
    if data.dtype != np.uint8 or data.ndim != 1 or data.size != packed_size(size, codes.bits):
        raise FileError(f"the tensor {name!r} does not hold {size} codes of {codes.bits} bits")
    return Tensor(codes.values.take(unpack(data, codes.bits, size), mode="clip").reshape(shape), codes)
