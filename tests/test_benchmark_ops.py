"""scripts/benchmark.py ops and scaling: measurements, formulas, files and rejected settings."""
import csv
import json
import os
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import benchmark
from coatnet_train.benchmarks import models as benchmark_models
from coatnet_train.benchmarks import ops as benchmark_ops
from coatnet_train.benchmarks import scaling as benchmark_scaling
from coatnet_train.benchmarks import timing
from coatnet_train.benchmarks.config import ModelPairSettings, OpsSettings, ScalingSettings
from coatnet_train.benchmarks.ops import Ceilings, Row
from coatnet_train.runtime.cli import ConfigError


def ops_settings(**changes) -> OpsSettings:
    return OpsSettings(**{
        'shapes': ('5x32',), 'kernels': (3,), 'backends': ('naive', 'eager', 'triton', 'conv2d'), 'rounds': 2,
        'window': 0.001, **changes})


@pytest.fixture
def known_ceilings(monkeypatch) -> Ceilings:
    ceilings = Ceilings(bandwidth=1e9, multiply_adds=1e9, source='given')
    monkeypatch.setattr(benchmark_ops, 'measure_ceilings', lambda settings: ceilings)
    return ceilings


def test_every_cell_of_ops_is_written_and_stands_alone(tmp_path, capsys):
    file = tmp_path / 'ops.csv'
    table = benchmark_ops.main(ops_settings(results_file=str(file)))
    with file.open(newline='', encoding='utf-8') as lines:
        cells = list(csv.DictReader(lines))
    assert [(cell['op'], cell['passes'], cell['backend']) for cell in cells] == [
        (op, passes, backend) for op in ('light', 'dynamic') for passes in ('forward', 'forward_backward')
        for backend in ('naive', 'eager', 'triton', 'conv2d')]
    assert list(tmp_path.iterdir()) == [file]  # no temporary file is left
    for cell, returned in zip(cells, table, strict=True):
        assert all(cell.values()) and {name: str(value) for name, value in returned.items()}.items() <= cell.items()
        assert {'hardware', 'torch', 'timm', 'triton', 'commit', 'command', 'date'} <= set(cell)
        assert (cell['batch_size'], cell['heads'], cell['peak_mib']) == ('2', '1', 'not measured')
        assert (cell['ms'] == cell['percent_of_floor'] == 'not measured') == (cell['backend'] == 'triton')
        if cell['backend'] != 'triton':
            assert float(cell['percent_of_floor']) == pytest.approx(
                100 * float(cell['floor_ms']) / float(cell['ms']), rel=1e-3)
            yardstick = next(other for other in cells if other['backend'] == 'conv2d' and all(
                other[name] == cell[name] for name in ('op', 'passes')))
            assert float(cell['ratio_to_conv2d']) == pytest.approx(
                float(cell['ms']) / float(yardstick['ms']), rel=1e-3)
            assert float(cell['bandwidth_gb_per_s']) > 0 and 'measured' in cell['peak_source']
    printed = capsys.readouterr().out
    assert 'dynamic 3x3, 5x5x32, forward + backward' in printed
    assert 'G multiply-adds/s (measured: a product of 2048' in printed
    assert 'over that of F.conv2d' not in printed


@pytest.mark.skipif(  # inductor of torch 2.14 generates C++ with vector types even where this setting excludes them
    os.environ.get('ATEN_CPU_CAPABILITY') == 'default',
    reason='torch.compile cannot build its sums with ATEN_CPU_CAPABILITY=default')
def test_compiled_dynamic_is_held_against_conv2d_in_the_last_line(known_ceilings, capsys):
    cells = benchmark_ops.main(ops_settings(
        op='dynamic', shapes=('28x192',), kernels=(7,), passes=('forward',), backends=('compiled', 'conv2d'),
        batch_size=1, rounds=1))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith('Time of compiled dynamic 7x7, 28x28x192, over that of F.conv2d: forward ')
    assert float(last.split()[-1]) == pytest.approx(cells[0]['ratio_to_conv2d'], abs=0.006)


