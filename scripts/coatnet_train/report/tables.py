"""Helpers for Markdown tables, and for the results files that they are made from."""
import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

__all__ = ['NOT_MEASURED', 'epochs_of', 'hardware_of', 'read_csv', 'read_json', 'spread', 'table', 'threads_of']

NOT_MEASURED = 'not measured'


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding='utf-8'))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline='', encoding='utf-8') as lines:
        return list(csv.DictReader(lines))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown table; columns with a cell that begins with a digit are right-aligned."""
    alignment = ['-:' if any(cell[:1].isdigit() for cell in column) else '-' for column in zip(*rows, strict=True)]
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in (header, alignment, *rows))


def spread(cell: dict | None, deviation: str = 'deviation', digits: int = 1) -> str:
    """Format a cell of results as '80.0 ± 1.3' from its `top1` and deviation, which may be "not measured"."""
    if cell is None:
        return NOT_MEASURED
    around = '' if isinstance(cell[deviation], str) else f' ± {cell[deviation]:.{digits}f}'
    return f'{cell["top1"]:.{digits}f}{around}'


def threads_of(count: int | str) -> str:
    return f'{count} thread{"" if int(count) == 1 else "s"}'


def hardware_of(rows: Sequence[dict]) -> str:
    return ' and '.join(sorted({row['hardware'] for row in rows}))


def epochs_of(root: Path, patterns: Sequence[str], column: str) -> str:
    """Mean of a column's last value over the files of `patterns` under results/, with range, seeds and epochs."""
    found = [read_csv(path)[-1] for pattern in patterns for path in sorted((root / 'results').glob(pattern))]
    if not found:
        return NOT_MEASURED
    values, details = [float(row[column]) for row in found], []
    if len(values) > 1:
        details += [f'{min(values):.2f} to {max(values):.2f}', f'{len(values)} seeds']
    if epochs := sorted({row['epoch'] for row in found if 'epoch' in row}, key=int):
        details += [f'{" and ".join(epochs)} epochs']
    return f'{statistics.mean(values):.2f}' + (f' ({", ".join(details)})' if details else '')
