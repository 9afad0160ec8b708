"""Seeds until it is decided, and racing rates: what is trained, judged, kept in a folder, and shown."""

import concurrent.futures
import dataclasses
import io
import json
import math
import re
import zlib

import jax.numpy as jnp
import numpy as np
import own_script
import pytest
from quadratic import quadratic_task
from rich.console import Console
from typer.testing import CliRunner

import adaptive_optax as ao
from adaptive_optax import study
from adaptive_optax.study.cli import app
from adaptive_optax.study.report import figures
from adaptive_optax.study.report.advice import answer
from adaptive_optax.study.report.findings import final_metrics, paired_differences, seeds_used
from adaptive_optax.study.report.tables import looks_table

PLAN = study.Sequential(5, 12)  # looks at 5, 6, 8, 10 and 12 seeds
RATES = [0.01, 0.03, 0.1, 0.3]
EFFECTS = {"base": 0.0, "far": -1.0, "near": -0.1, "same": -0.0005}
NOISE = {"base": 0.0, "far": 0.1, "near": 0.1, "same": 0.1}


def noise(*key):
    return np.random.default_rng([zlib.crc32(str(each).encode()) for each in key]).standard_normal()


def train(run):
    """The seed changes all metrics alike; 0.1 is the best rate, at some seeds more so than at others."""
    if len(own_script.calls) == own_script.most:  # in another module, or the folder would see them change
        raise KeyboardInterrupt
    own_script.calls.append((run.arm, run.learning_rate, run.seed))
    away = abs(math.log10(run.learning_rate / 0.1))
    run.report(0, 100.0)
    own = NOISE[run.arm] * noise(run.arm, run.seed) + 0.05 * noise(run.learning_rate, run.seed)
    return 10.0 + noise(run.seed) + EFFECTS[run.arm] + away + own


def arm(learning_rate, steps):
    return learning_rate


ARMS = dict.fromkeys(EFFECTS, arm)
SETTINGS = {"learning_rates": RATES, "steps": 2, "tuning_seeds": 3, "margin": 0.02, "growth": 1}


def compare(function=train, arms=ARMS, most=None, **settings):
    own_script.calls, own_script.most = [], most
    return study.compare(function, arms, **{"seeds": PLAN} | SETTINGS | settings)


@pytest.fixture(scope="module")
def raced():
    """A comparison whose arms stop at different looks, with its calls."""
    comparison = compare(tuning="race")
    return comparison, own_script.calls


def seeds_by_arm(comparison):
    fresh = comparison.table[comparison.table["phase"] == "verdict"]
    return fresh.groupby("arm")["seed"].count().to_dict()


def same(comparison, other):
    return comparison.table.equals(other.table) and all(
        getattr(comparison.details, name) == getattr(other.details, name)
        for name in ("looks", "best_rates", "on_edge", "grid", "grown", "wanted", "sequential", "tuning")
    )


# ---- A plan of seeds ----


def test_an_arm_stops_when_it_is_decided(raced):
    comparison, called = raced
    assert comparison.details.looks == PLAN.looks and comparison.details.sequential == PLAN
    stopped = seeds_by_arm(comparison)
    assert stopped["base"] == stopped["same"] == 12  # undecided to the end
    assert stopped["far"] == 5 < stopped["near"] < 12
    verdicts = comparison.verdicts
    assert {arm: verdict.decision for arm, verdict in verdicts.items()} == {
        "far": "better", "near": "better", "same": "undecided",
    }  # fmt: skip
    assert {arm: verdict.seeds for arm, verdict in verdicts.items()} == {
        arm: count for arm, count in stopped.items() if arm != "base"
    }
    assert verdicts == study.judge(comparison.table, baseline="base", margin=0.02, sequential=PLAN)
    assert ", 5 seeds. This was look 1 of 5; the last one has 12 seeds." in verdicts["far"].sentence
    reason = comparison.recommend().reason  # in one sentence
    assert reason.endswith(", 5 seeds; of the 2 arms that are better, it did best in tuning.")
    assert len(called) == len(set(called)) == len(comparison.table)


