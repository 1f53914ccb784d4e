"""Class mapping of scripts/eval_imagenet.py: from synset folders, numbers and names to logits, and its errors."""
import pickle
from pathlib import Path

import pytest
import timm
import torch

from coatnet_train.runtime.cli import ConfigError
from support.imagenet_runs import SYNSETS, assert_scores, random_model, run, timm_logits, write_fine_tune, write_images


def test_some_synsets_are_mapped_to_the_1k_indices_and_said_so(settings, ten, weights, classes_of, capsys):
    row, classes = classes_of(settings)
    model = timm.create_model('test_resnet', checkpoint_path=weights).eval()
    logits, labels, _ = timm_logits(model, ten, {'img_size': 32})
    indices = torch.arange(5, 1000, 100)
    assert_scores(row, logits, indices[labels])
    told = capsys.readouterr().out
    assert '10 of the model\'s 1000 classes' in told and 'ImageNet synset' in told and '1000 logits compete' in told
    assert [int(item['logit']) for item in classes.values()] == indices.tolist()
    assert classes[SYNSETS[5]]['description'].startswith('electric ray')
    for label, item in enumerate(classes.values()):
        top5 = logits[labels == label].topk(5).indices
        assert int(item['images']) == 3
        hits = top5 == indices[label]
        for name, right in (('top1', hits[:, 0]), ('top5', hits.any(1))):
            assert float(item[name]) == pytest.approx(100 * right.double().mean().item(), abs=1e-3)


def test_only_the_logits_of_the_folder_compete_if_asked(settings, ten, weights, tmp_path, capsys):
    model = timm.create_model('test_resnet', checkpoint_path=weights).eval()
    logits, labels, _ = timm_logits(model, ten, {'img_size': 32})
    row = run(settings, valid_labels='folder')
    assert 'only 10 of 1000' in capsys.readouterr().out and row['valid_labels'] == 'folder'
    assert_scores(row, logits[:, 5:1000:100], labels)
    more = list(range(0, 1000, 5))  # a file of indices, in which those of the folder have other positions
    (tmp_path / 'indices.txt').write_text('\n'.join(map(str, more)))
    row = run(settings, valid_labels=str(tmp_path / 'indices.txt'))
    assert_scores(row, logits[:, more], labels * 20 + 1)


def test_numbered_folders_are_indices_and_not_strings(settings, tmp_path, weights, capsys):
    names = ['0', '2', '10', '11', '100', '999']
    assert sorted(names) != names  # otherwise the bug would not show
    write_images(tmp_path / 'v2', names)
    row = run(settings, data_dir=str(tmp_path / 'v2'))
    model = timm.create_model('test_resnet', checkpoint_path=weights).eval()
    logits, _, _ = timm_logits(model, tmp_path / 'v2', {'img_size': 32})
    assert_scores(row, logits, torch.tensor([int(name) for name in names]).repeat_interleave(2))
    assert 'named by numbers' in capsys.readouterr().out


@pytest.mark.parametrize('name', ['imagenet_a', 'imagenet_r'])
def test_relatives_with_200_classes_are_scored_among_these_as_by_valid_labels(
        settings, tmp_path, weights, name, capsys):
    info = Path(timm.data.__file__).parent / '_info'
    synsets = (info / f'{name}_synsets.txt').read_text().split()
    indices = [int(line) for line in (info / f'{name}_indices.txt').read_text().split()]
    assert len(synsets) == 200
    write_images(tmp_path / name, synsets, each=1)
    row = run(settings, data_dir=str(tmp_path / name), batch_size=64)
    model = timm.create_model('test_resnet', checkpoint_path=weights).eval()
    logits, labels, _ = timm_logits(model, tmp_path / name, {'img_size': 32})
    assert_scores(row, logits[:, indices], labels)
    assert row['valid_labels'] == name and name in capsys.readouterr().out
    whole = run(settings, data_dir=str(tmp_path / name), batch_size=64, valid_labels='all')
    assert_scores(whole, logits, torch.tensor(indices)[labels])
    assert whole['loss'] > row['loss']
    named = run(settings, data_dir=str(tmp_path / name), batch_size=64, valid_labels=f'{name}_indices.txt')
    assert named['loss'] == row['loss']


