"""The report: its numbers are true, names in it stay text, and it loads nothing."""

import dataclasses
import html
import html.parser
import json
import os
import re
import shutil
import subprocess
import time

import jax
import numpy as np
import pytest

from cnn_jax import UsageError, calibration, checkpoint, evaluate, models, record, report, run
from cnn_jax.config import default_config
from cnn_jax.data import Dataset, Split
from cnn_jax.report import subject
from tests.helpers import call_command, logits_of

HOSTILE = ('<img src=x onerror=alert(1)>', '</script>', '$x_1$ & "b" \x1b[31m', "'\udce9{{ 7 * 7 }}-->")
SECTIONS = (
  'result', 'curves', 'confusion', 'calibration', 'mistakes', 'uncertain', 'network', 'layers', 'environment',
)  # fmt: skip
VOID = {'meta', 'link', 'img', 'br', 'hr', 'input'}
TOWER = '''"""Five stages of layers that the other network does not have, and a head that reads averages."""
import flax.linen as nn
from ml_collections import ConfigDict

RULES = {'width': 'positive', 'dtype': ('float32',)}


def default_config():
  return ConfigDict({'width': 4, 'frozen_stages': 0, 'dtype': 'float32'})


def create(config, num_classes):
  return Tower(num_classes, config.width)


class Tower(nn.Module):
  num_classes: int
  width: int
  frozen_stages: int = 0
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, images, train=False, positions=None):
    x = nn.Conv(self.width, (4, 4), strides=2, name='patches')(images)
    maps = {}
    for i in range(5):
      y = nn.Conv(self.width, (3, 3), feature_group_count=self.width, name=f'depthwise{i}')(x)
      x = nn.gelu(x + nn.LayerNorm(name=f'scale{i}')(y))
      maps[f'stage{i + 1}'] = x
    maps['pooled'] = x.mean(axis=(1, 2))
    maps['logits'] = nn.Dense(self.num_classes, name='head')(maps['pooled'])
    return maps['logits'], maps
'''


class Page(html.parser.HTMLParser):
  """The elements, addresses and text that a browser finds in a page."""

  def __init__(self, source):
    super().__init__()
    self.elements, self.addresses, self.open, self.texts = [], [], [], []
    self.feed(source)
    self.close()
    assert self.open == []
    self.text = ' '.join(' '.join(self.texts).split()).replace('\u00d7', 'x')

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


def check_page(path):
  """Checks the properties of every report and returns the page as a browser finds it."""
  source = path.read_text()
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


def make_run(workdir, class_names, shape, *, model='cnn', validation=True, names=False, **fields):
  """Writes a run of a network with random weights, and returns its random data set."""
  config = default_config(model)
  config.batch_size = 8
  config.model.update(fields)
  rng = np.random.default_rng(0)
  shapes = models.init_shapes(models.create(config.model, len(class_names)), shape)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes['params'])
  # Deviations must be positive, means may be.
  variables = {
    'params': params,
    'batch_stats': jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes['batch_stats']),
  }

  def split(n):
    paths = [f'{HOSTILE[0]}/{i}{HOSTILE[1]}.png' for i in range(n)] if names else None
    labels = rng.integers(len(class_names), size=n, dtype=np.int32)
    return Split(rng.integers(256, size=(n, *shape), dtype=np.uint8), labels, paths)

  info = {'dataset': f'made {HOSTILE[0]}', 'class_names': list(class_names), 'image_shape': list(shape)}
  checkpoint.save(workdir / 'checkpoints', 3, variables, info=info, keep=1)
  record.write_config(workdir, config)
  return Dataset(info['dataset'], f'by a test {HOSTILE[1]}', class_names, split(8), split(60 * validation), split(60))


