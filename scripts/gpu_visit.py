"""Train on a GPU that is there for minutes at a time: the runs that wait for one, resumed from visit to visit.

    python scripts/gpu_visit.py --list
    python scripts/gpu_visit.py --shards tiny-imagenet-train-*.zip --weights lite2.safetensors --minutes 9
    python scripts/gpu_visit.py --pack parts
    python scripts/gpu_visit.py --unpack parts --minutes 9
    python scripts/gpu_visit.py --tiny --shards small/tiny-imagenet-train-0.zip --data /tmp/data --output /tmp/runs

The list of runs is coatnet_train/experiments/gpu_runs.py: a teacher, its stored outputs, and the small models and their
peers with and without them, then Imagenette. Finished runs are skipped, and a run that is not through when the time is
over saves itself. --pack writes all that comes back in parts below --part-mib. Results of a run go to results/ as
docs/training.md says.
"""
import sys

from coatnet_train.experiments.gpu_runs import VisitSettings, check_visit
from coatnet_train.experiments.gpu_visit import visit
from coatnet_train.runtime.cli import parse_flags, run_cli


def main(settings: VisitSettings) -> int:
    """Make a visit; returns the exit code, 1 if a run failed."""
    check_visit(settings)
    return int(visit(settings) > 0)


if __name__ == '__main__':
    run_cli('gpu_visit.py', lambda: sys.exit(main(parse_flags(VisitSettings, __doc__))))
