"""The pictures and the report of a comparison, made from synthetic comparisons that need no training."""

from __future__ import annotations

import dataclasses
import html.parser
import io
import math
import re

import matplotlib
import numpy as np
import pandas as pd
import pytest
import rich.console
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from adaptive_optax._core.drawing import THEMES
from adaptive_optax.study import Comparison, judged
from adaptive_optax.study.details import Details
from adaptive_optax.study.report import advice, figures, findings, pictures
from adaptive_optax.study.report import page as report

ARMS = {  # best rate, metric there, curvature in log10 rate, rate beyond which it diverges
    "adam:constant": (1e-3, 0.412, 0.06, 0.5),
    "adam:step": (1e-3, 0.401, 0.05, 0.5),
    "adam:exponential": (3e-3, 0.396, 0.04, 0.5),
    "adam:one_cycle": (1e-2, 0.371, 0.03, 0.5),
    "adamw:one_cycle": (1e-2, 0.372, 0.035, 0.05),
    "rmsprop": (1e-6, 0.436, 0.02, 0.02),
    "adam:constant:averaged": (3e-3, 0.411, 0.05, 0.05),
}
GRID = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]


def make(arms=ARMS, *, seeds=8, lost=(), shift=0.0, margin=None, spread=0.008, looks=None, **info):
    """Makes a comparison without training.

    `arms` as ARMS; those of `lost` always diverge; `shift` is added to every metric. "adam:one_cycle" has a
    grown grid, "rmsprop" one that grew and still has its best rate on the edge.
    """
    rng = np.random.default_rng(0)
    baseline = next(iter(arms))
    steps, windows = np.linspace(0, 2560, 17).astype(int), np.linspace(64, 2560, 40).astype(int)
    measured_at = np.linspace(1, 2497, 25).astype(int)
    rows, training, validation, telemetry = [], [], [], []
    grown = {arm: [] for arm in arms} | ({"adam:one_cycle": [0.1]} if "adam:one_cycle" in arms else {})
    grid = {arm: GRID + grown[arm] for arm in arms}
    if "rmsprop" in arms:
        grown["rmsprop"] = [3e-6, 1e-5, 3e-5]
        grid["rmsprop"] = grown["rmsprop"] + GRID

    def trial(phase, arm, rate, seed):
        best, level, curvature, limit = arms[arm]
        luck = np.random.default_rng(seed).normal(0, 2 * spread)
        final = level + curvature * np.log10(rate / best) ** 2 + luck + rng.normal(0, spread)
        diverged = arm in lost or rate >= limit or (rate >= limit / 4 and rng.random() < 0.15)
        part = steps / steps[-1]
        early = np.cos(part * np.pi / 2) ** 2 * 0.5 if "one_cycle" in arm else np.exp(-6 * part)
        early[0] = 1.0
        curve = final + (2.3 - final) * early + rng.normal(0, spread / 2, len(steps)) * (steps > 0)
        curve[-1] = final
        decay = np.exp(-6 * windows / windows[-1])
        train = 0.8 * final + (2.2 - 0.8 * final) * decay + rng.normal(0, 0.004, 40)
        if diverged:
            curve[5:], train[12:] = np.nan, np.nan
        scheduled = rate * np.exp(-2 * measured_at / 2560 * ("one_cycle" in arm))
        noise = np.random.default_rng(seed).normal(0, 0.1, 25)
        own = (1 + 3 * measured_at / 2560) * np.exp(noise)  # it rises by itself
        unknown = np.full(25, np.nan)
        limit = np.minimum(1e-6 * 4.0 ** np.minimum(measured_at, 20), 0.02) if "limited" in arm else unknown
        scheduled = np.fmin(scheduled, limit)
        fields = [scheduled, 0.4 * scheduled * own, 0.01 * own, unknown, limit, 0.5 / limit, 0 * limit + 0.3]
        seen = np.stack(fields, axis=1)
        reached = steps[np.argmax(curve <= 0.412)] if not diverged and (curve <= 0.412).any() else np.nan
        rows.append({
            "arm": arm, "phase": phase, "learning_rate": rate, "seed": seed,
            "final_metric": np.nan if diverged else final + shift,
            "best_metric": np.nan if diverged else curve.min() + shift,
            "best_step": int(steps[np.nanargmin(curve)]), "initial_metric": 2.3 + shift, "diverged": diverged,
            "steps_to_baseline": reached if phase == "verdict" else np.nan,
            "compilation": "per rate" if arm == "adamw:one_cycle" else "once",
            "error": "",
        })  # fmt: skip
        validation.append(curve + shift)
        training.append(train + shift)
        telemetry.append(seen)

    for arm in arms:
        for rate in grid[arm]:
            for seed in range(3):
                trial("tuning", arm, rate, seed)
    table = pd.DataFrame(rows)
    middle = table.assign(final_metric=table["final_metric"].fillna(9.0 + shift))
    best = {
        arm: float(middle[middle["arm"] == arm].groupby("learning_rate")["final_metric"].mean().idxmin())
        for arm in arms
    }
    for arm in arms:
        for seed in range(1000, 1000 + seeds):
            trial("verdict", arm, best[arm], seed)
    return Comparison(
        table=pd.DataFrame(rows),
        training_steps=windows,
        training_curves=np.array(training),
        validation_steps=steps,
        validation_curves=np.array(validation),
        telemetry_steps=measured_at,
        telemetry_curves=np.array(telemetry),
        details=Details.from_json({
            "task": "digits MLP", "baseline": baseline, "arms": list(arms), "steps": 2560, "tuning_seeds": 3,
            "seeds": seeds, "margin": margin, "best_rates": best, "grid": grid, "grown": grown,
            "on_edge": {arm: best[arm] in (min(grid[arm]), max(grid[arm])) for arm in arms},
            "looks": looks or [seeds], "mode": "scan", "chunk": 18, "devices": ["TFRT_CPU_0", "TFRT_CPU_1"],
            "versions": {"adaptive_optax": "0.2.0", "jax": "0.10.1", "optax": "0.2.8", "numpy": "2.4.6"},
            "command": ["adaptive-optax", "compare", "digits:task", "--arms", ",".join(arms)],
            "seconds": 173.4, "metric_name": "loss", "dataset": {"train": 1437, "validation": 360},
            "batch_size": 64, "parameters": 26122, "seconds_per_step": {},
        } | info),
    )  # fmt: skip


def changed(comparison, **details):
    """The same comparison with other details."""
    return dataclasses.replace(comparison, details=dataclasses.replace(comparison.details, **details))


