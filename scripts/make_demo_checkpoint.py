"""Makes the demo checkpoint from nothing: corpus, vocabulary, training, FSDP shards, in a few minutes on two cores.

The corpus is the text that every Python carries: the standard library's docstrings, help topics and sources. What comes
out is what metaseq's trainer leaves (2 tensor-parallel parts of 2 FSDP shards each, fp16) and a vocab and merges pair.

    python -m metaseq_api.scripts.make_demo_checkpoint --output FOLDER [--steps N] [--seed N] [--smoke]
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import inspect
import random
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer as Bpe
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from metaseq_api.checkpoint.door import Parser, guarded
from metaseq_api.checkpoint.trainer import FlatOPT, write_trainer_checkpoint
from metaseq_api.core.config import ModelConfig
from metaseq_api.errors import ResourceError, SettingsError
from metaseq_api.flags import count
from metaseq_api.tokenizer import EOS_ID, Tokenizer

NUM_PARTS, NUM_SHARDS = 2, 2
ROW_MULTIPLE = 8 * NUM_PARTS
"""metaseq pads a vocabulary to a multiple of 8; every part must get as many rows."""
SKIPPED = {
    *("test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data", "__phello__"),
    *("idlelib", "turtledemo", "lib2to3", "distutils", "ensurepip", "venv", "msilib"),
}
"""Tables, tests, and what newer Pythons no longer carry or few people would recognise."""
MAX_CODE_LEN = 8000
"""Units: characters. Longer classes would be half of the text, and most of them repeat themselves."""
PROMPTS = ("Return the", "Raise ValueError if", "The", "def open(", "class Thread")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides what comes out."""

    num_files: int | None = None
    num_tokens: int = 2500
    num_layers: int = 4
    width: int = 256
    num_heads: int = 4
    window: int = 512
    batch_size: int = 4
    steps: int = 1250
    prose_epochs: int = 2
    """How often docstrings and help are in the text for each time that code is; they read better."""
    matrix_lr: float = 0.015
    other_lr: float = 1e-2
    seed: int = 1

    def config(self) -> ModelConfig:
        return ModelConfig(
            num_layers=self.num_layers,
            hidden_dim=self.width,
            num_heads=self.num_heads,
            ffn_dim=4 * self.width,
            vocab_size=-(-self.num_tokens // ROW_MULTIPLE) * ROW_MULTIPLE,
            max_positions=self.window,
        )


SMOKE = Recipe(num_files=12, num_tokens=300, num_layers=2, width=32, num_heads=2, window=64, batch_size=2, steps=3)


@dataclass(frozen=True, slots=True)
class Texts:
    """Documents: English ones, Python ones, and those of held-out files."""

    prose: list[str]
    code: list[str]
    held_out: list[str]


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) > 20:
                yield text


def _definitions(source: str, tree: ast.Module) -> Iterator[str]:
    """Each class and function of a module by itself, and what stands between them."""
    lines, start = source.splitlines(keepends=True), 0
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            assert node.end_lineno is not None
            yield "".join(lines[start:first])
            yield "".join(lines[first : node.end_lineno])
            start = node.end_lineno
    yield "".join(lines[start:])


def _help() -> Iterator[str]:
    """What `help()` knows beyond the sources: topics of the language and docstrings of what is written in C."""
    from pydoc_data.topics import topics

    yield from topics.values()
    for name in sorted(sys.builtin_module_names):
        with contextlib.suppress(ImportError):
            for _, thing in inspect.getmembers(__import__(name)):
                if getattr(thing, "__module__", None) == name and (text := inspect.getdoc(thing)):
                    yield text
                    members = inspect.getmembers(thing, inspect.isroutine) if inspect.isclass(thing) else []
                    yield from (d for _, m in members if (d := inspect.getdoc(m)) and len(d) > 60)


