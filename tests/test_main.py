"""The commands as a user meets them: output, files, and answers to mistakes."""

import json
import os
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from cnn_jax import UsageError, record, seeds, workdirs
from cnn_jax.run import load_run, load_run_dataset
from tests.helpers import ROOT, call_command, logits_of, run_command

DIGITS = '--config=configs/digits.py'


def test_a_run_leaves_its_record(digits_run):
  result = json.loads((digits_run / 'result.json').read_text())
  assert result['dataset'] == 'Digits, 1,797 images bundled with scikit-learn'
  assert result['num_train'] + result['num_validation'] + result['num_test'] == 1797
  assert result['epochs'] == 12
  assert result['steps'] == 12 * (result['num_train'] // 64)
  assert result['test_accuracy'] > 0.9
  assert result['images_per_second'] > 0
  lines = [json.loads(line) for line in (digits_run / 'metrics.jsonl').read_text().splitlines()]
  assert len({(line['step'], line['split']) for line in lines}) == len(lines)
  assert {line['split'] for line in lines} == {'train', 'validation'}
  train = [line for line in lines if line['split'] == 'train']
  assert [line['step'] for line in train] == sorted(line['step'] for line in train)
  assert train[-1]['step'] == result['steps']
  for name in ('loss', 'accuracy', 'learning_rate', 'gradient_norm', 'parameter_norm', 'update_norm'):
    assert all(np.isfinite(line[name]) for line in train)
  assert train[-1]['learning_rate'] < train[0]['learning_rate']
  timing = [json.loads(line) for line in (digits_run / 'timing.jsonl').read_text().splitlines()]
  assert all(0 <= line['data_wait_share'] < 1 for line in timing if line['split'] == 'train')
  config = json.loads((digits_run / 'config.json').read_text())
  assert config['epochs'] == 12
  environment = json.loads((digits_run / 'environment.json').read_text())
  assert environment['versions']['jax']
  assert environment['command']
  assert list(digits_run.glob('events.out.tfevents.*'))
  assert '</html>' in (digits_run / 'report.html').read_text()


def test_evaluate_finds_what_the_run_reported(digits_run):
  result = json.loads((digits_run / 'result.json').read_text())
  done = call_command('cnn_jax.evaluate', f'--workdir={digits_run}')
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert found['n'] == result['num_test']
  for name in ('loss', 'accuracy', 'top5_accuracy'):
    assert found[name] == result[f'test_{name}']
  best = json.loads(
    call_command('cnn_jax.evaluate', f'--workdir={digits_run}', '--split=validation', '--checkpoint=best').stdout
  )
  assert best['accuracy'] >= result['validation_accuracy']


def test_a_run_is_read_back_for_use(digits_run):
  run = load_run(digits_run)
  assert run.class_names == tuple('0123456789')
  assert run.image_shape == (8, 8, 1)
  split = load_run_dataset(run).test
  logits = logits_of(run, split.images, 100)
  result = json.loads((digits_run / 'result.json').read_text())
  assert (logits.argmax(axis=1) == split.labels).mean() == result['test_accuracy']


def _folder(path, classes=('cat', 'dog'), images=3):
  for name in classes:
    (path / name).mkdir(parents=True)
    for i in range(images):
      Image.fromarray(np.full((8, 8), 20 * i, np.uint8)).save(path / name / f'{i}.png')
  return path


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], 'which experiment'),
    (['--config=configs/nothing.py'], 'no config file configs/nothing.py'),
    ([DIGITS, '--config.epoch=3'], 'epoch'),
    ([DIGITS, '--config.epochs=many'], 'epochs'),
    ([DIGITS, '--config.epochs=0'], 'config.epochs is 0'),
    ([DIGITS, '--wrkdir=x'], 'wrkdir'),
    ([DIGITS, 'more'], "'more' is not an argument"),
    ([DIGITS, '--config.model.pool=mean'], 'max, avg, none'),
    ([DIGITS, '--config.batch_size=5000'], 'training images'),
    ([DIGITS, '--config.data.image_size=1'], 'pixels'),
    ([DIGITS, '--config.augment.shift=9'], 'config.augment.shift is 9'),
    (['--config=configs/image_folder.py', '--config.data.dir=/nowhere/at/all'], '/nowhere/at/all'),
  ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, arguments, message):
  workdir = [] if any('wrkdir' in a for a in arguments) else [f'--workdir={tmp_path / "run"}']
  done = call_command('cnn_jax.main', *arguments, *workdir)
  assert done.returncode == 2, done.stderr
  assert message in done.stderr
  assert len(done.stderr.splitlines()) == 1
  assert done.stderr.startswith('error: ')


