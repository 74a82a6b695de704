"""Labels as other programs write them: whole numbers in several spellings, and cells without a value."""

import re

_WHOLE = re.compile(r'\+?(-?)0*([0-9]+)(?:\.0*)?')
# What pandas, NumPy, Python, SQL, JSON, R and Excel write. Lower-case none is a usual name of a class.
_MISSING = frozenset({'nan', 'NaN', 'NAN', '-nan', 'None', 'null', 'Null', 'NULL', 'NA', 'N/A', '<NA>', '#N/A', 'NaT'})


def whole_number(text: str) -> str:
  """'1' for 1, 01, +1 and 1.0; '' if the text is no whole number."""
  found = _WHOLE.fullmatch(text)
  return ''.join(found.groups()) if found else ''


def is_missing(label: str) -> bool:
  """Whether a label is what programs write into a cell without a value."""
  return label in _MISSING