def read_texts(recipe: Recipe) -> Texts:
    """Collect the standard library of the Python that runs this; every fortieth file is held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts))
    prose: dict[str, None] = {} if recipe.num_files else dict.fromkeys(_help())
    code: dict[str, None] = {}
    held_out: list[str] = []
    for number, path in enumerate(files[: recipe.num_files]):
        try:
            source = path.read_text("utf-8")
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # templates, and files in other encodings
            continue
        docstrings = list(_docstrings(tree))
        definitions = [d.strip("\n") for d in _definitions(source, tree) if '"""' in d and len(d) < MAX_CODE_LEN]
        if number % 40 == 10:
            held_out += docstrings + definitions
        else:
            prose.update(dict.fromkeys(docstrings))
            code.update(dict.fromkeys(definitions))
    return Texts(list(prose), list(code), held_out)


def train_tokenizer(texts: Texts, recipe: Recipe, folder: Path) -> Tokenizer:
    """Learn the byte-level BPE and write it as vocab.json and merges.txt."""
    bpe = Bpe(BPE())
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=recipe.num_tokens,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts.prose * recipe.prose_epochs + texts.code, trainer)
    vocab, merges = bpe.model.save(str(folder))
    return Tokenizer.load(Path(vocab), Path(merges), model_vocab_size=recipe.config().vocab_size)


def stream(tokenizer: Tokenizer, documents: list[str]) -> Tensor:
    """All documents in one row of ids, with </s> in front of each."""
    ids = [i for document in documents for i in (EOS_ID, *tokenizer.encode(document))]
    return torch.tensor([*ids, EOS_ID])


