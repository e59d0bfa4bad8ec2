import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from dyncompile.data import IGNORE_INDEX, as_loader, call
from dyncompile.errors import ArgumentError, DataError


class Items(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Stream(IterableDataset):
    def __iter__(self):
        for i in range(5):
            yield torch.full((3,), float(i)), i % 2


def pair(n=10, classes=3):
    return np.arange(4.0 * n).reshape(n, 4), np.arange(n) % classes


def batches(loader):
    return list(loader)


def test_call_dispatches_on_the_form_of_the_inputs():
    a, b = torch.tensor(5.0), torch.tensor(2.0)
    assert call(torch.neg, a) == -5
    assert call(torch.sub, (a, b)) == 3
    assert call(torch.sub, {"input": b, "other": a}) == -3


def test_arrays_become_tensors_of_the_default_dtype():
    loader = as_loader(pair(), batch_size=4)
    assert [len(y) for _, y in loader] == [4, 4, 2]
    inputs, targets = next(iter(loader))
    assert (inputs.dtype, targets.dtype) == (torch.float32, torch.int64)
    assert torch.equal(torch.cat([x for x, _ in loader]), torch.tensor(pair()[0], dtype=torch.float32))


def test_torch_arrays_keep_their_dtype_and_read_only_numpy_ones_are_copied():
    x, y = pair()
    x.setflags(write=False)
    assert next(iter(as_loader((x, y))))[0].shape == (10, 4)
    doubles = torch.zeros(10, 4, dtype=torch.float64)
    assert next(iter(as_loader((doubles, torch.tensor(y)))))[0].dtype == torch.float64
    assert next(iter(as_loader((doubles, y > 1))))[1].dtype == torch.int64


def test_inputs_may_be_a_tuple_or_a_dict_of_arrays():
    x, y = pair()
    (first, second), _ = next(iter(as_loader(((x, 2 * x), y), batch_size=3)))
    assert torch.equal(2 * first, second)
    named, targets = next(iter(as_loader(({"a": x, "b": -x}, y), batch_size=3)))
    assert list(named) == ["a", "b"]
    assert torch.equal(named["a"], -named["b"])
    assert targets.tolist() == [0, 1, 2]


def test_lists_of_numbers_are_arrays():
    inputs, targets = next(iter(as_loader(([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [0, 1, 0]))))
    assert inputs.shape == (3, 2)
    assert targets.tolist() == [0, 1, 0]


def test_shuffling_changes_with_the_pass_and_repeats_with_the_seed():
    def passes(seed):
        loader = as_loader(pair(), batch_size=5, shuffle=True, seed=seed)
        return [torch.cat([x[:, 0] for x, _ in loader]).tolist() for _ in range(2)]

    first, second = passes(0)
    assert first != second
    assert sorted(first) == sorted(second) == pair()[0][:, 0].tolist()
    assert passes(0) == [first, second]
    assert passes(1) != [first, second]


def test_replicas_together_see_the_batches_of_one_process():
    def seen(replicas, rank):
        loader = as_loader(pair(), batch_size=6 // replicas, shuffle=True, replicas=replicas, rank=rank)
        return [set(x[:, 0].tolist()) for x, _ in loader]

    together = [a | b for a, b in zip(seen(2, 0), seen(2, 1), strict=True)]
    assert together == seen(1, 0)


def test_a_single_last_sample_is_left_out_of_training_only():
    assert [len(y) for _, y in as_loader(pair(9), batch_size=4, shuffle=True)] == [4, 4]
    assert [len(y) for _, y in as_loader(pair(9), batch_size=4)] == [4, 4, 1]
    assert [len(y) for _, y in as_loader(pair(1), batch_size=4, shuffle=True)] == [1]


@pytest.mark.parametrize("key", ["labels", "label"])
def test_items_may_be_dicts_with_labels(key):
    items = [{"input_ids": [i, i + 1], "mask": torch.ones(2), key: i % 2} for i in range(4)]
    inputs, targets = next(iter(as_loader(Items(items), batch_size=3)))
    assert inputs["input_ids"].tolist() == [[0, 1], [1, 2], [2, 3]]
    assert set(inputs) == {"input_ids", "mask"}
    assert targets.tolist() == [0, 1, 0]


def test_items_may_have_several_inputs():
    x = torch.arange(6.0)
    (first, second), targets = next(iter(as_loader(TensorDataset(x, -x, x.long()))))
    assert torch.equal(first, -second)
    assert torch.equal(targets, x.long())


def test_a_loader_keeps_its_batches_and_is_checked():
    dataset = TensorDataset(torch.arange(8.0)[:, None], torch.arange(8) % 4)
    own = DataLoader(dataset, batch_size=3)
    assert [len(y) for _, y in as_loader(own, batch_size=64)] == [3, 3, 2]
    with pytest.raises(DataError, match=r"`val_data`: found labels from 0 to 2"):
        batches(as_loader(own, classes=2, argument="val_data"))
    assert len(batches(own)) == 3


def test_a_checked_loader_can_be_checked_again():
    with pytest.raises(DataError, match="labels from 0 to 2"):
        batches(as_loader(as_loader(pair()), classes=2))
    items = Items([(torch.ones(2), i) for i in range(3)])
    assert len(batches(as_loader(as_loader(items), classes=3))) == 1
    with pytest.raises(DataError, match="labels from 0 to 2"):
        batches(as_loader(as_loader(items), classes=2))


def test_an_iterable_dataset_comes_in_a_loader():
    assert [len(y) for _, y in as_loader(DataLoader(Stream(), batch_size=2))] == [2, 2, 1]
    with pytest.raises(DataError, match="put an iterable dataset into a DataLoader"):
        as_loader(Stream())


def test_the_workers_of_a_loader_report_the_same_error():
    items = Items([(torch.tensor([float("nan")]), 0)])
    with pytest.raises(RuntimeError, match=r"`data`: found NaN or infinite values in the inputs"):
        batches(as_loader(DataLoader(items, num_workers=1)))


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (([], []), "no samples"),
        (Items([]), "no samples"),
        (DataLoader(Items([]), sampler=[]), "a loader without batches"),
        ((pair()[0], pair(9)[1]), "lengths 10, 9"),
        ((pair()[0], 3), "lengths 10, 0"),
        ((np.full((4, 2), np.nan), np.zeros(4, int)), "NaN or infinite values in the inputs"),
        ((torch.full((4, 2), torch.inf), torch.zeros(4).long()), "NaN or infinite values in the"),
        ((np.ones((2, 2)), np.array([0.5, np.nan])), "NaN or infinite values in the targets"),
        ((np.ones((2, 2)), np.array(["cat", "dog"])), "an array of <U3"),
        (([[1.0], [1.0, 2.0]], [0, 1]), "a ragged array"),
        (pair()[0], "a ndarray"),
        ((pair()[0],), "a tuple of 1"),
        ("digits", "a str"),
        (None, "a NoneType"),
    ],
)
def test_what_cannot_be_used_is_named(data, found):
    with pytest.raises(DataError, match=r"`train_data`: found .*" + found):
        as_loader(data, argument="train_data")


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        ([0, 1, 3], r"labels from 0 to 3; expected integers in \[0, 3\)"),
        ([0, -1, 2], r"labels from -1 to 2"),
        ([0.0, 1.0, 2.0], r"targets of torch.float32; expected integer labels in \[0, 3\)"),
    ],
)
def test_labels_are_integers_in_range(targets, found):
    inputs = np.ones((3, 2))
    with pytest.raises(DataError, match=found):
        as_loader((inputs, np.array(targets)), classes=3)
    loader = as_loader(Items(list(zip(torch.tensor(inputs), targets, strict=True))), classes=3)
    if isinstance(targets[0], int):
        with pytest.raises(DataError, match=found):
            batches(loader)
    else:
        with pytest.raises(DataError, match="expected integer labels"):
            batches(loader)


def test_the_label_that_stands_for_none_is_no_error():
    labels = torch.tensor([[0, IGNORE_INDEX], [1, IGNORE_INDEX]])
    assert len(as_loader((torch.ones(2, 2), labels), classes=2)) == 1
    with pytest.raises(DataError):
        as_loader((torch.ones(2, 2), labels), classes=2, ignore_index=255)


def test_datasets_are_checked_as_their_batches_come():
    loader = as_loader(Items([(torch.ones(1), 0), (torch.tensor([torch.nan]), 0)]), batch_size=1)
    stream = iter(loader)
    next(stream)
    with pytest.raises(DataError, match="NaN"):
        next(stream)


@pytest.mark.parametrize(
    ("item", "found"),
    [
        ({"x": torch.ones(1)}, "a dict with the keys x"),
        ({"text": "hello", "label": 0}, "a str in the batch"),
        (torch.ones(1), "batches that are a Tensor"),
    ],
)
def test_items_of_another_form_are_named(item, found):
    with pytest.raises(DataError, match=found):
        batches(as_loader(Items([item])))


def test_batch_size_is_positive():
    with pytest.raises(ArgumentError, match="`batch_size`: found 0; expected a whole number, at least 1"):
        as_loader(pair(), batch_size=0)