@pytest.mark.parametrize('split', ['val', 'validation', 'test', 'holdout'])
def test_fine_tune_is_evaluated_by_its_own_label_names(settings, tmp_path, randomize, capsys, split):
    labels = ['red', '7', 'blue', '0', 'green']  # neither sorted nor indices
    name, model = write_fine_tune(tmp_path / 'run', randomize, labels)
    write_images(tmp_path / 'data' / split, ['0', '7', 'blue', 'red'])
    row = run(settings, model=(name,), checkpoint=(), img_size=None, data_dir=str(tmp_path / 'data'),
              split=split if split == 'holdout' else 'validation')
    logits, found, _ = timm_logits(model, tmp_path / 'data' / split, {})
    assert_scores(row, logits, torch.tensor([3, 1, 2, 0])[found])
    assert row['img_size'] == 32 and '4 of the model\'s 5 classes' in capsys.readouterr().out


def test_folder_of_classes_is_taken_itself_but_never_one_with_a_training_split(settings, ten, tmp_path):
    assert run(settings, data_dir=str(ten / 'val'))['loss'] == run(settings)['loss']
    write_images(tmp_path / 'data' / 'train', SYNSETS[:3])
    with pytest.raises(ConfigError, match='has no folder validation or val'):
        run(settings, data_dir=str(tmp_path / 'data'))


def test_classes_without_names_are_taken_in_order_and_said_so(settings, tmp_path, randomize, capsys):
    model = random_model(randomize, num_classes=3)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'three.pth')
    write_images(tmp_path / 'data' / 'val', ['a', 'b', 'c'])
    own = dict(data_dir=str(tmp_path / 'data'), checkpoint=(str(tmp_path / 'three.pth'),), num_classes=3)
    row = run(settings, **own)
    logits, labels, _ = timm_logits(model, tmp_path / 'data' / 'val', {'img_size': 32})
    assert_scores(row, logits, labels)
    assert 'in the order of the data\'s classes, a, b, c' in capsys.readouterr().out
    (tmp_path / 'map.txt').write_text('c\na\nb\n')
    row = run(settings, class_map=str(tmp_path / 'map.txt'), **own)
    assert_scores(row, logits, torch.tensor([1, 2, 0])[labels])
    (tmp_path / 'data' / 'val' / 'a').rename(tmp_path / 'data' / 'val' / 'z')
    assert run(settings, class_map=str(tmp_path / 'map.txt'), **own)['images'] == 4
    assert 'leaves out 1 folders: z' in capsys.readouterr().out


def test_class_map_may_stand_in_for_the_names_of_a_model(settings, tmp_path, randomize):
    name, model = write_fine_tune(tmp_path / 'run', randomize, ['rouge', 'vert', 'bleu'])
    write_images(tmp_path / 'data' / 'val', ['blue', 'green', 'red'])
    own = dict(model=(name,), checkpoint=(), img_size=None, data_dir=str(tmp_path / 'data'))
    with pytest.raises(ConfigError, match='expected the model\'s 3 label names'):
        run(settings, **own)
    (tmp_path / 'map.txt').write_text('red\ngreen\nblue\n')
    row = run(settings, class_map=str(tmp_path / 'map.txt'), **own)
    logits, labels, _ = timm_logits(model, tmp_path / 'data' / 'val', {})
    assert_scores(row, logits, torch.tensor([2, 1, 0])[labels])