@pytest.fixture(scope='module')
def hostile(tmp_path_factory):
  """The report about a run whose class and file names are attacks; its labels are random."""
  workdir = tmp_path_factory.mktemp('runs') / HOSTILE[0]
  workdir.mkdir()
  dataset = make_run(
    workdir, HOSTILE, (12, 16, 3), names=True, features=(8, 16), residual=True, norm='group', pool='avg'
  )
  record.write_environment(workdir)
  return report.write_report(workdir, dataset), dataset


def test_names_are_shown_as_text(hostile):
  page = check_page(hostile[0])
  for name in HOSTILE[:2]:
    assert name in page.text
  assert '$x_1$ & "b" \\x1b[31m' in page.text
  assert "'\\udce9{{ 7 * 7 }}-->" in page.text
  assert '$x_1$ & "b" \\x' in ''.join(page.texts)  # in the charts, which matplotlib writes
  assert 'This run is not complete' in page.text
  assert 'step 3 of 12' in page.text  # 12 epochs of one step
  assert 'metrics.jsonl is missing or empty' in page.text


def test_calibration_before_and_after_scaling(hostile):
  path, dataset = hostile
  page, found = check_page(path), run.load_run(path.parent)
  logits, validation_logits = (logits_of(found, split.images) for split in (dataset.test, dataset.validation))
  temperature = calibration.fit_temperature(validation_logits, dataset.validation.labels)
  before, after = (
    calibration.expected_calibration_error(calibration.softmax(logits, t), dataset.test.labels)
    for t in (1, temperature)
  )
  assert after < before  # the labels are random, so any confidence is too high
  assert f'On the test split it is {before:.2%} as trained and {after:.2%} if the logits' in page.text
  assert 'Temperature scaling lowered the calibration error' in page.text


