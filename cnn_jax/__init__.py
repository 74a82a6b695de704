"""cnn_jax: image classification with convolutional networks, in functional JAX and Flax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  import os

  from cnn_jax.predict import Classifier

__version__ = '0.1.0'


class UsageError(Exception):
  """A mistake in a command, a config or the data that its owner can mend.

  Its message is one sentence: what was wrong, where, and what to do. Commands print it as
  one line on stderr and exit with status 2.
  """


def load(workdir: str | os.PathLike, checkpoint: str = 'last', **options: Any) -> Classifier:
  """Reads a trained run for prediction from Python.

  Args:
    workdir: of the run.
    checkpoint: `last`, or `best` on validation.
    options: `invert` and `batch_size` of `predict.Classifier`.

  Raises:
    UsageError: there is no run, or no checkpoint that is whole.
  """
  from cnn_jax import predict  # jax and flax, which importing cnn_jax alone should not wait for

  return predict.Classifier(predict.evaluate.load_run(workdir, checkpoint), **options)
