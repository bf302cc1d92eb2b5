"""Publishing, with the real huggingface_hub against a server on loopback."""
import argparse
import hashlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from hub_server import CUT, HANG, LOST, READ_TOKEN, TOKEN
from PIL import Image
from publishing_helpers import FILES, LABELS, make_run, python, refused, succeed, tiny_model

from gmnet_timm.info import BIBTEX, count_cost

# What is sent


def test_push_and_verify(run, hub, checkpoint, names):
    out = succeed(run('push', checkpoint, 'owner/tiny', '--class-names', names, '--top1', 50))
    files = hub.files('owner/tiny')
    assert set(files) >= FILES
    for name in FILES:
        assert hashlib.sha256(files[name]).hexdigest() in out
    assert hub.repos['owner/tiny'].refs['main'] in out
    assert not hub.repos['owner/tiny'].private
    assert len(hub.repos['owner/tiny'].commits) == 2  # the server's own, and one with everything
    text = succeed(run('verify', 'owner/tiny'))
    assert 'FAILED' not in text and 'as the server says' in text and text.count('ok ') == 6
    succeed(run('push', checkpoint, 'owner/tiny', '--class-names', names, '--top1', 50))
    assert hub.files('owner/tiny') == files


def test_card_is_kept(run, hub, checkpoint):
    hub.commit('owner/tiny', {'README.md': b'mine', 'notes.txt': b'also mine'})
    assert 'kept' in succeed(run('push', checkpoint, 'owner/tiny'))
    assert hub.files('owner/tiny')['README.md'] == b'mine'
    succeed(run('push', checkpoint, 'owner/tiny', '--overwrite-card'))
    assert hub.files('owner/tiny')['README.md'].startswith(b'---')
    assert hub.files('owner/tiny')['notes.txt'] == b'also mine'


def test_pull_request_private_revision(run, hub, checkpoint):
    succeed(run('push', checkpoint, 'tiny', '--private'))  # the owner is that of the token
    assert hub.repos['owner/tiny'].private
    before = hub.files('owner/tiny')
    torch.save(tiny_model(num_classes=4).state_dict(), checkpoint)
    out = succeed(run('push', checkpoint, 'owner/tiny', '--create-pr', '--overwrite-card'))
    assert '/discussions/1' in out
    assert hub.files('owner/tiny') == before and hub.files('owner/tiny', 'refs/pr/1') != before
    succeed(run('push', checkpoint, 'owner/tiny', '--revision', 'four', '--overwrite-card'))
    assert hub.files('owner/tiny') == before
    assert json.loads(hub.files('owner/tiny', 'four')['config.json'])['num_classes'] == 4
    assert 'num_classes=4' in succeed(run('verify', 'hf-hub:owner/tiny@four'))
    assert 'num_classes=3' in succeed(run('verify', 'owner/tiny'))


def test_a_repository_is_a_source(run, hub, tmp_path, checkpoint, names, monkeypatch):
    """Everything reads a published model from the Hub, as it reads a folder; a prefix decides where both exist."""
    monkeypatch.chdir(tmp_path)
    succeed(run('push', checkpoint, 'owner/tiny', '--class-names', names, '--model-kwargs', 'act_layer=gelu'))
    assert "act_layer='gelu'" in succeed(run('info', 'hf-hub:owner/tiny'))
    succeed(run('save', 'hf-hub:owner/tiny', 'copy'))
    assert (tmp_path / 'copy' / 'model.safetensors').read_bytes() == hub.files('owner/tiny')['model.safetensors']
    assert json.loads((tmp_path / 'copy' / 'config.json').read_text())['label_names'] == LABELS
    succeed(run('convert', 'hf-hub:owner/tiny', 'tiny.safetensors'))
    assert 'hf-hub:owner/nothing cannot be read' in run('info', 'hf-hub:owner/nothing')[2]
    (tmp_path / 'owner').mkdir()
    (tmp_path / 'copy').rename(tmp_path / 'owner' / 'tiny')
    assert 'commit' not in succeed(run('verify', 'owner/tiny'))
    assert 'commit' in succeed(run('verify', 'hf-hub:owner/tiny'))
    refused(run('verify', 'nowhere'), 'neither a folder nor the owner/name')


