import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask

from oracles import naive_documents
from thunderhead.core.model.context import SequenceContext, dense_mask, document_layout, sparse_mask

DOCUMENTS = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1]])
CONTEXT = SequenceContext(torch.arange(6)[None], DOCUMENTS)


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, 3), min_size=7, max_size=7), min_size=1, max_size=3))
def test_documents_and_positions_equal_walking_through_the_tokens(rows: list[list[int]]) -> None:
    tokens = torch.tensor(rows)
    document_ids, position_ids = document_layout(tokens, eos_id=0)
    expected_documents, expected_positions = naive_documents(tokens, eos_id=0)
    assert torch.equal(document_ids, expected_documents)
    assert torch.equal(position_ids, expected_positions)


def test_the_eos_belongs_to_the_document_it_ends() -> None:
    document_ids, position_ids = document_layout(torch.tensor([[5, 0, 0, 7, 8]]), eos_id=0)
    assert document_ids.tolist() == [[0, 0, 1, 2, 2]]
    assert position_ids.tolist() == [[0, 1, 0, 0, 1]]


def test_plain_causal_attention_needs_no_mask() -> None:
    assert dense_mask(SequenceContext(torch.arange(5)[None]), None) is None


def test_the_mask_says_who_sees_whom() -> None:
    mask = dense_mask(CONTEXT, 3)
    assert mask is not None
    assert mask.shape == (2, 1, 6, 6)
    for b in range(2):
        for query in range(6):
            for key in range(6):
                same = bool(DOCUMENTS[b, query] == DOCUMENTS[b, key])
                assert bool(mask[b, 0, query, key]) == (key <= query and query - key < 3 and same)


def test_the_sparse_mask_allows_what_the_dense_mask_allows() -> None:
    block_mask = sparse_mask(CONTEXT, 3)
    assert isinstance(block_mask, BlockMask)
    dense = dense_mask(CONTEXT, 3)
    assert dense is not None
    index = torch.arange(6)
    for b in range(2):
        allowed = block_mask.mask_mod(torch.tensor(b), torch.tensor(0), index[:, None], index[None, :])
        assert torch.equal(allowed, dense[b, 0])
