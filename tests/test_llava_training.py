"Training a LLaVA: tokens on disk, what is refused, a stop anywhere, several processes, and the way to plain transformers and peft."

import gmail_nb.runtime
import json
from dataclasses import replace
from pathlib import Path

import llava_once
import pytest
import torch
from gmail_nb.align import GenReal
from gmail_nb.data import emoji
from gmail_nb.encoders import load_encoder, preprocess_images
from gmail_nb.llava import (
    Llava, VisualTokens, answer_all, encode_prompt, from_llava, generate_answers, llava_loss, lora_layers,
    new_projector, read_shared_words, save_llava, turns_of)
from gmail_nb.llava_training import (
    Example, CaptionExamples, LiveTokens, LlavaTraining, adapt_language, embed_tokens, encode_example, example, in_half,
    load_tokens, load_trained, new_llava, only_trained, save_trained, mixed_tokens, train_llava, train_stage)
from gmail_nb.runs.instructions import question_turns
from gmail_nb.runtime import set_seed
from gmail_nb.settings import AdapterSettings, AlignSettings, EmbedSettings, LlavaSettings, RunSettings, StageSettings
from gmail_nb.train import align
from gmail_nb.vqa import Question, ask_questions
from peft import PeftModel
from safetensors.torch import load_file
from test_llava import language, pictures, published, tiny_tokenizer, trained_like
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

stage = StageSettings(steps=6, batch_size=4, lr=3e-3)
quick = LlavaSettings(project=stage, instruct=stage, rank=2)

def small(width=20):
    set_seed(0)
    lm = LlamaForCausalLM(language())
    return Llava(lm, tiny_tokenizer(), new_projector(width, lm)).eval()

def learned(model): return {n: p for n, p in model.named_parameters() if 'projector' in n or 'lora_' in n}

def test_tokens_are_written_once_and_a_killed_run_goes_on(tmp_path, pictures):
    ds = emoji('B', 'noto').select(range(10))
    encoder = load_encoder('embedded')
    how = EmbedSettings(part_rows=4, batch_size=2, show_progress=False)
    whole = embed_tokens(ds, encoder, tmp_path/'a', settings=how)
    assert whole.shape == (10, 16, 1280) and whole.keys == ds['key']
    plain = encoder.image_tokens(preprocess_images(encoder, list(ds['image'])[3:5]))
    torch.testing.assert_close(whole[[3, 4]].float(), plain, atol=5e-3, rtol=5e-3)
    bytes_before = (tmp_path/'a'/'features.npy').read_bytes()
    (tmp_path/'a'/'card.json').unlink()
    (tmp_path/'a'/'done'/'00001.json').unlink()
    with pytest.raises(FileNotFoundError, match='card.json is missing'): load_tokens(tmp_path/'a')
    assert embed_tokens(ds, encoder, tmp_path/'a', settings=how).fingerprint == whole.fingerprint
    assert (tmp_path/'a'/'features.npy').read_bytes() == bytes_before
    assert load_tokens(tmp_path/'a').select([2]).keys == ds['key'][2:3]
    with pytest.raises(ValueError, match='other features'):
        embed_tokens(ds.select(range(5)), encoder, tmp_path/'a', settings=how)


def test_tokens_that_sixteen_bits_cannot_hold():
    with pytest.raises(ValueError, match='more than 16 bits'): in_half(torch.tensor([7e4]))

def test_pooled_features_are_no_tokens(tmp_path):
    from gmail_nb.features import embed
    embed(emoji('B', 'noto').select(range(2)), 'embedded', tmp_path, settings=EmbedSettings(show_progress=False))
    with pytest.raises(ValueError, match='no grid tokens'): load_tokens(tmp_path)

@pytest.mark.parametrize('one, said', [
    (example('what is this ?', 'a cat', ('real', 0)), 'example 0: the prompt has no <image>, but 1 image'),
    (example('<image> what ?', 'a cat', ('real', 0), ('real', 1)), 'example 0: the prompt has 1 <image> for 2 image'),
    (example('<image> what ?', 'a cat', ('drawn', 0)), "example 0: unknown kind of image 'drawn'"),
    (example('<image> what ?', 'a cat', ('real', 12)), "example 0: there is no row 12 of 'real'"),
    (Example(tuple(turns_of('<image> what ?')), (('real', 0),)), 'example 0: the last turn is no answer'),
    (example('what ' * 60, 'a cat'), 'example 0: a question of .* leaves no room')])
def test_examples_that_cannot_be_learned(one, said):
    with pytest.raises(ValueError, match=said):
        train_stage(small(), [one], llava_once.files, 'project', replace(quick, max_length=50))


