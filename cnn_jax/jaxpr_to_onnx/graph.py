"""An ONNX graph under construction: tensors with a memory layout, nodes and constants."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cnn_jax import UsageError, __version__
from cnn_jax.jaxpr_to_onnx.simplify import Node, simplify

# The size of the batch while JAX traces. A product of smaller lengths is never a multiple of a prime.
BATCH = 1_000_003
_OPSET = 17


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A JAX array as a value of the graph, or a constant.

  Attributes:
    shape: of the JAX array.
    dtype: of the JAX array.
    name: of the ONNX value; empty for constants.
    data: the constant, of the rank of `shape`; an axis of length 1 stands for any length. None if it is not constant.
    layout: axis `i` of the ONNX value is axis `layout[i]` of the JAX array; unused for constants. ONNX has the channels
      of images first and JAX has them last, so transposing is put off until an operator needs another layout.
    reshaped: the tensor that this one is a reshape of, if it is one.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  name: str = ''
  data: np.ndarray | None = None
  layout: tuple[int, ...] = ()
  reshaped: 'Tensor | None' = None

  @property
  def stored_shape(self) -> tuple[int, ...]:
    """The shape of the ONNX value."""
    return tuple(self.shape[axis] for axis in self.layout)

  @property
  def value_layout(self) -> tuple[int, ...]:
    """The layout in which `Graph.value` gives the tensor."""
    return self.layout if self.data is None else tuple(range(self.rank))

  @property
  def rank(self) -> int:
    return len(self.shape)


def constant(value: Any, dtype: Any = None) -> Tensor:
  """A constant tensor.

  Args:
    value: a number or an array.
    dtype: converts it; None keeps its dtype.
  """
  data = np.asarray(value, dtype)
  return Tensor(data.shape, data.dtype, data=data)


def is_batch(size: int) -> bool:
  """Whether an axis of this length is the batch, alone or merged with others."""
  return size > 0 and size % BATCH == 0


def check_axes(primitive: str, shape: Sequence[int], axes: Sequence[int]) -> None:
  """Checks that a primitive leaves the images of a batch apart.

  Args:
    primitive: its name.
    shape: of its operand.
    axes: that it combines, or selects from.

  Raises:
    UsageError: the batch is among them.
  """
  if any(is_batch(shape[axis]) for axis in axes):
    raise unsupported(primitive, 'it combines or selects images of a batch')


def unsupported(primitive: str, reason: str = 'it has no equivalent in the table of operators') -> UsageError:
  """The error for a primitive that cannot be converted."""
  return UsageError(
    f'the network uses the JAX primitive {primitive}, which cannot be written as ONNX: {reason}; '
    'export it as .stablehlo instead.'
  )


# Maps the graph, the parameters of a JAX equation, its operands, and the shapes and dtypes of its results to the results.
Converter = Callable[['Graph', Any, list[Tensor], list[tuple[tuple[int, ...], np.dtype]]], Any]


class Graph:
  """Nodes in the order of execution.

  Attributes:
    scope: a prefix for the names of the nodes that are added next, such as `block1/conv1`.
  """

  def __init__(self, input_name: str):
    self.scope = ''
    self.nodes: list[Node] = []
    self._input = input_name
    self._constants: dict[str, np.ndarray] = {}
    self._names: dict[str, int] = {input_name: 1}
    self._transposed: dict[tuple[str, tuple[int, ...]], str] = {}
    self._batch = ''

  def add(self, operator: str, inputs: Sequence[Any], num_outputs: int = 1, **attributes: Any) -> Any:
    """Adds a node and returns the name of its output, or a list of names if `num_outputs` is not 1.

    Args:
      operator: of ONNX.
      inputs: names of values; arrays become constants.
      num_outputs: of the operator.
      attributes: of the operator.
    """
    name = self._unique('/'.join(filter(None, (self.scope, operator))))
    names = [
      value if isinstance(value, str) else self._constant(f'{name}:{i}', value) for i, value in enumerate(inputs)
    ]
    outputs = [name, *(self._unique(f'{name}.{i}') for i in range(1, num_outputs))]
    self.nodes.append(Node(operator, names, outputs, attributes))
    return name if num_outputs == 1 else outputs

  def value(self, tensor: Tensor, layout: Sequence[int] | None = None) -> str:
    """The name of a tensor's ONNX value at its full shape.

    Args:
      tensor: a constant is added to the graph.
      layout: transposes the value if it has another one; None keeps its own, which is that of JAX for constants.
    """
    if tensor.data is None:
      return self._transpose(tensor, tuple(layout if layout is not None else tensor.layout))
    layout = tuple(layout if layout is not None else range(tensor.rank))
    shape = tuple(tensor.shape[axis] for axis in layout)
    data = tensor.data.transpose(layout)
    if any(map(is_batch, shape)):
      return self.add('Expand', [data, self.runtime_shape(shape)])
    return self._constant('/'.join(filter(None, (self.scope, 'constant'))), np.broadcast_to(data, shape))

  def expanded(self, tensor: Tensor) -> Tensor:
    """A tensor as a value of the graph; a constant is repeated to its full shape."""
    if tensor.data is None:
      return tensor
    return Tensor(tensor.shape, tensor.dtype, self.value(tensor), layout=tensor.value_layout)

  def operand(self, tensor: Tensor, layout: Sequence[int]) -> Any:
    """What an elementwise operator takes for a tensor; axes of length 1 are left for the operator to broadcast."""
    if tensor.data is None:
      return self._transpose(tensor, tuple(layout))
    return tensor.data.transpose(layout) if tensor.rank else tensor.data

  def runtime_shape(self, shape: Sequence[int]) -> Any:
    """A shape as an input of an operator: a constant, or computed from the size of the batch."""
    if not any(map(is_batch, shape)):
      return np.array(shape, np.int64)
    if not self._batch:
      # The images themselves go into the Cast alone, because TensorRT allows no other operator on uint8.
      first = self.nodes[0] if self.nodes else None
      cast = first is not None and first.operator == 'Cast' and first.inputs == [self._input]
      self._batch = self.add('Shape', [first.outputs[0] if first and cast else self._input], start=0, end=1)
    parts: list[Any] = []
    for size in shape:
      if not is_batch(size):
        parts.append(np.array([size], np.int64))
      elif size == BATCH:
        parts.append(self._batch)
      else:
        parts.append(self.add('Mul', [self._batch, np.array([size // BATCH], np.int64)]))
    return self.add('Concat', parts, axis=0)

  def model(self, images: Tensor, result: Tensor, output_name: str) -> Any:
    """The simplified graph as a checked `onnx.ModelProto` with one input and one output.

    Args:
      images: the input.
      result: the output.
      output_name: names the output.
    """
    import onnx
    from onnx import helper, numpy_helper

    name = self.value(result, range(result.rank))
    if name not in {output for node in self.nodes for output in node.outputs}:
      name = self.add('Identity', [name])
    nodes, constants = simplify(self.nodes, self._constants, name, output_name)

    def information(name, tensor):
      shape = ['batch' if size == BATCH else size for size in tensor.shape]
      return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(tensor.dtype), shape)

    opsets = [helper.make_opsetid('', _OPSET)]
    model = helper.make_model(
      helper.make_graph(
        [helper.make_node(n.operator, n.inputs, n.outputs, name=n.outputs[0], **n.attributes) for n in nodes],
        'cnn_jax',
        [information(self._input, images)],
        [information(output_name, result)],
        [numpy_helper.from_array(np.ascontiguousarray(v), name) for name, v in constants.items()],
      ),
      opset_imports=opsets,
      ir_version=helper.find_min_ir_version_for(opsets),  # older runtimes do not read the newest one
      producer_name='cnn_jax',
      producer_version=__version__,
    )
    onnx.checker.check_model(model, full_check=True)
    return model

  def _unique(self, name: str) -> str:
    count = self._names[name] = self._names.get(name, 0) + 1
    return name if count == 1 else self._unique(f'{name}_{count}')

  def _constant(self, name: str, value: Any) -> str:
    name = self._unique(name)
    self._constants[name] = np.asarray(value)
    return name

  def _transpose(self, tensor: Tensor, layout: tuple[int, ...]) -> str:
    if layout == tensor.layout:
      return tensor.name
    key = tensor.name, layout
    if key not in self._transposed:
      order = [tensor.layout.index(axis) for axis in layout]
      moved = [axis for axis in order if tensor.stored_shape[axis] != 1]
      if moved == sorted(moved):  # only axes of length 1 move, so the numbers stay where they are
        shape = reshape_target(tensor.stored_shape, [tensor.shape[axis] for axis in layout])
        self._transposed[key] = self.add('Reshape', [tensor.name, shape])
      else:
        self._transposed[key] = self.add('Transpose', [tensor.name], perm=order)
    return self._transposed[key]


def reshape_target(shape: Sequence[int], new_shape: Sequence[int]) -> np.ndarray:
  """The shape input of an ONNX Reshape, whatever the size of the batch.

  Args:
    shape: of the value.
    new_shape: the same number of elements; at most one axis is the batch.
  """
  target = []
  for i, size in enumerate(new_shape):
    copied = i < len(shape) and shape[i] == size  # 0 copies a length and, unlike -1, allows an empty batch
    target.append((0 if copied else -1) if is_batch(size) else size)
  assert math.prod(shape) == math.prod(new_shape), (shape, new_shape)
  return np.array(target, np.int64)
