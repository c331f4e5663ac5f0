"""The replication: its text, its clock, its stages and its rules; a dry run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "studies"))

import python_text  # noqa: E402
import replication  # noqa: E402
import timed_training  # noqa: E402
from replication import Arm  # noqa: E402

from tests.support.tiny import tiny_llama, tiny_tokenizer  # noqa: E402

# ---- Text -----------------------------------------------------------------------------------


def tree(folder: Path) -> list[Path]:
    """Two folders of source, one inside of the other, as an installation has them."""
    inner = folder / "site-packages"
    files = {
        folder / "os.py": 600,
        folder / "empty.py": 0,
        folder / "notes.txt": 600,
        folder / "__pycache__" / "os.py": 600,
        inner / "sympy" / "core.py": 700,
        inner / "sympy" / "sets.py": 700,
        inner / "other" / "sympy" / "mine.py": 700,
        inner / "hf_ebft" / "trainer.py": 700,
    }
    for path, size in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x" * size)
    return [folder, inner]


def test_sources_are_found_once_and_told_apart(tmp_path: Path) -> None:
    """Neither small files, nor caches, nor this package; the domain by the first folder."""
    sources = python_text.find_sources(tree(tmp_path))
    by_name = {source.name: source.in_domain for source in sources}
    assert by_name == {
        "os.py": False,
        "sympy/core.py": True,
        "sympy/sets.py": True,
        "other/sympy/mine.py": False,
    }
    assert len(sources) == 4
    texts = [text for _, text in python_text.read(sources, 1000)]
    assert len(texts) == 2 and all(set(text) == {"x"} for text in texts)
    (tmp_path / "site-packages" / "sympy" / "core.py").unlink()
    (tmp_path / "site-packages" / "sympy" / "sets.py").unlink()
    with pytest.raises(ValueError, match="No file of the package sympy"):
        python_text.find_sources([tmp_path, tmp_path / "site-packages"])


def test_splits_are_shares_of_the_names() -> None:
    """Some 5 percent each are held out, whatever else is installed."""
    splits = [python_text.Source(f"sympy/{i}.py", Path()).split for i in range(4000)]
    shares = {name: splits.count(name) / 4000 for name in ("train", "tune", "report")}
    assert shares == pytest.approx({"train": 0.9, "tune": 0.05, "report": 0.05}, abs=0.012)


def test_rows_hold_the_text() -> None:
    """Packed with an EOS after each file, or cut from one file each."""
    tokenizer = tiny_tokenizer(eos_token="<eos>")
    texts = ["def f(x):\n    return x\n" * 3, "import os\n", "class A:\n    pass\n" * 4]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    stream = [token for some in ids for token in [*some, tokenizer.eos_token_id]]
    packed = python_text.packed_rows(tokenizer, texts, 8)
    assert packed.flatten().tolist() == stream[: len(stream) // 8 * 8]
    rows, files = python_text.cut_rows(tokenizer, texts, 8)
    for file, some in enumerate(ids):
        assert rows[files == file].flatten().tolist() == some[: len(some) // 8 * 8]
    assert rows.dtype == np.uint16 and rows.shape == (len(files), 8)


def test_spread_takes_every_file_first() -> None:
    """One row of each file before a second one of any."""
    files = np.array([0] * 10 + [1] * 2 + [2])
    chosen = python_text.spread(files, 4)
    assert sorted(set(files[chosen].tolist())) == [0, 1, 2] and len(set(chosen.tolist())) == 4
    assert python_text.spread(files, 99).tolist() == list(range(13))


# ---- Training -------------------------------------------------------------------------------


def test_clock_sets_the_rate_by_the_share_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up in a twentieth, down to zero; the first step is free, and the end is the limit's."""
    falling = timed_training.Clock(10.0, 2.0, True, torch.device("cpu"))
    steady = timed_training.Clock(10.0, 2.0, False, torch.device("cpu"))
    shares = (0.0, 0.025, 0.05, 0.525, 1.0)
    assert [falling.factor(s) for s in shares] == pytest.approx([0.1, 0.6, 1.0, 0.5, 0.0])
    assert [steady.factor(s) for s in shares] == pytest.approx([0.1, 0.6, 1.0, 1.0, 1.0])
    group: dict[str, float] = {}
    times = iter([100.0, 105.25, 110.0])
    monkeypatch.setattr(timed_training.time, "perf_counter", lambda: next(times))
    found = []
    for _ in range(3):
        control = SimpleNamespace(should_training_stop=False)
        optimizer = SimpleNamespace(param_groups=[group])
        falling.on_step_begin(None, None, control, optimizer=optimizer)
        falling.on_step_end(None, None, control)
        found.append((group["lr"], control.should_training_stop))
    assert [rate for rate, _ in found] == pytest.approx([0.2, 0.2, 1.0])
    assert [stop for _, stop in found] == [False, False, True]
    assert falling.seconds == 10.0


@pytest.mark.parametrize("method", ["sft", "ebft"])
def test_training_ends_by_the_clock(method: str) -> None:
    """And has moved the weights; both methods by the same function."""
    model = tiny_llama()
    before = model.lm_head.weight.detach().clone()
    rows = np.random.default_rng(0).integers(1, 61, (16, 24)).astype(np.uint16)
    settings = {"learning_rate": 1e-2, "per_device_train_batch_size": 4}
    if method == "ebft":
        settings |= {"stride": 8, "context_length": 8, "generate_max_len": 4}
    found = timed_training.train(
        model, rows, device=torch.device("cpu"), seconds=0.2, settings=settings, method=method
    )
    assert found["seconds"] >= 0.2 and found["steps"] >= 2
    assert found["document_tokens"] == found["steps"] * 4 * 24
    assert not torch.equal(model.lm_head.weight, before)


