"""The subject of a report: a run, its predictions on a split, and the maps inside its network."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnn_jax import calibration, inspect, models
from cnn_jax.data import Split
from cnn_jax.data.augment import normalize
from cnn_jax.report import pictures, text
from cnn_jax.run import Run

_BATCH, _BATCH_PIXELS = 50, 400_000  # images per call of the network; fewer if they are large
_PICTURE = 160  # largest side in pixels of an image on the page


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
    has_activation_maps: whether the network has class activation maps: the input of its head is an average of maps.
  """

  def __init__(self, run: Run, split: Split, logits: np.ndarray, name: str = 'test'):
    self.run, self.split, self.logits, self.split_name = run, split, logits, name
    self.classes = [text.clean(name) for name in run.class_names]
    self.predicted = np.argmax(logits, axis=1)
    self.probabilities = calibration.softmax(logits)
    self.confidence = np.max(self.probabilities, axis=1)
    self.has_activation_maps = inspect.has_class_activation_maps(run.model, run.image_shape)

  def name(self, index: int) -> str:
    """The file name of an image, or its number."""
    return (
      text.clean(str(self.split.names[index])) if self.split.names is not None else f'{self.split_name} image {index:,}'
    )

  def pixels(self, index: int) -> np.ndarray:
    """An image, uint8 (height, width, channels)."""
    return np.asarray(self.split.images[index])

  def picture(self, index: int) -> str:
    """An image as a data address."""
    return pictures.data_uri(pictures.fit(self.pixels(index), _PICTURE))

  def maps(
    self, indices: np.ndarray
  ) -> Iterator[tuple[dict[str, np.ndarray], dict[str, tuple[np.ndarray, np.ndarray]]]]:
    """Computes what is inside the network for some images, batch by batch.

    Args:
      indices: int (k,), of images of the split.

    Yields:
      Of each batch: its maps, float32; and per stage the largest value of each channel and its position in the
      flattened map, both (batch, features).
    """
    height, width = self.run.image_shape[:2]
    size = max(4, min(_BATCH, _BATCH_PIXELS // (height * width)))
    for start in range(0, len(indices), size):
      batch = indices[start : start + size]
      images = np.asarray(self.split.images[np.resize(batch, size)])  # padded, so that one program serves all batches
      maps, strongest = _compute_maps(self.run.model, self.run.variables, images)
      yield (
        {name: np.asarray(values)[: len(batch)] for name, values in maps.items()},
        {name: (np.asarray(v)[: len(batch)], np.asarray(at)[: len(batch)]) for name, (v, at) in strongest.items()},
      )


@functools.partial(jax.jit, static_argnames='model')
def _compute_maps(
  model: nn.Module, variables: Any, images: jax.Array
) -> tuple[Mapping[str, jax.Array], dict[str, tuple[jax.Array, jax.Array]]]:
  maps = models.infer(model, variables, normalize(images))[1]
  maps = {name: values.astype(jnp.float32) for name, values in maps.items()}
  flat = {name: maps[name].reshape(len(images), -1, maps[name].shape[-1]) for name in models.stage_names(maps)}
  return maps, {name: (values.max(axis=1), values.argmax(axis=1)) for name, values in flat.items()}
