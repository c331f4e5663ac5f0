"""Adapters and folders of killed trainers are cleared away, and nobody else's."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytest.importorskip("trl")

from hf_ebft.structured.vllm.leftovers import RUN_NAME, is_abandoned, new_run_name
from tests.support import fake_vllm
from tests.support.fake_vllm import serving, small_policy, small_tokenizer
from tests.support.vllm_training import PROMPTS, make_trainer, rollouts_for, settings_for

pytestmark = pytest.mark.filterwarnings("ignore:.*rollout_func.*:UserWarning")


@pytest.fixture
def names():
    """Names of runs: of this process, of one that is gone, of others that must not be touched."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    mine = new_run_name()
    found = RUN_NAME.fullmatch(mine)
    number, started = int(found["process"]), int(found["started"])
    assert number == os.getpid()
    assert abs(started - psutil.Process().create_time()) < 1

    def named(host=found["host"], process=number, start=started):
        return f"ebft-{host}-{process}-{start}-abc123"

    return {
        "mine": mine,
        "gone": named(process=gone.pid),
        "its number was given to another process": named(start=started - 3600),
        "another machine's": named(host="node-7", process=gone.pid),
        "unknown": "ebft-20261128-052600-21de15",
    }


ABANDONED = {"gone", "its number was given to another process"}


def test_only_those_of_processes_that_are_gone_are_abandoned(names):
    assert {key for key, name in names.items() if is_abandoned(name)} == ABANDONED
    assert {key for key, name in names.items() if is_abandoned(name + "-000003")} == ABANDONED
    assert not is_abandoned("base") and not is_abandoned("my-adapter-1-2")


def test_a_run_clears_away_what_killed_trainers_left(names, tmp_path):
    with serving() as fake:
        for name in names.values():
            fake.adapters[name + "-000001"] = fake.base
            (tmp_path / "sync" / name / "x").mkdir(parents=True)
        (tmp_path / "sync" / "notes.txt").touch()
        rollouts = rollouts_for(settings_for(fake.url, tmp_path))
        trainer = make_trainer(small_policy(), small_tokenizer(), rollouts, tmp_path)
        rollouts([PROMPTS[0]], trainer)
        rollouts.close()
        kept = {name for key, name in names.items() if key not in ABANDONED}
        assert set(fake.adapters) == {name + "-000001" for name in kept}
        left = {path.name for path in (tmp_path / "sync").iterdir()}
        assert left == kept | {"notes.txt"}


def test_a_server_that_lists_nothing_stops_no_run(tmp_path, caplog):
    with serving() as fake:
        rollouts = rollouts_for(settings_for(fake.url, tmp_path))
        trainer = make_trainer(small_policy(), small_tokenizer(), rollouts, tmp_path)
        fake.fail("/v1/models", lambda handler: False)  # it tells its base model
        fake.fail("/v1/models", fake_vllm.status(403, "not for you"))
        assert rollouts([PROMPTS[0]], trainer)["completion_ids"][0]
        rollouts.close()
    assert "could not unload the adapters of ended trainers" in caplog.text
    assert "not for you" in caplog.text


@pytest.mark.slow
def test_a_killed_trainer_is_cleared_up_after(tmp_path):
    with serving() as fake:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
        script = Path(__file__).parent / "interrupted.py"
        process = subprocess.Popen([sys.executable, script, fake.url, tmp_path], env=environment)

        def kills(handler):
            if len(fake.adapters) == 2:
                process.send_signal(signal.SIGKILL)
            return False

        fake.fail("/v1/completions", kills, times=99)
        assert process.wait(120) == -signal.SIGKILL
        fake.faults.clear()
        assert len(fake.adapters) == 2 and len(list((tmp_path / "sync").iterdir())) == 1
        rollouts = rollouts_for(settings_for(fake.url, tmp_path))
        trainer = make_trainer(small_policy(), small_tokenizer(), rollouts, tmp_path)
        rollouts([PROMPTS[0]], trainer)
        assert len(fake.adapters) == 1
        rollouts.close()
        assert fake.adapters == {} and list((tmp_path / "sync").iterdir()) == []
