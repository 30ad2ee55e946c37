"""Your own network on your own folder of images: prepare, train in plain PyTorch, freeze, run without PyTorch.

    python examples/own_images.py shapes

`shapes` is a folder with one folder of images for each class; draw_shapes.py makes one to try.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import lowbit
from lowbit.predict import find_images, predict
from lowbit.train import Pixels, Schedule, calibrate_batchnorm, freeze, parameter_groups, prepare
from lowbit.train.data import DATASETS


class OwnNet(nn.Module):
    """Any nn.Module will do. There is no ReLU: the quantizer in front of each convolution takes its place."""

    def __init__(self, classes: int, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width))
        self.one = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        self.two = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * width))
        self.three = nn.Sequential(nn.Conv2d(2 * width, 2 * width, 3, 1, 1, bias=False), nn.BatchNorm2d(2 * width))
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.two(self.one(x) + x)
        return self.head((self.three(x) + x).mean((2, 3)))


def main(folder: Path, epochs: int = 20) -> float:
    torch.manual_seed(0)
    data = DATASETS.get("image_folder")(root=folder, size=32, channels=3)
    image = Pixels(zero_point=data.zero_point, scale=data.scale)  # the network reads raw pixels
    model = prepare(OwnNet(len(data.classes)), method="slb", weight_bits=1, activation_bits=1, image=image)

    x, y = data.train_x, data.train_y
    batches = len(x) // 20
    schedule = Schedule(model, total_steps=epochs * batches)
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.1, latent_lr_scale=10), momentum=0.9)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for epoch in range(epochs):
        for step, pick in enumerate(torch.randperm(len(x))[: batches * 20].view(batches, 20)):
            schedule.step(epoch * batches + step)
            loss = cross_entropy(model(x[pick]), y[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            slower.step()
    calibrate_batchnorm(model, x.split(100))  # statistics of the hard weights, always before evaluation
    model.eval()

    graph = freeze(model, x[:1], meta={"task": "classify", "classes": list(data.classes)})
    size = lowbit.save(graph, folder.with_suffix(".lowbit"))

    net = lowbit.load(folder.with_suffix(".lowbit"))  # from here on: no PyTorch
    answers = net(data.val_x.permute(0, 2, 3, 1).contiguous().numpy()).argmax(1)
    accuracy = float((answers == data.val_y.numpy()).mean())
    print(f"{size:,} bytes, {accuracy:.1%} of {len(answers)} held-out images")
    for found in predict(net, find_images([folder / data.classes[0]])[:3], top=2):
        print(found.path.name, *(f"{name} {share:.0%}" for name, share in found.classes))
    return accuracy


if __name__ == "__main__":
    torch.set_num_threads(1)  # a network this small gains nothing from more
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "shapes"))
