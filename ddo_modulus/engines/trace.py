# SPDX-License-Identifier: Apache-2.0
r"""A denoiser and its vector-Jacobian product as one graph of tensor operations.

Axes: ``B`` batch, ``C`` channel, ``D`` channels of a condition, ``H W`` grid.

Automatic differentiation runs on tensors without values, and its operations are recorded:
``(x, sigma, v[, condition]) -> (D, J^T v)``. The graph is then rewritten in operations that every
inference engine has and runs well:

* A constant matrix times a batch of fields becomes one broadcast product. (The tracer repeats the
  matrix for each member of the batch.)
* Reading from constant places, and writing to them, becomes a ``Gather`` with a constant index.
* Results that depend on constants alone are computed here. Views of constants are not, so that a
  matrix and its transpose are stored once.

Only the size of the batch may vary. It is recorded as a large prime, which divides no other size.
Where a multiple of that prime appears in the graph, the size of the input replaces it
(:mod:`.graph`); one that cannot be replaced is an error. Tests check other batch sizes; there is no
proof.

In half precision the network computes as it was trained, under autocast. The linear part, the
coordinates and all functions of sigma stay in single precision. Cotangents are divided by their
largest absolute value, state by state, before they enter the network, and multiplied by it
afterwards: at small noise levels they would underflow in fp16.
"""

from __future__ import annotations

import copy
import hashlib
import operator as python
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ddo_modulus.compat import OpOverload, core_decompositions, last_recorded, valueless
from ddo_modulus.diffusion.operator import DiffusionOperator
from ddo_modulus.engines.options import Precision

aten = torch.ops.aten

#: Stands for the size of the batch while it is recorded.
BATCH = 1_000_003

# Views of constants with more values than this stay operations of the graph.
_SMALL = 4096

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

_VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.expand.default,
    aten.unsqueeze.default,
}


@dataclass(frozen=True)
class Trace:
    """A recorded denoiser.

    Attributes:
        module: ``(x, sigma, v[, condition]) -> (D, J^T v)`` for a batch of :data:`BATCH`; in the
            metadata of its nodes, ``module`` is the path of the module that made them.
        example: Arguments, a batch of two.
        function: What was recorded, for any batch, as torch computes it.
    """

    module: fx.GraphModule
    example: tuple[Tensor, ...]
    function: Callable[..., tuple[Tensor, Tensor]]

    def makers(self, target: str) -> list[str]:
        """Modules that made the operations of a kind (``aten.mul``), or whose derivative did."""
        found = []
        for node in self.module.graph.nodes:
            if str(node.target).rpartition(".")[0] == target:  # whatever the overload
                own = node.meta.get("module")
                found.append(own if own is not None else f"derivative of {_origin(node)}")
        return sorted(set(found))


