"""What is published is true of what is published, compared with what timm and the run itself say."""
import json

import pytest
import timm
import torch
from PIL import Image
from publishing_helpers import TINY, make_run, refused, succeed, tiny_model
from safetensors.torch import save_file
from timm.data import create_dataset, create_transform, resolve_data_config

from gmnet_timm.hub.push import push


def labels(folder):
    return json.loads((folder / 'config.json').read_text())['label_names']


@pytest.fixture
def images(tmp_path):
    def make(*classes):
        folder = tmp_path / 'images'
        for name in classes:
            (folder / 'train' / name).mkdir(parents=True)
            Image.new('RGB', (8, 8)).save(folder / 'train' / name / 'x.jpg')
        return folder
    return make


# Class names


def test_class_names_in_the_order_of_the_run(run, tmp_path, images):
    folder, class_map = images('cat', 'dog', 'owl'), tmp_path / 'map.txt'
    class_map.write_text('owl\ndog\ncat\n')
    trained = create_dataset('', root=str(folder), split='train', class_map=str(class_map)).reader.class_to_idx
    mapped = make_run(tmp_path / 'run', class_map=str(class_map))
    succeed(run('save', mapped, tmp_path / 'a', '--class-names', folder))
    assert labels(tmp_path / 'a') == sorted(trained, key=trained.get) == ['owl', 'dog', 'cat']
    class_map.unlink()
    refused(run('save', mapped, tmp_path / 'b', '--class-names', folder), 'map.txt, which is not here', 'text file')


def test_class_names_as_torchvision_sorts_them(run, tmp_path, images):
    folder = images('1', '2', '10')
    trained = create_dataset('torch/image_folder', root=str(folder), split='train').class_to_idx
    succeed(run('save', make_run(tmp_path / 'run', dataset='torch/image_folder'), tmp_path / 'a',
                '--class-names', folder))
    assert labels(tmp_path / 'a') == sorted(trained, key=trained.get) == ['1', '10', '2']
    refused(run('save', make_run(tmp_path / 'other', dataset='hfds/some/data'), tmp_path / 'b',
                '--class-names', folder), 'hfds/some/data', 'text file')


def test_class_names_of_a_file_with_a_byte_order_mark(run, tmp_path, checkpoint):
    (tmp_path / 'bom.txt').write_bytes('\ufeffcat\ndog\nowl\n'.encode())
    succeed(run('save', checkpoint, tmp_path / 'a', '--class-names', tmp_path / 'bom.txt'))
    assert labels(tmp_path / 'a') == ['cat', 'dog', 'owl']


# Accuracies


def test_no_accuracy_of_other_preprocessing(run, tmp_path):
    folder = make_run(tmp_path / 'run')
    for i, stated in enumerate((['--img-size', '224'], ['--mean', '.1'], ['--crop-pct', '.5'])):
        _, _, err = run('save', folder, tmp_path / f'{i}', *stated)
        assert 'of other preprocessing' in err and '40.25' not in (tmp_path / f'{i}' / 'README.md').read_text()


def test_accuracy_of_the_line_that_is_the_checkpoints(run, tmp_path):
    """A resumed run can have two lines for one epoch."""
    folder = make_run(tmp_path / 'run')
    (folder / 'summary.csv').write_text('epoch,eval_top1,eval_top5\n0,10,90\n1,80,91\n2,30,92\n1,55.5,93\n')
    content = torch.load(folder / 'model_best.pth.tar', weights_only=True)
    torch.save({**content, 'metric': 80.}, folder / 'model_best.pth.tar')
    succeed(run('save', folder, tmp_path / 'a'))
    text = (tmp_path / 'a' / 'README.md').read_text()
    assert '| 80' in text and '55.5' not in text
    torch.save({**content, 'metric': 12.}, folder / 'model_best.pth.tar')
    assert "does not have the checkpoint's own eval_top1 of 12" in run('save', folder, tmp_path / 'b')[2]


