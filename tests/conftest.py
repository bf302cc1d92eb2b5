import pytest


@pytest.fixture(autouse=True)
def _seed():
    import torch  # here, because the process that hands out the tests would wait for it first
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == 'ecosystem':
            item.add_marker('ecosystem')
    # what may take minutes comes first, so that no process is left alone with it in the end
    items.sort(key=lambda item: -max((mark.args[0] for mark in item.iter_markers('timeout')), default=0))