def pick(*names):
    return {name: ARMS[name] for name in names}


TWO = pick("adam:constant", "adam:one_cycle")
THREE = pick("adam:constant", "adam:step", "rmsprop")
HOSTILE = "<script>alert(1)</script> & 'co' \"x\""
LONG = "[red]an arm whose name is far too long for a table[/red]"
TWELVE = {f"{name}{end}": values for end in ("", ", again") for name, values in list(ARMS.items())[:6]}


class Page(html.parser.HTMLParser):
    """Parses strictly: every tag that opens closes, in order."""

    VOID = {"meta", "wbr", "br", "hr", "link", "img"}

    def __init__(self, text):
        super().__init__()
        self.open, self.events, self.words, self.tables, self.attributes = [], [], [], [], []
        self.inside = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]
        self.events.append((tag, dict(attributes).get("class", "")))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in self.VOID:
            self.open.append((tag, dict(attributes).get("class", "")))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if any(tag in ("td", "th") for tag, _ in self.open):
            self.tables[-1][-1][-1] += data
        self.inside.append((list(self.open), data))
        self.words.append((*(self.open[-1] if self.open else ("", "")), data))

    def texts(self, tag, kind=None):
        return [data for where, what, data in self.words if where == tag and kind in (None, what)]

    def table(self, index):
        head, *rows = self.tables[index]
        return {row[0]: dict(zip(head, row, strict=True)) for row in rows}

    def heard(self, tag, kind):
        """All text inside the first element of this kind."""
        return "".join(text for where, text in self.inside if (tag, kind) in where)


def written_page(comparison, path):
    report.to_html(comparison, path)
    return path.read_text("utf-8")


@pytest.fixture(scope="module")
def full():
    return make(seeds=12)


@pytest.fixture(scope="module")
def source(full, tmp_path_factory):
    return written_page(full, tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="module")
def page(source):
    return Page(source)


def number(text):
    return float(text.split(" ")[0].rstrip("*⁺%").replace("−", "-"))


def close(text, value):
    """Whether a written number is `value` rounded to the digits that it has."""
    digits = text.split(" ")[0].rstrip("*⁺%").partition(".")[2]
    return abs(number(text) - value) <= 0.5001 * 10.0 ** -len(digits)


# ---- The page ----


def test_page_is_balanced_and_its_ids_are_unique(page):
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 100
    references = [value for _, name, value in page.attributes if name == "href"]
    references += re.findall(r"url\(([^)]*)\)", " ".join(value or "" for *_, value in page.attributes))
    assert len(references) > 100
    assert {reference.removeprefix("#") for reference in references} <= set(ids)


def test_page_refers_to_nothing_outside(source, page):
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.events}
    assert all(value.startswith("#") for _, name, value in page.attributes if name in ("href", "src"))
    assert all(value.startswith("#") for value in re.findall(r"url\(([^)]*)\)", source))
    assert "http" not in source and "@import" not in source


def test_page_opens_with_the_verdict_on_the_arm_that_did_best_in_tuning(full, page):
    kinds = [("p", "verdict"), ("svg", ""), ("table", "")]
    assert [page.events.index(kind) for kind in kinds] == sorted(page.events.index(kind) for kind in kinds)
    assert page.heard("p", "verdict") == f"Yes: {full.verdict().sentence}"
    assert full.verdict().arm == "adamw:one_cycle"


def test_page_has_one_line_for_each_other_arm(full, page):
    others = [v for arm, v in full.verdicts.items() if arm != full.verdict().arm]
    sentences = [text for text in page.texts("span", "") if " seeds" in text and text.endswith(".")]
    assert sentences == [v.sentence for v in others]
    marks = [kind.split()[1] for tag, kind in page.events if tag == "span" and kind.startswith("decision")]
    assert marks == [v.decision for v in others]


def test_verdict_table_says_what_was_judged(full, page):
    table, statistics, metrics = page.table(0), page.table(1), findings.final_metrics(full)
    assert list(table) == list(ARMS)
    assert list(statistics) == list(ARMS)[1:]
    assert table["adam:constant"]["decision"] == "baseline"
    for arm, v in full.verdicts.items():
        row = table[arm] | statistics[arm]
        assert row["decision"] == v.decision
        assert close(row["difference"], v.effect)
        assert close(row["in per cent"], 100 * v.relative_effect)
        assert close(row["difference of the bestanywhere in the run; flatters noisy arms"], v.best_effect)
        named = {"interval": v.interval, "95 % intervalthis arm alone": v.interval_95}
        for heading, ends in (named | {"bootstrap 95 %this arm alone": v.bootstrap}).items():
            assert all(map(close, row[heading].split(" to "), ends))
        mean, error = row["lossmean ± standard error"].split(" ± ")
        assert close(mean, np.nanmean(metrics[arm]))
        assert close(error, np.nanstd(metrics[arm], ddof=1) / math.sqrt(np.isfinite(metrics[arm]).sum()))
        assert row["diverged"] == f"{v.diverged[0]} of {v.seeds}"
        needed = row["seeds neededfor a chance of 80 %"]
        assert needed == (str(v.seeds_needed or "too many") if v.decision == "undecided" else "–")
    assert {v.decision for v in full.verdicts.values()} >= {"better", "worse", "undecided"}
    stars = {arm for arm, row in table.items() if row["best peak rate"].endswith("*")}
    assert stars == {arm for arm, on_edge in full.info["on_edge"].items() if on_edge} == {"rmsprop"}


def tuning_of(page):
    """The rates and what is written at them, by arm; and the rates in bold."""
    arms, bold, item = {}, {}, None
    for where, text in page.inside:
        if not any(kind == "tuning" for _, kind in where) or not text.strip():
            continue
        if ("h3", "") in where:
            arm = text
            arms[arm], bold[arm] = {}, None
        elif where[-1][0] == "span":
            item = number(text)
            if ("li", "strong") in where:
                bold[arm] = item
        else:
            arms[arm][item] = text.strip()
    return arms, bold


def test_tuning_table_has_every_rate_that_was_tried(full, page):
    (table, bold), info = tuning_of(page), full.info
    tuning = full.table[full.table["phase"] == "tuning"]
    for arm in ARMS:
        assert list(table[arm]) == info["grid"][arm]
        for rate, text in table[arm].items():
            trials = tuning[(tuning["arm"] == arm) & (tuning["learning_rate"] == rate)]
            if lost := trials["diverged"].sum():
                assert text.rstrip("⁺") == f"{lost} of 3 diverged"
            else:
                assert close(text, trials["final_metric"].mean())
            assert ("⁺" in text) == (rate in info["grown"][arm])
            assert text.endswith("*") == (arm == "rmsprop" and rate == info["best_rates"][arm])
    assert "3 of 3 diverged" in table["rmsprop"].values()
    assert bold == info["best_rates"]


