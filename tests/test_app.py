"The app: what it shows, tested without its page; and the page in a browser, where gradio and a browser are there."

import importlib.util
import io
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import browser
import numpy as np
import pytest
import torch
from PIL import Image
from test_llava import tiny_llava

from gmail_nb.align import GenReal
from gmail_nb.captioning import Captioner, caption_tokenizer, small_decoder
from gmail_nb.cli import app
from gmail_nb.cli.commands import gmail_app
from gmail_nb.encoders import load_encoder
from gmail_nb.runs.app import (
    Viewer,
    Writer,
    drawing,
    drawn_pairs,
    embedded_pipeline,
    gallery_of,
    gap_plane,
    named_folders,
    neighbours,
    open_demo,
    open_model,
    read_upload,
)
from gmail_nb.runs.tune_caption import keep_captioner
from gmail_nb.runs.tune_llava import Talk, load_talker
from gmail_nb.runtime import noise_generator, set_seed
from gmail_nb.settings import AppSettings, CaptionerSettings, DrawSettings

def weight(item): return 30 if 'browser' in item.name else 5

no_gradio = not importlib.util.find_spec('gradio')
needs_gradio = pytest.mark.skipif(no_gradio, reason='gradio is not installed: pip install -c constraints.txt ".[app]"')
needs_browser = pytest.mark.skipif(not browser.chromium, reason='there is no chromium')
FAST = DrawSettings(steps=2, guidance=1., options=dict(style='noto'))

def png(*size, mode='RGB'):
    file = io.BytesIO()
    Image.new(mode, size).save(file, 'PNG')
    return file.getvalue()

@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    found = GenReal(load_encoder('embedded'))
    with torch.no_grad(): # f_g differs from f_r
        found.proj_gen.weight.add_(torch.randn_like(found.proj_gen.weight) * .05)
    return found.eval()

@pytest.fixture(scope='module')
def few(): return drawn_pairs(embedded_pipeline(), 12, FAST)

@pytest.fixture(scope='module')
def viewer(model, few): return Viewer(model, gallery_of(model, few), AppSettings(neighbours=4), FAST)


# What is uploaded

def test_an_upload_is_limited_in_bytes_and_in_pixels():
    few = AppSettings(max_megabytes=.001, max_megapixels=.01)
    assert read_upload(png(100, 100), settings=few).size == (100, 100)
    with pytest.raises(ValueError, match='at most 0.001 MB'): read_upload(os.urandom(1001), settings=few)
    with pytest.raises(ValueError, match='101 x 100 pixels: at most 0.01 million'):
        read_upload(png(101, 100), settings=few)
    assert read_upload(png(3000, 1500)).size == (1000, 500)

def bomb(width, height):
    "A PNG of a few bytes whose header says that it is huge."
    def chunk(kind, data):
        return len(data).to_bytes(4, 'big') + kind + data + zlib.crc32(kind + data).to_bytes(4, 'big')
    head = width.to_bytes(4, 'big') + height.to_bytes(4, 'big') + b'\x08\x02\0\0\0'
    pixels = chunk(b'IDAT', zlib.compress(b'\0' * 100))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + pixels + chunk(b'IEND', b'')

