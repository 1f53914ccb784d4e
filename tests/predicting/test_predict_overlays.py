"""Output and overlays of scripts/predict.py for an image."""
import dataclasses

import matplotlib.image
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_input_data_config

import predict
from coatnet_train.evaluation.evaluator import Misclassified
from coatnet_train.explain import maps as explain
from coatnet_train.explain import panels, prediction
from coatnet_train.plotting import overlay
from coatnet_train.plotting.plots import confusion_figure, misclassified_figure, synset_names
from coatnet_train.runtime.cli import ConfigError
from support.overlay_runs import NAMES, SMALL_FLAGS, Colours, shown_panels, write_image, write_run, zoo


def test_predictions_of_a_run_folder_are_those_of_the_model(
        settings, image_path, tmp_path, capsys, randomize, monkeypatch):
    model = randomize(zoo())
    name = write_run(tmp_path / 'run', model, NAMES)
    drawn = shown_panels(monkeypatch)
    own = dataclasses.replace(settings, model=name, model_kwargs=(), num_classes=None, img_size=None)
    assert predict.main(own) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f'{name}: its own weights; overlays: attention of stage 4 (T)'
    assert lines[1] == f'{image_path} -> {settings.output}/kite-attention.png'

    transform = create_transform(**resolve_input_data_config(model, {}, use_test_size=True))
    image = transform(Image.open(image_path).convert('RGB'))
    with torch.no_grad():
        shares, best = model(image[None])[0].softmax(-1).sort(descending=True)
    words = {'n01440764': 'n01440764  tench, Tinca tinca', 'my own class': 'my own class',
             'n02102040': 'n02102040  English springer, English springer spaniel',
             'n03888257': 'n03888257  parachute, chute'}
    columns = [line.split(maxsplit=3) for line in lines[2:-1]]
    assert [[rank, text] for rank, _, _, text in columns] == [
        [str(rank), words[NAMES[index]]] for rank, index in enumerate(best.tolist(), 1)]
    assert [float(percent) for _, percent, _, _ in columns] == pytest.approx((100 * shares).tolist(), abs=0.0501)
    assert [panel['draw'] for panel in drawn] == ['draw_image', 'draw_heatmap', 'draw_top5']
    assert drawn[2]['probabilities'] == pytest.approx(shares.tolist())
    assert drawn[2]['labels'] == [words[NAMES[index]].split('  ')[-1].split(',')[0] for index in best]
    # the image is the crop that the model was given
    config = resolve_input_data_config(model, {}, use_test_size=True)
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ('mean', 'std'))
    crop = (image * std + mean).clamp(0, 1)
    np.testing.assert_allclose(drawn[0]['pixels'], crop.permute(1, 2, 0), atol=1e-6)
    with pytest.raises(ConfigError, match='--num-classes must be that of the weights, 4, got 5'):
        predict.main(dataclasses.replace(own, num_classes=5))


def test_checkpoint_is_loaded_and_random_weights_are_called_random(settings, tmp_path, capsys, randomize):
    assert predict.main(settings) == 0
    assert 'RANDOM WEIGHTS' in capsys.readouterr().out
    model = randomize(zoo())
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    outputs = []
    for checkpoint in (str(tmp_path / 'weights.pth'), str(tmp_path / 'weights.pth')):
        assert predict.main(dataclasses.replace(settings, checkpoint=checkpoint)) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and 'RANDOM' not in outputs[0] and 'class 3' in outputs[0]
    assert f'weights of {tmp_path}/weights.pth' in outputs[0]


def test_imagenet_labels_of_a_model_without_names_and_descriptions_of_its_own():
    model = timm.create_model('test_resnet')
    labels = panels.read_labels(model)
    assert len(labels) == 1000 and labels[0].short == 'tench' and labels[0].name == 'n01440764'
    model = timm.create_model('test_resnet', num_classes=2)
    model.pretrained_cfg = {'label_names': ['a', 'b'], 'label_descriptions': {'b': 'the second, of two'}}
    assert [str(label) for label in panels.read_labels(model)] == ['a', 'b  the second, of two']
    model.pretrained_cfg = {'label_names': ['only one']}
    assert [str(label) for label in panels.read_labels(model)] == ['class 0', 'class 1']