def test_page_says_what_the_interval_covers_and_how_it_was_run(full, page):
    text = " ".join(" ".join(page.texts(tag)) for tag in ("p", "dd", "code", "li", "summary"))
    text += page.heard("p", "chosen")
    text = re.sub(r"\s+", " ", text)
    for phrase in (
        "Variation between seeds:", "these tuned rates", "this split of the data",
        "tuning and verdict share the validation set", "allow for 6 simultaneous comparisons", "jax 0.10.1",
        "1 × TFRT_CPU_0", "a whole trial in one compiled loop", "18 trials at a time", "2,560 steps",
        "12 fresh", "batches of 64", "1,437 training and 360 validation", "26,122", "2 min 53 s",
        "adaptive-optax compare digits:task", "once per rate: adamw:one_cycle",
        f"All {len(full.table)} trials", "An arm is one way to train",
        "Of the 6 arms besides adam:constant, adamw:one_cycle did best in tuning.",
    ):  # fmt: skip
        assert phrase in text, phrase
    assert len(page.tables[-1]) == 1 + len(full.table)


def test_looks_are_listed_with_what_they_cost(tmp_path):
    page = Page(written_page(make(TWO, looks=[5, 8]), tmp_path / "r.html"))
    assert page.tables[2][1:] == [["1", "5", "2.5 %"], ["2", "8", "1.25 %"]]


def test_every_picture_is_there_in_both_themes(source, page):
    wrappers = [kind for tag, kind in page.events if tag == "div" and kind in THEMES]
    assert wrappers == ["light", "dark"] * 4
    assert len([tag for tag, _ in page.events if tag == "svg"]) == 8
    for theme in THEMES.values():
        assert source.count(f"fill: {theme.ink}") > 10
    hidden = re.search(
        r"\.dark \{ display: none; \}\s*@media \(prefers-color-scheme: dark\) \{[^@]*?\}\s*\}", source
    )
    assert hidden and ".light { display: none; }" in hidden.group()


def test_names_are_escaped(tmp_path):
    formula = "_$\\nope$"  # as mathematics it would be an error
    arms = {HOSTILE: ARMS["adam:constant"], formula: ARMS["adam:step"], "日本 --> ": ARMS["rmsprop"]}
    comparison = make(arms, task=HOSTILE, metric_name="<i>", devices=["<b>"], versions={"<u>": "&lt;"})
    page = Page(written_page(comparison, tmp_path / "r.html"))
    assert not {"script", "b", "i", "u"} & {tag for tag, _ in page.events}
    assert list(page.table(0)) == list(arms)
    assert any(text.startswith(HOSTILE) for text in page.texts("h1"))
    assert page.texts("text").count(formula) == 8  # three legends and a row, in two themes
    names = {formula: ARMS["adam:constant"], "plain": ARMS["rmsprop"]}
    figures.plot(make(names, metric_name=formula)).draw_without_rendering()


def test_page_is_the_same_whatever_matplotlib_is_set_to(tmp_path):
    comparison = make(TWO)
    first = written_page(comparison, tmp_path / "a.html")
    with matplotlib.rc_context({"font.size": 30.0, "svg.fonttype": "path", "lines.linewidth": 9.0}):
        assert written_page(comparison, tmp_path / "b.html") == first
        assert matplotlib.rcParams["font.size"] == 30.0


def test_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "report.html"
    comparison = make(TWO)
    report.to_html(comparison, str(path))
    before = path.read_bytes()
    monkeypatch.setattr(report.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.to_html(make(TWO, seeds=9), path)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="path must be a file to write, got the folder"):
        report.to_html(comparison, tmp_path)


# ---- Comparisons that are not as they should be ----


def check_everything(comparison, tmp_path):
    """Makes all that can be made of a comparison."""
    page = Page(written_page(comparison, tmp_path / "r.html"))
    figure = figures.plot(comparison)
    figure.draw_without_rendering()
    console = rich.console.Console(width=80, record=True, file=io.StringIO())
    report.print_summary(comparison, console)
    return page, figure.axes, console.export_text()


def test_an_arm_that_always_diverges(tmp_path):
    comparison = make(THREE, lost=["rmsprop"])
    page, (rates, differences, curves, _), text = check_everything(comparison, tmp_path)
    row = page.table(0)["rmsprop"]
    assert row["difference"] == row["interval"] == "–"
    assert (row["diverged"], row["lossmean ± standard error"], row["decision"]) == ("8 of 8", "–", "worse")
    assert "rmsprop: 8 of 8 trials diverged" in " ".join(text.split())
    crosses = line(rates, "diverged-0").get_xdata()
    assert crosses.tolist() == comparison.info["grid"]["rmsprop"]
    assert np.ptp(differences.get_xlim()) < 0.2  # not the range of the arm that is off the scale
    assert line(differences, "seeds-1").get_xdata().size == 0
    assert [a.get_label() for a in curves.lines if a.get_label() in THREE] == ["adam:constant", "adam:step"]


def test_nothing_but_divergence(tmp_path):
    page, _, text = check_everything(make(TWO, lost=list(TWO)), tmp_path)
    assert "nothing was measured" in page.heard("p", "verdict")
    assert page.texts("code")[0].endswith(" --rates 1e-06,3.3e-06,1e-05,3.3e-05")
    assert "Not decided: " in text and "Next: compare at lower learning rates" in text
    assert {row["diverged"] for row in page.table(0).values()} == {"8 of 8"}


def test_negative_metrics_with_a_margin(tmp_path):
    comparison = make(THREE, shift=-3.0, margin=0.01)
    page, axes, _ = check_everything(comparison, tmp_path)
    assert [a.get_yscale() for a in axes] == ["linear"] * 3 + ["log"]
    assert number(page.table(0)["adam:constant"]["lossmean ± standard error"]) < -2
    assert page.table(0)["rmsprop"]["in per cent"] == "–"
    assert zone_of(axes[1]) == pytest.approx((-0.01, 0.01))


