"""Public weights of keras_cv_attention_models (kecam): its .h5 files, and every step of download and conversion.

`kecam/` holds a small CoAtNet with random weights, written by kecam as both kinds of .h5 file, and kecam's outputs for
it (`coatnet_tiny_reference.npz`).
"""
import dataclasses
import hashlib
import logging
import math
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors import safe_open
from timm.models import _registry
from timm.utils import reparameterize_model
from torch.utils.flop_counter import FlopCounterMode

import coatnet_zoo
from coatnet_zoo import kecam
from coatnet_zoo.blocks.transformer import RelativeAttention2d
from coatnet_zoo.models import Backbone, BackboneCfg
from support.keras_files import keras_weights, write_keras, write_published

h5py = pytest.importorskip('h5py', reason='h5py comes with the test extra')

FILES = Path(__file__).with_name('kecam')
NAME = 'coatnet_0_kecam.in1k'
TINY = BackboneCfg(depths=(1, 2, 2, 1), embed_dim=(64, 32, 64, 96), stem_width=32, **kecam.CHOICES)
TOLERANCE = 2e-5  # maximum difference of logits and maps between this package and Keras on TensorFlow


@pytest.fixture(scope='module')
def reference() -> dict[str, torch.Tensor]:
    with np.load(FILES / 'coatnet_tiny_reference.npz') as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def tiny(**options) -> Backbone:
    return Backbone(dataclasses.replace(TINY, **options), img_size=64, num_classes=10).eval()


@torch.no_grad()
def gaps(model: Backbone, reference: dict[str, torch.Tensor]) -> dict[str, float]:
    """Maximum difference of the logits, and of each of the five feature maps."""
    maps = model.forward_intermediates(reference['images'], intermediates_only=True)
    found = {'logits': model(reference['images']), **{f'map{i}': value for i, value in enumerate(maps)}}
    return {name: (value - reference[name]).abs().max().item() for name, value in found.items()}


# reading and computing as kecam does

@pytest.mark.parametrize('form', ['weights', 'model'])
def test_logits_and_maps_are_those_of_kecam(form, reference):
    model = tiny()
    model.load_state_dict(kecam.read_h5(FILES / f'coatnet_tiny_{form}.h5'))
    assert reference['logits'].std() > .1
    assert max(gaps(model, reference).values()) <= TOLERANCE, gaps(model, reference)
    folded = reparameterize_model(model)
    with torch.no_grad():
        assert (folded(reference['images']) - reference['logits']).abs().max() <= TOLERANCE


@pytest.mark.parametrize('options', [
    dict(pool='avg'), dict(se_act='silu'), dict(conv_stride='expand'), dict(act='gelu_tanh'), dict(conv_norm_eps=1e-3),
    dict(norm_eps=1e-6), dict(rel_bias='post')], ids=str)
def test_each_wrong_choice_shows(options, reference):
    model = tiny(**options)
    model.load_state_dict(kecam.read_h5(FILES / 'coatnet_tiny_weights.h5'))
    assert gaps(model, reference)['logits'] > TOLERANCE


def test_a_head_norm_a_flipped_table_and_mixed_heads_show(reference):
    state = kecam.read_h5(FILES / 'coatnet_tiny_weights.h5')
    normed = tiny(head_norm='layer')
    normed.load_state_dict(state, strict=False)
    assert gaps(normed, reference)['logits'] > TOLERANCE
    model = tiny()
    flipped = {key: value.flip(1, 2) if key.endswith('table') else value for key, value in state.items()}
    model.load_state_dict(flipped)
    assert gaps(model, reference)['logits'] > TOLERANCE
    mixed = {key: value.unflatten(0, (-1, 3, 32)).transpose(0, 1).flatten(0, 2) if key.endswith('qkv.weight') else value
             for key, value in state.items()}
    model.load_state_dict(mixed)
    assert gaps(model, reference)['logits'] > TOLERANCE


def test_names_of_kecams_torch_backend_are_known(tmp_path):
    """kecam's torch backend writes weight, bias and running_* without ':0', with the same order of axes."""
    renamed = {'kernel:0': 'weight', 'depthwise_kernel:0': 'weight', 'gamma:0': 'weight', 'beta:0': 'bias',
               'bias:0': 'bias', 'moving_mean:0': 'running_mean', 'moving_variance:0': 'running_var',
               'positional_embedding:0': 'positional_embedding'}
    weights = {f'{layer}/{renamed[name.rpartition("/")[2]]}': value
               for name, value in keras_weights(FILES / 'coatnet_tiny_weights.h5').items()
               for layer in [name.rpartition('/')[0]]}
    write_keras(tmp_path / 'torch.h5', weights)
    found, expected = kecam.read_h5(tmp_path / 'torch.h5'), kecam.read_h5(FILES / 'coatnet_tiny_weights.h5')
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


