"""Exports a run as one file that needs neither Flax nor the model's source: a StableHLO program for JAX, or ONNX.

    python -m cnn_jax.export --workdir=RUN --output=model.stablehlo [--checkpoint=last|best]
    python -m cnn_jax.export --workdir=RUN --output=model.onnx

Both take uint8 images (batch, height, width, channels), a batch of any size, and give float32
probabilities (batch, classes): the pre-processing is inside. They compute in float32 and full
precision on every device; of a run in bfloat16, whose own results depend on the batch size, the
probabilities are those of its weights without that rounding. The same run gives the same bytes.

`model.stablehlo` is an uncompressed ZIP archive of two members, with nothing pickled in it:

    model.json   {"format": 1, "class_names": [...], "image_shape": [height, width, channels],
                  "dataset": ..., "step": ..., "jax": the version that wrote it}
    program.bin  the program and its weights as `jax.export.Exported.serialize` gives them, lowered
                 for CPU, CUDA and TPU

`load` reads it with JAX alone (whose `jax.export` wants the package flatbuffers). A newer JAX reads
it for at least six months, an older one need not; an ONNX file has no such date.

`model.onnx` (opset 17, the extra `onnx`) has `class_names`, `image_shape`, `dataset` and `step` as
JSON in its metadata.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import pathlib
import zipfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cnn_jax import UsageError, __version__, command

if TYPE_CHECKING:
  from cnn_jax.evaluate import Run

# Flax, the model and ONNX are imported where they are used: `load` must do without them.

_FORMAT = 1
_PLATFORMS = ('cpu', 'cuda', 'tpu')
_OPSET = 17


@dataclasses.dataclass(frozen=True)
class ExportedModel:
  """A classifier read from a file by `load`.

  Attributes:
    class_names: in the order of the probabilities.
    image_shape: (height, width, channels) of the images that it takes.
    program: uint8 (n, *image_shape) -> float32 (n, classes), n >= 1; a jitted JAX function for
      use in other JAX programs. Each n is compiled when it first comes.
  """

  class_names: tuple[str, ...]
  image_shape: tuple[int, int, int]
  program: Callable[[Any], Any]

  def __call__(self, images: Any) -> np.ndarray:
    """Probabilities of the classes.

    Args:
      images: uint8 (n, *image_shape), n >= 0.

    Returns:
      float32 (n, classes); rows sum to 1.

    Raises:
      UsageError: the images have another shape or dtype.
    """
    shape, dtype = np.shape(images), getattr(images, 'dtype', None)
    if dtype != np.uint8 or shape[1:] != self.image_shape or len(shape) != 4:
      expected = ', '.join(map(str, self.image_shape))
      raise UsageError(f'the images are {dtype or type(images).__name__} of shape {shape}; give uint8 (n, {expected}).')
    if not shape[0]:
      return np.zeros((0, len(self.class_names)), np.float32)
    return np.asarray(self.program(images))


def load(path: str | os.PathLike) -> ExportedModel:
  """Reads a model that was exported as `.stablehlo`.

  The file is a program. Nothing in it runs as Python, but read files only of those whom you would
  trust with your accelerator.

  Args:
    path: of the file.

  Raises:
    UsageError: it cannot be read, is not such a file, or is a program that this JAX cannot run on this device.
  """
  import jax
  import jax.export

  try:
    with zipfile.ZipFile(path) as archive:
      about, program = json.loads(archive.read('model.json')), bytearray(archive.read('program.bin'))
  except OSError as error:
    raise UsageError(f'{path} cannot be read: {error.strerror or error}.') from error
  except (zipfile.BadZipFile, KeyError, ValueError, RuntimeError, NotImplementedError, EOFError) as error:
    raise UsageError(
      f'{path} is damaged or not a model that cnn_jax.export wrote as .stablehlo; export it again.'
    ) from error
  if not isinstance(about, dict) or about.get('format') != _FORMAT:
    raise UsageError(f'{path} has another format than {_FORMAT}, the one that cnn_jax {__version__} reads.')
  shape = tuple(about['image_shape'])
  try:
    call = jax.jit(jax.export.deserialize(program).call)
    call.lower(jax.ShapeDtypeStruct((1, *shape), np.uint8))  # says now what the first call would
  except (ValueError, jax.errors.JaxRuntimeError) as error:
    raise UsageError(
      f'{path} was written with jax {about.get("jax")}, and jax {jax.__version__} cannot run it here ({error}); '
      'update jax, or export it again with this one.'
    ) from error
  return ExportedModel(tuple(about['class_names']), shape, call)


def to_stablehlo(run: Run) -> bytes:
  """A run as the contents of a `.stablehlo` file.

  Args:
    run: from `evaluate.load_run`.
  """
  import jax
  import jax.export
  import jax.numpy as jnp

  from cnn_jax.data.augment import normalize

  model = run.model.clone(dtype=jnp.float32)

  def probabilities(images):
    return jax.nn.softmax(model.apply(run.variables, normalize(images), train=False))

  shape = (*jax.export.symbolic_shape('batch'), *run.image_shape)
  # Source locations would put the paths of this machine into the file, and make its bytes depend on them.
  limit = jax.config.jax_traceback_in_locations_limit
  jax.config.update('jax_traceback_in_locations_limit', 0)
  try:
    # By default GPU and TPU round the factors of a product to 10 and 7 bits, and the probabilities to 3 digits.
    with jax.default_matmul_precision('highest'):
      exported = jax.export.export(jax.jit(probabilities), platforms=_PLATFORMS)(jax.ShapeDtypeStruct(shape, jnp.uint8))
  finally:
    jax.config.update('jax_traceback_in_locations_limit', limit)
  about = {'format': _FORMAT, **_about(run), 'jax': jax.__version__}
  contents = io.BytesIO()
  with zipfile.ZipFile(contents, 'w') as archive:
    # A `ZipInfo` made from a name has a date of 1980, not today's.
    archive.writestr(zipfile.ZipInfo('model.json'), json.dumps(about, indent=2) + '\n')
    archive.writestr(zipfile.ZipInfo('program.bin'), bytes(exported.serialize()))
  return contents.getvalue()


def to_onnx(run: Run) -> bytes:
  """A run as the contents of an `.onnx` file: input `images`, output `probabilities`.

  Batch norm becomes part of the convolution before it, except where a maximum stands between the
  two and a scale is negative.

  Args:
    run: from `evaluate.load_run`.

  Raises:
    UsageError: the package onnx is not installed.
  """
  try:
    import onnx
    from onnx import TensorProto, helper
  except ImportError as error:
    raise UsageError("an .onnx file needs the package onnx; run: pip install 'cnn_jax[onnx]'.") from error
  from cnn_jax.model import head_kernel

  model, params = run.model, run.variables['params']
  height, width, channels = run.image_shape
  graph = _Graph()
  x = graph.add('Transpose', 'channels_first', 'images', perm=[0, 3, 1, 2])
  x = graph.add('Cast', 'float', x, to=TensorProto.FLOAT)
  # As `augment.normalize`. Not folded into the first convolution, whose padding is zeros after it.
  x = graph.add('Mul', 'normalize/doubled', x, np.float32(2))
  x = graph.add('Sub', 'normalize/centred', x, np.float32(255))
  x = graph.add('Div', 'normalize', x, np.float32(255))
  maps = _Maps(x, height, width, channels)
  for i in range(len(model.features)):
    maps = _add_block(graph, run, i, maps)
  kernel = head_kernel(model, run.variables)
  if model.aggregate == 'gap':
    x = graph.add('GlobalAveragePool', 'gap', maps.name)
  else:
    x = maps.name
    # The model flattens (height, width, channels); here the channels come first.
    kernel = kernel.reshape(maps.height, maps.width, maps.channels, -1).transpose(2, 0, 1, 3)
    kernel = kernel.reshape(-1, model.num_classes)
  x = graph.add('Flatten', 'flatten', x, axis=1)
  x = graph.add('Gemm', 'logits', x, kernel, np.asarray(params['head']['bias']))
  graph.add('Softmax', 'probabilities', x, axis=-1)

  opsets = [helper.make_opsetid('', _OPSET)]
  proto = helper.make_model(
    helper.make_graph(
      graph.nodes,
      'cnn_jax',
      [helper.make_tensor_value_info('images', TensorProto.UINT8, ['batch', height, width, channels])],
      [helper.make_tensor_value_info('probabilities', TensorProto.FLOAT, ['batch', model.num_classes])],
      graph.constants,
    ),
    opset_imports=opsets,
    ir_version=helper.find_min_ir_version_for(opsets),  # the newest one older runtimes do not read
    producer_name='cnn_jax',
    producer_version=__version__,
  )
  helper.set_model_props(proto, {key: json.dumps(value) for key, value in _about(run).items()})
  onnx.checker.check_model(proto, full_check=True)
  return proto.SerializeToString(deterministic=True)


def main(argv: Sequence[str]) -> None:
  """The command: writes the file and says in a line what is in it."""
  parser = command.Parser('Exports a run as one file: .stablehlo for JAX, .onnx for other runtimes.')
  parser.add_argument('--workdir', required=True, help='the run')
  parser.add_argument(
    '--output', required=True, help='the file to write; its suffix, .stablehlo or .onnx, is its format'
  )
  parser.add_argument('--checkpoint', default='last', choices=['last', 'best'], help='newest, or best on validation')
  args = parser.parse_args(argv)
  output = pathlib.Path(args.output).expanduser()
  formats = {'.stablehlo': to_stablehlo, '.onnx': to_onnx}
  if output.suffix not in formats:
    raise UsageError(f'--output is {args.output}, whose suffix is not a format; let it end in .stablehlo or .onnx.')
  if not output.parent.is_dir():
    raise UsageError(f'{output.parent}, the folder of --output, does not exist; make it or choose another.')
  from cnn_jax import evaluate

  run = evaluate.load_run(args.workdir, args.checkpoint)
  contents = formats[output.suffix](run)
  temporary = output.with_name(f'.{output.name}.{os.getpid()}.partial')
  try:
    temporary.write_bytes(contents)
    temporary.replace(output)  # an interrupted export leaves no half of a file
  except OSError as error:
    raise UsageError(f'{output} cannot be written: {error.strerror or error}.') from error
  finally:
    temporary.unlink(missing_ok=True)
  shape = 'x'.join(map(str, run.image_shape))
  print(
    f'{output}: {len(run.class_names)} classes, uint8 images of {shape}, step {run.step}, {len(contents) / 1e6:.2f} MB'
  )


def _about(run: Run) -> dict[str, Any]:
  return {
    'class_names': list(run.class_names),
    'image_shape': list(run.image_shape),
    'dataset': run.dataset,
    'step': run.step,
  }


# --- ONNX ---


class _Graph:
  """Nodes, each with one output that has the node's name, and constants, in the order of their use."""

  def __init__(self):
    self.nodes: list[Any] = []
    self.constants: list[Any] = []

  def add(self, operator: str, name: str, *inputs: Any, **attributes: Any) -> str:
    """Adds a node; an input is the name of another one's output or a constant. Returns the name of its output."""
    from onnx import helper, numpy_helper

    names = []
    for i, value in enumerate(inputs):
      if not isinstance(value, str):
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), f'{name}:{i}'))
        value = f'{name}:{i}'
      names.append(value)
    self.nodes.append(helper.make_node(operator, names, [name], name=name, **attributes))
    return name


