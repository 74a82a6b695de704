"""Joining the processes of a run; tests/faults/test_hosts.py trains with several, test_train.py with several devices."""

import contextlib
import os
import sys

import jax
import numpy as np
import pytest
from jax._src.clusters import K8sCluster, cloud_tpu_cluster

from cnn_jax import UsageError, distribute, peers

SRUN = {
  'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'node[3-4]', 'SLURM_NTASKS': '2', 'SLURM_PROCID': '1', 'SLURM_LOCALID': '0',
  'SLURM_STEP_NUM_TASKS': '2', 'SLURM_STEP_NUM_NODES': '2',
}  # fmt: skip
MPIRUN = {
  'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://10.96.0.1:34911', 'OMPI_COMM_WORLD_SIZE': '4',
  'OMPI_COMM_WORLD_RANK': '1', 'OMPI_COMM_WORLD_LOCAL_RANK': '1', 'OMPI_COMM_WORLD_LOCAL_SIZE': '2',
}  # fmt: skip
TPU = {'TPU_WORKER_HOSTNAMES': 'a,b', 'TPU_WORKER_ID': '1', 'MEGASCALE_NUM_SLICES': '1'}
POD = {'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOB_COMPLETION_INDEX': '1'}


@pytest.fixture
def joined(monkeypatch):
  """What JAX is asked to join, outside any cluster."""
  calls = []

  def initialize(*arguments, **options):
    calls.append((*arguments, {name: options.get(name) for name in ('local_device_ids', 'cluster_detection_method')}))

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  monkeypatch.setattr(peers, 'connect', lambda initialize, *_: initialize())
  for variable in {*os.environ} & {*SRUN, *MPIRUN, *TPU, *POD, 'JAX_LOCAL_DEVICE_IDS', 'TPU_SKIP_MDS_QUERY'}:
    monkeypatch.delenv(variable)
  monkeypatch.setattr(cloud_tpu_cluster, 'running_in_cloud_tpu_vm', True)
  monkeypatch.setattr(cloud_tpu_cluster, 'get_metadata', lambda _: ('', 404))
  return calls


def _set(monkeypatch, variables):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)


BATCH = {name: value for name, value in SRUN.items() if not name.startswith('SLURM_STEP')}


@pytest.mark.parametrize(
  'variables',
  [
    {},
    BATCH | {'SLURM_NTASKS': '4'},  # what sbatch sets; only srun starts four processes
    SRUN | {'SLURM_NTASKS': '4', 'SLURM_STEP_NUM_TASKS': '1'},  # the shell of an interactive job
    SRUN | {'SLURM_NTASKS': '1', 'SLURM_STEP_NUM_TASKS': '1'},
    MPIRUN | {'OMPI_COMM_WORLD_SIZE': '1', 'OMPI_COMM_WORLD_RANK': '0'},
    TPU | {'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'},
    {'KUBERNETES_SERVICE_HOST': '10.0.0.1'},  # any pod
    POD,  # without the package of Kubernetes JAX does not detect it
  ],
)
def test_a_single_process_joins_nothing(joined, monkeypatch, variables):
  _set(monkeypatch, variables)
  monkeypatch.setitem(sys.modules, 'kubernetes', None)
  distribute.join()
  assert joined == []


@pytest.mark.parametrize(
  ('variables', 'devices'),
  [
    (SRUN, []),  # all of a machine, since it has one process
    (SRUN | {'SLURM_NTASKS': '4', 'SLURM_STEP_NUM_TASKS': '4'}, None),  # JAX gives each process one
    (SRUN | {'JAX_LOCAL_DEVICE_IDS': '1,2'}, None),
    (MPIRUN, None),
    (MPIRUN | {'OMPI_COMM_WORLD_LOCAL_SIZE': '1'}, []),
    (TPU, None),
  ],
)
def test_processes_of_a_cluster_find_each_other(joined, monkeypatch, variables, devices):
  _set(monkeypatch, variables)
  distribute.join()
  distribute.join('node1:1234')
  distribute.join(num_processes=1)
  options = {'local_device_ids': devices, 'cluster_detection_method': None}
  assert joined == [(None, None, None, options), ('node1:1234', None, None, options)]


