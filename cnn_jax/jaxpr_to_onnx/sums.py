"""Primitives that combine elements: products, convolutions, reductions and windows: the table `SUMS`."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cnn_jax.jaxpr_to_onnx.graph import Converter, Tensor, check_axes, reshape_target, unsupported
from cnn_jax.jaxpr_to_onnx.shapes import match_axes


def _dot_general(graph, params, operands, outputs):
  """A product as MatMul of (batch..., rows, depth) with (batch..., depth, columns)."""
  (x, y), ((shape, dtype),) = operands, outputs
  (x_depth, y_depth), (x_batch, y_batch) = params['dimension_numbers']
  check_axes('dot_general', x.shape, x_depth)
  x_rows = [i for i in range(x.rank) if i not in (*x_depth, *x_batch)]
  y_columns = [i for i in range(y.rank) if i not in (*y_depth, *y_batch)]
  x_name, y_name = graph.value(x, (*x_batch, *x_rows, *x_depth)), graph.value(y, (*y_batch, *y_depth, *y_columns))
  batch, rows = [x.shape[i] for i in x_batch], [x.shape[i] for i in x_rows]
  columns, depth = [y.shape[i] for i in y_columns], [x.shape[i] for i in x_depth]
  merged_rows = rows if not batch and len(y_columns) == 1 else [math.prod(rows)]
  before, after = [*batch, *rows, *depth], [*batch, *merged_rows, math.prod(depth)]
  if before != after:
    x_name = graph.add('Reshape', [x_name, reshape_target(before, after)])
  before, after = [*batch, *depth, *columns], [*batch, math.prod(depth), math.prod(columns)]
  if before != after:
    y_name = graph.add('Reshape', [y_name, reshape_target(before, after)])
  name = graph.add('MatMul', [x_name, y_name])
  before = [*batch, *merged_rows, math.prod(columns)]
  if before != list(shape):
    name = graph.add('Reshape', [name, reshape_target(before, shape)])
  return Tensor(shape, dtype, name, layout=tuple(range(len(shape))))


def _conv_general_dilated(graph, params, operands, outputs):
  (x, kernel), ((shape, dtype),) = operands, outputs
  numbers, pads = params['dimension_numbers'], params['padding']
  if any(d != 1 for d in params['lhs_dilation']) or params['batch_group_count'] != 1 or min(map(min, pads)) < 0:
    raise unsupported('conv_general_dilated', 'it is transposed, grouped by batch, or has negative padding')
  name = graph.add(
    'Conv',
    [graph.value(x, numbers.lhs_spec), graph.value(kernel, numbers.rhs_spec)],
    kernel_shape=[kernel.shape[axis] for axis in numbers.rhs_spec[2:]],
    strides=list(params['window_strides']),
    dilations=list(params['rhs_dilation']),
    pads=[int(pad[end]) for end in (0, 1) for pad in pads],
    group=params['feature_group_count'],
  )
  return Tensor(shape, dtype, name, layout=tuple(numbers.out_spec))


def _reduce_window(primitive, operator, graph, params, x, outputs, **attributes):
  ((shape, dtype),) = outputs
  window, steps, pads = params['window_dimensions'], params['window_strides'], params['padding']
  dilations = params['window_dilation']
  # The axes that ONNX calls batch and channels have no windows.
  plain = [size == step == 1 and not any(pad) for size, step, pad in zip(window, steps, pads, strict=True)]
  identity = tuple(range(x.rank))
  layouts = [x.layout, (0, x.rank - 1, *identity[1:-1]), identity]
  layout = next((layout for layout in layouts if plain[layout[0]] and plain[layout[1]]), None)
  if layout is None or any(d != 1 for d in params['base_dilation']) or x.rank < 3:
    raise unsupported(primitive, 'its windows are not over the height and the width of images')
  spatial = layout[2:]
  check_axes(primitive, x.shape, spatial)
  if operator == 'MaxPool':
    attributes['dilations'] = [dilations[axis] for axis in spatial]
  elif any(d != 1 for d in dilations):
    raise unsupported(primitive, 'its windows are dilated')
  name = graph.add(
    operator,
    [graph.value(x, layout)],
    kernel_shape=[window[axis] for axis in spatial],
    strides=[steps[axis] for axis in spatial],
    pads=[int(pads[axis][end]) for end in (0, 1) for axis in spatial],
    **attributes,
  )
  return Tensor(shape, dtype, name, layout=layout)


def _reduce_window_max(graph, params, operands, outputs):
  return _reduce_window('reduce_window_max', 'MaxPool', graph, params, operands[0], outputs)


def _reduce_window_sum(graph, params, operands, outputs):
  """A sum as an average times the number of its terms; `simplify` removes the factor from a mean."""
  mean = _reduce_window('reduce_window_sum', 'AveragePool', graph, params, operands[0], outputs, count_include_pad=1)
  name = graph.add('Mul', [mean.name, np.array(math.prod(params['window_dimensions']), mean.dtype)])
  return Tensor(mean.shape, mean.dtype, name, layout=mean.layout)


def _reduce(primitive: str, operator: str) -> Converter:
  """A converter for a reduction whose axes are an attribute of the operator."""

  def convert(graph, params, operands, outputs):
    (x,), ((shape, dtype),) = operands, outputs
    axes = _stored_axes(primitive, x, params['axes'])
    return Tensor(shape, dtype, graph.add(operator, [x.name], axes=axes, keepdims=0), layout=_layout_without(x, params))

  return convert


def _reduce_sum(graph, params, operands, outputs):
  (x,), ((shape, dtype),) = operands, outputs
  axes = _stored_axes('reduce_sum', x, params['axes'])
  window = _tile(x, params['axes'])
  if window is not None:
    ones, zeros = (1,) * len(window), ((0, 0),) * len(window)
    window_params = {
      'window_dimensions': window, 'window_strides': window, 'padding': zeros,
      'window_dilation': ones, 'base_dilation': ones,
    }  # fmt: skip
    return _reduce_window_sum(graph, window_params, [x.reshaped], outputs)
  name = graph.add('ReduceSum', [x.name, np.array(axes, np.int64)], keepdims=0)
  return Tensor(shape, dtype, name, layout=_layout_without(x, params))


def _tile(x: Tensor, reduced: Sequence[int]) -> list[int] | None:
  """The window over an image (batch, height, width, channels) if reducing its reshape pools tiles, else None."""
  if x.reshaped is None or x.reshaped.rank != 4:
    return None
  window = []
  for axes, new_axes in match_axes(x.reshaped.shape, x.shape):
    tiled = len(new_axes) == 2 and new_axes[1] in reduced
    if len(axes) != 1 or new_axes[0] in reduced or not (tiled or len(new_axes) == 1):
      return None
    window.append(x.shape[new_axes[1]] if tiled else 1)
  return window if window[0] == window[3] == 1 else None


def _stored_axes(primitive: str, x: Tensor, axes: Sequence[int]) -> list[int]:
  check_axes(primitive, x.shape, axes)
  return sorted(x.layout.index(axis) for axis in axes)


def _layout_without(x: Tensor, params: Any) -> tuple[int, ...]:
  """The layout of a tensor after its axes `params['axes']` are gone."""
  kept = [axis for axis in range(x.rank) if axis not in params['axes']]
  return tuple(kept.index(axis) for axis in x.layout if axis in kept)


SUMS: dict[str, Converter] = {
  'conv_general_dilated': _conv_general_dilated,
  'dot_general': _dot_general,
  'reduce_max': _reduce('reduce_max', 'ReduceMax'),
  'reduce_min': _reduce('reduce_min', 'ReduceMin'),
  'reduce_prod': _reduce('reduce_prod', 'ReduceProd'),
  'reduce_sum': _reduce_sum,
  'reduce_window_max': _reduce_window_max,
  'reduce_window_sum': _reduce_window_sum,
}
