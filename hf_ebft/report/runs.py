"""Finding and reading what a run left behind.

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
# How `Trainer` names groups of scalars, and what stands for them in its own log.
EVENT_GROUPS = {"train/": "", "eval/": "eval_", "test/": "test_"}


@dataclass(frozen=True)
class Sample:
    """What the policy wrote after a prefix before and after training, and what the text says."""

    prefix: str
    before: str
    after: str
    truth: str


@dataclass(frozen=True)
class Watched:
    """What a prefix that was watched during training was continued by at a step.

    Attributes:
        step: of the optimizer.
        prefix, ground_truth: of the document.
        rollout: the first of the group.
        reward: mean over the group.
    """

    step: int
    prefix: str
    ground_truth: str
    rollout: str
    reward: float


@dataclass(frozen=True)
class Run:
    """A run, read.

    Attributes:
        name: for people.
        series: curves by the names of `Trainer`'s log.
        arguments: of the trainer, EBFT's settings included; empty if the run left none.
        comparison: held-out metrics before and after, as `report.json` holds them; may be empty.
        samples: before and after; may be empty.
        watched: the same prefixes at several steps; may be empty.
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
        names: one each. Default: those of the folders, with as many parents as tell them apart.

    Raises:
        FileNotFoundError: a path without a run.
        ValueError: as many names as paths are needed, or a file that cannot be read.
    """
    if names is not None and len(names) != len(paths):
        raise ValueError(f"There are {len(paths)} runs and {len(names)} names; give one each.")
    chosen = _distinct([Path(path) for path in paths]) if names is None else names
    return [load_run(path, name) for path, name in zip(paths, chosen, strict=True)]


def load_run(path: str | Path, name: str | None = None) -> Run:
    """Read a run from its folder, its `trainer_state.json` or an event file.

    In a folder, the state, the checkpoints' states and the event files are asked. Where they hold
    several runs, the one that wrote last counts.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a file that cannot be read, or holds no metrics.
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
        raise ValueError(f"{source} holds no metrics; had the run logged anything yet?")
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
    """Curves read from one place, and when that place was last written."""

    series: dict[str, Series]
    source: Path
    written: float

    @property
    def last_step(self) -> int:
        return max((curve.steps[-1] for curve in self.series.values()), default=-1)


def _newest_run(folder: Path) -> _Log:
    """The run that wrote into the folder last, with as much of its log as is there.

    A folder that was used twice holds two logs. The one written last counts, even if it is the
    shorter one.
    """
    logs = [
        _Log(_series_of_state(path), path, path.stat().st_mtime) for path in _state_files(folder)
    ]
    events = _event_files(folder)
    written = max((file.stat().st_mtime for file in events), default=0.0)
    # Reading events takes a package and seconds: only if no state is there, or all are older.
    if events and all(log.written < written for log in logs):
        logs.append(_Log(_series_of_events(events), folder, written))
    if not logs:
        raise FileNotFoundError(
            f"{folder} holds no {STATE_NAME} (there or in checkpoint-*) and no TensorBoard event "
            "files. Save a checkpoint, call trainer.save_state(), or train with "
            "report_to='tensorboard'."
        )
    newest = max(logs, key=lambda log: log.written)
    same = [log for log in logs if _agree(log.series, newest.series)]
    if len(same) < len(logs):
        others = ", ".join(str(log.source) for log in logs if log not in same)
        logger.warning(
            "%s holds logs of several runs. Shown is the one written last, from %s; of another "
            "run: %s.",
            folder,
            newest.source,
            others,
        )
    return max(same, key=lambda log: (log.last_step, log.written))


def _state_files(folder: Path) -> list[Path]:
    found = [folder / STATE_NAME, *folder.glob(f"checkpoint-*/{STATE_NAME}")]
    return [path for path in found if path.exists()]


def _agree(one: Mapping[str, Series], other: Mapping[str, Series]) -> bool:
    """Whether two logs say the same of every step that both hold: they are of one run."""
    for name in one.keys() & other.keys():
        values = dict(zip(other[name].steps, other[name].values, strict=True))
        for step, value in zip(one[name].steps, one[name].values, strict=True):
            # Event files hold float32.
            if step in values and not _close(value, values[step]):
                return False
    return True


def _close(one: float, other: float) -> bool:
    both_nan = math.isnan(one) and math.isnan(other)
    return both_nan or math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-12)


def _series_of_state(path: Path) -> dict[str, Series]:
    state = _read_json(path)
    if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
        raise ValueError(f"{path} is no {STATE_NAME}: it has no list 'log_history'.")
    return series_of(state["log_history"])


def _event_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*tfevents*"))


def _series_of_events(files: Sequence[Path]) -> dict[str, Series]:
    """Scalars of event files, in the order in which they were begun; a later file's points replace
    what earlier ones hold from its first step on (a resumed run, or one started anew).
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
            f"{path} is an event file, which takes TensorBoard to read: pip install tensorboard, "
            f"or point to a {STATE_NAME}."
        ) from error
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0})
    return events.Reload()


def _arguments_of_events(path: Path) -> dict[str, Any] | None:
    """The arguments that `Trainer` writes as text when training begins."""
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
    """Where files that belong to a run may lie: its folder, its checkpoint, the folder of these."""
    folder = path if path.is_dir() else path.parent
    # The highest checkpoint may be an earlier run's.
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda place: -place.stat().st_mtime)
    folders = [folder, *checkpoints[:1]]
    if re.fullmatch(r"checkpoint-\d+", folder.name):
        folders.append(folder.parent)
    if folder.parent.name == "runs":  # of event files
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
    """Token ids, where a run had no tokenizer, as numbers."""
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
    """The shortest ends of the paths that differ from each other."""
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
