"""Finds and reads the files of a run.

A run is a folder with any of: `trainer_state.json` (there or in `checkpoint-*`), TensorBoard's
event files, and beside them `training_args.json` (written at every save), `report.json` and
`samples.jsonl` (written by `hf-ebft train`) and `watched_rollouts.jsonl` (by
`RolloutWatcher`).
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hf_ebft.evaluation.callbacks import WATCHED_FILE
from hf_ebft.watching.curves import Series, curves_of, series_of
from hf_ebft.watching.model_card import ARGUMENTS_NAME

logger = logging.getLogger(__name__)

T = TypeVar("T")

STATE_NAME = "trainer_state.json"
COMPARISON_NAME = "report.json"
SAMPLES_NAME = "samples.jsonl"
# `Trainer`'s names of groups of scalars in TensorBoard -> the prefix of these metrics in its log.
EVENT_GROUPS = {"train/": "", "eval/": "eval_", "test/": "test_"}


@dataclass(frozen=True)
class Sample:
    """A prefix with the policy's rollouts before and after training, and its ground truth."""

    prefix: str
    before: str
    after: str
    truth: str


@dataclass(frozen=True)
class Watched:
    """The rollout of a watched prefix at one step of training.

    Attributes:
        step: optimizer step.
        prefix, ground_truth: texts of the document.
        rollout: the first rollout of the group.
        reward: mean reward of the group.
    """

    step: int
    prefix: str
    ground_truth: str
    rollout: str
    reward: float


@dataclass(frozen=True)
class Run:
    """The logs and files of a run.

    Attributes:
        name: name to show.
        series: curves by the names of `Trainer`'s log.
        arguments: the trainer's arguments, including EBFT's settings; empty if there are none.
        comparison: held-out metrics before and after, from `report.json`; may be empty.
        samples: rollouts before and after; may be empty.
        watched: rollouts of the same prefixes at several steps; may be empty.
        source: the file or folder that the curves are from.
    """

    name: str
    series: Mapping[str, Series]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    comparison: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    watched: Sequence[Watched] = ()
    source: str = ""

    @property
    def last_step(self) -> int:
        """The last optimizer step in the log."""
        return max((series.steps[-1] for series in self.series.values()), default=0)


def load_runs(paths: Sequence[str | Path], names: Sequence[str] | None = None) -> list[Run]:
    """Read several runs.

    Args:
        paths: as for `load_run`.
        names: one each. Default: names of the folders, with as many parents as make them unique.

    Raises:
        FileNotFoundError: a path contains no run.
        ValueError: the number of names is not that of the paths, or a file cannot be read.
    """
    if names is not None and len(names) != len(paths):
        raise ValueError(f"There are {len(paths)} runs but {len(names)} names; give one name each.")
    chosen = _distinct([Path(path) for path in paths]) if names is None else names
    return [load_run(path, name) for path, name in zip(paths, chosen, strict=True)]


