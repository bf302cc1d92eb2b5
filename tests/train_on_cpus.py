"""Starts a script of timm's on several CPU processes: `torchrun ... train_on_cpus.py train.py ARGS`.

On the CPU, train.py hands DistributedDataParallel `device_ids`, which torch only takes for GPUs. They are dropped here,
and nothing else is changed.
"""
import runpy
import sys

from torch.nn.parallel import DistributedDataParallel

_init = DistributedDataParallel.__init__


def _init_without_device_ids(self, module, device_ids=None, **kwargs):
    _init(self, module, **kwargs)


if __name__ == '__main__':
    DistributedDataParallel.__init__ = _init_without_device_ids
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name='__main__')
