"""Command lines of all scripts: --help and a wrong value are answered without the seconds that torch and timm take."""
import os
import subprocess
import sys

import pytest
from script_runs import ROOT

# a command, and a value that it must refuse by itself
COMMANDS = {
    'finetune.py': ('--model x --lr -1', '--lr must be greater than 0'),
    'eval_imagenet.py': ('--model x --batch-size 0', '--batch-size must be from 1'),
    'extract_features.py': ('--model x --knn-k 0', '--knn-k must be greater than 0'),
    'predict.py': ('', 'IMAGES must name at least one'),
    'benchmark.py': ('--model x --against x --rounds 0', '--rounds must be greater than 0'),
    'benchmark.py ops': ('--kernels 4', '--kernels must be odd'),
    'benchmark.py scaling': ('--sizes 64', '--sizes must be two or more'),
    'benchmark.py loader': ('--data-dir x --window 0', '--window must be greater than 0'),
    'ablation.py': ('--data-dir x --speed', '--speed needs a --results-file'),
    'transfer.py': ('--data-dir x --model x --shares 2', '--shares must be above 0'),
    'compare_recipes.py': ('--sets digits --seeds 0 --threads 0', '--threads must be from 1'),
    'robustness.py': ('--data-dir x --model x --sizes 0', '--model and --sizes must name at least one each'),
    'demo.py': ('', ''),
    'report.py': ('', ''),
}
# Runs a script in this process and says which of the slow packages it has imported by its end.
PROBE = '''
import atexit, runpy, sys
atexit.register(lambda: print('slow:', *({'torch', 'timm', 'accelerate', 'matplotlib'} & set(sys.modules))))
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition('/')[0])
runpy.run_path(sys.argv[0], run_name='__main__')
'''


def run(command: str, arguments: str) -> subprocess.CompletedProcess:
    script, *words = command.split()
    return subprocess.run(
        [sys.executable, '-c', PROBE, str(ROOT / 'scripts' / script), *words, *arguments.split()], capture_output=True,
        text=True, cwd=ROOT, env={**os.environ, 'COLUMNS': '200'})


@pytest.mark.parametrize('command', COMMANDS)
def test_help_is_quick(command):
    done = run(command, '--help')
    assert done.returncode == 0 and 'usage:' in done.stdout and done.stdout.splitlines()[-1] == 'slow:', done.stderr


@pytest.mark.parametrize('command', [command for command, (arguments, _) in COMMANDS.items() if _])
def test_a_wrong_value_is_refused_quickly(command):
    arguments, message = COMMANDS[command]
    done = run(command, arguments)
    assert done.returncode == 2 and message in done.stderr and done.stdout.splitlines()[-1] == 'slow:', done.stderr


def test_help_has_groups_and_recipes():
    said = run('finetune.py', '--help').stdout
    for group in ('data', 'model', 'training', 'augmentation', 'run'):
        assert said.count(f' {group} options ') == 1
    assert 'Highest learning rate' in said and 'coatnet_in1k_384' in said
    assert said.index('--data-dir') < said.index('--model') < said.index('--lr') < said.index('--hflip')