# files that are refused

def changed(path: Path, **changes: np.ndarray | None) -> Path:
    """The fixture with tensors replaced, added or (None) left out."""
    weights = {**keras_weights(FILES / 'coatnet_tiny_weights.h5'),
               **{name.replace('__', '/'): value for name, value in changes.items()}}
    write_keras(path, {name: value for name, value in weights.items() if value is not None})
    return path


@pytest.mark.parametrize('content,message', [
    (b'', 'could not be read as a Keras .h5 file: it is truncated or something else'),
    (b'a web page', 'could not be read as a Keras .h5 file'),
    ((FILES / 'coatnet_tiny_weights.h5').read_bytes()[:500_000], 'could not be read as a Keras .h5 file'),
], ids=['empty', 'foreign', 'truncated'])
def test_files_that_are_no_keras_files(content, message, tmp_path):
    path = tmp_path / 'some.h5'
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match=message):
        kecam.read_h5(path)


def test_files_of_other_architectures_are_refused_with_the_reason(tmp_path):
    with h5py.File(tmp_path / 'plain.h5', 'w') as file:
        file['table'] = np.zeros(3)
    with pytest.raises(RuntimeError, match='without weights of Keras: no group has weight_names'):
        kecam.read_h5(tmp_path / 'plain.h5')
    kernel = np.zeros((1, 1, 4, 4), np.float32)
    with pytest.raises(RuntimeError, match=r'no CoAtNet of kecam .* 1 tensors of other layers: stack_9_conv/kernel'):
        kecam.read_h5(changed(tmp_path / 'layer.h5', **{'stack_9_conv__kernel:0': kernel}))
    with pytest.raises(RuntimeError, match=r'must be \(heads, n \* n\) with n odd'):
        kecam.read_h5(changed(tmp_path / 'table.h5', **{
            'stack_4_block_1_mhsa_pos_emb__positional_embedding:0': np.zeros((2, 15), np.float32)}))


def test_widths_by_kecams_own_rules_are_refused(tmp_path):
    """Rejected are squeeze widths rounded to 8, as for 80 input channels, and a needless shortcut projection."""
    with pytest.raises(RuntimeError, match=r'squeeze widths are no single fraction of the input widths .* 8, this'):
        kecam.read_h5(changed(tmp_path / 'squeeze.h5', **{
            'stack_2_block_2_se_1_conv__kernel:0': np.zeros((1, 1, 128, 16), np.float32)}))
    with pytest.raises(RuntimeError, match=r'stages\.1\.blocks\.0\.shortcut\.proj\.weight projects 64 channels to as'):
        kecam.read_h5(changed(tmp_path / 'shortcut.h5', **{
            'stack_2_block_1_shortcut_conv__kernel:0': np.zeros((1, 1, 64, 64), np.float32)}))


@pytest.mark.parametrize('shape', [(), (64,)], ids=str)
def test_tensors_of_too_few_dimensions_are_refused(tmp_path, shape):
    with pytest.raises(RuntimeError, match=r'shortcut\.h5 is no CoAtNet of kecam that can be converted: '):
        kecam.read_h5(changed(tmp_path / 'shortcut.h5', **{
            'stack_2_block_1_shortcut_conv__kernel:0': np.zeros(shape, np.float32)}))


@pytest.mark.parametrize('options', [{}, dict(flavor='timm')], ids=str)
def test_a_model_that_would_compute_something_else_is_refused(options):
    overlay = dict(file=str(FILES / 'coatnet_tiny_weights.h5'))
    with pytest.raises(RuntimeError, match="Create the model as coatnet_0_kecam, or with pool='max', se_act='act'"):
        timm.create_model('coatnet_0', pretrained=True, pretrained_cfg_overlay=overlay, **options)


# a published file, of full size but with random numbers

@pytest.fixture(scope='module')
def published(tmp_path_factory) -> Path:
    return write_published(tmp_path_factory.mktemp('published') / 'coatnet0_224_imagenet.h5')


