"""The gate: what a new model must reach, and what is said of it."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from flowps.quality import Quality, Tally
from workflows.gate import judge
from workflows.pipeline import Gate

KNOBS = Gate(fixed=("x",), auc_drop=0.01, least_auc=0.6, ne_rise=0.02, calibration=0.1)


def quality(auc: float | None = 0.7, entropy: float | None = 0.9, calibration: float | None = 1.0) -> Quality:
    tally = Tally()
    tally.update(np.array([0, 1], np.float32), np.zeros(2, np.float32))
    return msgspec.structs.replace(tally.result(1), auc=auc, normalised_entropy=entropy, calibration=calibration)


@pytest.mark.parametrize(
    ("new", "accepted"),
    [
        ({}, True),
        ({"auc": 0.6901}, True),
        ({"auc": 0.689}, False),
        ({"entropy": 0.917}, True),
        ({"entropy": 0.919}, False),
        ({"calibration": 1.09}, True),
        ({"calibration": 0.89}, False),
        ({"auc": None}, False),
        ({"entropy": None}, False),
        ({"calibration": None}, False),
    ],
)
def test_beside_the_live_model(new: dict[str, float | None], accepted: bool) -> None:
    verdict = judge(quality(**new), quality(), KNOBS)
    assert verdict.accepted is accepted
    assert len(verdict.reasons) == 4


def test_a_first_model_has_none_beside_it() -> None:
    verdict = judge(quality(0.61, 2.0), None, KNOBS)
    assert verdict.accepted
    assert verdict.reasons == ["AUC 0.6100, at least 0.6 (gate.least_auc)", "calibration 1.000: 1 ± 0.1 (gate.calibration)"]
    assert not judge(quality(0.59), None, KNOBS).accepted


def test_one_that_is_off_passes_where_the_live_model_is_further_off() -> None:
    assert judge(quality(calibration=1.25), quality(calibration=0.7), KNOBS).accepted
    verdict = judge(quality(calibration=1.35), quality(calibration=0.7), KNOBS)
    assert not verdict.accepted
    assert verdict.reasons[0] == "calibration 1.350, the live model's is 0.700: 1 ± 0.3 (gate.calibration)"


def test_what_speaks_against_it_comes_first() -> None:
    verdict = judge(quality(0.65, 0.95), quality(), KNOBS)
    assert verdict.reasons[0] == "AUC 0.6500, the live model's is 0.7000: -0.0500, at least -0.01 (gate.auc_drop)"
    assert verdict.reasons[1].startswith(
        "normalised entropy 0.9500, the live model's is 0.9000: +5.56%, at most +2.00% (gate.ne_rise)"
    )
    assert judge(quality(0.9, 0.5), quality(), KNOBS).accepted, "better is no harm"
