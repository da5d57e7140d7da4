"""One thread or OMP_NUM_THREADS, no network, a fixed seed: a test that needs randomness makes its own generator."""

import importlib
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import stranger
import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def pytest_unconfigure() -> None:
    stranger.stop()


def pytest_addoption(parser) -> None:
    parser.addoption("--renew", action="store_true", help="write tests/data/recorded.json anew (test_recorded.py)")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def load_script(monkeypatch):
    """A command as a module, with `run(*argv)` to run it in this process as the command line would. What a test has put
    into the module is taken out again after it."""
    loaded = []

    def load(name):
        module = importlib.import_module(f"diffusers_ext.commands.{name}")
        loaded.append((module, dict(vars(module))))

        def run(*argv):
            monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
            module.main()

        module.run = run
        return module

    yield load
    for module, before in reversed(loaded):
        vars(module).update(before)
