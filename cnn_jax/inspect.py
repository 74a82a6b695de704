"""What a network computes: layers, maps, class activation maps and receptive fields. Arrays in, arrays out.

Everything follows from the contract of `cnn_jax.models` and from the types of Flax's layers. No layer but `head` is
known by name.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError
from flax.linen.linear import canonicalize_padding
from jax import lax

from cnn_jax import models, ops

_NORMS = (nn.BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm, nn.RMSNorm)


@dataclasses.dataclass(frozen=True)
class Layer:
  """A module with parameters of its own."""

  path: tuple[str, ...]  # names of the modules from the network down to this one
  kind: str  # name of the module's type, such as Conv, BatchNorm or Dense
  stage: int  # the first stage that depends on it, from 1; for the head, the number of stages plus one
  kernel: tuple[int, ...] | None  # shape of the kernel
  output: tuple[int, ...]  # shape of the output for one image; for a convolution, before any pooling
  parameters: int
  operations: int  # multiplications and additions of convolutions and dense layers for one image; otherwise 0


@dataclasses.dataclass(frozen=True)
class Field:
  """The pixels along one axis that place `i` of a map depends on: `size` pixels from `first + i * stride` on.

  Pixels outside the image are padding.
  """

  first: int
  size: int
  stride: int


def averaged_stages(maps: Mapping[str, np.ndarray]) -> list[str]:
  """The last stages whose maps, averaged over all places, are the input of the head, judging by their values.

  Args:
    maps: of a network, with or without a batch axis: `stage1`, ..., `pooled`.

  Returns:
    Their names from the image on, in the order of the averages; none if the input of the head is something else, and so
    there are no class activation maps.
  """
  pooled = np.asarray(maps['pooled'], np.float32)
  means, names = np.zeros((*pooled.shape[:-1], 0), np.float32), models.stage_names(maps)
  for i in reversed(range(len(names))):
    means = np.concatenate([np.asarray(maps[names[i]], np.float32).mean(axis=(-3, -2)), means], axis=-1)
    if means.shape == pooled.shape and np.allclose(means, pooled, rtol=1e-2, atol=1e-3 * np.abs(pooled).max()):
      return names[i:]
  return []


def class_activation_maps(variables: Any, maps: Mapping[str, np.ndarray], classes: np.ndarray) -> np.ndarray:
  """Computes the evidence for classes at each place of an image (Zhou et al. 2016, arXiv 1512.04150).

  With global average pooling it is exact: the mean of a class activation map plus the head's bias is the logit.

  Args:
    variables: `{'params', 'batch_stats'}`.
    maps: the stages that `averaged_stages` names, each float (n, height, width, features).
    classes: int (n, k), k classes for each image.

  Returns:
    float32 (n, k, height, width), of the size of the first stage's maps. The evidence of later stages is enlarged.
  """
  kernel, first = head_kernel(variables), 0
  evidence = np.zeros((*classes.shape, *next(iter(maps.values())).shape[1:3]), np.float32)
  for values in maps.values():
    weights = kernel[first : first + values.shape[-1], classes]
    first += values.shape[-1]
    found = np.einsum('nhwf,fnk->nkhw', np.asarray(values, np.float32), weights)
    if found.shape != evidence.shape:
      enlarged = np.asarray(jax.image.resize(found, evidence.shape, 'linear'))
      # Interpolation changes the mean a little.
      found = enlarged + (found.mean((2, 3)) - enlarged.mean((2, 3)))[..., None, None]
    evidence += found
  return evidence


def head_kernel(variables: Any) -> np.ndarray:
  """Reads the head's kernel: float32 (features, num_classes), also if the head is a 1x1 convolution.

  Args:
    variables: `{'params', 'batch_stats'}`.
  """
  kernel = np.asarray(variables['params']['head']['kernel'], np.float32)
  return kernel.reshape(-1, kernel.shape[-1])


def layer_table(model: nn.Module, image_shape: Sequence[int]) -> list[Layer]:
  """Lists the layers that have parameters, in the order in which they are computed; computes nothing.

  Args:
    model: from `models.create`.
    image_shape: (height, width, channels).
  """
  return _layers_and_maps(model, image_shape)[0]


def summary(model: nn.Module, image_shape: Sequence[int]) -> str:
  """Formats a table of a network's stages: maps, parameters, and operations for one image.

  Args:
    model: from `models.create`.
    image_shape: (height, width, channels).
  """
  layers, maps = _layers_and_maps(model, image_shape)
  rows = [('', 'maps', 'parameters', 'operations')]
  names = [*models.stage_names(maps), 'head']
  for stage, name in enumerate(names, 1):
    shape = ' x '.join(map(str, maps['logits' if name == 'head' else name].shape[1:]))
    rows.append((name, shape, *_totals(layer for layer in layers if layer.stage == stage)))
  rows.append(('total', '', *_totals(layers)))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join(
    f'{name:<{widths[0]}}  {shape:<{widths[1]}}  {parameters:>{widths[2]}}  {operations:>{widths[3]}}'
    for name, shape, parameters, operations in rows
  )


def maps_and_first_convolution(
  model: nn.Module, variables: Any, images: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
  """Computes the maps of a network, and the output of the convolution that reads the image.

  Args:
    model: from `models.create`.
    variables: `{'params', 'batch_stats'}`.
    images: float (n, height, width, channels), normalised.

  Returns:
    The maps; the kernel (kernel height, kernel width, channels, features); and the output (n, height, width, features),
    after pooling if the layer's own function pools.
  """
  found: list[tuple[jax.Array, jax.Array]] = []

  def record(call, args, kwargs, context):
    output = call(*args, **kwargs)
    if isinstance(context.module, nn.Conv) and context.method_name == '__call__' and not found:
      found.append((context.module.variables['params']['kernel'], output))
    return output

  with nn.intercept_methods(record):
    maps = models.infer(model, variables, images)[1]
  return maps, *found[0]


def receptive_fields(model: nn.Module, image_shape: Sequence[int]) -> dict[str, tuple[Field, Field] | None]:
  """Measures which pixels each stage's maps depend on, by gradient: rows and columns.

  What a place depends on does not change if every convolution averages the pixels under its kernel, over all channels.
  That network is increasing in every pixel, so on an image that falls from the top to the bottom every maximum is that
  of the first row of its window. The gradient of a place is then not zero at the first row that the place depends on;
  on the image upside down, at the last one. Norms, some of which average over the image, only rescale. All channels
  being equal, one is computed, unless a layer between the convolutions needs its own number.

  Args:
    model: from `models.create`.
    image_shape: (height, width, channels). A larger image shows larger fields.

  Returns:
    {'stage1': (rows, columns), ...}; None if the field is as large as the image along an axis.
  """
  try:
    return _receptive_fields(model, image_shape, one_channel=True)
  except (TypeError, ValueError, ZeroDivisionError, FlaxError):  # what JAX and Flax raise for shapes that do not fit
    return _receptive_fields(model, image_shape, one_channel=False)


def _receptive_fields(
  model: nn.Module, image_shape: Sequence[int], one_channel: bool
) -> dict[str, tuple[Field, Field] | None]:
  model = model.clone(dtype=jnp.float32)
  height, width, channels = image_shape
  down, right = np.meshgrid(*(np.linspace(2, 1, side, dtype=np.float32) for side in (height, width)), indexing='ij')
  images = np.repeat(np.stack([down, down[::-1], right, right[:, ::-1]])[..., None], channels, axis=3)

  @functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})  # it is called once
  def touched(images):
    """The rows and the columns that places depend on: each bool (stages, 2 places, 2 images, pixels)."""
    ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), variables)

    def maps(images):
      found = model.apply(ones, images, train=False)[1]
      return [found[name].sum(-1) for name in names]

    backward = jax.vjp(maps, images)[1]

    def pixels(stage, place):
      lines = [_lines(shapes[name].shape[1:3], place) for name in names]
      depends = backward([jnp.where(stage == i, x, 0.0) for i, x in enumerate(lines)])[0].any(-1)
      return depends[:2].any(2), depends[2:].any(1)

    stages, places = np.divmod(np.arange(2 * len(names), dtype=np.int32), 2)
    axes = lax.map(lambda each: pixels(*each), (stages, places))
    return [axis.reshape(len(names), 2, *axis.shape[1:]) for axis in axes]

  with nn.intercept_methods(functools.partial(_average, one_channel)):
    (_, shapes), variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    names = models.stage_names(shapes)
    rows, columns = map(np.asarray, touched(images))
  fields = {}
  for i, name in enumerate(names):
    vertical, horizontal = _field(rows[i], shapes[name].shape[1]), _field(columns[i], shapes[name].shape[2])
    fields[name] = (vertical, horizontal) if vertical and horizontal else None
  return fields


def _lines(sides: tuple[int, ...], place: jax.Array) -> jax.Array:
  """Marks a row or a column of each of four maps by ones, counted from the end that is farthest from the wanted pixels.

  Args:
    sides: height and width of the maps: of a falling and a rising image along the height, and along the width.
    place: int32 (), from 0; the last one if the maps have fewer places.

  Returns:
    float32 (4, height, width).
  """
  rows, columns = jnp.arange(sides[0])[:, None], jnp.arange(sides[1])[None, :]
  row, column = jnp.minimum(place, sides[0] - 1), jnp.minimum(place, sides[1] - 1)
  lines = [rows == sides[0] - 1 - row, rows == row, columns == sides[1] - 1 - column, columns == column]
  return jnp.stack([jnp.broadcast_to(line, sides) for line in lines]).astype(jnp.float32)


def _field(touched: np.ndarray, places: int) -> Field | None:
  """The field along an axis; None if it is as large as the image.

  Padding hides where the fields of the first places begin and where those of the last places end.

  Args:
    touched: bool (2, 2, pixels): what the last place of the falling image and the first of the rising one depend on,
      then the last but one and the second.
    places: of the map along the axis.
  """
  pixels = touched.shape[2]
  if not touched.any(axis=2).all():
    return None  # of weights that are no parameters of layers, some may be zero
  (begin, end), (previous_begin, next_end) = (
    (int(low.argmax()), int(np.flatnonzero(high)[-1])) for low, high in touched
  )
  stride = next_end - end
  if previous_begin == 0 or next_end == pixels - 1 or begin - previous_begin != stride:
    return None
  first = begin - (places - 1) * stride
  size = end - first + 1
  return Field(first, size, stride or 1) if size < pixels else None  # a single place has no stride


def _average(one_channel, call, args, kwargs, context):
  """Replaces the layers of a network by averages, of one channel or of as many as they have; see `receptive_fields`."""
  module = context.module
  if context.method_name != '__call__' or not isinstance(module, (*_NORMS, nn.Conv, nn.Dense)):
    return call(*args, **kwargs)
  if isinstance(module, _NORMS):
    return args[0] / lax.stop_gradient(jnp.max(args[0]))
  x = jnp.mean(args[0], axis=-1, keepdims=True)
  if isinstance(module, nn.Conv):
    # Zeros would be less than all pixels, so that a maximum beside them would move.
    x = jnp.pad(x, ((0, 0), *_padding(module, x.shape[1:3]), (0, 0)), mode='edge')
    sides, strides, convolve = _pair(module.kernel_size), _pair(module.strides), module.conv_general_dilated
    if convolve in (None, ops.conv_general_dilated):  # a plain convolution; other functions may pool too
      convolve = _convolve
    x = convolve(
      x,
      jnp.full((*sides, 1, 1), 1 / math.prod(sides), x.dtype),
      strides,
      'VALID',
      rhs_dilation=_pair(module.kernel_dilation),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
  return x if one_channel else jnp.broadcast_to(x, (*x.shape[:-1], module.features))


def _convolve(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: str, **options: Any) -> jax.Array:
  """A convolution; with one weight, the average of one number, it compiles much faster as a selection."""
  if kernel.size == 1:
    return x[:, :: strides[0], :: strides[1]]
  return lax.conv_general_dilated(x, kernel, strides, padding, **options)


def _layers_and_maps(model: nn.Module, image_shape: Sequence[int]) -> tuple[list[Layer], dict[str, Any]]:
  """The layers, and the shapes of the maps of one image."""
  calls: dict[tuple[str, ...], tuple] = {}
  maps: dict[str, Any] = {}

  def record(call, args, kwargs, context):
    output, module = call(*args, **kwargs), context.module
    if context.method_name != '__call__' or module.is_initializing():
      return output
    if not module.path:
      maps.update({name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in output[1].items()})
    own = {name: p for name, p in module.variables.get('params', {}).items() if hasattr(p, 'shape')}
    if own:
      kernel = own['kernel'].shape if 'kernel' in own else None
      shape = _unpooled(module, args[0].shape) if isinstance(module, nn.Conv) else jax.tree.leaves(output)[0].shape
      operations = 2 * math.prod(kernel) * math.prod(shape[1:-1]) if kernel else 0
      before = calls[module.path][-1] if module.path in calls else 0  # of a layer that is called twice
      calls[module.path] = (type(module).__name__, kernel, shape[1:], own, operations + before)
    return output

  with nn.intercept_methods(record):
    stages = models.parameters_by_stage(model, image_shape)
  layers = []
  for path, (kind, kernel, shape, own, operations) in calls.items():
    belongs = functools.reduce(lambda tree, name: tree[name], path, stages)
    stage = min(belongs[name] for name in own)
    layers.append(Layer(path, kind, stage, kernel, shape, models.num_parameters(own), operations))
  return layers, maps


def _unpooled(module: nn.Conv, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape of a convolution's output, without the pooling that `ops.conv_max_pool` does at once."""
  sizes = zip(shape[1:3], _padding(module, shape[1:3]), _window(module), _pair(module.strides), strict=True)
  return (shape[0], *((side + sum(pad) - window) // stride + 1 for side, pad, window, stride in sizes), module.features)


def _padding(module: nn.Conv, sides: tuple[int, ...]) -> Sequence[tuple[int, int]]:
  """The pixels that a convolution adds before and behind an image, along both axes."""
  padding = canonicalize_padding(module.padding, 2)
  if padding in ('CIRCULAR', 'REFLECT'):
    return [((side - 1) // 2, side // 2) for side in _window(module)]
  if isinstance(padding, str):
    return lax.padtype_to_pads(sides, _window(module), _pair(module.strides), padding)
  return padding


def _window(module: nn.Conv) -> list[int]:
  """The sides of a kernel, with its holes if it is dilated."""
  return [(k - 1) * d + 1 for k, d in zip(_pair(module.kernel_size), _pair(module.kernel_dilation), strict=True)]


def _pair(value: Any) -> tuple[int, ...]:
  """A setting for both axes, from what Flax takes: a number for both, one for each, or None, which means 1."""
  return tuple(value) if isinstance(value, Sequence) else (value or 1,) * 2


def _totals(layers: Iterable[Layer]) -> tuple[str, str]:
  """The parameters and the operations of some layers, as text."""
  layers = list(layers)
  return f'{sum(layer.parameters for layer in layers):,}', f'{sum(layer.operations for layer in layers):,}'
