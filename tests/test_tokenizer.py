import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protlig_dd.tokenizer import AMINO_ACIDS, BOS, CONTEXT_LETTERS, EOS, MASK, VOCAB_SIZE, ProteinTokenizer

LEGAL = AMINO_ACIDS + CONTEXT_LETTERS
tokenizer = ProteinTokenizer()


@given(st.text(LEGAL, min_size=1))
def test_encoding_is_lossless(sequence: str) -> None:
    tokens = tokenizer.encode(sequence)
    assert tokens.dtype == np.uint8
    assert tokens[0] == BOS
    assert tokens[-1] == EOS
    assert tokenizer.decode(tokens) == sequence


def test_token_ids_are_those_of_the_vocabulary() -> None:
    assert tokenizer.encode(AMINO_ACIDS)[1:-1].tolist() == list(range(20))
    assert tokenizer.encode("XBZJUO")[1:-1].tolist() == [21, 22, 23, 24, 25, 26]
    assert (MASK, BOS, EOS, VOCAB_SIZE) == (20, 27, 28, 30)
    assert tokenizer.decode(np.array([0, MASK, 29, 19])) == "A_Y"


def test_a_trailing_stop_is_dropped() -> None:
    assert tokenizer.encode("MKV*").tolist() == tokenizer.encode("MKV").tolist()


@given(st.text(LEGAL), st.characters(exclude_characters=LEGAL + "*"), st.text(LEGAL))
def test_the_error_for_any_other_character_names_its_position(before: str, wrong: str, after: str) -> None:
    with pytest.raises(ValueError, match=rf"^P1: illegal character .* at position {len(before) + 1} of "):
        tokenizer.encode(before + wrong + after, "P1")


@pytest.mark.parametrize("sequence", ["M*K", "mkv", "M-K", "M_K"])
def test_inner_stops_lower_case_gaps_and_masks_are_errors(sequence: str) -> None:
    with pytest.raises(ValueError, match="illegal character"):
        tokenizer.encode(sequence)


@pytest.mark.parametrize("sequence", ["", "*"])
def test_an_empty_sequence_is_an_error(sequence: str) -> None:
    with pytest.raises(ValueError, match="P1: no residues"):
        tokenizer.encode(sequence, "P1")


@pytest.mark.parametrize("ids", [[0, 30], [-1, 3]])
def test_ids_outside_the_vocabulary_are_errors(ids: list[int]) -> None:
    with pytest.raises(ValueError, match=r"0\.\.29"):
        tokenizer.decode(np.array(ids))
