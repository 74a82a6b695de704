"""Each process reads the images of its own devices alone; tests/faults/test_hosts.py starts such processes."""

import collections

import jax
import numpy as np
import pytest

from cnn_jax import distribute, evaluate
from cnn_jax.data import Split, feed
from cnn_jax.data.lazy import LazyImages
from tests.helpers import LEVELS

SHAPES = [(1, 4), (2, 2), (4, 1), (2, 1), (3, 2)]  # processes and devices of each


def _counted(n):
  """Images that are decoded when they are needed, whose pixels are their numbers; and how often each was decoded."""
  counts = collections.Counter()

  def decode_one(index):
    counts[int(index)] += 1
    return np.full((2, 2, 1), index, np.uint8)

  return LazyImages(decode_one, np.arange(n), (2, 2, 1)), counts


def _pretend(patch, process, processes, devices):
  patch.setattr(jax, 'process_index', lambda: process)
  patch.setattr(jax, 'process_count', lambda: processes)
  patch.setattr(jax, 'local_device_count', lambda: devices)
  patch.setattr(jax, 'device_count', lambda: processes * devices)
  patch.setattr(distribute, 'shard', lambda tree: jax.tree.map(np.array, tree))


@pytest.mark.parametrize('sampling', ['uniform', 'balanced'])
@pytest.mark.parametrize(('processes', 'devices'), SHAPES)
def test_each_training_image_is_read_by_one_process_and_the_order_is_that_of_one(processes, devices, sampling):
  batch_size, steps, epochs, offset = 12, 4, 2, 1  # the run continues after its first step
  labels = np.arange(50, dtype=np.int32) % 3
  order = np.concatenate([feed._order(Split(None, labels), batch_size, 5, sampling)(epoch) for epoch in range(epochs)])
  read = collections.Counter()
  found = np.full((epochs * steps, processes, devices, batch_size // (processes * devices)), -1)
  for process in range(processes):
    images, counts = _counted(50)
    with pytest.MonkeyPatch.context() as patch:
      _pretend(patch, process, processes, devices)
      streamed = feed.Streamed(Split(images, labels), batch_size, 5, 3, sampling, epochs * steps)
      step = offset
      while step < epochs * steps:
        epoch, place = divmod(step, steps)
        (chunk, chunk_labels, indices), count = streamed.take(epoch, place, 2)
        for number in range(count):
          for device in range(devices):
            ids = chunk[device, indices[number, device], 0, 0, 0]
            np.testing.assert_array_equal(chunk_labels[device, indices[number, device]], labels[ids])
            found[step + number, process, device] = ids
        step += count
      streamed.close()
    mine = order.reshape(found.shape)[offset:, process]
    assert counts == collections.Counter(mine.ravel().tolist())  # and none of the other processes
    read += counts
  np.testing.assert_array_equal(found[offset:].reshape(-1, batch_size), order[offset:])
  assert read == collections.Counter(order[offset:].ravel().tolist())


@pytest.mark.parametrize('n', [0, 1, 5, 8, 21])
@pytest.mark.parametrize(('processes', 'devices'), SHAPES)
def test_each_example_is_read_and_evaluated_by_one_process(processes, devices, n):
  class Model:
    num_classes = 1

  parts, read = [], collections.Counter()
  for process in range(processes):
    images, counts = _counted(n)
    with pytest.MonkeyPatch.context() as patch:
      _pretend(patch, process, processes, devices)
      patch.setattr(evaluate, 'batch_logits', lambda model, variables, images, *_: images[:, 0, 0])
      patch.setattr(distribute, 'gather', lambda logits: parts.append(logits) or np.zeros((n, 1)))
      assert evaluate.compute_logits(Model(), {}, images, LEVELS, 7).shape == (n, 1)
    assert max(counts.values(), default=1) == 1
    read += counts
  assert read == collections.Counter(range(n))
  np.testing.assert_array_equal(np.concatenate(parts)[:n, 0], np.arange(n))
