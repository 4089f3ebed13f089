"""Write the card of a folder: `python tools/cards.py FOLDER ... [--repo OWNER/NAME]`.

A folder of `gmail_align` and of each `gmail_tune` gets a model card with the numbers of its run; a folder of
`gmail_generate` a dataset card. All are README.md, as the Hub reads it. Of `gmail_tune caption`, whose folder holds
the captioner in a folder of its own, either may be named: the card is written beside the captioner's weights.
"""
import argparse, json, sys
from configparser import ConfigParser
from pathlib import Path

from gmail_nb.files import atomic_write, read_object, read_results
from gmail_nb.splits import trained_on
from gmail_nb.stats import value_text

# kind -> what it is called, what it is and was made by, how it is used, and what the Hub calls its task
KINDS = {
    'tuned text': ('Tuned text side', 'The text side of `{base}`, tuned by `gmail_tune text` (arm `{arm}`).',
                   'gmail_eval --model tuned:{name}', 'zero-shot-image-classification'),
    'captioner': ('Captioner', 'Writes captions of pictures that `{base}` has embedded; tuned by `gmail_tune caption` '
                  '(arm `{arm}`).', 'gmail_caption PICTURES --model {name}', 'image-to-text'),
    'llava': ('LLaVA', 'A projector and LoRA for the language model `{lm}`, which sees pictures through `{base}`; '
              'tuned by `gmail_tune llava` (arm `{arm}`).', "gmail_chat 'What is it?' --image PICTURE --model {name}",
              'image-text-to-text'),
}
TEXT = '''---
{head}
---
# {title}: {name}

{what} {below}

```sh
pip install git+{repository}
{use}
```

## How it was measured

{said}

{table}

## What it is for, and what not

- It has whatever `{base}` has learned to do, and its faults.
{keys}
## What it depends on

| setting | value |
|---|---|
{settings}

Versions: {versions}
'''

def repository():
    "Where pip finds the package, which is on no registry: the address in settings.ini."
    parser = ConfigParser(delimiters=['='], interpolation=None)
    parser.read(Path(__file__).resolve().parent.parent/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']['git_url']

def kind_of(card):
    "Which of KINDS a card is of; none for others. The card of a captioner names no kind."
    if 'prefix_length' in card and 'mapper' in card: return 'captioner'
    return card.get('kind') if card.get('kind') in KINDS else None

def model_of(folder):
    "The folder with the card: that of a captioner lies within the folder of its run."
    return folder/'captioner' if (folder/'captioner'/'card.json').exists() else folder

def measured(folder):
    "Rows of a table in markdown, from the results of the run; empty where there are none."
    file = next((f/'results.jsonl' for f in (folder, folder.parent) if (f/'results.jsonl').exists()), None)
    records = read_results(file) if file else []
    def text(r): return f"| {r['arm']} | {r['metric']} | {value_text(r)} | {r['n']} | {r['dataset']}, {r['split']} |"
    if not records: return ''
    return '\n'.join(['| arm | metric | value [95%] | n | on |', '|---|---|---|---|---|', *map(text, records)])

def tuned_card(folder, card, kind):
    "The card of what `gmail_tune` wrote."
    from gmail_nb.export import flat_settings
    title, what, use, task = KINDS[kind]
    settings = card.get('settings') or card.get('preset') or {}
    base, keys = card.get('base') or card.get('encoder') or 'an encoder', trained_on(folder)
    facts = dict(base=base, arm=card.get('arm'), lm=settings.get('language_model'), name=folder.resolve().name)
    aligned, verdict = card.get('aligned'), card.get('verdict') or {}
    below = f'It builds on the aligned model `{Path(aligned).name}`.' if aligned else 'No aligned model is below it.'
    if kind == 'captioner': below = '' # its card names none: the arm says through which side it learned
    said = [*verdict.get('sentences', []), *(f'To try: {t}.' for t in verdict.get('tries', []))]
    head = dict(tags=['gmail', 'generated-images'], pipeline_tag=task, library_name='gmail_nb')
    known = f'- `trained_on.parquet` names its {len(keys):,} training images: do not test on those.\n'
    rows = '\n'.join(f'| {k} | {str(v).replace("|", " ")} |' for k, v in flat_settings(settings).items())
    return TEXT.format(
        head=json.dumps(head, indent=1), title=title, name=facts['name'], what=what.format(**facts), below=below,
        use=use.format(**facts), repository=repository(), said='\n\n'.join(said) or 'Its run has recorded no verdict, so nothing is claimed.',
        table=measured(folder), base=base, keys=known if keys else '', settings=rows,
        versions=', '.join(f'{k} {v}' for k, v in card.get('versions', {}).items()))

def card_of(folder, repo):
    "The card that fits what lies in a folder, and the folder that it belongs in."
    if (folder/'manifest.json').exists():
        from gmail_nb.gallery import dataset_card
        return folder, dataset_card(folder)
    home = model_of(folder)
    if not (home/'card.json').exists():
        raise SystemExit(f'{folder} is neither a folder of gmail_generate that is complete nor one of gmail_align or '
                         'gmail_tune')
    card = read_object(home/'card.json')
    if kind := kind_of(card): return home, tuned_card(home, card, kind)
    if 'base' not in card or 'dim' not in card:
        raise SystemExit(f'{folder} is neither of gmail_generate nor a model: its card.json is that of something else')
    from gmail_nb.export import run_card
    return home, run_card(home, repo or f'OWNER/{home.resolve().name}')

def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('folders', nargs='+', type=Path)
    parser.add_argument('--repo', help='OWNER/NAME, where the model will be found on the Hub')
    args = parser.parse_args()
    for folder in args.folders:
        home, card = card_of(folder, args.repo)
        print('written:', atomic_write(home/'README.md', str(card)))

if __name__ == '__main__': sys.exit(main())