@pytest.mark.parametrize('text, problem', [
    ('model,top1,top5,img_size\nresnet50,99.9,100,224\n', 'resnet50'),
    ('model,top1,top5,img_size\ngmnet_s1,99.9,100,288\n', '288 pixels'),
    ('model;top1;top5\ngmnet_s1;77,1;100,0\n', 'no column top1'),
    ('model,top1\ngmnet_s1,1\ngmnet_s1,2\n', '2 results'),
])
def test_results_that_are_not_of_these_weights(text, problem, run, tmp_path, checkpoint):
    (tmp_path / 'r.csv').write_text(text)
    refused(run('save', checkpoint, tmp_path / 'a', '--results', tmp_path / 'r.csv'), problem)


# What a training started from


def test_preprocessing_of_the_folder_that_a_training_started_from(run, tmp_path, checkpoint):
    stated = '--mean .5 .5 .5 --std .25 .25 .25 --interpolation bilinear --img-size 96'
    succeed(run('save', checkpoint, tmp_path / 'base', *stated.split()))
    args = {'model': f'local-dir:{tmp_path / "base"}', 'img_size': None, 'crop_pct': None, 'mean': None, 'std': None,
            'interpolation': '', 'model_kwargs': {}}
    folder = make_run(tmp_path / 'run', **args)
    succeed(run('save', folder, tmp_path / 'tuned'))
    theirs = resolve_data_config(args, model=timm.create_model(args['model']))  # as train.py
    ours = resolve_data_config({}, model=timm.create_model(f'local-dir:{tmp_path / "tuned"}'))
    assert json.dumps(theirs) == json.dumps(ours)  # lists as tuples
    assert [*ours['mean'], *ours['input_size']] == [.5, .5, .5, 3, 96, 96]


def test_republishing_keeps_what_is_not_understood(run, tmp_path, checkpoint, names):
    succeed(run('save', checkpoint, tmp_path / 'a', '--class-names', names))
    config = json.loads((tmp_path / 'a' / 'config.json').read_text())
    config['label_descriptions'] = {'cat': 'felis', 'dog': 'canis', 'owl': 'strix'}
    more = dict(test_input_size=[3, 128, 128], test_crop_pct=1., origin_url='https://example.org/mine')
    config['pretrained_cfg'].update(more)
    (tmp_path / 'a' / 'config.json').write_text(json.dumps(config))
    succeed(run('save', tmp_path / 'a', tmp_path / 'b'))
    again = json.loads((tmp_path / 'b' / 'config.json').read_text())
    assert again['label_descriptions'] == config['label_descriptions']
    assert more.items() <= again['pretrained_cfg'].items()


# Folders of other trainers


def test_folder_of_transformers_trainer(run, tmp_path):
    """What its TimmWrapperForImageClassification saves; tests/ecosystem has one that transformers itself writes."""
    folder, model = tmp_path / 'trained', tiny_model(act_layer='gelu')
    folder.mkdir()
    save_file({f'timm_model.{key}': value for key, value in model.state_dict().items()}, folder / 'model.safetensors',
              metadata={'format': 'pt'})
    (folder / 'config.json').write_text(json.dumps({
        'architecture': 'gmnet_s1', 'architectures': ['TimmWrapperForImageClassification'],
        'model_type': 'timm_wrapper',
        'initializer_range': 0.02, 'label_names': ['a', 'b', 'c'], 'model_args': {**TINY, 'act_layer': 'gelu'},
        'num_classes': 3, 'num_features': 64, 'pretrained_cfg': {'input_size': [3, 64, 64], 'classifier': 'head'}}))
    status, out, err = run('info', folder)
    assert status == 0 and 'gelu' in out and 'The prefix timm_model. of all names was removed' in err
    succeed(run('save', folder, tmp_path / 'out'))
    saved = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(saved(x), model(x), rtol=0, atol=0)
    assert labels(tmp_path / 'out') == ['a', 'b', 'c']


