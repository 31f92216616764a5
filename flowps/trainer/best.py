"""`BestSoFar`: the best evaluation on the validation data, and whether training should end because none was better since.

Pure; called by the trainer's thread. Its numbers are part of the trainer's state at a cut.
"""

from __future__ import annotations

import math

from flowps.status.event import Metrics


class BestSoFar:
    """As early stopping has it (Prechelt, "Early stopping - but when?", 1998).

    monitor    "auc", which is to be high, or "logloss", which is to be low
    patience   evaluations in a row without a better one after which `is_over`; 0: never
    """

    def __init__(self, monitor: str, patience: int) -> None:
        self._monitor, self._patience = monitor, patience
        self._value: float | None = None
        self._since = 0
        self.seen = 0
        """The step after which the last evaluation was; 0: there was none."""
        self.step = 0
        """The same of the best one."""

    @property
    def is_over(self) -> bool:
        """Whether training should end."""
        return self._patience > 0 and self._since >= self._patience

    def see(self, step: int, metrics: Metrics) -> bool:
        """Take notice of an evaluation after `step`; whether it is better than all before. One without an AUC is not, nor NaN."""
        value = metrics.auc if self._monitor == "auc" else -metrics.logloss
        self.seen = step
        if value is not None and value > (-math.inf if self._value is None else self._value):
            self._value, self._since, self.step = value, 0, step
            return True
        self._since += 1
        return False

    def state(self) -> dict[str, float]:
        """What `restore` takes."""
        value = {} if self._value is None else {"value": self._value}
        return {"since": self._since, "seen": self.seen, "step": self.step, **value}

    def restore(self, state: dict[str, float]) -> None:
        """Go on with what `state` gave, if anything."""
        if state:
            self._value = state.get("value")
            self._since, self.seen, self.step = (int(state.get(name, 0)) for name in ("since", "seen", "step"))
