"LLaVA from the shell: what an arm learns from, a folder that goes on, a talk about pictures, and questions with a score."

import gmail_nb.runtime
import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from gmail_nb.align import GenReal
from gmail_nb.cli.commands import gmail_chat, gmail_eval, gmail_tune
from gmail_nb.data import emoji, quiet_datasets
from gmail_nb.encoders import load_encoder
from gmail_nb.llava_training import trained_card
from gmail_nb.runs.tune_llava import LLAVA_ARMS, Talk, check_llava_arm, chat, load_talker, tune_llava
from gmail_nb.runs.vqa import asked_set, evaluate_vqa
from gmail_nb.settings import AdapterSettings, LlavaSettings, RunSettings, StageSettings, VQASettings
from gmail_nb.splits import trained_on
from test_llava import PARTS, language, processor_of, published, tiny_tokenizer, trained_like
from transformers import LlamaForCausalLM

def answer(capsys, command, *argv):
    status = command([str(a) for a in argv])
    out, err = capsys.readouterr()
    return status, out, err

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Two sets of the same concepts, a small language model in a folder, and an aligned model."
    home = tmp_path_factory.mktemp('llava')
    with quiet_datasets():
        for name, source in (('real', 'noto'), ('drawn', 'fluent')):
            ds = emoji('B', source)
            ds.select(np.argsort(ds['key'])[:12]).to_parquet(home/f'{name}.parquet')
    LlamaForCausalLM(language()).save_pretrained(home/'lm')
    tiny_tokenizer().save_pretrained(home/'lm')
    model = GenReal(load_encoder('embedded'), AdapterSettings(rank=2, adapted_share=1/7))
    trained_like(model)
    model.save_pretrained(home/'aligned')
    return home

quick = (
    '--project-steps',
    4,
    '--instruct-steps',
    4,
    '--project-batch-size',
    4,
    '--instruct-batch-size',
    4,
    '--rank',
    2,
)


def tune(capsys, home, out, *more):
    return answer(
        capsys,
        gmail_tune,
        'llava',
        '--language-model',
        home/'lm',
        '--out',
        home / out,
        '--tokens',
        home/'tokens',
        *quick,
        *more,
    )


@pytest.mark.parametrize('arm', LLAVA_ARMS)
def test_every_arm(capsys, home, arm):
    status, out, err = tune(
        capsys,
        home,
        arm,
        '--real',
        home/'real.parquet',
        '--generated',
        home/'drawn.parquet',
        '--model',
        home/'aligned',
        '--arm',
        arm,
    )
    assert status == 0 and 'instruct: 4 steps' in out, err
    card, settings = trained_card(home/arm)
    assert card['arm'] == arm and set(card['images']) == set(LLAVA_ARMS[arm]) and settings.rank == 2
    assert len(trained_on(home/arm)) == 12 and (home/arm/'adapter'/'adapter_config.json').exists()

def test_sides_are_those_of_the_arm(home):
    "Generated images differ through f_g and f_r; the order of examples does not."
    folders = sorted(p.name.split('-')[0] for p in (home/'tokens').iterdir())
    assert folders == ['generated', 'real', 'real'] # drawn through f_g, drawn and real ones through f_r

def test_it_goes_on_where_it_was(capsys, home):
    how = '--real', home/'real.parquet', '--save-every', 3
    whole = tune(capsys, home, 'whole', *how)[1]
    assert tune(capsys, home, 'parts', *how, )[0] == 0
    for made in (home/'parts'/'checkpoints'/'instruct').glob('step-000004'):
        for f in made.iterdir(): f.unlink()
        made.rmdir()
    (home/'parts'/'card.json').unlink()
    assert tune(capsys, home, 'parts', *how)[1].splitlines()[:2] == whole.splitlines()[:2]
    for name in ('projector.safetensors', 'adapter/adapter_model.safetensors'):
        assert (home/'parts'/name).read_bytes() == (home/'whole'/name).read_bytes()
    status, _, err = tune(capsys, home, 'parts', *how, '--warmup', '.5')
    assert status == 2 and 'belongs to another run' in err

@pytest.mark.parametrize(
    'more, said',
    [
        (('--arm', 'both', '--real', 'real.parquet'), 'both'),
        (('--arm', 'gmail', '--generated', 'drawn.parquet'), 'name an aligned model with --model'),
        ((), 'nothing to learn from'),
        (('--arm', 'bth'), "argument --arm: invalid choice: 'bth'"),
        (('--project-epochs', '-1'), 'epochs is -1'),
    ],
)
def test_what_is_refused(capsys, home, more, said):
    more = [home/m if str(m).endswith('.parquet') else m for m in more]
    if said == 'both': said = 'learns from generated images'
    status, _, err = tune(capsys, home, 'refused', *more)
    assert status == 2 and said in err and not (home/'refused'/'card.json').exists()

