"""What to use after a comparison: the arm, its learning rate and the code, with the evidence."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping

from adaptive_optax._core.names import visible
from adaptive_optax.study.arms import ESTIMATORS, SCHEDULES, WARMED, NamedArm
from adaptive_optax.study.arms import arm as named_arm
from adaptive_optax.study.calls import IMPORTS, shortest, written
from adaptive_optax.study.details import Details
from adaptive_optax.study.judged import TRAINED
from adaptive_optax.study.record import Record
from adaptive_optax.study.statistics.sentences import without_look
from adaptive_optax.study.statistics.verdict import Verdict

# The schedules of the standard arms, the simplest first. An average, schedule-free averaging and an
# estimated learning rate come after all of them: they need state of their own.
SIMPLEST_FIRST = (
    ("constant", "halved"),
    ("linear", "1-sqrt", "cosine", "exponential", "step"),
    WARMED,
    ("one_cycle",),
)


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """What a comparison recommends, as `Comparison.recommend` returns it.

    Attributes:
        arm: The arm's name.
        learning_rate: Its peak learning rate, the one found in tuning.
        code: The statements that build its optax transformation as `tx`, with their imports; then, if not the
            trained parameters were judged, how to obtain those that were. Names that it does not define are
            the user's: the mapping `arms` that was compared, an arm's function, or `decay_now`'s `optimizer`;
            and after training `params`, `opt_state` and what else the evaluation needs.
        reason: The evidence, in one sentence.

    Examples:
        >>> from adaptive_optax import study
        >>> found = study.Recommendation(
        ...     "adam:constant", 0.01, study.arm("adam:constant").code(0.01, 100), "The only one."
        ... )
        >>> names = {}
        >>> exec(found.code, names)
        >>> optimizer = names["tx"]
    """

    arm: str
    learning_rate: float
    code: str
    reason: str


def recommend(record: Record) -> Recommendation:
    """Recommends an arm, as `Comparison.recommend` says."""
    verdicts = record.verdicts
    if all(verdict.reason for verdict in verdicts.values()):
        raise ValueError(record.verdict().sentence)
    better = [arm for arm, verdict in verdicts.items() if verdict.decision == "better"]
    if better:
        arm, how = record.best_in_tuning(better), "did best in tuning"
        if record.details.goes_on:
            arm, how = min(better, key=lambda arm: record.cost_of(verdicts[arm])), "ends best"
        reason = without_look(verdicts[arm].sentence)
        if len(better) > 1:
            reason = f"{reason[:-1]}; of the {len(better)} arms that are better, it {how}."
    else:
        arm, reason = _simplest(record.details, verdicts)
    return Recommendation(arm, record.details.best_rates[arm], code_for(record.details, arm), reason)


def simplicity(arm: NamedArm) -> int:
    """Returns an arm's place among the standard ones, 0 for the simplest."""
    if arm.average or arm.is_limited or arm.schedule == "schedule_free" or arm.optimizer in ESTIMATORS:
        return len(SIMPLEST_FIRST)
    return next(place for place, names in enumerate(SIMPLEST_FIRST) if arm.schedule in names)


def _simplest(details: Details, verdicts: Mapping[str, Verdict]) -> tuple[str, str]:
    """Chooses among arms of which none is better than the baseline; returns the arm and the reason.

    An arm that is equivalent to the baseline may replace it if it is simpler, an undecided one may not: it
    may be worse. Only standard arms are known to be simpler than others.
    """
    baseline = details.baseline
    found = {
        decision: [arm for arm, verdict in verdicts.items() if verdict.decision == decision]
        for decision in ("equivalent", "undecided", "worse")
    }
    evidence = "; ".join(f"{decision}: {_listed(arms)}" for decision, arms in found.items() if arms)
    if len(found["worse"]) == len(verdicts):
        if len(verdicts) == 1:
            return baseline, verdicts[found["worse"][0]].sentence
        return baseline, f"All {len(verdicts)} other arms are worse than {visible(baseline)}."
    places = {arm: simplicity(named_arm(usual)) for arm, usual in details.usual_arms.items()}

    def simpler(arms: Iterable[str]) -> list[str]:
        """Those that are simpler than the baseline, the simplest first."""
        known = [arm for arm in arms if baseline in places and places.get(arm, 99) < places[baseline]]
        return sorted(known, key=places.__getitem__)

    nothing = "No arm was found to be better" if found["worse"] else "No difference was found"
    if replacing := simpler(found["equivalent"]):
        return replacing[0], (
            f"{nothing}: keep the simplest, {visible(replacing[0])}, which is equivalent to "
            f"{visible(baseline)} ({evidence})."
        )
    if unknown := simpler(found["undecided"]):
        return baseline, (
            f"{nothing}: keep {visible(baseline)}, since {visible(unknown[0])} is simpler but may be worse "
            f"({evidence})."
        )
    what = "the simplest" if baseline in places else "the baseline"
    return baseline, f"{nothing}: keep {what}, {visible(baseline)} ({evidence})."


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(visible, names))


# ---- Code ----


def code_for(details: Details, arm: str) -> str:
    """Writes the statements that build an arm at its best rate, and how to obtain what was judged."""
    rate, steps = shortest(details.best_rates[arm]), details.steps
    if usual := details.usual_arms.get(arm):
        lines = named_arm(usual).code(rate, steps).splitlines()
    elif scheduled := re.fullmatch(r"optimizer\((.+)\)", details.own_arms.get(arm, "")):
        lines = _scheduled(scheduled[1], rate, steps)
    else:
        imports, made = _own(details, arm)
        lines = [*imports, f"tx = {made}({rate!r}, {steps})"]
    judged = details.judged.get(arm, TRAINED)
    missing = [line for prefix, line in IMPORTS.items() if f" {prefix}" in judged.code and line not in lines]
    after = [f"# After training, {judged.then}."] * bool(judged.then) + [judged.code] * bool(judged.code)
    return "\n".join(map(visible, [*missing, *lines, *after]))


def _scheduled(name: str, rate: float, steps: int) -> list[str]:
    """The user's optimizer, a function of a learning rate or schedule, as `decay_now` tries it."""
    schedule, _, average = name.partition(":")
    lines = written({"learning_rate": SCHEDULES[schedule](rate, steps)}).splitlines()
    tx = "optimizer(learning_rate)"
    if average:
        lines = [IMPORTS["ao."], IMPORTS["optax."], *(each for each in lines if each not in IMPORTS.values())]
        tx = f"optax.chain({tx}, ao.average_parameters())"
    return ["# optimizer is the function given to decay_now.", *lines, f"tx = {tx}"]


def _own(details: Details, arm: str) -> tuple[list[str], str]:
    """Returns the imports and the Python expression for an arm of the user's own."""
    place, _, function = details.own_arms.get(arm, "").rpartition(":")
    if place.endswith(".py"):
        return ["import runpy"], f"runpy.run_path({quoted(place)})[{quoted(function)}]"
    if function:
        return [f"from {place} import {function}"] * bool(place), function
    return [], f"arms[{quoted(arm)}]"


def quoted(text: str) -> str:
    """Writes a string as in code, with double quotes."""
    return json.dumps(visible(text), ensure_ascii=False)