@dataclass
class Server:
    """A file server on loopback that records requests and can cut a response short."""

    content: bytes
    cut: int | None = None  # bytes after which the next response ends
    status: int = 200
    ranges: bool = True  # whether it supports the Range header
    asked: list[str | None] = field(default_factory=list)  # Range header of each request
    url: str = ''


class Handler(BaseHTTPRequestHandler):
    disable_nagle_algorithm = True  # a body waits 40 ms behind its headers otherwise

    def __init__(self, state: Server, *args) -> None:
        self.state = state
        super().__init__(*args)

    def do_GET(self) -> None:
        state, wanted = self.state, self.headers.get('Range')
        state.asked.append(wanted)
        if state.status != 200:
            self.send_error(state.status)
            return
        begin = int(wanted[6:].partition('-')[0]) if wanted and state.ranges else 0
        body = state.content[begin:]
        if begin and not body:
            self.send_error(416)
            return
        self.send_response(206 if begin else 200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body if state.cut is None else body[:state.cut])
        state.cut = None

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(published, monkeypatch, tmp_path) -> Iterator[Server]:
    """A server of a random file, with its address and MD5 in place of the real ones in the package."""
    state = Server(published.read_bytes())
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Handler, state)) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        state.url = f'http://127.0.0.1:{http.server_port}/coatnet0_224_imagenet.h5'
        weights = kecam.KecamWeights(state.url, hashlib.md5(state.content).hexdigest())
        monkeypatch.setitem(kecam.WEIGHTS, NAME, weights)
        cfg = dataclasses.replace(_registry._model_pretrained_cfgs[NAME], url=state.url)
        monkeypatch.setitem(_registry._model_pretrained_cfgs, NAME, cfg)
        monkeypatch.setitem(_registry._model_default_cfgs['coatnet_0_kecam'].cfgs, 'in1k', cfg)
        monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
        yield state
        http.shutdown()


def in_cache(tmp_path: Path) -> list[str]:
    """Files in the cache, except for the lock file."""
    folder = tmp_path / 'hub/checkpoints'
    return sorted(path.name for path in folder.iterdir() if path.suffix != '.lock') if folder.is_dir() else []


def test_the_first_load_downloads_and_the_second_needs_nothing(server, published, tmp_path, monkeypatch):
    model = timm.create_model(NAME, pretrained=True)
    path = coatnet_zoo.verify_weights(NAME)
    assert kecam.is_cached(NAME) and not kecam.is_cached(f'{NAME}_160')
    assert in_cache(tmp_path) == [path.name, f'{path.name}.sha256'] and path.parent == tmp_path / 'hub/checkpoints'
    with safe_open(path, 'pt') as file:
        assert file.metadata()['source'] == server.url and file.metadata()['source_md5'] == kecam.WEIGHTS[NAME].md5
    expected = kecam.read_h5(published)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    cfg = model.pretrained_cfg
    assert cfg['mean'] == (0.485, 0.456, 0.406) and cfg['crop_pct'] == .95 and cfg['interpolation'] == 'bicubic'
    assert len(cfg['label_names']) == 1000 and cfg['label_descriptions'][cfg['label_names'][285]] == 'Egyptian cat'
    assert 'state_dict' not in cfg and cfg['url'] == server.url
    server.status = 500
    monkeypatch.setitem(sys.modules, 'h5py', None)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    again = timm.create_model('coatnet_0_kecam', pretrained=True, num_classes=10, in_chans=1, img_size=96)
    assert len(server.asked) == 1
    table = again.state_dict()['stages.2.blocks.0.attn.rel_bias.table']
    assert table.shape == (6, 11, 11) and again(torch.zeros(1, 1, 96, 96)).shape == (1, 10)
    pyramid = timm.create_model(NAME, pretrained=True, features_only=True, img_size=64)
    assert [level.shape[-1] for level in pyramid(torch.zeros(1, 3, 64, 64))] == [32, 16, 8, 4, 2]


def test_a_cut_download_goes_on_where_it_was_cut(server, tmp_path):
    server.cut = 1_000_000
    with pytest.raises(RuntimeError, match=rf'{NAME}: .* bytes came\); try again, and it goes on where it was cut\. '
                                           r'A file at hand loads by pretrained_cfg_overlay=dict\(file='):
        timm.create_model(NAME, pretrained=True)
    assert [name for name in in_cache(tmp_path) if not name.endswith('.h5.part')] == []
    timm.create_model(NAME, pretrained=True)
    assert server.asked == [None, 'bytes=1000000-'] and len(in_cache(tmp_path)) == 2