def test_what_cannot_be_judged_is_reported_with_the_reason(tmp_path):
    comparison = make(THREE, shift=-3.0)
    with pytest.raises(ValueError, match="margin must be given") as error:
        _ = comparison.verdicts
    page, axes, text = check_everything(comparison, tmp_path)
    assert page.heard("p", "verdict") == f"Not judged: {error.value}"
    assert page.texts("code")[0].endswith(" --margin MARGIN")
    python = changed(comparison, command=["train.py"])
    assert asked(python).code == ["comparison.with_margin(...).verdict()"]
    assert " ".join(text.split()).startswith(f"Not judged: {' '.join(str(error.value).split())}")
    assert {row["decision"] for row in page.table(0).values()} == {"baseline", "not judged"}
    assert "interval" not in page.table(0)["rmsprop"]
    assert not [artist for artist in axes[1].lines if str(artist.get_gid()).startswith("interval")]
    assert line(axes[1], "seeds-0").get_xdata().size == 8


def test_a_comparison_that_was_stopped_early(tmp_path):
    whole = make(TWO)
    rows = np.flatnonzero(whole.table["phase"] == "tuning")[:20]
    curves = {
        f"{name}_curves": getattr(whole, f"{name}_curves")[rows]
        for name in ("training", "validation", "telemetry")
    }
    comparison = dataclasses.replace(whole, table=whole.table.iloc[rows], **curves)
    comparison = changed(comparison, best_rates={}, on_edge={})
    page, _, text = check_everything(comparison, tmp_path)
    assert page.table(0)["adam:one_cycle"]["best peak rate"] == "–"
    assert "not judged" in text


@pytest.mark.parametrize("scale", [1e-9, 1e7])
def test_metrics_far_from_one_keep_their_digits(scale, tmp_path):
    comparison = make(TWO)
    columns = ["final_metric", "best_metric", "initial_metric"]
    table = comparison.table.assign(**{name: scale * comparison.table[name] for name in columns})
    curves = {
        f"{name}_curves": scale * getattr(comparison, f"{name}_curves") for name in ("training", "validation")
    }
    comparison = dataclasses.replace(comparison, table=table, **curves)
    page, *_ = check_everything(comparison, tmp_path)
    assert number(page.table(0)["adam:one_cycle"]["difference"]) == pytest.approx(
        comparison.verdict().effect, rel=1e-3
    )


# ---- The pictures ----


def line(axes, gid):
    return next(artist for artist in axes.lines if artist.get_gid() == gid)


def zone_of(axes):
    zone = next(artist for artist in axes.collections if artist.get_gid() == "zone-0")
    x = zone.get_paths()[0].vertices[:, 0]
    return x.min(), x.max()


def drawn(draw, comparison, **options):
    axes = Figure().subplots()
    draw(comparison, axes, **options)
    return axes


def test_rates_are_drawn_as_in_the_table(full):
    axes = drawn(pictures.plot_rates, full)
    tuning = full.table[full.table["phase"] == "tuning"].groupby(["arm", "learning_rate"])
    low, high = axes.get_ylim()
    for i, arm in enumerate(ARMS):
        mean, lost = tuning["final_metric"].mean()[arm], tuning["diverged"].sum()[arm]
        curve = next(artist for artist in axes.lines if artist.get_label() == arm)
        np.testing.assert_array_equal(curve.get_xdata(), mean.index)
        np.testing.assert_allclose(curve.get_ydata(), mean.where(lost == 0))
        ring = line(axes, f"best-{i}")
        best = full.info["best_rates"][arm]
        np.testing.assert_allclose([*ring.get_xdata(), *ring.get_ydata()], [best, mean[best]])
        assert low < mean[best] < high
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert high < 0.6  # the worst means are far above, and would flatten the rest
    crosses = line(axes, "diverged-0")
    lost = tuning["diverged"].sum()
    assert crosses.get_xdata().tolist() == lost["rmsprop"].index[lost["rmsprop"] > 0].tolist()
    assert 0.9 < crosses.get_ydata()[0] < 1


def test_differences_are_drawn_as_in_the_table(full):
    axes = drawn(pictures.plot_differences, full)
    fresh = full.table[full.table["phase"] == "verdict"].pivot(
        index="seed", columns="arm", values="final_metric"
    )
    low, high = axes.get_xlim()
    for row, (arm, verdict) in enumerate(full.verdicts.items()):
        expected = (fresh[arm] - fresh["adam:constant"]).dropna()
        dots = line(axes, f"seeds-{row}").get_xdata()
        np.testing.assert_allclose(dots, expected)
        np.testing.assert_allclose(line(axes, f"interval-{row}").get_xdata(), verdict.interval)
        assert low < dots.min() and dots.max() < high
    words = [text.get_text() for text in axes.texts]
    assert words[::2] == list(ARMS)[1:]
    assert words[1].split()[0] == full.verdicts["adam:step"].decision
    assert zone_of(axes) == pytest.approx(np.array([-0.01, 0.01]) * fresh["adam:constant"].mean())


def test_a_seed_that_diverged_is_a_cross_at_the_edge():
    comparison = make(TWO)
    fresh = np.flatnonzero(
        (comparison.table["phase"] == "verdict") & (comparison.table["arm"] == "adam:one_cycle")
    )
    comparison.table.loc[fresh[0], ["final_metric", "diverged"]] = [np.nan, True]
    axes = drawn(pictures.plot_differences, comparison)
    assert line(axes, "seeds-0").get_xdata().size == 7
    assert line(axes, "diverged-0").get_xdata()[0] > 0.9 * axes.get_xlim()[1] > 0


@pytest.mark.parametrize("metric_name", ["loss", "error rate"])
def test_curves_are_means_at_the_best_rates(full, metric_name):
    comparison = make(seeds=12, metric_name=metric_name)
    axes = drawn(pictures.plot_curves, comparison)
    other = axes if metric_name == "loss" else axes.figure.axes[1]
    dotted = [artist for artist in other.lines if artist.get_linestyle() == ":"]
    assert len(dotted) == len(ARMS)
    for arm, training in zip(ARMS, dotted, strict=True):
        curve = next(artist for artist in axes.lines if artist.get_label() == arm)
        table = comparison.table
        rows = np.flatnonzero((table["phase"] == "verdict") & (table["arm"] == arm) & ~table["diverged"])
        np.testing.assert_allclose(curve.get_ydata(), comparison.validation_curves[rows].mean(axis=0))
        pairs = comparison.training_curves[rows].reshape(-1, 20, 2)  # 40 windows are more than 25
        np.testing.assert_allclose(training.get_ydata(), pairs.mean(axis=(0, 2)))
        np.testing.assert_array_equal(training.get_xdata(), comparison.training_steps[1::2])
        low, high = axes.get_ylim()
        assert low < curve.get_ydata()[-1] < high < 1


