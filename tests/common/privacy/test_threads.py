"""The number of threads is the caller's again afterwards, and no other thread's is touched."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest
import torch

from common.devices import use_threads
from common.errors import PrivacyError
from common.privacy.gaussian import GaussianSum
from common.privacy.randomness import SecureRandom
from common.privacy.threads import one_thread


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_inside_there_is_one_thread_and_afterwards_as_many_as_before() -> None:
    with one_thread():
        assert torch.get_num_threads() == 1
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_an_error_inside_gives_the_threads_back() -> None:
    with pytest.raises(PrivacyError):
        GaussianSum(1.0, 1.0, 2).release(torch.tensor([float("nan"), 0.0]), SecureRandom())
    with contextlib.suppress(KeyError), one_thread():
        raise KeyError
    assert torch.get_num_threads() == 2


def test_noise_leaves_the_number_of_threads_alone_even_when_it_is_not_all_taken() -> None:
    chunks = SecureRandom().normal_chunks(100_000)
    next(chunks)
    assert torch.get_num_threads() == 2
    SecureRandom().normal((100_000,), 1.0)
    assert torch.get_num_threads() == 2


def test_a_thread_at_work_keeps_its_own_number() -> None:
    ready, inside, measured = threading.Event(), threading.Event(), threading.Event()
    seen = []

    def other() -> None:
        use_threads(2)
        ready.set()
        inside.wait(10)
        seen.append(torch.get_num_threads())
        measured.set()

    thread = threading.Thread(target=other)
    thread.start()
    ready.wait(10)
    with one_thread():
        inside.set()
        measured.wait(10)
    thread.join()
    assert seen == [2]