@dataclasses.dataclass(frozen=True)
class _Maps:
  """A node's output of shape (batch, channels, height, width)."""

  name: str
  height: int
  width: int
  channels: int


def _add_block(graph: _Graph, run: Run, i: int, maps: _Maps) -> _Maps:
  """What `model.ConvBlock` does without training."""
  model, block = run.model, f'block{i + 1}'
  params, stats = run.variables['params'][block], run.variables['batch_stats'].get(block, {})
  pool = 'none' if i == len(model.features) - 1 else model.pool
  stride = 1 if i == 0 else model.stride
  shortcut = maps
  for j in range(model.convs_per_block):
    last = j == model.convs_per_block - 1
    conv, norm = params[f'conv{j + 1}'], f'norm{j + 1}'
    kernel, bias = np.asarray(conv['kernel']), conv.get('bias')
    scale = None
    if model.norm == 'batch':
      scale, bias = _batch_norm(params[norm], stats[norm])
      # Pooling on average commutes with scaling and shifting, the maximum only with scales that are not negative.
      if not (last and pool == 'max' and np.any(scale < 0)):
        kernel, scale = kernel * scale, None
    own_bias = bias if scale is None else None
    maps = _add_conv(graph, f'{block}/conv{j + 1}', maps, kernel, own_bias, stride if j == 0 else 1)
    if last:
      maps = _add_pool(graph, f'{block}/pool', maps, pool)
    if scale is not None:
      maps = _add_affine(graph, f'{block}/{norm}', maps, scale, bias)
    if model.norm == 'group':
      maps = _add_group_norm(graph, f'{block}/{norm}', maps, params[norm])
    if not (last and model.residual):
      maps = _add_activation(graph, f'{block}/{model.activation}{j + 1}', maps, model.activation)
  if model.residual:
    if stride > 1:
      shortcut = _add_stride(graph, f'{block}/shortcut/stride', shortcut, stride)
    shortcut = _add_pool(graph, f'{block}/shortcut/pool', shortcut, 'none' if pool == 'none' else 'avg')
    if 'projection' in params:
      conv = params['projection']
      shortcut = _add_conv(graph, f'{block}/projection', shortcut, conv['kernel'], conv.get('bias'), 1)
    maps = dataclasses.replace(maps, name=graph.add('Add', f'{block}/sum', maps.name, shortcut.name))
    maps = _add_activation(graph, f'{block}/{model.activation}', maps, model.activation)
  return maps


