"Every model on a second device that is simulated: nothing stays behind on the CPU, and nothing crosses without need."
import json

import pytest
from house import root
from model_functions import functions_that_take_a_model

def weight(item): return 90

HEAVY = (
    'encoder_siglip',
    'encoder_timm',
    'genreal_full',
    'tune_text_lora',
    'tune_text_last',
    'tune_text_full',
    'align_all',
    'align_symmetric',
    'align_sigmoid',
    'align_cosine',
    'align_patience',
    'align_streamed',
    'align_tokens_best',
    'the_benchmark_of_a_gpu',
    'align_some',
    'align_tau',
    'align_parts',
    'align_ema',
    'align_ids',
    'align_pull',
    'align_full',
    'align_projections',
    'captioning_from_text',
    'a_fine_tuning_step_waits_once',
    'an_ifcap_step_waits_once',
    'a_published_llava',
    'the_app',
    'gaps_are_measured_and_drawn',
    'genreal_projections',
    'aligned_and_tuned_by_name',
    'a_cached_prefix',
    'fine_tuning',
    'long_captions',
    'a_set_of_classes_is_evaluated',
)
GROUPS = dict(
    models=(
        'encoder_embedded',
        'encoder_open_clip',
        'encoder_clip',
        'genreal_lora',
        'exported',
        'zero_shot_and_probe',
    ),
    alignment=(
        'align_batch',
        'align_prefix',
        'align_tokens',
        'align_resumes',
        'an_alignment_step_moves_what_it_reads',
        'an_alignment_step_waits_once',
        'encoding_waits_once_for_eight_batches',
    ),
    uses=(
        'tune_text_head',
        'embedding',
        'generating_and_scoring',
        'captioning',
        'a_text_step_waits_once',
        'a_captioning_step_waits_once',
        'a_llava_step_waits_once',
        'a_llava_learns_and_answers',
    ),
    commands=('commands_from_images_to_scores', 'commands_of_a_llava'),
    more=HEAVY,
)

# Those that every run tries; `-m slow` tries the others as well.
OFTEN = ('models', 'alignment', 'uses')

CASES = root/'tests'/'device_cases.py'

def outcome(forks, group, folder):
    "What `device_cases.py` found, in a process of its own: the device is registered for a whole process."
    out = folder/'found.json'
    done = forks.run(out, *GROUPS[group], script=CASES)
    assert out.exists(), done.err[-3000:]
    return {name: found['error'] for name, found in json.loads(out.read_text()).items() if found['error']}

@pytest.mark.parametrize('group', [g if g in OFTEN else pytest.param(g, marks=pytest.mark.slow) for g in GROUPS])
def test_on_a_second_device(forks, group, tmp_path):
    errors = outcome(forks, group, tmp_path)
    assert not errors, '\n\n'.join(f'{name}: {error}' for name, error in errors.items())

def test_every_case_is_in_a_group(forks):
    cases = {c for names in GROUPS.values() for c in names}
    listed = forks.run('--list', script=CASES)
    assert set(listed.out.split()) == cases, listed.err[-2000:]

def test_whatever_takes_a_model_has_a_case_or_a_reason(forks):
    "And nothing is told of what is not there, or twice."
    listed = forks.run('--table', script=CASES)
    table, names = json.loads(listed.out.splitlines()[-1]), set(functions_that_take_a_model())
    covered = [n for names in table['covered'].values() for n in names]
    def reason(name): return name in table['reasons'] or f'{name.rpartition(".")[0]}.*' in table['reasons'] or (
        f'{name.partition(".")[0]}.*' in table['reasons'])
    assert len(names) > 300 and len(covered) == len(set(covered))
    assert not [n for n in names if n not in covered and not reason(n)], 'no case and no reason in device_cases.py'
    assert not set(covered) - names and not [n for n in covered if reason(n)]
    assert not [r for r in table['reasons'] if not r.endswith('.*') and r not in names]
