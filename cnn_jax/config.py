"""Config files and overrides of their fields, and the checks that run before anything slow starts."""

import importlib.util
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from cnn_jax import UsageError, files, models, rules, shares
from cnn_jax.data import augment
from cnn_jax.data.augment import Statistics
from cnn_jax.fields import RULES
from cnn_jax.fields import default_config as default_config
from cnn_jax.small_sets import adapt as adapt

TRACKERS = ('wandb', 'mlflow')

# Names that fields had in version 0.1, which wrote them into config.json.
_RENAMED = {'model.frozen_blocks': 'model.frozen_stages'}


def load(path: str, arguments: Sequence[str] = ()) -> ConfigDict:
  """Reads a config file, which is Python and is executed, and applies overrides.

  Args:
    path: of the file, which defines `get_config()`. `FILE:NAME` calls `get_config('NAME')`, a variant of the experiment.
    arguments: `--config.FIELD=VALUE`, or the same as two arguments. Of several for one field, the last one counts.
      `--config.model.name=NAME` replaces the section `model` by the defaults of another network.

  Returns:
    The config, checked and locked.

  Raises:
    UsageError: the file is missing or fails, an argument is not an override, or a field or its value is wrong.
  """
  file, _, variant = path.partition(':')
  file = files.local_path(file)
  if not pathlib.Path(file).is_file():
    raise UsageError(f'there is no config file {file}; those that come with the project are in configs/.')
  try:
    spec = importlib.util.spec_from_file_location('cnn_jax_config_file', file)
    assert spec is not None and spec.loader is not None, 'it does not end in .py'
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(variant) if variant else module.get_config()
    if not isinstance(config, ConfigDict):
      raise TypeError(f'get_config() returned a {type(config).__name__}; it must return a ConfigDict')
    return override(config, arguments)
  except UsageError as error:
    raise UsageError(f'{path}: {error}') from error
  except (Exception, SystemExit) as error:  # whatever a config file raises is a mistake in that file
    raise UsageError(f'{path}: {type(error).__name__}: {error}') from error


def override(config: ConfigDict, arguments: Sequence[str]) -> ConfigDict:
  """A checked copy of a config with some fields set by arguments; see `load`."""
  by_field: dict[str, str] = {}
  rest = list(arguments)
  while rest:
    argument = rest.pop(0)
    if not argument.startswith(('--config.', '--noconfig.')):
      raise UsageError(f'{argument!r} is not an argument; see --help. A field is set by --config.NAME=VALUE.')
    flag, equals, _ = argument.partition('=')
    if not equals and rest and not rest[0].startswith('--'):
      argument = f'{flag}={rest.pop(0)}'
    by_field[flag.removeprefix('--no').removeprefix('--').removeprefix('config.')] = argument
  made = _with_network(config, by_field.pop('model.name', '').partition('=')[2])
  argv, values = ['cnn_jax', *by_field.values()], flags.FlagValues()
  try:
    holder = config_flags.DEFINE_config_dict('config', made, flag_values=values, sys_argv=argv)
    values(argv)
    made = holder.value
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, SyntaxError) as error:
    # The message of ml_collections names the field and the field whose name is most similar.
    raise UsageError(_one_line(error.__cause__ or error)) from error
  _expand_paths(made)
  check(made)
  return made


def vary(config: ConfigDict, fields: Mapping[str, Any]) -> ConfigDict:
  """A checked copy of a config with some fields set, given as {'model.features': (32, 64)}.

  Raises:
    UsageError: names the field that is wrong.
  """
  made = _with_network(config, fields.get('model.name', ''))
  for field, value in fields.items():
    try:
      made.update_from_flattened_dict({field: value})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      raise UsageError(f'config.{field}: {_one_line(error)}') from error
  _expand_paths(made)
  check(made)
  return made


def from_record(values: Mapping[str, Any]) -> ConfigDict:
  """The config that a workdir holds, complete; a field that is newer than the run has its default.

  Args:
    values: the contents of config.json, which an earlier version may have written.

  Raises:
    UsageError: a section is not an object, or there is no such network.
  """
  for section, default in default_config().items():
    if isinstance(default, ConfigDict) and not isinstance(values.get(section, {}), Mapping):
      raise UsageError(f'config.{section} is {values[section]!r}; it must be an object.')
  values = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
  for old, new in _RENAMED.items():
    section, _, field = old.partition('.')
    if field in values.get(section, {}):
      values[section][new.partition('.')[2]] = values[section].pop(field)
  # Version 0.1 had one network and did not name it.
  base = default_config(values.get('model', {}).get('name', 'cnn')).to_dict()
  try:
    return ConfigDict(_overlay(base, values))
  except (AttributeError, TypeError, ValueError) as error:  # ml_collections raises those for hostile names
    raise UsageError(_one_line(error)) from error