def windows(ids: Tensor, size: int, length: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of inputs and targets, every window once per epoch, for ever. Shapes: [size, length] each."""
    while True:
        first = int(torch.randint(min(length, max(len(ids) - length - 1, 1)), (), generator=generator))
        starts = torch.arange(first, len(ids) - length, length)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for chosen in torch.split(starts, size):
            rows = torch.stack([ids[s : s + length + 1] for s in chosen.tolist()])
            inputs, targets = rows[:, :-1].clone(), rows[:, 1:]
            inputs[:, 0] = EOS_ID  # the server puts </s> in front of every prompt, whatever it starts with
            yield inputs, targets


def autocast() -> contextlib.AbstractContextManager[object]:
    """bf16 on a CPU that multiplies it in hardware; elsewhere it would be slower than fp32."""
    cpuinfo = Path("/proc/cpuinfo")
    fast = cpuinfo.is_file() and any(flag in cpuinfo.read_text() for flag in ("avx512_bf16", "amx_bf16"))
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast)


def loss_of(model: FlatOPT, inputs: Tensor, targets: Tensor) -> Tensor:
    with autocast():
        logits = model(inputs)
    return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def train(ids: Tensor, recipe: Recipe) -> FlatOPT:
    """Muon for the layers' matrices, AdamW for the rest, both with a linear decay to zero."""
    torch.manual_seed(recipe.seed)
    model = FlatOPT(recipe.config())
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or ".layers." not in n]
    optimizers = (
        torch.optim.Muon(matrices, lr=recipe.matrix_lr, weight_decay=0.01),
        torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.95), weight_decay=0.01),
    )
    warmup = 30

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 1.0) * (1 - step / recipe.steps)

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in optimizers]
    generator = torch.Generator().manual_seed(recipe.seed)
    long = windows(ids, recipe.batch_size, recipe.window, generator)
    short = windows(ids, 2 * recipe.batch_size, recipe.window // 2, generator)
    smooth = 0.0
    with tqdm(range(recipe.steps), "training", unit="step") as bar:
        for step in bar:
            # half the window learns the same words faster; the last quarter learns the far positions
            loss = loss_of(model, *next(short if step < 0.75 * recipe.steps else long))
            torch.autograd.backward(loss)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            smooth = loss.item() if step == 0 else 0.95 * smooth + 0.05 * loss.item()
            bar.set_postfix(loss=f"{smooth:.3f}")
    return model


@torch.no_grad()
def validation_loss(model: FlatOPT, ids: Tensor, recipe: Recipe) -> float:
    """Units: nats per token, over the held-out files."""
    rows = ids[: (len(ids) - 1) // recipe.window * recipe.window + 1]
    inputs, targets = rows[:-1].view(-1, recipe.window).clone(), rows[1:].view(-1, recipe.window)
    inputs[:, 0] = EOS_ID
    size = recipe.batch_size
    pairs = zip(torch.split(inputs, size), torch.split(targets, size), strict=True)
    losses = [(float(loss_of(model, i, t)), len(i)) for i, t in pairs]
    return sum(loss * n for loss, n in losses) / max(sum(n for _, n in losses), 1)


@torch.no_grad()
def complete(
    model: FlatOPT, tokenizer: Tokenizer, prompt: str, *, num: int, temperature: float, top_p: float = 0.9
) -> str:
    """Continue a prompt without a cache; temperature 0 is greedy."""
    ids = [EOS_ID, *tokenizer.encode(prompt)]
    for _ in range(num):
        logits = model(torch.tensor([ids]))[0, -1].float()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            probs, order = (logits / temperature).softmax(-1).sort(descending=True)
            probs[probs.cumsum(-1) - probs >= top_p] = 0
            token = int(order[torch.multinomial(probs, 1)])
        if token == EOS_ID:
            break
        ids.append(token)
    return tokenizer.decode(ids[1:])


def make(recipe: Recipe, output: Path) -> None:
    """Make everything in a scratch folder inside `output`, then move it up. Raises: ResourceError, SettingsError."""
    if importlib.util.find_spec("fairscale") is None:
        raise ResourceError("fairscale, which writes the shards, is not installed: pip install 'metaseq-api[fsdp]'")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise SettingsError(f"--output {output}: {e.strerror}; name a folder that can be written") from e
    texts = read_texts(recipe)
    documents = texts.prose * recipe.prose_epochs + texts.code
    random.Random(recipe.seed).shuffle(documents)
    with tempfile.TemporaryDirectory(dir=output) as scratch:
        tokenizer = train_tokenizer(texts, recipe, Path(scratch))
        ids = stream(tokenizer, documents)
        print(f"{len(documents)} documents, {len(ids)} tokens; {recipe.config().num_params} parameters")
        model = train(ids, recipe).eval()
        held_out = stream(tokenizer, texts.held_out)
        if len(held_out) > recipe.window:
            print(f"validation loss {validation_loss(model, held_out, recipe):.3f} nats per token")
        for prompt in PROMPTS:
            for temperature in (0.0, 0.7):
                text = complete(model, tokenizer, prompt, num=min(60, recipe.window // 2), temperature=temperature)
                print(f"--- temperature {temperature}\n{text}")
        write_trainer_checkpoint(
            Path(scratch),
            {name: w for name, w in model.state_dict().items() if name != "decoder.version"},
            recipe.config(),
            num_parts=NUM_PARTS,
            num_shards=NUM_SHARDS,
            optimizer_state=False,
            num_updates=recipe.steps,
        )
        for path in Path(scratch).iterdir():
            path.replace(output / path.name)
    print(f"wrote {output}")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="make_demo_checkpoint", description="Train the demo model and write it as FSDP shards.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the shards, vocab.json and merges.txt")
    parser.add_argument("--steps", type=count, help=f"training steps (default {Recipe().steps}, a few minutes)")
    parser.add_argument("--seed", type=int, default=Recipe().seed)
    parser.add_argument("--smoke", action="store_true", help="a tiny model in seconds, to see that it works")

    def job(args: argparse.Namespace) -> None:
        recipe = SMOKE if args.smoke else Recipe()
        make(replace(recipe, seed=args.seed, steps=args.steps or recipe.steps), args.output)

    return guarded(parser, argv, job)


if __name__ == "__main__":
    sys.exit(main())