WRONG = dict(
    large=bomb(9000, 9000), huge=bomb(2**31 - 1, 2**31 - 1), empty=b'', header=b'GIF89a', noise=bytes(range(256)),
    cut=png(64, 64)[:60], svg=b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>',
    eps=b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n')

@pytest.mark.parametrize('name', WRONG)
def test_what_is_no_picture_is_refused_in_a_sentence(name):
    with pytest.raises(ValueError, match='pixels|no picture that can be read') as e: read_upload(WRONG[name])
    assert '\n' not in str(e.value) and len(str(e.value)) < 200


# What is shown

def test_the_gallery_sees_generated_images_both_ways(model, few, viewer):
    g = viewer.gallery
    assert len(g) == 12 and g.real.shape == g.aligned.shape == (12, 256) and not torch.allclose(g.aligned, g.unaligned)
    with torch.inference_mode(): x = model.encode_generated(model.encoder.preprocess(few[3]['generated'])[None])[0]
    torch.testing.assert_close(g.aligned[3], x, atol=1e-4, rtol=1e-3)
    assert g.captions == [p['caption'] for p in few]
    assert len(gallery_of(model, few, most=5)) == 5

def test_the_nearest_image_to_itself_is_itself(viewer, few):
    for side, generated in (('real', False), ('generated', True)):
        seen = viewer.look(few[5][side], generated)
        near = viewer.near(seen, side)
        assert len(near) == 4 and near[0][1] == f"1.00  {few[5]['caption']}"
    assert len(neighbours(viewer.gallery, seen.own, 'real', 100)) == 12

def test_a_real_picture_is_at_one_place_and_a_generated_one_moves(viewer, few):
    real, made = viewer.look(few[0]['real'], False), viewer.look(few[0]['generated'], True)
    assert torch.equal(real.stars['unaligned'], real.stars['aligned'])
    assert not torch.equal(made.stars['unaligned'], made.stars['aligned'])
    limits = [f.axes[0].get_xlim() for f in viewer.maps(made)]
    assert limits[0] == limits[1]

def test_the_plane_is_the_direction_of_the_gap(viewer):
    g, plane = viewer.gallery, gap_plane(viewer.gallery)
    apart = g.unaligned.mean(0) - g.real.mean(0)
    torch.testing.assert_close(apart @ plane, torch.tensor([apart.norm(), 0.]), atol=1e-4, rtol=1e-4)
    assert torch.equal(plane, gap_plane(g))

@pytest.mark.parametrize('guidance', [1., 3.])
def test_a_drawing_ends_as_the_generator_alone_does(viewer, guidance):
    shown = list(drawing(viewer.pipeline, 'a blue whale', 3, guidance, 7, 'fluent'))
    own = viewer.pipeline('a blue whale', num_inference_steps=3, guidance_scale=guidance, style='fluent',
                          generator=noise_generator('drawing', 7)).images[0]
    assert len(shown) == 4 and np.abs(np.asarray(shown[-1], int) - np.asarray(own)).max() <= 1

def test_two_drawings_at_once_do_not_disturb_each_other(viewer):
    alone = [list(viewer.draw(c, 1, 3))[-1] for c in ('a rose', 'a whale')]
    both = list(zip(viewer.draw('a rose', 1, 3), viewer.draw('a whale', 1, 3)))[-1]
    for a, b in zip(alone, both): assert np.array_equal(np.asarray(a), np.asarray(b))

@pytest.mark.parametrize('caption', ['', ' \n', 'x' * 501])
def test_a_caption_that_cannot_be_drawn_is_refused(viewer, caption):
    with pytest.raises(ValueError, match='caption'): viewer.draw(caption)

def test_a_captioner_sees_a_generated_picture_through_f_g(viewer, few, monkeypatch):
    import gmail_nb.runs.app as room
    class Seer:
        encoder, captioner = viewer.model.encoder, None
        def features(self, images): return torch.zeros(1, 256)
    monkeypatch.setattr(room, 'is_talker', lambda folder: False)
    monkeypatch.setattr(room, 'load_seer', lambda folder: Seer())
    monkeypatch.setattr(room, 'write_captions', lambda captioner, x: [f'{x.abs().sum():.4f}'])
    monkeypatch.setattr(viewer, 'writers', dict(gmail=room.Writer('captions')))
    real, made = viewer.look(few[0]['real'], False), viewer.look(few[0]['generated'], True)
    assert viewer.captions(real) == [['gmail', '0.0000']]
    # the encoder of an aligned model hashes its adapters too, so the card's fingerprint is what is compared
    monkeypatch.setattr(viewer.model, 'base_fingerprint', Seer.encoder.fingerprint)
    assert viewer.captions(made) == [['gmail', f'{made.f_g.abs().sum():.4f}']]

def test_texts_of_strangers_are_escaped(viewer, few):
    bad = '"><img src=x onerror=alert(1)>'
    html = app.pictures_html([(few[0]['real'], bad)])
    assert html.count('<img') == 1 and '&lt;img' in html
    seen = viewer.look(few[0]['real'], False)
    page = app.findings_html(viewer, seen)
    assert page.count('<figure>') == 2 * 4 + 2 and app.findings_html(viewer, None) == ''


# What is opened

def test_captioners_are_named():
    assert named_folders(['a=x/y', 'z/real']) == {'a': 'x/y', 'real': 'z/real'}
    with pytest.raises(ValueError, match='two captioners'): named_folders(['x/c', 'y/c'])

def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match='no finished folder'): open_demo(tmp_path)
    with pytest.raises(ValueError, match='go together'): open_model(tmp_path, real='photos')

