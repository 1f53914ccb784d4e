"""Every Python block of the README runs as it stands, with the files that it names at hand."""
import re
from pathlib import Path

import pytest
import timm
from safetensors.torch import save_file

README = (Path(__file__).parents[1] / 'README.md').read_text()
BLOCKS = re.findall(r'```python\n(.*?)```', README, re.DOTALL)


def test_blocks_are_found_and_short():
    assert len(BLOCKS) == 7 and all(len(block.strip().splitlines()) <= 10 for block in BLOCKS)


@pytest.mark.parametrize('block', BLOCKS, ids=range(len(BLOCKS)))
def test_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if 'local-dir:' in block:
        timm.models.save_for_hf(timm.create_model('coatnet_pico'), 'output/coatnet_pico', safe_serialization=True)
    if 'coatnet_0_224.safetensors' in block:
        save_file(timm.create_model('coatnet_0_224').state_dict(), 'coatnet_0_224.safetensors')
    exec(compile(block, 'README.md', 'exec'), {})
