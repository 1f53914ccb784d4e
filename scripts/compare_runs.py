"""Compare finished runs of finetune.py: a table, their curves, and a JSON file with results and provenance.

    python scripts/compare_runs.py output/imagenette_64/coatnet_pico_64 output/imagenette_64/convnextv2_femto \\
        --results-file results/imagenette_64_cpu.json
    python scripts/compare_runs.py output/lr_1e-3 output/lr_5e-4 --allow-different

Runs are named by the shortest part of their paths that distinguishes them. They must share data, recipe and seed, so
that only the models differ. --allow-different also compares other runs, and lists the settings in which they differ.
"""
from dataclasses import dataclass
from pathlib import Path

from coatnet_train.runtime.cli import ConfigError, parse_flags, run_cli, tyro

MAX_RUNS = 5  # maximum number of curves in a plot


@dataclass(frozen=True, kw_only=True)
class CompareRunsSettings:
    runs: tyro.conf.Positional[tuple[str, ...]]  # Run folders.
    results_file: str = ''  # JSON to write, and a plot beside it as .png.
    allow_different: bool = False  # Compare runs whose settings differ in more than the model, and list what differs.


def check_values(settings: CompareRunsSettings) -> None:
    """Raise ConfigError for single values that cannot work, before anything is read."""
    if not 2 <= len(settings.runs) <= MAX_RUNS:
        raise ConfigError(f'RUNS must be two to {MAX_RUNS} run folders, got {len(settings.runs)}; '
                          f'give folders such as output/NAME.')
    if settings.results_file and Path(settings.results_file).suffix != '.json':
        raise ConfigError(f'--results-file must end in .json, got {settings.results_file}.')


def main(settings: CompareRunsSettings) -> dict:
    """Print the table, write the files, and return what they hold."""
    check_values(settings)
    from coatnet_train.experiments.compare_runs import run  # here: torch and timm take seconds to import
    return run(settings.runs, settings.results_file, settings.allow_different)


if __name__ == '__main__':
    run_cli('compare_runs.py', lambda: main(parse_flags(CompareRunsSettings, __doc__)))
