"""Defaults, progress bars and error checks that all scripts share, without torch."""
import io
import os
from pathlib import Path

import pytest

from coatnet_train.data.config import DataSettings, default_workers
from coatnet_train.runtime.cli import ConfigError, check_output
from coatnet_train.runtime.progress import progress_bar
from support.constants import ROOT


@pytest.mark.parametrize(('cores', 'processes', 'workers'), [(1, 1, 1), (2, 1, 2), (64, 1, 4), (8, 4, 2), (2, 8, 1)])
def test_workers_are_at_most_the_cores_of_a_process(monkeypatch, cores, processes, workers):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))
    assert default_workers() == DataSettings().workers == workers
    monkeypatch.delattr(os, 'sched_getaffinity')
    monkeypatch.setattr(os, 'cpu_count', lambda: cores)
    assert default_workers() == workers
    assert DataSettings(workers=9).workers == 9  # an explicit number has no limit


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_are_drawn_on_terminals_alone(capsys):
    for file, quiet, drawn in ((Terminal(), False, True), (Terminal(), True, False), (io.StringIO(), False, False)):
        bar = progress_bar(range(3), quiet, file=file, desc='reading')
        assert [*bar] == [0, 1, 2] and ('reading' in file.getvalue()) == drawn, (file, quiet)
        bar.write('a line')  # printed with or without a bar
        assert capsys.readouterr().out == 'a line\n'


def test_there_is_no_other_bar():
    others = [path.name for path in (ROOT / 'scripts').rglob('*.py') if 'tqdm(' in path.read_text()]
    assert others == ['progress.py']


def test_output_that_cannot_be_looked_up_is_refused(tmp_path):
    check_output(tmp_path / 'new' / 'run')
    (tmp_path / 'file').write_text('')
    check_output(tmp_path / 'file' / 'run')  # accepted here; making the folder fails later with the reason
    with pytest.raises(ConfigError, match=r'--output cannot be used: .*File name too long.*; choose another'):
        check_output(Path(tmp_path, 'x' * 300))
