"""COCO, a text-to-image model, three encoders and two language models in miniature, in the formats that people
download: small enough for a test, random in its weights, and the same at every call. `python miniature.py FOLDER`."""
import gmail_nb.runtime
import json
import sys
from collections import Counter
from pathlib import Path
from string import ascii_lowercase

import open_clip
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (CLIPConfig, CLIPImageProcessor, CLIPModel, GPT2Config, GPT2LMHeadModel,
                          LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessor,
                          SiglipModel)
from transformers.utils import logging

from gmail_nb.data import emoji
from gmail_nb.pipelines import clip_tokenizer, quiet_loading, tiny_stable_diffusion

# images of each of Karpathy's splits, and how COCO's own files divide them: all but `train` lie in val2014
SPLITS = dict(train=12, restval=4, val=4, test=10)
ENCODERS = ('open_clip', 'clip', 'siglip')
LANGUAGE_MODELS = ('gpt2', 'llama')

SAID = ('a drawing of a {0}', 'the {0} on a plain ground', 'there is a picture that shows a {0}.', 'A {0}, alone.',
        'someone drew a {0} ', 'a small {0} in the middle of the image', 'Nothing but a {0}!')

# COCO

def pictures():
    "(COCO's id, split, PIL image, captions) of every image; 5 to 7 captions each, as in COCO."
    split_of = [s for s, n in SPLITS.items() for _ in range(n)]
    drawn = emoji('B', source='noto').select(range(0, 20 * len(split_of), 20))
    for i, (split, row) in enumerate(zip(split_of, drawn)):
        said = [form.format(row['label']) for form in SAID[:5 + i % 3]]
        yield 9 + 1087 * (7 * i % len(split_of)), split, photo(row['image'], i), said # ids that follow no split

def photo(drawing, i):
    "A drawing on a wide or a tall ground; COCO has grey pictures too."
    ground = Image.new('RGB', [(96, 72), (72, 96), (80, 80)][i % 3], '#dde')
    ground.paste(drawing.convert('RGB'), ((ground.width - 64) // 2, (ground.height - 64) // 2))
    return ImageOps.grayscale(ground) if i % 11 == 5 else ground

def is_in_2017(i): return i % 3 == 0 # val2017 is a part of val2014: of restval, of val and of test

def file_name(split, key): # of 2014
    part = 'train2014' if split == 'train' else 'val2014'
    return part, f'COCO_{part}_{key:012}.jpg'

def coco_json(rows):
    "What a captions_*.json holds: images and annotations, whose numbers run through the file."
    images = [dict(license=1, file_name=name, height=h, width=w, id=key) for key, name, (w, h), _ in rows]
    said = [(key, c) for key, *_, captions in rows for c in captions]
    notes = [dict(image_id=key, id=100 + 3 * n, caption=c) for n, (key, c) in enumerate(said)]
    return dict(info=dict(year=2014), licenses=[dict(id=1)], images=images, annotations=notes)

def karpathy_json(rows):
    "What dataset_coco.json holds: every image with its folder, its split and its sentences."
    def words(c): return ''.join(l for l in c.lower() if l.isalnum() or l == ' ').split()
    images = []
    for n, (key, split, captions) in enumerate(rows):
        folder, name = file_name(split, key)
        said = [dict(tokens=words(c), raw=c, imgid=n, sentid=10 * n + j) for j, c in enumerate(captions)]
        images.append(dict(filepath=folder, filename=name, imgid=n, split=split, cocoid=key, sentences=said,
                           sentids=[s['sentid'] for s in said]))
    return dict(images=images, dataset='coco')

def make_coco(folder):
    "COCO's folder, as its three archives and Karpathy's file leave it."
    rows, parts = [], dict(train2014=[], val2014=[], val2017=[])
    for sub in (*parts, 'annotations'): (folder/sub).mkdir(parents=True, exist_ok=True)
    for i, (key, split, image, captions) in enumerate(pictures()):
        part, name = file_name(split, key)
        places = {part: name} | ({'val2017': f'{key:012}.jpg'} if part == 'val2014' and is_in_2017(i) else {})
        for place, file in places.items():
            image.save(folder/place/file, quality=95)
            parts[place].append((key, file, image.size, captions))
        rows.append((key, split, captions))
    for part, found in parts.items():
        (folder/'annotations'/f'captions_{part}.json').write_text(json.dumps(coco_json(found)))
    (folder/'dataset_coco.json').write_text(json.dumps(karpathy_json(rows)))
    return folder

def keys_of(folder, split):
    "Keys of the images of one of Karpathy's splits, or of several with '+'."
    found = json.loads((folder/'dataset_coco.json').read_text())['images']
    return sorted(str(i['cocoid']) for i in found if i['split'] in split.split('+'))

def captions_in(folder, split):
    "How many captions these images have together."
    found = json.loads((folder/'dataset_coco.json').read_text())['images']
    return sum(len(i['sentences']) for i in found if i['split'] in split.split('+'))

# Encoders

NARROW = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
VISION = NARROW | dict(image_size=32, patch_size=8)
SIZE = dict(height=32, width=32)
OPEN_CLIP = dict(embed_dim=32, vision_cfg=dict(image_size=32, layers=3, width=64, patch_size=8, head_width=32),
                 text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2))

def make_open_clip(folder):
    "A ViT as open_clip keeps it in a folder of its own, and as the Hub holds it: `open_clip:local-dir:FOLDER`."
    model = open_clip.CLIP(**OPEN_CLIP)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder/'open_clip_model.safetensors')
    how = dict(mean=list(open_clip.OPENAI_DATASET_MEAN), std=list(open_clip.OPENAI_DATASET_STD))
    (folder/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=OPEN_CLIP, preprocess_cfg=how)))

