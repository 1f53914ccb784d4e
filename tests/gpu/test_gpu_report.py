"""scripts/gpu_report.py on a CPU: all steps at tiny sizes, time limits, crashes, and killed runs."""
import csv
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest

from coatnet_train.benchmarks import gpu_report
from coatnet_train.benchmarks.gpu_plan import BUDGETS, STEPS, GpuReportSettings, check_gpu_report, plan
from coatnet_train.benchmarks.rows import KEYS, card_slug, merge_rows, read_rows
from coatnet_train.runtime.cli import ConfigError
from support.commands import environment
from support.constants import ROOT

ORIGIN = {'hardware': 'NVIDIA X1', 'commit': 'abc', 'torch': '2'}


def settings(folder: Path, **changes) -> GpuReportSettings:
    return GpuReportSettings(**{'output': str(folder), 'device': 'cpu', 'tiny': True, **changes})


def results(folder: Path, kind: str) -> list[dict[str, str]]:
    file, = folder.glob(f'{kind}_*.csv')
    return read_rows(file)


def test_every_budget_holds_its_steps():
    assert len({step.name for step in STEPS}) == len(STEPS)
    for column, budget in enumerate(BUDGETS):
        chosen = plan(GpuReportSettings(budget=budget))
        assert chosen[0][0].name == 'versions' and sum(minutes for _, minutes in chosen) <= budget + 1e-9
        assert all(step.minutes[column] == minutes > 0 for step, minutes in chosen)
    assert {step.name for step, _ in chosen} == {step.name for step in STEPS}
    few = plan(GpuReportSettings(steps=('light-31', 'agreement'), budget=8))
    assert [(step.name, minutes) for step, minutes in few] == [('versions', 1.), ('agreement', 1.5), ('light-31', 2.)]


@pytest.mark.parametrize('changes,message', [
    (dict(steps=('dynamic',)), r"--steps must be among versions, .*got 'dynamic'; did you mean dynamic-"),
    (dict(collect='no/where'), '--collect no/where must be a folder'),
    (dict(output=f'{__file__}/x'), r'--output .*test_gpu_report.py/x must be a folder that can be written: .*; give'),
    (dict(output=__file__), r'--output .*test_gpu_report.py must be a folder that can be written: .*; give another'),
    (dict(device='cpu'), r'--device cpu needs the environment variable TRITON_INTERPRET=1, .* got none; set it'),
    (dict(output='results', device='cpu'), '--device cpu and --tiny are dry runs, .*--output results; give another'),
], ids=str)
def test_bad_settings_end_in_one_sentence(changes, message, monkeypatch):
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    with pytest.raises(ConfigError, match=message):
        gpu_report.main(settings(Path('x'), **{'device': 'cuda', **changes}))


def test_a_dry_run_needs_the_interpreter_only_where_it_runs_kernels(monkeypatch):
    monkeypatch.setenv('TRITON_INTERPRET', 'True')
    check_gpu_report(settings(Path('x')))
    monkeypatch.delenv('TRITON_INTERPRET')
    check_gpu_report(settings(Path('x'), list=True))