def trace(
    operator: DiffusionOperator,
    shape: tuple[int, int],
    condition_size: Sequence[int] | None = None,
    precision: Precision = "fp32",
) -> Trace:
    """Record a denoiser and its vector-Jacobian product.

    Args:
        operator: The denoiser; it is left as it is.
        shape: Grid ``(H, W)`` of the states.
        condition_size: Size of the condition of one state, ``(D,)`` or ``(D, H, W)``.
        precision: Of the network.
    """
    operator = copy.deepcopy(operator).float().cpu().eval().requires_grad_(False)
    sizes = [(operator.channels, *shape), (), (operator.channels, *shape)]
    if condition_size is not None:
        sizes.append(tuple(condition_size))
    example = tuple(torch.zeros(2, *size) for size in sizes)
    # Noise levels at which no network fades out.
    example[1].fill_(min(1.0, operator.network_sigma or 1.0))
    dtype = _DTYPES.get(precision)
    scaled = (lambda: _scaled(operator.network)) if dtype else nullcontext

    def record(
        x: Tensor, sigma: Tensor, v: Tensor, condition: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        half = torch.autocast("cpu", dtype, cache_enabled=False) if dtype else nullcontext()
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            with scaled(), half:  # derivatives follow the types of what they are of
                clean = operator(x, sigma, condition)
            return clean.detach(), torch.autograd.grad(clean, x, v)[0]

    record(*example)  # makes the constants that are made on first use, with their values
    mode, fakes = valueless([(BATCH, *size) for size in sizes])
    with ExitStack() as stack:
        stack.enter_context(_named(operator))
        stack.enter_context(mode)
        function = record if condition_size is not None else lambda x, sigma, v: record(x, sigma, v)
        module = make_fx(function, decomposition_table=_decompositions())(*fakes)
    _simplify(module)
    module.recompile()
    return Trace(module, example, record)


# ---- recording ----------------------------------------------------------------------------------


def _decompositions() -> dict[Any, Callable]:
    """The core of ATen, with derivatives as padding and normalisation as its formula."""
    return {
        **core_decompositions(),
        aten.slice_backward.default: _slice_backward,
        aten.native_layer_norm.default: _layer_norm,
    }


def _slice_backward(
    gradient: Tensor, sizes: Sequence[int], dim: int, start: int, end: int, step: int
) -> Tensor:
    """Zeros around what was cut out."""
    size, dim = sizes[dim], dim % len(sizes)
    start, end = (min(n + size if n < 0 else n, size) for n in (start, end))
    if (start, end, step) == (0, size, 1):
        return gradient
    if step != 1:
        return aten.slice_scatter.default(
            gradient.new_zeros(sizes), gradient, dim, start, end, step
        )
    around = [0, 0] * (gradient.ndim - dim - 1) + [start, size - end]
    return aten.constant_pad_nd.default(gradient, around, 0.0)


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivative needs mean and scale, which not every engine's own operator hands out."""
    dims = list(range(x.ndim - len(shape), x.ndim))
    wide = x.float()
    mean = wide.mean(dims, keepdim=True)
    deviation = wide - mean
    scale = torch.rsqrt((deviation * deviation).mean(dims, keepdim=True) + epsilon)
    y = deviation * scale
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y.to(x.dtype), mean, scale


@contextmanager
def _named(root: nn.Module) -> Iterator[None]:
    """Note in the metadata of recorded nodes which module made them."""
    starts: list[fx.Node] = []

    def enter(module: nn.Module, arguments: object) -> None:
        starts.append(last_recorded())

    def leave(path: str) -> Callable:
        def hook(module: nn.Module, arguments: object, result: object) -> None:
            node, end = starts.pop(), last_recorded()
            while node is not end:
                node = node.next
                node.meta.setdefault("module", path)

        return hook

    handles = []
    for path, module in root.named_modules():
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave(path or type(module).__name__)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Kept(Protocol):
    kept: list[Tensor]


class _Divided(torch.autograd.Function):
    """The identity; its cotangent goes on divided by its largest value, which is kept."""

    @staticmethod
    def forward(ctx: _Kept, y: Tensor, kept: list[Tensor]) -> Tensor:
        """Unchanged."""
        ctx.kept = kept
        return y.clone()

    @staticmethod
    def backward(ctx: _Kept, gradient: Tensor) -> tuple[Tensor, None]:
        """Of unit size."""
        largest = gradient.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-30)
        ctx.kept.append(largest)
        return gradient / largest, None


class _Multiplied(torch.autograd.Function):
    """The identity; its cotangent gets back the size that :class:`_Divided` took."""

    @staticmethod
    def forward(ctx: _Kept, x: Tensor, kept: list[Tensor]) -> Tensor:
        """Unchanged."""
        ctx.kept = kept
        return x.clone()

    @staticmethod
    def backward(ctx: _Kept, gradient: Tensor) -> tuple[Tensor, None]:
        """Of the size before."""
        return gradient * ctx.kept.pop(), None


@contextmanager
def _scaled(network: nn.Module) -> Iterator[None]:
    """Have cotangents of unit size within a network."""
    kept: list[Tensor] = []
    before = network.register_forward_pre_hook(
        lambda _, inputs: (_Multiplied.apply(inputs[0], kept), *inputs[1:])
    )
    after = network.register_forward_hook(lambda _, inputs, y: _Divided.apply(y.float(), kept))
    try:
        yield
    finally:
        before.remove()
        after.remove()


