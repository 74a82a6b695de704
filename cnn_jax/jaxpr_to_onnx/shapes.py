"""Primitives that move elements, or change their type: the table `SHAPES`."""

import math
from collections.abc import Sequence

import numpy as np

from cnn_jax.jaxpr_to_onnx.graph import Converter, Tensor, check_axes, reshape_target, unsupported


def _reshape(graph, params, operands, outputs):
  """Reshapes in the layout of the operand if no group of axes that are merged or split is scattered in it."""
  del params
  (x,), ((shape, dtype),) = operands, outputs
  layout, new_layout = x.value_layout, tuple(range(len(shape)))
  kept = _layout_after_reshape(x.shape, shape, layout)
  if kept is None:
    layout = tuple(range(x.rank))
  else:
    new_layout = kept
  before, after = [x.shape[axis] for axis in layout], [shape[axis] for axis in new_layout]
  name = graph.value(x, layout)
  if before != after:
    name = graph.add('Reshape', [name, reshape_target(before, after)])
  return Tensor(shape, dtype, name, layout=new_layout, reshaped=x)


def _layout_after_reshape(
  shape: Sequence[int], new_shape: Sequence[int], layout: Sequence[int]
) -> tuple[int, ...] | None:
  """The layout of a reshaped value whose elements stay in their order, or None if there is none."""
  layout_after: list[int] = []
  position = 0
  group_of = {axis: group for group in match_axes(shape, new_shape) for axis in group[0]}
  while position < len(layout):
    axes, new_axes = group_of[layout[position]]
    if list(layout[position : position + len(axes)]) != axes:
      return None
    layout_after += new_axes
    position += len(axes)
  return tuple(layout_after)


def match_axes(shape: Sequence[int], new_shape: Sequence[int]) -> list[tuple[list[int], list[int]]]:
  """The axes before and after a reshape in the smallest groups of equal products, each with an axis on both sides."""
  groups: list[tuple[list[int], list[int]]] = [([], [])]
  i = j = 0
  while i < len(shape) or j < len(new_shape):
    axes, new_axes = groups[-1]
    size, new_size = math.prod(shape[k] for k in axes), math.prod(new_shape[k] for k in new_axes)
    if axes and new_axes and size == new_size:
      groups.append(([], []))
    elif i < len(shape) and (not axes or size < new_size or j == len(new_shape)):
      axes.append(i)
      i += 1
    else:
      new_axes.append(j)
      j += 1
  axes, new_axes = groups[-1]
  if len(groups) > 1 and not (axes and new_axes):  # axes of length 1 are left over
    groups.pop()
    groups[-1] = groups[-1][0] + axes, groups[-1][1] + new_axes
  return groups


def _broadcast_in_dim(graph, params, operands, outputs):
  (x, *_), ((shape, dtype),) = operands, outputs
  ones = [1] * len(shape)
  for axis, size in zip(params['broadcast_dimensions'], x.shape, strict=True):
    ones[axis] = size
  if x.data is not None:  # repeated by whatever operator needs it
    sizes = [1] * len(shape)
    for axis, size in zip(params['broadcast_dimensions'], x.data.shape, strict=True):
      sizes[axis] = size
    return Tensor(shape, dtype, data=x.data.reshape(sizes))
  x = _reshape(graph, {}, [x], [(tuple(ones), dtype)])
  if x.shape == shape:
    return x
  target = [shape[axis] if shape[axis] != x.shape[axis] else 1 for axis in x.layout]
  name = graph.add('Expand', [x.name, graph.runtime_shape(target)])
  return Tensor(shape, dtype, name, layout=x.layout)


def _transpose(graph, params, operands, outputs):
  del graph
  (x,), ((shape, dtype),) = operands, outputs
  order = tuple(params['permutation'])
  return Tensor(shape, dtype, x.name, layout=tuple(order.index(axis) for axis in x.layout))


def _concatenate(graph, params, operands, outputs):
  ((shape, dtype),) = outputs
  axis = params['dimension']
  check_axes('concatenate', shape, [axis])
  layout = next(x.layout for x in operands if x.data is None)
  name = graph.add('Concat', [graph.value(x, layout) for x in operands], axis=layout.index(axis))
  return Tensor(shape, dtype, name, layout=layout)


def _slice(graph, params, operands, outputs):
  (x,), ((shape, dtype),) = operands, outputs
  steps = params['strides'] or (1,) * x.rank
  axes = [i for i in range(x.rank) if shape[i] != x.shape[i]]
  if not axes:
    return x
  check_axes('slice', x.shape, axes)
  columns = (
    [params['start_indices'][i] for i in axes],
    [params['limit_indices'][i] for i in axes],
    [x.layout.index(i) for i in axes],
    [steps[i] for i in axes],
  )
  name = graph.add('Slice', [x.name, *(np.array(column, np.int64) for column in columns)])
  return Tensor(shape, dtype, name, layout=x.layout)


def _split(graph, params, operands, outputs):
  (x,), axis = operands, params['axis']
  check_axes('split', x.shape, [axis])
  sizes = np.array(params['sizes'], np.int64)
  names = graph.add('Split', [x.name, sizes], num_outputs=len(sizes), axis=x.layout.index(axis))
  names = [names] if isinstance(names, str) else names
  return [Tensor(shape, dtype, name, layout=x.layout) for name, (shape, dtype) in zip(names, outputs, strict=True)]


def _pad(graph, params, operands, outputs):
  (x, value), ((shape, dtype),) = operands, outputs
  config = [tuple(map(int, axis)) for axis in params['padding_config']]
  if any(low < 0 or high < 0 or interior for low, high, interior in config) or value.data is None:
    raise unsupported('pad', 'its padding is negative, between elements, or of a value that depends on the images')
  check_axes('pad', x.shape, [i for i, axis in enumerate(config) if any(axis)])
  layout = x.value_layout
  pads = np.array([config[axis][end] for end in (0, 1) for axis in layout], np.int64)
  return Tensor(shape, dtype, graph.add('Pad', [graph.value(x), pads, value.data]), layout=layout)


def _convert_element_type(graph, params, operands, outputs):
  from onnx import helper

  (x,), ((shape, dtype),) = operands, outputs
  if x.dtype == dtype:
    return x
  kind = helper.np_dtype_to_tensor_dtype(np.dtype(params['new_dtype']))
  return Tensor(shape, dtype, graph.add('Cast', [graph.value(x)], to=kind), layout=x.value_layout)


def _same(graph, params, operands, outputs):
  del graph, params, outputs
  return operands


SHAPES: dict[str, Converter] = {
  'broadcast_in_dim': _broadcast_in_dim,
  'concatenate': _concatenate,
  'convert_element_type': _convert_element_type,
  'copy': _same,
  'copy_p': _same,
  'name': _same,
  'optimization_barrier': _same,
  'pad': _pad,
  'reshape': _reshape,
  'slice': _slice,
  'split': _split,
  'squeeze': _reshape,
  'stop_gradient': _same,
  'transpose': _transpose,
}