def answer(capsys, *argv):
    status = gmail_app(list(map(str, argv)))
    said = capsys.readouterr()
    return status, said.out, said.err

def test_without_gradio_one_line_says_what_to_install(capsys, monkeypatch, tmp_path):
    def absent(name): raise app.PackageNotFoundError(name)
    monkeypatch.setattr(app, 'version', absent)
    monkeypatch.chdir(tmp_path)
    status, _, err = answer(capsys)
    assert status == 2 and len(err.splitlines()) == 1 and '.[app]' in err
    assert not list(tmp_path.iterdir())
    status, out, _ = answer(capsys, '--dry-run')
    assert status == 2 and '.[app]' in out and not list(tmp_path.iterdir())

def test_a_port_that_is_taken_is_told_before_anything_is_loaded(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(app, 'version', lambda name: '6.31.0')
    monkeypatch.chdir(tmp_path)
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        status, _, err = answer(capsys, '--port', taken.getsockname()[1])
    assert status == 2 and 'choose another --port' in err and not list(tmp_path.iterdir())
    monkeypatch.setattr(app, 'version', lambda name: '5.0.1')
    assert 'here is gradio 5.0.1' in answer(capsys)[2]

def test_it_listens_to_this_machine_alone_unless_told():
    assert AppSettings().host == '127.0.0.1'
    for wrong in (dict(port=0), dict(port=70_000), dict(neighbours=0), dict(max_megabytes=0), dict(max_megapixels=-1)):
        with pytest.raises(ValueError): AppSettings(**wrong)


# The page

SERVER = '''
import sys
own = '127.0.0.1', '::1', 'localhost', '0.0.0.0', '', None
def listen(event, args):
    if event == 'socket.connect': asked = args[1]
    elif event in ('socket.getaddrinfo', 'socket.gethostbyname'): asked = args
    else: return
    host = asked[0] if isinstance(asked, tuple) else None # a path is a socket of this machine
    host = host.decode() if isinstance(host, bytes) else host
    if host not in own: print('asked of a network:', event, asked, flush=True)
sys.addaudithook(listen)
from gmail_nb.cli.app import serve
from gmail_nb.runs.app import Viewer, Writer, drawn_pairs, embedded_pipeline, gallery_of
from gmail_nb.runs.tune_llava import load_talker
from gmail_nb.align import GenReal
from gmail_nb.encoders import load_encoder
from gmail_nb.settings import AppSettings, DrawSettings
draw = DrawSettings(steps=2, guidance=1.)
model = GenReal(load_encoder('embedded'))
settings = AppSettings(port=int(sys.argv[1]), neighbours=4, max_megabytes=.5)
gallery = gallery_of(model, drawn_pairs(embedded_pipeline(), 12, draw))
writers = {name: Writer(f'{sys.argv[2]}/{name}') for name in ('gmail', 'indiscriminate')}
serve(Viewer(model, gallery, settings, draw, writers, load_talker(f'{sys.argv[2]}/llava')), settings)
'''

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

@pytest.fixture(scope='module')
def arms(tmp_path_factory):
    "Folders of two captioners and of a LLaVA, all small and of random weights."
    home, encoder = tmp_path_factory.mktemp('arms'), load_encoder('embedded')
    words = caption_tokenizer(['a red cat on a blue house', 'two green cars beside one small tree'])
    for seed, arm in enumerate(('gmail', 'indiscriminate')):
        set_seed(seed)
        captioner = Captioner(small_decoder(words, layers=1, width=32), words, encoder.dim)
        keep_captioner(captioner, encoder, home/arm, CaptionerSettings(lm='small'), arm, [])
    parts = tiny_llava()
    torch.manual_seed(1)
    with torch.no_grad(): parts[0].get_output_embeddings().weight.normal_() # so that it says something
    for part in parts: part.save_pretrained(home/'llava')
    return home

@pytest.fixture(scope='module')
def served(tmp_path_factory, arms):
    "The address of a page that is served. At the end: nothing was asked of a network, and no upload is left."
    if no_gradio: pytest.skip('gradio is not installed: pip install -c constraints.txt ".[app]"')
    home, port = tmp_path_factory.mktemp('app'), free_port()
    env = os.environ | dict(TMPDIR=str(home), PYTHONUNBUFFERED='1')
    env.pop('HF_HUB_OFFLINE', None) # nothing is asked without it either
    command = [sys.executable, '-c', SERVER, str(port), str(arms)]
    done = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env,
                            stderr=(home/'errors').open('w'))
    said = []
    for line in done.stdout:
        said.append(line)
        if line.startswith('app:'): break
    else: raise AssertionError((home/'errors').read_text()[-2000:])
    yield f'http://127.0.0.1:{port}'
    done.send_signal(signal.SIGINT)
    rest = done.stdout.read()
    done.wait(60)
    assert 'asked of a network' not in ''.join(said) + rest
    assert not [p for p in home.iterdir() if p.is_dir() and p.name.startswith('gmail_app')], 'uploads were left behind'

