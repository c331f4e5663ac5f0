"""The study: its matrix, its own pieces, a run of one step, and tables that equal the results."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "studies"))

import matrix  # noqa: E402
import parsing  # noqa: E402
import run  # noqa: E402
import tables  # noqa: E402

RESULTS = ROOT / "studies" / "results"
PAGE = ROOT / "docs" / "study.md"


SETUPS = list(matrix.FROM_UNTRAINED)
WARM = matrix.WARM


def all_runs(setup: matrix.Setup, rates: dict[str, float]) -> list[matrix.Run]:
    return [
        *matrix.base_runs(setup),
        *matrix.sweep_runs(setup),
        *matrix.main_runs(setup, rates),
        *matrix.ablation_runs(setup, rates["ebft"]),
        *matrix.whitened_sweep_runs(setup),
        *matrix.reinforce_sweep_runs(setup),
        *matrix.fitted_runs(setup, rates["ebft"]),
        *matrix.equal_time_runs(setup, rates["sft_tokens"]),
    ]


# ---- Matrix ---------------------------------------------------------------------------------


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
def test_matrix_treats_methods_alike(setup: matrix.Setup) -> None:
    sweep = matrix.sweep_runs(setup)
    by_arm = {arm: [r for r in sweep if r.arm == arm] for arm in matrix.CRITERIA}
    assert len({tuple(r.learning_rate for r in runs) for runs in by_arm.values()}) == 1
    assert {r.split for r in sweep} == {"tune"}
    main = matrix.main_runs(setup, dict.fromkeys(matrix.CRITERIA, 1e-3))
    assert {r.split for r in main} == {"report"}
    assert {arm: sum(r.arm == arm for r in main) for arm in by_arm} == dict.fromkeys(by_arm, 3)
    names = [r.name for r in all_runs(setup, dict.fromkeys(matrix.CRITERIA, 1e-3))]
    assert len(set(names)) == len(names)
    # One factor at a time.
    assert all(len(changes) == 1 for changes in matrix.OTHER_FACTORS.values())


# ---- Parsing --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "continuation", "expected"),
    [
        ("x = ", "1\ny = (", True),  # what follows the last line break is not judged
        ("x = ", "1", False),  # no line was completed
        ("x = ", "= 1\n", False),
        ("t = (\n  'a'", " # )\n  'b'\n", True),  # a bracket in a comment closes nothing
        ("t = {1: [\n  '}',", "\n", True),  # nor does one in a string
        ("t = (1,", "]\n", False),
        ("def f():", "\n", True),
        ("class A:  # so", " far:\n", True),
        ("if x:\n    if y:", "\n\n", True),
        ("def f()", "\n", False),
        ('def f():\n    """Half a', " sentence\n", True),
        ("s = 'half", " a string\n", False),
        ("s = '\\'", "(\n", False),
        ("s = '\\'('", "\n", True),
        ("x = {'a':", "\n", False),  # nothing wrong is mended: a value is missing
    ],
)
def test_parses(before: str, continuation: str, expected: bool) -> None:
    assert parsing.parses(before, continuation) is expected


def test_whole_files_cut_at_any_line_parse() -> None:
    """What a file itself continues with counts as right, whatever is open at the cut."""
    text = (ROOT / "hf_ebft" / "objective" / "advantages.py").read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    wrong = [n for n in range(1, len(lines)) if not parsing.parses("".join(lines[:n]), lines[n])]
    assert wrong == []


def test_cuts_lie_within_the_files() -> None:
    tokenizer = run.tokenizer(matrix.TINY)
    texts = ["x = 1\n", "".join(f"name_{i} = {i}\n" for i in range(60))]
    cuts = parsing.choose_cuts(
        texts, tokenizer, cuts_per_file=3, context_tokens=12, new_tokens=9, seed=0
    )
    assert [cut.file for cut in cuts] == [1, 1, 1]  # the first has no room
    for cut in cuts:
        assert texts[1].startswith(cut.before + cut.truth)
        assert cut.before.endswith(tokenizer.decode(cut.context))
        assert len(cut.context) == 12


# ---- Baseline -------------------------------------------------------------------------------


def test_naive_baseline_is_the_mean_of_the_others() -> None:
    reward = torch.randn(2, 4, 3)
    advantages = run.naive_advantages(reward)
    for b, j, k in np.ndindex(2, 4, 3):
        others = [float(reward[b, i, k]) for i in range(4) if i != j]
        expected = float(reward[b, j, k]) - sum(others) / 3
        assert float(advantages[b, j, k]) == pytest.approx(expected, abs=1e-6)


# ---- Runs -----------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A study of seconds."""
    tiny = matrix.TINY
    assert tiny.parsing is not None
    setup = replace(
        tiny,
        training=tiny.training | {"per_device_train_batch_size": 1, "warmup_steps": 0},
        evaluation=tiny.evaluation | {"rows": 18},
        parsing=tiny.parsing | {"cuts_per_file": 1, "new_tokens": 4, "samples": 1},
        lengths=(2, 4),
    )
    monkeypatch.setitem(matrix.SETUPS, tiny.name, setup)
    run._cuts.cache_clear()


