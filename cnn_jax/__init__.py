"""cnn_jax: image classification with convolutional networks, in functional JAX and Flax."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if sys.argv[:1] == ['-m'] and any(a.removeprefix('-m').startswith('cnn_jax.') for a in sys.orig_argv):
  # `python -m cnn_jax.NAME`: Python has imported the package to find the command. What follows imports for a second.
  from cnn_jax import signals

  signals.end_at_once()

if TYPE_CHECKING:
  import os

  from cnn_jax.predict import Classifier

__version__ = '0.2.0'

SYSTEMS = 'cnn_jax runs on Linux and macOS, not on Windows; use the Windows Subsystem for Linux (WSL).'


class UsageError(Exception):
  """A mistake in a command, a config or the data that the user can correct.

  Its message is one sentence: what was wrong, where, and what to do. Commands print it as
  one line on stderr and exit with status 2.
  """


class Diverged(Exception):
  """The loss of a step is not a finite number; the message names the step. Commands exit with status 3."""


class Stopped(Exception):
  """SIGTERM or Ctrl-C arrived; the state was saved at the step that the message names. Commands exit with status 143."""


def load(workdir: str | os.PathLike, checkpoint: str = 'last', **options: Any) -> Classifier:
  """Reads a trained run for prediction from Python.

  Args:
    workdir: of the run.
    checkpoint: `last`, or `best` on validation.
    options: `invert` and `batch_size` of `predict.Classifier`.

  Raises:
    UsageError: there is no run, or no checkpoint that is whole.
  """
  from cnn_jax import predict, run  # jax and flax: `import cnn_jax` alone stays fast

  return predict.Classifier(run.load_run(workdir, checkpoint), **options)
