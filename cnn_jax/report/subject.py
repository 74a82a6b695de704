"""The subject of a report: a run, its predictions on a split, and the maps inside its network."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax import calibration, inspect, models
from cnn_jax import config as config_lib
from cnn_jax.data import Split
from cnn_jax.data.augment import Statistics, centre_crop, normalize
from cnn_jax.report import pictures, text
from cnn_jax.run import Run

_BATCH, _BATCH_PIXELS = 50, 400_000  # images per call of the network; fewer if they are large
_PICTURE = 240  # largest side in pixels of an image on the page


class Inside(NamedTuple):
  """What is inside the network for a batch of images."""

  maps: dict[str, np.ndarray]  # float32, as the network computes them: stage1, ..., pooled, logits
  strongest: dict[str, tuple[np.ndarray, np.ndarray]]  # per stage, of each channel: the largest value, and its place
  variation: np.ndarray  # (batch, features), standard deviation over the image of the convolution that reads it
  kernel: np.ndarray  # of that convolution


class Subject:
  """A run and a split of its data, with everything that several sections read.

  Args:
    run: from `run.load_run`.
    split: of the data set of the run.
    logits: float32 (n, num_classes), of the split.
    name: of the split.

  Attributes:
    classes: names of the classes, clean.
    predicted: int (n,), the classes predicted.
    probabilities: float64 (n, num_classes).
    confidence: float64 (n,), the probabilities of the predicted classes.
    small: whether the images are shown pixel by pixel.
  """

  def __init__(self, run: Run, split: Split, logits: np.ndarray, name: str = 'test'):
    self.run, self.split, self.logits, self.split_name = run, split, logits, name
    self.classes = [text.clean(name) for name in run.class_names]
    self.predicted = np.argmax(logits, axis=1)
    self.probabilities = calibration.softmax(logits)
    self.confidence = np.max(self.probabilities, axis=1)
    self.small = max(run.input_shape[:2]) <= pictures.SMALL

  def name(self, index: int) -> str:
    """The file name of an image, or its number."""
    return (
      text.clean(str(self.split.names[index])) if self.split.names is not None else f'{self.split_name} image {index:,}'
    )

  def pixels(self, index: int) -> np.ndarray:
    """The part of an image that is the network's input, uint8 (height, width, channels)."""
    return centre_crop(np.asarray(self.split.images[index]), config_lib.statistics(self.run.config.data))

  def picture(self, index: int) -> str:
    """An image as a data address."""
    return pictures.data_uri(pictures.fit(self.pixels(index), _PICTURE))

  def evidence(self, index: int, values: np.ndarray, colour: tuple[int, int, int]) -> str:
    """A class activation map as a data address: laid over a photograph, or a layer to lay over a small image.

    Args:
      index: of the image.
      values: float32 (height, width), at most 1.
      colour: of the largest values.
    """
    if self.small:
      return pictures.data_uri(pictures.overlay(values, colour, self.run.input_shape[:2]))
    return pictures.data_uri(pictures.highlight(pictures.fit(self.pixels(index), _PICTURE // 2), values, colour))

  def inside(self, indices: np.ndarray) -> Iterator[Inside]:
    """Computes what is inside the network for some images, batch by batch.

    Args:
      indices: int (k,), of images of the split.
    """
    height, width = self.run.input_shape[:2]
    statistics = config_lib.statistics(self.run.config.data)
    size = max(4, min(_BATCH, _BATCH_PIXELS // (height * width)))
    for start in range(0, len(indices), size):
      batch = indices[start : start + size]
      n = len(batch)
      images = np.asarray(self.split.images[np.resize(batch, size)])  # padded, so that one program serves all batches
      *computed, kernel = jax.device_get(_compute(self.run.model, self.run.variables, images, statistics))
      maps, strongest, variation = jax.tree.map(lambda x, n=n: x[:n], computed)
      yield Inside(maps, strongest, variation, kernel)


@functools.partial(jax.jit, static_argnames=('model', 'statistics'))
def _compute(model: nn.Module, variables: Any, images: jax.Array, statistics: Statistics) -> tuple[Any, ...]:
  """The fields of `Inside`, of a batch uint8 (batch, height, width, channels)."""
  maps, kernel, response = inspect.maps_and_first_convolution(model, variables, normalize(images, statistics))
  maps = {name: values.astype(jnp.float32) for name, values in maps.items()}
  flat = {name: maps[name].reshape(len(images), -1, maps[name].shape[-1]) for name in models.stage_names(maps)}
  strongest = {name: (values.max(axis=1), values.argmax(axis=1)) for name, values in flat.items()}
  variation = jnp.std(response.astype(jnp.float32), axis=(1, 2))
  return maps, strongest, variation, kernel.astype(jnp.float32)
