"""What is found out about the machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensorflow as tf

from flowps.trainer.setup import multiplies_bfloat16


@pytest.mark.parametrize(
    ("flags", "gpus", "expected"),
    [
        ("fpu avx512f amx_bf16 avx512_fp16 amx_tile", [], True),
        ("fpu avx512f avx512_bf16", [], False),  # which is no faster than float32 in TensorFlow's hands
        ("fpu amx_bf16", ["a GPU"], False),
        (None, [], False),
    ],
)
def test_whether_bfloat16_is_multiplied_faster(
    flags: str | None, gpus: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_text(path: Path, encoding: str) -> str:
        assert str(path) == "/proc/cpuinfo"
        if flags is None:
            raise FileNotFoundError
        return f"processor\t: 0\nflags\t\t: {flags}\n"

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus)
    assert multiplies_bfloat16() == expected