def test_dry_run_sends_nothing(run, hub, tmp_path, checkpoint, names, monkeypatch):
    """It writes the very files that a push sends."""
    monkeypatch.chdir(tmp_path)
    arguments = (checkpoint, 'owner/tiny', '--class-names', names)
    assert 'nothing was sent' in succeed(run('push', *arguments, '--dry-run'))
    assert not hub.requests
    succeed(run('push', *arguments))
    for name in FILES:
        assert (tmp_path / 'tiny' / name).read_bytes() == hub.files('owner/tiny')[name]


STAGES = [
    ('POST', '/api/repos/create'),
    ('GET', '/api/models/'),
    ('POST', '/api/validate-yaml'),
    ('POST', '/preupload/'),
    ('POST', '/objects/batch'),
    ('PUT', '/large/'),
    ('POST', '/verify'),
    ('POST', '/commit/'),
    ('HEAD', '/resolve/'),
    ('GET', '/resolve/'),
]
STATUSES = [401, 403, 404, 409, 429, 500, CUT, LOST]


def fault_cases():
    """Every third pair, two or three per stage; in the quick tests one of three stages."""
    for i, stage in enumerate(STAGES):
        for j, status in list(enumerate(STATUSES))[i % 3::3]:
            quick = i % 4 == 0 and j == i % 3
            marks = () if quick else (pytest.mark.slow,)
            yield pytest.param(*stage, status, marks=marks, id=f'{stage[0]}{stage[1].replace("/", "-")}{status}')


@pytest.mark.parametrize('method, path, status', list(fault_cases()))
def test_faults(run, hub, checkpoint, method, path, status):
    """Whatever fails: no traceback, no claim of success, nothing half published; the command repeated completes."""
    with hub.fault(method, path, status) as fault:
        result = run('push', checkpoint, 'owner/tiny')
    assert fault.hits, 'the fault was never met'
    present = set(hub.files('owner/tiny')) & FILES if 'owner/tiny' in hub.repos else set()
    assert present in (set(), FILES)
    if result[0] == 0:  # huggingface_hub may do without this request: a repository that exists needs no creation
        assert present == FILES
    else:
        message = refused(result, 'owner/tiny')
        exists = (path, status) == ('/api/repos/create', 409)  # so it is looked for, in vain
        assert str(404 if exists else status) in message or status in (CUT, LOST)
        assert ('could not be read back' in message) == (present == FILES and '/commit/' not in path)
    commits = len(hub.repos['owner/tiny'].commits) if present == FILES else None
    succeed(run('push', checkpoint, 'owner/tiny'))
    assert set(hub.files('owner/tiny')) >= FILES
    assert commits in (None, len(hub.repos['owner/tiny'].commits))  # nothing is published twice
    assert 'FAILED' not in succeed(run('verify', 'owner/tiny'))


@pytest.mark.parametrize('method, path, what', [('PUT', '/large/', 429), ('POST', '/commit/', HANG)])
@pytest.mark.slow
def test_waiting_ends(hub, checkpoint, tmp_path, method, path, what):
    """A server that never answers, or asks for two hours, gets no more than the time that it was given.

    In a process of its own, as the command runs: the request that is given up on goes on until that ends.
    """
    env = {**os.environ, 'HF_ENDPOINT': hub.url, 'HF_HOME': str(tmp_path / 'home'), 'HF_HUB_DISABLE_XET': '1'}
    command = [sys.executable, '-m', 'gmnet_timm', 'push', str(checkpoint), 'owner/tiny', '--timeout', '2']
    with hub.fault(method, path, what, {'Retry-After': '7200', 'RateLimit': '"api";r=0;t=7200'}) as fault:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert fault.hits and done.returncode == 1 and 'published' not in done.stdout
    (error,) = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert 'owner/tiny' in error and '--timeout' in error and 'Traceback' not in done.stderr
    assert ('verify owner/tiny' in error) == (path == '/commit/')


