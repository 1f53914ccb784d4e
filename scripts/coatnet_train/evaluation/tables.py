"""Tables of an evaluation: text for the console, and the files of --output and --results-file."""
import tempfile
from pathlib import Path

from accelerate import Accelerator
from timm.models import safe_model_name

from coatnet_train.evaluation.config import EvaluationSettings
from coatnet_train.evaluation.evaluator import Predictions, reliability
from coatnet_train.evaluation.imagenet_labels import LabelMap
from coatnet_train.plotting.plots import reliability_figure
from coatnet_train.runtime.cli import ConfigError, one_line
from coatnet_train.runtime.files import write_csv, write_figure, write_json
from coatnet_train.runtime.provenance import provenance

__all__ = ['format_corruptions', 'format_table', 'make_output_dirs', 'write_row']


def class_rows(predictions: Predictions, labels: LabelMap) -> list[dict]:
    """Accuracy of each class that has images, and the class that it is most often mistaken for."""
    rows = []
    for index in predictions.labels[predictions.labels >= 0].unique().tolist():
        top5 = predictions.top5[predictions.labels == index]
        wrong = top5[top5[:, 0] != index, 0]
        mistaken = int(wrong.mode().values) if len(wrong) else None
        rows.append({
            'class': labels.names[index], 'description': labels.descriptions[index], 'logit': index,
            'images': len(top5), 'top1': round(100 * (len(top5) - len(wrong)) / len(top5), 4),
            'top5': round(100 * (top5 == index).any(1).double().mean().item(), 4),
            'mistaken_for': '' if mistaken is None else labels.names[mistaken],
            'times': 0 if mistaken is None else int((wrong == mistaken).sum())})
    return rows


def format_table(rows: list[dict]) -> str:
    """Format the rows as a table of aligned text."""
    def text(value: object, digits: int) -> str:
        return '-' if value is None else f'{value:.{digits}f}'

    columns = {'model': [row['model'] + (f' {row["checkpoint"]}' if row['checkpoint'] else '') for row in rows]}
    for title, name, digits in (
            ('images', 'images', 0), ('top-1 %', 'top1', 3), ('top-5 %', 'top5', 3), ('loss', 'loss', 4),
            ('ECE %', 'ece', 2), ('mCE %', 'mce', 2), ('images/s', 'images_per_second', 1), ('size', 'img_size', 0),
            ('crop', 'crop_pct', 3), ('M params', 'param_count', 2)):
        if name in rows[0]:
            columns[title] = [text(row[name], digits) for row in rows]
    width = {title: max(map(len, [title, *cells])) for title, cells in columns.items()}
    lines = [{title: title for title in columns}, *(dict(zip(columns, cells, strict=True))
                                                    for cells in zip(*columns.values(), strict=True))]
    return '\n'.join('  '.join(
        f'{cell:<{width[title]}}' if title == 'model' else f'{cell:>{width[title]}}' for title, cell in line.items())
        for line in lines)


def format_corruptions(row: dict) -> str:
    """Format the top-1 errors (%) of each corruption and their mean, with a note on the means in the table."""
    lines = [f'{row["model"]}: top-1 error (%) at each severity, and its mean']
    for corruption, errors in row['corruptions'].items():
        mean = sum(errors.values()) / len(errors)
        lines.append('  '.join([f'{corruption:<18}', *(f'{error:6.2f}' for error in errors.values()), f'{mean:8.2f}']))
    lines.append('the table has the mean over all folders' if row['mce'] is not None else
                 'the table has the mean over all folders; mCE takes all 15 corruptions at 5 severities')
    return '\n'.join(lines)


def write_results(path: Path, rows: list[dict], device: str) -> None:
    """Write rows as timm's validate.py does: CSV, or JSON (one dict or a list) with the provenance added."""
    if path.suffix == '.csv':
        write_csv(path, [{name: value for name, value in row.items() if name != 'corruptions'} for row in rows])
        return
    origin = provenance(device)
    content = [{**row, 'provenance': origin} for row in rows]
    write_json(path, content[0] if len(content) == 1 else content)


def make_output_dirs(settings: EvaluationSettings) -> None:
    """Make the output folders; raises ConfigError for one that cannot be written, before hours of evaluation."""
    try:
        for path in (settings.output and Path(settings.output), settings.results_file and
                     Path(settings.results_file).parent):
            if path:
                path.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ConfigError(f'--output or --results-file cannot be written: {one_line(error)}; '
                          f'choose another.') from error


def write_row(settings: EvaluationSettings, rows: list[dict], predictions: Predictions, labels: LabelMap,
              accelerator: Accelerator) -> None:
    """Write the requested files after each row, so that nothing is lost if a later one fails."""
    row = rows[-1]
    try:
        if settings.output:
            folder = Path(settings.output) / '_'.join(filter(None, (
                safe_model_name(row['model']), safe_model_name(row['checkpoint'], remove_source=False))))
            folder.mkdir(parents=True, exist_ok=True)
            write_csv(folder / 'classes.csv', class_rows(predictions, labels))
            title = f'{row["model"]}\n{row["images"]} images, ECE {row["ece"]:.2f} %'
            write_figure(folder / 'reliability.png', reliability_figure(reliability(predictions), title))
            if errors := row.get('corruptions'):
                write_csv(folder / 'corruptions.csv', [
                    {'corruption': corruption, 'severity': severity, 'top1_err': error}
                    for corruption, severities in errors.items() for severity, error in severities.items()])
        if settings.results_file:
            write_results(Path(settings.results_file), rows, accelerator.device.type)
    except OSError as error:
        raise ConfigError(f'--output or --results-file cannot be written: {one_line(error)}; '
                          f'choose another.') from error
