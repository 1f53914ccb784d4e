"""Fill the tables of README.md and MODEL_CARD.md from the files under results/.

    python scripts/report.py            rewrite the tables
    python scripts/report.py --count    count parameters and multiply-adds anew first, into results/models.json
    python scripts/report.py --check    exit with 1 if a table is not what the files say
"""
import json
import re
import sys
from pathlib import Path

import timm
import torch
import tyro
from provenance import provenance
from run_folder import write_file, write_json
from timm.models import model_entrypoint
from torch.utils.flop_counter import FlopCounterMode

import coatnet_zoo

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / 'results'
DOCUMENTS = ('README.md', 'MODEL_CARD.md')


def count_models() -> dict:
    """Parameters and multiply-adds of every name of the zoo, at its own image size, on the meta device."""
    counts = {}
    for name in timm.list_models():
        if not model_entrypoint(name).__module__.startswith(f'{coatnet_zoo.__name__}.'):
            continue
        model = timm.create_model(name, device='meta').eval()
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            model(torch.empty(1, *model.pretrained_cfg['input_size'], device='meta'))
        counts[name] = dict(
            word=model.cfg.layout, parameters=sum(p.numel() for p in model.parameters()),
            multiply_adds=flops.get_total_flops() // 2, img_size=model.img_size[0],
            strides=[level['reduction'] for level in model.feature_info])
    return dict(models=counts, **provenance('cpu'))


def table(header: list[str], rows: list[list[str]]) -> str:
    right = ['-:' if any(c.isdigit() for c in column[1][:1]) else '-' for column in zip(header, rows[0], strict=True)]
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in (header, right, *rows))


def family() -> str:
    """The models by size."""
    counts = json.loads((RESULTS / 'models.json').read_text())['models']
    rows = [
        [f'`{name}`', row['word'], f'{row["parameters"] / 1e6:.2f}', f'{row["multiply_adds"] / 1e9:.2f}',
         str(row['img_size']), ' '.join(map(str, row['strides']))]
        for name, row in sorted(counts.items(), key=lambda item: item[1]['parameters'])]
    return table(['name', 'word', 'parameters (M)', 'multiply-adds (G)', 'image size', 'strides of the features'], rows)


def speed() -> str:
    """Every benchmark that was recorded."""
    rows, origins = [], {}
    for file in sorted(RESULTS.glob('benchmark_*.json')):
        report = json.loads(file.read_text())
        settings = report['settings']
        origin = f'{report["hardware"]}, {settings["threads"]} thread{"s" * (settings["threads"] > 1)}, batch ' \
                 f'{settings["batch_size"]} at {settings["img_size"]}, torch {report["torch"]}, timm {report["timm"]}'
        origins.setdefault(origin, None)
        for mode, row in report['results'].items():
            names = [f'`{" ".join((settings[side], *settings[f"{side}_kwargs"]))}`' for side in ('model', 'against')]
            pace, memory = row['images_per_second'], row['peak_memory_mib']
            rows.append([
                mode, *names, f'{row["ratio"]:.2f}', *(f'{pace[side]:.2f}' for side in pace),
                *(m if isinstance(m, str) else f'{m:.0f}' for m in memory.values())])
    if not rows:
        return 'Speed: not measured.'
    rows.sort(key=lambda row: row[0])
    header = ['', 'model', 'against', 'ratio', 'images/s', 'images/s of the other', 'peak MiB', 'peak MiB of the other']
    return table(header, rows) + f'\n\nMeasured on: {"; ".join(origins)}. On a GPU: not measured.'


def demo() -> str:
    """What the demo reached when it was recorded."""
    file = RESULTS / 'demo_cpu.json'
    if not file.exists():
        return 'Accuracy and time of the demo: not measured.'
    report = json.loads(file.read_text())
    return (f'Recorded: {report["top1"]:.2f} % of {report["images"]} held-out digits after {report["epochs"]} epochs\n'
            f'(the best epoch is picked on the same digits), {report["seconds"]:.0f} s on {report["threads"]} threads '
            f'of {report["hardware"]}, seed {report["seed"]}.')


def render(text: str) -> str:
    """`text` with what stands between <!-- NAME --> and <!-- /NAME --> made anew."""
    for section in (family, speed, demo):
        name = section.__name__
        pattern = re.compile(rf'(<!-- {name} -->\n).*?(<!-- /{name} -->)', re.DOTALL)
        if pattern.search(text):
            content = section()
            text = pattern.sub(lambda match, content=content: f'{match[1]}{content}\n{match[2]}', text)
    return text


def main(count: bool = False, check: bool = False) -> int:
    """Rewrite or check the tables; returns the exit code."""
    if count:
        write_json(RESULTS / 'models.json', count_models())
    stale = []
    for name in DOCUMENTS:
        old = (ROOT / name).read_text()
        new = render(old)
        if new != old:
            stale.append(name)
            if not check:
                write_file(ROOT / name, lambda temporary, new=new: temporary.write_text(new))
    if check and stale:
        print(f'{", ".join(stale)} does not show what results/ says; run python scripts/report.py.')
    return int(check and bool(stale))


if __name__ == '__main__':
    sys.exit(tyro.cli(main, description=__doc__))