def test_a_server_without_ranges_gives_all_of_it_again(server, tmp_path):
    server.cut, server.ranges = 1_000_000, False
    with pytest.raises(RuntimeError, match='bytes came'):
        timm.create_model(NAME, pretrained=True)
    timm.create_model(NAME, pretrained=True)
    assert len(in_cache(tmp_path)) == 2


def test_a_download_that_was_complete_is_only_checked(server, published, tmp_path):
    """As if the process had died between the last byte and the rename."""
    path = kecam.cached_path(NAME)
    path.parent.mkdir(parents=True)
    shutil.copy(published, path.with_suffix('.h5.part'))
    timm.create_model(NAME, pretrained=True)
    assert server.asked == [f'bytes={published.stat().st_size}-'] and kecam.is_cached(NAME)


def test_processes_that_start_at_once_download_once(server, tmp_path):
    fetch = partial(kecam.fetch_weights, NAME, server.url, lambda state_dict: None)
    with ThreadPoolExecutor(3) as pool:
        paths = {task.result() for task in [pool.submit(fetch) for _ in range(3)]}
    assert paths == {kecam.cached_path(NAME)} and len(server.asked) == 1


def test_another_file_than_was_published_is_not_kept(server, tmp_path):
    server.content = b'something else'
    with pytest.raises(RuntimeError, match=r'file of 14 bytes whose MD5 is \w{32}, but its publisher states \w{32}'):
        timm.create_model(NAME, pretrained=True)
    assert in_cache(tmp_path) == []


@pytest.mark.parametrize('file,message', [
    ('coatnet_tiny_weights.h5', 'The converted weights do not fit coatnet_0_kecam: it has 10 classes'),
    ('coatnet_tiny_reference.npz', 'could not be read as a Keras .h5 file')], ids=['shapes', 'foreign'])
def test_a_file_that_does_not_fit_is_not_kept(file, message, server, tmp_path, monkeypatch):
    """A file with the recorded MD5 that still does not fit, which would be a mistake in this package."""
    server.content = (FILES / file).read_bytes()
    monkeypatch.setitem(kecam.WEIGHTS, NAME, kecam.KecamWeights(server.url, hashlib.md5(server.content).hexdigest()))
    with pytest.raises(RuntimeError, match=message):
        timm.create_model(NAME, pretrained=True)
    assert in_cache(tmp_path) == []


def test_what_the_server_refuses_is_said_with_the_way_out(server, tmp_path, monkeypatch):
    server.status = 404
    with pytest.raises(RuntimeError, match=r'the server answered 404 \(Not Found\)\. A file at hand loads by'):
        timm.create_model(NAME, pretrained=True)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(RuntimeError, match='not in the cache and HF_HUB_OFFLINE is set; go online once'):
        timm.create_model(NAME, pretrained=True)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    nobody = 'http://127.0.0.1:1/coatnet0_224_imagenet.h5'
    with pytest.raises(RuntimeError, match=r'could not be downloaded \(URLError: '):
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(url=nobody))
    with pytest.raises(FileNotFoundError, match=r"create_model\('coatnet_0_kecam\.in1k', pretrained=True\) downloads"):
        coatnet_zoo.verify_weights('coatnet_0_kecam')
    assert in_cache(tmp_path) == []


def test_without_h5py_nothing_is_downloaded(server, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'h5py', None)
    with pytest.raises(ModuleNotFoundError, match=r"h5py.* is not installed: pip install 'coatnet_zoo\[kecam\]'"):
        timm.create_model(NAME, pretrained=True)
    with pytest.raises(ModuleNotFoundError, match=r'coatnet_zoo\[kecam\]'):
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file=str(FILES / 'coatnet_tiny_model.h5')))
    assert server.asked == [] and in_cache(tmp_path) == []


def test_a_damaged_cache_is_not_loaded_and_the_way_out_works(server, tmp_path):
    timm.create_model(NAME, pretrained=True, cache_dir=tmp_path / 'here')
    path = coatnet_zoo.verify_weights(NAME, tmp_path / 'here')
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for load in (partial(coatnet_zoo.verify_weights, NAME, tmp_path / 'here'),
                 partial(timm.create_model, NAME, pretrained=True, cache_dir=tmp_path / 'here')):
        with pytest.raises(RuntimeError, match='is damaged and was not loaded: its sha256 is'):
            load()
    path.unlink()
    timm.create_model(NAME, pretrained=True, cache_dir=tmp_path / 'here')
    assert len(server.asked) == 2 and coatnet_zoo.verify_weights(NAME, tmp_path / 'here') == path


