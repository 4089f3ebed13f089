"Every model on a second device that is simulated: nothing stays behind on the CPU, and nothing crosses without need."
import json

import pytest
from house import root

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
)
GROUPS = dict(
    models=(
        'encoder_embedded',
        'encoder_open_clip',
        'encoder_clip',
        'genreal_lora',
        'genreal_projections',
        'exported',
        'aligned_and_tuned_by_name',
        'a_cached_prefix',
        'fine_tuning',
    ),
    alignment=(
        'align_batch',
        'align_some',
        'align_tau',
        'align_parts',
        'align_ema',
        'align_prefix',
        'align_ids',
        'align_full',
        'align_projections',
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
        'captioning_from_text',
        'a_text_step_waits_once',
        'a_captioning_step_waits_once',
        'a_llava_step_waits_once',
        'a_llava_learns_and_answers',
        'commands_from_images_to_scores',
    ),
    more=HEAVY,
)

CASES = root/'tests'/'device_cases.py'

def outcome(forks, group, folder):
    "What `device_cases.py` found, in a process of its own: the device is registered for a whole process."
    out = folder/'found.json'
    done = forks.run(out, *GROUPS[group], script=CASES)
    assert out.exists(), done.err[-3000:]
    return {name: error for name, error in json.loads(out.read_text()).items() if error}

@pytest.mark.parametrize('group', [*list(GROUPS)[:-1], pytest.param('more', marks=pytest.mark.slow)])
def test_on_a_second_device(forks, group, tmp_path):
    errors = outcome(forks, group, tmp_path)
    assert not errors, '\n\n'.join(f'{name}: {error}' for name, error in errors.items())

def test_every_case_is_in_a_group(forks):
    cases = {c for names in GROUPS.values() for c in names}
    listed = forks.run('--list', script=CASES)
    assert set(listed.out.split()) == cases, listed.err[-2000:]
