"""Run notebooks from the top and store their outputs: `python tools/execute.py nbs/21_losses.ipynb ... [--with slow]`.

Cells flagged slow, cuda or hub keep the output they have unless their flag is named. What is written is clean:
no counts, no metadata, no state of progress bars. The source of a flagged cell that ran is noted in
tests/stored_runs.json. Where a flagged cell changed in nothing but names or line breaks,
`--same 'names alone changed' nbs/...` runs nothing, keeps the output, and notes the reason.
"""
import argparse, os, re, subprocess, sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from stored import FLAGS, flags_of, left_out, name_of, note_run, source_of

root = Path(__file__).resolve().parent.parent

class Client(NotebookClient):
    "Passes over cells with a flag that was not named."
    def __init__(self, nb, named, **kwargs):
        super().__init__(nb, **kwargs)
        self.named = set(named)

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        if flags_of(cell.source) - self.named: return cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)

BAR = r'\d+%\||it/s|s/it|\?it|: 0it|IProgress not found|as notebook_tqdm'

def without_bars(text):
    "The lines of a stream that are not the state of a progress bar."
    lines = [l for l in re.split(r'[\r\n]+', text) if l.strip() and not re.search(BAR, l)]
    return ''.join(l + '\n' for l in lines)

def is_bar(out):
    "Whether an output is nothing but the state of progress bars."
    if out.get('name') != 'stderr': return any('widget' in mime for mime in out.get('data', {}))
    return not without_bars(out['text'])

def tidy(nb):
    "Streams as one output, and no bars."
    for cell in nb.cells:
        if cell.cell_type != 'code': continue
        cell.outputs = [o for o in cell.outputs if not is_bar(o)]
        cell.execution_count = None
        for out in cell.outputs:
            out.pop('execution_count', None)
            if out.get('name') == 'stderr' and re.search(BAR, out['text']): out['text'] = without_bars(out['text'])

def execute(path, named):
    nb = nbformat.read(path, as_version=4)
    os.environ.update(HF_HUB_OFFLINE='1' if 'hub' not in named else '0', TOKENIZERS_PARALLELISM='false',
                      PYTHONPATH=os.pathsep.join([str(root), os.environ.get('PYTHONPATH', '')]).strip(os.pathsep))
    client = Client(nb, named, timeout=None, kernel_name='python3', coalesce_streams=True,
                    resources=dict(metadata=dict(path=str(path.parent))))
    try: client.execute()
    except CellExecutionError as e: raise SystemExit(f'{path.name}: {e}')
    tidy(nb)
    nbformat.write(nb, path)
    subprocess.run(
        [sys.executable, '-c', f'from nbdev.clean import nbdev_clean; nbdev_clean({str(path)!r})'], cwd=root, check=True
    )
    ran = {i for i, cell in left_out(nb.cells).items() if not flags_of(source_of(cell)) - set(named)}
    note_run(name_of(path), nb.cells, ran)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('notebooks', nargs='+', type=lambda p: Path(p).resolve())
    parser.add_argument('--with', dest='named', nargs='*', default=[], choices=FLAGS, help='flags whose cells run too')
    parser.add_argument('--same', metavar='WHY', help='run nothing: changed cells would give the output they have')
    args = parser.parse_args()
    for path in args.notebooks:
        if args.same:
            note_run(name_of(path), nbformat.read(path, as_version=4).cells, (), args.same)
            continue
        execute(path, args.named)
        print(f'executed {path.name}')
