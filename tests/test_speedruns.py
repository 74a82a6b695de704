"""The speedruns on MNIST and CIFAR-10: what they refuse, and what their clocks leave out. Their runs: test_benchmarks.py."""

import jax

from benchmarks.accelerator import run as accelerator
from benchmarks.cifar10_speedrun import run as cifar10_speedrun
from cnn_jax import config
from cnn_jax.data import load_dataset

# The data and the size of which a CPU trains.
SMALL = [word for word in accelerator.PARTS['cifar10_speedrun'].small if word.startswith('--config.')]


def test_nothing_is_compiled_while_the_clock_runs(caplog):
  small = config.load(str(cifar10_speedrun.CONFIG), SMALL)
  dataset = load_dataset(small.data)
  of_both = [config.vary(small, {'epochs': epochs, 'optimizer.first_stage_epochs': 0.5}) for epochs in (1, 2)]
  first, second = (cifar10_speedrun.prepare(one, dataset) for one in of_both)
  with jax.log_compiles():
    accuracies = [run(seed)['accuracy'] for seed in (5, 6) for run in (first, second)]
    assert [record.getMessage() for record in caplog.records if 'ompil' in record.getMessage()] == []
    jax.jit(lambda x: x + 1)(0)
  assert any('ompil' in record.getMessage() for record in caplog.records)  # such messages have that word
  assert len(set(accuracies)) == 4
