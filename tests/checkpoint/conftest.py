"""Places for checkpoints: a folder, memory, a real S3 server on this machine; and disks that refuse."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest

from flowps.checkpoint.store import Store


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """A bucket of a server that ends with the tests."""
    server_of = pytest.importorskip("moto.server", reason="moto is not installed")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            environment.setenv(name, "testing")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fs = fsspec.filesystem("s3")
        fs.mkdir("bucket")
        yield "s3://bucket"
        s3fs.S3FileSystem.close_session(fs.loop, fs.s3)
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def memory() -> Iterator[Store]:
    """A store in this process's memory."""
    store = Store(f"memory://{uuid.uuid4().hex}")
    yield store
    for folder in ["", *store.folders()]:
        for path in store.sizes(folder) if folder else ():
            store.remove(path)
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """One of each kind, empty and prepared."""
    kind = request.param
    if kind == "memory":
        found: Store = request.getfixturevalue("memory")
    else:
        found = Store(str(tmp_path / "checkpoints") if kind == "local" else f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}")
    found.prepare()
    return found


@pytest.fixture
def local(tmp_path: Path) -> Store:
    """A store on a disk."""
    found = Store(str(tmp_path / "checkpoints"))
    found.prepare()
    return found


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with disk_of("1m", folder):
        yield folder


@contextmanager
def disk_of(size: str, folder: Path) -> Iterator[None]:
    """A disk of that size at an empty folder; skips the test where none can be mounted."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)
