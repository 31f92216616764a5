"""The gate: whether a new model may go live, by its figures on the fixed set and those of the live one. Pure."""

from __future__ import annotations

import msgspec

from flowps.quality import Quality
from workflows.pipeline import Gate


class Verdict(msgspec.Struct, frozen=True):
    """`reasons`: what was compared, each in a line, those that speak against it first."""

    accepted: bool
    reasons: list[str]


def judge(new: Quality, live: Quality | None, knobs: Gate) -> Verdict:
    """Compare a new model with the live one; a first model with what is asked of any."""
    found = [_least_auc(new, knobs), _calibration(new, live, knobs)]
    if live is not None:
        found += [_auc(new, live, knobs), _entropy(new, live, knobs)]
    return Verdict(all(passed for passed, _ in found), [words for _, words in sorted(found, key=lambda of: of[0])])


def _least_auc(new: Quality, knobs: Gate) -> tuple[bool, str]:
    if new.auc is None:
        return False, "no AUC: the fixed set has labels of one class only"
    return new.auc >= knobs.least_auc, f"AUC {new.auc:.4f}, at least {knobs.least_auc:g} (gate.least_auc)"


def _calibration(new: Quality, live: Quality | None, knobs: Gate) -> tuple[bool, str]:
    """Beyond the bound it passes if the live model is further off: with a bound alone, nothing could go live any more."""
    if new.calibration is None:
        return False, "no calibration: the fixed set has no positive label"
    bound, beside = knobs.calibration, ""
    if live is not None and live.calibration is not None:
        bound, beside = max(bound, abs(live.calibration - 1)), f", the live model's is {live.calibration:.3f}"
    return abs(new.calibration - 1) <= bound, f"calibration {new.calibration:.3f}{beside}: 1 ± {bound:.3g} (gate.calibration)"


def _auc(new: Quality, live: Quality, knobs: Gate) -> tuple[bool, str]:
    if new.auc is None or live.auc is None:
        return False, "no AUC to compare"
    above = new.auc - live.auc
    return above >= -knobs.auc_drop, (
        f"AUC {new.auc:.4f}, the live model's is {live.auc:.4f}: {above:+.4f}, at least {-knobs.auc_drop:+g} (gate.auc_drop)"
    )


def _entropy(new: Quality, live: Quality, knobs: Gate) -> tuple[bool, str]:
    if new.normalised_entropy is None or live.normalised_entropy is None:
        return False, "no normalised entropy to compare"
    rise = new.normalised_entropy / live.normalised_entropy - 1
    return rise <= knobs.ne_rise, (
        f"normalised entropy {new.normalised_entropy:.4f}, the live model's is {live.normalised_entropy:.4f}: {rise:+.2%}, at most "
        f"{knobs.ne_rise:+.2%} (gate.ne_rise)"
    )