def test_a_conversion_that_was_killed_is_done_again(server, tmp_path):
    """The sha256 file is written last: without it the weights are not used."""
    timm.create_model(NAME, pretrained=True)
    path = coatnet_zoo.verify_weights(NAME)
    path.with_name(f'{path.name}.sha256').unlink()
    with pytest.raises(FileNotFoundError):
        coatnet_zoo.verify_weights(NAME)
    timm.create_model(NAME, pretrained=True)
    assert len(server.asked) == 2


def test_a_file_at_hand_loads_offline(published, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    overlay = dict(file=str(published))
    model = timm.create_model('coatnet_0_kecam', pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay)
    expected = kecam.read_h5(published)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items() if 'head' not in key)
    sizes = dict(img_size=384, features_only=True)
    pyramid = timm.create_model('coatnet_0_kecam', pretrained=True, pretrained_cfg_overlay=overlay, **sizes)
    assert pyramid.feature_info.channels() == [64, 96, 192, 384, 768]


def test_stages_of_another_block_type_start_afresh_and_are_named(published, caplog):
    """CCDD from CCTT weights: stem, S1 and S2 are loaded, S3 and S4 keep their initialisation."""
    overlay, expected = dict(file=str(published)), kecam.read_h5(published)
    torch.manual_seed(0)
    fresh = timm.create_model('coatnet_0_kecam', layout='CCDD').state_dict()
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING, 'coatnet_zoo'):
        model = timm.create_model('coatnet_0_kecam', layout='CCDD', pretrained=True, pretrained_cfg_overlay=overlay)
    assert caplog.messages == ['Not in the checkpoint and randomly initialised: stages.2 (D in place of T), '
                               'stages.3 (D in place of T).']
    for key, value in model.state_dict().items():
        source = fresh if key.startswith(('stages.2', 'stages.3')) else expected
        assert torch.equal(value, source[key]), key
    caplog.clear()
    timm.create_model('coatnet_0_kecam', layout='CCTT', pretrained=True, pretrained_cfg_overlay=overlay)
    assert caplog.messages == []
    with pytest.raises(RuntimeError, match='does not fit'):  # only an explicit layout keyword asks for a partial load
        timm.create_model('coatnet_0_ccdd', **kecam.CHOICES, pretrained=True, pretrained_cfg_overlay=overlay)


# the name

def test_the_name_is_listed_and_changes_no_other():
    assert {NAME, 'coatnet_0_kecam.in1k_160'} <= set(timm.list_models(pretrained=True))
    assert timm.create_model('coatnet_0', device='meta').cfg == BackboneCfg(depths=(2, 3, 5, 2))
    model = timm.create_model('coatnet_0_kecam', device='meta')
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 23.31
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model.eval()(torch.empty(1, 3, 224, 224, device='meta'))
    attention = sum(2 * math.prod(m.rel_bias.feat_size) ** 2 * m.num_heads * m.head_dim
                    for m in model.modules() if isinstance(m, RelativeAttention2d))
    assert (flops.get_total_flops() / 2 - attention) / 1e9 == pytest.approx(4.00, abs=.005)  # kecam counts only layers
    small = timm.create_model('coatnet_0_kecam.in1k_160', device='meta')
    assert model.img_size == (224, 224) and small.img_size == (160, 160)
    assert small.state_dict()['stages.3.blocks.0.attn.rel_bias.table'].shape == (12, 9, 9)


@pytest.mark.skipif('COATNET_ZOO_KECAM' not in os.environ, reason='needs COATNET_ZOO_KECAM=coatnet0_224_imagenet.h5')
def test_the_real_file_sees_a_cat():
    """The example of kecam's README: scikit-image's cat, resized bilinearly without antialiasing."""
    from skimage.data import chelsea
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file=os.environ['COATNET_ZOO_KECAM']))
    image = torch.from_numpy(chelsea()).movedim(-1, 0)[None] / 255
    image = torch.nn.functional.interpolate(image, (224, 224), mode='bilinear', antialias=False)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ('mean', 'std'))
    with torch.no_grad():
        scores = model.eval()((image - mean) / std).softmax(1)[0]
    assert abs(scores[285] - 0.99324566) < 1e-3 and abs(scores[282] - 0.00381939) < 1e-3
