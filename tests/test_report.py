"""The report: what it says is true, what it shows is text, and it loads nothing."""

import dataclasses
import html
import html.parser
import json
import os
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_jax import UsageError, calibration, checkpoint, evaluate, record, report
from cnn_jax.config import default_config
from cnn_jax.data import Dataset, Split
from cnn_jax.data.augment import normalize
from cnn_jax.model import create_model, feature_maps
from tests.conftest import run_command

HOSTILE = ('<img src=x onerror=alert(1)>', '</script>', '$x_1$ & "b" \x1b[31m', "'\udce9{{ 7 * 7 }}-->")
SECTIONS = ('result', 'curves', 'confusion', 'calibration', 'mistakes', 'unsure', 'sees', 'layers', 'environment')
VOID = {'meta', 'link', 'img', 'br', 'hr', 'input'}


class Page(html.parser.HTMLParser):
  """What a browser would find in a page: elements, addresses and text."""

  def __init__(self, source):
    super().__init__()
    self.elements, self.addresses, self.open, self.texts, self.headings = [], [], [], [], []
    self.feed(source)
    self.close()
    assert self.open == []
    self.text = ' '.join(' '.join(self.texts).split())

  def handle_starttag(self, tag, attributes):
    if tag not in VOID:
      self.open.append(tag)
    self.handle_startendtag(tag, attributes)

  def handle_startendtag(self, tag, attributes):
    attributes = dict(attributes)
    self.elements.append((tag, attributes))
    for name, value in attributes.items():
      assert not name.startswith('on'), (tag, name)
      if name in ('src', 'href', 'xlink:href', 'srcset', 'action', 'data', 'poster'):
        self.addresses.append(value)
      self.addresses += re.findall(r'url\(([^)]*)\)', value or '')

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data)
    if self.open and self.open[-1] == 'style':
      self.addresses += re.findall(r'url\(([^)]*)\)|@import', data)

  def all(self, tag):
    return [attributes for name, attributes in self.elements if name == tag]


def check_page(source):
  """Checks what holds of every report and returns what a browser finds in it."""
  page = Page(source)
  tags = {tag for tag, _ in page.elements}
  assert not tags & {'script', 'iframe', 'link', 'object', 'embed', 'base', 'form', 'foreignobject'}
  assert [a for a in page.addresses if not a.startswith(('#', 'data:image/'))] == []
  ids = [attributes['id'] for _, attributes in page.elements if 'id' in attributes]
  assert len(ids) == len(set(ids))
  assert {a[1:] for a in page.addresses if a.startswith('#')} <= set(ids)
  assert [attributes['id'] for attributes in page.all('section')] == list(SECTIONS)
  assert len(page.all('h1')) == 1
  assert all('alt' in attributes for attributes in page.all('img'))
  assert all(attributes['aria-label'] for attributes in page.all('svg'))
  (policy,) = [a['content'] for a in page.all('meta') if a.get('http-equiv') == 'Content-Security-Policy']
  assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
  assert len(source.encode()) < 5e6
  assert 'nan' not in page.text.lower().split()
  return page


def make_run(workdir, class_names, shape, *, validation=True, names=False, **model_fields):
  """Writes a run of a network with random weights, and returns its random data set."""
  config = default_config()
  config.model.features = (8, 16)
  config.batch_size = 8
  for name, value in model_fields.items():
    config.model[name] = value
  model = create_model(config.model, len(class_names))
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))
  variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes['params'])
  # Deviations must be positive, means may be.
  statistics = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes.get('batch_stats', {}))
  variables = {'params': variables} | ({'batch_stats': statistics} if statistics else {})

  def split(n):
    paths = [f'{HOSTILE[0]}/{i}{HOSTILE[1]}.png' for i in range(n)] if names else None
    labels = rng.integers(len(class_names), size=n, dtype=np.int32)
    return Split(rng.integers(256, size=(n, *shape), dtype=np.uint8), labels, paths)

  info = {'dataset': f'made {HOSTILE[0]}', 'class_names': list(class_names), 'image_shape': list(shape)}
  checkpoint.save(workdir / 'checkpoints', 3, variables, info=info, keep=1)
  record.write_config(workdir, config)
  return Dataset(info['dataset'], f'by a test {HOSTILE[1]}', class_names, split(8), split(40 * validation), split(90))


