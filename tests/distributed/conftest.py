"""What the runs of several processes are compared with."""

import pytest

from tests.support.distributed_runs import fitted, scheduled, trained


@pytest.fixture(scope="session")
def single(tmp_path_factory):
    """The same runs in this process: batches twice as large instead of two processes."""
    folder = tmp_path_factory.mktemp("single")
    plain = trained(folder, per_device_train_batch_size=4)
    adapters = trained(folder, per_device_train_batch_size=4, peft=True)
    return {
        "plain": plain,
        "adapters": adapters,
        # How a batch is worked off changes nothing.
        "parts": plain,
        "chunks": plain,
        "chunks_of_adapters": adapters,
        "scheduled": scheduled(folder, per_device_train_batch_size=4),
        "fitted": fitted(folder, per_device_train_batch_size=4),
    }
