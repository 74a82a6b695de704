"""The network: a stack of convolutions, global average pooling, and a linear layer to one number a class."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cnn_jax import ops

_ACTIVATIONS = {'relu': nn.relu, 'gelu': nn.gelu, 'silu': nn.silu}


def create_model(config: Any, num_classes: int) -> 'CNN':
  """Makes the network that `config.model` describes.

  Args:
    config: the section `config.model`.
    num_classes: outputs of the head.
  """
  return CNN(
    num_classes=num_classes,
    features=tuple(config.features),
    convs_per_block=config.convs_per_block,
    kernel_size=config.kernel_size,
    stride=config.stride,
    pool=config.pool,
    norm=config.norm,
    norm_momentum=config.norm_momentum,
    activation=config.activation,
    dropout=config.dropout,
    residual=config.residual,
    aggregate=config.aggregate,
    head=config.head,
    frozen_blocks=config.frozen_blocks,
    dtype=jnp.dtype(config.dtype),
  )


def feature_maps(model: 'CNN', variables: Any, images: Array) -> dict[str, Array]:
  """What every part of the network makes of some images.

  Args:
    model: the network.
    variables: `{'params', 'batch_stats'}`.
    images: float (batch, height, width, channels), normalised.

  Returns:
    `block1`, `block2`, ...: each block's maps (batch, height, width, features); `gap` (or
    `flatten`): the vector before the head (batch, features); `logits` (batch, num_classes).
  """
  logits, captured = model.apply(variables, images, train=False, capture_intermediates=_is_block)
  maps = {name: value['__call__'][0] for name, value in captured['intermediates'].items() if name.startswith('block')}
  return maps | {model.aggregate: captured['intermediates'][model.aggregate][0], 'logits': logits}


def head_kernel(model: 'CNN', variables: Any) -> np.ndarray:
  """The head's weights, float32 (features, num_classes); a 1x1 convolution's are those with two axes less.

  With global average pooling they turn the last block's maps into evidence for each class at each
  place, the class activation maps: the mean of `maps @ kernel` plus the bias is the logits
  (Zhou et al. 2016, arXiv 1512.04150).
  """
  return np.asarray(variables['params']['head']['kernel'], np.float32).reshape(-1, model.num_classes)


def num_groups(features: int) -> int:
  """Groups of a group norm: at most 32, of two channels or more each."""
  return next(g for g in (32, 16, 8, 4, 2, 1) if (features % g == 0 and features // g >= 2) or g == 1)


class CNN(nn.Module):
  """Classifies images of any size: (batch, height, width, channels) -> logits (batch, num_classes).

  With `aggregate='gap'` the head sees the average of the last block's maps, so neither the
  number of parameters nor the function of a uniform image depends on the image's size (Lin et
  al. 2014, Network in Network). The heads `dense` and `conv1x1` are the same function; their
  kernels differ by two axes of length one.
  """

  num_classes: int
  features: Sequence[int] = (32, 64, 128)
  convs_per_block: int = 1
  kernel_size: int = 3
  stride: int = 1
  pool: str = 'max'
  norm: str = 'batch'
  norm_momentum: float = 0.9
  activation: str = 'relu'
  dropout: float = 0.0
  residual: bool = False
  aggregate: str = 'gap'
  head: str = 'dense'
  frozen_blocks: int = 0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images: Array, train: bool = False, positions: Array | None = None) -> Array:
    """Computes logits.

    Args:
      images: float (batch, height, width, channels), normalised.
      train: use the batch's statistics (over the axis `batch` of all devices where there is
        one) and drop units.
      positions: int32 (batch,), of the images in the global batch. Dropout, which also needs the
        rng `dropout`, is keyed by them, so that it does not depend on the number of devices.

    Returns:
      Logits, float32 (batch, num_classes).
    """
    x = images.astype(self.dtype)
    for i, features in enumerate(self.features):
      last, frozen = i == len(self.features) - 1, i < self.frozen_blocks
      x = ConvBlock(
        features=features,
        convs=self.convs_per_block,
        kernel_size=self.kernel_size,
        stride=1 if i == 0 else self.stride,
        pool='none' if last else self.pool,
        norm=self.norm,
        norm_momentum=self.norm_momentum,
        activation=self.activation,
        residual=self.residual,
        dtype=self.dtype,
        train=train and not frozen,
        name=f'block{i + 1}',
      )(x)
      if frozen:
        x = jax.lax.stop_gradient(x)  # and nothing is computed backwards below here
    if self.aggregate == 'gap':
      # The sum of hundreds of bfloat16 numbers is taken in float32.
      x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
    else:
      x = x.reshape(x.shape[0], -1)
    self.sow('intermediates', self.aggregate, x)
    if train and self.dropout:
      x = self._drop(x, positions)
    x = x.astype(self.dtype)
    if self.head == 'dense':
      x = nn.Dense(self.num_classes, dtype=self.dtype, name='head')(x)
    else:
      x = nn.Conv(self.num_classes, (1, 1), dtype=self.dtype, name='head')(x[:, None, None, :])[:, 0, 0, :]
    return x.astype(jnp.float32)

  def _drop(self, x: Array, positions: Array) -> Array:
    key, keep = self.make_rng('dropout'), 1 - self.dropout
    mask = jax.vmap(lambda p: jax.random.bernoulli(jax.random.fold_in(key, p), keep, x.shape[1:]))(positions)
    return jnp.where(mask, x / keep, 0)


class ConvBlock(nn.Module):
  """`convs` times convolution, norm, activation; the last convolution is pooled before its norm.

  Pooling first is the same class of functions at a quarter of the elementwise work: a maximum
  commutes with every non-decreasing function, and norm and ReLU are that wherever the scale is
  positive.
  """

  features: int
  convs: int
  kernel_size: int
  stride: int
  pool: str
  norm: str
  norm_momentum: float
  activation: str
  residual: bool
  dtype: Any
  train: bool

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shortcut = x
    activation = _ACTIVATIONS[self.activation]
    for i in range(self.convs):
      last = i == self.convs - 1
      pool = self.pool if last else 'none'
      conv = ops.conv_max_pool if pool == 'max' else ops.conv_general_dilated
      x = self._conv(self.kernel_size, self.stride if i == 0 else 1, f'conv{i + 1}', conv)(x)
      x = _avg_pool(x) if pool == 'avg' else x
      x = self._norm(f'norm{i + 1}')(x)
      if not (last and self.residual):
        x = activation(x)
    if self.residual:
      shortcut = self._resize_shortcut(shortcut, x.shape)
      x = activation(x + shortcut)
    return x

  def _conv(self, kernel_size: int, stride: int, name: str, conv: Callable = ops.conv_general_dilated) -> nn.Conv:
    return nn.Conv(
      self.features,
      (kernel_size, kernel_size),
      strides=stride,
      use_bias=self.norm == 'none',  # a norm has a bias of its own
      kernel_init=nn.initializers.he_normal(),
      dtype=self.dtype,
      conv_general_dilated=conv,
      name=name,
    )

  def _norm(self, name: str) -> Callable[[Array], Array]:
    if self.norm == 'batch':
      return nn.BatchNorm(
        use_running_average=not self.train,
        momentum=self.norm_momentum,
        dtype=self.dtype,
        # Synchronised over devices: N devices then take the step that one would take.
        axis_name='batch' if self.train else None,
        name=name,
      )
    if self.norm == 'group':
      return nn.GroupNorm(num_groups=num_groups(self.features), dtype=self.dtype, name=name)
    return lambda x: x

  def _resize_shortcut(self, x: Array, shape: Sequence[int]) -> Array:
    """Brings a block's input to its output's shape: strided and pooled on average, projected where channels differ."""
    x = x[:, :: self.stride, :: self.stride, :]
    x = x if self.pool == 'none' or x.shape[1] == shape[1] else _avg_pool(x)
    if x.shape[-1] != shape[-1]:
      x = self._conv(1, 1, 'projection')(x)
    return x


def _avg_pool(x: Array) -> Array:
  return ops.avg_pool(x, (2, 2), strides=(2, 2))


def _is_block(module: nn.Module, method: str) -> bool:
  return isinstance(module, ConvBlock) and method == '__call__'


def summary(model: CNN, image_shape: Sequence[int]) -> str:
  """A table of parameters and of the operations that one image takes.

  Args:
    model: the network.
    image_shape: (height, width, channels).
  """
  table = nn.tabulate(
    model,
    jax.random.key(0),
    depth=1,
    compute_flops=True,
    console_kwargs={'width': 110, 'force_terminal': False, 'no_color': True},
    column_kwargs={'overflow': 'fold'},
  )
  return '\n'.join(line.rstrip() for line in table(jnp.zeros((1, *image_shape), jnp.float32)).strip().splitlines())