@pytest.fixture(scope='module')
def hostile(tmp_path_factory):
  """A run whose class and file names are attacks, and its data set."""
  workdir = tmp_path_factory.mktemp('runs') / HOSTILE[0]
  workdir.mkdir()
  dataset = make_run(workdir, HOSTILE, (12, 16, 3), names=True, residual=True, norm='group')
  record.write_environment(workdir)
  return workdir, dataset


def test_names_are_shown_as_text(hostile):
  workdir, dataset = hostile
  page = check_page(report.write_report(workdir, dataset).read_text())
  for name in HOSTILE[:2]:
    assert name in page.text
  assert '$x_1$ & "b" \\x1b[31m' in page.text
  assert "'\\udce9{{ 7 * 7 }}-->" in page.text
  # In the charts too, which is where matplotlib writes.
  assert '$x_1$ & "b" \\x' in ''.join(page.texts)
  assert 'This run is not complete' in page.text
  assert 'step 3 of 12' in page.text  # 12 epochs of one step
  assert 'metrics.jsonl is missing or empty' in page.text


def test_the_same_run_gives_the_same_page(hostile, tmp_path):
  workdir, dataset = hostile
  first = report.write_report(workdir, dataset, tmp_path / 'a.html')
  second = report.write_report(workdir, dataset, tmp_path / 'b.html')
  assert first == tmp_path / 'a.html'
  assert first.read_bytes() == second.read_bytes()


