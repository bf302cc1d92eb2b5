"""Two steps of SGD by somebody's trainer end in the weights that two steps of a plain loop end in."""
import copy

import pytest
import timm
import torch
from model_helpers import randomize
from torch.nn.functional import cross_entropy

from gmnet_timm.errors import UserError
from gmnet_timm.weights.model import load_model

LR = .05
IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 1])
BATCH = list(zip(IMAGES, LABELS))


@pytest.fixture
def model():
    return randomize(timm.create_model('gmnet_s1', num_classes=3))


@pytest.fixture
def expected(model):
    """Weights after two steps."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), LR)
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(model(IMAGES), LABELS).backward()
        optimizer.step()
    return model.state_dict()


def check(model, before, expected):
    assert not torch.equal(before['stem.0.conv.weight'], expected['stem.0.conv.weight'])
    torch.testing.assert_close(dict(model.state_dict()), dict(expected), rtol=1e-3, atol=1e-4)


def check_file(path, model):
    """What the trainer saved is read as the model that it trained."""
    found = load_model(str(path)).model
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())


def test_transformers(model, expected, tmp_path):
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, Trainer, TrainingArguments
    wrapper = TimmWrapperForImageClassification(TimmWrapperConfig(architecture='gmnet_s1', num_labels=3))
    wrapper.timm_model.load_state_dict(model.state_dict())
    arguments = TrainingArguments(
        str(tmp_path), optim='sgd', learning_rate=LR, lr_scheduler_type='constant', max_grad_norm=0, max_steps=2,
        per_device_train_batch_size=4, save_strategy='no', report_to='none', use_cpu=True, remove_unused_columns=False)
    dataset = [{'pixel_values': image, 'labels': label} for image, label in BATCH]
    trainer = Trainer(wrapper, arguments, train_dataset=dataset)
    assert trainer.train().global_step == 2
    check(wrapper.timm_model, model.state_dict(), expected)
    trainer.save_model(str(tmp_path / 'trained'))
    check_file(tmp_path / 'trained', wrapper.timm_model)


def test_lightning(model, expected, tmp_path):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = copy.deepcopy(model)

        def training_step(self, batch, _):
            return cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), LR)

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=2, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(module, torch.utils.data.DataLoader(BATCH, 4))
    check(module.model, model.state_dict(), expected)
    trainer.save_checkpoint(tmp_path / 'epoch=2-step=2.ckpt')
    check_file(tmp_path / 'epoch=2-step=2.ckpt', module.model)


def test_fastai(model, expected, tmp_path):
    from fastai.callback.progress import ProgressCallback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import SGD
    learner = Learner(
        DataLoaders.from_dsets(BATCH, BATCH, bs=4, device='cpu', num_workers=0), copy.deepcopy(model),
        loss_func=cross_entropy, opt_func=SGD, wd=0.)
    learner.remove_cb(ProgressCallback)
    learner.fit(2, LR)
    check(learner.model, model.state_dict(), expected)
    learner.save(tmp_path / 'trained', with_opt=False)
    check_file(tmp_path / 'trained.pth', learner.model)
    learner.save(tmp_path / 'with-optimizer')  # it holds a class of fastai's
    with pytest.raises(UserError, match='would run code, which is refused. It asks for fastcore'):
        load_model(str(tmp_path / 'with-optimizer.pth'))


def test_fastai_takes_the_name():
    from fastai.callback.progress import ProgressCallback
    from fastai.data.core import DataLoaders
    from fastai.vision.learner import vision_learner
    dls = DataLoaders.from_dsets(BATCH, BATCH, bs=4, device='cpu', num_workers=0)
    learner = vision_learner(dls, 'gmnet_s1', pretrained=False, n_out=3, normalize=False, loss_func=cross_entropy)
    learner.remove_cb(ProgressCallback)
    stem = learner.model[0].model.stem[0].conv.weight
    for frozen, change in ((True, learner.freeze), (False, learner.unfreeze)):
        change()
        assert stem.requires_grad is not frozen
    loss = cross_entropy(learner.model.train()(IMAGES), LABELS).item()
    learner.fit(12, 2e-3)
    assert cross_entropy(learner.model.train()(IMAGES), LABELS).item() < .3 * loss