def test_commit_answered_without_a_url(run, hub, checkpoint, monkeypatch):
    """The answer is of no use, so that nothing is claimed; the repository says what is there."""
    real = json.dumps
    monkeypatch.setattr('hub_server.json.dumps', lambda x, **k: real(
        {key: value for key, value in x.items() if key != 'commitUrl'} if isinstance(x, dict) else x, **k))
    refused(run('push', checkpoint, 'owner/tiny'), 'no commit was confirmed', 'verify owner/tiny')


def test_concurrent_commit(run, hub, checkpoint, monkeypatch):
    """A commit of somebody else's between looking and committing is not built upon unseen."""
    hub.commit('owner/tiny', {'README.md': b'first'})
    from huggingface_hub import HfApi
    real = HfApi.model_info

    def model_info(*args, **kwargs):
        info = real(*args, **kwargs)
        hub.commit('owner/tiny', {'README.md': b'second'})
        return info

    monkeypatch.setattr(HfApi, 'model_info', model_info)
    refused(run('push', checkpoint, 'owner/tiny'), 'somebody else')
    assert hub.files('owner/tiny') == {'README.md': b'second'}


def test_damaged_on_the_server(run, hub, checkpoint):
    """A server that stores something other than it was sent is found out when the commit is read back."""
    real = hub.commit

    def commit(repo_id, files, ref='main'):
        files = {k: v.replace(b'gmnet', b'gmnot') if k == 'config.json' else v for k, v in files.items()}
        return real(repo_id, files, ref)

    hub.commit = commit
    refused(run('push', checkpoint, 'owner/tiny'), 'config.json', 'not what was sent')


def test_tokens(run, hub, checkpoint):
    hub.commit('other/tiny', {'README.md': b'theirs'})
    refused(run('push', checkpoint, 'other/tiny'), '403', '--create-pr')
    assert '/discussions/1' in succeed(run('push', checkpoint, 'other/tiny', '--create-pr'))
    refused(run('push', checkpoint, 'owner/tiny', '--token', READ_TOKEN), '403', 'permission')
    refused(run('push', checkpoint, 'owner/tiny', '--token', 'hf_wrong'), '401', 'hf auth login')
    assert 'owner/tiny' not in hub.repos and hub.files('other/tiny') == {'README.md': b'theirs'}
    refused(run('verify', 'owner/nothing'), 'owner/nothing')


# What others see


ROUND_TRIP = '''
import json
import timm, torch
model = timm.create_model('hf-hub:owner/tiny', pretrained=True).eval()
x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
from PIL import Image
image = Image.effect_noise((80, 72), 60).convert('RGB')
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
with torch.no_grad():
    result = {'timm': model(x).tolist(), 'photo': model(transform(image)[None]).softmax(-1)[0].tolist(),
              'labels': model.pretrained_cfg['label_names']}
if WITH_TRANSFORMERS:
    from transformers import AutoImageProcessor, TimmWrapperForImageClassification, pipeline
    wrapper = TimmWrapperForImageClassification.from_pretrained('owner/tiny').eval()
    with torch.no_grad():
        result['wrapper'] = wrapper(pixel_values=x).logits.tolist()
    classify = pipeline('image-classification', model='owner/tiny')
    with torch.no_grad():
        result['pipeline'] = classify.model(pixel_values=x).logits.tolist()
    result['shown'] = {entry['label']: entry['score'] for entry in classify(image, top_k=3)}
print(json.dumps(result))
'''


@pytest.mark.slow
def test_round_trip_with_timm(run, hub, tmp_path, checkpoint, names):
    """In a process that never imports gmnet_timm itself."""
    succeed(run('push', checkpoint, 'owner/tiny', '--class-names', names, '--img-size', 64))
    result = json.loads(python(ROUND_TRIP.replace('WITH_TRANSFORMERS', 'False'), hub.url, tmp_path))
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(torch.tensor(result['timm']), tiny_model()(x))
    assert result['labels'] == LABELS


