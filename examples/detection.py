"""Train a Faster R-CNN on GmNet to find coins: pip install 'gmnet-timm[demo]'

The picture is the photograph `coins` of scikit-image's wheel. Nobody has drawn boxes: the labels surround what a
watershed finds, 24 boxes that are right when looked at. From random weights it trains on three rows of coins and is
tested on the six of the last: enough to see that it works, not to compare detectors.
"""
import argparse

import numpy as np
import timm
import torch
from skimage import data, filters, measure, segmentation
from torchvision.models.detection.faster_rcnn import AnchorGenerator, FasterRCNN
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, box_iou

STEPS, BATCH, LR, SPLIT, HEIGHT, WIDTH = 60, 8, 2e-3, 225, 78, 160  # row of the split, size of the training pieces


class Pyramid(torch.nn.Module):
    def __init__(self, name, out_channels=64):
        super().__init__()
        self.body = timm.create_model(name, features_only=True, out_indices=(1, 2, 3))
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels)
        self.out_channels = out_channels

    def forward(self, x):
        return self.fpn({str(i): features for i, features in enumerate(self.body(x))})


def find_boxes(photo):
    seeds = np.where(photo > 150, 2, np.where(photo < 30, 1, 0))
    coins = measure.regionprops(measure.label(segmentation.watershed(filters.sobel(photo), seeds) == 2))
    return torch.tensor([[coin.bbox[i] for i in (1, 0, 3, 2)] for coin in coins if coin.area > 200]).float()


def random_crop(pixels, boxes):
    row, column = torch.randint(SPLIT - HEIGHT, ()), torch.randint(pixels.shape[2] - WIDTH, ())
    boxes, size = boxes - torch.stack([column, row, column, row]), torch.tensor([WIDTH, HEIGHT])
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    boxes = boxes[((centres > 0) & (centres < size)).all(1)].clamp(torch.zeros(4), size.repeat(2))
    return pixels[:, row:row + HEIGHT, column:column + WIDTH], {'boxes': boxes, 'labels': torch.ones(len(boxes)).long()}


argparse.ArgumentParser(description=__doc__).parse_args()  # for --help
torch.manual_seed(0)
pixels, boxes = torch.from_numpy(data.coins()).expand(3, -1, -1) / 255, find_boxes(data.coins())
pool = MultiScaleRoIAlign(['0', '1', '2'], output_size=7, sampling_ratio=2)
anchors = AnchorGenerator(((32,), (48,), (64,)), ((1.,),) * 3)
model = FasterRCNN(Pyramid('gmnet_s1'), 2, HEIGHT, pixels.shape[2], box_roi_pool=pool, rpn_anchor_generator=anchors)
optimizer = torch.optim.AdamW(model.parameters(), LR)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS)
for step in range(STEPS):
    loss = sum(model(*zip(*[random_crop(pixels, boxes[boxes[:, 3] < SPLIT]) for _ in range(BATCH)])).values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    if step % 10 == 9:
        print(f'step {step + 1}  loss {loss.item():.3f}')
result, coins = model.eval()([pixels[:, SPLIT:]])[0], boxes[boxes[:, 1] > SPLIT] - torch.tensor([0, SPLIT, 0, SPLIT])
overlap = box_iou(result['boxes'][result['scores'] > .5], coins) > .5
print(f'{overlap.any(0).sum()} of {len(coins)} unseen coins found, boxes without a coin: {(~overlap.any(1)).sum()}')