def test_other_things_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match='differ in shape'):
        train_stage(
            small(), llava_once.examples, dict(a=torch.zeros(1, 4, 20), b=torch.zeros(1, 5, 20)), 'project', quick
        )
    with pytest.raises(ValueError, match='unknown stage'):
        train_stage(small(), llava_once.examples, llava_once.files, 'three', quick)
    LlamaForCausalLM(language()).save_pretrained(tmp_path/'lm')
    tiny_tokenizer(None).save_pretrained(tmp_path/'lm')
    with pytest.raises(ValueError, match='has no chat template'):
        new_llava(replace(quick, language_model=str(tmp_path/'lm')), 20)
    with pytest.raises(FileNotFoundError, match='no trained LLaVA'): load_trained(tmp_path)
    model = small()
    adapt_language(model, quick)
    save_trained(model, tmp_path/'two', quick)
    deeper = small()
    deeper.lm = LlamaForCausalLM(language().__class__(**(language().to_dict() | dict(num_hidden_layers=3))))
    with pytest.raises(ValueError, match='does not fit the language model'):
        load_trained(tmp_path/'two', (deeper, None))


def test_stage_one_leaves_the_language_model_and_stage_two_its_base():
    model = small()
    before = {n: p.clone() for n, p in model.lm.named_parameters()}
    train_llava(model, llava_once.examples, llava_once.files, replace(quick, instruct=replace(stage, steps=0)))
    assert all(torch.equal(p, before[n]) for n, p in model.lm.named_parameters()) and not lora_layers(model.lm)
    train_stage(model, llava_once.examples, llava_once.files, 'instruct', quick)
    assert all(
        torch.equal(p, before[n.replace('.base_layer', '')]) for n, p in model.lm.named_parameters() if 'lora_' not in n
    )
    assert any(p.abs().max() > 0 for n, p in model.lm.named_parameters() if 'lora_B' in n)

class Killed(Exception): pass

@pytest.mark.parametrize('name, step', [('project', 1), ('project', 11), ('instruct', 0), ('instruct', 7)])
def test_a_run_that_is_stopped_anywhere_ends_like_one_that_is_not(tmp_path, monkeypatch, name, step):
    losses, weights = llava_once.one()
    run = RunSettings(checkpoints=str(tmp_path), save_every=5, desc=None)
    advance = LlavaTraining.advance
    def dying(self):
        if (self.step, bool(lora_layers(self.model.lm))) == (step, name == 'instruct'): raise Killed
        return advance(self)
    with monkeypatch.context() as m:
        m.setattr(LlavaTraining, 'advance', dying)
        with pytest.raises(Killed): llava_once.one(run)
    again, found = llava_once.one(run)
    assert again == losses and all(torch.equal(found[n], w) for n, w in weights.items())
    with pytest.raises(ValueError, match='belongs to another run'): llava_once.one(run, rank=2, weight_decay=.1)

def test_two_processes_follow_the_curve_of_one(forks, tmp_path):
    "Batches with both kinds of images and words alone, and batches of one, of which a process gets none."
    for done in forks.together(Path(__file__).with_name('llava_once.py'), tmp_path):
        assert done.status == 0, done.err[-3000:]
    for name, how in dict(even={}, one=dict(project=llava_once.odd, instruct=llava_once.odd)).items():
        losses, weights = llava_once.one(**how)
        others, found = json.loads((tmp_path/f'{name}.json').read_text()), load_file(tmp_path/f'{name}.safetensors')
        assert len(losses) == len(others) and max(abs(a - b) for a, b in zip(losses, others)) < 1e-3, name
        for n, w in weights.items(): torch.testing.assert_close(found[n], w, atol=3e-3, rtol=0, msg=f'{name} {n}')

def test_activations_computed_again_change_no_loss():
    plain, saving = llava_once.one()[0], llava_once.one(checkpointing=True)[0]
    assert max(abs(a - b) for a, b in zip(plain, saving)) < 1e-5

def test_a_batch_in_parts_learns_as_the_whole():
    whole, parts = llava_once.one(), llava_once.one(accumulation=3)
    assert len(whole[0]) == len(parts[0]) and max(abs(a - b) for a, b in zip(whole[0], parts[0])) < 1e-4
    for n, w in whole[1].items(): torch.testing.assert_close(parts[1][n], w, atol=2e-3, rtol=0, msg=n)

def test_tokens_from_a_file_learn_as_tokens_of_the_tower(pictures):
    encoder = load_encoder('embedded')
    x = preprocess_images(encoder, pictures)
    told = CaptionExamples([['a cat'], ['the dog'], ['red'], ['one two']], 'real', ('what is this ?',))
    with torch.no_grad(): kept = encoder.image_tokens(x).half()
    ways = [kept, LiveTokens(x, encoder.image_tokens)]
    losses = [train_llava(small(1280), told, dict(real=w), quick)['instruct'] for w in ways]
    assert max(abs(a - b) for a, b in zip(*losses)) < 2e-2

