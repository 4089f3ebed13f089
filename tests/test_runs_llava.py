"LLaVA from the shell: what an arm learns from, a folder that goes on, a talk about pictures, and questions with a score."

import gmail_nb.runtime
import io
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from gmail_nb.align import GenReal
from gmail_nb.cli.commands import gmail_align, gmail_chat, gmail_eval, gmail_tune
from gmail_nb.data import emoji, quiet_datasets
from gmail_nb.encoders import load_encoder
from gmail_nb.llava_training import trained_card
from gmail_nb.runs.instructions import conversation_turns, picture_key, read_conversations, scienceqa_instructions
from gmail_nb.runs.tune_llava import LLAVA_ARMS, Talk, chat, check_llava_arm, judge_llava, load_talker, tune_llava
from gmail_nb.runs.vqa import asked_set, evaluate_vqa
from gmail_nb.settings import AdapterSettings, ChatSettings, LlavaSettings, RunSettings, StageSettings, VQASettings
from gmail_nb.splits import trained_on
from gmail_nb.vqa import MMMU_COLUMNS, SCIENCEQA_COLUMNS, small_mmmu, small_scienceqa
from test_llava import PARTS, language, processor_of, published, tiny_llava, tiny_tokenizer, trained_like
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

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
        '--token-folder',
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
    how = home/'real.parquet', '--save-every', 3
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
        (('--arm', 'both', 'real.parquet'), 'both'),
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
    status, out, _ = tune(capsys, home, 'dry', '--dry-run', home/'real.parquet')
    assert status == 0 and 'would run' in out and 'steps, project' in out and not (home/'dry').exists()
    assert tune(capsys, home, 'dry', '--dry-run', '--generated', home/'drawn.parquet')[0] == 2

def test_a_question_about_several_pictures(capsys, home):
    if not (home/'real'/'card.json').exists(): tune(capsys, home, 'real', home/'real.parquet')
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
    said = chat([home/'a.png'], 'what is this ?', home/'real', ChatSettings(5), stream=io.StringIO())
    assert said[0]['content'] == '<image>\nwhat is this ?' and said[1]['role'] == 'assistant'

def test_generated_pictures_go_through_the_aligned_tower(capsys, home):
    if not (home/'gmail'/'card.json').exists():
        tune(capsys, home, 'gmail', '--generated', home/'drawn.parquet', '--model', home/'aligned')
    picture = emoji('unseen', 'noto')[0]['image'].convert('RGB')
    real, drawn = (load_talker(home/'gmail', torch.device('cpu'), g).look([picture]) for g in (False, True))
    aligned = GenReal.from_pretrained(home/'aligned')
    with torch.no_grad():
        torch.testing.assert_close(drawn, aligned.generated_tokens(aligned.encoder.preprocess(picture)[None]))
    assert not torch.allclose(real, drawn)
    picture.save(home/'g.png')
    ask = 'what ?', '--image', home/'g.png', '--max-new-tokens', 2, '--device', 'cpu', '--side', 'generated', '--model'
    assert answer(capsys, gmail_chat, *ask, home/'gmail')[0] == 0
    status, _, err = answer(capsys, gmail_chat, *ask, home/'real')
    assert status == 2 and 'tuned without an aligned model' in err

def test_an_aligned_model_is_found_from_any_directory(capsys, home, tmp_path, monkeypatch):
    "The card holds its whole path; moved with the folder it is found beside it, and elsewhere it is missed by name."
    place = tmp_path/'first'
    shutil.copytree(home/'aligned', place/'aligned')
    monkeypatch.chdir(place)
    drawn = '--generated', home/'drawn.parquet', '--model', 'aligned'
    assert tune(capsys, home, place/'llava', *drawn)[0] == 0
    card, _ = trained_card(place/'llava')
    assert card['aligned'] == str((place/'aligned').resolve()) and len(card['aligned_weights']) == 16
    monkeypatch.chdir(home)
    assert load_talker(place/'llava', generated=True).generated
    place.rename(tmp_path/'second')
    assert load_talker(tmp_path/'second'/'llava', generated=True).generated
    shutil.rmtree(tmp_path/'second'/'aligned')
    with pytest.raises(FileNotFoundError, match='behind the aligned model .*first.aligned, which is not there'):
        load_talker(tmp_path/'second'/'llava', generated=True)
    assert load_talker(tmp_path/'second'/'llava').keys # f_r needs none of it

