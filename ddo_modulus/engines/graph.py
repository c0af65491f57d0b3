# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs of a denoiser, for any size of the batch.

Axes: ``B`` batch, ``C`` channel, ``D`` channels of a condition, ``H W`` grid.

PyTorch's exporter makes both graphs from one trace (:mod:`.trace`). ``denoiser_vjp`` is
``(x, sigma, v[, condition]) -> (denoised, product)``. ``denoiser`` is the same graph without the
output ``product`` and everything that only this output needs. Inputs and outputs have names, and
each constant is stored once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common

from ddo_modulus.compat import valueless
from ddo_modulus.engines.trace import BATCH, Trace
from ddo_modulus.errors import InputError

#: Names of the graphs, and of their inputs and outputs.
DENOISER, VJP = "denoiser", "denoiser_vjp"
INPUTS = ("x", "sigma", "v", "condition")
OUTPUTS = ("denoised", "product")

OPSET = 18

# Constants of at most this size, mostly shapes, are computed at export and not by the engine.
_SMALL = 64

_FOLDED = {"Constant", "Cast", "Concat", "Identity", "Reshape", "Squeeze", "Unsqueeze"}


def to_onnx(traced: Trace) -> dict[str, ir.Model]:
    """The two graphs of a trace, by name.

    Raises:
        InputError: If an operation of the network has no ONNX form, or depends on the size of the
            batch in a way that a graph cannot express.
    """
    _, inputs = valueless([(BATCH, *t.shape[1:]) for t in traced.example])
    with torch.no_grad():
        program = torch.export.export(traced.module, tuple(inputs))
        try:
            converted = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False
            )
        except torch.onnx.OnnxExporterError as error:
            raise InputError(
                f"the operator cannot be exported: {_last_line(error)}; a network of matrix "
                "products, pointwise functions and normalisation can"
            ) from error
    assert converted is not None
    model = converted.model
    named = zip(model.graph.inputs, INPUTS, strict=False)
    for value, name in (*named, *zip(model.graph.outputs, OUTPUTS, strict=True)):
        value.name = name
    _fold(model)
    _open_batch(model)
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape(["batch", *value.shape[1:]])
    _tidy(model)
    plain = model.clone()
    plain.graph.outputs.pop()
    plain.graph.inputs.remove(next(v for v in plain.graph.inputs if v.name == "v"))
    _tidy(plain)
    plain.graph.name, model.graph.name = DENOISER, VJP
    return {DENOISER: plain, VJP: model}


def unsupported(model: ir.Model, traced: Trace) -> list[str]:
    """Operations that TensorRT does not support, with the modules that use them.

    They are compared with the published list of TensorRT's ONNX parser, with its types and the
    restrictions that matter for these graphs (``tensorrt_operators.json``, which names its source).
    """
    table = json.loads(files(__package__).joinpath("tensorrt_operators.json").read_text())
    types = {"FLOAT": "FP32", "FLOAT16": "FP16", "BFLOAT16": "BF16", "DOUBLE": "double"}
    found: Counter[str] = Counter()
    for node in model.graph:
        listed = table["operators"].get(node.op_type) if node.domain in ("", "ai.onnx") else None
        why = ""
        if listed is None:
            why = node.op_type
        elif node.op_type == "LayerNormalization" and len(node.outputs) > 1:
            why = f"{node.op_type} with more than one output"
        elif node.op_type.startswith("Scatter") and node.attributes.get("reduction"):
            why = f"{node.op_type} with a reduction"
        else:
            kinds = [types.get(v.dtype.name) for v in node.inputs if v is not None and v.dtype]
            bad = [k for k in kinds if k is not None and k not in listed.split()]
            why = f"{node.op_type} in {bad[0]}" if bad else ""
        if why:
            made = traced.makers(_target(node)) or ["the denoiser"]
            found[f"{why} (of {', '.join(made)})"] += 1
    low, high = table["opsets"]
    if not low <= model.opset_imports[""] <= high:
        found[f"opset {model.opset_imports['']}"] += 1
    return [f"{what} x {count}" for what, count in sorted(found.items())]


def _target(node: ir.Node) -> str:
    """The operation of the trace that a node comes from."""
    origin = node.metadata_props.get("pkg.torch.onnx.fx_node", "")
    return origin.partition("target=torch.ops.")[2].partition("]")[0].rpartition(".")[0]


def _last_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().split("\n")[0]


# ---- constants ----------------------------------------------------------------------------------


