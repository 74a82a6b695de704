"""Whether a training step fits into the memory of a device: an estimate before the first one, and what helps."""

import contextlib
import dataclasses
import math
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import Mesh, PartitionSpec

from cnn_jax import UsageError, distribute

# Arrays of the size of its output that a layer keeps for its gradient, with its norm and activation, at most.
_ARRAYS_PER_LAYER = 6
_COMPUTED_AGAIN = ('checkpoint', 'remat', 'remat2')  # names of the operation in versions of JAX


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Bytes of each device.

  Attributes:
    state: parameters, running statistics, state of the optimizer and averages.
    gradients: of the parameters, and their sum over parts of a batch.
    activations: what the forward pass of a part keeps for the backward pass.
    inputs: the augmented images of a batch.
  """

  state: int
  gradients: int
  activations: int
  inputs: int

  @property
  def step(self) -> int:
    """What a step needs beside the state."""
    return self.gradients + self.activations + self.inputs


def estimate(made: Any, input_shape: tuple[int, ...], batch_size: int, num_parts: int, **fields: Any) -> Estimate:
  """Estimates the memory of a training step; traces the network, but compiles nothing.

  What XLA keeps for itself, such as the scratch space of convolutions, is not counted, nor is what it saves by fusing.

  Args:
    made: `plan.Plan`.
    input_shape: of one example: (height, width, channels), or the maps at the frozen boundary.
    batch_size: examples of one device.
    num_parts: of the batch, one after another.
    fields: of the network, to be changed, such as `rematerialize`.
  """
  model = made.step.keywords['model'].clone(**fields)
  gradients = _num_bytes(made.state.params) * (1 if num_parts == 1 else 2)
  inputs = 4 * batch_size * math.prod(input_shape)
  shape = (batch_size // num_parts, *input_shape)
  variables = {'params': made.state.params, 'batch_stats': made.state.batch_stats}
  return Estimate(_num_bytes(made.state), gradients, saved_bytes(model, variables, shape), inputs)


def saved_bytes(model: Any, variables: Any, shape: tuple[int, ...]) -> int:
  """The bytes that the forward pass keeps for the backward pass, without parameters and images; computes nothing.

  What the backward pass keeps while it computes the largest of the blocks again is included.

  Args:
    model: from `models.create`.
    variables: `{'params', 'batch_stats'}`, as arrays or shapes.
    shape: of the input, (batch, ...).
  """
  found: list[int] = []

  def trace(variables, images, positions, key):
    def loss(params):
      (logits, _), updated = model.apply(
        {'params': params, 'batch_stats': variables['batch_stats']},
        images,
        train=True,
        positions=positions,
        mutable=['batch_stats'],
        rngs={'dropout': key},
      )
      return jnp.sum(jax.nn.log_softmax(logits)), updated

    program = jax.make_jaxpr(loss)(variables['params'])
    blocks = [equation for equation in program.jaxpr.eqns if equation.primitive.name in _COMPUTED_AGAIN]
    found.append(_kept(lambda params: loss(params)[0], variables['params']))
    found.append(max(map(_kept_by_block, blocks), default=0))
    return 0

  # The axis of batch norm, on one device.
  mesh = Mesh(np.array(jax.local_devices()[:1]), (distribute.AXIS,))
  every = PartitionSpec()
  traced = jax.shard_map(trace, mesh=mesh, in_specs=(every,) * 4, out_specs=every, check_vma=False)
  shapes = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:1], jnp.int32)
  jax.eval_shape(traced, variables, *shapes, jax.random.key(0))
  return sum(found)


def warn(config: Any, made: Any, image_shape: tuple[int, ...]) -> None:
  """Prints a warning if a step does not fit into the free memory; call it when the images and the state are in place.

  Args:
    config, made, image_shape: see `describe`.
  """
  if (
    distribute.is_primary()
    and (free := free_bytes()) is not None
    and (line := describe(config, made, image_shape, free))
  ):
    print(f'warning: {line}', file=sys.stderr)


def describe(config: Any, made: Any, image_shape: tuple[int, ...], free: int) -> str:
  """A sentence about a step that does not fit into the free memory, and what helps; '' if it fits.

  A network that needs little by a rough bound is not traced.

  Args:
    config: of the run.
    made: `plan.Plan`.
    image_shape: (height, width, channels).
    free: bytes.
  """
  input_shape = made.boundary.shape if made.boundary else image_shape
  batch_size, num_parts = config.batch_size // jax.device_count(), made.step.keywords['num_parts']
  if _bound(made.state.params, input_shape, batch_size // num_parts, batch_size) < free:
    return ''
  needs = estimate(made, input_shape, batch_size, num_parts)
  if needs.step <= free:
    return ''
  again = None if config.model.rematerialize else estimate(made, input_shape, batch_size, num_parts, rematerialize=True)
  helps = ['config.model.rematerialize=True'] if again and again.step <= free else []
  for size, also in ((needs, ''), (again, ' with config.model.rematerialize=True')):
    if size and (parts := _fitting_parts(size, free, batch_size, num_parts)) and len(helps) < 2:
      helps.append(f'config.optimizer.accumulate_steps={parts}{also}')
  shown = ', '.join(f'{name} {value / 1e9:.2f}' for name, value in dataclasses.asdict(needs).items() if name != 'state')
  return (
    f'a training step needs about {needs.step / 1e9:.2f} GB on each device ({shown}; the state takes '
    f'{needs.state / 1e9:.2f} GB), but {free / 1e9:.2f} GB are free; if it fails, set '
    f'{" or ".join([*helps, "a smaller config.batch_size"])}.'
  )


@contextlib.contextmanager
def explained(config: Any) -> Iterator[None]:
  """Turns an error of XLA about memory into a `UsageError` that names the settings that help."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    text = ' '.join(str(error).split())
    if not (text.startswith('RESOURCE_EXHAUSTED') or 'out of memory' in text.lower()):  # INTERNAL on a CPU
      raise
    reason = text.partition(': ')[2][:200]
    again = '' if config.model.rematerialize else 'set config.model.rematerialize=True, '
    raise UsageError(
      f'the memory of the device is not enough ({reason.rstrip(".")}); {again}raise config.optimizer.accumulate_steps, which '
      f'is {config.optimizer.accumulate_steps}, or lower config.batch_size; if the evaluation fails, lower '
      'config.evaluation.batch_size.'
    ) from error


