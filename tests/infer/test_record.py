"""The record of steps: what was added comes back, also after a cut."""

import numpy as np

from bnlora.infer.svi.record import Record


def test_columns_grow_and_are_cut_together():
    record, values = Record(), np.linspace(0, 1, 10, dtype=np.float32)
    assert (len(record), record.names, record.column("elbo").size) == (0, (), 0)
    record.add({"elbo": values[:6], "skipped": np.arange(6, dtype=np.int32)})
    record.add({"elbo": values[6:], "skipped": np.arange(6, 10)})
    np.testing.assert_array_equal(record.column("elbo"), values.astype(np.float64))
    np.testing.assert_array_equal(record.column("skipped", 8), [8, 9])
    record.cut(7)
    record.add({"elbo": values[:1], "skipped": np.zeros(1)})
    assert len(record) == 8
    np.testing.assert_array_equal(record.column("skipped", -2), [6, 0])
    before = record.column("elbo")
    record.cut(0)
    assert len(record) == 0
    assert before.size == 8  # a column is a copy