def test_effective_rates_are_means_at_the_best_rates(full):
    axes = drawn(pictures.plot_effective_rates, full)
    field = 1
    for arm in ARMS:
        curve = next(artist for artist in axes.lines if artist.get_label() == arm)
        table = full.table
        rows = np.flatnonzero((table["phase"] == "verdict") & (table["arm"] == arm) & ~table["diverged"])
        expected = full.telemetry_curves[rows, :, field].mean(axis=0)
        np.testing.assert_allclose(curve.get_ydata(), expected)
        np.testing.assert_array_equal(curve.get_xdata(), full.telemetry_steps)
        rate = full.info["best_rates"][arm]
        assert any(
            artist.get_linestyle() == ":" and artist.get_ydata()[0] == pytest.approx(rate, rel=1e-2)
            for artist in axes.lines
        )
    # 1 + 3 t from the first to the last quarter: means 1.36 and 3.56 for measurements 0 .. 5 and 19 .. 24.
    assert findings.own_change(full, "adam:constant") == pytest.approx(3.46 / 1.3, rel=0.1)
    assert findings.own_change(full, "adam:one_cycle") == pytest.approx(3.46 / 1.3, rel=0.1)


def test_steps_at_which_the_parameters_stand_still_are_left_out():
    comparison = make(TWO)
    curves = comparison.telemetry_curves.copy()
    curves[:, 1::2, 1:3] = 0.0  # as between the emissions of `accumulate_gradients`
    still = dataclasses.replace(comparison, telemetry_curves=curves)
    (curve, *_), (whole, *_) = (drawn(pictures.plot_effective_rates, c).lines for c in (still, comparison))
    np.testing.assert_allclose(curve.get_ydata(), whole.get_ydata()[::2])
    np.testing.assert_array_equal(curve.get_xdata(), whole.get_xdata()[::2])
    changes = [findings.own_change(c, "adam:constant") for c in (still, comparison)]
    assert changes[0] == pytest.approx(changes[1], rel=0.1)


def test_an_optimizer_that_tells_no_learning_rate_has_an_effective_one():
    comparison = make(TWO)
    curves = comparison.telemetry_curves.copy()
    curves[..., 0] = np.nan
    comparison = dataclasses.replace(comparison, telemetry_curves=curves)
    lines = drawn(pictures.plot_effective_rates, comparison).lines
    assert np.isfinite(lines[0].get_ydata()).all()
    assert np.isnan(findings.own_change(comparison, "adam:constant"))


LIMITED = {"adam:constant": ARMS["adam:constant"], "adam:constant:limited": (1.0, 0.41, 0.01, 1e3)}


def test_limits_are_drawn_next_to_the_edge_of_stability(tmp_path):
    comparison = make(LIMITED)
    axes = drawn(pictures.plot_limits, comparison)
    limit, edge = axes.lines
    assert limit.get_label() == "adam:constant:limited" and edge.get_linestyle() == ":"
    np.testing.assert_allclose(
        limit.get_ydata(), np.minimum(1e-6 * 4.0 ** np.minimum(comparison.telemetry_steps, 20), 0.02)
    )
    np.testing.assert_allclose(edge.get_ydata(), 4 * limit.get_ydata())
    assert findings.limits(comparison, "adam:constant") is None
    comparison.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figure>") == 5
    assert (
        "adam:constant:limited was limited in 100% of the measured steps, with a median error of 0.3." in page
    )


def test_a_limit_that_is_0_or_has_no_curvature_is_left_out():
    comparison = make(LIMITED)
    curves = comparison.telemetry_curves.copy()
    curves[:, -1, 4] = 0.0  # the end of a schedule
    curves[:, :, 5] = -1.0
    curves[:, :, 6] = np.nan
    comparison = dataclasses.replace(comparison, telemetry_curves=curves)
    found = findings.limits(comparison, "adam:constant:limited")
    assert found is not None and np.isnan(found.limit[-1]) and np.isfinite(found.limit[:-1]).all()
    assert np.isnan(found.edge).all() and np.isnan(found.error)
    assert "limits" in figures.pictures_of(comparison) and "limits" not in figures.pictures_of(make(TWO))
    comparison.plot("limits")


@pytest.mark.parametrize("theme", THEMES)
def test_twelve_arms_are_told_apart(theme):
    comparison = make(TWELVE)
    styles = pictures.arm_styles(comparison, theme)
    assert len(styles) == 12
    assert len({style["marker"] for style in styles.values()}) == 12
    seen = {(style["color"], style["linestyle"]) for style in styles.values()}
    assert len(seen) == 12
    assert styles["adam:constant"]["color"] == THEMES[theme].ink
    for draw in (pictures.plot_rates, pictures.plot_curves, pictures.plot_effective_rates):
        lines = {a.get_label(): a for a in drawn(draw, comparison, theme=theme).lines}
        assert {arm: lines[arm].get_marker() for arm in styles} == {
            arm: style["marker"] for arm, style in styles.items()
        }
        assert {to_hex(lines[arm].get_color()) for arm in styles} == {
            to_hex(style["color"]) for style in styles.values()
        }


@pytest.mark.parametrize("arms", [ARMS, TWELVE, TWO], ids=["seven", "twelve", "two"])
def test_no_text_covers_another(arms):
    comparison = make(arms, metric_name="negative log-likelihood")
    figure = figures.plot(comparison)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    texts = [*figure.legends[0].get_texts()]
    for axes in figure.axes:
        texts += [*axes.texts, axes.xaxis.label, axes.yaxis.label]
        texts += [text for text in axes.get_children() if isinstance(text, matplotlib.text.Text)]
        for i, axis in enumerate((axes.xaxis, axes.yaxis)):
            low, high = sorted(axis.get_view_interval())
            ticks = axis.get_ticklabels() if axis.get_visible() else []  # a twin's are not
            texts += [tick for tick in ticks if low <= tick.get_position()[i] <= high]
    texts = {id(text): text for text in texts if text.get_text().strip()}.values()
    boxes = [(text.get_text(), text.get_window_extent(renderer).padded(-1)) for text in texts]
    assert len(boxes) > 20
    for i, (first, box) in enumerate(boxes):
        for second, other in boxes[:i]:
            assert not box.overlaps(other), (first, second)
        assert box.x0 > 0 and box.x1 < figure.bbox.x1 and box.y0 > 0 and box.y1 < figure.bbox.y1, first


