"""What newcomers get wrong, and what the answer must say: two tables, which `test_mistakes.py` walks through."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import edgetune as et

NET = """
from pathlib import Path
from torch import nn

class Net(nn.Sequential):
    def forward(self, x):
        if self.training and Path("ctrl-c").exists():
            raise KeyboardInterrupt
        return super().forward(x)

def build():
    layers = []
    for inputs, outputs in ((3, 8), (8, 8), (8, 8), (8, 8), (8, 8)):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return Net(*layers, nn.Flatten(), nn.Linear(8, 2))

def frame():
    import pandas
    return pandas.DataFrame({"text": ["a", "b"], "label": [0, 1]})

def mappings():
    return [{"text": "a", "label": 0}]
"""


class Mistake(NamedTuple):
    """A command (a call of the API), the recipe it runs, and what the answer must say."""

    command: str | Callable[[], object]
    says: tuple[str, ...]
    recipe: str = ""
    code: int = 2


def recipe(
    steps: str = "[train: {updates: 1}]",
    model: str = "{source: 'hf:tinybert', max_length: 8}",
    data: str = "csv:reviews.csv",
    more: str = "",
) -> str:
    return f"model: {model}\ndata: {data}\nsteps: {steps}\n{more}"


def run(*says: str, code: int = 2, command: str = "run r.yaml", **parts: str) -> Mistake:
    """A mistake in a recipe."""
    return Mistake(command, says, recipe(**parts), code)


class Attention(nn.Module):
    """Attention as one writes it oneself: it says of no head how many there are, or says it wrongly."""

    def __init__(self, num_heads: int | None) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(64, 192), nn.Linear(64, 64)
        if num_heads is not None:
            self.num_heads = num_heads

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).view(*x.shape[:2], 3, 4, 16).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(x.shape))
        return out


def prune(model: nn.Module, inputs: Tensor, **settings: Any) -> Callable[[], object]:
    return lambda: et.apply(model, et.Prune(**settings), et.Sample.of(inputs))


def own_attention(num_heads: int | None) -> nn.Module:
    return nn.Sequential(nn.Sequential(Attention(num_heads)), nn.Linear(64, 3))


def small_net() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 3))


MISTAKES: dict[str, Mistake] = {
    # the list of the first newcomer
    "int4 skips a layer that is not there": run(
        "r, step 2, int4: skip: the pattern matches no layer (found before any training): got 'clasifier'",
        "did you mean 'classifier'?", steps="[train, int4: {skip: [clasifier]}]",
    ),
    "a head for other classes than the data's": Mistake(
        "export hf:lab --data csv:reviews.csv -o lab.pte",
        ("the head of hf:lab has 3 classes (neutral, bad, good), the data 2", "head: new"),
    ),
    "an own file for a model": Mistake("export mymodel.py", ("unknown model", "did you mean 'py:mymodel.py:build'?")),
    "an own file by its name": Mistake("export mymodel", ("did you mean 'py:mymodel.py:build'?",)),
    "an own function without py:": Mistake("export mymodel.py:build", ("did you mean 'py:mymodel.py:build'?",)),
    "an own class without a file": Mistake("export mymodel:Net", ("did you mean 'py:mymodel.py:Net'?",)),
    "py: without the function": Mistake("export py:mymodel.py", ("does not name a function", "mymodel.py:build'?")),
    "a function that is not there": Mistake("export py:mymodel.py:biuld", ("mymodel.py defines no", "mean 'build'?")),
    "an own model without inputs": Mistake("export py:mymodel.py:build", ("unknown: got 'Net'", "next: pass --inputs")),
    "a .pth for a model": Mistake("export w.pth", ("got 'w.pth'", "next: weights alone are not a model", "--weights")),
    "a state dict for a model": Mistake("export w.safetensors", ("next: weights alone are not a model: export py:",)),
    "a rank below one": Mistake(lambda: et.LoRA(rank=-1, targets=["*"]), ("LoRA, rank: must be at least 1: got -1",)),
    "peft's names": Mistake(
        lambda: et.LoRA(r=8, target_modules=["q"]),  # type: ignore[call-arg]
        ("LoRA, r: unknown field", "did you mean 'rank'?", "did you mean 'targets'?"),
    ),
    "a dict for a technique": Mistake(
        lambda: et.apply(nn.Linear(2, 2), {"lora": 8}),  # type: ignore[arg-type]
        ("et.apply: not a technique: got {'lora': 8}", "next: write et.LoRA(...)"),
    ),
    "a path for a model": Mistake(
        lambda: et.export("model.pt", torch.zeros(1, 2), "model.pte"),  # type: ignore[arg-type]
        ("et.export: not a model: got 'model.pt'", "next: give et.export an nn.Module first"),
    ),
    "inputs for a sample": Mistake(
        lambda: et.apply(nn.Linear(2, 2), et.Prune(), torch.zeros(1, 2)),  # type: ignore[arg-type]
        ("et.apply: sample is not a Sample: got 'Tensor'", "next: write sample=et.Sample.of(inputs)"),
    ),
    "an array for a tensor": Mistake(
        lambda: et.export(nn.Linear(2, 2), torch.zeros(1, 2).numpy(), "model.pte"),  # type: ignore[arg-type]
        ("the example inputs must be tensors", "next: convert arrays: torch.from_numpy(array)"), code=5,
    ),
    "a list of changes": Mistake(
        lambda: et.run("text-minilm", ["train.epochs=2"]),  # type: ignore[arg-type]
        ("overrides are a mapping: got ['train.epochs=2']", 'next: write {"train.epochs": 2}'),
    ),
    "own attention without num_heads": Mistake(
        prune(own_attention(None), torch.zeros(2, 3, 64), what=["heads"]),
        ("cannot be pruned: 0.0: without these units the model does not run", "widths from tensors and attributes"),
    ),
    "a whole model that is such an attention": Mistake(
        prune(Attention(None), torch.zeros(2, 3, 64)),
        ("(the whole model): without these units the model does not run",),
    ),
    "own attention that counts on its width": Mistake(
        prune(own_attention(4), torch.zeros(2, 3, 64), what=["heads"], ratio=0.5),
        ("cannot be pruned: 0.0: without these units the model does not run", "next: let the code take its widths"),
    ),
    "a ratio that leaves nothing": Mistake(
        prune(small_net(), torch.zeros(2, 16), ratio=0.99),
        ("channels: the ratio cannot be reached: round_to=8 keeps 8 of 32 in 0, 8 of 64 in 2: got 0.99",
         "next: use at most 0.83, or lower round_to"),
    ),
    "lr": run("r.yaml, step 1 (line 3), train.lr", "did you mean 'learning_rate'?", steps="[train: {lr: 1e-3}]"),
    "bs": run("train.bs: unknown field", "did you mean 'batch_size'?", steps="[train: {bs: 4}]"),
    "a model's folder without hf:": run("r.yaml, line 1", "did you mean 'hf:tinybert'?", model="tinybert"),
    "cvs:": run("r.yaml, line 2, data.source", "did you mean 'csv:reviews.csv'?", data="cvs:reviews.csv"),
    "csv: for JSON lines": run("did you mean 'jsonl:rows.jsonl'?", data="csv:rows.jsonl", code=3),
    "a pattern one letter off": run(
        "r, step 1, lora: targets: the pattern matches no layer", "got '*.quary'", "did you mean '*.query'?",
        steps="[lora: {targets: ['*.quary']}, train: {updates: 1}]",
    ),
    "a pattern without its star": run(
        "did you mean '*.query'?", steps="[lora: {targets: [query]}, train: {updates: 1}]"
    ),
    "generate with a classifier": Mistake(
        "generate classifier.pte Hello", ("a plain program, not a text-generation program", "--language"),
        code=5,
    ),
    "a hub that does not answer": run("hf:nobody/nothing could not be loaded", "does not respond", "next: check the id",
                                      model="hf:nobody/nothing"),
    "a text model for pictures": run(
        "hf:tinybert cannot do the task", "the rows are images with classes", "next: choose effnet-lite0 or timm:NAME",
        data="imagefolder:photos",
    ),
    "a file that is not there": run("the file nothere.csv does not exist", data="csv:nothere.csv", code=3),
    "a file one letter off": run("did you mean 'reviews.csv'?", data="csv:review.csv", code=3),
    "a verb": Mistake("runn r.yaml", ("No such command 'runn'. Did you mean 'run'?", "next: edgetune --help")),
    "a verb of a verb": Mistake("devices shwo pixel-8", ("Did you mean 'show'?", "next: edgetune devices --help")),
    "an option": Mistake("run r.yaml --resum", ("No such option: --resum", "--resume")),
    "a recipe": Mistake("run text-minlm", ("got 'text-minlm'", "did you mean 'text-minilm'?")),
    "a recipe's file": run("no such recipe: got 'r.yml'", "did you mean 'r.yaml'?", command="run r.yml"),
    "a device": Mistake("profile classifier.pte --device pixel8", ("did you mean 'pixel-8'?", "edgetune devices list")),
    "a device in a recipe": run(
        "r.yaml, line 5, profile.devices.1", "did you mean 'pixel-8'?", more="export: {}\nprofile: {devices: [pixel8]}"
    ),
    "a target": Mistake("export hf:lab --target xnnpak", ("unknown target", "did you mean 'xnnpack'?")),
    "a variant": run("got 'quik'", "'quick'", command="run r.yaml variant=quik", more="variants: {quick: {seed: 1}}"),
    "a setting on the command line": run("train.update", "mean 'updates'?", command="run r.yaml train.update=2"),
    "a step on the command line": run("got 'tarin'", "'1 train'?", command="run r.yaml --from tarin"),
    # recipes
    "tabs": run("r.yaml, line 4, column 1: not YAML", "next: indent with spaces", steps="\n\t- train"),
    "a colon in a value": run("line 1, column 10: not YAML", "into quotes", model="hf: tinybert"),
    "an open bracket": run("not YAML", "next: close each { with }", steps="[train: {updates: 1]"),
    "an open quote": run("not YAML", "next: close the quote", model="'hf:tinybert"),
    "settings beside their step": run(
        "step 1 (line 4)", "got ['lora', 'rank', 'targets']", "next: indent rank, targets further than lora",
        steps="\n- lora:\n  rank: 4\n  targets: ['*.query']",
    ),
    "steps without dashes": run("line 3, steps: must be a list of steps", "as in `- train`", steps="{train: {}}"),
    "no steps": run("steps: a recipe needs at least one step", "next: begin each step with a dash", steps=""),
    "a step in the plural": run("unknown step: got 'trains'", "did you mean 'train'?", steps="[trains]"),
    "a step of another library": run("got 'quantize'", "did you mean 'int8'?", steps="[quantize]"),
    "quantize, then train": run("train: cannot follow int4", "next: put train before int4", steps="[int4, train]"),
    "text for a list": run("lora.targets: must be a list, as in ['query']", steps="[lora: {targets: query}, train]"),
    "a device for a list": run("must be a list, as in ['pixel-8']", more="export: {}\nprofile: {devices: pixel-8}"),
    "a name for a section": run("must be a mapping, as in {target: ...}: got 'xnnpack'", more="export: xnnpack"),
    "a source as a mapping": run("is missing", "next: write source: csv:reviews.csv", data="{csv: reviews.csv}"),
    "a number in quotes": run("train.updates: must be a whole number: got '1'", steps="[train: {updates: '1'}]"),
    "a percentage for a share": run("prune.ratio: must be less than 1: got 25", steps="[prune: {ratio: 25}, train]"),
    "more blocks than there are": run("the model has 2 blocks", "next: use last-2 at most",
                                      steps="[sparse-update: {scheme: last-9}, train]"),
    "a hub's id for a folder one letter off": run("did you mean 'hf:tinybert'?", model="hf:tinyber"),
    "a setting outside its step": run("line 4, epochs", "next: it belongs in a step: - train: {epochs: ...}",
                                      more="epochs: 3"),
    "a page of the hub": run("did you mean 'hf:a/b'?", model="'https://huggingface.co/a/b'"),
    "a file in the web": run("unknown data", "next: download the file first", data="'https://example.org/a.csv'"),
    "a pattern for prune one letter off": run("skip: the pattern", "'*.query'?", steps="[prune: {skip: ['*.quary']}]"),
    "a size of images for texts": run("hf:tinybert does not take model.image_px", "next: leave model.image_px out",
                                      model="{source: 'hf:tinybert', max_length: 8, image_px: 32}"),
    "BERT as a language model": run("reads the tokens that it is to predict", "choose smollm2",
                                    data="{source: 'csv:reviews.csv', label: null}"),
    # files given to the wrong verb
    "a program as a recipe": Mistake("run classifier.pte", ("got 'classifier.pte'", "edgetune predict classifier.pte")),
    "rows as a recipe": Mistake("run reviews.csv", ("edgetune recipes new --model minilm --data csv:reviews.csv",)),
    "a recipe as a model": Mistake("export r.yaml", ("next: run a recipe with: edgetune run",), recipe()),
    "rows as a model": Mistake("export reviews.csv", ("next: give rows with --data", "--data csv:FILE")),
    "a program as a model": Mistake("export classifier.pte", ("next: give the model that the file was exported from",)),
    "a program of another tool": Mistake("export m.tflite", ("next: give the model that the file was exported from",)),
    "a model's folder as a run": Mistake("export lab", ("does not contain a run", "did you mean 'hf:lab'?")),
    "hf: of a folder without a model": Mistake("export hf:photos", ("could not be loaded", "by save_pretrained")),
    "hf: without a name": Mistake("export hf:", ("hf: does not name a model", "next: write hf:OWNER/NAME")),
    "rows without csv:": Mistake("export hf:lab --data reviews.csv", ("did you mean 'csv:reviews.csv'?",)),
    "a new recipe without prefixes": Mistake("recipes new --model tinybert --data reviews.csv", ("'hf:tinybert'?",)),
    "a program that is not there": Mistake("predict classifer.pte hello", ("no such", "mean 'classifier.pte'?")),
    "a table for a program": Mistake("predict reviews.csv hello", ("must end in .pte: got 'reviews.csv'",)),
    "a folder for a program": Mistake("inspect photos", ("this folder contains no model.pte: got 'photos'",)),
    "rubbish for a program": Mistake("inspect junk.pte", ("junk.pte: this is not an ExecuTorch program",), code=5),
    "a program without its manifest": Mistake(
        "profile junk.pte --device pixel-8", ("junk.json: the file that belongs to junk.pte is missing",), code=5
    ),
    "predict with a program that names no classes": Mistake(
        "predict classifier.pte hello", ("does not say how its inputs are made", "export a model by name"), code=5
    ),
    "a report of no run": Mistake("report photos", ("has no ledger.json: got 'photos'", "that `edgetune run` wrote")),
    "a report of a file": Mistake("report reviews.csv", ("no such run folder: got 'reviews.csv'",)),
    "a program that is no .pte": Mistake("export hf:lab -o m.onnx", ("must end in .pte", "write m.pte")),
    "a file for a folder": Mistake("export hf:lab -o reviews.csv/m.pte", ("reviews.csv: it is a file, not a folder",)),
    "a run in a folder with files": run("is not empty: got 'photos'", command="run r.yaml --out photos"),
    "a run in a file": run("cannot create the folder of the run", command="run r.yaml --out reviews.csv"),
    "nothing to resume": run("there is no run to resume", command="run r.yaml --resume"),
    "an image model for texts": run("the rows are texts with classes", model="hf:tinybert", data="csv:reviews.csv",
                                    command="run r.yaml model.source=effnet-lite0"),
}  # fmt: skip


class Fault(NamedTuple):
    """What stands in `rows.csv` (or what `data` names), and what the answer must say."""

    content: str | bytes
    says: tuple[str, ...]
    data: str = "csv:rows.csv"


def table(labels: list[str], header: str = "text,label", text: str = "text number {}") -> str:
    return "\n".join([header, *(f"{text.format(n)},{label}" for n, label in enumerate(labels))])


def jsonl(label: str) -> str:
    return "\n".join(f'{{"text": "text {n}", "label": {label}}}' for n in range(40))


TWO = ["good", "bad"] * 20
_NUMBERS, _TAGS = "{source: 'csv:rows.csv', target: label}", "{source: 'csv:rows.csv', text: text, tags: label}"
DATA_FAULTS: dict[str, Fault] = {
    "latin-1": Fault(
        table(TWO, text="caf\xe9 {}").encode("latin-1"),
        ("40 of 40 rows cannot be read (100 %, allowed 1 %): row 2 and 39 more: not in UTF-8",
         "next: save the file as UTF-8; it is probably in Latin-1 or Windows-1252"),
    ),
    "latin-1 here and there": Fault(
        (table(["too,many"] * 9 + TWO) + "\ncaf\xe9,good").encode("latin-1"),
        ("row 2 and 8 more: 3 columns where the header has 2; row 51: not in UTF-8", "next: fix these rows"),
    ),
    "UTF-16": Fault(table(TWO).encode("utf-16"), ("rows.csv is written in UTF-16", "next: save it as UTF-8")),
    "star ratings": Fault(
        table([f"{1 + n / 375:.4f}" for n in range(1500)]),
        ("the column 'label' has 1,500 different values in 1,500 rows", "write target: label instead of label"),
    ),
    "ids for labels": Fault(table([f"user-{n}" for n in range(60)]), ("60 different values", "so they are no classes")),
    "words for numbers": Fault(table(["many"] * 40), ("the target is not a number: many",), _NUMBERS),
    "one number": Fault(table(["1.5"] * 40), ("every training row has the same number: got 1.5",), _NUMBERS),
    "no column of numbers": Fault(table(TWO, "text,price"), ("no column for the target: got 'label'",), _NUMBERS),
    "too many tags": Fault(table(["O O O O"] * 40), ("row 2 and 39 more: 4 tags for 3 words",), _TAGS),
    "tags of another form": Fault(table(["O PER O"] * 40), ("'PER' is no tag of the form O, B-kind or I-kind",), _TAGS),
    "no entities": Fault(table(["O O O"] * 40), ("no training word is in an entity",), _TAGS),
    "missing labels": Fault(
        table([*TWO, *["nan"] * 20]), ("20 of 60 rows", "row 42 and 19 more: the label is missing: nan")
    ),
    "one label": Fault(table(["good"] * 40), ("at least two classes are needed: got 'good'", "rows of a second class")),
    "dates for labels": Fault(table([f"2024-01-{1 + n % 28:02}" for n in range(60)]), ("28 different values",)),
    "a quote that never closes": Fault(
        table(TWO) + '\n"open,good\nmore,bad', ("that starts on line 42 is never closed", "next: close the quote")
    ),
    "another column": Fault(
        table(TWO, "txt,label"), ("no column for the text: got 'text'", "did you mean 'txt'?", "next: set data.text")
    ),
    "columns in words": Fault(table(TWO, "Review Text,Sentiment"), ("did you mean 'Review Text'?",)),
    "a label column in words": Fault(table(TWO, "text,Sentiment"), ("for the label", "did you mean 'Sentiment'?")),
    "no header": Fault(table(TWO, "a first row,good"), ("no column for the text", "the first line must contain")),
    "bars between columns": Fault("text|label\na|b\n", ("no column for the text", "put a comma, a semicolon or a tab")),
    "a column twice": Fault(table(TWO, "text,label,text"), ("has two columns of the same name: got 'text'",)),
    "no text": Fault(table(TWO, text=""), ("40 of 40 rows", "row 2 and 39 more: empty text")),
    "copies of one text": Fault(table(TWO, text="the same"), ("1 different row leaves no test rows", "give more rows")),
    "a share for a percentage": Fault(
        table(TWO), ("no test rows", "a percentage: write 20 for 0.2"), "{source: 'csv:rows.csv', test_pct: 0.2}"
    ),
    "texts for labels": Fault(
        table(TWO), ("the column 'text' has 40 different values",), "{source: 'csv:rows.csv', label: text}"
    ),
    "a data frame": Fault("", ("is a data frame, not a list of rows", "zip(frame.text"), "py:mymodel.py:frame"),
    "mappings for rows": Fault("", ("train row 0 is a mapping: got 'text, label'",), "py:mymodel.py:mappings"),
    "an empty file": Fault("", ("rows.csv is empty",)),
    "a header alone": Fault("text,label\n", ("rows.csv contains no rows",)),
    "an Excel workbook": Fault(b"PK\x03\x04" + bytes(200), ("not a text file", "save the table as CSV in UTF-8")),
    "a packed table": Fault(gzip.compress(table(TWO).encode()), ("not a text file", "next: unpack it")),
    "JSON for a table": Fault(jsonl('"a"'), ("rows.csv is JSON, not a table", "jsonl: instead of csv:")),
    "a JSON list": Fault(f"[{jsonl('1')}]", ("not one object per line", "lines=True"), "jsonl:rows.csv2"),
    "fractions for labels": Fault(jsonl("1.5"), ("row 1 and 39 more", "set data.target"), "jsonl:rows.csv2"),
    "lists for labels": Fault(jsonl('["a", "b"]'), ("the label is a list, not one class",), "jsonl:rows.csv2"),
    "null for labels": Fault(jsonl("null"), ("the label is missing",), "jsonl:rows.csv2"),
    "a folder for a table": Fault("", ("photos is not a file",), "csv:photos"),
    "pictures in a heap": Fault("", ("photos/cat contains no class folders", "did you mean 'imagefolder:photos'?"),
                                "imagefolder:photos/cat"),
    "an empty folder": Fault("", ("contains no class folders", "nothing/CLASS/NAME.jpg"), "imagefolder:nothing"),
    "pictures of one class": Fault("", ("at least two classes are needed: got 'cat'",), "imagefolder:cats"),
    "one picture of each class": Fault("", ("2 different rows leave no test rows",), "imagefolder:few"),
    "a folder one letter off": Fault("", ("did you mean 'imagefolder:photos'?",), "imagefolder:photo"),
}  # fmt: skip