def test_another_alignment_in_the_same_folder_is_refused(capsys, home, tmp_path):
    shutil.copytree(home/'aligned', tmp_path/'aligned')
    drawn = '--generated', home/'drawn.parquet', '--model', tmp_path/'aligned'
    assert tune(capsys, home, tmp_path/'llava', *drawn)[0] == 0
    again = GenReal.from_pretrained(tmp_path/'aligned')
    with torch.no_grad():
        for name, p in again.f_g.named_parameters():
            if 'lora_B' in name: p.mul_(2)
    again.save_pretrained(tmp_path/'aligned')
    with pytest.raises(ValueError, match='behind another f_g than that of .*aligned, which was aligned again since'):
        load_talker(tmp_path/'llava', generated=True)
    card = json.loads((tmp_path/'llava'/'card.json').read_text())
    older = {k: v for k, v in card.items() if k not in ('aligned_weights', 'checksum')} # as before
    (tmp_path/'llava'/'card.json').write_text(json.dumps(older))
    assert load_talker(tmp_path/'llava', generated=True).generated

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
        (('what ?', '--model', 'nowhere'), '--model nowhere: no such folder'),
        (('what ?', '--model', 'lm'), 'without eyes'),
    ],
)
def test_talks_that_cannot_begin(capsys, home, argv, said):
    argv = [home/a if a in ('real', 'lm') else a for a in argv]
    status, _, err = answer(capsys, gmail_chat, *argv)
    assert status == 2 and said in err

def test_questions_from_the_shell(capsys, home, real):
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
    assert {r['arm'] for r in records} == {'real', 'real, without images', 'real - real, without images'}
    assert answer(capsys, gmail_eval, 'vqa', '--model', home/'real', home/'lm')[0] == 2

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

# instructions

def written(home, name='told.json', **change):
    "LLaVA's JSON about three of the drawings, two turns each, and one conversation of words alone."
    rows = []
    for r in emoji('B', 'noto').select(np.argsort(emoji('B', 'noto')['key'])[20:23]):
        r['image'].save(home/f'{r["key"]}.png')
        said = ('<image>\nwhat is this ?', r['label'], 'is it red ?', 'no')
        who = ('human', 'gpt') * 2
        rows.append(dict(id=r['key'], image=f'{r["key"]}.png',
                         conversations=[{'from': w, 'value': t} for w, t in zip(who, said)]))
    rows.append(dict(id='words', conversations=[{'from': 'human', 'value': 'is a cat blue ?'},
                                                {'from': 'gpt', 'value': 'no'}]))
    rows[0] |= change
    (home/name).write_text(json.dumps(rows))
    return home/name

def test_stage_two_learns_from_conversations(capsys, home):
    file = written(home)
    status, out, err = tune(capsys, home, 'talked', home/'real.parquet', '--instructions', file)
    assert status == 0 and 'project: 4 steps' in out and 'instruct: 4 steps' in out, err
    keys = [Path(r['image']).stem for r in json.loads(file.read_text()) if 'image' in r]
    assert set(keys) < set(trained_on(home/'talked')) and len(trained_on(home/'talked')) == 15
    card, _ = trained_card(home/'talked')
    assert card['instructions'] == 4 and card['images'] == dict(real=12)
    again = tune(capsys, home, 'talked', home/'real.parquet', '--instructions', file)[1]
    assert again.splitlines()[:2] == out.splitlines()[:2]
    plain = tune(capsys, home, 'plainly', home/'real.parquet')[1]
    assert plain.splitlines()[0] == out.splitlines()[0] and plain.splitlines()[1] != out.splitlines()[1]