def free_bytes() -> int | None:
  """The memory of a device that is free, in bytes; None if it is unknown."""
  device = jax.local_devices()[0]
  stats = device.memory_stats() or {}
  if 'bytes_limit' in stats:
    return stats['bytes_limit'] - stats.get('bytes_in_use', 0)
  if device.platform != 'cpu':
    return None
  found = [_available(), *_limits_of_groups()]
  known = [free for free in found if free is not None]
  return min(known) // jax.local_device_count() if known else None


def _available() -> int | None:
  """The memory that Linux can give to new programs."""
  with contextlib.suppress(OSError, ValueError, IndexError):
    for line in pathlib.Path('/proc/meminfo').read_text().splitlines():
      if line.startswith('MemAvailable:'):
        return 1024 * int(line.split()[1])
  return None


def _limits_of_groups() -> Iterator[int | None]:
  """What is left of the limits of the control groups of this process, as of a container or a job of a scheduler."""
  with contextlib.suppress(OSError, ValueError):
    for line in pathlib.Path('/proc/self/cgroup').read_text().splitlines():
      _, controllers, place = line.split(':', 2)
      if controllers not in ('', 'memory'):
        continue
      root = pathlib.Path('/sys/fs/cgroup', controllers)
      limit, used = (
        ('memory.limit_in_bytes', 'memory.usage_in_bytes') if controllers else ('memory.max', 'memory.current')
      )
      folder = root / place.lstrip('/')
      for group in (folder, *folder.parents):
        if root in (group, *group.parents):
          yield _left(group, limit, used)


def _left(group: pathlib.Path, limit: str, used: str) -> int | None:
  with contextlib.suppress(OSError, ValueError):  # 'max': no limit
    left = int((group / limit).read_text()) - int((group / used).read_text())
    for line in (group / 'memory.stat').read_text().splitlines():
      if line.startswith('inactive_file '):  # pages of files, which are dropped if memory is needed
        left += int(line.split()[1])
    return left
  return None


def _bound(params: Any, input_shape: tuple[int, ...], part: int, batch_size: int) -> int:
  """More bytes than a step needs, as if every layer had the resolution of the images."""
  pixels = math.prod(input_shape[:-1]) if len(input_shape) == 3 else 1
  features = sum(leaf.shape[-1] for leaf in jax.tree.leaves(params) if leaf.ndim > 1) + input_shape[-1]
  return 4 * (_ARRAYS_PER_LAYER * part * pixels * features + batch_size * math.prod(input_shape)) + 3 * _num_bytes(
    params
  )


def _fitting_parts(size: Estimate, free: int, batch_size: int, num_parts: int) -> int | None:
  """The fewest parts that fit: a part needs memory in proportion to its examples."""
  rest = size.inputs + 2 * size.gradients // (1 if num_parts == 1 else 2)
  activations = size.activations * num_parts
  fitting = (n for n in range(num_parts + 1, batch_size + 1) if batch_size % n == 0 and rest + activations // n <= free)
  return next(fitting, None)


def _num_bytes(tree: Any) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _kept(function: Callable, *arguments: Any) -> int:
  """The bytes that the gradient of a function keeps, beside its arguments."""
  program = jax.make_jaxpr(lambda *arguments: jax.tree.leaves(jax.vjp(function, *arguments)[1]))(*arguments).jaxpr
  given = {*program.invars, *program.constvars}
  kept = {var for var in program.outvars if not isinstance(var, core.Literal) and var not in given}
  return sum(_size(var.aval) for var in kept)


def _kept_by_block(equation: Any) -> int:
  """The same of a block that is computed again."""
  function = core.jaxpr_as_fun(core.ClosedJaxpr(equation.params['jaxpr'], ()))
  arguments = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in equation.invars]
  return _kept(function, *arguments)


def _size(array: Any) -> int:
  return math.prod(array.shape) * getattr(array.dtype, 'itemsize', 8)  # keys of random numbers have none
