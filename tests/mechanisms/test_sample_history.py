import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regularized.mechanisms.sample_history import check_index, last_occurrence, store_rows

indices = st.lists(st.integers(0, 9), min_size=1, max_size=20)


@given(indices)
def test_last_occurrence(index):
    """Fails when an unstable sort, or the first of equal entries, decides: GPUs would remember another row."""
    expected = [max(j for j, other in enumerate(index) if other == i) for i in index]
    assert last_occurrence(torch.tensor(index)).tolist() == expected


@given(indices)
def test_last_row_wins(index):
    """Fails when of equal indices another row than the last is kept, or what is returned is not what is stored."""
    table, rows = torch.full((10, 2), -1.0), torch.arange(2.0 * len(index)).reshape(-1, 2)
    expected = table.clone()
    for i, row in zip(index, rows):
        expected[i] = row
    kept = store_rows(table, torch.tensor(index), rows)
    assert torch.equal(table, expected)
    assert torch.equal(kept, expected[index])


@pytest.mark.parametrize(("batch", "width"), [(20_000, 64), (5_000, 64), (500, 65), (128, 10)])
def test_last_row_wins_with_several_threads(batch, width):
    """Fails when large copies go to index_copy_ as they are: with several threads any of the equal rows may win."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        index, rows = torch.randint(100, (batch,)), torch.randn(batch, width)
        table, winners = torch.zeros(100, width), torch.zeros(100, width)
        store_rows(table, index, rows)
        winners[index] = rows[last_occurrence(index)]
        assert torch.equal(table, winners)
    finally:
        torch.set_num_threads(before)


def test_rows_are_rounded_to_the_table():
    """Fails when what is returned is more exact than what will be read back later."""
    table = torch.zeros(3, 1, dtype=torch.bfloat16)
    kept = store_rows(table, torch.tensor([1]), torch.tensor([[1 / 3]]))
    assert kept.dtype == torch.bfloat16
    assert torch.equal(kept, table[1:2])


@pytest.mark.parametrize(
    ("index", "error", "words"),
    [
        (None, ValueError, "MyLoss needs the dataset index.*IndexedDataset"),
        ([0, 1], TypeError, "tensor of integers, got list"),
        (torch.tensor([0.0, 1.0]), TypeError, "float32"),
        (torch.tensor([True, False]), TypeError, "bool"),
        (torch.tensor([0, 1, 2]), ValueError, r"shape \(2,\), got \(3,\)"),
        (torch.tensor([[0], [1]]), ValueError, r"got \(2, 1\)"),
        (torch.tensor([0, 5]), IndexError, "index 5.*num_samples=5.*0 to 4.*Subset"),
        (torch.tensor([-1, 2]), IndexError, "index -1"),
    ],
)
def test_errors(index, error, words):
    """Fails when a wrong index reaches the table, or the message does not say what was given and what is allowed."""
    with pytest.raises(error, match=words):
        check_index(index, 5, owner="MyLoss", batch_size=2)


def test_good_indices_pass():
    """Fails when an integer type, an empty batch or the last row is refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_index(torch.tensor([4, 0], dtype=torch.int32), 5, owner="MyLoss", batch_size=2)
        check_index(torch.zeros(0, dtype=torch.int64), 5, owner="MyLoss", batch_size=0)


def test_values_off_the_cpu_are_not_read():
    """Fails when the check reads values of another device: that would stop every step on a GPU."""
    check_index(torch.zeros(3, dtype=torch.int64, device="meta"), 5, owner="MyLoss", batch_size=3)


def test_repeated_samples_warn_once_by_default():
    """Fails when the text holds values of the batch: Python's filter would then show it in every step."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for index in ([1, 1], [2, 2], [3, 3]):
            check_index(torch.tensor(index), 5, owner="MyLoss", batch_size=2)
    assert len(caught) == 1
    assert "more than once" in str(caught[0].message)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_not_written(bad):
    """Fails if a NaN gets into the table, the rest of the batch is lost with it, or the sample's old row."""
    table = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    kept = store_rows(table, torch.tensor([2, 0]), torch.tensor([[7.0, bad], [8.0, 9.0]]))
    assert table.tolist() == [[8.0, 9.0], [3.0, 4.0], [5.0, 6.0]]
    assert kept.tolist() == [[5.0, 6.0], [8.0, 9.0]]
    flat = torch.tensor([1.0, 2.0])
    store_rows(flat, torch.tensor([1, 0]), torch.tensor([bad, 5.0]))
    assert flat.tolist() == [5.0, 2.0]