@needs_gradio
def test_the_page_is_for_this_machine_alone(served):
    port = int(served.rpartition(':')[2])
    listening = [l.split()[1] for l in Path('/proc/net/tcp').read_text().splitlines()[1:] if l.split()[3] == '0A']
    assert f'0100007F:{port:04X}' in listening and f'00000000:{port:04X}' not in listening

@needs_gradio
def test_the_server_takes_no_large_file_and_shows_no_others(served):
    def asked(path, data=None, **headers):
        request = urllib.request.Request(served + path, data, headers)
        try: return urllib.request.urlopen(request, timeout=60).status
        except urllib.error.HTTPError as e: return e.code
    def upload(n):
        head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        body = head + bytes(n) + b'\r\n--b--\r\n'
        return asked('/gradio_api/upload', body, **{'Content-Type': 'multipart/form-data; boundary=b'})
    assert upload(1000) == 200 and upload(600_000) == 413
    for path in ('/etc/passwd', __file__, str(Path.home())): assert asked(f'/gradio_api/file={path}') in (403, 404)
    assert asked('/config') == 200 and asked('/') == 200

@needs_gradio
@needs_browser
def test_a_browser_finds_neighbours_and_draws_and_asks_nobody_else(served, tmp_path):
    url = served
    maps = "[...document.querySelectorAll('.found .maps img')].filter(i => i.naturalWidth && i.offsetParent).length"
    (tmp_path/'own.png').write_bytes(png(300, 200))
    (tmp_path/'bomb.png').write_bytes(bomb(9000, 9000))
    with browser.Page(tmp_path/'profile') as page:
        page.open(url)
        page.wait("document.querySelectorAll('.thumbnail-item').length >= 12")
        assert page.run('document.title') == 'GMAIL'
        page.run("document.querySelectorAll('.thumbnail-item')[1].click()")
        page.wait(f'{maps} == 2')
        assert page.run("document.querySelectorAll('.found .row figure').length") == 8
        page.wait(f'{CHOSEN} == "1,0"')
        page.run("document.querySelectorAll('.choose')[1].querySelectorAll('.thumbnail-item')[0].click()")
        page.wait(f'{CHOSEN} == "0,1"') # a drawing of the other kind: the first one is chosen no more
        page.run("document.querySelectorAll('.choose')[0].querySelectorAll('.thumbnail-item')[0].click()")
        page.wait(f'{CHOSEN} == "1,0"')
        page.run("document.querySelector('input[type=radio][value=generated]').click()")
        page.wait("document.querySelector('input[type=radio][value=generated]').checked")
        page.run("document.querySelector('button[aria-label^=Remove]').click()")
        page.wait(f'{maps} == 0')
        page.give('input[type=file]', tmp_path/'own.png')
        page.wait(f'{maps} == 2')
        page.run("document.querySelectorAll('button[role=tab]')[1].click()")
        page.run("[...document.querySelectorAll('button')].find(b => b.innerText.trim() == 'Draw').click()")
        page.wait("document.body.innerText.includes('cosine with the caption')")
        page.wait(f'{maps} == 2')
        assert page.run("document.body.innerText.includes('step 2')")
        width = "getComputedStyle(e).borderLeftWidth != '0px'" # lines of the library's prose
        assert page.run(f"[...document.querySelectorAll('.found tr')].filter(e => {width}).length") == 0
        assert not page.errors
        elsewhere = [r for r in page.requests if not r.startswith((url, 'data:', 'blob:', url.replace('http', 'ws')))]
        assert not elsewhere
        page.size(390, 800)
        wide = "[...document.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > 391)"
        beyond = page.run(f'{wide}.map(e => e.outerHTML.slice(0, 90))')
        assert page.run("document.documentElement.scrollWidth") <= 390, beyond

