"LLaVA: what is counted before it runs, both kinds of images in a batch, batches equal single prompts, and the way to transformers and back."

import gmail_nb.runtime
import pytest
import torch
from gmail_nb.align import GenReal
from gmail_nb.data import emoji
from gmail_nb.encoders import load_encoder, preprocess_images
from gmail_nb.llava import (
    Llava, VisualTokens, chat_text, encode_prompt, from_llava, generate_answers, llava_loss, load_llava, new_projector,
    parts_of, save_llava, spread_markers, takes_parts, turns_of)
from gmail_nb.runtime import set_seed
from gmail_nb.settings import AdapterSettings
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration,
    LlavaProcessor, PreTrainedTokenizerFast, SiglipImageProcessor, SiglipVisionConfig)

WORDS = '<pad> <s> </s> <unk> <image> USER: ASSISTANT: what is this ? a the cat dog in picture red it blue one two yes no A B (A) (B) Question: Options:'.split()
TEXTS = "{% for m in messages %}{{ m['role'].upper() + ': ' + m['content'] + ' ' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
PARTS = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}{{ '<image> ' if c['type'] == 'image' else c['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

def tiny_tokenizer(template=TEXTS):
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, '<unk>'))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    out = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token='<pad>',
        bos_token='<s>',
        eos_token='</s>',
        unk_token='<unk>',
        additional_special_tokens=['<image>'],
    )
    out.chat_template = template
    return out

def language():
    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )

def processor_of(side, tower='clip', patch=8):
    square = dict(height=side, width=side)
    if tower == 'clip': pictures = CLIPImageProcessor(size=dict(shortest_edge=side), crop_size=square)
    else: pictures = SiglipImageProcessor(size=square)
    how = 'default', 1 # of CLIP's class token, which is counted and left out
    if tower == 'siglip': how = 'full', 0
    return LlavaProcessor(pictures, tiny_tokenizer(), patch, how[0], chat_template=TEXTS,
                          num_additional_image_tokens=how[1])

def tiny_llava(tower='clip'):
    "A LLaVA of transformers with a small CLIP or SigLIP and a small Llama, of random weights, and its processor."
    set_seed(0)
    vision = dict(clip=CLIPVisionConfig, siglip=SiglipVisionConfig)[tower](
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
    )
    how = dict(clip={}, siglip=dict(vision_feature_select_strategy='full', vision_feature_layer=-1))[tower]
    config = LlavaConfig(vision_config=vision, text_config=language(), image_token_index=4, image_seq_length=16, **how)
    return LlavaForConditionalGeneration(config).eval(), processor_of(32, tower)

@pytest.fixture(params=['clip', 'siglip'])
def published(request): return tiny_llava(request.param)

@pytest.fixture(scope='module')
def pictures(): return [im.convert('RGB') for im in emoji('B', 'noto').select(range(4))['image']]

@pytest.mark.parametrize(
    'text, images, said',
    [
        ('what ?', 1, 'the prompt has no <image>, but 1 image'),
        ('<image> ?', 2, 'has 1 <image> for 2 image'),
        ('<image> <image>', 1, 'has 2 <image> for 1'),
    ],
)
def test_markers_are_counted_first(text, images, said):
    with pytest.raises(ValueError, match=said): spread_markers(text, images, 16)

def test_templates_of_both_kinds_say_the_same():
    turns = turns_of('<image> what is this ?')
    assert chat_text(tiny_tokenizer(TEXTS), turns).split() == chat_text(tiny_tokenizer(PARTS), turns).split()
    with pytest.raises(ValueError, match='has no chat template'): chat_text(tiny_tokenizer(None), turns)
    assert parts_of('a <image> b', '<image>') == [
        dict(type='text', text='a '),
        dict(type='image'),
        dict(type='text', text=' b'),
    ]


def embedded():
    set_seed(0)
    encoder = load_encoder('embedded')
    lm = LlamaForCausalLM(language()).eval()
    return encoder, Llava(lm, tiny_tokenizer(), new_projector(1280, lm)).eval()

def test_the_loss_is_on_the_answer_alone(pictures):
    encoder, model = embedded()
    tokens = encoder.image_tokens(preprocess_images(encoder, pictures))

    def loss(question, answer):
        return llava_loss(model, [encode_prompt(model, turns_of(question, answer), 1, 16)], tokens[:1])

    prompt = encode_prompt(model, turns_of('<image> what is this ?', 'a cat'), 1, 16)
    ids = torch.tensor(prompt.ids)[None]
    logits = model.lm(inputs_embeds=model.embed(ids, tokens[:1])).logits[0]
    by_hand = torch.nn.functional.cross_entropy(logits[-4:-1], ids[0, -3:])
    torch.testing.assert_close(loss('<image> what is this ?', 'a cat'), by_hand, atol=1e-5, rtol=1e-5)
    assert prompt.answer == 3 and not torch.isclose(loss('<image> what is this ?', 'a dog'), by_hand)