def test_a_mistake_is_reported_in_a_process_of_its_own_before_anything_slow():
  started = time.monotonic()
  done = run_command('cnn_jax.main', DIGITS, '--config.epoch=3')
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) == 1
  assert time.monotonic() - started < 30


def test_help_names_every_flag():
  done = call_command('cnn_jax.main', '--help')
  assert done.returncode == 0
  for flag in (
    '--config',
    '--workdir',
    '--profile',
    '--coordinator',
    '--num_processes',
    '--process_id',
    '--heartbeat_seconds',
  ):
    assert flag in done.stdout


def test_the_config_may_follow_a_space(tmp_path):
  done = call_command('cnn_jax.main', '--config', 'configs/digits.py', '--config.epochs', '0', '--workdir', tmp_path)
  assert done.returncode == 2
  assert 'config.epochs is 0' in done.stderr


def test_two_runs_in_one_process_do_not_share_flags(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config = f'--config={ROOT}/configs/digits.py'
  fields = ['--config.epochs=1', '--config.schedule.warmup_epochs=0.5', '--config.model.features=(4,)']
  fields += ['--config.log.report=False', '--config.log.tensorboard=False']
  assert call_command('cnn_jax.main', config, *fields, f'--workdir={tmp_path / "first"}', '--profile').returncode == 0
  assert call_command('cnn_jax.main', config, *fields, '--config.seed=1').returncode == 0
  (second,) = (tmp_path / 'runs').iterdir()
  assert second.name.startswith('digits-')
  assert json.loads((second / 'config.json').read_text())['seed'] == 1
  assert list((tmp_path / 'first').glob('plugins/profile/*/*.trace.json.gz'))
  assert not (second / 'plugins').exists()


def test_a_typo_inside_a_config_file_is_named(tmp_path):
  file = tmp_path / 'mine.py'
  body = (
    'from cnn_jax.config import default_config\ndef get_config():\n  config = default_config()\n  {}\n  return config\n'
  )
  for line, name in (('config.optimizer.learning_rte = 1.0', 'learning_rate'), ('config.epochs = "3"', 'epochs')):
    file.write_text(body.format(line))
    done = call_command('cnn_jax.main', f'--config={file}', f'--workdir={tmp_path / "run"}')
    assert done.returncode == 2
    assert name in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize('count', [(('cat',), 3), (('cat', 'dog'), 0), (('cat',), 1)])
def test_folders_that_cannot_be_trained_on(tmp_path, count):
  folder = _folder(tmp_path / 'pictures', *count)
  done = call_command(
    'cnn_jax.main', '--config=configs/image_folder.py', f'--config.data.dir={folder}', f'--workdir={tmp_path / "run"}'
  )
  assert done.returncode == 2
  assert 'pictures' in done.stderr
  assert len(done.stderr.splitlines()) == 1


def test_batches_must_divide_over_devices(tmp_path):
  done = run_command(
    'cnn_jax.main', DIGITS, '--config.batch_size=60', f'--workdir={tmp_path}',
    XLA_FLAGS='--xla_force_host_platform_device_count=8',
  )  # fmt: skip
  assert done.returncode == 2
  assert 'the nearest that do: 56 or 64' in done.stderr


def test_a_workdir_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('')
  done = call_command('cnn_jax.main', DIGITS, f'--workdir={tmp_path / "file" / "run"}')
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) == 1


def test_divergence_is_status_3(tmp_path):
  done = call_command(
    'cnn_jax.main', DIGITS, '--config.optimizer.learning_rate=1e30', '--config.model.norm=none', '--config.model.features=(4, 4)',
    '--config.log.tensorboard=False', f'--workdir={tmp_path / "run"}',
  )  # fmt: skip
  assert done.returncode == 3, done.stderr
  assert done.stderr.startswith('error: the update norm of step 1 is inf')
  assert len(done.stderr.splitlines()) == 1
  assert not (tmp_path / 'run' / 'result.json').exists()