def test_cross_entropy_is_the_mean_over_tokens() -> None:
    """Against log-softmax by hand, in batches that do not fit evenly."""
    model = tiny_llama()
    rows = np.random.default_rng(0).integers(1, 61, (5, 9)).astype(np.uint16)
    ids = torch.from_numpy(rows.astype(np.int64))
    with torch.no_grad():
        scores = model.eval()(ids).logits[:, :-1].log_softmax(-1)
    expected = -scores.gather(2, ids[:, 1:, None]).mean()
    assert replication.cross_entropy(model.train(), rows, at_once=2) == pytest.approx(
        float(expected), rel=1e-5
    )
    assert model.training


# ---- Stages and rules -----------------------------------------------------------------------


def study(folder: Path, budget: float = 100.0) -> replication.Study:
    """With the tiny sizes."""
    return replication.Study(folder, folder / "work", replication.DRY, torch.device("cpu"), budget)


def test_a_stage_is_made_once(tmp_path: Path) -> None:
    """Unless what it left is gone; nothing is written of one that fails, none begins too late."""
    calls = []

    def make() -> dict[str, Any]:
        calls.append(1)
        (tmp_path / "leaf").touch()
        return {"figure": len(calls)}

    for _ in range(2):
        found = study(tmp_path).stage("one", 5, make, tmp_path / "leaf")
        assert found["figure"] == 1 and "stage_seconds" in found
    (tmp_path / "leaf").unlink()
    assert study(tmp_path).stage("one", 5, make, tmp_path / "leaf")["figure"] == 2

    def fails() -> dict[str, Any]:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        study(tmp_path).stage("two", 5, fails)
    with pytest.raises(replication.OutOfTimeError, match="three takes about 200 s"):
        study(tmp_path).stage("three", 200, make)
    assert [path.name for path in tmp_path.glob("*.*")] == ["one.json"]


def evaluation(**figures: float) -> dict[str, Any]:
    """Of one document that has them and one that has none."""
    return {"tune": {"by_document": {name: [value, None] for name, value in figures.items()}}}


def test_more_seeds_are_run_at_the_best_rates() -> None:
    """Of cross-entropy for SFT, of the CFM loss for EBFT, both on `tune`; after the sweep."""
    arms = replication.swept_arms()
    assert {(arm.method, arm.ce_coef) for arm in arms[:3]} == {
        ("sft", 0.0),
        ("ebft", 0.0),
        ("ebft", 0.1),
    }
    assert len({arm.name for arm in arms}) == len(arms)
    found: dict[Arm, dict[str, Any]] = {}
    for arm in arms:
        if any(other.is_swept and other not in found for other in arms):
            assert replication.repeated_arms(found) == []
        best = arm.rate == (1e-4 if arm.method == "ebft" else 1e-5)
        other = 1.0 if arm.is_swept else 0.0  # mixed arms do not choose the rate
        figure = 0.5 if best else other
        found[arm] = evaluation(**{"cross_entropy": figure, "cfm_loss@8": figure})
    again = replication.repeated_arms(found)
    assert [(arm.method, arm.rate, arm.seed) for arm in again] == [
        ("sft", 1e-5, 2),
        ("ebft", 1e-4, 2),
        ("sft", 1e-5, 3),
        ("ebft", 1e-4, 3),
    ]


def test_table_without_a_model(tmp_path: Path) -> None:
    """A call that came to nothing says so."""
    assert replication.table(study(tmp_path)) == "No model has been measured yet."


def test_full_run_is_sized_as_declared() -> None:
    """60 to 100 M parameters, hundreds of documents a step, less than nine minutes a call."""
    scale = replication.Scale()
    with torch.device("meta"):
        config = replication.LlamaConfig(
            vocab_size=scale.vocabulary, tie_word_embeddings=True, **scale.shape
        )
        model = replication.LlamaForCausalLM(config)
    assert 60e6 < sum(weight.numel() for weight in model.parameters()) < 100e6
    assert scale.ebft_batch >= 200 and scale.ebft_batch % scale.at_once == 0
    assert replication.BUDGET < 9 * 60 and scale.pretrain_seconds < 180
    assert scale.held_out[0] % scale.held_out[1] == 0


@pytest.mark.slow
def test_dry_run_and_a_second_call(tmp_path: Path) -> None:
    """All stages on the CPU, without `datasets`; a second call trains nothing."""
    script = str(ROOT / "studies" / "replication.py")
    hidden = "import sys, runpy; sys.modules.update(dict.fromkeys(['datasets', 'trl', 'evaluate']))"
    code = f"{hidden}; sys.path.insert(0, {str(ROOT / 'studies')!r})"
    code += f"; sys.argv = [{script!r}, '--dry-run', '--out', {str(tmp_path)!r}]"
    code += f"; runpy.run_path({script!r}, run_name='__main__')"

    def call() -> str:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first = call()
    names = {path.stem for path in tmp_path.glob("*.json")}
    assert names == {
        *("text", "pretrain", "plateau", "start"),
        *(arm.name for arm in replication.swept_arms()[:2]),
    }
    assert "--- pretrain" in first and "sharpened to 0.9:" in first
    found = json.loads((tmp_path / "start.json").read_text())
    figures = found["report"]["by_document"]
    assert {f"energy_score@{g}" for g in replication.DRY.lengths} <= figures.keys()
    assert "parse_sampled" in found["report"]
    # The model of the plateau is phi, so that what it predicts has learned something.
    losses = json.loads((tmp_path / "plateau.json").read_text())["cross_entropy"]
    assert losses[-1] < losses[0]
    again = call()
    assert "---" not in again and first.endswith(again)
