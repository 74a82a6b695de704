"""Joining the processes of a run; test_main.py trains with two, test_train.py with several devices."""

import jax
import numpy as np
import pytest

from cnn_jax import UsageError, distribute, peers

CLUSTER = ('SLURM_STEP_NUM_TASKS', 'SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE', 'TPU_WORKER_HOSTNAMES')


@pytest.fixture
def joined(monkeypatch):
  """What JAX is asked to join, outside any cluster."""
  calls = []
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *arguments, **_: calls.append(arguments))
  monkeypatch.setattr(peers, 'connect', lambda initialize, *_: initialize())
  for variable in CLUSTER:
    monkeypatch.delenv(variable, raising=False)
  return calls


def test_a_single_process_joins_nothing(joined, monkeypatch):
  distribute.join()
  monkeypatch.setenv('SLURM_NTASKS', '4')  # what sbatch sets; only srun starts four processes
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '1')
  monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'localhost')
  distribute.join()
  assert joined == []


@pytest.mark.parametrize(
  ('variable', 'value'), [('SLURM_STEP_NUM_TASKS', '4'), ('OMPI_COMM_WORLD_SIZE', '2'), ('TPU_WORKER_HOSTNAMES', 'a,b')]
)
def test_processes_of_a_cluster_find_each_other(joined, monkeypatch, variable, value):
  monkeypatch.setenv(variable, value)
  distribute.join()
  distribute.join('node1:1234')
  assert joined == [(None, None, None), ('node1:1234', None, None)]


def test_processes_with_numbers_join(joined):
  distribute.join('[::1]:1234', 2, 1)
  assert joined == [('[::1]:1234', 2, 1)]


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((None, 2, 0), '--num_processes and --process_id need --coordinator=HOST:PORT'),
    ((None, None, 0), '--num_processes and --process_id need --coordinator'),
    (('node1', 2, 0), "--coordinator is 'node1'; give it as HOST:PORT"),
    ((':1234', 2, 0), "--coordinator is ':1234'; give it as HOST:PORT"),
    (('node1:http', 2, 0), "--coordinator is 'node1:http'; give it as HOST:PORT"),
    (('node1:1234', None, None), '--coordinator needs --num_processes and --process_id'),
    (('node1:1234', 2, None), '--coordinator needs --num_processes and --process_id'),
    (('node1:1234', 2, 2), '--process_id is 2 of 2 processes; it must be 0 to 1'),
    (('node1:1234', 2, -1), '--process_id is -1 of 2 processes; it must be 0 to 1'),
    (('node1:1234', 0, 0), '--num_processes is 0; it must be at least 1'),
  ],
)
def test_incomplete_arguments_are_one_line(joined, arguments, message):
  with pytest.raises(UsageError, match=message):
    distribute.join(*arguments)
  assert joined == []


def test_one_process_is_the_first_and_has_the_largest_values(capsys, monkeypatch):
  assert distribute.is_primary()
  distribute.say('hello')
  assert capsys.readouterr().out == 'hello\n'
  values = np.array([3.0, -1.0])
  np.testing.assert_array_equal(distribute.largest(values), values)
  np.testing.assert_array_equal(distribute.gather(values), values)
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  distribute.say('from the second')
  assert capsys.readouterr().out == ''


def test_a_run_goes_on_if_nobody_can_read_its_lines(monkeypatch):
  def broken(*_, **__):
    raise BrokenPipeError

  monkeypatch.setattr('builtins.print', broken)
  distribute.say('hello')


def test_arrays_on_the_local_devices():
  array = np.arange(6.0).reshape(2 * jax.local_device_count(), -1)
  assert np.array_equal(distribute.replicate({'a': array})['a'], array)
  sharded = distribute.shard(array)
  assert np.array_equal(sharded, array)
  assert len(sharded.sharding.device_set) == jax.local_device_count()