def test_a_batch_answers_as_single_prompts(pictures):
    encoder, model = embedded()
    tokens = encoder.image_tokens(preprocess_images(encoder, pictures))
    asks = [
        encode_prompt(model, turns_of(q), 1, 16)
        for q in ('<image> what ?', '<image> is this a cat in the picture ?', 'what is <image> ?')
    ]
    alone = [generate_answers(model, [p], tokens[i:i + 1], 6)[0] for i, p in enumerate(asks)]
    assert generate_answers(model, asks, tokens[:3], 6) == alone
    two = encode_prompt(model, turns_of('<image> or <image> ?'), 2, 16)
    assert len(generate_answers(model, [two, asks[0]], tokens[:3], 3)) == 2

def test_gradients_reach_the_projector_and_both_sides(pictures):
    encoder, model = embedded()
    see = VisualTokens(GenReal(encoder, AdapterSettings(adapted_share=2 / 7)))
    tokens = see(preprocess_images(encoder, pictures[:2]), torch.tensor([False, True]))
    prompts = [encode_prompt(model, turns_of('<image> ?', 'a cat'), 1, 16)] * 2
    llava_loss(model, prompts, tokens).backward()
    assert all(p.grad is not None for p in model.projector.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for n, p in see.named_parameters() if 'lora_B' in n)

def test_the_same_logits_as_transformers(published, pictures):
    model, processor = published
    llava, tower = from_llava(model, processor)
    asked = processor(
        images=pictures[:2], text=['<image> what ?', 'is it red <image> ?'], return_tensors='pt', padding=True
    )
    theirs = model(**asked).logits
    ours = model(
        inputs_embeds=llava.embed(asked['input_ids'], tower.image_tokens(asked['pixel_values'])),
        attention_mask=asked['attention_mask'],
    ).logits
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match='64 pixels a side, the tower reads 32'): from_llava(model, processor_of(64))
    with pytest.raises(ValueError, match='patches of 4 pixels, the tower reads patches of 8'):
        from_llava(model, processor_of(32, patch=4))

