"""Time targets of make, and record the seconds in results/make_cpu.json, one row per target.

    python tests/time_targets.py test demo     # on an otherwise idle machine, after `make .venv/.test`
"""
import os
import re
import subprocess
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / 'scripts'))

from coatnet_train.report.tables import read_json
from coatnet_train.runtime.files import write_json
from coatnet_train.runtime.provenance import provenance

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / 'results' / 'make_cpu.json'


def time_target(target: str) -> dict[str, object]:
    """Run `make target`, showing its output; returns seconds, cores, and the number of tests that passed or None."""
    begin, passed = time.perf_counter(), None
    with subprocess.Popen(['make', target], stdout=subprocess.PIPE, text=True, cwd=ROOT) as running:
        for line in running.stdout:
            print(line, end='', flush=True)
            if found := re.search(r'\b(\d+) passed\b', line):
                passed = int(found[1])
    if running.returncode:
        sys.exit(f'make {target} ended with code {running.returncode}; its time was not kept.')
    return {'seconds': round(time.perf_counter() - begin, 1), 'cores': os.cpu_count(), 'passed': passed}


def main(targets: list[str]) -> None:
    """Time every target and write the file after each; exits with 2 for a target that `make help` does not list."""
    known = re.findall('^([a-z-]+):.*## ', (ROOT / 'Makefile').read_text(encoding='utf-8'), re.MULTILINE)
    if not targets or not {*targets} <= {*known}:
        print(__doc__, f'Targets: {" ".join(known)}', sep='\n', file=sys.stderr)
        sys.exit(2)
    report = read_json(RESULTS) if RESULTS.exists() else {'targets': {}, 'made': {}}
    for target in targets:
        report['targets'][target] = time_target(target)
        report['made'][target] = provenance('cpu')
        write_json(RESULTS, report)


if __name__ == '__main__':
    main(sys.argv[1:])
