"""What is found out about the machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensorflow as tf

from flowps.config import Config, Trainer
from flowps.trainer.setup import multiplies_bfloat16, prepare_tensorflow


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({"in_flight": 1}, True),
        ({"in_flight": 1, "count": 2}, True),
        ({"in_flight": 1, "jit_compile": True}, False),
        ({"in_flight": 2}, False),
        ({"in_flight": 4, "max_staleness": 0}, True),
        ({"in_flight": 4, "max_staleness": 1}, False),
        ({"in_flight": 4, "max_staleness": 0, "count": 2}, False),  # the others' pushes come when they come
    ],
)
def test_operations_are_deterministic_where_a_run_can_be(
    knobs: dict[str, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(tf.config.experimental, "enable_op_determinism", lambda: asked.append(True))
    prepare_tensorflow(Config(trainer=Trainer(**knobs)))
    assert asked == [True] * expected


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
