"The embedded pipeline, names of generators, and any other pipeline of diffusers."
import numpy as np
import pytest
import torch

import gmail_nb.runtime
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from gmail_nb.files import asset
from gmail_nb.pipelines import (EmojiPipeline, PatchAutoencoder, call_default, check_call, count_truncated,
                                folder_fingerprint, hub_commit, load_generator, resolve_generator,
                                text_windows, tiny_stable_diffusion, truncated_prompts)
from gmail_nb.runtime import noise_generator

PLAIN = dict(guidance=3., negative='', scheduler='default', dtype='float32', options={})
LONG = 'a cat ' + 'that sleeps on a warm windowsill beside a pot of basil '*8

@pytest.fixture(scope='module')
def pipe(): return load_generator('embedded', device='cpu')

@pytest.fixture(scope='module')
def tiny(tmp_path_factory): return tiny_stable_diffusion(tmp_path_factory.mktemp('tiny')/'tiny-sd')

@pytest.fixture(scope='module')
def sd(tiny): return load_generator(tiny, device='cpu', scheduler='EulerDiscreteScheduler')


# ---- the embedded pipeline

def test_the_autoencoder_is_saved_and_loaded_in_the_librarys_own_layout(pipe, tmp_path):
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))*2 - 1
    pipe.vae.save_pretrained(tmp_path)
    torch.testing.assert_close(PatchAutoencoder.from_pretrained(tmp_path)(x), pipe.vae(x))

def test_the_shipped_weights_are_small():
    assert sum(f.stat().st_size for f in asset('generator').rglob('*') if f.is_file()) <= 16e6

@pytest.mark.parametrize('call, message', [
    (dict(prompt='rose', style='nota'), 'did you mean'),
    (dict(prompt='rose', generator=[noise_generator(1), noise_generator(2)]), '2 generators for 1 images'),
    (dict(prompt='rose', style=['noto', 'noto']), '2 styles for 1 images'),
    (dict(), 'either')])
def test_a_wrong_call_is_refused(pipe, call, message):
    with pytest.raises(ValueError, match=message): pipe(**call)

def test_embedded_prompts_draw_what_the_text_draws(pipe):
    embeds = pipe.encode_prompt('rose')
    assert embeds.shape == (1, 24, 384)
    def draw(**given): return pipe(**given, generator=noise_generator('rose', 3), output_type='np').images
    np.testing.assert_array_equal(draw(prompt_embeds=embeds), draw(prompt='rose'))

def test_the_style_can_be_fixed(pipe):
    fluent, noto = (pipe('rocket', style=s, generator=noise_generator('rocket'), output_type='np').images
                    for s in ('fluent', 'noto'))
    assert not np.array_equal(fluent, noto)

def test_embedded_pipeline_loads_with_from_pretrained(pipe, tmp_path):
    pipe.save_pretrained(tmp_path/'saved')
    again = EmojiPipeline.from_pretrained(tmp_path/'saved')
    def draw(p):
        noise = torch.Generator().manual_seed(0)
        return p('a red apple', generator=noise, num_inference_steps=2, output_type='np').images
    np.testing.assert_array_equal(draw(pipe), draw(again))
    assert resolve_generator(tmp_path/'saved').width == 64


# ---- names