def check(config: ConfigDict) -> None:
  """Checks names, types and values of a config against the base.

  Args:
    config: what a config file and the command line made.

  Raises:
    UsageError: names the first field that is unknown (and the field whose name is most similar), missing, of
      another type than the base's, or impossible.
  """
  model = config.get('model')
  name = model.get('name') if isinstance(model, ConfigDict) else None
  rules.check_fields(config, default_config(name if isinstance(name, str) else 'cnn'))
  rule_of = RULES | {f'model.{field}': rule for field, rule in models.rules(config.model.name).items()}
  for field, value in leaves(config):
    rules.check_value(f'config.{field}', value, rule_of.get(field))
  rules.check_statistics(config.data, config.data.channels)
  rules.check_class_weights(config)
  rules.check_stage_rates(config.optimizer.stage_rates)
  rules.check_sizes(config)
  for place in (config.data.dir, config.init_from):
    if '://' in place:
      files.local_path(place)  # raises
  for tracker in config.log.trackers:
    if tracker not in TRACKERS:
      raise UsageError(f'config.log.trackers holds {tracker!r}; the trackers are: {", ".join(TRACKERS)}.')
  if config.evaluation.views and not (config.augment.flip or config.augment.shift):
    raise UsageError(
      'config.evaluation.views averages over flips and shifts, but config.augment has neither; turn one of them on.'
    )
  if config.augment.alternate and config.fine_tuning.views:
    raise UsageError(
      'config.augment.alternate tells epochs apart, but the maps of config.fine_tuning.views are of random flips; turn '
      'one of them off.'
    )
  if config.augment.alternate and not config.augment.flip:
    raise UsageError('config.augment.alternate says which epochs mirror an image; it needs config.augment.flip=True.')
  if not config.min_steps:  # otherwise the number of epochs depends on the data; see `check_data`
    _check_warmup(config, config.epochs)


def statistics(config_data: ConfigDict) -> Statistics:
  """How images of the data set become the network's input, as every reader of a run must do it.

  Args:
    config_data: the section `config.data`, checked.
  """
  mean, std = (tuple(float(x) for x in values) for values in (config_data.mean, config_data.std))
  return Statistics(mean or (127.5,), std or (127.5,), config_data.image_size if config_data.canvas_size else 0)


def input_shape(config: ConfigDict, image_shape: Sequence[int], *, training: bool = False) -> tuple[int, int, int]:
  """The shape of the network's input: (height, width, channels).

  Args:
    config: checked.
    image_shape: of the images of the data set, likewise.
    training: whether the input in training is meant; otherwise, and by default, that of everything else.
  """
  return augment.input_shape(image_shape, statistics(config.data), config.augment if training else None)


def _one_line(error: BaseException) -> str:
  return ' '.join(str(error.args[0] if error.args else error).split())


def _expand_paths(config: ConfigDict) -> None:
  if isinstance(path := config.get('init_from'), str):
    config.init_from = files.local_path(path)


def _check_warmup(config: ConfigDict, epochs: int) -> None:
  if config.schedule.name != 'constant' and config.schedule.warmup_epochs >= epochs:
    raise UsageError(
      f'config.schedule.warmup_epochs is {config.schedule.warmup_epochs} of {epochs} epochs; '
      'the warm-up must end before the training does.'
    )


def _with_network(config: ConfigDict, name: str) -> ConfigDict:
  """A locked copy of a config, with the defaults of another network if a name is given that is not the config's."""
  made = config.copy_and_resolve_references()
  if name and name != config.model.name:
    made = ConfigDict(made.to_dict() | {'model': models.default_config(name).to_dict()})
  return made.lock()


def check_devices(config: ConfigDict, num_devices: int) -> None:
  """Checks what only training needs: seeds that JAX tells apart, batches that divide over all devices, processes that fit.

  Raises:
    UsageError: a seed has more than 32 bits; there are far more processes than cores; or names the nearest batch sizes,
      or numbers of parts, that divide.
  """
  if config.seed + config.seeds > 2**32:  # `jax.random.key` drops the other bits, or fails
    raise UsageError(
      f'config.seed is {config.seed}, for {config.seeds} {"seed" if config.seeds == 1 else "seeds"}; the last one must '
      f'be less than {2**32}.'
    )
  shares.check_processes('config.data.workers', config.data.workers)
  size = config.batch_size
  if size % num_devices:
    below, above = size // num_devices * num_devices, -(-size // num_devices) * num_devices
    nearest = f'{below} or {above}' if below else f'{above}'
    raise UsageError(
      f'config.batch_size is {size}, which does not divide over {num_devices} devices; the nearest that do: {nearest}.'
    )
  images, steps = size // num_devices, config.optimizer.accumulate_steps
  if images % steps:
    divisors = [n for n in range(1, images + 1) if images % n == 0]
    below, above = [n for n in divisors if n < steps][-1:], [n for n in divisors if n > steps][:1]
    raise UsageError(
      f'config.optimizer.accumulate_steps is {steps}, which does not divide the {images} images of a batch on each device; '
      f'the nearest that do: {" or ".join(map(str, below + above))}.'
    )


