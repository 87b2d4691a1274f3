"""A Hugging Face Trainer. Only the lines marked `# edgetune` are added."""

import torch
from safetensors.torch import load_file  # edgetune
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import edgetune as et  # edgetune

torch.manual_seed(0)
labels = torch.randint(4, (320,))
tokens = 8 * labels[:, None] + torch.randint(8, (320, 12))
rows = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]
size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
config = BertConfig(vocab_size=32, num_labels=4, **size)
model = BertForSequenceClassification(config)
techniques = [et.SparseUpdate(scheme="last-1"), et.LoRA(rank=4, targets=["*.query", "*.value"])]  # edgetune
model = et.apply(model, techniques)  # edgetune

arguments = TrainingArguments(
    output_dir="out", num_train_epochs=3, per_device_train_batch_size=16, learning_rate=3e-3, logging_steps=10,
    save_strategy="epoch", report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
)  # fmt: skip
trainer = Trainer(model, arguments, train_dataset=rows)
trainer.train()
model = et.finalize(model)  # edgetune

# A checkpoint was written before finalize: apply the same techniques, then load it.
again = et.apply(BertForSequenceClassification(config), techniques)  # edgetune
again.load_state_dict(load_file(f"out/checkpoint-{trainer.state.global_step}/model.safetensors"))  # edgetune
again = et.finalize(again)  # edgetune

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