def test_many_classes_no_validation_flatten(tmp_path):
  names = tuple(f'class number {i}' for i in range(120))
  dataset = make_run(
    tmp_path, names, (9, 9, 1), validation=False, features=(4, 8), aggregate='flatten', head='conv1x1', stride=2,
    pool='none', norm='none',
  )  # fmt: skip
  # Curves with values that have no logarithm, no values, a line with text instead of a number, and half a line.
  lines: list[dict] = [{'step': i, 'split': 'train', 'loss': None, 'accuracy': 1.0} for i in (1, 2)]
  lines.append({'step': 3, 'split': 'train', 'learning_rate': 'x'})
  (tmp_path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n{"step": 3, "sp')
  page = check_page(report.write_report(tmp_path, dataset))
  assert 'There is no validation split, so no temperature was fitted' in page.text
  assert "the input of this network's head is not an average of maps" in page.text
  assert 'environment.json is missing' in page.text
  assert '110 other classes' in page.text
  assert 'Most frequent confusions of 120 classes' in page.text
  assert not any(text.startswith('Confusion matrix') for text in (a['aria-label'] for a in page.all('svg')))
  descriptions = [a['aria-label'] for a in page.all('svg')]
  assert [text for text in descriptions if 'against the training step' in text] == [
    'Accuracy against the training step; last train value 1.'
  ]
  listed = int(re.search(r'The table shows the (\d+) classes with the lowest F1 of 120', page.text).group(1))
  assert 60 < listed <= 100  # of the classes that 60 images belong to or are predicted as
  # Two strided 3x3 convolutions see five pixels of nine.
  assert 'Each position depends on 5 x 5 pixels' in page.text


def test_two_classes_without_mistakes(tmp_path):
  dataset = make_run(tmp_path, ('no', 'y' * 1000), (8, 8, 1), features=(4,))
  found = run.load_run(tmp_path)
  splits = {}
  for name in ('test', 'validation'):
    split = getattr(dataset, name)
    logits = logits_of(found, split.images)
    splits[name] = dataclasses.replace(split, labels=np.argmax(logits, axis=1).astype(np.int32))
  dataset = dataclasses.replace(dataset, **splits)
  page = check_page(report.write_report(tmp_path, dataset))
  assert '60 of 60 images are classified correctly' in page.text
  assert 'No test image is confused with another class' in page.text
  assert 'All test images are classified correctly' in page.text
  assert 'All validation images are classified correctly' in page.text
  assert 'y' * 300 not in page.text  # long names are cut
  with pytest.raises(UsageError, match='cannot write .*: it is there and is not a file'):
    report.write_report(tmp_path, dataset, tmp_path)
  assert {path.name for path in tmp_path.iterdir()} == {'checkpoints', 'config.json', 'report.html'}


def test_another_network_needs_only_the_contract(tmp_path, monkeypatch):
  (tmp_path / 'tower.py').write_text(TOWER)
  monkeypatch.setattr(models, '__path__', [*models.__path__, str(tmp_path)])
  # A temperature that makes random predictions more confident makes them worse.
  monkeypatch.setattr(calibration, 'fit_temperature', lambda logits, labels: 0.05)
  workdir = tmp_path / 'run'
  workdir.mkdir()
  page = check_page(report.write_report(workdir, make_run(workdir, ('a', 'b', 'c'), (16, 16, 1), model='tower')))
  headings = re.findall(r'Stage \d: \w+', page.text)
  assert headings == ['Stage 1: edges', 'Stage 2: textures', 'Stage 3: parts', 'Stage 4: parts', 'Stage 5: objects']
  assert '2 convolutions' not in page.text
  # Stage 1: 4x4x1x4 weights and 4 biases, 3x3x4 weights and 4 biases, 4 scales and 4 biases.
  assert '1 convolution 4x4, 1 convolution 3x3, 1 layer norm; 116 parameters' in page.text
  assert 'Each position depends on 8 x 8 pixels' in page.text
  assert 'Each position depends on the whole image' in page.text
  assert 'patches convolution 4 x 4 x 1 x 4 8 x 8 x 4 68' in page.text
  assert 'global average pooling 4 head dense layer 4 x 3' in page.text
  assert 'class activation maps' in page.text
  assert 'Temperature scaling did not lower the calibration error' in page.text


def test_photographs(tmp_path):
  """Evidence over pictures, whole pictures for large fields, and each network compiled twice at most."""
  dataset = make_run(tmp_path, ('a', 'b'), (80, 72, 3), validation=3, features=(4, 4, 6), stride=4, norm='none')
  before = evaluate.eval_step._cache_size(), subject._compute._cache_size()
  path = report.write_report(tmp_path, dataset)
  assert (evaluate.eval_step._cache_size(), subject._compute._cache_size()) == (before[0] + 1, before[1] + 1)
  page = check_page(path)
  assert 'lit where this channel responds' in page.text
  assert len([a for a in page.all('img') if a['alt'].startswith('Evidence for')]) == 1 + 2 * (15 + min(24, wrong(page)))
  # Logits that are given are not computed again.
  logits = logits_of(run.load_run(tmp_path), dataset.test.images)
  again = report.write_report(tmp_path, dataset, tmp_path / 'again.html', logits={'test': -logits})
  assert wrong(check_page(again)) == 60 - wrong(page)


@pytest.mark.faults
def test_a_deep_network_and_photographs_of_224_pixels(tmp_path):
  dataset = make_run(tmp_path, [f'{i}' for i in range(100)], (224, 224, 3), model='efficientnet', validation=0)
  started = time.process_time()
  page = check_page(report.write_report(tmp_path, dataset))  # noise is what compresses worst
  assert time.process_time() - started < 60
  headings = re.findall(r'(Stages? \d[^:]*): \w+', page.text)
  assert headings == ['Stage 1', 'Stage 2', 'Stage 3', 'Stages 4 and 5', 'Stages 6 to 8']
  assert 'Most frequent confusions of 100 classes' in page.text
  assert 'stage 8 1 convolution 1x1, 1 batch norm 7 x 7 x 1280' in page.text


def wrong(page):
  """The number of mistakes that a page counts."""
  correct, count = re.search(r'accuracy: (\d+) of (\d+) images', page.text).groups()
  return int(count) - int(correct)


def test_numbers_of_a_real_run(digits_run):
  result = record.read_result(digits_run)
  page = check_page(digits_run / 'report.html')
  correct = round(result['test_accuracy'] * result['num_test'])
  assert f'{correct:,} of {result["num_test"]:,} images are classified correctly' in page.text
  assert f'{result["num_parameters"]:,}' in page.text
  assert 'not complete' not in page.text
  assert 'result.json recorded' not in page.text  # shown only if it differs
  assert json.loads((digits_run / 'environment.json').read_text())['command'] in page.text
  assert [a['aria-label'].split(' against')[0] for a in page.all('svg')][:3] == [
    'Loss, nats',
    'Accuracy',
    'Learning rate',
  ]
  # The terms that are listed add up to the logit that is listed.
  table = re.search(r'channel value weight product (.*?) Softmax', page.text).group(1).replace('\u2212', '-')
  terms = [float(x) for x in re.findall(r'[+-]\d+\.\d+', table)]
  products, (rest, bias, logit) = terms[1:10:2], terms[10:]
  assert sum(products) + rest + bias == pytest.approx(logit, abs=0.005)


def test_the_command_writes_the_same_page_again(digits_run, tmp_path):
  page = tmp_path / 'page.html'
  done = call_command('cnn_jax.report', f'--workdir={digits_run}', f'--output={page}')
  assert (done.returncode, done.stdout) == (0, f'{page}\n'), done.stderr
  assert page.read_bytes() == (digits_run / 'report.html').read_bytes()


def test_a_page_about_validation(digits_run, tmp_path):
  page = tmp_path / 'page.html'
  done = call_command('cnn_jax.report', f'--workdir={digits_run}', f'--output={page}', '--split=validation')
  assert done.returncode == 0, done.stderr
  result, text = record.read_result(digits_run), check_page(page).text
  correct = round(result['validation_accuracy'] * result['num_validation'])
  assert f'Validation accuracy: {correct:,} of {result["num_validation"]:,} images' in text
  assert 'test accuracy' not in text.lower() and 'Temperature scaling' not in text


def test_a_file_that_cannot_be_written(digits_run, tmp_path):
  done = call_command('cnn_jax.report', f'--workdir={digits_run}', f'--output={tmp_path}/no-such-folder/page.html')
  assert (done.returncode, done.stdout) == (2, '')
  assert 'no-such-folder/page.html: its folder does not exist' in done.stderr


def test_no_run(tmp_path):
  with pytest.raises(UsageError, match=r'config\.json is missing'):
    report.write_report(tmp_path)


# In a browser -----------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
WIDTHS = (390, 1280)
BAD = '<script>console.error("loud")</script><img src="http://127.0.0.1:9/x.png"><div style="width:999px">wide</div>'
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


def look(sources, folder):
  """Opens each page at each width in headless Chromium: its measurements in that order, and the lines of the console."""
  frames = ''.join(
    f'<iframe style="border:0;width:{width}px;height:800px" srcdoc="{html.escape(source)}"></iframe>'
    for source in sources
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
def test_the_page_is_silent_and_fits_in_chromium(hostile, digits_run, tmp_path):
  pages = [hostile[0], digits_run / 'report.html']
  found, console = look([*(page.read_text() for page in pages), BAD], tmp_path)
  assert len(found) == 6
  for width, measured in zip(WIDTHS * 2, found[:4], strict=True):
    assert measured == {'width': width, 'needed': width, 'requests': [], 'broken': 0}
  # The measurements do notice a bad page, and only the bad one writes to the console.
  assert any('loud' in line for line in console)
  assert [line for line in console if 'loud' not in line and '127.0.0.1:9/x.png' not in line] == []
  assert found[4]['needed'] > 390
  assert found[4]['requests'] == ['http://127.0.0.1:9/x.png']
  assert found[4]['broken'] == 1