# ---- simplifying --------------------------------------------------------------------------------


class _Constants:
    """Constants of a graph module: each is stored once."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.graph = module, module.graph
        self._names: dict[tuple, str] = {}
        self._nodes: dict[str, fx.Node] = {}
        for node in list(self.graph.nodes):
            if node.op == "get_attr":
                node.replace_all_uses_with(self.node(self.value(node), node.meta))
                self.graph.erase_node(node)

    def value(self, node: fx.Node) -> Tensor:
        """The tensor that a node stands for."""
        return getattr(self.module, str(node.target))

    def node(self, value: Tensor, meta: dict[str, Any] | None = None) -> fx.Node:
        """The node of a tensor; one for all that are equal."""
        value = value.detach().contiguous()
        content = hashlib.sha256(value.flatten().view(torch.uint8).numpy().tobytes()).digest()
        name = self._names.setdefault(
            (value.dtype, value.shape, content), f"constant_{len(self._names)}"
        )
        if name in self._nodes:
            return self._nodes[name]
        self.module.register_buffer(name, value)
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            node = self.graph.get_attr(name)
        node.meta = {
            "val": value,
            **({"module": meta["module"]} if meta and "module" in meta else {}),
        }
        self._nodes[name] = node
        return node


def _simplify(module: fx.GraphModule) -> None:
    """Simplify a graph in place, as the module's docstring says."""
    graph, constants = module.graph, _Constants(module)
    for node in list(graph.nodes):
        if node.op != "call_function" or not node.users:
            continue
        new = _folded(node, constants) or _shortcut(node, graph) or _gathered(node, constants)
        new = new or _broadcast(node, graph)
        if new is not None:
            if new.op == "call_function" and "module" in node.meta:
                new.meta.setdefault("module", node.meta["module"])
            node.replace_all_uses_with(new)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    used = {node.target for node in graph.nodes if node.op == "get_attr"}
    for name in [*dict(module.named_buffers()), *dict(module.named_parameters())]:
        if name not in used:
            delattr(module, name)


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _arguments(node: fx.Node) -> list[Any]:
    return list(node.args)


def _call(
    graph: fx.Graph, before: fx.Node, target: OpOverload, *arguments: fx.node.Argument
) -> fx.Node:
    """A new call before a node, with the shape of what it gives."""
    with graph.inserting_before(before):
        node = graph.call_function(target, arguments)
    with torch.no_grad():
        values = fx.node.map_arg(arguments, lambda n: n.meta["val"].to("meta"))
        node.meta = {"val": target(*values)}
    if "module" in before.meta:
        node.meta["module"] = before.meta["module"]
    return node


def _folded(node: fx.Node, constants: _Constants) -> fx.Node | None:
    """The result of a node that depends on constants alone."""
    if any(n.op != "get_attr" for n in node.all_input_nodes) or node.kwargs.get("generator"):
        return None
    value = node.meta["val"]
    values = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(v, Tensor) for v in values):
        return None
    if any(size % BATCH == 0 and size for v in values for size in v.shape):
        return None
    if node.target in _VIEWS and values[0].numel() > _SMALL:
        return None
    compute: Any = node.target
    arguments = fx.node.map_arg(node.args, constants.value)
    keywords: dict[str, Any] = dict(fx.node.map_arg(node.kwargs, constants.value))
    with torch.no_grad():
        result = compute(*arguments, **keywords)
    if isinstance(result, Tensor):
        return constants.node(result, node.meta)
    for user in list(node.users):
        assert user.target is python.getitem
        user.replace_all_uses_with(constants.node(result[user.args[1]], node.meta))
        constants.graph.erase_node(user)
    return None


