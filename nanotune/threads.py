"""Limits how long idle threads of PyTorch spin. Import it before torch.

On Linux, PyTorch's CPU threads are GNU OpenMP's. Between two operations a thread spins, waiting for
work, by default for milliseconds. While other programs use the CPU, spinning threads take time from
the threads that have work, and training can take ten times as long.
"""
import os

if "OMP_WAIT_POLICY" not in os.environ:
    # about 0.1 ms: longer than most gaps between operations, so an idle machine loses no speed
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