def test_a_picture_of_an_instruction_is_refused_in_a_test(capsys, home):
    if not (home/'talked'/'card.json').exists(): test_stage_two_learns_from_conversations(capsys, home)
    talker = load_talker(home/'talked')
    learned = asked_set('emoji-questions')[0].key.split(':')[0]
    assert not talker.keys.count(learned)
    with quiet_datasets(): small_scienceqa().to_parquet(home/'train-00000-of-00001.parquet')
    talker.keys = [*talker.keys, 'scienceqa/train/0']
    with pytest.raises(ValueError, match='are among those of training'):
        evaluate_vqa(talker, str(home/'train-00000-of-00001.parquet'), home/'x', VQASettings(split='train'))

@pytest.mark.parametrize('kind', ['scienceqa', 'own'])
def test_stage_two_learns_from_questions(capsys, home, kind):
    (home/'science').mkdir(exist_ok=True)
    with quiet_datasets(): small_scienceqa().to_parquet(home/'science'/'train-00000-of-00001.parquet')
    source = dict(scienceqa=home/'science', own='emoji-questions')[kind]
    how = '--generated', home/'drawn.parquet', '--model', home/'aligned', '--instructions', source
    status, out, err = tune(capsys, home, f'asked-{kind}', *how)
    assert status == 0 and 'instruct: 4 steps' in out, err
    keys = set(trained_on(home/f'asked-{kind}'))
    assert len(keys) == dict(scienceqa=16, own=12)[kind]
    if kind == 'scienceqa': assert 'scienceqa/train/0' in keys and 'scienceqa/train/3' not in keys

@pytest.mark.parametrize('change, said', [
    (dict(image='nowhere.png'), "1 of 3 pictures are not below .*'nowhere.png'"),
    (dict(image=None), r'has 0 picture\(s\) and 1 <image>'),
    (dict(conversations=[]), 'has no list of conversations'),
    (dict(conversations=[{'from': 'human', 'value': '<image>'}]), 'do not take turns'),
    (dict(conversations=[{'from': 'human', 'value': '<image>'}, {'from': 'gpt', 'value': ' '}]), 'without words'),
    (dict(conversations=[{'from': 'bot', 'value': 'x'}]), "who is 'bot'")])
