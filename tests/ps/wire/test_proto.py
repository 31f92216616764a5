"""flowps.proto: its generated code is in step with it, and it says what its bytes mean."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor

from flowps.ps.wire import flowps_pb2 as pb
from flowps.ps.wire.protocol import CODES, PROTOCOL, SERVICE

ROOT = Path(__file__).resolve().parents[3]
PROTO = ROOT / "flowps" / "ps" / "wire" / "flowps.proto"


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make proto` writes, in a folder of its own."""
    folder = tmp_path_factory.mktemp("proto")
    recipe = re.search(r"^proto:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    for line in recipe[1].splitlines():
        command = shlex.split(line.replace("$(BIN)/python", sys.executable))
        out_of_the_way = [re.sub(r"^(--\w+_out)=\.$", rf"\1={folder}", part) for part in command]
        assert command != out_of_the_way
        subprocess.run(out_of_the_way, cwd=ROOT, check=True, capture_output=True, text=True)
    return folder


@pytest.mark.parametrize("name", ["flowps_pb2.py", "flowps_pb2.pyi"])
def test_the_generated_code_is_in_step(generated: Path, name: str) -> None:
    """It is what `make proto` would write now, byte for byte."""
    assert (generated / "flowps/ps/wire" / name).read_bytes() == (PROTO.parent / name).read_bytes(), "run `make proto`"


def test_nothing_else_is_generated(generated: Path) -> None:
    """All that `make proto` writes is there, and all that is there is written by it."""
    files = {path.relative_to(generated) for path in generated.rglob("*") if path.is_file()}
    assert files == {path.relative_to(ROOT) for path in PROTO.parent.glob("flowps_pb2*")}


def test_the_runtime_is_new_enough_for_the_generated_code() -> None:
    """protobuf's lower bound is the version that the code was generated for: an older one refuses to import it."""
    version = re.search(r"^# Protobuf Python Version: (.*)$", (PROTO.parent / "flowps_pb2.py").read_text(), re.MULTILINE)
    assert version is not None
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"protobuf>={version[1]},<{int(version[1].split('.')[0]) + 1}" in requirements


def test_every_array_says_its_type_and_shape() -> None:
    """A `bytes` field's comment names dtype and shape, or that it is ignored."""
    fields = re.findall(r"^ +bytes (\w+) *= *\d+; *(//.*)?$", PROTO.read_text(), re.MULTILINE)
    described = dict(fields)
    declared = {
        field.name
        for message in pb.DESCRIPTOR.message_types_by_name.values()
        for field in message.fields
        if field.type == FieldDescriptor.TYPE_BYTES
    }
    assert set(described) == declared
    for name, comment in fields:
        if name != "padding":
            assert re.search(r"(uint8|uint64|float32).*\[.+\]", comment), name
    assert "little-endian" in PROTO.read_text()


def test_the_protocol_number_is_documented() -> None:
    """The comment at `Head.protocol` is the number that is spoken."""
    assert f"uint32 protocol = 1;  // {PROTOCOL}\n" in PROTO.read_text()
    assert SERVICE == "flowps.EmbeddingShard"


def test_the_status_codes_are_documented() -> None:
    """Those that errors of the shard come as, and those of the server itself; no others."""
    comment = PROTO.read_text().split("syntax =")[0].split("Status codes:")[1]
    sent = {code.name for _, code in CODES} | {"FAILED_PRECONDITION", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED"}
    assert set(re.findall(r"\b[A-Z]{3,}(?:_[A-Z]+)*\b", comment)) - {"TOKEN"} == sent


def test_numbers_of_fields_do_not_change() -> None:
    """A field once sent keeps its number and type: fields are only added."""
    known = {
        "Head": "protocol=1 run=2",
        "DescribeRequest": "head=1",
        "DescribeReply": "protocol=1 version=2 run=3 shard=4 slots=5 max_message_bytes=6",
        "LookupRequest": "head=1 batch=2 size=3 training=4 floats=5 length_bytes=6 lengths=7 shares=8 padding=14 signs=15",
        "LookupReply": "scale=1 padding=14 embeddings=15",
        "FindReply": "",
        "PoolRequest": "head=1 batch=2 size=3 floats=4",
        "PushRequest": "head=1 batch=2 size=3 floats=4 scale=5 rate_scale=6 padding=14 gradient=15",
        "PushReply": "rows=1",
        "ForgetRequest": "head=1 batch=2",
        "ForgetReply": "",
    }
    for name, fields in known.items():
        found = {field.name: field.number for field in pb.DESCRIPTOR.message_types_by_name[name].fields}
        for pair in fields.split():
            field, number = pair.split("=")
            assert found[field] == int(number), (name, field)
