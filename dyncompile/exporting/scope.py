"""A graph of an ONNX model under construction, and the graphs inside of it."""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import fx

from dyncompile.graph import Spec

_SMALL = 1024
"""Bytes up to which a constant is written into every graph that reads it."""


class Constants:
    """Tensors of a model by content, and the graphs that read them."""

    def __init__(self) -> None:
        self.tensors: dict[bytes, ir.TensorProtocol] = {}
        self.readers: dict[bytes, list[Scope]] = {}
        self.values: dict[tuple[bytes, Scope], ir.Value] = {}
        self.names: dict[bytes, str] = {}

    def key(self, tensor: ir.TensorProtocol, name: str | None = None) -> bytes:
        """Register a tensor; two of equal content are one."""
        digest = hashlib.sha256(repr((tensor.dtype, tensor.shape)).encode())
        digest.update(tensor.tobytes())
        key = digest.digest()
        self.tensors.setdefault(key, tensor)
        if name:
            self.names.setdefault(key, name)
        return key


class Scope:
    """The nodes of a graph, made in order; what an inner graph reads of an outer one it captures by name.

    Attributes:
        values: The value of each node of the plan that is known here.
    """

    def __init__(self, parent: "Scope | None" = None, values: Mapping[fx.Node, ir.Value] | None = None) -> None:
        self.parent = parent
        self.nodes: dict[ir.Node, None] = {}
        self.values: dict[fx.Node, ir.Value] = dict(values or {})
        self.constants: Constants = parent.constants if parent else Constants()
        self.count: itertools.count[int] = parent.count if parent else itertools.count()
        self.depth: int = parent.depth + 1 if parent else 0
        self.inner: list[Scope] = []
        self.graph: ir.Graph | None = None
        if parent:
            parent.inner.append(self)

    def op(self, kind: str, *inputs: ir.Value | None, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node; its value, or its values where it has several."""
        values = [ir.Value(name=f"{kind.lower()}/{next(self.count)}") for _ in range(outputs)]
        self.add(ir.node(kind, inputs, attributes, outputs=values))
        return values[0] if outputs == 1 else values

    def add(self, node: ir.Node) -> None:
        """Add a node that was made elsewhere."""
        self.nodes[node] = None

    def constant(self, data: Any, dtype: Any = np.int64) -> ir.Value:
        """A constant array."""
        return self.tensor(ir.tensor(np.asarray(data, dtype)))

    def tensor(self, tensor: ir.TensorProtocol, name: str | None = None) -> ir.Value:
        """A constant, which will lie in the innermost graph that holds all its readers."""
        key = self.constants.key(tensor, name)
        found = self.constants.values.get((key, self))
        if found is None:
            found = _value(tensor)
            self.constants.values[key, self] = found
            self.constants.readers.setdefault(key, []).append(self)
        return found

    def nothing(self, found: Spec) -> ir.Value:
        """A value without rows."""
        shape = [0 if i == found.batch_dim else size for i, size in enumerate(found.shape)]
        return self.tensor(TorchTensor(torch.empty(shape, dtype=found.dtype)))

    def own(self, value: ir.Value) -> ir.Value:
        """A value that this graph makes itself, as its outputs have to be."""
        return value if value.producer() in self.nodes else self.op("Identity", value)

    def finish(self, name: str, outputs: Sequence[ir.Value], inputs: Sequence[ir.Value] = ()) -> ir.Graph:
        """The graph, with its constants still to be placed."""
        self.graph = ir.Graph(inputs, outputs, nodes=list(self.nodes), name=name, opset_imports={"": 20})
        return self.graph

    def place_constants(self) -> None:
        """Give every constant its graph: the innermost that holds all its readers; small ones each reader's own.

        onnxruntime blocks and packs only those weights of a convolution that lie in the convolution's own graph.
        """
        constants = self.constants
        graph = self.graph
        assert graph is not None
        used = {v.name or "" for v in (*graph.inputs, *graph.outputs)} | set(graph.initializers)
        for key, readers in constants.readers.items():
            tensor = constants.tensors[key]
            homes = set(readers) if tensor.nbytes <= _SMALL else {_common(readers)}
            for number, home in enumerate(sorted(homes, key=lambda s: s.depth)):
                plain = constants.names.get(key) or f"constant/{next(self.count)}"
                name = plain if number == 0 and plain not in used else f"{plain}/{next(self.count)}"
                used.add(name)
                value = constants.values.get((key, home))
                if value is None:
                    value = _value(tensor)
                value.name = name
                assert home.graph is not None
                home.graph.register_initializer(value)
                for reader in readers:
                    mine = constants.values[key, reader]
                    if reader is not home and reader not in homes:
                        ir.convenience.replace_all_uses_with(mine, value)


def _value(tensor: ir.TensorProtocol) -> ir.Value:
    kind = ir.TensorType(tensor.dtype)
    return ir.Value(name=None, shape=ir.Shape(tensor.shape.numpy()), type=kind, const_value=tensor)


def _common(scopes: Sequence[Scope]) -> Scope:
    """The innermost scope that holds all."""
    chains: list[list[Scope]] = []
    for scope in scopes:
        chain = [scope]
        while chain[-1].parent:
            chain.append(chain[-1].parent)
        chains.append(chain[::-1])
    shared = chains[0][0]
    for level in zip(*chains, strict=False):
        if any(s is not level[0] for s in level):
            break
        shared = level[0]
    return shared
