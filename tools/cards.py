"""Write the card of a folder: `python tools/cards.py FOLDER ... [--repo OWNER/NAME]`.

A folder of `gmail_align` gets a model card with the numbers of its run; a folder of `gmail_generate` a dataset card. Both are README.md, as the Hub reads it.
"""
import argparse, sys
from pathlib import Path

from gmail_nb.files import atomic_write

def card_of(folder, repo):
    "The card that fits what lies in a folder."
    if (folder/'manifest.json').exists():
        from gmail_nb.gallery import dataset_card
        return dataset_card(folder)
    if not (folder/'card.json').exists():
        raise SystemExit(f'{folder} is neither a folder of gmail_generate that is complete nor one of gmail_align')
    from gmail_nb.export import run_card
    return run_card(folder, repo or f'OWNER/{folder.resolve().name}')

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('folders', nargs='+', type=Path)
    parser.add_argument('--repo', help='OWNER/NAME, where the model will be found on the Hub')
    args = parser.parse_args()
    for folder in args.folders: print('written:', atomic_write(folder/'README.md', str(card_of(folder, args.repo))))

if __name__ == '__main__': sys.exit(main())