@pytest.fixture(scope='module')
def dry_run(tmp_path_factory) -> tuple[Path, str]:
    """One process that runs each kind of step in Triton's interpreter."""
    pytest.importorskip('triton', reason='needs the triton package')
    folder = tmp_path_factory.mktemp('report')
    steps = 'compare', 'dynamic-7', 'coatnet-training', 'agreement', 'large-image'
    done = subprocess.run(
        [sys.executable, 'tests/gpu/in_one_process.py', str(folder), *steps], capture_output=True, text=True, cwd=ROOT,
        env=environment(TRITON_INTERPRET='1', PYTHONPATH=f'{ROOT}{os.pathsep}{ROOT / "scripts"}'))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_a_dry_run_leaves_every_kind_of_row(dry_run):
    folder, printed = dry_run
    assert '6 of 6 steps ended well, 0 checks failed' in printed
    checks = results(folder, 'checks')
    assert [row['step'] for row in checks if row['check'] == 'step'] == [
        'versions', 'compare', 'dynamic-7', 'coatnet-training', 'agreement', 'large-image']
    verdicts = {row['check']: row['result'] for row in checks if row['step'] == 'compare' and row['check'] != 'step'}
    assert {check.rsplit(', ', 1)[1] for check in verdicts} == {'auto', 'direct', 'band'}
    assert all((verdict == 'skipped') == check.endswith('float32, band') for check, verdict in verdicts.items())
    assert all(row['result'] == 'passed' for row in checks if row['step'] in ('agreement', 'large-image')
               and row['check'] != 'step')
    figures = [row for row in checks if row['result'] == 'passed']
    assert all(0 <= float(row['value']) <= float(row['limit']) for row in figures) and len(figures) >= 12
    ops = results(folder, 'ops')
    assert [(row['passes'], row['backend']) for row in ops] == [
        (passes, backend) for passes in ('forward', 'forward_backward')
        for backend in ('eager', 'triton', 'direct', 'band', 'conv2d')]
    assert all(float(row['ms']) > 0 and row['input_sets'] == '2' for row in ops)
    models = results(folder, 'models')
    assert [row['model'] for row in models] == ['coatnet_pico_64', 'test_vit']
    assert all(float(row['images_per_second']) > 0 and row['peak_mib'] == 'not measured' for row in models)
    for row in (*checks, *ops, *models):
        assert row['commit'] and row['date'] and row['torch'] and row['triton'] != 'not installed'


def test_agreement_needs_operators_that_did_run_with_the_backend(monkeypatch):
    pytest.importorskip('triton', reason='needs the triton package')
    from coatnet_train.benchmarks import gpu_checks
    from coatnet_train.benchmarks.gpu_plan import TINY
    assert len(gpu_checks.losses('dynamicconvnet_pico_64', TINY, 'cpu', 'float32', 'eager')) == TINY.steps
    with pytest.raises(RuntimeError, match=r"was to run with the backend 'eager', but its operators ran with set\(\)"):
        gpu_checks.losses('dynamicconvnet_pico_64', replace(TINY, step_kwargs=TINY.step_kwargs | {'layout': 'TTTT'}),
                          'cpu', 'float32', 'eager')
    losses = iter([[2., 1.], [2., 1.00011], [2., 1.], [2., float('nan')], [2., 1.], [2., 1.003], [2., 1.], [2., 1.003]])
    monkeypatch.setattr(gpu_checks, 'losses', lambda *arguments: next(losses))
    two = replace(TINY, step_models=('a', 'b'))
    found = [(check.result, check.value) for check in gpu_checks.check_training(two, 'cpu')]
    assert found[0] == ('passed', pytest.approx(5.5e-5)) and found[1][0] == 'failed'
    assert found[2:] == [('failed', pytest.approx(1.5e-3)), ('passed', pytest.approx(1.5e-3))]


def test_errors_are_judged_by_the_tensor_that_is_furthest_off():
    pytest.importorskip('triton', reason='needs the triton package')
    import torch

    from coatnet_train.benchmarks.gpu_checks import judge
    eager = {'out': 1e-3, 'dx': 1e-2}
    good = judge('c', {'out': 2e-3, 'dx': 1.9e-2}, eager, torch.bfloat16, '')
    assert (good.result, good.value, good.limit, good.detail) == ('passed', 1.9e-2, 2e-2, 'dx; ')
    assert judge('c', {'out': 1.6e-2, 'dx': 0.}, eager, torch.bfloat16, '').result == 'failed'  # above 2 eps
    assert judge('c', {'out': 0., 'dx': float('nan')}, eager, torch.bfloat16, '').detail == 'dx; '
    assert judge('c', {'out': 0., 'dx': float('nan')}, eager, torch.bfloat16, '').result == 'failed'


def stub(folder: Path, monkeypatch, body: str) -> None:
    """Replace gpu_report.py by a script with this body: `sys.argv[2]` is the step; `versions` prints the provenance."""
    folder.mkdir(exist_ok=True)
    (folder / 'stub.py').write_text(
        f'import json, os, subprocess, sys, time\nif sys.argv[2] == "versions":\n    print("some", "card")\n'
        f'    print(json.dumps({ORIGIN}))\n    sys.exit()\n{body}')
    monkeypatch.setattr(gpu_report, 'SCRIPT', folder / 'stub.py')