CHOSEN = """[...document.querySelectorAll('.choose')]
  .map(g => g.querySelectorAll('.thumbnail-item.selected').length).join()"""
ROWS = "[...document.querySelectorAll('.found tr')].map(r => [...r.cells].map(c => c.innerText.trim()))"
BOX = """[...document.querySelectorAll('label')].find(l => l.innerText.trim().startsWith('{}'))
  .querySelector('textarea, input')"""
TYPE = """(() => {{ const box = {}; const of = Object.getPrototypeOf(box)
  Object.getOwnPropertyDescriptor(of, 'value').set.call(box, {!r})
  box.dispatchEvent(new Event('input', {{bubbles: true}})) }})()"""

@needs_gradio
@needs_browser
def test_a_browser_reads_the_captions_of_the_arms_and_the_answer_of_a_llava(served, arms, tmp_path):
    data, question = png(300, 200), 'what is in the picture ?'
    (tmp_path/'own.png').write_bytes(data)
    picture = read_upload(data)
    captions = [[arm, Writer(arms/arm).write(picture)] for arm in ('gmail', 'indiscriminate')]
    answer = Talk(load_talker(arms/'llava'), [picture], 64).ask(question).strip()
    assert answer and captions[0][1] != captions[1][1]
    with browser.Page(tmp_path/'profile') as page:
        page.open(served)
        page.wait("document.querySelectorAll('.thumbnail-item').length >= 12")
        page.run("[...document.querySelectorAll('button')].find(b => b.innerText.trim() == 'Ask').click()")
        page.wait("document.body.innerText.includes('choose a picture first')")
        page.give('input[type=file]', tmp_path/'own.png')
        page.wait(f'{ROWS}.length == 3')
        told = [[' '.join(cell.split()) for cell in row] for row in page.run(ROWS)]
        assert told == [['arm', 'caption'], *([arm, ' '.join(text.split())] for arm, text in captions)]
        page.run(TYPE.format(BOX.format('Ask the LLaVA'), question))
        page.run("[...document.querySelectorAll('button')].find(b => b.innerText.trim() == 'Ask').click()")
        assert page.wait(f"{BOX.format('It answers')}.value") == answer
        assert not page.errors
        page.size(390, 800)
        assert page.run('document.documentElement.scrollWidth') <= 390
