"""Converts a JAX function of a batch of images to an ONNX graph, without any description of the network.

`convert` traces the function to a jaxpr, inlines the functions that it calls, computes whatever does not depend on the
images, and maps each of the remaining primitives to ONNX operators by `TABLE`. A primitive that
is not in the table raises a `UsageError` that names it.

The batch can have any size, although JAX is given one: the prime `graph.BATCH`, which is larger than any other length.
An axis is the batch, possibly merged with others, if and only if its length is a multiple of that prime. No operator
may combine images, and no shape in the graph contains the prime.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from cnn_jax.jaxpr_to_onnx.elementwise import ELEMENTWISE
from cnn_jax.jaxpr_to_onnx.graph import BATCH, Converter, Graph, Tensor, constant, is_batch, unsupported
from cnn_jax.jaxpr_to_onnx.shapes import SHAPES
from cnn_jax.jaxpr_to_onnx.sums import SUMS

# The primitives that can be converted. For another one, add a line to one of the three tables and a case to the tests.
TABLE: dict[str, Converter] = {**ELEMENTWISE, **SHAPES, **SUMS}

_CALLS = {
  'checkpoint',
  'closed_call',
  'core_call',
  'custom_jvp_call',
  'custom_vjp_call',
  'custom_vjp_call_jaxpr',
  'jit',
  'pjit',
  'remat2',
}


def convert(
  function: Callable[[Any], Any],
  shape: Sequence[int],
  dtype: Any = np.uint8,
  input_name: str = 'images',
  output_name: str = 'probabilities',
) -> Any:
  """Converts a function to an `onnx.ModelProto`; needs the package `onnx`.

  Args:
    function: maps an array (batch, *shape) to an array (batch, ...); each row must depend on its image alone.
    shape: of one image, for example (height, width, channels).
    dtype: of the images.
    input_name: names the input of the graph.
    output_name: names the output of the graph.

  Raises:
    UsageError: the function uses a primitive that the table lacks, or combines images.
  """
  program = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((BATCH, *shape), dtype))
  graph = Graph(input_name)
  images = Tensor((BATCH, *shape), np.dtype(dtype), input_name, layout=tuple(range(1 + len(shape))))
  (result,) = _convert_jaxpr(graph, program.jaxpr, [constant(value) for value in program.consts], [images], '')
  return graph.model(images, result, output_name)


def _convert_jaxpr(graph: Graph, jaxpr: Any, consts: Sequence[Tensor], inputs: Sequence[Tensor], scope: str) -> list:
  """Adds the nodes of a jaxpr to the graph and returns its outputs."""
  values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

  def read(atom):
    if not isinstance(atom, core.Literal):
      return values[atom]
    abstract: Any = atom.aval
    return constant(atom.val, abstract.dtype)

  for equation in _needed(jaxpr):
    # JAX records the layer of each equation, relative to the function that contains it.
    graph.scope = '/'.join(filter(None, (scope, str(equation.source_info.name_stack))))
    outputs = _convert_equation(graph, equation, [read(atom) for atom in equation.invars])
    values.update(zip(equation.outvars, outputs, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _convert_equation(graph: Graph, equation: Any, operands: list[Tensor]) -> list[Tensor]:
  name, params = equation.primitive.name, equation.params
  if name in _CALLS:
    inner = next(params[key] for key in ('jaxpr', 'call_jaxpr', 'fun_jaxpr') if key in params)
    return _inline(graph, inner, operands)
  if name == 'platform_index':  # `lax.platform_dependent` has one default, the branch of stock operations
    return [constant(np.int32(params['platforms'].index(None)))]
  if name == 'cond':
    index, *rest = operands
    if index.data is None:
      raise unsupported('cond', 'its condition depends on the images')
    branch = min(max(int(index.data), 0), len(params['branches']) - 1)
    return _inline(graph, params['branches'][branch], rest)
  outputs = [(tuple(out.aval.shape), np.dtype(out.aval.dtype)) for out in equation.outvars]
  if any(sum(map(is_batch, shape)) > 1 or BATCH**2 in shape for shape, _ in outputs):
    raise unsupported(name, 'it combines images of a batch')
  folded = _fold(equation, operands, outputs)
  if folded is not None:
    return folded
  if name not in TABLE:
    raise unsupported(name)
  if name not in ELEMENTWISE and name != 'broadcast_in_dim':
    operands = [graph.expanded(x) if _has_batch(x.shape) else x for x in operands]
  result = TABLE[name](graph, params, operands, outputs)
  return result if isinstance(result, list) else [result]


def _inline(graph: Graph, inner: Any, operands: list[Tensor]) -> list[Tensor]:
  # The jaxpr of some primitives is closed, that is with its constants, and that of others is not.
  jaxpr, consts = getattr(inner, 'jaxpr', inner), getattr(inner, 'consts', ())
  return _convert_jaxpr(graph, jaxpr, [constant(value) for value in consts], operands, graph.scope)


def _fold(equation: Any, operands: list[Tensor], outputs: list) -> list[Tensor] | None:
  """Computes an equation of constants; None if it depends on the images or on their number."""
  name = equation.primitive.name
  arrays = [operand.data for operand in operands if operand.data is not None]
  # `broadcast_in_dim` leaves constants small, for the operators after it to repeat.
  if len(arrays) < len(operands) or name == 'broadcast_in_dim' or any(map(_is_jaxpr, equation.params.values())):
    return None
  if name in ELEMENTWISE:
    # Axes of length one stand for longer ones, the batch among them; scalars stay scalars.
    shape = np.broadcast_shapes(*(array.shape for array in arrays))
    arrays = [array if array.ndim == 0 else np.broadcast_to(array, shape) for array in arrays]
  elif any(_has_batch(shape) for shape in (*(x.shape for x in operands), *(shape for shape, _ in outputs))):
    if not operands:
      raise unsupported(name, 'its result depends on the size of the batch')
    return None
  else:
    arrays = [np.broadcast_to(array, operand.shape) for array, operand in zip(arrays, operands, strict=True)]
  values = equation.primitive.bind(*arrays, **equation.params)
  values = values if equation.primitive.multiple_results else [values]
  return [Tensor(shape, dtype, data=np.asarray(value)) for value, (shape, dtype) in zip(values, outputs, strict=True)]


def _has_batch(shape: Sequence[int]) -> bool:
  return any(map(is_batch, shape))


def _is_jaxpr(value: Any) -> bool:
  return hasattr(value, 'eqns')


def _needed(jaxpr: Any) -> list[Any]:
  """The equations that the outputs depend on, in order."""
  needed = {atom for atom in jaxpr.outvars if not isinstance(atom, core.Literal)}
  equations = []
  for equation in reversed(jaxpr.eqns):
    if needed.intersection(equation.outvars):
      needed.update(atom for atom in equation.invars if not isinstance(atom, core.Literal))
      equations.append(equation)
  return equations[::-1]
