"""A fake server for each test, and trainers that sample from it."""

import pytest


@pytest.fixture
def fake():
    from tests.support.fake_vllm import serving  # needs what only an extra brings

    with serving() as server:
        yield server


@pytest.fixture
def start(fake, tmp_path):
    """Builds trainers for the server of the test, and closes their rollouts."""
    from tests.support.fake_vllm import small_policy, small_tokenizer
    from tests.support.vllm_training import make_trainer, rollouts_for, settings_for

    made = []

    def build(settings=None, **options):
        options = {"model": small_policy(), "tokenizer": small_tokenizer()} | options
        rollouts = rollouts_for(settings_for(fake.url, tmp_path, **(settings or {})))
        made.append(rollouts)
        model, tokenizer = options.pop("model"), options.pop("tokenizer")
        return make_trainer(model, tokenizer, rollouts, tmp_path, **options)

    yield build
    for rollouts in made:
        rollouts.close()
