"""The networks. Each file of this folder is one; nothing else in the code base knows the names of its layers.

`cnn_jax/models/NAME.py`, chosen by `config.model.name = 'NAME'`, defines

    default_config() -> ConfigDict              the other fields of `config.model`, each with a comment
    RULES: dict[str, tuple | str]               which values they may have; see `cnn_jax.config.check`
    create(config, num_classes) -> nn.Module    the network that the section `config.model` describes

if some of its first weights are computed from training images,

    initialize(config, variables, images) -> variables      from those of `init` and normalised float32 images

and, if other libraries have weights for it,

    foreign_names(config) -> {library: {its name: (path, order)}}   the variable at `path` in `{'params', 'batch_stats'}` is
                                                 `tensor.transpose(order)`, without trailing axes of length one
    ARCHITECTURES: dict[str, dict]              the names of its variants in timm, and their fields of `config.model`
    LEVELS: tuple[tuple, tuple]                 the mean and the standard deviation with which they normalise, in levels

The module maps float images (batch, height, width, channels), normalised, to `(logits, maps)`:

    logits, maps = module.apply(variables, images, train=False, positions=None)

- `logits`: float32 (batch, num_classes).
- `maps`: an ordered dict of intermediate results: `stage1`, `stage2`, ... (batch, height, width, channels), from the
  image on; `pooled` (batch, features), the input of the head; `logits`. `jit` drops what nobody uses.
- `train`: whether to use the statistics of the batch, synchronised over the axis `batch`, and to drop units.
- `positions`: int32 (batch,), of the images in the global batch; whatever is random is keyed by them, so that it does
  not depend on the number of devices.
- The last layer is called `head`: a dense layer or a 1x1 convolution with a `kernel` and a `bias`.
- The fields `num_classes` and `dtype` (of the arithmetic; parameters stay float32) are there under these names. The
  field `frozen_stages` says how many stages, from the first on, run with `train=False` and without gradients.
- The field `rematerialize` says whether the blocks keep only their inputs for the gradient, which computes the rest again.
- A field `pooled_stages` says of how many of the last stages `pooled` holds the averages; without it, of the last alone.
- The field `skipped_stages` of the module, 0 in `create`, says how many stages, from the first on, are left out: `images`
  are then the maps of the last of them, or `pooled` if all are left out. The variables are those of the whole network.
- Batch norm uses the running statistics in training too if `fixed_statistics` is True.
- A field or property `fixed_parameters` holds the paths of the parameters that no optimizer may change, such as
  `{('stem', 'kernel')}`; without it, there are none.
- Convolutions and norms are those of `flax.linen`, at most with another function inside, so that the layer table and
  the receptive field find them by type.
"""

import functools
import importlib
import pkgutil
from collections.abc import Collection, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend import core
from ml_collections import ConfigDict

from cnn_jax import UsageError

_NOT_NETWORKS = {'layers'}
_DEEP = 20  # kernels


def names() -> list[str]:
  """The networks that there are."""
  return sorted({module.name for module in pkgutil.iter_modules(__path__)} - _NOT_NETWORKS)


def default_config(name: str) -> ConfigDict:
  """The section `config.model` of a network, with its defaults.

  Args:
    name: of a file of this folder.

  Raises:
    UsageError: there is no such network.
  """
  return ConfigDict({'name': name, **_module(name).default_config().to_dict()})


def rules(name: str) -> dict[str, Any]:
  """The values that the fields of a network may have; see `cnn_jax.config.check`."""
  return _module(name).RULES


def create(config: Any, num_classes: int) -> nn.Module:
  """Makes the network that `config.model` describes.

  Args:
    config: the section `config.model`, checked.
    num_classes: outputs of the head.
  """
  return _module(config.name).create(config, num_classes)


def foreign_names(config: Any) -> dict[str, dict[str, tuple[tuple[str, ...], tuple[int, ...]]]]:
  """The names that other libraries give to the variables of a network; see above.

  Args:
    config: the section `config.model`.

  Returns:
    {library: {its name: (path in `{'params', 'batch_stats'}`, order of its axes here)}}, empty if there are none. Each
    covers every variable once. PyTorch's `num_batches_tracked` has no counterpart.
  """
  module = _module(config.name)
  return module.foreign_names(config) if hasattr(module, 'foreign_names') else {}


