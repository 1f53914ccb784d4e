"""Atomic writes: a file is written under a temporary name and then renamed, so no partial file is ever seen."""
import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['replace_dir', 'write_csv', 'write_figure', 'write_file', 'write_json']


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it to disk and rename it to `path`."""
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        write(temporary)
        with temporary.open('rb+') as file:
            os.fsync(file.fileno())
    except Exception:
        temporary.unlink(missing_ok=True)  # partial files should not fill up the disk
        raise
    os.replace(temporary, path)


def write_json(path: Path, content: dict) -> None:
    write_file(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8'))


def write_csv(path: Path, rows: list[dict]) -> None:
    def write_rows(temporary: Path) -> None:
        with temporary.open('w', newline='', encoding='utf-8', errors='backslashreplace') as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)

    write_file(path, write_rows)


def write_figure(path: Path, figure: 'Figure') -> None:
    write_file(path, lambda temporary: figure.savefig(temporary, format='png', dpi=150))


def replace_dir(temporary: Path, output: Path) -> None:
    """Rename the finished folder to `output`, replacing an earlier one, which stays in place on failure."""
    old = output.with_name(f'.{output.name}.old')
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    try:
        temporary.rename(output)
    except BaseException:
        if old.exists():
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)