def test_a_figure_is_its_callers_and_pyplot_knows_nothing_of_it(tmp_path):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    comparison = make(THREE)
    figure = comparison.plot()
    assert isinstance(figure, Figure) and len(figure.axes) == 4
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(THREE)
    figure.savefig(tmp_path / "figure.png")
    comparison.to_html(tmp_path / "report.html")
    assert plt.get_fignums() == before == []


def test_details_of_an_earlier_version_are_read():
    saved = make(TWO).details.as_json()
    saved["seconds_a_step"] = {"scan": 0.5} | saved.pop("seconds_per_step")
    details = Details.from_json(saved)
    assert details.seconds_per_step == details.seconds_a_step == {"scan": 0.5}


@pytest.mark.parametrize("picture", figures.PICTURES)
def test_one_picture_can_be_drawn_alone(picture):
    figure = make(LIMITED if picture == "limits" else THREE).plot(picture)
    (axes,) = figure.axes
    shown = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    named = [*shown, *(text.get_text() for text in axes.texts)]
    wanted = {"adam:constant:limited"} if picture == "limits" else {*THREE} - {make(THREE).details.baseline}
    assert wanted <= set(named)


def test_an_unknown_picture_is_refused():
    with pytest.raises(ValueError, match="picture must be one of 'rates', .* got 'losses'"):
        make(TWO).plot("losses")


@pytest.mark.parametrize("draw", [*figures.PICTURES.values(), figures.plot])
def test_an_unknown_theme_is_refused(draw):
    arguments = () if draw is figures.plot else (Figure().subplots(),)
    with pytest.raises(ValueError, match="theme must be one of 'light', 'dark', got 'blue'"):
        draw(make(TWO), *arguments, theme="blue")


# ---- The terminal ----


@pytest.mark.parametrize(
    "arms", [ARMS, TWELVE, {**TWO, LONG: ARMS["rmsprop"]}], ids=["seven", "twelve", "long"]
)
def test_summary_fits_in_80_columns_and_says_all(arms):
    comparison = make(arms, metric_name="negative log-likelihood", shift=-3.0, margin=0.01)
    console = rich.console.Console(width=80, record=True, file=io.StringIO())
    report.print_summary(comparison, console)
    text = console.export_text()
    assert max(map(len, text.partition("    tx = ")[0].splitlines())) <= 80
    words = " ".join(text.split())
    answer = {"better": "Yes", "undecided": "Not decided"}[comparison.verdict().decision]
    assert words.startswith(" ".join(f"{answer}: {comparison.verdict().sentence}".split()))
    for arm, verdict in comparison.verdicts.items():
        assert " ".join(verdict.sentence.split()) in words
        low, high = verdict.interval
        assert any(
            arm.startswith(row.split()[0]) for row in text.splitlines() if f"{low:+.4f} to {high:+.4f}" in row
        )


def test_a_comparison_prints_its_summary(capsys):
    comparison = make(TWO)
    comparison.print_summary()
    assert " ".join(comparison.verdict().sentence.split()) in " ".join(capsys.readouterr().out.split())


def shown_at(width, comparison):
    console = rich.console.Console(width=width, record=True, file=io.StringIO())
    report.print_summary(comparison, console)
    return console.export_text().partition("    tx = ")[0].partition("    study.")[0]


@pytest.mark.parametrize("width", [30, 40, 60, 72])
def test_a_narrow_summary_keeps_arm_and_verdict(width):
    text = shown_at(width, make(TWO))
    assert max(map(len, text.splitlines())) <= width
    head = next(row for row in text.splitlines() if row.split()[:1] == ["arm"])
    assert head.split()[-1] == "verdict"
    table = "".join(text.split("verdict", 1)[1].split())
    for word in ("adam:", "baseline", "better"):
        assert word in table


def test_a_summary_shows_no_control_characters():
    hostile = "\x1b[2J\x07\r\ud800\u202e"
    names = {hostile: ARMS["adam:constant"], hostile + "b": ARMS["adam:step"]}
    text = shown_at(80, make(names, lost=[hostile], metric_name=hostile))
    text.encode()
    assert not set(text) & set(hostile.replace("[2J", ""))
    assert "\\x1b[2J" in text


# ---- The answer and what to do next ----


def asked(comparison):
    return advice.answer(comparison)


def test_the_answer_ends_in_what_to_do():
    won = make(TWO)
    assert asked(won).question == "does adam:one_cycle beat adam:constant?"
    assert (asked(won).answer, asked(won).sentence) == ("Yes", won.verdict().sentence)
    assert asked(won).next_step == "" and asked(won).code == [] and asked(won).why_not == ""
    assert asked(won).recommendation == won.recommend()
    assert won.recommend().code == 'tx = arms["adam:one_cycle"](0.01, 2560)'
    text = shown_at(200, won)
    assert text.rstrip().endswith("Use adam:one_cycle at a peak rate of 0.01.")
    assert text.count(won.verdict().sentence) == 1
    equal = make(TWO, margin=9.0)
    assert asked(equal).answer == "No" and "keep the baseline" in asked(equal).recommendation.reason
    assert asked(equal).recommendation.reason in shown_at(200, equal)
    lost = make({"adam:constant": ARMS["adam:constant"], "rmsprop": ARMS["rmsprop"]})
    assert asked(lost).answer == "No"
    assert asked(lost).recommendation.arm == "adam:constant"


def test_an_undecided_answer_names_the_call_that_adds_seeds():
    open_ended = make(pick("adam:constant", "adam:step"), seeds=5)
    needed = open_ended.verdict().seeds_needed
    assert needed > 5
    assert asked(open_ended).answer == "Not decided"
    own = changed(open_ended, command=["train.py"])
    assert asked(own).code == [f"study.compare(..., seeds={needed}, out=...)"]
    assert "out=, later calls train only new trials" in asked(own).next_step
    own = changed(own, out="runs/one")
    assert asked(own).code == [f'study.compare(..., seeds={needed}, out="runs/one")']
    command = ["bin/adaptive-optax", "compare", "m:t", "--seeds", "5", "--out", "o"]
    kept = changed(open_ended, command=command, out="o")
    assert asked(kept).code == [f"bin/adaptive-optax compare m:t --out o --seeds {needed}"]
    assert "only new trials are trained" in asked(kept).next_step


