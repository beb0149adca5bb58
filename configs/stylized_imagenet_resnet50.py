"""ResNet-50 on stylised ImageNet, the three schemes of Geirhos et al. 2019.

What: Table 2 there. "a": stylised images alone; "b": both; "c", Shape-ResNet: "b" gone on with
    ordinary images.
Command: python scripts/train.py --config=configs/stylized_imagenet_resnet50.py:a \
        --workdir=runs/sin --config.data.path=stylized_imagenet \
        --config.data.further.imagenet=imagenet/val
    b: --config.data.path is a folder with the images of both sets in each class. c: :c with
    --config.weights=runs/b/weights.safetensors and --config.data.path=imagenet.
    Cue conflicts after each epoch: --config.data.cue_conflict=cue-conflict.
Cost: 60 epochs of 1.28 million images (b: 45 of 2.56 million): a pod of accelerators for a day.
Measured: not run. Published (shape bias, top-1, top-5): a 81.37 60.18 82.62, b 34.65 74.59 92.14,
    c 20.54 76.72 93.28, the network before 21.39 76.13 92.86.
"""

import ml_collections


def get_config(scheme: str = "a") -> ml_collections.ConfigDict:
    """`scheme`: a, b or c."""
    if scheme not in ("a", "b", "c"):
        raise ValueError(f"scheme {scheme!r}: expected a, b or c")
    rate, epochs, milestones = {
        "a": (0.1, 60, (20, 40)),
        "b": (0.1, 45, (15, 30)),
        "c": (0.01, 60, (30,)),
    }[scheme]
    return ml_collections.ConfigDict(
        {
            "seed": 0,
            "network": "resnet50",
            "topk": "",
            "weights": "" if scheme == "c" else "imagenet",
            "epochs": epochs,
            "batch_size": 256,
            "precision": "float32",
            "log_every": 100,
            "checkpoint_every": 1000,
            "evaluate_every": 1,
            "data": {
                "source": "folder",
                "path": "stylized_imagenet",
                "train": "train",
                "validation": "val",
                "further": {"imagenet": ""},
                "cue_conflict": "",
                "image_size": 224,
                "resize_size": 256,
            },
            "optimizer": {
                "name": "sgd",
                "learning_rate": rate,
                "momentum": 0.9,
                "weight_decay": 1e-4,
                "decay": "all",
                "schedule": "step",
                "milestones": milestones,
                "factor": 0.1,
            },
        }
    )
