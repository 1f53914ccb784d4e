"""Run a script on CPUs with FSDP: accelerate shards on GPUs only, so it takes the CPU processes for GPUs.

    accelerate launch --config_file scripts/launch/fsdp.yaml tests/support/fake_multi_gpu.py scripts/finetune.py …
"""
import runpy
import sys
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import DistributedType

plain_init = PartialState.__init__


def init(self: PartialState, *args: object, **kwargs: object) -> None:
    plain_init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = init
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name='__main__')
