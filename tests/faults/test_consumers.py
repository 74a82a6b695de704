"""Whatever reads images normalises them by the statistics of the run, and averages over views if the run does."""

import json

import jax
import numpy as np
import pytest

import cnn_jax
from cnn_jax import calibration, evaluate, export, metrics
from cnn_jax.report.subject import Subject
from cnn_jax.run import load_run, load_run_dataset
from tests.faults.tools import call_command, folder_arguments, one_line, read_json, write_photographs

MEAN, STD = (60.0, 120.0, 180.0), (20.0, 40.0, 80.0)

pytestmark = pytest.mark.faults


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  place = tmp_path_factory.mktemp('runs')
  directory = write_photographs(place / 'pictures', count=50)
  done = call_command(
    'cnn_jax.main',
    *folder_arguments(
      directory, place / 'run', data__mean=MEAN, data__std=STD, evaluation__views=True, augment__flip=True,
      augment__shift=0, log__report=True, model__aggregate='flatten', optimizer__learning_rate=1e-6,
    ),
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return place / 'run'


def by_hand(run, images):
  """The logits without the code that normalises and averages."""
  levels = (np.asarray(images, np.float32) - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
  with jax.default_matmul_precision('highest'):
    return np.asarray(jax.jit(lambda x: run.model.apply(run.variables, x)[0])(levels))


def test_all_that_read_images_agree(workdir):
  run = load_run(workdir)
  split = load_run_dataset(run).test
  images = np.asarray(split.images[:])
  logits = by_hand(run, images)
  plain = calibration.softmax(logits)
  averaged = (plain + calibration.softmax(by_hand(run, images[:, :, ::-1]))) / 2
  assert np.abs(plain - averaged).max() > 1e-3
  close = dict(rtol=1e-4, atol=1e-5)
  measured = metrics.classification_metrics(np.log(averaged), split.labels)

  # Training, which evaluates the test at its end, and the commands.
  result = read_json(workdir / 'result.json')
  assert result['test_loss'] == pytest.approx(measured['loss'], rel=1e-4)
  assert evaluate.evaluate_split(run.model, run.variables, split, run.config)['loss'] == pytest.approx(measured['loss'])
  for arguments, expected in (((), averaged), (('--no-tta',), plain)):
    found = json.loads(call_command('cnn_jax.evaluate', f'--workdir={workdir}', *arguments).stdout)
    assert found['loss'] == pytest.approx(
      metrics.classification_metrics(np.log(expected), split.labels)['loss'], rel=1e-4
    )
    path = run.config.data.dir + '/' + split.names[0]
    found = json.loads(call_command('cnn_jax.predict', f'--workdir={workdir}', '--json', *arguments, path).stdout)
    assert found['probability'] == pytest.approx(expected[0].max(), rel=1e-4)
  assert f'{measured["loss"]:.4f} nats' in (workdir / 'report.html').read_text()

  # What is inside the network.
  classifier = cnn_jax.load(workdir)
  np.testing.assert_allclose(classifier.predict(images[:5]), averaged[:5], **close)
  np.testing.assert_allclose(classifier.predict(images[:5], tta=False), plain[:5], **close)
  np.testing.assert_allclose(classifier.feature_maps(images[0])['logits'], logits[0], **close)
  (found,) = Subject(run, split, logits, 'test').inside(np.arange(4))
  np.testing.assert_allclose(found.maps['logits'], logits[:4], **close)

  # Exports compute one view, and say so.
  for name in ('model.stablehlo', 'model.onnx'):
    done = call_command('cnn_jax.export', f'--workdir={workdir}', f'--output={workdir / name}')
    assert done.returncode == 0
    assert done.stderr.startswith('note: the run averages') and len(done.stderr.splitlines()) == 1
  np.testing.assert_allclose(export.load(workdir / 'model.stablehlo')(images), plain, **close)
  runtime = pytest.importorskip('onnxruntime')
  session = runtime.InferenceSession(str(workdir / 'model.onnx'), providers=['CPUExecutionProvider'])
  np.testing.assert_allclose(session.run(None, {'images': images})[0], plain, **close)


def test_statistics_belong_to_the_run(workdir):
  run = load_run(workdir)
  arguments = folder_arguments(
    run.config.data.dir, workdir, evaluation__views=True, augment__flip=True, augment__shift=0
  )
  line = one_line(call_command('cnn_jax.main', *arguments))
  assert 'config.data.mean is' in line and 'was started with' in line
  config = read_json(workdir / 'config.json')
  config['data']['std'] = [1, 2]
  (workdir / 'config.json').write_text(json.dumps(config))
  assert 'config.data.std is (1, 2)' in one_line(call_command('cnn_jax.evaluate', f'--workdir={workdir}'))
