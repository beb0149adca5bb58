"""The built-in network: congruent images of 16 shapes with 16 textures, and single-cue images.

What: the small VGG of `topk_jax/networks/builtin.py` on images drawn by `topk_jax.stimuli.builtin`.
    The shares of silhouettes and pure textures were chosen so that both cues are learnt about
    equally well, on those two kinds of images alone; conflict images played no part.
Command: python scripts/train.py --config=configs/builtin.py --workdir=runs/builtin
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The run whose weights are committed."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.network = "builtin"
    config.network_options = ml_collections.ConfigDict()

    config.images = 16_000
    config.shares = (0.7, 0.15, 0.15)  # congruent, silhouettes, textures
    config.epochs = 6

    config.batch_size = 64
    config.microbatch = 8  # of a device
    config.learning_rate = 2e-3
    config.warmup_fraction = 0.05
    config.weight_decay = 1e-4
    config.log_every = 100

    config.test_seed = 0
    config.test_per_category = 50
    return config
