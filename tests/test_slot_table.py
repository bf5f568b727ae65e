"""What steps are built from: rows of who runs, neutral rows where nobody does."""

import numpy as np

from jaxinfer.request import MAX_STOP_TOKEN_IDS
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.slot_table import SlotTable
from tests.fake_runner import make_request


def table_of(*temperatures: float) -> SlotTable:
    """One shard, and a request in each slot."""
    table = SlotTable(1, len(temperatures), max_pages=2)
    for slot, temperature in enumerate(temperatures):
        put(table, slot, temperature)
    return table


def put(table: SlotTable, slot: int, temperature: float) -> None:
    request = make_request(slot, [1], 4, stop_token_ids=(7, slot))
    request.params = SamplingParams(temperature=temperature, top_k=-1)
    table.put(0, slot, request)


def test_rows_are_those_of_the_slots_and_padding_is_neutral():
    found = table_of(0.5, 2.0).constants(np.array([[1, -1, 0]], np.int32))
    assert found.sampling["temperature"].tolist() == [2.0, 0.0, 0.5] and found.sampling["draws"]
    assert found.sampling["top_k"].tolist() == [0, 0, 0] and not found.sampling["truncates"]
    unused = [-1] * (MAX_STOP_TOKEN_IDS - 2)
    assert found.stop_token_ids.tolist() == [[[7, 1, *unused], [-1, -1, *unused], [7, 0, *unused]]]


def test_greedy_rows_draw_nothing():
    assert not table_of(0.0, 0.0).constants(np.array([[0, 1]], np.int32)).sampling["draws"]


def test_what_did_not_change_is_not_gathered_again():
    table, slots = table_of(0.5, 2.0), np.array([[0, 1]], np.int32)
    assert table.constants(slots) is table.constants(slots.copy())
    assert table.constants(slots[:, ::-1]).sampling["temperature"].tolist() == [2.0, 0.5]


def test_a_slot_that_goes_to_another_request_is_gathered_again():
    """Requests of one token may follow each other in the same rows."""
    table, slots = table_of(0.5, 2.0), np.array([[0, 1]], np.int32)
    table.constants(slots)
    table.clear(0, 1)
    put(table, 1, 0.25)
    assert table.constants(slots).sampling["temperature"].tolist() == [0.5, 0.25]


def test_a_cleared_slot_leaves_no_page_behind():
    table = table_of(1.0)
    table.block_tables[0, 0], table.num_pages[0, 0], table.positions[0, 0], table.limits[0, 0] = (3, 4), 2, 5, 9
    table.clear(0, 0)
    assert not any(x[0, 0].any() for x in (table.block_tables, table.num_pages, table.positions, table.limits))
