"""The benchmark of the wire: what it asks, that both ways of writing messages are one on the wire, and what it gives."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import rpc, workload
from flowps.ps.wire import flowps_pb2 as pb
from flowps.ps.wire import frame

SHAPE = workload.Shape(16, (50, 60, 70), (1.0, 2.0, 3.0), 1.05)


def test_cases_are_of_the_size_that_they_are_named_after() -> None:
    small, *halves = rpc.cases()
    for parcel in rpc.parcels(small):
        assert [len(signs) for signs in parcel.signs] == [8192]
        assert parcel.signs[0].nbytes == 64 << 10
    assert small.shape.size * small.width * 4 == pytest.approx(1.7e6, rel=0.01)
    for half, slots, signs in zip(halves, (38, 13), (195, 13), strict=True):
        assert half.shape.num_slots == slots
        assert sum(half.shape.mean_signs) == pytest.approx(signs, rel=0.07)
        assert rpc.half(half.name.removeprefix("half of ")) == half.shape


@pytest.mark.parametrize("signs", [0, 20])
def test_parcels_hold_together(signs: int) -> None:
    case = rpc.Case("some", SHAPE, signs=signs)
    found = rpc.parcels(case)
    assert len(found) == 8
    for parcel in found:
        assert [len(lengths) for lengths in parcel.lengths] == [2 * SHAPE.size, SHAPE.size]
        assert [len(of) for of in parcel.signs] == [lengths.sum() for lengths in parcel.lengths]
        assert sum(map(len, parcel.signs)) == (signs or pytest.approx(6 * SHAPE.size, rel=0.3))
        # A slot's signs stand in its place.
        known = [workload.sign(slot, np.arange(values)) for slot, values in enumerate(SHAPE.cardinalities)]
        bounds = np.cumsum(np.concatenate(parcel.lengths).reshape(SHAPE.num_slots, -1).sum(axis=1))[:-1]
        for of_slot, values in zip(np.split(np.concatenate(parcel.signs), bounds), known, strict=True):
            assert np.isin(of_slot, values).all()


def test_protobufs_messages_are_the_same_on_the_wire() -> None:
    """Whoever wrote one, both read it."""
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    ours, theirs = (
        frame.Writing(pb.LookupReply(scale=2.0), values.nbytes),
        rpc._PlainWriting(pb.LookupReply(scale=2.0), values.nbytes),
    )
    for writing in (ours, theirs):
        writing.array(np.float32, values.shape)[:] = values
    for data in (ours.finish(), theirs.finish()):
        reply = pb.LookupReply()
        assert bytes(rpc._plain_parse(data, reply)) == values.tobytes()
        assert reply.scale == 2.0
        small, array = frame.read(data)
        assert bytes(array) == values.tobytes()
        assert pb.LookupReply.FromString(small).scale == 2.0
    signs = [np.arange(3, dtype=np.uint64), np.arange(5, dtype=np.uint64)]
    assert pb.LookupRequest.FromString(rpc._plain_write(pb.LookupRequest(size=7), signs)).signs == np.concatenate(signs).tobytes()
    assert bytes(rpc._plain_parse(pb.PushReply(rows=3).SerializeToString(), pb.PushReply())) == b""


def test_figures_are_consistent() -> None:
    def blocks(*wall_ms: float) -> list[np.ndarray]:
        return [np.array([[ms / 1e3, ms / 2e3, ms / 4e3, faults] for faults in (0, 0, 6)]) for ms in wall_ms]

    found = rpc.compared({"echo": blocks(1, 2, 3), "flowps": blocks(3, 5, 7), "local": blocks(1, 1, 1)})
    cpu = {"cpu_ms": 1.5, "client_cpu_ms": 1, "server_cpu_ms": 0.5}
    assert found["echo"] == pytest.approx({"ms": 2, "ms_p10": 1, "ms_p90": 3, **cpu, "page_faults": 2})
    assert found["ratio"] == pytest.approx(2.5)
    assert (found["ratio_least"], found["ratio_most"]) == pytest.approx((7 / 3, 3))
    assert found["without_shard_ms"] == pytest.approx(4)
    assert found["ratio_without_shard"] == pytest.approx(2)


@pytest.mark.long
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two pairs of processes, all contenders, every call answered."""
    to = tmp_path / "rpc.json"
    monkeypatch.setattr(rpc, "cases", lambda: [rpc.Case("some", SHAPE, signs=20), rpc.Case("more", SHAPE)])
    monkeypatch.setattr(sys, "argv", ["bench.rpc", "--rounds", "2", "--calls", "3", "--json", str(to)])
    rpc.main()
    result = json.loads(to.read_text(encoding="utf-8"))
    assert (result["rounds"], result["calls"], result["machine"]["cores"] >= 1) == (2, 3, True)
    assert capsys.readouterr().out == rpc.markdown(result) + "\n"
    keys = ("case", "operation", "wire", "keep_memory")
    found = {tuple(r[key] for key in keys): r for r in result["results"]}
    assert len(found) == len(result["results"]) == 2 * 2 * 2 * 2
    for r in result["results"]:
        contenders = {name for name in rpc.CONTENDERS if name in r}
        assert contenders == set(rpc.CONTENDERS) - ({"protobuf"} if r["wire"] == "float16" else set())
        for name in contenders:
            assert 0 < r[name]["ms_p10"] <= r[name]["ms"] <= r[name]["ms_p90"]
            assert r[name]["cpu_ms"] > 0
            assert r[name]["page_faults"] >= 0
        assert r["ratio"] == pytest.approx(r["flowps"]["ms"] / r["echo"]["ms"])
        assert r["without_shard_ms"] == pytest.approx(r["flowps"]["ms"] - r["local"]["ms"])
        assert r["ratio_without_shard"] == pytest.approx(r["without_shard_ms"] / r["echo"]["ms"])
        assert 0 < r["ratio_least"] <= r["ratio_most"]
        large = "reply_bytes" if r["operation"] == "lookup" else "request_bytes"
        array = SHAPE.size * SHAPE.num_slots * 16 * (4 if r["wire"] == "float32" else 2)
        assert array < r[large] < array + 200
        assert r["signs"] == (20 if r["case"] == "some" else pytest.approx(6 * SHAPE.size, rel=0.2))
    first = found["some", "lookup", "float32", True]
    assert result["target"] == {"case": "some", "operation": "lookup", "ratio_at_most": rpc.TARGET, "ratio": first["ratio"]}
