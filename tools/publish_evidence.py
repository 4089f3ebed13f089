"""Put the finished chains of a run into the package: `python tools/publish_evidence.py FOLDER`.

Writes assets/evidence: records.jsonl, chosen.json, and page.md, which is made from them. Then run the pages again:
`python tools/execute.py` with nbs/experiments/ 11_chain, 12_curve, 13_controls, 14_unseen, 15_pairs, 16_fair, 18_shares, 19_evidence and
45_caption_curve.
"""
import argparse
import json
from importlib import resources
from pathlib import Path

from gmail_nb.experiments.curve import gathered, joined
from gmail_nb.experiments.evidence import evidence_page
from gmail_nb.files import atomic_write, check_writable, read_results, write_results

def publish(run):
    home = check_writable(Path(str(resources.files('gmail_nb')))/'assets'/'evidence')
    chosen = (run/'chosen.json').read_text(encoding='utf-8')
    file = home/'records.jsonl'
    same = file.exists() and json.loads((home/'chosen.json').read_text())['chosen'] == json.loads(chosen)['chosen']
    records = joined(gathered(run), read_results(file) if same else []) # an older choice is no part of the page
    write_results(file, records)
    llava = run/'llava_results.jsonl' # of gmail_experiment llava in the same folder, if it was run
    if llava.exists(): atomic_write(home/'llava.jsonl', llava.read_text(encoding='utf-8'))
    atomic_write(home/'chosen.json', chosen)
    atomic_write(home/'page.md', evidence_page(records))
    return records

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('run', type=Path, help='the folder of gmail_experiment curve')
    print(len(publish(parser.parse_args().run)), 'records')