def test_many_classes_no_validation_flatten(tmp_path):
  names = tuple(f'class number {i}' for i in range(120))
  dataset = make_run(
    tmp_path,
    names,
    (9, 9, 1),
    validation=False,
    aggregate='flatten',
    head='conv1x1',
    stride=2,
    pool='none',
    norm='none',
  )
  # Curves with values that have no logarithm, none at all, and half a line.
  lines = [{'step': i, 'epoch': 1, 'split': 'train', 'loss': None, 'accuracy': 1.0} for i in (1, 2)]
  (tmp_path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n{"step": 3, "sp')
  page = check_page(report.write_report(tmp_path, dataset).read_text())
  assert 'There is no validation split, so no temperature was fitted' in page.text
  assert 'this model flattens its last maps' in page.text
  assert 'environment.json is missing' in page.text
  assert '110 other classes' in page.text
  assert next(a['aria-label'] for a in page.all('svg')).startswith('Accuracy against the training step')
  rows = [text for text in page.texts if text in names]
  assert set(names) <= set(rows)


def test_two_classes_all_right(tmp_path):
  dataset = make_run(tmp_path, ('no', 'yes'), (8, 8, 1), features=(4,))
  run = evaluate.load_run(tmp_path)
  logits = evaluate.compute_logits(run.model, run.variables, dataset.test.images, 100)
  answers = np.argmax(logits, axis=1).astype(np.int32)
  dataset = dataclasses.replace(dataset, test=dataclasses.replace(dataset.test, labels=answers))
  page = check_page(report.write_report(tmp_path, dataset).read_text())
  assert '90 of 90 test images right' in page.text
  assert 'No test image is confused with another class' in page.text
  assert 'There is none: every test image is classified right' in page.text


def test_numbers_of_a_real_run(digits_run):
  result = record.read_result(digits_run)
  page = check_page(report.write_report(digits_run).read_text())
  right = round(result['test_accuracy'] * result['num_test'])
  assert f'{right:,} of {result["num_test"]:,} test images right' in page.text
  assert f'{result["num_parameters"]:,}' in page.text
  assert 'not complete' not in page.text
  assert 'result.json recorded' not in page.text  # only where it differs
  assert '--config=configs/digits.py' in page.text
  assert [a['aria-label'].split(' against')[0] for a in page.all('svg')][:3] == [
    'Loss, nats',
    'Accuracy',
    'Learning rate',
  ]
  # The terms that are listed add up to the logit that is listed.
  walk = re.search(r'channel value weight product (.*?) Softmax', page.text).group(1).replace('\u2212', '-')
  terms = [float(x) for x in re.findall(r'[+-]\d+\.\d+', walk)]
  products, (rest, bias, logit) = terms[1:10:2], terms[10:]
  assert sum(products) + rest + bias == pytest.approx(logit, abs=0.005)


@pytest.mark.parametrize('temperature', [0.05, 1000.0])
def test_it_says_whether_scaling_helped(hostile, monkeypatch, temperature):
  workdir, dataset = hostile
  monkeypatch.setattr(calibration, 'fit_temperature', lambda logits, labels: temperature)
  page = check_page(report.write_report(workdir, dataset).read_text())
  run = evaluate.load_run(workdir)
  logits = evaluate.compute_logits(run.model, run.variables, dataset.test.images, 100)
  errors = [
    calibration.expected_calibration_error(calibration.softmax(logits, t), dataset.test.labels)
    for t in (1, temperature)
  ]
  # Random labels: the surer, the worse.
  assert (errors[1] < errors[0]) == (temperature > 1)
  assert f'{errors[0]:.2%} on the test split as trained, {errors[1]:.2%} with' in page.text
  assert ('Temperature scaling lowered the error' in page.text) == (temperature > 1)
  assert ('Temperature scaling did not lower' in page.text) == (temperature < 1)


@pytest.mark.parametrize(
  ('kernel_size', 'stride', 'convs', 'pool'), [(3, 1, 1, 'avg'), (3, 2, 1, 'none'), (5, 2, 2, 'avg'), (2, 1, 1, 'avg')]
)
def test_receptive_field_is_exact(kernel_size, stride, convs, pool):
  """The gradient of a place of a map is zero outside its field and not at the field's ends."""
  config = default_config().model
  config.features, config.kernel_size, config.stride, config.convs_per_block = (3, 3, 3), kernel_size, stride, convs
  config.pool, config.norm, config.activation = pool, 'none', 'gelu'
  model, size = create_model(config, 2), 37
  rng = np.random.default_rng(0)
  image = rng.normal(size=(1, size, size, 1)).astype(np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)
  # Small ones, with which nothing saturates.
  variables = jax.tree.map(lambda x: 0.1 * rng.normal(size=x.shape).astype(np.float32), shapes)
  maps = jax.eval_shape(lambda x: feature_maps(model, variables, x), image)
  gradient = jax.jit(lambda one: jax.vjp(lambda x: feature_maps(model, variables, x), image)[1](one)[0])
  for block in (1, 2, 3):
    side = maps[f'block{block}'].shape[1]
    for position in (0, side // 2, side - 1):
      one = {name: np.zeros(x.shape, np.float32) for name, x in maps.items()}
      one[f'block{block}'][0, position, position] = 1
      touched = np.flatnonzero(np.abs(np.asarray(gradient(one))).sum(axis=(0, 2, 3)))
      first, last = report.receptive_field(config, size, block, position)
      assert (touched[0], touched[-1]) == (max(first, 0), min(last, size - 1)), (block, position)


@pytest.mark.parametrize('head', ['dense', 'conv1x1'])
def test_activation_maps_average_to_the_logits(tmp_path, head):
  dataset = make_run(tmp_path, tuple('abc'), (8, 8, 1), head=head)
  run = evaluate.load_run(tmp_path)
  look = jax.jit(lambda images: feature_maps(run.model, run.variables, normalize(images)))
  maps = look(dataset.test.images[:5])
  evidence = report.class_activation_maps(run, np.asarray(maps['block2']), np.tile(np.arange(3), (5, 1)))
  assert evidence.shape == (5, 3, 4, 4)
  bias = np.asarray(run.variables['params']['head']['bias'])
  np.testing.assert_allclose(evidence.mean(axis=(2, 3)) + bias, maps['logits'], rtol=1e-5, atol=1e-5)


def test_layers_by_hand(hostile):
  run = evaluate.load_run(hostile[0])
  layers = report._layers(run)
  by_name = {row['name']: row for row in layers['rows']}
  # 12x16 RGB, 3x3 kernels, 8 then 16 channels, 2x2 pooling between, 4 classes.
  assert by_name['block1 · conv1']['operations'] == 2 * 12 * 16 * 9 * 3 * 8
  assert by_name['block2 · conv1']['operations'] == 2 * 6 * 8 * 9 * 8 * 16
  assert by_name['block2 · projection']['parameters'] == 8 * 16
  assert by_name['head']['parameters'] == 16 * 4 + 4
  assert by_name['head']['operations'] == 2 * 16 * 4
  assert layers['parameters'] == sum(p.size for p in jax.tree.leaves(run.variables['params']))
  assert list(by_name)[-2:] == ['global average pooling', 'head']


def test_the_command(digits_run, tmp_path):
  done = run_command('cnn_jax.report', f'--workdir={digits_run}', f'--output={tmp_path / "page.html"}')
  assert (done.returncode, done.stdout) == (0, f'{tmp_path / "page.html"}\n'), done.stderr
  check_page((tmp_path / 'page.html').read_text())


def test_a_file_that_cannot_be_written(hostile, tmp_path):
  workdir, dataset = hostile
  with pytest.raises(UsageError, match='cannot write .*no-such-folder'):
    report.write_report(workdir, dataset, tmp_path / 'no-such-folder' / 'page.html')


def test_no_run(tmp_path):
  with pytest.raises(UsageError, match=r'config\.json is missing'):
    report.write_report(tmp_path)


# In a browser -----------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
WIDTHS = (390, 1280)
HARNESS = """<!doctype html><body>{frames}<pre id="found"></pre><script>
onload = () => {{
  found.textContent = JSON.stringify([...document.querySelectorAll('iframe')].map(frame => ({{
    width: frame.clientWidth,
    needed: frame.contentDocument.documentElement.scrollWidth,
    requests: frame.contentWindow.performance.getEntriesByType('resource').map(entry => entry.name),
    broken: [...frame.contentDocument.images].filter(image => !image.naturalWidth).length,
  }})));
}};
</script>"""


def look(source, folder):
  """Opens a page at 390 and 1280 pixels in headless Chromium: what it measures, and what the console says."""
  frames = ''.join(
    f'<iframe style="border:0;width:{width}px;height:800px" srcdoc="{html.escape(source)}"></iframe>'
    for width in WIDTHS
  )
  (folder / 'harness.html').write_text(HARNESS.format(frames=frames))
  done = subprocess.run(
    [
      CHROMIUM,
      '--headless',
      '--hide-scrollbars',
      '--disable-gpu',
      '--disable-quic',
      '--no-first-run',
      '--disable-background-networking',
      '--disable-component-update',
      '--disable-sync',
      *(['--no-sandbox'] if os.geteuid() == 0 else []),
      f'--user-data-dir={folder / "profile"}',
      '--enable-logging=stderr',
      '--v=0',
      '--window-size=1400,900',
      '--dump-dom',
      (folder / 'harness.html').as_uri(),
    ],
    capture_output=True,
    text=True,
    timeout=120,
    check=True,
  )
  console = [line for line in done.stderr.splitlines() if 'CONSOLE' in line]
  return json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout).group(1))), console


@pytest.mark.skipif(CHROMIUM is None, reason='no chromium on the PATH')
class TestInChromium:
  @pytest.mark.parametrize('which', ['digits', 'hostile'])
  def test_silent_and_fits(self, which, hostile, digits_run, tmp_path):
    workdir, dataset = hostile if which == 'hostile' else (digits_run, None)
    source = report.write_report(workdir, dataset, tmp_path / 'page.html').read_text()
    found, console = look(source, tmp_path)
    assert console == []
    for width, measured in zip(WIDTHS, found, strict=True):
      assert measured == {'width': width, 'needed': width, 'requests': [], 'broken': 0}

  def test_the_harness_would_notice(self, tmp_path):
    bad = (
      '<script>console.error("loud")</script><img src="http://127.0.0.1:9/x.png"><div style="width:999px">wide</div>'
    )
    found, console = look(bad, tmp_path)
    assert any('loud' in line for line in console)
    assert found[0]['needed'] > 390
    assert found[0]['requests'] == ['http://127.0.0.1:9/x.png']
    assert found[0]['broken'] == 1
