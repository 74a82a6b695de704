"""A part: the device with its versions and its ceilings, and two faults of XLA's convolutions on a GPU.

The ceilings are the rates of a large matrix product and of a copy, with random numbers. The faults are those of
jax-ml/jax issue 37922, convolutions in bfloat16 for which no algorithm is found, and openxla/xla issue 34273, gradients
of convolutions that are 30 times slower than in PyTorch.
"""

import functools
import importlib.metadata
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import results
from benchmarks.accelerator import part
from cnn_jax import command

_PACKAGES = ('jax-cuda13-plugin', 'jax-cuda12-plugin', 'nvidia-cudnn-cu13', 'nvidia-cudnn-cu12', 'libtpu', 'torch')


def main(argv: Sequence[str]) -> None:
  """Adds a row about the device, one per ceiling and one per fault."""
  parser = part.parser(__doc__)
  parser.add_argument('--only-about', action='store_true', help='measure nothing')
  args = parser.parse_args(argv)
  rows = part.Rows(args.output, args.seconds)
  command.prepare_backend()
  about = results.describe()
  about.pop('command')
  platform = jax.default_backend()
  small = args.small or platform == 'cpu'
  rows.add(what='device', platform=platform, small=small, **about, driver=_driver(), packages=_packages())
  if args.only_about:
    return
  size = 512 if small else 8192
  for dtype, precision in (('bfloat16', 'default'), ('float32', 'default'), ('float32', 'highest')):
    rows.attempt(
      functools.partial(_product, size, dtype, precision), what=f'matrix product {size}, {dtype}, precision {precision}'
    )
  rows.attempt(functools.partial(_copy, 2**22 if small else 2**30), what='copy, bytes read and written')
  for name, convolve in _faults(small).items():
    if rows.left() < 0:
      break
    rows.attempt(convolve, what=name)


def median_ms(run: Callable[[], Any], repeats: int = 10) -> float:
  """The median time of a function that returns arrays of the device, after one untimed call."""
  jax.block_until_ready(run())
  times = []
  for _ in range(repeats):
    started = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - started)
  return 1e3 * statistics.median(times)


def _product(size: int, dtype: str, precision: str) -> dict[str, float]:
  a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
  ms = median_ms(functools.partial(jax.jit(functools.partial(jnp.matmul, precision=precision)), a, b))
  return {'ms': ms, 'tflops': 2 * size**3 / ms / 1e9}


def _copy(count: int) -> dict[str, float]:
  a = jax.random.bits(jax.random.key(0), (count // 4,), jnp.uint32)
  ms = median_ms(functools.partial(jax.jit(lambda x: x ^ 1), a))
  return {'ms': ms, 'gb_per_second': 2 * count / ms / 1e6}


def _faults(small: bool) -> dict[str, Callable[[], dict[str, Any]]]:
  """The convolutions of the two reports, and the strided ones of ResNet-50, whose gradients are of the same kind."""
  batch, side, space = (2, 16, 8) if small else (256, 56, 64)
  images = ((batch, side, side, 128), (3, 3, 128, 128), ('NHWC', 'HWIO', 'NHWC'))
  volumes = ((1, space, space, space, 32), (3, 3, 3, 32, 64), ('NDHWC', 'DHWIO', 'NDHWC'))
  faults: dict[str, Callable[[], dict[str, Any]]] = {'1D bfloat16, stride and dilation 2 (jax 37922)': _dilated}
  dtypes = ('bfloat16', 'float32')
  for dtype in dtypes:
    faults[f'2D stride 2, gradients, {dtype} (ResNet-50)'] = functools.partial(_gradient, dtype, *images, strides=2)
  for dtype in dtypes:  # last, since they take longest
    name = f'3D transposed, stride 2, gradients, {dtype} (xla 34273)'
    faults[name] = functools.partial(_gradient, dtype, *volumes, dilation=2)
  return faults


def _dilated() -> dict[str, Any]:
  def convolve(dtype: Any) -> jax.Array:
    x = jax.random.normal(jax.random.key(0), (2, 4, 16)).astype(dtype)
    kernel = jax.random.normal(jax.random.key(1), (16, 4, 3)).astype(dtype)
    return lax.conv_general_dilated(
      x, kernel, (2,), 'SAME', rhs_dilation=(2,), dimension_numbers=('NCH', 'OIH', 'NCH')
    ).astype(jnp.float32)

  exact = convolve(jnp.float32)
  return {'difference': float(jnp.abs(convolve(jnp.bfloat16) - exact).max() / jnp.abs(exact).max())}


def _gradient(
  dtype: str,
  shape: tuple[int, ...],
  kernel_shape: tuple[int, ...],
  numbers: tuple[str, str, str],
  strides: int = 1,
  dilation: int = 1,
) -> dict[str, float]:
  """The time of both gradients of a convolution, and the rate of its multiplications and additions."""
  x = jax.random.normal(jax.random.key(0), shape, dtype)
  kernel = jax.random.normal(jax.random.key(1), kernel_shape, dtype)
  spatial = len(shape) - 2
  padding = [(1, 1)] * spatial if dilation == 1 else [(1, 2)] * spatial

  def convolve(x, kernel):
    return lax.conv_general_dilated(
      x, kernel, (strides,) * spatial, padding, (dilation,) * spatial, dimension_numbers=numbers
    )

  outputs = jax.eval_shape(convolve, x, kernel)
  cotangent = jax.random.normal(jax.random.key(2), outputs.shape, dtype)
  gradients = jax.jit(lambda x, kernel, cotangent: jax.vjp(convolve, x, kernel)[1](cotangent))
  ms = median_ms(functools.partial(gradients, x, kernel, cotangent))
  # Each element of the kernel meets each output, but the zeros between the dilated inputs, once per gradient.
  products = 2 * kernel.size * outputs.size // kernel_shape[-1] // dilation**spatial
  return {'ms': ms, 'tflops': 2 * products / ms / 1e9}


def _driver() -> str | None:
  try:
    done = subprocess.run(
      ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'], capture_output=True, text=True, check=True
    )
  except (OSError, subprocess.SubprocessError):
    return None
  return done.stdout.split()[0] if done.stdout.split() else None


def _packages() -> dict[str, str]:
  found = {}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


if __name__ == '__main__':
  command.run(main)
