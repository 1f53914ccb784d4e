"""The documents with generated tables, and the functions that make the tables."""
import re
from collections.abc import Callable
from pathlib import Path

from coatnet_train.report import accuracy, gpu, models, speed, weights
from coatnet_train.runtime.files import write_file

__all__ = ['SECTIONS', 'documents', 'render', 'update']

# Functions by the name of the markers around their tables, <!-- NAME --> and <!-- /NAME -->.
SECTIONS: dict[str, Callable[[Path], str]] = {
    function.__name__: function for function in (
        weights.released, weights.weights, weights.distilled, weights.previews,
        models.choices, models.models,
        accuracy.transfer, accuracy.small_data, accuracy.robustness, accuracy.ablation, accuracy.weight_init,
        accuracy.training, accuracy.demo,
        speed.speed, speed.inference_form, speed.runtimes, speed.scaling, speed.ops, speed.kernel_budgets, speed.loader,
        speed.budget, speed.make_times,
        gpu.ops_gpu, gpu.models_gpu, gpu.gpu_targets, gpu.gpu_checks)}


def documents(root: Path) -> list[Path]:
    """Paths of the documents: README.md, MODEL_CARD.md and docs/*.md."""
    return [root / 'README.md', root / 'MODEL_CARD.md', *sorted((root / 'docs').glob('*.md'))]


def render(text: str, root: Path) -> str:
    """Regenerate the tables between <!-- NAME --> and <!-- /NAME --> in `text` from the files under `root`."""
    for name, section in SECTIONS.items():
        pattern = re.compile(rf'(<!-- {name} -->\n).*?(<!-- /{name} -->)', re.DOTALL)
        if pattern.search(text):
            content = section(root)
            text = pattern.sub(lambda match, content=content: f'{match[1]}{content}\n{match[2]}', text)
    return text


def update(root: Path, write: bool = True) -> list[str]:
    """Rewrite the tables of all documents; returns the names of those that were stale.

    Args:
        root: Repository root.
        write: False leaves the files as they are.
    """
    stale = []
    for path in documents(root):
        old = path.read_text(encoding='utf-8')
        new = render(old, root)
        if new != old:
            stale.append(str(path.relative_to(root)))
            if write:
                write_file(path, lambda temporary, new=new: temporary.write_text(new, encoding='utf-8'))
    return stale
