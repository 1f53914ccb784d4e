"""model.onnx for onnxruntime and model.pt2 for torch.export.load: the same model, for any batch size."""
import io
import json
import zipfile
from pathlib import Path

import torch
from torch import nn

from coatnet_train.runtime.cli import ConfigError, one_line
from coatnet_train.runtime.files import write_file

__all__ = ['check_no_pickles', 'onnx_answers', 'write_onnx_files']


def write_onnx_files(folder: Path, model: nn.Module, images: torch.Tensor) -> None:
    """Write both files for a model on a CPU.

    Args:
        folder: Folder for the files.
        model: Model in eval mode.
        images: Example (N, C, H, W) in float32, N above 1; fixes C, H and W but not N.

    Raises ConfigError if a file cannot be written, or would hold pickled data.
    """
    from onnx_ir.traversal import RecursiveGraphIterator  # comes with onnxscript, which torch.onnx needs

    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
        onnx = torch.onnx.export(program, (images,), input_names=['input'], output_names=['logits'], dynamo=True,
                                 verbose=False)
    for node in RecursiveGraphIterator(onnx.model.graph):  # also in the bodies of loops
        node.metadata_props.clear()  # holds local paths
    for node in program.graph.nodes:
        node.meta.pop('stack_trace', None)  # holds local paths too
    program.example_inputs = None  # would be pickled
    try:
        torch.export.save(program, archive := io.BytesIO())  # to a buffer, as a path must end in .pt2
        write_file(folder / 'model.pt2', lambda temporary: temporary.write_bytes(archive.getvalue()))
        write_file(folder / 'model.onnx', lambda temporary: onnx.save(temporary, external_data=False))
    except ValueError as error:
        raise ConfigError(f'--with-onnx: a file cannot be written: {one_line(error)}; leave it out.') from error
    try:
        check_no_pickles(folder / 'model.pt2')
    except ConfigError as error:
        raise ConfigError(f'--with-onnx: torch {torch.__version__} writes pickled data into model.pt2, which no '
                          f'release holds; use a newer torch, or leave it out.') from error


def check_no_pickles(path: Path) -> None:
    """Raise ConfigError for a model.pt2 with pickled data, because loading a pickle can run any code."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        configs = [json.loads(content)['config'] for name, content in members.items() if name.endswith('_config.json')]
        pickled = [name for name, content in members.items() if name.endswith(('.pt', '.pkl')) and content]
        pickled += [name for config in configs for name, entry in config.items() if entry['use_pickle'] is not False]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ConfigError(f'{path.name} cannot be read: {one_line(error)}; export anew.') from error
    if pickled:
        raise ConfigError(f'{path.name} must hold no pickled data, but {", ".join(pickled[:3])} is; export anew.')


def onnx_answers(folder: Path, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits (N, classes) of both files for images (N, C, H, W), by reader; 'onnxruntime' only if it is installed."""
    with torch.no_grad():
        answers = {'torch.export': torch.export.load(folder / 'model.pt2').module()(images)}
    try:
        import onnxruntime
    except ImportError:
        return answers
    session = onnxruntime.InferenceSession(folder / 'model.onnx', providers=['CPUExecutionProvider'])
    return answers | {'onnxruntime': torch.from_numpy(session.run(None, {'input': images.numpy()})[0])}