def test_its_tower_is_an_encoder_by_name(published, pictures, tmp_path):
    "The tower alone reads what the whole reads; what is aligned on one fits the other, also of half precision."
    model, processor = published
    model.half().save_pretrained(tmp_path/'llava')
    processor.save_pretrained(tmp_path/'llava')
    alone = load_encoder(f'llava:{tmp_path}/llava')
    llava, tower = load_llava(str(tmp_path/'llava'), dtype=torch.bfloat16)
    assert alone.name == tower.name == f'llava:{tmp_path}/llava' and alone.fingerprint == tower.fingerprint
    x = preprocess_images(alone, pictures)
    assert torch.equal(alone.image_tokens(x), tower.image_tokens(x)) and alone.image_tokens(x).shape == (4, 16, 32)
    aligned = GenReal(alone, AdapterSettings(rank=2))
    trained_like(aligned)
    aligned.save_pretrained(tmp_path/'aligned')
    back, again = GenReal.from_pretrained(tmp_path/'aligned'), GenReal.from_pretrained(tmp_path/'aligned', tower)
    torch.testing.assert_close(back.generated_tokens(x), aligned.generated_tokens(x))
    torch.testing.assert_close(again.generated_tokens(x), aligned.generated_tokens(x))
    with pytest.raises(ValueError, match='no LLaVA of transformers'):
        LlamaForCausalLM(language()).save_pretrained(tmp_path/'lm')
        load_encoder(f'llava:{tmp_path}/lm')
    (tmp_path/'llava'/'model.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='no safetensors with the weights of a vision tower'):
        load_encoder(f'llava:{tmp_path}/llava')

@pytest.mark.parametrize('template', [TEXTS, PARTS])
def test_every_answer_of_a_conversation_is_learned(template, pictures):
    encoder, model = embedded()
    model.chat = tiny_tokenizer(template)
    talk = [*turns_of('<image> what is this ?', 'a cat'), *turns_of('is it red ?', 'no'), *turns_of('what ?', 'one')]
    prompt, last = encode_prompt(model, talk, 1, 16), encode_prompt(model, talk[:2], 1, 16)
    assert model.tokenizer.decode([prompt.ids[i] for i in prompt.learned]) == 'a cat no one </s>'
    assert prompt.ids[:len(last.ids) - 1] == last.ids[:-1] # as it is when it is asked, but for the end
    tokens = encoder.image_tokens(preprocess_images(encoder, pictures))[:1]
    with torch.no_grad():
        logits = model.lm(inputs_embeds=model.embed(torch.tensor([prompt.ids]), tokens)).logits[0]
        places = torch.tensor(prompt.learned)
        by_hand = torch.nn.functional.cross_entropy(logits[places - 1], torch.tensor(prompt.ids)[places])
        torch.testing.assert_close(llava_loss(model, [prompt], tokens), by_hand, atol=1e-5, rtol=1e-5)

def test_an_answer_that_the_template_changes_is_refused():
    _, model = embedded()
    model.chat = tiny_tokenizer(TEXTS.replace("m['content']", "m['content'].upper()"))
    with pytest.raises(ValueError, match='leaves out or changes the answer'):
        encode_prompt(model, [*turns_of('what ?', 'a cat'), *turns_of('is it ?', 'no')], 0, 0)

def trained_like(model):
    with torch.no_grad():
        for n, p in model.f_g.named_parameters():
            if 'lora_B' in n: p.normal_(std=.1, generator=torch.Generator().manual_seed(0))

def test_aligned_and_back(published, pictures, tmp_path):
    "Real images see the published tower bit for bit; transformers loads what is saved, with f_r or f_g merged."
    model, processor = published
    model.generation_config.update(repetition_penalty=1.2, max_length=77)
    asked = processor(images=pictures[:1], text='<image> what is this ?', return_tensors='pt')
    before = model(**asked).logits
    llava, tower = from_llava(model, processor)
    x = preprocess_images(tower, pictures)
    aligned = GenReal(tower, AdapterSettings(rank=2))
    plain = VisualTokens(aligned)(x)
    trained_like(aligned)
    kinds = torch.tensor([True, False, True, False])
    mixed = VisualTokens(aligned)(x, kinds)
    assert torch.equal(mixed[~kinds], plain[~kinds]) and not torch.allclose(mixed[kinds], plain[kinds])
    torch.testing.assert_close(mixed[kinds], VisualTokens(aligned)(x[kinds], torch.tensor([True, True])))
    save_llava(llava, tmp_path/'real')
    torch.testing.assert_close(
        LlavaForConditionalGeneration.from_pretrained(tmp_path/'real').eval()(**asked).logits, before
    )
    said = LlavaForConditionalGeneration.from_pretrained(tmp_path/'real').generation_config
    assert (said.repetition_penalty, said.max_length) == (1.2, 77)
    save_llava(llava, tmp_path/'generated', aligned)
    _, merged = load_llava(str(tmp_path/'generated'))
    torch.testing.assert_close(merged.image_tokens(x), aligned.generated_tokens(x), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(VisualTokens(aligned)(x), plain) # merging left the model as it was

def test_an_adapter_alone_loads_by_plain_peft(published, tmp_path, pictures):
    "LoRA in the language model, saved without its base, on a fresh copy of the published one."
    model, processor = published
    model.save_pretrained(tmp_path/'published')
    asked = processor(images=pictures[:1], text='<image> what ?', return_tensors='pt')
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=r'.*language_model.*\.(q_proj|v_proj)'))
    with torch.no_grad():
        for n, p in adapted.named_parameters():
            if 'lora_B' in n: p.normal_(std=.1)
    adapted.save_pretrained(tmp_path/'adapter')
    fresh = LlavaForConditionalGeneration.from_pretrained(tmp_path/'published').eval()
    torch.testing.assert_close(
        PeftModel.from_pretrained(fresh, tmp_path/'adapter').eval()(**asked).logits, adapted.eval()(**asked).logits
    )


def test_only_a_llava_of_transformers_goes_back(tmp_path):
    _, model = embedded()
    with pytest.raises(ValueError, match='is no LLaVA of transformers'): save_llava(model, tmp_path)

def test_a_template_of_texts_that_knows_tools_gets_texts():
    "Templates of text models name a 'type' where they write tools down; it says nothing of images."
    tools = '{% if tools %}{"type": "function"}{% endif %}'
    joins = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}"
    prints = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    chat = tiny_tokenizer()
    for template in (tools + joins, tools + prints):
        chat.chat_template = template
        assert not takes_parts(chat) and '<image>' in chat_text(chat, turns_of('<image>\nwhat is it ?'), generate=False)
    chat.chat_template = PARTS
    assert takes_parts(chat)