def foreign_levels(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """The mean and the standard deviation, in levels, with which the weights of other libraries expect images.

  Args:
    name: of a network; one that other libraries do not have counts as normalised to -1 to 1.
  """
  return getattr(_module(name), 'LEVELS', ((127.5,), (127.5,)))


def architectures() -> dict[str, tuple[str, dict[str, Any]]]:
  """timm's names of the networks: {its name: (ours, the fields of `config.model`)}."""
  return {
    theirs: (name, fields) for name in names() for theirs, fields in getattr(_module(name), 'ARCHITECTURES', {}).items()
  }


def init(model: nn.Module, key: jax.Array, image_shape: Sequence[int], *, head_only: bool = False) -> dict[str, Any]:
  """Initialises a network: `{'params', 'batch_stats'}`, the latter empty if it has no running statistics.

  Args:
    model: from `create`.
    key: of the random numbers.
    image_shape: (height, width, channels).
    head_only: whether all but the head is zero, because trained weights take its place. The random numbers of a deep
      network take seconds to compile.
  """
  if head_only:
    features = map_shapes(model, image_shape)
    head = model.clone(skipped_stages=len(stage_names(features))).init(key, jnp.zeros(features['pooled'].shape))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), init_shapes(model, image_shape))
    return zeros | {'params': zeros['params'] | {'head': head['params']['head']}}
  kernels = sum(len(x.shape) > 1 for x in jax.tree.leaves(init_shapes(model, image_shape)))
  # XLA:CPU takes 46 s for the random numbers of a ResNet-50, and 4 s without optimisation, which changes the last bits.
  traced = isinstance(key, jax.core.Tracer)  # nothing is compiled here then, and options would be refused
  deep = jax.default_backend() == 'cpu' and kernels >= _DEEP and not traced
  options = {'xla_backend_optimization_level': 0} if deep else None
  variables = jax.jit(model.init, compiler_options=options)(key, jnp.zeros((1, *image_shape), jnp.float32))
  return {'params': variables['params'], 'batch_stats': variables.get('batch_stats', {})}


def depends_on_data(config: Any) -> bool:
  """Whether `initialize` changes the variables of a network."""
  return hasattr(_module(config.name), 'initialize')


def initialize(config: Any, variables: dict[str, Any], images: jax.Array) -> dict[str, Any]:
  """The variables of a network before training, with those that are computed from training images.

  Args:
    config: the section `config.model`.
    variables: from `init`.
    images: float32 (n, height, width, channels), normalised.
  """
  return _module(config.name).initialize(config, variables, images) if depends_on_data(config) else variables


def init_shapes(model: nn.Module, image_shape: Sequence[int]) -> dict[str, Any]:
  """What `init` returns, as shapes and dtypes; computes nothing."""
  return jax.tree.map(lambda shape: shape, _init_shapes(model, tuple(image_shape)))


def infer(model: nn.Module, variables: Any, images: jax.Array) -> Any:
  """Applies a trained network at full float32 precision on every device, as each command that reports numbers does.

  By default a GPU rounds the factors of a product to 10 bits and a TPU to 7, which leaves about 3 digits. Training uses
  that default.

  Args:
    model: from `create`.
    variables: `{'params', 'batch_stats'}`.
    images: float (batch, height, width, channels), normalised.

  Returns:
    (logits, maps), as the network does.
  """
  with jax.default_matmul_precision('highest'):
    return model.apply(variables, images, train=False)


