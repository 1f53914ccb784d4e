"""Train a fixed list of runs in short GPU sessions, resuming unfinished runs in the next session.

    python scripts/gpu_train.py --list
    python scripts/gpu_train.py --shards tiny-imagenet-train-*.zip --weights lite2.safetensors --minutes 9
    python scripts/gpu_train.py --pack parts
    python scripts/gpu_train.py --unpack parts --minutes 9
    python scripts/gpu_train.py --tiny --shards small/tiny-imagenet-train-0.zip --data output/tiny --output output/runs

The runs are listed in coatnet_train/experiments/gpu_runs.py: a teacher and its stored outputs, the small models and
comparable models of timm with and without distillation, then Imagenette. Finished runs are skipped, and a run that is
unfinished at the end of the session saves its state. --pack writes the runs to transfer in parts of at most --part-mib.
docs/training.md says how the results of a run get into results/.
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
