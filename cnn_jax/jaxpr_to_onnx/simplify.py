"""Simplification of a finished graph: batch norms become part of convolutions, and unused nodes are removed."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass
class Node:
  """One ONNX operator; the names of constants may be among its inputs."""

  operator: str
  inputs: list[str]
  outputs: list[str]
  attributes: dict[str, Any]


def simplify(
  nodes: Sequence[Node], constants: dict[str, np.ndarray], output: str, new_name: str
) -> tuple[list[Node], dict[str, np.ndarray]]:
  """Folds scales and shifts into convolutions, drops what the output does not need, and renames the output.

  Args:
    nodes: in the order of execution; they are changed.
    constants: by name.
    output: the value that the graph computes.
    new_name: the new name of that value.

  Returns:
    The nodes and the constants that are left.
  """
  constants = dict(constants)
  nodes = _transpose_early(_needed(nodes, output), constants, output)
  nodes, output = _merge(nodes, constants, output)
  nodes = _needed(nodes, output)
  used = {name for node in nodes for name in node.inputs}
  for node in nodes:
    node.inputs = [new_name if name == output else name for name in node.inputs]
    node.outputs = [new_name if name == output else name for name in node.outputs]
  return nodes, {name: value for name, value in constants.items() if name in used}


def _needed(nodes: Sequence[Node], output: str) -> list[Node]:
  needed = {output}
  for node in reversed(nodes):
    if needed.intersection(node.outputs):
      needed.update(node.inputs)
  return [node for node in nodes if needed.intersection(node.outputs)]


def _transpose_early(nodes: Sequence[Node], constants: dict[str, np.ndarray], output: str) -> list[Node]:
  """Moves transposes and reshapes before operations with one number, and transposes before those with one per channel.

  ONNX Runtime is slow at those if the last axis is short, and the channels of images are at first the last axis.
  """
  nodes = list(nodes)
  producers = {name: i for i, node in enumerate(nodes) for name in node.outputs}
  uses = _count_uses(nodes, output)
  for position, mover in enumerate(nodes):
    i: int | None = position if mover.operator in ('Transpose', 'Reshape') else None
    while i is not None:
      late, place = nodes[i], producers.get(nodes[i].inputs[0])
      if place is None or uses[late.inputs[0]] != 1:
        break
      early = nodes[place]
      moved = _moved_constant(early, late, constants)
      if moved is None:
        break
      data = next(name for name in early.inputs if name not in constants)
      # The two change places, and the name of what they compute together stays.
      constants[f'{early.outputs[0]}/moved'] = moved
      early.inputs = [early.outputs[0] if name == data else f'{early.outputs[0]}/moved' for name in early.inputs]
      late.inputs[0] = data
      early.outputs, late.outputs = late.outputs, early.outputs
      nodes[place], nodes[i] = late, early
      producers[late.outputs[0]], producers[early.outputs[0]] = place, i
      i = place
  return nodes


def _moved_constant(node: Node, mover: Node, constants: Mapping[str, np.ndarray]) -> np.ndarray | None:
  """The constant of an operation with one number, or with one per channel, after a transpose or reshape; else None."""
  fixed = [constants[name] for name in node.inputs if name in constants]
  if node.operator not in ('Add', 'Sub', 'Mul', 'Div') or len(fixed) != 1 or len(node.inputs) != 2:
    return None
  permutation = mover.attributes.get('perm', ())
  if fixed[0].ndim and fixed[0].ndim == len(permutation):
    return fixed[0].transpose(permutation)
  return None if fixed[0].ndim else fixed[0]


def _count_uses(nodes: Sequence[Node], output: str) -> collections.Counter[str]:
  return collections.Counter([output, *(name for node in nodes for name in node.inputs)])


def _merge(nodes: Sequence[Node], constants: dict[str, np.ndarray], output: str) -> tuple[list[Node], str]:
  """Makes nodes part of the one before them; returns the nodes that are left and the name of the output.

  A scale or a shift per channel, such as a batch norm, becomes part of a convolution. Pooling and slices may stand
  between the two: an average commutes with both, a maximum with shifts and with scales that are not negative. A
  multiplication by a number and the division by it that follows, as in a mean over windows, cancel. ReLU6 becomes one
  node, which runtimes fuse with a convolution.
  """
  producers = {name: node for node in nodes for name in node.outputs}
  uses = _count_uses(nodes, output)
  renamed: dict[str, str] = {}
  kept: list[Node] = []
  for node in nodes:
    node.inputs = [renamed.get(name, name) for name in node.inputs]
    data = next((name for name in node.inputs if name not in constants), '')
    before = producers.get(data)
    if before is None or uses[data] != 1:
      kept.append(node)
    elif _cancels(before, node, constants):
      kept.remove(before)
      renamed[node.outputs[0]] = before.inputs[0]
      uses[before.inputs[0]] += uses[node.outputs[0]] - 1
    elif _clips(before, node, constants):
      renamed[node.outputs[0]] = data
      uses[data] = uses[node.outputs[0]]
    else:
      conv, under_maximum = before, False
      while _keeps_channels(conv, constants) and uses[conv.inputs[0]] == 1 and conv.inputs[0] in producers:
        under_maximum |= conv.operator == 'MaxPool'
        conv = producers[conv.inputs[0]]
      if conv.operator == 'Conv' and _fold(conv, node, under_maximum, constants):
        renamed[node.outputs[0]] = data
        uses[data] = uses[node.outputs[0]]
      else:
        kept.append(node)
  return kept, renamed.get(output, output)


def _keeps_channels(node: Node, constants: Mapping[str, np.ndarray]) -> bool:
  """Whether a node pools or slices each channel by itself, so that a shift of its input shifts its output."""
  if node.operator == 'AveragePool':
    return not any(node.attributes['pads'])
  return node.operator == 'MaxPool' or (node.operator == 'Slice' and constants[node.inputs[3]].min() >= 2)


def _cancels(before: Node, node: Node, constants: Mapping[str, np.ndarray]) -> bool:
  pair = [*before.inputs[1:], *node.inputs[1:]]
  if (before.operator, node.operator) != ('Mul', 'Div') or any(name not in constants for name in pair):
    return False
  factor, divisor = (constants[name] for name in pair)
  return factor.ndim == divisor.ndim == 0 and factor == divisor


def _clips(before: Node, node: Node, constants: dict[str, np.ndarray]) -> bool:
  """Makes a minimum with a number part of the ReLU before it if that is possible, and returns whether it was."""
  highest = next((constants[name] for name in node.inputs if name in constants), None)
  if (before.operator, node.operator) != ('Relu', 'Min') or highest is None or highest.size != 1 or highest.ndim > 1:
    return False
  name = before.outputs[0]
  before.operator, before.inputs = 'Clip', [before.inputs[0], f'{name}/low', f'{name}/high']
  constants[f'{name}/low'], constants[f'{name}/high'] = np.zeros((), highest.dtype), highest.reshape(())
  return True


def _fold(conv: Node, node: Node, under_maximum: bool, constants: dict[str, np.ndarray]) -> bool:
  """Makes a node part of the convolution before it if that is possible, and returns whether it was."""
  if node.operator not in ('Add', 'Sub', 'Mul', 'Div') or any(name not in constants for name in conv.inputs[1:]):
    return False
  other = next((name for name in node.inputs if name in constants), None)
  if other is None or (node.operator in ('Sub', 'Div') and other != node.inputs[1]):
    return False
  kernel = constants[conv.inputs[1]]
  value = _per_channel(constants[other], kernel)
  if value is None:
    return False
  bias = constants[conv.inputs[2]] if len(conv.inputs) > 2 else np.zeros(len(kernel), kernel.dtype)
  if node.operator in ('Add', 'Sub'):
    bias = bias + value if node.operator == 'Add' else bias - value
  else:
    scale = value if node.operator == 'Mul' else 1 / value
    if not np.all(np.isfinite(scale)) or (under_maximum and np.any(scale < 0)):
      return False
    kernel, bias = kernel * scale.reshape(-1, *(1,) * (kernel.ndim - 1)), bias * scale
  name = conv.outputs[0]
  conv.inputs = [conv.inputs[0], f'{name}/kernel', f'{name}/bias']
  # A kernel that several convolutions share stays as it is under its old name.
  constants[conv.inputs[1]], constants[conv.inputs[2]] = kernel, bias
  return True


def _per_channel(value: np.ndarray, kernel: np.ndarray) -> np.ndarray | None:
  """A constant as one number per output channel of a kernel (channels, ...), or None if it is something else."""
  if value.dtype != kernel.dtype:
    return None
  if value.size == 1 and value.ndim <= kernel.ndim:
    return np.broadcast_to(value.reshape(()), len(kernel))
  per_channel = (1, len(kernel), *(1,) * (kernel.ndim - 2))
  return value.reshape(-1) if value.shape == per_channel else None
