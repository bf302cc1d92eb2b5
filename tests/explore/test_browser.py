"""The page of `freq explore` in a real browser: it says what `freq image` prints, and asks no other host."""
import argparse
import base64
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from model_helpers import randomize
from PIL import Image

from gmnet_timm.cli.main import main

CHROME = shutil.which('chromium') or shutil.which('google-chrome')
DRIVER = shutil.which('chromedriver')
MISSING = [name for name, found in (
    ('gradio', importlib.util.find_spec('gradio')), ('selenium', importlib.util.find_spec('selenium')),
    ('chromium', CHROME), ('chromedriver', DRIVER)) if not found]
pytestmark = [
    pytest.mark.slow, pytest.mark.timeout(400),
    pytest.mark.skipif(bool(MISSING), reason=f'needs a browser to look at the page: no {", ".join(MISSING)}')]

NAMES = ['cat <i>', 'cup', 'rocket', 'coins', 'text']  # a name that would be markup if it were not escaped
SECONDS = 60


def _classifier(name: str, size: int, **kwargs):
    """A model of random weights whose answers depend on the picture: its logits have a spread of one over noise."""
    model = randomize(timm.create_model(name, num_classes=len(NAMES), **kwargs)).eval()
    head = model.get_classifier()
    noise = torch.randn(8, kwargs.get('in_chans', 3), size, size)
    noise = noise * torch.linspace(.2, 2, 8).view(-1, 1, 1, 1)
    with torch.no_grad():
        logits = model(noise)
        head.bias -= logits.mean(0)
        for p in head.parameters():
            p /= logits.std()
    return model


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Models, pictures, and what must not be taken for one."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp('explore')
    torch.save(_classifier('test_vit', 160).state_dict(), root / 'test_vit.pth')
    for file, chans in (('gmnet', 3), ('grey', 1)):  # as train.py saves them
        args = argparse.Namespace(model='gmnet_s1', num_classes=len(NAMES), in_chans=chans, img_size=96)
        model = _classifier('gmnet_s1', 96, in_chans=chans)
        torch.save({'state_dict': model.state_dict(), 'args': args}, root / f'{file}.pth')
    rng = np.random.default_rng(0)
    for label in 'abcde':
        (root / 'data' / label).mkdir(parents=True)
        for i in range(2):
            _picture(rng).save(root / 'data' / label / f'{i}.png')
    _picture(rng).save(root / 'photo.png')
    (root / 'names.txt').write_text('\n'.join(NAMES))
    (root / 'notes.txt').write_text('no picture')
    Image.new('1', (10_000, 10_000)).save(root / 'huge.png')
    (root / 'tmp').mkdir()
    return root


def _picture(rng) -> Image.Image:
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((320, 240), Image.BICUBIC)
    return Image.fromarray((.7 * np.asarray(coarse) + rng.integers(0, 77, (240, 320, 3))).astype(np.uint8))


