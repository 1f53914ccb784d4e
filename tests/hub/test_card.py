"""hub/card.py: the card's metadata and text agree with the run."""
import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

import card
from coatnet_train.runtime.cli import ConfigError
from support.constants import RELEASE_NAME as NAME


def rewrite(folder: Path, cfg: dict | None = None, metrics: dict | None = None, **release) -> str:
    """Change config.json, rewrite the card, and return its text with single spaces."""
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    config['pretrained_cfg'] |= cfg or {}
    config['release'] |= {**release, 'metrics': config['release']['metrics'] | (metrics or {})}
    path.write_text(json.dumps(config))
    card.main(card.CardSettings(folder=folder))
    return ' '.join((folder / 'README.md').read_text().split())


def test_metadata_parse_back_to_the_values_of_the_run(folder):
    awkward = 'Colours: "all", 50 % #1 - naïve'
    rewrite(folder, cfg={'license': 'cc-by-nc-4.0'}, evaluated_on=awkward, dataset_id='me/colours',
            metrics={'top1': 61.0001, 'top5': 0.1 + 0.2})
    data = ModelCard.load(folder / 'README.md').data
    assert isinstance(data, ModelCardData) and data.model_name == NAME
    assert (data.library_name, data.license, data.pipeline_tag) == ('timm', 'cc-by-nc-4.0', 'image-classification')
    assert data.tags == ['image-classification', 'timm', 'coatnet_zoo'] and data.metrics == ['accuracy']
    assert data.datasets == ['me/colours'] and data.get('base_model') is None
    assert [(result.metric_name, result.metric_value) for result in data.eval_results] == [
        ('Top-1 accuracy (%)', 61.0001), ('Top-5 accuracy (%)', 0.1 + 0.2)]
    assert {(result.task_type, result.dataset_type, result.dataset_name) for result in data.eval_results} == {
        ('image-classification', 'me/colours', awkward)}


def test_text_tells_results_and_training(folder):
    text = rewrite(
        folder, recipe='tin200_preview', hours=2.5,
        metrics={'top1': 65.914, 'ece': 3.456, 'images': 10000, 'loss': 1.5}, picked_best_epoch=False,
        evaluated_on='Tiny-ImageNet-200, validation', teacher='coatnet_0',
        data_license='research only', trained_on='Tiny | ImageNet')
    for part in (
            '| top-1 accuracy (%) | 65.91 |', '| expected calibration error (%) | 3.46 |', '| images | 10000 |',
            '| cross-entropy (nats) | 1.5000 |', 'Measured on: Tiny-ImageNet-200, validation.',
            '| hours in all | 2.50 |', '| recipe | tin200_preview |', '| teacher | coatnet_0 |',
            '| data | Tiny \\| ImageNet |', '| seed | 42 |',
            '| epochs | 1, of which number 1 was the best and is released |', 'research only; its terms may bind',
            'layout `CCTT`, one block type a stage: `C` MBConv with squeeze-excite, `T` Transformer block with '
            'relative attention.', '3.79 M parameters', '32 x 32 pixels',
            'Others must be multiples of 16', 'Weights: apache-2.0.'):
        assert part in text, part
    assert 'too good' not in text and 'not measured' in text  # robustness never is
    assert 'These images also picked the best epoch' in rewrite(folder, picked_best_epoch=True)


def test_figures_that_are_missing_are_not_measured(folder):
    release = json.loads((folder / 'config.json').read_text())['release']
    keep = ('metrics', 'evaluated_on', 'dtype')
    text = rewrite(folder, metrics=dict.fromkeys(release['metrics']),
                   **{name: None for name in release if name not in keep})
    for title in ('top-1 accuracy (%)', 'top-5 accuracy (%)', 'cross-entropy (nats)', 'images', 'hours in all',
                  'hardware', 'epochs', 'expected calibration error (%)'):
        assert f'| {title} | not measured |' in text, title
    for title in ('data', 'seed', 'commit of coatnet_zoo', 'day', 'versions', 'starting from'):
        assert f'| {title} | not stated |' in text, title
    assert 'None' not in text and not re.search(r'nan|null', text) and 'licence not stated' in text
    assert ModelCard.load(folder / 'README.md').data.get('eval_results') is None


