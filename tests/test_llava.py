"LLaVA: what is counted before it runs, both kinds of images in a batch, batches equal single prompts, and the way to transformers and back."

import gmail_nb.runtime
import pytest
import torch
from gmail_nb.align import GenReal
from gmail_nb.data import emoji
from gmail_nb.encoders import load_encoder, preprocess_images
from gmail_nb.llava import (
    Llava, VisualTokens, chat_text, encode_prompt, from_llava, generate_answers, llava_loss, load_llava, new_projector,
    parts_of, save_llava, spread_markers, turns_of)
from gmail_nb.runtime import set_seed
from gmail_nb.settings import AdapterSettings
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration,
    LlavaProcessor, PreTrainedTokenizerFast)

WORDS = '<pad> <s> </s> <unk> <image> USER: ASSISTANT: what is this ? a the cat dog in picture red it blue one two yes no'.split()
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

def processor_of(side):
    pictures = CLIPImageProcessor(size=dict(shortest_edge=side), crop_size=dict(height=side, width=side))
    return LlavaProcessor(pictures, tiny_tokenizer(), 8, 'default', chat_template=TEXTS, num_additional_image_tokens=1)

@pytest.fixture
def published():
    "A LLaVA of transformers with a small CLIP and a small Llama, of random weights, and its processor."
    set_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
    )
    config = LlavaConfig(vision_config=vision, text_config=language(), image_token_index=4, image_seq_length=16)
    return LlavaForConditionalGeneration(config).eval(), processor_of(32)

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

def trained_like(model):
    with torch.no_grad():
        for n, p in model.f_g.named_parameters():
            if 'lora_B' in n: p.normal_(std=.1, generator=torch.Generator().manual_seed(0))

def test_aligned_and_back(published, pictures, tmp_path):
    "Real images see the published tower bit for bit; plain transformers loads what is saved, with f_r or with f_g merged."
    model, processor = published
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