class Served:
    """The page in a process of its own, as a user would start it."""

    def __init__(self, folder: Path, *argv: str):
        env = {**os.environ, 'TMPDIR': str(folder / 'tmp'), 'GRADIO_SERVER_NAME': '0.0.0.0', 'GRADIO_SHARE': 'True'}
        # the shell of a test run may ignore SIGINT, and hand that on
        restored = 'import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); '
        restored += 'from gmnet_timm.cli.main import main; sys.exit(main())'
        self.process = subprocess.Popen(
            [sys.executable, '-c', restored, 'freq', 'explore', *argv], cwd=folder, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        line = self.process.stdout.readline()
        assert 'Ctrl-C' in line, self.process.stderr.read()
        self.url = line.split()[0]

    def end(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGINT)
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors


@pytest.fixture(scope='module')
def served(folder):
    page = Served(
        folder, 'gmnet.pth', 'test_vit=test_vit.pth', 'grey.pth', '--class-names', 'names.txt', '--data-dir', 'data')
    yield page
    if page.process.poll() is None:
        page.process.kill()


@pytest.fixture
def browser():
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = CHROME
    for argument in ('headless=new', 'no-sandbox', 'disable-dev-shm-usage', 'window-size=1280,800',
                     'proxy-server=direct://'):
        options.add_argument(f'--{argument}')
    options.set_capability('goog:loggingPrefs', {'performance': 'ALL', 'browser': 'ALL'})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def _wait(condition, seconds=SECONDS):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(.1)
    raise AssertionError(f'not within {seconds} s')


def _text(browser, selector: str) -> str:
    return browser.execute_script('return document.querySelector(arguments[0])?.innerText ?? ""', selector)


def _count(browser, selector: str) -> int:
    return browser.execute_script('return document.querySelectorAll(arguments[0]).length', selector)


def _open(browser, served) -> None:
    browser.get(served.url)
    _wait(lambda: _count(browser, '#cards li'))


def _drop(browser, file: Path) -> None:
    """Drop a file where pictures are dropped, as a hand would."""
    browser.execute_script('''
        const [text, name] = arguments;
        const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], name));
        const target = document.querySelector('#file button');
        for (const type of ['dragenter', 'dragover', 'drop'])
            target.dispatchEvent(new DragEvent(type, {dataTransfer: transfer, bubbles: true, cancelable: true}));
    ''', base64.b64encode(file.read_bytes()).decode(), file.name)


def _answers(browser) -> dict[tuple[str, str], list[str]]:
    """Lines like 'cup 23.4 %' by model and part."""
    rows = browser.execute_script('''
        return [...document.querySelectorAll('#cards ol')].map((list) => [list.dataset.model, list.dataset.band,
            [...list.children].map((item) => [...item.children].map((part) => part.textContent).join(' '))])
    ''')
    return {(model, band): lines for model, band, lines in rows}


def _printed(folder, spec: str, capsys, *argv: str) -> dict[str, list[str]]:
    """The same of `freq image`, by part."""
    capsys.readouterr()
    command = ['freq', 'image', str(folder / 'photo.png'), '--model', spec, '--class-names', str(folder / 'names.txt'),
               '--radii', '6', '15', '--bands', 'low', 'high', 'band-pass', '--top', '5', '--force',
               '--output', str(folder / 'out'), *argv]
    assert main(command) == 0
    lines = [re.match(r'(\S+)(?: r = (\S+))? +(.*)', line) for line in capsys.readouterr().out.splitlines()[:6]]
    return {f'{m[1]} {m[2]}' if m[2] else m[1]: m[3].split(', ') for m in lines}


SPECS = {'gmnet': '{}/gmnet.pth', 'test_vit': 'test_vit={}/test_vit.pth', 'grey': '{}/grey.pth'}


def test_the_page_says_what_freq_image_prints(browser, served, folder, capsys):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    _open(browser, served)
    _drop(browser, folder / 'photo.png')
    _wait(lambda: 'photo.png, 320×240' in _text(browser, '#message'))
    slider = browser.find_element(By.CSS_SELECTOR, '#radius input[type=range]')
    slider.send_keys(Keys.ARROW_RIGHT)  # from 5 to 6
    _wait(lambda: '≤ 6' in _text(browser, '#cards'))
    shown = _answers(browser)
    labels = list(dict.fromkeys(model for model, _ in shown))
    bands = ['raw', 'low 6', 'band-pass 6-15', 'high 6']
    assert len(labels) == 3 and len(shown) == 12
    for label, spec in zip(labels, SPECS.values(), strict=True):
        printed = _printed(folder, spec.format(folder), capsys)
        assert {band: shown[label, band] for band in bands} == {band: printed[band] for band in bands}
    assert len({tuple(lines) for lines in shown.values()}) > 8  # models that say the same of everything prove nothing

    # the options reach the split
    browser.find_element(By.CSS_SELECTOR, '#keep-dc input').click()
    _wait(lambda: '--keep-dc' in _text(browser, '#command'))
    with_mean = _answers(browser)
    for label, spec in zip(labels, SPECS.values(), strict=True):
        printed = _printed(folder, spec.format(folder), capsys, '--keep-dc')
        assert with_mean[label, 'high 6'] == printed['high 6']
    assert with_mean != shown

    # the command on the page prints the same
    command = _text(browser, '#command').splitlines()[1].split()
    assert command[:4] == ['gmnet-timm', 'freq', 'image', 'photo.png'] and '--class-names' in command

    requests = [json.loads(entry['message'])['message'] for entry in browser.get_log('performance')]
    urls = [m['params']['request']['url'] for m in requests if m['method'] == 'Network.requestWillBeSent']
    elsewhere = [url for url in urls if not url.startswith((served.url, 'data:', 'blob:'))]
    assert len(urls) > 20 and not elsewhere
    assert served.url.startswith('http://127.0.0.1:')
    assert [entry for entry in browser.get_log('browser') if entry['level'] == 'SEVERE'] == []


def test_layers(browser, served):
    from selenium.webdriver.common.by import By
    _open(browser, served)
    tabs = {tab.text: tab for tab in browser.find_elements(By.CSS_SELECTOR, 'button[role=tab]')}
    tabs['Inside'].click()
    _wait(lambda: _count(browser, '#layer-maps img'))
    assert '(gate)' in browser.find_element(By.CSS_SELECTOR, '#layer input').get_attribute('value')
    assert 'product, high' in _text(browser, '#inside-message')


def test_a_number_out_of_range_is_corrected(browser, served, folder):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    _open(browser, served)
    number = browser.find_element(By.CSS_SELECTOR, '#radius input[type=number]')
    number.send_keys(Keys.CONTROL, 'a')
    number.send_keys('999')
    _wait(lambda: '≤ 67' in _text(browser, '#cards'))
    largest = browser.execute_script("return document.querySelector('#radius input[type=range]').max")
    _wait(lambda: number.get_attribute('value') == largest)
    assert f'--radii {largest}' in _text(browser, '#command')
    assert 'greater than' not in browser.find_element(By.TAG_NAME, 'body').text


def test_other_files_are_refused_and_nothing_is_kept(browser, served, folder):
    from selenium.webdriver.common.by import By
    _open(browser, served)
    before = _answers(browser)
    for file, message in (('notes.txt', 'cannot be read as an image'), ('huge.png', '100 million')):
        _drop(browser, folder / file)
        _wait(lambda m=message, f=file: m in _text(browser, '#message') and f in _text(browser, '#message'))
        assert _answers(browser) == before
    (folder / 'large.png').write_bytes(os.urandom(21_000_000))
    browser.find_element(By.CSS_SELECTOR, '#file input[type=file]').send_keys(str(folder / 'large.png'))
    _wait(lambda: re.search('large|size|failed', browser.find_element(By.TAG_NAME, 'body').text, re.IGNORECASE))
    status, errors = served.end()
    assert status in (0, 130) and 'Traceback' not in errors
    assert list((folder / 'tmp').glob('gmnet-timm-*')) == []
