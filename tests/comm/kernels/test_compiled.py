"""The kernels compiled for an H100, which needs no GPU: they compile, move 16 bytes at a time, and round products."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("triton") is None:
    pytest.skip("needs Triton, which is made for Linux alone", allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from twohop.comm.kernels.segment_sum import _segment_sum
from twohop.comm.kernels.spread import _spread
from twohop.comm.kernels.weighted_spread import _weighted_spread

INDICES = {"children": "*i64", "offsets": "*i64", "weights": "*fp32", "d": "i32"}
CASES = {
    "spread": (_spread, {"rows": "*bf16", "copies": "*bf16"}, {}),
    "spread with a cast": (_spread, {"rows": "*fp32", "copies": "*bf16"}, {}),
    "sum": (_segment_sum, {"rows": "*bf16", "sums": "*bf16"}, {"WEIGHTED": False, "WIDE": tl.float32}),
    "weighted sum": (_segment_sum, {"rows": "*bf16", "sums": "*fp32"}, {"WEIGHTED": True, "WIDE": tl.float32}),
    "its backward": (
        _weighted_spread,
        {"grads": "*bf16", "rows": "*bf16", "grad_rows": "*bf16", "grad_weights": "*fp32"},
        {"WIDE": tl.float32},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_compiled_for_an_h100(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, rows, options = CASES[case]
    types, names = INDICES | rows, kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(key),): value for key, value in {"BLOCK": 1024, **options}.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in types},  # as D 4,096 has it
    )
    flags = {"enable_fp_fusion": False} if kernel is _segment_sum else {}  # as it is launched
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=flags).asm["ptx"]
    assert "ld.global.v4.b32" in ptx
    assert "st.global.v4.b32" in ptx
    assert not re.search(r"atom|red\.global", ptx)
    if kernel is _segment_sum:
        assert "add.rn.f32" in ptx
        assert "fma" not in ptx  # one product, rounded, then one addition
