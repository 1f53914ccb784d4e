"""CSV results files that grow over several runs: a new row replaces only the row with the same key."""
import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from coatnet_train.runtime.cli import ConfigError, one_line
from coatnet_train.runtime.files import write_file

__all__ = ['KEYS', 'NOT_MEASURED', 'card_slug', 'merge_rows', 'read_rows', 'write_rows']

NOT_MEASURED = 'not measured'
KEYS = {  # by kind of file, KIND_<card>.csv: key columns, and the column of the measured value
    'ops': (('hardware', 'op', 'side', 'channels', 'kernel', 'passes', 'batch_size', 'dtype', 'backend', 'timer'),
            'ms'),
    'models': (('hardware', 'model', 'mode', 'form', 'precision', 'batch_size', 'img_size'), 'images_per_second'),
    'checks': (('hardware', 'step', 'check'), 'result')}


def read_rows(path: Path, columns: Sequence[str] = ()) -> list[dict[str, str]]:
    """Rows of a CSV file; none if there is no file.

    Args:
        path: CSV file in UTF-8.
        columns: Columns that the file must have.

    Raises:
        ConfigError: The file cannot be read, lacks a column, or has a row of another length than its first.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline='', encoding='utf-8') as lines:
            reader = csv.DictReader(lines)
            rows, names = list(reader), reader.fieldnames or ()
    except (OSError, ValueError, csv.Error) as error:  # ValueError: not UTF-8
        raise ConfigError(f'{path} must be a CSV file in UTF-8: {one_line(error)}; take it away or repair '
                          f'it.') from error
    if missing := [name for name in columns if name not in names]:
        raise ConfigError(f'{path} must have the columns {", ".join(columns)}, but lacks {", ".join(missing)}; take it '
                          f'away or repair it.')
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():  # too many or too few cells
            raise ConfigError(f'{path} must have {len(names)} cells in every row, but row {number} has not; take it '
                              f'away or repair it.')
    return rows


def write_rows(path: Path, rows: Sequence[dict]) -> None:
    """Write a CSV file with the union of the columns of all rows."""
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, columns, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, lambda temporary: temporary.write_text(text.getvalue(), encoding='utf-8'))


def merge_rows(path: Path, rows: Sequence[dict], key: Sequence[str], value: str) -> None:
    """Add rows to a file, replacing rows with the same key.

    Args:
        path: CSV file, created if it does not exist.
        rows: New rows.
        key: Key columns; a column that an older row lacks counts as empty.
        value: Column of the measured value: "not measured" never replaces a measured value.
    """
    def key_of(row: dict) -> tuple[str, ...]:
        return tuple(str(row.get(name) or '') for name in key)

    merged: dict[tuple[str, ...], dict] = {key_of(row): row for row in read_rows(path)}
    for row in rows:
        earlier = merged.get(key_of(row))
        if earlier is None or row[value] != NOT_MEASURED or earlier[value] == NOT_MEASURED:
            merged[key_of(row)] = row
    write_rows(path, list(merged.values()))


def card_slug(hardware: str) -> str:
    """Name of a card for file names: 'NVIDIA H200' is h200."""
    return re.sub('[^a-z0-9]+', '_', hardware.lower().replace('nvidia', '')).strip('_') or 'unknown'
