"""A stand-in for CUDA graphs, for machines without a GPU.

While it records, no operation counts: what it computes is overwritten with NaN, as a GPU's memory would hold nothing
yet, changes in place are not made, and whatever would have to wait for the GPU raises. A replay runs the operations on
the same memory. So a value that Python has read too early, or that it has baked in, shows in the results.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
WAITING = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class FakeGraph:
    """torch.cuda.CUDAGraph, as far as GraphedFunction uses it."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad(), _disable_current_modes():
            for operation, arguments, options, results in self.operations:
                for result, new in zip(results, tensors(operation(*arguments, **options))):
                    result.copy_(new)


class Recording(TorchDispatchMode):
    """Notes operations in a graph instead of making them."""

    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func in WAITING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        if func._schema.is_mutable:
            self.graph.operations.append((func, args, options, []))
            names = [argument.name for argument in func._schema.arguments]
            given = {**dict(zip(names, args)), **options}
            written = [given[a.name] for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
            return written[0] if len(func._schema.returns) == 1 else tuple(written) if func._schema.returns else None
        result = func(*args, **options)  # for its shape, and its memory
        memory = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, options))}
        made = [x for x in tensors(result) if x.untyped_storage().data_ptr() not in memory or not x.numel()]
        for tensor in made:
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
        if made:
            self.graph.operations.append((func, args, options, tensors(result)))
        return result


class FakeStream:
    def wait_stream(self, other: object) -> None:
        pass


@contextlib.contextmanager
def fake_capture(graph: FakeGraph, stream: object = None) -> Iterator[None]:
    with Recording(graph):
        yield


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every tensor look as if it were on a GPU, to GraphedFunction."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for name, stand_in in {
        "CUDAGraph": FakeGraph,
        "graph": fake_capture,
        "Stream": FakeStream,
        "current_stream": FakeStream,
        "stream": lambda stream: contextlib.nullcontext(),
        "set_stream": lambda stream: None,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
