"""The kernels in a process of their own, because Triton looks at TRITON_INTERPRET once; and the CPU, which has none."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from twohop.comm import Topology, build_dispatcher
from twohop.models.config import ModelConfig, MoEConfig
from twohop.models.moe import MoELayer

HERE = Path(__file__).parent


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which is made for Linux alone")
def test_kernels() -> None:
    env = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    files = [HERE / name for name in ("checks.py", "layer_checks.py")]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env=os.environ | env, cwd=HERE.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_cpu_needs_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("twohop.comm.kernels.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)  # whoever imports it fails
    config = ModelConfig(dim=16, ffn_dim=32, moe=MoEConfig(experts=[4], capacity_factor=1.0))
    layer = MoELayer(config, build_dispatcher("dedup", Topology.one_process(), 4))
    y_BTD, _ = layer(torch.randn(2, 8, 16, requires_grad=True))
    y_BTD.sum().backward()
    assert not [name for name in sys.modules if name.startswith("twohop.comm.kernels.")]
