"""What other schedulers are given: short, whole, and commands that exist."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from workflows.pipeline import Schedule
from workflows.schedule import trigger_of

DEPLOY = Path(__file__).resolve().parents[2] / "workflows" / "deploy"
FILES = ("airflow_dag.py", "prefect_flow.py", "cronjob.yaml", "flowps-retrain.service", "flowps-retrain.timer")


def runs(words: list[str]) -> None:
    """The command is there and takes such words."""
    assert words[1:3] == ["-m", "workflows.retrain"]
    help_text = subprocess.run([sys.executable, *words[1:3], "--help"], capture_output=True, text=True, check=True).stdout
    assert "PIPELINE" in help_text
    assert len(words) == 4


@pytest.mark.parametrize("name", FILES)
def test_each_is_short(name: str) -> None:
    assert len((DEPLOY / name).read_text().splitlines()) <= 60


def test_there_are_no_others() -> None:
    assert {path.name for path in DEPLOY.iterdir() if path.name != "__pycache__"} == set(FILES)


class Recorded:
    """Stands for a class of a library that is not here: what it was made with, and a context."""

    made: list[tuple[tuple[Any, ...], dict[str, Any]]]

    def __init__(self, *words: Any, **knobs: Any) -> None:
        type(self).made.append((words, knobs))

    def __enter__(self) -> Recorded:
        return self

    def __exit__(self, *error: object) -> None: ...


def test_airflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the library where it is installed, else with what the DAG asks of it."""
    kinds = {name: type(name, (Recorded,), {"made": []}) for name in ("DAG", "BashOperator")}
    modules = {
        "airflow": {}, "airflow.providers": {}, "airflow.providers.standard": {}, "airflow.providers.standard.operators": {},
        "airflow.providers.standard.operators.bash": {"BashOperator": kinds["BashOperator"]}, "airflow.sdk": {"DAG": kinds["DAG"]},
        "pendulum": {"datetime": lambda *of, tz: datetime(*of, tzinfo=UTC)},
    }  # fmt: skip
    for name, names in modules.items():
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    exec(compile((DEPLOY / "airflow_dag.py").read_text(), "airflow_dag.py", "exec"), {"__name__": "dag"})
    (((dag_id,), dag),) = kinds["DAG"].made
    assert dag_id == "flowps_retrain"
    assert (dag["max_active_runs"], dag["catchup"]) == (1, False)
    trigger_of(Schedule(cron=dag["schedule"]))
    ((_, task),) = kinds["BashOperator"].made
    runs(shlex.split(task["bash_command"].removeprefix("exec ").replace("{{ var.value.flowps_pipeline }}", "p.toml")))


def test_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    served: list[dict[str, Any]] = []

    def decorate(**knobs: Any) -> Any:
        def of(function: Any) -> Any:
            function.serve = lambda name, **more: served.append({"name": name, **more})
            return function

        return of

    library = {
        "prefect": {"flow": decorate, "task": decorate},
        "prefect.tasks": {"exponential_backoff": lambda backoff_factor: backoff_factor},
    }
    for name, names in library.items():
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys, "argv", ["prefect_flow.py", "p.toml"])
    code = compile((DEPLOY / "prefect_flow.py").read_text(), "prefect_flow.py", "exec")
    found: dict[str, Any] = {"__name__": "__main__"}
    exec(code, found)
    assert served[0]["limit"] == 1
    trigger_of(Schedule(cron=served[0]["cron"]))
    monkeypatch.setattr(found["subprocess"], "run", lambda words, check: calls.append(words))
    found["flowps_retrain"](**served[0]["parameters"])
    monkeypatch.undo()
    runs(calls[0])


def test_kubernetes() -> None:
    job = yaml.safe_load((DEPLOY / "cronjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "CronJob")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    spec = job["spec"]
    known = {"schedule", "timeZone", "concurrencyPolicy", "startingDeadlineSeconds", "successfulJobsHistoryLimit",
             "failedJobsHistoryLimit", "suspend", "jobTemplate"}  # fmt: skip
    assert set(spec) <= known
    assert spec["concurrencyPolicy"] == "Forbid"
    trigger_of(Schedule(cron=spec["schedule"], time_zone=spec["timeZone"]))
    pod = spec["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] in ("Never", "OnFailure"), "a job takes no other"
    (container,) = pod["containers"]
    runs(container["command"])
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    (mount,) = container["volumeMounts"]
    assert container["command"][-1].startswith(f"{mount['mountPath']}/")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd(tmp_path: Path) -> None:
    """As systemd reads them; the program is there only where it is installed."""
    for name in FILES[3:]:
        text = (DEPLOY / name).read_text().replace("/srv/flowps/.venv/bin/python", sys.executable).replace("User=flowps\n", "")
        (tmp_path / name).write_text(text)
    found = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / name) for name in FILES[3:])], capture_output=True, text=True,
        env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    ours = [line for line in found.stderr.splitlines() if "flowps" in line]
    assert ours == [], found.stderr
    when = re.search(r"OnCalendar=(.*)", (DEPLOY / FILES[4]).read_text())
    assert when is not None
    calendar = subprocess.run(["systemd-analyze", "calendar", when[1]], capture_output=True, text=True, check=True)
    assert ":15:00" in calendar.stdout


def test_systemd_starts_a_command_that_is_there() -> None:
    start = re.search(r"^ExecStart=(.*)$", (DEPLOY / FILES[3]).read_text(), re.M)
    assert start is not None
    runs(shlex.split(start[1]))


@pytest.mark.parametrize("name", FILES[:2])
def test_python_is_python(name: str) -> None:
    assert ast.get_docstring(ast.parse((DEPLOY / name).read_text()))
