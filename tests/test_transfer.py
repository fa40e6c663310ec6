"""What is sent arrives as it was. On `meta` there is no memory to compare, but everything that is said of it."""

import numpy as np
import torch

from kernels.transfer import APART, Returning, send

ARRAYS = [np.arange(3), np.arange(12).reshape(3, 4), np.empty(0, dtype=np.int64), np.array([7])]


def test_on_the_host_nothing_is_copied():
    there = send(ARRAYS, torch.device("cpu"))
    assert [tensor.tolist() for tensor in there] == [array.tolist() for array in ARRAYS]
    ARRAYS[3][0] = 8
    assert there[3].item() == 8


def test_all_arrays_go_in_one_copy_and_each_begins_at_an_address_that_kernels_are_compiled_for():
    there = send(ARRAYS, torch.device("meta"))
    assert [tuple(tensor.shape) for tensor in there] == [array.shape for array in ARRAYS]
    assert [tensor.storage_offset() for tensor in there] == [0, APART, 2 * APART, 2 * APART]
    assert len({tensor.untyped_storage()._cdata for tensor in there}) == 1
    assert APART * send([np.zeros(1, np.int32)], torch.device("meta"))[0].element_size() % 16 == 0


def test_what_returns_is_what_was_there():
    (tokens,) = Returning([torch.arange(4)]).wait()
    assert tokens.tolist() == [0, 1, 2, 3]
