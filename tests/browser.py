"A headless Chromium that is told what to do through a pipe, so that a test can click, type, look and listen."

import base64
import itertools
import json
import os
import select
import shlex
import shutil
import subprocess
import time

chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
HOW = ('--headless', '--no-sandbox', '--disable-gpu', '--remote-debugging-pipe', '--no-first-run', '--disable-sync',
       '--disable-background-networking', '--disable-component-update', '--disable-extensions', '--hide-scrollbars')

class Page:
    "A page of a browser of its own. What it asked for, and what its console said, is kept."
    def __init__(self, home, width=1200, height=900):
        to_browser, self.write_end = os.pipe()
        self.read_end, from_browser = os.pipe()
        line = f'exec {shlex.join([chromium, *HOW, f"--user-data-dir={home}"])} 3<&{to_browser} 4>&{from_browser}'
        self.process = subprocess.Popen(['bash', '-c', line], pass_fds=(to_browser, from_browser),
                                        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        for end in (to_browser, from_browser): os.close(end)
        self.numbers, self.buffer, self.session = itertools.count(1), b'', None
        self.requests, self.errors = [], []
        target = self.do('Target.createTarget', url='about:blank')['targetId']
        self.session = self.do('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Network', 'Log'): self.do(f'{domain}.enable')
        self.size(width, height)

    def __enter__(self): return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        for end in (self.write_end, self.read_end): os.close(end)

    def message(self, until):
        "The next thing the browser says; None when the time is over."
        while b'\0' not in self.buffer:
            if not select.select([self.read_end], [], [], max(0, until - time.monotonic()))[0]: return None
            part = os.read(self.read_end, 1 << 20)
            if not part: raise RuntimeError('the browser has ended')
            self.buffer += part
        text, _, self.buffer = self.buffer.partition(b'\0')
        return json.loads(text)

    def heard(self, said):
        "Keep what a test will ask for."
        kind, more = said.get('method'), said.get('params', {})
        if kind == 'Network.requestWillBeSent': self.requests.append(more['request']['url'])
        if kind == 'Runtime.exceptionThrown':
            shown = more['exceptionDetails']
            self.errors.append(shown.get('exception', {}).get('description') or shown['text'])
        if kind == 'Runtime.consoleAPICalled' and more['type'] == 'error':
            self.errors.append(' '.join(str(a.get('value', a.get('description'))) for a in more['args']))
        if kind == 'Log.entryAdded' and more['entry']['level'] == 'error':
            self.errors.append(f"{more['entry']['text']} {more['entry'].get('url', '')}")

    def do(self, method, seconds=60, **params):
        "Call a method of the DevTools protocol, and what it returns."
        number, until = next(self.numbers), time.monotonic() + seconds
        call = dict(id=number, method=method, params=params) | (dict(sessionId=self.session) if self.session else {})
        os.write(self.write_end, json.dumps(call).encode() + b'\0')
        while said := self.message(until):
            if said.get('id') == number:
                if 'error' in said: raise RuntimeError(f"{method}: {said['error']['message']}")
                return said['result']
            self.heard(said)
        raise TimeoutError(f'{method} did not answer in {seconds} s')

    def run(self, script):
        "The value of a JavaScript expression."
        found = self.do('Runtime.evaluate', expression=script, returnByValue=True, awaitPromise=True)
        if 'exceptionDetails' in found: raise RuntimeError(found['exceptionDetails']['exception']['description'])
        return found['result'].get('value')

    def wait(self, script, seconds=120):
        "Until an expression is true; its value."
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if found := self.run(script): return found
            time.sleep(.2)
        raise TimeoutError(f'not in {seconds} s: {script}\n{self.run("document.body.innerText")[:2000]}\n{self.errors}')

    def open(self, url): self.do('Page.navigate', url=url)

    def size(self, width, height):
        mobile = width < 600
        self.do('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def give(self, selector, *files):
        "Files for an input of a page."
        root = self.do('DOM.getDocument')['root']['nodeId']
        node = self.do('DOM.querySelector', nodeId=root, selector=selector)['nodeId']
        self.do('DOM.setFileInputFiles', nodeId=node, files=[str(f) for f in files])

    def picture(self, path, whole=True):
        "A PNG of the page, all of it or what the window shows."
        more = {}
        if whole:
            full = self.do('Page.getLayoutMetrics')['cssContentSize']
            more = dict(clip=dict(x=0, y=0, width=full['width'], height=full['height'], scale=1),
                        captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(self.do('Page.captureScreenshot', format='png', **more)['data']))
        return path
