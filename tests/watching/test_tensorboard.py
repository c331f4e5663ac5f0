"""Pictures of rollouts in TensorBoard, read back from the event files."""

import html
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import TrainerCallback

pytest.importorskip("tensorboard")
pytest.importorskip("PIL")

from PIL import Image

from hf_ebft import EBFTTrainer
from hf_ebft.training.metrics import NAMES
from hf_ebft.watching import tensorboard
from hf_ebft.watching.tensorboard import (
    CHARTS,
    PicturesCallback,
    RewardMap,
    ShownGroup,
    ShownRollout,
    markdown_of,
    show_groups,
)
from tests.support.tiny import config, texts, tiny_llama, tiny_tokenizer


class Recorder(TrainerCallback):
    """Keeps what the trainer tells those who listen."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Any]] = []

    def on_ebft_outputs(self, args: Any, state: Any, control: Any, outputs: Any, **_: Any) -> None:
        self.seen.append((state.global_step, outputs))


def read_events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob("*tfevents*")
    everything = {"tensors": 0, "histograms": 0, "images": 0, "scalars": 0}
    return EventAccumulator(str(file), size_guidance=everything).Reload()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Four steps of two micro-batches, pictures every two."""
    folder = tmp_path_factory.mktemp("pictures")
    args = config(
        folder,
        report_to=["tensorboard"],
        max_steps=4,
        gradient_accumulation_steps=2,
        log_pictures_steps=2,
        seed=1,
    )
    recorder = Recorder()
    trainer = EBFTTrainer(
        tiny_llama(vocabulary=300),
        args,
        train_dataset=texts(20, 31, 20, 25, vocabulary=300),
        processing_class=tiny_tokenizer(pad_token="<pad>"),
        callbacks=[recorder],
    )
    trainer.train()
    yield SimpleNamespace(trainer=trainer, seen=recorder.seen, events=read_events(folder / "runs"))


def test_listeners_get_every_micro_batch_of_training(run: SimpleNamespace) -> None:
    assert [step for step, _ in run.seen] == [0, 0, 1, 1, 2, 2, 3, 3]
    for _, outputs in run.seen:
        assert outputs.rewards.reward.shape == outputs.rollouts.tokens.shape[:3]


def test_histograms_hold_every_reward_and_advantage_of_their_step(run: SimpleNamespace) -> None:
    for name in ("rewards", "advantages"):
        histograms = run.events.Histograms(f"train/ebft/{name}")
        assert [histogram.step for histogram in histograms] == [2, 4]
        for histogram in histograms:
            values = []
            for step, outputs in run.seen:
                if step + 1 == histogram.step:
                    tensor = outputs.rewards.reward if name == "rewards" else outputs.advantages
                    exists = outputs.rollouts.exists[:, None].expand_as(tensor)
                    values += tensor[exists].tolist()
            told = histogram.histogram_value
            assert told.num == len(values)
            assert told.sum == pytest.approx(sum(values), abs=1e-4)
            assert (told.min, told.max) == pytest.approx((min(values), max(values)), abs=1e-6)


def test_rollouts_are_there_to_read(run: SimpleNamespace) -> None:
    decode = run.trainer.processing_class.decode
    texts_written = run.events.Tensors("train/ebft/rollouts/text_summary")
    assert [text.step for text in texts_written] == [2, 4]
    shown = html.unescape(texts_written[-1].tensor_proto.string_val[0].decode())
    (first, _) = [outputs for step, outputs in run.seen if step == 3]
    (group, *_) = show_groups(first, decode, 4)
    assert len(group.rollouts) == 3
    for rollout in group.rollouts:
        assert f"{rollout.advantage:+.3f} | {rollout.reward:.3f}" in shown
        assert tensorboard.visible(rollout.text).replace(" ", "\u00a0") in shown
    assert tensorboard.visible(group.prefix).replace(" ", "\u00a0") in shown


def test_groups_are_the_document_s_own_tokens(run: SimpleNamespace) -> None:
    _, outputs = run.seen[0]
    layout, rollouts = outputs.rollouts.layout, outputs.rollouts
    groups = show_groups(outputs, lambda ids: " ".join(map(str, ids)), 100)
    blocks = rollouts.exists.nonzero().tolist()
    assert len(groups) == len(blocks)
    for group, (row, block) in zip(groups, blocks, strict=True):
        ids = layout.documents.input_ids[row].tolist()
        end = layout.blocks.column[row, block]
        assert group.prefix == " ".join(map(str, ids[:end]))
        assert group.ground_truth == " ".join(map(str, ids[end : end + 3]))
        for sample, rollout in enumerate(group.rollouts):
            tokens = rollouts.tokens[row, sample, block].tolist()
            assert rollout.text == " ".join(map(str, tokens))
            assert rollout.reward == float(outputs.rewards.reward[row, sample, block])