def test_an_indexed_job_of_kubernetes_joins_if_its_client_is_installed(joined, monkeypatch):
  _set(monkeypatch, POD)
  monkeypatch.setattr(K8sCluster, 'is_env_present', classmethod(lambda _: True))
  monkeypatch.setattr(K8sCluster, 'get_process_count', classmethod(lambda _: 2))
  distribute.join()
  assert len(joined) == 1

  def refused(_):
    raise RuntimeError('Kubernetes API Error:\n403')

  monkeypatch.setattr(K8sCluster, 'get_process_count', classmethod(refused))
  with pytest.raises(UsageError, match='K8s started this process, but .*Error: 403.*; give --coordinator'):
    distribute.join()
  distribute.join('job-0.service:1234', 2, 1)
  assert len(joined) == 2


@pytest.mark.parametrize(
  'variables',
  [
    SRUN | {'SLURM_NTASKS': 'two'},
    {name: value for name, value in MPIRUN.items() if name != 'OMPI_MCA_orte_hnp_uri'},  # version 5, without mpi4py
    TPU | {'MEGASCALE_NUM_SLICES': 'two'},
  ],
)
def test_a_cluster_that_jax_cannot_read_is_one_line(joined, monkeypatch, variables):
  _set(monkeypatch, variables)
  with pytest.raises(UsageError, match='started this process, but the number of processes is not known'):
    distribute.join()
  assert joined == []


@pytest.mark.parametrize(('hosts', 'found'), [('a', False), ('a,b', True)])
def test_a_machine_with_tpus_may_be_outside_of_the_cloud(joined, monkeypatch, hosts, found):
  def no_server(_):
    raise OSError('metadata.google.internal: name not known')

  _set(monkeypatch, {'TPU_WORKER_HOSTNAMES': hosts})
  monkeypatch.setattr(cloud_tpu_cluster, 'get_metadata', no_server)
  with pytest.raises(UsageError, match='google.internal') if found else contextlib.nullcontext():
    distribute.join()
  assert joined == []


def test_processes_with_numbers_join_as_they_are_told(joined, monkeypatch):
  _set(monkeypatch, SRUN)
  distribute.join('[::1]:1234', 2, 1)
  assert joined == [('[::1]:1234', 2, 1, {'local_device_ids': None, 'cluster_detection_method': 'deactivate'})]


def test_what_jax_raises_while_it_joins_is_one_line(joined, monkeypatch):
  def refuse(*_, **__):
    raise RuntimeError('UNKNOWN: Could not start\n the server')

  monkeypatch.setattr(jax.distributed, 'initialize', refuse)
  with pytest.raises(
    UsageError, match='cannot join the other processes at node1:1: UNKNOWN: Could not start the server'
  ):
    distribute.join('node1:1', 2, 0)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((None, 2, 0), '--num_processes and --process_id need --coordinator=HOST:PORT'),
    ((None, None, 0), '--num_processes and --process_id need --coordinator'),
    (('node1', 2, 0), "--coordinator is 'node1'; give it as HOST:PORT"),
    ((':1234', 2, 0), "--coordinator is ':1234'; give it as HOST:PORT"),
    (('node1:http', 2, 0), "--coordinator is 'node1:http'; give it as HOST:PORT"),
    (('node1:0', 2, 0), "--coordinator is 'node1:0'; give it as HOST:PORT"),
    (('node1:65536', 2, 0), '--coordinator is .*; give it as HOST:PORT'),
    (('http://node1:80', 2, 0), '--coordinator is .*; give it as HOST:PORT'),
    (('a b:80', 2, 0), '--coordinator is .*; give it as HOST:PORT'),
    (('', 2, 0), "--coordinator is ''; give it as HOST:PORT"),
    (('node1:1234', None, 1), '--coordinator needs --num_processes and --process_id'),
    (('node1:1234', None, None), '--coordinator needs --num_processes and --process_id'),
    (('node1:1234', 2, None), '--coordinator needs --num_processes and --process_id'),
    (('node1:1234', 2, 2), '--process_id is 2 of 2 processes; it must be 0 to 1'),
    (('node1:1234', 2, -1), '--process_id is -1 of 2 processes; it must be 0 to 1'),
    (('node1:1234', 0, 0), '--num_processes is 0; it must be at least 1'),
    (('node1:1234', 2, 0, 1.0), '--heartbeat_seconds is 1; it must be from 2 to 86400'),
    (('node1:1234', 2, 0, float('nan')), '--heartbeat_seconds is nan; it must be from 2'),
    (('node1:1234', 2, 0, 5.0, float('inf')), '--join_seconds is inf; it must be from 1'),
    ((None, None, None, 5.0, 5.0, -1.0), '--stall_seconds is -1; it must be from 2'),
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