def _shortcut(node: fx.Node, graph: fx.Graph) -> fx.Node | None:
    """Nodes without effect are dropped; parts of a tensor become slices, not lists of tensors."""
    target: Any = node.target
    source, *rest = _arguments(node) or [None]
    if not isinstance(source, fx.Node):
        return None
    if target is python.getitem and source.target is aten.split_with_sizes.default:
        tensor, sizes, *dim = _arguments(source)
        start = sum(sizes[: rest[0]])
        end = start + sizes[rest[0]]
        return _call(graph, node, aten.slice.Tensor, tensor, dim[0] if dim else 0, start, end)
    if not all(isinstance(n.meta.get("val"), Tensor) for n in (node, source)):
        return None
    if target in (aten.alias.default, aten.detach.default, aten.clone.default):
        return source
    same = _shape(node) == _shape(source)
    if target in (aten.view.default, aten.expand.default, aten.slice.Tensor) and same:
        return source
    if target is aten._to_copy.default and node.meta["val"].dtype == source.meta["val"].dtype:
        return source
    if target is aten.view.default:  # as a reshape: strides may have changed
        while source.target in {aten.view.default, aten.reshape.default}:
            source = _arguments(source)[0]
        return _call(graph, node, aten.reshape.default, source, list(_shape(node)))
    return None


def _gathered(node: fx.Node, constants: _Constants) -> fx.Node | None:
    """Reads at constant places become ``index_select``; writes select from old and new values."""
    if node.target not in {aten.index.Tensor, aten.index_put.default}:
        return None
    graph, (source, indices, *rest) = constants.graph, _arguments(node)
    places = [i for i, index in enumerate(indices) if index is not None]
    if len(places) != 1 or indices[places[0]].op != "get_attr":
        return None
    dim = places[0]
    index = constants.value(indices[dim])
    if index.ndim != 1 or index.dtype == torch.bool or len(index.unique()) != len(index):
        return None
    if node.target is aten.index.Tensor:
        return _call(graph, node, aten.index_select.default, source, dim, constants.node(index))
    values, accumulate = rest[0], len(rest) > 1 and bool(rest[1])
    size, count = _shape(source)[dim], len(index)
    if _shape(values) != (*_shape(source)[:dim], count, *_shape(source)[dim + 1 :]):
        return None
    if accumulate:  # a sum; onto zeros, as in every derivative of taking, it is nothing else
        blank = source.target is aten.full.default and _arguments(source)[1] == 0
        if not blank:
            return None
    order = torch.arange(size)
    order[index] = size + torch.arange(count)
    if count == size:  # nothing of the source is left
        if torch.equal(order, size + torch.arange(size)):
            return values
        order, both = order - size, values
    else:
        both = _call(graph, node, aten.cat.default, [source, values], dim)
    return _call(graph, node, aten.index_select.default, both, dim, constants.node(order))


def _broadcast(node: fx.Node, graph: fx.Graph) -> fx.Node | None:
    """A product of a batch with a matrix that was repeated for it."""
    if node.target is not aten.bmm.default:
        return None
    factors = _arguments(node)
    repeated = [_repeated(factor) for factor in factors]
    if sum(r is not None for r in repeated) != 1:
        return None
    for i, found in enumerate(repeated):
        if found is not None:
            matrix, swapped = found
            order = [1, 0]
            factors[i] = (
                _call(graph, node, aten.permute.default, matrix, order) if swapped else matrix
            )
    return _call(graph, node, aten.matmul.default, *factors)


def _repeated(node: fx.Node) -> tuple[fx.Node, bool] | None:
    """The matrix that a batch of matrices consists of, and whether they are its transpose."""
    swapped = False
    while len(_shape(node)) > 2:
        source, *rest = _arguments(node) or [None]
        last = _shape(node)[-2:]
        if not isinstance(source, fx.Node) or len(_shape(source)) < 2:
            return None
        if node.target is aten.permute.default:
            order = list(range(len(_shape(node))))
            if list(rest[0]) != [*order[:-2], order[-1], order[-2]]:
                return None
            swapped, last = not swapped, last[::-1]
        elif node.target not in _VIEWS:
            return None
        if _shape(source)[-2:] != last:
            return None
        node = source
    return node, swapped


def _origin(node: fx.Node) -> str:
    """Module of the nearest node above that has one."""
    seen, row = {node}, [node]
    while row:
        above = [n for one in row for n in one.all_input_nodes if n not in seen]
        for n in above:
            if "module" in n.meta and n.op == "call_function":
                return str(n.meta["module"])
        seen.update(above)
        row = above
    return "the denoiser"
