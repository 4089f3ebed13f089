"Every public function and class of the package, commands left out, that takes a model: read from the source."
import ast
import re

from house import root

NAMES = {'encoder', 'model', 'captioner', 'llava', 'pipeline', 'seer', 'talker', 'tower', 'lm', 'vision', 'eyes'}
KINDS = re.compile(r'\b(Encoder|GenReal|Captioner|IFCap|Llava|Seer|Talker|\w*Pipeline|VisualTokens|Embedder'
                   r'|(nn\.)?Module|DualTower|FrozenPrefix|TunedText|Embeddings)\b')

def is_a_model(name, annotation):
    said = ast.unparse(annotation) if annotation else ''
    return bool(KINDS.search(said)) or name in NAMES and 'Settings' not in said

def takes_a_model(f): # a function, or `__init__`
    return any(is_a_model(a.arg, a.annotation) for a in [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs])

def class_takes_a_model(c):
    fields = [m for m in c.body if isinstance(m, ast.AnnAssign)]
    made = [m for m in c.body if isinstance(m, ast.FunctionDef) and m.name == '__init__']
    return any(map(takes_a_model, made)) or any(KINDS.search(ast.unparse(m.annotation)) for m in fields)

def public_names(tree):
    every = [n for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '') == '__all__']
    return ast.literal_eval(every[0].value) if every else []

def functions_of_a_room(path):
    tree = ast.parse(path.read_text())
    public = set(public_names(tree))
    for n in tree.body:
        if getattr(n, 'name', None) not in public: continue
        function, made = isinstance(n, ast.FunctionDef), isinstance(n, ast.ClassDef)
        if function and takes_a_model(n) or made and class_takes_a_model(n): yield n.name

def functions_that_take_a_model():
    "Names such as `tune.tune_text`."
    package = root/'gmail_nb'
    for path in sorted(package.rglob('*.py')):
        room = '.'.join(path.relative_to(package).with_suffix('').parts)
        if path.name.startswith('_') or room.startswith('cli.'): continue
        yield from (f'{room}.{name}' for name in functions_of_a_room(path))
