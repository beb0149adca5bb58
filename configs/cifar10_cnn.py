"""A convolutional network from scratch on CIFAR-10: .80 or better in ten epochs.

What: the custom network of a course's first part (widths unpublished, .8162 reported): stages of
    convolution, batch normalisation, ReLU and max-pooling whose widths double, a hidden layer.
Command: python scripts/train.py --config=configs/cifar10_cnn.py --workdir=runs/cifar10_cnn \
        --config.data.path=cifar10_train.zip --config.data.validation=cifar10_test.zip:test
    Any CIFAR-10 in class folders will do: --config.data.source=folder --config.data.path=cifar10.
Cost: 500,000 images of 32 x 32; not timed.
Measured: not run to its end.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Ten epochs of the whole training set."""
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "network": "cifar_cnn",
            "topk": "",
            "weights": "",
            "epochs": 10,
            "batch_size": 128,
            "log_every": 50,
            "checkpoint_every": 0,
            "evaluate_every": 1,
            "data": {
                "source": "zip",
                "path": "cifar10_train.zip",
                "train": "train",
                "validation": "cifar10_test.zip:test",
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
                "momentum": 0.5,
                "weight_decay": 5e-4,
                "decay": "kernels",
                "schedule": "cosine",
                "per": "step",
                "warmup_epochs": 0.5,
            },
        }
    )