def test_a_caption_for_each_example_and_every_kind_in_its_place():
    told = CaptionExamples([['a', 'b'], ['c']], 'generated')
    assert [(e.turns[-1]['content'], e.images) for e in told] == [
        ('a', (('generated', 0),)), ('b', (('generated', 0),)), ('c', (('generated', 1),))]
    files = llava_once.files
    found = mixed_tokens([('real', 3), ('generated', 5), ('real', 0)], files)
    assert torch.equal(found, torch.stack([files['real'][3], files['generated'][5], files['real'][0]]).float())
    assert mixed_tokens([], files) is None

def test_both_kinds_in_a_batch_equal_batches_of_their_own():
    model, files = small(), llava_once.files
    told = [
        example('<image> what ?', 'a cat', ('real', 1)),
        example('<image> is it red ?', 'yes', ('generated', 2)),
        example('what ?', 'blue'),
    ]
    coded = [encode_example(model, e, 4) for e in told]
    with torch.no_grad():
        whole = llava_loss(model, coded, mixed_tokens([i for e in told for i in e.images], files))
        parts = [llava_loss(model, [c], mixed_tokens(list(e.images), files)) * c.answer for c, e in zip(coded, told)]
    torch.testing.assert_close(whole, sum(parts) / sum(c.answer for c in coded), atol=1e-5, rtol=1e-5)

def test_what_all_prompts_begin_with_is_read_once():
    model, files = small(), llava_once.files
    words = (
        'what is this <image> ?',
        'what is this <image> a cat in the picture ?',
        'what is this picture ?',
        'what is this ? <image> <image>',
    )
    images = [[('real', 0)], [('generated', 1)], [], [('real', 2), ('real', 3)]]
    asked = [(turns_of(w), some) for w, some in zip(words, images)]
    look = lambda some: mixed_tokens(some, files)
    alone = [generate_answers(model, [encode_prompt(model, t, len(some), 4)], look(some), 6)[0] for t, some in asked]
    assert answer_all(model, asked, look, 3, 6) == alone
    assert answer_all(model, asked[:3], look, 2, 6, num_beams=2) == [
        generate_answers(model, [encode_prompt(model, t, len(some), 4)], look(some), 6, num_beams=2)[0]
        for t, some in asked[:3]
    ]
    prompts = [encode_prompt(model, t, len(some), 4) for t, some in asked]
    assert len(read_shared_words(model, prompts).ids) > 2
    with pytest.raises(ValueError, match='begins with other words'):
        other = encode_prompt(model, turns_of('is it ?'), 0, 4)
        generate_answers(model, [other], None, 3, read_shared_words(model, prompts))

