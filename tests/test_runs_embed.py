"Features that runs and processes share: one place for the same numbers, filled together."
from pathlib import Path

import pytest
import torch

from gmail_nb.data import emoji
from gmail_nb.encoders import load_encoder
from gmail_nb.features import load_features
from gmail_nb.runs.embed import embed_shared, features_place
from gmail_nb.settings import EmbedSettings, ReadSettings

QUIET = EmbedSettings(show_progress=False, part_rows=2)

script = '''
import sys
import gmail_nb.runtime
from gmail_nb.data import emoji
from gmail_nb.encoders import load_encoder
from gmail_nb.runs.embed import embed_together
from gmail_nb.runtime import leave_processes
from gmail_nb.settings import EmbedSettings
from gmail_nb.train import processes
acc = processes(device='cpu')
seen = embed_together(emoji('A', source='noto').select(range(9)), load_encoder('embedded'), sys.argv[1],
                      settings=EmbedSettings(show_progress=False, part_rows=2), acc=acc)
print(acc.process_index, len(seen), float(seen[:].sum()))
leave_processes()
'''

def test_two_processes_fill_one_folder(forks, tmp_path):
    (tmp_path/'run.py').write_text(script)
    both = forks.together(tmp_path/'run.py', tmp_path/'both')
    for done in both: assert done.status == 0, done.err[-2000:]
    ds = emoji('A', source='noto').select(range(9))
    alone = embed_shared(ds, load_encoder('embedded'), tmp_path/'alone', settings=QUIET)
    assert torch.equal(load_features(tmp_path/'both')[:], alone[:])
    said = [line.split() for done in both for line in done.out.splitlines()]
    assert sorted(s[0] for s in said) == ['0', '1'] and len({tuple(s[1:]) for s in said}) == 1 and said[0][1] == '9'

def test_a_place_depends_on_what_changes_numbers_and_on_nothing_else(tmp_path):
    ds, encoder = emoji('A', source='noto').select(range(3)), load_encoder('embedded')
    def place(ds=ds, **how): return features_place(tmp_path, ds, encoder, settings=EmbedSettings(**how))
    same = {place(), place(workers=1), place(processes=1), place(batch_size=8), place(precision='no')}
    assert len(same) == 1 # on a CPU, the precision that is chosen by itself is float32
    assert not same & {place(store='float16'), place(precision='bf16'), place(ds.select(range(2)))}

def test_what_is_there_is_not_made_again(tmp_path, monkeypatch):
    ds, encoder = emoji('A', source='noto').select(range(3)), load_encoder('embedded')
    first = embed_shared(ds, encoder, tmp_path, settings=QUIET)
    monkeypatch.setattr('gmail_nb.features.embed_part', lambda *_: pytest.fail('embedded again'))
    assert torch.equal(embed_shared(ds, encoder, tmp_path, settings=QUIET)[:], first[:])
    assert len(list(Path(tmp_path).iterdir())) == 1

def test_how_a_run_reads_is_checked():
    assert ReadSettings(workers=3, store='float16').embed() == EmbedSettings(workers=3, store='float16')
    with pytest.raises(ValueError, match='store'): ReadSettings(store='float8')
    with pytest.raises(ValueError, match='workers is 0'): ReadSettings(workers=0)