@pytest.mark.usefixtures("small")
def test_runs_of_one_step(tmp_path: Path) -> None:
    """Both trainers read the same rows, results are complete, and finished runs are skipped."""
    runs = [
        matrix.Run("base", "base", "tune"),
        matrix.Run("sft_steps", "sft", "tune", 1, 1e-3, 1),
        matrix.Run("naive_baseline", "ebft", "tune", 1, 1e-3, 1, {"naive_baseline": True}),
    ]
    for one in runs:
        run.run_once(one, tmp_path)
    base, sft, ebft = (run.read(tmp_path, one.name) for one in runs)
    assert sft["training"]["document_tokens"] == ebft["training"]["document_tokens"] > 0
    # One row of 128: (128 - 8 - 8) / 8 + 1 blocks of 4 rollouts of 8 tokens.
    assert (sft["training"]["rollout_tokens"], ebft["training"]["rollout_tokens"]) == (0, 480)
    for result in (base, sft, ebft):
        figures = result["evaluation"]["by_file"]
        weights = result["evaluation"]["weights"]
        assert {"cross_entropy", "cfm_loss@2", "cfm_loss@4", "parse_sampled"} <= figures.keys()
        for figure, values in figures.items():
            assert len(values) == len(weights[run.kind_of(figure)])
        assert weights == base["evaluation"]["weights"]
    assert run.mean_of(sft["evaluation"], "cross_entropy") != pytest.approx(
        run.mean_of(base["evaluation"], "cross_entropy"), abs=1e-4
    )
    path = tmp_path / f"{runs[1].name}.json"
    path.write_text("kept", encoding="utf-8")
    run.run_once(runs[1], tmp_path)
    assert path.read_text(encoding="utf-8") == "kept"


# ---- Results --------------------------------------------------------------------------------


def results(setup: matrix.Setup) -> tables.Results:
    return tables.Results(RESULTS, setup)


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
def test_results_are_those_of_the_matrix(setup: matrix.Setup) -> None:
    """No run besides those declared, all of one method's rates, chosen as the rules say."""
    found = results(setup)
    rates = run.chosen_rates(setup, RESULTS / setup.name)
    declared = {one.name: one for one in all_runs(setup, rates)}
    assert found.runs.keys() <= declared.keys()
    for name, result in found.runs.items():
        one = declared[name]
        assert result["run"]["changes"] == one.changes
        if one.method != "base":
            settings = (result["run"]["steps"], result["run"]["learning_rate"])
            assert settings == (one.steps, one.learning_rate)
    assert {one.name for one in matrix.sweep_runs(setup)} <= found.runs.keys()
    assert {one.name for one in matrix.main_runs(setup, rates)} <= found.runs.keys()
    assert sum(path.stat().st_size for path in RESULTS.rglob("*.json")) < 1_000_000


def test_the_stop_rule_decides_what_is_run_from_the_warm_start() -> None:
    """EBFT is swept where the product with the held-out CFM gradient is above zero, else not."""
    found, folder = results(WARM), RESULTS / WARM.name
    rule = run.read(folder, "stop_rule")
    for name, allowed in rule["trains_ebft"].items():
        assert allowed == (rule["cosines"][name]["product_low"] > 0)
    allowed = rule["trains_ebft"]["reinforce"]
    sweep = matrix.warm_runs(WARM, trains_ebft=allowed)
    rates = run.best_rates(
        [one for one in sweep if one.name in found.runs], matrix.WARM_CRITERIA, folder
    )
    declared = {one.name for one in [*sweep, *matrix.warm_main_runs(WARM, rates)]}
    assert found.runs.keys() <= declared
    assert any(one.method == "ebft" for one in sweep) == allowed
    assert run.read(folder, "warm_start")["is_plateau"]


def test_noise_scales_are_shown_with_their_intervals() -> None:
    assert tables.documents({"documents": 1234.4, "low": 99.6, "high": None}) == "1,234 [100, ∞]"
    assert tables.documents({"documents": None, "low": -3.0, "high": None}) == "∞ [0, ∞]"


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
def test_methods_saw_the_same_rows(setup: matrix.Setup) -> None:
    found = results(setup)
    for seed in matrix.SEEDS:
        tokens = {
            arm: next(r["training"] for r in found.of(arm) if r["run"]["seed"] == seed)
            for arm in matrix.CRITERIA
            if found.of(arm)
        }
        assert tokens["sft_steps"]["document_tokens"] == tokens["ebft"]["document_tokens"]
        whole = tokens["ebft"]["document_tokens"] + tokens["ebft"]["rollout_tokens"]
        assert tokens["sft_tokens"]["document_tokens"] == pytest.approx(whole, rel=0.03)


def test_page_holds_the_tables_of_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert tables.TABLES.keys() <= {name for _, name in _blocks(page)}
    assert tables.with_tables(page, {name: results(s) for name, s in matrix.SETUPS.items()}) == page


def _blocks(page: str) -> list[tuple[Any, str]]:
    return [(found, found[2]) for found in tables.BLOCK.finditer(page)]


def test_differences_are_paired_by_file_and_seed() -> None:
    """A table's cell against a plain computation on made-up evaluations."""

    def evaluation(values: list[float]) -> dict[str, Any]:
        by_file = {"cfm_loss@8": values}
        return {"by_file": by_file, "weights": {"rows": [1.0, 1.0, 2.0], "tokens": [], "cuts": []}}

    before = [evaluation([0.1, 0.2, 0.3]), evaluation([0.3, 0.2, 0.1])]
    after = [evaluation([0.2, 0.3, 0.4]), evaluation([0.4, 0.3, 0.2])]
    paired = tables.difference(before, after, "cfm_loss@8")
    assert (paired.difference, paired.low, paired.high) == pytest.approx((0.1, 0.1, 0.1))
    assert tables.seed_differences(before, after, "cfm_loss@8") == pytest.approx([0.1, 0.1])
    assert tables.change(before, after, "cfm_loss@8").startswith("**+0.100**")
    assert tables.seed_differences(before[:1], after, "cfm_loss@8") == pytest.approx([0.1, 0.05])


@pytest.mark.parametrize(
    "path", sorted(RESULTS.rglob("*.json")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_results_are_valid_json_of_numbers(path: Path) -> None:
    json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)


def _refuse(text: str) -> None:
    raise AssertionError(f"{text} among the results")