def test_a_published_llava_goes_all_the_way_and_back(published, pictures, tmp_path):
    "Align, tune on both kinds, caption, answer, save; plain transformers and plain peft give the same logits."
    model, processor = published
    with torch.no_grad(): # random words are as long as trained ones, or nothing could be learned above them
        for words in (model.get_input_embeddings().weight, model.get_output_embeddings().weight): words.mul_(20)
    model.save_pretrained(tmp_path/'published')
    processor.save_pretrained(tmp_path/'published')
    llava, tower = from_llava(model, processor)
    aligned = GenReal(tower, AdapterSettings(rank=2))
    trainable = {n for n, p in llava.named_parameters() if p.requires_grad}
    ds, drawn = (emoji('B', s).select(range(4)) for s in ('noto', 'fluent'))
    assert ds['key'] == drawn['key'] # pairs
    partners = aligned.real_features(preprocess_images(tower, pictures)).detach()
    x_g = preprocess_images(tower, [im.convert('RGB') for im in drawn['image']])
    how = AlignSettings(epochs=30, batch_size=4, lr=2e-2, precision='no')
    losses = [row['loss'] for row in align(aligned, x_g, partners, how, run=RunSettings(desc=None))]
    assert losses[-1] < losses[0] - .1
    assert torch.equal(aligned.real_features(preprocess_images(tower, pictures)), partners)
    quiet = EmbedSettings(show_progress=False)
    files = dict(real=embed_tokens(ds, aligned, tmp_path/'real', 'real', quiet),
                 generated=embed_tokens(drawn, aligned, tmp_path/'generated', 'generated', quiet))
    moved = embed_tokens(drawn, aligned, tmp_path/'unaligned', 'real', quiet)
    assert not torch.allclose(moved[[0]], files['generated'][[0]]) # f_g and f_r differ by what was learned
    tower_before = VisualTokens(aligned)(preprocess_images(tower, pictures), torch.tensor([True, False, True, False]))
    names = 'a cat', 'the dog', 'red', 'blue'
    told = [example('<image> what is this ?', w, (('real', 'generated')[i % 2], i)) for i, w in enumerate(names)]
    quiz = [Question(f'q{i}', 'is it red ?', i % 2, ('yes', 'no'), (pictures[i],)) for i in range(4)]
    told += [Example(question_turns(q, 0)[0], (('real', i),)) for i, q in enumerate(quiz)]
    long = StageSettings(steps=60, batch_size=8, lr=1e-2)
    settings = replace(quick, language_model=str(tmp_path/'published'), project=long, rank=8,
                       instruct=replace(long, steps=250))
    history = train_llava(llava, told, files, settings)
    assert history['instruct'][-1] < .2 < history['project'][0]
    assert trainable <= {n.replace('.base_layer', '') for n, p in llava.named_parameters() if p.requires_grad} | {
        n for n in trainable if 'language_model' in n} # f_g can be aligned further
    tower_after = VisualTokens(aligned)(preprocess_images(tower, pictures), torch.tensor([True, False, True, False]))
    assert torch.equal(tower_before, tower_after)
    seen = mixed_tokens([e.images[0] for e in told[:4]], files)
    ask = lambda m: generate_answers(m, [encode_prompt(m, turns_of('<image> what is this ?'), 1, 16)] * 4, seen, 6)
    said = ask(llava)
    assert said == list(names) # real ones through f_r and generated ones through f_g, in one batch
    run = ask_questions(llava, VisualTokens(aligned), quiz)
    assert [a.read for a in run] == ['A', 'B', 'A', 'B'] and all(a.right for a in run)
    asked = processor(images=pictures[:1], text='<image> what is this ?', return_tensors='pt')
    with torch.no_grad():
        ours = model(inputs_embeds=llava.embed(asked['input_ids'], tower.image_tokens(asked['pixel_values']))).logits
    save_llava(llava, tmp_path/'plain')
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path/'plain').eval()
    torch.testing.assert_close(plain(**asked).logits, ours, atol=1e-4, rtol=1e-4)  # merged equals unmerged
    with torch.no_grad():
        again = model(inputs_embeds=llava.embed(asked['input_ids'], tower.image_tokens(asked['pixel_values']))).logits
    assert torch.equal(again, ours) # and merging left it as it was
    save_trained(llava, tmp_path/'trained', settings)
    fresh = LlavaForConditionalGeneration.from_pretrained(tmp_path/'published').eval()
    adapted = PeftModel.from_pretrained(fresh, tmp_path/'trained'/'adapter').eval()
    torch.testing.assert_close(adapted(**asked).logits, ours, atol=1e-4, rtol=1e-4)
    back, its_tower, _ = load_trained(tmp_path/'trained')
    assert ask(back) == said and its_tower is not None

def test_an_adapter_of_a_language_model_loads_by_plain_peft(tmp_path):
    model = small()
    train_llava(model, llava_once.examples, llava_once.files, quick)
    save_trained(model, tmp_path/'trained', quick)
    set_seed(0)
    adapted = PeftModel.from_pretrained(LlamaForCausalLM(language()), tmp_path/'trained'/'adapter').eval()
    ids = torch.tensor([[1, 7, 8, 9]])
    torch.testing.assert_close(adapted(ids).logits, model.lm(ids).logits)
    back = load_trained(tmp_path/'trained', (small(), None))[0]
    assert all(torch.equal(p, learned(back)[n]) for n, p in learned(model).items())

def test_a_conversation_without_room_loses_its_last_question():
    model, files = small(), llava_once.files
    turns = *turns_of('<image> what is this ?', 'a cat'), *turns_of('is it <image> ?', 'no')
    talk = Example(turns, (('real', 0), ('real', 1)))
    whole = encode_example(model, talk, 4)
    first = encode_example(model, example('<image> what is this ?', 'a cat', ('real', 0)), 4)
    assert model.tokenizer.decode([whole.ids[i] for i in whole.learned]) == 'a cat no </s>' and whole.images == 2
    cut = encode_example(model, talk, 4, len(first.ids))
    assert cut == first and cut.images == 1
    assert len(train_stage(model, [talk, example('what ?', 'blue')], files, 'instruct', quick)) == 6

def test_frozen_weights_in_sixteen_bits_train_float32_ones():
    model = small()
    model.lm.bfloat16()
    history = train_llava(model, llava_once.examples, llava_once.files, replace(quick, precision='bf16'))
    assert {p.dtype for p in learned(model).values()} == {torch.float32} and history['instruct'][-1] < history[
        'project'
    ][0]
    with only_trained(model, False) as m: assert all('projector' in n for n in m.trained())
