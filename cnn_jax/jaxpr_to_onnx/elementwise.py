"""Primitives that compute each element from the elements at the same place in their operands: the table `ELEMENTWISE`."""

import math
from collections.abc import Callable

import numpy as np

from cnn_jax.jaxpr_to_onnx.graph import Converter, Tensor, unsupported


def _elementwise(build: Callable[..., str]) -> Converter:
  """A converter for a function of each element.

  Args:
    build: maps the graph, the parameters and the operands, as `Graph.add` takes them, to the name of the result.
  """

  def convert(graph, params, operands, outputs):
    ((shape, dtype),) = outputs
    # The largest operand keeps its layout.
    layout = max((x for x in operands if x.data is None), key=lambda x: (x.rank, math.prod(x.shape))).layout
    values = [graph.operand(x, layout) for x in operands]
    return Tensor(shape, dtype, build(graph, params, *values), layout=layout)

  return convert


def _operator(*operators: str) -> Converter:
  """A converter that applies operators, the first to all operands and each other to the result before it."""

  def build(graph, params, *values):
    del params
    for operator in operators:
      values = (graph.add(operator, values),)
    return values[0]

  return _elementwise(build)


def _logical(operator: str) -> Converter:
  """A converter for an operator on truth values; JAX has the same primitives for the bits of integers."""

  def convert(graph, params, operands, outputs):
    if operands[0].dtype != np.bool_:
      raise unsupported(operator.lower(), 'it combines the bits of integers')
    return _operator(operator)(graph, params, operands, outputs)

  return convert


def _max(graph, params, a, b):
  del params
  fixed, x = (a, b) if isinstance(a, np.ndarray) else (b, a)
  if isinstance(fixed, np.ndarray) and fixed.dtype.kind == 'f':
    if np.all(fixed == -np.inf):
      return x
    if np.all(fixed == 0):
      return graph.add('Relu', [x])
  return graph.add('Max', [a, b])


def _integer_pow(graph, params, x):
  exponent = abs(params['y'])
  # By squaring, as XLA computes it.
  result, square = None, x
  while exponent:
    if exponent & 1:
      result = square if result is None else graph.add('Mul', [result, square])
    exponent >>= 1
    square = graph.add('Mul', [square, square]) if exponent else square
  if result is None:
    return graph.add('Pow', [x, np.float32(0)])
  return result if params['y'] > 0 else graph.add('Reciprocal', [result])


def _round(graph, params, x):
  if params['rounding_method'].name != 'TO_NEAREST_EVEN':
    raise unsupported('round', 'ONNX rounds halves to even numbers')
  return graph.add('Round', [x])


def _select_n(graph, params, operands, outputs):
  if operands[0].dtype != np.bool_:
    raise unsupported('select_n', 'it selects by an integer')

  def build(graph, params, which, if_false, if_true):
    del params
    return graph.add('Where', [which, if_true, if_false])

  return _elementwise(build)(graph, params, operands, outputs)


def _clamp(graph, params, low, x, high):
  del params
  return graph.add('Min', [graph.add('Max', [x, low]), high])


def _rem(graph, params, a, b):
  del params
  return graph.add('Mod', [a, b], fmod=1)  # the sign of the dividend, as in C


def _square(graph, params, x):
  del params
  return graph.add('Mul', [x, x])


def _exp2(graph, params, x):
  del params
  return graph.add('Pow', [np.float32(2), x])


def _expm1(graph, params, x):
  del params
  return graph.add('Sub', [graph.add('Exp', [x]), np.float32(1)])


def _log1p(graph, params, x):
  del params
  return graph.add('Log', [graph.add('Add', [x, np.float32(1)])])


def _erfc(graph, params, x):
  del params
  return graph.add('Sub', [np.float32(1), graph.add('Erf', [x])])


ELEMENTWISE: dict[str, Converter] = {
  'abs': _operator('Abs'),
  'add': _operator('Add'),
  'add_any': _operator('Add'),
  'and': _logical('And'),
  'ceil': _operator('Ceil'),
  'clamp': _elementwise(_clamp),
  'cos': _operator('Cos'),
  'div': _operator('Div'),
  'eq': _operator('Equal'),
  'erf': _operator('Erf'),
  'erfc': _elementwise(_erfc),
  'exp': _operator('Exp'),
  'exp2': _elementwise(_exp2),
  'expm1': _elementwise(_expm1),
  'floor': _operator('Floor'),
  'ge': _operator('GreaterOrEqual'),
  'gt': _operator('Greater'),
  'integer_pow': _elementwise(_integer_pow),
  'le': _operator('LessOrEqual'),
  'log': _operator('Log'),
  'log1p': _elementwise(_log1p),
  'logistic': _operator('Sigmoid'),
  'lt': _operator('Less'),
  'max': _elementwise(_max),
  'min': _operator('Min'),
  'mul': _operator('Mul'),
  'ne': _operator('Equal', 'Not'),
  'neg': _operator('Neg'),
  'not': _logical('Not'),
  'or': _logical('Or'),
  'pow': _operator('Pow'),
  'rem': _elementwise(_rem),
  'round': _elementwise(_round),
  'rsqrt': _operator('Sqrt', 'Reciprocal'),
  'select_n': _select_n,
  'sign': _operator('Sign'),
  'sin': _operator('Sin'),
  'sqrt': _operator('Sqrt'),
  'square': _elementwise(_square),
  'sub': _operator('Sub'),
  'tan': _operator('Tan'),
  'tanh': _operator('Tanh'),
  'xor': _logical('Xor'),
}
