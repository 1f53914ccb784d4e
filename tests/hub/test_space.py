"""hub/space: results against the model, several users at once, a real browser, and no requests to other hosts."""
import base64
import dataclasses
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_input_data_config

from coatnet_train.models.released import best_release
from coatnet_train.runtime.cli import ConfigError
from coatnet_train.training.run_dir import write_config
from support.commands import free_port
from support.constants import ROOT

gradio = pytest.importorskip('gradio', reason='gradio comes with the space extra')

import answer  # noqa: E402  imports gradio, or this file is skipped
import app  # noqa: E402  the same
import interface  # noqa: E402  the same

NAMES = ['tench', 'a <b>bold</b> class', 'n02102040', 'kite & co', 'fifth', 'sixth']
CPU = torch.device('cpu')
# hosts that Chromium itself contacts at each start, here without network; fonts and scripts of pages are not included
CHROMIUMS_OWN = re.compile(r'(?!fonts\.|ajax\.)([\w-]+\.)*(google|googleapis|gstatic|gvt1|gvt2)\.com')


def write_image(path: Path, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((96, 80)).save(path)
    return path


@pytest.fixture(scope='module')
def runs(tmp_path_factory) -> Path:
    """Run folders as finetune.py leaves them, with random weights: one of T stages, one of D stages."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('runs')
    for name in ('coatnet_pico_64', 'dynamicconvnet_pico_64'):
        model = timm.create_model(name, depths=(1, 1, 1, 1), num_classes=len(NAMES)).eval()
        torch.nn.init.normal_(model.get_classifier().weight)  # otherwise all six would be equally probable
        (folder / name).mkdir()
        write_config(folder / name / 'config.json', model, NAMES, resolve_input_data_config(model, {}))
        tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file(tensors, folder / name / 'model.safetensors')
    return folder


@pytest.fixture(scope='module')
def models(runs) -> dict[str, answer.Model]:
    return answer.open_models(tuple(f'local-dir:{run}' for run in sorted(runs.iterdir())), (), CPU)


def expected(run: Path, image_path: Path) -> dict[str, float]:
    """Name and probability of each class, highest first, by timm alone."""
    model = timm.create_model(f'local-dir:{run}', pretrained=True).eval()
    image = create_transform(**resolve_input_data_config(model, {}))(Image.open(image_path).convert('RGB'))
    with torch.no_grad():
        shares = model(image[None])[0].softmax(-1)
    words = {'n02102040': 'English springer'}
    order = shares.argsort(descending=True).tolist()
    return {words.get(NAMES[i], NAMES[i]): shares[i].item() for i in order}


# Without a server


def test_guesses_and_panels_of_each_letter(models, runs, tmp_path):
    image_path = write_image(tmp_path / 'image.png')
    for title, titles, letter in (
            ('coatnet_pico_64', ['Where all positions look'], 'T'),
            ('dynamicconvnet_pico_64', ['Kernels predicted at positions', 'How far the kernels look'], 'D')):
        given = answer.answer(models[title], Image.open(image_path))
        assert given.top5 == pytest.approx(dict(list(expected(runs / title, image_path).items())[:5]), abs=1e-5)
        shown = [(panel.stage, panel.title) for panel in given.panels]
        assert shown == [*((f'Stage {stage} · {letter}', words) for stage in (3, 4) for words in titles),
                         ('Before the head', f'Grad-CAM of {next(iter(given.top5))}')]
        assert given.milliseconds > 0 and given.seen.size == (448, 448)
        assert all(panel.png.startswith(b'\x89PNG') for panel in given.panels)


def test_a_click_is_a_share_of_the_image(models):
    model = models['coatnet_pico_64']
    assert answer.position_in_image(model, (0, 447)) == pytest.approx((0.5 / 448, 447.5 / 448))
    assert answer.position_in_image(model, (-9, 900)) == (0, 1)


def test_two_classes_of_one_word_are_told_apart(models, tmp_path):
    labels = [answer.Label(f'n{number}', 'crane, bird') for number in range(len(NAMES))]
    model = dataclasses.replace(models['coatnet_pico_64'], labels=labels)
    top5 = answer.answer(model, Image.open(write_image(tmp_path / 'image.png'))).top5
    assert len(top5) == 5 and all(re.fullmatch(r'n\d  crane, bird', name) for name in top5)


def test_refusals_of_models(runs, tmp_path, monkeypatch):
    run = f'local-dir:{runs / "coatnet_pico_64"}'
    with pytest.raises(ConfigError, match='two models of one title, got coatnet_pico_64 twice'):
        answer.open_models((run, run), (), CPU)
    monkeypatch.setattr(app, 'released_models', lambda: ())
    with pytest.raises(ConfigError, match='--model must name at least one model where none are released'):
        app.choose_models(app.AppSettings(), tmp_path)
    shutil.copytree(runs / 'coatnet_pico_64', tmp_path / 'digits')
    assert app.choose_models(app.AppSettings(), tmp_path) == (f'local-dir:{tmp_path / "digits"}',)
    monkeypatch.setattr(app, 'released_models', lambda: ('coatnet_pico_64.tin200',))
    assert app.choose_models(app.AppSettings(), tmp_path)[0] == 'coatnet_pico_64.tin200'
    assert app.choose_models(app.AppSettings(model=('resnet18',)), tmp_path) == ('resnet18',)
    assert next(iter(answer.open_models(
        (f'local-dir:{tmp_path / "digits"}',), (), CPU))) == 'coatnet_pico_64 · digits'


def test_a_release_is_opened_with_its_weights_and_others_are_called_random(monkeypatch):
    opened = []
    known = answer.open_classifier(answer.ModelSettings(model='coatnet_pico_64'))
    monkeypatch.setattr(answer, 'open_classifier', lambda settings: opened.append(settings) or known)
    models = answer.open_models(('a.tag', 'coatnet_pico_64'), ('a.tag',), CPU)
    assert models['coatnet_pico_64'].weights == interface.RANDOM
    assert [settings.pretrained for settings in opened] == [True, False]


def test_words_of_others_are_shown_and_not_run(models):
    panel = answer.Panel('Stage 1', 'Grad-CAM of <img src=x onerror=alert(1)>', '"a" & b', b'')
    html = interface.show_panels(models['coatnet_pico_64'], answer.Answer({}, None, [panel], 1.0), None)
    assert '<img src=x' not in html and 'of &lt;img src=x onerror=alert(1)&gt;' in html and '"a"' not in html
    assert '<script>' not in interface.show_messages(['<script>'], 'note')


def test_facts_are_of_the_model_and_of_this_request(models):
    facts = interface.show_facts(models['dynamicconvnet_pico_64'], answer.Answer({}, None, [], 12.34))
    count = sum(p.numel() for p in models['dynamicconvnet_pico_64'].network.parameters())
    for words in (f'{count / 1e6:.2f} M', '64 x 64 pixels', 'L L D D', '12.3 ms', 'measured on this request'):
        assert words in facts


def test_old_files_are_deleted_and_new_ones_kept(tmp_path, monkeypatch):
    old, new = tmp_path / 'a' / 'old.png', tmp_path / 'b' / 'new.png'
    for file in (old, new):
        file.parent.mkdir()
        file.write_bytes(b'x')
    os.utime(old, (time.time() - interface.KEPT - 5,) * 2)
    interface.delete_old(tmp_path)
    assert not old.exists() and new.exists()


# With gradio's own client


@pytest.fixture(scope='module')
def client_server(models, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('GRADIO_TEMP_DIR', str(tmp_path_factory.mktemp('uploads')))
        page = interface.build_page(models)
        _, url, _ = interface.serve(page, prevent_thread_lock=True, quiet=True)
        yield url
        page.close(verbose=False)


@pytest.fixture
def connect(client_server):
    from gradio_client import Client, handle_file
    client = Client(client_server, verbose=False)
    return lambda title, file: client.submit(title, handle_file(str(file)), api_name='/predict')


@pytest.mark.slow
def test_several_users_wait_in_a_queue_and_get_their_own(connect, models, runs, tmp_path, monkeypatch):
    inside, most, asked = [], [], []
    real, connection = answer.answer, socket.socket.connect

    def watched(*args):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.2)
        given = real(*args)
        inside.pop()
        return given

    def watch(self, address):
        asked.append(address)
        return connection(self, address)

    monkeypatch.setattr(interface, 'answer', watched)
    monkeypatch.setattr(socket.socket, 'connect', watch)
    image_paths = [write_image(tmp_path / f'{seed}.png', seed) for seed in range(4)]
    titles = [list(models)[number % 2] for number in range(4)]
    jobs = [connect(title, image_path) for title, image_path in zip(titles, image_paths, strict=True)]
    for job, title, image_path in zip(jobs, titles, image_paths, strict=True):
        message, _, top5, facts, panels = job.result(timeout=60)
        found = {entry['label']: entry['confidence'] for entry in top5['confidences']}
        assert found == pytest.approx(dict(list(expected(runs / title, image_path).items())[:5]), abs=1e-5)
        assert message == '' and 'measured on this request' in facts and panels.count('<figure>') in (3, 5)
    assert len(most) == 4 and max(most) == 1
    assert {address[0] for address in asked if isinstance(address, tuple)} <= {'127.0.0.1', 'localhost'}


def test_bad_files_get_a_sentence_and_no_results(connect, models, tmp_path, capfd):
    file = tmp_path / 'notes.png'
    file.write_text('these are my notes')
    result = connect(next(iter(models)), file).result(timeout=60)
    assert 'class="refusal" role="alert">This is not an image that can be read' in result[0]
    assert not any(result[1:])
    assert 'Traceback' not in capfd.readouterr().err


def test_what_is_too_large_is_refused_while_it_comes(connect, models, tmp_path):
    (tmp_path / 'large.png').write_bytes(bytes(interface.MAX_BYTES + 1))
    with pytest.raises(Exception, match=r'413|[Ss]ize'):
        connect(next(iter(models)), tmp_path / 'large.png').result(timeout=60)


def test_files_of_the_server_cannot_be_asked_for(client_server, models, tmp_path):
    """The request is made by hand, because gradio's client would upload the file first."""
    def ask(file: dict) -> str:
        body = json.dumps({'data': [next(iter(models)), {**file, 'meta': {'_type': 'gradio.FileData'}}]}).encode()
        call = f'{client_server}gradio_api/call/predict'
        with urlopen(Request(call, body, {'Content-Type': 'application/json'}), timeout=30) as answered:
            event = json.load(answered)['event_id']
        with urlopen(f'{call}/{event}', timeout=30) as answered:
            return answered.read().decode()

    told = ask({'path': str(write_image(tmp_path / 'private.png'))})
    assert 'event: error' in told and 'Best' not in told and 'figure' not in told


# In a browser, from the folder that is pushed


@pytest.fixture(scope='module')
def space(runs, tmp_path_factory):
    """The Space's folder as built by make, served by its own app.py without access to the rest of the checkout."""
    if not shutil.which('make'):
        pytest.skip('make is not installed')
    folder = tmp_path_factory.mktemp('pushed') / 'space'
    subprocess.run(['make', '-s', 'space-folder', f'SPACE={folder}', f'RUN={runs / "coatnet_pico_64"}'], check=True,
                   cwd=ROOT)
    shutil.copytree(runs / 'dynamicconvnet_pico_64', folder / 'models' / 'dynamicconvnet_pico_64')
    port = free_port()
    environment = {key: value for key, value in os.environ.items() if key not in ('PYTHONPATH', 'GRADIO_SERVER_NAME')}
    server = subprocess.Popen(
        [sys.executable, 'app.py', '--port', str(port), '--device', 'cpu'], cwd=folder, text=True,
        env={**environment, 'PYTHONDONTWRITEBYTECODE': '1', 'TMPDIR': str(folder.parent)}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    said = []
    threading.Thread(target=lambda: said.extend(server.stdout), daemon=True).start()
    deadline = time.monotonic() + 120
    while not any('Running on local URL' in line for line in said):
        assert server.poll() is None and time.monotonic() < deadline, ''.join(said)
        time.sleep(0.2)
    yield f'http://127.0.0.1:{port}', said
    server.kill()
    server.wait()


@pytest.fixture(scope='module')
def chromium():
    playwright = pytest.importorskip('playwright.sync_api', reason='playwright comes with the test extra')
    path = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not path:
        pytest.skip('no Chromium is installed: apt-get install chromium')
    with playwright.sync_playwright() as running:
        yield lambda log: running.chromium.launch(executable_path=path, args=[
            '--no-sandbox', '--disable-gpu', f'--log-net-log={log}',
            '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1'])


def frame_of(image) -> tuple[float, float]:
    """Centre of the cyan frame in a panel, as fractions of the image's width and height."""
    url = image.evaluate('''async image => { await image.decode();
        const canvas = document.createElement('canvas');
        canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
        canvas.getContext('2d').drawImage(image, 0, 0);
        return canvas.toDataURL('image/png') }''')
    shown = Image.open(io.BytesIO(base64.b64decode(url.partition(',')[2])))
    pixels = np.array(shown.convert('RGBA'), dtype=np.int16)
    rows, columns = np.nonzero((np.abs(pixels - (34, 211, 238, 255)) < 30).all(-1))
    filled = pixels[..., 3] == 255
    # the image is the opaque part; the colour bar at its right is separate
    across = np.flatnonzero(filled[filled.shape[0] // 2])
    width = across[np.flatnonzero(np.diff(across, append=across[-1] + 9) > 1)[0]] + 1
    return (rows.min() + rows.max()) / 2 / filled.shape[0], (columns.min() + columns.max()) / 2 / width


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize(
    ('width', 'height', 'scheme'), [(390, 844, 'dark'), (1280, 900, 'light')], ids=['phone', 'desk'])
def test_a_visit(width, height, scheme, space, chromium, runs, tmp_path):
    url, said = space
    image_path = write_image(tmp_path / 'image.png', 3)
    (tmp_path / 'notes.jpg').write_text('these are my notes')
    browser = chromium(tmp_path / 'network.json')
    context = browser.new_context(
        viewport={'width': width, 'height': height}, color_scheme=scheme, has_touch=width < 500)
    page, asked, errors = context.new_page(), [], []
    context.on('request', lambda request: asked.append(request.url))
    page.on('pageerror', lambda error: errors.append(str(error)))
    page.goto(url)
    upload = page.locator('#file input[type=file]')
    upload.wait_for(state='attached')

    def fits() -> bool:
        return page.evaluate('document.documentElement.scrollWidth') <= width

    # small text is legible: WCAG requires a contrast of 4.5
    shades = page.evaluate('''() => [getComputedStyle(document.querySelector('.hint')).color,
        getComputedStyle(document.body).backgroundColor]''')
    least, most = sorted(float(np.dot([.2126, .7152, .0722], [
        (int(value) / 255 / 12.92 if int(value) < 11 else ((int(value) / 255 + .055) / 1.055) ** 2.4)
        for value in re.findall(r'\d+', shade)[:3]])) for shade in shades)
    assert (most + .05) / (least + .05) > 4.5, shades

    # a bad file gives an error message
    upload.set_input_files(tmp_path / 'notes.jpg')
    refusal = page.get_by_role('alert').filter(has_text='not an image')
    refusal.wait_for()
    assert not page.locator('#results').is_visible() and fits()
    page.screenshot(path=tmp_path / 'refused.png')
    page.locator('#file').get_by_role('button', name=re.compile('clear|remove', re.I)).first.click()
    refusal.wait_for(state='detached')

    # a good file gives the prediction of the chosen model
    upload.set_input_files(image_path)
    page.locator('.panels img').first.wait_for()
    assert page.get_by_label('Model').input_value() == best_release()
    page.get_by_label('Model').click()
    page.get_by_role('option', name='dynamicconvnet_pico_64', exact=True).click()
    best, share = next(iter(expected(runs / 'dynamicconvnet_pico_64', image_path).items()))
    page.locator('#top5').get_by_text(best).first.wait_for()
    page.get_by_text('Kernels predicted at positions').first.wait_for()
    top5 = page.locator('#top5').inner_text()
    assert best in top5 and f'{100 * share:.0f}%' in top5.replace(' ', '')
    assert 'ms' in page.locator('#facts').inner_text() and fits()
    assert page.locator('.panels img').count() == 5

    # a click shows the kernel at that position, with a frame there
    seen = page.locator('#seen img')
    seen.scroll_into_view_if_needed()
    box = seen.bounding_box()
    where = {'x': 0.80 * box['width'], 'y': 0.30 * box['height']}
    (page.tap if width < 500 else page.click)('#seen img', position=where)
    page.get_by_text('Kernel predicted at the frame').first.wait_for()
    first = page.locator('.panels img').first  # stage 3: 8 x 8 positions
    row, column = frame_of(first)
    assert (int(row * 8), int(column * 8)) == (int(0.30 * 8), int(0.80 * 8))
    page.wait_for_timeout(300)  # for the colours to settle
    page.screenshot(path=tmp_path / 'visit.png', full_page=True)
    assert Image.open(tmp_path / 'visit.png').width == width and fits() and errors == []

    browser.close()
    assert {re.match(r'(https?://[^/]+)?', address)[0] for address in asked
            if not address.startswith(('data:', 'blob:'))} == {url}
    log = json.loads((tmp_path / 'network.json').read_text())
    hosts = set()
    for event in log['events']:
        for value in (event.get('params') or {}).values():
            hosts |= set(re.findall(r'(?:https?|wss?)://([\w.-]+)', value)) if isinstance(value, str) else set()
    assert '127.0.0.1' in hosts
    assert [host for host in hosts if host != '127.0.0.1' and not CHROMIUMS_OWN.fullmatch(host)] == []
    assert 'Traceback' not in ''.join(said)