def test_all_arms_decided_end_the_plan():
    comparison = compare(arms=dict.fromkeys(["base", "far"], arm))
    assert comparison.details.looks == (5,) and comparison.details.seeds == 12
    assert seeds_used(comparison) == "stopped after 5 of at most 12 fresh seeds"
    assert comparison.verdict().decision == "better"


def test_seeds_that_decide_nothing_are_not_trained():
    def function(run):
        return math.nan if run.arm == "near" and run.seed >= 1000 else 10.0 + EFFECTS[run.arm]

    comparison = compare(function, dict.fromkeys(["base", "far"], arm))
    assert comparison.verdict().reason == "deterministic task" and comparison.details.looks == (5,)
    # An arm that always diverges is decided; base and arm that both do are not, and never will be.
    assert compare(function, dict.fromkeys(["base", "near"], arm)).details.looks == (5,)

    def lost(run):
        run.report(0, 100.0)
        return math.nan if run.seed >= 1000 else 10.0

    comparison = compare(lost, dict.fromkeys(["base", "far"], arm))
    assert comparison.verdict().reason == "nothing measured" and comparison.details.looks == (5,)


def test_without_a_margin_a_metric_below_zero_ends_the_plan(tmp_path):
    def function(run):
        return train(run) - 10 if run.seed >= 1000 else 10.0

    comparison = compare(function, margin=None, out=tmp_path, learning_rates=[0.1], growth=0)
    assert comparison.details.looks == (5,)
    with pytest.raises(ValueError, match="margin must be given"):
        comparison.verdict()
    judged = comparison.with_margin(0.02)
    assert judged.verdict("far").decision == "better" and judged.verdict("same").seeds == 5
    assert judged.unfinished == ["near", "same"]
    # With it, the same study goes on.
    again = compare(function, out=tmp_path, learning_rates=[0.1], growth=0)
    assert again.details.looks == PLAN.looks
    assert len(own_script.calls) == len(again.table) - len(comparison.table)


def test_a_stricter_margin_on_what_was_recorded(raced):
    comparison = raced[0].with_margin(5.0)  # everything is equivalent
    assert {v.decision for v in comparison.verdicts.values()} == {"equivalent"}
    assert {v.seeds for v in comparison.verdicts.values()} == {5}
    equivalent = compare(margin=5.0, tuning="race")
    assert equivalent.details.looks == (5,)
    strict = equivalent.with_margin(1e-6)
    assert strict.verdicts["same"].decision == "undecided" and strict.verdicts["same"].seeds == 5
    assert "same" in strict.unfinished and seeds_used(strict) == "5 of at most 12 fresh seeds so far"


def test_an_executor_trains_the_same_trials(raced):
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        sent = compare(tuning="race", executor=executor)
    assert same(raced[0], sent)


def test_a_run_under_way_is_judged_by_a_plan():
    start = study.Start(jnp.full(16, 6.0), ao.sgd(0.2).init(jnp.full(16, 6.0)), step=100)
    comparison = study.compare(
        quadratic_task(1.0, 1.0), ["sgd:constant", "sgd:linear"], learning_rates=[0.2], steps=8, start=start,
        seeds=PLAN, margin=1e-3, tuning="race", mode="scan", chunk=2, progress=False,
    )  # fmt: skip
    verdict = comparison.verdict()
    assert verdict.decision == "worse" and comparison.details.looks[-1] == verdict.seeds < 12
    assert (comparison.table["phase"] == "tuning").sum() == 2  # one rate has nobody to race
    assert verdict == study.judge(
        comparison.table, baseline="sgd:constant", margin=1e-3, sequential=PLAN
    )["sgd:linear"]  # fmt: skip


def test_decaying_now_or_later_may_stop_at_different_seeds():
    def start(value, step):
        return study.Start(jnp.full(16, value), ao.sgd(0.2).init(jnp.full(16, value)), step=step)

    found = study.decay_now(
        quadratic_task(1.0, 1.0), [start(6.0, 10), start(0.33, 20)], steps=8, optimizer="sgd", margin=1e-3,
        learning_rate=0.2, seeds=study.Sequential(5, 7), progress=False,
    )  # fmt: skip
    looks = [comparison.details.looks[-1] for comparison in found.comparisons]
    assert len(set(looks)) == 2
    assert "lower than from step 10, after 10 more steps" in found.sentence and "nan" not in found.sentence
    assert found.best().seeds in (5, 6, 7) and len(found.table) == 2 * 5
    found.plot()


