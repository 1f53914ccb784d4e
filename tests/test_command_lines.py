"""Command lines of all scripts: --help and wrong values are handled without importing torch and timm."""
import ast
import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import time_targets
from coatnet_train.runtime import packages
from support.constants import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# commands, each with a value that it must reject itself
COMMANDS = {
    'finetune.py': ('--model x --lr -1', '--lr must be greater than 0'),
    'eval_imagenet.py': ('--model x --batch-size 0', '--batch-size must be from 1'),
    'extract_features.py': ('--model x --knn-k 0', '--knn-k must be greater than 0'),
    'predict.py': ('', 'IMAGES must name at least one'),
    'benchmark.py': ('--model x --against x --rounds 0', '--rounds must be greater than 0'),
    'benchmark.py ops': ('--kernels 4', '--kernels must be odd'),
    'benchmark.py scaling': ('--sizes 64', '--sizes must be two or more'),
    'benchmark.py loader': ('--data-dir x --window 0', '--window must be greater than 0'),
    'benchmark.py distillation': ('--top-k 200', '--top-k must be below --classes 200'),
    'benchmark.py runtimes': ('--runtimes compiled', '--runtimes must have eager'),
    'benchmark.py inference_form': ('--rounds 1', '--rounds must be at least 2'),
    'bundle.py': ('--data no.zip', '--data no.zip must be a file'),
    'gpu_report.py': ('--steps x', '--steps must be among versions'),
    'gpu_train.py': ('--runs x', '--runs must be among teacher'),
    'ablation.py': ('--data-dir x --speed', '--speed needs a --results-file'),
    'transfer.py': ('--data-dir x --model x --fractions 2', '--fractions must be above 0'),
    'compare_recipes.py': ('--sets digits --seeds 0 --threads 0', '--threads must be from 1'),
    'robustness.py': ('--data-dir x --model x --sizes 0', '--model and --sizes must name at least one each'),
    'compare_runs.py': ('one', 'RUNS must be two to 5 run folders'),
    'hold_out.py': ('', ''),
    'import_weights.py': ('', ''),
    'teach.py': ('--teacher x --views 0', '--views must be at least 1'),
    'demo.py': ('', ''),
    'report.py': ('', ''),
    'hub/export.py': ('run --name coatnet_pico_64.tin200 --repo colours', '--repo must be OWNER/NAME'),
    'hub/convert.py': ('coatnet_0', 'SOURCE must be a file that ends in .h5'),
    'hub/card.py': ('', ''),
    'hub/verify.py': ('', ''),
    'hub/publish.py': ('folder --repo colours', '--repo must be OWNER/NAME'),
    'hub/space/app.py': ('', ''),
}
# Code that runs a script and prints which of the slow packages were imported by its end.
PROBE = '''
import atexit, runpy, sys
atexit.register(lambda: print('slow:', *({'torch', 'timm', 'accelerate', 'matplotlib', 'gradio'} & set(sys.modules))))
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition('/')[0])
runpy.run_path(sys.argv[0], run_name='__main__')
'''


def run(command: str, arguments: str, before: str = '') -> subprocess.CompletedProcess:
    """Run a command in a new process.

    Args:
        command: Script (with its folder unless that is scripts/) and its first arguments.
        arguments: Further arguments.
        before: Code that the process executes first.
    """
    script, *words = command.split()
    script = ROOT / script if '/' in script else ROOT / 'scripts' / script
    return subprocess.run(
        [sys.executable, '-c', before + PROBE, str(script), *words, *arguments.split()], capture_output=True, text=True,
        cwd=ROOT, env={**os.environ, 'COLUMNS': '200'})


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


def missing(module: str) -> str:
    return f'import sys; sys.modules[{module!r}] = None\n'


@pytest.mark.parametrize('script', [*{command.split()[0]: None for command in COMMANDS}, 'hold_out.py'])
def test_a_script_without_tyro_says_what_to_install(script):
    done = run(script, '--help', missing('tyro'))
    assert done.returncode == 2 and done.stderr == (
        f"{Path(script).name}: the module tyro is not installed; in a checkout of coatnet_zoo: pip install "
        "'.[scripts]'\n")


def test_publish_answers_help_without_the_client_of_the_hub():
    done = run('hub/publish.py', '--help', missing('huggingface_hub'))
    assert done.returncode == 0 and 'usage:' in done.stdout
    done = run('hub/publish.py', 'folder --repo owner/name', missing('huggingface_hub'))
    assert done.returncode == 2 and done.stderr.startswith('publish.py: the module huggingface_hub is not installed; ')


def test_what_is_imported_late_is_explained_too():
    done = run('hub/space/app.py', '--model resnet18', missing('gradio'))
    assert done.returncode == 2 and done.stderr.startswith('app.py: the module gradio is not installed; ')
    assert done.stderr.endswith("pip install '.[space]'\n")
    with pytest.raises(ModuleNotFoundError, match='no_such_module'):  # a bug in the code stays a traceback
        packages.explain_missing_module(ModuleNotFoundError('no_such_module', name='no_such_module'))
    with pytest.raises(ModuleNotFoundError):
        packages.explain_missing_module(ModuleNotFoundError('no torch.nowhere', name='torch.nowhere'))


def test_every_import_is_brought_by_the_extra_that_is_named():
    """Compares all imports of scripts/ and hub/, also those inside functions, with pyproject.toml."""
    files = [*(ROOT / 'scripts').rglob('*.py'), *(ROOT / 'hub').rglob('*.py')]
    imported = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        imported |= {name.name.partition('.')[0] for name in node.names} if isinstance(node, ast.Import) else set()
        imported |= {node.module.partition('.')[0]} if isinstance(node, ast.ImportFrom) else set()
    imported -= {*sys.stdlib_module_names, 'coatnet_train', *(path.stem for path in (ROOT / 'hub').rglob('*.py'))}
    extra_of = {module: extra for extra, modules in packages.EXTRAS.items() for module in modules}
    assert imported <= {*extra_of} and {'tyro', 'gradio', 'sklearn', 'coatnet_zoo'} <= imported

    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    distributions = packages_distributions()
    for module in imported & {*distributions} - {'coatnet_zoo', 'numpy', 'onnx_ir', 'pyarrow'}:  # indirect
        brought = ' '.join([*project['dependencies'], *project['optional-dependencies'][extra_of[module]]]).lower()
        assert any(name.lower().replace('_', '-') in brought for name in distributions[module]), module


def test_a_reader_of_help_may_leave_early():
    done = subprocess.run(
        f'{sys.executable} {ROOT / "scripts" / "finetune.py"} --help | head -n 1', shell=True, capture_output=True,
        text=True, cwd=ROOT)
    assert done.stdout.startswith('usage:') and done.stderr == ''


@pytest.mark.parametrize('words', [[], ['--help'], ['test', 'tests'], ['help', '-n']], ids=str)
def test_only_targets_of_make_are_timed(words, monkeypatch, capsys):
    monkeypatch.setattr(time_targets, 'time_target', lambda target: pytest.fail(f'{target} was started'))
    with pytest.raises(SystemExit) as stopped:
        time_targets.main(words)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and 'python tests/time_targets.py test demo' in said and 'demo test test-all' in said