def _add_conv(graph: _Graph, name: str, maps: _Maps, kernel: Any, bias: Any, stride: int) -> _Maps:
  """A convolution with XLA's `SAME` padding, of which the odd pixel comes below and to the right."""
  kernel = np.asarray(kernel)  # (height, width, channels, features)
  height, width = -(-maps.height // stride), -(-maps.width // stride)
  down = max((height - 1) * stride + kernel.shape[0] - maps.height, 0)
  across = max((width - 1) * stride + kernel.shape[1] - maps.width, 0)
  constants = [kernel.transpose(3, 2, 0, 1).astype(np.float32)]
  if bias is not None:
    constants.append(np.asarray(bias, np.float32))
  graph.add(
    'Conv',
    name,
    maps.name,
    *constants,
    kernel_shape=kernel.shape[:2],
    strides=[stride, stride],
    pads=[down // 2, across // 2, -(-down // 2), -(-across // 2)],  # top, left, bottom, right
  )
  return _Maps(name, height, width, kernel.shape[3])


def _add_pool(graph: _Graph, name: str, maps: _Maps, kind: str) -> _Maps:
  if kind == 'none':
    return maps
  operator = {'max': 'MaxPool', 'avg': 'AveragePool'}[kind]
  graph.add(operator, name, maps.name, kernel_shape=[2, 2], strides=[2, 2])
  return _Maps(name, maps.height // 2, maps.width // 2, maps.channels)


def _add_stride(graph: _Graph, name: str, maps: _Maps, stride: int) -> _Maps:
  starts, ends, axes, steps = [0, 0], [maps.height, maps.width], [2, 3], [stride, stride]
  graph.add('Slice', name, maps.name, *(np.array(values, np.int64) for values in (starts, ends, axes, steps)))
  return _Maps(name, -(-maps.height // stride), -(-maps.width // stride), maps.channels)


def _add_affine(graph: _Graph, name: str, maps: _Maps, scale: Any, shift: Any) -> _Maps:
  per_channel = [np.asarray(value, np.float32).reshape(-1, 1, 1) for value in (scale, shift)]
  scaled = graph.add('Mul', f'{name}/scaled', maps.name, per_channel[0])
  return dataclasses.replace(maps, name=graph.add('Add', name, scaled, per_channel[1]))


def _add_group_norm(graph: _Graph, name: str, maps: _Maps, params: Any) -> _Maps:
  """Group norm as instance norm of the groups: opset 17 has no operator for it."""
  import flax.linen as nn

  from cnn_jax.model import num_groups

  groups = num_groups(maps.channels)
  x = graph.add('Reshape', f'{name}/groups', maps.name, np.array([0, groups, -1], np.int64))
  ones, zeros = np.ones(groups, np.float32), np.zeros(groups, np.float32)
  x = graph.add('InstanceNormalization', f'{name}/normalized', x, ones, zeros, epsilon=nn.GroupNorm.epsilon)
  shape = np.array([0, maps.channels, maps.height, maps.width], np.int64)
  x = graph.add('Reshape', f'{name}/channels', x, shape)
  return _add_affine(graph, name, dataclasses.replace(maps, name=x), params['scale'], params['bias'])


def _add_activation(graph: _Graph, name: str, maps: _Maps, kind: str) -> _Maps:
  x = maps.name
  if kind == 'relu':
    return dataclasses.replace(maps, name=graph.add('Relu', name, x))
  gate = x
  if kind == 'gelu':
    # Flax's is the approximation x/2 (1 + tanh z) with z = sqrt(2/pi) (x + 0.044715 x^3), and (1 + tanh z) / 2 is
    # sigmoid(2z).
    slope = 2 * math.sqrt(2 / math.pi)
    square = graph.add('Mul', f'{name}/square', x, x)
    cubic = graph.add('Mul', f'{name}/cubic', square, np.float32(0.044715 * slope))
    factor = graph.add('Add', f'{name}/factor', cubic, np.float32(slope))
    gate = graph.add('Mul', f'{name}/doubled', x, factor)
  sigmoid = graph.add('Sigmoid', f'{name}/sigmoid', gate)
  return dataclasses.replace(maps, name=graph.add('Mul', name, x, sigmoid))


def _batch_norm(params: Any, stats: Any) -> tuple[np.ndarray, np.ndarray]:
  """The scale and the shift, float64, that batch norm with its running statistics is."""
  import flax.linen as nn

  scale, bias, mean, variance = (
    np.asarray(value, np.float64) for value in (params['scale'], params['bias'], stats['mean'], stats['var'])
  )
  scale = scale / np.sqrt(variance + nn.BatchNorm.epsilon)
  return scale, bias - mean * scale


if __name__ == '__main__':
  command.run(main)