# ---- Stopped and resumed ----


@pytest.mark.parametrize(
    ("at", "tuning"),
    [
        (2, "grid"),
        (40, "grid"),
        (65, "grid"),
        (75, "grid"),
        (15, "race"),
        (40, "race"),
        (52, "race"),
        (60, "race"),
    ],
)
def test_a_study_resumes_in_every_phase(at, tuning, tmp_path):
    whole, settings = compare(tuning=tuning), {"tuning": tuning, "out": tmp_path}
    with pytest.raises(KeyboardInterrupt) as stopped:
        compare(most=at, **settings)
    partial = vars(stopped.value)["comparison"]
    assert len(partial.table) == at
    if partial.details.looks:
        assert partial.verdicts == study.judge(
            whole.table[whole.table["seed"] < 1000 + partial.details.looks[-1]],
            baseline="base", margin=0.02, sequential=PLAN,
        )  # fmt: skip
        assert partial.unfinished and "so far" in seeds_used(partial)
        if at == 60:
            assert_shown(partial, tmp_path / "shown")
    else:
        with pytest.raises(ValueError, match="stopped before its verdict"):
            partial.verdict()
    assert same(whole, compare(**settings))
    assert len(own_script.calls) == len(whole.table) - at
    # Once more, nothing is trained and it is no new look.
    assert same(whole, compare(**settings)) and not own_script.calls


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"seeds": 8, "learning_rates": [*RATES, 1.0]},
            r"with seeds=Sequential\(5, 12\), not seeds=8, and a plan of seeds keeps",
        ),
        ({"seeds": study.Sequential(5, 13)}, r"Sequential\(5, 12\), not seeds=Sequential\(5, 13\)"),
        ({"baseline": "far"}, "baseline 'base', not 'far'"),
        (
            {"arms": dict.fromkeys(["base", "far"], arm)},
            "arms 'base', 'far', 'near', 'same', not 'base', 'far'",
        ),
        ({"learning_rates": [0.03], "growth": 0}, "learning rate 0.1 of arm 'base', not 0.03"),
    ],
)
def test_another_plan_is_refused(changed, message, planned):
    before = (planned / "looks.json").read_bytes()
    with pytest.raises(ValueError, match=message) as refused:
        compare(out=planned, **changed)
    assert "\n" not in str(refused.value)
    assert (planned / "looks.json").read_bytes() == before
    assert not own_script.calls


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The folder of a study by a plan."""
    folder = tmp_path_factory.mktemp("planned")
    compare(out=folder)
    return folder


def test_a_plan_after_a_fixed_number_is_refused(tmp_path):
    compare(seeds=5, out=tmp_path)
    assert "plan" not in (tmp_path / "looks.json").read_text()
    with pytest.raises(ValueError, match=r"with seeds=5, not seeds=Sequential\(5, 12\)"):
        compare(out=tmp_path)
    assert not own_script.calls
    assert compare(seeds=6, out=tmp_path).details.looks == (5, 6)


@pytest.mark.parametrize("plan", [[5], [5, "12"], 5, {}, [5, 12.0]])
def test_damaged_plans_are_refused(plan, tmp_path, planned):
    looks = json.loads((planned / "looks.json").read_text())
    assert looks[0]["plan"] == [5, 12]
    (tmp_path / "looks.json").write_text(json.dumps([looks[0] | {"plan": plan}, *looks[1:]]))
    with pytest.raises(ValueError, match="verdicts drawn so far"):
        compare(out=tmp_path)
    (tmp_path / "looks.json").write_text(json.dumps([{**looks[0], "plan": [5, 13]}, *looks[1:]]))
    with pytest.raises(ValueError, match="lists looks of several plans"):
        compare(out=tmp_path)


# ---- The race ----


def test_a_race_takes_the_grids_rate_with_fewer_trials(raced):
    grid, (race, _) = compare(), raced
    assert race.details.best_rates == grid.details.best_rates == dict.fromkeys(ARMS, 0.1)
    assert race.details.grid == grid.details.grid and race.details.tuning == "race"
    tuned = [(each.table["phase"] == "tuning").sum() for each in (race, grid)]
    assert tuned[1] == 4 * 4 * 3 and tuned[0] < 0.8 * tuned[1]
    # What both have run is equal, and so are the verdicts.
    merged = race.table.merge(
        grid.table, how="left", on=["arm", "learning_rate", "seed"], suffixes=("", "_grid")
    )
    np.testing.assert_array_equal(merged["final_metric"], merged["final_metric_grid"])
    assert race.verdicts == grid.verdicts and race.verdict() == grid.verdict()


def test_a_race_and_a_grid_share_a_folder(tmp_path, raced):
    grid = compare(out=tmp_path, tuning="grid")
    assert same(raced[0], compare(out=tmp_path, tuning="race")) and not own_script.calls
    assert same(grid, compare(out=tmp_path, tuning="grid")) and not own_script.calls
    status = study.read_status(tmp_path)
    assert status.finished == status.wanted == len(grid.table)


def test_a_race_grows_at_its_edge():
    comparison = compare(learning_rates=[0.01, 0.03], growth=3, tuning="race", seeds=5)
    assert comparison.details.best_rates["base"] == 0.09 and not any(comparison.details.on_edge.values())
    assert compare(learning_rates=[0.01, 0.03], growth=0, tuning="race", seeds=5).details.on_edge["base"]


def test_the_best_arm_of_a_race_is_that_of_its_best_rates():
    def function(run):
        # The first tuning seed is the easiest. Only "shallow" has rates that are good at it and drop out.
        slope = 0.3 if run.arm == "shallow" else 30.0
        away = abs(math.log10(run.learning_rate / 0.1)) * slope
        level = {"base": 20.0, "shallow": 10.4, "steep": 10.0}[run.arm]
        return level + away + 5.0 * (run.seed > 0) + 0.01 * noise(run.arm, run.learning_rate, run.seed)

    comparison = compare(function, dict.fromkeys(["base", "shallow", "steep"], arm), tuning="race", seeds=5)
    tuning = comparison.table.query("phase == 'tuning' and arm == 'shallow'")
    means = tuning.groupby("learning_rate")["final_metric"].mean()
    assert means.min() < means[0.1] and comparison.details.best_rates["shallow"] == 0.1
    assert comparison.verdict().arm == "steep"


def test_arms_are_compared_on_the_tuning_seeds_that_both_have():
    def function(run):
        # The later tuning seeds are hard. "sure" has one good rate, and needs two seeds to know it.
        hard = 5.0 * (run.seed == 2)
        if run.arm == "close":
            return 10.0 + hard + 0.001 * noise(run.learning_rate, run.seed)
        return 11.0 + hard + 5 * abs(math.log10(run.learning_rate / 0.1)) + 0.001 * noise(run.seed)

    arms = dict.fromkeys(["base", "sure", "close"], arm)
    comparison = compare(function, arms, tuning="race", seeds=5)
    tuning = comparison.table[comparison.table["phase"] == "tuning"]
    seeds = tuning.groupby("arm")["seed"].max()
    assert seeds["sure"] < seeds["close"] == 2
    assert comparison.verdict().arm == "close"


# ---- Shown ----


def assert_shown(comparison, folder):
    """Draws, writes and saves everything; nothing of it may be empty, NaN or None."""
    folder.mkdir(exist_ok=True)
    comparison.to_html(folder / "report.html")
    page = (folder / "report.html").read_text()
    words = re.sub(r"<style.*?</style>|<svg.*?</svg>|<[^>]*>", " ", page, flags=re.DOTALL)
    assert not re.search(r"\b(nan|None|inf)\b", words, re.IGNORECASE), re.search(
        r".{40}\b(nan|None|inf)\b.{40}", words, re.IGNORECASE
    )
    assert not re.search(r'="[^"]*\b(nan|None)\b', re.sub(r'="none"', "", page))
    for name in figures.PICTURES:
        for theme in ("light", "dark"):
            shown = comparison.plot(name, theme=theme)._repr_png_()  # what a notebook asks for
            assert shown.startswith(b"\x89PNG")
    comparison.plot()
    with pytest.raises(ValueError, match="theme"):
        comparison.plot("rates", theme="grey")
    comparison.to_csv(folder / "trials.csv")
    assert (folder / "trials.csv").read_text().count("\n") == len(comparison.table) + 1
    comparison.save(folder / "saved.npz")
    loaded = study.load(folder / "saved.npz")
    assert same(loaded, comparison) and repr(loaded) == repr(comparison)
    return " ".join(words.split())


def printed(comparison):
    console = Console(width=120, file=io.StringIO())
    comparison.print_summary(console)
    return console.file.getvalue()


def test_unequal_numbers_of_seeds_are_shown(raced, tmp_path):
    comparison = raced[0]
    words = assert_shown(comparison, tmp_path)
    stopped = seeds_by_arm(comparison)
    assert "2 steps, 12 of at most 12 fresh seeds" in words
    assert "for each of 5 to 12 fresh seeds (dots)" in words
    assert "3 simultaneous comparisons and for judging at 5 looks" in words
    assert all(f"0 of {count}" in words for count in stopped.values())
    assert "up to 3 tuning seeds" in words
    assert re.search(
        r"\d+ of 16 rates dropped out of the race, \d+ after 1 seed, \d+ after 2 seeds; their means", words
    )
    assert "(1 seed)" in words
    assert {arm: len(paired_differences(comparison, arm)) for arm in ("far", "same")} == {
        "far": 5,
        "same": 12,
    }
    assert np.isfinite(paired_differences(comparison, "far")).all()
    assert np.isnan(final_metrics(comparison)["far"][5:]).all()
    axes = comparison.plot("differences").axes[0]
    assert not [line for line in axes.lines if str(line.get_gid()).startswith("diverged")]
    assert "12 of at most 12 fresh seeds" in printed(comparison)
    assert list(comparison.summary["decision"]) == ["baseline", "better", "better", "undecided"]


def test_the_page_lists_the_looks_of_the_plan(raced):
    table = looks_table(raced[0])
    assert [cell.text for cell in table.rows[0]] == ["1 of 5", "5", f"{5 * PLAN.spent[0]:.2g} %", "1"]
    assert [row[1].text for row in table.rows] == ["5", "6", "8", "10", "12"]
    assert table.rows[-1][2].text == "5 %" and sum(int(row[3].text) for row in table.rows) == 2


def test_what_to_do_next_keeps_the_plan(raced):
    comparison = dataclasses.replace(raced[0], details=dataclasses.replace(raced[0].details, baseline="base"))
    undecided = dataclasses.replace(
        comparison,
        table=comparison.table[comparison.table["arm"].isin(["base", "same"])],
        details=dataclasses.replace(comparison.details, arms=("base", "same")),
    )
    found = answer(undecided)
    assert found.answer == "Not decided" and "cannot be extended" in found.next_step
    assert re.fullmatch(
        r"study\.compare\(\.\.\., seeds=study\.Sequential\(5, \d+\), base_seed=\.\.\., out=\.\.\.\)",
        found.code[0],
    )
    command = "adaptive-optax compare m:task --seeds 5..12 --base-seed 3 --out folder --steps 2".split()
    called = dataclasses.replace(undecided.details, command=command)
    assert re.fullmatch(
        r"adaptive-optax compare m:task --steps 2 --seeds 5\.\.\d+ --base-seed BASE_SEED --out FOLDER",
        answer(dataclasses.replace(undecided, details=called)).code[0],
    )
    stopped = dataclasses.replace(undecided.details, looks=(5, 6))
    assert "goes on, up to 12 seeds" in answer(dataclasses.replace(undecided, details=stopped)).next_step
    called = dataclasses.replace(stopped, command=command)
    assert answer(dataclasses.replace(undecided, details=called)).code[0].endswith("--seeds 5..12")


def test_files_without_a_plan_still_load(raced):
    old = compare(seeds=5).info
    for name in ("sequential", "tuning", "wanted"):
        del old[name]
    details = study.Details.from_json(old)
    assert (details.sequential, details.tuning, details.wanted) == (None, "grid", {})
    info = raced[0].info
    assert study.Details.from_json(info).sequential == PLAN
    for wrong in (
        {"sequential": {"first": 5}}, {"sequential": {"first": 5, "most": 4}}, {"sequential": [5, 12]},
        {"sequential": {"first": 5, "most": 12.0}}, {"looks": [5, 7]}, {"wanted": {"base": [1]}},
        {"tuning": 3},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            study.Details.from_json(info | wrong)


def test_progress_grows_with_the_plan(capsys):
    comparison = compare(tuning="race", progress=True)
    shown = capsys.readouterr().err
    trials = len(comparison.table)
    assert f"{trials}/{trials} trials" in shown
    assert re.search(r"at least 36 trials of 2 steps; .*: about .* for these", " ".join(shown.split()))


def test_status_knows_what_the_plan_wants(tmp_path):
    whole = compare(tuning="race")
    with pytest.raises(KeyboardInterrupt):
        compare(tuning="race", out=tmp_path, most=len(whole.table) - 3)
    status = study.read_status(tmp_path)
    assert status.finished == status.wanted - 3 == len(whole.table) - 3
    assert status.table.loc["far", "to_judge"] == 5 and status.table.loc["same", "to_judge"] == 12
    with pytest.raises(KeyboardInterrupt):
        compare(tuning="race", out=tmp_path / "early", most=10)
    early = study.read_status(tmp_path / "early")
    console = Console(width=100, file=io.StringIO())
    early.print(console)
    assert f"{early.finished} of at least {early.wanted} trials, no verdict yet" in console.file.getvalue()
    assert "0 trials are running or waiting; the last trial finished" in console.file.getvalue()
    assert set(early.table["seeds"]) == {"tuning"} and (early.table["diverged"] == 0).all()
    assert (early.table["to_judge"] == 5).all() and (early.table["to_tune"] == 4).all()
    compare(tuning="race", out=tmp_path)
    console = Console(width=100, file=io.StringIO())
    study.read_status(tmp_path).print(console)
    assert (
        f"{len(whole.table)} of {len(whole.table)} trials, judged with 12 of at most 12"
        in console.file.getvalue()
    )


# ---- Arguments ----


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tuning": "halving"}, "tuning must be one of 'grid', 'race', got 'halving'"),
        ({"tuning": None}, "tuning must be one of"),
        ({"seeds": (5, 32)}, r"seeds must be an integer in .* \(or a study.Sequential\), got \(5, 32\)"),
        ({"seeds": 4}, "seeds must be"),
    ],
)
def test_wrong_arguments(changed, message):
    with pytest.raises(ValueError, match=message):
        compare(**changed)


def command(*arguments):
    words = ["compare", f"{own_script.__file__}:train", "--arms", ",".join(
        f"{name}={own_script.__file__}:{name}" for name in ("constant", "linear")
    ), "--rates", "0.1,0.3,1", "--steps", "20", "--margin", "0.01"]  # fmt: skip
    return CliRunner().invoke(app, [*words, *map(str, arguments)], terminal_width=80)


def test_the_command_takes_a_plan_and_a_race(tmp_path):
    outcome = command("--seeds", "5..8", "--tuning", "race", "--out", tmp_path)
    assert outcome.exit_code == 0, outcome.output
    details = study.load(tmp_path / "comparison.npz").details
    assert details.sequential == study.Sequential(5, 8) and details.tuning == "race"
    assert command("--seeds", "8", "--out", tmp_path).exit_code == 2


@pytest.mark.parametrize("seeds", ["many", "5..", "..8", "5..8..9", "5.5", "", "8..5", "3..8"])
def test_wrong_seeds_in_a_command(seeds):
    outcome = command("--seeds", seeds)
    assert outcome.exit_code == 2
    assert re.search(
        r"--seeds must be a number, or first\.\.most|(first|most) must be an integer", outcome.output
    )
