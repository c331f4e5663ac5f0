"""Two accelerators visible to one process: policy on the first, feature network on the second."""

import pytest
import torch

from tests.support.accelerator import needs_two_accelerators
from tests.support.distributed_runs import make_trainer

pytestmark = [pytest.mark.gpu, needs_two_accelerators]


def test_auto_places_the_feature_network_on_the_second_device(tmp_path):
    trainer = make_trainer(tmp_path, use_cpu=False)
    assert trainer.args.n_gpu == 1  # no DataParallel
    assert trainer.args.device.index == 0
    assert trainer.feature_network.device.index == 1
    trainer.train()


def test_second_device_gives_the_same_embeddings(tmp_path):
    batch = {"input_ids": torch.randint(1, 60, (2, 40)).to(torch.accelerator.current_accelerator())}
    first = make_trainer(tmp_path, use_cpu=False, feature_placement="same_device")
    second = make_trainer(tmp_path, use_cpu=False, feature_placement="second_device")
    rollouts = first.sample_rollouts(first.model, batch)
    left, right = (trainer.feature_network.embed(rollouts) for trainer in (first, second))
    torch.testing.assert_close(left.generated, right.generated, rtol=1e-4, atol=1e-5)
