"""The generated tables of the documents agree with the results files."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm

from coatnet_train.benchmarks.rows import write_rows
from coatnet_train.report import accuracy, gpu, models, speed, weights
from coatnet_train.report.documents import render
from coatnet_train.report.tables import table

ROOT = Path(__file__).parents[1]


def test_documents_show_the_results():
    done = subprocess.run([sys.executable, 'scripts/report.py', '--check'], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_stale_table_is_noticed_and_mended():
    text = (ROOT / 'docs' / 'models.md').read_text()
    stale = text.replace('| `coatnet_0` | CCTT | 25.04 |', '| `coatnet_0` | CCTT | 24.04 |')
    assert stale != text and render(stale, ROOT) == text == render(text, ROOT)


@pytest.mark.slow
def test_counts_are_of_today():
    recorded = json.loads((ROOT / 'results' / 'models.json').read_text())['models']
    assert recorded == models.count_models()['models'] and list(recorded) == sorted(
        timm.list_models(module='coatnet') + timm.list_models(module='lightconvnet'))


def test_results_name_their_origin():
    files = sorted((ROOT / 'results').glob('*.json'))
    assert files
    for file in files:
        content = json.loads(file.read_text())
        for origin in content['made'].values() if 'made' in content else [content]:  # a file may grow model by model
            missing = {'hardware', 'torch', 'timm', 'python', 'commit', 'command', 'date'} - origin.keys()
            assert not missing and not origin['commit'].endswith('-dirty'), (file.name, missing)


def test_releases_fill_the_table_of_weights(tmp_path):
    (tmp_path / 'coatnet_zoo' / 'weights').mkdir(parents=True)
    release = {'evaluated_on': 'Digits, val', 'trained_on': 'Digits', 'metrics': {'top1': 98.333, 'top5': 99.9},
               'license_name': None, 'hours': 5.04, 'hardware': 'a CPU', 'teacher': None}
    entry = {'repo': None, 'packaged': 'x.safetensors', 'sha256': 'ab' * 32, 'size': 7_654_321,
             'pretrained_cfg': {'license': 'apache-2.0'}, 'release': release}
    bound = {**entry, 'release': {**release, 'license_name': 'research-only', 'teacher': 'A | large model',
                                  'hours': 0.1554}}
    unknown = {**entry, 'repo': 'owner/x', 'packaged': None, 'release': {**release, 'hours': None, 'metrics': {
        'top1': None, 'top5': None}}}
    for releases, parts in (
            ({}, ['No weights are released yet']),
            ({'x_64.digits': entry}, [
                '| `x_64.digits` | 98.33 | 99.90 | Digits, val | Digits | no | 5.0 h on a CPU | 7.7 | the package |']),
            ({'x_64.digits': entry}, ['| apache-2.0 | `abababababab` |']),
            ({'x_64.digits': bound}, ['| yes | 9 min on a CPU |', '| research-only | `abababababab` |']),
            ({'x_64.digits': unknown}, ['| not measured | not measured | Digits', '[owner/x](https://huggingface.co/owner/x)'])):
        (tmp_path / 'coatnet_zoo' / 'weights' / 'releases.json').write_text(json.dumps(releases))
        content = render('<!-- weights -->\n<!-- /weights -->', tmp_path)
        for part in parts:
            assert part in content
        short = weights.released(tmp_path)
        assert 'No weights are released yet.' == short if not releases else f'| `{next(iter(releases))}` | ' in short


def test_previews_show_the_last_epoch_of_each_recipe_and_every_seed(tmp_path):
    results = tmp_path / 'results'
    assert weights.previews(tmp_path).count('not measured') == 4 * len(weights.COMPARED_MODELS)
    for place, file in enumerate((
            'tin200_preview/resnet18/metrics.csv', 'tin200_preview/resnet18/metrics_more.csv',
            'tin200_preview/coatnet_pico_64/metrics.csv', 'tin200/coatnet_pico_64-seed42/metrics.csv',
            'tin200/coatnet_pico_64-seed43/metrics.csv', 'tin200/resnet18-seed42/metrics.csv',
            'tin200_preview/x_64/metrics.csv', 'tin200_preview/x_64-seed43/metrics.csv')):
        (results / file).parent.mkdir(parents=True, exist_ok=True)
        (results / file).write_text(f'epoch,eval_top1\n1,1.0\n2,{place + 5}.126\n')
    for folder, top1 in {'resnet18': 40.0, 'x_64': 50.0, 'x_64-seed43': 53.0}.items():
        (results / 'tin200_preview' / folder / 'validation.csv').write_text(f'model,top1,top5\nm,{top1},70.0\n')
    text = weights.previews(tmp_path)
    assert '| `resnet18` | 5.13 (2 epochs) | 6.13 (2 epochs) | 40.00 | 10.13 (2 epochs) |' in text
    assert ('| `x_64` | 11.63 (11.13 to 12.13, 2 seeds, 2 epochs) | not measured | 51.50 (50.00 to 53.00, 2 seeds) | '
            'not measured |') in text
    assert ('| `coatnet_pico_64` | 7.13 (2 epochs) | not measured | not measured | 8.63 (8.13 to 9.13, 2 seeds, '
            '2 epochs) |') in text
    assert 'x_64-seed43' not in text
    assert '| `convnextv2_femto` | not measured | not measured | not measured | not measured |' in text


ORIGIN = dict(hardware='a CPU')


def test_transfer_shows_each_method_with_its_spread(tmp_path):
    results = tmp_path / 'results'
    results.mkdir()
    assert 'not measured' in accuracy.transfer(tmp_path)
    settings = dict(
        model='x_64.a', data_dir='some/flowers', img_size=64, updates=[300, 600, 900], fractions=[0.01, 0.1, 1.0],
        subsets=[5, 5, 1])
    (results / 'transfer_flowers_cpu.json').write_text(json.dumps(dict(settings=settings, rows=[ORIGIN], table={
        'linear probe': {'0.1': dict(top1=40.04, deviation=1.26, subsets=4),
                         '1.0': dict(top1=55.5, deviation='not measured', subsets=1)}})))
    text = accuracy.transfer(tmp_path)
    assert '| weights | data | method | 1 % of the labels | 10 % of the labels | 100 % of the labels |' in text
    assert '| `x_64.a` | flowers | linear probe | not measured | 40.0 ± 1.3 (4) | 55.5 (1) |' in text
    assert 'flowers at size 64, updates: 300, 600, 900; a CPU.' in text
    assert '(../results/transfer_flowers_cpu.png)' in text
    (results / 'transfer_trees_cpu.json').write_text(json.dumps(dict(settings=settings, rows=[ORIGIN], table={
        'fine-tuned': {'0.01': dict(top1=12.0, deviation='not measured', subsets=1)}})))
    text = accuracy.transfer(tmp_path)  # one fraction makes no curve
    assert '12.0 (1)' in text and 'transfer_trees_cpu.png' not in text and 'transfer_flowers_cpu.png' in text


def test_small_data_shows_each_set_model_and_recipe(tmp_path):
    (tmp_path / 'results').mkdir()
    assert accuracy.small_data(tmp_path) == 'Recipes on few images: not measured.'
    cells = {'small_data': dict(top1=80.0, deviation='not measured', seeds=1),  # in the order of the rows
             'defaults': dict(top1=20.04, deviation=1.26, seeds=3)}
    (tmp_path / 'results' / 'small_data_cpu.json').write_text(json.dumps(dict(
        table={'five_kinds': {'x.tag': cells}}, hardware='a CPU', settings=dict(
            recipes=['defaults', 'small_data'], seeds=[0, 1, 2], threads=1),
        rows=[dict(set='five_kinds', images=images) for images in (60, 58)])))
    said = accuracy.small_data(tmp_path)
    assert '| images of | to train on | weights | defaults | `small_data` |' in said
    assert '| five kinds | 58 to 60 | `x.tag` | 20.0 ± 1.3 | 80.0 |' in said
    assert 'over 1 seed, each' in said and 'a CPU, 1 thread.' in said  # the fewest of a cell


def test_robustness_shows_each_model(tmp_path):
    (tmp_path / 'results').mkdir()
    assert 'not measured' in accuracy.robustness(tmp_path)
    (tmp_path / 'results' / 'robustness_tin200_cpu.json').write_text(json.dumps(dict(
        top1={'x_64.a': {'48 px': 10.126, 'noise': 9.0}, 'y_64.a': {'48 px': 11.0, 'noise': 8.5}}, **ORIGIN)))
    text = accuracy.robustness(tmp_path)
    assert '| top-1 (%) | 48 px | noise |' in text and '| `x_64.a` | 10.13 | 9.00 |' in text and '| `y_64.a` |' in text


def test_distilled_shows_the_teacher_first_and_what_is_measured(tmp_path):
    assert 'not measured' in weights.distilled(tmp_path)
    run = dict(model='x_64', epochs=32, train_seconds=93.0, top1=50.254, top5=78.7, hardware='a GPU')
    for name in ('a_student', 'teacher'):
        folder = tmp_path / 'results' / 'tin200_dist' / name
        folder.mkdir(parents=True)
        (folder / 'summary.json').write_text(json.dumps(run))
    (folder.parent / 'a_student' / 'validation.csv').write_text('model,top1,top5\nm,49.006,77.0\n')
    assert weights.distilled(tmp_path).splitlines()[2:] == [
        '| `x_64`, the teacher | 32 | 1.6 | 50.25 | 78.70 | not measured | not measured | a GPU |',
        '| `x_64` | 32 | 1.6 | 50.25 | 78.70 | 49.01 | 77.00 | a GPU |']


def test_ablation_has_a_column_for_each_recipe(tmp_path):
    (tmp_path / 'results').mkdir()
    assert 'not measured' in accuracy.ablation(tmp_path)

    def write(name: str, epochs: int, amp: bool, rows: dict[str, list[float]], throughput: float | str) -> None:
        cells = {row: dict(top1=sum(top1) / len(top1), standard_error=0.5 if len(top1) > 1 else 'not measured',
                           runs=[dict(top1=value, **({} if amp else {'hardware': 'CPU B'})) for value in top1],
                           parameters=3_260_000, multiply_adds=39_000_000, images_per_second=throughput)
                 for row, top1 in rows.items()}
        (tmp_path / 'results' / f'ablation_imagenette_64{name}.json').write_text(json.dumps(dict(
            rows=cells, settings=dict(epochs=epochs, amp=amp, img_size=64), hardware='CPU A')))

    write('_cpu', 10, True, {'LLLL': [70.], 'CCCC': [75.]}, 588.4)
    text = accuracy.ablation(tmp_path)
    assert '| row | top-1 (%), 10 epochs |' in text and '10 epochs in bfloat16: 1 seed a row, CPU A.' in text
    write('_seeds_cpu', 5, False, {'DDDD': [60., 61., 62.], 'LLLL': [64.]}, 'not measured')
    text = accuracy.ablation(tmp_path)
    rows = [line for line in text.splitlines() if line.startswith('| `')]
    assert rows == ['| `LLLL` | 64.0 | 70.0 | 3.26 | 39 | 588 |', '| `DDDD` | 61.0 ± 0.5 | not measured | 3.26 | 39 | '
                    'not measured |', '| `CCCC` | not measured | 75.0 | 3.26 | 39 | 588 |']
    assert '5 epochs in float32: 1 to 3 seeds a row, CPU B.' in text and 'has no standard error' in text
    assert '(../results/ablation_imagenette_64_seeds_cpu.png)' in text


def test_weight_init_has_a_column_for_each_learning_rate(tmp_path):
    (tmp_path / 'results').mkdir()
    assert 'not measured' in accuracy.weight_init(tmp_path)
    for lr, top1 in ((2e-3, 11.0), (5e-4, 10.45)):
        (tmp_path / 'results' / f'weight_init_lr{lr}.json').write_text(json.dumps(dict(
            settings=dict(lr=lr, model='x_64', img_size=32, epochs=2, seeds=[0, 1]), hardware='a GPU', note='Some',
            rows={'CCTT weight_init=wide': dict(top1=top1, standard_error=0.05)})))
    text = accuracy.weight_init(tmp_path)
    assert '| `weight_init` | top-1 (%), lr 0.0005 | top-1 (%), lr 0.002 |' in text
    assert '| `wide` | 10.45 ± 0.05 | 11.00 ± 0.05 |' in text and '2 seeds, a GPU.\nSome.' in text


def test_operators_have_a_table_for_each_gpu(tmp_path):
    (tmp_path / 'results').mkdir()
    assert 'not measured' in gpu.ops_gpu(tmp_path) and 'not measured' in speed.ops(tmp_path)
    header = ('op,side,channels,kernel,passes,batch_size,dtype,device,threads,backend,ms,ratio_to_conv2d,'
              'percent_of_floor,hardware,torch')
    for card in ('a', 'b'):
        (tmp_path / 'results' / f'ops_{card}.csv').write_text('\n'.join((header, *(
            f'light,14,8,{kernel},forward,2,bfloat16,cuda,1,{backend},{ms},{ms},7.4,card {card},2.11'
            for kernel in (3, 7) for backend, ms in (('conv2d', 1.0), ('triton', 1.504))))))
    text = gpu.ops_gpu(tmp_path)
    assert text.count('| light 7 x 7 | 14 x 14 x 8 | forward | 1.00 | 1.50 | 7 |') == 2
    assert 'card a, batch 2, bfloat16' in text and 'card b, batch 2, bfloat16' in text
    assert text.count('wall clock, launches included') == 2


def write_card(root: Path, hardware: str) -> None:
    """Write results of a card that meets all targets but one: forward at 14 x 14 x 384."""
    (root / 'results').mkdir(exist_ok=True)
    ops = []
    for op, kernel, side, channels in (
            ('dynamic', 7, 56, 96), ('dynamic', 7, 14, 384), *(('light', kernel, 56, 96) for kernel in (7, 13, 31))):
        for passes in ('forward', 'forward_backward'):
            image = 2 * 128 * channels * side**2 / 2**20
            tensors = (5 * image) * (2 if passes == 'forward_backward' else 1)  # the operand is three images
            for backend, ms in (('eager', 40), ('compiled', 30), ('triton', 10 if passes == 'forward_backward' else 2),
                                ('conv2d', 20), ('band', 'not measured')):
                ops.append(dict(
                    op=op, side=side, channels=channels, kernel=kernel, passes=passes, batch_size=128, dtype='bfloat16',
                    device='cuda', threads=1, backend=backend, timer='CUDA graph', ms=ms,
                    ratio_to_conv2d=ms / 20 if isinstance(ms, int) else ms, percent_of_floor=70 if side == 56 else 44,
                    bytes_ms=1.4 if passes == 'forward' else 4.4, multiply_adds_ms=.1,
                    # on top of the inputs forward: the output; both: the output, two gradients and a tenth too much
                    peak_mib=image * (1 if passes == 'forward' else 5.99), tensors_mib=tensors, hardware=hardware,
                    torch='2.11'))
    write_rows(root / 'results' / 'ops_x.csv', ops)
    write_rows(root / 'results' / 'models_x.csv', [
        dict(model=model, mode=mode, form='eager', precision='bfloat16 autocast', batch_size=128, img_size=224,
             device='cuda', images_per_second=speed, peak_mib=5000.4, hardware=hardware, torch='2.11')
        for mode in ('inference', 'training') for model, speed in (
            ('coatnet_0', 1500), ('coatnet_0_224', 1000), ('lightconvnet_tiny', 1000), ('convnext_tiny', 1000))])
    write_rows(root / 'results' / 'checks_x.csv', [
        dict(step=step, check=check, result=result, value='0.1', limit='0.01', detail='why', hardware=hardware,
             torch='2.11') for step, check, result in (
            ('compare', 'a', 'passed'), ('compare', 'b', 'failed'), ('compare', 'step', 'done'),
            ('light-31', 'step', 'stopped at its limit of 90 s'))])


def test_targets_stand_beside_what_a_card_reaches(tmp_path):
    (tmp_path / 'results').mkdir()
    empty = gpu.gpu_targets(tmp_path)
    assert empty.count('| not measured |') == len(gpu.TARGETS) == 13 and '| at most 1.1 |' in empty
    assert gpu.models_gpu(tmp_path) == 'Models on a GPU: not measured.'
    assert gpu.gpu_checks(tmp_path) == 'Steps of `make gpu`: not run.'
    write_card(tmp_path, 'card x')
    rows = [line.split(' | ')[1:] for line in gpu.gpu_targets(tmp_path).splitlines()[2:15]]
    assert [value.removesuffix(' |') for _, value in rows] == [
        '70.00, met', '44.00, missed', '37.50, met', '37.50, met', '3.00, met', *['2.00, met'] * 3, '1.10, met',
        '1.50, met', '1.50, met', '1.00, met', '1.00, met']
    assert '| `coatnet_0` | training | eager | 1500 | 5000 |' in gpu.models_gpu(tmp_path)
    checks = gpu.gpu_checks(tmp_path)
    assert '| `compare` | done | 1 | 1 | 0 |' in checks and '- `compare`: b: 0.1, at most 0.01; why' in checks
    assert '| `light-31` | stopped at its limit of 90 s | 0 | 0 | 0 |' in checks
    assert ('| dynamic 7 x 7 | 56 x 56 x 96 | forward | 20.00 | 2.00 | 1.50 | 0.10 | not measured | 70 |'
            in gpu.ops_gpu(tmp_path))


def test_columns_with_figures_are_aligned_to_the_right():
    assert table(['a', 'b', 'c'], [['x', 'not measured', 'y'], ['x', '1', 'y']]).splitlines()[1] == '| - | -: | - |'


def test_inference_form_shows_each_form_with_its_quartiles(tmp_path):
    (tmp_path / 'results').mkdir()
    assert 'not measured' in speed.inference_form(tmp_path) and 'not measured' in speed.kernel_budgets(tmp_path)
    row = dict(model='x', batch_size=8, cpu_ms={'package': 10.4, 'other': 12.0},
               of_package={'package': 1.0, 'other': 1.154}, quartiles={'package': [1, 1], 'other': [0.9, 1.255]})
    (tmp_path / 'results' / 'inference_form_cpu.json').write_text(json.dumps(dict(rows=[row], hardware='a CPU')))
    assert '| `x` | 8 | 10 | 1.15 (0.90 to 1.25) |' in speed.inference_form(tmp_path)


def test_runtimes_are_multiples_of_the_eager_form_of_the_first_model(tmp_path):
    (tmp_path / 'results').mkdir()
    assert 'not measured' in speed.runtimes(tmp_path)
    settings = dict(runtimes=['eager', 'openvino'], models=['x', 'y'], img_size=64, threads=1)
    rows = [dict(model=model, batch_size=batch, ms={'eager': ms, 'openvino': other}) for model, batch, ms, other in (
        ('x', 1, 10., 8.04), ('y', 1, 20., 'not measured'), ('x', 8, 50., 25.))]
    (tmp_path / 'results' / 'runtimes_cpu.json').write_text(json.dumps(dict(
        rows=rows, settings=settings, hardware='a CPU', torch='2', versions={'openvino': '3'})))
    assert speed.runtimes(tmp_path).splitlines()[2:] == [
        '| `x` | 1 | 10 (1.00) | 8 (0.80) |', '| `y` | 1 | 20 (2.00) | not measured |',
        '| `x` | 8 | 50 (1.00) | 25 (0.50) |', '',
        'Milliseconds a batch at 64 px, and in brackets multiples of eager `x`; a CPU, 1 thread, torch 2, openvino 3.']


def test_choices_say_where_weights_come_from():
    rows = [row.split(' | ') for row in models.choices(ROOT).splitlines()[2:]]
    assert len(rows) == 8
    found = {row[1]: row[-1] for row in rows}
    assert found['`coatnet_0_kecam`'] == 'downloaded |' and found['`coatnet_pico_64`'] == 'yes |'
    assert found['`coatnet_0`'] == 'no |'