@pytest.mark.parametrize('op,passes,backend,figures', [
    # batch 2 of 4 x 4 x 32 in float16: 2048 bytes an image; logits 2 * 9 * 16 * 2 = 576; 64 maps, 10 x 10 taps inside
    ('dynamic', 'forward', 'eager', (2 * 2048 + 576, 6400, 2 * 2048 + 576)),
    ('dynamic', 'forward_backward', 'eager', (5 * 2048 + 3 * 576, 19200, 4 * 2048 + 2 * 576)),
    ('light', 'forward', 'eager', (2 * 2048 + 18, 6400, 2 * 2048 + 18)),  # 9 * 2 bytes of one head
    ('light', 'forward_backward', 'conv2d', (5 * 2048 + 3 * 576, 19200, 4 * 2048 + 2 * 576)),  # 32 * 9 * 2
])
def test_floor_by_hand(op, passes, backend, figures):
    settings = ops_settings(batch_size=2, dtype='float16')
    traffic, multiply_adds, held = figures
    for ceilings in (Ceilings(1e6, 1e9, ''), Ceilings(1e9, 1e6, '')):
        floor = benchmark_ops.floor(Row(op, 4, 32, 3, passes), backend, settings, ceilings)
        assert (floor['bytes'], floor['multiply_adds']) == (traffic, multiply_adds)
        assert floor['bytes_ms'] == pytest.approx(traffic / ceilings.bandwidth * 1e3, rel=1e-4)
        assert floor['multiply_adds_ms'] == pytest.approx(multiply_adds / ceilings.multiply_adds * 1e3, rel=1e-4)
        assert floor['floor_ms'] == max(floor['bytes_ms'], floor['multiply_adds_ms'])
        assert floor['tensors_mib'] == pytest.approx(held / 2**20, rel=1e-4)


def test_rows_and_cells_that_are_not_measured():
    rows = benchmark_ops.rows_of(OpsSettings(batch_size=2))
    assert len(rows) == 4 * 2 * (4 + 2)  # shapes, passes, kernels of LightConv and of DynamicConv
    assert {row.kernel for row in rows if row.op == 'dynamic'} == {3, 7}
    assert benchmark_ops.can_run('conv2d', ops_settings(dtype='bfloat16'))
    assert not benchmark_ops.can_run('triton', ops_settings())


def test_ceilings_of_a_gpu_are_measured_in_the_dtype_of_the_rows(monkeypatch):
    """Ceilings are those of a 1 GiB copy and a product of bfloat16 matrices; stubs create tensors without data."""
    made = []

    def draw(*shape, device, dtype=torch.float32):
        made.append((shape, device, dtype))
        return torch.empty(shape, dtype=dtype, device='meta')

    monkeypatch.setattr(torch, 'rand', draw)
    monkeypatch.setattr(torch, 'randn', draw)
    monkeypatch.setattr(benchmark_ops, 'fastest', lambda call, settings: 1e-3)
    ceilings = benchmark_ops.measure_ceilings(ops_settings(device='cuda', dtype='bfloat16'))
    assert made == [((2**28,), 'cuda', torch.float32), ((8192, 8192), 'cuda', torch.bfloat16)]
    assert ceilings.bandwidth == 2 * 2**30 / 1e-3 and ceilings.multiply_adds == 8192**3 / 1e-3
    assert ceilings.source == 'measured: a product of 8192 x 8192 matrices in bfloat16'


def test_calls_of_a_gpu_take_enough_inputs_in_turn_to_pass_its_cache(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda: SimpleNamespace(L2_cache_size=60 * 2**20))
    assert [timing.default_input_sets(nbytes, 'cuda') for nbytes in (400 * 2**20, 50 * 2**20, 1)] == [3, 5, 16]
    assert timing.default_input_sets(1, 'cpu') == 1


def test_a_gpu_replays_captured_calls_whose_outputs_live_side_by_side(monkeypatch):
    """With stubs for torch.cuda: outputs of the captured calls stay alive until the capture ends."""
    log, current = [], SimpleNamespace(wait_stream=lambda stream: None)
    graph = SimpleNamespace(replay=lambda: log.append('replayed'))
    for name, value in dict(
            Stream=lambda: current, current_stream=lambda: current, stream=lambda stream: nullcontext(),
            CUDAGraph=lambda: graph, graph=lambda captured: nullcontext()).items():
        monkeypatch.setattr(torch.cuda, name, value)
    alive = weakref.WeakSet()

    def call() -> torch.Tensor:
        out = torch.empty(1)
        alive.add(out)
        log.append(len(alive))
        return out

    timing.replay([call, call, call], 'cuda')()
    assert log == [1, 1, 1, 1, 2, 3, 'replayed'] and len(alive) == 0


