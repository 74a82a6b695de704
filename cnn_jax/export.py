"""Exports a run as one file that needs neither Flax nor the model's source: a StableHLO program for JAX, or ONNX.

    python -m cnn_jax.export --workdir=RUN --output=model.stablehlo [--checkpoint=last|best]
    python -m cnn_jax.export --workdir=RUN --output=model.onnx

Both formats map uint8 images (batch, height, width, channels), a batch of any size, to float32 probabilities
(batch, classes). The normalisation is inside, and so is the centre crop of a run with `config.data.canvas_size`, whose
images have that size. `resize` and `drawing` in the description say how `cnn_jax.predict` brings a picture of another
size to that of the images: see `config.data.resize` and `cnn_jax.data.drawings`. Both formats compute in float32 at full
precision on every device, as predict and evaluate do. A run in bfloat16 is exported without that rounding, so its
probabilities differ slightly from those of the run itself. The same run gives the same bytes.

`model.stablehlo` is an uncompressed ZIP archive of two members; nothing in it is pickled:

    model.json   {"format": 1, "class_names": [...], "image_shape": [height, width, channels], "resize": crop | pad |
                  stretch, "drawing": null or {"longer_side": pixels, "centre": [row, column]}, "dataset": ...,
                  "step": ..., "sha256": of program.bin, "jax": the version that wrote it}
    program.bin  the program and its weights, serialised by `jax.export.Exported.serialize` and lowered for CPU, CUDA
                 and TPU

`load` reads it with JAX alone (`jax.export` requires the package flatbuffers). A newer JAX reads the file for at least
six months; an older one may not. An ONNX file has no such limit.

`model.onnx` (opset 17; install the extra `onnx`) holds `class_names`, `image_shape`, `dataset` and `step` as JSON in its
metadata, with `resize` and `drawing`. Its graph is converted from the JAX program by `cnn_jax.jaxpr_to_onnx`, whatever the network.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import stat
import struct
import sys
import zipfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cnn_jax import UsageError, __version__, command, files

if TYPE_CHECKING:
  from cnn_jax.run import Run

# Flax, the networks and ONNX are imported where they are used, because `load` must work without them.

_FORMAT = 1
_PLATFORMS = ('cpu', 'cuda', 'tpu')
_MAX_DESCRIPTION = 2**24  # bytes of model.json


@dataclasses.dataclass(frozen=True)
class ExportedModel:
  """A classifier read from a file by `load`.

  Attributes:
    class_names: the classes in the order of the probabilities.
    image_shape: (height, width, channels) of an image.
    resize: how predict brings a picture to that size: crop | pad | stretch; None in a file of version 0.1.
    drawing: size and place of the training images in their frame, if they are light drawings on black; see
      `cnn_jax.data.drawings`.
    program: a jitted JAX function, uint8 (n, *image_shape) -> float32 (n, classes), for n >= 1. Other JAX programs can
      call it. The first call with each n compiles.
  """

  class_names: tuple[str, ...]
  image_shape: tuple[int, int, int]
  program: Callable[[Any], Any]
  resize: str | None = None
  drawing: dict[str, Any] | None = None

  def __call__(self, images: Any) -> np.ndarray:
    """Computes the probabilities of the classes.

    Args:
      images: uint8 (n, *image_shape), n >= 0.

    Returns:
      float32 (n, classes); rows sum to 1.

    Raises:
      UsageError: the images have a different shape or dtype.
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

  The file is a program. Nothing in it runs as Python, but XLA compiles it, and a program that was made to harm XLA can
  end this process or worse: load only files whose authors you trust.

  Args:
    path: the file.

  Raises:
    UsageError: the file cannot be read, is not an exported model, is damaged, or cannot run with this JAX here.
  """
  import jax
  import jax.export

  about, program = _read(path)
  shape = tuple(about['image_shape'])
  try:
    exported = jax.export.deserialize(program)
    call = jax.jit(exported.call)
    call.lower(jax.ShapeDtypeStruct((1, *shape), np.uint8))  # raises now what the first call would
    (images,), (probabilities,) = exported.in_avals, exported.out_avals
    fits = images.shape[1:] == shape and probabilities.shape[1:] == (len(about['class_names']),)
  except Exception as error:  # neither flatbuffers nor JAX checks a program, so a damaged one raises anything
    reason = ' '.join(str(error).split())[:200]
    raise UsageError(
      f'{path} was written with jax {about["jax"]}, and jax {jax.__version__} cannot run it here '
      f'({type(error).__name__}: {reason}); update jax, or export the run again with this version.'
    ) from error
  if not fits:
    raise UsageError(f'{path} is damaged: its program does not fit its description; export the run again.')
  return ExportedModel(tuple(about['class_names']), shape, call, about.get('resize'), about.get('drawing'))


def _read(path: str | os.PathLike) -> tuple[dict[str, Any], bytearray]:
  """The checked description and the program of a `.stablehlo` file."""
  try:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would block
      raise UsageError(f'{path} is not a regular file; give an exported model.')
    with zipfile.ZipFile(path) as archive:
      for name, limit in (('model.json', _MAX_DESCRIPTION), ('program.bin', status.st_size)):
        member = archive.getinfo(name)
        if member.compress_type != zipfile.ZIP_STORED or member.file_size > limit:
          raise ValueError(f'{name} is compressed or too large')
      about, program = json.loads(archive.read('model.json')), bytearray(archive.read('program.bin'))
  except OSError as error:
    raise UsageError(f'{path} cannot be read: {error.strerror or error}.') from error
  except (zipfile.BadZipFile, struct.error, LookupError, ValueError, RuntimeError, EOFError, OverflowError) as error:
    raise UsageError(
      f'{path} is damaged or was not written by cnn_jax.export as .stablehlo; export it again.'
    ) from error
  if not isinstance(about, dict) or about.get('format') != _FORMAT:
    raise UsageError(f'{path} has a format other than {_FORMAT}, the one that cnn_jax {__version__} reads.')
  names, shape = about.get('class_names'), about.get('image_shape')
  if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
    raise UsageError(f'{path} is damaged: class_names in its model.json is not a list of strings; export it again.')
  if not (isinstance(shape, list) and len(shape) == 3 and all(type(side) is int and side > 0 for side in shape)):
    raise UsageError(
      f'{path} is damaged: image_shape in its model.json is not three positive integers; export it again.'
    )
  if 'sha256' in about and about['sha256'] != hashlib.sha256(program).hexdigest():  # version 0.1 wrote none
    raise UsageError(f'{path} is damaged: its program.bin is not as it was written; export it again.')
  if not isinstance(about.get('resize'), str | None) or not isinstance(about.get('drawing'), dict | None):
    raise UsageError(f'{path} is damaged: resize or drawing in its model.json has another type; export it again.')
  about['jax'] = str(about.get('jax'))[:40]
  return about, program


def to_stablehlo(run: Run) -> bytes:
  """Converts a run to the contents of a `.stablehlo` file.

  Args:
    run: a run from `run.load_run`.
  """
  import jax
  import jax.export
  import jax.numpy as jnp

  shape = (*jax.export.symbolic_shape('batch'), *run.image_shape)
  # Source locations would put the paths of this machine into the file, and make its bytes depend on them.
  limit = jax.config.jax_traceback_in_locations_limit
  jax.config.update('jax_traceback_in_locations_limit', 0)
  try:
    exported = jax.export.export(jax.jit(_probabilities(run)), platforms=_PLATFORMS)(
      jax.ShapeDtypeStruct(shape, jnp.uint8)
    )
  finally:
    jax.config.update('jax_traceback_in_locations_limit', limit)
  program = bytes(exported.serialize())
  sha256 = hashlib.sha256(program).hexdigest()
  about = {'format': _FORMAT, **_about(run), 'sha256': sha256, 'jax': jax.__version__}
  contents = io.BytesIO()
  with zipfile.ZipFile(contents, 'w') as archive:
    # A `ZipInfo` that is made from a name has a fixed date.
    archive.writestr(zipfile.ZipInfo('model.json'), json.dumps(about, indent=2) + '\n')
    archive.writestr(zipfile.ZipInfo('program.bin'), program)
  return contents.getvalue()


def to_onnx(run: Run) -> bytes:
  """Converts a run to the contents of an `.onnx` file: input `images`, output `probabilities`.

  Args:
    run: a run from `run.load_run`.

  Raises:
    UsageError: the package onnx is not installed, or the network uses a JAX primitive that has no ONNX equivalent.
  """
  try:
    from onnx import helper
  except ImportError as error:
    raise UsageError("an .onnx file needs the package onnx; run: pip install 'cnn_jax[onnx]'.") from error
  from cnn_jax.jaxpr_to_onnx import convert

  model = convert(_probabilities(run), run.image_shape)
  helper.set_model_props(model, {key: json.dumps(value) for key, value in _about(run).items()})
  return model.SerializeToString(deterministic=True)


def main(argv: Sequence[str]) -> None:
  """Writes the file and prints one line about it; see the docstring of the module."""
  parser = command.Parser('Exports a run as one file: .stablehlo for JAX, .onnx for other runtimes.')
  parser.add_argument('--workdir', type=command.local_path, required=True, help='the run')
  parser.add_argument(
    '--output',
    type=command.local_path,
    required=True,
    help='the file to write; its suffix, .stablehlo or .onnx, is its format',
  )
  parser.add_argument('--checkpoint', default='last', choices=['last', 'best'], help='newest, or best on validation')
  args = parser.parse_args(argv)
  output = pathlib.Path(os.path.expanduser(args.output))
  formats = {'.stablehlo': to_stablehlo, '.onnx': to_onnx}
  if output.suffix not in formats:
    raise UsageError(
      f'--output is {args.output}, whose suffix is not a format; use a name that ends in .stablehlo or .onnx.'
    )
  files.check_output(output)
  from cnn_jax.run import load_run

  run = load_run(args.workdir, args.checkpoint)
  contents = formats[output.suffix](run)
  try:
    files.write_atomically(output, contents)
  except OSError as error:
    raise UsageError(f'{output} cannot be written: {error.strerror or error}.') from error
  shape = 'x'.join(map(str, run.image_shape))
  if run.config.evaluation.views:
    print(
      'note: the run averages over mirrored or shifted views (config.evaluation.views), the exported program does not; '
      'compare it with predict --no-tta.',
      file=sys.stderr,
    )
  print(
    f'{command.printable(str(output))}: {len(run.class_names)} classes, uint8 images of {shape}, step {run.step}, '
    f'{len(contents) / 1e6:.2f} MB'
  )


def _probabilities(run: Run) -> Callable[[Any], Any]:
  """The function that is exported: uint8 images -> float32 probabilities, computed in float32."""
  import jax
  import jax.numpy as jnp

  from cnn_jax import config as config_lib
  from cnn_jax import models
  from cnn_jax.data.augment import normalize

  statistics = config_lib.statistics(run.config.data)
  model = run.model.clone(dtype=jnp.float32)

  def probabilities(images):
    logits, _ = models.infer(model, run.variables, normalize(images, statistics))
    return jax.nn.softmax(logits)

  return probabilities


def _about(run: Run) -> dict[str, Any]:
  return {
    'class_names': list(run.class_names),
    'image_shape': list(run.image_shape),
    'resize': run.config.data.resize,
    'drawing': run.drawing,
    'dataset': run.dataset,
    'step': run.step,
  }


if __name__ == '__main__':
  command.run(main)