def test_a_dry_run_writes_nothing(capsys, home):
    status, out, _ = tune(capsys, home, 'dry', '--dry-run', '--real', home/'real.parquet')
    assert status == 0 and 'would run' in out and 'steps, project' in out and not (home/'dry').exists()
    assert tune(capsys, home, 'dry', '--dry-run', '--generated', home/'drawn.parquet')[0] == 2

def test_a_question_about_several_pictures(capsys, home):
    if not (home/'real'/'card.json').exists(): tune(capsys, home, 'real', '--real', home/'real.parquet')
    emoji('unseen', 'noto')[0]['image'].save(home/'a.png')
    status, out, err = answer(
        capsys,
        gmail_chat,
        'what',
        'is this ?',
        '--image',
        home/'a.png',
        '--image',
        home/'a.png',
        '--model',
        home/'real',
        '--max-new-tokens',
        5,
    )
    assert status == 0 and out.endswith('\n'), err
    said = chat([home/'a.png'], 'what is this ?', home/'real', 5, stream=io.StringIO())
    assert said[0]['content'] == '<image>\nwhat is this ?' and said[1]['role'] == 'assistant'

def test_several_turns_are_one_conversation(home):
    talker, aloud = load_talker(home/'real'), io.StringIO()
    talk = Talk(talker, [emoji('unseen', 'noto')[0]['image'].convert('RGB')], 4, aloud)
    said = [talk.ask('what is this ?'), talk.ask('is it red ?')]
    assert [t['role'] for t in talk.turns] == ['user', 'assistant'] * 2 and talk.turns[2]['content'] == 'is it red ?'
    assert [l.strip() for l in aloud.getvalue().split('\n')[:2]] == said
    with pytest.raises(ValueError, match='has 2 <image> for 1 image'):
        Talk(talker, talk.pictures).ask('<image> <image> ?')


@pytest.mark.parametrize(
    'argv, said',
    [
        (('what ?', '--image', 'nowhere.png', '--model', 'real'), 'nowhere.png'),
        (('what ?', '--model', 'nowhere'), 'gmail_tune llava'),
        (('what ?', '--model', 'lm'), 'without eyes'),
    ],
)
def test_talks_that_cannot_begin(capsys, home, argv, said):
    argv = [home/a if a in ('real', 'lm') else a for a in argv]
    status, _, err = answer(capsys, gmail_chat, *argv)
    assert status == 2 and said in err

def test_questions_from_the_shell(capsys, home):
    status, out, err = answer(
        capsys,
        gmail_eval,
        'vqa',
        '--model',
        home/'real',
        '--limit',
        12,
        '--max-new-tokens',
        3,
        '--blind',
        '--out',
        home/'vqa',
    )
    assert status == 0 and 'without images' in out, err
    lines = (home/'vqa'/'answers.jsonl').read_text(encoding='utf-8').splitlines()
    assert len(lines) == 12 and {json.loads(l)['subject'] for l in lines} == {'name', 'group', 'count', 'colour'}
    assert (home/'vqa'/'answers.png').exists() and 'subject' in (home/'vqa'/'table.txt').read_text()
    records = [json.loads(l) for l in (home/'vqa'/'results.jsonl').read_text().splitlines()]
    assert {r['arm'] for r in records} == {'real', 'real, without images'}
    assert answer(capsys, gmail_eval, 'vqa', '--model', home/'real', '--data', home/'lm')[0] == 2

def test_questions_about_training_images_are_refused(home):
    talker = load_talker(home/'real')
    talker.keys = [asked_set('emoji-questions')[0].key.split(':')[0]]
    with pytest.raises(ValueError, match='are among those of training'): evaluate_vqa(talker, out=home/'x')

def test_a_published_llava_is_tuned_and_talks(published, home, tmp_path):
    "Its own tower sees the pictures, and its projector goes on from where it is."
    model, processor = published
    model.save_pretrained(tmp_path/'published')
    processor.save_pretrained(tmp_path/'published')
    stage = StageSettings(steps=2, batch_size=4)
    settings = LlavaSettings(language_model=str(tmp_path/'published'), project=stage, instruct=stage, rank=2)
    tune_llava(tmp_path/'out', settings, real=home/'real.parquet', run=RunSettings(desc=None))
    picture = emoji('unseen', 'noto')[0]['image'].convert('RGB')
    for name in (tmp_path/'out', tmp_path/'published'):
        assert isinstance(Talk(load_talker(name), [picture], 4).ask('what is this ?'), str)