@pytest.mark.ecosystem
def test_round_trip_with_transformers(run, hub, tmp_path, checkpoint, names):
    """timm, transformers' wrapper and its pipeline agree, and the pipeline shows labels by name."""
    succeed(run('push', checkpoint, 'owner/tiny', '--class-names', names, '--img-size', 64))
    result = json.loads(python(ROUND_TRIP.replace('WITH_TRANSFORMERS', 'True'), hub.url, tmp_path))
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = tiny_model()(x)
    for name in ('timm', 'wrapper', 'pipeline'):
        assert torch.equal(torch.tensor(result[name]), expected), name
    assert set(result['shown']) == set(LABELS)
    shown = [result['shown'][label] for label in LABELS]
    assert torch.allclose(torch.tensor(shown), torch.tensor(result['photo']), atol=1e-6)


@pytest.mark.slow
def test_registered_size_with_organisation(run, hub, tmp_path):
    """GMNET_TIMM_HUB_ORG makes `pretrained=True` load from there, also offline; what is missing is said clearly."""
    torch.manual_seed(0)
    model = timm.create_model('gmnet_s1', num_classes=7).eval()
    torch.save({'state_dict': model.state_dict()}, tmp_path / 's1.pth')
    succeed(run('push', tmp_path / 's1.pth', 'owner/gmnet_s1.in1k'))
    code = '''
import timm, torch
assert 'gmnet_s1.in1k' in timm.list_pretrained('gmnet*')
cfg = timm.get_pretrained_cfg('gmnet_s1')
assert cfg.hf_hub_id == 'owner/gmnet_s1.in1k', cfg
model = timm.create_model('gmnet_s1', pretrained=True, pretrained_cfg_overlay=dict(num_classes=7), num_classes=7).eval()
with torch.no_grad():
    print(model(torch.ones(1, 3, 32, 32)).tolist())
try:
    timm.create_model('gmnet_s2', pretrained=True)
except RuntimeError as e:
    print(e)
'''
    first, error = python(code, hub.url, tmp_path, GMNET_TIMM_HUB_ORG='owner').splitlines()
    with torch.no_grad():
        assert torch.equal(torch.tensor(json.loads(first)), model(torch.ones(1, 3, 32, 32)))
    assert 'from owner/gmnet_s2.in1k' in error and 'Repository Not Found' in error
    hub.repos.clear()  # from here on only the cache has it
    offline = python(code, hub.url, tmp_path, GMNET_TIMM_HUB_ORG='owner', HF_HUB_OFFLINE='1').splitlines()
    assert offline[0] == first and 'from owner/gmnet_s2.in1k' in offline[1]
    impatient = f'import time; time.sleep = lambda seconds: None\n{code}'  # huggingface_hub tries again for a minute
    nowhere = python(impatient, 'http://127.0.0.1:9', tmp_path, GMNET_TIMM_HUB_ORG='owner').splitlines()
    assert nowhere[0] == first and 'from owner/gmnet_s2.in1k' in nowhere[1] and 'network' in nowhere[1]


