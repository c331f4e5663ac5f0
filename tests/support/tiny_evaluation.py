"""Settings and a tiny feature network that the tests of evaluation share."""

from hf_ebft.config import EBFTSettings
from hf_ebft.feature_network.network import FeatureNetwork
from tests.support.tiny import tiny_llama

LAYERS = [1, 2]  # of the network's two
SETTINGS = EBFTSettings(
    stride=4,
    context_length=3,
    generate_max_len=3,
    n_samples_per_prompt=3,
    temperature=0.8,
    feature_layers=[0.5, 1.0],
)


def network(seed: int = 1) -> FeatureNetwork:
    """Unit features of the last token, from both layers."""
    return FeatureNetwork(
        tiny_llama(seed=seed),
        feature_layers=[0.5, 1.0],
        embed_method="last_token",
        normalization="per_layer",
    )