COMMAND = ["bin/adaptive-optax", "compare", "m:t", "--learning-rates", "0.1,1", "--maximize"]


def in_vain():
    comparison = make(pick("adam:constant", "rmsprop"), maximize=True)
    return changed(comparison, on_edge={"rmsprop": True})


@pytest.mark.parametrize(
    ("made", "options"),
    [
        (lambda: make(THREE, shift=-3.0), "--learning-rates 0.1,1 --maximize --margin MARGIN"),
        (lambda: make(TWO, lost=list(TWO)), "--maximize --rates 1e-06,3.3e-06,1e-05,3.3e-05"),
        (in_vain, "--learning-rates 0.1,1 --minimize"),
    ],
)
def test_a_command_is_told_a_command(made, options):
    comparison = made()
    comparison = changed(comparison, command=COMMAND)
    assert asked(comparison).code == [f"bin/adaptive-optax compare m:t {options}"]


@pytest.mark.parametrize("command", [["train.py"], COMMAND])
def test_what_cannot_be_judged_shows_the_differences(command):
    comparison = make(TWO, shift=-3.0, command=command)
    text = shown_at(80, comparison)
    difference = findings.paired_differences(comparison, "adam:one_cycle").mean()
    row = next(row for row in text.splitlines() if row.startswith(" adam:one_cycle"))
    assert row.endswith("not judged ") and f" {difference:+.4f} " in row


def test_what_was_judged_is_said_and_how_to_take_it(tmp_path):
    average = judged.Judged("the average of its parameters", "take the average", "x = ao.swap_averaged()")
    comparison = make(TWO, judged={"adam:one_cycle": list(average)})
    found = asked(comparison)
    code = found.recommendation.code.splitlines()
    assert code[0] == "import adaptive_optax as ao"
    assert code[-2:] == ["# After training, take the average.", average.code]
    page, _, text = check_everything(comparison, tmp_path)
    said = (
        "adam:one_cycle was judged by the average of its parameters; adam:constant by its trained parameters."
    )
    assert page.heard("p", "chosen").endswith(said)
    row = "adam:constant by its trained parameters; adam:one_cycle by the average of its parameters"
    assert row in page.texts("dd")
    assert "adam:one_cycle: judged by the average of its parameters" in " ".join(text.split())
    assert page.texts("code")[-len(code) :] == code and page.texts("code").count(code[-1]) == 1
    usual = Page(written_page(make(TWO), tmp_path / "u.html"))
    assert "was judged by" not in usual.heard("p", "chosen")
    assert "every arm by its trained parameters" in usual.texts("dd")


def test_a_comparison_is_shown_by_its_sentences():
    comparison = make(THREE)
    shown = repr(comparison)
    assert len(shown.splitlines()) == 4 and "array" not in shown
    for verdict in comparison.verdicts.values():
        assert verdict.sentence in shown
    assert shown.endswith("Best peak rates: adam:constant 0.001, adam:step 0.001, rmsprop 3e-06.")
    assert "margin must be given" in repr(make(THREE, shift=-3.0))
    stopped = repr(changed(comparison, looks=[], best_rates={}))
    assert stopped.startswith(f"Comparison of 3 arms, {len(comparison.table)} trials\n")
    assert "stopped before its verdict" in stopped and len(stopped.splitlines()) == 2


def counted(samples, whole=1.0, **keywords):
    """A comparison by the share of samples that are right."""
    comparison = make(TWO, maximize=True, dataset={"train": 100, "validation": samples}, **keywords)
    table = comparison.table
    for name in ("final_metric", "best_metric", "initial_metric"):
        right = np.clip(1 - table[name] / 3, 0, 1)
        table[name] = np.float32(whole) * np.round(right * samples).astype(np.float32) / np.float32(samples)
    return comparison


@pytest.mark.parametrize("whole", [1.0, 100.0])
def test_a_sample_that_weighs_as_much_as_the_difference_is_named(whole):
    few, many = counted(40, whole), counted(20_000, whole)
    assert advice.metric_step(few) == pytest.approx(whole / 40)
    assert advice.metric_step(many) == pytest.approx(whole / 20_000)
    (warning,) = asked(few).warnings
    assert f"One of the 40 validation samples changes the metric by {whole / 40:.3g}" in warning
    assert "margin of equivalence" in warning and "difference found" in warning
    assert asked(many).warnings == []
    assert math.isnan(advice.metric_step(make(TWO, dataset={"train": 100, "validation": 40})))


# ---- Metrics of which more is better ----


def mirrored(comparison):
    """The same comparison by a metric of the opposite sign, of which more is better."""
    table = comparison.table.copy()
    for name in ("final_metric", "best_metric", "initial_metric"):
        table[name] *= -1
    curves = -comparison.validation_curves
    return changed(dataclasses.replace(comparison, table=table, validation_curves=curves), maximize=True)


def test_more_is_better_everywhere(tmp_path):
    lower, higher = make(seeds=8, margin=0.004), mirrored(make(seeds=8, margin=0.004))
    assert higher.verdict().arm == lower.verdict().arm
    assert {a: v.decision for a, v in higher.verdicts.items()} == {
        a: v.decision for a, v in lower.verdicts.items()
    }
    page, (rates, differences, *_), text = check_everything(higher, tmp_path)
    whole = " ".join(text for _, text in page.inside)
    assert "Higher is better" in whole and "ower is better" not in whole
    assert "higher is better" in text
    label = differences.get_xlabel()
    assert label.index("worse") < label.index("better")
    low, high = rates.get_ylim()
    for arm, style in pictures.arm_styles(higher, "light").items():
        best = findings.tuned_rates(higher, arm).mean[findings.tuned_rates(higher, arm).best]
        assert low < best < high, style
    cross = make(TWO, lost=["adam:one_cycle"], maximize=True)
    axes = drawn(pictures.plot_differences, cross)
    assert line(axes, "diverged-0").get_xdata()[0] < 0