def test_attention_map_is_that_received_and_at_chooses_the_query(settings, randomize, tmp_path, monkeypatch):
    torch.save(randomize(zoo()).state_dict(), tmp_path / 'weights.pth')
    settings = dataclasses.replace(settings, checkpoint=str(tmp_path / 'weights.pth'), stage=3)
    drawn, seen = shown_panels(monkeypatch), []
    weights = explain.attention_weights
    monkeypatch.setattr(panels, 'attention_weights', lambda *args: seen.append(weights(*args)) or seen[-1])
    predict.main(settings)
    heat = next(panel for panel in drawn if panel['draw'] == 'draw_heatmap')
    received = seen[0][0].mean(0).sum(0)  # summed over the queries: uniform attention gives 1 everywhere
    np.testing.assert_allclose(heat['heatmap'], received.view(4, 4), rtol=1e-5)
    assert heat['heatmap'].mean() == pytest.approx(1) and heat['vmin'] == 0 and heat['frame'] is None

    drawn.clear()
    predict.main(dataclasses.replace(settings, at=(0.99, 0.3)))
    heat = next(panel for panel in drawn if panel['draw'] == 'draw_heatmap')
    assert heat['frame'] == (1, 3)
    np.testing.assert_allclose(heat['heatmap'], 16 * seen[1][0].mean(0)[1 * 4 + 3].view(4, 4), rtol=1e-5)
    assert panels.position_of((1., 1.), (8, 8)) == (7, 7) and panels.position_of((0., 0.), (8, 8)) == (0, 0)


def test_kernels_are_drawn_at_positions_or_one_at_its_place(settings, randomize, tmp_path, monkeypatch):
    settings = dataclasses.replace(
        settings, model='dynamicconvnet_pico_64', model_kwargs=(*SMALL_FLAGS, 'kernel_size=(5,5,5,5)'), stage=3)
    drawn = shown_panels(monkeypatch)
    assert predict.main(settings) == 0
    kernels, heat = drawn[1:3]
    assert (kernels['draw'], heat['draw']) == ('draw_kernels', 'draw_heatmap')
    assert kernels['kernels'].shape == (5, 5, 4, 4)
    np.testing.assert_allclose(kernels['kernels'].sum((0, 1)), 1, rtol=1e-5)
    assert heat['heatmap'].shape == (4, 4) and heat['vmax'] == pytest.approx(2 * 8 * 2 ** 0.5)

    drawn.clear()
    predict.main(dataclasses.replace(settings, at=(0.05, 0.05)))
    kernel, heat = drawn[1:3]
    assert kernel['draw'] == 'draw_kernel' and kernel['kernel'].shape == (5, 5)
    assert kernel['position'] == heat['frame'] == (0, 0)
    assert {path.name for path in settings.output.iterdir()} == {'kite-kernels.png', 'predictions.csv'}


def test_a_kernel_lies_on_what_its_taps_see(monkeypatch):
    shown = []
    monkeypatch.setattr(
        overlay, 'draw_heatmap', lambda axes, pixels, heatmap, *args, **kwargs: shown.append((heatmap, kwargs)))
    kernel = np.arange(9.).reshape(3, 3)
    overlay.draw_kernel(None, np.zeros((8, 8, 3)), kernel, (0, 1), (2, 2), '', '')
    np.testing.assert_array_equal(shown[0][0], [[3, 4], [6, 7]])  # the upper row and right column lie on the padding
    assert shown[0][1]['vmax'] == 8 and shown[0][1]['frame'] == (0, 1)


def test_maps_and_kernels_lie_upright_on_the_image():
    _, row = overlay.create_panels('title', 2, 0.5)
    overlay.draw_heatmap(row[0], np.zeros((8, 16, 3)), np.eye(2, 4), 'title', 'subtitle', 'unit', frame=(1, 2))
    overlay.draw_kernels(row[1], np.zeros((8, 16, 3)), np.eye(3)[..., None, None], 'title', 'subtitle')
    for axes in row[:2]:
        assert (axes.get_xlim(), axes.get_ylim()) == ((0, 16), (8, 0))  # row 0 at the top
    assert [image.get_extent() for image in row[0].images] == [[0, 16, 8, 0]] * 2
    assert row[0].patches[0].get_bbox().bounds == (8, 4, 4, 4)  # (left, top, width, height)
    assert row[1].images[1].get_extent() == pytest.approx([4.8, 11.2, 7.2, 0.8])
    assert {image.origin for axes in row[:2] for image in axes.images} == {'upper'}