def alive(pid: int) -> bool:
    try:
        return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def test_a_step_over_its_limit_or_with_a_crash_stops_none_of_the_others(tmp_path, monkeypatch, capsys):
    stub(tmp_path / 'bin', monkeypatch, '''
if sys.argv[2] == 'compare':
    child = subprocess.Popen(['sleep', '100'])
    print('started', child.pid, flush=True)
    time.sleep(100)
if sys.argv[2] == 'light-7':
    print('a reason')
    os.kill(os.getpid(), 11)
''')
    monkeypatch.setattr(gpu_report, 'plan', lambda settings: [
        (step, 1 / 60) for step in STEPS if step.name in ('versions', 'compare', 'light-7', 'agreement')])
    start = time.monotonic()
    assert gpu_report.main(settings(tmp_path / 'out', device='cuda')) == 2 and time.monotonic() - start < 10
    rows = {row['step']: row for row in results(tmp_path / 'out', 'checks')}
    # a step also has the time that earlier steps left: one or two seconds
    assert {name: re.sub('[12] s$', 'N s', row['result']) for name, row in rows.items()} == {
        'versions': 'done', 'compare': 'stopped at its limit of N s', 'light-7': 'ended with exit code -11',
        'agreement': 'done'}
    assert rows['compare']['hardware'] == 'NVIDIA X1' and (tmp_path / 'out' / 'checks_x1.csv').exists()
    log = (tmp_path / 'out' / 'gpu_report.log').read_text()
    assert not alive(int(re.search(r'started (\d+)', log)[1]))  # the step's own processes end with it
    assert '    a reason' in capsys.readouterr().out


def test_only_checks_of_this_run_count(tmp_path):
    pytest.importorskip('triton', reason='needs the triton package')
    from coatnet_train.benchmarks.gpu_checks import Check
    from coatnet_train.benchmarks.gpu_steps import Steps

    def run(check: str, result: str) -> int:
        def start(step, chosen, log, limit) -> str:
            steps = Steps(replace(chosen, device='cpu', run_step=step.name))
            with log.open('a') as file, redirect_stdout(file):
                steps.record([Check(check, result)] if step.name == 'compare' else [Check('card', 'x')])
                print(json.dumps(steps.origin))
            return 'done'

        return gpu_report.main(settings(tmp_path, steps=('compare',), device='cuda'), start)

    assert [run('a', 'failed'), run('a', 'failed'), run('b', 'passed'), run('b', 'failed')] == [1, 1, 0, 1]
    assert {row['check']: row['result'] for row in results(tmp_path, 'checks') if row['step'] == 'compare'} == {
        'a': 'failed', 'step': 'done', 'b': 'failed'}  # rows of an earlier run stay in the file

def test_without_a_card_nothing_is_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, 'SCRIPT', tmp_path / 'none.py')
    with pytest.raises(ConfigError, match='the first step, which looks at the card, ended with exit code 2'):
        gpu_report.main(settings(tmp_path / 'out', device='cuda'))


@pytest.mark.parametrize('kind', [signal.SIGKILL, signal.SIGTERM], ids=str)
def test_a_killed_run_leaves_its_rows(tmp_path, monkeypatch, kind):
    stub(tmp_path / 'bin', monkeypatch, '''
if sys.argv[2] == 'dynamic-7':
    print('waiting', os.getpid(), flush=True)
    time.sleep(60)
''')
    code = (f'import sys; sys.path.insert(0, {str(ROOT / "scripts")!r})\nfrom pathlib import Path\n'
            f'from coatnet_train.benchmarks import gpu_report\nfrom coatnet_train.benchmarks.gpu_plan import '
            f'GpuReportSettings\ngpu_report.SCRIPT = Path({str(tmp_path / "bin" / "stub.py")!r})\n'
            f'gpu_report.main(GpuReportSettings(budget=8, output={str(tmp_path / "out")!r}, tiny=True))')
    process, log, found = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE), None, None
    deadline = time.monotonic() + 30
    while found is None and time.monotonic() < deadline:
        log = tmp_path / 'out' / 'gpu_report.log'
        found = re.search(r'waiting (\d+)\n', log.read_text()) if log.exists() else None
        time.sleep(0.05)
    process.send_signal(kind)
    process.communicate()
    step = int(found[1])
    if kind == signal.SIGKILL:
        os.kill(step, signal.SIGKILL)  # a killed process cannot end its step
    else:
        assert process.returncode == 143 and not alive(step)
    assert [row['step'] for row in results(tmp_path / 'out', 'checks')] == ['versions', 'compare', 'kernel-tests']


