"""Train on an exported set, with PyTorch and NumPy alone: python train_on_it.py SET TEST.npz (see --with-test)."""

import json
import pathlib
import sys

import numpy as np
import torch
from torch.nn import AvgPool2d, BatchNorm2d, Conv2d, Flatten, Linear, ReLU, Sequential, functional

home, test = sys.argv[1], np.load(sys.argv[2])  # images uint8 [M, 3, S, S] and labels [M] that nobody trains on
card = json.loads(pathlib.Path(home, "set.json").read_text())
recipe, student, size, heat = card["recipe"], card["student"], card["size"], card["recipe"]["temperature"]
view = {name: np.load(f"{home}/views/{name}.npy", "r") for name in card["recorded"]}  # epoch by epoch, in order
assert card["plain"], "its recipe has more than KL, resized crops, flips and CutMix: take distillery.load"
images, norm = np.load(f"{home}/images.npy"), [torch.tensor(card[key]).view(3, 1, 1) for key in ("mean", "std")]
depth, width = int(student["net"].removeprefix("convnet")), student["net_options"].get("width", 128)
inputs, norms = [3] + [width] * (depth - 1), {"momentum": recipe["bn_momentum"]}  # a ConvNet, or any net of yours
blocks = [(Conv2d(i, width, 3, padding=1), BatchNorm2d(width, **norms), ReLU(), AvgPool2d(2)) for i in inputs]
net = Sequential(*sum(blocks, ()), Flatten(), Linear(width * (size >> depth) ** 2, len(card["classes"])))
options = {"betas": recipe["betas"]} if recipe["optimizer"] == "adamw" else {"momentum": recipe["momentum"]}
optimizer = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[recipe["optimizer"]](net.parameters(), **options)
for epoch, rate in enumerate(card["lr"]):
    optimizer.param_groups[0].update(lr=rate, weight_decay=recipe["weight_decay"])
    for step, (a, b) in enumerate(card["steps"]):
        now = {name: torch.tensor(np.array(values[epoch, a:b])) for name, values in view.items()}
        x = torch.tensor(images[now["order"]]).float()
        for i, (top, left, tall, wide) in enumerate(now["box"].tolist() if "box" in now else ()):  # resized crops
            cut = x[i : i + 1, :, top : top + tall, left : left + wide]
            x[i : i + 1] = functional.interpolate(cut, (size, size), mode="bilinear", antialias=True)
        x = torch.where(now["flip"].view(-1, 1, 1, 1) > 0, x.flip(3), x) if "flip" in now else x
        for top, left, low, right in view["mix_box"][epoch, step : step + 1] if "mix_box" in view else ():  # CutMix
            x[:, :, top:low, left:right] = x[now["partner"].long(), :, top:low, left:right]
        own, soft = (logits.float() / heat for logits in (net((x / 255 - norm[0]) / norm[1]), now["logits"]))
        loss = functional.kl_div(own.log_softmax(1), soft.softmax(1), reduction="batchmean")
        optimizer.zero_grad()
        (loss * heat**2 if recipe["kl_t2"] else loss).backward()
        optimizer.step()
hits = net.eval()((torch.tensor(test["images"]) / 255 - norm[0]) / norm[1]).argmax(1).numpy() == test["labels"]
print(f"accuracy {100 * hits.mean():.2f} %, the report says {100 * student['acc_last']:.2f} %")