def make_clip(folder):
    "A transformers `CLIPModel` with its processor and tokenizer."
    text = NARROW | dict(vocab_size=49408, eos_token_id=49407, bos_token_id=49406)
    CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)).save_pretrained(folder)
    images = CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=SIZE)
    for part in (clip_tokenizer(), images): part.save_pretrained(folder)

def make_siglip(folder):
    "A transformers `SiglipModel`: no projection, pooling by attention, a tokenizer of sentence pieces in 64 places."
    words = siglip_tokenizer()
    text = NARROW | dict(vocab_size=len(words), max_position_embeddings=64)
    SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)).save_pretrained(folder)
    for part in (words, SiglipImageProcessor(size=SIZE)): part.save_pretrained(folder)

# Tokenizers: the kinds that the originals have, learned from the captions of the miniature

def all_captions(): return [c for *_, said in pictures() for c in said]

def siglip_tokenizer():
    "Unigram pieces as SentencePiece has them, whole words and letters; padding is the end token."
    times = Counter(w for c in all_captions() for w in c.lower().split())
    scores = {'▁' + w: -5 - 1 / n for w, n in times.items()} | {l: -12. for l in [*ascii_lowercase, '▁', '.', ',', '!']}
    special = [('<pad>', 0.), ('</s>', 0.), ('<unk>', 0.)]
    pieces = Tokenizer(models.Unigram([*special, *sorted(scores.items())], unk_id=2))
    pieces.normalizer, pieces.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Metaspace()
    pieces.decoder = decoders.Metaspace()
    pieces.post_processor = processors.TemplateProcessing('$A </s>', special_tokens=[('</s>', 1)])
    return PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token='</s>', pad_token='</s>', unk_token='<unk>',
                                   model_max_length=64, model_input_names=['input_ids']) # padding is not masked

def byte_pairs(*special):
    "Pairs of bytes, as GPT-2 and Llama 3 have them: any text can be written."
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer, pairs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    learn = trainers.BpeTrainer(vocab_size=400, special_tokens=list(special), show_progress=False,
                                initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    pairs.train_from_iterator(all_captions(), learn)
    return pairs

# Language models

CHAT = ("{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
        "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")

def make_gpt2(folder):
    "GPT-2: one special token, which begins and ends texts; no token for padding."
    end = '<|endoftext|>'
    words = PreTrainedTokenizerFast(tokenizer_object=byte_pairs(end), bos_token=end, eos_token=end, unk_token=end,
                                    model_max_length=128)
    number = words.convert_tokens_to_ids(end)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(words), n_positions=128, n_embd=32, n_layer=2, n_head=2,
                               bos_token_id=number, eos_token_id=number)).save_pretrained(folder)
    words.save_pretrained(folder)

def make_llama(folder):
    "Llama 3: grouped queries, an output matrix of its own, a begin token before every text, and a chat template."
    begin, end, turn = '<|begin_of_text|>', '<|end_of_text|>', '<|eot_id|>'
    pairs = byte_pairs(begin, end, turn, '<|start_header_id|>', '<|end_header_id|>')
    first = pairs.token_to_id(begin)
    pairs.post_processor = processors.TemplateProcessing(f'{begin} $A', special_tokens=[(begin, first)])
    words = PreTrainedTokenizerFast(tokenizer_object=pairs, bos_token=begin, eos_token=end, model_max_length=128,
                                    chat_template=CHAT)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=first,
        eos_token_id=words.convert_tokens_to_ids(end))).save_pretrained(folder)
    words.save_pretrained(folder)

# All of it

MODELS = dict(sd=tiny_stable_diffusion, open_clip=make_open_clip, clip=make_clip, siglip=make_siglip, gpt2=make_gpt2,
              llama=make_llama)

def miniature(folder, seed=0):
    "COCO in `coco`, and each of `MODELS` in the folder of its name; weights follow the seed."
    folder = Path(folder)
    make_coco(folder/'coco')
    logging.disable_progress_bar()
    with quiet_loading(), torch.random.fork_rng():
        for name, make in MODELS.items():
            torch.manual_seed(seed)
            make(folder/name)
    return folder

def encoder_name(folder, kind):
    "How a command is told of one of the three encoders."
    return f'open_clip:local-dir:{folder}/open_clip' if kind == 'open_clip' else f'hf:{folder}/{kind}'

if __name__ == '__main__': print(miniature(sys.argv[1]))
