"""Train a Unet on GmNet to segment stained tissue: pip install 'gmnet-timm[ecosystem,demo]'

The picture is the photograph `immunohistochemistry` of scikit-image's wheel. Nobody has drawn masks for it: the labels
are where a classical method (stain separation, blur, Otsu's threshold) finds the brown stain. So what is measured is
how well the network does what that method does, on rows that it has not seen. It starts from random weights.
"""
import argparse

import segmentation_models_pytorch as smp
import torch
from skimage import color, data, filters

STEPS, BATCH, CROP, LR = 60, 8, 96, 2e-3
TRAIN_ROWS, TEST_ROWS = slice(0, 352), slice(384, 512)


def load():
    """The normalised photograph (3, H, W), and which pixels are stained (H, W)."""
    photo = data.immunohistochemistry()
    stain = filters.gaussian(color.rgb2hed(photo)[..., 2], sigma=3)
    pixels = torch.from_numpy(photo).permute(2, 0, 1) / 255
    pixels = (pixels - pixels.mean((1, 2), keepdim=True)) / pixels.std((1, 2), keepdim=True)
    return pixels, torch.from_numpy(stain > filters.threshold_otsu(stain)).long()


def random_crops(pixels, mask):
    """A batch of pieces, half of them mirrored."""
    rows, columns = (torch.randint(size - CROP + 1, (BATCH,)) for size in mask.shape)
    both = torch.cat([pixels, mask[None]])
    pieces = torch.stack([both[:, r:r + CROP, c:c + CROP] for r, c in zip(rows, columns)])
    pieces[::2] = pieces[::2].flip(-1)
    return pieces[:, :3], pieces[:, 3].long()


def mean_iou(prediction, mask):
    hits = [((prediction == k) & (mask == k)).sum() / ((prediction == k) | (mask == k)).sum() for k in (0, 1)]
    return sum(hits).item() / 2


argparse.ArgumentParser(description=__doc__).parse_args()  # for --help
torch.manual_seed(0)
pixels, mask = load()
model = smp.Unet('tu-gmnet_s1', encoder_weights=None, classes=2)  # True for weights that are on the Hub
optimizer = torch.optim.AdamW(model.parameters(), LR)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS)
for step in range(STEPS):
    images, masks = random_crops(pixels[:, TRAIN_ROWS], mask[TRAIN_ROWS])
    loss = torch.nn.functional.cross_entropy(model(images), masks)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    if step % 10 == 9:
        print(f'step {step + 1}  loss {loss.item():.3f}')
with torch.inference_mode():
    prediction = model.eval()(pixels[None, :, TEST_ROWS])[0].argmax(0)
guess = max(mean_iou(torch.full_like(prediction, k), mask[TEST_ROWS]) for k in (0, 1))
print(f'mIoU on unseen rows {mean_iou(prediction, mask[TEST_ROWS]):.3f}, of one class everywhere {guess:.3f}')
