"""Numbers and tables as text: mean and standard deviation, Markdown tables, and tables kept up to date in a page."""

import statistics
from collections.abc import Sequence


def mean_std(values: Sequence[float], *, percent: bool = True, digits: int = 2) -> str:
  """Formats a mean and the standard deviation of the sample (n - 1), for example `99.61 ± 0.04 %`.

  Args:
    values: at least one; the deviation of a single value is left out.
    percent: whether the values are fractions to show in percent.
    digits: after the decimal point.
  """
  spread = statistics.stdev(values) if len(values) > 1 else None
  return format_mean_std(statistics.mean(values), spread, percent=percent, digits=digits)


def format_mean_std(mean: float, std: float | None, *, percent: bool = True, digits: int = 2) -> str:
  """Formats a mean and a standard deviation that have been computed already; see `mean_std`."""
  scale, unit = (100, ' %') if percent else (1, '')
  spread = '' if std is None else f' ± {scale * std:.{digits}f}'
  return f'{scale * mean:.{digits}f}{spread}{unit}'


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Makes a Markdown table.

  Args:
    header: the titles of the columns.
    rows: the cells, as text; `|` is escaped.

  Raises:
    ValueError: a row does not have a cell per column.
  """
  if any(len(row) != len(header) for row in rows):
    raise ValueError(f'every row must have {len(header)} cells')
  lines = [header, ['---'] * len(header), *rows]
  return '\n'.join(f'| {" | ".join(cell.replace("|", chr(92) + "|") for cell in line)} |' for line in lines)


def insert(page: str, name: str, table: str) -> str:
  """Replaces the text between `<!-- NAME -->` and `<!-- end of NAME -->` in a page.

  Args:
    page: Markdown that holds the two marks, each once.
    name: of the marks.
    table: the new text.

  Returns:
    The new page, which equals the old one if the table was up to date.

  Raises:
    ValueError: a mark is missing or repeated.
  """
  begin, end = f'<!-- {name} -->', f'<!-- end of {name} -->'
  if page.count(begin) != 1 or page.count(end) != 1:
    raise ValueError(f'the page must hold "{begin}" and "{end}" once each')
  before, _, rest = page.partition(begin)
  _, _, after = rest.partition(end)
  return f'{before}{begin}\n{table}\n{end}{after}'