def map_shapes(model: nn.Module, image_shape: Sequence[int]) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes of the maps of one image: `stage1`, ..., `pooled`, `logits`; computes nothing.

  `jit` and `eval_shape` return dicts in the order of their sorted keys; here the stages come in theirs.
  """
  maps = _map_shapes(model, tuple(image_shape))
  return {name: maps[name] for name in [*stage_names(maps), 'pooled', 'logits']}


def stage_names(maps: Any) -> list[str]:
  """`stage1`, `stage2`, ..., as many as there are in a dict of maps, from the image on."""
  return [f'stage{i}' for i in range(1, 1 + sum(name.startswith('stage') for name in maps))]


def num_parameters(params: Any) -> int:
  """How many numbers a tree of arrays holds."""
  return sum(p.size for p in jax.tree.leaves(params))


def parameters_by_stage(model: nn.Module, image_shape: Sequence[int]) -> Any:
  """Which stage each parameter belongs to: the first one whose maps depend on it.

  The dependence is read off the program that computes the maps, so that no layer is known by name.

  Args:
    model: from `create`.
    image_shape: (height, width, channels).

  Returns:
    A tree like `params` of numbers from 1 on. The parameters between the last stage's maps and `pooled` belong to that
    stage; the head's have one more than there are stages.
  """
  variables = init_shapes(model, image_shape)
  images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)

  def ends(params, batch_stats, images):
    """The last maps of each stage; those of the last stage include `pooled`."""
    maps = model.apply({'params': params, 'batch_stats': batch_stats}, images, train=False)[1]
    return [maps[name] for name in [*stage_names(maps)[:-1], 'pooled']]

  program = jax.make_jaxpr(ends)(variables['params'], variables['batch_stats'], images).jaxpr
  params = program.invars[: len(jax.tree.leaves(variables['params']))]
  belongs = [len(program.outvars) + 1] * len(params)
  for stage in range(len(program.outvars), 0, -1):
    needed = _inputs_of(program, program.outvars[stage - 1])
    belongs = [stage if var in needed else other for var, other in zip(params, belongs, strict=True)]
  return jax.tree.unflatten(jax.tree.structure(variables['params']), belongs)


def trained_by_stage(model: nn.Module, image_shape: Sequence[int]) -> Any:
  """`parameters_by_stage`, with 0 instead of the stage for each of the network's `fixed_parameters`."""
  fixed = fixed_parameters(model)

  def stage(path: Any, number: int) -> int:
    return 0 if tuple(key.key for key in path) in fixed else number

  return jax.tree_util.tree_map_with_path(stage, parameters_by_stage(model, image_shape))


def fixed_parameters(model: nn.Module) -> Collection[tuple[str, ...]]:
  """The paths of the parameters that no optimizer may change."""
  return getattr(model, 'fixed_parameters', ())


def check_images(
  config: Any, num_classes: int, image_shape: Sequence[int], field: str = 'config.data.image_size'
) -> int:
  """Checks a network against the images that it is to classify; computes nothing.

  Args:
    config: the section `config.model`, checked.
    num_classes: outputs of the head.
    image_shape: (height, width, channels).
    field: that sets the size, for messages.

  Returns:
    The number of stages.

  Raises:
    UsageError: the images are so small that a stage has no pixels, or fewer stages than are to be frozen.
  """
  model = create(config, num_classes)
  height, width, channels = image_shape

  def fits(height: int, width: int) -> bool:
    try:
      return all(shape.size for shape in map_shapes(model, (height, width, channels)).values())
    except (ValueError, TypeError, ZeroDivisionError):  # what Flax and JAX raise for negative and empty shapes
      return False

  if not fits(height, width):
    least = next((side for side in range(min(height, width), 2049) if fits(side, side)), None)
    needs = f'needs images of at least {least} pixels a side' if least else 'fits no image'
    raise UsageError(
      f'the network of config.model {needs}, but these have {height}x{width}; '
      f'use one with fewer stages, or a larger {field}.'
    )
  stages = stage_names(map_shapes(model, image_shape))
  if config.frozen_stages > len(stages):
    raise UsageError(
      f'config.model.frozen_stages is {config.frozen_stages} but the network has {len(stages)} stages; '
      'freeze at most that many.'
    )
  return len(stages)


# Tracing a deep network takes a second, and several parts ask for the same shapes.
@functools.lru_cache(8)
def _init_shapes(model: nn.Module, image_shape: tuple[int, ...]) -> Any:
  variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
  return {'params': variables['params'], 'batch_stats': variables.get('batch_stats', {})}


@functools.lru_cache(8)
def _map_shapes(model: nn.Module, image_shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
  images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  return jax.eval_shape(lambda v, x: model.apply(v, x)[1], _init_shapes(model, image_shape), images)


def _module(name: str) -> Any:
  known = names()
  if name not in known:
    raise UsageError(f'config.model.name is {name!r}; it must be one of: {", ".join(known)}.')
  return importlib.import_module(f'{__name__}.{name}')


def _inputs_of(program: Any, output: Any) -> set[Any]:
  """The variables of a program that an output depends on."""
  needed = {output}
  for equation in reversed(program.eqns):
    if needed.intersection(equation.outvars):
      needed.update(var for var in equation.invars if not isinstance(var, core.Literal))
  return needed
