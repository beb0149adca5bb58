"""ResNet-50 on ImageNet, plain or with Top-K, on a pod.

What: the network that the shape bias of trained Top-K networks is compared with.
Command, on every machine of the pod: python scripts/train.py --distributed \
        --config=configs/imagenet_resnet50.py --workdir=runs/resnet50 --config.data.path=imagenet
    With Top-K after the second stage: --config.topk=2_20. Images prepared by tensorflow-datasets as
    array_record: --config.data.source=tfds --config.data.path=imagenet2012
    --config.data.validation=validation. `workdir` must be the same folder for all machines.
Cost: 90 epochs of 1.28 million images: hours on a pod of accelerators.
Measured: not run.
Recipe: Goyal et al. 2017: rate .1 for each 256 images of a batch, five epochs of warm-up, here with
    a cosine, label smoothing .1 and bfloat16 activations.
"""

import ml_collections


def get_config(batch_size: str = "1024") -> ml_collections.ConfigDict:
    """`batch_size`: images a step over all devices; the rate follows it."""
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "network": "resnet50",
            "topk": "",
            "weights": "",
            "epochs": 90,
            "batch_size": int(batch_size),
            "precision": "bfloat16",
            "ema_decay": 0.0,
            "log_every": 100,
            "checkpoint_every": 1000,
            "evaluate_every": 1,
            "data": {
                "source": "folder",
                "path": "imagenet",
                "train": "train",
                "validation": "val",
                "further": {},
                "suppressed": (),
                "cue_conflict": "",
                "image_size": 224,
                "resize_size": 256,
            },
            "optimizer": {
                "name": "sgd",
                "learning_rate": 0.1 * int(batch_size) / 256,
                "momentum": 0.9,
                "nesterov": True,
                "weight_decay": 1e-4,
                "decay": "kernels",
                "schedule": "cosine",
                "per": "step",
                "warmup_epochs": 5.0,
            },
            "loss": {"name": "cross_entropy", "label_smoothing": 0.1},
        }
    )