def test_licence_of_ones_own_is_linked_and_a_base_of_the_hub_is_named(folder):
    text = rewrite(folder, cfg={'license': 'other'}, license_name='tin-terms', license_link='https://example.com/terms',
                   started_from='pretrained weights of hf-hub:me/base.tag@' + 'a' * 40)
    data = ModelCard.load(folder / 'README.md').data
    assert (data.license, data.license_name, data.license_link) == ('other', 'tin-terms', 'https://example.com/terms')
    assert data.base_model == 'me/base.tag' and 'Weights: [tin-terms](https://example.com/terms).' in text


def test_example_runs_as_it_stands(folder, tmp_path, monkeypatch, capsys):
    rewrite(folder, repo='me/colours')
    text = (folder / 'README.md').read_text()
    block = re.search(r'```python\n(.*?)```', text, re.DOTALL)[1]
    assert text.index('pip install') < text.index('import coatnet_zoo') < text.index('timm.create_model(')
    assert "'hf-hub:me/colours'" in block
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (50, 40), (200, 40, 30)).save('image.jpg')
    exec(compile(block.replace('hf-hub:me/colours', f'local-dir:{folder}'), 'README.md', 'exec'), {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if '%' in line]
    assert sorted(name for _, name in lines) == ['blue', 'green', 'red']
    assert sum(float(share.rstrip('%')) for share, _ in lines) == pytest.approx(100, abs=0.2)


@pytest.mark.parametrize(('source', 'line'), [
    (None, 'pip install path/to/coatnet_zoo'), ('coatnet_zoo>=1', "pip install 'coatnet_zoo>=1'"),
    ('https://example.com/me/zoo', "pip install 'git+https://example.com/me/zoo'"),
    ('git+ssh://git@example.com/zoo', "pip install 'git+ssh://git@example.com/zoo'"),
    ('https://example.com/zoo-1.whl', "pip install 'https://example.com/zoo-1.whl'")])
def test_card_tells_how_to_install_the_package(folder, source, line):
    text = rewrite(folder, source=source)
    assert f'``` {line} ```' in text and ('whose address this card was not given' in text) == (source is None)


def test_text_is_whole_markdown(exported):
    text = (exported / 'README.md').read_text()
    body = text.split('---\n', 2)[2]
    assert '{{' not in text and '{%' not in text and text.endswith('\n') and '\n\n\n' not in body
    assert [line for line in body.splitlines() if line.startswith('#')] == [
        f'# {NAME}', '## How to use it', '## Results', '## How it was trained', '## Data, licence and limits']
    assert body.count('```') == 6
    targets = re.findall(r'\]\((?!https:)([^)]+)\)', body)
    assert targets == ['curves.png'] and (exported / 'curves.png').is_file()
    for table in re.findall(r'(?:^\|.*\n)+', body, re.MULTILINE):
        assert {len(re.findall(r'(?<!\\)\|', line)) for line in table.splitlines()} == {3}


def test_counts_are_those_of_the_model(exported):
    model = timm.create_model(f'local-dir:{exported}')
    count = sum(parameter.numel() for parameter in model.parameters())
    text = (exported / 'README.md').read_text()
    assert f'{count / 1e6:.2f} M parameters' in text and isinstance(model.stem.conv1, torch.nn.Conv2d)


def test_folder_without_a_usable_config_is_refused(tmp_path, exported):
    with pytest.raises(ConfigError, match=r'FOLDER .* must be one that export.py made.*No such file.*export anew'):
        card.main(card.CardSettings(folder=tmp_path))
    shutil.copy(exported / 'config.json', tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    del config['release']
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"config.json cannot be used: 'release'"):
        card.main(card.CardSettings(folder=tmp_path))
    assert not (tmp_path / 'README.md').exists()
