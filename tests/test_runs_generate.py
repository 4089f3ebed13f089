"What is asked around a generation: parts, quality, the page, and mistakes that are found before anything is drawn."
import pyarrow.parquet as pq
import pytest

from gmail_nb.data import emoji, quiet_datasets
from gmail_nb.generate import load_generated
from gmail_nb.runs import generate as run
from gmail_nb.runs.generate import generate_run
from gmail_nb.settings import DrawSettings, SourceSettings, WorkSettings, part_of

quiet, two = WorkSettings(show_progress=False), DrawSettings(steps=2)

@pytest.fixture
def captions(tmp_path):
    (tmp_path/'captions.csv').write_text('key,caption\nrose,a red rose\nsun,the sun\n')
    return tmp_path/'captions.csv'

def test_a_report_comes_with_sheets_and_quality(captions, tmp_path):
    out = generate_run(captions, out=tmp_path/'run', draw=two, work=quiet, report=True)
    assert (out/'report.html').exists() and list((out/'sheets').glob('*.jpg'))
    assert 'quality' in load_generated(out).column_names
    assert pq.read_schema(out/'quality.parquet').metadata[b'encoder'] == b'embedded'

def test_quality_is_judged_on_the_device_of_the_run(captions, tmp_path, monkeypatch):
    "Of two GPUs, the second may be the one that was asked for."
    asked, load = [], run.load_encoder
    def watched(name):
        encoder = load(name)
        to = encoder.to
        encoder.to = lambda device: asked.append(str(device)) or to('cpu')
        return encoder
    monkeypatch.setattr(run, 'load_encoder', watched)
    monkeypatch.setattr(run, 'default_device', lambda: 'cuda')
    here = WorkSettings(show_progress=False, device='cpu')
    generate_run(captions, out=tmp_path/'run', draw=two, work=here, quality=True)
    assert asked and set(asked) == {'cpu'}

def test_the_page_shows_real_pictures_too(tmp_path):
    with quiet_datasets(): emoji('A', 'noto').select(range(0, 400, 100)).to_parquet(tmp_path/'real.parquet')
    out = generate_run(
        tmp_path/'real.parquet',
        out=tmp_path/'both',
        draw=two,
        work=quiet,
        report=True,
        real=tmp_path/'real.parquet',
    )
    assert 'Real and generated' in (out/'report.html').read_text()

def test_real_needs_a_report(captions, tmp_path):
    with pytest.raises(ValueError, match='add --report'): generate_run(captions, out=tmp_path/'x', real='any')

@pytest.mark.parametrize(
    'how',
    [
        dict(generator='sdxl-tubro'),
        dict(quality='embeded'),
        dict(report=True, real='nothing.parquet'),
        dict(source=SourceSettings(which='frist')),
        dict(source=SourceSettings(key='id')),
        dict(draw=DrawSettings(width=128, steps=1)),
        dict(draw=DrawSettings(scheduler='DDIMSheduler')),
        dict(draw=DrawSettings(options={'styel': 'noto'})),
    ],
)
def test_a_mistake_binds_no_folder(captions, tmp_path, how):
    with pytest.raises((ValueError, OSError)): generate_run(captions, out=tmp_path/'x', work=quiet, **how)
    assert generate_run(captions, out=tmp_path/'x', draw=two, work=quiet).exists()

def test_other_settings_of_a_finished_folder_are_refused(captions, tmp_path):
    generate_run(captions, out=tmp_path/'x', draw=two, work=quiet)
    with pytest.raises(ValueError): generate_run(captions, out=tmp_path/'x', draw=DrawSettings(steps=3), work=quiet)

@pytest.mark.parametrize('text', ['4/4', '1', 'a/2', '-1/2'])
def test_parts_that_are_none(text):
    with pytest.raises(ValueError, match='expected i/n'): part_of(text)

@pytest.mark.parametrize(
    'work, message',
    [
        (dict(device='cuda:99'), "no device 'cuda:99' here"),
        (dict(device='gpu'), "unknown device 'gpu'"),
        (dict(device='cpu', dtype='float16'), 'not for a CPU'),
        (dict(dtype='float8'), 'unknown dtype'),
    ],
)
def test_a_device_or_format_that_is_not_there_is_said_before_anything_is_read(tmp_path, work, message):
    with pytest.raises(ValueError, match=message):
        generate_run(tmp_path/'no-captions.csv', out=tmp_path/'x', work=WorkSettings(**work), quality='embedded')
    assert not (tmp_path/'x').exists()

def test_a_shard_that_ends_early_is_named(captions, tmp_path):
    out = generate_run(captions, out=tmp_path/'x', draw=two, work=quiet)
    shard = next(out.glob('shard-*.parquet'))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=shard.name): load_generated(out)
    pq.write_table(
        pq.read_table(generate_run(captions, out=tmp_path/'y', draw=two, work=quiet) / shard.name).slice(0, 1), shard
    )
    with pytest.raises(ValueError, match='has 1 rows and not 2'): load_generated(out)
    assert len(load_generated(generate_run(captions, out=out, draw=two, work=quiet))) == 2 # made anew

def test_the_real_set_of_the_page_is_read_as_the_captions_are(tmp_path):
    from gmail_nb.experiments.tables import table_miniature
    root = table_miniature(tmp_path/'sets', 4, 1, 1)
    source = SourceSettings(split='train', images=str(root))
    out = generate_run(
        root/'dataset_coco.json',
        out=tmp_path/'run',
        draw=two,
        source=source,
        work=quiet,
        report=True,
        real=root/'dataset_coco.json',
    )
    assert len(load_generated(out)) == 4 and 'Real and generated' in (out/'report.html').read_text()