@pytest.mark.parametrize('schema', ['hfds', 'hfids'])
def test_images_of_a_data_set_of_the_hub_are_read_with_its_columns(settings, tmp_path, randomize, schema):
    datasets = pytest.importorskip('datasets')
    name, model = write_fine_tune(tmp_path / 'run', randomize, ['a', 'b', 'c'])
    write_images(tmp_path / 'data' / 'val', ['a', 'b', 'c'])
    files = sorted((tmp_path / 'data' / 'val').glob('*/*.png'))
    features = datasets.Features({
        'photo': datasets.Image(), 'kind': datasets.ClassLabel(names=['a', 'b', 'c'])})
    table = datasets.Dataset.from_dict({
        'photo': [str(path) for path in files], 'kind': [path.parent.name for path in files]}, features=features)
    (tmp_path / 'hub').mkdir()
    table.to_parquet(tmp_path / 'hub' / 'validation-00000.parquet')
    row = run(settings, data_dir=str(tmp_path / 'cache'), dataset=f'{schema}/{tmp_path / "hub"}', input_key='photo',
              target_key='kind', num_samples=6, model=(name,), checkpoint=(), img_size=None, num_classes=3)
    logits, labels, _ = timm_logits(model, tmp_path / 'data' / 'val', {})
    assert_scores(row, logits, labels)
    assert row['images'] == 6


def test_classes_that_do_not_fit_stop_with_what_was_expected(settings, tmp_path, randomize):
    write_images(tmp_path / 'animals', ['cat', 'dog'])
    animals = str(tmp_path / 'animals')
    with pytest.raises(ConfigError, match=r'2 classes \(cat, dog\).*expected ImageNet synsets \(n01440764'):
        run(settings, data_dir=animals)
    name, _ = write_fine_tune(tmp_path / 'run', randomize, ['dog', 'fish', 'bird', 'ant', 'bee'])
    own = dict(model=(name,), checkpoint=(), img_size=None)
    with pytest.raises(ConfigError, match=r'the model\'s 5 label names \(dog, fish, bird, \.\.\.\), but cat'):
        run(settings, data_dir=animals, **own)
    with pytest.raises(ConfigError, match='new, random classifier'):
        run(settings, data_dir=animals, num_classes=2, **own)
    with pytest.raises(ConfigError, match='--real-labels are for the 1000 classes'):
        run(settings, data_dir=animals, real_labels='timm', **own)
    torch.save(random_model(randomize, num_classes=3).state_dict(), tmp_path / 'three.pth')
    with pytest.raises(ConfigError, match='expected 3 classes, for the model has 3 logits without names'):
        run(settings, data_dir=animals, checkpoint=(str(tmp_path / 'three.pth'),), num_classes=3)
    with (tmp_path / 'map.pkl').open('wb') as file:
        pickle.dump({'cat': 0, 'dog': 2}, file)
    with pytest.raises(ConfigError, match='without a gap'):
        run(settings, data_dir=animals, class_map=str(tmp_path / 'map.pkl'))


@pytest.mark.parametrize(('name', 'content', 'message'), [
    ('map.txt', b'a\n\nb\nc\n', 'a class on each line, line 2 is blank; remove it'),
    ('map.txt', b'a\nb\na\nc\n', 'each class once, a stands on lines 1 and 3; remove one'),
    ('map.txt', b'\xff\xfe', 'must be text in UTF-8'),
    ('map.txt', b'x\ny\n', 'names no folder of .*val that holds images; give'),
    ('map.txt', b'', 'names no folder of'),
    ('map.pkl', b'no pickle', 'must be a .txt file with a class a line'),
    ('map.csv', b'a\n', 'must be a .txt file with a class a line')], ids=str)
def test_class_map_that_is_none_is_refused(settings, tmp_path, name, content, message):
    write_images(tmp_path / 'data' / 'val', ['a', 'b', 'c'], each=1)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f'--class-map .*{message}') as error:
        run(settings, data_dir=str(tmp_path / 'data'), class_map=str(tmp_path / name))
    assert '\n' not in str(error.value)