def test_the_heat_map_is_an_image_with_all_colours(run: SimpleNamespace) -> None:
    images = run.events.Images("train/ebft/reward_by_position")
    assert [image.step for image in images] == [2, 4]
    image = Image.open(BytesIO(images[-1].encoded_image_string)).convert("RGB")
    assert image.size == (images[-1].width, images[-1].height)
    assert len(set(image.getdata())) > 30


def test_phases_share_a_chart(run: SimpleNamespace) -> None:
    from tensorboard.plugins.custom_scalar import layout_pb2

    (written,) = run.events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(written.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    assert charts == {title: tags for title, (_, tags) in CHARTS["EBFT"].items()}
    logged = set(run.events.Tags()["scalars"])
    training = {tag for tags in charts.values() for tag in tags if tag.startswith("train/")}
    assert training <= logged
    assert {tag.removeprefix("train/ebft/") for tag in training} <= set(NAMES)


def test_no_pictures_unless_asked_for(tmp_path: Path) -> None:
    trainer = EBFTTrainer(
        tiny_llama(),
        config(tmp_path, report_to=["tensorboard"], max_steps=1),
        train_dataset=texts(20, 20),
    )
    assert not any(isinstance(c, PicturesCallback) for c in trainer.callback_handler.callbacks)
    trainer.train()
    tags = read_events(tmp_path / "runs").Tags()
    assert (tags["images"], tags["histograms"]) == ([], [])


def test_a_document_without_blocks_draws_nothing_and_breaks_nothing(tmp_path: Path) -> None:
    args = config(
        tmp_path, report_to=["tensorboard"], max_steps=1, log_pictures_steps=1, ce_coef=1.0
    )
    EBFTTrainer(tiny_llama(), args, train_dataset=texts(5, 5)).train()
    tags = read_events(tmp_path / "runs").Tags()
    assert (tags["images"], tags["histograms"]) == ([], [])


def test_pictures_for_nobody_are_refused(tmp_path: Path) -> None:
    trainer = EBFTTrainer(
        tiny_llama(), config(tmp_path, log_pictures_steps=5), train_dataset=texts(20, 20)
    )
    with pytest.raises(ValueError, match="add 'tensorboard' to report_to"):
        trainer.train()


@pytest.mark.parametrize("bad", [{"every": 0}, {"every": 1, "n_groups": 0}])
def test_numbers_that_make_no_pictures_are_refused(tmp_path: Path, bad: dict[str, int]) -> None:
    trainer = EBFTTrainer(tiny_llama(), config(tmp_path))
    with pytest.raises(ValueError, match="must be at least 1"):
        PicturesCallback(trainer, **bad)


def test_several_processes_are_put_together(
    run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes with the same batch: twice the values, groups in turn, one writer."""
    monkeypatch.setattr(tensorboard, "gather_object", lambda objects: objects * 2)
    callback = PicturesCallback(run.trainer, every=1, n_groups=3)
    written: dict[str, Any] = {}
    writer = SimpleNamespace(
        add_custom_scalars=lambda charts: None,
        add_histogram=lambda name, values, step: written.update({name: values}),
        add_text=lambda name, text, step: written.update({name: text}),
        add_image=lambda name, image, step, dataformats: written.update({name: image}),
        flush=lambda: None,
    )
    monkeypatch.setattr(callback, "_tensorboard", lambda: SimpleNamespace(tb_writer=writer))
    _, outputs = run.seen[0]
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    callback.on_ebft_outputs(None, state, None, outputs)  # type: ignore[arg-type]
    state.global_step = 1
    callback.on_step_end(None, state, None)  # type: ignore[arg-type]
    blocks = int(outputs.rollouts.exists.sum())
    assert written["train/ebft/rewards"].shape == (2 * 3 * blocks,)
    assert written["train/ebft/rollouts"].count("**prefix**") == 3

    written.clear()
    state = SimpleNamespace(global_step=1, is_world_process_zero=False)
    callback.on_ebft_outputs(None, state, None, outputs)  # type: ignore[arg-type]
    state.global_step = 2
    callback.on_step_end(None, state, None)  # type: ignore[arg-type]
    assert not written, "only the main process writes"


def test_text_survives_markdown_and_tensorboard_s_cleaning() -> None:
    """Whatever a model writes is shown as it is, and is never markup."""
    from tensorboard.plugin_util import markdown_to_safe_html

    hostile = "|a|b| `x` **bold** <script>alert(1)</script>\n\n# head\n  [l](http://x) &amp; \\ _i_"
    group = ShownGroup(hostile, hostile, [ShownRollout(hostile, 0.5, 0.25)])
    shown = markdown_to_safe_html(markdown_of([group]))
    cells = re.findall(r"<code>(.*?)</code>", shown, flags=re.DOTALL)
    assert len(cells) == 3
    for cell in cells:
        assert html.unescape(cell).replace("\u00a0", " ") == tensorboard.visible(hostile)
    assert "<script" not in shown
    assert shown.count("<table>") == 1
    assert len(re.findall(r"<tr>", shown)) == 3


def test_control_characters_are_shown() -> None:
    assert tensorboard.visible("a\n\tb\r\x00\x1b\x7f") == "a\u23ce\u2192b\u240d\u2400\u241b\u2421"


def test_squares_follow_sign_and_size() -> None:
    advantages = [3.0, 1.0, 0.1, 0.0, -1.5, -3.0]
    group = ShownGroup("p", "t", [ShownRollout("r", 0.0, advantage) for advantage in advantages])
    squares = [line.split("|")[1].strip() for line in markdown_of([group]).splitlines()[4:-1]]
    blue, orange = "\U0001f7e6", "\U0001f7e7"
    assert squares == [blue * 3, blue * 2, blue, "\u2b1c", orange * 2, orange * 3]


def test_a_reward_map_is_the_mean_over_its_cells() -> None:
    generator = np.random.default_rng(0)
    drawn = RewardMap(spacing=2, rows=4, columns=8)
    seen = []
    for step in range(3, 40):  # 37 steps into 8 columns, 50 positions into 4 rows
        positions = generator.integers(0, min(50, 4 + step), size=6)
        rewards = generator.normal(size=6)
        drawn.add(step, positions, rewards)
        seen += [(step, p, r) for p, r in zip(positions, rewards, strict=True)]
    rows, columns = drawn.edges()
    means = drawn.means()
    assert means.shape == (len(rows) - 1, len(columns) - 1)
    assert len(rows) - 1 <= 4
    assert len(columns) - 1 <= 8
    assert columns[0] == 3
    for row in range(means.shape[0]):
        for column in range(means.shape[1]):
            inside = [
                reward
                for step, position, reward in seen
                if rows[row] <= position < rows[row + 1]
                and columns[column] <= step < columns[column + 1]
            ]
            if inside:
                assert means[row, column] == pytest.approx(np.mean(inside))
            else:
                assert np.isnan(means[row, column])


def test_an_empty_reward_map_has_no_cells() -> None:
    drawn = RewardMap(spacing=8)
    drawn.add(1, np.empty(0, dtype=np.int64), np.empty(0))
    assert drawn.means().size == 0
    assert drawn.edges() == ([0], [0])


TWO_PROCESSES = """
import sys
import torch
sys.path.insert(0, ".")
from tests.support.tiny import config, texts, tiny_llama
from hf_ebft import EBFTTrainer
from hf_ebft.watching.tensorboard import PicturesCallback
from transformers import TrainerCallback

class Count(TrainerCallback):
    blocks = 0
    def on_ebft_outputs(self, args, state, control, outputs, **_):
        self.blocks += int(outputs.rollouts.exists.sum()) * (state.global_step == 1)

count = Count()
args = config(sys.argv[1], report_to=["tensorboard"], max_steps=2, log_pictures_steps=2,
              per_device_train_batch_size=1)
# Lengths differ, so the two processes hold different numbers of blocks.
trainer = EBFTTrainer(tiny_llama(), args, train_dataset=texts(20, 40, 25, 33), callbacks=[count])
trainer.train()
trainer.save_model()
blocks = trainer.accelerator.reduce(torch.tensor(count.blocks), reduction="sum")
if args.process_index == 0:
    print("blocks of both:", int(blocks), "own:", count.blocks)
"""


@pytest.mark.slow
def test_two_processes_share_one_picture(tmp_path: Path) -> None:
    """For real, over gloo: all rewards of a step in one histogram, one event file, one card."""
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES, encoding="utf-8")
    root = Path(__file__).parents[2]
    settings = yaml.safe_load((root / "accelerate_configs" / "ddp_cpu.yaml").read_text())
    settings |= {"num_processes": 2, "main_process_port": 0}
    (tmp_path / "accelerate.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(tmp_path / "accelerate.yaml"), str(script), str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told = re.search(r"blocks of both: (\d+) own: (\d+)", done.stdout)
    assert told is not None, done.stdout[-2000:]
    both, own = int(told[1]), int(told[2])
    assert own < both
    (histogram,) = read_events(tmp_path / "out" / "runs").Histograms("train/ebft/rewards")
    assert histogram.histogram_value.num == 3 * both
    assert (tmp_path / "out" / "README.md").exists()