def test_overlay_of_a_constructed_model_shows_the_deciding_quadrant(tmp_path, monkeypatch, capsys):
    """End-to-end check, from the image to the pixels of the PNG."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[32:, :32, 0] = 255
    Image.fromarray(pixels).save(tmp_path / 'red.png')
    config = dict(input_size=(3, 64, 64), mean=(0, 0, 0), std=(1, 1, 1), crop_pct=1, interpolation='bilinear')
    monkeypatch.setattr(panels, 'open_model', lambda *args, **kwargs: (Colours(), config))
    settings = predict.PredictionSettings(
        images=(tmp_path / 'red.png',), model='colours', device='cpu', output=tmp_path / 'out')
    drawn = shown_panels(monkeypatch)
    assert predict.main(settings) == 0
    assert '  1   ' in (out := capsys.readouterr().out) and out.splitlines()[2].endswith('red')
    assert 'Grad-CAM of red' in [panel.get('title') for panel in drawn]

    image = matplotlib.image.imread(tmp_path / 'out' / 'red-gradcam.png')[..., :3]
    heat = next(panel for panel in drawn if panel['draw'] == 'draw_heatmap')['heatmap']
    assert heat.shape == (8, 8) and heat[4:, :4].min() == 1 and heat[:4].max() == heat[:, 4:].max() == 0
    # the second panel: its bright pixels, of the highest values, lie only at the lower left
    bright = (image.min(-1) > 0.4) & (np.ptp(image, axis=-1) > 0.1)
    rows, columns = np.nonzero(bright[:, image.shape[1] // 3:int(image.shape[1] * 0.6)])
    assert len(rows) > 10_000
    assert rows.min() > image.shape[0] * 0.45 and columns.max() < image.shape[1] * 0.22


@pytest.mark.parametrize(('in_chans', 'shape'), [(3, (32, 32, 3)), (1, (32, 32))])
def test_grey_and_colour_models_of_timm_and_titles_with_dollars(settings, in_chans, shape, monkeypatch):
    path = write_image(settings.images[0].parent / 'a $x_{$ b.jpeg')
    drawn = shown_panels(monkeypatch)
    grey = dict(mean=(0.5,), std=(0.25,)) if in_chans == 1 else {}
    assert predict.main(dataclasses.replace(
        settings, images=(path,), model='test_resnet', model_kwargs=(), in_chans=in_chans, **grey)) == 0
    assert drawn[0]['pixels'].shape == shape
    with Image.open(settings.output / 'a $x_{$ b-gradcam.png') as image:
        image.load()
        assert image.width > image.height > 300


def test_image_settings_reach_the_model(settings, image_path, monkeypatch):
    drawn = shown_panels(monkeypatch)
    flags = dict(crop_pct=0.5, interpolation='nearest', crop_mode='squash', mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    predict.main(dataclasses.replace(settings, **flags))
    flags |= dict(mean=None, std=None, normalize=False)
    transform = create_transform((3, 32, 32), **flags)
    expected = transform(Image.open(image_path).convert('RGB')).permute(1, 2, 0) / 255
    np.testing.assert_allclose(drawn[0]['pixels'], expected, atol=1e-6)


def test_orientation_tags_are_left_alone_as_in_evaluation(settings, monkeypatch):
    path = settings.images[0].parent / 'turned.png'
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.open(settings.images[0]).save(path, exif=exif)
    assert Image.open(path).getexif()[0x0112] == 6
    drawn = shown_panels(monkeypatch)
    predict.main(dataclasses.replace(settings, images=(settings.images[0], path)))
    images = [panel['pixels'] for panel in drawn if panel['draw'] == 'draw_image']
    np.testing.assert_array_equal(*images)


def test_grey_images_of_16_bits_are_read_as_in_evaluation(settings, monkeypatch):
    pixels = np.linspace(10_000, 50_000, 32 * 32).reshape(32, 32).astype(np.uint16)
    path = settings.images[0].parent / 'deep.png'
    Image.fromarray(pixels).save(path)
    drawn = shown_panels(monkeypatch)
    predict.main(dataclasses.replace(settings, images=(path,), crop_pct=1.))
    np.testing.assert_allclose(drawn[0]['pixels'][..., 0], (pixels >> 8) / 255, atol=1e-6)


def test_logits_that_are_not_finite_are_refused(settings, tmp_path):
    model = zoo()
    model.get_classifier().bias.data[0] = float('nan')
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    with pytest.raises(ConfigError, match=r'logits that are not finite for .*kite\.png; give sound weights'):
        predict.main(dataclasses.replace(settings, checkpoint=str(tmp_path / 'weights.pth')))


def test_long_headline_stays_on_the_figure():
    figure, _ = overlay.create_panels(f'{"x" * 80}.jpg  ·  test_resnet  ·  {prediction.RANDOM}', 2)
    figure.draw_without_rendering()
    title = figure.findobj(lambda artist: getattr(artist, 'get_text', str)().endswith('mean nothing'))[0]
    box = title.get_window_extent()
    assert 0 <= box.x0 and box.x1 <= figure.bbox.x1 and '\n' in title.get_text()


def test_synsets_are_words_where_images_name_classes():
    synsets = ['n01440764', 'n02012849', 'n03126707']
    assert synset_names(synsets) == ['tench', 'crane n02012849', 'crane n03126707']
    assert synset_names(['n01440764', 'mine']) == ['n01440764', 'mine']
    axes = confusion_figure(torch.arange(3), torch.arange(3), synsets).axes[0]
    assert axes.get_yticklabels()[0].get_text() == axes.get_xticklabels()[0].get_text() == 'tench'
    wrong = [Misclassified(0.9, 7, torch.zeros(3, 8, 8), 0, 1)]
    for file, shown in (('kite.png', 'kite.png'), ('a' * 20 + '$0007.png', r'aaaaaaa…aaaaa\$0007.png')):
        title = misclassified_figure(wrong, [file], synsets, (0,) * 3, (1,) * 3).axes[0].get_title()
        assert title == f'crane n02012849, 90 %\nis tench\n{shown}'
