"""serving.proto: its generated code is in step with it, and it says what its bytes mean."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from flowps.serving.wire import serving_pb2 as pb

ROOT = Path(__file__).resolve().parents[2]
PROTO = ROOT / "flowps" / "serving" / "wire" / "serving.proto"


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make proto-serving` writes, in a folder of its own."""
    folder = tmp_path_factory.mktemp("proto")
    recipe = re.search(r"^proto-serving:.*\n\t(.*)\n", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    command = recipe[1].replace("$(BIN)/python", sys.executable).replace("_out=.", f"_out={folder}").split()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return folder


@pytest.mark.parametrize("name", ["serving_pb2.py", "serving_pb2.pyi"])
def test_the_generated_code_is_in_step(generated: Path, name: str) -> None:
    assert (generated / "flowps/serving/wire" / name).read_bytes() == (PROTO.parent / name).read_bytes(), "run `make proto`"


def test_numbers_of_fields_do_not_change() -> None:
    known = {
        "DescribeRequest": "",
        "DescribeReply": "version=1 flowps=2 created=3 run=4 steps=5 hash=6 slots=7",
        "DescribeReply.Slot": "name=1 dim=2 rows=3 seed=4 hash_size=5 dtype=6 pooling=7",
        "LookupRequest": "slots=1",
        "LookupRequest.Slot": "name=1 signs=2",
        "LookupReply": "version=1 slots=2",
        "LookupReply.Slot": "name=1 dim=2 unknown=3 rows=15",
    }
    for name, fields in known.items():
        outer, _, inner = name.partition(".")
        message = pb.DESCRIPTOR.message_types_by_name[outer]
        message = message.nested_types_by_name[inner] if inner else message
        found = {field.name: field.number for field in message.fields}
        for pair in fields.split():
            field, number = pair.split("=")
            assert found[field] == int(number), (name, field)


def test_bytes_say_their_type_and_shape() -> None:
    text = PROTO.read_text()
    assert re.search(r"bytes rows = 15; +// float32 \[signs, dim\]", text)
    assert "little-endian" in text