def check_data(
  config: ConfigDict, num_train: int, num_classes: int, image_shape: Sequence[int], num_validation: int = 1
) -> None:
  """Checks a config against the data that it is to train on.

  Args:
    num_train: training images.
    num_classes: classes of the data.
    image_shape: (height, width, channels) of the images.
    num_validation: validation images.

  Raises:
    UsageError: a batch larger than the split, a shift larger than the image, a warm-up as long as the training,
      images too small for the network, a network too large for the memory or one that fits one size only in training at
      another, other weights than one per class, more rates than stages, or patience without validation.
  """
  config, _ = adapt(config, num_train)
  rules.check_class_weights(config, num_classes)
  if config.evaluation.patience and not num_validation:
    raise UsageError(
      'config.evaluation.patience needs a validation split; set config.data.validation, or patience to 0.'
    )
  if config.batch_size > num_train:
    raise UsageError(
      f'config.batch_size is {config.batch_size} but there are {num_train} training images; make it at most {num_train}.'
    )
  shape, trained = input_shape(config, image_shape), input_shape(config, image_shape, training=True)
  height, width, channels = trained
  rules.check_statistics(config.data, channels)
  side = min(height, width)
  if config.augment.shift >= side:
    raise UsageError(
      f'config.augment.shift is {config.augment.shift} but images are {height}x{width} pixels; make it less than {side}.'
    )
  epochs = num_epochs(config, num_train)
  if epochs * steps_per_epoch(config, num_train) >= 2**31:
    raise UsageError(f'config.epochs and config.min_steps ask for {epochs} epochs; a run has less than {2**31} steps.')
  _check_warmup(config, epochs)
  rules.check_stage_rates(config.optimizer.stage_rates, models.check_images(config.model, num_classes, shape))
  _check_memory(config, num_classes, shape)
  if trained != shape:
    models.check_images(config.model, num_classes, trained, 'config.augment.image_size')
    _check_any_size(config, num_classes, shape, trained)


def _check_memory(config: ConfigDict, num_classes: int, shape: Sequence[int]) -> None:
  """Checks that the parameters alone fit into the memory of this machine, which may have to hold them for a GPU."""
  params = models.init_shapes(models.create(config.model, num_classes), shape)['params']
  needed, memory = 4 * models.num_parameters(params), os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  if needed > memory:
    raise UsageError(
      f'the network of config.model has {needed // 4:,} parameters, which need {needed / 1e9:,.0f} GB; this machine has '
      f'{memory / 1e9:,.0f} GB. Make it smaller.'
    )


def _check_any_size(config: ConfigDict, num_classes: int, *shapes: Sequence[int]) -> None:
  model = models.create(config.model, num_classes)
  sizes = [[x.shape for x in jax.tree.leaves(models.init_shapes(model, shape))] for shape in shapes]
  if sizes[0] != sizes[1]:
    raise UsageError(
      f'config.augment.image_size is {config.augment.image_size}, but the parameters of the network of config.model fit '
      f'images of {shapes[0][0]} pixels a side alone; set it to 0, or use a network with global average pooling.'
    )


def steps_per_epoch(config: ConfigDict, num_train: int) -> int:
  """Steps of one epoch: floor(num_train / batch_size); the remainder, a different one in each epoch, is left out."""
  return num_train // adapt(config, num_train)[0].batch_size


def num_epochs(config: ConfigDict, num_train: int) -> int:
  """Epochs of a run: `config.epochs`, or more of them if `config.min_steps` needs it."""
  return max(config.epochs, -(-config.min_steps // steps_per_epoch(config, num_train)))


def leaves(config: Mapping[str, Any] | ConfigDict, prefix: str = '') -> Iterator[tuple[str, Any]]:
  """The fields of a config or of a nested dict, as ('model.features', value)."""
  for name, value in config.items():
    if isinstance(value, Mapping | ConfigDict):
      yield from leaves(value, f'{prefix}{name}.')
    else:
      yield prefix + name, value


def _overlay(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
  merged = dict(base)
  for name, value in values.items():
    if isinstance(value, Mapping) and isinstance(base.get(name, {}), Mapping):
      merged[name] = _overlay(base.get(name, {}), value)
    else:
      merged[name] = tuple(value) if isinstance(value, list) else value
  return merged
