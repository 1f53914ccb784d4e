"""The page: its layout, its request queue, and its server."""
import base64
import os
import time
from html import escape
from pathlib import Path

os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'  # before gradio is imported
os.environ['HF_HUB_DISABLE_TELEMETRY'] = '1'

import gradio as gr
import torch

from answer import Answer, Model, answer, position_in_image
from coatnet_train.explain.panels import RANDOM
from coatnet_train.runtime.cli import ConfigError
from upload import MAX_BYTES, MAX_PIXELS, read_upload

STYLE = Path(__file__).with_name('style.css')
SYSTEM_FONTS = ('system-ui', '-apple-system', 'Segoe UI', 'Roboto', 'Helvetica Neue', 'sans-serif')
MONO_FONTS = ('ui-monospace', 'Menlo', 'Consolas', 'monospace')
MAX_WAITING = 20  # maximum number of requests in the queue; further ones are rejected
KEPT = 3600  # seconds that uploads are kept; the next request deletes older ones
INTRODUCTION = '''
<h1>What does it see?</h1>
<p>Image classifiers of <b>coatnet_zoo</b>: convolution (C), attention (T), LightConv (L) and DynamicConv (D), stage by
stage. Drop an image and look inside.</p>'''
HINT = f'Any image, up to {MAX_BYTES // 2 ** 20} MiB and {MAX_PIXELS // 10 ** 6} million pixels.'


def show_messages(messages: list[str], kind: str) -> str:
    role = 'alert' if kind == 'refusal' else 'status'
    return ''.join(f'<p class="{kind}" role="{role}">{escape(message)}</p>' for message in messages)


def show_facts(model: Model, given: Answer) -> str:
    """HTML list of parameters, input size, stages, classes and inference time."""
    device = next(model.network.parameters()).device
    threads = torch.get_num_threads()
    where = 'CPU, 1 thread' if threads == 1 else f'CPU, {threads} threads'
    where = where if device.type == 'cpu' else torch.cuda.get_device_name(device)
    _, height, width = model.data_config['input_size']
    facts = {
        'Parameters': f'{sum(p.numel() for p in model.network.parameters()) / 1e6:.2f} M',
        'Input': f'{width} x {height} pixels', 'Stages': ' '.join(model.layout) or 'not of this zoo',
        'Classes': f'{len(model.labels):,}', 'Forward pass': f'{given.milliseconds:.1f} ms'}
    rows = ''.join(f'<div><dt>{name}</dt><dd>{escape(value)}</dd></div>' for name, value in facts.items())
    return (f'<dl class="facts">{rows}</dl><p class="measured">Time of one image, measured on this request: '
            f'{escape(where)}.</p>')


def show_panels(model: Model, given: Answer, at: tuple[float, float] | None) -> str:
    """HTML grid of the maps, with a hint about choosing a position."""
    hint = 'These stages have neither attention nor predicted kernels, only the last map of features.'
    if model.positions:
        descriptions = {'attention': 'where it looks', 'kernels': 'the kernels predicted there'}
        shows = ' and '.join(descriptions[kind] for kind in dict.fromkeys(target.kind for target in model.targets[:-1]))
        hint = f'Click {"another" if at else "a"} position of the image to see {shows}.'
    shown = []
    for panel in given.panels:
        source = base64.b64encode(panel.png).decode()
        shown.append(
            f'<figure><figcaption><small>{escape(panel.stage)}</small><b>{escape(panel.title)}</b>'
            f'<span>{escape(panel.subtitle)}</span></figcaption>'
            f'<img alt="{escape(f"{panel.title}: {panel.subtitle}")}" src="data:image/png;base64,{source}"></figure>')
    return f'<h2>What the stages looked at</h2><p class="hint">{hint}</p><div class="panels">{"".join(shown)}</div>'


def delete_old(folder: Path) -> None:
    """Delete files older than KEPT seconds; gradio's own delete_cache does not delete the images that it sends."""
    for file in folder.rglob('*'):
        if file.is_file() and time.time() - file.stat().st_mtime > KEPT:
            file.unlink(missing_ok=True)


def build_page(models: dict[str, Model]) -> gr.Blocks:
    """Build the page; requests wait in one queue, because a model handles one at a time."""

    def show(title: str, file: str | None, at: tuple[float, float] | None = None) -> tuple:
        """(message, results, seen, top5, facts, panels) for a file, or a message and no results."""
        delete_old(Path(page.GRADIO_CACHE))
        if not file:
            return '', gr.update(visible=False), None, None, '', ''
        model = models[title]
        try:
            image, notes = read_upload(Path(file))
        except ConfigError as error:
            return show_messages([str(error)], 'refusal'), gr.update(visible=False), None, None, '', ''
        if model.weights == RANDOM:
            notes.append(f'{RANDOM}.')
        given = answer(model, image, at)
        return (show_messages(notes, 'note'), gr.update(visible=True), given.seen, given.top5,
                show_facts(model, given), show_panels(model, given, at))

    def show_position(title: str, file: str | None, click: gr.SelectData) -> tuple:
        """The outputs of `show` for the position that was clicked in the image."""
        return show(title, file, at=position_in_image(models[title], click.index) if models[title].positions else None)

    with gr.Blocks(title='coatnet_zoo', analytics_enabled=False) as page:
        gr.HTML(INTRODUCTION, elem_id='introduction', padding=False)
        with gr.Row(equal_height=False):
            with gr.Column(min_width=280):
                title = gr.Dropdown(list(models), label='Model', elem_id='model')
            with gr.Column(min_width=280):
                file = gr.File(label='Image', type='filepath', height=150, elem_id='file')
                gr.HTML(f'<p class="hint">{HINT}</p>', padding=False)
        message = gr.HTML(elem_id='message', padding=False)
        with gr.Column(visible=False, elem_id='results') as results:
            with gr.Row(equal_height=False):
                with gr.Column(min_width=280):
                    seen = gr.Image(
                        label='What the model sees', format='png', interactive=False, buttons=[], elem_id='seen')
                with gr.Column(min_width=280):
                    top5 = gr.Label(label='Top-5 predictions', num_top_classes=5, elem_id='top5')
                with gr.Column(min_width=280):
                    facts = gr.HTML(elem_id='facts', padding=False)
            panels = gr.HTML(elem_id='panels', padding=False)
        outputs = [message, results, seen, top5, facts, panels]
        one_at_a_time = dict(concurrency_limit=1, concurrency_id='network', show_progress_on=[seen, message])
        gr.on([file.change, title.change], show, [title, file], outputs, api_name='predict', **one_at_a_time)
        seen.select(show_position, [title, file], outputs, api_visibility='private', **one_at_a_time)
    return page.queue(max_size=MAX_WAITING, api_open=False)


def serve(page: gr.Blocks, **options: object) -> tuple:
    """Call `Blocks.launch` with the style of this page, system fonts, no share link, and limited upload size."""
    theme = gr.themes.Base(primary_hue='blue', neutral_hue='slate', font=SYSTEM_FONTS, font_mono=MONO_FONTS,
                           radius_size='md').set(body_text_color_subdued='*neutral_500')  # 400 is faint on white
    return page.launch(
        theme=theme, css_paths=STYLE, max_file_size=MAX_BYTES, footer_links=[], share=False,
        ssr_mode=False, **options)
