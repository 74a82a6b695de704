"""Convolution, pooling and ReLU6 that train fast on every backend.

The functions compute what `lax.conv_general_dilated`, `flax.linen.max_pool` and `flax.linen.avg_pool` compute, and they
have the same arguments. On GPU and TPU they call those functions. On the CPU their gradients are written by hand,
because XLA:CPU has a fast convolution only for the dimension numbers NHWC, HWIO, NHWC. JAX's transpose rules give both
gradients other dimension numbers. XLA rewrites those at the top level of a program but not in the body of a `lax.scan`,
where they run as naive loops. All three products of a convolution whose kernel has three rows and enough channels take
half the multiplications (Winograd; rounding errors are about four times as large). A 1x1 convolution is a matrix
product. A depthwise convolution is a sum of shifted products, because XLA:CPU runs it as a naive loop too. A first
convolution is computed together with the pooling after it. The platform is chosen when a program is lowered, so that
a CPU can lower programs for the others.

The gradients are those of reverse mode, of any order. Forward mode (`jax.jvp`) is not defined.
"""

from cnn_jax.ops.activation import relu6
from cnn_jax.ops.convolution import conv_general_dilated
from cnn_jax.ops.pooling import avg_pool, conv_max_pool, max_pool

__all__ = ['avg_pool', 'conv_general_dilated', 'conv_max_pool', 'max_pool', 'relu6']
