"""What a sign costs as things get larger: small points, and the picture."""

from __future__ import annotations

from dataclasses import replace

import psutil
import pytest

from bench import scale


@pytest.mark.parametrize("point", [scale.Point(4000, 4, 2, 8, 64, 1), scale.Point(4000, 4, 1, 16, 32, 2)])
def test_a_point_has_what_the_picture_shows(point: scale.Point) -> None:
    found = scale.of_point(point)
    assert all(found[axis] == getattr(point, axis) for axis in scale.AXES)
    assert found["signs_per_batch"] == pytest.approx(point.batch * point.slots * point.signs, rel=0.2)
    for name in ("lookup", "push"):
        assert 0 < found[f"{name}_ms_p50"] <= found[f"{name}_ms_p99"]
        assert found[f"{name}_ns_per_sign"] * found["signs_per_batch"] == pytest.approx(found[f"{name}_ms_p50"] * 1e6)


def test_more_rows_than_memory_are_left_out_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 10 << 30

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    assert scale.left_out(1000) == ""
    assert scale.left_out(100_000_000) == "100,000,000 rows need 19 GiB, 10 GiB were available"


def test_the_picture_has_two_plots_for_each_axis() -> None:
    figures = {f"{name}_{of}": 1.0 for name in ("lookup", "push") for of in ("ns_per_sign", "ms_p50", "ms_p99")}
    floors = {f"floor_{name}_ns_per_sign": 0.5 for name in ("lookup", "push")}
    sizes = [{"rows": rows, **figures, **floors} for rows in scale.SIZES]
    axes = {
        axis: [{**vars(replace(scale.MIDDLE, **{axis: value})), **figures} for value in values]
        for axis, values in scale.AXES.items()
    }
    plots = scale.picture({"sizes": sizes, "axes": axes}).axes
    assert len(plots) == 2 * (1 + len(scale.AXES))
    by_axis = dict(zip(["uniform", *scale.AXES], plots[::2], strict=True))
    assert [len(plot.lines) for plot in by_axis.values()] == [4, 2, 2, 2, 2, 2, 2]
    assert list(by_axis["dim"].lines[0].get_xdata()) == list(scale.AXES["dim"])
