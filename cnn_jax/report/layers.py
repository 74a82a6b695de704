"""The layers of the network in words and as tables."""

from collections.abc import Sequence
from typing import Any

from cnn_jax import inspect
from cnn_jax.report import text

_ROWS = 24  # layers up to which each is a row of the first table; of deeper networks, each stage is one
_KINDS = {
  'Conv': 'convolution',
  'Dense': 'dense layer',
  'BatchNorm': 'batch norm',
  'GroupNorm': 'group norm',
  'LayerNorm': 'layer norm',
  'InstanceNorm': 'instance norm',
}


def tables(layers: Sequence[inspect.Layer], head_input: str, head_features: int) -> dict[str, Any]:
  """The layers of a network as rows, and its stages if it is deep. The input of the head gets a row of its own.

  Args:
    layers: of the network, from `inspect.layer_table`.
    head_input: what the input of the head is.
    head_features: how many numbers it has.
  """
  pooled = {'name': head_input, 'kind': '', 'kernel': '', 'shape': str(head_features), 'parameters': 0, 'operations': 0}
  rows = []
  for layer in layers:
    if layer.path == ('head',):
      rows.append(pooled)
    rows.append(_row(layer))
  stages = []
  for number in sorted({layer.stage for layer in layers}):
    of_stage = [layer for layer in layers if layer.stage == number]
    if of_stage[-1].path == ('head',):
      stages += [pooled, *map(_row, of_stage)]
      continue
    stages.append(
      {
        'name': f'stage {number}',
        'kind': count_layers(of_stage),
        'shape': text.shape(of_stage[-1].output),
        'parameters': sum(layer.parameters for layer in of_stage),
        'operations': sum(layer.operations for layer in of_stage),
      }
    )
  return {
    'stages': stages if len(rows) > _ROWS else None,
    'rows': rows,
    'parameters': sum(layer.parameters for layer in layers),
    'operations': sum(layer.operations for layer in layers),
  }


def count_layers(layers: Sequence[inspect.Layer]) -> str:
  """Counts layers by type and kernel size, for example `2 convolutions 3x3, 2 batch norms`."""
  groups: dict[tuple[str, str], int] = {}
  for layer in layers:
    kernel = '' if layer.kernel is None or layer.kind == 'Dense' else text.TIMES.join(map(str, layer.kernel[:-2]))
    kind = (_KINDS.get(layer.kind, layer.kind), kernel)
    groups[kind] = groups.get(kind, 0) + 1
  ordered = sorted(groups.items(), key=lambda group: not group[0][1])  # convolutions first
  return ', '.join(f'{text.count(number, kind)} {kernel}'.rstrip() for (kind, kernel), number in ordered)


def describe_layers(layers: Sequence[inspect.Layer]) -> str:
  """`count_layers` and the parameters, for example `2 convolutions 3x3, 2 batch norms; 1,234 parameters`."""
  parameters = sum(layer.parameters for layer in layers)
  return f'{count_layers(layers) or "No layers with parameters"}; {text.count(parameters, "parameter")}'


def _row(layer: inspect.Layer) -> dict[str, Any]:
  return {
    'name': ' · '.join(layer.path),
    'kind': _KINDS.get(layer.kind, layer.kind),
    'kernel': text.shape(layer.kernel) if layer.kernel else '',
    'shape': text.shape(layer.output),
    'parameters': layer.parameters,
    'operations': layer.operations,
  }