def load_run(path: str | Path, name: str | None = None) -> Run:
    """Read a run from its folder, its `trainer_state.json` or an event file.

    In a folder, the state, the states of checkpoints and the event files are read. If they contain
    several runs, the run that was written last is used.

    Raises:
        FileNotFoundError: there is nothing at this path.
        ValueError: a file cannot be read, or contains no metrics.
        ImportError: there are only event files, and TensorBoard is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"There is no {path}; name a run's output_dir, its trainer_state.json or an event file "
            "of TensorBoard."
        )
    if path.is_dir():
        log = _newest_run(path)
        series, source = log.series, log.source
    elif "tfevents" in path.name:
        series, source = _series_of_events([path]), path
    else:
        series, source = _series_of_state(path), path
    if not series:
        raise ValueError(f"{source} contains no metrics; has the run logged anything yet?")
    folders = _folders_around(path)
    return Run(
        name=name or _distinct([path])[0],
        series=series,
        arguments=_first_json(folders, ARGUMENTS_NAME, dict) or _arguments_of_events(path) or {},
        comparison=_first_json(folders, COMPARISON_NAME, dict) or {},
        samples=_samples(folders),
        watched=_watched(folders),
        source=str(source),
    )


@dataclass(frozen=True)
class _Log:
    """Curves read from one source, and the time when that source was last written."""

    series: dict[str, Series]
    source: Path
    written: float

    @property
    def last_step(self) -> int:
        return max((curve.steps[-1] for curve in self.series.values()), default=-1)


def _newest_run(folder: Path) -> _Log:
    """The log of the run that wrote into the folder last, as complete as possible.

    A folder that was used twice contains two logs. The one that was written last is used, even if
    it is shorter.
    """
    logs = [
        _Log(_series_of_state(path), path, path.stat().st_mtime) for path in _state_files(folder)
    ]
    events = _event_files(folder)
    written = max((file.stat().st_mtime for file in events), default=0.0)
    # Reading events needs a package and takes seconds: only if all states are missing or older.
    if events and all(log.written < written for log in logs):
        logs.append(_Log(_series_of_events(events), folder, written))
    if not logs:
        raise FileNotFoundError(
            f"{folder} contains no {STATE_NAME} (there or in checkpoint-*) and no TensorBoard "
            "event files. Save a checkpoint, call trainer.save_state(), or train with "
            "report_to='tensorboard'."
        )
    newest = max(logs, key=lambda log: log.written)
    same = [log for log in logs if _agree(log.series, newest.series)]
    if len(same) < len(logs):
        others = ", ".join(str(log.source) for log in logs if log not in same)
        logger.warning(
            "%s contains logs of several runs. The run that was written last is shown, from %s. "
            "Logs of other runs: %s.",
            folder,
            newest.source,
            others,
        )
    return max(same, key=lambda log: (log.last_step, log.written))


def _state_files(folder: Path) -> list[Path]:
    found = [folder / STATE_NAME, *folder.glob(f"checkpoint-*/{STATE_NAME}")]
    return [path for path in found if path.exists()]


def _agree(one: Mapping[str, Series], other: Mapping[str, Series]) -> bool:
    """Whether two logs have the same values at all common steps, and so are of one run."""
    for name in one.keys() & other.keys():
        values = dict(zip(other[name].steps, other[name].values, strict=True))
        for step, value in zip(one[name].steps, one[name].values, strict=True):
            # Event files contain float32 values.
            if step in values and not _close(value, values[step]):
                return False
    return True


def _close(one: float, other: float) -> bool:
    both_nan = math.isnan(one) and math.isnan(other)
    return both_nan or math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-12)


def _series_of_state(path: Path) -> dict[str, Series]:
    state = _read_json(path)
    if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
        raise ValueError(f"{path} is not a {STATE_NAME}: it has no list 'log_history'.")
    return series_of(state["log_history"])


def _event_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*tfevents*"))


def _series_of_events(files: Sequence[Path]) -> dict[str, Series]:
    """Scalars of event files, in the order in which the files were begun.

    A later file (of a resumed run, or of one started again) replaces the points of earlier files
    from its first step on.
    """
    merged: dict[str, dict[int, float]] = {}
    for events in sorted(map(_read_events, files), key=_begin):
        scalars = {
            tag: events.Scalars(tag)
            for tag in events.Tags()["scalars"]
            if tag.startswith(tuple(EVENT_GROUPS))
        }
        start = min((points[0].step for points in scalars.values() if points), default=None)
        if start is None:
            continue
        for by_step in merged.values():
            for step in [step for step in by_step if step >= start]:
                del by_step[step]
        for tag, points in scalars.items():
            group, _, rest = tag.partition("/")
            name = EVENT_GROUPS[group + "/"] + rest
            merged.setdefault(name, {}).update({point.step: point.value for point in points})
    return curves_of(merged)


def _begin(events: Any) -> float:
    return float(events.FirstEventTimestamp())


def _read_events(path: Path) -> Any:
    try:
        # No stubs, no py.typed.
        from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
            EventAccumulator,
        )
    except ImportError as error:
        raise ImportError(
            f"{path} is an event file, which only TensorBoard can read: pip install tensorboard, "
            f"or name a {STATE_NAME}."
        ) from error
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0})
    return events.Reload()


def _arguments_of_events(path: Path) -> dict[str, Any] | None:
    """The arguments that `Trainer` writes as text at the start of training."""
    files = _event_files(path) if path.is_dir() else [path] * ("tfevents" in path.name)
    for file in sorted(files, key=lambda file: -file.stat().st_mtime):
        events = _read_events(file)
        if "args/text_summary" in events.Tags()["tensors"]:
            text = events.Tensors("args/text_summary")[0].tensor_proto.string_val[0]
            arguments = json.loads(text)
            assert isinstance(arguments, dict)
            return arguments
    return None


def _folders_around(path: Path) -> list[Path]:
    """Folders that may contain files of a run: its own, its checkpoints, and their parent."""
    folder = path if path.is_dir() else path.parent
    # By time, since the highest checkpoint may be that of an earlier run.
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda place: -place.stat().st_mtime)
    folders = [folder, *checkpoints[:1]]
    if re.fullmatch(r"checkpoint-\d+", folder.name):
        folders.append(folder.parent)
    if folder.parent.name == "runs":  # a folder of event files
        folders.append(folder.parent.parent)
    return folders


def _first_json(folders: Sequence[Path], name: str, kind: type) -> Any:
    for folder in folders:
        if (folder / name).exists():
            value = _read_json(folder / name)
            if not isinstance(value, kind):
                raise ValueError(f"{folder / name} does not hold a JSON {kind.__name__}.")
            return value
    return None


def _samples(folders: Sequence[Path]) -> list[Sample]:
    what = "the texts prefix, before, after and truth"
    return _json_lines(folders, SAMPLES_NAME, lambda line: Sample(**line), what)


def _watched(folders: Sequence[Path]) -> list[Watched]:
    def read(line: dict[str, Any]) -> Watched:
        rollouts = line["rollouts"]
        return Watched(
            step=int(line["step"]),
            prefix=_text(line["prefix"]),
            ground_truth=_text(line["ground_truth"]),
            rollout=_text(rollouts[0]["text"]),
            reward=sum(float(rollout["reward"]) for rollout in rollouts) / len(rollouts),
        )

    what = "step, prefix, ground_truth and rollouts, as RolloutWatcher writes them"
    return _json_lines(folders, WATCHED_FILE, read, what)


def _text(value: str | list[int]) -> str:
    """A text; token ids, from a run without a tokenizer, are shown as numbers."""
    return value if isinstance(value, str) else " ".join(map(str, value))


def _json_lines(
    folders: Sequence[Path], name: str, read: Callable[[dict[str, Any]], T], what: str
) -> list[T]:
    for folder in folders:
        path = folder / name
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            try:
                return [read(json.loads(line)) for line in lines if line.strip()]
            except (TypeError, ValueError, LookupError) as error:
                raise ValueError(
                    f"{path} must hold one JSON object a line, with {what}: {error}"
                ) from error
    return []


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _distinct(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that are all different."""
    parts = [_parts(path) for path in paths]
    longest = max(map(len, parts))
    for depth in range(1, longest + 1):
        names = ["/".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(own)} ({number})" for number, own in enumerate(parts, start=1)]


def _parts(path: Path) -> list[str]:
    path = path.resolve()
    folder = path if path.is_dir() else path.parent
    return [part for part in folder.parts if part != "/"]