def test_evaluate_refuses_what_is_no_run(tmp_path, digits_run):
  done = call_command('cnn_jax.evaluate', f'--workdir={tmp_path}')
  assert done.returncode == 2
  assert 'config.json is missing' in done.stderr
  shutil.copy(digits_run / 'config.json', tmp_path)
  done = call_command('cnn_jax.evaluate', f'--workdir={tmp_path}')
  assert done.returncode == 2
  assert 'no checkpoint yet' in done.stderr
  done = call_command('cnn_jax.evaluate', f'--workdir={digits_run}', '--split=tests')
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) == 1


def test_a_workdir_belongs_to_one_process(tmp_path, digits_run):
  workdir = tmp_path / 'run'
  with workdirs.lock(workdir):
    done = call_command('cnn_jax.main', DIGITS, f'--workdir={workdir}')
  assert done.returncode == 2
  assert 'in use by process' in done.stderr


# Starts that are refused ------------------------------------------------------------------------

SMALL = (
  '--config.epochs=1', '--config.min_steps=0', '--config.batch_size=4', '--config.schedule.warmup_epochs=0.5',
  '--config.model.features=(4,)', '--config.log.report=False', '--config.log.tensorboard=False', '--config.data.image_size=8',
  '--config.adapt_to_data=False',
)  # fmt: skip


def _train(directory, workdir, *arguments):
  arguments = (*SMALL, f'--config.data.dir={directory}', f'--workdir={workdir}', *arguments)
  return call_command('cnn_jax.main', '--config=configs/image_folder.py', *arguments)


@pytest.mark.parametrize('count', [1, 2])
def test_a_complete_run_does_not_answer_for_other_data(tmp_path, count):
  several = f'--config.seeds={count}'
  pets, other = _folder(tmp_path / 'pets', images=12), _folder(tmp_path / 'other', ('ant', 'bee'), 12)
  assert _train(pets, tmp_path / 'run', several).returncode == 0
  assert 'is complete' in _train(pets, tmp_path / 'run', several).stdout
  done = _train(other, tmp_path / 'run', several)
  assert done.returncode == 2
  assert "class 'ant' is new" in done.stderr
  shutil.move(pets, tmp_path / 'moved')
  assert _train(tmp_path / 'moved', tmp_path / 'run', several).returncode == 0


def test_a_refused_start_leaves_the_workdir_as_it_was(tmp_path):
  pets, run = _folder(tmp_path / 'pets', images=12), tmp_path / 'run'
  (tmp_path / 'bad.safetensors').write_text('bad')
  done = _train(pets, run, f'--config.init_from={tmp_path / "bad.safetensors"}')
  assert done.returncode == 2
  assert [path.name for path in run.iterdir()] == ['.lock']
  assert _train(pets, run).returncode == 0
  for name in ('config.json', 'result.json'):
    (run / name).unlink()
  done = _train(pets, run, '--config.optimizer.learning_rate=0.5')
  assert done.returncode == 2
  assert 'config.optimizer.learning_rate is 0.5, but the checkpoint in' in done.stderr
  assert not (run / 'config.json').exists()
  assert _train(pets, run).returncode == 0


@pytest.mark.parametrize(
  'text', ['{}', '{"test_accuracy": "x"}', '{"num_train": "many"}', '{"seeds": [1], "epochs": {}}']
)
def test_a_file_that_is_no_result_is_one_line(tmp_path, digits_run, text):
  shutil.copytree(digits_run, tmp_path / 'run')
  (tmp_path / 'run' / 'result.json').write_text(text)
  with pytest.raises(UsageError, match='result.json is not the result of a run; remove it, and the same command'):
    seeds.begin(record.load_config(digits_run), tmp_path / 'run')


def test_a_workdir_whose_path_is_not_utf8_is_refused_before_training(tmp_path):
  workdir = tmp_path / os.fsdecode(b'caf\xe9')
  done = call_command('cnn_jax.main', DIGITS, f'--workdir={workdir}')
  assert done.returncode == 2
  assert 'is not UTF-8; use another --workdir' in done.stderr
  assert not workdir.exists()
