"""Train on a GPU that is there for minutes at a time: the runs that wait for one, resumed from one session to the next.

    python scripts/gpu_train.py --list
    python scripts/gpu_train.py --shards tiny-imagenet-train-*.zip --weights lite2.safetensors --minutes 9
    python scripts/gpu_train.py --pack parts
    python scripts/gpu_train.py --unpack parts --minutes 9
    python scripts/gpu_train.py --tiny --shards small/tiny-imagenet-train-0.zip --data output/tiny --output output/runs

The list of runs is coatnet_train/experiments/gpu_runs.py: a teacher, its stored outputs, and the small models and their
peers with and without them, then Imagenette. Finished runs are skipped, and a run that is not through when the time is
over saves itself. --pack writes all that comes back in parts below --part-mib. Results of a run go to results/ as
docs/training.md says.
"""
import sys

from coatnet_train.experiments.gpu_runs import GpuTrainSettings
from coatnet_train.experiments.gpu_train import run_session
from coatnet_train.runtime.cli import parse_flags, run_cli


def main(settings: GpuTrainSettings) -> int:
    """Run a session; returns the exit code, 1 if a run failed."""
    return int(run_session(settings) > 0)


if __name__ == '__main__':
    run_cli('gpu_train.py', lambda: sys.exit(main(parse_flags(GpuTrainSettings, __doc__))))
