"""Runs notebooks one after another, each in a fork of a process that has loaded the heavy libraries: they take several
seconds to import, and there are dozens of notebooks. A line of JSON names a notebook, its folder and a file for what it
prints; the answer is a line with its exit status. The modules of this package are imported by each notebook for itself."""
import json
import os
import sys
import traceback
from pathlib import Path

def serve():
    import gmail_nb.runtime  # mends torchvision before the others look for it
    import accelerate, datasets, diffusers, matplotlib.pyplot, open_clip, peft, sklearn, timm, transformers
    import nbdev
    from diffusers import StableDiffusionPipeline
    from nbdev.config import get_config
    from nbdev.test import test_nb
    from transformers import AutoModelForCausalLM, CLIPModel

    nbdev.nbdev_export = lambda *_, **__: None # the last cell of each exports all of them: tested once, by itself
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if not child:
            out = os.open(job['log'], os.O_WRONLY | os.O_CREAT, 0o600)
            for stream in (1, 2): os.dup2(out, stream)
            failed = 1
            try:
                os.chdir(job['folder'])
                failed = not test_nb(Path(job['notebook']), skip_flags=get_config().tst_flags.split())[0]
            except BaseException: traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(failed)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

if __name__ == '__main__': serve()