# the tests that the step kernel-tests runs in place of tests/ops: some pass, fail and skip
FOUND_TESTS = '''
import pytest
pytestmark = pytest.mark.gpu

@pytest.mark.parametrize('case', ['a', 'b c'])
def test_kernel(case):
    assert case == 'a' or not FAILS

def test_an_image_above_2_31_elements():
    assert False

@pytest.mark.skip(reason='needs a card')
def test_other():
    pass
'''


# on a GPU pytest runs in several processes, whose output lines differ
@pytest.mark.parametrize('device,text,result,value', [
    ('cuda', f'FAILS = True\n{FOUND_TESTS}', 'failed', '1'), ('cpu', f'FAILS = False\n{FOUND_TESTS}', 'passed', '2'),
    ('cpu', f'FAILS = False\n{FOUND_TESTS}pytestmark = [pytestmark, pytest.mark.skip]', 'skipped', '0')],
    ids=['failed', 'passed', 'skipped'])
@pytest.mark.slow
def test_kernel_tests_are_counted_line_by_line(tmp_path, monkeypatch, device, text, result, value):
    from coatnet_train.benchmarks import gpu_steps
    (tmp_path / 'tests' / 'ops').mkdir(parents=True)
    (tmp_path / 'tests' / 'ops' / 'test_kernels.py').write_text(text)
    (tmp_path / 'pyproject.toml').write_text((ROOT / 'pyproject.toml').read_text())
    monkeypatch.setattr(gpu_steps, 'ROOT', tmp_path)
    monkeypatch.setattr(os, 'cpu_count', lambda: 2)
    steps = gpu_steps.Steps(settings(tmp_path / 'out', run_step='kernel-tests'))
    (tmp_path / 'out').mkdir()
    steps.device = device
    steps.run_kernel_tests()
    row, = results(tmp_path / 'out', 'checks')
    assert (row['result'], row['value']) == (result, value)
    assert ('test_kernel[b c]' in row['detail']) == (result == 'failed')
    assert f'{3 if result == "skipped" else 1} skipped' in row['detail']


@pytest.mark.parametrize('body,message', [('sys.exit(4)', 'exit code 4'), ('print("......")', 'no result was found')])
def test_kernel_tests_that_did_not_run_are_no_result(tmp_path, monkeypatch, body, message):
    from coatnet_train.benchmarks import gpu_steps
    (tmp_path / 'pytest.py').write_text(f'import sys; {body}')
    monkeypatch.setattr(gpu_steps, 'ROOT', tmp_path)  # from where python -m pytest finds this one
    with pytest.raises(RuntimeError, match=message):
        gpu_steps.Steps(settings(tmp_path, run_step='kernel-tests')).run_kernel_tests()


@pytest.mark.parametrize('body,result', [
    ('echo "========= ERROR SUMMARY: 0 errors"', 'passed'), ('echo "========= ERROR SUMMARY: 3 errors"', 'failed'),
    ('exit 1', 'failed'), (None, 'skipped')], ids=str)
def test_the_sanitizer_runs_where_it_is_installed(tmp_path, monkeypatch, body, result):
    from coatnet_train.benchmarks import gpu_steps
    if body:
        (tmp_path / 'compute-sanitizer').write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\n{body}\n')
        (tmp_path / 'compute-sanitizer').chmod(stat.S_IRWXU)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep if body else None)
    gpu_steps.Steps(settings(tmp_path, run_step='memcheck')).run_sanitizer('memcheck')
    row, = results(tmp_path, 'checks')
    assert row['result'] == result
    if body:
        assert re.search('--tool memcheck .*gpu_report.py step compare --tiny --device cpu --output ',
                         (tmp_path / 'arguments').read_text())


