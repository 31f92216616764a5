"""A kill at every step of a retraining: each is gone on from, or rejected, and the live model is never half published.

By an exception that nothing catches, before and after each step is in the ledger; and by SIGKILL. Minutes: `make test-long`.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import flowps.serving
from tests.workflows.pipelines import ROWS, Days, Killed, go
from workflows import attempt as attempt_module
from workflows.ledger import Attempt, LeaseError, Ledger

pytestmark = pytest.mark.timeout(240)

STEPS = ("files", "check", "preview", "train", "evaluate", "judge")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_at_a_step_is_gone_on_from(
    three_days: Callable[[], Days], monkeypatch: pytest.MonkeyPatch, step: str, when: str
) -> None:
    """Before what it found is in the ledger, or just after; the model is the one that there would have been."""
    days = three_days()
    days.day(4)
    done = Ledger.done

    def dying(self: Ledger, attempt: Attempt, name: str, result: Any, seconds: float) -> None:
        if name == step and when == "before":
            raise Killed
        done(self, attempt, name, result, seconds)
        if name == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "done", dying)
        with pytest.raises(Killed):
            go(days)
    assert days.registry.live() == 3
    trained = list[str]()
    train = attempt_module.train
    monkeypatch.setattr(attempt_module, "train", lambda config, console: (trained.append(config.run_dir), train(config, console)))
    assert go(days) == [("2024-09-04", "new", "published")]
    assert len(trained) == (0 if step in ("train", "evaluate", "judge") else 1), "what is trained is not trained again"
    assert days.registry.live() == 4
    assert days.registry.record(4).examples == ROWS
    assert go(days) == []


@pytest.mark.parametrize("at", ["export", "put", "promote", "end"])
def test_a_kill_while_publishing_leaves_one_live_model_and_is_gone_on_from(
    three_days: Callable[[], Days], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    days = three_days()
    days.day(4)

    def kill(*arguments: Any, **keywords: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        if at == "export":
            patch.setattr(attempt_module, "export", kill)
        elif at == "end":
            patch.setattr(Ledger, "end", kill)
        else:
            patch.setattr(f"workflows.store.Registry.{at}", kill)
        with pytest.raises(Killed):
            go(days)
    assert days.registry.live() == (4 if at == "end" else 3)
    flowps.serving.load(days.folder / "registry" / "models", verify=True)
    assert go(days) == [("2024-09-04", "new", "published")]
    assert (days.registry.live(), days.registry.versions()) == (4, [1, 2, 3, 4])
    assert [of.version for of in days.registry.promotions()] == [1, 2, 3, 4]
    assert go(days) == []


def test_a_rollback_after_a_kill_stays(three_days: Callable[[], Days], monkeypatch: pytest.MonkeyPatch) -> None:
    """The model went live, the ledger does not know it, and somebody rolled it back: it is not published again."""
    days = three_days()
    days.day(4)

    def kill(*arguments: Any, **keywords: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "end", kill)
        with pytest.raises(Killed):
            go(days)
    assert days.registry.live() == 4
    days.registry.promote(3, "rolled back")
    assert go(days) == [("2024-09-04", "new", "published")]
    assert days.registry.live() == 3


def test_a_model_that_is_made_live_meanwhile_is_not_overwritten(
    three_days: Callable[[], Days], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slot begins anew, from the model that is live then."""
    days = three_days()
    days.day(4)
    train, calls = attempt_module.train, list[str]()

    def rolled_back(config: Any, console: Any) -> Any:
        if not calls:
            days.registry.promote(2, "rolled back")
        calls.append(config.warm_start)
        return train(config, console)

    monkeypatch.setattr(attempt_module, "train", rolled_back)
    assert go(days) == [("2024-09-04", "new", "superseded"), ("2024-09-04", "new", "published")]
    assert [Path(of).parents[1].name for of in calls] == ["2024-09-03-3", "2024-09-02-2"]
    assert days.registry.record(days.registry.live()).parent == 2


def test_a_command_that_has_lost_its_lease_publishes_nothing(
    three_days: Callable[[], Days], monkeypatch: pytest.MonkeyPatch
) -> None:
    days = three_days()
    days.day(4)
    export = attempt_module.export

    def slept(*arguments: Any) -> Any:
        found = export(*arguments)
        monkeypatch.setattr("workflows.ledger.Lease.check", lost)
        return found

    def lost(self: object) -> None:
        raise LeaseError("another command may be at work")

    with monkeypatch.context() as patch:
        patch.setattr(attempt_module, "export", slept)
        with pytest.raises(LeaseError):
            go(days)
    assert days.registry.live() == 3
    monkeypatch.undo()
    assert go(days) == [("2024-09-04", "new", "published")]


KILL = """
import os, signal, sys
from workflows import attempt, ledger, store

def kill(*arguments, **keywords):
    os.kill(os.getpid(), signal.SIGKILL)

step, path = sys.argv[1:]
if step in ("files", "check", "preview", "train", "evaluate", "judge"):
    done = ledger.Ledger.done
    ledger.Ledger.done = lambda self, of, name, *more: kill() if name == step else done(self, of, name, *more)
elif step == "while training":
    from flowps.trainer.loop import Trainer
    import threading
    run = Trainer.run
    Trainer.run = lambda self: (threading.Timer(0.2, kill).start(), run(self))[1]
elif step == "end":
    ledger.Ledger.end = kill
else:
    setattr(store.Registry, step, kill)
from workflows.retrain import main
sys.exit(main([path]))
"""


@pytest.mark.parametrize("step", [*STEPS, "while training", "put", "promote", "end"])
def test_sigkill(three_days: Callable[[], Days], step: str) -> None:
    """The next command waits for the dead one's lease to end, and goes on."""
    days = three_days()
    text = tomllib.loads(days.path.read_text())
    days.path.write_text(tomli_w.dumps({**text, "lease_s": 2.0}))
    days.day(4)
    root = Path(__file__).resolve().parents[2]
    died = subprocess.run([sys.executable, "-c", KILL, step, str(days.path)], cwd=root, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert days.registry.live() == (4 if step == "end" else 3)
    flowps.serving.load(days.folder / "registry" / "models", verify=True)
    deadline = time.monotonic() + 10
    while True:
        try:
            ended = go(days)
            break
        except LeaseError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert ended == [("2024-09-04", "new", "published")]
    assert (days.registry.live(), days.registry.versions()) == (4, [1, 2, 3, 4])
    assert days.registry.record(4).examples == ROWS
    assert go(days) == []
