"""What the frozen stages of a network compute, once for all steps: the maps at their boundary, and a linear probe.

Training with kept maps is the same training function on another input: the maps of augmented views in place of images.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax import config as config_lib
from cnn_jax import distribute, models, parts
from cnn_jax.data import Split, augment
from cnn_jax.optim import is_kernel
from cnn_jax.progress import Counter

_DTYPE = np.float16  # of kept maps: their relative rounding error, 5e-4, is far below the effect of augmentation
_MAX_PROBED = 20_000  # examples that a linear probe is fitted to


@dataclasses.dataclass(frozen=True)
class Boundary:
  """The maps at the frozen boundary that are kept.

  Attributes:
    stages: how many are frozen.
    name: of the maps: of the last frozen stage, or `pooled` if all stages are frozen.
    shape: of the maps of one image.
    views: of each image; see `find_boundary`.
    megabytes: of all maps.
  """

  stages: int
  name: str
  shape: tuple[int, ...]
  views: int
  megabytes: float


def find_boundary(
  config: Any, model: nn.Module, num_train: int, image_shape: tuple[int, ...], epochs: int
) -> Boundary | None:
  """Decides which maps are kept; None if there are none.

  As many views are kept as `config.fine_tuning.views` asks for, but no more than there are epochs, and no more than
  `config.fine_tuning.megabytes` hold. But one view is kept in any case if its maps are smaller than the images, which
  would be in memory in their place.

  Args:
    config: of the run.
    model: from `models.create`.
    num_train: training images.
    image_shape: (height, width, channels) of the network's input.
    epochs: of the run.
  """
  if not (config.model.frozen_stages and config.fine_tuning.views):
    return None
  stages, name, shape = _place(config, model, image_shape)
  megabytes = _megabytes(num_train, shape)
  views = min(config.fine_tuning.views, epochs, int(config.fine_tuning.megabytes / megabytes))
  if not views and np.prod(shape) * np.dtype(_DTYPE).itemsize <= np.prod(image_shape):
    views = 1
  return Boundary(stages, name, shape, views, views * megabytes) if views else None


def describe(
  config: Any, model: nn.Module, num_train: int, image_shape: tuple[int, ...], epochs: int, boundary: Boundary | None
) -> str:
  """A sentence about frozen stages: the maps that are kept, why none or fewer are, or random weights; '' if all is as expected.

  Args:
    config, model, num_train, image_shape, epochs: see `find_boundary`.
    boundary: that it found.
  """
  wanted = min(config.fine_tuning.views, epochs)
  if not wanted:
    unknown = config.model.frozen_stages and not config.init_from
    return 'The frozen stages have random weights, because config.init_from is empty.' if unknown else ''
  if not config.model.frozen_stages:
    return 'No stages are frozen (config.model.frozen_stages), so config.fine_tuning.views has no effect.'
  needed = wanted * _megabytes(num_train, _place(config, model, image_shape)[2])
  limit = f'config.fine_tuning.megabytes is {config.fine_tuning.megabytes:,}; {wanted:,} views need {needed:,.0f}.'
  if not boundary:
    return f'The maps of the frozen stages are not kept, and each step computes them again: {limit}'
  line = (
    f'The first {boundary.stages} stages are frozen: their maps of {boundary.views} '
    f'{"view" if boundary.views == 1 else "views"} of each image are computed once, and take '
    f'{boundary.megabytes:,.0f} MB.'
  )
  if not config.init_from:
    line += ' Their weights are random, because config.init_from is empty.'
  return line if boundary.views == wanted else f'{line[:-1]}; {limit}'


def _place(config: Any, model: nn.Module, image_shape: tuple[int, ...]) -> tuple[int, str, tuple[int, ...]]:
  """How many stages the boundary is behind, the name of its maps, and their shape."""
  stages = config.model.frozen_stages
  shapes = models.map_shapes(model, image_shape)
  last = len(models.stage_names(shapes))
  if stages < last:  # the head may get the averages of earlier stages as well
    stages = min(stages, last + 1 - getattr(model, 'pooled_stages', 1))
  name = f'stage{stages}' if stages < last else 'pooled'
  return stages, name, shapes[name].shape[1:]


def _megabytes(num_train: int, shape: tuple[int, ...]) -> float:
  """Of the maps of one view."""
  return float(num_train * np.prod(shape) * np.dtype(_DTYPE).itemsize / 1e6)


def choose_probed(num_train: int, seed: int) -> np.ndarray:
  """The images that a linear probe is fitted to: sorted indices of all, or of 20,000 if there are more.

  Args:
    num_train: training images.
    seed: of the choice.
  """
  if num_train <= _MAX_PROBED:
    return np.arange(num_train)
  return np.sort(np.random.Generator(np.random.PCG64(seed)).permutation(num_train)[:_MAX_PROBED])


def compute_maps(
  model: nn.Module, variables: Any, split: Split, config: Any, key: jax.Array, boundary: Boundary | None
) -> tuple[np.ndarray, np.ndarray]:
  """Computes the maps at the frozen boundary, and the input of the head, of views of images of a split.

  The first view is the image itself. The others are augmented: as in training, but for mixing.

  Args:
    model: from `models.create`.
    variables: `{'params', 'batch_stats'}`.
    split: to train on.
    config: of the run.
    key: of augmentation.
    boundary: of the maps; None: no maps are wanted.

  Returns:
    float16 (views, n, ...) maps of all images, and for a probe float32 (views, images, features) of those of
    `choose_probed`, in as many views as give at most 20,000 examples. The same on all processes.
  """
  n, devices, statistics = len(split), jax.local_device_count(), config_lib.statistics(config.data)
  probed = choose_probed(n, config.seed)
  views = boundary.views if boundary else 1
  probed_views = max(1, min(views, _MAX_PROBED // n))

  @jax.jit
  def compute(variables, images, positions, view):
    view_key = jax.random.fold_in(key, view)
    x = augment.normalize(images, statistics)
    if views > 1:
      x = jnp.where(view == 0, x, augment.transform(config.augment, statistics, view_key, positions, images))
    maps = model.apply(variables, x, train=False)[1]
    return [maps[boundary.name].astype(_DTYPE) if boundary else jnp.zeros((len(x), 0), _DTYPE), maps['pooled']]

  wanted = np.arange(n) if boundary else probed
  share = -(-len(wanted) // jax.process_count())
  mine = wanted[jax.process_index() * share : (jax.process_index() + 1) * share]
  is_probed = np.isin(wanted, probed)
  # On a CPU the maps of more images leave the caches.
  shape = config_lib.input_shape(config, split.images.shape[1:])
  per_device = parts.FORWARD if np.prod(shape[:2]) >= parts.PIXELS else 64
  size = min(per_device, -(-share // devices)) * devices
  pooled = models.map_shapes(model, shape)['pooled'].shape[1:]
  maps = distribute.empty((views, share, *(boundary.shape if boundary else (0,))), _DTYPE)
  features = np.empty((probed_views, share, *pooled), np.float32)
  counter, done = Counter('views of images', views * len(mine)), 0
  for start in range(0, len(mine), size):
    places = mine[start : start + size]
    images = np.asarray(split.images[places])
    padded = np.concatenate([images, np.zeros((size - len(images), *images.shape[1:]), images.dtype)])
    positions = np.resize(places, size).astype(np.int32)
    batch = distribute.shard(padded), distribute.shard(positions)
    for view in range(views):
      kept, vectors = compute(variables, *batch, np.int32(view))
      maps[view, start : start + len(places)] = np.asarray(kept)[: len(places)]
      if view < probed_views:
        features[view, start : start + len(places)] = np.asarray(vectors)[: len(places)]
      done += len(places)
      counter.show(done)
  counter.clear()
  if jax.process_count() > 1:
    maps, features = (np.stack([distribute.gather(view) for view in part]) for part in (maps, features))
  return maps[:, : len(wanted)], features[:, : len(wanted)][:, is_probed]


def fit_probe(
  features: np.ndarray, labels: np.ndarray, num_classes: int, penalty: float, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Fits a linear classifier: multinomial logistic regression with an L2 penalty, by L-BFGS.

  Before the fit the mean of the features is subtracted, each is divided by the root of its standard deviation, and those
  of each example are scaled to length 1. So the penalty does not depend on their units, and features that hardly vary
  count a little more. The scales are folded into the result; that of the lengths is their mean. How this was
  chosen: benchmarks/fine_tuning.

  Args:
    features: float (n, features).
    labels: int32 (n,).
    num_classes: of the labels.
    penalty: half of it times the squared norm of the weights is added to the mean cross-entropy.
    weights: float (n,), of the examples in the mean; None: all are equal.

  Returns:
    float32 kernel (features, num_classes) and bias (num_classes,), for the features as they are.
  """
  import scipy.optimize  # takes a quarter of a second

  n, width = features.shape
  mean = features.mean(0, dtype=np.float64)
  x = (features - mean.astype(np.float32)).astype(np.float32, copy=False)  # in place, since this is the largest array
  std = np.sqrt(np.einsum('ij,ij->j', x, x, dtype=np.float64) / n)
  scale = np.sqrt(std + 1e-3 * std.mean() + 1e-12)
  x /= scale.astype(np.float32)
  lengths = np.maximum(np.sqrt(np.einsum('ij,ij->i', x, x, dtype=np.float64)), 1e-12)
  x /= lengths[:, None].astype(np.float32)
  share = (np.ones(n) if weights is None else weights / weights.mean()) / n
  one_hot = np.eye(num_classes, dtype=np.float32)[labels]

  def loss(flat):
    kernel, bias = flat[:-num_classes].reshape(width, num_classes), flat[-num_classes:]
    logits = (x @ kernel.astype(np.float32)).astype(np.float64) + bias
    logits -= logits.max(1, keepdims=True)
    log_sum = np.log(np.exp(logits).sum(1))
    cross_entropy = share @ (log_sum - logits[np.arange(n), labels])
    error = (np.exp(logits - log_sum[:, None]) - one_hot) * share[:, None]
    gradient = x.T @ error.astype(np.float32) + penalty * kernel
    value = cross_entropy + penalty / 2 * (kernel**2).sum()
    return value, np.concatenate([gradient.ravel(), error.sum(0)])

  start = np.zeros((width + 1) * num_classes)
  flat = scipy.optimize.minimize(loss, start, jac=True, method='L-BFGS-B', options={'maxiter': 100}).x
  kernel, bias = flat[:-num_classes].reshape(width, num_classes), flat[-num_classes:]
  kernel /= lengths.mean() * scale[:, None]
  return kernel.astype(np.float32), (bias - mean @ kernel).astype(np.float32)


def with_probe(variables: Any, features: np.ndarray, labels: np.ndarray, config: Any) -> dict[str, Any]:
  """Variables whose head is a linear probe; see `fit_probe`.

  Args:
    variables: `{'params', 'batch_stats'}`.
    features: float32 (views, n, features), from `compute_maps`.
    labels: int32 (n,), of the images that `choose_probed` chooses.
    config: of the run; classes that it weights or samples evenly have the same weights here.
  """
  head = variables['params']['head']
  num_classes = head['bias'].size
  labels = np.tile(labels, len(features))
  weights = None
  if config.loss.class_weights:
    weights = np.asarray(config.loss.class_weights, np.float64)[labels]
  elif config.data.sampling == 'balanced':
    weights = 1 / np.bincount(labels, minlength=num_classes)[labels]
  kernel, bias = fit_probe(features.reshape(len(labels), -1), labels, num_classes, config.fine_tuning.probe, weights)
  fitted = jax.tree.map(lambda p: (kernel if is_kernel(p) else bias).reshape(p.shape), head)
  return variables | {'params': variables['params'] | {'head': fitted}}
