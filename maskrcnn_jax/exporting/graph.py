"""A builder of ONNX graphs: operators are methods or Python's operators, arrays become constants of the file.

Values are NCHW inside the network, as ONNX's convolutions take them.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

OPSET = 17  # the first with LayerNormalization; RoiAlign has its present form since 16
IR_VERSION = 8  # of this opset


@dataclasses.dataclass(frozen=True)
class Value:
    """An array that the graph computes when it runs."""

    graph: "Graph"
    name: str

    def __add__(self, other: "Operand") -> "Value":
        return self.graph.op("Add", self, other)

    def __sub__(self, other: "Operand") -> "Value":
        return self.graph.op("Sub", self, other)

    def __mul__(self, other: "Operand") -> "Value":
        return self.graph.op("Mul", self, other)

    def __truediv__(self, other: "Operand") -> "Value":
        return self.graph.op("Div", self, other)

    def __floordiv__(self, other: "Operand") -> "Value":
        return self.graph.op("Div", self, other)  # ONNX divides integers without remainder

    def __mod__(self, other: "Operand") -> "Value":
        return self.graph.op("Mod", self, other)

    def __lt__(self, other: "Operand") -> "Value":  # type: ignore[misc]  # arrays are never on the left
        return self.graph.op("Less", self, other)

    def __gt__(self, other: "Operand") -> "Value":  # type: ignore[misc]
        return self.graph.op("Greater", self, other)

    def __ge__(self, other: "Operand") -> "Value":
        return self.graph.op("GreaterOrEqual", self, other)

    def __and__(self, other: "Operand") -> "Value":
        return self.graph.op("And", self, other)


# A number is a constant of no axes: int64 for whole ones, float32 for others.
Operand: TypeAlias = Value | np.ndarray | int | float


class Graph:
    """The operators and constants of a model, in the order in which they are added."""

    def __init__(self) -> None:
        self._prefix = ""
        self._nodes: list = []
        self._constants: list[TensorProto] = []
        self._inputs: list[ValueInfoProto] = []
        self._outputs: list[ValueInfoProto] = []

    def input(self, name: str, dtype: np.dtype | type, shape: Sequence[int | str]) -> Value:
        """Add an input; axes with a name may have any length."""
        self._inputs.append(_describe(name, dtype, shape))
        return Value(self, name)

    def output(self, name: str, value: Value, dtype: np.dtype | type, shape: Sequence[int | str]) -> None:
        """Give a value the name under which the model returns it."""
        self._nodes.append(helper.make_node("Identity", [value.name], [name]))
        self._outputs.append(_describe(name, dtype, shape))

    def op(self, operator: str, *inputs: Operand, **attributes: Any) -> Value:
        """Add an operator of one output and return it."""
        return self.ops(operator, 1, *inputs, **attributes)[0]

    def ops(self, operator: str, num_outputs: int, *inputs: Operand, **attributes: Any) -> list[Value]:
        """Add an operator of several outputs and return them."""
        node = f"{self._prefix}{operator}_{len(self._nodes)}"
        names = [node + (f"_{i}" if i else "") for i in range(num_outputs)]
        arguments = [(value if isinstance(value, Value) else self.constant(value)).name for value in inputs]
        self._nodes.append(helper.make_node(operator, arguments, names, node, **attributes))
        return [Value(self, name) for name in names]

    @contextlib.contextmanager
    def named(self, prefix: str) -> Iterator[None]:
        """Begin the names of the operators that are added meanwhile with a prefix."""
        self._prefix = prefix
        yield
        self._prefix = ""

    def constant(self, value: np.ndarray | int | float) -> Value:
        """Add a constant."""
        if not isinstance(value, np.ndarray):
            value = np.array(value, np.int64 if isinstance(value, int) else np.float32)
        name = f"constant_{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return Value(self, name)

    def reshape(self, value: Value, *shape: int) -> Value:
        """Reshape; 0 keeps the length of the axis, -1 takes what is left."""
        return self.op("Reshape", value, np.array(shape, np.int64))

    def transpose(self, value: Value, *axes: int) -> Value:
        """Reorder the axes."""
        return self.op("Transpose", value, perm=axes)

    def concat(self, values: Sequence[Operand], axis: int) -> Value:
        """Concatenate along an axis."""
        return self.op("Concat", *values, axis=axis)

    def cast(self, value: Value, dtype: np.dtype | type) -> Value:
        """Convert to another dtype."""
        return self.op("Cast", value, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def unsqueeze(self, value: Value, *axes: int) -> Value:
        """Add axes of length 1."""
        return self.op("Unsqueeze", value, np.array(axes, np.int64))

    def length(self, value: Value, axis: int) -> Value:
        """Return the length of an axis, int64 [1]."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def full(self, shape: Sequence[Value | int], fill: float) -> Value:
        """Return an array filled with a number; lengths are whole numbers or int64 [1]."""
        lengths = [np.array([n]) if isinstance(n, int) else n for n in shape]
        return self.op("ConstantOfShape", self.concat(lengths, 0), value=helper.make_tensor("", 1, [1], [fill]))

    def halves(self, value: Value) -> list[Value]:
        """Split the last axis, such as that of boxes, into two."""
        return self.ops("Split", 2, value, axis=-1)

    def take(self, value: Value, index: Value) -> Value:
        """Return value [B, index [B, K], ...], [B, K, ...]: other rows of each image."""
        return self.op("GatherND", value, self.unsqueeze(index, -1), batch_dims=1)

    def model(self, metadata: dict[str, str]) -> ModelProto:
        """Return the model, with metadata by name."""
        graph = helper.make_graph(self._nodes, "maskrcnn", self._inputs, self._outputs, self._constants)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="maskrcnn_jax",
        )
        helper.set_model_props(model, metadata)
        return model


def _describe(name: str, dtype: np.dtype | type, shape: Sequence[int | str]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