@pytest.mark.parametrize('content', [
    lambda weights: {'epoch': 3, 'global_step': 40, 'pytorch-lightning_version': '2.5', 'loops': {}, 'callbacks': {},
                     'optimizer_states': [], 'hyper_parameters': {'lr': 0.1},
                     'state_dict': {f'model.{key}': value for key, value in weights.items()}},
    lambda weights: {'model': weights, 'epoch': 3},
], ids=['Lightning', 'under model'])
def test_files_of_other_trainers(content, run, tmp_path):
    model = tiny_model()
    torch.save(content(model.state_dict()), tmp_path / 'epoch=3-step=40.ckpt')  # as Lightning names it
    succeed(run('info', tmp_path / 'epoch=3-step=40.ckpt'))
    succeed(run('save', tmp_path / 'epoch=3-step=40.ckpt', tmp_path / 'out'))
    saved = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in saved.state_dict().items())


# Other files of a repository


def test_weights_of_earlier_uploads_are_named(run, hub, checkpoint, tmp_path):
    succeed(run('push', checkpoint, 'owner/x'))
    repo = hub.repos['owner/x']
    more = {'onnx/model_quantized.onnx': b'1', 'pytorch_model.bin': b'2', 'notes.txt': b''}
    repo.commits[repo.refs['main']].update(more)
    status, _, err = run('push', checkpoint, 'owner/x')
    assert status == 0 and 'notes.txt' not in err
    assert 'owner/x still has other weights: onnx/model_quantized.onnx, pytorch_model.bin.' in err
    assert 'hf repos delete-files owner/x FILE' in err
    succeed(run('save', checkpoint, tmp_path / 'out'))
    (tmp_path / 'out' / 'pytorch_model.bin').touch()
    assert 'still has other weights: pytorch_model.bin.' in run('save', checkpoint, tmp_path / 'out', '--force')[2]


def test_advice_for_a_name_and_for_a_missing_token(run, hub, checkpoint, tmp_path, monkeypatch):
    for command in (['push', checkpoint, 'you/my gmnet'], ['push', checkpoint, 'you/my gmnet', '--dry-run'],
                    ['verify', 'you/my gmnet']):
        err = refused(run(*command), 'my gmnet', 'letters, digits')
        assert 'connection' not in err
    monkeypatch.delenv('HF_TOKEN')
    monkeypatch.setenv('HF_TOKEN_PATH', str(tmp_path / 'none'))
    for name in ('x', 'owner/new'):
        err = refused(run('push', checkpoint, name), 'hf auth login')
        assert 'connection' not in err
    assert not hub.repos


# Classes of a picture


def test_predict(run, tmp_path, checkpoint, names):
    """The numbers are those of timm's own transform and a softmax, of the picture as a camera shows it."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees
    upright = Image.effect_noise((90, 60), 60).convert('RGB')
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / 'photo.png', exif=exif)
    stated = ['--img-size', '64', '--class-names', names]
    out = succeed(run('predict', checkpoint, tmp_path / 'photo.png', '--top', '3', *stated))
    model = tiny_model()
    cfg = timm.get_pretrained_cfg('gmnet_s1').to_dict()
    config = resolve_data_config({'img_size': 64}, model=model, pretrained_cfg=cfg)
    with torch.no_grad():
        p = model(create_transform(**config)(upright)[None]).softmax(1)[0]
    expected = ', '.join(f'{["cat", "dog", "owl"][i]} {100 * p[i]:.1f} %' for i in p.argsort(descending=True))
    assert out.splitlines()[-1].endswith(expected)
    (tmp_path / 'no.png').write_text('x')
    refused(run('predict', checkpoint, tmp_path / 'no.png'), 'no.png')
    refused(run('predict', checkpoint, tmp_path / 'photo.png', '--top', '0'), '--top')
    refused(run('predict', tmp_path / 'none.pth', tmp_path / 'photo.png'), 'none.pth')


def test_push_from_python_refuses_a_name(checkpoint):
    from gmnet_timm.errors import UserError
    from gmnet_timm.hub.publication import collect_publication
    from gmnet_timm.weights.model import read_source
    with pytest.raises(UserError, match='letters, digits'):
        push(collect_publication(read_source(checkpoint)), 'you/my gmnet')