def test_kernels_are_forced_by_name_and_what_cannot_run_is_named(monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise ValueError('limited to float16 or bfloat16')

    monkeypatch.setattr(benchmark_ops, 'can_run', lambda backend, settings: True)
    seen = []
    for op in ('lightconv2d', 'dynamicconv2d'):
        module = pytest.importorskip(f'coatnet_zoo.ops.{op}.kernels')
        monkeypatch.setattr(module, f'{op}_triton', lambda *args, kernels, op=op, **kwargs: (
            seen.append((op, kernels)), refuse())[0] if kernels == 'band' else torch.zeros(1))
    cells = benchmark_ops.main(ops_settings(backends=('direct', 'band', 'conv2d'), passes=('forward',), rounds=1))
    assert seen == [('lightconv2d', 'band'), ('dynamicconv2d', 'band')]
    measured = {cell['backend']: cell['ms'] != 'not measured' for cell in cells}
    assert measured == {'direct': True, 'band': False, 'conv2d': True}
    assert 'dynamic 3x3, 5x5x32, forward: band is not measured: limited to float16' in capsys.readouterr().out


def test_several_input_sets_are_one_measurement(known_ceilings):
    cells = benchmark_ops.main(ops_settings(op='light', passes=('forward',), backends=('eager', 'naive'), input_sets=3))
    assert [(cell['input_sets'], cell['timer']) for cell in cells] == [(3, 'wall clock'), (1, 'wall clock')]


@pytest.mark.parametrize('changes,message', [
    (dict(rounds=0), '--rounds must be greater than 0, got 0'),
    (dict(batch_size=0), '--batch-size must be greater than 0, got 0'),
    (dict(kernels=(3, 4)), '--kernels must be odd and positive, got 4'),
    (dict(op='dynamic', kernels=(13, 31)), '--kernels must have one up to 7 for --op dynamic, got 13 31'),
    (dict(shapes=('28x100',)), '--shapes must be height x channels, channels a multiple of 32, .* got 28x100'),
    (dict(shapes=('28',)), '--shapes must be .* got 28'), (dict(backends=()), '--backends must name one or more'),
    (dict(device='cuda'), '--device cuda needs CUDA'), (dict(results_file='no/such/ops.csv'), 'folder does not exist'),
    (dict(results_file='ops.json'), '--results-file must end in .csv, got ops.json'),
    (dict(results_file='.'), '--results-file must be a file, got the folder .; give a name in it'),
], ids=str)
def test_bad_settings_of_ops_end_in_one_sentence(changes, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(ConfigError, match=message):
        benchmark_ops.main(ops_settings(**changes))


def scaling_settings(**changes) -> ScalingSettings:
    return ScalingSettings(**{
        'models': ('coatnet_pico_64', 'test_resnet'), 'sizes': (64, 32, 96), 'rounds': 2, 'window': 0.001, **changes})


def test_scaling_is_measured_written_and_drawn(tmp_path, capsys):
    file = tmp_path / 'scaling.json'
    report = benchmark_scaling.main(scaling_settings(results_file=str(file)))
    written = json.loads(file.read_text())
    assert written['models'] == report['models'] and {'hardware', 'torch', 'commit', 'command', 'date'} <= set(written)
    assert (tmp_path / 'scaling.png').read_bytes().startswith(b'\x89PNG')
    assert list(report['models']) == ['coatnet_pico_64', 'test_resnet']
    printed = capsys.readouterr().out
    for name, row in report['models'].items():
        assert list(row['times_ms']) == ['32', '64', '96'] and min(row['times_ms'].values()) > 0
        assert name in printed and f'{row["exponent"]:.2f}' in printed


@pytest.mark.parametrize('power', [1.0, 2.0])
def test_fit_recovers_the_exponent(power):
    times = {size: 3e-4 * (size ** 2) ** power for size in (448, 576, 704, 832, 1024)}
    assert benchmark_scaling.exponent(times) == pytest.approx(power, abs=1e-9)


@pytest.mark.parametrize('changes,message', [
    (dict(models=('coatnett',)), r"timm.list_models\(\), got 'coatnett'; did you mean"),
    (dict(models=()), '--models must name one'),
    (dict(sizes=(64, 64)), '--sizes must be two or more different sizes above 0, got 64 64'),
    (dict(models=('coatnet_pico',), sizes=(64, 100)), '--sizes 100: coatnet_pico: img_size must be a multiple'),
    (dict(window=0), '--window must be greater than 0, got 0'), (dict(device='cuda'), '--device cuda needs CUDA'),
    (dict(results_file='scaling.png'), '--results-file must end in .json, got scaling.png'),
], ids=str)
def test_bad_settings_of_scaling_end_in_one_sentence(changes, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(ConfigError, match=message):
        benchmark_scaling.main(scaling_settings(**changes))


@pytest.mark.parametrize('arguments,module,expected', [
    ('ops --op light --kernels 3 7', benchmark_ops, OpsSettings(op='light', kernels=(3, 7))),
    ('scaling --sizes 64 96', benchmark_scaling, ScalingSettings(sizes=(64, 96))),
    ('--model ops --against scaling', benchmark_models, ModelPairSettings(model='ops', against='scaling')),
])
def test_the_first_word_chooses_what_is_timed(arguments, module, expected, monkeypatch):
    seen = []
    monkeypatch.setattr(module, 'main', seen.append)
    benchmark.dispatch(arguments.split())
    assert seen == [expected]
