"""Convolutions and pools computed by hand. Small integers are exact in float32, so that the results are equal."""

import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import ops

pytestmark = pytest.mark.usefixtures('strict')


def convolve(image, kernel, padding='VALID'):
  image, kernel = jnp.asarray(image, jnp.float32), jnp.asarray(kernel, jnp.float32)
  layout = ('NHWC', 'HWIO', 'NHWC')
  y = ops.conv_general_dilated(
    image[None, :, :, None], kernel[:, :, None, None], (1, 1), padding, dimension_numbers=layout
  )
  return np.asarray(y[0, :, :, 0])


def test_7x7_image_convolved_with_3x3_kernel_is_5x5():
  # Pixel (r, c) is 7 r + c, and the kernel's weights sum to 3 with their centre of mass in the middle, so that
  # output (r, c) is 3 times the pixel below the kernel's centre: 3 (7 (r + 1) + (c + 1)) = 21 r + 3 c + 24.
  image = np.arange(49).reshape(7, 7)
  kernel = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
  expected = [
    [24, 27, 30, 33, 36],
    [45, 48, 51, 54, 57],
    [66, 69, 72, 75, 78],
    [87, 90, 93, 96, 99],
    [108, 111, 114, 117, 120],
  ]
  np.testing.assert_array_equal(convolve(image, kernel), expected)


def test_kernel_of_a_vertical_edge():
  # Dark on the left, bright on the right: only windows with pixels of both sides give a result other than 0, 3 x 9.
  image = np.repeat([[0, 0, 0, 9, 9, 9]], 6, axis=0)
  kernel = [[-1, 0, 1]] * 3
  np.testing.assert_array_equal(convolve(image, kernel), [[0, 27, 27, 0]] * 4)
  np.testing.assert_array_equal(convolve(image.T, kernel), np.zeros((4, 4)))  # a horizontal edge: nothing


def test_same_padding_is_zeros():
  expected = [[4, 6, 4], [6, 9, 6], [4, 6, 4]]  # the number of the nine pixels that are inside
  np.testing.assert_array_equal(convolve(np.ones((3, 3)), np.ones((3, 3)), 'SAME'), expected)


def test_pools_of_a_4x4_image():
  x = jnp.asarray([[1.0, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]])[None, :, :, None]
  np.testing.assert_array_equal(ops.max_pool(x, (2, 2), (2, 2))[0, :, :, 0], [[4, 8], [12, 16]])
  np.testing.assert_array_equal(ops.avg_pool(x, (2, 2), (2, 2))[0, :, :, 0], [[2.5, 6.5], [10.5, 14.5]])


def test_global_average_of_6x6x3_is_1x1x3():
  x = jnp.stack([jnp.full((6, 6), 4.0), jnp.arange(36.0).reshape(6, 6), jnp.zeros((6, 6)).at[0, 0].set(9)], -1)[None]
  y = ops.avg_pool(x, (6, 6), (6, 6))
  assert y.shape == (1, 1, 1, 3)
  np.testing.assert_allclose(y[0, 0, 0], [4, 17.5, 0.25])
