"""scripts/launch/slurm.sh with stubs for the cluster's commands: only preempted jobs are requeued."""
import os
import signal
import stat
import subprocess
import time

import pytest

from support.constants import ROOT

SCRIPT = ROOT / 'scripts' / 'launch' / 'slurm.sh'
STAND_INS = {
    'scontrol': 'echo "$@" >> scontrol.log; echo node1',
    'srun': 'shift; exec "$@"',
    # saves for a moment after SIGTERM and exits with 1, as the real torchrun does when its workers are stopped
    'torchrun': 'echo "$@" > torchrun.log; trap "sleep 0.3; touch saved; exit 1" TERM; touch begun; eval "$BODY"',
}


@pytest.mark.parametrize(('body', 'term', 'code', 'requeued'), [
    ('exit 0', False, 0, False), ('exit 2', False, 2, False), ('while :; do sleep 0.05; done', True, 1, True)
],
    ids=['done', 'refused', 'preempted'])
def test_only_a_preempted_job_is_queued_again(tmp_path, body, term, code, requeued):
    for name, line in STAND_INS.items():
        (tmp_path / name).write_text(f'#!/usr/bin/env bash\n{line}\n')
        (tmp_path / name).chmod(stat.S_IRWXU)
    environment = {**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'BODY': body, 'SLURM_JOB_ID': '7',
                   'SLURM_NNODES': '1', 'SLURM_GPUS_ON_NODE': '2', 'SLURM_JOB_NODELIST': 'node[1-4]'}
    process = subprocess.Popen(['bash', SCRIPT, '--model', 'coatnet_1'], env=environment, cwd=tmp_path)
    deadline = time.monotonic() + 20
    while term and not (tmp_path / 'begun').exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    if term:
        process.send_signal(signal.SIGTERM)
    assert process.wait(20) == code
    assert (tmp_path / 'saved').exists() == term
    assert ('requeue 7' in (tmp_path / 'scontrol.log').read_text()) == requeued
    started = (tmp_path / 'torchrun.log').read_text()
    assert '--rdzv-endpoint node1:29500' in started
    assert started.endswith('finetune.py --model coatnet_1 --resume auto\n')
