"""Reading runs and writing their report."""

import json
import math
import os
import shutil
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from hf_ebft import EBFTTrainer
from hf_ebft.commands.report import main
from hf_ebft.evaluation.callbacks import RolloutWatcher
from hf_ebft.report import (
    Run,
    Sample,
    Watched,
    charts_of,
    load_run,
    load_runs,
    render_page,
    write_pngs,
)
from hf_ebft.report.plots import MOST_POINTS
from hf_ebft.watching.charts import N_SERIES
from hf_ebft.watching.curves import Series, smooth
from tests.support.plots import axes_of, curves_of
from tests.support.tiny import config, texts, tiny_llama

HOSTILE = '<script>alert("1")</script><img src=x onerror=y> & \' {} %s'
VOID = ("meta", "br", "line", "link", "img")


class Reader(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    return reader


def log_of(steps: int, *, start: float = 1.0) -> list[dict[str, Any]]:
    log = [
        {
            "step": step,
            "epoch": step / 10,
            "loss": 0.1,
            "ebft/cfm_loss": start - 0.01 * step,
            "ebft/alignment": 0.5,
            "ebft/seconds_rollout": 1.0,
            "ebft/seconds_features": 1.0,
            "ebft/seconds_training": 2.0,
        }
        for step in range(1, steps + 1)
    ]
    return [*log, {"step": steps, "eval_loss": 2.5, "eval_runtime": 3.0}]


def write_state(folder: Path, log: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "trainer_state.json"
    path.write_text(json.dumps({"log_history": log}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run, resumed once, with event files, checkpoints and a saved model."""
    pytest.importorskip("tensorboard")
    folder = tmp_path_factory.mktemp("runs") / "mine"
    for resume in (None, True):
        args = config(
            folder,
            max_steps=12 if resume else 8,
            save_strategy="steps",
            save_steps=4,
            report_to=["tensorboard"],
            temperature=0.9,
        )
        trainer = EBFTTrainer(tiny_llama(), args, train_dataset=texts(20, 25, 30, 20))
        trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.save_state()
    return folder


def test_a_run_is_the_same_from_its_state_its_events_and_its_checkpoint(trained: Path) -> None:
    state = load_run(trained / "trainer_state.json")
    assert state.last_step == 12
    assert len(state.series["ebft/cfm_loss"]) == 12
    assert state.arguments["temperature"] == 0.9
    checkpoint = load_run(trained / "checkpoint-12")
    (trained / "trainer_state.json").rename(trained / "hidden")
    try:
        whole = load_run(trained)
        events = load_run(trained / "runs")
    finally:
        (trained / "hidden").rename(trained / "trainer_state.json")
    for other in (checkpoint, whole, events):
        assert other.last_step == 12
        assert other.arguments["temperature"] == 0.9
        for name in ("loss", "ebft/cfm_loss", "ebft/entropy", "learning_rate"):
            assert other.series[name].steps == state.series[name].steps
            assert other.series[name].values == pytest.approx(state.series[name].values, rel=1e-5)


def test_the_furthest_source_counts(tmp_path: Path) -> None:
    write_state(tmp_path, log_of(5))
    write_state(tmp_path / "checkpoint-9", log_of(9))
    write_state(tmp_path / "checkpoint-10", log_of(10))
    run = load_run(tmp_path)
    assert run.last_step == 10
    assert run.source.endswith("checkpoint-10/trainer_state.json")


def written(path: Path, when: float) -> Path:
    """The same file, as if it had been written at a time."""
    os.utime(path, (when, when))
    return path


def test_a_second_run_in_the_folder_of_a_longer_one_is_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(write_state(tmp_path / "checkpoint-10", log_of(10)), 1000.0)
    written(write_state(tmp_path / "checkpoint-4", log_of(4, start=7.0)), 2000.0)
    for final in (False, True):
        if final:
            written(write_state(tmp_path, log_of(5, start=7.0)), 2001.0)
        run = load_run(tmp_path)
        assert run.last_step == 4 + final
        assert run.series["ebft/cfm_loss"].values[0] == 6.99
    assert "contains logs of several runs" in caplog.text
    assert str(tmp_path / "checkpoint-10" / "trainer_state.json") in caplog.text


def test_a_second_run_that_has_only_events_yet_is_shown(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(trained, folder)
    args = config(folder, max_steps=3, report_to=["tensorboard"], seed=9)
    EBFTTrainer(tiny_llama(), args, train_dataset=texts(20, 25, 30, 20)).train()
    run = load_run(folder)
    assert run.last_step == 3
    assert run.series["ebft/cfm_loss"].steps == (1, 2, 3)


def test_a_run_whose_clock_was_lost_shows_all_of_its_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Copies have the times of copying: what one run wrote last may look older."""
    written(write_state(tmp_path, log_of(10)), 1000.0)
    written(write_state(tmp_path / "checkpoint-5", log_of(5)), 2000.0)
    assert load_run(tmp_path).last_step == 10
    assert "several runs" not in caplog.text


def test_what_lies_beside_a_run_is_found(tmp_path: Path) -> None:
    write_state(tmp_path, log_of(5))
    sample = {"prefix": "a", "before": "b", "after": "c", "truth": "d"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n\n", encoding="utf-8")
    (tmp_path / "report.json").write_text('{"cfm_loss": {}}', encoding="utf-8")
    (tmp_path / "training_args.json").write_text('{"stride": 8}', encoding="utf-8")
    run = load_run(tmp_path)
    assert run.samples == [Sample("a", "b", "c", "d")]
    assert run.comparison == {"cfm_loss": {}}
    assert run.arguments == {"stride": 8}


def test_watched_prefixes_are_read_as_the_watcher_writes_them(tmp_path: Path) -> None:
    args = config(tmp_path, max_steps=4)
    trainer = EBFTTrainer(tiny_llama(), args, train_dataset=texts(20, 20))
    watcher = RolloutWatcher(trainer, texts(20, 30), every_steps=2)
    trainer.add_callback(watcher)
    trainer.train()
    trainer.save_state()
    run = load_run(tmp_path)
    assert [look.step for look in run.watched] == [0, 0, 2, 2, 4, 4]
    for look, group in zip(run.watched[-2:], watcher.latest, strict=True):
        assert look.prefix == " ".join(map(str, group.prefix))
        assert look.rollout == " ".join(map(str, group.rollouts[0]))
        assert look.reward == pytest.approx(sum(group.rewards) / len(group.rewards))
    page = render_page([run])
    for look in run.watched:
        assert look.rollout in page


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    for name in ("a/out", "b/out"):
        write_state(tmp_path / name, log_of(3))
    runs = load_runs([tmp_path / "a/out", tmp_path / "b/out"])
    assert [run.name for run in runs] == ["a/out", "b/out"]
    twice = load_runs([tmp_path / "a/out"] * 2)
    assert len({run.name for run in twice}) == 2
    assert [run.name for run in load_runs([tmp_path / "a/out"], ["mine"])] == ["mine"]
    with pytest.raises(ValueError, match="1 runs but 2 names"):
        load_runs([tmp_path / "a/out"], ["x", "y"])


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing; name a run's output_dir"):
        load_run(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="save_state"):
        load_run(tmp_path)
    (tmp_path / "trainer_state.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is not JSON"):
        load_run(tmp_path)
    (tmp_path / "trainer_state.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="no list 'log_history'"):
        load_run(tmp_path)
    write_state(tmp_path, [])
    with pytest.raises(ValueError, match="contains no metrics"):
        load_run(tmp_path)
    write_state(tmp_path, log_of(3))
    (tmp_path / "samples.jsonl").write_text('{"prefix": "a"}', encoding="utf-8")
    with pytest.raises(ValueError, match="prefix, before, after and truth"):
        load_run(tmp_path)


def hostile_run(name: str = HOSTILE) -> Run:
    curve = Series((1, 2, 3), (1.0, math.nan, 0.5))
    return Run(
        name,
        {"ebft/cfm_loss": curve, HOSTILE: curve},
        {HOSTILE: HOSTILE, "stride": 8, "feature_model_name_or_path": HOSTILE},
        {HOSTILE: {"before": 1.0, "after": 2.0, "difference": 1.0, "low": 0.5, "high": 1.5}},
        [Sample(HOSTILE, HOSTILE + "\n\tx", HOSTILE, HOSTILE)],
        [Watched(step, HOSTILE, HOSTILE, HOSTILE, 0.5) for step in range(100)],
        HOSTILE,
    )


@pytest.mark.parametrize("count", [1, 2])
def test_the_page_is_well_formed_self_contained_and_escapes_everything(count: int) -> None:
    runs = [hostile_run(HOSTILE + str(number)) for number in range(count)]
    page = render_page(runs, title=HOSTILE)
    reader = read(page)
    assert not {"script", "img", "link", "iframe", "object"} & set(reader.tags)
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    outside = [
        value
        for name, value in reader.attributes
        if name in ("src", "href", "action") and not str(value).startswith("https://arxiv.org/")
    ]
    assert not outside
    assert "url(" not in page
    assert "@import" not in page
    assert reader.text.count(HOSTILE) > 10, "it is all there to read"


def test_the_page_says_what_matters(tmp_path: Path) -> None:
    write_state(tmp_path, log_of(30))
    run = load_run(tmp_path, "mine")
    text = read(render_page([run])).text
    assert "Nothing looks unhealthy" in text
    assert "lower is better" in text
    assert "higher is better" in text
    assert "Time of a micro-batch by phase" in text
    assert "0.965 \u2192 0.725" in text
    bad = Run("mine", dict(run.series) | {"ebft/entropy": Series((1, 2), (0.01, 0.01))})
    assert "The entropy has collapsed" in read(render_page([bad])).text


def test_settings_that_differ_stand_out() -> None:
    series = {"loss": Series((1, 2), (1.0, 2.0))}
    runs = [Run(name, series, {"stride": stride}) for name, stride in (("a", 8), ("b", 16))]
    page = render_page(runs)
    assert "<strong><code>8</code></strong>" in page
    assert "<strong><code>16</code></strong>" in page
    assert "<strong>" not in render_page(runs[:1]).split("Configuration</h2>")[1], "8: the default"
    assert "<strong><code>16</code></strong>" in render_page(runs[1:])


def test_what_a_run_does_not_have_leaves_no_empty_section() -> None:
    text = read(render_page([Run("r", {"loss": Series((1,), (1.0,))})])).text
    for heading in ("Samples", "Configuration", "Held-out text", "Time"):
        assert heading not in text
    with pytest.raises(ValueError, match="no run"):
        render_page([])


def test_runs_keep_their_colours_and_too_many_are_refused() -> None:
    long, other = Series((1, 2), (1.0, 2.0)), Series((1, 2), (3.0, 4.0))
    runs = [Run("a", {"loss": long}), Run("b", {"loss": long, "grad_norm": other})]
    charts = {chart.metric.name: chart.drawing for chart in charts_of(runs)}
    drawn = {
        name: [number for number in range(N_SERIES) if curves_of(axes_of(drawing), number)]
        for name, drawing in charts.items()
    }
    assert drawn == {"loss": [0, 1], "grad_norm": [1]}
    with pytest.raises(ValueError, match="12 runs are more than there are colours"):
        charts_of(runs * N_SERIES)


def test_long_curves_are_thinned_without_losing_extremes_or_gaps() -> None:
    values = [math.sin(step / 50) for step in range(5000)]
    values[1234], values[2345] = 9.0, -9.0
    values[3456] = math.nan
    run = Run("r", {"loss": Series(tuple(range(5000)), tuple(values))})
    (chart,) = charts_of([run], smoothing=0.9)
    faint, strong = sorted(curves_of(axes_of(chart.drawing), 0), key=lambda c: c.get_linewidth())
    drawn = dict(zip(faint.get_xdata(), faint.get_ydata(), strict=True))
    assert len(drawn) <= MOST_POINTS + 2
    assert (drawn[1234], drawn[2345]) == (9.0, -9.0)
    assert math.isnan(drawn[3456]), "broken at the gap"
    shown = strong.get_ydata()
    smoothed = [value for value in smooth(values, 0.9) if math.isfinite(value)]
    assert (min(shown), max(shown)) == pytest.approx((min(smoothed), max(smoothed)))


def test_own_metrics_are_shown_and_clocks_are_not() -> None:
    curve = Series((1, 2), (1.0, 2.0))
    names = ["my_score", "eval_bleu", "epoch", "eval_runtime", "train_samples_per_second"]
    charts = charts_of([Run("r", dict.fromkeys(names, curve))])
    assert [chart.name for chart in charts] == ["eval_bleu", "my_score"]


def test_pngs_are_pictures(tmp_path: Path) -> None:
    write_state(tmp_path / "a", log_of(30))
    write_state(tmp_path / "b", log_of(30, start=2.0))
    written = write_pngs(load_runs([tmp_path / "a", tmp_path / "b"]), tmp_path / "png")
    assert {path.name for path in written} == {
        "eval_loss.png",
        "ebft_cfm_loss.png",
        "ebft_alignment.png",
        "loss.png",
        "timing.png",
        "overview.png",
    }
    for path in written:
        image = pytest.importorskip("PIL.Image").open(BytesIO(path.read_bytes()))
        assert min(image.size) > 100
        assert len(image.convert("RGB").getcolors(10**6) or []) > 3


def test_the_command_writes_page_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_state(tmp_path / "a", log_of(3))
    page, pictures = tmp_path / "page.html", tmp_path / "png"
    main([str(tmp_path / "a"), "--output", str(page), "--png", str(pictures), "--title", "T"])
    assert "<title>T</title>" in page.read_text(encoding="utf-8")
    assert (pictures / "overview.png").exists()
    out = capsys.readouterr().out
    assert "a: note: Too few points for trends" in out
    with pytest.raises(FileNotFoundError, match="There is no"):
        main([str(tmp_path / "missing")])
    with pytest.raises(ValueError, match=r"smoothing=2\.0 must be at least 0"):
        main([str(tmp_path / "a"), "--smoothing", "2", "--output", str(page)])
