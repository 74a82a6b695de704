"""Numbers and tables as text."""

import pytest

from cnn_jax import tables


def test_mean_and_standard_deviation_of_a_sample():
  assert tables.mean_std([0.98, 0.99, 1.0]) == '99.00 ± 1.00 %'
  assert tables.mean_std([0.5]) == '50.00 %'
  assert tables.mean_std([1, 2, 3, 4], percent=False, digits=1) == '2.5 ± 1.3'
  assert tables.format_mean_std(0.9961, 0.0004) == '99.61 ± 0.04 %'
  assert tables.format_mean_std(2.5, None, percent=False, digits=3) == '2.500'


def test_a_markdown_table():
  table = tables.markdown(['run', 'accuracy'], [['a|b', '99 %'], ['c', '']])
  assert table == '| run | accuracy |\n| --- | --- |\n| a\\|b | 99 % |\n| c |  |'
  assert tables.markdown(['run'], []) == '| run |\n| --- |'
  with pytest.raises(ValueError, match='every row must have 2 cells'):
    tables.markdown(['run', 'accuracy'], [['a']])


def test_a_table_is_inserted_between_its_marks():
  page = 'before\n<!-- results -->\nold\nlines\n<!-- end of results -->\nafter'
  new = tables.insert(page, 'results', '| new |')
  assert new == 'before\n<!-- results -->\n| new |\n<!-- end of results -->\nafter'
  assert tables.insert(new, 'results', '| new |') == new


@pytest.mark.parametrize(
  'page', ['', '<!-- results -->', '<!-- end of results -->', 2 * '<!-- results -->x<!-- end of results -->']
)
def test_a_page_without_its_marks_is_refused(page):
  with pytest.raises(ValueError, match='must hold "<!-- results -->" and "<!-- end of results -->" once each'):
    tables.insert(page, 'results', '')