def test_names_are_resolved_or_refused(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'sdxl-turbo'"): resolve_generator('sdxl_turbo')
    with pytest.raises(FileNotFoundError, match='there is no generator at .*nowhere'): resolve_generator('./nowhere')
    with pytest.raises(FileNotFoundError, match='model_index.json'): resolve_generator(tmp_path)
    assert hub_commit('any/thing', 'a'*40) == 'a'*40

def test_a_folder_says_its_size_and_its_class_the_steps(tiny):
    found = resolve_generator(tiny)
    assert found.width == 32 and found.revision == folder_fingerprint(tiny)
    from_signature = [call_default(StableDiffusionPipeline, n) for n in ('num_inference_steps', 'guidance_scale')]
    assert [found.steps, found.guidance] == [50, 7.5] == from_signature

def test_nothing_is_guessed_for_a_generator_that_no_entry_names():
    assert call_default(StableDiffusionXLPipeline, 'guidance_scale') == 5.
    assert resolve_generator('any/thing', resolve=False).steps is None

def test_a_damaged_folder_is_named(tiny, tmp_path):
    (tmp_path/'model_index.json').write_text('{')
    with pytest.raises(ValueError, match='model_index.json is not JSON'): resolve_generator(tmp_path)

def test_the_tokenizer_gives_clips_own_numbers(sd):
    assert sd.tokenizer('a photo of a cat').input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


# ---- settings that mean nothing

@pytest.mark.parametrize('options, message', [
    (dict(scheduler='EulerDiscreetScheduler'), 'EulerDiscreteScheduler'), (dict(attention='flash'), 'attention')])
def test_loading_refuses_what_it_does_not_know(tiny, options, message):
    with pytest.raises(ValueError, match=message): load_generator(tiny, **options)

def test_a_rectified_flow_keeps_its_scheduler():
    with pytest.raises(ValueError, match='cannot use'): load_generator('embedded', scheduler='DDIMScheduler')

def test_a_plain_call_passes(pipe, sd):
    for p in (pipe, sd): check_call(p, **PLAIN)

@pytest.mark.parametrize('which, change, message', [
    ('pipe', dict(options={'styel': 'noto'}), "did you mean 'style'"),
    ('pipe', dict(negative='x', guidance=1.), 'ignore the negative'),
    ('sd', dict(negative='x', guidance=.5), 'ignore the negative'),
    ('pipe', dict(dtype='float16'), 'not for a CPU'),
    ('sd', dict(scheduler='DDIMScheduler'), 'another scheduler')])
def test_a_call_that_would_be_untrue_is_refused(request, which, change, message):
    with pytest.raises(ValueError, match=message):
        check_call(request.getfixturevalue(which), **{**PLAIN, **change})


# ---- windows

def test_a_prompt_is_cut_when_the_longest_window_is_too_short(pipe, sd):
    prompts = ['a cat', 'a dog', LONG]
    class Two: # a short and a long window, as FLUX and Stable Diffusion 3 have
        tokenizer, tokenizer_2 = sd.tokenizer, pipe.tokenizer
        def __call__(self, prompt, max_sequence_length=40): pass
    assert count_truncated(pipe, prompts) == count_truncated(sd, prompts) == 1
    assert count_truncated(Two(), prompts) == 1 and truncated_prompts(Two(), ['a cat']) == []
    assert [w for _, w in text_windows(Two(), dict(max_sequence_length=200))] == [77, 200]
    assert count_truncated(Two(), [' '.join(['cat']*60)]) == 0 # past one window, inside the other

# ---- where weights lie

def test_a_revision_that_can_be_moved_is_warned_of(monkeypatch, caplog):
    import gmail_nb.pipelines as room
    monkeypatch.setattr(room, 'hub_commit', lambda repo, revision: 'b' * 40)
    found = resolve_generator('stable-diffusion-2')
    assert found.revision == 'b' * 40 and 'is not pinned' in caplog.text and 'revision=' + 'b' * 40 in caplog.text
    caplog.clear()
    assert resolve_generator('stable-diffusion-2', 'a' * 40).revision == 'a' * 40 and not caplog.text
    assert resolve_generator('sdxl-turbo').revision != 'main' and not caplog.text

def test_a_named_generator_keeps_its_settings_elsewhere(tiny):
    moved = resolve_generator('stable-diffusion-2', repo=tiny)
    assert (moved.name, moved.steps, moved.width, moved.repo) == ('stable-diffusion-2', 50, 768, str(tiny))
    assert moved.revision == folder_fingerprint(tiny)
    assert resolve_generator('stable-diffusion-2', resolve=False, repo='some/where').repo == 'some/where'
