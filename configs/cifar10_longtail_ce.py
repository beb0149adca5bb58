"""Long-tailed CIFAR-10 (imbalance 100), ResNet-32, plain cross-entropy.

What: the baseline of Cui et al. 2019 and of the course report that shape bias work here goes back
    to (.2876 over all classes). 12,406 images: 5,000 of the first class, 50 of the last.
Command: python scripts/train.py --config=configs/cifar10_longtail_ce.py --workdir=runs/lt_ce \
        --config.data.path=cifar10_train.zip
Cost: 124,060 images; a CPU of two cores makes some 120 a second (docs/benchmarks.md).
Measured: not run to its end.
Recipe: batch 128, learning rate .1, momentum .9, weight decay 5e-4, ten epochs with the rate cut
    after the sixth and the eighth. The published schedules have 200 epochs.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The short schedule."""
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "network": "resnet32",
            "topk": "",
            "weights": "",
            "epochs": 10,
            "batch_size": 128,
            "log_every": 20,
            "checkpoint_every": 0,
            "evaluate_every": 1,
            "data": {
                "source": "zip",
                "path": "cifar10_train.zip",
                "train": "train",
                "validation": "cifar10_test.zip:test",
                "long_tail": 100.0,
                "in_memory": True,
                "strict": False,
                "image_size": 32,
                "resize_size": 32,
                "mean": (0.4914, 0.4822, 0.4465),
                "std": (0.2023, 0.1994, 0.2010),
                "crop": "padded",
                "padding": 4,
                "flip": True,
            },
            "optimizer": {
                "name": "sgd",
                "learning_rate": 0.1,
                "momentum": 0.9,
                "weight_decay": 5e-4,
                "decay": "all",
                "schedule": "step",
                "milestones": (6, 8),
                "factor": 0.1,
            },
            "loss": {"name": "cross_entropy", "beta": 0.0, "gamma": 0.0, "form": "outside"},
        }
    )