def test_where_training_was_in_vain_there_is_no_verdict(tmp_path):
    comparison = make(pick("adam:constant", "rmsprop"))
    rows = comparison.table["arm"] == "rmsprop"
    vain = comparison.table.assign(initial_metric=comparison.table["final_metric"].where(rows, 2.3))
    at_edge = dataclasses.replace(comparison, table=vain)
    verdict = at_edge.verdict()
    assert (verdict.decision, verdict.reason) == ("undecided", "untrained")
    assert "is no better after training" in verdict.sentence and "maximize=True" in verdict.sentence
    assert asked(at_edge).code[0].endswith(" --maximize")
    python = changed(at_edge, command=[])
    assert asked(python).code == ["study.Task(..., maximize=True)"]
    check_everything(at_edge, tmp_path)
    within = changed(at_edge, on_edge={})
    assert within.verdict().decision == "worse"
    base = {"rmsprop": ARMS["rmsprop"], "adam:constant": ARMS["adam:constant"]}
    rows = (comparison := make(base)).table["arm"] == "rmsprop"
    vain = comparison.table.assign(initial_metric=comparison.table["final_metric"].where(rows, 2.3))
    assert dataclasses.replace(comparison, table=vain).verdict().reason == "untrained"


def test_a_metric_that_is_not_finite_before_training_is_no_matter_of_rates(tmp_path):
    comparison = make(TWO, lost=list(TWO))
    assert "try lower learning rates" in comparison.verdict().sentence
    undefined = dataclasses.replace(comparison, table=comparison.table.assign(initial_metric=np.nan))
    verdict, found = undefined.verdict(), asked(undefined)
    assert (verdict.decision, verdict.reason) == ("undecided", "undefined metric")
    assert "even before training" in verdict.sentence and "diverged" not in verdict.sentence
    assert "evaluate the metric on the initial parameters" in found.next_step and not found.code
    check_everything(undefined, tmp_path)


@pytest.mark.parametrize("maximize", [False, True])
def test_a_heavy_tail_before_training_does_not_hide_that_every_seed_improved(maximize):
    comparison = mirrored(make(TWO, margin=0.01)) if maximize else make(TWO)
    comparison = changed(comparison, on_edge=dict.fromkeys(TWO, True))
    table, seeds = comparison.table, comparison.table["seed"].to_numpy() % 8
    final, sign = table["final_metric"].to_numpy(), -1 if maximize else 1

    def decided(change):
        before = table.assign(initial_metric=final + sign * change)
        return dataclasses.replace(comparison, table=before).verdict()

    assert decided(np.where(seeds, 1.0, 1e4)).reason == ""
    assert decided(np.where(seeds, 1.0, 1.01)).reason == ""
    # A mean that is better and seeds that are not: said as it is.
    mixed = decided(np.where(seeds, -0.01, 1e4))
    assert mixed.reason == "untrained" and "no better" not in mixed.sentence
    assert "is better after training" in mixed.sentence and "at only 1 of 8 seeds" in mixed.sentence
    assert f"maximize={not maximize}" in mixed.sentence
    assert "no better" in decided(-seeds % 3 - 3.0).sentence


# ---- Rates below zero ----


def with_rates(comparison, change):
    curves = comparison.telemetry_curves.copy()
    curves[..., 1] = change(curves[..., 1])
    return dataclasses.replace(comparison, telemetry_curves=curves)


@pytest.mark.parametrize("first", [1e-10, 1e3, -1.0])
def test_a_first_rate_far_from_the_others_does_not_squeeze_the_picture(first):
    comparison = make(TWO)
    far = with_rates(comparison, lambda rates: np.where(np.arange(25) == 0, first, rates))
    usual, axes = (drawn(pictures.plot_effective_rates, each) for each in (comparison, far))
    assert axes.get_yscale() == "log" and axes.get_ylim() == usual.get_ylim()


@pytest.mark.parametrize("mean", [-1e-3, 0.0])
def test_rates_below_zero_are_not_drawn_as_a_fall_to_nothing(mean):
    def noisy(rates):
        return np.where(np.arange(25) % 3 == 0, mean + 0 * rates, rates)

    comparison = with_rates(make(TWO), noisy)
    axes = drawn(pictures.plot_effective_rates, comparison)
    low, _ = axes.get_ylim()
    assert axes.get_yscale() == "linear" and low < mean
    assert line(axes, "zero").get_ydata()[0] == 0
    # A band that reaches below 0 is none of a fall either.
    wide = with_rates(
        make(TWO), lambda rates: rates * np.where(np.arange(len(rates)) % 8, 1e-3, 9.0)[:, None]
    )
    found = findings.effective_rates(wide, "adam:constant")
    axes = drawn(pictures.plot_effective_rates, wide)
    reaches_below = bool((found.mean - found.error <= 0).any())
    assert axes.get_yscale() == ("linear" if reaches_below else "log")
    assert drawn(pictures.plot_effective_rates, make(TWO)).get_yscale() == "log"


@pytest.mark.parametrize(
    ("factor", "said"),
    [(1.0, "did not change"), (1.04, "did not change"), (0.97, "did not change"),
     (1.06, "rose by a factor of 1.1"), (0.5, "fell by a factor of 2")],
)  # fmt: skip
def test_a_rate_that_stays_as_it_is_is_said_to(factor, said, tmp_path):
    comparison = make(TWO)
    curves = comparison.telemetry_curves.copy()
    curves[..., 1] = curves[..., 0] * np.where(np.arange(25) < 12, 1.0, factor)
    text = written_page(dataclasses.replace(comparison, telemetry_curves=curves), tmp_path / "r.html")
    assert f"the rate of adam:constant {said} from the first to the last quarter of the steps." in text


# ---- Files ----


def test_a_spreadsheet_finds_no_formula(tmp_path):
    names = ["=cmd|' /C calc'!A0", "+1", "-1", "@x", "\t=1", "plain", 'a\x1b[0m\ud800,"b"\n']
    comparison = make(dict(zip(names, ARMS.values(), strict=True)))
    comparison.to_csv(tmp_path / "trials.csv")
    table = pd.read_csv(tmp_path / "trials.csv")
    assert [*dict.fromkeys(table["arm"])] == [
        "'=cmd|' /C calc'!A0", "'+1", "'-1", "'@x", "'\\t=1", "plain", 'a\\x1b[0m\\ud800,"b"\\n',
    ]  # fmt: skip
    for name in ("final_metric", "learning_rate", "seed"):
        np.testing.assert_allclose(table[name], comparison.table[name])


def test_names_that_cannot_be_encoded_are_reported(tmp_path):
    names = dict(zip(["\ud800", "\u200b", "\u202eabc", "a\x00b\x1b"], ARMS.values(), strict=False))
    comparison = make(names, task="\udfff", command=["\udc80"], metric_name="\x1b")
    page, _, text = check_everything(comparison, tmp_path)
    assert list(page.table(0)) == ["\\ud800", "\\u200b", "\\u202eabc", "a\\x00b\\x1b"]
    text.encode()
