"What a person did not ask for stays off the screen: bars over weights, notes of libraries."
import pytest
from gmail_nb.encoders import load_encoder
from gmail_nb.weights import quiet_weights
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as said

@pytest.mark.parametrize('downloads', [True, False])
def test_bars_over_weights_are_off_inside_and_as_before_behind(downloads):
    before = said.is_progress_bar_enabled()
    said.enable_progress_bar()
    (enable_progress_bars if downloads else disable_progress_bars)()
    try:
        with pytest.raises(ValueError), quiet_weights():
            assert not said.is_progress_bar_enabled() and are_progress_bars_disabled() != downloads
            raise ValueError
        assert said.is_progress_bar_enabled() and are_progress_bars_disabled() != downloads
    finally: (said.enable_progress_bar if before else said.disable_progress_bar)()

def test_the_encoder_that_ships_loads_without_a_word(capfd, recwarn):
    said.enable_progress_bar()
    load_encoder('embedded')
    out, err = capfd.readouterr()
    assert (out, err) == ('', '') and not [str(w.message) for w in recwarn]