def _array(value: ir.Value | None) -> np.ndarray | None:
    """The array of a constant; None for other values."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def _constant(model: ir.Model, array: np.ndarray, name: str) -> ir.Value:
    """Add a constant to the graph."""
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.dtype = ir.Shape(array.shape), value.const_value.dtype  # type: ignore
    model.graph.initializers[name] = value
    return value


def _fold(model: ir.Model) -> None:
    """Replace operations on small constants, mostly shapes, by their results."""
    for node in list(model.graph):
        if node.op_type not in _FOLDED or len(node.outputs) != 1:
            continue
        arrays = [_array(v) for v in node.inputs]
        if any(a is None or a.size > _SMALL for a in arrays):
            continue
        result = _evaluate(node, arrays)  # type: ignore[arg-type]
        output = node.outputs[0]
        if result is None or output.is_graph_output():
            continue
        constant = _constant(model, result, f"{output.name}_value")
        output.replace_all_uses_with(constant)
        model.graph.remove(node, safe=True)


def _evaluate(node: ir.Node, arrays: Sequence[np.ndarray]) -> np.ndarray | None:
    attributes = node.attributes
    if node.op_type == "Constant":
        for name, kind in (("value_int", np.int64), ("value_ints", np.int64)):
            if name in attributes:
                return np.asarray(attributes[name].value, kind)
        for name in ("value_float", "value_floats"):
            if name in attributes:
                return np.asarray(attributes[name].value, np.float32)
        array = attributes["value"].as_tensor().numpy() if "value" in attributes else None
        return array if array is None or array.size <= _SMALL else None
    if node.op_type == "Cast":
        return arrays[0].astype(ir.DataType(attributes["to"].as_int()).numpy())
    if node.op_type == "Concat":
        return np.concatenate(arrays, attributes["axis"].as_int())
    if node.op_type == "Reshape":
        return arrays[0].reshape(arrays[1])
    if node.op_type == "Squeeze":
        return np.squeeze(arrays[0], tuple(arrays[1]) if len(arrays) > 1 else None)
    if node.op_type == "Unsqueeze":
        return np.expand_dims(arrays[0], tuple(arrays[1]))
    return arrays[0]


def _tidy(model: ir.Model) -> None:
    """Remove unused nodes and duplicates."""
    for step in (
        common.RemoveUnusedNodesPass(),
        common.CommonSubexpressionEliminationPass(),
        common.DeduplicateInitializersPass(size_limit=2**62),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
    ):
        step(model)


# ---- the batch ----------------------------------------------------------------------------------


def _open_batch(model: ir.Model) -> None:
    """Replace the prime number that the trace used as size of the batch by the size of the input.

    Raises:
        InputError: If the prime number remains somewhere.
    """
    size: dict[int, ir.Value] = {}
    graph = model.graph
    first = next(iter(graph))

    def batch(times: int) -> ir.Value:
        """A multiple of the size of the batch, as a tensor of one value."""
        if times not in size:
            node = ir.node("Shape", [graph.inputs[0]], {"start": 0, "end": 1})
            nodes = [node]
            if times != 1:
                factor = _constant(model, np.array([times]), f"times_{times}")
                nodes.append(ir.node("Mul", [node.outputs[0], factor]))
            graph.insert_before(first, nodes)
            size[times] = nodes[-1].outputs[0]
        return size[times]

    for node in list(graph):
        for i, value in enumerate(node.inputs):
            array = _array(value)
            if array is None or array.dtype != np.int64 or not _tagged(array).any():
                continue
            assert value is not None
            tagged = _tagged(array)
            name = f"{value.name}_open_{node.outputs[0].name}"
            if node.op_type == "Reshape" and tagged.sum() == 1:
                node.replace_input_with(i, _constant(model, np.where(tagged, -1, array), name))
            elif node.op_type == "Slice" and i == 2:
                ends = np.where(tagged, np.iinfo(np.int64).max, array)
                node.replace_input_with(i, _constant(model, ends, name))
            elif node.op_type in ("Expand", "ConstantOfShape"):
                parts = [
                    batch(int(n) // BATCH) if t else _constant(model, np.array([n]), f"{name}_{j}")
                    for j, (n, t) in enumerate(zip(array, tagged, strict=True))
                ]
                shape = ir.node("Concat", parts, {"axis": 0})
                graph.insert_before(node, shape)
                node.replace_input_with(i, shape.outputs[0])
            else:
                raise _dependent(node.op_type)
    for node in graph:
        for output in node.outputs:  # the engine infers shapes of intermediate values
            if not output.is_graph_output():
                output.shape = None
    for node in graph:
        for value in node.inputs:
            array = _array(value)
            if array is not None and (_any_tagged(array.shape) or _counts(array)):
                raise _dependent(node.op_type)


def _dependent(operation: str) -> InputError:
    return InputError(
        f"{operation} depends on the number of states computed together, which is not possible in "
        "an exported operator"
    )


def _tagged(array: np.ndarray) -> np.ndarray:
    return (array != 0) & (array % BATCH == 0)


def _any_tagged(shape: Sequence[int]) -> bool:
    return bool(_tagged(np.array(shape or [1])).any())


def _counts(array: np.ndarray) -> bool:
    """Whether a small constant is a multiple of the size of the batch, or one over a multiple."""
    if array.size > _SMALL or array.dtype.kind not in "iuf":
        return False
    value = np.abs(array.astype(np.float64).ravel())
    value = value[np.isfinite(value) & (value > 0)]
    times = np.concatenate([value, 1 / value]) / BATCH
    return bool(((np.abs(times - times.round()) < 1e-6) & (times > 0.5) & (times < 1000)).any())
