"""Fill the tables of README.md and docs/ from the files under results/.

    python scripts/report.py            rewrite the tables
    python scripts/report.py --count    first recount parameters and multiply-adds into results/models.json
    python scripts/report.py --check    exit with 1 if a table differs from the files
"""
import sys
from pathlib import Path

from coatnet_train.report.documents import update
from coatnet_train.report.models import count_models
from coatnet_train.runtime.cli import run_cli, tyro
from coatnet_train.runtime.files import write_json

ROOT = Path(__file__).parents[1]


def main(count: bool = False, check: bool = False) -> int:
    """Rewrite or check the tables; returns the exit code."""
    if count:
        write_json(ROOT / 'results' / 'models.json', count_models())
    stale = update(ROOT, write=not check)
    if check and stale:
        print(f'{", ".join(stale)} does not show what results/ says; run python scripts/report.py.')
    return int(check and bool(stale))


if __name__ == '__main__':
    run_cli('report.py', lambda: sys.exit(tyro.cli(main, description=__doc__)))