def test_rows_replace_only_what_they_measure_again(tmp_path):
    path = tmp_path / 'a.csv'
    merge_rows(path, [dict(card='x', op='a', ms=1), dict(card='x', op='b', ms=2)], ('card', 'op', 'timer'), 'ms')
    merge_rows(path, [dict(card='x', op='b', ms=3, new='n'), dict(card='y', op='a', ms=4),
                      dict(card='x', op='a', timer='graph', ms=5), dict(card='x', op='a', ms='not measured')],
               ('card', 'op', 'timer'), 'ms')
    assert [(row['card'], row['op'], row['ms'], row['new'], row['timer']) for row in read_rows(path)] == [
        ('x', 'a', '1', '', ''), ('x', 'b', '3', 'n', ''), ('y', 'a', '4', '', ''), ('x', 'a', '5', '', 'graph')]
    assert [card_slug(name) for name in ('NVIDIA H200', 'NVIDIA H100 80GB HBM3', 'NVIDIA')] == [
        'h200', 'h100_80gb_hbm3', 'unknown']


def test_what_a_session_measured_is_collected(tmp_path, capsys):
    with (ROOT / 'results' / 'ops_h200.csv').open() as lines:
        old = list(csv.DictReader(lines))
    (tmp_path / 'session').mkdir()
    (tmp_path / 'results').mkdir()
    (tmp_path / 'results' / 'ops_h200.csv').write_bytes((ROOT / 'results' / 'ops_h200.csv').read_bytes())
    new = [row | {'timer': 'CUDA graph', 'input_sets': '3', 'ms': '0.1'} for row in old[:2]]
    merge_rows(tmp_path / 'session' / 'ops_h200.csv', new, ('op',), 'ms')
    changes = dict(collect=str(tmp_path / 'session'), device='cuda', tiny=False)
    assert gpu_report.main(settings(tmp_path / 'results', **changes)) == 0
    rows = read_rows(tmp_path / 'results' / 'ops_h200.csv')
    assert len(rows) == len(old) + 1  # rows that another timer measured stay
    with pytest.raises(ConfigError, match='must hold files such as'):
        gpu_report.main(settings(tmp_path, **changes | {'collect': str(tmp_path)}))


@pytest.mark.parametrize('content,message', [
    ('hardware,ms\n\xe9,1\n'.encode('latin-1'), 'must be a CSV file in UTF-8'),
    (b'name,ms\na,1\n', 'must have the columns hardware, op, .*, ms, but lacks hardware, op, '),
    (b'', 'but lacks hardware'), ('one cell too many', 'cells in every row, but row 2 has not')], ids=str)
def test_nothing_is_collected_where_a_file_is_no_result(tmp_path, content, message):
    (tmp_path / 'session').mkdir()
    columns = [*KEYS['ops'][0], 'ms']
    good = '\n'.join([','.join(columns), ','.join('x' * len(columns)), ''])
    (tmp_path / 'session' / 'ops_a.csv').write_text(good)
    (tmp_path / 'session' / 'ops_b.csv').write_bytes(
        content if isinstance(content, bytes) else f'{good}{"x," * len(columns)}x\n'.encode())
    with pytest.raises(ConfigError, match=message):
        gpu_report.main(settings(tmp_path / 'out', collect=str(tmp_path / 'session')))
    assert not list((tmp_path / 'out').glob('*.csv'))


@pytest.mark.slow
def test_the_command_starts_a_process_a_step(tmp_path):
    pytest.importorskip('triton', reason='needs the triton package')
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin' / 'compute-sanitizer').write_text(
        '#!/bin/sh\nshift 4\n"$@" && echo "========= ERROR SUMMARY: 0 errors"\n')
    (tmp_path / 'bin' / 'compute-sanitizer').chmod(stat.S_IRWXU)
    steps = ['versions', 'memcheck']  # memcheck runs compare; the dry run above runs the others, in one process
    done = subprocess.run(
        [sys.executable, 'scripts/gpu_report.py', '--tiny', '--device', 'cpu', '--output', str(tmp_path / 'out'),
         '--steps', *steps], capture_output=True, text=True, cwd=ROOT,
        env=environment(TRITON_INTERPRET='1', PATH=f'{tmp_path / "bin"}{os.pathsep}{os.environ["PATH"]}'))
    assert done.returncode == 0, done.stdout + done.stderr
    checks = results(tmp_path / 'out', 'checks')
    assert {row['step'] for row in checks if row['result'] == 'done'} == set(steps)
    assert {row['check']: row['result'] for row in checks if row['step'] == 'memcheck'} == {
        'memcheck': 'passed', 'step': 'done'}
