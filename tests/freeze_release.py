"""Keep what a packaged release must remain: its tensors by name, type and shape, and its golden logits.

    python tests/freeze_release.py output/hub/coatnet_pico_64.tin200

once, when hub/publish.py --package has shipped it; tests/models/test_shipped_weights.py holds the package to it.
"""
import json
import shutil
import sys
from pathlib import Path

from safetensors import safe_open

RELEASES = Path(__file__).with_name('releases')


def tensors_of(path: Path) -> dict[str, list]:
    """[type, shape] of every tensor of a safetensors file, sorted by name."""
    with safe_open(path, framework='pt') as file:
        slices = {name: file.get_slice(name) for name in sorted(file.keys())}
        return {name: [part.get_dtype(), list(part.get_shape())] for name, part in slices.items()}


def main(folder: Path) -> None:
    lines = [f'{json.dumps(name)}: {json.dumps(kind)}' for name, kind in
             tensors_of(folder / 'model.safetensors').items()]
    with (RELEASES / f'{folder.name}.json').open('x', encoding='utf-8') as file:  # never over an earlier one
        file.write('{' + ',\n'.join(lines) + '}\n')
    shutil.copyfile(folder / 'golden.safetensors', RELEASES / f'{folder.name}.golden.safetensors')


if __name__ == '__main__':
    main(Path(sys.argv[1]))