def test_conversations_that_cannot_be_learned(home, change, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        read_conversations(written(home, 'wrong.json', **change))

def test_other_instructions_that_are_refused(capsys, home, tmp_path):
    for text, said in (('{', 'is no JSON'), ('{}', 'no list of conversations'), ('[1]', 'no list of conversations')):
        (tmp_path/'x.json').write_text(text)
        with pytest.raises(ValueError, match=said): read_conversations(tmp_path/'x.json')
    with pytest.raises(ValueError, match='is for tests: learn from ScienceQA'): scienceqa_instructions(small_mmmu())
    status, _, err = tune(capsys, home, 'lost', home/'real.parquet', '--instructions', 'nowhere.json')
    assert status == 2 and '--instructions nowhere.json: no such file' in err
    assert picture_key('coco/train2017/000000000009.jpg') == picture_key('coco/COCO_train2014_000000000009.jpg') == '9'
    assert picture_key('gqa/images/0009.jpg') == 'gqa/images/0009'
    turns = conversation_turns(json.loads(written(home).read_text())[0], 'x')
    assert [t['role'] for t in turns] == ['user', 'assistant'] * 2

# a published LLaVA from the shell

@pytest.fixture(scope='module', params=['clip', 'siglip'])
def whole(request, home):
    "A LLaVA in a folder, its tower aligned from the shell."
    model, processor = tiny_llava(request.param)
    model.generation_config.update(max_length=77)
    place = home/request.param
    for part in (model, processor): part.save_pretrained(place/'llava')
    status = gmail_align([str(a) for a in (
        home/'real.parquet', '--generated', home/'drawn.parquet', '--encoder', f'llava:{place}/llava',
        '--out', place/'aligned',
        '--epochs', 1, '--batch-size', 4, '--rank', 2)])
    assert not status and (place/'aligned'/'card.json').exists()
    return place

def test_a_published_llava_is_aligned_and_tuned_from_the_shell(capsys, home, whole):
    card = json.loads((whole/'aligned'/'card.json').read_text())
    assert card['base'] == f'llava:{whole}/llava'
    aligned = GenReal.from_pretrained(whole/'aligned') # by its base's name
    assert any(p.abs().max() > 0 for n, p in aligned.f_g.named_parameters() if 'lora_B' in n)
    how = ('--generated', home/'drawn.parquet', '--arm', 'gmail', '--language-model', whole/'llava', '--model',
           whole/'aligned', '--token-folder', whole/'tokens')
    plain = whole/'plain'
    status, out, err = tune(capsys, home, f'{whole.name}/tuned', *how, '--plain', plain)
    assert status == 0 and 'instruct: 4 steps' in out and f'plain LLaVA: {plain}' in out, err
    drawn = '--plain', whole/'plain-g', '--plain-side', 'generated'
    assert tune(capsys, home, f'{whole.name}/tuned', *how, *drawn)[0] == 0
    talker = load_talker(whole/'tuned')
    processor = tiny_llava(whole.name)[1]
    picture = emoji('unseen', 'noto')[0]['image'].convert('RGB')
    asked = processor(images=picture, text='<image> what is this ?', return_tensors='pt')
    for place, see in ((plain, talker.see.encoder.image_tokens), (whole/'plain-g', aligned.generated_tokens)):
        theirs = LlavaForConditionalGeneration.from_pretrained(place).eval()
        assert theirs.generation_config.max_length == 77
        with torch.no_grad():
            words = talker.model.embed(asked['input_ids'], see(asked['pixel_values']))
            ours = talker.model.lm(inputs_embeds=words, attention_mask=asked['attention_mask']).logits
            torch.testing.assert_close(theirs(**asked).logits, ours, atol=1e-4, rtol=1e-4)
    assert answer(capsys, gmail_eval, 'vqa', '--model', plain, '--limit', 4, '--max-new-tokens', 2,
                  '--out', whole/'vqa')[0] == 0

@pytest.mark.parametrize('more, said', [
    (('--plain', 'x'), 'is a language model alone'),
    (('--plain', 'x', '--plain-side', 'generated', '--language-model', 'clip/llava'),
     'belongs to an arm that learns through it')])
def test_plain_folders_that_cannot_be_saved(capsys, home, more, said):
    if 'clip/llava' in more and not (home/'clip'/'llava').exists():
        for part in tiny_llava(): part.save_pretrained(home/'clip'/'llava')
    more = [home/m if m == 'clip/llava' else m for m in more]
    status, _, err = tune(capsys, home, 'unsaved', home/'real.parquet', *more)
    assert status == 2 and said in err and not (home/'unsaved'/'card.json').exists()

def test_two_kinds_take_half_of_each(home):
    "The steps of one pass are those of an arm with one kind, and every concept is learned from once."
    stages = dict(project=StageSettings(batch_size=4), instruct=StageSettings(steps=0))
    settings = LlavaSettings(language_model=str(home/'lm'), rank=2, **stages)
    with quiet_datasets():
        datasets.Dataset.from_parquet(str(home/'drawn.parquet')).map(
            lambda r: dict(captions=r['captions'][:1])).to_parquet(home/'once.parquet')
    sets = dict.fromkeys(('real', 'generated'), home/'once.parquet') # one caption of each
    how = dict(model=home/'aligned', token_folder=home/'tokens', run=RunSettings(desc=None))
    steps = {arm: tune_llava(home/f'pass-{arm}', settings, **sets, arm=arm, **how)
             for arm in ('indiscriminate', 'both', 'mix')}
    assert {arm: len(s['project']) for arm, s in steps.items()} == dict(indiscriminate=3, both=3, mix=3)
    assert all(len(trained_on(home/f'pass-{arm}')) == 12 for arm in steps)

# several models on one page

@pytest.mark.slow
def test_several_models_are_asked_the_same_and_compared(capsys, home):
    for arm in ('real', 'indiscriminate'):
        if not (home/arm/'card.json').exists():
            more = ('--generated', home/'drawn.parquet') if arm != 'real' else ()
            tune(capsys, home, arm, home/'real.parquet', *more, '--arm', arm)
    how = '--limit', 12, '--max-new-tokens', 3, '--out', home/'vqa2', '--model', f'first={home/"real"}'
    status, out, err = answer(capsys, gmail_eval, 'vqa', *how, '--model', home/'indiscriminate', '--json')
    assert status == 0, err
    told = json.loads(out)
    assert set(told['accuracy']) == {'first', 'indiscriminate'} and told['accuracy']['first']['n'] == 12
    assert list(told['verdict']['measures']) == ['indiscriminate - first'] and told['report'].endswith('report.html')
    records = [json.loads(l) for l in (home/'vqa2'/'results.jsonl').read_text().splitlines()]
    apart = [r for r in records if 'minus' in r]
    by = {r['arm']: r['value'] for r in records if r['metric'] == 'accuracy'}
    assert [r['arm'] for r in apart] == ['indiscriminate - first'] and apart[0]['low'] <= apart[0]['high']
    assert apart[0]['value'] == pytest.approx(by['indiscriminate'] - by['first'])
    lines = [json.loads(l) for l in (home/'vqa2'/'answers.jsonl').read_text(encoding='utf-8').splitlines()]
    assert [l['model'] for l in lines] == ['first'] * 12 + ['indiscriminate'] * 12
    page = (home/'vqa2'/'report.html').read_text(encoding='utf-8')
    for part in ('Some questions, and what each model answers', 'Accuracy by subject', 'max_new_tokens', 'Versions',
                 'indiscriminate in place of first', 'data:image/png'): assert part in page
    for name in ('answers', 'accuracy', 'differences'): assert (home/'vqa2'/f'{name}.png').exists()

def test_models_that_cannot_be_asked_are_told_before_any_is(capsys, home, real):
    (home/'copy').mkdir()
    (home/'copy'/'real').symlink_to(home/'real')
    for models, said in (((home/'real', home/'lm'), 'without eyes'),
                         ((home/'real', 'nowhere'), 'nowhere: no such folder'),
                         ((home/'real', home/'copy'/'real'), "two models are called 'real'")):
        argv = [a for m in models for a in ('--model', m)]
        status, _, err = answer(capsys, gmail_eval, 'vqa', '--limit', 4, '--out', home/'unasked', *argv)
        assert status == 2 and said in err and '%|' not in err, err # nothing was loaded
        assert not (home/'unasked'/'results.jsonl').exists()

def test_answers_that_are_there_are_read(home, real, monkeypatch):
    import gmail_nb.runs.vqa as room
    some = VQASettings(limit=6, max_new_tokens=2)
    first = evaluate_vqa(str(home/'real'), out=home/'again', settings=some, skip_existing=True)
    monkeypatch.setattr(room, 'load_talker', None)
    again = evaluate_vqa(str(home/'real'), out=home/'again', settings=some, skip_existing=True)
    assert again.said == first.said and again.records[0]['value'] == first.records[0]['value']
    with pytest.raises(TypeError):
        evaluate_vqa(str(home/'real'), out=home/'again', settings=VQASettings(limit=5), skip_existing=True)

@pytest.mark.slow
def test_the_page_of_a_llava_that_the_command_tuned(capsys, home):
    "Tuned on questions about its own drawings, then asked about others: page, table, lines and records agree."
    how = home/'real.parquet', '--arm', 'real', '--instructions', 'emoji-questions'
    assert tune(capsys, home, 'asks', *how)[0] == 0
    ask = '--limit', 16, '--max-new-tokens', 3, '--blind', '--model', f'tuned={home/"asks"}', '--out', home/'page'
    status, out, err = answer(capsys, gmail_eval, 'vqa', *ask)
    assert status == 0, err
    lines = [json.loads(l) for l in (home/'page'/'answers.jsonl').read_text(encoding='utf-8').splitlines()]
    assert len(lines) == 16 and {l['model'] for l in lines} == {'tuned'}
    blind = [l['without_images'] for l in lines]
    assert all(set(b) == {'answer', 'read', 'right', 'why'} for b in blind)
    records = [json.loads(l) for l in (home/'page'/'results.jsonl').read_text().splitlines()]
    by = {(r['arm'], r['metric']): r['value'] for r in records}
    assert by['tuned', 'accuracy'] == np.mean([l['right'] for l in lines])
    assert by['tuned, without images', 'accuracy'] == np.mean([b['right'] for b in blind])
    assert by['tuned, without images', 'unread'] == np.mean([b['read'] == '-' for b in blind])
    page, table = (home/'page'/'report.html').read_text(encoding='utf-8'), (home/'page'/'table.txt').read_text()
    for part in ('What the answers were', 'tuned, without images', 'Seeing the pictures, for tuned,', '>asks</td>',
                 'data:image/png', 'outside the choices'): assert part in page
    counts = {l.split()[0]: l.split()[-2:] for l in table.split('answers ')[-1].splitlines()[1:] if l.strip()}
    said = lines, blind
    assert counts['right'] == [str(sum(a['right'] for a in some)) for some in said] and table.strip() in out
    assert counts['refused'] == [str(sum(a['why'] == 'refused' for a in some)) for some in said]
    assert [sum(int(n[i]) for n in counts.values()) for i in (0, 1)] == [16, 16]

def test_the_rule_that_answers_are_read_by_is_that_of_the_settings(home, real, monkeypatch):
    import gmail_nb.runs.vqa as room
    asked = []
    monkeypatch.setattr(room, 'ask_questions', lambda *_, **how: asked.append(how) or [])
    for s in (VQASettings(), VQASettings(strict=True, guess=True)):
        room.answered(str(real), asked_set('emoji-questions'), s)
    assert [(how['strict'], how['guess']) for how in asked] == [(False, False), (True, True)]

@pytest.mark.parametrize('command, argv', [(gmail_tune, ['llava']), (gmail_eval, ['vqa']), (gmail_chat, [])])
def test_choices_of_a_flag_are_in_the_help(capsys, command, argv):
    shown = dict(llava=('--layers {all,attention}', '--dtype {float32,bfloat16,float16}', '--precision {auto,no,bf16}',
                        '--arm {gmail,indiscriminate,both,mix,real}', '--plain-side {real,generated}'),
                 vqa=('--kind {scienceqa,mmmu}',), chat=('--side {real,generated}',))
    try: _, out, _ = answer(capsys, command, *argv, '--help')
    except SystemExit: out = capsys.readouterr().out
    for part in shown[argv[0] if argv else 'chat']: assert part in out
    wrong = part.split()[0], 'none'
    assert "invalid choice: 'none'" in refused(capsys, command, *(argv or ['?']), *wrong)

def test_a_picture_with_dollars_in_its_choices_is_drawn():
    from gmail_nb.vqa import Question, judge, show_answers
    q = Question('q', 'Is it $6 or $7, or {x_{?', 0, ('$6', '$7'), tuple(small_scienceqa()['image'][:1]))
    show_answers([q], dict(one=[judge(q, '$6 and $7')])).canvas.draw()

# wrong input, from the shell: one line, and what to change

def refused(capsys, command, *argv):
    capsys.readouterr() # what came before
    status, out, err = answer(capsys, command, *argv)
    lines = [l for l in err.splitlines() if l.strip() and '%|' not in l] # without the bars of what was loaded
    assert status == 2 and len(lines) == 1 and 'a defect' not in err, (status, out, err)
    return lines[0]

@pytest.fixture
def real(capsys, home):
    "A folder that was tuned."
    if not (home/'real'/'card.json').exists(): tune(capsys, home, 'real', home/'real.parquet')
    return home/'real'

def picture(home):
    emoji('unseen', 'noto')[0]['image'].save(home/'seen.png')
    return home/'seen.png'

@pytest.mark.parametrize('said, image, message', [
    ('what is this ?', 'x.png', 'has 1 picture(s) and 0 <image>: one for each'),
    ('<image> what is this ?', ['x.png', 'x.png'], 'has 2 picture(s) and 1 <image>: one for each')])
def test_prompts_and_images_that_do_not_fit(capsys, home, said, image, message):
    "A prompt without an image token, and more images than tokens, in a file to learn from."
    turns = [{'from': 'human', 'value': said}, {'from': 'gpt', 'value': 'a cat'}]
    (home/'unfit.json').write_text(json.dumps([dict(id=1, image=image, conversations=turns)]))
    status, _, err = tune(capsys, home, 'unfit', home/'real.parquet', '--instructions', home/'unfit.json')
    assert status == 2 and message in err and 'conversation 1' in err and len(err.strip().splitlines()) == 1

def test_more_tokens_than_images_in_a_talk(capsys, home, real):
    ask = '<image> or <image> ?', '--image', picture(home), '--model', home/'real'
    assert 'the prompt has 2 <image> for 1 image(s): one for each' in refused(capsys, gmail_chat, *ask)
    assert '1 <image> for 0 image' in refused(capsys, gmail_chat, '<image> ?', '--model', home/'real')

@pytest.mark.parametrize('command', ['chat', 'vqa', 'tune'])
def test_a_processor_of_another_size(capsys, home, command):
    folder = home/'other-size'
    for part in (tiny_llava()[0], processor_of(64)): part.save_pretrained(folder)
    argv = dict(chat=(gmail_chat, 'what ?', '--image', picture(home), '--model', folder),
                vqa=(gmail_eval, 'vqa', '--limit', 2, '--out', home/'sized', '--model', folder),
                tune=(gmail_tune, 'llava', home/'real.parquet', '--language-model', folder, '--out', home/'sized'))
    said = refused(capsys, *argv[command])
    assert '64 pixels a side, the tower reads 32: take the processor that belongs to this model' in said

def questions_with(home, kind, **change):
    "The small set with its second question changed, in a folder."
    made = dict(scienceqa=small_scienceqa, mmmu=small_mmmu)[kind]()
    rows = [dict(r) for r in made]
    rows[1] |= change
    folder = home/f'{kind}-{len(list(home.glob(kind + "-*")))}'
    folder.mkdir()
    columns = dict(scienceqa=SCIENCEQA_COLUMNS, mmmu=MMMU_COLUMNS)[kind]
    with quiet_datasets(): datasets.Dataset.from_list(rows, features=columns).to_parquet(folder/'test.parquet')
    return folder

@pytest.mark.parametrize('kind, change, said', [
    ('scienceqa', dict(answer=4), "question '1': the answer 4 is none of its 2 choices"),
    ('scienceqa', dict(answer=-1), "question '1': the answer -1 is none of its 2 choices"),
    ('mmmu', dict(answer='F'), "'validation_Biology_2': the answer 'F' is none of its 4 choices"),
    ('mmmu', dict(answer='?'), "'validation_Biology_2' has no right answer, '?' stands in its place"),
    ('mmmu', dict(answer=None), "'validation_Biology_2' has no right answer, None stands in its place"),
    ('scienceqa', dict(answer=None), "question '1': the answer None is none of its 2 choices")])
def test_answers_outside_the_choices_and_none_at_all(capsys, home, real, kind, change, said):
    folder = questions_with(home, kind, **change)
    out = home/f'{folder.name}-out'
    assert said in refused(capsys, gmail_eval, 'vqa', folder, '--model', home/'real', '--out', out)
    assert not (out/'results.jsonl').exists()

@pytest.mark.parametrize('command', ['chat', 'vqa', 'tune'])
def test_a_chat_template_that_is_missing(capsys, home, command):
    whole, alone = home/'no-template', home/'no-template-lm'
    model, processor = tiny_llava()
    processor.chat_template = processor.tokenizer.chat_template = None
    for part in (model, processor): part.save_pretrained(whole)
    LlamaForCausalLM(language()).save_pretrained(alone)
    tiny_tokenizer(None).save_pretrained(alone)
    argv = dict(chat=(gmail_chat, 'what ?', '--image', picture(home), '--model', whole),
                vqa=(gmail_eval, 'vqa', '--limit', 2, '--out', home/'silent', '--model', whole),
                tune=(gmail_tune, 'llava', home/'real.parquet', '--language-model', alone, '--out', home/'silent'))
    said = refused(capsys, *argv[command])
    assert 'has no chat template: take a model that was tuned to follow instructions' in said

# the verdict looks at the picture

@pytest.mark.parametrize('own, turned, word, says', [
    (.5, .1, 'helps', 'Seeing the picture helps'), (.5, .5, 'unclear', 'Words were learned, and not to see'),
    (.5, .7, 'unclear', 'Words were learned, and not to see'), (-.1, -.1, 'hurts', 'Tuning hurts'),
    (0., -.4, 'unclear', 'Tuning makes no difference')])
def test_the_verdict_looks_at_the_picture(own, turned, word, says):
    noise = np.random.default_rng(0).normal(0, .05, (2, 60))
    base = np.linspace(-3, -2, 60)
    found = judge_llava(base, base + own + noise[0], base + turned + noise[1], 99)
    assert found.said == word and any(s.startswith(says) for s in found.sentences)
    assert len(found.measures) == 2 and found.facts == dict(learned_from=99)
    d = list(found.measures.values())[1]
    if own == .5: assert (word == 'helps') == (d.low > 0)
    if word != 'helps': assert not any('helps' in s for s in found.sentences if s.startswith('Tuning')) and found.tries

def test_one_text_says_where_smollm2_comes_from(monkeypatch):
    "In the error, in a dry run, and on the front page."
    from importlib import metadata
    from gmail_nb.captioning import load_lm
    from gmail_nb.runs.dry_run import look_lm
    from gmail_nb.settings import SMOLLM2_FROM
    def nothing(name): raise metadata.PackageNotFoundError(name)
    monkeypatch.setattr(metadata, 'files', nothing)
    with pytest.raises(ImportError) as e: load_lm('smollm2')
    assert str(e.value) == look_lm('smollm2').note == SMOLLM2_FROM
    readme = Path(__file__).parent.parent/'README.md'
    assert SMOLLM2_FROM.partition(': ')[2] in readme.read_text(encoding='utf-8')

# pictures that do not decode

def spoiled(ds, numbers):
    rows = [dict(r) for r in ds.cast_column('image', datasets.Image(decode=False))]
    for i in numbers: rows[i]['image'] = dict(bytes=b'no picture', path=None)
    return datasets.Dataset.from_list(rows, features=ds.features)

@pytest.mark.parametrize('bad, more, status', [(1, (), 0), (2, (), 2), (2, ('--most-damaged', '.5'), 0),
                                               (1, ('--most-damaged', '0'), 2)])
def test_training_leaves_out_what_does_not_decode_up_to_a_share(capsys, home, tmp_path, bad, more, status):
    with quiet_datasets():
        spoiled(datasets.Dataset.from_parquet(str(home/'real.parquet')), range(bad)).to_parquet(home/'spoiled.parquet')
    ended, _, err = tune(capsys, home, tmp_path/'out', home/'spoiled.parquet', *more)
    lost = [json.loads(l) for l in (tmp_path/'out'/'skipped.jsonl').read_text().splitlines()]
    assert ended == status and len(lost) == bad and err.count('left out: ') == bad, err
    assert f'{bad} of 12 images left out' in err and {r['side'] for r in lost} == {'real'}
    assert (tmp_path/'out'/'card.json').exists() == (not status) and ('--most-damaged' in err) == bool(status)
    if not status: assert not {r['key'] for r in lost} & set(trained_on(tmp_path/'out'))

@pytest.mark.parametrize('bad, more, status', [(1, (), 0), (2, (), 2), (2, ('--most-damaged', '.9'), 0),
                                               (4, ('--most-damaged', '1', '--images-only'), 2)])
def test_questions_are_asked_without_pictures_that_do_not_decode(capsys, home, tmp_path, bad, more, status):
    "Of six questions, four have a picture."
    if not (home/'real'/'card.json').exists(): tune(capsys, home, 'real', home/'real.parquet')
    science = small_scienceqa()
    seen = [i for i, r in enumerate(science['image']) if r is not None]
    with quiet_datasets(): spoiled(science, seen[:bad]).to_parquet(tmp_path/'test.parquet')
    ended, out, err = answer(capsys, gmail_eval, 'vqa', tmp_path/'test.parquet', '--model', home/'real',
                             '--max-new-tokens', 2, '--out', tmp_path/'vqa', *more)
    assert ended == status and 'Traceback' not in err and err.count('left out: ') == bad, err
    assert f'{bad} of 4 images left out' in err and (tmp_path/'vqa'/'results.jsonl').exists() == (not status)
    lost = [json.loads(l)['key'] for l in (tmp_path/'vqa'/'skipped.jsonl').read_text().splitlines()]
    assert lost == [str(i) for i in (range(bad) if '--images-only' in more else seen[:bad])]
    if not status: assert len((tmp_path/'vqa'/'answers.jsonl').read_text().splitlines()) == 6 - bad
