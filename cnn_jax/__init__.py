"""cnn_jax: image classification with convolutional networks, in functional JAX and Flax."""

__version__ = '0.1.0'


class UsageError(Exception):
  """A mistake in a command, a config or the data that its owner can mend.

  Its message is one sentence: what was wrong, where, and what to do. Commands print it as
  one line on stderr and exit with status 2.
  """