@pytest.mark.ecosystem
def test_published_weights_reach_a_segmenter(run, hub, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('gmnet_s1', num_classes=7)
    torch.save(model.state_dict(), tmp_path / 's1.pth')
    succeed(run('push', tmp_path / 's1.pth', 'owner/gmnet_s1.in1k'))
    code = '''
import segmentation_models_pytorch as smp
print(smp.Unet('tu-gmnet_s1', encoder_weights=True).encoder.model.stem_0.conv.weight.flatten().tolist())
'''
    loaded = torch.tensor(json.loads(python(code, hub.url, tmp_path, GMNET_TIMM_HUB_ORG='owner')))
    assert torch.equal(loaded, model.stem[0].conv.weight.detach().flatten())


# What a document shows of timm, and of transformers
PROGRAMS = pytest.mark.parametrize('index', [
    pytest.param(0, marks=pytest.mark.slow, id='timm'),
    pytest.param(1, marks=pytest.mark.ecosystem, id='transformers'),
])


def examples(card: str) -> dict[str, str]:
    """The Python examples of a card by their titles."""
    sections = [section.split('\n', 1) for section in card.split('\n### ')[1:]]
    found = {title: re.search(r'```python\n(.*?)```', text, re.DOTALL) for title, text in sections}
    return {title: code[1] for title, code in found.items() if code}


def test_card_usage_runs_as_printed(run, hub, tmp_path, checkpoint, names, monkeypatch, capsys):
    """A real photograph. The shapes in the comments are those that are printed."""
    succeed(run('push', checkpoint, 'owner/tiny', '--class-names', names, '--img-size', 64))
    card = hub.files('owner/tiny')['README.md'].decode()
    monkeypatch.chdir(tmp_path)
    photo = pytest.importorskip('skimage.data').astronaut()
    Image.fromarray(photo).save('photo.jpg')
    printed = {}
    for title, code in examples(card).items():
        if title != 'transformers':
            exec(code, {})
            printed[title] = capsys.readouterr().out.splitlines()
            comments = [line.removeprefix('# ') for line in code.splitlines() if line.startswith('# ')]
            assert not comments or printed[title] == comments
    assert [*printed] == ['Image classification', 'Feature maps', 'Image embeddings']
    rows = [line.split(' %  ') for line in printed['Image classification']]
    assert {name for _, name in rows} == set(LABELS) and sum(float(p) for p, _ in rows) == pytest.approx(100, abs=.1)
    assert len(printed['Feature maps']) == 4 and '`RuntimeError: Unknown model (gmnet_s1)`' in card.split('###')[0]


@pytest.mark.ecosystem
def test_card_usage_of_transformers_runs_as_printed(run, hub, tmp_path, checkpoint, names):
    succeed(run('push', checkpoint, 'owner/tiny', '--class-names', names, '--img-size', 64))
    Image.new('RGB', (320, 240)).save(tmp_path / 'photo.jpg')
    code = examples(hub.files('owner/tiny')['README.md'].decode())['transformers']
    assert 'owl' in python(code, hub.url, tmp_path)


@pytest.mark.parametrize('in_chans', [1, 4])
def test_card_usage_with_other_channels(in_chans, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = timm.create_model('gmnet_s1', base_dim=8, depths=(1, 1, 1, 1), in_chans=in_chans)
    torch.save(model.state_dict(), 'other.pth')
    mean, std = [['0.5'] * in_chans] * 2
    succeed(run('save', 'other.pth', 'model', '--img-size', 64, '--mean', *mean, '--std', *std))
    Image.new('L', (320, 240)).save('photo.jpg')
    codes = examples(Path('model', 'README.md').read_text())
    assert [*codes] == ['Image classification', 'Feature maps', 'Image embeddings']
    for code in codes.values():
        exec(code, {})
    assert ' %  ' in capsys.readouterr().out
    if importlib.util.find_spec('onnx'):
        refused(run('save', 'other.pth', 'onnx', '--onnx'), f'takes {in_chans} channels')
        assert not Path('onnx').exists()


@pytest.mark.slow
def test_card_facts(run, tmp_path):
    """Of the authors' size: cost by hand, sizes of training and test, the family, the authors in the citation."""
    torch.save(timm.create_model('gmnet_s3').state_dict(), tmp_path / 's3.pth')
    folder = make_run(tmp_path / 'run', num_classes=1000, model='gmnet_s3', model_kwargs={}, img_size=192)
    torch.save({'epoch': 1, 'state_dict': torch.load(tmp_path / 's3.pth')}, folder / 'model_best.pth.tar')
    succeed(run('save', folder, tmp_path / 'as-trained'))
    assert 'These weights: 40.25 %, by train.py (summary.csv, epoch 1).' in (
        tmp_path / 'as-trained' / 'README.md').read_text()
    succeed(run('save', folder, tmp_path / 'out', '--img-size', 224))
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert '| Parameters (M) | 7.792 |' in card and '| GMACs | 1.24 (' in card
    assert '| Image size | train = 192 x 192, test = 224 x 224 |' in card
    assert '| **gmnet_s3** | 7.8 | 1.2 | 79.3 | released |' in card and card.count('| reconstructed |') == 3
    assert 'These weights' not in card and 'of other preprocessing than is published' in card
    assert BIBTEX in card and 'Ma, Xu' in BIBTEX


@pytest.mark.parametrize('name, millions', [('resnet18', 2.48), ('resnet50', 11.11), ('mobilenetv2_100', 6.68)])
def test_activations_are_counted_as_timm_counts(name, millions):
    """Against timm's own model cards, which have them from fvcore."""
    assert count_cost(timm.create_model(name), (3, 224, 224))[1] / 1e6 == pytest.approx(
        millions, abs=.006)


@PROGRAMS
def test_every_documented_command(index, run, hub, tmp_path, names, monkeypatch):
    """docs/publishing.md, from top to bottom; for transformers only what publishes the model that its program loads."""
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / 'run')
    torch.save(tiny_model().state_dict(), 'checkpoint.pth')
    Path('results.csv').write_text('model,top1,top5\ngmnet_s1,61.5,88.25\n')
    for name in LABELS:
        Path('pets', name).mkdir(parents=True)
        Path('pets', name, 'x.jpg').touch()
    text = (Path(__file__).parents[2] / 'docs' / 'publishing.md').read_text(encoding='utf-8')
    blocks = re.findall(r'```(console|python)\n(.*?)```', text, re.DOTALL)
    commands = [line for language, block in blocks if language == 'console' for line in block.splitlines()]
    assert len(commands) >= 15
    if index == 1:
        commands = [line for line in commands if 'owner/my-gmnet' in line and 'names.txt' in line][:1]
    if importlib.util.find_spec('onnxscript') is None:
        commands = [line for line in commands if 'onnx' not in line]
    for command in commands:
        prompt, program, *arguments = shlex.split(command)
        assert (prompt, program) == ('$', 'gmnet-timm'), command
        assert 'FAILED' not in succeed(run(*arguments)), command
    programs = [block for language, block in blocks if language == 'python']
    assert ('cat', 'owl')[index] in python(programs[index], hub.url, tmp_path, HF_TOKEN=TOKEN)


@pytest.mark.slow
def test_readme_brings_a_checkpoint_of_the_authors_to_the_hub(run, hub, tmp_path, monkeypatch):
    """The section about them in README.md, with a file as their trainer writes it: with arguments of timm 0.6."""
    monkeypatch.chdir(tmp_path)
    weights = timm.create_model('gmnet_s3').state_dict()
    args = argparse.Namespace(
        model='gmnet_s3', data='/data', num_classes=None, gp=None, img_size=None, drop=0.0, drop_path=0.0,
        drop_connect=None, drop_block=None, split_bn=False, native_amp=False, teacher_model='regnety_160',
        distillation_type='none')
    torch.save({'epoch': 309, 'arch': 'gmnet_s3', 'state_dict': weights, 'optimizer': {'state': {}, 'param_groups': []},
                'version': 2, 'args': args, 'metric': 79.3}, 'FILE')
    Image.effect_noise((300, 250), 60).convert('RGB').save('cat.jpg')
    readme = (Path(__file__).parents[2] / 'README.md').read_text(encoding='utf-8')
    section = readme[readme.index("## The authors' weights"):readme.index('## Train on ImageNet')]
    commands, = re.findall(r'```bash\n(.*?)```', section, re.DOTALL)
    for command in commands.splitlines():
        program_name, *arguments = shlex.split(command.replace('you/', 'owner/'), comments=True)
        assert program_name == 'gmnet-timm' and 'FAILED' not in succeed(run(*arguments)), command
    code = '''import timm
model = timm.create_model('hf-hub:owner/gmnet_s3', pretrained=True)
print(model.state_dict()["head.weight"].double().sum().item())'''
    assert float(python(code, hub.url, tmp_path, HF_TOKEN=TOKEN)) == weights['head.weight'].double().sum().item()
